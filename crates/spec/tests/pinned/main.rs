//! What a great many inputs become, line by line: whoever changes a rule sees here what else it moves, and means it. That
//! the lines are right is asked elsewhere, by tests that give the reason.
#[path = "../../../../tests/pinned.rs"]
mod check;

mod catalog;
mod configs;
mod legal;
mod runs;
mod shapes;

use std::fmt::Write as _;

use serde_json::{Value, json};
use spec::run::KeyKind;
use spec::{
    Catalog, ExpertRows, HfModel, Layout, ModelSpec, PipelineSchedule, Recompute, Reduce, RunSpec, Zero,
    hash::fnv1a,
};

use check::check;

/// One line of whatever went wrong, hint and all.
fn said(error: &spec::Error) -> String {
    let hint = error.hint_text().map(|hint| format!(" ({hint})")).unwrap_or_default();
    format!("{error}{hint}").replace('\n', " / ")
}

/// Every key of a run file with values from every kind of mistake.
#[test]
fn keys_take_what_they_took() {
    let values = [
        "-1",
        "0",
        "1",
        "2",
        "3",
        "7",
        "64",
        "4097",
        "1000000",
        "1000001",
        "70000000",
        "9e18",
        "-0.5",
        "1e-9",
        "0.5",
        "0.999",
        "1.5",
        "1e6",
        "1.1e6",
        "1e39",
        "true",
        "\"\"",
        "\"auto\"",
        "\"words\"",
        "\"bf16\"",
        "[]",
        "[1, 2]",
    ];
    let models = models();
    let file = |model: &ModelSpec| format!("[model]\n{}", model.to_toml());
    let mut all = String::new();
    for key in RunSpec::keys() {
        let file = match key.path {
            path if path.starts_with("model.experts.") => file(&models[1].1),
            path if path.starts_with("model.latent.") => file(&models[2].1),
            _ => String::new(),
        };
        let load = |value: &str| {
            RunSpec::load(Some(("run.toml", &file)), &[format!("{}={value}", key.path)], &RunSpec::no_files)
        };
        // What is taken by itself, and does not fit the rest, is refused with another key.
        let taken = |value: &&str| load(value).map_or_else(|e| !e.to_string().contains(key.path), |_| true);
        let takes: Vec<&str> = values.into_iter().filter(taken).collect();
        let refusal = load("[{}]").map_or_else(|e| said(&e), |_| "takes anything".to_owned());
        writeln!(all, "{} ({}; {}) takes {}", key.path, key.type_text(), key.default_text(), takes.join(" "))
            .unwrap();
        writeln!(all, "  {refusal}").unwrap();
        let words: Vec<String> = match &key.kind {
            KeyKind::Choice(words) => words.iter().map(|word| format!("\"{word}\"")).collect(),
            _ => takes.last().map(|&value| value.to_owned()).into_iter().collect(),
        };
        let as_it_was =
            RunSpec::load(Some(("run.toml", &file)), &[], &RunSpec::no_files).map(|run| run.to_toml());
        let as_it_was = as_it_was.unwrap_or_default();
        for word in words {
            let read = load(&word).map_or_else(
                |e| e.to_string(),
                |run| {
                    let new = |line: &&str| !as_it_was.lines().any(|old| old == *line);
                    run.to_toml().lines().filter(new).collect::<Vec<_>>().join("; ")
                },
            );
            writeln!(all, "  {word}: {read}").unwrap();
        }
    }
    check("keys", &all);
}

