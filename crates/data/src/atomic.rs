//! Files appear whole or not at all: written under a temporary name, synced, renamed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use spec::{Error, Result};

/// A file under a temporary name beside its destination; dropped without [`Pending::commit`], it is removed.
pub(crate) struct Pending {
    file: Option<File>,
    temporary: PathBuf,
    destination: PathBuf,
}

impl Pending {
    pub(crate) fn create(destination: &Path) -> Result<Pending> {
        if let Some(parent) = parent(destination) {
            fs::create_dir_all(parent).map_err(|e| Error::io("create directory", parent, &e))?;
        }
        let temporary = temporary_name(destination);
        let file = File::create_new(&temporary).map_err(|e| Error::io("create", &temporary, &e))?;
        Ok(Pending { file: Some(file), temporary, destination: destination.to_path_buf() })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(file) = &mut self.file else {
            return Err(Error::failure(format!("write {}: already closed", self.destination.display())));
        };
        file.write_all(bytes).map_err(|e| write_failed(&self.destination, &e))
    }

    /// Makes the bytes durable; the destination is not there yet.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if let Some(file) = self.file.take() {
            file.sync_all().map_err(|e| write_failed(&self.destination, &e))?;
        }
        Ok(())
    }

    /// Syncs, then puts the file at its destination, replacing what was there.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.sync()?;
        fs::rename(&self.temporary, &self.destination)
            .map_err(|e| Error::io("rename into place", &self.destination, &e))?;
        sync_directory(&self.destination);
        Ok(())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.file = None;
        // After a commit the name is gone and this finds nothing.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Writes a small file in one go.
pub(crate) fn write_file(destination: &Path, bytes: &[u8]) -> Result<()> {
    let mut pending = Pending::create(destination)?;
    pending.write(bytes)?;
    pending.commit()
}

/// A name in the same directory that no other process or thread of this machine uses.
pub(crate) fn temporary_name(destination: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = OsString::from(".");
    name.push(destination.file_name().unwrap_or_default());
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}{}-{next}.tmp", machine(), std::process::id()));
    destination.with_file_name(name)
}

/// The machine in temporary names, since a directory may be shared between several: no dot in it, and a `-` after it.
pub(crate) fn machine() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host.trim().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("{host}-")
}

/// Makes a rename durable where the filesystem lets a directory be synced; elsewhere there is nothing to do.
pub(crate) fn sync_directory(inside: &Path) {
    if let Some(parent) = parent(inside)
        && let Ok(directory) = File::open(parent)
    {
        let _ = directory.sync_all();
    }
}

fn parent(path: &Path) -> Option<&Path> {
    path.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p })
}

fn write_failed(destination: &Path, error: &std::io::Error) -> Error {
    let e = Error::io("write", destination, error);
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            e.hint("free some space or choose another output directory; nothing half-written was left")
        }
        _ => e,
    }
}
