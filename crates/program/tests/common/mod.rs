//! Models, programs and what must hold for all of them.
#![allow(dead_code, reason = "every test binary uses its own part")]

use program::{Mode, Program, Request};
use spec::{DType, Layout, ModelSpec};

pub(crate) fn model(layers: usize, tied: bool, gpt2: bool) -> ModelSpec {
    let family = ModelSpec::preset(if gpt2 { "tiny-gpt2" } else { "tiny" }).expect("a preset");
    ModelSpec { layers, qk_norm: !gpt2 && tied, tied_embeddings: tied, ffn: 64, ..family }
}

pub(crate) fn build(model: &ModelSpec, layout: &Layout, sequences: usize, rank: usize) -> Program {
    let request = Request {
        model,
        layout,
        sequence: 16,
        sequences,
        precision: DType::F32,
        rank,
        mode: Mode::Train,
        loss: Default::default(),
        documents: false,
    };
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
    let request = Request {
        model,
        layout,
        sequence: 16,
        sequences,
        precision,
        rank,
        mode,
        loss: Default::default(),
        documents: false,
    };
    Program::verified(&request, &|_, _| 0).unwrap_or_else(|e| panic!("{e} under {layout:?}"))
}
