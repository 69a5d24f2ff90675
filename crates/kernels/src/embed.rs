//! Embedding lookup and its gradients.

use crate::gemm::Workspace;
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};
use crate::tree::{MAX_DEPTH, Merge, depth, split};

/// Where the rows of a sequence lie in a table of positions: its front half from one on, the rest from another on.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Rows of a sequence.
    pub seq: usize,
    /// Positions of the first row and of row `seq / 2`.
    pub starts: [usize; 2],
}

impl Places {
    /// Of whole sequences.
    pub fn whole(seq: usize) -> Places {
        Places { seq, starts: [0, seq / 2] }
    }

    fn position(&self, row: usize) -> usize {
        let (row, half) = (row % self.seq, self.seq / 2);
        if row < half { self.starts[0] + row } else { self.starts[1] + row - half }
    }

    /// The row of a sequence that lies at `position`.
    fn row(&self, position: usize) -> Option<usize> {
        let half = self.seq / 2;
        let inside = |start: usize, len: usize| position.checked_sub(start).filter(|i| *i < len);
        inside(self.starts[0], half).or_else(|| Some(half + inside(self.starts[1], self.seq - half)?))
    }

    fn end(&self) -> usize {
        (self.starts[0] + self.seq / 2).max(self.starts[1] + self.seq - self.seq / 2)
    }
}

/// y\[i\] = table\[tokens\[i\] - vocab0\] + pos\[position of row i\] for rows of `dim`. A token outside the table
/// (another shard's) gives 0 in place of its row; `pos`, if any, is `[positions, dim]`.
pub fn embed<T: Storage>(
    pool: &Pool,
    tokens: &[u32],
    table: &[T],
    vocab0: usize,
    pos: Option<&[T]>,
    places: Places,
    y: &mut [T],
    dim: usize,
) {
    let vocab = table.len().checked_div(dim).unwrap_or(0);
    assert!(table.len() == vocab * dim && y.len() == tokens.len() * dim && places.seq > 0);
    assert!(
        pos.is_none_or(|pos| tokens.len() < places.seq || pos.len() >= places.end() * dim),
        "position table"
    );
    let y = Parts::new(y);
    pool.rows(tokens.len(), dim, &|rows, _| {
        for row in rows {
            // SAFETY: tasks have disjoint rows.
            let y = unsafe { y.part(row * dim..(row + 1) * dim) };
            let at = (tokens[row] as usize).checked_sub(vocab0).filter(|&at| at < vocab);
            let word = at.map(|at| &table[at * dim..(at + 1) * dim]);
            let place = pos.map(|pos| &pos[places.position(row) * dim..][..dim]);
            match (word, place) {
                (Some(word), None) => y.copy_from_slice(word),
                (None, Some(place)) => y.copy_from_slice(place),
                (None, None) => y.fill(T::default()),
                (Some(word), Some(place)) => add_rows(word, place, y),
            }
        }
    });
}

kernel! { fn add_rows[T: Element](a: &[T], b: &[T], y: &mut [T]) = |s: S| {
    for j in (0..y.len()).step_by(LANES) {
        let sum = s.add(T::get(s, &a[j..]), T::get(s, &b[j..]));
        T::put(s, &mut y[j..], sum);
    }
} }

kernel! { fn accumulate[T: Element](x: &[T], sums: &mut [f32]) = |s: S| {
    for j in (0..sums.len()).step_by(LANES) {
        let sum = s.add(s.load(&sums[j..]), T::get(s, &x[j..]));
        s.store(&mut sums[j..], sum);
    }
} }

