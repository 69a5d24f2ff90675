//! Sixteen lanes one by one: the meaning of every other backend.

use half::bf16;

use super::{LANES, Simd};
use crate::storage::Element;

/// Any processor. Slow where it has no fused multiply-add, but right.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

type V = [f32; LANES];

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> V {
    std::array::from_fn(f)
}

impl Simd for Scalar {
    type V = V;
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn iota(self) -> V {
        each(|i| i as f32)
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> V {
        each(|i| x.get(i).copied().unwrap_or(0.0))
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: V) {
        for (x, v) in x.iter_mut().zip(v) {
            *x = v;
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> V {
        each(|i| x.get(i).map_or(0.0, |x| x.one()))
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: V) {
        for (x, v) in x.iter_mut().zip(v) {
            *x = bf16::of(v);
        }
    }
    #[inline(always)]
    unsafe fn load_at(self, p: *const f32) -> V {
        // SAFETY: readable by contract; an array of f32 has no alignment beyond that of f32.
        unsafe { p.cast::<V>().read() }
    }
    #[inline(always)]
    unsafe fn store_at(self, p: *mut f32, v: V) {
        // SAFETY: writable by contract.
        unsafe { p.cast::<V>().write(v) }
    }
    #[inline(always)]
    fn prefetch(self, _: *const f32) {}

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        each(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        each(|i| a[i].sqrt())
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        each(|i| a[i].abs())
    }
    #[inline(always)]
    fn less(self, a: V, b: V, x: V, y: V) -> V {
        each(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn exp2_shifted(self, t: V) -> V {
        each(|i| f32::from_bits((t[i].to_bits() << 23).wrapping_add(0x3f80_0000)))
    }

    #[inline(always)]
    fn sum(self, mut v: V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn greatest(self, mut v: V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] = if v[i] > v[i + half] { v[i] } else { v[i + half] };
            }
        }
        v[0]
    }
    #[inline(always)]
    fn transpose(self, rows: &mut [V; LANES]) {
        for i in 0..LANES {
            for j in 0..i {
                let t = rows[i][j];
                rows[i][j] = rows[j][i];
                rows[j][i] = t;
            }
        }
    }
}
