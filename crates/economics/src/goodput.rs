//! How much of the wall time trains: checkpoints, failures, recovery, with every loss named.
//!
//! Symbols: `l` interruptions a second, `t` useful seconds between checkpoints, `d` seconds that a checkpoint stops
//! training, `w` seconds from there until it can be read back, `r` seconds from a failure until training goes on. A
//! segment takes `s = t + d`; it is tried until no failure hits it, `exp(l s) - 1` times in vain on average, each at
//! `1/l - s / (exp(l s) - 1) + w` of work (Daly 2006, section 3; `w` is what the last checkpoint lacked of being safe).
//! A recovery can be hit as well, so it takes `(exp(l r) - 1) / l`.

use serde::Serialize;

use crate::failures::JobFailures;
use crate::{DAY_S, Spread};

/// How state is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Save {
    /// Training waits until the filesystem has it.
    Blocking,
    /// It is copied to the hosts and written from there.
    Async,
    /// It is written to the nodes' own drives, and from there to the filesystem.
    NodeLocal,
}

impl Save {
    /// All of them.
    pub const ALL: [Save; 3] = [Save::Blocking, Save::Async, Save::NodeLocal];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Save::Blocking => "blocking",
            Save::Async => "async",
            Save::NodeLocal => "node-local",
        }
    }
}

/// What a job does when it loses a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recovery {
    /// All ranks restart from the last checkpoint on storage.
    Restart,
    /// All ranks restart from copies in their peers' memory (GEMINI, SOSP 2023; ByteRobust).
    InMemory,
    /// The other replicas go on; the lost one joins again (FT-HSDP, TorchFT).
    Elastic,
}

impl Recovery {
    /// All of them.
    pub const ALL: [Recovery; 3] = [Recovery::Restart, Recovery::InMemory, Recovery::Elastic];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Recovery::Restart => "restart",
            Recovery::InMemory => "in-memory",
            Recovery::Elastic => "elastic",
        }
    }
}

/// What one way of saving takes, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SaveTimes {
    /// Which way.
    pub save: Save,
    /// For this long training stands still.
    pub stall_s: Spread,
    /// From then until the checkpoint can be read back.
    pub behind_s: Spread,
}

/// A job as its goodput sees it.
#[derive(Clone, Debug)]
pub struct ExposedRun {
    /// What interrupts it.
    pub failures: JobFailures,
    /// Seconds of a step.
    pub step_s: f64,
    /// Replicas of the model: what elastic recovery loses one of.
    pub replicas: usize,
    /// How it saves.
    pub save: SaveTimes,
    /// Reading a checkpoint back from storage.
    pub read_s: Spread,
    /// Useful seconds between checkpoints; the best if `None`.
    pub interval_s: Option<f64>,
    /// Share of useful time that evaluation takes beside it.
    pub evaluation: Spread,
}

/// What a step's copy to a peer's memory stops training for: 0.01 to 0.04 s (ByteRobust, arXiv 2509.16293).
const MEMORY_STALL_S: Spread = Spread { low: 0.01, value: 0.02, high: 0.04 };
/// Share of interruptions that take both copies in memory with them, so that storage is read: a choice, of which
/// GEMINI's placement (SOSP 2023, section 4) promises less for single nodes, and software that corrupts state more.
const BOTH_COPIES_LOST: f64 = 0.05;
/// Seconds that the other replicas stand still when one is lost: 3 min at 100,000 GPUs (FT-HSDP, arXiv 2602.00277),
/// from a collective's agreement on who is left up to there.
const ELASTIC_PAUSE_S: Spread = Spread { low: 30.0, value: 90.0, high: 180.0 };
/// Nobody lets a run go without a checkpoint for longer.
const INTERVAL_MAX_S: f64 = DAY_S;

/// Shares of wall time under one recovery, which add up to 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goodput {
    /// What the job does when it loses a node.
    pub recovery: Recovery,
    /// How it saves.
    pub save: Save,
    /// Useful share of wall time.
    pub goodput: Spread,
    /// Where the rest goes, and the useful part first; they add up to 1 at the values.
    pub terms: Vec<Term>,
    /// Useful seconds between checkpoints on storage.
    pub interval_s: f64,
    /// What else they could be.
    pub intervals: Intervals,
}

