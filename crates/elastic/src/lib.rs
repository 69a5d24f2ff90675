//! Who takes part in a job, and what becomes of it when somebody is lost: pure decisions, and the words in which agents
//! and ranks tell each other.
//!
//! Nothing here reads a clock, a socket or randomness: time and what was heard are arguments.

mod wire;

pub use wire::{Orders, Report};
