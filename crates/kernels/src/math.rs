//! Elementary functions as polynomials, evaluated in the same order by every backend.
//!
//! The coefficients interpolate the function at Chebyshev nodes of the stated interval.

use crate::simd::Simd;

/// Below this `exp` gives exactly 0: its results and their small multiples would otherwise be denormal, which
/// processors compute many times slower.
const EXP_ZERO: f32 = -80.0;
/// Above this `exp` gives its value here, the largest whose power of two is finite.
const EXP_MAX: f32 = 88.0;
/// 1.5 * 2^23: adding it leaves an integer in the low bits.
const SHIFT: f32 = 12_582_912.0;
/// ln 2 in two parts, the first with few bits so that its multiples are exact.
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;

/// c[0] + c[1] x + ..., by Horner's rule.
#[inline(always)]
fn poly<S: Simd, const N: usize>(s: S, x: S::V, c: [f32; N]) -> S::V {
    let mut y = s.splat(c[N - 1]);
    for &c in c[..N - 1].iter().rev() {
        y = s.fma(y, x, s.splat(c));
    }
    y
}

/// e^x to about one unit in the last place; 0 below -80, e^88 above 88, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let capped = s.min(s.splat(EXP_MAX), x);
    let shifted = s.fma(capped, s.splat(std::f32::consts::LOG2_E), s.splat(SHIFT));
    let n = s.sub(shifted, s.splat(SHIFT));
    let r = s.fma(n, s.splat(-LN2_HI), capped);
    let r = s.fma(n, s.splat(-LN2_LO), r);
    // (e^r - 1 - r) / r^2 on [-0.3466, 0.3466], error 1.4e-9.
    let p = poly(s, r, [0.5, 0.166_666_67, 0.041_666_465, 0.008_333_311, 0.001_393_364_8, 0.000_198_909_88]);
    let y = s.fma(s.mul(r, r), p, s.add(r, s.splat(1.0)));
    s.less(x, s.splat(EXP_ZERO), s.splat(0.0), s.mul(y, s.exp2_shifted(shifted)))
}

/// 1 / (1 + e^-x), from the side that cannot overflow.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let zero = s.splat(0.0);
    let one = s.splat(1.0);
    let e = exp(s, s.sub(zero, s.abs(x)));
    s.div(s.less(x, zero, e, one), s.add(one, e))
}

/// The hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let a = s.abs(x);
    let z = s.mul(x, x);
    // (tanh(x) / x - 1) / x^2 in x^2 on [0, 0.625^2], error 1.6e-9.
    let p =
        poly(s, z, [-0.333_333_34, 0.133_333_03, -0.053_959_26, 0.021_768_92, -0.008_343_946, 0.002_292_745]);
    let small = s.fma(s.mul(x, z), p, x);
    let e = exp(s, s.mul(a, s.splat(-2.0)));
    let large = s.div(s.sub(one, e), s.add(one, e));
    let large = s.less(x, s.splat(0.0), s.sub(s.splat(0.0), large), large);
    s.less(a, s.splat(0.625), small, large)
}

/// The cumulative normal distribution (1 + erf(x / sqrt 2)) / 2.
#[inline(always)]
pub(crate) fn normal_cdf<S: Simd>(s: S, x: S::V) -> S::V {
    let (zero, one, half) = (s.splat(0.0), s.splat(1.0), s.splat(0.5));
    let u = s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.abs(u);
    let z = s.mul(u, u);
    // erf(u) / u - 1 in u^2 on [0, 0.875], error 2e-8.
    let p = poly(
        s,
        z,
        [0.128_379_15, -0.376_124_8, 0.112_816_65, -0.026_760_723, 0.004_984_088, -0.000_594_276_8],
    );
    let near = s.fma(half, s.fma(u, p, u), half);
    // log(erfc(t)) / t on [0.85, 4], error 6e-8; beyond 4 erfc is below the resolution of 1 and taken as 0.
    let q = poly(
        s,
        t,
        [
            -1.128_685_7,
            -0.635_028_6,
            -0.106_356_34,
            0.023_736_98,
            -0.003_513_714_7,
            0.000_223_700_4,
            2.360_383_3e-5,
            -5.736_896e-6,
            3.378_928_8e-7,
        ],
    );
    let tail = s.mul(half, exp(s, s.mul(t, q)));
    let tail = s.less(s.splat(4.0), t, zero, tail);
    let far = s.less(u, zero, tail, s.sub(one, tail));
    s.less(t, s.splat(0.9), near, far)
}

