//! Context parallelism: sequences cut over ranks train as whole ones do, within the tolerance that sums in another order
//! take, whatever else is spread; for a given cut, bits do not depend on stages, schedules or what is recomputed. Where
//! ranks deal heads, nothing but sums over the tokens of a sequence has another order.

mod common;

use std::collections::BTreeMap;

use comm::World;
use common::{Trained, fill, first_difference, inputs, latent, model, train, windowed};
use program::{Mode, Recipe, Request};
use spec::{
    ContextMode, DType, Experts, Layout, ModelSpec, NormKind, PipelineSchedule, Recompute, Router, RunSpec,
    Zero,
};
use train::{Executor, Mesh};

const SEQUENCES: usize = 8;
/// A rate at which training does not amplify the last bit of a sum a hundredfold in ten steps.
const LR: f64 = 1e-3;

fn run(m: &ModelSpec, layout: &Layout, precision: DType) -> Trained {
    train(m, layout, (SEQUENCES, precision, LR), &|exec| exec.initialise(m, 11).expect("weights"))
}

/// Losses within `loss`, gradient norms within `norm`, relatively.
#[track_caller]
fn close(got: &Trained, expected: &Trained, (loss, norm): (f64, f64), layout: &Layout) {
    assert!((got.eval / expected.eval - 1.0).abs() < loss, "evaluation under {layout:?}");
    for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
        let off = ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
        assert!(off.0 < loss && off.1 < norm, "step {}: {a:?} against {b:?} under {layout:?}", k + 1);
    }
}

fn models() -> [ModelSpec; 3] {
    [model(4, false, false), model(4, true, false), model(4, true, true)]
}

/// Cuts of the sequence, with every other axis beside them.
fn layouts() -> Vec<Layout> {
    let one = Layout::default();
    let zero3 = Layout { zero: Zero::Parameters, ..one.clone() };
    let stages = Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..one.clone() };
    vec![
        Layout { cp: 2, ..one.clone() },
        Layout { cp: 4, micro_batch: 2, ..one.clone() },
        Layout { cp: 8, ..one.clone() },
        Layout { cp: 2, dp: 2, zero: Zero::Optimizer, micro_batch: 4, ..one.clone() },
        Layout { cp: 2, dp: 4, zero: Zero::Gradients, shard: Some(2), ..one.clone() },
        Layout { cp: 2, tp: 2, recompute: Recompute::Selective, ..one },
        Layout { cp: 2, tp: 2, sequence_parallel: true, ..zero3.clone() },
        Layout { cp: 2, dp: 2, recompute: Recompute::Full, ..zero3 },
        Layout { cp: 2, ..stages.clone() },
        Layout { cp: 2, tp: 2, sequence_parallel: true, zero: Zero::Optimizer, ..stages },
    ]
}

/// The same where ranks deal heads, of which the models have four.
fn by_heads() -> Vec<Layout> {
    let fits = layouts().into_iter().filter(|l| 4usize.is_multiple_of(l.cp * l.tp));
    fits.map(|l| Layout { context: ContextMode::Heads, ..l }).collect()
}

fn all_layouts() -> Vec<Layout> {
    let all = [layouts(), by_heads()].concat();
    assert_eq!(all.len(), 2 * layouts().len() - 1, "eight ranks have no four heads");
    all
}

#[test]
fn agree_with_whole_sequences() {
    for (i, m) in models().iter().enumerate() {
        let expected = run(m, &Layout::default(), DType::F32);
        // All cells of one model, and of the others each third; by heads half as many.
        let by_heads = by_heads().into_iter().skip(i % 2).step_by(2);
        for layout in layouts().into_iter().chain(by_heads).skip(i).step_by(if i == 0 { 1 } else { 3 }) {
            close(&run(m, &layout, DType::F32), &expected, (1e-5, 1e-3), &layout);
        }
    }
}

#[test]
fn agree_in_bf16() {
    for (i, m) in models().iter().enumerate() {
        let expected = run(m, &Layout::default(), DType::Bf16);
        for layout in all_layouts().into_iter().skip(i).step_by(5) {
            close(&run(m, &layout, DType::Bf16), &expected, (2e-3, 2e-2), &layout);
        }
    }
}

