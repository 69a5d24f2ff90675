//! How often a job is interrupted, by what, and how long until it runs again.
//!
//! Rates are of the catalogue's `failure` entries: events in a day of a node of eight accelerators. Machines differ more
//! than samples do, so a prediction for a machine takes the span of all published ones; what one entry itself is known
//! to is its own interval ([`poisson`], [`overdispersed`]).

use serde::Serialize;
use spec::{Catalog, Cluster, EntryKind, Error, Result};

use crate::{DAY_S, Spread};

/// Accelerators of the node that rates are given for.
pub(crate) const ACCELERATORS_PER_NODE: f64 = 8.0;
/// The entry that stands for machines of which nothing is known, and says what the others leave out.
pub const USUAL: &str = "usual";
/// What each accelerator adds to a restart, in seconds: 200, 300, 600 and 900 s on 16, 22, 64 and 98 thousand GPUs
/// (FT-HSDP, arXiv 2602.00277, read off a figure) are 100 s and this much each, within 30 s.
const RESTART_S_PER_ACCELERATOR: f64 = 0.0082;
/// Up to here a job's rate is seen to follow its nodes.
const LINEAR_ACCELERATORS: f64 = 32_000.0;
/// Power of the size by which the rate a node rises beyond: 18 min between failures of 100,000 GPUs are 2.8 times more
/// often than 2.3 in 1,000 node-days (FT-HSDP). It is the high end; the value takes half of it.
const SUPERLINEAR_POWER: f64 = 0.9;
/// 95 % of a normal distribution lie within so many standard deviations.
const Z95: f64 = 1.96;

/// What is known of a machine's failures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// The catalogue's failure entry.
    pub entry: String,
    /// What it is about.
    pub title: String,
    /// Interruptions of a job in a day of a node of eight accelerators.
    pub per_node_day: Spread,
    /// Planned ones, which a checkpoint precedes.
    pub planned_per_node_day: Spread,
    /// By component or cause, in the same unit; empty where nobody counted.
    pub causes: Vec<Cause>,
    /// From the fault until the job knows.
    pub detect_s: Spread,
    /// From then until it could compute, for a small job and without its checkpoint.
    pub restart_s: Spread,
    /// Until a broken node is back.
    pub repair_days: Spread,
}

/// One cause.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cause {
    /// Component, as in the catalogue.
    pub name: String,
    /// Its events; see the owner for the unit.
    pub rate: Spread,
}

/// What a job of some size has to expect.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobFailures {
    /// The catalogue's failure entry.
    pub entry: String,
    /// Accelerators of the job.
    pub accelerators: usize,
    /// Unplanned interruptions in a day.
    pub per_day: Spread,
    /// Planned interruptions in a day.
    pub planned_per_day: Spread,
    /// Hours between unplanned ones, on average.
    pub between_h: Spread,
    /// Unplanned ones in a day, by cause.
    pub causes: Vec<Cause>,
    /// Seconds from a fault until it is known.
    pub detect_s: Spread,
    /// Seconds from then until the job could compute, without its checkpoint.
    pub restart_s: Spread,
    /// Days until a broken node is back.
    pub repair_days: Spread,
    /// Nodes of eight that stand by.
    pub spares: Spares,
}

/// Nodes to hold so that a job runs at full size nearly always.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spares {
    /// Broken ones on average: rate times repair (Little's law).
    pub broken: Spread,
    /// To hold, for 95 % of the time, at the values.
    pub nodes: usize,
    /// Of the job's nodes.
    pub share: f64,
}

impl Rates {
    /// Of a machine: its own entry where it has one, with the span of all published machines as the range.
    ///
    /// # Errors
    /// If the catalogue lacks an entry, which a check of it rules out.
    pub fn of(catalog: &Catalog, cluster: &Cluster) -> Result<Self> {
        let usual = Self::named(catalog, USUAL)?;
        let Some(name) = &cluster.failure else { return Ok(usual) };
        let mut own = Self::named(catalog, name)?;
        let span =
            |own: Spread, all: Spread| Spread::new(own.low.min(all.low), own.value, own.high.max(all.high));
        own.per_node_day = span(own.per_node_day, usual.per_node_day);
        own.planned_per_node_day = span(own.planned_per_node_day, usual.planned_per_node_day);
        Ok(own)
    }

    /// One entry with its own interval; what it leaves out is as usual.
    ///
    /// # Errors
    /// An unknown name.
    pub fn named(catalog: &Catalog, name: &str) -> Result<Self> {
        let entry = catalog.get(EntryKind::Failure, name)?;
        let usual = catalog.get(EntryKind::Failure, USUAL)?;
        let of = |key: &str| -> Result<Spread> {
            let found = entry.measure(key).or_else(|| usual.measure(key));
            found.map(Spread::from).ok_or_else(|| {
                Error::user(format!("failure.{USUAL}.{key} is missing from the catalogue")).hint("add it")
            })
        };
        let causes = entry.fields.keys().filter_map(|key| {
            let rate = Spread::from(entry.measure(key)?).scaled(DAY_S);
            Some(Cause { name: key.strip_prefix("cause.")?.to_owned(), rate })
        });
        let mut causes: Vec<Cause> = causes.collect();
        causes.sort_by(|a, b| b.rate.value.total_cmp(&a.rate.value));
        Ok(Rates {
            entry: entry.name.clone(),
            title: entry.text("title").unwrap_or_default().to_owned(),
            per_node_day: of("rate")?.scaled(DAY_S),
            planned_per_node_day: of("planned")?.scaled(DAY_S),
            causes,
            detect_s: of("detect")?,
            restart_s: of("restart")?,
            repair_days: of("repair")?.scaled(1.0 / DAY_S),
        })
    }

