//! One worker process: started in a session of its own, watched through a pidfd, killed with all it started.

use crate::failure::{self, Ended};
use crate::link::Link;
use elastic::AGENT_FD;
use elastic::{Orders, Report};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use spec::{Error, Result};
use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// One started worker.
pub(crate) struct Worker {
    /// Where it runs on this node, whatever its rank is.
    pub(crate) place: usize,
    pub(crate) rank: usize,
    pub(crate) local_rank: usize,
    pub(crate) error_file: PathBuf,
    /// `None` when the worker has closed its end.
    link: Option<Link>,
    child: Child,
    pid: Pid,
    /// Readable when the process has ended; `None` where the kernel has none, and then the agent looks at intervals.
    pidfd: Option<OwnedFd>,
    ended: Option<Ended>,
    /// The agent has sent it SIGKILL.
    killed: Cell<bool>,
}

impl Worker {
    /// Starts `command`. The kernel kills the worker when the calling *thread* ends, so call it from the thread that
    /// watches the worker to its end.
    pub(crate) fn start(
        mut command: Command,
        place: usize,
        rank: usize,
        local_rank: usize,
        error_file: PathBuf,
    ) -> Result<Worker> {
        let agent = rustix::process::getpid().as_raw_nonzero().get();
        let (link, end) = Link::pair()?;
        let number = end.number();
        command.env(AGENT_FD, number.to_string());
        let prepare = move || {
            // SAFETY: plain system calls without pointers, allowed between fork and exec.
            unsafe {
                // A session of its own, as under torchrun: a process group to kill, and no terminal to be stopped by.
                if libc::setsid() < 0 || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                // The agent may have died before the line above.
                if libc::getppid() != agent {
                    libc::_exit(1);
                }
                // The one descriptor that outlives the exec, in this process alone.
                if libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: `prepare` only makes system calls.
        unsafe { command.pre_exec(prepare) };
        let child = command.spawn().map_err(|e| spawn_error(&command, &e))?;
        drop(end);
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok();
        let (link, killed) = (Some(link), Cell::new(false));
        Ok(Worker { place, rank, local_rank, error_file, link, child, pid, pidfd, ended: None, killed })
    }

    /// What it has reported since the last look.
    ///
    /// # Errors
    /// It says something that is no report; nothing more is heard from it.
    pub(crate) fn reports(&mut self) -> Result<Vec<Report>> {
        let Some(link) = &mut self.link else { return Ok(Vec::new()) };
        let (reports, open) = link.reports()?;
        if !open {
            self.link = None;
        }
        Ok(reports)
    }

    /// Orders it to meet again; from then on it has the rank of the orders.
    pub(crate) fn order(&mut self, orders: &Orders) -> Result<()> {
        (self.rank, self.local_rank) = (orders.rank, orders.local_rank);
        let link = self.link.as_ref().ok_or_else(|| Error::failure("it has closed its end"))?;
        link.order(orders).map_err(|e| Error::failure(e.to_string()))
    }

    /// Whether it has ended with success.
    pub(crate) fn is_done(&self) -> bool {
        self.ended == Some(Ended::Code(0))
    }

    /// Says that no orders come any more.
    pub(crate) fn hang_up(&self) {
        if let Some(link) = self.link.as_ref().filter(|_| self.ended.is_none()) {
            link.hang_up();
        }
    }

    /// The descriptor to wait on for reports.
    pub(crate) fn reports_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().filter(|_| self.ended.is_none()).map(Link::fd)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, as far as [`Worker::look`] has seen.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// Whether it died of a signal that the agent did not send it to be rid of it.
    pub(crate) fn was_killed_by_others(&self) -> bool {
        matches!(self.ended, Some(Ended::Signal(s)) if failure::is_fatal(s)) && !self.killed.get()
    }

    /// The descriptor to wait on while the worker runs.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        if self.ended.is_some() { None } else { self.pidfd.as_ref().map(AsFd::as_fd) }
    }

    /// Looks whether the worker has ended; if so, kills what is left of its process group and reaps it.
    /// True when it is seen to have ended for the first time.
    pub(crate) fn look(&mut self) -> bool {
        if self.ended.is_some() {
            return false;
        }
        // Without reaping: while the zombie stands, no stranger can get its process group's number.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match waitid(WaitId::Pid(self.pid), options) {
            Ok(None) => return false,
            Ok(Some(_)) => {
                let _ = kill_process_group(self.pid, Signal::KILL);
            }
            // Someone else reaped it; what it ended with is unknown, and `wait` below says so.
            Err(rustix::io::Errno::CHILD) => {}
            Err(_) => return false,
        }
        self.ended = Some(match self.child.wait() {
            Ok(status) => {
                status.signal().map_or_else(|| Ended::Code(status.code().unwrap_or(1)), Ended::Signal)
            }
            Err(_) => Ended::Code(1),
        });
        true
    }

