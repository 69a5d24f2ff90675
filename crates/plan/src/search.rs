//! The search over layouts: every axis, placement, schedule, ZeRO stage, recompute policy and micro-batch.
//!
//! Exhaustive. A layout is left out only if its lower bound (compute of its fullest stage, no communication, no bubble)
//! is above the worst of the best kept, and a layout already estimated is at least as fast with no more memory; then it
//! can be neither among the best nor on the front.

mod fastest;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde::Serialize;
use spec::{
    Error, ExpertRows, Layout, NumberFormat, PipelineSchedule, Recompute, Reduce, Result, Rule, Zero,
};

use crate::estimate::{Estimate, Estimator, Problem, Shared};
use crate::placement::{Order, Placement};
use crate::strategy::Strategy;

use fastest::Goal;
pub use fastest::fastest;

/// What to search over.
#[derive(Clone, Debug)]
pub struct Space {
    /// Accelerators to use, all of them.
    pub accelerators: usize,
    /// Format of the matrix products.
    pub format: NumberFormat,
    /// How many of the best to keep.
    pub keep: usize,
    /// Largest micro-batch.
    pub micro_batch_max: usize,
    /// Leave axes out that do not train yet (context and expert parallelism).
    pub trainable_only: bool,
    /// Only layouts of this strategy.
    pub strategy: Option<Strategy>,
}

/// A layout with its estimate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// The layout.
    pub placement: Placement,
    /// Its estimate.
    pub estimate: Estimate,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct Searched {
    /// The fastest that fit, best first.
    pub best: Vec<Found>,
    /// No layout is both faster and smaller than one of these; fastest first.
    pub pareto: Vec<Found>,
    /// Layouts estimated in full.
    pub layouts_priced: usize,
    /// Layouts left out by their bound.
    pub layouts_pruned: usize,
    /// Layouts that the model or the batch does not allow, or that do not fit, by reason.
    pub refused: BTreeMap<&'static str, usize>,
}

/// Axes that layouts share a template by: one job of the search.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Job {
    tp: usize,
    cp: usize,
    ep: usize,
    sequence_parallel: bool,
    micro_batch: usize,
    recompute: Recompute,
}

/// Chunks a stage are tried up to this many.
const CHUNKS_MAX: usize = 32;
/// Tensor parallelism beyond this leaves slivers of matrices.
const TP_MAX: usize = 64;

