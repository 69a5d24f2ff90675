//! What a step takes on the machine at hand: its program as the executor runs it, from a calibration file.
//!
//! `table` is the file, `kernel` what an op is to it, `link` what messages take, `play` lets all ranks go through
//! their programs at once on the cores that they share, and `search` takes the fastest layout that fits.

mod experts;
mod kernel;
mod link;
mod play;
pub mod search;
pub mod table;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use program::{Collective, Coords, Members, Mode, Op, OpId, Program, Recipe, Request, When};
use serde::Serialize;
use spec::{DType, Layout, ModelSpec, Result};

pub use kernel::{Kernel, Rates, kernel};
pub use link::LinkOp;
pub use table::{Conditions, Machine};

use play::{Act, Cores, Mail, Script, Segment, play};

/// What is trained on the machine, whatever the layout.
#[derive(Clone, Copy)]
pub struct Workload<'a> {
    /// The model.
    pub model: &'a ModelSpec,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// Storage of parameters and activations.
    pub precision: DType,
    /// What of the run's recipe is part of its program.
    pub recipe: Recipe,
    /// Share of a layer's tokens that each expert gets, layer by layer, as a journal has them; even where nothing is said.
    pub experts: Option<&'a [Vec<f64>]>,
    /// Threads of a rank.
    pub threads: usize,
    /// How ranks talk: `shm` or `tcp`.
    pub transport: &'a str,
    /// Elements of f32 work space of an op on so many threads, as the executor asks for.
    pub workspace: fn(&Op, &Program, usize) -> usize,
}

/// What a step takes on a machine.
#[derive(Clone, Debug, Serialize)]
pub struct StepEstimate {
    /// Seconds of a step.
    pub step_s: f64,
    /// It should not be faster.
    pub low_s: f64,
    /// Nor slower, as long as nothing else runs on the machine.
    pub high_s: f64,
    /// By rank.
    pub ranks: Vec<RankEstimate>,
}

impl StepEstimate {
    /// Bytes of the rank that takes most.
    pub fn memory_bytes(&self) -> usize {
        self.ranks.iter().map(|r| r.memory_bytes).max().unwrap_or(0)
    }

    /// Bytes of all ranks, which share the machine's memory.
    pub fn total_bytes(&self) -> usize {
        self.ranks.iter().map(|r| r.memory_bytes).sum()
    }
}

/// One rank's part of a step.
#[derive(Clone, Debug, Serialize)]
pub struct RankEstimate {
    /// Bytes that the program places: exactly what the executor allocates.
    pub memory_bytes: usize,
    /// Seconds of communication that no computation hides, as the executor counts them: ops in which ranks do nothing
    /// but talk, waiting for each other included.
    pub exposed_comm_s: f64,
    /// Its ops in the order of the program.
    pub ops: Vec<OpEstimate>,
}

/// One op's part of a step.
#[derive(Clone, Debug, Serialize)]
pub struct OpEstimate {
    /// The op's id, which joins it with what was measured.
    pub id: OpId,
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: &'static str,
    /// How often it runs in a step.
    pub runs: usize,
    /// Whether ranks talk in it, and do not only wait for what was begun earlier.
    pub talks: bool,
    /// Seconds of all runs, waiting for other ranks included.
    pub s: f64,
}

/// Estimates the step of one layout, every rank with its own program.
///
/// # Errors
/// If the layout is not valid for the model and the batch, or the calibration lacks a kind of op.
pub fn estimate(machine: &Machine, load: &Workload<'_>, layout: &Layout) -> Result<StepEstimate> {
    let build = |rank| program_of(load, layout, rank);
    let programs: Vec<Program> = (0..layout.world()).map(build).collect::<Result<_>>()?;
    estimate_programs(machine, load, &programs.iter().collect::<Vec<_>>())
}