/// A share of wall time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Term {
    /// What it goes to.
    pub name: &'static str,
    /// Share of wall time.
    pub share: f64,
}

/// Intervals between checkpoints, in useful seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Intervals {
    /// Young's first order: `sqrt(2 d / l)`.
    pub young_s: f64,
    /// Daly's higher order.
    pub daly_s: f64,
    /// Where the expected time is least, found directly.
    pub best_s: f64,
}

/// One point of goodput over the interval, for a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Useful seconds between checkpoints.
    pub interval_s: f64,
    /// Useful share of wall time.
    pub goodput: f64,
}

/// What goodput follows from, each at one value.
#[derive(Clone, Copy)]
struct At {
    per_s: f64,
    planned_per_s: f64,
    stall_s: f64,
    behind_s: f64,
    detect_s: f64,
    restart_s: f64,
    read_s: f64,
    memory_stall_s: f64,
    pause_s: f64,
    evaluation: f64,
}

impl At {
    /// In the order of [`ExposedRun::spreads`].
    fn of(values: [f64; 10]) -> Self {
        let [
            per_s,
            planned_per_s,
            stall_s,
            behind_s,
            detect_s,
            restart_s,
            read_s,
            memory_stall_s,
            pause_s,
            evaluation,
        ] = values;
        At {
            per_s,
            planned_per_s,
            stall_s,
            behind_s,
            detect_s,
            restart_s,
            read_s,
            memory_stall_s,
            pause_s,
            evaluation,
        }
    }
}

impl ExposedRun {
    fn spreads(&self) -> [Spread; 10] {
        [
            self.failures.per_day.scaled(1.0 / DAY_S),
            self.failures.planned_per_day.scaled(1.0 / DAY_S),
            self.save.stall_s,
            self.save.behind_s,
            self.failures.detect_s,
            self.failures.restart_s,
            self.read_s,
            MEMORY_STALL_S,
            ELASTIC_PAUSE_S,
            self.evaluation,
        ]
    }

    fn at_values(&self) -> At {
        At::of(self.spreads().map(|s| s.value))
    }

    /// Goodput with its range: each of what it follows from goes to its ends by itself, and the factors by which that
    /// changes the time lost for a useful second add up in squares of their logarithms. All bad ends at once would be a job
    /// that nobody has.
    fn range(&self, recovery: Recovery, interval_s: f64) -> Spread {
        let spreads = self.spreads();
        let values = spreads.map(|s| s.value);
        let useful = |values: [f64; 10]| {
            self.terms(recovery, &At::of(values), interval_s)[0].share.max(f64::MIN_POSITIVE)
        };
        let value = useful(values);
        let lost = |useful: f64| (1.0 - useful).max(f64::EPSILON) / useful;
        let (mut worse, mut better) = (0.0f64, 0.0f64);
        for (i, s) in spreads.iter().enumerate() {
            let factor = |x: f64| {
                let mut changed = values;
                changed[i] = x;
                (lost(useful(changed)) / lost(value)).ln()
            };
            // What goes wrong more loses more.
            worse += factor(s.high).max(0.0).powi(2);
            better += factor(s.low).min(0.0).powi(2);
        }
        let with = |factor: f64| 1.0 / (1.0 + lost(value) * factor);
        Spread::new(with(worse.sqrt().exp()), value, with((-better.sqrt()).exp()))
    }

    /// Its goodput under a recovery. `None` for elastic recovery of a single replica, which has nobody to go on.
    pub fn goodput(&self, recovery: Recovery) -> Option<Goodput> {
        if recovery == Recovery::Elastic && self.replicas < 2 {
            return None;
        }
        let value = self.at_values();
        let intervals = self.intervals(recovery, &value);
        let interval_s = self.interval_s.unwrap_or(intervals.best_s);
        let terms = self.terms(recovery, &value, interval_s);
        let goodput = self.range(recovery, interval_s);
        Some(Goodput { recovery, save: self.save.save, goodput, terms, interval_s, intervals })
    }

