//! Facts of a program that other crates rely on, one by one, over layouts that tell each from its neighbours.

mod common;

use std::collections::{BTreeMap, HashMap};

use common::{build, check_world, model};
use program::{
    ALIGN, Axis, BlockWork, Home, Loss, Members, Mode, OpKind, Pass, Program, Request, Role, View,
    check_mixture, verify,
};
use spec::{
    ContextMode, DType, ExpertRows, Experts, Latent, Layout, ModelSpec, Mtp, PipelineSchedule, Reduce,
    Router, Score, Zero,
};

const ZEROS: [Zero; 4] = [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters];

fn ranks(m: &ModelSpec, layout: &Layout) -> Vec<Program> {
    (0..layout.world()).map(|rank| build(m, layout, 8, rank)).collect()
}

fn ops(p: &Program) -> impl Iterator<Item = &program::Op> {
    p.blocks.iter().flat_map(|b| &b.ops)
}

/// Names of a rank's ops that end so.
fn ending(p: &Program, end: &str) -> usize {
    ops(p).filter(|op| op.name.ends_with(end)).count()
}

/// Every element of every parameter is saved, and counted in the norm, by exactly one rank.
#[test]
fn each_element_is_one_ranks_to_save() {
    for tied in [true, false] {
        // Large enough that shards begin inside a parameter.
        let m = ModelSpec { vocab: 1024, ..model(4, tied, false) };
        for zero in ZEROS {
            for (dp, tp, pp, shard) in
                [(1, 1, 1, None), (2, 1, 2, None), (1, 2, 2, None), (4, 2, 1, Some(2)), (2, 2, 2, None)]
            {
                let shard = shard.filter(|_| zero != Zero::Off);
                let layout = Layout { dp, tp, pp, zero, shard, ..Layout::default() };
                let mut saved: BTreeMap<String, usize> = BTreeMap::new();
                let mut whole = 0;
                for p in ranks(&m, &layout) {
                    whole = p
                        .groups
                        .iter()
                        .flat_map(|g| &g.parts)
                        .map(|part| part.global.0 * part.global.1)
                        .sum();
                    for (id, b) in (0..).map(program::GroupId).zip(&p.group_buffers).filter(|(_, b)| b.counts)
                    {
                        *saved.entry(p.group(id).name.clone()).or_default() += p.share(id).count;
                        for buffer in [b.param, b.exp_avg, b.grad].into_iter().chain(b.exp_avg_sq) {
                            let slice = p.share_in(id, buffer);
                            let len = p.buffer(buffer).len();
                            let before = if len == p.group(id).len() { 0 } else { b.owned.first };
                            assert_eq!(
                                (slice.first, slice.count),
                                (p.share(id).first - before, p.share(id).count)
                            );
                            assert!(slice.first + slice.count <= len, "{slice:?} of {len} under {layout:?}");
                        }
                    }
                }
                let total: usize = saved.values().sum();
                assert_eq!(
                    total,
                    m.param_count() as usize,
                    "{saved:?} under {layout:?}, {whole} on the last rank"
                );
            }
        }
    }
}

#[test]
fn work_space_is_what_the_greediest_op_wants() {
    let m = model(2, false, false);
    let request = Request {
        model: &m,
        layout: &Layout::default(),
        sequence: 16,
        sequences: 8,
        precision: DType::F32,
        rank: 0,
        mode: Mode::Train,
        loss: Default::default(),
        recipe: Default::default(),
    };
    let wants = |op: &program::Op, _: &Program| if matches!(op.kind, OpKind::Linear) { 1000 } else { 10 };
    let p = Program::build(&request, &wants).expect("a valid layout");
    assert_eq!(p.memory.workspace, (4 * 1000usize).next_multiple_of(ALIGN));
    assert_eq!(p.memory.total, p.workspace_offset + p.memory.workspace);
}