/// The program of one rank, with the executor's work space.
fn program_of(load: &Workload<'_>, layout: &Layout, rank: usize) -> Result<Program> {
    let request = Request {
        model: load.model,
        layout,
        sequence: load.sequence,
        sequences: load.sequences,
        precision: load.precision,
        rank,
        mode: Mode::Train,
        loss: Default::default(),
        recipe: load.recipe,
    };
    Program::build(&request, &|op, p| (load.workspace)(op, p, load.threads))
}

/// Estimates the step of one layout from its ranks' programs; a program may stand for several ranks.
fn estimate_programs(machine: &Machine, load: &Workload<'_>, programs: &[&Program]) -> Result<StepEstimate> {
    let levels = levels(machine, load.threads, programs.len());
    let cores = Cores {
        cores: machine.cores,
        threads: load.threads,
        levels: levels.clone(),
        crowding: machine.crowding,
    };
    let mut estimator = Estimator {
        machine,
        transport: load.transport,
        experts: load.experts.unwrap_or_default(),
        rates: levels
            .iter()
            .map(|&beside| Rates::new(machine, load.precision, Conditions { threads: load.threads, beside }))
            .collect(),
        groups: Vec::new(),
        spread: Spread::default(),
    };
    let timed: Vec<Timed> =
        programs.iter().enumerate().map(|(rank, p)| estimator.rank(p, rank)).collect::<Result<_>>()?;
    let scripts: Vec<&Script> = timed.iter().map(|p| &p.script).collect();
    let groups: Vec<Vec<usize>> = estimator.groups.iter().map(|(_, ranks)| ranks.clone()).collect();
    let played = play(&scripts, &groups, &cores)?;
    let ranks = programs
        .iter()
        .zip(&timed)
        .zip(played.ranks)
        .map(|((p, timed), played)| rank_estimate(p, timed, &played))
        .collect();
    let step_s = played.makespan;
    let share = estimator.spread.share();
    Ok(StepEstimate {
        step_s,
        low_s: step_s / (1.0 + share + machine.spread),
        high_s: step_s * (1.0 + share + machine.spread),
        ranks,
    })
}

/// Numbers of ranks at work that were measured for so many threads, up to the ranks that there are.
fn levels(machine: &Machine, threads: usize, world: usize) -> Vec<usize> {
    let apart = |t: usize| (t as f64 / threads as f64).log2().abs();
    let near = machine.kernels.keys().map(|k| k.at.threads).min_by(|a, b| apart(*a).total_cmp(&apart(*b)));
    let of = machine.kernels.keys().filter(|k| Some(k.at.threads) == near).map(|k| k.at.beside);
    let mut levels: Vec<usize> = of.filter(|b| *b <= world.max(1)).collect();
    levels.sort_unstable();
    levels.dedup();
    if levels.is_empty() { vec![1] } else { levels }
}

/// How sure an estimate is: what is measured in place is known within [`Spread::MEASURED`], and every factor of two
/// between a shape and the nearest measured one adds [`Spread::PER_OCTAVE`]. Means weighted by time.
#[derive(Clone, Copy, Debug, Default)]
struct Spread {
    seconds: f64,
    octaves: f64,
}

impl Spread {
    const MEASURED: f64 = 0.05;
    const PER_OCTAVE: f64 = 0.06;

    fn add(&mut self, seconds: f64, octaves: f64) {
        self.seconds += seconds;
        self.octaves += seconds * octaves;
    }

    fn share(self) -> f64 {
        let far = if self.seconds > 0.0 { self.octaves / self.seconds } else { 0.0 };
        (Self::MEASURED + Self::PER_OCTAVE * far).min(0.9)
    }
}

struct Estimator<'a> {
    machine: &'a Machine,
    transport: &'a str,
    /// Shares of experts by layer.
    experts: &'a [Vec<f64>],
    /// By level.
    rates: Vec<Rates<'a>>,
    groups: Vec<(Members, Vec<usize>)>,
    spread: Spread,
}

