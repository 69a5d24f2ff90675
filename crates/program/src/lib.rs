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

mod recipe;
mod heads;
mod op;
mod comm;
mod role;
mod rows;
mod buffer;
mod coords;
mod params;
mod rank;
mod graph;
mod emit;
mod derive;
mod recompute;
mod zero;
mod pipeline;
mod schedule;
mod place;
mod step;
mod mixture;
mod muon;
mod average;
mod qk_clip;
mod ramp;
mod cost;
pub mod verify;

use std::collections::HashSet;
use std::ops::Range;

use place::Placer;
use rank::Rank;
use schedule::{Blocks, Passes, Schedule};
use serde::Serialize;
use spec::{DType, Error, Layout, ModelSpec, Result, RunSpec};
use verify::graph::Check;

pub use buffer::{Buffer, BufferId, GradOut, Home, Owned, Slice, View};
pub use comm::{Collective, Comm, Deal, Message, Ticket, When};
pub use coords::{Coords, Members};
pub use cost::Cost;
pub use emit::{Emitter, Layer};
pub use graph::{Phase, ValueId};
pub use heads::Heads;
pub use mixture::check_mixture;
pub use muon::{Matrix, Shares, newton_schulz_flops, update_scale};
pub use op::{AttentionDropout, Axis, GradSum, LossTerms, Op, OpId, OpKind, Sees};
pub use params::{GroupId, ParamGroup, ParamPart, Replication};
pub use pipeline::{Pass, PassTimes, Played, Work, WorkSpan, in_flight, orders, play, spans};
pub use place::ALIGN;
pub use qk_clip::{Makes, Scaled};
pub use recipe::Recipe;
pub use role::{ParamKey, Place, Role};
pub use rows::RowFn;
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
    /// Training, or generation.
    pub mode: Mode,
    /// How much of a micro-batch has logits at a time.
    pub loss: Loss,
    /// What of the run's recipe is part of the program.
    pub recipe: Recipe,
}

impl<'a> Request<'a> {
    /// A rank's program of a run's steps.
    pub fn of(run: &'a RunSpec, rank: usize) -> Request<'a> {
        Request {
            model: &run.model,
            layout: &run.layout,
            sequence: run.batch.sequence,
            sequences: run.batch.sequences,
            precision: run.train.precision,
            rank,
            mode: Mode::Train,
            loss: Loss::default(),
            recipe: Recipe::of(run),
        }
    }
}

/// How much of a micro-batch has logits at a time. No number depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// One sequence.
    OneSequence,
    /// As many as give products enough rows, and whose logits take no more room than the partial sums of the head's
    /// gradient that are spared: each addition of two sequences inside of an op spares a level of them.
    #[default]
    Few,
    /// All of it: fewer and larger products, for devices that small ones do not fill.
    MicroBatch,
}

/// What a program is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Steps of training, and evaluation.
    #[default]
    Train,
    /// One token at a time, on one rank alone.
    Generate {
        /// Positions of the cache of keys and values.
        positions: usize,
    },
}

impl Mode {
    /// Positions of the cache: 0 in training.
    pub fn positions(self) -> usize {
        match self {
            Mode::Train => 0,
            Mode::Generate { positions } => positions,
        }
    }
}

/// Ops that run together: one pass of one chunk over one micro-batch, or the tail of the step.
#[derive(Clone, Debug, Serialize)]
pub struct Block {
    /// `f0`, `b0`, `w0`, `e0`, `step`, ...
    pub name: String,
    /// Which chunk of the rank.
    pub chunk: usize,
    /// When it runs.
    pub work: BlockWork,
    /// In order.
    pub ops: Vec<Op>,
}

/// When a block runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockWork {
    /// On each micro-batch.
    Train(Pass),
    /// The same on the last one, where reductions of gradients begin.
    TrainLast(Pass),
    /// Loss without gradients.
    Evaluate,
    /// One token.
    Generate,
    /// Once a step.
    Tail,
    /// Around an evaluation of the averaged weights.
    Average,
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
    /// First moment of the owned range; of what Muon updates its momentum.
    pub exp_avg: BufferId,
    /// Second moment of the owned range; `None` where Muon updates.
    pub exp_avg_sq: Option<BufferId>,
    /// The average of the weights of the owned range over steps, f32, where one is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub average: Option<BufferId>,
    /// The elements that this rank updates.
    pub owned: Owned,
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
    /// The average of the weights over steps, if one is kept.
    #[serde(skip_serializing_if = "is_zero")]
    pub average: usize,
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
    /// What steps of another size take beyond this, where the batch grows.
    #[serde(skip_serializing_if = "is_zero")]
    pub ramp: usize,
    /// Everything.
    pub total: usize,
}

