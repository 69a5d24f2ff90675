//! What attention sees beside all before a token: windows in some layers, sinks, and documents of its own alone. The bits
//! of any layout that keeps them, and the loss of those that cut heads or sequences.

mod common;

use std::collections::BTreeMap;

use comm::World;
use common::{Trained, document, first_difference, model, token, train_by};
use program::{Mode, Recipe, Request};
use spec::{
    Activation, ContextMode, DType, Experts, Latent, Layout, ModelSpec, PipelineSchedule, Recompute, Reduce,
    Router, Window, Zero,
};
use train::{Executor, Mesh, StepInputs};

const SEQUENCES: usize = 8;
const LR: f64 = 1e-3;

/// Windows in every other layer, and sinks in all.
fn windowed() -> ModelSpec {
    let window = Some(Window { tokens: 5, full_layers: 0, full_every: 2 });
    ModelSpec { window, sinks: true, ..model(4, true, false) }
}

fn run(m: &ModelSpec, layout: &Layout, precision: DType, documents: bool) -> Trained {
    let how = (SEQUENCES, precision, LR);
    train_by(Recipe { documents, ..Recipe::default() }, m, layout, how, &|exec| {
        exec.initialise(m, 11).expect("weights")
    })
}

/// Layouts that keep every bit.
fn layouts() -> Vec<Layout> {
    let one = Layout::default();
    let stages = Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..one.clone() };
    vec![
        Layout { dp: 2, zero: Zero::Optimizer, ..one.clone() },
        Layout { dp: 4, zero: Zero::Parameters, micro_batch: 2, ..one.clone() },
        Layout { micro_batch: 4, recompute: Recompute::Full, ..one.clone() },
        Layout { recompute: Recompute::Selective, ..one },
        Layout { dp: 2, zero: Zero::Gradients, ..stages.clone() },
        stages,
    ]
}

/// Layouts that agree within a tolerance.
fn cuts() -> Vec<Layout> {
    let one = Layout::default();
    vec![
        Layout { tp: 2, ..one.clone() },
        Layout { tp: 2, sequence_parallel: true, dp: 2, zero: Zero::Parameters, ..one.clone() },
        Layout { cp: 2, ..one.clone() },
        Layout { cp: 4, micro_batch: 2, recompute: Recompute::Full, ..one.clone() },
        Layout { cp: 2, tp: 2, pp: 2, sequence_parallel: true, zero: Zero::Optimizer, ..one.clone() },
        Layout {
            cp: 2,
            context: ContextMode::Heads,
            tp: 2,
            sequence_parallel: true,
            micro_batch: 2,
            ..one.clone()
        },
        Layout { cp: 4, context: ContextMode::Heads, dp: 2, zero: Zero::Parameters, ..one },
    ]
}

#[track_caller]
fn check(m: &ModelSpec, documents: bool) {
    check_in(m, documents, DType::F32, 1);
    check_in(m, documents, DType::Bf16, 3);
}

/// In one precision, by each so many of the layouts.
#[track_caller]
fn check_in(m: &ModelSpec, documents: bool, precision: DType, every: usize) {
    let expected = run(m, &Layout::default(), precision, documents);
    for layout in layouts().into_iter().step_by(every) {
        let got = run(m, &layout, precision, documents);
        assert_eq!((&got.outputs, got.eval), (&expected.outputs, expected.eval), "{layout:?}");
        if let Some(difference) = first_difference(&expected.weights, &got.weights) {
            panic!("{difference} under {layout:?} in {precision}");
        }
    }
    let bounds = if precision == DType::F32 { (1e-5, 1e-3) } else { (2e-3, 2e-2) };
    for layout in cuts().into_iter().step_by(every) {
        let got = run(m, &layout, precision, documents);
        assert!((got.eval / expected.eval - 1.0).abs() < bounds.0, "evaluation under {layout:?}");
        close(&got, &expected, bounds, &layout);
    }
}

/// Losses and norms of all steps, relatively.
#[track_caller]
fn close(got: &Trained, expected: &Trained, (loss, norm): (f64, f64), layout: &Layout) {
    for (a, b) in got.outputs.iter().zip(&expected.outputs) {
        let off = ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
        assert!(off.0 < loss && off.1 < norm, "{a:?} against {b:?} under {layout:?}");
    }
}

