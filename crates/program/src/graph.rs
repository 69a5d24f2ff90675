use spec::DType;

use crate::op::OpKind;
use crate::params::GroupId;
use crate::role::Place;

/// A tensor of a graph: written once, two dims.
#[derive(Clone, Debug)]
pub(crate) struct Value {
    pub(crate) name: String,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) dtype: DType,
    pub(crate) source: Source,
    pub(crate) place: Place,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A parameter group.
    Param(GroupId),
    /// Token ids of the micro-batch.
    Tokens,
    /// Targets of the micro-batch.
    Targets,
    /// The token behind each of the micro-batch's.
    NextTokens,
    /// The target behind each of the micro-batch's.
    NextTargets,
    /// Positions at which the documents of the micro-batch's tokens begin.
    Starts,
    /// One f64 sum of losses for each sequence of the step.
    LossLeaves,
    /// Biases that experts are chosen by, a row for each layer.
    ExpertBias,
    /// An op.
    Node,
}

/// A tensor while ops are emitted: index of a value in its graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32);

/// Some rows of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operand {
    pub(crate) value: ValueId,
    pub(crate) row0: usize,
    pub(crate) rows: usize,
}

/// When a node runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Forward.
    Forward,
    /// Gradients of activations, and recomputed forward ops.
    Input,
    /// Gradients of weights.
    Weight,
}

/// An op on values.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) kind: OpKind,
    pub(crate) name: String,
    pub(crate) ins: Vec<Operand>,
    /// Added to output 0.
    pub(crate) acc: Option<Operand>,
    pub(crate) outs: Vec<Operand>,
    /// Parameter groups whose gradients this node adds to.
    pub(crate) grads: Vec<GroupId>,
    /// Which sequences of the micro-batch a weight gradient covers.
    pub(crate) sequences: Sequences,
    pub(crate) phase: Phase,
    pub(crate) place: Place,
}

/// Some sequences of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequences {
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// How many such gradients each of them has, where not one, and which of them it is.
    pub(crate) turns: usize,
    pub(crate) turn: usize,
}

impl Node {
    /// An op without gradients.
    pub(crate) fn new(
        kind: OpKind,
        name: String,
        ins: Vec<Operand>,
        outs: Vec<Operand>,
        phase: Phase,
        place: Place,
    ) -> Node {
        let (acc, grads, sequences) = (None, Vec::new(), Sequences::default());
        Node { kind, name, ins, acc, outs, grads, sequences, phase, place }
    }
}

/// Ops of one chunk in program order, with the values that they read and write.
#[derive(Clone, Debug, Default)]
pub(crate) struct Graph {
    pub(crate) values: Vec<Value>,
    pub(crate) nodes: Vec<Node>,
    /// Where fresh values belong.
    pub(crate) place: Place,
}

impl Graph {
    pub(crate) fn value(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        dtype: DType,
        source: Source,
    ) -> ValueId {
        let place = self.place;
        self.values.push(Value { name: name.to_owned(), rows, cols, dtype, source, place });
        ValueId(u32::try_from(self.values.len() - 1).expect("a chunk has fewer than 2^32 values"))
    }

    pub(crate) fn get(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// All rows of a value.
    pub(crate) fn all(&self, id: ValueId) -> Operand {
        Operand { value: id, row0: 0, rows: self.get(id).rows }
    }

    /// A fresh value like `like`, written by a node.
    pub(crate) fn like(&mut self, like: ValueId, name: &str) -> ValueId {
        let (rows, cols, dtype) = {
            let v = self.get(like);
            (v.rows, v.cols, v.dtype)
        };
        self.value(name, rows, cols, dtype, Source::Node)
    }
}
