//! Programs of Muon: verified on every rank, one momentum where AdamW has two moments, matrices whole where they are
//! orthogonalised and each orthogonalised once among those that shard it.

mod common;

use std::collections::BTreeMap;

use common::model;
use program::{Mode, OpKind, Program, Recipe, Request, Shares};
use spec::{DType, Experts, Layout, ModelSpec, Optimizer, PipelineSchedule, Router, Zero};

fn programs(m: &ModelSpec, layout: &Layout, optimizer: Optimizer, precision: DType) -> Vec<Program> {
    let build = |rank| {
        let request = Request {
            model: m,
            layout,
            sequence: 16,
            sequences: 8,
            precision,
            rank,
            mode: Mode::Train,
            loss: Default::default(),
            recipe: Recipe { optimizer, ..Recipe::default() },
        };
        Program::verified(&request, &|_, _| 0).unwrap_or_else(|e| panic!("{e} under {layout:?}"))
    };
    (0..layout.world()).map(build).collect()
}

fn mixture() -> ModelSpec {
    let experts = Experts {
        count: 4,
        top_k: 2,
        ffn: 128,
        shared_ffn: 32,
        dense_layers: 1,
        every: 1,
        router: Router::PLAIN,
    };
    ModelSpec { experts: Some(experts), ..model(4, false, false) }
}

fn layouts() -> Vec<Layout> {
    let plain = Layout::default();
    let zeros = [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters];
    let mut all = vec![
        plain.clone(),
        Layout { tp: 2, pp: 2, sequence_parallel: true, ..plain.clone() },
        Layout { pp: 2, chunks: 2, schedule: PipelineSchedule::Interleaved, ..plain.clone() },
        Layout { dp: 4, shard: Some(2), zero: Zero::Optimizer, ..plain.clone() },
    ];
    all.extend(zeros.map(|zero| Layout { dp: 2, tp: 2, zero, ..plain.clone() }));
    all
}

#[test]
fn every_rank_holds_to_every_rule() {
    for m in [model(4, true, false), model(4, true, true), mixture()] {
        for layout in layouts() {
            let all = programs(&m, &layout, Optimizer::Muon, DType::Bf16);
            let (_, found) = program::verify::world(&all);
            program::verify::accept("all passes", &found).unwrap_or_else(|e| panic!("{e} under {layout:?}"));
        }
    }
}

#[test]
fn a_second_moment_is_kept_of_what_adamw_updates_alone() {
    for m in [model(4, false, false), mixture()] {
        for layout in layouts() {
            let [muon, adamw] =
                [Optimizer::Muon, Optimizer::AdamW].map(|o| programs(&m, &layout, o, DType::F32));
            for (muon, adamw) in muon.iter().zip(&adamw) {
                let hidden = muon
                    .groups
                    .iter()
                    .zip(&muon.group_buffers)
                    .filter(|(g, _)| g.key.role.is_hidden_matrix() && !g.key.bias);
                let spared: usize =
                    hidden.map(|(_, b)| (4 * b.owned.count).next_multiple_of(program::ALIGN)).sum();
                assert_eq!(adamw.memory.moments - muon.memory.moments, spared, "under {layout:?}");
                assert_eq!(
                    (adamw.memory.params, adamw.memory.grads),
                    (muon.memory.params, muon.memory.grads)
                );
            }
        }
    }
}

#[test]
fn ranks_that_shard_take_turns() {
    let m = mixture();
    for zero in [Zero::Optimizer, Zero::Parameters] {
        let layout = Layout { dp: 2, tp: 2, zero, ..Layout::default() };
        let mut done: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        let mut work = BTreeMap::new();
        for p in programs(&m, &layout, Optimizer::Muon, DType::F32) {
            for op in &p.blocks[p.tail].ops {
                let OpKind::Orthogonalise { matrices, shares } = &op.kind else { continue };
                let names: Vec<&str> = op.outs.iter().map(|v| p.buffer(v.buffer).name.as_str()).collect();
                for (name, shares) in names.iter().zip(shares) {
                    let whole = name.contains("experts") || name.contains("qkv");
                    assert_eq!(matches!(shares, Shares::Whole), whole, "{name}");
                }
                assert!(matrices.is_sorted_by_key(|m| !m.mine), "those of this rank come first");
                for m in matrices {
                    let name = format!("tp {} {} {}", p.coords.tp, names[m.of], m.row0);
                    done.entry(name).or_default().push(m.mine);
                }
                *work.entry(p.rank).or_insert(0) += op.cost.flops;
            }
        }
        // Experts are whole on every rank of a tensor group, whose shards they are too.
        for (name, mine) in done {
            let ranks = mine.iter().filter(|mine| **mine).count();
            assert!(ranks == 1 || name.contains("experts"), "{name}: {mine:?}");
        }
        let (least, most) = (work.values().min(), work.values().max());
        assert!(most.zip(least).is_some_and(|(most, least)| most < &(2 * least)), "{work:?}");
    }
}
