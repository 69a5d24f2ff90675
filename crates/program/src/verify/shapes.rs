//! What the operands of each kind of op must look like.

use spec::{DType, NormKind};

use crate::heads::Heads;
use crate::muon::Shares;
use crate::op::OpKind;

/// Rows, columns and element type of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: DType,
}

/// Inputs and outputs, as far as the kind says what they must be.
type Expected = (Vec<Shape>, Vec<Shape>);

/// The first operand that is not what its kind asks for.
pub(super) fn check(kind: &OpKind, ins: &[Shape], outs: &[Shape], grads: &[Shape]) -> Result<(), String> {
    let Some((want_ins, want_outs)) = expected(kind, ins) else {
        return Err(format!("{} lacks operands: it has {}", kind.name(), ins.len()));
    };
    for (what, found, want) in [("input", ins, &want_ins), ("output", outs, &want_outs)] {
        if found.len() < want.len() {
            return Err(format!("{} {what}s, expected {}", found.len(), want.len()));
        }
        for (i, (f, w)) in found.iter().zip(want).enumerate() {
            if f != w {
                return Err(format!("{what} {i} is {}, expected {}", show(f), show(w)));
            }
        }
    }
    let want = match kind {
        OpKind::LinearGradWeight => Some((ins[0].cols, ins[1].cols)),
        OpKind::BiasGrad => Some((1, ins[0].cols)),
        OpKind::SinkGrad { .. } => Some((1, ins[3].cols)),
        _ => None,
    };
    match (want, grads.first()) {
        (Some(want), Some(g)) if (g.rows, g.cols) != want => {
            Err(format!("the gradient is [{}, {}], expected [{}, {}]", g.rows, g.cols, want.0, want.1))
        }
        (Some(_), None) => Err("a weight gradient goes nowhere".to_owned()),
        _ => Ok(()),
    }
}

fn show(s: &Shape) -> String {
    format!("{} [{}, {}]", s.dtype, s.rows, s.cols)
}

fn expected(kind: &OpKind, ins: &[Shape]) -> Option<Expected> {
    use OpKind::*;
    let at = |i: usize| ins.get(i).copied();
    let norm_stats = |n: &NormKind, rows| f32(if *n == NormKind::Layer { 2 * rows } else { rows }, 1);
    Some(match kind {
        Embed { .. } => {
            let (tokens, table) = (at(0)?, at(1)?);
            (vec![u32(tokens.rows, 1), table], vec![of(tokens.rows, table.cols, table.dtype)])
        }
        EmbedGrad { .. } => (vec![u32(at(1)?.rows, 1)], vec![]),
        Norm { norm, .. } => {
            let x = at(0)?;
            (vec![x, of(1, x.cols, x.dtype)], vec![x, norm_stats(norm, x.rows)])
        }
        NormGradInput { norm } => {
            let x = at(1)?;
            (vec![x, x, of(1, x.cols, x.dtype), norm_stats(norm, x.rows)], vec![x])
        }
        NormGradWeight { norm } => {
            let x = at(1)?;
            (vec![x, x, norm_stats(norm, x.rows)], vec![])
        }
        HeadNorm { heads: h, .. } => {
            let (x, w) = (packed(h, at(0)?), of(1, h.dim, at(0)?.dtype));
            (vec![x, w, w], vec![x, f32(x.rows, h.q + h.kv)])
        }
        HeadNormGradInput { heads: h } => {
            let (x, w) = (packed(h, at(0)?), of(1, h.dim, at(0)?.dtype));
            (vec![x, x, w, w, f32(x.rows, h.q + h.kv)], vec![x])
        }
        HeadNormGradWeight { heads: h } => {
            let x = packed(h, at(0)?);
            (vec![x, x, f32(x.rows, h.q + h.kv)], vec![])
        }
        Linear => {
            let (x, w) = (at(0)?, at(1)?);
            let bias = at(2).map(|_| of(1, w.rows, x.dtype));
            let ins = [x, of(w.rows, x.cols, x.dtype)].into_iter().chain(bias).collect();
            (ins, vec![of(x.rows, w.rows, x.dtype)])
        }
        LinearGradInput => {
            let (dy, w) = (at(0)?, at(1)?);
            (vec![dy, of(dy.cols, w.cols, dy.dtype)], vec![of(dy.rows, w.cols, dy.dtype)])
        }
        LinearGradWeight => {
            let (dy, x) = (at(0)?, at(1)?);
            (vec![dy, of(dy.rows, x.cols, dy.dtype)], vec![])
        }
        GroupedLinear { experts, .. } => {
            let (x, w) = (at(0)?, at(1)?);
            let out = w.rows / (*experts).max(1);
            let mut ins = vec![x, of(out * experts, x.cols, x.dtype)];
            if let (Some(counts), Some(b)) = (at(2), at(3)) {
                let parts = out / b.cols.max(1);
                ins.extend([counts, of(experts * parts, out / parts.max(1), x.dtype)]);
            }
            (ins, vec![of(x.rows, out, x.dtype)])
        }
        GroupedLinearGradInput { experts, .. } => {
            let (dy, w) = (at(0)?, at(1)?);
            (vec![dy, of(dy.cols * experts, w.cols, dy.dtype)], vec![of(dy.rows, w.cols, dy.dtype)])
        }
        _ => return expected_without_weights(kind, ins),
    })
}

