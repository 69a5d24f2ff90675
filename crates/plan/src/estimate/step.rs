//! A step added up from its sections: the slowest stage, the pipeline around it, and what happens once a step.

use spec::{Layout, Result};

use crate::network::{Collective, Extent, Group, on_span};
use crate::pipeline::{Pipeline, Stage, makespan_s, uneven_s};
use crate::placement::Placement;
use crate::template::Hidden;

use super::replicas::Share;
use super::section::{Timed, Times};
use super::{Breakdown, Estimate, Estimator, Problem};

/// Standard deviation of node speed, and the expected maximum of n normal variables is sd sqrt(2 ln n).
const NODE_SPREAD: f64 = 0.006;

/// How a layout deals layers to stages and sequences to micro-batches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stages {
    /// Layers of the fullest stage.
    pub(super) most: f64,
    /// Layers of each kind of stage.
    layers: StageLayers,
    /// Share of layers with experts.
    mix: f64,
    /// Micro-batches of a step.
    pub(super) micro_batches: f64,
}

impl Stages {
    pub(super) fn of(problem: &Problem, placement: &Placement, expert_layers: f64) -> Self {
        let l = &placement.layout;
        let layers = problem.shape.model.layers;
        let dealt = StageLayers::of(&virtual_layers(problem, placement), l.pp);
        let most = dealt.first.max(dealt.between).max(dealt.last);
        let micro_batches = (problem.sequences as f64 / (l.dp * l.micro_batch) as f64).max(1.0);
        Stages { most, layers: dealt, mix: expert_layers / layers as f64, micro_batches }
    }

    /// The sum over the fullest stage's layers of what a dense one and one with experts have.
    pub(super) fn per_layer(&self, dense: f64, expert: f64) -> f64 {
        self.most * ((1.0 - self.mix) * dense + self.mix * expert)
    }

    /// What Muon orthogonalises of the fullest stage: of dense layers' matrices, and of experts.
    pub(super) fn hidden(&self, t: &Timed) -> (Hidden, Hidden) {
        let of = |field: fn(&Hidden) -> f64| {
            let dense = self.per_layer(field(&t.layer.hidden), field(&t.expert_layer.hidden));
            (dense, self.per_layer(0.0, field(&t.expert_layer.expert_hidden)))
        };
        let (elements, spread, flops) = (of(|h| h.elements), of(|h| h.spread), of(|h| h.flops));
        (
            Hidden { elements: elements.0, spread: spread.0, flops: flops.0 },
            Hidden { elements: elements.1, spread: spread.1, flops: flops.1 },
        )
    }

    /// The fullest stage, with the embedding.
    pub(super) fn fullest(&self, head: bool) -> Share {
        let experts = self.most * self.mix;
        Share { dense: self.most - experts, experts, embed: true, head }
    }

    /// The layers of one stage.
    pub(super) fn share_of(&self, problem: &Problem, placement: &Placement, stage: usize) -> Share {
        let (l, model) = (&placement.layout, &problem.shape.model);
        let dealt = virtual_layers(problem, placement);
        let ends = |v: usize| dealt[..v].iter().sum();
        let of_chunk = |c: usize| ends(c * l.pp + stage)..ends(c * l.pp + stage + 1);
        let layers = || (0..l.chunks).flat_map(of_chunk);
        let experts = layers().filter(|i| model.has_experts(*i)).count();
        let dense = layers().count() - experts;
        Share { dense: dense as f64, experts: experts as f64, embed: stage == 0, head: stage + 1 == l.pp }
    }

    /// One micro-batch on the first, the slowest and the mean of those between, and the last stage.
    fn ends(&self, t: &Timed, single: bool) -> [(Times, Times, f64); 4] {
        if single {
            return [self.stage(t, self.most, true, true); 4];
        }
        let dealt = self.layers;
        let between = |layers| self.stage(t, layers, false, false);
        [
            self.stage(t, dealt.first, true, false),
            between(dealt.between),
            between(dealt.mean),
            self.stage(t, dealt.last, false, true),
        ]
    }

