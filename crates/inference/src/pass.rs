//! What one pass takes on a machine under a serving stack.

use plan::compute::Chip;
use plan::network::{Collective, Extent, Group, NetworkModel, on_span};
use plan::shape::Shape;
use serde::Serialize;
use spec::{Cluster, Result};

use crate::format::{Cache, Weights};
use crate::ops::{Forward, Kernel};
use crate::stack::Stack;

/// Rows to which tensor units pad thin products: the narrow side of their tiles (PTX `mma.m16n8k16`).
const TILE_ROWS: f64 = 16.0;
/// Bytes of an activation: 16 bit.
const ACTIVATION_BYTES: f64 = 2.0;

/// What goes through the model together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Batch {
    /// Tokens of prompts.
    pub prompt_tokens: f64,
    /// Keys that each of them attends to, on average.
    pub prompt_keys: f64,
    /// Tokens of the prompt that they belong to: long prompts use the chip better.
    pub prompt: f64,
    /// Prompts that end in this pass.
    pub prompts: f64,
    /// Requests that decode a token each.
    pub decoding: f64,
    /// Tokens that each of them has cached, on average.
    pub cached: f64,
}

impl Batch {
    /// `n` whole prompts of `tokens`.
    pub fn prefill(n: f64, tokens: f64) -> Self {
        let keys = (tokens + 1.0) / 2.0;
        Batch { prompt_tokens: n * tokens, prompt_keys: keys, prompt: tokens, prompts: n, ..Batch::default() }
    }

    /// One token for each of `n` requests with `cached` tokens behind them.
    pub fn decode(n: f64, cached: f64) -> Self {
        Batch { decoding: n, cached, ..Batch::default() }
    }

    /// Rows of the layers' products.
    pub fn tokens(&self) -> f64 {
        self.prompt_tokens + self.decoding
    }

    /// Tokens that come out.
    pub fn sampled(&self) -> f64 {
        self.prompts + self.decoding
    }
}

/// Where the time of a pass goes, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PassTime {
    /// Matrix products: weights read, or arithmetic where that takes longer.
    pub products_s: f64,
    /// Attention: the cache read, or arithmetic.
    pub attention_s: f64,
    /// Kernels that stream activations.
    pub stream_s: f64,
    /// Between kernels: launches, filling and draining.
    pub kernels_s: f64,
    /// Tensor-parallel ranks talking.
    pub talk_s: f64,
    /// The host.
    pub host_s: f64,
}

impl PassTime {
    /// Start to end.
    pub fn total_s(&self) -> f64 {
        self.parts().iter().map(|p| p.1).sum()
    }

    /// Names and seconds.
    pub fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("products", self.products_s),
            ("attention", self.attention_s),
            ("streaming", self.stream_s),
            ("between kernels", self.kernels_s),
            ("tensor parallel", self.talk_s),
            ("host", self.host_s),
        ]
    }

    /// The part that takes most.
    pub fn bound(&self) -> &'static str {
        self.parts().into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("nothing", |p| p.0)
    }
}

/// A model on `tp` accelerators of a machine under a stack.
#[derive(Clone, Debug)]
pub struct Engine {
    /// Kernels of a rank.
    pub forward: Forward,
    /// Format of weights.
    pub weights: Weights,
    /// Format of the cache.
    pub cache: Cache,
    /// The stack.
    pub stack: Stack,
    /// Ranks.
    pub tp: usize,
    /// Rated memory throughput of one accelerator, bytes per second.
    pub bytes_per_s: f64,
    /// For products of layers.
    pub narrow: Chip,
    /// For what stays in 16 bit.
    pub wide: Chip,
    net: NetworkModel,
    span: Extent,
    family: String,
    /// Weights are widened to 16 bit before each product.
    widened: bool,
}

