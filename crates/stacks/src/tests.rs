use std::collections::BTreeMap;

use plan::calibration::PRIOR;
use plan::placement::Order;
use plan::shape::Shape;
use plan::software::Software;
use spec::{Catalog, ContextMode, Layout, NumberFormat, Recompute, Zero};

use super::*;

pub(crate) fn problem(model: &str, n: usize) -> Problem {
    let cluster = Catalog::builtin().unwrap().cluster("dgx-superpod-h100", Some(n)).unwrap();
    Problem {
        shape: Shape::find(model).unwrap().unwrap(),
        software: Software::named("megatron-core-2024").unwrap(),
        cluster,
        constants: PRIOR,
        sequence: 2048,
        sequences: 256,
        optimizer: Default::default(),
    }
}

pub(crate) fn layout() -> Layout {
    Layout {
        dp: 8,
        tp: 4,
        pp: 2,
        micro_batch: 2,
        sequence_parallel: true,
        zero: Zero::Optimizer,
        reduce: spec::Reduce::Ring,
        ..Layout::default()
    }
}

pub(crate) fn placement(layout: Layout) -> Placement {
    Placement::of(layout, NumberFormat::Bf16)
}

/// What a stack would read: keys with values, or `true` for a bare flag.
pub(crate) type Read = BTreeMap<String, String>;

pub(crate) fn read_arguments(text: &str) -> Read {
    let words: Vec<&str> = text.split_whitespace().filter(|w| *w != "\\").collect();
    let mut read = Read::new();
    let mut key = None;
    for word in words {
        match word.strip_prefix("--") {
            Some(flag) => {
                read.insert(flag.to_owned(), "true".to_owned());
                key = Some(flag.to_owned());
            }
            None => {
                let flag = key.as_ref().expect("a flag comes first");
                let value = read.get_mut(flag).unwrap();
                *value = if value == "true" { word.to_owned() } else { format!("{value} {word}") };
            }
        }
    }
    read
}

fn count(read: &Read, key: &str) -> usize {
    read.get(key).map_or(1, |v| v.parse().unwrap_or_else(|_| panic!("{key} = {v}")))
}

/// A layout as Megatron-LM reads it from its arguments.
fn megatron_layout(read: &Read, world: usize, layers: usize) -> Placement {
    let (tp, pp) = (count(read, "tensor-model-parallel-size"), count(read, "pipeline-model-parallel-size"));
    let cp = count(read, "context-parallel-size");
    let extra = if read.contains_key("account-for-embedding-in-pipeline-split") { 2 } else { 0 };
    let chunks = match read.get("num-layers-per-virtual-pipeline-stage") {
        Some(n) => (layers + extra) / pp / n.parse::<usize>().unwrap(),
        None => 1,
    };
    let zero = match read.get("data-parallel-sharding-strategy").map(String::as_str) {
        Some("optim_grads") => Zero::Gradients,
        Some("optim_grads_params") => Zero::Parameters,
        _ if read.contains_key("use-distributed-optimizer") => Zero::Optimizer,
        _ => Zero::Off,
    };
    let dp = world / tp / pp / cp;
    let instances = count(read, "num-distributed-optimizer-instances");
    let layout = Layout {
        dp,
        shard: (instances > 1).then_some(dp / instances),
        tp,
        pp,
        sequence_parallel: read.contains_key("sequence-parallel"),
        zero,
        schedule: if chunks > 1 { PipelineSchedule::Interleaved } else { PipelineSchedule::OneFOneB },
        chunks,
        stage_layers: Vec::new(),
        micro_batch: count(read, "micro-batch-size"),
        recompute: match read.get("recompute-granularity").map(String::as_str) {
            None => Recompute::None,
            Some("selective") => Recompute::Selective,
            _ => Recompute::Full,
        },
        reduce: spec::Reduce::Ring,
        cp,
        context: match read.get("cp-comm-type").map(String::as_str) {
            Some("a2a") => ContextMode::Heads,
            _ => ContextMode::Ring,
        },
        ep: count(read, "expert-model-parallel-size"),
        expert_rows: Layout::default().expert_rows,
    };
    Placement {
        layout,
        format: if read.contains_key("fp8-format") { NumberFormat::Fp8 } else { NumberFormat::Bf16 },
        order: if read.contains_key("use-tp-pp-dp-mapping") { Order::TpCpPpDp } else { Order::TpCpDpPp },
    }
}

