use serde::{Deserialize, Serialize};

/// How a step is spread over ranks and time: axes, schedule, ZeRO stage, recompute.
///
/// World size is `dp * tp * pp`. Ranks are numbered with tp fastest, then dp, then pp (Megatron's order tp-dp-pp).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layout {
    /// Data-parallel ranks.
    pub dp: usize,
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Activations between tensor-parallel regions are split along the sequence.
    pub sequence_parallel: bool,
    /// What is sharded over dp.
    pub zero: Zero,
    /// Order of forward and backward work on the stages.
    pub schedule: PipelineSchedule,
    /// Model chunks per stage (interleaving); 1 unless the schedule is interleaved.
    pub chunks: usize,
    /// Layers of each virtual stage in order; empty means as even as possible.
    pub stage_layers: Vec<usize>,
    /// Sequences executed at once. Never changes the numbers, only memory and speed.
    pub micro_batch: usize,
    /// Which activations are recomputed in the backward pass.
    pub recompute: Recompute,
    /// How gradients are summed over ranks.
    pub reduce: Reduce,
}

impl Default for Layout {
    fn default() -> Self {
        Layout {
            dp: 1,
            tp: 1,
            pp: 1,
            sequence_parallel: false,
            zero: Zero::Off,
            schedule: PipelineSchedule::OneFOneB,
            chunks: 1,
            stage_layers: Vec::new(),
            micro_batch: 1,
            recompute: Recompute::None,
            reduce: Reduce::Tree,
        }
    }
}

impl Layout {
    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.dp * self.tp * self.pp
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

/// Which activations are recomputed in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Keep everything that backward needs.
    None,
    /// Recompute what is cheap: norms and activations.
    Selective,
    /// Keep only the input of each layer.
    Full,
}

/// How gradients are summed over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reduce {
    /// In a fixed balanced tree over sequences: bit-identical for every layout.
    Tree,
    /// Along a ring: any degree of data parallelism, bits depend on the layout.
    Ring,
}
