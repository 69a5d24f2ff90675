//! Times of the sections of a model: kernels by roofline, collectives by the links that their groups span.

use crate::compute::{Chip, gemm_s, stream_s};
use crate::network::{Collective, Extent, Group, NetworkModel, Traffic, traffic};
use crate::placement::Placement;
use crate::software::{AttentionKernel, Overlap};
use crate::template::{Hidden, LAUNCHES_PER_TASK, Reads, Section, TalkAxis, Task};
use spec::Cluster;

use super::Estimator;
use super::parts::Piece;

/// Share of a gather's or scatter's products that its pieces can arrive beside: the piece that is multiplied first and
/// the one that is sent last have nothing beside them.
const PIECES_BESIDE: f64 = 0.5;
/// Share of compute that an expert dispatch finds free to hide behind: two halves of a micro-batch take turns, and norms
/// and routing between them wait.
const DISPATCH_BESIDE: f64 = 0.8;
/// Share of a dispatch that shows at least: its first and last pieces.
const DISPATCH_SHOWN: f64 = 0.1;
/// Share of the bytes of a product's operands that are in its low format: what it reads, about half of all.
const LOW_OPERANDS: f64 = 0.5;
/// Rows of an output tile: each expert's rows are padded to a multiple.
const TILE_ROWS: f64 = 128.0;
/// Tensor units want rows of 16 bytes, eight elements of 16 bit.
const ROW_ELEMENTS: f64 = 8.0;
/// How much slower attention is without (head width 150 in BLOOM's layout tests).
const MISALIGNED: f64 = 6.0;
/// Products of attention where the whole square of scores is computed, for those at the causal half: forward, and
/// backward, where scores are not computed again (four products for five).
const SQUARE: (f64, f64) = (2.0, 1.6);
/// Bytes that pass through memory for each score in 16 bit, forward and backward: written, scaled and masked, softmax,
/// dropout with its mask, read again.
const SCORE_BYTES: (f64, f64) = (9.0, 13.0);
/// Share of the rate of large products that those of unfused attention reach: many small ones of a head's width.
const UNFUSED_SHARE: f64 = 0.75;
/// Width of a head below which products over it fill the inner loop of a tile badly, and the share of the rate left.
const NARROW_HEAD: f64 = 96.0;
const NARROW_SHARE: f64 = 0.5;
/// Width of an expert at which grouped products reach half their rate on systolic arrays (fits MaxText's on TPUs).
const HALF_WIDTH: f64 = 2500.0;

/// Times of one section for one micro-batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) gemm: f64,
    pub(super) attention: f64,
    pub(super) stream: f64,
    pub(super) kernels: f64,
    /// Kernels' worth of the host's work on each member of collectives.
    pub(super) members: f64,
    pub(super) tensor: f64,
    pub(super) context: f64,
    pub(super) expert: f64,
    /// Of tensor-parallel messages those between nodes.
    pub(super) far: f64,
    /// Compute that hides other communication already: the same second hides one message.
    pub(super) spent: f64,
}

impl Times {
    pub(super) fn add(&mut self, o: &Times, by: f64) {
        self.gemm += o.gemm * by;
        self.attention += o.attention * by;
        self.stream += o.stream * by;
        self.kernels += o.kernels * by;
        self.members += o.members * by;
        self.tensor += o.tensor * by;
        self.context += o.context * by;
        self.expert += o.expert * by;
        self.far += o.far * by;
        self.spent += o.spent * by;
    }

    pub(super) fn compute(&self) -> f64 {
        self.gemm + self.attention + self.stream
    }

    /// Kernels and messages one after another.
    pub(super) fn busy(&self) -> f64 {
        self.compute() + self.tensor + self.context + self.expert
    }
}

/// A section, both passes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Passes {
    pub(super) forward: Times,
    pub(super) backward: Times,
    /// The part of backward that is weight gradients.
    pub(super) weight: f64,
    pub(super) params: f64,
    pub(super) expert_params: f64,
    pub(super) hidden: Hidden,
    pub(super) expert_hidden: Hidden,
    pub(super) reads: Reads,
    pub(super) expert_reads: Reads,
    pub(super) kept: f64,
    pub(super) working: f64,
}

/// A template with times: what is kept for all layouts that share a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    pub(super) embed: Passes,
    pub(super) layer: Passes,
    pub(super) expert_layer: Passes,
    pub(super) head: Passes,
    pub(super) tied: f64,
    pub(super) boundary: f64,
}

