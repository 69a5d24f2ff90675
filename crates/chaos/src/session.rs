use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};
use spec::{Error, Result};

/// A run that prints no step for so long hangs: many times the deadline of its ranks.
const QUIET: Duration = Duration::from_secs(60);
/// Processes that outlive their job by so long are orphans.
const ORPHAN_AFTER: Duration = Duration::from_secs(10);
/// A pipe this short keeps a run from getting far ahead of its reader: some thirty steps.
const PIPE_BYTES: usize = 4096;
/// Marks all processes of a session, whoever started them.
const MARK: &str = "PHALANX_CHAOS";
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// A job under way, and what it has printed.
pub(crate) struct Session {
    child: Child,
    out: File,
    mark: String,
    /// What was printed of the line that is not whole yet.
    partial: Vec<u8>,
    /// Whole lines that nobody has looked at.
    lines: std::collections::VecDeque<String>,
    pub(crate) ranks: usize,
}

/// What the next line was.
enum Next {
    Line(String),
    End,
}

impl Session {
    /// Starts `command`, marked so that all its processes can be found.
    pub(crate) fn start(mut command: Command, mark: String, ranks: usize, log: &Path) -> Result<Session> {
        let fail = |what: &str, e: std::io::Error| Error::failure(format!("{what}: {e}"));
        let (read, write) = rustix::pipe::pipe().map_err(|e| fail("make a pipe", e.into()))?;
        // Without a short pipe a run gets further before it is met; nothing else depends on it.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        let log = File::create(log).map_err(|e| Error::io("create log", log, &e))?;
        command.env(MARK, &mark).stdin(Stdio::null()).stdout(Stdio::from(write)).stderr(log);
        let child = command.spawn().map_err(|e| fail("start a run", e))?;
        // The command holds the pipe's other end.
        drop(command);
        let (partial, lines) = Default::default();
        Ok(Session { child, out: read.into(), mark, partial, lines, ranks })
    }

    /// Reads on until `wanted` says yes to a line; false where the output ends first.
    ///
    /// # Errors
    /// If nothing is printed for a long time.
    pub(crate) fn until(&mut self, mut wanted: impl FnMut(&str) -> bool) -> Result<bool> {
        loop {
            match self.next_line()? {
                Next::Line(line) if wanted(&line) => return Ok(true),
                Next::Line(_) => {}
                Next::End => return Ok(false),
            }
        }
    }

    /// The steps that were done until so many more are; `None` where the output ends first.
    pub(crate) fn steps(&mut self, more: u64) -> Result<Option<u64>> {
        let (mut seen, mut last) = (0, 0);
        let reached = self.until(|line| {
            if let Some(step) = step_of(line) {
                (seen, last) = (seen + 1, step);
            }
            seen >= more
        })?;
        Ok(reached.then_some(last))
    }

    /// Waits for the end of the job and of its output.
    pub(crate) fn end(mut self) -> Result<Ended> {
        let finished = self.until(|_| false);
        let deadline = Instant::now() + ORPHAN_AFTER;
        let mut status = None;
        while status.is_none() && Instant::now() < deadline && finished.is_ok() {
            status = self.child.try_wait().map_err(|e| Error::failure(format!("wait for a run: {e}")))?;
            std::thread::sleep(BETWEEN_LOOKS);
        }
        let hung = status.is_none();
        while !hung && !self.processes().is_empty() && Instant::now() < deadline {
            std::thread::sleep(BETWEEN_LOOKS);
        }
        let left = self.processes();
        left.iter().for_each(|pid| signal(*pid, Signal::KILL));
        let status = match status {
            Some(status) => Some(status),
            None => {
                let _ = self.child.kill();
                self.child.wait().ok()
            }
        };
        Ok(Ended { status, hung, orphans: if hung { 0 } else { left.len() } })
    }

    /// Kills every process of the job.
    pub(crate) fn kill_all(&mut self) {
        let _ = self.child.kill();
        self.processes().into_iter().for_each(|pid| signal(pid, Signal::KILL));
    }

    /// Sends a signal to the process that was started first.
    pub(crate) fn signal_agent(&self, what: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            signal(pid, what);
        }
    }

    /// Sends a signal to one of the ranks; the only process is its own rank.
    pub(crate) fn signal_rank(&self, rank: usize, what: Signal) {
        let of_rank = self.find(|env| env.iter().any(|v| *v == format!("RANK={rank}").as_bytes()));
        match of_rank.first() {
            Some(pid) if self.ranks > 1 => signal(*pid, what),
            _ => self.signal_agent(what),
        }
    }

    /// All living processes of the session.
    fn processes(&self) -> Vec<i32> {
        self.find(|_| true)
    }

    /// Those of the session's processes whose environment `is_wanted`.
    fn find(&self, is_wanted: impl Fn(&[&[u8]]) -> bool) -> Vec<i32> {
        let mark = format!("{MARK}={}", self.mark).into_bytes();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            // What has ended and was not waited for has no environment left.
            let Ok(environ) = fs::read(format!("/proc/{pid}/environ")) else { return false };
            let env: Vec<&[u8]> = environ.split(|b| *b == 0).collect();
            env.contains(&mark.as_slice()) && is_wanted(&env)
        })
        .collect()
    }

    fn next_line(&mut self) -> Result<Next> {
        let deadline = Instant::now() + QUIET;
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Ok(Next::Line(line));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::failure(format!("nothing was printed for {} s", QUIET.as_secs())));
            }
            let timeout = rustix::fs::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 1_000_000 };
            let mut waiting = [PollFd::new(&self.out, PollFlags::IN)];
            if poll(&mut waiting, Some(&timeout)).is_ok_and(|ready| ready == 0) {
                continue;
            }
            let mut bytes = [0; 512];
            match self.out.read(&mut bytes) {
                Ok(0) => return Ok(Next::End),
                Ok(n) => self.take(&bytes[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::failure(format!("read what a run prints: {e}"))),
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(at) = self.partial.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=at).collect();
            self.lines.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.kill_all();
            let _ = self.child.wait();
        }
    }
}

/// How a job ended.
pub(crate) struct Ended {
    pub(crate) status: Option<ExitStatus>,
    /// It had to be killed.
    pub(crate) hung: bool,
    /// Processes that were left.
    pub(crate) orphans: usize,
}

/// The step of a line that tells of one.
fn step_of(line: &str) -> Option<u64> {
    line.strip_prefix("step ")?.split('/').next()?.parse().ok()
}

fn signal(pid: i32, what: Signal) {
    // One that is gone already has nothing to be told.
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, what);
    }
}
