use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::file::{TokenFile, open};
use crate::token_type::TokenType;

/// The header is 256 little-endian 32-bit words: magic, version, token count, zeros.
const HEADER_BYTES: u64 = 1024;
const GPT2_MAGIC: u32 = 20_240_520;
const LLAMA3_MAGIC: u32 = 20_240_801;
const EVAL_MAGIC: u32 = 20_240_522;

/// llm.c token shards: GPT-2 ones (16-bit tokens) or Llama 3 ones (32-bit), each file one long sequence.
pub struct TokenShards {
    shards: Vec<Shard>,
    kind: TokenType,
    tokens: u64,
}

struct Shard {
    file: TokenFile,
    tokens: usize,
}

impl TokenShards {
    /// Opens shards in the order given; all must be of one kind.
    ///
    /// # Errors
    /// No paths, an unreadable or empty file, another magic or version, a token count that does not match the
    /// file's size, or a mixture of kinds.
    pub fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut shards = Vec::with_capacity(paths.len());
        let mut common: Option<TokenType> = None;
        let mut tokens = 0;
        for path in paths {
            let (shard, kind) = open_shard(path)?;
            let expected = *common.get_or_insert(kind);
            if kind != expected {
                return Err(Error::user(format!(
                    "{}: holds {} tokens, the shards before it {}",
                    path.display(),
                    kind.name(),
                    expected.name()
                ))
                .hint("give shards of one tokenizer only"));
            }
            tokens += shard.tokens as u64;
            shards.push(shard);
        }
        let Some(kind) = common else {
            return Err(Error::user("no token shards given"));
        };
        Ok(TokenShards { shards, kind, tokens })
    }

    /// Number of shards; each counts as one sequence.
    pub fn sequences(&self) -> usize {
        self.shards.len()
    }

    /// Tokens in shard `index`, which must be below [`TokenShards::sequences`].
    pub fn length(&self, index: usize) -> usize {
        self.shards[index].tokens
    }

    /// Tokens in all shards.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// How tokens are stored.
    pub fn token_type(&self) -> TokenType {
        self.kind
    }

    /// The file of shard `index`.
    pub fn path(&self, index: usize) -> &Path {
        self.shards[index].file.path()
    }

    /// Copies tokens `offset..offset + out.len()` of a shard.
    ///
    /// # Errors
    /// The range goes beyond the shard, or the file was cut short after it was opened.
    pub fn read(&self, index: usize, offset: usize, out: &mut [u32]) -> Result<()> {
        let shard = self.shards.get(index).filter(|s| offset.saturating_add(out.len()) <= s.tokens);
        let Some(shard) = shard else {
            return Err(Error::failure(format!(
                "read {} tokens at {offset} of shard {index}: beyond its end",
                out.len()
            )));
        };
        shard.file.read_tokens(self.kind, HEADER_BYTES + (offset * self.kind.size()) as u64, out)
    }

    /// The file of a shard, and where its tokens begin.
    pub(crate) fn file(&self, index: usize) -> (&TokenFile, u64) {
        (&self.shards[index].file, HEADER_BYTES)
    }
}

/// Whether a file starts as a token shard does.
pub(crate) fn is_shard(path: &Path) -> bool {
    use std::io::Read;
    let mut start = [0; 4];
    open(path).is_ok_and(|(mut file, _)| file.read_exact(&mut start).is_ok())
        && [GPT2_MAGIC, LLAMA3_MAGIC, EVAL_MAGIC].contains(&u32::from_le_bytes(start))
}

fn open_shard(path: &Path) -> Result<(Shard, TokenType)> {
    const HINT: &str = "copy the shard again, or write it again with the tool that made it";
    let file = TokenFile::open(path)?;
    let found = file.bytes();
    let refuse = |what: String| Err(Error::user(format!("{}: {what}", path.display())).hint(HINT));
    if found < HEADER_BYTES {
        return refuse(format!("cut short: {found} bytes, the header alone has {HEADER_BYTES}"));
    }
    let mut start = [0; 12];
    file.read_at(0, &mut start)?;
    let (words, _) = start.as_chunks::<4>();
    let [magic, version, tokens] = [0, 1, 2].map(|i| u32::from_le_bytes(words[i]));
    let (kind, expected_version) = match magic {
        GPT2_MAGIC => (TokenType::U16, 1),
        LLAMA3_MAGIC => (TokenType::U32, 7),
        EVAL_MAGIC => return refuse("an evaluation file (magic 20240522), not a training shard".into()),
        _ => return refuse(format!("magic {magic}, expected {GPT2_MAGIC} or {LLAMA3_MAGIC}")),
    };
    if version != expected_version {
        return refuse(format!("version {version} under magic {magic}, expected {expected_version}"));
    }
    let tokens = tokens as usize;
    let expected = HEADER_BYTES + (tokens * kind.size()) as u64;
    if found != expected || tokens == 0 {
        let what = if found < expected { "cut short" } else { "wrong length" };
        return refuse(format!("{what}: {found} bytes, but {tokens} {} tokens take {expected}", kind.name()));
    }
    Ok((Shard { file, tokens }, kind))
}
