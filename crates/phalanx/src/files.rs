//! Text files that people name.

use std::path::Path;

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
pub(crate) fn catalog(files: &[std::path::PathBuf]) -> Result<Catalog> {
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

/// Writes a file whole.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)
        .map_err(|e| Error::io("write", path, &e).hint("name a writable file, with free space"))
}
