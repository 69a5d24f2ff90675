use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use rayon::prelude::*;
use spec::{Error, Result};

use crate::atomic::write_file;
use crate::fingerprint::Fingerprint;
use crate::index_writer::IndexedWriter;
use crate::indexed::with_suffix;
use crate::input::{Body, Input, Item, Reader, TextOptions, check_field, resolve};
use crate::json::json_text;
use crate::manifest::{MANIFEST_VERSION, Manifest};
use crate::pieces::Cut;
use crate::progress::{OnProgress, Progress, Stage};
use crate::skipped::Skipped;
use crate::token_type::TokenType;
use crate::tokenizer::{MIN_VOCAB, Tokenizer};

/// What to tokenise, and into which dataset.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Files, directories (all files that are not hidden) and patterns (`*`, `?`, `**`), plain or packed by gzip or
    /// zstd. A file of JSON lines or a JSON array holds many documents, told by its content; every other file is one.
    pub inputs: Vec<PathBuf>,
    /// The dataset becomes `PREFIX.bin`, `.idx`, `.json` and `.tokenizer.json`.
    pub prefix: PathBuf,
    /// How documents in text are described.
    pub text: TextOptions,
    /// Whether the tokenizer's end-of-document token follows each document.
    pub append_end: bool,
    /// Cut plain text into documents of about this many bytes.
    pub document_bytes: Option<u64>,
    /// Recorded in the manifest of a prepared dataset.
    pub(crate) text_key: Option<Fingerprint>,
    /// The same, where documents are not described as usual.
    pub(crate) options_key: Option<String>,
    /// Threads that encode; `None` for rayon's own number. The result does not depend on it.
    pub threads: Option<usize>,
}

impl BuildOptions {
    /// The usual options: field `text`, an end token after each document, no cutting.
    pub fn new(inputs: Vec<PathBuf>, prefix: impl Into<PathBuf>) -> Self {
        BuildOptions {
            inputs,
            prefix: prefix.into(),
            text: TextOptions::default(),
            append_end: true,
            document_bytes: None,
            text_key: None,
            options_key: None,
            threads: None,
        }
    }
}

/// What a build wrote.
#[derive(Clone, Debug)]
pub struct BuildReport {
    /// The facts that were stored beside the data.
    pub manifest: Manifest,
    /// The copy of the tokenizer beside the data.
    pub tokenizer_path: PathBuf,
    /// Inputs that were left out.
    pub skipped: Skipped,
}

/// Said where documents run into each other.
const NO_END: &str = "the tokenizer has no token that is known to end a document, so none was appended: name one with --eod NAME (data.eod)";
/// Text for the tokenizer to learn from is taken in parts of this size.
const SAMPLE_BYTES: usize = 64 << 10;
/// Text gathered before the encoding threads share it.
const BATCH_BYTES: u64 = 8 << 20;
/// Batches read ahead of the encoder; with the one being read and the one being encoded, four are in memory.
const BATCHES_AHEAD: usize = 2;

/// Bytes between two calls of the progress callback.
const PROGRESS_BYTES: u64 = 64 << 10;

/// Where the tokenizer of a dataset lies: `PREFIX.tokenizer.json`, or `tokenizer.json` beside it.
pub fn tokenizer_path(prefix: &Path) -> PathBuf {
    let own = with_suffix(prefix, ".tokenizer.json");
    let shared = prefix.with_file_name("tokenizer.json");
    if !own.exists() && shared.exists() { shared } else { own }
}

/// Tokenises text into a dataset, in parallel and in bounded memory; the output appears whole or not at all.
///
/// # Errors
/// No input, an input that is missing or of a format that is not read, a JSON document without the text field (unless
/// bad ones are to be skipped), no text at all, or an output directory that cannot be written. Files that are not UTF-8
/// or cannot be read are left out and counted.
pub fn build(options: &BuildOptions, tokenizer: &Tokenizer, progress: OnProgress<'_>) -> Result<BuildReport> {
    let mut inputs = resolve(&options.inputs)?;
    // Building a directory into itself again must not take the old output for text.
    let outputs = [".bin", ".idx", ".json", ".tokenizer.json"].map(|s| with_suffix(&options.prefix, s));
    inputs.retain(|input| !outputs.iter().any(|output| *output == *input.path));
    build_inputs(options, &inputs, tokenizer, progress)
}

