//! Attention's scores bounded by scaling down what makes queries and keys, after their update.

use std::ops::Range;

use serde::Serialize;
use spec::{Error, ModelSpec, Result};

use crate::heads::Heads;
use crate::op::{Op, OpKind};
use crate::place::Placer;
use crate::rank::Rank;
use crate::role::Role;
use crate::step::{each, op, whole};
use crate::{GroupBuffers, ParamGroup, Request};

/// What makes queries and keys is scaled after its update, by the greatest scores of the step.
pub(crate) fn updates(cx: &Rank<'_>, placer: &Placer<'_>) -> Vec<Op> {
    let tau = cx.request.recipe.qk_clip;
    if tau == 0.0 || cx.generates() {
        return Vec::new();
    }
    let scaled = |(id, group, b): (_, &ParamGroup, &GroupBuffers)| {
        let (layer, makes) = (cx.layer_of(group.key.place)?, makes(cx, group.key.role)?);
        let outs = [b.param].into_iter().chain(b.master).map(|id| whole(&placer.buffers, id)).collect();
        let kind = OpKind::QkClip { group: id, heads: cx.heads(), makes, layer, tau };
        let mut op = op(format!("optim.{}.clip", group.name), kind, vec![], outs);
        // Where no head is above the bound nothing is touched; else weights are read and written.
        op.cost.bytes = 8 * b.owned.count as u64;
        Some(op)
    };
    each(cx, &placer.groups).filter_map(scaled).collect()
}

/// What the matrix of a role makes of queries and keys, if it makes any that belong to a head.
fn makes(cx: &Rank<'_>, role: Role) -> Option<Makes> {
    let rope = cx.model.latent.map_or(0, |l| l.rope_dim);
    match role {
        Role::QueryKeyValue => Some(Makes::Packed),
        Role::QueryUp => Some(Makes::Queries { rope }),
        Role::KeyValueUp => Some(Makes::KeysValues { rope }),
        _ => None,
    }
}

/// What a matrix makes, by whole heads, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Makes {
    /// Queries, then keys, then values.
    Packed,
    /// Queries of latent attention, of which the last `rope` dims meet keys that all heads share.
    Queries {
        /// Rotated dims.
        rope: usize,
    },
    /// Of each head its own part of the key, then its value.
    KeysValues {
        /// Dims of a query whose keys are made elsewhere.
        rope: usize,
    },
}

/// Rows of a matrix that are scaled alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaled {
    /// Which rows.
    pub rows: Range<usize>,
    /// The query heads by whose greatest score they go.
    pub heads: Range<usize>,
    /// Nothing else of their scores is scaled: by the whole factor, where others have its root.
    pub alone: bool,
}

impl Makes {
    /// What is scaled of a matrix for these heads.
    ///
    /// ```
    /// use program::{Heads, Makes, Scaled};
    /// let heads = Heads { q: 2, kv: 2, dim: 6, value_dim: 3, score_factor: 1.0 };
    /// let scaled: Vec<Scaled> = Makes::Queries { rope: 2 }.scaled(heads).collect();
    /// assert_eq!(scaled[0], Scaled { rows: 0..4, heads: 0..1, alone: false });
    /// assert_eq!(scaled[1], Scaled { rows: 4..6, heads: 0..1, alone: true });
    /// assert_eq!(scaled[2].rows, 6..10);
    /// let keys: Vec<Scaled> = Makes::KeysValues { rope: 2 }.scaled(heads).collect();
    /// assert_eq!(keys.iter().map(|s| s.rows.clone()).collect::<Vec<_>>(), [0..4, 7..11]);
    /// ```
    pub fn scaled(self, heads: Heads) -> impl Iterator<Item = Scaled> {
        let (group, dim) = (heads.q / heads.kv, heads.dim);
        let (count, parts) = match self {
            Makes::Packed => (heads.q + heads.kv, [(0..dim, false), (0..0, false)]),
            Makes::Queries { rope } => (heads.q, [(0..dim - rope, false), (dim - rope..dim, true)]),
            Makes::KeysValues { rope } => (heads.kv, [(0..dim - rope, false), (0..0, false)]),
        };
        let each = match self {
            Makes::KeysValues { rope } => dim - rope + heads.value_dim,
            _ => dim,
        };
        (0..count).flat_map(move |head| {
            // Of packed ones the keys' heads follow the queries'.
            let key = if head < heads.q { head / group } else { head - heads.q };
            let at = head * each;
            parts.clone().into_iter().filter(|(of, _)| !of.is_empty()).map(move |(of, alone)| Scaled {
                rows: at + of.start..at + of.end,
                heads: key * group..(key + 1) * group,
                alone,
            })
        })
    }
}

/// Refuses what has no scores that scaling projections bounds.
pub(crate) fn check(request: &Request<'_>) -> Result<()> {
    let ModelSpec { qk_norm, sinks, .. } = request.model;
    if request.recipe.qk_clip == 0.0 {
        return Ok(());
    }
    let why = match (qk_norm, sinks) {
        (true, _) => "with model.qk_norm, which undoes what scales queries and keys",
        (_, true) => "with model.sinks, which are scores that no projection makes",
        _ => return Ok(()),
    };
    Err(Error::user(format!("optim.qk_clip {why}")).hint("set optim.qk_clip=0"))
}
