//! The derivative: probabilities are computed again from the kept logarithms, block by block.

use super::{AHEAD, KEYS, SCORES, Shape, copy_scaled, pack_keys};
use crate::gemm::{MR, NR, Tile, Workspace, tile};
use crate::math::exp;
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// Queries whose probabilities are kept at a time; sums over queries pause at each such group.
const QUERIES: usize = 8 * MR;

/// The gradient of [`super::attention`]'s qkv, given its inputs, its outputs `o` and `lse`, and the gradient `do_` of
/// `o`. The gradients of a key head's group of query heads are summed head after head.
pub fn attention_dx<T: Storage>(
    pool: &Pool,
    qkv: &[T],
    o: &[T],
    lse: &[f32],
    do_: &[T],
    dqkv: &mut [T],
    seqs: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    ws: &mut [f32],
) {
    let shape = Shape { seqs, seq, heads, kv_heads, head_dim };
    shape.check(qkv.len());
    let outputs = seqs * seq * shape.o_ld();
    assert_eq!(
        (o.len(), do_.len(), lse.len(), dqkv.len()),
        (outputs, outputs, seqs * heads * seq, qkv.len())
    );
    let lens = scratch_len(shape);
    let own_len = lens.iter().sum::<usize>();
    let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
    let job = Job { shape, qkv, o, lse, do_, dqkv: &Parts::new(dqkv), scale };
    pool.run(seqs * kv_heads, &|task, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let mut rest = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        let [key_panels, value_panels, keys, queries, grads, dq, dk, dv, p, ds, dots] = lens.map(|len| {
            let (piece, left) = std::mem::take(&mut rest).split_at_mut(len);
            rest = left;
            piece
        });
        let scratch = Scratch { key_panels, value_panels, keys, queries, grads, dq, dk, dv, p, ds, dots };
        job.head(task / kv_heads, task % kv_heads, scratch);
    });
}

/// Floats of workspace for [`attention_dx`].
pub fn attention_dx_workspace_len(
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    threads: usize,
) -> usize {
    let own = scratch_len(Shape { seqs: 1, seq, heads, kv_heads, head_dim });
    Workspace::room(threads * own.iter().sum::<usize>())
}

/// Scratch floats of a thread, in the order of [`Scratch`]'s fields.
fn scratch_len(shape: Shape) -> [usize; 11] {
    let panels = shape.panels_len();
    let rows = shape.seq * shape.wide();
    // Register tiles of keys may start up to MR - 1 rows before the end of a block.
    let (keys, scores) = (KEYS * shape.wide(), QUERIES * SCORES);
    [panels, panels, keys, rows, rows, rows, rows, rows, scores, scores, shape.seq]
        .map(|len| len.next_multiple_of(LANES))
}

struct Scratch<'a> {
    /// A block of keys, by columns.
    key_panels: &'a mut [f32],
    /// A block of values, by columns.
    value_panels: &'a mut [f32],
    /// A block of keys, by rows.
    keys: &'a mut [f32],
    /// A head's queries, scaled.
    queries: &'a mut [f32],
    /// A head's output gradients.
    grads: &'a mut [f32],
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// Probabilities of a few queries against a block of keys.
    p: &'a mut [f32],
    /// The gradients of their scores.
    ds: &'a mut [f32],
    /// For each query the dot product of output and output gradient.
    dots: &'a mut [f32],
}

struct Job<'a, T> {
    shape: Shape,
    qkv: &'a [T],
    o: &'a [T],
    lse: &'a [f32],
    do_: &'a [T],
    dqkv: &'a Parts<'a, T>,
    scale: f32,
}

