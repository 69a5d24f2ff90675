//! Signals sent to the agent, as bytes in a pipe that its control thread polls.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::pipe::{PipeFlags, pipe_with};
use spec::{Error, Result};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

/// Signals by name; those that nobody can catch, or that mean a bug of the process itself, are left out.
const NAMES: &[(&str, i32)] = &[
    ("SIGHUP", libc::SIGHUP),
    ("SIGINT", libc::SIGINT),
    ("SIGQUIT", libc::SIGQUIT),
    ("SIGTERM", libc::SIGTERM),
    ("SIGUSR1", libc::SIGUSR1),
    ("SIGUSR2", libc::SIGUSR2),
    ("SIGALRM", libc::SIGALRM),
    ("SIGCONT", libc::SIGCONT),
    ("SIGWINCH", libc::SIGWINCH),
    ("SIGXCPU", libc::SIGXCPU),
];

/// Names of the signals a worker may die of, beyond [`NAMES`].
const FATAL_NAMES: &[(&str, i32)] = &[
    ("SIGKILL", libc::SIGKILL),
    ("SIGSEGV", libc::SIGSEGV),
    ("SIGABRT", libc::SIGABRT),
    ("SIGBUS", libc::SIGBUS),
    ("SIGFPE", libc::SIGFPE),
    ("SIGILL", libc::SIGILL),
    ("SIGPIPE", libc::SIGPIPE),
    ("SIGTRAP", libc::SIGTRAP),
    ("SIGSYS", libc::SIGSYS),
    ("SIGXFSZ", libc::SIGXFSZ),
];

/// A signal by name, `TERM` or `SIGTERM`.
pub(crate) fn parse(name: &str) -> Result<i32> {
    let upper = name.to_uppercase();
    let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    if let Some((_, number)) = NAMES.iter().find(|(n, _)| *n == full) {
        return Ok(*number);
    }
    let known: Vec<&str> = NAMES.iter().map(|(n, _)| *n).collect();
    Err(Error::user(format!("signal {name} is unknown or cannot be handled"))
        .hint(format!("known: {}", known.join(", "))))
}

/// The name of signal `number`, for people.
pub(crate) fn name(number: i32) -> String {
    let known = NAMES.iter().chain(FATAL_NAMES).find(|(_, n)| *n == number);
    known.map_or_else(|| format!("SIG{number}"), |(name, _)| (*name).to_owned())
}

/// Agents that listen now. While there is none, a signal does what it does by default.
static LISTENING: AtomicUsize = AtomicUsize::new(0);
static IDLE: LazyLock<Arc<AtomicBool>> = LazyLock::new(|| Arc::new(AtomicBool::new(true)));
/// Signals whose default action is already emulated while nobody listens.
static WITH_DEFAULT: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Catches signals until it is dropped.
pub(crate) struct Signals {
    read: OwnedFd,
    ids: Vec<signal_hook::SigId>,
}

impl Signals {
    /// Starts to catch `signals`, except those that were set to be ignored before (`nohup`).
    pub(crate) fn catch(signals: &[i32]) -> Result<Signals> {
        let failed = |e: &dyn std::fmt::Display| Error::failure(format!("catch signals: {e}"));
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(|e| failed(&e))?;
        let write = Arc::new(write);
        LISTENING.fetch_add(1, Ordering::SeqCst);
        IDLE.store(false, Ordering::SeqCst);
        let mut caught = Signals { read, ids: Vec::new() };
        for &signal in signals {
            if is_ignored(signal) {
                continue;
            }
            emulate_default_when_idle(signal).map_err(|e| failed(&e))?;
            let write = Arc::clone(&write);
            let action = move || {
                let byte = u8::try_from(signal).unwrap_or(0);
                // SAFETY: the pipe lives as long as this action, `byte` for the call; write is async-signal-safe.
                // A full pipe drops the signal, of which 64 Ki are waiting by then.
                let _ = unsafe { libc::write(write.as_raw_fd(), (&raw const byte).cast(), 1) };
            };
            // SAFETY: the action only calls write.
            let id = unsafe { signal_hook::low_level::register(signal, action) };
            caught.ids.push(id.map_err(|e| failed(&e))?);
        }
        Ok(caught)
    }

    /// The next signal that came, if any.
    pub(crate) fn next(&self) -> Option<i32> {
        let mut byte = [0u8];
        match rustix::io::read(&self.read, &mut byte) {
            Ok(1) => Some(i32::from(byte[0])),
            _ => None,
        }
    }

    /// Becomes readable when a signal came.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
        if LISTENING.fetch_sub(1, Ordering::SeqCst) == 1 {
            IDLE.store(true, Ordering::SeqCst);
        }
    }
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: all-zero is a valid sigaction, and with a null new action the call only reads the old one into it.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut old) == 0 && old.sa_sigaction == libc::SIG_IGN
    }
}

/// Some parents start their programs with SIGCHLD ignored; then the kernel throws exit codes away.
pub(crate) fn let_children_be_waited_for() {
    if is_ignored(libc::SIGCHLD) {
        // SAFETY: sets the default action, which runs no code of ours.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    }
}

/// Without this a handled signal would stay swallowed after the last agent of the process is gone.
fn emulate_default_when_idle(signal: i32) -> std::io::Result<()> {
    let mut done = WITH_DEFAULT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !done.contains(&signal) {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&IDLE))?;
        done.push(signal);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        assert_eq!(parse("term").ok(), Some(libc::SIGTERM));
        assert_eq!(name(libc::SIGTERM), "SIGTERM");
        assert_eq!(name(9), "SIGKILL");
        assert_eq!(name(63), "SIG63");
    }

    #[test]
    fn a_caught_signal_is_read_once() {
        let signals = Signals::catch(&[libc::SIGWINCH]).unwrap();
        signal_hook::low_level::raise(libc::SIGWINCH).unwrap();
        assert_eq!(signals.next(), Some(libc::SIGWINCH));
        assert_eq!(signals.next(), None);
    }
}
