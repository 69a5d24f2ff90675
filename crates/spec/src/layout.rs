use serde::{Deserialize, Serialize};

use crate::words::words;

/// How a step is spread over ranks and time: axes, schedule, ZeRO stage, recompute.
///
/// World size is `dp * cp * tp * pp`. Ranks are numbered with tp fastest, then cp, dp, pp (Megatron's order
/// tp-cp-dp-pp). Experts are spread over `ep` neighbours among the `dp * cp * tp` ranks of a stage, so `ep` is no factor
/// of the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layout {
    /// Data-parallel ranks.
    pub dp: usize,
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Context-parallel ranks: each holds a part of every sequence.
    pub cp: usize,
    /// How their attention sees the rest of it. JSON leaves a ring out.
    #[serde(skip_serializing_if = "ContextMode::is_ring")]
    pub context: ContextMode,
    /// Expert-parallel ranks: each holds a part of every layer's routed experts, whole ones.
    pub ep: usize,
    /// Activations between tensor-parallel regions are split along the sequence.
    pub sequence_parallel: bool,
    /// What is sharded over dp.
    pub zero: Zero,
    /// Data-parallel ranks that ZeRO shards over, neighbours; each such group holds all of the model, and gradients are
    /// summed across groups besides (HSDP; MiCS, Zhang et al. 2022). All of dp if `None`.
    pub shard: Option<usize>,
    /// Order of forward and backward work on the stages.
    pub schedule: PipelineSchedule,
    /// Model chunks per stage (interleaving); 1 unless the schedule is interleaved.
    pub chunks: usize,
    /// Layers of each virtual stage in order; empty means as [`deal`](Layout::deal) does.
    pub stage_layers: Vec<usize>,
    /// Sequences executed at once. Never changes the numbers, only memory and speed.
    pub micro_batch: usize,
    /// Which activations are recomputed in the backward pass.
    pub recompute: Recompute,
    /// How gradients are summed over ranks.
    pub reduce: Reduce,
    /// For how many rows of its experts a rank has room, where experts are spread over ranks.
    pub expert_rows: ExpertRows,
}

impl Default for Layout {
    fn default() -> Self {
        Layout {
            dp: 1,
            tp: 1,
            pp: 1,
            cp: 1,
            context: ContextMode::Ring,
            ep: 1,
            sequence_parallel: false,
            zero: Zero::Off,
            shard: None,
            schedule: PipelineSchedule::OneFOneB,
            chunks: 1,
            stage_layers: Vec::new(),
            micro_batch: 1,
            recompute: Recompute::None,
            reduce: Reduce::Tree,
            expert_rows: ExpertRows::All,
        }
    }
}

impl Layout {
    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.stage_ranks() * self.pp
    }

    /// Layers of each virtual stage in order: those of `stage_layers`, or else `layers` dealt so that no two virtual stages
    /// differ by more than one.
    ///
    /// Micro-batches pass the stages chunk by chunk, and the slowest stage of a chunk sets its pace. So whole chunks get one
    /// layer more where layers do not divide: the last ones, because the first one's time fills and drains the pipeline.
    /// What then is left goes to stages between the ends, of which the last has the head to do as well.
    ///
    /// ```
    /// let layout = spec::Layout { pp: 4, chunks: 3, ..Default::default() };
    /// assert_eq!(layout.deal(18), [1, 1, 1, 1, 1, 2, 2, 1, 2, 2, 2, 2]);
    /// ```
    pub fn deal(&self, layers: usize) -> Vec<usize> {
        let (pp, virtuals) = (self.pp, self.pp * self.chunks);
        if self.stage_layers.len() == virtuals {
            return self.stage_layers.clone();
        }
        let (least, more) = (layers / virtuals, layers % virtuals);
        let (whole, left) = (more / pp, more % pp);
        let from = usize::from(left + 1 < pp);
        let of_chunk = |v: usize| {
            let (chunk, stage) = (v / pp, v % pp);
            let is_whole = chunk + whole >= self.chunks;
            let is_left = chunk + whole + 1 == self.chunks && (from..from + left).contains(&stage);
            least + usize::from(is_whole || is_left)
        };
        (0..virtuals).map(of_chunk).collect()
    }

    /// Ranks of one pipeline stage.
    pub fn stage_ranks(&self) -> usize {
        self.dp * self.cp * self.tp
    }

    /// Whether keys and values walk around a ring of context-parallel ranks.
    pub fn has_ring(&self) -> bool {
        self.cp > 1 && self.context == ContextMode::Ring
    }

    /// Whether context-parallel ranks take heads over for attention, and see whole sequences with them.
    pub fn deals_heads(&self) -> bool {
        self.cp > 1 && self.context == ContextMode::Heads
    }

    /// Ranks that hold the same dense parameters, or shards of them: gradients are summed over all of these.
    pub fn replicas(&self) -> usize {
        self.dp * self.cp
    }

    /// Ranks that hold the same experts, or shards of them: their gradients are summed over all of these.
    pub fn expert_replicas(&self) -> usize {
        self.stage_ranks() / self.ep.max(1)
    }

    /// Data-parallel ranks that ZeRO shards over.
    pub fn shard_dp(&self) -> usize {
        self.shard.unwrap_or(self.dp)
    }

    /// Of [`Layout::replicas`], those among which ZeRO shards dense parameters, neighbours.
    ///
    /// ```
    /// let layout = spec::Layout { dp: 8, cp: 2, tp: 2, ep: 4, shard: Some(4), ..spec::Layout::default() };
    /// assert_eq!((layout.shards(), layout.replicas()), (8, 16));
    /// assert_eq!((layout.expert_shards(), layout.expert_replicas()), (4, 8));
    /// ```
    pub fn shards(&self) -> usize {
        self.shard_dp() * self.cp
    }

    /// Of [`Layout::expert_replicas`], those among which ZeRO shards experts: the ones in the same group of
    /// [`Layout::shard`]. One where experts are spread over more ranks than that.
    pub fn expert_shards(&self) -> usize {
        (self.shards() * self.tp / self.ep.max(1)).max(1)
    }
}

