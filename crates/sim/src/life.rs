//! A run of days: steps, checkpoints, failures, recoveries, repairs, one after another on the clock.

use serde::Serialize;
use spec::{Error, Result};

use crate::draw::Draw;

/// A run as its failures see it, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// One step of all nodes, undisturbed by failures.
    pub step_s: f64,
    /// How long the run is; without bound where steps bound it.
    pub wall_s: f64,
    /// How many steps have to be kept, if so many end it.
    pub steps: Option<u64>,
    /// Failures a second of the whole job.
    pub failures_per_s: f64,
    /// What follows a failure.
    pub recovery: Recovery,
    /// The nodes that it has; as many as it wants if absent.
    pub pool: Option<Pool>,
    /// Reading a checkpoint back.
    pub read_s: f64,
    /// For this long a checkpoint stops training.
    pub stall_s: f64,
    /// From its start until it can be read back.
    pub safe_s: f64,
    /// Steps between checkpoints.
    pub interval_steps: u64,
    /// Steps of the first life in which the job fails anyway, counted from 1.
    pub failing_steps: Vec<u64>,
}

/// What follows failures, by what was lost.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovery {
    /// After each kind of loss, with the share of failures that are of it.
    pub losses: Vec<(f64, Loss)>,
    /// Whether work is lost since the last checkpoint; else copies in memory lose the step under way.
    pub from_checkpoint: bool,
    /// Standing still when a node comes back to a job that went on without it.
    pub join_s: f64,
}

/// One kind of loss, seconds from the fault until the job computes again, without its checkpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// With all nodes.
    pub full_s: f64,
    /// With one less; the same as `full_s` where no node is lost.
    pub fewer_s: f64,
    /// Whether a node is lost with it, until it is repaired.
    pub takes_node: bool,
}

impl Recovery {
    /// Whatever is lost, everything is stopped and started over from a checkpoint.
    pub fn restart(restart_s: f64, takes_node: bool) -> Self {
        let loss = Loss { full_s: restart_s, fewer_s: restart_s, takes_node };
        Recovery { losses: vec![(1.0, loss)], from_checkpoint: true, join_s: 0.0 }
    }

    fn draw(&self, at: f64) -> Loss {
        let mut below = 0.0;
        for (share, loss) in &self.losses {
            below += share;
            if at <= below {
                return *loss;
            }
        }
        self.losses.last().map_or(Loss { full_s: 0.0, fewer_s: 0.0, takes_node: false }, |l| l.1)
    }
}

/// The nodes that a job has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pool {
    /// It runs on so many.
    pub nodes: u64,
    /// So many more stand by.
    pub spares: u64,
    /// With less it does not run.
    pub min_nodes: u64,
    /// From a node's loss until it is back.
    pub repair_s: f64,
}

/// What became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lived {
    /// Share of wall time in steps that were kept, at the pace of all nodes.
    pub goodput: f64,
    /// Steps that were kept.
    pub steps: u64,
    /// How often it failed.
    pub interruptions: u64,
    /// Share of wall time in steps that were lost.
    pub lost: f64,
    /// Share of wall time in recoveries.
    pub restarts: f64,
    /// Share of wall time in which checkpoints stopped training.
    pub checkpoints: f64,
    /// Share of wall time that kept steps took longer since nodes were missing.
    pub fewer: f64,
    /// Share of wall time waited for a node to be repaired.
    pub repairs: f64,
}

/// More events than a run that trains anything has.
const EVENTS_MAX: u64 = 50_000_000;

impl Run {
    /// Steps between checkpoints by Young's rule (1974): `sqrt(2 d / l)` seconds of work, `d` what one stops training
    /// for, `l` failures a second; without failures, one an hour.
    pub fn usual_interval(&self) -> u64 {
        const HOUR_S: f64 = 3600.0;
        let best_s = match self.failures_per_s > 0.0 {
            true => (2.0 * self.stall_s / self.failures_per_s).sqrt(),
            false => HOUR_S,
        };
        // Not before the last one is safe.
        (best_s.max(self.safe_s) / self.step_s).ceil().max(1.0) as u64
    }

