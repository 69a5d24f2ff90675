//! The front of `phalanx launch`.

use crate::agent::{Outcome, run};
use crate::flags::{Parsed, help};
use crate::options::{Options, Runner};
use crate::signals::Signals;
use rustix::event::{PollFd, PollFlags, poll};
use spec::{Error, Result};
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;

/// Runs `phalanx launch` with `args` (what follows the word `launch`) and returns the exit code: 0 all workers
/// succeeded, 1 a worker or the job failed, 2 wrong input, 128 + n stopped by signal n. Writes to stderr only, apart
/// from the workers' own output and the help text.
pub fn cli(args: Vec<OsString>) -> i32 {
    match launch(&args) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error}"));
            if let Some(hint) = error.hint_text() {
                say(&format!("hint: {hint}"));
            }
            i32::from(error.exit_code())
        }
    }
}

/// A line on stderr. A launcher whose terminal is gone has nobody to tell, and its workers to look after.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn launch(args: &[OsString]) -> Result<i32> {
    let parsed = Options::parse(args, &|name| std::env::var(name).ok())?;
    let (options, program, args) = match parsed {
        Parsed::Help => {
            let written = std::io::stdout().write_all(help().as_bytes());
            return match written.and_then(|()| std::io::stdout().flush()) {
                // A reader that has seen enough is no error.
                Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                    Err(Error::failure(format!("write to stdout: {e}")).hint("free space there"))
                }
                _ => Ok(0),
            };
        }
        Parsed::Run { options, program, args } => (options, program, args),
    };
    note_omp_threads(&options)?;
    for flag in &options.without_effect {
        say(&format!("phalanx launch: {flag} is accepted and has no effect yet"));
    }
    let name = match options.runner {
        Runner::Module => format!("-m {}", program.display()),
        _ => program.display().to_string(),
    };
    let outcome = run(&options, program, &args)?;
    report(&name, &outcome);
    if options.hold && outcome.exit_code == 0 {
        hold(&options)?;
    }
    let is_own = outcome.signal.is_none() && (options.pass_exit_code || is_refused(&options, &outcome)?);
    Ok(if is_own { outcome.worker_code() } else { outcome.exit_code })
}

/// Whether every worker refused its input: a launcher that is asked again would be refused again.
fn is_refused(options: &Options, outcome: &Outcome) -> Result<bool> {
    let refusals = outcome.failures.iter().filter(|f| f.code == Some(2)).count();
    Ok(options.is_single() && refusals == options.nproc.resolve()?)
}

/// Waits until somebody ends the launcher, which has nothing to do any more.
fn hold(options: &Options) -> Result<()> {
    say("phalanx launch: done; held until a signal ends it");
    let signals = Signals::catch(&options.signals_to_handle)?;
    while signals.next().is_none() {
        let mut fds = [PollFd::from_borrowed_fd(signals.fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failure(format!("wait for a signal: {e}"))),
        }
    }
    Ok(())
}

fn note_omp_threads(options: &Options) -> Result<()> {
    if options.nproc.resolve()? > 1 && std::env::var_os("OMP_NUM_THREADS").is_none() {
        say("phalanx launch: OMP_NUM_THREADS=1 for each worker; set it to use more threads");
    }
    Ok(())
}

fn report(name: &str, outcome: &Outcome) {
    if let Some(table) = outcome.table(name) {
        say(table.trim_end_matches('\n'));
    }
    if let Some(reason) = &outcome.reason {
        say(&format!("phalanx launch: the job ended on another node: {reason}"));
    }
    // Under another launcher: its error file gets the root cause, as torchrun does it.
    let ours = std::env::var_os("TORCHELASTIC_ERROR_FILE").filter(|p| !p.is_empty());
    let cause = outcome.root_cause().and_then(|f| f.error_file.as_ref());
    if let (Some(to), Some(from)) = (ours, cause)
        && let Err(e) = std::fs::copy(from, Path::new(&to))
    {
        say(&format!("phalanx launch: copy {} to {}: {e}", from.display(), to.display()));
    }
}
