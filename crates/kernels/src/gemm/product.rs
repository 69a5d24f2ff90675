//! y = acc + a b + bias, with the right operand packed once and shared by all threads.

use std::ops::Range;

use super::micro::{Tile, panel, tile};
use super::pack::{pack_columns, pack_rows, widen};
use super::{KC, LINE, MR, NR, PACKED, Workspace, ask_panel, block, task_shape};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, ask_rows, kernel};
use crate::storage::{Acc, Element};

/// The left operand: `rows` x `k`, row-major with row stride `ld`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) ld: usize,
}

/// The right operand, `k` x `cols`, dense.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a, T> {
    /// Stored as it is.
    Rows(&'a [T]),
    /// Stored as its transpose, `cols` x `k`.
    Columns(&'a [T]),
}

/// Where the product goes and what is added to it.
pub(crate) struct Out<'a, T> {
    pub(crate) y: &'a mut [T],
    /// Row stride of `y`.
    pub(crate) ld: usize,
    /// Dense, `rows` x `cols`, if it is another buffer.
    pub(crate) acc: Acc<'a, T>,
    pub(crate) bias: Option<&'a [T]>,
}

/// Columns packed at a time.
fn strip(k: usize, cols: usize) -> usize {
    let most = (PACKED / k.max(1) / NR).max(4) * NR;
    cols.next_multiple_of(NR).min(most)
}

/// Scratch floats of one thread: partial sums, and left rows widened to `f32`.
fn scratch_len(k: usize, (mc, nc): (usize, usize)) -> (usize, usize) {
    let sums = if k > KC { mc * nc } else { MR * NR };
    (sums.next_multiple_of(LINE), (mc * KC.min(k)).next_multiple_of(LINE))
}

/// Floats of workspace for [`product`], for any storage type.
pub(crate) fn product_workspace_len(rows: usize, k: usize, cols: usize, threads: usize) -> usize {
    let strip = strip(k, cols);
    // The shape of one thread is the largest, so that more threads never need less.
    let (sums, left) = scratch_len(k, task_shape(rows, strip, 1));
    Workspace::room(strip * k) + Workspace::room(threads * (sums + left))
}

/// Computes the product of `left` (`rows` x `k`) and `right` (`k` x `cols`) into `out`.
pub(crate) fn product<T: Element>(
    pool: &Pool,
    left: Left<'_, T>,
    right: Right<'_, T>,
    out: Out<'_, T>,
    (rows, k, cols): (usize, usize, usize),
    ws: &mut [f32],
) {
    product_of_runs(pool, left, right, out, (1, &|_| 0..rows), (rows, k, cols), ws);
}

/// [`product`] for some runs of rows of `left` and `out` alone, all against one right operand: `runs` of them, each where
/// `run` says, of at most `rows` rows together. Rows between them are left as they are.
pub(crate) fn product_of_runs<T: Element>(
    pool: &Pool,
    left: Left<'_, T>,
    right: Right<'_, T>,
    out: Out<'_, T>,
    (runs, run): (usize, &(dyn Fn(usize) -> Range<usize> + Sync)),
    (most, k, cols): (usize, usize, usize),
    ws: &mut [f32],
) {
    let rows = (0..runs).map(run).filter(|r| !r.is_empty()).map(|r| r.end).max().unwrap_or(0);
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(left.ld >= k && left.data.len() >= (rows - 1) * left.ld + k, "left operand");
    assert!(out.ld >= cols && out.y.len() >= (rows - 1) * out.ld + cols, "output");
    let (Right::Rows(data) | Right::Columns(data)) = right;
    assert_eq!(data.len(), k * cols, "right operand");
    assert!(out.bias.is_none_or(|bias| bias.len() == cols), "bias");
    if let Acc::From(from) = out.acc {
        assert!(from.len() >= rows * cols, "accumulator");
    }
    let step = strip(k, cols);
    let shape = task_shape(most, step, pool.threads());
    let (sums, widened) = scratch_len(k, shape);
    let mut ws = Workspace::new(ws);
    let packed = ws.take(step * k);
    let scratch = Parts::new(ws.take(pool.threads() * (sums + widened)));
    let y = Parts::new(out.y);
    for first in (0..cols).step_by(step) {
        let width = step.min(cols - first);
        pack(pool, right, k, cols, first..first + width, packed);
        let (ld, acc, bias) = (out.ld, out.acc, out.bias);
        let job = Job { left, packed, y: &y, ld, acc, bias, first, k, cols, below: false };
        let across = width.div_ceil(shape.1);
        let down = |r: usize| run(r).len().div_ceil(shape.0);
        let all_down = (0..runs).map(down).sum::<usize>();
        // Down first: the part of the right operand that tasks share stays in the second-level cache.
        pool.run(all_down * across, &|task, thread| {
            let (mut r, mut block) = (0, task % all_down);
            while block >= down(r) {
                (block, r) = (block - down(r), r + 1);
            }
            let rows = run(r);
            let (i, j) = (rows.start + block * shape.0, task / all_down * shape.1);
            // SAFETY: each thread has its own part and runs one task at a time.
            let own = unsafe { scratch.part(thread * (sums + widened)..(thread + 1) * (sums + widened)) };
            let (sums, widened) = own.split_at_mut(sums);
            job.block(i..rows.end.min(i + shape.0), j..width.min(j + shape.1), sums, widened);
        });
    }
}