#[test]
fn agree_with_experts() {
    let router = Router { z_loss: 0.05, ..Router::PLAIN };
    let experts = Experts { count: 4, top_k: 2, ffn: 128, shared_ffn: 24, dense_layers: 1, every: 1, router };
    let m = ModelSpec { experts: Some(experts), ..model(2, false, false) };
    assert_eq!(m.norm, NormKind::Rms);
    let expected = run(&m, &Layout::default(), DType::F32);
    for (dp, ep, tp, zero) in
        [(1, 1, 1, Zero::Off), (1, 2, 1, Zero::Off), (2, 4, 1, Zero::Parameters), (1, 2, 2, Zero::Optimizer)]
    {
        for context in [ContextMode::Ring, ContextMode::Heads] {
            let layout = Layout { cp: 2, context, dp, ep, tp, zero, ..Layout::default() };
            let got = run(&m, &layout, DType::F32);
            close(&got, &expected, (1e-5, 1e-3), &layout);
            let total = |t: &Trained| t.experts.as_ref().expect("counts").iter().sum::<f64>();
            assert_eq!(total(&got), total(&expected), "every copy counts once under {layout:?}");
        }
    }
}

/// What is the same op in the same order has the same bits: twice, over stages, schedules, micro-batches and recompute.
#[test]
fn bits_of_a_cut_do_not_depend_on_what_does_not_cut_it() {
    let m = model(4, true, false);
    let contexts = [ContextMode::Ring, ContextMode::Heads];
    for (precision, context) in [DType::F32, DType::Bf16].into_iter().flat_map(|p| contexts.map(|c| (p, c))) {
        let cut = Layout { cp: 2, context, ..Layout::default() };
        let expected = run(&m, &cut, precision);
        let pipeline = |schedule| Layout { pp: 2, schedule, ..cut.clone() };
        for layout in [
            cut.clone(),
            Layout { micro_batch: 4, ..cut.clone() },
            Layout { recompute: Recompute::Full, ..cut.clone() },
            Layout { zero: Zero::Optimizer, ..cut.clone() },
            pipeline(PipelineSchedule::Gpipe),
            pipeline(PipelineSchedule::OneFOneB),
            pipeline(PipelineSchedule::ZeroBubble),
        ] {
            let got = run(&m, &layout, precision);
            assert_eq!((got.outputs, got.eval), (expected.outputs.clone(), expected.eval), "{layout:?}");
            if let Some(difference) = first_difference(&expected.weights, &got.weights) {
                panic!("{difference} under {layout:?} in {precision}");
            }
        }
    }
}

/// A step's loss before any update, as f64, and gradients as bits, all of each parameter on the first rank.
fn first_step(
    m: &ModelSpec,
    layout: &Layout,
    sequences: usize,
    precision: DType,
) -> (f64, BTreeMap<String, Vec<u32>>) {
    let worlds = World::threads(layout.world()).expect("ranks");
    let rank = |world: World| {
        let rank = world.rank();
        let mesh = Mesh::new(world, layout).expect("groups");
        let request = Request {
            model: m,
            layout,
            sequence: common::SEQUENCE,
            sequences,
            precision,
            rank,
            mode: Mode::Train,
            loss: Default::default(),
            recipe: Recipe { documents: m.sinks, ..Recipe::default() },
        };
        let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
        exec.initialise(m, 11).expect("weights");
        let valid = fill(&mut exec, m.vocab, 1);
        let loss = exec.step(&inputs(1, valid)).expect("a step").loss;
        let mut all = BTreeMap::new();
        exec.each_grad(&mut |part, values| {
            all.insert(part.name.clone(), values.iter().map(|x| x.to_bits()).collect());
        })
        .expect("on this machine");
        (loss, all)
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(|| rank(world))).collect();
        let mut all: Vec<_> = ranks.into_iter().map(|r| r.join().expect("a rank")).collect();
        all.swap_remove(0)
    })
}

