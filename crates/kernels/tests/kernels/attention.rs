use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) seqs: usize,
    pub(crate) seq: usize,
    pub(crate) heads: usize,
    pub(crate) kv: usize,
    pub(crate) h: usize,
}

impl Shape {
    pub(crate) fn ld(self) -> usize {
        (self.heads + 2 * self.kv) * self.h
    }
    pub(crate) fn qkv_len(self) -> usize {
        self.seqs * self.seq * self.ld()
    }
    pub(crate) fn o_len(self) -> usize {
        self.seqs * self.seq * self.heads * self.h
    }
    pub(crate) fn lse_len(self) -> usize {
        self.seqs * self.seq * self.heads
    }
}

/// The shape as kernels take it: heads whose values are as wide as their keys.
fn plain(s: Shape, scale: f32) -> Attention {
    let Shape { seqs, seq, heads, kv, h } = s;
    Attention { seqs, seq, heads, kv_heads: kv, head_dim: h, value_dim: h, scale }
}

pub(crate) fn forward<T: Storage>(pool: &Pool, s: Shape, qkv: &[T], scale: f32) -> (Vec<T>, Vec<f32>) {
    let (mut o, mut lse) = (vec![T::default(); s.o_len()], vec![0.0; s.lse_len()]);
    let shape = plain(s, scale);
    let mut ws = scratch(attention_workspace_len(&shape, pool.threads()));
    attention(pool, &shape, qkv, Sees::ALL, &mut o, &mut lse, &mut ws);
    (o, lse)
}

pub(crate) fn backward<T: Storage>(
    pool: &Pool,
    s: Shape,
    qkv: &[T],
    o: &[T],
    lse: &[f32],
    d: &[T],
    scale: f32,
) -> Vec<T> {
    let mut dqkv = vec![T::default(); s.qkv_len()];
    let shape = plain(s, scale);
    let mut ws = scratch(attention_dx_workspace_len(&shape, pool.threads()));
    attention_dx(pool, &shape, qkv, Sees::ALL, o, lse, d, &mut dqkv, &mut ws);
    dqkv
}

fn reference(s: Shape, qkv: &[f64], scale: f64) -> Vec<f64> {
    let mut o = vec![0.0; s.o_len()];
    for row in 0..s.seqs * s.seq {
        for head in 0..s.heads {
            let kv = head / (s.heads / s.kv);
            let q = &qkv[row * s.ld() + head * s.h..][..s.h];
            let first = row / s.seq * s.seq;
            let key = |r: usize| &qkv[r * s.ld() + (s.heads + kv) * s.h..][..s.h];
            let value = |r: usize| &qkv[r * s.ld() + (s.heads + s.kv + kv) * s.h..][..s.h];
            let scores: Vec<f64> = (first..=row)
                .map(|r| scale * q.iter().zip(key(r)).map(|(q, k)| q * k).sum::<f64>())
                .collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|x| (x - max).exp()).sum();
            for (r, score) in (first..=row).zip(scores) {
                let p = (score - max).exp() / total;
                for j in 0..s.h {
                    o[(row * s.heads + head) * s.h + j] += p * value(r)[j];
                }
            }
        }
    }
    o
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 16 }))]

    #[test]
    fn against_the_definition(
        seqs in 1usize..3, seq in 1usize..14, kv in 1usize..3, group in 1usize..3, h in 1usize..9, seed: u64
    ) {
        let s = Shape { seqs, seq, heads: kv * group, kv, h };
        let mut r = Numbers::new(seed);
        let (qkv, d) = (r.vec(s.qkv_len()), r.vec(s.o_len()));
        let pool = pool();
        let (o, lse) = forward(&pool, s, &qkv, 0.7);
        close(&o, &reference(s, &wide(&qkv), 0.7), 1e-5);
        let dqkv = backward(&pool, s, &qkv, &o, &lse, &d, 0.7);
        gradient(&dqkv, &qkv, 1e-4, &|qkv| dot(&reference(s, qkv, 0.7), &d));
    }
}

/// Lengths beyond a group of queries, a panel, a block of keys and a task's chunk; heads wider than a panel.
#[test]
fn across_blocks() {
    for (seq, heads, kv, h) in [(65, 2, 1, 70), (130, 1, 1, 33), (300, 2, 1, 16), (600, 1, 1, 5)] {
        let s = Shape { seqs: 1, seq, heads, kv, h };
        let mut r = Numbers::new(seq as u64);
        let (qkv, d) = (r.vec(s.qkv_len()), r.vec(s.o_len()));
        let pool = pool();
        let (o, lse) = forward(&pool, s, &qkv, 0.4);
        close(&o, &reference(s, &wide(&qkv), 0.4), 1e-5);
        let dqkv = backward(&pool, s, &qkv, &o, &lse, &d, 0.4);
        // A random direction in place of each coordinate.
        let direction = r.vec(s.qkv_len());
        let slope: f64 = dqkv.iter().zip(&direction).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        let moved = |t: f64| -> f64 {
            let x: Vec<f64> =
                qkv.iter().zip(&direction).map(|(&x, &e)| f64::from(x) + t * f64::from(e)).collect();
            dot(&reference(s, &x, 0.4), &d)
        };
        let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        let size = dqkv.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        assert!((slope - want).abs() < 1e-5 * size.max(1.0), "{s:?}: {slope} {want}");
    }
}

