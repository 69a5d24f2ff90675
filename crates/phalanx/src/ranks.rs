//! Being one rank of several, and starting them.

use std::ffi::OsString;
use std::time::Duration;

use comm::{Bootstrap, Mpi, StoreClient, Transport, TransportChoice, World, find_mpi};
use elastic::Orders;
use launch::{Launcher, LocalJob, RankEnv, RankStore, Saving};
use spec::{Context, Error, Result};

use crate::output;
use crate::version;

/// The exit code of a run that was interrupted and has saved its state.
pub(crate) const INTERRUPTED: u8 = 130;

/// How long ranks may take to save when they are asked to stop: a large checkpoint to a slow file system.
const SAVE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long ranks wait for each other at the start: a shared file system may hold some up.
pub(crate) const MEET_TIMEOUT: Duration = Duration::from_secs(120);

/// One rank's way to the others.
pub(crate) struct Rank {
    pub(crate) env: RankEnv,
    store: RankStore,
}

impl Rank {
    /// The place of this process in a job, and the way to the others.
    pub(crate) fn from_env(transport: TransportChoice) -> Result<Option<Rank>> {
        Rank::env(None)?.map(|env| Rank::meet(env, transport)).transpose()
    }

    /// This process's place in a job, if a launcher (ours, torchrun, Slurm, MPI) started it as one of several. `nproc`
    /// is what `--nproc` says: whoever is told by the environment which rank it is cannot be told to start ranks.
    pub(crate) fn env(nproc: Option<usize>) -> Result<Option<RankEnv>> {
        let Some(env) = RankEnv::read()?.filter(|env| env.world > 1 || started_by_us()) else {
            if nproc.is_none()
                && let Some(tasks) = launch::rank_env::unused_tasks(&|n| std::env::var(n).ok())
            {
                output::say(&format!(
                    "this is one rank: Slurm has {tasks} tasks here, and srun would start a rank for each"
                ));
            }
            return Ok(None);
        };
        if let Some(nproc) = nproc.filter(|_| !started_by_us()) {
            return Err(contradiction(nproc, &env));
        }
        Ok(Some(env))
    }

    /// Finds the store that all ranks share: over MPI if ranks are to talk over it, or if nothing else says where it is.
    pub(crate) fn meet(env: RankEnv, transport: TransportChoice) -> Result<Rank> {
        let by_mpi = match transport {
            TransportChoice::Mpi => true,
            TransportChoice::Auto => env.mpi && !env.can_meet() && find_mpi().is_ok(),
            TransportChoice::Shm | TransportChoice::Tcp => false,
        };
        let store = match by_mpi {
            true => Mpi::start(MEET_TIMEOUT).and_then(|mpi| env.store_by_mpi(mpi, MEET_TIMEOUT)),
            false => env.store(MEET_TIMEOUT),
        };
        Ok(Rank { store: store.context("meet the other ranks")?, env })
    }

    /// Says once how ranks talk to each other, and why, where an `mpiexec` started them and they had the choice.
    pub(crate) fn say_how_they_talk(&self, world: &World, transport: TransportChoice) {
        if world.rank() > 0 || !self.env.mpi || transport != TransportChoice::Auto {
            return;
        }
        let has = |wanted| (1..world.size()).any(|rank| world.transport(rank) == wanted);
        let how = if has(Transport::Mpi) {
            let library = Mpi::started().map(|mpi| format!(": {} ({})", mpi.version(), mpi.path().display()));
            format!("ranks of different machines talk over MPI{}", library.unwrap_or_default())
        } else if has(Transport::Tcp) {
            let why = find_mpi().err().map(|e| e.to_string());
            let why = why.unwrap_or_else(|| "not every rank has an MPI library that can be used".to_owned());
            format!("ranks of different machines talk over TCP: {why}")
        } else {
            "all ranks are on one machine and talk through shared memory; --transport mpi makes them use MPI"
                .to_owned()
        };
        output::say(&how);
    }

    /// The store that all ranks share.
    pub(crate) fn store(&self) -> &StoreClient {
        &self.store.client
    }

    /// Meets all ranks; those whose `identity` differs are named.
    pub(crate) fn world(
        &self,
        identity: &str,
        transport: TransportChoice,
        timeout: Duration,
    ) -> Result<World> {
        let orders = first_orders(&self.env);
        let mut b = bootstrap(&orders, self.store.client.clone(), identity, transport, timeout)?;
        b.has_mpi = self.env.mpi && transport == TransportChoice::Auto && find_mpi().is_ok();
        World::connect(&b)
    }

