//! Published training runs: rows of a table as problems, the planner's constants fitted on them, its answers judged
//! by them.
//!
//! Nothing here does I/O: tables come in as text, calibrations and errors go out as values.

pub mod fit;
pub mod runs;
pub mod validate;

#[cfg(test)]
mod fuzz_test;
