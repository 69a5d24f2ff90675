//! The executor and the step loop of one rank.

mod arena;
mod checkpoint;
mod cpu;
mod device;
mod exec;
mod generate;
mod generator;
mod init;
mod launch;
mod mesh;
mod null;
mod resolve;
mod rope;
mod run_dir;
mod spans;
mod state;
mod tail;
mod trainer;
mod workspace;

pub use arena::Arena;
pub use checkpoint::import_weights;
pub use cpu::Cpu;
pub use device::{Device, Lack, check_runs};
pub use exec::{Executor, StepInputs, StepOutputs};
pub use generate::Sampling;
pub use generator::Generator;
pub use launch::{Gradient, Launch, Message, Operand, Turn};
pub use mesh::Mesh;
pub use null::Null;
pub use run_dir::{RunDir, read};
pub use spans::{CpuClock, Span, Spans};
pub use state::State;
pub use trainer::{Event, Outcome, Start, Trainer, host, memory_bytes, now_us, prepare};
pub use workspace::workspace_len;
