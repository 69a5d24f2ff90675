//! What a launch is asked to do, checked.

use crate::bind::Bind;
use crate::flags::Values;
use crate::logs::Streams;

use crate::signals;
use elastic::crew::Limits;
use elastic::rendezvous::Times;
use spec::suggest::nearest;
use spec::{Error, Result};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// Everything `phalanx launch` can be told; the defaults are torchrun's.
#[derive(Clone, Debug)]
pub struct Options {
    /// Fewest nodes that may start.
    pub min_nodes: usize,
    /// Most nodes that take part; more wait as spares.
    pub max_nodes: usize,
    /// Workers on this node.
    pub nproc: NprocPerNode,
    /// One node, nothing to meet.
    pub standalone: bool,
    /// How nodes meet.
    pub backend: Backend,
    /// Where nodes meet, `host` or `host:port`.
    pub endpoint: Option<String>,
    /// The job's name; all nodes give the same one.
    pub run_id: String,
    /// Timeouts of the rendezvous.
    pub times: Times,
    /// Whether this node hosts the store; `None` finds out from the endpoint.
    pub is_host: Option<bool>,
    /// This node's rank, for the static backend.
    pub node_rank: usize,
    /// Address of node rank 0, for the static backend.
    pub master_addr: String,
    /// Port of node rank 0, for the static backend.
    pub master_port: Option<u16>,
    /// This node's address as the others see it.
    pub local_addr: Option<String>,
    /// A file with the job's secret, made if there is none; else the environment is asked.
    pub secret: Option<PathBuf>,
    /// Nodes may meet without a secret.
    pub insecure: bool,
    /// Which of this node's addresses to listen on.
    pub bind: Option<Bind>,
    /// Restarts of the workers before giving up.
    pub max_restarts: u32,
    /// How often the nodes look at each other.
    pub monitor_interval: Duration,
    /// From SIGTERM to SIGKILL when workers are stopped.
    pub shutdown_timeout: Duration,
    /// Fewest workers with which this node goes on when a place of a worker keeps failing; as many as there are, if `None`.
    pub min_nproc: Option<usize>,
    /// A worker that can recover and gives no sign of life for so long is killed and replaced.
    pub silence_timeout: Duration,
    /// A worker that can recover and whose ops stand still for so long, while it waits for nobody, is killed and replaced.
    pub hang_timeout: Duration,
    /// For workers that save before they end by request.
    pub saving: Option<Saving>,
    /// Signals that stop the job, passed on to the workers first.
    pub signals_to_handle: Vec<i32>,
    /// Signals that are only passed on.
    pub signals_to_forward: Vec<i32>,
    /// Role of the workers.
    pub role: String,
    /// How the program is run.
    pub runner: Runner,
    /// Folder of the log files; a temporary one if `None`.
    pub log_dir: Option<PathBuf>,
    /// Streams that go to files only.
    pub redirects: Streams,
    /// Streams that go to files and the console.
    pub tee: Streams,
    /// Local ranks shown on the console; all if `None`.
    pub local_ranks_filter: Option<BTreeSet<usize>>,
    /// Prefix of tee'd lines.
    pub log_line_prefix_template: Option<String>,
    /// Texts whose lines are copied to `filtered_stdout.log`.
    pub stdout_filters: Vec<String>,
    /// Texts whose lines are copied to `filtered_stderr.log`.
    pub stderr_filters: Vec<String>,
    /// `LOCAL_RANK=0` and one visible GPU per worker.
    pub virtual_local_rank: bool,
    /// Whether the launcher ends with the failed worker's own exit code instead of 1.
    pub pass_exit_code: bool,
    /// Whether the launcher waits for a signal after success, where whatever ends is started again.
    pub hold: bool,
    /// Variables for the workers, over those of the agent; not a flag.
    pub env: Vec<(String, String)>,
    /// Flags that were accepted and do nothing, for the user to know.
    pub without_effect: Vec<String>,
}

/// How workers that save before they end are asked to: whatever signal came, they get this one, once. Only a second
/// SIGINT to the agent, a person's, cuts the time short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saving {
    /// The signal; such a worker then exits with 130.
    pub signal: i32,
    /// From the signal to SIGKILL.
    pub timeout: Duration,
}

/// The value of `--nproc-per-node`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NprocPerNode {
    /// This many.
    Count(usize),
    /// One per GPU, or per core if there is none.
    Auto,
    /// One per core that this process may use.
    Cpu,
    /// One per GPU.
    Gpu,
}

/// How nodes meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// All node ranks are known and all must come.
    Static,
    /// Nodes come and go between `MIN` and `MAX` (torchrun's `c10d`).
    Dynamic,
}

