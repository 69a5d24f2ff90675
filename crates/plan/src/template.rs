//! The step program folded into what pricing needs: the tasks of one layer, of the embedding and of the head.
//!
//! A layout of a thousand stages and micro-batches repeats the same few blocks. [`Template::build`] compiles the real
//! program of a two-layer, two-stage stand-in with the same local shapes and takes its ops apart by section; pricing
//! then multiplies. Layers with experts or latent attention, and context parallelism, do not train yet: their ops are
//! emitted here in the program's style and priced the same way.

use program::{Op, OpKind, Phase, Program, Request};
use spec::{DType, Layout, PipelineSchedule, Recompute, Reduce, Result, Zero};

use crate::network::Collective;
use crate::shape::{Experts, Latent, Shape};

/// One kernel or collective, by what its time depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Task {
    /// A matrix product `[m, k] x [k, n]`.
    Gemm {
        /// Rows.
        m: f64,
        /// Columns.
        n: f64,
        /// Inner dim.
        k: f64,
        /// Of how many weights' worth of tiles side by side (experts).
        batch: f64,
        /// Bytes of all operands in 16 bit.
        bytes: f64,
        /// The output projection, which recipes keep in 16 bit.
        head: bool,
    },
    /// Causal attention; FLOPs at the causal half.
    Attention {
        /// Multiplications and additions.
        flops: f64,
        /// Bytes of operands.
        bytes: f64,
        /// Elements of the whole square of scores, were they kept.
        scores: f64,
        /// Gradients.
        backward: bool,
    },
    /// A kernel that streams through memory.
    Stream {
        /// Bytes read and written.
        bytes: f64,
    },
    /// Ranks of an axis talk.
    Talk {
        /// What they do.
        what: Collective,
        /// Over which axis.
        axis: TalkAxis,
        /// Bytes of the whole vector (see [`crate::network`]).
        bytes: f64,
    },
}

/// Axes that talk inside a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TalkAxis {
    /// Tensor parallel.
    Tp,
    /// Context parallel.
    Cp,
    /// Expert parallel.
    Ep,
}

/// The tasks of one section of the model for one micro-batch on one rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Section {
    /// Forward.
    pub forward: Vec<Task>,
    /// Gradients of activations, and what is recomputed for them.
    pub input: Vec<Task>,
    /// Gradients of weights.
    pub weight: Vec<Task>,
    /// Weights of this rank that every data-parallel rank has.
    pub params: f64,
    /// Expert weights of this rank.
    pub expert_params: f64,
    /// Bytes that one micro-batch in flight keeps, in 16-bit precision.
    pub kept_bytes: f64,
    /// Bytes of the largest working set beside what is kept.
    pub working_bytes: f64,
    /// Kernels that an eager stack launches beyond [`LAUNCHES_PER_TASK`] for each task, in each pass.
    pub launches: f64,
}

/// Kernels that an eager stack launches for what the program fuses into one op.
pub const LAUNCHES_PER_TASK: f64 = 2.5;
/// Kernels and waits of the host for routing, permutation and token counts of one expert layer, in each pass.
const EXPERT_LAUNCHES: f64 = 250.0;

/// What a template depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Context-parallel ranks.
    pub cp: usize,
    /// Expert-parallel ranks.
    pub ep: usize,
    /// Residual stream split along the sequence between tensor-parallel regions.
    pub sequence_parallel: bool,
    /// Sequences at once.
    pub micro_batch: usize,
    /// What is recomputed.
    pub recompute: Recompute,
    /// Recompute runs whole layers again, as frameworks do; the program only what backward needs.
    pub whole_layers: bool,
    /// Recompute ends before the last product of a layer, whose output no gradient needs.
    pub stops_early: bool,
    /// Scores live in memory.
    pub unfused_attention: bool,
    /// Tokens of a sequence.
    pub sequence: usize,
}

impl std::hash::Hash for Key {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.tp, self.cp, self.ep, self.micro_batch, self.sequence).hash(state);
        (self.sequence_parallel, self.whole_layers, self.stops_early, self.unfused_attention).hash(state);
        (self.recompute as u8).hash(state);
    }
}

/// The sections of a model under one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    /// Token embedding.
    pub embed: Section,
    /// A layer without experts.
    pub layer: Section,
    /// A layer with experts.
    pub expert_layer: Option<Section>,
    /// Final norm, output projection and loss.
    pub head: Section,
    /// Bytes of the activation between stages.
    pub boundary_bytes: f64,
}

