//! Averages of weights against their definition in double precision; what is left out at random, against its odds.

use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

fn dropped(of: Dropout, x: &[f32], first: u64, cols: usize, threads: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    dropout(&Pool::new(threads), of, &|row| first + row as u64, x, None, Acc::None, &mut y, cols);
    y
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 30 }))]

    /// After `steps` steps the average is the mean with weights that fall by the decay from step to step.
    #[test]
    fn an_average_is_a_weighted_mean(len in 1usize..70, steps in 1u64..9, decay in 0.0f64..0.999, seed: u64) {
        let (mut r, pool) = (Numbers::new(seed), pool());
        let (mut mean, mut sum, mut all) = (r.vec(len), vec![0.0; len], 0.0);
        for step in 1..=steps {
            let w = r.vec(len);
            average(&pool, average_share(decay, step), &mut mean, &w);
            sum.iter_mut().zip(&w).for_each(|(s, w)| *s = *s * decay + f64::from(*w));
            all = all * decay + 1.0;
        }
        sum.iter_mut().for_each(|s| *s /= all);
        close(&mean, &sum, 1e-5);
        let (w, before) = (r.vec(len), mean.clone());
        let mut other = w.clone();
        swap(&pool, &mut mean, &mut other);
        prop_assert_eq!((bits(&mean), bits(&other)), (bits(&w), bits(&before)));
    }

    /// An element is left out or not, whoever computes it with which others.
    #[test]
    fn rows_are_dropped_alike_wherever_they_are(
        rows in 1usize..9, cols in 1usize..70, cut in 0usize..9, rate in 0.0f32..0.99, seed: u64,
    ) {
        let (mut r, of) = (Numbers::new(seed), Dropout { key: seed, rate });
        let x = r.vec(rows * cols);
        let whole = dropped(of, &x, 0, cols, 3);
        let scale = 1.0 / (1.0 - of.dropped());
        let want: Vec<f64> = whole.iter().zip(&x).map(|(y, x)| if *y == 0.0 { 0.0 } else { f64::from(*x) * scale }).collect();
        close(&whole, &want, 1e-6);
        let cut = cut.min(rows);
        let parts = [dropped(of, &x[..cut * cols], 0, cols, 1), dropped(of, &x[cut * cols..], cut as u64, cols, 2)];
        prop_assert_eq!(bits(&parts.concat()), bits(&whole));

        // With a bias, and added to what is there.
        let (bias, held) = (r.vec(cols), r.vec(rows * cols));
        let with: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + bias[i % cols]).collect();
        let sum: Vec<f64> =
            dropped(of, &with, 0, cols, 1).iter().zip(&held).map(|(y, h)| f64::from(*y) + f64::from(*h)).collect();
        let (mut place, mut beside) = (held.clone(), vec![0.0; rows * cols]);
        dropout(&pool(), of, &|row| row as u64, &x, Some(&bias), Acc::InPlace, &mut place, cols);
        dropout(&pool(), of, &|row| row as u64, &x, Some(&bias), Acc::From(&held), &mut beside, cols);
        close(&place, &sum, 1e-5);
        prop_assert_eq!(bits(&place), bits(&beside));

        // In 16 bit the same elements are left out.
        let narrow: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
        let mut out = vec![bf16::ZERO; x.len()];
        dropout(&pool(), of, &|row| row as u64, &narrow, None, Acc::None, &mut out, cols);
        prop_assert!(out.iter().zip(&whole).all(|(a, b)| (a.to_f32() == 0.0) == (*b == 0.0)));
    }
}

/// Shares within five standard deviations: over all elements, by column, and of pairs of neighbours, keys and rows.
#[test]
fn so_many_are_left_out_and_none_by_another() {
    const ROWS: usize = 2000;
    const COLS: usize = 64;
    let ones = vec![1.0; ROWS * COLS];
    for rate in [0.1f32, 0.5, 0.9] {
        let gone = |key: u64| -> Vec<bool> {
            dropped(Dropout { key, rate }, &ones, 0, COLS, 2).iter().map(|y| *y == 0.0).collect()
        };
        let (first, other, p) = (gone(1), gone(2), f64::from(rate));
        let near = |what: &str, count: usize, of: usize, p: f64| {
            let (share, sigma) = (count as f64 / of as f64, (p * (1.0 - p) / of as f64).sqrt());
            assert!((share - p).abs() < 5.0 * sigma, "{what}: {share} of {p} at {rate}");
        };
        let all = first.len();
        near("all", first.iter().filter(|g| **g).count(), all, p);
        for col in 0..COLS {
            near("a column", (0..ROWS).filter(|row| first[row * COLS + col]).count(), ROWS, p);
        }
        for apart in [1, 2, 4, 16, COLS, 2 * COLS] {
            let both = (apart..all).filter(|i| first[*i] && first[i - apart]).count();
            near("neighbours", both, all - apart, p * p);
        }
        near("two keys", (0..all).filter(|i| first[*i] && other[*i]).count(), all, p * p);
    }
    assert_eq!(dropped(Dropout { key: 1, rate: 0.0 }, &ones, 0, COLS, 1), ones);
}