/// How the program becomes a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runner {
    /// Through Python if it is a Python script, else directly.
    Guess,
    /// Through Python.
    Python,
    /// As a Python module.
    Module,
    /// Directly.
    Direct,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            min_nodes: 1,
            max_nodes: 1,
            nproc: NprocPerNode::Count(1),
            standalone: false,
            backend: Backend::Static,
            endpoint: None,
            run_id: "none".into(),
            times: Times::default(),
            is_host: None,
            node_rank: 0,
            master_addr: "127.0.0.1".into(),
            master_port: None,
            local_addr: None,
            secret: None,
            insecure: false,
            bind: None,
            max_restarts: 0,
            monitor_interval: Duration::from_millis(100),
            shutdown_timeout: Duration::from_secs(30),
            min_nproc: None,
            silence_timeout: Limits::SILENT,
            hang_timeout: Limits::HUNG,
            saving: None,
            signals_to_handle: vec![libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT],
            signals_to_forward: vec![libc::SIGUSR1, libc::SIGUSR2],
            role: "default".into(),
            runner: Runner::Guess,
            log_dir: None,
            redirects: Streams::none(),
            tee: Streams::none(),
            local_ranks_filter: None,
            log_line_prefix_template: None,
            stdout_filters: Vec::new(),
            stderr_filters: Vec::new(),
            virtual_local_rank: false,
            pass_exit_code: false,
            hold: false,
            env: Vec::new(),
            without_effect: Vec::new(),
        }
    }
}

impl Options {
    pub(crate) fn from_values(v: &Values, env: &dyn Fn(&str) -> Option<String>) -> Result<Options> {
        let mut o = Options::default();
        (o.min_nodes, o.max_nodes) = nodes(v)?;
        o.nproc = nproc(v)?;
        o.standalone = v.on("standalone")?;
        rendezvous(&mut o, v)?;
        workers(&mut o, v, env)?;
        console(&mut o, v, env)?;
        o.pass_exit_code = v.on("pass-exit-code")?;
        o.hold = v.on("hold")?;
        o.check(v)?;
        Ok(o)
    }

    /// Whether workers that can meet again are to do so when one is lost: somebody pays for it, or the job may shrink.
    pub(crate) fn is_elastic(&self) -> bool {
        self.max_restarts > 0 || self.min_nodes < self.max_nodes || self.min_nproc.is_some()
    }

    /// Whether there is no other node to meet.
    pub(crate) fn is_single(&self) -> bool {
        self.standalone || (self.max_nodes == 1 && self.backend == Backend::Static && self.endpoint.is_none())
    }

    /// What no single flag can tell.
    fn check(&self, v: &Values) -> Result<()> {
        self.check_places(v)?;
        if self.standalone && self.min_nodes > 1 {
            return Err(v
                .bad("nnodes", "1 with --standalone")
                .hint("without --standalone the nodes meet each other"));
        }
        if self.is_single() {
            return Ok(());
        }
        match self.backend {
            Backend::Dynamic if self.endpoint.is_none() => {
                Err(Error::user("--rdzv-backend=c10d needs --rdzv-endpoint, the same on all nodes")
                    .hint("--rdzv-endpoint=<host of one node>:29400, or --standalone for one node"))
            }
            Backend::Static if self.min_nodes != self.max_nodes => Err(v
                .bad("nnodes", "one number with the static backend")
                .hint("--rdzv-backend=c10d takes MIN:MAX")),
            _ => Ok(()),
        }
    }

    /// Places that are named are there.
    fn check_places(&self, v: &Values) -> Result<()> {
        if !self.standalone && self.backend == Backend::Static && self.node_rank >= self.max_nodes {
            return Err(v.bad("node-rank", &format!("a rank below --nnodes={}", self.max_nodes)));
        }
        let NprocPerNode::Count(workers) = self.nproc else { return Ok(()) };
        if self.local_ranks_filter.iter().flatten().any(|rank| *rank >= workers) {
            return Err(
                v.bad("local-ranks-filter", &format!("local ranks below {workers}, the workers of a node"))
            );
        }
        match self.min_nproc.filter(|least| *least > workers) {
            Some(_) => Err(v.bad("min-nproc", &format!("at most the {workers} of --nproc-per-node"))),
            None => Ok(()),
        }
    }
}

impl NprocPerNode {
    /// The number of workers on this machine.
    ///
    /// # Errors
    /// `gpu` on a machine without one.
    pub fn resolve(self) -> Result<usize> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        match self {
            NprocPerNode::Count(n) => Ok(n),
            NprocPerNode::Cpu => Ok(cores()),
            NprocPerNode::Auto => Ok(match gpus() {
                0 => cores(),
                n => n,
            }),
            NprocPerNode::Gpu => match gpus() {
                0 => Err(Error::user("--nproc-per-node=gpu: no GPU found on this machine")
                    .hint("--nproc-per-node=cpu or a number")),
                n => Ok(n),
            },
        }
    }
}

