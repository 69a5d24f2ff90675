//! Muon's part of a step's tail: momentum where gradients are owned, whole matrices where they are orthogonalised, the
//! update where parameters are owned.

use serde::Serialize;
use spec::{DType, Optimizer, Zero};

use crate::buffer::{BufferId, View};
use crate::coords::Members;
use crate::cost::Cost;
use crate::op::{Axis, Op, OpKind};
use crate::params::{GroupId, ParamGroup, Replication};
use crate::place::{Placer, aligned};
use crate::rank::Rank;
use crate::role::Place;
use crate::step::{op, whole};

/// Of an orthogonal matrix whose larger side is `n`, entries are about `1 / sqrt(n)` in size; AdamW's updates usually
/// 0.2 to 0.4 (Liu et al. 2025, arXiv 2502.16982, section 2.2).
const USUAL_UPDATE: f64 = 0.2;

/// What the orthogonal factor of a matrix of so many rows and columns is multiplied by.
pub fn update_scale((rows, cols): (usize, usize)) -> f32 {
    (USUAL_UPDATE * (rows.max(cols) as f64).sqrt()) as f32
}

/// One matrix of a group, which Muon orthogonalises by itself: queries, keys and values of each head, gate and up, and each
/// expert's are matrices of their own, though they lie under one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// Which of the op's groups.
    pub of: usize,
    /// First row in the group.
    pub row0: usize,
    /// Rows here.
    pub rows: usize,
    /// Whether this rank orthogonalises it; the ranks that shard a group take its matrices by turns.
    pub mine: bool,
}

impl Matrix {
    /// Rows and columns of all of it, in a group of so many columns that ranks share like that.
    pub fn whole(&self, shares: Shares, cols: usize) -> (usize, usize) {
        shares.whole(self.rows, cols)
    }

    /// FLOPs of orthogonalising it.
    pub fn flops(&self, shares: Shares, cols: usize) -> u64 {
        let (rows, cols) = self.whole(shares, cols);
        newton_schulz_flops(rows, cols)
    }
}

/// How the tensor-parallel ranks share a group's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shares {
    /// Each holds all of them.
    Whole,
    /// Each holds some rows of every matrix.
    Rows {
        /// Whose rows these are.
        index: usize,
        /// Of how many.
        ranks: usize,
    },
    /// Each holds some columns of every matrix.
    Cols {
        /// Whose columns these are.
        index: usize,
        /// Of how many.
        ranks: usize,
    },
}

impl Shares {
    /// Ranks that hold parts of a matrix.
    pub fn ranks(self) -> usize {
        match self {
            Shares::Whole => 1,
            Shares::Rows { ranks, .. } | Shares::Cols { ranks, .. } => ranks,
        }
    }

    /// Rows and columns of a whole matrix of which each rank holds `rows` x `cols`.
    fn whole(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Shares::Whole => (rows, cols),
            Shares::Rows { ranks, .. } => (rows * ranks, cols),
            Shares::Cols { ranks, .. } => (rows, cols * ranks),
        }
    }
}

/// Whether Muon updates a group.
pub(crate) fn updates(cx: &Rank<'_>, group: &ParamGroup) -> bool {
    cx.request.recipe.optimizer == Optimizer::Muon
        && !cx.generates()
        && !group.key.bias
        && group.key.role.is_hidden_matrix()
}

/// FLOPs of orthogonalising a matrix: `X X^T`, counted at half for it is symmetric, what the two steps of
/// `kernels::POLYNOMIALS` multiply by, all of small symmetric products (three a step, and three between them), and the product
/// of that with `X`. A square matrix takes as many whether it is done in one go or, as it is, in two.
pub fn newton_schulz_flops(rows: usize, cols: usize) -> u64 {
    let (m, n) = (rows.min(cols) as u64, rows.max(cols) as u64);
    3 * m * m * n + 9 * m * m * m
}

/// Whose turn it is to orthogonalise the next matrix, by which ranks hold the same ones.
#[derive(Default)]
pub(crate) struct Turns {
    data: usize,
    expert: usize,
}

