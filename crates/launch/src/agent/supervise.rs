//! One attempt: starts the workers, watches them, and leaves none.

use super::group::wait_for;
use super::{Agent, say};
use crate::failure::{self, Ended, Failure};
use crate::logs::AttemptLogs;
use crate::options::Options;
use crate::rendezvous::{Closed, News, Seat};
use crate::signals;
use crate::tail::Tail;
use crate::worker::Worker;
use crate::worker_env;
use comm::Waiting;
use rustix::event::{PollFd, PollFlags};
use spec::{Context as _, Error, Result};
use std::process::Command;
use std::time::{Duration, Instant};

/// How often workers without a pidfd are looked at; with one the agent sleeps until something happens.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// A killed process that is still there after this waits for a device and cannot be killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// The exit code of a worker that has ended by request, as after SIGINT.
const INTERRUPTED: i32 = 128 + libc::SIGINT;

/// How an attempt ended; by then its workers are gone.
pub(super) enum End {
    Succeeded,
    /// The root cause first.
    Failed(Vec<Failure>),
    /// By request, and what became of the workers that did not end well.
    Signal(i32, Vec<Failure>),
    /// Another node called for a new round.
    Regroup(String),
    Closed(Closed),
    /// The other nodes cannot be reached any more.
    Lost(Error),
}

