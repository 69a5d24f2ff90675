//! The agent of one node: joins, starts the workers, watches them, stops them, and starts over or ends.

mod group;
mod stop;
mod supervise;

use crate::failure::{self, Failure};
use crate::logs::{Logs, random_hex};
use crate::options::Options;
use crate::secret::Trust;
use crate::signals::{self, Signals};
use crate::tail::Tail;
use crate::warden::Warden;
use crate::worker::{Worker, command_line};
use comm::Awake;
use elastic::crew::{Action, Crew, Event, Limits, Next};
use group::Group;
use spec::{Error, Result};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;
use supervise::End;

/// How a launch ended on this node.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// For the launcher's own exit: 0 success, 1 failure, 128 + n stopped by signal n.
    pub exit_code: i32,
    /// The failed workers of this node's last attempt, the root cause first. After a signal: those that did not end
    /// with 0.
    pub failures: Vec<Failure>,
    /// Restarts that this node's failures took.
    pub restarts: u32,
    /// The signal that stopped the launch.
    pub signal: Option<i32>,
    /// Why the job ended, if the cause lies on another node.
    pub reason: Option<String>,
    /// The folder of the log files; a temporary one without logs is gone.
    pub log_dir: PathBuf,
}

impl Outcome {
    /// The worker to blame, if one of this node failed.
    pub fn root_cause(&self) -> Option<&Failure> {
        self.failures.first()
    }

    /// The root cause's exit code as a shell gives it (128 + n for signal n), else [`Outcome::exit_code`].
    pub fn worker_code(&self) -> i32 {
        self.root_cause().map_or(self.exit_code, Failure::exit_code)
    }

    /// The table that torchrun ends a failed job with, if a worker of this node failed; `name` is the program.
    pub fn table(&self, name: &str) -> Option<String> {
        (self.signal.is_none() && !self.failures.is_empty()).then(|| failure::table(name, &self.failures))
    }
}

/// Runs `program` with `args` on this node's ranks until the job has ended, and leaves no process behind.
///
/// The calling thread watches the workers: the kernel kills them if it ends. Signals are caught meanwhile.
///
/// # Errors
/// The workers could not be started (program not found, log folder not writable, port taken), or the nodes did not come
/// together. A worker that fails is no error but an [`Outcome`].
pub fn run(options: &Options, program: OsString, args: &[OsString]) -> Result<Outcome> {
    let nproc = options.nproc.resolve()?;
    if !(1..=crate::options::MAX_NPROC).contains(&nproc) {
        let most = crate::options::MAX_NPROC;
        return Err(Error::user(format!("{nproc} workers on one node: expected 1 to {most}")));
    }
    let mut command = command_line(options.runner, program);
    command.extend(args.iter().cloned());
    let caught: Vec<i32> =
        options.signals_to_handle.iter().chain(&options.signals_to_forward).copied().collect();
    signals::let_children_be_waited_for();
    let signals = Signals::catch(&caught)?;
    let trust = Trust::given(options.secret.as_deref(), options.insecure)?;
    // Nobody else takes part in a job of one node.
    let trust = if options.is_single() { trust.or_random()? } else { trust };
    let bind = options.bind.as_ref().map(|bind| bind.resolve()).transpose()?;
    let is_unnamed = options.is_single() && options.run_id == "none";
    let run_id = if is_unnamed { random_hex() } else { options.run_id.clone() };
    let marker = random_hex();
    let logs = Logs::create(options, &run_id)?;
    // Forked before there are threads of ours.
    let warden = Warden::start(&marker)?;
    let group =
        Group::start(options, nproc, &run_id, &trust, bind).inspect_err(|_| logs.finish(options, true))?;
    let crew = Crew::new(nproc, limits(options, nproc, &group));
    let mut agent = Agent {
        options,
        command,
        run_id,
        marker,
        signals,
        warden,
        logs,
        group,
        trust,
        bind,
        crew,
        clock: Awake::begin(),
        workers: Vec::new(),
        tails: Vec::new(),
        failures: Vec::new(),
        held: Vec::new(),
        why: String::new(),
        passed_on: None,
        noted: (false, false),
        attempt: 0,
    };
    let result = agent.lead();
    if let Err(error) = &result {
        agent.group.close(&format!("{}: {error}", crate::net::host_name()), &agent.signals);
    }
    agent.warden.sweep();
    agent.logs.finish(options, !matches!(&result, Ok(o) if o.exit_code == 0));
    result
}

