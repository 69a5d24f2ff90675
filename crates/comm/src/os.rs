//! Errors of the system, with their cause where it is a limit.

use rustix::io::Errno;
use spec::Error;
use std::io;

/// Whether a process or the machine has no file descriptor left.
pub(crate) fn is_out_of_files(e: &io::Error) -> bool {
    matches!(Errno::from_io_error(e), Some(Errno::MFILE | Errno::NFILE))
}

/// What could not be done for `e`, in this process. Descriptors that have run out come with their limit, and with what
/// to do.
pub fn os_error(doing: &str, e: &io::Error) -> Error {
    let hint = "raise the limit (ulimit -n 4096, or LimitNOFILE of a service), or start fewer ranks here";
    match Errno::from_io_error(e) {
        Some(Errno::MFILE) => {
            let pid = std::process::id();
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
            let limit = limit.map_or("none".to_owned(), |n| n.to_string());
            Error::failure(format!(
                "{doing}: process {pid} may open no more files: its limit (ulimit -n) is {limit}"
            ))
            .hint(hint)
        }
        Some(Errno::NFILE) => {
            Error::failure(format!("{doing}: this machine may open no more files (fs.file-max)"))
        }
        _ => Error::failure(format!("{doing}: {e}")),
    }
}

/// Most files that a process asks the system for: connections of the largest job with room to spare. Where a limit is
/// in the millions, programs that close every file they might have would take seconds over it.
const FILES_ENOUGH: u64 = 65_536;

/// Lets this process open as many files as the system lets it without asking anybody: what `ulimit -n` starts with
/// (1024, most often) is a default, and the hard limit the rule.
pub(crate) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let most = maximum.unwrap_or(FILES_ENOUGH).min(FILES_ENOUGH);
    if current.is_some_and(|now| now < most) {
        // Where even that is forbidden, running out is named when it comes.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_named() {
        let check = |errno: Errno, part: &str, hints: bool| {
            let error = os_error("open a door", &errno.into());
            assert!(
                error.to_string().starts_with("open a door: ") && error.to_string().contains(part),
                "{error}"
            );
            assert_eq!(error.hint_text().is_some(), hints, "{error}");
        };
        check(Errno::MFILE, "its limit (ulimit -n) is ", true);
        check(Errno::NFILE, "fs.file-max", false);
        check(Errno::ACCESS, "ermission denied", false);
    }
}
