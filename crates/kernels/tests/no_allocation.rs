//! No kernel allocates once its pool exists.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::*;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: by the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: by the caller's contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn shape(seqs: usize, seq: usize, heads: usize, h: usize) -> Attention {
    Attention { seqs, seq, heads, kv_heads: heads, head_dim: h, value_dim: h, scale: 0.3 }
}

const ADAM: AdamW =
    AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };

#[test]
fn kernels_do_not_allocate() {
    const N: usize = 64;
    const DIM: usize = 48;
    const LD: usize = 3 * DIM;
    let (heads, h, seq, tree, m) = (3, 16, 32, [2], Merge { merge: 1, store: 1 });
    let pool = Pool::new(3);
    let threads = pool.threads();
    let vec = |len: usize| (0..len).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect::<Vec<f32>>();
    let (x, w, wqkv, tokens) = (vec(N * DIM), vec(DIM), vec(LD * DIM), vec![7u32; N]);
    let (mut y, mut z, mut stats, mut rstd) = (x.clone(), x.clone(), vec(2 * N), vec(N));
    let (mut qkv, mut dqkv, mut lse) = (vec(N * LD), vec(N * LD), vec(N * heads));
    let (mut head_rstd, wq, shape) = (vec(N * 2 * heads), vec(h), shape(N / seq, seq, heads, h));
    let (cos, sin, mut two) = (vec(seq * h / 2), vec(seq * h / 2), vec(2 * DIM));
    let (mut grad, mut grad2, mut grad3) = (vec(2 * LD * DIM), vec(2 * LD), vec(2 * LD));
    let (mut moment, mut moment2, mut partials) = (vec(LD), vec(LD), vec![0.0; 4]);
    let lens = [
        linear_workspace_len(N, DIM, LD, threads),
        linear_dx_workspace_len(N, DIM, LD, threads),
        linear_dw_workspace_len(N, DIM, LD, &tree, threads),
        bias_grad_workspace_len(LD, &tree),
        norm_dw_workspace_len(DIM, &tree),
        qk_norm_dw_workspace_len(h, &tree),
        attention_workspace_len(&shape, threads),
        attention_dx_workspace_len(&shape, threads),
        attention_decode_workspace_len(seq, h, threads),
        embed_grad_workspace_len(N, LD, DIM, &tree, threads),
        pos_grad_workspace_len(DIM, &tree, threads),
    ];
    let mut ws = vec(lens.into_iter().max().unwrap_or(0));
    let mut experts = mixture(&pool);
    let mut run = || {
        experts();
        let (ws, pool, all) = (&mut ws[..], &pool, Sees::ALL);
        embed(pool, &tokens, &wqkv, 0, Some(&x), Places::whole(seq), &mut y, DIM);
        embed_grad(pool, &tokens, 0, LD, &x, &mut grad, DIM, &tree, m, ws);
        pos_grad(pool, &x, &mut grad, seq, Places::whole(seq), DIM, &tree, m, ws);
        rms_norm(pool, &x, &w, &mut y, &mut rstd, N, DIM, 1e-5);
        rms_norm_dx(pool, &x, &x, &w, &rstd, Acc::None, &mut z, N, DIM);
        rms_norm_dw(pool, &x, &x, &rstd, &mut grad2, N, DIM, &tree, m, ws);
        layer_norm(pool, &x, &w, &w, &mut y, &mut stats, N, DIM, 1e-5);
        layer_norm_dx(pool, &x, &x, &w, &stats, Acc::InPlace, &mut z, N, DIM);
        layer_norm_dw(pool, &x, &x, &stats, &mut grad2, &mut grad3, N, DIM, &tree, m, ws);
        linear(pool, &x, &wqkv, None, Acc::None, &mut qkv, N, DIM, LD, ws);
        rope(pool, &mut qkv, &cos, &sin, N, seq, heads, heads, h, 0, false);
        qk_norm(pool, &qkv, &wq, &wq, &mut dqkv, &mut head_rstd, N, heads, heads, h, 1e-5);
        qk_norm_dx(pool, &qkv, &qkv, &wq, &wq, &head_rstd, &mut dqkv, N, heads, heads, h);
        qk_norm_dw(pool, &qkv, &qkv, &head_rstd, &mut grad2, &mut grad3, N, heads, heads, h, &tree, m, ws);
        attention(pool, &shape, &qkv, all, &mut y, &mut lse, ws);
        attention_dx(pool, &shape, &qkv, all, &y, &lse, &x, &mut dqkv, ws);
        attention_decode(pool, &x, DIM, &x, &x, &[seq, 5], all, &mut two, seq, heads, heads, h, 0.3, ws);
        linear_dx(pool, &dqkv, &wqkv, Acc::None, &mut z, N, DIM, LD, ws);
        linear_dw(pool, &dqkv, &x, &mut grad, N, DIM, LD, &tree, m, ws);
        bias_grad(pool, &dqkv, &mut grad2, N, LD, &tree, m, ws);
        glu(pool, Glu::Silu, &qkv[..2 * N * DIM], &mut y, N, DIM);
        glu_dx(pool, Glu::Silu, &x, &qkv[..2 * N * DIM], &mut dqkv[..2 * N * DIM], N, DIM);
        gelu(pool, Gelu::Erf, &x, &mut y);
        gelu_dx(pool, Gelu::Tanh, &x, &x, &mut y);
        add(pool, &x, &x, &mut y);
        xent_fused(pool, &mut qkv, &tokens, LossTerms::plain(0.1), &mut rstd, N, LD);
        adamw(pool, &ADAM, &mut grad2[..LD], &mut moment, &mut moment2, &grad3[..LD]);
        sum_squares(pool, &x, &mut partials, N * DIM / 4);
        copy(pool, &x, &mut y);
        fill(pool, &mut y, 0.0);
    };
    run();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    run();
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before);
}

