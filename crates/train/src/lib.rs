//! The executor and the step loop of one rank.

mod arena;
mod cache;
mod exec;
mod generate;
mod init;
mod mesh;
mod rope;
mod spans;
mod state;
mod tail;
mod workspace;

pub use arena::Arena;
pub use exec::{Executor, StepInputs, StepOutputs};
pub use generate::Sampling;
pub use mesh::Mesh;
pub use spans::{Span, Spans};
pub use workspace::workspace_len;
