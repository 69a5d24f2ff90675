use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use spec::{Error, Result};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    TokenizerBuilder,
};

use crate::atomic::write_file;
use crate::end::{self, Named};
use crate::file::read_small;
use crate::fingerprint::Fingerprint;
use crate::ids;
use crate::pieces::{Cut, exact_pieces, pieces};
use crate::progress::{OnProgress, Progress, Stage};
use crate::rules;

/// Text to token ids and back: a Hugging Face `tokenizer.json`, loaded or trained here.
pub struct Tokenizer {
    /// Spells special tokens out that occur in a text: documents that quote `<|endoftext|>` do not end there.
    plain: tokenizers::Tokenizer,
    /// Recognises special tokens, for prompts.
    special: tokenizers::Tokenizer,
    vocab: usize,
    eod: Option<u32>,
    /// Whether a text in exact pieces gets the ids of the whole.
    can_cut: bool,
}

/// Ends each document in tokenizers trained here.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";
/// The bytes and the end-of-document token.
pub(crate) const MIN_VOCAB: usize = 257;
/// The largest of published tokenizers have some 35 MB.
pub(crate) const TOKENIZER_BYTES_MAX: u64 = 512 << 20;
/// Longer merges would be rulers of dashes and long indentations.
const MAX_TOKEN_BYTES: usize = 32;
/// Text is encoded in pieces of about this size: the encoder's bookkeeping takes some 100 bytes per token, and pieces
/// that fit the cache encode half again as fast as those of 64 KiB.
const PIECE_BYTES: usize = 8 << 10;
/// Other tokenizers get few pieces when documents are cut out of a text.
const OTHER_PIECE_BYTES: usize = 1 << 20;
/// The part of a long document that one thread encodes.
const PART_BYTES: usize = 64 << 10;
/// Words and the character before them, up to three digits, runs of signs with their line ends, blank lines, blanks.
/// The alternatives of GPT-4's pattern without its look-ahead, which lets the linear-time engine run it.
pub(crate) const PATTERN: &str =
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";

