//! The forward pass: softmax over blocks of keys with a running maximum.

use std::ops::Range;

use super::sees::{Places, Queries, View};
use super::{AHEAD, Attention, KEYS, Keys, SCORES, Sees, copy_scaled, pack_keys, pack_values, panel_width};
use crate::gemm::{MR, Tile, Workspace, panel, tile};
use crate::math::{exp, ln};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// Queries whose scores are kept at a time: groups of a register tile's rows.
const QUERIES: usize = 8 * MR;
/// Queries of a task. Keys are packed once per task, so this is many times the cost of packing.
const CHUNK: usize = 11 * QUERIES;

/// o = softmax(scale q k^T + mask) v, where the mask leaves what a query `sees`, for each sequence and head of packed qkv, `[seqs * seq, heads * head_dim +
/// kv_heads * (head_dim + value_dim)]`; `o` is `[seqs * seq, heads * value_dim]`. `lse`, `[seqs, heads, seq]`, keeps the
/// logarithm of each softmax's denominator for the derivative.
pub fn attention<T: Storage>(
    pool: &Pool,
    shape: &Attention,
    qkv: &[T],
    sees: Sees<'_, T>,
    o: &mut [T],
    lse: &mut [f32],
    ws: &mut [f32],
) {
    attention_maxima(pool, shape, qkv, sees, o, lse, None, ws);
}

/// [`attention`], which also writes the greatest score of every query, `[seqs, heads, seq]`; with sinks, they count too.
pub fn attention_maxima<T: Storage>(
    pool: &Pool,
    shape: &Attention,
    qkv: &[T],
    sees: Sees<'_, T>,
    o: &mut [T],
    lse: &mut [f32],
    maxima: Option<&mut [f32]>,
    ws: &mut [f32],
) {
    let rows = shape.seqs * shape.seq;
    assert_eq!((o.len(), lse.len()), (rows * shape.o_ld(), rows * shape.heads));
    assert!(maxima.as_ref().is_none_or(|m| m.len() == lse.len()), "greatest scores");
    let maxima = maxima.map(Parts::new);
    let out = Out::Whole { o: &Parts::new(o), lse: &Parts::new(lse), maxima: maxima.as_ref() };
    let span = Queries::causal(shape.seq, Places::whole(shape.seq));
    ForwardJob { shape: *shape, qkv, keys: shape.own(qkv), out, span, sees }.run(pool, ws);
}

/// Floats of workspace for [`attention`] and [`super::attention_part`].
pub fn attention_workspace_len(shape: &Attention, threads: usize) -> usize {
    Workspace::room(threads * scratch_len(shape).iter().sum::<usize>())
}

/// Scratch floats of a thread, in the order of [`Scratch`]'s fields.
fn scratch_len(shape: &Attention) -> [usize; 7] {
    let rows = shape.group() * CHUNK.min(shape.seq);
    let (keys, values) = (shape.panels_len(shape.head_dim), KEYS * shape.wide_values());
    let (queries, sums) = (rows * shape.wide(), rows * shape.wide_values());
    [keys, values, queries, sums, QUERIES * SCORES, rows, rows].map(|len| len.next_multiple_of(LANES))
}

/// A thread's scratch; queries, sums, maxima and totals hold the task's rows head after head.
struct Scratch<'a> {
    /// A block of keys, by columns.
    keys: &'a mut [f32],
    /// A block of values, by rows, in panels.
    values: &'a mut [f32],
    /// The queries, scaled.
    queries: &'a mut [f32],
    /// Weighted sums of values so far.
    sums: &'a mut [f32],
    /// Scores, then their exponentials, of a few rows.
    scores: &'a mut [f32],
    /// Greatest score so far.
    max: &'a mut [f32],
    /// Sum of exponentials so far.
    total: &'a mut [f32],
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) enum Out<'a, T> {
    /// All keys are at hand.
    Whole { o: &'a Parts<'a, T>, lse: &'a Parts<'a, f32>, maxima: Option<&'a Parts<'a, f32>> },
    /// More keys come: weighted sums `[rows, heads, value_dim]`, greatest scores and sums of exponentials `[seqs, heads,
    /// seq]` so far. Nothing was there before where this is the `first` part.
    Part { sums: &'a Parts<'a, f32>, max: &'a Parts<'a, f32>, total: &'a Parts<'a, f32>, first: bool },
}

pub(super) struct ForwardJob<'a, T> {
    pub(super) shape: Attention,
    pub(super) qkv: &'a [T],
    pub(super) keys: Keys<'a, T>,
    pub(super) out: Out<'a, T>,
    pub(super) span: Queries,
    pub(super) sees: Sees<'a, T>,
}

