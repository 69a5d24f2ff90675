//! Traces of real and made-up runs: how much they were slowed, by whom, and what is no trace.

use std::io::Read;

use sim::trace::{Blame, Cause, blame, parse};

/// Ops of a published job, packed.
const ST: &[u8] = include_bytes!("traces/ST.csv.gz");

fn unpacked(packed: &[u8]) -> String {
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    text
}

fn blamed(text: &str) -> Result<Blame, String> {
    parse("t.csv", text).and_then(|rows| blame("t.csv", &rows)).map_err(|e| e.to_string())
}

fn near(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 0.005, "{found} for {expected}");
}

/// Against the published analysis of the same trace.
#[test]
fn a_published_trace_is_slowed_by_what_its_analysis_says() {
    let b = blamed(&unpacked(ST)).unwrap();
    assert_eq!((b.steps, b.workers, b.cause), (32, 8, Cause::Stage));
    near(b.slowdown, 1.1787);
    let stage = |s: usize| b.by_stage.iter().find(|x| x.stage == s).unwrap().slowdown;
    for (s, expected) in [(3, 1.2323), (0, 0.9980), (1, 0.9831), (2, 0.9825)] {
        near(stage(s), expected);
    }
    let worker = |w: usize| b.by_worker.iter().find(|x| x.dp_rank == w).unwrap().slowdown;
    near(worker(1), 1.1779);
    near(worker(0), 1.1731);
    let op = |name: &str| b.by_op.iter().find(|x| x.op == name).unwrap().slowdown;
    for (name, expected) in [
        ("forward-compute", 1.0875),
        ("backward-compute", 1.0742),
        ("embedding-grads-all-reduce", 1.0096),
        ("grads-reduce-scatter", 1.0027),
        ("forward-pp-comm", 0.9999),
    ] {
        near(op(name), expected);
    }
}

/// Two replicas of two stages, GPipe with two micro-batches; `slow` times the compute of replica 1.
fn made_up(slow: f64) -> Vec<String> {
    let mut rows = vec!["dp_rank,stage,step,optype,start_ts,duration,seq_id,mc".to_owned()];
    for step in 0..3 {
        for dp in 0..2 {
            let by = if dp == 1 { slow } else { 1.0 };
            let mut row = |stage: usize, op: &str, start: f64, length: f64, seq: i64| {
                rows.push(format!("{dp},{stage},{step},{op},{start},{length},{seq},0"));
            };
            for seq in 0..2 {
                let k = seq as f64;
                row(0, "forward-compute", 1.1 * k * by, by, seq);
                row(0, "forward-send", 1.1 * k * by + by, 0.1 * by, seq);
                row(1, "forward-recv", 1.1 * k * by + by * (1.0 - 0.1 * k), 0.1 * by * (1.0 + k), seq);
            }
            row(1, "forward-compute", 2.2 * by, by, 0);
            row(1, "forward-compute", 3.2 * by, by, 1);
            for stage in 0..2 {
                row(stage, "grads-reduce-scatter", 4.2 * by, 4.2 * (slow - by) + 0.5, 0);
            }
        }
    }
    rows
}

#[test]
fn a_slow_worker_is_found() {
    let even = blamed(&made_up(1.0).join("\n")).unwrap();
    assert_eq!(even.cause, Cause::Nothing);
    near(even.slowdown, 1.0);
    let slow = blamed(&made_up(2.0).join("\n")).unwrap();
    assert_eq!(slow.by_worker[0].dp_rank, 1);
    assert!(slow.slowdown > 1.2, "{slow:?}");
}

#[test]
fn what_is_no_trace_is_refused_by_line() {
    let check = |change: &dyn Fn(&mut Vec<String>), expected: &str| {
        let mut rows = made_up(1.0);
        change(&mut rows);
        let said = blamed(&rows.join("\n")).expect_err(expected);
        assert!(said.starts_with(expected), "{said} for {expected}");
    };
    check(&|r| r.clear(), "t.csv: no column dp_rank");
    check(&|r| r[0] = r[0].replace("duration", "length"), "t.csv: no column duration");
    check(&|r| r.truncate(1), "t.csv: no ops");
    check(&|r| r[1] = r[1].replace("forward-compute", "forward-comptue"), "t.csv, line 2: unknown op");
    check(&|r| r[1] = "0,0,0,forward-compute,0,-1,0,0".to_owned(), "t.csv, line 2: duration = \"-1\"");
    check(&|r| r[1] = "0,0,0,forward-compute,nan,1,0,0".to_owned(), "t.csv, line 2: start_ts = \"nan\"");
    check(&|r| r[1] = "0,0,0,forward-compute".to_owned(), "t.csv, line 2: start_ts = \"\"");
    check(&|r| drop(r.remove(2)), "t.csv, line 3: 1 of 2 ends of a message");
    check(&|r| r.retain(|l| !l.starts_with("1,1,2")), "t.csv: step 2 has ops of 3 of 2 x 2 workers");
    check(
        &|r| r[1] = "0,0,0,forward-compute,0,2,0,0".to_owned(),
        "t.csv, line 3: an op of dp_rank 0, stage 0 begins",
    );
}
