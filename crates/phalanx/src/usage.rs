//! Command lines: read, and refused in the words of every other refusal.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;

use clap::Parser;
use clap::error::ErrorKind;
use spec::{Error, Result};

use crate::output;

/// The arguments, or the exit code of help and version, which were printed.
///
/// # Errors
/// If the arguments are wrong, or nothing can be printed.
pub(crate) fn parse<T: Parser>(words: impl IntoIterator<Item = OsString>) -> Result<Result<T, u8>> {
    match T::try_parse_from(joined(words)) {
        Ok(args) => Ok(Ok(args)),
        Err(e) => match e.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                output::or_exit(e.print().and_then(|()| std::io::stdout().flush()));
                Ok(Err(0))
            }
            // A command that lacks its subcommand: its help says more than any line.
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                output::say(e.render().to_string().trim_end());
                Ok(Err(2))
            }
            _ => Err(refusal(&e.render().to_string())),
        },
    }
}

/// What clap says on several lines, as an error and a hint.
///
/// It says `error:` and what is wrong, with values one to a line; then tips, the usage, and where help is.
pub(crate) fn refusal(text: &str) -> Error {
    let what: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let tips: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_prefix("tip: ")).collect();
    let usage = text.lines().find_map(|line| line.trim().strip_prefix("Usage: "));
    let hint = match (tips.is_empty(), usage) {
        (false, _) => tips.join("; "),
        (true, Some(usage)) => format!("usage: {usage}; --help says more"),
        (true, None) => "phalanx --help lists the commands, phalanx COMMAND --help its flags".to_owned(),
    };
    Error::user(what).hint(hint)
}

/// Words with negative numbers joined to the option before them (`--tokens -1T` as `--tokens=-1T`), which else are taken
/// for flags that nobody knows: what the option expects is for it to say.
fn joined(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if word == "--" || (all.len() == 1 && word == "launch") {
            // What follows is for another program.
            all.push(word);
            all.extend(words);
            break;
        }
        match all.last_mut().filter(|before| is_negative(&word) && takes_value(before)) {
            Some(before) => {
                before.push("=");
                before.push(word);
            }
            None => all.push(word),
        }
    }
    all
}

fn is_negative(word: &OsStr) -> bool {
    let mut bytes = word.as_encoded_bytes().iter();
    bytes.next() == Some(&b'-') && bytes.find(|b| **b != b'.').is_some_and(u8::is_ascii_digit)
}

/// Whether a word is an option that has no value yet.
fn takes_value(word: &OsStr) -> bool {
    let bytes = word.as_encoded_bytes();
    let is_short = bytes.len() == 2 && bytes[1].is_ascii_alphabetic();
    bytes.starts_with(b"-") && !bytes.contains(&b'=') && (is_short || (bytes.len() > 2 && bytes[1] == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_numbers_go_to_the_option_before_them() {
        let check = |line: &str, expected: &str| {
            let words = joined(line.split(' ').map(OsString::from));
            let words: Vec<&str> = words.iter().map(|w| w.to_str().expect("text")).collect();
            assert_eq!(words.join(" "), expected);
        };
        check("phalanx plan --tokens -1T --json", "phalanx plan --tokens=-1T --json");
        check("phalanx generate r -n -5 -3", "phalanx generate r -n=-5 -3");
        check("phalanx plan --tokens=1 -2", "phalanx plan --tokens=1 -2");
        check("phalanx x --lr -.5 --set -a", "phalanx x --lr=-.5 --set -a");
        check("phalanx launch -r -1 x", "phalanx launch -r -1 x");
        check("slurm --nodes -1 -- train --n -1", "slurm --nodes=-1 -- train --n -1");
    }

    #[test]
    fn what_clap_says_becomes_an_error_and_a_hint() {
        let check = |text: &str, what: &str, hint: &str| {
            let e = refusal(text);
            assert_eq!((e.to_string().as_str(), e.hint_text(), e.exit_code()), (what, Some(hint), 2));
        };
        check(
            "error: the following required arguments were not provided:\n  <RUN_DIR>\n\nUsage: phalanx top <RUN_DIR>...\n",
            "the following required arguments were not provided: <RUN_DIR>",
            "usage: phalanx top <RUN_DIR>...; --help says more",
        );
        check(
            "error: unexpected argument '--stpes' found\n\n  tip: a similar argument exists: '--steps'\n\nUsage: x\n",
            "unexpected argument '--stpes' found",
            "a similar argument exists: '--steps'",
        );
    }
}
