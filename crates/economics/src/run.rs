//! A whole run: from tokens to days, interruptions and dollars.

mod cost;
mod ramp;
mod range;

use plan::answer::{Answer, Choice};
use serde::Serialize;
use spec::{Catalog, Cluster, Error, Result};

pub use cost::{Basis, Held, Paid};

use crate::energy::{Energy, GRID_USUAL, Site};
use crate::failures::{JobFailures, Rates};
use crate::goodput::{ExposedRun, Goodput, Recovery, Save, SaveTimes};
use crate::input::{self, Bounds};
use crate::storage::{StoragePlan, plan_storage, save_times};
use crate::{Bill, Cost, DAY_S, Date, Spread, own, price};

/// Share of useful time that evaluation takes: a choice, of a percent.
const EVALUATION: Spread = Spread { low: 0.002, value: 0.01, high: 0.02 };

/// What is asked of a run beside its plan.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Tokens to train on.
    pub tokens: f64,
    /// Smaller batches at the beginning, in order.
    pub ramp: Vec<Ramp>,
    /// What to do when a node is lost; restart if `None`.
    pub recovery: Option<Recovery>,
    /// How to save; the way with the best goodput if `None`.
    pub save: Option<Save>,
    /// Useful seconds between checkpoints; the best if `None`.
    pub interval_s: Option<f64>,
    /// Share of useful time for evaluation; a percent if `None`.
    pub evaluation: Option<f64>,
    /// Failure entry of the catalogue with its own interval, instead of the platform's.
    pub failure: Option<String>,
    /// What to pay by.
    pub price: price::Ask,
    /// Count ownership instead of rent.
    pub owned: bool,
    /// Ownership entry; typical if `None`.
    pub ownership: Option<String>,
    /// The day on which prices are read.
    pub today: Date,
}

/// A batch until so many tokens are seen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ramp {
    /// Tokens of a step.
    pub batch_tokens: f64,
    /// Tokens seen at its end, from the beginning of the run.
    pub until_tokens: f64,
}

impl Ask {
    /// A run on so many tokens, with everything else as usual.
    pub fn new(tokens: f64, today: Date) -> Self {
        Ask {
            tokens,
            ramp: Vec::new(),
            recovery: None,
            save: None,
            interval_s: None,
            evaluation: None,
            failure: None,
            price: price::Ask::default(),
            owned: false,
            ownership: None,
            today,
        }
    }
}

/// A run and its reasons.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Tokens trained on.
    pub tokens: f64,
    /// Steps, ramp included.
    pub steps: f64,
    /// Accelerators.
    pub accelerators: usize,
    /// Days without any interruption, ramp included.
    pub train_days: f64,
    /// Days in all.
    pub wall_days: f64,
    /// Their range.
    pub wall_days_range: Spread,
    /// Useful share of wall time.
    pub goodput: f64,
    /// Its range.
    pub goodput_range: Spread,
    /// Unplanned interruptions to expect.
    pub interruptions: f64,
    /// 95 % of counts, at either end of the rate.
    pub interruptions_range: Spread,
    /// Planned ones.
    pub planned_interruptions: f64,
    /// Accelerator-hours, spares not included.
    pub accelerator_hours: f64,
    /// Dollars; absent where nobody quotes the machine.
    pub cost_usd: Option<Cost>,
    /// Where they go; the parts add up to them.
    pub cost: Option<Bill>,
    /// What is paid by.
    pub basis: Option<Basis>,
    /// What interrupts the job.
    pub failures: JobFailures,
    /// The recovery taken, with every loss named.
    pub recovery: Goodput,
    /// All recoveries, the best first.
    pub recoveries: Vec<Goodput>,
    /// Energy, carbon and water, if it is known what the machines draw.
    pub energy: Option<Energy>,
    /// What storage must deliver, if anything is known of it.
    pub storage: Option<StoragePlan>,
    /// What was assumed.
    pub assumptions: Vec<String>,
    /// Accelerators paid for beside those of the job.
    pub held: Held,
    /// Why the ranges are as wide as they are, the largest cause first.
    pub range_of: Vec<String>,
    #[serde(skip)]
    job: Option<ExposedRun>,
}

