//! How often the planner is right about what fits, by runs that ran or ended out of memory.

use plan::estimate::Estimator;
use rayon::prelude::*;
use serde::Serialize;
use spec::stats::median;

use crate::runs::{Outcome, Skipped};

/// Calls on a table of outcomes.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// On all rows.
    #[serde(flatten)]
    pub all: Calls,
    /// On the half of the rows on which constants were fitted.
    pub fitted: Calls,
    /// On the half that was kept back ([`crate::runs::Run::kept_back`]).
    pub kept_back: Calls,
    /// Every row.
    pub calls: Vec<Call>,
    /// Rows that were not estimated, and why.
    pub not_called: Vec<Skipped>,
}

/// How right some calls are; shares are fractions, and 0 of no rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Calls {
    /// Rows estimated.
    pub rows: usize,
    /// Share of them that fit as predicted, or did not.
    pub right: f64,
    /// Share of runs out of memory that were said to fit.
    pub missed: f64,
    /// Share of runs that ran and were said not to fit.
    pub false_alarms: f64,
    /// Median of predicted over reserved bytes, of runs that ran and say what they reserved.
    pub median_ratio: f64,
}

/// One call.
#[derive(Clone, Debug, Serialize)]
pub struct Call {
    /// The row's name.
    pub id: String,
    /// Whether it was kept back from the fit.
    pub kept_back: bool,
    /// Whether it ran.
    pub ran: bool,
    /// Whether it was predicted to fit.
    pub fits: bool,
    /// Predicted bytes of the fullest rank.
    pub predicted_bytes: f64,
    /// Bytes that its framework reserved on the first rank: the fullest in nearly all pipelines, for it has the most
    /// micro-batches in flight.
    pub reserved_bytes: Option<f64>,
}

/// Estimates the memory of each run; `None` of none.
pub fn calls(outcomes: &[Outcome]) -> Option<Memory> {
    if outcomes.is_empty() {
        return None;
    }
    let (mut calls, mut not_called) = (Vec::new(), Vec::new());
    for called in outcomes.par_iter().map(call).collect::<Vec<_>>() {
        match called {
            Ok(call) => calls.push(call),
            Err(skipped) => not_called.push(skipped),
        }
    }
    let of = |keep: &dyn Fn(&Call) -> bool| sum(calls.iter().filter(|c| keep(c)));
    Some(Memory {
        all: of(&|_| true),
        fitted: of(&|c| !c.kept_back),
        kept_back: of(&|c| c.kept_back),
        calls,
        not_called,
    })
}

fn call(outcome: &Outcome) -> Result<Call, Skipped> {
    let run = &outcome.run;
    // Bytes depend on no constant of time.
    let problem = run.problem();
    let placement = &run.placements[0];
    let estimate = Estimator::new(&problem, placement.format).and_then(|mut e| e.estimate(placement));
    let estimate =
        estimate.map_err(|e| Skipped { id: run.id.clone(), line: run.line, reason: e.to_string() })?;
    Ok(Call {
        id: run.id.clone(),
        kept_back: run.kept_back(),
        ran: outcome.ran,
        fits: estimate.fits,
        predicted_bytes: estimate.memory.total(),
        reserved_bytes: outcome.reserved_bytes,
    })
}

fn sum<'a>(calls: impl Iterator<Item = &'a Call>) -> Calls {
    let calls: Vec<&Call> = calls.collect();
    let share = |among: &dyn Fn(&Call) -> bool, hit: &dyn Fn(&Call) -> bool| {
        let among: Vec<&&Call> = calls.iter().filter(|c| among(c)).collect();
        among.iter().filter(|c| hit(c)).count() as f64 / among.len().max(1) as f64
    };
    let ratios = calls.iter().filter_map(|c| c.reserved_bytes.map(|r| c.predicted_bytes / r));
    Calls {
        rows: calls.len(),
        right: share(&|_| true, &|c| c.fits == c.ran),
        missed: share(&|c| !c.ran, &|c| c.fits),
        false_alarms: share(&|c| c.ran, &|c| !c.fits),
        median_ratio: median(ratios),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_what_they_say() {
        let call = |ran: bool, fits: bool, reserved_bytes: Option<f64>| Call {
            id: String::new(),
            kept_back: false,
            ran,
            fits,
            predicted_bytes: 3.0,
            reserved_bytes,
        };
        let calls = [
            call(true, true, Some(2.0)),
            call(true, false, Some(4.0)),
            call(true, true, Some(3.0)),
            call(true, true, None),
            call(false, false, None),
            call(false, true, None),
        ];
        let expected =
            Calls { rows: 6, right: 4.0 / 6.0, missed: 0.5, false_alarms: 0.25, median_ratio: 1.0 };
        assert_eq!(sum(calls.iter()), expected);
        assert_eq!(sum([].into_iter()), Calls::default());
    }
}
