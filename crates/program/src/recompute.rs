//! Forward ops that run again in the backward pass instead of leaving their outputs behind.

use std::collections::{HashMap, HashSet};

use spec::Recompute;

use crate::derive::Both;
use crate::graph::{Graph, Node, Phase, ValueId};
use crate::op::OpKind;
use crate::rank::Rank;
use crate::role::Place;

/// Puts copies of forward ops in front of the backward ops that need values which the policy does not keep.
pub(crate) fn recompute(cx: &Rank<'_>, both: Both) -> Both {
    let policy = cx.layout.recompute;
    if policy == Recompute::None {
        return both;
    }
    let Both { mut graph, backward, boundaries } = both;
    let kept: HashSet<ValueId> = boundaries.iter().copied().collect();
    let mut producer: HashMap<ValueId, usize> = HashMap::new();
    for (i, n) in graph.nodes.iter().enumerate() {
        for out in &n.outs {
            let kept = match policy {
                Recompute::Full => kept.contains(&out.value) || is_tail(&graph, n),
                _ => !matches!(
                    n.kind,
                    OpKind::Norm { .. }
                        | OpKind::LatentNorm { .. }
                        | OpKind::SwiGlu { .. }
                        | OpKind::Gelu { .. }
                        | OpKind::Rows { .. }
                ),
            };
            if !kept && !matches!(n.kind, OpKind::Recv { .. }) {
                producer.insert(out.value, i);
            }
        }
    }
    let mut r = Rerun { g: &mut graph, producer, renamed: HashMap::new(), out: Vec::new() };
    for mut node in backward {
        for operand in node.ins.iter_mut().chain(node.acc.iter_mut()) {
            operand.value = r.again(operand.value);
        }
        r.out.push(node);
    }
    let backward = r.out;
    Both { graph, backward, boundaries }
}

/// The final norm and what follows: its output is the loss's input and is used at once.
fn is_tail(g: &Graph, n: &Node) -> bool {
    let ends = |last: &Node| matches!(last.place, Place::Head | Place::Mtp);
    n.place == Place::Head && g.nodes.last().is_some_and(ends)
}

struct Rerun<'a> {
    g: &'a mut Graph,
    producer: HashMap<ValueId, usize>,
    renamed: HashMap<ValueId, ValueId>,
    out: Vec<Node>,
}

impl Rerun<'_> {
    fn again(&mut self, value: ValueId) -> ValueId {
        if let Some(&v) = self.renamed.get(&value) {
            return v;
        }
        let Some(&at) = self.producer.get(&value) else { return value };
        let mut node = self.g.nodes[at].clone();
        for operand in node.ins.iter_mut().chain(node.acc.iter_mut()) {
            operand.value = self.again(operand.value);
        }
        node.name.push_str(".again");
        node.phase = Phase::Input;
        self.g.place = node.place;
        for out in &mut node.outs {
            let fresh = self.g.like(out.value, &node.name);
            self.renamed.insert(out.value, fresh);
            out.value = fresh;
        }
        self.out.push(node);
        self.renamed[&value]
    }
}