impl<T: Element> ForwardJob<'_, T> {
    pub(super) fn run(&self, pool: &Pool, ws: &mut [f32]) {
        let (shape, span) = (&self.shape, &self.span);
        shape.check(self.qkv.len());
        self.sees.check(shape.seqs * shape.seq, shape.heads);
        let lens = scratch_len(shape);
        let own_len = lens.iter().sum::<usize>();
        let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
        let (seqs, kv_heads) = (shape.seqs, shape.kv_heads);
        let chunks = span.queries.len().div_ceil(CHUNK);
        pool.run(chunks * seqs * kv_heads, &|task, thread| {
            // SAFETY: each thread has its own part and runs one task at a time.
            let mut rest = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
            let [keys, values, queries, sums, scores, max, total] = lens.map(|len| {
                let (piece, left) = std::mem::take(&mut rest).split_at_mut(len);
                rest = left;
                piece
            });
            // The longest chunks, those with the most keys, first.
            let first = span.queries.start + (chunks - 1 - task / (seqs * kv_heads)) * CHUNK;
            let rows = first..span.queries.end.min(first + CHUNK);
            let (sequence, kv_head) = (task / kv_heads % seqs, task % kv_heads);
            let scratch = Scratch { keys, values, queries, sums, scores, max, total };
            self.chunk(sequence, kv_head, rows, scratch);
        });
    }

    /// The queries `rows` of one sequence and key head.
    fn chunk(&self, sequence: usize, kv_head: usize, rows: Range<usize>, scratch: Scratch<'_>) {
        let Scratch { keys, values, queries, sums, scores, max, total } = scratch;
        let (shape, shift) = (self.shape, self.span.shift);
        let (ld, h, wide, n) = (shape.ld(), shape.head_dim, shape.wide(), rows.len());
        let (values_h, values_wide) = (shape.value_dim, shape.wide_values());
        let qkv = &self.qkv[sequence * shape.seq * ld..][..shape.seq * ld];
        for g in 0..shape.group() {
            let from = rows.start * ld + (kv_head * shape.group() + g) * h;
            copy_scaled(&qkv[from..], ld, n, h, shape.scale, &mut queries[g * n * wide..], wide);
        }
        let continues = self.begin(sequence, kv_head, rows.clone(), sums, max, total);
        let view = self.sees.of(&self.span, sequence, shape.seq);
        let last = self.span.keys.min(rows.end + shift);
        // Blocks of keys begin at fixed rows.
        for first in (view.first(rows.start) / KEYS * KEYS..last).step_by(KEYS) {
            let count = KEYS.min(last - first);
            let (k, v) = self.keys.head(&shape, sequence, kv_head, first);
            pack_keys(k, self.keys.ld, count, h, keys);
            pack_values(v, self.keys.ld, count, values_h, values);
            for g in 0..shape.group() {
                for start in (0..n).step_by(QUERIES) {
                    let end = n.min(start + QUERIES);
                    if rows.start + end + shift <= first || view.first(rows.start + start) >= first + count {
                        continue;
                    }
                    let block = Block {
                        keys,
                        values,
                        queries: &queries[(g * n + start) * wide..(g * n + end) * wide],
                        first,
                        later: continues || first > 0,
                        count,
                        view,
                        head: kv_head * shape.group() + g,
                        row: rows.start + start,
                        h,
                        wide,
                        values_h,
                        values_wide,
                    };
                    let own = g * n + start..g * n + end;
                    let sums = &mut sums[own.start * values_wide..own.end * values_wide];
                    block.run(scores, sums, &mut max[own.clone()], &mut total[own]);
                }
            }
        }
        self.end(sequence, kv_head, rows, (sums, max, total));
    }

    /// Where a head's rows lie in `[seqs, heads, seq]` and in `[rows, heads, value_dim]`.
    fn places(&self, sequence: usize, head: usize, rows: &Range<usize>) -> (Range<usize>, usize) {
        let shape = &self.shape;
        let at = (sequence * shape.heads + head) * shape.seq;
        let to = (sequence * shape.seq + rows.start) * shape.o_ld() + head * shape.value_dim;
        (at + rows.start..at + rows.end, to)
    }

    /// Takes up what earlier parts left, if there were any, or what every softmax begins with. False where nothing was
    /// summed yet, and the first keys are seen by all.
    fn begin(
        &self,
        sequence: usize,
        kv_head: usize,
        rows: Range<usize>,
        sums: &mut [f32],
        max: &mut [f32],
        total: &mut [f32],
    ) -> bool {
        let Out::Part { sums: all, max: maxima, total: totals, first: false } = self.out else {
            // Finite, so that scores which nobody sees are below it.
            max.fill(f32::MIN);
            total.fill(0.0);
            if self.sees.bounds() || self.sees.sinks.is_some() {
                sums.fill(0.0);
            }
            let Some(sinks) = self.sees.sinks else { return self.sees.bounds() };
            // A sink's exponential over itself.
            total.fill(1.0);
            let (n, group) = (rows.len(), self.shape.group());
            for (max, sink) in max.chunks_exact_mut(n).zip(&sinks[kv_head * group..]).take(group) {
                max.fill(sink.one());
            }
            return true;
        };
        let (n, wide, ld) = (rows.len(), self.shape.wide_values(), self.shape.o_ld());
        for g in 0..self.shape.group() {
            let (of, at) = self.places(sequence, kv_head * self.shape.group() + g, &rows);
            let own = g * n..(g + 1) * n;
            // SAFETY: rows of a sequence and head belong to one task.
            max[own.clone()].copy_from_slice(unsafe { maxima.part(of.clone()) });
            // SAFETY: as above.
            total[own.clone()].copy_from_slice(unsafe { totals.part(of) });
            for (i, to) in sums[own.start * wide..own.end * wide].chunks_exact_mut(wide).enumerate() {
                // SAFETY: as above.
                let from = unsafe { all.part(at + i * ld..at + i * ld + self.shape.value_dim) };
                to[..from.len()].copy_from_slice(from);
            }
        }
        true
    }

    fn end(&self, sequence: usize, kv_head: usize, rows: Range<usize>, state: (&[f32], &[f32], &[f32])) {
        let (shape, n, (sums, max, total)) = (&self.shape, rows.len(), state);
        let wide = shape.wide_values();
        for g in 0..shape.group() {
            let (of, to) = self.places(sequence, kv_head * shape.group() + g, &rows);
            let own = g * n..(g + 1) * n;
            let sums = &sums[own.start * wide..own.end * wide];
            match self.out {
                Out::Whole { o, lse, maxima } => {
                    if let Some(maxima) = maxima {
                        // SAFETY: rows of a sequence and head belong to one task.
                        unsafe { maxima.part(of.clone()) }.copy_from_slice(&max[own.clone()]);
                    }
                    // SAFETY: as above.
                    let lse = unsafe { lse.part(of) };
                    logarithms(&max[own.clone()], &total[own.clone()], lse);
                    divide(sums, &total[own], o, to, shape.o_ld(), shape.value_dim);
                }
                Out::Part { sums: all, max: maxima, total: totals, .. } => {
                    // SAFETY: as above.
                    unsafe { maxima.part(of.clone()) }.copy_from_slice(&max[own.clone()]);
                    // SAFETY: as above.
                    unsafe { totals.part(of) }.copy_from_slice(&total[own]);
                    for (i, from) in sums.chunks_exact(wide).enumerate() {
                        let to = to + i * shape.o_ld();
                        // SAFETY: as above.
                        unsafe { all.part(to..to + shape.value_dim) }
                            .copy_from_slice(&from[..shape.value_dim]);
                    }
                }
            }
        }
    }
}

