//! A step done again, from the newest checkpoint before it, on this machine, and held to what the journals say of it: a
//! broken model breaks again, bit for bit; a broken machine does not.

mod history;
mod again;

use std::path::{Path, PathBuf};

use journal::Action;
use serde::Serialize;
use spec::{Error, Layout, Reduce, Result, RunSpec};

use crate::run_dir::RunDir;
use again::Redone;
use history::History;

/// What came of doing a step again.
#[derive(Clone, Debug, Serialize)]
pub struct Replay {
    /// Which step.
    pub step: u64,
    /// The checkpoint that it was done from; the beginning of the run if absent.
    pub from: Option<PathBuf>,
    /// Steps done again, the step itself included; those that were left out are none.
    pub redone: u64,
    /// What the journals say of it.
    pub recorded: Recorded,
    /// What it was on this machine, layout by layout.
    pub tries: Vec<Try>,
    /// What follows.
    pub verdict: Verdict,
    /// What that does not say.
    pub notes: Vec<String>,
}

/// What a step was, by journals.
#[derive(Clone, Debug, Serialize)]
pub struct Recorded {
    /// Mean loss.
    #[serde(serialize_with = "bits")]
    pub loss: f64,
    /// Gradient norm.
    #[serde(serialize_with = "bits")]
    pub grad_norm: f64,
    /// Hash of weights and moments after it, if they were looked at.
    pub hash: Option<String>,
    /// What was done about it, if it was bad.
    pub action: Option<Action>,
    /// Its layout's ranks.
    pub world: usize,
}

/// What it was when it was done again.
#[derive(Clone, Debug, Serialize)]
pub struct Try {
    /// How it was spread.
    pub layout: String,
    /// Mean loss.
    #[serde(serialize_with = "bits")]
    pub loss: f64,
    /// Gradient norm.
    #[serde(serialize_with = "bits")]
    pub grad_norm: f64,
    /// Hash of weights and moments after it; absent if it was bad and updated nothing.
    pub hash: Option<String>,
    /// The first step that was other than recorded, if one was.
    pub differs_at: Option<u64>,
    /// In what.
    pub differs_in: Vec<String>,
}

/// Who is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The same bits in every layout: the model or its data, not the machine.
    ModelOrData,
    /// Other bits, and the same in every layout: the machine that did it first.
    Machine,
    /// Other bits than recorded in one layout, and others again in another: this machine, or the layouts.
    Unclear,
}

impl Verdict {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::ModelOrData => "the same bits: model or data",
            Verdict::Machine => "other bits: the machine",
            Verdict::Unclear => "other bits in each layout: this machine is no witness",
        }
    }
}

fn bits<S: serde::Serializer>(x: &f64, to: S) -> std::result::Result<S::Ok, S::Error> {
    // JSON has no NaN.
    if x.is_finite() { to.serialize_f64(*x) } else { to.serialize_str(&x.to_string()) }
}

impl Replay {
    /// Does step `step` of the run in `dir` again: in the run's own layout and on one rank alone, or in `layouts`, each
    /// written like `dp=2,zero=1`. `progress` hears of each step that is done, and of the last.
    ///
    /// # Errors
    /// If there is no such run or step, its data is gone, or a layout does not fit.
    pub fn of(
        dir: &Path,
        step: u64,
        layouts: &[String],
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Replay> {
        let run_dir = RunDir::new(dir);
        let mut run = run_dir.load()?;
        run.run.dir = dir.to_owned();
        let history = History::read(dir, step, run.batch)?;
        let recorded = history.recorded(dir)?;
        let from = history.checkpoint(&run_dir)?;
        let mut tries = Vec::new();
        let mut redone = 0;
        for run in spread(&run, &history, layouts)? {
            let again = Redone::new(&run, &run_dir, &history, from.as_deref(), threads, progress)?;
            redone = again.steps;
            tries.push(again.held_to(&history));
        }
        let first = &tries[0];
        let like_first = |t: &Try| {
            let of = |t: &Try| (t.loss.to_bits(), t.grad_norm.to_bits(), t.hash.clone(), t.differs_at);
            of(t) == of(first)
        };
        let verdict = match (tries.iter().all(|t| t.differs_at.is_none()), tries.iter().all(like_first)) {
            (true, _) => Verdict::ModelOrData,
            (false, true) => Verdict::Machine,
            (false, false) => Verdict::Unclear,
        };
        let notes = history.notes(from.is_some(), &recorded, &tries);
        Ok(Replay { step, from, redone, recorded, tries, verdict, notes })
    }
}

/// Whether sums come out in the same bits: those inside of products and around a ring depend on how a model is cut.
fn has_the_bits_of(a: &Layout, b: &Layout) -> bool {
    let ring = |l: &Layout| (l.reduce == Reduce::Ring).then_some((l.dp, l.micro_batch, l.zero, l.shard));
    let cut = |l: &Layout| (l.tp, l.cp, l.deals_heads(), l.sequence_parallel, ring(l));
    cut(a) == cut(b)
}

/// The layouts to try it in.
fn spread(run: &RunSpec, history: &History, layouts: &[String]) -> Result<Vec<RunSpec>> {
    let own = run.layout.world() == history.world();
    let mut alone = run.clone();
    alone.layout = Layout { reduce: run.layout.reduce, ..Layout::default() };
    if !layouts.is_empty() {
        let given = |text: &String| {
            let keys: Vec<String> = text.split(',').map(|key| format!("layout.{}", key.trim())).collect();
            let given = RunSpec::load(Some(("run.toml", &alone.to_toml())), &keys, &crate::run_dir::read);
            let given = given.map_err(|e| e.context(format!("--layout {text}")))?;
            // Where run.toml has another layout than the step, the one given may be the step's.
            let may_be_its = !own && given.layout.world() == history.world();
            if may_be_its || has_the_bits_of(&given.layout, &run.layout) {
                return Ok(given);
            }
            Err(Error::user(format!(
                "--layout {text} has other bits than the run's layout, whatever the machine"
            ))
            .hint("tp, cp, context and reduce are to be the run's, and dp too where reduce is a ring"))
        };
        return layouts.iter().map(given).collect();
    }
    // Sums inside of products, and those around a ring, depend on how a model is cut.
    let keeps_bits = run.layout.tp == 1 && run.layout.cp == 1 && run.layout.reduce == Reduce::Tree;
    if !own && !keeps_bits {
        let (world, ranks) = (run.layout.world(), history.world());
        return Err(Error::user(format!(
            "the step was done on {ranks} ranks, and run.toml has a layout of {world}, whose bits are others"
        ))
        .hint("give the layout that it was done in, for example --layout tp=2"));
    }
    let is_alone = run.layout.world() == 1;
    let mut all = Vec::new();
    all.extend(own.then(|| run.clone()));
    all.extend((keeps_bits && !(own && is_alone)).then_some(alone));
    Ok(all)
}
