//! The router: scores of experts, the best of them, and their weights.

use crate::math::{exp, ln, sigmoid};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, Simd, kernel};
use crate::storage::{Element, Storage};

/// What the gates are of the router's logits.
///
/// Scores are the softmax over all experts, or a sigmoid of each. The `top_k` best by score plus bias are chosen, among
/// those of the best `top_groups` of `groups` equal runs of experts if there are groups; a group is as good as its two
/// best together (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, and its published code). A gate is the score without the bias,
/// divided by the sum over the chosen if `renormalise`, times `scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// Experts of a token.
    pub top_k: usize,
    /// Sigmoid instead of softmax.
    pub sigmoid: bool,
    /// Gates of a token add up to `scale`.
    pub renormalise: bool,
    /// Factor of all gates.
    pub scale: f32,
    /// Equal runs of experts; 1 without.
    pub groups: usize,
    /// Of these many groups experts are chosen.
    pub top_groups: usize,
    /// What the load-balancing loss of one sequence is multiplied by; 0 without. See [`route_dx`].
    pub balance: f32,
    /// What the square of a token's log-sum-exp is multiplied by; 0 without.
    pub z: f32,
}

/// Keeps the sum of renormalised sigmoids away from 0, as DeepSeek-V3's published code does.
const TINY: f32 = 1e-20;

/// Floats of workspace for [`route`].
pub fn route_workspace_len(experts: usize, threads: usize) -> usize {
    2 * experts.next_multiple_of(LANES) * threads
}

/// Chooses experts for `n` rows of `experts` logits that fall into `leaves` equal runs (sequences).
///
/// `gates` is `[n, top_k]`, best first. `index` is `[n, 2 top_k]`: where each copy lies when all copies are in the order
/// of (expert, row), then its expert. `counts` is `[experts, leaves]`: how many copies of a run go to an expert. Of
/// experts that are equally good the first is taken; logits that are not numbers are worst.
pub fn route<T: Storage>(
    pool: &Pool,
    logits: &[T],
    bias: Option<&[f32]>,
    r: &Router,
    (gates, index, counts): (&mut [f32], &mut [u32], &mut [u32]),
    (n, experts, leaves): (usize, usize, usize),
    ws: &mut [f32],
) {
    let k = r.top_k;
    assert_eq!((logits.len(), gates.len(), index.len()), (n * experts, n * k, 2 * n * k));
    assert_eq!(counts.len(), experts * leaves);
    assert!(k <= experts && n.is_multiple_of(leaves) && experts.is_multiple_of(r.groups));
    let room = experts.next_multiple_of(LANES);
    assert!(ws.len() >= 2 * room * pool.threads(), "workspace");
    let (gate_parts, index_parts, scratch) = (Parts::new(gates), Parts::new(index), Parts::new(ws));
    pool.rows(n, 8 * experts, &|rows, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(2 * room * thread..2 * room * (thread + 1)) };
        let (scores, rank) = own.split_at_mut(room);
        for row in rows {
            score(&logits[row * experts..(row + 1) * experts], r.sigmoid, scores);
            // SAFETY: tasks have disjoint rows.
            let (gates, index) = unsafe {
                (gate_parts.part(row * k..(row + 1) * k), index_parts.part(2 * row * k..2 * (row + 1) * k))
            };
            let chosen = &mut index[k..];
            choose(r, &scores[..experts], bias, &mut rank[..experts], chosen);
            for (gate, e) in gates.iter_mut().zip(chosen) {
                *gate = scores[*e as usize];
            }
            let sum = if r.renormalise { gates.iter().sum::<f32>() + TINY } else { 1.0 };
            gates.iter_mut().for_each(|g| *g = *g / sum * r.scale);
        }
    });
    places(k, index, counts, (n, leaves));
}

/// Gives every copy its place in the order of (expert, row) and counts the copies of each expert and run.
fn places(k: usize, index: &mut [u32], counts: &mut [u32], (n, leaves): (usize, usize)) {
    counts.fill(0);
    let of_leaf = n / leaves;
    for (row, index) in index.chunks_exact(2 * k).enumerate() {
        index[k..].iter().for_each(|e| counts[*e as usize * leaves + row / of_leaf] += 1);
    }
    // Counts become first places, which every copy moves on by one; in the end they are those of the next run.
    let mut at = 0;
    for count in counts.iter_mut() {
        (*count, at) = (at, at + *count);
    }
    for (row, index) in index.chunks_exact_mut(2 * k).enumerate() {
        let (place, chosen) = index.split_at_mut(k);
        for (place, e) in place.iter_mut().zip(chosen) {
            let next = &mut counts[*e as usize * leaves + row / of_leaf];
            *place = *next;
            *next += 1;
        }
    }
    let mut before = 0;
    for count in counts.iter_mut() {
        (*count, before) = (*count - before, *count);
    }
}

