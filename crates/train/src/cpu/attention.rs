//! Kernels of attention: at once, on a ring of ranks, and against a cache.

use kernels::{Pool, Sight, Softmax};
use program::OpKind;

use super::args::Args;
use super::table::{Number, not_mine};
use crate::launch::Part;
use crate::workspace::attention_shape;

pub(super) fn attention<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let (seq, qkv, ws) = (a.launch().sequence(), a.input(0), a.workspace());
    let n = a.shape(0).0 / seq;
    match *a.launch().kind() {
        OpKind::Attention { heads } => {
            kernels::attention(pool, &attention_shape(heads, n, seq), qkv, a.out(0), a.out_floats(1), ws);
        }
        OpKind::AttentionGrad { heads } => {
            let (o, lse, dy, dqkv) = (a.input(1), a.floats(2), a.input(3), a.out(0));
            kernels::attention_dx(pool, &attention_shape(heads, n, seq), qkv, o, lse, dy, dqkv, ws);
        }
        _ => not_mine!(a),
    }
}

/// What a rank of a ring does between two messages.
pub(super) fn ring_attention<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    match *a.launch().kind() {
        OpKind::RingAttention { .. } => ring_forward(pool, a),
        OpKind::RingAttentionGrad { .. } => ring_backward(pool, a),
        _ => not_mine!(a),
    }
}

fn ring_forward<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::RingAttention { heads, .. } = *a.launch().kind() else { not_mine!(a) };
    let (seq, qkv) = (a.launch().sequence(), a.input(0));
    let shape = attention_shape(heads, a.shape(0).0 / seq, seq);
    let keys = a.out(2);
    let half = keys.len() / 2;
    let mut softmax = Softmax { sums: a.out_floats(3), max: a.out_floats(1), total: a.out_floats(4) };
    match a.launch().turn.part {
        Part::Begin => kernels::pack_kv(pool, &shape, qkv, &mut keys[..half]),
        Part::Hop(hop) => {
            let kv = &keys[hop % 2 * half..][..half];
            let (sight, ws) = (sight(a, hop), a.workspace());
            kernels::attention_part(pool, &shape, qkv, kv, sight, hop == 0, &mut softmax, ws);
        }
        Part::End => kernels::attention_parts(pool, &shape, &mut softmax, a.out(0)),
        Part::Whole | Part::Join(_) => not_mine!(a),
    }
}

fn ring_backward<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::RingAttentionGrad { heads, .. } = *a.launch().kind() else { not_mine!(a) };
    let (seq, qkv) = (a.launch().sequence(), a.input(0));
    let shape = attention_shape(heads, a.shape(0).0 / seq, seq);
    let (keys, dq) = (a.out(1), a.out_floats(2));
    let half = keys.len() / 2;
    // Two parts come and go, the last is this rank's own.
    let (walking, own) = a.out_floats(3).split_at_mut(2 * half);
    match a.launch().turn.part {
        Part::Begin => kernels::pack_kv(pool, &shape, qkv, &mut keys[..half]),
        Part::Hop(hop) => {
            let kv = &keys[hop % 2 * half..][..half];
            // The first to add is the one that they belong to.
            let dkv = if hop == 0 { &mut walking[..half] } else { own };
            let (out, ws) = ((a.input(1), a.floats(2), a.input(3)), a.workspace());
            let sight = sight(a, hop);
            kernels::attention_part_dx(pool, &shape, (qkv, kv), out, sight, hop == 0, (dq, dkv), ws);
        }
        Part::Join(hop) => kernels::add_to(pool, own, &mut walking[hop % 2 * half..][..half]),
        Part::End => {
            let home = &walking[a.launch().ring().1 % 2 * half..][..half];
            kernels::attention_parts_dx(pool, &shape, dq, home, a.out(0));
        }
        Part::Whole => not_mine!(a),
    }
}

/// Which keys the queries of this rank see of those that have made so many hops.
fn sight<T: Number>(a: &Args<'_, T>, hop: usize) -> Sight {
    let (me, ranks) = a.launch().ring();
    Sight::of(me, (me + ranks - hop) % ranks)
}

/// Appends the token's keys and values to the layer's cache and attends over all of it so far.
pub(super) fn attention_cached<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::AttentionCached { heads: h, .. } = *a.launch().kind() else { not_mine!(a) };
    let (position, capacity) = (a.launch().turn.position, a.launch().output(1).rows);
    let (qkv, keys, values) = (a.input(0), a.out(1), a.out(2));
    let (q_width, width, value_width) = (h.q * h.dim, h.kv * h.dim, h.kv * h.value_dim);
    keys[position * width..][..width].copy_from_slice(&qkv[q_width..][..width]);
    values[position * value_width..][..value_width].copy_from_slice(&qkv[q_width + width..][..value_width]);
    kernels::attention_decode(
        pool,
        &qkv[..q_width],
        q_width,
        keys,
        values,
        &[position + 1],
        a.out(0),
        capacity,
        h.q,
        h.kv,
        h.dim,
        attention_shape(h, 1, 1).scale,
        a.workspace(),
    );
}
