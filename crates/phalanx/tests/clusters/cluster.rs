//! A Slurm of a test's own: munge, a controller and nodes of this machine, in a temporary folder, on free ports.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

/// Longest time that Slurm takes for anything here: noticing a dead node and queuing its jobs again takes most of it.
const PATIENCE: Duration = Duration::from_secs(180);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(25);

/// Seconds that a credential lives, and with it those that a job waits before it starts again.
const REQUEUE_S: u32 = 5;

const PROGRAMS: [&str; 4] = ["munged", "slurmctld", "slurmd", "srun"];

pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    nodes: usize,
    daemons: Vec<(String, Child)>,
}

/// Looks until there is an answer.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited {PATIENCE:?} for {what}");
        park_timeout(LOOK);
    }
}

fn is_installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&paths).chain(more).any(|dir| dir.join(program).is_file())
}

fn sbin(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", format!("{}:/usr/sbin:/usr/local/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}

impl Cluster {
    /// A cluster of `nodes` nodes with `cpus` cores each, or nothing, with the reason printed, where there is no Slurm.
    pub(crate) fn start(nodes: usize, cpus: usize) -> Option<Cluster> {
        if let Some(missing) = PROGRAMS.into_iter().find(|p| !is_installed(p)) {
            eprintln!(
                "skipped: no {missing} here; Debian's packages are slurmctld, slurmd, slurm-client and munge"
            );
            return None;
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: Slurm's nodes want to be started by root");
            return None;
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut cluster = Cluster { dir, nodes, daemons: Vec::new() };
        cluster.write_configuration(nodes, cpus);
        let conf = cluster.conf();
        let munge = |name: &str| cluster.path("run").join(name).display().to_string();
        let mut munged = sbin("munged");
        munged.args(["--foreground", "--force", "--num-threads=2"]).args([
            format!("--key-file={}", cluster.path("munge.key").display()),
            format!("--socket={}", munge("munge.sock")),
            format!("--pid-file={}", munge("munged.pid")),
            format!("--log-file={}", munge("munged.log")),
            format!("--seed-file={}", munge("munge.seed")),
        ]);
        let socket = cluster.path("run/munge.sock");
        cluster.keep("munged", &mut munged);
        until("munge", || socket.exists().then_some(()));
        cluster.keep("slurmctld", sbin("slurmctld").arg("-D").arg("-f").arg(&conf));
        (1..=nodes).for_each(|n| cluster.start_node(n));
        until("the nodes", || {
            (cluster.say("sinfo", "-h -t idle -o %D").trim() == nodes.to_string()).then_some(())
        });
        Some(cluster)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn conf(&self) -> PathBuf {
        self.path("slurm.conf")
    }

    fn write_configuration(&self, nodes: usize, cpus: usize) {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set permissions");
        };
        mode(self.dir.path(), 0o755);
        for name in ["run", "state", "log"] {
            fs::create_dir(self.path(name)).expect("make a folder");
            mode(&self.path(name), 0o755);
        }
        let key: Vec<u8> = (0..64_u8).cycle().take(1024).collect();
        fs::write(self.path("munge.key"), key).expect("write munge's key");
        mode(&self.path("munge.key"), 0o400);
        let ports = free_ports(nodes + 1);
        let dir = self.dir.path().display();
        let mut text = format!(
            "ClusterName=test{}\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={}\nSlurmUser=root\nSlurmdUser=root\n\
             AuthType=auth/munge\nAuthInfo=socket={dir}/run/munge.sock,cred_expire={REQUEUE_S}\nCredType=cred/munge\n\
             StateSaveLocation={dir}/state\nSlurmdSpoolDir={dir}/state/slurmd.%n\n\
             SlurmctldPidFile={dir}/run/slurmctld.pid\nSlurmdPidFile={dir}/run/slurmd.%n.pid\n\
             SlurmctldLogFile={dir}/log/slurmctld.log\nSlurmdLogFile={dir}/log/slurmd.%n.log\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\n\
             AccountingStorageType=accounting_storage/none\nMpiDefault=none\nSelectType=select/cons_tres\n\
             SelectTypeParameters=CR_Core\nSchedulerType=sched/backfill\n\
             SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0\n\
             SlurmdParameters=config_overrides\nReturnToService=1\nJobRequeue=1\nKillWait=10\nMinJobAge=300\n\
             SlurmdTimeout=6\nSlurmctldTimeout=10\nInactiveLimit=0\nPropagateResourceLimits=NONE\n",
            ports[0], ports[0]
        );
        for (i, port) in ports[1..].iter().enumerate() {
            text += &format!(
                "NodeName=n{} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000\n",
                i + 1
            );
        }
        text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n";
        fs::write(self.conf(), text).expect("write slurm.conf");
    }

    /// Starts a daemon that stays in the foreground, so that it is our child and nobody else's.
    fn keep(&mut self, name: &str, command: &mut Command) {
        let log = fs::File::create(self.path("log").join(format!("{name}.out"))).expect("a log");
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = quiet.spawn().unwrap_or_else(|e| panic!("start {name}: {e}"));
        self.daemons.push((name.to_owned(), child));
    }

    pub(crate) fn start_node(&mut self, n: usize) {
        let (name, conf) = (format!("n{n}"), self.conf());
        self.keep(&name, sbin("slurmd").arg("-D").args(["-N", &name]).arg("-f").arg(conf));
    }

    /// A client of this cluster, and of no other that the environment may name.
    pub(crate) fn client(&self, program: &str, args: &str) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["SLURM", "SBATCH", "SRUN", "PMI", "MASTER_"].iter().any(|p| text.starts_with(p)) {
                command.env_remove(&name);
            }
        }
        command.env("SLURM_CONF", self.conf()).args(args.split_whitespace()).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, program: &str, args: &str) -> Output {
        self.client(program, args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
    }

    pub(crate) fn say(&self, program: &str, args: &str) -> String {
        String::from_utf8_lossy(&self.run(program, args).stdout).into_owned()
    }

    /// A field of a job, as `scontrol show job` has it.
    pub(crate) fn job(&self, job: &str, field: &str) -> String {
        let shown = self.say("scontrol", &format!("--oneliner show job {job}"));
        let found = shown.split_whitespace().find_map(|w| w.strip_prefix(field)?.strip_prefix('='));
        found.unwrap_or_default().to_owned()
    }

    pub(crate) fn until_state(&self, job: &str, wanted: &str) {
        until(&format!("job {job} to be {wanted}"), || (self.job(job, "JobState") == wanted).then_some(()));
    }

    /// Kills a node: its daemon, those that watch its steps, and the ranks.
    pub(crate) fn kill_node(&mut self, n: usize) {
        let name = format!("n{n}");
        let at = self.daemons.iter().position(|(d, _)| *d == name).expect("a node");
        let (_, mut daemon) = self.daemons.swap_remove(at);
        let on_node = format!("SLURMD_NODENAME={name}");
        let ranks = self.processes(|env| env.contains(&on_node));
        daemon.kill().expect("kill a node");
        // Those that watch steps have left the daemon, and are known as parents of what they started.
        let watchers = ranks.iter().filter_map(|rank| parent(*rank)).filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with("slurmstepd"))
        });
        watchers.chain(ranks.iter().copied()).for_each(kill);
        daemon.wait().expect("a node that ended");
    }

    fn kill_all(&self, is_one: impl Fn(&[String]) -> bool) {
        self.processes(is_one).into_iter().for_each(kill);
    }

    /// Processes of jobs of this cluster: they have its configuration in their environment, which no daemon has.
    pub(crate) fn processes(&self, is_one: impl Fn(&[String]) -> bool) -> Vec<i32> {
        let ours = format!("SLURM_CONF={}", self.conf().display());
        let pids = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let env = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let env: Vec<String> =
                env.split(|b| *b == 0).map(|v| String::from_utf8_lossy(v).into_owned()).collect();
            env.contains(&ours) && env.iter().any(|v| v.starts_with("SLURM_JOB_ID=")) && is_one(&env)
        })
        .collect()
    }

    pub(crate) fn nodes(&self) -> usize {
        self.nodes
    }
}

pub(crate) fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
    // It may have ended just now.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// Ports that were free a moment ago.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a free port")).collect();
    held.iter().map(|l| l.local_addr().expect("an address").port()).collect()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("log/slurmctld.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(10).collect();
            eprintln!("slurmctld: {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let _ = self.client("scancel", "--user=root").output();
        let end = Instant::now() + Duration::from_secs(20);
        while !self.processes(|_| true).is_empty() && Instant::now() < end {
            park_timeout(LOOK);
        }
        self.kill_all(|_| true);
        // Nodes before the controller, munge last: each talks to the next.
        for (_, daemon) in self.daemons.iter_mut().rev() {
            let pid = rustix::process::Pid::from_child(daemon);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let end = Instant::now() + Duration::from_secs(5);
            while matches!(daemon.try_wait(), Ok(None)) && Instant::now() < end {
                park_timeout(LOOK);
            }
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
