//! Published training runs and serving figures: rows of a table as problems, constants fitted on them, answers judged by
//! them.
//!
//! Nothing here does I/O: tables come in as text, calibrations and errors go out as values.

pub mod columns;
pub mod fit;
pub mod inference;
pub mod memory;
pub mod rehearsed;
pub mod runs;
pub mod validate;

#[cfg(test)]
mod fuzz_test;
