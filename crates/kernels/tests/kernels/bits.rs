//! One program through all kernels, whose bits must be the same however it is run.

use kernels::*;

use crate::attention::{Shape, backward, forward};
use crate::reference::*;

const ROWS: usize = 70;
const SEQ: usize = 35;
const DIM: usize = 52;
const HIDDEN: usize = 75;
const VOCAB: usize = 101;
const SHAPE: Shape = Shape { seqs: 2, seq: SEQ, heads: 4, kv: 2, h: 26 };

/// Every result of every kernel on fixed inputs.
fn everything(pool: &Pool) -> Vec<(&'static str, Vec<u32>)> {
    let mut all = Vec::new();
    let mut keep = |name: &'static str, x: &[f32]| all.push((name, bits(x)));
    let mut r = Numbers::new(99);
    let (n, tree) = (ROWS, &[2u32][..]);
    let merge = Merge { merge: 1, store: 1 };
    let (table, w) = (r.vec(VOCAB * DIM), r.vec(DIM));
    let tokens = r.tokens(n, VOCAB);
    let mut x = vec![0.0; n * DIM];
    embed(pool, &tokens, &table, 0, None, Places::whole(SEQ), &mut x, DIM);
    let (mut y, mut rstd) = (x.clone(), vec![0.0; n]);
    rms_norm(pool, &x, &w, &mut y, &mut rstd, n, DIM, 1e-5);
    keep("rms", &y);
    keep("rstd", &rstd);
    let mut stats = vec![0.0; 2 * n];
    let mut z = x.clone();
    layer_norm(pool, &x, &w, &w, &mut z, &mut stats, n, DIM, 1e-5);
    keep("layer", &z);
    let ld = SHAPE.ld();
    let wqkv = r.vec(ld * DIM);
    let mut qkv = vec![0.0; n * ld];
    let mut ws = scratch(4_000_000);
    linear(pool, &y, &wqkv, None, Acc::None, &mut qkv, n, DIM, ld, &mut ws);
    keep("qkv", &qkv);
    let (cos, sin) = (r.vec(SEQ * 13), r.vec(SEQ * 13));
    rope(pool, &mut qkv, &cos, &sin, n, SEQ, 4, 2, 26, 0, false);
    keep("rope", &qkv);
    let (mut normed, mut head_rstd) = (qkv.clone(), vec![0.0; n * 6]);
    let (wq, wk) = (r.vec(26), r.vec(26));
    qk_norm(pool, &qkv, &wq, &wk, &mut normed, &mut head_rstd, n, 4, 2, 26, 1e-6);
    keep("heads", &normed);
    let (o, lse) = forward(pool, SHAPE, &normed, 0.2);
    keep("attention", &o);
    keep("lse", &lse);
    let d = r.vec(o.len());
    let dqkv = backward(pool, SHAPE, &normed, &o, &lse, &d, 0.2);
    keep("attention dx", &dqkv);
    let mut dheads = dqkv.clone();
    qk_norm_dx(pool, &dqkv, &qkv, &wq, &wk, &head_rstd, &mut dheads, n, 4, 2, 26);
    keep("heads dx", &dheads);
    let (mut dwq, mut dwk) = (r.vec(2 * 26), r.vec(2 * 26));
    qk_norm_dw(pool, &dqkv, &qkv, &head_rstd, &mut dwq, &mut dwk, n, 4, 2, 26, tree, merge, &mut ws);
    keep("heads dw", &[dwq, dwk].concat());
    let mut dy = vec![0.0; n * DIM];
    linear_dx(pool, &dheads, &wqkv, Acc::From(&x), &mut dy, n, DIM, ld, &mut ws);
    keep("linear dx", &dy);
    let mut dw = r.vec(2 * ld * DIM);
    linear_dw(pool, &dheads, &y, &mut dw, n, DIM, ld, tree, merge, &mut ws);
    keep("linear dw", &dw);
    let mut db = r.vec(2 * ld);
    bias_grad(pool, &dheads, &mut db, n, ld, tree, merge, &mut ws);
    keep("bias", &db);
    let mut dx = x.clone();
    rms_norm_dx(pool, &dy, &x, &w, &rstd, Acc::InPlace, &mut dx, n, DIM);
    keep("rms dx", &dx);
    layer_norm_dx(pool, &dy, &x, &w, &stats, Acc::InPlace, &mut dx, n, DIM);
    keep("layer dx", &dx);
    let (mut dg, mut dl, mut dlb) = (r.vec(2 * DIM), r.vec(2 * DIM), r.vec(2 * DIM));
    rms_norm_dw(pool, &dy, &x, &rstd, &mut dg, n, DIM, tree, merge, &mut ws);
    layer_norm_dw(pool, &dy, &x, &stats, &mut dl, &mut dlb, n, DIM, tree, merge, &mut ws);
    keep("norm dw", &[dg, dl, dlb].concat());
    let mut dt = r.vec(2 * VOCAB * DIM);
    embed_grad(pool, &tokens, 0, VOCAB, &dx, &mut dt, DIM, tree, merge, &mut ws);
    let mut dp = r.vec(2 * SEQ * DIM);
    pos_grad(pool, &dx, &mut dp, SEQ, Places::whole(SEQ), DIM, tree, merge, &mut ws);
    keep("embed", &[dt, dp].concat());
    all.extend(pointwise(pool).into_iter().chain(mixture(pool)).chain(recipes(pool)));
    all
}

