//! What a rank reads from its environment, whoever started it: Phalanx, torchrun, Slurm's srun or MPI's mpirun.

use spec::{Error, Result};
use std::collections::BTreeMap;

/// Who started this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// `phalanx launch`, or `phalanx train --nproc`.
    Phalanx,
    /// PyTorch's torchrun, or anything that sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// Slurm's srun.
    Slurm,
    /// Open MPI's or PRRTE's mpirun.
    OpenMpi,
    /// MPICH's or Intel MPI's mpirun, or another process manager that speaks PMI.
    Pmi,
}

/// A rank's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankEnv {
    /// Who started it.
    pub launcher: Launcher,
    /// Rank in the job.
    pub rank: usize,
    /// Ranks of the job.
    pub world: usize,
    /// Rank on this node.
    pub local_rank: usize,
    /// Ranks on this node; 1 where the launcher does not say.
    pub local_world: usize,
    /// This node among the nodes; 0 where the launcher does not say.
    pub node: usize,
    /// Nodes, where the launcher says.
    pub nodes: Option<usize>,
    /// Restarts before this start.
    pub restart: u32,
    /// Name of the job and of this start of it: nothing of an earlier start carries the same.
    pub session: String,
    /// Address that rank 0 is reachable at, where known.
    pub master_addr: Option<String>,
    /// Port on it for the ranks' store.
    pub master_port: Option<u16>,
    /// `host:port` of a Phalanx store that the launcher runs.
    pub agent_store: Option<String>,
    /// PyTorch's own store listens at the master's port.
    pub torch_store: bool,
    /// Whether a process manager is there that MPI libraries find the other ranks by.
    pub mpi: bool,
}

/// The place of this process in a job, or `None` if no launcher started it (or what it set makes no sense: see
/// [`RankEnv::read`] for the error).
pub fn from_env() -> Option<RankEnv> {
    RankEnv::read().ok().flatten()
}

impl RankEnv {
    /// The place of this process in a job; `None` if no launcher started it.
    ///
    /// # Errors
    /// Variables of a launcher are there, but are no numbers, contradict each other or lack a partner.
    pub fn read() -> Result<Option<RankEnv>> {
        let mut found = RankEnv::from_vars(&|name| std::env::var(name).ok())?;
        if found.as_ref().is_some_and(|rank| rank.launcher == Launcher::Slurm) && is_in_srun_shell() {
            return Ok(None);
        }
        if let Some(rank) = &mut found
            && rank.launcher == Launcher::Slurm
            && let Some(node) = &rank.master_addr
            && crate::net::resolve(node, 0).is_empty()
        {
            rank.master_addr = node_addr(node).or(rank.master_addr.take());
        }
        if let Some(rank) = &mut found
            && rank.session == format!("pmi-{NO_JOB}")
            && rank.local_world == rank.world
        {
            // MPICH names no job, but the ranks of one machine have one parent, and no two jobs the same.
            let parent = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get());
            rank.session = format!("pmi-parent-{parent}");
            if std::env::var_os("MASTER_PORT").is_none() {
                rank.master_port = Some(port_of(&rank.session));
            }
        }
        Ok(found)
    }

    /// The same over any lookup.
    ///
    /// ```
    /// use std::collections::HashMap;
    /// let env = HashMap::from([("SLURM_PROCID", "3"), ("SLURM_NTASKS", "8"), ("SLURM_STEP_ID", "0"),
    ///     ("SLURM_LOCALID", "1"), ("SLURM_STEP_TASKS_PER_NODE", "2(x4)"), ("SLURM_NODEID", "1")]);
    /// let rank = launch::RankEnv::from_vars(&|name| env.get(name).map(|v| v.to_string()))?.unwrap();
    /// assert_eq!((rank.rank, rank.world, rank.local_rank, rank.local_world), (3, 8, 1, 2));
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`RankEnv::read`].
    pub fn from_vars(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Option<RankEnv>> {
        let vars = Vars { lookup };
        // A torchrun or mpirun inside a Slurm job sees Slurm's variables too, so the inner launcher is asked first.
        let found = if vars.has("RANK") && vars.has("WORLD_SIZE") {
            Some(torchrun(&vars)?)
        } else if vars.has("OMPI_COMM_WORLD_RANK") {
            Some(open_mpi(&vars)?)
        } else if vars.has("PMI_RANK") && vars.has("PMI_SIZE") {
            Some(pmi(&vars)?)
        } else if vars.has("SLURM_PROCID") && in_slurm_step(&vars) {
            Some(slurm(&vars)?)
        } else {
            None
        };
        let Some(mut rank) = found else { return Ok(None) };
        if let Some(addr) = vars.text("MASTER_ADDR") {
            rank.master_addr = Some(addr);
        }
        if let Some(port) = vars.number("MASTER_PORT")? {
            rank.master_port = Some(u16::try_from(port).map_err(|_| vars.wrong("MASTER_PORT", "a port"))?);
        }
        rank.mpi = is_counted(&vars, rank.rank, rank.world)?;
        if rank.rank >= rank.world || rank.local_rank >= rank.local_world || rank.local_world > rank.world {
            return Err(Error::user(format!(
                "the launcher's environment makes no sense: rank {} of {}, local rank {} of {}",
                rank.rank, rank.world, rank.local_rank, rank.local_world
            ))
            .hint("check RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or unset them to run one rank"));
        }
        Ok(Some(rank))
    }
}