    /// Sends `signal` to the worker and all processes of its group, unless it has ended.
    pub(crate) fn signal(&self, signal: i32) {
        if self.ended.is_none() {
            self.killed.set(self.killed.get() || signal == libc::SIGKILL);
            // SAFETY: a plain system call. The process is not reaped, so the group is still its own.
            unsafe { libc::kill(-self.pid.as_raw_nonzero().get(), signal) };
        }
    }

    /// Sends `signal` to the worker alone.
    pub(crate) fn signal_leader(&self, signal: i32) {
        if self.ended.is_none() {
            // SAFETY: as in `signal`.
            unsafe { libc::kill(self.pid.as_raw_nonzero().get(), signal) };
        }
    }

    /// The one-letter state that the kernel gives: `T` is stopped, `D` waits for a device.
    pub(crate) fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        // The name in parentheses may hold anything, so count from its end.
        stat.rsplit_once(')')?.1.trim_start().chars().next()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Reached only on an error path. No wait: a process that waits for a device does not even heed SIGKILL.
        self.signal(libc::SIGKILL);
        let _ = self.child.try_wait();
    }
}

fn spawn_error(command: &Command, e: &std::io::Error) -> Error {
    let program = command.get_program().to_string_lossy().into_owned();
    let is_path = program.contains('/');
    match e.kind() {
        std::io::ErrorKind::NotFound if is_path && Path::new(&program).exists() => {
            Error::user(format!("start {program}: the interpreter in its first line does not exist"))
        }
        std::io::ErrorKind::NotFound if is_path => Error::user(format!("start {program}: no such file")),
        std::io::ErrorKind::NotFound => Error::user(format!("start {program}: not found in PATH"))
            .hint(format!("a file of this folder is ./{program}")),
        std::io::ErrorKind::PermissionDenied => {
            Error::user(format!("start {program}: not an executable file"))
                .hint(format!("chmod +x {program}, or launch it through its interpreter"))
        }
        _ => comm::os_error(&format!("start {program}"), e),
    }
}

/// The program and its first arguments for a script or program given to `phalanx launch`.
pub(crate) fn command_line(runner: crate::options::Runner, program: OsString) -> Vec<OsString> {
    use crate::options::Runner;
    let through_python = match runner {
        Runner::Python | Runner::Module => true,
        Runner::Direct => false,
        Runner::Guess => is_python_script(Path::new(&program)),
    };
    if !through_python {
        return vec![program];
    }
    let mut line = vec![python(), OsString::from("-u")];
    if runner == Runner::Module {
        line.push("-m".into());
    }
    line.push(program);
    line
}

/// A `.py` file, or a file that exists and cannot be executed by itself: what torchrun would give to Python.
fn is_python_script(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    if path.extension().is_some_and(|e| e == "py") {
        return true;
    }
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 == 0)
}

/// `PYTHON_EXEC` as under torchrun, else the first of `python3` and `python` in `PATH`.
fn python() -> OsString {
    if let Some(python) = std::env::var_os("PYTHON_EXEC").filter(|p| !p.is_empty()) {
        return python;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: &str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    if !found("python3") && found("python") { "python".into() } else { "python3".into() }
}
