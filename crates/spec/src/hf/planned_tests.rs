use super::*;
use serde_json::json;

/// Reads a config and compares the parameters, in billions, with what was published.
fn check(kind: &str, billions: f64, keys: Value) -> HfModel {
    let mut config = keys;
    config["model_type"] = json!(kind);
    let found = HfModel::read(&config.to_string()).unwrap_or_else(|e| panic!("{kind}: {e}"));
    let params = found.model.param_count() as f64 / 1e9;
    assert!((params / billions - 1.0).abs() < 0.01, "{kind}: {params} against {billions}");
    let back = ModelSpec::from_toml(kind, &found.model.to_toml()).unwrap_or_else(|e| panic!("{kind}: {e}"));
    assert_eq!(back, found.model, "{kind}");
    found
}

/// Keys that most classes share: hidden, ffn, layers, heads, key and value heads, vocabulary.
fn sizes([hidden, ffn, layers, heads, kv_heads, vocab]: [usize; 6], more: Value) -> Value {
    let mut config = json!({
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
    });
    for (key, value) in more.as_object().expect("keys") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn mixtures() {
    let mixtral = check(
        "mixtral",
        46.7,
        sizes([4096, 14336, 32, 32, 8, 32000], json!({ "num_local_experts": 8, "num_experts_per_tok": 2 })),
    );
    assert_eq!(mixtral.inexact, Vec::<String>::new());
    assert_eq!(mixtral.model.active_param_count(), 12_879_925_248 - 32000 * 4096);
    let qwen2 = check(
        "qwen2_moe",
        14.3,
        sizes(
            [2048, 5632, 24, 16, 16, 151_936],
            json!({ "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                    "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": [] }),
        ),
    );
    assert!(qwen2.model.qkv_bias && !qwen2.model.attn_out_bias);
    let qwen3 = check(
        "qwen3_moe",
        30.5,
        sizes(
            [2048, 6144, 48, 32, 4, 151_936],
            json!({ "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128 }),
        ),
    );
    assert!(qwen3.model.qk_norm);
    check(
        "olmoe",
        6.92,
        sizes([2048, 1024, 16, 16, 16, 50304], json!({ "num_experts": 64, "num_experts_per_tok": 8 })),
    );
    check(
        "gpt_oss",
        20.9,
        sizes(
            [2880, 2880, 24, 64, 8, 201_088],
            json!({ "num_local_experts": 32, "experts_per_token": 4, "head_dim": 64, "sliding_window": 128 }),
        ),
    );
}

#[test]
fn latent_attention() {
    let deepseek = |hidden: usize, ffn: usize, layers: usize, heads: usize, vocab: usize, more: Value| {
        let mut config = sizes([hidden, ffn, layers, heads, heads, vocab], more);
        let own = json!({ "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
                          "moe_layer_freq": 1 });
        for (key, value) in own.as_object().expect("keys") {
            config[key] = value.clone();
        }
        config
    };
    let v3 = check(
        "deepseek_v3",
        671.0,
        deepseek(
            7168,
            18432,
            61,
            128,
            129_280,
            json!({ "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
                    "moe_intermediate_size": 2048, "first_k_dense_replace": 3 }),
        ),
    );
    assert_eq!(v3.model.expert_layers(), 58);
    assert_eq!(v3.model.latent.map(Latent::key_dim), Some(192));
    check(
        "kimi_k2",
        1026.0,
        deepseek(
            7168,
            18432,
            61,
            64,
            163_840,
            json!({ "q_lora_rank": 1536, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8,
                    "moe_intermediate_size": 2048, "first_k_dense_replace": 1 }),
        ),
    );
    // V2-Lite does not compress its queries.
    let lite = check(
        "deepseek_v2",
        15.7,
        deepseek(
            2048,
            10944,
            27,
            16,
            102_400,
            json!({ "q_lora_rank": null, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
                    "moe_intermediate_size": 1408, "first_k_dense_replace": 1 }),
        ),
    );
    assert_eq!(lite.model.latent.and_then(|l| l.query_rank), None);
    assert_eq!(lite.model.experts.map(|e| e.shared_ffn), Some(2816));
}

#[test]
fn text_models_inside_others() {
    let text = sizes(
        [5120, 8192, 48, 40, 8, 202_048],
        json!({ "model_type": "llama4_text", "intermediate_size_mlp": 16384, "num_local_experts": 128,
                "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "head_dim": 128 }),
    );
    let maverick = check("llama4", 400.0, json!({ "text_config": text }));
    assert!(!maverick.model.has_experts(0) && maverick.model.has_experts(1));
    assert_eq!((maverick.model.ffn, maverick.model.experts.map(|e| e.ffn)), (16384, Some(8192)));
    // What the class assumes is not written.
    let text = json!({ "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                       "sliding_window": 1024 });
    let gemma = check("gemma3", 3.88, json!({ "text_config": text }));
    assert_eq!((gemma.model.heads, gemma.model.kv_heads, gemma.model.head_dim), (8, 4, 256));
    // Five of six layers.
    assert_eq!(
        gemma.windows,
        Some(Windows { tokens: 1024, layers: gemma.model.layers - gemma.model.layers / 6 })
    );
}

#[test]
fn dense_families() {
    check("phi3", 3.82, sizes([3072, 8192, 32, 32, 32, 32064], json!({})));
    check("gemma", 2.51, sizes([2048, 16384, 18, 8, 1, 256_000], json!({ "head_dim": 256 })));
    check("gemma2", 9.24, sizes([3584, 14336, 42, 16, 8, 256_000], json!({ "head_dim": 256 })));
    check("olmo2", 7.30, sizes([4096, 11008, 32, 32, 32, 100_352], json!({})));
    check("starcoder2", 7.17, sizes([4608, 18432, 32, 36, 4, 49152], json!({})));
    check("gpt_neox", 20.55, sizes([6144, 24576, 44, 64, 64, 50432], json!({ "rotary_pct": 0.25 })));
    let falcon = |hidden: usize, layers: usize, heads: usize, more: Value| {
        let mut config = more;
        config["hidden_size"] = json!(hidden);
        config["num_hidden_layers"] = json!(layers);
        config["num_attention_heads"] = json!(heads);
        config["vocab_size"] = json!(65024);
        config
    };
    check("falcon", 6.92, falcon(4544, 32, 71, json!({ "multi_query": true })));
    check(
        "falcon",
        41.3,
        falcon(8192, 60, 128, json!({ "new_decoder_architecture": true, "num_kv_heads": 8 })),
    );
    check(
        "mpt",
        6.65,
        json!({ "d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432, "max_seq_len": 2048 }),
    );
    check("bloom", 7.07, json!({ "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250_880 }));
    check(
        "opt",
        6.66,
        json!({ "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
                "vocab_size": 50272, "max_position_embeddings": 2048 }),
    );
}

/// Biases are too few to show in a count of parameters.
#[test]
fn biases_of_older_families() {
    let check = |kind: &str, mut keys: Value, [qkv, out, mlp]: [bool; 3]| {
        keys["model_type"] = json!(kind);
        let model = HfModel::read(&keys.to_string()).unwrap_or_else(|e| panic!("{kind}: {e}")).model;
        assert_eq!([model.qkv_bias, model.attn_out_bias, model.mlp_bias], [qkv, out, mlp], "{kind} {keys}");
    };
    let plain = || sizes([64, 128, 2, 4, 4, 96], json!({}));
    check("gpt_neox", plain(), [true, true, true]);
    check("starcoder2", plain(), [true, true, true]);
    let without = sizes([64, 128, 2, 4, 4, 96], json!({ "use_bias": false }));
    check("starcoder2", without, [false; 3]);
    check("opt", plain(), [true, true, true]);
    check("gptj", json!({ "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96 }), [false, false, true]);
    check("bloom", json!({ "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96 }), [true; 3]);
    let falcon = |bias: bool| json!({ "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "bias": bias });
    check("falcon", falcon(false), [false; 3]);
    check("falcon", falcon(true), [true; 3]);
    let mpt = |more: &str| {
        let mut keys =
            json!({ "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "max_seq_len": 128 });
        keys["no_bias"] = serde_json::from_str(more).expect("a flag");
        keys
    };
    check("mpt", mpt("null"), [false; 3]);
    check("mpt", mpt("false"), [true; 3]);
}

#[test]
fn what_trains_is_planned_as_it_trains_and_says_what_differs() {
    let config = sizes([4096, 14336, 32, 32, 8, 32000], json!({ "sliding_window": 4096 }));
    let mistral = check("mistral", 7.24, config);
    assert_eq!(mistral.inexact, Vec::<String>::new());
    assert_eq!(mistral.windows, Some(Windows { tokens: 4096, layers: 32 }));
    let config = sizes([64, 128, 2, 4, 2, 96], json!({ "model_type": "llama" })).to_string();
    let found = HfModel::read(&config).expect("a config");
    assert_eq!((found.model, found.inexact), (ModelSpec::from_hf_config(&config).expect("trains"), vec![]));
}

#[test]
fn refusals_name_the_architecture_and_what_can_be_done() {
    let refused = |config: Value| HfModel::read(&config.to_string()).expect_err("no decoder");
    let e = refused(json!({ "model_type": "mamba", "architectures": ["MambaForCausalLM"] }));
    assert_eq!(
        e.to_string(),
        "mamba cannot be planned: its layers are state space models, for which there is no operation yet"
    );
    let e = refused(json!({ "model_type": "qwen3_next" }));
    assert!(
        e.to_string().starts_with("qwen3_next cannot be planned: three of four layers are gated delta rules")
    );
    let e = refused(json!({ "model_type": "t5", "architectures": ["T5Model"] }));
    assert_eq!(e.to_string(), "architecture T5Model is not supported");
    assert!(e.hint_text().is_some_and(|h| h.contains("deepseek_v3") && h.contains("llama")));
    let e = refused(json!({ "model_type": "deepseek_v3", "hidden_size": 64 }));
    assert_eq!(e.to_string(), "num_hidden_layers is missing, expected a whole number above 0");
    // To train, it is refused with another word.
    let config = json!({ "model_type": "deepseek_v3", "hidden_size": 64 }).to_string();
    let e = ModelSpec::from_hf_config(&config).expect_err("does not train");
    assert_eq!(e.to_string(), "architecture deepseek_v3 can be planned, it does not train yet");
}

#[test]
fn newer_families() {
    // Sizes of GLM-4.5 (355B with the layer that predicts a second token, which is left out) and its Air.
    let glm = |hidden: usize,
               ffn: usize,
               layers: usize,
               experts: usize,
               expert: usize,
               dense: usize,
               more: Value| {
        let mut config = sizes(
            [hidden, ffn, layers, 96, 8, 151_552],
            json!({ "head_dim": 128, "n_routed_experts": experts, "num_experts_per_tok": 8,
                    "moe_intermediate_size": expert, "n_shared_experts": 1, "first_k_dense_replace": dense,
                    "attention_bias": true, "partial_rotary_factor": 0.5, "tie_word_embeddings": false }),
        );
        for (key, value) in more.as_object().expect("keys") {
            config[key] = value.clone();
        }
        config
    };
    let large = check("glm4_moe", 352.8, glm(5120, 12288, 92, 160, 1536, 3, json!({ "use_qk_norm": true })));
    assert!(large.model.qk_norm && large.model.qkv_bias && !large.model.attn_out_bias);
    let air = check("glm4_moe", 106.9, glm(4096, 10944, 46, 128, 1408, 1, json!({ "use_qk_norm": false })));
    assert!(!air.model.qk_norm);
    let smol = check(
        "smollm3",
        3.08,
        sizes(
            [2048, 11008, 36, 16, 4, 128_256],
            json!({ "no_rope_layers": [1, 1, 1, 0], "sliding_window": null }),
        ),
    );
    assert_eq!((smol.windows, smol.inexact.len()), (None, 1));
    let granite = json!({ "tie_word_embeddings": true, "embedding_multiplier": 12.0, "logits_scaling": 8.0 });
    check("granite", 2.53, sizes([2048, 8192, 40, 32, 8, 49155], granite));
    let gptj = json!({ "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": null, "vocab_size": 50400 });
    check("gptj", 6.05, gptj);
    let qwen = json!({ "vision_config": { "depth": 32 }, "rope_scaling": { "type": "mrope" } });
    let qwen = check("qwen2_vl", 7.62, sizes([3584, 18944, 28, 28, 4, 152_064], qwen));
    assert_eq!(qwen.inexact[0], "the text part alone is planned: vision_config is left out");
    assert!(qwen.model.qkv_bias && qwen.windows.is_none());
}

#[test]
fn layers_with_experts_follow_the_step() {
    let layers = |more: Value| {
        let mut keys = sizes(
            [64, 128, 8, 4, 4, 96],
            json!({ "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32 }),
        );
        for (key, value) in more.as_object().expect("keys") {
            keys[key] = value.clone();
        }
        HfModel::read(&keys.to_string())
            .map(|f| (0..8).filter(|i| f.model.has_experts(*i)).collect::<Vec<_>>())
    };
    assert_eq!(layers(json!({})).expect("all"), (0..8).collect::<Vec<_>>());
    assert_eq!(layers(json!({ "decoder_sparse_step": 2 })).expect("odd"), [1, 3, 5, 7]);
    assert_eq!(layers(json!({ "mlp_only_layers": [0, 1] })).expect("later"), (2..8).collect::<Vec<_>>());
    assert_eq!(layers(json!({ "first_k_dense_replace": 1, "moe_layer_freq": 2 })).expect("even"), [2, 4, 6]);
    assert!(layers(json!({ "mlp_only_layers": [3] })).is_err());
}
