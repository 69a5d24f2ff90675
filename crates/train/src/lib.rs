//! The executor and the step loop of one rank.

mod arena;
mod cache;
mod checkpoint;
mod exec;
mod generate;
mod generator;
mod init;
mod mesh;
mod rope;
mod run_dir;
mod spans;
mod state;
mod tail;
mod trainer;
mod workspace;

pub use arena::Arena;
pub use checkpoint::import_weights;
pub use exec::{Executor, StepInputs, StepOutputs};
pub use generate::Sampling;
pub use generator::Generator;
pub use mesh::Mesh;
pub use run_dir::{RunDir, read};
pub use spans::{CpuClock, Span, Spans};
pub use trainer::{Event, Outcome, Start, Trainer, host, memory_bytes, now_us, prepare};
pub use workspace::workspace_len;