    /// One micro-batch on a stage of `count` layers: forward, backward, and the weight gradients in it.
    fn stage(&self, t: &Timed, count: f64, embed: bool, head: bool) -> (Times, Times, f64) {
        let (mut f, mut b, mut w) = (Times::default(), Times::default(), 0.0);
        let sections = [
            (&t.layer, count * (1.0 - self.mix)),
            (&t.expert_layer, count * self.mix),
            (&t.embed, f64::from(u8::from(embed))),
            (&t.head, f64::from(u8::from(head))),
        ];
        for (s, by) in sections {
            if by > 0.0 {
                f.add(&s.forward, by);
                b.add(&s.backward, by);
                w += s.weight * by;
            }
        }
        (f, b, w)
    }
}

impl Estimator<'_> {
    /// The pipeline of a layout: what one micro-batch takes on its first, middle and last stage.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn pipeline(&mut self, placement: &Placement) -> Result<Pipeline> {
        let timed = self.timed(placement)?;
        let stages = Stages::of(self.problem, placement, self.expert_layers);
        let [first, middle, mean, last] = stages.ends(&timed, placement.layout.pp == 1);
        Ok(self.pipeline_of(placement, &stages, [&first, &middle, &mean, &last]))
    }

    fn pipeline_of(
        &self,
        placement: &Placement,
        stages: &Stages,
        [first, middle, mean, last]: [&(Times, Times, f64); 4],
    ) -> Pipeline {
        let shown = |t: &Times| t.busy() + self.host_wait(t);
        let passes = |s: &(Times, Times, f64)| Stage { forward_s: shown(&s.0), backward_s: shown(&s.1) };
        Pipeline {
            schedule: placement.layout.schedule,
            stages: placement.layout.pp as f64,
            chunks: placement.layout.chunks as f64,
            micro_batches: stages.micro_batches,
            first: passes(first),
            middle: passes(middle),
            mean: passes(mean),
            last: passes(last),
            weight_s: middle.2,
        }
    }

    /// What one micro-batch takes on each virtual stage, in the order in which they run.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn virtuals(&mut self, placement: &Placement) -> Result<Vec<Stage>> {
        let timed = self.timed(placement)?;
        let stages = Stages::of(self.problem, placement, self.expert_layers);
        Ok(self.virtuals_of(&virtual_layers(self.problem, placement), &timed, &stages))
    }

    fn virtuals_of(&self, dealt: &[usize], t: &Timed, stages: &Stages) -> Vec<Stage> {
        let pass_s = |t: &Times| t.busy() + self.host_wait(t);
        let of = |(v, n): (usize, &usize)| {
            let (f, b, _) = stages.stage(t, *n as f64, v == 0, v + 1 == dealt.len());
            Stage { forward_s: pass_s(&f), backward_s: pass_s(&b) }
        };
        dealt.iter().enumerate().map(of).collect()
    }

    /// The time of a pipeline whose chunks hold different numbers of layers, which no closed form gives. The first and the
    /// last one may hold less, for the embedding's and the head's sake.
    fn uneven_s(&self, placement: &Placement, t: &Timed, stages: &Stages) -> Option<f64> {
        let l = &placement.layout;
        if l.chunks == 1 {
            return None;
        }
        let dealt = virtual_layers(self.problem, placement);
        let between = &dealt[1..dealt.len() - 1];
        if between.iter().all(|n| *n == between[0]) {
            return None;
        }
        let (virtuals, micro_batches) = (self.virtuals_of(&dealt, t, stages), stages.micro_batches as usize);
        let bits = virtuals.iter().map(|s| [s.forward_s.to_bits(), s.backward_s.to_bits()]).collect();
        let mut played = self.played.borrow_mut();
        let known = played.entry((l.pp, micro_batches, bits));
        Some(*known.or_insert_with(|| uneven_s(l.pp, micro_batches, &virtuals)))
    }

    /// Adds up a step.
    pub(super) fn combine(&self, placement: &Placement, t: &Timed) -> Estimate {
        let p = self.problem;
        let stages = Stages::of(p, placement, self.expert_layers);
        let single = placement.layout.pp == 1;
        let [first, middle, mean, last] = stages.ends(t, single);
        let shown = |t: &Times| t.busy() + self.host_wait(t);
        let time = |s: &(Times, Times, f64)| shown(&s.0) + shown(&s.1);
        let slowest =
            [middle, first, last].into_iter().max_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(middle);

        let mut d = self.stage_parts(&slowest, stages.micro_batches);
        let mut busy_port_s = 0.0;
        if !single {
            let whole = self.uneven_s(placement, t, &stages).unwrap_or_else(|| {
                makespan_s(&self.pipeline_of(placement, &stages, [&first, &middle, &mean, &last]))
            });
            d.bubble_s = (whole - stages.micro_batches * time(&slowest)).max(0.0);
            busy_port_s = self.messages(placement, t, &stages, &mut d);
        }
        self.data_parallel(placement, t, &stages, &slowest, busy_port_s, &mut d);
        d.step_s = p.constants.step_s;
        let busy = d.parts().iter().map(|p| p.1).sum::<f64>();
        d.straggler_s = busy * self.slowest_node(placement);
        let step_s = busy + d.straggler_s;
        let memory = self.memory(placement, t, &stages);
        let peak = self.chip.peak * placement.layout.world() as f64;
        let room = p.cluster.accelerator.memory_bytes.value;
        Estimate {
            step_s,
            mfu: self.flops / step_s / peak,
            breakdown: d,
            memory,
            fits: memory.total() <= room,
        }
    }

    /// How much longer the slowest of a layout's nodes is expected to take than the mean one, as a share.
    pub(super) fn slowest_node(&self, placement: &Placement) -> f64 {
        let nodes = (placement.layout.world() as f64 / self.problem.cluster.per_node as f64).max(1.0);
        NODE_SPREAD * (2.0 * nodes.ln()).sqrt()
    }

    /// What the slowest stage does with all micro-batches.
    fn stage_parts(&self, (f, b, _): &(Times, Times, f64), micro_batches: f64) -> Breakdown {
        Breakdown {
            gemm_s: (f.gemm + b.gemm) * micro_batches,
            attention_s: (f.attention + b.attention) * micro_batches,
            stream_s: (f.stream + b.stream) * micro_batches,
            host_s: (self.host_wait(f) + self.host_wait(b)) * micro_batches,
            tensor_s: (f.tensor + b.tensor) * micro_batches,
            context_s: (f.context + b.context) * micro_batches,
            expert_s: (f.expert + b.expert) * micro_batches,
            ..Breakdown::default()
        }
    }

    /// Messages between stages, into `d`; returns how long those of one pass that compute hides keep the ports between
    /// nodes busy.
    fn messages(&self, placement: &Placement, t: &Timed, stages: &Stages, d: &mut Breakdown) -> f64 {
        let p = self.problem;
        let l = &placement.layout;
        let span = Extent::of(&p.cluster, &self.net, Group { size: 2, stride: placement.pp_stride() });
        // Without sequence parallelism each tensor rank sends its share and the receiver gathers.
        let bytes = if l.sequence_parallel { t.boundary } else { t.boundary / l.tp as f64 };
        let comm = on_span(&self.net, Collective::Send, &span, 2, bytes);
        let hop_s = comm.latency_s + (comm.seconds - comm.latency_s) / p.constants.network;
        let fill_s = (l.pp as f64 - 1.0) * hop_s;
        d.bubble_s += fill_s;
        if p.software.overlap_p2p && l.chunks > 1 {
            d.pipeline_s = 2.0 * fill_s;
            return if span.domains > 1.0 { hop_s * l.chunks as f64 } else { 0.0 };
        }
        d.pipeline_s = 2.0 * hop_s * l.chunks as f64 * stages.micro_batches;
        0.0
    }

    /// The accelerator waits where kernels take longer to launch than to run.
    ///
    /// Kernels are of uneven lengths: the host falls behind on short ones and cannot be ahead without end on long ones,
    /// so that where both take about as long, neither hides the other. Their times add as the sides of a right angle
    /// do: the slower one sets the pace far from the corner. Ranks that wait for messages between nodes give the host
    /// time to catch up, and what it does for each member of a group nothing hides. A host that waits for each kernel
    /// launches none beside another.
    pub(super) fn host_wait(&self, t: &Times) -> f64 {
        if !self.problem.software.eager {
            return 0.0;
        }
        let (host, busy) = (t.kernels * self.problem.constants.host_s, t.busy());
        if self.problem.software.blocking {
            return host + t.members * self.problem.constants.host_s;
        }
        let uneven = host.hypot(busy - t.far);
        uneven.max(busy).max(host + t.members * self.problem.constants.host_s) - busy
    }
}

