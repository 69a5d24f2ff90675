//! Sixteen lanes in two 256-bit registers.
//!
//! Holding an [`Avx2`] is the proof that the intrinsics may be called, as in the AVX-512 backend.

use std::arch::x86_64::*;

use half::bf16;

use super::{LANES, Simd};
use crate::storage::Element;

/// AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[inline(always)]
    pub(crate) unsafe fn new() -> Self {
        Avx2(())
    }
}

type V = [__m256; 2];

/// One intrinsic call, allowed by the proof that `self` is.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: `self` proves that the processor has the instruction; memory is read and written only through
        // slices of checked length or by the contract of the method.
        unsafe { $e }
    };
}

impl Avx2 {
    #[inline(always)]
    fn transpose8(self, r: [__m256; 8]) -> [__m256; 8] {
        op!({
            let mut t = r;
            for i in 0..2 {
                let (a, b, c, d) = (r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]);
                let ab_lo = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
                let ab_hi = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
                let cd_lo = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
                let cd_hi = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
                t[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_lo, cd_lo));
                t[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_lo, cd_lo));
                t[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_hi, cd_hi));
                t[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_hi, cd_hi));
            }
            let mut out = t;
            for j in 0..4 {
                out[j] = _mm256_permute2f128_ps::<0x20>(t[j], t[4 + j]);
                out[4 + j] = _mm256_permute2f128_ps::<0x31>(t[j], t[4 + j]);
            }
            out
        })
    }

    /// The rounded upper halves, each in a 32-bit lane.
    #[inline(always)]
    fn round(self, v: __m256) -> __m256i {
        op!({
            let bits = _mm256_castps_si256(v);
            let upper = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let rounded = _mm256_srli_epi32::<16>(up);
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
            _mm256_blendv_epi8(rounded, quiet, nan)
        })
    }
}

impl Simd for Avx2 {
    type V = V;
    #[inline(always)]
    fn splat(self, x: f32) -> V {
        op!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn iota(self) -> V {
        op!([
            _mm256_setr_ps(0., 1., 2., 3., 4., 5., 6., 7.),
            _mm256_setr_ps(8., 9., 10., 11., 12., 13., 14., 15.)
        ])
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> V {
        if x.len() >= LANES {
            op!(self.load_at(x.as_ptr()))
        } else {
            let mut full = [0.0; LANES];
            full[..x.len()].copy_from_slice(x);
            op!(self.load_at(full.as_ptr()))
        }
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: V) {
        if x.len() >= LANES {
            op!(self.store_at(x.as_mut_ptr(), v))
        } else {
            let mut full = [0.0; LANES];
            op!(self.store_at(full.as_mut_ptr(), v));
            x.copy_from_slice(&full[..x.len()]);
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> V {
        if x.len() >= LANES {
            op!({
                let all = _mm256_loadu_si256(x.as_ptr().cast());
                let lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(all));
                let hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(all));
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(lo)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(hi)),
                ]
            })
        } else {
            let mut full = [0.0; LANES];
            for (full, x) in full.iter_mut().zip(x) {
                *full = x.one();
            }
            op!(self.load_at(full.as_ptr()))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: V) {
        let all = op!({
            // The pack works inside 128-bit lanes; the permutation puts the quarters back in order.
            let packed = _mm256_packus_epi32(self.round(v[0]), self.round(v[1]));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
        });
        if x.len() >= LANES {
            op!(_mm256_storeu_si256(x.as_mut_ptr().cast(), all))
        } else {
            let mut full = [bf16::ZERO; LANES];
            op!(_mm256_storeu_si256(full.as_mut_ptr().cast(), all));
            x.copy_from_slice(&full[..x.len()]);
        }
    }
    #[inline(always)]
    unsafe fn load_at(self, p: *const f32) -> V {
        op!([_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))])
    }
    #[inline(always)]
    unsafe fn store_at(self, p: *mut f32, v: V) {
        op!({
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        })
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        op!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        op!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        op!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        op!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        op!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        op!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        op!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        op!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        op!([_mm256_sqrt_ps(a[0]), _mm256_sqrt_ps(a[1])])
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        op!({
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        })
    }
    #[inline(always)]
    fn less(self, a: V, b: V, x: V, y: V) -> V {
        op!([
            _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
        ])
    }
    #[inline(always)]
    fn exp2_shifted(self, t: V) -> V {
        op!({
            let one = _mm256_set1_epi32(0x3f80_0000);
            let lo = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(t[0])), one);
            let hi = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(t[1])), one);
            [_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)]
        })
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        op!({
            let eight = _mm256_add_ps(v[0], v[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn greatest(self, v: V) -> f32 {
        op!({
            let eight = _mm256_max_ps(v[0], v[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn transpose(self, r: &mut [V; LANES]) {
        let quarter = |half: usize, from: usize| self.transpose8(std::array::from_fn(|i| r[from + i][half]));
        let (a, b) = (quarter(0, 0), quarter(0, 8));
        let (c, d) = (quarter(1, 0), quarter(1, 8));
        for i in 0..8 {
            r[i] = [a[i], b[i]];
            r[8 + i] = [c[i], d[i]];
        }
    }
}
