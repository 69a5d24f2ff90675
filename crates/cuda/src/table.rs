//! Which kernels an op's kind is, and what they are called with. Parameters follow the kernels' declarations.

use program::{GroupId, Heads, LossTerms, Op, OpKind, Program, View};
use spec::{DType, NormKind, Result};
use train::{Gradient, Lack, Launch, Operand};

use crate::attention;
use crate::columns::{self, parts};
use crate::device::Cuda;
use crate::module::{Geometry, Params};
use crate::{contexts, experts, latent, muon, products, row_products, rows, update};

/// The two variants of a kernel, by the type of activations.
macro_rules! variant {
    ($l:expr, $name:literal) => {
        if $l.precision() == DType::Bf16 { concat!($name, "_bf16") } else { concat!($name, "_f32") }
    };
}
pub(crate) use variant;

/// The table names a function for kinds that the function does not know.
macro_rules! not_mine {
    ($l:expr) => {
        unreachable!("the table sends no {} here", $l.kind().name())
    };
}
pub(crate) use not_mine;

/// Puts the kernels of a launch on the device's stream.
type Kernel = fn(&mut Cuda, &Launch<'_>) -> Result<()>;

/// What computes an op of this kind.
fn kernel(kind: &OpKind) -> Result<Kernel, Lack> {
    use OpKind::*;
    Ok(match kind {
        Embed { .. } => embed,
        EmbedGrad { .. } => embed_grad,
        PosGrad => pos_grad,
        Norm { .. } | NormGradInput { .. } => norm,
        NormGradWeight { .. } | BiasGrad | HeadNormGradWeight { .. } | SinkGrad { .. } => {
            columns::column_sums
        }
        LatentNorm { .. } | LatentNormGradInput => latent::norm,
        LatentNormGradWeight => columns::latent_weights,
        LatentRope { .. } | LatentRopeGrad { .. } => latent::rope,
        LatentCached { .. } => latent::decode,
        HeadNorm { .. } | HeadNormGradInput { .. } => head_norm,
        Linear | LinearGradInput => products::linear,
        LinearGradWeight => products::grad_weight,
        Rope { .. } => rope,
        Attention { .. } => attention::forward,
        AttentionGrad { .. } => attention::backward,
        AttentionCached { .. } => attention::decode,
        RingAttention { .. } => contexts::forward,
        RingAttentionGrad { .. } => contexts::backward,
        SplitHeads { .. } | JoinHeads { .. } => contexts::deal_heads,
        Rows { .. } | RowsGrad { .. } => rows::on_host,
        SwiGlu { .. } | SwiGluGrad { .. } | Gelu { .. } | GeluGrad { .. } | Add => elementwise,
        Dropout { .. } => dropout,
        SoftCap { .. }
        | Xent { .. }
        | XentStats { .. }
        | XentCombine { .. }
        | XentGrad { .. }
        | LossSum { .. } => loss,
        ShardGrads { .. } => shard_grads,
        TieGrads { .. } => tie_grads,
        GradNorm => update::grad_norm,
        AdamW { .. } => update::adamw,
        MuonMomentum { .. } | Muon { .. } => muon::elementwise,
        Orthogonalise { .. } => muon::orthogonalise,
        LogitMax { .. } | QkClip { .. } => muon::qk_clip,
        Route { .. } | RouteGrad { .. } => experts::route,
        Permute { .. } | PermuteGrad | Unpermute { .. } | UnpermuteGrad => experts::permute,
        GroupedLinear { .. } | GroupedLinearGradInput { .. } => experts::grouped_linear,
        GroupedLinearGradWeight { .. } | GroupedBiasGrad { .. } => experts::grad_weight,
        BalanceExperts { .. } => experts::balance,
        Slice { .. } => experts::slice,
        Average { .. } | SwapAverage { .. } => update::average,
        other => return Err(Lack::of(other)),
    })
}

/// Whether there is a kernel.
pub(crate) fn can_run(kind: &OpKind, precision: DType) -> Result<(), Lack> {
    kernel(kind)?;
    match kind {
        OpKind::Attention { heads, .. } | OpKind::AttentionGrad { heads, .. } => {
            attention::can_run(precision, *heads)
        }
        OpKind::RingAttention { heads, .. } | OpKind::RingAttentionGrad { heads, .. } => {
            contexts::can_run(precision, *heads)
        }
        _ => Ok(()),
    }
}

/// Puts a launch on the device's stream.
pub(crate) fn launch(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    match kernel(l.kind()) {
        Ok(kernel) => kernel(d, l),
        Err(lack) => {
            Err(spec::Error::failure(format!("{} is not executed on GPUs yet ({lack:?})", l.kind().name())))
        }
    }
}

/// Floats of work space that an op's kernels want, on a Hopper GPU or another.
pub fn workspace_len(op: &Op, p: &Program, hopper: bool) -> usize {
    use OpKind::*;
    let rows = |i: usize| op.ins[i].rows;
    let cols = |v: View| p.buffer(v.buffer).cols;
    let group = |g: GroupId| p.group(g);
    let leaves = || Tree::of(&op.grads[0].inner).leaves();
    match &op.kind {
        Linear | LinearGradInput => {
            let own = row_products::takes(p.precision, hopper, rows(1), cols(op.ins[1]));
            if own { 0 } else { products::WORKSPACE_LEN }
        }
        LinearGradWeight => {
            let g = group(op.grads[0].group);
            products::grad_weight_workspace_len(
                &op.grads[0].inner,
                g.rows,
                g.cols,
                rows(0),
                p.precision,
                hopper,
            )
        }
        NormGradWeight { .. } | BiasGrad => {
            let cols = cols(op.ins[0]);
            op.grads.len() * parts(&op.kind, rows(0), leaves(), cols).0 * cols
        }
        SinkGrad { .. } => {
            let heads = op.ins[3].rows * cols(op.ins[3]);
            parts(&op.kind, rows(0), leaves(), heads).0 * heads
        }
        HeadNormGradWeight { heads } => 2 * parts(&op.kind, rows(0), leaves(), heads.dim).0 * heads.dim,
        LatentNormGradWeight => {
            let len = |i: usize| {
                let cols = cols(op.ins[i]);
                parts(&op.kind, rows(0), leaves(), cols).0 * cols
            };
            (0..op.grads.len()).map(len).max().unwrap_or(0)
        }
        LatentCached { heads, .. } => heads.q * p.mode.positions(),
        EmbedGrad { .. } => rows(0) * cols(op.ins[1]) + group(op.grads[0].group).rows,
        AttentionGrad { heads, .. } | RingAttentionGrad { heads, .. } => rows(0) * heads.q,
        Route { router, .. } => experts::route_workspace_len(rows(0), cols(op.ins[0]), router),
        RouteGrad { router, .. } => experts::route_workspace_len(rows(1), cols(op.ins[1]), router),
        GroupedLinear { .. } | GroupedLinearGradInput { .. } => experts::starts_len(rows(2)),
        GroupedBiasGrad { .. } => experts::starts_len(rows(1)),
        GroupedLinearGradWeight { experts, .. } => {
            let (out, in_) = (cols(op.ins[0]), cols(op.ins[1]));
            experts::grad_weight_workspace_len((rows(2), *experts), out, in_, &op.grads[0].inner)
        }
        Orthogonalise { matrices, shares } => muon::workspace_len(matrices, shares, &|m| cols(op.outs[m.of])),
        _ => 0,
    }
}

/// The order in which leaves of a gradient are added, as kernels take it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Tree {
    depth: i32,
    radices: [i32; 15],
}

