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

/// What is wrong with how `file`, which sets a key in its third line, is taken.
fn problem(file: &str) -> Option<String> {
    let run = match load(file, &[]) {
        Ok(run) => run,
        // A contradiction may be told from its other side.
        Err(e) => {
            let keys = RunSpec::keys().iter().map(|k| k.path);
            return problem_of_refusal(&e, &keys.chain(["run.toml:3"]).collect::<Vec<_>>());
        }
    };
    problem_of_run(&run)
}

/// What is unsound about a run that was accepted.
pub(crate) fn problem_of_run(run: &RunSpec) -> Option<String> {
    let steps = run.train.steps;
    let wild = |step: &usize| !(0.0..f64::INFINITY).contains(&run.lr_at(*step));
    if let Some(step) = [1, steps.div_ceil(2), steps].into_iter().find(wild) {
        return Some(format!("learning rate {} of step {step}", run.lr_at(step)));
    }
    match load(&run.to_toml(), &[]) {
        Ok(again) if again == *run => None,
        Ok(_) => Some("what was written reads back as another run".to_owned()),
        Err(e) => Some(format!("what was written does not read back: {e}")),
    }
}

/// Nobody reads more.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

/// A refusal is the user's to act on: it names one of `places`, hints, and holds nothing that a terminal obeys.
pub(crate) fn problem_of_refusal(e: &Error, places: &[&str]) -> Option<String> {
    let message = e.to_string();
    let obeyed = |c: char| (c.is_control() && !matches!(c, '\n' | '\t')) || c == '\u{202e}';
    let what = if e.exit_code() != 2 {
        "exit code"
    } else if e.hint_text().is_none_or(str::is_empty) {
        "no hint"
    } else if message.len() > MESSAGE_BYTES_MAX {
        "a message of too many bytes"
    } else if message.contains(obeyed) {
        "control characters"
    } else if !places.is_empty() && !places.iter().any(|p| message.contains(p)) {
        "no place"
    } else {
        return None;
    };
    Some(format!("{what}: {message:?}"))
}

#[track_caller]
fn check(cases: impl Iterator<Item = (String, Option<String>)>) {
    let wrong: Vec<String> =
        cases.filter_map(|(file, problem)| Some(format!("{file:?}: {}", problem?))).collect();
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong[..wrong.len().min(40)].join("\n"));
}

#[test]
fn nonsense_is_refused_by_name_or_harmless() {
    check(RunSpec::keys().iter().flat_map(|key| {
        VALUES.iter().map(|value| {
            let file = format!("# a run\n\n{} = {value}\n", key.path);
            let problem = problem(&file);
            (file, problem)
        })
    }));
}

#[test]
fn a_damaged_file_is_refused_with_a_hint() {
    let whole = load("", &[]).expect("the defaults").to_toml();
    let refusal = |text: &str| load(text, &[]).err().and_then(|e| problem_of_refusal(&e, &[]));
    let cut = (0..whole.len()).filter_map(|end| whole.get(..end));
    check(cut.map(|text| (text[text.len().saturating_sub(30)..].to_owned(), refusal(text))));
    let noise = ["\u{0}", "\"", "\u{1b}", "=", "[", "\u{feff}"];
    let places = whole.char_indices().step_by(7).flat_map(|(at, _)| noise.map(|noise| (at, noise)));
    check(places.map(|(at, noise)| {
        let mut text = whole.clone();
        text.insert_str(at, noise);
        (format!("{noise:?} at {at}"), refusal(&text))
    }));
}