    /// Ends this rank's part; the rank that hosts the store stays until all have left.
    pub(crate) fn leave(self) -> Result<()> {
        self.store.leave(MEET_TIMEOUT)
    }

    /// This rank's share of the machine's cores, at least one.
    pub(crate) fn threads(&self) -> usize {
        let cores = output::threads(0);
        // Under Slurm the cores of a rank may be all that it sees, and must not be shared out once more.
        let given = std::env::var("SLURM_CPUS_PER_TASK").ok().and_then(|n| n.parse::<usize>().ok());
        match given.filter(|n| *n > 0 && self.env.launcher == Launcher::Slurm) {
            Some(given) => given.min(cores),
            None => (cores / self.env.local_world.max(1)).max(1),
        }
    }
}

/// Where the environment sends this rank, as an agent's orders would.
pub(crate) fn first_orders(env: &RankEnv) -> Orders {
    Orders {
        // The round is the last part of the session's name.
        round: env.session.rsplit('/').next().and_then(|round| round.parse().ok()).unwrap_or(0),
        rank: env.rank,
        world: env.world,
        local_rank: env.local_rank,
        local_world: env.local_world,
        store: env.agent_store.clone().unwrap_or_default(),
        session: env.session.clone(),
        why: if env.restart == 0 { "the job begins".to_owned() } else { format!("restart {}", env.restart) },
    }
}

/// Meets all ranks at the store; those whose `identity` differs are named.
pub(crate) fn world(
    orders: &Orders,
    store: StoreClient,
    identity: &str,
    transport: TransportChoice,
    timeout: Duration,
) -> Result<World> {
    World::connect(&bootstrap(orders, store, identity, transport, timeout)?)
}

fn bootstrap(
    orders: &Orders,
    store: StoreClient,
    identity: &str,
    transport: TransportChoice,
    timeout: Duration,
) -> Result<Bootstrap> {
    let mut b = Bootstrap::new(orders.rank, orders.world, store, orders.session.clone());
    b.local_rank = orders.local_rank;
    b.local_world = orders.local_world;
    b.fingerprint = launch::fingerprint(identity);
    b.transport = transport;
    b.timeout = timeout;
    b.bind = launch::bind_from_env()?;
    b.via = launch::proxy_from_env()?;
    Ok(b)
}

/// Refuses MPI where ranks were started otherwise, or without a library: before anything is begun that others wait for.
pub(crate) fn check_mpi(transport: TransportChoice) -> Result<()> {
    if transport != TransportChoice::Mpi {
        return Ok(());
    }
    version::loads(version::IS_STATIC).and_then(|()| find_mpi().map(drop)).context("--transport mpi")?;
    if RankEnv::read()?.is_some_and(|env| env.mpi) {
        return Ok(());
    }
    Err(Error::user("--transport mpi: this process was not started so that MPI can find other ranks")
        .hint("mpiexec -n 4 phalanx ... --transport mpi, without --nproc, or srun --mpi=pmi2 phalanx ... --transport mpi"))
}

/// How long whoever was told of another rank's failure leaves it to that rank to say so and to end all.
const CULPRIT_FIRST: Duration = Duration::from_secs(2);

/// How long the others leave it to rank 0 to say what most often all have found.
const RANK_0_FIRST: Duration = Duration::from_millis(500);

/// Waits a moment before a failure is told that another rank tells too, where MPI ends all ranks at the word of one.
pub(crate) fn leave_it_to_the_culprit(e: &Error) {
    let Some(mpi) = Mpi::started() else { return };
    let text = e.to_string();
    // While ranks meet they hear of each other's failures through the store, or by its being gone.
    let is_victim = comm::blames_peer(&text)
        || [" did not start: rank ", "lost the store at "].iter().any(|part| text.contains(part));
    match mpi.rank() {
        // The other one ends this process too, and most often does so first.
        _ if is_victim => std::thread::sleep(CULPRIT_FIRST),
        0 => {}
        _ => std::thread::sleep(RANK_0_FIRST),
    }
}

/// A flag and the environment mean different things by a rank; which of them is meant is not ours to guess.
fn contradiction(nproc: usize, env: &RankEnv) -> Error {
    let (rank, world, told, without) = (env.rank, env.world, env.told_by(), env.without());
    Error::user(format!(
        "--nproc {nproc} starts {nproc} ranks here, but {told} in the environment say that this process itself is rank \
         {rank} of {world}"
    ))
    .hint(format!(
        "one process for each rank: leave out --nproc; {nproc} ranks here and nothing else: {without} phalanx train \
         ...; {world} machines with {nproc} ranks each: phalanx launch --nnodes {world} --node-rank {rank} \
         --nproc-per-node {nproc} --master-addr HOST_OF_THE_FIRST phalanx train ..., without --nproc"
    ))
}