impl Run {
    /// The job behind its goodput, for curves over the interval.
    pub fn job(&self) -> Option<&ExposedRun> {
        self.job.as_ref()
    }
}

/// The run of an answer's best layout.
///
/// # Errors
/// Numbers that make no sense, a ramp that the layout cannot run, unknown names, prices for something else.
pub fn run(catalog: &Catalog, answer: &Answer, ask: &Ask) -> Result<Run> {
    let best = answer.best.first().ok_or_else(|| Error::failure("the answer has no layout"))?;
    run_of(catalog, answer, best, ask)
}

/// [`run`] of one of the answer's layouts.
///
/// # Errors
/// As [`run`].
pub fn run_of(catalog: &Catalog, answer: &Answer, choice: &Choice, ask: &Ask) -> Result<Run> {
    input::number("tokens", ask.tokens, Bounds::Positive)?;
    if let Some(interval) = ask.interval_s {
        input::number("seconds between checkpoints", interval, Bounds::Positive)?;
        if interval < choice.step_s {
            let what = format!("{interval} s between checkpoints, a step takes {:.3} s", choice.step_s);
            return Err(
                Error::user(what).hint("checkpoints lie between steps; leave it out for the best interval")
            );
        }
    }
    let cluster = &answer.question.cluster;
    let nodes = cluster.accelerators.div_ceil(cluster.per_node.max(1));
    let mut assumptions = Vec::new();
    let trained = ramp::trained(&answer.problem, choice, ask, &mut assumptions)?;
    let paid = Paid::by(catalog, cluster, ask, &mut assumptions)?;
    let failures = expected(catalog, cluster, ask, paid.as_ref(), &mut assumptions)?;
    let (job, recovery) = alive(catalog, answer, choice, ask, failures.clone())?;
    let train_days = trained.seconds / DAY_S;
    // Step time and goodput err independently: their logarithms add up in squares.
    let step = Spread::new(choice.step_low_s, choice.step_s, choice.step_high_s).scaled(1.0 / choice.step_s);
    let slower = recovery.goodput.map(|g| 1.0 / g.max(f64::MIN_POSITIVE));
    let wall = independent(step, slower).scaled(train_days);
    let hours = wall.scaled(24.0 * cluster.accelerators as f64);
    let held = paid.as_ref().map(|p| p.held(cluster.accelerators, &failures, &mut assumptions));
    let cost = paid
        .as_ref()
        .zip(held)
        .map(|(p, held)| p.bill(cluster.accelerators, held, wall.scaled(24.0), &recovery));
    let ownership = ask.ownership.as_deref().unwrap_or(own::TYPICAL);
    let site = Site::of(catalog, cluster, ownership, grid(catalog, ask.price.region.as_deref()))?;
    let per_step = (answer.question.sequences * answer.question.sequence) as f64;
    let storage = answer.storage.as_ref().map(|estimate| {
        plan_storage(catalog, estimate, nodes, ask.tokens, 1.0 / choice.step_s, per_step, recovery.interval_s)
    });
    let mut run = Run {
        tokens: ask.tokens,
        steps: trained.steps,
        accelerators: cluster.accelerators,
        train_days,
        wall_days: wall.value,
        wall_days_range: wall,
        goodput: recovery.goodput.value,
        goodput_range: recovery.goodput,
        interruptions: failures.per_day.value * wall.value,
        interruptions_range: failures.count(wall.value),
        planned_interruptions: failures.planned_per_day.value * wall.value,
        accelerator_hours: hours.value,
        cost_usd: cost.as_ref().map(|c| c.total),
        cost,
        basis: paid.map(|p| p.basis),
        failures,
        recoveries: job.compare(),
        recovery,
        energy: site.map(|s| s.energy(hours)),
        storage: storage.transpose()?,
        assumptions,
        held: held.unwrap_or_default(),
        range_of: Vec::new(),
        job: Some(job),
    };
    run.range_of = range::reasons(&run, choice, &answer.grade);
    Ok(run)
}

