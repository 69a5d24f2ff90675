//! The linear layer and its derivatives. Weights are `[out, in]`.

use crate::gemm::{self, Left, Out, Right, Workspace};
use crate::norm::ROWS;
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, ask_ahead, kernel};
use crate::storage::{Acc, Element, Storage};
use crate::tree::{Merge, Step, depth, leaves, split, step};

/// y\[n, out\] = acc + x\[n, in\] w^T + bias.
///
/// Each element is one chain of fused multiply-adds over `in` from 0; then the bias and then `acc` are added.
pub fn linear<T: Storage>(
    pool: &Pool,
    x: &[T],
    w: &[T],
    bias: Option<&[T]>,
    acc: Acc<'_, T>,
    y: &mut [T],
    n: usize,
    in_: usize,
    out: usize,
    ws: &mut [f32],
) {
    assert_eq!(x.len(), n * in_, "input");
    assert_eq!(y.len(), n * out, "output");
    linear_strided(pool, x, in_, w, bias, acc, y, out, n, in_, out, ws);
}

/// [`linear`] between column slices: row i of `x` starts at `i * ldx`, of `y` at `i * ldy`. An `acc` of its own is
/// dense.
pub fn linear_strided<T: Storage>(
    pool: &Pool,
    x: &[T],
    ldx: usize,
    w: &[T],
    bias: Option<&[T]>,
    acc: Acc<'_, T>,
    y: &mut [T],
    ldy: usize,
    n: usize,
    in_: usize,
    out: usize,
    ws: &mut [f32],
) {
    let left = Left { data: x, ld: ldx };
    gemm::product(pool, left, Right::Columns(w), Out { y, ld: ldy, acc, bias }, (n, in_, out), ws);
}

/// Floats of workspace for [`linear`].
pub fn linear_workspace_len(n: usize, in_: usize, out: usize, threads: usize) -> usize {
    gemm::product_workspace_len(n, in_, out, threads)
}

/// dx\[n, in\] = acc + dy\[n, out\] w: the gradient of [`linear`]'s input.
pub fn linear_dx<T: Storage>(
    pool: &Pool,
    dy: &[T],
    w: &[T],
    acc: Acc<'_, T>,
    dx: &mut [T],
    n: usize,
    in_: usize,
    out: usize,
    ws: &mut [f32],
) {
    assert_eq!(dy.len(), n * out, "output gradient");
    assert_eq!(dx.len(), n * in_, "input gradient");
    let left = Left { data: dy, ld: out };
    gemm::product(pool, left, Right::Rows(w), Out { y: dx, ld: in_, acc, bias: None }, (n, out, in_), ws);
}

/// Floats of workspace for [`linear_dx`].
pub fn linear_dx_workspace_len(n: usize, in_: usize, out: usize, threads: usize) -> usize {
    gemm::product_workspace_len(n, out, in_, threads)
}

/// The gradient of [`linear`]'s weight, dy^T x, into the levels of `dw_grad`, `[levels, out, in]`.
///
/// The `n` rows fall into leaves of equal length, as many as the product of the radices in `tree`. An element of a
/// leaf is one chain from 0 over its rows. Leaves are added as digits of a mixed-radix counter, `tree` giving the
/// radices bottom-up: all 2 is a balanced binary tree, a larger radix folds its children left to right. The root
/// goes into the levels by `m`.
pub fn linear_dw<T: Storage>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    dw_grad: &mut [f32],
    n: usize,
    in_: usize,
    out: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    gemm::weight_gradient(pool, dy, x, dw_grad, (n, in_, out), tree, m, ws);
}

/// Floats of workspace for [`linear_dw`].
pub fn linear_dw_workspace_len(n: usize, in_: usize, out: usize, tree: &[u32], threads: usize) -> usize {
    gemm::weight_gradient_workspace_len(n, in_, out, tree, threads)
}

/// The gradient of [`linear`]'s bias, the column sums of `dy`, into the levels of `db_grad`, `[levels, out]`; order
/// as for [`linear_dw`].
pub fn bias_grad<T: Storage>(
    pool: &Pool,
    dy: &[T],
    db_grad: &mut [f32],
    n: usize,
    out: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    assert_eq!(dy.len(), n * out, "output gradient");
    column_sums(pool, n, out, db_grad, tree, m, ws, &|rows, cols, sums| add_rows(dy, out, rows, cols, sums));
}

