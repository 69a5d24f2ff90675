//! The passes of ZeRO: gather parameters before their use, scatter gradients once a bucket is complete.

use std::collections::{HashMap, HashSet};

use spec::{DType, Zero};

use crate::NORM_CHUNK;
use crate::buffer::{BufferId, Owned};
use crate::graph::{Graph, Node, Operand, Phase, Source, ValueId};
use crate::op::{GradSum, OpKind};
use crate::params::GroupId;
use crate::place::Placer;
use crate::rank::Rank;
use crate::role::Place;
use crate::schedule::Passes;

/// The run of elements of a group that the rank `index` of `shards` updates ([`crate::Coords::shards`]): whole norm
/// chunks, as even as possible.
pub fn owned(len: usize, shards: usize, index: usize) -> Owned {
    let chunks = len.div_ceil(NORM_CHUNK);
    let at = |i: usize| (chunks * i / shards * NORM_CHUNK).min(len);
    Owned { first: at(index), count: at(index + 1) - at(index) }
}

/// Gathers parameters before each pass needs them and scatters gradients of every micro-batch, where the layout's ZeRO
/// stage says so.
pub(crate) fn shard(cx: &Rank<'_>, placer: &Placer<'_>, mut passes: Passes) -> Passes {
    if cx.layout.zero >= Zero::Parameters {
        let g = &mut passes.graph;
        passes.lists = passes.lists.into_iter().map(|p| gather_params(g, p, cx)).collect();
    }
    if cx.layout.zero >= Zero::Gradients {
        scatter_grads(placer, &mut passes);
    }
    passes
}

/// Gradients of one micro-batch become values, reduced and scattered as soon as their bucket is complete.
fn scatter_grads(placer: &Placer<'_>, passes: &mut Passes) {
    let Passes { graph: g, lists, sums } = passes;
    // The last op that adds to each gradient.
    let mut last: HashMap<BufferId, (usize, usize)> = HashMap::new();
    for (pass, nodes) in lists.iter_mut().enumerate() {
        for (at, n) in nodes.iter_mut().enumerate() {
            for &group in &n.grads {
                let of = &placer.cx.groups[group.0 as usize];
                let buffer = placer.grad_buffer(group, is_head(n));
                let levels = placer.streams(of.replication) * placer.levels_of(of, n.sequences.count);
                let v = *sums.whole.entry(buffer).or_insert_with(|| {
                    let name = format!("{}.micro_batch", of.name);
                    g.place = of.key.place;
                    g.value(&name, levels * of.rows, of.cols, DType::F32, Source::Node)
                });
                sums.hidden.insert(v);
                n.outs.push(g.all(v));
                last.insert(buffer, (pass, at));
            }
        }
    }
    let mut after: HashMap<(usize, usize), Vec<Node>> = HashMap::new();
    for (bucket, b) in placer.buckets.iter().enumerate() {
        let Some(&at) = b.grads.iter().filter_map(|(_, id)| last.get(id)).max() else { continue };
        let values = b.grads.iter().filter_map(|(_, id)| sums.whole.get(id));
        let ins: Vec<Operand> = values.map(|v| g.all(*v)).collect();
        let node = |kind: OpKind, name: &str| {
            let name = format!("grads.bucket{bucket}.{name}");
            Node::new(kind, name, ins.clone(), Vec::new(), Phase::Weight, Place::Step)
        };
        let behind = after.entry(at).or_default();
        // Experts that no other rank holds are not sharded.
        if placer.cx.shards(b.replication).0 > 1 {
            behind.push(node(OpKind::ReduceGrads { bucket, sum: GradSum::Scattered }, "reduce"));
        }
        behind.push(node(OpKind::ShardGrads { bucket }, "shard"));
    }
    for (pass, nodes) in lists.iter_mut().enumerate() {
        let with = std::mem::take(nodes).into_iter().enumerate().flat_map(|(at, n)| {
            let behind = after.remove(&(pass, at)).unwrap_or_default();
            std::iter::once(n).chain(behind)
        });
        *nodes = with.collect();
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

/// Whether a weight gradient is of a table as the head has it: the output projection's, the only matrix of the head, or
/// that of embeddings looked up behind it.
pub(crate) fn is_head(n: &Node) -> bool {
    match n.kind {
        OpKind::LinearGradWeight => n.place == Place::Head,
        OpKind::EmbedGrad { .. } => n.place == Place::Mtp,
        _ => false,
    }
}

/// The parameters that are gathered together: a layer's, its experts', the embedding's, the head's.
struct Unit {
    number: usize,
    groups: Vec<GroupId>,
    /// The first op of the pass that needs one of them.
    first_use: usize,
}

/// Gathers the parameters of each unit one unit before their first use in a pass.
fn gather_params(g: &mut Graph, mut nodes: Vec<Node>, cx: &Rank<'_>) -> Vec<Node> {
    let mut fresh: HashMap<GroupId, ValueId> = HashMap::new();
    let mut units: Vec<Unit> = Vec::new();
    let mut known: HashMap<usize, usize> = HashMap::new();
    for (at, n) in nodes.iter_mut().enumerate() {
        for o in &mut n.ins {
            let Source::Param(id) = g.get(o.value).source else { continue };
            let group = &cx.groups[id.0 as usize];
            // What nobody else holds is there already.
            if cx.shards(group.replication).0 == 1 {
                continue;
            }
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
