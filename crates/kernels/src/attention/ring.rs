//! Attention over keys that come part by part: what a rank of a ring does between two messages.
//!
//! A rank holds one piece from the front of a sequence and its mirror from the back, one behind the other. Of the keys of
//! another rank its queries see the front piece, all of them, or with their back piece both, whichever rank lies earlier:
//! the same work for every pair (Brandon et al. 2023, arXiv 2311.09431, section 3).

use super::forward::{self, logarithms};
use super::sees::{Places, Queries};
use super::{Attention, Keys, Sees, backward};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// Whose keys the queries of a rank meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    me: usize,
    of: usize,
    ranks: usize,
}

impl Sight {
    /// What rank `me` of a ring meets when keys have made so many hops.
    pub fn after(hops: usize, me: usize, ranks: usize) -> Sight {
        assert!(me < ranks && hops < ranks, "rank {me} of {ranks} after {hops} hops");
        Sight { me, of: (me + ranks - hops) % ranks, ranks }
    }

    /// Whether they are its own.
    fn own(self) -> bool {
        self.me == self.of
    }

    /// Its own, each those up to itself. Of a rank whose front piece lies earlier all queries see the front half; of one
    /// whose front piece lies later the back half of the queries sees all.
    fn span(self, seq: usize) -> Queries {
        let (at, of) = (Places::of(self.me, self.ranks, seq), Places::of(self.of, self.ranks, seq));
        // Far enough behind to see every key.
        let shift = usize::MAX / 4;
        match self.of.cmp(&self.me) {
            std::cmp::Ordering::Equal => Queries::causal(seq, at),
            std::cmp::Ordering::Less => Queries { queries: 0..seq, keys: seq / 2, shift, at, of },
            std::cmp::Ordering::Greater => Queries { queries: seq / 2..seq, keys: seq, shift, at, of },
        }
    }
}

/// A softmax under way, of every query head.
#[derive(Debug)]
pub struct Softmax<'a> {
    /// Weighted sums of values so far, `[rows, heads * value_dim]`.
    pub sums: &'a mut [f32],
    /// Greatest scores so far, `[seqs, heads, seq]`.
    pub max: &'a mut [f32],
    /// Sums of exponentials so far, likewise.
    pub total: &'a mut [f32],
}

/// Copies keys and values out of packed qkv into rows of their own, `[rows, kv_heads * (head_dim + value_dim)]`.
pub fn pack_kv<T: Storage>(pool: &Pool, shape: &Attention, qkv: &[T], kv: &mut [T]) {
    shape.check(qkv.len());
    let (rows, ld, cols) = (shape.seqs * shape.seq, shape.ld(), shape.kv_ld());
    assert_eq!(kv.len(), rows * cols, "keys and values");
    let kv = Parts::new(kv);
    pool.rows(rows, cols, &|range, _| {
        for row in range {
            // SAFETY: tasks have disjoint rows.
            let to = unsafe { kv.part(row * cols..(row + 1) * cols) };
            to.copy_from_slice(&qkv[(row + 1) * ld - cols..(row + 1) * ld]);
        }
    });
}

/// Goes on with the softmax of packed qkv's queries over the keys and values `kv` of one rank, as [`pack_kv`] leaves them;
/// the `first` part begins it, with the rank's own keys. Starts of documents in `sees` are positions in the whole sequence.
pub fn attention_part<T: Storage>(
    pool: &Pool,
    shape: &Attention,
    qkv: &[T],
    kv: &[T],
    sees: Sees<'_, T>,
    sight: Sight,
    softmax: &mut Softmax<'_>,
    ws: &mut [f32],
) {
    check(shape, kv.len(), softmax);
    let keys = Keys { data: kv, ld: shape.kv_ld(), at: 0 };
    let (sums, max, total) = (Parts::new(softmax.sums), Parts::new(softmax.max), Parts::new(softmax.total));
    let out = forward::Out::Part { sums: &sums, max: &max, total: &total, first: sight.own() };
    forward::ForwardJob { shape: *shape, qkv, keys, out, span: sight.span(shape.seq), sees }.run(pool, ws);
}

fn check(shape: &Attention, kv: usize, softmax: &Softmax<'_>) {
    let rows = shape.seqs * shape.seq;
    assert_eq!(kv, rows * shape.kv_ld(), "keys and values");
    let lens = (softmax.sums.len(), softmax.max.len(), softmax.total.len());
    assert_eq!(lens, (rows * shape.o_ld(), rows * shape.heads, rows * shape.heads), "softmax");
}

