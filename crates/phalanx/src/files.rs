//! Text files that people name.

use std::path::{Path, PathBuf};

use plan::calibration::Calibration;
use spec::{Catalog, Error, Result};

/// The text of a file, without a byte-order mark.
///
/// # Errors
/// As [`train::read`].
pub(crate) fn read(path: &Path) -> Result<String> {
    train::read(path).map_err(|e| e.hint("name a readable file"))
}

/// The built-in catalogue with the user's files over it.
pub(crate) fn catalog(files: &[PathBuf]) -> Result<Catalog> {
    let texts: Vec<(String, String)> =
        files.iter().map(|p| Ok((p.display().to_string(), read(p)?))).collect::<Result<_>>()?;
    let pairs: Vec<(&str, &str)> = texts.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
    Catalog::with_files(&pairs)
}

/// The user's calibration, or the built-in one.
pub(crate) fn calibration(file: Option<&Path>) -> Result<Calibration> {
    match file {
        Some(path) => Calibration::parse(&path.display().to_string(), &read(path)?),
        None => Calibration::builtin(),
    }
}

/// Writes a file that `flag` names, whole or not at all; a device or a pipe as it comes.
pub(crate) fn write(flag: &str, path: &Path, text: &str) -> Result<()> {
    if path.exists() && !path.is_file() && !path.is_dir() {
        return std::fs::write(path, text)
            .map_err(|e| Error::io("write", path, &e).hint("name a writable file, with free space"));
    }
    Pending::create(flag, path)?.commit(text)
}

/// A file that appears whole or not at all: written beside its place and moved there.
pub(crate) struct Pending {
    path: PathBuf,
    beside: PathBuf,
    file: Option<std::fs::File>,
}

impl Pending {
    /// Makes sure that the file can be written, before any work is done for it.
    ///
    /// # Errors
    /// If it cannot: the user's fault, unless the disk is full.
    pub(crate) fn create(flag: &str, path: &Path) -> Result<Self> {
        let hint = format!("name a writable file with {flag}, in a folder that is there");
        let refused = |what: String| Error::user(what).hint(hint.clone());
        // Through a link to what it names; a file that is not there yet is its own name.
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if path.exists() && !path.is_file() {
            return Err(refused(format!("{flag} {}: there is something that is no file", path.display())));
        }
        let Some(name) = path.file_name() else {
            return Err(refused(format!("{flag} {}: no name of a file", path.display())));
        };
        let beside = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
        let file = std::fs::File::create_new(&beside).map_err(|e| match e.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Error::io("write", &path, &e).hint("free space there")
            }
            _ => refused(format!("write {}: {e}", path.display())),
        })?;
        Ok(Pending { path, beside, file: Some(file) })
    }

    /// Writes the file and moves it to its place.
    ///
    /// # Errors
    /// If it cannot, a full disk among others; what was there before is still there then.
    pub(crate) fn commit(mut self, text: &str) -> Result<()> {
        use std::io::Write as _;
        let failed = |e: std::io::Error| {
            Error::io("write", &self.path, &e).hint("name a writable file, on a disk with free space")
        };
        let mut file = self.file.take().ok_or_else(|| Error::failure("the file is closed"))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&self.beside, &self.path).map_err(failed)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Gone already where it was moved to its place.
        let _ = std::fs::remove_file(&self.beside);
    }
}
