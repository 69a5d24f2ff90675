//! Normalisation of rows: root mean square and layer norm, with their derivatives.

use crate::linear::{bias_grad, column_sums, column_sums_workspace_len};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, STREAM, Simd, ask_ahead, kernel};
use crate::storage::{Acc, Element, Storage};
use crate::tree::Merge;

/// y = x rstd w with rstd = 1 / sqrt(mean(x^2) + eps), for `n` rows of `dim`; keeps `rstd`, `[n]`.
pub fn rms_norm<T: Storage>(
    pool: &Pool,
    x: &[T],
    w: &[T],
    y: &mut [T],
    rstd: &mut [f32],
    n: usize,
    dim: usize,
    eps: f32,
) {
    assert_eq!((x.len(), w.len(), y.len(), rstd.len()), (n * dim, dim, n * dim, n));
    let (y, rstd) = (Parts::new(y), Parts::new(rstd));
    pool.rows(n, dim, &|rows, _| {
        let all = rows.start * dim..rows.end * dim;
        // SAFETY: tasks have disjoint rows.
        let (y, rstd) = unsafe { (y.part(all.clone()), rstd.part(rows)) };
        rms_rows(&x[all], w, y, rstd, dim, eps);
    });
}

kernel! { fn rms_rows[T: Element](x: &[T], w: &[T], y: &mut [T], rstd: &mut [f32], dim: usize, eps: f32) = |s: S| {
    for (i, rstd) in rstd.iter_mut().enumerate() {
        let row = i * dim..(i + 1) * dim;
        *rstd = rms_row(s, &x[row.clone()], w, &mut y[row], eps);
    }
} }

/// One row of [`rms_norm`]; gives its rstd.
#[inline(always)]
pub(crate) fn rms_row<S: Simd, T: Element>(s: S, x: &[T], w: &[T], y: &mut [T], eps: f32) -> f32 {
    let dim = x.len();
    let mut squares = s.splat(0.0);
    for j in (0..dim).step_by(LANES) {
        ask_ahead(s, [x[j..].as_ptr(), y[j..].as_ptr()], STREAM);
        let x = T::get(s, &x[j..]);
        squares = s.fma(x, x, squares);
    }
    let rstd = 1.0 / (s.sum(squares) / dim as f32 + eps).sqrt();
    let r = s.splat(rstd);
    for j in (0..dim).step_by(LANES) {
        let scaled = s.mul(T::get(s, &x[j..]), r);
        T::put(s, &mut y[j..], s.mul(scaled, T::get(s, &w[j..])));
    }
    rstd
}

/// The gradient of [`rms_norm`]'s input: dx = acc + rstd (dy w - x rstd^2 mean(dy w x)).
pub fn rms_norm_dx<T: Storage>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    w: &[T],
    rstd: &[f32],
    acc: Acc<'_, T>,
    dx: &mut [T],
    n: usize,
    dim: usize,
) {
    assert_eq!((dy.len(), x.len(), w.len(), rstd.len(), dx.len()), (n * dim, n * dim, dim, n, n * dim));
    let dx = Parts::new(dx);
    pool.rows(n, dim, &|rows, _| {
        let all = rows.start * dim..rows.end * dim;
        // SAFETY: tasks have disjoint rows.
        let dx = unsafe { dx.part(all.clone()) };
        rms_rows_dx(&dy[all.clone()], &x[all.clone()], w, &rstd[rows], sub_acc(acc, all), dx, dim);
    });
}