impl Tree {
    /// Radices of 1 add nothing.
    pub(crate) fn of(radices: &[u32]) -> Tree {
        let mut tree = Tree { depth: 0, radices: [1; 15] };
        for radix in radices.iter().filter(|r| **r > 1) {
            tree.radices[tree.depth as usize] = *radix as i32;
            tree.depth += 1;
        }
        tree
    }

    pub(crate) fn depth(&self) -> usize {
        self.depth as usize
    }

    pub(crate) fn leaves(&self) -> usize {
        self.radices[..self.depth()].iter().map(|r| *r as usize).product()
    }
}

/// Threads for a row of so many elements, eight to each.
fn row_threads(dim: usize) -> usize {
    dim.div_ceil(8).next_multiple_of(32).clamp(32, 256)
}

/// A block for each row.
pub(crate) fn by_row(rows: usize, dim: usize) -> Geometry {
    Geometry::line(rows, row_threads(dim))
}

/// As many blocks as elements want, eight elements to a thread.
pub(crate) fn by_element(len: usize) -> Geometry {
    Geometry::line(len.div_ceil(8 * 256).clamp(1, 1 << 16), 256)
}

/// A count as kernels take it.
pub(crate) fn int(n: usize) -> i32 {
    i32::try_from(n).expect("a count that fits 32 bits")
}

