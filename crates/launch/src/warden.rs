//! No orphans: a process that outlives a killed agent for as long as it takes to kill what the agent started.
//!
//! The kernel kills the workers themselves when the agent dies (`PR_SET_PDEATHSIG`), but not the workers' own
//! children. The warden is forked from the agent before the first worker and blocks in a read on a pipe. The pipe ends
//! when the agent dies, however it dies; the warden then kills the workers' process groups and every process that
//! carries the launch's marker in its environment, and exits. It runs in a session of its own, with all signals blocked
//! and no open file but the pipe, and between fork and exit it makes only system calls, since the agent had threads.

use crate::options::MAX_NPROC;
use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, pipe_with};
use spec::{Error, Result};
use std::os::fd::AsRawFd;

/// The environment variable that every process of a launch carries: the markers of the launches it is part of, the
/// innermost last. A marker is random and appears nowhere else.
pub(crate) const MARKER: &str = "PHALANX_JOB";

/// A killed process takes a moment to go, and may have forked meanwhile: rounds of looking, and the pause between.
const SWEEP_ROUNDS: usize = 100;
/// A process in the middle of an exec has no environment yet, so one look without a find proves nothing.
const CLEAN_ROUNDS: usize = 2;
const SWEEP_PAUSE_NS: i64 = 2_000_000;

/// The agent's side.
pub(crate) struct Warden {
    pipe: OwnedFd,
    pid: libc::pid_t,
    marker: Vec<u8>,
}

impl Warden {
    /// Forks the warden; `marker` is this launch's own in [`MARKER`].
    pub(crate) fn start(marker: &str) -> Result<Warden> {
        let failed =
            |e: std::io::Error| Error::failure(format!("start the process that watches for orphans: {e}"));
        let marker = marker.as_bytes().to_vec();
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        // SAFETY: the child runs `watch` alone, which makes only async-signal-safe calls and never returns.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(failed(std::io::Error::last_os_error())),
            0 => watch(read.as_raw_fd(), &marker),
            _ => Ok(Warden { pipe: write, pid, marker }),
        }
    }

    /// From now on the process group `pid` is killed when the agent dies.
    pub(crate) fn add(&self, pid: u32) {
        self.send(i32::try_from(pid).unwrap_or(0));
    }

    /// The process group is gone; its number may be a stranger's soon.
    pub(crate) fn remove(&self, pid: u32) {
        self.send(-i32::try_from(pid).unwrap_or(0));
    }

    /// Kills every process of this launch, wherever it moved.
    pub(crate) fn sweep(&self) {
        sweep(&self.marker);
    }

    fn send(&self, record: i32) {
        // A warden that somebody killed is missed by nobody: the workers are still killed by the kernel.
        let _ = rustix::io::write(&self.pipe, &record.to_ne_bytes());
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        self.send(0);
        // SAFETY: a plain system call on our own child, which exits at once when told.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

/// The warden's life.
fn watch(pipe: i32, marker: &[u8]) -> ! {
    // SAFETY: async-signal-safe calls on valid pointers to locals; descriptors are plain numbers here.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"phalanx-warden".as_ptr());
        libc::chdir(c"/".as_ptr());
        libc::dup2(pipe, 0);
        if libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0) != 0 {
            (1..4096).for_each(|fd| {
                libc::close(fd);
            });
        }
    }
    let mut groups = [0i32; MAX_NPROC];
    let clean = loop {
        let mut record = [0u8; 4];
        // SAFETY: reads into a local of the given size. Records are written whole, being shorter than PIPE_BUF.
        let n = unsafe { libc::read(0, record.as_mut_ptr().cast(), record.len()) };
        match (n, i32::from_ne_bytes(record)) {
            (4, 0) => break true,
            (4, pid) => {
                let (from, to) = if pid > 0 { (0, pid) } else { (-pid, 0) };
                if let Some(place) = groups.iter_mut().find(|g| **g == from) {
                    *place = to;
                }
            }
            (-1, _) if std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => break false,
        }
    };
    // SAFETY: plain system calls.
    unsafe {
        if !clean {
            groups.iter().filter(|g| **g > 0).for_each(|g| {
                libc::kill(-*g, libc::SIGKILL);
            });
            sweep(marker);
        }
        libc::_exit(0)
    }
}

/// Kills every process whose environment holds `marker`, until a look at all of them finds none.
/// Makes only system calls and does not allocate.
fn sweep(marker: &[u8]) {
    let mut clean = 0;
    for _ in 0..SWEEP_ROUNDS {
        clean = if kill_marked(marker) == 0 { clean + 1 } else { 0 };
        if clean == CLEAN_ROUNDS {
            return;
        }
        let pause = libc::timespec { tv_sec: 0, tv_nsec: SWEEP_PAUSE_NS };
        // SAFETY: reads a local.
        unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
    }
}