impl<T: Element> Job<'_, T> {
    /// One sequence and key head, with all query heads of its group.
    fn head(&self, sequence: usize, kv_head: usize, scratch: Scratch<'_>) {
        let Scratch { key_panels, value_panels, keys, queries, grads, dq, dk, dv, p, ds, dots } = scratch;
        let shape = self.shape;
        let (seq, ld, o_ld, h, wide) = (shape.seq, shape.ld(), shape.o_ld(), shape.head_dim, shape.wide());
        let qkv = &self.qkv[sequence * seq * ld..][..seq * ld];
        dk.fill(0.0);
        dv.fill(0.0);
        for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
            let out = sequence * seq * o_ld + head * h;
            copy_scaled(&qkv[head * h..], ld, seq, h, self.scale, queries, wide);
            copy_scaled(&self.do_[out..], o_ld, seq, h, 1.0, grads, wide);
            row_dots(&self.o[out..], &self.do_[out..], o_ld, h, &mut dots[..seq]);
            dq.fill(0.0);
            let lse = &self.lse[(sequence * shape.heads + head) * seq..][..seq];
            for first in (0..seq).step_by(KEYS) {
                let count = KEYS.min(seq - first);
                let k = first * ld + (shape.heads + kv_head) * h;
                pack_keys(&qkv[k..], ld, count, h, key_panels);
                copy_scaled(&qkv[k..], ld, count, h, 1.0, keys, wide);
                pack_keys(&qkv[k + shape.kv_heads * h..], ld, count, h, value_panels);
                // Queries before the block see none of its keys. Groups of queries start at fixed positions.
                for start in (first / QUERIES * QUERIES..seq).step_by(QUERIES) {
                    let block = Block {
                        key_panels,
                        value_panels,
                        keys,
                        queries,
                        grads,
                        lse,
                        dots,
                        first,
                        count,
                        start,
                        end: seq.min(start + QUERIES),
                        h,
                        wide,
                    };
                    block.run(p, ds, dq, dk, dv);
                }
            }
            self.write(sequence, head, dq, self.scale);
        }
        self.write(sequence, shape.heads + kv_head, dk, 1.0);
        self.write(sequence, shape.heads + shape.kv_heads + kv_head, dv, 1.0);
    }

    /// Writes the gradient of one head of qkv.
    fn write(&self, sequence: usize, head: usize, from: &[f32], scale: f32) {
        let (h, ld) = (self.shape.head_dim, self.shape.ld());
        let rows = self.shape.seq * self.shape.wide();
        write_scaled(&from[..rows], scale, self.dqkv, sequence * self.shape.seq * ld + head * h, ld, h);
    }
}

kernel! {
    /// Writes rows, times `scale`, into rows of `cols` elements of `y`, from `at` on, `ld` apart.
    fn write_scaled[T: Element](
        from: &[f32], scale: f32, y: &Parts<'_, T>, at: usize, ld: usize, cols: usize
    ) = |s: S| {
        let scale = s.splat(scale);
        for (i, x) in from.chunks_exact(cols.next_multiple_of(LANES)).enumerate() {
            // SAFETY: a head of a sequence belongs to one task.
            let y = unsafe { y.part(at + i * ld..at + i * ld + cols) };
            let ahead = y.as_ptr().wrapping_add(AHEAD * ld);
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                T::put(s, &mut y[j..], s.mul(s.load(&x[j..]), scale));
            }
        }
    }
}

kernel! { fn row_dots[T: Element](a: &[T], b: &[T], ld: usize, len: usize, dots: &mut [f32]) = |s: S| {
    for (i, dot) in dots.iter_mut().enumerate() {
        let (a, b) = (&a[i * ld..i * ld + len], &b[i * ld..i * ld + len]);
        let ahead = a.as_ptr().wrapping_add(AHEAD * ld);
        let mut sum = s.splat(0.0);
        for j in (0..len).step_by(LANES) {
            s.prefetch(ahead.wrapping_add(j).cast());
            sum = s.fma(T::get(s, &a[j..]), T::get(s, &b[j..]), sum);
        }
        *dot = s.sum(sum);
    }
} }

/// A few queries, `start..end`, against a block of keys, `first..first + count`.
struct Block<'a> {
    key_panels: &'a [f32],
    value_panels: &'a [f32],
    keys: &'a [f32],
    queries: &'a [f32],
    grads: &'a [f32],
    lse: &'a [f32],
    dots: &'a [f32],
    first: usize,
    count: usize,
    start: usize,
    end: usize,
    h: usize,
    wide: usize,
}

