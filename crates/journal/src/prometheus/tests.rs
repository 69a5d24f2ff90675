use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;
use crate::record::tests::step;

fn started(time_us: u64) -> Record {
    Record::RunStarted {
        time_us,
        version: "0.1.0".into(),
        fingerprint: "a\"b".into(),
        world: 4,
        rank: 0,
        host: "h\\1".into(),
        device: "cpu".into(),
        threads: None,
        parameters: 13_800_000,
        peak_flops_per_s: None,
    }
}

fn timed(at_s: u64, n: u64, took_s: f64) -> Record {
    let mut record = step(n, 2.5);
    if let Record::Step(Step { time_us, step_s, exposed_comm_s, waits_s, .. }) = &mut record {
        *time_us = at_s * 1_000_000;
        *step_s = took_s;
        *exposed_comm_s = Some(0.5);
        waits_s.insert("tp".into(), 0.25);
    }
    record
}

fn saved(at_s: u64, step: u64) -> Record {
    let path = String::new();
    Record::Checkpoint { time_us: at_s * 1_000_000, step, path, bytes: 100, save_s: 3.0, stall_s: Some(1.0) }
}

/// A run that is saved after two steps, killed after four, resumed, and then fails.
fn eventful() -> Metrics {
    let mut m = Metrics::default();
    let records = [
        started(0),
        timed(12, 1, 2.0),
        timed(14, 2, 2.0),
        saved(15, 2),
        timed(17, 3, 2.0),
        timed(19, 4, 2.0),
        started(49_000_000),
        Record::Resumed { time_us: 49_000_000, step: 2, path: "c".into() },
        timed(56, 3, 2.0),
        Record::Failed { time_us: 60_000_000, step: 4, error: "e".into(), hint: None },
    ];
    for record in &records {
        m.observe(record);
        m.observe_rank(3, record);
    }
    m
}

#[test]
fn a_page_says_what_the_journal_says() {
    let page = render(&[("a\nb".into(), eventful())], &[("phalanx_dash_clients", 2.0)], Format::Text);
    for line in [
        "phalanx_info{run=\"a\\nb\",version=\"0.1.0\",fingerprint=\"a\\\"b\",host=\"h\\\\1\",device=\"cpu\"} 1",
        "# TYPE phalanx_steps_total counter",
        "phalanx_steps_total{run=\"a\\nb\"} 5",
        "phalanx_redone_steps_total{run=\"a\\nb\"} 2",
        "phalanx_restarts_total{run=\"a\\nb\",cause=\"killed\"} 1",
        "phalanx_lost_seconds_total{run=\"a\\nb\",cause=\"redone\"} 4",
        "phalanx_lost_seconds_total{run=\"a\\nb\",cause=\"down\"} 30",
        "phalanx_lost_seconds_total{run=\"a\\nb\",cause=\"start\"} 15",
        "phalanx_lost_seconds_total{run=\"a\\nb\",cause=\"checkpoint\"} 1",
        "phalanx_goodput_ratio{run=\"a\\nb\"} 0.1",
        "phalanx_step_seconds_bucket{run=\"a\\nb\",le=\"1\"} 0",
        "phalanx_step_seconds_bucket{run=\"a\\nb\",le=\"2\"} 5",
        "phalanx_step_seconds_bucket{run=\"a\\nb\",le=\"+Inf\"} 5",
        "phalanx_step_seconds_sum{run=\"a\\nb\"} 10",
        "phalanx_collective_wait_seconds_total{run=\"a\\nb\",rank=\"3\",axis=\"tp\"} 1.25",
        "phalanx_failed{run=\"a\\nb\"} 1",
        "phalanx_running{run=\"a\\nb\"} 0",
        "phalanx_dash_clients 2",
    ] {
        assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
    }
    assert!(!page.contains("phalanx_eval_loss"), "what is not known is not said");
}

#[test]
fn what_is_not_finite_is_written_as_prometheus_wants_it() {
    let mut m = Metrics::default();
    m.observe(&step(3, f64::NAN));
    m.observe(&Record::Eval { time_us: 0, step: 3, loss: f64::INFINITY, average_loss: None, tokens: 1 });
    let page = render(&[("r".into(), m)], &[], Format::Text);
    for line in ["phalanx_loss{run=\"r\"} NaN", "phalanx_eval_loss{run=\"r\"} +Inf"] {
        assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
    }
}

/// The rules of OpenMetrics 1.0 that a page of counters, gauges and histograms can break.
#[test]
fn openmetrics_rules_hold() {
    let two = [("a".to_owned(), eventful()), ("b".to_owned(), eventful())];
    let page = render(&two, &[("phalanx_dash_refused_total", 1.0)], Format::OpenMetrics);
    assert!(page.ends_with("# EOF\n") && page.matches("# EOF").count() == 1);
    let (mut family, mut kind, mut seen, mut samples) = ("", "", Vec::new(), Vec::new());
    for line in page.lines().filter(|l| *l != "# EOF") {
        assert!(!line.is_empty() && line.trim() == line, "{line:?}");
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap_or_default();
            assert!(!seen.contains(&family), "{family} comes twice");
            seen.push(family);
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, is) = rest.split_once(' ').expect("a name and a type");
            assert_eq!(name, family);
            assert!(!name.ends_with("_total"), "{name}");
            kind = is;
        } else {
            let (sample, value) = line.rsplit_once(' ').expect("a value");
            let name = sample.split('{').next().unwrap_or_default();
            let suffix = name.strip_prefix(family).expect("samples stand under their family");
            let may = match kind {
                "counter" => &["_total"][..],
                "gauge" => &[""],
                _ => &["_bucket", "_sum", "_count"],
            };
            assert!(may.contains(&suffix), "{line}");
            let value: f64 = value.parse().expect("a number");
            assert!(kind != "counter" || value >= 0.0);
            samples.push(sample);
        }
    }
    let all = samples.len();
    samples.sort_unstable();
    samples.dedup();
    assert_eq!(samples.len(), all, "a sample comes twice");
}

#[test]
fn names_are_known_and_well_formed() {
    for f in FAMILIES {
        assert!(
            f.name.starts_with("phalanx_") && f.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
        );
        assert_eq!(f.name.ends_with("_total"), f.kind == Kind::Counter, "{}", f.name);
        assert_eq!(FAMILIES.iter().filter(|g| g.name == f.name).count(), 1, "{}", f.name);
    }
    let known = |name: &str| FAMILIES.iter().any(|f| f.name == name);
    assert!(eventful().values.keys().all(|(name, _)| known(name)), "{:?}", eventful().values.keys());
}

#[test]
fn promtool_finds_nothing_to_say() {
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        eprintln!("skipped: no promtool; the Debian package is prometheus");
        return;
    };
    let served = [("phalanx_dash_clients", 2.0), ("phalanx_dash_refused_total", 0.0)];
    let page = render(&[("a".into(), eventful()), ("b".into(), eventful())], &served, Format::Text);
    child.stdin.take().expect("a pipe").write_all(page.as_bytes()).expect("write to promtool");
    let output = child.wait_with_output().expect("promtool");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}\n{page}", String::from_utf8_lossy(&said));
}
