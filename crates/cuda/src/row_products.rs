//! Forward products and gradients of inputs by our own kernels: a row's bits depend on nothing beside it.

use spec::{DType, Result};

use crate::device::Cuda;
use crate::gemm::{Form, Operands, Shape};
use crate::module::{Geometry, Params};
use crate::table::int;
use crate::tensor_map::TensorMap;

/// Rows of a tile, as `kernels/gemm_wgmma.cu` has them.
pub(crate) const ROWS: usize = 128;
/// Rows of a box of a weight that is read along its columns.
const WEIGHT_ROWS: usize = 64;
/// Threads of a block.
pub(crate) const THREADS: usize = 384;

/// Columns of a tile, and bytes of shared memory of a block, for each width that there is.
pub(crate) const WIDTHS: [(usize, usize); 3] = [(256, 196_672), (192, 204_880), (128, 196_704)];

/// A width of tiles, with its kernels and what we expect of it.
struct Tile {
    forward: &'static str,
    grad_input: &'static str,
    cols: usize,
    shared_bytes: usize,
    /// 10^12 operations a second on one multiprocessor.
    tflops: f64,
}

const fn tile(i: usize, forward: &'static str, grad_input: &'static str, tflops: f64) -> Tile {
    let (cols, shared_bytes) = WIDTHS[i];
    Tile { forward, grad_input, cols, shared_bytes, tflops }
}

const TILES: [Tile; 3] = [
    tile(0, "gemm_nt_bf16_128x256", "gemm_nn_bf16_128x256", 5.4),
    tile(1, "gemm_nt_bf16_128x192", "gemm_nn_bf16_128x192", 5.3),
    tile(2, "gemm_nt_bf16_128x128", "gemm_nn_bf16_128x128", 4.9),
];

/// Whether the kernels take a weight, so that all splits of a batch take the same way: in bf16 on Hopper, with rows of
/// whole 16 bytes; in float32 always.
pub(crate) fn takes(dtype: DType, hopper: bool, out: usize, in_: usize) -> bool {
    dtype == DType::F32 || hopper && out.is_multiple_of(8) && in_.is_multiple_of(8)
}

/// Puts a product on the device's stream.
///
/// # Errors
/// If the driver refuses.
pub(crate) fn launch(d: &mut Cuda, s: &Shape, o: &Operands) -> Result<()> {
    let forward = s.form == Form::Forward;
    let (cols, inner) = if forward { (s.out, s.in_) } else { (s.in_, s.out) };
    let processors = d.processors();
    if s.dtype == DType::F32 {
        return float(d, s, o, cols, inner);
    }
    let tiles = |t: &Tile| s.n.div_ceil(ROWS) * cols.div_ceil(t.cols);
    // All widths give the same bits: the one that should take least time.
    let cost = |t: &Tile| tiles(t).div_ceil(processors) as f64 * t.cols as f64 / t.tflops;
    let tile = TILES.iter().min_by(|a, b| cost(a).total_cmp(&cost(b)));
    let tile = tile.unwrap_or_else(|| unreachable!("there are tiles"));
    let weight_rows = if forward { tile.cols } else { WEIGHT_ROWS };
    let params = Params::new()
        .with(TensorMap::of_rows(o.first, s.n, inner, ROWS)?)
        .with(TensorMap::of_rows(o.second, s.out, s.in_, weight_rows)?)
        .with(o.result)
        .with(if s.acc { o.acc } else { 0 })
        .with(if s.bias { o.bias } else { 0 })
        .with(int(s.n))
        .with(int(cols))
        .with(int(inner))
        .with(cols as i64);
    let grid = [tiles(tile).min(processors), 1, 1];
    let name = if forward { tile.forward } else { tile.grad_input };
    d.start(name, Geometry { grid, block: THREADS, shared_bytes: tile.shared_bytes }, params)
}

/// The same in true float32, without tensor cores.
fn float(d: &mut Cuda, s: &Shape, o: &Operands, cols: usize, inner: usize) -> Result<()> {
    let params = Params::new()
        .with(o.first)
        .with(o.second)
        .with(o.result)
        .with(if s.acc { o.acc } else { 0 })
        .with(if s.bias { o.bias } else { 0 })
        .with(int(s.n))
        .with(int(cols))
        .with(int(inner))
        .with(inner as i64)
        .with(cols as i64);
    let tiles = s.n.div_ceil(ROWS) * cols.div_ceil(ROWS);
    let name = if s.form == Form::Forward { "gemm_nt_f32" } else { "gemm_nn_f32" };
    d.start(name, Geometry::line(tiles.min(2 * d.processors()), 256), params)
}
