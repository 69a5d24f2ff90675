//! What must hold for every program, over models and layouts.

mod common;

use std::collections::HashMap;

use common::{build, check_world, model};
use program::{Coords, Program};
use proptest::prelude::*;
use spec::{Layout, PipelineSchedule, Recompute, Zero};

/// dp, tp, sequence parallelism, and how many of dp shard together.
const AXES: [(usize, usize, bool, Option<usize>); 6] = [
    (1, 1, false, None),
    (2, 1, false, None),
    (1, 2, false, None),
    (2, 2, true, None),
    (4, 1, false, Some(2)),
    (4, 2, true, Some(2)),
];

fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
        for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
            for (dp, tp, sp, shard) in AXES {
                // What is recomputed is no part of how gradients meet.
                if shard.is_some() && (zero == Zero::Off || recompute != Recompute::None) {
                    continue;
                }
                for (pp, chunks, schedule) in [
                    (1, 1, PipelineSchedule::OneFOneB),
                    (2, 1, PipelineSchedule::Gpipe),
                    (2, 1, PipelineSchedule::OneFOneB),
                    (2, 2, PipelineSchedule::Interleaved),
                    (2, 1, PipelineSchedule::ZeroBubble),
                ] {
                    for micro_batch in [1, 2] {
                        // Interleaving wants whole rounds of stages.
                        if chunks > 1 && dp * micro_batch * pp > 8 {
                            continue;
                        }
                        let sequence_parallel = sp;
                        let l = Layout {
                            dp,
                            tp,
                            pp,
                            sequence_parallel,
                            zero,
                            shard,
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

#[test]
fn every_rule_holds_after_every_pass_and_between_ranks() {
    for layout in layouts() {
        for m in [model(4, true, false), model(4, false, true)] {
            check_world(&m, &layout);
        }
    }
    // The embedding and the head in chunks of their own.
    let layers = model(4, true, false).layers;
    let ends = Layout {
        pp: 2,
        chunks: 2,
        schedule: PipelineSchedule::Interleaved,
        stage_layers: vec![0, layers / 2, layers - layers / 2, 0],
        ..Layout::default()
    };
    check_world(&model(4, true, false), &ends);
    check_world(&model(4, false, true), &Layout { dp: 2, zero: Zero::Gradients, ..ends });
}

#[test]
fn ids_are_stable_over_layouts() {
    let m = model(4, true, false);
    let mut names: HashMap<u64, String> = HashMap::new();
    for layout in layouts() {
        let p = build(&m, &layout, 8, 0);
        for op in p.blocks.iter().flat_map(|b| &b.ops) {
            let known = names.entry(op.id.0).or_insert_with(|| op.name.clone());
            assert_eq!(*known, op.name);
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
    fn every_sequence_is_trained_on_once(
        dp in 0u32..4, mb in 0u32..2, zero in 0u8..4, extra in 1usize..4, groups in 0u32..3,
    ) {
        let (dp, micro_batch) = (1usize << dp, 1usize << mb);
        let sequences = dp * micro_batch * extra.next_power_of_two();
        let zero = Zero::try_from(zero).expect("0 to 3");
        let shard = (zero != Zero::Off && dp > 1 << groups).then_some(dp >> groups);
        let layout = Layout { dp, micro_batch, zero, shard, ..Layout::default() };
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
