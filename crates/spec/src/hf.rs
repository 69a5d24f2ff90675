//! Hugging Face `config.json`, both ways. Defaults of absent keys are those of `transformers`' configuration classes.

mod bounded;
mod deepseek;
mod gpt_oss;
mod mixtures;
mod planned;
mod rope;
mod windows;

pub use bounded::{parse_json, small_json};
pub use planned::HfModel;
pub use windows::Windows;

use crate::{Activation, Error, Experts, Latent, ModelSpec, NormKind, Position, Result, Rope, Router};
use serde_json::{Map, Value, json};

/// `model_type`, the architecture with a language-model head, and what the configuration class assumes of an absent key.
struct Family {
    model_type: &'static str,
    architecture: &'static str,
    vocab: usize,
    hidden: usize,
    ffn: usize,
    layers: usize,
    heads: usize,
    /// `None`: as many as heads.
    kv_heads: Option<usize>,
    max_positions: usize,
}

const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    vocab: 32_000,
    hidden: 4096,
    ffn: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    max_positions: 2048,
};
const MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    ffn: 14_336,
    kv_heads: Some(8),
    max_positions: 131_072,
    ..LLAMA
};
const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    vocab: 151_936,
    ffn: 22_016,
    kv_heads: Some(32),
    max_positions: 32_768,
    ..LLAMA
};
const QWEN3: Family = Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", ..QWEN2 };
const GPT2: Family = Family {
    model_type: "gpt2",
    architecture: "GPT2LMHeadModel",
    vocab: 50_257,
    hidden: 768,
    ffn: 4 * 768,
    layers: 12,
    heads: 12,
    kv_heads: None,
    max_positions: 1024,
};
const MIXTRAL: Family = Family { model_type: "mixtral", architecture: "MixtralForCausalLM", ..MISTRAL };
const QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    architecture: "Qwen3MoeForCausalLM",
    hidden: 2048,
    ffn: 6144,
    layers: 24,
    kv_heads: Some(4),
    ..QWEN2
};
const FAMILIES: [&Family; 7] = [&LLAMA, &MISTRAL, &QWEN2, &QWEN3, &MIXTRAL, &QWEN3_MOE, &GPT2];

// Sizes under the name that the class writes first, then those of attribute maps, old files and other families.
const HIDDEN: &[&str] = &["hidden_size", "n_embd", "d_model", "n_embed"];
const FFN: &[&str] = &["intermediate_size", "n_inner", "ffn_dim"];
const LAYERS: &[&str] = &["num_hidden_layers", "n_layer", "n_layers", "num_layers"];
const HEADS: &[&str] = &["num_attention_heads", "n_head", "n_heads"];
const MAX_POSITIONS: &[&str] = &["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"];

