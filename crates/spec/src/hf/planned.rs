//! Families that are planned beyond those that train: read for their sizes, with a note of what is only alike.

use super::windows::Windows;
use super::{Config, Experts, FAMILIES, GPT2, HEADS, HIDDEN, LAYERS, Latent, Router, parse_json};
use crate::{Activation, Error, ModelSpec, NormKind, Position, Result, Rope, RopeScaling};
use serde_json::{Map, Value};

/// A `config.json` as planning takes it: the sizes are right, and whatever the shape cannot say is noted.
#[derive(Clone, Debug, PartialEq)]
pub struct HfModel {
    /// The model's shape. Parameters agree with the published count within a percent.
    pub model: ModelSpec,
    /// Layers that attend over a window only, which the shape does not say.
    pub windows: Option<Windows>,
    /// What the model does otherwise than the shape says, one sentence each; empty when the shape is the model.
    pub inexact: Vec<String>,
}

/// A family with keys like Llama's, and what its class assumes where they are absent.
struct Planned {
    model_type: &'static str,
    norm: NormKind,
    act: &'static str,
    qkv_bias: bool,
    out_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    tied: bool,
    position: Positions,
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    /// What every model of the family does that the shape does not say.
    note: &'static str,
}

#[derive(Clone, Copy, PartialEq)]
enum Positions {
    Rotary,
    Learned,
    Alibi,
}

const LLAMA_LIKE: Planned = Planned {
    model_type: "",
    norm: NormKind::Rms,
    act: "silu",
    qkv_bias: false,
    out_bias: false,
    mlp_bias: false,
    qk_norm: false,
    tied: false,
    position: Positions::Rotary,
    kv_heads: None,
    head_dim: None,
    note: "",
};

const GPT_LIKE: Planned = Planned {
    norm: NormKind::Layer,
    act: "gelu",
    qkv_bias: true,
    out_bias: true,
    mlp_bias: true,
    ..LLAMA_LIKE
};

const GEMMA_NOTES: &str =
    "embeddings are scaled, norms come after the halves of a layer too, logits may be capped";

static PLANNED: &[Planned] = &[
    Planned { model_type: "qwen2_moe", qkv_bias: true, note: "shared experts have a gate", ..LLAMA_LIKE },
    Planned { model_type: "olmoe", qk_norm: true, note: "query and key norms span all heads", ..LLAMA_LIKE },
    Planned { model_type: "deepseek_v2", note: "scores of experts are limited by group", ..LLAMA_LIKE },
    Planned { model_type: "deepseek_v3", note: DEEPSEEK_V3, ..LLAMA_LIKE },
    Planned { model_type: "kimi_k2", note: DEEPSEEK_V3, ..LLAMA_LIKE },
    Planned {
        model_type: "llama4_text",
        kv_heads: Some(8),
        head_dim: Some(128),
        note: "some layers attend in chunks or without rotation; queries and keys are normed without weights",
        ..LLAMA_LIKE
    },
    Planned {
        model_type: "gpt_oss",
        qkv_bias: true,
        out_bias: true,
        kv_heads: Some(8),
        head_dim: Some(64),
        note: "experts have biases, heads have sinks",
        ..LLAMA_LIKE
    },
    Planned { model_type: "phi3", ..LLAMA_LIKE },
    Planned { model_type: "smollm3", tied: true, kv_heads: Some(4), ..LLAMA_LIKE },
    Planned { model_type: "granite", note: MULTIPLIERS, ..LLAMA_LIKE },
    Planned { model_type: "granitemoe", note: MULTIPLIERS, ..LLAMA_LIKE },
    Planned {
        model_type: "glm4_moe",
        head_dim: Some(128),
        kv_heads: Some(8),
        note: DEEPSEEK_V3,
        ..LLAMA_LIKE
    },
    Planned {
        model_type: "gptj",
        qkv_bias: false,
        out_bias: false,
        note: "attention and feed-forward run side by side on the same norm; a quarter of a head's dims are rotated",
        ..GPT_LIKE
    },
    Planned {
        model_type: "gemma",
        act: "gelu_gated",
        tied: true,
        head_dim: Some(256),
        note: "embeddings are scaled",
        ..LLAMA_LIKE
    },
    Planned {
        model_type: "gemma2",
        act: "gelu_gated",
        tied: true,
        kv_heads: Some(4),
        head_dim: Some(256),
        note: GEMMA_NOTES,
        ..LLAMA_LIKE
    },
    Planned {
        model_type: "gemma3_text",
        act: "gelu_gated",
        tied: true,
        qk_norm: true,
        kv_heads: Some(4),
        head_dim: Some(256),
        note: GEMMA_NOTES,
        ..LLAMA_LIKE
    },
    Planned {
        model_type: "olmo2",
        qk_norm: true,
        note: "norms come after the halves of a layer, query and key norms span all heads",
        ..LLAMA_LIKE
    },
    Planned { model_type: "starcoder2", tied: true, kv_heads: Some(2), ..GPT_LIKE },
    Planned { model_type: "gpt_neox", note: PARALLEL, ..GPT_LIKE },
    Planned { model_type: "falcon", tied: true, note: PARALLEL, ..GPT_LIKE },
    Planned { model_type: "mpt", tied: true, position: Positions::Alibi, ..GPT_LIKE },
    Planned {
        model_type: "bloom",
        tied: true,
        position: Positions::Alibi,
        note: "a norm follows the embedding",
        ..GPT_LIKE
    },
    Planned { model_type: "opt", tied: true, position: Positions::Learned, act: "relu", ..GPT_LIKE },
];

