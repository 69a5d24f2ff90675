//! The disk that checkpoints are on: one of this process's own, in memory, that can be filled and made read-only.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::statvfs;
use rustix::io::Errno;
use spec::{Error, Result};

/// Many times the checkpoints that are kept of the small model.
const SIZE: &CStr = c"size=64m";
/// Nobody can make a file system read-only while a file is written there: tried so often.
const TRIES: u32 = 1000;
const BETWEEN_TRIES: Duration = Duration::from_millis(2);

/// A disk that ends with it.
pub(crate) struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Mounts a disk of this process and its children alone at `path`; or says why the system does not let it.
    pub(crate) fn mount(path: &Path) -> Result<Disk, String> {
        let said = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
        fs::create_dir_all(path).map_err(said("make a folder"))?;
        // SAFETY: the mounts of this thread and of what it starts become its own; memory and files stay as they are.
        checked(unsafe { libc::unshare(libc::CLONE_NEWNS) }).map_err(said("have mounts of one's own"))?;
        mount(None, Path::new("/"), libc::MS_PRIVATE | libc::MS_REC)
            .map_err(said("keep mounts to oneself"))?;
        mount(Some(c"tmpfs"), path, 0).map_err(said("mount a disk in memory"))?;
        Ok(Disk { path: path.to_owned() })
    }

    /// Takes all room but so many bytes, until [`Disk::empty`].
    pub(crate) fn fill(&self, leave: u64) -> Result<()> {
        let io = |e: std::io::Error| Error::io("fill", &self.ballast(), &e);
        let free = statvfs(&self.path).map_err(|e| io(e.into()))?;
        let room = (free.f_bavail * free.f_frsize).saturating_sub(leave);
        match fs::write(self.ballast(), vec![0_u8; room as usize]) {
            // The run wrote meanwhile: it is full all the same.
            Err(e) if e.kind() == std::io::ErrorKind::StorageFull => Ok(()),
            written => written.map_err(io),
        }
    }

    /// Gives the room back.
    pub(crate) fn empty(&self) -> Result<()> {
        fs::remove_file(self.ballast()).map_err(|e| Error::io("remove", &self.ballast(), &e))
    }

    /// Lets nobody write, or again.
    pub(crate) fn set_read_only(&self, is_read_only: bool) -> Result<()> {
        let flags = libc::MS_REMOUNT | if is_read_only { libc::MS_RDONLY } else { 0 };
        let mut tried = Ok(());
        for _ in 0..TRIES {
            tried = mount(Some(c"tmpfs"), &self.path, flags);
            if !matches!(&tried, Err(e) if Errno::from_io_error(e) == Some(Errno::BUSY)) {
                break;
            }
            std::thread::sleep(BETWEEN_TRIES);
        }
        tried.map_err(|e| Error::io("remount", &self.path, &e))
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let Ok(path) = CString::new(self.path.as_os_str().as_bytes()) else { return };
        // SAFETY: a plain system call. It fails where the disk is gone, and ends with this process in any case.
        let _ = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Mounts a file system of `kind` at `path`, or changes what is mounted there.
fn mount(kind: Option<&CStr>, path: &Path, flags: libc::c_ulong) -> std::io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let kind = kind.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: strings that end in a zero and outlive the call, or null where the kernel takes it.
    checked(unsafe { libc::mount(kind, path.as_ptr(), kind, flags, SIZE.as_ptr().cast()) })
}

fn checked(returned: libc::c_int) -> std::io::Result<()> {
    if returned == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_read_only_and_gone() {
        let path = std::env::temp_dir().join(format!("phalanx-chaos-disk-{}", std::process::id()));
        match Disk::mount(&path) {
            Err(why) => eprintln!("no disk of one's own here: {why}"),
            Ok(disk) => {
                let file = path.join("file");
                disk.fill(1 << 20).unwrap();
                assert!(fs::write(&file, vec![0; 2 << 20]).is_err(), "full");
                disk.empty().unwrap();
                fs::write(&file, vec![0; 2 << 20]).unwrap();
                disk.set_read_only(true).unwrap();
                assert!(fs::write(&file, "x").is_err(), "read-only");
                disk.set_read_only(false).unwrap();
                fs::write(&file, "x").unwrap();
                drop(disk);
                assert!(!file.exists(), "gone with the disk");
            }
        }
        fs::remove_dir_all(&path).unwrap();
    }
}
