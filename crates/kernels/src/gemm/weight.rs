//! Weight gradients: dw = dy^T x, one chain per leaf, leaves added in a tree while they are in cache.

use std::ops::Range;

use super::micro::{Tile, tile};
use super::pack::{pack_left, pack_rows};
use super::{KC, LINE, MR, NR, Workspace, task_shape};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::Element;
use crate::tree::{Merge, Step, depth, split, step};

/// The most rows and columns of a task. Both operands are packed per task, so a task must be large in both.
const TASK: (usize, usize) = (192, 384);

/// Scratch floats of one thread: packed left, packed right, one tile or all partial sums, levels of the tree.
fn scratch_len(rows: usize, (mc, nc): (usize, usize), tree: &[u32]) -> [usize; 4] {
    let sums = if rows > KC { mc * nc } else { MR * NR };
    let kc = KC.min(rows);
    [mc * kc, nc * kc, sums, depth(tree) * mc * nc].map(|len| len.next_multiple_of(LINE))
}

/// Floats of workspace for [`weight_gradient`], for any storage type.
pub(crate) fn weight_gradient_workspace_len(
    n: usize,
    ins: usize,
    outs: usize,
    tree: &[u32],
    threads: usize,
) -> usize {
    let (_, rows) = split(n, tree);
    let lens = scratch_len(rows, task_shape(outs, ins, TASK, threads), tree);
    Workspace::room(threads * lens.iter().sum::<usize>())
}

/// Adds dy^T x to the levels of `grad` (each `outs` x `ins`); `dy` is `n` x `outs` and `x` is `n` x `ins`.
pub(crate) fn weight_gradient<T: Element>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    grad: &mut [f32],
    (n, ins, outs): (usize, usize, usize),
    tree: &[u32],
    merge: Merge,
    ws: &mut [f32],
) {
    assert_eq!(dy.len(), n * outs, "output gradient");
    assert_eq!(x.len(), n * ins, "input");
    assert!(grad.len() >= merge.levels() * outs * ins, "gradient levels");
    let (_, rows) = split(n, tree);
    let shape = task_shape(outs, ins, TASK, pool.threads());
    let lens = scratch_len(rows, shape, tree);
    let own_len = lens.iter().sum::<usize>();
    let scratch = Parts::new(Workspace::new(ws).take(pool.threads() * own_len));
    let job = Job { dy, x, grad: &Parts::new(grad), ins, outs, rows, tree, merge };
    let across = ins.div_ceil(shape.1);
    pool.run(outs.div_ceil(shape.0) * across, &|task, thread| {
        let (i, j) = (task / across * shape.0, task % across * shape.1);
        // SAFETY: each thread has its own part and runs one task at a time.
        let own = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
        let (left, rest) = own.split_at_mut(lens[0]);
        let (right, rest) = rest.split_at_mut(lens[1]);
        let (sums, levels) = rest.split_at_mut(lens[2]);
        let scratch = Scratch { left, right, sums, levels };
        job.block(i..outs.min(i + shape.0), j..ins.min(j + shape.1), scratch);
    });
}

struct Scratch<'a> {
    left: &'a mut [f32],
    right: &'a mut [f32],
    sums: &'a mut [f32],
    levels: &'a mut [f32],
}

struct Job<'a, T> {
    dy: &'a [T],
    x: &'a [T],
    grad: &'a Parts<'a, f32>,
    ins: usize,
    outs: usize,
    /// Rows of a leaf.
    rows: usize,
    tree: &'a [u32],
    merge: Merge,
}

