//! Elementwise ops: activations and addition.

use std::ops::Range;

use crate::math::{normal_cdf, sigmoid, tanh};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, STREAM, Simd, ask_ahead, kernel};
use crate::storage::{Element, Storage};

/// Which gated linear unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glu {
    /// silu(gate) up (Shazeer 2020, arXiv 2002.05202).
    Silu,
    /// g sigmoid(1.702 g) (u + 1), where g is the gate, at most 7, and u is up, from -7 to 7 (GPT-OSS, arXiv 2508.10925,
    /// section 2.2; the constants are those of the published code).
    Clamped,
}

/// Of the sigmoid that comes near the error function.
const CLAMPED_SLOPE: f32 = 1.702;
const CLAMPED_LIMIT: f32 = 7.0;

/// The gated linear unit of `n` rows; `gu` is `[n, 2 f]`, gates first, and `h` is `[n, f]`.
pub fn glu<T: Storage>(pool: &Pool, kind: Glu, gu: &[T], h: &mut [T], n: usize, f: usize) {
    assert_eq!((gu.len(), h.len()), (n * 2 * f, n * f));
    let h = Parts::new(h);
    pool.rows(n, 4 * f, &|rows, _| {
        // SAFETY: tasks have disjoint rows.
        let h = unsafe { h.part(rows.start * f..rows.end * f) };
        let gu = &gu[rows.start * 2 * f..rows.end * 2 * f];
        match kind {
            Glu::Silu => swiglu_rows(gu, h, f),
            Glu::Clamped => clamped_rows(gu, h, f),
        }
    });
}

kernel! { fn swiglu_rows[T: Element](gu: &[T], h: &mut [T], f: usize) = |s: S| {
    if f == 0 {
        return;
    }
    for (gu, h) in gu.chunks_exact(2 * f).zip(h.chunks_exact_mut(f)) {
        let (gate, up) = gu.split_at(f);
        for j in (0..f).step_by(LANES) {
            ask_ahead(s, [gate[j..].as_ptr(), up[j..].as_ptr()], 2 * f);
            ask_ahead(s, [h[j..].as_ptr()], f);
            let g = T::get(s, &gate[j..]);
            let silu = s.mul(g, sigmoid(s, g));
            T::put(s, &mut h[j..], s.mul(silu, T::get(s, &up[j..])));
        }
    }
} }

kernel! { fn clamped_rows[T: Element](gu: &[T], h: &mut [T], f: usize) = |s: S| {
    if f == 0 {
        return;
    }
    let (limit, low, one) = (s.splat(CLAMPED_LIMIT), s.splat(-CLAMPED_LIMIT), s.splat(1.0));
    for (gu, h) in gu.chunks_exact(2 * f).zip(h.chunks_exact_mut(f)) {
        let (gate, up) = gu.split_at(f);
        for j in (0..f).step_by(LANES) {
            ask_ahead(s, [gate[j..].as_ptr(), up[j..].as_ptr()], 2 * f);
            ask_ahead(s, [h[j..].as_ptr()], f);
            // The bound comes first, so that NaN stays.
            let g = s.min(limit, T::get(s, &gate[j..]));
            let u = s.max(low, s.min(limit, T::get(s, &up[j..])));
            let part = s.mul(g, sigmoid(s, s.mul(g, s.splat(CLAMPED_SLOPE))));
            T::put(s, &mut h[j..], s.mul(part, s.add(u, one)));
        }
    }
} }

kernel! { fn clamped_rows_dx[T: Element](dh: &[T], gu: &[T], dgu: &mut [T], f: usize) = |s: S| {
    if f == 0 {
        return;
    }
    let (limit, low, one, zero) = (s.splat(CLAMPED_LIMIT), s.splat(-CLAMPED_LIMIT), s.splat(1.0), s.splat(0.0));
    let slope = s.splat(CLAMPED_SLOPE);
    for ((dh, gu), dgu) in dh.chunks_exact(f).zip(gu.chunks_exact(2 * f)).zip(dgu.chunks_exact_mut(2 * f)) {
        let (gate, up) = gu.split_at(f);
        let (dgate, dup) = dgu.split_at_mut(f);
        for j in (0..f).step_by(LANES) {
            let (gate, up, d) = (T::get(s, &gate[j..]), T::get(s, &up[j..]), T::get(s, &dh[j..]));
            let (g, u) = (s.min(limit, gate), s.max(low, s.min(limit, up)));
            let sig = sigmoid(s, s.mul(g, slope));
            // (g sig)' = sig + slope g sig (1 - sig)
            let part = s.mul(g, sig);
            let bend = s.fma(s.mul(slope, part), s.sub(one, sig), sig);
            let of_gate = s.mul(s.mul(d, s.add(u, one)), bend);
            let of_up = s.mul(d, part);
            // At a bound the gradient passes, as it does in PyTorch.
            T::put(s, &mut dgate[j..], s.less(limit, gate, zero, of_gate));
            T::put(s, &mut dup[j..], s.less(limit, up, zero, s.less(up, low, zero, of_up)));
        }
    }
} }

/// The gradient of [`glu`]'s input.
pub fn glu_dx<T: Storage>(pool: &Pool, kind: Glu, dh: &[T], gu: &[T], dgu: &mut [T], n: usize, f: usize) {
    assert_eq!((dh.len(), gu.len(), dgu.len()), (n * f, n * 2 * f, n * 2 * f));
    let dgu = Parts::new(dgu);
    pool.rows(n, 8 * f, &|rows, _| {
        let wide = rows.start * 2 * f..rows.end * 2 * f;
        // SAFETY: tasks have disjoint rows.
        let dgu = unsafe { dgu.part(wide.clone()) };
        let dh = &dh[rows.start * f..rows.end * f];
        match kind {
            Glu::Silu => swiglu_rows_dx(dh, &gu[wide], dgu, f),
            Glu::Clamped => clamped_rows_dx(dh, &gu[wide], dgu, f),
        }
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
        ask_ahead(s, [x[j..].as_ptr(), y[j..].as_ptr()], STREAM);
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
        ask_ahead(s, [&x[j..], &dy[j..], &dx[j..]].map(<[T]>::as_ptr), STREAM);
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
        ask_ahead(s, [&a[j..], &b[j..], &y[j..]].map(<[T]>::as_ptr), STREAM);
        let sum = s.add(T::get(s, &a[j..]), T::get(s, &b[j..]));
        T::put(s, &mut y[j..], sum);
    }
} }
