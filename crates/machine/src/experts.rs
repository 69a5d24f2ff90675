//! Rows of experts that are spread over ranks: how many come of those that there is room for, and to whom.

use program::{Axis, Coords, Deal, Members, Message, Op, OpKind, Place, Program};
use spec::DType;

/// Of the rows that an op has room for the share that comes if every expert gets as many: 1 of an op whose rows are all
/// there. What a rank has room for may be much more ([`spec::ExpertRows`]).
pub(crate) fn filled(op: &Op, p: &Program) -> f64 {
    if !counted(op, p) {
        return 1.0;
    }
    let rows = p.blocks.iter().flat_map(|b| &b.ops).find_map(|other| match other.kind {
        OpKind::GroupedLinear { rows, .. } if other.place == op.place => Some(rows),
        _ => None,
    });
    rows.map_or(1.0, |rows| rows as f64 / op.ins[0].rows as f64)
}

/// Whether an op works on as many rows of experts as counts say.
fn counted(op: &Op, p: &Program) -> bool {
    use OpKind::*;
    let of_rows = matches!(
        op.kind,
        SwiGlu { .. } | SwiGluGrad { .. } | Gelu { .. } | GeluGrad { .. } | GroupedBiasGrad { .. }
    );
    of_rows && op.ins.last().is_some_and(|counts| p.buffer(counts.buffer).dtype == DType::U32)
}

/// By how much `rank` has more to do in this op than an even share, where experts are chosen as `shares` say: by layer, the
/// share of each expert.
pub(crate) fn load(shares: &[Vec<f64>], op: &Op, p: &Program, rank: usize) -> f64 {
    use OpKind::*;
    let grouped = matches!(
        op.kind,
        GroupedLinear { .. } | GroupedLinearGradInput { .. } | GroupedLinearGradWeight { .. }
    );
    if !grouped && !counted(op, p) {
        return 1.0;
    }
    of_rank(shares, op.place, p, Coords::of(rank, &p.layout).ep(&p.layout))
}

/// The same of a message with rows of experts: all wait for the rank that most rows go to.
pub(crate) fn busiest(shares: &[Vec<f64>], op: &Op, message: &Message, p: &Program) -> f64 {
    let to_experts = matches!(op.comm.as_ref().map(|c| c.members), Some(Members::Axis(Axis::Ep)));
    if !to_experts || !matches!(message.deal, Deal::Counted { .. }) {
        return 1.0;
    }
    (0..p.layout.ep).map(|ep| of_rank(shares, op.place, p, ep)).fold(1.0, f64::max)
}

fn of_rank(shares: &[Vec<f64>], place: Place, p: &Program, ep: usize) -> f64 {
    let of_layer = match place {
        Place::Layer(layer) => shares.get(layer),
        // Behind the last layer.
        Place::Mtp => shares.last(),
        _ => None,
    };
    let Some(of_layer) = of_layer.filter(|s| !s.is_empty()) else { return 1.0 };
    let held = of_layer.len() / p.layout.ep;
    of_layer.iter().skip(ep * held).take(held).sum::<f64>() * p.layout.ep as f64
}
