use std::collections::HashMap;

use serde::Serialize;
use spec::Result;

use crate::builder::entropy_nats;
use crate::manifest::Manifest;
use crate::source::Source;
use crate::tokenizer::Tokenizer;

/// What is in a dataset.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The path it was opened by.
    pub name: String,
    /// Documents.
    pub documents: u64,
    /// Sequences, the unit of splits.
    pub sequences: u64,
    /// Tokens.
    pub tokens: u64,
    /// Storage of a token, such as `u16`.
    pub token_type: &'static str,
    /// Lengths of the sequences.
    pub lengths: Lengths,
    /// Entropy of the tokens' frequencies in nats per token: the loss of the best model that ignores context.
    pub unigram_entropy_nats: f64,
    /// Tokens that the entropy, the distinct ids and the largest one were counted over.
    pub counted_tokens: u64,
    /// How many ids occur.
    pub distinct_tokens: u64,
    /// The largest id that occurs.
    pub max_token: u32,
    /// The start of the first document with a token, as ids.
    pub first_tokens: Vec<u32>,
    /// The same as text, if a tokenizer was given.
    pub first_text: Option<String>,
    /// What was stored beside the data when it was built.
    pub manifest: Option<Manifest>,
}

/// Lengths of sequences, in tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest.
    pub min: u64,
    /// Half are shorter.
    pub median: u64,
    /// Tokens over sequences.
    pub mean: f64,
    /// The longest.
    pub max: u64,
    /// How many sequences lie in each range `[from, 2 * from)`; the first is `[0, 1)`. Empty ranges are left out.
    pub histogram: Vec<Bucket>,
}

/// A range of lengths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// Shortest length in the range.
    pub from: u64,
    /// First length beyond it.
    pub to: u64,
    /// Sequences in the range.
    pub sequences: u64,
}

/// Of larger data, this many tokens spread over the sequences are counted.
const MAX_COUNTED: u64 = 1 << 28;
/// Tokens of the first document shown.
const FIRST_TOKENS: usize = 128;
/// Ids below this, or below the number of tokens, are counted in a table; larger ones by themselves, so that a short file
/// with a large id takes little memory.
const TABLE_IDS: usize = 1 << 14;

/// Looks through a dataset; with a tokenizer, the first document is shown as text.
///
/// # Errors
/// A sequence cannot be read.
pub fn show(source: &Source, tokenizer: Option<&Tokenizer>) -> Result<Summary> {
    let sequences = source.sequences();
    let mut lengths: Vec<u64> = (0..sequences).map(|i| source.length(i) as u64).collect();
    let first = lengths.iter().position(|&n| n > 0).unwrap_or(0);
    let mut first_tokens = vec![0; source.length(first).min(FIRST_TOKENS)];
    source.read(first, 0, &mut first_tokens)?;
    lengths.sort_unstable();
    let frequencies = count(source)?;
    let manifest = match source {
        Source::Indexed(dataset) => Manifest::load(dataset.prefix()).ok(),
        Source::Shards(_) => None,
    };
    Ok(Summary {
        name: source.name(),
        documents: source.documents() as u64,
        sequences: sequences as u64,
        tokens: source.tokens(),
        token_type: source.token_type().name(),
        lengths: Lengths {
            min: lengths[0],
            median: lengths[sequences / 2],
            mean: source.tokens() as f64 / sequences as f64,
            max: lengths[sequences - 1],
            histogram: histogram(&lengths),
        },
        unigram_entropy_nats: entropy_nats(&frequencies.counts),
        counted_tokens: frequencies.total,
        distinct_tokens: frequencies.counts.iter().filter(|&&n| n > 0).count() as u64,
        max_token: frequencies.max_token,
        first_text: tokenizer.map(|t| t.decode(&first_tokens)),
        first_tokens,
        manifest,
    })
}

struct Frequencies {
    counts: Vec<u64>,
    total: u64,
    max_token: u32,
}

/// Counts all tokens, or of large data every so many blocks.
fn count(source: &Source) -> Result<Frequencies> {
    const BLOCK: usize = 4096;
    let every = source.tokens().div_ceil(MAX_COUNTED).max(1);
    let mut found = Frequencies { counts: Vec::new(), total: 0, max_token: 0 };
    let table = usize::try_from(source.tokens()).unwrap_or(usize::MAX).max(TABLE_IDS);
    let mut others: HashMap<u32, u64> = HashMap::new();
    let mut block = 0u64;
    let mut tokens = [0u32; BLOCK];
    for sequence in 0..source.sequences() {
        let length = source.length(sequence);
        for from in (0..length).step_by(BLOCK) {
            block += 1;
            if !(block - 1).is_multiple_of(every) {
                continue;
            }
            let tokens = &mut tokens[..BLOCK.min(length - from)];
            source.read(sequence, from, tokens)?;
            for &token in tokens.iter() {
                let id = token as usize;
                if id >= found.counts.len() && id < table {
                    found.counts.resize((id + 1).next_power_of_two().min(table), 0);
                }
                match found.counts.get_mut(id) {
                    Some(count) => *count += 1,
                    None => *others.entry(token).or_insert(0) += 1,
                }
                found.max_token = found.max_token.max(token);
            }
            found.total += tokens.len() as u64;
        }
    }
    // For the entropy and the number of distinct ids it does not matter which ids they are; sorted, sums stay the same.
    let mut others: Vec<(u32, u64)> = others.into_iter().collect();
    others.sort_unstable();
    found.counts.extend(others.into_iter().map(|(_, count)| count));
    Ok(found)
}

fn histogram(lengths: &[u64]) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for &length in lengths {
        let from = if length == 0 { 0 } else { 1 << length.ilog2() };
        match buckets.last_mut() {
            Some(bucket) if bucket.from == from => bucket.sequences += 1,
            _ => buckets.push(Bucket { from, to: (2 * from).max(1), sequences: 1 }),
        }
    }
    buckets
}
