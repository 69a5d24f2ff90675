//! The step program: what one rank does in one training step, known before anything runs.
//!
//! [`Program::build`] is a small compiler with plain passes over the ops of one chunk of layers:
//!
//! 1. *emit* writes forward ops on local shards with explicit collectives;
//! 2. *derive* differentiates that list once, input and weight gradients apart, and re-emits what is recomputed;
//! 3. *schedule* orders (chunk, micro-batch, pass) on the stage;
//! 4. *place* gives every buffer an offset by lifetime, so that memory is known to the byte.
//!
//! The result is stored folded: [`Block`]s of ops and a schedule that names blocks, so a thousand micro-batches do not
//! make it longer. Ops carry ids that are a function of their name alone: the same op has the same id under every
//! layout, on every rank, in plan, simulation and journal.
//!
//! Nothing here knows clocks, hardware or files.

mod cost;
mod derive;
mod emit;
mod graph;
mod lifetimes;
mod lower;
mod op;
mod params;
mod pipeline;
mod place;
mod statics;
mod step;
mod zero;

use serde::Serialize;
use spec::{DType, Layout, ModelSpec, Result};

pub use cost::Cost;
pub use graph::Phase;
pub use op::{Axis, Heads, OpKind, Sync};
pub use params::{GroupId, ParamGroup, ParamPart, Replication};
pub use pipeline::{Pass, PassTimes, Played, Work, orders, play};
pub use place::ALIGN;
pub use zero::owned as owned_range;

/// What to build a program for.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The model.
    pub model: &'a ModelSpec,
    /// How the step is spread; must be valid for the model and the batch ([`Layout::validate`]).
    pub layout: &'a Layout,
    /// Tokens of one sequence.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// Element type of parameters and activations; gradients, moments and master weights are f32.
    pub precision: DType,
    /// Whose program.
    pub rank: usize,
    /// Above 0, the program generates instead of training: one token at a time against a cache of this many positions
    /// (one rank alone).
    pub cache: usize,
}

/// A rank's place on each axis. Ranks count tp fastest, then cp, dp, pp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Coords {
    /// Data-parallel index.
    pub dp: usize,
    /// Tensor-parallel index.
    pub tp: usize,
    /// Context-parallel index.
    pub cp: usize,
    /// Pipeline stage.
    pub pp: usize,
}

impl Coords {
    /// Where `rank` lies.
    pub fn of(rank: usize, layout: &Layout) -> Coords {
        let (tp, rest) = (rank % layout.tp, rank / layout.tp);
        let (cp, rest) = (rest % layout.cp, rest / layout.cp);
        Coords { tp, cp, dp: rest % layout.dp, pp: rest / layout.dp }
    }

    /// The rank at these coordinates.
    pub fn rank(self, layout: &Layout) -> usize {
        self.pp * layout.stage_ranks() + self.in_stage(layout)
    }

    /// The ranks that differ from this one along `axis` only, by their place on it. Along ep these are the neighbours
    /// that hold all experts together.
    pub fn peers(self, axis: Axis, layout: &Layout) -> Vec<usize> {
        match axis {
            Axis::Dp => (0..layout.dp).map(|dp| Coords { dp, ..self }.rank(layout)).collect(),
            Axis::Tp => (0..layout.tp).map(|tp| Coords { tp, ..self }.rank(layout)).collect(),
            Axis::Pp => (0..layout.pp).map(|pp| Coords { pp, ..self }.rank(layout)).collect(),
            Axis::Cp => (0..layout.cp).map(|cp| Coords { cp, ..self }.rank(layout)).collect(),
            Axis::Ep => {
                let first = self.rank(layout) - self.ep(layout);
                (first..first + layout.ep).collect()
            }
        }
    }

    /// Expert-parallel index.
    pub fn ep(self, layout: &Layout) -> usize {
        self.in_stage(layout) % layout.ep
    }

