use program::{Axis, Members, Op, OpKind, Place, Program};

use super::{TalkAxis, Task};
use crate::network::Collective;

/// What an op's time depends on: nothing, one kernel or collective, or a kernel and what walks beside it.
pub fn tasks(p: &Program, op: &Op) -> Vec<Task> {
    let mut tasks = kernels(p, op);
    tasks.extend(talk(p, op));
    tasks
}

/// What an op says inside a layer; messages between stages and replicas are estimated on their own.
fn talk(p: &Program, op: &Op) -> Vec<Task> {
    let Some(comm) = &op.comm else { return Vec::new() };
    let Members::Axis(group) = comm.members else { return Vec::new() };
    let Some(axis) = talk_axis(group) else { return Vec::new() };
    let times = comm.members.ranks(p.coords, &p.layout).len();
    let task = |what, bytes: u64| Task::Talk { what, axis, bytes: bytes as f64 };
    let what = match comm.what {
        program::Collective::AllReduce => Collective::AllReduce,
        program::Collective::AllGather => Collective::AllGather,
        program::Collective::ReduceScatter => Collective::ReduceScatter,
        program::Collective::AllToAll => Collective::AllToAll,
        // Keys and values come by as in a gather; backward, their gradients follow in a second round, one hop further.
        program::Collective::Ring => {
            let hops = times - 1;
            let round = |hops_made: usize, m: &program::Message| {
                task(Collective::AllGather, m.bytes() * (hops_made * times) as u64 / hops as u64)
            };
            let gradients = comm.messages.last().filter(|_| comm.messages.len() > hops);
            let keys = comm.messages.first().map(|m| round(hops, m));
            return keys.into_iter().chain(gradients.map(|m| round(times, m))).collect();
        }
        program::Collective::Send { .. } | program::Collective::Recv { .. } => return Vec::new(),
    };
    comm.messages.iter().map(|m| task(what, m.bytes())).collect()
}

fn kernels(p: &Program, op: &Op) -> Vec<Task> {
    let rows = |i: usize| op.ins[i].rows as f64;
    let cols = |i: usize| p.buffer(op.ins[i].buffer).cols as f64;
    let bytes = op.cost.bytes as f64;
    let head = op.place == Place::Head;
    let gemm = |m, n, k| vec![Task::Gemm { m, n, k, batch: 1.0, bytes, head }];
    let grouped = |m, n, k, experts: usize| vec![Task::Gemm { m, n, k, batch: experts as f64, bytes, head }];
    let attention = |heads: &program::Heads, backward| Task::Attention {
        flops: op.cost.flops as f64,
        bytes,
        scores: rows(0) * p.sequence as f64 * heads.q as f64,
        backward,
    };
    match &op.kind {
        OpKind::Linear => gemm(rows(0), rows(1), cols(0)),
        OpKind::LinearGradInput => gemm(rows(0), cols(1), cols(0)),
        OpKind::LinearGradWeight => gemm(cols(0), cols(1), rows(0)),
        // Rows are spread evenly over the experts.
        OpKind::GroupedLinear { experts, rows: even } => {
            let each = *experts as f64;
            grouped(*even as f64 / each, rows(1) / each, cols(0), *experts)
        }
        OpKind::GroupedLinearGradInput { experts, rows: even } => {
            grouped(*even as f64 / *experts as f64, cols(1), cols(0), *experts)
        }
        OpKind::GroupedLinearGradWeight { experts, rows: even, .. } => {
            grouped(cols(0), cols(1), *even as f64 / *experts as f64, *experts)
        }
        OpKind::Attention { heads, .. } => vec![attention(heads, false)],
        OpKind::AttentionGrad { heads, .. } => vec![attention(heads, true)],
        OpKind::RingAttention { heads, .. } => vec![attention(heads, false)],
        OpKind::RingAttentionGrad { heads, .. } => vec![attention(heads, true)],
        _ if op.only_talks() => Vec::new(),
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