/// GPUs that the workers would see: `CUDA_VISIBLE_DEVICES`, else the NVIDIA device files.
fn gpus() -> usize {
    if let Ok(visible) = std::env::var("CUDA_VISIBLE_DEVICES") {
        return visible.split(',').filter(|d| !d.trim().is_empty() && d.trim() != "-1").count();
    }
    let numbered = |name: &str| name.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok());
    std::fs::read_dir("/dev").map_or(0, |dir| {
        dir.flatten().filter(|entry| entry.file_name().to_str().is_some_and(numbered)).count()
    })
}

pub(crate) use elastic::rendezvous::MAX_NPROC;

fn nodes(v: &Values) -> Result<(usize, usize)> {
    let Some(text) = v.text("nnodes") else { return Ok((1, 1)) };
    let (min, max) = text.split_once(':').unwrap_or((text, text));
    match (min.trim().parse(), max.trim().parse()) {
        (Ok(min), Ok(max)) if 0 < min && min <= max => Ok((min, max)),
        _ => Err(v.bad("nnodes", "N or MIN:MAX with 0 < MIN <= MAX")),
    }
}

fn nproc(v: &Values) -> Result<NprocPerNode> {
    match v.text("nproc-per-node") {
        None => Ok(NprocPerNode::Count(1)),
        Some("auto") => Ok(NprocPerNode::Auto),
        Some("cpu") => Ok(NprocPerNode::Cpu),
        Some("gpu") => Ok(NprocPerNode::Gpu),
        Some(n) => match n.trim().parse() {
            Ok(n) if (1..=MAX_NPROC).contains(&n) => Ok(NprocPerNode::Count(n)),
            _ => Err(v.bad("nproc-per-node", &format!("1 to {MAX_NPROC}, auto, cpu or gpu"))),
        },
    }
}

fn rendezvous(o: &mut Options, v: &Values) -> Result<()> {
    o.backend = match v.text("rdzv-backend") {
        None | Some("static") => Backend::Static,
        Some("c10d" | "tcp" | "phalanx") => Backend::Dynamic,
        Some(_) => {
            let error = v.bad("rdzv-backend", "static or c10d; the nodes meet at a store of our own");
            return Err(error.hint("--rdzv-backend=c10d --rdzv-endpoint=<host of one node>:29400"));
        }
    };
    o.endpoint = v.text("rdzv-endpoint").map(str::to_owned);
    o.run_id = v.text("rdzv-id").unwrap_or("none").to_owned();
    o.node_rank = v.parse("node-rank", "a whole number from 0")?.unwrap_or(0);
    if let Some(addr) = v.text("master-addr") {
        o.master_addr = addr.to_owned();
    }
    o.master_port = v.parse("master-port", "a port from 1 to 65535")?;
    o.local_addr = v.text("local-addr").map(str::to_owned);
    o.secret = v.text("secret").map(PathBuf::from);
    o.insecure = v.on("insecure")?;
    if o.insecure && o.secret.is_some() {
        return Err(Error::user("--secret and --insecure contradict each other").hint("give one of them"));
    }
    o.bind = v.parse("bind", "an address, an interface or a subnet like 10.0.0.0/8")?;
    for pair in v.text("rdzv-conf").unwrap_or("").split(',').filter(|p| !p.trim().is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| v.bad("rdzv-conf", "pairs like join_timeout=600,is_host=1"))?;
        conf(o, key.trim(), value.trim())?;
    }
    Ok(())
}

/// One pair of `--rdzv-conf`; times are in seconds, fractions allowed.
fn conf(o: &mut Options, key: &str, value: &str) -> Result<()> {
    /// Known to torchrun and without meaning here.
    const IGNORED: &[&str] =
        &["read_timeout", "store_type", "rank", "cas_backoff_max_seconds", "use_agent_store"];
    let wrong = |wanted: &str| Error::user(format!("--rdzv-conf {key}={value}: expected {wanted}"));
    let seconds = || duration(value).ok_or_else(|| wrong("seconds above 0"));
    match key {
        "join_timeout" | "timeout" => o.times.join = seconds()?,
        "last_call_timeout" => o.times.last_call = seconds()?,
        "close_timeout" => o.times.close = seconds()?,
        "heartbeat_timeout" => o.times.heartbeat = seconds()?,
        "keep_alive_interval" => o.times.keep_alive_interval = seconds()?,
        "exit_barrier_timeout" => o.times.exit_barrier = seconds()?,
        "keep_alive_max_attempt" => {
            o.times.keep_alive_max_attempt =
                value.parse().ok().filter(|n| *n > 0).ok_or_else(|| wrong("a whole number above 0"))?;
        }
        "is_host" => {
            o.is_host = Some(match value.to_lowercase().as_str() {
                "1" | "true" | "t" | "yes" | "y" => true,
                "0" | "false" | "f" | "no" | "n" => false,
                _ => return Err(wrong("true or false")),
            });
        }
        _ if IGNORED.contains(&key) => {}
        _ => {
            let near = nearest(key, Times::KEYS.iter().copied());
            let start = near.map_or(String::new(), |n| format!("did you mean {n}? "));
            return Err(Error::user(format!("unknown key {key} in --rdzv-conf"))
                .hint(format!("{start}known: {}", Times::KEYS.join(", "))));
        }
    }
    Ok(())
}

