//! Times each op of the reference step (6 layers, width 384, 6 heads, SwiGLU 1024, vocabulary 4096, sequence 256,
//! batch 8): best milliseconds and GFLOP/s at 1 and 2 threads, beside the `gemm` crate for the matrix products.
//!
//! `cargo run --release -p phalanx-kernels --example ops [FILTER [avx2]]`

use std::time::Instant;

use kernels::*;

const ROWS: usize = 2048;
const DIM: usize = 384;
const HEADS: usize = 6;
const HEAD_DIM: usize = 64;
const HIDDEN: usize = 1024;
const VOCAB: usize = 4096;
const SEQ: usize = 256;
const SEQS: usize = 8;
const TREE: [u32; 3] = [2, 2, 2];
const SET: Merge = Merge { merge: 0, store: 0 };

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    if std::env::args().nth(2).is_some_and(|simd| simd == "avx2") {
        assert!(force_backend(Backend::Avx2), "this processor has no AVX2");
    }
    let pools = [Pool::new(1), Pool::new(2)];
    for pool in &pools {
        let threads = pool.threads();
        let (fma, gemm) = (fma_peak_gflops(pool), gemm_peak_gflops(pool));
        println!("{threads} thread(s): registers {fma:.0} GFLOP/s, best product {gemm:.0} GFLOP/s");
    }
    println!("{:16} {:>9} {:>9}   {:>9} {:>9}", "op", "1t ms", "GFLOP/s", "2t ms", "GFLOP/s");
    let bench = Bench { pools, filter };
    bench.products();
    bench.attention();
    bench.rows();
    bench.muon();
}

struct Bench {
    pools: [Pool; 2],
    filter: String,
}