    /// Lives the run once: failures come by their rate as `seed` draws them.
    ///
    /// # Errors
    /// If there is more to happen than any run has.
    pub fn live(&self, seed: u64) -> Result<Lived> {
        let mut life = Life::new(self, seed);
        let mut events = 0u64;
        while life.now < self.wall_s && self.steps.is_none_or(|steps| life.done < steps) {
            events += 1;
            if events > EVENTS_MAX {
                return Err(Error::user(format!("more than {EVENTS_MAX} events in the run"))
                    .hint("give fewer --days, or a longer step"));
            }
            life.go_on();
        }
        Ok(life.outcome())
    }
}

/// A run under way.
struct Life<'a> {
    run: &'a Run,
    draw: Draw,
    kinds: Draw,
    now: f64,
    /// When it fails next, by its rate.
    failure: f64,
    /// Steps in which it fails anyway, the last first.
    scripted: Vec<u64>,
    done: u64,
    /// Time in steps that are kept so far.
    kept_s: f64,
    /// Steps and time of the last checkpoint that can be read.
    safe: (u64, f64),
    /// A checkpoint that will be, and when.
    pending: Option<((u64, f64), f64)>,
    /// When broken nodes are back, the first of them first.
    broken: std::collections::VecDeque<f64>,
    /// Seconds.
    lost: f64,
    restarts: f64,
    checkpoints: f64,
    repairs: f64,
    interruptions: u64,
}

impl<'a> Life<'a> {
    fn new(run: &'a Run, seed: u64) -> Self {
        let mut scripted = run.failing_steps.clone();
        scripted.sort_unstable_by(|a, b| b.cmp(a));
        let mut life = Life {
            run,
            draw: Draw::new(seed, 0),
            kinds: Draw::new(seed, 1),
            now: 0.0,
            failure: 0.0,
            scripted,
            done: 0,
            kept_s: 0.0,
            safe: (0, 0.0),
            pending: None,
            broken: Default::default(),
            lost: 0.0,
            restarts: 0.0,
            checkpoints: 0.0,
            repairs: 0.0,
            interruptions: 0,
        };
        life.failure = life.next_failure();
        life
    }

    fn next_failure(&mut self) -> f64 {
        match self.run.failures_per_s > 0.0 {
            true => self.now + self.draw.exponential() / self.run.failures_per_s,
            false => f64::INFINITY,
        }
    }

    /// Nodes that are missing from the job.
    fn missing(&self) -> u64 {
        self.run.pool.map_or(0, |p| (self.broken.len() as u64).saturating_sub(p.spares))
    }

    /// A step of the nodes that are there: the batch stays what it is.
    fn step_s(&self) -> f64 {
        let Some(pool) = self.run.pool else { return self.run.step_s };
        self.run.step_s * pool.nodes as f64 / (pool.nodes - self.missing()).max(1) as f64
    }

    /// To the next checkpoint, unless something comes between.
    fn go_on(&mut self) {
        let run = self.run;
        let until = (self.done / run.interval_steps + 1) * run.interval_steps;
        let until = run.steps.map_or(until, |steps| until.min(steps));
        let fails_at = self.scripted.last().copied().filter(|s| *s <= until && *s > self.done);
        let target = fails_at.unwrap_or(until);
        let step_s = self.step_s();
        let ends = self.now + (target - self.done) as f64 * step_s;
        // Spares that are back change nothing for those who run.
        let returns = self.broken.front().copied().filter(|_| self.missing() > 0).unwrap_or(f64::INFINITY);
        let next = ends.min(self.failure).min(returns);
        if let Some((step, at)) = self.pending
            && at <= next
        {
            (self.safe, self.pending) = (step, None);
        }
        if next >= run.wall_s {
            let steps = ((run.wall_s - self.now) / step_s) as u64;
            self.done += steps;
            self.kept_s += steps as f64 * step_s;
            self.now = run.wall_s;
        } else if returns <= next {
            self.interrupt(returns, false);
            self.repaired();
            self.stand_still(run.recovery.join_s);
        } else if ends < self.failure && fails_at.is_none() {
            self.kept_s += ends - self.now;
            self.done = target;
            self.pending = Some(((self.done, self.kept_s), ends + run.safe_s));
            self.checkpoints += run.stall_s;
            self.now = ends + run.stall_s;
        } else {
            let at = ends.min(self.failure).max(self.now);
            self.interrupt(at, run.recovery.from_checkpoint);
            if fails_at.is_some() && ends < self.failure {
                self.scripted.pop();
            } else {
                self.failure = self.next_failure();
            }
            self.fail();
        }
    }

