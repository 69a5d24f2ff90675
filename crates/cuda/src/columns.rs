//! Gradients that are sums over rows: of norms' weights, of biases and of sinks. Parts of leaves first, then leaves in the
//! order of the tree.

use program::{Heads, OpKind};
use spec::{DType, NormKind, Result};
use train::{Gradient, Launch};

use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::table::{Parts, Tree, fold, int, not_mine, variant};

/// Columns of a block of column sums, and of one that folds them.
const COLUMNS: usize = 64;
const FOLDED_COLUMNS: usize = 32;

/// Leaves whose sums a block of `fold_columns` can hold.
const FOLDED_LEAVES: usize = 64;

/// Blocks that keep a card busy.
const ENOUGH_BLOCKS: usize = 256;

/// Rows that make one part of a leaf's column sums: at most 128, and fewer where one leaf has few blocks. It must follow
/// from the leaf's shape alone, because the order of sums does.
fn chunk(leaf_rows: usize, cols: usize, least: usize) -> usize {
    let blocks = |chunk: usize| cols.div_ceil(COLUMNS) * leaf_rows.div_ceil(chunk);
    let mut chunk = 128;
    while chunk > least && blocks(chunk) < ENOUGH_BLOCKS {
        chunk /= 2;
    }
    chunk
}

/// The least rows of a part: below it a block has too little to do. A row of heads is many rows.
fn least_chunk(kind: &OpKind) -> usize {
    if matches!(kind, OpKind::HeadNormGradWeight { .. }) { 8 } else { 64 }
}

/// Parts of all leaves among `n` rows, and the rows of one: parts never cross leaves.
pub(crate) fn parts(kind: &OpKind, n: usize, leaves: usize, cols: usize) -> (usize, usize) {
    let chunk = chunk(n / leaves, cols, least_chunk(kind));
    (leaves * (n / leaves).div_ceil(chunk), chunk)
}

/// Gradients that are sums over rows: of norms' weights and of biases.
pub(crate) fn column_sums(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let dy = l.input(0);
    let n = dy.rows;
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let g = l.gradient(0);
    let leaves = Tree::of(g.inner).leaves();
    let dim = match *l.kind() {
        OpKind::HeadNormGradWeight { heads } => heads.dim,
        OpKind::SinkGrad { .. } => l.input(3).len(),
        _ => dy.cols,
    };
    let ((count, chunk), leaf_rows) = (parts(l.kind(), n, leaves, dim), n / leaves);
    let part = |i: usize, dim: usize| l.workspace().part(i * count * dim, count * dim);
    let (name, outs, params) = match *l.kind() {
        OpKind::BiasGrad => {
            let params = Params::new().with(at(d, 0)).with(d.at(part(0, dim)));
            (variant!(l, "bias_dw"), 1, params.with(int(dim)))
        }
        OpKind::NormGradWeight { norm: NormKind::Rms } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(at(d, 2));
            (variant!(l, "rms_norm_dw"), 1, params.with(d.at(part(0, dim))).with(int(dim)))
        }
        OpKind::NormGradWeight { norm: NormKind::Layer } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(at(d, 2));
            let params = params.with(d.at(part(0, dim))).with(d.at(part(1, dim)));
            (variant!(l, "layer_norm_dw"), 2, params.with(int(n)).with(int(dim)))
        }
        OpKind::HeadNormGradWeight { heads: h } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(at(d, 2));
            let params = params.with(d.at(part(0, dim))).with(d.at(part(1, dim)));
            (variant!(l, "qk_norm_dw"), 2, params.with(int(h.q)).with(int(h.kv)).with(int(dim)))
        }
        OpKind::SinkGrad { heads } => {
            let params = (0..4).fold(Params::new(), |p, i| p.with(at(d, i))).with(d.at(part(0, dim)));
            let params =
                params.with(int(l.sequence())).with(int(heads.q)).with(int(own_heads(l, heads, dim)));
            (variant!(l, "sink_dw"), 1, params.with(int(dy.cols / heads.q)))
        }
        _ => not_mine!(l),
    };
    let params = params.with(int(chunk)).with(int(leaf_rows));
    let across = if matches!(l.kind(), OpKind::SinkGrad { .. }) { dim } else { dim.div_ceil(COLUMNS) };
    let grid = [across, count, 1];
    d.start(name, Geometry { grid, block: 256, shared_bytes: 0 }, params)?;
    let gradients: Vec<_> = (0..outs).map(|i| l.gradient(i)).collect();
    fold_columns(d, l, &gradients, count / leaves, dim)
}

/// The first of this rank's heads among all: context-parallel ranks have a share of them where they deal heads.
pub(crate) fn own_heads(l: &Launch<'_>, heads: Heads, all: usize) -> usize {
    if all == heads.q { 0 } else { l.ring().0 * heads.q }
}

/// The gradients of the weights of latents' norms, one after the other: rows of latents lie apart.
pub(crate) fn latent_weights(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let outs = l.inputs() - 2;
    let [c, rstd] = [outs, outs + 1].map(|i| l.input(i));
    let queries = if outs > 1 { l.input(1).cols } else { 0 };
    for (i, first) in [queries, 0].into_iter().enumerate().take(outs) {
        let (dy, g) = (l.input(i), l.gradient(i));
        let leaves = Tree::of(g.inner).leaves();
        let ((count, chunk), dim) = (parts(l.kind(), dy.rows, leaves, dy.cols), dy.cols);
        let x = d.at(c) + (first * c.dtype.bytes()) as u64;
        let params = Params::new().with(d.at(dy)).with(x).with(int(c.cols));
        let params = params.with(d.at(rstd) + 4 * i as u64).with(int(outs));
        let params =
            params.with(d.at(l.workspace())).with(int(dim)).with(int(chunk)).with(int(dy.rows / leaves));
        let grid = [dim.div_ceil(COLUMNS), count, 1];
        d.start(variant!(l, "latent_norm_dw"), Geometry { grid, block: 256, shared_bytes: 0 }, params)?;
        fold_columns(d, l, &[g], count / leaves, dim)?;
    }
    Ok(())
}

/// Folds column sums in front of the work space, of one gradient or of two, one after the other.
fn fold_columns(
    d: &mut Cuda,
    l: &Launch<'_>,
    of: &[Gradient<'_>],
    per_leaf: usize,
    dim: usize,
) -> Result<()> {
    let (outs, a, b) = (of.len(), of[0], of[of.len() - 1]);
    let tree = Tree::of(a.inner);
    let len = tree.leaves() * per_leaf * dim;
    if tree.leaves() > FOLDED_LEAVES {
        let leaf = || Parts { stride: per_leaf * dim, parts: per_leaf, part_stride: dim, len: dim };
        return (0..outs)
            .try_for_each(|i| fold(d, "fold_f32", l.workspace().part(i * len, len), leaf(), &of[i]));
    }
    assert!(a.inner == b.inner && [a, b].iter().all(|g| g.rows * g.cols == dim), "gradients of one shape");
    let params = Params::new()
        .with(d.at(l.workspace().part(0, outs * len)))
        .with(int(per_leaf))
        .with(int(dim))
        .with(d.at(a.levels))
        .with(d.at(b.levels))
        .with(tree)
        .with(int(a.merge.merge))
        .with(int(a.merge.store))
        .with(int(b.merge.merge))
        .with(int(b.merge.store));
    let grid = [dim.div_ceil(FOLDED_COLUMNS), outs, 1];
    d.start("fold_columns", Geometry { grid, block: 256, shared_bytes: 0 }, params)
}
