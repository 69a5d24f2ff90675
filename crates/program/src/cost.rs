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
    /// Bytes that this rank sends, if ranks talk; the algorithm's factor not included.
    pub wire_bytes: u64,
}

/// The cost of a node; `sequence` tokens make one causal block of attention.
pub(crate) fn cost(g: &Graph, n: &Node, sequence: usize, grad_elements: usize) -> Cost {
    use OpKind::*;
    let rows = |i: usize| n.ins[i].rows as u64;
    let cols = |i: usize| g.get(n.ins[i].value).cols as u64;
    let flops = match &n.kind {
        Linear => 2 * rows(0) * cols(0) * rows(1),
        LinearGradInput => 2 * rows(0) * cols(0) * cols(1),
        LinearGradWeight => 2 * rows(0) * cols(0) * cols(1),
        // Scores and values: 2 products over half of the T x T square.
        Attention { heads } => 2 * rows(0) * sequence as u64 * (heads.q * heads.dim) as u64,
        // Scores again, dV, dP, dQ, dK: 5 products.
        AttentionGrad { heads } => 5 * rows(0) * sequence as u64 * (heads.q * heads.dim) as u64,
        _ => 0,
    };
    let bytes_of = |o: &crate::graph::Operand| {
        let v = g.get(o.value);
        (o.rows * v.cols * v.dtype.bytes()) as u64
    };
    let moved: u64 = n.ins.iter().chain(&n.acc).chain(&n.outs).map(bytes_of).sum();
    let wire_bytes = match &n.kind {
        AllReduce { .. } | AllGather { .. } | ReduceScatter { .. } | Send { .. } => {
            n.ins.first().map_or(0, bytes_of)
        }
        _ => 0,
    };
    Cost { flops, bytes: moved + 4 * grad_elements as u64, wire_bytes }
}