impl Template {
    /// Folds the program for `shape` under `key`.
    ///
    /// # Errors
    /// If the shape does not allow the layout.
    pub fn build(shape: &Shape, key: &Key) -> Result<Self> {
        let mut model = shape.model.clone();
        model.layers = 4;
        // Fewer key and value heads than ranks: each rank holds a copy of one.
        model.kv_heads = model.kv_heads.max(key.tp);
        model.heads = model.heads.next_multiple_of(model.kv_heads);
        model.ffn = model.ffn.next_multiple_of(key.tp);
        let tokens = key.sequence.div_ceil(key.cp);
        let tokens = if key.sequence_parallel { tokens.next_multiple_of(key.tp) } else { tokens };
        if let spec::Position::Learned { max_positions } = &mut model.position {
            *max_positions = (*max_positions).max(tokens);
        }
        // Frameworks rerun whole layers: their backward is the plain one with the forward pass in front.
        // Norms and activations run again alike in both.
        let whole = key.whole_layers && (key.recompute == Recompute::Full || key.unfused_attention);
        let recompute = if whole { Recompute::None } else { key.recompute };
        let layout = Layout {
            dp: 1,
            tp: key.tp,
            pp: 2,
            sequence_parallel: key.sequence_parallel,
            zero: Zero::Off,
            schedule: PipelineSchedule::OneFOneB,
            chunks: 1,
            stage_layers: Vec::new(),
            micro_batch: key.micro_batch,
            recompute,
            reduce: Reduce::Ring,
        };
        let request = |rank, layers: usize| {
            let model = spec::ModelSpec { layers, ..model.clone() };
            let request = Request {
                model: &model,
                layout: &layout,
                sequence: tokens,
                sequences: 2 * key.micro_batch,
                precision: DType::Bf16,
                rank,
                cache: 0,
            };
            Program::build(&request, &|_, _| 0)
        };
        let first = request(0, 4)?;
        let shorter = request(0, 2)?;
        let last = request(key.tp, 4)?;
        let mut t = Template {
            embed: section(&first, |name| name.starts_with("embed") || name.starts_with("pos_embed")),
            layer: section(&first, |name| name.starts_with("layers.0.")),
            expert_layer: None,
            head: section(&last, |name| name.starts_with("head") || name.starts_with("final_norm")),
            boundary_bytes: boundary(&first),
        };
        let slot = |p: &Program| p.slot_bytes.first().map_or(0.0, |s| s.0 as f64);
        t.layer.kept_bytes = slot(&first) - slot(&shorter);
        t.embed.kept_bytes = (slot(&shorter) - t.layer.kept_bytes).max(0.0);
        t.layer.working_bytes = first.memory.scratch as f64;
        t.head.working_bytes = last.memory.scratch as f64;
        let of = |p: &Program, part: &dyn Fn(&str) -> bool| -> f64 {
            p.groups.iter().filter(|g| part(&g.name)).map(|g| g.len() as f64).sum()
        };
        t.layer.params = of(&first, &|n| n.starts_with("layers.0."));
        t.embed.params = of(&first, &|n| n.starts_with("embed") || n.starts_with("pos_embed"));
        t.head.params =
            of(&last, &|n| n.starts_with("head") || n.starts_with("embed") || n.starts_with("final"));
        let emit = Emit { shape, key, tokens: (tokens * key.micro_batch) as f64 };
        if let Some(latent) = shape.latent {
            emit.latent(&mut t.layer, latent, &first);
        }
        emit.context(&mut t.layer);
        if let Some(experts) = shape.experts {
            t.expert_layer = Some(emit.experts(&t.layer, experts, &first));
        }
        for layer in std::iter::once(&mut t.layer).chain(&mut t.expert_layer) {
            emit.recompute(layer);
        }
        Ok(t)
    }
}

