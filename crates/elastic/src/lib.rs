//! Who takes part in a job, and what becomes of it when somebody is lost: pure decisions, and the words in which agents
//! and ranks tell each other.
//!
//! Nothing here reads a clock, a socket or randomness: time and what was heard are arguments. So the same code is driven by
//! the agents (`launch`) and by a simulation under seeded faults.
//!
//! - [`rendezvous`]: nodes meeting in rounds, around one value that all agree on
//! - [`crew`]: the workers of one agent, and what follows when one is lost
//! - [`succession`]: who holds the agreed value when its holder has died
//! - [`Orders`] and [`Report`]: what an agent and a rank say to each other

pub mod crew;
#[cfg(test)]
mod fuzz_test;
mod mutant;
pub mod rendezvous;
#[cfg(test)]
mod simulation;
pub mod succession;
mod wire;

pub use wire::{AGENT_FD, Orders, Report};