impl Engine {
    /// The engine for `shape` cut over `tp` accelerators.
    ///
    /// # Errors
    /// If the shape cannot be cut so, or the catalogue states no peak for the accelerator.
    pub fn new(
        shape: &Shape,
        cluster: &Cluster,
        tp: usize,
        weights: Weights,
        cache: Cache,
        stack: &Stack,
    ) -> Result<Self> {
        let accelerator = &cluster.accelerator;
        let format = weights.products(accelerator);
        let net = NetworkModel::of(cluster);
        Ok(Engine {
            forward: Forward::of(shape, tp)?,
            weights,
            cache,
            stack: stack.clone(),
            tp,
            bytes_per_s: accelerator.memory_bytes_per_s.value,
            narrow: Chip::of(accelerator, format)?,
            wide: Chip::of(accelerator, accelerator.sixteen_bit())?,
            span: Extent::of(cluster, &net, Group { size: tp, stride: 1 }),
            net,
            family: accelerator.family.name.clone(),
            widened: weights.widened(accelerator),
        })
    }

    /// The same under another stack.
    #[must_use]
    pub fn under(&self, stack: &Stack) -> Self {
        Engine { stack: stack.clone(), ..self.clone() }
    }

    fn reach(&self) -> f64 {
        self.stack.reach(&self.family)
    }

    /// Throughput of weights that are widened first, as a share of plain ones.
    fn widen(&self) -> f64 {
        match self.weights {
            _ if !self.widened => 1.0,
            Weights::Int4 | Weights::Fp4 => self.stack.widen4,
            _ => self.stack.widen8,
        }
    }

    /// What the pass takes.
    pub fn time(&self, batch: &Batch) -> PassTime {
        let mut t = PassTime {
            host_s: 1e-6 * (self.stack.host_us + self.stack.host_request_us * batch.sampled()),
            ..PassTime::default()
        };
        for part in &self.forward.layers {
            self.add(&mut t, part.times, &part.kernels, batch.tokens(), batch);
        }
        self.add(&mut t, 1.0, &self.forward.head.kernels, batch.sampled(), batch);
        t
    }

    /// Bytes of weights and cache that a pass of `batch` reads at least on each rank.
    pub fn bytes_read(&self, batch: &Batch) -> f64 {
        let mut bytes = batch.decoding * batch.cached * self.forward.cache_elements * self.cache.bytes();
        for part in self.forward.parts() {
            for kernel in &part.kernels {
                if let Kernel::Product { n, k, experts, rows, head } = *kernel {
                    let tokens = if head { batch.sampled() } else { batch.tokens() };
                    let width = if head { ACTIVATION_BYTES } else { self.weights.bytes() };
                    bytes += part.times * experts_met(experts, rows, tokens) * n * k * width;
                }
            }
        }
        bytes
    }

    /// FLOPs of a pass on each rank: products, and attention at the causal half.
    pub fn flops(&self, batch: &Batch) -> f64 {
        let mut flops = batch.decoding * batch.cached * self.forward.decode_flops_per_pair;
        for part in self.forward.parts() {
            for kernel in &part.kernels {
                flops += part.times
                    * match *kernel {
                        Kernel::Product { n, k, rows, head, .. } => {
                            2.0 * rows * n * k * if head { batch.sampled() } else { batch.tokens() }
                        }
                        Kernel::Attention { flops_per_pair } => {
                            flops_per_pair * batch.prompt_tokens * batch.prompt_keys
                        }
                        _ => 0.0,
                    };
            }
        }
        flops
    }

    fn add(&self, t: &mut PassTime, times: f64, kernels: &[Kernel], tokens: f64, batch: &Batch) {
        if tokens <= 0.0 {
            return;
        }
        let stack = &self.stack;
        let mut count = 0.0;
        for kernel in kernels {
            match *kernel {
                Kernel::Product { n, k, experts, rows, head } => {
                    t.products_s += times * self.product_s(n, k, experts, rows, head, tokens);
                    count += 1.0;
                    if !self.widened && self.weights.bytes() < ACTIVATION_BYTES && !head {
                        count += stack.quantize_kernels;
                    }
                    if experts > 1.0 {
                        // Two products an expert layer: up and down.
                        count += stack.expert_kernels / 2.0;
                    }
                }
                Kernel::Attention { flops_per_pair } => {
                    t.attention_s += times * self.attention_s(flops_per_pair, batch);
                    count += 1.0;
                }
                Kernel::Stream { bytes } => {
                    t.stream_s += times * tokens * bytes / (self.bytes_per_s * stack.memory * self.reach());
                    count += 1.0;
                }
                Kernel::Talk { what, bytes } => t.talk_s += times * self.talk_s(what, bytes * tokens),
            }
        }
        t.kernels_s += times * count * stack.kernel_us * 1e-6;
    }

