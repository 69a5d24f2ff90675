//! The table as text, and estimates from tables that are made up so that the sums are known.

use std::collections::BTreeMap;

use program::{OpKind, Program, Recipe};
use spec::{ContextMode, DType, Kind, Layout, ModelSpec, PipelineSchedule, Recompute, Zero};

use super::*;
use crate::search::{lacking, search};
use crate::table::{KernelKey, LinkKey, Machine, Message, Sample};

/// Every kernel runs at `rate`, every message takes `message_s`.
fn machine(rate: f64, message_s: f64) -> Machine {
    const KINDS: [&str; 27] = [
        "adamw",
        "add",
        "add_bias",
        "attention",
        "attention_grad",
        "bias_grad",
        "embed",
        "embed_grad",
        "gelu",
        "gelu_grad",
        "grad_norm",
        "layer_norm",
        "layer_norm_grad_input",
        "layer_norm_grad_weight",
        "linear",
        "linear_grad_input",
        "linear_grad_weight",
        "loss_sum",
        "norm",
        "norm_grad_input",
        "norm_grad_weight",
        "pos_grad",
        "rope",
        "shard_grads",
        "swiglu",
        "swiglu_grad",
        "xent",
    ];
    let mut kinds = KINDS.to_vec();
    kinds.extend(["tie_grads", "xent_combine", "xent_grad", "xent_stats"]);
    kinds.extend(["route", "route_grad", "permute", "permute_grad", "unpermute", "unpermute_grad", "slice"]);
    kinds.extend(["grouped_linear", "grouped_linear_grad_input", "grouped_linear_grad_weight"]);
    kinds.extend(["split_heads", "join_heads"]);
    let key = |kind: &str| KernelKey {
        kind: kind.into(),
        storage: "f32".into(),
        at: Conditions { threads: 1, beside: 1 },
    };
    let sample = Sample { shape: [64.0, 64.0, 64.0], per_s: rate };
    let link = |op: &str| LinkKey { transport: "shm".into(), op: op.into(), ranks: 2 };
    let message = Message { bytes: 1e12, s: message_s };
    Machine {
        host: "test".into(),
        cpu: "made up".into(),
        cores: 64,
        memory_bytes: 1 << 34,
        phalanx: "0.1.0".into(),
        measured: "2026-01-01T00:00:00Z".into(),
        op_gap_s: 0.0,
        spread: 0.1,
        crowding: 1.0,
        kernels: kinds.iter().map(|k| (key(k), vec![sample])).collect(),
        links: ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
            .iter()
            .map(|op| (link(op), vec![message]))
            .collect(),
    }
}

fn tiny() -> ModelSpec {
    ModelSpec::preset("tiny").expect("a preset")
}

/// Experts of which two ranks hold whole chunks of the gradient norm each.
fn mixture() -> ModelSpec {
    let (count, top_k, ffn) = (4, 2, 128);
    let router = spec::Router::PLAIN;
    let experts = spec::Experts { count, top_k, ffn, shared_ffn: 0, dense_layers: 1, every: 1, router };
    ModelSpec { experts: Some(experts), ..tiny() }
}

fn no_workspace(_: &Op, _: &Program, _: usize) -> usize {
    0
}

fn load(model: &ModelSpec) -> Workload<'_> {
    Workload {
        model,
        sequence: 16,
        sequences: 8,
        precision: DType::F32,
        recipe: Recipe::default(),
        experts: None,
        threads: 1,
        transport: "shm",
        workspace: no_workspace,
    }
}

/// The work of a step, counted apart from the estimate: every run of every op.
fn work(model: &ModelSpec, layout: &Layout, rank: usize) -> f64 {
    let p = program_of(&load(model), layout, rank).expect("a program");
    let runs = p.schedule.iter().map(|i| i.block).chain([p.tail]);
    runs.flat_map(|b| &p.blocks[b].ops).filter_map(|op| kernel(op, &p)).map(|k| k.work).sum()
}

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= 1e-9 * expected.abs(), "{found}, expected {expected}");
}

#[test]
fn a_step_alone_takes_the_sum_of_its_work_over_the_rates() {
    let model = tiny();
    for layout in [
        Layout::default(),
        Layout { micro_batch: 8, ..Layout::default() },
        Layout { micro_batch: 2, recompute: Recompute::Full, ..Layout::default() },
    ] {
        let found = estimate(&machine(1e9, 1.0), &load(&model), &layout).expect("an estimate");
        close(found.step_s, work(&model, &layout, 0) / 1e9);
        close(found.ranks[0].ops.iter().map(|o| o.s).sum(), found.step_s);
        assert!(found.low_s < found.step_s && found.step_s < found.high_s);
        assert_eq!(found.ranks[0].exposed_comm_s, 0.0);
    }
}