    /// The round ends at `at`: what was done since the last checkpoint is lost, or since the last step.
    fn interrupt(&mut self, at: f64, to_checkpoint: bool) {
        let since = at - self.now;
        if to_checkpoint {
            self.lost += self.kept_s - self.safe.1 + since;
            (self.done, self.kept_s) = self.safe;
            self.pending = None;
        } else {
            let step_s = self.step_s();
            let steps = (since / step_s) as u64;
            self.done += steps;
            self.kept_s += steps as f64 * step_s;
            self.lost += since - steps as f64 * step_s;
        }
        self.now = at;
    }

    /// Recovers from a failure; a recovery can fail as well, and begins again.
    fn fail(&mut self) {
        let run = self.run;
        loop {
            self.interruptions += 1;
            let kind = self.kinds.uniform();
            let loss = run.recovery.draw(kind);
            if let (true, Some(pool)) = (loss.takes_node, run.pool) {
                self.broken.push_back(self.now + pool.repair_s);
            }
            self.repaired();
            self.wait_for_nodes();
            let stop_s = if loss.takes_node && self.missing() > 0 { loss.fewer_s } else { loss.full_s };
            let read_s = if run.recovery.from_checkpoint { run.read_s } else { 0.0 };
            let recovered = self.now + stop_s + read_s;
            if self.failure >= recovered || self.now >= run.wall_s {
                self.stand_still(stop_s + read_s);
                return;
            }
            self.restarts += self.failure - self.now;
            self.now = self.failure;
            self.failure = self.next_failure();
        }
    }

    /// Nodes whose repair is over are there.
    fn repaired(&mut self) {
        while self.broken.front().is_some_and(|at| *at <= self.now) {
            self.broken.pop_front();
        }
    }

    /// With too few nodes the job waits for the next to come back.
    fn wait_for_nodes(&mut self) {
        let Some(pool) = self.run.pool else { return };
        while pool.nodes - self.missing().min(pool.nodes) < pool.min_nodes.min(pool.nodes) {
            let Some(back) = self.broken.pop_front() else { return };
            let back = back.clamp(self.now, self.run.wall_s.max(self.now));
            self.repairs += back - self.now;
            self.now = back;
            // Nothing runs that could fail.
            self.failure = self.failure.max(self.now);
        }
    }

    fn stand_still(&mut self, seconds: f64) {
        let took = seconds.min((self.run.wall_s - self.now).max(0.0));
        self.restarts += took;
        self.now += took;
    }

