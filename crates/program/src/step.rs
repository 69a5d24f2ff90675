use std::collections::HashMap;

use spec::{DType, Zero};

use crate::average;
use crate::buffer::{Buffer, BufferId, View};
use crate::coords::Members;
use crate::cost::Cost;
use crate::graph::Phase;
use crate::muon;
use crate::op::{Axis, GradSum, Op, OpId, OpKind};
use crate::params::{GroupId, ParamGroup};
use crate::place::Placer;
use crate::rank::Rank;
use crate::role::{Place, Role};
use crate::{Bucket, GroupBuffers, qk_clip};

/// The tail of a step: wait for reduced gradients, settle shared ones, clip, update, hand out parameters.
pub(crate) fn ops(cx: &Rank<'_>, placer: &mut Placer<'_>) -> Vec<Op> {
    let mut ops = settle(cx, placer);
    updates(cx, placer, &mut ops);
    ops.extend(balance(cx, placer));
    ops.extend(qk_clip::updates(cx, placer));
    ops.extend(average::updates(cx, placer));
    ops.extend(gathers(cx, placer, "optim"));
    ops
}

/// Moves the biases of experts by the counts of the step, which every rank has in the sums that ranks share.
fn balance(cx: &Rank<'_>, placer: &Placer<'_>) -> Option<Op> {
    let rate = cx.model.experts.map(|e| e.router.bias_rate).filter(|rate| *rate > 0.0)?;
    let (bias, counts) = (placer.io.expert_bias?, placer.io.expert_counts?);
    let rows = placer.buffers[counts.0 as usize].len();
    let sums = whole(&placer.buffers, placer.io.norm_chunks);
    let row0 = sums.rows - 1 - placer.io.losses * cx.request.sequences - rows;
    let (ins, outs) = (vec![View { row0, rows, ..sums }], vec![whole(&placer.buffers, bias)]);
    let mut balance = op("experts.balance".into(), OpKind::BalanceExperts { rate }, ins, outs);
    // Counts are read, biases read and written.
    balance.cost.bytes = 16 * rows as u64;
    Some(balance)
}

/// Hands parameters that their owners have changed to those that share them.
pub(crate) fn gathers(cx: &Rank<'_>, placer: &Placer<'_>, why: &str) -> Vec<Op> {
    let zero = matches!(cx.layout.zero, Zero::Optimizer | Zero::Gradients);
    let shared = |group: &ParamGroup| zero && cx.shards(group.replication).0 > 1;
    let gather = |(id, group, b): (GroupId, &ParamGroup, &GroupBuffers)| {
        let param = whole(&placer.buffers, b.param);
        let name = format!("{why}.{}.gather", group.name);
        op(name, OpKind::AllGatherParams { group: id }, vec![], vec![param])
    };
    each(cx, &placer.groups).filter(|(_, group, _)| shared(group)).map(gather).collect()
}

/// All rows of a buffer.
pub(crate) fn whole(buffers: &[Buffer], buffer: BufferId) -> View {
    View { buffer, row0: 0, rows: buffers[buffer.0 as usize].rows }
}

/// What is done about gradients once all of them are there, up to their norm.
fn settle(cx: &Rank<'_>, placer: &Placer<'_>) -> Vec<Op> {
    let Placer { buffers, groups, buckets, .. } = placer;
    let whole = |id: BufferId| whole(buffers, id);
    let layout = &cx.layout;
    let mut ops = Vec::new();
    for (bucket, b) in buckets.iter().enumerate() {
        if layout.zero < Zero::Gradients && begins(cx, b) {
            ops.push(op(format!("grads.bucket{bucket}.wait"), OpKind::WaitGrads { bucket }, vec![], vec![]));
        }
        if cx.sums_over_owners(b.replication) {
            let kind = OpKind::ReduceGrads { bucket, sum: GradSum::Owners };
            let views = b.grads.iter().map(|(_, grad)| whole(*grad)).collect();
            ops.push(op(format!("grads.bucket{bucket}.owners"), kind, views, vec![]));
        }
    }
    for (id, group, b) in each(cx, groups) {
        if needs_tp_sync(cx, group) {
            let kind = OpKind::SyncGrads { over: Members::Axis(Axis::Tp), group: id };
            ops.push(op(format!("grads.{}.sync", group.name), kind, vec![], vec![whole(b.grad)]));
        }
        if group.key.role == Role::Embedding && cx.shares_embedding() {
            let kind = match b.head_grad {
                Some(_) => OpKind::TieGrads { group: id },
                None => OpKind::SyncGrads { over: Members::Ends, group: id },
            };
            let ins = b.head_grad.iter().map(|h| whole(*h)).collect();
            ops.push(op(format!("grads.{}.tie", group.name), kind, ins, vec![whole(b.grad)]));
        }
    }
    let all = each(cx, groups).map(|(_, _, b)| whole(b.grad)).collect();
    ops.push(op("grads.norm".into(), OpKind::GradNorm, all, vec![]));
    ops
}

