//! Disturb a small run at random, and hold what comes of it to the undisturbed one.
//!
//! A run is trained once alone and once under faults: ranks killed and stopped, the job taken away, storage gone,
//! checkpoints torn. It gets over the loss of a rank by itself; after what ends the job it is started again, as a batch
//! system does, each time under another layout of up to eight ranks, over shared memory or TCP. In the end its weights must be those of the undisturbed run, bit by bit, and
//! its journals must show that no sample was lost or seen twice.

mod faults;
mod session;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::process::Signal;
use serde::Serialize;
use spec::{Context, Error, Result};
use train::{Audit, RunDir};

pub use faults::{Fault, Kind, faults};
use faults::{Layout, by_kind, pick};
use session::{Ended, Session};

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
/// What a job says once ranks have met again.
const RECOVERED: &str = ": goes on after step ";
/// Steps that a run can be ahead of what was read of it, and the steps that a fault waits for.
const STEPS_A_FAULT: u64 = 50;
/// Steps without storage: two checkpoints fail.
const STEPS_WITHOUT_STORAGE: u64 = 10;

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
    /// Jobs that had to be killed because they neither went on nor ended.
    pub hangs: usize,
    /// Processes that outlived their job.
    pub orphans: usize,
    /// Steps of the run.
    pub steps: u64,
    /// Faults by kind.
    pub kinds: BTreeMap<Kind, usize>,
}

impl Report {
    /// Whether the run kept every promise.
    pub fn holds(&self) -> bool {
        self.bit_identical
            && self.tokens_equal
            && self.samples_lost + self.samples_repeated == 0
            && self.hangs + self.orphans == 0
            && self.recoveries == self.faults
    }
}

impl Chaos<'_> {
    /// Trains the run alone, then under its faults, and compares.
    ///
    /// # Errors
    /// If a run cannot be started, or one under faults cannot be gone on with: then with what it said last.
    pub fn run(&self) -> Result<Report> {
        let steps = STEPS_A_FAULT * (self.faults as u64 + 1);
        fs::create_dir_all(self.dir.join("tmp")).map_err(|e| Error::io("create", self.dir, &e))?;
        fs::write(self.dir.join("text.txt"), text()).map_err(|e| Error::io("write", self.dir, &e))?;
        (self.progress)("training undisturbed", 0, self.faults);
        let alone = self.start("alone", steps, pick(0, 1), 0)?.end()?;
        if !alone.status.is_some_and(|s| s.success()) {
            return Err(self.failed("the undisturbed run", "alone", 0));
        }
        let mut disturbed = Disturbed::new(self, steps)?;
        for fault in faults(self.seed, self.faults) {
            (self.progress)("disturbing", disturbed.report.faults, self.faults);
            if !disturbed.meet(fault)? {
                break;
            }
        }
        disturbed.finish()
    }

    fn start(&self, run: &str, steps: u64, layout: Layout, session: usize) -> Result<Session> {
        let mut command = Command::new(self.program);
        command.current_dir(self.dir).arg("train").env("TMPDIR", self.dir.join("tmp"));
        if session > 0 {
            // Nobody watches: a damaged checkpoint is passed over.
            command.env("PHALANX_RESTARTED", "1");
        }
        if layout.ranks > 1 {
            command.args(["--nproc", &layout.ranks.to_string(), "--transport", layout.transport]);
            command.args(["--max-restarts", MAX_RESTARTS]);
        }
        let (steps, dir) =
            (format!("train.steps={steps}"), format!("run.dir={}", self.dir.join(run).display()));
        for key in MODEL.iter().chain(layout.keys).copied().chain([steps.as_str(), &dir]) {
            command.args(["--set", key]);
        }
        let mark = format!("{}-{run}-{session}", std::process::id());
        Session::start(command, mark, layout.ranks, &self.log(run, session))
    }

    fn log(&self, run: &str, session: usize) -> PathBuf {
        self.dir.join(format!("{run}-{session:04}.log"))
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

/// The run under faults.
struct Disturbed<'a> {
    chaos: &'a Chaos<'a>,
    steps: u64,
    /// Gone between the end of one and the start of the next.
    session: Option<Session>,
    sessions: usize,
    met: Vec<Fault>,
    recoveries_s: Vec<f64>,
    survivals_s: Vec<f64>,
    report: Report,
}

