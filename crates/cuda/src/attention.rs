//! Causal attention with grouped queries, in tiles on the card: which variant a head's width takes, and its geometry,
//! which `kernels/attention.cu` and `kernels/attention_grad.cu` state beside their tiles.

use program::{Heads, OpKind, Sees};
use spec::{DType, Result};
use train::{Lack, Launch, Operand};

use crate::columns::own_heads;
use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::table::{int, not_mine, variant};
use crate::tensor_map::TensorMap;

/// Kernels for heads of one width.
#[derive(Clone, Copy)]
struct Variant {
    forward: Tile,
    keys: Tile,
    queries: Tile,
}

/// One kernel: the rows that a block owns, its threads, and its shared memory.
#[derive(Clone, Copy)]
struct Tile {
    name: &'static str,
    /// The same within bounds.
    seen: &'static str,
    rows: usize,
    /// Blocks that share rows, each for some of the columns.
    slices: usize,
    threads: usize,
    shared_bytes: usize,
    /// Beside them within bounds.
    seen_bytes: usize,
    /// Beside those where probabilities are left out.
    drawn_bytes: usize,
}

const fn tile(name: &'static str, rows: usize, slices: usize, threads: usize, shared_bytes: usize) -> Tile {
    Tile { name, seen: name, rows, slices, threads, shared_bytes, seen_bytes: 0, drawn_bytes: 0 }
}

impl Tile {
    /// The kernel within bounds is another, which remembers the draws of its own queries.
    const fn or(self, seen: &'static str) -> Tile {
        Tile { seen, drawn_bytes: DRAWN * self.rows, ..self }
    }

    /// The same for one that goes over queries, and remembers what each of a step's sees, too.
    const fn or_over(self, seen: &'static str, dim: usize) -> Tile {
        let queries = match dim {
            ..=64 => 128,
            65..=128 => 64,
            _ => 32,
        };
        Tile { seen, seen_bytes: size_of::<i32>() * queries, drawn_bytes: DRAWN * queries, ..self }
    }
}

/// Bytes of where the draws of a query begin.
const DRAWN: usize = size_of::<u64>();

macro_rules! bf16_variant {
    ($d:literal, $name:literal, ($rows:expr, $fb:expr), ($keys:expr, $slices:expr, $threads:expr, $kb:expr),
     ($queries:expr, $qb:expr)) => {
        Variant {
            forward: tile(concat!("attention_fwd_bf16_d", $name), $rows, 1, 128, $fb)
                .or(concat!("attention_fwd_seen_bf16_d", $name)),
            keys: tile(concat!("attention_bwd_dkv_bf16_d", $name), $keys, $slices, $threads, $kb)
                .or_over(concat!("attention_bwd_dkv_seen_bf16_d", $name), $d),
            queries: tile(concat!("attention_bwd_dq_bf16_d", $name), $queries, 1, 128, $qb)
                .or(concat!("attention_bwd_dq_seen_bf16_d", $name)),
        }
    };
    ($d:literal, $rows:expr, $forward:expr, $keys:tt, $qb:expr) => {
        bf16_variant!($d, $d, ($rows, $forward), $keys, ($rows, $qb))
    };
}

