//! Runs and machines watched: `dash`, `top`, `journal`, `doctor`, and what shells and manuals know.

mod browser;
mod collector;
mod devtools;
mod terminal;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;

use crate::common::Lab;

/// A run that was saved, stopped and went on.
fn eventful(lab: &Lab) {
    lab.train("run", "--stop-after 3");
    lab.train("run", "");
}

#[test]
fn top_prints_plain_lines_on_a_pipe() {
    let lab = Lab::new();
    eventful(&lab);
    let line = lab.ok("top run");
    for said in ["run  finished  step 6/6  loss ", "tokens/s", "memory "] {
        assert!(line.contains(said), "{said} in {line}");
    }
    assert!(!line.contains('\u{1b}') && line.lines().count() == 1, "{line:?}");
    assert_eq!(lab.ok("top run --follow").lines().count(), 1, "a run that is over is followed no longer");
    let json = lab.json("top run --json");
    assert_eq!(json[0]["latest"]["step"], 6);
    assert_eq!(json[0]["restarts"]["stopped"], 1);
}

#[test]
fn what_is_no_run_is_refused_in_a_line() {
    let lab = Lab::new();
    for command in ["top", "dash", "journal ls", "journal show", "journal metrics", "journal export --csv"] {
        let ran = lab.run(&format!("{command} nowhere"));
        assert_eq!(ran.code, Some(2), "{command}: {}", ran.err);
        assert!(
            ran.err.contains("nowhere") && ran.err.contains("hint: give the directory of a run"),
            "{}",
            ran.err
        );
    }
    let ran = lab.run("dash . --port 0");
    assert!(ran.code == Some(2) && ran.err.contains("holds no journal"), "{}", ran.err);
    lab.write("short", "abc\n");
    lab.train("run", "");
    let ran = lab.run("dash run --token-file short");
    assert!(ran.code == Some(2) && ran.err.contains("16 letters"), "{}", ran.err);
    let ran = lab.run("dash run --bind 192.0.2.1");
    assert!(ran.code == Some(2) && ran.err.contains("an address of this machine"), "{}", ran.err);
}

#[test]
fn journals_are_listed_shown_and_exported() {
    let lab = Lab::new();
    eventful(&lab);
    let listed = lab.json("journal ls run --json");
    assert_eq!((&listed[0]["step"], &listed[0]["records"]["step"]), (&6.into(), &6.into()), "{listed}");
    let shown = lab.ok("journal show run");
    for said in ["start", "resume", "checkpoint", "finished   stopped on request", "all steps done"] {
        assert!(shown.contains(said), "{said} in\n{shown}");
    }
    let csv = lab.ok("journal export run --csv");
    let rows: Vec<Vec<&str>> = csv.lines().map(|l| l.split(',').collect()).collect();
    assert_eq!(rows.len(), 7, "{csv}");
    assert!(rows.iter().all(|r| r.len() == rows[0].len()), "{csv}");
    let of = |row: &[&str], name: &str| {
        let at = rows[0].iter().position(|c| *c == name).expect("a column");
        row[at].to_owned()
    };
    assert_eq!(rows[1..].iter().map(|r| of(r, "step")).collect::<Vec<_>>(), ["1", "2", "3", "4", "5", "6"]);
    // The very numbers of the journal.
    let records = journal::read(&journal::path(&lab.path("run"), 0)).expect("the journal");
    let losses: Vec<f64> = records
        .iter()
        .filter_map(|r| match r {
            journal::Record::Step(journal::Step { loss, .. }) => Some(*loss),
            _ => None,
        })
        .collect();
    let exported: Vec<f64> = rows[1..].iter().map(|r| of(r, "loss").parse().expect("a number")).collect();
    assert_eq!(exported, losses);
    lab.ok("journal export run --csv --kind checkpoint -o saved.csv");
    let saved = fs::read_to_string(lab.path("saved.csv")).expect("a file");
    let steps: Vec<&str> = saved.lines().skip(1).filter_map(|l| l.split(',').nth(1)).collect();
    assert_eq!(steps, ["2", "3", "4", "6"], "{saved}");
    lab.ok("journal export run --parquet steps.parquet");
    let table = fs::File::open(lab.path("steps.parquet")).expect("a file");
    let table = SerializedFileReader::new(table).expect("Parquet");
    let rows = table.get_row_iter(None).expect("rows");
    let exported: Vec<(i64, f64)> = rows
        .map(|row| row.expect("a row"))
        .map(|row| (row.get_long(1).expect("a step"), row.get_double(2).expect("a loss")))
        .collect();
    assert_eq!(exported, (1..).zip(losses).collect::<Vec<_>>());
    // A corpus of one document has nothing held out.
    assert_eq!(lab.ok("journal export run --csv --kind eval"), "time_us,step,loss,tokens,average_loss\n");
}