/// Where Slurm says how many tasks there are: of the step, else of the job.
const SLURM_TASKS: [&str; 3] = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];

impl RankEnv {
    /// The two variables that say which rank this is, and their values: `RANK=3 and WORLD_SIZE=8`.
    pub fn told_by(&self) -> String {
        let (rank, world) = match self.launcher {
            Launcher::Phalanx | Launcher::Torchrun => ("RANK", "WORLD_SIZE"),
            Launcher::Slurm => {
                let of_step = std::env::var_os(SLURM_TASKS[0]).is_some();
                ("SLURM_PROCID", SLURM_TASKS[usize::from(!of_step)])
            }
            Launcher::OpenMpi => ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
            Launcher::Pmi => ("PMI_RANK", "PMI_SIZE"),
        };
        format!("{rank}={} and {world}={}", self.rank, self.world)
    }

    /// The command that takes those variables away for one command.
    pub fn without(&self) -> &'static str {
        match self.launcher {
            Launcher::Phalanx | Launcher::Torchrun => "env -u RANK -u WORLD_SIZE",
            Launcher::Slurm => "env -u SLURM_PROCID",
            Launcher::OpenMpi => "env -u OMPI_COMM_WORLD_RANK",
            Launcher::Pmi => "env -u PMI_RANK",
        }
    }
}

/// Stands for the name of a job that the launcher does not name.
const NO_JOB: &str = "unnamed";

struct Vars<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl Vars<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        self.text(name).map(|v| v.parse().map_err(|_| self.wrong(name, "a whole number"))).transpose()
    }

    /// The first of `names` that is set.
    fn first(&self, names: &[&str]) -> Result<Option<usize>> {
        names.iter().find(|n| self.has(n)).map_or(Ok(None), |n| self.number(n))
    }

    fn need(&self, names: &[&str]) -> Result<usize> {
        self.first(names)?
            .ok_or_else(|| Error::user(format!("the launcher's environment lacks {}", names.join(" and "))))
    }

    fn wrong(&self, name: &str, wanted: &str) -> Error {
        let found = self.text(name).unwrap_or_default();
        Error::user(format!("environment variable {name}={found}: expected {wanted}")).hint(format!(
            "a launcher sets it for each rank; for one process alone: env -u {name} phalanx ..."
        ))
    }
}