/// The part of an accumulator that belongs to a range of its output.
pub(crate) fn sub_acc<T>(acc: Acc<'_, T>, range: std::ops::Range<usize>) -> Acc<'_, T> {
    match acc {
        Acc::From(from) => Acc::From(&from[range]),
        other => other,
    }
}

/// acc + v for the elements at `j` of `out`.
#[inline(always)]
fn put_acc<S: Simd, T: Element>(s: S, acc: Acc<'_, T>, out: &mut [T], j: usize, v: S::V) {
    let v = match acc {
        Acc::None => v,
        Acc::InPlace => s.add(T::get(s, &out[j..]), v),
        Acc::From(from) => s.add(T::get(s, &from[j..]), v),
    };
    T::put(s, &mut out[j..], v);
}

kernel! { fn rms_rows_dx[T: Element](
    dy: &[T], x: &[T], w: &[T], rstd: &[f32], acc: Acc<'_, T>, dx: &mut [T], dim: usize
) = |s: S| {
    for (i, &rstd) in rstd.iter().enumerate() {
        let row = i * dim..(i + 1) * dim;
        let acc = match acc {
            Acc::From(from) => Acc::From(&from[row.clone()]),
            other => other,
        };
        rms_row_dx(s, &dy[row.clone()], &x[row.clone()], w, rstd, acc, &mut dx[row]);
    }
} }

/// One row of [`rms_norm_dx`].
#[inline(always)]
pub(crate) fn rms_row_dx<S: Simd, T: Element>(
    s: S,
    dy: &[T],
    x: &[T],
    w: &[T],
    rstd: f32,
    acc: Acc<'_, T>,
    dx: &mut [T],
) {
    let dim = x.len();
    let mut dot = s.splat(0.0);
    for j in (0..dim).step_by(LANES) {
        ask_ahead(s, [&dy[j..], &x[j..], &dx[j..]].map(<[T]>::as_ptr), STREAM);
        let g = s.mul(T::get(s, &dy[j..]), T::get(s, &w[j..]));
        dot = s.fma(g, T::get(s, &x[j..]), dot);
    }
    let back = s.splat(-(rstd * rstd * (s.sum(dot) / dim as f32)));
    let r = s.splat(rstd);
    for j in (0..dim).step_by(LANES) {
        if let Acc::From(from) = acc {
            ask_ahead(s, [from[j..].as_ptr()], STREAM);
        }
        let g = s.mul(T::get(s, &dy[j..]), T::get(s, &w[j..]));
        let v = s.mul(s.fma(T::get(s, &x[j..]), back, g), r);
        put_acc(s, acc, dx, j, v);
    }
}

/// The gradient of [`rms_norm`]'s weight, the column sums of dy x rstd, into the levels of `dw_grad`,
/// `[levels, dim]`; order as for [`crate::linear_dw`].
pub fn rms_norm_dw<T: Storage>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    rstd: &[f32],
    dw_grad: &mut [f32],
    n: usize,
    dim: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    assert_eq!((dy.len(), x.len(), rstd.len()), (n * dim, n * dim, n));
    column_sums(pool, n, dim, dw_grad, tree, m, ws, &|rows, cols, sums| {
        add_normed(dy, x, None, rstd, dim, rows, cols, sums);
    });
}

/// Floats of workspace for [`rms_norm_dw`] and [`layer_norm_dw`].
pub fn norm_dw_workspace_len(dim: usize, tree: &[u32]) -> usize {
    column_sums_workspace_len(dim, tree)
}

/// Rows ahead of their use at which columns are asked for.
pub(crate) const ROWS: usize = 16;

kernel! { fn add_normed[T: Element](
    dy: &[T], x: &[T], mean: Option<&[f32]>, rstd: &[f32], ld: usize,
    rows: std::ops::Range<usize>, cols: std::ops::Range<usize>, sums: &mut [f32],
) = |s: S| {
    for row in rows {
        let (dy, x) = (&dy[row * ld + cols.start..row * ld + cols.end], &x[row * ld + cols.start..row * ld + cols.end]);
        let mean = s.splat(mean.map_or(0.0, |mean| mean[row]));
        let r = s.splat(rstd[row]);
        for j in (0..dy.len()).step_by(LANES) {
            ask_ahead(s, [dy[j..].as_ptr(), x[j..].as_ptr()], ROWS * ld);
            let normed = s.mul(s.sub(T::get(s, &x[j..]), mean), r);
            let sum = s.fma(T::get(s, &dy[j..]), normed, s.load(&sums[j..]));
            s.store(&mut sums[j..], sum);
        }
    }
} }

/// y = (x - mean) rstd w + b with rstd = 1 / sqrt(variance + eps), for `n` rows of `dim`; keeps `stats`, `[2, n]`:
/// the means, then the rstds.
pub fn layer_norm<T: Storage>(
    pool: &Pool,
    x: &[T],
    w: &[T],
    b: &[T],
    y: &mut [T],
    stats: &mut [f32],
    n: usize,
    dim: usize,
    eps: f32,
) {
    assert_eq!((x.len(), w.len(), b.len(), y.len(), stats.len()), (n * dim, dim, dim, n * dim, 2 * n));
    let (mean, rstd) = stats.split_at_mut(n);
    let (y, mean, rstd) = (Parts::new(y), Parts::new(mean), Parts::new(rstd));
    pool.rows(n, dim, &|rows, _| {
        let all = rows.start * dim..rows.end * dim;
        // SAFETY: tasks have disjoint rows.
        let (y, mean, rstd) = unsafe { (y.part(all.clone()), mean.part(rows.clone()), rstd.part(rows)) };
        layer_rows(&x[all], w, b, y, mean, rstd, dim, eps);
    });
}