/// The best experts by score and bias, best first.
fn choose(r: &Router, scores: &[f32], bias: Option<&[f32]>, rank: &mut [f32], chosen: &mut [u32]) {
    rank.copy_from_slice(scores);
    if let Some(bias) = bias {
        rank.iter_mut().zip(bias).for_each(|(rank, bias)| *rank += bias);
    }
    // What is no number is worst.
    rank.iter_mut().filter(|r| r.is_nan()).for_each(|r| *r = f32::NEG_INFINITY);
    if r.groups > 1 {
        leave_groups(r, rank);
    }
    for j in 0..chosen.len() {
        let mut best = (f32::NEG_INFINITY, None);
        for (e, &rank) in rank.iter().enumerate() {
            if rank > best.0 {
                best = (rank, Some(e as u32));
            }
        }
        let e = best.1.unwrap_or_else(|| {
            let free = (0..).find(|e| !chosen[..j].contains(e));
            free.unwrap_or_default()
        });
        chosen[j] = e;
        rank[e as usize] = f32::NEG_INFINITY;
    }
}

/// Puts all experts of all but the best groups behind the rest.
fn leave_groups(r: &Router, rank: &mut [f32]) {
    let size = rank.len() / r.groups;
    let good = |group: &[f32]| {
        let mut best = [f32::NEG_INFINITY; 2];
        for &x in group {
            if x > best[0] {
                best = [x, best[0]];
            } else if x > best[1] {
                best[1] = x;
            }
        }
        if size == 1 { best[0] } else { best[0] + best[1] }
    };
    // How many groups are better, earlier ones first among equals; found before any is left out.
    let mut left_out = [0u64; MAX_GROUPS / 64];
    for g in 0..r.groups {
        let mine = good(&rank[g * size..(g + 1) * size]);
        let better = (0..r.groups)
            .filter(|&o| {
                let other = good(&rank[o * size..(o + 1) * size]);
                other > mine || other == mine && o < g
            })
            .count();
        if better >= r.top_groups {
            left_out[g / 64] |= 1 << (g % 64);
        }
    }
    for g in (0..r.groups).filter(|g| left_out[g / 64] >> (g % 64) & 1 == 1) {
        rank[g * size..(g + 1) * size].fill(f32::NEG_INFINITY);
    }
}

/// The most groups of experts.
const MAX_GROUPS: usize = 1024;

kernel! { fn score[T: Element](logits: &[T], sigmoids: bool, scores: &mut [f32]) = |s: S| {
    scores_of(s, logits, sigmoids, scores);
} }

/// Scores of one row, and the logarithm of the sum of exponentials of its logits where scores are a softmax.
#[inline(always)]
fn scores_of<S: Simd, T: Element>(s: S, logits: &[T], sigmoids: bool, scores: &mut [f32]) -> f32 {
    let v = logits.len();
    if sigmoids {
        for j in (0..v).step_by(LANES) {
            s.store(&mut scores[j..j + LANES], sigmoid(s, T::get(s, &logits[j..])));
        }
        return 0.0;
    }
    let inside = |j: usize, x: S::V, rest: f32| {
        if v - j < LANES { s.less(s.iota(), s.splat((v - j) as f32), x, s.splat(rest)) } else { x }
    };
    let mut max = s.splat(f32::NEG_INFINITY);
    for j in (0..v).step_by(LANES) {
        max = s.max(inside(j, T::get(s, &logits[j..]), f32::NEG_INFINITY), max);
    }
    let greatest = s.greatest(max);
    let max = s.splat(greatest);
    let mut sum = s.splat(0.0);
    for j in (0..v).step_by(LANES) {
        let e = inside(j, exp(s, s.sub(T::get(s, &logits[j..]), max)), 0.0);
        s.store(&mut scores[j..j + LANES], e);
        sum = s.add(sum, e);
    }
    let sum = s.sum(sum);
    let whole = s.splat(sum);
    for j in (0..v).step_by(LANES) {
        let e = s.load(&scores[j..j + LANES]);
        s.store(&mut scores[j..j + LANES], s.div(e, whole));
    }
    greatest + ln(sum)
}

/// Floats of workspace for [`route_dx`].
pub fn route_dx_workspace_len(experts: usize, threads: usize) -> usize {
    2 * experts.next_multiple_of(LANES) * threads
}

