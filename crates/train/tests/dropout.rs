//! Dropout: the same elements are left out in every layout, none in evaluation, and gradients leave out what the model did.

mod common;

use std::collections::BTreeMap;

use common::{
    PLAIN, Trained, executor_of, fill, inputs, latent, mixture, model, same_bits, train_from_seed, weights,
    windowed,
};
use program::Recipe;
use spec::{ContextMode, DType, Layout, ModelSpec, PipelineSchedule, Recompute, Zero};
use train::{Executor, StepInputs};

const SEQUENCES: usize = 8;
const DROPS: Recipe = Recipe { dropout: 0.25, attention_dropout: 0.25, ..PLAIN };

fn run(m: &ModelSpec, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train_from_seed(DROPS, m, layout, (SEQUENCES, precision, lr))
}

fn check(m: &ModelSpec, precision: DType, layouts: &[Layout]) {
    let expected = run(m, &Layout::default(), precision, 1e-2);
    for layout in layouts {
        let got = run(m, layout, precision, 1e-2);
        same_bits(&expected, &got, &format!("under {layout:?} in {precision}"));
        assert_eq!(got.eval, expected.eval, "under {layout:?}");
    }
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let plain = Layout::default();
    let over = |dp, pp, zero| Layout { dp, pp, zero, ..plain.clone() };
    let layouts = [
        over(2, 1, Zero::Off),
        over(4, 1, Zero::Parameters),
        over(4, 1, Zero::Gradients),
        Layout { micro_batch: 4, recompute: Recompute::Selective, ..plain.clone() },
        Layout { micro_batch: 2, recompute: Recompute::Full, ..over(2, 2, Zero::Parameters) },
        Layout { chunks: 2, schedule: PipelineSchedule::Interleaved, ..over(1, 2, Zero::Off) },
        Layout {
            schedule: PipelineSchedule::ZeroBubble,
            recompute: Recompute::Full,
            ..over(1, 2, Zero::Off)
        },
    ];
    check(&model(4, true, false), DType::F32, &layouts);
    check(&model(4, false, true), DType::F32, &layouts[1..5]);
    check(&latent(), DType::F32, &layouts[..1]);
    check(&model(4, false, false), DType::Bf16, &layouts[2..6]);
    let over = |dp, ep, zero| Layout { dp, ep, zero, ..Layout::default() };
    check(&mixture(), DType::F32, &[over(2, 2, Zero::Off), over(4, 2, Zero::Parameters)]);
}

/// With biases, rows that tensor-parallel ranks share, and sequences cut over ranks: the same is left out, so that what
/// differs is only how sums inside of products are rounded.
#[test]
fn tensor_and_context_parallel_within_tolerance() {
    let plain = Layout::default();
    for m in [model(4, true, false), model(4, false, true), mixture()] {
        let expected = run(&m, &plain, DType::F32, 1e-3);
        for layout in [
            Layout { tp: 2, ..plain.clone() },
            Layout { tp: 2, sequence_parallel: true, micro_batch: 2, ..plain.clone() },
            Layout { tp: 2, dp: 2, sequence_parallel: true, zero: Zero::Parameters, ..plain.clone() },
            Layout { cp: 2, dp: 2, ..plain.clone() },
            Layout { cp: 2, context: ContextMode::Heads, ..plain.clone() },
            Layout { cp: 2, tp: 2, sequence_parallel: true, ..plain.clone() },
        ] {
            let got = run(&m, &layout, DType::F32, 1e-3);
            for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                let off = (a.loss / b.loss - 1.0).abs();
                assert!(off < 1e-5, "step {}: {} against {} under {layout:?}", k + 1, a.loss, b.loss);
            }
        }
    }
}

#[test]
fn every_step_and_seed_leaves_out_others_and_evaluation_nothing() {
    let m = model(2, true, false);
    let one = |recipe| executor_of(recipe, &m, &Layout::default(), (SEQUENCES, DType::F32, 2));
    let loss = |recipe: Recipe, step, seed| {
        let mut exec = one(recipe);
        let valid = fill(&mut exec, m.vocab, 1);
        let evaluated = exec.evaluate().expect("evaluated");
        let out = exec.step(&StepInputs { seed, ..inputs(step, valid) }).expect("a step");
        (out.loss, evaluated)
    };
    let (first, evaluated) = loss(DROPS, 1, 1);
    assert_eq!(loss(DROPS, 1, 1).0, first);
    assert_ne!(loss(DROPS, 2, 1).0, first);
    assert_ne!(loss(DROPS, 1, 2).0, first);
    let plain = loss(Recipe::default(), 1, 1);
    let only = |recipe: Recipe| loss(recipe, 1, 1).0;
    let kinds = [
        plain.0,
        first,
        only(Recipe { attention_dropout: 0.0, ..DROPS }),
        only(Recipe { dropout: 0.0, ..DROPS }),
    ];
    assert!(kinds.iter().enumerate().all(|(i, k)| kinds[..i].iter().all(|other| k != other)), "{kinds:?}");
    assert_eq!(plain.1, evaluated, "an evaluation is of the whole model");
}

/// The gradient is that of the very function that was computed: along it the loss falls by as much as it says.
#[test]
fn gradients_are_those_of_what_was_left_in() {
    for m in [model(2, true, false), model(2, false, true), latent(), windowed()] {
        let mut exec = executor_of(DROPS, &m, &Layout::default(), (SEQUENCES, DType::F32, 1));
        let valid = fill(&mut exec, m.vocab, 1);
        let at =
            |exec: &mut Executor, w: &BTreeMap<String, Vec<u32>>, by: f64, g: &BTreeMap<String, Vec<f32>>| {
                exec.set_params(&mut |part, out| {
                    for ((x, w), g) in out.iter_mut().zip(&w[&part.name]).zip(&g[&part.name]) {
                        *x = (f64::from(f32::from_bits(*w)) + by * f64::from(*g)) as f32;
                    }
                    Ok(())
                })
                .expect("weights");
                let out = exec.attempt(&inputs(1, valid), &train::Limits::NONE).expect("a step").0;
                out.loss
            };
        let start = weights(&exec);
        let none: BTreeMap<String, Vec<f32>> =
            start.iter().map(|(n, w)| (n.clone(), vec![0.0; w.len()])).collect();
        at(&mut exec, &start, 0.0, &none);
        let mut grads = BTreeMap::new();
        exec.each_grad(&mut |part, g| {
            grads.insert(part.name.clone(), g.to_vec());
        })
        .expect("on this machine");
        let square: f64 = grads.values().flatten().map(|g| f64::from(*g).powi(2)).sum();
        let by = 2e-3 / square.sqrt();
        let slope = (at(&mut exec, &start, by, &grads) - at(&mut exec, &start, -by, &grads)) / (2.0 * by);
        assert!((slope / square - 1.0).abs() < 0.01, "{slope} against {square}");
    }
}
