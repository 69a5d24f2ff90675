//! A headless browser driven over a pair of pipes: JSON messages that end in NUL.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// As long as a loaded machine may take over anything here.
const PATIENCE: Duration = Duration::from_secs(90);

pub(super) struct Browser {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    session: String,
    next: u64,
    /// What pages wrote to their consoles, and what they asked the network for.
    pub(super) console: Vec<String>,
    pub(super) asked: Vec<String>,
}

impl Browser {
    /// Starts it with an empty page. The shell passes its ends of the pipes on as files 3 and 4.
    pub(super) fn start(program: &str, profile: &Path) -> Browser {
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null", program])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--remote-debugging-pipe", "--window-size=1280,2000"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the browser");
        let to = child.stdin.take().expect("a pipe");
        let from = BufReader::new(child.stdout.take().expect("a pipe"));
        let (console, asked) = (Vec::new(), Vec::new());
        let mut browser = Browser { child, to, from, session: String::new(), next: 0, console, asked };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        browser.session =
            browser.call("Target.attachToTarget", attach)["sessionId"].as_str().expect("one").to_owned();
        for domain in ["Page.enable", "Runtime.enable", "Network.enable", "Log.enable"] {
            browser.call(domain, json!({}));
        }
        browser
    }

    /// Calls a method and waits for what it returns.
    pub(super) fn call(&mut self, method: &str, params: Value) -> Value {
        self.next += 1;
        let mut message = json!({ "id": self.next, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        write!(self.to, "{message}\0").expect("write to the browser");
        loop {
            let mut bytes = Vec::new();
            self.from.read_until(0, &mut bytes).expect("read from the browser");
            assert!(bytes.pop() == Some(0), "the browser ended at {method}");
            let answer: Value = serde_json::from_slice(&bytes).expect("JSON");
            if answer["id"] == self.next {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            match answer["method"].as_str() {
                Some("Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded") => {
                    self.console.push(answer["params"].to_string());
                }
                Some("Network.requestWillBeSent") => {
                    self.asked
                        .push(answer["params"]["request"]["url"].as_str().unwrap_or_default().to_owned());
                }
                _ => {}
            }
        }
    }

    pub(super) fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url }));
    }

    /// The value of an expression on the page.
    pub(super) fn value(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call("Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    /// Waits until an expression is `expected`.
    pub(super) fn until(&mut self, expression: &str, expected: &Value) {
        let until = Instant::now() + PATIENCE;
        loop {
            let found = self.value(expression);
            if found == *expected {
                return;
            }
            assert!(Instant::now() < until, "{expression} is {found}, not {expected}; {:?}", self.console);
            std::thread::yield_now();
        }
    }

    /// A picture of what is on the screen, as PNG in base 64.
    pub(super) fn picture(&mut self) -> String {
        self.call("Page.captureScreenshot", json!({}))["data"].as_str().expect("a picture").to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // One that is gone already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
