//! DeepSeek-V2 and V3: latent attention, and a mixture with shared experts, both ways.

use serde_json::{Map, Value, json};

use super::{Config, Family, LLAMA, MAX_POSITIONS, wide};
use crate::model::LATENT_NORM_EPS;
use crate::{
    Activation, Error, Experts, Latent, ModelSpec, Mtp, NormKind, Position, Result, Rope, RopeScaling,
    Router, Score,
};

/// Softmax scores, the best of all as they are.
pub(super) const DEEPSEEK_V2: Family =
    Family { model_type: "deepseek_v2", architecture: "DeepseekV2ForCausalLM", ..LLAMA };
/// Sigmoid scores, chosen by group.
pub(super) const DEEPSEEK_V3: Family = Family {
    model_type: "deepseek_v3",
    architecture: "DeepseekV3ForCausalLM",
    vocab: 129_280,
    hidden: 7168,
    ffn: 18_432,
    layers: 61,
    heads: 128,
    max_positions: 4096,
    ..LLAMA
};

pub(super) const BOTH: [&Family; 2] = [&DEEPSEEK_V2, &DEEPSEEK_V3];

/// What can be written, of all families.
pub(super) const WRITTEN: &str = "the families that can be written are Llama, Qwen 2, Qwen 3, Mixtral, Qwen 3 MoE, \
                                  Mistral, GPT-OSS, DeepSeek-V2, DeepSeek-V3 and GPT-2";

/// DeepSeek-V3 under a name of its own.
const KIMI_K2: &str = "kimi_k2";

/// The family that a `model_type` names.
pub(super) fn family(model_type: &str) -> Option<&'static Family> {
    BOTH.into_iter().find(|f| {
        f.model_type == model_type || model_type == KIMI_K2 && f.model_type == DEEPSEEK_V3.model_type
    })
}

