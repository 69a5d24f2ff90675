//! One directory, one owner: the lock that a trainer holds on its run's directory.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::host::host;

/// Name of the locked file inside a run's directory; it holds the owner's process id and host, and is gone after a
/// clean end.
const NAME: &str = "lock";

/// Times that the file may vanish between being opened and being locked; each time another trainer has just ended.
const TRIES: u32 = 100;

/// Longest owner text read: a process id and a host name.
const OWNER_BYTES_MAX: u64 = 512;

/// A run's directory, held for this process until dropped. The kernel lets go when the process ends, however it ends.
///
/// Readers need none. The lock is `flock`'s: within a machine it always works, over NFS since Linux 2.6.12 between
/// clients of one server.
#[derive(Debug)]
pub struct DirLock {
    file: File,
    dir: PathBuf,
    /// The directory was made for the lock, and goes with it if nothing else came into it.
    made: bool,
    /// What people should know about how it was taken.
    note: Option<String>,
}

impl DirLock {
    /// Takes a run's directory, which is made if need be.
    ///
    /// # Errors
    /// When another process holds it, which is named, or the directory cannot be written.
    pub fn take(dir: &Path) -> Result<DirLock> {
        let made = make(dir)?;
        let path = dir.join(NAME);
        let io =
            |e: io::Error| Error::io("lock run directory", &path, &e).hint("set run.dir to a writable place");
        for _ in 0..TRIES {
            let mut file = open(&path).map_err(io)?;
            let supported = match file.try_lock() {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => return Err(in_use(dir, &mut file)),
                Err(TryLockError::Error(e)) if is_unsupported(&e) => false,
                Err(TryLockError::Error(e)) => return Err(io(e)),
            };
            if !is_at(&file, &path) {
                continue;
            }
            let earlier = owner(&mut file).map_err(io)?;
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| write!(file, "process {} on {}", std::process::id(), host()))
                .map_err(io)?;
            let note = match (supported, earlier.is_empty()) {
                (false, _) => Some(format!(
                    "the file system of {} has no locks: nothing keeps a second trainer out of it",
                    dir.display()
                )),
                (true, true) => None,
                (true, false) => Some(format!(
                    "took over {} from {earlier}, which ended without giving it back",
                    dir.display()
                )),
            };
            return Ok(DirLock { file, dir: dir.to_owned(), made, note });
        }
        Err(Error::failure(format!("lock {}: it vanished {TRIES} times", path.display()))
            .hint("end the trainers that start and stop in this directory, or set run.dir to another"))
    }

    /// What people should know about how it was taken: from whom, or that it keeps nobody out.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Whatever fails here leaves a file that the next owner takes over, with a note.
        let path = self.dir.join(NAME);
        if is_at(&self.file, &path) {
            let _ = fs::remove_file(&path);
        } else {
            // The directory was moved aside.
            let _ = self.file.set_len(0);
        }
        if self.made {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

fn make(dir: &Path) -> Result<bool> {
    if dir.is_dir() {
        return Ok(false);
    }
    if dir.exists() {
        return Err(Error::user(format!("run.dir = {}: not a directory", dir.display()))
            .hint("set run.dir to a directory, or to a new name"));
    }
    fs::create_dir_all(dir)
        .map_err(|e| Error::io("create run directory", dir, &e).hint("set run.dir to a writable place"))?;
    Ok(true)
}

/// Opens the file without following a link.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Whether `path` still names this file: an owner that ended may have removed it after it was opened here.
fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(held), Ok(named)) = (file.metadata(), fs::symlink_metadata(path)) else { return false };
    (held.dev(), held.ino()) == (named.dev(), named.ino())
}

fn is_unsupported(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOLCK | libc::EINVAL))
}

fn owner(file: &mut File) -> io::Result<String> {
    let mut text = Vec::new();
    file.rewind()?;
    file.take(OWNER_BYTES_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

fn in_use(dir: &Path, file: &mut File) -> Error {
    // Between locking and writing its name an owner has none.
    let who = owner(file).ok().filter(|o| !o.is_empty()).unwrap_or_else(|| "another process".to_owned());
    Error::user(format!("{} is in use: {who} trains in it", dir.display()))
        .hint("wait for it, stop it with SIGTERM, or set run.dir=PATH to another directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_directory_one_owner() {
        let outside = tempfile::tempdir().expect("a folder");
        let dir = outside.path().join("run");
        let me = format!("process {} on {}", std::process::id(), host());
        let lock = DirLock::take(&dir).expect("free");
        assert_eq!(lock.note(), None);
        let refused = DirLock::take(&dir).expect_err("held");
        assert_eq!(refused.exit_code(), 2);
        assert!(refused.to_string().contains(&format!("run is in use: {me}")), "{refused}");
        drop(lock);
        assert!(!dir.exists(), "a directory that was made for a lock alone goes with it");

        fs::create_dir(&dir).expect("a folder");
        fs::write(dir.join(NAME), "process 7 on elsewhere").expect("a stale lock");
        let lock = DirLock::take(&dir).expect("free");
        let note = lock.note().unwrap_or_default();
        assert!(note.contains("process 7 on elsewhere, which ended without giving it back"), "{note}");
        drop(lock);
        assert!(dir.exists() && !dir.join(NAME).exists());
    }

    #[test]
    fn a_moved_directory_stays_held_and_the_name_is_free() {
        let outside = tempfile::tempdir().expect("a folder");
        let (dir, aside) = (outside.path().join("run"), outside.path().join("old"));
        let first = DirLock::take(&dir).expect("free");
        fs::rename(&dir, &aside).expect("moved");
        let second = DirLock::take(&dir).expect("a new directory");
        DirLock::take(&aside).expect_err("held where it is now");
        drop(first);
        DirLock::take(&dir).expect_err("still held by the second");
        drop(second);
        assert!(DirLock::take(&aside).expect("free").note().is_none());
    }

    #[test]
    fn nothing_outside_is_touched() {
        let outside = tempfile::tempdir().expect("a folder");
        let (dir, file) = (outside.path().join("run"), outside.path().join("precious"));
        fs::write(&file, "precious").expect("a file");
        fs::create_dir(&dir).expect("a folder");
        std::os::unix::fs::symlink(&file, dir.join(NAME)).expect("a link");
        DirLock::take(&dir).expect_err("a link is not followed");
        let refused = DirLock::take(&file).expect_err("no directory");
        assert!(refused.to_string().contains("not a directory"), "{refused}");
        assert_eq!(fs::read_to_string(&file).expect("a file"), "precious");
    }
}
