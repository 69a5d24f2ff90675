//! Checkpoints at URLs: trained into, looked at, resharded, taken up again; and a store that makes trouble.

mod proxy;
mod server;

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::common::{Lab, Ran, tiny};
use proxy::{Proxy, Trouble};
use server::{BUCKET, Server};

/// The program in a folder, with a store that it reaches at `address`.
struct At<'a> {
    lab: &'a Lab,
    address: &'a str,
}

impl At<'_> {
    fn command(&self, args: &str) -> Command {
        let mut command = self.lab.command(args);
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("AWS_")) {
            command.env_remove(name);
        }
        command.env("AWS_ENDPOINT_URL", format!("http://{}", self.address));
        command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
        command
    }

    fn run(&self, args: &str) -> Ran {
        ran(self.command(args))
    }

    fn ok(&self, args: &str) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args}\n{}{}", ran.out, ran.err);
        ran.out
    }

    fn json(&self, args: &str) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap_or_else(|e| panic!("{args}: {e}"))
    }

    fn steps(&self, url: &str) -> Vec<u64> {
        let found = self.json(&format!("ckpt ls {url} --json"));
        let rows = found["checkpoints"].as_array().expect("rows");
        rows.iter().filter_map(|r| r["step"].as_u64()).collect()
    }

    #[track_caller]
    fn is_equal(&self, a: &str, b: &str) {
        assert_eq!(self.json(&format!("ckpt diff {a} {b} --json"))["bit_equal"], true, "{a} and {b}");
    }

    /// A refusal with what, where and a hint.
    #[track_caller]
    fn refuses(&self, args: &str, code: i32, what: &[&str]) {
        refused(&self.run(args), args, code, what);
    }
}

