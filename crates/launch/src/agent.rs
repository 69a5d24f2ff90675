//! The agent of one node: joins, starts the workers, watches them, stops them, and starts over or ends.

mod group;
mod supervise;

use crate::failure::{self, Failure};
use crate::logs::{Logs, random_hex};
use crate::options::Options;
use crate::secret::Trust;
use crate::signals::{self, Signals};
use crate::warden::Warden;
use crate::worker::command_line;
use group::{Group, Joined};
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
    let mut agent = Agent {
        options,
        command,
        nproc,
        run_id,
        marker,
        signals,
        warden,
        logs,
        group,
        trust,
        bind,
        restarts: 0,
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

struct Agent<'a> {
    options: &'a Options,
    command: Vec<OsString>,
    nproc: usize,
    run_id: String,
    marker: String,
    signals: Signals,
    warden: Warden,
    logs: Logs,
    group: Group,
    trust: Trust,
    bind: Option<IpAddr>,
    restarts: u32,
    /// Counts starts of the workers; it names their log folder.
    attempt: u32,
}

impl Agent<'_> {
    /// Attempt after attempt. Each further one is paid for by a restart, or called for by another node.
    fn lead(&mut self) -> Result<Outcome> {
        loop {
            let seat = match self.group.join(&self.signals, &self.options.signals_to_handle)? {
                Joined::Seat(seat) => seat,
                Joined::Signal(signal) => return Ok(self.stopped(signal)),
                Joined::Closed(closed) => return Ok(self.closed(closed)),
            };
            let end = self.attempt(&seat)?;
            self.attempt += 1;
            match end {
                End::Succeeded => match self.group.finish(&self.signals, &self.options.signals_to_handle)? {
                    group::Finished::Done(closed) => return Ok(self.closed(closed)),
                    group::Finished::Signal(signal) => return Ok(self.stopped(signal)),
                    group::Finished::Regroup(why) => say(&format!("starting over: {why}")),
                },
                End::Failed(failures) => {
                    let cause = failures.first().map_or_else(String::new, Failure::summary);
                    if self.restarts >= self.options.max_restarts {
                        self.group.close(&cause, &self.signals);
                        return Ok(Outcome { failures, ..self.outcome(1) });
                    }
                    self.restarts += 1;
                    say(&format!("restart {} of {}: {cause}", self.restarts, self.options.max_restarts));
                    if let Some(closed) = self.group.regroup(&cause, &self.signals)? {
                        return Ok(Outcome { failures, ..self.closed(closed) });
                    }
                }
                End::Signal(signal, failures) => return Ok(Outcome { failures, ..self.stopped(signal) }),
                End::Regroup(why) => say(&format!("starting over: {why}")),
                End::Closed(closed) => return Ok(self.closed(closed)),
                End::Lost(error) => return Err(error),
            }
        }
    }

    fn outcome(&self, exit_code: i32) -> Outcome {
        Outcome {
            exit_code,
            failures: Vec::new(),
            restarts: self.restarts,
            signal: None,
            reason: None,
            log_dir: self.logs.folder().to_owned(),
        }
    }

    fn stopped(&mut self, signal: i32) -> Outcome {
        self.group.leave(&format!("it was stopped by {}", signals::name(signal)), &self.signals);
        Outcome { signal: Some(signal), ..self.outcome(128 + signal) }
    }

    fn closed(&self, closed: crate::rendezvous::Closed) -> Outcome {
        match closed {
            crate::rendezvous::Closed::Succeeded => self.outcome(0),
            crate::rendezvous::Closed::Failed(why) => Outcome { reason: Some(why), ..self.outcome(1) },
        }
    }
}

fn say(text: &str) {
    crate::cli::say(&format!("phalanx launch: {text}"));
}
