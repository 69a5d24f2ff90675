//! Attention over sequences that several ranks hold: what a rank of a ring does between two messages, and rows that are
//! dealt so that each rank attends to whole sequences with its share of the heads.

use program::{Heads, OpKind, Sees};
use spec::{DType, Result};
use train::{Lack, Launch, Operand, Part};

use crate::attention::{self, Drops};
use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::table::{add_into, by_row, int, not_mine, variant};

/// Rows of a block, and of a step.
const ROWS: usize = 32;

/// Widths of heads, as `kernels/contexts.cu` has them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Widths {
    heads: i32,
    kv_heads: i32,
    dim: i32,
    value_dim: i32,
}

impl From<Heads> for Widths {
    fn from(h: Heads) -> Widths {
        Widths { heads: int(h.q), kv_heads: int(h.kv), dim: int(h.dim), value_dim: int(h.value_dim) }
    }
}

/// Whose keys the queries of a rank meet, likewise.
#[repr(C)]
#[derive(Clone, Copy)]
struct Met {
    begin: i32,
    keys: i32,
    own: i32,
    half: i32,
    front: i32,
    back: i32,
    of_front: i32,
    of_back: i32,
    window: i32,
    starts: u64,
    drops: Drops,
}

impl Met {
    /// When keys have made so many hops: of a rank whose front piece lies earlier all queries see the front half; of one
    /// whose front piece lies later the back half of the queries sees all.
    fn after(d: &Cuda, l: &Launch<'_>, hop: usize, sees: Sees, starts: usize) -> Met {
        let ((me, ranks), sequence) = (l.ring(), l.sequence());
        let (of, half) = ((me + ranks - hop) % ranks, sequence / 2);
        let places = |rank: usize| (int(rank * half), int((2 * ranks - 1 - rank) * half));
        let ((front, back), (of_front, of_back)) = (places(me), places(of));
        Met {
            begin: int(if of > me { half } else { 0 }),
            keys: int(if of < me { half } else { sequence }),
            own: i32::from(of == me),
            half: int(half),
            front,
            back,
            of_front,
            of_back,
            window: int(sees.window.unwrap_or(0)),
            starts: if sees.documents { d.at(l.input(starts)) } else { 0 },
            drops: Drops::of(d, l, sees),
        }
    }
}

/// Whether there are kernels for heads of this width.
pub(crate) fn can_run(dtype: DType, heads: Heads) -> Result<(), Lack> {
    // What comes before the derivative takes eight elements of bf16 at a time.
    let odd = dtype == DType::Bf16 && !heads.value_dim.is_multiple_of(8);
    if heads.dim.max(heads.value_dim) > 256 || odd { Err(Lack::HeadWidth) } else { Ok(()) }
}

fn tiles(l: &Launch<'_>, heads: usize, h: Heads, back: bool) -> Geometry {
    let (row, value_row) = (ROWS * (h.dim + 1), ROWS * (h.value_dim + 1));
    let sequences = l.input(0).rows / l.sequence();
    let floats = 2 * row + if back { 2 * value_row + 64 * 33 } else { value_row + 32 * 33 };
    Geometry { grid: [l.sequence().div_ceil(ROWS), heads, sequences], block: 256, shared_bytes: 4 * floats }
}

/// One of several equal parts of an operand.
fn half_of(of: Operand, i: usize, parts: usize) -> Operand {
    let len = of.len() / parts;
    of.part(i * len, len)
}

/// Copies keys and values to where they are sent from.
fn pack(d: &mut Cuda, l: &Launch<'_>, h: Heads, to: Operand) -> Result<()> {
    let qkv = l.input(0);
    let params = Params::new().with(d.at(qkv)).with(d.at(to)).with(Widths::from(h));
    d.start(variant!(l, "ring_pack"), by_row(qkv.rows, h.kv_cols()), params)
}

