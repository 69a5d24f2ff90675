//! The derivative: probabilities are computed again from the kept logarithms, block by block.

use std::ops::Range;

use super::sees::{Places, Queries, View};
use super::{AHEAD, Attention, KEYS, Keys, SCORES, Sees, copy_scaled, pack_keys, pack_values, panel_width};
use crate::gemm::{MR, NR, Tile, Workspace, panel, tile};
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
    shape: &Attention,
    qkv: &[T],
    sees: Sees<'_, T>,
    o: &[T],
    lse: &[f32],
    do_: &[T],
    dqkv: &mut [T],
    ws: &mut [f32],
) {
    assert_eq!(dqkv.len(), qkv.len());
    let out = Out::Whole(&Parts::new(dqkv));
    let span = Queries::causal(shape.seq, Places::whole(shape.seq));
    BackwardJob { shape: *shape, qkv, keys: shape.own(qkv), o, lse, do_, out, span, sees }.run(pool, ws);
}

/// Floats of workspace for [`attention_dx`] and [`super::attention_part_dx`].
pub fn attention_dx_workspace_len(shape: &Attention, threads: usize) -> usize {
    Workspace::room(threads * scratch_len(shape).iter().sum::<usize>())
}

/// Scratch floats of a thread, in the order of [`Scratch`]'s fields.
fn scratch_len(shape: &Attention) -> [usize; 11] {
    let (key_panels, value_panels) = (shape.panels_len(shape.head_dim), shape.panels_len(shape.value_dim));
    let (rows, values) = (shape.seq * shape.wide(), shape.seq * shape.wide_values());
    // Register tiles of keys may start up to MR - 1 rows before the end of a block.
    let (keys, scores) = (KEYS * shape.wide(), QUERIES * SCORES);
    [key_panels, value_panels, keys, rows, values, rows, rows, values, scores, scores, shape.seq]
        .map(|len| len.next_multiple_of(LANES))
}

struct Scratch<'a> {
    /// A block of keys, by columns.
    key_panels: &'a mut [f32],
    /// A block of values, by columns.
    value_panels: &'a mut [f32],
    /// A block of keys, by rows, in panels.
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

/// Where gradients go.
#[derive(Clone, Copy)]
pub(super) enum Out<'a, T> {
    /// All keys are at hand: packed.
    Whole(&'a Parts<'a, T>),
    /// More keys come: what they add to the queries' gradients `[rows, heads, head_dim]`, which are new where this is the
    /// `first` part, and the gradients of the keys and values at hand, packed.
    Part { dq: &'a Parts<'a, f32>, dkv: &'a Parts<'a, f32>, first: bool },
}

pub(super) struct BackwardJob<'a, T> {
    pub(super) shape: Attention,
    pub(super) qkv: &'a [T],
    pub(super) keys: Keys<'a, T>,
    pub(super) o: &'a [T],
    pub(super) lse: &'a [f32],
    pub(super) do_: &'a [T],
    pub(super) out: Out<'a, T>,
    pub(super) span: Queries,
    /// Sinks are no part of it: `lse` has them.
    pub(super) sees: Sees<'a, T>,
}

