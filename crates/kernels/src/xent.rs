//! Cross-entropy over rows of logits, whole or split over shards of the vocabulary.

use crate::math::{exp, ln, tanh};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, Simd, kernel};
use crate::storage::{Element, Storage};

/// What the gradient of a loss is made of beside its cross-entropy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossTerms {
    /// Factor of all gradients.
    pub scale: f32,
    /// Factor of the squared log-sum-exp of a row, no part of the loss; 0 without.
    pub z: f32,
    /// Logits were squeezed by [`soft_cap`] to this, whose derivative follows; 0 if not.
    pub cap: f32,
}

impl LossTerms {
    /// Cross-entropy alone, with this factor.
    pub fn plain(scale: f32) -> LossTerms {
        LossTerms { scale, ..LossTerms::default() }
    }
}

/// Squeezes logits in place: `cap tanh(x / cap)`.
pub fn soft_cap<T: Storage>(pool: &Pool, logits: &mut [T], cap: f32) {
    let len = logits.len();
    let logits = Parts::new(logits);
    pool.rows(len, 4, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        squeeze(unsafe { logits.part(range) }, cap);
    });
}

kernel! { fn squeeze[T: Element](logits: &mut [T], cap: f32) = |s: S| {
    let (cap, inverse) = (s.splat(cap), s.splat(1.0 / cap));
    for j in (0..logits.len()).step_by(LANES) {
        let squeezed = tanh(s, s.mul(T::get(s, &logits[j..]), inverse));
        T::put(s, &mut logits[j..], s.mul(squeezed, cap));
    }
} }

/// The target that does not count: its row has no loss and no gradient.
const IGNORED: u32 = u32::MAX;

/// For each of `n` rows of `v` logits of a vocabulary shard that starts at `vocab0`: the maximum, the sum of
/// exp(l - max), and the target's logit (0 if it lies in another shard or is ignored, `u32::MAX`). `stats` is `[n, 3]`.
pub fn xent_stats<T: Storage>(
    pool: &Pool,
    logits: &[T],
    targets: &[u32],
    vocab0: usize,
    stats: &mut [f32],
    n: usize,
    v: usize,
) {
    assert_eq!((logits.len(), targets.len(), stats.len()), (n * v, n, 3 * n));
    let stats = Parts::new(stats);
    pool.rows(n, 2 * v, &|rows, _| {
        for row in rows {
            let logits = &logits[row * v..(row + 1) * v];
            let (max, sum) = row_stats(logits);
            let target = in_shard(targets[row], vocab0, v).map_or(0.0, |t| logits[t].one());
            // SAFETY: tasks have disjoint rows.
            unsafe { stats.part(3 * row..3 * row + 3) }.copy_from_slice(&[max, sum, target]);
        }
    });
}

fn in_shard(target: u32, vocab0: usize, v: usize) -> Option<usize> {
    if target == IGNORED {
        return None;
    }
    (target as usize).checked_sub(vocab0).filter(|&t| t < v)
}

kernel! { fn row_stats[T: Element](logits: &[T]) -> (f32, f32) = |s: S| {
    stats_of(s, logits)
} }

#[inline(always)]
fn stats_of<S: Simd, T: Element>(s: S, logits: &[T]) -> (f32, f32) {
    let v = logits.len();
    let mut max = s.splat(f32::NEG_INFINITY);
    for j in (0..v).step_by(LANES) {
        max = s.max(masked(s, logits, j, f32::NEG_INFINITY), max);
    }
    let max = s.greatest(max);
    let m = s.splat(max);
    let mut sum = s.splat(0.0);
    for j in (0..v).step_by(LANES) {
        // Lanes beyond the row are -inf, whose exponential is 0.
        sum = s.add(sum, exp(s, s.sub(masked(s, logits, j, f32::NEG_INFINITY), m)));
    }
    (max, s.sum(sum))
}

/// The elements at `j`, filled up with `rest`.
#[inline(always)]
fn masked<S: Simd, T: Element>(s: S, x: &[T], j: usize, rest: f32) -> S::V {
    let v = T::get(s, &x[j..]);
    if x.len() - j < LANES { s.less(s.iota(), s.splat((x.len() - j) as f32), v, s.splat(rest)) } else { v }
}

/// Combines the stats of `shards` shards, `[shards, n, 3]`, in their order into those of the whole rows, `[n, 3]`.
pub fn xent_combine(stats: &[f32], shards: usize, out: &mut [f32], n: usize) {
    assert_eq!((stats.len(), out.len()), (shards * n * 3, n * 3));
    combine(stats, out);
}

kernel! { fn combine(stats: &[f32], out: &mut [f32]) = |s: S| {
    let len = out.len();
    for row in (0..len).step_by(3) {
        let mut max = f32::NEG_INFINITY;
        for at in (row..stats.len()).step_by(len) {
            max = if stats[at] > max { stats[at] } else { max };
        }
        let (mut sum, mut target) = (0.0, 0.0);
        for at in (row..stats.len()).step_by(len) {
            let mut scale = [0.0; LANES];
            s.store(&mut scale, exp(s, s.splat(stats[at] - max)));
            sum += stats[at + 1] * scale[0];
            target += stats[at + 2];
        }
        out[row..row + 3].copy_from_slice(&[max, sum, target]);
    }
} }