/// Searches the space. `progress` is told jobs done and in all; it may be called from several threads.
///
/// # Errors
/// If no layout is allowed, or none fits: then the message says what the smallest one lacks.
pub fn search(
    problem: &Problem,
    space: &Space,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Searched> {
    let all = explore(problem, space, progress)?;
    if all.best.is_empty() {
        return Err(nothing(problem, space, &all));
    }
    Ok(Searched {
        best: all.best,
        pareto: all.front,
        layouts_priced: all.priced,
        layouts_pruned: all.pruned,
        refused: all.refused,
    })
}

fn explore(problem: &Problem, space: &Space, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Part> {
    let jobs = jobs(problem, space);
    let done = AtomicUsize::new(0);
    let parts: Vec<Result<Part>> = jobs
        .par_iter()
        .map(|job| {
            let part = Estimator::new(problem, space.format)
                .and_then(|mut estimator| run(&mut estimator, (space, Goal::Front), *job));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, jobs.len());
            part
        })
        .collect();
    let mut all = Part::default();
    for part in parts {
        all.merge(part?, space.keep);
    }
    Ok(all)
}

fn nothing(problem: &Problem, space: &Space, all: &Part) -> Error {
    let name = &problem.shape.model.name;
    let kind = space.strategy.map(|s| format!("{s} ")).unwrap_or_default();
    let room = problem.cluster.accelerator.memory_bytes.value;
    match &all.smallest {
        Some(found) => {
            let what = format!(
                "no {kind}layout of {name} fits {} x {}: {}",
                space.accelerators,
                problem.cluster.accelerator.name,
                overfull(found, room)
            );
            let hint = match (what_would_fit(problem, space), space.strategy) {
                (hint, None) => hint,
                (hint, Some(_)) => format!("{hint}; without --layout all strategies are tried"),
            };
            Error::user(what).hint(hint)
        }
        None => {
            let reasons: Vec<String> = all.refused.iter().map(|(why, n)| format!("{why} ({n})")).collect();
            let reasons = if reasons.is_empty() { vec!["no axis divides both".to_owned()] } else { reasons };
            Error::user(format!(
                "no {kind}layout of {name} uses {} accelerators with {} sequences: {}",
                space.accelerators,
                problem.sequences,
                reasons.join(", ")
            ))
            .hint("--accelerators and --sequences with small factors have more layouts")
        }
    }
}

/// Which rank a layout overfills, and with what, largest first.
pub(crate) fn overfull(found: &Found, room: f64) -> String {
    let m = found.estimate.memory;
    let gb = |x: f64| x / 1e9;
    let mut parts = [
        ("parameters", m.params),
        ("gradients", m.grads),
        ("optimiser", m.optimizer),
        ("activations", m.activations),
        ("working set", m.working),
        ("framework", m.framework),
    ];
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let parts: Vec<String> = parts.iter().map(|(what, x)| format!("{what} {:.1}", gb(*x))).collect();
    // The first stage keeps the most micro-batches in flight.
    let rank = match found.placement.layout.pp {
        1 => "every rank".to_owned(),
        pp => format!("rank 0 (stage 0 of {pp})"),
    };
    format!(
        "the smallest, {}, takes {:.1} GB of {:.1} GB on {rank} ({})",
        found.placement,
        gb(m.total()),
        gb(room),
        parts.join(", ")
    )
}

/// No more accelerators than this, or sixteen times those asked, are tried before giving up.
const TRIED_MAX: usize = 1 << 18;

/// The smallest number of accelerators found on which some layout fits, by doubling and then halving the gap.
fn what_would_fit(problem: &Problem, space: &Space) -> String {
    let fits = |n: usize| -> Option<Found> {
        let mut problem = problem.clone();
        problem.cluster.accelerators = n;
        // A larger micro-batch never takes less.
        let space = Space { accelerators: n, keep: 1, micro_batch_max: 1, ..space.clone() };
        explore(&problem, &space, &|_, _| ()).ok()?.best.into_iter().next()
    };
    let n = space.accelerators;
    let has = problem.cluster.accelerators_max;
    let end = TRIED_MAX.max(16 * n).min(has);
    // Doubling stops at the machine's size, which is tried too.
    let doubled = std::iter::successors(Some(2 * n), |many| Some(2 * many)).take_while(|many| *many < end);
    let tries = doubled.chain((end > n).then_some(end));
    let Some((mut most, mut found)) = tries.into_iter().find_map(|many| Some((many, fits(many)?))) else {
        let all = if end == has { format!("all {end}") } else { end.to_string() };
        return format!(
            "not even {all} accelerators would do: a shorter --sequence takes less, and so does a smaller model"
        );
    };
    let per_node = problem.cluster.per_node.max(1);
    let mut least = n.max(most / 2);
    while most - least > per_node {
        let middle = least + ((most - least) / 2).next_multiple_of(per_node).min(most - least - 1);
        match fits(middle) {
            Some(fitting) => (most, found) = (middle, fitting),
            None => least = middle,
        }
    }
    format!("{most} accelerators would fit it ({})", found.placement)
}

fn divisors(n: usize) -> Vec<usize> {
    (1..=n)
        .take_while(|d| d * d <= n)
        .filter(|d| n.is_multiple_of(*d))
        .flat_map(|d| [d, n / d])
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
        .collect()
}

fn jobs(problem: &Problem, space: &Space) -> Vec<Job> {
    let m = &problem.shape.model;
    let n = space.accelerators;
    // Each as one replica of a stage, whatever the rest.
    let allowed = |tp: usize, cp: usize, sequence_parallel: bool| {
        let layout = Layout { tp, cp, sequence_parallel, ..Placement::foreign() };
        layout.check(m, 1, problem.sequence, problem.software.tolerance).is_ok()
    };
    let tps: Vec<usize> =
        divisors(n).into_iter().filter(|tp| *tp <= TP_MAX && allowed(*tp, 1, false)).collect();
    let contexts: Vec<usize> = if space.trainable_only || problem.sequence < 16_384 {
        vec![1]
    } else {
        [1, 2, 4, 8, 16, 32]
            .into_iter()
            .filter(|cp| n.is_multiple_of(*cp) && allowed(1, *cp, false))
            .collect()
    };
    let experts: Vec<usize> = match problem.shape.experts {
        Some(e) if !space.trainable_only => {
            divisors(e.count).into_iter().filter(|ep| n.is_multiple_of(*ep)).collect()
        }
        _ => vec![1],
    };
    let micro_batches: Vec<usize> =
        divisors(problem.sequences).into_iter().filter(|b| *b <= space.micro_batch_max).collect();
    let mut jobs = Vec::new();
    for &tp in &tps {
        for &cp in contexts.iter().filter(|cp| space.strategy.is_none_or(|s| s.allows_inside(tp, **cp))) {
            for &ep in &experts {
                for &micro_batch in &micro_batches {
                    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                        for sequence_parallel in [true, false].into_iter().filter(|m| allowed(tp, cp, *m)) {
                            jobs.push(Job { tp, cp, ep, sequence_parallel, micro_batch, recompute });
                        }
                    }
                }
            }
        }
    }
    jobs
}

