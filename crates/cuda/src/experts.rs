//! Mixtures of experts. How many rows each expert has is known on the card alone: products take their tiles from counts
//! that lie there, so that the host waits for nothing and a step is recorded as that of any model.

use kernels::Merge;
use program::OpKind;
use spec::{DType, Result};
use train::{Gradient, Launch, Operand, router};

use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::row_products::ROWS;
use crate::table::{Parts, Tree, by_row, fold, int, not_mine, variant};

/// Rows of a block that routes.
const ROUTED: usize = 4;

/// Floats of shared memory that a block may have.
const MOST_SHARED: usize = 48 << 8;

/// What gates are of logits, as `kernels/experts.cu` has it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Router {
    top_k: i32,
    sigmoid: i32,
    renormalise: i32,
    groups: i32,
    top_groups: i32,
    scale: f32,
    balance: f32,
    z: f32,
}

impl From<kernels::Router> for Router {
    fn from(r: kernels::Router) -> Router {
        Router {
            top_k: int(r.top_k),
            sigmoid: i32::from(r.sigmoid),
            renormalise: i32::from(r.renormalise),
            groups: int(r.groups),
            top_groups: int(r.top_groups),
            scale: r.scale,
            balance: r.balance,
            z: r.z,
        }
    }
}

/// Floats of shared memory for the rows of a block.
fn routed_len(experts: usize, r: &spec::Router) -> usize {
    ROUTED * (2 * experts + r.groups)
}

/// Floats of work space for scores of so many rows, if shared memory does not do.
pub(crate) fn route_workspace_len(rows: usize, experts: usize, r: &spec::Router) -> usize {
    let len = routed_len(experts, r);
    if len > MOST_SHARED { rows.div_ceil(ROUTED) * len } else { 0 }
}

pub(crate) fn route(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let out = |d: &Cuda, i: usize| d.at(l.output(i));
    let room = |d: &Cuda| if l.workspace().is_empty() { 0 } else { d.at(l.workspace()) };
    let geometry = |n: usize, experts: usize, r: &spec::Router| Geometry {
        grid: [n.div_ceil(ROUTED), 1, 1],
        block: 32 * ROUTED,
        shared_bytes: if l.workspace().is_empty() { 4 * routed_len(experts, r) } else { 0 },
    };
    match *l.kind() {
        OpKind::Route { top_k, router: ref r } => {
            let (logits, counts) = (l.input(0), l.output(2));
            let (n, experts, leaves) = (logits.rows, logits.cols, counts.cols);
            let biases = if l.inputs() > 1 { at(d, 1) } else { 0 };
            let params = Params::new().with(at(d, 0)).with(biases).with(out(d, 0)).with(out(d, 1));
            let params = params
                .with(int(n))
                .with(int(experts))
                .with(room(d))
                .with(Router::from(router(top_k, r, 0, 0)));
            d.start(variant!(l, "route"), geometry(n, experts, r), params)?;
            ["route_counts", "route_places"].into_iter().try_for_each(|name| {
                let params = Params::new().with(out(d, 1)).with(out(d, 2)).with(int(top_k));
                let params = params.with(int(leaves)).with(int(n / leaves));
                d.start(name, Geometry::line(experts * leaves, 256), params)
            })
        }
        OpKind::RouteGrad { top_k, router: ref r, sequences } => {
            let (logits, counts) = (l.input(1), l.input(3));
            let (n, experts, leaves) = (logits.rows, logits.cols, counts.cols);
            let params = (0..4).fold(Params::new(), |p, i| p.with(at(d, i))).with(out(d, 0));
            let params = params.with(int(n)).with(int(experts)).with(int(leaves));
            let params = params.with(room(d)).with(Router::from(router(top_k, r, sequences, l.context())));
            d.start(variant!(l, "route_dx"), geometry(n, experts, r), params)?;
            let params = Params::new().with(out(d, 1)).with(at(d, 3)).with(int(experts)).with(int(leaves));
            d.start("route_load", Geometry::line(experts.div_ceil(256), 256), params)
        }
        _ => not_mine!(l),
    }
}

/// Moves what experts are chosen by, once a step.
pub(crate) fn balance(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::BalanceExperts { rate } = *l.kind() else { not_mine!(l) };
    let (counts, biases) = (l.input(0), l.output(0));
    let params = Params::new().with(d.at(counts)).with(d.at(biases)).with(int(biases.cols)).with(rate);
    d.start("balance_experts", Geometry::line(biases.rows, 256), params)
}

/// This rank's rows of what every tensor-parallel rank holds.
pub(crate) fn slice(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (from, to) = (l.input(0), l.output(0));
    d.stream.copy(d.at(to), d.at(from), to.bytes())
}

pub(crate) fn permute(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let (x, y) = (l.input(0), l.output(0));
    let acc = |d: &Cuda| l.acc().map_or(0, |acc| d.at(acc));
    let (name, rows, k, params) = match *l.kind() {
        OpKind::Permute { top_k } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(d.at(y));
            (variant!(l, "permute"), x.rows, top_k, params)
        }
        OpKind::PermuteGrad => {
            let params = Params::new().with(at(d, 0)).with(0u64).with(at(d, 1)).with(acc(d)).with(d.at(y));
            (variant!(l, "sum_copies"), l.input(1).rows, l.input(1).cols / 2, params)
        }
        OpKind::Unpermute { top_k } => {
            let params = (0..3).fold(Params::new(), |p, i| p.with(at(d, i))).with(acc(d)).with(d.at(y));
            (variant!(l, "sum_copies"), y.rows, top_k, params)
        }
        OpKind::UnpermuteGrad => {
            let params = (0..4).fold(Params::new(), |p, i| p.with(at(d, i))).with(d.at(y));
            let k = l.input(2).cols;
            (variant!(l, "unpermute_dx"), x.rows * k, k, params.with(d.at(l.output(1))))
        }
        _ => not_mine!(l),
    };
    d.start(name, by_row(rows, x.cols), params.with(int(k)).with(int(x.cols)))
}