/// Turns logits into their gradient in place, (softmax - onehot) scale and the other [`LossTerms`], given the stats of whole rows, `[n, 3]`; rows
/// with an ignored target become 0. `loss` gets each row's negative log-likelihood, not scaled, 0 where ignored.
pub fn xent_dlogits<T: Storage>(
    pool: &Pool,
    logits: &mut [T],
    targets: &[u32],
    vocab0: usize,
    stats: &[f32],
    terms: LossTerms,
    loss: &mut [f32],
    n: usize,
    v: usize,
) {
    assert_eq!((logits.len(), targets.len(), stats.len(), loss.len()), (n * v, n, 3 * n, n));
    let (logits, loss) = (Parts::new(logits), Parts::new(loss));
    pool.rows(n, 2 * v, &|rows, _| {
        for row in rows {
            // SAFETY: tasks have disjoint rows.
            let (logits, loss) = unsafe { (logits.part(row * v..(row + 1) * v), loss.part(row..row + 1)) };
            let [max, sum, target] = [stats[3 * row], stats[3 * row + 1], stats[3 * row + 2]];
            loss[0] = row_gradient(logits, targets[row], vocab0, [max, sum, target], terms);
        }
    });
}

/// [`xent_stats`] and [`xent_dlogits`] of the whole vocabulary at once, with the same bits.
pub fn xent_fused<T: Storage>(
    pool: &Pool,
    logits: &mut [T],
    targets: &[u32],
    terms: LossTerms,
    loss: &mut [f32],
    n: usize,
    v: usize,
) {
    assert_eq!((logits.len(), targets.len(), loss.len()), (n * v, n, n));
    let (logits, loss) = (Parts::new(logits), Parts::new(loss));
    pool.rows(n, 4 * v, &|rows, _| {
        for row in rows {
            // SAFETY: tasks have disjoint rows.
            let (logits, loss) = unsafe { (logits.part(row * v..(row + 1) * v), loss.part(row..row + 1)) };
            let (max, sum) = row_stats(logits);
            let target = in_shard(targets[row], 0, v).map_or(0.0, |t| logits[t].one());
            loss[0] = row_gradient(logits, targets[row], 0, [max, sum, target], terms);
        }
    });
}

/// Writes a row's gradient and gives its loss.
fn row_gradient<T: Element>(
    logits: &mut [T],
    target: u32,
    vocab0: usize,
    [max, sum, target_logit]: [f32; 3],
    terms: LossTerms,
) -> f32 {
    if target == IGNORED {
        logits.fill(T::default());
        return 0.0;
    }
    let LossTerms { scale, z, cap } = terms;
    let log_sum = ln(sum) + max;
    // d/dx of z lse^2 is 2 z lse softmax(x).
    let more = 1.0 + 2.0 * z * log_sum;
    let here = in_shard(target, vocab0, logits.len());
    // The target's probability before its logit is overwritten, so that 1 is taken off before rounding.
    let at_target = here.map(|t| logits[t]);
    if cap > 0.0 {
        capped_row(logits, (max, 1.0 / sum, more), scale, 1.0 / cap);
    } else {
        softmax_row(logits, max, 1.0 / sum, more, scale);
    }
    if let (Some(t), Some(logit)) = (here, at_target) {
        let slope = if cap > 0.0 { 1.0 - (logit.one() / cap) * (logit.one() / cap) } else { 1.0 };
        logits[t] = target_gradient(logit, max, 1.0 / sum, more, scale * slope);
    }
    ln(sum) + (max - target_logit)
}

kernel! { fn softmax_row[T: Element](logits: &mut [T], max: f32, inverse: f32, more: f32, scale: f32) = |s: S| {
    let (m, inverse, more, scale) = (s.splat(max), s.splat(inverse), s.splat(more), s.splat(scale));
    for j in (0..logits.len()).step_by(LANES) {
        let p = s.mul(exp(s, s.sub(T::get(s, &logits[j..]), m)), inverse);
        T::put(s, &mut logits[j..], s.mul(s.mul(p, more), scale));
    }
} }

kernel! { fn capped_row[T: Element](logits: &mut [T], of: (f32, f32, f32), scale: f32, per_cap: f32) = |s: S| {
    let (m, inverse, more) = (s.splat(of.0), s.splat(of.1), s.splat(of.2));
    let (scale, per_cap, one) = (s.splat(scale), s.splat(per_cap), s.splat(1.0));
    for j in (0..logits.len()).step_by(LANES) {
        let x = T::get(s, &logits[j..]);
        let p = s.mul(s.mul(exp(s, s.sub(x, m)), inverse), more);
        let share = s.mul(x, per_cap);
        let slope = s.sub(one, s.mul(share, share));
        T::put(s, &mut logits[j..], s.mul(s.mul(p, slope), scale));
    }
} }

kernel! { fn target_gradient[T: Element](logit: T, max: f32, inverse: f32, more: f32, scale: f32) -> T = |s: S| {
    let mut lanes = [0.0; LANES];
    s.store(&mut lanes, exp(s, s.splat(logit.one() - max)));
    T::of((lanes[0] * inverse * more - 1.0) * scale)
} }
