//! Configurations that differ from a family's own in one or two keys, for the families whose classes read those.

use std::fmt::Write as _;

use serde_json::{Value, json};
use spec::{HfModel, ModelSpec};

use crate::check::check;
use crate::{base, read, said};

const LLAMAS: &[&str] = &["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"];
const TRAINED: &[&str] = &[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "gpt2",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
];
const DEEPSEEK: &[&str] = &["deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe"];
const MIXTURES: &[&str] = &[
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "llama4_text",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "deepseek_v2",
];
const WINDOWED: &[&str] = &[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
];
const SOME: &[&str] = &["llama", "gpt2", "gpt_oss", "deepseek_v3", "olmo2", "falcon"];
const GPTS: &[&str] = &["gptj", "opt", "bloom", "mpt", "falcon", "gpt_neox", "starcoder2"];

/// One line each: families, or what several are called here, and the keys that are put into their configurations.
/// `layer_types` are written by their first letters.
const CHANGES: &str = include_str!("changes.txt");

fn families(names: &str) -> Vec<&str> {
    let of = |name| match name {
        "LLAMAS" => LLAMAS,
        "TRAINED" => TRAINED,
        "DEEPSEEK" => DEEPSEEK,
        "MIXTURES" => MIXTURES,
        "WINDOWED" => WINDOWED,
        "SOME" => SOME,
        "GPTS" => GPTS,
        _ => &[],
    };
    names
        .split(' ')
        .flat_map(|name| if of(name).is_empty() { vec![name] } else { of(name).to_vec() })
        .collect()
}

fn layer_type(letter: char) -> &'static str {
    match letter {
        'f' => "full_attention",
        's' => "sliding_attention",
        _ => "chunked_attention",
    }
}

/// A family's configuration with other keys.
fn changed(kind: &str, change: &str) -> Value {
    let mut config = base(kind);
    let change: Value = serde_json::from_str(change).expect("JSON");
    for (key, value) in change.as_object().expect("keys") {
        config[key] = match (key.as_str(), value.as_str()) {
            ("layer_types", Some(letters)) => letters.chars().map(layer_type).collect(),
            _ => value.clone(),
        };
    }
    config
}

#[test]
fn configurations_differ_as_they_did() {
    let mut all = String::new();
    for line in CHANGES.lines() {
        let (names, change) = line.split_at(line.find(" {").expect("keys"));
        writeln!(all, "{}", change.trim()).unwrap();
        for kind in families(names) {
            let (was, is) = (read(&base(kind)), read(&changed(kind, change)));
            let other: Vec<&str> = is.iter().filter(|fact| !was.contains(fact)).map(String::as_str).collect();
            let first = |fact: &str| fact.split(' ').next().unwrap_or_default().to_owned();
            let gone = was[..was.len() - 1].iter().filter(|fact| !is.iter().any(|f| first(f) == first(fact)));
            let gone: Vec<&str> = gone.filter(|_| is.len() > 1).map(String::as_str).collect();
            let without =
                if gone.is_empty() { String::new() } else { format!(" without {}", gone.join("; ")) };
            writeln!(all, "  {kind}: {}{without}", other.join("; ")).unwrap();
        }
    }
    check("config_changes", &all);
}

/// A text model inside another, named or not.
#[test]
fn wrapped_models_are_read_as_they_were() {
    let inside = |kind: &str, more: Value| {
        let mut text = base(kind);
        for (key, value) in more.as_object().expect("keys") {
            text[key] = value.clone();
        }
        text
    };
    let unnamed = |kind: &str| {
        let mut text = base(kind);
        text.as_object_mut().expect("keys").remove("model_type");
        text
    };
    let cases = [
        json!({ "model_type": "qwen2_vl", "text_config": unnamed("qwen2"), "vision_config": {} }),
        json!({ "model_type": "qwen2_vl", "text_config": inside("qwen2", json!({ "model_type": "qwen2_vl_text" })), "vision_config": {}, "audio_config": {} }),
        json!({ "model_type": "llava", "text_config": inside("llama", json!({})), "vision_config": {}, "quantization_config": {} }),
        json!({ "model_type": "llava", "text_config": unnamed("llama"), "architectures": ["LlavaForConditionalGeneration"] }),
        json!({ "model_type": "llava", "text_config": inside("llama", json!({ "architectures": ["LlamaModel"] })), "architectures": ["Llava"] }),
        json!({ "model_type": "llava", "text_config": inside("llama", json!({ "architectures": ["LlamaForCausalLM"] })), "tie_word_embeddings": true, "vocab_size": 77 }),
        json!({ "model_type": "llava", "text_config": inside("llama", json!({ "vocab_size": null })), "vocab_size": 77, "_name_or_path": "me/it" }),
        json!({ "model_type": "mistral3", "text_config": unnamed("mistral"), "vision_config": 3 }),
        json!({ "model_type": "unheard_of", "text_config": unnamed("llama") }),
        json!({ "model_type": "unheard_of", "text_config": base("llama"), "vision_config": {} }),
        json!({ "model_type": "llama4", "text_config": unnamed("llama4_text") }),
        json!({ "model_type": "gemma3", "text_config": base("gemma3_text") }),
        json!({ "text_config": base("llama") }),
        json!({ "model_type": "llava", "text_config": [] }),
        inside("llama", json!({ "text_config": {} })),
        inside("llama", json!({ "text_config": base("mistral"), "vision_config": {} })),
        inside("internvl", json!({})),
        inside("qwen2_5_vl", json!({ "rope_scaling": { "type": "mrope" } })),
        json!([]),
        json!("llama"),
    ];
    let mut all = String::new();
    for case in cases {
        let to_train =
            HfModel::to_train(&case.to_string()).map_or_else(|e| said(&e), |m| format!("{:?}", m.inexact));
        writeln!(all, "{}\n  to train: {to_train}", read(&case).join("; ")).unwrap();
    }
    for text in ["", "{", "{\"a\":1}{", "nul", "\u{feff}{\"model_type\":\"gpt2\",\"n_layer\":1}"] {
        let found =
            ModelSpec::from_hf_config(text).map_or_else(|e| said(&e), |m| m.to_toml().replace('\n', "; "));
        writeln!(all, "{text:?}: {found}").unwrap();
    }
    check("config_wrapped", &all);
}
