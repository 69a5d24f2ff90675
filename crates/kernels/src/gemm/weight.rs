//! Weight gradients: dw = dy^T x, one chain per leaf, leaves added in a tree while they are in cache.

use std::ops::Range;

use super::micro::{Tile, panel, tile};
use super::pack::{pack_all_rows, pack_left};
use super::{KC, LINE, MR, NR, PACKED, Workspace, ask_panel, block, task_shape};
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel, prefetch_far};
use crate::storage::Element;
use crate::tree::{Merge, Step, depth, leaves, split, step};

/// Floats of the right operand packed once for all tasks; 0 if it is too large, and each task packs its part.
fn shared_len(n: usize, ins: usize) -> usize {
    let len = n * ins.next_multiple_of(NR);
    if len <= PACKED { len } else { 0 }
}

/// Scratch floats of one thread: packed left, packed right, one tile or all partial sums, levels of the tree.
fn scratch_len(own_right: bool, rows: usize, (mc, nc): (usize, usize), tree: &[u32]) -> [usize; 4] {
    let kc = KC.min(rows);
    let right = if own_right { nc * kc } else { 0 };
    let sums = if rows > KC { mc * nc } else { MR * NR };
    [mc.next_multiple_of(LANES) * kc, right, sums, depth(tree) * mc * nc]
        .map(|len| len.next_multiple_of(LINE))
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
    let shared = shared_len(n, ins);
    // The shape of one thread is the largest, so that more threads never need less.
    let lens = scratch_len(shared == 0, rows, task_shape(outs, ins, 1), tree);
    Workspace::room(shared) + Workspace::room(threads * lens.iter().sum::<usize>())
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
    let (_, rows) = split(n, tree);
    let of =
        Groups { groups: 1, peers: 1, start: &|unit| unit * n, leaf: &|_, _| rows, into: &|_, _| (0, merge) };
    weight_gradients(pool, dy, x, (grad, outs * ins), of, (ins, outs), (n, rows), tree, ws);
}

/// Whose gradients are summed: those of `groups` weights, each from the rows of `peers`, one after another. Rows lie in the
/// order of units: peers, and of each its groups.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub(crate) groups: usize,
    pub(crate) peers: usize,
    /// Where a unit's rows begin; behind the last unit, where they end.
    pub(crate) start: &'a (dyn Fn(usize) -> usize + Sync),
    /// How many rows each leaf of a unit has.
    pub(crate) leaf: &'a (dyn Fn(usize, usize) -> usize + Sync),
    /// Where the first level of a group's gradient begins that a peer's sum goes to, and how it joins the levels.
    pub(crate) into: &'a (dyn Fn(usize, usize) -> (usize, Merge) + Sync),
}

impl Groups<'_> {
    /// The units of some groups, a group's together.
    fn units(&self, of: Range<usize>) -> impl Iterator<Item = usize> + use<> {
        let (groups, peers) = (self.groups, self.peers);
        of.flat_map(move |group| (0..peers).map(move |peer| peer * groups + group))
    }

    fn len(&self, unit: usize) -> usize {
        (self.start)(unit + 1) - (self.start)(unit)
    }

    /// Rows of some groups.
    fn rows(&self, of: Range<usize>) -> usize {
        self.units(of).map(|unit| self.len(unit)).sum()
    }

    /// Of the groups from `first` on those whose right operands are packed together: one at least.
    fn together(&self, first: usize, ins: usize) -> Range<usize> {
        let fits = |end: &usize| shared_len(self.rows(first..*end), ins) > 0;
        first..(first + 2..=self.groups).take_while(fits).last().unwrap_or(first + 1)
    }
}

/// Floats of workspace for [`weight_gradients`], for up to `most` rows in leaves of up to `rows`.
pub(crate) fn weight_gradients_workspace_len(
    (most, rows): (usize, usize),
    ins: usize,
    outs: usize,
    tree: &[u32],
    threads: usize,
) -> usize {
    let (shared, shape) = (most_shared(most, ins), task_shape(outs, ins, 1));
    let own = scratch_len(shared != most * ins.next_multiple_of(NR), rows, shape, tree).iter().sum::<usize>();
    Workspace::room(shared) + Workspace::room(threads * own)
}

/// The most floats of a right operand of up to `most` rows that are packed once for all tasks.
fn most_shared(most: usize, ins: usize) -> usize {
    PACKED.min(most * ins.next_multiple_of(NR))
}