/// What a job found.
#[derive(Default)]
struct Part {
    best: Vec<Found>,
    front: Vec<Found>,
    smallest: Option<Found>,
    priced: usize,
    pruned: usize,
    refused: BTreeMap<&'static str, usize>,
}

impl Part {
    fn refuse(&mut self, why: &'static str) {
        *self.refused.entry(why).or_default() += 1;
    }

    fn take(&mut self, found: Found, keep: usize) {
        if !found.estimate.fits {
            self.refuse("does not fit in memory");
            let total = |f: &Found| f.estimate.memory.total();
            if self.smallest.as_ref().is_none_or(|s| total(&found) < total(s)) {
                self.smallest = Some(found);
            }
            return;
        }
        self.offer(&found);
        let at = self.best.partition_point(|b| better(b, &found));
        if at < keep {
            self.best.insert(at, found);
            self.best.truncate(keep);
        }
    }

    fn offer(&mut self, found: &Found) {
        let (t, m) = (found.estimate.step_s, found.estimate.memory.total());
        // Sorted by time: only faster ones can dominate.
        let at = self.front.partition_point(|f| f.estimate.step_s < t);
        if self.dominated(at, t, m) {
            return;
        }
        self.front.insert(at, found.clone());
        let mut i = at + 1;
        while i < self.front.len() {
            if self.front[i].estimate.memory.total() >= m {
                self.front.remove(i);
            } else {
                i += 1;
            }
        }
    }

    /// Whether a layout that takes at least `least_s` can neither be among the `keep` best nor on the front.
    fn beaten(&self, keep: usize, least_s: f64, memory: f64) -> bool {
        let worst = self.best.get(keep.saturating_sub(1)).map_or(f64::INFINITY, |b| b.estimate.step_s);
        let at = || self.front.partition_point(|f| f.estimate.step_s < least_s);
        least_s > worst && self.dominated(at(), least_s, memory)
    }

    /// Whether a layout of the front is no slower than `t` and no larger than `m`. Memory falls along the front.
    fn dominated(&self, at: usize, t: f64, m: f64) -> bool {
        let here =
            self.front.get(at).is_some_and(|f| f.estimate.step_s <= t && f.estimate.memory.total() <= m);
        here || at > 0 && self.front[at - 1].estimate.memory.total() <= m
    }

