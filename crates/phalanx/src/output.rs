//! Data on stdout, talk on stderr.

use std::io::{IsTerminal, Write};

use spec::run::THREADS_MAX;
use spec::{Error, Result, printable};

/// One message: what and where, then what to do. A rank that this program started leaves it to its starter, who knows
/// which rank failed first.
pub(crate) fn error(e: &Error) {
    let hint = e.hint_text().map(|h| format!("\nhint: {h}")).unwrap_or_default();
    if launch::record_error("error", &format!("{e}{hint}")) && crate::ranks::started_by_us() {
        return;
    }
    let red = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let label = if red { "\u{1b}[31merror\u{1b}[0m" } else { "error" };
    let _ = writeln!(std::io::stderr(), "{label}: {e}");
    if let Some(hint) = e.hint_text() {
        say(&format!("hint: {hint}"));
    }
}

/// A line for people.
pub(crate) fn say(text: &str) {
    // Nobody is left to tell when stderr is closed.
    let _ = writeln!(std::io::stderr(), "{}", printable(text));
}

/// Data, as lines. A reader that has seen enough (a closed pipe) is no error.
pub(crate) fn print(text: &str) {
    or_exit(try_print(text));
}

/// Data, byte by byte as it comes unless a terminal would obey it; as [`print()`].
pub(crate) fn print_part(text: &str) {
    let mut out = std::io::stdout().lock();
    let text = if out.is_terminal() { printable(text) } else { text.into() };
    or_exit(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

/// Data, for those who go on without a reader.
pub(crate) fn try_print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let text = printable(text);
    let newline = if text.ends_with('\n') { "" } else { "\n" };
    write!(out, "{text}{newline}").and_then(|()| out.flush())
}

/// Ends the process where stdout takes no more; a reader that has seen enough is no error.
pub(crate) fn or_exit(written: std::io::Result<()>) {
    if let Err(e) = written
        && e.kind() != std::io::ErrorKind::BrokenPipe
    {
        error(
            &Error::failure(format!("write to stdout: {e}"))
                .hint("free space there, or send stdout elsewhere"),
        );
        std::process::exit(1);
    }
}

/// A large number for people, such as 13.8M or 24.6k.
pub(crate) fn count(n: f64) -> String {
    match n {
        1e9.. => format!("{:.1}B", n / 1e9),
        // As it would be rounded: 0.0M says nothing.
        99_950.0.. => format!("{:.1}M", n / 1e6),
        1e3.. => format!("{:.1}k", n / 1e3),
        _ => format!("{n:.0}"),
    }
}

/// Threads to use for a flag: what was asked for, or all cores.
///
/// # Errors
/// If it is more than any machine runs at once; systems refuse some such numbers, and others end the process.
pub(crate) fn threads_asked(asked: usize) -> Result<usize> {
    if asked > THREADS_MAX {
        return Err(
            Error::user(format!("--threads {asked}, expected 0 to {THREADS_MAX}")).hint("0 takes all cores")
        );
    }
    Ok(threads(asked))
}

/// Threads to use: what was asked for, or all cores.
pub(crate) fn threads(asked: usize) -> usize {
    if asked > 0 { asked } else { std::thread::available_parallelism().map_or(1, usize::from) }
}
