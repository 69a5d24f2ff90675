//! Whatever is written for a key: it is refused by name with a hint, or the run that comes of it is sound.

use super::tests::load;
use super::*;
use crate::Error;

const VALUES: &[&str] = &[
    "-1",
    "0",
    "1",
    "-9223372036854775808",
    "9223372036854775807",
    "340282366920938463463374607431768211456",
    "0.5",
    "-0.0",
    "1e-320",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "-inf",
    "true",
    "1979-05-27",
    "\"\"",
    "\"none\"",
    "\"auto\"",
    "\"1e400T\"",
    "\"-3M\"",
    "\"99,nan,0\"",
    "\"a\\u001b[31mb\\u202e\\u0000\"",
    "[]",
    "[-1]",
    "[\"\"]",
    "[18446744073709551615]",
    "{}",
    "{ prefix = 3 }",
    "[{ prefix = \"a\", weight = nan }]",
];

fn check(file: &str, key: &str) {
    match load(file, &[]) {
        Ok(run) => {
            let steps = run.train.steps;
            for step in [1, steps.div_ceil(2), steps] {
                let lr = run.lr_at(step);
                assert!(lr.is_finite() && lr >= 0.0, "{file}: learning rate {lr} of step {step}");
            }
            assert_eq!(load(&run.to_toml(), &[]).expect("what was written reads back"), run, "{file}");
        }
        Err(e) => check_refusal(file, key, &e),
    }
}

fn check_refusal(file: &str, key: &str, e: &Error) {
    let message = e.to_string();
    assert_eq!(e.exit_code(), 2, "{file}: {message}");
    assert!(e.hint_text().is_some_and(|h| !h.is_empty()), "{file}: no hint: {message}");
    assert!(!message.contains(|c: char| c.is_control() || c == '\u{202e}'), "{file}: {message:?}");
    let section = key.split('.').next().unwrap_or_default();
    assert!(message.contains(section), "{file}: {message} names nothing of [{section}]");
    // A contradiction may be told from its other side.
    assert!(
        message.contains("run.toml:3")
            || message.contains(" is not ")
            || message.contains("does not divide")
            || !message.contains(key),
        "{file}: {message}"
    );
}

#[test]
fn nonsense_is_refused_by_name_or_harmless() {
    for key in RunSpec::keys() {
        for value in VALUES {
            check(&format!("# a run\n\n{} = {value}\n", key.path), key.path);
        }
    }
}

#[test]
fn a_damaged_file_is_refused_with_its_line() {
    let whole = load("", &[]).expect("the defaults").to_toml();
    let cut = |end: usize| whole.get(..end).map(|text| load(text, &[]));
    for end in 0..whole.len() {
        if let Some(Err(e)) = cut(end) {
            assert!(e.to_string().contains("run.toml:") && e.hint_text().is_some(), "{end}: {e}");
        }
    }
    for (at, _) in whole.char_indices().step_by(7) {
        for noise in ["\u{0}", "\"", "\u{1b}", "=", "[", "\u{feff}"] {
            let mut text = whole.clone();
            text.insert_str(at, noise);
            if let Err(e) = load(&text, &[]) {
                let message = e.to_string();
                assert!(e.hint_text().is_some(), "{message}");
                assert!(!message.contains(|c: char| c.is_control() && c != '\n'), "{message:?}");
            }
        }
    }
}