#[test]
fn large_scores_are_finite_and_sharp() {
    let s = Shape { seqs: 1, seq: 300, heads: 1, kv: 1, h: 16 };
    let qkv: Vec<f32> = Numbers::new(5).vec(s.qkv_len()).iter().map(|x| 100.0 * x).collect();
    let pool = pool();
    let (o, lse) = forward(&pool, s, &qkv, 1.0);
    assert!(o.iter().chain(&lse).all(|x| x.is_finite()));
    let dqkv = backward(&pool, s, &qkv, &o, &lse, &vec![1.0; s.o_len()], 1.0);
    assert!(dqkv.iter().all(|x| x.is_finite()));
    assert_eq!(o[..16], qkv[32..48]);
}

#[test]
fn bf16_is_close_to_f32() {
    let s = Shape { seqs: 2, seq: 70, heads: 2, kv: 1, h: 24 };
    let mut r = Numbers::new(6);
    let round = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (qkv, d) = (round(&r.vec(s.qkv_len())), round(&r.vec(s.o_len())));
    let pool = pool();
    let (o, lse) = forward(&pool, s, &qkv, 0.2);
    let (o32, lse32) = forward(&pool, s, &widen(&qkv), 0.2);
    assert_eq!((&o, bits(&lse)), (&round(&o32), bits(&lse32)));
    let dqkv = backward(&pool, s, &qkv, &o, &lse, &d, 0.2);
    let d32 = backward(&pool, s, &widen(&qkv), &widen(&o), &lse, &widen(&d), 0.2);
    assert_eq!(dqkv, round(&d32));
}

#[test]
fn decoding_continues_a_sequence() {
    let s = Shape { seqs: 2, seq: 37, heads: 4, kv: 2, h: 20 };
    let qkv = Numbers::new(8).vec(s.qkv_len());
    let pool = pool();
    let (o, _) = forward(&pool, s, &qkv, 0.3);
    let capacity = 50;
    let width = s.kv * s.h;
    let (mut k, mut v) = (vec![f32::NAN; 2 * capacity * width], vec![f32::NAN; 2 * capacity * width]);
    let mut lens = [37, 20];
    for i in 0..2 {
        for t in 0..lens[i] {
            let row = &qkv[(i * s.seq + t) * s.ld()..][..s.ld()];
            let at = (i * capacity + t) * width;
            k[at..at + width].copy_from_slice(&row[s.heads * s.h..][..width]);
            v[at..at + width].copy_from_slice(&row[s.heads * s.h + width..]);
        }
    }
    let q: Vec<f32> =
        (0..2).flat_map(|i| qkv[(i * s.seq + lens[i] - 1) * s.ld()..][..s.heads * s.h].to_vec()).collect();
    let mut got = vec![0.0; 2 * s.heads * s.h];
    let mut ws = scratch(attention_decode_workspace_len(capacity, s.h, 2));
    let mut decode = |lens: &[usize], sees: Sees<'_, f32>, got: &mut [f32]| {
        let ld = s.heads * s.h;
        attention_decode(&pool, &q, ld, &k, &v, lens, sees, got, capacity, 4, 2, s.h, 0.3, &mut ws);
    };
    decode(&lens, Sees::ALL, &mut got);
    let row = |i: usize, t: usize| wide(&o[(i * s.seq + t) * s.heads * s.h..][..s.heads * s.h]);
    close(&got, &[row(0, 36), row(1, 19)].concat(), 1e-5);
    lens[0] = 1;
    decode(&lens, Sees::ALL, &mut got);
    close(&got[..s.h], &wide(&v[..s.h]), 1e-6);
    // A window of one key, and a sink that weighs as much.
    lens[0] = 37;
    decode(&lens, Sees { window: Some(1), ..Sees::ALL }, &mut got);
    let last = &v[36 * width..][..s.h];
    close(&got[..s.h], &wide(last), 1e-6);
    let score: f32 = (0..s.h).map(|j| 0.3 * q[j] * k[36 * width + j]).sum();
    decode(&lens, Sees { window: Some(1), sinks: Some(&[score; 4]), ..Sees::ALL }, &mut got);
    close(&got[..s.h], &last.iter().map(|x| f64::from(x / 2.0)).collect::<Vec<_>>(), 1e-5);
}
