//! The kernels of one forward pass on one rank, taken from the step program.
//!
//! The program of a training step begins with the forward pass of a batch of whole sequences, which is what prefill is.
//! Decoding runs the same kernels on one row for each request, with attention over what is cached. So each kernel is
//! kept by what it takes for one token, and both are counted from there.
//!
//! Serving stacks cut heads, feed-forward layers and each single expert over tensor-parallel ranks and add up twice a
//! layer: a rank runs the program of a model that is narrower by as much, and the sums between.

use plan::network::Collective;
use plan::shape::Shape;
use plan::template::{Key, Section, Task, Template};
use spec::Result;

/// Tokens of the sequence whose program is taken apart. What a token takes does not depend on it.
const REFERENCE_TOKENS: usize = 4096;
/// Bytes of an activation: 16 bit.
const ACTIVATION_BYTES: f64 = 2.0;

/// One kernel or collective by what its time depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kernel {
    /// A matrix product with weights `[k, n]`, as many times as there are experts on the rank.
    Product {
        /// Columns of the outcome.
        n: f64,
        /// Inner dim.
        k: f64,
        /// Matrices side by side, of which a token meets some; 1 outside experts.
        experts: f64,
        /// Rows of all matrices together for each token.
        rows: f64,
        /// The output projection, which stays in 16 bit and has rows only where a token is sampled.
        head: bool,
    },
    /// Causal attention.
    Attention {
        /// FLOPs for each pair of a query token and a key token.
        flops_per_pair: f64,
    },
    /// A kernel that streams through memory.
    Stream {
        /// Bytes for each token.
        bytes: f64,
    },
    /// Tensor-parallel ranks talk.
    Talk {
        /// What they do.
        what: Collective,
        /// Bytes of the whole vector for each token.
        bytes: f64,
    },
}

/// Kernels that run `times` times in a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// How often.
    pub times: f64,
    /// In order.
    pub kernels: Vec<Kernel>,
}

/// The forward pass of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// Embedding and layers: run on every token.
    pub layers: Vec<Part>,
    /// Final norm, output projection and sampling: run on tokens that are sampled.
    pub head: Part,
    /// Elements cached for a token by this rank over all layers.
    pub cache_elements: f64,
    /// FLOPs for each pair of a query and a cached token over all layers, where decoding reads the cache as it is.
    pub decode_flops_per_pair: f64,
    /// Query heads that read one cached head.
    pub heads_per_cache: f64,
    /// Width of a head.
    pub head_dim: f64,
    /// Elements of the embedding table on this rank.
    pub table: f64,
}

impl Forward {
    /// The kernels of `shape` cut over `tp` ranks.
    ///
    /// # Errors
    /// If the shape cannot be cut so.
    pub fn of(shape: &Shape, tp: usize) -> Result<Self> {
        let local = local(shape, tp);
        let template = Template::build(&local, &Key::alone(REFERENCE_TOKENS))?;
        let hidden = shape.hidden as f64;
        let vocab = shape.vocab as f64;
        let with = shape.expert_layers() as f64;
        let layers = shape.model.layers as f64;
        let mut embed = vec![Kernel::Stream { bytes: 2.0 * ACTIVATION_BYTES * hidden }];
        let mut head = kernels(&template.head.forward);
        // Training cuts the output projection by sequences, with the loss: it is not in the forward pass.
        head.push(Kernel::Product { n: local.vocab as f64, k: hidden, experts: 1.0, rows: 1.0, head: true });
        head.push(Kernel::Stream { bytes: ACTIVATION_BYTES * local.vocab as f64 });
        if tp > 1 {
            embed.push(Kernel::Talk { what: Collective::AllReduce, bytes: ACTIVATION_BYTES * hidden });
            head.push(Kernel::Talk { what: Collective::AllGather, bytes: ACTIVATION_BYTES * vocab });
        }
        let layer = |section: &Section| layer(kernels(&section.forward), hidden, tp);
        let mut parts = vec![
            Part { times: 1.0, kernels: embed },
            Part { times: layers - with, kernels: layer(&template.layer) },
        ];
        if let Some(section) = &template.expert_layer {
            parts.push(Part { times: with, kernels: layer(section) });
        }
        parts.retain(|p| p.times > 0.0);
        let cache = CacheShape::of(shape, tp);
        Ok(Forward {
            layers: parts,
            head: Part { times: 1.0, kernels: head },
            cache_elements: layers * cache.elements,
            decode_flops_per_pair: layers * cache.flops_per_pair,
            heads_per_cache: cache.heads_per_cache,
            head_dim: cache.head_dim,
            table: (local.vocab * shape.hidden) as f64,
        })
    }

    /// All parts with their counts.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.layers.iter().chain(std::iter::once(&self.head))
    }

    /// Elements of all weights of layers on this rank, and of the output projection.
    pub fn weights(&self) -> (f64, f64) {
        let of = |part: &Part| {
            let elements = part.kernels.iter().map(|k| match k {
                Kernel::Product { n, k, experts, .. } => n * k * experts,
                _ => 0.0,
            });
            part.times * elements.sum::<f64>()
        };
        (self.layers.iter().map(of).sum(), of(&self.head))
    }

    /// FLOPs of the products of one token through all layers on this rank.
    pub fn flops_per_token(&self) -> f64 {
        let of = |part: &Part| {
            let flops = part.kernels.iter().map(|k| match k {
                Kernel::Product { n, k, rows, .. } => 2.0 * rows * n * k,
                _ => 0.0,
            });
            part.times * flops.sum::<f64>()
        };
        self.layers.iter().map(of).sum()
    }
}