/// The gradient of the table of [`embed`] into the levels of `grad`, `[levels, vocab_rows, dim]`.
///
/// Order as for [`crate::linear_dw`]: a row's chain in a leaf runs over its tokens in order; a row that a leaf does
/// not mention counts as +0 there.
pub fn embed_grad<T: Storage>(
    pool: &Pool,
    tokens: &[u32],
    vocab0: usize,
    vocab_rows: usize,
    dy: &[T],
    grad: &mut [f32],
    dim: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    let n = tokens.len();
    let (_, rows) = split(n, tree);
    assert!(dy.len() == n * dim && n < u32::MAX as usize, "output gradient");
    assert!(grad.len() >= m.levels() * vocab_rows * dim, "gradient levels");
    let mut ws = Workspace::new(ws);
    let index: &mut [u32] = bytemuck::cast_slice_mut(ws.take(n + vocab_rows + 1));
    let (starts, order) = index.split_at_mut(vocab_rows + 1);
    sort_by_row(tokens, vocab0, starts, order);
    let own_len = (depth(tree) + 1) * dim;
    let scratch = Parts::new(ws.take(pool.threads() * own_len));
    let grad = Parts::new(grad);
    pool.rows(vocab_rows, (1 + m.merge) * dim, &|range, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        for row in range {
            let list = &order[starts[row] as usize..starts[row + 1] as usize];
            let any = sum_tree(tree, rows, list, own, dim, &|at, sums| {
                accumulate(&dy[at * dim..(at + 1) * dim], sums);
            });
            let sums = &mut own[depth(tree) * dim..];
            if !any {
                sums.fill(0.0);
            }
            // SAFETY: tasks have disjoint rows of the table.
            unsafe { put(&grad, vocab_rows * dim, row * dim, sums, m) };
        }
    });
}

/// Floats of workspace for [`embed_grad`] of `n` tokens.
pub fn embed_grad_workspace_len(
    n: usize,
    vocab_rows: usize,
    dim: usize,
    tree: &[u32],
    threads: usize,
) -> usize {
    Workspace::room(n + vocab_rows + 1) + Workspace::room(threads * (depth(tree) + 1) * dim)
}

/// Lists the positions of each row's tokens in order: row r's are `order[starts[r]..starts[r + 1]]`.
fn sort_by_row(tokens: &[u32], vocab0: usize, starts: &mut [u32], order: &mut [u32]) {
    let rows = starts.len() - 1;
    let row_of = |token: u32| (token as usize).checked_sub(vocab0).filter(|&row| row < rows);
    starts.fill(0);
    for row in tokens.iter().filter_map(|&token| row_of(token)) {
        starts[row] += 1;
    }
    let mut end = 0;
    for start in starts.iter_mut() {
        end += *start;
        *start = end;
    }
    // Filled from the back, each start ends up at its row's first position.
    for (at, &token) in tokens.iter().enumerate().rev() {
        if let Some(row) = row_of(token) {
            starts[row] -= 1;
            order[starts[row] as usize] = at as u32;
        }
    }
}

/// Sums over `list`, ascending positions, in the order of the tree whose leaves have `rows` positions each. The
/// result is in the last `dim` floats of `levels`; false if the list is empty.
///
/// A subtree without a position would be +0, and no sum that starts from +0 is ever -0, so leaving it out is exact.
fn sum_tree(
    tree: &[u32],
    rows: usize,
    list: &[u32],
    levels: &mut [f32],
    dim: usize,
    add: &dyn Fn(usize, &mut [f32]),
) -> bool {
    let Some(radix) = tree.last().map(|&radix| radix as usize) else {
        let sums = &mut levels[..dim];
        sums.fill(0.0);
        list.iter().for_each(|&at| add(at as usize, sums));
        return !list.is_empty();
    };
    let below = &tree[..tree.len() - 1];
    if radix == 1 {
        return sum_tree(below, rows, list, levels, dim, add);
    }
    let child_rows = rows * crate::tree::leaves(below);
    let (lower, sums) = levels.split_at_mut(depth(below).saturating_add(1) * dim);
    let sums = &mut sums[..dim];
    let mut any = false;
    let mut rest = list;
    while let Some(&first) = rest.first() {
        let child = first as usize / child_rows;
        let here = rest.partition_point(|&at| (at as usize) < (child + 1) * child_rows);
        sum_tree(below, rows, &rest[..here], lower, dim, add);
        rest = &rest[here..];
        let part = &lower[depth(below) * dim..];
        if any {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        } else {
            sums.copy_from_slice(part);
        }
        any = true;
    }
    any
}