#[test]
fn a_gap_between_ops_counts_once_for_every_run() {
    let model = tiny();
    let with_gap = Machine { op_gap_s: 1e-3, ..machine(1e9, 1.0) };
    let found = estimate(&with_gap, &load(&model), &Layout::default()).expect("an estimate");
    let runs: usize = found.ranks[0].ops.iter().map(|o| o.runs).sum();
    close(found.step_s, work(&model, &Layout::default(), 0) / 1e9 + 1e-3 * runs as f64);
}

#[test]
fn data_parallel_ranks_halve_the_work_and_pay_for_messages() {
    let model = tiny();
    let layout = Layout { dp: 2, micro_batch: 4, ..Layout::default() };
    let free = estimate(&machine(1e9, 1e-30), &load(&model), &layout).expect("an estimate");
    close(free.step_s, work(&model, &layout, 0).max(work(&model, &layout, 1)) / 1e9);
    // Messages that take longer than all the compute cannot hide behind it.
    let dear = estimate(&machine(1e9, 1e9), &load(&model), &layout).expect("an estimate");
    assert!(dear.step_s > 2.0 * free.step_s);
    let exposed = dear.ranks[0].exposed_comm_s;
    assert!(exposed > 0.0 && exposed < dear.step_s, "{exposed} of {}", dear.step_s);
}

#[test]
fn every_layout_is_estimated_and_faster_machines_are_never_slower() {
    let model = tiny();
    let base = Layout::default();
    for layout in [
        base.clone(),
        Layout { dp: 2, zero: Zero::Optimizer, ..base.clone() },
        Layout { dp: 2, zero: Zero::Gradients, ..base.clone() },
        Layout { dp: 4, zero: Zero::Parameters, ..base.clone() },
        Layout { tp: 2, ..base.clone() },
        Layout { tp: 2, sequence_parallel: true, ..base.clone() },
        Layout { pp: 2, ..base.clone() },
        Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..base.clone() },
        Layout { dp: 2, pp: 2, schedule: PipelineSchedule::Gpipe, ..base.clone() },
        Layout { cp: 2, ..base.clone() },
        Layout { cp: 2, context: ContextMode::Heads, dp: 2, zero: Zero::Parameters, ..base.clone() },
        Layout { dp: 2, tp: 2, pp: 2, zero: Zero::Optimizer, ..base },
    ] {
        let at = |rate: f64, message_s: f64, cores: usize| {
            let m = Machine { cores, ..machine(rate, message_s) };
            estimate(&m, &load(&model), &layout).unwrap_or_else(|e| panic!("{layout:?}: {e}")).step_s
        };
        let usual = at(1e9, 1e3, 64);
        assert!(usual.is_finite() && usual > 0.0, "{layout:?}");
        assert!(at(2e9, 1e3, 64) <= usual, "faster kernels: {layout:?}");
        assert!(at(1e9, 5e2, 64) <= usual, "faster messages: {layout:?}");
        assert!(at(1e9, 1e3, 1) >= usual, "fewer cores: {layout:?}");
        let busiest = (0..layout.world()).map(|r| work(&model, &layout, r) / 1e9).fold(0.0, f64::max);
        assert!(usual >= busiest * (1.0 - 1e-9), "never under its own work: {layout:?}");
    }
}

#[test]
fn memory_is_that_of_the_placed_program_of_every_rank() {
    let base = Layout::default();
    for (model, layout) in [
        (tiny(), Layout { dp: 2, pp: 2, zero: Zero::Optimizer, ..base.clone() }),
        (tiny(), Layout { cp: 4, ..base.clone() }),
        (tiny(), Layout { cp: 2, context: ContextMode::Heads, zero: Zero::Optimizer, ..base.clone() }),
        (mixture(), Layout { dp: 2, ep: 2, zero: Zero::Parameters, ..base }),
    ] {
        let found = estimate(&machine(1e9, 1.0), &load(&model), &layout).expect("an estimate");
        for (rank, r) in found.ranks.iter().enumerate() {
            let placed = program_of(&load(&model), &layout, rank).expect("a program").memory.total;
            assert_eq!(r.memory_bytes, placed, "rank {rank} of {layout:?}");
        }
        assert_eq!(found.total_bytes(), found.ranks.iter().map(|r| r.memory_bytes).sum::<usize>());
    }
}

