use serde::Serialize;
use spec::NormKind;

use crate::params::GroupId;

/// What an op does. Operands are listed in the order of [`crate::Op::ins`]; shapes are those of the local shard.
///
/// `n` rows are the tokens of one micro-batch (`micro_batch * sequence`, divided by tp between sequence-parallel
/// regions). Every kind is fused to the level at which fast kernels live.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum OpKind {
    /// `(tokens, table, [positions]) -> x [n, D]`; rows outside the vocabulary shard are zero.
    Embed {
        /// First vocabulary row of the local shard.
        vocab0: usize,
        /// Whether this rank adds the positions: one of the vocabulary shards does.
        positions: bool,
    },
    /// `(tokens, dy) -> grad of the table`.
    EmbedGrad {
        /// First vocabulary row of the local shard.
        vocab0: usize,
    },
    /// `(dy) -> grad of the learned positions`.
    PosGrad,
    /// `(x, w, [b]) -> (y, stats)`; stats are `rstd [n]`, preceded by `mean [n]` for LayerNorm.
    Norm {
        /// Which normalisation.
        norm: NormKind,
        /// Added to the variance.
        eps: f32,
    },
    /// `(dy, x, w, stats) -> dx`, accumulating.
    NormGradInput {
        /// Which normalisation.
        norm: NormKind,
    },
    /// `(dy, x, stats) -> grad of w`, and of b for LayerNorm.
    NormGradWeight {
        /// Which normalisation.
        norm: NormKind,
    },
    /// `(qkv, wq, wk) -> (qkv', rstd)`: RMSNorm of every query and key head.
    HeadNorm {
        /// Head counts and width.
        heads: Heads,
        /// Added to the variance.
        eps: f32,
    },
    /// `(dqkv', qkv, wq, wk, rstd) -> dqkv`.
    HeadNormGradInput {
        /// Head counts and width.
        heads: Heads,
    },
    /// `(dqkv', qkv, rstd) -> grads of wq and wk`.
    HeadNormGradWeight {
        /// Head counts and width.
        heads: Heads,
    },
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
        /// Head counts and width.
        heads: Heads,
        /// Rotates back.
        inverse: bool,
    },
    /// `(qkv [n, (H+2K)h]) -> (o [n, Hh], lse)`: causal grouped-query attention.
    Attention {
        /// Head counts and width.
        heads: Heads,
    },
    /// `(qkv, o, lse, do) -> dqkv`.
    AttentionGrad {
        /// Head counts and width.
        heads: Heads,
    },
    /// `(gate_up [n, 2F]) -> h [n, F]`.
    SwiGlu,
    /// `(dh, gate_up) -> dgate_up`.
    SwiGluGrad,
    /// `(a) -> h`.
    Gelu {
        /// The tanh approximation.
        tanh: bool,
    },
    /// `(dh, a) -> da`.
    GeluGrad {
        /// The tanh approximation.
        tanh: bool,
    },
    /// `(x, y, [b]) -> x + y + b`.
    Add,
    /// `(logits, targets) -> (dlogits in place, loss [n])` over the whole vocabulary.
    Xent,
    /// `(logits, targets) -> stats [n, 3]` of one vocabulary shard.
    XentStats {
        /// First vocabulary row of the local shard.
        vocab0: usize,
    },
    /// `(stats of all shards [shards * n, 3]) -> stats [n, 3]`.
    XentCombine {
        /// How many shards.
        shards: usize,
    },
    /// `(logits, targets, stats) -> (dlogits in place, loss [n])` of one vocabulary shard.
    XentGrad {
        /// First vocabulary row of the local shard.
        vocab0: usize,
    },
    /// `(loss [n]) -> one leaf of the step's loss sums`.
    LossSum,
    /// Sum over the axis, in place.
    AllReduce {
        /// Over which ranks.
        axis: Axis,
    },
    /// `(local rows) -> (rows of all ranks)`, by rank.
    AllGather {
        /// Over which ranks.
        axis: Axis,
    },
    /// `(all rows) -> (this rank's rows, summed)`.
    ReduceScatter {
        /// Over which ranks.
        axis: Axis,
    },
    /// `(x) -> x`, nothing forward; backward sums over the axis. Dropped when blocks are made.
    Fork {
        /// Over which ranks.
        axis: Axis,
    },
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
        /// The embedding, a layer or the head.
        unit: usize,
        /// The groups gathered together.
        groups: Vec<GroupId>,
    },
    /// Waits for an earlier [`OpKind::GatherParams`].
    WaitParams {
        /// Of which unit.
        unit: usize,
    },
    /// Gradients of a bucket, summed over dp: to every rank, or each shard to its owner.
    ReduceGrads {
        /// Which bucket.
        bucket: usize,
        /// Only the owner keeps its shard (ZeRO 1 to 3).
        scatter: bool,
    },
    /// `(gradients of one micro-batch, scattered) -> partial sums of the owned shard` (ZeRO 2 and 3).
    ShardGrads {
        /// Which bucket.
        bucket: usize,
    },
    /// Waits for an earlier [`OpKind::ReduceGrads`].
    WaitGrads {
        /// Which bucket.
        bucket: usize,
    },
    /// Sums the gradients of parameters that live on several ranks outside dp: tied embeddings, sequence-parallel norms.
    SyncGrads {
        /// Over which ranks.
        over: Sync,
        /// Whose gradients.
        group: GroupId,
    },
    /// Adds the embedding's and the head's gradients of a tied table.
    TieGrads {
        /// The table's group.
        group: GroupId,
    },
    /// Sum of squares of the owned gradients by fixed chunks, over all ranks; yields norm and clip factor.
    GradNorm,
    /// AdamW on the owned range of a parameter group.
    AdamW {
        /// Which group.
        group: GroupId,
        /// Decoupled decay applies.
        decay: bool,
    },
    /// Updated parameters from their owners (ZeRO 1 and 2).
    AllGatherParams {
        /// Whose parameters.
        group: GroupId,
    },
    /// `(qkv [n, ..]) -> o` against the key and value cache, for generation.
    AttentionCached {
        /// Head counts and width.
        heads: Heads,
    },
}

