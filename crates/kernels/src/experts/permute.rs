//! Copies of rows in the order of their experts, and back.

use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Acc, Element, Storage};

/// Columns that are summed at a time: in registers and the first-level cache.
const STRIP: usize = 16 * LANES;

/// Copies of each of `n` rows of `x`, `[n, dim]`, at the places of `index` (`[n, 2 k]`, see [`super::route`]).
pub fn permute<T: Storage>(
    pool: &Pool,
    x: &[T],
    index: &[u32],
    copies: &mut [T],
    (n, k, dim): (usize, usize, usize),
) {
    assert_eq!((x.len(), index.len(), copies.len()), (n * dim, 2 * n * k, n * k * dim));
    let copies = Parts::new(copies);
    pool.rows(n, (k + 1) * dim, &|rows, _| {
        for row in rows {
            for at in &index[2 * row * k..(2 * row + 1) * k] {
                let at = *at as usize * dim;
                // SAFETY: every copy has a place of its own.
                unsafe { copies.part(at..at + dim) }.copy_from_slice(&x[row * dim..(row + 1) * dim]);
            }
        }
    });
}

/// The gradient of [`permute`]'s input: `acc` plus the sum over a row's copies in the order of its choices.
pub fn permute_dx<T: Storage>(
    pool: &Pool,
    dcopies: &[T],
    index: &[u32],
    acc: Acc<'_, T>,
    dx: &mut [T],
    (n, k, dim): (usize, usize, usize),
) {
    sum_copies(pool, dcopies, None, index, acc, dx, (n, k, dim));
}

/// y = acc + the sum over a row's copies, each times its gate (`[n, k]`), in the order of its choices.
pub fn unpermute<T: Storage>(
    pool: &Pool,
    copies: &[T],
    gates: &[f32],
    index: &[u32],
    acc: Acc<'_, T>,
    y: &mut [T],
    (n, k, dim): (usize, usize, usize),
) {
    assert_eq!(gates.len(), n * k);
    sum_copies(pool, copies, Some(gates), index, acc, y, (n, k, dim));
}

fn sum_copies<T: Storage>(
    pool: &Pool,
    copies: &[T],
    gates: Option<&[f32]>,
    index: &[u32],
    acc: Acc<'_, T>,
    y: &mut [T],
    (n, k, dim): (usize, usize, usize),
) {
    assert_eq!((y.len(), index.len(), copies.len()), (n * dim, 2 * n * k, n * k * dim));
    let y = Parts::new(y);
    pool.rows(n, (k + 1) * dim, &|rows, _| {
        for row in rows {
            // SAFETY: tasks have disjoint rows.
            let out = unsafe { y.part(row * dim..(row + 1) * dim) };
            let from = match acc {
                Acc::From(from) => Some(&from[row * dim..(row + 1) * dim]),
                _ => None,
            };
            let gates = gates.map(|g| &g[row * k..(row + 1) * k]);
            let in_place = matches!(acc, Acc::InPlace);
            row_sum(copies, gates, &index[2 * row * k..(2 * row + 1) * k], from, in_place, out);
        }
    });
}

kernel! { fn row_sum[T: Element](
    copies: &[T], gates: Option<&[f32]>, places: &[u32], from: Option<&[T]>, in_place: bool, y: &mut [T]
) = |s: S| {
    let dim = y.len();
    for start in (0..dim).step_by(STRIP) {
        let end = dim.min(start + STRIP);
        let mut sums = [s.splat(0.0); STRIP / LANES];
        for (slot, place) in places.iter().enumerate() {
            let copy = &copies[*place as usize * dim..][..dim];
            let gate = gates.map(|g| s.splat(g[slot]));
            for (sum, j) in sums.iter_mut().zip((start..end).step_by(LANES)) {
                let x = T::get(s, &copy[j..]);
                *sum = match gate {
                    Some(gate) => s.fma(gate, x, *sum),
                    None => s.add(*sum, x),
                };
            }
        }
        for (sum, j) in sums.into_iter().zip((start..end).step_by(LANES)) {
            let sum = match from {
                Some(from) => s.add(T::get(s, &from[j..]), sum),
                None if in_place => s.add(T::get(s, &y[j..]), sum),
                None => sum,
            };
            T::put(s, &mut y[j..], sum);
        }
    }
} }

/// The gradients of [`unpermute`]'s copies and gates.
pub fn unpermute_dx<T: Storage>(
    pool: &Pool,
    dy: &[T],
    copies: &[T],
    gates: &[f32],
    index: &[u32],
    (dcopies, dgates): (&mut [T], &mut [f32]),
    (n, k, dim): (usize, usize, usize),
) {
    assert_eq!((dy.len(), index.len(), copies.len()), (n * dim, 2 * n * k, n * k * dim));
    assert_eq!((dcopies.len(), dgates.len(), gates.len()), (n * k * dim, n * k, n * k));
    let (dcopies, dgates) = (Parts::new(dcopies), Parts::new(dgates));
    pool.rows(n, 3 * k * dim, &|rows, _| {
        for row in rows {
            let dy = &dy[row * dim..(row + 1) * dim];
            // SAFETY: tasks have disjoint rows.
            let dgates = unsafe { dgates.part(row * k..(row + 1) * k) };
            let places = &index[2 * row * k..(2 * row + 1) * k];
            for ((place, gate), dgate) in places.iter().zip(&gates[row * k..]).zip(dgates) {
                let at = *place as usize * dim;
                // SAFETY: every copy has a place of its own.
                let dcopy = unsafe { dcopies.part(at..at + dim) };
                *dgate = scale_and_dot(dy, &copies[at..at + dim], *gate, dcopy);
            }
        }
    });
}

kernel! { fn scale_and_dot[T: Element](dy: &[T], copy: &[T], gate: f32, dcopy: &mut [T]) -> f32 = |s: S| {
    let (gate, mut sum) = (s.splat(gate), s.splat(0.0));
    for j in (0..dy.len()).step_by(LANES) {
        let d = T::get(s, &dy[j..]);
        T::put(s, &mut dcopy[j..], s.mul(gate, d));
        sum = s.fma(d, T::get(s, &copy[j..]), sum);
    }
    s.sum(sum)
} }