impl ModelSpec {
    /// Reads the text of a `config.json` of the Llama, Mistral, Qwen 2, Qwen 3 or GPT-2 family, to train it.
    ///
    /// Dropout rates and token ids are ignored; anything else that would change the model is refused by name.
    /// [`HfModel::read`] takes many more, to plan them; [`HfModel::to_train`] says what was left out.
    ///
    /// # Errors
    /// Names the key that is missing, wrong, or of a model that cannot be trained.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// let config = r#"{ "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12 }"#;
    /// let model = ModelSpec::from_hf_config(config)?;
    /// assert_eq!(model.param_count(), 124_439_808);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn from_hf_config(text: &str) -> Result<ModelSpec> {
        HfModel::to_train(text).map(|found| found.model)
    }

    /// The model as a `config.json`, with `rope_theta` and `rope_scaling` where every version of `transformers` reads
    /// them.
    ///
    /// # Errors
    /// Combinations that none of the families has.
    pub fn to_hf_config(&self) -> Result<Value> {
        let family = self.hf_family()?;
        let mut config = json!({
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied_embeddings,
            "initializer_range": wide(self.init_std),
        });
        let own = match &self.position {
            Position::Learned { max_positions } => json!({
                "n_embd": self.hidden,
                "n_layer": self.layers,
                "n_head": self.heads,
                "n_inner": self.ffn,
                "n_positions": max_positions,
                "n_ctx": max_positions,
                "activation_function": if self.activation == Activation::Gelu { "gelu" } else { "gelu_new" },
                "layer_norm_epsilon": wide(self.norm_eps),
                "attn_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "resid_pdrop": 0.0,
            }),
            Position::Rope(rope) => {
                let mut own = json!({
                    "hidden_size": self.hidden,
                    "intermediate_size": self.ffn,
                    "num_hidden_layers": self.layers,
                    "num_attention_heads": self.heads,
                    "num_key_value_heads": self.kv_heads,
                    "head_dim": self.head_dim,
                    "hidden_act": "silu",
                    "max_position_embeddings": rope.max_positions,
                    "rms_norm_eps": wide(self.norm_eps),
                    "rope_theta": rope.theta,
                    "rope_scaling": rope::scaling_json(&rope.scaling),
                });
                self.windows_json(family, &mut own);
                match family.model_type {
                    "qwen2" | "mistral" => {}
                    "mixtral" | "qwen3_moe" => self.experts_json(family, &mut own),
                    "gpt_oss" => self.gpt_oss_json(&mut own),
                    "deepseek_v2" | "deepseek_v3" => self.deepseek_json(family, &mut own),
                    "qwen3" => {
                        own["attention_bias"] = json!(self.qkv_bias);
                    }
                    _ => {
                        own["attention_bias"] = json!(self.qkv_bias);
                        own["mlp_bias"] = json!(self.mlp_bias);
                    }
                }
                own
            }
        };
        if let (Some(config), Value::Object(own)) = (config.as_object_mut(), own) {
            config.extend(own);
        }
        Ok(config)
    }

    fn hf_family(&self) -> Result<&'static Family> {
        let refuse = |why: &str| {
            Err(Error::user(format!("{} has no Hugging Face architecture: {why}", self.name))
                .hint(deepseek::WRITTEN))
        };
        if self.logit_softcap != 0.0 {
            return refuse("logits that are squeezed");
        }
        if self.mtp.is_some() && self.latent.is_none() {
            return refuse("a module that predicts later tokens outside of DeepSeek-V3");
        }
        let rope = matches!(self.position, Position::Rope(_));
        if self.sinks || self.activation == Activation::SwiGluClamped {
            return self.hf_gpt_oss().or_else(refuse);
        }
        if self.latent.is_some() {
            if self.window.is_some() {
                return refuse("latent attention over windows");
            }
            return self.hf_deepseek().or_else(refuse);
        }
        if let Some(experts) = &self.experts {
            return self.hf_mixture(experts).or_else(refuse);
        }
        match (self.norm, rope) {
            (NormKind::Layer, true) => return refuse("LayerNorm with rotary positions"),
            (NormKind::Rms, false) => return refuse("RMSNorm with learned positions"),
            (NormKind::Layer, false) => {
                let plain = self.kv_heads == self.heads && self.q_width() == self.hidden && !self.qk_norm;
                return if self.activation.gated() {
                    refuse("a gated activation with LayerNorm")
                } else if !(self.qkv_bias && self.attn_out_bias && self.mlp_bias) {
                    refuse("GPT-2 has biases on every projection")
                } else if !plain {
                    refuse(
                        "GPT-2 has neither grouped heads nor query and key norms, and its heads fill the width",
                    )
                } else {
                    Ok(&GPT2)
                };
            }
            (NormKind::Rms, true) => {}
        }
        if !self.activation.gated() {
            return refuse("a plain activation with RMSNorm");
        }
        let family = match (self.qk_norm, self.qkv_bias, self.attn_out_bias) {
            (_, false, true) => return refuse("a bias on the attention output alone"),
            (true, true, false) => {
                return refuse("query and key norms with biases on query, key and value alone");
            }
            (true, ..) => &QWEN3,
            (false, true, false) => &QWEN2,
            (false, ..) => return self.hf_plain().or_else(refuse),
        };
        if self.mlp_bias { refuse("feed-forward biases outside of Llama") } else { Ok(family) }
    }

    /// Mistral is Llama with windows in every layer, and without biases.
    fn hf_plain(&self) -> std::result::Result<&'static Family, &'static str> {
        match self.window {
            None => Ok(&LLAMA),
            Some(w) if w.full_layers + w.full_every > 0 => {
                Err("windows in some layers alone, without biases on query, key and value or norms of theirs")
            }
            Some(_) if self.mlp_bias || self.attn_out_bias || self.qkv_bias => {
                Err("windows in every layer with biases")
            }
            Some(_) => Ok(&MISTRAL),
        }
    }
}

struct Config<'a>(&'a Map<String, Value>);

