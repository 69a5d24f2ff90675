//! The agent for a program that starts its own ranks on this machine.

use crate::agent::{Outcome, run};
use crate::logs::Streams;
use crate::options::{NprocPerNode, Options, Runner, Saving};
use spec::{Error, Result};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Ranks to start on this machine.
///
/// ```
/// let job = launch::LocalJob::new(2, ["sh", "-c", "test $RANK -lt $WORLD_SIZE"]);
/// assert_eq!(job.run()?.exit_code, 0);
/// # Ok::<(), spec::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LocalJob {
    /// Ranks.
    pub nproc: usize,
    /// The program and its arguments, the same for every rank.
    pub command: Vec<OsString>,
    /// Variables for the ranks, over the inherited ones and those of the launcher's contract.
    pub env: Vec<(String, String)>,
    /// Folder of the log files; a temporary one if `None`.
    pub log_dir: Option<PathBuf>,
    /// Streams that go to files only; the others go where the caller's go.
    pub redirects: Streams,
    /// Streams that go to files and, line by line, to the caller's.
    pub tee: Streams,
    /// Prefix of tee'd lines, with torchrun's variables.
    pub line_prefix: Option<String>,
    /// Restarts before giving up: of the lost rank where the others can recover, else of all ranks.
    pub max_restarts: u32,
    /// Fewest ranks to go on with when one keeps failing; all if `None`.
    pub min_nproc: Option<usize>,
    /// From SIGTERM to SIGKILL.
    pub shutdown_timeout: Duration,
    /// For ranks that save before they end by request.
    pub saving: Option<Saving>,
}

impl LocalJob {
    /// `nproc` ranks of `command` with torchrun's defaults.
    pub fn new<S: Into<OsString>>(nproc: usize, command: impl IntoIterator<Item = S>) -> LocalJob {
        LocalJob {
            nproc,
            command: command.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            log_dir: None,
            redirects: Streams::none(),
            tee: Streams::none(),
            line_prefix: None,
            max_restarts: 0,
            min_nproc: None,
            shutdown_timeout: Options::default().shutdown_timeout,
            saving: None,
        }
    }

    /// Starts the ranks and watches them to their end on the calling thread; see [`run`].
    ///
    /// # Errors
    /// As [`run`]: the ranks could not be started.
    pub fn run(&self) -> Result<Outcome> {
        let (program, args) =
            self.command.split_first().ok_or_else(|| Error::user("no program to launch"))?;
        let options = Options {
            nproc: NprocPerNode::Count(self.nproc),
            standalone: true,
            max_restarts: self.max_restarts,
            min_nproc: self.min_nproc,
            shutdown_timeout: self.shutdown_timeout,
            saving: self.saving,
            runner: Runner::Direct,
            log_dir: self.log_dir.clone(),
            redirects: self.redirects.clone(),
            tee: self.tee.clone(),
            log_line_prefix_template: self.line_prefix.clone(),
            env: self.env.clone(),
            ..Options::default()
        };
        run(&options, program.clone(), args)
    }
}