/// Ends a softmax: `o` as of [`super::attention`], and its `lse` in place of the greatest scores.
pub fn attention_parts<T: Storage>(pool: &Pool, shape: &Attention, softmax: &mut Softmax<'_>, o: &mut [T]) {
    check(shape, shape.seqs * shape.seq * shape.kv_ld(), softmax);
    assert_eq!(o.len(), softmax.sums.len(), "output");
    let (seq, ld, h) = (shape.seq, shape.o_ld(), shape.value_dim);
    let (o, max) = (Parts::new(o), Parts::new(softmax.max));
    let (sums, total) = (&*softmax.sums, &*softmax.total);
    pool.run(shape.seqs * shape.heads, &|task, _| {
        let (sequence, head) = (task / shape.heads, task % shape.heads);
        let total = &total[task * seq..(task + 1) * seq];
        // SAFETY: each task has its own sequence and head.
        let lse = unsafe { max.part(task * seq..(task + 1) * seq) };
        for (i, &total) in total.iter().enumerate() {
            let at = (sequence * seq + i) * ld + head * h;
            // SAFETY: as above.
            scaled(&sums[at..at + h], 1.0 / total, unsafe { o.part(at..at + h) });
        }
        ends(lse, total);
    });
}

kernel! { fn scaled[T: Element](x: &[f32], scale: f32, y: &mut [T]) = |s: S| {
    let scale = s.splat(scale);
    for j in (0..x.len()).step_by(LANES) {
        T::put(s, &mut y[j..], s.mul(s.load(&x[j..]), scale));
    }
} }

/// The logarithms of [`logarithms`] in place of the maxima, a few at a time.
fn ends(lse: &mut [f32], total: &[f32]) {
    let mut max = [0.0; LANES];
    for (lse, total) in lse.chunks_mut(LANES).zip(total.chunks(LANES)) {
        let max = &mut max[..lse.len()];
        max.copy_from_slice(lse);
        logarithms(max, total, lse);
    }
}

/// The derivative of [`attention_part`], once `o` and `lse` are whole and with the gradient `do_` of `o`: adds to the
/// gradients `dq` of queries, `[rows, heads * head_dim]`, which are new where the keys are the rank's own, and writes those
/// of `kv` to `dkv`. `dq` is the gradient of scaled queries.
pub fn attention_part_dx<T: Storage>(
    pool: &Pool,
    shape: &Attention,
    (qkv, kv): (&[T], &[T]),
    (o, lse, do_): (&[T], &[f32], &[T]),
    sees: Sees<'_, T>,
    sight: Sight,
    (dq, dkv): (&mut [f32], &mut [f32]),
    ws: &mut [f32],
) {
    let rows = shape.seqs * shape.seq;
    let lens = (kv.len(), dkv.len(), dq.len());
    let of_keys = rows * shape.kv_ld();
    assert_eq!(lens, (of_keys, of_keys, rows * shape.heads * shape.head_dim), "keys and gradients");
    let keys = Keys { data: kv, ld: shape.kv_ld(), at: 0 };
    let (dq, dkv) = (Parts::new(dq), Parts::new(dkv));
    let out = backward::Out::Part { dq: &dq, dkv: &dkv, first: sight.own() };
    let span = sight.span(shape.seq);
    backward::BackwardJob { shape: *shape, qkv, keys, o, lse, do_, out, span, sees }.run(pool, ws);
}

/// Ends the derivative: `dqkv`, packed, from the gradients of queries, and of keys and values.
pub fn attention_parts_dx<T: Storage>(
    pool: &Pool,
    shape: &Attention,
    dq: &[f32],
    dkv: &[f32],
    dqkv: &mut [T],
) {
    shape.check(dqkv.len());
    let (ld, q, kv) = (shape.ld(), shape.heads * shape.head_dim, shape.kv_ld());
    let rows = shape.seqs * shape.seq;
    assert_eq!((dq.len(), dkv.len()), (rows * q, rows * kv), "gradients");
    let dqkv = Parts::new(dqkv);
    pool.rows(rows, ld, &|range, _| {
        for row in range {
            // SAFETY: tasks have disjoint rows.
            let (to_q, to_kv) = unsafe { dqkv.part(row * ld..(row + 1) * ld) }.split_at_mut(q);
            scaled(&dq[row * q..(row + 1) * q], shape.scale, to_q);
            scaled(&dkv[row * kv..(row + 1) * kv], 1.0, to_kv);
        }
    });
}