impl Block<'_> {
    fn run(&self, p: &mut [f32], ds: &mut [f32], dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        for i in (self.start..self.end).step_by(MR) {
            let m = MR.min(self.end - i);
            let visible = self.visible(i + m - 1);
            for j in (0..visible).step_by(NR) {
                let n = NR.min(visible - j);
                self.scores(i, m, j, n, self.queries, self.key_panels, p);
                self.scores(i, m, j, n, self.grads, self.value_panels, ds);
            }
            let len = (visible.next_multiple_of(LANES) + LANES).min(SCORES);
            for q in i..i + m {
                let row = (q - self.start) * SCORES..(q - self.start) * SCORES + len;
                gradient(&mut p[row.clone()], &mut ds[row], self.visible(q), self.lse[q], self.dots[q]);
            }
            if visible > 0 {
                let a = &ds[(i - self.start) * SCORES..];
                self.sum(m, visible, (a, SCORES, 1), self.keys, &mut dq[i * self.wide..]);
            }
        }
        for j in (0..self.count).step_by(MR) {
            let m = MR.min(self.count - j);
            // Earlier queries see none of these keys; from here on what they do not see is 0.
            let from = self.start.max(self.first + j);
            if from >= self.end {
                break;
            }
            let at = (from - self.start) * SCORES + j;
            let key = (self.first + j) * self.wide;
            let n = self.end - from;
            self.sum(m, n, (&p[at..], 1, SCORES), &self.grads[from * self.wide..], &mut dv[key..]);
            self.sum(m, n, (&ds[at..], 1, SCORES), &self.queries[from * self.wide..], &mut dk[key..]);
        }
    }

    /// How many keys of the block the query at `position` sees.
    fn visible(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.first).min(self.count)
    }

    /// Products of `m` rows of `left` from `i` on with `n` columns of a block from `j` on.
    fn scores(&self, i: usize, m: usize, j: usize, n: usize, left: &[f32], panels: &[f32], out: &mut [f32]) {
        let t = Tile {
            k: self.h,
            a: left[i * self.wide..].as_ptr(),
            a_row: self.wide,
            a_col: 1,
            b: panels[j / NR * NR * self.h..].as_ptr(),
            b_row: NR,
            c: out[(i - self.start) * SCORES + j..].as_mut_ptr(),
            c_row: SCORES,
            load: false,
        };
        // SAFETY: m rows of `h` on the left, `h` rows of a panel, m rows of scores with room for whole vectors.
        unsafe { tile(m, n, &t) };
    }

    /// Goes on with the chains in `m` rows of `out` over `k` weights of `a` (slice, row and column stride) and rows of
    /// `right`.
    fn sum(&self, m: usize, k: usize, a: (&[f32], usize, usize), right: &[f32], out: &mut [f32]) {
        debug_assert!(a.0.len() > (m - 1) * a.1 + (k - 1) * a.2);
        debug_assert!(right.len() >= k * self.wide && out.len() >= m * self.wide);
        for j in (0..self.h).step_by(NR) {
            let t = Tile {
                k,
                a: a.0.as_ptr(),
                a_row: a.1,
                a_col: a.2,
                b: right[j..].as_ptr(),
                b_row: self.wide,
                c: out[j..].as_mut_ptr(),
                c_row: self.wide,
                load: true,
            };
            // SAFETY: lengths as asserted above; rows of `right` and `out` are whole vectors.
            unsafe { tile(m, NR.min(self.h - j), &t) };
        }
    }
}

kernel! {
    /// Turns scores into probabilities p and products with values into score gradients p (ds - dot); both are 0 from
    /// `visible` on.
    fn gradient(p: &mut [f32], ds: &mut [f32], visible: usize, lse: f32, dot: f32) = |s: S| {
        let zero = s.splat(0.0);
        let (lse, dot) = (s.splat(lse), s.splat(dot));
        for j in (0..p.len()).step_by(LANES) {
            let (p, ds) = (&mut p[j..j + LANES], &mut ds[j..j + LANES]);
            if j >= visible {
                s.store(p, zero);
                s.store(ds, zero);
                continue;
            }
            let mut prob = exp(s, s.sub(s.load(p), lse));
            let mut grad = s.mul(prob, s.sub(s.load(ds), dot));
            if visible < j + LANES {
                let edge = s.splat((visible - j) as f32);
                prob = s.less(s.iota(), edge, prob, zero);
                grad = s.less(s.iota(), edge, grad, zero);
            }
            s.store(p, prob);
            s.store(ds, grad);
        }
    }
}
