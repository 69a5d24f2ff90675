//! From the program's ops to calls and messages: everything that does not depend on the micro-batch, once.

use std::ops::Range;

use program::{
    Axis, Block, BufferId, Collective, Comm, Deal, GroupId, Members, NORM_CHUNK, Op, OpId, OpKind, Owned,
    Place, Program, Slice, View, When,
};
use spec::DType;

use crate::launch::{Address, Call, Operand, Said, Talk, Target};

/// What an op does: a kernel, messages, or first the one and then the other unless it `walks`, computing between messages.
pub(crate) struct Action {
    pub(crate) walks: bool,
    pub(crate) call: Option<Call>,
    pub(crate) talk: Option<Talk>,
}

/// Of every op, by block.
pub(crate) fn actions(p: &Program) -> Vec<Vec<Action>> {
    let action = |op: &Op| Action {
        walks: op.comm.as_ref().is_some_and(|c| c.what == Collective::Ring),
        call: (!op.only_talks()).then(|| call(p, op)),
        talk: op.comm.as_ref().map(|c| talk(p, op.id, c)),
    };
    p.blocks.iter().map(|b: &Block| b.ops.iter().map(action).collect()).collect()
}

/// A whole static buffer.
pub(crate) fn whole(p: &Program, buffer: BufferId) -> Operand {
    Address::whole(p, buffer).at(0)
}

/// The stretch of the sums that ranks share in which the losses of all sequences lie; the vote to stop is behind it.
pub(crate) fn losses(p: &Program) -> Slice {
    let buffer = p.io.norm_chunks;
    Slice { buffer, first: p.buffer(buffer).len() - 1 - p.sequences, count: p.sequences }
}

/// The stretch in front of it, in which those of the module lie that predicts one token more.
pub(crate) fn losses_ahead(p: &Program) -> Slice {
    let (losses, count) = (losses(p), (p.io.losses - 1) * p.sequences);
    Slice { first: losses.first - count, count, ..losses }
}

/// The stretch in front of those, in which the counts of all layers' experts lie.
pub(crate) fn expert_counts(p: &Program) -> Slice {
    let count = p.io.expert_counts.map_or(0, |id| p.buffer(id).len());
    let losses = losses_ahead(p);
    Slice { first: losses.first - count, count, ..losses }
}

/// The stretch in front of those, in which the greatest scores of all data- and context-parallel ranks' heads lie.
pub(crate) fn logit_maxima(p: &Program) -> Slice {
    let own = p.io.logit_maxima.map_or(0, |id| p.buffer(id).len());
    let count = own * p.layout.tp * p.layout.replicas();
    let counts = expert_counts(p);
    Slice { first: counts.first - count, count, ..counts }
}

/// The sum of the losses over all ranks, for an evaluation; `None` for a rank alone.
pub(crate) fn eval_sum(p: &Program) -> Option<Talk> {
    let slice = losses(p);
    let message = program::Message {
        from: Some(slice),
        to: Some(slice),
        elements: slice.count,
        dtype: DType::F64,
        deal: Deal::Even,
    };
    let (what, members) = (Collective::AllReduce, Members::World);
    let comm = Comm { what, members, messages: vec![message], when: When::Now };
    (p.layout.world() > 1).then(|| talk(p, OpId::of("eval.loss"), &comm))
}

fn call(p: &Program, op: &Op) -> Call {
    let view = |v: &View| Address::view(p, *v);
    let grad = |g: &program::GradOut| Target {
        levels: view(&g.levels),
        rows: p.group(g.group).rows,
        cols: p.group(g.group).cols,
        inner: g.inner.clone(),
        outer: g.outer.clone(),
        results: g.results,
        result: g.result,
        streams: g.streams,
        upper: g.upper.clone(),
    };
    let mut call = Call {
        op: op.id,
        kind: op.kind.clone(),
        ins: op.ins.iter().map(view).collect(),
        acc: op.acc.as_ref().map(view),
        outs: op.outs.iter().map(view).collect(),
        grads: op.grads.iter().map(grad).collect(),
        workspace: Operand {
            offset: p.workspace_offset,
            rows: 1,
            cols: p.memory.workspace / 4,
            dtype: DType::F32,
        },
        sequence: p.sequence_of(&op.kind),
        places: p.positions().map(|range| range.start),
        first: (p.first_sequence(0), p.first_sequence(1) - p.first_sequence(0)),
        row0: row0(p, op),
        features: (0, 1),
        ring: (p.coords.cp, p.layout.cp),
        precision: p.precision,
    };
    implied(p, op, &mut call);
    call
}

/// Tensor-parallel ranks that share the rows of a micro-batch have equal runs of them.
fn row0(p: &Program, op: &Op) -> usize {
    let rows = op.outs.first().map_or(0, |v| v.rows);
    let shared = p.layout.sequence_parallel && rows < p.micro_batch() * p.local_sequence();
    if shared { p.coords.tp * rows } else { 0 }
}