/// Floats of workspace for [`bias_grad`].
pub fn bias_grad_workspace_len(out: usize, tree: &[u32]) -> usize {
    column_sums_workspace_len(out, tree)
}

kernel! { pub(crate) fn add_rows[T: Element](
    dy: &[T], ld: usize, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>, sums: &mut [f32]
) = |s: S| {
    for row in rows {
        let dy = &dy[row * ld + cols.start..row * ld + cols.end];
        for j in (0..dy.len()).step_by(LANES) {
            ask_ahead(s, [dy[j..].as_ptr()], ROWS * ld);
            let sum = s.add(s.load(&sums[j..]), T::get(s, &dy[j..]));
            s.store(&mut sums[j..], sum);
        }
    }
} }

/// Columns of a task: long enough rows to stream, short enough that the sums stay in the first-level cache.
const COLUMNS: usize = 128;

/// Floats of workspace for [`column_sums`].
pub(crate) fn column_sums_workspace_len(cols: usize, tree: &[u32]) -> usize {
    Workspace::room((depth(tree) + 1) * cols.next_multiple_of(COLUMNS))
}

/// Goes on with the chains of some columns over some rows.
type AddRows<'a> = dyn Fn(std::ops::Range<usize>, std::ops::Range<usize>, &mut [f32]) + Sync + 'a;

/// Sums over `n` rows for each of `cols` columns: `add(rows, cols, sums)` goes on with the chains in `sums` over the
/// rows of a leaf, and leaves are added by `tree` and put into `grad` by `merge`.
pub(crate) fn column_sums(
    pool: &Pool,
    n: usize,
    cols: usize,
    grad: &mut [f32],
    tree: &[u32],
    merge: Merge,
    ws: &mut [f32],
    add: &AddRows<'_>,
) {
    let (_, rows) = split(n, tree);
    let rows = |leaf: usize| leaf * rows..(leaf + 1) * rows;
    column_sums_of_leaves(pool, &rows, cols, (grad, (0, cols)), tree, merge, ws, add);
}

/// The same where the rows of each leaf are `rows(leaf)`; the gradient's first level begins at `at` of `grad`, the others
/// `apart` from each other.
pub(crate) fn column_sums_of_leaves(
    pool: &Pool,
    rows: &(dyn Fn(usize) -> std::ops::Range<usize> + Sync),
    cols: usize,
    (grad, (at, apart)): (&mut [f32], (usize, usize)),
    tree: &[u32],
    merge: Merge,
    ws: &mut [f32],
    add: &AddRows<'_>,
) {
    assert!(grad.len() >= at + (merge.levels() - 1) * apart + cols, "gradient levels");
    let own = (depth(tree) + 1) * COLUMNS;
    let tasks = cols.div_ceil(COLUMNS);
    let scratch = Parts::new(Workspace::new(ws).take(tasks * own));
    let grad = Parts::new(grad);
    pool.run(tasks, &|task, _| {
        let range = task * COLUMNS..cols.min((task + 1) * COLUMNS);
        let len = range.len();
        // SAFETY: each task has its own part.
        let own = unsafe { scratch.part(task * own..(task + 1) * own) };
        let (sums, levels) = own.split_at_mut(COLUMNS);
        let sums = &mut sums[..len];
        for leaf in 0..leaves(tree) {
            sums.fill(0.0);
            add(rows(leaf), range.clone(), sums);
            let (tree_merge, store) = match step(tree, leaf) {
                Step::Keep(m) => (m.merge, Some(m.store)),
                Step::Root { merge } => (merge, None),
            };
            for level in 0..tree_merge {
                add_into(&levels[level * COLUMNS..][..len], sums);
            }
            if let Some(store) = store {
                levels[store * COLUMNS..][..len].copy_from_slice(sums);
            }
        }
        for level in 0..merge.merge {
            let at = at + level * apart;
            // SAFETY: these columns, at every level, belong to this task.
            add_into(unsafe { grad.part(at + range.start..at + range.end) }, sums);
        }
        let at = at + merge.store * apart;
        // SAFETY: as above.
        unsafe { grad.part(at + range.start..at + range.end) }.copy_from_slice(sums);
    });
}

/// r = level + r.
fn add_into(level: &[f32], r: &mut [f32]) {
    for (r, level) in r.iter_mut().zip(level) {
        *r += level;
    }
}