fn numbers(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

/// The least milliseconds of several calls that take about a third of a second together.
fn best(f: &mut dyn FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    let begin = Instant::now();
    let mut calls = 0;
    while calls < 5 || begin.elapsed().as_millis() < 300 {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
        calls += 1;
    }
    best
}

impl Bench {
    fn line(&self, name: &str, flops: f64, f: &mut dyn FnMut(&Pool)) {
        if !name.contains(&self.filter) {
            return;
        }
        print!("{name:16}");
        for pool in &self.pools {
            let ms = best(&mut || f(pool));
            print!(" {ms:9.3} {:9.1}  ", flops / ms / 1e6);
        }
        println!();
    }

    fn products(&self) {
        for (name, n, k, m) in [
            ("qkv", ROWS, DIM, 3 * DIM),
            ("o", ROWS, DIM, DIM),
            ("gate_up", ROWS, DIM, 2 * HIDDEN),
            ("down", ROWS, HIDDEN, DIM),
            ("head", SEQ, DIM, VOCAB),
            ("head all", ROWS, DIM, VOCAB),
        ] {
            let flops = 2.0 * (n * k * m) as f64;
            let tree = if n == ROWS { &TREE[..] } else { &[] };
            let (x, w, dy) = (numbers(n * k), numbers(m * k), numbers(n * m));
            let (mut y, mut dx, mut dw) = (vec![0.0; n * m], vec![0.0; n * k], vec![0.0; m * k]);
            let mut ws = vec![
                0.0;
                linear_workspace_len(n, k, m, 2)
                    .max(linear_dx_workspace_len(n, k, m, 2))
                    .max(linear_dw_workspace_len(n, k, m, tree, 2))
            ];
            self.line(&format!("{name} f"), flops, &mut |pool| {
                linear(pool, &x, &w, None, Acc::None, &mut y, n, k, m, &mut ws);
            });
            self.line(&format!("{name} f crate"), flops, &mut |pool| {
                crate_product(pool, n, m, k, (&mut y, m, 1), (&x, k, 1), (&w, 1, k));
            });
            self.line(&format!("{name} dx"), flops, &mut |pool| {
                linear_dx(pool, &dy, &w, Acc::None, &mut dx, n, k, m, &mut ws);
            });
            self.line(&format!("{name} dx crate"), flops, &mut |pool| {
                crate_product(pool, n, k, m, (&mut dx, k, 1), (&dy, m, 1), (&w, k, 1));
            });
            self.line(&format!("{name} dw"), flops, &mut |pool| {
                linear_dw(pool, &dy, &x, &mut dw, n, k, m, tree, SET, &mut ws);
            });
            self.line(&format!("{name} dw crate"), flops, &mut |pool| {
                crate_product(pool, m, k, n, (&mut dw, k, 1), (&dy, 1, m), (&x, k, 1));
            });
        }
    }

    fn attention(&self) {
        let (ld, scale) = (3 * DIM, 0.125);
        let qkv = numbers(ROWS * ld);
        let (mut o, mut lse) = (vec![0.0; ROWS * DIM], vec![0.0; ROWS * HEADS]);
        let d = numbers(ROWS * DIM);
        let mut dqkv = vec![0.0; ROWS * ld];
        let (heads, head_dim) = (HEADS, HEAD_DIM);
        let shape =
            Attention { seqs: SEQS, seq: SEQ, heads, kv_heads: heads, head_dim, value_dim: head_dim, scale };
        let len = attention_workspace_len(&shape, 2).max(attention_dx_workspace_len(&shape, 2));
        let mut ws = vec![0.0; len];
        // Two products of half a square forward, five backward.
        let square = 2.0 * (SEQS * HEADS * SEQ * SEQ * HEAD_DIM) as f64 / 2.0;
        self.line("attention f", 2.0 * square, &mut |pool| {
            attention(pool, &shape, &qkv, Sees::ALL, &mut o, &mut lse, &mut ws);
        });
        let near = Sees { window: Some(SEQ / 8), ..Sees::ALL };
        self.line("attention f, windows of an eighth", 2.0 * square, &mut |pool| {
            attention(pool, &shape, &qkv, near, &mut o, &mut lse, &mut ws);
        });
        self.line("attention dx, windows of an eighth", 5.0 * square, &mut |pool| {
            attention_dx(pool, &shape, &qkv, near, &o, &lse, &d, &mut dqkv, &mut ws);
        });
        let of = Dropout { key: 1, rate: 0.1 };
        let some = Sees { dropout: Some(AttentionDropout { of, sequence: 0, head: 0 }), ..Sees::ALL };
        self.line("attention f, a tenth left out", 2.0 * square, &mut |pool| {
            attention(pool, &shape, &qkv, some, &mut o, &mut lse, &mut ws);
        });
        self.line("attention dx, a tenth left out", 5.0 * square, &mut |pool| {
            attention_dx(pool, &shape, &qkv, some, &o, &lse, &d, &mut dqkv, &mut ws);
        });
        self.line("attention dx", 5.0 * square, &mut |pool| {
            attention_dx(pool, &shape, &qkv, Sees::ALL, &o, &lse, &d, &mut dqkv, &mut ws);
        });
        let (cos, sin) = (numbers(SEQ * 32), numbers(SEQ * 32));
        self.line("rope", 0.0, &mut |pool| {
            rope(pool, &mut dqkv, &cos, &sin, ROWS, SEQ, HEADS, HEADS, HEAD_DIM, 0, false);
        });
    }

    /// Muon's iterations on the matrices of a layer, FLOPs as `program::newton_schulz_flops` counts them.
    fn muon(&self) {
        for (rows, cols) in [(DIM, DIM), (HEAD_DIM, DIM), (HIDDEN, DIM), (DIM, HIDDEN)] {
            let (m, n) = (rows.min(cols) as f64, rows.max(cols) as f64);
            let mut x = numbers(rows * cols);
            let mut ws = vec![0.0; orthogonalise_workspace_len(rows, cols, 2)];
            self.line(&format!("muon {rows}x{cols}"), m * m * (3.0 * n + 9.0 * m), &mut |pool| {
                orthogonalise(pool, &mut x, (rows, cols), 1.0, &mut ws);
            });
        }
    }

    fn rows(&self) {
        let (x, w, dy) = (numbers(ROWS * DIM), numbers(DIM), numbers(ROWS * DIM));
        let (mut y, mut rstd, mut dw) = (vec![0.0; ROWS * DIM], vec![0.0; ROWS], vec![0.0; DIM]);
        let mut ws = vec![0.0; 1 << 20];
        self.line("rms f", 0.0, &mut |pool| rms_norm(pool, &x, &w, &mut y, &mut rstd, ROWS, DIM, 1e-5));
        self.line("rms dx", 0.0, &mut |pool| {
            rms_norm_dx(pool, &dy, &x, &w, &rstd, Acc::InPlace, &mut y, ROWS, DIM);
        });
        self.line("rms dw", 0.0, &mut |pool| {
            rms_norm_dw(pool, &dy, &x, &rstd, &mut dw, ROWS, DIM, &TREE, SET, &mut ws);
        });
        let (gu, mut h) = (numbers(ROWS * 2 * HIDDEN), vec![0.0; ROWS * HIDDEN]);
        let mut dgu = gu.clone();
        self.line("swiglu f", 0.0, &mut |pool| glu(pool, Glu::Silu, &gu, &mut h, ROWS, HIDDEN));
        self.line("swiglu dx", 0.0, &mut |pool| glu_dx(pool, Glu::Silu, &h, &gu, &mut dgu, ROWS, HIDDEN));
        let logits = numbers(SEQ * VOCAB);
        let mut work = logits.clone();
        let tokens: Vec<u32> = (0..ROWS as u32).map(|i| i * 7919 % VOCAB as u32).collect();
        let mut loss = vec![0.0; SEQ];
        self.line("xent", 0.0, &mut |pool| {
            work.copy_from_slice(&logits);
            xent_fused(pool, &mut work, &tokens[..SEQ], LossTerms::plain(1e-3), &mut loss, SEQ, VOCAB);
        });
        let table = numbers(VOCAB * DIM);
        let mut grad = vec![0.0; VOCAB * DIM];
        self.line("embed f", 0.0, &mut |pool| {
            embed(pool, &tokens, &table, 0, None, Places::whole(SEQ), &mut y, DIM)
        });
        self.line("embed dw", 0.0, &mut |pool| {
            embed_grad(pool, &tokens, 0, VOCAB, &dy, &mut grad, DIM, &TREE, SET, &mut ws);
        });
        let len = 13_800_000;
        let (mut w, mut m, mut v, g) = (numbers(len), vec![0.0; len], vec![0.0; len], numbers(len));
        let step = AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 1,
            grad_scale: 1.0,
        };
        self.line("adamw", 0.0, &mut |pool| adamw(pool, &step, &mut w, &mut m, &mut v, &g));
        let mut partials = vec![0.0; len.div_ceil(1 << 16)];
        self.line("sum_squares", 0.0, &mut |pool| sum_squares(pool, &g, &mut partials, 1 << 16));
    }
}

/// c = a b by the `gemm` crate; operands are (slice, row stride, column stride).
fn crate_product(
    pool: &Pool,
    rows: usize,
    cols: usize,
    k: usize,
    c: (&mut [f32], usize, usize),
    a: (&[f32], usize, usize),
    b: (&[f32], usize, usize),
) {
    let parallelism = match pool.threads() {
        1 => gemm_common::Parallelism::None,
        n => gemm_common::Parallelism::Rayon(n),
    };
    let s = |stride: usize| stride as isize;
    // SAFETY: the slices hold matrices of these shapes and strides.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            rows,
            cols,
            k,
            c.0.as_mut_ptr(),
            s(c.2),
            s(c.1),
            false,
            a.0.as_ptr(),
            s(a.2),
            s(a.1),
            b.0.as_ptr(),
            s(b.2),
            s(b.1),
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}