const RUN: &str = "run";

impl<'a> Disturbed<'a> {
    fn new(chaos: &'a Chaos<'a>, steps: u64) -> Result<Self> {
        let session = chaos.start(RUN, steps, pick(chaos.seed, chaos.ranks), 0)?;
        let report = Report { steps, ..Report::default() };
        let (met, recoveries_s, survivals_s) = Default::default();
        let session = Some(session);
        Ok(Disturbed { chaos, steps, session, sessions: 1, met, recoveries_s, survivals_s, report })
    }

    /// Lets a fault happen and the run go on; false if the run was over before.
    fn meet(&mut self, fault: Fault) -> Result<bool> {
        if self.session()?.steps(fault.after_steps)?.is_none() {
            return Ok(false);
        }
        self.met.push(fault);
        self.report.faults += 1;
        let began = Instant::now();
        if fault.kind == Kind::NoStorage {
            self.without_storage()?;
            self.report.recoveries += 1;
            return Ok(true);
        }
        strike(self.session()?, fault);
        if fault.kind.is_survived(self.session()?.ranks) {
            return self.survive(fault, began);
        }
        // The next job may only be started when this one is gone, as a batch system does it.
        let ended = self.end_session()?;
        if fault.kind == Kind::Preempt && ended.status.and_then(|s| s.code()) != Some(130) {
            return Err(self.failed("a job that was asked to save and leave"));
        }
        self.damage(fault)?;
        self.start(pick(fault.layout, self.chaos.ranks))?;
        // The first line of a step after the fault.
        let said = self.session()?.steps(1)?;
        if said.is_none() && !self.is_done() {
            return Err(self.failed(&format!("going on after {:?}", fault.kind)));
        }
        self.report.recoveries += 1;
        self.recoveries_s.push(began.elapsed().as_secs_f64());
        Ok(true)
    }

    /// Waits until the ranks that are left, and the one in the place of the lost, have done a step; false if the run was
    /// over before anybody missed it.
    fn survive(&mut self, fault: Fault, began: Instant) -> Result<bool> {
        let met = self.session()?.until(|line| line.contains(RECOVERED))?;
        let stepped = met && self.session()?.steps(1)?.is_some();
        if !stepped && !self.is_done() {
            return Err(self.failed(&format!("going on without a restart after {:?}", fault.kind)));
        }
        self.report.recoveries += 1;
        if stepped {
            self.report.survived += 1;
            self.survivals_s.push(began.elapsed().as_secs_f64());
        }
        Ok(stepped)
    }