    /// Takes a placement that shards over all of dp, and the same with smaller groups: these take more memory, and save
    /// at most what replicas say. `twins` are steps of other orders by group: where the order makes no difference the
    /// usual one stands for both.
    fn shards(
        &mut self,
        estimator: &Estimator<'_>,
        (keep, goal): (usize, Goal<'_>),
        whole: &Placement,
        shared: &Shared,
        twins: &mut Vec<(Option<usize>, f64)>,
    ) {
        let problem = estimator.problem();
        let mut unspoken_s: f64 = 0.0;
        for shard in std::iter::once(None).chain(groups(problem, whole).into_iter().map(Some)) {
            let layout = Layout { shard, ..whole.layout.clone() };
            let placement = Placement { layout, ..*whole };
            let (least_s, memory) = estimator.bound(&placement, shared);
            let fits = memory <= problem.cluster.accelerator.memory_bytes.value;
            let hopeless = match goal {
                Goal::Front => fits && self.beaten(keep, least_s.max(unspoken_s), memory),
                Goal::Fastest(yet) => !fits || least_s.max(unspoken_s) > yet.seconds(),
            };
            if hopeless {
                self.pruned += 1;
                continue;
            }
            let estimate = estimator.estimate_shared(&placement, shared);
            self.priced += 1;
            if let Goal::Fastest(yet) = goal
                && estimate.fits
            {
                yet.offer(estimate.step_s);
            }
            if shard.is_none() {
                unspoken_s = estimate.unspoken_s();
            }
            if twins.contains(&(shard, estimate.step_s)) {
                continue;
            }
            twins.push((shard, estimate.step_s));
            self.take(Found { placement, estimate }, keep);
        }
    }

    fn merge(&mut self, other: Part, keep: usize) {
        for found in other.best {
            let at = self.best.partition_point(|b| better(b, &found));
            if at < keep {
                self.best.insert(at, found);
                self.best.truncate(keep);
            }
        }
        for found in &other.front {
            self.offer(found);
        }
        let total = |f: &Found| f.estimate.memory.total();
        if let Some(found) = other.smallest
            && self.smallest.as_ref().is_none_or(|s| total(&found) < total(s))
        {
            self.smallest = Some(found);
        }
        self.priced += other.priced;
        self.pruned += other.pruned;
        for (why, n) in other.refused {
            *self.refused.entry(why).or_default() += n;
        }
    }
}

/// Faster first; of equally fast ones the smaller, then the one with fewer ranks that talk.
fn better(a: &Found, b: &Found) -> bool {
    let key = |f: &Found| {
        (f.estimate.step_s, f.estimate.memory.total(), f.placement.layout.tp * f.placement.layout.pp)
    };
    key(a) <= key(b)
}

impl Job {
    /// A layout of this job, without chunks or ZeRO.
    fn layout(&self, dp: usize, pp: usize) -> Layout {
        let Job { tp, cp, ep, sequence_parallel, micro_batch, recompute } = *self;
        Layout {
            dp,
            tp,
            pp,
            cp,
            ep,
            sequence_parallel,
            micro_batch,
            recompute,
            reduce: Reduce::Ring,
            expert_rows: ExpertRows::Even,
            ..Layout::default()
        }
    }
}

/// A broken rule in the words of a search.
fn reason(rule: Rule) -> &'static str {
    match rule {
        Rule::Sizes => "more ranks than any machine has",
        Rule::Context => "the sequence has no such halves",
        Rule::Tensor => "tensor parallelism has no equal shares",
        Rule::Experts => "experts do not divide the ranks of a stage",
        Rule::Shards => "experts do not divide the ranks that shard together",
        Rule::Stages => "more stages than layers",
        Rule::Batch => "micro-batches do not divide the batch",
    }
}

