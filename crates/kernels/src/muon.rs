//! Muon: the momentum of a matrix, its orthogonal factor, and the update along it.

use half::bf16;

use crate::gemm::{self, Left, Out, Right, Workspace};
use crate::optim::squares;
use crate::pool::{Parts, Pool};
use crate::qk_clip::scale as rescale;
use crate::simd::{LANES, kernel};
use crate::storage::Acc;

/// The quintic whose iteration drives every singular value from above 0 to near 1 (Jordan 2024): `a x + b x^3 + c x^5`.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// A matrix whose norm is below this is divided by it instead: no gradient gives no update.
const SMALLEST_NORM: f64 = 1e-7;
/// Columns of a symmetric product that are computed together, from the diagonal down.
const STRIP: usize = 128;

/// Momentum `m` goes towards the gradient, `m += (1 - beta)(g - m)`, and `update` looks ahead of it (Nesterov's form):
/// `g + beta (m - g)`. Gradients are multiplied by `scale` first.
pub fn muon_momentum(pool: &Pool, beta: f64, scale: f32, m: &mut [f32], update: &mut [f32], grad: &[f32]) {
    let len = grad.len();
    assert_eq!((m.len(), update.len()), (len, len));
    let (beta, rest) = (beta as f32, (1.0 - beta) as f32);
    let (m, update) = (Parts::new(m), Parts::new(update));
    pool.rows(len, 2, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        let (m, update) = unsafe { (m.part(range.clone()), update.part(range.clone())) };
        look_ahead((beta, rest, scale), m, update, &grad[range]);
    });
}

kernel! { fn look_ahead(c: (f32, f32, f32), m: &mut [f32], update: &mut [f32], grad: &[f32]) = |s: S| {
    let (beta, rest, scale) = (s.splat(c.0), s.splat(c.1), s.splat(c.2));
    for j in (0..grad.len()).step_by(LANES) {
        let g = s.mul(s.load(&grad[j..]), scale);
        let old = s.load(&m[j..]);
        let new = s.add(old, s.mul(rest, s.sub(g, old)));
        s.store(&mut m[j..], new);
        s.store(&mut update[j..], s.add(g, s.mul(beta, s.sub(new, g))));
    }
} }

/// Weights decay to `keep` of themselves and move by `step` times the update.
pub fn muon(pool: &Pool, (keep, step): (f32, f32), w: &mut [f32], update: &[f32]) {
    assert_eq!(w.len(), update.len());
    let w = Parts::new(w);
    pool.rows(update.len(), 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        apply((keep, step), unsafe { w.part(range.clone()) }, &update[range], None);
    });
}

/// [`muon`] on master weights `w`, which also writes them rounded to `out`.
pub fn muon_bf16(pool: &Pool, (keep, step): (f32, f32), w: &mut [f32], update: &[f32], out: &mut [bf16]) {
    assert_eq!((w.len(), out.len()), (update.len(), update.len()));
    let (w, out) = (Parts::new(w), Parts::new(out));
    pool.rows(update.len(), 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        let (w, out) = unsafe { (w.part(range.clone()), out.part(range.clone())) };
        apply((keep, step), w, &update[range], Some(out));
    });
}

kernel! { fn apply(c: (f32, f32), w: &mut [f32], update: &[f32], mut_out: Option<&mut [bf16]>) = |s: S| {
    let (keep, step, mut out) = (s.splat(c.0), s.splat(c.1), mut_out);
    for j in (0..update.len()).step_by(LANES) {
        let new = s.add(s.mul(s.load(&w[j..]), keep), s.mul(step, s.load(&update[j..])));
        s.store(&mut w[j..], new);
        if let Some(out) = &mut out {
            s.store_bf16(&mut out[j..], new);
        }
    }
} }

