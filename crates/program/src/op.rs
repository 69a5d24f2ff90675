use serde::Serialize;
use spec::{NormKind, Router};

use crate::buffer::{GradOut, View};
use crate::comm::{Comm, When};
use crate::coords::Members;
use crate::cost::Cost;
use crate::graph::Phase;
use crate::heads::Heads;
use crate::muon::{Matrix, Shares};
use crate::params::GroupId;
use crate::qk_clip::Makes;
use crate::role::Place;
use crate::rows::RowFn;

/// A stable name for an op in plans, timelines, journals and on the wire: a hash of its name.
///
/// 53 bits, so that programs which read JSON numbers as doubles read it exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct OpId(pub u64);

impl OpId {
    /// The upper bits of FNV-1a (64 bits) of the op's name.
    pub fn of(name: &str) -> OpId {
        OpId(spec::hash::fnv1a(name.bytes()) >> 11)
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
    /// Forward, input gradient or weight gradient.
    pub phase: Phase,
    /// Which part of the step it belongs to.
    pub place: Place,
    /// What it says to other ranks; `None` where nobody is there to talk to.
    pub comm: Option<Comm>,
    /// FLOPs and bytes.
    pub cost: Cost,
}

impl Op {
    /// Whether the op does nothing but talk or wait.
    pub fn only_talks(&self) -> bool {
        use OpKind::*;
        let computes = matches!(self.kind, RingAttention { .. } | RingAttentionGrad { .. } | GradNorm);
        self.comm.is_some() && !computes
    }

