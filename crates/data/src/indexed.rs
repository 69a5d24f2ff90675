use std::ffi::OsString;
use std::path::{Path, PathBuf};

use spec::{Context, Error, Result};

use crate::file::TokenFile;
use crate::token_type::TokenType;

pub(crate) const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
pub(crate) const VERSION: u64 = 1;
/// Magic, version, token type, sequence count, boundary count; the arrays follow, unaligned.
const HEADER_BYTES: usize = 34;
/// Every so many sequences the position is kept; between them, lengths are added up.
const STRIDE: usize = 16;
/// Entries of the index read at a time.
const BLOCK: usize = 64 << 10;

/// A Megatron `.bin/.idx` dataset; the index is read and checked as a whole when opened, tokens are read as asked for.
///
/// The index holds, per sequence, its length and byte offset, and the document boundaries (with one sequence per
/// document, as language-model data has it, the two coincide). Sequences are what splits and samples count. In memory
/// stay 4.5 bytes per sequence.
pub struct IndexedDataset {
    prefix: PathBuf,
    bin: TokenFile,
    kind: TokenType,
    lengths: Vec<i32>,
    /// Position of every `STRIDE`th sequence, in tokens.
    starts: Vec<u64>,
    documents: usize,
    tokens: u64,
}

impl IndexedDataset {
    /// Opens `PREFIX.bin` and `PREFIX.idx`; `prefix` may also name either file.
    ///
    /// # Errors
    /// Either file missing, unreadable, empty, cut short or never wholly written; wrong magic, version or token type;
    /// lengths, offsets and boundaries that contradict each other or the size of the `.bin`.
    pub fn open(prefix: &Path) -> Result<Self> {
        let prefix = strip_extension(prefix);
        let (bin_path, idx_path) = (bin_path(&prefix), idx_path(&prefix));
        let idx = TokenFile::open(&idx_path).map_err(|e| e.hint(BUILD_HINT))?;
        let header = Header::read(&idx).context(idx_path.display()).map_err(|e| e.hint(REBUILD_HINT))?;
        let bin = TokenFile::open(&bin_path).map_err(|e| e.hint(BUILD_HINT))?;
        let mut dataset = IndexedDataset {
            prefix,
            bin,
            kind: header.kind,
            lengths: Vec::new(),
            starts: Vec::new(),
            documents: header.boundaries as usize - 1,
            tokens: 0,
        };
        dataset.read_arrays(&idx, &header).context(idx_path.display()).map_err(|e| e.hint(REBUILD_HINT))?;
        dataset.check_tokens()?;
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
        self.lengths.len()
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Tokens in sequence `index`, which must be below [`IndexedDataset::sequences`].
    #[inline]
    pub fn length(&self, index: usize) -> usize {
        self.lengths[index] as usize
    }

    /// Position of the sequence's first token in the `.bin`, in tokens.
    pub fn start(&self, index: usize) -> u64 {
        let known = index / STRIDE;
        let between = &self.lengths[known * STRIDE..index];
        self.starts[known] + between.iter().map(|&length| length as u64).sum::<u64>()
    }

    /// Copies tokens `offset..offset + out.len()` of a sequence.
    ///
    /// # Errors
    /// The range goes beyond the sequence, or the `.bin` was cut short after it was opened.
    pub fn read(&self, index: usize, offset: usize, out: &mut [u32]) -> Result<()> {
        if index >= self.sequences() || offset.saturating_add(out.len()) > self.length(index) {
            return Err(Error::failure(format!(
                "read {} tokens at {offset} of sequence {index} in {}: beyond its end",
                out.len(),
                self.prefix.display()
            )));
        }
        let from = (self.start(index) + offset as u64) * self.kind.size() as u64;
        self.bin.read_tokens(self.kind, from, out)
    }

    /// The file of tokens.
    pub(crate) fn bin(&self) -> &TokenFile {
        &self.bin
    }

    /// Reads lengths, which must add up to the offsets, and boundaries, which rise from 0 to the last sequence.
    ///
    /// The arrays are read side by side, so that what is kept is never more than what was found right.
    fn read_arrays(&mut self, idx: &TokenFile, header: &Header) -> Result<()> {
        if let Some(hole) = idx.first_hole() {
            return Err(Error::user(format!("nothing was ever written from byte {hole} on")));
        }
        let size = self.kind.size() as i64;
        let (sequences, boundaries) = (header.sequences as usize, header.boundaries as usize);
        let offsets_from = HEADER_BYTES as u64 + 4 * header.sequences;
        let boundaries_from = offsets_from + 8 * header.sequences;
        let last = Entries::<8>::read(idx, boundaries_from + 8 * (header.boundaries - 1), 1)?.i64(0);
        if last != sequences as i64 {
            return Err(Error::user(format!(
                "document boundaries end at {last}, but there are {sequences} sequences"
            )));
        }
        let mut bytes = 0i64;
        for from in (0..sequences).step_by(BLOCK) {
            let count = BLOCK.min(sequences - from);
            let lengths = Entries::<4>::read(idx, HEADER_BYTES as u64 + 4 * from as u64, count)?;
            let offsets = Entries::<8>::read(idx, offsets_from + 8 * from as u64, count)?;
            for i in 0..count {
                let (length, offset, at) = (lengths.i32(i), offsets.i64(i), from + i);
                if length < 0 {
                    return Err(Error::user(format!("sequence {at} has length {length}")));
                }
                if offset != bytes {
                    return Err(Error::user(format!(
                        "sequence {at} starts at byte {offset}, but the lengths before it end at byte {bytes}"
                    )));
                }
                if at.is_multiple_of(STRIDE) {
                    self.starts.push((bytes / size) as u64);
                }
                self.lengths.push(length);
                bytes = (i64::from(length).checked_mul(size))
                    .and_then(|length| bytes.checked_add(length))
                    .ok_or_else(|| Error::user(format!("lengths overflow at sequence {at}")))?;
            }
        }
        let mut previous = 0;
        for from in (0..boundaries).step_by(BLOCK) {
            let count = BLOCK.min(boundaries - from);
            let block = Entries::<8>::read(idx, boundaries_from + 8 * from as u64, count)?;
            for (i, boundary) in (0..count).map(|i| (from + i, block.i64(i))) {
                if boundary < previous || (i == 0 && boundary != 0) {
                    return Err(Error::user(format!(
                        "document boundary {i} is {boundary}, after {previous}"
                    )));
                }
                previous = boundary;
            }
        }
        self.tokens = (bytes / size) as u64;
        Ok(())
    }

    fn check_tokens(&self) -> Result<()> {
        let (found, expected) = (self.bin.bytes(), self.tokens * self.kind.size() as u64);
        let shown = self.bin.path().display();
        if found == expected {
            return if self.tokens > 0 {
                Ok(())
            } else {
                Err(Error::user(format!("{shown}: holds no tokens")).hint(REBUILD_HINT))
            };
        }
        let what = if found < expected { "cut short" } else { "longer than its index" };
        Err(Error::user(format!(
            "{shown}: {what}: {found} bytes, but the index lists {} {} tokens ({expected} bytes)",
            self.tokens,
            self.kind.name(),
        ))
        .hint(REBUILD_HINT))
    }
}

/// Little-endian numbers of `N` bytes, read from a file.
struct Entries<const N: usize>(Vec<u8>);

impl<const N: usize> Entries<N> {
    fn read(file: &TokenFile, from: u64, count: usize) -> Result<Self> {
        let mut bytes = vec![0; N * count];
        file.read_at(from, &mut bytes)?;
        Ok(Entries(bytes))
    }
}

impl Entries<4> {
    fn i32(&self, at: usize) -> i32 {
        i32::from_le_bytes(array(&self.0, 4 * at))
    }
}

impl Entries<8> {
    fn i64(&self, at: usize) -> i64 {
        i64::from_le_bytes(array(&self.0, 8 * at))
    }
}

const BUILD_HINT: &str = "check the path, or make the dataset with `phalanx data build`";
const REBUILD_HINT: &str = "copy the .bin and .idx again, or rebuild them with `phalanx data build`";

struct Header {
    kind: TokenType,
    sequences: u64,
    boundaries: u64,
}

impl Header {
    fn read(idx: &TokenFile) -> Result<Header> {
        let mut start = [0; HEADER_BYTES];
        let start = &mut start[..HEADER_BYTES.min(idx.bytes() as usize)];
        idx.read_at(0, start)?;
        Header::parse(start, idx.bytes())
    }

    /// Reads the header of an index of `found` bytes.
    fn parse(idx: &[u8], found: u64) -> Result<Header> {
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
                "cut short: {found} bytes, the header alone has {HEADER_BYTES}"
            )));
        }
        let version = u64::from_le_bytes(array(idx, 9));
        if version != VERSION {
            return Err(Error::user(format!("index version {version}, expected {VERSION}")));
        }
        let kind = TokenType::from_code(idx[17])?;
        let sequences = u64::from_le_bytes(array(idx, 18));
        let boundaries = u64::from_le_bytes(array(idx, 26));
        let (s, d, found) = (u128::from(sequences), u128::from(boundaries), u128::from(found));
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
        // Both arrays fit into the file, so that adding to their sizes does not overflow.
        Ok(Header { kind, sequences, boundaries })
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
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