/// Seconds above 0 and at most a year, so that no sum with an instant overflows.
fn duration(text: &str) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    (seconds > 0.0 && seconds <= 366.0 * 86400.0).then(|| Duration::from_secs_f64(seconds))
}

fn workers(o: &mut Options, v: &Values, env: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    o.max_restarts = v.parse("max-restarts", "a whole number from 0")?.unwrap_or(0);
    let seconds = |name: &str| match v.text(name) {
        None => Ok(None),
        Some(text) => duration(text).map(Some).ok_or_else(|| v.bad(name, "seconds above 0")),
    };
    if let Some(interval) = seconds("monitor-interval")? {
        o.monitor_interval = interval;
    }
    if let Some(silence) = seconds("silence-timeout")? {
        o.silence_timeout = silence;
    }
    if let Some(hang) = seconds("hang-timeout")? {
        o.hang_timeout = hang;
    }
    o.min_nproc = v.parse("min-nproc", "a whole number from 1")?;
    if o.min_nproc == Some(0) {
        return Err(v.bad("min-nproc", "a whole number from 1"));
    }
    let from_env = env("TORCH_ELASTIC_SHUTDOWN_TIMEOUT").and_then(|t| duration(&t));
    if let Some(grace) = seconds("shutdown-timeout")?.or(from_env) {
        o.shutdown_timeout = grace;
    }
    for (name, list) in
        [("signals-to-handle", &mut o.signals_to_handle), ("signals-to-forward", &mut o.signals_to_forward)]
    {
        if let Some(text) = v.text(name) {
            *list = text.split(',').map(|s| signals::parse(s.trim())).collect::<Result<_>>()?;
        }
    }
    o.signals_to_forward.retain(|s| !o.signals_to_handle.contains(s));
    if let Some(role) = v.text("role") {
        o.role = role.to_owned();
    }
    let (module, direct, path) = (v.on("module")?, v.on("no-python")?, v.on("run-path")?);
    o.runner = match (path, module, direct) {
        (true, _, _) => Runner::Python,
        (false, true, true) => {
            return Err(
                Error::user("--no-python and --module contradict each other").hint("give one of them")
            );
        }
        (false, true, false) => Runner::Module,
        (false, false, true) => Runner::Direct,
        (false, false, false) => Runner::Guess,
    };
    if let Some(method) = v.text("start-method")
        && !["spawn", "fork", "forkserver"].contains(&method)
    {
        return Err(v.bad("start-method", "spawn, fork or forkserver"));
    }
    o.virtual_local_rank = v.on("virtual-local-rank")?;
    let inert =
        ["numa-binding", "event-log-handler", "logs-specs"].into_iter().filter(|name| v.text(name).is_some());
    o.without_effect = inert.map(|name| format!("--{name}")).collect();
    Ok(())
}

fn console(o: &mut Options, v: &Values, env: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    o.log_dir = v.text("log-dir").map(PathBuf::from);
    for (name, streams) in [("redirects", &mut o.redirects), ("tee", &mut o.tee)] {
        if let Some(text) = v.text(name) {
            *streams = text.parse().map_err(|()| v.bad(name, "0 to 3, or pairs like 0:1,1:2"))?;
        }
    }
    if let Some(text) = v.text("local-ranks-filter") {
        let ranks: Result<BTreeSet<usize>, _> = text.split(',').map(|r| r.trim().parse()).collect();
        o.local_ranks_filter =
            Some(ranks.map_err(|_| v.bad("local-ranks-filter", "local ranks like 0,1,2"))?);
    }
    o.log_line_prefix_template = v
        .text("log-line-prefix-template")
        .map(str::to_owned)
        .or_else(|| env("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE").filter(|t| !t.is_empty()));
    o.stdout_filters = filters(v.text("duplicate-stdout-filters"));
    o.stderr_filters = filters(v.text("duplicate-stderr-filters"));
    Ok(())
}

/// Texts separated by commas; two commas stand for one in a text.
fn filters(text: Option<&str>) -> Vec<String> {
    let parts = text.unwrap_or("").replace(",,", "\u{0}");
    parts.split(',').filter(|p| !p.is_empty()).map(|p| p.replace('\u{0}', ",")).collect()
}
