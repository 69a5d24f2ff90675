//! What this machine can do at best.

use std::time::{Duration, Instant};

use crate::linear::{linear, linear_workspace_len};
use crate::pool::Pool;
use crate::simd::kernel;
use crate::storage::Acc;

/// The best rate of this crate's matrix product on `pool`, in GFLOP/s, over a few shapes, in short bursts some time apart:
/// what else a machine does comes in bursts too. Takes about half a second and, as the only function here, reads a clock
/// and allocates.
pub fn gemm_peak_gflops(pool: &Pool) -> f64 {
    /// Rows, inner and columns: a square that fits the caches, and a typical layer.
    const SHAPES: [(usize, usize, usize); 2] = [(1536, 384, 1152), (768, 768, 768)];
    const BURSTS: usize = 5;
    const ROUNDS: usize = 2;
    const APART: Duration = Duration::from_millis(30);
    let mut best = 0.0f64;
    for (burst, (n, k, m)) in (0..BURSTS).flat_map(|burst| SHAPES.map(|shape| (burst, shape))) {
        if burst > 0 {
            std::thread::sleep(APART);
        }
        let (x, w) = (vec![0.5f32; n * k], vec![0.25f32; m * k]);
        let mut y = vec![0.0f32; n * m];
        let mut ws = vec![0.0; linear_workspace_len(n, k, m, pool.threads())];
        for _ in 0..ROUNDS {
            let start = Instant::now();
            linear(pool, &x, &w, None, Acc::None, &mut y, n, k, m, &mut ws);
            best = best.max(2.0 * (n * k * m) as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
    }
    best
}

/// The rate of fused multiply-adds on registers alone, in GFLOP/s over all threads of `pool`: the bound that no matrix
/// product passes.
#[doc(hidden)]
pub fn fma_peak_gflops(pool: &Pool) -> f64 {
    const ROUNDS: usize = 5;
    const LOOPS: usize = 200_000;
    let mut best = 0.0f64;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        pool.run(pool.threads(), &|_, _| {
            std::hint::black_box(spin(LOOPS, std::hint::black_box(0.5)));
        });
        let flops = 2.0 * (pool.threads() * LOOPS * CHAINS * 16) as f64;
        best = best.max(flops / start.elapsed().as_secs_f64() / 1e9);
    }
    best
}

/// Independent chains: enough to cover the latency of a fused multiply-add on two units.
const CHAINS: usize = 12;

kernel! { fn spin(loops: usize, x: f32) -> f32 = |s: S| {
    let x = s.splat(x);
    let mut sums = [x; CHAINS];
    for _ in 0..loops {
        for sum in &mut sums {
            *sum = s.fma(*sum, x, x);
        }
    }
    let mut total = s.splat(0.0);
    for sum in sums {
        total = s.add(total, sum);
    }
    s.sum(total)
} }