/// A rank's script, with the seconds of every op by block.
struct Timed {
    script: Script,
    /// By block and op: seconds of its kernel alone at the highest level.
    ops: Vec<Vec<f64>>,
}

impl Estimator<'_> {
    fn rank(&mut self, p: &Program, rank: usize) -> Result<Timed> {
        let mut used: Vec<usize> = p.schedule.iter().map(|i| i.block).collect();
        used.push(p.tail);
        let mut ops = vec![Vec::new(); p.blocks.len()];
        let mut script = Script::default();
        // A block's acts are the same for every micro-batch, but for the numbers of messages.
        let mut folded: HashMap<usize, Vec<Act>> = HashMap::new();
        for &block in &used {
            if let Entry::Vacant(entry) = folded.entry(block) {
                let (acts, s) = self.block(p, rank, block, &mut script.segments)?;
                ops[block] = s;
                entry.insert(acts);
            }
        }
        let items = p.schedule.iter().map(|i| (i.block, i.micro_batch)).chain([(p.tail, 0)]);
        for (block, micro_batch) in items {
            script.acts.extend(folded[&block].iter().cloned().map(|act| act.of(micro_batch)));
        }
        Ok(Timed { script, ops })
    }

    /// The acts of one block, and the seconds of its ops at the highest level.
    fn block(
        &mut self,
        p: &Program,
        rank: usize,
        block: usize,
        segments: &mut Vec<Segment>,
    ) -> Result<(Vec<Act>, Vec<f64>)> {
        let mut acts = Vec::new();
        let mut alone = Vec::new();
        let mut open: Option<Segment> = None;
        let list = &p.blocks[block].ops;
        let mut close = |open: &mut Option<Segment>, acts: &mut Vec<Act>| {
            if let Some(segment) = open.take() {
                segments.push(segment);
                acts.push(Act::Compute { segment: segments.len() - 1 });
            }
        };
        for (i, op) in list.iter().enumerate() {
            let s = self.compute(op, p, rank)?;
            alone.push(s.last().copied().unwrap_or(0.0));
            let segment =
                open.get_or_insert_with(|| Segment { ops: (block, i, i), s: vec![0.0; self.rates.len()] });
            segment.ops.2 = i + 1;
            segment.s.iter_mut().zip(&s).for_each(|(sum, s)| *sum += s);
            if let Some(talk) = self.talk(op, p, rank, (block, i))? {
                close(&mut open, &mut acts);
                acts.extend(talk);
            }
        }
        close(&mut open, &mut acts);
        Ok((acts, alone))
    }

    /// Seconds of an op's own arithmetic by level, and between it and the next op.
    fn compute(&mut self, op: &Op, p: &Program, rank: usize) -> Result<Vec<f64>> {
        let gap = self.machine.op_gap_s;
        let Some(mut k) = kernel(op, p) else { return Ok(vec![gap; self.rates.len()]) };
        k.work *= experts::load(self.experts, op, p, rank);
        let mut out = Vec::with_capacity(self.rates.len());
        let mut far = (0.0, 0.0);
        for rates in &mut self.rates {
            let (s, octaves) = rates.seconds(&k)?;
            far = (s, octaves);
            out.push(gap + s);
        }
        self.spread.add(far.0, far.1);
        Ok(out)
    }

    /// What an op says to other ranks.
    fn talk(&mut self, op: &Op, p: &Program, rank: usize, at: (usize, usize)) -> Result<Option<Vec<Act>>> {
        let Some(comm) = &op.comm else { return Ok(None) };
        if let When::Ends(ticket) = comm.when {
            return Ok(Some(vec![Act::Wait { at, ticket }]));
        }
        // A program may stand for another data-parallel rank's: its peers lie around that one.
        let mine = Coords::of(rank, &p.layout);
        let members = comm.members.ranks(mine, &p.layout);
        let mut times = Vec::with_capacity(comm.messages.len());
        for message in &comm.messages {
            let bytes = message.bytes() as f64 * experts::busiest(self.experts, op, message, p);
            times.push(link::seconds(
                self.machine,
                self.transport,
                LinkOp::of(comm.what),
                members.len(),
                bytes,
            )?);
        }
        // A message takes half its time to be copied out by one rank, half to be copied in by the other.
        let mail = |from, to, channel| Mail { from, to, channel, micro_batch: 0 };
        let own = |peer| Coords { pp: Coords::of(peer, &p.layout).pp, ..mine }.rank(&p.layout);
        Ok(Some(match comm.what {
            Collective::Send { to, channel } => {
                vec![Act::Send { at, message: mail(rank, own(to), channel), s: times[0] / 2.0 }]
            }
            Collective::Recv { from, channel } => {
                vec![Act::Recv { at, message: mail(own(from), rank, channel), s: times[0] / 2.0 }]
            }
            _ => {
                let group = self.group(comm.members, members);
                let begins = match comm.when {
                    When::Begins(ticket) => Some(ticket),
                    _ => None,
                };
                times.into_iter().map(|s| Act::Join { at, group, s, begins }).collect()
            }
        }))
    }

    fn group(&mut self, members: Members, ranks: Vec<usize>) -> usize {
        let known = self.groups.iter().position(|(m, r)| *m == members && *r == ranks);
        known.unwrap_or_else(|| {
            self.groups.push((members, ranks));
            self.groups.len() - 1
        })
    }
}