/// Floats of work space for where the rows of each unit begin, which are those of one expert from one rank.
pub(crate) fn starts_len(units: usize) -> usize {
    (2 * units + 2).next_multiple_of(64)
}

/// Puts where each unit's rows begin in front of the work space.
fn starts(d: &mut Cuda, l: &Launch<'_>, counts: Operand) -> Result<Operand> {
    let starts = l.workspace().part(0, 2 * counts.rows + 2);
    let params = Params::new().with(d.at(counts)).with(d.at(starts)).with(int(counts.rows));
    let params = params.with(int(counts.cols)).with(int(ROWS));
    d.start("group_starts", Geometry::line(1, 256), params)?;
    Ok(starts)
}

pub(crate) fn grouped_linear(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (x, w, counts, y) = (l.input(0), l.input(1), l.input(2), l.output(0));
    let (name, experts) = match *l.kind() {
        OpKind::GroupedLinear { experts, .. } => (variant!(l, "grouped_nt"), experts),
        OpKind::GroupedLinearGradInput { experts, .. } => (variant!(l, "grouped_nn"), experts),
        _ => not_mine!(l),
    };
    let starts = starts(d, l, counts)?;
    let params = Params::new().with(d.at(x)).with(d.at(w));
    let params = match l.kind() {
        OpKind::GroupedLinear { .. } => params.with(if l.inputs() > 3 { d.at(l.input(3)) } else { 0 }),
        _ => params,
    };
    let params = params.with(d.at(y)).with(d.at(starts)).with(int(counts.rows)).with(int(experts));
    let params = params.with(int(y.cols)).with(int(x.cols));
    // As many tiles as rows can come to, however they fall.
    let tiles = (x.rows / ROWS + counts.rows) * y.cols.div_ceil(ROWS);
    d.start(name, Geometry::line(tiles.min(2 * d.processors()), 256), params)
}

/// Multiprocessors that work is cut for. Bits do not depend on it, and work space must not depend on the card.
const PROCESSORS: usize = 132;

fn grad_weight_blocks(experts: usize, out: usize, in_: usize) -> usize {
    (experts * out.div_ceil(ROWS) * in_.div_ceil(ROWS)).min(2 * PROCESSORS)
}

/// Floats of work space for the gradient of experts' matrices `[out, in_]`, over so many units.
pub(crate) fn grad_weight_workspace_len(
    (units, experts): (usize, usize),
    out: usize,
    in_: usize,
    inner: &[u32],
) -> usize {
    starts_len(units) + grad_weight_blocks(experts, out, in_) * Tree::of(inner).depth() * ROWS * ROWS
}

/// Gradients of experts' matrices and biases: of each expert its rows by leaf, leaves in the order of the tree.
pub(crate) fn grad_weight(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (dy, g) = (l.input(0), l.gradient(0));
    let (len, out) = (g.rows * g.cols, dy.cols);
    // Whose rows come from one rank alone, or in no fixed order, has one counter.
    let apart = if g.streams > 1 { g.levels.rows / (g.rows * g.streams) } else { 0 };
    let end = |p: Params| {
        let p = p.with(Tree::of(g.inner)).with(int(g.merge.merge)).with(int(g.merge.store));
        p.with(int(apart))
    };
    match *l.kind() {
        OpKind::GroupedLinearGradWeight { experts, .. } => {
            let (x, counts) = (l.input(1), l.input(2));
            let starts = starts(d, l, counts)?;
            let (ws, used) = (l.workspace(), starts_len(counts.rows));
            let held = ws.part(used, ws.len() - used);
            let params = Params::new().with(d.at(dy)).with(d.at(x)).with(d.at(counts)).with(d.at(starts));
            let params = params.with(d.at(g.levels)).with(len as i64).with(d.at(held));
            let params = params.with(int(counts.rows)).with(int(experts));
            let params = params.with(int(counts.cols)).with(int(out)).with(int(x.cols));
            let geometry = Geometry::line(grad_weight_blocks(experts, out, x.cols), 256);
            d.start(variant!(l, "grouped_tn"), geometry, end(params))?;
        }
        OpKind::GroupedBiasGrad { experts } => {
            let counts = l.input(1);
            let starts = starts(d, l, counts)?;
            let params = Params::new().with(d.at(dy)).with(d.at(counts)).with(d.at(starts));
            let params =
                params.with(d.at(g.levels)).with(len as i64).with(int(counts.rows)).with(int(experts));
            let params = params.with(int(counts.cols)).with(int(out));
            let geometry = Geometry { grid: [out.div_ceil(256), experts, 1], block: 256, shared_bytes: 0 };
            d.start(variant!(l, "grouped_bias"), geometry, end(params))?;
        }
        _ => not_mine!(l),
    }
    match g.upper.filter(|_| apart > 0) {
        Some(upper) => add_streams(d, &g, apart, upper),
        None => Ok(()),
    }
}

/// Adds up the roots of all ranks' counters, each in the last of its levels, into the last of all.
fn add_streams(d: &mut Cuda, g: &Gradient<'_>, apart: usize, upper: &[u32]) -> Result<()> {
    let len = g.rows * g.cols;
    let roots = g.levels.part((apart - 1) * len, ((g.streams - 1) * apart + 1) * len);
    let parts = Parts { stride: apart * len, parts: 1, part_stride: 0, len };
    let merge = Merge { merge: 0, store: g.streams * apart - 1 };
    fold(d, "fold_f32", roots, parts, &Gradient { inner: upper, merge, ..*g })
}