/// Computes what is on and below the diagonal of a product, `m` x `m`, into `y`, and leaves alone what is above it, but
/// for some of it next to the diagonal. Workspace is that of [`product`].
pub(crate) fn product_below_diagonal(
    pool: &Pool,
    left: Left<'_, f32>,
    right: Right<'_, f32>,
    y: &mut [f32],
    (m, k): (usize, usize),
    ws: &mut [f32],
) {
    if m == 0 {
        return;
    }
    assert!(left.ld >= k && left.data.len() >= (m - 1) * left.ld + k, "left operand");
    assert_eq!(y.len(), m * m, "output");
    let step = strip(k, m);
    // Half of the tasks have nothing to do.
    let shape = task_shape(m, step, 2 * pool.threads());
    let (sums, widened) = scratch_len(k, shape);
    let mut ws = Workspace::new(ws);
    let packed = ws.take(step * k);
    let scratch = Parts::new(ws.take(pool.threads() * (sums + widened)));
    let y = Parts::new(y);
    for first in (0..m).step_by(step) {
        let width = step.min(m - first);
        pack(pool, right, k, m, first..first + width, packed);
        let (acc, bias) = (Acc::None, None);
        let job = Job { left, packed, y: &y, ld: m, acc, bias, first, k, cols: m, below: true };
        let (down, across) = ((m - first).div_ceil(shape.0), width.div_ceil(shape.1));
        // From the bottom up, for the longest come first.
        pool.run(down * across, &|task, thread| {
            let (i, j) = (first + (down - 1 - task / across) * shape.0, task % across * shape.1);
            // SAFETY: each thread has its own part and runs one task at a time.
            let own = unsafe { scratch.part(thread * (sums + widened)..(thread + 1) * (sums + widened)) };
            let (sums, widened) = own.split_at_mut(sums);
            job.block(i..m.min(i + shape.0), j..width.min(j + shape.1), sums, widened);
        });
    }
}

/// Packs the columns `range` of the right operand into panels.
fn pack<T: Element>(
    pool: &Pool,
    right: Right<'_, T>,
    k: usize,
    cols: usize,
    range: Range<usize>,
    packed: &mut [f32],
) {
    let (packed, nr) = (Parts::new(packed), panel());
    pool.run(range.len().div_ceil(nr), &|panel, _| {
        let from = range.start + panel * nr;
        let n = nr.min(range.end - from);
        // SAFETY: each task has its own panel.
        let to = unsafe { packed.part(panel * nr * k..(panel + 1) * nr * k) };
        match right {
            Right::Rows(b) if k > 0 => pack_rows(&b[from..], cols, k, n, nr, to),
            Right::Columns(b) => pack_columns(&b[from * k..], k, k, n, nr, to),
            Right::Rows(_) => {}
        }
    });
}

/// The product over one strip of columns.
struct Job<'a, T> {
    left: Left<'a, T>,
    packed: &'a [f32],
    y: &'a Parts<'a, T>,
    ld: usize,
    acc: Acc<'a, T>,
    bias: Option<&'a [T]>,
    /// First column of the strip.
    first: usize,
    k: usize,
    cols: usize,
    /// Leave out tiles above the diagonal?
    below: bool,
}

