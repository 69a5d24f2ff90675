use std::path::{Path, PathBuf};

use rayon::prelude::*;
use spec::{Error, Result};

use crate::file::TokenFile;
use crate::fingerprint::Fingerprint;
use crate::glob::{expand, has_wildcards};
use crate::indexed::{IndexedDataset, bin_path, idx_path, strip_extension};
use crate::manifest::Manifest;
use crate::shards::{TokenShards, is_shard};
use crate::token_type::TokenType;

/// Token sequences on disk, in either format.
pub enum Source {
    /// A Megatron `.bin/.idx` pair.
    Indexed(IndexedDataset),
    /// llm.c shards.
    Shards(TokenShards),
}

/// Up to this many bytes every token is checked on request; beyond, blocks spread over the data are.
/// One scan of this size takes well under a second from memory.
const FULL_CHECK_BYTES: u64 = 512 << 20;
/// Bytes looked at in one piece when checking.
const CHECK_BLOCK_BYTES: u64 = 1 << 20;

impl Source {
    /// Opens whichever format `path` names: a Megatron prefix (or its `.bin` or `.idx`), a token shard,
    /// a pattern such as `shards/train_*.bin`, or a directory of shards.
    ///
    /// # Errors
    /// Nothing there, or whatever [`IndexedDataset::open`] and [`TokenShards::open`] refuse.
    pub fn open(path: &Path) -> Result<Self> {
        let prefix = strip_extension(path);
        if idx_path(&prefix).exists() {
            return IndexedDataset::open(&prefix).map(Source::Indexed);
        }
        let shards = if has_wildcards(path) {
            let found = expand(path)?;
            if found.is_empty() {
                return Err(
                    Error::user(format!("no file matches {}", path.display())).hint("check the pattern")
                );
            }
            found
        } else if path.is_dir() {
            let found: Vec<PathBuf> =
                expand(&path.join("*.bin"))?.into_iter().filter(|p| is_shard(p)).collect();
            if found.is_empty() {
                return Err(Error::user(format!("{}: a directory without token shards", path.display()))
                    .hint("give the prefix of a .bin/.idx pair, or make one with `phalanx data build`"));
            }
            found
        } else if is_shard(path) {
            vec![path.to_path_buf()]
        } else {
            // The usual case of a missing dataset: the message should name the .idx.
            return IndexedDataset::open(&prefix).map(Source::Indexed);
        };
        TokenShards::open(&shards).map(Source::Shards)
    }

    /// The path to show in messages.
    pub fn name(&self) -> String {
        match self {
            Source::Indexed(d) => d.prefix().display().to_string(),
            Source::Shards(s) if s.sequences() == 1 => s.path(0).display().to_string(),
            Source::Shards(s) => format!("{} and {} more shards", s.path(0).display(), s.sequences() - 1),
        }
    }

    /// Number of sequences, the unit of splits.
    pub fn sequences(&self) -> usize {
        match self {
            Source::Indexed(d) => d.sequences(),
            Source::Shards(s) => s.sequences(),
        }
    }

    /// Number of documents as far as the format records them.
    pub fn documents(&self) -> usize {
        match self {
            Source::Indexed(d) => d.documents(),
            Source::Shards(s) => s.sequences(),
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        match self {
            Source::Indexed(d) => d.tokens(),
            Source::Shards(s) => s.tokens(),
        }
    }

    /// How tokens are stored.
    pub fn token_type(&self) -> TokenType {
        match self {
            Source::Indexed(d) => d.token_type(),
            Source::Shards(s) => s.token_type(),
        }
    }

    /// Tokens in sequence `index`, which must be below [`Source::sequences`].
    #[inline]
    pub fn length(&self, index: usize) -> usize {
        match self {
            Source::Indexed(d) => d.length(index),
            Source::Shards(s) => s.length(index),
        }
    }

    /// Copies tokens `offset..offset + out.len()` of a sequence.
    ///
    /// # Errors
    /// The range goes beyond the sequence, or the file was cut short after it was opened.
    pub fn read(&self, index: usize, offset: usize, out: &mut [u32]) -> Result<()> {
        match self {
            Source::Indexed(d) => d.read(index, offset, out),
            Source::Shards(s) => s.read(index, offset, out),
        }
    }

    /// Refuses data with ids outside `0..vocab`, naming the file, the position and the id.
    ///
    /// Cheap: nothing is read where the token type or the manifest already answers; up to 512 MiB are read whole,
    /// in parallel; of more, one block in several, spread evenly (samples are checked again when they are drawn).
    ///
    /// # Errors
    /// The first id found at or beyond `vocab`; or the tokens cannot be read.
    pub fn check_vocab(&self, vocab: usize) -> Result<()> {
        let limit = u32::try_from(vocab).unwrap_or(u32::MAX);
        let unsigned = matches!(self.token_type(), TokenType::U8 | TokenType::U16);
        if unsigned && self.token_type().max_id() < limit {
            return Ok(());
        }
        if let Source::Indexed(d) = self
            && let Ok(manifest) = Manifest::load(d.prefix())
            && manifest.tokens == d.tokens()
            && manifest.max_token < limit
        {
            return Ok(());
        }
        for part in 0..self.parts() {
            if let Some((position, id)) = self.first_beyond(part, limit)? {
                return Err(self.beyond_vocab(part, position, id, vocab));
            }
        }
        Ok(())
    }

    /// Names the data: XXH3-128 over the sequences' lengths and the tokens (of more than 512 MiB, blocks spread
    /// evenly). Equal for equal data, wherever it lies; always taken from the tokens themselves.
    ///
    /// # Errors
    /// The tokens cannot be read.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(self.token_type().name().as_bytes());
        for index in 0..self.sequences() {
            hash.update(&(self.length(index) as u64).to_le_bytes());
        }
        for part in 0..self.parts() {
            let mut buffer = Vec::new();
            for (from, bytes) in checked_blocks(self.part_bytes(part)) {
                hash.update(self.read_block(part, from, bytes, &mut buffer)?);
            }
        }
        Ok(Fingerprint::of(&hash))
    }

