//! The step program folded into what estimating needs: the tasks of one layer, of the embedding and of the head.
//!
//! A layout of a thousand stages and micro-batches repeats the same few blocks. [`Template::build`] compiles the real
//! program of a stand-in with few layers on two stages with the same local shapes and takes its ops apart by section;
//! estimating then multiplies. Layers with and without experts have a stand-in each.

mod stand_in;
mod tasks;

use spec::{ContextMode, DType, Layout, Recompute, Result};

use crate::network::Collective;
use crate::shape::Shape;
use stand_in::StandIn;
pub use tasks::tasks;

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
        /// Bytes of all operands.
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
    /// The former that Muon would update.
    pub hidden: Hidden,
    /// The latter that it would.
    pub expert_hidden: Hidden,
    /// The former that ops read.
    pub reads: Reads,
    /// The latter that ops read.
    pub expert_reads: Reads,
    /// Bytes that one micro-batch in flight keeps.
    pub kept_bytes: f64,
    /// Bytes of the largest working set beside what is kept.
    pub working_bytes: f64,
    /// Kernels that an eager stack launches beyond [`LAUNCHES_PER_TASK`] for each task, in each pass.
    pub launches: f64,
}

/// Matrices inside layers, which Muon orthogonalises whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hidden {
    /// Elements of this rank.
    pub elements: f64,
    /// Of these the elements of matrices that lie in parts on the ranks of a tensor group: all but those of heads.
    pub spread: f64,
    /// FLOPs of orthogonalising all of which it holds a part.
    pub flops: f64,
}

/// Elements of parameters that the passes over a micro-batch read: what ZeRO 3 gathers for them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reads {
    /// The forward pass.
    pub forward: f64,
    /// The backward pass with the gradients of weights in it.
    pub backward: f64,
    /// The backward pass without them.
    pub input: f64,
    /// The gradients of weights as a pass of their own.
    pub weight: f64,
}

impl Reads {
    /// Everything behind the forward pass; `split` where weight gradients are a pass of their own.
    pub(crate) fn behind(&self, split: bool) -> f64 {
        if split { self.input + self.weight } else { self.backward }
    }
}

/// Kernels that an eager stack launches for what the program fuses into one op.
pub const LAUNCHES_PER_TASK: f64 = 2.5;
/// Kernels and waits of the host for routing, permutation and token counts of one expert layer, in each pass.
const EXPERT_LAUNCHES: f64 = 250.0;

/// Kernels and waits of the host around one micro-batch in each pass: its tokens, masks and positions, its loss.
const MICRO_BATCH_LAUNCHES: f64 = 60.0;

/// What a template depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Context-parallel ranks.
    pub cp: usize,
    /// How they attend.
    pub context: ContextMode,
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
    /// Of parameters and activations.
    pub precision: DType,
}

impl Key {
    /// One rank, one sequence of so many tokens at once in bf16, all kept: what others are like but for a few fields.
    pub fn alone(sequence: usize) -> Self {
        Key {
            tp: 1,
            cp: 1,
            context: ContextMode::Ring,
            ep: 1,
            sequence_parallel: false,
            micro_batch: 1,
            recompute: Recompute::None,
            whole_layers: false,
            stops_early: false,
            unfused_attention: false,
            sequence,
            precision: DType::Bf16,
        }
    }

    /// A rank of a layout, of the same kind otherwise.
    pub fn of(layout: &Layout, sequence: usize) -> Self {
        Key {
            tp: layout.tp,
            cp: layout.cp,
            context: layout.context,
            ep: layout.ep,
            sequence_parallel: layout.sequence_parallel,
            micro_batch: layout.micro_batch,
            recompute: layout.recompute,
            ..Key::alone(sequence)
        }
    }
}

impl std::hash::Hash for Key {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.tp, self.cp, self.context, self.ep, self.micro_batch, self.sequence).hash(state);
        (self.sequence_parallel, self.whole_layers, self.stops_early, self.unfused_attention).hash(state);
        (self.recompute as u8, self.precision).hash(state);
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
    /// Weights of a tied table, which a last stage of its own has a second copy of.
    pub tied_params: f64,
    /// Bytes of the activation between stages.
    pub boundary_bytes: f64,
}