impl<T: Element> BackwardJob<'_, T> {
    pub(super) fn run(&self, pool: &Pool, ws: &mut [f32]) {
        let shape = &self.shape;
        shape.check(self.qkv.len());
        let rows = shape.seqs * shape.seq;
        self.sees.check(rows, shape.heads);
        let outputs = rows * shape.o_ld();
        assert_eq!((self.o.len(), self.do_.len(), self.lse.len()), (outputs, outputs, rows * shape.heads));
        let lens = scratch_len(shape);
        let own_len = lens.iter().sum::<usize>();
        let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
        pool.run(shape.seqs * shape.kv_heads, &|task, thread| {
            // SAFETY: each thread has its own part and runs one task at a time.
            let mut rest = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
            let [key_panels, value_panels, keys, queries, grads, dq, dk, dv, p, ds, dots] = lens.map(|len| {
                let (piece, left) = std::mem::take(&mut rest).split_at_mut(len);
                rest = left;
                piece
            });
            let scratch = Scratch { key_panels, value_panels, keys, queries, grads, dq, dk, dv, p, ds, dots };
            self.head(task / shape.kv_heads, task % shape.kv_heads, scratch);
        });
    }

    /// One sequence and key head, with all query heads of its group.
    fn head(&self, sequence: usize, kv_head: usize, scratch: Scratch<'_>) {
        let Scratch { key_panels, value_panels, keys, queries, grads, dq, dk, dv, p, ds, dots } = scratch;
        let (shape, span) = (self.shape, &self.span);
        let (seq, ld, o_ld) = (shape.seq, shape.ld(), shape.o_ld());
        let ((h, wide), (values_h, values_wide)) =
            ((shape.head_dim, shape.wide()), (shape.value_dim, shape.wide_values()));
        let qkv = &self.qkv[sequence * seq * ld..][..seq * ld];
        let view = self.sees.of(span, sequence, seq);
        dk.fill(0.0);
        dv.fill(0.0);
        for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
            let out = sequence * seq * o_ld + head * values_h;
            copy_scaled(&qkv[head * h..], ld, seq, h, shape.scale, queries, wide);
            copy_scaled(&self.do_[out..], o_ld, seq, values_h, 1.0, grads, values_wide);
            row_dots(&self.o[out..], &self.do_[out..], o_ld, values_h, &mut dots[..seq]);
            self.begin(sequence, head, dq);
            let lse = &self.lse[(sequence * shape.heads + head) * seq..][..seq];
            for first in (0..span.keys).step_by(KEYS) {
                let count = KEYS.min(span.keys - first);
                let (k, v) = self.keys.head(&shape, sequence, kv_head, first);
                pack_keys(k, self.keys.ld, count, h, key_panels);
                pack_values(k, self.keys.ld, count, h, keys);
                pack_keys(v, self.keys.ld, count, values_h, value_panels);
                // Queries before the block see none of its keys. Groups of queries start at fixed positions.
                let seeing = (first.saturating_sub(span.shift) / QUERIES * QUERIES).max(span.queries.start);
                for start in (seeing..span.queries.end).step_by(QUERIES) {
                    if view.first(start) >= first + count {
                        break;
                    }
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
                        view,
                        head,
                        shift: span.shift,
                        start,
                        end: span.queries.end.min(start + QUERIES),
                        h,
                        wide,
                        values_h,
                        values_wide,
                    };
                    block.run(p, ds, dq, dk, dv);
                }
            }
            self.end_queries(sequence, head, dq);
        }
        self.end_keys(sequence, kv_head, (dk, dv));
    }

    /// Where a head of queries lies in `[rows, heads, head_dim]`.
    fn place(&self, sequence: usize, head: usize) -> (usize, usize) {
        let ld = self.shape.heads * self.shape.head_dim;
        (sequence * self.shape.seq * ld + head * self.shape.head_dim, ld)
    }

    /// Takes up what keys before added, if there were any.
    fn begin(&self, sequence: usize, head: usize, dq: &mut [f32]) {
        let Out::Part { dq: all, first: false, .. } = self.out else {
            dq.fill(0.0);
            return;
        };
        let ((at, ld), h) = (self.place(sequence, head), self.shape.head_dim);
        for (i, to) in dq.chunks_exact_mut(self.shape.wide()).take(self.shape.seq).enumerate() {
            // SAFETY: a head of a sequence belongs to one task.
            to[..h].copy_from_slice(unsafe { all.part(at + i * ld..at + i * ld + h) });
        }
    }

    fn end_queries(&self, sequence: usize, head: usize, dq: &[f32]) {
        let (shape, h) = (&self.shape, self.shape.head_dim);
        let dq = &dq[..shape.seq * shape.wide()];
        match self.out {
            Out::Whole(dqkv) => {
                let ld = shape.ld();
                write_scaled(dq, shape.scale, dqkv, sequence * shape.seq * ld + head * h, ld, h);
            }
            Out::Part { dq: all, .. } => {
                let (at, ld) = self.place(sequence, head);
                write_scaled(dq, 1.0, all, at, ld, h);
            }
        }
    }

    fn end_keys(&self, sequence: usize, kv_head: usize, (dk, dv): (&[f32], &[f32])) {
        let shape = &self.shape;
        let (h, values_h) = (shape.head_dim, shape.value_dim);
        let (dk, dv) = (&dk[..shape.seq * shape.wide()], &dv[..shape.seq * shape.wide_values()]);
        let at = |ld: usize, before: usize| {
            let keys = sequence * shape.seq * ld + before;
            (keys + kv_head * h, keys + shape.kv_heads * h + kv_head * values_h)
        };
        match self.out {
            Out::Whole(dqkv) => {
                let ld = shape.ld();
                let (keys, values) = at(ld, shape.heads * h);
                write_scaled(dk, 1.0, dqkv, keys, ld, h);
                write_scaled(dv, 1.0, dqkv, values, ld, values_h);
            }
            Out::Part { dkv, .. } => {
                let ld = shape.kv_ld();
                let (keys, values) = at(ld, 0);
                write_scaled(dk, 1.0, dkv, keys, ld, h);
                write_scaled(dv, 1.0, dkv, values, ld, values_h);
            }
        }
    }
}

