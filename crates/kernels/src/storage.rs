//! The types that tensors are kept in.

use half::bf16;

use crate::simd::Simd;

/// A type that parameters and activations are kept in: `f32` or [`half::bf16`].
///
/// Arithmetic is always `f32`; a store to `bf16` rounds to nearest, ties to even.
pub trait Storage: Element {}

impl Storage for f32 {}
impl Storage for bf16 {}

/// What a result is added to.
#[derive(Debug)]
pub enum Acc<'a, T> {
    /// Nothing.
    None,
    /// What the output already holds.
    InPlace,
    /// Another buffer of the output's shape (dense).
    From(&'a [T]),
}

impl<T> Clone for Acc<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Acc<'_, T> {}

/// The inner side of [`Storage`]: 16 elements at a time to and from a vector.
pub trait Element: Copy + Send + Sync + Default + std::fmt::Debug + 'static {
    /// Is this `f32` itself?
    const IS_F32: bool;
    /// The first 16 elements; fewer are filled up with zeros.
    fn get<S: Simd>(s: S, x: &[Self]) -> S::V;
    /// Writes the first 16 elements, or as many as there are.
    fn put<S: Simd>(s: S, x: &mut [Self], v: S::V);
    /// One element.
    fn one(self) -> f32;
    /// One element, rounded.
    fn of(x: f32) -> Self;
}

impl Element for f32 {
    const IS_F32: bool = true;
    #[inline(always)]
    fn get<S: Simd>(s: S, x: &[f32]) -> S::V {
        s.load(x)
    }
    #[inline(always)]
    fn put<S: Simd>(s: S, x: &mut [f32], v: S::V) {
        s.store(x, v);
    }
    #[inline(always)]
    fn one(self) -> f32 {
        self
    }
    #[inline(always)]
    fn of(x: f32) -> f32 {
        x
    }
}

impl Element for bf16 {
    const IS_F32: bool = false;
    #[inline(always)]
    fn get<S: Simd>(s: S, x: &[bf16]) -> S::V {
        s.load_bf16(x)
    }
    #[inline(always)]
    fn put<S: Simd>(s: S, x: &mut [bf16], v: S::V) {
        s.store_bf16(x, v);
    }
    #[inline(always)]
    fn one(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn of(x: f32) -> bf16 {
        bf16::from_bits(round_bf16(x.to_bits()))
    }
}

/// The upper half of `bits` after rounding to nearest even; a NaN stays one.
#[inline(always)]
pub(crate) fn round_bf16(bits: u32) -> u16 {
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