#[test]
fn regions_follow_one_another() {
    let layout = Layout { pp: 2, chunks: 2, schedule: PipelineSchedule::Interleaved, ..Layout::default() };
    for p in ranks(&model(4, false, false), &layout) {
        assert!(p.slots.iter().any(|&n| n > 1), "{:?}", p.slots);
        let mut at = p.slot_regions[0].offset;
        for (region, count) in p.slot_regions.iter().zip(&p.slots) {
            assert_eq!(region.offset, at);
            at += region.bytes * count;
        }
        assert_eq!((p.scratch_offset, p.memory.slots), (at, at - p.slot_regions[0].offset));
        assert_eq!(p.workspace_offset, at + p.memory.scratch);
    }
}

#[test]
fn views_of_rows_begin_where_their_rows_do() {
    let p = build(&model(2, false, false), &Layout::default(), 8, 0);
    let buffer = p.group_buffers[0].param;
    let cols = p.buffer(buffer).cols;
    let slice = p.slice(View { buffer, row0: 2, rows: 3 });
    assert_eq!((slice.first, slice.count), (2 * cols, 3 * cols));
    assert_eq!(p.buffer(p.io.tokens).rows, 8 * 16);
    assert_eq!(p.buffer(p.io.targets).rows, 8 * 16);
}

#[test]
fn the_cache_of_generation_holds_every_layers_positions() {
    let m = model(3, false, false);
    let request = Request {
        model: &m,
        layout: &Layout::default(),
        sequence: 16,
        sequences: 1,
        precision: DType::F32,
        rank: 0,
        mode: Mode::Generate { positions: 40 },
        loss: Default::default(),
        recipe: Default::default(),
    };
    let p = Program::build(&request, &|_, _| 0).expect("a valid layout");
    for cache in [p.io.k_cache, p.io.v_cache] {
        let cache = p.buffer(cache.expect("a cache"));
        assert_eq!((cache.rows, cache.cols), (40 * 3, m.kv_heads * m.head_dim));
    }
    // Latents in place of the keys and values of all heads: 12 + 4 columns, not 4 (6 + 4) + 4 8.
    let latent = Latent { query_rank: None, kv_rank: 12, nope_dim: 6, rope_dim: 4, value_dim: 8 };
    let latents = ModelSpec { latent: Some(latent), qk_norm: false, kv_heads: m.heads, ..m.clone() };
    let p = Program::build(&Request { model: &latents, ..request }, &|_, _| 0).expect("a valid layout");
    let cols = [p.io.k_cache, p.io.v_cache].map(|cache| p.buffer(cache.expect("a cache")).cols);
    assert_eq!(cols, [12, 4]);
}

/// What is not shared is not sharded, whatever was asked for.
#[test]
fn a_rank_alone_shards_nothing() {
    let alone = build(&model(2, false, false), &Layout { zero: Zero::Parameters, ..Layout::default() }, 8, 0);
    assert_eq!(alone.layout.zero, Zero::Off);
    assert_eq!(ending(&alone, ".gather") + ending(&alone, ".reduce") + ending(&alone, ".wait"), 0);
}

#[test]
fn stages_beyond_two_hear_from_the_one_before() {
    for schedule in [PipelineSchedule::OneFOneB, PipelineSchedule::Gpipe, PipelineSchedule::ZeroBubble] {
        check_world(&model(4, true, false), &Layout { pp: 4, schedule, ..Layout::default() });
    }
}

/// Each bucket's reduction is awaited once where it was begun before the tail, and summed over owners where a shard has
/// several.
#[test]
fn what_is_begun_is_awaited() {
    let m = model(2, false, false);
    for zero in ZEROS {
        for shard in [None, Some(2)] {
            let shard = shard.filter(|_| zero != Zero::Off);
            let p = build(&m, &Layout { dp: 4, zero, shard, ..Layout::default() }, 8, 1);
            let buckets = p.buckets.len();
            let waits = if zero < Zero::Gradients { buckets } else { 0 };
            assert_eq!(ending(&p, ".wait"), waits, "waits under {zero:?}");
            assert_eq!(ending(&p, ".owners"), if shard.is_some() { buckets } else { 0 }, "owners, {shard:?}");
        }
    }
}