/// A rank to whose experts twice as many rows come has twice their work, and everybody waits for it.
#[test]
fn uneven_experts_take_the_time_of_the_busiest_rank() {
    let model = mixture();
    let layout = Layout { dp: 2, ep: 2, ..Layout::default() };
    let m = machine(1e9, 1e-30);
    // Layer 0 has none.
    let at = |shares: [f64; 4]| {
        let shares = [vec![], shares.to_vec()];
        let load = Workload { experts: Some(&shares), ..load(&model) };
        estimate(&m, &load, &layout).expect("an estimate").step_s
    };
    let even = estimate(&m, &load(&model), &layout).expect("an estimate").step_s;
    close(at([0.25; 4]), even);
    close(at([0.4, 0.1, 0.3, 0.2]), even);
    let p = program_of(&load(&model), &layout, 0).expect("a program");
    let runs = p.schedule.iter().flat_map(|i| &p.blocks[i.block].ops);
    let of_experts = runs.filter(|op| op.name.contains(".experts.")).filter_map(|op| kernel(op, &p));
    let grouped: f64 = of_experts.map(|k| k.work).sum::<f64>() / 1e9;
    assert!(grouped > 0.1 * even);
    // Ranks differ in little else.
    for (shares, more) in [([0.5, 0.25, 0.125, 0.125], 0.5), ([0.0, 0.0, 0.0, 1.0], 1.0)] {
        let found = (at(shares) - even) / grouped;
        assert!((found - more).abs() < 0.02, "{found} for {shares:?}, expected {more}");
    }
}

/// Rows are estimated as they come, not as there is room for, and messages by the rank that most come to.
#[test]
fn experts_are_estimated_by_the_rows_that_come() {
    let model = mixture();
    for (layout, room) in [
        (Layout::default(), 1.0),
        (Layout { dp: 2, ep: 2, ..Layout::default() }, 2.0),
        (Layout { dp: 4, ep: 4, ..Layout::default() }, 2.0),
    ] {
        let p = program_of(&load(&model), &layout, 0).expect("a program");
        let ops = || p.blocks.iter().flat_map(|b| &b.ops);
        let copies = 16.0 * 2.0;
        for op in ops().filter(|op| op.name.ends_with("experts.act") || op.name.ends_with("experts.act.dx")) {
            let k = kernel(op, &p).expect("a kernel");
            assert_eq!((k.shape[0], op.ins[0].rows as f64), (copies, room * copies), "{}", op.name);
            assert_eq!(k.work * room, op.cost.bytes as f64, "{}", op.name);
        }
        let shares = [vec![], vec![0.7, 0.1, 0.1, 0.1]];
        let most = [1.0, 1.6, 2.8][layout.ep / 2];
        let mut said = 0;
        for op in ops().filter(|op| matches!(op.kind, OpKind::AllToAll { .. })) {
            for message in &op.comm.as_ref().expect("ranks talk").messages {
                let rows = message.dtype == DType::F32;
                close(experts::busiest(&shares, op, message, &p), if rows { most } else { 1.0 });
                said += 1;
            }
        }
        assert_eq!(said > 0, layout.ep > 1);
    }
}

#[test]
fn ops_keep_their_ids_and_counts() {
    let model = tiny();
    let layout = Layout { pp: 2, micro_batch: 2, ..Layout::default() };
    let found = estimate(&machine(1e9, 1.0), &load(&model), &layout).expect("an estimate");
    for (rank, r) in found.ranks.iter().enumerate() {
        let p = program_of(&load(&model), &layout, rank).expect("a program");
        let mut runs: BTreeMap<_, usize> = BTreeMap::new();
        for b in p.schedule.iter().map(|i| i.block).chain([p.tail]) {
            p.blocks[b].ops.iter().for_each(|op| *runs.entry(op.id).or_default() += 1);
        }
        let found: BTreeMap<_, usize> = r.ops.iter().map(|o| (o.id, o.runs)).collect();
        assert_eq!(found, runs);
    }
}

