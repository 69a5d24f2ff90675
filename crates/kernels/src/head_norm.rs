//! Root mean square norm of each query and key head inside packed qkv rows, as in Qwen 3.
//!
//! A row of qkv holds `heads` query heads, `kv_heads` key heads and `kv_heads` value heads of `head_dim` elements.

use crate::linear::{column_sums, column_sums_workspace_len};
use crate::norm::{rms_row, rms_row_dx};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Acc, Element, Storage};
use crate::tree::Merge;

/// Norms the query heads by `wq` and the key heads by `wk` (`[head_dim]` each); values are copied. Keeps `rstd`,
/// `[n, heads + kv_heads]`.
pub fn qk_norm<T: Storage>(
    pool: &Pool,
    qkv: &[T],
    wq: &[T],
    wk: &[T],
    out: &mut [T],
    rstd: &mut [f32],
    n: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
) {
    let (normed, ld) = (heads + kv_heads, (heads + 2 * kv_heads) * head_dim);
    assert_eq!((qkv.len(), wq.len(), wk.len()), (n * ld, head_dim, head_dim));
    assert_eq!((out.len(), rstd.len()), (n * ld, n * normed));
    let (out, rstd) = (Parts::new(out), Parts::new(rstd));
    pool.rows(n, ld, &|rows, _| {
        let all = rows.start * ld..rows.end * ld;
        // SAFETY: tasks have disjoint rows.
        let (out, rstd) =
            unsafe { (out.part(all.clone()), rstd.part(rows.start * normed..rows.end * normed)) };
        norm_rows(&qkv[all], wq, wk, out, rstd, heads, kv_heads, head_dim, eps);
    });
}

kernel! { fn norm_rows[T: Element](
    qkv: &[T], wq: &[T], wk: &[T], out: &mut [T], rstd: &mut [f32],
    heads: usize, kv_heads: usize, head_dim: usize, eps: f32,
) = |s: S| {
    let ld = (heads + 2 * kv_heads) * head_dim;
    for (i, rstd) in rstd.chunks_exact_mut(heads + kv_heads).enumerate() {
        let (x, y) = (&qkv[i * ld..(i + 1) * ld], &mut out[i * ld..(i + 1) * ld]);
        for (h, rstd) in rstd.iter_mut().enumerate() {
            let head = h * head_dim..(h + 1) * head_dim;
            let w = if h < heads { wq } else { wk };
            *rstd = rms_row(s, &x[head.clone()], w, &mut y[head], eps);
        }
        let values = (heads + kv_heads) * head_dim;
        y[values..].copy_from_slice(&x[values..]);
    }
} }

/// The gradient of [`qk_norm`]'s input; that of the values is copied.
pub fn qk_norm_dx<T: Storage>(
    pool: &Pool,
    dy: &[T],
    qkv: &[T],
    wq: &[T],
    wk: &[T],
    rstd: &[f32],
    dqkv: &mut [T],
    n: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) {
    let (normed, ld) = (heads + kv_heads, (heads + 2 * kv_heads) * head_dim);
    assert_eq!((dy.len(), qkv.len(), dqkv.len()), (n * ld, n * ld, n * ld));
    assert_eq!((wq.len(), wk.len(), rstd.len()), (head_dim, head_dim, n * normed));
    let dqkv = Parts::new(dqkv);
    pool.rows(n, ld, &|rows, _| {
        let all = rows.start * ld..rows.end * ld;
        // SAFETY: tasks have disjoint rows.
        let dqkv = unsafe { dqkv.part(all.clone()) };
        let rstd = &rstd[rows.start * normed..rows.end * normed];
        norm_rows_dx(&dy[all.clone()], &qkv[all], wq, wk, rstd, dqkv, heads, kv_heads, head_dim);
    });
}

kernel! { fn norm_rows_dx[T: Element](
    dy: &[T], qkv: &[T], wq: &[T], wk: &[T], rstd: &[f32], dqkv: &mut [T],
    heads: usize, kv_heads: usize, head_dim: usize,
) = |s: S| {
    let ld = (heads + 2 * kv_heads) * head_dim;
    for (i, rstd) in rstd.chunks_exact(heads + kv_heads).enumerate() {
        let row = i * ld..(i + 1) * ld;
        let (dy, x, dx) = (&dy[row.clone()], &qkv[row.clone()], &mut dqkv[row]);
        for (h, &rstd) in rstd.iter().enumerate() {
            let head = h * head_dim..(h + 1) * head_dim;
            let w = if h < heads { wq } else { wk };
            rms_row_dx(s, &dy[head.clone()], &x[head.clone()], w, rstd, Acc::None, &mut dx[head]);
        }
        let values = (heads + kv_heads) * head_dim;
        dx[values..].copy_from_slice(&dy[values..]);
    }
} }

/// The gradients of [`qk_norm`]'s weights into the levels of `dwq_grad` and `dwk_grad`, each `[levels, head_dim]`.
/// The chain of a leaf runs over its rows and, in a row, over the heads; leaves as for [`crate::linear_dw`].
pub fn qk_norm_dw<T: Storage>(
    pool: &Pool,
    dy: &[T],
    qkv: &[T],
    rstd: &[f32],
    dwq_grad: &mut [f32],
    dwk_grad: &mut [f32],
    n: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    let (normed, ld) = (heads + kv_heads, (heads + 2 * kv_heads) * head_dim);
    assert_eq!((dy.len(), qkv.len(), rstd.len()), (n * ld, n * ld, n * normed));
    for (grad, of) in [(dwq_grad, 0..heads), (dwk_grad, heads..normed)] {
        column_sums(pool, n, head_dim, grad, tree, m, ws, &|rows, cols, sums| {
            add_heads(dy, qkv, rstd, ld, head_dim, normed, of.clone(), rows, cols, sums);
        });
    }
}

/// Floats of workspace for [`qk_norm_dw`].
pub fn qk_norm_dw_workspace_len(head_dim: usize, tree: &[u32]) -> usize {
    column_sums_workspace_len(head_dim, tree)
}

kernel! { fn add_heads[T: Element](
    dy: &[T], x: &[T], rstd: &[f32], ld: usize, head_dim: usize, normed: usize, heads: std::ops::Range<usize>,
    rows: std::ops::Range<usize>, cols: std::ops::Range<usize>, sums: &mut [f32],
) = |s: S| {
    for row in rows {
        for head in heads.clone() {
            let at = row * ld + head * head_dim;
            let (dy, x) = (&dy[at + cols.start..at + cols.end], &x[at + cols.start..at + cols.end]);
            let r = s.splat(rstd[row * normed + head]);
            for j in (0..dy.len()).step_by(LANES) {
                let sum = s.fma(T::get(s, &dy[j..]), s.mul(T::get(s, &x[j..]), r), s.load(&sums[j..]));
                s.store(&mut sums[j..], sum);
            }
        }
    }
} }
