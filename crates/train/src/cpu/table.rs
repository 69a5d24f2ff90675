//! Which kernel an op's kind is, and what it is called with.

use bytemuck::Pod;
use half::bf16;
use kernels::{AdamW, Gelu, Glu, Places, Pool, Storage};
use program::{Heads, LossTerms, NORM_CHUNK, OpKind};
use spec::{DType, NormKind};

use super::args::Args;
use super::attention::{attention, attention_cached, deal_heads, qk_clip, ring_attention};
use super::experts::{balance, grouped_linear, permute, route, slice};
use super::latent::{latent_cached, latent_norm, latent_rope};
use super::muon::muon;
use crate::device::Lack;
use crate::launch::Launch;

/// Element types of parameters and activations.
pub(super) trait Number: Storage + Pod {}

impl<T: Storage + Pod> Number for T {}

/// Computes a launch.
pub(super) type Kernel<T> = fn(&Pool, &Args<'_, T>);

/// What computes an op of this kind.
///
/// # Errors
/// What is missing, if nothing does.
pub(super) fn kernel<T: Number>(kind: &OpKind) -> Result<Kernel<T>, Lack> {
    use OpKind::*;
    Ok(match kind {
        Embed { .. } => embed,
        EmbedGrad { .. } | PosGrad => embed_grad,
        Norm { .. } => norm,
        NormGradInput { .. } => norm_grad_input,
        NormGradWeight { .. } => norm_grad_weight,
        HeadNorm { .. } | HeadNormGradInput { .. } | HeadNormGradWeight { .. } => head_norm,
        Linear | LinearGradInput => linear,
        LinearGradWeight | BiasGrad => linear_grad_weight,
        Rope { .. } => rope,
        Attention { .. } | AttentionGrad { .. } | SinkGrad { .. } => attention,
        RingAttention { .. } | RingAttentionGrad { .. } => ring_attention,
        SplitHeads { .. } | JoinHeads { .. } => deal_heads,
        AttentionCached { .. } => attention_cached,
        LatentCached { .. } => latent_cached,
        LatentNorm { .. } | LatentNormGradInput | LatentNormGradWeight => latent_norm,
        LatentRope { .. } | LatentRopeGrad { .. } => latent_rope,
        Route { .. } | RouteGrad { .. } => route,
        BalanceExperts { .. } => balance,
        Slice { .. } => slice,
        Permute { .. } | PermuteGrad | Unpermute { .. } | UnpermuteGrad => permute,
        GroupedLinear { .. } | GroupedLinearGradInput { .. } => grouped_linear,
        GroupedLinearGradWeight { .. } | GroupedBiasGrad { .. } => grouped_linear,
        Rows { .. } | RowsGrad { .. } => row_fn,
        SwiGlu { .. } | SwiGluGrad { .. } | Gelu { .. } | GeluGrad { .. } | Add => elementwise,
        Dropout { .. } => dropout,
        SoftCap { .. }
        | Xent { .. }
        | XentStats { .. }
        | XentCombine { .. }
        | XentGrad { .. }
        | LossSum { .. } => loss,
        ShardGrads { .. } => shard_grads,
        TieGrads { .. } => tie_grads,
        GradNorm => grad_norm,
        AdamW { .. } => adamw,
        MuonMomentum { .. } | Orthogonalise { .. } | Muon { .. } => muon,
        Average { .. } | SwapAverage { .. } => average,
        LogitMax { .. } | QkClip { .. } => qk_clip,
        other => return Err(Lack::of(other)),
    })
}

/// The table names a function for kinds that the function does not know.
macro_rules! not_mine {
    ($a:expr) => {
        unreachable!("the table sends no {} here", $a.launch().kind().name())
    };
}
pub(super) use not_mine;

fn embed<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::Embed { vocab0, positions } = *a.launch().kind() else { not_mine!(a) };
    let l = a.launch();
    let dim = l.output(0).cols;
    let from = l.turn.position * dim;
    let table = a.optional(2).filter(|_| positions).map(|p| &p[from..]);
    kernels::embed(pool, a.ids(0), a.input(1), vocab0, table, places(l), a.out(0), dim);
}

