//! Muon: the momentum of a matrix, its orthogonal factor, and the update along it.

use std::convert::Infallible;

use half::bf16;

use crate::convert::copy;
use crate::gemm::{self, Left, Out, Right, Workspace};
use crate::optim::sum_squares;
use crate::pool::{Parts, Pool};
use crate::qk_clip::scale as rescale;
use crate::simd::{LANES, kernel};
use crate::storage::Acc;

/// A step of [`newton_schulz`]: what it multiplies `x` by, `a + b h + c h^2 + h^3 (d + e h + f h^2 + g h^3)` of the Gram matrix
/// less a number, `h = x x^T - centre`: around the middle of the eigenvalues coefficients are small, and so are rounding errors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Polynomial {
    /// Of the eigenvalues.
    pub centre: f32,
    /// `[a, b, c, d, e, f, g]`.
    pub of: [f32; 7],
}

/// Polynomials of degree 13 that, one after the other, bring singular values from 0.0055 to 1.01 within 0.32 of 1; smaller ones
/// grow 131 times. Each is the best one of its degree on what the one before it leaves of the interval, which makes both
/// together the best of their kind (Amsel et al. 2025, arXiv 2505.16932, theorem 4.1). The last hundredth of the interval,
/// where they are steepest, is beyond what a normalised matrix has.
pub const POLYNOMIALS: [Polynomial; 2] = [
    Polynomial {
        centre: 0.5,
        of: [0.7154521, -14.169038, 72.842, 279.35568, -990.9901, -1202.1936, 3424.4993],
    },
    Polynomial {
        centre: 1.75,
        of: [0.6386149, -0.95656586, 1.1224777, 1.3635035, -1.2414598, -0.5261116, 0.38515016],
    },
];
/// A Gram matrix whose norm is below this is divided by it instead: no gradient gives no update.
pub const SMALLEST_NORM: f64 = 1e-14;

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
/// `scale`, by an iteration after Newton and Schulz, [`POLYNOMIALS`]. Zero stays zero.
///
/// Singular values are divided by the fourth root of the sum of their fourth powers first, which is the root of the Gram
/// matrix's norm: of several of one size it is nearer to the largest of them than the root of the sum of their squares is, so
/// that the smallest need not grow as much.
///
/// A step multiplies `x` by a polynomial in its Gram matrix, all of which commute: steps are taken on small symmetric
/// matrices alone, and their product meets `x` once. With `m` the smaller and `n` the larger side that is `3 m^2 n + 9 m^3`
/// FLOPs, the fewest where `n` is larger. A square matrix takes as many in two parts, of which the second begins anew with the
/// Gram matrix of what came of the first: rounding errors in it grow with its smallest eigenvalues, as the squares of the
/// polynomials' slopes. Directions that are 1e-2 of the largest and less are off by up to 1e-2 in one go, by 3e-5 in two.
///
/// ```
/// use kernels::{Pool, orthogonalise, orthogonalise_workspace_len};
/// // A rotation, stretched: every singular value ends within 0.32 of 1.
/// let (pool, mut x) = (Pool::new(1), [0.6f32, -0.8, 0.4, 0.3]);
/// let mut ws = vec![0.0; orthogonalise_workspace_len(2, 2, 1)];
/// orthogonalise(&pool, &mut x, (2, 2), 1.0, &mut ws);
/// let [a, b, c, d] = x;
/// assert!((a * c + b * d).abs() < 1e-5, "rows stay orthogonal");
/// assert!((a.hypot(b) - 1.0).abs() < 0.32 && (c.hypot(d) - 1.0).abs() < 0.32);
/// ```
pub fn orthogonalise(pool: &Pool, x: &mut [f32], (rows, cols): (usize, usize), scale: f32, ws: &mut [f32]) {
    assert_eq!(x.len(), rows * cols, "matrix");
    let (m, n) = (rows.min(cols), rows.max(cols));
    let mut ws = Workspace::new(ws);
    let (spare, small) = (ws.take(m * n), ws.take(SMALL * m * m));
    let ws = ws.rest();
    let mut matrices = [x, spare].into_iter().chain(small.chunks_exact_mut((m * m).max(1)));
    let mut matrices: [&mut [f32]; MatrixName::COUNT] =
        std::array::from_fn(|_| matrices.next().unwrap_or_default());
    let mut root = 1.0;
    newton_schulz((rows, cols), scale, &mut |MatrixStep { op, of: [a, b, c], out: to }| {
        // The result is another matrix than what it is made of, unless it is changed in place.
        let out = std::mem::take(&mut matrices[to.index()]);
        let of = |p: MatrixName| &*matrices[p.index()];
        match op {
            MatrixOp::Copy => copy(pool, of(a), out),
            MatrixOp::Transpose => transpose(pool, matrices[a.index()], (rows, cols), out),
            MatrixOp::Gram => symmetric_product(pool, of(a), Right::Columns(of(a)), out, (m, n), ws),
            MatrixOp::Normalise => {
                let norm = norm(pool, out).max(SMALLEST_NORM);
                root = norm.sqrt();
                rescale(pool, (1.0 / norm) as f32, out);
            }
            MatrixOp::Symmetric => symmetric_product(pool, of(a), Right::Rows(of(b)), out, (m, m), ws),
            MatrixOp::Shift(by) => out.iter_mut().step_by(m + 1).for_each(|x| *x += by),
            MatrixOp::Sum(k) => sum(pool, k, (of(a), of(b), (c != to).then(|| of(c))), out, m),
            MatrixOp::Scale(by) => rescale(pool, by, out),
            MatrixOp::ScaleBack(by) => rescale(pool, (f64::from(by) / root) as f32, out),
            MatrixOp::Product => {
                let to = Out { y: &mut *out, ld: cols, acc: Acc::None, bias: None };
                gemm::product(pool, Left { data: of(a), ld: m }, Right::Rows(of(b)), to, (rows, m, cols), ws);
            }
        }
        matrices[to.index()] = out;
        Ok::<(), Infallible>(())
    })
    .unwrap_or_else(|never| match never {});
}

