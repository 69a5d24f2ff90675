//! The price of a step: time, where it goes, and memory, for one layout on one machine.
//!
//! Time is added up from the tasks of a [`Template`]: kernels by roofline, collectives by the links that their group
//! spans, overlap where the stack's schedule allows it, and the pipeline from its own order.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;
use spec::{Cluster, Error, NumberFormat, Result, Zero};

use crate::calibration::Constants;
use crate::compute::{Chip, gemm_s, stream_s};
use crate::mesh::Mesh;
use crate::network::{Collective, Group, NetworkModel, Span, on_span};
use crate::pipeline::{Pipeline, wait_s};
use crate::shape::Shape;
use crate::software::{AttentionKernel, Overlap, Software};
use crate::template::{Key, LAUNCHES_PER_TASK, Section, TalkAxis, Task, Template};

/// What is trained, where, and with what.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The model.
    pub shape: Shape,
    /// The machine.
    pub cluster: Cluster,
    /// The training stack.
    pub software: Software,
    /// What the stack makes of the hardware.
    pub constants: Constants,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
}

/// Where the time of a step goes on the slowest stage, in seconds; adds up to the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Breakdown {
    /// Matrix products.
    pub gemm_s: f64,
    /// Attention.
    pub attention_s: f64,
    /// Kernels that stream through memory.
    pub stream_s: f64,
    /// Waiting for the host to launch kernels.
    pub host_s: f64,
    /// Tensor-parallel collectives not hidden behind compute.
    pub tensor_s: f64,
    /// Context-parallel exchange not hidden.
    pub context_s: f64,
    /// Expert dispatch not hidden.
    pub expert_s: f64,
    /// Messages between stages not hidden.
    pub pipeline_s: f64,
    /// Stages that wait for others.
    pub bubble_s: f64,
    /// Gradients and parameters between replicas not hidden.
    pub data_s: f64,
    /// The optimiser.
    pub optimizer_s: f64,
    /// Once a step.
    pub step_s: f64,
    /// Waiting for the slowest of many nodes.
    pub straggler_s: f64,
}

impl Breakdown {
    /// Names and values, largest parts of a step.
    pub fn parts(&self) -> [(&'static str, f64); 13] {
        [
            ("gemm", self.gemm_s),
            ("attention", self.attention_s),
            ("memory", self.stream_s),
            ("host", self.host_s),
            ("tensor parallel", self.tensor_s),
            ("context parallel", self.context_s),
            ("expert parallel", self.expert_s),
            ("stage messages", self.pipeline_s),
            ("bubble", self.bubble_s),
            ("data parallel", self.data_s),
            ("optimizer", self.optimizer_s),
            ("step", self.step_s),
            ("stragglers", self.straggler_s),
        ]
    }

    /// The part that takes most.
    pub fn bound(&self) -> &'static str {
        self.parts().into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("nothing", |p| p.0)
    }
}

/// Bytes of the accelerator that holds most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MemoryUse {
    /// Parameters in 16 bit.
    pub params: f64,
    /// Gradients.
    pub grads: f64,
    /// Master weights and moments.
    pub optimizer: f64,
    /// Activations of micro-batches in flight.
    pub activations: f64,
    /// Working set beside them.
    pub working: f64,
    /// What a framework adds: context, communication buffers, fragmentation.
    pub framework: f64,
}

impl MemoryUse {
    /// Everything.
    pub fn total(&self) -> f64 {
        self.params + self.grads + self.optimizer + self.activations + self.working + self.framework
    }
}

/// A priced layout.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Price {
    /// Time of a step.
    pub step_s: f64,
    /// Model FLOPs utilisation: causal attention at half, no recompute, against the dense peak of the format.
    pub mfu: f64,
    /// Where the time goes.
    pub breakdown: Breakdown,
    /// Where the bytes go.
    pub memory: MemoryUse,
    /// Whether the bytes fit.
    pub fits: bool,
}

