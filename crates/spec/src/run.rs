//! The run file: everything that says what a training run is, as one checked value.

pub(crate) mod keys;
mod ramp;
mod read;
mod trouble;
mod write;

pub use keys::{Key, KeyKind, THREADS_MAX};
pub use ramp::{BatchRamp, BatchStage};
pub use trouble::{OnCorruption, OnNan, OnSpike, TroubleSpec};
pub use write::Difference;

use crate::words::words;
use crate::{DType, Error, Layout, LrSchedule, ModelSpec, Origin, Result, ScheduleKind};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A training run: model, data, batch, optimiser, schedule, precision, layout, checkpoints, seed.
///
/// Made by [`RunSpec::load`], so every value has been checked, alone and against the others.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSpec {
    /// What is trained.
    pub model: ModelSpec,
    /// On what.
    pub data: DataSpec,
    /// In which portions.
    pub batch: BatchSpec,
    /// By which update.
    pub optim: OptimSpec,
    /// With which learning rates.
    pub schedule: ScheduleSpec,
    /// For how long, how precisely, watched how often.
    pub train: TrainSpec,
    /// Spread how.
    pub layout: Layout,
    /// The layout is still to be chosen for the machine at hand; until then [`RunSpec::layout`] is the default one.
    pub auto_layout: bool,
    /// Saved how often.
    pub checkpoint: CheckpointSpec,
    /// Where.
    pub run: RunDirSpec,
    /// What is done about steps that are not like others.
    pub trouble: TroubleSpec,
    /// How text is generated.
    pub sample: SampleSpec,
}

/// A run as read, and who set its keys: what was left open may still be chosen for the machine at hand.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The run.
    pub run: RunSpec,
    origins: BTreeMap<&'static str, Origin>,
}

/// `[data]`: what to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSpec {
    /// Where tokens come from.
    pub source: DataSource,
    /// A `tokenizer.json`; `None` trains one from the text.
    pub tokenizer: Option<PathBuf>,
    /// Vocabulary of the tokenizer that is trained.
    pub vocab_size: usize,
    /// The field of JSON documents that holds the text; `None` is `text`.
    pub field: Option<String>,
    /// JSON documents that cannot be read are left out, rather than an error.
    pub skip_bad: bool,
    /// The token that ends a document; `None` is the tokenizer's own.
    pub eod: Option<String>,
    /// How far attention reaches in a sequence that several documents fill.
    pub attend: Attend,
    /// Weights of the train, validation and test splits; not negative, the first above zero, in any scale.
    pub split: [f64; 3],
    /// Where prepared data is kept; `None` leaves the choice to the program.
    pub cache_dir: Option<PathBuf>,
}

/// How far attention reaches in a sequence that several documents fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attend {
    /// Over all of the sequence before a token.
    #[default]
    All,
    /// Inside a token's own document (Llama 3, arXiv 2407.21783, section 3.2).
    Documents,
}

words!(Attend: "all" => All, "documents" => Documents);

/// Where tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub enum DataSource {
    /// Nothing was named: the sources of the crates that cargo fetched.
    CargoSources,
    /// Files, folders or globs of text.
    Text(Vec<PathBuf>),
    /// A tokenised dataset `PREFIX.bin` and `PREFIX.idx`.
    Prefix(PathBuf),
    /// Several tokenised datasets.
    Blend(Vec<BlendPart>),
}

/// One dataset of a blend.
#[derive(Clone, Debug, PartialEq)]
pub struct BlendPart {
    /// `PREFIX.bin` and `PREFIX.idx`.
    pub prefix: PathBuf,
    /// Its share, above zero, in any scale.
    pub weight: f64,
}

/// `[batch]`: the global batch of one optimiser step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSpec {
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// Steps are smaller at first, and grow to that.
    pub ramp: Option<BatchRamp>,
}

impl BatchSpec {
    /// Tokens of the global batch, once it is full.
    pub fn tokens(&self) -> u64 {
        self.sequence as u64 * self.sequences as u64
    }
}

/// `[optim]`: how gradients become updates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimSpec {
    /// By which rule.
    pub kind: Optimizer,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of weights per unit of learning rate; not on norms and biases.
    pub weight_decay: f64,
    /// Largest global gradient norm; `None` does not clip.
    pub grad_clip: Option<f64>,
    /// Decay of the momentum of Muon's matrices.
    pub momentum: f64,
    /// Greatest score of attention that a step leaves a head, by scaling down what makes queries and keys; 0 bounds none
    /// (Kimi Team 2025, arXiv 2507.20534, section 2.1).
    pub qk_clip: f32,
}

/// The rule by which gradients become updates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optimizer {
    /// AdamW with decoupled decay (Loshchilov and Hutter 2019, arXiv 1711.05101) for every parameter.
    #[default]
    AdamW,
    /// Matrices inside layers by their orthogonalised momentum (Jordan 2024, <https://kellerjordan.github.io/posts/muon>),
    /// scaled so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, section 2.2); AdamW for
    /// embeddings, the output projection, routers, norms and biases.
    Muon,
}

words!(Optimizer: "adamw" => AdamW, "muon" => Muon);

/// `[schedule]`: the course of the learning rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScheduleSpec {
    /// Course after warmup.
    pub kind: ScheduleKind,
    /// Steps of linear warmup.
    pub warmup_steps: usize,
    /// Steps of the final decay; 0 unless the kind is WSD.
    pub decay_steps: usize,
    /// Learning rate at the end.
    pub min_lr: MinLr,
}

/// The learning rate at the end of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MinLr {
    /// As such.
    Rate(f64),
    /// As a share of the peak.
    Ratio(f64),
}