/// Those that take rows or elements one by one: activations, the loss, the optimiser.
fn pointwise(pool: &Pool) -> Vec<(&'static str, Vec<u32>)> {
    const LEN: usize = VOCAB * DIM;
    let mut all = Vec::new();
    let mut keep = |name: &'static str, x: &[f32]| all.push((name, bits(x)));
    let mut r = Numbers::new(96);
    let n = ROWS;
    let tokens = r.tokens(n, VOCAB);
    let gu = r.vec(n * 2 * HIDDEN);
    let (mut h, mut dgu) = (vec![0.0; n * HIDDEN], vec![0.0; n * 2 * HIDDEN]);
    glu(pool, Glu::Silu, &gu, &mut h, n, HIDDEN);
    glu_dx(pool, Glu::Silu, &h, &gu, &mut dgu, n, HIDDEN);
    keep("swiglu", &[h, dgu.clone()].concat());
    for kind in [Gelu::Tanh, Gelu::Erf] {
        let (mut y, mut dx) = (gu.clone(), gu.clone());
        gelu(pool, kind, &gu, &mut y);
        gelu_dx(pool, kind, &dgu, &gu, &mut dx);
        keep("gelu", &[y, dx].concat());
    }
    let mut logits: Vec<f32> = r.vec(n * VOCAB).iter().map(|x| 10.0 * x).collect();
    let (mut s, mut total, mut loss) = (vec![0.0; 3 * n], vec![0.0; 3 * n], vec![0.0; n]);
    xent_stats(pool, &logits, &tokens, 0, &mut s, n, VOCAB);
    xent_combine(&s, 1, &mut total, n);
    xent_fused(pool, &mut logits, &tokens, LossTerms { scale: 0.01, z: 1e-3, cap: 0.0 }, &mut loss, n, VOCAB);
    keep("xent", &[total, logits, loss].concat());
    let grad = r.vec(LEN);
    let (mut p, mut m, mut v) = (r.vec(LEN), r.vec(LEN), vec![0.5; LEN]);
    let c =
        AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 1.0 };
    adamw(pool, &c, &mut p, &mut m, &mut v, &grad);
    keep("adamw", &[p, m, v].concat());
    let mut partials = [0.0; 6];
    sum_squares(pool, &grad, &mut partials, 1000);
    keep("squares", &partials.map(|x| (x as f32, (x - f64::from(x as f32)) as f32)).map(|(a, b)| a + b));
    all
}