/// With heads dealt every token has the loss of a layout without the cut, to the last bit, and f64 adds them exactly.
#[test]
fn the_first_loss_has_the_bits_of_whole_sequences_where_heads_are_dealt() {
    let heads = Layout { cp: 2, context: ContextMode::Heads, ..Layout::default() };
    for m in [model(3, true, false), model(3, true, true), windowed(), latent()] {
        for precision in [DType::F32, DType::Bf16] {
            let loss = |layout: &Layout| first_step(&m, layout, SEQUENCES, precision).0;
            let expected = loss(&Layout::default());
            for layout in [
                heads.clone(),
                Layout { cp: 4, micro_batch: 2, recompute: Recompute::Full, ..heads.clone() },
                Layout { pp: 3, zero: Zero::Gradients, micro_batch: 2, ..heads.clone() },
            ] {
                assert_eq!(loss(&layout), expected, "{} in {precision} under {layout:?}", m.name);
            }
            let cut = Layout { tp: 2, sequence_parallel: true, ..heads.clone() };
            assert_eq!(loss(&cut), loss(&Layout { cp: 1, ..cut.clone() }), "{} in {precision}", m.name);
            // A ring adds in another order: the above does not hold for nothing.
            let ring = Layout { cp: 4, ..Layout::default() };
            assert!(precision == DType::Bf16 || loss(&ring) != expected, "{}", m.name);
        }
    }
}

/// So have gradients that are sums over no tokens of a sequence: of learned positions, of sinks, and the rows of the
/// embedding for tokens that occur once, to which the whole backward pass leads.
#[test]
fn gradients_that_add_no_tokens_have_the_bits_of_whole_sequences_where_heads_are_dealt() {
    let check = |m: &ModelSpec, cp: usize, all_of: &[&str]| {
        let layout = Layout { cp, context: ContextMode::Heads, ..Layout::default() };
        let of = |layout: &Layout| first_step(m, layout, 1, DType::F32).1;
        let (found, expected) = (of(&layout), of(&Layout::default()));
        for (name, bits) in expected.iter().filter(|(name, _)| all_of.iter().any(|of| name.contains(of))) {
            assert_eq!(found[name], *bits, "{name} of {} over {cp} ranks", m.name);
        }
        let tokens: Vec<u32> = (0..common::SEQUENCE).map(|i| common::token(1, 0, i, m.vocab)).collect();
        let once = |t: &&u32| tokens.iter().filter(|other| other == t).count() == 1;
        let rows = |of: &BTreeMap<String, Vec<u32>>| -> Vec<Vec<u32>> {
            let table = &of["embed.weight"];
            tokens.iter().filter(once).map(|t| table[*t as usize * m.hidden..][..m.hidden].to_vec()).collect()
        };
        assert!(rows(&expected).len() > 8 && rows(&expected) == rows(&found), "{} over {cp} ranks", m.name);
    };
    check(&model(3, false, false), 2, &[]);
    check(&ModelSpec { tied_embeddings: false, ..model(3, false, true) }, 4, &["pos"]);
    check(&windowed(), 2, &["sinks"]);
    check(&latent(), 4, &[]);
}

#[track_caller]
fn refused(sets: &str, message: &str, hint: &str) {
    let sets: Vec<String> = sets.split(' ').map(str::to_owned).collect();
    let found = RunSpec::load(None, &sets, &RunSpec::no_files)
        .and_then(|run| {
            let b = &run.batch;
            run.layout.validate(&run.model, b.sequences, b.sequence)?;
            train::check_run(&train::Cpu::new(1), &run)
        })
        .expect_err(message);
    assert!(found.to_string().contains(message), "{found}");
    let hint_text = found.hint_text().unwrap_or_default();
    assert!(hint_text.contains(hint) && found.exit_code() == 2, "{hint_text}");
}

#[test]
fn what_does_not_fit_is_refused() {
    refused(
        "layout.cp=3 batch.sequence=256",
        "layout.cp = 3 cuts a sequence into 6 pieces, which do not divide its 256 tokens",
        "values of layout.cp that work: 1, 2, 4, 8, 16, 32, 64, 128",
    );
    refused(
        "layout.cp=4 layout.context=heads batch.sequence=256",
        "layout.context = \"heads\" with layout.cp = 4 does not divide the 6 query heads of llama-tiny-ref",
        "values of layout.cp that work: 1, 2; or layout.context=ring",
    );
    refused(
        "layout.cp=3 layout.context=heads batch.sequence=256",
        "layout.cp = 3 cuts a sequence into 3 pieces, which do not divide its 256 tokens",
        "values of layout.cp that work: 1, 2, 4, 8, 16, 32, 64, 128",
    );
    refused(
        "layout.cp=2 model.experts.count=4 model.experts.top_k=2 model.experts.ffn=128 model.experts.balance_loss=0.1",
        "model.experts.balance_loss with layout.cp = 2",
        "set layout.cp=1",
    );
}
