//! Sums of what is already there: biases, gradients of tied tables, partial sums of shards.

use std::ops::Range;

use crate::pool::{Parts, Pool};
use crate::storage::Storage;
use crate::tree::Merge;

/// `y = x + r + b` by rows of `b.len()` elements, rounded once.
pub fn add_bias<T: Storage>(pool: &Pool, x: &[T], r: &[T], b: &[T], y: &mut [T]) {
    let dim = b.len();
    assert_eq!((x.len(), r.len(), y.len() % dim.max(1)), (y.len(), y.len(), 0));
    let (rows, y) = (y.len() / dim.max(1), Parts::new(y));
    pool.rows(rows, dim, &|range: Range<usize>, _| {
        let range = range.start * dim..range.end * dim;
        // SAFETY: tasks have disjoint ranges.
        let y = unsafe { y.part(range.clone()) };
        let rows = x[range.clone()].chunks(dim).zip(r[range].chunks(dim)).zip(y.chunks_mut(dim));
        for ((x, r), y) in rows {
            for i in 0..dim {
                y[i] = T::of(x[i].one() + r[i].one() + b[i].one());
            }
        }
    });
}

/// `y += x`.
pub fn add_to(pool: &Pool, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    add_levels(pool, x, y, Merge { merge: 1, store: 0 });
}

/// A result `x` joins partial sums `[levels, x.len()]` as `m` says.
pub fn add_levels(pool: &Pool, x: &[f32], levels: &mut [f32], m: Merge) {
    let count = x.len();
    assert!(m.levels() * count <= levels.len(), "{} levels of {count} in {}", m.levels(), levels.len());
    let levels = Parts::new(levels);
    pool.rows(count, 1 + m.merge, &|range: Range<usize>, _| {
        let mut sums = [0.0f32; 256];
        for start in range.clone().step_by(sums.len()) {
            let part = start..range.end.min(start + sums.len());
            // SAFETY: tasks have disjoint elements, and with them disjoint elements of every level.
            let of =
                |level: usize| unsafe { levels.part(level * count + part.start..level * count + part.end) };
            let sums = &mut sums[..part.len()];
            sums.copy_from_slice(&x[part.clone()]);
            for level in 0..m.merge {
                sums.iter_mut().zip(of(level)).for_each(|(sum, held)| *sum += *held);
            }
            of(m.store).copy_from_slice(sums);
        }
    });
}
