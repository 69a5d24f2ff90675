//! What must hold for mixtures of experts, latent attention and context parallelism, alone and together.

mod common;

use std::collections::{BTreeMap, HashMap};

use common::{build, check_world, model};
use program::{Axis, Collective, Coords, Members, OpKind, Phase, Program, Replication};
use spec::{
    ContextMode, DType, ExpertRows, Experts, Latent, Layout, ModelSpec, PipelineSchedule, Recompute, Zero,
};

const SEQUENCES: usize = 8;
const SEQUENCE: usize = 16;

fn experts(model: ModelSpec, shared_ffn: usize, dense_layers: usize) -> ModelSpec {
    let experts = Experts {
        count: 8,
        top_k: 2,
        ffn: 16,
        shared_ffn,
        dense_layers,
        every: 1,
        router: Default::default(),
    };
    ModelSpec { experts: Some(experts), ..model }
}

fn latent(model: ModelSpec, query_rank: Option<usize>) -> ModelSpec {
    let latent = Latent { query_rank, kv_rank: 12, nope_dim: 8, rope_dim: 4, value_dim: 6 };
    ModelSpec { latent: Some(latent), qk_norm: false, kv_heads: model.heads, ..model }
}

/// Mixtral, a mixture with plain activations, DeepSeek-V3, DeepSeek-V2-Lite and latent attention alone, in small.
fn models() -> Vec<ModelSpec> {
    let gelu = ModelSpec { mlp_bias: false, ..model(4, false, true) };
    vec![
        experts(model(4, false, false), 0, 0),
        experts(gelu, 32, 0),
        experts(latent(model(4, false, false), Some(20)), 32, 1),
        experts(latent(model(4, true, false), None), 32, 1),
        latent(model(4, false, false), Some(20)),
    ]
}

/// dp, cp, tp, sequence parallelism and ep that fit 8 experts.
const AXES: [(usize, usize, usize, bool, usize); 9] = [
    (1, 1, 1, false, 1),
    (2, 1, 1, false, 2),
    (1, 2, 1, false, 1),
    (1, 1, 2, false, 1),
    (1, 1, 2, true, 2),
    (2, 1, 2, true, 4),
    (2, 2, 2, false, 8),
    (2, 2, 2, true, 2),
    (4, 1, 2, true, 8),
];

const CONTEXTS: [ContextMode; 2] = [ContextMode::Ring, ContextMode::Heads];

const PIPELINES: [(usize, usize, PipelineSchedule); 4] = [
    (1, 1, PipelineSchedule::OneFOneB),
    (2, 1, PipelineSchedule::OneFOneB),
    (2, 2, PipelineSchedule::Interleaved),
    (2, 1, PipelineSchedule::ZeroBubble),
];

const POLICIES: [(Zero, Recompute); 7] = [
    (Zero::Off, Recompute::None),
    (Zero::Off, Recompute::Full),
    (Zero::Optimizer, Recompute::Selective),
    (Zero::Gradients, Recompute::None),
    (Zero::Gradients, Recompute::Full),
    (Zero::Parameters, Recompute::Selective),
    (Zero::Parameters, Recompute::Full),
];

fn layouts(model: &ModelSpec) -> Vec<Layout> {
    let mut all = Vec::new();
    let axes = AXES.into_iter().flat_map(|a| {
        CONTEXTS.into_iter().filter(move |c| a.1 > 1 || *c == ContextMode::Ring).map(move |c| (a, c))
    });
    for ((dp, cp, tp, sequence_parallel, ep), context) in axes {
        let ep = if model.experts.is_some() { ep } else { 1 };
        for (pp, chunks, schedule) in PIPELINES {
            for (zero, recompute) in POLICIES {
                let expert_rows = ExpertRows::Even;
                let base = Layout {
                    dp,
                    cp,
                    context,
                    tp,
                    ep,
                    pp,
                    chunks,
                    schedule,
                    expert_rows,
                    ..Layout::default()
                };
                if zero == Zero::Gradients && ep > 1 {
                    let expert_rows = ExpertRows::All;
                    all.push(Layout { sequence_parallel, zero, recompute, expert_rows, ..base.clone() });
                }
                if zero != Zero::Off && dp > 2 && recompute != Recompute::Full {
                    all.push(Layout { sequence_parallel, zero, recompute, shard: Some(2), ..base.clone() });
                }
                all.push(Layout { sequence_parallel, zero, recompute, ..base });
            }
        }
    }
    all
}

