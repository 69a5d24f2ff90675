use serde::{Deserialize, Serialize};

use crate::words::words;

/// The shape of a decoder-only transformer of the Llama or GPT-2 family, with experts and latent attention where a
/// model has them.
///
/// Dims: `D` hidden, `F` ffn, `H` heads, `K` kv_heads, `h` head_dim, `V` vocab.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// What people call it.
    pub name: String,
    /// Vocabulary size `V`.
    pub vocab: usize,
    /// Number of transformer layers.
    pub layers: usize,
    /// Residual width `D`.
    pub hidden: usize,
    /// Width `F` of the feed-forward layer (of each half when gated) in layers without experts.
    pub ffn: usize,
    /// Query heads `H`.
    pub heads: usize,
    /// Key and value heads `K`; divides `heads`.
    pub kv_heads: usize,
    /// Width `h` of one head.
    pub head_dim: usize,
    /// Which normalisation.
    pub norm: NormKind,
    /// Added to the variance in every norm.
    pub norm_eps: f32,
    /// How positions enter.
    pub position: Position,
    /// The feed-forward non-linearity.
    pub activation: Activation,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub attn_out_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// RMSNorm over each query and key head before the rotation (Qwen 3).
    pub qk_norm: bool,
    /// The output projection is the embedding table.
    pub tied_embeddings: bool,
    /// Standard deviation of initial weights.
    pub init_std: f32,
    /// Logits of the output projection are squeezed to `c tanh(x / c)` (Gemma 2, arXiv 2408.00118, section 2); 0 without.
    pub logit_softcap: f32,
    /// A mixture of experts in place of the feed-forward layer, in some or all layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Experts>,
    /// Keys and values from a low-rank latent instead of projections of their own; then `kv_heads` and `head_dim` say
    /// nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<Latent>,
    /// Layers whose tokens attend to themselves and those just before, not to all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// A learned score for each query head that every softmax of attention sums too, without a value (GPT-OSS,
    /// arXiv 2508.10925 section 2.1).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sinks: bool,
    /// A module behind the last layer that learns to predict one token more; generation does without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtp: Option<Mtp>,
}

/// Multi-token prediction one token deep (DeepSeek-V3, arXiv 2412.19437, section 2.2). From the final norm's output at a
/// token and the embedding of the next one, each normed, two projections added make the input of one more layer; its
/// normed output goes through the model's output projection, and is held to the token after the next.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mtp {
    /// Factor of its cross-entropy, summed over all tokens that have one after the next and divided by as many as the
    /// model's own, beside which it is no part of the loss that is reported.
    pub weight: f32,
}

impl Mtp {
    /// DeepSeek-V3's for its first ten of 14.8 trillion tokens; 0.1 for the rest (section 4.2).
    pub const WEIGHT: f32 = 0.3;
}

/// Attention over a sliding window in some or all layers (Beltagy et al. 2020, arXiv 2004.05150, section 3.1).
///
/// | family | window | which layers attend to all |
/// | --- | --- | --- |
/// | Mistral 7B | 4096 | none |
/// | Gemma 2 | 4096 | every 2nd |
/// | Gemma 3 | 1024 | every 6th |
/// | GPT-OSS | 128 | every 2nd |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Tokens of a window, the attending one among them.
    pub tokens: usize,
    /// First layers that attend to all.
    pub full_layers: usize,
    /// After those, every how many layers one attends to all: the last of each run; 0 where none does.
    pub full_every: usize,
}

impl Window {
    /// Tokens that layer `i` looks back over; `None` where it attends to all.
    pub fn of(self, i: usize) -> Option<usize> {
        let after = (i + 1).checked_sub(self.full_layers).filter(|n| *n > 0)?;
        let full = self.full_every > 0 && after.is_multiple_of(self.full_every);
        (!full).then_some(self.tokens)
    }
}

/// Mixture of experts in place of the feed-forward layer (Shazeer et al. 2017, arXiv 1701.06538).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// Routed experts of a layer.
    pub count: usize,
    /// Experts that each token goes to.
    pub top_k: usize,
    /// Width of one expert (of each half when gated).
    pub ffn: usize,
    /// Width of all shared experts together, which every token goes to; 0 without.
    pub shared_ffn: usize,
    /// First layers without experts.
    pub dense_layers: usize,
    /// After those, every how many layers one has experts: the last of each run.
    pub every: usize,
    /// How experts are chosen and weighed.
    #[serde(default)]
    pub router: Router,
}

