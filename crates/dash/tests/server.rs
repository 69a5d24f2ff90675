//! The server as strangers meet it: other hosts, odd requests, slow ones, too many; and what it says of runs.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dash::watch::{Expected, Lookup};
use dash::{Options, Server, serve};
use journal::{Journal, Record};
use serde_json::Value;

/// As long as a loaded machine may take over anything here.
const PATIENCE: Duration = Duration::from_secs(60);

struct Nothing;

impl Lookup for Nothing {
    fn steps_wanted(&self, _: &Path) -> Option<u64> {
        Some(100)
    }

    fn expected(&self, _: &Path, _: Option<usize>) -> spec::Result<Vec<Expected>> {
        Err(spec::Error::user("no calibration").hint("measure"))
    }
}

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    /// A run of two steps.
    fn new() -> Lab {
        let lab = Lab { dir: tempfile::tempdir().expect("a folder") };
        let mut journal = lab.journal();
        (1..=2).for_each(|n| journal.write(&step(n)).expect("write"));
        lab
    }

    fn run(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn journal(&self) -> Journal {
        Journal::open(&self.run(), 0).expect("a journal")
    }

    fn serve(&self, token: Option<&str>) -> Server {
        serve(Options {
            dirs: vec![self.run()],
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: token.map(str::to_owned),
            lookup: Arc::new(Nothing),
        })
        .expect("a server")
    }
}

