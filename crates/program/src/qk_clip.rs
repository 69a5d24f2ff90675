//! Attention's scores bounded by scaling down what makes queries and keys, after their update.

use spec::{Error, ModelSpec, Result};

use crate::op::{Op, OpKind};
use crate::place::Placer;
use crate::rank::Rank;
use crate::role::{Place, Role};
use crate::step::{each, op, whole};
use crate::{GroupBuffers, ParamGroup, Request};

/// What makes queries and keys is scaled after its update, by the greatest scores of the step.
pub(crate) fn updates(cx: &Rank<'_>, placer: &Placer<'_>) -> Vec<Op> {
    let tau = cx.request.recipe.qk_clip;
    let scales = |group: &ParamGroup| tau > 0.0 && group.key.role == Role::QueryKeyValue && !cx.generates();
    let scaled = |(id, group, b): (_, &ParamGroup, &GroupBuffers)| {
        let Place::Layer(layer) = group.key.place else { return None };
        let outs = [b.param].into_iter().chain(b.master).map(|id| whole(&placer.buffers, id)).collect();
        let kind = OpKind::QkClip { group: id, heads: cx.heads(), layer, tau };
        let mut op = op(format!("optim.{}.clip", group.name), kind, vec![], outs);
        // Where no head is above the bound nothing is touched; else weights are read and written.
        op.cost.bytes = 8 * b.owned.count as u64;
        scales(group).then_some(op)
    };
    each(cx, &placer.groups).filter_map(scaled).collect()
}

/// Refuses what has no scores that scaling projections bounds, or none that one rank sees.
pub(crate) fn check(request: &Request<'_>, cp: usize) -> Result<()> {
    let ModelSpec { latent, qk_norm, sinks, .. } = request.model;
    if request.recipe.qk_clip == 0.0 {
        return Ok(());
    }
    let why = match (latent, qk_norm, sinks, cp) {
        (Some(_), ..) => "with latent attention, whose heads share a part of their keys",
        (_, true, ..) => "with model.qk_norm, which undoes what scales queries and keys",
        (.., true, _) => "with model.sinks, which are scores that no projection makes",
        (.., 2..) => "with layout.cp, under which no rank sees all keys",
        _ => return Ok(()),
    };
    Err(Error::user(format!("optim.qk_clip {why}")).hint("set optim.qk_clip=0"))
}