/// Which gradients tensor-parallel ranks still add up: those of parameters used on own rows or for own heads.
#[test]
fn gradients_that_tensor_parallel_ranks_share() {
    let check = |sequence_parallel: bool, expected: &[Role]| {
        let m = model(1, true, false);
        assert!(m.qk_norm);
        let p = build(&m, &Layout { tp: 2, sequence_parallel, ..Layout::default() }, 8, 0);
        let over = |op: &program::Op| match op.kind {
            OpKind::SyncGrads { over: Members::Axis(Axis::Tp), group } => Some(p.group(group).key.role),
            _ => None,
        };
        let mut found: Vec<Role> = ops(&p).filter_map(over).collect();
        found.sort();
        let mut expected = expected.to_vec();
        expected.sort();
        assert_eq!(found, expected, "sequence parallelism {sequence_parallel}");
    };
    check(false, &[Role::QueryNorm, Role::KeyNorm]);
    check(true, &[Role::QueryNorm, Role::KeyNorm, Role::AttentionNorm, Role::MlpNorm, Role::FinalNorm]);
}

/// Leaves of a launch and the counter above them are the rank's tree, cut at the micro-batch.
#[test]
fn gradient_sums_are_the_tree_cut_at_a_launch() {
    let m = model(2, false, false);
    for (tp, sequence_parallel) in [(1, false), (2, false), (2, true)] {
        for micro_batch in [1, 2, 4] {
            let p = build(&m, &Layout { tp, sequence_parallel, micro_batch, ..Layout::default() }, 8, 0);
            let mut met: HashMap<bool, usize> = HashMap::new();
            for g in ops(&p).flat_map(|op| &op.grads) {
                let leaves = micro_batch / g.results;
                let product = |radices: &[u32]| radices.iter().product::<u32>() as usize;
                let group = p.group(g.group);
                let apart = sequence_parallel && group.replicated_tp;
                let inner = if apart { 1 } else { leaves };
                assert_eq!(product(&g.inner), inner, "{} of {micro_batch} under tp {tp}", group.name);
                assert_eq!(product(&g.outer) * leaves, p.local_sequences, "{}", group.name);
                *met.entry(apart).or_default() += 1;
            }
            assert_eq!(met.len(), 1 + usize::from(sequence_parallel), "{met:?}");
        }
    }
}

/// Several sequences have logits at a time where that takes no more memory than one at a time, and products gain from it.
#[test]
fn logits_of_a_few_sequences_take_no_more_memory() {
    let of = |m: &ModelSpec, layout: &Layout, sequence: usize| {
        let [few, one] = [Loss::Few, Loss::OneSequence].map(|loss| {
            let (precision, mode, recipe) = (DType::F32, Mode::Train, Default::default());
            let request =
                Request { model: m, layout, sequence, sequences: 8, precision, rank: 0, mode, loss, recipe };
            Program::build(&request, &|_, _| 0).expect("a valid layout")
        });
        let (few_bytes, one_bytes) = (few.memory.total, one.memory.total);
        assert!(few_bytes <= one_bytes, "{few_bytes} B for {one_bytes} under {layout:?}");
        let losses = |p: &Program| {
            let train = p.blocks.iter().find(|b| {
                matches!(b.work, BlockWork::Train(Pass::Backward) | BlockWork::TrainLast(Pass::Backward))
            });
            train.expect("a backward pass").ops.iter().filter(|op| op.name.ends_with(".xent")).count()
        };
        assert_eq!(losses(&one), layout.micro_batch);
        layout.micro_batch / losses(&few)
    };
    for (tied, zero) in
        [(false, Zero::Off), (true, Zero::Off), (false, Zero::Gradients), (true, Zero::Parameters)]
    {
        let m = ModelSpec { hidden: 64, vocab: 1024, ..model(2, tied, false) };
        let layout = |dp, micro_batch| Layout { dp, micro_batch, zero, ..Layout::default() };
        // The partial sums of two additions are as large as logits of three sequences.
        assert_eq!(of(&m, &layout(1, 8), 42), 4);
        assert_eq!(of(&m, &layout(1, 8), 43), 2);
        assert_eq!(of(&m, &layout(1, 8), 65), 1);
        assert_eq!(of(&m, &layout(1, 1), 42), 1);
        // One level there is always.
        assert_eq!(of(&m, &layout(2, 4), 42), 2);
        assert_eq!(of(&m, &layout(4, 2), 42), 1);
    }
    let wide = ModelSpec { hidden: 2048, ..model(2, false, false) };
    let layout = Layout { micro_batch: 8, ..Layout::default() };
    assert_eq!([256, 512, 1024].map(|sequence| of(&wide, &layout, sequence)), [4, 2, 1]);
}

