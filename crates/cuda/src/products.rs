//! Products of activations with weights, forward and back.

use std::time::Instant;

use kernels::{Step, tree_step};
use program::OpKind;
use spec::{DType, Result};
use train::{Launch, Operand};

use crate::device::Cuda;
use crate::driver::Memory;
use crate::gemm::{Form, Operands, Shape, WORKSPACE_ALIGN, WORKSPACE_BYTES};
use crate::grad_weight::{self, Cut};
use crate::row_products;
use crate::table::{Tree, not_mine};

/// Floats of work space of a product.
pub(crate) const WORKSPACE_LEN: usize = (WORKSPACE_BYTES + WORKSPACE_ALIGN) / 4;

/// Floats of work space of a weight's gradient: partial sums of the tree over leaves, and one result that meets more
/// than one level.
pub(crate) fn grad_weight_workspace_len(
    inner: &[u32],
    out: usize,
    in_: usize,
    rows: usize,
    dtype: DType,
    hopper: bool,
) -> usize {
    let tree = Tree::of(inner);
    if row_products::takes(dtype, hopper, out, in_) {
        return Cut::of(dtype, inner, out, in_, rows / tree.leaves()).workspace_len(out, in_);
    }
    WORKSPACE_LEN + (tree.depth() + 1) * (out * in_).next_multiple_of(64)
}

pub(crate) fn linear(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (x, w, y) = (l.input(0), l.input(1), l.output(0));
    let forward = match l.kind() {
        OpKind::Linear => true,
        OpKind::LinearGradInput => false,
        _ => not_mine!(l),
    };
    let bias = (forward && l.inputs() > 2).then(|| d.at(l.input(2)));
    let shape = Shape {
        form: if forward { Form::Forward } else { Form::GradInput },
        n: x.rows,
        least: x.rows.min(l.sequence()),
        out: w.rows,
        in_: w.cols,
        dtype: l.precision(),
        bias: bias.is_some(),
        acc: l.acc().is_some(),
    };
    let operands = Operands {
        first: d.at(x),
        second: d.at(w),
        bias: bias.unwrap_or(0),
        acc: l.acc().map_or(0, |acc| d.at(acc)),
        result: d.at(y),
    };
    multiply(d, l, shape, &operands)
}

fn multiply(d: &mut Cuda, l: &Launch<'_>, shape: Shape, operands: &Operands) -> Result<()> {
    if row_products::takes(shape.dtype, d.hopper, shape.out, shape.in_) && shape.form != Form::GradWeight {
        return row_products::launch(d, &shape, operands);
    }
    let workspace = d.at(l.workspace().part(0, WORKSPACE_LEN)).next_multiple_of(WORKSPACE_ALIGN as u64);
    let Cuda { products, stream, .. } = d;
    products.run(stream, shape, operands, workspace)
}

/// The gradient of a weight: one product for each sequence, added up in the order of the tree.
pub(crate) fn grad_weight(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (dy, x, g) = (l.input(0), l.input(1), l.gradient(0));
    if row_products::takes(l.precision(), d.hopper, g.rows, g.cols) {
        return grad_weight::launch(d, l);
    }
    let tree = Tree::of(g.inner);
    let leaves = tree.leaves();
    let (rows, len) = (dy.rows / leaves, g.rows * g.cols);
    let step = len.next_multiple_of(64);
    let level = |i: usize| l.workspace().part(WORKSPACE_LEN + i * step, len);
    let scratch = level(tree.depth());
    for leaf in 0..leaves {
        let one = |of: Operand| of.part(leaf * rows * of.cols, rows * of.cols);
        let product = Leaf { dy: one(dy), x: one(x), rows, out: g.rows, in_: g.cols };
        match tree_step(g.inner, leaf) {
            // Not the last one: it goes to the tree's own levels.
            Step::Keep(m) => {
                let held: Vec<Operand> = (0..m.merge).map(level).collect();
                product.add(d, l, &held, level(m.store), scratch)?;
            }
            Step::Root { merge } => {
                let outer = |i: usize| g.levels.part(i * len, len);
                let inner = (0..merge).map(level);
                let held: Vec<Operand> = inner.chain((0..g.merge.merge).map(outer)).collect();
                product.add(d, l, &held, outer(g.merge.store), scratch)?;
            }
        }
    }
    Ok(())
}

/// One sequence's product.
struct Leaf {
    dy: Operand,
    x: Operand,
    rows: usize,
    out: usize,
    in_: usize,
}

impl Leaf {
    /// `store = held.. + dy^T x`: the first of `held` is added by the product itself, which rounds the same.
    fn add(
        &self,
        d: &mut Cuda,
        l: &Launch<'_>,
        held: &[Operand],
        store: Operand,
        scratch: Operand,
    ) -> Result<()> {
        let shape = Shape {
            form: Form::GradWeight,
            n: self.rows,
            least: self.rows,
            out: self.out,
            in_: self.in_,
            dtype: l.precision(),
            bias: false,
            acc: !held.is_empty(),
        };
        let result = if held.len() > 1 { scratch } else { store };
        let operands = Operands {
            first: d.at(self.dy),
            second: d.at(self.x),
            bias: 0,
            acc: held.first().map_or(0, |h| d.at(*h)),
            result: d.at(result),
        };
        multiply(d, l, shape, &operands)?;
        for (i, more) in held.iter().enumerate().skip(1) {
            // The last sum lands where it is wanted, those before it in the scratch.
            let to = if i + 1 == held.len() { store } else { scratch };
            crate::table::add_into(d, *more, scratch, to)?;
        }
        Ok(())
    }
}

/// The rate of large products of the card, in GFLOP/s.
pub(crate) fn peak_gflops(d: &mut Cuda) -> Result<f64> {
    const SIDE: usize = 8192;
    let bytes = 2 * SIDE * SIDE;
    let memory = Memory::new(3 * bytes + WORKSPACE_BYTES)?;
    // Any bits with small exponents: products of constants run faster than those of data.
    let mut state = 1u64;
    let noise: Vec<u8> = (0..bytes / 2)
        .flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = (state >> 48) as u16;
            ((bits & 0x80ff) | 0x3f00).to_le_bytes()
        })
        .collect();
    d.stream.upload(memory.base, &noise)?;
    d.stream.copy(memory.base + bytes as u64, memory.base, bytes)?;
    let shape = Shape {
        form: Form::Forward,
        n: SIDE,
        least: SIDE,
        out: SIDE,
        in_: SIDE,
        dtype: DType::Bf16,
        bias: false,
        acc: false,
    };
    let at = |i: usize| memory.base + (i * bytes) as u64;
    let operands = Operands { first: at(0), second: at(1), bias: 0, acc: 0, result: at(2) };
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        let began = Instant::now();
        d.products.run(&d.stream, shape, &operands, at(3))?;
        d.stream.wait()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(2.0 * (SIDE as f64).powi(3) / best / 1e9)
}