/// Those that recipes add: squeezed logits, whole matrices.
fn recipes(pool: &Pool) -> Vec<(&'static str, Vec<u32>)> {
    let mut r = Numbers::new(97);
    let (n, ld) = (ROWS, SHAPE.ld());
    let (tokens, mut loss, mut ws) = (r.tokens(n, VOCAB), vec![0.0; n], scratch(4_000_000));
    let mut logits: Vec<f32> = r.vec(n * VOCAB).iter().map(|x| 10.0 * x).collect();
    soft_cap(pool, &mut logits, 6.0);
    xent_fused(pool, &mut logits, &tokens, LossTerms { scale: 0.01, z: 1e-3, cap: 6.0 }, &mut loss, n, VOCAB);
    let (mut update, mut momentum, mut moved) = (vec![0.0; ld * DIM], r.vec(ld * DIM), r.vec(ld * DIM));
    muon_momentum(pool, 0.95, 0.5, &mut momentum, &mut update, &r.vec(ld * DIM));
    for shape in [(ld, DIM), (DIM, ld)] {
        orthogonalise(pool, &mut update, shape, 0.2, &mut ws);
        muon(pool, (0.999, -1e-3), &mut moved, &update);
    }
    let (mut mean, mut left) = (r.vec(ld * DIM), r.vec(ROWS * DIM));
    average(pool, 0.3, &mut mean, &moved);
    let (x, bias, of) = (r.vec(ROWS * DIM), r.vec(DIM), Dropout { key: 5, rate: 0.2 });
    dropout(pool, of, &|row| 3 * row as u64, &x, Some(&bias), Acc::InPlace, &mut left, DIM);
    vec![
        ("soft cap", bits(&logits)),
        ("muon", bits(&[update, momentum, moved].concat())),
        ("average", bits(&mean)),
        ("dropout", bits(&left)),
    ]
}

/// Those of a mixture of experts: routed, sent to their experts and back.
fn mixture(pool: &Pool) -> Vec<(&'static str, Vec<u32>)> {
    let mut all = Vec::new();
    let mut keep = |name: &'static str, x: &[f32]| all.push((name, bits(x)));
    let mut r = Numbers::new(98);
    let (n, tree) = (ROWS, &[2u32][..]);
    let merge = Merge { merge: 1, store: 1 };
    let (x, y, mut z) = (r.vec(n * DIM), r.vec(n * DIM), vec![0.0; n * DIM]);
    let router = Router {
        top_k: 3,
        sigmoid: false,
        renormalise: true,
        scale: 1.5,
        groups: 2,
        top_groups: 1,
        balance: 0.1,
        z: 0.01,
    };
    let (logits, mut gates, mut index, mut counts) =
        (r.vec(n * 8), vec![0.0; n * 3], vec![0; n * 6], vec![0; 16]);
    let mut small = scratch(route_workspace_len(8, pool.threads()));
    route(pool, &logits, None, &router, (&mut gates, &mut index, &mut counts), (n, 8, 2), &mut small);
    keep("gates", &gates);
    let (mut copies, mut dlogits) = (vec![0.0; 3 * n * DIM], vec![0.0; n * 8]);
    route_dx(pool, &gates, &logits, &index, &counts, &router, &mut dlogits, (n, 8, 2), &mut small);
    keep("logits dx", &dlogits);
    permute(pool, &y, &index, &mut copies, (n, 3, DIM));
    unpermute(pool, &copies, &gates, &index, Acc::From(&x), &mut z, (n, 3, DIM));
    keep("unpermute", &z);
    let (mut dcopies, mut dgates) = (copies.clone(), gates.clone());
    unpermute_dx(pool, &x, &copies, &gates, &index, (&mut dcopies, &mut dgates), (n, 3, DIM));
    keep("gates dx", &dgates);
    let (we, mut he, mut dwe) = (r.vec(8 * 30 * DIM), vec![0.0; 3 * n * 30], vec![0.0; 2 * 8 * 30 * DIM]);
    let groups = Groups { counts: &counts, experts: 8, leaves: 2 };
    let mut room = scratch(4_000_000);
    grouped_linear(pool, &copies, (&we, None), groups, &mut he, (DIM, 30), &mut room);
    keep("experts", &he);
    grouped_linear_dx(pool, &he, &we, groups, &mut dcopies, (DIM, 30), &mut room);
    keep("experts dx", &dcopies);
    grouped_linear_dw(pool, &he, &copies, groups, &mut dwe, (DIM, 30, SEQ), tree, &|_| (0, merge), &mut room);
    keep("experts dw", &dwe);
    permute_dx(pool, &dcopies, &index, Acc::None, &mut z, (n, 3, DIM));
    keep("permute dx", &z);
    all
}