/// One layout of each combination of axes and pipeline.
fn plain_layouts(model: &ModelSpec) -> impl Iterator<Item = Layout> {
    layouts(model).into_iter().filter(|l| l.zero == Zero::Off && l.recompute == Recompute::None)
}

fn programs(m: &ModelSpec, layout: &Layout) -> Vec<Program> {
    (0..layout.world()).map(|rank| build(m, layout, SEQUENCES, rank)).collect()
}

#[test]
fn every_rule_holds_after_every_pass_and_between_ranks() {
    for m in models() {
        for layout in layouts(&m) {
            check_world(&m, &layout);
        }
    }
}

/// FLOPs of all ranks together follow from the parameters that a token meets: each rank of an expert group multiplies
/// its share, whatever the mesh (DeepSeek-V3 report, arXiv 2412.19437: 6 N of active parameters a token, and attention).
#[test]
fn flops_of_all_ranks_follow_from_the_active_parameters() {
    for m in models() {
        let one = build(&m, &Layout::default(), SEQUENCES, 0);
        let matrices = |replication| -> usize {
            let groups = one.groups.iter().filter(|g| g.decay && g.replication == replication);
            groups.filter(|g| !g.name.contains("embed.weight") || m.tied_embeddings).map(|g| g.len()).sum()
        };
        let tokens = SEQUENCES * SEQUENCE;
        let (k, count) = m.experts.map_or((0, 1), |e| (e.top_k, e.count));
        let routed = 6 * tokens * matrices(Replication::Expert) * k / count;
        let (key, value) = m.latent.map_or((m.head_dim, m.head_dim), |l| (l.key_dim(), l.value_dim));
        let scores = tokens * SEQUENCE * m.heads * m.layers;
        let rest = 6 * tokens * matrices(Replication::Data) + scores * (4 * key + 3 * value);
        // Without sequence parallelism every tensor-parallel rank projects all tokens into the latents.
        for layout in plain_layouts(&m).filter(|l| l.tp == 1 || l.sequence_parallel || m.latent.is_none()) {
            let mut found = [0u64; 2];
            for p in programs(&m, &layout) {
                for op in p.schedule.iter().flat_map(|item| &p.blocks[item.block].ops) {
                    let grouped = matches!(
                        op.kind,
                        OpKind::GroupedLinear { .. }
                            | OpKind::GroupedLinearGradInput { .. }
                            | OpKind::GroupedLinearGradWeight { .. }
                    );
                    found[usize::from(grouped)] += op.cost.flops;
                }
            }
            assert_eq!(found, [rest as u64, routed as u64], "{} {layout:?}", m.name);
        }
    }
}

/// Ranks that do not hold copies of each other hold the model exactly once.
#[test]
fn parameter_shards_tile_the_model() {
    for m in models() {
        for layout in plain_layouts(&m) {
            let mut elements: HashMap<String, usize> = HashMap::new();
            let mut total = 0;
            for p in programs(&m, &layout) {
                for g in &p.groups {
                    let (_, replica) = p.coords.replicas(g.replication, &layout);
                    let copy_of_tied = g.name == "embed.weight" && p.coords.pp > 0;
                    if replica > 0 || g.replicated_tp && p.coords.tp > 0 || copy_of_tied {
                        continue;
                    }
                    total += g.len();
                    for part in &g.parts {
                        *elements.entry(part.name.clone()).or_default() += part.rows * part.cols;
                    }
                }
            }
            assert_eq!(total as u64, m.param_count(), "{layout:?}");
            let one = build(&m, &Layout::default(), SEQUENCES, 0);
            for part in one.groups.iter().flat_map(|g| &g.parts) {
                assert_eq!(elements[&part.name], part.global.0 * part.global.1, "{}", part.name);
            }
        }
    }
}

