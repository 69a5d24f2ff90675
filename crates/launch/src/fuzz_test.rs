//! Damaged bytes for what nodes read in the store; the harness is `tests/fuzz.rs`.

#[path = "../../../tests/fuzz.rs"]
mod fuzz;

pub(crate) use fuzz::fuzz;

#[global_allocator]
static COUNTING: fuzz::Counting = fuzz::Counting;
