//! Norms, rotary positions, activations, embeddings, the optimiser.

use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

const SET: Merge = Merge { merge: 0, store: 0 };

fn rms(x: &[f64], w: &[f32], eps: f64) -> Vec<f64> {
    let dim = w.len();
    x.chunks(dim)
        .flat_map(|x| {
            let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + eps).sqrt();
            x.iter().zip(w).map(|(x, &w)| x * r * f64::from(w)).collect::<Vec<_>>()
        })
        .collect()
}

fn layer(x: &[f64], w: &[f32], b: &[f32], eps: f64) -> Vec<f64> {
    let dim = w.len();
    x.chunks(dim)
        .flat_map(|x| {
            let mean = x.iter().sum::<f64>() / dim as f64;
            let r = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64 + eps).sqrt();
            (0..dim).map(|j| (x[j] - mean) * r * f64::from(w[j]) + f64::from(b[j])).collect::<Vec<_>>()
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 20 }))]

    #[test]
    fn rms_norms(n in 1usize..6, dim in 1usize..70, seed: u64) {
        let mut r = Numbers::new(seed);
        let (x, w, g, a) = (r.vec(n * dim), r.vec(dim), r.vec(n * dim), r.vec(n * dim));
        let (mut y, mut rstd) = (vec![0.0; n * dim], vec![0.0; n]);
        let pool = pool();
        rms_norm(&pool, &x, &w, &mut y, &mut rstd, n, dim, 1e-5);
        close(&y, &rms(&wide(&x), &w, 1e-5), 1e-6);
        let mut dx = vec![0.0; n * dim];
        rms_norm_dx(&pool, &g, &x, &w, &rstd, Acc::None, &mut dx, n, dim);
        gradient(&dx, &x, 2e-5, &|x| dot(&rms(x, &w, 1e-5), &g));
        let mut more = a.clone();
        rms_norm_dx(&pool, &g, &x, &w, &rstd, Acc::InPlace, &mut more, n, dim);
        let sum: Vec<f32> = a.iter().zip(&dx).map(|(a, d)| a + d).collect();
        prop_assert_eq!(&more, &sum);
        more.fill(0.0);
        rms_norm_dx(&pool, &g, &x, &w, &rstd, Acc::From(&a), &mut more, n, dim);
        prop_assert_eq!(&more, &sum);
        let mut dw = vec![0.0; dim];
        let mut ws = scratch(norm_dw_workspace_len(dim, &[]));
        rms_norm_dw(&pool, &g, &x, &rstd, &mut dw, n, dim, &[], SET, &mut ws);
        let ones = vec![1.0; dim];
        let normed = rms(&wide(&x), &ones, 1e-5);
        let want: Vec<f64> =
            (0..dim).map(|j| (0..n).map(|i| normed[i * dim + j] * f64::from(g[i * dim + j])).sum()).collect();
        close(&dw, &want, 1e-5);
    }

    #[test]
    fn layer_norms(n in 1usize..6, dim in 2usize..70, seed: u64) {
        let mut r = Numbers::new(seed);
        let (x, w, b, g) = (r.vec(n * dim), r.vec(dim), r.vec(dim), r.vec(n * dim));
        let (mut y, mut stats) = (vec![0.0; n * dim], vec![0.0; 2 * n]);
        let pool = pool();
        let eps = 1e-3;
        layer_norm(&pool, &x, &w, &b, &mut y, &mut stats, n, dim, eps);
        close(&y, &layer(&wide(&x), &w, &b, f64::from(eps)), 2e-5);
        let mut dx = vec![0.0; n * dim];
        layer_norm_dx(&pool, &g, &x, &w, &stats, Acc::None, &mut dx, n, dim);
        gradient(&dx, &x, 2e-4, &|x| dot(&layer(x, &w, &b, f64::from(eps)), &g));
        let (mut dw, mut db) = (vec![0.0; dim], vec![0.0; dim]);
        let mut ws = scratch(norm_dw_workspace_len(dim, &[]));
        layer_norm_dw(&pool, &g, &x, &stats, &mut dw, &mut db, n, dim, &[], SET, &mut ws);
        let normed = layer(&wide(&x), &vec![1.0; dim], &vec![0.0; dim], f64::from(eps));
        let columns = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..dim).map(|j| (0..n).map(|i| f(i * dim + j)).sum()).collect()
        };
        close(&dw, &columns(&|i| normed[i] * f64::from(g[i])), 1e-4);
        close(&db, &columns(&|i| f64::from(g[i])), 1e-5);
    }

    #[test]
    fn head_norms(n in 1usize..4, kv in 1usize..3, group in 1usize..3, h in 1usize..40, seed: u64) {
        let (heads, eps) = (kv * group, 1e-5);
        let ld = (heads + 2 * kv) * h;
        let mut r = Numbers::new(seed);
        let (x, wq, wk, g) = (r.vec(n * ld), r.vec(h), r.vec(h), r.vec(n * ld));
        let (mut y, mut rstd) = (vec![0.0; n * ld], vec![0.0; n * (heads + kv)]);
        let pool = pool();
        let full = |x: &[f64], wq: &[f32], wk: &[f32]| -> Vec<f64> {
            x.chunks(ld)
                .flat_map(|x| {
                    let (q, rest) = x.split_at(heads * h);
                    let (k, v) = rest.split_at(kv * h);
                    [rms(q, wq, eps), rms(k, wk, eps), v.to_vec()].concat()
                })
                .collect()
        };
        qk_norm(&pool, &x, &wq, &wk, &mut y, &mut rstd, n, heads, kv, h, eps as f32);
        close(&y, &full(&wide(&x), &wq, &wk), 1e-6);
        let mut dx = vec![0.0; n * ld];
        qk_norm_dx(&pool, &g, &x, &wq, &wk, &rstd, &mut dx, n, heads, kv, h);
        gradient(&dx, &x, 1e-4, &|x| dot(&full(x, &wq, &wk), &g));
        let (mut dq, mut dk) = (vec![0.0; h], vec![0.0; h]);
        let mut ws = scratch(qk_norm_dw_workspace_len(h, &[]));
        qk_norm_dw(&pool, &g, &x, &rstd, &mut dq, &mut dk, n, heads, kv, h, &[], SET, &mut ws);
        let normed = full(&wide(&x), &vec![1.0; h], &vec![1.0; h]);
        let sums = |first: usize, count: usize| -> Vec<f64> {
            (0..h)
                .map(|j| {
                    (0..n)
                        .flat_map(|i| (first..first + count).map(move |head| i * ld + head * h + j))
                        .map(|at| normed[at] * f64::from(g[at]))
                        .sum()
                })
                .collect()
        };
        close(&dq, &sums(0, heads), 1e-5);
        close(&dk, &sums(heads, kv), 1e-5);
    }

    #[test]
    fn rotary(n in 1usize..8, seq in 1usize..5, half in 1usize..40, pos0 in 0usize..3, seed: u64) {
        let (heads, kv, h) = (2, 1, 2 * half);
        let ld = (heads + 2 * kv) * h;
        let mut r = Numbers::new(seed);
        let x = r.vec(n * ld);
        let angle = |p: usize, j: usize| p as f64 * 100f64.powf(-(j as f64) / half as f64);
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..(pos0 + seq) * half).map(|i| f(angle(i / half, i % half)) as f32).collect()
        };
        let (cos, sin) = (table(f64::cos), table(f64::sin));
        let mut want = wide(&x);
        for i in 0..n {
            for head in 0..heads + kv {
                for j in 0..half {
                    let a = angle(pos0 + i % seq, j);
                    let at = i * ld + head * h + j;
                    let (x, y) = (want[at], want[at + half]);
                    want[at] = x * a.cos() - y * a.sin();
                    want[at + half] = y * a.cos() + x * a.sin();
                }
            }
        }
        let pool = pool();
        let mut y = x.clone();
        rope(&pool, &mut y, &cos, &sin, n, seq, heads, kv, h, pos0, false);
        close(&y, &want, 1e-6);
        rope(&pool, &mut y, &cos, &sin, n, seq, heads, kv, h, pos0, true);
        close(&y, &wide(&x), 1e-6);
    }

    #[test]
    fn activations(n in 1usize..5, f in 1usize..50, seed: u64) {
        let mut r = Numbers::new(seed);
        let gu: Vec<f32> = r.vec(2 * n * f).iter().map(|x| 3.0 * x).collect();
        let dh = r.vec(n * f);
        let pool = pool();
        let silu = |gu: &[f64]| -> Vec<f64> {
            (0..n * f)
                .map(|i| {
                    let (g, u) = (gu[i / f * 2 * f + i % f], gu[i / f * 2 * f + f + i % f]);
                    g / (1.0 + (-g).exp()) * u
                })
                .collect()
        };
        let mut h = vec![0.0; n * f];
        glu(&pool, Glu::Silu, &gu, &mut h, n, f);
        close(&h, &silu(&wide(&gu)), 1e-6);
        let mut dgu = vec![0.0; 2 * n * f];
        glu_dx(&pool, Glu::Silu, &dh, &gu, &mut dgu, n, f);
        gradient(&dgu, &gu, 1e-5, &|gu| dot(&silu(gu), &dh));
        // Some beyond the bounds, none at one.
        let gu: Vec<f32> = gu.iter().map(|x| 4.0 * x).collect();
        let clamped = |gu: &[f64]| -> Vec<f64> {
            (0..n * f)
                .map(|i| {
                    let (g, u) = (gu[i / f * 2 * f + i % f].min(7.0), gu[i / f * 2 * f + f + i % f]);
                    g / (1.0 + (-1.702 * g).exp()) * (u.clamp(-7.0, 7.0) + 1.0)
                })
                .collect()
        };
        glu(&pool, Glu::Clamped, &gu, &mut h, n, f);
        close(&h, &clamped(&wide(&gu)), 1e-6);
        glu_dx(&pool, Glu::Clamped, &dh, &gu, &mut dgu, n, f);
        gradient(&dgu, &gu, 1e-5, &|gu| dot(&clamped(gu), &dh));
        let (x, g) = (&gu[..n * f], &dh[..]);
        let gelu_tanh = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh());
        // The integral of the normal density by Simpson's rule.
        let gelu_erf = |x: f64| {
            let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let d = x / 200.0;
            let sum: f64 = (0..200)
                .map(|i| {
                    let t = f64::from(i) * d;
                    d / 6.0 * (density(t) + 4.0 * density(t + d / 2.0) + density(t + d))
                })
                .sum();
            x * (0.5 + sum)
        };
        let kinds: [(Gelu, &dyn Fn(f64) -> f64); 2] = [(Gelu::Tanh, &gelu_tanh), (Gelu::Erf, &gelu_erf)];
        for (kind, reference) in kinds {
            let mut y = vec![0.0; n * f];
            gelu(&pool, kind, x, &mut y);
            let all = |x: &[f64]| x.iter().map(|&x| reference(x)).collect::<Vec<_>>();
            close(&y, &all(&wide(x)), 1e-6);
            let mut dx = vec![0.0; n * f];
            gelu_dx(&pool, kind, g, x, &mut dx);
            gradient(&dx, x, 1e-5, &|x| dot(&all(x), g));
        }
        let mut y = vec![0.0; n * f];
        add(&pool, x, g, &mut y);
        prop_assert!((0..n * f).all(|i| y[i] == x[i] + g[i]));
        let bias = r.vec(f);
        add_bias(&pool, x, g, &bias, &mut y);
        prop_assert!((0..n * f).all(|i| y[i] == x[i] + g[i] + bias[i % f]));
        let mut z = x.to_vec();
        add_to(&pool, g, &mut z);
        prop_assert!((0..n * f).all(|i| z[i] == x[i] + g[i]));
    }

    #[test]
    fn partial_sums(count in 1usize..700, merge in 0usize..4, store in 0usize..4, seed: u64) {
        let mut r = Numbers::new(seed);
        let (x, before) = (r.vec(count), r.vec(4 * count));
        let mut levels = before.clone();
        add_levels(&pool(), &x, &mut levels, Merge { merge, store });
        for (i, got) in levels.iter().enumerate() {
            let sum = (0..merge).fold(x[i % count], |sum, level| before[level * count + i % count] + sum);
            prop_assert_eq!(*got, if i / count == store { sum } else { before[i] });
        }
    }

    #[test]
    fn embeddings(rows in 1usize..7, seq in 1usize..9, dim in 1usize..40, shape in 0usize..5, vocab0 in 0usize..3, seed: u64) {
        let tree: &[u32] = [&[][..], &[2], &[3, 1], &[2, 3], &[2, 2, 2]][shape];
        let leaves = tree.iter().product::<u32>() as usize;
        let (n, vocab) = (rows * leaves, 11);
        let mut r = Numbers::new(seed);
        let tokens = r.tokens(n, 14);
        let (table, pos, dy) = (r.vec(vocab * dim), r.vec(seq * dim), r.vec(n * dim));
        let pool = pool();
        let mut y = vec![0.0; n * dim];
        let row = |i: usize| (tokens[i] as usize).checked_sub(vocab0).filter(|&row| row < vocab);
        for pos in [None, Some(&pos[..])] {
            embed(&pool, &tokens, &table, vocab0, pos, Places::whole(seq), &mut y, dim);
            for i in 0..n * dim {
                let word = row(i / dim).map_or(0.0, |row| table[row * dim + i % dim]);
                prop_assert_eq!(y[i], word + pos.map_or(0.0, |pos| pos[i / dim % seq * dim + i % dim]));
            }
        }
        let leaf_sums = |len: usize, index: &dyn Fn(usize) -> Option<usize>| -> Vec<Vec<f32>> {
            (0..leaves)
                .map(|leaf| {
                    let mut sums = vec![0.0; len * dim];
                    for i in leaf * rows..(leaf + 1) * rows {
                        if let Some(to) = index(i) {
                            (0..dim).for_each(|j| sums[to * dim + j] += dy[i * dim + j]);
                        }
                    }
                    sums
                })
                .collect()
        };
        let check = |before: &[f32], after: &[f32], root: &[f32], m: Merge| {
            let len = root.len();
            for i in 0..len {
                let want = (0..m.merge).fold(root[i], |r, level| before[level * len + i] + r);
                assert_eq!(after[m.store * len + i].to_bits(), want.to_bits());
            }
        };
        for m in [SET, Merge { merge: 1, store: 0 }, Merge { merge: 2, store: 2 }] {
            let before = r.vec(3 * vocab * dim);
            let mut grad = before.clone();
            let mut ws = scratch(embed_grad_workspace_len(n, vocab, dim, tree, 2));
            embed_grad(&pool, &tokens, vocab0, vocab, &dy, &mut grad, dim, tree, m, &mut ws);
            check(&before, &grad, &add_tree(&leaf_sums(vocab, &row), tree), m);
            let positions = seq + 2;
            let before = r.vec(3 * positions * dim);
            let mut grad = before.clone();
            let mut ws = scratch(pos_grad_workspace_len(dim, tree, 2));
            pos_grad(&pool, &dy, &mut grad, positions, Places::whole(seq), dim, tree, m, &mut ws);
            check(&before, &grad, &add_tree(&leaf_sums(positions, &|i| Some(i % seq)), tree), m);
        }
    }

    #[test]
    fn adamw_steps(len in 1usize..80, step in 1u64..2000, seed: u64) {
        let mut r = Numbers::new(seed);
        let (w, m, g) = (r.vec(len), r.vec(len), r.vec(len));
        let v: Vec<f32> = r.vec(len).iter().map(|v| v * v).collect();
        let c = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 };
        let (mut w1, mut m1, mut v1) = (w.clone(), m.clone(), v.clone());
        let mut out = vec![bf16::ZERO; len];
        adamw_bf16(&pool(), &c, &mut w1, &mut m1, &mut v1, &g, &mut out);
        let (mut w2, mut m2, mut v2) = (w.clone(), m.clone(), v.clone());
        adamw(&pool(), &c, &mut w2, &mut m2, &mut v2, &g);
        prop_assert_eq!(bits(&w1), bits(&w2));
        prop_assert!(out.iter().zip(&w1).all(|(o, &w)| *o == bf16::from_f32(w)));
        let mut want = Vec::new();
        for i in 0..len {
            let (w, g) = (f64::from(w[i]), 0.5 * f64::from(g[i]));
            let m = 0.9 * f64::from(m[i]) + 0.1 * g;
            let v = 0.95 * f64::from(v[i]) + 0.05 * g * g;
            let (c1, c2) = (1.0 - 0.9f64.powi(step as i32), 1.0 - 0.95f64.powi(step as i32));
            want.push(w * (1.0 - 1e-3) - 1e-2 * (m / c1) / ((v / c2).sqrt() + 1e-8));
        }
        close(&w1, &want, 1e-6);
        let chunk = 7;
        let mut partials = vec![0.0; len.div_ceil(chunk)];
        sum_squares(&pool(), &g, &mut partials, chunk);
        for (part, got) in g.chunks(chunk).zip(partials) {
            let want: f64 = part.iter().map(|&x| f64::from(x).powi(2)).sum();
            prop_assert!((got - want).abs() <= 1e-14 * want);
        }
    }
}