#[test]
fn bytes_of_a_product_are_its_operands() {
    let m = model(1, false, false);
    let p = build(&m, &Layout { micro_batch: 2, ..Layout::default() }, 8, 0);
    let down = ops(&p).find(|op| op.name == "layers.0.mlp.down" || op.name == "layers.0.ffn.down");
    let down = down.expect("the second product of the feed-forward");
    let (rows, inner, outer) = (2 * 16, m.ffn, m.hidden);
    let added = down.acc.map_or(0, |_| rows * outer);
    assert_eq!(down.cost.bytes, 4 * (rows * inner + outer * inner + rows * outer + added) as u64);
}

/// The last byte of a region may be used, the one after it not.
#[test]
fn a_whole_steps_buffer_may_end_with_its_region() {
    let mut p = build(&model(2, false, false), &Layout::default(), 8, 0);
    let end = p.slot_regions.first().map_or(p.scratch_offset, |s| s.offset);
    let last = p.micro_batches() - 1;
    let i = p.buffers.iter().position(|b| matches!(b.home, Home::MicroBatch { .. })).expect("one");
    let bytes = p.buffers[i].len() * p.buffers[i].dtype.bytes();
    let mut leaves = |offset: usize| {
        p.buffers[i].home = Home::MicroBatch { offset };
        verify::program(&p).iter().any(|v| v.what.contains("ends at byte"))
    };
    assert!(!leaves(end - (last + 1) * bytes));
    assert!(leaves(end - (last + 1) * bytes + ALIGN));
}

/// Where sums over ranks have no fixed order any micro-batch that divides a rank's share will do, also one that no node of
/// the usual tree covers.
#[test]
fn rows_fall_into_the_leaves_of_their_tree() {
    let m = model(2, false, false);
    for (sequences, micro_batch) in
        [(12, 4), (12, 3), (12, 6), (12, 12), (10, 5), (10, 2), (9, 3), (15, 5), (24, 8)]
    {
        let layout = Layout { micro_batch, reduce: Reduce::Ring, ..Layout::default() };
        layout.validate(&m, sequences, 16).expect("a legal layout");
        let p = build(&m, &layout, sequences, 0);
        for op in ops(&p).filter(|op| op.kind == OpKind::LinearGradWeight) {
            let rows = op.ins[0].rows / 16;
            let (inner, outer) = (&op.grads[0].inner, &op.grads[0].outer);
            let product = |radices: &[u32]| radices.iter().product::<u32>() as usize;
            assert_eq!(product(inner), rows, "{} of {sequences} by {micro_batch}", op.name);
            assert_eq!(
                product(inner) * product(outer),
                sequences,
                "{} of {sequences} by {micro_batch}",
                op.name
            );
        }
    }
}