fn is_zero(bytes: &usize) -> bool {
    *bytes == 0
}

fn is_one(n: &usize) -> bool {
    *n == 1
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
    /// Training, or generation.
    pub mode: Mode,
    /// Parameter groups of the rank, in forward order.
    pub groups: Vec<ParamGroup>,
    /// What [`Io::expert_bias`] holds: a row for each layer of the whole model, and a part of one row for each that has
    /// experts. It is saved and restored as parameters are, and has no gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_bias: Option<ParamGroup>,
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
    pub tail: usize,
    /// Forward and loss without gradients, by chunk.
    pub eval: Vec<usize>,
    /// Weights and their average change places: before an evaluation of the average, and after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub average: Option<usize>,
    /// One token against the cache.
    pub decode: Option<usize>,
    /// Where static buffers of the step's inputs and sums lie.
    pub io: Io,
    /// Micro-batches in flight at most, by chunk.
    pub slots: Vec<usize>,
    /// Radices of the counter over this rank's micro-batches, bottom-up, that sharded gradients are summed by.
    pub shard_radices: Vec<u32>,
    /// Where each chunk's slots lie.
    pub slot_regions: Vec<SlotRegion>,
    /// Where scratch begins.
    pub scratch_offset: usize,
    /// Where kernel work space begins.
    pub workspace_offset: usize,
    /// Where the bytes go.
    pub memory: Memory,
}

/// Where the slots of a chunk lie, one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SlotRegion {
    /// Bytes of one slot.
    pub bytes: usize,
    /// Bytes from the start of the arena to the first.
    pub offset: usize,
}