/// Folds `r` into the levels of a gradient that are `len` apart, at offset `at`.
///
/// # Safety
/// Nothing else uses these elements of any level.
unsafe fn put(grad: &Parts<'_, f32>, len: usize, at: usize, r: &mut [f32], m: Merge) {
    for level in 0..m.merge {
        // SAFETY: by contract.
        let level = unsafe { grad.part(level * len + at..level * len + at + r.len()) };
        r.iter_mut().zip(level).for_each(|(r, level)| *r += *level);
    }
    // SAFETY: by contract.
    unsafe { grad.part(m.store * len + at..m.store * len + at + r.len()) }.copy_from_slice(r);
}

/// The gradient of the positions of [`embed`] into the levels of `grad`, `[levels, positions, dim]`; order as for
/// [`embed_grad`]. Positions that no row has get +0.
pub fn pos_grad<T: Storage>(
    pool: &Pool,
    dy: &[T],
    grad: &mut [f32],
    positions: usize,
    places: Places,
    dim: usize,
    tree: &[u32],
    m: Merge,
    ws: &mut [f32],
) {
    let seq = places.seq;
    let n = dy.len().checked_div(dim).unwrap_or(0);
    let (_, rows) = split(n, tree);
    assert!(dy.len() == n * dim && seq > 0 && (n < seq || places.end() <= positions), "output gradient");
    assert!(grad.len() >= m.levels() * positions * dim, "gradient levels");
    let own_len = (depth(tree) + 1) * dim;
    let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
    let grad = Parts::new(grad);
    pool.rows(positions, dim * (n / seq).max(1), &|range, thread| {
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        for position in range {
            let row = places.row(position).unwrap_or(seq);
            let sums = sum_position(dy, row, seq, rows, dim, tree, own);
            // SAFETY: tasks have disjoint positions.
            unsafe { put(&grad, positions * dim, position * dim, sums, m) };
        }
    });
}

/// Floats of workspace for [`pos_grad`].
pub fn pos_grad_workspace_len(dim: usize, tree: &[u32], threads: usize) -> usize {
    Workspace::room(threads * (depth(tree) + 1) * dim)
}

/// The sum over the rows of one position, row `position` of each sequence if below `seq`, in the order of the tree.
fn sum_position<'a, T: Element>(
    dy: &[T],
    position: usize,
    seq: usize,
    rows: usize,
    dim: usize,
    tree: &[u32],
    own: &'a mut [f32],
) -> &'a mut [f32] {
    use crate::tree::{Step, leaves, step};
    debug_assert!(depth(tree) <= MAX_DEPTH);
    let (sums, levels) = own.split_at_mut(dim);
    for leaf in 0..leaves(tree) {
        sums.fill(0.0);
        let range = leaf * rows..(leaf + 1) * rows;
        let skip = if position < seq { (seq + position - range.start % seq) % seq } else { rows };
        for row in range.skip(skip).step_by(seq) {
            accumulate(&dy[row * dim..(row + 1) * dim], sums);
        }
        let (merge, store) = match step(tree, leaf) {
            Step::Keep(m) => (m.merge, Some(m.store)),
            Step::Root { merge } => (merge, None),
        };
        for level in 0..merge {
            sums.iter_mut().zip(&levels[level * dim..(level + 1) * dim]).for_each(|(r, level)| *r += level);
        }
        if let Some(store) = store {
            levels[store * dim..(store + 1) * dim].copy_from_slice(sums);
        }
    }
    sums
}