fn places(l: &Launch<'_>) -> Places {
    Places { seq: l.sequence(), starts: l.places() }
}

fn embed_grad<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let (levels, g) = a.gradient(0);
    let (rows, cols, ws) = (g.rows, g.cols, a.workspace());
    match *a.launch().kind() {
        OpKind::EmbedGrad { vocab0 } => {
            kernels::embed_grad(pool, a.ids(0), vocab0, rows, a.input(1), levels, cols, g.inner, g.merge, ws);
        }
        _ => {
            let places = places(a.launch());
            kernels::pos_grad(pool, a.input(0), levels, rows, places, cols, g.inner, g.merge, ws);
        }
    }
}

fn norm<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::Norm { norm, eps } = *a.launch().kind() else { not_mine!(a) };
    let ((n, dim), x, w, y, stats) = (a.shape(0), a.input(0), a.input(1), a.out(0), a.out_floats(1));
    match norm {
        NormKind::Rms => kernels::rms_norm(pool, x, w, y, stats, n, dim, eps),
        NormKind::Layer => kernels::layer_norm(pool, x, w, a.input(2), y, stats, n, dim, eps),
    }
}

fn norm_grad_input<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::NormGradInput { norm } = *a.launch().kind() else { not_mine!(a) };
    let (n, dim) = a.shape(0);
    let kernel = match norm {
        NormKind::Rms => kernels::rms_norm_dx,
        NormKind::Layer => kernels::layer_norm_dx,
    };
    kernel(pool, a.input(0), a.input(1), a.input(2), a.floats(3), a.acc(), a.out(0), n, dim);
}

fn norm_grad_weight<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::NormGradWeight { norm } = *a.launch().kind() else { not_mine!(a) };
    let ((n, dim), dy, x, stats, ws) = (a.shape(0), a.input(0), a.input(1), a.floats(2), a.workspace());
    let (levels, g) = a.gradient(0);
    match norm {
        NormKind::Rms => kernels::rms_norm_dw(pool, dy, x, stats, levels, n, dim, g.inner, g.merge, ws),
        NormKind::Layer => {
            let (bias, _) = a.gradient(1);
            kernels::layer_norm_dw(pool, dy, x, stats, levels, bias, n, dim, g.inner, g.merge, ws);
        }
    }
}

fn head_norm<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((n, _), first, second) = (a.shape(0), a.input(0), a.input(1));
    match *a.launch().kind() {
        OpKind::HeadNorm { heads: Heads { q, kv, dim, .. }, eps } => {
            let (y, rstd) = (a.out(0), a.out_floats(1));
            kernels::qk_norm(pool, first, second, a.input(2), y, rstd, n, q, kv, dim, eps);
        }
        OpKind::HeadNormGradInput { heads: Heads { q, kv, dim, .. } } => {
            let (wq, wk, rstd) = (a.input(2), a.input(3), a.floats(4));
            kernels::qk_norm_dx(pool, first, second, wq, wk, rstd, a.out(0), n, q, kv, dim);
        }
        OpKind::HeadNormGradWeight { heads: Heads { q, kv, dim, .. } } => {
            let ((dq, g), (dk, _), rstd, ws) = (a.gradient(0), a.gradient(1), a.floats(2), a.workspace());
            kernels::qk_norm_dw(pool, first, second, rstd, dq, dk, n, q, kv, dim, g.inner, g.merge, ws);
        }
        _ => not_mine!(a),
    }
}

