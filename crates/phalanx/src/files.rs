//! Text files that people name.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use plan::calibration::Calibration;
use spec::{Catalog, Error, Result};

/// Larger than any table, catalogue or configuration; keeps an endless file from filling memory.
const BYTES_MAX: u64 = 64 << 20;

/// The text of a file, without a byte-order mark.
///
/// # Errors
/// If it cannot be read, is not text, or is larger than a table or configuration can be.
pub(crate) fn read(path: &Path) -> Result<String> {
    let io = |e| Error::io("read", path, &e).hint("name a readable file");
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    let path = path.display();
    if bytes.len() as u64 > BYTES_MAX {
        return Err(Error::user(format!("read {path}: larger than {} MiB", BYTES_MAX >> 20))
            .hint("name a configuration or table, not a file of weights or data"));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::user(format!("read {path}: not text: byte {at} is no UTF-8"))
            .hint("name a text file; save it as UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
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
