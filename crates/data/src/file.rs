//! Files that people name, of which nothing is believed: they are regular files, read as far as their bytes go.

use std::fs::{File, FileType, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, SeekFrom, seek};
use spec::{Error, Result};

use crate::token_type::TokenType;

/// Of a file with holes, at least one byte in so many must be there: compressing filesystems leave out zeros too.
const SPARSE_MAX: u64 = 16;
/// Bytes decoded at a time, on the stack: reading a sample allocates nothing.
const DECODE_BYTES: usize = 4 << 10;

/// Opens a regular file; a pipe, a device or a directory is refused by name instead of being waited for.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let io = |e| Error::io("open", path, &e);
    // Without it, opening a pipe waits for somebody to write; regular files do not know it.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    match special(metadata.file_type()) {
        None => Ok((file, metadata.len())),
        Some(what) => Err(Error::user(format!("{} is {what}, expected a file", path.display()))
            .hint("name a file; what comes through a pipe is to be written to a file first")),
    }
}

/// What else than a regular file it is.
fn special(kind: FileType) -> Option<&'static str> {
    match kind {
        k if k.is_file() => None,
        k if k.is_dir() => Some("a directory"),
        k if k.is_fifo() => Some("a pipe"),
        k if k.is_socket() => Some("a socket"),
        _ => Some("a device"),
    }
}

/// The bytes of a file of at most `max_bytes`, gathered as they come.
pub(crate) fn read_small(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let (file, found) = open(path)?;
    let mut bytes = Vec::new();
    if found <= max_bytes {
        file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, &e))?;
    }
    if found.max(bytes.len() as u64) > max_bytes {
        return Err(Error::user(format!(
            "{}: {} MiB, more than such a file can have ({} MiB)",
            path.display(),
            found >> 20,
            max_bytes >> 20
        ))
        .hint("check which file the path names"));
    }
    Ok(bytes)
}

/// A file of tokens or of their index, read at given places.
///
/// It is read, not mapped: a file that another process cuts short gives an error here, where a mapping would end the
/// process with SIGBUS.
pub(crate) struct TokenFile {
    file: File,
    path: PathBuf,
    bytes: u64,
}

impl TokenFile {
    /// Opens a file that has something in it, and not only holes.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let (file, bytes) = open(path)?;
        if bytes == 0 {
            return Err(Error::user(format!("{}: empty file", path.display())));
        }
        let there = file.metadata().map_err(|e| Error::io("inspect", path, &e))?.blocks() * 512;
        let file = TokenFile { file, path: path.to_path_buf(), bytes };
        if there.saturating_mul(SPARSE_MAX) < bytes
            && let Some(hole) = file.first_hole()
        {
            return Err(Error::user(format!(
                "{}: {bytes} bytes, of which about {there} are there: nothing was ever written from byte {hole} on",
                path.display()
            ))
            .hint("copy or build it again: a copy was probably cut off"));
        }
        Ok(file)
    }

    /// The first place that was never written, where the filesystem tells.
    pub(crate) fn first_hole(&self) -> Option<u64> {
        seek(&self.file, SeekFrom::Hole(0)).ok().filter(|&at| at < self.bytes)
    }

    /// Bytes in the file when it was opened.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `out` with the bytes from `from` on.
    pub(crate) fn read_at(&self, from: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, from).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => {
                let now = self.file.metadata().map_or(0, |m| m.len());
                Error::failure(format!(
                    "{} was cut short while it was in use: {} bytes when it was opened, {now} now",
                    self.path.display(),
                    self.bytes
                ))
                .hint("put the whole file back and continue from the last checkpoint")
            }
            _ => Error::io("read", &self.path, &e),
        })
    }

    /// Fills `out` with the tokens from byte `from` on.
    pub(crate) fn read_tokens(&self, kind: TokenType, mut from: u64, out: &mut [u32]) -> Result<()> {
        let mut stored = [0; DECODE_BYTES];
        for part in out.chunks_mut(DECODE_BYTES / kind.size()) {
            let stored = &mut stored[..part.len() * kind.size()];
            self.read_at(from, stored)?;
            kind.decode(stored, part);
            from += stored.len() as u64;
        }
        Ok(())
    }
}