pub(crate) fn build_inputs(
    options: &BuildOptions,
    inputs: &[Input],
    tokenizer: &Tokenizer,
    progress: OnProgress<'_>,
) -> Result<BuildReport> {
    // Asked for first: an output that cannot be written should not cost an hour of encoding.
    let writer = IndexedWriter::create(&options.prefix, TokenType::for_vocab(tokenizer.vocab_size()))?;
    let pool = match options.threads {
        Some(threads) => Some(
            rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .map_err(|e| Error::failure(format!("start {threads} encoding threads: {e}")))?,
        ),
        None => None,
    };
    let mut encoder = Encoder::new(options, tokenizer, inputs, progress, writer);
    let (sender, receiver) = sync_channel::<Vec<Item>>(BATCHES_AHEAD);
    check_field(inputs, &options.text)?;
    let skipped = thread::scope(|scope| {
        let read = move || {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let mut reader = Reader {
                emit: |item: Item| {
                    bytes += item.source_bytes;
                    batch.push(item);
                    if bytes < BATCH_BYTES {
                        return true;
                    }
                    bytes = 0;
                    sender.send(std::mem::take(&mut batch)).is_ok()
                },
                cut: tokenizer.cut(options.document_bytes),
                options: &options.text,
                skipped: Skipped::default(),
            };
            reader.read_all(inputs)?;
            let skipped = std::mem::take(&mut reader.skipped);
            // A closed channel means that encoding failed, which is reported there.
            let _ = sender.send(batch);
            Ok(skipped)
        };
        let reading = thread::Builder::new().spawn_scoped(scope, read).map_err(|e| {
            Error::failure(format!("start a reading thread: {e}"))
                .hint("raise the limit on threads: ulimit -u")
        })?;
        let encoded = match &pool {
            Some(pool) => pool.install(|| encoder.run(receiver)),
            None => encoder.run(receiver),
        };
        let read = reading.join().unwrap_or_else(|_| Err(Error::failure("the reading thread panicked")));
        encoded.and(read)
    })?;
    encoder.finish(skipped)
}

/// What became of an item.
enum Encoded {
    /// Its tokens, and bytes of text.
    Tokens(Vec<u32>, u64),
    /// Left out, and why.
    Bad(String),
}

/// Encodes batches in parallel and writes them in order.
struct Encoder<'a> {
    options: &'a BuildOptions,
    tokenizer: &'a Tokenizer,
    progress: OnProgress<'a>,
    writer: IndexedWriter,
    total_bytes: u64,
    done_bytes: AtomicU64,
    text_bytes: u64,
    left_out: Skipped,
    counts: Vec<u64>,
    in_document: u64,
}

impl<'a> Encoder<'a> {
    fn new(
        options: &'a BuildOptions,
        tokenizer: &'a Tokenizer,
        inputs: &[Input],
        progress: OnProgress<'a>,
        writer: IndexedWriter,
    ) -> Self {
        Encoder {
            options,
            tokenizer,
            progress,
            writer,
            total_bytes: inputs.iter().map(|i| i.bytes).sum(),
            done_bytes: AtomicU64::new(0),
            text_bytes: 0,
            left_out: Skipped::default(),
            counts: vec![0; tokenizer.vocab_size()],
            in_document: 0,
        }
    }

