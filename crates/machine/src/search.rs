//! The fastest layout of a run on the machine at hand.

use std::collections::{BTreeMap, BTreeSet};

use program::{Coords, Program, check_mixture};
use rayon::prelude::*;
use serde::Serialize;
use spec::{ContextMode, Error, Layout, PipelineSchedule, Recompute, Result, Zero, divisors};

use crate::{Machine, StepEstimate, Workload, estimate, estimate_programs, kernel, program_of};

/// A layout and what its step takes.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// The layout.
    pub layout: Layout,
    /// Seconds of a step.
    pub step_s: f64,
    /// It should not be faster.
    pub step_low_s: f64,
    /// Nor slower.
    pub step_high_s: f64,
    /// Bytes of the rank that takes most.
    pub memory_bytes: usize,
    /// Bytes of all ranks together.
    pub total_bytes: usize,
    /// Model FLOP/s over the best rate of products on as many cores as the ranks use.
    pub mfu: f64,
}

/// What the search found, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Chosen {
    /// The fastest that fit and keep the promise of equal bits, then the next ones.
    pub best: Vec<Choice>,
    /// The fastest layout with other bits that fits, if one is faster than the best: tensor and context parallelism change
    /// the order of sums.
    pub faster_with_other_bits: Option<Choice>,
    /// Layouts estimated.
    #[serde(rename = "layouts_priced")]
    pub layouts_estimated: usize,
    /// Layouts that do not fit in the memory.
    pub too_large: usize,
    /// Layouts that the model or the batch does not allow.
    pub not_allowed: usize,
    /// Layouts that cut sequences and need what was not measured.
    pub not_measured: usize,
}

/// Layouts kept, the best included.
const KEEP: usize = 5;
/// Chunks a stage are tried up to this many.
const CHUNKS_MAX: usize = 4;
/// Share of the machine's memory that the ranks of a run may take together: the rest is the system's and the data's.
const MEMORY_SHARE: f64 = 0.9;

/// Estimates every layout of `ranks` ranks that the trainer runs and takes the fastest that fits.
///
/// Tensor parallelism changes the order of sums inside products, context parallelism that of sums over the tokens of a
/// sequence, so what is trained would depend on the machine. They are taken only where no other layout of so many ranks is
/// allowed or fits. Experts are spread over ranks wherever that is faster: the bits are the same.
///
/// # Errors
/// If no layout is allowed, or none fits in the memory; then the message says what the smallest one takes.
pub fn search(machine: &Machine, load: &Workload<'_>, ranks: usize) -> Result<Chosen> {
    let (mut allowed, mut not_allowed, mut why) = (Vec::new(), 0, None);
    let ramp: Vec<usize> = load.recipe.ramp.iter().flat_map(|b| b.stages().map(|s| s.sequences)).collect();
    for layout in layouts(load, ranks) {
        let fits = |sequences: &usize| layout.validate(load.model, *sequences, load.sequence);
        let legal = ramp.iter().chain([&load.sequences]).try_for_each(fits);
        match legal.and_then(|()| check_mixture(load.model, &layout)) {
            Ok(()) => allowed.push(layout),
            Err(e) => {
                not_allowed += 1;
                why.get_or_insert(e);
            }
        }
    }
    if allowed.is_empty() {
        let name = &load.model.name;
        let why = why.unwrap_or_else(|| Error::user(format!("{} sequences", load.sequences)));
        return Err(Error::user(format!("no layout of {ranks} ranks trains {name}: {why}"))
            .hint(why.hint_text().unwrap_or("start another number of ranks, or set batch.sequences")));
    }
    let all = allowed.len();
    let timed: Vec<Choice> = allowed
        .par_iter()
        .filter_map(|layout| match quick(machine, load, layout) {
            // A file that is older than what cuts sequences estimates the rest.
            Err(_) if layout.deals_heads() => None,
            timed => Some(timed),
        })
        .collect::<Result<_>>()?;
    let layouts_estimated = timed.len();
    let not_measured = all - layouts_estimated;
    let smallest = timed.iter().map(|c| c.total_bytes).min().unwrap_or(0);
    let most = MEMORY_SHARE * machine.memory_bytes as f64;
    let mut fit: Vec<Choice> = timed.into_iter().filter(|c| c.total_bytes as f64 <= most).collect();
    if fit.is_empty() {
        let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
        return Err(Error::user(format!(
            "no layout of {ranks} ranks fits: the smallest takes {:.1} GiB, and runs may take {:.1} GiB of {}",
            gib(smallest as f64),
            gib(most),
            machine.host
        ))
        .hint("a smaller model or batch takes less"));
    }
    let too_large = layouts_estimated - fit.len();
    // A stable sort: of equals the first in the order of the search stays first, on every rank.
    fit.sort_by(|a, b| a.step_s.total_cmp(&b.step_s));
    let (mut same, mut other): (Vec<_>, Vec<_>) =
        fit.into_iter().partition(|c| c.layout.tp * c.layout.cp == 1);
    if same.is_empty() {
        std::mem::swap(&mut same, &mut other);
    }
    let faster_with_other_bits = other.into_iter().next().filter(|f| f.step_s < same[0].step_s);
    same.truncate(KEEP);
    let best = same.iter().map(|c| exact(machine, load, c)).collect::<Result<_>>()?;
    Ok(Chosen { best, faster_with_other_bits, layouts_estimated, too_large, not_allowed, not_measured })
}

