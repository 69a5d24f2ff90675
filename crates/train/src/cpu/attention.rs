//! Kernels of attention: at once, on a ring of ranks, with heads dealt to ranks, and against a cache.

use std::ops::Range;

use half::bf16;
use kernels::{AttentionDropout, Pool, Sees, Sight, Softmax};
use program::{Heads, OpKind};
use spec::DType;

use super::args::Args;
use super::table::{Number, not_mine};
use crate::launch::Part;
use crate::workspace::attention_shape;

pub(super) fn attention<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let (seq, qkv, ws) = (a.launch().sequence(), a.input(0), a.workspace());
    let n = a.shape(0).0 / seq;
    match *a.launch().kind() {
        OpKind::Attention { heads, sees } => {
            let (shape, sees) = (attention_shape(heads, n, seq), seen(a, sees, 1));
            let maxima = (a.launch().outputs() > 2).then(|| a.out_floats(2));
            kernels::attention_maxima(pool, &shape, qkv, sees, a.out(0), a.out_floats(1), maxima, ws);
        }
        OpKind::AttentionGrad { heads, sees } => {
            let (shape, sees) = (attention_shape(heads, n, seq), seen(a, sees, 4));
            let (o, lse, dy, dqkv) = (a.input(1), a.floats(2), a.input(3), a.out(0));
            kernels::attention_dx(pool, &shape, qkv, sees, o, lse, dy, dqkv, ws);
        }
        OpKind::SinkGrad { heads } => {
            let (shape, (levels, g)) = (attention_shape(heads, n, seq), a.gradient(0));
            let of = (a.input(1), a.floats(2), a.input(0));
            let sinks = a.input(3);
            let own = own_heads(a, heads, sinks.len());
            kernels::attention_sinks_dw(pool, &shape, of, (sinks, own.start), levels, g.inner, g.merge, ws);
        }
        _ => not_mine!(a),
    }
}

/// What queries see, with the operands that say so: they follow `first` others. Sinks are no operand of a derivative.
pub(super) fn seen<'a, T: Number>(a: &Args<'a, T>, sees: program::Sees, first: usize) -> Sees<'a, T> {
    use OpKind::*;
    let starts = sees.documents.then(|| a.ids(first));
    let derivative = matches!(a.launch().kind(), AttentionGrad { .. } | RingAttentionGrad { .. });
    let sinks = (sees.sinks && !derivative).then(|| a.input(first + usize::from(sees.documents)));
    let sinks = sinks.map(|all| match *a.launch().kind() {
        Attention { heads, .. } => &all[own_heads(a, heads, all.len())],
        _ => all,
    });
    let dropout = sees.dropout.map(|drops| AttentionDropout {
        of: kernels::Dropout { key: drops.site ^ a.launch().turn.draws, rate: drops.rate },
        sequence: a.launch().place(0).0,
        head: drops.head0,
    });
    Sees { window: sees.window, starts, sinks, dropout }
}

/// Which of so many heads this rank's are: all, or a share of them where context-parallel ranks deal heads.
fn own_heads<T: Number>(a: &Args<'_, T>, heads: Heads, all: usize) -> Range<usize> {
    let (me, _) = a.launch().ring();
    let first = if all == heads.q { 0 } else { me * heads.q };
    first..first + heads.q
}