kernel! {
    /// Writes rows, times `scale`, into rows of `cols` elements of `y`, from `at` on, `ld` apart.
    pub(super) fn write_scaled[T: Element](
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
    view: View<'a>,
    head: usize,
    /// What is added to the row of a query for its position among the keys.
    shift: usize,
    start: usize,
    end: usize,
    h: usize,
    wide: usize,
    values_h: usize,
    values_wide: usize,
}

impl Block<'_> {
    fn run(&self, p: &mut [f32], ds: &mut [f32], dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
        let (keys, values) = ((self.h, self.wide), (self.values_h, self.values_wide));
        let mut kept = [0.0; SCORES];
        for i in (self.start..self.end).step_by(MR) {
            let m = MR.min(self.end - i);
            let seen = self.seen(i).start..self.seen(i + m - 1).end;
            for j in (seen.start / panel() * panel()..seen.end).step_by(panel()) {
                let n = panel().min(seen.end - j);
                self.scores(i, m, j, n, (self.queries, keys), self.key_panels, p);
                self.scores(i, m, j, n, (self.grads, values), self.value_panels, ds);
            }
            let len = (seen.end.next_multiple_of(LANES) + LANES).min(SCORES);
            for q in i..i + m {
                let row = (q - self.start) * SCORES..(q - self.start) * SCORES + len;
                let own = self.seen(q);
                let (p, ds) = (&mut p[row.clone()], &mut ds[row]);
                let kept = self.view.kept((self.head, q), self.first, &mut kept[..len]);
                gradient(p, ds, own.start, own.end, self.lse[q], self.dots[q], kept);
            }
            if !seen.is_empty() {
                let a = &ds[(i - self.start) * SCORES + seen.start..];
                for j in (0..self.h).step_by(panel()) {
                    let nr = panel_width(j, self.h);
                    let right = (&self.keys[j * self.count + seen.start * nr..], nr);
                    sum(m, seen.len(), (a, SCORES, 1), right, (&mut dq[i * self.wide + j..], self.wide), nr);
                }
            }
        }
        // Later queries see none of the keys before.
        let first = self.seen(self.start).start / MR * MR;
        for j in (first..self.count).step_by(MR) {
            let m = MR.min(self.count - j);
            // Earlier queries see none of these keys; from here on what they do not see is 0.
            let from = self.start.max((self.first + j).saturating_sub(self.shift));
            if from >= self.end {
                break;
            }
            let at = (from - self.start) * SCORES + j;
            let (key, n) = (self.first + j, self.end - from);
            let (grads, dv) = (&self.grads[from * self.values_wide..], &mut dv[key * self.values_wide..]);
            sum_rows(m, n, (&p[at..], 1, SCORES), grads, dv, values);
            let (queries, dk) = (&self.queries[from * self.wide..], &mut dk[key * self.wide..]);
            sum_rows(m, n, (&ds[at..], 1, SCORES), queries, dk, keys);
        }
    }

    /// Which keys of the block the query in row `row` sees.
    fn seen(&self, row: usize) -> Range<usize> {
        self.view.of(row, self.first, self.count)
    }

    /// Products of `m` rows of `left` (with its width and row length) from `i` on with `n` columns of a block from `j` on.
    fn scores(
        &self,
        i: usize,
        m: usize,
        j: usize,
        n: usize,
        (left, (h, wide)): (&[f32], (usize, usize)),
        panels: &[f32],
        out: &mut [f32],
    ) {
        let t = Tile {
            k: h,
            a: left[i * wide..].as_ptr(),
            a_row: wide,
            a_col: 1,
            b: panels[j / panel() * panel() * h..].as_ptr(),
            b_row: panel(),
            c: out[(i - self.start) * SCORES + j..].as_mut_ptr(),
            c_row: SCORES,
            load: false,
        };
        // SAFETY: m rows of `h` on the left, `h` rows of a panel, m rows of scores with room for whole vectors.
        unsafe { tile(m, n, &t) };
    }
}