fn embed(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::Embed { vocab0, positions } = *l.kind() else { not_mine!(l) };
    let (ids, table, out) = (l.input(0), l.input(1), l.output(0));
    let from = l.turn.position * out.cols * out.dtype.bytes();
    let table_of_positions = if positions && l.inputs() > 2 { d.at(l.input(2)) + from as u64 } else { 0 };
    let params = Params::new()
        .with(d.at(ids))
        .with(d.at(table))
        .with(table_of_positions)
        .with(d.at(out))
        .with(int(vocab0))
        .with(int(table.rows))
        .with(int(l.sequence()))
        .with(int(l.places()[0]))
        .with(int(l.places()[1]))
        .with(int(out.cols));
    d.start(variant!(l, "embed"), by_row(ids.len(), out.cols), params)
}

/// Lists the tokens of each id, sums them into a row of work space, and brings those rows to the table.
fn embed_grad(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::EmbedGrad { vocab0 } = *l.kind() else { not_mine!(l) };
    let (ids, dy, g) = (l.input(0), l.input(1), l.gradient(0));
    let (n, tree) = (ids.len(), Tree::of(g.inner));
    let rows = l.workspace().part(0, n * g.cols);
    let map = l.workspace().part(n * g.cols, g.rows);
    d.stream.fill(d.at(map), 0xff, map.bytes())?;
    for name in ["embed_first", "embed_list"] {
        let params = Params::new().with(d.at(ids)).with(d.at(rows)).with(d.at(map));
        let params = params.with(int(vocab0)).with(int(g.rows)).with(int(n)).with(int(g.cols));
        d.start(name, Geometry::line(n.div_ceil(256), 256), params)?;
    }
    let params = Params::new()
        .with(d.at(ids))
        .with(d.at(dy))
        .with(d.at(rows))
        .with(d.at(map))
        .with(int(vocab0))
        .with(int(g.rows))
        .with(int(n / tree.leaves()))
        .with(int(g.cols))
        .with(tree);
    d.start(variant!(l, "embed_rows"), by_row(n, g.cols), params)?;
    let params = Params::new()
        .with(d.at(rows))
        .with(d.at(map))
        .with(d.at(g.levels))
        .with(int(g.rows))
        .with(int(g.cols))
        .with(int(g.merge.merge))
        .with(int(g.merge.store));
    d.start("embed_fold", by_row(g.rows, g.cols), params)
}

fn pos_grad(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (dy, g) = (l.input(0), l.gradient(0));
    if l.ring().1 > 1 {
        let params = Params::new().with(d.at(dy)).with(d.at(g.levels)).with(int(g.rows)).with(int(g.cols));
        let params = params.with(int(l.sequence())).with(int(l.places()[0])).with(int(l.places()[1]));
        let params = params.with(Tree::of(g.inner)).with(int(g.merge.merge)).with(int(g.merge.store));
        return d.start(variant!(l, "pos_dw"), by_element(g.rows * g.cols), params);
    }
    let len = l.sequence() * g.cols;
    let parts = Parts { stride: len, parts: 1, part_stride: 0, len };
    fold(d, variant!(l, "fold"), dy, parts, &g)
}

/// Where the leaves of a gradient lie: each is the sum of `parts` runs of `len` elements.
pub(crate) struct Parts {
    pub(crate) stride: usize,
    pub(crate) parts: usize,
    pub(crate) part_stride: usize,
    pub(crate) len: usize,
}

/// Folds leaves in the order of the tree, and the root into the gradient's levels.
pub(crate) fn fold(
    d: &mut Cuda,
    name: &'static str,
    from: Operand,
    p: Parts,
    g: &Gradient<'_>,
) -> Result<()> {
    let level_len = g.rows * g.cols;
    let params = Params::new()
        .with(d.at(from))
        .with(p.stride as i64)
        .with(int(p.parts))
        .with(p.part_stride as i64)
        .with(p.len as i64)
        .with(d.at(g.levels))
        .with(level_len as i64)
        .with(Tree::of(g.inner))
        .with(int(g.merge.merge))
        .with(int(g.merge.store));
    d.start(name, Geometry::line(level_len.div_ceil(FOLD_BLOCK * 4).max(1), FOLD_BLOCK), params)
}

/// Threads of a block that folds.
const FOLD_BLOCK: usize = 256;

/// Folds the roots of subtrees, a gradient each, by the radices above them (none for one that is complete), and the
/// result into the gradient's levels.
pub(crate) fn fold_roots(d: &mut Cuda, roots: Operand, above: &[u32], g: &Gradient<'_>) -> Result<()> {
    let len = g.rows * g.cols;
    let leaf = Parts { stride: len, parts: 1, part_stride: 0, len };
    fold(d, "fold_f32", roots, leaf, &Gradient { inner: above, ..*g })
}