    fn outcome(self) -> Lived {
        let wall_s = if self.run.steps.is_some() { self.now } else { self.run.wall_s };
        let share = |s: f64| s / wall_s;
        let useful_s = self.done as f64 * self.run.step_s;
        Lived {
            goodput: share(useful_s),
            steps: self.done,
            interruptions: self.interruptions,
            lost: share(self.lost),
            restarts: share(self.restarts),
            checkpoints: share(self.checkpoints),
            fewer: share((self.kept_s - useful_s).max(0.0)),
            repairs: share(self.repairs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_S: f64 = 86_400.0;

    fn run() -> Run {
        Run {
            step_s: 5.0,
            wall_s: 10.0 * DAY_S,
            steps: None,
            failures_per_s: 8.0 / DAY_S,
            recovery: Recovery::restart(600.0, true),
            pool: None,
            read_s: 60.0,
            stall_s: 10.0,
            safe_s: 120.0,
            interval_steps: 100,
            failing_steps: Vec::new(),
        }
    }

    #[test]
    fn wall_time_goes_somewhere() {
        for seed in 0..20 {
            let l = run().live(seed).unwrap();
            let all = l.goodput + l.lost + l.restarts + l.checkpoints + l.fewer + l.repairs;
            // A run ends in the middle of something.
            assert!((all - 1.0).abs() < 1e-3, "{seed}: {all}");
            assert_eq!(l, run().live(seed).unwrap());
        }
    }

    /// Against the closed form: `exp(l s) - 1` tries in vain of a segment, a recovery that can fail (Daly 2006, section 3).
    #[test]
    fn goodput_is_that_of_the_closed_form() {
        let run = Run { wall_s: 2000.0 * DAY_S, ..run() };
        let lived = run.live(7).unwrap();
        let (l, useful) = (run.failures_per_s, run.interval_steps as f64 * run.step_s);
        let segment = useful + run.stall_s;
        let recovery = ((l * (600.0 + run.read_s)).exp() - 1.0) / l;
        let lost = 1.0 / l - segment / ((l * segment).exp() - 1.0) + (run.safe_s - run.stall_s);
        let per_segment = segment + ((l * segment).exp() - 1.0) * (lost + recovery);
        let expected = useful / per_segment;
        assert!((lived.goodput / expected - 1.0).abs() < 0.01, "{} for {expected}", lived.goodput);
    }

    #[test]
    fn failures_come_at_their_rate_and_where_they_are_written() {
        let counts: Vec<f64> = (0..50).map(|s| run().live(s).unwrap().interruptions as f64).collect();
        let mean = counts.iter().sum::<f64>() / 50.0;
        assert!((mean - 80.0).abs() < 4.0, "{mean}");
        let quiet = Run { failures_per_s: 0.0, failing_steps: vec![150, 250], ..run() };
        let lived = quiet.live(0).unwrap();
        assert_eq!(lived.interruptions, 2);
        assert!((lived.lost * quiet.wall_s - 2.0 * 50.0 * 5.0).abs() < 1e-6);
        let until_done = Run { steps: Some(300), wall_s: f64::INFINITY, ..quiet };
        let lived = until_done.live(0).unwrap();
        assert_eq!((lived.steps, lived.interruptions), (300, 2));
        assert!((lived.goodput - 1500.0 / (1500.0 + 500.0 + 2.0 * 660.0 + 30.0)).abs() < 1e-9, "{lived:?}");
    }

    fn elastic(pool: Pool) -> Run {
        let process = Loss { full_s: 1.0, fewer_s: 1.0, takes_node: false };
        let node = Loss { full_s: 20.0, fewer_s: 50.0, takes_node: true };
        let recovery =
            Recovery { losses: vec![(0.5, process), (0.5, node)], from_checkpoint: false, join_s: 1.0 };
        Run { recovery, pool: Some(pool), ..run() }
    }

    const POOL: Pool = Pool { nodes: 64, spares: 100, min_nodes: 32, repair_s: 2.0 * DAY_S };

    /// From memory, steps under way are lost and no more; with spares enough the pace is that of all nodes.
    #[test]
    fn copies_in_memory_lose_the_step_under_way() {
        for seed in 0..10 {
            let l = elastic(POOL).live(seed).unwrap();
            let all = l.goodput + l.lost + l.restarts + l.checkpoints + l.fewer + l.repairs;
            assert!((all - 1.0).abs() < 1e-3, "{seed}: {all}");
            assert_eq!((l.fewer, l.repairs), (0.0, 0.0));
            assert!(l.lost * 10.0 * DAY_S <= 5.0 * l.interruptions as f64, "{l:?}");
            assert!(l.goodput > run().live(seed).unwrap().goodput);
        }
    }

    /// Of nodes that break `r` a second and are back after `t`, `r t` are missing on average (Little's law).
    #[test]
    fn jobs_without_spares_go_on_with_fewer_nodes() {
        let pool = Pool { spares: 0, ..POOL };
        let run = Run { wall_s: 2000.0 * DAY_S, ..elastic(pool) };
        let l = run.live(3).unwrap();
        let missing = 0.5 * 8.0 * 2.0;
        let expected = missing / 64.0;
        assert!((l.fewer / (l.goodput + l.fewer) / expected - 1.0).abs() < 0.1, "{} for {expected}", l.fewer);
        let stiff = Run { pool: Some(Pool { min_nodes: 64, ..pool }), ..run.clone() };
        let waited = stiff.live(3).unwrap();
        assert_eq!(waited.fewer, 0.0);
        assert!(waited.repairs > 0.5 && waited.goodput < l.goodput, "{waited:?}");
        // More spares, less of either.
        let some = |spares| Run { pool: Some(Pool { spares, ..pool }), ..run.clone() }.live(3).unwrap();
        assert!(some(4).fewer < l.fewer && some(8).fewer < some(4).fewer && some(30).fewer == 0.0);
    }
}