/// [`sum`] for `right` and `out` that both have rows of `h` in `wide` floats.
fn sum_rows(
    m: usize,
    k: usize,
    a: (&[f32], usize, usize),
    right: &[f32],
    out: &mut [f32],
    (h, wide): (usize, usize),
) {
    for j in (0..h).step_by(NR) {
        sum(m, k, a, (&right[j..], wide), (&mut out[j..], wide), NR.min(h - j));
    }
}

/// Goes on with the chains in `m` rows of `out` (with its row stride) over `k` weights of `a` (slice, row and column
/// stride) and `n` columns of rows of `right`, which are whole vectors.
fn sum(
    m: usize,
    k: usize,
    a: (&[f32], usize, usize),
    (right, b_row): (&[f32], usize),
    (out, c_row): (&mut [f32], usize),
    n: usize,
) {
    let wide = n.next_multiple_of(LANES);
    assert!(a.0.len() > (m - 1) * a.1 + (k - 1) * a.2);
    assert!(right.len() >= (k - 1) * b_row + wide && out.len() >= (m - 1) * c_row + wide);
    let t = Tile {
        k,
        a: a.0.as_ptr(),
        a_row: a.1,
        a_col: a.2,
        b: right.as_ptr(),
        b_row,
        c: out.as_mut_ptr(),
        c_row,
        load: true,
    };
    // SAFETY: lengths as asserted above.
    unsafe { tile(m, n, &t) };
}

kernel! {
    /// Turns scores into probabilities p and products with values into score gradients p (ds - dot); both are 0 before
    /// `first` and from `end` on. With factors by which probabilities were `kept`, ds is multiplied by them first, and p
    /// last.
    fn gradient(
        p: &mut [f32], ds: &mut [f32], first: usize, end: usize, lse: f32, dot: f32, kept: Option<&[f32]>
    ) = |s: S| {
        let zero = s.splat(0.0);
        let (lse, dot) = (s.splat(lse), s.splat(dot));
        for j in (0..p.len()).step_by(LANES) {
            let (p, ds) = (&mut p[j..j + LANES], &mut ds[j..j + LANES]);
            if j >= end || j + LANES <= first {
                s.store(p, zero);
                s.store(ds, zero);
                continue;
            }
            let mut prob = exp(s, s.sub(s.load(p), lse));
            let mut of_value = s.load(ds);
            let kept = kept.map(|kept| s.load(&kept[j..]));
            of_value = kept.map_or(of_value, |kept| s.mul(of_value, kept));
            let mut grad = s.mul(prob, s.sub(of_value, dot));
            prob = kept.map_or(prob, |kept| s.mul(prob, kept));
            if end < j + LANES {
                let edge = s.splat((end - j) as f32);
                prob = s.less(s.iota(), edge, prob, zero);
                grad = s.less(s.iota(), edge, grad, zero);
            }
            if j < first {
                let edge = s.splat((first - j) as f32);
                prob = s.less(s.iota(), edge, zero, prob);
                grad = s.less(s.iota(), edge, zero, grad);
            }
            s.store(p, prob);
            s.store(ds, grad);
        }
    }
}