/// What a collector is told: requests to it, each with its path and its body.
fn collected(lab: &Lab, args: &str, answer: &'static str) -> (Vec<(String, serde_json::Value)>, Output) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let mut command = lab.command(&format!("journal export run {args} --otlp {url}"));
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("started");
    let waits = std::thread::spawn(move || child.wait_with_output().expect("ended"));
    listener.set_nonblocking(true).expect("set");
    let mut requests = Vec::new();
    while !waits.is_finished() {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::yield_now();
            continue;
        };
        stream.set_nonblocking(false).expect("set");
        let mut reader = BufReader::new(&stream);
        let (mut head, mut len) = (String::new(), 0);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a line");
            if let Some(n) = line.strip_prefix("Content-Length: ") {
                len = n.trim().parse().expect("a length");
            }
            if line.trim().is_empty() {
                break;
            }
            head += &line;
        }
        let mut body = vec![0; len];
        reader.read_exact(&mut body).expect("a body");
        (&stream).write_all(answer.as_bytes()).expect("answered");
        let path = head.split(' ').nth(1).expect("a path").to_owned();
        requests.push((path, serde_json::from_slice(&body).expect("JSON")));
    }
    (requests, waits.join().expect("ended"))
}

/// Holds requests to the schema that collectors are built from: names, types, ids, times.
fn are_by_the_schema(requests: &[(String, serde_json::Value)]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python = root.join("target/otlp");
    if !python.is_dir() {
        return eprintln!(
            "skipped: no schema of OpenTelemetry here; pip install --target target/otlp opentelemetry-proto"
        );
    }
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", python).arg(root.join("tests/otlp/check.py"));
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("start python3");
    serde_json::to_writer(child.stdin.take().expect("a pipe"), requests).expect("written");
    let done = child.wait_with_output().expect("ended");
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(done.status.success(), "{}{}", said(&done.stdout), said(&done.stderr));
}

#[test]
fn a_collector_gets_the_numbers_of_the_journal() {
    let lab = Lab::new();
    eventful(&lab);
    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    let (requests, done) = collected(&lab, "", OK);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let paths: Vec<&str> = requests.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["/v1/metrics", "/v1/traces"]);
    are_by_the_schema(&requests);
    let metrics = &requests[0].1["resourceMetrics"][0]["scopeMetrics"][0]["metrics"];
    let metric = |name: &str| {
        metrics.as_array().and_then(|all| all.iter().find(|m| m["name"] == name)).expect("a metric")
    };
    let sent = metric("phalanx.step.loss")["gauge"]["dataPoints"].as_array().expect("points").iter();
    let sent: Vec<f64> = sent.map(|p| p["asDouble"].as_f64().expect("a number")).collect();
    let csv = lab.ok("journal export run --csv");
    let losses: Vec<f64> = csv
        .lines()
        .skip(1)
        .map(|l| l.split(',').nth(2).expect("a loss").parse().expect("a number"))
        .collect();
    assert_eq!(sent, losses);
    let spans = requests[1].1["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().expect("spans");
    assert_eq!(spans.len(), 6);
    let ns = |v: &serde_json::Value| v.as_str().and_then(|t| t.parse::<u64>().ok()).expect("nanoseconds");
    assert!(spans.iter().all(|s| ns(&s["endTimeUnixNano"]) > ns(&s["startTimeUnixNano"])), "{spans:?}");
    const FULL: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nfull";
    let (_, refused) = collected(&lab, "", FULL);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("answered 503: full"));
    assert_eq!(lab.run("journal export run --otlp localhost:4318").code, Some(2));
}

