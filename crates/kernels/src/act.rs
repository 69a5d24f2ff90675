//! Elementwise ops: activations and addition.

use std::ops::Range;

use crate::math::{normal_cdf, sigmoid, tanh};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, Simd, kernel};
use crate::storage::{Element, Storage};

/// h = silu(gate) up for `n` rows; `gu` is `[n, 2 f]`, gates first, and `h` is `[n, f]`.
pub fn swiglu<T: Storage>(pool: &Pool, gu: &[T], h: &mut [T], n: usize, f: usize) {
    assert_eq!((gu.len(), h.len()), (n * 2 * f, n * f));
    let h = Parts::new(h);
    pool.rows(n, 4 * f, &|rows, _| {
        // SAFETY: tasks have disjoint rows.
        let h = unsafe { h.part(rows.start * f..rows.end * f) };
        swiglu_rows(&gu[rows.start * 2 * f..rows.end * 2 * f], h, f);
    });
}

kernel! { fn swiglu_rows[T: Element](gu: &[T], h: &mut [T], f: usize) = |s: S| {
    if f == 0 {
        return;
    }
    for (gu, h) in gu.chunks_exact(2 * f).zip(h.chunks_exact_mut(f)) {
        let (gate, up) = gu.split_at(f);
        for j in (0..f).step_by(LANES) {
            let g = T::get(s, &gate[j..]);
            let silu = s.mul(g, sigmoid(s, g));
            T::put(s, &mut h[j..], s.mul(silu, T::get(s, &up[j..])));
        }
    }
} }

/// The gradient of [`swiglu`]'s input.
pub fn swiglu_dx<T: Storage>(pool: &Pool, dh: &[T], gu: &[T], dgu: &mut [T], n: usize, f: usize) {
    assert_eq!((dh.len(), gu.len(), dgu.len()), (n * f, n * 2 * f, n * 2 * f));
    let dgu = Parts::new(dgu);
    pool.rows(n, 8 * f, &|rows, _| {
        let wide = rows.start * 2 * f..rows.end * 2 * f;
        // SAFETY: tasks have disjoint rows.
        let dgu = unsafe { dgu.part(wide.clone()) };
        swiglu_rows_dx(&dh[rows.start * f..rows.end * f], &gu[wide], dgu, f);
    });
}

kernel! { fn swiglu_rows_dx[T: Element](dh: &[T], gu: &[T], dgu: &mut [T], f: usize) = |s: S| {
    if f == 0 {
        return;
    }
    let one = s.splat(1.0);
    for ((dh, gu), dgu) in dh.chunks_exact(f).zip(gu.chunks_exact(2 * f)).zip(dgu.chunks_exact_mut(2 * f)) {
        let (gate, up) = gu.split_at(f);
        let (dgate, dup) = dgu.split_at_mut(f);
        for j in (0..f).step_by(LANES) {
            let (g, u, d) = (T::get(s, &gate[j..]), T::get(s, &up[j..]), T::get(s, &dh[j..]));
            let sig = sigmoid(s, g);
            let silu = s.mul(g, sig);
            // silu' = sig (1 + g (1 - sig)) = sig + silu (1 - sig)
            let slope = s.fma(silu, s.sub(one, sig), sig);
            T::put(s, &mut dgate[j..], s.mul(s.mul(d, u), slope));
            T::put(s, &mut dup[j..], s.mul(d, silu));
        }
    }
} }

/// Which form of the Gaussian error linear unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, as in GPT-2.
    Tanh,
    /// x (1 + erf(x / sqrt 2)) / 2.
    Erf,
}

/// sqrt(2 / pi)
const TANH_SCALE: f32 = 0.797_884_6;
const TANH_CUBE: f32 = 0.044_715;
/// 1 / sqrt(2 pi)
const NORMAL_PEAK: f32 = 0.398_942_3;

