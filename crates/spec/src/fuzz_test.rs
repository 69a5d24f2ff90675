//! Run files, overrides and catalogues, damaged: refused with a hint, or sound.

#[allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it measures, and keeps what fails"
)]
#[path = "../../../tests/fuzz.rs"]
mod harness;

use harness::fuzz_within;

use crate::catalog::EntryKind;
use crate::run::nonsense_tests::{problem_of_refusal, problem_of_run};
use crate::run::tests::load;
use crate::{Catalog, Error, Result};

#[global_allocator]
static ALLOCATOR: harness::Counting = harness::Counting;

fn fuzz(name: &str, good: &[&str], words: &[&str], mut parse: impl FnMut(&str) -> bool) {
    let good: Vec<Vec<u8>> = good.iter().map(|text| text.as_bytes().to_vec()).collect();
    let parse = |input: &[u8]| std::str::from_utf8(input).is_ok_and(&mut parse);
    fuzz_within(TOML_BYTES, name, &good, words, |input| input, parse);
}

/// A tree of as many values as a file may have, twice while it is converted.
const TOML_BYTES: (usize, usize) = (16, 64 << 20);

#[track_caller]
fn is_sound<T>(read: Result<T>, problem: impl FnOnce(T) -> Option<String>) -> bool {
    let (accepted, problem) = match read {
        Ok(value) => (true, problem(value)),
        Err(e) => (false, problem_of_refusal(&e, &[])),
    };
    if let Some(problem) = problem {
        panic!("{problem}");
    }
    accepted
}

const RUNS: [&str; 4] = [
    "batch.sequence = 16\n[model]\npreset = \"tiny\"\n[data]\nprefix = \"a\"\ntokenizer = \"t.json\"\nsplit = \"98,1,1\"\n",
    r#"train = { steps = "1k", precision = "bf16" }
layout = "auto"
[[data.blend]]
prefix = "a"
weight = 0.5
[[data.blend]]
prefix = "b"
weight = 3
[schedule]
kind = "wsd"
decay_steps = 100
min_lr = 1e-5
"#,
    r#"[model]
config = "gpt2/config.json"
max_positions = 64
[batch]
sequence = 32
tokens = 4096
[layout]
dp = 2
pp = 2
chunks = 1
zero = 1
recompute = "full"
schedule = "gpipe"
"#,
    r#"[model]
layers = 4
rope_scaling = { type = "yarn", factor = 4.0, original_max_positions = 512 }
[optim]
grad_clip = "none"
[checkpoint]
every = 50
keep = 2
"#,
];

const RUN_WORDS: [&str; 14] = [
    "[model]\n",
    "\nlayout.tp = 2\n",
    "\nmodel.layers = 8\n",
    "\nmodel.experts = 8\n",
    "\nbatch.sequences = 16\n",
    "\nbatch.tokens = ",
    "\"none\"",
    "\"auto\"",
    "a.",
    "\"\"\"",
    "0x",
    "1979-05-27T07:32:00Z",
    "inf",
    "nan",
];

#[test]
fn fuzz_run_file() {
    let written = load("", &[]).unwrap().to_toml();
    let good: Vec<&str> = RUNS.into_iter().chain([written.as_str()]).collect();
    fuzz("run-file", &good, &RUN_WORDS, |text| is_sound(load(text, &[]), |run| problem_of_run(&run)));
}

#[test]
fn fuzz_overrides() {
    let good = [
        "train.steps=200",
        "run.dir=runs/a",
        "data.blend=[{ prefix = \"a\", weight = 1 }]",
        "model.preset=gpt2",
        "layout=auto\u{1}layout.auto=false\u{1}layout.dp=2\u{1}layout.zero=2",
        "model={ layers = 2 }\u{1}optim.lr=1e-3\u{1}data.text=[\"a\", 'b']",
    ];
    fuzz("overrides", &good, &RUN_WORDS, |text| {
        let set: Vec<&str> = text.split('\u{1}').collect();
        is_sound(load("[train]\nsteps = 20\n", &set), |run| problem_of_run(&run))
    });
}

