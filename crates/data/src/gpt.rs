use std::ops::Range;
use std::sync::Arc;

use spec::{Error, Result};

use crate::batches::{TokenStream, past_the_end, wrong_buffer};
use crate::random::{Mt19937, numpy_shuffle};
use crate::source::Source;

/// Megatron's order over one split of a source: documents are shuffled and joined, cut into samples of
/// `sequence` tokens (one token of overlap), and the samples are shuffled.
///
/// The three indices equal those of `megatron/core/datasets/gpt_dataset.py` for the same lengths, sequence,
/// number of samples and seed. Kept in memory: 4 bytes per document and epoch, 4 per sample, and one location per
/// 64 documents (the rest of the sample index is walked on demand).
pub struct GptDataset {
    source: Arc<Source>,
    sequence: usize,
    vocab: Option<u32>,
    split: Range<usize>,
    plan: Plan,
    documents: Vec<u32>,
    rows: Vec<Row>,
    /// Samples between two stored rows.
    stride: u64,
    shuffle: Shuffle,
}

/// Where a sample starts: position in the document order, and token within that document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    document: u64,
    offset: u64,
}

/// How often the documents are seen, as Megatron decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    epochs: u64,
    /// Samples in all epochs.
    samples: u64,
    /// Samples shuffled together before the last epoch, when that is shuffled on its own.
    before_final: Option<u64>,
}

enum Shuffle {
    Narrow(Vec<u32>),
    Wide(Vec<u64>),
}

/// Tokens between two stored rows, in average documents: a walk touches about half as many index entries.
const WALK_DOCUMENTS: u64 = 64;
/// More than this in memory for one dataset's indices is refused with the size rather than left to the allocator.
const MAX_INDEX_BYTES: u64 = 64 << 30;

impl GptDataset {
    /// Orders `split` (a range of sequences of `source`, see [`crate::Split`]) for `samples` samples, or one epoch.
    ///
    /// # Errors
    /// A sequence of zero, a split without enough tokens for one sample, more documents or epochs than the format
    /// can count, or indices beyond 64 GiB.
    pub fn new(
        source: Arc<Source>,
        split: Range<usize>,
        sequence: usize,
        samples: Option<u64>,
        seed: u32,
    ) -> Result<Self> {
        let tokens = check_split(&source, &split, sequence)?;
        let plan = Plan::new(tokens, sequence as u64, samples);
        let entries = plan.epochs.saturating_mul(split.len() as u64);
        let bytes = entries.saturating_mul(4).saturating_add(plan.samples.saturating_mul(4));
        if bytes > MAX_INDEX_BYTES || split.end > u32::MAX as usize {
            return Err(Error::user(format!(
                "{}: {} epochs over {} documents and {} samples need an index of {} GiB",
                source.name(),
                plan.epochs,
                split.len(),
                plan.samples,
                bytes >> 30
            ))
            .hint("ask for fewer samples, or join short documents when building the data"));
        }
        let average = (tokens / split.len() as u64).max(1);
        let mut dataset = GptDataset {
            sequence,
            vocab: None,
            plan,
            documents: Vec::with_capacity(entries as usize),
            rows: Vec::new(),
            stride: (WALK_DOCUMENTS * average / sequence as u64).max(1),
            shuffle: Shuffle::for_samples(plan.samples),
            split,
            source,
        };
        dataset.rows.reserve_exact((plan.samples / dataset.stride + 1) as usize);
        dataset.reorder(seed);
        Ok(dataset)
    }

    /// Refuses tokens at or beyond `vocab` when samples are drawn.
    #[must_use]
    pub fn with_vocab(mut self, vocab: usize) -> Self {
        self.vocab = u32::try_from(vocab).ok();
        self
    }

    /// How often the documents are seen.
    pub fn epochs(&self) -> u64 {
        self.plan.epochs
    }

    /// The source underneath.
    pub fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// Entry `position` of Megatron's document index: a sequence number of the source.
    pub fn document_index(&self, position: usize) -> u32 {
        self.documents[position]
    }

    /// Row `index` of Megatron's sample index, `0..=len()`: position in the document index, and token offset.
    pub fn sample_index(&self, index: u64) -> (u64, u64) {
        assert!(index <= self.plan.samples, "row {index} of {}", self.plan.samples);
        let row = self.row(index);
        (row.document, row.offset)
    }

    /// Entry `index` of Megatron's shuffle index: which sample, in document order, is drawn at that position.
    pub fn shuffle_index(&self, index: u64) -> u64 {
        match &self.shuffle {
            Shuffle::Narrow(order) => u64::from(order[index as usize]),
            Shuffle::Wide(order) => order[index as usize],
        }
    }

    /// Builds the three orders for `seed` in the memory that is already there.
    pub(crate) fn reorder(&mut self, seed: u32) {
        let mut state = Mt19937::new(seed);
        self.documents.clear();
        let epochs = self.plan.epochs;
        for _ in 0..epochs {
            self.documents.extend(self.split.clone().map(|d| d as u32));
        }
        let last = self.plan.before_final.map_or(0, |_| self.split.len());
        let (first, last) = self.documents.split_at_mut(epochs as usize * self.split.len() - last);
        numpy_shuffle(&mut state, first);
        numpy_shuffle(&mut state, last);
        self.walk_rows();
        let first = self.plan.before_final.unwrap_or(self.plan.samples) as usize;
        match &mut self.shuffle {
            Shuffle::Narrow(order) => {
                order.clear();
                order.extend(0..self.plan.samples as u32);
                shuffle_parts(&mut state, order, first);
            }
            Shuffle::Wide(order) => {
                order.clear();
                order.extend(0..self.plan.samples);
                shuffle_parts(&mut state, order, first);
            }
        }
    }

