//! Latent attention around its products: norms of the latents, and packing of queries, keys and values.

use program::{Heads, OpKind};
use spec::{DType, Result};
use train::Launch;

use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::table::{by_row, int, not_mine, variant};

/// Widths of a row's projections, as `kernels/latent.cu` has them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Latents {
    queries: i32,
    kv: i32,
    shared: i32,
}

impl Latents {
    fn of([queries, kv, shared]: [usize; 3]) -> Latents {
        Latents { queries: int(queries), kv: int(kv), shared: int(shared) }
    }
}

pub(crate) fn norm(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let out = |d: &Cuda, i: usize| d.at(l.output(i));
    let (name, rows, widths, params) = match *l.kind() {
        OpKind::LatentNorm { eps } => {
            let deep = l.outputs() > 3;
            let widths = [if deep { l.output(3).cols } else { 0 }, l.output(0).cols, l.output(1).cols];
            let wq = if deep { at(d, 2) } else { 0 };
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(wq).with(out(d, 0)).with(out(d, 1));
            let params = params.with(if deep { out(d, 3) } else { 0 }).with(out(d, 2));
            (variant!(l, "latent_norm"), l.input(0).rows, widths, params.with(Latents::of(widths)).with(eps))
        }
        OpKind::LatentNormGradInput => {
            // With a latent of queries there is one gradient more in front, and its weight behind.
            let deep = l.inputs() > 5;
            let more = usize::from(deep);
            let widths = [if deep { l.input(2).cols } else { 0 }, l.input(0).cols, l.input(1).cols];
            let (dqueries, wq) = if deep { (at(d, 2), at(d, 6)) } else { (0, 0) };
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(dqueries).with(at(d, 2 + more));
            let params = params.with(at(d, 3 + more)).with(wq).with(at(d, 4 + more)).with(out(d, 0));
            (variant!(l, "latent_norm_dx"), l.input(0).rows, widths, params.with(Latents::of(widths)))
        }
        _ => not_mine!(l),
    };
    let [queries, kv, _] = widths;
    let grid = [rows, 1 + usize::from(queries > 0), 1];
    d.start(name, Geometry { grid, ..by_row(rows, queries.max(kv)) }, params)
}

/// Widths of heads, likewise.
#[repr(C)]
#[derive(Clone, Copy)]
struct LatentHeads {
    heads: i32,
    nope: i32,
    rope: i32,
    value: i32,
}

impl LatentHeads {
    fn of(h: Heads, rope: usize) -> LatentHeads {
        LatentHeads { heads: int(h.q), nope: int(h.dim - rope), rope: int(rope), value: int(h.value_dim) }
    }
}

pub(crate) fn rope(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (rows, first) = (l.input(0).rows, Params::new().with(d.at(l.input(0))));
    match *l.kind() {
        OpKind::LatentRope { heads, rope_dim } => {
            // One token of a generation has the tables' row of its position.
            let from = (4 * l.turn.position * rope_dim / 2) as u64;
            let params = first.with(d.at(l.input(1))).with(d.at(l.input(2)));
            let params = params.with(d.at(l.input(3)) + from).with(d.at(l.input(4)) + from);
            let params = params.with(d.at(l.output(0))).with(int(l.sequence()));
            let name = variant!(l, "latent_rope");
            d.start(name, by_row(rows, heads.packed()), params.with(LatentHeads::of(heads, rope_dim)))
        }
        OpKind::LatentRopeGrad { heads, rope_dim } => {
            let params = first.with(d.at(l.input(1))).with(d.at(l.input(2)));
            let params = (0..3).fold(params, |p, i| p.with(d.at(l.output(i)))).with(int(l.sequence()));
            let name = variant!(l, "latent_rope_dx");
            d.start(name, by_row(rows, heads.packed()), params.with(LatentHeads::of(heads, rope_dim)))
        }
        _ => not_mine!(l),
    }
}

/// Appends the token's latent and shared key part to the layer's cache and attends over all of it so far.
pub(crate) fn decode(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::LatentCached { heads, sees, rope_dim, .. } = *l.kind() else { not_mine!(l) };
    let (tables, rank, capacity) = (l.inputs() - 2, l.input(1).cols, l.output(1).rows);
    let sinks = if sees.sinks { d.at(l.input(4)) } else { 0 };
    let params = (0..4).fold(Params::new(), |p, i| p.with(d.at(l.input(i)))).with(sinks);
    let params = params.with(d.at(l.input(tables))).with(d.at(l.input(tables + 1)));
    let params = params.with(d.at(l.output(1))).with(d.at(l.output(2))).with(d.at(l.output(0)));
    let params = params.with(d.at(l.workspace())).with(int(capacity)).with(int(l.turn.position));
    let params =
        params.with(int(sees.window.unwrap_or(0))).with(int(rank)).with(LatentHeads::of(heads, rope_dim));
    let geometry = Geometry { grid: [heads.q, 1, 1], block: 256, shared_bytes: 4 * (2 * rank + rope_dim) };
    d.start(variant!(l, "latent_decode"), geometry, params.with(heads.scale()))
}
