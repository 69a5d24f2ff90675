//! Attention's scores kept within bounds: the greatest of each head, and weights scaled down.

use crate::pool::{Parts, Pool};

/// `greatest[h]` becomes the greatest of itself and of head `h`'s in `maxima`, `[seqs, heads, seq]`.
///
/// ```
/// let mut greatest = [0.0, 4.0];
/// kernels::head_maxima(&[1.0, 2.0, 3.0, -1.0, 0.5, 0.5, 9.0, 1.0], 2, &mut greatest);
/// assert_eq!(greatest, [2.0, 9.0]);
/// ```
pub fn head_maxima(maxima: &[f32], seq: usize, greatest: &mut [f64]) {
    assert_eq!(maxima.len() % (seq * greatest.len()).max(1), 0, "whole sequences of all heads");
    for (i, rows) in maxima.chunks_exact(seq.max(1)).enumerate() {
        let most = rows.iter().fold(f32::NEG_INFINITY, |most, m| most.max(*m));
        let of = &mut greatest[i % greatest.len()];
        *of = of.max(f64::from(most));
    }
}

/// `x = factor x`.
pub fn scale(pool: &Pool, factor: f32, x: &mut [f32]) {
    let len = x.len();
    let x = Parts::new(x);
    pool.rows(len, 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        unsafe { x.part(range) }.iter_mut().for_each(|v| *v *= factor);
    });
}