#[test]
fn megatron_reads_the_layout_that_was_written() {
    let check = |model: &str, given: Placement| {
        let p = problem(model, given.layout.world());
        let emitted = emit("megatron", &p, &given).unwrap();
        let read = read_arguments(&emitted.text);
        assert_eq!(
            megatron_layout(&read, given.layout.world(), p.shape.model.layers),
            given,
            "{}",
            emitted.text
        );
        assert_eq!(count(&read, "global-batch-size"), p.sequences);
    };
    check("gpt3-13b", placement(layout()));
    for zero in [Zero::Off, Zero::Gradients, Zero::Parameters] {
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            let given = Layout { zero, recompute, ..layout() };
            check("gpt3-13b", placement(given));
        }
    }
    let interleaved = Layout { chunks: 4, schedule: PipelineSchedule::Interleaved, ..layout() };
    check("gpt3-13b", placement(interleaved));
    check("gpt3-13b", placement(Layout { cp: 2, context: ContextMode::Heads, ..layout() }));
    // 126 layers over 16 x 8 virtual stages: the embedding and the head count as a layer each.
    let ends = Layout { dp: 1, tp: 8, pp: 16, chunks: 8, ..layout() };
    let mut given = placement(Layout { schedule: PipelineSchedule::Interleaved, ..ends });
    given.order = Order::TpCpPpDp;
    let p = Problem {
        shape: Shape::from_model(spec::ModelSpec::preset("llama3-405b").unwrap()),
        ..problem("gpt3-13b", 128)
    };
    let text = emit("megatron", &p, &given).unwrap().text;
    assert_eq!(megatron_layout(&read_arguments(&text), 128, 126), given, "{text}");
    assert!(text.contains("--rotary-base 500000 "), "{text}");

    let mut given = placement(Layout { dp: 16, tp: 1, sequence_parallel: false, pp: 4, ..layout() });
    (given.layout.cp, given.layout.ep, given.format) = (2, 8, NumberFormat::Fp8);
    given.layout.shard = Some(8);
    check("mixtral-8x7b", given);
}

/// Groups that shard, with replicas of them, in the words of each stack: how many ranks shard, how many replicas there are.
#[test]
fn groups_that_shard_are_written() {
    let l = Layout { zero: Zero::Parameters, shard: Some(8), pp: 1, dp: 16, ..layout() };
    let p = problem("gpt3-13b", 64);
    let text = emit("torchtitan", &p, &placement(l.clone())).unwrap().text;
    let read = read_lines(&text, "=");
    let degrees =
        ["data_parallel_shard_degree", "data_parallel_replicate_degree"].map(|key| count(&read, key));
    assert_eq!(degrees, [8, 2], "{text}");

    let plain = Layout { tp: 1, sequence_parallel: false, dp: 64, ..l.clone() };
    let file = emit("deepspeed", &p, &placement(plain.clone())).unwrap().text;
    let file: serde_json::Value = serde_json::from_str(&file).unwrap();
    assert_eq!(file["zero_optimization"]["mics_shard_size"], 8);
    let all = emit("deepspeed", &p, &placement(Layout { shard: None, ..plain.clone() })).unwrap().text;
    assert!(!all.contains("mics"), "{all}");
    let error = emit("deepspeed", &p, &placement(Layout { zero: Zero::Optimizer, ..plain })).unwrap_err();
    assert!(error.to_string().contains("ZeRO 1 over a part of the replicas"), "{error}");

    // Two pods of 256: sharded inside, replicas between.
    let cluster = Catalog::builtin().unwrap().cluster("tpu-v5e-pod", Some(512)).unwrap();
    let p = Problem { cluster, sequences: 1024, ..problem("gpt3-13b", 512) };
    let l = Layout { dp: 128, shard: Some(64), ..l };
    let text = emit("maxtext", &p, &placement(l)).unwrap().text;
    let read = read_lines(&text, ":");
    let axes =
        ["ici_fsdp_parallelism", "dcn_fsdp_parallelism", "ici_data_parallelism", "dcn_data_parallelism"];
    assert_eq!(axes.map(|axis| count(&read, axis)), [64, 1, 1, 2], "{text}");
}