/// Types that people ask for and whose layers the program cannot say, and why.
const REFUSED: [(&str, &str); 12] = [
    (
        "qwen3_next",
        "three of four layers are gated delta rules (linear attention with a state), for which there is no operation yet",
    ),
    ("mamba", MAMBA),
    ("mamba2", MAMBA),
    ("falcon_mamba", MAMBA),
    ("jamba", HYBRID),
    ("bamba", HYBRID),
    ("zamba2", HYBRID),
    ("falcon_h1", HYBRID),
    ("nemotron_h", HYBRID),
    ("granitemoehybrid", HYBRID),
    (
        "recurrent_gemma",
        "two of three layers are gated linear recurrences, for which there is no operation yet",
    ),
    ("rwkv", "its layers are linear recurrences, for which there is no operation yet"),
];
const MAMBA: &str = "its layers are state space models, for which there is no operation yet";
const HYBRID: &str = "some of its layers are state space models, for which there is no operation yet";

const DEEPSEEK_V3: &str = "experts are scored by sigmoids with a correction and limited by group; prediction heads of later tokens are left out";
const MULTIPLIERS: &str = "embeddings, residuals, scores and logits are scaled by factors";
const PARALLEL: &str = "attention and feed-forward run side by side on the same norm";

/// Wrappers around a text model, by the `model_type` of the model inside where that is not written.
const WRAPPERS: [(&str, &str); 14] = [
    ("qwen2_vl", "qwen2"),
    ("qwen2_vl_text", "qwen2"),
    ("qwen2_5_vl", "qwen2"),
    ("qwen2_5_vl_text", "qwen2"),
    ("qwen3_vl", "qwen3"),
    ("qwen3_vl_text", "qwen3"),
    ("llama4", "llama4_text"),
    ("gemma3", "gemma3_text"),
    ("llava", "llama"),
    ("llava_next", "llama"),
    ("vipllava", "llama"),
    ("mistral3", "mistral"),
    ("llava_onevision", "qwen2"),
    ("internvl", "qwen2"),
];

/// Whether models of this type can be planned.
pub(super) fn knows(model_type: &str) -> bool {
    PLANNED.iter().any(|p| p.model_type == model_type)
        || WRAPPERS.iter().any(|(outer, _)| *outer == model_type)
}

fn names() -> String {
    let trains = FAMILIES.iter().map(|f| f.model_type);
    let all: Vec<&str> = trains.chain(PLANNED.iter().map(|p| p.model_type)).collect();
    all.join(", ")
}

