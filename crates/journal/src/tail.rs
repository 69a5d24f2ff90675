//! Follows a journal that may be growing, cut, replaced or gone, in bounded memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::line::{Line, SPANS, parse, spans_step};
use crate::read::{is_file, open_file};
use crate::record::Record;

/// Read at once.
const BLOCK_BYTES: usize = 256 << 10;

/// Lines beyond this are not kept in memory: only spans are so long, and those are parsed when they are looked at.
const LINE_BYTES_MAX: usize = 4 << 20;

/// A line and where it lies.
#[derive(Debug)]
pub struct Found {
    /// Offset of its first byte.
    pub offset: u64,
    /// Bytes with the newline.
    pub len: u64,
    /// What it says.
    pub line: Line,
}

/// How a look at the file ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// All whole lines were read.
    AtEnd,
    /// There is more: the budget was spent.
    More,
    /// The file is another than before, or shorter than what was read of it: what it said no longer counts. The next look
    /// begins at its start.
    Restarted,
    /// There is no file.
    Gone,
}

/// A journal being followed.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    open: Option<Open>,
    /// Bytes that are read of a file before it is followed from there; all of it if absent.
    back_bytes: Option<u64>,
    block: Vec<u8>,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Device and inode: what tells files of one name apart.
    id: (u64, u64),
    /// Where the next line begins.
    offset: u64,
    /// Length of the file when no whole line was found in its rest.
    seen_len: u64,
}

impl Tail {
    /// Follows the file from its start.
    pub fn whole(path: PathBuf) -> Tail {
        Tail { path, open: None, back_bytes: None, block: Vec::new() }
    }

    /// Follows the file from the first line that begins in its last `back_bytes`.
    pub fn end(path: PathBuf, back_bytes: u64) -> Tail {
        Tail { back_bytes: Some(back_bytes), ..Tail::whole(path) }
    }

    /// Which file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes read so far and bytes there are.
    pub fn progress(&self) -> (u64, u64) {
        let Some(open) = &self.open else { return (0, 0) };
        (open.offset, open.file.metadata().map_or(open.offset, |m| m.len()))
    }

    /// Gives whole lines that were not given before, about `budget_bytes` of them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn look(&mut self, budget_bytes: u64, each: &mut dyn FnMut(Found)) -> io::Result<Look> {
        let meta = match std::fs::metadata(&self.path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let was_open = self.open.take().is_some();
                return Ok(if was_open { Look::Restarted } else { Look::Gone });
            }
            Err(e) => return Err(e),
        };
        is_file(&meta)?;
        let id = (meta.dev(), meta.ino());
        if self.open.as_ref().is_some_and(|open| open.id != id || meta.len() < open.offset) {
            self.open = None;
            return Ok(Look::Restarted);
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let file = File::open(&self.path)?;
                let offset = match self.back_bytes {
                    Some(back) => next_line(&file, meta.len().saturating_sub(back))?,
                    None => 0,
                };
                self.open.insert(Open { file, id, offset, seen_len: 0 })
            }
        };
        if meta.len() == open.seen_len {
            return Ok(Look::AtEnd);
        }
        let until = open.offset.saturating_add(budget_bytes).min(meta.len());
        while open.offset < until {
            if !open.lines(&mut self.block, each)? {
                open.seen_len = meta.len();
                return Ok(Look::AtEnd);
            }
        }
        Ok(if open.offset < meta.len() { Look::More } else { Look::AtEnd })
    }
}

