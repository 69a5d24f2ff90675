//! Models, programs and what must hold for all of them.
#![allow(dead_code, reason = "every test binary uses its own part")]

use std::collections::HashMap;

use program::{Home, Mode, Op, OpKind, Program, Request};
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

/// Every buffer that an op reads in a block was written by the parameters, the batch, an earlier pass or an earlier op,
/// and no two buffers that are alive at an op share bytes.
pub(crate) fn check_memory(p: &Program) {
    for b in &p.buffers {
        let (offset, len) = match b.home {
            Home::Static { offset } => {
                (offset, p.slot_regions.first().map_or(p.scratch_offset, |s| s.offset))
            }
            Home::Slot { chunk, offset, .. } => (offset, p.slot_regions[chunk].bytes),
            Home::Scratch { offset, .. } => (offset, p.memory.scratch),
            Home::MicroBatch { .. } => continue,
        };
        assert!(offset + b.bytes() <= len, "{} leaves its region", b.name);
    }
    assert_eq!(p.memory.total, p.workspace_offset + p.memory.workspace);
    assert!(p.memory.scratch >= p.memory.scratch_bound);
    for block in &p.blocks {
        for op in &block.ops {
            check_op(p, op);
        }
    }
}

fn check_op(p: &Program, op: &Op) {
    let range = |v: &program::View| {
        let b = p.buffer(v.buffer);
        let row = b.cols * b.dtype.bytes();
        let at = match b.home {
            Home::Static { offset } => offset,
            Home::Slot { offset, .. } => 1 << 40 | offset,
            Home::Scratch { offset, .. } => 1 << 41 | offset,
            Home::MicroBatch { .. } => return (0, 0),
        };
        (at + v.row0 * row, at + (v.row0 + v.rows) * row)
    };
    let levels = op.grads.iter().map(|g| &g.levels);
    let outs: Vec<(usize, usize)> = op.outs.iter().chain(levels).map(range).collect();
    let apart = |a: (usize, usize), b: (usize, usize)| a.1 <= b.0 || b.1 <= a.0;
    for (i, a) in outs.iter().enumerate() {
        for b in &outs[..i] {
            assert!(apart(*a, *b), "{}: outputs overlap", op.name);
        }
        for v in &op.ins {
            let same = range(v) == *a && a.0 < a.1;
            assert!(same || apart(range(v), *a), "{}: an input overlaps an output", op.name);
            let may = matches!(
                op.kind,
                OpKind::Rope { .. } | OpKind::Xent | OpKind::XentGrad { .. } | OpKind::AllReduce { .. }
            );
            assert!(!same || may, "{} overwrites its input", op.name);
        }
    }
}

/// Every message has exactly one sender and one receiver, in the same order on both sides.
pub(crate) fn check_messages(m: &ModelSpec, layout: &Layout) {
    let mut sent: HashMap<(usize, usize), Vec<(u32, usize)>> = HashMap::new();
    let mut received: HashMap<(usize, usize), Vec<(u32, usize)>> = HashMap::new();
    for rank in 0..layout.world() {
        let p = build(m, layout, 8, rank);
        for item in &p.schedule {
            for op in &p.blocks[item.block].ops {
                match op.kind {
                    OpKind::Send { peer, tag } => {
                        sent.entry((rank, peer)).or_default().push((tag, item.micro_batch));
                    }
                    OpKind::Recv { peer, tag } => {
                        received.entry((peer, rank)).or_default().push((tag, item.micro_batch));
                    }
                    _ => {}
                }
            }
        }
    }
    for (pair, mut messages) in sent {
        let mut other = received.remove(&pair).unwrap_or_default();
        messages.sort_unstable();
        other.sort_unstable();
        assert_eq!(messages, other, "{pair:?} under {layout:?}");
    }
    assert!(received.is_empty());
}