fn step(n: u64) -> Record {
    Record::Step(journal::Step {
        time_us: 1_000_000 * n,
        step: n,
        loss: 1.0 / n as f64,
        grad_norm: 1.0,
        lr: 0.1,
        tokens: 10 * n,
        valid_tokens: 10,
        tokens_per_s: 5.0,
        step_s: 0.5,
        memory_bytes: 100,
        ..journal::Step::default()
    })
}

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.addr()).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// The whole answer to some bytes.
fn raw(server: &Server, request: &[u8]) -> String {
    let mut stream = connect(server);
    // A server that has seen enough may close before all was written.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Status and body of a GET, with more headers.
fn get(server: &Server, target: &str, headers: &str) -> (u16, String) {
    let answer = raw(server, format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{target}: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.unwrap_or_else(|| panic!("{head}")), body.to_owned())
}

/// Facts about the only run, once `is` holds of them.
fn facts_once(server: &Server, is: impl Fn(&Value) -> bool) -> Value {
    let until = Instant::now() + PATIENCE;
    loop {
        let (status, body) = get(server, "/api/runs", "");
        assert_eq!(status, 200, "{body}");
        let facts: Value = serde_json::from_str(&body).expect("JSON");
        if is(&facts[0]) {
            return facts[0].clone();
        }
        assert!(Instant::now() < until, "{facts:#}");
        std::thread::yield_now();
    }
}

fn at_step(n: u64) -> impl Fn(&Value) -> bool {
    move |facts| facts["latest"]["step"] == n
}

#[test]
fn pages_may_load_nothing_from_elsewhere() {
    let (lab, mut all) = (Lab::new(), String::new());
    let server = lab.serve(None);
    for target in ["/", "/page.css", "/page.js", "/charts.js", "/api/runs", "/metrics"] {
        let answer = raw(&server, format!("GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{target}: {answer}");
        assert!(
            answer.contains("Content-Security-Policy: default-src 'none'; script-src 'self'"),
            "{answer}"
        );
        assert!(answer.contains("X-Content-Type-Options: nosniff"), "{answer}");
        assert!(!answer.contains("Access-Control-Allow"), "{answer}");
        all += &answer;
    }
    for elsewhere in ["http://", "https://", "src=\"//", "@import"] {
        assert!(!all.contains(elsewhere), "something is loaded from {elsewhere}");
    }
}

#[test]
fn no_path_leads_to_files() {
    let lab = Lab::new();
    let server = lab.serve(None);
    for target in [
        "/../../../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/run.toml",
        "/journal-00000.jsonl",
        "/page.css/../../Cargo.toml",
        "/api/curves?run=../../etc",
    ] {
        let (status, body) = get(&server, target, "");
        assert!(!body.contains("root:") && !body.contains("[package]"), "{target}: {body}");
        // A number that cannot be read is the default.
        assert!(status == 404 || target.contains("run="), "{target}: {status} {body}");
    }
    assert_eq!(get(&server, "/api/curves?run=7", "").0, 404);
    assert_eq!(get(&server, "/api/timeline?run=18446744073709551615", "").0, 404);
}

#[test]
fn a_page_of_another_site_gets_nothing() {
    let lab = Lab::new();
    let server = lab.serve(None);
    let answer = raw(&server, b"GET /api/runs HTTP/1.1\r\nHost: evil.example\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 403 ") && !answer.contains("\"latest\""), "{answer}");
    assert!(raw(&server, b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 403 "));
}

#[test]
fn a_token_is_asked_for_where_it_is_given() {
    let lab = Lab::new();
    let server = lab.serve(Some("0123456789abcdef"));
    assert_eq!(get(&server, "/", "").0, 401);
    assert_eq!(get(&server, "/metrics", "Authorization: Bearer wrong\r\n").0, 401);
    assert_eq!(get(&server, "/metrics", "Authorization: Bearer 0123456789abcdef\r\n").0, 200);
    let welcome = raw(&server, b"GET /?token=0123456789abcdef HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(welcome.starts_with("HTTP/1.1 303 ") && welcome.contains("\r\nLocation: /\r\n"), "{welcome}");
    let cookie = welcome.lines().find_map(|l| l.strip_prefix("Set-Cookie: ")).expect("a cookie");
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
    let pair = cookie.split(';').next().expect("a pair");
    assert_eq!(get(&server, "/", &format!("Cookie: {pair}\r\n")).0, 200);
    assert!(server.url().ends_with("/?token=0123456789abcdef"), "{}", server.url());
}

#[test]
fn who_can_be_reached_by_others_asks_for_a_token() {
    let lab = Lab::new();
    let open = Options {
        dirs: vec![lab.run()],
        bind: SocketAddr::from(([0, 0, 0, 0], 0)),
        token: None,
        lookup: Arc::new(Nothing),
    };
    let e = serve(open).err().expect("refused");
    assert!(e.to_string().contains("no token is asked for"), "{e}");
    let server = lab.serve(None);
    let taken =
        Options { dirs: vec![lab.run()], bind: server.addr(), token: None, lookup: Arc::new(Nothing) };
    let e = serve(taken).err().expect("refused");
    assert!(e.hint_text().is_some_and(|h| h.contains("--port")), "{e}");
}

#[test]
fn odd_requests_are_refused_in_a_line() {
    let lab = Lab::new();
    let server = lab.serve(None);
    let check = |request: &[u8], status: &str| {
        let answer = raw(&server, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{}: {answer}",
            String::from_utf8_lossy(request)
        );
    };
    check(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", "405");
    check(b"DELETE /api/runs HTTP/1.1\r\nHost: localhost\r\n\r\n", "405");
    check(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n123456789", "413");
    check(b"hello\r\n\r\n", "400");
    check(b"\x16\x03\x01\x02\x00\r\n\r\n", "400");
    let long = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(20_000));
    check(long.as_bytes(), "431");
    let head = raw(&server, b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "a head and no body: {head}");
    assert_eq!(get(&server, "/healthz", "").0, 200, "it goes on");
}

#[test]
fn silent_and_slow_clients_are_let_go_and_too_many_are_told() {
    let lab = Lab::new();
    let server = lab.serve(None);
    // Each holds a place and says half a word.
    let mut silent: Vec<TcpStream> = (0..64).map(|_| connect(&server)).collect();
    silent.iter_mut().for_each(|s| s.write_all(b"GET /").expect("write"));
    // Places are taken by threads, which take a moment to start.
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = raw(&server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
        if answer.starts_with("HTTP/1.1 503") {
            break;
        }
        assert!(Instant::now() < until, "{answer}");
    }
    let mut answer = String::new();
    silent[0].read_to_string(&mut answer).expect("an answer to the silent");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    drop(silent);
    loop {
        let answer = raw(&server, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
        if answer.starts_with("HTTP/1.1 200") {
            assert!(answer.contains("phalanx_dash_refused_total"), "{answer}");
            break;
        }
        assert!(Instant::now() < until, "{answer}");
    }
}

#[test]
fn pages_that_look_on_leave_room_for_others() {
    let lab = Lab::new();
    let server = lab.serve(None);
    let ask = || {
        let mut stream = connect(&server);
        stream.write_all(b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("write");
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        reader.read_line(&mut first).expect("an answer");
        (first, reader)
    };
    let all: Vec<_> = (0..50).map(|_| ask()).collect();
    let served = all.iter().filter(|(first, _)| first.contains("200")).count();
    assert_eq!(served, 48);
    assert_eq!(get(&server, "/healthz", "").0, 200);
}

#[test]
fn what_is_appended_is_told_at_once() {
    let lab = Lab::new();
    let server = lab.serve(None);
    facts_once(&server, at_step(2));
    let mut stream = connect(&server);
    stream.write_all(b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("write");
    let mut lines = BufReader::new(stream).lines().map(|l| l.expect("a line"));
    let mut next = |name: &str| {
        let event = format!("event: {name}");
        lines.find(|l| *l == event).expect("the event");
        let data = lines.next().expect("data");
        serde_json::from_str::<Value>(data.strip_prefix("data: ").expect("data")).expect("JSON")
    };
    let whole = next("whole");
    assert_eq!(whole["curves"]["step"], serde_json::json!([1, 2]));
    assert_eq!(whole["facts"]["steps_wanted"], 100);
    let mut journal = lab.journal();
    journal.write(&step(3)).expect("write");
    let points = next("points");
    assert_eq!(points["points"][0][0], 3);
    let failed = Record::Failed { time_us: 1, step: 3, error: "disk".into(), hint: Some("free it".into()) };
    journal.write(&failed).expect("write");
    loop {
        let facts = next("facts");
        if facts[0]["facts"]["state"] == "failed" {
            let note = facts[0]["facts"]["notes"].as_array().and_then(|n| n.last()).expect("a note").clone();
            assert_eq!(note["text"], "disk; free it");
            break;
        }
    }
}

#[test]
fn journals_that_are_cut_replaced_or_odd_are_followed() {
    let lab = Lab::new();
    let path = journal::path(&lab.run(), 0);
    let server = lab.serve(None);
    facts_once(&server, at_step(2));
    let append = |text: &str| {
        let mut file = File::options().append(true).open(&path).expect("the journal");
        file.write_all(text.as_bytes()).expect("write");
    };
    append("{\"kind\":\"from_the_future\",\"x\":1}\nnot a record\n");
    let facts = facts_once(&server, |f| f["damage"]["lines"] == 1);
    assert_eq!(facts["unknown"]["from_the_future"], 1);
    // Half a record, then its rest.
    let line = serde_json::to_string(&step(3)).expect("plain data") + "\n";
    append(&line[..20]);
    append(&line[20..]);
    facts_once(&server, at_step(3));
    // Cut off.
    let first = serde_json::to_string(&step(1)).expect("plain data") + "\n";
    fs::write(&path, &first).expect("write");
    facts_once(&server, |f| at_step(1)(f) && f["damage"]["lines"] == 0);
    // Moved aside, as --fresh does, and begun anew.
    fs::rename(&path, lab.run().join("old")).expect("move");
    facts_once(&server, |f| f["latest"].is_null());
    lab.journal().write(&step(9)).expect("write");
    facts_once(&server, at_step(9));
}

#[test]
fn metrics_come_in_both_formats() {
    let lab = Lab::new();
    let server = lab.serve(None);
    facts_once(&server, at_step(2));
    let (_, text) = get(&server, "/metrics", "");
    assert!(text.contains("phalanx_steps_total{run=\"run\"} 2\n") && !text.contains("# EOF"), "{text}");
    let (_, open) = get(&server, "/metrics", "Accept: application/openmetrics-text;version=1.0.0\r\n");
    assert!(open.contains("# TYPE phalanx_steps counter\n") && open.ends_with("# EOF\n"), "{open}");
}