fn ran(mut command: Command) -> Ran {
    let output = command.output().expect("start the program");
    Ran {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[track_caller]
fn refused(ran: &Ran, args: &str, code: i32, what: &[&str]) {
    assert_eq!(ran.code, Some(code), "{args}\n{}{}", ran.out, ran.err);
    assert!(what.iter().all(|w| ran.err.contains(w)), "{args}: {what:?} in {}", ran.err);
    assert!(ran.err.contains("hint: ") && !ran.err.contains("panicked"), "{args}: {}", ran.err);
}

/// A prefix that no other test, or run of it, uses.
fn prefix(name: &str) -> String {
    format!("s3://{BUCKET}/{name}-{}", std::process::id())
}

#[test]
fn a_store_holds_what_a_directory_holds() {
    let Some(server) = Server::start() else { return };
    let (lab, url) = (Lab::new(), prefix("holds"));
    let at = At { lab: &lab, address: &server.address };
    lab.train("here", "--set checkpoint.keep=0");
    let into = format!("--set checkpoint.keep=0 --set checkpoint.dir={url} --set train.sample_tokens=0");
    // Four ranks begin, two go on, from nothing but what is in the store.
    at.ok(&tiny("there", &format!("{into} --nproc 4 --set layout.dp=4 --stop-after 4")));
    assert!(!lab.path("there/checkpoints").exists());
    at.is_equal(&format!("{url}/step-00000004"), "here/checkpoints/step-00000004");
    let resumed = at.ok(&tiny("there", &format!("{into} --nproc 2 --set layout.dp=2 --resume")));
    assert!(resumed.contains("step 6") || resumed.contains("step      6"), "{resumed}");
    assert_eq!(at.steps(&url), [2, 4, 6]);
    assert_eq!(at.steps("there"), [2, 4, 6], "a run knows where its checkpoints lie");
    at.is_equal(&url, "here");

    let two = format!("{url}-two");
    at.ok(&format!("ckpt reshard {url}/step-00000004 {two} --ranks 2"));
    at.ok(&format!("ckpt reshard {two} back --ranks 3"));
    at.is_equal(&two, "here/checkpoints/step-00000004");
    at.is_equal("back", &format!("{url}/step-00000004"));
    at.refuses(&format!("ckpt reshard {url}/step-00000004 {two} --ranks 2"), 2, &["is there already"]);

    let verified = at.json(&format!("ckpt verify {url} --json"));
    assert_eq!(verified["checkpoints"].as_array().map(Vec::len), Some(3));
    assert_eq!(at.json(&format!("ckpt show {url} --json"))["step"], 6);
    at.ok(&format!("ckpt export {url} dcp --format dcp"));
    at.ok(&format!("ckpt import dcp {url}-dcp"));
    at.is_equal(&format!("{url}-dcp"), "here");
    at.refuses(&format!("ckpt export {url} {url}-out --format dcp"), 2, &["an export goes to a directory"]);

    // Weights are taken up from the URL alone.
    at.ok(&tiny("new", &format!("--init {url} --set train.steps=2")));
    at.ok(&format!("generate {url} --prompt mesh -n 3"));
    at.ok(&format!("ckpt prune {url} --keep 1"));
    assert_eq!(at.steps(&url), [6]);
}

#[test]
fn a_save_that_is_killed_is_never_seen() {
    let Some(server) = Server::start() else { return };
    let proxy = Proxy::before(&server);
    for (name, part) in [("shares", "/step-00000004/rank-"), ("commit", "/step-00000004/manifest.json")] {
        let (lab, url) = (Lab::new(), prefix(name));
        let args = tiny("run", &format!("--set checkpoint.dir={url} --set checkpoint.keep=0"));
        proxy.set(Trouble::Silence { text: part.to_owned() });
        let slow = At { lab: &lab, address: &proxy.address };
        // Only what writes is held up: whoever looks whether a step is there asks with HEAD.
        let mut child =
            slow.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start");
        proxy.wait();
        child.kill().expect("kill it");
        child.wait().expect("its end");
        proxy.set(Trouble::None);
        let at = At { lab: &lab, address: &server.address };
        assert_eq!(at.steps(&url), [2], "{name}");
        at.ok(&format!("ckpt verify {url}"));
        at.ok(&format!("{args} --resume"));
        assert_eq!(at.steps(&url), [2, 4, 6], "{name}");
        lab.train("alone", "");
        at.is_equal(&url, "alone");
    }
}

#[test]
fn a_save_that_fails_is_told_and_training_goes_on() {
    let Some(server) = Server::start() else { return };
    let proxy = Proxy::before(&server);
    let (lab, url) = (Lab::new(), prefix("fails"));
    let at = At { lab: &lab, address: &proxy.address };
    let answer =
        |text: &str, times| Trouble::Answer { text: text.to_owned(), status: "503 Slow Down", times };
    proxy.set(answer("/step-00000002/rank-", usize::MAX));
    let ran = at.run(&tiny("run", &format!("--set checkpoint.dir={url} --set checkpoint.keep=0")));
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    let said = format!("{}{}", ran.out, ran.err);
    assert!(said.contains("step 2 is not saved") && said.contains("503"), "{said}");
    assert_eq!(at.steps(&url), [4, 6]);
    // Less trouble than that is not noticed.
    proxy.set(answer("manifest.json", 2));
    assert_eq!(at.steps(&url), [4, 6]);
    proxy.set(answer("/step-00000006/rank-", 2));
    at.ok(&format!("ckpt verify {url}"));
}

#[test]
fn stores_that_cannot_be_used_are_one_message() {
    let Some(server) = Server::start() else { return };
    let proxy = Proxy::before(&server);
    let (lab, url) = (Lab::new(), prefix("refused"));
    let at = At { lab: &lab, address: &proxy.address };
    at.refuses(&format!("ckpt ls {url}"), 2, &["no checkpoint in", &url]);
    at.refuses(&format!("ckpt show {url}/step-00000009"), 2, &["no checkpoint in", "step-00000009"]);
    let gone = "s3://phalanx-has-no-such-bucket/x";
    at.refuses(&format!("ckpt ls {gone}"), 2, &["there is no such bucket", "AWS_ENDPOINT_URL"]);
    at.refuses(&tiny("a", &format!("--set checkpoint.dir={gone}")), 2, &["there is no such bucket"]);
    assert!(!lab.path("a/run.toml").exists());
    proxy.set(Trouble::Answer { text: BUCKET.to_owned(), status: "403 Forbidden", times: usize::MAX });
    at.refuses(&format!("ckpt ls {url}"), 2, &["the store denies it", "the credentials need the right"]);
    at.refuses(&tiny("a", "--set run.dir=s3://x/y"), 2, &["run.dir", "checkpoint.dir may be a URL"]);
    at.refuses("ckpt ls https://host/x", 2, &["https is no kind of object store", "AWS_ENDPOINT_URL"]);

    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let nobody = At { lab: &lab, address: &free.to_string() };
    nobody.refuses(&format!("ckpt ls {url}"), 1, &["no answer from the store", "refused", &free.to_string()]);

    let mut bare = at.command(&format!("ckpt ls {url}"));
    bare.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY").env("HOME", lab.path("nobody"));
    let ran = ran(bare);
    // In a cloud the machine itself has an identity.
    if !ran.err.contains("denies") {
        refused(&ran, "no credentials", 2, &["no credentials", "AWS_ACCESS_KEY_ID"]);
    }
}
