//! Signals that end a run after its step, with a checkpoint.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::flag::{register, register_conditional_shutdown};
use signal_hook::iterator::{Handle, Signals};
use spec::{Error, Result};

use crate::output;
use crate::ranks::INTERRUPTED;

/// A closed terminal, a person, a scheduler, and a scheduler's early warning.
const STOPS: [i32; 5] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1];

/// Set by any of [`STOPS`]. A second SIGINT ends a run alone at once; a second of another kind does not, because schedulers
/// send one to every process of a job and the launcher passes it on once more. What was set to be ignored before
/// (`nohup`) stays ignored.
pub(crate) fn flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let ignored = ignored();
    // A rank's launcher passes on what may have reached the rank directly, and ends it itself if it must.
    let is_alone = !matches!(launch::RankEnv::read(), Ok(Some(env)) if env.world > 1);
    let mut done = match is_alone {
        true => register_conditional_shutdown(SIGINT, i32::from(INTERRUPTED), stop.clone()).map(drop),
        false => Ok(()),
    };
    for signal in STOPS.into_iter().filter(|s| ignored & (1 << (s - 1)) == 0) {
        done = done.and_then(|()| register(signal, stop.clone()).map(drop));
    }
    // With a limit on the size of files, writing beyond it is then an error like a full disk's and does not kill.
    done = done.and_then(|()| register(SIGXFSZ, Arc::default()).map(drop));
    done.map_err(|e| Error::failure(format!("catch signals: {e}")))?;
    Ok(stop)
}

/// Until it is dropped, a signal ends the process with a word that nothing is lost: before training there is nothing
/// to save. `speaks` is the one process of a job that says so.
pub(crate) struct Early {
    handle: Handle,
}

impl Early {
    pub(crate) fn watch(speaks: bool) -> Result<Early> {
        let fail = |e: std::io::Error| Error::failure(format!("catch signals: {e}"));
        let ignored = ignored();
        let caught = STOPS.into_iter().filter(|s| ignored & (1 << (s - 1)) == 0);
        let mut signals = Signals::new(caught).map_err(fail)?;
        let handle = signals.handle();
        let end = move || {
            if signals.forever().next().is_some() {
                if speaks {
                    output::say("stopped before the first step: nothing was trained, and nothing is lost");
                }
                std::process::exit(1);
            }
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(end).map_err(fail)?;
        Ok(Early { handle })
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// Signals that are ignored, as a mask with bit n - 1 for signal n.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or(0)
}