/// The same for kinds that have no weights.
fn expected_without_weights(kind: &OpKind, ins: &[Shape]) -> Option<Expected> {
    use OpKind::*;
    let at = |i: usize| ins.get(i).copied();
    Some(match kind {
        Rope { heads, .. } => same(packed(heads, at(0)?)),
        Dropout { .. } => {
            let x = at(0)?;
            let bias = at(1).map(|_| of(1, x.cols, x.dtype));
            ([x].into_iter().chain(bias).collect(), vec![x])
        }
        LatentRope { heads, .. } => {
            let q = at(0)?;
            (vec![of(q.rows, heads.q * heads.dim, q.dtype)], vec![packed(heads, q)])
        }
        Attention { .. } | RingAttention { .. } | AttentionGrad { .. } | RingAttentionGrad { .. } => {
            return attended(kind, ins);
        }
        SinkGrad { .. } | AttentionCached { .. } | LatentCached { .. } => return attended(kind, ins),
        SplitHeads { heads, ranks } => {
            let x = packed(heads, at(0)?);
            (vec![x], vec![of(x.rows * ranks, dealt(heads, *ranks)?, x.dtype)])
        }
        JoinHeads { heads, ranks } => {
            let parts = at(0)?;
            let rows = parts.rows / (*ranks).max(1);
            let from = of(rows * ranks, dealt(heads, *ranks)?, parts.dtype);
            (vec![from], vec![of(rows, heads.packed(), parts.dtype)])
        }
        Route { .. } | RouteGrad { .. } | Permute { .. } | Unpermute { .. } => return routed(kind, ins),
        SwiGlu { .. } => {
            let a = at(0)?;
            (vec![of(a.rows, a.cols / 2 * 2, a.dtype)], vec![of(a.rows, a.cols / 2, a.dtype)])
        }
        SwiGluGrad { .. } => {
            let (dh, a) = (at(0)?, of(at(0)?.rows, 2 * at(0)?.cols, at(0)?.dtype));
            (vec![dh, a], vec![a])
        }
        Gelu { .. } => same(at(0)?),
        Rows { .. } => (vec![at(0)?], vec![]),
        RowsGrad { .. } => (vec![at(0)?, at(1)?], vec![at(1)?]),
        GeluGrad { .. } => (vec![at(0)?, at(0)?], vec![at(0)?]),
        Add => {
            let x = at(0)?;
            let bias = at(2).map(|_| of(1, x.cols, x.dtype));
            ([x, x].into_iter().chain(bias).collect(), vec![x])
        }
        SoftCap { .. } => same(at(0)?),
        Xent { .. } => {
            let x = at(0)?;
            (vec![x, u32(x.rows, 1)], vec![x, f32(x.rows, 1)])
        }
        XentStats { .. } => (vec![at(0)?, u32(at(0)?.rows, 1)], vec![f32(at(0)?.rows, 3)]),
        XentCombine { shards } => {
            let rows = at(0)?.rows / (*shards).max(1);
            (vec![f32(rows * shards, 3)], vec![f32(rows, 3)])
        }
        XentGrad { .. } => {
            let x = at(0)?;
            (vec![x, u32(x.rows, 1), f32(x.rows, 3)], vec![x, f32(x.rows, 1)])
        }
        LossSum { .. } => (vec![f32(at(0)?.rows, 1)], vec![]),
        LogitMax { heads, .. } => (vec![f32(at(0)?.rows, heads.q)], vec![]),
        AllReduce { .. } | Fork { .. } => same(at(0)?),
        PosGrad | BiasGrad | Send { .. } => (vec![at(0)?], vec![]),
        _ => return unstated(kind, ins),
    })
}