impl Turns {
    fn next(&mut self, replication: Replication, ranks: usize) -> usize {
        let turn = match replication {
            Replication::Data => &mut self.data,
            Replication::Expert => &mut self.expert,
        };
        *turn += 1;
        (*turn - 1) % ranks
    }
}

/// What becomes of one group.
struct Update<'a> {
    id: GroupId,
    group: &'a ParamGroup,
    shares: Shares,
    /// Several ranks own shares of it.
    sharded: bool,
    update: View,
    /// The update, or the parts of it of all tensor-parallel ranks.
    whole: View,
}

/// Pushes the updates of groups, those of as many layers at a time as there is room for where the micro-batches' activations
/// lay: the more matrices are orthogonalised at once, the more evenly threads share them, each with one of its own.
pub(crate) fn update(placer: &mut Placer<'_>, ids: &[GroupId], ops: &mut Vec<Op>) {
    let (cx, room) = (placer.cx, placer.scratch());
    let group = |id: GroupId| &cx.groups[id.0 as usize];
    let len = |id: &GroupId| {
        let ranks = shares(cx, group(*id)).ranks();
        let copies = 1 + if ranks > 1 { ranks } else { 0 };
        copies * aligned(group(*id).len() * DType::F32.bytes())
    };
    let (mut turns, mut first, mut end, mut taken) = (Turns::default(), 0, 0, 0);
    for layer in ids.chunk_by(|a, b| group(*a).key.place == group(*b).key.place) {
        let more = layer.iter().map(len).sum::<usize>();
        if end > first && taken + more > room {
            update_at_once(placer, &ids[first..end], &mut turns, ops);
            (first, taken) = (end, 0);
        }
        (end, taken) = (end + layer.len(), taken + more);
    }
    if end > first {
        update_at_once(placer, &ids[first..end], &mut turns, ops);
    }
}

/// Pushes the updates of groups whose matrices one op orthogonalises.
fn update_at_once(placer: &mut Placer<'_>, ids: &[GroupId], turns: &mut Turns, ops: &mut Vec<Op>) {
    let cx = placer.cx;
    // Without ZeRO every replica has all of the gradients, and updates all of the parameters.
    let shards = |group: &ParamGroup| match cx.layout.zero {
        Zero::Off => (1, 0),
        _ => cx.shards(group.replication),
    };
    let groups = || ids.iter().map(|id| &cx.groups[id.0 as usize]);
    let before = |g: &ParamGroup| 1 + usize::from(shards(g).0 > 1) + usize::from(shares(cx, g).ranks() > 1);
    let orthogonalised = ops.len() + groups().map(before).sum::<usize>();
    let (mut at, mut last, mut end) = (ops.len(), orthogonalised, 0);
    let (mut updates, mut matrices) = (Vec::new(), Vec::new());
    for (of, (&id, group)) in ids.iter().zip(groups()).enumerate() {
        let ((shards, shard), shares) = (shards(group), shares(cx, group));
        last += 1 + usize::from(shards > 1);
        let mut value = |what: &str, rows, alive| {
            let id = placer.tail_value(format!("{what}.{}", group.name), (rows, group.cols), &mut end, alive);
            whole(&placer.buffers, id)
        };
        let update = value("update", group.rows, (at, last));
        at += before(group);
        let ranks = shares.ranks();
        let gathered = (ranks > 1).then(|| value("matrices", ranks * group.rows, (at - 1, orthogonalised)));
        for part in &group.parts {
            let mut row0 = part.local_row0;
            for rows in group.matrix_rows(part) {
                matrices.push(Matrix {
                    of,
                    row0,
                    rows,
                    mine: turns.next(group.replication, shards) == shard,
                });
                row0 += rows;
            }
        }
        let (sharded, whole) = (shards > 1, gathered.unwrap_or(update));
        updates.push(Update { id, group, shares, sharded, update, whole });
    }
    updates.iter().for_each(|u| u.begin(placer, ops));
    ops.push(orthogonalise(matrices, &updates));
    updates.iter().for_each(|u| u.end(placer, ops));
    debug_assert_eq!(ops.len(), last + 1, "the last op that reads an update");
}

