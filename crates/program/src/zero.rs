//! The passes of ZeRO: gather parameters before their use, scatter gradients once a bucket is complete.

use std::collections::{HashMap, HashSet};

use spec::DType;

use crate::emit::Context;
use crate::graph::{Graph, Node, Operand, Phase, Source, ValueId};
use crate::lower::Lower;
use crate::op::OpKind;
use crate::params::GroupId;
use crate::{BufferId, NORM_CHUNK};

/// The run of elements of a group that the rank `index` of `replicas` updates ([`crate::Coords::replicas`]): whole norm
/// chunks, as even as possible.
pub fn owned(len: usize, replicas: usize, index: usize) -> (usize, usize) {
    let chunks = len.div_ceil(NORM_CHUNK);
    let at = |i: usize| (chunks * i / replicas * NORM_CHUNK).min(len);
    (at(index), at(index + 1) - at(index))
}

impl Lower<'_> {
    /// Gradients of one micro-batch become values, reduced and scattered as soon as their bucket is complete.
    pub(crate) fn scatter_grads(&self, g: &mut Graph, passes: &mut [Vec<Node>], sums: &mut Sums) {
        for n in passes.iter_mut().flatten() {
            for &group in &n.grads {
                let of = &self.cx.groups[group.0 as usize];
                let buffer = self.grad_buffer(group, is_head(n));
                let levels = self.levels_of(n.leaves.1);
                let v = *sums.whole.entry(buffer).or_insert_with(|| {
                    let name = format!("{}.micro_batch", of.name);
                    g.value(&name, levels * of.rows, of.cols, DType::F32, Source::Node)
                });
                sums.hidden.insert(v);
                n.outs.push(g.all(v));
            }
        }
        for (bucket, b) in self.bucket_list.iter().enumerate() {
            let values: Vec<ValueId> =
                b.grads.iter().filter_map(|(_, id)| sums.whole.get(id).copied()).collect();
            let uses = |n: &Node| n.outs.iter().any(|o| values.contains(&o.value));
            let Some(pass) = passes.iter().rposition(|p| p.iter().any(uses)) else { continue };
            let at = passes[pass].iter().rposition(uses).map_or(0, |i| i + 1);
            let unit = passes[pass][at - 1].unit;
            let ins: Vec<Operand> = values.iter().map(|v| g.all(*v)).collect();
            let node = |kind: OpKind, name: &str| Node {
                kind,
                name: format!("grads.bucket{bucket}.{name}"),
                ins: ins.clone(),
                acc: None,
                outs: Vec::new(),
                grads: Vec::new(),
                leaves: (0, 0),
                phase: Phase::Weight,
                unit,
            };
            let nodes = [
                node(OpKind::ReduceGrads { bucket, scatter: true }, "reduce"),
                node(OpKind::ShardGrads { bucket }, "shard"),
            ];
            passes[pass].splice(at..at, nodes);
        }
    }
}

/// Gradient buffers that are values of a block.
#[derive(Default)]
pub(crate) struct Sums {
    /// Gradients of one micro-batch, by the static buffer that they end in (ZeRO 2 and 3).
    pub(crate) whole: HashMap<BufferId, ValueId>,
    /// The same: written by weight-gradient ops besides their outputs.
    pub(crate) hidden: HashSet<ValueId>,
}

/// Whether a weight gradient is the output projection's.
pub(crate) fn is_head(n: &Node) -> bool {
    n.name.starts_with("head.")
}

/// Gathers the parameters of a unit (a layer, its experts, the embedding, the head) one unit before their first use in a pass.
pub(crate) fn gather_params(g: &mut Graph, nodes: Vec<Node>, cx: &Context<'_>) -> Vec<Node> {
    let mut fresh: HashMap<GroupId, ValueId> = HashMap::new();
    let mut units: Vec<(usize, Vec<GroupId>)> = Vec::new();
    let mut first_use: Vec<usize> = Vec::new();
    let mut nodes = nodes;
    for (at, n) in nodes.iter_mut().enumerate() {
        for o in &mut n.ins {
            let Source::Param(id) = g.get(o.value).source else { continue };
            let group = &cx.groups[id.0 as usize];
            let v = *fresh.entry(id).or_insert_with(|| {
                match units.iter_mut().find(|(u, _)| *u == group.unit) {
                    Some((_, ids)) => ids.push(id),
                    None => {
                        units.push((group.unit, vec![id]));
                        first_use.push(at);
                    }
                }
                g.value(&format!("{}.gathered", group.name), group.rows, group.cols, cx.dtype, Source::Node)
            });
            o.value = v;
        }
    }
    let comm = |g: &Graph, kind: OpKind, name: &str, ids: &[GroupId], at: &Node| Node {
        kind,
        name: format!("{name}.{}", phase_letter(at)),
        ins: Vec::new(),
        acc: None,
        outs: ids.iter().map(|id| g.all(fresh[id])).collect(),
        grads: Vec::new(),
        leaves: (0, 0),
        phase: at.phase,
        unit: at.unit,
    };
    let mut out = Vec::new();
    for (at, n) in nodes.into_iter().enumerate() {
        for (i, (unit, ids)) in units.iter().enumerate() {
            if at == first_use[i.saturating_sub(1)] {
                let gather = OpKind::GatherParams { unit: *unit, groups: ids.clone() };
                out.push(comm(g, gather, &format!("gather.{unit}"), ids, &n));
            }
        }
        for (i, (unit, ids)) in units.iter().enumerate() {
            if at == first_use[i] {
                out.push(comm(
                    g,
                    OpKind::WaitParams { unit: *unit },
                    &format!("gather.{unit}.wait"),
                    ids,
                    &n,
                ));
            }
        }
        out.push(n);
    }
    out
}

fn phase_letter(n: &Node) -> char {
    match n.phase {
        Phase::Forward => 'f',
        Phase::Input => 'b',
        Phase::Weight => 'w',
    }
}
