use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

/// y = x w^T in double precision, and the sum of magnitudes behind each element.
fn product(x: &[f32], w: &[f32], n: usize, k: usize, m: usize) -> Vec<f64> {
    let mut y = vec![0.0; n * m];
    for i in 0..n {
        for j in 0..m {
            y[i * m + j] = (0..k).map(|p| f64::from(x[i * k + p]) * f64::from(w[j * k + p])).sum();
        }
    }
    y
}

fn transpose<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols * rows).map(|i| x[i % rows * cols + i / rows]).collect()
}

/// Each element is one chain from 0.
fn chain(x: &[f32], w: &[f32], n: usize, k: usize, m: usize) -> Vec<f32> {
    let mut y = vec![0.0f32; n * m];
    for i in 0..n {
        for j in 0..m {
            y[i * m + j] = (0..k).fold(0.0, |sum, p| x[i * k + p].mul_add(w[j * k + p], sum));
        }
    }
    y
}

fn shapes() -> impl Strategy<Value = (usize, usize, usize, u64)> {
    (1usize..40, 1usize..90, 1usize..150, any::<u64>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 24 }))]

    #[test]
    fn forward_is_a_chain_plus_bias_plus_accumulator((n, k, m, seed) in shapes()) {
        let mut r = Numbers::new(seed);
        let (x, w, b, a) = (r.vec(n * k), r.vec(m * k), r.vec(m), r.vec(n * m));
        let pool = pool();
        let mut ws = scratch(linear_workspace_len(n, k, m, 2));
        let plain = chain(&x, &w, n, k, m);
        let mut y = vec![0.0; n * m];
        linear(&pool, &x, &w, None, Acc::None, &mut y, n, k, m, &mut ws);
        prop_assert_eq!(bits(&y), bits(&plain));
        let with_bias: Vec<f32> = plain.iter().enumerate().map(|(i, y)| y + b[i % m]).collect();
        let full: Vec<f32> = with_bias.iter().zip(&a).map(|(y, a)| a + y).collect();
        linear(&pool, &x, &w, Some(&b), Acc::From(&a), &mut y, n, k, m, &mut ws);
        prop_assert_eq!(bits(&y), bits(&full));
        y.copy_from_slice(&a);
        linear(&pool, &x, &w, Some(&b), Acc::InPlace, &mut y, n, k, m, &mut ws);
        prop_assert_eq!(bits(&y), bits(&full));
    }

    #[test]
    fn input_gradient_is_a_chain((n, m, k, seed) in shapes()) {
        let mut r = Numbers::new(seed);
        let (dy, w, a) = (r.vec(n * m), r.vec(m * k), r.vec(n * k));
        let mut ws = scratch(linear_dx_workspace_len(n, k, m, 2));
        let plain = chain(&dy, &transpose(&w, m, k), n, m, k);
        let want: Vec<f32> = plain.iter().zip(&a).map(|(y, a)| a + y).collect();
        let mut dx = a.clone();
        linear_dx(&pool(), &dy, &w, Acc::InPlace, &mut dx, n, k, m, &mut ws);
        prop_assert_eq!(bits(&dx), bits(&want));
    }

    #[test]
    fn weight_gradient_is_a_tree_of_chains(
        rows in 1usize..20, k in 1usize..90, m in 1usize..40, shape in 0usize..8, seed: u64
    ) {
        let tree: &[u32] = [&[][..], &[2], &[3], &[2, 2], &[2, 3], &[3, 2], &[1, 2, 1], &[5, 2]][shape];
        let leaves = tree.iter().product::<u32>() as usize;
        let n = rows * leaves;
        let mut r = Numbers::new(seed);
        let (dy, x, before) = (r.vec(n * m), r.vec(n * k), r.vec(3 * m * k));
        let parts: Vec<Vec<f32>> = (0..leaves)
            .map(|leaf| {
                let dy = transpose(&dy[leaf * rows * m..(leaf + 1) * rows * m], rows, m);
                let x = transpose(&x[leaf * rows * k..(leaf + 1) * rows * k], rows, k);
                chain(&dy, &x, m, rows, k)
            })
            .collect();
        let root = add_tree(&parts, tree);
        let mut ws = scratch(linear_dw_workspace_len(n, k, m, tree, 2));
        for merge in [Merge { merge: 0, store: 0 }, Merge { merge: 1, store: 0 }, Merge { merge: 2, store: 2 }] {
            let mut grad = before.clone();
            linear_dw(&pool(), &dy, &x, &mut grad, n, k, m, tree, merge, &mut ws);
            let mut want = before.clone();
            for i in 0..m * k {
                want[merge.store * m * k + i] = (0..merge.merge).fold(root[i], |r, l| before[l * m * k + i] + r);
            }
            prop_assert_eq!(bits(&grad), bits(&want), "{:?} {:?}", tree, merge);
        }
    }

    #[test]
    fn bias_gradient_is_a_tree_of_sums(rows in 1usize..20, m in 1usize..200, shape in 0usize..4, seed: u64) {
        let tree: &[u32] = [&[][..], &[2], &[3], &[2, 3]][shape];
        let leaves = tree.iter().product::<u32>() as usize;
        let n = rows * leaves;
        let mut r = Numbers::new(seed);
        let (dy, before) = (r.vec(n * m), r.vec(2 * m));
        let parts: Vec<Vec<f32>> = (0..leaves)
            .map(|leaf| {
                (0..m).map(|j| (0..rows).fold(0.0, |sum, i| sum + dy[(leaf * rows + i) * m + j])).collect()
            })
            .collect();
        let root = add_tree(&parts, tree);
        let mut grad = before.clone();
        let mut ws = scratch(bias_grad_workspace_len(m, tree));
        bias_grad(&pool(), &dy, &mut grad, n, m, tree, Merge { merge: 1, store: 1 }, &mut ws);
        let want: Vec<f32> = root.iter().zip(&before).map(|(r, b)| b + r).collect();
        prop_assert_eq!(bits(&grad[m..]), bits(&want));
        prop_assert_eq!(bits(&grad[..m]), bits(&before[..m]));
    }
}

