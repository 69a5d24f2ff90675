//! Damaged bytes for what nodes read in the store; the harness is `tests/fuzz.rs`.

#[allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it measures, and keeps what fails"
)]
#[path = "../../../tests/fuzz.rs"]
mod fuzz;

pub(crate) use fuzz::{fuzz, number};

#[global_allocator]
static COUNTING: fuzz::Counting = fuzz::Counting;