/// `to = more + from`, elementwise; `to` may be either.
pub(crate) fn add_into(d: &mut Cuda, more: Operand, from: Operand, to: Operand) -> Result<()> {
    let params = Params::new().with(d.at(more)).with(d.at(from)).with(0u64).with(d.at(to));
    let params = params.with(from.len() as i64).with(int(from.cols));
    d.start("add_f32", by_element(from.len()), params)
}

fn norm(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let x = l.input(0);
    let (n, dim) = (x.rows, x.cols);
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let (name, params) = match *l.kind() {
        OpKind::Norm { norm, eps } => {
            let layer = norm == NormKind::Layer;
            let params = Params::new().with(at(d, 0)).with(at(d, 1));
            let params = if layer { params.with(at(d, 2)) } else { params };
            let params = params.with(d.at(l.output(0))).with(d.at(l.output(1)));
            let params = if layer { params.with(int(n)) } else { params };
            let name = if layer { variant!(l, "layer_norm") } else { variant!(l, "rms_norm") };
            (name, params.with(int(dim)).with(eps))
        }
        OpKind::NormGradInput { norm } => {
            let layer = norm == NormKind::Layer;
            let acc = l.acc().map_or(0, |acc| d.at(acc));
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(at(d, 2)).with(at(d, 3));
            let params = params.with(acc).with(d.at(l.output(0)));
            let params = if layer { params.with(int(n)) } else { params };
            let name = if layer { variant!(l, "layer_norm_dx") } else { variant!(l, "rms_norm_dx") };
            (name, params.with(int(dim)))
        }
        _ => not_mine!(l),
    };
    d.start(name, by_row(n, dim), params)
}

fn head_norm(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let shape = |p: Params, h: Heads| p.with(int(h.q)).with(int(h.kv)).with(int(h.dim));
    let (name, heads, params) = match *l.kind() {
        OpKind::HeadNorm { heads, eps } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(at(d, 2));
            let params = params.with(d.at(l.output(0))).with(d.at(l.output(1)));
            (variant!(l, "qk_norm"), heads, shape(params, heads).with(eps))
        }
        OpKind::HeadNormGradInput { heads } => {
            let params = (0..5).fold(Params::new(), |p, i| p.with(at(d, i))).with(d.at(l.output(0)));
            (variant!(l, "qk_norm_dx"), heads, shape(params, heads))
        }
        _ => not_mine!(l),
    };
    d.start(name, by_row(l.input(0).rows, (heads.q + heads.kv) * heads.dim), params)
}

fn rope(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::Rope { heads: h, inverse } = *l.kind() else { not_mine!(l) };
    let (n, positions) = (l.input(0).rows, l.input(1).rows);
    // One token of a generation, or whole sequences.
    let sequence = if n == 1 { positions } else { l.sequence() };
    let params = Params::new()
        .with(d.at(l.output(0)))
        .with(d.at(l.input(1)))
        .with(d.at(l.input(2)))
        .with(int(sequence))
        .with(int(h.q))
        .with(int(h.kv))
        .with(int(h.dim))
        .with(int(l.turn.position))
        .with(i32::from(inverse));
    d.start(variant!(l, "rope"), by_row(n, (h.q + h.kv) * h.dim), params)
}

fn elementwise(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (x, y) = (l.input(0), l.output(0));
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let out = d.at(y);
    let (name, params) = match *l.kind() {
        // Of experts' rows there are as many as there is room for: counts say no more.
        OpKind::SwiGlu { clamped } => {
            let params = Params::new().with(at(d, 0)).with(out).with(int(x.rows)).with(int(x.cols / 2));
            (if clamped { variant!(l, "swiglu_clamped") } else { variant!(l, "swiglu") }, params)
        }
        OpKind::SwiGluGrad { clamped } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(out);
            let name = if clamped { variant!(l, "swiglu_clamped_dx") } else { variant!(l, "swiglu_dx") };
            (name, params.with(int(x.rows)).with(int(x.cols)))
        }
        OpKind::Gelu { tanh } => {
            let params = Params::new().with(at(d, 0)).with(out).with(x.len() as i64).with(i32::from(tanh));
            (variant!(l, "gelu"), params)
        }
        OpKind::GeluGrad { tanh } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(out);
            (variant!(l, "gelu_dx"), params.with(x.len() as i64).with(i32::from(tanh)))
        }
        OpKind::Add => {
            let bias = if l.inputs() > 2 { at(d, 2) } else { 0 };
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(bias).with(out);
            (variant!(l, "add"), params.with(x.len() as i64).with(int(x.cols)))
        }
        _ => not_mine!(l),
    };
    d.start(name, by_element(x.len()), params)
}

