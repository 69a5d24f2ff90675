//! Attention over windows, inside documents and with sinks, against the definition in double precision.

use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

/// A [`Sees`] that owns what it points to.
#[derive(Clone, Debug, Default)]
struct Seen {
    window: Option<usize>,
    starts: Option<Vec<u32>>,
    sinks: Option<Vec<f32>>,
    dropout: Option<AttentionDropout>,
}

impl Seen {
    fn sees(&self) -> Sees<'_, f32> {
        let (starts, sinks) = (self.starts.as_deref(), self.sinks.as_deref());
        Sees { window: self.window, starts, sinks, dropout: self.dropout }
    }
}

fn plain(seqs: usize, seq: usize, kv_heads: usize, group: usize, h: usize, v: usize) -> Attention {
    Attention { seqs, seq, heads: kv_heads * group, kv_heads, head_dim: h, value_dim: v, scale: 0.6 }
}

fn ld(s: &Attention) -> usize {
    s.heads * s.head_dim + s.kv_heads * (s.head_dim + s.value_dim)
}

fn reference(s: &Attention, seen: &Seen, qkv: &[f64], sinks: &[f64]) -> Vec<f64> {
    let (ld, h, v) = (ld(s), s.head_dim, s.value_dim);
    let mut o = vec![0.0; s.seqs * s.seq * s.heads * v];
    for row in 0..s.seqs * s.seq {
        let at = row % s.seq;
        let window = seen.window.map_or(0, |w| (at + 1).saturating_sub(w));
        let document = seen.starts.as_ref().map_or(0, |starts| starts[row] as usize);
        let first = row - at + window.max(document);
        for head in 0..s.heads {
            let kv = head / (s.heads / s.kv_heads);
            let q = &qkv[row * ld + head * h..][..h];
            let key = |r: usize| &qkv[r * ld + (s.heads + kv) * h..][..h];
            let value = |r: usize| &qkv[r * ld + (s.heads + s.kv_heads) * h + kv * v..][..v];
            let score = |r: usize| f64::from(s.scale) * q.iter().zip(key(r)).map(|(a, b)| a * b).sum::<f64>();
            let sink = sinks.get(head).map_or(0.0, |x| x.exp());
            let total = sink + (first..=row).map(|r| score(r).exp()).sum::<f64>();
            for r in first..=row {
                let at = |row: usize| row % s.seq;
                let kept = |d: &AttentionDropout| f64::from(d.factor(row / s.seq, head, at(row), at(r)));
                let p = score(r).exp() / total * seen.dropout.as_ref().map_or(1.0, kept);
                for j in 0..v {
                    o[(row * s.heads + head) * v + j] += p * value(r)[j];
                }
            }
        }
    }
    o
}

struct Found {
    o: Vec<f32>,
    dqkv: Vec<f32>,
    dsinks: Vec<f32>,
}

fn run(s: &Attention, seen: &Seen, qkv: &[f32], d: &[f32]) -> Found {
    let (pool, n) = (pool(), s.seqs * s.seq);
    let (mut o, mut lse, mut dqkv) = (scratch(d.len()), scratch(n * s.heads), scratch(qkv.len()));
    let mut ws = scratch(attention_workspace_len(s, 2).max(attention_dx_workspace_len(s, 2)));
    attention(&pool, s, qkv, seen.sees(), &mut o, &mut lse, &mut ws);
    attention_dx(&pool, s, qkv, seen.sees(), &o, &lse, d, &mut dqkv, &mut ws);
    let mut dsinks = vec![0.0; s.heads];
    if let Some(sinks) = &seen.sinks {
        let mut ws = scratch(attention_sinks_dw_workspace_len(s.heads, &[]));
        let one = Merge { merge: 0, store: 0 };
        attention_sinks_dw(&pool, s, (&o, &lse, d), (sinks, 0), &mut dsinks, &[], one, &mut ws);
    }
    Found { o, dqkv, dsinks }
}

/// Documents of random lengths.
fn documents(r: &mut Numbers, seqs: usize, seq: usize) -> Vec<u32> {
    let mut starts = Vec::new();
    for _ in 0..seqs {
        let mut begins = 0;
        for i in 0..seq {
            if r.below(5) == 0 {
                begins = i;
            }
            starts.push(begins as u32);
        }
    }
    starts
}

