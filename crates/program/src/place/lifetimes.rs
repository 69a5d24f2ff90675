//! From which op to which a value is needed, and which values share bytes.

use crate::graph::{Graph, Node, Source};
use crate::op::OpKind;

/// From which op to which each value is needed, and which values share bytes.
pub(crate) struct Lifetimes {
    pub(crate) root: Vec<usize>,
    pub(crate) span: Vec<Option<(usize, usize)>>,
    /// First node of each pass, and one past the last.
    pub(crate) starts: Vec<usize>,
    /// How many nodes before each one become ops: a fork is none.
    ops_before: Vec<usize>,
}

impl Lifetimes {
    pub(crate) fn of(g: &Graph, passes: &[Vec<Node>]) -> Lifetimes {
        let mut starts = vec![0];
        for p in passes {
            starts.push(starts[starts.len() - 1] + p.len());
        }
        let nodes: Vec<&Node> = passes.iter().flatten().collect();
        let mut ops_before = vec![0];
        ops_before.extend(nodes.iter().scan(0, |ops, n| {
            *ops += usize::from(!matches!(n.kind, OpKind::Fork { .. }));
            Some(*ops)
        }));
        let mut last = vec![0; g.values.len()];
        for (at, n) in nodes.iter().enumerate() {
            for o in n.ins.iter().chain(&n.acc) {
                last[o.value.0 as usize] = at;
            }
        }
        let mut root: Vec<usize> = (0..g.values.len()).collect();
        let mut span: Vec<Option<(usize, usize)>> = vec![None; g.values.len()];
        for (at, n) in nodes.iter().enumerate() {
            if let Some(out) = n.outs.first() {
                let from = if n.kind.in_place() || matches!(n.kind, OpKind::Fork { .. }) {
                    n.ins.first()
                } else {
                    n.acc.as_ref().filter(|a| last[a.value.0 as usize] == at)
                };
                if let Some(from) = from
                    && g.get(from.value).source == Source::Node
                {
                    root[out.value.0 as usize] = root[from.value.0 as usize];
                }
            }
            for o in n.ins.iter().chain(&n.acc).chain(&n.outs) {
                let r = root[o.value.0 as usize];
                span[r] = Some(span[r].map_or((at, at), |(birth, _)| (birth, at)));
            }
        }
        Lifetimes { root, span, starts, ops_before }
    }

    /// First and last op, counted over the passes, of a value that is needed from one node to another.
    pub(crate) fn ops(&self, (birth, death): (usize, usize)) -> (usize, usize) {
        (self.ops_before[birth], self.ops_before[death + 1] - 1)
    }

    pub(crate) fn block(&self, at: usize) -> usize {
        self.starts.iter().rposition(|&s| s <= at).unwrap_or(0)
    }
}
