//! Muon's part of a step's tail: momentum where gradients are owned, whole matrices where they are orthogonalised, the
//! update where parameters are owned.

use serde::Serialize;
use spec::{Optimizer, Zero};

use crate::GroupBuffers;
use crate::buffer::{BufferId, View};
use crate::coords::Members;
use crate::cost::Cost;
use crate::op::{Axis, Op, OpKind};
use crate::params::{GroupId, ParamGroup, Replication};
use crate::place::Placer;
use crate::rank::Rank;
use crate::step::{op, whole};

/// Iterations of Newton and Schulz (Jordan 2024).
pub const NEWTON_SCHULZ_STEPS: usize = 5;

/// Of an orthogonal matrix whose larger side is `n`, entries are about `1 / sqrt(n)` in size; AdamW's updates usually
/// 0.2 to 0.4 (Liu et al. 2025, arXiv 2502.16982, section 2.2).
const USUAL_UPDATE: f64 = 0.2;

/// What the orthogonal factor of a matrix of so many rows and columns is multiplied by.
pub fn update_scale((rows, cols): (usize, usize)) -> f32 {
    (USUAL_UPDATE * (rows.max(cols) as f64).sqrt()) as f32
}

/// One matrix of a group, which Muon orthogonalises by itself: queries, keys and values, gate and up, and each expert's
/// are matrices of their own, though they lie under one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// First row in the group.
    pub row0: usize,
    /// Rows here.
    pub rows: usize,
    /// Whether this rank orthogonalises it; the ranks that shard a group take its matrices by turns.
    pub mine: bool,
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
    pub fn whole(self, rows: usize, cols: usize) -> (usize, usize) {
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

/// FLOPs of orthogonalising a matrix: `X X^T`, counted at half for it is symmetric, what the iterations multiply by, all of
/// small symmetric products (four an iteration, less three that the first and the last do without), and the product of
/// that with `X`. A square matrix takes as many whether it is done in one go or, as it is, in two.
pub fn newton_schulz_flops(rows: usize, cols: usize) -> u64 {
    let (m, n) = (rows.min(cols) as u64, rows.max(cols) as u64);
    3 * m * m * n + (4 * NEWTON_SCHULZ_STEPS as u64 - 3) * m * m * m
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

/// Pushes the update of one group. Between its ops whole matrices lie where the micro-batches' activations did.
pub(crate) fn update(placer: &mut Placer<'_>, id: GroupId, turns: &mut Turns, ops: &mut Vec<Op>) {
    let cx = placer.cx;
    let group = &cx.groups[id.0 as usize];
    // Without ZeRO every replica has all of the gradients, and updates all of the parameters.
    let (shards, shard) = match cx.layout.zero {
        Zero::Off => (1, 0),
        _ => cx.shards(group.replication),
    };
    let shares = shares(cx, group);
    let (gathers, ranks) = (shards > 1, shares.ranks());
    let matrix = |part: &crate::ParamPart| Matrix {
        row0: part.local_row0,
        rows: part.rows,
        mine: turns.next(group.replication, shards) == shard,
    };
    let matrices: Vec<Matrix> = group.parts.iter().map(matrix).collect();
    let first = ops.len();
    let last = first + 2 + 2 * usize::from(gathers) + usize::from(ranks > 1);
    let (rows, cols) = (group.rows, group.cols);
    let update = placer.tail_value(format!("update.{}", group.name), (rows, cols), None, (first, last));
    let gathered = (ranks > 1).then(|| {
        let name = format!("matrices.{}", group.name);
        let (orthogonalised, from) = (last - 1 - usize::from(gathers), last - 2 - usize::from(gathers));
        placer.tail_value(name, (ranks * rows, cols), Some(update), (from, orthogonalised))
    });
    let b: GroupBuffers = placer.groups[id.0 as usize].clone();
    let view = |buffer: BufferId| whole(&placer.buffers, buffer);
    let named = |what: &str| format!("optim.{}.{what}", group.name);
    let elements = b.owned.count as u64;

    let momentum = OpKind::MuonMomentum { group: id };
    let mut momentum =
        op(named("momentum"), momentum, vec![view(b.grad)], vec![view(b.exp_avg), view(update)]);
    // The gradient and the momentum are read, the momentum and the update written.
    momentum.cost = Cost { flops: 0, bytes: 16 * elements };
    ops.push(momentum);
    if gathers {
        let over = Members::Shards(group.replication);
        ops.push(op(named("whole"), OpKind::GatherUpdate { over, group: id }, vec![], vec![view(update)]));
    }
    if let Some(gathered) = gathered {
        let kind = OpKind::GatherUpdate { over: Members::Axis(Axis::Tp), group: id };
        ops.push(op(named("matrices"), kind, vec![view(update)], vec![view(gathered)]));
    }
    ops.push(orthogonalise(
        named("orthogonal"),
        (matrices, shares),
        view(gathered.unwrap_or(update)),
        (view(update), cols),
    ));
    if gathers {
        let kind = OpKind::ScatterUpdate { group: id };
        ops.push(op(named("scatter"), kind, vec![view(update)], vec![]));
    }
    let outs = [b.param].into_iter().chain(b.master).map(view).collect();
    let kind = OpKind::Muon { group: id, decay: group.decay };
    let mut apply = op(format!("optim.{}", group.name), kind, vec![view(update)], outs);
    // The update is read, the weight read and written; bf16 weights written too.
    apply.cost.bytes = elements * if b.master.is_some() { 14 } else { 12 };
    ops.push(apply);
    debug_assert_eq!(ops.len(), last + 1, "the last op that reads the update");
}

fn orthogonalise(name: String, of: (Vec<Matrix>, Shares), from: View, (to, cols): (View, usize)) -> Op {
    let (matrices, shares) = of;
    let flops = |m: &Matrix| {
        let (rows, cols) = shares.whole(m.rows, cols);
        newton_schulz_flops(rows, cols)
    };
    let flops = matrices.iter().filter(|m| m.mine).map(flops).sum();
    let bytes = 4 * (cols * (from.rows + to.rows)) as u64;
    let kind = OpKind::Orthogonalise { matrices, shares };
    Op { cost: Cost { flops, bytes }, ..op(name, kind, vec![from], vec![to]) }
}

/// How tensor-parallel ranks share a group: what is cut by columns has fewer of them than the whole parameter.
fn shares(cx: &Rank<'_>, group: &ParamGroup) -> Shares {
    let (index, ranks) = (cx.coords.tp, cx.layout.tp);
    if ranks == 1 || group.replicated_tp || group.key.role.is_expert() {
        return Shares::Whole;
    }
    match group.parts.iter().all(|p| p.cols == p.global.1) {
        true => Shares::Rows { index, ranks },
        false => Shares::Cols { index, ranks },
    }
}
