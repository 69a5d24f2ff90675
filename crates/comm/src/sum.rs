//! Elementwise sums of several buffers in tree order, the arithmetic of every reduction.
//!
//! All loops work on fixed-size arrays loaded and stored whole, so that they vectorise although a destination may
//! also be a source. They hold nothing but additions: every instruction set gives the same bits.

use crate::element::ElementType;
use crate::inner::Address;
use crate::tree::tree_radices;
use half::bf16;

/// Elements of a buffer added at once: eight buffers of them fill the widest registers.
const LANES: usize = 64;
const LANES_OF_EIGHT: usize = 32;
/// Elements per temporary in the general tree.
const BLOCK: usize = 512;
/// Deepest tree: 1024 leaves, all radices two.
const MAX_DEPTH: usize = 10;
/// Most summands.
pub(crate) const MAX_RANKS: usize = 1024;

/// The order in which `n` buffers are added.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    leaves: usize,
    /// Top first.
    radices: Vec<usize>,
}

impl Tree {
    pub(crate) fn new(leaves: usize) -> Tree {
        debug_assert!((1..=MAX_RANKS).contains(&leaves));
        let mut radices = tree_radices(leaves);
        radices.reverse();
        Tree { leaves, radices }
    }
}

/// What the elements of the destination are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// The same as those of the sources.
    Same,
    /// Unrounded binary32, for bf16 sums that go on elsewhere.
    F32,
}

/// What is added up, and to where.
pub(crate) struct Sum<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) element: ElementType,
    pub(crate) into: Into,
    pub(crate) sources: &'a [Address],
    pub(crate) destinations: &'a [Address],
}

impl Sum<'_> {
    /// Adds the elements from `start` on, `count` of them, of every source in the order of the tree, and stores the
    /// sums to every destination from element `to` on.
    ///
    /// # Safety
    /// Sources are readable and destinations writable there, and nobody else writes the sources or touches the
    /// destinations meanwhile. A destination may coincide with a source exactly, but not overlap it partly.
    pub(crate) unsafe fn run(&self, start: usize, to: usize, count: usize) {
        assert_eq!(self.sources.len(), self.tree.leaves);
        // SAFETY: passed on from the caller.
        unsafe {
            match (self.element, self.into) {
                (ElementType::F32, _) => dispatch::<f32, f32>(self, start, to, count),
                (ElementType::Bf16, Into::Same) => dispatch::<bf16, bf16>(self, start, to, count),
                (ElementType::Bf16, Into::F32) => dispatch::<bf16, f32>(self, start, to, count),
                (ElementType::F64, _) => dispatch::<f64, f64>(self, start, to, count),
                (ElementType::U32, _) => dispatch::<u32, u32>(self, start, to, count),
                (ElementType::U8, _) => dispatch::<u8, u8>(self, start, to, count),
            }
        }
    }
}

/// Rounds `count` binary32 sums to bf16, or copies them if `element` is no bf16.
///
/// # Safety
/// `from` is readable for `count` values of binary32 (of `element` unless it is bf16), `to` writable for `count` of
/// `element`, and they do not overlap.
pub(crate) unsafe fn round(element: ElementType, from: *const u8, to: *mut u8, count: usize) {
    if element != ElementType::Bf16 {
        // SAFETY: passed on from the caller.
        unsafe { std::ptr::copy_nonoverlapping(from, to, count * element.bytes()) };
        return;
    }
    for i in 0..count {
        // SAFETY: `i < count`; the caller vouches for both buffers.
        unsafe {
            to.cast::<bf16>().add(i).write_unaligned(narrow(from.cast::<f32>().add(i).read_unaligned()))
        };
    }
}

/// A stored type and the type it is added in.
trait Summand: Copy {
    type Wide: Copy + Default;
    fn widen(self) -> Self::Wide;
    fn add(a: Self::Wide, b: Self::Wide) -> Self::Wide;
}

/// A type that sums are stored as.
trait Stored<W>: Copy {
    fn store(wide: W) -> Self;
}

