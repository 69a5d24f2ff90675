//! Programs of many layouts, in figures and a digest each: whoever changes a pass sees here which programs it moves, and
//! means it. That they are right is asked elsewhere: by the verifier, and by training.
#[path = "../../../tests/pinned.rs"]
mod check;
mod common;
#[path = "pinned/own_layers.rs"]
mod own_layers;
#[path = "pinned/spoiled.rs"]
mod spoiled;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use check::check;
use common::model;
use program::{
    Axis, Coords, Heads, Loss, Matrix, Members, Mode, Pass, PassTimes, Program, Recipe, Replication, Request,
    Sees, Shares, in_flight, newton_schulz_flops, orders, owned_range, play, spans,
};
use spec::hash::fnv1a;
use spec::{
    ContextMode, DType, Latent, Layout, ModelSpec, Optimizer, PipelineSchedule, Recompute, Reduce, Window,
    Zero,
};

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
            loss: Loss::OneSequence,
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

/// Models with what the ones above have not: windows, sinks, biases of experts, caps, shared experts in some layers.
fn rarer_models() -> Vec<(&'static str, ModelSpec)> {
    let window = Window { tokens: 5, full_layers: 1, full_every: 2 };
    let moe = models().remove(4).1;
    let experts = moe.experts.expect("experts");
    let router = spec::Router { bias: true, ..spec::Router::PLAIN };
    let biased = spec::Experts { router, every: 2, ..experts };
    let grouped = spec::Router {
        score: spec::Score::Sigmoid,
        scale: 2.5,
        groups: 2,
        top_groups: 1,
        renormalise: true,
        ..spec::Router::PLAIN
    };
    let shared = spec::Experts { shared_ffn: 32, dense_layers: 1, router: grouped, ..experts };
    let latent = Latent { query_rank: None, kv_rank: 16, nope_dim: 8, rope_dim: 8, value_dim: 16 };
    vec![
        ("windows", ModelSpec { window: Some(window), logit_softcap: 20.0, ..model(4, true, false) }),
        (
            "sinks",
            ModelSpec {
                sinks: true,
                qkv_bias: true,
                attn_out_bias: true,
                mlp_bias: true,
                activation: spec::Activation::SwiGluClamped,
                experts: Some(biased),
                ..moe.clone()
            },
        ),
        (
            "shared",
            ModelSpec { experts: Some(shared), latent: Some(latent), kv_heads: moe.heads, ..moe.clone() },
        ),
        // Gradients that fill several buckets; more values than are placed by looking at all of them.
        ("wide", ModelSpec { vocab: 20_000, hidden: 256, head_dim: 64, ffn: 1024, ..model(5, true, false) }),
        ("deep", model(24, false, false)),
    ]
}

/// A layout drawn by `pick`, whose first choices are the most likely.
fn drawn_layout(pick: &mut dyn FnMut(&[usize]) -> usize) -> Layout {
    let pp = pick(&[1, 1, 2, 3, 4]);
    let chunks = if pp > 1 { pick(&[1, 1, 2]) } else { 1 };
    let tp = pick(&[1, 1, 2]);
    let plain = [PipelineSchedule::Gpipe, PipelineSchedule::OneFOneB, PipelineSchedule::ZeroBubble];
    Layout {
        dp: pick(&[1, 2, 2, 4]),
        tp,
        pp,
        chunks,
        cp: pick(&[1, 1, 1, 2]),
        ep: pick(&[1, 1, 2, 4]),
        sequence_parallel: tp > 1 && pick(&[0, 1]) == 1,
        zero: [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters][pick(&[0, 1, 2, 3])],
        shard: [None, None, Some(2)][pick(&[0, 1, 2])],
        schedule: if chunks > 1 { PipelineSchedule::Interleaved } else { plain[pick(&[0, 1, 2])] },
        micro_batch: pick(&[1, 2, 3]),
        recompute: [Recompute::None, Recompute::Selective, Recompute::Full][pick(&[0, 0, 1, 2])],
        reduce: [Reduce::Tree, Reduce::Ring][pick(&[0, 0, 1])],
        expert_rows: [spec::ExpertRows::All, spec::ExpertRows::Even][pick(&[0, 1])],
        ..Layout::default()
    }
}