#[test]
fn the_search_takes_the_fastest_that_keeps_the_bits_and_is_the_same_every_time() {
    let model = tiny();
    // Cheap messages make two ranks twice as fast; tensor parallelism would be as fast, with other bits.
    let m = machine(1e9, 1e-30);
    let found = search(&m, &load(&model), 2).expect("a choice");
    assert_eq!(found.best[0].layout.tp, 1);
    assert!(found.best.windows(2).all(|w| w[0].step_s <= w[1].step_s));
    assert!(found.layouts_estimated > 10);
    let again = search(&m, &load(&model), 2).expect("a choice");
    assert_eq!(found.best[0].layout, again.best[0].layout);
    assert_eq!(found.best[0].step_s.to_bits(), again.best[0].step_s.to_bits());
    for c in &found.best {
        c.layout.validate(&model, 8, 16).expect("a layout that trains");
        c.layout.validate_world(2).expect("two ranks");
        assert!(c.total_bytes < m.memory_bytes);
    }
    // A program that stands for several ranks' gives the estimate of all their own.
    for ranks in [4, 8] {
        for c in search(&m, &load(&model), ranks).expect("a choice").best {
            let exact = estimate(&m, &load(&model), &c.layout).expect("an estimate");
            assert!((c.step_s / exact.step_s - 1.0).abs() < 0.05, "{:?}", c.layout);
        }
    }
    // Experts are spread where that keeps the bits; sequences are cut where nothing else is left.
    let moe = mixture();
    let all = search::axes(&load(&moe), 2);
    let has =
        |cp: usize, ep: usize, context| all.iter().any(|l| (l.cp, l.ep, l.context) == (cp, ep, context));
    let (ring, heads) = (ContextMode::Ring, ContextMode::Heads);
    assert!(has(1, 2, ring) && has(2, 1, heads) && has(2, 2, ring) && !has(1, 2, heads));
    assert_eq!(search(&m, &load(&moe), 2).expect("a choice").best[0].layout.cp, 1);
    let one = ModelSpec { layers: 1, heads: 3, kv_heads: 1, ..tiny() };
    let one_sequence = Workload { sequences: 1, ..load(&one) };
    let cut = search(&m, &one_sequence, 2).expect("a choice");
    assert_eq!((cut.best[0].layout.cp, cut.faster_with_other_bits.is_none()), (2, true));
    // A file from before heads were dealt estimates all else.
    let mut older = machine(1e9, 1e-30);
    older.links.retain(|k, _| k.op != "all_to_all");
    let found = search(&older, &load(&model), 2).expect("a choice");
    assert!(found.not_measured > 0 && found.layouts_estimated > found.not_measured);
    assert_eq!(found.lacks, ["all_to_all"].into());
    // Where one rank alone must do, there is nothing to share.
    assert_eq!(search(&m, &load(&model), 1).expect("a choice").best[0].layout.world(), 1);
}

/// What is to be measured first is what the search would go without.
#[test]
fn what_a_calibration_lacks_is_what_the_search_goes_without() {
    let full = machine(1e9, 1e-30);
    for model in [tiny(), mixture()] {
        let load = load(&model);
        assert_eq!(lacking(&full, &load, 4).expect("programs"), [].into());
        for lost in
            ["all_to_all", "send", "split_heads", "shard_grads", "xent_combine", "route", "slice", "norm"]
        {
            let mut m = machine(1e9, 1e-30);
            m.links.retain(|k, _| k.op != lost);
            m.kernels.retain(|k, _| k.kind != lost);
            let lacks = lacking(&m, &load, 4).expect("programs");
            match search(&m, &load, 4) {
                Ok(found) => {
                    assert_eq!((found.lacks, found.not_measured > 0), (lacks.clone(), !lacks.is_empty()))
                }
                Err(e) => {
                    assert!(e.to_string().ends_with(&format!("knows nothing of {lost}")), "{lost}: {e}")
                }
            }
            assert_eq!(
                lacks.is_empty(),
                model.experts.is_none() && ["route", "slice"].contains(&lost),
                "{lost}"
            );
        }
    }
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let model = tiny();
    let small = Machine { memory_bytes: 1 << 18, ..machine(1e9, 1.0) };
    let e = search(&small, &load(&model), 1).expect_err("no room");
    assert!(e.to_string().starts_with("no layout of 1 ranks fits: the smallest takes"), "{e}");
    let e = search(&machine(1e9, 1.0), &load(&model), 7).expect_err("seven divides nothing");
    assert!(e.to_string().starts_with("no layout of 7 ranks trains tiny: "), "{e}");
    assert!(e.hint_text().is_some());
    let mut lacks = machine(1e9, 1.0);
    lacks.kernels.retain(|k, _| k.kind != "linear");
    let e = estimate(&lacks, &load(&model), &Layout::default()).expect_err("no products");
    assert_eq!(
        (e.to_string().as_str(), e.kind()),
        ("the calibration of test knows nothing of linear", Kind::User)
    );
}

#[test]
fn kernels_are_told_apart_from_words() {
    let model = tiny();
    let p = program_of(&load(&model), &Layout { dp: 2, ..Layout::default() }, 0).expect("a program");
    for op in p.blocks.iter().flat_map(|b| &b.ops) {
        let silent = kernel(op, &p).is_some();
        assert_eq!(silent, !op.only_talks(), "{}", op.name);
        if let OpKind::AdamW { .. } = op.kind {
            let k = kernel(op, &p).expect("a kernel");
            assert_eq!(k.work, 28.0 * k.shape[0]);
        }
    }
}