impl Update<'_> {
    fn named(&self, what: &str) -> String {
        format!("optim.{}{what}", self.group.name)
    }

    /// From the gradient to whole matrices.
    fn begin(&self, placer: &Placer<'_>, ops: &mut Vec<Op>) {
        let (group, b) = (self.id, &placer.groups[self.id.0 as usize]);
        let view = |buffer: BufferId| whole(&placer.buffers, buffer);
        let outs = vec![view(b.exp_avg), self.update];
        let kind = OpKind::MuonMomentum { group };
        let mut momentum = op(self.named(".momentum"), kind, vec![view(b.grad)], outs);
        // The gradient and the momentum are read, the momentum and the update written.
        momentum.cost = Cost { flops: 0, bytes: 16 * b.owned.count as u64 };
        ops.push(momentum);
        if self.sharded {
            let kind = OpKind::GatherUpdate { over: Members::Shards(self.group.replication), group };
            ops.push(op(self.named(".whole"), kind, vec![], vec![self.update]));
        }
        if self.whole.buffer != self.update.buffer {
            let kind = OpKind::GatherUpdate { over: Members::Axis(Axis::Tp), group };
            ops.push(op(self.named(".matrices"), kind, vec![self.update], vec![self.whole]));
        }
    }

    /// From orthogonal matrices to parameters.
    fn end(&self, placer: &Placer<'_>, ops: &mut Vec<Op>) {
        let (group, b) = (self.id, &placer.groups[self.id.0 as usize]);
        if self.sharded {
            let kind = OpKind::ScatterUpdate { group };
            ops.push(op(self.named(".scatter"), kind, vec![self.update], vec![]));
        }
        let outs = [b.param].into_iter().chain(b.master).map(|b| whole(&placer.buffers, b)).collect();
        let kind = OpKind::Muon { group, decay: self.group.decay };
        let mut apply = op(self.named(""), kind, vec![self.update], outs);
        // The update is read, the weight read and written; bf16 weights written too.
        apply.cost.bytes = b.owned.count as u64 * if b.master.is_some() { 14 } else { 12 };
        ops.push(apply);
    }
}

/// The matrices whose turn is this rank's come first, the largest of them before the others.
fn orthogonalise(mut matrices: Vec<Matrix>, updates: &[Update<'_>]) -> Op {
    let flops = |m: &Matrix| m.flops(updates[m.of].shares, updates[m.of].group.cols);
    matrices.sort_by_key(|m| (!m.mine, std::cmp::Reverse(flops(m))));
    let cost = Cost {
        flops: matrices.iter().filter(|m| m.mine).map(flops).sum(),
        bytes: updates.iter().map(|u| 4 * (u.group.cols * (u.whole.rows + u.update.rows)) as u64).sum(),
    };
    let [first, last] = [updates.first(), updates.last()].map(|u| u.map(|u| u.group.key.place));
    let name = match (first, last) {
        (Some(Place::Layer(i)), Some(Place::Layer(j))) if i != j => {
            format!("optim.layers.{i}-{j}.orthogonal")
        }
        (Some(Place::Layer(i)), Some(Place::Layer(_))) => format!("optim.layers.{i}.orthogonal"),
        (Some(Place::Layer(i)), _) => format!("optim.layers.{i}-mtp.orthogonal"),
        _ => "optim.mtp.orthogonal".to_owned(),
    };
    let kind = OpKind::Orthogonalise { matrices, shares: updates.iter().map(|u| u.shares).collect() };
    let (ins, outs) = updates.iter().map(|u| (u.whole, u.update)).unzip();
    Op { cost, ..op(name, kind, ins, outs) }
}

/// How tensor-parallel ranks share a group: what is cut by columns has fewer of them than the whole parameter.
fn shares(cx: &Rank<'_>, group: &ParamGroup) -> Shares {
    let (index, ranks) = (cx.coords.tp, cx.layout.tp);
    if ranks == 1 || group.replicated_tp || group.key.role.is_expert() || !group.head_rows.is_empty() {
        return Shares::Whole;
    }
    match group.parts.iter().all(|p| p.cols == p.global.1) {
        true => Shares::Rows { index, ranks },
        false => Shares::Cols { index, ranks },
    }
}