#[test]
fn steps_that_were_lost_are_left_out_of_an_export_unless_asked_for() {
    let lab = Lab::new();
    lab.train("run", "--stop-after 5 --set checkpoint.every=2");
    // As after a kill: the newest checkpoint is gone, so that the run goes back to step 4.
    fs::remove_dir_all(lab.newest("run")).expect("remove a checkpoint");
    lab.train("run", "");
    let steps = |args: &str| -> Vec<u64> {
        let csv = lab.ok(&format!("journal export run --csv {args}"));
        csv.lines().skip(1).map(|l| l.split(',').nth(1).expect("a step").parse().expect("a number")).collect()
    };
    assert_eq!(steps(""), [1, 2, 3, 4, 5, 6]);
    assert_eq!(steps("--all"), [1, 2, 3, 4, 5, 5, 6]);
    let page = lab.ok("journal metrics run");
    assert!(page.contains("phalanx_redone_steps_total{run=\"run\"} 1\n"), "{page}");
}

#[test]
fn ranks_say_on_which_axis_they_waited() {
    let lab = Lab::new();
    lab.train("run", "--nproc 2 --set layout.tp=2");
    let json = lab.json("top run --json");
    let ranks = json[0]["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 2);
    for rank in ranks {
        let waits = rank["waits_s"].as_object().expect("waits");
        assert!(waits["tp"].as_f64().is_some_and(|s| s > 0.0), "{rank}");
        let sum: f64 = waits.values().filter_map(serde_json::Value::as_f64).sum();
        let all = rank["wait_s"].as_f64().expect("a number");
        assert!((sum - all).abs() <= 1e-9 * all.max(1e-6), "{rank}");
    }
    let page = lab.ok("journal metrics run");
    assert!(
        page.contains("phalanx_collective_wait_seconds_total{run=\"run\",rank=\"1\",axis=\"tp\"}"),
        "{page}"
    );
}

/// Names of metrics in a text: words that begin as ours do.
fn metrics_in(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|w| w.starts_with("phalanx_")).map(str::to_owned).collect()
}

#[test]
fn alerts_and_dashboard_name_metrics_that_exist() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/watching");
    let known: Vec<&str> = journal::prometheus::FAMILIES.iter().map(|f| f.name).collect();
    for file in ["alerts.yml", "grafana.json", "prometheus.yml"] {
        let text = fs::read_to_string(folder.join(file)).expect("a file");
        let named = metrics_in(&text);
        assert!(file == "prometheus.yml" || named.len() > 8, "{file} names {named:?}");
        for name in named {
            let base =
                ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(&name);
            assert!(known.contains(&name.as_str()) || base == "phalanx_step_seconds", "{file} names {name}");
        }
    }
    let text = fs::read_to_string(folder.join("grafana.json")).expect("a file");
    let dashboard: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    assert!(panels.iter().all(|p| p["type"] == "row" || p["targets"][0]["expr"].is_string()));
    for check in
        [vec!["check", "rules", "alerts.yml"], vec!["check", "config", "--syntax-only", "prometheus.yml"]]
    {
        let Ok(output) = Command::new("promtool").current_dir(&folder).args(&check).output() else {
            eprintln!("skipped: no promtool; the Debian package is prometheus");
            return;
        };
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{check:?}: {}", String::from_utf8_lossy(&said));
    }
}

