use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};
use spec::{Error, Result};

use crate::faults::Layout;

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
    /// The processes that start ranks; `None` in the place of one that was killed and is not there again.
    agents: Vec<Option<Child>>,
    out: File,
    /// What a further agent of the job writes to.
    write: Option<OwnedFd>,
    log: PathBuf,
    mark: String,
    /// What was printed of the line that is not whole yet.
    partial: Vec<u8>,
    /// Whole lines that nobody has looked at.
    lines: VecDeque<String>,
    pub(crate) layout: Layout,
    /// The agent that hosts the job's store.
    pub(crate) host: usize,
    /// Where several agents meet: the address of that store.
    pub(crate) endpoint: String,
}

/// What the next line was.
enum Next {
    Line(String),
    End,
}

impl Session {
    /// A job of no agents yet, whose processes are marked so that all can be found.
    pub(crate) fn new(mark: String, layout: Layout, log: &Path) -> Result<Session> {
        let (read, write) = rustix::pipe::pipe().map_err(|e| fail("make a pipe", e.into()))?;
        // Without a short pipe a run gets further before it is met; nothing else depends on it.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        File::create(log).map_err(|e| Error::io("create log", log, &e))?;
        let (partial, lines) = Default::default();
        let (out, write, log) = (read.into(), Some(write), log.to_owned());
        Ok(Session {
            agents: Vec::new(),
            out,
            write,
            log,
            mark,
            partial,
            lines,
            layout,
            host: 0,
            endpoint: String::new(),
        })
    }

    /// Starts `command` as agent `at`.
    pub(crate) fn start(&mut self, at: usize, mut command: Command) -> Result<()> {
        let log = File::options().append(true).open(&self.log);
        let log = log.map_err(|e| Error::io("open log", &self.log, &e))?;
        let write = self.write.as_ref().ok_or_else(|| Error::failure("the job is about to end"))?;
        let write = write.try_clone().map_err(|e| fail("share a pipe", e))?;
        command.env(MARK, &self.mark).stdin(Stdio::null()).stdout(Stdio::from(write)).stderr(log);
        let child = command.spawn().map_err(|e| fail("start a run", e))?;
        if self.agents.len() <= at {
            self.agents.resize_with(at + 1, || None);
        }
        self.agents[at] = Some(child);
        if self.layout.nodes == 1 {
            // Nobody else writes, so that the end of the output is the job's.
            self.write = None;
        }
        Ok(())
    }

    /// What the job has said so far.
    pub(crate) fn said(&self) -> String {
        fs::read(&self.log).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
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
        self.write = None;
        let finished = self.until(|_| false);
        let deadline = Instant::now() + ORPHAN_AFTER;
        let mut codes = Vec::new();
        for agent in self.agents.iter_mut().flatten() {
            let mut status = None;
            while status.is_none() && Instant::now() < deadline && finished.is_ok() {
                status = agent.try_wait().map_err(|e| fail("wait for a run", e))?;
                std::thread::sleep(BETWEEN_LOOKS);
            }
            codes.push(status);
        }
        let hung = codes.iter().any(Option::is_none);
        while !hung && !self.processes().is_empty() && Instant::now() < deadline {
            std::thread::sleep(BETWEEN_LOOKS);
        }
        let left = self.processes();
        left.iter().for_each(|pid| signal(*pid, Signal::KILL));
        for agent in self.agents.iter_mut().flatten() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        let codes = codes.into_iter().flatten().map(|status| status.code()).collect();
        Ok(Ended { codes, hung, orphans: if hung { 0 } else { left.len() } })
    }

    /// Kills every process of the job.
    pub(crate) fn kill_all(&mut self) {
        self.agents.iter_mut().flatten().for_each(|agent| drop(agent.kill()));
        self.processes().into_iter().for_each(|pid| signal(pid, Signal::KILL));
    }

    /// Sends a signal to every process that was started first.
    pub(crate) fn signal_agents(&self, what: Signal) {
        let pids = self.agents.iter().flatten().filter_map(|agent| i32::try_from(agent.id()).ok());
        pids.for_each(|pid| signal(pid, what));
    }

    /// Kills one agent of several and takes it from the job.
    pub(crate) fn kill_agent(&mut self, at: usize) -> Result<()> {
        let Some(mut agent) = self.agents[at].take() else { return Ok(()) };
        agent.kill().and_then(|()| agent.wait()).map(drop).map_err(|e| fail("kill an agent", e))
    }

    /// One of the ranks' processes, whatever its number is by now; the only process is its own rank.
    pub(crate) fn rank(&self, victim: u64) -> Option<i32> {
        let mut ranks = self.find(|env| env.iter().any(|v| v.starts_with(b"RANK=")));
        ranks.sort_unstable();
        let at = victim.checked_rem(ranks.len() as u64);
        let alone = || self.agents.iter().flatten().next().and_then(|agent| agent.id().try_into().ok());
        at.map(|at| ranks[at as usize]).or_else(alone)
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
        self.kill_all();
        self.agents.iter_mut().flatten().for_each(|agent| drop(agent.wait()));
    }
}

/// How a job ended.
pub(crate) struct Ended {
    /// The exit codes of its agents; none of one that a signal ended.
    pub(crate) codes: Vec<Option<i32>>,
    /// It had to be killed.
    pub(crate) hung: bool,
    /// Processes that were left.
    pub(crate) orphans: usize,
}

impl Ended {
    /// Whether all agents ended with one of `codes`.
    pub(crate) fn is(&self, codes: &[i32]) -> bool {
        !self.hung && self.codes.iter().all(|code| code.is_some_and(|code| codes.contains(&code)))
    }
}

/// The step of a line that tells of one.
fn step_of(line: &str) -> Option<u64> {
    line.strip_prefix("step ")?.split('/').next()?.parse().ok()
}

pub(crate) fn signal(pid: i32, what: Signal) {
    // One that is gone already has nothing to be told.
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, what);
    }
}

fn fail(what: &str, e: std::io::Error) -> Error {
    Error::failure(format!("{what}: {e}"))
}