macro_rules! summands {
    ($($t:ty, $w:ty, $widen:expr, $add:expr;)*) => {$(
        impl Summand for $t {
            type Wide = $w;
            #[inline(always)]
            fn widen(self) -> $w { $widen(self) }
            #[inline(always)]
            fn add(a: $w, b: $w) -> $w { $add(a, b) }
        }
    )*};
}
summands! {
    f32, f32, |x| x, |a, b| a + b;
    f64, f64, |x| x, |a, b| a + b;
    u32, u32, |x| x, u32::wrapping_add;
    u8, u8, |x| x, u8::wrapping_add;
    bf16, f32, widen_bf16, |a, b| a + b;
}

macro_rules! stored {
    ($($t:ty, $w:ty, $store:expr;)*) => {$(
        impl Stored<$w> for $t {
            #[inline(always)]
            fn store(wide: $w) -> $t { $store(wide) }
        }
    )*};
}
stored! { f32, f32, |x| x; f64, f64, |x| x; u32, u32, |x| x; u8, u8, |x| x; bf16, f32, narrow; }

#[inline(always)]
fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounds to nearest, ties to even; a NaN stays one. Branch-free, so that it vectorises.
#[inline(always)]
fn narrow(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    let nan = bits & 0x7fff_ffff > 0x7f80_0000;
    bf16::from_bits(if nan { quiet } else { rounded } as u16)
}

