//! Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) around its products: norms of the latents, and packing
//! of queries, keys and values with the rotated part that keys share.

use crate::linear::{column_sums, column_sums_workspace_len};
use crate::norm::{rms_row, rms_row_dx};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Acc, Element, Storage};
use crate::tree::Merge;

/// Widths of the compressed projections of a row, one behind the other: the latent of the queries, that of keys and values,
/// and the part of the keys that all heads share.
#[derive(Clone, Copy, Debug)]
pub struct Latents {
    /// 0 where queries have none.
    pub queries: usize,
    /// Of keys and values.
    pub kv: usize,
    /// Shared part.
    pub shared: usize,
}

impl Latents {
    fn cols(self) -> usize {
        self.queries + self.kv + self.shared
    }

    /// Norms of a row: of keys and values, then of queries.
    fn norms(self) -> usize {
        1 + usize::from(self.queries > 0)
    }
}

/// Takes the projections `c`, `[n, queries + kv + shared]`, apart and norms the latents by root mean square with weights
/// `wkv` and `wq` (empty without a latent of queries): into `latent`, `queries` and `shared`; keeps `rstd`, `[n, norms]`.
pub fn latent_norm<T: Storage>(
    pool: &Pool,
    l: Latents,
    c: &[T],
    (wkv, wq): (&[T], &[T]),
    (latent, shared, queries): (&mut [T], &mut [T], &mut [T]),
    rstd: &mut [f32],
    eps: f32,
) {
    let (cols, norms) = (l.cols(), l.norms());
    let n = c.len() / cols;
    assert_eq!((c.len(), wkv.len(), wq.len()), (n * cols, l.kv, l.queries), "projections and weights");
    assert_eq!((latent.len(), shared.len(), queries.len()), (n * l.kv, n * l.shared, n * l.queries), "parts");
    assert_eq!(rstd.len(), n * norms);
    let (latent, shared, queries, rstd) =
        (Parts::new(latent), Parts::new(shared), Parts::new(queries), Parts::new(rstd));
    pool.rows(n, cols, &|rows, _| {
        for row in rows {
            let (q, rest) = c[row * cols..(row + 1) * cols].split_at(l.queries);
            let (kv, key) = rest.split_at(l.kv);
            // SAFETY: tasks have disjoint rows.
            let (latent, shared, queries, rstd) = unsafe {
                (
                    latent.part(row * l.kv..(row + 1) * l.kv),
                    shared.part(row * l.shared..(row + 1) * l.shared),
                    queries.part(row * l.queries..(row + 1) * l.queries),
                    rstd.part(row * norms..(row + 1) * norms),
                )
            };
            norm_row(kv, wkv, latent, &mut rstd[0], eps);
            if l.queries > 0 {
                norm_row(q, wq, queries, &mut rstd[1], eps);
            }
            shared.copy_from_slice(key);
        }
    });
}

kernel! { fn norm_row[T: Element](x: &[T], w: &[T], y: &mut [T], rstd: &mut f32, eps: f32) = |s: S| {
    *rstd = rms_row(s, x, w, y, eps);
} }

/// The gradient of [`latent_norm`]'s projections.
pub fn latent_norm_dx<T: Storage>(
    pool: &Pool,
    l: Latents,
    (dlatent, dshared, dqueries): (&[T], &[T], &[T]),
    c: &[T],
    (wkv, wq): (&[T], &[T]),
    rstd: &[f32],
    dc: &mut [T],
) {
    let (cols, norms) = (l.cols(), l.norms());
    let n = c.len() / cols;
    assert_eq!((c.len(), dc.len(), rstd.len()), (n * cols, n * cols, n * norms), "projections");
    assert_eq!((wkv.len(), wq.len()), (l.kv, l.queries), "weights");
    let parts = (dlatent.len(), dshared.len(), dqueries.len());
    assert_eq!(parts, (n * l.kv, n * l.shared, n * l.queries), "parts");
    let dc = Parts::new(dc);
    pool.rows(n, cols, &|rows, _| {
        for row in rows {
            let (q, rest) = c[row * cols..(row + 1) * cols].split_at(l.queries);
            // SAFETY: tasks have disjoint rows.
            let (dq, drest) = unsafe { dc.part(row * cols..(row + 1) * cols) }.split_at_mut(l.queries);
            let (dkv, dkey) = drest.split_at_mut(l.kv);
            let rstd = &rstd[row * norms..(row + 1) * norms];
            norm_row_dx(&dlatent[row * l.kv..(row + 1) * l.kv], &rest[..l.kv], wkv, rstd[0], dkv);
            if l.queries > 0 {
                norm_row_dx(&dqueries[row * l.queries..(row + 1) * l.queries], q, wq, rstd[1], dq);
            }
            dkey.copy_from_slice(&dshared[row * l.shared..(row + 1) * l.shared]);
        }
    });
}