/// Replaces `x`, `rows` by `cols`, by nearly its orthogonal factor (`U V^T` of its singular value decomposition) times
/// `scale`: so many `steps` of Newton and Schulz's iteration with a quintic (Jordan 2024). Zero stays zero.
///
/// ```
/// use kernels::{Pool, orthogonalise, orthogonalise_workspace_len};
/// // A rotation, stretched: every singular value ends within 0.3 of 1, as the iteration's author says.
/// let (pool, mut x) = (Pool::new(1), [0.6f32, -0.8, 0.4, 0.3]);
/// let mut ws = vec![0.0; orthogonalise_workspace_len(2, 2, 1)];
/// orthogonalise(&pool, &mut x, (2, 2), 5, 1.0, &mut ws);
/// let [a, b, c, d] = x;
/// assert!((a * c + b * d).abs() < 1e-5, "rows stay orthogonal");
/// assert!((a.hypot(b) - 1.0).abs() < 0.35 && (c.hypot(d) - 1.0).abs() < 0.35);
/// ```
pub fn orthogonalise(
    pool: &Pool,
    x: &mut [f32],
    (rows, cols): (usize, usize),
    steps: usize,
    scale: f32,
    ws: &mut [f32],
) {
    assert_eq!(x.len(), rows * cols, "matrix");
    let (m, n) = (rows.min(cols), rows.max(cols));
    let mut ws = Workspace::new(ws);
    let (spare, gram, square) = (ws.take(m * n), ws.take(m * m), ws.take(m * m));
    let ws = ws.rest();
    let norm = squares(x).sqrt().max(SMALLEST_NORM);
    rescale(pool, (1.0 / norm) as f32, x);
    let (mut from, mut to) = (&mut *x, spare);
    // The smaller side makes the Gram matrix.
    if rows > cols {
        transpose(pool, from, (rows, cols), to);
        std::mem::swap(&mut from, &mut to);
    }
    let [a, b, c] = QUINTIC;
    for _ in 0..steps {
        symmetric_square(pool, from, (m, n), gram, ws);
        symmetric_square(pool, gram, (m, m), square, ws);
        polynomial(pool, (a, b, c), gram, square, m);
        let out = Out { y: to, ld: n, acc: Acc::None, bias: None };
        gemm::product(pool, Left { data: &*square, ld: m }, Right::Rows(&*from), out, (m, m, n), ws);
        std::mem::swap(&mut from, &mut to);
    }
    rescale(pool, scale, from);
    // The matrix is in `x` after an even number of swaps.
    let swaps = steps + usize::from(rows > cols);
    match (rows > cols, swaps.is_multiple_of(2)) {
        (false, true) => {}
        (false, false) => to.copy_from_slice(from),
        (true, false) => transpose(pool, from, (cols, rows), to),
        (true, true) => {
            transpose(pool, from, (cols, rows), to);
            from.copy_from_slice(to);
        }
    }
}

/// Floats of workspace for [`orthogonalise`].
pub fn orthogonalise_workspace_len(rows: usize, cols: usize, threads: usize) -> usize {
    let (m, n) = (rows.min(cols), rows.max(cols));
    let products = [(m, n, STRIP.min(m)), (m, m, STRIP.min(m)), (m, m, n)];
    let product = |(rows, k, cols)| gemm::product_workspace_len(rows, k, cols, threads);
    let product = products.into_iter().map(product).max().unwrap_or(0);
    Workspace::room(m * n) + 2 * Workspace::room(m * m) + product
}

/// `out = x x^T`, `x` being `m` by `k`: from the diagonal down, and mirrored. Element (i, j) is one chain, and the same
/// as (j, i) would be.
fn symmetric_square(pool: &Pool, x: &[f32], (m, k): (usize, usize), out: &mut [f32], ws: &mut [f32]) {
    for first in (0..m).step_by(STRIP) {
        let width = STRIP.min(m - first);
        let left = Left { data: &x[first * k..], ld: k };
        let right = Right::Columns(&x[first * k..(first + width) * k]);
        let y = Out { y: &mut out[first * m + first..], ld: m, acc: Acc::None, bias: None };
        gemm::product(pool, left, right, y, (m - first, k, width), ws);
    }
    let whole = Parts::new(out);
    pool.rows(m, m, &|range, _| {
        for i in range {
            for j in i + 1..m {
                // SAFETY: only task i writes above the diagonal of row i, and nobody below it.
                unsafe { whole.part(i * m + j..i * m + j + 1)[0] = whole.part(j * m + i..j * m + i + 1)[0] };
            }
        }
    });
}

/// `square = a I + b gram + c square`.
fn polynomial(pool: &Pool, (a, b, c): (f32, f32, f32), gram: &[f32], square: &mut [f32], m: usize) {
    let square = Parts::new(square);
    pool.rows(m, 2 * m, &|range, _| {
        for i in range {
            // SAFETY: tasks have disjoint rows.
            let row = unsafe { square.part(i * m..(i + 1) * m) };
            combine((b, c), &gram[i * m..(i + 1) * m], row);
            row[i] += a;
        }
    });
}

kernel! { fn combine(k: (f32, f32), gram: &[f32], square: &mut [f32]) = |s: S| {
    let (b, c) = (s.splat(k.0), s.splat(k.1));
    for j in (0..gram.len()).step_by(LANES) {
        let sum = s.add(s.mul(b, s.load(&gram[j..])), s.mul(c, s.load(&square[j..])));
        s.store(&mut square[j..], sum);
    }
} }

/// `to`, `cols` by `rows`, is the transpose of `from`.
fn transpose(pool: &Pool, from: &[f32], (rows, cols): (usize, usize), to: &mut [f32]) {
    let to = Parts::new(to);
    let blocks = cols.div_ceil(LANES);
    pool.rows(blocks, LANES * rows, &|range, _| {
        for block in range {
            let across = block * LANES..cols.min((block + 1) * LANES);
            for i in 0..rows {
                for j in across.clone() {
                    // SAFETY: tasks have disjoint rows of the result.
                    unsafe { to.part(j * rows + i..j * rows + i + 1)[0] = from[i * cols + j] };
                }
            }
        }
    });
}
