//! Sixteen `f32` lanes, the same on every processor.
//!
//! A kernel is written once over [`Simd`] and compiled for each backend by the `kernel!` macro, which picks one at
//! run time. All backends do the same operations on the same 16 lanes in the same order, so they give equal bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU8, Ordering};

use half::bf16;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use scalar::Scalar;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The instructions that kernels are compiled for. Which one runs changes the speed, never the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Backend {
    /// 512-bit registers: AVX-512 F, BW, DQ and VL.
    Avx512 = 1,
    /// 256-bit registers: AVX2 and FMA.
    Avx2 = 2,
    /// Any processor.
    Scalar = 3,
}

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The backend in use: the best that this processor has, unless one was forced.
#[inline]
pub fn backend() -> Backend {
    match CHOSEN.load(Ordering::Relaxed) {
        1 => Backend::Avx512,
        2 => Backend::Avx2,
        3 => Backend::Scalar,
        _ => {
            let best = best();
            CHOSEN.store(best as u8, Ordering::Relaxed);
            best
        }
    }
}

/// Makes all later calls in this process use `backend`, for tests and benches. Returns false, and changes
/// nothing, if this processor lacks it.
#[doc(hidden)]
pub fn force_backend(backend: Backend) -> bool {
    let has = has(backend);
    if has {
        CHOSEN.store(backend as u8, Ordering::Relaxed);
    }
    has
}

fn best() -> Backend {
    [Backend::Avx512, Backend::Avx2].into_iter().find(|&b| has(b)).unwrap_or(Backend::Scalar)
}

#[cfg(target_arch = "x86_64")]
fn has(backend: Backend) -> bool {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match backend {
        Backend::Scalar => true,
        Backend::Avx2 => avx2,
        Backend::Avx512 => {
            avx2 && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has(backend: Backend) -> bool {
    backend == Backend::Scalar
}

/// A backend. A value of this type is the proof that the processor has its instructions.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen `f32`.
    type V: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// The lane numbers 0 to 15.
    fn iota(self) -> Self::V;
    /// The first 16 elements; fewer are filled up with zeros.
    fn load(self, x: &[f32]) -> Self::V;
    /// Writes the first 16 elements, or as many as there are.
    fn store(self, x: &mut [f32], v: Self::V);
    /// As `load`, widening.
    fn load_bf16(self, x: &[bf16]) -> Self::V;
    /// As `store`, rounding to nearest even.
    fn store_bf16(self, x: &mut [bf16], v: Self::V);
    /// Sixteen elements at `p`.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load_at(self, p: *const f32) -> Self::V;
    /// Sixteen elements at `p`.
    ///
    /// # Safety
    /// They can be written.
    unsafe fn store_at(self, p: *mut f32, v: Self::V);
    /// Asks for the cache line at `p`, which need not be readable.
    fn prefetch(self, p: *const f32);

    /// a + b
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a - b
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b + c, rounded once
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a > b ? a : b, so b if either is NaN
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a < b ? a : b, so b if either is NaN
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The square root, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// The absolute value.
    fn abs(self, a: Self::V) -> Self::V;
    /// a < b ? x : y
    fn less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// 2^n for a lane whose bits are those of 1.5 * 2^23 + n, -126 <= n <= 127.
    fn exp2_shifted(self, t: Self::V) -> Self::V;

    /// The sum of all lanes: lane i + 8 is added to i, then i + 4, i + 2, i + 1.
    fn sum(self, v: Self::V) -> f32;
    /// The greatest lane.
    fn greatest(self, v: Self::V) -> f32;
    /// Transposes a 16 x 16 block.
    fn transpose(self, rows: &mut [Self::V; LANES]);
}

/// Asks for the cache line at `p`, which need not be readable, in the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_far<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and every x86-64 has it.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// How far ahead of their use streams are asked for, in elements: some pages, of which a processor foresees one.
pub(crate) const STREAM: usize = 1 << 11;

/// Asks for what lies `ahead` elements behind each of these, which need not be readable.
#[inline(always)]
pub(crate) fn ask_ahead<S: Simd, T, const N: usize>(s: S, of: [*const T; N], ahead: usize) {
    for p in of {
        s.prefetch(p.wrapping_add(ahead).cast());
    }
}

/// Asks for the cache lines of `rows` rows of `cols` elements, `ld` apart.
#[inline(always)]
pub(crate) fn ask_rows<T>(from: *const T, (rows, cols): (usize, usize), ld: usize) {
    for row in (0..rows).map(|i| from.wrapping_add(i * ld)) {
        for j in (0..cols).step_by(64 / size_of::<T>()) {
            prefetch_far(row.wrapping_add(j));
        }
    }
}

/// Compiles a kernel, a function over a backend `s: S`, for each backend, and gives it a front that picks one.
///
/// `kernel! { fn name[T: Element](x: &[T]) -> f32 = |s: S| { body } }`; `S` and `s` are named by the caller.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$($gen:tt)*])? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? = |$s:ident: $S:ident| $body:block) => {
        $crate::simd::kernel! { @names [$($($gen)*)?] [] $(#[$meta])* $vis fn $name [$($($gen)*)?] ($($arg : $ty),*) [$(-> $ret)?] |$s: $S| $body }
    };
    // Collects the bare names of the generics: `T: Element` and `const N: usize`.
    (@names [$g:ident : $b:path, $($rest:tt)*] [$($n:ident)*] $($tail:tt)*) => { $crate::simd::kernel! { @names [$($rest)*] [$($n)* $g] $($tail)* } };
    (@names [$g:ident : $b:path] [$($n:ident)*] $($tail:tt)*) => { $crate::simd::kernel! { @names [] [$($n)* $g] $($tail)* } };
    (@names [const $g:ident : $b:path, $($rest:tt)*] [$($n:ident)*] $($tail:tt)*) => { $crate::simd::kernel! { @names [$($rest)*] [$($n)* $g] $($tail)* } };
    (@names [const $g:ident : $b:path] [$($n:ident)*] $($tail:tt)*) => { $crate::simd::kernel! { @names [] [$($n)* $g] $($tail)* } };
    (@names [] [$($n:ident)*] $(#[$meta:meta])* $vis:vis fn $name:ident [$($gen:tt)*] ($($arg:ident : $ty:ty),*) [$($ret:tt)*] |$s:ident: $S:ident| $body:block) => {
        $(#[$meta])*
        $vis fn $name<$($gen)*>($($arg: $ty),*) $($ret)* {
            #[inline(always)]
            #[allow(unused_variables, clippy::unused_unit)]
            fn body<$S: $crate::simd::Simd, $($gen)*>($s: $S, $($arg: $ty),*) $($ret)* $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512<$($gen)*>($($arg: $ty),*) $($ret)* {
                // SAFETY: this function is only called where the processor has these features.
                body::<_, $($n),*>(unsafe { $crate::simd::Avx512::new() }, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$($gen)*>($($arg: $ty),*) $($ret)* {
                // SAFETY: this function is only called where the processor has these features.
                body::<_, $($n),*>(unsafe { $crate::simd::Avx2::new() }, $($arg),*)
            }
            match $crate::simd::backend() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `backend` answers only what was detected.
                $crate::simd::Backend::Avx512 => unsafe { avx512::<$($n),*>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `backend` answers only what was detected.
                $crate::simd::Backend::Avx2 => unsafe { avx2::<$($n),*>($($arg),*) },
                _ => body::<_, $($n),*>($crate::simd::Scalar, $($arg),*),
            }
        }
    };
}
pub(crate) use kernel;
