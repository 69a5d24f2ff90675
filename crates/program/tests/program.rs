//! What must hold for every program, over models and layouts.

use std::collections::HashMap;

use program::{Coords, Home, Op, OpKind, Program, Request};
use proptest::prelude::*;
use spec::{
    Activation, DType, Layout, ModelSpec, NormKind, PipelineSchedule, Position, Recompute, Rope, RopeScaling,
    Zero,
};

fn model(layers: usize, tied: bool, gpt2: bool) -> ModelSpec {
    let rope = Rope { theta: 10000.0, scaling: RopeScaling::Default, max_positions: 64 };
    ModelSpec {
        name: "test".into(),
        vocab: 96,
        layers,
        hidden: 32,
        ffn: 64,
        heads: 4,
        kv_heads: if gpt2 { 4 } else { 2 },
        head_dim: 8,
        norm: if gpt2 { NormKind::Layer } else { NormKind::Rms },
        norm_eps: 1e-5,
        position: if gpt2 { Position::Learned { max_positions: 64 } } else { Position::Rope(rope) },
        activation: if gpt2 { Activation::GeluTanh } else { Activation::SwiGlu },
        qkv_bias: gpt2,
        attn_out_bias: gpt2,
        mlp_bias: gpt2,
        qk_norm: !gpt2 && tied,
        tied_embeddings: tied,
        init_std: 0.02,
    }
}

fn build(model: &ModelSpec, layout: &Layout, sequences: usize, rank: usize) -> Program {
    let request = Request { model, layout, sequence: 16, sequences, precision: DType::F32, rank, cache: 0 };
    Program::build(&request, &|_, _| 0).expect("a valid layout")
}

fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            for (dp, tp, sp) in [(1, 1, false), (2, 1, false), (1, 2, false), (2, 2, true)] {
                for (pp, chunks, schedule) in [
                    (1, 1, PipelineSchedule::OneFOneB),
                    (2, 1, PipelineSchedule::Gpipe),
                    (2, 1, PipelineSchedule::OneFOneB),
                    (2, 2, PipelineSchedule::Interleaved),
                    (2, 1, PipelineSchedule::ZeroBubble),
                ] {
                    for micro_batch in [1, 2] {
                        let sequence_parallel = sp;
                        let l = Layout {
                            dp,
                            tp,
                            pp,
                            sequence_parallel,
                            zero,
                            schedule,
                            chunks,
                            micro_batch,
                            recompute,
                            ..Layout::default()
                        };
                        all.push(l);
                    }
                }
            }
        }
    }
    all
}

/// Every buffer that an op reads in a block was written by the parameters, the batch, an earlier pass or an earlier op,
/// and no two buffers that are alive at an op share bytes.
fn check_memory(p: &Program) {
    for b in &p.buffers {
        let (offset, len) = match b.home {
            Home::Static { offset } => (offset, p.slot_bytes.first().map_or(p.scratch_offset, |s| s.1)),
            Home::Slot { chunk, offset, .. } => (offset, p.slot_bytes[chunk].0),
            Home::Scratch { offset, .. } => (offset, p.memory.scratch),
            Home::MicroBatch { .. } => continue,
        };
        assert!(offset + b.bytes() <= len, "{} leaves its region", b.name);
    }
    assert_eq!(p.memory.total, p.workspace_offset + p.memory.workspace);
    assert!(p.memory.scratch >= p.memory.scratch_bound);
    for block in &p.blocks {
        for op in &block.ops {
            check_op(p, op);
        }
    }
}

fn check_op(p: &Program, op: &Op) {
    let range = |v: &program::View| {
        let b = p.buffer(v.buffer);
        let row = b.cols * b.dtype.bytes();
        let at = match b.home {
            Home::Static { offset } => offset,
            Home::Slot { offset, .. } => 1 << 40 | offset,
            Home::Scratch { offset, .. } => 1 << 41 | offset,
            Home::MicroBatch { .. } => return (0, 0),
        };
        (at + v.row0 * row, at + (v.row0 + v.rows) * row)
    };
    let levels = op.grads.iter().map(|g| &g.levels);
    let outs: Vec<(usize, usize)> = op.outs.iter().chain(levels).map(range).collect();
    let apart = |a: (usize, usize), b: (usize, usize)| a.1 <= b.0 || b.1 <= a.0;
    for (i, a) in outs.iter().enumerate() {
        for b in &outs[..i] {
            assert!(apart(*a, *b), "{}: outputs overlap", op.name);
        }
        for v in &op.ins {
            let same = range(v) == *a && a.0 < a.1;
            assert!(same || apart(range(v), *a), "{}: an input overlaps an output", op.name);
            let may = matches!(
                op.kind,
                OpKind::Rope { .. } | OpKind::Xent | OpKind::XentGrad { .. } | OpKind::AllReduce { .. }
            );
            assert!(!same || may, "{} overwrites its input", op.name);
        }
    }
}

#[test]
fn buffers_that_live_together_never_share_bytes() {
    for layout in layouts() {
        for m in [model(4, true, false), model(4, false, true)] {
            for rank in 0..layout.world() {
                check_memory(&build(&m, &layout, 8, rank));
            }
        }
    }
}