unsafe fn dispatch<S: Summand, D: Stored<S::Wide>>(sum: &Sum<'_>, start: usize, to: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the features were detected; the rest is passed on from the caller.
            return unsafe { with_avx512::<S, D>(sum, start, to, count) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { with_avx2::<S, D>(sum, start, to, count) };
        }
    }
    // SAFETY: passed on from the caller.
    unsafe { sum_all::<S, D>(sum, start, to, count) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn with_avx512<S: Summand, D: Stored<S::Wide>>(sum: &Sum<'_>, start: usize, to: usize, count: usize) {
    // SAFETY: passed on from the caller.
    unsafe { sum_all::<S, D>(sum, start, to, count) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn with_avx2<S: Summand, D: Stored<S::Wide>>(sum: &Sum<'_>, start: usize, to: usize, count: usize) {
    // SAFETY: passed on from the caller.
    unsafe { sum_all::<S, D>(sum, start, to, count) }
}

#[inline(always)]
unsafe fn sum_all<S: Summand, D: Stored<S::Wide>>(sum: &Sum<'_>, start: usize, to: usize, count: usize) {
    let source = |a: Address| a.0.cast::<S>().wrapping_add(start).cast_const();
    let destination = |a: Address| a.0.cast::<D>().wrapping_add(to);
    // SAFETY: passed on from the caller; the slices have the lengths matched on.
    unsafe {
        match (sum.sources, sum.destinations) {
            (&[a, b], &[d]) => fixed::<S, D, 2, 1, LANES>([a, b].map(source), [destination(d)], count),
            (&[a, b], &[d, e]) => {
                fixed::<S, D, 2, 2, LANES>([a, b].map(source), [d, e].map(destination), count)
            }
            (&[a, b, c, d], &[e]) => {
                fixed::<S, D, 4, 1, LANES>([a, b, c, d].map(source), [destination(e)], count)
            }
            (&[a, b, c, d], &[e, f, g, h]) => {
                fixed::<S, D, 4, 4, LANES>([a, b, c, d].map(source), [e, f, g, h].map(destination), count)
            }
            _ if sum.sources.len() == 8 && sum.destinations.len() == 1 => {
                let sources = std::array::from_fn(|k| source(sum.sources[k]));
                fixed::<S, D, 8, 1, LANES_OF_EIGHT>(sources, [destination(sum.destinations[0])], count)
            }
            _ if sum.sources.len() == 8 && sum.destinations.len() == 8 => {
                let sources = std::array::from_fn(|k| source(sum.sources[k]));
                let destinations = std::array::from_fn(|k| destination(sum.destinations[k]));
                fixed::<S, D, 8, 8, LANES_OF_EIGHT>(sources, destinations, count)
            }
            _ => general::<S, D>(sum, start, to, count),
        }
    }
}

/// Sums `N` (a power of two) buffers in registers.
#[inline(always)]
unsafe fn fixed<S: Summand, D: Stored<S::Wide>, const N: usize, const M: usize, const L: usize>(
    sources: [*const S; N],
    destinations: [*mut D; M],
    count: usize,
) {
    let whole = count / L * L;
    let mut i = 0;
    while i < whole {
        // SAFETY: `i + L <= count`.
        unsafe {
            let wide = pairwise::<S, N, L>(&sources, i);
            let out: [D; L] = std::array::from_fn(|k| D::store(wide[k]));
            for d in destinations {
                d.add(i).cast::<[D; L]>().write_unaligned(out);
            }
        }
        i += L;
    }
    while i < count {
        // SAFETY: `i < count`.
        unsafe {
            let [wide] = pairwise::<S, N, 1>(&sources, i);
            for d in destinations {
                d.add(i).write_unaligned(D::store(wide));
            }
        }
        i += 1;
    }
}

#[inline(always)]
unsafe fn pairwise<S: Summand, const N: usize, const L: usize>(
    sources: &[*const S; N],
    at: usize,
) -> [S::Wide; L] {
    let load = |s: *const S| -> [S::Wide; L] {
        // SAFETY: the caller guarantees `at + L` elements.
        let raw = unsafe { s.add(at).cast::<[S; L]>().read_unaligned() };
        std::array::from_fn(|k| raw[k].widen())
    };
    let add =
        |a: [S::Wide; L], b: [S::Wide; L]| -> [S::Wide; L] { std::array::from_fn(|k| S::add(a[k], b[k])) };
    let mut sums: [[S::Wide; L]; N] = std::array::from_fn(|n| load(sources[n]));
    let mut n = N;
    while n > 1 {
        n /= 2;
        for k in 0..n {
            sums[k] = add(sums[2 * k], sums[2 * k + 1]);
        }
    }
    sums[0]
}

/// Any number of buffers, a block at a time, with one temporary per level of the tree.
#[inline(always)]
unsafe fn general<S: Summand, D: Stored<S::Wide>>(sum: &Sum<'_>, start: usize, to: usize, count: usize) {
    let mut levels = [[S::Wide::default(); BLOCK]; MAX_DEPTH + 1];
    let mut done = 0;
    while done < count {
        let n = BLOCK.min(count - done);
        let leaf = |index: usize, out: &mut [S::Wide], first: bool| {
            let source = sum.sources[index].0.cast::<S>().wrapping_add(start + done);
            for k in 0..n {
                // SAFETY: `done + k < count`; the caller vouches for the source.
                let x = unsafe { source.add(k).read_unaligned() }.widen();
                out[k] = if first { x } else { S::add(out[k], x) };
            }
        };
        subtree::<S>(&sum.tree.radices, 0, sum.tree.leaves, n, &mut levels, &leaf);
        for d in sum.destinations {
            let d = d.0.cast::<D>().wrapping_add(to + done);
            for k in 0..n {
                // SAFETY: `done + k < count`; the caller vouches for the destination.
                unsafe { d.add(k).write_unaligned(D::store(levels[0][k])) };
            }
        }
        done += n;
    }
}

/// Puts a leaf into a block, or adds it to the block if it is not the first.
type Leaf<'a, W> = dyn Fn(usize, &mut [W], bool) + 'a;

/// Leaves the sum of `leaves` leaves from `first` on in `levels[0]`.
fn subtree<S: Summand>(
    radices: &[usize],
    first: usize,
    leaves: usize,
    n: usize,
    levels: &mut [[S::Wide; BLOCK]],
    leaf: &Leaf<'_, S::Wide>,
) {
    let Some((&radix, below)) = radices.split_first() else {
        return leaf(first, &mut levels[0], true);
    };
    if below.is_empty() {
        for child in 0..radix {
            leaf(first + child, &mut levels[0], child == 0);
        }
        return;
    }
    let leaves = leaves / radix;
    subtree::<S>(below, first, leaves, n, levels, leaf);
    for child in 1..radix {
        let (here, deeper) = levels.split_at_mut(1);
        subtree::<S>(below, first + child * leaves, leaves, n, deeper, leaf);
        for k in 0..n {
            here[0][k] = S::add(here[0][k], deeper[0][k]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: halve as often as possible, then odd primes ascending, children from left to right.
    fn reference(x: &[f32]) -> f32 {
        if x.len() == 1 {
            return x[0];
        }
        let radix = if x.len().is_multiple_of(2) {
            2
        } else {
            (3..).step_by(2).find(|p| x.len().is_multiple_of(*p)).unwrap()
        };
        let parts: Vec<f32> = x.chunks(x.len() / radix).map(reference).collect();
        parts[1..].iter().fold(parts[0], |a, b| a + b)
    }

    fn run<S: Copy, D: Copy + Default>(element: ElementType, into: Into, rows: &[Vec<S>]) -> Vec<D> {
        let mut out = vec![D::default(); rows[0].len()];
        let sources: Vec<_> = rows.iter().map(|r| Address(r.as_ptr().cast_mut().cast())).collect();
        let destinations = [Address(out.as_mut_ptr().cast())];
        let tree = Tree::new(rows.len());
        let sum = Sum { tree: &tree, element, into, sources: &sources, destinations: &destinations };
        // SAFETY: all buffers have the length of the first row.
        unsafe { sum.run(0, 0, rows[0].len()) };
        out
    }

    /// `n` buffers of `count` elements in every type, against the definition.
    fn check(n: usize, count: usize, seed: u32) {
        let value = |r: usize, i: usize| {
            let h = seed ^ (r as u32).wrapping_mul(0x9e37_79b9) ^ (i as u32).wrapping_mul(0x85eb_ca6b);
            let h = h.wrapping_mul(0xc2b2_ae35);
            (h >> 8) as f32 / 65536.0 - 100.0
        };
        let rows: Vec<Vec<f32>> = (0..n).map(|r| (0..count).map(|i| value(r, i)).collect()).collect();
        let column = |i: usize| rows.iter().map(|r| r[i]).collect::<Vec<f32>>();
        let want: Vec<f32> = (0..count).map(|i| reference(&column(i))).collect();
        assert_eq!(run::<f32, f32>(ElementType::F32, Into::Same, &rows), want);

        let short: Vec<Vec<bf16>> =
            rows.iter().map(|r| r.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
        let column = |i: usize| short.iter().map(|r| r[i].to_f32()).collect::<Vec<f32>>();
        let wide: Vec<f32> = (0..count).map(|i| reference(&column(i))).collect();
        let want: Vec<bf16> = wide.iter().map(|x| bf16::from_f32(*x)).collect();
        assert_eq!(run::<bf16, f32>(ElementType::Bf16, Into::F32, &short), wide);
        assert_eq!(run::<bf16, bf16>(ElementType::Bf16, Into::Same, &short), want);

        let bytes: Vec<Vec<u8>> = rows.iter().map(|r| r.iter().map(|x| *x as i64 as u8).collect()).collect();
        let want: Vec<u8> =
            (0..count).map(|i| bytes.iter().fold(0u8, |sum, r| sum.wrapping_add(r[i]))).collect();
        assert_eq!(run::<u8, u8>(ElementType::U8, Into::Same, &bytes), want);
        let whole: Vec<Vec<f64>> = bytes.iter().map(|r| r.iter().map(|x| f64::from(*x)).collect()).collect();
        let want: Vec<f64> = (0..count).map(|i| whole.iter().map(|r| r[i]).sum()).collect();
        assert_eq!(run::<f64, f64>(ElementType::F64, Into::Same, &whole), want);
    }

    /// Every number of buffers that has a way of its own, by lengths around what is added at once.
    #[test]
    fn sums_of_any_length_are_those_of_the_definition() {
        for n in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 33] {
            for count in [0, 1, 31, 32, 33, 63, 64, 65, 130, 511, 512, 513, 1025] {
                check(n, count, 7 + n as u32);
            }
        }
    }

    /// A part of the sources goes to a part of several destinations; nothing else is touched.
    #[test]
    fn a_part_is_summed_into_every_destination() {
        for (n, m) in [(2, 1), (2, 2), (4, 1), (4, 4), (8, 1), (8, 8), (3, 2), (8, 3)] {
            for count in [1, 40, 70] {
                let (start, to, length) = (5, 3, 90);
                let rows: Vec<Vec<u32>> =
                    (0..n as u32).map(|r| (0..length as u32).map(|i| r * 1000 + i * i).collect()).collect();
                let mut outs = vec![vec![7u32; length]; m];
                let sources: Vec<_> = rows.iter().map(|r| Address(r.as_ptr().cast_mut().cast())).collect();
                let destinations: Vec<_> = outs.iter_mut().map(|r| Address(r.as_mut_ptr().cast())).collect();
                let (tree, element, into) = (Tree::new(n), ElementType::U32, Into::Same);
                let sum = Sum { tree: &tree, element, into, sources: &sources, destinations: &destinations };
                // SAFETY: `start + count` and `to + count` are less than the length of every buffer.
                unsafe { sum.run(start, to, count) };
                let at = |i: usize| {
                    let inside = (to..to + count).contains(&i);
                    if inside { rows.iter().map(|r| r[i - to + start]).sum() } else { 7 }
                };
                let want: Vec<u32> = (0..length).map(at).collect();
                outs.iter().for_each(|out| assert_eq!(*out, want, "{n} to {m}, {count}"));
            }
        }
    }

    /// Sums that go on as they are, and bf16 rounded: ties to even, infinities and NaNs kept.
    #[test]
    fn sums_are_rounded_to_what_is_stored() {
        let sums =
            [1.0f32, -0.0, 257.0 / 256.0, 1.011_718_8, 3.4e38, f32::INFINITY, f32::NEG_INFINITY, 1e-40];
        let mut out = vec![bf16::ZERO; sums.len()];
        // SAFETY: both have as many elements.
        unsafe { round(ElementType::Bf16, sums.as_ptr().cast(), out.as_mut_ptr().cast(), sums.len()) };
        assert_eq!(out, sums.map(bf16::from_f32));
        assert!(narrow(f32::NAN).is_nan() && narrow(f32::from_bits(0x7f80_0001)).is_nan());
        let mut same = vec![0.0f32; sums.len()];
        // SAFETY: as above.
        unsafe { round(ElementType::F32, sums.as_ptr().cast(), same.as_mut_ptr().cast(), sums.len()) };
        assert_eq!(same, sums);
    }

    proptest! {
        #[test]
        fn sums_are_those_of_the_definition(n in 1usize..=33, count in 0usize..1300, seed in any::<u32>()) {
            check(n, count, seed);
        }

        #[test]
        fn rounding_is_that_of_half(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (narrow(x), bf16::from_f32(x));
            prop_assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{x}: {ours} {theirs}");
        }
    }

    #[test]
    fn many_leaves_and_destinations_in_place() {
        let mut rows: Vec<Vec<u32>> = (0..MAX_RANKS as u32).map(|r| vec![r; 5]).collect();
        let sources: Vec<_> = rows.iter_mut().map(|r| Address(r.as_mut_ptr().cast())).collect();
        let (tree, element, into) = (Tree::new(MAX_RANKS), ElementType::U32, Into::Same);
        // SAFETY: all rows have five elements.
        unsafe {
            Sum { tree: &tree, element, into, sources: &sources, destinations: &sources[..3] }.run(0, 0, 5)
        };
        let total = (0..MAX_RANKS as u32).sum::<u32>();
        assert_eq!(rows[0], [total; 5]);
        assert_eq!(rows[2], [total; 5]);
        assert_eq!(rows[3], [3; 5]);
    }
}