/// What interrupts the job: the failures of its machine, and a spot market that takes nodes back.
fn expected(
    catalog: &Catalog,
    cluster: &Cluster,
    ask: &Ask,
    paid: Option<&Paid>,
    assumptions: &mut Vec<String>,
) -> Result<JobFailures> {
    let rates = match &ask.failure {
        Some(name) => Rates::named(catalog, name)?,
        None => Rates::of(catalog, cluster)?,
    };
    assumptions.push(format!("failures: {} ({})", rates.entry, rates.title));
    if ask.failure.is_none() && cluster.failure.is_none() {
        assumptions
            .push(format!("no failure rate of {} is published: the span of others stands in", cluster.name));
    }
    let mut failures = rates.of_job(cluster.accelerators);
    if let Some(taken_back) = paid.and_then(Paid::taken_back_per_node_h) {
        let nodes = cluster.accelerators.div_ceil(cluster.per_node.max(1)) as f64;
        failures.per_day = failures.per_day.plus(taken_back.scaled(24.0 * nodes));
        failures.between_h = failures.per_day.map(|x| 24.0 / x);
        assumptions.push("nodes that the spot market takes back count as interruptions".to_owned());
    }
    Ok(failures)
}

/// The job with the way of saving that is asked for or best, and its goodput.
fn alive(
    catalog: &Catalog,
    answer: &Answer,
    choice: &Choice,
    ask: &Ask,
    failures: JobFailures,
) -> Result<(ExposedRun, Goodput)> {
    let evaluation = match ask.evaluation {
        Some(share) => Spread::exact(input::number("evaluation", share, Bounds::Share)?),
        None => EVALUATION,
    };
    let job = ExposedRun {
        failures,
        step_s: choice.step_s,
        replicas: choice.layout.dp,
        save: SaveTimes { save: Save::Blocking, stall_s: Spread::exact(0.0), behind_s: Spread::exact(0.0) },
        read_s: answer.storage.as_ref().map_or(Spread::exact(0.0), |s| s.read.into()),
        interval_s: ask.interval_s,
        evaluation,
    };
    let cluster = &answer.question.cluster;
    let nodes = cluster.accelerators.div_ceil(cluster.per_node.max(1));
    let ways = answer.storage.as_ref().map(|estimate| save_times(catalog, estimate, nodes));
    chosen(job, &ways.transpose()?.unwrap_or_default(), ask)
}

/// The grid of a region: its own where there is one, else the usual.
pub(crate) fn grid<'a>(catalog: &Catalog, region: Option<&'a str>) -> &'a str {
    region.filter(|r| catalog.get(spec::EntryKind::Grid, r).is_ok()).unwrap_or(GRID_USUAL)
}

/// The product of two factors that err independently: their logarithms' deviations add up in squares.
pub(crate) fn independent(a: Spread, b: Spread) -> Spread {
    let end = |x: f64, y: f64| (x.ln().powi(2) + y.ln().powi(2)).sqrt().exp();
    let value = a.value * b.value;
    let low = end(a.low / a.value, b.low / b.value);
    let high = end(a.high / a.value, b.high / b.value);
    Spread::new(value / low, value, value * high)
}

/// Of the ways of saving, the one that is asked for, or that leaves the most time useful.
fn chosen(job: ExposedRun, ways: &[SaveTimes], ask: &Ask) -> Result<(ExposedRun, Goodput)> {
    let recovery = ask.recovery.unwrap_or(Recovery::Restart);
    let fitting: Vec<&SaveTimes> = ways.iter().filter(|w| ask.save.is_none_or(|s| s == w.save)).collect();
    if let (Some(save), true) = (ask.save, fitting.is_empty()) {
        return Err(Error::user(format!("nothing is known of {} checkpoints on this machine", save.name()))
            .hint(format!(
                "known are {}",
                ways.iter().map(|w| w.save.name()).collect::<Vec<_>>().join(", ")
            )));
    }
    let mut jobs: Vec<ExposedRun> = fitting.iter().map(|w| ExposedRun { save: **w, ..job.clone() }).collect();
    if jobs.is_empty() {
        jobs.push(job);
    }
    let found = jobs.into_iter().filter_map(|job| Some((job.goodput(recovery)?, job)));
    let best = found.max_by(|a, b| a.0.goodput.value.total_cmp(&b.0.goodput.value));
    let (goodput, job) = best.ok_or_else(|| {
        Error::user("elastic recovery of a layout with one replica: nobody is left to go on")
            .hint("choose a layout with dp=2 or more, or --recovery restart")
    })?;
    Ok((job, goodput))
}
