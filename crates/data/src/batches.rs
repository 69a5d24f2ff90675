use std::sync::Arc;

use spec::{Error, Result};

/// Samples of a fixed number of tokens in a fixed order; reading allocates nothing and may happen from many threads.
pub trait TokenStream: Send + Sync {
    /// Copies sample `index` into `out`, which holds [`TokenStream::sequence`] + 1 tokens: inputs are all but the last,
    /// targets all but the first.
    ///
    /// # Errors
    /// `index` is beyond the stream, `out` has another length, or a token is outside the vocabulary.
    fn sample(&self, index: u64, out: &mut [u32]) -> Result<()>;

    /// Number of samples; `u64::MAX` where the stream has no end.
    fn len(&self) -> u64;

    /// Whether there are no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that the model sees per sample, the extra target not counted.
    fn sequence(&self) -> usize;
}

impl<T: TokenStream + ?Sized> TokenStream for Arc<T> {
    fn sample(&self, index: u64, out: &mut [u32]) -> Result<()> {
        (**self).sample(index, out)
    }

    fn len(&self) -> u64 {
        (**self).len()
    }

    fn sequence(&self) -> usize {
        (**self).sequence()
    }
}

/// The trainer's order: step `k` holds samples `k * global_batch .. (k + 1) * global_batch` of its stream.
///
/// What a step holds depends on the stream and the global batch alone, so any number of ranks, any micro-batch
/// and any restart see the same samples at the same step, each exactly once.
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// # let prefix = dir.path().join("corpus");
/// # let mut writer = data::IndexedWriter::create(&prefix, data::TokenType::U16)?;
/// # writer.push(&(0..1000).collect::<Vec<u32>>())?;
/// # writer.end_document()?;
/// # writer.finish()?;
/// use data::{Batches, GptDataset, Source};
///
/// let source = std::sync::Arc::new(Source::open(&prefix)?);
/// let stream = GptDataset::new(source, 0..1, 16, None, 1234)?;
/// let batches = Batches::new(stream, 4)?;
/// let mut tokens = [0; 17];
/// batches.read(3, 1, &mut tokens)?; // step 3, sequence 1: sample 13
/// assert_eq!(batches.index(3, 1), 13);
/// # Ok::<(), spec::Error>(())
/// ```
pub struct Batches<S> {
    stream: S,
    global_batch: u64,
}

impl<S: TokenStream> Batches<S> {
    /// Batches of `global_batch` sequences.
    ///
    /// # Errors
    /// A batch of zero, or one larger than the whole stream.
    pub fn new(stream: S, global_batch: u64) -> Result<Self> {
        if global_batch == 0 || global_batch > stream.len() {
            return Err(Error::user(format!(
                "a global batch of {global_batch} sequences over {} samples",
                stream.len()
            ))
            .hint("lower batch.sequences, shorten batch.sequence, or give more data"));
        }
        Ok(Batches { stream, global_batch })
    }

    /// The sample at position `sequence` of step `step` (both from 0).
    pub fn index(&self, step: u64, sequence: u64) -> u64 {
        debug_assert!(sequence < self.global_batch);
        step.saturating_mul(self.global_batch).saturating_add(sequence)
    }

    /// Copies the tokens at position `sequence` of step `step` into `out`, as [`TokenStream::sample`].
    ///
    /// # Errors
    /// The step is beyond the stream, or as [`TokenStream::sample`].
    pub fn read(&self, step: u64, sequence: u64, out: &mut [u32]) -> Result<()> {
        self.stream.sample(self.index(step, sequence), out)
    }

    /// Whole steps in the stream.
    pub fn steps(&self) -> u64 {
        self.stream.len() / self.global_batch
    }

    /// Sequences per step.
    pub fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// The stream underneath.
    pub fn stream(&self) -> &S {
        &self.stream
    }
}

pub(crate) fn past_the_end(index: u64, len: u64, name: &str) -> Error {
    Error::user(format!("sample {index} of {name}: it holds {len}"))
        .hint("ask for fewer steps, or more samples when the stream is made")
}

pub(crate) fn wrong_buffer(found: usize, sequence: usize) -> Error {
    Error::failure(format!(
        "a sample buffer of {found} tokens, expected {} (sequence {sequence} + 1)",
        sequence + 1
    ))
}

/// Names a sample: XXH3-64 over its index and its tokens. Sums of them, modulo 2^64, name sets of samples in any order.
pub fn sample_xxh3(index: u64, tokens: &[u32]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    hash.update(&index.to_le_bytes());
    let mut block = [0; 4 * 256];
    for tokens in tokens.chunks(256) {
        for (bytes, token) in block.chunks_exact_mut(4).zip(tokens) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        hash.update(&block[..4 * tokens.len()]);
    }
    hash.digest()
}
