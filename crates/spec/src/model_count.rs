//! How many parameters a model has, and the FLOPs that follow from them.

use crate::{ModelSpec, NormKind, Position, Windows};

impl ModelSpec {
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
    /// looked up (token and position embeddings) and the experts that a token does not go to. A tied table counts, as
    /// the output projection.
    pub fn active_param_count(&self) -> u64 {
        let rows = if self.tied_embeddings { 0 } else { self.vocab };
        let positions = match self.position {
            Position::Learned { max_positions } => max_positions,
            Position::Rope(_) => 0,
        };
        let looked_up = rows.saturating_add(positions).saturating_mul(self.hidden) as u64;
        let (all, active) = self.layer_params(true);
        let behind = self.mtp.is_some() && self.has_experts(self.layers);
        let idle = (all - active).saturating_mul(self.expert_layers() as u64 + u64::from(behind));
        self.param_count().saturating_sub(looked_up).saturating_sub(idle)
    }

    /// Model FLOPs of one token of a training step on sequences of `sequence` tokens: forward and backward.
    ///
    /// `6 N + 6 L T H h`: `N` parameters that a token meets, a multiply-add is 2 FLOPs and backward is twice
    /// forward (Kaplan et al. 2020, section 2.1); scores and weighted values of `L` layers cost `2 T H h` each in
    /// forward (Chowdhery et al. 2022, appendix B: `12 L H Q T` with backward), halved because attention is causal, less
    /// what windows leave out. Recomputation never counts: this is the numerator of MFU.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// let model = ModelSpec::preset("llama-tiny-ref")?;
    /// let weights = 6 * (12_189_696 + 13 * 384); // matrices and norms
    /// let attention = 6 * 6 * 256 * 384;
    /// assert_eq!(model.flops_per_token(256), f64::from(weights + attention));
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn flops_per_token(&self, sequence: usize) -> f64 {
        let weights = 6.0 * self.active_param_count() as f64;
        let attention = 6.0 * sequence as f64 * self.score_width();
        let whole = self.layers as f64 * self.windows().map_or(1.0, |w| w.share(self.layers, sequence));
        weights + attention * whole + self.mtp_flops(attention)
    }

    /// What the module behind the last layer adds beside its own parameters: one layer's `attention`, and the output
    /// projection once more.
    fn mtp_flops(&self, attention: f64) -> f64 {
        let head = 6.0 * self.vocab as f64 * self.hidden as f64;
        if self.mtp.is_some() { attention + head } else { 0.0 }
    }