impl<T: Element> Job<'_, T> {
    /// Computes a block of the output; `cols` counts within the strip and starts at a panel.
    fn block(&self, rows: Range<usize>, cols: Range<usize>, sums: &mut [f32], widened: &mut [f32]) {
        let (k, nr) = (self.k, panel());
        let tiles_down = rows.len().div_ceil(MR);
        // At least one round, so that an empty inner dimension gives zeros.
        let step = block(k, 1, KC).max(1);
        for k0 in (0..k.max(1)).step_by(step) {
            let kc = step.min(k - k0);
            let (a, a_row) = self.left_block(rows.clone(), k0..k0 + kc, widened);
            for (across, j) in cols.clone().step_by(nr).enumerate() {
                let most = nr.min(cols.end - j);
                let b = &self.packed[j / nr * nr * k + k0 * nr..][..kc * nr];
                for (down, i) in (0..rows.len()).step_by(MR).enumerate() {
                    let m = MR.min(rows.len() - i);
                    let n = self.width(rows.start + i + m, j, most);
                    if n == 0 {
                        continue;
                    }
                    let at = if k > KC { (across * tiles_down + down) * MR * nr } else { 0 };
                    let c = &mut sums[at..at + MR * nr];
                    let t = Tile {
                        k: kc,
                        a: a.wrapping_add(i * a_row),
                        a_row,
                        a_col: 1,
                        b: b.as_ptr(),
                        b_row: nr,
                        c: c.as_mut_ptr(),
                        c_row: nr,
                        load: k0 > 0,
                    };
                    if k0 + kc == k {
                        self.ask(rows.start + i, self.first + j, (m, n));
                    }
                    ask_panel(b.as_ptr().wrapping_add(k * nr), kc * nr, down, tiles_down);
                    // SAFETY: rows i..i + m of the left block have kc elements each, `b` holds kc rows of `nr`, and
                    // `c` MR rows of `nr`.
                    unsafe { tile(m, n, &t) };
                    if k0 + kc == k {
                        self.finish((c, nr), rows.start + i, m, self.first + j, n);
                    }
                }
            }
        }
    }

    /// How many of a tile's `most` columns from `col` of the strip on are wanted, if its rows end before `row`.
    fn width(&self, row: usize, col: usize, most: usize) -> usize {
        if self.below { most.min(row.saturating_sub(self.first + col)) } else { most }
    }

    /// A pointer to, and the row stride of, a block of the left operand in `f32`.
    fn left_block(&self, rows: Range<usize>, ks: Range<usize>, widened: &mut [f32]) -> (*const f32, usize) {
        let data = &self.left.data[rows.start * self.left.ld + ks.start..];
        if T::IS_F32 {
            return (data.as_ptr().cast(), self.left.ld);
        }
        widen(data, self.left.ld, rows.len(), ks.len(), widened);
        (widened.as_ptr(), ks.len())
    }

    /// Asks for what finishing a tile of `rows` x `cols` touches.
    fn ask(&self, row: usize, col: usize, (rows, cols): (usize, usize)) {
        self.y.ask(row * self.ld + col, (rows, cols), self.ld);
        if let Acc::From(from) = self.acc {
            ask_rows(from.as_ptr().wrapping_add(row * self.cols + col), (rows, cols), self.cols);
        }
    }

    /// Writes a finished tile, with its row length.
    fn finish(&self, (tile, nr): (&[f32], usize), row: usize, rows: usize, col: usize, cols: usize) {
        let y_at = row * self.ld + col;
        let bias = self.bias.map(|bias| &bias[col..col + cols]);
        let from_at = row * self.cols + col;
        match self.acc {
            Acc::None => finish_none(tile, nr, rows, cols, bias, self.y, y_at, self.ld),
            Acc::InPlace => finish_in_place(tile, nr, rows, cols, bias, self.y, y_at, self.ld),
            Acc::From(from) => {
                finish_from(tile, nr, rows, cols, bias, &from[from_at..], self.cols, self.y, y_at, self.ld);
            }
        }
    }
}

kernel! { fn finish_none[T: Element](
    tile: &[f32], nr: usize, rows: usize, cols: usize, bias: Option<&[T]>, y: &Parts<'_, T>, y_at: usize, y_ld: usize
) = |s: S| {
    for i in 0..rows {
        // SAFETY: a tile of the output belongs to one task.
        let y = unsafe { y.part(y_at + i * y_ld..y_at + i * y_ld + cols) };
        for j in (0..cols).step_by(LANES) {
            let mut sum = s.load(&tile[i * nr + j..(i + 1) * nr]);
            if let Some(bias) = bias {
                sum = s.add(sum, T::get(s, &bias[j..]));
            }
            T::put(s, &mut y[j..], sum);
        }
    }
} }

kernel! { fn finish_in_place[T: Element](
    tile: &[f32], nr: usize, rows: usize, cols: usize, bias: Option<&[T]>, y: &Parts<'_, T>, y_at: usize, y_ld: usize
) = |s: S| {
    for i in 0..rows {
        // SAFETY: a tile of the output belongs to one task.
        let y = unsafe { y.part(y_at + i * y_ld..y_at + i * y_ld + cols) };
        for j in (0..cols).step_by(LANES) {
            let mut sum = s.load(&tile[i * nr + j..(i + 1) * nr]);
            if let Some(bias) = bias {
                sum = s.add(sum, T::get(s, &bias[j..]));
            }
            let sum = s.add(T::get(s, &y[j..]), sum);
            T::put(s, &mut y[j..], sum);
        }
    }
} }

kernel! { fn finish_from[T: Element](
    tile: &[f32], nr: usize, rows: usize, cols: usize, bias: Option<&[T]>, from: &[T], from_ld: usize,
    y: &Parts<'_, T>, y_at: usize, y_ld: usize
) = |s: S| {
    for i in 0..rows {
        // SAFETY: a tile of the output belongs to one task.
        let y = unsafe { y.part(y_at + i * y_ld..y_at + i * y_ld + cols) };
        let from = &from[i * from_ld..i * from_ld + cols];
        for j in (0..cols).step_by(LANES) {
            let mut sum = s.load(&tile[i * nr + j..(i + 1) * nr]);
            if let Some(bias) = bias {
                sum = s.add(sum, T::get(s, &bias[j..]));
            }
            T::put(s, &mut y[j..], s.add(T::get(s, &from[j..]), sum));
        }
    }
} }