impl Config<'_> {
    /// A model of these families, to train it.
    pub(super) fn deepseek(&self, family: &'static Family) -> Result<ModelSpec> {
        self.check_deepseek(family)?;
        let v3 = family.model_type == DEEPSEEK_V3.model_type;
        let heads = self.size(super::HEADS, family.heads)?;
        let latent = Latent {
            query_rank: match self.0.get("q_lora_rank") {
                Some(Value::Null) => None,
                _ => Some(self.count_or("q_lora_rank", Some(1536))?),
            },
            kv_rank: self.count_or("kv_lora_rank", Some(512))?,
            nope_dim: self.count_or("qk_nope_head_dim", Some(128))?,
            rope_dim: self.count_or("qk_rope_head_dim", Some(64))?,
            value_dim: self.count_or("v_head_dim", Some(128))?,
        };
        let max_positions = self.size(MAX_POSITIONS, family.max_positions)?;
        Ok(ModelSpec {
            name: self.name(family)?,
            vocab: self.size(&["vocab_size"], family.vocab)?,
            layers: self.size(super::LAYERS, family.layers)?,
            hidden: self.size(super::HIDDEN, family.hidden)?,
            ffn: self.size(super::FFN, family.ffn)?,
            heads,
            kv_heads: heads,
            head_dim: latent.key_dim(),
            norm: NormKind::Rms,
            norm_eps: self.number_or("rms_norm_eps", Some(wide(LATENT_NORM_EPS)))? as f32,
            position: Position::Rope(self.deepseek_rope(max_positions)?),
            activation: Activation::SwiGlu,
            qkv_bias: false,
            attn_out_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied_embeddings: self.flag_or("tie_word_embeddings", false)?,
            init_std: self.number_or("initializer_range", Some(0.02))? as f32,
            logit_softcap: 0.0,
            experts: self.deepseek_experts(v3)?,
            latent: Some(latent),
            window: None,
            sinks: false,
            mtp: self.deepseek_mtp(family)?,
        })
    }

    /// Scaled positions change the scale of scores too, by a factor for all dims.
    fn deepseek_rope(&self, max_positions: usize) -> Result<Rope> {
        let mut rope = self.rope(max_positions)?;
        let keys = ["rope_parameters", "rope_scaling"];
        let map = keys.iter().find_map(|key| self.get(key)?.as_object());
        if let (RopeScaling::Yarn(yarn), Some(map)) = (&mut rope.scaling, map) {
            yarn.mscale_all_dim = Config(map).number_or("mscale_all_dim", Some(0.0))?;
        }
        Ok(rope)
    }

    /// Of how many tokens after the next one there is a module for.
    fn deepseek_mtp(&self, family: &Family) -> Result<Option<Mtp>> {
        const KEY: &str = "num_nextn_predict_layers";
        match self.get(KEY).map(|value| value.as_u64()) {
            None | Some(Some(0)) => Ok(None),
            Some(Some(1)) if family.model_type == DEEPSEEK_V3.model_type => {
                Ok(Some(Mtp { weight: Mtp::WEIGHT }))
            }
            _ => Err(self.wrong(KEY, "0 or, of DeepSeek-V3, 1")),
        }
    }

    fn deepseek_experts(&self, v3: bool) -> Result<Option<Experts>> {
        let count = |key: &str, v2: Option<usize>, of_v3: usize| {
            self.count_or(key, if v3 { Some(of_v3) } else { v2 })
        };
        let whole = |key: &str, default: u64| match self.get(key) {
            Some(value) => value.as_u64().ok_or_else(|| self.wrong(key, "a whole number")),
            None => Ok(default),
        };
        let dense_layers = whole("first_k_dense_replace", if v3 { 3 } else { 0 })? as usize;
        let layers = self.size(super::LAYERS, if v3 { DEEPSEEK_V3.layers } else { DEEPSEEK_V2.layers })?;
        if dense_layers >= layers {
            return Ok(None);
        }
        let ffn = count("moe_intermediate_size", Some(1407), 2048)?;
        let shared = count("n_shared_experts", Some(2), 1)?;
        let (groups, top_groups) = match v3 {
            true => (count("n_group", None, 8)?, count("topk_group", None, 4)?),
            false => (1, 1),
        };
        let router = Router {
            score: if v3 { Score::Sigmoid } else { Score::Softmax },
            renormalise: v3 && self.flag_or("norm_topk_prob", true)?,
            scale: self.number_or("routed_scaling_factor", Some(if v3 { 2.5 } else { 1.0 }))? as f32,
            groups,
            top_groups,
            expert_bias: v3,
            ..Router::PLAIN
        };
        Ok(Some(Experts {
            count: count("n_routed_experts", Some(64), 256)?,
            top_k: count("num_experts_per_tok", None, 8)?,
            ffn,
            shared_ffn: ffn.saturating_mul(shared),
            dense_layers,
            every: 1,
            router,
        }))
    }

    /// What the classes can do that the trainer cannot.
    fn check_deepseek(&self, family: &Family) -> Result<()> {
        let refuse = |key: &str, why: &str| {
            let shown = self.0.get(key).map(super::short).unwrap_or_default();
            Err(Error::user(format!("{key} = {shown} is not supported: {why}"))
                .hint(format!("supported: {} without it", family.architecture)))
        };
        if !self.quantised_by("fp8", &[("weight_block_size", json!([128, 128])), ("fmt", json!("e4m3"))]) {
            return refuse(
                "quantization_config",
                "weights are read in 32 or 16 bits, or in e4m3 with a scale for each 128 rows and columns",
            );
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag_or(key, false)? {
                return refuse(key, "projections have no biases");
            }
        }
        if !self.flag_or("rope_interleave", true)? {
            return refuse("rope_interleave", "pairs of neighbours are rotated");
        }
        let empty = Map::new();
        for key in ["rope_scaling", "rope_parameters"] {
            let map = self.get(key).and_then(Value::as_object).unwrap_or(&empty);
            let kind = map.get("rope_type").or(map.get("type")).and_then(Value::as_str);
            if kind.is_some_and(|kind| !["default", "yarn"].contains(&kind)) {
                return refuse(key, "positions of latent attention are scaled by \"yarn\" alone");
            }
        }
        let act = self.text("hidden_act")?.unwrap_or("silu");
        if act != "silu" {
            return refuse("hidden_act", "\"silu\" is");
        }
        let v3 = family.model_type == DEEPSEEK_V3.model_type;
        let (topk, scores) = if v3 { ("noaux_tc", "sigmoid") } else { ("greedy", "softmax") };
        if self.text("topk_method")?.is_some_and(|method| method != topk) {
            return refuse("topk_method", &format!("\"{topk}\" is"));
        }
        if self.text("scoring_func")?.is_some_and(|f| f != scores) {
            return refuse("scoring_func", &format!("\"{scores}\" is"));
        }
        if !v3 && self.flag_or("norm_topk_prob", false)? {
            return refuse("norm_topk_prob", "the class leaves weights as they are");
        }
        if self.number_or("moe_layer_freq", Some(1.0))? != 1.0 {
            return refuse("moe_layer_freq", "only 1 is");
        }
        Ok(())
    }
}

