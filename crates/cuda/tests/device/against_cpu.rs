//! The same numbers as the CPU, which is held to PyTorch's.

use std::collections::BTreeMap;

use program::Recipe;
use spec::{DType, Layout, ModelSpec};
use train::{Executor, StepOutputs};

use crate::common::{fill, inputs};
use crate::{STEPS, cpu, executor_of, gpu, models};

struct Stepped {
    first: StepOutputs,
    grads: BTreeMap<String, Vec<f32>>,
    losses: Vec<f64>,
    eval: f64,
}

/// Gradients of one step, and losses of the others, with updates.
fn run(mut exec: Executor, model: &ModelSpec) -> Stepped {
    let valid = fill(&mut exec, model.vocab, 1);
    let first = exec.step(&train::StepInputs { lr: 0.0, ..inputs(1, valid) }).expect("a step");
    let mut grads = BTreeMap::new();
    exec.each_grad(&mut |part, values| {
        grads.insert(part.name.clone(), values.to_vec());
    })
    .expect("gradients");
    let losses = (1..STEPS)
        .map(|k| {
            let valid = fill(&mut exec, model.vocab, k);
            exec.step(&inputs(k, valid)).expect("a step").loss
        })
        .collect();
    // Of the average over steps, if one is kept.
    exec.swap_average().expect("swapped");
    fill(&mut exec, model.vocab, 9);
    Stepped { first, grads, losses, eval: exec.evaluate().expect("evaluated") }
}

fn check(precision: DType, of_loss: f64, of_gradients: f64) {
    for model in models() {
        compare(&Recipe::default(), &model, precision, (of_loss, of_gradients));
    }
}

/// Holds a GPU to the CPU, within shares of the loss and of the gradient's norm.
pub(crate) fn compare(recipe: &Recipe, model: &ModelSpec, precision: DType, within: (f64, f64)) {
    let (of_loss, of_gradients) = within;
    let Some(gpu) = gpu() else { return };
    let layout = Layout { micro_batch: 2, ..Layout::default() };
    let on = |device| run(executor_of(*recipe, device, model, &layout, (precision, false)), model);
    let (theirs, ours) = (on(cpu()), on(Box::new(gpu)));
    let near = |a: f64, b: f64, what: &str| {
        assert!((a / b - 1.0).abs() < of_loss, "{what} of {} in {precision}: {a} against {b}", model.name);
    };
    near(ours.first.loss, theirs.first.loss, "loss");
    near(ours.first.grad_norm, theirs.first.grad_norm, "norm");
    near(ours.eval, theirs.eval, "evaluation");
    for (step, (a, b)) in ours.losses.iter().zip(&theirs.losses).enumerate() {
        near(*a, *b, &format!("loss of step {step}"));
    }
    // Of the whole, so that tensors whose gradient is rounding alone (biases of keys) do not count.
    let whole = theirs.first.grad_norm;
    for (name, b) in &theirs.grads {
        let square = |(x, y): (&f32, &f32)| (f64::from(*x) - f64::from(*y)).powi(2);
        let off = ours.grads[name].iter().zip(b).map(square).sum::<f64>().sqrt();
        assert!(off < of_gradients * whole, "{name} of {} is off by {:e}", model.name, off / whole);
    }
}

#[test]
fn f32() {
    check(DType::F32, 2e-5, 1e-5);
}

#[test]
fn bf16() {
    check(DType::Bf16, 1e-2, 2e-2);
}
