//! Sums of what is already there: biases, gradients of tied tables, partial sums of shards.

use std::ops::Range;

use crate::pool::{Parts, Pool};
use crate::storage::Storage;
use crate::tree::{MAX_DEPTH, Merge, Step, depth, leaves, step};

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

/// Adds the roots of counters that lie side by side in the order of `tree`, radices bottom-up: each root is the last of
/// a counter's `[levels, len]`, and the last counter's becomes their sum.
pub fn add_roots(pool: &Pool, counters: &mut [f32], levels: usize, len: usize, tree: &[u32]) {
    /// Elements at a time: their partial sums stay in the first-level cache.
    const AT_ONCE: usize = 64;
    let count = leaves(tree);
    assert!(counters.len() == count * levels * len && depth(tree) <= MAX_DEPTH);
    let all = Parts::new(counters);
    pool.rows(len, count, &|range: Range<usize>, _| {
        let mut partial = [[0.0f32; AT_ONCE]; MAX_DEPTH];
        for start in range.clone().step_by(AT_ONCE) {
            let n = AT_ONCE.min(range.end - start);
            for leaf in 0..count {
                let at = (leaf * levels + levels - 1) * len + start;
                // SAFETY: tasks have disjoint elements of every root.
                let root = unsafe { all.part(at..at + n) };
                let mut sum = [0.0f32; AT_ONCE];
                sum[..n].copy_from_slice(root);
                let (merge, store) = match step(tree, leaf) {
                    Step::Keep(m) => (m.merge, Some(m.store)),
                    Step::Root { merge } => (merge, None),
                };
                for held in &partial[..merge] {
                    sum.iter_mut().zip(held).for_each(|(sum, held)| *sum += *held);
                }
                match store {
                    Some(level) => partial[level] = sum,
                    None => root.copy_from_slice(&sum[..n]),
                }
            }
        }
    });
}