impl Open {
    /// Gives the whole lines of a block, or one line that is longer; false if there is none.
    fn lines(&mut self, block: &mut Vec<u8>, each: &mut dyn FnMut(Found)) -> io::Result<bool> {
        let mut filled = 0;
        while filled < LINE_BYTES_MAX {
            block.resize(filled + BLOCK_BYTES, 0);
            let n = read_at(&self.file, &mut block[filled..], self.offset + filled as u64)?;
            let whole = block[filled..filled + n].iter().rposition(|b| *b == b'\n').map(|at| filled + at + 1);
            if let Some(whole) = whole {
                self.give(&block[..whole], each);
                return Ok(true);
            }
            filled += n;
            if n < BLOCK_BYTES {
                return Ok(false);
            }
        }
        let Some(len) = self.long_line(block)? else { return Ok(false) };
        let line = match spans_step(block).filter(|_| block.starts_with(SPANS)) {
            Some(step) => Line::Spans { step },
            None => Line::Damaged("longer than any record".to_owned()),
        };
        each(Found { offset: self.offset, len, line });
        self.offset += len;
        Ok(true)
    }

    fn give(&mut self, lines: &[u8], each: &mut dyn FnMut(Found)) {
        for text in lines.split_inclusive(|b| *b == b'\n') {
            each(Found { offset: self.offset, len: text.len() as u64, line: parse(text) });
            self.offset += text.len() as u64;
        }
    }

    /// Length of the line that begins here and whose first bytes are in `head`, with its newline; none if it has no end.
    fn long_line(&self, head: &[u8]) -> io::Result<Option<u64>> {
        let mut block = vec![0; BLOCK_BYTES];
        let mut len = head.len() as u64;
        loop {
            let n = read_at(&self.file, &mut block, self.offset + len)?;
            if let Some(at) = block[..n].iter().position(|b| *b == b'\n') {
                return Ok(Some(len + at as u64 + 1));
            }
            if n == 0 {
                return Ok(None);
            }
            len += n as u64;
        }
    }
}

/// Step records at about `count` even places of a file: what its curves look like before all of it was read.
///
/// # Errors
/// When it cannot be read.
pub fn sample(path: &Path, count: u64) -> io::Result<Vec<Record>> {
    /// Lines other than steps stand between them, and a few fit in here.
    const NEAR_BYTES: usize = 4 << 10;
    let file = open_file(path)?;
    let len = file.metadata()?.len();
    let mut block = vec![0; NEAR_BYTES];
    let mut found = Vec::new();
    let mut read_to = 0;
    for i in 0..count {
        let at = (len as u128 * u128::from(i) / u128::from(count)) as u64;
        if at < read_to {
            continue;
        }
        let n = read_at(&file, &mut block, at)?;
        let mut offset = at;
        for (i, line) in block[..n].split_inclusive(|b| *b == b'\n').enumerate() {
            offset += line.len() as u64;
            if (i > 0 || at == 0)
                && line.ends_with(b"\n")
                && line.starts_with(b"{\"kind\":\"step\"")
                && let Line::Record(record) = parse(line)
            {
                found.push(record);
                read_to = offset;
                break;
            }
        }
    }
    Ok(found)
}

/// The step records in `offset..end` of a file, and what else is there, line by line.
///
/// # Errors
/// When it cannot be read.
pub fn lines_between(path: &Path, offset: u64, end: u64, each: &mut dyn FnMut(Found)) -> io::Result<()> {
    let file = open_file(path)?;
    let mut open = Open { file, id: (0, 0), offset, seen_len: 0 };
    let mut block = Vec::new();
    while open.offset < end
        && open.lines(&mut block, &mut |found| {
            if found.offset < end {
                each(found)
            }
        })?
    {}
    Ok(())
}

/// Where the first line begins at or after `at`.
fn next_line(file: &File, at: u64) -> io::Result<u64> {
    if at == 0 {
        return Ok(0);
    }
    let mut block = vec![0; BLOCK_BYTES];
    // The byte before may be the newline that ends the line before.
    let mut offset = at - 1;
    loop {
        let n = read_at(file, &mut block, offset)?;
        if let Some(found) = block[..n].iter().position(|b| *b == b'\n') {
            return Ok(offset + found as u64 + 1);
        }
        if n == 0 {
            return Ok(offset);
        }
        offset += n as u64;
    }
}

/// Fills as much of `into` as the file has.
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match file.read_at(&mut into[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests;
