//! Pages in a real browser, where there is one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{RUN, SERVE, shows};
use crate::common::Lab;

/// Debian's headless shell itself, not the script that starts it; then what else may be there.
const BROWSERS: [&str; 6] = [
    "/usr/lib/chromium/chromium-headless-shell",
    "/usr/lib/chromium/chromium",
    "/usr/bin/chromium",
    "/usr/bin/chromium-browser",
    "/usr/bin/google-chrome",
    "/usr/bin/google-chrome-stable",
];
/// Milliseconds that the page gets on the browser's own clock.
const BUDGET: &str = "--virtual-time-budget=2000";

pub(crate) fn browser() -> Option<&'static str> {
    let found = BROWSERS.into_iter().find(|b| Path::new(b).is_file());
    if found.is_none() {
        eprintln!(
            "skipped: no browser at {}; the Debian package is chromium-headless-shell",
            BROWSERS.join(", ")
        );
    }
    found
}

/// What a browser says of a page, and its messages.
fn open(browser: &str, lab: &Lab, flags: &[&str], page: &Path) -> (String, String) {
    let output = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--enable-logging=stderr",
            BUDGET,
        ])
        .arg(format!("--user-data-dir={}", lab.path("profile").display()))
        .args(flags)
        .arg(format!("file://{}", page.display()))
        .output()
        .expect("start the browser");
    (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

/// Opens a page; its scripts must have run without a complaint. Returns the page as it is then.
fn clean(browser: &str, lab: &Lab, page: &Path) -> String {
    let (dom, messages) = open(browser, lab, &["--dump-dom"], page);
    assert!(dom.contains("data-ready=\"yes\""), "scripts did not run: {messages}");
    assert!(!dom.contains("data-error="), "{}", dom.lines().nth(1).unwrap_or_default());
    let complaints: Vec<&str> = messages.lines().filter(|l| l.contains("CONSOLE")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    dom
}

/// Where screenshots are kept to be looked at.
fn artefact(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages");
    fs::create_dir_all(&dir).expect("a folder for screenshots");
    dir.join(name)
}

#[test]
fn a_browser_runs_the_pages_without_complaint() {
    let Some(browser) = browser() else { return };
    let lab = Lab::new();
    let json = lab.json(&format!("{RUN} --json --html plan.html"));
    lab.ok("guide --html guide.html");
    let dom = clean(browser, &lab, &lab.path("plan.html"));
    shows(&dom, &json);
    clean(browser, &lab, &lab.path("guide.html"));
    lab.ok("decide --profile 6x64@0.3,42x512@0.8 --html decide.html");
    clean(browser, &lab, &lab.path("decide.html"));
    lab.ok(&format!("{SERVE} --html serving.html"));
    clean(browser, &lab, &lab.path("serving.html"));
    let pages =
        [("plan", "1280,5600"), ("guide", "1280,2400"), ("decide", "1280,2800"), ("serving", "1280,3200")];
    for (page, size) in pages {
        let picture = artefact(&format!("{page}.png"));
        let shot = format!("--screenshot={}", picture.display());
        let (_, messages) = open(
            browser,
            &lab,
            &[&shot, &format!("--window-size={size}")],
            &lab.path(&format!("{page}.html")),
        );
        let bytes = fs::metadata(&picture).map_or(0, |m| m.len());
        assert!(bytes > 20_000, "{} has {bytes} bytes: {messages}", picture.display());
    }
}
