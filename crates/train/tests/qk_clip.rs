//! Scores of attention bounded: by exact maxima over replicas and micro-batches, in the same bits in every layout that keeps
//! them, and by as much as is said.

mod common;

use common::{
    PLAIN, Trained, executor_of, fill, first_difference, inputs, model, same_bits, train_from_seed, weights,
};
use program::{OpKind, Program, Recipe, Request};
use spec::{DType, Layout, ModelSpec, Optimizer, PipelineSchedule, Recompute, Zero};
use train::{Executor, StepInputs};

const SEQUENCES: usize = 8;
const TAU: f32 = 0.5;
const CLIPS: Recipe = Recipe { qk_clip: TAU, ..PLAIN };

/// Weights that make scores large against the bound; with fewer keys than queries unless of GPT-2.
fn large(gpt2: bool) -> ModelSpec {
    ModelSpec { init_std: 0.3, ..model(4, false, gpt2) }
}

fn run(m: &ModelSpec, recipe: Recipe, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train_from_seed(recipe, m, layout, (SEQUENCES, precision, lr))
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let plain = Layout::default();
    let over = |dp, pp, zero| Layout { dp, pp, zero, ..plain.clone() };
    let layouts = [
        over(2, 1, Zero::Off),
        over(4, 1, Zero::Optimizer),
        over(4, 1, Zero::Gradients),
        Layout { micro_batch: 4, recompute: Recompute::Full, ..plain.clone() },
        Layout { micro_batch: 2, recompute: Recompute::Selective, ..over(2, 2, Zero::Parameters) },
        Layout { chunks: 2, schedule: PipelineSchedule::Interleaved, ..over(1, 2, Zero::Off) },
    ];
    for (m, recipe, precision) in [
        (large(false), CLIPS, DType::F32),
        (large(true), CLIPS, DType::Bf16),
        (large(false), Recipe { optimizer: Optimizer::Muon, ema: true, ..CLIPS }, DType::F32),
    ] {
        let expected = run(&m, recipe, &plain, precision, 1e-2);
        let without = run(&m, Recipe { qk_clip: 0.0, ..recipe }, &plain, precision, 1e-2);
        assert_eq!(expected.outputs[0], without.outputs[0], "the first step is not touched before its end");
        assert_ne!(expected.outputs[2], without.outputs[2], "scores are above the bound");
        for layout in &layouts {
            let got = run(&m, recipe, layout, precision, 1e-2);
            same_bits(&expected, &got, &format!("under {layout:?} in {precision}"));
        }
        // A bound that nothing reaches changes nothing.
        let high = run(&m, Recipe { qk_clip: 1e5, ..recipe }, &plain, precision, 1e-2);
        assert_eq!(
            (high.outputs, first_difference(&high.weights, &without.weights)),
            (without.outputs, None)
        );
    }
}

#[test]
fn tensor_parallel_within_tolerance() {
    for m in [large(false), large(true)] {
        let expected = run(&m, CLIPS, &Layout::default(), DType::F32, 1e-3);
        for (dp, zero, sequence_parallel) in [(1, Zero::Off, false), (2, Zero::Parameters, true)] {
            let layout = Layout { tp: 2, dp, zero, sequence_parallel, ..Layout::default() };
            let got = run(&m, CLIPS, &layout, DType::F32, 1e-3);
            for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                let off = (a.loss / b.loss - 1.0).abs();
                assert!(off < 1e-5, "step {}: {} against {} under {layout:?}", k + 1, a.loss, b.loss);
            }
        }
    }
}

/// Without a learning rate a step does nothing but bound: queries and keys of heads above shrink by one factor, the rest stays,
/// and the same batch's greatest scores are the bound then.
#[test]
fn a_step_leaves_no_greater_score_than_the_bound() {
    for gpt2 in [false, true] {
        let m = ModelSpec { layers: 1, ..large(gpt2) };
        let mut exec = executor_of(CLIPS, &m, &Layout::default(), (SEQUENCES, DType::F32, 2));
        let step = |exec: &mut Executor, k| {
            let valid = fill(exec, m.vocab, 1);
            exec.step(&StepInputs { lr: 0.0, ..inputs(k, valid) }).expect("a step");
            exec.logit_maxima().expect("on this machine").expect("scores are looked at")
        };
        let before = weights(&exec);
        let first = step(&mut exec, 1);
        let after = weights(&exec);
        let second = step(&mut exec, 2);
        assert_eq!(first.len(), m.heads);
        let group = m.heads / m.kv_heads;
        let most =
            |of: &[f64], key: usize| of[key * group..(key + 1) * group].iter().copied().fold(0.0, f64::max);
        let tau = f64::from(TAU);
        for key in 0..m.kv_heads {
            let (was, is) = (most(&first, key), most(&second, key));
            assert!(was > tau, "{first:?}");
            assert!((is / tau - 1.0).abs() < 1e-4, "{is} after {was}");
        }
        let mut changed = 0;
        for (name, was) in &before {
            let is = &after[name];
            let kind = ["attn.q.", "attn.k."].iter().position(|k| name.contains(k));
            for (i, (was, is)) in was.iter().zip(is).enumerate() {
                let (was, is) = (f32::from_bits(*was), f32::from_bits(*is));
                let Some(kind) = kind else {
                    assert_eq!(was, is, "{name}");
                    continue;
                };
                let width = if name.ends_with("bias") { 1 } else { m.hidden };
                let head = i / width / m.head_dim;
                let key = if kind == 0 { head / group } else { head };
                let expected = f64::from(was) * (tau / most(&first, key)).sqrt();
                assert!((f64::from(is) - expected).abs() <= 1e-6 * expected.abs(), "{name}: {is} {expected}");
                changed += usize::from(was != is);
            }
        }
        assert!(changed > 0);
    }
}

#[test]
fn what_cannot_be_bounded_is_refused() {
    let check = |m: &ModelSpec, layout: &Layout, what: &str| {
        let request = Request {
            model: m,
            layout,
            sequence: common::SEQUENCE,
            sequences: SEQUENCES,
            precision: DType::F32,
            rank: 0,
            mode: Default::default(),
            loss: Default::default(),
            recipe: CLIPS,
        };
        let built = Program::build(&request, &|_, _| 0);
        match built {
            Ok(p) => {
                assert_eq!(what, "");
                let ops = p.blocks.iter().flat_map(|b| &b.ops);
                assert!(ops.filter(|op| matches!(op.kind, OpKind::QkClip { .. })).count() > 0);
            }
            Err(e) => assert!(!what.is_empty() && e.to_string().contains(what) && e.exit_code() == 2, "{e}"),
        }
    };
    let one = Layout::default();
    check(&model(2, false, false), &one, "");
    check(&model(2, true, false), &one, "model.qk_norm");
    check(&model(2, false, false), &Layout { cp: 2, ..one.clone() }, "layout.cp");
    check(&ModelSpec { sinks: true, ..model(2, false, false) }, &one, "model.sinks");
    let latent = spec::Latent { query_rank: None, kv_rank: 8, nope_dim: 8, rope_dim: 4, value_dim: 8 };
    check(&ModelSpec { latent: Some(latent), kv_heads: 4, ..model(2, false, false) }, &one, "latent");
}