    /// Bytes that the three indices take.
    pub(crate) fn index_bytes(&self) -> usize {
        let shuffle = match &self.shuffle {
            Shuffle::Narrow(order) => 4 * order.capacity(),
            Shuffle::Wide(order) => 8 * order.capacity(),
        };
        4 * self.documents.capacity() + 16 * self.rows.capacity() + shuffle
    }

    /// One pass over the documents that keeps the location of every `stride`-th sample.
    fn walk_rows(&mut self) {
        self.rows.clear();
        self.rows.push(Row { document: 0, offset: 0 });
        let step = self.stride * self.sequence as u64;
        let count = self.plan.samples / self.stride + 1;
        let (mut seen, mut next) = (0u64, step);
        for (position, &document) in self.documents.iter().enumerate() {
            let length = self.source.length(document as usize) as u64;
            while next < seen + length && (self.rows.len() as u64) < count {
                self.rows.push(Row { document: position as u64, offset: next - seen });
                next += step;
            }
            seen += length;
        }
    }

    /// Megatron's sample index at `index`: sample `i` starts at token `i * sequence` of the joined documents.
    fn row(&self, index: u64) -> Row {
        let Row { mut document, mut offset } = self.rows[(index / self.stride) as usize];
        let mut ahead = index % self.stride * self.sequence as u64;
        while ahead > 0 {
            let left = self.source.length(self.documents[document as usize] as usize) as u64 - offset;
            if ahead < left {
                return Row { document, offset: offset + ahead };
            }
            ahead -= left;
            document += 1;
            offset = 0;
            if ahead == 0 {
                // Empty documents hold no token, so the location is in the next one that does.
                while self.source.length(self.documents[document as usize] as usize) == 0 {
                    document += 1;
                }
            }
        }
        Row { document, offset }
    }
}

impl TokenStream for GptDataset {
    fn sample(&self, index: u64, out: &mut [u32]) -> Result<()> {
        if index >= self.plan.samples {
            return Err(past_the_end(index, self.plan.samples, &self.source.name()));
        }
        if out.len() != self.sequence + 1 {
            return Err(wrong_buffer(out.len(), self.sequence));
        }
        let row = self.row(self.shuffle_index(index));
        let (mut position, mut offset) = (row.document as usize, row.offset as usize);
        let mut filled = 0;
        while filled < out.len() {
            let document = self.documents[position] as usize;
            let count = (self.source.length(document) - offset).min(out.len() - filled);
            let part = &mut out[filled..filled + count];
            self.source.read(document, offset, part)?;
            if let Some(vocab) = self.vocab
                && let Some(at) = part.iter().position(|&t| t >= vocab)
            {
                return Err(self.source.bad_token(document, offset + at, part[at], vocab as usize));
            }
            filled += count;
            position += 1;
            offset = 0;
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.plan.samples
    }

    fn sequence(&self) -> usize {
        self.sequence
    }
}

impl Plan {
    /// Smallest number of epochs with enough tokens; the last one is set apart when less than 80 % of it is needed.
    fn new(tokens: u64, sequence: u64, samples: Option<u64>) -> Plan {
        let wanted = samples.map_or(0, |n| n.saturating_mul(sequence).saturating_add(1));
        let epochs = wanted.div_ceil(tokens).max(1);
        let in_epochs = |epochs: u64| (epochs.saturating_mul(tokens) - 1) / sequence;
        let mut plan = Plan { epochs, samples: in_epochs(epochs), before_final: None };
        if let Some(requested) = samples
            && epochs > 1
        {
            let before = in_epochs(epochs - 1);
            let threshold = (0.80 * in_epochs(1) as f64) as u64;
            plan.before_final = (requested.saturating_sub(before) < threshold).then_some(before);
        }
        plan
    }
}

impl Shuffle {
    /// 32-bit entries below 2^32 - 2 samples, as Megatron chooses.
    fn for_samples(samples: u64) -> Shuffle {
        if samples < u64::from(u32::MAX - 1) {
            Shuffle::Narrow(Vec::with_capacity(samples as usize))
        } else {
            Shuffle::Wide(Vec::with_capacity(samples as usize))
        }
    }
}

fn shuffle_parts<T>(state: &mut Mt19937, order: &mut [T], first: usize) {
    let (first, rest) = order.split_at_mut(first);
    numpy_shuffle(state, first);
    numpy_shuffle(state, rest);
}

/// The tokens of a split, if they suffice for one sample.
fn check_split(source: &Source, split: &Range<usize>, sequence: usize) -> Result<u64> {
    if sequence == 0 {
        return Err(Error::user("a sequence of 0 tokens").hint("set batch.sequence to at least 1"));
    }
    if split.end > source.sequences() {
        return Err(Error::failure(format!(
            "split {split:?} of {}, which has {} sequences",
            source.name(),
            source.sequences()
        )));
    }
    if split.is_empty() {
        return Err(Error::user(format!(
            "the split of {} is empty: its share of {} documents rounds to none",
            source.name(),
            source.sequences()
        ))
        .hint("give the split a larger share (data.split), or build the data in smaller documents"));
    }
    let tokens: u64 = split.clone().map(|i| source.length(i) as u64).sum();
    if tokens < sequence as u64 + 1 {
        let hint = match tokens {
            0 | 1 => "give more data".to_owned(),
            _ => format!("lower batch.sequence to at most {}, or give more data", tokens - 1),
        };
        return Err(Error::user(format!(
            "{}: the split has {tokens} tokens, but one sample of sequence {sequence} takes {}",
            source.name(),
            sequence + 1
        ))
        .hint(hint));
    }
    Ok(tokens)
}
