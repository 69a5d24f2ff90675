//! Every change a save makes to the disk goes through here, so that tests can stop it after any of them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A file being written.
pub(crate) struct NewFile {
    file: File,
    path: PathBuf,
}

impl NewFile {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        fault::point()?;
        Ok(NewFile { file: File::create(path)?, path: path.to_owned() })
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(e) = fault::point() {
            // A dying process may have written a part.
            self.file.write_all(&bytes[..bytes.len() / 2])?;
            fault::unsynced(&self.path);
            return Err(e);
        }
        self.file.write_all(bytes)?;
        fault::unsynced(&self.path);
        Ok(())
    }

    pub(crate) fn sync(self) -> io::Result<()> {
        fault::point()?;
        self.file.sync_all()?;
        fault::synced(&self.path);
        Ok(())
    }
}

pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    fault::point()?;
    fs::create_dir_all(path)
}

pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    fault::point()?;
    File::open(path)?.sync_all()
}

pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fault::point()?;
    fs::rename(from, to)
}

/// Swaps two directories in one step; false where the file system cannot.
pub(crate) fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    fault::point()?;
    if fault::no_exchange() {
        return Ok(false);
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        Ok(false)
    }
}

pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    fault::point()?;
    fs::remove_file(path)
}

/// Removes a directory and what is in it; a missing one is fine.
pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let entry = entry?;
        fault::point()?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fault::point()?;
    fs::remove_dir(path)
}

#[cfg(not(test))]
mod fault {
    pub(super) fn point() -> std::io::Result<()> {
        Ok(())
    }
    pub(super) fn no_exchange() -> bool {
        false
    }
    pub(super) fn unsynced(_: &std::path::Path) {}
    pub(super) fn synced(_: &std::path::Path) {}
}

/// Stops this thread's disk operations after a given number of them.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::io;
    use std::path::{Path, PathBuf};

    /// What happens at the chosen operation.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub(crate) enum Fault {
        /// The process dies: this operation and all later ones fail.
        Crash,
        /// This operation alone fails, as on a full disk.
        Full,
    }

    #[derive(Default)]
    struct State {
        armed: Option<(Fault, usize)>,
        no_exchange: bool,
        done: usize,
        unsynced: BTreeSet<PathBuf>,
    }

    thread_local! {
        static STATE: RefCell<State> = RefCell::default();
    }

    /// Runs `work` with a fault at operation `at` (counted from 0); also returns how many operations it began.
    /// `exchange` says whether the file system swaps directories in one step.
    pub(crate) fn with<T>(fault: Fault, at: usize, exchange: bool, work: impl FnOnce() -> T) -> (T, usize) {
        STATE.with_borrow_mut(|s| {
            *s = State { armed: Some((fault, at)), no_exchange: !exchange, ..State::default() };
        });
        let result = work();
        let state = STATE.take();
        if fault == Fault::Crash && state.done > at {
            // What was never synced is lost with the machine.
            for path in state.unsynced.iter().filter(|p| p.exists()) {
                std::fs::File::create(path).expect("truncate");
            }
        }
        (result, state.done)
    }

    pub(super) fn point() -> io::Result<()> {
        STATE.with_borrow_mut(|s| {
            let Some((fault, at)) = s.armed else { return Ok(()) };
            s.done += 1;
            match fault {
                Fault::Crash if s.done > at => Err(io::Error::other("crashed")),
                Fault::Full if s.done == at + 1 => Err(io::ErrorKind::StorageFull.into()),
                _ => Ok(()),
            }
        })
    }

    pub(super) fn no_exchange() -> bool {
        STATE.with_borrow(|s| s.no_exchange)
    }

    pub(super) fn unsynced(path: &Path) {
        STATE.with_borrow_mut(|s| s.unsynced.insert(path.to_owned()));
    }

    pub(super) fn synced(path: &Path) {
        STATE.with_borrow_mut(|s| s.unsynced.remove(path));
    }
}