impl HfModel {
    /// Reads the text of a `config.json`, to plan the model.
    ///
    /// ```
    /// use spec::HfModel;
    /// let config = r#"{ "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    ///     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    ///     "num_experts_per_tok": 2, "max_position_embeddings": 32768 }"#;
    /// let found = HfModel::read(config)?;
    /// assert_eq!(found.model.param_count(), 46_702_792_704);
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// Text that is no config, sizes that are missing or absurd, and architectures that are no decoder with attention
    /// in every layer, by name.
    pub fn read(text: &str) -> Result<HfModel> {
        let hint = "expected the config.json that transformers writes beside the weights";
        Self::parse(text).map_err(|e| if e.hint_text().is_some() { e } else { e.hint(hint) })
    }

    /// Reads the text of a `config.json`, to train the model: whatever would make it another model is refused.
    /// `inexact` then says which parts of a model of several kinds of input are left out.
    ///
    /// # Errors
    /// As [`HfModel::read`], and models that can only be planned, by what is in the way.
    pub fn to_train(text: &str) -> Result<HfModel> {
        let hint = "expected the config.json that transformers writes beside the weights";
        Self::parse_to_train(text).map_err(|e| e.hint(hint))
    }

    fn parse_to_train(text: &str) -> Result<HfModel> {
        let mut map = keys(text)?;
        let mut left_out = Vec::new();
        let own_family = FAMILIES.iter().any(|f| map.get("model_type").is_some_and(|t| t == f.model_type));
        if map.get("text_config").is_some_and(Value::is_object) && !own_family {
            let kind = Config(&map).text("model_type")?.unwrap_or("the model");
            let parts: Vec<&str> = map
                .iter()
                .filter(|(k, v)| v.is_object() && k.ends_with("_config") && !TEXT_KEYS.contains(&k.as_str()))
                .map(|(k, _)| k.as_str())
                .collect();
            if !parts.is_empty() {
                left_out
                    .push(format!("the text part of {kind} alone is read: {} left out", parts.join(", ")));
            }
            let (mut text, kind) = inner(&map)?;
            text.insert("model_type".to_owned(), kind.into());
            // The wrapper's own class says nothing of the model inside.
            if !map["text_config"].as_object().is_some_and(|t| t.contains_key("architectures")) {
                text.remove("architectures");
            }
            map = text;
        }
        let config = Config(&map);
        if let Some(family) = config.text("model_type")?.and_then(super::deepseek::family) {
            let model = config.deepseek(family)?;
            model.validate()?;
            return Ok(HfModel { model, windows: None, inexact: left_out });
        }
        if config.text("model_type")? == Some(super::gpt_oss::GPT_OSS.model_type) {
            let model = config.gpt_oss()?;
            model.validate()?;
            return Ok(HfModel { windows: model.windows(), model, inexact: left_out });
        }
        let family = config.family()?;
        if let Some(first) = config.unsupported(family)?.into_iter().next() {
            return Err(first);
        }
        let model = if family.model_type == GPT2.model_type {
            config.gpt2()?
        } else {
            config.llama(family, |c, positions| c.rope(positions))?
        };
        model.validate()?;
        Ok(HfModel { model, windows: None, inexact: left_out })
    }

