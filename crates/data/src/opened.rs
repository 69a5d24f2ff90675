//! A file of text, unpacked, and what shape its documents have.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::file::open;
use crate::input::Input;
use crate::json::Shape;
use crate::packed::Packing;

/// Bytes by which a file's shape is told.
const HEAD_BYTES: u64 = 64 << 10;
/// Read at a time.
pub(crate) const BLOCK_BYTES: u64 = 1 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

pub(crate) struct Opened {
    pub(crate) shape: Shape,
    /// The text, without a byte-order mark.
    pub(crate) text: BufReader<Box<dyn Read + Send>>,
    /// Bytes of the file read so far, where it is packed.
    pub(crate) consumed: Option<Arc<AtomicU64>>,
}

impl Opened {
    /// # Errors
    /// A message that names the file.
    pub(crate) fn open(input: &Input, field: &str) -> Result<Self, String> {
        let (file, bytes) = open(&input.path).map_err(|e| e.to_string())?;
        let unreadable = |e: io::Error| format!("{}: {e}", input.path.display());
        let mut start = [0; 8];
        let read = file.read_at(&mut start, 0).map_err(unreadable)?;
        let packing = Packing::of(&start[..read]);
        if let Packing::Foreign(what, hint) = packing {
            return Err(format!("{} is {what}, which is not read ({hint})", input.path.display()));
        }
        let counter = Arc::new(AtomicU64::new(0));
        let consumed = (packing != Packing::Plain).then(|| counter.clone());
        let mut text = packing.unpack(Counted { file, counter }, bytes);
        let mut head = Vec::new();
        (&mut text).take(HEAD_BYTES).read_to_end(&mut head).map_err(unreadable)?;
        if head.starts_with(BYTE_ORDER_MARK) {
            head.drain(..BYTE_ORDER_MARK.len());
        }
        let shape = Shape::of(&head, &extension(&input.path), input.is_named, field);
        let buffer_bytes = bytes.clamp(HEAD_BYTES, BLOCK_BYTES) as usize;
        let text: Box<dyn Read + Send> = Box::new(Cursor::new(head).chain(text));
        Ok(Opened { shape, text: BufReader::with_capacity(buffer_bytes, text), consumed })
    }
}

/// What a file's name ends in, in lower case, without the ending of its packing.
fn extension(path: &Path) -> String {
    let of = |p: &Path| p.extension().map_or(String::new(), |e| e.to_string_lossy().to_lowercase());
    match of(path).as_str() {
        "gz" | "gzip" | "zst" | "zstd" => of(&path.with_extension("")),
        other => other.to_owned(),
    }
}

/// Counts the bytes of a file as they are read.
struct Counted {
    file: File,
    counter: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(out)?;
        self.counter.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}
