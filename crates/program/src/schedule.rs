//! What a rank runs when: its stage's order of work, and a chunk's ops cut into the passes that the order names.

use std::collections::HashMap;

use spec::Zero;

use crate::buffer::BufferId;
use crate::derive::Both;
use crate::graph::{Graph, Node, Phase};
use crate::op::Op;
use crate::pipeline::{Pass, Work, in_flight, order};
use crate::rank::Rank;
use crate::zero::Sums;
use crate::{Block, BlockWork, Bucket, Item, step};

/// The order of work of one rank.
pub(crate) struct Schedule {
    order: Vec<Work>,
    /// Weight gradients are a pass of their own.
    split: bool,
    /// Micro-batches in flight at most, by chunk.
    pub(crate) slots: Vec<usize>,
}

/// A chunk's ops by pass, over the values of one graph, whose own nodes are gone.
#[derive(Default)]
pub(crate) struct Passes {
    pub(crate) graph: Graph,
    pub(crate) lists: Vec<Vec<Node>>,
    pub(crate) sums: Sums,
}

impl Passes {
    /// All of a graph's ops in one pass.
    pub(crate) fn one(mut graph: Graph) -> Passes {
        let lists = vec![std::mem::take(&mut graph.nodes)];
        Passes { graph, lists, sums: Sums::default() }
    }
}

impl Schedule {
    pub(crate) fn of(cx: &Rank<'_>) -> Schedule {
        let l = &cx.layout;
        let order = match cx.generates() {
            true => Vec::new(),
            false => order(l.schedule, cx.coords.pp, l.pp, l.chunks, cx.micro_batches()),
        };
        let split = order.iter().any(|w| w.pass == Pass::Weight);
        Schedule { slots: in_flight(&order, l.chunks), order, split }
    }

    /// Forward, backward and, where the order has them apart, weight gradients.
    pub(crate) fn passes(&self, both: Both) -> Passes {
        let Both { mut graph, backward, .. } = both;
        let mut lists = vec![std::mem::take(&mut graph.nodes)];
        if self.split {
            let (weight, input) = backward.into_iter().partition(|n| n.phase == Phase::Weight);
            lists.extend([input, weight]);
        } else {
            lists.push(backward);
        }
        Passes { graph, lists, sums: Sums::default() }
    }
}

/// The blocks of a program as they are made, and which one each piece of work runs.
#[derive(Default)]
pub(crate) struct Blocks {
    pub(crate) list: Vec<Block>,
    /// By chunk and pass; apart for the last micro-batch, where reductions begin.
    of: HashMap<(usize, Pass, bool), usize>,
}

impl Blocks {
    /// Adds a block and returns its index.
    pub(crate) fn push(&mut self, name: String, chunk: usize, work: BlockWork, ops: Vec<Op>) -> usize {
        self.list.push(Block { name, chunk, work, ops });
        self.list.len() - 1
    }

    /// Adds the passes of a chunk.
    pub(crate) fn train(&mut self, cx: &Rank<'_>, c: usize, lists: Vec<Vec<Op>>, buckets: &[Bucket]) {
        let names = [(Pass::Forward, "f"), (Pass::Backward, "b"), (Pass::Weight, "w")];
        let mut done_in: HashMap<BufferId, usize> = HashMap::new();
        for (i, ops) in lists.iter().enumerate() {
            done_in.extend(ops.iter().flat_map(|op| &op.grads).map(|g| (g.sum, i)));
        }
        for (i, ops) in lists.into_iter().enumerate() {
            let (pass, letter) = names[i];
            if pass != Pass::Forward && cx.reduces() && cx.layout.zero < Zero::Gradients {
                let here = |b: BufferId| done_in.get(&b).is_none_or(|&pass| pass <= i);
                let last = step::with_reductions(&ops, cx, buckets, &here);
                let block = self.push(format!("{letter}{c}.last"), c, BlockWork::TrainLast(pass), last);
                self.of.insert((c, pass, true), block);
            }
            let block = self.push(format!("{letter}{c}"), c, BlockWork::Train(pass), ops);
            self.of.insert((c, pass, false), block);
        }
    }

    /// The order of work by block.
    pub(crate) fn items(&self, cx: &Rank<'_>, schedule: &Schedule) -> Vec<Item> {
        let block = |w: &Work| {
            let last = w.micro_batch + 1 == cx.micro_batches();
            self.of.get(&(w.chunk, w.pass, last)).unwrap_or_else(|| &self.of[&(w.chunk, w.pass, false)])
        };
        schedule.order.iter().map(|w| Item { block: *block(w), micro_batch: w.micro_batch }).collect()
    }
}
