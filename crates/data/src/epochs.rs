use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use spec::Result;

use crate::batches::{TokenStream, past_the_end};
use crate::gpt::GptDataset;
use crate::source::Source;

/// An endless stream: epoch after epoch of one split, each in Megatron's one-epoch order under seed + epoch.
///
/// Megatron fixes the order for a total number of samples, so asking for more steps reorders everything when it
/// changes the number of epochs. Here sample `i` depends on (data, seed, sequence, `i`) only, so a run can be
/// prolonged; within the first epoch the order is Megatron's.
pub struct Epochs {
    /// Two epochs are in use at once where a batch crosses from one to the next.
    slots: [RwLock<Slot>; 2],
    source: Arc<Source>,
    split: Range<usize>,
    sequence: usize,
    seed: u32,
    vocab: Option<usize>,
    samples_per_epoch: u64,
}

struct Slot {
    dataset: Option<GptDataset>,
    epoch: Option<u64>,
}

/// Up to this size the second slot is filled at once, so that no step allocates it.
const EAGER_BYTES: usize = 64 << 20;

impl Epochs {
    /// The endless order of `split` (a range of sequences of `source`); tokens at or beyond `vocab` are refused.
    ///
    /// # Errors
    /// As [`GptDataset::new`].
    pub fn new(
        source: Arc<Source>,
        split: Range<usize>,
        sequence: usize,
        seed: u32,
        vocab: Option<usize>,
    ) -> Result<Self> {
        let empty = || RwLock::new(Slot { dataset: None, epoch: None });
        let mut stream =
            Epochs { slots: [empty(), empty()], source, split, sequence, seed, vocab, samples_per_epoch: 0 };
        let first = stream.make(0)?;
        stream.samples_per_epoch = first.len();
        if first.index_bytes() <= EAGER_BYTES {
            stream.slots[1] = RwLock::new(Slot { dataset: Some(stream.make(1)?), epoch: Some(1) });
        }
        stream.slots[0] = RwLock::new(Slot { dataset: Some(first), epoch: Some(0) });
        Ok(stream)
    }

    /// Samples in each epoch.
    pub fn samples_per_epoch(&self) -> u64 {
        self.samples_per_epoch
    }

    fn epoch_seed(&self, epoch: u64) -> u32 {
        self.seed.wrapping_add(epoch as u32)
    }

    fn make(&self, epoch: u64) -> Result<GptDataset> {
        let seed = self.epoch_seed(epoch);
        let dataset = GptDataset::new(self.source.clone(), self.split.clone(), self.sequence, None, seed)?;
        Ok(match self.vocab {
            Some(vocab) => dataset.with_vocab(vocab),
            None => dataset,
        })
    }
}

impl TokenStream for Epochs {
    fn sample(&self, index: u64, out: &mut [u32]) -> Result<()> {
        if index == u64::MAX {
            return Err(past_the_end(index, u64::MAX, &self.source.name()));
        }
        let (epoch, within) = (index / self.samples_per_epoch, index % self.samples_per_epoch);
        let slot = &self.slots[(epoch % 2) as usize];
        {
            let slot = slot.read().unwrap_or_else(PoisonError::into_inner);
            if let (Some(dataset), true) = (&slot.dataset, slot.epoch == Some(epoch)) {
                return dataset.sample(within, out);
            }
        }
        let mut slot = slot.write().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut *slot;
        if slot.epoch != Some(epoch) {
            // Unset first: a panic half-way must not leave an order that claims to be whole.
            slot.epoch = None;
            match &mut slot.dataset {
                Some(dataset) => dataset.reorder(self.epoch_seed(epoch)),
                None => slot.dataset = Some(self.make(epoch)?),
            }
            slot.epoch = Some(epoch);
        }
        match &slot.dataset {
            Some(dataset) => dataset.sample(within, out),
            None => Err(past_the_end(index, 0, &self.source.name())),
        }
    }

    fn len(&self) -> u64 {
        u64::MAX
    }

    fn sequence(&self) -> usize {
        self.sequence
    }
}
