//! Where the estimator keeps a formula for speed, it is held to the program's own count: every term of memory, the
//! stages, the micro-batches in flight, ZeRO's shares and the bytes of every message, over random models and layouts.

use plan::calibration::PRIOR;
use std::collections::BTreeMap;

use plan::estimate::{Among, Estimator, MemoryUse, Problem};
use plan::network::Collective;
use plan::placement::Placement;
use plan::shape::{Shape, Sizes, dense};
use plan::software::Software;
use plan::template::{Key, Task, Template, tasks};
use program::{ALIGN, Axis, Members, Mode, Pass, Place, Program, Replication, Request, orders};
use proptest::prelude::*;
use spec::{
    Catalog, ContextMode, Experts, Layout, ModelSpec, Mtp, NumberFormat, PipelineSchedule, Recompute, Reduce,
    Zero,
};

const SEQUENCE: usize = 64;
/// Micro-batches of a rank.
const MICRO_BATCHES: usize = 8;

fn model(layers: usize, gated: bool, tied: bool, experts: bool) -> ModelSpec {
    let sizes =
        Sizes { layers, hidden: 64, ffn: 192, heads: 4, kv_heads: 4, head_dim: 16, vocab: 512, gated, tied };
    let mixture = Experts {
        count: 4,
        top_k: 2,
        ffn: 32,
        shared_ffn: 64,
        dense_layers: 0,
        every: 1,
        router: Default::default(),
    };
    ModelSpec { experts: (gated && experts).then_some(mixture), ..dense("small", sizes) }
}

/// With a module that predicts one token more, where the model can have one.
fn ahead(model: ModelSpec, ahead: bool) -> ModelSpec {
    let mtp = (ahead && !model.tied_embeddings).then_some(Mtp { weight: 0.3 });
    ModelSpec { mtp, ..model }
}

prop_compose! {
    fn layouts()(
        dp in 0u32..3, tp in 0u32..3, cp in 0u32..2, ep in 0u32..2, pp in 1usize..4, chunks in 1usize..3,
        zero in 0u8..4, schedule in 0usize..3, flag: bool, recompute in 0usize..3, micro_batch in 1usize..3,
        groups in 0u32..3, heads: bool,
    ) -> Layout {
        let chunks = if pp > 1 && MICRO_BATCHES.is_multiple_of(pp) { chunks } else { 1 };
        let plain =
            [PipelineSchedule::OneFOneB, PipelineSchedule::Gpipe, PipelineSchedule::ZeroBubble][schedule];
        let layout = Layout {
            dp: 1 << dp,
            tp: 1 << tp,
            cp: 1 << cp,
            // Of four heads.
            context: if heads && tp + cp < 3 { ContextMode::Heads } else { ContextMode::Ring },
            ep: if dp + cp + tp > 0 { 1 << ep } else { 1 },
            pp,
            chunks,
            schedule: if chunks > 1 { PipelineSchedule::Interleaved } else { plain },
            sequence_parallel: flag && tp > 0,
            zero: Zero::try_from(zero).unwrap(),
            recompute: [Recompute::None, Recompute::Selective, Recompute::Full][recompute],
            micro_batch,
            reduce: Reduce::Ring,
            ..Layout::default()
        };
        // Where ZeRO shards at all, over all of dp or over a part of it.
        let parts = Layout { shard: (zero > 0).then_some(layout.dp >> groups), ..layout.clone() };
        if parts.check_shard().is_ok() { parts } else { layout }
    }
}

fn memory(model: &ModelSpec, layout: &Layout, format: NumberFormat, micro_batches: usize) -> MemoryUse {
    let problem = problem(model, layout, micro_batches);
    let placement = Placement::of(layout.clone(), format);
    Estimator::new(&problem, format).unwrap().estimate(&placement).unwrap().memory
}

