//! Every change a save makes to the disk goes through here, so that tests can stop it after any of them.
//!
//! Names are resolved inside an open directory and links in it are never followed: a link that stands where a
//! checkpoint should be is replaced or unlinked, and what it points to is not touched.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

/// Directories inside directories that are removed: each holds a descriptor. Checkpoints have none.
const MAX_DEPTH: usize = 64;

/// Tries at a directory that other ranks make, or clear after a failure, at the same moment.
const MAKE_TRIES: usize = 16;

/// An open directory.
#[derive(Debug)]
pub(crate) struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    /// Opens a directory that the user named; links on the way to it are the user's and are followed.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Folder { fd: file.into(), path: path.to_owned() })
    }

    /// The same, made if it is missing.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        fault::point()?;
        fs::create_dir_all(path)?;
        Self::open(path)
    }

    /// Where it lies, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in this one, which must not be a link to one.
    pub(crate) fn inside(&self, name: &OsStr) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::empty())?;
        Ok(Folder { fd, path: self.path.join(name) })
    }

    /// Makes a directory in this one, or opens the one that is there. Anything else of that name is unlinked.
    pub(crate) fn make(&self, name: &OsStr) -> io::Result<Self> {
        fault::point()?;
        for _ in 0..MAKE_TRIES {
            match mkdirat(&self.fd, name, Mode::from_bits_truncate(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            match self.inside(name) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) if self.kind(name)?.is_some_and(|kind| kind != FileType::Directory) => {
                    // Fails where another rank has put the directory there in between.
                    let _ = unlinkat(&self.fd, name, AtFlags::empty());
                    drop(e);
                }
                other => return other,
            }
        }
        Err(io::Error::other("somebody else keeps changing it"))
    }

    /// What has this name, links not followed.
    pub(crate) fn kind(&self, name: &OsStr) -> io::Result<Option<FileType>> {
        match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The length of a regular file, links not followed.
    pub(crate) fn file_bytes(&self, name: &OsStr) -> io::Result<u64> {
        let stat = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file")),
        }
    }

    /// The names in it, in no order.
    pub(crate) fn names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// A new file; what had the name before goes first.
    pub(crate) fn new_file(&self, name: &OsStr) -> io::Result<NewFile> {
        self.remove(name)?;
        fault::point()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::from_bits_truncate(0o666))?;
        Ok(NewFile { file: fd.into(), path: self.path.join(name) })
    }

    /// Gives an entry another name, in place of what had it.
    pub(crate) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        fault::point()?;
        Ok(renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Swaps two entries in one step; false where the file system cannot.
    pub(crate) fn exchange(&self, a: &OsStr, b: &OsStr) -> io::Result<bool> {
        fault::point()?;
        if fault::no_exchange() {
            return Ok(false);
        }
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{RenameFlags, renameat_with};
            match renameat_with(&self.fd, a, &self.fd, b, RenameFlags::EXCHANGE) {
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

    /// Removes whatever has this name, a directory with all that is in it; links are unlinked, never entered.
    /// A missing name is fine.
    pub(crate) fn remove(&self, name: &OsStr) -> io::Result<()> {
        self.remove_to(name, MAX_DEPTH)
    }

    /// Removes a file of a directory in this one, and the directory if that leaves it empty.
    pub(crate) fn discard(&self, folder: &OsStr, file: &OsStr) {
        if let Ok(inside) = self.inside(folder) {
            let _ = unlinkat(&inside.fd, file, AtFlags::empty());
            let _ = unlinkat(&self.fd, folder, AtFlags::REMOVEDIR);
        }
    }

    fn remove_to(&self, name: &OsStr, depth: usize) -> io::Result<()> {
        let gone = |e: Errno| if e == Errno::NOENT { Ok(()) } else { Err(e.into()) };
        if self.kind(name)? != Some(FileType::Directory) {
            fault::point()?;
            return unlinkat(&self.fd, name, AtFlags::empty()).or_else(gone);
        }
        let inside = self.inside(name)?;
        for entry in inside.names()? {
            if depth == 0 {
                return Err(io::Error::other(format!("directories are nested deeper than {MAX_DEPTH}")));
            }
            inside.remove_to(&entry, depth - 1)?;
        }
        fault::point()?;
        unlinkat(&self.fd, name, AtFlags::REMOVEDIR).or_else(gone)
    }

    /// Makes the names in it last.
    pub(crate) fn sync(&self) -> io::Result<()> {
        fault::point()?;
        Ok(rustix::fs::fsync(&self.fd)?)
    }
}

/// A file being written.
pub(crate) struct NewFile {
    file: File,
    path: PathBuf,
}

impl NewFile {
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