/// Layers of the first stage, of the last one, and of those between: the fullest and the mean.
#[derive(Clone, Copy, Debug)]
struct StageLayers {
    first: f64,
    between: f64,
    mean: f64,
    last: f64,
}

impl StageLayers {
    /// From the layers of each virtual stage.
    fn of(dealt: &[usize], stages: usize) -> Self {
        let own = |s: usize| dealt[s..].iter().step_by(stages).sum::<usize>() as f64;
        let (first, last) = (own(0), own(stages - 1));
        let between = (1..stages.saturating_sub(1)).map(own);
        let mean = between.clone().sum::<f64>() / (stages as f64 - 2.0);
        let most = between.reduce(f64::max).unwrap_or(first.max(last));
        StageLayers { first, between: most, mean: if stages > 2 { mean } else { most }, last }
    }
}

/// Layers of each virtual stage in the order in which they run: what was given, or as the stack deals them.
pub fn virtual_layers(problem: &Problem, placement: &Placement) -> Vec<usize> {
    let (l, shape, software) = (&placement.layout, &problem.shape, &problem.software);
    let layers = shape.model.layers;
    if l.pp == 1 || l.stage_layers.len() == l.pp * l.chunks {
        return l.deal(layers);
    }
    if software.stages_by_cost {
        let head = shape.table_params() * layers as f64 / shape.layers_params().1;
        return by_cost(l, layers, head);
    }
    let spared = software.tolerance.empty_ends.then(|| ends_spared(l, layers));
    spared.flatten().unwrap_or_else(|| l.deal(layers))
}

