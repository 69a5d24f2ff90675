//! The register tile: the one loop where a step spends its time.

use super::{MR, NR};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Backend, LANES, Scalar, Simd, backend};

/// The arguments of a tile: c = (load ? c : 0) + a b.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Length of the chain.
    pub(crate) k: usize,
    /// `a[i][p]` is at `a + i * a_row + p * a_col`.
    pub(crate) a: *const f32,
    pub(crate) a_row: usize,
    pub(crate) a_col: usize,
    /// `b[p][j]` is at `b + p * b_row + j`; rows are read in whole vectors.
    pub(crate) b: *const f32,
    pub(crate) b_row: usize,
    /// `c[i][j]` is at `c + i * c_row + j`; rows are written in whole vectors.
    pub(crate) c: *mut f32,
    pub(crate) c_row: usize,
    /// Do chains go on from what `c` holds?
    pub(crate) load: bool,
}

/// Columns of the widest tile that is computed at once, and of a packed panel of this crate's products. A strip of a wider
/// panel would be read line by line from far apart, which fills a part of the first-level cache and leaves the rest empty.
pub(crate) fn panel() -> usize {
    match backend() {
        Backend::Avx512 => NR,
        Backend::Avx2 | Backend::Scalar => LANES,
    }
}

/// Computes the vectors of a tile from the given one on.
type TileFn = unsafe fn(&Tile, usize);

/// Computes a tile of `rows` x `cols` (at most [`MR`] x [`NR`]).
///
/// # Safety
/// `a` can be read for `rows` x `k`, `b` for `k` rows and `c` read and written for `rows` rows of `cols` rounded up to
/// a multiple of 16 columns.
#[inline]
pub(crate) unsafe fn tile(rows: usize, cols: usize, t: &Tile) {
    debug_assert!((1..=MR).contains(&rows) && (1..=NR).contains(&cols));
    let vectors = cols.div_ceil(LANES);
    match backend() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the backend was detected; memory by contract.
        Backend::Avx512 => unsafe { TILES512[rows - 1][vectors - 1](t, 0) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above, vector by vector.
        Backend::Avx2 => unsafe { strips(&TILES256[rows - 1], vectors, t) },
        // SAFETY: memory by contract, vector by vector.
        _ => unsafe { strips(&TILES[rows - 1], vectors, t) },
    }
}

/// Computes a tile in strips of one vector.
unsafe fn strips(one: &TileFn, vectors: usize, t: &Tile) {
    for strip in 0..vectors {
        // SAFETY: the strip lies inside the tile. It is told by its number: a copy of the tile would be read back in wider
        // pieces than it was written in, which waits until all stores before it, results among them, have left the core.
        unsafe { one(t, strip) }
    }
}

/// Links of a chain in a round of the loop: with a known distance between elements of `a` their addresses are constants
/// beside two registers, and the loop's own arithmetic is a fourth.
const LINKS: usize = 4;

#[inline(always)]
unsafe fn body<S: Simd, const M: usize, const N: usize>(s: S, t: &Tile, from: usize) {
    // SAFETY: by contract of `tile`; the distance is the tile's own.
    unsafe {
        match t.a_col {
            1 if M == MR => chains::<S, M, N, 1>(s, t, from),
            MR if M == MR => chains::<S, M, N, MR>(s, t, from),
            _ => chains::<S, M, N, 0>(s, t, from),
        }
    }
}

/// The tile, of a left operand whose elements are `COL` apart in a row, or as far as it says if that is 0.
#[inline(always)]
unsafe fn chains<S: Simd, const M: usize, const N: usize, const COL: usize>(s: S, t: &Tile, from: usize) {
    let &Tile { k, mut a, a_row, a_col, b, b_row, c, c_row, load } = t;
    let (mut b, c) = (b.wrapping_add(from * LANES), c.wrapping_add(from * LANES));
    let a_col = if COL > 0 { COL } else { a_col };
    let mut sums = [[s.splat(0.0); N]; M];
    if load {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: inside c.
                *sum = unsafe { s.load_at(c.add(i * c_row + j * LANES)) };
            }
        }
    }
    let mut left = k;
    while left >= LINKS {
        for p in 0..LINKS {
            // SAFETY: elements p of the rows of a, and row p of b.
            unsafe { link(s, &mut sums, a.add(p * a_col), a_row, b.add(p * b_row)) };
        }
        (a, b) = (a.wrapping_add(LINKS * a_col), b.wrapping_add(LINKS * b_row));
        left -= LINKS;
    }
    for _ in 0..left {
        // SAFETY: as above.
        unsafe { link(s, &mut sums, a, a_row, b) };
        (a, b) = (a.wrapping_add(a_col), b.wrapping_add(b_row));
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: inside c.
            unsafe { s.store_at(c.add(i * c_row + j * LANES), sum) };
        }
    }
}

/// Adds the products of a column of `a`, its elements `a_row` apart, with a row of `b`.
#[inline(always)]
unsafe fn link<S: Simd, const M: usize, const N: usize>(
    s: S,
    sums: &mut [[S::V; N]; M],
    a: *const f32,
    a_row: usize,
    b: *const f32,
) {
    let mut right = [s.splat(0.0); N];
    for (j, right) in right.iter_mut().enumerate() {
        // SAFETY: by contract.
        *right = unsafe { s.load_at(b.add(j * LANES)) };
    }
    for (i, sums) in sums.iter_mut().enumerate() {
        // SAFETY: by contract.
        let left = s.splat(unsafe { *a.add(i * a_row) });
        for (sum, &right) in sums.iter_mut().zip(&right) {
            *sum = s.fma(left, right, *sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn tile512<const M: usize, const N: usize>(t: &Tile, from: usize) {
    // SAFETY: called only where AVX-512 was detected; memory by contract of `tile`.
    unsafe { body::<_, M, N>(Avx512::new(), t, from) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile256<const M: usize>(t: &Tile, from: usize) {
    // SAFETY: called only where AVX2 and FMA were detected; memory by contract of `tile`.
    unsafe { body::<_, M, 1>(Avx2::new(), t, from) }
}

unsafe fn tile_any<const M: usize>(t: &Tile, from: usize) {
    // SAFETY: memory by contract of `tile`.
    unsafe { body::<_, M, 1>(Scalar, t, from) }
}

#[cfg(target_arch = "x86_64")]
static TILES512: [[TileFn; NR / LANES]; MR] = [
    [tile512::<1, 1>, tile512::<1, 2>, tile512::<1, 3>, tile512::<1, 4>],
    [tile512::<2, 1>, tile512::<2, 2>, tile512::<2, 3>, tile512::<2, 4>],
    [tile512::<3, 1>, tile512::<3, 2>, tile512::<3, 3>, tile512::<3, 4>],
    [tile512::<4, 1>, tile512::<4, 2>, tile512::<4, 3>, tile512::<4, 4>],
    [tile512::<5, 1>, tile512::<5, 2>, tile512::<5, 3>, tile512::<5, 4>],
    [tile512::<6, 1>, tile512::<6, 2>, tile512::<6, 3>, tile512::<6, 4>],
];

#[cfg(target_arch = "x86_64")]
static TILES256: [TileFn; MR] =
    [tile256::<1>, tile256::<2>, tile256::<3>, tile256::<4>, tile256::<5>, tile256::<6>];

static TILES: [TileFn; MR] =
    [tile_any::<1>, tile_any::<2>, tile_any::<3>, tile_any::<4>, tile_any::<5>, tile_any::<6>];