#[test]
fn megatron_is_told_how_uneven_stages_are() {
    let p = problem("deepseek-v3", 128);
    let given = placement(Layout { dp: 8, tp: 1, pp: 16, sequence_parallel: false, ..layout() });
    let text = emit("megatron", &p, &given).unwrap().text;
    let line = text.lines().find(|l| l.contains("pipeline-model-parallel-layout")).unwrap();
    let stages: Vec<usize> = line
        .split('\'')
        .nth(1)
        .unwrap()
        .split('|')
        .map(|s| s.trim_matches(['E', 'L']).strip_prefix("t*").unwrap().parse().unwrap())
        .collect();
    assert_eq!((stages.len(), stages.iter().sum::<usize>()), (16, 61), "{line}");
    assert!(text.contains("--q-lora-rank 1536") && text.contains("'[0,0,0,1,"), "{text}");
    assert_eq!(stages, plan::estimate::virtual_layers(&p, &given), "as they were priced");
}

/// `key = value` and `key: value` lines.
pub(crate) fn read_lines(text: &str, between: &str) -> Read {
    let pairs = text.lines().filter_map(|l| l.split_once(between));
    pairs.map(|(k, v)| (k.trim().to_owned(), v.trim().trim_matches('"').to_owned())).collect()
}

#[test]
fn torchtitan_reads_the_layout_that_was_written() {
    let p = problem("gpt3-13b", 64);
    for zero in [Zero::Off, Zero::Gradients, Zero::Parameters] {
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            for (pp, chunks) in [(1, 1), (2, 1), (2, 4)] {
                let schedule =
                    if chunks > 1 { PipelineSchedule::Interleaved } else { PipelineSchedule::OneFOneB };
                let l = Layout { zero, recompute, pp, chunks, schedule, dp: 16 / pp, ..layout() };
                let text = emit("torchtitan", &p, &placement(l.clone())).unwrap().text;
                let file: toml::Value = toml::from_str(&text).unwrap();
                let int = |section: &str, key: &str| file[section][key].as_integer().unwrap() as usize;
                let of = |key: &str| int("parallelism", key);
                let replicas = of("data_parallel_replicate_degree");
                let dp = replicas * of("data_parallel_shard_degree");
                let word = |section: &str, key: &str| file[section][key].as_str().unwrap().to_owned();
                let read_zero =
                    match (replicas == dp, word("parallelism", "fsdp_reshard_after_forward").as_str()) {
                        (true, _) => Zero::Off,
                        (false, "never") => Zero::Gradients,
                        _ => Zero::Parameters,
                    };
                let micro_batch = if pp > 1 {
                    of("pipeline_parallel_microbatch_size")
                } else {
                    int("training", "local_batch_size")
                };
                let virtuals = if pp > 1 { 40 / of("pipeline_parallel_layers_per_stage") } else { 1 };
                assert_eq!(
                    (
                        dp,
                        of("tensor_parallel_degree"),
                        of("pipeline_parallel_degree"),
                        virtuals / pp.min(virtuals)
                    ),
                    (l.dp, l.tp, l.pp, chunks),
                    "{text}"
                );
                assert_eq!((read_zero, micro_batch), (zero, l.micro_batch), "{text}");
                assert_eq!(word("activation_checkpoint", "mode"), format!("{recompute:?}").to_lowercase());
                assert_eq!(int("training", "global_batch_size"), 256);
            }
        }
    }
}

