//! Muon's kernels on whole matrices, of which tensor-parallel ranks hold parts.

use half::bf16;
use kernels::Pool;
use program::{Matrix, OpKind, Shares};
use spec::DType;

use super::args::Args;
use super::table::{Number, not_mine};

pub(super) fn muon<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let turn = a.launch().turn;
    let Some(update) = turn.update else { unreachable!("the tail of a step has its numbers") };
    match a.launch().kind() {
        OpKind::MuonMomentum { .. } => {
            let (m, out) = (a.out_floats(0), a.out_floats(1));
            kernels::muon_momentum(pool, turn.momentum, update.grad_scale, m, out, a.floats(0));
        }
        OpKind::Orthogonalise { matrices, shares } => orthogonalise(pool, a, matrices, shares),
        OpKind::Muon { decay, .. } => {
            let decay = if *decay { update.weight_decay } else { 0.0 };
            let numbers = ((1.0 - update.lr * decay) as f32, -update.lr as f32);
            if a.launch().precision() == DType::F32 {
                kernels::muon(pool, numbers, a.out_floats(0), a.floats(0));
            } else {
                let param: &mut [bf16] = bytemuck::cast_slice_mut(a.out(0));
                kernels::muon_bf16(pool, numbers, a.out_floats(1), a.floats(0), param);
            }
        }
        _ => not_mine!(a),
    }
}

/// Each matrix with its parts from all ranks put together, of which this rank's own is kept.
fn orthogonalise<T: Number>(pool: &Pool, a: &Args<'_, T>, matrices: &[Matrix], shares: &[Shares]) {
    let cols = |m: &Matrix| a.launch().output(m.of).cols;
    let (mine, others) = mine(matrices);
    for m in others {
        a.out_rows(m.of, m.row0..m.row0 + m.rows).fill(0.0);
    }
    let flops = |i: usize| mine[i].flops(shares[mine[i].of], cols(&mine[i]));
    pool.deal((mine.len(), &flops), a.workspace(), &|i, pool, ws| {
        let m = &mine[i];
        let (shares, cols) = (shares[m.of], cols(m));
        let own = a.out_rows(m.of, m.row0..m.row0 + m.rows);
        let whole = m.whole(shares, cols);
        let scale = program::update_scale(whole);
        if shares == Shares::Whole {
            return kernels::orthogonalise(pool, own, whole, scale, ws);
        }
        let (matrix, ws) = ws.split_at_mut(whole.0 * whole.1);
        let all_rows = a.launch().output(m.of).rows;
        for (rank, part) in a.floats(m.of).chunks_exact(all_rows * cols).enumerate() {
            for i in 0..m.rows {
                let row = &part[(m.row0 + i) * cols..][..cols];
                matrix[place(shares, (rank, i), (m.rows, cols))..][..cols].copy_from_slice(row);
            }
        }
        kernels::orthogonalise(pool, matrix, whole, scale, ws);
        let (Shares::Rows { index, .. } | Shares::Cols { index, .. }) = shares else { return };
        for (i, row) in own.chunks_exact_mut(cols).enumerate() {
            row.copy_from_slice(&matrix[place(shares, (index, i), (m.rows, cols))..][..cols]);
        }
    });
}

/// The matrices whose turn is this rank's, and the others.
fn mine(matrices: &[Matrix]) -> (&[Matrix], &[Matrix]) {
    matrices.split_at(matrices.partition_point(|m| m.mine))
}

/// Where row `i` of a rank's part begins in the whole matrix.
fn place(shares: Shares, (rank, i): (usize, usize), (rows, cols): (usize, usize)) -> usize {
    match shares {
        Shares::Cols { ranks, .. } => (i * ranks + rank) * cols,
        _ => (rank * rows + i) * cols,
    }
}

/// Floats of work space for the matrices that are this rank's, of groups with these shares and so many columns here.
pub(crate) fn workspace_len(
    matrices: &[Matrix],
    shares: &[Shares],
    cols: &dyn Fn(&Matrix) -> usize,
    threads: usize,
) -> usize {
    let (mine, _) = mine(matrices);
    let room = |m: &Matrix, threads| {
        let (rows, cols) = m.whole(shares[m.of], cols(m));
        let apart = if shares[m.of] == Shares::Whole { 0 } else { rows * cols };
        apart + kernels::orthogonalise_workspace_len(rows, cols, threads)
    };
    let flops = |i: usize| mine[i].flops(shares[mine[i].of], cols(&mine[i]));
    let (together, alone) = mine.split_at(kernels::together((mine.len(), &flops), threads));
    let alone = threads * alone.iter().map(|m| room(m, 1)).max().unwrap_or(0);
    together.iter().map(|m| room(m, threads)).fold(alone, usize::max)
}
