//! Follows the workers' log files on the console.
//!
//! Workers write to files, never to a pipe of the agent: the files are complete whatever happens to the agent, and a
//! slow console cannot hold up a worker. One thread reads what was added and writes whole lines.

use spec::{Error, Result};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Short enough to look immediate, long enough to cost nothing.
const INTERVAL: Duration = Duration::from_millis(50);
/// A line longer than this is written in pieces, so that memory stays bounded.
const LONGEST_LINE: usize = 1 << 20;
/// Bytes taken from one file per turn, so that one loud worker cannot silence the others.
const TURN: usize = 1 << 20;

/// Where lines are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Console {
    Stdout,
    Stderr,
}

/// One file that is followed.
pub(crate) struct Source {
    path: PathBuf,
    file: Option<File>,
    console: Console,
    prefix: Vec<u8>,
    /// The unfinished last line.
    rest: Vec<u8>,
}

impl Source {
    pub(crate) fn new(path: PathBuf, console: Console, prefix: &str) -> Source {
        Source { path, file: None, console, prefix: prefix.as_bytes().to_vec(), rest: Vec::new() }
    }

    /// Reads what was added and appends the whole lines, each with the prefix, to `out`; whether there may be more.
    fn read(&mut self, out: &mut Vec<u8>) -> bool {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return false };
        let before = self.rest.len();
        let taken = (&*file).take(TURN as u64).read_to_end(&mut self.rest).unwrap_or(0);
        let Some(last) = self.rest[before..].iter().rposition(|b| *b == b'\n').map(|i| before + i + 1) else {
            if self.rest.len() > LONGEST_LINE {
                self.finish(out);
            }
            return taken == TURN;
        };
        for line in self.rest[..last].split_inclusive(|b| *b == b'\n') {
            out.extend_from_slice(&self.prefix);
            out.extend_from_slice(line);
        }
        self.rest.drain(..last);
        taken == TURN
    }

    /// Appends the unfinished line, ended.
    fn finish(&mut self, out: &mut Vec<u8>) {
        if !self.rest.is_empty() {
            out.extend_from_slice(&self.prefix);
            out.append(&mut self.rest);
            out.push(b'\n');
        }
    }
}

/// Copies of the lines that hold one of some texts: `--duplicate-stdout-filters`.
struct Filtered {
    console: Console,
    texts: Vec<String>,
    file: File,
}

impl Filtered {
    fn open(console: Console, texts: &[String], path: &Path) -> Result<Option<Filtered>> {
        if texts.is_empty() {
            return Ok(None);
        }
        let file = File::create(path).map_err(|e| Error::io("create log file", path, &e))?;
        Ok(Some(Filtered { console, texts: texts.to_vec(), file }))
    }

    fn write(&mut self, lines: &[u8]) {
        let matches = |line: &&[u8]| {
            let line = String::from_utf8_lossy(line);
            self.texts.iter().any(|t| line.contains(t.as_str()))
        };
        for line in lines.split_inclusive(|b| *b == b'\n').filter(matches) {
            // A full disk must not end the training; the lines are in the worker's own file too.
            let _ = self.file.write_all(line);
        }
    }
}

/// The thread that follows the files of one attempt.
pub(crate) struct Tail {
    stop: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Tail {
    /// Starts to follow `sources`; lines with one of the texts are copied into the attempt's `folder` too.
    pub(crate) fn start(
        sources: Vec<Source>,
        stdout_texts: &[String],
        stderr_texts: &[String],
        folder: &Path,
    ) -> Result<Tail> {
        let filtered = [
            Filtered::open(Console::Stdout, stdout_texts, &folder.join("filtered_stdout.log"))?,
            Filtered::open(Console::Stderr, stderr_texts, &folder.join("filtered_stderr.log"))?,
        ];
        let filtered: Vec<Filtered> = filtered.into_iter().flatten().collect();
        let (stop, stopped) = channel();
        let thread = (!sources.is_empty()).then(|| {
            let builder = std::thread::Builder::new().name("launch-tail".into());
            builder.spawn(move || follow(sources, filtered, &stopped))
        });
        let thread = thread.transpose().map_err(|e| Error::failure(format!("start the log thread: {e}")))?;
        Ok(Tail { stop, thread })
    }

    /// Shows what is left; call it when the writers are gone.
    pub(crate) fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.end();
    }
}

fn follow(mut sources: Vec<Source>, mut filtered: Vec<Filtered>, stopped: &Receiver<()>) {
    let mut out = Vec::new();
    let mut more = false;
    loop {
        let wait = if more { Duration::ZERO } else { INTERVAL };
        let last = !matches!(stopped.recv_timeout(wait), Err(RecvTimeoutError::Timeout));
        more = false;
        for source in &mut sources {
            loop {
                out.clear();
                let again = source.read(&mut out);
                if last && !again {
                    source.finish(&mut out);
                }
                show(source.console, &out);
                filtered.iter_mut().filter(|f| f.console == source.console).for_each(|f| f.write(&out));
                if !(last && again) {
                    more |= again;
                    break;
                }
            }
        }
        if last {
            return;
        }
    }
}

/// Writes whole lines at once. A closed console is no reason to stop the training.
fn show(console: Console, lines: &[u8]) {
    if lines.is_empty() {
        return;
    }
    let _ = match console {
        Console::Stdout => {
            let mut out = std::io::stdout().lock();
            out.write_all(lines).and_then(|()| out.flush())
        }
        Console::Stderr => std::io::stderr().lock().write_all(lines),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_are_taken_and_each_has_the_prefix() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut source = Source::new(path.clone(), Console::Stdout, "[r0]:");
        let mut check = |write: &[u8], expected: &str| {
            let mut file = File::options().append(true).create(true).open(&path).unwrap();
            file.write_all(write).unwrap();
            let mut out = Vec::new();
            assert!(!source.read(&mut out));
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        };
        check(b"", "");
        check(b"one\ntw", "[r0]:one\n");
        check(b"o", "");
        check(b"\n\nthree", "[r0]:two\n[r0]:\n");
        let mut out = Vec::new();
        source.finish(&mut out);
        assert_eq!(out, b"[r0]:three\n");
    }

    #[test]
    fn a_line_without_end_stays_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, vec![b'x'; 3 * LONGEST_LINE + 5]).unwrap();
        let mut source = Source::new(path, Console::Stdout, "");
        let mut out = Vec::new();
        while source.read(&mut out) {}
        source.finish(&mut out);
        assert_eq!(out.iter().filter(|b| **b == b'x').count(), 3 * LONGEST_LINE + 5);
        assert!(source.rest.capacity() <= 4 * LONGEST_LINE);
    }

    #[test]
    fn filters_copy_matching_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("filtered");
        let mut filtered =
            Filtered::open(Console::Stdout, &["b".into(), "z".into()], &path).unwrap().unwrap();
        filtered.write(b"abc\nxyz\nnothing\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"abc\nxyz\n");
    }
}