/// y = gelu(x), elementwise.
pub fn gelu<T: Storage>(pool: &Pool, kind: Gelu, x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len());
    let y = Parts::new(y);
    pool.rows(x.len(), 8, &|range: Range<usize>, _| {
        // SAFETY: tasks have disjoint ranges.
        let y = unsafe { y.part(range.clone()) };
        gelu_range(kind, &x[range], y);
    });
}

/// The argument of the hyperbolic tangent.
#[inline(always)]
fn tanh_argument<S: Simd>(s: S, x: S::V) -> S::V {
    let cube = s.mul(s.mul(x, x), x);
    s.mul(s.fma(cube, s.splat(TANH_CUBE), x), s.splat(TANH_SCALE))
}

kernel! { fn gelu_range[T: Element](kind: Gelu, x: &[T], y: &mut [T]) = |s: S| {
    let (half, one) = (s.splat(0.5), s.splat(1.0));
    for j in (0..x.len()).step_by(LANES) {
        let x = T::get(s, &x[j..]);
        let part = match kind {
            Gelu::Tanh => s.mul(half, s.add(one, tanh(s, tanh_argument(s, x)))),
            Gelu::Erf => normal_cdf(s, x),
        };
        T::put(s, &mut y[j..], s.mul(x, part));
    }
} }

/// The gradient of [`gelu`]'s input: dx = dy gelu'(x).
pub fn gelu_dx<T: Storage>(pool: &Pool, kind: Gelu, dy: &[T], x: &[T], dx: &mut [T]) {
    assert_eq!((dy.len(), x.len()), (dx.len(), dx.len()));
    let len = x.len();
    let dx = Parts::new(dx);
    pool.rows(len, 8, &|range: Range<usize>, _| {
        // SAFETY: tasks have disjoint ranges.
        let dx = unsafe { dx.part(range.clone()) };
        gelu_range_dx(kind, &dy[range.clone()], &x[range], dx);
    });
}

kernel! { fn gelu_range_dx[T: Element](kind: Gelu, dy: &[T], x: &[T], dx: &mut [T]) = |s: S| {
    let (half, one) = (s.splat(0.5), s.splat(1.0));
    for j in (0..x.len()).step_by(LANES) {
        let (x, dy) = (T::get(s, &x[j..]), T::get(s, &dy[j..]));
        let slope = match kind {
            Gelu::Tanh => {
                let t = tanh(s, tanh_argument(s, x));
                let inner = s.fma(s.mul(x, x), s.splat(3.0 * TANH_CUBE), one);
                let inner = s.mul(inner, s.splat(TANH_SCALE));
                let bend = s.mul(s.sub(one, s.mul(t, t)), inner);
                s.mul(half, s.fma(x, bend, s.add(one, t)))
            }
            Gelu::Erf => {
                let density = crate::math::exp(s, s.mul(s.mul(x, x), s.splat(-0.5)));
                s.fma(s.mul(x, s.splat(NORMAL_PEAK)), density, normal_cdf(s, x))
            }
        };
        T::put(s, &mut dx[j..], s.mul(dy, slope));
    }
} }

/// y = a + b, elementwise.
pub fn add<T: Storage>(pool: &Pool, a: &[T], b: &[T], y: &mut [T]) {
    assert_eq!((a.len(), b.len()), (y.len(), y.len()));
    let len = y.len();
    let y = Parts::new(y);
    pool.rows(len, 1, &|range: Range<usize>, _| {
        // SAFETY: tasks have disjoint ranges.
        let y = unsafe { y.part(range.clone()) };
        add_range(&a[range.clone()], &b[range], y);
    });
}

kernel! { fn add_range[T: Element](a: &[T], b: &[T], y: &mut [T]) = |s: S| {
    for j in (0..y.len()).step_by(LANES) {
        let sum = s.add(T::get(s, &a[j..]), T::get(s, &b[j..]));
        T::put(s, &mut y[j..], sum);
    }
} }
