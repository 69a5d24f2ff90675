//! Rotary position embedding of packed qkv rows.

use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// Rotates the query and key heads of packed qkv rows in place; values stay.
///
/// The convention is "rotate half" (Hugging Face Llama): element j of the first half of a head pairs with element j
/// of the second half, angle `pos0 + row % seq`. `cos` and `sin` are `[positions, head_dim / 2]`. `inverse` turns the
/// other way, which is the gradient.
pub fn rope<T: Storage>(
    pool: &Pool,
    qkv: &mut [T],
    cos: &[f32],
    sin: &[f32],
    n: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    pos0: usize,
    inverse: bool,
) {
    let (ld, half) = ((heads + 2 * kv_heads) * head_dim, head_dim / 2);
    assert!(head_dim.is_multiple_of(2) && qkv.len() == n * ld && seq > 0);
    let positions = pos0 + seq.min(n);
    assert!(
        cos.len() >= positions * half && sin.len() >= positions * half,
        "tables end before the last position"
    );
    let qkv = Parts::new(qkv);
    pool.rows(n, ld, &|rows, _| {
        for row in rows {
            let at = (pos0 + row % seq) * half;
            // SAFETY: tasks have disjoint rows.
            let x = unsafe { qkv.part(row * ld..row * ld + (heads + kv_heads) * head_dim) };
            rotate(x, &cos[at..at + half], &sin[at..at + half], inverse);
        }
    });
}

kernel! { fn rotate[T: Element](x: &mut [T], cos: &[f32], sin: &[f32], inverse: bool) = |s: S| {
    let half = cos.len();
    if half == 0 {
        return;
    }
    for head in x.chunks_exact_mut(2 * half) {
        let (a, b) = head.split_at_mut(half);
        for j in (0..half).step_by(LANES) {
            let (c, t) = (s.load(&cos[j..]), s.load(&sin[j..]));
            let t = if inverse { s.sub(s.splat(0.0), t) } else { t };
            let (x, y) = (T::get(s, &a[j..]), T::get(s, &b[j..]));
            T::put(s, &mut a[j..], s.sub(s.mul(x, c), s.mul(y, t)));
            T::put(s, &mut b[j..], s.fma(y, c, s.mul(x, t)));
        }
    }
} }
