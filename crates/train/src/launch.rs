//! Ops resolved into what a device is asked to do: where every operand lies in the arena, and the step's numbers.

use std::ops::Range;

use kernels::{AdamW, Merge};
use program::{BufferId, Collective, Home, Members, OpId, OpKind, Program, Slice, View, When};
use spec::{DType, Error, Result};

/// Elements in the arena, row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Bytes from the start of the arena.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Type of the elements.
    pub dtype: DType,
}

impl Operand {
    /// Elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }

    /// `count` elements from the `first` on, as one row.
    pub fn part(&self, first: usize, count: usize) -> Operand {
        assert!(first + count <= self.len(), "elements {first}..{} of {}", first + count, self.len());
        Operand { offset: self.offset + first * self.dtype.bytes(), rows: 1, cols: count, ..*self }
    }
}

/// What changes from one run of a block to the next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turn {
    /// Index among the rank's micro-batches.
    pub micro_batch: usize,
    /// Place in the cache of keys and values of the token that is generated.
    pub position: usize,
    /// What the gradient of the loss is multiplied by.
    pub loss_scale: f32,
    /// The optimiser's numbers, in the tail of a step.
    pub update: Option<AdamW>,
    /// Decay of Muon's momentum, likewise.
    pub momentum: f64,
    /// Decay of the average of the weights, likewise.
    pub ema: f64,
    /// What is left out at random in this step follows from this.
    pub draws: u64,
    /// What of an op that computes between its messages.
    pub part: Part,
}

/// A part of an op.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// Of a ring: puts this rank's keys and values where they are sent from.
    Begin,
    /// Computes with the keys and values that have made so many hops.
    Hop(usize),
    /// Adds to the gradients that have made so many hops.
    Join(usize),
    /// From what was held to results.
    End,
}

/// One kernel to run.
#[derive(Clone, Copy)]
pub struct Launch<'a> {
    call: &'a Call,
    /// Numbers of this run.
    pub turn: Turn,
}

impl<'a> Launch<'a> {
    pub(crate) fn new(call: &'a Call, turn: Turn) -> Launch<'a> {
        Launch { call, turn }
    }

    /// The op that is run.
    pub fn op(&self) -> OpId {
        self.call.op
    }

    /// What to compute. Operands are those of the kind's documentation, followed by those that it leaves to the
    /// program:
    ///
    /// | kind | inputs | outputs |
    /// | --- | --- | --- |
    /// | `Rope`, `LatentRope`, `LatentRopeGrad` | as they are, cosines, sines | |
    /// | `AttentionCached` | | o, the layer's keys, its values |
    /// | `LossSum` | | the sequence's sum |
    /// | `ShardGrads` | a micro-batch's sums, the owned part of each | none: a [`Gradient`] for each |
    /// | `TieGrads` | the head's gradient | the table's, in place |
    /// | `Slice` | this rank's rows | the same |
    /// | `RouteGrad` | | dlogits, the layer's counts of experts in this step |
    /// | `RingAttention`, `RingAttentionGrad` | as they are, part by part | |
    /// | `GradNorm` | owned gradients | all chunk sums, then those of each input |
    /// | `MuonMomentum` | gradient | momentum, update, the owned range of each |
    /// | `Muon` | update | parameter, \[master\], in place |
    /// | `LogitMax` | as they are | the layer's maxima |
    /// | `QkClip` | maxima of this rank's heads, one for each data- and context-parallel rank | parameter, \[master\], the owned range of each |
    /// | `Average` | parameter or master | average, the owned range of each |
    /// | `SwapAverage` | | parameter, \[master\], average, likewise |
    /// | `AdamW` | gradient | parameter, first and second moment, \[master\], in place |
    pub fn kind(&self) -> &'a OpKind {
        &self.call.kind
    }

    /// Type of parameters and activations.
    pub fn precision(&self) -> DType {
        self.call.precision
    }

    /// Tokens of a sequence among the rows of the op.
    pub fn sequence(&self) -> usize {
        self.call.sequence
    }

    /// Tokens of a sequence on all ranks together, where the op has those of this rank.
    pub fn context(&self) -> usize {
        self.call.sequence * self.call.ring.1
    }

    /// Positions of the rows of a sequence's two halves on this rank.
    pub fn places(&self) -> [usize; 2] {
        self.call.places
    }

    /// This rank's place on the context-parallel axis, and how many ranks are on it.
    pub fn ring(&self) -> (usize, usize) {
        self.call.ring
    }

    /// Where row `i` of an activation of the residual stream lies: its sequence in the global batch, and its position there.
    pub fn place(&self, i: usize) -> (usize, usize) {
        let Call { sequence: t, places, .. } = *self.call;
        let (sequence0, row0) = self.first_row();
        let row = row0 + i;
        let (in_micro_batch, at) = (row / t, row % t);
        let half = t / 2;
        let position = if at < half { places[0] + at } else { places[1] + at - half };
        (sequence0 + in_micro_batch, position)
    }

