//! Muon, and weights scaled by scores of attention. What orthogonalising is made of says `kernels::newton_schulz`: here
//! is what computes each of its steps.

use kernels::{MatrixName, MatrixOp, MatrixStep, SMALLEST_NORM, newton_schulz};
use program::{Matrix, NORM_CHUNK, OpKind, Shares, update_scale};
use spec::{DType, Result};
use train::{Launch, Operand};

use crate::device::Cuda;
use crate::gemm::{Form, Operands, Shape};
use crate::module::{Geometry, Params};
use crate::row_products::{self, ROWS};
use crate::table::{by_element, int, not_mine};

/// Side of a patch that is transposed at once.
const PATCH: usize = 32;

/// Floats to which parts of the work space are rounded up.
const LINE: usize = 64;

/// Momentum, and the update of weights along what became of it.
pub(crate) fn elementwise(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let (x, numbers) = (l.input(0), d.numbers());
    let out = |d: &Cuda, i: usize| d.at(l.output(i));
    let (name, params) = match *l.kind() {
        OpKind::MuonMomentum { .. } => {
            let params = Params::new().with(out(d, 0)).with(out(d, 1)).with(d.at(x)).with(numbers);
            ("muon_momentum", params.with(x.len() as i64))
        }
        OpKind::Muon { decay, .. } => {
            let half = l.precision() == DType::Bf16;
            let params = Params::new().with(out(d, 0));
            let params = if half { params.with(out(d, 1)) } else { params };
            let params = params.with(d.at(x)).with(numbers).with(x.len() as i64).with(i32::from(decay));
            (if half { "muon_bf16" } else { "muon_f32" }, params)
        }
        _ => not_mine!(l),
    };
    if x.is_empty() { Ok(()) } else { d.start(name, by_element(x.len()), params) }
}

/// Where the matrices of `newton_schulz` lie in the work space, and what is between its launches.
struct Room {
    /// By `MatrixName::index`.
    pieces: [Operand; MatrixName::COUNT],
    /// Sums of squares, and theirs.
    squares: Operand,
    rows: usize,
    cols: usize,
}

impl Room {
    /// Floats of each part: the other matrix of its size, small ones, and sums of squares in f64.
    fn parts(rows: usize, cols: usize) -> [usize; MatrixName::COUNT] {
        let small = rows.min(cols).pow(2);
        let mut parts = [small; MatrixName::COUNT];
        (parts[0], parts[MatrixName::COUNT - 1]) = (rows * cols, 2 * (small.div_ceil(NORM_CHUNK) + 1));
        parts
    }

    /// Floats of it all.
    fn len(rows: usize, cols: usize) -> usize {
        Room::parts(rows, cols).iter().map(|len| len.next_multiple_of(LINE)).sum()
    }

    fn new(x: Operand, (rows, cols): (usize, usize), ws: Operand) -> Room {
        let mut at = 0;
        let [spare, a, b, c, d, e, f, squares] = Room::parts(rows, cols).map(|len| {
            let part = ws.part(at, len);
            at += len.next_multiple_of(LINE);
            part
        });
        Room { pieces: [x, spare, a, b, c, d, e, f], squares, rows, cols }
    }

    fn side(&self) -> usize {
        self.rows.min(self.cols)
    }