/// Operands that an op's kind implies and its views do not list; see [`crate::Launch::kind`].
fn implied(p: &Program, op: &Op, call: &mut Call) {
    let owned = |group: GroupId, buffer| Address::slice(p, p.owned_in(group, buffer));
    let buffers = |group: GroupId| &p.group_buffers[group.0 as usize];
    match op.kind {
        OpKind::Rope { .. } | OpKind::LatentRope { .. } | OpKind::LatentRopeGrad { .. } => {
            call.ins.extend([p.io.cos, p.io.sin].map(|id| Address::whole(p, id)))
        }
        OpKind::LossSum { sequence, ahead } => {
            let first = sequence + if ahead { p.local_sequences } else { 0 };
            call.outs = vec![Address::whole(p, p.io.loss_leaves).walk(first, 1, p.micro_batch())];
        }
        OpKind::AttentionCached { layer, .. } | OpKind::LatentCached { layer, .. } => {
            let rows = p.mode.positions();
            let of_layer = |buffer| Address::view(p, View { buffer, row0: layer * rows, rows });
            call.outs.extend([p.io.k_cache, p.io.v_cache].into_iter().flatten().map(of_layer));
            if let OpKind::LatentCached { .. } = op.kind {
                call.ins.extend([p.io.cos, p.io.sin].map(|id| Address::whole(p, id)));
            }
        }
        OpKind::ShardGrads { bucket } => {
            (call.ins, call.grads) =
                op.ins.iter().zip(&p.buckets[bucket].grads).map(|(v, g)| shard(p, v, *g)).unzip();
        }
        OpKind::TieGrads { group } => {
            let b = buffers(group);
            call.ins = b.head_grad.iter().map(|id| owned(group, *id)).collect();
            call.outs = vec![owned(group, b.grad)];
        }
        OpKind::Slice { axis: Axis::Tp } => {
            let (from, rows) = (op.ins[0], op.outs[0].rows);
            let row0 = from.row0 + p.coords.tp * rows;
            call.ins = vec![Address::view(p, View { row0, rows, ..from })];
        }
        OpKind::RouteGrad { .. } => {
            let Some(counts) = p.io.expert_counts else { return };
            let row0 = match op.place {
                Place::Layer(layer) => layer,
                // It comes last.
                _ => p.buffer(counts).rows - 1,
            };
            call.outs.push(Address::view(p, View { buffer: counts, row0, rows: 1 }));
        }
        OpKind::GradNorm => (call.ins, call.outs) = norm(p),
        _ => updated(p, op, call),
    }
}

/// Those of what changes weights once a step.
fn updated(p: &Program, op: &Op, call: &mut Call) {
    let owned = |group: GroupId, buffer| Address::slice(p, p.owned_in(group, buffer));
    let buffers = |group: GroupId| &p.group_buffers[group.0 as usize];
    match op.kind {
        OpKind::AdamW { group, .. } => {
            let b = buffers(group);
            call.ins = vec![owned(group, b.grad)];
            let outs = [b.param, b.exp_avg].into_iter().chain(b.exp_avg_sq).chain(b.master);
            call.outs = outs.map(|id| owned(group, id)).collect();
        }
        OpKind::MuonMomentum { group } => {
            let b = buffers(group);
            call.ins = vec![owned(group, b.grad)];
            call.outs = [b.exp_avg, op.outs[1].buffer].map(|id| owned(group, id)).to_vec();
        }
        OpKind::Muon { group, .. } => {
            let b = buffers(group);
            call.ins = vec![owned(group, op.ins[0].buffer)];
            call.outs = [b.param].into_iter().chain(b.master).map(|id| owned(group, id)).collect();
        }
        OpKind::LogitMax { layer, heads } => {
            // Where heads are dealt, those of this rank among all.
            let first = |all: usize| layer * all + if heads.q < all { p.coords.cp * heads.q } else { 0 };
            let row = |buffer| Slice { buffer, first: first(p.buffer(buffer).cols), count: heads.q };
            call.outs = p.io.logit_maxima.map(|buffer| Address::slice(p, row(buffer))).into_iter().collect();
        }
        OpKind::QkClip { group, layer, .. } => {
            let b = buffers(group);
            call.ins = (0..p.layout.replicas()).map(|replica| maxima_of(p, replica, layer)).collect();
            call.outs = [b.param].into_iter().chain(b.master).map(|id| owned(group, id)).collect();
            // A row of a matrix, or an element of a bias, is a feature.
            let of = p.group(group);
            call.features = (b.owned.first, if of.rows == 1 { 1 } else { of.cols });
        }
        OpKind::Average { group } => {
            let b = buffers(group);
            call.ins = vec![owned(group, b.master.unwrap_or(b.param))];
            call.outs = b.average.map(|id| owned(group, id)).into_iter().collect();
        }
        OpKind::SwapAverage { group } => {
            let b = buffers(group);
            let outs = [b.param].into_iter().chain(b.master).chain(b.average);
            call.outs = outs.map(|id| owned(group, id)).collect();
        }
        _ => {}
    }
}