/// Under ZeRO the ranks that shard together own each element once: experts over other ranks than the rest. What is saved
/// and counted in the norm is each element once, whoever owns it besides.
#[test]
fn owned_ranges_tile_every_group_over_its_shards() {
    let m = experts(model(4, false, false), 32, 0);
    let m = ModelSpec { experts: m.experts.map(|e| Experts { ffn: 640, ..e }), ..m };
    for layout in layouts(&m).into_iter().filter(|l| l.zero >= Zero::Optimizer) {
        let all = programs(&m, &layout);
        for p in &all {
            for (i, g) in p.groups.iter().enumerate() {
                let mut ends: Vec<(usize, usize)> = Vec::new();
                for rank in p.coords.replica_ranks(g.replication, &layout) {
                    let id = program::GroupId(i as u32);
                    let (share, owned) = (all[rank].share(id), all[rank].group_buffers[i].owned);
                    assert!(owned.first <= share.first, "{} {layout:?}", g.name);
                    assert!(share.range().end <= owned.range().end, "{} {layout:?}", g.name);
                    assert!(share.first.is_multiple_of(program::NORM_CHUNK) || share.count == 0);
                    ends.push((share.first, share.range().end));
                }
                ends.sort_unstable();
                let end =
                    ends.iter().fold(0, |at, (first, end)| if *first == at { *end } else { usize::MAX });
                assert_eq!(end, g.len(), "{} {layout:?}: {ends:?}", g.name);
                let ranks = Members::Shards(g.replication).ranks(p.coords, &layout);
                assert!(ranks.contains(&p.rank));
                let mut at = 0;
                for rank in ranks {
                    assert_eq!(all[rank].groups[i].parts, g.parts, "{layout:?}");
                    let program::Owned { first, count } = all[rank].group_buffers[i].owned;
                    assert_eq!(first, at, "{} {layout:?}", g.name);
                    at += count;
                }
                assert_eq!(at, g.len(), "{} {layout:?}", g.name);
            }
            for b in &p.buckets {
                assert!(b.grads.iter().all(|(id, _)| p.group(*id).replication == b.replication));
            }
        }
    }
}

/// What goes out forward comes back backward: gather against scatter, all-to-all against itself. On a ring keys and values
/// go to all others again, and their gradients, in f32, one hop further.
#[test]
fn messages_of_both_passes_mirror_each_other() {
    for m in models() {
        for layout in plain_layouts(&m) {
            for p in programs(&m, &layout) {
                // Whole vectors, so that a gather and a scatter of the same rows count alike.
                let mut bytes: BTreeMap<(&str, bool), u64> = BTreeMap::new();
                let ops = p.schedule.iter().flat_map(|item| &p.blocks[item.block].ops);
                for op in ops.filter(|op| !op.name.starts_with("head") && !op.name.starts_with("embed")) {
                    let Some(comm) = &op.comm else { continue };
                    let what = match comm.what {
                        Collective::AllToAll => "exchange",
                        Collective::AllReduce => "sum",
                        Collective::AllGather => "gather",
                        Collective::ReduceScatter => "scatter",
                        Collective::Ring => "ring",
                        Collective::Send { .. } | Collective::Recv { .. } => continue,
                    };
                    // Counts go with the rows forward alone.
                    let said = comm.messages.iter().filter(|m| m.dtype != DType::U32);
                    let said: u64 = said.map(program::Message::bytes).sum();
                    *bytes.entry((what, op.phase == Phase::Forward)).or_default() += said;
                }
                let of = |what, forward| bytes.get(&(what, forward)).copied().unwrap_or(0);
                assert_eq!(of("exchange", true), of("exchange", false), "{layout:?}");
                let (hops, wide) = (layout.cp as u64 - 1, 4 / p.precision.bytes() as u64);
                let back = of("ring", true) + of("ring", true) * wide * (hops + 1) / hops.max(1);
                assert_eq!(back, of("ring", false), "{layout:?}");
                assert!(layout.ep == 1 || of("exchange", true) > 0 || p.coords.pp == 0, "{layout:?}");
                assert_eq!(layout.has_ring(), of("ring", true) > 0);
                assert!(!layout.deals_heads() || of("exchange", true) > 0, "{layout:?}");
                if layout.sequence_parallel {
                    assert_eq!(of("gather", true), of("scatter", false), "{layout:?}");
                    assert_eq!(of("scatter", true), of("gather", false), "{layout:?}");
                }
            }
        }
    }
}

