//! Price a step program in closed form and search layouts.
//!
//! Nothing here does I/O: clusters, models and tables come in as values, answers go out as values with their reasons.

pub mod compute;
pub mod network;
pub mod shape;