    /// Whether the op returns while what it began goes on.
    pub fn goes_on(&self) -> bool {
        self.comm.as_ref().is_some_and(|c| matches!(c.when, When::Begins(_)))
    }
}

/// What an op does. Operands are listed in the order of [`crate::Op::ins`]; shapes are those of the local shard.
///
/// `n` rows are the tokens of one micro-batch (`micro_batch * sequence`, divided by tp between sequence-parallel
/// regions); after [`OpKind::Permute`], `n k` rows of copies in the order of their experts. Every kind is fused to the
/// level at which fast kernels live.
///
/// A field means the same in every kind: `axis` over which ranks, `heads` counts and widths of the local shard, `norm`
/// and `eps` which normalisation and what is added under its root, `vocab0` the first row of the local vocabulary
/// shard, `sees` what bounds attention beside causality, `experts` those of this rank, `top_k` those of a token, `bucket` and `group` indices into the program's.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[expect(missing_docs, reason = "fields of one name mean the same in every kind: said once, above")]
pub enum OpKind {
    /// `(tokens, table, [positions]) -> x [n, D]`; rows outside the vocabulary shard are zero.
    Embed {
        vocab0: usize,
        /// Whether this rank adds the positions: one of the vocabulary shards does.
        positions: bool,
    },
    /// `(tokens, dy) -> grad of the table`.
    EmbedGrad { vocab0: usize },
    /// `(dy) -> grad of the learned positions`.
    PosGrad,
    /// `(x, w, [b]) -> (y, stats)`; stats are `rstd [n]`, preceded by `mean [n]` for LayerNorm.
    Norm { norm: NormKind, eps: f32 },
    /// `(dy, x, w, stats) -> dx`, accumulating.
    NormGradInput { norm: NormKind },
    /// `(dy, x, stats) -> grad of w`, and of b for LayerNorm.
    NormGradWeight { norm: NormKind },
    /// `(qkv, wq, wk) -> (qkv', rstd)`: RMSNorm of every query and key head.
    HeadNorm { heads: Heads, eps: f32 },
    /// `(dqkv', qkv, wq, wk, rstd) -> dqkv`.
    HeadNormGradInput { heads: Heads },
    /// `(dqkv', qkv, rstd) -> grads of wq and wk`.
    HeadNormGradWeight { heads: Heads },
    /// `(x [n, in], w [out, in], [b]) -> y [n, out]`, accumulating: `y = acc + x w^T + b`.
    Linear,
    /// `(dy, w) -> dx = acc + dy w`.
    LinearGradInput,
    /// `(dy, x) -> grad of w = dy^T x`.
    LinearGradWeight,
    /// `(dy) -> grad of b`: column sums.
    BiasGrad,
    /// `(qkv) -> qkv` in place: rotates query and key heads; backward is the inverse rotation.
    Rope {
        heads: Heads,
        /// Rotates back.
        inverse: bool,
    },
    /// `(c [n, q+r+t], wkv, [wq]) -> (latent of keys and values [n, r], shared key part [n, t], rstd, [latent of
    /// queries [n, q]])`: takes the compressed projections apart and norms the latents by root mean square.
    LatentNorm { eps: f32 },
    /// `(dlatent, dshared, [dqueries], c, wkv, rstd, [wq]) -> dc`.
    LatentNormGradInput,
    /// `(dlatent, [dqueries], c, rstd) -> grads of wkv, [wq]`.
    LatentNormGradWeight,
    /// `(q [n, H(d+t)], kv [n, H(d+v)], shared key part [n, t]) -> qkv [n, H(2(d+t)+v)]`: rotates the last `t` dims of
    /// each query and the key part that all heads share, and packs queries, keys and values for attention.
    LatentRope { heads: Heads, rope_dim: usize },
    /// `(dqkv) -> (dq, dkv, dshared)`.
    LatentRopeGrad { heads: Heads, rope_dim: usize },
    /// `(qkv [n, (H+2K)h], [starts [n]], [sinks [1, H]]) -> (o [n, Hh], lse)`: causal grouped-query attention. Where
    /// context-parallel ranks deal heads, `n` rows are whole sequences, `H` and `K` this rank's share, and sinks those of
    /// all ranks.
    Attention { heads: Heads, sees: Sees },
    /// `(qkv, o, lse, do, [starts]) -> dqkv`. Sinks are in `lse`.
    AttentionGrad { heads: Heads, sees: Sees },
    /// `(do, o, lse, sinks) -> grad of the sinks`.
    SinkGrad { heads: Heads },
    /// [`OpKind::Attention`] over sequences that are spread along an axis: keys and values walk a ring of ranks while
    /// each rank's queries attend to those at hand (Liu et al. 2023, arXiv 2310.01889). Each rank holds one piece from
    /// the front of a sequence and its mirror from the back, so that causal work is even.
    ///
    /// `(qkv, [starts], [sinks]) -> (o, lse, keys and values [2 n, K(h+v)], sums [n, Hv], totals)`: behind the results what is held while they
    /// walk: the keys and values that are computed with and those that come meanwhile, and the softmax so far, whose
    /// greatest scores lie in `lse`.
    RingAttention { heads: Heads, sees: Sees, axis: Axis },
    /// `(qkv, o, lse, do, [starts]) -> (dqkv, keys and values [2 n, K(h+v)], dq [n, Hh], gradients [3 n, K(h+v)])`: keys and values
    /// walk the ring again, their gradients, in f32, one hop behind until they are home. Of the three parts of
    /// `gradients` two come and go by turns, and the last is what this rank adds.
    RingAttentionGrad { heads: Heads, sees: Sees, axis: Axis },
    /// `(packed [n, W]) -> parts [ranks n, V]`: of each sequence the rows of every rank in turn, with its share of `heads`
    /// ([`Heads::dealt`]; an output has [`Heads::of_output`]). Key and value heads that are fewer than ranks are copied.
    SplitHeads { heads: Heads, ranks: usize },
    /// `(parts) -> packed`, back; of copies the sum, in the order of the ranks.
    JoinHeads { heads: Heads, ranks: usize },
    /// `(logits [n, E], [biases [1, E]]) -> (gates [n, k], index [n, 2k], counts [E, s])`: each token's `k` best experts,
    /// best first, and their weights, as the model's [`Router`] says. `index` has the place of each copy in the order of (expert,
    /// token), then its expert; `counts` the copies of each expert from each of `s` equal runs of rows: the sequences
    /// of the micro-batch where a rank routes whole ones.
    Route { top_k: usize, router: Router },
    /// `(dgates, logits, index, counts) -> dlogits`, with the gradients of the router's own losses: the balance of each
    /// sequence, as a mean over the `sequences` of the global batch, and the squared log-sum-exp, as a mean over its
    /// tokens. Runs once for each micro-batch, and adds to the step's counts of experts.
    RouteGrad { top_k: usize, router: Router, sequences: usize },
    /// `(x [n, D], index) -> copies [n k, D]` in the order of their experts.
    Permute { top_k: usize },
    /// `(dcopies, index) -> dx`, accumulating: the sum over a token's copies.
    PermuteGrad,
    /// `(copies [n k, D], gates, index) -> y [n, D]`, accumulating: the weighted sum of a token's copies.
    Unpermute { top_k: usize },
    /// `(dy, copies, gates, index) -> (dcopies, dgates)`.
    UnpermuteGrad,
    /// `(x [m, in], w [experts out, in], counts [E, s]) -> y [m, out]`: each of this rank's experts has a matrix of its
    /// own. Rows lie in the order of (rank that sent them, expert), as many as `counts` says, at most `m`; `rows` is an
    /// even share, which costs speak of.
    /// A fourth input `b [experts parts, out / parts]`, if there, has each expert's biases.
    GroupedLinear { experts: usize, rows: usize },
    /// `(dy, w, counts) -> dx`.
    GroupedLinearGradInput { experts: usize, rows: usize },
    /// `(dy, x, counts) -> grad of w`; a run of rows that is counted apart gives an expert at most `leaf_rows`.
    GroupedLinearGradWeight { experts: usize, rows: usize, leaf_rows: usize },
    /// `(dy, counts) -> grads of the biases`: column sums by expert.
    GroupedBiasGrad { experts: usize },
    /// `(gate_up [n, 2F], [counts]) -> h [n, F]`; of as many rows as `counts` adds up to. So the other activations.
    SwiGlu {
        /// Gates and ups have bounds, and another sigmoid ([`spec::Activation::SwiGluClamped`]).
        clamped: bool,
    },
    /// `(dh, gate_up) -> dgate_up`.
    SwiGluGrad { clamped: bool },
    /// `(a) -> h`.
    Gelu { tanh: bool },
    /// `(dh, a) -> da`.
    GeluGrad { tanh: bool },
    /// `(x [n, in]) -> y [n, out]`: a function of each row that the program brings along.
    Rows { of: RowFn },
    /// `(dy, x) -> dx`.
    RowsGrad { of: RowFn },
    /// `(x, y, [b]) -> x + y + b`.
    Add,
    /// `(x [n, D], [b]) -> kept(x + b)`, or that added: each element is left out with probability `rate`, and divided by
    /// `1 - rate` if not. What is drawn follows from the seed, the step, the site, the row's sequence in the global batch and
    /// position there, and the column. It is its own derivative.
    Dropout {
        /// The forward op's id, which no layout changes.
        site: u64,
        rate: f32,
    },
    /// `(logits) -> logits` in place: `c tanh(x / c)`.
    SoftCap { cap: f32 },
    /// `(logits, targets) -> (dlogits in place, loss [n])` over the whole vocabulary.
    Xent {
        #[serde(skip_serializing_if = "LossTerms::is_plain")]
        terms: LossTerms,
    },
    /// `(logits, targets) -> stats [n, 3]` of one vocabulary shard.
    XentStats { vocab0: usize },
    /// `(stats of all shards [shards * n, 3]) -> stats [n, 3]`.
    XentCombine {
        /// How many shards.
        shards: usize,
    },
    /// `(logits, targets, stats) -> (dlogits in place, loss [n])` of one vocabulary shard.
    XentGrad {
        vocab0: usize,
        #[serde(skip_serializing_if = "LossTerms::is_plain")]
        terms: LossTerms,
    },
    /// `(loss [n]) -> the sum of one sequence among the step's loss sums`.
    LossSum {
        /// Which sequence of the micro-batch.
        sequence: usize,
        /// Of the module that predicts one token more, and not of the model.
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        ahead: bool,
    },
    /// Sum over the axis, in place.
    AllReduce { axis: Axis },
    /// `(local rows) -> (rows of all ranks)`, by rank.
    AllGather { axis: Axis },
    /// `(all rows) -> (this rank's rows, summed)`.
    ReduceScatter { axis: Axis },
    /// `(rows, counts that leave, [counts that arrive]) -> (rows, [counts that arrived])`: every rank sends each peer the
    /// rows of its experts, or back. Counts are by (peer, expert), and rows lie in that order; those that arrive go first
    /// unless they are known. Where rows arrive there is room for as many as the layout says ([`spec::ExpertRows`]).
    ///
    /// `(rows) -> rows` without counts: the rows of each sequence are dealt evenly, and arrive in the order of the peers.
    AllToAll { axis: Axis },
    /// `(all rows) -> (this rank's rows)` of what every rank of the axis holds alike; backward gathers.
    Slice { axis: Axis },
    /// The same bytes as [`OpKind::AllGather`], of rows that every rank then uses alike; backward slices.
    Unslice { axis: Axis },
    /// `(x) -> x`, nothing forward; backward sums over the axis. Dropped when blocks are made.
    Fork { axis: Axis },
    /// Activation (forward) or gradient (backward) to another pipeline stage.
    Send {
        /// The rank that receives.
        peer: usize,
        /// Which message of the micro-batch: the virtual stage that receives, and the direction.
        tag: u32,
    },
    /// From another pipeline stage.
    Recv {
        /// The rank that sends.
        peer: usize,
        /// Which message of the micro-batch.
        tag: u32,
    },
    /// Parameters of a range from their shards (ZeRO 3).
    GatherParams {
        /// The embedding, a layer, its experts or the head.
        unit: usize,
        /// The groups gathered together.
        groups: Vec<GroupId>,
    },
    /// Waits for an earlier [`OpKind::GatherParams`].
    WaitParams {
        /// Of which unit.
        unit: usize,
    },
    /// `(gradients of a bucket) -> the same`, summed over ranks that hold the same parameters ([`crate::Replication`]).
    ReduceGrads {
        bucket: usize,
        /// Over which of them, and who gets the sum.
        sum: GradSum,
    },
    /// `(gradients of one micro-batch, scattered) -> partial sums of the owned shard` (ZeRO 2 and 3).
    ShardGrads { bucket: usize },
    /// Waits for an earlier [`OpKind::ReduceGrads`].
    WaitGrads { bucket: usize },
    /// Sums the gradients of parameters that live on several ranks outside dp: tied embeddings, sequence-parallel norms.
    SyncGrads { over: Members, group: GroupId },
    /// Adds the embedding's and the head's gradients of a tied table.
    TieGrads { group: GroupId },
    /// `(gradients of all groups) -> sums of squares by fixed chunks`, each chunk on the rank that owns it, then summed
    /// over all ranks; yields norm and clip factor.
    GradNorm,
    /// `(greatest scores [rows, heads])`: the greatest of each head joins that of the step.
    LogitMax {
        heads: Heads,
        /// Which layer's.
        layer: usize,
    },
    /// `() -> (param, [master])` in place, of the owned range of what makes queries, keys and values: rows of the queries and
    /// keys of heads whose greatest score `s` in the step was above `tau` are scaled by `sqrt(tau / s)`, so that their scores
    /// are by `tau / s` (Kimi Team 2025, arXiv 2507.20534, section 2.1). Heads that share a key go by the greatest of them;
    /// where all share a part of their keys, as in latent attention, what meets it of the queries is scaled by all of it.
    QkClip { group: GroupId, heads: Heads, makes: Makes, layer: usize, tau: f32 },
    /// `(grad) -> (param, [master], first moment, second moment)` in place: AdamW on the owned range of a group.
    AdamW {
        group: GroupId,
        /// Decoupled decay applies.
        decay: bool,
    },
    /// `(grad) -> (momentum, update)`, the momentum in place, of the owned range of a group: `m += (1 - b)(g - m)`, and
    /// Nesterov's look ahead, `g + b (m - g)`.
    MuonMomentum { group: GroupId },
    /// Updates of a group from the ranks that own or hold its parts: `([update]) -> update`, all of it, or the parts of
    /// all members, one under another.
    GatherUpdate { over: Members, group: GroupId },
    /// `(update, or the parts of all tensor-parallel ranks) -> update [rows, D]` of each of some groups: the orthogonal factor
    /// of each matrix, nearly, by an iteration after Newton and Schulz (Jordan 2024; Amsel et al. 2025, arXiv 2505.16932),
    /// times `0.2 sqrt(max(rows, columns))`, which gives it the usual size of AdamW's (Liu et al. 2025, arXiv
    /// 2502.16982, equation 4). Zero for matrices of which another rank has the turn.
    Orthogonalise {
        /// Those whose turn is this rank's first, the largest of them before the others.
        matrices: Vec<Matrix>,
        /// Of each group.
        shares: Vec<Shares>,
    },
    /// `(update) -> update`: the sum over those that took turns, each part to its owner.
    ScatterUpdate { group: GroupId },
    /// `(update) -> (param, [master])` in place on the owned range of a group: decoupled decay, and a step along it.
    Muon {
        group: GroupId,
        /// Decoupled decay applies.
        decay: bool,
    },
    /// `(counts of the step over all ranks [layers E, 1]) -> biases of experts [layers, E]` in place: `b += rate sign(mean of
    /// the layer's counts - count)`, alike on every rank (Wang et al. 2024, arXiv 2408.15664, algorithm 1).
    BalanceExperts { rate: f32 },
    /// `(param or master) -> average` in place, of the owned range of a group: a step towards the updated weights, by the
    /// share `(1 - d) / (1 - d^t)` after step `t`, so that the average over all steps so far has weights `d^(t - s)`.
    Average { group: GroupId },
    /// `() -> (param, [master], average)`: the weights of the owned range and their average change places; run again it is
    /// undone.
    SwapAverage { group: GroupId },
    /// Updated parameters from their owners (ZeRO 1 and 2).
    AllGatherParams { group: GroupId },
    /// `(qkv [n, ..], [sinks]) -> o` against the key and value cache, for generation.
    AttentionCached {
        heads: Heads,
        sees: Sees,
        /// Whose cache.
        layer: usize,
    },
    /// `(q [1, H(d+t)], latent [1, r], shared key part [1, t], w [H(d+v), r], [sinks]) -> o [1, Hv]` against a cache of
    /// latents and shared key parts, for generation. `w` makes keys and values of latents; neither is made.
    LatentCached {
        heads: Heads,
        sees: Sees,
        rope_dim: usize,
        /// Whose cache.
        layer: usize,
    },
}

/// What the gradient of the loss has beside the cross-entropy's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LossTerms {
    /// Factor of the squared log-sum-exp of each row; 0 without. It is no part of the loss that is reported.
    pub z: f32,
    /// Logits were squeezed by [`OpKind::SoftCap`] to this, whose derivative follows; 0 if not.
    pub cap: f32,
    /// Factor of all gradients: below 1 for a loss beside the model's own.
    #[serde(skip_serializing_if = "crate::heads::is_one")]
    pub weight: f32,
}

