//! y = acc + a b + bias, with the right operand packed once and shared by all threads.

use std::ops::Range;

use super::micro::{Tile, panel, tile};
use super::pack::{pack_columns, pack_rows, widen};
use super::{KC, LINE, MR, NR, PACKED, TASK, Workspace, ask_panel, block, task_shape};
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

/// What rows are multiplied by: groups of them by one operand each, of which each has as many runs of rows.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'f, 'a, T> {
    pub(crate) groups: usize,
    pub(crate) runs: usize,
    /// Where a run of a group lies in the left operand and the output.
    pub(crate) run: &'f (dyn Fn(usize, usize) -> Range<usize> + Sync),
    /// A group's right operand and bias.
    pub(crate) right: &'f (dyn Fn(usize) -> (Right<'a, T>, Option<&'a [T]>) + Sync),
}

impl<T> Groups<'_, '_, T> {
    /// Blocks of at most `most` rows that a run of a group is cut into, equal ones, and how many rows they have.
    fn blocks(&self, group: usize, run: usize, most: usize) -> (usize, usize) {
        let len = (self.run)(group, run).len();
        let rows = block(len, MR, most);
        (len.div_ceil(rows.max(1)), rows)
    }

    /// Blocks of all runs of a group.
    fn down(&self, group: usize, most: usize) -> usize {
        (0..self.runs).map(|r| self.blocks(group, r, most).0).sum()
    }

    /// The rows of a group's block.
    fn rows(&self, group: usize, mut block: usize, most: usize) -> Range<usize> {
        let mut r = 0;
        loop {
            let (blocks, rows) = self.blocks(group, r, most);
            if block < blocks {
                let run = (self.run)(group, r);
                let first = run.start + block * rows;
                return first..run.end.min(first + rows);
            }
            (block, r) = (block - blocks, r + 1);
        }
    }
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

/// How many of so many groups' right operands are packed at a time.
fn together(groups: usize, k: usize, cols: usize) -> usize {
    (PACKED / (k * cols.next_multiple_of(NR)).max(1)).clamp(1, groups.max(1))
}

/// Floats of workspace for [`product`], for any storage type.
pub(crate) fn product_workspace_len(rows: usize, k: usize, cols: usize, threads: usize) -> usize {
    product_of_groups_workspace_len(1, rows, k, cols, threads)
}

/// The same of [`product_of_groups`].
pub(crate) fn product_of_groups_workspace_len(
    groups: usize,
    rows: usize,
    k: usize,
    cols: usize,
    threads: usize,
) -> usize {
    let strip = strip(k, cols);
    // The shape of one thread is the largest, so that more threads never need less.
    let (sums, left) = scratch_len(k, task_shape(rows.min(TASK.0), strip, 1));
    Workspace::room(together(groups, k, cols) * strip * k) + Workspace::room(threads * (sums + left))
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
    let bias = out.bias;
    let of = Groups { groups: 1, runs: 1, run: &|_, _| 0..rows, right: &|_| (right, bias) };
    product_of_groups(pool, left, of, Out { bias: None, ..out }, (k, cols), ws);
}

/// [`product`] for groups of rows of `left` and `out`, each against a right operand of its own, and with a bias of its own.
/// Rows of no group are left as they are.
pub(crate) fn product_of_groups<T: Element>(
    pool: &Pool,
    left: Left<'_, T>,
    of: Groups<'_, '_, T>,
    out: Out<'_, T>,
    (k, cols): (usize, usize),
    ws: &mut [f32],
) {
    let runs = || (0..of.groups).flat_map(|g| (0..of.runs).map(move |r| (of.run)(g, r)));
    let rows = runs().filter(|r| !r.is_empty()).map(|r| r.end).max().unwrap_or(0);
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(left.ld >= k && left.data.len() >= (rows - 1) * left.ld + k, "left operand");
    assert!(out.ld >= cols && out.y.len() >= (rows - 1) * out.ld + cols, "output");
    for (right, bias) in (0..of.groups).map(of.right) {
        let (Right::Rows(data) | Right::Columns(data)) = right;
        assert_eq!(data.len(), k * cols, "right operand");
        assert!(bias.is_none_or(|bias| bias.len() == cols), "bias");
    }
    if let Acc::From(from) = out.acc {
        assert!(from.len() >= rows * cols, "accumulator");
    }
    let (step, at_once) = (strip(k, cols), together(of.groups, k, cols));
    let (most, wide) = task_shape(runs().map(|r| r.len()).sum(), step, pool.threads());
    let (sums, widened) = scratch_len(k, (most, wide));
    let mut ws = Workspace::new(ws);
    let packed = ws.take(at_once * step * k);
    let scratch = Parts::new(ws.take(pool.threads() * (sums + widened)));
    let (y, ld, acc, nr) = (Parts::new(out.y), out.ld, out.acc, panel());
    for first_group in (0..of.groups).step_by(at_once) {
        let groups = first_group..of.groups.min(first_group + at_once);
        for first in (0..cols).step_by(step) {
            let width = step.min(cols - first);
            let (panels, whole) = (width.div_ceil(nr), Parts::new(&mut *packed));
            pool.run(groups.len() * panels, &|task, _| {
                let (g, panel) = (task / panels, task % panels);
                if of.down(groups.start + g, most) > 0 {
                    let at = g * step * k + panel * nr * k;
                    // SAFETY: each task has its own panel.
                    let to = unsafe { whole.part(at..at + nr * k) };
                    pack((of.right)(groups.start + g).0, k, cols, (first + panel * nr, first + width), to);
                }
            });
            let packed = &*packed;
            let across = width.div_ceil(wide);
            let tasks = groups.clone().map(|g| of.down(g, most) * across).sum();
            // Down first: the part of the right operand that tasks share stays in the second-level cache.
            pool.run(tasks, &|task, thread| {
                let (mut g, mut task) = (groups.start, task);
                while task >= of.down(g, most) * across {
                    (task, g) = (task - of.down(g, most) * across, g + 1);
                }
                let down = of.down(g, most);
                let (rows, j) = (of.rows(g, task % down, most), task / down * wide);
                // SAFETY: each thread has its own part and runs one task at a time.
                let own = unsafe { scratch.part(thread * (sums + widened)..(thread + 1) * (sums + widened)) };
                let (sums, widened) = own.split_at_mut(sums);
                let packed = &packed[(g - groups.start) * step * k..][..step * k];
                let bias = (of.right)(g).1;
                let job = Job { left, packed, y: &y, ld, acc, bias, first, k, cols, below: false };
                job.block(rows, j..width.min(j + wide), sums, widened);
            });
        }
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
        let (whole, nr) = (Parts::new(&mut *packed), panel());
        pool.run(width.div_ceil(nr), &|panel, _| {
            // SAFETY: each task has its own panel.
            let to = unsafe { whole.part(panel * nr * k..(panel + 1) * nr * k) };
            pack(right, k, m, (first + panel * nr, first + width), to);
        });
        let packed = &*packed;
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

/// Packs the columns of the right operand from `first` on, which end at `end`, into a panel.
fn pack<T: Element>(
    right: Right<'_, T>,
    k: usize,
    cols: usize,
    (first, end): (usize, usize),
    to: &mut [f32],
) {
    let (nr, n) = (panel(), panel().min(end - first));
    match right {
        Right::Rows(b) if k > 0 => pack_rows(&b[first..], cols, k, n, nr, to),
        Right::Columns(b) => pack_columns(&b[first * k..], k, k, n, nr, to),
        Right::Rows(_) => {}
    }
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