fn seen(r: &mut Numbers, s: &Attention, window: usize, documents_too: bool, sinks: bool) -> Seen {
    let of = Dropout { key: r.below(1 << 20) as u64, rate: 0.3 };
    let dropout = AttentionDropout { of, sequence: r.below(9), head: r.below(9) };
    Seen {
        dropout: (r.below(2) == 0).then_some(dropout),
        window: (window > 0).then_some(window),
        starts: documents_too.then(|| documents(r, s.seqs, s.seq)),
        sinks: sinks.then(|| r.vec(s.heads)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 32 }))]

    #[test]
    fn against_the_definition(
        seqs in 1usize..3, seq in 1usize..14, kv in 1usize..3, group in 1usize..3, h in 1usize..9, v in 1usize..9,
        window in 0usize..17, packed: bool, sinks: bool, seed: u64
    ) {
        let (s, mut r) = (plain(seqs, seq, kv, group, h, v), Numbers::new(seed));
        let seen = seen(&mut r, &s, window, packed, sinks);
        let (qkv, d) = (r.vec(seqs * seq * ld(&s)), r.vec(seqs * seq * s.heads * v));
        let found = run(&s, &seen, &qkv, &d);
        let own = seen.sinks.clone().unwrap_or_default();
        close(&found.o, &reference(&s, &seen, &wide(&qkv), &wide(&own)), 1e-5);
        gradient(&found.dqkv, &qkv, 1e-4, &|x| dot(&reference(&s, &seen, x, &wide(&own)), &d));
        gradient(&found.dsinks[..own.len()], &own, 1e-4, &|x| dot(&reference(&s, &seen, &wide(&qkv), x), &d));
    }
}

/// Windows beyond panels, blocks of keys and groups of queries, with and without what is left out being there.
#[test]
fn across_blocks() {
    for (seq, window) in [(600, 1), (600, 64), (600, 65), (700, 300), (1300, 257)] {
        for packed in [false, true] {
            let (s, mut r) = (plain(1, seq, 1, 2, 12, 20), Numbers::new((seq + window) as u64));
            let seen = seen(&mut r, &s, window, packed, true);
            let (qkv, d) = (r.vec(seq * ld(&s)), r.vec(seq * s.heads * 20));
            let found = run(&s, &seen, &qkv, &d);
            let sinks = wide(seen.sinks.as_ref().expect("sinks"));
            close(&found.o, &reference(&s, &seen, &wide(&qkv), &sinks), 1e-5);
            let direction = r.vec(qkv.len());
            let moved = |t: f64| {
                let step = |(&x, &e): (&f32, &f32)| f64::from(x) + t * f64::from(e);
                let x: Vec<f64> = qkv.iter().zip(&direction).map(step).collect();
                dot(&reference(&s, &seen, &x, &sinks), &d)
            };
            let slope = dot(&wide(&found.dqkv), &direction);
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let size = dot(&wide(&found.dqkv), &found.dqkv).sqrt();
            assert!((slope - want).abs() < 1e-5 * size.max(1.0), "{seq} {window}: {slope} {want}");
        }
    }
}

/// A window over everything, and one document, are no bounds: the same bits.
#[test]
fn bounds_that_bound_nothing_change_no_bit() {
    let (s, mut r) = (plain(2, 700, 2, 2, 24, 24), Numbers::new(3));
    let (qkv, d) = (r.vec(1400 * ld(&s)), r.vec(1400 * s.heads * 24));
    let all = run(&s, &Seen::default(), &qkv, &d);
    let wide = run(&s, &Seen { window: Some(700), starts: Some(vec![0; 1400]), ..Seen::default() }, &qkv, &d);
    assert_eq!((bits(&all.o), bits(&all.dqkv)), (bits(&wide.o), bits(&wide.dqkv)));
}

/// Documents of a packed sequence are what each of them is alone, whose blocks lie elsewhere.
#[test]
fn documents_are_alone() {
    let (s, mut r) = (plain(1, 500, 1, 2, 16, 16), Numbers::new(4));
    let (qkv, d) = (r.vec(500 * ld(&s)), r.vec(500 * s.heads * 16));
    let begins = [0usize, 3, 250, 251, 500];
    let starts: Vec<u32> = (0..500).map(|i| *begins.iter().rfind(|b| **b <= i).expect("0") as u32).collect();
    let packed = run(&s, &Seen { starts: Some(starts), ..Seen::default() }, &qkv, &d);
    for of in begins.windows(2) {
        let part = |x: &[f32]| x[of[0] * x.len() / 500..of[1] * x.len() / 500].to_vec();
        let alone = Attention { seq: of[1] - of[0], ..s };
        let found = run(&alone, &Seen::default(), &part(&qkv), &part(&d));
        close(&part(&packed.o), &wide(&found.o), 1e-6);
        close(&part(&packed.dqkv), &wide(&found.dqkv), 2e-6);
    }
}
