//! A real OpenTelemetry collector takes what journals tell.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

use super::eventful;
use crate::common::Lab;

/// A port that was free a moment ago: the collector does not say which one it was given.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

#[test]
fn rotel_takes_metrics_and_spans() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let program = root.join("target/otlp/rotel/rotel-agent");
    if !program.is_file() {
        return eprintln!("skipped: no collector here; pip install --target target/otlp rotel");
    }
    let lab = Lab::new();
    eventful(&lab);
    let [http, grpc] = [free_address(), free_address()];
    let mut command = Command::new(program);
    command.args(["start", "--exporter", "blackhole", "--debug-log-verbosity", "detailed"]);
    command.args(["--debug-log", "metrics", "--debug-log", "traces"]);
    command.args(["--otlp-http-endpoint", &http, "--otlp-grpc-endpoint", &grpc, "--pid-file"]);
    command.arg(lab.path("collector.pid")).arg("--log-file").arg(lab.path("collector.log"));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a collector");
    let mut said = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    while TcpStream::connect(&http).is_err() {
        assert!(child.try_wait().expect("asked").is_none(), "the collector does not start");
        std::thread::yield_now();
    }
    lab.ok(&format!("journal export run --otlp http://{http}"));
    // It speaks of what it took a moment later; each line is a word and what it is.
    let (mut gauges, mut spans) = (Vec::new(), 0);
    while spans < 6 || gauges.is_empty() {
        let line = said.next().expect("more to say").expect("a line");
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["->", "Name:", name] => gauges.push(name.to_owned()),
            ["Name", ":", "step"] => spans += 1,
            _ => {}
        }
    }
    child.kill().expect("stopped");
    child.wait().expect("ended");
    for name in ["loss", "lr", "tokens_per_s"] {
        let name = format!("phalanx.step.{name}");
        assert!(gauges.contains(&name), "{name} is not in {gauges:?}");
    }
}