/// Layouts, recipes and ranks drawn by a counter; those that are refused say why.
fn drawn() -> Vec<(String, spec::Result<Program>)> {
    let models: Vec<(&str, ModelSpec)> = models().into_iter().chain(rarer_models()).collect();
    let mut all = Vec::new();
    for i in 0..420u64 {
        let mut state = spec::random::mix(i);
        let mut pick = |of: &[usize]| {
            state = spec::random::mix(state);
            of[(state >> 20) as usize % of.len()]
        };
        let (name, model) = &models[pick(&(0..models.len()).collect::<Vec<_>>())];
        let layout = drawn_layout(&mut pick);
        if model.experts.is_none() && layout.ep > 1 {
            continue;
        }
        let recipe = Recipe {
            optimizer: [Optimizer::AdamW, Optimizer::Muon][pick(&[0, 1])],
            z_loss: [0.0, 1e-4][pick(&[0, 0, 1])],
            documents: pick(&[0, 0, 1]) == 1,
            ..Recipe::default()
        };
        let request = Request {
            model,
            layout: &layout,
            sequence: 16,
            sequences: [8, 12, 24][pick(&[0, 1, 2])],
            precision: [DType::F32, DType::Bf16][pick(&[0, 1])],
            rank: pick(&(0..layout.world()).collect::<Vec<_>>()),
            mode: Mode::Train,
            loss: [Loss::OneSequence, Loss::MicroBatch][pick(&[0, 1])],
            recipe,
        };
        let what = format!(
            "{name} {} of {} {:?} {recipe:?} rank {} {layout:?}",
            request.precision, request.sequences, request.loss, request.rank
        );
        all.push((what.replace("Layout ", ""), Program::build(&request, &|_, _| 640)));
    }
    all
}

/// What a rank holds, says and saves, beside the program itself.
fn asked_of(p: &Program) -> String {
    let mut facts: Vec<String> = Vec::new();
    facts.push(format!("{:016x}", fnv1a(serde_json::to_string(p).expect("JSON").bytes())));
    facts.push(format!("{} B", p.memory.total));
    facts.push(format!("places {:?}", p.places()));
    let starts: Vec<usize> = (0..p.micro_batches()).map(|m| p.first_sequence(m)).collect();
    facts.push(format!("from {starts:?}"));
    let (mut shares, mut mine) = (String::new(), 0);
    for (id, b) in (0..).map(program::GroupId).zip(&p.group_buffers) {
        let share = p.share(id);
        mine += share.count;
        for buffer in [b.param, b.grad, b.exp_avg] {
            let (whole, owned) = (p.share_in(id, buffer), p.owned_in(id, buffer));
            write!(shares, "{} {} {} {}.", whole.first, whole.count, owned.first, owned.count).unwrap();
        }
    }
    facts.push(format!("saves {mine} {:016x}", fnv1a(shares.bytes())));
    let ops = || p.blocks.iter().flat_map(|b| &b.ops);
    let mut sent = String::new();
    let (mut all_sent, mut talks, mut going) = (0, 0, 0);
    for op in ops() {
        talks += usize::from(op.only_talks());
        going += usize::from(op.goes_on());
        let Some(comm) = &op.comm else { continue };
        let members = comm.members.ranks(p.coords, &p.layout);
        let index = members.iter().position(|r| *r == p.rank).unwrap_or(0);
        let bytes = comm.sent_bytes(index, members.len());
        all_sent += bytes;
        let parts: Vec<_> = comm.messages.iter().map(|m| m.part(index, members.len())).collect();
        write!(sent, "{members:?} {bytes} {parts:?}").unwrap();
    }
    facts.push(format!("says {all_sent} B {:016x}, {talks} ops talk, {going} go on", fnv1a(sent.bytes())));
    facts.join("; ")
}

#[test]
fn drawn_programs_change_only_on_purpose() {
    let mut all = String::new();
    let mut built = 0;
    for (what, found) in drawn() {
        let found = found.map_or_else(
            |e| e.to_string(),
            |p| {
                built += 1;
                asked_of(&p)
            },
        );
        writeln!(all, "{what}: {found}").unwrap();
    }
    assert!(built > 80, "{built} of the layouts drawn are legal");
    check("drawn_programs", &all);
}

