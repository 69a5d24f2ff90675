//! Making workers end: a signal, a time, and then SIGKILL.

use super::supervise::LOOK_INTERVAL;
use super::{Agent, say};
use crate::agent::group::wait_for;
use crate::options::Options;
use crate::signals;
use crate::worker::Worker;
use comm::Waiting;
use elastic::crew::KILL_TIMEOUT;
use rustix::event::{PollFd, PollFlags};
use spec::{Error, Result};
use std::time::{Duration, Instant};

/// How workers are made to end.
pub(super) struct Stop<'a> {
    pub(super) signal: i32,
    /// From the signal to SIGKILL.
    pub(super) timeout: Duration,
    /// Signals to the agent that end the wait.
    pub(super) cut_by: &'a [i32],
}

impl<'a> Stop<'a> {
    /// Because another worker failed, or another node.
    pub(super) fn needed(options: &'a Options) -> Stop<'a> {
        let cut_by = &options.signals_to_handle;
        Stop { signal: libc::SIGTERM, timeout: options.shutdown_timeout, cut_by }
    }

    /// Because somebody sent `signal` to the agent: workers that save get the time to.
    pub(super) fn asked(options: &'a Options, signal: i32) -> Stop<'a> {
        let signal = if options.signals_to_handle.contains(&signal) { signal } else { libc::SIGTERM };
        match &options.saving {
            None => Stop { signal, ..Stop::needed(options) },
            // A closing terminal and schedulers send their signal more than once; a person who insists sends this one.
            Some(saving) => Stop { signal: saving.signal, timeout: saving.timeout, cut_by: &[libc::SIGINT] },
        }
    }
}

impl Agent<'_> {
    /// Sends the signal, waits for the workers to end, and kills those that have not within the time. A signal that
    /// comes meanwhile and may cut the wait short is returned.
    pub(super) fn stop(&mut self, stop: &Stop<'_>) -> Result<Option<i32>> {
        for worker in &self.workers {
            worker.signal(stop.signal);
            // A stopped process gets the signal when it goes on.
            worker.signal(libc::SIGCONT);
        }
        let interrupted = self.wait_ends(stop.timeout, stop.cut_by)?;
        if self.workers.iter().any(|w| w.ended().is_none()) {
            if stop.signal != libc::SIGKILL {
                let name = signals::name(stop.signal);
                say(&format!("killing rank {}: {name} did not end it", running(&self.workers)));
            }
            self.workers.iter().for_each(|w| w.signal(libc::SIGKILL));
            self.wait_ends(KILL_TIMEOUT, &[])?;
        }
        match self.workers.iter().find(|w| w.ended().is_none()) {
            None => Ok(interrupted),
            Some(stuck) => Err(Error::failure(format!(
                "rank {} (pid {}) cannot be killed: it is in state {} for {:.0} s",
                stuck.rank,
                stuck.pid(),
                stuck.state().unwrap_or('?'),
                KILL_TIMEOUT.as_secs_f64()
            ))
            .hint("a process in state D waits for a device or file server; the node may need a reboot")),
        }
    }

    fn wait_ends(&mut self, timeout: Duration, cut_by: &[i32]) -> Result<Option<i32>> {
        let until = Instant::now() + timeout;
        let waiting = Waiting::begin("phalanx launch:", "the workers to end");
        loop {
            for event in self.look() {
                self.tell_aside(event);
            }
            waiting.now_for(format!(
                "rank {} to end, of {} s at most",
                running(&self.workers),
                timeout.as_secs()
            ));
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.workers.iter().all(|w| w.ended().is_some()) {
                return Ok(None);
            }
            if let Some(signal) = std::iter::from_fn(|| self.signals.next()).find(|s| cut_by.contains(s)) {
                return Ok(Some(signal));
            }
            self.sleep_without_news(left)?;
        }
    }

    /// Deaf to the other nodes and to reports, which are left for later and would end it at once.
    fn sleep_without_news(&self, timeout: Duration) -> Result<()> {
        let running = || self.workers.iter().filter(|w| w.ended().is_none());
        let all = std::iter::once(self.signals.fd()).chain(running().filter_map(Worker::fd));
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let blind = running().any(|w| w.fd().is_none());
        wait_for(&mut fds, Some(if blind { timeout.min(LOOK_INTERVAL) } else { timeout }))
    }
}

/// The ranks that have not ended, for people.
fn running(workers: &[Worker]) -> String {
    let ranks = workers.iter().filter(|w| w.ended().is_none()).map(|w| w.rank.to_string());
    ranks.collect::<Vec<_>>().join(", ")
}