impl ModelSpec {
    /// The family of a model with latent attention, and what it does not have in common with either.
    pub(super) fn hf_deepseek(&self) -> std::result::Result<&'static Family, &'static str> {
        let rope = match &self.position {
            Position::Rope(rope) => {
                matches!(rope.scaling, RopeScaling::Default | RopeScaling::Yarn(_))
            }
            Position::Learned { .. } => false,
        };
        if self.norm != NormKind::Rms || !rope || !self.activation.gated() {
            return Err("latent attention without RMSNorm, gates or rotary positions, plain or by YaRN");
        }
        if self.mlp_bias || self.attn_out_bias {
            return Err("latent attention with biases");
        }
        let v2 = self.experts.is_some_and(|e| e.router.score == Score::Softmax);
        if self.mtp.is_some() && v2 {
            return Err("a module that predicts later tokens outside of DeepSeek-V3");
        }
        let Some(e) = self.experts else { return Ok(&DEEPSEEK_V3) };
        if e.every > 1 || e.shared_ffn == 0 || !e.shared_ffn.is_multiple_of(e.ffn) {
            return Err("latent attention with experts that are not shared in part, in every layer");
        }
        let softmax = e.router.score == Score::Softmax;
        match softmax {
            true if e.router.renormalise || e.router.groups > 1 || e.router.expert_bias => {
                Err("latent attention with softmax scores that are grouped, renormalised or have biases")
            }
            true => Ok(&DEEPSEEK_V2),
            false => Ok(&DEEPSEEK_V3),
        }
    }

    pub(super) fn deepseek_json(&self, family: &Family, own: &mut Value) {
        let Some(l) = self.latent else { return };
        let v3 = family.model_type == DEEPSEEK_V3.model_type;
        own["q_lora_rank"] = json!(l.query_rank);
        own["kv_lora_rank"] = json!(l.kv_rank);
        own["qk_nope_head_dim"] = json!(l.nope_dim);
        own["qk_rope_head_dim"] = json!(l.rope_dim);
        own["v_head_dim"] = json!(l.value_dim);
        // The classes rotate as many dims as this says.
        own["head_dim"] = json!(l.rope_dim);
        own["attention_bias"] = json!(false);
        own["first_k_dense_replace"] = json!(self.experts.map_or(self.layers, |e| e.dense_layers));
        if self.mtp.is_some() {
            own["num_nextn_predict_layers"] = json!(1);
        }
        let Some(e) = self.experts else { return };
        own["n_routed_experts"] = json!(e.count);
        own["num_experts_per_tok"] = json!(e.top_k);
        own["moe_intermediate_size"] = json!(e.ffn);
        own["n_shared_experts"] = json!(e.shared_ffn / e.ffn);
        own["routed_scaling_factor"] = json!(wide(e.router.scale));
        own["norm_topk_prob"] = json!(e.router.renormalise);
        own["topk_method"] = json!(if v3 { "noaux_tc" } else { "greedy" });
        own["scoring_func"] = json!(if v3 { "sigmoid" } else { "softmax" });
        own["n_group"] = json!(e.router.groups);
        own["topk_group"] = json!(e.router.top_groups);
    }
}
