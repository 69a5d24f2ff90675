//! The average of weights over steps.

use crate::optim::power;
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};

/// The share by which the average goes towards the weights after step `step` (from 1): `(1 - d) / (1 - d^step)`, with
/// which the average has weights `d^(step - s)`, that add up to 1, for the steps `s` so far. It is what Adam's corrected
/// first moment is of gradients (Kingma and Ba 2015, arXiv 1412.6980, section 3), so that no initial weights linger.
///
/// ```
/// let shares: Vec<f64> = (1..=3).map(|step| kernels::average_share(0.5, step)).collect();
/// assert_eq!(shares, [1.0, 0.5 / 0.75, 0.5 / 0.875]);
/// ```
pub fn average_share(decay: f64, step: u64) -> f64 {
    (1.0 - decay) / (1.0 - power(decay, step))
}

/// `mean = (1 - share) mean + share w`.
pub fn average(pool: &Pool, share: f64, mean: &mut [f32], w: &[f32]) {
    assert_eq!(mean.len(), w.len());
    let factors = ((1.0 - share) as f32, share as f32);
    let mean = Parts::new(mean);
    pool.rows(w.len(), 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        mix(factors, unsafe { mean.part(range.clone()) }, &w[range]);
    });
}

kernel! { fn mix(c: (f32, f32), mean: &mut [f32], w: &[f32]) = |s: S| {
    let (keep, share) = (s.splat(c.0), s.splat(c.1));
    for j in (0..w.len()).step_by(LANES) {
        let sum = s.add(s.mul(keep, s.load(&mean[j..])), s.mul(share, s.load(&w[j..])));
        s.store(&mut mean[j..], sum);
    }
} }

/// `a` and `b` change places.
pub fn swap(pool: &Pool, a: &mut [f32], b: &mut [f32]) {
    assert_eq!(a.len(), b.len());
    let len = a.len();
    let (a, b) = (Parts::new(a), Parts::new(b));
    pool.rows(len, 1, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        unsafe { a.part(range.clone()).swap_with_slice(b.part(range)) };
    });
}
