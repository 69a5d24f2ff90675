//! The search over layouts: every axis, placement, schedule, ZeRO stage, recompute policy and micro-batch.
//!
//! Exhaustive. A layout is left out only if its lower bound (compute of its fullest stage, no communication, no bubble)
//! is above the worst of the best kept, and a layout already estimated is at least as fast with no more memory; then it
//! can be neither among the best nor on the front.

mod fastest;
mod nothing;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use program::check_mixture;
use rayon::prelude::*;
use serde::Serialize;
use spec::{
    ContextMode, ExpertRows, Layout, NumberFormat, PipelineSchedule, Recompute, Reduce, Result, Rule, Zero,
    divisors,
};

use crate::estimate::{Estimate, Estimator, Problem, Shared};
use crate::placement::{Order, Placement};
use crate::strategy::Strategy;

use fastest::Goal;
pub use fastest::fastest;
use nothing::nothing;

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
    /// Leave out what this program plans for others and does not train.
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
    #[serde(rename = "layouts_priced")]
    pub layouts_estimated: usize,
    /// Layouts left out by their bound.
    pub layouts_pruned: usize,
    /// Layouts that the model or the batch does not allow, or that do not fit, by reason.
    pub refused: BTreeMap<&'static str, usize>,
}

/// Axes that layouts share a template by: one job of the search.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct SharedAxes {
    tp: usize,
    cp: usize,
    context: ContextMode,
    ep: usize,
    sequence_parallel: bool,
    micro_batch: usize,
    recompute: Recompute,
}

/// Chunks a stage are tried up to this many.
const CHUNKS_MAX: usize = 32;
/// A bound worked out in another order than the one that it stands for may be above it by rounding.
const ROUNDING: f64 = 1.0 + 1e-9;
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
    search_from(problem, space, &[], progress)
}

/// The same, with layouts of which it is known that they are good: theirs and what shares a template with them is estimated
/// first, and bounds the rest. Finds what [`search`] finds, and estimates less on the way.
///
/// # Errors
/// As [`search`].
pub fn search_from(
    problem: &Problem,
    space: &Space,
    good: &[Placement],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Searched> {
    let all = explore(problem, space, good, progress)?;
    if all.best.is_empty() {
        return Err(nothing(problem, space, &all));
    }
    Ok(Searched {
        best: all.best,
        pareto: all.front,
        layouts_estimated: all.estimated,
        layouts_pruned: all.pruned,
        refused: all.refused,
    })
}

fn explore(
    problem: &Problem,
    space: &Space,
    good: &[Placement],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Part> {
    let jobs = jobs(problem, space);
    let done = AtomicUsize::new(0);
    let part = |job: &SharedAxes, known: &Part| {
        let part = Estimator::new(problem, space.format)
            .and_then(|mut estimator| run(&mut estimator, (space, Goal::Front { known }), *job));
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, jobs.len());
        part
    };
    let is_good = |job: &SharedAxes| good.iter().any(|g| *job == SharedAxes::of(g));
    let all_of = |wanted: bool, known: &Part| -> Result<Vec<Part>> {
        let found: Vec<_> =
            jobs.par_iter().filter(|job| is_good(job) == wanted).map(|job| part(job, known)).collect();
        found.into_iter().collect()
    };
    let first = all_of(true, &Part::default())?;
    let mut known = Part::default();
    first.iter().for_each(|part| known.merge(part.clone(), space.keep));
    let (mut first, mut rest) = (first.into_iter(), all_of(false, &known)?.into_iter());
    // In the order of jobs, so that of equals the same one wins whatever came first.
    let mut all = Part::default();
    for job in &jobs {
        let next = if is_good(job) { first.next() } else { rest.next() };
        all.merge(next.unwrap_or_default(), space.keep);
    }
    Ok(all)
}

/// Tokens of a sequence from which it is cut over ranks: below, other axes have enough to cut.
const CONTEXT_FROM: usize = 16_384;
const CONTEXTS: [usize; 6] = [1, 2, 4, 8, 16, 32];

fn jobs(problem: &Problem, space: &Space) -> Vec<SharedAxes> {
    let m = &problem.shape.model;
    let n = space.accelerators;
    // Each as one replica of a stage, whatever the rest.
    let allowed = |tp: usize, (cp, context): (usize, ContextMode), sequence_parallel: bool| {
        let layout = Layout { tp, cp, context, sequence_parallel, ..Placement::foreign() };
        layout.check(m, 1, problem.sequence, problem.software.tolerance).is_ok()
    };
    let whole = (1, ContextMode::Ring);
    let tps: Vec<usize> = divisors(n).filter(|tp| *tp <= TP_MAX && allowed(*tp, whole, false)).collect();
    let contexts: Vec<(usize, ContextMode)> =
        contexts(problem, space).into_iter().filter(|cut| allowed(1, *cut, false)).collect();
    let experts: Vec<usize> = match problem.shape.experts {
        Some(e) => divisors(e.count).filter(|ep| n.is_multiple_of(*ep)).collect(),
        None => vec![1],
    };
    let micro_batches: Vec<usize> =
        divisors(problem.sequences).filter(|b| *b <= space.micro_batch_max).collect();
    let mut jobs = Vec::new();
    for &tp in &tps {
        let inside = |cp: usize| space.strategy.is_none_or(|s| s.allows_inside(tp, cp));
        for &(cp, context) in contexts.iter().filter(|(cp, _)| inside(*cp)) {
            for &ep in &experts {
                for &micro_batch in &micro_batches {
                    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                        let modes = [true, false].into_iter().filter(|m| allowed(tp, (cp, context), *m));
                        for sequence_parallel in modes {
                            jobs.push(SharedAxes {
                                tp,
                                cp,
                                context,
                                ep,
                                sequence_parallel,
                                micro_batch,
                                recompute,
                            });
                        }
                    }
                }
            }
        }
    }
    jobs
}

