//! The fastest layout of a run on the machine at hand.

use std::collections::{BTreeMap, BTreeSet};

use program::{Coords, Program, When, check_mixture};
use rayon::prelude::*;
use serde::Serialize;
use spec::{ContextMode, Error, Layout, PipelineSchedule, Recompute, Result, Zero, divisors};

use crate::{LinkOp, Machine, StepEstimate, Workload, estimate, estimate_programs, kernel, program_of};

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
    /// Layouts that need what the calibration lacks.
    pub not_measured: usize,
    /// What that is.
    pub lacks: Lacks,
}

/// What a calibration knows nothing of: kinds of op, and operations between ranks.
pub type Lacks = BTreeSet<&'static str>;

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
/// allowed or fits. Experts are spread over ranks wherever that is faster: the bits are the same. Layouts that need what
/// was not measured are left out.
///
/// # Errors
/// If no layout is allowed, or none was measured, or none fits in the memory; then the message says what the smallest one
/// takes.
pub fn search(machine: &Machine, load: &Workload<'_>, ranks: usize) -> Result<Chosen> {
    let (mut allowed, mut not_allowed, mut why) = (Vec::new(), 0, None);
    for layout in layouts(load, ranks) {
        match check(load, &layout) {
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
    let known = Known::of(machine, load);
    let found: Vec<Quick> =
        allowed.par_iter().map(|layout| quick(machine, load, &known, layout)).collect::<Result<_>>()?;
    let (mut timed, mut lacks) = (Vec::new(), Lacks::new());
    for found in found {
        match found {
            Quick::Priced(choice) => timed.push(choice),
            Quick::Lacks(what) => lacks.extend(what),
        }
    }
    let layouts_estimated = timed.len();
    let not_measured = allowed.len() - layouts_estimated;
    if timed.is_empty() {
        return Err(nothing_measured(machine, load, lacks));
    }
    let smallest = timed.iter().map(|c| c.total_bytes).min().unwrap_or(0);
    let most = MEMORY_SHARE * machine.memory_bytes as f64;
    let mut fit: Vec<Choice> = timed.into_iter().filter(|c| c.total_bytes as f64 <= most).collect();
    if fit.is_empty() {
        return Err(nothing_fits(machine, ranks, smallest as f64, most));
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
    Ok(Chosen {
        best,
        faster_with_other_bits,
        layouts_estimated,
        too_large,
        not_allowed,
        not_measured,
        lacks,
    })
}

fn nothing_measured(machine: &Machine, load: &Workload<'_>, lacks: Lacks) -> Error {
    let what = lacks.into_iter().collect::<Vec<_>>().join(", ");
    Error::user(format!(
        "no layout of {} can be priced: the calibration of {} knows nothing of {what}",
        load.model.name, machine.host
    ))
    .hint("measure this machine again: phalanx bench machine; or set layout keys instead, as layout.dp=2")
}

fn nothing_fits(machine: &Machine, ranks: usize, smallest: f64, most: f64) -> Error {
    let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
    Error::user(format!(
        "no layout of {ranks} ranks fits: the smallest takes {:.1} GiB, and runs may take {:.1} GiB of {}",
        gib(smallest),
        gib(most),
        machine.host
    ))
    .hint("a smaller model or batch takes less")
}

/// Whether a layout trains the model, at every size of its batch.
fn check(load: &Workload<'_>, layout: &Layout) -> Result<()> {
    let ramp = load.recipe.ramp.iter().flat_map(|b| b.stages().map(|s| s.sequences));
    ramp.chain([load.sequences])
        .try_for_each(|sequences| layout.validate(load.model, sequences, load.sequence))?;
    check_mixture(load.model, layout)
}

/// What the calibration lacks of the layouts that a search would price.
///
/// # Errors
/// If the program of a layout that is allowed cannot be built.
pub fn lacking(machine: &Machine, load: &Workload<'_>, ranks: usize) -> Result<Lacks> {
    // Other schedules, recomputing and larger micro-batches do the same again.
    let plain = |l: &Layout| {
        (l.schedule, l.recompute, l.micro_batch) == (PipelineSchedule::OneFOneB, Recompute::None, 1)
    };
    let known = Known::of(machine, load);
    let searched: Vec<Layout> =
        layouts(load, ranks).into_iter().filter(|l| plain(l) && check(load, l).is_ok()).collect();
    let lacks: Vec<Lacks> =
        searched.par_iter().map(|l| Ok(known.lacks(&built(load, l)?))).collect::<Result<_>>()?;
    Ok(lacks.into_iter().flatten().collect())
}

/// What a calibration has tables of.
struct Known<'a> {
    kinds: BTreeSet<&'a str>,
    between_ranks: BTreeSet<&'a str>,
}

impl<'a> Known<'a> {
    fn of(machine: &'a Machine, load: &Workload<'_>) -> Known<'a> {
        let over = machine.links.keys().filter(|key| key.transport == load.transport);
        Known {
            kinds: machine.kernels.keys().map(|key| key.kind.as_str()).collect(),
            between_ranks: over.map(|key| key.op.as_str()).collect(),
        }
    }

    /// What of the programs of a layout's ranks is not there.
    fn lacks(&self, programs: &BTreeMap<usize, Program>) -> Lacks {
        let ops = || programs.values().flat_map(|p| &p.blocks).flat_map(|block| &block.ops);
        let said = ops().filter_map(|op| op.comm.as_ref());
        let said = said.filter(|c| !matches!(c.when, When::Ends(_)) && !c.messages.is_empty());
        let between = said.map(|c| LinkOp::of(c.what).name()).filter(|op| !self.between_ranks.contains(op));
        let kinds = programs.values().flat_map(kinds).filter(|kind| !self.kinds.contains(kind));
        between.chain(kinds).collect()
    }
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

/// A layout's estimate, or why there is none.
enum Quick {
    Priced(Choice),
    Lacks(Lacks),
}

/// The estimate with one program for each stage and tensor shard ([`built`]).
fn quick(machine: &Machine, load: &Workload<'_>, known: &Known<'_>, layout: &Layout) -> Result<Quick> {
    let built = built(load, layout)?;
    let lacks = known.lacks(&built);
    if !lacks.is_empty() {
        return Ok(Quick::Lacks(lacks));
    }
    let programs: Vec<&Program> = (0..layout.world()).map(|rank| &built[&stands_for(rank, layout)]).collect();
    estimate_programs(machine, load, &programs).map(|e| Quick::Priced(choice(machine, load, layout, &e)))
}

/// The programs of a layout's ranks, one for each stage and tensor shard: ranks that hold the same differ in rounding only,
/// and in how many rows come to their experts, which is no part of a program.
fn built(load: &Workload<'_>, layout: &Layout) -> Result<BTreeMap<usize, Program>> {
    let different: BTreeSet<usize> = (0..layout.world()).map(|rank| stands_for(rank, layout)).collect();
    different.into_iter().map(|rank| Ok((rank, program_of(load, layout, rank)?))).collect()
}

/// Whose program stands for that of a rank. The last of those that shard owns the most under ZeRO.
fn stands_for(rank: usize, layout: &Layout) -> usize {
    Coords { dp: layout.dp - 1, cp: layout.cp - 1, tp: 0, ..Coords::of(rank, layout) }.rank(layout)
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