    fn parse(text: &str) -> Result<HfModel> {
        let map = keys(text)?;
        let (map, kind) = inner(&map)?;
        let config = Config(&map);
        let mut notes = Vec::new();
        if config.get("vision_config").is_some() {
            notes.push("the text part alone is planned: vision_config is left out".to_owned());
        }
        let model = if let Some(family) = FAMILIES.into_iter().find(|f| f.model_type == kind) {
            // What a window costs is planned.
            let planned =
                |e: &&Error| !["sliding_window", "layer_types"].iter().any(|k| e.to_string().starts_with(k));
            notes.extend(config.unsupported(family)?.iter().filter(planned).map(ToString::to_string));
            // Windows in any order are planned.
            let mut map = map.clone();
            map.retain(|key, _| key != "layer_types");
            if family.model_type == GPT2.model_type {
                config.gpt2()?
            } else {
                Config(&map).llama(family, |c, positions| Ok(c.rope_or_plain(positions, &mut notes)))?
            }
        } else if let Some(planned) = PLANNED.iter().find(|p| p.model_type == kind) {
            config.planned(planned, &mut notes)?
        } else {
            if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == kind) {
                return Err(Error::user(format!("{kind} cannot be planned: {why}"))
                    .hint(format!("model types that can be planned: {}", names())));
            }
            let architecture = config.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str);
            let name = architecture.unwrap_or(&kind);
            return Err(Error::user(format!("architecture {name} is not supported"))
                .hint(format!("model types that can be planned: {}", names())));
        };
        model.validate()?;
        let windows = config.windows(&kind, model.layers)?;
        Ok(HfModel { model, windows, inexact: notes })
    }
}

/// Keys of a wrapper that are no parts of it.
const TEXT_KEYS: [&str; 2] = ["text_config", "quantization_config"];

fn keys(text: &str) -> Result<Map<String, Value>> {
    match parse_json(text)? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::user("not a config.json: expected an object of keys")),
    }
}

/// The text model's keys and type, taken out of a model of several kinds of input.
fn inner(map: &Map<String, Value>) -> Result<(Map<String, Value>, String)> {
    let config = Config(map);
    let kind = config.text("model_type")?;
    let Some(kind) = kind else {
        return Err(Error::user("model_type is missing").hint(format!("supported: {}", names())));
    };
    let wrapper = WRAPPERS.iter().find(|(outer, _)| *outer == kind);
    let Some(Value::Object(text)) = config.get("text_config") else {
        return Ok((map.clone(), wrapper.map_or(kind, |w| w.1).to_owned()));
    };
    let mut text = text.clone();
    // What both say of the tables is said outside.
    let shared =
        ["tie_word_embeddings", "architectures", "_name_or_path", "vocab_size", "quantization_config"];
    for key in shared {
        if let (false, Some(value)) = (text.contains_key(key), map.get(key)) {
            text.insert(key.to_owned(), value.clone());
        }
    }
    let inside = Config(&text).text("model_type")?.or(wrapper.map(|w| w.1)).unwrap_or(kind);
    // Some texts are named after their wrapper.
    let inside = WRAPPERS.iter().find(|(outer, _)| *outer == inside).map_or(inside, |w| w.1).to_owned();
    Ok((text, inside))
}