/// Set for ranks of a job that was itself started once more.
const RESTARTED: &str = "PHALANX_RESTARTED";

/// Whether a launcher or a batch system starts this job once more, with nobody watching.
pub(crate) fn restarted() -> bool {
    is_positive(&["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RESTARTED])
}

/// Whether somebody is there who starts the job once more when it fails, or brings its ranks together again.
pub(crate) fn has_restarts() -> bool {
    restarted() || is_positive(&["TORCHELASTIC_MAX_RESTARTS", "PHALANX_ELASTIC"])
}

fn is_positive(names: &[&str]) -> bool {
    let number = |name: &&str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    names.iter().filter_map(number).any(|n| n > 0)
}

/// Set for ranks that [`start`] started.
const STARTED: &str = "PHALANX_STARTED_BY";

/// Whether [`start`] started this process and tells people what it fails of.
pub(crate) fn started_by_us() -> bool {
    std::env::var_os(STARTED).is_some_and(|by| by == parent().as_str())
}

/// A process that a rank itself starts inherits the variable, but not the parent.
fn parent() -> String {
    std::os::unix::process::parent_id().to_string()
}

/// What is borne of lost ranks; nothing by default.
#[derive(Clone, Copy, Default)]
pub(crate) struct Losses {
    /// So often a lost rank is replaced while the others keep their processes.
    pub(crate) max_restarts: u32,
    /// Fewest ranks to go on with when one keeps failing; all if `None`.
    pub(crate) min_nproc: Option<usize>,
}

/// Starts this same command as `nproc` ranks, with variables `env` set, and waits for them; the failure of the first
/// rank that failed is its own.
pub(crate) fn start(nproc: usize, losses: Losses, env: &[(String, String)]) -> Result<u8> {
    let program = std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
    let mut command: Vec<OsString> = vec![program.into()];
    command.extend(std::env::args_os().skip(1));
    let mut job = LocalJob::new(nproc, command);
    (job.max_restarts, job.min_nproc) = (losses.max_restarts, losses.min_nproc);
    // Whatever stops the job reaches the ranks as this, once: a second SIGINT would end them before they have saved.
    job.saving = Some(Saving { signal: signal_hook::consts::SIGTERM, timeout: SAVE_TIMEOUT });
    job.env.push((STARTED.to_owned(), std::process::id().to_string()));
    if restarted() {
        job.env.push((RESTARTED.to_owned(), "1".to_owned()));
    }
    job.env.extend(env.iter().cloned());
    let outcome = job
        .run()
        .map_err(|e| e.hint("start fewer ranks here; each takes a process and a folder in TMPDIR"))?;
    if let Some(signal) = outcome.signal {
        return stopped(signal, &outcome.failures);
    }
    match outcome.root_cause() {
        Some(cause) if cause.code != Some(i32::from(INTERRUPTED)) => Err(blame(cause)),
        Some(_) => Ok(INTERRUPTED),
        None => Ok(u8::try_from(outcome.exit_code).unwrap_or(1)),
    }
}

/// A stop by request: ranks that have saved, or were done, ended with [`INTERRUPTED`] or 0.
fn stopped(signal: i32, failures: &[launch::Failure]) -> Result<u8> {
    let Some(lost) = failures.iter().find(|f| f.code != Some(i32::from(INTERRUPTED))) else {
        return Ok(INTERRUPTED);
    };
    if lost.error_file.is_some() {
        return Err(blame(lost));
    }
    output::say(&format!("stopped before every rank had saved: {}", lost.summary()));
    Ok(u8::try_from(128 + signal).unwrap_or(1))
}

/// The failure of a rank, in its own words if it had time for any.
fn blame(cause: &launch::Failure) -> Error {
    let words = cause.error_file.as_ref().and_then(|_| cause.message.strip_prefix("error: "));
    let Some(words) = words else {
        return Error::failure(cause.summary()).hint(
            "the same command goes on from the last checkpoint; if the system killed the rank, it was short of memory",
        );
    };
    let (what, hint) = words.split_once("\nhint: ").unwrap_or((words, ""));
    let e = if cause.code == Some(2) { Error::user(what) } else { Error::failure(what) };
    e.hint(if hint.is_empty() { "the same command goes on from the last checkpoint" } else { hint })
}
