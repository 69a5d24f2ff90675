//! What is said when a library ends the process by itself.
//!
//! Before `MPI_Init` has returned no error handler can be set, so a library that cannot start exits, with words that name
//! neither itself nor what to do: most often it does not speak to the launcher that started the process.

use super::library::Library;
use super::text;
use std::sync::{Mutex, Once, PoisonError};

/// What is said, and the exit code, while a call is under way that may not come back.
static WORDS: Mutex<Option<(String, u8)>> = Mutex::new(None);

/// Variables by which launchers tell a library who it is: PMI (MPICH, Intel MPI, Slurm) and PMIx (Open MPI, PRRTE, Slurm).
const PMI: [&str; 4] = ["PMI_RANK", "PMI_FD", "PMI_PORT", "PMI_ID"];
const PMIX: [&str; 2] = ["PMIX_RANK", "OMPI_COMM_WORLD_RANK"];

/// Until it is dropped, the end of the process is taken for the library's doing.
pub(super) struct LastWords;

impl LastWords {
    pub(super) fn begin(library: &Library) -> LastWords {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            // SAFETY: the function takes nothing and does not unwind. Without room for it the library's words must do.
            let _ = unsafe { libc::atexit(speak) };
        });
        let is_set = |name: &&&str| std::env::var_os(name).is_some();
        let left: Vec<&str> = PMI.iter().chain(&PMIX).filter(is_set).copied().collect();
        // No other start will help a library that does not know the launcher's protocol; on another machine it may start.
        let is_foreign = !PMI.iter().any(|name| left.contains(name));
        let words = format!(
            "MPI_Init of {} ({}) ended this process; {}\nhint: start ranks with the mpiexec that belongs to this library, \
             name another with PHALANX_MPI, or do without: --transport tcp",
            library.path.display(),
            library.version,
            match &left[..] {
                [] => "no launcher has left anything for it in the environment".to_owned(),
                left => format!("the launcher has left {} for it in the environment", left.join(", ")),
            },
        );
        set(Some((words, if is_foreign { 2 } else { 1 })));
        LastWords
    }
}

impl Drop for LastWords {
    fn drop(&mut self) {
        set(None);
    }
}

fn set(words: Option<(String, u8)>) {
    *WORDS.lock().unwrap_or_else(PoisonError::into_inner) = words;
}

extern "C" fn speak() {
    let words = WORDS.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((words, code)) = words {
        text::say(&words);
        // SAFETY: ends the process with a code of ours; the library's may be anything.
        unsafe { libc::_exit(libc::c_int::from(code)) };
    }
}
