//! The linear layer of many experts: rows lie in the order of (rank that sent them, expert), and each expert has a
//! weight of its own, `[out, in]`, one under another.

use crate::gemm::{self, Left, Out, Right, Workspace};
use crate::linear::{add_rows, column_sums_of_leaves, column_sums_workspace_len};
use crate::pool::Pool;
use crate::storage::{Acc, Storage};
use crate::tree::{Merge, leaves};

/// How many rows each expert has from each rank and sequence: `counts` is `[peers, experts, leaves]`.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    /// Rows, in the order in which they lie.
    pub counts: &'a [u32],
    /// Experts here.
    pub experts: usize,
    /// Runs of rows (sequences) that each peer's share is counted by.
    pub leaves: usize,
}

impl Groups<'_> {
    /// Rows of all experts.
    pub fn rows(&self) -> usize {
        self.counts.iter().map(|c| *c as usize).sum()
    }

    /// Ranks that rows come from.
    pub fn peers(&self) -> usize {
        self.counts.len() / (self.experts * self.leaves).max(1)
    }

    /// The counts by leaf of an expert's rows from one peer.
    fn unit(&self, peer: usize, expert: usize) -> &[u32] {
        &self.counts[(peer * self.experts + expert) * self.leaves..][..self.leaves]
    }

    /// Where the rows of each (peer, expert) begin, and behind them where the last end.
    fn starts<'w>(&self, ws: &mut Workspace<'w>) -> &'w [u32] {
        let starts: &mut [u32] =
            bytemuck::cast_slice_mut(ws.take(self.counts.len() / self.leaves.max(1) + 1));
        let mut at = 0;
        for (start, unit) in starts.iter_mut().zip(self.counts.chunks(self.leaves.max(1))) {
            *start = at;
            at += unit.iter().sum::<u32>();
        }
        if let Some(end) = starts.last_mut() {
            *end = at;
        }
        starts
    }
}

/// Floats of workspace for [`grouped_linear`], and with `in_` and `out` swapped for [`grouped_linear_dx`], of up to `rows` rows
/// for `experts` experts, which are in `units` with each rank that sends some.
pub fn grouped_linear_workspace_len(
    (units, experts): (usize, usize),
    rows: usize,
    in_: usize,
    out: usize,
    threads: usize,
) -> usize {
    Workspace::room(units + 1) + gemm::product_of_groups_workspace_len(experts, rows, in_, out, threads)
}

/// y = x w^T + b for each expert's rows; `w` is `[experts out, in]`, and `b`, if there is one, `[experts, out]`. Rows behind those that are counted are left alone.
pub fn grouped_linear<T: Storage>(
    pool: &Pool,
    x: &[T],
    (w, b): (&[T], Option<&[T]>),
    groups: Groups<'_>,
    y: &mut [T],
    (in_, out): (usize, usize),
    ws: &mut [f32],
) {
    grouped(pool, x, (w, b), groups, y, (in_, out), Right::Columns, ws);
}

/// dx = dy w for each expert's rows: the gradient of [`grouped_linear`]'s input.
pub fn grouped_linear_dx<T: Storage>(
    pool: &Pool,
    dy: &[T],
    w: &[T],
    groups: Groups<'_>,
    dx: &mut [T],
    (in_, out): (usize, usize),
    ws: &mut [f32],
) {
    grouped(pool, dy, (w, None), groups, dx, (out, in_), Right::Rows, ws);
}

fn grouped<'a, T: Storage>(
    pool: &Pool,
    x: &[T],
    (w, b): (&'a [T], Option<&'a [T]>),
    groups: Groups<'_>,
    y: &mut [T],
    (k, cols): (usize, usize),
    right: fn(&'a [T]) -> Right<'a, T>,
    ws: &mut [f32],
) {
    let experts = groups.experts;
    assert_eq!(w.len(), experts * k * cols, "weights");
    assert!(b.is_none_or(|b| b.len() == experts * cols), "biases");
    let mut workspace = Workspace::new(ws);
    let starts = groups.starts(&mut workspace);
    let run = |e: usize, peer: usize| {
        let unit = peer * experts + e;
        starts[unit] as usize..starts[unit + 1] as usize
    };
    let operand = |e: usize| {
        let bias = b.map(|b| &b[e * cols..(e + 1) * cols]);
        (right(&w[e * k * cols..(e + 1) * k * cols]), bias)
    };
    let of = gemm::Groups { groups: experts, runs: groups.peers(), run: &run, right: &operand };
    let out = Out { y, ld: cols, acc: Acc::None, bias: None };
    gemm::product_of_groups(pool, Left { data: x, ld: k }, of, out, (k, cols), workspace.rest());
}

