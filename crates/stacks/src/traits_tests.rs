//! Arguments are read back as each stack reads them, and compared with the model trait by trait.

use std::collections::BTreeMap;

use plan::estimate::Problem;
use plan::shape::Shape;
use spec::{Activation, Layout, ModelSpec, Position, Rope, RopeScaling, Yarn, Zero};

use crate::tests::{Read, layout, placement, problem, read_arguments, read_lines};
use crate::{STACKS, emit, traits};

type Traits = BTreeMap<&'static str, String>;

/// What a stack makes of the traits of a model, read from its arguments with its own defaults.
fn read_traits(stack: &str, read: &Read) -> Traits {
    let value = |key: &str, default: &str| read.get(key).map_or(default, String::as_str).to_owned();
    let mut found = BTreeMap::new();
    let maxtext = stack == "maxtext";
    let sizes = match maxtext {
        true => {
            ["vocab_size", "base_num_decoder_layers", "base_emb_dim", "base_mlp_dim", "base_num_query_heads"]
        }
        false => ["vocab-size", "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"],
    };
    for (name, key) in ["vocab", "layers", "hidden", "ffn", "heads"].into_iter().zip(sizes) {
        found.insert(name, value(key, "?"));
    }
    found.extend(if maxtext { maxtext_traits(read) } else { megatron_traits(stack, read) });
    found
}

fn yarn(factor: String, original: String, fast: String, slow: String, scale: String) -> String {
    format!("yarn by {factor} from {original}, {fast} to {slow}{scale}")
}

fn maxtext_traits(read: &Read) -> Traits {
    let has = |key: &str| read.contains_key(key);
    let value = |key: &str, default: &str| read.get(key).map_or(default, String::as_str).to_owned();
    let flag = |yes: bool| yes.to_string();
    let mut found = Traits::new();
    let block = value("decoder_block", "llama2");
    let gpt3 = block == "gpt3";
    let gelu = value("mlp_activations", "?").contains("gelu");
    found.extend([
        ("kv_heads", value("base_num_kv_heads", "?")),
        ("head_dim", value("head_dim", "?")),
        ("norm", if gpt3 { "layer" } else { "rms" }.into()),
        ("norm_eps", value("normalization_layer_epsilon", "0.00001")),
        ("activation", if gelu { "gelutanh" } else { "swiglu" }.into()),
        ("qkv_bias", flag(gpt3 || (block == "qwen2" && value("attention_bias", "false") == "true"))),
        ("attn_out_bias", flag(gpt3)),
        ("mlp_bias", flag(gpt3)),
        ("qk_norm", flag(block.starts_with("qwen") && value("use_qk_norm", "false") == "true")),
        ("tied_embeddings", value("logits_via_embedding", "false")),
        ("dropout", value("dropout_rate", "0")),
        ("rope_theta", if gpt3 { "none".into() } else { value("rope_max_timescale", "10000") }),
        ("learned_positions", value("trainable_position_size", "-1")),
    ]);
    let linear = read.get("rope_linear_scaling_factor");
    found.insert(
        "rope_scaling",
        match value("rope_type", "default").as_str() {
            _ if gpt3 => "none".into(),
            "llama3.1" => "llama3 by 8 from 8192, 1 to 4".into(),
            "yarn" => yarn(
                value("rope_factor", "40"),
                value("original_max_position_embeddings", "4096"),
                value("beta_fast", "32"),
                value("beta_slow", "1"),
                if has("rope_attention_scaling") { "" } else { ", scaled by 1" }.into(),
            ),
            _ => linear.map_or("default".into(), |f| format!("linear by {f}")),
        },
    );
    found
}

fn megatron_traits(stack: &str, read: &Read) -> Traits {
    let has = |key: &str| read.contains_key(key);
    let value = |key: &str, default: &str| read.get(key).map_or(default, String::as_str).to_owned();
    let flag = |yes: bool| yes.to_string();
    let mut found = Traits::new();
    let core = stack == "megatron";
    let biased = !has("disable-bias-linear");
    let gelu = if biased && !has("no-bias-gelu-fusion") { "gelutanh" } else { "gelu" };
    let positions = value("position-embedding-type", "learned_absolute");
    let groups = if core { "num-query-groups" } else { "num-key-value-heads" };
    found.extend([
        ("kv_heads", value(groups, &value("num-attention-heads", "?"))),
        ("head_dim", value("kv-channels", "?")),
        ("norm", if has("normalization") { "rms" } else { "layer" }.into()),
        ("norm_eps", value(if core { "norm-epsilon" } else { "layernorm-epsilon" }, "0.00001")),
        ("activation", if has("swiglu") { "swiglu" } else { gelu }.into()),
        ("qkv_bias", flag(biased || has("add-qkv-bias"))),
        ("attn_out_bias", flag(biased)),
        ("mlp_bias", flag(biased)),
        ("qk_norm", flag(has("qk-layernorm"))),
        ("tied_embeddings", flag(!has("untie-embeddings-and-output-weights"))),
        ("init_std", value("init-method-std", "0.02")),
        ("dropout", value("hidden-dropout", "0.1")),
        ("rope_theta", value(if core { "rotary-base" } else { "rotary-position-embeddings-theta" }, "10000")),
        ("learned_positions", value("max-position-embeddings", "?")),
    ]);
    assert_eq!(read.get("attention-dropout"), read.get("hidden-dropout"));
    let interpolated = read.get("rotary-seq-len-interpolation-factor");
    found.insert(
        "rope_scaling",
        if has("use-rope-scaling") {
            format!("llama3 by {} from 8192, 1 to 4", value("rope-scaling-factor", "8"))
        } else if positions == "yarn" {
            let factor: f64 = value("rotary-scaling-factor", "1").parse().unwrap();
            let mscale: f64 = value("mscale", "1").parse().unwrap();
            let scale = 0.1 * mscale * factor.ln() + 1.0;
            yarn(
                factor.to_string(),
                value("yarn-original-max-position-embeddings", "4096"),
                value("yarn-beta-fast", "32"),
                value("yarn-beta-slow", "1"),
                if mscale == 1.0 {
                    String::new()
                } else {
                    format!(", scaled by {}", (scale * 1e9).round() / 1e9)
                },
            )
        } else {
            interpolated.map_or("default".into(), |f| format!("linear by {f}"))
        },
    );
    found
}