/// The greatest scores of this rank's heads of a layer, as one of the data- and context-parallel ranks has seen them.
fn maxima_of(p: &Program, replica: usize, layer: usize) -> Address {
    let all = logit_maxima(p);
    let (layers, heads) = p.io.logit_maxima.map_or((0, 0), |id| (p.buffer(id).rows, p.buffer(id).cols));
    let row = (replica * layers + layer) * p.layout.tp + p.coords.tp;
    Address::slice(p, Slice { first: all.first + row * heads, count: heads, ..all })
}

/// One gradient of a micro-batch, scattered: the owned part of its sum, and the partial sums that it is added to.
fn shard(p: &Program, view: &View, (group, sum): (GroupId, BufferId)) -> (Address, Target) {
    let (of, b) = (p.group(group), &p.group_buffers[group.0 as usize]);
    let Owned { first, count } = b.owned;
    // The level of a micro-batch's gradient that holds its sum.
    let last = View { row0: view.row0 + view.rows - of.rows, rows: of.rows, ..*view };
    let last = p.slice(last);
    let fresh = Slice { first: last.first + first, count, ..last };
    let levels = b.head_grad_levels.filter(|_| b.head_grad == Some(sum)).unwrap_or(b.grad_levels);
    let target = Target {
        levels: Address::whole(p, levels),
        rows: 1,
        cols: count,
        inner: Vec::new(),
        outer: p.shard_radices.clone(),
        results: 1,
        result: 0,
        streams: 1,
        upper: Vec::new(),
    };
    (Address::slice(p, fresh), target)
}

/// What this rank counts in the gradient norm: what it owns under ZeRO, else its share of what all ranks with the same
/// parameters hold; and where the sums of its chunks go, behind all sums.
fn norm(p: &Program) -> (Vec<Address>, Vec<Address>) {
    let sums = p.io.norm_chunks;
    let (mut ins, mut outs) = (Vec::new(), vec![Address::whole(p, sums)]);
    for (id, b) in (0..).map(GroupId).zip(&p.group_buffers).filter(|(_, b)| b.counts) {
        let Owned { first, count } = p.share(id);
        ins.push(Address::slice(p, p.share_in(id, b.grad)));
        let chunks = Slice {
            buffer: sums,
            first: b.norm_chunk0 + first / NORM_CHUNK,
            count: count.div_ceil(NORM_CHUNK),
        };
        outs.push(Address::slice(p, chunks));
    }
    (ins, outs)
}

fn talk(p: &Program, op: OpId, comm: &Comm) -> Talk {
    let ranks = comm.members.ranks(p.coords, &p.layout);
    let place = |rank: usize| ranks.iter().position(|r| *r == rank).unwrap_or(0);
    let me = place(p.rank);
    let peer = match comm.what {
        Collective::Send { to, .. } => place(to),
        Collective::Recv { from, .. } => place(from),
        _ => me,
    };
    let one = |m: &program::Message| {
        let dealt =
            matches!(comm.what, Collective::AllGather | Collective::ReduceScatter | Collective::AllToAll);
        let parts: Vec<Range<usize>> =
            (0..ranks.len()).filter(|_| dealt).map(|i| m.part(i, ranks.len())).collect();
        let (parts, arrive) = match comm.what {
            // All to the next, from the one before.
            Collective::Ring => {
                let whole = |at: usize| {
                    (0..ranks.len()).map(|i| 0..if i == at { m.elements } else { 0 }).collect::<Vec<_>>()
                };
                (whole((me + 1) % ranks.len()), whole((me + ranks.len() - 1) % ranks.len()))
            }
            _ => (parts.clone(), parts),
        };
        let alone = Comm { messages: vec![*m], ..*comm };
        let counted = match (m.deal, m.from) {
            (Deal::Counted { leave, arrive }, Some(rows)) => {
                let counts = [leave, arrive].map(|v| Address::view(p, v));
                Some((counts, p.buffer(rows.buffer).cols))
            }
            _ => None,
        };
        Said {
            from: m.from.map(|s| Address::slice(p, s)),
            to: m.to.map(|s| Address::slice(p, s)),
            parts,
            arrive,
            counted,
            sent_bytes: alone.sent_bytes(me, ranks.len()),
        }
    };
    let messages = comm.messages.iter().map(one).collect();
    Talk { op, what: comm.what, members: comm.members, when: comm.when, peer, messages }
}
