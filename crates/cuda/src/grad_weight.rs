//! Gradients of weights by our own kernel: all leaves of a launch at once, their tree in registers.

use spec::{DType, Result};
use train::{Launch, Operand};

use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::row_products::{ROWS, THREADS, WIDTHS};
use crate::table::{Tree, int};
use crate::tensor_map::TensorMap;

/// Multiprocessors that work is cut for. Bits do not depend on it.
const PROCESSORS: usize = 132;

/// A width of tiles, with its kernel and what we expect of it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tile {
    name: &'static str,
    cols: usize,
    threads: usize,
    shared_bytes: usize,
    /// Blocks on one multiprocessor.
    blocks: usize,
    /// The lowest level of the tree is in registers.
    holds: bool,
    /// 10^12 operations a second of a block.
    tflops: f64,
}

const fn bf16(i: usize, name: &'static str, holds: bool, tflops: f64) -> Tile {
    let (cols, shared_bytes) = WIDTHS[i];
    Tile { name, cols, threads: THREADS, shared_bytes, blocks: 1, holds, tflops }
}

const TILES: [Tile; 3] = [
    bf16(0, "gemm_tn_f32_128x256", false, 4.7),
    bf16(1, "gemm_tn_f32_128x192", true, 4.5),
    bf16(2, "gemm_tn_f32_128x128", true, 4.2),
];

/// Of true float32, without tensor cores.
const FLOAT: Tile = Tile {
    name: "gemm_tn_f32",
    cols: 128,
    threads: 256,
    shared_bytes: 0,
    blocks: 2,
    holds: false,
    tflops: 0.15,
};

/// How the leaves of a gradient are shared out among blocks: `units` subtrees beside each other, whose roots are folded
/// by the radices above.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cut {
    tile: Tile,
    below: Vec<u32>,
    above: Vec<u32>,
    units: usize,
}

impl Cut {
    /// The width and the number of units that should take least time.
    pub(crate) fn of(dtype: DType, inner: &[u32], out: usize, in_: usize, leaf_rows: usize) -> Cut {
        let radices: Vec<u32> = inner.iter().copied().filter(|r| *r > 1).collect();
        let depths = 0..=radices.len();
        let tiles: &[Tile] = if dtype == DType::F32 { &[FLOAT] } else { &TILES };
        let cuts = tiles.iter().flat_map(|tile| depths.clone().map(move |above| (*tile, above)));
        let cuts = cuts.map(|(tile, above)| {
            let (below, above) = radices.split_at(radices.len() - above);
            let units = above.iter().map(|r| *r as usize).product();
            Cut { tile, below: below.to_vec(), above: above.to_vec(), units }
        });
        let cost = |cut: &Cut| cut.microseconds(out, in_, leaf_rows);
        cuts.min_by(|a, b| cost(a).total_cmp(&cost(b))).unwrap_or_else(|| unreachable!("there are tiles"))
    }

    fn microseconds(&self, out: usize, in_: usize, leaf_rows: usize) -> f64 {
        let leaves: usize = self.below.iter().map(|r| *r as usize).product();
        let flops = 2.0 * (ROWS * self.tile.cols) as f64 * (leaf_rows * leaves) as f64;
        let waves = (self.tiles(out, in_) * self.units).div_ceil(self.tile.blocks * PROCESSORS) as f64;
        // A leaf's end waits for its last products, and for memory where levels are held there.
        let held = if self.tile.holds || self.below.is_empty() { 1.0 } else { 3.0 };
        let product = waves * (flops / self.tile.tflops / 1e6 + leaves as f64 * held + 2.0);
        // Roots are written, read and added at 3 TB/s.
        let bytes = (4 * out * in_ * (2 * self.units + 2)) as f64;
        product + if self.units > 1 { 3.0 + bytes / 3e6 } else { 0.0 }
    }

    fn tiles(&self, out: usize, in_: usize) -> usize {
        out.div_ceil(ROWS) * in_.div_ceil(self.tile.cols)
    }

    fn blocks(&self, out: usize, in_: usize) -> usize {
        (self.tiles(out, in_) * self.units).min(self.tile.blocks * PROCESSORS)
    }

    /// Floats for the roots of units.
    fn roots_len(&self, len: usize) -> usize {
        if self.units > 1 { self.units * len } else { 0 }
    }

    /// Floats for levels that are not in registers.
    fn held_len(&self, out: usize, in_: usize) -> usize {
        let levels = self.below.len().saturating_sub(usize::from(self.tile.holds));
        levels * self.blocks(out, in_) * ROWS * self.tile.cols
    }

    /// Floats of work space.
    pub(crate) fn workspace_len(&self, out: usize, in_: usize) -> usize {
        self.roots_len(out * in_) + self.held_len(out, in_)
    }
}

/// Puts the gradient on the device's stream.
///
/// # Errors
/// If the driver refuses.
pub(crate) fn launch(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (dy, x, g) = (l.input(0), l.input(1), l.gradient(0));
    let (out, in_, len) = (g.rows, g.cols, g.rows * g.cols);
    let leaves = Tree::of(g.inner).leaves();
    let leaf_rows = dy.rows / leaves;
    let cut = Cut::of(l.precision(), g.inner, out, in_, leaf_rows);
    let roots = l.workspace().part(0, cut.roots_len(len));
    let held = l.workspace().part(cut.roots_len(len), cut.held_len(out, in_));
    let alone = cut.units == 1;
    let (to, merge, store) = if alone { (g.levels, g.merge.merge, g.merge.store) } else { (roots, 0, 0) };
    let params = if l.precision() == DType::F32 {
        Params::new().with(d.at(dy)).with(d.at(x))
    } else {
        let map = |d: &Cuda, of: Operand, cols| TensorMap::of_leaves(d.at(of), leaves, leaf_rows, cols);
        Params::new().with(map(d, dy, out)?).with(map(d, x, in_)?)
    };
    let params = params
        .with(d.at(to))
        .with(len as i64)
        .with(d.at(held))
        .with(int(out))
        .with(int(in_))
        .with(int(leaf_rows))
        .with(Tree::of(&cut.below))
        .with(int(cut.units))
        .with(len as i64)
        .with(int(merge))
        .with(int(store));
    let geometry = Geometry {
        grid: [cut.blocks(out, in_), 1, 1],
        block: cut.tile.threads,
        shared_bytes: cut.tile.shared_bytes,
    };
    d.start(cut.tile.name, geometry, params)?;
    if alone { Ok(()) } else { crate::table::fold_roots(d, roots, &cut.above, &g) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(inner: &[u32], (out, in_): (usize, usize), leaf_rows: usize, units: usize) {
        let cut = Cut::of(DType::Bf16, inner, out, in_, leaf_rows);
        assert_eq!(cut.units, units, "{cut:?}");
        let all: Vec<u32> = cut.below.iter().chain(&cut.above).copied().collect();
        assert_eq!(all, inner.iter().copied().filter(|r| *r > 1).collect::<Vec<_>>());
    }

    #[test]
    fn small_weights_are_cut_and_large_ones_are_not() {
        check(&[], (384, 384), 256, 1);
        check(&[2, 2, 2], (384, 384), 1024, 8);
        check(&[2, 2, 2], (50304, 768), 1024, 1);
        check(&[2, 2], (11264, 2048), 4096, 1);
    }
}