    /// The job under way.
    fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().ok_or_else(|| Error::failure("no job is under way"))
    }

    /// Starts the job once more.
    fn start(&mut self, layout: Layout) -> Result<()> {
        self.session = Some(self.chaos.start(RUN, self.steps, layout, self.sessions)?);
        self.sessions += 1;
        Ok(())
    }

    fn end_session(&mut self) -> Result<Ended> {
        let session = self.session.take().ok_or_else(|| Error::failure("no job is under way"))?;
        let ended = session.end()?;
        self.report.hangs += usize::from(ended.hung);
        self.report.orphans += ended.orphans;
        Ok(ended)
    }

    /// Moves the checkpoints away for some steps, with a file in their place that nobody can write into.
    fn without_storage(&mut self) -> Result<()> {
        let dir = self.checkpoints();
        let away = self.chaos.dir.join("checkpoints.away");
        let io = |e| Error::io("take away", &dir, &e);
        let had = dir.exists();
        if had {
            fs::rename(&dir, &away).map_err(io)?;
        }
        fs::write(&dir, "").map_err(io)?;
        let went_on = self.session()?.steps(STEPS_WITHOUT_STORAGE)?;
        fs::remove_file(&dir).map_err(io)?;
        if had {
            fs::rename(&away, &dir).map_err(io)?;
        }
        // By now a later checkpoint may have failed for good if the run ended meanwhile.
        match went_on {
            Some(_) => Ok(()),
            None => Err(self.failed("training on without storage")),
        }
    }

    /// Damages the newest checkpoint, if there is one before it.
    fn damage(&self, fault: Fault) -> Result<()> {
        if !matches!(fault.kind, Kind::TornCheckpoint | Kind::BitFlip) {
            return Ok(());
        }
        let saved = ckpt::list(&self.checkpoints())?;
        let [.., _, (_, newest)] = saved.as_slice() else { return Ok(()) };
        let mut files: Vec<PathBuf> = fs::read_dir(newest)
            .map_err(|e| Error::io("read", newest, &e))?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        let path = &files[(fault.victim % files.len().max(1) as u64) as usize];
        let mut bytes = fs::read(path).map_err(|e| Error::io("read", path, &e))?;
        let at = (fault.layout % bytes.len().max(1) as u64) as usize;
        match fault.kind {
            Kind::TornCheckpoint => bytes.truncate(at),
            _ => bytes[at] ^= 1 << (fault.victim % 8),
        }
        fs::write(path, bytes).map_err(|e| Error::io("damage", path, &e))
    }

    fn checkpoints(&self) -> PathBuf {
        RunDir::new(self.chaos.dir.join(RUN)).checkpoints()
    }

    /// Whether the newest checkpoint is of the last step.
    fn is_done(&self) -> bool {
        let saved = ckpt::list(&self.checkpoints());
        saved.is_ok_and(|s| s.last().is_some_and(|(step, _)| *step == self.steps))
    }

    /// Lets the run end undisturbed, and compares.
    fn finish(mut self) -> Result<Report> {
        (self.chaos.progress)("letting it end", self.report.faults, self.chaos.faults);
        if self.session()?.ranks > 1 {
            // What is left says nothing new, and one rank is done with it soonest.
            self.session()?.signal_agent(Signal::TERM);
            self.end_session()?;
            self.start(pick(0, 1))?;
        }
        let ended = self.end_session()?;
        if !ended.status.is_some_and(|s| s.success()) {
            return Err(self.failed("the run under faults, left alone at last,"));
        }
        let newest = |run: &str| RunDir::new(self.chaos.dir.join(run)).newest_checkpoint();
        let difference = ckpt::diff(&newest("alone")?, &newest(RUN)?).context("compare the two runs")?;
        let audit = Audit::of(&self.chaos.dir.join(RUN), &|_, _| {})?;
        let mut report = self.report;
        report.bit_identical = difference.bit_equal();
        // What is not on record is not known to be there.
        report.samples_lost = audit.ledger.samples_lost + audit.ledger.steps_missing;
        report.samples_repeated = audit.ledger.samples_repeated;
        report.steps_redone = audit.ledger.steps_redone;
        report.tokens_equal = audit.tokens == train::Tokens::Equal;
        report.kinds = by_kind(&self.met);
        report.median_restart_s = median(self.recoveries_s);
        report.median_recovery_s = median(self.survivals_s);
        Ok(report)
    }

    fn failed(&self, what: &str) -> Error {
        self.chaos.failed(what, RUN, self.sessions - 1)
    }
}

/// The middle one; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn strike(session: &mut Session, fault: Fault) {
    let victim = (fault.victim % session.ranks as u64) as usize;
    match fault.kind {
        Kind::KillRank => session.signal_rank(victim, Signal::KILL),
        // A stopped rank is noticed by those who wait for it; alone it has nobody.
        Kind::StopRank if session.ranks == 1 => session.kill_all(),
        Kind::StopRank => session.signal_rank(victim, Signal::STOP),
        Kind::KillAgent => session.signal_agent(Signal::KILL),
        Kind::Preempt => session.signal_agent(Signal::TERM),
        Kind::TornCheckpoint | Kind::BitFlip => session.kill_all(),
        Kind::NoStorage => {}
    }
}

/// Words in an order without a period, so that there is something to learn and no end to it.
fn text() -> String {
    let words = ["mesh", "rank", "stage", "chunk", "bucket", "slot", "layout", "journal"];
    let word = |i: usize| words[(i * i / 7 + i / 3) % words.len()];
    (0..60_000).map(|i| word(i).to_owned() + [" ", ".\n"][usize::from(i % 11 == 0)]).collect()
}