#[test]
fn windows_and_sinks_train_in_any_layout() {
    check(&windowed(), false);
}

#[test]
fn documents_train_in_any_layout() {
    check(&model(4, false, false), true);
}

/// GPT-OSS in all its parts: biases of experts and router, clamped gates, windows and sinks.
fn biased_experts(top_k: usize) -> ModelSpec {
    let router = Router { bias: true, ..Router::PLAIN };
    let experts = Experts { count: 4, top_k, ffn: 128, shared_ffn: 0, dense_layers: 0, every: 1, router };
    let activation = Activation::SwiGluClamped;
    let biased = ModelSpec { qkv_bias: true, attn_out_bias: true, mlp_bias: true, ..windowed() };
    ModelSpec { activation, experts: Some(experts), qk_norm: false, tied_embeddings: false, ..biased }
}

/// How many tokens each expert got in the first step, and every whole gradient of it, put together from its cuts.
fn first_step(m: &ModelSpec, layout: &Layout, precision: DType) -> (Vec<f64>, Gradients) {
    let rank = |world: World| {
        let rank = world.rank();
        let request = Request {
            model: m,
            layout,
            sequence: common::SEQUENCE,
            sequences: SEQUENCES,
            precision,
            rank,
            mode: Mode::Train,
            loss: Default::default(),
            recipe: Recipe::default(),
        };
        let mesh = Mesh::new(world, layout).expect("groups");
        let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
        exec.initialise(m, 11).expect("weights");
        let valid = common::fill(&mut exec, m.vocab, 1);
        exec.step(&common::inputs(1, valid)).expect("a step");
        let mut parts = Vec::new();
        exec.each_grad(&mut |part, values| parts.push((part.clone(), values.to_vec())))
            .expect("on this machine");
        (exec.expert_counts().expect("on this machine").expect("a mixture"), parts)
    };
    let worlds = World::threads(layout.world()).expect("ranks");
    let all: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(|| rank(world))).collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).collect()
    });
    let mut whole = Gradients::new();
    for (part, values) in all.iter().flat_map(|(_, parts)| parts) {
        let (rows, cols) = part.global;
        let to = whole.entry(part.name.clone()).or_insert_with(|| vec![f32::NAN; rows * cols]);
        for (i, row) in values.chunks_exact(part.cols).enumerate() {
            to[(part.row0 + i) * cols + part.col0..][..part.cols].copy_from_slice(row);
        }
    }
    (all[0].0.clone(), whole)
}

/// Nothing is counted twice where heads are cut, no bias, no sink, no router: what is left is rounding. In bf16 that turns
/// choices of experts, so that ranks that cut heads train another mixture step by step; with every expert chosen they do not.
#[test]
fn every_gradient_is_that_of_one_rank_but_for_choices_that_rounding_turns() {
    let cut = Layout { tp: 2, ..Layout::default() };
    let off = |top_k, precision| {
        let m = biased_experts(top_k);
        let ((counts, got), (expected_counts, expected)) =
            (first_step(&m, &cut, precision), first_step(&m, &Layout::default(), precision));
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let worst = expected.iter().map(|(name, e)| {
            let apart = norm(&mut got[name].iter().zip(e).map(|(a, b)| a - b));
            (apart / norm(&mut e.iter().copied()), name.clone())
        });
        (worst.max_by(|a, b| a.0.total_cmp(&b.0)).expect("parameters"), counts == expected_counts)
    };
    for (top_k, precision, bound) in [(2, DType::F32, 1e-5), (4, DType::Bf16, 5e-2)] {
        let ((worst, name), same_choices) = off(top_k, precision);
        assert!(worst < bound && same_choices, "{name} is off by {worst:e} of its norm in {precision}");
    }
    let (_, same_choices) = off(2, DType::Bf16);
    assert!(!same_choices, "rounding turned no choice: this model could be held to a bound in bf16 too");
}