/// What attention leaves in a layer's cache on one rank, and reads of it.
struct CacheShape {
    elements: f64,
    flops_per_pair: f64,
    heads_per_cache: f64,
    head_dim: f64,
}

impl CacheShape {
    fn of(shape: &Shape, tp: usize) -> Self {
        let heads = (shape.heads as f64 / tp as f64).max(1.0);
        match shape.latent {
            // Queries are taken into the latent's space: one cached vector, which every rank has whole, serves all heads
            // as keys and as values (DeepSeek-V2, arXiv 2405.04434 section 2.1.2).
            Some(l) => CacheShape {
                elements: (l.kv_rank + l.rope_dim) as f64,
                flops_per_pair: 2.0 * heads * (2 * l.kv_rank + l.rope_dim) as f64,
                heads_per_cache: 1.0,
                head_dim: l.key_dim() as f64,
            },
            // Ranks beyond the heads of keys and values hold copies.
            None => {
                let cached = (shape.kv_heads as f64 / tp as f64).max(1.0);
                CacheShape {
                    elements: 2.0 * cached * shape.head_dim as f64,
                    flops_per_pair: 4.0 * heads * shape.head_dim as f64,
                    heads_per_cache: (heads / cached).max(1.0),
                    head_dim: shape.head_dim as f64,
                }
            }
        }
    }
}

/// The model of which each of `tp` ranks has one: what does not divide is padded, heads of keys and values that are fewer
/// than ranks are copied.
fn local(shape: &Shape, tp: usize) -> Shape {
    let mut local = shape.clone();
    let m = &mut local.model;
    // What is served is the next token.
    m.mtp = None;
    m.kv_heads = m.kv_heads.div_ceil(tp);
    m.heads = m.heads.div_ceil(tp).next_multiple_of(m.kv_heads);
    m.ffn = m.ffn.div_ceil(tp);
    m.vocab = m.vocab.div_ceil(tp);
    if let Some(e) = &mut m.experts {
        e.ffn = e.ffn.div_ceil(tp);
        e.shared_ffn = e.shared_ffn.div_ceil(tp);
    }
    local
}

/// A layer with its sums over ranks: after attention's output projection, and at its end.
fn layer(mut kernels: Vec<Kernel>, hidden: f64, tp: usize) -> Vec<Kernel> {
    if tp > 1 {
        let sum = Kernel::Talk { what: Collective::AllReduce, bytes: ACTIVATION_BYTES * hidden };
        let attention = kernels.iter().position(|k| matches!(k, Kernel::Attention { .. })).unwrap_or(0);
        let product = |k: &Kernel| matches!(k, Kernel::Product { .. });
        if let Some(out) = kernels[attention..].iter().position(product) {
            kernels.insert(attention + out + 1, sum);
        }
        kernels.push(sum);
    }
    kernels
}

fn kernels(tasks: &[Task]) -> Vec<Kernel> {
    let tokens = REFERENCE_TOKENS as f64;
    let of = |task: &Task| match *task {
        Task::Gemm { m, n, k, batch, head, .. } => {
            Some(Kernel::Product { n, k, experts: batch, rows: m * batch / tokens, head })
        }
        // FLOPs of the whole sequence at the causal half.
        Task::Attention { flops, .. } => {
            Some(Kernel::Attention { flops_per_pair: flops / (tokens * tokens / 2.0) })
        }
        Task::Stream { bytes } => Some(Kernel::Stream { bytes: bytes / tokens }),
        // One rank alone talks to nobody.
        Task::Talk { .. } => None,
    };
    tasks.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plan::models;

    #[test]
    fn ranks_share_all_weights_and_tokens_meet_the_active_ones() {
        let check = |name: &str, tp: usize| {
            let shape = models::find(name).unwrap();
            let forward = Forward::of(&shape, tp).unwrap();
            let (layers, head) = forward.weights();
            let (all, active) = shape.layers_params();
            let near = |a: f64, b: f64| (a / b - 1.0).abs() < 0.01;
            // Routers, and what latent attention compresses, every rank has whole.
            let whole = if shape.latent.is_some() && tp > 1 { 0.06 } else { 0.01 };
            assert!((layers * tp as f64 / all - 1.0).abs() < whole, "{name} {tp}: {layers} of {all}");
            assert!(near(head * tp as f64, shape.table_params()), "{name} {tp}: {head}");
            let flops = forward.flops_per_token() * tp as f64;
            assert!((flops / (2.0 * active) - 1.0).abs() < 5.0 * whole, "{name} {tp}: {flops} for {active}");
        };
        for tp in [1, 2, 8] {
            check("llama2-70b", tp);
            check("mixtral-8x7b", tp);
        }
        check("deepseek-v3", 1);
        check("deepseek-v3", 8);
        check("gpt3-6.7b", 4);
    }

    #[test]
    fn caches_are_as_published() {
        let check = |name: &str, tp: usize, bytes: f64| {
            let forward = Forward::of(&models::find(name).unwrap(), tp).unwrap();
            assert_eq!(2.0 * forward.cache_elements, bytes, "{name} {tp}");
        };
        // Two vectors of 4096 in 16 bit for each of 32 layers.
        check("llama2-7b", 1, 524_288.0);
        check("llama3-70b", 1, 327_680.0);
        check("llama3-70b", 8, 40_960.0);
        // Eight heads over sixteen ranks: each has a copy of one.
        check("llama3-70b", 16, 40_960.0);
        // DeepSeek-V3 report: 70.272 KB a token.
        check("deepseek-v3", 1, 70_272.0);
        check("deepseek-v3", 8, 70_272.0);
    }
}