/// Where blocks are dealt by cost, the head's in layers: a stage takes blocks up to the first that passes its share of
/// the sum, and its chunks share them evenly.
fn by_cost(l: &Layout, layers: usize, head: f64) -> Vec<usize> {
    let end = |stage: usize| match stage {
        0 => 0,
        s if s == l.pp => layers,
        s => (((layers as f64 + head) * s as f64 / l.pp as f64).floor() as usize + 1).min(layers),
    };
    let share = |n: usize, i: usize| n * (i + 1) / l.chunks - n * i / l.chunks;
    (0..l.pp * l.chunks).map(|v| share(end(v % l.pp + 1) - end(v % l.pp), v / l.pp)).collect()
}

/// Some stacks let the embedding and the head count as layers: all chunks hold as many, but the last ones of the last
/// stage, for the head's sake, and then the first ones of the first, which may hold none. `None` if these two stages
/// cannot spare what is missing.
fn ends_spared(l: &Layout, layers: usize) -> Option<Vec<usize>> {
    let virtuals = l.pp * l.chunks;
    let each = layers.div_ceil(virtuals);
    let missing = each * virtuals - layers;
    let off_last = missing.div_ceil(2);
    if off_last >= each * l.chunks || layers + 2 < virtuals {
        return None;
    }
    let mut all = vec![each; virtuals];
    let mut take = |mut missing: usize, of: &mut dyn Iterator<Item = usize>| {
        for v in of {
            let off = missing.min(each);
            all[v] -= off;
            missing -= off;
        }
    };
    take(missing - off_last, &mut (0..virtuals).step_by(l.pp));
    take(off_last, &mut (0..virtuals).rev().step_by(l.pp));
    Some(all)
}