/// The kernels of a mixture of experts, and of heads that ranks deal, with memory of their own.
fn mixture(pool: &Pool) -> impl FnMut() {
    const N: usize = 64;
    const DIM: usize = 48;
    let (tree, m, threads) = ([2], Merge { merge: 1, store: 1 }, pool.threads());
    let vec = |len: usize| (0..len).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect::<Vec<f32>>();
    let (x, w, dh) = (vec(N * DIM), vec(4 * DIM * 8), vec(2 * N * 8));
    let (mut y, mut h, mut grad) = (x.clone(), vec(2 * N * 8), vec(2 * 4 * DIM * 8));
    let router = Router {
        top_k: 2,
        sigmoid: true,
        renormalise: true,
        scale: 1.0,
        groups: 2,
        top_groups: 1,
        balance: 0.1,
        z: 0.1,
    };
    let (mut gates, mut index, mut counts, mut dlogits) =
        (vec(2 * N), vec![0u32; 4 * N], vec![0u32; 8], vec(4 * N));
    let (mut copies, mut dcopies) = (vec(2 * N * DIM), vec(2 * N * DIM));
    let mut counters = vec(4 * DIM);
    let lens = [
        route_workspace_len(4, threads),
        grouped_linear_workspace_len((4, 4), 2 * N, DIM, DIM, threads),
        grouped_linear_dw_workspace_len(4, (2 * N, N), DIM, DIM, &tree, threads),
    ];
    let mut ws = vec(lens.into_iter().max().unwrap_or(0));
    let (dealt, packed) = (shape(2, N / 2, 4, 4), vec(N * DIM));
    let (mut parts, mut joined) = (vec(N * DIM), vec(N * DIM));
    move || {
        split_heads(pool, &dealt, 2, &packed, &mut parts);
        join_heads(pool, &dealt, 2, &parts, &mut joined);
        let ws = &mut ws[..];
        let shape = (N, 4, 2);
        route(pool, &x[..4 * N], None, &router, (&mut gates, &mut index, &mut counts), shape, ws);
        route_dx(pool, &gates, &x[..4 * N], &index, &counts, &router, &mut dlogits, shape, ws);
        permute(pool, &x, &index, &mut copies, (N, 2, DIM));
        permute_dx(pool, &copies, &index, Acc::None, &mut y, (N, 2, DIM));
        unpermute(pool, &copies, &gates, &index, Acc::InPlace, &mut y, (N, 2, DIM));
        let groups = Groups { counts: &counts, experts: 4, leaves: 2 };
        unpermute_dx(pool, &x, &copies, &gates, &index, (&mut dcopies, &mut dlogits[..2 * N]), (N, 2, DIM));
        let dims = (DIM, 8);
        grouped_linear(pool, &copies, (&w, None), groups, &mut h, dims, ws);
        grouped_linear_dx(pool, &dh, &w, groups, &mut dcopies, dims, ws);
        let of_sequence = |_: usize| (0, m);
        let dims = (DIM, 8, N / 2);
        grouped_linear_dw(pool, &dh, &copies, groups, &mut grad, dims, &tree, &of_sequence, ws);
        add_roots(pool, &mut counters, 2, DIM, &[2]);
    }
}