impl Variant {
    /// The kernels for a type and the widths of keys and values, if there are any.
    fn of(dtype: DType, (dim, value_dim): (usize, usize)) -> Option<Variant> {
        if dtype != DType::Bf16 {
            return (dim.max(value_dim) <= 256).then(|| Variant::f32(dim, value_dim));
        }
        if dim != value_dim {
            return Some(match (dim, value_dim) {
                (96, 64) => {
                    bf16_variant!(96, "96v64", (128, 48_128), (128, 1, 256, 65_024), (128, 64_512))
                }
                (192, 128) => {
                    bf16_variant!(192, "192v128", (128, 93_184), (64, 1, 128, 84_480), (64, 83_968))
                }
                _ => return None,
            });
        }
        Some(match dim {
            16 => bf16_variant!(16, 128, 12_288, (128, 1, 128, 25_600), 24_576),
            32 => bf16_variant!(32, 128, 20_480, (128, 1, 128, 41_984), 40_960),
            64 => bf16_variant!(64, 128, 32_768, (128, 1, 128, 66_560), 65_536),
            80 => bf16_variant!(80, 128, 45_056, (128, 1, 256, 68_096), 67_584),
            96 => bf16_variant!(96, 128, 53_248, (128, 1, 256, 80_384), 79_872),
            128 => bf16_variant!(128, 128, 65_536, (128, 1, 256, 98_816), 98_304),
            256 => bf16_variant!(256, 64, 65_536, (64, 2, 128, 98_560), 98_304),
            _ => return None,
        })
    }

    /// Those of Hopper's own products, which few persistent blocks go through.
    fn wide(d: &Cuda, l: &Launch<'_>, heads: Heads) -> Option<Variant> {
        if !d.hopper || l.precision() != DType::Bf16 {
            return None;
        }
        Some(match heads.dim {
            _ if heads.dim != heads.value_dim => return None,
            64 => Variant {
                forward: tile("attention_fwd_wgmma_bf16_d64", 192, 1, 512, 90_240),
                keys: tile("attention_bwd_dkv_wgmma_bf16_d64", 128, 1, 384, 83_584),
                queries: tile("attention_bwd_dq_wgmma_bf16_d64", 128, 1, 384, 82_048),
            },
            128 => Variant {
                forward: tile("attention_fwd_wgmma_bf16_d128", 128, 1, 384, 163_968),
                keys: tile("attention_bwd_dkv_wgmma_bf16_d128", 128, 1, 384, 165_504),
                queries: tile("attention_bwd_dq_wgmma_bf16_d128", 128, 1, 384, 163_968),
            },
            _ => return None,
        })
    }

    fn f32(dim: usize, value_dim: usize) -> Variant {
        let (row, value_row) = (32 * (dim + 1), 32 * (value_dim + 1));
        let (forward, back) = (4 * (2 * row + value_row + 32 * 33), 4 * (2 * row + 2 * value_row + 64 * 33));
        Variant {
            forward: tile("attention_fwd_f32", 32, 1, 256, forward),
            keys: tile("attention_bwd_dkv_f32", 32, 1, 256, back),
            queries: tile("attention_bwd_dq_f32", 32, 1, 256, back),
        }
    }
}

/// Which probabilities are left out at random, as `kernels/dropout.h` has it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Drops {
    numbers: u64,
    site: u64,
    sequence0: i32,
    head0: i32,
    cut: u32,
    factor: f32,
}

impl Drops {
    const NONE: Drops = Drops { numbers: 0, site: 0, sequence0: 0, head0: 0, cut: 0, factor: 1.0 };

    pub(crate) fn of(d: &Cuda, l: &Launch<'_>, sees: Sees) -> Drops {
        sees.dropout.map_or(Drops::NONE, |drops| {
            let of = kernels::Dropout { key: drops.site, rate: drops.rate };
            Drops {
                numbers: d.numbers(),
                site: of.key,
                sequence0: int(l.place(0).0),
                head0: int(drops.head0),
                cut: of.cut(),
                factor: of.factor(),
            }
        })
    }

    fn any(self) -> bool {
        self.numbers != 0
    }
}

/// What bounds the keys that queries see, and what else is asked of a softmax, as `kernels/sight.h` has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sight {
    window: i32,
    starts: u64,
    sinks: u64,
    maxima: u64,
    drops: Drops,
}