impl Default for LossTerms {
    fn default() -> LossTerms {
        LossTerms { z: 0.0, cap: 0.0, weight: 1.0 }
    }
}

impl LossTerms {
    /// Cross-entropy of logits as they are.
    fn is_plain(&self) -> bool {
        *self == LossTerms::default()
    }
}

/// A sum of gradients over ranks that hold the same parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GradSum {
    /// Over all of them, to every rank.
    Everywhere,
    /// Over those that shard together, each shard to its owner (ZeRO 1 to 3).
    Scattered,
    /// Of shards, over their owners in all groups that shard (ZeRO over a part of dp).
    Owners,
}

/// What bounds the keys that a query sees, beside its own position, and what else its softmax sums. Operands that it says
/// are there follow the others, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sees {
    /// Tokens of a window; `None` where it sees all of the sequence before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Keys of its own document alone. Position at which each row's document begins: `starts [n]`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub documents: bool,
    /// A learned score for each head: `sinks [1, H]`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sinks: bool,
    /// Which probabilities are left out at random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<AttentionDropout>,
}

/// Probabilities of attention that are left out at random: what is drawn for one follows from the site, the step, the
/// places of sequence and head, and the positions of query and key.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AttentionDropout {
    /// Which attention of the model.
    pub site: u64,
    /// Share that is left out.
    pub rate: f32,
    /// Place of the first head at hand among the model's.
    pub head0: usize,
}