/// Whether an op only waits for what was begun earlier.
fn waits(op: &Op) -> bool {
    matches!(&op.comm, Some(comm) if matches!(comm.when, When::Ends(_)))
}

impl Act {
    /// The act in a micro-batch: messages are told apart by it.
    fn of(mut self, micro_batch: usize) -> Act {
        if let Act::Send { message, .. } | Act::Recv { message, .. } = &mut self {
            message.micro_batch = micro_batch;
        }
        self
    }
}

/// Adds up what was played by op: a segment's seconds go to its ops in the proportion of their own.
fn rank_estimate(p: &Program, timed: &Timed, played: &play::PlayedRank) -> RankEstimate {
    let mut seconds: HashMap<(usize, usize), f64> = played.talk.clone();
    for (segment, s) in timed.script.segments.iter().zip(&played.segments) {
        let (block, first, end) = segment.ops;
        let own = &timed.ops[block][first..end];
        let sum: f64 = own.iter().sum();
        for (i, o) in own.iter().enumerate().filter(|(_, o)| **o > 0.0) {
            *seconds.entry((block, first + i)).or_default() += s * o / sum;
        }
    }
    let mut runs = vec![0usize; p.blocks.len()];
    p.schedule.iter().for_each(|i| runs[i.block] += 1);
    runs[p.tail] += 1;
    let mut ops: Vec<OpEstimate> = Vec::new();
    let mut known: HashMap<OpId, usize> = HashMap::new();
    let mut exposed_comm_s = 0.0;
    for (b, block) in p.blocks.iter().enumerate().filter(|(b, _)| runs[*b] > 0) {
        for (i, op) in block.ops.iter().enumerate() {
            let at = *known.entry(op.id).or_insert_with(|| {
                ops.push(OpEstimate {
                    id: op.id,
                    name: op.name.clone(),
                    kind: op.kind.name(),
                    runs: 0,
                    talks: op.only_talks() && !waits(op),
                    s: 0.0,
                });
                ops.len() - 1
            });
            ops[at].runs += runs[b];
            let s = seconds.get(&(b, i)).copied().unwrap_or(0.0);
            ops[at].s += s;
            if op.only_talks() && !op.goes_on() {
                exposed_comm_s += s;
            }
        }
    }
    RankEstimate { memory_bytes: p.memory.total, exposed_comm_s, ops }
}

#[cfg(test)]
mod tests;
