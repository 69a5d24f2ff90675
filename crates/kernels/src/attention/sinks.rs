//! The gradient of attention's sinks.

use std::ops::Range;

use super::Attention;
use crate::linear::{column_sums, column_sums_workspace_len};
use crate::math::exp;
use crate::pool::Pool;
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};
use crate::tree::Merge;

/// The gradients of sinks into the levels of `grad`: of the heads of `shape`, which are those from `first` on among all that
/// have `sinks`; others get zero. For each query, less its probability of the sink times the
/// dot product of output and output gradient. The chain of a leaf runs over its rows; leaves as for [`crate::linear_dw`].
pub fn attention_sinks_dw<T: Storage>(
    pool: &Pool,
    shape: &Attention,
    (o, lse, do_): (&[T], &[f32], &[T]),
    (sinks, first): (&[T], usize),
    grad: &mut [f32],
    tree: &[u32],
    merge: Merge,
    ws: &mut [f32],
) {
    let n = shape.seqs * shape.seq;
    let lens = (o.len(), do_.len(), lse.len());
    assert_eq!(lens, (n * shape.o_ld(), n * shape.o_ld(), n * shape.heads));
    assert!(first + shape.heads <= sinks.len(), "sinks");
    column_sums(pool, n, sinks.len(), grad, tree, merge, ws, &|rows, heads, sums| {
        for (head, sum) in heads.zip(sums) {
            let Some(own) = head.checked_sub(first).filter(|own| *own < shape.heads) else { continue };
            *sum = add_head(shape, (o, lse, do_), sinks[head].one(), own, rows.clone(), *sum);
        }
    });
}

/// Floats of workspace for [`attention_sinks_dw`].
pub fn attention_sinks_dw_workspace_len(heads: usize, tree: &[u32]) -> usize {
    column_sums_workspace_len(heads, tree)
}

kernel! { fn add_head[T: Element](
    shape: &Attention, of: (&[T], &[f32], &[T]), sink: f32, head: usize, rows: Range<usize>, sum: f32
) -> f32 = |s: S| {
    let ((o, lse, do_), h, mut sum) = (of, shape.value_dim, sum);
    for row in rows {
        let at = row * shape.o_ld() + head * h;
        let (o, do_) = (&o[at..at + h], &do_[at..at + h]);
        let mut dot = s.splat(0.0);
        for j in (0..h).step_by(LANES) {
            dot = s.fma(T::get(s, &o[j..]), T::get(s, &do_[j..]), dot);
        }
        let lse = lse[(row / shape.seq * shape.heads + head) * shape.seq + row % shape.seq];
        let mut p = [0.0; LANES];
        s.store(&mut p, exp(s, s.splat(sink - lse)));
        sum -= p[0] * s.sum(dot);
    }
    sum
} }