/// Which ranks share a parameter outside dp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sync {
    /// First and last pipeline stage: tied embeddings.
    Embedding,
    /// The tensor-parallel group: parameters used on sequence shards.
    TensorParallel,
}

/// Heads of the local shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key and value heads.
    pub kv: usize,
    /// Width of one head.
    pub dim: usize,
}

impl Heads {
    /// Columns of the packed query, key and value projections.
    pub fn packed(self) -> usize {
        (self.q + 2 * self.kv) * self.dim
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
}

impl OpKind {
    /// The name printed in tables: the variant in snake case.
    pub fn name(&self) -> &'static str {
        use OpKind::*;
        match self {
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
            SwiGlu => "swiglu",
            SwiGluGrad => "swiglu_grad",
            Gelu { .. } => "gelu",
            GeluGrad { .. } => "gelu_grad",
            Add => "add",
            Xent => "xent",
            XentStats { .. } => "xent_stats",
            XentCombine { .. } => "xent_combine",
            XentGrad { .. } => "xent_grad",
            LossSum => "loss_sum",
            AllReduce { .. } => "all_reduce",
            AllGather { .. } => "all_gather",
            ReduceScatter { .. } => "reduce_scatter",
            Fork { .. } => "fork",
            Send { .. } => "send",
            Recv { .. } => "recv",
            GatherParams { .. } => "gather_params",
            WaitParams { .. } => "wait_params",
            ReduceGrads { .. } => "reduce_grads",
            ShardGrads { .. } => "shard_grads",
            WaitGrads { .. } => "wait_grads",
            SyncGrads { .. } => "sync_grads",
            TieGrads { .. } => "tie_grads",
            GradNorm => "grad_norm",
            AdamW { .. } => "adamw",
            AllGatherParams { .. } => "all_gather_params",
            AttentionCached { .. } => "attention_cached",
        }
    }

    /// Whether ranks talk.
    pub fn is_communication(&self) -> bool {
        use OpKind::*;
        matches!(
            self,
            AllReduce { .. }
                | AllGather { .. }
                | ReduceScatter { .. }
                | Send { .. }
                | Recv { .. }
                | GatherParams { .. }
                | WaitParams { .. }
                | ReduceGrads { .. }
                | WaitGrads { .. }
                | SyncGrads { .. }
                | AllGatherParams { .. }
        )
    }

    /// Whether output 0 is written over input 0.
    pub(crate) fn in_place(&self) -> bool {
        use OpKind::*;
        matches!(self, Rope { .. } | Xent | XentGrad { .. } | AllReduce { .. })
    }
}
