//! Tables of published runs, damaged: each is refused with its place and a hint, or every row is estimated or left out.

#[allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it measures, and keeps what fails"
)]
#[path = "../../../tests/fuzz.rs"]
mod harness;

use spec::Catalog;

use crate::runs::Runs;

#[global_allocator]
static ALLOCATOR: harness::Counting = harness::Counting;

/// A header and rows of several sources: dense and mixtures, all columns and few, quoted cells, every way to say a time.
const TABLE: &str = include_str!("fuzz_test.csv");

/// Of each row that could be estimated its layouts are kept, a hundred or more; of a cell some bytes of text.
const TABLE_BYTES: (usize, usize) = (64, 4 << 20);

/// Nobody reads more of a message.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

#[test]
fn fuzz_runs() {
    let catalog = Catalog::builtin().unwrap();
    let header = TABLE.split_inclusive('\n').next().unwrap();
    let rows = TABLE.split_inclusive('\n').skip(1).map(|row| format!("{header}{row}"));
    let good: Vec<Vec<u8>> = rows.chain([TABLE.to_owned()]).map(String::into_bytes).collect();
    let words =
        ["\"", "\"\"", ",,", "\r\n", "999999999", "1e18", "1e-300", "0x10", "dense_layers=", "torchtitan"];
    harness::fuzz_within(
        TABLE_BYTES,
        "runs",
        &good,
        &words,
        |input| input,
        |input| {
            let Ok(text) = std::str::from_utf8(input) else { return false };
            match Runs::parse("runs.csv", text, &catalog) {
                Ok(read) => {
                    for run in &read.runs {
                        assert!(run.step_s > 0.0 && run.step_s.is_finite(), "{} {}", run.id, run.step_s);
                        assert!(!run.placements.is_empty(), "{}", run.id);
                    }
                    true
                }
                Err(e) => {
                    let message = e.to_string();
                    assert!(message.starts_with("runs.csv:"), "no place: {message}");
                    assert!(message.len() <= MESSAGE_BYTES_MAX, "{} bytes: {message}", message.len());
                    assert!(e.exit_code() == 2 && e.hint_text().is_some(), "no hint: {message}");
                    false
                }
            }
        },
    );
}