/// Small matrices that [`newton_schulz`] works with.
const SMALL: usize = 6;

/// A matrix that [`newton_schulz`] works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixName {
    /// The matrix itself, `rows` by `cols`.
    X,
    /// Room for another of its size.
    Spare,
    /// Room for symmetric matrices of its smaller side, of which there are six.
    Small(usize),
}

impl MatrixName {
    /// How many there are.
    pub const COUNT: usize = 2 + SMALL;

    /// A number below [`MatrixName::COUNT`].
    pub fn index(self) -> usize {
        match self {
            MatrixName::X => 0,
            MatrixName::Spare => 1,
            MatrixName::Small(i) => 2 + i,
        }
    }
}

/// What a step of [`newton_schulz`] does with the matrices `a`, `b` and `c` for its result `out`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MatrixOp {
    /// `out = a`, of the size of the whole.
    Copy,
    /// `out = a^T`, where `a` is higher than wide.
    Transpose,
    /// `out = a a^T`, where `a` is as high as its smaller side.
    Gram,
    /// A small `out` is divided by the root of its sum of squares, or by [`SMALLEST_NORM`] if that is more.
    Normalise,
    /// `out = a b` of small matrices that commute: what is below the diagonal, and its mirror image.
    Symmetric,
    /// A number is added to what is on the diagonal of a small `out`.
    Shift(f32),
    /// `out = k I + l a + m b + n c` of small matrices and `[k, l, m, n]`; `c` may be `out`.
    Sum([f32; 4]),
    /// A small `out` is multiplied by a number.
    Scale(f32),
    /// The same, and divided by the root of what [`MatrixOp::Normalise`] divided by.
    ScaleBack(f32),
    /// `out = a b`, of which one is small and the other, like `out`, has the size of the whole.
    Product,
}

/// One step of [`newton_schulz`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatrixStep {
    /// What is done.
    pub op: MatrixOp,
    /// With which matrices, `a`, `b` and `c`; the result where it reads none.
    pub of: [MatrixName; 3],
    /// What is written.
    pub out: MatrixName,
}