/// The gradient of the logits: through the gates, and of two losses of the router's own.
///
/// - `balance` times the sum over experts of f P, for each run of rows: f the run's copies of an expert as a multiple of
///   an even share, P the mean over its rows of the scores, sigmoids divided by their sum (DeepSeek-V3, section 2.1.2,
///   "complementary sequence-wise auxiliary loss"; for softmax scores that is Fedus et al. 2021, arXiv 2101.03961,
///   section 2.2, over one sequence). The choice has no gradient.
/// - `z` times the square of the logarithm of the sum of exponentials of each row (Zoph et al. 2022, arXiv 2202.08906,
///   section 3.2).
pub fn route_dx<T: Storage>(
    pool: &Pool,
    dgates: &[f32],
    logits: &[T],
    index: &[u32],
    counts: &[u32],
    r: &Router,
    dlogits: &mut [T],
    (n, experts, leaves): (usize, usize, usize),
    ws: &mut [f32],
) {
    let k = r.top_k;
    assert_eq!((dgates.len(), index.len(), counts.len()), (n * k, 2 * n * k, experts * leaves));
    assert_eq!((logits.len(), dlogits.len()), (n * experts, n * experts));
    let (room, of_leaf) = (experts.next_multiple_of(LANES), n / leaves);
    assert!(ws.len() >= 2 * room * pool.threads(), "workspace");
    let (out, scratch) = (Parts::new(dlogits), Parts::new(ws));
    pool.rows(n, 8 * experts, &|rows, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(2 * room * thread..2 * room * (thread + 1)) };
        let (scores, slope) = own.split_at_mut(room);
        for row in rows {
            let logits = &logits[row * experts..(row + 1) * experts];
            let lse = score_with_lse(logits, r.sigmoid, scores);
            let slope = &mut slope[..experts];
            let chosen = &index[(2 * row + 1) * k..2 * (row + 1) * k];
            slopes(r, scores, chosen, &dgates[row * k..(row + 1) * k], slope);
            through_scores(r.sigmoid, &scores[..experts], slope);
            if r.balance != 0.0 {
                let share = r.balance * experts as f32 / (k * of_leaf) as f32 / of_leaf as f32;
                let of = |e: usize| share * counts[e * leaves + row / of_leaf] as f32;
                add_balance(r.sigmoid, &scores[..experts], of, slope);
            }
            if r.z != 0.0 {
                // Sigmoids say nothing of the sum of exponentials; they are used up.
                let lse = if r.sigmoid { score_with_lse(logits, false, scores) } else { lse };
                slope.iter_mut().zip(&*scores).for_each(|(d, p)| *d += 2.0 * r.z * lse * p);
            }
            // SAFETY: tasks have disjoint rows.
            let out = unsafe { out.part(row * experts..(row + 1) * experts) };
            out.iter_mut().zip(slope).for_each(|(out, x)| *out = T::of(*x));
        }
    });
}

kernel! { fn score_with_lse[T: Element](logits: &[T], sigmoids: bool, scores: &mut [f32]) -> f32 = |s: S| {
    scores_of(s, logits, sigmoids, scores)
} }

/// Gradients of the scores, 0 but for those of the chosen.
fn slopes(r: &Router, scores: &[f32], chosen: &[u32], dgates: &[f32], slope: &mut [f32]) {
    slope.fill(0.0);
    let of = |e: &u32| scores[*e as usize];
    let (sum, mean) = if r.renormalise {
        let sum = chosen.iter().map(of).sum::<f32>() + TINY;
        (sum, chosen.iter().zip(dgates).map(|(e, d)| d * of(e)).sum::<f32>() / sum)
    } else {
        (1.0, 0.0)
    };
    for (e, d) in chosen.iter().zip(dgates) {
        slope[*e as usize] = (d - mean) / sum * r.scale;
    }
}

/// From gradients of scores to those of logits.
fn through_scores(sigmoids: bool, scores: &[f32], slope: &mut [f32]) {
    if sigmoids {
        slope.iter_mut().zip(scores).for_each(|(d, p)| *d *= p * (1.0 - p));
        return;
    }
    let mean: f32 = slope.iter().zip(scores).map(|(d, p)| d * p).sum();
    slope.iter_mut().zip(scores).for_each(|(d, p)| *d = p * (*d - mean));
}

fn add_balance(sigmoids: bool, scores: &[f32], of: impl Fn(usize) -> f32, slope: &mut [f32]) {
    let whole = if sigmoids { scores.iter().sum::<f32>() + TINY } else { 1.0 };
    let mean = scores.iter().enumerate().map(|(e, p)| of(e) * p).sum::<f32>() / whole;
    for (e, (d, p)) in slope.iter_mut().zip(scores).enumerate() {
        let inner = if sigmoids { p * (1.0 - p) / whole } else { *p };
        *d += inner * (of(e) - mean);
    }
}