#[track_caller]
fn same(a: &[(&'static str, Vec<u32>)], b: &[(&'static str, Vec<u32>)], what: &str) {
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let differ = a.iter().zip(b).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "{name}: {differ} of {} elements differ {what}", a.len());
    }
}

#[test]
fn threads_and_backends_do_not_show() {
    let before = backend();
    let one = everything(&Pool::new(1));
    for threads in [2, 3, 5, 7] {
        same(&one, &everything(&Pool::new(threads)), &format!("with {threads} threads"));
    }
    for other in [Backend::Avx512, Backend::Avx2, Backend::Scalar] {
        if force_backend(other) {
            same(&one, &everything(&Pool::new(2)), &format!("with {other:?}"));
        }
    }
    force_backend(before);
}

/// Rows and sequences computed alone give what they give together.
#[test]
fn batching_does_not_show() {
    let mut r = Numbers::new(4);
    let pool = pool();
    let (n, k, m) = (23, 300, 70);
    let (x, w) = (r.vec(n * k), r.vec(m * k));
    let mut ws = scratch(linear_workspace_len(n, k, m, 2));
    let mut y = vec![0.0; n * m];
    linear(&pool, &x, &w, None, Acc::None, &mut y, n, k, m, &mut ws);
    for rows in [1, 2, 5, 8] {
        for first in (0..n).step_by(rows) {
            let rows = rows.min(n - first);
            let mut part = vec![0.0; rows * m];
            let x = &x[first * k..(first + rows) * k];
            let mut ws = scratch(linear_workspace_len(rows, k, m, 2));
            linear(&pool, x, &w, None, Acc::None, &mut part, rows, k, m, &mut ws);
            assert_eq!(bits(&part), bits(&y[first * m..(first + rows) * m]));
        }
    }
    let qkv = r.vec(SHAPE.qkv_len());
    let d = r.vec(SHAPE.o_len());
    let (o, lse) = forward(&pool, SHAPE, &qkv, 0.3);
    let dqkv = backward(&pool, SHAPE, &qkv, &o, &lse, &d, 0.3);
    let one = Shape { seqs: 1, ..SHAPE };
    for i in 0..SHAPE.seqs {
        let at = |len: usize| i * len..(i + 1) * len;
        let (o1, lse1) = forward(&pool, one, &qkv[at(one.qkv_len())], 0.3);
        let d1 = backward(&pool, one, &qkv[at(one.qkv_len())], &o1, &lse1, &d[at(one.o_len())], 0.3);
        assert_eq!(bits(&o1), bits(&o[at(one.o_len())]));
        assert_eq!(bits(&lse1), bits(&lse[at(one.lse_len())]));
        assert_eq!(bits(&d1), bits(&dqkv[at(one.qkv_len())]));
    }
}

/// Leaves computed alone and merged as a binary counter give the tree computed at once.
#[test]
fn merging_calls_is_the_tree() {
    let (leaves, rows, k, m) = (4, 9, 40, 30);
    let mut r = Numbers::new(12);
    let (dy, x) = (r.vec(leaves * rows * m), r.vec(leaves * rows * k));
    let pool = pool();
    let mut ws = scratch(linear_dw_workspace_len(leaves * rows, k, m, &[2, 2], 2));
    let mut at_once = vec![0.0; m * k];
    let set = Merge { merge: 0, store: 0 };
    linear_dw(&pool, &dy, &x, &mut at_once, leaves * rows, k, m, &[2, 2], set, &mut ws);
    let mut grad = vec![f32::NAN; 3 * m * k];
    let steps = [(0, 0), (1, 1), (0, 0), (2, 2)];
    for (leaf, (merge, store)) in steps.into_iter().enumerate() {
        let dy = &dy[leaf * rows * m..(leaf + 1) * rows * m];
        let x = &x[leaf * rows * k..(leaf + 1) * rows * k];
        linear_dw(&pool, dy, x, &mut grad, rows, k, m, &[], Merge { merge, store }, &mut ws);
    }
    assert_eq!(bits(&grad[2 * m * k..]), bits(&at_once));
}