    /// Takes the receiver whole: when it fails and drops it, the reader stops too.
    fn run(&mut self, batches: Receiver<Vec<Item>>) -> Result<()> {
        for batch in batches {
            let encoded: Vec<Result<Encoded>> = batch.par_iter().map(|item| self.encode(item)).collect();
            for (item, encoded) in batch.iter().zip(encoded) {
                let (tokens, text_bytes) = match encoded? {
                    Encoded::Tokens(tokens, text_bytes) => (tokens, text_bytes),
                    Encoded::Bad(message) => {
                        self.left_out.bad_document(message);
                        continue;
                    }
                };
                self.text_bytes += text_bytes;
                self.append(&tokens)?;
                if item.ends_document {
                    self.end_document()?;
                }
            }
        }
        Ok(())
    }

    fn encode(&self, item: &Item) -> Result<Encoded> {
        let text: Cow<'_, str> = match &item.body {
            Body::Text(text) => text.into(),
            Body::Json { bytes, path, line, strings } => {
                let found = json_text(bytes, self.options.text.field(), *strings)
                    .map_err(|e| e.context(format_args!("{}:{line}", path.display())));
                match found {
                    Ok(text) => text.into(),
                    Err(e) if self.options.text.skip_bad => return Ok(Encoded::Bad(e.to_string())),
                    Err(e) => return Err(e),
                }
            }
            Body::Nothing => "".into(),
        };
        let tokens = self.tokenizer.encode(&text)?;
        let before = self.done_bytes.fetch_add(item.source_bytes, Ordering::Relaxed);
        let done_bytes = before + item.source_bytes;
        if before / PROGRESS_BYTES != done_bytes / PROGRESS_BYTES || done_bytes == self.total_bytes {
            (self.progress)(Progress { stage: Stage::Encode, done_bytes, total_bytes: self.total_bytes });
        }
        Ok(Encoded::Tokens(tokens, text.len() as u64))
    }

    fn append(&mut self, tokens: &[u32]) -> Result<()> {
        for &token in tokens {
            self.counts[token as usize] += 1;
        }
        self.in_document += tokens.len() as u64;
        self.writer.push(tokens)
    }

    fn end_document(&mut self) -> Result<()> {
        if self.in_document == 0 {
            self.left_out.empty += 1;
            return Ok(());
        }
        if let Some(end) = self.tokenizer.eod().filter(|_| self.options.append_end) {
            self.append(&[end])?;
        }
        self.in_document = 0;
        self.writer.end_document()
    }

    fn warnings(&self, skipped: &Skipped) -> Vec<String> {
        let mut lines = skipped.warnings();
        if self.options.append_end && self.tokenizer.eod().is_none() {
            lines.push(NO_END.to_owned());
        }
        lines
    }

    fn finish(mut self, mut skipped: Skipped) -> Result<BuildReport> {
        skipped.add(std::mem::take(&mut self.left_out));
        if self.writer.tokens() == 0 {
            return Err(Error::user(format!(
                "no text in the input: {} files are not UTF-8, {} unreadable, {} without text, {} bad documents{}",
                skipped.not_utf8,
                skipped.unreadable,
                skipped.empty,
                skipped.bad_documents,
                skipped.messages.first().map(|m| format!(" ({m})")).unwrap_or_default()
            ))
            .hint("give files of UTF-8 text, or JSON lines with a text field"));
        }
        let tokenizer_json = self.tokenizer.to_json()?;
        let tokenizer_path = with_suffix(&self.options.prefix, ".tokenizer.json");
        let mut manifest = Manifest {
            version: MANIFEST_VERSION,
            documents: self.writer.documents(),
            tokens: self.writer.tokens(),
            text_bytes: self.text_bytes,
            token_type: TokenType::for_vocab(self.tokenizer.vocab_size()).name().to_owned(),
            vocab: self.tokenizer.vocab_size(),
            max_token: self.counts.iter().rposition(|&n| n > 0).unwrap_or(0) as u32,
            unigram_entropy_nats: entropy_nats(&self.counts),
            end_of_document: self.tokenizer.eod().filter(|_| self.options.append_end),
            tokenizer_xxh3: format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&tokenizer_json)),
            tokenizer_fingerprint: Some(Fingerprint::of_tokenizer(&tokenizer_json)?),
            tokens_xxh3: String::new(),
            not_utf8: skipped.not_utf8,
            unreadable: skipped.unreadable,
            empty: skipped.empty,
            bad_documents: skipped.bad_documents,
            warnings: self.warnings(&skipped),
            text_key: self.options.text_key,
            options_key: self.options.options_key.clone(),
        };
        self.writer.finish_with(|hash| {
            manifest.tokens_xxh3 = format!("{hash:032x}");
            write_file(&tokenizer_path, &tokenizer_json)?;
            write_file(&Manifest::path(&self.options.prefix), &manifest.to_json()?)
        })?;
        Ok(BuildReport { manifest, tokenizer_path, skipped })
    }
}