/// Models that differ in every trait.
fn models() -> Vec<ModelSpec> {
    let rope = |theta, scaling| Position::Rope(Rope { theta, scaling, max_positions: 4096 });
    let llama =
        ModelSpec { position: rope(5e5, RopeScaling::Default), ..ModelSpec::preset("llama3-8b").unwrap() };
    let scaled = |scaling| ModelSpec { position: rope(1e6, scaling), ..llama.clone() };
    let llama3 = |factor, original_max_positions| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions,
    };
    let yarn = |attention_factor| {
        RopeScaling::Yarn(Yarn {
            factor: 4.0,
            beta_fast: 24.0,
            beta_slow: 2.0,
            original_max_positions: 1024,
            attention_factor,
            truncate: true,
            mscale_all_dim: 0.0,
        })
    };
    let gpt2 = ModelSpec::preset("gpt2").unwrap();
    vec![
        ModelSpec { qkv_bias: true, norm_eps: 1e-6, ..llama.clone() },
        ModelSpec { qk_norm: true, tied_embeddings: true, init_std: 0.006, ..llama.clone() },
        ModelSpec { qkv_bias: true, attn_out_bias: true, ..llama.clone() },
        ModelSpec { qkv_bias: true, attn_out_bias: true, mlp_bias: true, ..llama.clone() },
        ModelSpec { mlp_bias: true, ..llama.clone() },
        ModelSpec { vocab: 50_257, position: rope(10_000.5, RopeScaling::Default), ..llama.clone() },
        scaled(RopeScaling::Linear { factor: 4.0 }),
        scaled(RopeScaling::Linear { factor: 2.5 }),
        scaled(RopeScaling::Dynamic { factor: 2.0 }),
        scaled(llama3(8.0, 8192)),
        scaled(llama3(32.0, 8192)),
        scaled(llama3(8.0, 4096)),
        scaled(yarn(None)),
        scaled(yarn(Some(1.25))),
        ModelSpec { activation: Activation::Gelu, ..gpt2.clone() },
        ModelSpec { mlp_bias: false, ..gpt2.clone() },
        ModelSpec {
            qkv_bias: false,
            attn_out_bias: false,
            mlp_bias: false,
            activation: Activation::Gelu,
            ..gpt2.clone()
        },
        ModelSpec { position: rope(1e4, RopeScaling::Default), ..gpt2.clone() },
        llama,
        gpt2,
    ]
}

#[test]
fn every_trait_of_the_model_is_written_or_named() {
    let (mut written, mut named) = (BTreeMap::new(), BTreeMap::new());
    for (i, model) in models().into_iter().enumerate() {
        for (stack, _) in STACKS {
            let l =
                Layout { dp: 16, tp: 1, pp: 1, sequence_parallel: false, zero: Zero::Parameters, ..layout() };
            let p = Problem {
                shape: Shape::from_model(model.clone()),
                sequence: 1024,
                ..problem("gpt3-13b", 16)
            };
            let emitted = emit(stack, &p, &placement(l)).unwrap_or_else(|e| panic!("{stack}: {e}"));
            let read = match stack {
                "maxtext" => read_lines(&emitted.text, ":"),
                "megatron" | "megatron-deepspeed" => read_arguments(&emitted.text),
                _ => Read::new(),
            };
            let found = if read.is_empty() { BTreeMap::new() } else { read_traits(stack, &read) };
            for (name, value) in traits::traits(&model) {
                let note = format!("{name} = {value};");
                let is_named = emitted
                    .notes
                    .iter()
                    .any(|n| format!("{n};").replace("; change", ";; change").contains(&note));
                let is_written = found.get(name) == Some(&value);
                assert!(
                    is_named != is_written,
                    "{stack}, model {i}: {name} = {value}, read {:?}, named: {is_named}\n{}{:?}",
                    found.get(name),
                    emitted.text,
                    emitted.notes
                );
                *if is_named { &mut named } else { &mut written }.entry((stack, name)).or_insert(0) += 1;
            }
        }
    }
    let count = |stack: &'static str, name: &'static str| named.get(&(stack, name)).copied().unwrap_or(0);
    assert_eq!((written[&("megatron", "qk_norm")], count("megatron", "qk_norm")), (20, 0));
    // A stretch by 2.5, a dynamic one, and Llama 3's from another context.
    assert_eq!(count("megatron", "rope_scaling"), 3);
    // A dynamic one, Llama 3's by another factor or context, yarn with a scale, and any beside GPT-3's layers.
    assert_eq!(count("maxtext", "rope_scaling"), 5);
    assert_eq!((count("deepspeed", "dropout"), count("torchtitan", "vocab")), (20, 20));
}
