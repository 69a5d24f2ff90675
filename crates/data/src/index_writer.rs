use std::path::{Path, PathBuf};

use spec::{Error, Result};
use xxhash_rust::xxh3::Xxh3;

use crate::atomic::Pending;
use crate::indexed::{MAGIC, VERSION, bin_path, idx_path};
use crate::token_type::TokenType;

/// Writes a Megatron `.bin/.idx` pair, streaming: tokens go to disk as they come, four bytes per document stay in memory.
///
/// Nothing is visible under the final names before [`IndexedWriter::finish`]; the `.idx` comes last, so a
/// reader never finds an index without its tokens. Dropped unfinished, it leaves nothing behind.
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// let prefix = dir.path().join("corpus");
/// let mut writer = data::IndexedWriter::create(&prefix, data::TokenType::U16)?;
/// writer.push(&[5, 7])?;
/// writer.push(&[9])?; // the same document goes on
/// writer.end_document()?;
/// writer.finish()?;
/// assert_eq!(data::IndexedDataset::open(&prefix)?.length(0), 3);
/// # Ok::<(), spec::Error>(())
/// ```
pub struct IndexedWriter {
    prefix: PathBuf,
    bin: Pending,
    kind: TokenType,
    buffer: Vec<u8>,
    lengths: Vec<i32>,
    current: u64,
    tokens: u64,
    hash: Xxh3,
}

/// Bytes gathered before a write reaches the file.
const BUFFER_BYTES: usize = 1 << 20;

impl IndexedWriter {
    /// Starts `PREFIX.bin` under a temporary name, creating missing directories.
    ///
    /// # Errors
    /// The directory cannot be made or written to, or the index format has no code for `kind`.
    pub fn create(prefix: &Path, kind: TokenType) -> Result<Self> {
        if kind.code().is_none() {
            return Err(Error::user(format!("token type {} has no code in the index format", kind.name())));
        }
        Ok(IndexedWriter {
            prefix: prefix.to_path_buf(),
            bin: Pending::create(&bin_path(prefix))?,
            kind,
            buffer: Vec::with_capacity(BUFFER_BYTES + 4096),
            lengths: Vec::new(),
            current: 0,
            tokens: 0,
            hash: Xxh3::new(),
        })
    }

    /// Appends tokens to the current document.
    ///
    /// # Errors
    /// An id does not fit the token type, or the disk refuses.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        if let Some(position) = tokens.iter().position(|&t| t > self.kind.max_id()) {
            return Err(Error::user(format!(
                "token {} of document {} is {}, more than {} holds ({})",
                self.current + position as u64,
                self.lengths.len(),
                tokens[position],
                self.kind.name(),
                self.kind.max_id()
            )));
        }
        self.current += tokens.len() as u64;
        for part in tokens.chunks(BUFFER_BYTES / 8) {
            self.kind.encode(part, &mut self.buffer);
            if self.buffer.len() >= BUFFER_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Closes the current document; an empty one is recorded as such.
    ///
    /// # Errors
    /// The document is longer than the format's 2,147,483,647 tokens.
    pub fn end_document(&mut self) -> Result<()> {
        let length = i32::try_from(self.current).map_err(|_| {
            Error::user(format!(
                "document {} has {} tokens, more than an index entry holds ({})",
                self.lengths.len(),
                self.current,
                i32::MAX
            ))
            .hint("cut the text into smaller documents")
        })?;
        self.lengths.push(length);
        self.tokens += self.current;
        self.current = 0;
        Ok(())
    }

    /// Documents closed so far.
    pub fn documents(&self) -> u64 {
        self.lengths.len() as u64
    }

    /// Tokens in the closed documents.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Writes the index and puts both files in place, durably.
    ///
    /// # Errors
    /// Nothing was written, a document is still open, or the disk refuses.
    pub fn finish(self) -> Result<()> {
        self.finish_with(|_| Ok(()))
    }

    /// As [`IndexedWriter::finish`]; `between` gets XXH3-128 of the stored tokens and runs when they are in place
    /// and the index is not, for files that must be there before the dataset counts as existing.
    pub(crate) fn finish_with(mut self, between: impl FnOnce(u128) -> Result<()>) -> Result<()> {
        if self.tokens == 0 || self.current != 0 {
            return Err(Error::failure(format!(
                "finish {}: {} tokens in closed documents and {} in an open one",
                self.prefix.display(),
                self.tokens,
                self.current
            )));
        }
        self.flush()?;
        self.bin.sync()?;
        let mut idx = Pending::create(&idx_path(&self.prefix))?;
        write_index(&mut idx, self.kind, &self.lengths)?;
        idx.sync()?;
        // An older index would describe the new tokens wrongly, so it goes before they come.
        let old = idx_path(&self.prefix);
        match std::fs::remove_file(&old) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("replace", &old, &e)),
            _ => {}
        }
        let hash = self.hash.digest128();
        self.bin.commit()?;
        between(hash)?;
        idx.commit()
    }

    fn flush(&mut self) -> Result<()> {
        self.hash.update(&self.buffer);
        self.bin.write(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

fn write_index(out: &mut Pending, kind: TokenType, lengths: &[i32]) -> Result<()> {
    let count = lengths.len() as u64;
    let mut buffer = Vec::with_capacity(BUFFER_BYTES + 64);
    buffer.extend_from_slice(MAGIC);
    buffer.extend_from_slice(&VERSION.to_le_bytes());
    buffer.push(kind.code().unwrap_or_default());
    buffer.extend_from_slice(&count.to_le_bytes());
    buffer.extend_from_slice(&(count + 1).to_le_bytes());
    let mut offset = 0i64;
    let offsets = lengths.iter().map(move |&length| {
        let this = offset;
        offset += i64::from(length) * kind.size() as i64;
        this.to_le_bytes()
    });
    let boundaries = (0..=count as i64).map(i64::to_le_bytes);
    for length in lengths {
        put(out, &mut buffer, &length.to_le_bytes())?;
    }
    for value in offsets.chain(boundaries) {
        put(out, &mut buffer, &value)?;
    }
    out.write(&buffer)
}

fn put(out: &mut Pending, buffer: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    buffer.extend_from_slice(bytes);
    if buffer.len() >= BUFFER_BYTES {
        out.write(buffer)?;
        buffer.clear();
    }
    Ok(())
}
