//! Supervision: fills the places, watches who is in them, and says how the round ends.

use super::group::wait_for;
use super::stop::Stop;
use super::{Agent, say};
use crate::failure::{self, Failure};
use crate::logs::AttemptLogs;
use crate::signals;
use crate::tail::Tail;
use crate::worker::Worker;
use crate::worker_env;
use elastic::Orders;
use elastic::crew::{Action, Event, Next};
use elastic::rendezvous::{Closed, News, Seat};
use rustix::event::{PollFd, PollFlags};
use spec::{Context as _, Error, Result};
use std::process::Command;
use std::time::Duration;

/// How often workers without a pidfd are looked at; with one the agent sleeps until something happens.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The exit code of a worker that has ended by request, as after SIGINT.
const INTERRUPTED: i32 = 128 + libc::SIGINT;

/// How a round ended, or the wait for one. Unless they meet again the workers are gone by then.
pub(super) enum End {
    Succeeded,
    /// This node's own trouble; the failures have the root cause first.
    Failed {
        next: Next,
        why: String,
        failures: Vec<Failure>,
    },
    /// Those that live go on in the next round.
    Meet {
        why: String,
        own: bool,
    },
    /// By request, and what became of the workers that did not end well.
    Signal(i32, Vec<Failure>),
    /// Another node called for a new round, and no worker can go on.
    Regroup(String),
    Closed(Closed),
    /// The other nodes cannot be reached any more.
    Lost(Error),
}

