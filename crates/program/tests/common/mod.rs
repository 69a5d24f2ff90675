//! Models, programs and what must hold for all of them.
#![allow(dead_code, reason = "every test binary uses its own part")]

use program::{Mode, Program, Request};
use spec::{Activation, DType, Layout, ModelSpec, NormKind, Position, Rope, RopeScaling};

pub(crate) fn model(layers: usize, tied: bool, gpt2: bool) -> ModelSpec {
    let rope = Rope { theta: 10000.0, scaling: RopeScaling::Default, max_positions: 64 };
    ModelSpec {
        name: "test".into(),
        vocab: 96,
        layers,
        hidden: 32,
        ffn: 64,
        heads: 4,
        kv_heads: if gpt2 { 4 } else { 2 },
        head_dim: 8,
        norm: if gpt2 { NormKind::Layer } else { NormKind::Rms },
        norm_eps: 1e-5,
        position: if gpt2 { Position::Learned { max_positions: 64 } } else { Position::Rope(rope) },
        activation: if gpt2 { Activation::GeluTanh } else { Activation::SwiGlu },
        qkv_bias: gpt2,
        attn_out_bias: gpt2,
        mlp_bias: gpt2,
        qk_norm: !gpt2 && tied,
        tied_embeddings: tied,
        init_std: 0.02,
        experts: None,
        latent: None,
    }
}

pub(crate) fn build(model: &ModelSpec, layout: &Layout, sequences: usize, rank: usize) -> Program {
    let request =
        Request { model, layout, sequence: 16, sequences, precision: DType::F32, rank, mode: Mode::Train };
    Program::build(&request, &|_, _| 0).expect("a valid layout")
}

/// Builds all ranks' programs and holds them, one by one after each pass and together, to every rule.
pub(crate) fn check_world(m: &ModelSpec, layout: &Layout) {
    let all: Vec<Program> = (0..layout.world()).map(|rank| verified(m, layout, 8, rank)).collect();
    let (checked, found) = program::verify::world(&all);
    assert_eq!(checked.ranks, layout.world());
    program::verify::accept("all passes", &found).unwrap_or_else(|e| panic!("{e} under {layout:?}"));
}

pub(crate) fn verified(model: &ModelSpec, layout: &Layout, sequences: usize, rank: usize) -> Program {
    let (precision, mode) = (DType::F32, Mode::Train);
    let request = Request { model, layout, sequence: 16, sequences, precision, rank, mode };
    Program::verified(&request, &|_, _| 0).unwrap_or_else(|e| panic!("{e} under {layout:?}"))
}