/// Context, libraries and communication buffers of one process on a GPU, and what else lives there for good.
const FRAMEWORK_BYTES: f64 = 3e9;
/// The same where a compiler plans all memory ahead.
const COMPILED_BYTES: f64 = 0.5e9;
/// Share of activations lost to fragmentation in caching allocators.
const FRAGMENTATION: f64 = 0.04;
/// Share of a gathered or reduced byte stream that cannot hide: the first bucket forward, the last one backward.
const BUCKETS: f64 = 12.0;
/// Kernels slow down while collectives inside a node run beside them: they share units and memory.
const OVERLAP_TAX: f64 = 0.2;
/// The same between nodes, where ports move most of the data.
const OVERLAP_TAX_FAR: f64 = 0.06;
/// Width of an expert at which grouped products reach half their rate on systolic arrays (fits MaxText's on TPUs).
const HALF_WIDTH: f64 = 2500.0;
/// Standard deviation of node speed, and the expected maximum of n normal variables is sd sqrt(2 ln n).
const NODE_SPREAD: f64 = 0.006;

/// Times of one section for one micro-batch.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    gemm: f64,
    attention: f64,
    stream: f64,
    kernels: f64,
    tensor: f64,
    context: f64,
    expert: f64,
    /// Compute that hides other communication already: the same second hides one message.
    spent: f64,
}

impl Times {
    fn add(&mut self, o: &Times, by: f64) {
        self.gemm += o.gemm * by;
        self.attention += o.attention * by;
        self.stream += o.stream * by;
        self.kernels += o.kernels * by;
        self.tensor += o.tensor * by;
        self.context += o.context * by;
        self.expert += o.expert * by;
        self.spent += o.spent * by;
    }

    fn compute(&self) -> f64 {
        self.gemm + self.attention + self.stream
    }

    /// Kernels and messages one after another.
    fn busy(&self) -> f64 {
        self.compute() + self.tensor + self.context + self.expert
    }
}

/// A section, both passes.
#[derive(Clone, Copy, Debug, Default)]
struct Passes {
    forward: Times,
    backward: Times,
    /// The part of backward that is weight gradients.
    weight: f64,
    params: f64,
    expert_params: f64,
    kept: f64,
    working: f64,
}

/// A template with times: what is kept for all layouts that share a key.
#[derive(Clone, Copy, Debug)]
struct Timed {
    embed: Passes,
    layer: Passes,
    expert_layer: Passes,
    head: Passes,
    boundary: f64,
}

/// What layouts under one template share: opaque, from [`Pricer::shared`].
#[derive(Clone, Copy, Debug)]
pub struct Shared(Timed);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct TimedKey {
    key: Key,
    format: NumberFormat,
    tp_stride: usize,
}

/// Prices layouts of one problem, remembering what they share.
pub struct Pricer<'a> {
    problem: &'a Problem,
    net: NetworkModel,
    chip: Chip,
    chip16: Chip,
    templates: HashMap<Key, Arc<Template>>,
    timed: HashMap<TimedKey, Timed>,
    expert_layers: f64,
    flops: f64,
}

impl<'a> Pricer<'a> {
    /// A pricer for layouts whose matrix products are in `format`.
    ///
    /// # Errors
    /// If the accelerator states no peak for 16-bit products.
    pub fn new(problem: &'a Problem, format: NumberFormat) -> Result<Self> {
        let accelerator = &problem.cluster.accelerator;
        let lacks =
            || Error::user(format!("accelerator {} has no bf16 peak in the catalogue", accelerator.name));
        let chip = Chip::of(accelerator, format).ok_or_else(lacks)?;
        let chip16 = Chip::of(accelerator, NumberFormat::Bf16).ok_or_else(lacks)?;
        let tokens = problem.sequences as f64 * problem.sequence as f64;
        Ok(Pricer {
            net: NetworkModel::of(&problem.cluster),
            chip,
            chip16,
            templates: HashMap::new(),
            timed: HashMap::new(),
            expert_layers: problem.shape.expert_layers() as f64,
            flops: problem.shape.flops_per_token(problem.sequence as f64, true) * tokens,
            problem,
        })
    }