fn problem(model: &ModelSpec, layout: &Layout, micro_batches: usize) -> Problem {
    let cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(8)).unwrap();
    Problem {
        shape: Shape::from_model(model.clone()),
        cluster,
        software: Software::named("phalanx").unwrap(),
        constants: PRIOR,
        sequence: SEQUENCE,
        sequences: micro_batches * layout.dp * layout.micro_batch,
        optimizer: Default::default(),
    }
}

fn program(model: &ModelSpec, layout: &Layout, format: NumberFormat, rank: usize) -> Program {
    let request = Request {
        model,
        layout,
        sequence: SEQUENCE,
        sequences: MICRO_BATCHES * layout.dp * layout.micro_batch,
        precision: Placement::of(layout.clone(), format).precision(),
        rank,
        mode: Mode::Train,
        loss: Default::default(),
        recipe: Default::default(),
    };
    Program::build(&request, &|_, _| 0).unwrap()
}

/// Of the first rank of every stage.
fn programs(model: &ModelSpec, layout: &Layout, format: NumberFormat) -> Vec<Program> {
    (0..layout.pp).map(|stage| program(model, layout, format, stage * layout.stage_ranks())).collect()
}

/// Bytes of whole vectors in one step, by who says what.
type Spoken = BTreeMap<String, u64>;

/// What a program states for the ranks that hold the same parameters. Of owners, for its own shard.
fn stated(p: &Program, keep: impl Fn(Members) -> bool) -> Spoken {
    let mut spoken = Spoken::new();
    let items = p.schedule.iter().map(|item| item.block).chain([p.tail]);
    for comm in items.flat_map(|block| &p.blocks[block].ops).filter_map(|op| op.comm.as_ref()) {
        let what = match comm.what {
            program::Collective::AllReduce => Collective::AllReduce,
            program::Collective::AllGather => Collective::AllGather,
            program::Collective::ReduceScatter => Collective::ReduceScatter,
            _ => continue,
        };
        if comm.bytes() > 0 && keep(comm.members) {
            *spoken.entry(format!("{:?} {what:?}", comm.members)).or_default() += comm.bytes();
        }
    }
    spoken
}

/// The most micro-batches of which a stage still needs what forward left, all its chunks together counted as one.
fn in_flight(layout: &Layout) -> f64 {
    let orders = orders(layout.schedule, layout.pp, layout.chunks, MICRO_BATCHES);
    let split = orders.iter().flatten().any(|w| w.pass == Pass::Weight);
    let last = if split { Pass::Weight } else { Pass::Backward };
    let most = |order: &Vec<program::Work>| {
        let (mut now, mut most) = (0i64, 0);
        for work in order {
            now += i64::from(work.pass == Pass::Forward);
            most = most.max(now);
            now -= i64::from(work.pass == last);
        }
        most
    };
    orders.iter().map(most).max().unwrap_or(0) as f64 / layout.chunks as f64
}