#[test]
fn deepspeed_reads_the_layout_that_was_written() {
    let p = problem("gpt3-13b", 64);
    for (zero, pp, tp) in
        [(Zero::Off, 2, 4), (Zero::Optimizer, 2, 4), (Zero::Gradients, 1, 4), (Zero::Parameters, 1, 1)]
    {
        let l = Layout { zero, pp, tp, dp: 64 / pp / tp, sequence_parallel: false, ..layout() };
        let text = emit("deepspeed", &p, &placement(l.clone())).unwrap().text;
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        let at = |path: &str| file.pointer(path).and_then(|v| v.as_u64()).unwrap() as usize;
        assert_eq!(at("/zero_optimization/stage"), usize::from(u8::from(zero)));
        assert_eq!(
            file.pointer("/tensor_parallel/autotp_size").map_or(1, |n| n.as_u64().unwrap()),
            tp as u64
        );
        // DeepSpeed holds these to one another.
        assert_eq!(
            at("/train_batch_size"),
            at("/train_micro_batch_size_per_gpu") * at("/gradient_accumulation_steps") * l.dp
        );
        assert_eq!(file["bf16"]["enabled"], true);
    }
    let heads = Layout { cp: 4, context: ContextMode::Heads, tp: 1, pp: 1, dp: 16, ..layout() };
    let heads = placement(Layout { sequence_parallel: false, ..heads });
    let file: serde_json::Value = serde_json::from_str(&emit("deepspeed", &p, &heads).unwrap().text).unwrap();
    assert_eq!((&file["sequence_parallel_size"], &file["data_parallel_size"]), (&4.into(), &16.into()));
    let read = read_arguments(&emit("megatron-deepspeed", &p, &heads).unwrap().text);
    assert_eq!(count(&read, "ds-sequence-parallel-size"), 4);
    let zb = Layout { schedule: PipelineSchedule::ZeroBubble, ..layout() };
    let emitted = emit("megatron-deepspeed", &p, &placement(zb)).unwrap();
    let read = read_arguments(&emitted.text);
    assert_eq!((count(&read, "zero-stage"), count(&read, "pipeline-model-parallel-size")), (1, 2));
    assert!(read.contains_key("enable-zbh1-pipeline"));
    let config = emitted.notes[0].strip_prefix("ds_config.json: ").unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(config).is_ok());
}

#[test]
fn maxtext_reads_the_layout_that_was_written() {
    let cluster = Catalog::builtin().unwrap().cluster("tpu-v5e-pod", Some(512)).unwrap();
    let p = Problem { cluster, sequences: 1024, ..problem("gpt3-13b", 512) };
    for (zero, sequence_parallel) in [(Zero::Off, true), (Zero::Optimizer, false), (Zero::Parameters, true)] {
        let l = Layout { zero, pp: 1, dp: 128, sequence_parallel, ..layout() };
        let text = emit("maxtext", &p, &placement(l.clone())).unwrap().text;
        let read = read_lines(&text, ":");
        let axis = |name: &str| {
            (
                count(&read, &format!("ici_{name}_parallelism")),
                count(&read, &format!("dcn_{name}_parallelism")),
            )
        };
        let tp = axis(if sequence_parallel { "tensor_sequence" } else { "tensor" });
        assert_eq!(tp, (4, 1), "{text}");
        let (fsdp, data) = (axis("fsdp"), axis("data"));
        let product = |a: (usize, usize)| a.0 * a.1;
        assert_eq!(product(fsdp) * product(data), 128, "{text}");
        assert_eq!(product(fsdp) == 128, zero == Zero::Parameters, "{text}");
        assert_eq!(read["shard_optimizer_over_data"], (zero == Zero::Optimizer).to_string());
        // One slice of 256, two of them.
        let all = ["tensor", "tensor_sequence", "context", "fsdp", "data", "expert", "pipeline"].map(axis);
        assert_eq!(all.iter().map(|a| a.0).product::<usize>(), 256, "{text}");
        assert_eq!(all.iter().map(|a| a.1).product::<usize>(), 2, "{text}");
        let per_device: f64 = read["per_device_batch_size"].parse().unwrap();
        let batch = per_device * 512.0 * count(&read, "gradient_accumulation_steps") as f64;
        assert_eq!(batch, 1024.0, "{text}");
    }
}

