//! Disturb a small run at random, and hold what comes of it to the undisturbed one.
//!
//! A run is trained once alone and once under faults: ranks and agents killed and stopped, links cut and slowed, clocks that
//! jump, disks full or gone, checkpoints torn. It gets over the loss of a rank or of one of several agents by itself; after
//! what ends the job it is started again, as a batch system does, each time under another layout of up to eight ranks, over
//! shared memory or TCP, under one agent or two. In the end its weights must be those of the undisturbed run, bit by bit,
//! its journals must show that no sample was lost or seen twice, and nothing may be left of it.

mod disk;
mod disturbed;
mod faults;
mod links;
mod session;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use spec::{Error, Result};

use disk::Disk;
use disturbed::Disturbed;
use faults::{ALONE, Layout, pick};
pub use faults::{Fault, Kind, faults};
use links::Links;
use session::Session;

/// Keys of a model and a batch so small that a step takes about a millisecond.
const MODEL: [&str; 18] = [
    "model.vocab=300",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.kv_heads=2",
    "model.head_dim=16",
    "model.ffn=48",
    "data.vocab_size=300",
    "data.text=text.txt",
    "batch.sequence=32",
    "batch.sequences=8",
    "train.eval_every=0",
    "train.sample_tokens=0",
    "schedule.warmup_steps=1",
    "checkpoint.every=5",
    "checkpoint.keep=3",
    "run.threads=1",
    // Many times a step: a rank that is silent for so long has been stopped.
    "run.timeout_s=3",
];
/// More ranks than a job loses.
const MAX_RESTARTS: &str = "1000000";
/// Steps that a run can be ahead of what was read of it, and the steps that a fault waits for.
const STEPS_A_FAULT: u64 = 50;
/// How agents find each other and miss each other: short, so that faults and not waits fill the time.
const RENDEZVOUS: &str =
    "join_timeout=60,last_call_timeout=3,keep_alive_interval=0.5,keep_alive_max_attempt=8";
/// What a shared-memory transport leaves if it is not taken away begins so.
const SHARED_MEMORY: &str = "phalanx";

/// What to do to a run.
pub struct Chaos<'a> {
    /// The program that trains.
    pub program: &'a Path,
    /// An empty directory for both runs.
    pub dir: &'a Path,
    /// Faults.
    pub faults: usize,
    /// Chooses them.
    pub seed: u64,
    /// Ranks at most.
    pub ranks: usize,
    /// Is told what is going on, how many faults are done and of how many.
    pub progress: &'a dyn Fn(&str, usize, usize),
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Faults that met the run.
    pub faults: usize,
    /// How often it went on afterwards.
    pub recoveries: usize,
    /// Whether parameters and moments are those of the undisturbed run.
    pub bit_identical: bool,
    /// Samples that no step was trained on.
    pub samples_lost: u64,
    /// Samples that some step was trained on twice.
    pub samples_repeated: u64,
    /// Steps of which some rank has no record: what they were trained on is not known.
    pub steps_unrecorded: u64,
    /// Whether the tokens of all steps are those of the data.
    pub tokens_equal: bool,
    /// Steps that were done again, since no checkpoint held them.
    pub steps_redone: u64,
    /// From a fault that ended the job to the next step that was done, in seconds.
    pub median_restart_s: f64,
    /// Lost ranks that the others got over in the same job, from memory.
    pub survived: usize,
    /// From such a loss to the next step that was done, in seconds.
    pub median_recovery_s: f64,
    /// From the last sign of life of whoever was lost to the moment at which the last of the others knew, in seconds, of all
    /// such losses.
    pub median_detection_s: f64,
    /// Steps whose records are missing, the first ranges of them.
    pub unrecorded: Vec<(u64, u64)>,
    /// Damaged and doubled lines of journals, in words.
    pub damage: Vec<String>,
    /// Jobs that had to be killed because they neither went on nor ended.
    pub hangs: usize,
    /// Processes that outlived their job.
    pub orphans: usize,
    /// Pieces of shared memory that were left.
    pub leftovers: usize,
    /// Steps of the run.
    pub steps: u64,
    /// Faults by kind.
    pub kinds: BTreeMap<Kind, usize>,
    /// Kinds of faults that could not be tried here, and why.
    pub not_tried: BTreeMap<Kind, String>,
}

impl Report {
    /// Whether the run kept every promise.
    pub fn holds(&self) -> bool {
        self.bit_identical
            && self.tokens_equal
            && self.samples_lost + self.samples_repeated + self.steps_unrecorded == 0
            && self.hangs + self.orphans + self.leftovers == 0
            && self.recoveries == self.faults
    }
}

/// Where a run is disturbed, and by what.
struct Place<'a> {
    chaos: &'a Chaos<'a>,
    steps: u64,
    links: Links,
    disk: Option<Disk>,
    not_tried: BTreeMap<Kind, String>,
}

impl Chaos<'_> {
    /// Trains the run alone, then under its faults, and compares.
    ///
    /// # Errors
    /// If a run cannot be started, or one under faults cannot be gone on with: then with what it said last.
    pub fn run(&self) -> Result<Report> {
        let place = Place::make(self)?;
        let before = Place::leftovers();
        (self.progress)("training undisturbed", 0, self.faults);
        let alone = place.start("alone", ALONE, 0)?.end()?;
        if !alone.is(&[0]) {
            return Err(place.failed("the undisturbed run", "alone", 0));
        }
        let mut disturbed = Disturbed::new(&place)?;
        let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|k| !place.not_tried.contains_key(k)).collect();
        for fault in faults(self.seed, self.faults, &kinds) {
            (self.progress)("disturbing", disturbed.report.faults, self.faults);
            if !disturbed.meet(fault)? {
                break;
            }
        }
        let mut report = disturbed.finish()?;
        report.leftovers = Place::leftovers().saturating_sub(before);
        report.not_tried = place.not_tried;
        Ok(report)
    }
}

