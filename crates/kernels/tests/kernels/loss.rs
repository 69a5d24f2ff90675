use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

fn nll(logits: &[f64], target: u32) -> f64 {
    if target == u32::MAX {
        return 0.0;
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
    sum.ln() + max - logits[target as usize]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 24 }))]

    #[test]
    fn cross_entropy(n in 1usize..5, v in 1usize..40, shards in 1usize..4, seed: u64) {
        let mut r = Numbers::new(seed);
        let vocab = v * shards;
        let logits: Vec<f32> = r.vec(n * vocab).iter().map(|x| 8.0 * x).collect();
        let mut targets = r.tokens(n, vocab);
        targets[r.below(n)] = if seed % 3 == 0 { u32::MAX } else { targets[0] };
        let scale = 0.125f32;
        let pool = pool();
        let (mut whole, mut loss) = (logits.clone(), vec![0.0; n]);
        xent_fused(&pool, &mut whole, &targets, LossTerms::plain(scale), &mut loss, n, vocab);
        let want: Vec<f64> = (0..n).map(|i| nll(&wide(&logits[i * vocab..(i + 1) * vocab]), targets[i])).collect();
        close(&loss, &want, 1e-6);
        gradient(&whole, &logits, 1e-5, &|x| {
            (0..n).map(|i| f64::from(scale) * nll(&x[i * vocab..(i + 1) * vocab], targets[i])).sum()
        });

        // The same by shards.
        let shard = |s: usize| -> Vec<f32> {
            (0..n).flat_map(|i| logits[i * vocab + s * v..i * vocab + (s + 1) * v].to_vec()).collect()
        };
        let (mut stats, mut total) = (vec![0.0; shards * n * 3], vec![0.0; n * 3]);
        for s in 0..shards {
            xent_stats(&pool, &shard(s), &targets, s * v, &mut stats[s * n * 3..(s + 1) * n * 3], n, v);
        }
        xent_combine(&stats, shards, &mut total, n);
        for s in 0..shards {
            let (mut part, mut loss2) = (shard(s), vec![0.0; n]);
            xent_dlogits(&pool, &mut part, &targets, s * v, &total, LossTerms::plain(scale), &mut loss2, n, v);
            close(&loss2, &want, 1e-6);
            let want: Vec<f64> =
                (0..n).flat_map(|i| wide(&whole[i * vocab + s * v..i * vocab + (s + 1) * v])).collect();
            close(&part, &want, 1e-6);
            if shards == 1 {
                prop_assert_eq!(bits(&part), bits(&whole));
                prop_assert_eq!(bits(&loss), bits(&loss2));
            }
        }
    }

    #[test]
    fn squeezed_logits_and_their_log_sum(n in 1usize..5, vocab in 2usize..40, z in 0f32..0.1, cap in 2f32..30.0, seed: u64) {
        let mut r = Numbers::new(seed);
        let logits: Vec<f32> = r.vec(n * vocab).iter().map(|x| 8.0 * x).collect();
        let targets = r.tokens(n, vocab);
        let (pool, scale) = (pool(), 0.125f32);
        let squeezed = |x: &[f64]| x.iter().map(|x| f64::from(cap) * (x / f64::from(cap)).tanh()).collect::<Vec<_>>();
        let row = |x: &[f64], i: usize| squeezed(&x[i * vocab..(i + 1) * vocab]);
        let (mut got, mut loss) = (logits.clone(), vec![0.0; n]);
        soft_cap(&pool, &mut got, cap);
        close(&got, &squeezed(&wide(&logits)), 1e-6);
        xent_fused(&pool, &mut got, &targets, LossTerms { scale, z, cap }, &mut loss, n, vocab);
        // The loss that is reported is the cross-entropy alone.
        let want: Vec<f64> = (0..n).map(|i| nll(&row(&wide(&logits), i), targets[i])).collect();
        close(&loss, &want, 1e-6);
        gradient(&got, &logits, 2e-5, &|x| {
            let each = |i: usize| {
                let log_sum = row(x, i).iter().map(|l| l.exp()).sum::<f64>().ln();
                f64::from(scale) * (nll(&row(x, i), targets[i]) + f64::from(z) * log_sum * log_sum)
            };
            (0..n).map(each).sum()
        });
    }
}

#[test]
fn large_logits_and_bf16() {
    let pool = pool();
    let mut logits = [1e4f32, -1e4, 9.9e3, f32::NEG_INFINITY];
    let mut loss = [0.0];
    xent_fused(&pool, &mut logits, &[0], LossTerms::plain(1.0), &mut loss, 1, 4);
    assert_eq!((logits, loss), ([0.0, 0.0, 0.0, 0.0], [0.0]));
    let mut nan = [f32::NAN, 1.0];
    xent_fused(&pool, &mut nan, &[1], LossTerms::plain(1.0), &mut loss, 1, 2);
    assert!(loss[0].is_nan());
    let mut half = [1.0f32, 2.0, 3.0].map(bf16::from_f32);
    let mut full = [1.0f32, 2.0, 3.0];
    let mut loss2 = [0.0];
    xent_fused(&pool, &mut half, &[1], LossTerms::plain(0.5), &mut loss, 1, 3);
    xent_fused(&pool, &mut full, &[1], LossTerms::plain(0.5), &mut loss2, 1, 3);
    assert_eq!((half, loss), (full.map(bf16::from_f32), loss2));
}