/// How much trouble the workers may make.
fn limits(options: &Options, nproc: usize, group: &Group) -> Limits {
    Limits {
        max_restarts: options.max_restarts,
        min_places: options.min_nproc.unwrap_or(nproc),
        silent: options.silence_timeout,
        hung: options.hang_timeout,
        // Workers that are stranded for the loss of a whole node: the other nodes find it within this.
        stranded: Limits::STRANDED + group.silence(),
    }
}

struct Agent<'a> {
    options: &'a Options,
    command: Vec<OsString>,
    run_id: String,
    marker: String,
    signals: Signals,
    warden: Warden,
    logs: Logs,
    group: Group,
    trust: Trust,
    bind: Option<IpAddr>,
    crew: Crew,
    /// The crew's time counts from here.
    clock: Awake,
    /// The last worker of each place that was ever filled.
    workers: Vec<Worker>,
    tails: Vec<Tail>,
    /// Workers that failed in this round.
    failures: Vec<Failure>,
    /// What the crew wants, and the agent has not done yet.
    held: Vec<Action>,
    /// Why the last round ended.
    why: String,
    /// The last signal that was passed on to these workers.
    passed_on: Option<i32>,
    /// What the other nodes know: the workers can recover, they have done a step in this round.
    noted: (bool, bool),
    /// Counts rounds in which workers were started; it names their log folder.
    attempt: u32,
}

impl Agent<'_> {
    /// Round after round. Each further one is paid for by a restart, or called for by another node.
    fn lead(&mut self) -> Result<Outcome> {
        loop {
            let restarts = self.crew.restarts();
            match self.watch()? {
                End::Succeeded => match self.group.finish(&self.signals, &self.options.signals_to_handle)? {
                    group::Finished::Done(closed) => return Ok(self.closed(closed)),
                    group::Finished::Signal(signal) => return Ok(self.stopped(signal)),
                    group::Finished::Regroup(why) => {
                        say(&format!("starting over: {why}"));
                        // Nobody lives who could be kept: all that follows is a start.
                        self.tell_aside(Event::Called(why));
                    }
                },
                End::Failed { next, why, failures } => {
                    if next == Next::GiveUp {
                        self.give_up(&why);
                        let reason = failures.is_empty().then_some(why);
                        return Ok(Outcome { failures, reason, ..self.outcome(1) });
                    }
                    say(&format!("restart {}: {why}", self.spent()));
                    if let Some(closed) = self.group.regroup(&why, &self.signals)? {
                        return Ok(Outcome { failures, ..self.closed(closed) });
                    }
                }
                End::Meet { why, own } => {
                    let on = self.go_on();
                    match (own, self.crew.restarts() > restarts) {
                        (true, true) => say(&format!("restart {}: {why}; {on}", self.spent())),
                        (true, false) => say(&format!("{why}; {on}")),
                        (false, _) => say(&format!("meeting again: {why}; {on}")),
                    }
                    if own && let Some(closed) = self.group.regroup(&why, &self.signals)? {
                        self.end()?;
                        return Ok(self.closed(closed));
                    }
                    self.why = why;
                }
                End::Signal(signal, failures) => return Ok(Outcome { failures, ..self.stopped(signal) }),
                End::Regroup(why) => say(&format!("starting over: {why}")),
                End::Closed(closed) => return Ok(self.closed(closed)),
                End::Lost(error) => return Err(error),
            }
        }
    }

    /// `2 of 3`.
    fn spent(&self) -> String {
        format!("{} of {}", self.crew.restarts(), self.options.max_restarts)
    }

    /// This node is out. Where workers can recover, the other nodes may go on; as under torchrun they may not.
    fn give_up(&mut self, why: &str) {
        if self.crew.recovers() {
            self.group.leave(why, &self.signals);
        } else {
            self.group.close(why, &self.signals);
        }
    }

    fn outcome(&self, exit_code: i32) -> Outcome {
        Outcome {
            exit_code,
            failures: Vec::new(),
            restarts: self.crew.restarts(),
            signal: None,
            reason: None,
            log_dir: self.logs.folder().to_owned(),
        }
    }

    fn stopped(&mut self, signal: i32) -> Outcome {
        self.group.leave(&format!("it was stopped by {}", signals::name(signal)), &self.signals);
        Outcome { signal: Some(signal), ..self.outcome(128 + signal) }
    }

    fn closed(&self, closed: elastic::rendezvous::Closed) -> Outcome {
        match closed {
            elastic::rendezvous::Closed::Succeeded => self.outcome(0),
            elastic::rendezvous::Closed::Failed(why) => Outcome { reason: Some(why), ..self.outcome(1) },
        }
    }
}

fn say(text: &str) {
    crate::cli::say(&format!("phalanx launch: {text}"));
}
