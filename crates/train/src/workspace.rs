use kernels::{Attention, Latents};
use program::{Heads, Op, OpKind, Program, View};

use crate::cpu::muon;

/// Attention over so many sequences of `seq` rows.
pub(crate) fn attention_shape(h: Heads, seqs: usize, seq: usize) -> Attention {
    let Heads { q: heads, kv: kv_heads, dim: head_dim, value_dim, .. } = h;
    Attention { seqs, seq, heads, kv_heads, head_dim, value_dim, scale: h.scale() }
}

/// Elements of f32 work space that an op's kernel wants with this many threads.
pub fn workspace_len(op: &Op, p: &Program, threads: usize) -> usize {
    use OpKind::*;
    let rows = |i: usize| op.ins[i].rows;
    let cols = |v: View| p.buffer(v.buffer).cols;
    let inner = || op.grads[0].inner.as_slice();
    match &op.kind {
        Linear => kernels::linear_workspace_len(rows(0), cols(op.ins[0]), rows(1), threads),
        LinearGradInput => {
            kernels::linear_dx_workspace_len(rows(0), cols(op.ins[1]), cols(op.ins[0]), threads)
        }
        LinearGradWeight => {
            kernels::linear_dw_workspace_len(rows(0), cols(op.ins[1]), cols(op.ins[0]), inner(), threads)
        }
        Rows { .. } => kernels::row_fn_workspace_len(cols(op.ins[0]), cols(op.outs[0]), threads),
        RowsGrad { .. } => kernels::row_fn_workspace_len(2 * cols(op.ins[1]), cols(op.ins[0]), threads),
        Route { .. } => kernels::route_workspace_len(cols(op.ins[0]), threads),
        RouteGrad { .. } => kernels::route_dx_workspace_len(cols(op.ins[1]), threads),
        GroupedLinear { experts, .. } | GroupedLinearGradInput { experts, .. } => {
            kernels::grouped_linear_workspace_len(
                (rows(2), *experts),
                rows(0),
                cols(op.ins[0]),
                cols(op.outs[0]),
                threads,
            )
        }
        GroupedLinearGradWeight { leaf_rows, .. } => kernels::grouped_linear_dw_workspace_len(
            rows(2),
            (rows(0), *leaf_rows),
            cols(op.ins[1]),
            cols(op.ins[0]),
            inner(),
            threads,
        ),
        GroupedBiasGrad { .. } => kernels::grouped_bias_grad_workspace_len(rows(1), cols(op.ins[0]), inner()),
        BiasGrad => kernels::bias_grad_workspace_len(cols(op.ins[0]), inner()),
        EmbedGrad { .. } => {
            let g = p.group(op.grads[0].group);
            kernels::embed_grad_workspace_len(rows(0), g.rows, g.cols, inner(), threads)
        }
        PosGrad => {
            let g = p.group(op.grads[0].group);
            kernels::pos_grad_workspace_len(g.cols, inner(), threads)
        }
        NormGradWeight { .. } => kernels::norm_dw_workspace_len(cols(op.ins[0]), inner()),
        LatentNormGradWeight => {
            let widths: Vec<usize> = op.grads.iter().map(|g| p.group(g.group).cols).collect();
            let [kv, queries] = [0, 1].map(|i| widths.get(i).copied().unwrap_or(0));
            kernels::latent_norm_dw_workspace_len(Latents { queries, kv, shared: 0 }, inner())
        }
        HeadNormGradWeight { heads: h } => kernels::qk_norm_dw_workspace_len(h.dim, inner()),
        _ => attention_workspace_len(op, p, threads),
    }
}

/// The same of attention.
fn attention_workspace_len(op: &Op, p: &Program, threads: usize) -> usize {
    use OpKind::*;
    let cols = |v: View| p.buffer(v.buffer).cols;
    match &op.kind {
        Attention { heads, .. } | RingAttention { heads, .. } => {
            kernels::attention_workspace_len(&attention_shape(*heads, 1, p.sequence_of(&op.kind)), threads)
        }
        AttentionGrad { heads, .. } | RingAttentionGrad { heads, .. } => {
            kernels::attention_dx_workspace_len(&attention_shape(*heads, 1, p.sequence_of(&op.kind)), threads)
        }
        Orthogonalise { matrices, shares } => {
            muon::workspace_len(matrices, shares, &|m| cols(op.outs[m.of]), threads)
        }
        SinkGrad { .. } => {
            kernels::attention_sinks_dw_workspace_len(cols(op.ins[3]), op.grads[0].inner.as_slice())
        }
        LatentCached { rope_dim, .. } => {
            let (positions, rank) = (p.mode.positions(), cols(op.ins[1]));
            kernels::latent_decode_workspace_len(positions, rank, *rope_dim, threads)
        }
        AttentionCached { heads: h, .. } => {
            kernels::attention_decode_workspace_len(p.mode.positions(), h.value_dim, threads)
        }
        _ => 0,
    }
}
