use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

/// Rows of `[queries | kv | shared]` normed by their definition: latents, then shared parts, then queries.
fn normed(l: Latents, c: &[f64], wkv: &[f64], wq: &[f64], eps: f64) -> Vec<f64> {
    let norm = |x: &[f64], w: &[f64]| -> Vec<f64> {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + eps).sqrt();
        x.iter().zip(w).map(|(x, w)| x * r * w).collect()
    };
    let rows = || c.chunks(l.queries + l.kv + l.shared);
    let latents = rows().flat_map(|c| norm(&c[l.queries..l.queries + l.kv], wkv));
    let shared = rows().flat_map(|c| c[l.queries + l.kv..].to_vec());
    let queries = rows().filter(|_| l.queries > 0).flat_map(|c| norm(&c[..l.queries], wq));
    latents.chain(shared).chain(queries).collect()
}

/// Rows packed by their definition.
fn packed(h: LatentHeads, x: &[f64], n: usize, seq: usize, tables: (&[f32], &[f32])) -> Vec<f64> {
    let (key, half) = (h.nope + h.rope, h.rope / 2);
    let (q, rest) = x.split_at(n * h.heads * key);
    let (kv, shared) = rest.split_at(n * h.heads * (h.nope + h.value));
    let turn = |x: &[f64], row: usize| -> Vec<f64> {
        let at = |t: &[f32], j: usize| f64::from(t[row % seq * half + j]);
        let pair = |j: usize| {
            let (a, b, c, s) = (x[2 * j], x[2 * j + 1], at(tables.0, j), at(tables.1, j));
            [a * c - b * s, b * c + a * s]
        };
        (0..half).flat_map(pair).collect()
    };
    let mut out = Vec::new();
    for row in 0..n {
        let queries = q[row * h.heads * key..].chunks(key).take(h.heads);
        let keys = || kv[row * h.heads * (h.nope + h.value)..].chunks(h.nope + h.value).take(h.heads);
        out.extend(queries.flat_map(|q| [q[..h.nope].to_vec(), turn(&q[h.nope..], row)]).flatten());
        let shared = turn(&shared[row * h.rope..(row + 1) * h.rope], row);
        out.extend(keys().flat_map(|k| [k[..h.nope].to_vec(), shared.clone()]).flatten());
        out.extend(keys().flat_map(|k| k[h.nope..].to_vec()));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 24 }))]

    #[test]
    fn norms_take_latents_apart(
        n in 1usize..5, queries in 0usize..20, kv in 1usize..20, shared in 1usize..7, seed: u64
    ) {
        let l = Latents { queries, kv, shared };
        let (mut r, cols, norms) = (Numbers::new(seed), queries + kv + shared, 1 + usize::from(queries > 0));
        let (c, wkv, wq, d) = (r.vec(n * cols), r.vec(kv), r.vec(queries), r.vec(n * cols));
        let pool = pool();
        let mut y = vec![0.0; n * cols];
        let mut rstd = vec![0.0; n * norms];
        let (latent, rest) = y.split_at_mut(n * kv);
        let (key, q) = rest.split_at_mut(n * shared);
        latent_norm(&pool, l, &c, (&wkv, &wq), (latent, key, q), &mut rstd, 1e-3);
        close(&y, &normed(l, &wide(&c), &wide(&wkv), &wide(&wq), 1e-3), 1e-5);

        let (dlatent, rest) = d.split_at(n * kv);
        let (dkey, dq) = rest.split_at(n * shared);
        let mut dc = vec![0.0; n * cols];
        latent_norm_dx(&pool, l, (dlatent, dkey, dq), &c, (&wkv, &wq), &rstd, &mut dc);
        gradient(&dc, &c, 1e-4, &|c| dot(&normed(l, c, &wide(&wkv), &wide(&wq), 1e-3), &d));
        let (mut dwkv, mut dwq) = (vec![0.0; kv], vec![0.0; queries]);
        let mut ws = scratch(latent_norm_dw_workspace_len(l, &[]));
        let set = Merge { merge: 0, store: 0 };
        latent_norm_dw(&pool, l, (dlatent, dq), &c, &rstd, (&mut dwkv, &mut dwq), &[], set, &mut ws);
        gradient(&dwkv, &wkv, 1e-4, &|w| dot(&normed(l, &wide(&c), w, &wide(&wq), 1e-3), &d));
        gradient(&dwq, &wq, 1e-4, &|w| dot(&normed(l, &wide(&c), &wide(&wkv), w, 1e-3), &d));
    }

    #[test]
    fn heads_are_packed_with_the_part_that_they_share(
        seqs in 1usize..3, seq in 1usize..4, heads in 1usize..4, nope in 1usize..20, half in 1usize..4,
        value in 1usize..20, seed: u64
    ) {
        let (h, n) = (LatentHeads { heads, nope, rope: 2 * half, value }, seqs * seq);
        let lens = [n * heads * (nope + 2 * half), n * heads * (nope + value), n * 2 * half];
        let mut r = Numbers::new(seed);
        let angles = r.vec(seq * half);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let x = r.vec(lens.iter().sum());
        let (q, rest) = x.split_at(lens[0]);
        let (kv, shared) = rest.split_at(lens[1]);
        let mut out = vec![0.0; 2 * lens[0] + n * heads * value];
        let pool = pool();
        latent_rope(&pool, h, (q, kv, shared), (&cos, &sin), &mut out, seq);
        close(&out, &packed(h, &wide(&x), n, seq, (&cos, &sin)), 1e-5);
        let d = r.vec(out.len());
        let mut dx = vec![0.0; x.len()];
        let (dq, rest) = dx.split_at_mut(lens[0]);
        let (dkv, dshared) = rest.split_at_mut(lens[1]);
        latent_rope_dx(&pool, h, &d, (&cos, &sin), (dq, dkv, dshared), seq);
        gradient(&dx, &x, 1e-4, &|x| dot(&packed(h, x, n, seq, (&cos, &sin)), &d));
    }
}