/// Where ranks lie and whom they meet, in meshes with every axis.
#[test]
fn ranks_meet_whom_they_met() {
    let one = Layout::default;
    let meshes = [
        Layout { dp: 2, tp: 2, cp: 2, pp: 2, ep: 4, ..one() },
        Layout { dp: 3, tp: 2, cp: 1, pp: 3, ep: 3, ..one() },
        Layout { dp: 4, tp: 1, cp: 2, pp: 1, ep: 2, shard: Some(2), zero: Zero::Optimizer, ..one() },
        Layout { dp: 4, tp: 2, cp: 1, pp: 2, ep: 8, shard: Some(2), zero: Zero::Parameters, ..one() },
    ];
    let mut all = String::new();
    for layout in &meshes {
        for rank in 0..layout.world() {
            let c = Coords::of(rank, layout);
            assert_eq!(c.rank(layout), rank);
            let axes = [Axis::Dp, Axis::Tp, Axis::Pp, Axis::Cp, Axis::Ep].map(Members::Axis);
            let kinds = [Replication::Data, Replication::Expert];
            let groups = kinds
                .into_iter()
                .flat_map(|r| [Members::Replicas(r), Members::Shards(r), Members::Owners(r)]);
            let met: Vec<String> = axes
                .into_iter()
                .chain(groups)
                .chain([Members::Ends, Members::World])
                .map(|m| format!("{:?}", m.ranks(c, layout)))
                .collect();
            let counts = kinds.map(|r| (c.replicas(r, layout), c.shards(r, layout), c.owners(r, layout)));
            writeln!(all, "{c:?} ep {}: {} {counts:?}", c.ep(layout), met.join(" ")).unwrap();
        }
    }
    for (q, kv, dim, value_dim) in [(4, 2, 8, 8), (6, 6, 12, 5), (1, 1, 3, 7)] {
        let heads = Heads { q, kv, dim, value_dim, score_factor: 1.0 };
        writeln!(all, "{heads:?}: {} {} {}", heads.packed(), heads.kv_cols(), heads.out_cols()).unwrap();
    }
    for window in [None, Some(1), Some(5), Some(16), Some(17)] {
        let sees = Sees { window, ..Sees::ALL };
        writeln!(all, "{window:?}: {:?}", [1, 2, 16, 40].map(|t| sees.keys_twice(t))).unwrap();
    }
    for (rows, cols) in [(3, 5), (5, 3), (64, 64), (1, 9)] {
        let shares =
            [Shares::Whole, Shares::Rows { index: 1, ranks: 3 }, Shares::Cols { index: 0, ranks: 2 }];
        let matrix = Matrix { of: 0, row0: 1, rows, mine: true };
        let whole = shares.map(|s| (s.ranks(), matrix.whole(s, cols), matrix.flops(s, cols)));
        writeln!(all, "{rows} x {cols}: {whole:?} {}", newton_schulz_flops(rows, cols)).unwrap();
    }
    for (len, parts) in [(1, 2), (4096, 2), (4097, 2), (50_000, 3), (8192, 5), (0, 2)] {
        let owned: Vec<_> = (0..parts).map(|i| owned_range(len, parts, i).range()).collect();
        writeln!(all, "{len} over {parts}: {owned:?}").unwrap();
    }
    let matrix = Matrix { of: 0, row0: 1, rows: 2, mine: true };
    writeln!(all, "{matrix:?}").unwrap();
    check("meshes", &all);
}

/// Spans of every op of work when stages and passes take times of their own.
#[test]
fn uneven_schedules_change_only_on_purpose() {
    let mut all = String::new();
    for (schedule, stages, chunks, micro_batches) in [
        (PipelineSchedule::Gpipe, 3, 1, 4),
        (PipelineSchedule::OneFOneB, 3, 1, 5),
        (PipelineSchedule::OneFOneB, 4, 1, 3),
        (PipelineSchedule::ZeroBubble, 3, 1, 5),
        (PipelineSchedule::ZeroBubble, 4, 1, 9),
        (PipelineSchedule::Interleaved, 2, 3, 4),
        (PipelineSchedule::Interleaved, 3, 2, 6),
    ] {
        let orders = orders(schedule, stages, chunks, micro_batches);
        let took = |v: usize, pass: Pass| match pass {
            Pass::Forward => 1.0 + 0.25 * v as f64,
            Pass::Backward => 2.0 + 0.5 * (v % 2) as f64,
            Pass::Weight => 0.75,
        };
        writeln!(all, "{schedule:?} {stages} x {chunks} of {micro_batches}").unwrap();
        for stage in spans(&orders, chunks, took).expect("a schedule that ends") {
            let spans: Vec<String> = stage.iter().map(|s| format!("{}-{}", s.start, s.end)).collect();
            writeln!(all, "  {}", spans.join(" ")).unwrap();
        }
        let mut stuck = orders.clone();
        stuck[0].reverse();
        writeln!(all, "  reversed: {:?}", spans(&stuck, chunks, took).err()).unwrap();
    }
    check("spans", &all);
}