kernel! { pub(super) fn logarithms(max: &[f32], total: &[f32], lse: &mut [f32]) = |s: S| {
    for ((lse, &max), &total) in lse.iter_mut().zip(max).zip(total) {
        *lse = max + ln(total);
    }
} }

kernel! {
    /// Divides rows of sums by their totals into rows of `cols` elements of `o`, from `at` on, `ld` apart.
    fn divide[T: Element](sums: &[f32], total: &[f32], o: &Parts<'_, T>, at: usize, ld: usize, cols: usize) = |s: S| {
        let wide = cols.next_multiple_of(LANES);
        for (i, (x, &total)) in sums.chunks_exact(wide).zip(total).enumerate() {
            let inverse = s.splat(1.0 / total);
            // SAFETY: a head of a sequence's rows belongs to one task.
            let y = unsafe { o.part(at + i * ld..at + i * ld + cols) };
            let ahead = y.as_ptr().wrapping_add(AHEAD * ld);
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                T::put(s, &mut y[j..], s.mul(s.load(&x[j..]), inverse));
            }
        }
    }
}

/// A few queries against a block of keys.
struct Block<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    queries: &'a [f32],
    /// Row of the first key.
    first: usize,
    /// Whether sums, maxima and totals hold those of earlier keys.
    later: bool,
    /// Keys in the block.
    count: usize,
    view: View<'a>,
    head: usize,
    /// Row of the first query.
    row: usize,
    h: usize,
    wide: usize,
    values_h: usize,
    values_wide: usize,
}

