//! Experts and sequences that several ranks hold, which share the GPU: rows whose numbers the card alone knows, keys
//! around a ring, and heads that are dealt.

use program::Recipe;
use spec::{Activation, ContextMode, DType, Latent, Layout, ModelSpec, Router, Window, Zero};

use crate::bits::together;
use crate::cases::{mixture, model};
use crate::common::steps;
use crate::{STEPS, executor_of, gpu};

/// The losses of the steps by one rank; nothing where there is no GPU.
fn alone(recipe: Recipe, model: &ModelSpec, precision: DType) -> Option<Vec<f64>> {
    let device = Box::new(gpu()?);
    let mut exec = executor_of(recipe, device, model, &Layout::default(), (precision, false));
    Some(steps(&mut exec, model.vocab, 1, STEPS + 1).iter().map(|s| s.loss).collect())
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

/// Around a ring sums go in another order; where heads are dealt every token has the loss that it has on one rank.
#[test]
fn sequences_on_several_ranks() {
    let window = Some(Window { tokens: 5, full_layers: 0, full_every: 2 });
    let windowed = ModelSpec { window, sinks: true, ..model(2, false, false) };
    let latent = Latent { query_rank: Some(10), kv_rank: 12, nope_dim: 6, rope_dim: 4, value_dim: 8 };
    let latent = ModelSpec { latent: Some(latent), kv_heads: 4, ..model(1, false, false) };
    let ring = Layout { cp: 2, ..Layout::default() };
    let dealt = Layout { context: ContextMode::Heads, ..ring.clone() };
    let bounded = Recipe { documents: true, attention_dropout: 0.2, ..Recipe::default() };
    let clipped = Recipe { dropout: 0.1, attention_dropout: 0.2, qk_clip: 0.5, ..Recipe::default() };
    for (model, recipe) in
        [(model(1, false, true), Recipe::default()), (windowed, bounded), (latent, clipped)]
    {
        let Some(expected) = alone(recipe, &model, DType::F32) else { return };
        for layout in [
            ring.clone(),
            Layout { cp: 4, micro_batch: 2, ..ring.clone() },
            Layout { dp: 2, zero: Zero::Parameters, ..ring.clone() },
        ] {
            let what = format!("{} under {layout:?}", model.name);
            near(&together(recipe, &model, &layout, DType::F32).1, &expected, 2e-5, &what);
        }
        for layout in [dealt.clone(), Layout { cp: 4, recompute: spec::Recompute::Full, ..dealt.clone() }] {
            let (_, losses) = together(recipe, &model, &layout, DType::F32);
            assert_eq!(losses[0], expected[0], "{} under {layout:?}", model.name);
            near(&losses, &expected, 2e-5, &format!("{} under {layout:?}", model.name));
        }
    }
}

/// The same in bf16, and with experts on several ranks too.
#[test]
fn sequences_and_experts_on_several_ranks_in_bf16() {
    let model = mixture(Router::PLAIN, Activation::SwiGlu);
    let recipe = Recipe::default();
    let Some(expected) = alone(recipe, &model, DType::Bf16) else { return };
    for context in [ContextMode::Ring, ContextMode::Heads] {
        let layout = Layout { dp: 2, ep: 2, cp: 2, context, ..Layout::default() };
        near(&together(recipe, &model, &layout, DType::Bf16).1, &expected, 2e-2, &format!("{layout:?}"));
    }
}
