//! Hashes that add up: of elements by their place in a parameter, so that they do not depend on who holds what.
//!
//! The sum of bits times an odd number that follows from the place, modulo 2^64: a flipped bit changes it for certain, and
//! two changes cancel each other with the odds of a draw. Pieces may be summed in any order, by anybody.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use half::bf16;

use crate::state::Run;

/// Elements of a buffer.
pub(super) enum Bits<'a> {
    Single(Cow<'a, [f32]>),
    Half(Cow<'a, [bf16]>),
}

/// Where elements that follow each other lie in their parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    seed: u64,
    /// Of the box that is held of the parameter.
    row0: usize,
    col0: usize,
    cols: usize,
    /// Of the whole parameter.
    all_cols: usize,
    /// The first element within the box.
    within: usize,
}

impl Place {
    pub(super) fn of(run: &Run<'_>, seed: u64) -> Place {
        let p = run.part;
        let (row0, col0, cols, all_cols) = (p.row0, p.col0, p.cols, p.global.1);
        Place { seed, row0, col0, cols, all_cols, within: run.within.start }
    }

    /// Runs of elements that follow each other in the parameter too: index of the first, and which they are.
    fn rows(self, count: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let Place { row0, col0, cols, all_cols, within, .. } = self;
        let mut at = 0;
        std::iter::from_fn(move || {
            let (row, col) = ((within + at) / cols.max(1), (within + at) % cols.max(1));
            let index = (row0 + row) * all_cols + col0 + col;
            let len = if cols == all_cols { count - at } else { (cols - col).min(count - at) };
            let range = at..at + len;
            at += len;
            (len > 0).then_some((index, range))
        })
    }
}

/// A piece to be hashed.
pub(super) struct Job<'a> {
    /// Index of the part that it is of.
    pub(super) part: usize,
    pub(super) is_own: bool,
    pub(super) bits: Arc<Bits<'a>>,
    /// In the buffer's elements.
    pub(super) at: Range<usize>,
    pub(super) place: Place,
}

impl Job<'_> {
    fn sum(&self) -> u64 {
        let mut sum = 0_u64;
        for (index, range) in self.place.rows(self.at.len()) {
            let at = self.at.start + range.start..self.at.start + range.end;
            sum = sum.wrapping_add(match &*self.bits {
                Bits::Single(all) => hash(bytemuck::cast_slice::<f32, u32>(&all[at]), index, self.place.seed),
                Bits::Half(all) => hash(bytemuck::cast_slice::<bf16, u16>(&all[at]), index, self.place.seed),
            });
        }
        sum
    }
}

/// The hashes of all jobs, in their order.
pub(super) fn all(jobs: &[Job<'_>], threads: usize) -> Vec<u64> {
    if threads <= 1 {
        return jobs.iter().map(Job::sum).collect();
    }
    let next = AtomicUsize::new(0);
    let sums: Vec<AtomicU64> = jobs.iter().map(|_| Default::default()).collect();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(at) else { return };
                    sums[at].store(job.sum(), Ordering::Relaxed);
                }
            });
        }
    });
    sums.into_iter().map(AtomicU64::into_inner).collect()
}

/// Sum over elements of their bits times the number of their place; `first` is the index of the first of them.
pub(super) fn hash<T: Copy + Into<u32>>(bits: &[T], first: usize, seed: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has it.
        return unsafe { hash_avx2(bits, first as u32, seed as u32) };
    }
    hash_any(bits, first as u32, seed as u32)
}

/// The same, with vectors of eight.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn hash_avx2<T: Copy + Into<u32>>(bits: &[T], first: u32, seed: u32) -> u64 {
    hash_any(bits, first, seed)
}

#[inline(always)]
fn hash_any<T: Copy + Into<u32>>(bits: &[T], first: u32, seed: u32) -> u64 {
    let mut sum = 0_u64;
    for (i, b) in (0_u32..).zip(bits) {
        // The finaliser of MurmurHash3 (Appleby 2016), one round of it, and odd.
        let mut w = first.wrapping_add(i) ^ seed;
        w = (w ^ (w >> 16)).wrapping_mul(0x85eb_ca6b);
        w = (w ^ (w >> 13)).wrapping_mul(0xc2b2_ae35) | 1;
        sum = sum.wrapping_add(u64::from((*b).into()) * u64::from(w));
    }
    sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_flipped_bit_is_seen(bits in proptest::collection::vec(any::<u32>(), 1..100), at: usize, bit in 0u32..32) {
            let mut other = bits.clone();
            let at = at % other.len();
            other[at] ^= 1 << bit;
            prop_assert_ne!(hash(&bits, 5, 9), hash(&other, 5, 9));
            prop_assert_eq!(hash(&bits, 5, 9), hash_any(&bits, 5, 9), "vectors or none");
        }

        #[test]
        fn pieces_add_up(bits in proptest::collection::vec(any::<u16>(), 0..100), cut: usize) {
            let cut = if bits.is_empty() { 0 } else { cut % bits.len() };
            let (a, b) = bits.split_at(cut);
            prop_assert_eq!(hash(&bits, 3, 1), hash(a, 3, 1).wrapping_add(hash(b, 3 + cut, 1)));
        }
    }

    #[test]
    fn what_lies_elsewhere_or_is_other_hashes_otherwise() {
        let one = [0x3f80_0000_u32, 0x4000_0000];
        let sums = [hash(&one, 0, 1), hash(&one, 1, 1), hash(&one, 0, 2), hash(&[one[1], one[0]], 0, 1)];
        assert!((0..4).all(|i| (0..i).all(|j| sums[i] != sums[j])), "{sums:?}");
    }

    #[test]
    fn boxes_of_a_matrix_are_read_row_by_row() {
        // Columns 2 and 3 of 5, rows 1 to 3; from the second element of the first row on.
        let place = Place { seed: 0, row0: 1, col0: 2, cols: 2, all_cols: 5, within: 1 };
        let rows: Vec<_> = place.rows(4).collect();
        assert_eq!(rows, [(8, 0..1), (12, 1..3), (17, 3..4)]);
        let whole = Place { col0: 0, cols: 5, ..place };
        assert_eq!(whole.rows(9).collect::<Vec<_>>(), [(6, 0..9)]);
    }
}