#[test]
fn the_file_reads_back() {
    let m = machine(1.25e9, 1e-5);
    assert_eq!(Machine::parse("machine.toml", &m.to_toml()).expect("its own text"), m);
}

#[test]
fn a_bad_file_is_refused_with_its_line() {
    let good = machine(1e9, 1.0).to_toml();
    let check = |text: &str, expected: &str| {
        let e = Machine::parse("m.toml", text).expect_err(expected);
        assert!(e.to_string().starts_with(expected), "found    {e}\nexpected {expected}");
        assert_eq!(
            (e.kind(), e.hint_text()),
            (Kind::User, Some("measure this machine again: phalanx bench machine"))
        );
    };
    let swap = |from: &str, to: &str| good.replacen(from, to, 1);
    check("", "m.toml:1: version is missing in the file");
    check("version = \n", "m.toml:1: not TOML, or cut short: ");
    check(&swap("version = 1", "version = 2"), "m.toml:2: version, expected 1");
    check(&swap("cores = 64", "cores = 0"), "m.toml:9: cores = 0, expected a whole number from 1");
    check(&swap("cores = 64", "cores = \"64\""), "m.toml:9: cores, expected a whole number from 0");
    check(&swap("spread = 0.1000", "spread = -1.0"), "m.toml:12: spread, expected a finite number from 0");
    check(&swap("spread = 0.1000", "spread = inf"), "m.toml:12: spread, expected a finite number from 0");
    check(
        &swap("crowding = 1.0000", "crowding = 0.5"),
        "m.toml:13: crowding, expected a finite number from 1",
    );
    check(&swap("host = ", "hast = "), "m.toml:5: unknown key hast in [machine]");
    for (rate, said) in
        [("nan", "NaN"), ("0.0", "0"), ("-1e9", "-1000000000"), ("inf", "inf"), ("\"x\"", "no number")]
    {
        let expected = format!("m.toml:24: rate of a sample is {said}, expected a finite number above 0");
        check(&swap("1.0000e9", rate), &expected);
    }
    check(&swap(", 1.0000e9]", "]"), "m.toml:24: a sample, expected [rows, a size, a size, a rate]");
    check(&swap("kind = \"adamw\"", "kind = \"add\""), "m.toml:27: this kernel is there twice");
    // Cut at the end of a table the rest is still TOML.
    let at = good.rfind("\n[[link]]").expect("a link");
    check(&good[..at], "m.toml:");
    assert!(
        Machine::parse("m", &good[..at]).expect_err("short").to_string().contains("cut short: 4 of 5 links")
    );
    check(&good[..good.len() - 10], "m.toml:");
}

/// What an op or a buffer is, is told by its type.
#[test]
fn other_names_change_no_number() {
    let m = machine(1e9, 1e-4);
    let zero3 = Layout { dp: 2, zero: Zero::Parameters, ..Layout::default() };
    let experts = Layout { dp: 2, pp: 2, ep: 2, ..Layout::default() };
    for (model, layout) in [
        (tiny(), Layout { tp: 2, dp: 2, micro_batch: 2, ..Layout::default() }),
        (tiny(), zero3),
        (tiny(), Layout { cp: 2, recompute: Recompute::Full, ..Layout::default() }),
        (mixture(), experts),
    ] {
        let load = load(&model);
        let mut programs: Vec<Program> =
            (0..layout.world()).map(|rank| program_of(&load, &layout, rank).expect("a program")).collect();
        let numbers = |programs: &[Program]| {
            let e = estimate_programs(&m, &load, &programs.iter().collect::<Vec<_>>()).expect("an estimate");
            let ranks: Vec<_> = e.ranks.iter().map(|r| (r.exposed_comm_s, r.ops.len())).collect();
            (e.step_s, e.low_s, e.high_s, ranks)
        };
        let named = numbers(&programs);
        for p in &mut programs {
            let ops = p.blocks.iter_mut().flat_map(|b| &mut b.ops).map(|op| &mut op.name);
            let names = ops.chain(p.buffers.iter_mut().map(|b| &mut b.name));
            let names = names.chain(p.groups.iter_mut().map(|g| &mut g.name));
            names.enumerate().for_each(|(i, name)| *name = format!("n{i}"));
        }
        assert_eq!(numbers(&programs), named, "{layout:?}");
    }
}
