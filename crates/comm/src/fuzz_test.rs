//! Damaged bytes for everything that comes over a wire; the harness is `tests/fuzz.rs`.

#[path = "../../../tests/fuzz.rs"]
mod fuzz;

pub(crate) use fuzz::fuzz;

#[global_allocator]
static COUNTING: fuzz::Counting = fuzz::Counting;