impl<'a> Place<'a> {
    fn make(chaos: &'a Chaos<'a>) -> Result<Place<'a>> {
        let io = |e: std::io::Error| Error::io("prepare", chaos.dir, &e);
        fs::create_dir_all(chaos.dir.join("tmp")).map_err(io)?;
        fs::write(chaos.dir.join("text.txt"), text()).map_err(io)?;
        fs::write(chaos.dir.join("clock"), "0").map_err(io)?;
        let mut not_tried = BTreeMap::new();
        let disk = Disk::mount(&chaos.dir.join("disk"));
        for kind in Kind::ALL {
            if pick(0, chaos.ranks, |l| kind.suits(l)).is_none() {
                not_tried.insert(kind, format!("it takes more than {} ranks", chaos.ranks));
            } else if let Some(why) = disk.as_ref().err().filter(|_| kind.needs_disk()) {
                not_tried.insert(kind, format!("there is no disk to do it to: {why}"));
            }
        }
        Ok(Place {
            chaos,
            steps: STEPS_A_FAULT * (chaos.faults as u64 + 1),
            links: Links::open().map_err(io)?,
            disk: disk.ok(),
            not_tried,
        })
    }

    /// Starts a job of `layout` that trains `run`.
    fn start(&self, run: &str, layout: Layout, number: usize) -> Result<Session> {
        let mark = format!("{}-{run}-{number}", std::process::id());
        let mut session = Session::new(mark, layout, &self.log(run, number))?;
        if layout.nodes == 1 {
            let mut command = self.command(number);
            command.args(self.train(run, layout));
            if layout.ranks > 1 {
                command.args(["--nproc", &layout.ranks.to_string(), "--max-restarts", MAX_RESTARTS]);
            }
            session.start(0, command)?;
            return Ok(session);
        }
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|port| port.local_addr());
        session.endpoint = free.map_err(|e| Error::failure(format!("find a port: {e}")))?.to_string();
        for node in 0..layout.nodes {
            let command = self.agent(run, layout, number, node, &session.endpoint, node == 0);
            session.start(node, command)?;
        }
        Ok(session)
    }

    /// The command of agent `node` of several, which meet at `endpoint`.
    fn agent(
        &self,
        run: &str,
        layout: Layout,
        number: usize,
        node: usize,
        endpoint: &str,
        hosts: bool,
    ) -> Command {
        let mut command = self.command(number);
        command.arg("launch").arg("--secret").arg(self.chaos.dir.join("secret"));
        command.args(["--nnodes", &format!("1:{}", layout.nodes)]);
        command.args(["--nproc-per-node", &(layout.ranks / layout.nodes).to_string()]);
        command.args([
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            endpoint,
            "--rdzv-id",
            &format!("chaos-{number}"),
        ]);
        command.args(["--rdzv-conf", &format!("{RENDEZVOUS},is_host={}", u8::from(hosts))]);
        command.args(["--local-addr", &format!("127.0.0.{}", node + 1), "--max-restarts", MAX_RESTARTS]);
        command.arg(self.chaos.program).args(self.train(run, layout));
        command
    }

    fn command(&self, number: usize) -> Command {
        let mut command = Command::new(self.chaos.program);
        command.current_dir(self.chaos.dir).env("TMPDIR", self.chaos.dir.join("tmp"));
        command.env("PHALANX_PROXY", self.links.addr.to_string());
        command.env("PHALANX_CLOCK_DRILL", self.clock());
        if number > 0 {
            // Nobody watches: a damaged checkpoint is passed over.
            command.env("PHALANX_RESTARTED", "1");
        }
        command
    }

    fn train(&self, run: &str, layout: Layout) -> Vec<String> {
        let mut args = vec!["train".to_owned(), "--transport".to_owned(), layout.transport.to_owned()];
        let own = [
            format!("train.steps={}", self.steps),
            format!("run.dir={}", self.chaos.dir.join(run).display()),
            format!("checkpoint.dir={}", self.checkpoints(run).display()),
        ];
        let keys = MODEL.iter().chain(layout.keys).map(|key| (*key).to_owned()).chain(own);
        args.extend(keys.flat_map(|key| ["--set".to_owned(), key]));
        args
    }

    /// The file that says by how many seconds the clock of all ranks is wrong.
    fn clock(&self) -> PathBuf {
        self.chaos.dir.join("clock")
    }

    /// On a disk that can be taken away and filled.
    fn checkpoints(&self, run: &str) -> PathBuf {
        self.chaos.dir.join("disk").join(run)
    }

    /// Shared memory that has a name.
    fn leftovers() -> usize {
        let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        entries.filter(|e| e.file_name().to_str().is_some_and(|name| name.starts_with(SHARED_MEMORY))).count()
    }

    fn log(&self, run: &str, session: usize) -> PathBuf {
        self.chaos.dir.join(format!("{run}-{session:04}.log"))
    }

    fn failed(&self, what: &str, run: &str, session: usize) -> Error {
        let log = self.log(run, session);
        let said = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(4)..].join("; ");
        Error::failure(format!("{what} failed: {last}"))
            .hint(format!("{} has all that it said", log.display()))
    }
}

/// Words in an order without a period, so that there is something to learn and no end to it.
fn text() -> String {
    let words = ["mesh", "rank", "stage", "chunk", "bucket", "slot", "layout", "journal"];
    let word = |i: usize| words[(i * i / 7 + i / 3) % words.len()];
    (0..60_000).map(|i| word(i).to_owned() + [" ", ".\n"][usize::from(i % 11 == 0)]).collect()
}
