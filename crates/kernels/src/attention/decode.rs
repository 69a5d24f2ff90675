//! Attention of single queries over a cache of keys and values, for generation.

use super::{KEYS, Sees};
use crate::gemm::Workspace;
use crate::math::exp;
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, Simd, kernel};
use crate::storage::{Element, Storage};

/// One query row per sequence over those of its cached keys and values that it `sees`, of which only windows and sinks
/// count.
///
/// `q` is `[seqs, heads * head_dim]`, with rows `q_ld` apart (so that packed qkv rows will do), and `o` `[seqs, heads *
/// value_dim]`; the caches are `[seqs, capacity, kv_heads * head_dim]` and `[seqs, capacity, kv_heads * value_dim]`, of
/// which sequence i has `lens[i]` rows, at least 1.
pub fn attention_decode<T: Storage>(
    pool: &Pool,
    q: &[T],
    q_ld: usize,
    keys: &[T],
    values: &[T],
    lens: &[usize],
    sees: Sees<'_, T>,
    o: &mut [T],
    capacity: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    ws: &mut [f32],
) {
    let (seqs, ld) = (lens.len(), kv_heads * head_dim);
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads), "heads do not divide into groups");
    let value_dim = o.len() / (seqs * heads).max(1);
    let values_ld = kv_heads * value_dim;
    assert_eq!((keys.len(), values.len()), (seqs * capacity * ld, seqs * capacity * values_ld), "caches");
    assert!(q_ld >= heads * head_dim && q.len() + q_ld >= seqs * q_ld + heads * head_dim, "queries");
    assert_eq!(o.len(), seqs * heads * value_dim, "output");
    assert!(lens.iter().all(|&len| len >= 1 && len <= capacity), "cache lengths");
    let own_len = scratch_len(capacity, value_dim);
    let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
    let o = Parts::new(o);
    pool.run(seqs * heads, &|task, thread| {
        let (sequence, head) = (task / heads, task % heads);
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        let (scores, sums) = own.split_at_mut(capacity.next_multiple_of(LANES));
        let len = lens[sequence].min(sees.window.unwrap_or(capacity));
        let (rows, kv_head) = (sequence * capacity + lens[sequence] - len, head / (heads / kv_heads));
        let (k, v) = (rows * ld + kv_head * head_dim, rows * values_ld + kv_head * value_dim);
        let q = &q[sequence * q_ld + head * head_dim..][..head_dim];
        // SAFETY: each task has its own head of its own row.
        let o = unsafe { o.part(task * value_dim..(task + 1) * value_dim) };
        let sink = sees.sinks.map(|s| s[head].one());
        let scores = &mut scores[..len];
        one_query(q, (&keys[k..], ld), (&values[v..], values_ld), scale, sink, scores, sums, o);
    });
}

/// Floats of workspace for [`attention_decode`].
pub fn attention_decode_workspace_len(capacity: usize, value_dim: usize, threads: usize) -> usize {
    Workspace::room(threads * scratch_len(capacity, value_dim))
}

fn scratch_len(capacity: usize, value_dim: usize) -> usize {
    capacity.next_multiple_of(LANES) + value_dim.next_multiple_of(LANES)
}

kernel! { fn one_query[T: Element](
    q: &[T], k: (&[T], usize), v: (&[T], usize), scale: f32, sink: Option<f32>, scores: &mut [f32], sums: &mut [f32],
    o: &mut [T]
) = |s: S| {
    let ((keys, ld), (values, values_ld), h) = (k, v, q.len());
    for (i, score) in scores.iter_mut().enumerate() {
        let key = &keys[i * ld..i * ld + h];
        let mut dot = s.splat(0.0);
        for j in (0..h).step_by(LANES) {
            dot = s.fma(T::get(s, &q[j..]), T::get(s, &key[j..]), dot);
        }
        *score = s.sum(dot) * scale;
    }
    let inverse = s.splat(softmax_of(s, scores, sink));
    let len = scores.len();
    let h = o.len();
    let sums = &mut sums[..h];
    sums.fill(0.0);
    // Blocks of keys keep the sums' rows in cache with long caches of wide heads.
    for first in (0..len).step_by(KEYS) {
        for i in first..len.min(first + KEYS) {
            let (p, value) = (s.splat(scores[i]), &values[i * values_ld..i * values_ld + h]);
            for j in (0..h).step_by(LANES) {
                let sum = s.fma(p, T::get(s, &value[j..]), s.load(&sums[j..]));
                s.store(&mut sums[j..], sum);
            }
        }
    }
    for j in (0..h).step_by(LANES) {
        T::put(s, &mut o[j..], s.mul(s.load(&sums[j..]), inverse));
    }
} }

/// Turns scores into exponentials over the greatest of them; gives the inverse of their sum, with the sink's.
#[inline(always)]
pub(crate) fn softmax_of<S: Simd>(s: S, scores: &mut [f32], sink: Option<f32>) -> f32 {
    let mut max = sink.unwrap_or(f32::NEG_INFINITY);
    for score in scores.iter() {
        max = if *score > max { *score } else { max };
    }
    // One lane of it is the sink's.
    let of_sink = exp(s, s.splat(sink.unwrap_or(f32::NEG_INFINITY) - max));
    let mut total = s.less(s.iota(), s.splat(1.0), of_sink, s.splat(0.0));
    let len = scores.len();
    for j in (0..len).step_by(LANES) {
        let mut x = s.sub(s.load(&scores[j..]), s.splat(max));
        if len - j < LANES {
            x = s.less(s.iota(), s.splat((len - j) as f32), x, s.splat(f32::NEG_INFINITY));
        }
        let p = exp(s, x);
        total = s.add(total, p);
        s.store(&mut scores[j..], p);
    }
    1.0 / s.sum(total)
}