/// The natural logarithm of a positive, normal number, in plain double precision arithmetic: the standard library's
/// may differ between systems.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    let wide = f64::from(x);
    let exponent = ((wide.to_bits() >> 52) as i32 - 1023) as f64;
    // In [1, 2), then in [0.75, 1.5) by halving the upper part. No branches, so that loops over rows are vectorised.
    let mantissa = f64::from_bits(wide.to_bits() & ((1 << 52) - 1) | 1023 << 52);
    let upper = mantissa >= 1.5;
    let m = if upper { mantissa * 0.5 } else { mantissa };
    let exponent = if upper { exponent + 1.0 } else { exponent };
    // ln m = 2 artanh((m - 1) / (m + 1)), whose argument is at most 0.2.
    let t = (m - 1.0) / (m + 1.0);
    let mut series = 0.0;
    for k in (0..12).rev() {
        series = series * (t * t) + 1.0 / f64::from(2 * k + 1);
    }
    let y = (exponent * std::f64::consts::LN_2 + 2.0 * t * series) as f32;
    let y = if x < f32::INFINITY { y } else { x };
    if x > 0.0 { y } else { f32::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Backend, force_backend, kernel};

    kernel! { fn all(x: &[f32], y: &mut [[f32; 4]]) = |s: S| {
        for (x, y) in x.iter().zip(y) {
            let v = s.splat(*x);
            let mut out = [0.0; 16];
            for (f, y) in [exp(s, v), sigmoid(s, v), tanh(s, v), normal_cdf(s, v)].into_iter().zip(y) {
                s.store(&mut out, f);
                *y = out[0];
            }
        }
    } }

    /// The cumulative normal distribution by its series, or by the continued fraction of its tail.
    fn cdf(x: f64) -> f64 {
        if x < -3.0 {
            let tail = (1..200).rev().fold(-x, |t, k| -x + f64::from(k) / t);
            return (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() / tail;
        }
        if x > 3.0 {
            return 1.0 - cdf(-x);
        }
        let (mut term, mut sum) = (x, x);
        for k in 1..100 {
            term *= x * x / f64::from(2 * k + 1);
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
    }

    #[test]
    fn elementary_functions() {
        let x: Vec<f32> =
            (-40_000..=40_000).map(|i| i as f32 * 1e-3).chain([-80.0, 80.0, 1e-30, -0.0]).collect();
        let mut y = vec![[0.0; 4]; x.len()];
        let before = crate::simd::backend();
        for backend in [Backend::Avx512, Backend::Avx2, Backend::Scalar] {
            if !force_backend(backend) {
                continue;
            }
            all(&x, &mut y);
            for (&x, y) in x.iter().zip(&y) {
                let d = f64::from(x);
                let close = |got: f32, want: f64, ulps: f64| {
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= ulps * 6e-8 * want.abs() + 1e-36, "{backend:?} {x}: {got} {want}");
                };
                close(y[0], d.exp(), 2.5);
                close(y[1], 1.0 / (1.0 + (-d).exp()), 4.0);
                close(y[2], d.tanh(), 4.0);
                if d > -5.6 {
                    close(y[3], cdf(d), if d < -1.2 { 120.0 } else { 6.0 });
                } else {
                    assert!(y[3] >= 0.0 && y[3] < 2e-8);
                }
            }
        }
        force_backend(before);
    }

    #[test]
    fn logarithm() {
        for i in 1..200_000u32 {
            let x = f32::from_bits(0x0080_0000 + i * 10_000);
            assert!((f64::from(ln(x)) - f64::from(x).ln()).abs() <= 6e-8 * f64::from(x).ln().abs(), "{x}");
        }
        assert_eq!((ln(1.0), ln(f32::INFINITY)), (0.0, f32::INFINITY));
        assert!(ln(-1.0).is_nan() && ln(f32::NAN).is_nan());
    }

    #[test]
    fn limits() {
        let x = [f32::NEG_INFINITY, -1e30, -80.1, 100.0, f32::INFINITY, f32::NAN];
        let mut y = [[0.0; 4]; 6];
        all(&x, &mut y);
        assert_eq!([y[0], y[1], y[2]].map(|y| y[0]), [0.0; 3]);
        assert_eq!(y.map(|y| y[1])[..5], [0.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(y.map(|y| y[2])[..5], [-1.0, -1.0, -1.0, 1.0, 1.0]);
        assert_eq!(y.map(|y| y[3])[..5], [0.0, 0.0, 0.0, 1.0, 1.0]);
        assert!(y[3][0].is_finite() && y[5].iter().all(|y| y.is_nan()));
    }
}
