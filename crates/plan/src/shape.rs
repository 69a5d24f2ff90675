//! A model as it is estimated: [`spec::ModelSpec`] with the sums that estimating asks for, and the shapes of
//! `catalog/shapes.toml`.

use std::ops::{Deref, DerefMut};

use serde::{Deserialize, Serialize};
use spec::suggest::plain;
use spec::{
    Activation, Error, Experts, Latent, ModelSpec, NormKind, Position, Result, Rope, RopeScaling, Windows,
};

/// A model to estimate: reads like its [`ModelSpec`], so that `shape.experts` is the model's.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Shape {
    /// The model.
    pub model: ModelSpec,
    /// Its layers that attend over a window only.
    #[serde(skip)]
    pub windows: Option<Windows>,
}

impl Deref for Shape {
    type Target = ModelSpec;

    fn deref(&self) -> &ModelSpec {
        &self.model
    }
}

impl DerefMut for Shape {
    fn deref_mut(&mut self) -> &mut ModelSpec {
        &mut self.model
    }
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
    /// Tokens of the window of layers that attend over one, and how many do.
    window: Option<usize>,
    #[serde(default)]
    window_layers: usize,
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
        logit_softcap: 0.0,
        experts: None,
        latent: None,
        window: None,
        sinks: false,
        mtp: None,
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
            router: spec::Router::default(),
        });
        let windows = self.window.map(|tokens| Windows { tokens, layers: self.window_layers });
        Shape { model: ModelSpec { experts, latent: self.latent, ..dense(&self.name, sizes) }, windows }
    }
}

fn known() -> Result<Vec<Known>> {
    let file: File = toml::from_str(include_str!("../../../catalog/shapes.toml"))
        .map_err(|e| Error::failure(format!("catalog/shapes.toml: {}", e.message())))?;
    Ok(file.model)
}

impl Shape {
    /// A model of one's own.
    pub fn from_model(model: ModelSpec) -> Self {
        Shape { windows: model.windows(), model }
    }

    /// Pairs that attention scores over `sequence` tokens, as a share of those without windows.
    pub fn attended(&self, sequence: usize) -> f64 {
        self.windows.map_or(1.0, |w| w.share(self.model.layers, sequence))
    }

    /// The shape of that name in `catalog/shapes.toml`: mixtures, latent attention and large dense models.
    ///
    /// `None` if there is none of that name; the presets of [`spec`] are not looked up.
    ///
    /// # Errors
    /// If `catalog/shapes.toml` is wrong, which a test rules out.
    pub fn find(name: &str) -> Result<Option<Self>> {
        let wanted = plain(name, "");
        let hit =
            |k: &&Known| plain(&k.name, "") == wanted || k.aliases.iter().any(|a| plain(a, "") == wanted);
        let all = known()?;
        // Without its dot gpt3-1.3b would be gpt3-13b.
        let exact = all.iter().find(|k| k.name.eq_ignore_ascii_case(name));
        Ok(exact.or_else(|| all.iter().find(hit)).map(Known::shape))
    }

    /// Names in `catalog/shapes.toml`.
    ///
    /// # Errors
    /// As [`Shape::find`].
    pub fn names() -> Result<Vec<String>> {
        Ok(known()?.into_iter().map(|k| k.name).collect())
    }

    /// Parameters of the embedding table.
    pub fn table_params(&self) -> f64 {
        (self.model.vocab * self.model.hidden) as f64
    }

    /// All parameters, tied tables once.
    pub fn params(&self) -> f64 {
        self.model.param_count() as f64
    }

    /// Weights of all layers: (all, those that one token meets).
    pub fn layers_params(&self) -> (f64, f64) {
        let with = self.model.expert_layers() as f64;
        let without = self.model.layers as f64 - with;
        let of = |experts| {
            let (all, active) = self.model.layer_params(experts);
            (all as f64, active as f64)
        };
        let (a, b) = (of(true), of(false));
        let mut sum = (a.0 * with + b.0 * without, a.1 * with + b.1 * without);
        if self.model.mtp.is_some() {
            let behind = if self.model.has_experts(self.model.layers) { a } else { b };
            let projections = 2.0 * (self.model.hidden as f64).powi(2);
            sum = (sum.0 + behind.0 + projections, sum.1 + behind.1 + projections);
        }
        sum
    }

    /// Model FLOPs of one token, forward and backward: 6 for each weight used except the input table, and attention
    /// over `sequence` tokens, whole or at the causal half (PaLM, arXiv 2204.02311 appendix B), less what windows clip.
    pub fn flops_per_token(&self, sequence: f64, causal: bool) -> f64 {
        let attention = 12.0 * self.model.all_layers() as f64 * self.model.score_width() * sequence;
        let attention = if causal { attention / 2.0 } else { attention };
        let attention = attention * self.attended(sequence as usize);
        let heads = if self.model.mtp.is_some() { 2.0 } else { 1.0 };
        6.0 * (self.layers_params().1 + heads * self.table_params()) + attention
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