    /// How many ranks hold the same elements of a parameter, and which of them this one is: (count, index).
    ///
    /// ```
    /// use program::{Coords, Replication};
    /// let layout = spec::Layout { dp: 2, cp: 2, tp: 2, ep: 4, ..spec::Layout::default() };
    /// let coords = Coords::of(5, &layout);
    /// assert_eq!(coords.replicas(Replication::Data, &layout), (4, 2));
    /// assert_eq!(coords.replica_ranks(Replication::Data, &layout), [1, 3, 5, 7]);
    /// assert_eq!(coords.replicas(Replication::Expert, &layout), (2, 1));
    /// assert_eq!(coords.replica_ranks(Replication::Expert, &layout), [1, 5]);
    /// ```
    pub fn replicas(self, replication: Replication, layout: &Layout) -> (usize, usize) {
        match replication {
            Replication::Data => (layout.replicas(), self.dp * layout.cp + self.cp),
            Replication::Expert => (layout.expert_replicas(), self.in_stage(layout) / layout.ep),
        }
    }

    /// Those ranks, by their index.
    pub fn replica_ranks(self, replication: Replication, layout: &Layout) -> Vec<usize> {
        let (count, index) = self.replicas(replication, layout);
        let apart = match replication {
            Replication::Data => layout.tp,
            Replication::Expert => layout.ep,
        };
        let first = self.rank(layout) - index * apart;
        (0..count).map(|i| first + i * apart).collect()
    }

    /// Counted over the ranks of the stage.
    fn in_stage(self, layout: &Layout) -> usize {
        (self.dp * layout.cp + self.cp) * layout.tp + self.tp
    }
}

/// Index of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
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
    /// Results of this op's position per micro-batch, and which one this is: (count, index).
    pub turn: (usize, usize),
}

/// A stable name for an op in plans, timelines, journals and on the wire: a hash of its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct OpId(pub u32);

impl OpId {
    /// FNV-1a of the op's name.
    pub fn of(name: &str) -> OpId {
        OpId(name.bytes().fold(0x811c_9dc5, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193)))
    }
}

/// One typed operation over placed buffers.
#[derive(Clone, Debug, Serialize)]
pub struct Op {
    /// Stable over layouts and ranks.
    pub id: OpId,
    /// For example `layers.3.attn.qkv.dw`.
    pub name: String,
    /// What it does.
    #[serde(flatten)]
    pub kind: OpKind,
    /// Read.
    pub ins: Vec<View>,
    /// Added to output 0; the same bytes as output 0 when it is accumulated in place.
    pub acc: Option<View>,
    /// Written.
    pub outs: Vec<View>,
    /// Weight gradients added to.
    pub grads: Vec<GradOut>,
    /// Which sequence of the micro-batch a [`OpKind::LossSum`] stands for; which layer of the cache an
    /// [`OpKind::AttentionCached`] uses.
    pub leaf: usize,
    /// Forward, input gradient or weight gradient.
    pub phase: Phase,
    /// FLOPs and bytes.
    pub cost: Cost,
}

/// Ops that run together: one pass of one chunk over one micro-batch, or the tail of the step.
#[derive(Clone, Debug, Serialize)]
pub struct Block {
    /// `f0`, `b0`, `w0`, `e0`, `step`, ...
    pub name: String,
    /// Which chunk of the rank.
    pub chunk: usize,
    /// In order.
    pub ops: Vec<Op>,
}

/// A block run on a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Item {
    /// Index into [`Program::blocks`].
    pub block: usize,
    /// Index of the rank's micro-batch.
    pub micro_batch: usize,
}