/// Inner dimensions and leaves beyond one inner block, many tasks, column slices.
#[test]
fn long_chains_are_one_chain() {
    let (n, k, m) = (45, 700, 130);
    let mut r = Numbers::new(7);
    let (x, w, a) = (r.vec(n * k), r.vec(m * k), r.vec(n * m));
    let want = chain(&x, &w, n, k, m);
    let pool = pool();
    let mut ws = scratch(linear_workspace_len(n, k, m, 2));
    let mut y = vec![0.0; n * m];
    linear(&pool, &x, &w, None, Acc::None, &mut y, n, k, m, &mut ws);
    assert_eq!(bits(&y), bits(&want));
    close(&y, &product(&x, &w, n, k, m), 1e-5);
    let sum: Vec<f32> = want.iter().zip(&a).map(|(y, a)| a + y).collect();
    linear(&pool, &x, &w, None, Acc::From(&a), &mut y, n, k, m, &mut ws);
    assert_eq!(bits(&y), bits(&sum));

    let mut slices = vec![9.0; n * (m + 3)];
    linear_strided(&pool, &x, k, &w[..40 * m], None, Acc::None, &mut slices, m + 3, n, 40, m, &mut ws);
    let narrow: Vec<f32> = (0..n).flat_map(|i| x[i * k..i * k + 40].to_vec()).collect();
    let want = chain(&narrow, &w[..40 * m], n, 40, m);
    for i in 0..n {
        assert_eq!(bits(&slices[i * (m + 3)..i * (m + 3) + m]), bits(&want[i * m..(i + 1) * m]));
        assert_eq!(slices[i * (m + 3) + m..(i + 1) * (m + 3)], [9.0; 3]);
    }

    let (rows, k, m) = (600, 70, 50);
    let (dy, x) = (r.vec(rows * m), r.vec(rows * k));
    let want = chain(&transpose(&dy, rows, m), &transpose(&x, rows, k), m, rows, k);
    let mut grad = vec![0.0; m * k];
    let mut ws = scratch(linear_dw_workspace_len(rows, k, m, &[], 2));
    linear_dw(&pool, &dy, &x, &mut grad, rows, k, m, &[], Merge { merge: 0, store: 0 }, &mut ws);
    assert_eq!(bits(&grad), bits(&want));
}

/// An input too large to be packed at once.
#[test]
fn many_rows() {
    let (n, k, m) = (34_000, 120, 3);
    let mut r = Numbers::new(8);
    let (dy, x) = (r.vec(n * m), r.vec(n * k));
    let leaves: Vec<Vec<f32>> = (0..2)
        .map(|leaf| {
            let half = n / 2;
            let dy = transpose(&dy[leaf * half * m..(leaf + 1) * half * m], half, m);
            chain(&dy, &transpose(&x[leaf * half * k..(leaf + 1) * half * k], half, k), m, half, k)
        })
        .collect();
    let mut grad = vec![0.0; m * k];
    let mut ws = scratch(linear_dw_workspace_len(n, k, m, &[2], 2));
    linear_dw(&pool(), &dy, &x, &mut grad, n, k, m, &[2], Merge { merge: 0, store: 0 }, &mut ws);
    assert_eq!(bits(&grad), bits(&add_tree(&leaves, &[2])));
}

#[test]
fn bf16_storage_is_rounded_f32() {
    let (n, k, m) = (13, 300, 77);
    let mut r = Numbers::new(3);
    let round = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (x, w, b, a) = (round(&r.vec(n * k)), round(&r.vec(m * k)), round(&r.vec(m)), round(&r.vec(n * m)));
    let pool = pool();
    let mut ws = scratch(linear_workspace_len(n, k, m, 2).max(linear_dw_workspace_len(n, k, m, &[], 2)));
    let mut y = vec![bf16::ZERO; n * m];
    linear(&pool, &x, &w, Some(&b), Acc::From(&a), &mut y, n, k, m, &mut ws);
    let mut y32 = vec![0.0; n * m];
    let (x32, w32) = (widen(&x), widen(&w));
    linear(&pool, &x32, &w32, Some(&widen(&b)), Acc::From(&widen(&a)), &mut y32, n, k, m, &mut ws);
    assert_eq!(y, round(&y32));
    let mut dx = vec![bf16::ZERO; n * k];
    linear_dx(&pool, &y, &w, Acc::None, &mut dx, n, k, m, &mut ws);
    let mut dx32 = vec![0.0; n * k];
    linear_dx(&pool, &widen(&y), &w32, Acc::None, &mut dx32, n, k, m, &mut ws);
    assert_eq!(dx, round(&dx32));
    let (mut dw, mut dw32) = (vec![0.0; m * k], vec![0.0; m * k]);
    let merge = Merge { merge: 0, store: 0 };
    linear_dw(&pool, &y, &x, &mut dw, n, k, m, &[], merge, &mut ws);
    linear_dw(&pool, &widen(&y), &x32, &mut dw32, n, k, m, &[], merge, &mut ws);
    assert_eq!(bits(&dw), bits(&dw32));
}