fn linear<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((n, cols), (rows, in_), ws) = (a.shape(0), a.shape(1), a.workspace());
    let (x, w, acc, y) = (a.input(0), a.input(1), a.acc(), a.out(0));
    match a.launch().kind() {
        OpKind::Linear => kernels::linear(pool, x, w, a.optional(2), acc, y, n, cols, rows, ws),
        _ => kernels::linear_dx(pool, x, w, acc, y, n, in_, cols, ws),
    }
}

fn linear_grad_weight<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((n, out), dy, (levels, g), ws) = (a.shape(0), a.input(0), a.gradient(0), a.workspace());
    match a.launch().kind() {
        OpKind::BiasGrad => kernels::bias_grad(pool, dy, levels, n, out, g.inner, g.merge, ws),
        _ => {
            let (x, (_, in_)) = (a.input(1), a.shape(1));
            kernels::linear_dw(pool, dy, x, levels, n, in_, out, g.inner, g.merge, ws);
        }
    }
}

fn rope<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::Rope { heads: h, inverse } = *a.launch().kind() else { not_mine!(a) };
    let ((n, _), (positions, _), l) = (a.shape(0), a.shape(1), a.launch());
    // One token of a generation, or whole sequences.
    let seq = if n == 1 { positions } else { l.sequence() };
    let (cos, sin) = (a.floats(1), a.floats(2));
    kernels::rope(pool, a.out(0), cos, sin, n, seq, h.q, h.kv, h.dim, l.turn.position, inverse);
}

fn elementwise<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((n, cols), x, y) = (a.shape(0), a.input(0), a.out(0));
    // Of experts' rows there may be fewer than there is room for: counts say how many.
    let rows = |counts: usize| match counts < a.launch().inputs() {
        true => a.ids(counts).iter().map(|c| *c as usize).sum(),
        false => n,
    };
    match *a.launch().kind() {
        OpKind::SwiGlu { clamped } => {
            let (n, f) = (rows(1), cols / 2);
            kernels::glu(pool, glu(clamped), &x[..n * cols], &mut y[..n * f], n, f);
        }
        OpKind::SwiGluGrad { clamped } => {
            let n = rows(2);
            let (x, a, y) = (&x[..n * cols], &a.input(1)[..2 * n * cols], &mut y[..2 * n * cols]);
            kernels::glu_dx(pool, glu(clamped), x, a, y, n, cols);
        }
        OpKind::Gelu { tanh } => {
            let len = rows(1) * cols;
            kernels::gelu(pool, gelu(tanh), &x[..len], &mut y[..len]);
        }
        OpKind::GeluGrad { tanh } => {
            let len = rows(2) * cols;
            kernels::gelu_dx(pool, gelu(tanh), &x[..len], &a.input(1)[..len], &mut y[..len]);
        }
        OpKind::Add => match a.optional(2) {
            Some(bias) => kernels::add_bias(pool, x, a.input(1), bias, y),
            None => kernels::add(pool, x, a.input(1), y),
        },
        _ => not_mine!(a),
    }
}

fn dropout<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::Dropout { site, rate } = *a.launch().kind() else { not_mine!(a) };
    let l = a.launch();
    let of = kernels::Dropout { key: site ^ l.turn.draws, rate };
    let place = |row: usize| {
        let (sequence, position) = l.place(row);
        (sequence as u64) << 32 | position as u64
    };
    kernels::dropout(pool, of, &place, a.input(0), a.optional(1), a.acc(), a.out(0), a.shape(0).1);
}

fn row_fn<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((n, _), ws) = (a.shape(0), a.workspace());
    match *a.launch().kind() {
        OpKind::Rows { of } => kernels::row_fn(pool, of.forward, a.input(0), a.out(0), n, ws),
        OpKind::RowsGrad { of } => {
            kernels::row_fn_dx(pool, of.backward, a.input(0), a.input(1), a.out(0), n, ws);
        }
        _ => not_mine!(a),
    }
}

fn glu(clamped: bool) -> Glu {
    if clamped { Glu::Clamped } else { Glu::Silu }
}