    /// Puts one step on the device's stream.
    fn launch(&self, d: &mut Cuda, MatrixStep { op, of: [a, b, c], out }: MatrixStep) -> Result<()> {
        let (m, len) = (self.side(), self.pieces[out.index()].len());
        let [a, b, c, out] = [a, b, c, out].map(|piece| d.at(self.pieces[piece.index()]));
        match op {
            MatrixOp::Copy => d.stream.copy(out, a, len * size_of::<f32>()),
            MatrixOp::Normalise => self.normalise(d, out, len),
            MatrixOp::Transpose => {
                let params = Params::new().with(a).with(out).with(int(self.rows)).with(int(self.cols));
                let grid = [self.cols.div_ceil(PATCH), self.rows.div_ceil(PATCH), 1];
                d.start("transpose", Geometry { grid, block: 256, shared_bytes: 0 }, params)
            }
            MatrixOp::Gram => symmetric(d, "symmetric_nt_f32", [a, a, out], (m, self.rows.max(self.cols))),
            MatrixOp::Symmetric => symmetric(d, "symmetric_nn_f32", [a, b, out], (m, m)),
            MatrixOp::Shift(by) => {
                d.start("shift", by_element(m), Params::new().with(out).with(by).with(int(m)))
            }
            MatrixOp::Sum(of) => {
                let params = Params::new().with(a).with(b).with(c).with(out);
                d.start("matrix_sum", by_element(len), of.into_iter().fold(params, Params::with).with(int(m)))
            }
            MatrixOp::Scale(by) => {
                let params = Params::new().with(out).with(by).with(len as i64);
                d.start("scale", by_element(len), params)
            }
            MatrixOp::ScaleBack(by) => {
                let params = Params::new().with(out).with(by).with(d.at(self.squares)).with(SMALLEST_NORM);
                d.start("scale_back", by_element(len), params.with(len as i64))
            }
            MatrixOp::Product => {
                let Room { rows, cols, .. } = *self;
                let (form, dtype) = (Form::GradInput, DType::F32);
                let shape =
                    Shape { form, n: rows, out: m, in_: cols, least: rows, dtype, bias: false, acc: false };
                let operands = Operands { first: a, second: b, bias: 0, acc: 0, result: out };
                row_products::launch(d, &shape, &operands)
            }
        }
    }

    fn normalise(&self, d: &mut Cuda, x: u64, len: usize) -> Result<()> {
        let chunks = len.div_ceil(NORM_CHUNK);
        let sum = d.at(self.squares);
        let partials = sum + 8;
        let params = Params::new().with(x).with(partials).with(len as i64);
        d.start("sum_squares", Geometry::line(chunks, 256), params)?;
        let params = Params::new().with(partials).with(sum).with(chunks as i64);
        d.start("sum_f64", Geometry::line(1, 1024), params)?;
        let params = Params::new().with(x).with(sum).with(SMALLEST_NORM).with(len as i64);
        d.start("normalise", by_element(len), params)
    }
}

/// A product that is symmetric: of its tiles those that the diagonal meets, and those below it.
fn symmetric(d: &mut Cuda, name: &'static str, of: [u64; 3], (side, inner): (usize, usize)) -> Result<()> {
    let params = of.into_iter().fold(Params::new(), Params::with).with(int(side)).with(int(inner));
    let across = side.div_ceil(ROWS);
    let tiles = across * (across + 1) / 2;
    d.start(name, Geometry::line(tiles.min(2 * d.processors()), 256), params)
}

/// One matrix after the other: each with its parts from all ranks put together, of which this rank's own is kept.
pub(crate) fn orthogonalise(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::Orthogonalise { matrices, shares } = l.kind() else { not_mine!(l) };
    let ws = l.workspace();
    for m in matrices {
        let (out, shares) = (l.output(m.of), shares[m.of]);
        let own = out.part(m.row0 * out.cols, m.rows * out.cols);
        if !m.mine {
            let at = d.at(own);
            d.stream.fill(at, 0, own.bytes())?;
            continue;
        }
        let whole = m.whole(shares, out.cols);
        let apart = apart(m, shares, out.cols);
        let matrix = if apart == 0 { own } else { ws.part(0, apart) };
        let room = apart.next_multiple_of(LINE);
        let room = Room::new(matrix, whole, ws.part(room, ws.len() - room));
        if apart > 0 {
            for rank in 0..shares.ranks() {
                let part = l.input(m.of).part((rank * out.rows + m.row0) * out.cols, m.rows * out.cols);
                place(d, (shares, rank), (part, matrix), (m.rows, out.cols), true)?;
            }
        }
        newton_schulz(whole, update_scale(whole), &mut |step| room.launch(d, step))?;
        if let Shares::Rows { index, .. } | Shares::Cols { index, .. } = shares {
            place(d, (shares, index), (own, matrix), (m.rows, out.cols), false)?;
        }
    }
    Ok(())
}

