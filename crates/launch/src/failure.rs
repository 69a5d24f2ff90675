//! What a worker died of: its exit, its error file, and the root cause table.

use crate::signals;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An error file longer than this is cut: it is for people.
const LONGEST_ERROR_FILE: u64 = 1 << 20;

/// One failed worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// Rank in the job.
    pub rank: usize,
    /// Rank on its node.
    pub local_rank: usize,
    /// Process id on its node.
    pub pid: u32,
    /// The node's name.
    pub host: String,
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Seconds since 1970: what the error file says, else when the agent saw the exit.
    pub time_s: f64,
    /// The error file, if the worker wrote one.
    pub error_file: Option<PathBuf>,
    /// The error, in the worker's words if it wrote an error file.
    pub message: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    Signal(i32),
}

impl Failure {
    /// Gathers what is known about a worker that ended.
    pub(crate) fn new(rank: usize, local_rank: usize, pid: u32, ended: Ended, error_file: &Path) -> Failure {
        let (code, signal) = match ended {
            Ended::Code(code) => (Some(code), None),
            Ended::Signal(signal) => (None, Some(signal)),
        };
        let recorded = read_error_file(error_file);
        let message = match (&recorded, signal) {
            (Some(r), _) => r.message.clone(),
            (None, Some(s)) => format!("Signal {s} ({}) received by PID {pid}", signals::name(s)),
            (None, None) => "the worker wrote no error file (TORCHELASTIC_ERROR_FILE)".to_owned(),
        };
        Failure {
            rank,
            local_rank,
            pid,
            host: crate::net::host_name(),
            code,
            signal,
            time_s: recorded.as_ref().and_then(|r| r.time_s).unwrap_or_else(now_s),
            error_file: recorded.is_some().then(|| error_file.to_owned()),
            message,
        }
    }

    /// The exit code as a shell gives it: 128 + n for signal n.
    pub fn exit_code(&self) -> i32 {
        self.code.or(self.signal.map(|s| 128 + s)).unwrap_or(1)
    }

    /// One line for logs and for the other nodes.
    pub fn summary(&self) -> String {
        let how = match self.signal {
            Some(s) => format!("was ended by signal {s} ({})", signals::name(s)),
            None => format!("exited with code {}", self.exit_code()),
        };
        let text = format!(
            "rank {} (local rank {}, pid {}) on {} {how}",
            self.rank, self.local_rank, self.pid, self.host
        );
        let reason = self.message.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("");
        if self.error_file.is_some() { format!("{text}: {}", reason.trim()) } else { text }
    }

    /// Smaller is the better root cause: nobody tells a killed process to fail, and who blames another rank is its
    /// victim; among equals the earliest counts.
    fn order(&self) -> (u8, f64) {
        let class = match self.signal {
            Some(signal) if is_fatal(signal) => 0,
            _ if self.error_file.is_some() && comm::blames_peer(&self.message) => 2,
            _ => 1,
        };
        (class, self.time_s)
    }
}

/// Whether a process that died of `signal` was killed, or had a fault: it was not told to end.
pub(crate) fn is_fatal(signal: i32) -> bool {
    [libc::SIGKILL, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGSYS]
        .contains(&signal)
}

/// Puts the root cause first and the rest in order of rank.
pub(crate) fn sort(failures: &mut [Failure]) {
    failures.sort_by_key(|f| f.rank);
    let order = |(_, a): &(usize, &Failure), (_, b): &(usize, &Failure)| {
        let (a, b) = (a.order(), b.order());
        a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
    };
    if let Some(root) = failures.iter().enumerate().min_by(order).map(|(i, _)| i) {
        failures[..=root].rotate_right(1);
    }
}

/// The table torchrun ends a failed job with; the first failure is the root cause.
pub(crate) fn table(name: &str, failures: &[Failure]) -> String {
    let title = format!("{name} FAILED");
    let entries: Vec<String> = failures.iter().enumerate().map(|(i, f)| entry(i, f)).collect();
    let widest = entries.iter().flat_map(|e| e.lines()).map(str::len).max().unwrap_or(0);
    let width = widest.max(title.len()).min(60);
    let (border, line) = ("=".repeat(width), "-".repeat(width));
    let root = entries.first().map_or("", String::as_str);
    let others = if entries.len() > 1 { entries[1..].join("\n") } else { "  <NO_OTHER_FAILURES>".to_owned() };
    format!(
        "\n{border}\n{title}\n{line}\nFailures:\n{others}\n{line}\nRoot Cause (first observed failure):\n{root}\n{border}\n"
    )
}

fn entry(index: usize, f: &Failure) -> String {
    let file = f.error_file.as_ref().map_or("<N/A>".to_owned(), |p| p.display().to_string());
    let signal = f.signal.map_or(String::new(), |s| format!(" ({})", signals::name(s)));
    let code = f.signal.map_or(f.exit_code(), |s| -s);
    let mut text = format!("[{index}]:\n");
    let _ = writeln!(text, "  time      : {}", local_time(f.time_s));
    let _ = writeln!(text, "  host      : {}", f.host);
    let _ = writeln!(text, "  rank      : {} (local_rank: {})", f.rank, f.local_rank);
    let _ = writeln!(text, "  exitcode  : {code} (pid: {}){signal}", f.pid);
    let _ = writeln!(text, "  error_file: {file}");
    let _ = write!(text, "  traceback : {}", f.message.trim_end().replace('\n', "\n  "));
    text
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// `2026-11-23_05:10:00` in local time, as torchrun writes it.
fn local_time(time_s: f64) -> String {
    let seconds = time_s as libc::time_t;
    // SAFETY: all-zero is a valid tm; both pointers are to locals that outlive the call.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        libc::localtime_r(&raw const seconds, &raw mut tm);
        tm
    };
    let (year, month) = (tm.tm_year + 1900, tm.tm_mon + 1);
    format!("{year:04}-{month:02}-{:02}_{:02}:{:02}:{:02}", tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec)
}