/// Attention: at once, on a ring, against a cache; and its sinks.
fn attended(kind: &OpKind, ins: &[Shape]) -> Option<Expected> {
    use OpKind::*;
    let at = |i: usize| ins.get(i).copied();
    Some(match kind {
        Attention { heads: h, sees } | RingAttention { heads: h, sees, .. } => {
            let x = packed(h, at(0)?);
            let mut outs = vec![of(x.rows, h.out_cols(), x.dtype), f32(x.rows, h.q)];
            if let RingAttention { .. } = kind {
                let keys = of(2 * x.rows, h.kv_cols(), x.dtype);
                outs.extend([keys, f32(x.rows, h.out_cols()), f32(x.rows, h.q)]);
            }
            let mut wanted = vec![x];
            wanted.extend(sees.documents.then_some(u32(x.rows, 1)));
            // Of all ranks that heads are dealt to.
            let sinks = at(wanted.len()).map_or(1, |s| (s.cols / h.q.max(1)).max(1));
            wanted.extend(sees.sinks.then_some(of(1, sinks * h.q, x.dtype)));
            (wanted, outs)
        }
        SinkGrad { heads: h } => {
            let o = of(at(0)?.rows, h.out_cols(), at(0)?.dtype);
            let ranks = (at(3)?.cols / h.q.max(1)).max(1);
            (vec![o, o, f32(o.rows, h.q), of(1, ranks * h.q, o.dtype)], vec![])
        }
        AttentionGrad { heads: h, sees } | RingAttentionGrad { heads: h, sees, .. } => {
            let x = packed(h, at(0)?);
            let o = of(x.rows, h.out_cols(), x.dtype);
            let mut outs = vec![x];
            if let RingAttentionGrad { .. } = kind {
                let keys = of(2 * x.rows, h.kv_cols(), x.dtype);
                outs.extend([keys, f32(x.rows, h.q * h.dim), f32(3 * x.rows, h.kv_cols())]);
            }
            let mut wanted = vec![x, o, f32(x.rows, h.q), o];
            wanted.extend(sees.documents.then_some(u32(x.rows, 1)));
            (wanted, outs)
        }
        AttentionCached { heads: h, sees, .. } => {
            let x = packed(h, at(0)?);
            let sinks = sees.sinks.then_some(of(1, h.q, x.dtype));
            ([of(1, x.cols, x.dtype)].into_iter().chain(sinks).collect(), vec![of(1, h.out_cols(), x.dtype)])
        }
        LatentCached { heads: h, sees, rope_dim, .. } => {
            let (q, latent) = (at(0)?, at(1)?);
            let up = of(h.q * (h.dim - rope_dim + h.value_dim), latent.cols, q.dtype);
            let sinks = sees.sinks.then_some(of(1, h.q, q.dtype));
            let one = |cols| of(1, cols, q.dtype);
            let ins = [one(h.q * h.dim), one(latent.cols), one(*rope_dim), up].into_iter().chain(sinks);
            (ins.collect(), vec![one(h.out_cols())])
        }
        _ => return unstated(kind, ins),
    })
}