    /// The micro-batch's first sequence in the global batch, and how many rows of the micro-batch lie before the op's first.
    pub fn first_row(&self) -> (usize, usize) {
        let Call { first, row0, .. } = *self.call;
        (first.0 + self.turn.micro_batch * first.1, row0)
    }

    /// Of weights that are changed in place: the first element in their group, and how many elements make a feature.
    pub fn features(&self) -> (usize, usize) {
        self.call.features
    }

    /// How many inputs there are.
    pub fn inputs(&self) -> usize {
        self.call.ins.len()
    }

    /// Input `i`: read, and not written unless an output has its bytes.
    pub fn input(&self, i: usize) -> Operand {
        self.call.ins[i].at(self.turn.micro_batch)
    }

    /// Output `i`.
    pub fn output(&self, i: usize) -> Operand {
        self.call.outs[i].at(self.turn.micro_batch)
    }

    /// How many outputs there are.
    pub fn outputs(&self) -> usize {
        self.call.outs.len()
    }

    /// What is added to output 0; with the output's own offset if in place.
    pub fn acc(&self) -> Option<Operand> {
        self.call.acc.map(|a| a.at(self.turn.micro_batch))
    }

    /// Gradient `i` that the launch adds to.
    pub fn gradient(&self, i: usize) -> Gradient<'a> {
        let of = &self.call.grads[i];
        let count: usize = of.outer.iter().map(|&r| r as usize).product();
        let index = (self.turn.micro_batch * of.results + of.result) % count.max(1);
        let (merge, store) = spec::merge_at(&of.outer, index);
        Gradient {
            levels: of.levels.at(self.turn.micro_batch),
            rows: of.rows,
            cols: of.cols,
            inner: &of.inner,
            merge: Merge { merge, store },
            streams: of.streams,
            upper: (index + 1 == count.max(1)).then_some(of.upper.as_slice()),
        }
    }

    /// Scratch of this launch alone, f32.
    pub fn workspace(&self) -> Operand {
        self.call.workspace
    }
}

/// A gradient that a launch adds to: the sum of its leaves in the order of the tree `inner` meets the partial sums in
/// `levels` as `merge` says.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// Partial sums one after another, each `[rows, cols]`.
    pub levels: Operand,
    /// Rows of one of them.
    pub rows: usize,
    /// Columns of one of them.
    pub cols: usize,
    /// Radices of the tree over the leaves of this launch, bottom-up.
    pub inner: &'a [u32],
    /// Which levels are added, and which one is written.
    pub merge: Merge,
    /// Counters side by side, each with levels of its own: see [`program::GradOut::streams`].
    pub streams: usize,
    /// Radices of the tree over their roots, once all are complete.
    pub upper: Option<&'a [u32]>,
}

impl Gradient<'_> {
    /// Levels of one counter.
    pub(crate) fn stream_levels(&self) -> usize {
        self.levels.rows / (self.rows * self.streams).max(1)
    }
}

/// One message or collective of an op.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The op that says it.
    pub op: OpId,
    /// How.
    pub what: Collective,
    /// Among whom.
    pub members: Members,
    /// The other end of a send or a receive, by its place in the group.
    pub peer: usize,
    /// Index among the rank's micro-batches.
    pub micro_batch: usize,
    /// What this rank gives; of an all-gather its own part of `to` if `None`.
    pub from: Option<Operand>,
    /// What this rank gets; over its own part of `from` if `None`.
    pub to: Option<Operand>,
    /// The elements of each member.
    pub parts: &'a [Range<usize>],
    /// Of an all-to-all, those that come from each member.
    pub arrive: &'a [Range<usize>],
    /// Of rows that are counted: the counts of what leaves and arrives, by (member, expert), and the elements of a row.
    pub counted: Option<([Operand; 2], usize)>,
    /// Bytes that this rank gives to others.
    pub sent_bytes: u64,
}

impl Message<'_> {
    /// Of rows that are counted: the elements of each member's, which lie one after another as the counts of what leaves
    /// and arrives say.
    ///
    /// # Errors
    /// If there are more than there is room for.
    pub fn count(&self, counts: [&[u32]; 2], ranges: &mut [Vec<Range<usize>>; 2]) -> Result<()> {
        let (members, row) = (self.parts.len(), self.counted.map_or(0, |(_, row)| row));
        for ((ranges, counts), room) in ranges.iter_mut().zip(counts).zip([self.from, self.to]) {
            let mut at = 0;
            ranges.clear();
            ranges.extend(counts.chunks(counts.len() / members).map(|of_member| {
                let first = at;
                at += of_member.iter().map(|c| *c as usize).sum::<usize>() * row;
                first..at
            }));
            let room = room.map_or(0, |o| o.len());
            if at > room {
                let (rows, room) = (at / row.max(1), room / row.max(1));
                return Err(Error::failure(format!("{rows} rows for experts with room for {room}")));
            }
        }
        Ok(())
    }
}