fn torchrun(vars: &Vars<'_>) -> Result<RankEnv> {
    let restart = vars.number("TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0);
    let run_id = vars.text("TORCHELASTIC_RUN_ID").unwrap_or_else(|| "none".into());
    // A torchrun inside one of our ranks leaves our variables in place, with another run id beside them.
    let session =
        vars.text("PHALANX_SESSION").filter(|s| s.rsplit_once('/').is_some_and(|(id, _)| id == run_id));
    let agent_store = vars.text("PHALANX_STORE").filter(|_| session.is_some());
    let rank = vars.need(&["RANK"])?;
    // Without the per-node variables (a person set RANK by hand) each rank counts as a node of its own.
    let local_world = vars.number("LOCAL_WORLD_SIZE")?;
    let local_rank = if local_world.is_some() { vars.number("LOCAL_RANK")?.unwrap_or(0) } else { 0 };
    Ok(RankEnv {
        launcher: if agent_store.is_some() { Launcher::Phalanx } else { Launcher::Torchrun },
        rank,
        world: vars.need(&["WORLD_SIZE"])?,
        local_rank,
        local_world: local_world.unwrap_or(1),
        node: vars.number("GROUP_RANK")?.unwrap_or(0),
        nodes: vars.number("GROUP_WORLD_SIZE")?,
        restart: u32::try_from(restart).unwrap_or(u32::MAX),
        session: session.unwrap_or_else(|| format!("{run_id}/{restart}")),
        master_addr: None,
        master_port: None,
        agent_store,
        torch_store: vars.text("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True"),
        mpi: false,
    })
}

/// A rank whose launcher only counts processes.
fn plain(launcher: Launcher, rank: usize, world: usize, local: (usize, usize), session: String) -> RankEnv {
    RankEnv {
        launcher,
        rank,
        world,
        local_rank: local.0,
        local_world: local.1,
        node: 0,
        nodes: (local.1 == world).then_some(1),
        restart: 0,
        master_addr: (local.1 == world).then(|| "127.0.0.1".to_owned()),
        master_port: Some(port_of(&session)),
        session,
        agent_store: None,
        torch_store: false,
        mpi: false,
    }
}

/// Whether MPI's process manager counts this process as `rank` of `world`: a launcher inside of it leaves its variables in
/// place, where they mean another process.
fn is_counted(vars: &Vars<'_>, rank: usize, world: usize) -> Result<bool> {
    let (of_pmi, of_pmix) = (vars.number("PMI_RANK")?, vars.number("PMIX_RANK")?);
    let size = vars.first(&["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])?;
    Ok(of_pmi.or(of_pmix) == Some(rank) && size.is_none_or(|n| n == world))
}

fn open_mpi(vars: &Vars<'_>) -> Result<RankEnv> {
    let rank = vars.need(&["OMPI_COMM_WORLD_RANK"])?;
    let world = vars.need(&["OMPI_COMM_WORLD_SIZE"])?;
    let local = (
        vars.number("OMPI_COMM_WORLD_LOCAL_RANK")?.unwrap_or(0),
        vars.number("OMPI_COMM_WORLD_LOCAL_SIZE")?.unwrap_or(1),
    );
    let job = ["PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid"];
    let job = job.iter().find_map(|n| vars.text(n)).unwrap_or_else(|| "mpi".into());
    Ok(plain(Launcher::OpenMpi, rank, world, local, format!("mpi-{job}")))
}

fn pmi(vars: &Vars<'_>) -> Result<RankEnv> {
    let (rank, world) = (vars.need(&["PMI_RANK"])?, vars.need(&["PMI_SIZE"])?);
    let by_slurm = vars.number("SLURM_PROCID")? == Some(rank) && in_slurm_step(vars);
    if by_slurm && !vars.has("MPI_LOCALRANKID") {
        return slurm(vars);
    }
    let local = (vars.number("MPI_LOCALRANKID")?.unwrap_or(0), vars.number("MPI_LOCALNRANKS")?.unwrap_or(1));
    let job = ["PMI_JOBID", "PMI_PORT"].iter().find_map(|n| vars.text(n)).unwrap_or_else(|| NO_JOB.into());
    Ok(plain(Launcher::Pmi, rank, world, local, format!("pmi-{job}")))
}

/// Slurm sets its variables in the batch script and in interactive shells too, where they name no task of a step; the
/// step numbers of those are the topmost (`slurm/slurm.h`: batch, extern, interactive).
fn in_slurm_step(vars: &Vars<'_>) -> bool {
    let step = vars.text("SLURM_STEP_ID").or_else(|| vars.text("SLURM_STEPID"));
    step.and_then(|s| s.parse::<u32>().ok()).is_some_and(|s| s < 0xffff_fff0)
}

fn slurm(vars: &Vars<'_>) -> Result<RankEnv> {
    let rank = vars.need(&["SLURM_PROCID"])?;
    let world = vars.need(&SLURM_TASKS)?;
    let node = vars.number("SLURM_NODEID")?.unwrap_or(0);
    let per_node = vars.text("SLURM_STEP_TASKS_PER_NODE").or_else(|| vars.text("SLURM_TASKS_PER_NODE"));
    let counts = per_node.map(|text| {
        tasks_per_node(&text).ok_or_else(|| vars.wrong("SLURM_STEP_TASKS_PER_NODE", "counts like 4(x2),3"))
    });
    let local_world = counts.transpose()?.and_then(|c| c.get(node).copied());
    let local_rank = vars.number("SLURM_LOCALID")?.unwrap_or(0);
    let job = vars.text("SLURM_JOB_ID").or_else(|| vars.text("SLURM_JOBID")).unwrap_or_default();
    let step = vars.text("SLURM_STEP_ID").or_else(|| vars.text("SLURM_STEPID")).unwrap_or_default();
    // Clusters of one site count their jobs alike.
    let cluster = vars.text("SLURM_CLUSTER_NAME").map_or(String::new(), |name| format!("{name}-"));
    let local = (local_rank, local_world.unwrap_or(local_rank + 1));
    let mut env = plain(Launcher::Slurm, rank, world, local, format!("slurm-{cluster}{job}-{step}"));
    env.restart = vars.number("SLURM_RESTART_COUNT")?.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    env.session = format!("{}-{}", env.session, env.restart);
    env.node = node;
    env.nodes = vars.first(&["SLURM_STEP_NUM_NODES", "SLURM_NNODES"])?.or(env.nodes);
    if env.nodes != Some(1) {
        env.master_addr = first_node(vars).or(env.master_addr);
    }
    Ok(env)
}

/// The step's first node, which rank 0 is on: its address where Slurm says it, else its name.
fn first_node(vars: &Vars<'_>) -> Option<String> {
    let first = |name: &str| vars.text(name).and_then(|list| first_host(&list));
    let job = first("SLURM_JOB_NODELIST").or_else(|| first("SLURM_NODELIST"));
    let step = first("SLURM_STEP_NODELIST").or_else(|| job.clone());
    // A batch script runs on the job's first node, and what it starts is told the address that this came from. Under
    // `salloc` and a plain `srun` that is the address of another machine.
    let in_batch = vars.text("ENVIRONMENT").as_deref() == Some("BATCH");
    let address = vars.text("SLURM_LAUNCH_NODE_IPADDR").filter(|_| in_batch && step == job);
    address.or(step)
}

/// The address under which Slurm itself reaches a node whose name nothing else resolves.
fn node_addr(node: &str) -> Option<String> {
    let asked = std::process::Command::new("scontrol")
        .args(["--oneliner", "show", "node", node])
        .stdin(std::process::Stdio::null())
        .output()
        .ok()?;
    word(&String::from_utf8_lossy(&asked.stdout), "NodeAddr=").map(str::to_owned)
}

/// What follows `key` in a line of `key=value` words.
fn word<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|w| w.strip_prefix(key)).filter(|value| !value.is_empty())
}

/// Whether this was started by hand in the shell of `srun --pty`. That shell is a task of a step; what runs in it
/// inherits the task's variables, and unlike a task of another step it has a terminal.
fn is_in_srun_shell() -> bool {
    std::env::var_os("SLURM_PTY_PORT").is_some() && std::fs::File::open("/dev/tty").is_ok()
}

/// For a process that is no rank of a job: that Slurm gave the job, or the shell that this was started in, several
/// tasks, of which this is none.
///
/// ```
/// let note = |vars: &[(&str, &str)]| launch::rank_env::unused_tasks(&|n| {
///     vars.iter().find(|(name, _)| *name == n).map(|(_, value)| value.to_string())
/// });
/// assert_eq!(note(&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "4")]), Some(4));
/// assert_eq!(note(&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "1")]), None);
/// assert_eq!(note(&[]), None);
/// ```
pub fn unused_tasks(lookup: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    let vars = Vars { lookup };
    let tasks = vars.first(&SLURM_TASKS).ok().flatten();
    tasks.filter(|n| *n > 1)
}

/// `4(x2),3` is 4, 4, 3.
fn tasks_per_node(text: &str) -> Option<Vec<usize>> {
    /// More nodes than any Slurm cluster has.
    const MOST: usize = 1 << 20;
    let mut counts = Vec::new();
    for part in text.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        if times > MOST || counts.len() > MOST {
            return None;
        }
        counts.extend(std::iter::repeat_n(count.parse::<usize>().ok()?, times));
    }
    Some(counts)
}

