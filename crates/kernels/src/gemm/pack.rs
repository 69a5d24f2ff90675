//! Operands laid out in the order in which tiles read them.

use super::{MR, TASK};
use crate::pool::Parts;
use crate::simd::{LANES, Simd, kernel};
use crate::storage::Element;

/// How far ahead of their use rows and columns are asked for: enough to hide memory behind the copying.
const AHEAD_ROWS: usize = 16;
const AHEAD_COLUMNS: usize = 2 * LANES;
/// Rows that are packed at a time into all panels, so that lines which follow each other are written together.
const PACK_ROWS: usize = 8;

kernel! {
    /// Packs a panel of `cols <= nr` columns and `k` rows of a row-major `src` (row stride `ld`): row p goes to
    /// `dst[p * nr..]`, filled up with zeros to whole vectors.
    pub(crate) fn pack_rows[T: Element](src: &[T], ld: usize, k: usize, cols: usize, nr: usize, dst: &mut [f32]) = |s: S| {
        for p in 0..k {
            let from = &src[p * ld..p * ld + cols];
            let to = &mut dst[p * nr..(p + 1) * nr];
            let ahead = from.as_ptr().wrapping_add(AHEAD_ROWS * ld);
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                s.store(&mut to[j..j + LANES], T::get(s, &from[j..]));
            }
        }
    }
}

kernel! {
    /// Packs `rows` rows of `cols` elements (row stride `ld`) into panels of `nr` columns that are `stride` apart; row p of a panel
    /// goes to `dst[p * nr..]`.
    ///
    /// The panels are parts of a whole that other tasks fill for other rows; `at` is the offset of the first row.
    pub(crate) fn pack_all_rows[T: Element](
        src: &[T], ld: usize, rows: usize, cols: usize, nr: usize, whole: &Parts<'_, f32>, at: usize, stride: usize
    ) = |s: S| {
        for p in (0..rows).step_by(PACK_ROWS) {
            let block = p..rows.min(p + PACK_ROWS);
            for (panel, j) in (0..cols).step_by(nr).enumerate() {
                for p in block.clone() {
                    let from = &src[p * ld + j..p * ld + cols.min(j + nr)];
                    let ahead = from.as_ptr().wrapping_add(PACK_ROWS * ld);
                    let to = panel * stride + at + p * nr;
                    // SAFETY: a row of a panel belongs to one task.
                    let to = unsafe { whole.part(to..to + nr) };
                    for j in (0..from.len()).step_by(LANES) {
                        s.prefetch(ahead.wrapping_add(j).cast());
                        s.store(&mut to[j..j + LANES], T::get(s, &from[j..]));
                    }
                }
            }
        }
    }
}

kernel! {
    /// Packs a panel of `cols <= nr` columns and `k` rows of the transpose of a row-major `src` (row stride `ld`):
    /// element (p, j) is `src[j * ld + p]`. Filled up with zeros to whole vectors.
    pub(crate) fn pack_columns[T: Element](
        src: &[T], ld: usize, k: usize, cols: usize, nr: usize, dst: &mut [f32]
    ) = |s: S| {
        for j in (0..cols).step_by(LANES) {
            let lines = LANES.min(cols - j);
            for p in (0..k).step_by(LANES) {
                if lines == LANES && p + LANES <= k {
                    let from = &src[j * ld + p..(j + LANES - 1) * ld + p + LANES];
                    transpose_block(s, from, ld, nr, &mut dst[p * nr + j..(p + LANES - 1) * nr + j + LANES]);
                    continue;
                }
                let mut block = [s.splat(0.0); LANES];
                for i in 0..lines {
                    let at = (j + i) * ld;
                    block[i] = T::get(s, &src[at + p..at + k]);
                }
                s.transpose(&mut block);
                for i in 0..LANES.min(k - p) {
                    let at = (p + i) * nr + j;
                    s.store(&mut dst[at..at + LANES], block[i]);
                }
            }
        }
    }
}

