use crate::units::Flops;
use crate::{Error, ModelSpec, NormKind, Position, Result, RopeScaling};

/// Upper bounds of a model's sizes: above any model known, and low enough that products of them (parameters, bytes,
/// FLOPs) stay far inside 64 bits.
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 14;
const MAX_HIDDEN: usize = 1 << 20;
const MAX_FFN: usize = 1 << 22;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
/// Longest context.
pub(crate) const MAX_POSITIONS: usize = 1 << 26;
/// Ten thousand times the largest model trained.
const MAX_PARAMS: u128 = 10_000_000_000_000_000;

impl ModelSpec {
    /// Checks that the shape can be built: sizes in range, heads that divide, finite constants.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// let model = ModelSpec { kv_heads: 4, ..ModelSpec::preset("llama-tiny-ref")? };
    /// let refused = model.validate().unwrap_err();
    /// assert_eq!(refused.to_string(), "model.kv_heads = 4 does not divide model.heads = 6");
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab", self.vocab, MAX_VOCAB),
            ("layers", self.layers, MAX_LAYERS),
            ("hidden", self.hidden, MAX_HIDDEN),
            ("ffn", self.ffn, MAX_FFN),
            ("heads", self.heads, MAX_HEADS),
            ("kv_heads", self.kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("max_positions", self.max_positions(), MAX_POSITIONS),
        ];
        for (key, size, most) in sizes {
            if size == 0 || size > most {
                return Err(Error::user(format!("model.{key} = {size}, expected 1 to {most}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let works: Vec<String> =
                (1..=self.heads).filter(|k| self.heads.is_multiple_of(*k)).map(|k| k.to_string()).collect();
            return Err(Error::user(format!(
                "model.kv_heads = {} does not divide model.heads = {}",
                self.kv_heads, self.heads
            ))
            .hint(format!("values of model.kv_heads that work: {}", works.join(", "))));
        }
        if self.q_width() > MAX_FFN {
            return Err(Error::user(format!(
                "model.heads x head_dim = {} x {}, expected a product of at most {MAX_FFN}",
                self.heads, self.head_dim
            )));
        }
        let params = self.param_sum();
        if params > MAX_PARAMS {
            return Err(Error::user(format!(
                "the model has {params} parameters, expected at most {MAX_PARAMS}"
            )));
        }
        self.check_constants()
    }

    fn check_constants(&self) -> Result<()> {
        for (key, x) in [("norm_eps", self.norm_eps), ("init_std", self.init_std)] {
            if !(x > 0.0 && x < 1.0) {
                return Err(Error::user(format!("model.{key} = {x}, expected a number above 0 and below 1")));
            }
        }
        let Position::Rope(rope) = &self.position else { return Ok(()) };
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::user(format!(
                "model.head_dim = {} is odd, but rotary embedding turns pairs of dims",
                self.head_dim
            ))
            .hint(format!("set model.head_dim={}", self.head_dim + 1)));
        }
        let bad = |key: &str, x: f64, expected: &str| {
            Err(Error::user(format!("model.{key} = {x}, expected a number {expected}")))
        };
        // Rotations shrink with the dim only for a base above one.
        if !(rope.theta > 1.0 && rope.theta <= 1e12) {
            return bad("rope_theta", rope.theta, "above 1 and at most 1e12");
        }
        let factor = match rope.scaling {
            RopeScaling::Default => 1.0,
            RopeScaling::Linear { factor }
            | RopeScaling::Dynamic { factor }
            | RopeScaling::Llama3 { factor, .. }
            | RopeScaling::Yarn { factor, .. } => factor,
        };
        if !(1.0..=1e6).contains(&factor) {
            return bad("rope_scaling.factor", factor, "from 1 to 1e6");
        }
        match rope.scaling {
            RopeScaling::Llama3 {
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions,
                ..
            } => {
                if !(low > 0.0 && low < high && high < 1e6) {
                    return Err(Error::user(format!(
                        "model.rope_scaling.low_freq_factor = {low} and high_freq_factor = {high}, expected 0 < low < high"
                    )));
                }
                check_original(original_max_positions)
            }
            RopeScaling::Yarn { beta_fast, beta_slow, original_max_positions, attention_factor, .. } => {
                if !(beta_slow > 0.0 && beta_slow <= beta_fast && beta_fast < 1e6) {
                    return Err(Error::user(format!(
                        "model.rope_scaling.beta_fast = {beta_fast} and beta_slow = {beta_slow}, expected 0 < slow <= fast"
                    )));
                }
                match attention_factor {
                    Some(x) if !(x > 0.0 && x < 1e6) => bad("rope_scaling.attention_factor", x, "above 0"),
                    _ => check_original(original_max_positions),
                }
            }
            _ => Ok(()),
        }
    }

    /// Width of all query heads together, `H h`.
    pub fn q_width(&self) -> usize {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Width of all key heads together, `K h`; the values are as wide.
    pub fn kv_width(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim)
    }

    /// Query heads that share a key and value head, `H / K`.
    pub fn heads_per_kv(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// The longest sequence the model takes.
    pub fn max_positions(&self) -> usize {
        match &self.position {
            Position::Learned { max_positions } => *max_positions,
            Position::Rope(rope) => rope.max_positions,
        }
    }

    /// Number of parameters; tied embeddings count once.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// assert_eq!(ModelSpec::preset("gpt2")?.param_count(), 124_439_808);
    /// assert_eq!(ModelSpec::preset("llama3-8b")?.param_count(), 8_030_261_248);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn param_count(&self) -> u64 {
        u64::try_from(self.param_sum()).unwrap_or(u64::MAX)
    }

    /// Parameters that take part in a matrix product or a norm for each token: all but the tables that are only
    /// looked up (token and position embeddings). A tied table counts, as the output projection.
    pub fn active_param_count(&self) -> u64 {
        let rows = if self.tied_embeddings { 0 } else { self.vocab };
        let positions = match self.position {
            Position::Learned { max_positions } => max_positions,
            Position::Rope(_) => 0,
        };
        let looked_up = rows.saturating_add(positions).saturating_mul(self.hidden);
        self.param_count().saturating_sub(looked_up as u64)
    }

    /// Model FLOPs of one token of a training step on sequences of `sequence` tokens: forward and backward.
    ///
    /// `6 N + 6 L T H h`: `N` parameters without lookup tables, a multiply-add is 2 FLOPs and backward is twice
    /// forward (Kaplan et al. 2020, section 2.1); scores and weighted values of `L` layers cost `2 T H h` each in
    /// forward (Chowdhery et al. 2022, appendix B: `12 L H Q T` with backward), halved because attention is causal.
    /// Recomputation never counts: this is the numerator of MFU.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// let model = ModelSpec::preset("llama-tiny-ref")?;
    /// let weights = 6 * (12_189_696 + 13 * 384); // matrices and norms
    /// let attention = 6 * 6 * 256 * 384;
    /// assert_eq!(model.flops_per_token(256).0, f64::from(weights + attention));
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn flops_per_token(&self, sequence: usize) -> Flops {
        let weights = 6.0 * self.active_param_count() as f64;
        let attention = 6.0 * self.layers as f64 * sequence as f64 * self.q_width() as f64;
        Flops(weights + attention)
    }

    fn param_sum(&self) -> u128 {
        let [vocab, layers, hidden, ffn] =
            [self.vocab, self.layers, self.hidden, self.ffn].map(|x| x as u128);
        let (q, kv, head_dim) = (self.q_width() as u128, self.kv_width() as u128, self.head_dim as u128);
        let bias = |on: bool, width: u128| if on { width } else { 0 };
        let norm = if self.norm == NormKind::Layer { 2 * hidden } else { hidden };
        let attention = hidden * (q + 2 * kv)
            + bias(self.qkv_bias, q + 2 * kv)
            + q * hidden
            + bias(self.attn_out_bias, hidden)
            + bias(self.qk_norm, 2 * head_dim);
        let ups = if self.activation.gated() { 2 } else { 1 };
        let mlp = (ups + 1) * hidden * ffn + bias(self.mlp_bias, ups * ffn + hidden);
        let tables = if self.tied_embeddings { 1 } else { 2 } * vocab * hidden;
        let positions = match self.position {
            Position::Learned { max_positions } => max_positions as u128 * hidden,
            Position::Rope(_) => 0,
        };
        tables + positions + layers * (attention + mlp + 2 * norm) + norm
    }
}

fn check_original(positions: usize) -> Result<()> {
    if (1..=MAX_POSITIONS).contains(&positions) {
        return Ok(());
    }
    Err(Error::user(format!(
        "model.rope_scaling.original_max_positions = {positions}, expected 1 to {MAX_POSITIONS}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut ModelSpec), expected: &str) {
        let mut model = ModelSpec::preset("tiny").expect("a preset");
        change(&mut model);
        let verdict = model.validate().map_or_else(|e| e.to_string(), |()| "ok".to_owned());
        assert_eq!(verdict, expected);
    }

    fn rope(model: &mut ModelSpec, scaling: RopeScaling) {
        if let Position::Rope(rope) = &mut model.position {
            rope.scaling = scaling;
        }
    }

    #[test]
    fn refusals() {
        check(|_| (), "ok");
        check(|m| m.vocab = 0, "model.vocab = 0, expected 1 to 16777216");
        check(|m| m.hidden = usize::MAX, &format!("model.hidden = {}, expected 1 to 1048576", usize::MAX));
        check(|m| m.head_dim = 7, "model.head_dim = 7 is odd, but rotary embedding turns pairs of dims");
        check(|m| m.norm_eps = f32::NAN, "model.norm_eps = NaN, expected a number above 0 and below 1");
        check(|m| m.init_std = 0.0, "model.init_std = 0, expected a number above 0 and below 1");
        check(
            |m| (m.heads, m.kv_heads, m.head_dim) = (1 << 14, 1, 1 << 14),
            "model.heads x head_dim = 16384 x 16384, expected a product of at most 4194304",
        );
        check(
            |m| (m.layers, m.hidden, m.ffn) = (1 << 14, 1 << 20, 1 << 22),
            "the model has 216174465943339008 parameters, expected at most 10000000000000000",
        );
        check(
            |m| rope(m, RopeScaling::Linear { factor: 0.5 }),
            "model.rope_scaling.factor = 0.5, expected a number from 1 to 1e6",
        );
        check(
            |m| {
                rope(
                    m,
                    RopeScaling::Llama3 {
                        factor: 8.0,
                        low_freq_factor: 4.0,
                        high_freq_factor: 4.0,
                        original_max_positions: 8192,
                    },
                );
            },
            "model.rope_scaling.low_freq_factor = 4 and high_freq_factor = 4, expected 0 < low < high",
        );
    }

    /// Counts published with the weights, rounded by nobody.
    #[test]
    fn parameter_counts_match_published_weights() {
        for (name, expected) in [
            ("gpt2", 124_439_808),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
            ("tinyllama-1.1b", 1_100_048_384),
            ("llama2-7b", 6_738_415_616),
            ("llama2-13b", 13_015_864_320),
            ("llama2-70b", 68_976_648_192),
            ("llama3-8b", 8_030_261_248),
            ("llama3-70b", 70_553_706_496),
            ("llama3-405b", 405_853_388_800),
            ("llama3.2-1b", 1_235_814_400),
            ("mistral-7b-v0.3", 7_248_023_552),
            ("qwen2-0.5b", 494_032_768),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-8b", 8_190_735_360),
            ("llama-tiny-ref", 13_767_552),
        ] {
            assert_eq!(ModelSpec::preset(name).expect(name).param_count(), expected, "{name}");
        }
    }
}
