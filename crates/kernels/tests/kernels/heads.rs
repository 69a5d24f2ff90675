//! Heads dealt to ranks and back, and attention over whole sequences with a share of them: the bits of all at once.

use half::bf16;
use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

fn kv_ld(s: &Attention) -> usize {
    s.kv_heads * (s.head_dim + s.value_dim)
}

fn ld(s: &Attention) -> usize {
    s.heads * s.head_dim + kv_ld(s)
}

/// The rows that rank `rank` of `cp` holds, of each sequence a run: `cols` elements each.
fn held<T: Copy>(x: &[T], s: &Attention, cols: usize, cp: usize, rank: usize) -> Vec<T> {
    let run = s.seq / cp * cols;
    (0..s.seqs).flat_map(|i| &x[i * s.seq * cols + rank * run..][..run]).copied().collect()
}

/// What every rank has when each has sent every other one its part of each sequence.
fn exchanged<T: Copy>(all: &[Vec<T>], seqs: usize) -> Vec<Vec<T>> {
    let (cp, part) = (all.len(), all[0].len() / seqs / all.len());
    let of = |rank: usize| {
        let runs = (0..seqs).flat_map(|s| (0..cp).map(move |from| (s, from)));
        runs.flat_map(|(s, from)| &all[from][(s * cp + rank) * part..][..part]).copied().collect()
    };
    (0..cp).map(of).collect()
}

fn split<T: Storage>(pool: &Pool, s: &Attention, cp: usize, own: usize, held: &[T]) -> Vec<T> {
    let mut parts = vec![T::default(); cp * s.seqs * s.seq * own];
    split_heads(pool, s, cp, held, &mut parts);
    parts
}

/// Output and gradient of packed qkv, by ranks that each see whole sequences with their share of the heads.
fn by_heads<T: Storage>(
    pool: &Pool,
    whole: &Attention,
    sees: Sees<'_, T>,
    (qkv, d): (&[T], &[T]),
    cp: usize,
) -> Vec<(Vec<T>, Vec<T>)> {
    let held_rows = Attention { seq: whole.seq / cp, ..*whole };
    let out = Attention { kv_heads: 0, head_dim: whole.value_dim, value_dim: 0, ..held_rows };
    let own = Attention { heads: whole.heads / cp, kv_heads: whole.kv_heads.div_ceil(cp), ..*whole };
    let o_cols = whole.heads * whole.value_dim;
    let parts = |x: &[T], shape: &Attention, cols: usize, own: usize| -> Vec<Vec<T>> {
        let split = |rank| split(pool, shape, cp, own, &held(x, whole, cols, cp, rank));
        exchanged(&(0..cp).map(split).collect::<Vec<_>>(), whole.seqs)
    };
    let qkv = parts(qkv, &held_rows, ld(whole), ld(&own));
    let d = parts(d, &out, o_cols, o_cols / cp);
    let mut ws = scratch(attention_workspace_len(&own, 2).max(attention_dx_workspace_len(&own, 2)));
    let (mut os, mut dqkvs) = (Vec::new(), Vec::new());
    for (rank, (qkv, d)) in qkv.iter().zip(&d).enumerate() {
        let (mut o, mut lse) = (vec![T::default(); d.len()], vec![0.0; whole.seqs * whole.seq * own.heads]);
        let mut dqkv = vec![T::default(); qkv.len()];
        let sinks = sees.sinks.map(|s| &s[rank * own.heads..][..own.heads]);
        let dropout = sees.dropout.map(|d| AttentionDropout { head: rank * own.heads, ..d });
        let sees = Sees { sinks, dropout, ..sees };
        attention(pool, &own, qkv, sees, &mut o, &mut lse, &mut ws);
        attention_dx(pool, &own, qkv, Sees { sinks: None, ..sees }, &o, &lse, d, &mut dqkv, &mut ws);
        os.push(o);
        dqkvs.push(dqkv);
    }
    let (os, dqkvs) = (exchanged(&os, whole.seqs), exchanged(&dqkvs, whole.seqs));
    let rows = held_rows.seqs * held_rows.seq;
    let join = |(o, dqkv): (&Vec<T>, &Vec<T>)| {
        let (mut o_rows, mut d_rows) =
            (vec![T::default(); rows * o_cols], vec![T::default(); rows * ld(whole)]);
        join_heads(pool, &out, cp, o, &mut o_rows);
        join_heads(pool, &held_rows, cp, dqkv, &mut d_rows);
        (o_rows, d_rows)
    };
    os.iter().zip(&dqkvs).map(join).collect()
}