/// Floats of room for a matrix of which ranks hold parts.
fn apart(m: &Matrix, shares: Shares, cols: usize) -> usize {
    let (rows, cols) = m.whole(shares, cols);
    if shares == Shares::Whole { 0 } else { rows * cols }
}

/// Copies a rank's part to its place in the whole matrix, or from there.
fn place(
    d: &mut Cuda,
    (shares, rank): (Shares, usize),
    (part, whole): (Operand, Operand),
    (rows, cols): (usize, usize),
    there: bool,
) -> Result<()> {
    let (first, apart) = match shares {
        Shares::Cols { ranks, .. } => (rank * cols, ranks * cols),
        _ => (rank * rows * cols, cols),
    };
    let (part, whole) = ((d.at(part), cols), (d.at(whole) + 4 * first as u64, apart));
    let (from, to) = if there { (part, whole) } else { (whole, part) };
    let params = Params::new().with(from.0).with(from.1 as i64).with(to.0).with(to.1 as i64);
    d.start("copy_block", by_element(rows * cols), params.with(int(rows)).with(int(cols)))
}

/// Floats of work space for the matrices that are this rank's, of groups with these shares and so many columns here.
pub(crate) fn workspace_len(
    matrices: &[Matrix],
    shares: &[Shares],
    cols: &dyn Fn(&Matrix) -> usize,
) -> usize {
    let room = |m: &Matrix| {
        let (shares, cols) = (shares[m.of], cols(m));
        let (rows, whole) = m.whole(shares, cols);
        apart(m, shares, cols).next_multiple_of(LINE) + Room::len(rows, whole)
    };
    matrices.iter().filter(|m| m.mine).map(room).max().unwrap_or(0)
}

/// The greatest scores of a step, and weights scaled by them.
pub(crate) fn qk_clip(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    match *l.kind() {
        OpKind::LogitMax { .. } => {
            let (maxima, greatest) = (l.input(0), l.output(0));
            let params = Params::new().with(d.at(maxima)).with(d.at(greatest));
            let sequences = maxima.len() / (l.sequence() * greatest.len());
            let params = params.with(int(sequences)).with(int(l.sequence()));
            d.start("logit_max", Geometry::line(greatest.len(), 256), params)
        }
        OpKind::QkClip { heads, makes, tau, .. } => {
            let spans: Vec<_> = makes.scaled(heads).collect();
            let words = spans.iter().flat_map(|s| {
                let of = [s.rows.start, s.rows.end, s.heads.start, s.heads.end, usize::from(s.alone)];
                of.map(|n| n as u64)
            });
            let words: Vec<u64> = words.collect();
            let Some(table) = d.table(&words)? else {
                return Err(spec::Error::failure(
                    "a table of heads would have to be made within a recording",
                ));
            };
            let (first, width) = l.features();
            let (w, ranks) = (l.output(0), l.inputs());
            let longest = spans.iter().map(|s| s.rows.len() * width).max().unwrap_or(0);
            let apart = if ranks > 1 { (l.input(1).offset - l.input(0).offset) / 8 } else { 0 };
            let half = l.precision() == DType::Bf16;
            let params = (0..=usize::from(half)).fold(Params::new(), |p, i| p.with(d.at(l.output(i))));
            let params = params.with(table).with(d.at(l.input(0))).with(int(ranks)).with(apart as i64);
            let params = params.with(f64::from(tau)).with(first as i64).with(w.len() as i64).with(int(width));
            let grid = [by_element(longest).grid[0], spans.len(), 1];
            let name = if half { "qk_clip_bf16" } else { "qk_clip_f32" };
            d.start(name, Geometry { grid, block: 256, shared_bytes: 0 }, params)
        }
        _ => not_mine!(l),
    }
}
