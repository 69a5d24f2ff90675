//! Programs of many layouts, in figures and a digest each: whoever changes a pass sees here which programs it moves, and
//! means it. That they are right is asked elsewhere: by the verifier, and by training.
#![expect(
    clippy::disallowed_methods,
    reason = "what is pinned is read, and what it should become is written"
)]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use common::model;
use program::{Loss, Mode, Pass, PassTimes, Program, Request, in_flight, orders, play};
use spec::hash::fnv1a;
use spec::{ContextMode, DType, Latent, Layout, ModelSpec, PipelineSchedule, Recompute, Reduce, Zero};

/// Compares with `tests/pinned/NAME.txt`.
#[track_caller]
fn check(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/pinned/{name}.txt"));
    let pinned = std::fs::read_to_string(&path).unwrap_or_default();
    if found == pinned {
        return;
    }
    let moved: Vec<&str> = found.lines().filter(|line| !pinned.lines().any(|known| known == *line)).collect();
    let new = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.txt"));
    std::fs::write(&new, found).expect("a folder for what tests write");
    panic!("{} should become {}; what moved:\n{}", path.display(), new.display(), moved.join("\n"));
}

/// Ops by kind, bytes, what is said to others, and a digest of all of it.
fn figures(p: &Program) -> String {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut flops, mut bytes, mut sent) = (0, 0, 0);
    let mut levels = 0;
    for op in p.blocks.iter().flat_map(|b| &b.ops) {
        *kinds.entry(op.kind.name()).or_default() += 1;
        flops += op.cost.flops;
        bytes += op.cost.bytes;
        levels += op.grads.len();
        sent += op.comm.as_ref().map_or(0, |c| c.sent_bytes(0, 2));
    }
    let kinds: Vec<String> = kinds.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    let m = &p.memory;
    format!(
        "{} x {} x {} tokens at {:?}; {} blocks, {} buffers, {} groups, {} buckets; {flops} FLOP, {bytes} B, {sent} B said, {levels} sums; \
         memory {} {} {} {} {} {} {} {} = {}; {}; {:016x}",
        p.micro_batches(),
        p.micro_batch(),
        p.local_sequence(),
        p.positions(),
        p.blocks.len(),
        p.buffers.len(),
        p.groups.len(),
        p.buckets.len(),
        m.params,
        m.master,
        m.grads,
        m.moments,
        m.other,
        m.slots,
        m.scratch,
        m.scratch_bound,
        m.total,
        kinds.join(", "),
        fnv1a(serde_json::to_string(p).expect("JSON").bytes())
    )
}

fn models() -> Vec<(&'static str, ModelSpec)> {
    let latent = Latent { query_rank: Some(24), kv_rank: 16, nope_dim: 8, rope_dim: 8, value_dim: 16 };
    let moe = ModelSpec { layers: 4, ffn: 64, ..ModelSpec::preset("moe-tiny").expect("a preset") };
    vec![
        ("llama", model(4, false, false)),
        ("tied", model(4, true, false)),
        ("gpt2", model(4, true, true)),
        ("latent", ModelSpec { latent: Some(latent), kv_heads: 4, ..model(4, false, false) }),
        ("moe", moe),
    ]
}

fn layouts() -> Vec<Layout> {
    let one = Layout::default();
    let zero = |zero, dp| Layout { zero, dp, ..Layout::default() };
    let pipeline = |schedule, pp, chunks| Layout { schedule, pp, chunks, dp: 2, ..Layout::default() };
    vec![
        Layout { micro_batch: 4, ..one.clone() },
        Layout { micro_batch: 8, recompute: Recompute::Selective, ..one.clone() },
        Layout { recompute: Recompute::Full, dp: 2, ..one.clone() },
        Layout { reduce: Reduce::Ring, dp: 4, ..one.clone() },
        zero(Zero::Optimizer, 2),
        zero(Zero::Gradients, 4),
        zero(Zero::Parameters, 4),
        Layout { shard: Some(2), ..zero(Zero::Parameters, 4) },
        Layout { shard: Some(2), pp: 2, ..zero(Zero::Optimizer, 4) },
        Layout { tp: 2, ..one.clone() },
        Layout { tp: 2, sequence_parallel: true, dp: 2, ..zero(Zero::Gradients, 2) },
        Layout { tp: 2, pp: 2, recompute: Recompute::Selective, ..one.clone() },
        Layout { cp: 2, ..one.clone() },
        Layout { cp: 2, tp: 2, ..zero(Zero::Parameters, 2) },
        pipeline(PipelineSchedule::Gpipe, 2, 1),
        pipeline(PipelineSchedule::OneFOneB, 4, 1),
        pipeline(PipelineSchedule::Interleaved, 2, 2),
        pipeline(PipelineSchedule::ZeroBubble, 4, 1),
        Layout { stage_layers: vec![1, 3], ..pipeline(PipelineSchedule::OneFOneB, 2, 1) },
        Layout { ep: 2, dp: 2, ..one.clone() },
        Layout { ep: 4, dp: 4, pp: 2, ..zero(Zero::Optimizer, 4) },
        Layout { ep: 2, tp: 2, dp: 2, ..one.clone() },
        Layout { ep: 2, cp: 2, ..one.clone() },
        Layout { ep: 2, dp: 4, ..zero(Zero::Gradients, 4) },
        Layout { ep: 2, dp: 2, micro_batch: 4, ..zero(Zero::Gradients, 2) },
        Layout { cp: 2, context: ContextMode::Heads, micro_batch: 2, ..one.clone() },
        Layout { cp: 4, context: ContextMode::Heads, recompute: Recompute::Full, ..zero(Zero::Optimizer, 2) },
        Layout {
            cp: 2,
            tp: 2,
            context: ContextMode::Heads,
            sequence_parallel: true,
            ..zero(Zero::Parameters, 2)
        },
    ]
}