/// Elements of the fullest stage, as the estimator counts it: as many layers as any has, and the larger table; elements
/// of that table; bytes by which buffers are set apart.
fn fullest(programs: &[Program]) -> (f64, f64, f64) {
    let len = |p: &Program, places: &dyn Fn(Place) -> bool| {
        p.groups.iter().filter(|g| places(g.key.place)).map(program::ParamGroup::len).sum::<usize>()
    };
    let layers = programs.iter().map(|p| len(p, &|p| matches!(p, Place::Layer(_)))).max();
    let tables = programs.iter().map(|p| len(p, &|p| !matches!(p, Place::Layer(_)))).max();
    let groups = programs.iter().map(|p| p.groups.len()).max();
    let sum = layers.unwrap_or(0) + tables.unwrap_or(0);
    (sum as f64, tables.unwrap_or(0) as f64, (groups.unwrap_or(0) * ALIGN) as f64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parameters_and_states_are_those_of_the_fullest_stage(
        layout in layouts(), layers in 6usize..9, gated: bool, tied: bool, experts: bool, wide: bool, mtp: bool,
    ) {
        let model = model(layers, gated, tied, experts);
        let layout = Layout { ep: if model.experts.is_some() { layout.ep } else { 1 }, ..layout };
        let model = ahead(model, mtp);
        let format = if wide { NumberFormat::Fp32 } else { NumberFormat::Bf16 };
        let programs = programs(&model, &layout, format);
        let (elements, table, slack) = fullest(&programs);
        let weight = if wide { 4.0 } else { 2.0 };
        let states = if wide { 8.0 } else { 12.0 };
        let whole = memory(&model, &Layout { zero: Zero::Off, ..layout.clone() }, format, MICRO_BATCHES);
        prop_assert_eq!(whole.params, weight * elements);
        prop_assert_eq!(whole.optimizer, states * elements);
        let sums = whole.grads / (4.0 * elements);
        prop_assert_eq!(sums, 3.0, "the counter over eight micro-batches has three digits");

        let m = memory(&model, &layout, format, MICRO_BATCHES);
        let most = |of: &dyn Fn(&program::Memory) -> usize| {
            programs.iter().map(|p| of(&p.memory)).max().unwrap_or(0) as f64
        };
        // The stage with the most layers need not have the larger table.
        if layout.zero == Zero::Off && layout.pp == 1 {
            prop_assert!((most(&|m| m.params) - m.params).abs() <= slack, "{m:?}");
            prop_assert!((most(&|m| m.master + m.moments) - m.optimizer).abs() <= 3.0 * slack, "{m:?}");
        } else if layout.zero == Zero::Off {
            prop_assert!(most(&|m| m.params) <= m.params + slack, "{m:?}");
            prop_assert!(m.params <= most(&|m| m.params) + weight * table, "{m:?}");
        }
        let shares = (m.optimizer, m.grads, m.params);
        let shared = layout.replicas() > 1 || model.experts.is_some() && layout.expert_replicas() > 1;
        let over = |stage: Zero| layout.zero >= stage && shared;
        prop_assert_eq!(over(Zero::Optimizer), shares.0 < whole.optimizer);
        prop_assert_eq!(over(Zero::Gradients), shares.1 < whole.grads);
        prop_assert_eq!(over(Zero::Parameters), shares.2 < whole.params);
        if model.experts.is_none() && over(Zero::Optimizer) {
            prop_assert_eq!(shares.0, whole.optimizer / layout.shards() as f64);
        }
    }

    #[test]
    fn micro_batches_in_flight_are_those_of_the_schedule(layout in layouts()) {
        let model = model(6, true, false, false);
        let layout = Layout { ep: 1, ..layout };
        let of = |n| memory(&model, &layout, NumberFormat::Bf16, n).activations;
        prop_assert!((of(MICRO_BATCHES) / of(1) - in_flight(&layout)).abs() < 1e-9, "{}", in_flight(&layout));
    }

    /// What the estimator charges for gradients and parameters of replicas, whatever ZeRO shards and over whom, is what
    /// the ranks that hold the same parameters say to each other in a step.
    #[test]
    fn replicas_are_charged_the_bytes_that_the_program_states(
        layout in layouts(), layers in 6usize..9, gated: bool, tied: bool, experts: bool, wide: bool,
        dense_layers in 0usize..3, vocab in 500usize..520, mtp: bool,
    ) {
        let mut model = ModelSpec { vocab, ..model(layers, gated, tied, experts) };
        if let Some(e) = &mut model.experts {
            e.dense_layers = dense_layers;
        }
        let layout = Layout { ep: if model.experts.is_some() { layout.ep } else { 1 }, ..layout };
        let model = ahead(model, mtp);
        let format = if wide { NumberFormat::Fp32 } else { NumberFormat::Bf16 };
        let problem = problem(&model, &layout, MICRO_BATCHES);
        let placement = Placement::of(layout.clone(), format);
        let mut estimator = Estimator::new(&problem, format).unwrap();
        for p in programs(&model, &layout, format) {
            let mut found = stated(&p, |m| matches!(m, Members::Replicas(_) | Members::Shards(_)));
            // Owners of other shards state theirs.
            for kind in [Replication::Data, Replication::Expert] {
                for rank in Members::Shards(kind).ranks(p.coords, &layout) {
                    let other = program(&model, &layout, format, rank);
                    for (who, bytes) in stated(&other, |m| m == Members::Owners(kind)) {
                        *found.entry(who).or_default() += bytes;
                    }
                }
            }
            let mut charged = Spoken::new();
            for said in estimator.replicas_say(&placement, p.coords.pp).unwrap() {
                let members = match said.among {
                    Among::Replicas => Members::Replicas(said.replication),
                    Among::Shards => Members::Shards(said.replication),
                    Among::Owners => Members::Owners(said.replication),
                };
                if members.ranks(p.coords, &layout).len() > 1 {
                    let bytes = said.bytes * said.times;
                    prop_assert_eq!(bytes.fract(), 0.0);
                    *charged.entry(format!("{members:?} {:?}", said.what)).or_default() += bytes as u64;
                }
            }
            prop_assert_eq!(charged, found, "stage {} of {:?}", p.coords.pp, layout);
        }
    }

    /// What the estimator charges a stage for is the activation that each of its messages to another carries.
    #[test]
    fn stages_are_charged_the_bytes_that_the_program_states(layout in layouts(), gated: bool, wide: bool) {
        let model = model(6, gated, false, false);
        let layout = Layout { ep: 1, ..layout };
        let format = if wide { NumberFormat::Fp32 } else { NumberFormat::Bf16 };
        let precision = Placement::of(layout.clone(), format).precision();
        let key = Key { precision, ..Key::of(&layout, SEQUENCE) };
        let charged = Template::build(&Shape::from_model(model.clone()), &key).unwrap().boundary_bytes;
        for p in programs(&model, &layout, format) {
            let said = p.blocks.iter().flat_map(|b| &b.ops).filter_map(|op| op.comm.as_ref());
            let between: Vec<u64> =
                said.filter(|c| c.members == Members::Axis(Axis::Pp)).map(program::Comm::bytes).collect();
            prop_assert_eq!(between.is_empty(), layout.pp == 1);
            prop_assert!(between.iter().all(|b| *b as f64 == charged), "{:?} {}", between, charged);
        }
    }

    /// What the estimator charges for messages inside layers is what the ranks of the group give to each other.
    #[test]
    fn messages_are_charged_the_bytes_that_the_program_states(
        layout in layouts(), gated: bool, experts: bool, mtp: bool,
    ) {
        let model = model(6, gated, false, experts);
        let layout = Layout { ep: if model.experts.is_some() { layout.ep } else { 1 }, ..layout };
        let model = ahead(model, mtp);
        for p in programs(&model, &layout, NumberFormat::Bf16) {
            for op in p.blocks.iter().flat_map(|b| &b.ops) {
                let charged: f64 = tasks(&p, op).iter().map(|t| match *t {
                    Task::Talk { what: Collective::AllReduce, bytes, .. } => 2.0 * bytes,
                    Task::Talk { bytes, .. } => bytes,
                    _ => 0.0,
                }).sum();
                let Some(comm) = &op.comm else {
                    prop_assert_eq!(charged, 0.0, "{}", op.name);
                    continue;
                };
                if !matches!(comm.members, Members::Axis(Axis::Tp | Axis::Cp | Axis::Ep)) {
                    prop_assert_eq!(charged, 0.0, "{}", op.name);
                    continue;
                }
                let n = comm.members.ranks(p.coords, &p.layout).len();
                let stated: u64 = (0..n).map(|i| comm.sent_bytes(i, n)).sum();
                prop_assert_eq!(charged * (n - 1) as f64, stated as f64, "{} {:?}", op.name, comm.what);
            }
        }
    }
}
