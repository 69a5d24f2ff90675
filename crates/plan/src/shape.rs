//! A model as it is priced: the dense transformer of [`spec::ModelSpec`], with experts and latent attention beside it.

use serde::{Deserialize, Serialize};
use spec::{Activation, Error, ModelSpec, NormKind, Position, Result, Rope, RopeScaling};

/// A model to price.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shape {
    /// The dense part; its `ffn` is that of layers without experts.
    pub model: ModelSpec,
    /// Mixture of experts, if any.
    pub experts: Option<Experts>,
    /// Multi-head latent attention, if any.
    pub latent: Option<Latent>,
}

/// Mixture of experts in place of the feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Experts {
    /// Routed experts of a layer.
    pub count: usize,
    /// Experts that each token goes to.
    pub top_k: usize,
    /// Width of one expert.
    pub ffn: usize,
    /// Width of all shared experts together; 0 without.
    pub shared_ffn: usize,
    /// First layers without experts.
    pub dense_layers: usize,
    /// Every how many layers one has experts.
    pub every: usize,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Rank of the compressed queries.
    pub query_rank: usize,
    /// Rank of the compressed keys and values.
    pub kv_rank: usize,
    /// Width of a head's unrotated part.
    pub nope_dim: usize,
    /// Width of a head's rotated part.
    pub rope_dim: usize,
    /// Width of a head's values.
    pub value_dim: usize,
}

#[derive(Deserialize)]
struct File {
    model: Vec<Known>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    name: String,
    #[serde(default)]
    aliases: Vec<String>,
    #[serde(rename = "title")]
    _title: String,
    #[serde(rename = "source")]
    _source: String,
    #[serde(rename = "date")]
    _date: String,
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    gated: bool,
    tied: bool,
    experts: Option<usize>,
    top_k: Option<usize>,
    expert_ffn: Option<usize>,
    #[serde(default)]
    shared_ffn: usize,
    #[serde(default)]
    dense_layers: usize,
    #[serde(default = "one")]
    expert_every: usize,
    latent: Option<Latent>,
}

fn one() -> usize {
    1
}

/// Longest context that shapes without one of their own are given.
const MAX_POSITIONS: usize = 1 << 24;

/// A dense transformer of Llama (gated) or GPT (plain) kind with these sizes.
pub fn dense(name: &str, sizes: Sizes) -> ModelSpec {
    let Sizes { layers, hidden, ffn, heads, kv_heads, head_dim, vocab, gated, tied } = sizes;
    ModelSpec {
        name: name.to_owned(),
        vocab,
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        norm: if gated { NormKind::Rms } else { NormKind::Layer },
        norm_eps: 1e-5,
        position: if gated {
            Position::Rope(Rope { theta: 1e4, scaling: RopeScaling::Default, max_positions: MAX_POSITIONS })
        } else {
            Position::Learned { max_positions: 2048 }
        },
        activation: if gated { Activation::SwiGlu } else { Activation::GeluTanh },
        qkv_bias: !gated,
        attn_out_bias: !gated,
        mlp_bias: !gated,
        qk_norm: false,
        tied_embeddings: tied,
        init_std: 0.02,
    }
}

/// The sizes of a dense transformer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Layers.
    pub layers: usize,
    /// Residual width.
    pub hidden: usize,
    /// Feed-forward width.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Gated feed-forward with rotary positions, else GELU with learned positions.
    pub gated: bool,
    /// Output projection is the embedding table.
    pub tied: bool,
}

impl Known {
    fn shape(&self) -> Shape {
        let sizes = Sizes {
            layers: self.layers,
            hidden: self.hidden,
            ffn: self.ffn,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            vocab: self.vocab,
            gated: self.gated,
            tied: self.tied,
        };
        let experts = self.experts.map(|count| Experts {
            count,
            top_k: self.top_k.unwrap_or(1),
            ffn: self.expert_ffn.unwrap_or(self.ffn),
            shared_ffn: self.shared_ffn,
            dense_layers: self.dense_layers,
            every: self.expert_every,
        });
        Shape { model: dense(&self.name, sizes), experts, latent: self.latent }
    }
}

fn known() -> Result<Vec<Known>> {
    let file: File = toml::from_str(include_str!("../../../catalog/shapes.toml"))
        .map_err(|e| Error::failure(format!("catalog/shapes.toml: {}", e.message())))?;
    Ok(file.model)
}

/// Letters and digits only, in lower case: `DeepSeekV3` and `deepseek-v3` are one name.
fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

impl Shape {
    /// A dense model.
    pub fn from_model(model: ModelSpec) -> Self {
        Shape { model, experts: None, latent: None }
    }

    /// The shape of that name in `catalog/shapes.toml`: mixtures, latent attention and large dense models.
    ///
    /// `None` if there is none of that name; the presets of [`spec`] are not looked up.
    pub fn find(name: &str) -> Result<Option<Self>> {
        let wanted = plain(name);
        let hit = |k: &&Known| plain(&k.name) == wanted || k.aliases.iter().any(|a| plain(a) == wanted);
        let all = known()?;
        // Without its dot gpt3-1.3b would be gpt3-13b.
        let exact = all.iter().find(|k| k.name.eq_ignore_ascii_case(name));
        Ok(exact.or_else(|| all.iter().find(hit)).map(Known::shape))
    }

