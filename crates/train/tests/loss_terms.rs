//! Soft-capped logits and the z-loss: the same bits in every layout that keeps them, in evaluation and generation too.

mod common;

use common::{PLAIN, Trained, executor_of, fill, first_difference, model, same_bits, train_from_seed};
use program::{Mode, Recipe, Request};
use spec::{DType, Layout, ModelSpec, Zero};
use train::{Executor, Mesh};

const SEQUENCES: usize = 8;
const RECIPE: Recipe = Recipe { z_loss: 0.01, ..PLAIN };

fn capped() -> ModelSpec {
    // Weights that make logits large against the cap.
    ModelSpec { logit_softcap: 2.0, init_std: 0.3, ..model(4, false, false) }
}

fn run(m: &ModelSpec, recipe: Recipe, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train_from_seed(recipe, m, layout, (SEQUENCES, precision, lr))
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let m = capped();
    for precision in [DType::F32, DType::Bf16] {
        let expected = run(&m, RECIPE, &Layout::default(), precision, 1e-2);
        for layout in [
            Layout { dp: 2, zero: Zero::Parameters, ..Layout::default() },
            Layout { dp: 2, pp: 2, micro_batch: 2, ..Layout::default() },
        ] {
            let got = run(&m, RECIPE, &layout, precision, 1e-2);
            same_bits(&expected, &got, &format!("under {layout:?}"));
        }
    }
}

#[test]
fn tensor_parallel_within_tolerance() {
    let m = capped();
    let expected = run(&m, RECIPE, &Layout::default(), DType::F32, 1e-3);
    let got = run(&m, RECIPE, &Layout { tp: 2, ..Layout::default() }, DType::F32, 1e-3);
    for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
        assert!((a.loss / b.loss - 1.0).abs() < 1e-5, "step {}: {} against {}", k + 1, a.loss, b.loss);
    }
}

#[test]
fn the_z_loss_moves_weights_and_is_not_reported() {
    let m = capped();
    let [with, without] =
        [RECIPE, Recipe::default()].map(|r| run(&m, r, &Layout::default(), DType::F32, 1e-2));
    assert_eq!(with.outputs[0].loss, without.outputs[0].loss);
    assert_ne!(with.outputs[0].grad_norm, without.outputs[0].grad_norm);
    assert_ne!(first_difference(&with.weights, &without.weights), None);
}

/// What generation says of each next token is what an evaluation says of it: both squeeze.
#[test]
fn generation_squeezes_what_evaluation_does() {
    let m = capped();
    let layout = Layout::default();
    let mut trains = executor_of(Recipe::default(), &m, &layout, (1, DType::F32, 1));
    let valid = fill(&mut trains, m.vocab, 1);
    let (tokens, targets) = (trains.tokens().to_vec(), trains.targets().to_vec());
    let loss = trains.evaluate().expect("evaluated") / valid as f64;
    let request = Request {
        model: &m,
        layout: &layout,
        sequence: tokens.len(),
        sequences: 1,
        precision: DType::F32,
        rank: 0,
        mode: Mode::Generate { positions: tokens.len() },
        loss: Default::default(),
        recipe: Recipe::default(),
    };
    let mut speaks = Executor::new(&request, 1, Mesh::alone(), false).expect("a program");
    speaks.initialise(&m, 11).expect("weights");
    let rows = speaks.all_logits(&tokens).expect("logits");
    assert!(rows.iter().flatten().all(|l| l.abs() <= 2.0), "none is beyond the cap");
    assert!(rows.iter().flatten().any(|l| l.abs() > 1.5), "some come near it");
    let nll = |row: &[f32], target: u32| {
        let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
        sum.ln() - f64::from(row[target as usize])
    };
    let counted = rows.iter().zip(&targets).filter(|(_, t)| **t != u32::MAX);
    let want = counted.map(|(row, t)| nll(row, *t)).sum::<f64>() / valid as f64;
    assert!((loss / want - 1.0).abs() < 1e-5, "{loss} against {want}");
}