impl Estimator<'_> {
    pub(super) fn passes(&self, s: &Section, placement: &Placement, links: &Links) -> Passes {
        let forward = self.times(&s.forward, placement, links);
        let weight = self.times(&s.weight, placement, links);
        let mut backward = self.times(&s.input, placement, links);
        backward.add(&weight, 1.0);
        backward.stream += self.loss(s);
        let hide = |t: &mut Times| {
            let p = self.problem;
            // Between nodes nothing hides: the kernels that do it move data by loads and stores.
            if p.software.overlap_tp && placement.layout.tp > 1 && links.tp.0.domains <= 1.0 {
                // Pieces of a gather arrive while others are multiplied: the first piece shows.
                let first = t.tensor / placement.layout.tp as f64;
                t.tensor = first + (t.tensor - first - PIECES_BESIDE * t.gemm).max(0.0);
                t.spent += PIECES_BESIDE * t.gemm;
            }
            // A ring of keys and values hides behind the attention of the piece before; heads are there before attention.
            if placement.layout.has_ring() {
                let first = t.context / placement.layout.cp as f64;
                t.context = first + (t.context - first - t.attention).max(0.0);
                t.spent += t.attention;
            }
            let overlaps = match p.software.overlap_experts {
                Overlap::Never => false,
                Overlap::BetweenNodes => links.ep.0.domains > 1.0,
                Overlap::Always => true,
            };
            if overlaps && t.expert > 0.0 {
                let free = DISPATCH_BESIDE * (t.compute() - t.spent);
                t.expert = (t.expert - free).max(DISPATCH_SHOWN * t.expert);
                t.spent += free;
            }
        };
        let mut p = Passes {
            forward,
            backward,
            weight: weight.compute(),
            params: s.params,
            expert_params: s.expert_params,
            hidden: s.hidden,
            expert_hidden: s.expert_hidden,
            reads: s.reads,
            expert_reads: s.expert_reads,
            kept: s.kept_bytes,
            working: s.working_bytes,
        };
        p.forward.kernels += s.launches;
        p.backward.kernels += s.launches;
        hide(&mut p.forward);
        hide(&mut p.backward);
        p
    }

    /// Seconds of a loss that is computed an operation at a time, both passes.
    pub(super) fn loss(&self, s: &Section) -> f64 {
        // Of every product with the table one dim is the model's width, whichever gradient it is of.
        let logits = |t: &Task| match *t {
            Task::Gemm { m, n, k, head: true, .. } => m * n * k / self.problem.shape.model.hidden as f64,
            _ => 0.0,
        };
        let logits = s.forward.iter().chain(&s.input).map(logits).fold(0.0, f64::max);
        let bytes = self.problem.software.loss_bytes * logits;
        stream_s(&self.wide_chip, bytes) / self.problem.constants.stream
    }

    fn times(&self, tasks: &[Task], placement: &Placement, links: &Links) -> Times {
        let mut t = Times::default();
        for task in tasks {
            t.kernels += LAUNCHES_PER_TASK;
            match self.piece(task, placement, links) {
                Piece::Gemm { product_s, cast_s } => {
                    t.gemm += product_s;
                    t.stream += cast_s;
                }
                Piece::Attention { seconds } => t.attention += seconds,
                Piece::Stream { seconds } => t.stream += seconds,
                Piece::Talk { axis, traffic, .. } => {
                    let (span, size) = links.get(axis);
                    let moving = (traffic.inside_bytes / span.inside_rate)
                        .max(traffic.outside_bytes / span.outside_rate);
                    let s = traffic.latency_s + moving / self.problem.constants.network;
                    t.members += self.members(size);
                    match axis {
                        TalkAxis::Tp => {
                            t.tensor += s;
                            t.far += if span.domains > 1.0 { s } else { 0.0 };
                        }
                        TalkAxis::Cp => t.context += s,
                        TalkAxis::Ep => t.expert += s,
                    }
                }
            }
        }
        t
    }

    /// What the host does for each member of a group that talks, in kernels.
    pub(super) fn members(&self, size: usize) -> f64 {
        LAUNCHES_PER_TASK * self.problem.software.ops_per_member * size as f64
    }

    /// One task with its time, or with what it says.
    pub(super) fn piece(&self, task: &Task, placement: &Placement, links: &Links) -> Piece {
        match *task {
            Task::Gemm { m, n, k, batch, bytes, head } => {
                let mut cast_s = 0.0;
                let product_s = self.gemm(m, n, k, batch, bytes, head, &mut cast_s, placement);
                Piece::Gemm { product_s, cast_s }
            }
            Task::Attention { flops, bytes, scores, backward } => {
                Piece::Attention { seconds: self.attention(flops, bytes, scores, backward, placement) }
            }
            Task::Stream { bytes } => {
                Piece::Stream { seconds: stream_s(&self.wide_chip, bytes) / self.problem.constants.stream }
            }
            Task::Talk { what, axis, bytes } => {
                let gathers = axis == TalkAxis::Tp && what == Collective::AllGather;
                let wide = placement.precision().bytes() as f64;
                let bytes = if gathers { bytes * self.gathered_bytes(placement) / wide } else { bytes };
                let (span, size) = links.get(axis);
                let traffic = match (axis, self.problem.shape.experts) {
                    (TalkAxis::Ep, Some(e)) => dispatch(&self.net, span, size, bytes, e.top_k),
                    _ => traffic(&self.net, what, span, size, bytes),
                };
                let full = if span.domains > 1.0 { (bytes / self.net.message_full).max(1.0) } else { 1.0 };
                let traffic = Traffic {
                    inside_bytes: traffic.inside_bytes * full,
                    outside_bytes: traffic.outside_bytes * full,
                    ..traffic
                };
                Piece::Talk { what, axis, traffic }
            }
        }
    }

    fn gemm(
        &self,
        m: f64,
        n: f64,
        k: f64,
        batch: f64,
        bytes: f64,
        head: bool,
        stream: &mut f64,
        placement: &Placement,
    ) -> f64 {
        let low = !head && placement.format.bytes() < 2.0;
        let chip = if low { &self.chip } else { &self.wide_chip };
        let rows = if batch > 1.0 {
            // Tiles of different experts run side by side, each padded on its own.
            (m / TILE_ROWS).ceil() * TILE_ROWS * batch
        } else {
            m
        };
        let (wide, narrow) = (placement.precision().bytes() as f64, placement.format.bytes());
        let bytes = if low { bytes * (1.0 - LOW_OPERANDS + LOW_OPERANDS * narrow / wide) } else { bytes };
        if low {
            // Inputs are cast, and transposed for the other pass: read in 16 bit, written twice.
            *stream += stream_s(&self.wide_chip, m * k * batch * (wide + 2.0 * narrow))
                / self.problem.constants.stream;
        }
        let c = &self.problem.constants;
        let share = if batch > 1.0 { c.gemm * c.experts } else { c.gemm };
        // Grouped products of narrow experts fill large systolic arrays badly.
        let share =
            if batch > 1.0 && chip.systolic { share * n.min(k) / (n.min(k) + HALF_WIDTH) } else { share };
        let slowed = Chip { matmul: chip.matmul * share, ..*chip };
        gemm_s(&slowed, rows, n, k, bytes)
    }

    fn attention(&self, flops: f64, bytes: f64, scores: f64, backward: bool, placement: &Placement) -> f64 {
        let c = &self.problem.constants;
        let shape = &self.problem.shape;
        let dim = shape.latent.map_or(shape.model.head_dim, |l| l.key_dim()) as f64;
        let misaligned = if dim % ROW_ELEMENTS == 0.0 { 1.0 } else { MISALIGNED };
        if self.problem.software.attention == AttentionKernel::Unfused {
            let pass = |of: (f64, f64)| if backward { of.1 } else { of.0 };
            let narrow = if dim < NARROW_HEAD { NARROW_SHARE } else { 1.0 };
            let products = pass(SQUARE) * flops / narrow;
            let traffic = scores * pass(SCORE_BYTES) * placement.precision().bytes() as f64 / 2.0;
            let took = products * misaligned / (self.wide_chip.matmul * c.gemm * UNFUSED_SHARE)
                + stream_s(&self.wide_chip, traffic);
            return took * crate::calibration::PRIOR.attention / c.attention;
        }
        let pieces = if placement.layout.deals_heads() { 1 } else { placement.layout.cp };
        let sequence = self.problem.sequence as f64 / pieces as f64;
        let tuned = self.problem.software.attention == AttentionKernel::Tuned;
        let chip = if self.problem.software.low_precision_attention { &self.chip } else { &self.wide_chip };
        let rate = chip.attention(tuned, sequence, dim, backward) * c.attention;
        (flops / rate).max(stream_s(&self.wide_chip, bytes))
    }

    /// Bytes of an element where activations and parameters are gathered.
    pub(super) fn gathered_bytes(&self, placement: &Placement) -> f64 {
        let wide = placement.precision().bytes() as f64;
        if self.problem.software.low_precision_gathers { placement.format.bytes().min(wide) } else { wide }
    }
}