/// The static buffers of a parameter group.
#[derive(Clone, Debug, Serialize)]
pub struct GroupBuffers {
    /// Parameters in the run's precision. Under ZeRO 3 this rank's shard.
    pub param: BufferId,
    /// Their f32 master copy, when the precision is not f32; the owned range of it under ZeRO.
    pub master: Option<BufferId>,
    /// The sum of this rank's gradients, then of all ranks'.
    pub grad: BufferId,
    /// The same with the partial sums before it, one after another; `grad` is the last.
    pub grad_levels: BufferId,
    /// A tied table's gradients as the head saw them.
    pub head_grad: Option<BufferId>,
    /// With their partial sums.
    pub head_grad_levels: Option<BufferId>,
    /// First moment of the owned range.
    pub exp_avg: BufferId,
    /// Second moment of the owned range.
    pub exp_avg_sq: BufferId,
    /// The elements that this rank updates: (first, count).
    pub owned: (usize, usize),
    /// First chunk of the group in the model-wide vector of squared gradient sums.
    pub norm_chunk0: usize,
    /// Whether this rank's copy is the one that counts in the gradient norm (tied tables, tensor-parallel replicas).
    pub counts: bool,
}

/// Gradients of a run of groups, reduced together.
#[derive(Clone, Debug, Serialize)]
pub struct Bucket {
    /// The gradient buffers, main and of tied heads, with the group that each belongs to.
    pub grads: Vec<(GroupId, BufferId)>,
    /// Over which ranks.
    pub replication: Replication,
    /// Bytes.
    pub bytes: usize,
}

/// Where the bytes of a rank go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Parameters in the run's precision.
    pub params: usize,
    /// f32 master weights, if separate.
    pub master: usize,
    /// Gradient sums, with the partial sums of accumulation.
    pub grads: usize,
    /// Moments of the optimiser.
    pub moments: usize,
    /// Tokens, targets, tables, norms, losses.
    pub other: usize,
    /// Activations of micro-batches in flight.
    pub slots: usize,
    /// Scratch of one block, with activations when only one micro-batch is in flight.
    pub scratch: usize,
    /// The most bytes of scratch and activations that are alive at once: what perfect placement would take.
    pub scratch_bound: usize,
    /// Kernel work space.
    pub workspace: usize,
    /// Everything.
    pub total: usize,
}

/// What one rank does in one training step.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    /// Whose.
    pub rank: usize,
    /// Its place in the mesh.
    pub coords: Coords,
    /// The layout it was built for.
    pub layout: Layout,
    /// Tokens of a sequence, over all context-parallel ranks.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// Sequences of this rank in one step.
    pub local_sequences: usize,
    /// Element type of parameters and activations.
    pub precision: DType,
    /// Positions of the generation cache, 0 without one.
    pub cache: usize,
    /// Parameter groups of the rank, in forward order.
    pub groups: Vec<ParamGroup>,
    /// Their buffers.
    pub group_buffers: Vec<GroupBuffers>,
    /// Gradient buckets in the order in which backward fills them.
    pub buckets: Vec<Bucket>,
    /// All buffers.
    pub buffers: Vec<Buffer>,
    /// All blocks.
    pub blocks: Vec<Block>,
    /// The micro-batches of a step, in order.
    pub schedule: Vec<Item>,
    /// The block that ends a step: reduce, clip, update.
    pub step: usize,
    /// Forward and loss without gradients, by chunk.
    pub eval: Vec<usize>,
    /// One token against the cache.
    pub decode: Option<usize>,
    /// Where static buffers of the step's inputs and sums lie.
    pub io: Io,
    /// Micro-batches in flight at most, by chunk.
    pub slots: Vec<usize>,
    /// Radices of the counter over this rank's micro-batches, bottom-up, that sharded gradients are summed by.
    pub across: Vec<u32>,
    /// Bytes of one slot, by chunk, and where the chunk's slots begin.
    pub slot_bytes: Vec<(usize, usize)>,
    /// Where scratch begins.
    pub scratch_offset: usize,
    /// Where kernel work space begins.
    pub workspace_offset: usize,
    /// Where the bytes go.
    pub memory: Memory,
}