fn check<T: Storage + PartialEq + std::fmt::Debug>(
    s: Attention,
    cp: usize,
    seed: u64,
    of: fn(f32) -> T,
    one: fn(T) -> f32,
) {
    let pool = Pool::new(2);
    let mut r = Numbers::new(seed);
    let mut vec = |n: usize| r.vec(n).into_iter().map(of).collect::<Vec<T>>();
    let n = s.seqs * s.seq;
    let (qkv, d, sinks) = (vec(n * ld(&s)), vec(n * s.heads * s.value_dim), vec(s.heads));
    let starts: Vec<u32> = (0..n).map(|row| (row % s.seq / 5 * 5) as u32).collect();
    let dropout = Some(AttentionDropout { of: Dropout { key: 5, rate: 0.25 }, sequence: 3, head: 0 });
    let sees = Sees { window: Some(4), starts: Some(&starts), sinks: Some(&sinks), dropout };
    for sees in [Sees::ALL, sees] {
        let (mut o, mut lse) = (vec![T::default(); d.len()], vec![0.0; n * s.heads]);
        let mut dqkv = vec![T::default(); qkv.len()];
        let mut ws = scratch(attention_workspace_len(&s, 2).max(attention_dx_workspace_len(&s, 2)));
        attention(&pool, &s, &qkv, sees, &mut o, &mut lse, &mut ws);
        attention_dx(&pool, &s, &qkv, Sees { sinks: None, ..sees }, &o, &lse, &d, &mut dqkv, &mut ws);
        let queries = s.heads * s.head_dim;
        for (rank, (found_o, found_d)) in by_heads(&pool, &s, sees, (&qkv, &d), cp).into_iter().enumerate() {
            assert_eq!(found_o, held(&o, &s, s.heads * s.value_dim, cp, rank), "output of rank {rank}");
            let expected = held(&dqkv, &s, ld(&s), cp, rank);
            // Of heads with copies the sum over queries is taken in another order.
            let exact = if s.kv_heads.is_multiple_of(cp) { ld(&s) } else { queries };
            for (found, expected) in found_d.chunks(ld(&s)).zip(expected.chunks(ld(&s))) {
                assert_eq!(found[..exact], expected[..exact], "gradient of rank {rank}");
                for (f, e) in found.iter().zip(expected) {
                    let (f, e) = (one(*f), one(*e));
                    assert!((f - e).abs() <= 0.03 * e.abs() + 0.03, "{f} for {e}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_with_a_share_of_the_heads_has_the_bits_of_all_at_once(
        seqs in 1usize..3, piece in 1usize..9, cp in 1usize..5, kv in 1usize..3, group in 1usize..3,
        copied: bool, head_dim in 1usize..21, value_dim in 1usize..21, seed: u64,
    ) {
        // Each rank has `kv` key and value heads, or a copy of one of so many.
        let (kv_heads, heads) = if copied && cp.is_multiple_of(kv) { (kv, cp * group) } else { (kv * cp, kv * cp * group) };
        let s = Attention { seqs, seq: cp * piece, heads, kv_heads, head_dim, value_dim, scale: 0.4 };
        check::<f32>(s, cp, seed, |x| x, |x| x);
        check::<bf16>(s, cp, seed, bf16::from_f32, bf16::to_f32);
    }
}

/// Each rank's part holds its heads, worked out by hand: two key heads over four ranks, of which two have each.
#[test]
fn a_part_holds_the_heads_of_its_rank() {
    let s = Attention { seqs: 1, seq: 1, heads: 4, kv_heads: 2, head_dim: 1, value_dim: 2, scale: 1.0 };
    let pool = Pool::new(1);
    // Queries 1 to 4, keys 5 and 6, values 7 8 and 9 10.
    let row: Vec<f32> = (1..=10).map(|x| x as f32).collect();
    let mut parts = vec![0.0; 4 * 4];
    split_heads(&pool, &s, 4, &row, &mut parts);
    let expected = [[1.0, 5.0, 7.0, 8.0], [2.0, 5.0, 7.0, 8.0], [3.0, 6.0, 9.0, 10.0], [4.0, 6.0, 9.0, 10.0]];
    assert_eq!(parts, expected.concat());
    let mut back = vec![0.0; 10];
    join_heads(&pool, &s, 4, &parts, &mut back);
    assert_eq!(back, [1.0, 2.0, 3.0, 4.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0]);
}