#[test]
fn what_a_stack_lacks_is_refused_with_what_it_has() {
    let p = problem("gpt3-13b", 64);
    let check = |stack: &str, layout: Layout, what: &str, hint: &str| {
        let error = emit(stack, &p, &placement(layout)).unwrap_err();
        assert!(error.to_string().contains(what), "{stack}: {error}");
        assert!(error.hint_text().unwrap().contains(hint), "{stack}: {:?}", error.hint_text());
    };
    let zb = Layout { schedule: PipelineSchedule::ZeroBubble, ..layout() };
    let chunks = Layout { schedule: PipelineSchedule::Interleaved, chunks: 4, ..layout() };
    check("megatron", zb.clone(), "no zero-bubble schedule", "interleaved 1F1B");
    check("torchtitan", layout(), "no ZeRO 1", "zero=3");
    check("torchtitan", Layout { zero: Zero::Parameters, ..zb.clone() }, "no zero-bubble", "interleaved");
    check("deepspeed", Layout { sequence_parallel: false, ..zb }, "no zero-bubble", "megatron-deepspeed");
    check("deepspeed", Layout { zero: Zero::Parameters, ..layout() }, "no ZeRO 3 with pipeline", "zero=1");
    check("megatron-deepspeed", chunks, "no interleaved 1F1B", "schedule=1f1b");
    check("maxtext", layout(), "no 1F1B schedule", "gpipe");
    check("maxtext", Layout { zero: Zero::Gradients, pp: 1, dp: 16, ..layout() }, "no ZeRO 2", "zero=3");
    let heads = |zero, pp| Layout { cp: 2, context: ContextMode::Heads, zero, pp, ..layout() };
    check("torchtitan", heads(Zero::Parameters, 1), "no all-to-all over heads", "context=ring");
    check("maxtext", heads(Zero::Parameters, 1), "no all-to-all over heads", "context=ring");
    check("megatron-deepspeed", heads(Zero::Optimizer, 2), "beside tensor or pipeline", "tp=1 and pp=1");
    check(
        "megatron",
        Layout { cp: 16, ..heads(Zero::Optimizer, 1) },
        "no copies of 40 key and value heads",
        "smaller cp",
    );
    check("slurm", layout(), "unknown stack", "known: megatron");
    check("megatorn", layout(), "unknown stack", "did you mean `megatron`?");
}

#[test]
fn every_stack_names_software_that_is_estimated() {
    for (stack, name) in STACKS {
        assert!(Software::named(name).is_some(), "{stack}");
        assert_eq!(software(stack).unwrap(), name);
    }
}

#[test]
fn every_rank_has_one_place() {
    let given = placement(Layout { dp: 4, tp: 8, pp: 2, ..Layout::default() });
    let csv = rank_csv(&given, 8);
    assert_eq!(csv.lines().count(), 65);
    assert_eq!(csv.lines().nth(9), Some("8,1,0,0,0,1,0,0"));
    for order in [Order::TpCpDpPp, Order::TpCpPpDp] {
        let given = Placement { layout: Layout { cp: 2, ..given.layout.clone() }, order, ..given.clone() };
        let places: std::collections::BTreeSet<_> =
            ranks(&given, 8).map(|p| (p.tp, p.cp, p.dp, p.pp)).collect();
        assert_eq!(places.len(), given.layout.world());
        let next = ranks(&given, 8).nth(given.dp_stride()).unwrap();
        assert_eq!((next.dp, next.pp, next.tp, next.cp), (1, 0, 0, 0));
        let next = ranks(&given, 8).nth(given.pp_stride()).unwrap();
        assert_eq!((next.dp, next.pp, next.tp, next.cp), (0, 1, 0, 0));
    }
}