    fn product_s(&self, n: f64, k: f64, experts: f64, rows: f64, head: bool, tokens: f64) -> f64 {
        let chip = if head { &self.wide } else { &self.narrow };
        let width = if head { ACTIVATION_BYTES } else { self.weights.bytes() / self.widen() };
        let met = experts_met(experts, rows, tokens);
        let each = rows * tokens / met;
        let bytes = met * (n * k * width + each * (n + k) * ACTIVATION_BYTES);
        let read_s = bytes / (self.bytes_per_s * self.stack.memory * self.reach());
        let padded = (each / TILE_ROWS).ceil().max(1.0) * TILE_ROWS;
        let compute_s = met * 2.0 * padded * n * k / (chip.matmul * self.stack.products * self.reach());
        read_s.max(compute_s) + (1.0 - self.stack.overlap) * read_s.min(compute_s)
    }

    fn attention_s(&self, flops_per_pair: f64, batch: &Batch) -> f64 {
        let f = &self.forward;
        let mut seconds = 0.0;
        if batch.prompt_tokens > 0.0 {
            let rate = self.wide.attention(true, batch.prompt, f.head_dim, false);
            seconds += batch.prompt_tokens * batch.prompt_keys * flops_per_pair / rate;
        }
        if batch.decoding > 0.0 {
            let layers: f64 = f.layers.iter().filter(|p| attends(&p.kernels)).map(|p| p.times).sum();
            let pairs = batch.decoding * batch.cached / layers;
            let again = 1.0 + self.stack.reread * (f.heads_per_cache - 1.0);
            let read_s = pairs * f.cache_elements * self.cache.bytes() * again
                / (self.bytes_per_s * self.stack.cache * self.reach());
            let compute_s = pairs * f.decode_flops_per_pair / (self.wide.peak * self.wide.flash.1);
            seconds += read_s.max(compute_s);
        }
        seconds
    }

    fn talk_s(&self, what: Collective, bytes: f64) -> f64 {
        let comm = on_span(&self.net, what, &self.span, self.tp, bytes);
        let inside = self.stack.all_reduce_s(&self.family, self.span.inside);
        // Trees between domains, up and down.
        let hops = if self.span.domains > 1.0 { 2.0 * self.span.domains.log2().ceil() } else { 0.0 };
        inside + hops * self.net.scale_out_step_s + (comm.seconds - comm.latency_s)
    }
}

fn attends(kernels: &[Kernel]) -> bool {
    kernels.iter().any(|k| matches!(k, Kernel::Attention { .. }))
}

/// How many of a layer's experts a batch meets if each token's choice is as good as random: `E (1 - (1 - k/E)^T)`.
///
/// Mixtral's eight with two for each token:
///
/// ```
/// use inference::pass::experts_met;
/// assert_eq!(experts_met(8.0, 2.0, 1.0), 2.0);
/// assert!((experts_met(8.0, 2.0, 8.0) - 7.2).abs() < 0.01);
/// assert!(experts_met(8.0, 2.0, 1e4) <= 8.0);
/// assert_eq!(experts_met(1.0, 1.0, 5.0), 1.0);
/// ```
pub fn experts_met(experts: f64, chosen: f64, tokens: f64) -> f64 {
    if experts <= 1.0 {
        return 1.0;
    }
    let missed = (1.0 - (chosen / experts).min(1.0)).powf(tokens.max(1.0));
    (experts * (1.0 - missed)).max(chosen.min(experts))
}