kernel! { fn layer_rows[T: Element](
    x: &[T], w: &[T], b: &[T], y: &mut [T], mean: &mut [f32], rstd: &mut [f32], dim: usize, eps: f32
) = |s: S| {
    let zero = s.splat(0.0);
    for i in 0..mean.len() {
        let (x, y) = (&x[i * dim..(i + 1) * dim], &mut y[i * dim..(i + 1) * dim]);
        let mut sum = zero;
        for j in (0..dim).step_by(LANES) {
            ask_ahead(s, [x[j..].as_ptr(), y[j..].as_ptr()], STREAM);
            sum = s.add(sum, T::get(s, &x[j..]));
        }
        mean[i] = s.sum(sum) / dim as f32;
        let m = s.splat(mean[i]);
        let mut squares = zero;
        for j in (0..dim).step_by(LANES) {
            let d = s.sub(T::get(s, &x[j..]), m);
            // Lanes beyond the row hold -mean and must not count.
            let d = if dim - j < LANES { s.less(s.iota(), s.splat((dim - j) as f32), d, zero) } else { d };
            squares = s.fma(d, d, squares);
        }
        rstd[i] = 1.0 / (s.sum(squares) / dim as f32 + eps).sqrt();
        let r = s.splat(rstd[i]);
        for j in (0..dim).step_by(LANES) {
            let normed = s.mul(s.sub(T::get(s, &x[j..]), m), r);
            T::put(s, &mut y[j..], s.fma(normed, T::get(s, &w[j..]), T::get(s, &b[j..])));
        }
    }
} }

/// The gradient of [`layer_norm`]'s input: dx = acc + rstd (g - mean(g) - xn mean(g xn)) with g = dy w and xn the
/// normed input.
pub fn layer_norm_dx<T: Storage>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    w: &[T],
    stats: &[f32],
    acc: Acc<'_, T>,
    dx: &mut [T],
    n: usize,
    dim: usize,
) {
    assert_eq!((dy.len(), x.len(), w.len(), stats.len(), dx.len()), (n * dim, n * dim, dim, 2 * n, n * dim));
    let (mean, rstd) = stats.split_at(n);
    let dx = Parts::new(dx);
    pool.rows(n, dim, &|rows, _| {
        let all = rows.start * dim..rows.end * dim;
        // SAFETY: tasks have disjoint rows.
        let dx = unsafe { dx.part(all.clone()) };
        let acc = sub_acc(acc, all.clone());
        layer_rows_dx(&dy[all.clone()], &x[all], w, &mean[rows.clone()], &rstd[rows], acc, dx, dim);
    });
}

kernel! { fn layer_rows_dx[T: Element](
    dy: &[T], x: &[T], w: &[T], mean: &[f32], rstd: &[f32], acc: Acc<'_, T>, dx: &mut [T], dim: usize
) = |s: S| {
    let zero = s.splat(0.0);
    for i in 0..mean.len() {
        let row = i * dim..(i + 1) * dim;
        let acc = match acc {
            Acc::From(from) => Acc::From(&from[row.clone()]),
            other => other,
        };
        let (dy, x, dx) = (&dy[row.clone()], &x[row.clone()], &mut dx[row]);
        let (m, r) = (s.splat(mean[i]), s.splat(rstd[i]));
        let (mut sum, mut dot) = (zero, zero);
        for j in (0..dim).step_by(LANES) {
            ask_ahead(s, [&dy[j..], &x[j..], &dx[j..]].map(<[T]>::as_ptr), STREAM);
            // Lanes beyond the row have g = 0.
            let g = s.mul(T::get(s, &dy[j..]), T::get(s, &w[j..]));
            let normed = s.mul(s.sub(T::get(s, &x[j..]), m), r);
            sum = s.add(sum, g);
            dot = s.fma(g, normed, dot);
        }
        let mean_g = s.splat(s.sum(sum) / dim as f32);
        let back = s.splat(-(s.sum(dot) / dim as f32));
        for j in (0..dim).step_by(LANES) {
            let g = s.mul(T::get(s, &dy[j..]), T::get(s, &w[j..]));
            let normed = s.mul(s.sub(T::get(s, &x[j..]), m), r);
            let v = s.mul(s.fma(normed, back, s.sub(g, mean_g)), r);
            put_acc(s, acc, dx, j, v);
        }
    }
} }

/// The gradients of [`layer_norm`]'s weight and bias into the levels of `dw_grad` and `db_grad`, each
/// `[levels, dim]`; order as for [`crate::linear_dw`].
pub fn layer_norm_dw<T: Storage>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    stats: &[f32],
    dw_grad: &mut [f32],
    db_grad: &mut [f32],
    n: usize,
    dim: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    assert_eq!((dy.len(), x.len(), stats.len()), (n * dim, n * dim, 2 * n));
    let (mean, rstd) = stats.split_at(n);
    column_sums(pool, n, dim, dw_grad, tree, m, ws, &|rows, cols, sums| {
        add_normed(dy, x, Some(mean), rstd, dim, rows, cols, sums);
    });
    bias_grad(pool, dy, db_grad, n, dim, tree, m, ws);
}