    /// Names in `catalog/shapes.toml`.
    pub fn names() -> Result<Vec<String>> {
        Ok(known()?.into_iter().map(|k| k.name).collect())
    }

    /// Whether layer `i` has experts.
    pub fn has_experts(&self, i: usize) -> bool {
        self.experts
            .is_some_and(|e| i >= e.dense_layers && (i + 1 - e.dense_layers).is_multiple_of(e.every.max(1)))
    }

    /// Layers with experts.
    pub fn expert_layers(&self) -> usize {
        (0..self.model.layers).filter(|i| self.has_experts(*i)).count()
    }

    /// Weights of one layer's attention.
    pub fn attention_params(&self) -> f64 {
        let m = &self.model;
        let h = m.hidden as f64;
        match self.latent {
            Some(l) => {
                let heads = m.heads as f64;
                let (q, kv) = (l.query_rank as f64, l.kv_rank as f64);
                let head = (l.nope_dim + l.rope_dim) as f64;
                h * q
                    + q * heads * head
                    + h * (kv + l.rope_dim as f64)
                    + kv * heads * (l.nope_dim + l.value_dim) as f64
                    + heads * l.value_dim as f64 * h
            }
            None => h * ((2 * m.heads + 2 * m.kv_heads) * m.head_dim) as f64,
        }
    }

    /// Weights of a feed-forward layer of this width.
    fn mlp_params(&self, ffn: usize) -> f64 {
        let matrices = if self.model.activation.gated() { 3.0 } else { 2.0 };
        matrices * self.model.hidden as f64 * ffn as f64
    }

    /// Weights of one layer: (all, those that one token uses).
    pub fn layer_params(&self, expert_layer: bool) -> (f64, f64) {
        let attention = self.attention_params();
        let norms = 2.0 * self.model.hidden as f64;
        match (self.experts, expert_layer) {
            (Some(e), true) => {
                let shared = self.mlp_params(e.shared_ffn) + (self.model.hidden * e.count) as f64;
                let one = self.mlp_params(e.ffn);
                let base = attention + norms + shared;
                (base + one * e.count as f64, base + one * e.top_k as f64)
            }
            _ => {
                let all = attention + norms + self.mlp_params(self.model.ffn);
                (all, all)
            }
        }
    }

    /// Parameters of the embedding table.
    pub fn table_params(&self) -> f64 {
        (self.model.vocab * self.model.hidden) as f64
    }

    /// All parameters, tied tables once.
    pub fn params(&self) -> f64 {
        let tables = if self.model.tied_embeddings { 1.0 } else { 2.0 };
        self.layers_params().0 + tables * self.table_params()
    }

    /// Weights of all layers: (all, those that one token uses).
    pub fn layers_params(&self) -> (f64, f64) {
        let with = self.expert_layers() as f64;
        let without = self.model.layers as f64 - with;
        let (a, b) = (self.layer_params(true), self.layer_params(false));
        (a.0 * with + b.0 * without, a.1 * with + b.1 * without)
    }

    /// Width over which scores and values are computed: query heads times head width (mean of keys' and values').
    pub fn attention_width(&self) -> f64 {
        match self.latent {
            Some(l) => self.model.heads as f64 * (l.nope_dim + l.rope_dim + l.value_dim) as f64 / 2.0,
            None => (self.model.heads * self.model.head_dim) as f64,
        }
    }

    /// Model FLOPs of one token, forward and backward: 6 for each weight used except the input table, and attention
    /// over `sequence` tokens, whole or at the causal half (PaLM, arXiv 2204.02311 appendix B).
    pub fn flops_per_token(&self, sequence: f64, causal: bool) -> f64 {
        let attention = 12.0 * self.model.layers as f64 * self.attention_width() * sequence;
        let attention = if causal { attention / 2.0 } else { attention };
        6.0 * (self.layers_params().1 + self.table_params()) + attention
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_parameter_counts_are_reproduced() {
        let check = |name: &str, billions: f64, active: f64| {
            let shape = Shape::find(name).unwrap().unwrap();
            let params = shape.params() / 1e9;
            assert!((params / billions - 1.0).abs() < 0.01, "{name}: {params}");
            let used = (shape.layers_params().1 + 2.0 * shape.table_params()) / 1e9;
            assert!((used / active - 1.0).abs() < 0.05, "{name}: {used} active");
        };
        check("deepseek-v3", 671.0, 37.5);
        check("DeepSeekV3", 671.0, 37.5);
        check("mixtral-8x7b", 46.7, 12.9);
        check("mixtral-8x22b", 140.6, 39.1);
        check("qwen3-30b-a3b", 30.5, 3.35);
        check("qwen3-235b-a22b", 235.1, 22.2);
        check("gpt-oss-120b", 116.8, 5.7);
        check("kimi-k2", 1026.0, 32.9);
        check("llama4-maverick", 400.0, 17.2);
        check("gpt3-175b", 174.6, 175.2);
        check("gpt3-1.3b", 1.32, 1.42);
        check("megatron-1t", 1008.0, 1009.0);
    }

    #[test]
    fn unknown_names_are_none_and_known_ones_listed() {
        assert!(Shape::find("nothing").unwrap().is_none());
        assert!(Shape::names().unwrap().contains(&"gpt3-175b".to_owned()));
    }
}
