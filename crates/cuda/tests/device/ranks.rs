//! Experts that several ranks hold, which share the GPU: how many rows each gets the card alone knows.

use program::Recipe;
use spec::{Activation, DType, Layout, ModelSpec, Router, Zero};

use crate::bits::together;
use crate::cases::mixture;
use crate::common::steps;
use crate::{executor_of, gpu};

/// The losses of five steps by one rank; nothing where there is no GPU.
fn alone(recipe: Recipe, model: &ModelSpec, precision: DType) -> Option<Vec<f64>> {
    let device = Box::new(gpu()?);
    let mut exec = executor_of(recipe, device, model, &Layout::default(), (precision, false));
    Some(steps(&mut exec, model.vocab, 1, 6).iter().map(|s| s.loss).collect())
}

fn near(a: &[f64], b: &[f64], within: f64, what: &str) {
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a / b - 1.0).abs() < within, "step {step} of {what}: {a} against {b}");
    }
}

/// Which rank an expert is on changes no bit.
#[test]
fn experts_on_several_ranks() {
    let router = Router { balance_loss: 0.02, z_loss: 0.01, bias: true, ..Router::PLAIN };
    let model = ModelSpec { mlp_bias: true, ..mixture(router, Activation::SwiGlu) };
    let recipe = Recipe::default();
    for precision in [DType::F32, DType::Bf16] {
        let Some(expected) = alone(recipe, &model, precision) else { return };
        let ranks = Layout { dp: 2, ep: 2, ..Layout::default() };
        for layout in [
            ranks.clone(),
            Layout {
                micro_batch: 2,
                zero: Zero::Optimizer,
                recompute: spec::Recompute::Full,
                ..ranks.clone()
            },
            Layout { dp: 4, ep: 2, zero: Zero::Gradients, ..ranks },
        ] {
            let (_, losses) = together(recipe, &model, &layout, precision);
            assert_eq!(losses, expected, "{precision} under {layout:?}");
        }
    }
    // Tensor-parallel ranks route parts of sequences, which a balance's loss is not of.
    let model =
        ModelSpec { mlp_bias: true, ..mixture(Router { bias: true, ..Router::PLAIN }, Activation::SwiGlu) };
    let Some(expected) = alone(recipe, &model, DType::F32) else { return };
    let cut = Layout { dp: 2, ep: 2, tp: 2, sequence_parallel: true, ..Layout::default() };
    near(&together(recipe, &model, &cut, DType::F32).1, &expected, 1e-5, "experts and tensor-parallel ranks");
}
