//! Attention of one token over a cache of latents, for generation: keys and values are never made. A query is taken into
//! the space of latents instead, and what it finds there out of it again (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

use crate::attention::{KEYS, Sees, softmax_of};
use crate::gemm::Workspace;
use crate::latent::{LatentHeads, rotate_pairs};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// The tokens so far: `latents` `[capacity, rank]` and the parts of keys that heads share, rotated, `[capacity, rope]`; of
/// both the last of `len` rows is this token's.
#[derive(Clone, Copy, Debug)]
pub struct LatentCache<'a, T> {
    /// Normed latents of keys and values.
    pub latents: &'a [T],
    /// Rotated shared parts of keys.
    pub shared: &'a [T],
    /// Rows that are there.
    pub len: usize,
}

/// `o`, `[heads value]`, of the queries `q`, `[heads (nope + rope)]`, of a token whose position has the rows `cos` and `sin`.
/// `up`, `[heads (nope + value), rank]`, makes keys and values of latents. Of `sees` windows and sinks count.
pub fn latent_decode<T: Storage>(
    pool: &Pool,
    h: LatentHeads,
    q: &[T],
    cache: LatentCache<'_, T>,
    up: &[T],
    (cos, sin): (&[f32], &[f32]),
    sees: Sees<'_, T>,
    scale: f32,
    o: &mut [T],
    ws: &mut [f32],
) {
    let key = h.nope + h.rope;
    let rank = up.len() / (h.heads * (h.nope + h.value)).max(1);
    assert_eq!((q.len(), o.len()), (h.heads * key, h.heads * h.value), "queries and output");
    assert!(cache.len >= 1 && cache.len * rank <= cache.latents.len(), "latents");
    assert!(cache.len * h.rope <= cache.shared.len() && cos.len() == h.rope / 2, "shared keys");
    let len = cache.len.min(sees.window.unwrap_or(cache.len));
    let first = cache.len - len;
    let (latents, shared) = (&cache.latents[first * rank..], &cache.shared[first * h.rope..]);
    let lens = scratch_len(len, rank, h.rope);
    let own_len = lens.iter().sum::<usize>();
    let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
    let o = Parts::new(o);
    pool.run(h.heads, &|head, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        let (scores, rest) = own.split_at_mut(lens[0]);
        let (inner, rest) = rest.split_at_mut(lens[1]);
        let (sums, rest) = rest.split_at_mut(lens[2]);
        let rotated = &mut rest[..h.rope];
        let q = &q[head * key..(head + 1) * key];
        rotated.iter_mut().zip(&q[h.nope..]).for_each(|(to, q)| *to = q.one());
        rotate_pairs(rotated, cos, sin);
        let up = &up[head * (h.nope + h.value) * rank..][..(h.nope + h.value) * rank];
        let (keys, values) = up.split_at(h.nope * rank);
        let sink = sees.sinks.map(|s| s[head].one());
        // SAFETY: each task has its own head.
        let o = unsafe { o.part(head * h.value..(head + 1) * h.value) };
        let (scores, inner, sums) = (&mut scores[..len], &mut inner[..rank], &mut sums[..rank]);
        one_head(
            (&q[..h.nope], rotated),
            (keys, values),
            (latents, shared),
            scale,
            sink,
            scores,
            inner,
            sums,
            o,
        );
    });
}

/// Floats of workspace for [`latent_decode`] of up to `capacity` tokens.
pub fn latent_decode_workspace_len(capacity: usize, rank: usize, rope: usize, threads: usize) -> usize {
    Workspace::room(threads * scratch_len(capacity, rank, rope).iter().sum::<usize>())
}

fn scratch_len(capacity: usize, rank: usize, rope: usize) -> [usize; 4] {
    [capacity, rank, rank, rope].map(|len| len.next_multiple_of(LANES))
}

kernel! { fn one_head[T: Element](
    q: (&[T], &[f32]), up: (&[T], &[T]), cache: (&[T], &[T]), scale: f32, sink: Option<f32>, scores: &mut [f32],
    inner: &mut [f32], sums: &mut [f32], o: &mut [T],
) = |s: S| {
    let ((plain, rotated), (keys, values), (latents, shared)) = (q, up, cache);
    let (rank, rope, len) = (inner.len(), rotated.len(), scores.len());
    inner.fill(0.0);
    for (q, row) in plain.iter().zip(keys.chunks_exact(rank)) {
        let q = s.splat(q.one());
        for j in (0..rank).step_by(LANES) {
            let sum = s.fma(q, T::get(s, &row[j..]), s.load(&inner[j..]));
            s.store(&mut inner[j..], sum);
        }
    }
    for (i, score) in scores.iter_mut().enumerate() {
        let (latent, key) = (&latents[i * rank..(i + 1) * rank], &shared[i * rope..(i + 1) * rope]);
        let mut dot = s.splat(0.0);
        for j in (0..rank).step_by(LANES) {
            dot = s.fma(s.load(&inner[j..]), T::get(s, &latent[j..]), dot);
        }
        for j in (0..rope).step_by(LANES) {
            dot = s.fma(s.load(&rotated[j..]), T::get(s, &key[j..]), dot);
        }
        *score = s.sum(dot) * scale;
    }
    let inverse = softmax_of(s, scores, sink);
    sums.fill(0.0);
    for first in (0..len).step_by(KEYS) {
        for i in first..len.min(first + KEYS) {
            let (p, latent) = (s.splat(scores[i] * inverse), &latents[i * rank..(i + 1) * rank]);
            for j in (0..rank).step_by(LANES) {
                let sum = s.fma(p, T::get(s, &latent[j..]), s.load(&sums[j..]));
                s.store(&mut sums[j..], sum);
            }
        }
    }
    for (o, row) in o.iter_mut().zip(values.chunks_exact(rank)) {
        let mut dot = s.splat(0.0);
        for j in (0..rank).step_by(LANES) {
            dot = s.fma(s.load(&sums[j..]), T::get(s, &row[j..]), dot);
        }
        *o = T::of(s.sum(dot));
    }
} }
