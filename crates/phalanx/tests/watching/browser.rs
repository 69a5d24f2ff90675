//! The page in a real browser, while a journal grows.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Stdio};

use journal::{Journal, Record};
use serde_json::json;

use super::devtools::Browser;
use crate::common::Lab;

/// A server under way, ended when dropped.
struct Served {
    child: Child,
    url: String,
}

impl Served {
    fn start(lab: &Lab, args: &str) -> Served {
        let mut child =
            lab.command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("start");
        let mut out = child.stdout.take().expect("a pipe");
        let (mut url, mut byte) = (String::new(), [0]);
        while out.read(&mut byte).expect("read stdout") == 1 && byte[0] != b'\n' {
            url.push(char::from(byte[0]));
        }
        Served { child, url }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn fact(run: usize, key: &str) -> String {
    format!("document.querySelector('[data-run=\"{run}\"] [data-fact=\"{key}\"] b')?.textContent")
}

/// A step after the last of the journal, as that was but for its loss.
fn after(last: &Record, n: u64, new_loss: f64) -> Record {
    let mut record = last.clone();
    if let Record::Step(journal::Step { step, loss, time_us, .. }) = &mut record {
        (*step, *loss) = (n, new_loss);
        *time_us += 1000;
    }
    record
}

/// Writes a picture where people find it.
fn keep(browser: &mut Browser, name: &str) {
    let data = browser.picture();
    // Base 64 of three bytes is four characters; an empty page is small.
    assert!(data.len() > 20_000, "{name} is nearly empty");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pages");
    fs::create_dir_all(&dir).expect("a folder for screenshots");
    fs::write(dir.join(name), decode(&data)).expect("write a picture");
}

fn decode(base64: &str) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = base64.bytes().filter_map(|b| DIGITS.iter().position(|d| *d == b));
    let (mut bytes, mut held, mut bits) = (Vec::new(), 0_usize, 0);
    for digit in digits {
        (held, bits) = (held << 6 | digit, bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
            held &= (1 << bits) - 1;
        }
    }
    bytes
}

#[test]
fn a_page_follows_runs_live() {
    let Some(program) = crate::report::browser::browser() else { return };
    let lab = Lab::new();
    lab.train("one", "--nproc 2 --trace --set layout.tp=2");
    lab.train("two", "--set train.seed=7");
    let server = Served::start(&lab, "dash one two");
    let mut browser = Browser::start(program, &lab.path("profile"));
    browser.open(&server.url);
    browser.until(&fact(0, "step"), &json!("6 of 6"));
    browser.until(&fact(1, "step"), &json!("6 of 6"));
    browser.until("document.querySelectorAll('#ranks tbody tr').length", &json!(2));
    browser.until("document.querySelectorAll('#line canvas').length", &json!(1));
    browser.until("document.querySelectorAll('#ops tbody tr').length > 5", &json!(true));
    browser.until(
        "[...document.querySelectorAll('#ranks th')].some(h => h.textContent === 'on tp')",
        &json!(true),
    );
    browser.until("document.querySelector('#link').textContent", &json!("live"));

    // The journal grows while the page is open.
    let records = journal::read(&journal::path(&lab.path("two"), 0)).expect("the journal");
    let last = records.iter().rfind(|r| matches!(r, Record::Step(_))).expect("a step");
    let mut journal = Journal::open(&lab.path("two"), 0).expect("the journal");
    journal.write(&after(last, 7, 1.25)).expect("write");
    browser.until(&fact(1, "step"), &json!("7 of 6"));
    browser.until(&fact(1, "loss"), &json!("1.2500"));
    browser.until("runs[1].columns.step.at(-1)", &json!(7));
    let warning = Record::Warning { time_us: 1, text: "<img src=x onerror=alert(1)>".into() };
    journal.write(&warning).expect("write");
    let shown = "[...document.querySelectorAll('#notes td')].some(d => d.textContent.includes('<img src=x'))";
    browser.until(shown, &json!(true));
    assert_eq!(browser.value("document.querySelectorAll('main img').length"), json!(0), "text stays text");

    // A closer look, smoothing, another axis.
    browser.value("zoom(3, 5)");
    browser.until(
        "!document.getElementById('all').hidden && zoomed.columns[1]?.step.join()",
        &json!("2,3,4,5,6"),
    );
    browser.value("document.getElementById('all').click()");
    for (id, value) in [("smooth", "90"), ("x", "time"), ("x", "tokens")] {
        let set = format!(
            "{{ const e = document.getElementById('{id}'); e.value = '{value}'; e.dispatchEvent(new Event('input')); }}"
        );
        browser.value(&set);
    }
    let hover = "{ const c = document.querySelector('[data-curve=loss] canvas'); const r = c.getBoundingClientRect(); \
         c.dispatchEvent(new PointerEvent('pointermove', { clientX: r.left + r.width / 2, clientY: r.top + 20 })); \
         document.querySelector('[data-curve=loss] .says').textContent }";
    let said = browser.value(hover);
    assert!(said.as_str().is_some_and(|s| s.contains("tokens") && s.contains("one ")), "{said}");
    keep(&mut browser, "dash.png");

    // A phone: nothing is wider than the screen.
    let phone = json!({ "width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": true });
    browser.call("Emulation.setDeviceMetricsOverride", phone);
    browser.until("document.documentElement.scrollWidth <= 390", &json!(true));
    keep(&mut browser, "dash-phone.png");

    assert_eq!(browser.value("document.documentElement.dataset.error ?? ''"), json!(""));
    assert!(browser.console.is_empty(), "{:?}", browser.console);
    let base = server.url.trim_end_matches('/');
    let elsewhere: Vec<&String> = browser
        .asked
        .iter()
        .filter(|u| !u.starts_with(base) && !u.starts_with("data:") && *u != "about:blank")
        .collect();
    assert!(elsewhere.is_empty(), "asked for {elsewhere:?}");
}