/// The keys that a model of a kind has, as its class names them.
fn base(kind: &str) -> Value {
    let mut config = json!({ "model_type": kind, "vocab_size": 1000 });
    let sizes = match kind {
        "gpt2" | "gptj" => json!({ "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 1024 }),
        "mpt" => json!({ "d_model": 512, "n_layers": 6, "n_heads": 8, "max_seq_len": 2048 }),
        "bloom" => json!({ "hidden_size": 512, "n_layer": 6, "n_head": 8 }),
        "opt" => {
            json!({ "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "ffn_dim": 2048 })
        }
        _ => json!({
            "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
            "num_key_value_heads": 2, "max_position_embeddings": 4096,
        }),
    };
    let experts = match kind {
        "mixtral" | "llama4_text" | "gpt_oss" | "granitemoe" => {
            json!({ "num_local_experts": 8, "num_experts_per_tok": 2 })
        }
        "qwen2_moe" | "qwen3_moe" | "olmoe" | "qwen3_next" => json!({
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 384,
        }),
        "deepseek_v2" | "deepseek_v3" | "kimi_k2" => json!({
            "n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_shared_experts": 1,
            "kv_lora_rank": 64, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
            "n_group": 4, "topk_group": 2,
        }),
        "glm4_moe" => json!({
            "n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_shared_experts": 1,
        }),
        _ => json!({}),
    };
    for more in [sizes, experts] {
        for (key, value) in more.as_object().expect("keys") {
            config[key] = value.clone();
        }
    }
    config
}

/// Configurations of every family that is read, bare and with keys that change what is read.
#[test]
fn configurations_are_read_as_they_were() {
    let changes = [
        json!({ "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true, "head_dim": 32 }),
        json!({ "first_k_dense_replace": 2, "norm_topk_prob": true, "routed_scaling_factor": 1.5, "num_key_value_heads": null }),
        json!({ "first_k_dense_replace": 6, "decoder_sparse_step": 2, "mlp_only_layers": [0], "q_lora_rank": null }),
        json!({ "sliding_window": 128, "use_sliding_window": true, "max_window_layers": 2, "rope_theta": 5e5 }),
        json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 1024 } }),
        json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024 } }),
        json!({ "alibi": true, "multi_query": false, "new_decoder_architecture": true, "num_kv_heads": 4,
                "parallel_attn": false, "hidden_act": "relu", "activation_function": "relu" }),
        json!({ "num_attention_heads": 7, "n_head": 7, "n_heads": 7 }),
        json!({ "num_hidden_layers": 0, "n_layer": 0, "n_layers": 0 }),
        json!({ "vocab_size": "many" }),
        json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0 } }),
        json!({ "rope_scaling": { "rope_type": "yarn", "factor": 1.0, "mscale": 0.7, "mscale_all_dim": 1.0 } }),
        json!({ "rope_scaling": { "rope_type": "yarn", "factor": 8.0, "mscale": 0.0, "beta_fast": 16, "beta_slow": 2 } }),
    ];
    let kinds = [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "kimi_k2",
        "llama4_text",
        "gpt_oss",
        "phi3",
        "smollm3",
        "granite",
        "granitemoe",
        "glm4_moe",
        "gptj",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "falcon",
        "opt",
        "bloom",
        "gpt_neox",
        "mpt",
        "starcoder2",
        "qwen3_next",
        "mamba2",
        "bert",
    ];
    let mut all = String::new();
    for kind in kinds {
        let bare = read(&base(kind));
        writeln!(all, "{kind}: {}", bare.join("; ")).unwrap();
        for (i, change) in changes.iter().enumerate() {
            let mut config = base(kind);
            for (key, value) in change.as_object().expect("keys") {
                config[key] = value.clone();
            }
            let other: Vec<String> = read(&config).into_iter().filter(|fact| !bare.contains(fact)).collect();
            writeln!(all, "  {i}: {}", other.join("; ")).unwrap();
        }
    }
    check("configs", &all);
}

/// What a configuration is read as, fact by fact.
fn read(config: &Value) -> Vec<String> {
    let text = config.to_string();
    let planned = match HfModel::read(&text) {
        Err(e) => return vec![said(&e)],
        Ok(found) => found,
    };
    let model = &planned.model;
    let mut facts: Vec<String> =
        model.to_toml().lines().filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect();
    facts.push(format!("{} parameters, {} active", model.param_count(), model.active_param_count()));
    facts.push(format!("{:.0} FLOP a token", model.flops_per_token(2048)));
    if let Some(w) = planned.windows {
        let share = w.share(model.layers, 4096);
        facts.push(format!("windows of {} on {} layers, share {share:.4}", w.tokens, w.layers));
    }
    facts.extend(planned.inexact.iter().cloned());
    facts.push(match ModelSpec::from_hf_config(&text) {
        Ok(trains) if trains == *model => {
            let back = trains.to_hf_config().map_or_else(|e| said(&e), |json| json.to_string());
            format!("trains and writes {:016x}", fnv1a(back.bytes()))
        }
        Ok(_) => "trains as another model".to_owned(),
        Err(e) => said(&e),
    });
    facts
}

fn models() -> Vec<(&'static str, ModelSpec)> {
    let preset = |name| (name, ModelSpec::preset(name).expect("a preset").exported().0);
    let latent = HfModel::read(&base("deepseek_v3").to_string()).expect("a model of DeepSeek's kind").model;
    vec![preset("tiny"), preset("moe-tiny"), ("latent", ModelSpec { norm_eps: 1e-6, ..latent })]
}

