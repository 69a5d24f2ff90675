//! Attention part by part against attention at once, and heads whose values are narrower than their keys.

use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

fn ld(s: &Attention) -> usize {
    s.heads * s.head_dim + kv_ld(s)
}

fn kv_ld(s: &Attention) -> usize {
    s.kv_heads * (s.head_dim + s.value_dim)
}

fn rows(s: &Attention) -> usize {
    s.seqs * s.seq
}

struct Whole<T> {
    o: Vec<T>,
    lse: Vec<f32>,
    dqkv: Vec<T>,
}

fn whole<T: Storage>(pool: &Pool, s: &Attention, sees: Sees<'_, T>, qkv: &[T], d: &[T]) -> Whole<T> {
    let (mut o, mut lse) =
        (vec![T::default(); rows(s) * s.heads * s.value_dim], vec![0.0; rows(s) * s.heads]);
    let mut dqkv = vec![T::default(); qkv.len()];
    let mut ws = scratch(attention_workspace_len(s, 2).max(attention_dx_workspace_len(s, 2)));
    attention(pool, s, qkv, sees, &mut o, &mut lse, &mut ws);
    attention_dx(pool, s, qkv, sees, &o, &lse, d, &mut dqkv, &mut ws);
    Whole { o, lse, dqkv }
}

/// The rows of each rank of a ring: of each sequence one piece from the front and its mirror from the back.
fn dealt<T: Copy>(x: &[T], (seqs, seq, cols): (usize, usize, usize), cp: usize) -> Vec<Vec<T>> {
    let piece = seq / (2 * cp) * cols;
    let of = |rank: usize| {
        let pieces = (0..seqs).flat_map(|s| [rank, 2 * cp - 1 - rank].map(|p| s * seq * cols + p * piece));
        pieces.flat_map(|at| x[at..at + piece].iter().copied()).collect()
    };
    (0..cp).map(of).collect()
}

/// Outputs, logarithms and the gradient of queries of a rank whose keys' gradients are still on their way.
type Left<T> = (Vec<T>, Vec<f32>, Vec<f32>);

/// Every rank of a ring, one after another.
fn ring<T: Storage>(
    pool: &Pool,
    s: &Attention,
    sees: Sees<'_, T>,
    qkv: &[T],
    d: &[T],
    cp: usize,
) -> Vec<Whole<T>> {
    let part = Attention { seq: s.seq / cp, ..*s };
    let qkv = dealt(qkv, (s.seqs, s.seq, ld(s)), cp);
    let d = dealt(d, (s.seqs, s.seq, s.heads * s.value_dim), cp);
    let n = rows(&part);
    let starts = sees.starts.map(|starts| dealt(starts, (s.seqs, s.seq, 1), cp));
    let kv: Vec<Vec<T>> = qkv
        .iter()
        .map(|qkv| {
            let mut kv = vec![T::default(); n * kv_ld(s)];
            pack_kv(pool, &part, qkv, &mut kv);
            kv
        })
        .collect();
    let mut ws = scratch(attention_workspace_len(&part, 2).max(attention_dx_workspace_len(&part, 2)));
    let mut gradients = vec![vec![0.0; n * kv_ld(s)]; cp];
    let mut left = Vec::new();
    for me in 0..cp {
        let (mut sums, mut lse) = (scratch(n * s.heads * s.value_dim), scratch(n * s.heads));
        let (mut total, mut o) = (scratch(n * s.heads), vec![T::default(); n * s.heads * s.value_dim]);
        let mut softmax = Softmax { sums: &mut sums, max: &mut lse, total: &mut total };
        let sees = Sees { starts: starts.as_ref().map(|s| &s[me][..]), ..sees };
        let others = (0..cp).map(|hop| (Sight::after(hop, me, cp), (me + cp - hop) % cp));
        for (sight, of) in others.clone() {
            attention_part(pool, &part, &qkv[me], &kv[of], sees, sight, &mut softmax, &mut ws);
        }
        attention_parts(pool, &part, &mut softmax, &mut o);
        let mut dq = scratch(n * s.heads * s.head_dim);
        for (sight, of) in others {
            let mut dkv = scratch(n * kv_ld(s));
            let (keys, out) = ((&qkv[me][..], &kv[of][..]), (&o[..], &lse[..], &d[me][..]));
            let grads = (&mut dq[..], &mut dkv[..]);
            attention_part_dx(pool, &part, keys, out, sees, sight, grads, &mut ws);
            add_to(pool, &dkv, &mut gradients[of]);
        }
        left.push((o, lse, dq));
    }
    let end = |((o, lse, dq), dkv): (Left<T>, &Vec<f32>)| {
        let mut dqkv = vec![T::default(); n * ld(s)];
        attention_parts_dx(pool, &part, &dq, dkv, &mut dqkv);
        Whole { o, lse, dqkv }
    };
    left.into_iter().zip(&gradients).map(end).collect()
}