/// All-to-all of tokens to experts: a token goes to each domain once, however many of its experts are there, and is
/// handed on inside.
fn dispatch(net: &NetworkModel, span: &Extent, size: usize, bytes: f64, top_k: usize) -> Traffic {
    let all = traffic(net, Collective::AllToAll, span, size, bytes);
    let k = span.domains;
    if k <= 1.0 {
        return all;
    }
    let reached = k * (1.0 - (1.0 - 1.0 / k).powi(top_k as i32)) / top_k as f64;
    Traffic { outside_bytes: all.outside_bytes * reached, ..all }
}

/// Groups that talk inside layers, on their links.
pub(super) struct Links {
    tp: (Extent, usize),
    cp: (Extent, usize),
    ep: (Extent, usize),
}

impl Links {
    pub(super) fn of(cluster: &Cluster, net: &NetworkModel, placement: &Placement) -> Self {
        let tp = placement.layout.tp;
        let span = |size, stride| (Extent::of(cluster, net, Group { size, stride }), size);
        // Experts are not cut by tensor parallelism: their ranks are the innermost ones.
        Links { tp: span(tp, 1), cp: span(placement.layout.cp, tp), ep: span(placement.layout.ep, 1) }
    }

    pub(super) fn get(&self, axis: TalkAxis) -> (&Extent, usize) {
        let (span, size) = match axis {
            TalkAxis::Tp => &self.tp,
            TalkAxis::Cp => &self.cp,
            TalkAxis::Ep => &self.ep,
        };
        (span, *size)
    }
}