impl Block<'_> {
    fn run(&self, scores: &mut [f32], sums: &mut [f32], max: &mut [f32], total: &mut [f32]) {
        let (rows, mut kept) = (max.len(), [0.0; SCORES]);
        for i in (0..rows).step_by(MR) {
            let m = MR.min(rows - i);
            let seen = self.seen_by(i, m);
            for j in seen.clone().step_by(panel()) {
                self.score(i, m, j, panel().min(seen.end - j), scores);
            }
        }
        for i in (0..rows).step_by(MR) {
            let m = MR.min(rows - i);
            // Rows of a tile are treated alike from the first one's key to the last one's, so that their sums run over
            // whole tiles.
            let seen = self.seen_by(i, m);
            if seen.is_empty() {
                continue;
            }
            let first = seen.start;
            for row in i..i + m {
                let of = row * SCORES;
                let scores = &mut scores[of + first..of + first + seen.len().next_multiple_of(LANES)];
                let sums = &mut sums[row * self.values_wide..(row + 1) * self.values_wide];
                let own = self.seen(row);
                let own = own.start.saturating_sub(first)..own.end.saturating_sub(first);
                let kept = &mut kept[..scores.len()];
                let kept = self.view.kept((self.head, self.row + row), self.first + first, kept);
                softmax(scores, own.start, own.end, &mut max[row], &mut total[row], sums, self.later, kept);
            }
            for j in (0..self.values_h).step_by(panel()) {
                let nr = panel_width(j, self.values_h);
                let t = Tile {
                    k: seen.len(),
                    a: scores[i * SCORES + first..].as_ptr(),
                    a_row: SCORES,
                    a_col: 1,
                    b: self.values[j * self.count + first * nr..].as_ptr(),
                    b_row: nr,
                    c: sums[i * self.values_wide + j..].as_mut_ptr(),
                    c_row: self.values_wide,
                    load: self.later,
                };
                // SAFETY: m rows of as many scores as keys are seen, as many rows of a panel, m rows of sums.
                unsafe { tile(m, nr, &t) };
            }
        }
    }

    /// Which keys of the block query `row` sees.
    fn seen(&self, row: usize) -> Range<usize> {
        self.view.of(self.row + row, self.first, self.count)
    }

    /// Keys of the block in whole panels, up to the last that one of `m` queries from `i` on sees.
    fn seen_by(&self, i: usize, m: usize) -> Range<usize> {
        let (first, end) = (self.seen(i).start, self.seen(i + m - 1).end);
        if first < end { first / panel() * panel()..end } else { end..end }
    }

    /// Scores of `m` queries from `i` on against `n` keys from `j` on.
    fn score(&self, i: usize, m: usize, j: usize, n: usize, scores: &mut [f32]) {
        let t = Tile {
            k: self.h,
            a: self.queries[i * self.wide..].as_ptr(),
            a_row: self.wide,
            a_col: 1,
            b: self.keys[j / panel() * panel() * self.h..].as_ptr(),
            b_row: panel(),
            c: scores[i * SCORES + j..].as_mut_ptr(),
            c_row: SCORES,
            load: false,
        };
        // SAFETY: m query rows of `h`, `h` rows of a panel, m rows of scores with room for whole vectors.
        unsafe { tile(m, n, &t) };
    }
}

kernel! {
    /// Turns a row of scores, of which those from `first` to `end` count, into exponentials over the running maximum;
    /// when that rises, what was summed so far shrinks. Exponentials are `kept` by these factors once they are summed.
    fn softmax(
        scores: &mut [f32], first: usize, end: usize, max: &mut f32, total: &mut f32, sums: &mut [f32], later: bool,
        kept: Option<&[f32]>
    ) = |s: S| {
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut top = lowest;
        for j in (0..scores.len()).step_by(LANES) {
            let scores = &mut scores[j..j + LANES];
            let mut x = s.load(scores);
            if end < j + LANES {
                x = s.less(s.iota(), s.splat(end.saturating_sub(j) as f32), x, lowest);
                s.store(scores, x);
            }
            if j < first {
                x = s.less(s.iota(), s.splat((first - j) as f32), lowest, x);
                s.store(scores, x);
            }
            top = s.max(x, top);
        }
        let top = s.greatest(top);
        let new = if top > *max { top } else { *max };
        let m = s.splat(new);
        let mut sum = s.splat(0.0);
        for j in (0..scores.len()).step_by(LANES) {
            let p = exp(s, s.sub(s.load(&scores[j..]), m));
            sum = s.add(sum, p);
            s.store(&mut scores[j..], kept.map_or(p, |kept| s.mul(p, s.load(&kept[j..]))));
        }
        let sum = s.sum(sum);
        if later {
            let shrink = exp(s, s.splat(*max - new));
            for j in (0..sums.len()).step_by(LANES) {
                let less = s.mul(s.load(&sums[j..]), shrink);
                s.store(&mut sums[j..], less);
            }
            let mut lanes = [0.0; LANES];
            s.store(&mut lanes, shrink);
            *total = *total * lanes[0] + sum;
        } else {
            *total = sum;
        }
        *max = new;
    }
}
