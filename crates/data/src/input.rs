//! Reading text: which files a list of paths names, and their contents as bounded pieces.

use std::fs::File;
use std::io::{self, BufRead, Cursor, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use spec::{Error, Result};

use crate::file::open;
use crate::glob::{entries, expand, has_wildcards};
use crate::json::{Broken, DOCUMENT_BYTES_MAX, Shape, Values};
use crate::opened::{BLOCK_BYTES, Opened};
use crate::packed::Packing;
use crate::pieces::Cut;
use crate::skipped::Skipped;

/// A file to read.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub(crate) path: Arc<Path>,
    pub(crate) bytes: u64,
    /// Named by the user, rather than found in a folder or by a pattern.
    pub(crate) is_named: bool,
}

/// Part of a document on its way to the tokenizer.
pub(crate) struct Item {
    pub(crate) body: Body,
    /// Whether the document ends with this part.
    pub(crate) ends_document: bool,
    /// Bytes of the file that this part stands for.
    pub(crate) source_bytes: u64,
    /// The same after unpacking.
    pub(crate) text_bytes: u64,
}

pub(crate) enum Body {
    Text(String),
    /// One document in JSON, parsed by whoever encodes it.
    Json {
        bytes: Vec<u8>,
        path: Arc<Path>,
        line: u64,
        /// Whether the document may be a bare string.
        strings: bool,
    },
    /// Bytes of a file that was left out, for the progress.
    Nothing,
}

/// How documents in text are described.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextOptions {
    /// The field of a JSON object that holds the text; `text` where `None`.
    pub field: Option<String>,
    /// Leaves JSON documents out that cannot be read, and counts them, instead of stopping at the first.
    pub skip_bad: bool,
    /// The token that ends a document; the tokenizer's own where `None`.
    pub end: Option<String>,
}

impl TextOptions {
    /// The field that holds the text.
    pub fn field(&self) -> &str {
        self.field.as_deref().unwrap_or("text")
    }

    /// Tells options apart that make other tokens; `None` for the usual ones.
    pub(crate) fn key(&self) -> Option<String> {
        (*self != TextOptions::default()).then(|| format!("{self:?}"))
    }
}

/// A file up to this size is read at once; a larger one is read twice, first to see that it is UTF-8.
const WHOLE_FILE_BYTES: u64 = 4 << 20;

/// The files that `paths` (files, directories, patterns) name, in order; directories sorted by path.
pub(crate) fn resolve(paths: &[PathBuf]) -> Result<Vec<Input>> {
    let mut found = Vec::new();
    for path in paths {
        let mut files = Vec::new();
        let mut is_named = false;
        if has_wildcards(path) {
            files.extend(expand(path)?);
        } else if path.is_dir() {
            walk(path, &mut files)?;
        } else {
            let (file, _) = open(path).map_err(|e| e.hint("check the path of the text"))?;
            refuse_foreign(&file, path)?;
            is_named = true;
            files.push(path.clone());
        }
        if files.is_empty() {
            return Err(Error::user(format!("no file in or matching {}", path.display()))
                .hint("check the path of the text"));
        }
        found.extend(files.into_iter().map(|path| Input {
            bytes: path.metadata().map_or(0, |m| m.len()),
            path: path.into(),
            is_named,
        }));
    }
    Ok(found)
}