/// Where the rows of a launch lie, as kernels take it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    row0: i32,
    sequence0: i32,
    sequence: i32,
    front: i32,
    back: i32,
}

fn dropout(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::Dropout { site, rate } = *l.kind() else { not_mine!(l) };
    let of = kernels::Dropout { key: site, rate };
    let (x, (sequence0, row0), [front, back]) = (l.input(0), l.first_row(), l.places());
    let rows = Rows {
        row0: int(row0),
        sequence0: int(sequence0),
        sequence: int(l.sequence()),
        front: int(front),
        back: int(back),
    };
    let bias = if l.inputs() > 1 { d.at(l.input(1)) } else { 0 };
    let acc = l.acc().map_or(0, |acc| d.at(acc));
    let params = Params::new().with(d.at(x)).with(bias).with(acc).with(d.at(l.output(0)));
    let params = params.with(of.key).with(d.numbers()).with(rows).with(int(x.rows)).with(int(x.cols));
    d.start(variant!(l, "dropout"), by_element(x.len()), params.with(of.cut()).with(of.factor()))
}

/// What the gradient of a loss is made of, as kernels take it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Terms {
    scale: f32,
    z: f32,
    per_cap: f32,
}

impl Terms {
    /// Times the step's own scale, which kernels read of the step's numbers.
    fn of(terms: LossTerms) -> Terms {
        let per_cap = if terms.cap > 0.0 { 1.0 / terms.cap } else { 0.0 };
        Terms { scale: terms.weight, z: terms.z, per_cap }
    }
}

/// Threads for a row of logits.
const VOCAB_THREADS: usize = 512;

fn loss(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (x, numbers) = (l.input(0), d.numbers());
    let at = |d: &Cuda, i: usize| d.at(l.input(i));
    let rows = Geometry::line(x.rows, VOCAB_THREADS);
    match *l.kind() {
        OpKind::SoftCap { cap } => {
            let params = Params::new().with(d.at(l.output(0))).with(x.len() as i64).with(cap);
            d.start(variant!(l, "soft_cap"), by_element(x.len()), params)
        }
        OpKind::Xent { terms } => {
            let params = Params::new().with(d.at(l.output(0))).with(at(d, 1)).with(numbers);
            let params = params.with(d.at(l.output(1))).with(int(x.cols)).with(Terms::of(terms));
            d.start(variant!(l, "xent"), rows, params)
        }
        OpKind::XentStats { vocab0 } => {
            let params = Params::new().with(at(d, 0)).with(at(d, 1)).with(int(vocab0));
            let params = params.with(d.at(l.output(0))).with(int(x.cols));
            d.start(variant!(l, "xent_stats"), rows, params)
        }
        OpKind::XentCombine { shards } => {
            let n = x.rows / shards;
            let params = Params::new().with(at(d, 0)).with(int(shards)).with(d.at(l.output(0))).with(int(n));
            d.start("xent_combine", Geometry::line(n.div_ceil(256), 256), params)
        }
        OpKind::XentGrad { vocab0, terms } => {
            let params = Params::new().with(d.at(l.output(0))).with(at(d, 1)).with(int(vocab0));
            let params = params.with(at(d, 2)).with(numbers).with(d.at(l.output(1))).with(int(x.cols));
            let params = params.with(Terms::of(terms));
            d.start(variant!(l, "xent_grad"), rows, params)
        }
        OpKind::LossSum { .. } => {
            let params = Params::new().with(at(d, 0)).with(d.at(l.output(0))).with(int(x.len()));
            d.start("loss_sum", Geometry::line(1, 1024), params)
        }
        _ => not_mine!(l),
    }
}

/// Adds one micro-batch's scattered gradients to the partial sums of the owned shards, in tree order.
fn shard_grads(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    (0..l.inputs()).try_for_each(|i| {
        let g = l.gradient(i);
        if g.rows * g.cols == 0 { Ok(()) } else { fold_roots(d, l.input(i), &[], &g) }
    })
}

fn tie_grads(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (x, y) = (l.input(0), l.output(0));
    let params = Params::new().with(d.at(x)).with(d.at(y)).with(x.len() as i64);
    d.start("accumulate_f32", by_element(x.len()), params)
}