    /// Uses templates folded before: they do not depend on machines or constants.
    #[must_use]
    pub fn with_templates(mut self, templates: HashMap<Key, Arc<Template>>) -> Self {
        self.templates = templates;
        self
    }

    /// The templates folded so far.
    pub fn templates(self) -> HashMap<Key, Arc<Template>> {
        self.templates
    }

    fn key(&self, mesh: &Mesh) -> Key {
        let l = &mesh.layout;
        Key {
            tp: l.tp,
            cp: mesh.cp,
            ep: mesh.ep,
            sequence_parallel: l.sequence_parallel,
            micro_batch: l.micro_batch,
            recompute: l.recompute,
            whole_layers: self.problem.software.recompute_whole_layers,
            stops_early: self.problem.software.recompute_stops_early,
            unfused_attention: self.problem.software.attention == AttentionKernel::Unfused,
            sequence: self.problem.sequence,
        }
    }

    /// Prices one layout.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn price(&mut self, mesh: &Mesh) -> Result<Price> {
        let timed = self.timed(mesh)?;
        Ok(self.combine(mesh, &timed))
    }

    /// What all layouts share that differ from `mesh` only in dp, pp, schedule, chunks, ZeRO stage and placement.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn shared(&mut self, mesh: &Mesh) -> Result<Shared> {
        Ok(Shared(self.timed(mesh)?))
    }

    /// Prices one layout from what it shares with others.
    pub fn price_shared(&self, mesh: &Mesh, shared: &Shared) -> Price {
        self.combine(mesh, &shared.0)
    }

    /// A time that no price of this layout is below, and its bytes: compute of the fullest stage, once for each
    /// micro-batch, without communication, bubble, host or optimiser.
    pub fn bound(&self, mesh: &Mesh, shared: &Shared) -> (f64, f64) {
        let t = &shared.0;
        let p = self.problem;
        let l = &mesh.layout;
        let micro_batches = (p.sequences as f64 / (l.dp * l.micro_batch) as f64).max(1.0);
        let layers = p.shape.model.layers;
        let mix = self.expert_layers / layers as f64;
        let (most, _) = stage_layers(mesh, layers, &p.software);
        let compute = |s: &Passes| s.forward.compute() + s.backward.compute();
        let stage = most * (compute(&t.layer) * (1.0 - mix) + compute(&t.expert_layer) * mix);
        (stage * micro_batches, self.memory(mesh, t, most, micro_batches, mix).total())
    }

    fn timed(&mut self, mesh: &Mesh) -> Result<Timed> {
        let key = self.key(mesh);
        let timed_key = TimedKey { key, format: mesh.format, tp_stride: 1 };
        if let Some(timed) = self.timed.get(&timed_key) {
            return Ok(*timed);
        }
        let template = match self.templates.get(&key) {
            Some(t) => Arc::clone(t),
            None => {
                let t = Arc::new(Template::build(&self.problem.shape, &key)?);
                self.templates.insert(key, Arc::clone(&t));
                t
            }
        };
        let links = Links::of(&self.problem.cluster, &self.net, mesh);
        let timed = Timed {
            embed: self.passes(&template.embed, mesh, &links),
            layer: self.passes(&template.layer, mesh, &links),
            expert_layer: template
                .expert_layer
                .as_ref()
                .map(|s| self.passes(s, mesh, &links))
                .unwrap_or_default(),
            head: self.passes(&template.head, mesh, &links),
            boundary: template.boundary_bytes,
        };
        self.timed.insert(timed_key, timed);
        Ok(timed)
    }

    fn passes(&self, s: &Section, mesh: &Mesh, links: &Links) -> Passes {
        let forward = self.times(&s.forward, mesh, links);
        let weight = self.times(&s.weight, mesh, links);
        let mut backward = self.times(&s.input, mesh, links);
        backward.add(&weight, 1.0);
        let hide = |t: &mut Times| {
            let p = self.problem;
            // Between nodes nothing hides: the kernels that do it move data by loads and stores.
            if p.software.overlap_tp && mesh.layout.tp > 1 && links.tp.0.domains <= 1.0 {
                // Pieces of a gather arrive while others are multiplied: the first piece shows, and what is longer
                // than half of the products beside it.
                let first = t.tensor / mesh.layout.tp as f64;
                t.tensor = first + (t.tensor - first - 0.5 * t.gemm).max(0.0);
                t.spent += 0.5 * t.gemm;
            }
            // A ring of keys and values hides behind the attention of the piece before.
            let first = t.context / mesh.cp as f64;
            t.context = first + (t.context - first - t.attention).max(0.0);
            if mesh.cp > 1 {
                t.spent += t.attention;
            }
            let overlaps = match p.software.overlap_experts {
                Overlap::Never => false,
                Overlap::BetweenNodes => links.ep.0.domains > 1.0,
                Overlap::Always => true,
            };
            if overlaps && t.expert > 0.0 {
                let free = 0.8 * (t.compute() - t.spent);
                t.expert = (t.expert - free).max(0.1 * t.expert);
                t.spent += free;
            }
        };
        let mut p = Passes {
            forward,
            backward,
            weight: weight.compute(),
            params: s.params,
            expert_params: s.expert_params,
            kept: s.kept_bytes,
            working: s.working_bytes,
        };
        p.forward.kernels += s.launches;
        p.backward.kernels += s.launches;
        hide(&mut p.forward);
        hide(&mut p.backward);
        p
    }

    fn times(&self, tasks: &[Task], mesh: &Mesh, links: &Links) -> Times {
        let mut t = Times::default();
        for task in tasks {
            t.kernels += LAUNCHES_PER_TASK;
            match *task {
                Task::Gemm { m, n, k, batch, bytes, head } => {
                    t.gemm += self.gemm(m, n, k, batch, bytes, head, &mut t.stream, mesh)
                }
                Task::Attention { flops, bytes, scores, backward } => {
                    t.attention += self.attention(flops, bytes, scores, backward, mesh.cp);
                }
                Task::Stream { bytes } => {
                    t.stream += stream_s(&self.chip16, bytes) / self.problem.constants.stream
                }
                Task::Talk { what, axis, bytes } => {
                    let gathers = axis == TalkAxis::Tp && what == Collective::AllGather;
                    let bytes = if gathers { bytes * self.gathered_bytes(mesh) / 2.0 } else { bytes };
                    let (span, size) = links.get(axis);
                    let priced = match (axis, self.problem.shape.experts) {
                        (TalkAxis::Ep, Some(e)) => dispatch(&self.net, span, size, bytes, e.top_k),
                        _ => on_span(&self.net, what, span, size, bytes),
                    };
                    let s = priced.latency_s
                        + (priced.seconds - priced.latency_s) / self.problem.constants.network;
                    match axis {
                        TalkAxis::Tp => t.tensor += s,
                        TalkAxis::Cp => t.context += s,
                        TalkAxis::Ep => t.expert += s,
                    }
                }
            }
        }
        t
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
        mesh: &Mesh,
    ) -> f64 {
        let low = !head && mesh.format.bytes() < 2.0;
        let chip = if low { &self.chip } else { &self.chip16 };
        let rows = if batch > 1.0 {
            // Tiles of different experts run side by side, each padded on its own.
            (m / 128.0).ceil() * 128.0 * batch
        } else {
            m
        };
        let bytes = if low { bytes * (0.5 + mesh.format.bytes() / 4.0) } else { bytes };
        if low {
            // Inputs are cast, and transposed for the other pass: read in 16 bit, written twice.
            *stream += stream_s(&self.chip16, m * k * batch * (2.0 + 2.0 * mesh.format.bytes()))
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

    fn attention(&self, flops: f64, bytes: f64, scores: f64, backward: bool, cp: usize) -> f64 {
        let c = &self.problem.constants;
        let dim = self.problem.shape.latent.map_or(self.problem.shape.model.head_dim, |l| l.key_dim()) as f64;
        // Tensor units want rows of 16 bytes; libraries fall back to slower kernels without (head width 150 in BLOOM's
        // layout tests).
        let misaligned = if (dim / 8.0).fract() > 1e-6 { 6.0 } else { 1.0 };
        if self.problem.software.attention == AttentionKernel::Unfused {
            // The whole square is computed (backward four products instead of five), and scores pass through memory:
            // written, scaled and masked, softmax, dropout, read again.
            let products = if backward { 1.6 * flops } else { 2.0 * flops };
            let traffic = scores * if backward { 13.0 } else { 9.0 };
            let took = products * misaligned / (self.chip16.matmul * c.gemm * 0.75)
                + stream_s(&self.chip16, traffic);
            return took * crate::calibration::PRIOR.attention / c.attention;
        }
        let sequence = self.problem.sequence as f64 / cp as f64;
        let tuned = self.problem.software.attention == AttentionKernel::Tuned;
        let rate = self.chip16.attention(tuned, sequence, dim, backward) * c.attention;
        (flops / rate).max(stream_s(&self.chip16, bytes))
    }

    /// Adds up a step.
    fn combine(&self, mesh: &Mesh, t: &Timed) -> Price {
        let p = self.problem;
        let c = &p.constants;
        let l = &mesh.layout;
        let micro_batches = (p.sequences as f64 / (l.dp * l.micro_batch) as f64).max(1.0);
        let (pp, chunks) = (l.pp as f64, l.chunks as f64);
        let layers = p.shape.model.layers as f64;
        let mix = self.expert_layers / layers;
        let (most, last) = stage_layers(mesh, p.shape.model.layers, &p.software);

        // One micro-batch on the stage that takes longest: a middle one, or the last one with the head.
        let stage = |count: f64, embed: bool, head: bool| {
            let (mut f, mut b, mut w) = (Times::default(), Times::default(), 0.0);
            let sections = [
                (&t.layer, count * (1.0 - mix)),
                (&t.expert_layer, count * mix),
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
        };
        let host = |t: &Times| self.host_wait(t);
        let shown = |t: &Times| t.busy() + host(t);
        let single = l.pp == 1;
        let middle = stage(most, single, single);
        let end = if single { middle } else { stage(last, false, true) };
        let begin = if single { middle } else { stage(most, true, false) };
        let time = |s: &(Times, Times, f64)| shown(&s.0) + shown(&s.1);
        let slowest =
            [middle, begin, end].into_iter().max_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(middle);
        let (f, b, _) = slowest;

        let mut d = Breakdown {
            gemm_s: (f.gemm + b.gemm) * micro_batches,
            attention_s: (f.attention + b.attention) * micro_batches,
            stream_s: (f.stream + b.stream) * micro_batches,
            host_s: (host(&f) + host(&b)) * micro_batches,
            tensor_s: (f.tensor + b.tensor) * micro_batches,
            context_s: (f.context + b.context) * micro_batches,
            expert_s: (f.expert + b.expert) * micro_batches,
            ..Breakdown::default()
        };

        // Messages between stages.
        let mut hop_s = 0.0;
        if l.pp > 1 {
            let span = Span::of(&p.cluster, &self.net, Group { size: 2, stride: mesh.pp_stride() });
            // Without sequence parallelism each tensor rank sends its share and the receiver gathers.
            let bytes = if l.sequence_parallel { t.boundary } else { t.boundary / l.tp as f64 };
            let priced = on_span(&self.net, Collective::Send, &span, 2, bytes);
            hop_s = priced.latency_s + (priced.seconds - priced.latency_s) / c.network;
            let hidden = p.software.overlap_p2p && l.chunks > 1;
            d.pipeline_s =
                if hidden { 2.0 * (pp - 1.0) * hop_s } else { 2.0 * hop_s * chunks * micro_batches };
        }
        if l.pp > 1 {
            d.bubble_s = (pp - 1.0) * hop_s
                + wait_s(&Pipeline {
                    schedule: l.schedule,
                    stages: pp,
                    chunks,
                    micro_batches,
                    slowest_s: time(&slowest),
                    weight_s: slowest.2,
                    others_s: (pp - 2.0).max(0.0) * time(&middle) + time(&begin) + time(&end)
                        - time(&slowest),
                });
        }
        self.data_parallel(mesh, t, most, &slowest, micro_batches, mix, &mut d);
        d.step_s = c.step_s;
        let nodes = (mesh.world() as f64 / p.cluster.per_node as f64).max(1.0);
        let busy = d.parts().iter().map(|p| p.1).sum::<f64>();
        d.straggler_s = busy * NODE_SPREAD * (2.0 * nodes.ln()).sqrt();
        let step_s = busy + d.straggler_s;
        let memory = self.memory(mesh, t, most, micro_batches, mix);
        let peak = self.chip.peak * mesh.world() as f64;
        let room = p.cluster.accelerator.memory_bytes.value;
        Price { step_s, mfu: self.flops / step_s / peak, breakdown: d, memory, fits: memory.total() <= room }
    }

    /// Bytes of an element where activations and parameters are gathered.
    fn gathered_bytes(&self, mesh: &Mesh) -> f64 {
        if self.problem.software.low_precision_gathers { mesh.format.bytes().min(2.0) } else { 2.0 }
    }

    /// The accelerator waits where kernels take longer to launch than to run.
    fn host_wait(&self, t: &Times) -> f64 {
        if !self.problem.software.eager {
            return 0.0;
        }
        (t.kernels * self.problem.constants.host_s - t.busy()).max(0.0)
    }

    /// Gradients, sharded parameters and the optimiser.
    fn data_parallel(
        &self,
        mesh: &Mesh,
        t: &Timed,
        most: f64,
        slowest: &(Times, Times, f64),
        micro_batches: f64,
        mix: f64,
        d: &mut Breakdown,
    ) {
        let p = self.problem;
        let (c, l, software) = (&p.constants, &mesh.layout, &p.software);
        let replicas = l.dp * mesh.cp;
        let all = Group { size: replicas, stride: mesh.dp_stride() };
        let near_by = Span::of(&p.cluster, &self.net, all).domains <= 1.0;
        let tax = if near_by { OVERLAP_TAX } else { OVERLAP_TAX_FAR };
        let tables = if l.pp == 1 {
            t.embed.params + t.head.params * f64::from(u8::from(!p.shape.model.tied_embeddings))
        } else {
            t.embed.params
        };
        let dense = most * ((1.0 - mix) * t.layer.params + mix * t.expert_layer.params) + tables;
        let experts = most * mix * t.expert_layer.expert_params;
        let shard = mesh.shard.clamp(1, replicas);
        let stride = (mesh.dp_stride() / mesh.cp).max(1);
        let units = (most + 1.0).max(2.0);
        let calls = if l.zero == Zero::Parameters { units } else { BUCKETS };
        let talk = |what, group: Group, bytes: f64| {
            let span = Span::of(&p.cluster, &self.net, group);
            let span = if software.flat_collectives {
                Span { outside_rate: span.outside_rate / span.inside, ..span }
            } else {
                span
            };
            let priced = on_span(&self.net, what, &span, group.size, bytes);
            priced.latency_s * calls + (priced.seconds - priced.latency_s) / c.network
        };
        let all = Group { size: replicas, stride };
        let near = Group { size: shard, stride };
        let far = Group { size: replicas / shard, stride: stride * shard };
        let expert_group = Group { size: (replicas * l.tp / mesh.ep).max(1), stride: mesh.ep };
        // Megatron sums 16-bit floating point gradients as they are, bfloat16 ones in 32 bit.
        let grad = if mesh.format == NumberFormat::Fp16 {
            software.grad_wire_bytes.min(2.0)
        } else {
            software.grad_wire_bytes
        };
        let free = |t: &Times| (t.compute() - t.spent).max(0.0) + self.host_wait(t);
        let (forward_s, backward_s) = (free(&slowest.0), free(&slowest.1));

        if l.zero == Zero::Parameters {
            // Gathered forward and backward for every micro-batch, gradients scattered; the next unit's gather runs
            // beside this unit's compute.
            let gather = talk(Collective::AllGather, near, self.gathered_bytes(mesh) * dense);
            let scatter = talk(Collective::ReduceScatter, near, grad * dense)
                + talk(Collective::AllReduce, far, grad * dense / shard as f64) / micro_batches;
            let exposed = |comm: f64, compute: f64| {
                if software.overlap_params {
                    comm / units + (comm * (1.0 - 1.0 / units) - compute).max(0.0) + tax * comm.min(compute)
                } else {
                    comm
                }
            };
            d.data_s = (exposed(gather, forward_s) + exposed(gather + scatter, backward_s)) * micro_batches;
        } else {
            let reduce = if l.zero == Zero::Off {
                talk(Collective::AllReduce, all, grad * dense)
            } else {
                talk(Collective::ReduceScatter, near, grad * dense)
                    + talk(Collective::AllReduce, far, grad * dense / shard as f64)
            } + talk(Collective::AllReduce, expert_group, grad * experts);
            let gather = if l.zero == Zero::Off {
                0.0
            } else {
                talk(Collective::AllGather, near, self.gathered_bytes(mesh) * dense)
                    + talk(Collective::AllGather, expert_group, 2.0 * experts)
            };
            // Under ZeRO 2 every micro-batch's gradients are scattered.
            let times = if l.zero == Zero::Gradients { micro_batches } else { 1.0 };
            let exposed = |comm: f64, window: f64, overlap: bool| {
                if overlap {
                    (comm / BUCKETS.max(1.0)).max(comm - window) + tax * comm.min(window)
                } else {
                    comm
                }
            };
            // With chunks the gradients of early ones are ready while later ones still run.
            let chunks = l.chunks as f64;
            let share =
                if l.chunks > 1 { micro_batches.min(l.pp as f64) * (chunks - 1.0) / chunks } else { 0.9 };
            let window = backward_s * share;
            d.data_s = exposed(reduce, window, software.overlap_grads) * times
                + exposed(gather, forward_s * share, software.overlap_params);
        }
        // Gradient, master and two moments read and written in 32 bit, parameters in 16; norm reads gradients again.
        let owners = if l.zero == Zero::Off { 1.0 } else { shard as f64 };
        let expert_owners = if l.zero == Zero::Off { 1.0 } else { expert_group.size as f64 };
        let elements = dense / owners + experts / expert_owners;
        d.optimizer_s = stream_s(&self.chip16, elements * 34.0 + 4.0 * (dense + experts)) / c.stream.min(1.0);
    }

    fn memory(&self, mesh: &Mesh, t: &Timed, most: f64, micro_batches: f64, mix: f64) -> MemoryUse {
        let l = &mesh.layout;
        let replicas = l.dp * mesh.cp;
        let both = l.pp == 1;
        let head = if both && self.problem.shape.model.tied_embeddings { 0.0 } else { t.head.params };
        let tables = if both { t.embed.params + head } else { t.embed.params.max(head) };
        let dense = most * ((1.0 - mix) * t.layer.params + mix * t.expert_layer.params) + tables;
        let experts = most * mix * t.expert_layer.expert_params;
        let shard = mesh.shard.clamp(1, replicas) as f64;
        let expert_shard = ((replicas * l.tp) as f64 / mesh.ep as f64).max(1.0);
        let over = |stage: Zero| {
            if l.zero >= stage { dense / shard + experts / expert_shard } else { dense + experts }
        };
        let kept = (1.0 - mix) * t.layer.kept + mix * t.expert_layer.kept;
        // Inputs of products are kept in the products' format: about half of what is kept.
        let kept = if mesh.format.bytes() < 2.0 { kept * 0.75 } else { kept };
        let (pp, chunks) = (l.pp as f64, l.chunks as f64);
        // A counter over the micro-batches holds one partial sum for each of its digits.
        let sums = if self.problem.software.tree_sums {
            prime_factors(micro_batches as usize).max(1.0)
        } else {
            1.0
        };
        let in_flight = match l.schedule {
            spec::PipelineSchedule::Gpipe => micro_batches,
            _ if l.chunks > 1 => ((2.0 * (pp - 1.0) + (chunks - 1.0) * pp + 1.0) / chunks).min(micro_batches),
            _ => pp.min(micro_batches),
        };
        let activations = in_flight * (most * kept + t.embed.kept);
        let gathered = if l.zero == Zero::Parameters { 2.0 * 2.0 * dense / most.max(1.0) } else { 0.0 };
        let working = t.layer.working.max(t.expert_layer.working).max(t.head.working) + gathered;
        let framework = if self.chip.systolic {
            COMPILED_BYTES
        } else {
            FRAMEWORK_BYTES + FRAGMENTATION * (activations + working)
        };
        MemoryUse {
            params: 2.0 * over(Zero::Parameters),
            grads: 4.0 * over(Zero::Gradients) * sums,
            optimizer: 12.0 * over(Zero::Optimizer),
            activations,
            working,
            framework,
        }
    }
}

/// All-to-all of tokens to experts: a token goes to each domain once, however many of its experts are there, and is
/// handed on inside.
fn dispatch(
    net: &NetworkModel,
    span: &Span,
    size: usize,
    bytes: f64,
    top_k: usize,
) -> crate::network::Priced {
    let k = span.domains;
    if k <= 1.0 {
        return on_span(net, Collective::AllToAll, span, size, bytes);
    }
    let reached = k * (1.0 - (1.0 - 1.0 / k).powi(top_k as i32)) / top_k as f64;
    let slim = Span { outside_rate: span.outside_rate / reached, ..*span };
    on_span(net, Collective::AllToAll, &slim, size, bytes)
}

/// Groups that talk inside layers, on their links.
struct Links {
    tp: (Span, usize),
    cp: (Span, usize),
    ep: (Span, usize),
}

impl Links {
    fn of(cluster: &Cluster, net: &NetworkModel, mesh: &Mesh) -> Self {
        let tp = mesh.layout.tp;
        let span = |size, stride| (Span::of(cluster, net, Group { size, stride }), size);
        // Experts are not cut by tensor parallelism: their ranks are the innermost ones.
        Links { tp: span(tp, 1), cp: span(mesh.cp, tp), ep: span(mesh.ep, 1) }
    }

    fn get(&self, axis: TalkAxis) -> (&Span, usize) {
        let (span, size) = match axis {
            TalkAxis::Tp => &self.tp,
            TalkAxis::Cp => &self.cp,
            TalkAxis::Ep => &self.ep,
        };
        (span, *size)
    }
}

/// How many prime factors a number has, counted with their multiplicity.
fn prime_factors(mut n: usize) -> f64 {
    let (mut count, mut factor) = (0.0, 2);
    while factor * factor <= n {
        while n.is_multiple_of(factor) {
            n /= factor;
            count += 1.0;
        }
        factor += 1;
    }
    if n > 1 { count + 1.0 } else { count }
}

/// Layers of the fullest stage and of the last one.
fn stage_layers(mesh: &Mesh, layers: usize, software: &Software) -> (f64, f64) {
    let l = &mesh.layout;
    let virtuals = l.pp * l.chunks;
    let own = |s: usize, of: &dyn Fn(usize) -> usize| (0..l.chunks).map(|c| of(c * l.pp + s)).sum::<usize>();
    if l.stage_layers.len() == virtuals {
        let of = |v: usize| l.stage_layers[v];
        let most = (0..l.pp).map(|s| own(s, &of)).max().unwrap_or(layers);
        return (most as f64, own(l.pp - 1, &of) as f64);
    }
    // Some stacks let the embedding and the head count as a layer each: their chunks may hold nothing else.
    if software.name == "phalanx" || layers + 2 < virtuals {
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