pub(crate) fn forward(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::RingAttention { heads: h, sees, .. } = *l.kind() else { not_mine!(l) };
    let (qkv, o) = (l.input(0), l.output(0));
    let [tops, keys, sums, totals] = [1, 2, 3, 4].map(|i| l.output(i));
    match l.turn.part {
        Part::Begin => pack(d, l, h, half_of(keys, 0, 2)),
        Part::Hop(hop) => {
            let sinks = if sees.sinks { d.at(l.input(1 + usize::from(sees.documents))) } else { 0 };
            let params = Params::new().with(d.at(qkv)).with(d.at(half_of(keys, hop % 2, 2))).with(sinks);
            let params = params.with(d.at(sums)).with(d.at(tops)).with(d.at(totals)).with(int(l.sequence()));
            let params = params.with(Widths::from(h)).with(h.scale()).with(Met::after(d, l, hop, sees, 1));
            d.start(variant!(l, "ring_fwd"), tiles(l, h.q, h, false), params)
        }
        Part::End => {
            let maxima = if l.outputs() > 5 { d.at(l.output(5)) } else { 0 };
            let params = Params::new().with(d.at(sums)).with(d.at(totals)).with(d.at(tops)).with(maxima);
            let params = params.with(d.at(o)).with(int(l.sequence())).with(Widths::from(h));
            d.start(variant!(l, "ring_end"), by_row(o.rows, o.cols), params)
        }
        Part::Whole | Part::Join(_) => not_mine!(l),
    }
}

pub(crate) fn backward(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::RingAttentionGrad { heads: h, sees, .. } = *l.kind() else { not_mine!(l) };
    let [qkv, lse, dy] = [0, 2, 3].map(|i| l.input(i));
    let [dqkv, keys, dq, grads] = [0, 1, 2, 3].map(|i| l.output(i));
    // Two parts come and go, the last is this rank's own.
    let own = half_of(grads, 2, 3);
    match l.turn.part {
        Part::Begin => {
            // Nothing else has the work space until the ring ends.
            attention::prepare(d, l, h)?;
            pack(d, l, h, half_of(keys, 0, 2))
        }
        Part::Hop(hop) => {
            let delta = attention::dots(l, h);
            // The first to add is the one that they belong to.
            let dkv = if hop == 0 { half_of(grads, 0, 3) } else { own };
            let kv = half_of(keys, hop % 2, 2);
            let met = Met::after(d, l, hop, sees, 4);
            for (name, to, per) in [(variant!(l, "ring_dkv"), dkv, h.kv), (variant!(l, "ring_dq"), dq, h.q)] {
                let params = Params::new().with(d.at(qkv)).with(d.at(kv)).with(d.at(dy)).with(d.at(lse));
                let params = params.with(d.at(delta)).with(d.at(to)).with(int(l.sequence()));
                let params = params.with(Widths::from(h)).with(h.scale()).with(met);
                d.start(name, tiles(l, per, h, true), params)?;
            }
            Ok(())
        }
        Part::Join(hop) => {
            let to = half_of(grads, hop % 2, 3);
            add_into(d, to, own, to)
        }
        Part::End => {
            let home = half_of(grads, l.ring().1 % 2, 3);
            let params = Params::new().with(d.at(dq)).with(d.at(home)).with(d.at(dqkv));
            let params = params.with(h.scale()).with(Widths::from(h));
            d.start(variant!(l, "ring_end_dx"), by_row(dqkv.rows, dqkv.cols), params)
        }
        Part::Whole => not_mine!(l),
    }
}

/// From rows of this rank with all heads to those that every context-parallel rank attends with, and back.
pub(crate) fn deal_heads(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (from, to) = (l.input(0), l.output(0));
    let (name, heads, ranks, width) = match *l.kind() {
        OpKind::SplitHeads { heads, ranks } => (variant!(l, "split_heads"), heads, ranks, to.cols),
        OpKind::JoinHeads { heads, ranks } => (variant!(l, "join_heads"), heads, ranks, from.cols),
        _ => not_mine!(l),
    };
    let params = Params::new().with(d.at(from)).with(d.at(to)).with(int(l.sequence())).with(int(width));
    d.start(name, by_row(to.rows, to.cols), params.with(int(ranks)).with(Widths::from(heads)))
}