/// Floats of workspace for [`grouped_linear_dw`] of up to `rows` rows, up to `leaf_rows` of them in a leaf.
pub fn grouped_linear_dw_workspace_len(
    units: usize,
    (rows, leaf_rows): (usize, usize),
    in_: usize,
    out: usize,
    tree: &[u32],
    threads: usize,
) -> usize {
    Workspace::room(units + 1)
        + gemm::weight_gradients_workspace_len((rows, leaf_rows), in_, out, tree, threads)
}

/// The gradient of [`grouped_linear`]'s weights into the levels of `dw_grad`, `[levels, experts out, in]`.
///
/// Of each expert and peer, leaves are added as in [`crate::linear_dw`], by `tree`; what they come to joins the levels
/// as `merge(peer)` says, counted from its first level, peer after peer. A leaf gives an expert at most `leaf_rows` rows.
pub fn grouped_linear_dw<T: Storage>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    groups: Groups<'_>,
    dw_grad: &mut [f32],
    (in_, out, leaf_rows): (usize, usize, usize),
    tree: &[u32],
    merge: &(dyn Fn(usize) -> (usize, Merge) + Sync),
    ws: &mut [f32],
) {
    assert_eq!(leaves(tree), groups.leaves, "leaves");
    let most = dy.len() / out.max(1);
    let mut workspace = Workspace::new(ws);
    let starts = groups.starts(&mut workspace);
    let apart = groups.experts * out * in_;
    let into = |e: usize, peer: usize| {
        let (level, merge) = merge(peer);
        (level * apart + e * out * in_, merge)
    };
    let of = gemm::GradientGroups {
        groups: groups.experts,
        peers: groups.peers(),
        start: &|unit| starts[unit] as usize,
        leaf: &|unit, leaf| groups.counts[unit * groups.leaves + leaf] as usize,
        into: &into,
    };
    let sizes = (most, leaf_rows);
    gemm::weight_gradients(pool, dy, x, (dw_grad, apart), of, (in_, out), sizes, tree, workspace.rest());
}

/// Floats of workspace for [`grouped_bias_grad`].
pub fn grouped_bias_grad_workspace_len(units: usize, out: usize, tree: &[u32]) -> usize {
    Workspace::room(units + 1) + column_sums_workspace_len(out, tree)
}

/// The gradient of [`grouped_linear`]'s biases into the levels of `db_grad`, `[levels, experts out]`; order as for
/// [`grouped_linear_dw`].
pub fn grouped_bias_grad<T: Storage>(
    pool: &Pool,
    dy: &[T],
    groups: Groups<'_>,
    db_grad: &mut [f32],
    out: usize,
    tree: &[u32],
    merge: &dyn Fn(usize) -> (usize, Merge),
    ws: &mut [f32],
) {
    assert_eq!(leaves(tree), groups.leaves, "leaves");
    let mut workspace = Workspace::new(ws);
    let starts = groups.starts(&mut workspace);
    let ws = workspace.rest();
    let apart = groups.experts * out;
    for e in 0..groups.experts {
        for peer in 0..groups.peers() {
            let counts = groups.unit(peer, e);
            let first = starts[peer * groups.experts + e] as usize;
            let rows = |leaf: usize| {
                let before: u32 = counts[..leaf].iter().sum();
                let from = first + before as usize;
                from..from + counts[leaf] as usize
            };
            let (level, merge) = merge(peer);
            let grad = (&mut *db_grad, (level * apart + e * out, apart));
            column_sums_of_leaves(pool, &rows, out, grad, tree, merge, ws, &|rows, cols, sums| {
                add_rows(dy, out, rows, cols, sums);
            });
        }
    }
}