/// The first host of a Slurm node list: `gpu[003-007,010],login1` is `gpu003`.
fn first_host(list: &str) -> Option<String> {
    let mut name = String::new();
    let mut rest = list.chars();
    while let Some(c) = rest.next() {
        match c {
            ',' => break,
            '[' => {
                let inside: String = rest.by_ref().take_while(|c| *c != ']').collect();
                name.push_str(inside.split([',', '-']).next()?);
            }
            c => name.push(c),
        }
    }
    (!name.is_empty()).then_some(name)
}

/// A port that all ranks of a job derive alike: below the kernel's ephemeral ports (32768 on), so that nothing holds
/// it by chance; another job of the same machine most likely derives another. `MASTER_PORT` overrides it.
fn port_of(session: &str) -> u16 {
    let hash = spec::hash::fnv1a(session.bytes());
    15_000 + u16::try_from((hash ^ (hash >> 32)) % 15_000).unwrap_or(0)
}

/// The variables that [`RankEnv::read`] understood, for people: name to value, but for the job's secret.
pub fn seen() -> BTreeMap<String, String> {
    const PREFIXES: &[&str] =
        &["TORCHELASTIC_", "SLURM_", "OMPI_COMM_WORLD_", "PMI", "PMIX_", "MPI_LOCAL", "PHALANX_"];
    const NAMES: &[&str] =
        &["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"];
    let of_a_launcher = |name: &str| NAMES.contains(&name) || PREFIXES.iter().any(|p| name.starts_with(p));
    let text = std::env::vars_os().filter_map(|(n, v)| Some((n.into_string().ok()?, v.into_string().ok()?)));
    let hidden = |(name, value): (String, String)| {
        let shown = if crate::secret::is_secret(&name) { "...".to_owned() } else { value };
        (name, shown)
    };
    text.filter(|(name, _)| of_a_launcher(name)).map(hidden).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Option<RankEnv>> {
        let map: BTreeMap<&str, &str> = vars.iter().copied().collect();
        RankEnv::from_vars(&|name| map.get(name).map(|v| v.to_string()))
    }

    fn check(vars: &[(&str, &str)], expected: Option<(Launcher, [usize; 4], Option<&str>)>) {
        let found = read(vars).unwrap();
        let short = found
            .as_ref()
            .map(|r| (r.launcher, [r.rank, r.world, r.local_rank, r.local_world], r.master_addr.as_deref()));
        assert_eq!(short, expected, "{vars:?}");
    }

    const TORCHRUN: &[(&str, &str)] = &[
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "head"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn each_launcher_is_read() {
        check(&[], None);
        check(TORCHRUN, Some((Launcher::Torchrun, [3, 4, 1, 2], Some("head"))));
        let ours = [("PHALANX_STORE", "h:1"), ("PHALANX_SESSION", "a/b/0"), ("TORCHELASTIC_RUN_ID", "a/b")];
        check(&[TORCHRUN, &ours].concat(), Some((Launcher::Phalanx, [3, 4, 1, 2], Some("head"))));
        let inner = [("PHALANX_STORE", "h:1"), ("PHALANX_SESSION", "a/b/0"), ("TORCHELASTIC_RUN_ID", "c")];
        check(&[TORCHRUN, &inner].concat(), Some((Launcher::Torchrun, [3, 4, 1, 2], Some("head"))));
        check(&[("RANK", "0"), ("WORLD_SIZE", "2")], Some((Launcher::Torchrun, [0, 2, 0, 1], None)));
        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_STEP_NUM_TASKS", "7"),
            ("SLURM_NTASKS", "100"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_NODEID", "1"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_TASKS_PER_NODE", "4,3"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_STEP_NODELIST", "gpu[003-004]"),
        ];
        check(&slurm, Some((Launcher::Slurm, [5, 7, 1, 3], Some("gpu003"))));
        // srun in a batch script is told the address of the node that it runs on, the job's first; elsewhere it is
        // another machine's.
        let address = [("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.3"), ("SLURM_JOB_NODELIST", "gpu[003-004]")];
        let by = |host| Some((Launcher::Slurm, [5, 7, 1, 3], Some(host)));
        check(&[&slurm[..], &address[..]].concat(), by("gpu003"));
        let batch = [&slurm[..], &address[..], &[("ENVIRONMENT", "BATCH")]].concat();
        check(&batch, by("10.0.0.3"));
        let elsewhere = [&batch[..], &[("SLURM_STEP_NODELIST", "gpu004")]].concat();
        check(&elsewhere, by("gpu004"));
        // The batch script itself is no rank.
        check(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_STEP_ID", "4294967291")], None);
        check(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")], None);
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        check(&mpi, Some((Launcher::OpenMpi, [1, 2, 1, 2], Some("127.0.0.1"))));
        check(&[&mpi[..], &slurm[..]].concat(), Some((Launcher::OpenMpi, [1, 2, 1, 2], Some("127.0.0.1"))));
        let hydra =
            [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];
        check(&hydra, Some((Launcher::Pmi, [0, 2, 0, 2], Some("127.0.0.1"))));
        let srun_pmi2 = [&[("PMI_RANK", "5"), ("PMI_SIZE", "7")], &slurm[..]].concat();
        check(&srun_pmi2, Some((Launcher::Slurm, [5, 7, 1, 3], Some("gpu003"))));
        let has_mpi = |vars: &[(&str, &str)]| read(vars).unwrap().is_some_and(|rank| rank.mpi);
        assert!(
            has_mpi(&hydra) && has_mpi(&srun_pmi2) && has_mpi(&[&mpi[..], &[("PMIX_RANK", "1")]].concat())
        );
        // Started by us in a process of an mpiexec, it is none of the mpiexec's ranks.
        assert!(!has_mpi(TORCHRUN) && !has_mpi(&[TORCHRUN, &hydra].concat()) && !has_mpi(&slurm));
    }

    #[test]
    fn nonsense_is_named() {
        let check = |vars: &[(&str, &str)], what: &str| {
            let error = read(vars).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
            assert_eq!(error.exit_code(), 2);
        };
        check(&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=x");
        check(&[("RANK", "2"), ("WORLD_SIZE", "2")], "rank 2 of 2");
        check(&[("OMPI_COMM_WORLD_RANK", "0")], "lacks OMPI_COMM_WORLD_SIZE");
        check(&[("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "70000")], "MASTER_PORT=70000");
    }

    #[test]
    fn slurm_lists() {
        assert_eq!(tasks_per_node("4(x2),3"), Some(vec![4, 4, 3]));
        assert_eq!(tasks_per_node("4(x99999999999)"), None);
        assert_eq!(first_host("login1,gpu2").as_deref(), Some("login1"));
        assert_eq!(first_host("r[01-02]n[3,5],x").as_deref(), Some("r01n3"));
        assert_eq!(first_host(""), None);
        assert_eq!(word("NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=x", "NodeAddr="), Some("10.0.0.1"));
        assert_eq!(word("slurm_load_node error", "NodeAddr="), None);
    }

    #[test]
    fn derived_ports_stay_below_the_ephemeral_ones() {
        assert!((0..1000).all(|i| (15_000..30_000).contains(&port_of(&format!("slurm-{i}-0")))));
    }
}