/// An operand for every micro-batch: at `base`, plus a slot among `slots`, plus a stretch of a whole step's buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    base: usize,
    slots: usize,
    slot_bytes: usize,
    micro_batch_bytes: usize,
    rows: usize,
    cols: usize,
    dtype: DType,
}

impl Address {
    pub(crate) fn at(&self, micro_batch: usize) -> Operand {
        let slot = if self.slots > 1 { micro_batch % self.slots * self.slot_bytes } else { 0 };
        let offset = self.base + slot + micro_batch * self.micro_batch_bytes;
        Operand { offset, rows: self.rows, cols: self.cols, dtype: self.dtype }
    }

    pub(crate) fn slice(p: &Program, slice: Slice) -> Address {
        let b = p.buffer(slice.buffer);
        let (base, slots, slot_bytes, micro_batch_bytes) = match b.home {
            Home::Static { offset } => (offset, 1, 0, 0),
            Home::Slot { chunk, offset, .. } => {
                let region = p.slot_regions[chunk];
                (region.offset + offset, p.slots[chunk], region.bytes, 0)
            }
            Home::Scratch { offset, .. } => (p.scratch_offset + offset, 1, 0, 0),
            Home::MicroBatch { offset } => (offset, 1, 0, b.bytes()),
        };
        let base = base + slice.first * b.dtype.bytes();
        Address { base, slots, slot_bytes, micro_batch_bytes, rows: 1, cols: slice.count, dtype: b.dtype }
    }

    pub(crate) fn view(p: &Program, view: View) -> Address {
        Address { rows: view.rows, cols: p.buffer(view.buffer).cols, ..Address::slice(p, p.slice(view)) }
    }

    pub(crate) fn whole(p: &Program, buffer: BufferId) -> Address {
        Address::view(p, View { buffer, row0: 0, rows: p.buffer(buffer).rows })
    }

    /// `count` elements from `first` on that move on by `step` elements with every micro-batch.
    pub(crate) fn walk(self, first: usize, count: usize, step: usize) -> Address {
        let size = self.dtype.bytes();
        let base = self.base + first * size;
        Address { base, rows: 1, cols: count, micro_batch_bytes: step * size, ..self }
    }
}

/// A launch, but for what changes from run to run.
pub(crate) struct Call {
    pub(crate) op: OpId,
    pub(crate) kind: OpKind,
    pub(crate) ins: Vec<Address>,
    pub(crate) acc: Option<Address>,
    pub(crate) outs: Vec<Address>,
    pub(crate) grads: Vec<Target>,
    pub(crate) workspace: Operand,
    pub(crate) sequence: usize,
    pub(crate) places: [usize; 2],
    /// Index in the global batch of the first micro-batch's first sequence, and how many further each next one's is.
    pub(crate) first: (usize, usize),
    /// Rows of a micro-batch before the first one that the op is for, where ranks share them.
    pub(crate) row0: usize,
    /// Of weights in place: the first element of theirs in the group, and how many make a feature.
    pub(crate) features: (usize, usize),
    pub(crate) ring: (usize, usize),
    pub(crate) precision: DType,
}

/// Where a gradient goes: the levels of a counter with radices `outer`.
pub(crate) struct Target {
    pub(crate) levels: Address,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) inner: Vec<u32>,
    pub(crate) outer: Vec<u32>,
    pub(crate) results: usize,
    pub(crate) result: usize,
    pub(crate) streams: usize,
    pub(crate) upper: Vec<u32>,
}

/// An op's messages, but for what changes from run to run.
pub(crate) struct Talk {
    pub(crate) op: OpId,
    pub(crate) what: Collective,
    pub(crate) members: Members,
    pub(crate) when: When,
    pub(crate) peer: usize,
    pub(crate) messages: Vec<Said>,
}

/// One of them.
pub(crate) struct Said {
    pub(crate) from: Option<Address>,
    pub(crate) to: Option<Address>,
    pub(crate) parts: Vec<Range<usize>>,
    pub(crate) arrive: Vec<Range<usize>>,
    pub(crate) counted: Option<([Address; 2], usize)>,
    pub(crate) sent_bytes: u64,
}

impl Talk {
    /// The messages for a micro-batch, in order.
    pub(crate) fn messages(&self, micro_batch: usize) -> impl Iterator<Item = Message<'_>> {
        (0..self.messages.len()).map(move |i| self.message(i, micro_batch))
    }

    /// One of them.
    pub(crate) fn message(&self, i: usize, micro_batch: usize) -> Message<'_> {
        let m = &self.messages[i];
        Message {
            op: self.op,
            what: self.what,
            members: self.members,
            peer: self.peer,
            micro_batch,
            from: m.from.map(|a| a.at(micro_batch)),
            to: m.to.map(|a| a.at(micro_batch)),
            parts: &m.parts,
            arrive: &m.arrive,
            counted: m.counted.map(|(counts, row)| (counts.map(|a| a.at(micro_batch)), row)),
            sent_bytes: m.sent_bytes,
        }
    }
}