impl MinLr {
    /// The rate for this peak.
    pub fn rate(self, peak: f64) -> f64 {
        match self {
            MinLr::Rate(rate) => rate,
            MinLr::Ratio(ratio) => peak * ratio,
        }
    }
}

/// `[train]`: length, precision and what is watched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainSpec {
    /// Optimiser steps.
    pub steps: usize,
    /// Storage of parameters and activations: [`DType::F32`], or [`DType::Bf16`] with f32 master weights.
    pub precision: DType,
    /// Factor of the mean squared log-sum-exp of the logits, beside the loss, which it is not counted in (Chowdhery et
    /// al. 2022, arXiv 2204.02311, section 5); 0 without.
    pub z_loss: f32,
    /// Share of what layers add to the residual stream, and of embeddings, that training leaves out; 0 leaves all in.
    pub dropout: f32,
    /// Share of the probabilities of attention that training leaves out; 0 leaves all in.
    pub attention_dropout: f32,
    /// Decay of the average of the weights over steps that evaluation looks at too; 0 keeps none.
    pub ema: f64,
    /// Steps between evaluations; `None` never evaluates.
    pub eval_every: Option<usize>,
    /// Global batches of one evaluation.
    pub eval_batches: usize,
    /// Steps between printed lines.
    pub log_every: usize,
    /// Seed of weights and data order.
    pub seed: u64,
    /// Tokens sampled when training ends; 0 samples nothing.
    pub sample_tokens: usize,
}

/// `[checkpoint]`: what is saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSpec {
    /// Where they go, a directory or a URL; `None` puts them into the run's directory.
    pub dir: Option<PathBuf>,
    /// Steps between checkpoints; `None` saves none before the end.
    pub every: Option<usize>,
    /// Newest checkpoints kept; `None` keeps all.
    pub keep: Option<usize>,
    /// Checkpoints of every so many steps are kept too; `None` keeps none for that.
    pub keep_every: Option<usize>,
    /// Written while training goes on.
    pub background: bool,
    /// Steps between copies of each rank's share in the memory of another, where ranks can go on without one that is
    /// lost; `None` makes none.
    pub memory_every: Option<usize>,
}

/// `[run]`: where the run lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDirSpec {
    /// Journal, checkpoints and the resolved run file.
    pub dir: PathBuf,
    /// Threads of a rank; `None` takes its share of the machine's cores.
    pub threads: Option<usize>,
    /// What ranks compute on.
    pub device: DeviceChoice,
    /// What carries messages between GPUs.
    pub messages: MessageChoice,
    /// How long ranks wait for each other before one is held to be lost.
    pub timeout_s: u64,
    /// Steps between comparisons of what several ranks hold alike; `None` compares nothing.
    pub verify_every: Option<usize>,
    /// Steps whose waits are put together to find who keeps others waiting; `None` looks for nobody.
    pub straggler_window: Option<usize>,
}

/// What a rank computes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one that can be used, else the host.
    #[default]
    Auto,
    /// The host's cores.
    Cpu,
    /// An NVIDIA GPU, or an error that says what is missing.
    Cuda,
}

words!(DeviceChoice: "auto" => Auto, "cpu" => Cpu, "cuda" => Cuda);

/// What carries messages between ranks that compute on GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MessageChoice {
    /// NCCL in every group whose ranks all have it and a GPU of their own, else the host's memory.
    #[default]
    Auto,
    /// The host's memory and its own transport.
    Host,
    /// NCCL, or an error that says what is missing.
    Nccl,
}

words!(MessageChoice: "auto" => Auto, "host" => Host, "nccl" => Nccl);

/// `[sample]`: how text is generated.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleSpec {
    /// Text to continue.
    pub prompt: String,
    /// Tokens to generate.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Sample among this many likeliest tokens; `None` among all.
    pub top_k: Option<usize>,
    /// Sample among the likeliest tokens that hold this share of the probability, above 0; 1 is all.
    pub top_p: f64,
}

impl RunSpec {
    /// The learning rate of every step, as a value.
    pub(crate) fn lr_schedule(&self) -> LrSchedule {
        LrSchedule {
            kind: self.schedule.kind,
            peak: self.optim.lr,
            min: self.schedule.min_lr.rate(self.optim.lr),
            steps: self.train.steps,
            warmup_steps: self.schedule.warmup_steps,
            decay_steps: self.schedule.decay_steps,
        }
    }

    /// The learning rate of `step`, which counts from 1.
    ///
    /// ```
    /// use spec::RunSpec;
    /// let set = ["optim.lr=0.4", "schedule.warmup_steps=4", "schedule.min_lr=0", "train.steps=8"].map(String::from);
    /// let run = RunSpec::load(None, &set, &RunSpec::no_files)?;
    /// assert_eq!([run.lr_at(1), run.lr_at(4), run.lr_at(8)], [0.1, 0.4, 0.0]);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn lr_at(&self, step: usize) -> f64 {
        self.lr_schedule().at(step)
    }

    /// Checks a layout against the model and every size that the batch has on its way.
    ///
    /// # Errors
    /// As [`Layout::validate`], with the size if it is not the full batch.
    pub fn validate_layout(&self, layout: &Layout) -> Result<()> {
        let BatchSpec { sequence, sequences: full, .. } = self.batch;
        self.batch.stages().try_for_each(|stage| {
            let fits = layout.validate(&self.model, stage.sequences, sequence);
            let on_its_way =
                |e: Error| e.context(format!("batch.ramp: a step of {} sequences", stage.sequences));
            fits.map_err(|e| if stage.sequences == full { e } else { on_its_way(e) })
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;

#[cfg(test)]
pub(crate) mod nonsense_tests;
