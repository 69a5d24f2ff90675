//! GPUs and what other libraries there are.

use std::path::PathBuf;

use cuda::census;

use super::{Check, Verdict};

pub(super) fn checks() -> Vec<Check> {
    let mut all = gpus();
    all.push(mpi());
    all
}

/// Cards, and the libraries that they need; a machine without a driver needs none.
fn gpus() -> Vec<Check> {
    let census = census();
    let why = "run.device = \"cuda\" computes on them; the CPU does without";
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
        Err(_) if !cuda::has_driver() => all.push(Check::ok("GPUs", "none: no NVIDIA driver", why)),
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

/// Names under which MPI libraries lie, the standard's own first.
const MPI: [&str; 4] = ["libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi.so.40", "libmpi.so.12"];

fn mpi() -> Check {
    let why = "mpirun starts ranks; Phalanx itself needs no MPI";
    let usual = [
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/opt/mpi/lib",
    ];
    let given = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let dirs = given.split(':').filter(|d| !d.is_empty()).chain(usual).map(PathBuf::from);
    let dirs: Vec<PathBuf> = dirs.collect();
    let found = MPI.iter().find_map(|name| dirs.iter().map(|d| d.join(name)).find(|p| p.exists()));
    Check::ok("MPI", found.map_or_else(|| "none".to_owned(), |p| p.display().to_string()), why)
}