#[test]
fn the_doctor_looks_at_everything_and_says_what_to_do() {
    let lab = Lab::new();
    let ran = lab.run("doctor --json");
    let json: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
    let checks = json["checks"].as_array().expect("checks");
    let names: Vec<&str> = checks.iter().filter_map(|c| c["name"].as_str()).collect();
    for name in [
        "open files",
        "locked memory",
        "/dev/shm",
        "huge pages",
        "processor",
        "memory",
        "clock",
        "loopback",
        "disk speed",
        "MPI",
    ] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    let bad = checks.iter().any(|c| c["verdict"] == "bad");
    assert_eq!(ran.code, Some(i32::from(bad)), "{}", ran.out);
    for c in checks.iter().filter(|c| c["verdict"] != "ok") {
        assert!(c["do"].as_str().is_some_and(|d| !d.is_empty()) && c["why"].as_str().is_some(), "{c}");
    }
    let left: Vec<_> =
        fs::read_dir(lab.path(".")).expect("the folder").flatten().map(|e| e.file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().contains("doctor")), "{left:?}");
    let ran = lab.run("doctor --dir nowhere");
    assert!(ran.code == Some(2) && ran.err.contains("hint:"), "{}", ran.err);
}

#[test]
fn several_ranks_of_one_machine_look_at_it_once() {
    let lab = Lab::new();
    let program = env!("CARGO_BIN_EXE_phalanx");
    let ran = lab.run(&format!("launch --standalone --nproc-per-node 2 {program} doctor --json"));
    let json: serde_json::Value =
        serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}: {}{}", ran.out, ran.err));
    let nodes = json["nodes"].as_array().expect("nodes");
    assert_eq!((nodes.len(), &nodes[0]["ranks"], nodes[0]["link"].is_null()), (1, &2.into(), true), "{json}");
    let checks = nodes[0]["checks"].as_array().expect("checks");
    assert_eq!(checks.iter().filter(|c| c["name"] == "disk speed").count(), 1);
    assert_eq!(ran.code, Some(i32::from(json["verdict"] == "bad")), "{}", ran.err);
}

#[test]
fn a_limit_that_is_too_low_is_found() {
    let lab = Lab::new();
    let program = env!("CARGO_BIN_EXE_phalanx");
    let output = Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$0\" doctor --json", program])
        .current_dir(lab.path("."))
        .output()
        .expect("a shell");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let files = json["checks"]
        .as_array()
        .and_then(|c| c.iter().find(|c| c["name"] == "open files"))
        .expect("a check");
    assert_eq!(files["verdict"], "warn", "{files}");
    assert!(files["do"].as_str().is_some_and(|d| d.contains("ulimit -n")), "{files}");
}

#[test]
fn shells_and_manuals_know_every_command() {
    let lab = Lab::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = lab.ok(&format!("completions {shell}"));
        for word in ["train", "dash", "doctor", "nproc"] {
            assert!(script.contains(word), "{word} in the completions of {shell}");
        }
    }
    lab.ok("man --dir pages");
    let help = lab.ok("help");
    let commands = help.lines().skip_while(|l| !l.starts_with("Commands:")).skip(1);
    let commands: Vec<&str> =
        commands.take_while(|l| l.starts_with("  ")).filter_map(|l| l.split_whitespace().next()).collect();
    assert!(commands.len() > 20, "{help}");
    for command in commands.into_iter().filter(|c| *c != "help") {
        let page = fs::read_to_string(lab.path(&format!("pages/phalanx-{command}.1"))).unwrap_or_default();
        assert!(page.contains(".SH SYNOPSIS"), "a page of {command}");
    }
    assert!(lab.path("pages/phalanx-journal-export.1").exists());
    let version = lab.ok("--version");
    for said in ["phalanx 0.", "commit: ", "features: cpu, ", "cuda"] {
        assert!(version.contains(said), "{version}");
    }
    assert_eq!(lab.ok("-V").lines().count(), 1);
}