/// Pushes the update of every group, by the rule that it is updated by.
fn updates(cx: &Rank<'_>, placer: &mut Placer<'_>, ops: &mut Vec<Op>) {
    let mut hidden = Vec::new();
    for (id, group) in (0..).map(GroupId).zip(&cx.groups) {
        let b = &placer.groups[id.0 as usize];
        let Some(exp_avg_sq) = b.exp_avg_sq else {
            hidden.push(id);
            continue;
        };
        let whole = |id: BufferId| whole(&placer.buffers, id);
        let kind = OpKind::AdamW { group: id, decay: group.decay };
        let mut outs = vec![whole(b.param)];
        outs.extend(b.master.map(whole));
        outs.extend([whole(b.exp_avg), whole(exp_avg_sq)]);
        let mut adamw = op(format!("optim.{}", group.name), kind, vec![whole(b.grad)], outs);
        // Gradient, master and both moments are read, all but the gradient written, in f32; bf16 weights written too.
        adamw.cost.bytes = b.owned.count as u64 * if cx.dtype == DType::F32 { 28 } else { 30 };
        ops.push(adamw);
    }
    muon::update(placer, &hidden, ops);
}

/// The ops of a rank's last backward pass, with each bucket's reduction begun as soon as its gradients are complete.
///
/// `here` says whether no later pass of the micro-batch adds to a buffer.
pub(crate) fn with_reductions(
    ops: &[Op],
    cx: &Rank<'_>,
    buckets: &[Bucket],
    here: &dyn Fn(BufferId) -> bool,
) -> Vec<Op> {
    let mut adds_last: HashMap<BufferId, usize> = HashMap::new();
    for (i, op) in ops.iter().enumerate() {
        adds_last.extend(op.grads.iter().map(|g| (g.sum, i)));
    }
    let mut complete: HashMap<usize, Vec<usize>> = HashMap::new();
    for (i, bucket) in buckets.iter().enumerate().filter(|(_, b)| begins(cx, b)) {
        let last = bucket.grads.iter().filter_map(|(_, b)| adds_last.get(b)).max();
        if let (Some(last), true) = (last, bucket.grads.iter().all(|(_, b)| here(*b))) {
            complete.entry(*last).or_default().push(i);
        }
    }
    let sum = if cx.layout.zero >= Zero::Optimizer { GradSum::Scattered } else { GradSum::Everywhere };
    let mut out = Vec::with_capacity(ops.len() + buckets.len());
    for (i, o) in ops.iter().enumerate() {
        out.push(o.clone());
        for &bucket in complete.get(&i).into_iter().flatten() {
            let view = |(g, b): &(GroupId, BufferId)| View {
                buffer: *b,
                row0: 0,
                rows: cx.groups[g.0 as usize].rows,
            };
            let views = buckets[bucket].grads.iter().map(view).collect();
            let kind = OpKind::ReduceGrads { bucket, sum };
            out.push(op(format!("grads.bucket{bucket}.reduce"), kind, views, vec![]));
        }
    }
    out
}

/// Whether a bucket has others to meet while backward goes on.
fn begins(cx: &Rank<'_>, bucket: &Bucket) -> bool {
    let with = match cx.layout.zero {
        Zero::Off => cx.replicas(bucket.replication),
        _ => cx.shards(bucket.replication),
    };
    with.0 > 1
}

/// Whether gradients of a group need a sum over the tensor-parallel ranks after backward: parameters that each rank
/// used on its own rows of the sequence or for its own heads.
fn needs_tp_sync(cx: &Rank<'_>, group: &ParamGroup) -> bool {
    let on_rows = group.replicated_tp && group.key.role != Role::Positions;
    cx.layout.tp > 1 && on_rows && (cx.layout.sequence_parallel || group.key.role.used_apart())
}

pub(crate) fn each<'a>(
    cx: &'a Rank<'_>,
    groups: &'a [GroupBuffers],
) -> impl Iterator<Item = (GroupId, &'a ParamGroup, &'a GroupBuffers)> {
    let ids = (0..).map(GroupId);
    ids.zip(&cx.groups).zip(groups).map(|((id, group), b)| (id, group, b))
}

pub(crate) fn op(name: String, kind: OpKind, ins: Vec<View>, outs: Vec<View>) -> Op {
    Op {
        id: OpId::of(&name),
        name,
        kind,
        ins,
        acc: None,
        outs,
        grads: Vec::new(),
        phase: Phase::Weight,
        place: Place::Step,
        comm: None,
        cost: Cost::default(),
    }
}

#[cfg(test)]
mod tests {
    use crate::zero::owned;

    #[test]
    fn owned_ranges_tile_the_group_in_whole_chunks() {
        for (len, dp) in [(10, 4), (4096 * 3 + 7, 2), (100_000, 8), (1, 1)] {
            let mut at = 0;
            for r in 0..dp {
                let crate::Owned { first, count } = owned(len, dp, r);
                assert_eq!(first, at);
                assert!(first % crate::NORM_CHUNK == 0 || first == len);
                at += count;
            }
            assert_eq!(at, len);
        }
    }
}
