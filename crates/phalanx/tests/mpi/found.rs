//! An MPI to test with.

use std::path::{Path, PathBuf};

/// The library's name under the standard's interface.
pub(crate) const LIBRARY: &str = "libmpi_abi.so.1";

/// The folder of an MPI whose library has the standard's interface: that of `.ci/run`, or one whose `mpiexec` is on the
/// path; none, with the reason printed.
pub(crate) fn mpi() -> Option<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/mpi/bin");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let roots = std::env::split_paths(&paths).chain([ours]).map(|bin| bin.join(".."));
    let is_one =
        |root: &PathBuf| root.join("bin/mpiexec").is_file() && root.join("lib").join(LIBRARY).exists();
    let found = roots.map(|root| root.canonicalize().unwrap_or(root)).find(is_one);
    if found.is_none() {
        eprintln!(
            "skipped: no mpiexec with {LIBRARY} here; pip install --prefix target/mpi mpich brings one"
        );
    }
    found
}
