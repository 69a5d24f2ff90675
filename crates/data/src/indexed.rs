use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use spec::{Context, Error, Result};

use crate::token_type::TokenType;

pub(crate) const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
pub(crate) const VERSION: u64 = 1;
/// Magic, version, token type, sequence count, boundary count; the arrays follow, unaligned.
const HEADER_BYTES: usize = 34;

/// A Megatron `.bin/.idx` dataset, mapped into memory and checked as a whole when opened.
///
/// The index holds, per sequence, its length and byte offset, and the document boundaries (with one sequence per
/// document, as language-model data has it, the two coincide). Sequences are what splits and samples count.
pub struct IndexedDataset {
    prefix: PathBuf,
    bin: Mmap,
    idx: Mmap,
    kind: TokenType,
    sequences: usize,
    boundaries: usize,
    tokens: u64,
}

impl IndexedDataset {
    /// Opens `PREFIX.bin` and `PREFIX.idx`; `prefix` may also name either file.
    ///
    /// # Errors
    /// Either file missing, unreadable, empty or cut short; wrong magic, version or token type; lengths, offsets
    /// and boundaries that contradict each other or the size of the `.bin`.
    pub fn open(prefix: &Path) -> Result<Self> {
        let prefix = strip_extension(prefix);
        let (bin_path, idx_path) = (bin_path(&prefix), idx_path(&prefix));
        let idx = map(&idx_path).map_err(|e| e.hint(BUILD_HINT))?;
        let header = Header::parse(&idx).context(idx_path.display()).map_err(|e| e.hint(REBUILD_HINT))?;
        let bin = map(&bin_path).map_err(|e| e.hint(BUILD_HINT))?;
        let mut dataset = IndexedDataset {
            prefix,
            bin,
            idx,
            kind: header.kind,
            sequences: header.sequences,
            boundaries: header.boundaries,
            tokens: 0,
        };
        dataset.tokens =
            dataset.check_arrays().context(idx_path.display()).map_err(|e| e.hint(REBUILD_HINT))?;
        dataset.check_tokens(&bin_path)?;
        Ok(dataset)
    }

    /// The path without extension.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// How tokens are stored.
    pub fn token_type(&self) -> TokenType {
        self.kind
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.boundaries - 1
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Tokens in sequence `index`, which must be below [`IndexedDataset::sequences`].
    #[inline]
    pub fn length(&self, index: usize) -> usize {
        assert!(index < self.sequences, "sequence {index} of {}", self.sequences);
        self.raw_length(index) as usize
    }

    /// Position of the sequence's first token in the `.bin`, in tokens.
    #[inline]
    pub fn start(&self, index: usize) -> u64 {
        assert!(index < self.sequences, "sequence {index} of {}", self.sequences);
        self.raw_offset(index) as u64 / self.kind.size() as u64
    }

    /// Copies tokens `offset..offset + out.len()` of a sequence.
    ///
    /// # Errors
    /// The range goes beyond the sequence.
    pub fn read(&self, index: usize, offset: usize, out: &mut [u32]) -> Result<()> {
        if index >= self.sequences || offset.saturating_add(out.len()) > self.length(index) {
            return Err(Error::failure(format!(
                "read {} tokens at {offset} of sequence {index} in {}: beyond its end",
                out.len(),
                self.prefix.display()
            )));
        }
        let size = self.kind.size();
        let from = self.raw_offset(index) as usize + offset * size;
        self.kind.decode(&self.bin[from..from + out.len() * size], out);
        Ok(())
    }

    /// All tokens, as stored.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bin
    }

    fn raw_length(&self, index: usize) -> i32 {
        i32::from_le_bytes(array(&self.idx, HEADER_BYTES + 4 * index))
    }

    fn raw_offset(&self, index: usize) -> i64 {
        i64::from_le_bytes(array(&self.idx, HEADER_BYTES + 4 * self.sequences + 8 * index))
    }

    fn raw_boundary(&self, index: usize) -> i64 {
        i64::from_le_bytes(array(&self.idx, HEADER_BYTES + 12 * self.sequences + 8 * index))
    }

    /// Lengths add up to offsets, boundaries rise from 0 to the last sequence; gives the number of tokens.
    fn check_arrays(&self) -> Result<u64> {
        let size = self.kind.size() as i64;
        let mut bytes = 0i64;
        for i in 0..self.sequences {
            let (length, offset) = (self.raw_length(i), self.raw_offset(i));
            if length < 0 {
                return Err(Error::user(format!("sequence {i} has length {length}")));
            }
            if offset != bytes {
                return Err(Error::user(format!(
                    "sequence {i} starts at byte {offset}, but the lengths before it end at byte {bytes}"
                )));
            }
            bytes = i64::from(length)
                .checked_mul(size)
                .and_then(|length| bytes.checked_add(length))
                .ok_or_else(|| Error::user(format!("lengths overflow at sequence {i}")))?;
        }
        let mut previous = 0;
        for i in 0..self.boundaries {
            let boundary = self.raw_boundary(i);
            if boundary < previous || (i == 0 && boundary != 0) {
                return Err(Error::user(format!("document boundary {i} is {boundary}, after {previous}")));
            }
            previous = boundary;
        }
        if previous != self.sequences as i64 {
            return Err(Error::user(format!(
                "document boundaries end at {previous}, but there are {} sequences",
                self.sequences
            )));
        }
        Ok((bytes / size) as u64)
    }