/// Layouts drawn by a counter: the least of each is legal somewhere, most are not.
fn layouts() -> impl Iterator<Item = Layout> {
    (0..160u64).map(|i| {
        let mut state = spec::random::mix(i);
        let mut pick = |of: &[usize]| {
            state = spec::random::mix(state);
            of[(state % of.len() as u64) as usize]
        };
        let pp = pick(&[1, 1, 2, 3, 4]);
        let dp = pick(&[1, 1, 2, 3, 4, 8]);
        let chunks = pick(&[1, 1, 1, 2, 3]);
        Layout {
            dp,
            pp,
            chunks,
            tp: pick(&[1, 1, 2, 3, 4]),
            cp: pick(&[1, 1, 1, 2, 3]),
            context: spec::ContextMode::Ring,
            ep: pick(&[1, 1, 1, 2, 4, 5]),
            sequence_parallel: pick(&[0, 0, 1]) == 1,
            zero: [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters][pick(&[0, 0, 1, 2, 3])],
            shard: [None, None, Some(1), Some(2), Some(3)][pick(&[0, 0, 0, 1, 2, 3, 4])],
            schedule: [
                PipelineSchedule::Gpipe,
                PipelineSchedule::OneFOneB,
                PipelineSchedule::Interleaved,
                PipelineSchedule::ZeroBubble,
            ][if chunks > 1 { pick(&[2, 2, 2, 1]) } else { pick(&[0, 1, 1, 2, 3]) }],
            stage_layers: if pick(&[0, 0, 0, 1]) == 1 { vec![1; pp * chunks] } else { Vec::new() },
            micro_batch: pick(&[1, 1, 2, 3]),
            recompute: [Recompute::None, Recompute::Selective, Recompute::Full][pick(&[0, 1, 2])],
            reduce: [Reduce::Tree, Reduce::Ring][pick(&[0, 0, 1])],
            expert_rows: ExpertRows::All,
        }
    })
}

fn brief(l: &Layout) -> String {
    format!(
        "dp={} tp={} pp={} cp={} ep={} sp={} {:?} shard={:?} {:?}x{} {:?} mb={} {:?} {:?}",
        l.dp,
        l.tp,
        l.pp,
        l.cp,
        l.ep,
        l.sequence_parallel,
        l.zero,
        l.shard,
        l.schedule,
        l.chunks,
        l.stage_layers,
        l.micro_batch,
        l.recompute,
        l.reduce
    )
}

#[test]
fn layouts_are_allowed_dealt_and_fitted_as_they_were() {
    let mut all = String::new();
    let models = models();
    for layout in layouts() {
        writeln!(all, "{}", brief(&layout)).unwrap();
        writeln!(
            all,
            "  of {} ranks, {} a stage; {} replicas, {} of experts; shards {} {} {}; deals {:?}",
            layout.world(),
            layout.stage_ranks(),
            layout.replicas(),
            layout.expert_replicas(),
            layout.shards(),
            layout.shard_dp(),
            layout.expert_shards(),
            layout.deal(11)
        )
        .unwrap();
        for (name, model) in &models {
            match layout.validate(model, 24, 48) {
                Err(e) => writeln!(all, "  {name}: {}", said(&e)).unwrap(),
                Ok(()) => {
                    for ranks in [1, 3, 6, layout.world() * 2] {
                        let fitted = layout.fitted(model, 24, 48, ranks);
                        let shown =
                            fitted.map_or("none".to_owned(), |f| format!("{}; {}", brief(&f.layout), f.why));
                        writeln!(all, "  {name} on {ranks}: {shown}").unwrap();
                    }
                }
            }
        }
    }
    check("layouts", &all);
}