impl Sight {
    /// With the operands that say so, which follow `first` others. A derivative has the sinks in its sums.
    fn of(d: &Cuda, l: &Launch<'_>, sees: Sees, first: usize) -> Sight {
        let derivative = matches!(l.kind(), OpKind::AttentionGrad { .. });
        let sinks = sees.sinks && !derivative;
        let maxima = matches!(l.kind(), OpKind::Attention { .. }) && l.outputs() > 2;
        Sight {
            window: int(sees.window.unwrap_or(0)),
            starts: if sees.documents { d.at(l.input(first)) } else { 0 },
            sinks: if sinks { own_sinks(d, l, l.input(first + usize::from(sees.documents))) } else { 0 },
            maxima: if maxima { d.at(l.output(2)) } else { 0 },
            drops: Drops::of(d, l, sees),
        }
    }

    /// Whether a kernel that knows nothing of it would do.
    fn is_all(self) -> bool {
        let Sight { window, starts, sinks, maxima, drops } = self;
        window == 0 && starts == 0 && sinks == 0 && maxima == 0 && !drops.any()
    }
}

/// The sinks of this rank's heads among those of all.
fn own_sinks(d: &Cuda, l: &Launch<'_>, all: Operand) -> u64 {
    let OpKind::Attention { heads, .. } = *l.kind() else { return d.at(all) };
    d.at(all) + (own_heads(l, heads, all.len()) * all.dtype.bytes()) as u64
}

/// A map of the rows of whole sequences.
fn map(d: &Cuda, of: Operand, sequence: usize) -> Result<TensorMap> {
    TensorMap::of_leaves(d.at(of), of.rows / sequence, sequence, of.cols)
}

impl Tile {
    /// No more blocks than the card runs at once; each takes tile after tile.
    fn persistent(&self, d: &Cuda, sequence: usize, heads: usize, sequences: usize) -> Geometry {
        let tiles = sequence.div_ceil(self.rows) * heads * sequences;
        let blocks = tiles.min(d.processors());
        Geometry { grid: [blocks, 1, 1], block: self.threads, shared_bytes: self.shared_bytes }
    }

    fn geometry(&self, sequence: usize, heads: usize, sequences: usize) -> Geometry {
        let grid = [sequence.div_ceil(self.rows) * self.slices, heads, sequences];
        Geometry { grid, block: self.threads, shared_bytes: self.shared_bytes }
    }
}

/// Whether there are kernels for heads of this width.
pub(crate) fn can_run(dtype: DType, heads: Heads) -> Result<(), Lack> {
    Variant::of(dtype, (heads.dim, heads.value_dim)).map(|_| ()).ok_or(Lack::HeadWidth)
}

/// Heads, and what scores are multiplied by; their widths too where the kernel is not made for one.
fn shape(p: Params, l: &Launch<'_>, h: Heads) -> Params {
    let p = p.with(int(l.sequence())).with(int(h.q)).with(int(h.kv));
    let p = if l.precision() == DType::Bf16 { p } else { p.with(int(h.dim)).with(int(h.value_dim)) };
    p.with(h.scale())
}

fn variant_of(l: &Launch<'_>, h: Heads) -> Result<Variant> {
    Variant::of(l.precision(), (h.dim, h.value_dim))
        .ok_or_else(|| spec::Error::failure(format!("no attention for heads of {} elements", h.dim)))
}

pub(crate) fn forward(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::Attention { heads, sees } = *l.kind() else { not_mine!(l) };
    let qkv = l.input(0);
    let sequences = qkv.rows / l.sequence();
    let sight = Sight::of(d, l, sees, 1);
    if let Some(Variant { forward, .. }) = Variant::wide(d, l, heads).filter(|_| sight.is_all()) {
        let params = Params::new().with(map(d, qkv, l.sequence())?);
        let params = params.with(d.at(l.output(0))).with(d.at(l.output(1))).with(int(sequences));
        let geometry = forward.persistent(d, l.sequence(), heads.q, sequences);
        return d.start(forward.name, geometry, shape(params, l, heads));
    }
    let tile = variant_of(l, heads)?.forward;
    let params = Params::new().with(d.at(qkv)).with(d.at(l.output(0))).with(d.at(l.output(1)));
    let geometry = tile.geometry(l.sequence(), heads.q, sequences);
    bounded(d, l, tile, geometry, (shape(params, l, heads), sight))
}