/// The ops of a program whose names fit, by phase.
fn section(p: &Program, part: impl Fn(&str) -> bool) -> Section {
    let mut blocks: Vec<usize> = p.schedule.iter().map(|item| item.block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let mut s = Section::default();
    for op in blocks.iter().flat_map(|b| &p.blocks[*b].ops).filter(|op| part(&op.name)) {
        let Some(task) = task(p, op) else { continue };
        match op.phase {
            Phase::Forward => s.forward.push(task),
            Phase::Input => s.input.push(task),
            Phase::Weight => s.weight.push(task),
        }
    }
    s
}

/// What an op's time depends on; `None` if it takes none.
pub fn task(p: &Program, op: &Op) -> Option<Task> {
    let rows = |i: usize| op.ins[i].rows as f64;
    let cols = |i: usize| p.buffer(op.ins[i].buffer).cols as f64;
    let bytes = op.cost.bytes as f64;
    let gemm = |m, n, k| Some(Task::Gemm { m, n, k, batch: 1.0, bytes, head: op.name.starts_with("head") });
    match &op.kind {
        OpKind::Linear => gemm(rows(0), rows(1), cols(0)),
        OpKind::LinearGradInput => gemm(rows(0), cols(1), cols(0)),
        OpKind::LinearGradWeight => gemm(cols(0), cols(1), rows(0)),
        OpKind::Attention { heads } | OpKind::AttentionGrad { heads } => Some(Task::Attention {
            flops: op.cost.flops as f64,
            bytes,
            scores: rows(0) * p.sequence as f64 * heads.q as f64,
            backward: matches!(op.kind, OpKind::AttentionGrad { .. }),
        }),
        OpKind::AllReduce { .. } => talk(Collective::AllReduce, op, 1.0),
        OpKind::AllGather { .. } => talk(Collective::AllGather, op, p.layout.tp as f64),
        OpKind::ReduceScatter { .. } => talk(Collective::ReduceScatter, op, 1.0),
        OpKind::Send { .. } | OpKind::Recv { .. } => None,
        kind if kind.is_communication() => None,
        _ => Some(Task::Stream { bytes }),
    }
}

fn talk(what: Collective, op: &Op, times: f64) -> Option<Task> {
    Some(Task::Talk { what, axis: TalkAxis::Tp, bytes: op.cost.wire_bytes as f64 * times })
}

fn boundary(p: &Program) -> f64 {
    let ops = p.blocks.iter().flat_map(|b| &b.ops);
    ops.filter(|op| matches!(op.kind, OpKind::Send { .. }))
        .map(|op| op.cost.wire_bytes as f64)
        .fold(0.0, f64::max)
}

/// Emits what the program does not have yet.
struct Emit<'a> {
    shape: &'a Shape,
    key: &'a Key,
    /// Tokens of a micro-batch on one context-parallel rank.
    tokens: f64,
}

