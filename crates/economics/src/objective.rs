//! What a plan is best for: time, dollars, or tokens for a dollar.
//!
//! On a given number of accelerators the fastest layout is the cheapest. So a search for dollars asks on how many: every
//! layout that the search for time found among its best or on its front is estimated with fewer replicas, which takes no
//! second search.

use std::collections::BTreeMap;

use plan::answer::{Answer, LayoutOut, estimate_each};
use plan::calibration::Calibration;
use plan::estimate::Templates;
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
}

/// Layouts taken from the best and the front: what comes later is far slower.
const LAYOUTS_MAX: usize = 64;
/// Sizes tried, the largest.
const SIZES_MAX: usize = 32;

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
    let mut tried: Vec<(Size, Answer, Run)> = Vec::new();
    let mut templates = Templates::new();
    let by_size =
        if answer.given || objective == Objective::Time { BTreeMap::new() } else { smaller(&answer) };
    for (n, placements) in by_size.into_iter().rev() {
        let question = plan::answer::Question { cluster: resize(n)?, ..answer.question.clone() };
        let Ok((plan, reused)) =
            estimate_each(question, &placements, calibration, std::mem::take(&mut templates))
        else {
            continue;
        };
        templates = reused;
        let run = run::run(catalog, &plan, ask)?;
        tried.push((size(&plan, &run)?, plan, run));
    }
    let whole = run::run(catalog, &answer, ask)?;
    tried.push((size(&answer, &whole)?, answer, whole));
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
    Ok(Chosen { objective, sizes, answer, run })
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

/// The layouts of an answer with fewer replicas, by accelerators.
fn smaller(answer: &Answer) -> BTreeMap<usize, Vec<Placement>> {
    let all = answer.question.cluster.accelerators;
    let mut by_size: BTreeMap<usize, Vec<Placement>> = BTreeMap::new();
    for choice in answer.best.iter().chain(&answer.pareto).take(LAYOUTS_MAX) {
        let placement = choice.placement();
        let dp = placement.layout.dp;
        for fewer in (1..dp).filter(|d| dp.is_multiple_of(*d)) {
            let mut placement = placement.clone();
            placement.layout.dp = fewer;
            let fits = |shard: &usize| *shard < fewer && fewer.is_multiple_of(*shard);
            placement.layout.shard = placement.layout.shard.filter(fits);
            let layouts = by_size.entry(all / dp * fewer).or_default();
            if !layouts.contains(&placement) {
                layouts.push(placement);
            }
        }
    }
    while by_size.len() > SIZES_MAX {
        by_size.pop_first();
    }
    by_size
}