fn refuse_foreign(file: &File, path: &Path) -> Result<()> {
    let mut start = [0; 8];
    let read = file.read_at(&mut start, 0).map_err(|e| Error::io("read", path, &e))?;
    match Packing::of(&start[..read]) {
        Packing::Foreign(what, hint) => {
            Err(Error::user(format!("{} is {what}, which is not read", path.display())).hint(hint))
        }
        _ => Ok(()),
    }
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for (path, is_dir) in entries(directory)? {
        if is_dir {
            walk(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// Refuses a field that was asked for where no input has fields.
pub(crate) fn check_field(inputs: &[Input], options: &TextOptions) -> Result<()> {
    let Some(field) = &options.field else { return Ok(()) };
    let is_json = |input: &Input| Opened::open(input, field).is_ok_and(|o| o.shape != Shape::Text);
    if inputs.iter().any(is_json) {
        return Ok(());
    }
    Err(Error::user(format!("field {field:?} was asked for, but no input is JSON with such a field"))
        .hint("leave --field (data.field) out for plain text, or give JSON lines or a JSON array of objects that have it"))
}

/// Reads inputs one after another and hands their parts to `emit`, until that returns false.
pub(crate) struct Reader<'a, F> {
    pub(crate) emit: F,
    /// How plain text is cut.
    pub(crate) cut: Cut,
    pub(crate) options: &'a TextOptions,
    pub(crate) skipped: Skipped,
}

/// Why a file's reading stopped.
enum Stop {
    Error(Error),
    NotUtf8,
    Unreadable(String),
    /// The receiver wants no more.
    Closed,
}

/// How far the reading of one file has come.
struct Place<'a> {
    input: &'a Input,
    /// Bytes of a packed file that were read.
    consumed: Option<Arc<AtomicU64>>,
    /// Those that items stand for already.
    told: u64,
    /// Text of the current document that is not on its way yet.
    document: String,
    /// Bytes after the last cut in which none was found.
    searched: usize,
}

impl<F: FnMut(Item) -> bool> Reader<'_, F> {
    /// Reads all; files that are not text or cannot be read are counted and left out.
    pub(crate) fn read_all(&mut self, inputs: &[Input]) -> Result<()> {
        for input in inputs {
            match self.read(input) {
                Ok(()) => {}
                Err(Stop::Error(error)) => return Err(error),
                Err(Stop::Closed) => return Ok(()),
                Err(Stop::NotUtf8) => {
                    self.skipped.not_utf8(&input.path);
                    self.leave_out(input);
                }
                Err(Stop::Unreadable(message)) => {
                    self.skipped.unreadable(message);
                    self.leave_out(input);
                }
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, input: &Input) {
        let bytes = input.bytes;
        (self.emit)(Item {
            body: Body::Nothing,
            ends_document: false,
            source_bytes: bytes,
            text_bytes: bytes,
        });
    }

    fn read(&mut self, input: &Input) -> Result<(), Stop> {
        let opened = Opened::open(input, self.options.field()).map_err(Stop::Unreadable)?;
        let mut place =
            Place { input, consumed: opened.consumed.clone(), told: 0, document: String::new(), searched: 0 };
        match opened.shape {
            Shape::Text => self.read_text(opened, &mut place)?,
            shape => self.read_values(Values::new(opened.text, shape), shape, &mut place)?,
        }
        if place.consumed.is_some() && place.told < input.bytes {
            let source_bytes = input.bytes - place.told;
            self.send(Item { body: Body::Nothing, ends_document: false, source_bytes, text_bytes: 0 })?;
        }
        Ok(())
    }

    fn read_text(&mut self, mut opened: Opened, place: &mut Place<'_>) -> Result<(), Stop> {
        let path = place.input.path.display();
        let mut bytes = Vec::new();
        let limited = (&mut opened.text).take(WHOLE_FILE_BYTES + 1).read_to_end(&mut bytes);
        limited.map_err(|e| unreadable(&place.input.path, &e))?;
        if bytes.len() as u64 <= WHOLE_FILE_BYTES {
            let text = std::str::from_utf8(&bytes).map_err(|_| Stop::NotUtf8)?;
            if text.is_empty() {
                self.skipped.empty += 1;
            }
            return self.take_text(text, true, place).map(|_| ());
        }
        let mut all = Cursor::new(bytes).chain(opened.text);
        stream_text(&mut all, &place.input.path, |text, _| Ok(text.len()))?;
        // Part of the document is on its way soon; from then on, the file can no longer be left out.
        let changed = |stop: Stop| match stop {
            Stop::NotUtf8 | Stop::Unreadable(_) => Stop::Error(
                Error::failure(format!("read {path}: the file changed while it was read"))
                    .hint("start again when nobody writes to it"),
            ),
            stop => stop,
        };
        let again = Opened::open(place.input, self.options.field());
        let mut again = again.map_err(|message| changed(Stop::Unreadable(message)))?;
        place.consumed = again.consumed.clone();
        let file = place.input.path.clone();
        stream_text(&mut again.text, &file, |text, is_last| self.take_text(text, is_last, place))
            .map_err(changed)
    }

    /// Takes parts of a text from its beginning, as far as they can be told; says how many bytes it used.
    fn take_text(&mut self, text: &str, is_last: bool, place: &mut Place<'_>) -> Result<usize, Stop> {
        let mut used = 0;
        while used < text.len() {
            let rest = &text[used..];
            let Some(end) = self.cut.find(rest, is_last, place.searched) else {
                place.searched = rest.len();
                break;
            };
            place.searched = 0;
            used += end;
            place.document.push_str(&rest[..end]);
            let is_end = is_last && used == text.len();
            if is_end || place.document.len() as u64 >= self.cut.send_bytes() {
                let text = std::mem::take(&mut place.document);
                self.send(place.item(Body::Text(text), is_end || self.cut.ends_documents()))?;
            }
        }
        let left = (text.len() - used) as u64;
        if left > DOCUMENT_BYTES_MAX {
            return Err(Stop::Error(
                Error::user(format!(
                    "{}: {} MiB of text without a place where this tokenizer could be cut",
                    place.input.path.display(),
                    left >> 20
                ))
                .hint("put the documents into files of their own, or into JSON lines"),
            ));
        }
        Ok(used)
    }

    fn read_values<R: BufRead>(
        &mut self,
        mut values: Values<R>,
        shape: Shape,
        place: &mut Place<'_>,
    ) -> Result<(), Stop> {
        let path = place.input.path.clone();
        loop {
            match values.next() {
                Ok(None) => return Ok(()),
                Ok(Some((bytes, _))) if bytes.trim_ascii().is_empty() => {}
                Ok(Some((bytes, line))) => {
                    let strings = shape == Shape::Array;
                    let body = Body::Json { bytes, path: path.clone(), line, strings };
                    self.send(place.item(body, true))?;
                }
                Err(broken) => {
                    let goes_on = matches!(broken, Broken::Long(_)) && shape == Shape::Lines;
                    let error = broken.error(&path);
                    if !self.options.skip_bad {
                        return Err(Stop::Error(error));
                    }
                    self.skipped.bad_document(error.to_string());
                    if !goes_on {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn send(&mut self, item: Item) -> Result<(), Stop> {
        if (self.emit)(item) { Ok(()) } else { Err(Stop::Closed) }
    }
}

impl Place<'_> {
    fn item(&mut self, body: Body, ends_document: bool) -> Item {
        let text_bytes = match &body {
            Body::Text(text) => text.len() as u64,
            Body::Json { bytes, .. } => bytes.len() as u64,
            Body::Nothing => 0,
        };
        let source_bytes = match &self.consumed {
            None => text_bytes,
            Some(consumed) => {
                let now = consumed.load(Ordering::Relaxed).min(self.input.bytes);
                now - std::mem::replace(&mut self.told, now)
            }
        };
        Item { body, ends_document, source_bytes, text_bytes }
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Stop {
    Stop::Unreadable(format!("{}: {error}", path.display()))
}

/// Reads text block by block; `take` gets the text at hand and whether it is the last, and says how much it used.
fn stream_text(
    source: &mut impl Read,
    path: &Path,
    mut take: impl FnMut(&str, bool) -> Result<usize, Stop>,
) -> Result<(), Stop> {
    let mut buffer = Vec::new();
    loop {
        let mut limited = Read::take(&mut *source, BLOCK_BYTES);
        let read = limited.read_to_end(&mut buffer).map_err(|e| unreadable(path, &e))?;
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
