//! Kernels of latent attention around its products.

use kernels::{LatentCache, LatentHeads, Latents, Pool};
use program::{Heads, OpKind};

use super::args::Args;
use super::attention::seen;
use super::table::{Number, not_mine};
use crate::workspace::attention_shape;

pub(super) fn latent_norm<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let (l, none) = (a.launch(), &[][..]);
    match *l.kind() {
        OpKind::LatentNorm { eps } => {
            let queries = l.outputs() > 3;
            let widths = (l.output(0).cols, l.output(1).cols, if queries { l.output(3).cols } else { 0 });
            let widths = Latents { kv: widths.0, shared: widths.1, queries: widths.2 };
            let parts = (a.out(0), a.out(1), if queries { a.out(3) } else { &mut [] });
            let weights = (a.input(1), a.optional(2).unwrap_or(none));
            kernels::latent_norm(pool, widths, a.input(0), weights, parts, a.out_floats(2), eps);
        }
        OpKind::LatentNormGradInput => {
            // With a latent of queries there is one gradient more in front, and its weight behind.
            let more = usize::from(l.inputs() > 5);
            let queries = if more > 0 { a.shape(2).1 } else { 0 };
            let widths = Latents { kv: a.shape(0).1, shared: a.shape(1).1, queries };
            let parts = (a.input(0), a.input(1), if more > 0 { a.input(2) } else { none });
            let weights = (a.input(3 + more), a.optional(5 + more).unwrap_or(none));
            let (c, rstd) = (a.input(2 + more), a.floats(4 + more));
            kernels::latent_norm_dx(pool, widths, parts, c, weights, rstd, a.out(0));
        }
        OpKind::LatentNormGradWeight => {
            let more = usize::from(l.inputs() > 3);
            let (kv, queries) = (a.shape(0).1, if more > 0 { a.shape(1).1 } else { 0 });
            let widths = Latents { kv, queries, shared: a.shape(1 + more).1 - kv - queries };
            let parts = (a.input(0), if more > 0 { a.input(1) } else { none });
            let (c, rstd, (dwkv, g)) = (a.input(1 + more), a.floats(2 + more), a.gradient(0));
            let dwq = if more > 0 { a.gradient(1).0 } else { &mut [] };
            let grads = (dwkv, dwq);
            kernels::latent_norm_dw(pool, widths, parts, c, rstd, grads, g.inner, g.merge, a.workspace());
        }
        _ => not_mine!(a),
    }
}

fn of(h: Heads, rope: usize) -> LatentHeads {
    LatentHeads { heads: h.q, nope: h.dim - rope, rope, value: h.value_dim }
}

/// Appends the token's latent and shared key part to the layer's cache and attends over all of it so far.
pub(super) fn latent_cached<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::LatentCached { heads, sees, rope_dim, .. } = *a.launch().kind() else { not_mine!(a) };
    let (position, tables) = (a.launch().turn.position, a.launch().inputs() - 2);
    let (latent, shared, latents, keys) = (a.input(1), a.input(2), a.out(1), a.out(2));
    let at = position * rope_dim / 2..(position + 1) * rope_dim / 2;
    let tables = (&a.floats(tables)[at.clone()], &a.floats(tables + 1)[at]);
    latents[position * latent.len()..][..latent.len()].copy_from_slice(latent);
    let key = &mut keys[position * rope_dim..][..rope_dim];
    key.copy_from_slice(shared);
    kernels::rotate_pairs(key, tables.0, tables.1);
    let cache = LatentCache { latents, shared: keys, len: position + 1 };
    let scale = attention_shape(heads, 1, 1).scale;
    let (h, sees) = (of(heads, rope_dim), seen(a, sees, 4));
    kernels::latent_decode(
        pool,
        h,
        a.input(0),
        cache,
        a.input(3),
        tables,
        sees,
        scale,
        a.out(0),
        a.workspace(),
    );
}

pub(super) fn latent_rope<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let seq = a.launch().sequence();
    match *a.launch().kind() {
        OpKind::LatentRope { heads, rope_dim } => {
            // One token of a generation has the tables' row of its position.
            let from = a.launch().turn.position * rope_dim / 2;
            let tables = (&a.floats(3)[from..], &a.floats(4)[from..]);
            let ins = (a.input(0), a.input(1), a.input(2));
            kernels::latent_rope(pool, of(heads, rope_dim), ins, tables, a.out(0), seq);
        }
        OpKind::LatentRopeGrad { heads, rope_dim } => {
            let (tables, outs) = ((a.floats(1), a.floats(2)), (a.out(0), a.out(1), a.out(2)));
            kernels::latent_rope_dx(pool, of(heads, rope_dim), a.input(0), tables, outs, seq);
        }
        _ => not_mine!(a),
    }
}