impl<T: Element> Job<'_, T> {
    fn block(&self, outs: Range<usize>, ins: Range<usize>, scratch: Scratch<'_>) {
        let Scratch { left, right, sums, levels } = scratch;
        let (tiles_down, tiles_across) = (outs.len().div_ceil(MR), ins.len().div_ceil(NR));
        let level_len = tiles_down * tiles_across * MR * NR;
        for leaf in 0..crate::tree::leaves(self.tree) {
            let at_leaf = step(self.tree, leaf);
            for k0 in (0..self.rows.max(1)).step_by(KC) {
                let kc = KC.min(self.rows - k0);
                let row = leaf * self.rows + k0;
                if kc > 0 {
                    pack_left(&self.dy[row * self.outs + outs.start..], self.outs, kc, outs.len(), left);
                    for (panel, j) in ins.clone().step_by(NR).enumerate() {
                        let to = &mut right[panel * NR * kc..(panel + 1) * NR * kc];
                        pack_rows(&self.x[row * self.ins + j..], self.ins, kc, NR.min(ins.end - j), to);
                    }
                }
                for across in 0..tiles_across {
                    let j = ins.start + across * NR;
                    let n = NR.min(ins.end - j);
                    for down in 0..tiles_down {
                        let i = outs.start + down * MR;
                        let m = MR.min(outs.end - i);
                        let index = across * tiles_down + down;
                        let at = if self.rows > KC { index * MR * NR } else { 0 };
                        let c = &mut sums[at..at + MR * NR];
                        let t = Tile {
                            k: kc,
                            a: left[down * MR * kc..].as_ptr(),
                            a_row: 1,
                            a_col: MR,
                            b: right[across * NR * kc..].as_ptr(),
                            b_row: NR,
                            c: c.as_mut_ptr(),
                            c_row: NR,
                            load: k0 > 0,
                        };
                        // SAFETY: the packed operands hold kc rows of MR and of NR, and `c` MR rows of NR.
                        unsafe { tile(m, n, &t) };
                        if k0 + kc == self.rows {
                            // A tree of one leaf has no levels.
                            let tree = levels.get_mut(index * MR * NR..).unwrap_or_default();
                            match at_leaf {
                                Step::Keep(merge) => keep(c, n, tree, level_len, merge),
                                Step::Root { merge } => {
                                    let at = i * self.ins + j;
                                    let (grad, len) = (self.grad, self.outs * self.ins);
                                    root(
                                        c, m, n, tree, level_len, merge, grad, at, self.ins, len, self.merge,
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

kernel! {
    /// Folds a tile into the levels of the tree of leaves, which are `len` apart.
    fn keep(tile: &[f32], cols: usize, levels: &mut [f32], len: usize, merge: Merge) = |s: S| {
        for i in 0..MR {
            for j in (0..cols).step_by(LANES) {
                let at = i * NR + j;
                let mut r = s.load(&tile[at..at + LANES]);
                for level in 0..merge.merge {
                    r = s.add(s.load(&levels[level * len + at..][..LANES]), r);
                }
                s.store(&mut levels[merge.store * len + at..][..LANES], r);
            }
        }
    }
}

kernel! {
    /// Completes the tree of leaves and folds the result into the levels of the gradient, which are `grad_len` apart.
    fn root(
        tile: &[f32], rows: usize, cols: usize, levels: &[f32], len: usize, tree_merge: usize,
        grad: &Parts<'_, f32>, at: usize, ld: usize, grad_len: usize, merge: Merge,
    ) = |s: S| {
        for i in 0..rows {
            for j in (0..cols).step_by(LANES) {
                let from = i * NR + j;
                let mut r = s.load(&tile[from..from + LANES]);
                for level in 0..tree_merge {
                    r = s.add(s.load(&levels[level * len + from..][..LANES]), r);
                }
                let to = at + i * ld + j;
                let n = LANES.min(cols - j);
                for level in 0..merge.merge {
                    // SAFETY: a tile of the gradient, at every level, belongs to one task.
                    let g = unsafe { grad.part(level * grad_len + to..level * grad_len + to + n) };
                    r = s.add(s.load(g), r);
                }
                // SAFETY: as above.
                let g = unsafe { grad.part(merge.store * grad_len + to..merge.store * grad_len + to + n) };
                s.store(g, r);
            }
        }
    }
}