/// What [`orthogonalise`] does to a matrix of `rows` by `cols`, step by step, for whoever has the matrices.
///
/// # Errors
/// The first of `run`.
pub fn newton_schulz<E>(
    (rows, cols): (usize, usize),
    scale: f32,
    run: &mut dyn FnMut(MatrixStep) -> Result<(), E>,
) -> Result<(), E> {
    let mut run = |op, of: &[MatrixName], out| {
        let of = std::array::from_fn(|i| of.get(i).copied().unwrap_or(out));
        run(MatrixStep { op, of, out })
    };
    let (x, spare, gram) = (MatrixName::X, MatrixName::Spare, MatrixName::Small(0));
    let (tall, square) = (rows > cols, rows == cols);
    if square {
        run(MatrixOp::Gram, &[x], gram)?;
        run(MatrixOp::Normalise, &[], gram)?;
        let first = factor(&POLYNOMIALS[..1], &mut run)?;
        run(MatrixOp::ScaleBack(1.0), &[], first)?;
        run(MatrixOp::Product, &[first, x], spare)?;
        run(MatrixOp::Gram, &[spare], gram)?;
        let second = factor(&POLYNOMIALS[1..], &mut run)?;
        run(MatrixOp::Scale(scale), &[], second)?;
        return run(MatrixOp::Product, &[second, spare], x);
    }
    run(MatrixOp::Copy, &[x], spare)?;
    // The smaller side makes the Gram matrix.
    if tall {
        run(MatrixOp::Transpose, &[spare], x)?;
    }
    run(MatrixOp::Gram, &[x], gram)?;
    run(MatrixOp::Normalise, &[], gram)?;
    let factor = factor(&POLYNOMIALS, &mut run)?;
    run(MatrixOp::ScaleBack(scale), &[], factor)?;
    run(MatrixOp::Product, &if tall { [spare, factor] } else { [factor, spare] }, x)
}

/// What the steps multiply a matrix by whose Gram matrix comes first among the small ones. A step's polynomial takes three
/// products (Paterson and Stockmeyer 1973).
fn factor<E>(
    steps: &[Polynomial],
    run: &mut impl FnMut(MatrixOp, &[MatrixName], MatrixName) -> Result<(), E>,
) -> Result<MatrixName, E> {
    let [mut gram, mut square, mut cube, rest, mut step, mut all] = std::array::from_fn(MatrixName::Small);
    for (i, &Polynomial { centre, of: [a, b, c, d, e, f, g] }) in steps.iter().enumerate() {
        run(MatrixOp::Shift(-centre), &[], gram)?;
        run(MatrixOp::Symmetric, &[gram, gram], square)?;
        run(MatrixOp::Symmetric, &[square, gram], cube)?;
        run(MatrixOp::Sum([d, e, f, g]), &[gram, square, cube], rest)?;
        run(MatrixOp::Symmetric, &[cube, rest], step)?;
        run(MatrixOp::Sum([a, b, c, 1.0]), &[gram, square, step], step)?;
        if i + 1 < steps.len() {
            run(MatrixOp::Shift(centre), &[], gram)?;
            run(MatrixOp::Symmetric, &[gram, step], square)?;
            run(MatrixOp::Symmetric, &[square, step], cube)?;
            std::mem::swap(&mut gram, &mut cube);
        }
        if i == 0 {
            std::mem::swap(&mut all, &mut step);
        } else {
            run(MatrixOp::Symmetric, &[all, step], square)?;
            std::mem::swap(&mut all, &mut square);
        }
    }
    Ok(all)
}

/// Floats of workspace for [`orthogonalise`].
pub fn orthogonalise_workspace_len(rows: usize, cols: usize, threads: usize) -> usize {
    let (m, n) = (rows.min(cols), rows.max(cols));
    let last = if rows > cols { (n, m, m) } else { (m, m, n) };
    let product = |(rows, k, cols)| gemm::product_workspace_len(rows, k, cols, threads);
    let product = [(m, n, m), (m, m, m), last].into_iter().map(product).max().unwrap_or(0);
    Workspace::room(m * n) + Workspace::room(SMALL * m * m) + product
}

/// The root of the sum of squares, whose order does not depend on the number of threads.
fn norm(pool: &Pool, x: &[f32]) -> f64 {
    let mut partials = [0.0; 64];
    let chunk = x.len().div_ceil(partials.len()).max(1);
    sum_squares(pool, x, &mut partials[..x.len().div_ceil(chunk)], chunk);
    partials.iter().sum::<f64>().sqrt()
}