/// Entropy of a frequency table in nats: `-sum p ln p`.
pub(crate) fn entropy_nats(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    counts.iter().filter(|&&n| n > 0).map(|&n| n as f64 / total).map(|p| -p * p.ln()).sum()
}

/// Trains a tokenizer on a sample of about `sample_bytes` bytes, spread evenly over the inputs of `options`.
///
/// # Errors
/// As [`build`] and [`Tokenizer::train`].
pub fn train_tokenizer(
    options: &BuildOptions,
    vocab_size: usize,
    sample_bytes: u64,
    progress: OnProgress<'_>,
) -> Result<Tokenizer> {
    let inputs = resolve(&options.inputs)?;
    check_field(&inputs, &options.text)?;
    train_on_inputs(&inputs, &options.text, vocab_size, sample_bytes, progress)
}

pub(crate) fn train_on_inputs(
    inputs: &[Input],
    options: &TextOptions,
    vocab_size: usize,
    sample_bytes: u64,
    progress: OnProgress<'_>,
) -> Result<Tokenizer> {
    let total_bytes: u64 = inputs.iter().map(|i| i.bytes).sum();
    let (mut seen, mut kept) = (0u64, 0u64);
    let mut sample: Vec<String> = Vec::new();
    let mut failed = None;
    let mut reader = Reader {
        emit: |item: Item| {
            seen += item.source_bytes;
            // Keeps the share of the sample in what was seen so far equal to its share of the whole.
            let due = u128::from(seen) * u128::from(sample_bytes) / u128::from(total_bytes.max(1));
            if u128::from(kept) >= due {
                return true;
            }
            kept += item.text_bytes;
            match item.body {
                Body::Text(text) => sample.push(text),
                Body::Json { bytes, path, line, strings } => {
                    match json_text(&bytes, options.field(), strings) {
                        Ok(text) => sample.push(text),
                        Err(_) if options.skip_bad => {}
                        Err(e) => {
                            failed = Some(e.context(format_args!("{}:{line}", path.display())));
                            return false;
                        }
                    }
                }
                Body::Nothing => {}
            }
            progress(Progress { stage: Stage::Collect, done_bytes: seen, total_bytes });
            true
        },
        cut: Cut::Sample(SAMPLE_BYTES),
        options,
        skipped: Skipped::default(),
    };
    reader.read_all(inputs)?;
    let left_out = reader.skipped.warnings();
    if let Some(error) = failed {
        return Err(error);
    }
    if sample.iter().all(|text| text.is_empty()) {
        let why: String = left_out.iter().map(|w| format!("; {w}")).collect();
        return Err(Error::user(format!("train tokenizer: no text in the input{why}"))
            .hint("give files of UTF-8 text, plain, packed with gzip or zstd, or in JSON"));
    }
    let total_bytes = sample.iter().map(|t| t.len() as u64).sum();
    // Every entry beyond the bytes joins two others somewhere in the text: what is asked for beyond that would only be
    // allocated.
    let vocab_size =
        vocab_size.min(usize::try_from(total_bytes).unwrap_or(usize::MAX).saturating_add(MIN_VOCAB));
    let counted = |p: Progress| progress(Progress { total_bytes, ..p });
    Tokenizer::train(sample, vocab_size, &counted)
}