    /// All recoveries that the job can have, the best first.
    pub fn compare(&self) -> Vec<Goodput> {
        let mut all: Vec<Goodput> = Recovery::ALL.iter().filter_map(|r| self.goodput(*r)).collect();
        all.sort_by(|a, b| b.goodput.value.total_cmp(&a.goodput.value));
        all
    }

    /// Goodput over the interval between checkpoints, logarithmically spaced around the best.
    pub fn curve(&self, recovery: Recovery, points: usize) -> Vec<Point> {
        /// On either side of the best.
        const SPAN: f64 = 30.0;
        let value = self.at_values();
        let best_s = self.intervals(recovery, &value).best_s;
        let (from, to) = ((best_s / SPAN).max(self.shortest(&value)), (best_s * SPAN).min(INTERVAL_MAX_S));
        let at = |i: usize| from * (to / from).powf(i as f64 / (points.max(2) - 1) as f64);
        let point =
            |interval_s| Point { interval_s, goodput: self.terms(recovery, &value, interval_s)[0].share };
        (0..points).map(at).map(point).collect()
    }

    /// A checkpoint is taken between steps, and not before the last one is safe.
    fn shortest(&self, at: &At) -> f64 {
        self.step_s.max(at.behind_s - at.stall_s).clamp(f64::MIN_POSITIVE, INTERVAL_MAX_S)
    }

    fn intervals(&self, recovery: Recovery, at: &At) -> Intervals {
        let per_s = self.storage_rate(recovery, at);
        let mean_s = 1.0 / per_s.max(f64::MIN_POSITIVE);
        let shortest = self.shortest(at);
        let cost = |t: f64| -self.terms(recovery, at, t)[0].share;
        Intervals {
            young_s: young(at.stall_s, mean_s).min(INTERVAL_MAX_S),
            daly_s: daly(at.stall_s, mean_s).min(INTERVAL_MAX_S),
            best_s: least(cost, shortest, INTERVAL_MAX_S),
        }
    }

    /// Interruptions a second after which storage is read.
    fn storage_rate(&self, recovery: Recovery, at: &At) -> f64 {
        match recovery {
            Recovery::Restart => at.per_s,
            Recovery::InMemory | Recovery::Elastic => at.per_s * BOTH_COPIES_LOST,
        }
    }

    /// Shares of wall time, the useful one first.
    fn terms(&self, recovery: Recovery, at: &At, interval_s: f64) -> Vec<Term> {
        // All in seconds for each useful second.
        let restart_s = at.restart_s + at.read_s;
        let stored = Lost::of(self.storage_rate(recovery, at), interval_s, at.stall_s, at.behind_s);
        let all = at.per_s;
        let mut parts =
            vec![("useful", 1.0), ("checkpoints", at.stall_s / interval_s), ("lost work", stored.work)];
        let held = recovered(all, at.detect_s + restart_s);
        let down = |s: f64, per_useful: f64| per_useful * s * held;
        match recovery {
            Recovery::Restart => {
                parts.push(("detection", down(at.detect_s, stored.failures)));
                parts.push(("restart", down(restart_s, stored.failures)));
            }
            Recovery::InMemory => {
                let near = Lost::of(all * (1.0 - BOTH_COPIES_LOST), self.step_s, at.memory_stall_s, 0.0);
                let failures = near.failures + stored.failures;
                parts[2].1 += near.work;
                parts.push(("copies in memory", at.memory_stall_s / self.step_s));
                parts.push(("detection", down(at.detect_s, failures)));
                parts.push(("restart", down(at.restart_s, failures) + down(at.read_s, stored.failures)));
            }
            Recovery::Elastic => {
                let near = all * (1.0 - BOTH_COPIES_LOST);
                // The lost replica's share of a step, and of the time until it is back.
                let missing_s = self.step_s + at.detect_s + at.restart_s;
                parts.push(("detection", down(at.detect_s, stored.failures)));
                parts.push(("restart", down(restart_s, stored.failures)));
                parts.push(("pause", near * at.pause_s * recovered(all, at.pause_s)));
                parts.push(("missing replica", near * missing_s / self.replicas as f64));
            }
        }
        parts.push(("planned stops", at.planned_per_s * (at.stall_s + at.behind_s + restart_s)));
        parts.push(("evaluation", at.evaluation));
        let wall: f64 = parts.iter().map(|p| p.1).sum();
        // Where failures come faster than recovery the wall is infinite: nothing is useful, all is lost.
        if !wall.is_finite() {
            return parts
                .iter()
                .map(|(name, _)| Term { name, share: if *name == "lost work" { 1.0 } else { 0.0 } })
                .collect();
        }
        parts.into_iter().map(|(name, s)| Term { name, share: s / wall }).collect()
    }
}