/// ZeRO stage (Rajbhandari et al. 2020): what is sharded over data-parallel ranks. Written `0..3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Zero {
    /// Nothing: gradients are all-reduced.
    Off,
    /// Optimiser state.
    Optimizer,
    /// Optimiser state and gradients.
    Gradients,
    /// Optimiser state, gradients and parameters.
    Parameters,
}

impl TryFrom<u8> for Zero {
    type Error = String;
    fn try_from(stage: u8) -> Result<Self, String> {
        [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters]
            .get(usize::from(stage))
            .copied()
            .ok_or_else(|| format!("zero = {stage}, expected 0, 1, 2 or 3"))
    }
}

impl From<Zero> for u8 {
    fn from(z: Zero) -> u8 {
        z as u8
    }
}

/// Order of forward and backward work on pipeline stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PipelineSchedule {
    /// All forwards, then all backwards.
    Gpipe,
    /// One forward, one backward (Narayanan et al. 2021).
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B over several chunks a stage.
    Interleaved,
    /// Weight gradients fill the bubble (Qi et al. 2023, ZB-H1).
    ZeroBubble,
}

words!(
    PipelineSchedule: "gpipe" => Gpipe, "1f1b" => OneFOneB, "interleaved" => Interleaved, "zero-bubble" => ZeroBubble
);

/// Which activations are recomputed in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Keep everything that backward needs.
    None,
    /// Recompute what is cheap: norms and activations.
    Selective,
    /// Keep only the input of each layer.
    Full,
}

words!(Recompute: "none" => None, "selective" => Selective, "full" => Full);

/// How attention sees sequences that context-parallel ranks hold parts of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContextMode {
    /// Keys and values walk around a ring of the ranks (Liu et al. 2023, arXiv 2310.01889). Any number of heads will do.
    #[default]
    Ring,
    /// Ranks exchange rows for heads, and back: each sees all of a sequence with its share of the heads (DeepSpeed
    /// Ulysses, Jacobs et al. 2023, arXiv 2309.14509).
    Heads,
}

impl ContextMode {
    /// Whether it goes without saying.
    pub fn is_ring(&self) -> bool {
        *self == ContextMode::Ring
    }

    /// Pieces of every sequence that a rank holds.
    pub(crate) fn pieces(self) -> usize {
        match self {
            ContextMode::Ring => 2,
            ContextMode::Heads => 1,
        }
    }
}

words!(ContextMode: "ring" => Ring, "heads" => Heads);

/// For how many rows of its experts a rank has room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertRows {
    /// For all that can come, should every token choose this rank's experts: what training needs, since no row may be
    /// left out.
    #[default]
    All,
    /// For an even share: what balanced training takes, to plan it.
    Even,
}

words!(ExpertRows: "all" => All, "even" => Even);

/// How gradients are summed over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// In a fixed balanced tree over sequences: bit-identical for every layout.
    Tree,
    /// Along a ring: any degree of data parallelism, bits depend on the layout.
    Ring,
}

words!(Reduce: "tree" => Tree, "ring" => Ring);