impl Sees {
    /// Everything up to itself, and nothing else.
    pub const ALL: Sees = Sees { window: None, documents: false, sinks: false, dropout: None };

    /// Twice the keys that a query of `sequence` tokens sees in the mean: as many as the sequence has where it sees all
    /// before it (causal attention is counted at half). Documents are as data has them, and not counted.
    pub fn keys_twice(self, sequence: usize) -> u64 {
        let (t, w) = (sequence as u64, self.window.unwrap_or(sequence).min(sequence) as u64);
        if w == t { t } else { w * (2 * t - w) / t }
    }
}

/// An axis of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Data parallel.
    Dp,
    /// Tensor parallel.
    Tp,
    /// Pipeline parallel.
    Pp,
    /// Context parallel.
    Cp,
    /// Expert parallel: neighbours among the ranks of a stage.
    Ep,
}

/// What kinds are called; a kind without a name does not compile.
macro_rules! names {
    ($($kind:pat => $name:literal,)*) => {
        impl OpKind {
            /// The name printed in tables: the variant in snake case.
            pub fn name(&self) -> &'static str {
                use OpKind::*;
                match self {
                    $($kind => $name),*
                }
            }
        }
    };
}

names! {
    Embed { .. } => "embed",
    EmbedGrad { .. } => "embed_grad",
    PosGrad => "pos_grad",
    Norm { .. } => "norm",
    NormGradInput { .. } => "norm_grad_input",
    NormGradWeight { .. } => "norm_grad_weight",
    HeadNorm { .. } => "head_norm",
    HeadNormGradInput { .. } => "head_norm_grad_input",
    HeadNormGradWeight { .. } => "head_norm_grad_weight",
    Linear => "linear",
    LinearGradInput => "linear_grad_input",
    LinearGradWeight => "linear_grad_weight",
    BiasGrad => "bias_grad",
    Rope { .. } => "rope",
    Attention { .. } => "attention",
    AttentionGrad { .. } => "attention_grad",
    SinkGrad { .. } => "sink_grad",
    LatentNorm { .. } => "latent_norm",
    LatentNormGradInput => "latent_norm_grad_input",
    LatentNormGradWeight => "latent_norm_grad_weight",
    LatentRope { .. } => "latent_rope",
    LatentRopeGrad { .. } => "latent_rope_grad",
    RingAttention { .. } => "ring_attention",
    RingAttentionGrad { .. } => "ring_attention_grad",
    SplitHeads { .. } => "split_heads",
    JoinHeads { .. } => "join_heads",
    Route { .. } => "route",
    RouteGrad { .. } => "route_grad",
    Permute { .. } => "permute",
    PermuteGrad => "permute_grad",
    Unpermute { .. } => "unpermute",
    UnpermuteGrad => "unpermute_grad",
    GroupedLinear { .. } => "grouped_linear",
    GroupedLinearGradInput { .. } => "grouped_linear_grad_input",
    GroupedLinearGradWeight { .. } => "grouped_linear_grad_weight",
    AllToAll { .. } => "all_to_all",
    Slice { .. } => "slice",
    Unslice { .. } => "unslice",
    GroupedBiasGrad { .. } => "grouped_bias_grad",
    SwiGlu { clamped: false } => "swiglu",
    SwiGlu { .. } => "swiglu_clamped",
    SwiGluGrad { clamped: false } => "swiglu_grad",
    SwiGluGrad { .. } => "swiglu_clamped_grad",
    Gelu { .. } => "gelu",
    GeluGrad { .. } => "gelu_grad",
    Rows { .. } => "rows",
    RowsGrad { .. } => "rows_grad",
    Add => "add",
    Dropout { .. } => "dropout",
    SoftCap { .. } => "soft_cap",
    Xent { .. } => "xent",
    XentStats { .. } => "xent_stats",
    XentCombine { .. } => "xent_combine",
    XentGrad { .. } => "xent_grad",
    LossSum { .. } => "loss_sum",
    AllReduce { .. } => "all_reduce",
    AllGather { .. } => "all_gather",
    ReduceScatter { .. } => "reduce_scatter",
    Fork { .. } => "fork",
    Send { .. } => "send",
    Recv { .. } => "recv",
    AttentionCached { .. } => "attention_cached",
    LatentCached { .. } => "latent_cached",
    GatherParams { .. } => "gather_params",
    WaitParams { .. } => "wait_params",
    ReduceGrads { .. } => "reduce_grads",
    ShardGrads { .. } => "shard_grads",
    WaitGrads { .. } => "wait_grads",
    SyncGrads { .. } => "sync_grads",
    TieGrads { .. } => "tie_grads",
    GradNorm => "grad_norm",
    BalanceExperts { .. } => "balance_experts",
    AdamW { .. } => "adamw",
    AllGatherParams { .. } => "all_gather_params",
    MuonMomentum { .. } => "muon_momentum",
    GatherUpdate { .. } => "gather_update",
    Orthogonalise { .. } => "orthogonalise",
    ScatterUpdate { .. } => "scatter_update",
    Muon { .. } => "muon",
    Average { .. } => "average",
    SwapAverage { .. } => "swap_average",
    LogitMax { .. } => "logit_max",
    QkClip { .. } => "qk_clip",
}

impl OpKind {
    /// Whether output 0 is written over input 0.
    pub(crate) fn in_place(&self) -> bool {
        use OpKind::*;
        matches!(
            self,
            Rope { .. }
                | SoftCap { .. }
                | Xent { .. }
                | XentGrad { .. }
                | AllReduce { .. }
                | Orthogonalise { .. }
        )
    }
}
