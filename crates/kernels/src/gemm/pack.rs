//! Operands laid out in the order in which tiles read them.

use super::NR;
use crate::pool::Parts;
use crate::simd::{LANES, Simd, kernel};
use crate::storage::Element;

/// How far ahead of their use rows and columns are asked for: enough to hide memory behind the copying.
const AHEAD_ROWS: usize = 16;
const AHEAD_COLUMNS: usize = 2 * LANES;

kernel! {
    /// Packs a panel of `cols <= NR` columns and `k` rows of a row-major `src` (row stride `ld`): row p goes to
    /// `dst[p * NR..]`, filled up with zeros to whole vectors.
    pub(crate) fn pack_rows[T: Element](src: &[T], ld: usize, k: usize, cols: usize, dst: &mut [f32]) = |s: S| {
        for p in 0..k {
            let from = &src[p * ld..p * ld + cols];
            let to = &mut dst[p * NR..(p + 1) * NR];
            let ahead = from.as_ptr().wrapping_add(AHEAD_ROWS * ld);
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                s.store(&mut to[j..j + LANES], T::get(s, &from[j..]));
            }
        }
    }
}

kernel! {
    /// Packs all columns of `src` (dense rows of `cols`) into panels that are `stride` apart; row p of a panel goes to
    /// `dst[p * NR..]`.
    ///
    /// The panels are parts of a whole that other tasks fill for other rows; `at` is the offset of the first row.
    pub(crate) fn pack_all_rows[T: Element](
        src: &[T], cols: usize, whole: &Parts<'_, f32>, at: usize, stride: usize
    ) = |s: S| {
        for (p, from) in src.chunks_exact(cols.max(1)).enumerate() {
            let ahead = from.as_ptr().wrapping_add(AHEAD_ROWS / 4 * cols);
            for (panel, from) in from.chunks(NR).enumerate() {
                let to = panel * stride + at + p * NR;
                // SAFETY: a row of a panel belongs to one task.
                let to = unsafe { whole.part(to..to + NR) };
                for j in (0..from.len()).step_by(LANES) {
                    s.prefetch(ahead.wrapping_add(panel * NR + j).cast());
                    s.store(&mut to[j..j + LANES], T::get(s, &from[j..]));
                }
            }
        }
    }
}

kernel! {
    /// Packs a panel of `cols <= NR` columns and `k` rows of the transpose of a row-major `src` (row stride `ld`):
    /// element (p, j) is `src[j * ld + p]`. Filled up with zeros to whole vectors.
    pub(crate) fn pack_columns[T: Element](src: &[T], ld: usize, k: usize, cols: usize, dst: &mut [f32]) = |s: S| {
        for j in (0..cols).step_by(LANES) {
            let lines = LANES.min(cols - j);
            for p in (0..k).step_by(LANES) {
                if lines == LANES && p + LANES <= k {
                    let from = &src[j * ld + p..(j + LANES - 1) * ld + p + LANES];
                    transpose_block(s, from, ld, &mut dst[p * NR + j..(p + LANES - 1) * NR + j + LANES]);
                    continue;
                }
                let mut block = [s.splat(0.0); LANES];
                for i in 0..lines {
                    let at = (j + i) * ld;
                    block[i] = T::get(s, &src[at + p..at + k]);
                }
                s.transpose(&mut block);
                for i in 0..LANES.min(k - p) {
                    let at = (p + i) * NR + j;
                    s.store(&mut dst[at..at + LANES], block[i]);
                }
            }
        }
    }
}

/// Transposes a whole block from rows that are `ld` apart into rows that are [`NR`] apart, and asks for what will be
/// needed soon.
#[inline(always)]
fn transpose_block<S: Simd, T: Element>(s: S, src: &[T], ld: usize, dst: &mut [f32]) {
    assert!(src.len() == (LANES - 1) * ld + LANES && dst.len() == (LANES - 1) * NR + LANES);
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
        unsafe { s.store_at(dst.as_mut_ptr().add(i * NR), row) };
    }
}

kernel! {
    /// Copies `k` rows of `cols` elements (row stride `ld`) into rows of whole vectors, for use as a transposed left
    /// operand.
    pub(crate) fn pack_left[T: Element](src: &[T], ld: usize, k: usize, cols: usize, dst: &mut [f32]) = |s: S| {
        let wide = cols.next_multiple_of(LANES);
        for p in 0..k {
            let from = &src[p * ld..p * ld + cols];
            let to = &mut dst[p * wide..(p + 1) * wide];
            let ahead = from.as_ptr().wrapping_add(AHEAD_ROWS * ld);
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                s.store(&mut to[j..j + LANES], T::get(s, &from[j..]));
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
    use super::*;

    #[test]
    fn panels_hold_the_operand_and_zeros() {
        for (k, cols) in [(1usize, 1usize), (16, 16), (17, 64), (40, 33), (5, 63), (33, 48)] {
            let ld = 70;
            let src: Vec<f32> = (0..70 * 70).map(|i| i as f32 + 1.0).collect();
            let mut dst = vec![f32::NAN; k * NR];
            let wide = cols.next_multiple_of(LANES);
            pack_rows(&src, ld, k, cols, &mut dst);
            let at = |i: usize, j: usize| if j < cols { src[i] } else { 0.0 };
            assert!((0..k).all(|p| (0..wide).all(|j| dst[p * NR + j] == at(p * ld + j, j))));
            pack_columns(&src, ld, k, cols, &mut dst);
            assert!((0..k).all(|p| (0..wide).all(|j| dst[p * NR + j] == at((j * ld + p) % src.len(), j))));
            let mut left = vec![f32::NAN; wide * k];
            pack_left(&src, ld, k, cols, &mut left);
            assert!((0..k).all(|p| (0..wide).all(|j| left[p * wide + j] == at(p * ld + j, j))));
        }
    }
}
