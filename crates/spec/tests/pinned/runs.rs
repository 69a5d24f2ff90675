//! Run files and overrides together: what was written where, in which words, and what comes of it.

use std::fmt::Write as _;

use spec::{Error, ModelSpec, Result, RunSpec};

use crate::check::check;
use crate::{models, said};

fn load(file: &str, set: &[&str]) -> Result<RunSpec> {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    RunSpec::load(Some(("run.toml", file)), &set, &|path| match path.to_str() {
        Some("gpt2.json") => {
            Ok(r#"{"model_type":"gpt2","vocab_size":9999,"n_embd":32,"n_layer":2,"n_head":4}"#.to_owned())
        }
        Some("bad.json") => Ok("{}".to_owned()),
        _ => Err(Error::user(format!("no such file: {}", path.display()))),
    })
}

/// Lines of the resolved run that differ from those of another, or the refusal.
fn moved(run: Result<RunSpec>, from: &RunSpec) -> String {
    match run {
        Err(e) => said(&e),
        Ok(run) => {
            let was = from.to_toml();
            let text = run.to_toml();
            let mut new: Vec<&str> = text.lines().filter(|line| !was.lines().any(|w| w == *line)).collect();
            let gone = was
                .lines()
                .filter_map(|l| Some(l.split_once(" = ")?.0))
                .filter(|k| !text.lines().any(|l| l.starts_with(&format!("{k} = "))));
            let gone: Vec<String> = gone.map(|k| format!("no {k}")).collect();
            new.extend(gone.iter().map(String::as_str));
            let other = if run.fingerprint() == from.fingerprint() { "" } else { ", another run" };
            format!("{}{other}", new.join("; "))
        }
    }
}

/// A key of each kind.
const OF_EACH_KIND: &str = "\
    train.steps run.threads model.window.tokens optim.lr optim.grad_clip optim.beta1 model.norm_eps \
    checkpoint.background data.eod sample.prompt checkpoint.dir run.dir data.text schedule.kind \
    layout.stage_layers data.blend data.split model.name train.seed trouble.on_nan";

/// Every way of writing something, one a line.
const VALUES: &str = r#"none
"none"
nan
-nan
inf
-inf
0
-0.0
1
1.0
2.5
1e3
"2k"
2k
"2.5"
0x10
0b11
1_000
99999999999999999999999999999999999999999
9007199254740993
9.1e15
9e15
false
true
2026-01-02
""
''
"a"
a b
[]
[""]
["a", "b"]
[1]
[1, 2.0, "3"]
[-1]
["a", 2]
{}
{ a = 1 }
[1
"a
= 3
cosin
wsd
stop
s3://a/b
98,1,1
0,1
1,2,3,4
1,-1
2e9
[{ prefix = "a", weight = 2 }]
[{ prefix = "a", weight = "2" }, { prefix = "b", weight = 0.5 }]
[{ prefix = "a" }]
[{ prefix = "", weight = 2 }]
[{ prefix = "a", weight = 0 }]
[{ prefix = "a", weigt = 1 }]
[{ prefix = 1, weight = 1 }]"#;

/// A key of each kind with every way of writing something.
#[test]
fn values_are_read_or_refused_as_they_were() {
    let from = load("", &[]).expect("the defaults");
    let mut all = String::new();
    for key in OF_EACH_KIND.split_whitespace() {
        writeln!(all, "{key}").unwrap();
        for value in VALUES.lines() {
            let run = moved(load("", &[&format!("{key}={value}")]), &from);
            let run =
                run.replace(&format!(" in --set {key}={value}"), " ~").replace(&format!("{key} ="), "_ =");
            writeln!(all, "  {value}: {run}").unwrap();
        }
    }
    check("values", &all);
}

/// The same key or one that excludes it in the file, in an override, in two.
#[test]
fn later_places_win_as_they_did() {
    let groups: [[(&str, &str); 2]; 6] = [
        [("batch.sequences", "4"), ("batch.tokens", "4096")],
        [("schedule.min_lr", "1e-5"), ("schedule.min_lr_ratio", "0.3")],
        [("data.text", "\"a\""), ("data.prefix", "\"b\"")],
        [("model.preset", "\"tinyllama-1.1b\""), ("model.config", "\"gpt2.json\"")],
        [("layout.auto", "true"), ("layout.zero", "1")],
        [("model.preset", "\"llama3-8b\""), ("model.layers", "5")],
    ];
    let from = load("", &[]).expect("the defaults");
    let mut all = String::new();
    for [(a, x), (b, y)] in groups {
        let (a_set, b_set) = (format!("{a}={x}"), format!("{b}={y}"));
        let (a_none, b_none) = (format!("{a}=none"), format!("{b}=none"));
        let small = "batch.sequence=64";
        let files = [
            String::new(),
            format!("{a} = {x}\n"),
            format!("{b} = {y}\n"),
            format!("{a} = {x}\n{b} = {y}\n"),
            format!("{a} = \"none\"\n{b} = {y}\n"),
        ];
        for file in files {
            let sets: [&[&str]; 7] =
                [&[], &[&a_set], &[&b_set], &[&a_set, &b_set], &[&a_none], &[&b_none], &[&b_none, &a_set]];
            for set in sets {
                let set: Vec<&str> = set.iter().copied().chain([small]).collect();
                let run = moved(load(&file, &set), &from);
                writeln!(all, "{:?} {:?}: {run}", file.trim(), &set[..set.len() - 1]).unwrap();
            }
        }
    }
    check("places", &all);
}

const FILES: &[&str] = &[
    "\u{feff}[train]\nsteps = 3\n",
    "[train]\nsteps = \n",
    "\n\n[train\n",
    "[train]\nstep = 3\n",
    "[trian]\nsteps = 3\n",
    "[zzzzzzz]\nsteps = 3\n",
    "steps = 3\n",
    "train = 3\n",
    "layout = 3\n",
    "layout = \"auto\"\n",
    "train = \"auto\"\n",
    "train = { steps = 3, stpes = 4 }\n",
    "train.steps.more = 3\n",
    "model.rope_scaling = 3\n",
    "model.experts = 8\n",
    "[model.rope_scalng]\ntype = \"linear\"\n",
    "[model.rope_scaling]\ntyp = \"linear\"\n",
    "[model]\nexperts = { count = 4, top_k = 1, ffn = 8 }\n",
    "[model.zzzzzzzz]\na = 1\n",
    "a = [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]\n",
    "[model]\nconfig = \"none.json\"\n",
    "[model]\nconfig = \"bad.json\"\n",
    "[model]\npreset = \"lama3-8b\"\n",
    "[model]\npreset = \"none\"\n",
    "[model]\npreset = \"none\"\nname = \"m\"\nvocab = 4096\nlayers = 2\nhidden = 64\nffn = 64\nheads = 4\n",
    "[model]\npreset = \"none\"\nname = \"m\"\nvocab = 4096\nlayers = 2\nhidden = 64\nffn = 64\nheads = 4\nmax_positions = 300\n",
    "[model]\npreset = \"none\"\nvocab = 4096\nlayers = 2\nhidden = 64\nffn = 64\nheads = 5\nmax_positions = 300\n",
    "[[data.blend]]\nprefix = \"a\"\nweight = 0.5\n[[data.blend]]\nprefix = \"b\"\nweight = 3\n",
    "[[data.blend]]\nprefix = \"a\"\nweight = 0.5\n[[data.blend]]\nweight = 3\n",
];

const SETS: &[&[&str]] = &[
    &["train.steps"],
    &["=3"],
    &["train.steps = 7"],
    &["train=7"],
    &["layout=7"],
    &["layout=auto", "train.steps=7"],
    &["model={ layers = 3, heads = 12 }"],
    &["model={ layres = 3 }"],
    &["moddel={ layers = 3 }"],
    &["data.txt=a"],
    &["zzz.zzzzzzzzzz=a"],
    &["batch.tokens=4096", "batch.sequence=100"],
    &["batch.tokens=100"],
    &["batch.tokens=256"],
    &["batch.sequence=2048", "batch.sequences=2097152"],
    &["batch.sequence=2048", "batch.sequences=2097153"],
    &["batch.sequence=2049"],
    &["batch.sequence=2048"],
    &["model.vocab=300"],
    &["model.vocab=300", "data.vocab_size=300"],
    &["model.vocab=300", "data.vocab_size=301"],
    &["model.vocab=256"],
    &["model.vocab=256", "data.prefix=a"],
    &["model.vocab=256", "data.tokenizer=t.json"],
    &["model.vocab=300", "data.vocab_size=301", "data.blend=[{ prefix = \"a\", weight = 1 }]"],
    &["train.steps=9"],
    &["train.steps=10"],
    &["train.steps=19", "schedule.warmup_steps=19"],
    &["train.steps=19", "schedule.warmup_steps=18"],
    &["train.steps=1010"],
    &["train.steps=999"],
    &["schedule.kind=wsd"],
    &["schedule.kind=wsd", "train.steps=4"],
    &["schedule.kind=wsd", "train.steps=10", "schedule.warmup_steps=9"],
    &["schedule.kind=wsd", "train.steps=10", "schedule.warmup_steps=4", "schedule.decay_steps=6"],
    &["schedule.kind=wsd", "train.steps=10", "schedule.warmup_steps=4", "schedule.decay_steps=7"],
    &["schedule.kind=linear", "schedule.decay_steps=7"],
    &["schedule.kind=constant", "schedule.min_lr=1e-3"],
    &["schedule.min_lr=1.1e-3"],
    &["schedule.min_lr=none", "schedule.min_lr_ratio=none"],
    &["trouble.on_nan=rollback"],
    &["trouble.on_spike=rollback", "checkpoint.every=0"],
    &["trouble.on_nan=rollback", "trouble.back_steps=200"],
    &["trouble.on_nan=rollback", "trouble.back_steps=201"],
    &["trouble.on_nan=rollback", "trouble.back_steps=201", "checkpoint.keep_every=400"],
    &["trouble.on_nan=rollback", "trouble.back_steps=401", "checkpoint.keep=3"],
    &["trouble.on_nan=rollback", "trouble.back_steps=1", "checkpoint.keep=1"],
    &["trouble.on_nan=skip", "trouble.on_spike=skip", "trouble.back_steps=201"],
    &["trouble.back_steps=401", "trouble.on_spike=rollback", "checkpoint.keep=0"],
    &["layout.auto=true", "layout.dp=2"],
    &["layout.tp=2", "layout.sequence_parallel=true", "layout.zero=3", "layout.dp=2", "layout.shard=2"],
    &["optim.kind=muon"],
    &["optim.momentum=0.9"],
    &[
        "optim.kind=muon",
        "optim.momentum=0.9",
        "train.z_loss=1e-4",
        "data.attend=documents",
        "data.skip_bad=true",
    ],
    &["data.field=body", "data.eod=</s>", "data.cache_dir=c", "checkpoint.dir=az://a/b", "data.split=1"],
    &["model.name=other", "train.log_every=3", "run.timeout_s=9", "sample.top_k=0"],
    &["run.dir=s3://a"],
    &["run.dir=none"],
    &["run.device=cuda", "train.precision=bf16", "layout.expert_rows=even", "layout.reduce=ring"],
];

#[test]
fn runs_are_read_as_they_were() {
    let from = load("", &[]).expect("the defaults");
    let mut all = String::new();
    for file in FILES {
        writeln!(all, "{file:?}: {}", moved(load(file, &["batch.sequence=64"]), &from)).unwrap();
    }
    for set in SETS {
        writeln!(all, "{}: {}", set.join(" "), moved(load("", set), &from)).unwrap();
    }
    for set in SETS {
        let Ok(run) = load("", set) else { continue };
        let differences = from.differences(&run);
        if !differences.is_empty() {
            writeln!(all, "{}: {}", set.join(" "), said(&run.not_the_run(&differences))).unwrap();
        }
        let rates: Vec<String> = [1, 2, 9].map(|step| format!("{:.6e}", run.lr_at(step))).to_vec();
        let again = RunSpec::load(Some(("again.toml", &run.to_toml())), &[], &RunSpec::no_files);
        let same = again.map_or_else(|e| said(&e), |again| (again == run).to_string());
        writeln!(all, "  {} tokens, rates {}, again {same}", run.batch.tokens(), rates.join(" ")).unwrap();
    }
    check("runs", &all);
}

/// Keys of a model that are set together, a line each.
const CHANGES: &str = "\
heads=12
heads=16 hidden=256
hidden=256
hidden=250
kv_heads=1
head_dim=64
head_dim=7
position=learned
position=rope
position=learned rope_theta=3
rope_theta=3
max_positions=99
rope_scaling.factor=8
rope_scaling.type=linear
rope_scaling.type=linear rope_scaling.factor=8
rope_scaling.type=linear rope_scaling.beta_fast=8
rope_scaling.type=dynamic rope_scaling.factor=8
rope_scaling.type=llama3 rope_scaling.factor=8
rope_scaling.type=llama3 rope_scaling.factor=8 rope_scaling.low_freq_factor=1
rope_scaling.type=llama3 rope_scaling.factor=8 rope_scaling.low_freq_factor=1 rope_scaling.high_freq_factor=4
rope_scaling.type=yarn
rope_scaling.type=yarn rope_scaling.factor=2
rope_scaling.type=yarn rope_scaling.factor=2 rope_scaling.original_max_positions=33 rope_scaling.attention_factor=1.5
rope_scaling.original_max_positions=44 rope_scaling.attention_factor=none
rope_scaling.truncate=1
rope_scaling.truncate=0 rope_scaling.beta_slow=2
rope_scaling.type=default
experts.count=0
experts.count=4
experts.count=4 experts.top_k=1 experts.ffn=8
experts.top_k=1
experts.top_k=none experts.score=sigmoid
experts.shared_ffn=8 experts.dense_layers=1 experts.every=1
experts.router_bias=true experts.renormalise=false experts.z_loss=0.5 experts.scale=3
latent.kv_rank=0
latent.kv_rank=8
latent.kv_rank=8 latent.nope_dim=8 latent.rope_dim=4 latent.value_dim=8
latent.query_rank=8
latent.query_rank=0 latent.value_dim=6
window.tokens=0
window.tokens=16
window.tokens=16 window.full_layers=1 window.full_every=2
window.full_every=2
window.full_layers=0
norm=layer
norm=rms norm_eps=1e-3
activation=gelu
activation=gelu_tanh init_std=0.5
activation=swiglu_clamped sinks=true logit_softcap=20
activation=swiglu sinks=false
qkv_bias=true attn_out_bias=true
qkv_bias=false mlp_bias=false
mlp_bias=true qk_norm=true tied_embeddings=true
qk_norm=false tied_embeddings=false
name=none
name=other vocab=5001 layers=3 ffn=24";

/// Keys of a model on top of models that have, or lack, what they change.
#[test]
fn models_are_changed_as_they_were() {
    let tiny = ModelSpec::preset("tiny").expect("a preset");
    let yarn = ModelSpec::from_toml(
        "yarn",
        &tiny.to_toml().replace("rope_scaling.type = \"default\"", "rope_scaling = { type = \"yarn\", factor = 4, attention_factor = 1.25, truncate = 0, original_max_positions = 20 }"),
    )
    .expect("a model");
    let window = spec::Window { tokens: 5, full_layers: 0, full_every: 2 };
    let sees = ModelSpec { window: Some(window), sinks: true, layers: 4, ..tiny.clone() };
    let more = [
        ("yarn", yarn),
        ("sees", sees),
        ("gpt2", ModelSpec::preset("tiny-gpt2").expect("a preset")),
        ("qwen3", ModelSpec::preset("qwen3-0.6b").expect("a preset")),
        ("llama3", ModelSpec::preset("llama3.2-1b").expect("a preset")),
    ];
    let mut all = String::new();
    for (name, model) in models().into_iter().chain(more) {
        let file = format!("data.prefix = \"a\"\nbatch.sequence = 4\n[model]\n{}", model.to_toml());
        let from = load(&file, &[]).expect("the model as it is");
        for change in CHANGES.lines() {
            let set: Vec<String> = change.split(' ').map(|c| format!("model.{c}")).collect();
            let set: Vec<&str> = set.iter().map(String::as_str).collect();
            writeln!(all, "{name} {change}: {}", moved(load(&file, &set), &from)).unwrap();
        }
    }
    check("model_changes", &all);
}