impl Tokenizer {
    /// Loads a `tokenizer.json`. What ends a document is read from `tokenizer_config.json`, `special_tokens_map.json`
    /// and `generation_config.json` beside it, or else told from the names of special tokens.
    ///
    /// # Errors
    /// Missing or unreadable, not a tokenizer, or one without a vocabulary; a file beside it that is not JSON.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read_small(path, TOKENIZER_BYTES_MAX).map_err(|e| {
            e.context("read tokenizer")
                .hint("give the path of a tokenizer.json, or leave it out to train one")
        })?;
        let mut loaded = Self::from_bytes(&bytes)
            .map_err(|e| e.context(format_args!("read tokenizer {}", path.display())))?;
        let named = end::beside(path)?.into_iter().find_map(|named| match named {
            Named::Token(token) => loaded.special.token_to_id(&token),
            Named::Id(id) => loaded.special.id_to_token(id).map(|_| id),
        });
        loaded.eod = named.or(loaded.eod);
        Ok(loaded)
    }

    /// Reads the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// Not a tokenizer, or one without a vocabulary.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        let json = json.strip_prefix(b"\xef\xbb\xbf").unwrap_or(json);
        ids::check(json)?;
        let refuse = |e: String| {
            Error::user(format!("not a tokenizer.json: {e}"))
                .hint("expected the file that Hugging Face's tokenizers write")
        };
        // The library unwraps the decoder, whatever is wrong with its JSON.
        serde_json::from_slice::<Decoder>(json).map_err(|e| refuse(e.to_string()))?;
        guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(refuse).and_then(Self::wrap)
    }

    /// Trains a byte-level BPE of at most `vocab_size` entries, [`END_OF_DOCUMENT`] (id 0) and the 256 bytes included.
    ///
    /// The same texts give the same tokenizer, whatever their order and the number of threads.
    ///
    /// # Errors
    /// A vocabulary below 257, or no text.
    pub fn train<I, S>(texts: I, vocab_size: usize, progress: OnProgress<'_>) -> Result<Self>
    where
        I: IntoIterator<Item = S>,
        I::IntoIter: Send,
        S: AsRef<str> + Send,
    {
        if vocab_size < MIN_VOCAB {
            return Err(Error::user(format!(
                "a tokenizer of {vocab_size} entries: the bytes and {END_OF_DOCUMENT} alone take {MIN_VOCAB}"
            ))
            .hint(format!("set data.vocab_size to at least {MIN_VOCAB}")));
        }
        let fail = |e: tokenizers::Error| Error::failure(format!("train tokenizer: {e}"));
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .max_token_length(Some(MAX_TOKEN_BYTES))
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
            .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
            .build();
        let mut inner =
            TokenizerBuilder::<BPE, tokenizers::NormalizerWrapper, _, PostProcessorWrapper, _>::new()
                .with_model(BPE::default())
                .with_pre_tokenizer(Some(pre_tokenizer().map_err(fail)?))
                .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(false, false, false))))
                .build()
                .map_err(fail)?;
        let seen = AtomicU64::new(0);
        let counted = texts.into_iter().flat_map(|text| {
            let text = text.as_ref();
            let done_bytes = seen.fetch_add(text.len() as u64, Ordering::Relaxed) + text.len() as u64;
            progress(Progress { stage: Stage::Count, done_bytes, total_bytes: 0 });
            pieces(text, PIECE_BYTES).map(str::to_owned).collect::<Vec<_>>()
        });
        let merging = std::iter::from_fn(|| {
            progress(Progress { stage: Stage::Merge, done_bytes: 0, total_bytes: 0 });
            None
        });
        inner.train(&mut trainer, counted.chain(merging)).map_err(fail)?;
        if seen.load(Ordering::Relaxed) == 0 {
            return Err(Error::user("train tokenizer: no text given"));
        }
        // Through JSON, so that a trained tokenizer is the one that a later load reads.
        Self::from_bytes(inner.to_string(false).map_err(fail)?.as_bytes())
    }

    /// Writes `tokenizer.json`, whole or not at all.
    ///
    /// # Errors
    /// The directory or file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_file(path, &self.to_json()?)
    }

    /// The text of `tokenizer.json`.
    ///
    /// # Errors
    /// Does not happen for tokenizers that were loaded.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let text =
            self.special.to_string(true).map_err(|e| Error::failure(format!("write tokenizer: {e}")))?;
        Ok(text.into_bytes())
    }

    /// Token ids of a document. Special tokens written in the text are encoded as the text that they are, and no
    /// begin or end token is added.
    ///
    /// # Errors
    /// The model has no token for some character and no unknown token either.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let piece_bytes = if self.can_cut { PIECE_BYTES } else { usize::MAX / 4 };
        self.encode_in_pieces(text, piece_bytes, &mut ids)?;
        Ok(ids)
    }

    fn encode_in_pieces(&self, text: &str, piece_bytes: usize, ids: &mut Vec<u32>) -> Result<()> {
        for piece in exact_pieces(text, piece_bytes) {
            ids.extend_from_slice(encode(&self.plain, piece, false)?.get_ids());
        }
        Ok(())
    }

    /// Token ids of a prompt: special tokens in the text are recognised, and begin tokens added where
    /// the tokenizer's template asks for them.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok(encode(&self.special, text, true)?.get_ids().to_vec())
    }

    /// Text of token ids; special tokens and unknown ids are left out, bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        // A decoder can only fail on its own configuration; the tokens themselves are then the best answer.
        self.special.decode(ids, true).unwrap_or_else(|_| {
            ids.iter().filter_map(|&id| self.special.id_to_token(id)).collect::<Vec<_>>().concat()
        })
    }

    /// Entries a model needs: the largest id plus 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// The token that ends a document, if the vocabulary has one.
    pub fn eod(&self) -> Option<u32> {
        self.eod
    }

    /// The spelling of the token that ends a document.
    pub fn eod_token(&self) -> Option<String> {
        self.special.id_to_token(self.eod?)
    }

    /// Chooses the token that ends a document.
    ///
    /// # Errors
    /// The vocabulary has no such token.
    pub fn set_eod(&mut self, name: &str) -> Result<()> {
        match self.special.token_to_id(name) {
            Some(id) => {
                self.eod = Some(id);
                Ok(())
            }
            None => {
                let mut special: Vec<&str> = special_names(&self.special).collect();
                special.sort_unstable();
                special.truncate(12);
                Err(Error::user(format!("the tokenizer has no token {name:?} to end documents with"))
                    .hint(format!("its special tokens are {}", special.join(", "))))
            }
        }
    }

    /// XXH3-128 of the tokenizer's JSON, in hexadecimal: equal for equal tokenizers.
    ///
    /// # Errors
    /// As [`Tokenizer::to_json`].
    pub fn hash(&self) -> Result<String> {
        Ok(format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&self.to_json()?)))
    }

    /// Names what token ids depend on: vocabulary, merges, added tokens, normalizer and pre-tokenizer. Equal for tokenizers
    /// that give equal ids by the same rules, however their files are written; templates and decoders do not count.
    ///
    /// # Errors
    /// As [`Tokenizer::to_json`].
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        Fingerprint::of_tokenizer(&self.to_json()?)
    }

    /// How plain text is cut into documents of about this many bytes, or into parts of one.
    pub(crate) fn cut(&self, document_bytes: Option<u64>) -> Cut {
        let piece_bytes = if self.is_byte_level() { PIECE_BYTES } else { OTHER_PIECE_BYTES };
        match document_bytes {
            Some(bytes) => {
                let piece_bytes = bytes.clamp(1, piece_bytes as u64) as usize;
                Cut::Documents { document_bytes: bytes, piece_bytes }
            }
            None if self.can_cut => Cut::Exact(PART_BYTES),
            None => Cut::Whole,
        }
    }

    /// The token's own spelling.
    pub(crate) fn token(&self, id: u32) -> Option<String> {
        self.special.id_to_token(id)
    }

    /// Whether the token is left out of decoded text.
    pub(crate) fn is_special(&self, token: &str) -> bool {
        self.special.get_added_vocabulary().is_special_token(token)
    }

    /// Whether tokens spell bytes as GPT-2's do.
    pub(crate) fn is_byte_level(&self) -> bool {
        matches!(self.special.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
    }

    fn wrap(mut special: tokenizers::Tokenizer) -> Result<Self> {
        let largest = special.get_vocab(true).into_values().max();
        let vocab = largest.map_or(0, |id| id as usize + 1);
        if vocab == 0 {
            return Err(Error::user("the tokenizer's vocabulary is empty"));
        }
        // Both would silently change documents; a corpus is cut and padded by the dataset, not here.
        special.with_padding(None);
        special.with_truncation(None).map_err(|e| Error::failure(format!("prepare tokenizer: {e}")))?;
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        let name = end::by_name(special_names(&special), |name| special.token_to_id(name).is_some());
        let eod = name.and_then(|name| special.token_to_id(&name));
        let rule = |value: serde_json::Result<Value>| {
            value.map_err(|e| Error::failure(format!("read the tokenizer's rules: {e}")))
        };
        let can_cut = rules::can_cut(
            &rule(serde_json::to_value(special.get_normalizer()))?,
            &rule(serde_json::to_value(special.get_pre_tokenizer()))?,
            special.get_added_vocabulary().get_added_tokens_decoder().values(),
        );
        Ok(Tokenizer { plain, special, vocab, eod, can_cut })
    }
}

/// The part of a `tokenizer.json` that is read once more than the library reads it.
#[derive(serde::Deserialize)]
struct Decoder {
    #[serde(default, rename = "decoder")]
    _decoder: Value,
}

/// Calls the library, which panics about some rules and vocabularies that it should refuse.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)) {
        Ok(done) => done.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizers library cannot work with it".to_owned()),
    }
}

fn special_names(inner: &tokenizers::Tokenizer) -> impl Iterator<Item = &str> {
    let added = inner.get_added_vocabulary().get_added_tokens_decoder().values();
    added.filter(|token| token.special).map(|token| token.content.as_str())
}

fn encode(inner: &tokenizers::Tokenizer, text: &str, template: bool) -> Result<tokenizers::Encoding> {
    guarded(|| inner.encode_fast(text, template)).map_err(|e| {
        Error::user(format!("encode text: {e}")).hint("check the tokenizer: it cannot encode this text")
    })
}

fn pre_tokenizer() -> tokenizers::Result<PreTokenizerWrapper> {
    let split = Split::new(SplitPattern::Regex(PATTERN.to_owned()), SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
