//! A step added up from its sections: the slowest stage, the pipeline around it, and what happens once a step.

use crate::network::{Collective, Group, Span, on_span};
use crate::pipeline::{Pipeline, Stage, makespan_s};
use crate::placement::Placement;
use crate::software::Software;

use super::section::{Timed, Times};
use super::{Breakdown, Estimate, Estimator, Problem};

/// Standard deviation of node speed, and the expected maximum of n normal variables is sd sqrt(2 ln n).
const NODE_SPREAD: f64 = 0.006;

/// How a layout deals layers to stages and sequences to micro-batches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stages {
    /// Layers of the fullest stage.
    pub(super) most: f64,
    /// Layers of the last stage.
    last: f64,
    /// Share of layers with experts.
    mix: f64,
    /// Micro-batches of a step.
    pub(super) micro_batches: f64,
}

impl Stages {
    pub(super) fn of(problem: &Problem, placement: &Placement, expert_layers: f64) -> Self {
        let l = &placement.layout;
        let layers = problem.shape.model.layers;
        let (most, last) = if problem.software.stages_by_cost && l.pp > 1 && l.stage_layers.is_empty() {
            let shape = &problem.shape;
            stage_layers_by_cost(l.pp, layers, shape.table_params() * layers as f64 / shape.layers_params().1)
        } else {
            stage_layers(placement, layers, &problem.software)
        };
        let micro_batches = (problem.sequences as f64 / (l.dp * l.micro_batch) as f64).max(1.0);
        Stages { most, last, mix: expert_layers / layers as f64, micro_batches }
    }

    /// The sum over the fullest stage's layers of what a dense one and one with experts have.
    pub(super) fn per_layer(&self, dense: f64, expert: f64) -> f64 {
        self.most * ((1.0 - self.mix) * dense + self.mix * expert)
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
    /// Adds up a step.
    pub(super) fn combine(&self, placement: &Placement, t: &Timed) -> Estimate {
        let p = self.problem;
        let stages = Stages::of(p, placement, self.expert_layers);
        let single = placement.layout.pp == 1;
        let middle = stages.stage(t, stages.most, single, single);
        let last = if single { middle } else { stages.stage(t, stages.last, false, true) };
        let first = if single { middle } else { stages.stage(t, stages.most, true, false) };
        let shown = |t: &Times| t.busy() + self.host_wait(t);
        let time = |s: &(Times, Times, f64)| shown(&s.0) + shown(&s.1);
        let slowest =
            [middle, first, last].into_iter().max_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(middle);

        let mut d = self.stage_parts(&slowest, stages.micro_batches);
        let mut busy_port_s = 0.0;
        if !single {
            let passes = |s: &(Times, Times, f64)| Stage { forward_s: shown(&s.0), backward_s: shown(&s.1) };
            let whole = makespan_s(&Pipeline {
                schedule: placement.layout.schedule,
                stages: placement.layout.pp as f64,
                chunks: placement.layout.chunks as f64,
                micro_batches: stages.micro_batches,
                first: passes(&first),
                middle: passes(&middle),
                last: passes(&last),
                weight_s: middle.2,
            });
            d.bubble_s = (whole - stages.micro_batches * time(&slowest)).max(0.0);
            busy_port_s = self.messages(placement, t, &stages, &mut d);
        }
        self.data_parallel(placement, t, &stages, &slowest, busy_port_s, &mut d);
        d.step_s = p.constants.step_s;
        let nodes = (placement.layout.world() as f64 / p.cluster.per_node as f64).max(1.0);
        let busy = d.parts().iter().map(|p| p.1).sum::<f64>();
        d.straggler_s = busy * NODE_SPREAD * (2.0 * nodes.ln()).sqrt();
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
        let span = Span::of(&p.cluster, &self.net, Group { size: 2, stride: placement.pp_stride() });
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
    /// time to catch up, and what it does for each member of a group nothing hides.
    pub(super) fn host_wait(&self, t: &Times) -> f64 {
        if !self.problem.software.eager {
            return 0.0;
        }
        let (host, busy) = (t.kernels * self.problem.constants.host_s, t.busy());
        let uneven = host.hypot(busy - t.far);
        uneven.max(busy).max(host + t.members * self.problem.constants.host_s) - busy
    }
}

/// Layers of the fullest stage and of the last one where blocks are dealt by cost, the head's in layers: a stage takes
/// blocks up to the first that passes its share of the sum.
fn stage_layers_by_cost(stages: usize, layers: usize, head: f64) -> (f64, f64) {
    let whole = layers as f64 + head;
    let end = |stage: usize| ((whole * stage as f64 / stages as f64).floor() as usize + 1).min(layers);
    let (mut most, mut begin) = (0, 0);
    for stage in 1..stages {
        most = most.max(end(stage) - begin);
        begin = end(stage);
    }
    (most.max(layers - begin) as f64, (layers - begin) as f64)
}

/// Layers of the fullest stage and of the last one.
fn stage_layers(placement: &Placement, layers: usize, software: &Software) -> (f64, f64) {
    let l = &placement.layout;
    let virtuals = l.pp * l.chunks;
    let own = |s: usize, of: &dyn Fn(usize) -> usize| (0..l.chunks).map(|c| of(c * l.pp + s)).sum::<usize>();
    if l.stage_layers.len() == virtuals {
        let of = |v: usize| l.stage_layers[v];
        let most = (0..l.pp).map(|s| own(s, &of)).max().unwrap_or(layers);
        return (most as f64, own(l.pp - 1, &of) as f64);
    }
    // Some stacks let the embedding and the head count as a layer each: their chunks may hold nothing else.
    if !software.tolerance.empty_ends || layers + 2 < virtuals {
        let of = |v: usize| layers * (v + 1) / virtuals - layers * v / virtuals;
        let most = (0..l.pp).map(|s| own(s, &of)).max().unwrap_or(layers);
        return (most as f64, own(l.pp - 1, &of) as f64);
    }
    // Stacks take layers off the last stage first, for the head's sake, then off the first.
    let full = layers.div_ceil(virtuals) * l.chunks;
    let missing = full * l.pp - layers;
    let last = full - missing.div_ceil(2).min(full - 1);
    let most = if l.pp > 2 { full } else { full.max(last) };
    (most as f64, last as f64)
}
