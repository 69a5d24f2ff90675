use super::*;
use crate::{Error, PipelineSchedule, Result, RopeScaling, Zero};
use proptest::prelude::*;
use std::path::Path;

pub(crate) fn load(file: &str, set: &[&str]) -> Result<RunSpec> {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    RunSpec::load(Some(("run.toml", file)), &set, &|path: &Path| match path.to_str() {
        Some("gpt2/config.json") => {
            Ok(r#"{"model_type":"gpt2","vocab_size":9999,"n_embd":32,"n_layer":2,"n_head":4}"#.to_owned())
        }
        _ => Err(Error::user(format!("no such file: {}", path.display()))),
    })
}

fn good(file: &str, set: &[&str]) -> RunSpec {
    load(file, set).unwrap_or_else(|e| panic!("{e} in {file} {set:?}"))
}

/// `message | hint`.
fn refused(file: &str, set: &[&str]) -> String {
    let error = load(file, set).expect_err(file);
    assert_eq!(error.exit_code(), 2);
    format!("{error} | {}", error.hint_text().unwrap_or("no hint"))
}

fn check(file: &str, expected: &str) {
    assert_eq!(refused(file, &[]), expected);
}

fn check_set(set: &[&str], expected: &str) {
    assert_eq!(refused("", set), expected);
}

#[test]
fn defaults() {
    let run = RunSpec::load(None, &[], &RunSpec::no_files).expect("the defaults are valid");
    assert_eq!(run.model, ModelSpec::preset("llama-tiny-ref").expect("a preset"));
    assert_eq!(run.layout, Layout::default());
    assert_eq!(run.data.source, DataSource::CargoSources);
    assert_eq!(run.batch.tokens(), 2048);
    assert_eq!(good("", &[]), run);
    assert_eq!(good(&run.to_toml(), &[]), run);
}

#[test]
fn trouble_is_read_and_decides_no_number() {
    let set = [
        "trouble.on_nan=rollback",
        "trouble.on_spike=skip",
        "trouble.back_steps=200",
        "trouble.on_corruption=restore",
        "run.verify_every=5",
    ];
    let run = good("", &set);
    assert_eq!((run.trouble.on_nan, run.trouble.on_spike), (OnNan::Rollback, OnSpike::Skip));
    assert_eq!((run.trouble.on_corruption, run.run.verify_every), (OnCorruption::Restore, Some(5)));
    assert_eq!(good(&run.to_toml(), &[]), run);
    assert_eq!(run.fingerprint(), good("", &[]).fingerprint());
    check_set(
        &["trouble.on_nan=rollback", "checkpoint.every=0"],
        "a rollback needs checkpoints, and checkpoint.every = 0 saves none before the end | set checkpoint.every, or trouble.on_nan and trouble.on_spike to skip",
    );
    // Two are kept, 200 steps apart: the older one is 200 steps back at most.
    check_set(
        &["trouble.on_spike=rollback", "trouble.back_steps=201"],
        "--set trouble.back_steps=201: trouble.back_steps = 201 goes back further than the checkpoints that are kept: 200 steps | set checkpoint.keep=3 or more, or lower trouble.back_steps",
    );
    good("", &["trouble.on_spike=rollback", "trouble.back_steps=201", "checkpoint.keep=0"]);
}

#[test]
fn who_set_a_key_is_known() {
    let file = "# layout.tp, layout.micro_batch = 8\n[layout]\ndp = 2\nzero = 1\n";
    let set = ["layout.zero=2".to_owned()];
    let read = RunSpec::resolve(Some(("run.toml", file)), &set, &RunSpec::no_files).expect("a run");
    let check = |key: &str, expected: Origin| assert_eq!(*read.set_by(key), expected, "{key}");
    check("layout.micro_batch", Origin::Default);
    check("layout.dp", Origin::File { path: "run.toml".to_owned(), line: 3 });
    check("layout.zero", Origin::Set("layout.zero=2".to_owned()));
    check("data.text", Origin::Default);
    let at = |what: &str| read.locate(Error::user(what)).to_string();
    assert_eq!(at("layout.dp = 2 is odd"), "run.toml:3: layout.dp = 2 is odd");
    assert_eq!(at("layout.tp = 1 is odd"), "layout.tp = 1 is odd");
}

#[test]
fn every_key_is_read_and_documented() {
    for key in RunSpec::keys() {
        assert!(!key.doc.is_empty() && !key.type_text().is_empty() && key.path.contains('.'), "{}", key.path);
        // A value of the wrong type is refused by name, so the key is read.
        let set = format!("{}=[[]]", key.path);
        let scaling = match key.path.strip_prefix("model.rope_scaling.") {
            Some("low_freq_factor" | "high_freq_factor" | "original_max_positions") => "llama3",
            Some("beta_fast" | "beta_slow" | "attention_factor" | "truncate" | "mscale_all_dim") => "yarn",
            Some("factor") => "linear",
            _ => "default",
        };
        let scaling = format!(
            "model.rope_scaling={{type=\"{scaling}\",factor=2.0,low_freq_factor=1.0,high_freq_factor=4.0}}"
        );
        let mut all = vec![];
        if key.path.starts_with("model.rope_scaling.") && key.path != "model.rope_scaling.type" {
            let kind = scaling.split('"').nth(1).unwrap_or_default();
            all.push(format!("model.rope_scaling.type={kind}"));
            if key.path != "model.rope_scaling.factor" {
                all.push("model.rope_scaling.factor=2".to_owned());
            }
            if kind == "llama3" {
                all.extend(["low", "high"].map(|s| format!("model.rope_scaling.{s}_freq_factor=3")));
            }
        }
        if key.path == "schedule.decay_steps" {
            all.push("schedule.kind=wsd".to_owned());
        }
        if key.path.starts_with("model.experts.") {
            all.extend(["count=4", "top_k=2", "ffn=8"].map(|s| format!("model.experts.{s}")));
        }
        if key.path.starts_with("model.latent.") {
            let widths = ["kv_rank=4", "nope_dim=2", "rope_dim=2", "value_dim=2"];
            all.extend(widths.map(|s| format!("model.latent.{s}")));
        }
        if key.path.starts_with("model.window.") {
            all.push("model.window.tokens=4".to_owned());
        }
        if key.path == "model.mtp.weight" {
            all.push("model.mtp.depth=1".to_owned());
        }
        all.push(set);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let message = refused("", &all);
        assert!(message.contains(&format!("{} = ", key.path)), "{}: {message}", key.path);
        assert!(message.contains("expected"), "{}: {message}", key.path);
    }
}

#[test]
fn unknown_keys_name_the_place_and_the_nearest() {
    check(
        "\n\n[train]\nsteps = 1\nstep = 2\n",
        "unknown key train.step in run.toml:5 | did you mean `train.steps`?",
    );
    check("train = { step = 2 }", "unknown key train.step in run.toml:1 | did you mean `train.steps`?");
    check("[trian]\nsteps = 1\n", "unknown section [trian] in run.toml:1 | did you mean `train`?");
    check("[optim]\nbeta3 = 1\n", "unknown key optim.beta3 in run.toml:2 | did you mean `optim.beta1`?");
    check("[train]\nlr = 1\n", "unknown key train.lr in run.toml:2 | did you mean `optim.lr`?");
    check(
        "zzzzzz = 1",
        "unknown key zzzzzz in run.toml:1 | sections: model, data, batch, optim, schedule, train, layout, checkpoint, run, trouble, sample",
    );
    check_set(
        &["zzzzzz.qqqqqq=1"],
        "unknown key zzzzzz.qqqqqq in --set zzzzzz.qqqqqq=1 | sections: model, data, batch, optim, schedule, train, layout, checkpoint, run, trouble, sample",
    );
    check_set(&["lr=1"], "unknown key lr in --set lr=1 | did you mean `optim.lr`?");
    check_set(&["train.steps"], "`train.steps` is not KEY=VALUE | write it like --set train.steps=200");
    check(
        "[model.rope_scaling]\ntyp = \"yarn\"\n",
        "unknown key model.rope_scaling.typ in run.toml:2 | did you mean `model.rope_scaling.type`?",
    );
}

#[test]
fn syntax() {
    check(
        "layout = \"fast\"",
        "layout = \"fast\" in run.toml:1, expected \"auto\" or a section [layout] | keys of [layout]: auto, dp, tp, pp, cp, context, ep, expert_rows, sequence_parallel, zero, shard, schedule, chunks, stage_layers, micro_batch, recompute, reduce",
    );
    let message = refused("[train]\nsteps = \n", &[]);
    assert!(message.starts_with("run.toml:2: ") && !message.contains('\n'), "{message}");
    let message = refused("[train]\nsteps = 1\nsteps = 2\n", &[]);
    assert!(message.starts_with("run.toml:3: "), "{message}");
    check_set(&["layout.stage_layers=[1,"], &refused("", &["layout.stage_layers=[1,"]));
}

#[test]
fn numbers_have_their_range() {
    check(
        "[train]\nsteps = \"many\"\n",
        "train.steps = \"many\" in run.toml:2, expected a whole number from 1 to 1073741824 | train.steps: optimiser steps (default 180)",
    );
    check(
        "[train]\nsteps = 0\n",
        "train.steps = 0 in run.toml:2, expected a whole number from 1 to 1073741824 | train.steps: optimiser steps (default 180)",
    );
    check(
        "[train]\nsteps = -3\n",
        "train.steps = -3 in run.toml:2, expected a whole number from 1 to 1073741824 | train.steps: optimiser steps (default 180)",
    );
    check(
        "[train]\nsteps = 99999999999999999999999999999999999999999999\n",
        "train.steps = a number of 44 digits in run.toml:2, expected a whole number from 1 to 1073741824 | train.steps: optimiser steps (default 180)",
    );
    check(
        "[train]\nsteps = 2.5\n",
        "train.steps = 2.5 in run.toml:2, expected a whole number from 1 to 1073741824 | train.steps: optimiser steps (default 180)",
    );
    check(
        "[optim]\nlr = nan\n",
        "optim.lr = nan in run.toml:2, expected a number above 0 and at most 1e6 | optim.lr: peak learning rate (default 1e-3)",
    );
    check(
        "[optim]\nlr = inf\n",
        "optim.lr = inf in run.toml:2, expected a number above 0 and at most 1e6 | optim.lr: peak learning rate (default 1e-3)",
    );
    check(
        "[optim]\nbeta2 = 1.0\n",
        "optim.beta2 = 1.0 in run.toml:2, expected a number at least 0 and below 1 | optim.beta2: decay of the second moment (default 0.95)",
    );
}

#[test]
fn values_have_their_type() {
    check(
        "[layout]\nsequence_parallel = 1\n",
        "layout.sequence_parallel = 1 in run.toml:2, expected true or false | layout.sequence_parallel: split activations along the sequence between tensor-parallel regions (default false)",
    );
    check(
        "[schedule]\nkind = \"cosin\"\n",
        "schedule.kind = \"cosin\" in run.toml:2, expected \"cosine\" or \"wsd\" or \"linear\" or \"constant\" | did you mean `cosine`?",
    );
    check(
        "[layout]\nzero = 4\n",
        "layout.zero = 4 in run.toml:2, expected a whole number from 0 to 3 | layout.zero: shard over dp: 1 optimiser state, 2 and gradients, 3 and parameters (default 0)",
    );
    check(
        "[checkpoint]\nevery = 9999999999\n",
        "checkpoint.every = 9999999999 in run.toml:2, expected a whole number from 0 to 1073741824 | checkpoint.every: steps between checkpoints (default 200)",
    );
    check(
        "[run]\ndir = 2020-01-01\n",
        "run.dir = 2020-01-01 in run.toml:2, expected text in quotes, not empty | run.dir: where journal, checkpoints and the resolved run file go (default runs/default)",
    );
    check(
        "[run]\ndir = \"\"\n",
        "run.dir = \"\" in run.toml:2, expected text in quotes, not empty | run.dir: where journal, checkpoints and the resolved run file go (default runs/default)",
    );
    check(
        "[run]\ndir = \"s3://bucket/run\"\n",
        "run.dir = \"s3://bucket/run\" in run.toml:2, expected a directory; checkpoint.dir may be a URL | run.dir: where journal, checkpoints and the resolved run file go (default runs/default)",
    );
    check(
        "[data]\nsplit = \"0,1\"\n",
        "data.split = \"0,1\" in run.toml:2, expected three weights like \"99,1,0\", none negative, the first above 0 | data.split: weights of the train, validation and test splits (default 99,1,0)",
    );
    check(
        "[[data.blend]]\nprefix = \"a\"\n",
        "data.blend = a list in run.toml:1, expected a list of { prefix = \"path\", weight = 0.5 } with weights above 0 | data.blend: tokenised datasets and their weights, instead of text",
    );
    for weight in ["0", "-1.5", "inf", "nan"] {
        let message = refused(&format!("[[data.blend]]\nprefix = \"a\"\nweight = {weight}\n"), &[]);
        assert!(message.contains("with weights above 0"), "{weight}: {message}");
    }
}

#[test]
fn contradictions() {
    check(
        "[batch]\nsequences = 8\ntokens = 2048\n",
        "batch.tokens = 2048 in run.toml:3 contradicts batch.sequences = 8 in run.toml:2 | keep one of batch.sequences, batch.tokens",
    );
    check(
        "[batch]\ntokens = 1000\n",
        "batch.tokens = 1000 in run.toml:2 is not a multiple of batch.sequence = 256 | set batch.tokens=768 or 1024",
    );
    check(
        "[batch]\ntokens = 100\n",
        "batch.tokens = 100 in run.toml:2 is not a multiple of batch.sequence = 256 | set batch.tokens=256",
    );
    check_set(
        &["batch.sequence=2000", "batch.sequences=10000000", "model.max_positions=2000"],
        "batch.sequence x sequences = 2000 x 10000000 tokens, expected at most 4294967296 | batch.sequence: tokens of a sequence (default 256)",
    );
    check(
        "[schedule]\nwarmup_steps = 180\n",
        "schedule.warmup_steps = 180 in run.toml:2, expected less than train.steps = 180 | set schedule.warmup_steps=18, or train.steps=1800",
    );
    check(
        "[schedule]\ndecay_steps = 4\n",
        "schedule.decay_steps = 4 in run.toml:2 has no meaning with schedule.kind = \"cosine\" | set schedule.decay_steps=none, or schedule.kind=wsd",
    );
    check(
        "[schedule]\nkind = \"wsd\"\nwarmup_steps = 80\ndecay_steps = 101\n",
        "schedule.decay_steps = 101 in run.toml:4, expected at most the 100 steps after warmup | set schedule.decay_steps=100, or a larger train.steps",
    );
    check(
        "[schedule]\nmin_lr = 1\n",
        "schedule.min_lr = 1 in run.toml:2, expected at most optim.lr = 0.001 | set schedule.min_lr_ratio=0.1 instead",
    );
    check(
        "[batch]\nsequence = 4096\n",
        "batch.sequence = 4096 in run.toml:2, expected at most the 2048 positions of llama-tiny-ref | set batch.sequence=2048, or model.max_positions=4096",
    );
    check(
        "[data]\nvocab_size = 5000\n",
        "data.vocab_size = 5000 in run.toml:2, expected at most the vocabulary of 4096 of llama-tiny-ref | set data.vocab_size=4096, or model.vocab=5000",
    );
    check(
        "[model]\npreset = \"tiny\"\n",
        "data.vocab_size = 4096, expected at most the vocabulary of 96 of tiny | set model.vocab=257: 96 entries hold no text, the bytes alone take 257",
    );
    let one_key_more =
        RunSpec::load(None, &["model.preset=tiny".into(), "model.vocab=257".into()], &|_| unreachable!());
    assert_eq!(one_key_more.expect("a run").batch.sequence, 64, "as much as the model sees");
    check(
        "[data]\ntext = \"a\"\nprefix = \"b\"\n",
        "data.prefix = \"b\" in run.toml:3 contradicts data.text = \"a\" in run.toml:2 | keep one of data.text, data.prefix, data.blend",
    );
}

#[test]
fn layout_and_model_refusals_name_the_place() {
    check(
        "[layout]\ntp = 4\n",
        "run.toml:2: layout.tp = 4 does not divide the 6 query heads of llama-tiny-ref | values of layout.tp that work: 1, 2",
    );
    check_set(
        &["model.kv_heads=4"],
        "--set model.kv_heads=4: model.kv_heads = 4 does not divide model.heads = 6 | values of model.kv_heads that work: 1, 2, 3, 6",
    );
    check(
        "[model]\npreset = \"llama-3-8b\"\n",
        "model.preset = \"llama-3-8b\" in run.toml:2: no model is called `llama-3-8b` | did you mean `llama3-8b`?",
    );
    check(
        "[model]\nconfig = \"no.json\"\n",
        "read model.config: no such file: no.json | model.config: Hugging Face config.json to start from, instead of a preset",
    );
    check(
        "[model]\nheads = 7\n",
        "model.heads = 7 does not divide model.hidden = 384 | change one of them, or set model.head_dim",
    );
}

#[test]
fn model_starts_from_preset_or_config_and_fields_override() {
    let run = good("[model]\nconfig = \"gpt2/config.json\"\nlayers = 3\n", &["batch.sequence=64"]);
    assert_eq!((run.model.name.as_str(), run.model.layers, run.model.vocab), ("gpt2", 3, 9999));
    let run = good(
        "[model]\nconfig = \"gpt2/config.json\"\nlayers = 3\n",
        &["model.preset=tiny", "data.prefix=x", "batch.sequence=64"],
    );
    assert_eq!(run.model, ModelSpec::preset("tiny").expect("a preset"));
    let run = good("[model]\nheads = 12\nhidden = 768\n", &[]);
    assert_eq!((run.model.kv_heads, run.model.head_dim, run.model.layers), (12, 64, 6));
    let run = good(
        "",
        &["model.preset=qwen3-0.6b", "model.heads=8", "model.rope_scaling={type=\"linear\", factor=2}"],
    );
    assert_eq!((run.model.kv_heads, run.model.head_dim), (8, 128));
    let scaled = good("", &["model.preset=llama3-405b", "model.rope_scaling.factor=4"]);
    assert!(matches!(
        scaled.model.position,
        crate::Position::Rope(crate::Rope { scaling: RopeScaling::Llama3 { factor: 4.0, .. }, .. })
    ));
    let resolved = scaled.to_toml();
    let plain = good(&resolved, &["model.rope_scaling.type=default"]);
    assert!(matches!(
        plain.model.position,
        crate::Position::Rope(crate::Rope { scaling: RopeScaling::Default, .. })
    ));
    assert_eq!(
        refused("", &["model.rope_scaling.factor=2"]),
        "model.rope_scaling.factor = 2 in --set model.rope_scaling.factor=2 has no meaning with rope_scaling.type = \"default\" | set model.rope_scaling.type too"
    );
    assert_eq!(
        refused("", &["model.position=learned", "model.rope_theta=2"]),
        "model.rope_theta = 2 in --set model.rope_theta=2 has no meaning with learned positions | remove it, or set model.position=rope"
    );
}

#[test]
fn overrides_win_and_read_like_people_write() {
    let file = "[batch]\nsequences = 4\n[data]\ntext = [\"a\", \"b\"]\n[schedule]\nmin_lr = 1e-5\n[run]\nthreads = 2\n";
    let run = good(
        file,
        &[
            "batch.tokens=4k",
            "batch.tokens=0x1000",
            "data.prefix = corpus/all",
            "schedule.min_lr_ratio=0",
            "optim.lr=3e-4",
            "train.seed=9_000",
            "train.eval_every=0",
            "checkpoint.keep=none",
            "optim.grad_clip=0",
            "run.dir=2024-01-01",
            "run.threads=none",
            "layout.zero=2",
            "sample.prompt=42",
            "layout.schedule=gpipe",
            "data.cache_dir=none",
        ],
    );
    assert_eq!(run.batch.sequences, 16);
    assert_eq!(run.data.source, DataSource::Prefix("corpus/all".into()));
    assert_eq!((run.schedule.min_lr, run.optim.lr, run.train.seed), (MinLr::Ratio(0.0), 3e-4, 9000));
    assert_eq!(
        (run.train.eval_every, run.checkpoint.keep, run.optim.grad_clip, run.run.threads),
        (None, None, None, None)
    );
    assert_eq!((run.run.dir.to_str(), run.sample.prompt.as_str()), (Some("2024-01-01"), "42"));
    assert_eq!((run.layout.zero, run.layout.schedule), (Zero::Gradients, PipelineSchedule::Gpipe));
    assert_eq!(good(&run.to_toml(), &[]), run);
    let text = good(file, &["data.text=none"]);
    assert_eq!(text.data.source, DataSource::CargoSources);
}

#[test]
fn warmup_follows_short_runs() {
    assert_eq!(good("", &["train.steps=5"]).schedule.warmup_steps, 0);
    assert_eq!(good("", &["train.steps=1"]).lr_at(1), 1e-4);
    assert_eq!(good("", &["train.steps=100000"]).schedule.warmup_steps, 100);
    assert_eq!(good("", &["train.steps=100", "schedule.kind=wsd"]).schedule.decay_steps, 20);
}

#[test]
fn recipes_are_read_refused_and_told_apart() {
    let run = good("", &["optim.kind=muon", "train.z_loss=1e-4", "model.logit_softcap=30"]);
    assert_eq!((run.optim.kind, run.optim.momentum), (Optimizer::Muon, 0.95));
    assert_eq!((run.train.z_loss, run.model.logit_softcap), (1e-4, 30.0));
    assert_eq!(good(&run.to_toml(), &[]), run);
    // What is off is not spelled out: runs from before keep their fingerprints.
    assert!(!good("", &[]).to_toml().contains("optim.kind") && !good("", &[]).to_toml().contains("momentum"));
    let list: Vec<String> = good("", &[]).differences(&run).iter().map(ToString::to_string).collect();
    assert_eq!(
        list,
        [
            "model.logit_softcap = none, was 30.0",
            "optim.kind = \"adamw\", was \"muon\"",
            "train.z_loss = 0, was 0.0001"
        ]
    );
    for (set, refused) in [
        ("optim.kind=sgd", "optim.kind = \"sgd\" in --set optim.kind=sgd, expected \"adamw\" or \"muon\""),
        (
            "optim.momentum=1",
            "optim.momentum = 1 in --set optim.momentum=1, expected a number at least 0 and below 1",
        ),
        (
            "train.attention_dropout=0.99999999",
            "train.attention_dropout = 0.99999999 in --set train.attention_dropout=0.99999999, expected a number at least \
             0 and below 1",
        ),
        ("train.z_loss=2", "train.z_loss = 2 in --set train.z_loss=2, expected a number from 0 to 1"),
        ("train.z_loss=nan", "train.z_loss = nan in --set train.z_loss=nan, expected a number from 0 to 1"),
        ("model.logit_softcap=0.5", "model.logit_softcap = 0.5, expected 0 or a number from 1 to 1e6"),
        ("model.logit_softcap=-1", "model.logit_softcap = -1, expected 0 or a number from 1 to 1e6"),
    ] {
        let e = load("", &[set]).expect_err(set).to_string();
        assert!(e.contains(refused), "found    {e}\nexpected {refused}");
    }
}

#[test]
fn differences_name_the_keys() {
    let (a, b) = (
        good("", &[]),
        good("", &["optim.lr=2e-3", "data.tokenizer=t.json", "layout.micro_batch=4", "run.dir=b"]),
    );
    let list: Vec<String> = a.differences(&b).iter().map(ToString::to_string).collect();
    assert_eq!(list, ["optim.lr = 0.001, was 0.002"], "where data and tokenizer lie decides nothing");
    assert_ne!(a.fingerprint(), b.fingerprint());
    let refused = a.not_the_run(&a.differences(&b)).to_string();
    assert_eq!(refused, "this is not the run that was started in runs/default: optim.lr = 0.001, was 0.002");
    let moved = good(
        "",
        &[
            "run.dir=b",
            "checkpoint.dir=s3://b/c",
            "layout.micro_batch=4",
            "train.log_every=7",
            "model.name=x",
        ],
    );
    assert_eq!(a.fingerprint(), moved.fingerprint());
    assert!(a.differences(&moved).is_empty());
}

proptest! {
    /// A resolved file gives the same run, whatever was set.
    #[test]
    fn resolved_file_round_trips(preset in 0usize..19, lr in 1e-9..1e3f64, eps in 1e-12..0.5f64, ratio in 0.0..1.0f64,
                                 kind in 0usize..4, micro in 0u32..4, steps in 12usize..100_000, seed: u32,
                                 weights in prop::collection::vec(1e-6..1e6f64, 0..4), prompt in "\\PC{0,12}", newline: bool) {
        let preset = ModelSpec::preset_names().nth(preset).expect("a name");
        let mut set = vec![
            format!("model.preset={preset}"), format!("optim.lr={lr:?}"), format!("optim.eps={eps:?}"),
            format!("schedule.min_lr_ratio={ratio:?}"), format!("schedule.kind={}", ["cosine", "wsd", "linear", "constant"][kind]),
            format!("layout.micro_batch={}", 1 << micro), format!("train.steps={steps}"), format!("train.seed={seed}"),
            "batch.sequence=32".to_owned(), "data.tokenizer=dir/tokenizer.json".to_owned(),
            format!("model.norm_eps={:?}", eps as f32),
        ];
        if !weights.is_empty() {
            let parts: Vec<String> = weights.iter().map(|w| format!("{{prefix='p \"x', weight={w:?}}}")).collect();
            set.push(format!("data.blend=[{}]", parts.join(",")));
        }
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let mut run = good("", &set);
        run.sample.prompt = if newline { format!("{prompt}\n\"\"\"'\\") } else { prompt };
        let text = run.to_toml();
        prop_assert_eq!(&good(&text, &[]), &run, "{}", text);
        prop_assert_eq!(good(&text, &[]).fingerprint(), run.fingerprint());
    }

    /// No text makes the reader panic.
    #[test]
    fn any_text_is_an_answer(text in "(\\[[a-z.]{0,8}\\]\n|[a-z.]{1,8} = [0-9\"'\\[{a-z.\\-]{0,6}\n|\\PC{0,6}){0,6}", set in "\\PC{0,20}") {
        let _ = load(&text, &[]);
        let _ = load("", &[&set]);
        let _ = load("", &[&format!("train.steps={set}")]);
    }

    /// The rate rises to the peak, never exceeds it, never falls below the minimum after warmup, and ends there.
    #[test]
    fn learning_rates_stay_in_range(kind in 0usize..4, steps in 2usize..500, warm in 0.0..1.0f64, min in 0.0..1.0f64) {
        let kind = [ScheduleKind::Cosine, ScheduleKind::Wsd, ScheduleKind::Linear, ScheduleKind::Constant][kind];
        let warmup_steps = (warm * (steps - 1) as f64) as usize;
        let schedule = LrSchedule { kind, peak: 1.0, min, steps, warmup_steps, decay_steps: (steps - warmup_steps) / 2 };
        for step in 1..=steps + 2 {
            let (before, rate) = (schedule.at(step - 1), schedule.at(step));
            if step <= warmup_steps {
                prop_assert!((rate - step as f64 / warmup_steps as f64).abs() < 1e-12);
            } else {
                prop_assert!((min - 1e-12..=1.0).contains(&rate) && (rate <= before + 1e-12 || step == 1), "{step} {rate}");
            }
        }
        let settled = if kind == ScheduleKind::Constant { 1.0 } else { min };
        if warmup_steps < steps && schedule.decay_steps > 0 {
            prop_assert_eq!(schedule.at(steps + 1), settled);
        }
    }
}

#[test]
fn an_automatic_layout_is_written_either_way_and_excludes_others() {
    for run in [
        good("layout = \"auto\"", &[]),
        good("[layout]\nauto = true", &[]),
        good("", &["layout=auto"]),
        good("", &["layout.auto=true"]),
        // A later place wins over an earlier one.
        good("[layout]\ndp = 4\nzero = 1", &["layout=auto"]),
    ] {
        assert!(run.auto_layout);
        assert_eq!(run.layout, Layout::default());
        assert!(run.to_toml().contains("[layout]\nauto = true\n"), "{}", run.to_toml());
        assert_eq!(good(&run.to_toml(), &[]), run);
    }
    assert!(!good("layout = \"auto\"", &["layout.auto=false"]).auto_layout);
    check(
        "[layout]\nauto = true\ndp = 2",
        "layout.dp = 2 in run.toml:3 contradicts layout.auto = true in run.toml:2 | leave out layout.dp, or layout.auto",
    );
    check_set(
        &["layout=auto", "layout.zero=1"],
        "layout.zero = 1 in --set layout.zero=1 contradicts layout.auto = true in --set layout=auto | leave out layout.zero, or layout.auto",
    );
    assert!(
        refused("layout = \"auto\"", &["layout.pp=2"])
            .starts_with("layout.pp = 2 in --set layout.pp=2 contradicts")
    );
}