/// Every message has exactly one sender and one receiver, in the same order on both sides.
#[test]
fn sends_and_receives_match() {
    let m = model(4, false, false);
    for layout in layouts().into_iter().filter(|l| l.pp > 1) {
        let mut sent: HashMap<(usize, usize), Vec<(u32, usize)>> = HashMap::new();
        let mut received: HashMap<(usize, usize), Vec<(u32, usize)>> = HashMap::new();
        for rank in 0..layout.world() {
            let p = build(&m, &layout, 8, rank);
            for item in &p.schedule {
                for op in &p.blocks[item.block].ops {
                    match op.kind {
                        OpKind::Send { peer, tag } => {
                            sent.entry((rank, peer)).or_default().push((tag, item.micro_batch));
                        }
                        OpKind::Recv { peer, tag } => {
                            received.entry((peer, rank)).or_default().push((tag, item.micro_batch));
                        }
                        _ => {}
                    }
                }
            }
        }
        for (pair, mut messages) in sent {
            let mut other = received.remove(&pair).unwrap_or_default();
            messages.sort_unstable();
            other.sort_unstable();
            assert_eq!(messages, other, "{pair:?} under {layout:?}");
        }
        assert!(received.is_empty());
    }
}

/// Ranks of a tensor-parallel group run the same collectives in the same order.
#[test]
fn collectives_match_over_the_group() {
    let m = model(4, true, false);
    for layout in layouts().into_iter().filter(|l| l.tp > 1) {
        let order = |rank: usize| {
            let p = build(&m, &layout, 8, rank);
            let ops = p.schedule.iter().flat_map(|i| p.blocks[i.block].ops.clone()).collect::<Vec<_>>();
            ops.into_iter().filter(|o| o.kind.is_communication()).map(|o| o.id).collect::<Vec<_>>()
        };
        for rank in (0..layout.world()).step_by(2) {
            assert_eq!(order(rank), order(rank + 1), "{layout:?}");
        }
    }
}

#[test]
fn ids_are_unique_within_a_block_and_stable_over_layouts() {
    let m = model(4, true, false);
    let mut names: HashMap<u32, String> = HashMap::new();
    for layout in layouts() {
        let p = build(&m, &layout, 8, 0);
        for block in &p.blocks {
            let mut seen: HashMap<u32, &str> = HashMap::new();
            for op in &block.ops {
                if let Some(before) = seen.insert(op.id.0, &op.name) {
                    panic!("{before} and {} share id {} in {}", op.name, op.id.0, block.name);
                }
                let known = names.entry(op.id.0).or_insert_with(|| op.name.clone());
                assert_eq!(*known, op.name);
            }
        }
    }
}

/// Shards of all ranks tile every parameter exactly once (replicas aside).
#[test]
fn parameter_shards_tile_the_model() {
    let m = model(4, false, false);
    let layout = Layout { tp: 2, pp: 2, ..Layout::default() };
    let mut elements: HashMap<String, usize> = HashMap::new();
    for rank in 0..4 {
        let p = build(&m, &layout, 8, rank);
        for g in p.groups.iter().filter(|g| !g.replicated_tp || Coords::of(rank, &layout).tp == 0) {
            for part in &g.parts {
                *elements.entry(part.name.clone()).or_default() += part.rows * part.cols;
            }
        }
    }
    let one = build(&m, &Layout::default(), 8, 0);
    for part in one.groups.iter().flat_map(|g| &g.parts) {
        assert_eq!(elements[&part.name], part.global.0 * part.global.1, "{}", part.name);
    }
}

/// Backward of every matrix product is twice its forward: 6 N FLOPs a token in all, and recompute adds at most one
/// forward (Kaplan et al. 2020, section 2.1).
#[test]
fn flops_follow_from_the_parameters() {
    let m = model(3, false, false);
    let p = build(&m, &Layout { micro_batch: 2, ..Layout::default() }, 2, 0);
    let total: u64 = p.schedule.iter().flat_map(|i| &p.blocks[i.block].ops).map(|o| o.cost.flops).sum();
    let matrices: usize =
        p.groups.iter().filter(|g| g.decay && g.name != "embed.weight").map(|g| g.rows * g.cols).sum();
    let tokens = 32;
    let attention = m.layers * (2 + 5) * tokens * 16 * m.heads * m.head_dim;
    assert_eq!(total, (6 * matrices * tokens + attention) as u64);
}

#[test]
fn full_recompute_keeps_less_and_computes_more() {
    let m = model(8, false, false);
    let of = |recompute| build(&m, &Layout { recompute, micro_batch: 4, ..Layout::default() }, 4, 0);
    let [none, selective, full] = [Recompute::None, Recompute::Selective, Recompute::Full].map(of);
    assert!(full.memory.scratch < selective.memory.scratch && selective.memory.scratch < none.memory.scratch);
    let flops = |p: &Program| p.blocks.iter().flat_map(|b| &b.ops).map(|o| o.cost.flops).sum::<u64>();
    assert_eq!(flops(&none), flops(&selective));
    assert!(flops(&full) > flops(&none));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Micro-batches of all ranks cover every sequence of the batch once.
    #[test]
    fn every_sequence_is_trained_on_once(dp in 0u32..3, mb in 0u32..2, zero in 0u8..4, extra in 1usize..4) {
        let (dp, micro_batch) = (1usize << dp, 1usize << mb);
        let sequences = dp * micro_batch * extra.next_power_of_two();
        let layout = Layout { dp, micro_batch, zero: Zero::try_from(zero).expect("0 to 3"), ..Layout::default() };
        let m = model(1, false, false);
        let mut seen = vec![0; sequences];
        for rank in 0..dp {
            let p = build(&m, &layout, sequences, rank);
            for i in 0..p.micro_batches() {
                for s in &mut seen[p.first_sequence(i)..][..micro_batch] {
                    *s += 1;
                }
            }
        }
        prop_assert!(seen.iter().all(|&n| n == 1), "{seen:?}");
    }
}