/// What chooses experts and moves rows to them.
fn routed(kind: &OpKind, ins: &[Shape]) -> Option<Expected> {
    use OpKind::*;
    let at = |i: usize| ins.get(i).copied();
    Some(match kind {
        Route { top_k, router } => {
            let x = at(0)?;
            let biases = router.expert_bias.then_some(f32(1, x.cols));
            ([x].into_iter().chain(biases).collect(), vec![f32(x.rows, *top_k), u32(x.rows, 2 * top_k)])
        }
        RouteGrad { top_k, .. } => {
            let x = at(1)?;
            (vec![f32(x.rows, *top_k), x, u32(x.rows, 2 * top_k), u32(x.cols, at(3)?.cols)], vec![x])
        }
        Permute { top_k } => {
            let x = at(0)?;
            (vec![x, u32(x.rows, 2 * top_k)], vec![of(x.rows * top_k, x.cols, x.dtype)])
        }
        Unpermute { top_k } => {
            let (x, rows) = (at(0)?, at(1)?.rows);
            let copies = of(rows * top_k, x.cols, x.dtype);
            (vec![copies, f32(rows, *top_k), u32(rows, 2 * top_k)], vec![of(rows, x.cols, x.dtype)])
        }
        _ => return unstated(kind, ins),
    })
}

/// Kinds whose shapes are stated elsewhere. A kind without any rule is none of them: the verifier then says that it
/// lacks operands.
fn unstated(kind: &OpKind, ins: &[Shape]) -> Option<Expected> {
    use OpKind::*;
    match kind {
        // Widths are the model's; whoever reads these rows asks for theirs.
        LatentNorm { .. } | LatentNormGradInput | LatentNormGradWeight | LatentRopeGrad { .. } => {}
        PermuteGrad | UnpermuteGrad | Slice { .. } => {}
        GroupedLinearGradWeight { .. } | GroupedBiasGrad { .. } => {}
        // Without counts, as many rows arrive as leave.
        AllToAll { .. } if ins.len() == 1 => return Some(same(ins[0])),
        // Their ends are stated, and checked, as messages.
        AllGather { .. } | Unslice { .. } | ReduceScatter { .. } | AllToAll { .. } | Recv { .. } => {
            return Some((vec![], vec![]));
        }
        GatherParams { .. } | WaitParams { .. } | ReduceGrads { .. } | WaitGrads { .. } => {
            return Some((vec![], vec![]));
        }
        // What they settle is the owned part of a group's buffers.
        SyncGrads { .. } | AllGatherParams { .. } | ShardGrads { .. } | TieGrads { .. } | GradNorm => {
            return Some((vec![], vec![]));
        }
        AdamW { .. } | Average { .. } | SwapAverage { .. } | QkClip { .. } => return Some((vec![], vec![])),
        BalanceExperts { .. } => {
            let counts = *ins.first()?;
            return Some((vec![of(counts.rows, 1, DType::F64)], vec![]));
        }
        MuonMomentum { .. } | GatherUpdate { .. } | ScatterUpdate { .. } | Muon { .. } => {
            return Some((vec![], vec![]));
        }
        Orthogonalise { shares, .. } => {
            let of = |(all, shares): (&Shape, &Shares)| {
                let own = f32(all.rows / shares.ranks().max(1), all.cols);
                (f32(own.rows * shares.ranks(), all.cols), own)
            };
            return Some(ins.iter().zip(shares).map(of).unzip());
        }
        _ => return None,
    }
    Some((vec![*ins.first()?], vec![]))
}

fn of(rows: usize, cols: usize, dtype: DType) -> Shape {
    Shape { rows, cols, dtype }
}

fn f32(rows: usize, cols: usize) -> Shape {
    of(rows, cols, DType::F32)
}

fn u32(rows: usize, cols: usize) -> Shape {
    of(rows, cols, DType::U32)
}

fn same(x: Shape) -> Expected {
    (vec![x], vec![x])
}

/// Columns of a rank's share of heads; none where they do not divide.
fn dealt(h: &Heads, ranks: usize) -> Option<usize> {
    let ranks = ranks.max(1);
    let copied = h.kv > 0 && ranks.is_multiple_of(h.kv);
    let divides = h.q.is_multiple_of(ranks) && (copied || h.kv.is_multiple_of(ranks));
    divides.then(|| h.dealt(ranks).packed())
}

fn packed(heads: &Heads, x: Shape) -> Shape {
    Shape { cols: heads.packed(), ..x }
}