    fn check_tokens(&self, bin_path: &Path) -> Result<()> {
        let (found, size) = (self.bin.len() as u64, self.kind.size() as u64);
        let expected = self.tokens * size;
        if found == expected {
            return if self.tokens > 0 {
                Ok(())
            } else {
                Err(Error::user(format!("{}: holds no tokens", bin_path.display())).hint(REBUILD_HINT))
            };
        }
        let what = if found < expected { "cut short" } else { "longer than its index" };
        Err(Error::user(format!(
            "{}: {what}: {found} bytes, but the index lists {} {} tokens ({expected} bytes)",
            bin_path.display(),
            self.tokens,
            self.kind.name(),
        ))
        .hint(REBUILD_HINT))
    }
}

const BUILD_HINT: &str = "check the path, or make the dataset with `phalanx data build`";
const REBUILD_HINT: &str = "copy the .bin and .idx again, or rebuild them with `phalanx data build`";

struct Header {
    kind: TokenType,
    sequences: usize,
    boundaries: usize,
}

impl Header {
    fn parse(idx: &[u8]) -> Result<Header> {
        if !idx.starts_with(MAGIC) {
            let start = &idx[..idx.len().min(MAGIC.len())];
            return Err(Error::user(format!(
                "not a Megatron index: starts with {:?}, expected {:?}",
                String::from_utf8_lossy(start),
                String::from_utf8_lossy(MAGIC)
            )));
        }
        if idx.len() < HEADER_BYTES {
            return Err(Error::user(format!(
                "cut short: {} bytes, the header alone has {HEADER_BYTES}",
                idx.len()
            )));
        }
        let version = u64::from_le_bytes(array(idx, 9));
        if version != VERSION {
            return Err(Error::user(format!("index version {version}, expected {VERSION}")));
        }
        let kind = TokenType::from_code(idx[17])?;
        let sequences = u64::from_le_bytes(array(idx, 18));
        let boundaries = u64::from_le_bytes(array(idx, 26));
        let (s, d, found) = (u128::from(sequences), u128::from(boundaries), idx.len() as u128);
        let expected = HEADER_BYTES as u128 + 12 * s + 8 * d;
        // Multimodal indices append one byte per sequence.
        if found != expected && found != expected + s {
            let what = if found < expected { "cut short" } else { "wrong length" };
            return Err(Error::user(format!(
                "{what}: {found} bytes, but {sequences} sequences and {boundaries} document boundaries take {expected}"
            )));
        }
        if sequences == 0 || boundaries == 0 {
            return Err(Error::user(format!(
                "empty index: {sequences} sequences and {boundaries} document boundaries"
            )));
        }
        // Both fit: the file that holds them is mapped.
        Ok(Header { kind, sequences: sequences as usize, boundaries: boundaries as usize })
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Maps a whole file; an empty one is the user's error, because nothing could be read from it.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::io("open", path, &e))?;
    let metadata = file.metadata().map_err(|e| Error::io("inspect", path, &e))?;
    if !metadata.is_file() {
        return Err(Error::user(format!("open {}: not a regular file", path.display())));
    }
    if metadata.len() == 0 {
        return Err(Error::user(format!("{}: empty file", path.display())));
    }
    // SAFETY: the mapping is read-only and private to this value. Another process that truncates the file while it
    // is mapped would fault the reader; datasets are replaced by renaming, never written in place.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, &e))
}

/// `PREFIX.bin`; the prefix may contain dots.
pub fn bin_path(prefix: &Path) -> PathBuf {
    with_suffix(prefix, ".bin")
}

/// `PREFIX.idx`; the prefix may contain dots.
pub fn idx_path(prefix: &Path) -> PathBuf {
    with_suffix(prefix, ".idx")
}

pub(crate) fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(suffix);
    PathBuf::from(name)
}

/// The prefix of a path that may end in `.bin` or `.idx`.
pub(crate) fn strip_extension(path: &Path) -> PathBuf {
    match path.extension().and_then(|e| e.to_str()) {
        Some("bin" | "idx") => path.with_extension(""),
        _ => path.to_path_buf(),
    }
}