impl Emit<'_> {
    /// `y = x w`: forward, input gradient, weight gradient.
    fn linear(&self, s: &mut Section, m: f64, n: f64, k: f64, batch: f64) {
        let weights = n * k * batch;
        let bytes = 2.0 * (m * k + weights + m * n);
        let gemm = |m, n, k, bytes| Task::Gemm { m, n, k, batch, bytes, head: false };
        s.forward.push(gemm(m, n, k, bytes));
        s.input.push(gemm(m, k, n, bytes));
        // The weight gradient is kept in 32 bit.
        s.weight.push(gemm(n, k, m, bytes + 2.0 * weights));
    }

    fn stream(&self, s: &mut Section, forward: f64, backward: f64) {
        s.forward.push(Task::Stream { bytes: forward });
        s.input.push(Task::Stream { bytes: backward });
    }

    fn exchange(&self, s: &mut Section, what: Collective, axis: TalkAxis, bytes: f64) {
        let back = match what {
            Collective::AllGather => Collective::ReduceScatter,
            Collective::ReduceScatter => Collective::AllGather,
            other => other,
        };
        s.forward.push(Task::Talk { what, axis, bytes });
        s.input.push(Task::Talk { what: back, axis, bytes });
    }

    /// The tasks of `layer` that come from ops of one half (`attn` or `mlp`) of the program's first layer, with norms.
    fn half(&self, p: &Program, half: &str) -> Section {
        section(p, |name| name.starts_with(&format!("layers.0.{half}")))
    }

    /// Multi-head latent attention in place of the dense one; the feed-forward half stays.
    fn latent(&self, layer: &mut Section, l: Latent, p: &Program) {
        let m = &self.shape.model;
        let tp = self.key.tp as f64;
        let (h, heads) = (m.hidden as f64, m.heads as f64 / tp);
        let (q, kv) = (l.query_rank as f64, l.kv_rank as f64);
        let (nope, rope, value) = (l.nope_dim as f64, l.rope_dim as f64, l.value_dim as f64);
        let mlp = self.half(p, "mlp");
        let norm = section(p, |name| name.starts_with("layers.0.attn_norm"));
        let enter = section(p, |name| name.starts_with("layers.0.attn.in"));
        let leave = section(p, |name| {
            name.starts_with("layers.0.attn.o.reduce") || name.starts_with("layers.0.attn.o.add")
        });
        let t = self.tokens;
        let mut s = Section::default();
        for part in [norm, enter, leave, mlp] {
            s.append(part);
        }
        self.linear(&mut s, t, q + kv + rope, h, 1.0);
        self.linear(&mut s, t, heads * (nope + rope), q, 1.0);
        self.linear(&mut s, t, heads * (nope + value), kv, 1.0);
        self.linear(&mut s, t, h, heads * value, 1.0);
        let wide = 2.0 * t * heads * (2.0 * (nope + rope) + value);
        self.stream(&mut s, 2.0 * t * (q + kv) * 2.0 + wide, 2.0 * t * (q + kv) * 3.0 + wide);
        let sequence = self.key.sequence as f64 / self.key.cp as f64;
        let flops = t * sequence * heads * (nope + rope + value);
        let scores = t * sequence * heads;
        s.forward.push(Task::Attention { flops, bytes: wide, scores, backward: false });
        s.input.push(Task::Attention { flops: 2.5 * flops, bytes: 2.0 * wide, scores, backward: true });
        s.params = (self.shape.attention_params() + 3.0 * h * m.ffn as f64) / tp;
        s.kept_bytes = layer.kept_bytes + 2.0 * t * (q + kv);
        s.working_bytes = layer.working_bytes;
        *layer = s;
    }

    /// Ring attention: each rank's queries meet all keys and values, which walk the ring.
    fn context(&self, layer: &mut Section) {
        let cp = self.key.cp as f64;
        if self.key.cp == 1 {
            return;
        }
        for task in layer.forward.iter_mut().chain(&mut layer.input) {
            if let Task::Attention { flops, scores, .. } = task {
                *flops *= cp;
                *scores *= cp;
            }
        }
        let m = &self.shape.model;
        let kv_width = match self.shape.latent {
            Some(l) => m.heads as f64 * (l.nope_dim + l.rope_dim + l.value_dim) as f64,
            None => (2 * m.kv_heads.max(self.key.tp) * m.head_dim) as f64,
        };
        let bytes = 2.0 * self.tokens * cp * kv_width / self.key.tp as f64;
        let talk = |what, bytes| Task::Talk { what, axis: TalkAxis::Cp, bytes };
        layer.forward.push(talk(Collective::AllGather, bytes));
        layer.input.push(talk(Collective::AllGather, bytes));
        layer.input.push(talk(Collective::ReduceScatter, bytes));
    }

    /// A layer with experts: the attention half of the dense one, then route, dispatch, grouped products, combine.
    fn experts(&self, dense: &Section, e: Experts, p: &Program) -> Section {
        let m = &self.shape.model;
        let (h, tp, ep) = (m.hidden as f64, self.key.tp as f64, self.key.ep as f64);
        let mut s = dense.clone();
        // Take the dense feed-forward half out, but keep its norm and its way in and out of tensor parallelism.
        let mlp = section(p, |name| {
            let ops = ["mlp.gate_up", "mlp.up", "mlp.act", "mlp.down"];
            ops.iter().any(|o| name.strip_prefix("layers.0.").is_some_and(|n| n.starts_with(o)))
                && !name.contains(".reduce")
                && !name.contains(".down.add")
        });
        s.remove(&mlp);
        let t = self.tokens;
        let routed = t * e.top_k as f64 / if self.key.tp > 1 { tp } else { 1.0 };
        let local = (e.count as f64 / ep).max(1.0);
        // Balanced routing: as many tokens come in as go out. Experts are not cut by tensor parallelism.
        let per_expert = routed / local;
        self.linear(&mut s, t / tp, e.count as f64, h, 1.0);
        self.stream(&mut s, 2.0 * 2.0 * routed * h, 2.0 * 2.0 * routed * h);
        if self.key.ep > 1 {
            self.exchange(&mut s, Collective::AllToAll, TalkAxis::Ep, 2.0 * routed * h);
        }
        let f = e.ffn as f64;
        let gates = if m.activation.gated() { 2.0 } else { 1.0 };
        self.linear(&mut s, per_expert, gates * f, h, local);
        self.stream(&mut s, 2.0 * routed * f * (gates + 1.0), 2.0 * routed * f * (2.0 * gates + 1.0));
        self.linear(&mut s, per_expert, h, f, local);
        if self.key.ep > 1 {
            self.exchange(&mut s, Collective::AllToAll, TalkAxis::Ep, 2.0 * routed * h);
        }
        self.stream(&mut s, 2.0 * 2.0 * routed * h, 2.0 * 2.0 * routed * h);
        if e.shared_ffn > 0 {
            let f = e.shared_ffn as f64 / tp;
            self.linear(&mut s, t, gates * f, h, 1.0);
            self.stream(&mut s, 2.0 * t * f * (gates + 1.0), 2.0 * t * f * (2.0 * gates + 1.0));
            self.linear(&mut s, t, h, f, 1.0);
        }
        let dense_mlp = (gates + 1.0) * h * m.ffn as f64 / tp;
        s.params =
            dense.params - dense_mlp + (gates + 1.0) * h * e.shared_ffn as f64 / tp + h * e.count as f64;
        s.expert_params = (gates + 1.0) * h * f * local;
        s.launches = EXPERT_LAUNCHES;
        let width = gates * f + f;
        s.kept_bytes = dense.kept_bytes - 2.0 * t * (gates + 1.0) * m.ffn as f64 / tp
            + 2.0 * routed * (2.0 * h + width)
            + 2.0 * t * (gates + 1.0) * e.shared_ffn as f64 / tp;
        s.kept_bytes = s.kept_bytes.max(2.0 * t * h);
        s
    }

    /// What frameworks run again. The program's own recompute is already in its blocks.
    fn recompute(&self, layer: &mut Section) {
        if !self.key.whole_layers {
            return;
        }
        let m = &self.shape.model;
        let gathers: Vec<Task> = layer
            .forward
            .iter()
            .filter(|t| matches!(t, Task::Talk { what: Collective::AllGather, axis: TalkAxis::Tp, .. }))
            .copied()
            .collect();
        for task in gathers {
            // Stacks keep the rank's own rows and gather again for the weight gradients (Korthikanti et al. 2022,
            // section 4.2.2); the program keeps what it gathered.
            if let Task::Talk { bytes, .. } = task {
                layer.kept_bytes -= bytes * (1.0 - 1.0 / self.key.tp as f64);
                layer.input.push(task);
            }
        }
        match self.key.recompute {
            Recompute::None => {}
            Recompute::Selective if self.key.unfused_attention => {
                // Scores, softmax and dropout are not kept but run again (Korthikanti et al. 2022, section 5).
                let again: Vec<Task> =
                    layer.forward.iter().filter(|t| matches!(t, Task::Attention { .. })).copied().collect();
                layer.input.splice(0..0, again);
            }
            // Already in the program's blocks.
            Recompute::Selective => {}
            Recompute::Full => {
                let mut again = layer.forward.clone();
                if self.key.stops_early
                    && let Some(last) = again.iter().rposition(|t| matches!(t, Task::Gemm { .. }))
                {
                    again.truncate(last);
                }
                layer.input.splice(0..0, again);
                let rows =
                    if self.key.sequence_parallel { self.tokens / self.key.tp as f64 } else { self.tokens };
                layer.working_bytes += layer.kept_bytes;
                layer.kept_bytes = 2.0 * rows * m.hidden as f64;
            }
        }
        if self.key.unfused_attention && self.key.recompute == Recompute::None {
            // Softmax output, its dropout mask and the dropped-out copy (Korthikanti et al. 2022: 5 a s^2 b bytes).
            let scores: f64 = layer
                .forward
                .iter()
                .map(|t| match t {
                    Task::Attention { scores, .. } => *scores,
                    _ => 0.0,
                })
                .sum();
            layer.kept_bytes += 5.0 * scores;
        }
    }
}

impl Section {
    fn append(&mut self, other: Section) {
        self.forward.extend(other.forward);
        self.input.extend(other.input);
        self.weight.extend(other.weight);
    }

    /// Takes one copy of each task of `other` out.
    fn remove(&mut self, other: &Section) {
        fn take(from: &mut Vec<Task>, out: &[Task]) {
            for task in out {
                if let Some(at) = from.iter().position(|t| t == task) {
                    from.remove(at);
                }
            }
        }
        take(&mut self.forward, &other.forward);
        take(&mut self.input, &other.input);
        take(&mut self.weight, &other.weight);
    }
}

#[cfg(test)]
mod tests;