    /// The error for a token outside the vocabulary found in a drawn sample.
    pub(crate) fn bad_token(&self, sequence: usize, offset: usize, id: u32, vocab: usize) -> Error {
        match self {
            Source::Indexed(d) => self.beyond_vocab(0, d.start(sequence) + offset as u64, id, vocab),
            Source::Shards(_) => self.beyond_vocab(sequence, offset as u64, id, vocab),
        }
    }

    /// Number of token files.
    pub(crate) fn parts(&self) -> usize {
        match self {
            Source::Indexed(_) => 1,
            Source::Shards(s) => s.sequences(),
        }
    }

    /// One file of tokens, and where they begin.
    fn part(&self, part: usize) -> (&TokenFile, u64) {
        match self {
            Source::Indexed(d) => (d.bin(), 0),
            Source::Shards(s) => s.file(part),
        }
    }

    /// Bytes of tokens in one file.
    fn part_bytes(&self, part: usize) -> u64 {
        let (file, from) = self.part(part);
        file.bytes() - from
    }

    /// Stored tokens of one file, from byte `from` of them on.
    fn read_block<'a>(
        &self,
        part: usize,
        from: u64,
        bytes: usize,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let (file, first) = self.part(part);
        buffer.resize(bytes, 0);
        file.read_at(first + from, buffer)?;
        Ok(buffer)
    }

    /// Position and value of the first token of one file at or beyond `limit` among those looked at.
    fn first_beyond(&self, part: usize, limit: u32) -> Result<Option<(u64, u32)>> {
        let blocks: Vec<(u64, usize)> = checked_blocks(self.part_bytes(part)).collect();
        let found = blocks.into_par_iter().map_init(Vec::new, |buffer, (from, bytes)| {
            let block = self.read_block(part, from, bytes, buffer)?;
            let found = first_beyond(block, self.token_type(), limit);
            Ok(found.map(|(at, id)| (from / self.token_type().size() as u64 + at, id)))
        });
        found.find_map_first(Result::transpose).transpose()
    }

    fn beyond_vocab(&self, part: usize, position: u64, id: u32, vocab: usize) -> Error {
        let file = match self {
            Source::Indexed(d) => bin_path(d.prefix()),
            Source::Shards(s) => s.path(part).to_path_buf(),
        };
        // Ids that are negative on disk decode to the upper half of the range.
        let shown = match self.token_type() {
            TokenType::I8 | TokenType::I16 | TokenType::I32 if id > i32::MAX as u32 => {
                (id as i32).to_string()
            }
            TokenType::I64 if id == u32::MAX => "outside 32 bits".to_owned(),
            _ => id.to_string(),
        };
        Error::user(format!(
            "{}: token {position} has id {shown}, but the model's vocabulary has {vocab} entries",
            file.display()
        ))
        .hint(format!(
            "set model.vocab to the size of the tokenizer that made this data (more than {id}), or build the data with the model's tokenizer"
        ))
    }
}

/// The blocks of `bytes` that a check looks at, as offset and size: all, or of more than `FULL_CHECK_BYTES` one in several
/// and the last.
fn checked_blocks(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    let blocks = bytes.div_ceil(CHECK_BLOCK_BYTES);
    let every = bytes.div_ceil(FULL_CHECK_BYTES).max(1);
    (0..blocks).filter(move |block| block % every == 0 || block + 1 == blocks).map(move |block| {
        let from = block * CHECK_BLOCK_BYTES;
        (from, CHECK_BLOCK_BYTES.min(bytes - from) as usize)
    })
}

/// Position and value of the first token at or beyond `limit`.
fn first_beyond(stored: &[u8], kind: TokenType, limit: u32) -> Option<(u64, u32)> {
    let mut tokens = [0; 1024];
    for (i, part) in stored.chunks(1024 * kind.size()).enumerate() {
        let tokens = &mut tokens[..part.len() / kind.size()];
        kind.decode(part, tokens);
        // The common case is one pass that finds nothing, which vectorises.
        if tokens.iter().fold(0, |max, &t| max.max(t)) >= limit {
            let at = tokens.iter().position(|&t| t >= limit)?;
            return Some(((i * 1024 + at) as u64, tokens[at]));
        }
    }
    None
}
