//! Tests whose ranks are processes of an `mpiexec`: the test starts itself once more in each of them.

use super::{Kind, TIMEOUT, bootstrap};
use comm::{Mpi, StoreClient, StoreServer, World};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// The test that such a process is to play.
const PLAY: &str = "COMM_MPI_TEST";

/// An `mpiexec` whose library has the standard's interface: that of `.ci/run`, or one on the path with it beside.
fn mpiexec() -> Option<PathBuf> {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/mpi/bin");
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&paths).chain([ours]);
    let has_library = |bin: &PathBuf| bin.join("../lib/libmpi_abi.so.1").exists();
    dirs.filter(|d| d.join("mpiexec").is_file()).find(has_library).map(|d| d.join("mpiexec"))
}

/// Starts this test as `n` ranks and waits for their end; nothing, with the reason printed, where there is no MPI.
pub(crate) fn start(test: &str, n: usize) -> Option<Output> {
    let Some(mpiexec) = mpiexec() else {
        eprintln!(
            "skipped: no mpiexec with libmpi_abi.so.1 here; pip install --prefix target/mpi mpich brings one"
        );
        return None;
    };
    let mut command = Command::new(mpiexec);
    command.arg("-n").arg(n.to_string()).arg(std::env::current_exe().expect("this program"));
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]);
    Some(command.env(PLAY, test).stdin(Stdio::null()).output().expect("start mpiexec"))
}

/// Plays a test as each of several numbers of ranks.
pub(crate) fn under_mpiexec(test: &str, sizes: &[usize], play: impl Fn(usize)) {
    if is_rank(test) {
        let mpi = Mpi::start(TIMEOUT).expect("MPI");
        play(mpi.size());
        return Mpi::end().expect("the end of MPI");
    }
    for n in sizes {
        let Some(ended) = start(test, *n) else { return };
        let (out, err) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.success(), "{n} ranks: {out}{err}");
        assert_eq!(out.matches("test result: ok. 1 passed").count(), *n, "{out}{err}");
    }
}

/// Whether this process is a rank that plays `test`.
pub(crate) fn is_rank(test: &str) -> bool {
    std::env::var(PLAY).is_ok_and(|play| play == test)
}

/// This rank's world. Rank 0 has the store, for as long as the process lives, and says where.
pub(crate) fn world(kind: Kind, n: usize, session: &str) -> World {
    static STORE: OnceLock<(Option<StoreServer>, StoreClient)> = OnceLock::new();
    let mpi = Mpi::start(TIMEOUT).expect("MPI");
    let (_, store) = STORE.get_or_init(|| {
        let mut server = None;
        let serve = |all: &[String]| {
            assert_eq!(all.len(), n, "{all:?}");
            let started = StoreServer::start(std::net::SocketAddr::from(([127, 0, 0, 1], 0)))?;
            let addr = started.addr().to_string();
            server = Some(started);
            Ok(addr)
        };
        let addr = mpi.agree(&format!("rank {}", mpi.rank()), TIMEOUT, serve).expect("an address");
        (server, StoreClient::connect(&addr, TIMEOUT).expect("a store"))
    });
    World::connect(&bootstrap(kind, mpi.rank(), n, store.clone(), session)).expect("a world")
}