/// [`weight_gradient`] for many weights at once, in leaves of uneven length, of at most `rows` each and `most` in all.
/// Levels of a gradient are `apart` from each other.
pub(crate) fn weight_gradients<T: Element>(
    pool: &Pool,
    dy: &[T],
    x: &[T],
    (grad, apart): (&mut [f32], usize),
    of: Groups<'_>,
    (ins, outs): (usize, usize),
    (most, rows): (usize, usize),
    tree: &[u32],
    ws: &mut [f32],
) {
    check(dy, x, (&*grad, apart), &of, (ins, outs), rows, tree);
    let shape = task_shape(outs, ins, pool.threads().div_ceil(of.groups.max(1)));
    let mut ws = Workspace::new(ws);
    // Alone, what does not fit is not packed here at all.
    let alone = of.groups * of.peers == 1;
    let room = ws.take(if alone { shared_len(most, ins) } else { most_shared(most, ins) });
    let rest = ws.rest();
    let (grad, nr) = (Parts::new(grad), panel());
    let (wide, across) = (ins.next_multiple_of(nr), ins.div_ceil(shape.1));
    let blocks = outs.div_ceil(shape.0) * across;
    let mut first = 0;
    while first < of.groups {
        let groups = of.together(first, ins);
        first = groups.end;
        let n = of.rows(groups.clone());
        let shared = shared_len(n, ins);
        let packed = &mut room[..shared];
        if shared > 0 {
            pack_units(pool, x, (&of, groups.clone()), (ins, rows), tree, &Parts::new(&mut *packed));
        }
        let packed = &*packed;
        let lens = scratch_len(shared == 0 && n > 0, rows, shape, tree);
        let own_len = lens.iter().sum::<usize>();
        let scratch = Parts::new(Workspace::new(&mut *rest).take(pool.threads() * own_len));
        pool.run(groups.len() * blocks, &|task, thread| {
            let (group, block) = (groups.start + task / blocks, task % blocks);
            let (i, j) = (block / across * shape.0, block % across * shape.1);
            let mut at = of.rows(groups.start..group);
            for (peer, unit) in of.units(group..group + 1).enumerate() {
                // SAFETY: each thread has its own part and runs one task at a time.
                let own = unsafe { scratch.part(thread * own_len..(thread + 1) * own_len) };
                let (left, rest) = own.split_at_mut(lens[0]);
                let (right, rest) = rest.split_at_mut(lens[1]);
                let (sums, levels) = rest.split_at_mut(lens[2]);
                let scratch = Scratch { left, right, sums, levels };
                let (start, (level, merge)) = ((of.start)(unit), (of.into)(group, peer));
                let job = Job {
                    dy: &dy[start * outs..],
                    x: &x[start * ins..],
                    packed: packed.get(at * wide..).unwrap_or_default(),
                    grad: (&grad, level, apart),
                    ins,
                    outs,
                    rows,
                    leaf: &|leaf| (of.leaf)(unit, leaf),
                    tree,
                    merge,
                };
                job.block(i..outs.min(i + shape.0), j..ins.min(j + shape.1), scratch);
                at += of.len(unit);
            }
        });
    }
}

fn check<T>(
    dy: &[T],
    x: &[T],
    (grad, apart): (&[f32], usize),
    of: &Groups<'_>,
    (ins, outs): (usize, usize),
    rows: usize,
    tree: &[u32],
) {
    let n = (of.start)(of.groups * of.peers);
    assert!(dy.len() >= n * outs, "output gradient");
    assert!(x.len() >= n * ins, "input");
    for group in 0..of.groups {
        for (peer, unit) in of.units(group..group + 1).enumerate() {
            let (at, merge) = (of.into)(group, peer);
            assert!(grad.len() >= at + (merge.levels() - 1) * apart + outs * ins, "gradient levels");
            let leaf = |i| (of.leaf)(unit, i);
            assert!((0..leaves(tree)).all(|i| leaf(i) <= rows), "rows of a leaf");
            assert_eq!((0..leaves(tree)).map(leaf).sum::<usize>(), of.len(unit), "rows of all leaves");
        }
    }
}

