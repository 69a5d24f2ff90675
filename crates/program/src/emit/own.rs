//! What layers of one's own need beyond what the model's layers are made of.

use spec::{Layout, ModelSpec};

use super::Emitter;
use crate::graph::ValueId;
use crate::op::OpKind;
use crate::rows::RowFn;

/// Emits layer `usize` on a residual stream, and gives what it becomes: a value of the same shape. Called for every layer
/// of a rank, as often as its ops are wanted.
///
/// Names of ops must differ; those of [`Emitter::layer`] begin with `layers.{i}.`.
pub type Layer<'a> = &'a (dyn Fn(&mut Emitter<'_>, usize, ValueId) -> ValueId + 'a);

impl Emitter<'_> {
    /// The model whose parameters layers use.
    pub fn model(&self) -> &ModelSpec {
        self.cx.model
    }

    /// How the step is spread: matrices that are cut over tp have a `tp`-th of their columns here.
    pub fn layout(&self) -> &Layout {
        &self.cx.layout
    }

    /// `x + y`, of values of one shape.
    pub fn add(&mut self, name: &str, x: ValueId, y: ValueId) -> ValueId {
        let sum = self.g.like(x, name);
        let (ins, outs) = (vec![self.g.all(x), self.g.all(y)], vec![self.g.all(sum)]);
        self.push(OpKind::Add, name, ins, outs);
        sum
    }

    /// A function of each row, to `cols` columns, with the derivative that it brings along. Runs on CPUs.
    pub fn rows(&mut self, of: RowFn, name: &str, x: ValueId, cols: usize) -> ValueId {
        let rows = self.g.get(x).rows;
        self.moved(OpKind::Rows { of }, name, x, (rows, cols))
    }
}
