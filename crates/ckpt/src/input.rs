//! Files that somebody else wrote: never waited on where they are no files, and read without believing their size.

use std::fs::{File, FileType, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use spec::{Error, Result};

/// Bytes of a text read at a time.
const READ_BYTES: usize = 1 << 16;

/// What stands at the start of the text that Git keeps in place of a large file.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Opens a regular file; links are followed.
///
/// # Errors
/// When it is not there or is not a file: opening a pipe would wait for somebody who writes to it.
pub(crate) fn open(doing: &str, path: &Path) -> Result<File> {
    let io = |e| Error::io(doing, path, &e);
    let refuse = |kind| {
        Err(Error::user(format!("{doing} {}: it is {}, expected a regular file", path.display(), what(kind)))
            .hint("put the file itself there"))
    };
    let kind = path.metadata().map_err(io)?.file_type();
    if !kind.is_file() {
        return refuse(kind);
    }
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(io)?;
    // Somebody may have put something else there since.
    let kind = file.metadata().map_err(io)?.file_type();
    if kind.is_file() { Ok(file) } else { refuse(kind) }
}

fn what(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// Reads a text file of at most `max_bytes`, allocating as bytes arrive.
///
/// # Errors
/// As [`open`]; when it is too long, holds a NUL byte (a hole in a file reads as those), or is a Git LFS pointer.
pub(crate) fn read_text(doing: &str, path: &Path, max_bytes: usize) -> Result<String> {
    let mut file = open(doing, path)?;
    let (mut text, mut staging) = (Vec::new(), vec![0; READ_BYTES]);
    let wrong = |why: String| Error::user(format!("{doing} {}: {why}", path.display()));
    loop {
        let n = match file.read(&mut staging) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io(doing, path, &e)),
        };
        if staging[..n].contains(&0) {
            return Err(wrong("it is not text, it holds NUL bytes".into()));
        }
        if text.len() + n > max_bytes {
            return Err(wrong(format!("it is longer than {max_bytes} bytes")));
        }
        text.extend_from_slice(&staging[..n]);
    }
    if text.starts_with(LFS_POINTER) {
        return Err(lfs_pointer(path));
    }
    String::from_utf8(text)
        .map_err(|e| wrong(format!("it is not UTF-8 from byte {} on", e.utf8_error().valid_up_to())))
}

/// Whether a file begins as a Git LFS pointer does.
pub(crate) fn is_lfs_pointer(file: &File) -> bool {
    let mut start = [0; LFS_POINTER.len()];
    file.read_exact_at(&mut start, 0).is_ok() && start == LFS_POINTER
}

pub(crate) fn lfs_pointer(path: &Path) -> Error {
    Error::user(format!("{} is a Git LFS pointer, not the file that it stands for", path.display()))
        .hint("run `git lfs pull` in the repository that it was cloned from, or download the file itself")
}

/// A name out of a file as a message shows it: of bearable length, without line ends and control characters.
pub(crate) fn shown(name: &str) -> String {
    const SHOWN: usize = 120;
    let text: String = name.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    // Quotes are harmless.
    let text = text.replace("\\\"", "\"").replace("\\'", "'");
    if name.chars().count() > SHOWN { text + "..." } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[track_caller]
    fn check(path: &Path, expected: &str) {
        let error = read_text("read", path, 1 << 20).expect_err("refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn what_is_no_text_file_is_named_and_not_waited_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        mknodat(CWD, path("pipe"), FileType::Fifo, Mode::from_bits_truncate(0o600), 0).unwrap();
        check(&path("pipe"), "pipe: it is a named pipe, expected a regular file");
        check(dir.path(), "it is a directory");
        check(Path::new("/dev/zero"), "it is a device");
        check(&path("gone"), "gone");
        std::fs::write(path("long"), "x".repeat((1 << 20) + 1)).unwrap();
        check(&path("long"), "it is longer than 1048576 bytes");
        File::create(path("hole")).unwrap().set_len(1 << 40).unwrap();
        check(&path("hole"), "it holds NUL bytes");
        std::fs::write(path("latin"), b"caf\xe9").unwrap();
        check(&path("latin"), "not UTF-8 from byte 3 on");
        std::fs::write(path("pointer"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
            .unwrap();
        check(&path("pointer"), "pointer is a Git LFS pointer");
        std::fs::write(path("good"), "text").unwrap();
        assert_eq!(read_text("read", &path("good"), 4).unwrap(), "text");
    }

    #[test]
    fn names_are_shown_without_control_characters() {
        assert_eq!(shown("a.\"b\" ü"), "a.\"b\" ü");
        assert_eq!(shown("a\u{1b}[2J\nerror: x"), "a\\u{1b}[2J\\nerror: x");
        assert_eq!(shown(&"é".repeat(121)), "é".repeat(120) + "...");
    }
}