/// From rows of this rank with all heads to those that every context-parallel rank attends with, and back.
pub(super) fn deal_heads<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let seq = a.launch().sequence();
    match *a.launch().kind() {
        OpKind::SplitHeads { heads, ranks } => {
            let shape = attention_shape(heads, a.shape(0).0 / seq, seq);
            kernels::split_heads(pool, &shape, ranks, a.input(0), a.out(0));
        }
        OpKind::JoinHeads { heads, ranks } => {
            let shape = attention_shape(heads, a.shape(0).0 / (ranks * seq), seq);
            kernels::join_heads(pool, &shape, ranks, a.input(0), a.out(0));
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
    let OpKind::RingAttention { heads, sees, .. } = *a.launch().kind() else { not_mine!(a) };
    let (seq, qkv) = (a.launch().sequence(), a.input(0));
    let shape = attention_shape(heads, a.shape(0).0 / seq, seq);
    let keys = a.out(2);
    let half = keys.len() / 2;
    let mut softmax = Softmax { sums: a.out_floats(3), max: a.out_floats(1), total: a.out_floats(4) };
    match a.launch().turn.part {
        Part::Begin => kernels::pack_kv(pool, &shape, qkv, &mut keys[..half]),
        Part::Hop(hop) => {
            let kv = &keys[hop % 2 * half..][..half];
            let (sees, sight, ws) = (seen(a, sees, 1), sight(a, hop), a.workspace());
            kernels::attention_part(pool, &shape, qkv, kv, sees, sight, &mut softmax, ws);
        }
        Part::End => {
            if a.launch().outputs() > 5 {
                a.out_floats(5).copy_from_slice(softmax.max);
            }
            kernels::attention_parts(pool, &shape, &mut softmax, a.out(0));
        }
        Part::Whole | Part::Join(_) => not_mine!(a),
    }
}

fn ring_backward<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::RingAttentionGrad { heads, sees, .. } = *a.launch().kind() else { not_mine!(a) };
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
            let (sees, sight) = (seen(a, sees, 4), sight(a, hop));
            kernels::attention_part_dx(pool, &shape, (qkv, kv), out, sees, sight, (dq, dkv), ws);
        }
        Part::Join(hop) => kernels::add_to(pool, own, &mut walking[hop % 2 * half..][..half]),
        Part::End => {
            let home = &walking[a.launch().ring().1 % 2 * half..][..half];
            kernels::attention_parts_dx(pool, &shape, dq, home, a.out(0));
        }
        Part::Whole => not_mine!(a),
    }
}

/// Whose keys the queries of this rank meet after so many hops.
fn sight<T: Number>(a: &Args<'_, T>, hop: usize) -> Sight {
    let (me, ranks) = a.launch().ring();
    Sight::after(hop, me, ranks)
}

/// Appends the token's keys and values to the layer's cache and attends over all of it so far.
pub(super) fn attention_cached<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::AttentionCached { heads: h, sees, .. } = *a.launch().kind() else { not_mine!(a) };
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
        seen(a, sees, 1),
        a.out(0),
        capacity,
        h.q,
        h.kv,
        h.dim,
        attention_shape(h, 1, 1).scale,
        a.workspace(),
    );
}

/// The greatest scores of a step, and weights scaled by them.
pub(super) fn qk_clip<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    match *a.launch().kind() {
        OpKind::LogitMax { .. } => kernels::head_maxima(a.floats(0), a.launch().sequence(), a.out_doubles(0)),
        OpKind::QkClip { heads, makes, tau, .. } => {
            for of in makes.scaled(heads) {
                let factor = f64::from(tau) / greatest(a, of.heads);
                if factor < 1.0 {
                    scale_features(pool, a, of.rows, (if of.alone { factor } else { factor.sqrt() }) as f32);
                }
            }
        }
        _ => not_mine!(a),
    }
}

/// The greatest score of some heads over all ranks that have seen any.
fn greatest<T: Number>(a: &Args<'_, T>, heads: Range<usize>) -> f64 {
    let of_rank = |i: usize| a.doubles(i)[heads.clone()].iter().copied().fold(0.0, f64::max);
    (0..a.launch().inputs()).map(of_rank).fold(0.0, f64::max)
}

/// Scales those of some features' weights that this rank updates.
fn scale_features<T: Number>(pool: &Pool, a: &Args<'_, T>, features: Range<usize>, factor: f32) {
    let (first, width) = a.launch().features();
    let count = a.launch().output(0).len();
    let [start, end] = [features.start, features.end].map(|f| (f * width).saturating_sub(first).min(count));
    if a.launch().precision() == DType::F32 {
        kernels::scale(pool, factor, &mut a.out_floats(0)[start..end]);
        return;
    }
    let master = &mut a.out_floats(1)[start..end];
    kernels::scale(pool, factor, master);
    let param: &mut [bf16] = bytemuck::cast_slice_mut(a.out(0));
    kernels::from_f32(pool, master, &mut param[start..end]);
}
