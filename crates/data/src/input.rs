//! Reading text: which files a list of paths names, and their contents as bounded pieces.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use spec::{Error, Result};

use crate::glob::{entries, expand, has_wildcards};
use crate::pieces::{cut, pieces};

/// A file to read.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) path: Arc<Path>,
    pub(crate) bytes: u64,
}

/// Part of a document on its way to the tokenizer.
pub(crate) struct Item {
    pub(crate) body: Body,
    /// Whether the document ends with this part.
    pub(crate) ends_document: bool,
    /// Bytes of the file that this part stands for.
    pub(crate) source_bytes: u64,
}

pub(crate) enum Body {
    Text(String),
    /// One line of JSONL, parsed by whoever encodes it.
    JsonLine {
        bytes: Vec<u8>,
        path: Arc<Path>,
        line: u64,
    },
    /// Bytes of a file that was left out, for the progress.
    Nothing,
}

/// Inputs that were left out, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Files that are not UTF-8.
    pub not_utf8: u64,
    /// Files or lines without text.
    pub empty: u64,
    /// Files that could not be read.
    pub unreadable: u64,
    /// What was wrong with the first unreadable ones.
    pub messages: Vec<String>,
}

/// Messages kept about unreadable files; the rest is counted.
const MAX_MESSAGES: usize = 20;
/// A file up to this size is read at once; a larger one is read twice, first to see that it is UTF-8.
const WHOLE_FILE_BYTES: u64 = 4 << 20;
/// A document in JSONL must fit in memory; a longer line is a file of another kind.
const MAX_LINE_BYTES: u64 = 256 << 20;

