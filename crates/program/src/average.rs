//! The average of the weights over steps: kept beside the optimiser's state, and looked at in their place.

use spec::DType;

use crate::buffer::{BufferId, View};
use crate::op::{Op, OpKind};
use crate::place::Placer;
use crate::rank::Rank;
use crate::step::{each, gathers, op, whole};

/// Each group's average follows its update.
pub(crate) fn updates(cx: &Rank<'_>, placer: &Placer<'_>) -> Vec<Op> {
    let view = |id: BufferId| whole(&placer.buffers, id);
    let update = |(id, group, b): (_, &crate::ParamGroup, &crate::GroupBuffers)| {
        let (weights, average) = (view(b.master.unwrap_or(b.param)), view(b.average?));
        let name = format!("average.{}", group.name);
        let mut op = op(name, OpKind::Average { group: id }, vec![weights], vec![average]);
        // Weight and average are read, the average written.
        op.cost.bytes = 12 * b.owned.count as u64;
        Some(op)
    };
    each(cx, &placer.groups).filter_map(update).collect()
}

/// What puts the average in the weights' place, and the weights back.
pub(crate) fn swap(cx: &Rank<'_>, placer: &Placer<'_>) -> Vec<Op> {
    let view = |id: BufferId| whole(&placer.buffers, id);
    let swap = |(id, group, b): (_, &crate::ParamGroup, &crate::GroupBuffers)| {
        let outs: Vec<View> = [b.param].into_iter().chain(b.master).chain([b.average?]).map(view).collect();
        let name = format!("average.{}.swap", group.name);
        let mut op = op(name, OpKind::SwapAverage { group: id }, vec![], outs);
        // Both are read and written, in f32; bf16 weights written too.
        op.cost.bytes = b.owned.count as u64 * if cx.dtype == DType::F32 { 16 } else { 18 };
        Some(op)
    };
    let mut ops: Vec<Op> = each(cx, &placer.groups).filter_map(swap).collect();
    if !ops.is_empty() {
        ops.extend(gathers(cx, placer, "average"));
    }
    ops
}