/// One entry of each kind, and what the resolving of platforms falls back to.
const CATALOG: &str = r#"
[source.book]
what = "a book"
date = "2026-01"
grade = "vendor"
[family.hopper]
software = "megatron-core-2024"
matrix_units = "tiles"
tail_filled = { value = 0.5, unit = "ratio", source = "book", date = "2026" }
attention = { value = 50, low = 40, high = 60, unit = "percent", source = "book", date = "2026" }
attention_generic = { value = 0.4, unit = "ratio", source = "book", date = "2026" }
attention_half = { value = 1024, unit = "tokens", source = "book", date = "2026" }
ring = { value = 0.9, unit = "ratio", source = "book", date = "2026" }
collective_base = { value = 5, unit = "us", source = "book", date = "2026" }
collective_step = { value = 2, unit = "us", source = "book", date = "2026" }
collective_step_out = { value = 3, unit = "us", source = "book", date = "2026" }
[accelerator.chip]
vendor = "me"
family = "hopper"
link = "torus"
torus_dims = { value = 3, unit = "dims", source = "book", date = "2026" }
peak.bf16 = { value = 2000, unit = "TFLOP/s", sparsity = "sparse", source = "book", date = "2026-01-31" }
memory = { value = 80, unit = "GiB", source = "my lab book", date = "2026" }
memory_bandwidth = { value = 3, unit = "TB/s", source = "book", date = "2026" }
scale_up = { value = 900, unit = "GB/s", direction = "both-ways", source = "book", date = "2026" }
peer = { value = 450, unit = "GB/s", direction = "one-way", source = "book", date = "2026" }
domain = { value = 64, unit = "accelerators", source = "book", date = "2026" }
[accelerator.chip2]
base = "chip"
link = "switch"
aliases = ["second chip", "c2"]
[fabric.net]
topology = "rail-fat-tree"
in_switch = "sharp"
port = { value = 400, unit = "Gb/s", direction = "one-way", source = "book", date = "2026" }
hop_latency = { value = 300, unit = "ns", source = "book", date = "2026" }
efficiency = { value = 0.9, unit = "ratio", source = "book", date = "2026" }
tier1 = { value = 256, unit = "accelerators", source = "book", date = "2026" }
oversubscription1 = { value = 2, unit = "ratio", source = "book", date = "2026" }
[storage.cloud-object]
read = { value = 1, unit = "TB/s", source = "book", date = "2026" }
write_per_node = { value = 2, unit = "GB/s", source = "book", date = "2026" }
[node.node]
accelerator = "chip2"
fabric = "net"
accelerators = { value = 8, unit = "accelerators", source = "book", date = "2026" }
scale_out = { value = 3.2, unit = "Tb/s", direction = "one-way", source = "book", date = "2026" }
[price.rent]
accelerator = "chip"
on_demand = { value = 3, unit = "USD/h", source = "book", date = "2026" }
[failure.rare]
rate = { value = 6, unit = "1/kilonode-day", source = "book", date = "2026" }
cause.memory = { value = 1, unit = "1/kilonode-day", source = "book", date = "2026" }
[platform.pod]
title = "A pod"
node = "node"
storage = "cloud-object"
price = "rent"
failure = "rare"
unit_nodes = { value = 32, unit = "nodes", source = "book", date = "2026" }
units_max = { value = 64, unit = "units", source = "book", date = "2026" }
spare_nodes = { value = 1, unit = "nodes", source = "book", date = "2026" }
spare_units_max = { value = 7, unit = "units", source = "book", date = "2026" }
[platform.torus]
node = "node"
accelerators = { value = 64, unit = "accelerators", source = "book", date = "2026" }
job_max = { value = 60, unit = "accelerators", source = "book", date = "2026" }
shape = "4x4x4"
multislice = true
"#;

/// What a catalogue that was accepted must be able to answer; a refusal has a hint here too.
fn problem_of_catalog(catalog: &Catalog) -> Option<String> {
    let refusal = |e: &Error| problem_of_refusal(e, &[]);
    for name in catalog.names() {
        if let Some(problem) = catalog.show(&name).err().as_ref().and_then(refusal) {
            return Some(format!("show {name:?}: {problem}"));
        }
    }
    for platform in catalog.list(Some(EntryKind::Platform)) {
        for n in [None, Some(1), Some(48)] {
            match catalog.cluster(&platform.name, n) {
                Ok(cluster) if cluster.accelerators == 0 || cluster.scale_up.domain == 0 => {
                    return Some(format!("{cluster:?}"));
                }
                Ok(_) => {}
                Err(e) => {
                    if let Some(problem) = refusal(&e) {
                        return Some(format!("cluster {:?}: {problem}", platform.name));
                    }
                }
            }
        }
    }
    None
}

#[test]
fn fuzz_catalog() {
    let words = [
        "\nbase = \"pod\"\n",
        "\nbase = \"chip\"\n",
        "[platform.x]\n",
        "[accelerator.\"\"]\n",
        "aliases = [\"\"]\n",
        "\nshape = \"65535x65535x65535x65535x65535\"\n",
        "link = \"torus\"",
        "value = 16777216",
        "value = 1e-300",
        "low = 1, high = 2",
        "a.",
    ];
    // The built-in catalogue takes longer to read than all else together: a run of many inputs gets a small one.
    fuzz("catalog", &[CATALOG], &words, |text| {
        is_sound(Catalog::over(&[], &[("mine.toml", text)]), |c| problem_of_catalog(&c))
    });
}