#[test]
fn conversions() {
    let x = Numbers::new(1).vec(1001);
    let pool = pool();
    let (mut half, mut back, mut copied) = (vec![bf16::ZERO; 1001], vec![0.0; 1001], vec![0.0; 1001]);
    from_f32(&pool, &x, &mut half);
    to_f32(&pool, &half, &mut back);
    copy(&pool, &back, &mut copied);
    assert!((0..1001).all(|i| copied[i] == bf16::from_f32(x[i]).to_f32()));
    fill(&pool, &mut copied, 2.5);
    assert!(copied.iter().all(|&x| x == 2.5));
}

#[test]
fn large_activations_stay_finite() {
    let x = [1e30f32, -1e30, 100.0, -100.0, f32::INFINITY];
    let pool = pool();
    let gu: Vec<f32> = x.iter().chain(&[1.0; 5]).copied().collect();
    let (mut h, mut dgu) = ([0.0; 5], [0.0; 10]);
    glu(&pool, Glu::Silu, &gu, &mut h, 1, 5);
    assert_eq!(h, [1e30, 0.0, 100.0, 0.0, f32::INFINITY].map(|h: f32| h));
    glu_dx(&pool, Glu::Silu, &[1.0; 5], &gu, &mut dgu, 1, 5);
    assert_eq!(dgu[..4], [1.0, 0.0, 1.0, 0.0]);
    for kind in [Gelu::Tanh, Gelu::Erf] {
        let mut y = [0.0; 4];
        gelu(&pool, kind, &x[..4], &mut y);
        assert_eq!(y, [1e30, 0.0, 100.0, 0.0]);
    }
}
