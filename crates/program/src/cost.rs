use serde::Serialize;

use crate::graph::{Graph, Node};
use crate::op::OpKind;

/// What an op takes, from its shapes alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Multiplications and additions of matrix products and attention (causal attention counted at half).
    pub flops: u64,
    /// Bytes of operands read and written once.
    pub bytes: u64,
}

/// The cost of a node; `sequence` tokens, over all context-parallel ranks, make one causal block of attention.
pub(crate) fn cost(g: &Graph, n: &Node, sequence: usize, grad_elements: usize) -> Cost {
    use OpKind::*;
    let rows = |i: usize| n.ins[i].rows as u64;
    let cols = |i: usize| g.get(n.ins[i].value).cols as u64;
    let flops = match &n.kind {
        Linear => 2 * rows(0) * cols(0) * rows(1),
        LinearGradInput => 2 * rows(0) * cols(0) * cols(1),
        LinearGradWeight => 2 * rows(0) * cols(0) * cols(1),
        GroupedLinear { experts, rows } => {
            2 * *rows as u64 * cols(0) * (n.ins[1].rows as u64 / (*experts as u64).max(1))
        }
        GroupedLinearGradInput { rows, .. } | GroupedLinearGradWeight { rows, .. } => {
            2 * *rows as u64 * cols(0) * cols(1)
        }
        // Scores and values: 2 products over half of the T x T square, or the part of it inside a window.
        Attention { heads, sees } | RingAttention { heads, sees, .. } => {
            rows(0) * sees.keys_twice(sequence) * (heads.q * (heads.dim + heads.value_dim)) as u64
        }
        // Scores again, dQ and dK; dV and dP: 5 products.
        AttentionGrad { heads, sees } | RingAttentionGrad { heads, sees, .. } => {
            rows(0) * sees.keys_twice(sequence) * (heads.q * (3 * heads.dim + 2 * heads.value_dim)) as u64
        }
        _ => 0,
    };
    let bytes_of = |o: &crate::graph::Operand| {
        let v = g.get(o.value);
        (o.rows * v.cols * v.dtype.bytes()) as u64
    };
    let moved: u64 = match &n.kind {
        // Rows that are left out are not read.
        Slice { .. } => 2 * n.outs.iter().map(bytes_of).sum::<u64>(),
        _ => n.ins.iter().chain(&n.acc).chain(&n.outs).map(bytes_of).sum(),
    };
    Cost { flops, bytes: moved + 4 * grad_elements as u64 }
}
