//! Sixteen lanes in one 512-bit register.
//!
//! The intrinsics are safe to call where their features are on; these methods are inlined into such functions only,
//! which the compiler cannot see, hence the `unsafe` blocks. Holding an [`Avx512`] is the proof.

use std::arch::x86_64::*;

use half::bf16;

use super::{LANES, Simd};

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ and VL.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx512(())
    }
}

type V = __m512;

/// One intrinsic call, allowed by the proof that `self` is.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` proves that the processor has the instruction; memory is read and written only through
        // slices of checked length or by the contract of the method.
        unsafe { $e }
    };
}

/// Bit i set for i < n.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(LANES)) - 1) as u16
}

impl Simd for Avx512 {
    type V = V;
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        op!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn iota(self) -> V {
        op!(_mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.))
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> V {
        if x.len() >= LANES {
            op!(_mm512_loadu_ps(x.as_ptr()))
        } else {
            op!(_mm512_maskz_loadu_ps(first(x.len()), x.as_ptr()))
        }
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: V) {
        if x.len() >= LANES {
            op!(_mm512_storeu_ps(x.as_mut_ptr(), v))
        } else {
            op!(_mm512_mask_storeu_ps(x.as_mut_ptr(), first(x.len()), v))
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> V {
        let p = x.as_ptr().cast::<i16>();
        let half = if x.len() >= LANES {
            op!(_mm256_loadu_si256(p.cast()))
        } else {
            op!(_mm256_maskz_loadu_epi16(first(x.len()), p))
        };
        op!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half))))
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: V) {
        let half = op!({
            let bits = _mm512_castps_si512(v);
            let upper = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let rounded = _mm512_srli_epi32::<16>(up);
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
            _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet))
        });
        let p = x.as_mut_ptr().cast::<i16>();
        if x.len() >= LANES {
            op!(_mm256_storeu_si256(p.cast(), half))
        } else {
            op!(_mm256_mask_storeu_epi16(p, first(x.len()), half))
        }
    }
    #[inline(always)]
    unsafe fn load_at(self, p: *const f32) -> V {
        op!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn store_at(self, p: *mut f32, v: V) {
        op!(_mm512_storeu_ps(p, v))
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        op!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        op!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        op!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        op!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        op!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        op!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        op!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        op!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        op!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn less(self, a: V, b: V, x: V, y: V) -> V {
        op!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn exp2_shifted(self, t: V) -> V {
        op!({
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(0x3f80_0000)))
        })
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        op!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn greatest(self, v: V) -> f32 {
        op!({
            let eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn transpose(self, r: &mut [V; LANES]) {
        // Pairs of rows, then pairs of pairs give 4 x 4 blocks inside each 128-bit lane; two rounds of lane
        // shuffles put the blocks in place.
        let zero = self.splat(0.0);
        let mut t = [zero; LANES];
        for i in 0..4 {
            let (a, b, c, d) = (r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]);
            op!({
                let ab_lo = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
                let ab_hi = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
                let cd_lo = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
                let cd_hi = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
                t[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_lo, cd_lo));
                t[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_lo, cd_lo));
                t[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_hi, cd_hi));
                t[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_hi, cd_hi));
            });
        }
        for j in 0..4 {
            op!({
                let a = _mm512_shuffle_f32x4::<0x88>(t[j], t[4 + j]);
                let b = _mm512_shuffle_f32x4::<0x88>(t[8 + j], t[12 + j]);
                let c = _mm512_shuffle_f32x4::<0xdd>(t[j], t[4 + j]);
                let d = _mm512_shuffle_f32x4::<0xdd>(t[8 + j], t[12 + j]);
                r[j] = _mm512_shuffle_f32x4::<0x88>(a, b);
                r[4 + j] = _mm512_shuffle_f32x4::<0x88>(c, d);
                r[8 + j] = _mm512_shuffle_f32x4::<0xdd>(a, b);
                r[12 + j] = _mm512_shuffle_f32x4::<0xdd>(c, d);
            });
        }
    }
}