impl Config<'_> {
    /// The first of these keys that is there.
    fn first_count(&self, keys: &[&str], default: Option<usize>) -> Result<usize> {
        let key = keys.iter().find(|k| self.get(k).is_some()).unwrap_or(&keys[0]);
        self.count_or(key, default)
    }

    fn planned(&self, p: &Planned, notes: &mut Vec<String>) -> Result<ModelSpec> {
        let gemma3 = p.model_type == "gemma3_text";
        let hidden = self.first_count(HIDDEN, None)?;
        let layers = self.first_count(LAYERS, None)?;
        let heads = self.first_count(HEADS, gemma3.then_some(8))?;
        let own_dim = hidden.is_multiple_of(heads).then(|| hidden / heads);
        let gated = ["silu", "gelu_gated"].contains(&p.act);
        if !p.note.is_empty() {
            notes.push(p.note.to_owned());
        }
        self.note_features(p, notes)?;
        let ffn = match p.model_type {
            "mpt" => hidden.checked_mul(self.count_or("expansion_ratio", Some(4))?),
            "falcon" | "bloom" | "gptj" => hidden.checked_mul(4),
            _ => None,
        };
        // Llama 4 names the width of layers without experts apart from that of the experts.
        let ffn_keys: &[&str] = match p.model_type {
            "llama4_text" => &["intermediate_size_mlp", "intermediate_size"],
            _ => &["intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner"],
        };
        let latent = self.latent()?;
        let attention_bias = self.flag_or("attention_bias", false)?;
        // Some classes have one switch for all products of the model.
        let all_biased = match p.model_type {
            "falcon" => Some(self.flag_or("bias", false)?),
            "mpt" => Some(!self.flag_or("no_bias", true)?),
            "starcoder2" => Some(self.flag_or("use_bias", true)?),
            _ => None,
        };
        let biased = |own: bool| all_biased.unwrap_or(own || attention_bias) && latent.is_none();
        let experts = self.experts(p.model_type, layers)?;
        Ok(ModelSpec {
            name: self.text("_name_or_path")?.filter(|n| !n.is_empty()).unwrap_or(p.model_type).to_owned(),
            vocab: self.count_or("vocab_size", gemma3.then_some(262_208))?,
            layers,
            hidden,
            ffn: self.first_count(ffn_keys, ffn)?,
            heads,
            kv_heads: if latent.is_some() { heads } else { self.kv_heads(p, heads)? },
            head_dim: match latent {
                Some(l) => l.key_dim(),
                None => self.count_or("head_dim", p.head_dim.or(own_dim))?,
            },
            norm: p.norm,
            norm_eps: self.number_or("rms_norm_eps", Some(1e-5))? as f32,
            position: self.positions(p, notes)?,
            activation: if gated { Activation::SwiGlu } else { Activation::Gelu },
            qkv_bias: biased(p.qkv_bias),
            // GLM has none behind its attention.
            attn_out_bias: biased(p.out_bias) && p.model_type != "glm4_moe",
            mlp_bias: all_biased.unwrap_or(p.mlp_bias) && experts.is_none(),
            qk_norm: p.qk_norm || self.flag_or("use_qk_norm", false)?,
            tied_embeddings: self.flag_or("tie_word_embeddings", p.tied)?,
            init_std: self.number_or("initializer_range", Some(0.02))? as f32,
            logit_softcap: 0.0,
            experts,
            latent,
            window: None,
            sinks: false,
            mtp: None,
        })
    }

    fn kv_heads(&self, p: &Planned, heads: usize) -> Result<usize> {
        if p.model_type == "falcon" && !self.flag_or("new_decoder_architecture", false)? {
            return Ok(if self.flag_or("multi_query", true)? { 1 } else { heads });
        }
        if let Some(Value::Object(attention)) = self.get("attn_config") {
            return Config(attention).count_or("kv_n_heads", Some(heads));
        }
        self.first_count(&["num_key_value_heads", "num_kv_heads"], p.kv_heads.or(Some(heads)))
    }

    fn positions(&self, p: &Planned, notes: &mut Vec<String>) -> Result<Position> {
        let alibi = p.position == Positions::Alibi || self.flag_or("alibi", false)?;
        if p.position == Positions::Learned {
            return Ok(Position::Learned {
                max_positions: self.count_or("max_position_embeddings", Some(2048))?,
            });
        }
        if alibi {
            notes.push("positions enter as a slope on the scores (ALiBi), planned as rotary ones".to_owned());
            let keys = ["max_position_embeddings", "max_seq_len", "seq_length"];
            let max_positions = self.first_count(&keys, Some(2048))?;
            return Ok(Position::Rope(Rope { theta: 1e4, scaling: RopeScaling::Default, max_positions }));
        }
        let max_positions = self.count_or("max_position_embeddings", Some(131_072))?;
        Ok(Position::Rope(self.rope_or_plain(max_positions, notes)))
    }

    /// Scaling changes no size: what cannot be read is noted and left out.
    pub(super) fn rope_or_plain(&self, max_positions: usize, notes: &mut Vec<String>) -> Rope {
        self.rope(max_positions).unwrap_or_else(|refused| {
            notes.push(refused.to_string());
            Rope { theta: 1e4, scaling: RopeScaling::Default, max_positions }
        })
    }

    /// Options that change what is computed but no size.
    fn note_features(&self, p: &Planned, notes: &mut Vec<String>) -> Result<()> {
        if p.model_type == "smollm3" && self.get("no_rope_layers").is_some() {
            notes.push("layers without rotation are planned as rotated".to_owned());
        }
        for key in ["partial_rotary_factor", "rotary_pct"] {
            if self.number_or(key, Some(1.0))? != 1.0 {
                notes.push(format!("{key}: all dims of a head are planned as rotated"));
            }
        }
        if p.act == "gelu_gated" {
            notes.push("the gate is a GELU, planned as a SiLU".to_owned());
        }
        if p.act == "relu" {
            notes.push("the activation is a ReLU, planned as a GELU".to_owned());
        }
        if self.get("quantization_config").is_some() {
            notes
                .push("weights are stored quantised; training is planned in the format asked for".to_owned());
        }
        Ok(())
    }

    fn latent(&self) -> Result<Option<Latent>> {
        if self.get("kv_lora_rank").is_none() {
            return Ok(None);
        }
        let query_rank = self.get("q_lora_rank").map(|_| self.count("q_lora_rank")).transpose()?;
        Ok(Some(Latent {
            query_rank,
            kv_rank: self.count("kv_lora_rank")?,
            nope_dim: self.count("qk_nope_head_dim")?,
            rope_dim: self.count("qk_rope_head_dim")?,
            value_dim: self.count("v_head_dim")?,
        }))
    }

    fn experts(&self, kind: &str, layers: usize) -> Result<Option<Experts>> {
        let counts = ["num_local_experts", "n_routed_experts", "num_experts"];
        if counts.iter().all(|k| self.get(k).is_none()) {
            return Ok(None);
        }
        let ffn = self.first_count(&["moe_intermediate_size", "intermediate_size"], None)?;
        let shared_ffn = match kind {
            "llama4_text" => ffn,
            "qwen2_moe" => self.count("shared_expert_intermediate_size")?,
            _ => match self.get("n_shared_experts").and_then(Value::as_u64) {
                None | Some(0) => 0,
                Some(_) => ffn.saturating_mul(self.count("n_shared_experts")?),
            },
        };
        let (dense_layers, every) = self.expert_layers(layers)?;
        Ok(Some(Experts {
            count: self.first_count(&counts, None)?,
            top_k: self.first_count(&["num_experts_per_tok", "experts_per_token"], None)?,
            ffn,
            shared_ffn,
            dense_layers,
            every,
            router: Router::default(),
        }))
    }

    /// Which layers have experts: (first ones without, every how many after those).
    pub(super) fn expert_layers(&self, layers: usize) -> Result<(usize, usize)> {
        let first = match self.get("first_k_dense_replace") {
            Some(value) => value
                .as_u64()
                .and_then(|x| usize::try_from(x).ok())
                .ok_or_else(|| self.wrong("first_k_dense_replace", "a whole number"))?,
            None => 0,
        };
        if self.get("moe_layer_freq").is_some() && !self.get("moe_layer_freq").is_some_and(Value::is_array) {
            let every = self.count("moe_layer_freq")?;
            // Layers count from 0 there: those that are multiples of the step.
            return Ok(if every == 1 {
                (first, 1)
            } else {
                (first.max(1).next_multiple_of(every) + 1 - every, every)
            });
        }
        let every = self.first_count(&["decoder_sparse_step", "interleave_moe_layer_step"], Some(1))?;
        let dense: Vec<usize> = match self.get("mlp_only_layers").and_then(Value::as_array) {
            Some(list) => {
                list.iter().filter_map(|v| v.as_u64().and_then(|x| usize::try_from(x).ok())).collect()
            }
            None => Vec::new(),
        };
        let leading = (0..layers).take_while(|i| dense.contains(i)).count();
        if leading != dense.len() || (leading > 0 && every > 1) {
            return Err(
                self.wrong("mlp_only_layers", "the first layers, with experts in all layers after them")
            );
        }
        Ok((first.max(leading), every))
    }
}

#[cfg(test)]
#[path = "planned_tests.rs"]
mod tests;