/// The dp x pp x schedule x ZeRO x placement part of the space under one template.
fn run(estimator: &mut Estimator<'_>, (space, goal): (&Space, Goal<'_>), job: Job) -> Result<Part> {
    let problem = estimator.problem();
    let mut part = Part::default();
    let (layers, tolerance) = (problem.shape.model.layers, problem.software.tolerance);
    let rest = space.accelerators / job.tp / job.cp;
    if rest * job.tp * job.cp != space.accelerators {
        part.refuse("axes do not multiply to the accelerators");
        return Ok(part);
    }
    let mut shared = None;
    for pp in divisors(rest) {
        let plain = job.layout(rest / pp, pp);
        if let Err(broken) = plain.check(&problem.shape.model, problem.sequences, problem.sequence, tolerance)
        {
            part.refuse(reason(broken.rule));
            continue;
        }
        let dp = plain.dp;
        let micro_batches = problem.sequences / dp / job.micro_batch;
        let ends = !space.trainable_only && tolerance.empty_ends;
        // Megatron-LM of 2021 and its kin want chunks of one size.
        let uneven = space.trainable_only || problem.software.lineage != "megatron";
        for (schedule, chunks) in schedules(pp, layers, micro_batches, ends, uneven) {
            for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
                if dp * job.cp == 1 && zero != Zero::Off {
                    continue;
                }
                let orders: &[Order] =
                    if pp > 1 && dp > 1 { &[Order::TpCpDpPp, Order::TpCpPpDp] } else { &[Order::TpCpDpPp] };
                let mut twins = Vec::new();
                for &order in orders {
                    let layout = Layout { zero, schedule, chunks, ..plain.clone() };
                    if space.strategy.is_some_and(|s| !s.allows(&layout)) {
                        continue;
                    }
                    let whole = Placement { layout, format: space.format, order };
                    let shared = match &shared {
                        Some(shared) => shared,
                        None => shared.insert(estimator.shared(&whole)?),
                    };
                    part.shards(estimator, (space.keep, goal), &whole, shared, &mut twins);
                }
            }
        }
    }
    Ok(part)
}

/// How many of dp may shard together besides all: those that fill a scale-up domain (NVLink, a TPU pod), a node, or what
/// lies under a tier of switches.
fn groups(problem: &Problem, whole: &Placement) -> Vec<usize> {
    let (cluster, l) = (&problem.cluster, &whole.layout);
    if l.zero == Zero::Off {
        return Vec::new();
    }
    let tiers = cluster.scale_out.tiers.iter().map(|tier| tier.accelerators);
    let mut sizes: Vec<usize> = [cluster.scale_up.domain, cluster.per_node]
        .into_iter()
        .chain(tiers)
        .filter(|places| places.is_multiple_of(whole.dp_stride()))
        .map(|places| places / whole.dp_stride())
        .filter(|shard| *shard > 1 && *shard < l.dp && l.dp.is_multiple_of(*shard))
        .filter(|shard| Layout { shard: Some(*shard), ..l.clone() }.check_shard().is_ok())
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Schedules and chunks a stage. Where the stack deals layers `uneven`, chunks may differ by one. With `empty_ends` the embedding and the head may have chunks of their own.
fn schedules(
    pp: usize,
    layers: usize,
    micro_batches: usize,
    empty_ends: bool,
    uneven: bool,
) -> Vec<(PipelineSchedule, usize)> {
    let mut out = vec![(PipelineSchedule::OneFOneB, 1)];
    if pp > 1 {
        out.push((PipelineSchedule::ZeroBubble, 1));
        if micro_batches.is_multiple_of(pp) {
            let all = layers + if empty_ends { 2 } else { 0 };
            let most = (all / pp).min(CHUNKS_MAX);
            let even = |c: usize| layers.is_multiple_of(c * pp) || (layers + 2).is_multiple_of(c * pp);
            let chunks = (2..=most).filter(|c| uneven || even(*c));
            out.extend(chunks.map(|c| (PipelineSchedule::Interleaved, c)));
        }
    }
    out
}

#[cfg(test)]
mod tests;
