use program::{Axis, Op, OpKind, Program};

use super::{TalkAxis, Task};
use crate::network::Collective;

/// What an op's time depends on: nothing, one kernel or collective, or a kernel and what walks beside it.
pub fn tasks(p: &Program, op: &Op) -> Vec<Task> {
    let rows = |i: usize| op.ins[i].rows as f64;
    let cols = |i: usize| p.buffer(op.ins[i].buffer).cols as f64;
    let bytes = op.cost.bytes as f64;
    let head = op.name.starts_with("head");
    let gemm = |m, n, k| vec![Task::Gemm { m, n, k, batch: 1.0, bytes, head }];
    let grouped = |m, n, k, experts: usize| vec![Task::Gemm { m, n, k, batch: experts as f64, bytes, head }];
    let attention = |heads: &program::Heads, backward| Task::Attention {
        flops: op.cost.flops as f64,
        bytes,
        scores: rows(0) * p.sequence as f64 * heads.q as f64,
        backward,
    };
    let wire = op.cost.wire_bytes as f64;
    let talk = |what, axis: &Axis, times: f64| match talk_axis(*axis) {
        Some(axis) => vec![Task::Talk { what, axis, bytes: wire * times }],
        None => Vec::new(),
    };
    let size = |axis: &Axis| p.coords.peers(*axis, &p.layout).len() as f64;
    match &op.kind {
        OpKind::Linear => gemm(rows(0), rows(1), cols(0)),
        OpKind::LinearGradInput => gemm(rows(0), cols(1), cols(0)),
        OpKind::LinearGradWeight => gemm(cols(0), cols(1), rows(0)),
        // Rows are spread evenly over the experts.
        OpKind::GroupedLinear { experts } => {
            let each = *experts as f64;
            grouped(rows(0) / each, rows(1) / each, cols(0), *experts)
        }
        OpKind::GroupedLinearGradInput { experts } => {
            grouped(rows(0) / *experts as f64, cols(1), cols(0), *experts)
        }
        OpKind::GroupedLinearGradWeight { experts } => {
            grouped(cols(0), cols(1), rows(0) / *experts as f64, *experts)
        }
        OpKind::Attention { heads } => vec![attention(heads, false)],
        OpKind::AttentionGrad { heads } => vec![attention(heads, true)],
        // Keys and values come by as in a gather; backward, their gradients go home as in a scatter.
        OpKind::RingAttention { heads, axis } => {
            let mut out = vec![attention(heads, false)];
            out.extend(talk(Collective::AllGather, axis, size(axis)));
            out
        }
        OpKind::RingAttentionGrad { heads, axis } => {
            let mut out = vec![attention(heads, true)];
            out.extend(talk(Collective::AllGather, axis, size(axis) / 2.0));
            out.extend(talk(Collective::ReduceScatter, axis, size(axis) / 2.0));
            out
        }
        OpKind::AllReduce { axis } => talk(Collective::AllReduce, axis, 1.0),
        OpKind::AllGather { axis } | OpKind::Unslice { axis } => {
            talk(Collective::AllGather, axis, size(axis))
        }
        OpKind::ReduceScatter { axis } => talk(Collective::ReduceScatter, axis, 1.0),
        OpKind::AllToAll { axis } => talk(Collective::AllToAll, axis, 1.0),
        OpKind::Send { .. } | OpKind::Recv { .. } => Vec::new(),
        kind if kind.is_communication() => Vec::new(),
        _ => vec![Task::Stream { bytes }],
    }
}

/// The axis of a message inside a layer.
fn talk_axis(axis: Axis) -> Option<TalkAxis> {
    match axis {
        Axis::Tp => Some(TalkAxis::Tp),
        Axis::Cp => Some(TalkAxis::Cp),
        Axis::Ep => Some(TalkAxis::Ep),
        Axis::Dp | Axis::Pp => None,
    }
}