    /// How many tokens layer `i` looks back over, its own among them; `None` where it attends to all.
    ///
    /// ```
    /// use spec::{ModelSpec, Window};
    /// let window = Some(Window { tokens: 128, full_layers: 0, full_every: 2 });
    /// let model = ModelSpec { layers: 4, window, ..ModelSpec::preset("tiny")? };
    /// assert_eq!([0, 1, 2, 3].map(|i| model.window_of(i)), [Some(128), None, Some(128), None]);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn window_of(&self, i: usize) -> Option<usize> {
        self.window?.of(i)
    }

    /// How wide windows are and how many layers have one.
    ///
    /// ```
    /// use spec::{ModelSpec, Window};
    /// let window = Window { tokens: 128, full_layers: 2, full_every: 3 };
    /// let model = ModelSpec { layers: 12, window: Some(window), ..ModelSpec::preset("tiny")? };
    /// assert_eq!(model.windows().map(|w| w.layers), Some(7));
    /// assert_eq!((0..12).filter(|i| model.window_of(*i).is_some()).count(), 7);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn windows(&self) -> Option<Windows> {
        let w = self.window?;
        let after = self.layers.saturating_sub(w.full_layers);
        let layers = after - after.checked_div(w.full_every).unwrap_or(0);
        (layers > 0).then_some(Windows { tokens: w.tokens, layers })
    }

    /// Width over which scores and values are computed: query heads times head width, the mean of keys' and values'
    /// where those differ.
    pub fn score_width(&self) -> f64 {
        match self.latent {
            Some(l) => self.heads as f64 * (l.key_dim() + l.value_dim) as f64 / 2.0,
            None => self.q_width() as f64,
        }
    }

    /// Layers with the one of the module that predicts later tokens, which comes last.
    pub fn all_layers(&self) -> usize {
        self.layers + usize::from(self.mtp.is_some())
    }

    /// Whether layer `i` has experts.
    pub fn has_experts(&self, i: usize) -> bool {
        let after = |dense: usize| (i + 1).checked_sub(dense).filter(|n| *n > 0);
        self.experts.is_some_and(|e| after(e.dense_layers).is_some_and(|n| n.is_multiple_of(e.every.max(1))))
    }

    /// Layers with experts.
    pub fn expert_layers(&self) -> usize {
        self.experts.map_or(0, |e| self.layers.saturating_sub(e.dense_layers) / e.every.max(1))
    }

    /// Parameters of one layer's attention, without the norm before it.
    pub fn attention_params(&self) -> u64 {
        narrow(self.attention_sum())
    }

    /// Parameters of a layer with or without experts: (all, those that one token meets).
    pub fn layer_params(&self, experts: bool) -> (u64, u64) {
        let (all, active) = self.layer_sum(experts);
        (narrow(all), narrow(active))
    }

    fn attention_sum(&self) -> u128 {
        let hidden = self.hidden as u128;
        if let Some(l) = self.latent {
            let [heads, kv, rope] = [self.heads, l.kv_rank, l.rope_dim].map(|x| x as u128);
            let [key, up, value] =
                [l.key_dim(), l.nope_dim.saturating_add(l.value_dim), l.value_dim].map(|x| x as u128);
            let queries = match l.query_rank.map(|q| q as u128) {
                Some(q) => hidden * q + q + q * heads * key,
                None => hidden * heads * key,
            };
            let rest = hidden * (kv + rope) + kv + kv * heads * up + heads * value * hidden;
            return queries + rest + self.sink_sum();
        }
        let (q, kv) = (self.q_width() as u128, self.kv_width() as u128);
        let bias = |on: bool, width: u128| if on { width } else { 0 };
        hidden * (q + 2 * kv)
            + bias(self.qkv_bias, q + 2 * kv)
            + q * hidden
            + bias(self.attn_out_bias, hidden)
            + bias(self.qk_norm, 2 * self.head_dim as u128)
            + self.sink_sum()
    }

    fn sink_sum(&self) -> u128 {
        if self.sinks { self.heads as u128 } else { 0 }
    }

    fn norm_sum(&self) -> u128 {
        self.hidden as u128 * if self.norm == NormKind::Layer { 2 } else { 1 }
    }

    fn layer_sum(&self, experts: bool) -> (u128, u128) {
        let hidden = self.hidden as u128;
        let ups: u128 = if self.activation.gated() { 2 } else { 1 };
        let mlp = |ffn: usize| {
            let ffn = ffn as u128;
            (ups + 1) * hidden * ffn + if self.mlp_bias { ups * ffn + hidden } else { 0 }
        };
        let rest = self.attention_sum() + 2 * self.norm_sum();
        match self.experts.filter(|_| experts) {
            Some(e) => {
                let biases = if e.router.bias { e.count as u128 } else { 0 };
                let base = rest
                    + hidden * e.count as u128
                    + biases
                    + if e.shared_ffn > 0 { mlp(e.shared_ffn) } else { 0 };
                (base + mlp(e.ffn) * e.count as u128, base + mlp(e.ffn) * e.top_k as u128)
            }
            None => (rest + mlp(self.ffn), rest + mlp(self.ffn)),
        }
    }

    /// All that the module behind the last layer has of its own: its layer, two projections and three norms.
    fn mtp_sum(&self) -> u128 {
        let hidden = self.hidden as u128;
        let own = self.layer_sum(self.has_experts(self.layers)).0 + 2 * hidden * hidden + 3 * self.norm_sum();
        if self.mtp.is_some() { own } else { 0 }
    }

    pub(crate) fn param_sum(&self) -> u128 {
        let tables = if self.tied_embeddings { 1 } else { 2 } * self.vocab as u128 * self.hidden as u128;
        let positions = match self.position {
            Position::Learned { max_positions } => max_positions as u128 * self.hidden as u128,
            Position::Rope(_) => 0,
        };
        let with = self.expert_layers() as u128;
        let without = self.layers as u128 - with;
        let layers = with * self.layer_sum(true).0 + without * self.layer_sum(false).0;
        tables + positions + layers + self.norm_sum() + self.mtp_sum()
    }
}

fn narrow(params: u128) -> u64 {
    u64::try_from(params).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Latent, Mtp};

    /// Counted by hand for 4 heads of keys 6 + 2 and values 4 wide, over a residual stream of 32.
    #[test]
    fn latent_attention_has_these_parameters() {
        let latent = Latent { query_rank: Some(12), kv_rank: 8, nope_dim: 6, rope_dim: 2, value_dim: 4 };
        let (down, up, out) = (32 * (8 + 2) + 8, 8 * 4 * (6 + 4), 4 * 4 * 32);
        let check = |query_rank: Option<usize>, queries: u64| {
            let latent = Some(Latent { query_rank, ..latent });
            let model = ModelSpec { latent, ..ModelSpec::preset("tiny").expect("a preset") };
            assert_eq!(model.attention_params(), queries + down + up + out, "{query_rank:?}");
            assert_eq!(model.score_width(), 4.0 * (8.0 + 4.0) / 2.0);
        };
        check(Some(12), 32 * 12 + 12 + 12 * 4 * 8);
        check(None, 32 * 4 * 8);
    }

    /// Counted by hand for a layer of 4 heads and 2 of keys, 8 wide, and a gated MLP of 48, over a residual stream of 32.
    #[test]
    fn a_module_for_one_token_more_has_these_parameters_and_flops() {
        let plain = ModelSpec::preset("tiny").expect("a preset");
        let model = ModelSpec { mtp: Some(Mtp { weight: 0.3 }), ..plain.clone() };
        let layer = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48 + 2 * 32;
        let own = layer + 2 * 32 * 32 + 3 * 32;
        assert_eq!(model.param_count(), plain.param_count() + own);
        assert_eq!(model.active_param_count(), plain.active_param_count() + own);
        let (attention, head) = (6 * 256 * 32, 6 * 96 * 32);
        let more = (6 * own + attention + head) as f64;
        assert_eq!(model.flops_per_token(256), plain.flops_per_token(256) + more);
    }
}
