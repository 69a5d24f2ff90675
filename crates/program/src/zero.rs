//! The passes of ZeRO: gather parameters before their use, scatter gradients once a bucket is complete.

use std::collections::{HashMap, HashSet};

use spec::DType;

use crate::NORM_CHUNK;
use crate::buffer::{BufferId, Owned};
use crate::emit::Context;
use crate::graph::{Graph, Node, Operand, Phase, Source, ValueId};
use crate::lower::Lower;
use crate::op::OpKind;
use crate::params::GroupId;
use crate::role::Place;

/// The run of elements of a group that the rank `index` of `replicas` updates ([`crate::Coords::replicas`]): whole norm
/// chunks, as even as possible.
pub fn owned(len: usize, replicas: usize, index: usize) -> Owned {
    let chunks = len.div_ceil(NORM_CHUNK);
    let at = |i: usize| (chunks * i / replicas * NORM_CHUNK).min(len);
    Owned { first: at(index), count: at(index + 1) - at(index) }
}

impl Lower<'_> {
    /// Gradients of one micro-batch become values, reduced and scattered as soon as their bucket is complete.
    pub(crate) fn scatter_grads(&self, g: &mut Graph, passes: &mut [Vec<Node>], sums: &mut Sums) {
        for n in passes.iter_mut().flatten() {
            for &group in &n.grads {
                let of = &self.cx.groups[group.0 as usize];
                let buffer = self.grad_buffer(group, is_head(n));
                let levels = self.levels_of(n.sequences.count);
                let v = *sums.whole.entry(buffer).or_insert_with(|| {
                    let name = format!("{}.micro_batch", of.name);
                    g.place = of.key.place;
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
            let ins: Vec<Operand> = values.iter().map(|v| g.all(*v)).collect();
            let node = |kind: OpKind, name: &str| {
                let name = format!("grads.bucket{bucket}.{name}");
                Node::new(kind, name, ins.clone(), Vec::new(), Phase::Weight, Place::Step)
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

/// Whether a weight gradient is the output projection's: the only matrix of the head.
pub(crate) fn is_head(n: &Node) -> bool {
    n.place == Place::Head && n.kind == OpKind::LinearGradWeight
}

/// The parameters that are gathered together: a layer's, its experts', the embedding's, the head's.
struct Unit {
    number: usize,
    groups: Vec<GroupId>,
    /// The first op of the pass that needs one of them.
    first_use: usize,
}

/// Gathers the parameters of each unit one unit before their first use in a pass.
pub(crate) fn gather_params(g: &mut Graph, mut nodes: Vec<Node>, cx: &Context<'_>) -> Vec<Node> {
    let mut fresh: HashMap<GroupId, ValueId> = HashMap::new();
    let mut units: Vec<Unit> = Vec::new();
    let mut known: HashMap<usize, usize> = HashMap::new();
    for (at, n) in nodes.iter_mut().enumerate() {
        for o in &mut n.ins {
            let Source::Param(id) = g.get(o.value).source else { continue };
            let group = &cx.groups[id.0 as usize];
            o.value = *fresh.entry(id).or_insert_with(|| {
                let unit = *known.entry(group.unit).or_insert_with(|| {
                    units.push(Unit { number: group.unit, groups: Vec::new(), first_use: at });
                    units.len() - 1
                });
                units[unit].groups.push(id);
                g.place = group.key.place;
                g.value(&format!("{}.gathered", group.name), group.rows, group.cols, cx.dtype, Source::Node)
            });
        }
    }
    let comm = |kind: OpKind, name: String, unit: &Unit, at: &Node| {
        let outs = unit.groups.iter().map(|id| g.all(fresh[id])).collect();
        let name = format!("{name}.{}", phase_letter(at));
        let place = cx.groups[unit.groups[0].0 as usize].key.place;
        Node::new(kind, name, Vec::new(), outs, at.phase, place)
    };
    let mut out = Vec::with_capacity(nodes.len() + 2 * units.len());
    // Units come in the order of their first use.
    let (mut gathered, mut awaited) = (0, 0);
    for (at, n) in nodes.into_iter().enumerate() {
        while gathered < units.len() && at == units[gathered.saturating_sub(1)].first_use {
            let unit = &units[gathered];
            let kind = OpKind::GatherParams { unit: unit.number, groups: unit.groups.clone() };
            out.push(comm(kind, format!("gather.{}", unit.number), unit, &n));
            gathered += 1;
        }
        while awaited < units.len() && at == units[awaited].first_use {
            let unit = &units[awaited];
            let kind = OpKind::WaitParams { unit: unit.number };
            out.push(comm(kind, format!("gather.{}.wait", unit.number), unit, &n));
            awaited += 1;
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
