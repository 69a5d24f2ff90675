use super::*;
use crate::{Mtp, RopeScaling, Window, Yarn};
use proptest::prelude::*;

const LLAMA_31: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "hidden_act": "silu", "hidden_size": 16384, "initializer_range": 0.02, "intermediate_size": 53248,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 128,
  "num_hidden_layers": 126, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": { "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192, "rope_type": "llama3" },
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256
}"#;

/// A small config of the family with `extra` keys on top.
fn config(model_type: &str, extra: Value) -> Value {
    let mut config = match model_type {
        "gpt2" => json!({ "model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4 }),
        _ => json!({
            "model_type": model_type, "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "sliding_window": null,
        }),
    };
    for (key, value) in extra.as_object().expect("keys") {
        config[key] = value.clone();
    }
    config
}

fn read(model_type: &str, extra: Value) -> ModelSpec {
    ModelSpec::from_hf_config(&config(model_type, extra).to_string()).expect("supported")
}

fn check_refused(model_type: &str, extra: Value, expected: &str) {
    let refused = ModelSpec::from_hf_config(&config(model_type, extra).to_string()).expect_err(expected);
    assert_eq!(refused.to_string(), expected);
    assert!(refused.hint_text().is_some(), "{expected}");
}

fn scaling(extra: Value) -> RopeScaling {
    match read("llama", extra).position {
        Position::Rope(rope) => rope.scaling,
        Position::Learned { .. } => RopeScaling::Default,
    }
}

#[test]
fn published_config_is_the_preset() {
    let read = ModelSpec::from_hf_config(LLAMA_31).expect("supported");
    let preset = ModelSpec::preset("llama3-405b").expect("a preset");
    assert_eq!(ModelSpec { name: preset.name.clone(), ..read }, preset);
}

#[test]
fn families() {
    let qwen2 = read("qwen2", json!({}));
    assert!((qwen2.qkv_bias, qwen2.attn_out_bias, qwen2.qk_norm) == (true, false, false));
    let qwen3 = read("qwen3", json!({ "tie_word_embeddings": true }));
    assert_eq!((qwen3.qk_norm, qwen3.head_dim, qwen3.tied_embeddings), (true, 128, true));
    let biased = read("llama", json!({ "attention_bias": true, "mlp_bias": true, "head_dim": 16 }));
    assert!(biased.qkv_bias && biased.attn_out_bias && biased.mlp_bias && biased.head_dim == 16);
    let gpt2 = read("gpt2", json!({ "n_inner": null, "activation_function": "gelu" }));
    assert_eq!((gpt2.ffn, gpt2.activation, gpt2.tied_embeddings), (128, Activation::Gelu, true));
    assert_eq!(read("mistral", json!({})), ModelSpec { name: "mistral".into(), ..read("llama", json!({})) });
    let grouped_by_default = json!({ "num_key_value_heads": null });
    assert_eq!(read("llama", grouped_by_default).kv_heads, 4);
    let named = read(
        "llama",
        json!({ "_name_or_path": "me/small", "model_type": null, "architectures": ["LlamaForCausalLM"] }),
    );
    assert_eq!(named.name, "me/small");
}

/// (vocab, hidden, ffn, layers, heads, kv_heads, head_dim, max_positions)
type Sizes = [usize; 8];

fn sizes(text: &str) -> Sizes {
    let m = ModelSpec::from_hf_config(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    [m.vocab, m.hidden, m.ffn, m.layers, m.heads, m.kv_heads, m.head_dim, m.max_positions()]
}

#[test]
fn a_config_that_says_only_what_differs() {
    // What each class of transformers 4.57.6 and 5.24.0 holds when it is made without arguments.
    let check = |config: Value, expected: Sizes| assert_eq!(sizes(&config.to_string()), expected, "{config}");
    check(json!({ "model_type": "llama" }), [32000, 4096, 11008, 32, 32, 32, 128, 2048]);
    check(
        json!({ "model_type": "mistral", "sliding_window": null }),
        [32000, 4096, 14336, 32, 32, 8, 128, 131_072],
    );
    check(json!({ "model_type": "qwen2" }), [151_936, 4096, 22016, 32, 32, 32, 128, 32768]);
    check(json!({ "model_type": "qwen3" }), [151_936, 4096, 22016, 32, 32, 32, 128, 32768]);
    check(json!({ "model_type": "gpt2" }), [50257, 768, 3072, 12, 12, 12, 64, 1024]);
    check(
        json!({ "model_type": "qwen2", "num_hidden_layers": 2 }),
        [151_936, 4096, 22016, 2, 32, 32, 128, 32768],
    );
    check(
        json!({ "model_type": "mistral", "sliding_window": null, "num_key_value_heads": null }),
        [32000, 4096, 14336, 32, 32, 32, 128, 131_072],
    );
    let windowed = ModelSpec::from_hf_config(r#"{ "model_type": "mistral" }"#).expect("a window by default");
    assert_eq!(windowed.window, Some(Window { tokens: 4096, full_layers: 0, full_every: 0 }));
}

#[test]
fn other_names_of_sizes() {
    let old =
        json!({ "model_type": "llama", "n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 4, "n_ctx": 77 });
    assert_eq!(sizes(&old.to_string()), [32000, 64, 96, 3, 4, 4, 16, 77]);
    let new = json!({ "model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                      "max_position_embeddings": 77, "n_ctx": 1024 });
    assert_eq!(sizes(&new.to_string()), [50257, 64, 256, 3, 4, 4, 16, 77]);
    check_refused(
        "gpt2",
        json!({ "hidden_size": 64 }),
        "hidden_size = 64 and n_embd = 32 contradict each other",
    );
}

#[test]
fn a_byte_order_mark_changes_nothing() {
    let text = config("llama", json!({})).to_string();
    let marked = format!("\u{feff}{text}");
    assert_eq!(
        ModelSpec::from_hf_config(&marked).expect("read"),
        ModelSpec::from_hf_config(&text).expect("read")
    );
    assert_eq!(HfModel::read(&marked).expect("read"), HfModel::read(&text).expect("read"));
}

#[test]
fn the_text_part_of_a_wrapper() {
    let text = json!({ "num_hidden_layers": 2, "vocab_size": 99 });
    let llava = json!({ "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text,
                        "vision_config": { "hidden_size": 7 }, "tie_word_embeddings": false });
    let found = HfModel::to_train(&llava.to_string()).expect("a llama inside");
    assert_eq!((found.model.layers, found.model.vocab, found.model.hidden), (2, 99, 4096));
    assert_eq!(found.inexact, ["the text part of llava alone is read: vision_config left out"]);
    let mut named = llava.clone();
    named["text_config"]["model_type"] = json!("qwen3");
    assert!(HfModel::to_train(&named.to_string()).expect("a qwen3 inside").model.qk_norm);
    let mut other = llava.clone();
    other["text_config"]["model_type"] = json!("glm4_moe");
    let refused = HfModel::to_train(&other.to_string()).expect_err("it is only planned");
    assert_eq!(refused.to_string(), "architecture glm4_moe can be planned, it does not train yet");
    let mut quantised = llava;
    quantised["quantization_config"] = json!({ "bits": 4 });
    assert!(HfModel::to_train(&quantised.to_string()).is_err());
}

#[test]
fn rope_in_every_spelling() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 8192,
    };
    let fields = |key: &str| {
        json!({ key: "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192 })
    };
    assert_eq!(scaling(json!({ "rope_scaling": fields("rope_type") })), llama3);
    assert_eq!(scaling(json!({ "rope_scaling": fields("type") })), llama3);
    let mut new = fields("rope_type");
    new["rope_theta"] = json!(5e5);
    let model = read("llama", json!({ "rope_parameters": new }));
    assert_eq!(model.position, Position::Rope(Rope { theta: 5e5, scaling: llama3, max_positions: 64 }));
    let linear = json!({ "type": "linear", "factor": 2.0 });
    assert_eq!(scaling(json!({ "rope_scaling": linear })), RopeScaling::Linear { factor: 2.0 });
    let dynamic = json!({ "type": "dynamic", "factor": 2.0 });
    assert_eq!(scaling(json!({ "rope_scaling": dynamic })), RopeScaling::Dynamic { factor: 2.0 });
    assert_eq!(scaling(json!({ "rope_scaling": {} })), RopeScaling::Default);
    assert_eq!(
        scaling(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e6 } })),
        RopeScaling::Default
    );
}

#[test]
fn yarn_defaults() {
    let yarn = |attention_factor| {
        RopeScaling::Yarn(Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_max_positions: 16,
            attention_factor,
            truncate: true,
            mscale_all_dim: 0.0,
        })
    };
    let base = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let with = |extra: Value| {
        let mut map = base.clone();
        for (key, value) in extra.as_object().expect("keys") {
            map[key] = value.clone();
        }
        scaling(json!({ "rope_scaling": map }))
    };
    assert_eq!(with(json!({})), yarn(None));
    assert_eq!(with(json!({ "factor": null })), yarn(None));
    assert_eq!(with(json!({ "attention_factor": 1.5 })), yarn(Some(1.5)));
    assert_eq!(with(json!({ "mscale": 1.0, "mscale_all_dim": 1.0 })), yarn(Some(1.0)));
    assert_eq!(with(json!({ "mscale": 1.0, "mscale_all_dim": 0 })), yarn(None));
}

/// The `config.json` of DeepSeek-V3 as it is published.
fn deepseek_v3() -> Value {
    let scaling = json!({ "type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                          "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096 });
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": false,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163_840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_scaling": scaling, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129_280, "quantization_config": { "activation_scheme": "dynamic", "fmt": "e4m3",
        "quant_method": "fp8", "weight_block_size": [128, 128] }, "num_nextn_predict_layers": 1,
    })
}

#[test]
fn deepseek_v3_and_kimi_k2_as_published() {
    let v3 = deepseek_v3();
    let check = |config: &Value, scale: f32, theta: f64, factor: f64| {
        let model = ModelSpec::from_hf_config(&config.to_string()).expect("it trains");
        let router = model.experts.expect("a mixture").router;
        assert_eq!((router.expert_bias, router.bias_rate, router.scale), (true, 0.0, scale));
        let Position::Rope(rope) = &model.position else { panic!("rotary positions") };
        assert_eq!(rope.theta, theta);
        assert!(
            matches!(rope.scaling, RopeScaling::Yarn(Yarn { attention_factor: Some(1.0), .. })),
            "{rope:?}"
        );
        assert!((rope.scaling.score_factor() - (0.1 * factor.ln() + 1.0).powi(2)).abs() < 1e-12);
        check_round_trip(&model);
        model
    };
    let model = check(&v3, 2.5, 1e4, 40.0);
    assert_eq!(model.mtp, Some(Mtp { weight: 0.3 }));
    assert_eq!(ModelSpec { mtp: None, ..model }.param_count(), 671_026_404_352);
    let mut k2 = v3.clone();
    for (key, value) in [
        ("model_type", json!("kimi_k2")),
        ("first_k_dense_replace", json!(1)),
        ("max_position_embeddings", json!(131_072)),
        ("num_nextn_predict_layers", json!(0)),
        ("n_group", json!(1)),
        ("topk_group", json!(1)),
        ("n_routed_experts", json!(384)),
        ("num_attention_heads", json!(64)),
        ("num_key_value_heads", json!(64)),
        ("rope_theta", json!(50000.0)),
        ("routed_scaling_factor", json!(2.827)),
        ("vocab_size", json!(163_840)),
    ] {
        k2[key] = value;
    }
    k2["quantization_config"]["weight_block_size"] = json!([64, 64]);
    assert!(ModelSpec::from_hf_config(&k2.to_string()).is_err());
    k2["quantization_config"]["weight_block_size"] = json!([128, 128]);
    k2["rope_scaling"]["factor"] = json!(32.0);
    k2["rope_scaling"]["beta_fast"] = json!(1.0);
    check(&k2, 2.827, 5e4, 32.0);
    // A small one of the family adds another number in its layers' norms.
    let moonlight = json!({ "rms_norm_eps": 1e-5, "q_lora_rank": null });
    assert_eq!(read("deepseek_v3", moonlight).norm_eps, 1e-5);
}

#[test]
fn what_of_deepseek_does_not_train() {
    check_refused(
        "deepseek_v3",
        json!({ "rope_scaling": { "type": "linear", "factor": 40 } }),
        "rope_scaling = {\"factor\":40,\"type\":\"linear\"} is not supported: positions of latent attention are scaled by \"yarn\" alone",
    );
    check_refused(
        "deepseek_v3",
        json!({ "rope_scaling": { "type": "yarn", "factor": 40, "mscale": 1, "mscale_all_dim": -1 } }),
        "model.rope_scaling.mscale_all_dim = -1, expected a number from 0 to 100",
    );
    check_refused(
        "deepseek_v2",
        json!({ "topk_method": "group_limited_greedy" }),
        "topk_method = \"group_limited_greedy\" is not supported: \"greedy\" is",
    );
}

#[test]
fn families_and_traits_that_are_not_read_are_refused() {
    check_refused("glm4_moe", json!({}), "architecture glm4_moe can be planned, it does not train yet");
    check_refused("mamba", json!({}), "architecture mamba is not supported");
    check_refused(
        "llama",
        json!({ "architectures": ["LlamaForSequenceClassification"] }),
        "architecture LlamaForSequenceClassification is not supported",
    );
    check_refused("llama", json!({ "model_type": null }), "model_type is missing");
    check_refused("llama", json!({ "hidden_act": "gelu" }), "hidden_act = \"gelu\" is not supported");
    check_refused(
        "gpt2",
        json!({ "activation_function": "relu" }),
        "activation_function = \"relu\" is not supported",
    );
    check_refused("gpt2", json!({ "n_head": 5 }), "n_head = 5 does not divide n_embd = 32");
    check_refused(
        "llama",
        json!({ "rope_scaling": { "rope_type": "longrope" } }),
        "rope_scaling: rope_type = \"longrope\" is not supported",
    );
    check_refused(
        "llama",
        json!({ "rope_scaling": { "rope_type": "linear" } }),
        "rope_scaling: factor is missing, expected a number",
    );
    check_refused(
        "llama",
        json!({ "rope_parameters": { "full_attention": { "rope_type": "default" } } }),
        "rope_parameters.full_attention is not supported: one rotary embedding for all layers is",
    );
    check_refused(
        "llama",
        json!({ "layer_types": ["full_attention", "sliding_attention"] }),
        "layer_types is not supported: llama has full attention alone",
    );
    check_refused(
        "mistral",
        json!({ "layer_types": ["sliding_attention", "chunked_attention"], "sliding_window": 32 }),
        "layer_types with \"chunked_attention\" is not supported: full and sliding attention are",
    );
    check_refused(
        "mistral",
        json!({ "layer_types": ["sliding_attention"], "sliding_window": 32 }),
        "layer_types = [\"sliding_attention\"], expected one for each layer",
    );
}

#[test]
fn values_that_are_no_sizes_or_numbers_are_refused() {
    check_refused("llama", json!({ "vocab_size": -1 }), "vocab_size = -1, expected a whole number above 0");
    check_refused(
        "llama",
        json!({ "hidden_size": null }),
        "hidden_size = null, expected a whole number above 0",
    );
    check_refused(
        "llama",
        json!({ "num_attention_heads": 5 }),
        "head_dim is missing, expected a whole number above 0",
    );
    check_refused(
        "llama",
        json!({ "num_key_value_heads": 3 }),
        "model.kv_heads = 3 does not divide model.heads = 4",
    );
    check_refused("llama", json!({ "rms_norm_eps": "tiny" }), "rms_norm_eps = \"tiny\", expected a number");
    check_refused(
        "llama",
        json!({ "tie_word_embeddings": 1 }),
        "tie_word_embeddings = 1, expected true or false",
    );
    check_refused(
        "llama",
        json!({ "quantization_config": { "bits": 4 } }),
        "quantization_config = {\"bits\":4} is not supported: weights are read in float32, bfloat16 or float16",
    );
    for text in ["", "[]", "{", "nul"] {
        assert!(ModelSpec::from_hf_config(text).is_err(), "{text}");
    }
}

#[test]
fn windows_as_wide_as_the_context_are_fine() {
    read("mistral", json!({ "sliding_window": 64 }));
    read("qwen2", json!({ "sliding_window": 32, "use_sliding_window": false }));
    read("qwen2", json!({ "sliding_window": 32, "use_sliding_window": true, "max_window_layers": 2 }));
}

#[test]
fn windows_are_read_and_written() {
    let check = |family: &str, extra: Value, expected: Option<(usize, usize, usize)>| {
        let model = read(family, extra);
        let found = model.window.map(|w| (w.tokens, w.full_layers, w.full_every));
        assert_eq!(found, expected, "{family}");
        check_round_trip(&model);
    };
    check("mistral", json!({ "sliding_window": 32 }), Some((32, 0, 0)));
    check("mistral", json!({ "sliding_window": null }), None);
    let qwen = |extra: Value| {
        let mut all = json!({ "sliding_window": 8, "use_sliding_window": true, "num_hidden_layers": 5 });
        all.as_object_mut().expect("keys").extend(extra.as_object().expect("keys").clone());
        all
    };
    check("qwen2", qwen(json!({ "max_window_layers": 2 })), Some((8, 2, 0)));
    let types = |full: &[usize]| -> Value {
        (0..5).map(|i| if full.contains(&i) { "full_attention" } else { "sliding_attention" }).collect()
    };
    check("qwen3", qwen(json!({ "layer_types": types(&[2]) })), Some((8, 0, 3)));
    check("qwen3", qwen(json!({ "layer_types": types(&[0, 2, 4]) })), Some((8, 1, 2)));
    check("qwen3", qwen(json!({ "layer_types": types(&[0, 1, 2, 3, 4]) })), None);
}

#[test]
fn every_preset_survives_the_round_trip() {
    for name in ModelSpec::preset_names() {
        let (model, factor) = ModelSpec::preset(name).expect(name).exported();
        check_round_trip(&model);
        assert_eq!(factor, if name == "moe-tiny" { 4.0 } else { 1.0 }, "{name}");
    }
}

#[test]
fn models_without_an_architecture() {
    let tiny = ModelSpec::preset("tiny").expect("a preset");
    let gpt2 = ModelSpec::preset("gpt2").expect("a preset");
    for model in [
        ModelSpec { norm: NormKind::Layer, ..tiny.clone() },
        ModelSpec { activation: Activation::Gelu, ..tiny.clone() },
        ModelSpec { attn_out_bias: true, ..tiny.clone() },
        ModelSpec { qk_norm: true, mlp_bias: true, ..tiny },
        ModelSpec { norm: NormKind::Rms, ..gpt2.clone() },
        ModelSpec { kv_heads: 6, ..gpt2.clone() },
        ModelSpec { mlp_bias: false, ..gpt2 },
    ] {
        let refused = model.to_hf_config().expect_err("no such family");
        assert!(refused.to_string().contains("has no Hugging Face architecture"), "{refused}");
    }
}

fn check_round_trip(model: &ModelSpec) {
    let config = model.to_hf_config().expect("a family").to_string();
    let mut back = ModelSpec::from_hf_config(&config).expect("readable");
    // Losses of the router are of the training, not of the model.
    if let (Some(back), Some(own)) = (&mut back.experts, &model.experts) {
        back.router.balance_loss = own.router.balance_loss;
        back.router.z_loss = own.router.z_loss;
    }
    assert_eq!(ModelSpec { name: model.name.clone(), ..back }, *model, "{config}");
}

fn any_scaling() -> impl Strategy<Value = RopeScaling> {
    let factor = 1.0..64.0;
    prop_oneof![
        Just(RopeScaling::Default),
        factor.clone().prop_map(|factor| RopeScaling::Linear { factor }),
        factor.clone().prop_map(|factor| RopeScaling::Dynamic { factor }),
        (factor.clone(), 1usize..9999).prop_map(|(factor, original_max_positions)| RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_positions
        }),
        (factor, 1usize..9999, prop::option::of(0.5..2.0), any::<bool>()).prop_map(
            |(factor, original_max_positions, attention_factor, truncate)| {
                RopeScaling::Yarn(Yarn {
                    factor,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    original_max_positions,
                    attention_factor,
                    truncate,
                    mscale_all_dim: 0.0,
                })
            }
        ),
    ]
}

proptest! {
    #[test]
    fn llama_like_round_trip(scaling in any_scaling(), theta in 2.0..1e7, eps in 1e-9f32..0.1, tied: bool, bias: bool,
                             qk_norm: bool, qwen_bias: bool, groups in 1usize..4, half_dim in 1usize..40) {
        let out_bias = bias && !qwen_bias;
        let base = ModelSpec::preset("tiny").expect("a preset");
        let model = ModelSpec {
            heads: 2 * groups, kv_heads: 2, head_dim: 2 * half_dim, norm_eps: eps, init_std: eps,
            position: Position::Rope(Rope { theta, scaling, max_positions: 77 }),
            tied_embeddings: tied, qkv_bias: bias, attn_out_bias: out_bias, qk_norm: qk_norm && bias == out_bias, ..base
        };
        check_round_trip(&model);
        // The model file keeps everything too.
        prop_assert_eq!(ModelSpec::from_toml("m.toml", &model.to_toml()).expect("readable"), model);
    }
}
