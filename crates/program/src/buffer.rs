//! Buffers of a rank's arena and parts of them.

use std::ops::Range;

use serde::Serialize;
use spec::DType;

use crate::params::GroupId;
use crate::role::Place;

/// Index of a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct BufferId(pub u32);

/// A named run of bytes with a two-dim shape.
#[derive(Clone, Debug, Serialize)]
pub struct Buffer {
    /// What it holds.
    pub name: String,
    /// Local rows.
    pub rows: usize,
    /// Local columns.
    pub cols: usize,
    /// Element type.
    pub dtype: DType,
    /// Where it lies.
    pub home: Home,
    /// Which part of the step it belongs to.
    pub place: Place,
}

impl Buffer {
    /// Elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }
}

/// Where a buffer lies in the rank's arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Home {
    /// For the whole run, at this offset.
    Static {
        /// Bytes from the start of the arena.
        offset: usize,
    },
    /// While a micro-batch is in flight: at this offset in each slot of the chunk.
    Slot {
        /// Which chunk.
        chunk: usize,
        /// Bytes from the start of the slot.
        offset: usize,
        /// Alive from this op to that one, counted over the chunk's blocks.
        alive: (usize, usize),
    },
    /// While a block runs: at this offset in the scratch region.
    Scratch {
        /// Bytes from the start of the region.
        offset: usize,
        /// Alive from this op to that one, counted over the chunk's blocks.
        alive: (usize, usize),
    },
    /// Rows of the current micro-batch inside a static buffer.
    MicroBatch {
        /// Bytes of the whole step's buffer from the start of the arena.
        offset: usize,
    },
}

/// Some rows of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct View {
    /// Which buffer.
    pub buffer: BufferId,
    /// First row.
    pub row0: usize,
    /// Rows.
    pub rows: usize,
}

/// Some elements of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Slice {
    /// Which buffer.
    pub buffer: BufferId,
    /// First element.
    pub first: usize,
    /// Elements. Gradients that are reduced together run on into the buffers that lie behind.
    pub count: usize,
}

/// A run of elements of a parameter group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Owned {
    /// First element.
    pub first: usize,
    /// Elements.
    pub count: usize,
}

impl Owned {
    /// The same as a range.
    pub fn range(self) -> Range<usize> {
        self.first..self.first + self.count
    }
}

/// Where a weight gradient goes.
///
/// Per-sequence gradients are summed in a fixed tree (`spec::SumTree`). The tree inside the op has radices `inner`
/// (bottom-up); the op's result then arrives at the counter with radices `outer`, whose partial sums lie one after
/// another in `levels`, lowest first; the last of them is `sum` in the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GradOut {
    /// Whose gradient.
    pub group: GroupId,
    /// The buffer of all of this rank's sum, once the step's micro-batches are done.
    pub sum: BufferId,
    /// Partial sums, each shaped like the group.
    pub levels: View,
    /// Radices of the tree over the sequences that the op covers.
    pub inner: Vec<u32>,
    /// Radices of the counter over the op's results in one step.
    pub outer: Vec<u32>,
    /// Results that arrive at the counter in one micro-batch.
    pub results: usize,
    /// Which of them this op's is.
    pub result: usize,
    /// Counters side by side: one for each rank that sends rows to these experts, whose sequences are a run of the
    /// batch of their own. When all are complete, their roots are added by `upper`, and the last becomes the sum.
    pub streams: usize,
    /// Radices of the tree over the streams, bottom-up.
    pub upper: Vec<u32>,
}