/// A rank routes its own tokens, so that all ranks together send every token's copies once.
#[test]
fn every_copy_of_a_token_is_sent_once() {
    let m = experts(model(4, false, false), 0, 0);
    for layout in plain_layouts(&m).filter(|l| l.ep > 1) {
        let (mut rows, mut sent) = (0, 0);
        for p in programs(&m, &layout) {
            for op in p.schedule.iter().flat_map(|item| &p.blocks[item.block].ops) {
                if op.phase != Phase::Forward {
                    continue;
                }
                match op.kind {
                    OpKind::AllToAll { axis: Axis::Ep } => sent += op.ins[0].rows,
                    OpKind::GroupedLinear { .. } => rows += op.ins[0].rows,
                    _ => {}
                }
            }
        }
        let copies = m.layers * SEQUENCES * SEQUENCE * 2;
        // Out and back; two products of each copy.
        assert_eq!((sent, rows), (2 * copies, 2 * copies), "{layout:?}");
    }
}

#[test]
fn full_recompute_keeps_the_layers_inputs_alone() {
    for m in models() {
        let of = |recompute| {
            let layout = Layout { recompute, micro_batch: 4, pp: 2, ..Layout::default() };
            build(&m, &layout, SEQUENCES, 0)
        };
        let [none, selective, full] = [Recompute::None, Recompute::Selective, Recompute::Full].map(of);
        let slot = |p: &Program| p.slot_regions[0].bytes;
        assert!(slot(&full) < slot(&selective) && slot(&selective) < slot(&none), "{}", m.name);
        let rows = 4 * SEQUENCE * m.hidden * 4;
        // One boundary for each of the two layers of the stage; what the first reads is the embedding's output.
        assert!(slot(&full) <= 3 * rows, "{} of {rows}", slot(&full));
        let flops = |p: &Program| {
            p.schedule.iter().flat_map(|i| &p.blocks[i.block].ops).map(|o| o.cost.flops).sum::<u64>()
        };
        assert_eq!(flops(&none), flops(&selective));
        assert!(flops(&full) > flops(&none));
    }
}

/// Ranks of an expert group are neighbours and hold all experts together, each once.
#[test]
fn expert_groups_hold_every_expert_once() {
    let m = experts(model(4, false, false), 0, 0);
    for layout in plain_layouts(&m) {
        for rank in 0..layout.world() {
            let coords = Coords::of(rank, &layout);
            assert_eq!(coords.rank(&layout), rank);
            let peers = coords.peers(Axis::Ep, &layout);
            assert!(peers.contains(&rank) && peers.windows(2).all(|w| w[1] == w[0] + 1));
            let stages = peers.iter().map(|r| Coords::of(*r, &layout).pp);
            assert!(stages.into_iter().all(|pp| pp == coords.pp));
            let places: Vec<usize> = peers.iter().map(|r| Coords::of(*r, &layout).ep(&layout)).collect();
            assert_eq!(places, (0..layout.ep).collect::<Vec<_>>());
        }
    }
}