kernel! { fn norm_row_dx[T: Element](dy: &[T], x: &[T], w: &[T], rstd: f32, dx: &mut [T]) = |s: S| {
    rms_row_dx(s, dy, x, w, rstd, Acc::None, dx);
} }

/// The gradients of [`latent_norm`]'s weights into the levels of `grads`, of `wkv` and `wq`; order as for
/// [`crate::linear_dw`].
pub fn latent_norm_dw<T: Storage>(
    pool: &Pool,
    l: Latents,
    (dlatent, dqueries): (&[T], &[T]),
    c: &[T],
    rstd: &[f32],
    (dwkv, dwq): (&mut [f32], &mut [f32]),
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    let (cols, norms) = (l.cols(), l.norms());
    let n = c.len() / cols;
    assert_eq!((c.len(), rstd.len()), (n * cols, n * norms), "projections");
    assert_eq!((dlatent.len(), dqueries.len()), (n * l.kv, n * l.queries), "parts");
    column_sums(pool, n, l.kv, dwkv, tree, m, ws, &|rows, of, sums| {
        let x = (&c[l.queries..], cols);
        add_normed((dlatent, l.kv), x, (rstd, norms), rows, of, sums);
    });
    if l.queries > 0 {
        column_sums(pool, n, l.queries, dwq, tree, m, ws, &|rows, of, sums| {
            add_normed((dqueries, l.queries), (c, cols), (&rstd[1..], norms), rows, of, sums);
        });
    }
}

/// Floats of workspace for [`latent_norm_dw`].
pub fn latent_norm_dw_workspace_len(l: Latents, tree: &[u32]) -> usize {
    column_sums_workspace_len(l.kv.max(l.queries), tree)
}

kernel! { fn add_normed[T: Element](
    dy: (&[T], usize), x: (&[T], usize), rstd: (&[f32], usize),
    rows: std::ops::Range<usize>, cols: std::ops::Range<usize>, sums: &mut [f32],
) = |s: S| {
    for row in rows {
        let r = s.splat(rstd.0[row * rstd.1]);
        let dy = &dy.0[row * dy.1 + cols.start..row * dy.1 + cols.end];
        let x = &x.0[row * x.1 + cols.start..row * x.1 + cols.end];
        for j in (0..dy.len()).step_by(LANES) {
            let sum = s.fma(T::get(s, &dy[j..]), s.mul(T::get(s, &x[j..]), r), s.load(&sums[j..]));
            s.store(&mut sums[j..], sum);
        }
    }
} }

/// Heads of latent attention: a query and a key are `nope` dims and `rope` rotated ones.
#[derive(Clone, Copy, Debug)]
pub struct LatentHeads {
    /// How many.
    pub heads: usize,
    /// Dims that are not rotated.
    pub nope: usize,
    /// Rotated dims; of the keys all heads share them.
    pub rope: usize,
    /// Dims of a value.
    pub value: usize,
}

impl LatentHeads {
    fn key(self) -> usize {
        self.nope + self.rope
    }

    /// Row lengths of queries, of keys and values, and of all packed.
    fn cols(self) -> (usize, usize, usize) {
        let (q, kv) = (self.heads * self.key(), self.heads * (self.nope + self.value));
        (q, kv, 2 * q + self.heads * self.value)
    }

    fn check(self, len: (usize, usize, usize), shared: usize, tables: (&[f32], &[f32]), seq: usize) -> usize {
        let (q, kv, packed) = self.cols();
        let n = len.0 / q;
        assert_eq!(len, (n * q, n * kv, n * packed), "queries, keys and values");
        assert!(shared == n * self.rope && self.rope.is_multiple_of(2), "shared keys");
        let positions = seq.min(n) * self.rope / 2;
        assert!(tables.0.len() >= positions && tables.1.len() >= positions, "tables");
        n
    }
}

