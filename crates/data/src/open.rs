use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use spec::{Context, Error, Result};

use crate::batches::TokenStream;
use crate::blend::{Blend, blend_len, blend_parts};
use crate::epochs::Epochs;
use crate::gpt::GptDataset;
use crate::source::Source;
use crate::split::Split;

/// In which order training samples come when the data is seen more than once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Epoch after epoch, so that a longer run starts with the samples of a shorter one (see [`Epochs`]).
    Endless,
    /// Megatron's, which depends on the number of samples asked for (see [`GptDataset`]).
    Megatron,
}

/// What a run reads.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// What [`Source::open`] takes, and its weight; with a single one the weight does not matter.
    pub parts: Vec<(PathBuf, f64)>,
    /// Shares of training, validation and test.
    pub split: Split,
    /// Tokens per sample that the model sees.
    pub sequence: usize,
    /// Seed of all shuffles.
    pub seed: u32,
    /// Entries in the model's vocabulary, against which ids are checked.
    pub vocab: Option<usize>,
    /// Training samples that the run draws in all: steps times global batch.
    pub train_samples: u64,
    /// Samples per evaluation, of a blend; a single dataset offers its whole validation split.
    pub valid_samples: u64,
    /// The order of the training samples.
    pub order: Order,
}

/// The streams of a run.
pub struct Streams {
    /// Training samples.
    pub train: Box<dyn TokenStream>,
    /// Validation samples, one epoch at most.
    pub valid: Option<Box<dyn TokenStream>>,
    /// Why there are no validation samples.
    pub valid_missing: Option<String>,
    /// Tokens in the training split of all parts.
    pub train_tokens: u64,
    /// Tokens in the validation split of all parts.
    pub valid_tokens: u64,
    /// Names the data: equal for equal parts and weights, wherever they lie.
    pub fingerprint: String,
}

/// Opens and checks all parts, splits them and orders their samples.
///
/// # Errors
/// Whatever [`Source::open`], [`Source::check_vocab`], [`GptDataset::new`] and [`Blend::new`] refuse about the training
/// split. A validation split that is empty or too small for one sample is no error; `valid_missing` tells why.
pub fn open_streams(options: &StreamOptions) -> Result<Streams> {
    let mut sources = Vec::with_capacity(options.parts.len());
    let mut fingerprints = Vec::with_capacity(options.parts.len());
    for (path, weight) in &options.parts {
        let source = Source::open(path).context("open data")?;
        if let Some(vocab) = options.vocab {
            source.check_vocab(vocab)?;
        }
        fingerprints.push(match options.parts.len() {
            1 => source.fingerprint()?.to_string(),
            _ => format!("{}*{weight}", source.fingerprint()?),
        });
        sources.push(Arc::new(source));
    }
    if sources.is_empty() {
        return Err(Error::user("no data given").hint("set data.text, data.prefix or data.blend"));
    }
    let parts = |part: usize| -> Vec<(Arc<Source>, Range<usize>)> {
        let ranges = sources.iter().map(|s| options.split.ranges(s.sequences())[part].clone());
        sources.iter().cloned().zip(ranges).collect()
    };
    let (train_parts, valid_parts) = (parts(0), parts(1));
    let (valid, valid_missing) = match valid_stream(options, &valid_parts) {
        Ok(stream) => (Some(stream), None),
        Err(error) => (None, Some(error.to_string())),
    };
    Ok(Streams {
        train: train_stream(options, &train_parts).context("training data")?,
        valid,
        valid_missing,
        train_tokens: tokens(&train_parts),
        valid_tokens: tokens(&valid_parts),
        fingerprint: fingerprints.join(" "),
    })
}

type Parts = [(Arc<Source>, Range<usize>)];

fn tokens(parts: &Parts) -> u64 {
    parts.iter().flat_map(|(source, range)| range.clone().map(|i| source.length(i) as u64)).sum()
}

fn train_stream(options: &StreamOptions, parts: &Parts) -> Result<Box<dyn TokenStream>> {
    let weights = weights(options);
    let wanted = match parts.len() {
        1 => vec![options.train_samples],
        _ => blend_parts(&weights, options.train_samples),
    };
    let make = |(source, range): &(Arc<Source>, Range<usize>), samples: u64| match options.order {
        Order::Endless => endless(options, source, range),
        Order::Megatron => gpt(options, source, range, Some(samples)),
    };
    let mut streams = Vec::with_capacity(parts.len());
    for (part, samples) in parts.iter().zip(wanted) {
        streams.push(make(part, samples)?);
    }
    match (streams.pop(), streams.is_empty()) {
        (Some(only), true) => Ok(only),
        (last, _) => {
            streams.extend(last);
            let samples = blend_len(&weights, options.train_samples);
            Ok(Box::new(Blend::new(streams.into_iter().zip(weights).collect(), samples)?))
        }
    }
}

fn valid_stream(options: &StreamOptions, parts: &Parts) -> Result<Box<dyn TokenStream>> {
    if let [(source, range)] = parts {
        return gpt(options, source, range, None);
    }
    let mut streams = Vec::with_capacity(parts.len());
    for ((source, range), weight) in parts.iter().zip(weights(options)) {
        streams.push((endless(options, source, range)?, weight));
    }
    Ok(Box::new(Blend::new(streams, options.valid_samples)?))
}

fn weights(options: &StreamOptions) -> Vec<f64> {
    options.parts.iter().map(|(_, weight)| *weight).collect()
}

fn endless(
    options: &StreamOptions,
    source: &Arc<Source>,
    range: &Range<usize>,
) -> Result<Box<dyn TokenStream>> {
    let stream = Epochs::new(source.clone(), range.clone(), options.sequence, options.seed, options.vocab)?;
    Ok(Box::new(stream))
}

fn gpt(
    options: &StreamOptions,
    source: &Arc<Source>,
    range: &Range<usize>,
    samples: Option<u64>,
) -> Result<Box<dyn TokenStream>> {
    let dataset = GptDataset::new(source.clone(), range.clone(), options.sequence, samples, options.seed)?;
    Ok(match options.vocab {
        Some(vocab) => Box::new(dataset.with_vocab(vocab)),
        None => Box::new(dataset),
    })
}
