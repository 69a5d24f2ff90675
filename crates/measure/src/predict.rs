//! Predicted against measured steps of one model under many layouts.

use machine::{Machine, StepEstimate, estimate};
use serde::{Deserialize, Serialize};
use spec::stats::{median, quantile};
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
    /// All timed steps, in seconds, fastest first.
    pub steps_s: Vec<f64>,
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
        steps_s: steps.steps_s,
    }
}

/// How well the predictions order the layouts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OrderScore {
    /// Kendall's tau over all pairs: the share in the right order less that in the wrong one (Kendall 1938).
    pub kendall_tau: f64,
    /// Pairs of layouts.
    pub pairs: usize,
    /// Those whose measured steps tell which is faster.
    pub told_apart: usize,
    /// Kendall's tau over these; `None` if there are none.
    pub kendall_tau_told_apart: Option<f64>,
}

/// Compares the order of layouts as predicted with the one measured; `None` of fewer than two.
///
/// Where two layouts take about as long, which one's median is lower is chance, and chance is no error of a prediction.
/// Pairs count as told apart where the steps of one rank below the other's by more than chance does in one of twenty
/// repetitions (the rank test of Mann and Whitney 1947, exact, two-sided).
pub fn order(rows: &[Prediction]) -> Option<OrderScore> {
    let mut all = Pairs::default();
    let mut told_apart = Pairs::default();
    for (i, a) in rows.iter().enumerate() {
        for b in &rows[..i] {
            let both = (a.predicted_s - b.predicted_s) * (a.measured_s - b.measured_s);
            all.add(both);
            if differ(&a.steps_s, &b.steps_s) {
                told_apart.add(both);
            }
        }
    }
    Some(OrderScore {
        kendall_tau: all.tau()?,
        pairs: all.count,
        told_apart: told_apart.count,
        kendall_tau_told_apart: told_apart.tau(),
    })
}

/// Pairs in the right order less those in the wrong one; ties count for neither.
#[derive(Default)]
struct Pairs {
    agree: f64,
    count: usize,
}

impl Pairs {
    fn add(&mut self, both: f64) {
        self.agree += if both == 0.0 { 0.0 } else { both.signum() };
        self.count += 1;
    }

    fn tau(&self) -> Option<f64> {
        (self.count > 0).then(|| self.agree / self.count as f64)
    }
}

/// What chance alone may do in a test of ranks.
const SIGNIFICANCE: f64 = 0.05;

/// Whether samples of two layouts cannot be draws of the same: how often one of `b` lies below one of `a` is further from
/// half of all pairs than in all but a twentieth of the ways to deal the ranks.
fn differ(a: &[f64], b: &[f64]) -> bool {
    let below = |x: &f64| {
        b.iter().filter(|y| *y < x).count() as f64 + b.iter().filter(|y| *y == x).count() as f64 / 2.0
    };
    let u: f64 = a.iter().map(below).sum();
    let pairs = (a.len() * b.len()) as f64;
    let tail = u.min(pairs - u);
    // Ways to choose which ranks are `a`'s, by the pairs in which `b` is below.
    let mut ways = vec![vec![0.0; a.len() * b.len() + 1]; a.len() + 1];
    ways[0][0] = 1.0;
    for rank in 0..a.len() + b.len() {
        for chosen in (0..a.len().min(rank + 1)).rev() {
            let below = rank - chosen;
            for u in (0..(a.len() * b.len() + 1).saturating_sub(below)).rev() {
                ways[chosen + 1][u + below] += ways[chosen][u];
            }
        }
    }
    let all = &ways[a.len()];
    let extreme: f64 = all.iter().enumerate().filter(|(u, _)| *u as f64 <= tail).map(|(_, w)| w).sum();
    2.0 * extreme / all.iter().sum::<f64>() <= SIGNIFICANCE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layouts with these steps, each predicted to take longer than the one before.
    fn ordered(steps: &[&[f64]]) -> Option<OrderScore> {
        let row = |(i, steps): (usize, &&[f64])| Prediction {
            ranks: 1,
            threads: 1,
            layout: String::new(),
            predicted_s: i as f64,
            predicted_low_s: 0.0,
            predicted_high_s: 0.0,
            measured_s: quantile(&mut steps.to_vec(), 0.5),
            best_s: 0.0,
            error: 0.0,
            error_of_best: 0.0,
            inside_interval: false,
            predicted_bytes: Vec::new(),
            measured_bytes: Vec::new(),
            memory_equal: true,
            steps_s: steps.to_vec(),
        };
        order(&steps.iter().enumerate().map(row).collect::<Vec<_>>())
    }

    #[test]
    fn order_is_counted_by_pairs() {
        let check = |measured: &[f64], expected: Option<f64>| {
            let steps: Vec<[f64; 1]> = measured.iter().map(|s| [*s]).collect();
            let found = ordered(&steps.iter().map(|s| &s[..]).collect::<Vec<_>>());
            assert_eq!(found.map(|o| o.kendall_tau), expected, "{measured:?}");
            // One step tells nothing apart.
            assert!(found.is_none_or(|o| o.told_apart == 0 && o.kendall_tau_told_apart.is_none()));
        };
        check(&[1.0, 2.0, 3.0, 4.0], Some(1.0));
        check(&[4.0, 3.0, 2.0, 1.0], Some(-1.0));
        // One of six pairs is turned round.
        check(&[1.0, 3.0, 2.0, 4.0], Some(4.0 / 6.0));
        check(&[1.0, 1.0, 2.0], Some(2.0 / 3.0));
        check(&[1.0], None);
    }

    /// Critical values of the tables: of four and four only those that do not overlap, of six and six 5 of 36 pairs.
    #[test]
    fn steps_tell_layouts_apart_where_chance_would_not() {
        let check = |a: &[f64], b: &[f64], expected: bool| {
            assert_eq!((differ(a, b), differ(b, a)), (expected, expected), "{a:?} {b:?}");
        };
        check(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0], false);
        check(&[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0], true);
        check(&[1.0, 2.0, 3.0, 5.0], &[4.0, 6.0, 7.0, 8.0], false);
        let six = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        check(&six, &[1.5, 7.0, 8.0, 9.0, 10.0, 11.0], true);
        check(&six, &[0.5, 7.0, 8.0, 9.0, 10.0, 11.0], false);
        check(&six, &six, false);
    }

    /// What noise turns round does not count, what the steps tell apart does.
    #[test]
    fn pairs_that_steps_do_not_tell_apart_are_left_out() {
        let (low, near) = ([1.0, 1.1, 1.2, 1.3], [1.05, 1.0, 1.1, 1.2]);
        let (high, higher) = ([2.0, 2.1, 2.2, 2.3], [3.0, 3.1, 3.2, 3.3]);
        let found = ordered(&[&low, &near, &higher, &high]).unwrap();
        assert_eq!((found.pairs, found.told_apart), (6, 5));
        assert_eq!((found.kendall_tau, found.kendall_tau_told_apart), (2.0 / 6.0, Some(3.0 / 5.0)));
    }
}