/// Packs queries `[n, heads (nope + rope)]`, keys and values `[n, heads (nope + value)]` and the shared part of keys
/// `[n, rope]` into rows of qkv, rotated by the tables' row `i % seq`: dims 2j and 2j + 1 are a pair.
pub fn latent_rope<T: Storage>(
    pool: &Pool,
    h: LatentHeads,
    (q, kv, shared): (&[T], &[T], &[T]),
    (cos, sin): (&[f32], &[f32]),
    qkv: &mut [T],
    seq: usize,
) {
    let n = h.check((q.len(), kv.len(), qkv.len()), shared.len(), (cos, sin), seq);
    let ((q_cols, kv_cols, packed), key, half) = (h.cols(), h.key(), h.rope / 2);
    let qkv = Parts::new(qkv);
    pool.rows(n, packed, &|rows, _| {
        for row in rows {
            // SAFETY: tasks have disjoint rows.
            let out = unsafe { qkv.part(row * packed..(row + 1) * packed) };
            let (queries, rest) = out.split_at_mut(q_cols);
            let (keys, values) = rest.split_at_mut(q_cols);
            let at = row % seq * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            queries.copy_from_slice(&q[row * q_cols..(row + 1) * q_cols]);
            queries.chunks_exact_mut(key).for_each(|q| rotate_pairs(&mut q[h.nope..], cos, sin));
            let kv = kv[row * kv_cols..(row + 1) * kv_cols].chunks_exact(h.nope + h.value);
            for ((kv, k), v) in kv.zip(keys.chunks_exact_mut(key)).zip(values.chunks_exact_mut(h.value)) {
                k[..h.nope].copy_from_slice(&kv[..h.nope]);
                v.copy_from_slice(&kv[h.nope..]);
            }
            let (first, others) = keys.split_at_mut(key);
            first[h.nope..].copy_from_slice(&shared[row * h.rope..(row + 1) * h.rope]);
            rotate_pairs(&mut first[h.nope..], cos, sin);
            others.chunks_exact_mut(key).for_each(|k| k[h.nope..].copy_from_slice(&first[h.nope..]));
        }
    });
}

/// The gradients of [`latent_rope`]'s inputs; the shared part's is the sum over heads, in their order.
pub fn latent_rope_dx<T: Storage>(
    pool: &Pool,
    h: LatentHeads,
    dqkv: &[T],
    (cos, sin): (&[f32], &[f32]),
    (dq, dkv, dshared): (&mut [T], &mut [T], &mut [T]),
    seq: usize,
) {
    let n = h.check((dq.len(), dkv.len(), dqkv.len()), dshared.len(), (cos, sin), seq);
    let ((q_cols, kv_cols, packed), key, half) = (h.cols(), h.key(), h.rope / 2);
    let (dq, dkv, dshared) = (Parts::new(dq), Parts::new(dkv), Parts::new(dshared));
    pool.rows(n, packed, &|rows, _| {
        for row in rows {
            let (queries, rest) = dqkv[row * packed..(row + 1) * packed].split_at(q_cols);
            let (keys, values) = rest.split_at(q_cols);
            // SAFETY: tasks have disjoint rows.
            let (dq, dkv, dshared) = unsafe {
                (
                    dq.part(row * q_cols..(row + 1) * q_cols),
                    dkv.part(row * kv_cols..(row + 1) * kv_cols),
                    dshared.part(row * h.rope..(row + 1) * h.rope),
                )
            };
            let at = row % seq * half;
            let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
            dq.copy_from_slice(queries);
            dq.chunks_exact_mut(key).for_each(|q| turn_back(&mut q[h.nope..], cos, sin));
            let heads = keys.chunks_exact(key).zip(values.chunks_exact(h.value));
            for ((k, v), to) in heads.zip(dkv.chunks_exact_mut(h.nope + h.value)) {
                to[..h.nope].copy_from_slice(&k[..h.nope]);
                to[h.nope..].copy_from_slice(v);
            }
            let sum = |j: usize| keys.chunks_exact(key).map(|k| k[h.nope + j].one()).sum::<f32>();
            for j in 0..half {
                let (a, b) = (sum(2 * j), sum(2 * j + 1));
                dshared[2 * j] = T::of(a * cos[j] + b * sin[j]);
                dshared[2 * j + 1] = T::of(b * cos[j] - a * sin[j]);
            }
        }
    });
}

/// Turns pairs of neighbours, dims 2j and 2j + 1, by the angles whose cosines and sines are given.
pub fn rotate_pairs<T: Element>(x: &mut [T], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b) = (pair[0].one(), pair[1].one());
        pair[0] = T::of(a * c - b * s);
        pair[1] = T::of(b * c + a * s);
    }
}

/// The other way.
fn turn_back<T: Element>(x: &mut [T], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
        let (a, b) = (pair[0].one(), pair[1].one());
        pair[0] = T::of(a * c + b * s);
        pair[1] = T::of(b * c - a * s);
    }
}
