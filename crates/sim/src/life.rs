//! A run of days: steps, checkpoints, failures, restarts, one after another on the clock.

use serde::Serialize;
use spec::{Error, Result};

use crate::draw::Draw;

/// A run as its failures see it, in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// One step, undisturbed by failures.
    pub step_s: f64,
    /// How long the run is; without bound where steps bound it.
    pub wall_s: f64,
    /// How many steps have to be kept, if so many end it.
    pub steps: Option<u64>,
    /// Failures a second of the whole job.
    pub failures_per_s: f64,
    /// From a failure until the job could compute, without its checkpoint.
    pub restart_s: f64,
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

/// What became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Lived {
    /// Share of wall time in steps that were kept.
    pub goodput: f64,
    /// Steps that were kept.
    pub steps: u64,
    /// How often it failed.
    pub interruptions: u64,
    /// Share of wall time in steps that were lost.
    pub lost: f64,
    /// Share of wall time in restarts.
    pub restarts: f64,
    /// Share of wall time in which checkpoints stopped training.
    pub checkpoints: f64,
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
        let mut draw = Draw::new(seed, 0);
        let mut next_failure = |now: f64| match self.failures_per_s > 0.0 {
            true => now + draw.exponential() / self.failures_per_s,
            false => f64::INFINITY,
        };
        let mut now = 0.0;
        let mut failure = next_failure(0.0);
        let mut scripted = self.failing_steps.clone();
        scripted.sort_unstable_by(|a, b| b.cmp(a));
        let (mut done, mut safe, mut pending) = (0u64, 0u64, None::<(u64, f64)>);
        let (mut lost_s, mut restart_s, mut checkpoint_s) = (0.0, 0.0, 0.0);
        let mut lived = Lived::default();
        let mut events = 0u64;
        while now < self.wall_s && self.steps.is_none_or(|steps| done < steps) {
            events += 1;
            if events > EVENTS_MAX {
                return Err(Error::user(format!("more than {EVENTS_MAX} events in the run"))
                    .hint("give fewer --days, or a longer step"));
            }
            // Steps to the next checkpoint, unless something comes between.
            let until = (done / self.interval_steps + 1) * self.interval_steps;
            let until = self.steps.map_or(until, |steps| until.min(steps));
            let fails_at = scripted.last().copied().filter(|s| *s <= until && *s > done);
            let target = fails_at.unwrap_or(until);
            let ends = now + (target - done) as f64 * self.step_s;
            if let Some((step, at)) = pending
                && at <= failure.min(ends)
            {
                (safe, pending) = (step, None);
            }
            if ends.min(failure) >= self.wall_s {
                done += ((self.wall_s - now) / self.step_s) as u64;
                now = self.wall_s;
            } else if ends < failure && fails_at.is_none() {
                done = target;
                pending = Some((done, ends + self.safe_s));
                checkpoint_s += self.stall_s;
                now = ends + self.stall_s;
            } else {
                let at = ends.min(failure).max(now);
                lived.interruptions += 1;
                if fails_at.is_some() && ends < failure {
                    scripted.pop();
                } else {
                    failure = next_failure(at);
                }
                lost_s += (done - safe) as f64 * self.step_s + (at - now);
                (done, pending) = (safe, None);
                now = at;
                let recovery_s = self.restart_s + self.read_s;
                // A restart can fail as well, and begins again.
                while failure < now + recovery_s && now < self.wall_s {
                    lived.interruptions += 1;
                    restart_s += failure - now;
                    now = failure;
                    failure = next_failure(now);
                }
                let took = recovery_s.min((self.wall_s - now).max(0.0));
                restart_s += took;
                now += took;
            }
        }
        let wall_s = if self.steps.is_some() { now } else { self.wall_s };
        let share = |s: f64| s / wall_s;
        (lived.steps, lived.goodput) = (done, share(done as f64 * self.step_s));
        (lived.lost, lived.restarts, lived.checkpoints) =
            (share(lost_s), share(restart_s), share(checkpoint_s));
        Ok(lived)
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
            restart_s: 600.0,
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
            let all = l.goodput + l.lost + l.restarts + l.checkpoints;
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
        let recovery = ((l * (run.restart_s + run.read_s)).exp() - 1.0) / l;
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
}