/// Starts a kernel, or its like within bounds. That of float32 is one for both.
fn bounded(
    d: &mut Cuda,
    l: &Launch<'_>,
    tile: Tile,
    g: Geometry,
    (params, sight): (Params, Sight),
) -> Result<()> {
    if l.precision() == DType::Bf16 && sight.is_all() {
        return d.start(tile.name, g, params);
    }
    let drawn = if sight.drops.any() { tile.drawn_bytes } else { 0 };
    let shared_bytes = g.shared_bytes + tile.seen_bytes + drawn;
    d.start(tile.seen, Geometry { shared_bytes, ..g }, params.with(sight))
}

pub(crate) fn backward(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::AttentionGrad { heads, sees } = *l.kind() else { not_mine!(l) };
    let sight = Sight::of(d, l, sees, 4);
    let [qkv, lse, dy] = [0, 2, 3].map(|i| l.input(i));
    let (n, sequence) = (qkv.rows, l.sequence());
    prepare(d, l, heads)?;
    let delta = dots(l, heads);
    if let Some(Variant { keys, queries, .. }) = Variant::wide(d, l, heads).filter(|_| sight.is_all()) {
        for (tile, per) in [(keys, heads.kv), (queries, heads.q)] {
            let params = Params::new().with(map(d, qkv, sequence)?).with(map(d, dy, sequence)?);
            let params = params.with(d.at(lse)).with(d.at(delta)).with(d.at(l.output(0)));
            let geometry = tile.persistent(d, sequence, per, n / sequence);
            d.start(tile.name, geometry, shape(params.with(int(n / sequence)), l, heads))?;
        }
        return Ok(());
    }
    let Variant { keys, queries, .. } = variant_of(l, heads)?;
    for (tile, per) in [(keys, heads.kv), (queries, heads.q)] {
        let params = Params::new().with(d.at(qkv)).with(d.at(dy)).with(d.at(lse)).with(d.at(delta));
        let params = shape(params.with(d.at(l.output(0))), l, heads);
        bounded(d, l, tile, tile.geometry(sequence, per, n / sequence), (params, sight))?;
    }
    Ok(())
}

/// Where a derivative has, for each query, the dot product of output and output gradient.
pub(crate) fn dots(l: &Launch<'_>, heads: Heads) -> Operand {
    l.workspace().part(0, l.input(0).rows * heads.q)
}

/// Puts them there.
pub(crate) fn prepare(d: &mut Cuda, l: &Launch<'_>, heads: Heads) -> Result<()> {
    let (n, o, dy) = (l.input(0).rows, l.input(1), l.input(3));
    let params = Params::new().with(d.at(o)).with(d.at(dy)).with(d.at(dots(l, heads)));
    let params = params.with(int(n)).with(int(l.sequence())).with(int(heads.q)).with(int(heads.value_dim));
    d.start(variant!(l, "attention_bwd_prep"), Geometry::line((n * heads.q).div_ceil(32), 256), params)
}

/// Appends the token's keys and values to the layer's cache and attends over all of it so far.
pub(crate) fn decode(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::AttentionCached { heads, sees, .. } = *l.kind() else { not_mine!(l) };
    let sight = Sight::of(d, l, sees, 1);
    let params = Params::new()
        .with(d.at(l.input(0)))
        .with(d.at(l.output(1)))
        .with(d.at(l.output(2)))
        .with(d.at(l.output(0)))
        .with(0u64)
        .with(int(l.turn.position))
        .with(int(heads.q))
        .with(int(heads.kv))
        .with(int(heads.dim))
        .with(heads.scale())
        .with(sight);
    d.start(variant!(l, "attention_decode"), Geometry::line(heads.q, 256), params)
}