/// Packs the right operands of some groups, unit after unit, piece by piece.
fn pack_units<T: Element>(
    pool: &Pool,
    x: &[T],
    (of, groups): (&Groups<'_>, Range<usize>),
    (ins, rows): (usize, usize),
    tree: &[u32],
    packed: &Parts<'_, f32>,
) {
    let nr = panel();
    let wide = ins.next_multiple_of(nr);
    let most = leaves(tree) * rows.div_ceil(longest_piece(rows)).max(1);
    pool.run(groups.len() * of.peers * most, &|task, _| {
        let mut units = of.units(groups.clone());
        let before: usize = units.by_ref().take(task / most).map(|unit| of.len(unit)).sum();
        let Some(unit) = units.next() else { return };
        let leaf = |leaf| (of.leaf)(unit, leaf);
        if let Some(Piece { row, len, .. }) = pieces((tree, rows, &leaf)).nth(task % most) {
            let from = &x[((of.start)(unit) + row) * ins..];
            pack_all_rows(from, ins, len, ins, nr, packed, (before + row) * wide, len * nr);
        }
    });
}

/// The leaves of a tree: its radices, the most rows of a leaf, the rows of each.
type Leaves<'a> = (&'a [u32], usize, &'a (dyn Fn(usize) -> usize + Sync));

/// The most rows of a piece where a leaf has up to `rows`.
fn longest_piece(rows: usize) -> usize {
    block(rows, 1, KC).max(1)
}

/// Rows that are taken in at a time: those of some leaves, or a part of one leaf's.
struct Piece {
    leaves: Range<usize>,
    row: usize,
    len: usize,
    is_first: bool,
    is_last: bool,
}

/// The pieces of all leaves in order: every leaf is in one at least, so that an empty one gives zeros. Leaves that fit into
/// a piece together are taken together, so that what they add up in stays in the first-level cache.
fn pieces<'a>((tree, rows, leaf): Leaves<'a>) -> impl Iterator<Item = Piece> + use<'a> {
    let (most, count) = (longest_piece(rows), leaves(tree));
    let (mut at, mut done, mut row) = (0, 0, 0);
    std::iter::from_fn(move || {
        let of = (at < count).then(|| leaf(at))?;
        let (mut len, mut end) = (most.min(of - done), at + 1);
        let (is_first, is_last) = (done == 0, done + len == of);
        while is_first && is_last && end < count && len + leaf(end) <= most {
            (len, end) = (len + leaf(end), end + 1);
        }
        let piece = Piece { leaves: at..end, row, len, is_first, is_last };
        row += len;
        (at, done) = if is_last { (end, 0) } else { (at, done + len) };
        Some(piece)
    })
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
    /// All of `x`, piece by piece in panels, or nothing.
    packed: &'a [f32],
    /// The levels, where the first begins, and how far they are apart.
    grad: (&'a Parts<'a, f32>, usize, usize),
    ins: usize,
    outs: usize,
    /// The most rows of a leaf.
    rows: usize,
    /// The rows of a leaf.
    leaf: &'a (dyn Fn(usize) -> usize + Sync),
    tree: &'a [u32],
    merge: Merge,
}

