//! What a plan is best for: time, dollars, or tokens for a dollar.
//!
//! On a given number of accelerators the fastest layout is the cheapest. So a search for dollars asks on how many: the
//! fastest layout of each size is searched for, all sizes at once, and the size chosen is searched in full.

use std::collections::BTreeSet;

use plan::answer::{Answer, LayoutOut, Question, fastest_each};
use plan::calibration::Calibration;
use plan::placement::Placement;
use serde::Serialize;
use spec::{Catalog, Cluster, Error, Result};

use crate::input::{self, Bounds};
use crate::run::{self, Run};
use crate::{Cost, Spread};

/// What is sought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The shortest time.
    #[default]
    Time,
    /// The least dollars for all tokens.
    Dollars,
    /// The most tokens for a dollar.
    TokensPerDollar,
}

impl Objective {
    /// All of them.
    pub const ALL: [Objective; 3] = [Objective::Time, Objective::Dollars, Objective::TokensPerDollar];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Time => "time",
            Objective::Dollars => "dollars",
            Objective::TokensPerDollar => "tokens-per-dollar",
        }
    }
}

/// A number of accelerators with its best layout.
#[derive(Clone, Debug, Serialize)]
pub struct Size {
    /// Accelerators.
    pub accelerators: usize,
    /// Its fastest layout.
    pub layout: LayoutOut,
    /// Seconds of a step.
    pub step_s: f64,
    /// Days in all.
    pub wall_days: f64,
    /// Useful share of them.
    pub goodput: Spread,
    /// Dollars in all, if the machine has a price.
    pub cost_usd: Option<Cost>,
    /// Tokens for a dollar.
    pub tokens_per_usd: Option<f64>,
}

/// The size chosen, its plan and its run.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// What was sought.
    pub objective: Objective,
    /// All sizes tried that keep the deadline, the best first.
    pub sizes: Vec<Size>,
    /// The plan on the best size.
    pub answer: Answer,
    /// Its run.
    pub run: Run,
    /// Whether a deadline was kept.
    pub within: bool,
}

/// Sizes tried, the largest.
const SIZES_MAX: usize = 16;

/// Chooses the size of `answer`'s plan, on at most its accelerators, that is best for `objective` within so many days.
/// `resize` gives the same machine with fewer accelerators.
///
/// # Errors
/// What [`run::run`] refuses, a machine without a price, and a deadline that no size keeps.
pub fn choose(
    catalog: &Catalog,
    calibration: &Calibration,
    answer: Answer,
    resize: &dyn Fn(usize) -> Result<Cluster>,
    ask: &run::Ask,
    objective: Objective,
    within_days: Option<f64>,
) -> Result<Chosen> {
    if let Some(days) = within_days {
        input::number("--within", days, Bounds::Positive)?;
    }
    let question = answer.question.clone();
    let alone = answer.given || objective == Objective::Time;
    let sizes = if alone { Vec::new() } else { smaller(&question.cluster) };
    let questions: Result<Vec<Question>> = sizes
        .into_iter()
        .map(|n| Ok(Question { cluster: resize(n)?, keep: 1, ..question.clone() }))
        .collect();
    let whole = run::run(catalog, &answer, ask)?;
    let good: Vec<Placement> = answer.best.iter().map(|c| c.placement().clone()).collect();
    let mut tried: Vec<(Size, Answer, Run)> = vec![(size(&answer, &whole)?, answer, whole)];
    for plan in fastest_each(questions?, calibration, &good)?.into_iter().flatten() {
        // What cannot be run at a size, as a ramp that its replicas do not divide, is no size to choose.
        if let Ok(run) = run::run(catalog, &plan, ask) {
            tried.push((size(&plan, &run)?, plan, run));
        }
    }
    if objective != Objective::Time && tried.iter().any(|t| t.0.cost_usd.is_none()) {
        return Err(Error::user(format!("--for {}: no price is known of this machine", objective.name()))
            .hint("give one: --price 2.5, or --price 98.32/node"));
    }
    let fastest = tried.iter().map(|t| t.0.wall_days).fold(f64::INFINITY, f64::min);
    tried.retain(|t| within_days.is_none_or(|days| t.0.wall_days <= days));
    let worth = |s: &Size| match objective {
        Objective::Time => s.wall_days,
        Objective::Dollars => s.cost_usd.map_or(f64::INFINITY, |c| c.value.to_dollars()),
        Objective::TokensPerDollar => -s.tokens_per_usd.unwrap_or(0.0),
    };
    tried.sort_by(|a, b| worth(&a.0).total_cmp(&worth(&b.0)).then(a.0.wall_days.total_cmp(&b.0.wall_days)));
    let sizes: Vec<Size> = tried.iter().map(|t| t.0.clone()).collect();
    let Some((_, answer, run)) = tried.into_iter().next() else {
        return Err(Error::user(format!("no size is done within {} days", within_days.unwrap_or(0.0)))
            .hint(format!("the fastest takes {fastest:.1} days")));
    };
    if answer.question.cluster.accelerators == question.cluster.accelerators {
        return Ok(Chosen { objective, sizes, answer, run, within: within_days.is_some() });
    }
    // Its other layouts and its front, as for a size that was asked for.
    let chosen = Question { cluster: answer.question.cluster.clone(), ..question };
    let good: Vec<Placement> = answer.best.iter().map(|c| c.placement().clone()).collect();
    let answer = plan::answer::plan_from(chosen, calibration, &good, &|_, _| ())?;
    let run = run::run(catalog, &answer, ask)?;
    Ok(Chosen { objective, sizes, answer, run, within: within_days.is_some() })
}

fn size(answer: &Answer, run: &Run) -> Result<Size> {
    let best = answer.best.first().ok_or_else(|| Error::failure("the answer has no layout"))?;
    Ok(Size {
        accelerators: run.accelerators,
        layout: best.layout.clone(),
        step_s: best.step_s,
        wall_days: run.wall_days,
        goodput: run.goodput_range,
        cost_usd: run.cost_usd,
        tokens_per_usd: run.cost_usd.map(|c| run.tokens / c.value.to_dollars().max(f64::MIN_POSITIVE)),
    })
}

/// Sizes below a cluster's own, the largest first: shares of its nodes, powers of two of nodes, and of one node what
/// divides it.
fn smaller(cluster: &Cluster) -> Vec<usize> {
    let (all, node) = (cluster.accelerators, cluster.per_node.max(1));
    let nodes = all / node;
    let shares = (2..=nodes).filter(|d| all.is_multiple_of(d * node)).map(|d| all / d);
    let powers = std::iter::successors(Some(node), |n| Some(2 * n)).take_while(|n| *n < all);
    let parts = (1..node).filter(|n| node.is_multiple_of(*n));
    let sizes: BTreeSet<usize> = shares.chain(powers).chain(parts).filter(|n| *n < all).collect();
    sizes.into_iter().rev().take(SIZES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_nodes_down_to_parts_of_one() {
        let catalog = Catalog::builtin().unwrap();
        let check = |n: usize, expected: &[usize]| {
            assert_eq!(smaller(&catalog.cluster("dgx-superpod-h100", Some(n)).unwrap()), expected, "{n}");
        };
        check(64, &[32, 16, 8, 4, 2, 1]);
        check(96, &[64, 48, 32, 24, 16, 8, 4, 2, 1]);
        check(1, &[]);
    }
}