/// How a token's experts are chosen and weighed from the router's logits.
///
/// Each expert has a score. The `top_k` best are chosen, and their outputs added with the scores as weights.
///
/// | family | score | renormalise | scale | groups |
/// | --- | --- | --- | --- | --- |
/// | Mixtral | softmax | yes: the softmax over the chosen logits alone | 1 | |
/// | Qwen3-MoE | softmax | as `norm_topk_prob` says | 1 | |
/// | GPT-OSS | softmax of logits with biases | yes | 1 | |
/// | DeepSeek-V3, Kimi K2 | sigmoid | yes | 2.5; 2.827 | 4 of 8; 1 |
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Router {
    /// What an expert's score is of the logits.
    pub score: Score,
    /// The weights of a token are divided by their sum.
    pub renormalise: bool,
    /// Factor of all weights.
    pub scale: f32,
    /// Equal runs of experts, each as good as its two best together (DeepSeek-V3, arXiv 2412.19437, section 2.1.2);
    /// 1 without.
    pub groups: usize,
    /// Experts are chosen among those of so many groups.
    pub top_groups: usize,
    /// Factor of the loss of experts that are chosen unevenly within a sequence; 0 without.
    pub balance_loss: f32,
    /// Factor of the mean square of the logits' log-sum-exp; 0 without.
    pub z_loss: f32,
    /// The logits have biases.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bias: bool,
    /// Each expert has a bias that its score has added where the best are chosen, and not where they are weighed (Wang et
    /// al. 2024, arXiv 2408.15664; DeepSeek-V3, section 2.1.2). It has no gradient.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expert_bias: bool,
    /// After each step that bias moves by this much: up where an expert got fewer copies of the whole batch's tokens than
    /// the mean, down where it got more. 0 leaves biases as they are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bias_rate: f32,
}

/// What a serialised model leaves out.
fn is_zero(x: &f32) -> bool {
    *x == 0.0
}

impl Router {
    /// Softmax over all, the best renormalised, and nothing else.
    pub const PLAIN: Router = Router {
        score: Score::Softmax,
        renormalise: true,
        scale: 1.0,
        groups: 1,
        top_groups: 1,
        balance_loss: 0.0,
        z_loss: 0.0,
        bias: false,
        expert_bias: false,
        bias_rate: 0.0,
    };
}

impl Default for Router {
    fn default() -> Router {
        Router::PLAIN
    }
}

/// What an expert's score is of the router's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// The softmax over all experts.
    Softmax,
    /// The sigmoid of the expert's own logit.
    Sigmoid,
}

words!(Score: "softmax" => Softmax, "sigmoid" => Sigmoid);

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1): keys and values of all heads come from one
/// latent of low rank, and a part of each key that all heads share carries the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latent {
    /// Rank of the compressed queries; `None` projects queries from the residual stream.
    pub query_rank: Option<usize>,
    /// Rank of the compressed keys and values.
    pub kv_rank: usize,
    /// Width of a head's unrotated part.
    pub nope_dim: usize,
    /// Width of a head's rotated part.
    pub rope_dim: usize,
    /// Width of a head's values.
    pub value_dim: usize,
}

/// What the norms of the latents add under their roots, whatever those of the layers add: the classes of DeepSeek-V2 and
/// V3 hand them no other.
pub const LATENT_NORM_EPS: f32 = 1e-6;

impl Latent {
    /// Width of a head's queries and keys.
    pub fn key_dim(self) -> usize {
        self.nope_dim.saturating_add(self.rope_dim)
    }
}

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// Root mean square, weight only (Zhang and Sennrich 2019).
    Rms,
    /// Mean and variance, weight and bias (Ba et al. 2016).
    Layer,
}

words!(NormKind: "rms" => Rms, "layer" => Layer);

/// The feed-forward non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `silu(gate) * up` (Shazeer 2020).
    #[serde(rename = "swiglu")]
    SwiGlu,
    /// `g sigmoid(1.702 g) (u + 1)` of a gate of at most 7 and an up between -7 and 7 (GPT-OSS, arXiv 2508.10925).
    #[serde(rename = "swiglu_clamped")]
    SwiGluClamped,
    /// The tanh approximation of GELU (`gelu_new` in GPT-2).
    GeluTanh,
    /// GELU by the error function.
    Gelu,
}

words!(Activation: "swiglu" => SwiGlu, "swiglu_clamped" => SwiGluClamped, "gelu_tanh" => GeluTanh, "gelu" => Gelu);

impl Activation {
    /// Whether the feed-forward layer has a gate beside `up`.
    pub fn gated(self) -> bool {
        matches!(self, Activation::SwiGlu | Activation::SwiGluClamped)
    }
}

/// How positions enter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// A learned table of this many positions.
    Learned {
        /// Rows of the table.
        max_positions: usize,
    },
    /// Rotary embedding of queries and keys (Su et al. 2021), rotate-half convention.
    Rope(Rope),
}

