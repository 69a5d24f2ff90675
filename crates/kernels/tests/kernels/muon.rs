//! Muon against the same iteration in double precision, and against what it is for.

use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

fn product(a: &[f64], b: &[f64], (m, k, n): (usize, usize, usize)) -> Vec<f64> {
    let at = |i: usize, j: usize| (0..k).map(|p| a[i * k + p] * b[p * n + j]).sum();
    (0..m * n).map(|i| at(i / n, i % n)).collect()
}

fn transposed(x: &[f64], (rows, cols): (usize, usize)) -> Vec<f64> {
    (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Coefficients of the powers of the Gram matrix.
fn powers(Polynomial { centre, of }: Polynomial) -> [f64; 7] {
    let mut of = of.map(f64::from);
    // Horner's scheme, again and again, moves a polynomial along.
    for first in 0..of.len() {
        for i in (first..of.len() - 1).rev() {
            of[i] -= f64::from(centre) * of[i + 1];
        }
    }
    of
}

/// Polynomials in `x` itself, in double precision, as they are written down.
fn reference(x: &[f32], (rows, cols): (usize, usize)) -> Vec<f64> {
    let mut x = wide(x);
    let (m, n) = (rows.min(cols), rows.max(cols));
    if rows > cols {
        x = transposed(&x, (rows, cols));
    }
    let gram = |x: &[f64]| product(x, &transposed(x, (m, n)), (m, n, m));
    let fourth = gram(&x).iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-14).sqrt();
    x.iter_mut().for_each(|v| *v /= fourth);
    for step in POLYNOMIALS {
        let gram = gram(&x);
        let mut power = x;
        x = vec![0.0; m * n];
        for of in powers(step) {
            x.iter_mut().zip(&power).for_each(|(x, p)| *x += of * p);
            power = product(&gram, &power, (m, m, n));
        }
    }
    if rows > cols { transposed(&x, (m, n)) } else { x }
}

fn ours(x: &[f32], shape: (usize, usize), scale: f32, threads: usize) -> Vec<f32> {
    let (pool, mut x) = (Pool::new(threads), x.to_vec());
    let mut ws = scratch(orthogonalise_workspace_len(shape.0, shape.1, threads));
    orthogonalise(&pool, &mut x, shape, scale, &mut ws);
    x
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 20 }))]

    #[test]
    fn orthogonal_factors(rows in 1usize..40, cols in 1usize..40, threads in 1usize..4, seed: u64) {
        let x = Numbers::new(seed).vec(rows * cols);
        let got = ours(&x, (rows, cols), 2.0, threads);
        let want: Vec<f64> = reference(&x, (rows, cols)).iter().map(|v| 2.0 * v).collect();
        close(&got, &want, 3e-4);
    }

    #[test]
    fn momentum_looks_ahead_and_weights_follow(len in 1usize..80, seed: u64) {
        let mut r = Numbers::new(seed);
        let (w, m, g) = (r.vec(len), r.vec(len), r.vec(len));
        let (mut new, mut update, mut moved) = (m.clone(), vec![0.0; len], w.clone());
        muon_momentum(&pool(), 0.9, 0.5, &mut new, &mut update, &g);
        muon(&pool(), (0.99, -0.1), &mut moved, &update);
        let (mut again, mut out) = (w.clone(), vec![bf16::ZERO; len]);
        muon_bf16(&pool(), (0.99, -0.1), &mut again, &update, &mut out);
        prop_assert_eq!(bits(&moved), bits(&again));
        prop_assert!(out.iter().zip(&moved).all(|(o, &w)| *o == bf16::from_f32(w)));
        for i in 0..len {
            let (w, m, g) = (f64::from(w[i]), f64::from(m[i]), 0.5 * f64::from(g[i]));
            let momentum = 0.9 * m + 0.1 * g;
            let ahead = 0.1 * g + 0.9 * momentum;
            prop_assert!((f64::from(new[i]) - momentum).abs() < 1e-6);
            prop_assert!((f64::from(update[i]) - ahead).abs() < 1e-6);
            prop_assert!((f64::from(moved[i]) - (0.99 * w - 0.1 * ahead)).abs() < 1e-6);
        }
    }
}