fn gelu(tanh: bool) -> Gelu {
    if tanh { Gelu::Tanh } else { Gelu::Erf }
}

fn loss<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((n, cols), l) = (a.shape(0), a.launch());
    let scale = l.turn.loss_scale;
    match *l.kind() {
        OpKind::SoftCap { cap } => kernels::soft_cap(pool, a.out(0), cap),
        OpKind::Xent { terms } => {
            kernels::xent_fused(pool, a.out(0), a.ids(1), terms_of(terms, scale), a.out_floats(1), n, cols);
        }
        OpKind::XentStats { vocab0 } => {
            kernels::xent_stats(pool, a.input(0), a.ids(1), vocab0, a.out_floats(0), n, cols);
        }
        OpKind::XentCombine { shards } => {
            kernels::xent_combine(a.floats(0), shards, a.out_floats(0), n / shards);
        }
        OpKind::XentGrad { vocab0, terms } => {
            let (targets, stats, losses) = (a.ids(1), a.floats(2), a.out_floats(1));
            let terms = terms_of(terms, scale);
            kernels::xent_dlogits(pool, a.out(0), targets, vocab0, stats, terms, losses, n, cols);
        }
        OpKind::LossSum { .. } => {
            a.out_doubles(0)[0] = a.floats(0).iter().map(|&l| f64::from(l)).sum();
        }
        _ => not_mine!(a),
    }
}

fn terms_of(of: LossTerms, scale: f32) -> kernels::LossTerms {
    kernels::LossTerms { scale: scale * of.weight, z: of.z, cap: of.cap }
}

/// Adds one micro-batch's scattered gradients to the partial sums of the owned shards, in tree order.
fn shard_grads<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    for i in 0..a.launch().inputs() {
        let (levels, g) = a.gradient(i);
        kernels::add_levels(pool, a.floats(i), levels, g.merge);
    }
}

fn tie_grads<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    kernels::add_to(pool, a.floats(0), a.out_floats(0));
}

/// Sums squares by chunk, so that their total does not depend on who held what.
fn grad_norm<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    a.out_doubles(0).fill(0.0);
    for i in 0..a.launch().inputs() {
        kernels::sum_squares(pool, a.floats(i), a.out_doubles(i + 1), NORM_CHUNK);
    }
}

fn adamw<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let OpKind::AdamW { decay, .. } = *a.launch().kind() else { not_mine!(a) };
    let Some(update) = a.launch().turn.update else { unreachable!("the tail of a step has its numbers") };
    let config = AdamW { weight_decay: if decay { update.weight_decay } else { 0.0 }, ..update };
    let (grad, m, v) = (a.floats(0), a.out_floats(1), a.out_floats(2));
    if a.launch().precision() == DType::F32 {
        kernels::adamw(pool, &config, a.out_floats(0), m, v, grad);
    } else {
        let param: &mut [bf16] = bytemuck::cast_slice_mut(a.out(0));
        kernels::adamw_bf16(pool, &config, a.out_floats(3), m, v, grad, param);
    }
}

fn average<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let turn = a.launch().turn;
    match *a.launch().kind() {
        OpKind::Average { .. } => {
            let Some(update) = turn.update else { unreachable!("the tail of a step has its numbers") };
            let share = kernels::average_share(turn.ema, update.step);
            kernels::average(pool, share, a.out_floats(0), a.floats(0));
        }
        OpKind::SwapAverage { .. } if a.launch().precision() == DType::F32 => {
            kernels::swap(pool, a.out_floats(0), a.out_floats(1));
        }
        OpKind::SwapAverage { .. } => {
            let (master, param) = (a.out_floats(1), bytemuck::cast_slice_mut(a.out(0)));
            kernels::swap(pool, master, a.out_floats(2));
            kernels::from_f32(pool, master, param);
        }
        _ => not_mine!(a),
    }
}