#[test]
fn programs_change_only_on_purpose() {
    let mut all = String::new();
    for (name, model) in models() {
        let legal = layouts().into_iter().enumerate().filter(|(_, l)| l.validate(&model, 8, 16).is_ok());
        for (i, layout) in legal {
            let layout = &layout;
            let precision = if i % 2 == 0 { DType::F32 } else { DType::Bf16 };
            let ranks = std::collections::BTreeSet::from([0, layout.world() / 2, layout.world() - 1]);
            for rank in ranks {
                let request = Request {
                    model: &model,
                    layout,
                    sequence: 16,
                    sequences: 8,
                    precision,
                    rank,
                    mode: Mode::Train,
                    loss: if rank == 0 { Loss::OneSequence } else { Loss::MicroBatch },
                    recipe: Default::default(),
                };
                let program = Program::build(&request, &|_, _| 640).expect("a legal layout");
                let l = layout;
                writeln!(
                    all,
                    "{name} {precision} dp={} tp={} pp={}x{} cp={}{} ep={} {:?} {:?} {:?} rank {rank}: {}",
                    l.dp,
                    l.tp,
                    l.pp,
                    l.chunks,
                    l.cp,
                    if l.deals_heads() { " by heads" } else { "" },
                    l.ep,
                    l.zero,
                    l.schedule,
                    l.recompute,
                    figures(&program)
                )
                .unwrap();
            }
        }
        let (layout, mode) = (Layout::default(), Mode::Generate { positions: 12 });
        let precision = DType::F32;
        let request = Request {
            model: &model,
            layout: &layout,
            sequence: 16,
            sequences: 1,
            precision,
            rank: 0,
            mode,
            loss: Loss::default(),
            recipe: Default::default(),
        };
        let program = Program::build(&request, &|_, _| 640).expect("a program that generates");
        writeln!(all, "{name} generates: {}", figures(&program)).unwrap();
    }
    check("programs", &all);
}

/// Orders of every schedule as text, `f0.1` for chunk 0's forward of micro-batch 1, and how long they take.
#[test]
fn schedules_change_only_on_purpose() {
    let mut all = String::new();
    for (schedule, chunks) in [
        (PipelineSchedule::Gpipe, 1),
        (PipelineSchedule::OneFOneB, 1),
        (PipelineSchedule::Interleaved, 2),
        (PipelineSchedule::Interleaved, 3),
        (PipelineSchedule::ZeroBubble, 1),
    ] {
        for (stages, micro_batches) in [(1, 3), (2, 4), (3, 6), (4, 2), (4, 8)] {
            if schedule == PipelineSchedule::Interleaved && micro_batches % stages != 0 {
                continue;
            }
            let orders = orders(schedule, stages, chunks, micro_batches);
            let times = PassTimes { forward: 1.0, input: 1.25, weight: 0.75 };
            let played = play(&orders, chunks, times).expect("a schedule that ends");
            writeln!(
                all,
                "{schedule:?} x{chunks}, {stages} stages, {micro_batches} micro-batches: {played:?}"
            )
            .unwrap();
            for order in &orders {
                let work = |w: &program::Work| {
                    let pass = match w.pass {
                        Pass::Forward => "f",
                        Pass::Backward => "b",
                        Pass::Weight => "w",
                    };
                    format!("{pass}{}.{}", w.chunk, w.micro_batch)
                };
                let order_text: Vec<String> = order.iter().map(work).collect();
                writeln!(all, "  {} in flight {:?}", order_text.join(" "), in_flight(order, chunks)).unwrap();
            }
        }
    }
    check("schedules", &all);
}