#[test]
fn biased_experts_train_in_any_layout() {
    let m = biased_experts(2);
    check_in(&m, false, DType::F32, 2);
    // Where all experts are chosen, cut heads agree in bf16 too.
    check_in(&biased_experts(4), false, DType::Bf16, 2);
    // Experts that are spread: their biases are too few for a norm in chunks.
    let expected = run(&m, &Layout::default(), DType::F32, false);
    let spread = Layout { dp: 2, ep: 2, reduce: Reduce::Ring, ..Layout::default() };
    close(&run(&m, &spread, DType::F32, false), &expected, (1e-5, 1e-3), &spread);
}

#[test]
fn all_of_it_at_once_and_over_latents() {
    let m = windowed();
    check(&m, true);
    let latent = Latent { query_rank: Some(10), kv_rank: 12, nope_dim: 6, rope_dim: 4, value_dim: 8 };
    let kv_heads = m.heads;
    check(&ModelSpec { latent: Some(latent), kv_heads, qk_norm: false, ..m }, true);
}

/// What trains differs from what sees everything, so that none of the above holds for nothing.
#[test]
fn what_is_not_seen_changes_the_loss() {
    let plain = model(4, true, false);
    let of = |m: &ModelSpec, documents| run(m, &Layout::default(), DType::F32, documents).eval;
    let window = windowed().window;
    let all = of(&plain, false);
    assert_ne!(all, of(&plain, true));
    assert_ne!(all, of(&ModelSpec { window, ..plain.clone() }, false));
    assert_ne!(all, of(&ModelSpec { sinks: true, ..plain.clone() }, false));
    // A window as long as the sequence is none: the same ops, the same bits.
    let wide = Window { tokens: common::SEQUENCE, full_layers: 0, full_every: 0 };
    assert_eq!(all, of(&ModelSpec { window: Some(wide), ..plain }, false));
}

type Gradients = BTreeMap<String, Vec<f32>>;

/// Loss and gradients of some tokens of a sequence, as a share of `valid` targets.
fn gradients(m: &ModelSpec, tokens: std::ops::Range<usize>, documents: bool, valid: u64) -> (f64, Gradients) {
    let layout = Layout::default();
    let request = Request {
        model: m,
        layout: &layout,
        sequence: tokens.len(),
        sequences: 1,
        precision: DType::F32,
        rank: 0,
        mode: Mode::Train,
        loss: Default::default(),
        recipe: Recipe { documents, ..Recipe::default() },
    };
    let mut exec = Executor::new(&request, 1, Mesh::alone(), false).expect("a program");
    exec.initialise(m, 11).expect("weights");
    for (at, i) in tokens.enumerate() {
        exec.tokens()[at] = token(1, 0, i, m.vocab);
        exec.targets()[at] = token(1, 0, i + 1, m.vocab);
        if documents {
            exec.starts()[at] = document(1, 0, i);
        }
    }
    let out = exec.step(&StepInputs { lr: 0.0, ..common::inputs(1, valid) }).expect("a step");
    let mut all = Gradients::new();
    exec.each_grad(&mut |part, values| {
        all.insert(part.name.clone(), values.to_vec());
    })
    .expect("on this machine");
    (out.loss, all)
}

#[test]
fn a_packed_sequence_is_its_documents_alone() {
    const LENGTH: usize = 40;
    for m in [model(3, false, false), windowed()] {
        let (loss, packed) = gradients(&m, 0..LENGTH, true, LENGTH as u64);
        let mut begins: Vec<usize> = (0..LENGTH).map(|i| document(1, 0, i) as usize).collect();
        begins.dedup();
        assert!(begins.len() > 4, "{begins:?}");
        begins.push(LENGTH);
        let mut total = 0.0;
        let mut sum: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for of in begins.windows(2) {
            let (loss, alone) = gradients(&m, of[0]..of[1], false, LENGTH as u64);
            total += loss;
            for (name, grad) in alone {
                let to = sum.entry(name).or_insert_with(|| vec![0.0; grad.len()]);
                to.iter_mut().zip(grad).for_each(|(to, x)| *to += f64::from(x));
            }
        }
        assert!((total / loss - 1.0).abs() < 1e-6, "{total} against {loss}");
        for (name, grad) in packed {
            let norm = sum[&name].iter().map(|x| x * x).sum::<f64>().sqrt();
            let off = sum[&name].iter().zip(&grad).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>();
            assert!(off.sqrt() < 1e-5 * norm, "{name}: {} of {norm}", off.sqrt());
        }
    }
}