impl<T: Element> Job<'_, T> {
    fn block(&self, outs: Range<usize>, ins: Range<usize>, scratch: Scratch<'_>) {
        let Scratch { left, right, sums, levels } = scratch;
        let nr = panel();
        let (tiles_down, tiles_across) = (outs.len().div_ceil(MR), ins.len().div_ceil(nr));
        let tiles = tiles_down * tiles_across;
        let (grad, grad_at, apart) = self.grad;
        for piece in pieces((self.tree, self.rows, self.leaf)) {
            let Piece { row, len, .. } = piece;
            let completes = piece.is_last && piece.leaves.end == leaves(self.tree);
            self.pack(row, len, &outs, &ins, left, right);
            for index in 0..tiles {
                let (across, down) = (index / tiles_down, index % tiles_down);
                let (i, j) = (outs.start + down * MR, ins.start + across * nr);
                let shape = (MR.min(outs.end - i), nr.min(ins.end - j));
                let at = if self.rows > KC { index * MR * nr } else { 0 };
                let b = self.right(row, j, across, len, right);
                let grad_at = grad_at + i * self.ins + j;
                self.ask(row + len, len, &outs, index, tiles);
                // The next panel, but for the last.
                ask_panel(b.wrapping_add(len * nr), len * nr, down, tiles_down);
                if completes {
                    for level in (0..self.merge.merge).filter(|&level| level != self.merge.store) {
                        grad.ask(grad_at + level * apart, shape, self.ins);
                    }
                    grad.ask(grad_at + self.merge.store * apart, shape, self.ins);
                }
                // A tree of one leaf has no levels.
                let levels = levels.get_mut(index * MR * nr..).unwrap_or_default();
                let operands = (left[down * len * MR..].as_ptr(), b);
                let sums = &mut sums[at..at + MR * nr];
                self.tile(&piece, operands, shape, sums, (levels, tiles * MR * nr), grad_at);
            }
        }
    }

    /// Takes a piece's rows into a tile of `m` x `n`, leaf by leaf: `a` and `b` hold its operands, and levels of the tree of
    /// leaves are `len` apart.
    fn tile(
        &self,
        piece: &Piece,
        (mut a, mut b): (*const f32, *const f32),
        (m, n): (usize, usize),
        sums: &mut [f32],
        (levels, len): (&mut [f32], usize),
        grad_at: usize,
    ) {
        let (nr, (grad, _, apart)) = (panel(), self.grad);
        for leaf in piece.leaves.clone() {
            let k = if piece.leaves.len() == 1 { piece.len } else { (self.leaf)(leaf) };
            let step = step(self.tree, leaf);
            // A whole leaf that nothing is added to is computed where it stays.
            let stays = match step {
                Step::Keep(Merge { merge: 0, store }) if piece.is_first && piece.is_last => Some(store),
                _ => None,
            };
            let c = match stays {
                Some(store) => &mut levels[store * len..][..MR * nr],
                None => &mut *sums,
            };
            let (load, c_ptr) = (!piece.is_first, c.as_mut_ptr());
            let t = Tile { k, a, a_row: 1, a_col: MR, b, b_row: nr, c: c_ptr, c_row: nr, load };
            // SAFETY: the packed operands hold k rows more with the tile's m and `nr` columns, and `c` MR rows of `nr`.
            unsafe { tile(m, n, &t) };
            (a, b) = (a.wrapping_add(k * MR), b.wrapping_add(k * nr));
            if stays.is_some() || !piece.is_last {
                continue;
            }
            match step {
                Step::Keep(merge) => keep(sums, nr, n, levels, len, merge),
                Step::Root { merge } => {
                    let tree = Levels { levels, len, merge };
                    root(sums, nr, m, n, tree, grad, grad_at, self.ins, apart, self.merge);
                }
            }
        }
    }

    /// Packs `kc` rows from `row` on of the left operand's columns `outs`, and of the right one's if that is not shared.
    fn pack(
        &self,
        row: usize,
        kc: usize,
        outs: &Range<usize>,
        ins: &Range<usize>,
        left: &mut [f32],
        right: &mut [f32],
    ) {
        if kc == 0 {
            return;
        }
        pack_left(&self.dy[row * self.outs + outs.start..], self.outs, kc, outs.len(), left);
        if self.packed.is_empty() {
            let (from, nr) = (&self.x[row * self.ins + ins.start..], panel());
            pack_all_rows(from, self.ins, kc, ins.len(), nr, &Parts::new(right), 0, kc * nr);
        }
    }

    /// The packed right operand from `row` on of the panel at column `j`, the task's panel number `across`.
    fn right(&self, row: usize, j: usize, across: usize, kc: usize, own: &[f32]) -> *const f32 {
        let nr = panel();
        if self.packed.is_empty() {
            own[across * nr * kc..].as_ptr()
        } else {
            self.packed[row * self.ins.next_multiple_of(nr) + j / nr * nr * kc..].as_ptr()
        }
    }

    /// Asks for a share, one of `tiles`, of the next `kc` rows of the left operand, so that packing them does not wait
    /// for memory.
    fn ask(&self, row: usize, kc: usize, outs: &Range<usize>, index: usize, tiles: usize) {
        let share = kc.div_ceil(tiles);
        for row in row + index * share..row + ((index + 1) * share).min(kc) {
            let from = self.dy.as_ptr().wrapping_add(row * self.outs);
            for j in outs.clone().step_by(LANES) {
                prefetch_far(from.wrapping_add(j));
            }
        }
    }
}

/// The levels of the tree of leaves for one tile, `len` apart, of which the first `merge` go into the root.
#[derive(Clone, Copy)]
struct Levels<'a> {
    levels: &'a [f32],
    len: usize,
    merge: usize,
}

kernel! {
    /// Folds a tile into the levels of the tree of leaves, which are `len` apart.
    fn keep(tile: &[f32], nr: usize, cols: usize, levels: &mut [f32], len: usize, merge: Merge) = |s: S| {
        for i in 0..MR {
            for j in (0..cols).step_by(LANES) {
                let at = i * nr + j;
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
        tile: &[f32], nr: usize, rows: usize, cols: usize, tree: Levels<'_>,
        grad: &Parts<'_, f32>, at: usize, ld: usize, grad_len: usize, merge: Merge,
    ) = |s: S| {
        for i in 0..rows {
            for j in (0..cols).step_by(LANES) {
                let from = i * nr + j;
                let mut r = s.load(&tile[from..from + LANES]);
                for level in 0..tree.merge {
                    r = s.add(s.load(&tree.levels[level * tree.len + from..][..LANES]), r);
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