impl<'a> Config<'a> {
    /// `null` means absent, as in `transformers`.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        match self.0.get(key) {
            Some(value) => Error::user(format!("{key} = {}, expected {expected}", short(value))),
            None => Error::user(format!("{key} is missing, expected {expected}")),
        }
    }

    fn count_or(&self, key: &str, default: Option<usize>) -> Result<usize> {
        let found = match self.get(key) {
            Some(value) => value.as_u64().and_then(|x| usize::try_from(x).ok()),
            None => default,
        };
        found.filter(|x| *x > 0).ok_or_else(|| self.wrong(key, "a whole number above 0"))
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.count_or(key, None)
    }

    /// A size under any of its names; absent, what the class assumes. A null is no size.
    fn size(&self, keys: &[&str], default: usize) -> Result<usize> {
        let mut there = keys.iter().filter(|k| self.0.contains_key(**k));
        let Some(first) = there.next() else { return Ok(default) };
        let found = self.count(first)?;
        // `n_ctx` is a left-over beside the other names.
        match there.find(|k| **k != "n_ctx" && self.0[**k] != self.0[*first]) {
            Some(other) => Err(Error::user(format!(
                "{first} = {} and {other} = {} contradict each other",
                short(&self.0[*first]),
                short(&self.0[*other])
            ))),
            None => Ok(found),
        }
    }

    /// Whether weights are in 16 or 32 bits, or stored by this method with these settings where it names them.
    fn quantised_by(&self, method: &str, settings: &[(&str, Value)]) -> bool {
        let Some(config) = self.get("quantization_config") else { return true };
        let is = |key: &str, wanted: &Value| config.get(key).is_none_or(|found| found == wanted);
        config.get("quant_method") == Some(&json!(method))
            && settings.iter().all(|(key, wanted)| is(key, wanted))
    }

    fn max_positions(&self, family: &Family) -> Result<usize> {
        self.size(MAX_POSITIONS, family.max_positions)
    }

    fn number_or(&self, key: &str, default: Option<f64>) -> Result<f64> {
        let found = self.get(key).map_or(default, Value::as_f64);
        found.ok_or_else(|| self.wrong(key, "a number"))
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Some(default), Value::as_bool).ok_or_else(|| self.wrong(key, "true or false"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| self.wrong(key, "text"))).transpose()
    }

    fn family(&self) -> Result<&'static Family> {
        let supported = || {
            let names: Vec<&str> = FAMILIES.iter().chain(&deepseek::BOTH).map(|f| f.architecture).collect();
            let names = [names, vec![gpt_oss::GPT_OSS.architecture]].concat();
            format!("supported: {}", names.join(", "))
        };
        let architecture = self.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
        let model_type = self.text("model_type")?;
        let family = FAMILIES.into_iter().find(|f| match (model_type, architecture) {
            (Some(model_type), _) => f.model_type == model_type,
            (None, Some(architecture)) => f.architecture == architecture,
            (None, None) => false,
        });
        match (family, architecture) {
            (None, _) => {
                let name = architecture.or(model_type);
                let planned = model_type.is_some_and(planned::knows);
                let what = name.map_or("model_type is missing".to_owned(), |n| match planned {
                    true => format!("architecture {n} can be planned, it does not train yet"),
                    false => format!("architecture {n} is not supported"),
                });
                Err(Error::user(what).hint(supported()))
            }
            // The same layers under another head (classification, value) are another model.
            (Some(family), Some(architecture)) if architecture != family.architecture => {
                Err(Error::user(format!("architecture {architecture} is not supported")).hint(supported()))
            }
            (Some(family), _) => Ok(family),
        }
    }

    /// What the model does that the trainer does not.
    fn unsupported(&self, family: &Family) -> Result<Vec<Error>> {
        let mut found = Vec::new();
        let mut refuse = |key: &str, why: &str| {
            let value = self.get(key).map(short).unwrap_or_default();
            found.push(
                Error::user(format!("{key} = {value} is not supported: {why}"))
                    .hint(format!("supported: {} without it", family.architecture)),
            );
        };
        if self.get("quantization_config").is_some() {
            refuse("quantization_config", "weights are read in float32, bfloat16 or float16");
        }
        for key in ["partial_rotary_factor", "embedding_multiplier", "logits_scaling", "residual_multiplier"]
        {
            if self.number_or(key, Some(1.0))? != 1.0 {
                refuse(key, "only 1 is");
            }
        }
        if self.number_or("router_jitter_noise", Some(0.0))? != 0.0 {
            refuse("router_jitter_noise", "routers have no noise");
        }
        for key in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
            if self.flag_or(key, false)? {
                refuse(key, "only false is");
            }
        }
        if !self.flag_or("scale_attn_weights", true)? {
            refuse("scale_attn_weights", "only true is");
        }
        found.extend(self.unknown_windows(family)?);
        Ok(found)
    }

    fn name(&self, family: &Family) -> Result<String> {
        Ok(self.text("_name_or_path")?.filter(|n| !n.is_empty()).unwrap_or(family.model_type).to_owned())
    }

    fn llama(&self, family: &Family, rope: impl FnOnce(&Self, usize) -> Result<Rope>) -> Result<ModelSpec> {
        let act = self.text("hidden_act")?.unwrap_or("silu");
        if !["silu", "swish"].contains(&act) {
            return Err(
                Error::user(format!("hidden_act = \"{act}\" is not supported")).hint("supported: \"silu\"")
            );
        }
        let hidden = self.size(HIDDEN, family.hidden)?;
        let heads = self.size(HEADS, family.heads)?;
        // Only an absent key is the class's number; a null means as many as heads.
        let kv_heads = match self.0.contains_key("num_key_value_heads") {
            true => heads,
            false => family.kv_heads.unwrap_or(heads),
        };
        let qwen3 = ["qwen3", "qwen3_moe"].contains(&family.model_type);
        let experts = self.trained_experts(family)?;
        let own_dim = match family.model_type {
            "qwen3" => Some(128),
            _ => (hidden.is_multiple_of(heads)).then(|| hidden / heads),
        };
        let attention_bias = match family.model_type {
            "qwen2" | "mistral" | "mixtral" => false,
            _ => self.flag_or("attention_bias", false)?,
        };
        Ok(ModelSpec {
            name: self.name(family)?,
            vocab: self.size(&["vocab_size"], family.vocab)?,
            layers: self.size(LAYERS, family.layers)?,
            hidden,
            ffn: self.size(FFN, family.ffn)?,
            heads,
            kv_heads: self.count_or("num_key_value_heads", Some(kv_heads))?,
            head_dim: self.count_or("head_dim", own_dim)?,
            norm: NormKind::Rms,
            norm_eps: self
                .number_or("rms_norm_eps", Some(if family.model_type == "mixtral" { 1e-5 } else { 1e-6 }))?
                as f32,
            position: Position::Rope(rope(self, self.max_positions(family)?)?),
            activation: Activation::SwiGlu,
            qkv_bias: attention_bias || family.model_type == "qwen2",
            attn_out_bias: attention_bias,
            mlp_bias: family.model_type == "llama" && self.flag_or("mlp_bias", false)?,
            qk_norm: qwen3,
            tied_embeddings: self.flag_or("tie_word_embeddings", false)?,
            init_std: self.number_or("initializer_range", Some(0.02))? as f32,
            logit_softcap: 0.0,
            experts,
            latent: None,
            window: self.trained_window(family)?,
            sinks: false,
            mtp: None,
        })
    }

    fn gpt2(&self) -> Result<ModelSpec> {
        let activation = match self.text("activation_function")?.unwrap_or("gelu_new") {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "gelu" => Activation::Gelu,
            other => {
                return Err(Error::user(format!("activation_function = \"{other}\" is not supported"))
                    .hint("supported: \"gelu_new\", \"gelu\""));
            }
        };
        let hidden = self.size(HIDDEN, GPT2.hidden)?;
        let heads = self.size(HEADS, GPT2.heads)?;
        if !hidden.is_multiple_of(heads) {
            return Err(Error::user(format!("n_head = {heads} does not divide n_embd = {hidden}")));
        }
        Ok(ModelSpec {
            name: self.name(&GPT2)?,
            vocab: self.size(&["vocab_size"], GPT2.vocab)?,
            layers: self.size(LAYERS, GPT2.layers)?,
            hidden,
            ffn: self.count_or("n_inner", hidden.checked_mul(4))?,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            norm: NormKind::Layer,
            norm_eps: self.number_or("layer_norm_epsilon", Some(1e-5))? as f32,
            position: Position::Learned { max_positions: self.max_positions(&GPT2)? },
            activation,
            qkv_bias: true,
            attn_out_bias: true,
            mlp_bias: true,
            qk_norm: false,
            tied_embeddings: self.flag_or("tie_word_embeddings", true)?,
            init_std: self.number_or("initializer_range", Some(0.02))? as f32,
            logit_softcap: 0.0,
            experts: None,
            latent: None,
            window: None,
            sinks: false,
            mtp: None,
        })
    }
}

/// The double that has the same shortest decimal: `1e-5`, not `9.999999747378752e-6`.
fn wide(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// A value in a message, cut where it gets long.
fn short(value: &Value) -> String {
    const SHOWN: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= SHOWN { text } else { text.chars().take(SHOWN).chain("...".chars()).collect() }
}

#[cfg(test)]
#[path = "hf_tests.rs"]
mod tests;