    /// What a job of so many accelerators has to expect.
    ///
    /// Llama 3's 419 interruptions in 54 days on 16,384 H100, one every 3.1 hours:
    ///
    /// ```
    /// use economics::failures::Rates;
    /// let job = Rates::named(&spec::Catalog::builtin()?, "llama3-405b")?.of_job(16_384);
    /// assert!((54.0 * job.per_day.value / 419.0 - 1.0).abs() < 0.01);
    /// assert!((job.between_h.value - 3.09).abs() < 0.03);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn of_job(&self, accelerators: usize) -> JobFailures {
        let n = accelerators.max(1) as f64;
        let nodes = n / ACCELERATORS_PER_NODE;
        let beyond = (n / LINEAR_ACCELERATORS).max(1.0);
        let more = Spread::new(1.0, beyond.powf(SUPERLINEAR_POWER / 2.0), beyond.powf(SUPERLINEAR_POWER));
        let per_day = self.per_node_day.scaled(nodes).times(more);
        let added = Spread::exact(RESTART_S_PER_ACCELERATOR * n);
        JobFailures {
            entry: self.entry.clone(),
            accelerators,
            per_day,
            planned_per_day: self.planned_per_node_day.scaled(nodes),
            between_h: per_day.map(|x| 24.0 / x.max(f64::MIN_POSITIVE)),
            causes: self
                .causes
                .iter()
                .map(|c| Cause { name: c.name.clone(), rate: c.rate.scaled(nodes).times(more) })
                .collect(),
            detect_s: self.detect_s,
            restart_s: self.restart_s.plus(added),
            repair_days: self.repair_days,
            spares: spares(nodes, per_day, self.repair_days),
        }
    }
}

impl JobFailures {
    /// Interruptions in so many days: the range holds 95 % of counts at either end of the rate.
    pub fn count(&self, days: f64) -> Spread {
        let mean = self.per_day.scaled(days);
        Spread::new(poisson(mean.low).low, mean.value, poisson(mean.high).high)
    }
}

/// Spares for `nodes` that break `per_day` in all and are back after `repair_days`.
///
/// ```
/// use economics::{Spread, failures::spares};
/// // 2,048 nodes, 7.76 failures a day, a tenth of a day to swap away: two spares do nearly always.
/// let s = spares(2048.0, Spread::exact(7.76), Spread::exact(0.1));
/// assert_eq!(s.nodes, 2);
/// ```
pub fn spares(nodes: f64, per_day: Spread, repair_days: Spread) -> Spares {
    /// Share of the time at full size.
    const COVERED: f64 = 0.95;
    /// Means beyond which the sum below would be long; there a Poisson count is normal.
    const NORMAL_FROM: f64 = 500.0;
    /// Standard deviations that 95 % of a normal distribution lie below.
    const Z95_ONE_SIDED: f64 = 1.645;
    let broken = per_day.times(repair_days);
    let mean = broken.value;
    let count = if mean > NORMAL_FROM {
        (mean + Z95_ONE_SIDED * mean.sqrt()).ceil() as usize
    } else {
        let (mut term, mut sum, mut k) = ((-mean).exp(), (-mean).exp(), 0);
        while sum < COVERED && k < 2 * NORMAL_FROM as usize {
            k += 1;
            term *= mean / k as f64;
            sum += term;
        }
        k
    };
    Spares { broken, nodes: count, share: count as f64 / nodes.max(f64::MIN_POSITIVE) }
}

/// The 95 % interval of a Poisson count's mean (Byar's approximation: within 1 % from 3 events on).
///
/// ```
/// use economics::failures::poisson;
/// let s = poisson(419.0);
/// assert_eq!((s.low.round(), s.high.round()), (380.0, 461.0));
/// assert_eq!(poisson(0.0).low, 0.0);
/// ```
pub fn poisson(events: f64) -> Spread {
    let edge = |n: f64, z: f64| n * (1.0 - 1.0 / (9.0 * n) + z / (3.0 * n.sqrt())).powi(3);
    let low = if events > 0.0 { edge(events, -Z95).max(0.0) } else { 0.0 };
    Spread::new(low.min(events), events, edge(events + 1.0, Z95))
}

/// The 95 % interval of a count whose parts scatter `dispersion` times as wide as Poisson's (variance over mean): what
/// bursts do. On a log scale, so that it stays above 0.
///
/// ```
/// use economics::failures::overdispersed;
/// // 313 faults of 400 servers in 174 days; counts of 30 days scatter 32-fold.
/// let rate = overdispersed(313.0, 32.3).scaled(1000.0 / (400.0 * 174.19));
/// assert!((rate.value - 4.49).abs() < 0.01 && (rate.low - 2.4).abs() < 0.05 && (rate.high - 8.4).abs() < 0.05);
/// ```
pub fn overdispersed(events: f64, dispersion: f64) -> Spread {
    let factor = (Z95 * (dispersion.max(1.0) / events.max(1.0)).sqrt()).exp();
    Spread::new(events / factor, events, events * factor)
}

/// Variance over mean of counts: 1 for independent events, more where they come in bursts.
pub fn dispersion(counts: &[usize]) -> f64 {
    let n = counts.len() as f64;
    let mean = counts.iter().sum::<usize>() as f64 / n;
    let variance = counts.iter().map(|c| (*c as f64 - mean).powi(2)).sum::<f64>() / (n - 1.0);
    variance / mean
}