/// `out`, `m` by `m`, is the product of `left`, `m` by `k`, and `right`, which is symmetric: what is below the diagonal,
/// and its mirror image.
fn symmetric_product(
    pool: &Pool,
    left: &[f32],
    right: Right<'_, f32>,
    out: &mut [f32],
    (m, k): (usize, usize),
    ws: &mut [f32],
) {
    gemm::product_below_diagonal(pool, Left { data: left, ld: k }, right, out, (m, k), ws);
    let out = Parts::new(out);
    pool.rows(m.div_ceil(LANES), LANES * m / 2, &|range, _| {
        for row in range.map(|block| block * LANES) {
            let rows = LANES.min(m - row);
            for col in (0..row).step_by(LANES) {
                // SAFETY: only this task writes these columns above the diagonal, and nobody below it.
                unsafe { turn((&out, row * m + col, m), (&out, col * m + row, m), (rows, LANES)) };
            }
            for (i, j) in (0..rows).flat_map(|i| (0..i).map(move |j| (row + i, row + j))) {
                // SAFETY: as above.
                unsafe { out.part(j * m + i..j * m + i + 1)[0] = out.part(i * m + j..i * m + j + 1)[0] };
            }
        }
    });
}

/// As [`MatrixOp::Sum`] says; without a `c` that is `out`.
fn sum(
    pool: &Pool,
    [k, l, m, n]: [f32; 4],
    (a, b, c): (&[f32], &[f32], Option<&[f32]>),
    out: &mut [f32],
    side: usize,
) {
    let out = Parts::new(out);
    pool.rows(side, 4 * side, &|range, _| {
        for i in range {
            let row = i * side..(i + 1) * side;
            // SAFETY: tasks have disjoint rows.
            let to = unsafe { out.part(row.clone()) };
            combine((l, m, n), &a[row.clone()], &b[row.clone()], c.map(|c| &c[row]), to);
            to[i] += k;
        }
    });
}

kernel! { fn combine(k: (f32, f32, f32), a: &[f32], b: &[f32], c: Option<&[f32]>, out: &mut [f32]) = |s: S| {
    let (l, m, n) = (s.splat(k.0), s.splat(k.1), s.splat(k.2));
    for j in (0..a.len()).step_by(LANES) {
        let c = s.load(c.map_or(&out[j..], |c| &c[j..]));
        let sum = s.add(s.mul(l, s.load(&a[j..])), s.mul(m, s.load(&b[j..])));
        s.store(&mut out[j..], s.add(sum, s.mul(n, c)));
    }
} }

/// `to`, `cols` by `rows`, is the transpose of `from`.
fn transpose(pool: &Pool, from: &mut [f32], (rows, cols): (usize, usize), to: &mut [f32]) {
    let (from, to) = (Parts::new(from), Parts::new(to));
    pool.rows(cols.div_ceil(LANES), LANES * rows, &|range, _| {
        for col in range.map(|block| block * LANES) {
            for row in (0..rows).step_by(LANES) {
                let block = (LANES.min(rows - row), LANES.min(cols - col));
                // SAFETY: tasks have disjoint rows of the result, and nobody writes the other.
                unsafe { turn((&from, row * cols + col, cols), (&to, col * rows + row, rows), block) };
            }
        }
    });
}

/// Elements of a matrix: where they begin, and how far its rows are apart.
type Block<'a> = (&'a Parts<'a, f32>, usize, usize);

/// The block `to` is the transpose of the block `from` of `rows` by `cols`, at most [`LANES`] each.
///
/// # Safety
/// Nobody writes `from` or touches `to` meanwhile, and they do not overlap.
unsafe fn turn(from: Block<'_>, to: Block<'_>, shape: (usize, usize)) {
    turned(from, to, shape);
}

kernel! { fn turned(from: Block<'_>, to: Block<'_>, shape: (usize, usize)) = |s: S| {
    let (rows, cols) = shape;
    let mut block = [s.splat(0.0); LANES];
    for (i, row) in block.iter_mut().take(rows).enumerate() {
        let at = from.1 + i * from.2;
        // SAFETY: by the contract of `turn`, as below.
        *row = s.load(unsafe { from.0.part(at..at + cols) });
    }
    s.transpose(&mut block);
    for (j, &row) in block.iter().take(cols).enumerate() {
        let at = to.1 + j * to.2;
        // SAFETY: as above.
        s.store(unsafe { to.0.part(at..at + rows) }, row);
    }
} }