/// Transposes a whole block from rows that are `ld` apart into rows that are `nr` apart, and asks for what will be
/// needed soon.
#[inline(always)]
fn transpose_block<S: Simd, T: Element>(s: S, src: &[T], ld: usize, nr: usize, dst: &mut [f32]) {
    assert!(src.len() == (LANES - 1) * ld + LANES && dst.len() == (LANES - 1) * nr + LANES);
    let mut block = [s.splat(0.0); LANES];
    for (i, row) in block.iter_mut().enumerate() {
        // SAFETY: row i of the block lies inside `src` by the assertion.
        let from = unsafe { src.get_unchecked(i * ld..i * ld + LANES) };
        s.prefetch(from.as_ptr().wrapping_add(AHEAD_COLUMNS).cast());
        *row = T::get(s, from);
    }
    s.transpose(&mut block);
    for (i, &row) in block.iter().enumerate() {
        // SAFETY: row i of the result lies inside `dst` by the assertion.
        unsafe { s.store_at(dst.as_mut_ptr().add(i * nr), row) };
    }
}

kernel! {
    /// Packs `k` rows of `cols` elements (row stride `ld`) for use as a transposed left operand: into panels of [`MR`]
    /// columns, row p of a panel at `p * MR`. Of the last panel's columns beyond `cols` nothing is written.
    pub(crate) fn pack_left[T: Element](src: &[T], ld: usize, k: usize, cols: usize, dst: &mut [f32]) = |s: S| {
        let panels = cols.div_ceil(MR);
        let mut row = [0.0; TASK.0.next_multiple_of(LANES)];
        for p in 0..k {
            let from = &src[p * ld..p * ld + cols];
            let ahead = from.as_ptr().wrapping_add(AHEAD_ROWS * ld);
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                s.store(&mut row[j..j + LANES], T::get(s, &from[j..]));
            }
            for (panel, row) in row.as_chunks::<MR>().0[..panels].iter().enumerate() {
                dst[(panel * k + p) * MR..][..MR].copy_from_slice(row);
            }
        }
    }
}

kernel! {
    /// Widens `rows` rows of `k` elements (row stride `ld`) into dense rows.
    pub(crate) fn widen[T: Element](src: &[T], ld: usize, rows: usize, k: usize, dst: &mut [f32]) = |s: S| {
        for i in 0..rows {
            let from = &src[i * ld..i * ld + k];
            let to = &mut dst[i * k..(i + 1) * k];
            for p in (0..k).step_by(LANES) {
                s.store(&mut to[p..], T::get(s, &from[p..]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::NR;
    use super::*;

    #[test]
    fn panels_hold_the_operand_and_zeros() {
        for (k, cols) in [(1usize, 1usize), (16, 16), (17, 64), (40, 33), (5, 63), (33, 48)] {
            let ld = 70;
            let src: Vec<f32> = (0..70 * 70).map(|i| i as f32 + 1.0).collect();
            let mut dst = vec![f32::NAN; k * NR];
            let wide = cols.next_multiple_of(LANES);
            pack_rows(&src, ld, k, cols, NR, &mut dst);
            let at = |i: usize, j: usize| if j < cols { src[i] } else { 0.0 };
            assert!((0..k).all(|p| (0..wide).all(|j| dst[p * NR + j] == at(p * ld + j, j))));
            pack_columns(&src, ld, k, cols, NR, &mut dst);
            assert!((0..k).all(|p| (0..wide).all(|j| dst[p * NR + j] == at((j * ld + p) % src.len(), j))));
            let mut left = vec![f32::NAN; cols.next_multiple_of(MR) * k];
            pack_left(&src, ld, k, cols, &mut left);
            let of = |p: usize, j: usize| left[(j / MR * k + p) * MR + j % MR];
            assert!((0..k).all(|p| (0..cols).all(|j| of(p, j) == src[p * ld + j])));
        }
    }
}