/// Names as people write them, and sizes that machines come in or do not.
#[test]
fn machines_are_found_as_they_were() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let names = [
        "tpu-v3-32",
        "v4-8",
        "v4-4096",
        "tpu-v5p-512",
        "v5p-1",
        "v5e-256",
        "v5litepod-16",
        "v6e-8",
        "tpu-v6e",
        "v7x-8",
        "v9-8",
        "h100",
        "H100 SXM",
        "nvidia-h100",
        "a100",
        "dgx-h100",
        "dgxh100",
        "p5.48xlarge",
        "p5.48xlrge",
        "aws-p5",
        "azure-openai",
        "corelink",
        "rtx4090",
        "geforce-rtx-4090",
        "gh200",
        "spark",
        "superpod",
        "xxxxxxxxxxxxxxxxxxxx",
        "",
    ];
    let mut all = String::new();
    for name in names {
        for size in [None, Some(1), Some(7), Some(48), Some(257), Some(512), Some(5000), Some(6144)] {
            let found = match catalog.cluster(name, size) {
                Err(e) => said(&e),
                Ok(c) => format!(
                    "{} of {} x {}, {} a node; {:?}, domains of {}; {:?} {:?}",
                    c.name,
                    c.accelerators,
                    c.accelerator.name,
                    c.per_node,
                    c.scale_up.kind,
                    c.scale_up.domain,
                    c.scale_out.topology,
                    c.scale_out.tiers
                ),
            };
            let size = size.map_or("all".to_owned(), |n| n.to_string());
            writeln!(all, "{name} {size}: {found}").unwrap();
        }
    }
    for name in ["h100-sxm", "b20", "llama3-8b", "llama3-9b", "ib-ndr", "zzzzzzzz", "nebius"] {
        let found = catalog.named(name).map_or_else(|e| said(&e), |all| format!("{} entries", all.len()));
        writeln!(all, "{name}: {found}").unwrap();
    }
    check("machines", &all);
}

#[test]
fn units_are_worth_what_they_were() {
    use spec::catalog::Dimension as D;
    let dimensions = [
        D::Bytes,
        D::ByteRate,
        D::LinkRate,
        D::FlopRate,
        D::Work,
        D::Time,
        D::Power,
        D::Money,
        D::Rent,
        D::EnergyPrice,
        D::Carbon,
        D::Water,
        D::Hazard,
        D::FailureRate,
        D::Ratio,
        D::Count,
    ];
    let mut all = String::new();
    for dimension in dimensions {
        let of = |unit: &'static str| format!("{unit} = {:e}", dimension.factor(unit).expect("a unit of it"));
        let units: Vec<String> = dimension.units().into_iter().map(of).collect();
        writeln!(all, "{dimension}: {}", units.join(", ")).unwrap();
    }
    check("units", &all);
}

/// Models that differ from one of a family in one or two keys, and whether they are written for transformers, as what.
#[test]
fn models_are_written_as_they_were() {
    let changes = [
        &["norm=\"layer\""] as &[&str],
        &["norm_eps=1e-4"],
        &["activation=\"gelu\""],
        &["activation=\"gelu_tanh\"", "mlp_bias=true"],
        &["qkv_bias=true"],
        &["attn_out_bias=true"],
        &["qkv_bias=true", "attn_out_bias=true"],
        &["qkv_bias=true", "attn_out_bias=true", "qk_norm=true"],
        &["mlp_bias=true"],
        &["qk_norm=true"],
        &["tied_embeddings=true"],
        &["tied_embeddings=false"],
        &["position=\"learned\""],
        &["rope_scaling.type=\"linear\"", "rope_scaling.factor=2.0"],
        &["head_dim=24"],
        &["kv_heads=1"],
        &["experts.every=2"],
        &["experts.dense_layers=1"],
        &["experts.shared_ffn=32"],
        &["experts.shared_ffn=33"],
        &["experts.renormalise=false"],
        &["experts.score=\"softmax\""],
        &["experts.score=\"sigmoid\""],
        &["experts.score=\"softmax\"", "experts.groups=2", "experts.top_groups=1"],
        &["experts.scale=2.0"],
        &["experts.balance_loss=0.1"],
        &["experts.z_loss=0.1"],
        &["latent.query_rank=0"],
    ];
    let preset = |name| (name, ModelSpec::preset(name).expect("a preset"));
    let mut all = String::new();
    for (name, model) in
        models().into_iter().chain([preset("tiny-gpt2"), preset("qwen3-0.6b"), preset("qwen2-0.5b")])
    {
        let file = format!("[model]\n{}", model.to_toml());
        for change in changes {
            let room = ["vocab=5000"];
            let set: Vec<String> = change.iter().chain(&room).map(|c| format!("model.{c}")).collect();
            let written = match RunSpec::load(Some(("run.toml", &file)), &set, &RunSpec::no_files) {
                Err(e) => e.to_string(),
                Ok(run) => run.model.to_hf_config().map_or_else(
                    |e| e.to_string(),
                    |json| format!("{} {:016x}", json["architectures"], fnv1a(json.to_string().bytes())),
                ),
            };
            writeln!(all, "{name} {}: {written}", change.join(" ")).unwrap();
        }
    }
    check("exports", &all);
}