/// Rotary embedding parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for longer contexts.
    #[serde(default)]
    pub scaling: RopeScaling,
    /// The longest sequence the model was made for.
    pub max_positions: usize,
}

/// Rotary scaling variants, named as in Hugging Face `rope_scaling.rope_type`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "type")]
pub enum RopeScaling {
    /// Unscaled.
    #[default]
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Base enlarged when the sequence is longer than the original context (NTK-aware, dynamic).
    Dynamic {
        /// The stretch.
        factor: f64,
    },
    /// Piecewise by wavelength (Llama 3.1).
    Llama3 {
        /// The stretch of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context before stretching.
        original_max_positions: usize,
    },
    /// By wavelength, blended over a range of dims.
    Yarn(Yarn),
}

/// YaRN (Peng et al. 2023, arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Yarn {
    /// The stretch.
    pub factor: f64,
    /// Rotations above which a dimension is kept.
    pub beta_fast: f64,
    /// Rotations below which a dimension is interpolated.
    pub beta_slow: f64,
    /// The context before stretching.
    pub original_max_positions: usize,
    /// Scale of cos and sin; `0.1 ln(factor) + 1` when absent.
    pub attention_factor: Option<f64>,
    /// The range of dims that are blended is rounded to whole ones; GPT-OSS leaves it as it is.
    #[serde(default = "whole_dims")]
    pub truncate: bool,
    /// Factor of the logarithm in the scale of latent attention's scores ([`RopeScaling::score_factor`]); 0 leaves it
    /// as it is.
    #[serde(default, skip_serializing_if = "is_unscaled")]
    pub mscale_all_dim: f64,
}

impl Yarn {
    /// What cosines and sines are multiplied by.
    pub fn amplitude(&self) -> f64 {
        self.attention_factor.unwrap_or(yarn_scale(self.factor, 1.0))
    }
}

impl RopeScaling {
    /// What the scores of latent attention are multiplied by beside one over the root of the key's width: the square of
    /// `0.1 m ln(factor) + 1`, as DeepSeek's published model code has it (`softmax_scale` under `mscale_all_dim`).
    ///
    /// ```
    /// let yarn = spec::RopeScaling::Yarn(spec::Yarn {
    ///     factor: 40.0,
    ///     beta_fast: 32.0,
    ///     beta_slow: 1.0,
    ///     original_max_positions: 4096,
    ///     attention_factor: Some(1.0),
    ///     truncate: true,
    ///     mscale_all_dim: 1.0,
    /// });
    /// // DeepSeek-V3: 0.1352 of a width of 192.
    /// assert!((yarn.score_factor() / 192f64.sqrt() - 0.13523).abs() < 1e-5);
    /// ```
    pub fn score_factor(&self) -> f64 {
        match self {
            RopeScaling::Yarn(y) if y.mscale_all_dim != 0.0 => yarn_scale(y.factor, y.mscale_all_dim).powi(2),
            _ => 1.0,
        }
    }

    /// The `mscale` of those who write the scale of YaRN's cosines and sines as `0.1 m ln(factor) + 1`, divided by the
    /// same of `mscale_all_dim`.
    pub fn mscale(&self) -> f64 {
        let RopeScaling::Yarn(y) = self else { return 1.0 };
        match y.attention_factor {
            Some(1.0) => y.mscale_all_dim,
            given if y.factor > 1.0 && (given.is_some() || y.mscale_all_dim != 0.0) => {
                let scale = y.amplitude() * yarn_scale(y.factor, y.mscale_all_dim);
                (scale - 1.0) / (0.1 * y.factor.ln())
            }
            _ => 1.0,
        }
    }
}

/// `0.1 m ln(factor) + 1`, and 1 where nothing is stretched (Peng et al. 2023, arXiv 2309.00071, equation 22).
pub(crate) fn yarn_scale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

fn is_unscaled(m: &f64) -> bool {
    *m == 0.0
}

fn whole_dims() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Read back as those who write it do, `mscale` over `mscale_all_dim`, it is the amplitude, given or not.
    #[test]
    fn mscale_stands_for_the_amplitude() {
        for factor in [4.0, 40.0] {
            for attention_factor in [None, Some(1.0), Some(0.9), Some(1.3)] {
                for mscale_all_dim in [0.0, 0.5, 1.0] {
                    let yarn = Yarn {
                        factor,
                        beta_fast: 32.0,
                        beta_slow: 1.0,
                        original_max_positions: 4096,
                        attention_factor,
                        truncate: true,
                        mscale_all_dim,
                    };
                    let written = RopeScaling::Yarn(yarn).mscale();
                    let read = yarn_scale(factor, written) / yarn_scale(factor, mscale_all_dim);
                    assert!((read - yarn.amplitude()).abs() < 1e-12, "{yarn:?}: {written}");
                }
            }
        }
    }
}
