//! GPT-OSS: attention with sinks over windows in every other layer, and a mixture with biases, both ways.

use serde_json::{Value, json};

use super::{Config, Family, HEADS, HIDDEN, LAYERS, wide};
use crate::{
    Activation, Error, Experts, ModelSpec, NormKind, Position, Result, Rope, RopeScaling, Router, Yarn,
};

pub(super) const GPT_OSS: Family = Family {
    model_type: "gpt_oss",
    architecture: "GptOssForCausalLM",
    vocab: 201_088,
    hidden: 2880,
    ffn: 2880,
    layers: 36,
    heads: 64,
    kv_heads: Some(8),
    max_positions: 131_072,
};

/// Gates and ups are clamped to it.
const LIMIT: f64 = 7.0;

impl Config<'_> {
    /// A model of this family, to train it.
    pub(super) fn gpt_oss(&self) -> Result<ModelSpec> {
        self.check_gpt_oss()?;
        let family = &GPT_OSS;
        let max_positions = self.max_positions(family)?;
        let ffn = self.size(super::FFN, family.ffn)?;
        let chosen = self.count_or("experts_per_token", Some(4))?;
        Ok(ModelSpec {
            name: self.name(family)?,
            vocab: self.size(&["vocab_size"], family.vocab)?,
            layers: self.size(LAYERS, family.layers)?,
            hidden: self.size(HIDDEN, family.hidden)?,
            ffn,
            heads: self.size(HEADS, family.heads)?,
            kv_heads: self.count_or("num_key_value_heads", family.kv_heads)?,
            head_dim: self.count_or("head_dim", Some(64))?,
            norm: NormKind::Rms,
            norm_eps: self.number_or("rms_norm_eps", Some(1e-5))? as f32,
            position: Position::Rope(self.gpt_oss_rope(max_positions)?),
            activation: Activation::SwiGluClamped,
            qkv_bias: true,
            attn_out_bias: true,
            mlp_bias: true,
            qk_norm: false,
            tied_embeddings: self.flag_or("tie_word_embeddings", false)?,
            init_std: self.number_or("initializer_range", Some(0.02))? as f32,
            logit_softcap: 0.0,
            experts: Some(Experts {
                count: self.count_or("num_local_experts", Some(128))?,
                top_k: self.count_or("num_experts_per_tok", Some(chosen))?,
                ffn,
                shared_ffn: 0,
                dense_layers: 0,
                every: 1,
                router: Router { bias: true, ..Router::PLAIN },
            }),
            latent: None,
            window: self.trained_window(family)?,
            sinks: true,
            mtp: None,
        })
    }

    /// The class has a base and a scaling of its own.
    fn gpt_oss_rope(&self, max_positions: usize) -> Result<Rope> {
        let mut rope = self.rope(max_positions)?;
        if !["rope_scaling", "rope_parameters"].iter().any(|key| self.0.contains_key(*key)) {
            rope.scaling = RopeScaling::Yarn(Yarn {
                factor: 32.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_max_positions: max_positions,
                attention_factor: None,
                truncate: false,
                mscale_all_dim: 0.0,
            });
        }
        let said = |map: Option<&Value>| map.is_some_and(|m| m.get("rope_theta").is_some());
        if self.get("rope_theta").is_none() && !said(self.get("rope_parameters")) {
            rope.theta = 150_000.0;
        }
        Ok(rope)
    }

    fn check_gpt_oss(&self) -> Result<()> {
        let refuse = |key: &str, why: &str| {
            let shown = self.0.get(key).map(super::short).unwrap_or_default();
            Err(Error::user(format!("{key} = {shown} is not supported: {why}")))
        };
        if !self.quantised_by("mxfp4", &[]) {
            return refuse("quantization_config", "weights are read in 32 or 16 bits, or in MXFP4").map_err(
                |e: Error| {
                    e.hint(
                        "load it with dequantize=True (Mxfp4Config) in transformers, and save_pretrained it",
                    )
                },
            );
        }
        if !self.flag_or("attention_bias", true)? {
            return refuse("attention_bias", "projections have biases");
        }
        if self.number_or("swiglu_limit", Some(LIMIT))? != LIMIT {
            return refuse("swiglu_limit", "7 is");
        }
        match self.text("hidden_act")?.unwrap_or("silu") {
            "silu" => Ok(()),
            _ => refuse("hidden_act", "\"silu\" is"),
        }
    }
}

impl ModelSpec {
    /// The family, of a model that has sinks or the activation of GPT-OSS.
    pub(super) fn hf_gpt_oss(&self) -> std::result::Result<&'static Family, &'static str> {
        let Some(e) = self.experts else { return Err("attention sinks or clamped gates without experts") };
        let plain = Router { balance_loss: e.router.balance_loss, z_loss: e.router.z_loss, ..Router::PLAIN };
        let rope = matches!(self.position, Position::Rope(_));
        if !self.sinks || self.activation != Activation::SwiGluClamped || self.latent.is_some() {
            return Err("attention sinks or clamped gates, not both");
        }
        if !(self.qkv_bias && self.attn_out_bias && self.mlp_bias && e.router.bias) {
            return Err("GPT-OSS has biases on every projection, of experts and router too");
        }
        if self.norm != NormKind::Rms || !rope || self.qk_norm {
            return Err("GPT-OSS has RMSNorm and rotary positions, and no norms of queries and keys");
        }
        if e.shared_ffn > 0
            || e.dense_layers > 0
            || e.every > 1
            || (Router { bias: false, ..e.router }) != plain
        {
            return Err("GPT-OSS has routed experts alone, in every layer, and weights that add up to 1");
        }
        Ok(&GPT_OSS)
    }

    pub(super) fn gpt_oss_json(&self, own: &mut Value) {
        let Some(e) = self.experts else { return };
        own["num_local_experts"] = json!(e.count);
        own["num_experts_per_tok"] = json!(e.top_k);
        own["experts_per_token"] = json!(e.top_k);
        own["intermediate_size"] = json!(e.ffn);
        own["attention_bias"] = json!(true);
        own["swiglu_limit"] = json!(LIMIT);
        own["router_aux_loss_coef"] = json!(wide(e.router.balance_loss));
        own["output_router_logits"] = json!(false);
        // Absent, the class would slide in every other layer.
        if self.window.is_none() {
            own["layer_types"] = (0..self.layers).map(|_| "full_attention").collect();
        }
    }
}