/// How sequences are cut: long ones, and by dealing heads only where this program is planned for, for no published run of
/// another stack did so that estimates could be held to.
fn contexts(problem: &Problem, space: &Space) -> Vec<(usize, ContextMode)> {
    let own = space.trainable_only || problem.software.name == "phalanx";
    let degrees = CONTEXTS.into_iter().filter(|cp| space.accelerators.is_multiple_of(*cp));
    let cut = degrees.filter(|cp| *cp == 1 || problem.sequence >= CONTEXT_FROM);
    let modes = [ContextMode::Ring, ContextMode::Heads];
    cut.flat_map(|cp| modes.map(|mode| (cp, mode)))
        .filter(|(cp, mode)| *mode == ContextMode::Ring || (own && *cp > 1))
        .collect()
}

/// What a job found.
#[derive(Clone, Default)]
struct Part {
    best: Vec<Found>,
    front: Vec<Found>,
    smallest: Option<Found>,
    estimated: usize,
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
            self.too_large(found);
            return;
        }
        self.offer(&found);
        self.rank(found, keep);
    }

    fn rank(&mut self, found: Found, keep: usize) {
        let at = self.best.partition_point(|b| better(b, &found));
        if at < keep {
            self.best.insert(at, found);
            self.best.truncate(keep);
        }
    }

    fn too_large(&mut self, found: Found) {
        let total = |f: &Found| f.estimate.memory.total();
        if self.smallest.as_ref().is_none_or(|s| total(&found) < total(s)) {
            self.smallest = Some(found);
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

    /// As [`Part::beaten`], by what is strictly faster: of equals it is the job's to say which comes first.
    fn outdoes(&self, keep: usize, least_s: f64, memory: f64) -> bool {
        let worst = self.best.get(keep.saturating_sub(1)).map_or(f64::INFINITY, |b| b.estimate.step_s);
        let faster = self.front.partition_point(|f| f.estimate.step_s < least_s);
        least_s > worst && faster > 0 && self.front[faster - 1].estimate.memory.total() <= memory
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
        (space, goal): (&Space, Goal<'_>),
        whole: &Placement,
        shared: &Shared,
        twins: &mut Vec<(Option<usize>, f64)>,
    ) {
        let (problem, keep) = (estimator.problem(), space.keep);
        let mut unspoken_s: f64 = 0.0;
        for shard in std::iter::once(None).chain(groups(problem, whole).into_iter().map(Some)) {
            let layout = Layout { shard, ..whole.layout.clone() };
            // Estimates are of experts that are chosen evenly; a run has room for all that may come.
            let trained = || Layout { expert_rows: ExpertRows::All, ..layout.clone() };
            if space.trainable_only && check_mixture(&problem.shape.model, &trained()).is_err() {
                self.refuse("experts are not trained so");
                continue;
            }
            let placement = Placement { layout, ..*whole };
            let (least_s, memory) = estimator.bound(&placement, shared);
            let fits = memory <= problem.cluster.accelerator.memory_bytes.value;
            // Of what does not fit the smallest is kept, to say what is lacking where nothing fits.
            let larger = |s: &Found| s.estimate.memory.total() <= memory;
            if !fits && self.smallest.as_ref().is_some_and(larger) {
                self.pruned += 1;
                self.refuse("does not fit in memory");
                continue;
            }
            let hopeless = match goal {
                Goal::Front { known } => {
                    let least_s = least_s.max(unspoken_s);
                    fits && (self.beaten(keep, least_s, memory) || known.outdoes(keep, least_s, memory))
                }
                Goal::Fastest { yet, .. } => !fits || least_s.max(unspoken_s) > yet.seconds(),
            };
            if hopeless {
                self.pruned += 1;
                continue;
            }
            let estimate = estimator.estimate_shared(&placement, shared);
            self.estimated += 1;
            if let Goal::Fastest { yet, .. } = goal
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
            self.rank(found, keep);
        }
        for found in &other.front {
            self.offer(found);
        }
        if let Some(found) = other.smallest {
            self.too_large(found);
        }
        self.estimated += other.estimated;
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

impl SharedAxes {
    /// The job that estimates a placement.
    fn of(placement: &Placement) -> Self {
        let &Layout { tp, cp, context, ep, sequence_parallel, micro_batch, recompute, .. } =
            &placement.layout;
        SharedAxes { tp, cp, context, ep, sequence_parallel, micro_batch, recompute }
    }

    /// A layout of this job, without chunks or ZeRO.
    fn layout(&self, dp: usize, pp: usize) -> Layout {
        let SharedAxes { tp, cp, context, ep, sequence_parallel, micro_batch, recompute } = *self;
        Layout {
            dp,
            tp,
            pp,
            cp,
            context,
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
        Rule::Context => "the sequence has no such halves, or heads no such shares",
        Rule::Tensor => "tensor parallelism has no equal shares",
        Rule::Experts => "experts do not divide the ranks of a stage",
        Rule::Shards => "experts do not divide the ranks that shard together",
        Rule::Stages => "more stages than layers",
        Rule::Batch => "micro-batches do not divide the batch",
    }
}

/// The dp x pp x schedule x ZeRO x placement part of the space under one template.
fn run(estimator: &mut Estimator<'_>, (space, goal): (&Space, Goal<'_>), job: SharedAxes) -> Result<Part> {
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
        if let Goal::Fastest { yet, layer_s } = goal
            && layer_s.get() * (layers * micro_batches) as f64 / pp as f64 > yet.seconds() * ROUNDING
        {
            part.pruned += 1;
            continue;
        }
        let plain = Placement { layout: plain, format: space.format, order: Order::TpCpDpPp };
        let shared = match &shared {
            Some(shared) => shared,
            None => shared.insert(estimator.shared(&plain)?),
        };
        if let Goal::Fastest { layer_s, .. } = goal {
            layer_s.set(estimator.layer_s(shared));
        }
        let plain = &plain.layout;
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
                    part.shards(estimator, (space, goal), &whole, shared, &mut twins);
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
