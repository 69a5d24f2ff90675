//! Who takes part in a job, and what becomes of it when somebody is lost: pure decisions, and the words in which agents
//! and ranks tell each other.
//!
//! Nothing here reads a clock, a socket or randomness: time and what was heard are arguments.

pub mod crew;
#[cfg(test)]
mod fuzz_test;
mod mutant;
pub mod rendezvous;
#[cfg(test)]
mod simulation;
pub mod succession;
mod wire;

pub use wire::{Orders, Report};
