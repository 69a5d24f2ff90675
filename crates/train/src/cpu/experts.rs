//! Kernels of mixtures of experts.

use kernels::{Groups, Merge, Pool};
use program::OpKind;
use spec::{Router, Score};

use super::args::Args;
use super::table::{Number, not_mine};
use crate::launch::Gradient;

/// A router as kernels take it: its own losses as shares of `sequences`, each of so many tokens.
pub fn router(top_k: usize, r: &Router, sequences: usize, sequence: usize) -> kernels::Router {
    let mean = 1.0 / sequences.max(1) as f32;
    kernels::Router {
        top_k,
        sigmoid: r.score == Score::Sigmoid,
        renormalise: r.renormalise,
        scale: r.scale,
        groups: r.groups,
        top_groups: r.top_groups,
        balance: r.balance_loss * mean,
        z: r.z_loss * mean / sequence.max(1) as f32,
    }
}

pub(super) fn route<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ws = a.workspace();
    match *a.launch().kind() {
        OpKind::Route { top_k, router: ref r } => {
            let (n, experts) = a.shape(0);
            let leaves = a.launch().output(2).cols;
            let outs = (a.out_floats(0), a.out_ids(1), a.out_ids(2));
            let r = router(top_k, r, 0, 0);
            let biases = (a.launch().inputs() > 1).then(|| a.floats(1));
            kernels::route(pool, a.input(0), biases, &r, outs, (n, experts, leaves), ws);
        }
        OpKind::RouteGrad { top_k, router: ref r, sequences } => {
            let ((n, experts), (_, leaves)) = (a.shape(1), a.shape(3));
            let r = router(top_k, r, sequences, a.launch().context());
            let (dgates, logits, index, counts) = (a.floats(0), a.input(1), a.ids(2), a.ids(3));
            kernels::route_dx(pool, dgates, logits, index, counts, &r, a.out(0), (n, experts, leaves), ws);
            // The step's counts of this layer.
            for (sum, of) in a.out_doubles(1).iter_mut().zip(counts.chunks_exact(leaves)) {
                *sum += of.iter().map(|c| f64::from(*c)).sum::<f64>();
            }
        }
        _ => not_mine!(a),
    }
}

/// Moves what experts are chosen by, once a step.
pub(super) fn balance<T: Number>(_: &Pool, a: &Args<'_, T>) {
    let OpKind::BalanceExperts { rate } = *a.launch().kind() else { not_mine!(a) };
    kernels::balance_experts(a.doubles(0), a.out_floats(0), a.launch().output(0).cols, rate);
}

/// This rank's rows of what every tensor-parallel rank holds.
pub(super) fn slice<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    kernels::copy(pool, a.input(0), a.out(0));
}

pub(super) fn permute<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    match *a.launch().kind() {
        OpKind::Permute { top_k } => {
            let (n, dim) = a.shape(0);
            kernels::permute(pool, a.input(0), a.ids(1), a.out(0), (n, top_k, dim));
        }
        OpKind::PermuteGrad => {
            let ((_, dim), (n, cols)) = (a.shape(0), a.shape(1));
            kernels::permute_dx(pool, a.input(0), a.ids(1), a.acc(), a.out(0), (n, cols / 2, dim));
        }
        OpKind::Unpermute { top_k } => {
            let ((_, dim), (n, _)) = (a.shape(0), a.shape(1));
            let (copies, gates, index) = (a.input(0), a.floats(1), a.ids(2));
            kernels::unpermute(pool, copies, gates, index, a.acc(), a.out(0), (n, top_k, dim));
        }
        OpKind::UnpermuteGrad => {
            let ((n, dim), (_, top_k)) = (a.shape(0), a.shape(2));
            let (dy, copies, gates, index) = (a.input(0), a.input(1), a.floats(2), a.ids(3));
            let outs = (a.out(0), a.out_floats(1));
            kernels::unpermute_dx(pool, dy, copies, gates, index, outs, (n, top_k, dim));
        }
        _ => not_mine!(a),
    }
}

pub(super) fn grouped_linear<T: Number>(pool: &Pool, a: &Args<'_, T>) {
    let ((_, cols), (_, other), ws) = (a.shape(0), a.shape(1), a.workspace());
    let groups = |experts| Groups { counts: a.ids(2), experts, leaves: a.shape(2).1 };
    match *a.launch().kind() {
        OpKind::GroupedLinear { experts, .. } => {
            let out = a.launch().output(0).cols;
            let (x, w, groups) = (a.input(0), (a.input(1), a.optional(3)), groups(experts));
            kernels::grouped_linear(pool, x, w, groups, a.out(0), (cols, out), ws);
        }
        OpKind::GroupedLinearGradInput { experts, .. } => {
            let (dy, w, dx) = (a.input(0), a.input(1), a.out(0));
            kernels::grouped_linear_dx(pool, dy, w, groups(experts), dx, (other, cols), ws);
        }
        OpKind::GroupedLinearGradWeight { experts, leaf_rows, .. } => {
            let (dy, x, (levels, g)) = (a.input(0), a.input(1), a.gradient(0));
            let (shape, groups) = ((other, cols, leaf_rows), groups(experts));
            into_streams(pool, levels, &g, groups.peers(), &mut |levels, merge| {
                kernels::grouped_linear_dw(pool, dy, x, groups, levels, shape, g.inner, merge, ws);
            });
        }
        OpKind::GroupedBiasGrad { experts } => {
            let (dy, (levels, g)) = (a.input(0), a.gradient(0));
            let groups = Groups { counts: a.ids(1), experts, leaves: other };
            into_streams(pool, levels, &g, groups.peers(), &mut |levels, merge| {
                kernels::grouped_bias_grad(pool, dy, groups, levels, cols, g.inner, merge, ws);
            });
        }
        _ => not_mine!(a),
    }
}

/// Which of an expert's partial sums a peer's share joins.
type OfPeer<'a> = dyn Fn(usize) -> (usize, Merge) + Sync + 'a;

/// Runs the derivative of an expert's parameter, and adds up the counters of the ranks whose rows it met.
fn into_streams(
    pool: &Pool,
    levels: &mut [f32],
    g: &Gradient<'_>,
    peers: usize,
    derivative: &mut dyn FnMut(&mut [f32], &OfPeer<'_>),
) {
    debug_assert!(g.streams == 1 || g.streams == peers);
    let of_stream = g.stream_levels();
    derivative(levels, &|peer| match g.streams {
        // Whose rows come from one rank alone, or in no fixed order, has one counter: what the first has stored goes on.
        1 if peer > 0 => (g.merge.store, Merge { merge: 1, store: 0 }),
        1 => (0, g.merge),
        _ => (peer * of_stream, g.merge),
    });
    if let Some(upper) = g.upper.filter(|_| g.streams > 1) {
        kernels::add_roots(pool, levels, of_stream, g.rows * g.cols, upper);
    }
}
