//! Heads dealt to ranks: rows that context-parallel ranks exchange so that each attends to whole sequences with its share
//! of the heads (Jacobs et al. 2023, arXiv 2309.14509, section 3.1).

use super::Attention;
use crate::pool::{Parts, Pool};
use crate::simd::{LANES, kernel};
use crate::storage::{Element, Storage};

/// One section of a packed row and of a rank's share of it: queries, keys or values.
struct Section {
    /// Where the rank's heads begin in the packed row.
    from: usize,
    /// Where they lie in the share.
    to: usize,
    len: usize,
    /// How many ranks in a row have the same ones; this one is not the first of them if `again`.
    copies: usize,
    again: bool,
}

/// The share of a rank: as many query heads as each other one's, and their key and value heads. Where those are fewer than
/// ranks, several have copies of one.
struct Share {
    sections: [Section; 3],
    /// Row length of the share.
    ld: usize,
}

impl Share {
    fn of(shape: &Attention, ranks: usize, rank: usize) -> Share {
        let (q, kv) = (shape.heads, shape.kv_heads);
        let copies = ranks.checked_div(kv).map_or(1, |copies| copies.max(1));
        assert!(
            q.is_multiple_of(ranks) && (kv * copies).is_multiple_of(ranks),
            "{q} query and {kv} key heads over {ranks} ranks"
        );
        let (mut from, mut to) = (0, 0);
        let sections = [(q, 1, shape.head_dim), (kv, copies, shape.head_dim), (kv, copies, shape.value_dim)];
        let sections = sections.map(|(heads, copies, dim)| {
            let len = heads * copies / ranks * dim;
            let first = rank * heads / ranks * dim;
            let section =
                Section { from: from + first, to, len, copies, again: !rank.is_multiple_of(copies) };
            (from, to) = (from + heads * dim, to + len);
            section
        });
        Share { sections, ld: to }
    }
}

fn lens(shape: &Attention, ranks: usize) -> (usize, usize) {
    let rows = shape.seqs * shape.seq;
    (rows * shape.ld(), ranks * rows * Share::of(shape, ranks, 0).ld)
}

/// Deals packed rows to `ranks` ranks: `parts` has, of each sequence, its rows for every rank in turn, each with that rank's
/// share of the heads: queries, keys, values. An output is all queries, `kv_heads = 0`.
pub fn split_heads<T: Storage>(pool: &Pool, shape: &Attention, ranks: usize, packed: &[T], parts: &mut [T]) {
    assert_eq!((packed.len(), parts.len()), lens(shape, ranks), "packed rows and parts");
    let (seq, ld) = (shape.seq, shape.ld());
    let width = Share::of(shape, ranks, 0).ld;
    let parts = Parts::new(parts);
    pool.rows(shape.seqs * ranks * seq, width, &|range, _| {
        for row in range {
            let (run, at) = (row / seq, row % seq);
            let from = &packed[(run / ranks * seq + at) * ld..][..ld];
            // SAFETY: tasks have disjoint rows.
            let to = unsafe { parts.part(row * width..(row + 1) * width) };
            for s in Share::of(shape, ranks, run % ranks).sections {
                to[s.to..s.to + s.len].copy_from_slice(&from[s.from..s.from + s.len]);
            }
        }
    });
}

/// Back from parts to packed rows: the derivative of [`split_heads`]. Of heads that several ranks have copies of the sum,
/// in f32, in the order of the ranks.
pub fn join_heads<T: Storage>(pool: &Pool, shape: &Attention, ranks: usize, parts: &[T], packed: &mut [T]) {
    assert_eq!((packed.len(), parts.len()), lens(shape, ranks), "packed rows and parts");
    let (seq, ld) = (shape.seq, shape.ld());
    let width = Share::of(shape, ranks, 0).ld;
    let packed = Parts::new(packed);
    pool.rows(shape.seqs * seq, ld, &|range, _| {
        for row in range {
            let (sequence, at) = (row / seq, row % seq);
            // SAFETY: tasks have disjoint rows.
            let to = unsafe { packed.part(row * ld..(row + 1) * ld) };
            for rank in 0..ranks {
                let from = &parts[((sequence * ranks + rank) * seq + at) * width..];
                let sections = Share::of(shape, ranks, rank).sections;
                for s in sections.iter().filter(|s| !s.again) {
                    let to = &mut to[s.from..s.from + s.len];
                    match s.copies {
                        1 => to.copy_from_slice(&from[s.to..s.to + s.len]),
                        copies => sum(&from[s.to..], seq * width, copies, to),
                    }
                }
            }
        }
    });
}

kernel! {
    /// The sum of `copies` runs that begin `apart` from each other.
    fn sum[T: Element](from: &[T], apart: usize, copies: usize, to: &mut [T]) = |s: S| {
        let len = to.len();
        for j in (0..len).step_by(LANES) {
            let mut sum = T::get(s, &from[j..len]);
            for copy in 1..copies {
                sum = s.add(sum, T::get(s, &from[copy * apart..][j..len]));
            }
            T::put(s, &mut to[j..], sum);
        }
    }
}