/// The files that `paths` (files, directories, patterns) name, in order; directories sorted by path.
pub(crate) fn resolve(paths: &[PathBuf]) -> Result<Vec<Input>> {
    let mut found = Vec::new();
    for path in paths {
        let before = found.len();
        if has_wildcards(path) {
            found.extend(expand(path)?);
        } else if path.is_dir() {
            walk(path, &mut found)?;
        } else {
            File::open(path).map_err(|e| Error::io("open", path, &e).hint("check the path of the text"))?;
            found.push(path.clone());
        }
        if found.len() == before {
            return Err(Error::user(format!("no file in or matching {}", path.display()))
                .hint("check the path of the text"));
        }
    }
    Ok(found
        .into_iter()
        .map(|path| Input { bytes: path.metadata().map_or(0, |m| m.len()), path: path.into() })
        .collect())
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for (path, is_dir) in entries(directory)? {
        if is_dir {
            walk(&path, found)?;
        } else if path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

/// Reads inputs one after another and hands their parts to `emit`, until that returns false.
pub(crate) struct Reader<F> {
    pub(crate) emit: F,
    /// Cut documents of plain text near this many bytes.
    pub(crate) document_bytes: u64,
    /// Size of the parts of a text.
    pub(crate) piece_bytes: usize,
    pub(crate) skipped: Skipped,
}

/// Why a file's reading stopped.
enum Stop {
    Error(Error),
    NotUtf8,
    Unreadable(std::io::Error),
    /// The receiver wants no more.
    Closed,
}

impl<F: FnMut(Item) -> bool> Reader<F> {
    /// Reads all; files that are not text or cannot be read are counted and left out.
    pub(crate) fn read_all(&mut self, inputs: &[Input]) -> Result<()> {
        for input in inputs {
            let is_jsonl =
                matches!(input.path.extension().and_then(|e| e.to_str()), Some("jsonl" | "ndjson"));
            let outcome = if is_jsonl { self.read_lines(input) } else { self.read_text(input) };
            match outcome {
                Ok(()) => {}
                Err(Stop::Error(error)) => return Err(error),
                Err(Stop::Closed) => return Ok(()),
                Err(Stop::NotUtf8) => {
                    self.skipped.not_utf8 += 1;
                    self.leave_out(input);
                }
                Err(Stop::Unreadable(error)) => {
                    self.skipped.unreadable += 1;
                    if self.skipped.messages.len() < MAX_MESSAGES {
                        self.skipped.messages.push(format!("{}: {error}", input.path.display()));
                    }
                    self.leave_out(input);
                }
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, input: &Input) {
        (self.emit)(Item { body: Body::Nothing, ends_document: false, source_bytes: input.bytes });
    }

    fn read_text(&mut self, input: &Input) -> Result<(), Stop> {
        let mut file = File::open(&input.path).map_err(Stop::Unreadable)?;
        if input.bytes <= WHOLE_FILE_BYTES {
            let mut bytes = Vec::with_capacity(input.bytes as usize + 1);
            file.read_to_end(&mut bytes).map_err(Stop::Unreadable)?;
            let text = std::str::from_utf8(&bytes).map_err(|_| Stop::NotUtf8)?;
            return self.emit_text(text);
        }
        stream_text(&mut file, |text, _| Ok(text.len()))?;
        self.stream_pieces(input).map_err(|stop| match stop {
            // Part of the document is already on its way, so the file can no longer be left out.
            Stop::NotUtf8 | Stop::Unreadable(_) => Stop::Error(Error::failure(format!(
                "read {}: the file changed while it was read",
                input.path.display()
            ))),
            stop => stop,
        })
    }

    /// Reads a large file that was found to be text.
    fn stream_pieces(&mut self, input: &Input) -> Result<(), Stop> {
        let mut file = File::open(&input.path).map_err(Stop::Unreadable)?;
        let target = self.target_bytes();
        let mut in_document = 0;
        stream_text(&mut file, |text, is_last| {
            let mut used = 0;
            // A cut may look two targets ahead; with less in hand it would depend on the block's size.
            while used < text.len() && (is_last || text.len() - used > 2 * target + 8) {
                let end = used + cut(&text[used..], target);
                let last = is_last && end == text.len();
                self.emit_piece(&text[used..end], last, &mut in_document)?;
                used = end;
            }
            Ok(used)
        })
    }

    fn emit_text(&mut self, text: &str) -> Result<(), Stop> {
        if text.is_empty() {
            self.skipped.empty += 1;
        }
        let mut in_document = 0;
        let mut left = text.len();
        for piece in pieces(text, self.target_bytes()) {
            left -= piece.len();
            self.emit_piece(piece, left == 0, &mut in_document)?;
        }
        Ok(())
    }

    fn emit_piece(&mut self, piece: &str, is_last: bool, in_document: &mut u64) -> Result<(), Stop> {
        *in_document += piece.len() as u64;
        let ends_document = is_last || *in_document >= self.document_bytes;
        if ends_document {
            *in_document = 0;
        }
        self.send(Item {
            body: Body::Text(piece.to_owned()),
            ends_document,
            source_bytes: piece.len() as u64,
        })
    }

    fn target_bytes(&self) -> usize {
        self.document_bytes.clamp(1, self.piece_bytes as u64) as usize
    }

    fn read_lines(&mut self, input: &Input) -> Result<(), Stop> {
        let file = File::open(&input.path).map_err(Stop::Unreadable)?;
        let mut lines = BufReader::with_capacity(1 << 20, file);
        for line in 1.. {
            let mut bytes = Vec::new();
            let read =
                (&mut lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes).map_err(Stop::Unreadable)?;
            let source_bytes = read as u64;
            if read == 0 {
                break;
            }
            if source_bytes == MAX_LINE_BYTES {
                return Err(Stop::Error(
                    Error::user(format!(
                        "{}:{line}: a line of more than {} MiB",
                        input.path.display(),
                        MAX_LINE_BYTES >> 20
                    ))
                    .hint("JSONL has one object per line, with the document in its text field"),
                ));
            }
            if bytes.trim_ascii().is_empty() {
                continue;
            }
            let body = Body::JsonLine { bytes, path: input.path.clone(), line };
            self.send(Item { body, ends_document: true, source_bytes })?;
        }
        Ok(())
    }

    fn send(&mut self, item: Item) -> Result<(), Stop> {
        if (self.emit)(item) { Ok(()) } else { Err(Stop::Closed) }
    }
}

/// Reads a file block by block; `take` gets the text at hand and whether it is the last, and says how much it used.
fn stream_text(file: &mut File, mut take: impl FnMut(&str, bool) -> Result<usize, Stop>) -> Result<(), Stop> {
    let mut buffer = Vec::new();
    loop {
        let read = file.take(1 << 20).read_to_end(&mut buffer).map_err(Stop::Unreadable)?;
        let (text, is_last) = match (std::str::from_utf8(&buffer), read) {
            (Ok(text), read) => (text, read == 0),
            // A character cut by the block's end is completed by the next block, unless there is none.
            (Err(e), read) if e.error_len().is_none() && read > 0 => {
                (std::str::from_utf8(&buffer[..e.valid_up_to()]).unwrap_or_default(), false)
            }
            _ => return Err(Stop::NotUtf8),
        };
        let used = take(text, is_last)?;
        buffer.drain(..used);
        if is_last {
            return Ok(());
        }
    }
}
