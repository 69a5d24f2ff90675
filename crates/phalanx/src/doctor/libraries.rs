//! GPUs and what other libraries there are.

use cuda::census;

use super::{Check, Verdict};
use crate::version;

pub(super) fn checks() -> Vec<Check> {
    let mut all = gpus();
    all.push(mpi());
    all
}

/// Cards, and the libraries that they need; a machine without a driver needs none.
fn gpus() -> Vec<Check> {
    let census = census();
    let why = "run.device = \"cuda\" computes on them; the CPU does without";
    let no_driver = if version::IS_STATIC {
        "none: this program is static, it loads no driver"
    } else {
        "none: no NVIDIA driver"
    };
    let mut all = Vec::new();
    match &census.cards {
        Ok(cards) if cards.is_empty() => all.push(Check::ok("GPUs", "none", why)),
        Ok(cards) => {
            for c in cards {
                let found = format!("{} {}", c.card.ordinal, c.card.name);
                let check = Check::ok("GPU", found, why);
                all.push(match c.card.check() {
                    Ok(()) => check,
                    Err(e) => {
                        check.amiss(Verdict::Warn, e.hint_text().map_or_else(|| e.to_string(), str::to_owned))
                    }
                });
            }
        }
        Err(_) if !cuda::has_driver() => all.push(Check::ok("GPUs", no_driver, why)),
        Err(e) => {
            let hint = e.hint_text().unwrap_or("phalanx devices says more");
            all.push(Check::ok("GPUs", e.to_string(), why).amiss(Verdict::Bad, hint));
        }
    }
    if cuda::has_driver() {
        for library in &census.libraries {
            let name = library.which.name();
            let why = "loaded at run time by what computes and talks on GPUs";
            all.push(match &library.result {
                Ok((path, _)) => Check::ok(name, path.display().to_string(), why),
                Err(e) => Check::ok(name, e.to_string(), why)
                    .amiss(Verdict::Warn, e.hint_text().unwrap_or("install it")),
            });
        }
    }
    all
}

/// What `--transport mpi` would load.
fn mpi() -> Check {
    let why = "--transport mpi sends messages through it; Phalanx itself needs no MPI";
    match version::loads(version::IS_STATIC).and_then(|()| comm::find_mpi()) {
        Ok(library) => Check::ok("MPI", format!("{} ({})", library.version, library.path.display()), why),
        Err(e) => Check::ok("MPI", e.to_string(), why),
    }
}
