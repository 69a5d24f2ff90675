//! Mixtures of the families that train, both ways.

use serde_json::{Value, json};

use super::{Config, FFN, Family, LAYERS, MIXTRAL, QWEN3_MOE, wide};
use crate::{Experts, ModelSpec, NormKind, Position, Result, Router};

impl ModelSpec {
    /// The class in `transformers` that computes this model, for example `LlamaForCausalLM`.
    ///
    /// # Errors
    /// Combinations that none of the families has.
    pub fn hf_architecture(&self) -> Result<&'static str> {
        self.hf_family().map(|family| family.architecture)
    }

    /// The model that is written for this one, and what its experts' outputs are multiplied by: another where the families
    /// that have such a model have no factor of experts' weights.
    pub fn exported(&self) -> (ModelSpec, f32) {
        let same = (self.clone(), 1.0);
        let Some(e) = self.experts.filter(|_| self.hf_architecture().is_err()) else { return same };
        let router = Router { scale: 1.0, ..e.router };
        let plain = ModelSpec { experts: Some(Experts { router, ..e }), ..self.clone() };
        if plain.hf_architecture().is_ok() { (plain, e.router.scale) } else { same }
    }

    pub(super) fn experts_json(&self, family: &Family, own: &mut Value) {
        let Some(e) = self.experts else { return };
        own["num_experts_per_tok"] = json!(e.top_k);
        own["router_aux_loss_coef"] = json!(wide(e.router.balance_loss));
        own["output_router_logits"] = json!(false);
        if family.model_type == MIXTRAL.model_type {
            own["num_local_experts"] = json!(e.count);
            own["intermediate_size"] = json!(e.ffn);
            return;
        }
        own["num_experts"] = json!(e.count);
        own["moe_intermediate_size"] = json!(e.ffn);
        own["norm_topk_prob"] = json!(e.router.renormalise);
        own["decoder_sparse_step"] = json!(e.every);
        own["mlp_only_layers"] = json!((0..e.dense_layers).collect::<Vec<_>>());
        own["use_sliding_window"] = json!(false);
        own["sliding_window"] = Value::Null;
        own["attention_bias"] = json!(self.qkv_bias);
    }

    /// The family of a mixture, and what it does not have in common with either.
    pub(super) fn hf_mixture(&self, e: &Experts) -> std::result::Result<&'static Family, &'static str> {
        let plain =
            Router { balance_loss: e.router.balance_loss, z_loss: e.router.z_loss, ..Router::default() };
        let plain = Router { renormalise: e.router.renormalise, ..plain };
        let rope = matches!(self.position, Position::Rope(_));
        if self.norm != NormKind::Rms || !rope || !self.activation.gated() {
            Err("a mixture without RMSNorm, rotary positions or gates")
        } else if e.shared_ffn > 0 || e.router != plain {
            Err("shared experts, and routers other than a softmax, are read, not written")
        } else if self.mlp_bias || self.qkv_bias != self.attn_out_bias || self.qkv_bias && !self.qk_norm {
            Err("a mixture with biases")
        } else if self.qk_norm && self.window.is_some() {
            Err("windows in a mixture with query and key norms")
        } else if self.window.is_some_and(|w| w.full_layers + w.full_every > 0) {
            Err("a mixture with windows in some layers alone")
        } else if self.qk_norm {
            Ok(&QWEN3_MOE)
        } else if e.dense_layers > 0 || e.every > 1 || !e.router.renormalise {
            Err("Mixtral has experts in every layer and weights that add up to 1")
        } else {
            Ok(&MIXTRAL)
        }
    }
}

impl Config<'_> {
    /// The mixture of a family that trains, with its router.
    pub(super) fn trained_experts(&self, family: &Family) -> Result<Option<Experts>> {
        let layers = self.size(LAYERS, family.layers)?;
        let (count, ffn, top_k, renormalise) = match family.model_type {
            "mixtral" => {
                let count = self.count_or("num_local_experts", Some(8))?;
                (count, self.size(FFN, family.ffn)?, 2, true)
            }
            "qwen3_moe" => {
                let keys = ["num_experts", "num_local_experts"];
                let count = self
                    .count_or(keys.iter().find(|k| self.get(k).is_some()).unwrap_or(&keys[0]), Some(128))?;
                let ffn = self.count_or("moe_intermediate_size", Some(768))?;
                (count, ffn, 8, self.flag_or("norm_topk_prob", false)?)
            }
            _ => return Ok(None),
        };
        let (dense_layers, every) =
            if family.model_type == "mixtral" { (0, 1) } else { self.expert_layers(layers)? };
        Ok(Some(Experts {
            count,
            top_k: self.count_or("num_experts_per_tok", Some(top_k))?,
            ffn,
            shared_ffn: 0,
            dense_layers,
            every,
            router: Router { renormalise, ..Router::default() },
        }))
    }
}
