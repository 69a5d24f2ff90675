//! The forward pass: softmax over blocks of keys with a running maximum.

use std::ops::Range;

use super::{AHEAD, KEYS, SCORES, Shape, copy_scaled, pack_keys};
use crate::gemm::{MR, NR, Tile, Workspace, tile};
use crate::math::{exp, ln};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// Queries whose scores are kept at a time: groups of a register tile's rows.
const QUERIES: usize = 8 * MR;
/// Queries of a task. Keys are packed once per task, so this is many times the cost of packing.
const CHUNK: usize = 11 * QUERIES;

/// o = softmax(scale q k^T + causal mask) v for each sequence and head of packed qkv, `[seqs * seq, (heads + 2
/// kv_heads) * head_dim]`; `o` is `[seqs * seq, heads * head_dim]`. `lse`, `[seqs, heads, seq]`, keeps the logarithm of
/// each softmax's denominator for the derivative.
pub fn attention<T: Storage>(
    pool: &Pool,
    qkv: &[T],
    o: &mut [T],
    lse: &mut [f32],
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
    assert_eq!((o.len(), lse.len()), (seqs * seq * shape.o_ld(), seqs * heads * seq));
    let lens = scratch_len(shape);
    let own_len = lens.iter().sum::<usize>();
    let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
    let job = Job { shape, qkv, o: &Parts::new(o), lse: &Parts::new(lse), scale };
    let chunks = seq.div_ceil(CHUNK);
    pool.run(chunks * seqs * kv_heads, &|task, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let mut rest = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        let [keys, values, queries, sums, scores, max, total] = lens.map(|len| {
            let (piece, left) = std::mem::take(&mut rest).split_at_mut(len);
            rest = left;
            piece
        });
        // The longest chunks, those with the most keys, first.
        let chunk = chunks - 1 - task / (seqs * kv_heads);
        let rows = chunk * CHUNK..seq.min((chunk + 1) * CHUNK);
        let (sequence, kv_head) = (task / kv_heads % seqs, task % kv_heads);
        job.chunk(sequence, kv_head, rows, Scratch { keys, values, queries, sums, scores, max, total });
    });
}

/// Floats of workspace for [`attention`].
pub fn attention_workspace_len(
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
fn scratch_len(shape: Shape) -> [usize; 7] {
    let rows = shape.group() * CHUNK.min(shape.seq);
    let values = KEYS * shape.wide();
    let wide = rows * shape.wide();
    [shape.panels_len(), values, wide, wide, QUERIES * SCORES, rows, rows]
        .map(|len| len.next_multiple_of(LANES))
}

/// A thread's scratch; queries, sums, maxima and totals hold the task's rows head after head.
struct Scratch<'a> {
    /// A block of keys, by columns.
    keys: &'a mut [f32],
    /// A block of values, by rows.
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

struct Job<'a, T> {
    shape: Shape,
    qkv: &'a [T],
    o: &'a Parts<'a, T>,
    lse: &'a Parts<'a, f32>,
    scale: f32,
}

impl<T: Element> Job<'_, T> {
    /// The queries `rows` of one sequence and key head.
    fn chunk(&self, sequence: usize, kv_head: usize, rows: Range<usize>, scratch: Scratch<'_>) {
        let Scratch { keys, values, queries, sums, scores, max, total } = scratch;
        let shape = self.shape;
        let (ld, h, wide, n) = (shape.ld(), shape.head_dim, shape.wide(), rows.len());
        let qkv = &self.qkv[sequence * shape.seq * ld..][..shape.seq * ld];
        for g in 0..shape.group() {
            let from = rows.start * ld + (kv_head * shape.group() + g) * h;
            copy_scaled(&qkv[from..], ld, n, h, self.scale, &mut queries[g * n * wide..], wide);
        }
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        for first in (0..rows.end).step_by(KEYS) {
            let count = KEYS.min(rows.end - first);
            let k = first * ld + (shape.heads + kv_head) * h;
            pack_keys(&qkv[k..], ld, count, h, keys);
            copy_scaled(&qkv[k + shape.kv_heads * h..], ld, count, h, 1.0, values, wide);
            for g in 0..shape.group() {
                for start in (0..n).step_by(QUERIES) {
                    let end = n.min(start + QUERIES);
                    if rows.start + end <= first {
                        continue;
                    }
                    let block = Block {
                        keys,
                        values,
                        queries: &queries[(g * n + start) * wide..(g * n + end) * wide],
                        first,
                        count,
                        position: rows.start + start,
                        h,
                        wide,
                    };
                    let own = g * n + start..g * n + end;
                    let sums = &mut sums[own.start * wide..own.end * wide];
                    block.run(scores, sums, &mut max[own.clone()], &mut total[own]);
                }
            }
        }
        for g in 0..shape.group() {
            let head = kv_head * shape.group() + g;
            let at = (sequence * shape.heads + head) * shape.seq;
            // SAFETY: rows of a sequence and head belong to one task.
            let lse = unsafe { self.lse.part(at + rows.start..at + rows.end) };
            let own = g * n..(g + 1) * n;
            logarithms(&max[own.clone()], &total[own.clone()], lse);
            let to = (sequence * shape.seq + rows.start) * shape.o_ld() + head * h;
            divide(&sums[own.start * wide..own.end * wide], &total[own], self.o, to, shape.o_ld(), h);
        }
    }
}

