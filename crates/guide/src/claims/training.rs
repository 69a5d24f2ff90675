//! Distributed training: the example program and the table of strategies.

use spec::{EntryKind, Result};

use super::{Ask, DGX_H100, GIGA, exact};
use crate::facts::{Case, Facts, Found};
use crate::verdict::{Rule, Stated};

pub(crate) const CLAIMS: &[Ask] = &[
    ("1,000 nodes of 8 GPUs run 8,000-way parallel", ways),
    ("a rank's number is its device's number", rank_is_device),
    ("Megatron's three axes of parallelism trained GPT-4", megatron),
    ("ZeRO 3 makes larger models possible and is slower than plain data parallelism", zero3),
];

/// The guide's launch line.
const NODES: f64 = 1000.0;
/// Its batch a rank.
const BATCH: f64 = 64.0;

fn ways(f: &mut Facts<'_>) -> Result<Found> {
    let ranks = NODES * f.number(EntryKind::Node, DGX_H100, "accelerators")?.value;
    f.arithmetic();
    Ok(Found::new().reads("", exact(ranks), "ranks", Stated::Exactly(8000.0)).shows(
        "in the global batch of its example",
        exact(ranks * BATCH),
        "sequences",
    ))
}

fn rank_is_device(f: &mut Facts<'_>) -> Result<Found> {
    let devices = f.number(EntryKind::Node, DGX_H100, "accelerators")?.value;
    let last = NODES * devices - 1.0;
    f.arithmetic();
    Ok(Found::new()
        .says(
            format!("rank {last} of {NODES} nodes asks for device {last}, a node has {devices}"),
            "rank",
            last < devices,
        )
        .note("true on one node; beyond it the local rank names the device"))
}

fn megatron(_: &mut Facts<'_>) -> Result<Found> {
    Ok(Found::by(Rule::Undisclosed).note("OpenAI has not said how GPT-4 was trained"))
}

fn zero3(f: &mut Facts<'_>) -> Result<Found> {
    let job = |layout| Case {
        model: "llama2-13b",
        cluster: "dgx-superpod-h100",
        accelerators: 64,
        sequence: 4096,
        sequences: 256,
        tokens: None,
        layout,
    };
    let plain = f.planned(job("tp=1,pp=1,dp=64,micro_batch=1,zero=0,recompute=full"))?;
    let sharded = f.planned(job("tp=1,pp=1,dp=64,micro_batch=1,zero=3,recompute=full"))?;
    let (a, b) = (&plain.best[0], &sharded.best[0]);
    let waits = |c: &plan::answer::Choice| 1e3 * c.breakdown.data_s;
    f.arithmetic();
    Ok(Found::new()
        .says(
            format!(
                "13B on 64 H100: {:.0} GB a GPU against {:.0} GB",
                b.memory_bytes / GIGA,
                a.memory_bytes / GIGA
            ),
            "larger models",
            b.memory_bytes < a.memory_bytes,
        )
        .and()
        .says(
            format!("{:.0} ms a step of waiting for other replicas against {:.0} ms", waits(b), waits(a)),
            "slower",
            waits(b) > waits(a),
        )
        .shows(
            "times as many bytes: parameters gathered twice, gradients scattered once",
            exact(3.0 / 2.0),
            "",
        )
        .shows(
            "saved on the optimizer, which plain data parallelism runs whole on every GPU",
            exact(1e3 * (a.breakdown.optimizer_s - b.breakdown.optimizer_s)),
            "ms",
        ))
}
