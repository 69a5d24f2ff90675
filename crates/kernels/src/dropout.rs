//! Elements left out at random, by a counter: what is drawn for an element follows from its key, row and column alone.

use std::ops::Range;

use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Acc, Element, Storage};

/// Which elements are left out (Srivastava et al. 2014, JMLR 15): each with probability [`Dropout::dropped`]; what is kept is
/// divided by the share that is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// What is drawn is a function of this, the row and the column.
    pub key: u64,
    /// Share of elements that are left out, at least 0 and below 1.
    pub rate: f32,
}

/// Draws have 16 bits: four come from one number of 64.
const DRAWS: u32 = 1 << 16;
const DRAWS_AT_ONCE: usize = 4;
/// Increment of SplitMix64's state, 2^64 over the golden ratio (Steele, Lea and Flood 2014, figure 17).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Dropout {
    /// Draws below this are left out.
    pub fn cut(self) -> u32 {
        ((f64::from(self.rate) * f64::from(DRAWS)).round() as u32).min(DRAWS - 1)
    }

    /// The probability itself: the rate to the nearest draw.
    pub fn dropped(self) -> f64 {
        f64::from(self.cut()) / f64::from(DRAWS)
    }

    /// What is kept is multiplied by this.
    pub fn factor(self) -> f32 {
        (1.0 / (1.0 - self.dropped())) as f32
    }

    /// Other draws for each `plane`, of a stack of rows and columns.
    pub(crate) fn of_plane(self, plane: u64) -> Dropout {
        Dropout { key: mix(self.key.wrapping_add(mix(plane))), ..self }
    }

    /// What the element of a row and column is multiplied by: 0 or [`Dropout::factor`].
    pub(crate) fn of(self, row: u64, col: usize) -> f32 {
        let draw = draws(self.row(row), col / DRAWS_AT_ONCE)[col % DRAWS_AT_ONCE];
        factor_of(draw, (self.cut(), self.factor()))
    }

    /// [`Dropout::of`] for columns from `col` on.
    pub(crate) fn of_row(self, row: u64, col: usize, factors: &mut [f32]) {
        row_factors((self.row(row), self.cut(), self.factor()), col, factors);
    }

    /// Where the draws of a row begin.
    fn row(self, row: u64) -> u64 {
        mix(self.key ^ mix(row))
    }
}

/// The draws of four columns, of a row that begins at `key`.
#[inline(always)]
fn draws(key: u64, four: usize) -> [u16; DRAWS_AT_ONCE] {
    let drawn = mix(key.wrapping_add((four as u64).wrapping_mul(GOLDEN)));
    std::array::from_fn(|i| (drawn >> (16 * i)) as u16)
}

/// SplitMix64 at state `x`.
#[inline(always)]
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What an element with this draw is multiplied by.
#[inline(always)]
fn factor_of(draw: u16, (cut, scale): (u32, f32)) -> f32 {
    if u32::from(draw) >= cut { scale } else { 0.0 }
}

/// The same of several.
#[inline(always)]
fn put_factors(to: &mut [f32], drawn: &[u16], of: (u32, f32)) {
    to.iter_mut().zip(drawn).for_each(|(to, draw)| *to = factor_of(*draw, of));
}

/// `y = acc + kept(x + bias)` by rows of `cols` elements; `place` numbers row `i` wherever it is computed.
///
/// ```
/// use kernels::{Acc, Dropout, Pool, dropout};
/// let (pool, of) = (Pool::new(2), Dropout { key: 7, rate: 0.5 });
/// let (x, mut all, mut last) = ([1.0f32; 4 * 8], [0.0f32; 4 * 8], [0.0f32; 8]);
/// dropout(&pool, of, &|row| row as u64, &x, None, Acc::None, &mut all, 8);
/// assert!(all.iter().all(|y| [0.0, 2.0].contains(y)));
/// // The last row alone, computed elsewhere.
/// dropout(&pool, of, &|_| 3, &x[..8], None, Acc::None, &mut last, 8);
/// assert_eq!(all[24..], last);
/// ```
pub fn dropout<T: Storage>(
    pool: &Pool,
    of: Dropout,
    place: &(dyn Fn(usize) -> u64 + Sync),
    x: &[T],
    bias: Option<&[T]>,
    acc: Acc<'_, T>,
    y: &mut [T],
    cols: usize,
) {
    assert_eq!((x.len(), bias.map_or(cols, <[T]>::len)), (y.len(), cols));
    assert_eq!(x.len() % cols.max(1), 0, "whole rows");
    let (rows, y) = (x.len() / cols.max(1), Parts::new(y));
    let (cut, scale) = (of.cut(), of.factor());
    pool.rows(rows, 4 * cols, &|range: Range<usize>, _| {
        for row in range {
            let at = row * cols..(row + 1) * cols;
            // SAFETY: tasks have disjoint rows.
            let y = unsafe { y.part(at.clone()) };
            let held = match acc {
                Acc::From(held) => Some(&held[at.clone()]),
                _ => None,
            };
            let in_place = matches!(acc, Acc::InPlace);
            row_kept((of.row(place(row)), cut, scale), &x[at], bias, held, in_place, y);
        }
    });
}

kernel! { fn row_kept[T: Element](
    c: (u64, u32, f32), x: &[T], bias: Option<&[T]>, held: Option<&[T]>, in_place: bool, y: &mut [T]
) = |s: S| {
    let (key, cut, scale) = c;
    for j in (0..y.len()).step_by(LANES) {
        let mut factors = [0.0f32; LANES];
        for (q, four) in factors.chunks_exact_mut(DRAWS_AT_ONCE).enumerate() {
            put_factors(four, &draws(key, j / DRAWS_AT_ONCE + q), (cut, scale));
        }
        let mut v = T::get(s, &x[j..]);
        if let Some(bias) = bias {
            v = s.add(v, T::get(s, &bias[j..]));
        }
        let factors = s.load(&factors);
        let sum = match held {
            Some(held) => s.fma(v, factors, T::get(s, &held[j..])),
            None if in_place => s.fma(v, factors, T::get(s, &y[j..])),
            None => s.mul(v, factors),
        };
        T::put(s, &mut y[j..], sum);
    }
} }

/// Elements whose draws are made together, as many as keep a processor's widest vectors busy.
const TOGETHER: usize = 32;

kernel! { fn row_factors[](c: (u64, u32, f32), col: usize, factors: &mut [f32]) = |_s: S| {
    let (key, cut, scale) = c;
    let (mut four, skip) = (col / DRAWS_AT_ONCE, col % DRAWS_AT_ONCE);
    let (begun, rest) = factors.split_at_mut(factors.len().min((DRAWS_AT_ONCE - skip) % DRAWS_AT_ONCE));
    if skip > 0 {
        put_factors(begun, &draws(key, four)[skip..], (cut, scale));
        four += 1;
    }
    for to in rest.chunks_mut(TOGETHER) {
        let drawn: [[u16; DRAWS_AT_ONCE]; TOGETHER / DRAWS_AT_ONCE] = std::array::from_fn(|i| draws(key, four + i));
        put_factors(to, drawn.as_flattened(), (cut, scale));
        four += TOGETHER / DRAWS_AT_ONCE;
    }
} }