/// Static buffers of a step's inputs and sums.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Io {
    /// Token ids `[local_sequences * sequence / cp]`.
    pub tokens: BufferId,
    /// Target ids, `u32::MAX` where ignored.
    pub targets: BufferId,
    /// The token behind each of the same sequence; of a last one its target. Where the rank learns to predict one token
    /// more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_tokens: Option<BufferId>,
    /// The target behind each; a last one has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_targets: Option<BufferId>,
    /// Position in its sequence at which each token's document begins, where attention keeps inside documents: of this
    /// rank's tokens, or of all where heads are dealt ([`Program::seen`]).
    pub starts: Option<BufferId>,
    /// One f64 loss sum for each local sequence; where the rank learns to predict one token more, as many of that behind
    /// them.
    pub loss_leaves: BufferId,
    /// Losses of a sequence: the model's, and that of the module that predicts one token more, whoever holds it.
    #[serde(skip_serializing_if = "is_one")]
    pub losses: usize,
    /// Sums of squared gradients by chunk of [`NORM_CHUNK`] elements, over the whole model, then the maxima of
    /// [`Io::logit_maxima`] of each data- and context-parallel rank, `[dp cp, layers, all heads]`, then the counts of
    /// [`Io::expert_counts`] over all ranks, then the loss sums of all sequences of the global batch, those of the model
    /// last ([`Io::losses`]), then the number of ranks that want to stop.
    pub norm_chunks: BufferId,
    /// The greatest score of attention of each of this rank's heads in this step, `[layers, heads]`, if they are bounded:
    /// 0 for those that were dealt to others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_maxima: Option<BufferId>,
    /// How many copies of this rank's tokens went to each expert in this step, `[layers, experts]`.
    pub expert_counts: Option<BufferId>,
    /// Biases that experts are chosen by, `[layers, experts]` in f32 whatever the precision, alike on every rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_bias: Option<BufferId>,
    /// Cosine table of this rank's positions `[sequence / cp, rotated dims / 2]`, empty without rotary positions.
    pub cos: BufferId,
    /// Sine table.
    pub sin: BufferId,
    /// Keys of the generation cache `[layers * cache, kv_heads * head_dim]`; of latent attention the latents.
    pub k_cache: Option<BufferId>,
    /// Values of the generation cache `[layers * cache, kv_heads * value_dim]`; of latent attention the rotated part of keys
    /// that heads share.
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
    /// If the layout is not valid for the model and the batch, or the model or the layout is asked to generate and
    /// cannot.
    pub fn build(request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Result<Program> {
        Program::compile(request, workspace, cfg!(debug_assertions))
    }

    /// [`Program::build`] with every rule of [`verify`] checked after each pass.
    ///
    /// # Errors
    /// As [`Program::build`], or if a rule is broken.
    pub fn verified(request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Result<Program> {
        Program::compile(request, workspace, true)
    }

    /// [`Program::verified`] of a model whose layers are `layer`'s: the embedding, the head and the parameters are as the
    /// model says.
    ///
    /// # Errors
    /// As [`Program::verified`], or if a parameter of the model is used by no op.
    pub fn of_layers(
        request: &Request<'_>,
        layer: Layer<'_>,
        workspace: WorkspaceLen<'_>,
    ) -> Result<Program> {
        let rank = Rank { layer: Some(layer), ..Rank::of(request)? };
        let program = Program::of_rank(&rank, workspace, true)?;
        program.unused_parameter().map_or(Ok(program), |name| {
            Err(Error::user(format!("{}: no op of its layers uses {name}", request.model.name))
                .hint("emit it, or take it out of the model: an optimiser would update it with nothing"))
        })
    }

    /// A parameter that gets no gradient.
    fn unused_parameter(&self) -> Option<String> {
        let ops = self.blocks.iter().flat_map(|b| &b.ops);
        let used: HashSet<GroupId> = ops.flat_map(|op| op.grads.iter().map(|g| g.group)).collect();
        let unused = (0..).map(GroupId).zip(&self.groups).find(|(id, _)| !used.contains(id));
        unused.filter(|_| self.mode == Mode::Train).map(|(_, group)| group.name.clone())
    }

    fn compile(request: &Request<'_>, workspace: WorkspaceLen<'_>, verify: bool) -> Result<Program> {
        let program = Program::of_rank(&Rank::of(request)?, workspace, verify)?;
        program.with_room(request, workspace)
    }

    fn of_rank(rank: &Rank<'_>, workspace: WorkspaceLen<'_>, verify: bool) -> Result<Program> {
        let check = &Check { on: verify, rank };
        let schedule = &Schedule::of(rank);
        let mut placer = Placer::new(rank, schedule);
        let mut blocks = Blocks::default();
        let (mut eval, mut decode) = (Vec::new(), None);
        for (c, chunk) in rank.chunks.iter().enumerate().filter(|_| !rank.generates()) {
            let forward = check.forward(emit::forward(rank, chunk, true))?;
            let both = check.both("derive", derive::backward(rank, chunk, forward))?;
            let both = check.both("recompute", recompute::recompute(rank, both))?;
            let passes = check.passes("schedule", schedule.passes(both))?;
            let passes = check.passes("shard", zero::shard(rank, &placer, passes))?;
            let ops = placer.chunk(c, &passes, true);
            blocks.train(rank, c, ops, &placer.buckets);
        }
        for (c, chunk) in rank.chunks.iter().enumerate() {
            // What is looked at, or generates, is the whole model.
            let forward = emit::forward(rank, chunk, false);
            let (name, work, graph) = match rank.generates() {
                true => ("decode".to_owned(), BlockWork::Generate, derive::generation(rank, forward)),
                false => (format!("e{c}"), BlockWork::Evaluate, derive::evaluation(rank, chunk, forward)),
            };
            let passes = check.passes("shard", zero::shard(rank, &placer, Passes::one(graph)))?;
            let ops = placer.chunk(c, &passes, false).remove(0);
            let block = blocks.push(name, c, work, ops);
            if rank.generates() { decode = Some(block) } else { eval.push(block) }
        }
        let tail = blocks.push("step".into(), 0, BlockWork::Tail, step::ops(rank, &mut placer));
        let ops = average::swap(rank, &placer);
        let average = (!ops.is_empty()).then(|| blocks.push("average".into(), 0, BlockWork::Average, ops));
        let mut program = placer.program(schedule, blocks, tail, eval, decode);
        program.average = average;
        program.state_messages();
        program.add_workspace(workspace);
        if verify {
            verify::accept("placement", &verify::program(&program))?;
        }
        Ok(program)
    }

    /// Adds the work space of the kernel that wants most.
    fn add_workspace(&mut self, workspace: WorkspaceLen<'_>) {
        let ops = self.blocks.iter().flat_map(|b| &b.ops);
        let floats = ops.map(|op| workspace(op, self)).max().unwrap_or_default();
        self.memory.workspace = place::aligned(4 * floats);
        self.memory.total = self.workspace_offset + self.memory.workspace;
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

    /// The positions of this rank's tokens in a sequence, in the order of its rows: all of them or, where cp cuts
    /// sequences, one piece or, on a ring, one from the front and its mirror from the back. The halves are as long as each
    /// other, or the second is one longer.
    pub fn positions(&self) -> [Range<usize>; 2] {
        let (local, cp) = (self.local_sequence(), self.coords.cp);
        let half = local / 2;
        if self.layout.has_ring() {
            let mirror = 2 * self.layout.cp - 1 - cp;
            return [cp, mirror].map(|piece| piece * half..(piece + 1) * half);
        }
        let (first, end) = (cp * local, (cp + 1) * local);
        [first..first + half, first + half..end]
    }

    /// The positions of the queries of a sequence that this rank works on in attention: those of its tokens, or all where
    /// heads are dealt.
    pub fn seen(&self) -> [Range<usize>; 2] {
        match self.layout.deals_heads() {
            true => [0..self.sequence / 2, self.sequence / 2..self.sequence],
            false => self.positions(),
        }
    }

    /// Tokens of a sequence among the rows of an op.
    pub fn sequence_of(&self, kind: &OpKind) -> usize {
        use OpKind::*;
        let attends =
            matches!(kind, Attention { .. } | AttentionGrad { .. } | SinkGrad { .. } | LogitMax { .. });
        if attends && self.layout.deals_heads() { self.sequence } else { self.local_sequence() }
    }

    /// Micro-batches of this rank in one step.
    pub fn micro_batches(&self) -> usize {
        self.local_sequences / self.layout.micro_batch
    }

    /// The elements of a group that are this rank's to save and to count in the norm: its part of what all ranks with
    /// the same elements hold, whether ZeRO shards them or not. Owners of the same shard share that.
    pub fn share(&self, group: GroupId) -> Owned {
        let group = self.group(group);
        let (shards, shard) = self.coords.shards(group.replication, &self.layout);
        let (owners, owner) = self.coords.owners(group.replication, &self.layout);
        let whole = owned_range(group.len(), shards, shard);
        let part = owned_range(whole.count, owners, owner);
        Owned { first: whole.first + part.first, count: part.count }
    }

    /// The elements of [`Program::share`] in one of the group's buffers, whole or sharded.
    pub fn share_in(&self, group: GroupId, buffer: BufferId) -> Slice {
        let Owned { first, count } = self.share(group);
        let whole = self.buffer(buffer).len() == self.group(group).len();
        let before = if whole { 0 } else { self.group_buffers[group.0 as usize].owned.first };
        Slice { buffer, first: first - before, count }
    }

    /// The places of this rank's sequences in the global batch, in the order in which [`Io::tokens`] holds them.
    pub fn places(&self) -> Vec<u64> {
        (0..self.local_sequences).map(|i| self.place(i) as u64).collect()
    }

    /// The place in the global batch of this rank's sequence `i`.
    pub fn place(&self, i: usize) -> usize {
        let m = self.micro_batch();
        self.first_sequence(i / m) + i % m
    }

    /// The index in the global batch of the first sequence of a micro-batch.
    ///
    /// Ranks hold aligned runs of the batch, so that their local sums are subtrees. When gradients are scattered after
    /// every micro-batch (ZeRO 2 and 3), ranks that shard together hold such a run and take turns in it: then each
    /// micro-batch of all of them is a subtree, and so is the sum that is left to add over the groups.
    pub fn first_sequence(&self, micro_batch: usize) -> usize {
        let m = self.layout.micro_batch;
        if self.layout.zero >= spec::Zero::Gradients {
            let shard = self.layout.shard_dp();
            let (group, index) = (self.coords.dp / shard, self.coords.dp % shard);
            group * shard * self.local_sequences + (micro_batch * shard + index) * m
        } else {
            self.coords.dp * self.local_sequences + micro_batch * m
        }
    }
}