fn check(s: Attention, sees: Sees<'_, f32>, cp: usize, seed: u64) {
    let mut r = Numbers::new(seed);
    let (qkv, d) = (r.vec(rows(&s) * ld(&s)), r.vec(rows(&s) * s.heads * s.value_dim));
    let pool = pool();
    let all = whole(&pool, &s, sees, &qkv, &d);
    let o = dealt(&all.o, (s.seqs, s.seq, s.heads * s.value_dim), cp);
    let dqkv = dealt(&all.dqkv, (s.seqs, s.seq, ld(&s)), cp);
    let lse = dealt(&all.lse, (s.seqs * s.heads, s.seq, 1), cp);
    for (rank, got) in ring(&pool, &s, sees, &qkv, &d, cp).iter().enumerate() {
        close(&got.o, &wide(&o[rank]), 1e-5);
        close(&got.lse, &wide(&lse[rank]), 1e-5);
        close(&got.dqkv, &wide(&dqkv[rank]), 2e-5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 24 }))]

    #[test]
    fn parts_make_the_whole(
        seqs in 1usize..3, piece in 1usize..40, cp in 1usize..5, kv in 1usize..3, group in 1usize..3,
        h in 1usize..20, v in 1usize..20, seed: u64
    ) {
        let (seq, heads) = (2 * cp * piece, kv * group);
        check(Attention { seqs, seq, heads, kv_heads: kv, head_dim: h, value_dim: v, scale: 0.4 }, Sees::ALL, cp, seed);
    }
}

/// Windows, documents and sinks are those of whole sequences, also where a piece lies outside of all windows.
#[test]
fn parts_see_as_far_as_the_whole() {
    for (seq, cp, window) in [(2400, 2, 100), (240, 3, 1), (1200, 3, 500), (96, 4, 95)] {
        let s = Attention { seqs: 2, seq, heads: 4, kv_heads: 2, head_dim: 16, value_dim: 8, scale: 0.4 };
        let sinks = [0.3, -1.0, 2.0, 0.0];
        let starts: Vec<u32> = (0..2 * seq).map(|i| (i % seq / 77 * 77) as u32).collect();
        let dropout = Some(AttentionDropout { of: Dropout { key: 5, rate: 0.25 }, sequence: 3, head: 2 });
        let sees = Sees { window: Some(window), starts: Some(&starts), sinks: Some(&sinks), dropout };
        check(s, sees, cp, seq as u64);
        check(s, Sees { starts: None, ..sees }, cp, seq as u64);
        check(s, Sees { window: None, ..sees }, cp, seq as u64);
    }
}

/// Pieces beyond a group of queries, a block of keys and a task's chunk.
#[test]
fn parts_across_blocks() {
    for (seq, cp, h, v) in [(2400, 2, 16, 16), (1200, 3, 70, 33)] {
        check(
            Attention { seqs: 1, seq, heads: 2, kv_heads: 1, head_dim: h, value_dim: v, scale: 0.3 },
            Sees::ALL,
            cp,
            3,
        );
    }
}

/// Values filled up with zeros to the width of keys: what is computed of the rest is the same.
#[test]
fn narrow_values_are_those_of_wide_ones() {
    let s = Attention { seqs: 2, seq: 70, heads: 4, kv_heads: 2, head_dim: 24, value_dim: 10, scale: 0.2 };
    let square = Attention { value_dim: 24, ..s };
    let mut r = Numbers::new(9);
    let (qkv, d) = (r.vec(rows(&s) * ld(&s)), r.vec(rows(&s) * s.heads * s.value_dim));
    let pad = |x: &[f32], heads: usize| -> Vec<f32> {
        assert_eq!(x.len() % (heads * 10), 0);
        x.chunks(10).flat_map(|head| head.iter().copied().chain(std::iter::repeat_n(0.0, 14))).collect()
    };
    let keys = ld(&s) - s.kv_heads * s.value_dim;
    let split = |row: &[f32]| [row[..keys].to_vec(), pad(&row[keys..], s.kv_heads)].concat();
    let padded: Vec<f32> = qkv.chunks(ld(&s)).flat_map(split).collect();
    let pool = pool();
    let got = whole(&pool, &s, Sees::ALL, &qkv, &d);
    let want = whole(&pool, &square, Sees::ALL, &padded, &pad(&d, s.heads));
    close(&pad(&got.o, s.heads), &wide(&want.o), 1e-6);
    close(&got.lse, &wide(&want.lse), 1e-6);
    let left: Vec<f32> = want
        .dqkv
        .chunks(ld(&square))
        .flat_map(|row| {
            [row[..keys].to_vec(), row[keys..].chunks(24).flat_map(|v| v[..10].to_vec()).collect()]
        })
        .flatten()
        .collect();
    close(&got.dqkv, &wide(&left), 1e-5);
}

#[test]
fn parts_in_bf16_round_once() {
    let s = Attention { seqs: 1, seq: 80, heads: 2, kv_heads: 1, head_dim: 24, value_dim: 24, scale: 0.2 };
    let mut r = Numbers::new(6);
    let round = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let widen = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (qkv, d) = (round(&r.vec(rows(&s) * ld(&s))), round(&r.vec(rows(&s) * s.heads * s.value_dim)));
    let pool = pool();
    let narrow = ring(&pool, &s, Sees::ALL, &qkv, &d, 2);
    let exact = ring(&pool, &s, Sees::ALL, &widen(&qkv), &widen(&d), 2);
    for (a, b) in narrow.iter().zip(&exact) {
        assert_eq!((&a.o, bits(&a.lse)), (&round(&b.o), bits(&b.lse)));
        // The derivative begins with rounded outputs.
        let size = b.dqkv.iter().fold(1.0f32, |m, x| m.max(x.abs()));
        assert!(widen(&a.dqkv).iter().zip(&b.dqkv).all(|(a, b)| (a - b).abs() < 0.01 * size));
    }
}