/// What failures of one kind take for each useful second.
struct Lost {
    /// Failures.
    failures: f64,
    /// Seconds of work done again.
    work: f64,
}

impl Lost {
    /// At `per_s` failures, `interval_s` between checkpoints that stop training for `stall_s` and are safe `behind_s` later.
    fn of(per_s: f64, interval_s: f64, stall_s: f64, behind_s: f64) -> Self {
        let segment_s = interval_s + stall_s;
        let x = per_s * segment_s;
        let failures = x.exp_m1();
        // failures * (1/l - s / (exp(l s) - 1)) = (exp(l s) - 1 - l s) / l, without the cancellation for small x.
        let again = if x < 1e-4 { segment_s * x / 2.0 } else { (failures - x) / per_s };
        Lost { failures: failures / interval_s, work: (again + failures * behind_s) / interval_s }
    }
}

/// By what a recovery of `r_s` grows that failures at `per_s` may hit: `(exp(l r) - 1) / (l r)`.
fn recovered(per_s: f64, r_s: f64) -> f64 {
    let x = per_s * r_s;
    if x < 1e-9 { 1.0 } else { x.exp_m1() / x }
}

/// Young's interval (CACM 1974): `sqrt(2 d m)` for checkpoints of `stall_s` and `mean_s` between failures.
pub fn young(stall_s: f64, mean_s: f64) -> f64 {
    (2.0 * stall_s * mean_s).sqrt()
}

/// Daly's higher order interval (FGCS 2006, equation 37), without the checkpoint itself.
///
/// ```
/// use economics::goodput::{daly, young};
/// // A minute of writing and a day between failures: every 54 minutes, or a little less.
/// assert_eq!((young(60.0, 86_400.0) / 60.0).round(), 54.0);
/// assert_eq!((daly(60.0, 86_400.0) / 60.0).round(), 53.0);
/// ```
pub fn daly(stall_s: f64, mean_s: f64) -> f64 {
    if stall_s >= 2.0 * mean_s {
        return mean_s;
    }
    let x = stall_s / (2.0 * mean_s);
    young(stall_s, mean_s) * (1.0 + x.sqrt() / 3.0 + x / 9.0) - stall_s
}

/// Where `f` is least between `from` and `to`, on a log scale to a thousandth; `f` falls and then rises
/// (golden-section search).
fn least(f: impl Fn(f64) -> f64, from: f64, to: f64) -> f64 {
    const GOLDEN: f64 = 0.618_033_988_749_894_9;
    const WITHIN: f64 = 1e-3;
    let (mut a, mut b) = (from.ln(), to.ln());
    let at = |x: f64| f(x.exp());
    let (mut x, mut y) = (b - GOLDEN * (b - a), a + GOLDEN * (b - a));
    let (mut fx, mut fy) = (at(x), at(y));
    while b - a > WITHIN {
        // Of equals the later one goes: where nothing changes, few checkpoints do.
        if fx < fy {
            (b, y, fy) = (y, x, fx);
            x = b - GOLDEN * (b - a);
            fx = at(x);
        } else {
            (a, x, fx) = (x, y, fy);
            y = a + GOLDEN * (b - a);
            fy = at(y);
        }
    }
    ((a + b) / 2.0).exp()
}
