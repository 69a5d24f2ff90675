//! Phalanx as a library: training loops of one's own on its step programs, its planner, its data and its journals.
//!
//! The binary does the same with run files. Four examples in `examples/` are where to begin:
//!
//! | example | shows |
//! | --- | --- |
//! | `ddp` | a training loop over ranks that any launcher started, with layers emitted by hand |
//! | `custom_layer` | a function with its own derivative inside a layer, held to finite differences |
//! | `plan` | the best layout of a model on a cluster, and why |
//! | `resume` | a loop that goes on from its newest checkpoint after a kill, under any layout |
//!
//! A loop has five parts. A [`Job`] is this process among the ranks. A [`Request`] says what model is trained under what
//! [`Layout`]; an [`Executor`] compiles it to the program of one rank and holds its memory. A
//! [`DistributedSampler`](data::DistributedSampler) over the program's positions gives each rank its samples, and
//! [`Executor::step`] trains on them: gradients are summed over ranks, clipped, and applied. Whoever changes the layout
//! changes nothing else, and in data and pipeline parallelism and ZeRO no bit either.
//!
//! ```
//! use phalanx::{Executor, Job, Layout, ModelSpec, StepInputs, data::Windows};
//!
//! let (model, layout) = (ModelSpec { vocab: 256, ..ModelSpec::preset("tiny")? }, Layout::default());
//! let job = Job::join()?;
//! let request = job.request(&model, &layout, 32, 4);
//! let mut exec = Executor::on(job.device(), &request, job.mesh(&layout)?, false)?;
//! exec.initialise(&model, 42)?;
//! let text = "Phalanx plans, rehearses and runs the training of large models. ".repeat(4);
//! exec.load_samples(&Windows::bytes(&text, 32)?, &[0, 1, 2, 3])?;
//! let before = exec.step(&StepInputs::adamw(1, 1e-2, 4 * 32))?.loss;
//! let after = exec.step(&StepInputs::adamw(2, 1e-2, 4 * 32))?.loss;
//! assert!(after < before);
//! # job.leave()?;
//! # Ok::<(), phalanx::Error>(())
//! ```
//!
//! # What may be relied on
//!
//! The names in this crate are the public surface: `crates/phalanx/tests/library/surface.txt` lists them, and a test
//! holds the list. Until version 1 a minor version may change them, with an entry in the changelog.

#![warn(missing_docs)]

mod job;

pub use ckpt::{Checkpoint, Meta, latest};
pub use job::{Job, exit, layout};
pub use program::{Emitter, Layer, Program, Request, Role, RowFn, ValueId};
pub use spec::{
    ContextMode, DType, Error, Layout, ModelSpec, PipelineSchedule, Recompute, Result, RunSpec, Zero,
};
pub use train::{Cpu, Device, Executor, Mesh, StepInputs, StepOutputs};

/// Tokens and samples.
pub mod data {
    pub use ::data::{
        Blend, DistributedSampler, Epochs, GptDataset, IndexedDataset, IndexedWriter, Source, Split,
        TokenStream, TokenType, Tokenizer, Windows,
    };
}

/// Layouts searched and estimated in closed form.
pub mod planner {
    pub use plan::answer::{Answer, Choice, Question, plan};
    pub use plan::calibration::Calibration;
    pub use plan::models::find as model;
    pub use plan::shape::Shape;
    pub use spec::{Catalog, Cluster};
}

/// Records of runs.
pub mod journals {
    pub use journal::{Journal, Record, Step};
}