/// One look at all processes; how many were killed.
fn kill_marked(marker: &[u8]) -> usize {
    let mut killed = 0;
    let mut entries = [0u8; 8192];
    // SAFETY: a constant path; the descriptor is closed below.
    let proc = unsafe { libc::open(c"/proc".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC) };
    if proc < 0 {
        return 0;
    }
    loop {
        // SAFETY: writes at most `entries.len()` bytes into `entries`.
        let n = unsafe { libc::syscall(libc::SYS_getdents64, proc, entries.as_mut_ptr(), entries.len()) };
        let Some(mut rest) = usize::try_from(n).ok().filter(|n| *n > 0).and_then(|n| entries.get(..n)) else {
            break;
        };
        // struct linux_dirent64: u64 inode, i64 offset, u16 length, u8 type, name ended by 0.
        while let (Some(&[a, b]), Some(name)) = (rest.get(16..18), rest.get(19..)) {
            if let Some(pid) = number(name)
                && has_marker(pid, marker)
            {
                // SAFETY: a plain system call.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                killed += 1;
            }
            let length = usize::from(u16::from_ne_bytes([a, b])).max(19);
            rest = rest.get(length..).unwrap_or(&[]);
        }
    }
    // SAFETY: our own descriptor.
    unsafe { libc::close(proc) };
    killed
}

/// The number that `name`, ended by 0, spells.
fn number(name: &[u8]) -> Option<i32> {
    let digits = name.split(|b| *b == 0).next().filter(|d| !d.is_empty() && d.len() < 10)?;
    digits.iter().try_fold(0i32, |n, d| d.is_ascii_digit().then(|| n * 10 + i32::from(d - b'0')))
}

/// Whether the process was started with `marker` in its environment.
fn has_marker(pid: i32, marker: &[u8]) -> bool {
    let mut path = *b"/proc/0000000000/environ\0";
    let mut left = pid;
    for place in path[6..16].iter_mut().rev() {
        *place = b'0' + u8::try_from(left % 10).unwrap_or(0);
        left /= 10;
    }
    // /proc has no leading zeros: move the digits and the tail to the front.
    let digits = path[6..15].iter().take_while(|b| **b == b'0').count();
    path.copy_within(6 + digits.., 6);
    // SAFETY: `path` is ended by 0; the descriptor is closed below.
    let file = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if file < 0 {
        return false;
    }
    let found = contains(file, marker);
    // SAFETY: our own descriptor.
    unsafe { libc::close(file) };
    found
}

/// Whether `marker` is in what `file` holds; blocks overlap, so that it may lie across two.
fn contains(file: i32, marker: &[u8]) -> bool {
    let mut block = [0u8; 16384];
    let mut kept = 0;
    while kept < block.len() {
        let space = &mut block[kept..];
        // SAFETY: reads at most `space.len()` bytes into `space`.
        let n = unsafe { libc::read(file, space.as_mut_ptr().cast(), space.len()) };
        let Some(end) = usize::try_from(n).ok().filter(|n| *n > 0).map(|n| kept + n) else { return false };
        if block[..end].windows(marker.len()).any(|w| w == marker) {
            return true;
        }
        let keep = end.min(marker.len());
        block.copy_within(end - keep..end, 0);
        kept = keep;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn id(pid: u32) -> i32 {
        i32::try_from(pid).unwrap()
    }

    #[test]
    fn marked_processes_are_found_and_no_others() {
        let marker = crate::logs::random_hex();
        let text = marker.clone().into_bytes();
        let long = "x".repeat(40_000);
        let start = |value: &str| {
            let mut command = Command::new("sleep");
            let child =
                command.arg("1000").env("A_LONG_ONE", &long).env(MARKER, value).stdout(Stdio::null()).spawn();
            let child = child.unwrap();
            // The environment appears in /proc a moment after the exec that ends `spawn`.
            while !has_marker(id(child.id()), value.as_bytes()) {
                std::thread::yield_now();
            }
            child
        };
        let (mut marked, mut other) = (start(&marker), start("something else"));
        assert!(has_marker(id(marked.id()), &text));
        assert!(!has_marker(id(other.id()), &text));
        assert!(!has_marker(i32::MAX, &text));
        sweep(&text);
        assert!(!marked.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn numbers_of_proc() {
        assert_eq!(number(b"123\0xx"), Some(123));
        assert_eq!(number(b"self\0"), None);
        assert_eq!(number(b"\0"), None);
    }
}