/// Strips of more than one tile, and every number of threads.
#[test]
fn large_matrices_are_what_small_ones_are() {
    let shape = if cfg!(miri) { (9, 20) } else { (300, 150) };
    let x = Numbers::new(3).vec(shape.0 * shape.1);
    let one = ours(&x, shape, 1.0, 1);
    close(&one, &reference(&x, shape), 3e-4);
    for threads in [2, 3] {
        assert_eq!(bits(&one), bits(&ours(&x, shape, 1.0, threads)), "{threads} threads");
    }
}

/// Of all odd polynomials of degree 13 each is the best on what the one before it makes of singular values from 0.0055 to 1.01: its
/// error has the same size and the other sign at eight points, one more than it has coefficients (Chebyshev).
#[test]
fn each_polynomial_is_the_best_on_what_is_left() {
    const POINTS: usize = 1_000_000;
    let (mut low, mut high) = (0.0055, 1.01);
    let mut slope = 1.0;
    for step in POLYNOMIALS {
        let step = powers(step);
        let error = |x: f64| x * step.iter().rev().fold(0.0, |sum, of| sum * x * x + of) - 1.0;
        let at = |i: usize| low * f64::powf(high / low, i as f64 / POINTS as f64);
        let errors: Vec<f64> = (0..=POINTS).map(|i| error(at(i))).collect();
        let extreme = |i: &usize| {
            let beside = [i.checked_sub(1), Some(i + 1)].into_iter().flatten().filter_map(|i| errors.get(i));
            beside.into_iter().all(|e| (errors[*i] - e) * errors[*i] >= 0.0)
        };
        let extremes: Vec<f64> = (0..=POINTS).filter(extreme).map(|i| errors[i]).collect();
        let most = errors.iter().fold(0.0, |most: f64, e| most.max(e.abs()));
        assert_eq!(extremes.len(), 8, "{extremes:?}");
        for (i, e) in extremes.iter().enumerate() {
            let sign = if i % 2 == 0 { -1.0 } else { 1.0 };
            assert!((sign * e / most - 1.0).abs() < 1e-3, "{extremes:?}");
        }
        (low, high, slope) = (1.0 - most, 1.0 + most, slope * step[0]);
    }
    assert!(high < 1.32, "{high}");
    assert!((slope - 131.4).abs() < 0.1, "{slope}");
}

#[test]
fn zero_stays_zero() {
    assert_eq!(ours(&[0.0; 12], (3, 4), 1.0, 1), [0.0; 12]);
}

/// Gradients have few large singular values and many small ones, whose squares rounding errors of the largest would drown:
/// `torch.optim.Muon` rounds to 8 bits, 4e-3.
#[test]
fn directions_beside_a_much_larger_one_keep_their_digits() {
    let shapes = if cfg!(miri) { [(6, 8), (8, 6), (7, 7)] } else { [(96, 160), (160, 96), (128, 128)] };
    for ((rows, cols), most) in shapes.into_iter().zip([1.2e-2, 1.2e-2, 5e-5]) {
        for small in [1e-2, 1e-3, 1e-4] {
            let off = beside_a_larger_one((rows, cols), small);
            assert!(off < most, "{off} for {rows} x {cols}, {small}");
        }
    }
}

/// How far off the result is, in its norm, of a matrix of rank 1 with others `small` beside it.
fn beside_a_larger_one(shape @ (rows, cols): (usize, usize), small: f32) -> f64 {
    let mut r = Numbers::new(5);
    let (left, right, rest) = (r.vec(rows), r.vec(cols), r.vec(rows * cols));
    let at = |i: usize| left[i / cols] * right[i % cols] + small * rest[i];
    let x: Vec<f32> = (0..rows * cols).map(at).collect();
    let (got, want) = (ours(&x, shape, 1.0, 2), reference(&x, shape));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut got.iter().zip(&want).map(|(a, b)| f64::from(*a) - b));
    apart / norm(&mut want.iter().copied())
}