impl Agent<'_> {
    /// Waits for a place, fills it with workers, and watches them until the round ends.
    pub(super) fn watch(&mut self) -> Result<End> {
        let end = self.watch_until_the_end();
        match end {
            Ok(End::Succeeded) => {
                self.clear();
                Ok(End::Succeeded)
            }
            Ok(end @ End::Meet { .. }) => {
                self.failures.clear();
                Ok(end)
            }
            Ok(End::Signal(signal, _)) => {
                say(&format!("{}: stopping the workers", signals::name(signal)));
                self.stop(&Stop::asked(self.options, signal))?;
                let mut failures = self.workers.iter().filter_map(failure_of).collect();
                self.sort_failures(&mut failures);
                self.clear();
                Ok(End::Signal(signal, failures))
            }
            Ok(end) => self.stop_for(end),
            Err(error) => {
                self.stop(&Stop { signal: libc::SIGKILL, ..Stop::needed(self.options) })?;
                Err(error)
            }
        }
    }

    /// The job was closed while workers were waiting for the next round.
    pub(super) fn end(&mut self) -> Result<()> {
        self.stop(&Stop::needed(self.options))?;
        self.clear();
        Ok(())
    }

    /// Stops all workers, since none can go on.
    fn stop_for(&mut self, end: End) -> Result<End> {
        self.tell_of_stopped();
        let interrupted = self.stop(&Stop::needed(self.options))?;
        let end = match (interrupted, end) {
            (Some(signal), _) => End::Signal(signal, Vec::new()),
            (None, End::Failed { next, why, mut failures }) => {
                self.sort_failures(&mut failures);
                let why = failures.first().map_or(why, Failure::summary);
                End::Failed { next, why, failures }
            }
            (None, end) => end,
        };
        self.clear();
        Ok(end)
    }

    /// Everybody is gone: what they left behind goes too.
    fn clear(&mut self) {
        self.warden.sweep();
        self.tails.drain(..).for_each(Tail::finish);
        self.workers.clear();
        self.failures.clear();
        self.passed_on = None;
    }

    fn watch_until_the_end(&mut self) -> Result<End> {
        loop {
            // Reports first: who can recover counts when somebody is lost.
            let mut events = self.listen();
            events.extend(self.look());
            self.failures.extend(
                self.workers
                    .iter()
                    .filter(|w| events.iter().any(|e| lost(e) == Some(w.place)))
                    .filter_map(failure_of),
            );
            if !self.failures.is_empty() {
                let obeyed = self.failures.iter().all(|f| f.code == Some(INTERRUPTED));
                let asked = self.passed_on.or(self.options.saving.as_ref().map(|s| s.signal));
                if let Some(signal) = asked.filter(|_| obeyed) {
                    return Ok(End::Signal(signal, Vec::new()));
                }
            }
            while let Some(signal) = self.signals.next() {
                if self.options.signals_to_handle.contains(&signal) {
                    return Ok(End::Signal(signal, Vec::new()));
                }
                self.passed_on = Some(signal);
                self.workers.iter().for_each(|w| w.signal_leader(signal));
            }
            events.push(Event::Tick);
            if let Some(end) = self.tell_all(events)? {
                return Ok(end);
            }
            let called = match self.group.news() {
                Some(Ok(News::Regroup(why))) => Some(Event::Called(why)),
                Some(Ok(News::Spare)) => Some(Event::Spare),
                Some(Ok(News::Closed(closed))) => return Ok(End::Closed(closed)),
                Some(Ok(News::Refused(what, hint))) => return Ok(End::Lost(Error::failure(what).hint(hint))),
                Some(Err(error)) => return Ok(End::Lost(error)),
                Some(Ok(News::Seated(seat))) => {
                    self.fill(&seat)?;
                    None
                }
                Some(Ok(News::Left)) | None => None,
            };
            if let Some(end) = self.tell_all(called)? {
                return Ok(end);
            }
            if self.crew.is_done() && !self.workers.is_empty() {
                return Ok(End::Succeeded);
            }
            // The job is about to end: those that no layout had a place for need not wait.
            if self.workers.iter().any(Worker::is_done) {
                self.workers.iter().for_each(Worker::hang_up);
            }
            self.note();
            self.sleep()?;
        }
    }

    /// Tells the crew; its time begins with the agent.
    fn tell(&mut self, event: Event) -> Vec<Action> {
        self.crew.step(event, self.clock.now())
    }

    /// Tells the crew what happened and does what it says.
    fn tell_all(&mut self, events: impl IntoIterator<Item = Event>) -> Result<Option<End>> {
        let mut actions = std::mem::take(&mut self.held);
        for event in events {
            actions.extend(self.tell(event));
        }
        self.obey(actions)
    }

    /// Tells the crew; what it says is done with what it says next.
    fn hold(&mut self, event: Event) {
        let actions = self.tell(event);
        self.held.extend(actions);
    }

    /// Tells the crew of what the caller deals with itself; only the wish to join is left for later.
    pub(super) fn tell_aside(&mut self, event: Event) {
        let actions = self.tell(event);
        self.held.extend(actions.into_iter().filter(|a| *a == Action::Join));
    }

    /// Does what the crew says; an end comes last.
    fn obey(&mut self, actions: Vec<Action>) -> Result<Option<End>> {
        let mut end = None;
        for action in actions {
            match action {
                Action::Kill(place, why) => {
                    if let Some(worker) = self.workers.iter().find(|w| w.place == place) {
                        say(&format!("killing rank {} (pid {}): {why}", worker.rank, worker.pid()));
                        worker.signal(libc::SIGKILL);
                    }
                }
                // The others are told of the end of this round first.
                Action::Join if end.is_some() => self.held.push(Action::Join),
                Action::Join => self.group.ask(self.crew.in_use().len(), !self.workers.is_empty())?,
                Action::End(ended) if end.is_none() => {
                    let failures = std::mem::take(&mut self.failures);
                    end = Some(match ended.next {
                        Next::Meet => End::Meet { why: ended.why, own: ended.own },
                        Next::StartOver if !ended.own => End::Regroup(ended.why),
                        next => End::Failed { next, why: ended.why, failures },
                    });
                }
                Action::End(_) => {}
            }
        }
        Ok(end)
    }

    /// A place in a round: the living are ordered there, the others' places are filled.
    fn fill(&mut self, seat: &Seat) -> Result<()> {
        // Who has died meanwhile is replaced with the others.
        for event in self.look() {
            self.hold(event);
        }
        self.failures.clear();
        self.hold(Event::Seated);
        let in_use = self.crew.in_use();
        let vacant: Vec<usize> = in_use.iter().copied().filter(|p| !self.crew.lives(*p)).collect();
        self.order(seat, &in_use);
        self.workers.retain(|w| !vacant.contains(&w.place) && in_use.contains(&w.place));
        if !vacant.is_empty() {
            let logs = self.logs.attempt(self.options, self.attempt, &vacant)?;
            self.attempt += 1;
            self.start(seat, &in_use, &vacant, &logs)?;
            let tail = self.tail(seat, &in_use, &vacant, &logs)?;
            self.tails.push(tail);
        }
        Ok(())
    }

    /// Starts workers in `vacant` places, in order of rank.
    fn start(&mut self, seat: &Seat, in_use: &[usize], vacant: &[usize], logs: &AttemptLogs) -> Result<()> {
        let store = self.group.store();
        for (place, files) in vacant.iter().zip(&logs.workers) {
            let local_rank = in_use.iter().position(|p| p == place).unwrap_or(*place);
            let shared = worker_env::Attempt {
                options: self.options,
                seat,
                nproc: in_use.len(),
                run_id: &self.run_id,
                restarts: self.crew.restarts(),
                store: &store,
                trust: &self.trust,
                bind: self.bind,
                marker: &self.marker,
            };
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
            command.envs(worker_env::variables(&shared, *place, local_rank, &files.error_file)?);
            let rank = seat.base_rank + local_rank;
            let worker = Worker::start(command, *place, rank, local_rank, files.error_file.clone())
                .context(format!("rank {rank}"))?;
            self.warden.add(worker.pid());
            self.workers.push(worker);
            self.workers.sort_by_key(|w| w.place);
            self.hold(Event::Started(*place));
        }
        Ok(())
    }

    fn tail(&self, seat: &Seat, in_use: &[usize], vacant: &[usize], logs: &AttemptLogs) -> Result<Tail> {
        let prefix = |place: &usize| {
            let local_rank = in_use.iter().position(|p| p == place).unwrap_or(*place);
            worker_env::line_prefix(self.options, seat, local_rank)
        };
        let sources = vacant.iter().zip(&logs.workers).flat_map(|(place, files)| files.tee(&prefix(place)));
        let (stdout, stderr) = (&self.options.stdout_filters, &self.options.stderr_filters);
        Tail::start(sources.collect(), stdout, stderr, &logs.folder)
    }

    /// Sends those that live to the new world; one that cannot be reached is killed, and found dead.
    fn order(&mut self, seat: &Seat, in_use: &[usize]) {
        let (store, why) = (self.group.store(), self.why.clone());
        for (local_rank, place) in in_use.iter().enumerate() {
            if !self.crew.lives(*place) {
                continue;
            }
            let orders = Orders {
                round: seat.round,
                rank: seat.base_rank + local_rank,
                world: seat.world,
                local_rank,
                local_world: in_use.len(),
                store: store.clone(),
                session: worker_env::session(&self.run_id, seat),
                why: why.clone(),
            };
            let Some(worker) = self.workers.iter_mut().find(|w| w.place == *place) else { continue };
            if let Err(e) = worker.order(&orders) {
                say(&format!("killing rank {} (pid {}): no orders reach it: {e}", orders.rank, worker.pid()));
                worker.signal(libc::SIGKILL);
            }
        }
    }

    /// Notes the workers that have ended.
    pub(super) fn look(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for worker in &mut self.workers {
            if worker.look() {
                self.warden.remove(worker.pid());
                events.push(match failure_of(worker) {
                    None => Event::Done(worker.place),
                    Some(failure) => Event::Lost(worker.place, failure.summary()),
                });
            }
        }
        events
    }

    /// What the workers report.
    fn listen(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        for worker in self.workers.iter_mut().filter(|w| w.ended().is_none()) {
            match worker.reports() {
                Ok(reports) => events.extend(reports.into_iter().map(|r| Event::Said(worker.place, r))),
                Err(e) => say(&format!("rank {} is not understood: {e}", worker.rank)),
            }
        }
        events
    }

    /// Tells the other nodes what they do not know yet.
    fn note(&mut self) {
        let known = (self.crew.recovers(), self.crew.stepped());
        if known != self.noted && known.0 {
            self.group.note(known.1);
        }
        self.noted = known;
    }

    /// Sleeps until a worker ends or speaks, a signal comes, another node speaks, or the crew wants to know the time.
    fn sleep(&mut self) -> Result<()> {
        self.clock.pause();
        let running = || self.workers.iter().filter(|w| w.ended().is_none());
        let own = [Some(self.signals.fd()), self.group.fd()];
        let theirs = running().flat_map(|w| [w.fd(), w.reports_fd()]);
        let all = own.into_iter().chain(theirs).flatten();
        let mut fds: Vec<PollFd<'_>> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let crews = self.crew.wakes_at().map(|at| at.saturating_sub(self.clock.now()));
        let blind = running().any(|w| w.fd().is_none()).then_some(LOOK_INTERVAL);
        let asked = self.group.has_news().then_some(Duration::ZERO);
        let pause = [crews, blind, asked].into_iter().flatten().min();
        let done = wait_for(&mut fds, pause);
        self.clock.paused(pause.unwrap_or(Duration::MAX));
        done
    }

    /// Who keeps its memory, for people.
    pub(super) fn go_on(&self) -> String {
        let ranks: Vec<String> = self
            .workers
            .iter()
            .filter(|w| w.ended().is_none() && self.crew.lives(w.place))
            .map(|w| w.rank.to_string())
            .collect();
        match ranks.len() {
            1 => format!("rank {} keeps its memory", ranks[0]),
            _ => format!("ranks {} keep their memory", ranks.join(", ")),
        }
    }

    /// The root cause first; with those that failed unseen.
    fn sort_failures(&self, failures: &mut Vec<Failure>) {
        add_others(&self.workers, failures);
        failure::sort(failures);
    }

    /// A stopped rank explains why the others timed out.
    fn tell_of_stopped(&self) {
        for worker in self.workers.iter().filter(|w| w.ended().is_none()) {
            if let Some('T' | 't') = worker.state() {
                say(&format!(
                    "rank {} (pid {}) is stopped by SIGSTOP or a debugger",
                    worker.rank,
                    worker.pid()
                ));
            }
        }
    }
}

fn lost(event: &Event) -> Option<usize> {
    match event {
        Event::Lost(place, _) => Some(*place),
        _ => None,
    }
}

fn failure_of(worker: &Worker) -> Option<Failure> {
    let ended = worker.ended().filter(|e| *e != failure::Ended::Code(0))?;
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