impl Template {
    /// Folds the program for `shape` under `key`.
    ///
    /// # Errors
    /// If the shape does not allow the layout.
    pub fn build(shape: &Shape, key: &Key) -> Result<Self> {
        let with = shape.expert_layers();
        let without = with == 0 || with < shape.model.layers;
        // One head is enough; a layer behind it is of the kind that comes next.
        let behind = shape.model.mtp.is_some() && shape.model.has_experts(shape.model.layers);
        let dense = without.then(|| StandIn::build(shape, key, false, !behind)).transpose()?;
        let expert = (with > 0).then(|| StandIn::build(shape, key, true, behind || !without)).transpose()?;
        let any = dense.as_ref().or(expert.as_ref()).expect("layers are of one kind at least");
        let last = if behind { expert.as_ref().unwrap_or(any) } else { any };
        let mut expert_layer = expert.as_ref().map(StandIn::layer);
        if let Some(layer) = &mut expert_layer {
            layer.launches = EXPERT_LAUNCHES;
        }
        // A model of nothing but experts has no other layer: what is asked of one is asked of those.
        let layer = dense.as_ref().map(StandIn::layer).or_else(|| expert_layer.clone()).unwrap_or_default();
        let mut t = Template {
            embed: any.embed(),
            layer,
            expert_layer,
            head: last.head(),
            tied_params: last.tied_params(),
            boundary_bytes: any.boundary_bytes(),
        };
        let attended = shape.attended(key.sequence);
        for layer in std::iter::once(&mut t.layer).chain(&mut t.expert_layer) {
            clip(layer, attended);
        }
        if key.whole_layers {
            for layer in std::iter::once(&mut t.layer).chain(&mut t.expert_layer) {
                run_again(layer, key, t.boundary_bytes);
            }
            t.head.launches = MICRO_BATCH_LAUNCHES;
            t.head.input = at_once(&t.head.input, (key.micro_batch * key.sequence / key.cp) as f64);
        }
        Ok(t)
    }
}

/// The head's tasks where its `rows` are taken at once: the program takes them in leaves of equal rows, one after
/// another, so that logits need little memory; frameworks launch and send once for all.
fn at_once(tasks: &[Task], rows: f64) -> Vec<Task> {
    let mut out: Vec<(Task, f64)> = Vec::new();
    for task in tasks {
        match out.iter_mut().find(|(seen, _)| seen == task) {
            Some((_, times)) => *times += 1.0,
            None => out.push((*task, 1.0)),
        }
    }
    let whole = |(task, times): (Task, f64)| match task {
        Task::Gemm { m, n, k, batch, bytes, head } if m * times == rows => {
            Task::Gemm { m: rows, n, k, batch, bytes: bytes * times, head }
        }
        Task::Gemm { m, n, k, batch, bytes, head } => {
            Task::Gemm { m, n, k: k * times, batch, bytes: bytes * times, head }
        }
        Task::Attention { flops, bytes, scores, backward } => {
            Task::Attention { flops: flops * times, bytes: bytes * times, scores: scores * times, backward }
        }
        Task::Stream { bytes } => Task::Stream { bytes: bytes * times },
        Task::Talk { what, axis, bytes } => Task::Talk { what, axis, bytes: bytes * times },
    };
    out.into_iter().map(whole).collect()
}

/// Attention over windows: of its FLOPs the share of pairs that are attended to, the mean over layers. Flash kernels
/// skip tiles outside of a window; unfused ones score the whole square all the same.
fn clip(layer: &mut Section, attended: f64) {
    for task in layer.forward.iter_mut().chain(&mut layer.input) {
        if let Task::Attention { flops, .. } = task {
            *flops *= attended;
        }
    }
}

/// What frameworks run again. The program's own recompute is already in its blocks. `boundary` is the bytes of the
/// activation between layers.
fn run_again(layer: &mut Section, key: &Key, boundary: f64) {
    let into_products = |t: &&Task| {
        // Without sequence parallelism only the outcome of sliced experts is gathered, which no product needs again.
        key.sequence_parallel
            && matches!(t, Task::Talk { what: Collective::AllGather, axis: TalkAxis::Tp, .. })
    };
    let gathers: Vec<Task> = layer.forward.iter().filter(into_products).copied().collect();
    for task in gathers {
        // Stacks keep the rank's own rows and gather again for the weight gradients (Korthikanti et al. 2022,
        // section 4.2.2); the program keeps what it gathered.
        if let Task::Talk { bytes, .. } = task {
            layer.kept_bytes -= bytes * (1.0 - 1.0 / key.tp as f64);
            layer.input.push(task);
        }
    }
    match key.recompute {
        Recompute::None => {}
        Recompute::Selective if key.unfused_attention => {
            // Scores, softmax and dropout are not kept but run again (Korthikanti et al. 2022, section 5).
            let again: Vec<Task> =
                layer.forward.iter().filter(|t| matches!(t, Task::Attention { .. })).copied().collect();
            layer.input.splice(0..0, again);
        }
        // Already in the program's blocks.
        Recompute::Selective => {}
        Recompute::Full => {
            let mut again = layer.forward.clone();
            // The outputs of experts are needed: the gradients of their weights in the sum follow from them.
            if key.stops_early
                && layer.expert_params == 0.0
                && let Some(last) = again.iter().rposition(|t| matches!(t, Task::Gemm { .. }))
            {
                again.truncate(last);
            }
            layer.input.splice(0..0, again);
            layer.working_bytes += layer.kept_bytes;
            layer.kept_bytes = boundary;
        }
    }
    if key.unfused_attention && key.recompute == Recompute::None {
        // Softmax output, the mask of its dropout in bytes, and the dropped-out copy (Korthikanti et al. 2022: 5 a s^2 b
        // bytes in 16 bit).
        let scores: f64 = layer
            .forward
            .iter()
            .map(|t| match t {
                Task::Attention { scores, .. } => *scores,
                _ => 0.0,
            })
            .sum();
        layer.kept_bytes += (2.0 * key.precision.bytes() as f64 + 1.0) * scores;
    }
}

#[cfg(test)]
mod tests;