/// Static buffers of a step's inputs and sums.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Io {
    /// Token ids `[local_sequences * sequence / cp]`.
    pub tokens: BufferId,
    /// Target ids, `u32::MAX` where ignored.
    pub targets: BufferId,
    /// One f64 loss sum for each local sequence.
    pub loss_leaves: BufferId,
    /// Sums of squared gradients by chunk of [`NORM_CHUNK`] elements, over the whole model, then the loss sums of
    /// all sequences of the global batch, then the number of ranks that want to stop.
    pub norm_chunks: BufferId,
    /// Cosine table of this rank's positions `[sequence / cp, rotated dims / 2]`, empty without rotary positions.
    pub cos: BufferId,
    /// Sine table.
    pub sin: BufferId,
    /// Keys of the generation cache `[layers * cache, kv_heads * head_dim]`.
    pub k_cache: Option<BufferId>,
    /// Values of the generation cache.
    pub v_cache: Option<BufferId>,
}

/// Squared gradients are summed over runs of this many elements of a parameter group, in f64; the sums are then added
/// in index order. Shards of ZeRO begin at multiples of it, so that the norm does not depend on the sharding.
pub const NORM_CHUNK: usize = 4096;

/// Elements of kernel work space (f32) that an op wants: the run time's business, passed in.
pub type WorkspaceLen<'a> = &'a dyn Fn(&Op, &Program) -> usize;

impl Program {
    /// Compiles the program of one rank.
    ///
    /// # Errors
    /// If the layout is not valid for the model and the batch, or a model with experts or latent attention is asked to
    /// generate.
    pub fn build(request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Result<Program> {
        request.layout.validate(request.model, request.sequences, request.sequence)?;
        if request.cache > 0 {
            // Generation is of what trains: one token has no expert's share and no part of a sequence.
            request.model.check_trains()?;
            request.layout.check_trains()?;
        }
        Ok(lower::lower(request, workspace))
    }

    /// The buffer behind an id.
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }

    /// The group behind an id.
    pub fn group(&self, id: GroupId) -> &ParamGroup {
        &self.groups[id.0 as usize]
    }

    /// Sequences executed at once.
    pub fn micro_batch(&self) -> usize {
        self.layout.micro_batch
    }

    /// Tokens of a sequence on this rank: its part where cp cuts sequences.
    pub fn local_sequence(&self) -> usize {
        self.sequence / self.layout.cp
    }

    /// Micro-batches of this rank in one step.
    pub fn micro_batches(&self) -> usize {
        self.local_sequences / self.layout.micro_batch
    }

    /// Runs of a bucket's gradients that lie next to each other, as (bytes from the start of the arena, f32 elements):
    /// each is reduced with one message.
    pub fn bucket_runs(&self, bucket: &Bucket) -> Vec<(usize, usize)> {
        let offset = |id: BufferId| match self.buffer(id).home {
            Home::Static { offset } => offset,
            _ => unreachable!("gradient sums are static"),
        };
        let mut runs: Vec<(usize, usize)> =
            bucket.grads.iter().map(|(_, b)| (offset(*b), 4 * self.buffer(*b).len())).collect();
        runs.sort_unstable();
        let mut out: Vec<(usize, usize)> = Vec::new();
        for (at, bytes) in runs {
            match out.last_mut() {
                // Alignment leaves gaps of less than a cache line, which hold zeros.
                Some((first, len)) if at >= *first + *len && at - (*first + *len) < 64 => {
                    *len = at + bytes - *first
                }
                _ => out.push((at, bytes)),
            }
        }
        out.into_iter().map(|(at, bytes)| (at, bytes / 4)).collect()
    }

    /// The index in the global batch of the first sequence of a micro-batch.
    ///
    /// Ranks hold aligned runs of the batch, so that their local sums are subtrees. When gradients are scattered after
    /// every micro-batch (ZeRO 2 and 3), ranks take turns instead: then each micro-batch of all ranks is a subtree.
    pub fn first_sequence(&self, micro_batch: usize) -> usize {
        let m = self.layout.micro_batch;
        if self.layout.zero >= spec::Zero::Gradients {
            (micro_batch * self.layout.dp + self.coords.dp) * m
        } else {
            self.coords.dp * self.local_sequences + micro_batch * m
        }
    }
}