kernel! { fn logarithms(max: &[f32], total: &[f32], lse: &mut [f32]) = |s: S| {
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
    /// Position of the first key.
    first: usize,
    /// Keys in the block.
    count: usize,
    /// Position of the first query.
    position: usize,
    h: usize,
    wide: usize,
}

impl Block<'_> {
    fn run(&self, scores: &mut [f32], sums: &mut [f32], max: &mut [f32], total: &mut [f32]) {
        let rows = max.len();
        for i in (0..rows).step_by(MR) {
            let m = MR.min(rows - i);
            let visible = self.visible(i + m - 1);
            for j in (0..visible).step_by(NR) {
                self.score(i, m, j, NR.min(visible - j), scores);
            }
        }
        for i in (0..rows).step_by(MR) {
            let m = MR.min(rows - i);
            // Rows of a tile are treated alike up to the last one's key, so that their sums run over whole tiles.
            let visible = self.visible(i + m - 1);
            if visible == 0 {
                continue;
            }
            for row in i..i + m {
                let scores = &mut scores[row * SCORES..row * SCORES + visible.next_multiple_of(LANES)];
                let sums = &mut sums[row * self.wide..(row + 1) * self.wide];
                softmax(scores, self.visible(row), &mut max[row], &mut total[row], sums, self.first > 0);
            }
            for j in (0..self.h).step_by(NR) {
                let t = Tile {
                    k: visible,
                    a: scores[i * SCORES..].as_ptr(),
                    a_row: SCORES,
                    a_col: 1,
                    b: self.values[j..].as_ptr(),
                    b_row: self.wide,
                    c: sums[i * self.wide + j..].as_mut_ptr(),
                    c_row: self.wide,
                    load: self.first > 0,
                };
                // SAFETY: m rows of `visible` scores, as many rows of values, m rows of sums, both `wide`.
                unsafe { tile(m, NR.min(self.h - j), &t) };
            }
        }
    }

    /// How many keys of the block query `row` sees.
    fn visible(&self, row: usize) -> usize {
        (self.position + row + 1).saturating_sub(self.first).min(self.count)
    }

    /// Scores of `m` queries from `i` on against `n` keys from `j` on.
    fn score(&self, i: usize, m: usize, j: usize, n: usize, scores: &mut [f32]) {
        let t = Tile {
            k: self.h,
            a: self.queries[i * self.wide..].as_ptr(),
            a_row: self.wide,
            a_col: 1,
            b: self.keys[j / NR * NR * self.h..].as_ptr(),
            b_row: NR,
            c: scores[i * SCORES + j..].as_mut_ptr(),
            c_row: SCORES,
            load: false,
        };
        // SAFETY: m query rows of `h`, `h` rows of a panel, m rows of scores with room for whole vectors.
        unsafe { tile(m, n, &t) };
    }
}

kernel! {
    /// Turns a row of scores, of which the first `visible` count, into exponentials over the running maximum; when
    /// that rises, what was summed so far shrinks.
    fn softmax(
        scores: &mut [f32], visible: usize, max: &mut f32, total: &mut f32, sums: &mut [f32], later: bool
    ) = |s: S| {
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut top = lowest;
        for j in (0..scores.len()).step_by(LANES) {
            let scores = &mut scores[j..j + LANES];
            let mut x = s.load(scores);
            if visible < j + LANES {
                x = s.less(s.iota(), s.splat(visible.saturating_sub(j) as f32), x, lowest);
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
            s.store(&mut scores[j..], p);
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