impl Agent<'_> {
    pub(super) fn attempt(&mut self, seat: &Seat) -> Result<End> {
        let logs = self.logs.attempt(self.options, self.attempt, self.nproc)?;
        let mut workers = Vec::with_capacity(self.nproc);
        if let Err(error) = self.start(seat, &logs, &mut workers) {
            self.stop(&mut workers, &Stop { signal: libc::SIGKILL, ..Stop::needed(self.options) })?;
            return Err(error);
        }
        let tail = self.tail(seat, &logs)?;
        let end = self.watch(&mut workers)?;
        let mut end = match end {
            End::Succeeded => End::Succeeded,
            End::Signal(signal, _) => {
                say(&format!("{}: stopping the workers", signals::name(signal)));
                self.stop(&mut workers, &Stop::asked(self.options, signal))?;
                End::Signal(signal, workers.iter().filter_map(failure_of).collect())
            }
            other => {
                tell_of_stopped(&workers);
                let interrupted = self.stop(&mut workers, &Stop::needed(self.options))?;
                interrupted.map_or(other, |signal| End::Signal(signal, Vec::new()))
            }
        };
        self.warden.sweep();
        tail.finish();
        if let End::Failed(failures) | End::Signal(_, failures) = &mut end {
            add_others(&workers, failures);
            failure::sort(failures);
        }
        Ok(end)
    }

    /// Starts the workers in order of rank.
    fn start(&self, seat: &Seat, logs: &AttemptLogs, workers: &mut Vec<Worker>) -> Result<()> {
        let store = self.group.store();
        let shared = worker_env::Attempt {
            options: self.options,
            seat,
            nproc: self.nproc,
            run_id: &self.run_id,
            restarts: self.restarts,
            store: &store,
            trust: &self.trust,
            bind: self.bind,
            marker: &self.marker,
        };
        for (local_rank, files) in logs.workers.iter().enumerate() {
            let (stdout, stderr) = files.open()?;
            let (program, args) =
                self.command.split_first().ok_or_else(|| Error::user("no program to launch"))?;
            let mut command = Command::new(program);
            command.stdout(stdout).stderr(stderr);
            for arg in args {
                // torchrun's one macro in the program's arguments.
                match arg.to_str().filter(|a| a.contains("${local_rank}")) {
                    Some(text) => command.arg(text.replace("${local_rank}", &local_rank.to_string())),
                    None => command.arg(arg),
                };
            }
            command.envs(worker_env::variables(&shared, local_rank, &files.error_file)?);
            let worker =
                Worker::start(command, seat.base_rank + local_rank, local_rank, files.error_file.clone())
                    .context(format!("rank {}", seat.base_rank + local_rank))?;
            self.warden.add(worker.pid());
            workers.push(worker);
        }
        Ok(())
    }

    fn tail(&self, seat: &Seat, logs: &AttemptLogs) -> Result<Tail> {
        let prefix = |rank| worker_env::line_prefix(self.options, seat, rank);
        let sources = logs.workers.iter().enumerate().flat_map(|(rank, files)| files.tee(&prefix(rank)));
        let (stdout, stderr) = (&self.options.stdout_filters, &self.options.stderr_filters);
        Tail::start(sources.collect(), stdout, stderr, &logs.folder)
    }

    /// Waits until all workers have succeeded, one has failed, or somebody wants them to stop.
    fn watch(&self, workers: &mut [Worker]) -> Result<End> {
        let mut passed_on = None;
        loop {
            self.look(workers);
            let failures: Vec<Failure> = workers.iter().filter_map(failure_of).collect();
            if !failures.is_empty() {
                let obeyed = failures.iter().all(|f| f.code == Some(INTERRUPTED));
                let asked = passed_on.or(self.options.saving.as_ref().map(|s| s.signal)).filter(|_| obeyed);
                return Ok(asked.map_or(End::Failed(failures), |signal| End::Signal(signal, Vec::new())));
            }
            if workers.iter().all(|w| w.ended().is_some()) {
                return Ok(End::Succeeded);
            }
            while let Some(signal) = self.signals.next() {
                if self.options.signals_to_handle.contains(&signal) {
                    return Ok(End::Signal(signal, Vec::new()));
                }
                passed_on = Some(signal);
                workers.iter().for_each(|w| w.signal_leader(signal));
            }
            match self.group.news() {
                Some(Ok(News::Regroup(why))) => return Ok(End::Regroup(why)),
                Some(Ok(News::Closed(closed))) => return Ok(End::Closed(closed)),
                Some(Ok(News::Refused(what, hint))) => return Ok(End::Lost(Error::failure(what).hint(hint))),
                Some(Err(error)) => return Ok(End::Lost(error)),
                Some(Ok(News::Seated(_) | News::Left)) | None => {}
            }
            self.sleep(workers, None)?;
        }
    }

    /// Notes the workers that have ended.
    fn look(&self, workers: &mut [Worker]) {
        for worker in workers {
            if worker.look() {
                self.warden.remove(worker.pid());
            }
        }
    }

    /// Sleeps until a worker ends, a signal comes or another node speaks, at most `timeout`.
    fn sleep(&self, workers: &[Worker], timeout: Option<Duration>) -> Result<()> {
        let running = || workers.iter().filter(|w| w.ended().is_none());
        let blind = running().any(|w| w.fd().is_none());
        let own = [Some(self.signals.fd()), self.group.fd()];
        let all = own.into_iter().flatten().chain(running().filter_map(Worker::fd));
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let timeout = if blind { Some(timeout.unwrap_or(LOOK_INTERVAL).min(LOOK_INTERVAL)) } else { timeout };
        wait_for(&mut fds, timeout)
    }

    /// Sends the signal, waits for the workers to end, and kills those that have not within the time. A signal that
    /// comes meanwhile and may cut the wait short is returned.
    fn stop(&self, workers: &mut [Worker], stop: &Stop<'_>) -> Result<Option<i32>> {
        for worker in workers.iter() {
            worker.signal(stop.signal);
            // A stopped process gets the signal when it goes on.
            worker.signal(libc::SIGCONT);
        }
        let interrupted = self.wait_ends(workers, stop.timeout, stop.cut_by)?;
        if workers.iter().any(|w| w.ended().is_none()) {
            if stop.signal != libc::SIGKILL {
                let name = signals::name(stop.signal);
                say(&format!("killing rank {}: {name} did not end it", running(workers)));
            }
            workers.iter().for_each(|w| w.signal(libc::SIGKILL));
            self.wait_ends(workers, KILL_TIMEOUT, &[])?;
        }
        match workers.iter().find(|w| w.ended().is_none()) {
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

    fn wait_ends(&self, workers: &mut [Worker], timeout: Duration, cut_by: &[i32]) -> Result<Option<i32>> {
        let until = Instant::now() + timeout;
        let waiting = Waiting::begin("phalanx launch:", "the workers to end");
        loop {
            self.look(workers);
            waiting.now_for(format!("rank {} to end, of {} s at most", running(workers), timeout.as_secs()));
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || workers.iter().all(|w| w.ended().is_some()) {
                return Ok(None);
            }
            if let Some(signal) = std::iter::from_fn(|| self.signals.next()).find(|s| cut_by.contains(s)) {
                return Ok(Some(signal));
            }
            self.sleep_without_news(workers, left)?;
        }
    }

    /// Like `sleep`, deaf to the other nodes, whose news is left for later and would wake it at once.
    fn sleep_without_news(&self, workers: &[Worker], timeout: Duration) -> Result<()> {
        let running = || workers.iter().filter(|w| w.ended().is_none());
        let all = std::iter::once(self.signals.fd()).chain(running().filter_map(Worker::fd));
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let blind = running().any(|w| w.fd().is_none());
        wait_for(&mut fds, Some(if blind { timeout.min(LOOK_INTERVAL) } else { timeout }))
    }
}

fn failure_of(worker: &Worker) -> Option<Failure> {
    let ended = worker.ended().filter(|e| *e != Ended::Code(0))?;
    Some(Failure::new(worker.rank, worker.local_rank, worker.pid(), ended, &worker.error_file))
}

/// A worker that was stopped because another failed may have had an error of its own, even an earlier one: it wrote it
/// down. And one that was killed may be seen to end only after those that failed of it.
fn add_others(workers: &[Worker], failures: &mut Vec<Failure>) {
    for worker in workers {
        let known = failures.iter().any(|f| f.rank == worker.rank);
        if !known && (worker.error_file.exists() || worker.was_killed_by_others()) {
            failures.extend(failure_of(worker));
        }
    }
}

/// The ranks that have not ended, for people.
fn running(workers: &[Worker]) -> String {
    let ranks = workers.iter().filter(|w| w.ended().is_none()).map(|w| w.rank.to_string());
    ranks.collect::<Vec<_>>().join(", ")
}

/// How workers are made to end.
struct Stop<'a> {
    signal: i32,
    /// From the signal to SIGKILL.
    timeout: Duration,
    /// Signals to the agent that end the wait.
    cut_by: &'a [i32],
}

impl<'a> Stop<'a> {
    /// Because another worker failed, or another node.
    fn needed(options: &'a Options) -> Stop<'a> {
        let cut_by = &options.signals_to_handle;
        Stop { signal: libc::SIGTERM, timeout: options.shutdown_timeout, cut_by }
    }

    /// Because somebody sent `signal` to the agent: workers that save get the time to.
    fn asked(options: &'a Options, signal: i32) -> Stop<'a> {
        let signal = if options.signals_to_handle.contains(&signal) { signal } else { libc::SIGTERM };
        match &options.saving {
            None => Stop { signal, ..Stop::needed(options) },
            // A closing terminal and schedulers send their signal more than once; a person who insists sends this one.
            Some(saving) => Stop { signal: saving.signal, timeout: saving.timeout, cut_by: &[libc::SIGINT] },
        }
    }
}

/// A stopped rank explains why the others timed out.
fn tell_of_stopped(workers: &[Worker]) {
    for worker in workers.iter().filter(|w| w.ended().is_none()) {
        if let Some('T' | 't') = worker.state() {
            say(&format!("rank {} (pid {}) is stopped by SIGSTOP or a debugger", worker.rank, worker.pid()));
        }
    }
}