/// The content of an error file.
struct Recorded {
    message: String,
    time_s: Option<f64>,
}

/// Reads the forms that PyTorch's `@record` and [`record_error`] write; a broken file gives its text.
fn read_error_file(path: &Path) -> Option<Recorded> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(LONGEST_ERROR_FILE).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let time = |v: &Value| v.as_f64().or_else(|| v.as_str().and_then(|s| s.parse().ok()));
    let Ok(data) = serde_json::from_str::<Value>(&text) else {
        return Some(Recorded { message: text, time_s: None });
    };
    let message = &data["message"];
    if let Some(plain) = message.as_str() {
        return Some(Recorded { message: plain.to_owned(), time_s: time(&data["timestamp"]) });
    }
    let extra = &message["extraInfo"];
    let stack = extra["py_callstack"].as_str().filter(|s| !s.trim().is_empty());
    let words = stack.or(message["message"].as_str()).unwrap_or("<N/A>");
    Some(Recorded { message: words.to_owned(), time_s: time(&extra["timestamp"]) })
}

/// For a worker: writes `message` to the error file its launcher asked for, if it asked. `kind` is a short name of the
/// error's type.
///
/// The agent shows it in the root cause table. Write it as early as the error is known, because the earliest error of
/// several workers is taken for the root cause. Returns whether it was written; there is nobody to tell if it was not.
pub fn record_error(kind: &str, message: &str) -> bool {
    let Some(path) = std::env::var_os("TORCHELASTIC_ERROR_FILE").filter(|p| !p.is_empty()) else {
        return false;
    };
    let path = PathBuf::from(path);
    let time = now_s();
    let data = json!({"message": {
        "message": format!("{kind}: {message}"),
        "extraInfo": {"py_callstack": format!("{kind}: {message}"), "timestamp": format!("{time:.6}")},
    }});
    // The agent may look at any moment: the file appears whole or not at all.
    let part = path.with_extension("json.part");
    fs::write(&part, data.to_string()).and_then(|()| fs::rename(&part, &path)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(rank: usize, ended: Ended, time_s: f64) -> Failure {
        Failure {
            time_s,
            host: "h".into(),
            ..Failure::new(rank, rank, 100, ended, Path::new("/nonexistent"))
        }
    }

    #[test]
    fn the_earliest_error_is_the_root_cause_unless_a_process_was_killed() {
        let check = |failures: &[Failure], expected: &[usize]| {
            let mut sorted = failures.to_vec();
            sort(&mut sorted);
            assert_eq!(sorted.iter().map(|f| f.rank).collect::<Vec<_>>(), expected);
        };
        let (a, b) = (failure(0, Ended::Code(1), 5.0), failure(1, Ended::Code(1), 4.0));
        let (c, d) =
            (failure(2, Ended::Signal(libc::SIGKILL), 6.0), failure(3, Ended::Signal(libc::SIGABRT), 1.0));
        check(&[a.clone(), b.clone()], &[1, 0]);
        check(&[a.clone(), b.clone(), c], &[2, 0, 1]);
        check(&[a.clone(), b.clone(), d], &[3, 0, 1]);
        let lost = "error: rank 0: rank 1 (pid 7 on h) was lost: its connection closed";
        let blames = |rank, message: &str, time_s| Failure {
            message: message.into(),
            error_file: Some("e".into()),
            ..failure(rank, Ended::Code(1), time_s)
        };
        let (e, f) = (blames(0, lost, 1.0), blames(2, "error: rank 2: rank 1 gave up: no memory", 2.0));
        check(&[e.clone(), b.clone(), f], &[1, 0, 2]);
        check(&[e, failure(1, Ended::Code(101), 9.0)], &[1, 0]);
        check(&[], &[]);
    }

    #[test]
    fn error_files_of_both_forms_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        let check = |text: &str, message: &str, time: Option<f64>| {
            fs::write(&path, text).unwrap();
            let read = read_error_file(&path).unwrap();
            assert_eq!((read.message.as_str(), read.time_s), (message, time), "{text}");
        };
        check(
            r#"{"message":{"message":"E: x","extraInfo":{"py_callstack":"T\nE: x","timestamp":"12"}}}"#,
            "T\nE: x",
            Some(12.0),
        );
        check(r#"{"message":"plain","timestamp":3}"#, "plain", Some(3.0));
        check(r#"{"other":1}"#, "<N/A>", None);
        check("not json", "not json", None);
        assert!(read_error_file(&folder.path().join("none")).is_none());
    }

    #[test]
    fn the_table_has_torchruns_form() {
        let table = table("train.py", &[failure(1, Ended::Signal(9), 0.0), failure(0, Ended::Code(3), 0.0)]);
        let expected = [
            "train.py FAILED",
            "Failures:\n[1]:",
            "  exitcode  : 3 (pid: 100)",
            "Root Cause (first observed failure):\n[0]:",
            "  rank      : 1 (local_rank: 1)",
            "  exitcode  : -9 (pid: 100) (SIGKILL)",
            "  error_file: <N/A>",
            "  traceback : Signal 9 (SIGKILL) received by PID 100",
        ];
        for part in expected {
            assert!(table.contains(part), "{part} in {table}");
        }
    }
}
