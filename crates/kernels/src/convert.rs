//! Copies, conversions and fills.

use half::bf16;

use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::Element;

/// y = x.
pub fn copy<T: Copy + Send + Sync>(pool: &Pool, x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len());
    let y = Parts::new(y);
    pool.rows(x.len(), 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        unsafe { y.part(range.clone()) }.copy_from_slice(&x[range]);
    });
}

/// Sets every element to `value`.
pub fn fill<T: Copy + Send + Sync>(pool: &Pool, x: &mut [T], value: T) {
    let len = x.len();
    let x = Parts::new(x);
    pool.rows(len, 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        unsafe { x.part(range) }.fill(value);
    });
}

/// y = x, widened.
pub fn to_f32(pool: &Pool, x: &[bf16], y: &mut [f32]) {
    convert(pool, x, y);
}

/// y = x, rounded to nearest even.
pub fn from_f32(pool: &Pool, x: &[f32], y: &mut [bf16]) {
    convert(pool, x, y);
}

fn convert<A: Element, B: Element>(pool: &Pool, x: &[A], y: &mut [B]) {
    assert_eq!(x.len(), y.len());
    let y = Parts::new(y);
    pool.rows(x.len(), 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        convert_range(&x[range.clone()], unsafe { y.part(range) });
    });
}

kernel! { fn convert_range[A: Element, B: Element](x: &[A], y: &mut [B]) = |s: S| {
    for j in (0..y.len()).step_by(LANES) {
        B::put(s, &mut y[j..], A::get(s, &x[j..]));
    }
} }
