//! One attempt: starts the workers, watches them, and leaves none.

use super::group::wait_for;
use super::{Agent, say};
use crate::failure::{self, Ended, Failure};
use crate::logs::AttemptLogs;
use crate::rendezvous::{Closed, News, Seat};
use crate::signals;
use crate::tail::Tail;
use crate::worker::Worker;
use crate::worker_env;
use rustix::event::{PollFd, PollFlags};
use spec::{Context as _, Error, Result};
use std::process::Command;
use std::time::{Duration, Instant};

/// How often workers without a pidfd are looked at; with one the agent sleeps until something happens.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// A killed process that is still there after this waits for a device and cannot be killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// How an attempt ended; by then its workers are gone.
pub(super) enum End {
    Succeeded,
    /// The root cause first.
    Failed(Vec<Failure>),
    Signal(i32),
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
            self.stop(&mut workers, libc::SIGKILL)?;
            return Err(error);
        }
        let tail = self.tail(seat, &logs)?;
        let end = self.watch(&mut workers)?;
        let mut end = match end {
            End::Succeeded => End::Succeeded,
            End::Signal(signal) => {
                say(&format!("{}: stopping the workers", signals::name(signal)));
                self.stop(&mut workers, signal)?;
                End::Signal(signal)
            }
            other => {
                tell_of_stopped(&workers);
                let interrupted = self.stop(&mut workers, libc::SIGTERM)?;
                interrupted.map_or(other, End::Signal)
            }
        };
        self.warden.sweep();
        tail.finish();
        if let End::Failed(failures) = &mut end {
            add_recorded(&workers, failures);
            failure::sort(failures);
        }
        Ok(end)
    }

    /// Starts the workers in order of rank.
    fn start(&self, seat: &Seat, logs: &AttemptLogs, workers: &mut Vec<Worker>) -> Result<()> {
        let store = self.group.store();
        let shared = worker_env::Shared {
            options: self.options,
            seat,
            nproc: self.nproc,
            run_id: &self.run_id,
            restarts: self.restarts,
            store: &store,
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
        loop {
            self.look(workers);
            let failures: Vec<Failure> = workers.iter().filter_map(failure_of).collect();
            if !failures.is_empty() {
                return Ok(End::Failed(failures));
            }
            if workers.iter().all(|w| w.ended().is_some()) {
                return Ok(End::Succeeded);
            }
            while let Some(signal) = self.signals.next() {
                if self.options.signals_to_handle.contains(&signal) {
                    return Ok(End::Signal(signal));
                }
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

    /// Sends `signal`, waits for the workers to end, and kills those that have not within the shutdown time. A signal
    /// that comes meanwhile cuts the wait short and is returned.
    fn stop(&self, workers: &mut [Worker], signal: i32) -> Result<Option<i32>> {
        for worker in workers.iter() {
            worker.signal(signal);
            // A stopped process gets the signal when it goes on.
            worker.signal(libc::SIGCONT);
        }
        let interrupted = self.wait_ends(workers, self.options.shutdown_timeout, true)?;
        if workers.iter().any(|w| w.ended().is_none()) {
            let left: Vec<String> =
                workers.iter().filter(|w| w.ended().is_none()).map(|w| w.rank.to_string()).collect();
            if signal != libc::SIGKILL {
                say(&format!("killing rank {}: {} did not end it", left.join(", "), signals::name(signal)));
            }
            workers.iter().for_each(|w| w.signal(libc::SIGKILL));
            self.wait_ends(workers, KILL_TIMEOUT, false)?;
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

    fn wait_ends(
        &self,
        workers: &mut [Worker],
        timeout: Duration,
        heed_signals: bool,
    ) -> Result<Option<i32>> {
        let until = Instant::now() + timeout;
        loop {
            self.look(workers);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || workers.iter().all(|w| w.ended().is_some()) {
                return Ok(None);
            }
            if heed_signals && let Some(signal) = self.stopping_signal() {
                return Ok(Some(signal));
            }
            self.sleep_without_news(workers, left)?;
        }
    }

    fn stopping_signal(&self) -> Option<i32> {
        std::iter::from_fn(|| self.signals.next()).find(|s| self.options.signals_to_handle.contains(s))
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
/// down.
fn add_recorded(workers: &[Worker], failures: &mut Vec<Failure>) {
    for worker in workers {
        let known = failures.iter().any(|f| f.rank == worker.rank);
        if !known && worker.error_file.exists() {
            failures.extend(failure_of(worker));
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
