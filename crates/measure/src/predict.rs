//! Predicted against measured steps of one model under many layouts.

use machine::{Machine, StepEstimate, estimate};
use serde::{Deserialize, Serialize};
use spec::stats::{kendall_tau, median, quantile};
use spec::{Result, RunSpec};

use crate::workload;

/// A layout to try.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Ranks.
    pub ranks: usize,
    /// Threads of a rank; 0 for its share of the cores.
    pub threads: usize,
    /// Keys of the layout, without their section.
    pub keys: &'static str,
}

/// Layouts of one, two and four ranks along every axis.
#[rustfmt::skip]
pub const CASES: [Case; 16] = [
    Case { ranks: 1, threads: 1, keys: "micro_batch=8" },
    Case { ranks: 1, threads: 0, keys: "micro_batch=8" },
    Case { ranks: 1, threads: 0, keys: "micro_batch=1" },
    Case { ranks: 1, threads: 0, keys: "micro_batch=4 recompute=full" },
    Case { ranks: 2, threads: 0, keys: "dp=2 micro_batch=4" },
    Case { ranks: 2, threads: 0, keys: "dp=2 micro_batch=1" },
    Case { ranks: 2, threads: 0, keys: "dp=2 micro_batch=4 zero=1" },
    Case { ranks: 2, threads: 0, keys: "dp=2 micro_batch=2 zero=3" },
    Case { ranks: 2, threads: 0, keys: "tp=2 micro_batch=8" },
    Case { ranks: 2, threads: 0, keys: "pp=2 micro_batch=1" },
    Case { ranks: 2, threads: 0, keys: "pp=2 micro_batch=1 schedule=zero-bubble" },
    Case { ranks: 4, threads: 0, keys: "dp=4 micro_batch=2" },
    Case { ranks: 4, threads: 0, keys: "dp=4 micro_batch=1 zero=3" },
    Case { ranks: 4, threads: 0, keys: "dp=2 pp=2 micro_batch=1" },
    Case { ranks: 4, threads: 0, keys: "dp=2 tp=2 micro_batch=4" },
    Case { ranks: 4, threads: 0, keys: "pp=4 micro_batch=1" },
];

/// What the ranks of a case took, as `phalanx bench step --json` prints it.
#[derive(Clone, Debug, Deserialize)]
pub struct Steps {
    /// Seconds of each timed step.
    pub steps_s: Vec<f64>,
    /// Bytes of each rank.
    pub rank_bytes: Vec<u64>,
}

/// One layout, predicted and measured.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Ranks.
    pub ranks: usize,
    /// Threads of a rank.
    pub threads: usize,
    /// Keys of the layout.
    pub layout: String,
    /// Seconds of a step as predicted.
    pub predicted_s: f64,
    /// Low end of the interval.
    pub predicted_low_s: f64,
    /// High end.
    pub predicted_high_s: f64,
    /// Median of all timed steps.
    pub measured_s: f64,
    /// The fastest of them.
    pub best_s: f64,
    /// Predicted over measured, less one.
    pub error: f64,
    /// Predicted over fastest, less one.
    pub error_of_best: f64,
    /// Whether the median lies in the interval.
    pub inside_interval: bool,
    /// Bytes of each rank as predicted.
    pub predicted_bytes: Vec<usize>,
    /// Bytes of each rank as mapped.
    pub measured_bytes: Vec<u64>,
    /// Whether they are equal.
    pub memory_equal: bool,
}

/// Predicts each case, then has it measured in `rounds` turns by `measure`; `each` hears of every turn: the round, the
/// case, seconds predicted, and the median measured so far.
///
/// # Errors
/// If the tables lack a kind of op, or a case cannot be measured.
pub fn predict(
    table: &Machine,
    cases: &[(Case, RunSpec)],
    rounds: usize,
    measure: &dyn Fn(&Case) -> Result<Steps>,
    each: &dyn Fn(usize, &Case, f64, f64),
) -> Result<Vec<Prediction>> {
    let mut open: Vec<(Case, StepEstimate, Steps)> = cases
        .iter()
        .map(|(case, run)| {
            let share = (table.cores / case.ranks).max(1);
            let case = Case { threads: if case.threads > 0 { case.threads } else { share }, ..*case };
            let estimate = estimate(table, &workload(run, case.threads, "shm"), &run.layout)?;
            Ok((case, estimate, Steps { steps_s: Vec::new(), rank_bytes: Vec::new() }))
        })
        .collect::<Result<_>>()?;
    for round in 0..rounds {
        for (i, (_, estimate, all)) in open.iter_mut().enumerate() {
            let case = &cases[i].0;
            let found = measure(case)?;
            all.steps_s.extend(found.steps_s);
            all.rank_bytes = found.rank_bytes;
            each(round, case, estimate.step_s, median(all.steps_s.iter().copied()));
        }
    }
    Ok(open.into_iter().map(|(case, estimate, steps)| prediction(case, &estimate, steps)).collect())
}

fn prediction(case: Case, estimate: &StepEstimate, mut steps: Steps) -> Prediction {
    let (best_s, measured_s) = (quantile(&mut steps.steps_s, 0.0), quantile(&mut steps.steps_s, 0.5));
    let predicted_bytes: Vec<usize> = estimate.ranks.iter().map(|r| r.memory_bytes).collect();
    Prediction {
        ranks: case.ranks,
        threads: case.threads,
        layout: case.keys.to_owned(),
        predicted_s: estimate.step_s,
        predicted_low_s: estimate.low_s,
        predicted_high_s: estimate.high_s,
        measured_s,
        best_s,
        error: estimate.step_s / measured_s - 1.0,
        error_of_best: estimate.step_s / best_s - 1.0,
        inside_interval: (estimate.low_s..=estimate.high_s).contains(&measured_s),
        memory_equal: predicted_bytes.iter().map(|b| *b as u64).eq(steps.rank_bytes.iter().copied()),
        predicted_bytes,
        measured_bytes: steps.rank_bytes,
    }
}

/// How well the predictions order the layouts: Kendall's tau, the share of pairs in the right order less that of pairs in
/// the wrong one (Kendall 1938). `None` of fewer than two.
pub fn order(rows: &[Prediction]) -> Option<f64> {
    let pairs: Vec<(f64, f64)> = rows.iter().map(|r| (r.predicted_s, r.measured_s)).collect();
    kendall_tau(&pairs)
}