/// On a ring attention asks from a rank's own tokens, one piece from the front and its mirror; where heads are dealt, from
/// all of a sequence.
#[test]
fn attention_asks_from_own_tokens_or_from_all() {
    let m = model(2, false, false);
    let places = |cp, context| -> Vec<_> {
        let layout = Layout { cp, context, ..Layout::default() };
        ranks(&m, &layout).iter().map(|p| (p.positions(), p.seen())).collect()
    };
    let ring = [[0..4, 12..16], [4..8, 8..12]];
    assert_eq!(places(2, ContextMode::Ring), ring.map(|own| (own.clone(), own)));
    let all = [0..8, 8..16];
    let pieces = [[0..4, 4..8], [8..12, 12..16]];
    assert_eq!(places(2, ContextMode::Heads), pieces.map(|own| (own, all.clone())));
    assert_eq!(places(1, ContextMode::Ring), [(all.clone(), all)]);
}

/// Biases of experts move by counts that lie in the sums of all ranks before the losses of all sequences, one or two each,
/// and the number of ranks that want to stop.
#[test]
fn experts_are_balanced_by_the_counts_of_all_ranks() {
    let router = Router { score: Score::Sigmoid, expert_bias: true, bias_rate: 0.01, ..Router::PLAIN };
    let experts = Experts { count: 8, top_k: 2, ffn: 16, shared_ffn: 0, dense_layers: 0, every: 1, router };
    let plain = ModelSpec { experts: Some(experts), ..model(3, false, false) };
    let ahead = ModelSpec { mtp: Some(Mtp { weight: 0.3 }), ..plain.clone() };
    for (m, layers, losses) in [(plain, 3, 1), (ahead, 4, 2)] {
        for p in ranks(&m, &Layout { dp: 2, ..Layout::default() }) {
            let op = ops(&p).find(|op| matches!(op.kind, OpKind::BalanceExperts { .. })).expect("one");
            let counts = op.ins[0];
            assert_eq!((counts.buffer, counts.rows), (p.io.norm_chunks, layers * 8));
            let behind = p.buffer(counts.buffer).rows - (counts.row0 + counts.rows);
            assert_eq!(behind, losses * 8 + 1, "{} layers", m.layers);
        }
    }
}

/// Where sums have a fixed order a rank's experts are whole chunks of the norm, their biases too; values that work are named.
#[test]
fn experts_of_a_rank_are_whole_chunks_of_the_norm() {
    // A matrix of an expert is half a chunk of 4096.
    let experts = Experts {
        count: 8,
        top_k: 2,
        ffn: 64,
        shared_ffn: 0,
        dense_layers: 0,
        every: 1,
        router: Router::PLAIN,
    };
    let plain = ModelSpec { experts: Some(experts), ..model(2, false, false) };
    let biased = ModelSpec { mlp_bias: true, ..plain.clone() };
    let check = |m: &ModelSpec, ep: usize, reduce: Reduce| {
        check_mixture(m, &Layout { dp: ep, ep, reduce, expert_rows: ExpertRows::All, ..Layout::default() })
    };
    for ep in [1, 2, 4, 8] {
        check(&plain, ep, Reduce::Ring).expect("sums without a fixed order");
        assert_eq!(check(&plain, ep, Reduce::Tree).is_ok(), ep < 8, "{ep}");
        assert_eq!(check(&biased, ep, Reduce::Tree).is_ok(), ep == 1, "{ep} with biases");
    }
    for (m, elements, works) in [(&plain, 2048, "1, 2, 4"), (&biased, 2048, "1")] {
        let refused = check(m, 8, Reduce::Tree).expect_err("half a chunk");
        assert!(refused.to_string().contains(&format!("have {elements} elements")), "{refused}");
        let hint = refused.hint_text().expect("a hint");
        assert!(hint.starts_with(&format!("values of layout.ep that work: {works};")), "{hint}");
    }
}