/// Kinds of op that the layouts of a search have and the calibration knows nothing of.
///
/// # Errors
/// If the program of a layout that is allowed cannot be built.
pub fn lacking(machine: &Machine, load: &Workload<'_>, ranks: usize) -> Result<BTreeSet<&'static str>> {
    // One layout for each thing that brings ops of its own stands for all.
    let axes = [
        Layout::default(),
        Layout { dp: 2, zero: Zero::Gradients, ..Layout::default() },
        Layout { tp: 2, ..Layout::default() },
        Layout { pp: 2, ..Layout::default() },
    ];
    let is_searched = |l: &&Layout| {
        ranks.is_multiple_of(l.world()) && l.validate(load.model, load.sequences, load.sequence).is_ok()
    };
    let known: BTreeSet<&str> = machine.kernels.keys().map(|key| key.kind.as_str()).collect();
    let mut lacks = BTreeSet::new();
    for layout in axes.iter().filter(is_searched) {
        for rank in 0..layout.world() {
            lacks.extend(kinds(&program_of(load, layout, rank)?));
        }
    }
    lacks.retain(|kind| !known.contains(kind));
    Ok(lacks)
}

/// The kinds of op of a run on one rank.
///
/// # Errors
/// If its program cannot be built.
pub fn kinds_of(load: &Workload<'_>) -> Result<BTreeSet<&'static str>> {
    program_of(load, &Layout::default(), 0).map(|p| kinds(&p))
}

/// Those of a program that take time.
fn kinds(p: &Program) -> BTreeSet<&'static str> {
    let ops = p.blocks.iter().flat_map(|block| &block.ops);
    ops.filter_map(|op| kernel(op, p)).filter(|k| k.work > 0.0).map(|k| k.kind).collect()
}

/// The estimate with one program for each stage and tensor shard: ranks that hold the same differ in rounding only, and in
/// how many rows come to their experts, which is no part of a program.
fn quick(machine: &Machine, load: &Workload<'_>, layout: &Layout) -> Result<Choice> {
    // The last of those that shard owns the most under ZeRO.
    let of = |rank: usize| Coords { dp: layout.dp - 1, cp: layout.cp - 1, tp: 0, ..Coords::of(rank, layout) };
    let mut built: BTreeMap<usize, Program> = BTreeMap::new();
    for rank in 0..layout.world() {
        let stands = of(rank).rank(layout);
        if let std::collections::btree_map::Entry::Vacant(v) = built.entry(stands) {
            v.insert(program_of(load, layout, stands)?);
        }
    }
    let programs: Vec<&Program> = (0..layout.world()).map(|rank| &built[&of(rank).rank(layout)]).collect();
    estimate_programs(machine, load, &programs).map(|e| choice(machine, load, layout, &e))
}

fn exact(machine: &Machine, load: &Workload<'_>, c: &Choice) -> Result<Choice> {
    estimate(machine, load, &c.layout).map(|e| Choice {
        step_s: c.step_s,
        mfu: c.mfu,
        ..choice(machine, load, &c.layout, &e)
    })
}

fn choice(machine: &Machine, load: &Workload<'_>, layout: &Layout, e: &StepEstimate) -> Choice {
    let tokens = (load.sequences * load.sequence) as f64;
    let flops = load.model.flops_per_token(load.sequence) * tokens;
    Choice {
        layout: layout.clone(),
        step_s: e.step_s,
        step_low_s: e.low_s,
        step_high_s: e.high_s,
        memory_bytes: e.memory_bytes(),
        total_bytes: e.total_bytes(),
        mfu: flops / e.step_s / machine.product_rate().max(1.0),
    }
}

/// Every layout of so many ranks, valid or not, simple ones first.
fn layouts(load: &Workload<'_>, ranks: usize) -> Vec<Layout> {
    let mut out = Vec::new();
    for axes in axes(load, ranks) {
        for (schedule, chunks) in schedules(axes.pp) {
            for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
                for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                    for sequence_parallel in [false, true] {
                        for micro_batch in divisors(load.sequences / axes.dp) {
                            if (axes.replicas() == 1 && zero != Zero::Off)
                                || (axes.tp == 1 && sequence_parallel)
                            {
                                continue;
                            }
                            out.push(Layout {
                                sequence_parallel,
                                zero,
                                schedule,
                                chunks,
                                micro_batch,
                                recompute,
                                ..axes.clone()
                            });
                        }
                    }
                }
            }
        }
    }
    out
}

/// Every degree of every axis, and both ways in which ranks see sequences that are cut.
pub(crate) fn axes(load: &Workload<'_>, ranks: usize) -> Vec<Layout> {
    let mut out = Vec::new();
    for cp in divisors(ranks) {
        let contexts: &[ContextMode] =
            if cp == 1 { &[ContextMode::Ring] } else { &[ContextMode::Ring, ContextMode::Heads] };
        for &context in contexts {
            for tp in divisors(ranks / cp) {
                for pp in divisors(ranks / cp / tp) {
                    let dp = ranks / cp / tp / pp;
                    let experts = load.model.experts.map_or(1, |e| e.count);
                    for ep in divisors(experts).filter(|ep| (dp * cp * tp).is_multiple_of(*ep)) {
                        out.push(Layout { dp, tp, pp, cp, context, ep, ..Layout::default() });
                    }
                }
            }
        }
    }
    out
}

fn schedules(pp: usize) -> Vec<(PipelineSchedule, usize)> {
    if pp == 1 {
        return vec![(PipelineSchedule::OneFOneB, 1)];
    }
    let plain = [PipelineSchedule::OneFOneB, PipelineSchedule::Gpipe, PipelineSchedule::ZeroBubble];
    let interleaved = (2..=CHUNKS_MAX).map(|chunks| (PipelineSchedule::Interleaved, chunks));
    plain.into_iter().map(|s| (s, 1)).chain(interleaved).collect()
}
