//! Rules for the ops of one chunk between the compiler's passes.

use std::collections::{HashMap, HashSet};

use spec::Result;

use super::shapes::{self, Shape};
use super::{Rule, Violation, accept};
use crate::derive::Both;
use crate::emit::Forward;
use crate::graph::{Graph, Node, Operand, Source, ValueId};
use crate::op::OpKind;
use crate::params::ParamGroup;
use crate::rank::Rank;
use crate::schedule::Passes;

/// Holds what a pass made to the rules, if asked to, and hands it on.
pub(crate) struct Check<'a> {
    pub(crate) on: bool,
    pub(crate) rank: &'a Rank<'a>,
}

impl Check<'_> {
    pub(crate) fn forward(&self, f: Forward) -> Result<Forward> {
        self.run("emit", &f.graph, &[&f.graph.nodes], &HashSet::new())?;
        Ok(f)
    }

    pub(crate) fn both(&self, pass: &str, b: Both) -> Result<Both> {
        self.run(pass, &b.graph, &[&b.graph.nodes, &b.backward], &HashSet::new())?;
        Ok(b)
    }

    pub(crate) fn passes(&self, pass: &str, p: Passes) -> Result<Passes> {
        let lists: Vec<&[Node]> = p.lists.iter().map(Vec::as_slice).collect();
        self.run(pass, &p.graph, &lists, &p.sums.hidden)?;
        Ok(p)
    }

    fn run(&self, pass: &str, g: &Graph, passes: &[&[Node]], added: &HashSet<ValueId>) -> Result<()> {
        let found = if self.on { check(g, passes, added, &self.rank.groups) } else { Vec::new() };
        accept(pass, &found)
    }
}

/// Every broken rule of a chunk's ops, run pass by pass over the values of one graph; several ops may add to the values
/// in `added`.
fn check(g: &Graph, passes: &[&[Node]], added: &HashSet<ValueId>, groups: &[ParamGroup]) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut written: HashMap<ValueId, Vec<(usize, usize)>> = HashMap::new();
    for n in passes.iter().copied().flatten() {
        let mut broken = |rule, what| found.push(Violation { rule, at: n.name.clone(), what });
        let operands = || n.ins.iter().chain(&n.acc).chain(&n.outs);
        if let Some(o) = operands().find(|o| o.value.0 as usize >= g.values.len()) {
            broken(Rule::Operands, format!("value {} of {}", o.value.0, g.values.len()));
            continue;
        }
        if let Some(o) = operands().find(|o| o.row0 + o.rows > g.get(o.value).rows) {
            let v = g.get(o.value);
            broken(Rule::Operands, format!("rows {}.. of {} with {}", o.row0 + o.rows, v.name, v.rows));
            continue;
        }
        let shapes = |list: &[Operand]| list.iter().map(|o| shape(g, o)).collect::<Vec<_>>();
        let grads: Vec<Shape> = n.grads.iter().map(|id| of_group(&groups[id.0 as usize])).collect();
        if let Err(what) = shapes::check(&n.kind, &shapes(&n.ins), &shapes(&n.outs), &grads) {
            broken(Rule::Shapes, what);
        }
        if let (Some(acc), Some(out)) = (&n.acc, n.outs.first())
            && shape(g, acc) != shape(g, out)
        {
            broken(Rule::Shapes, "what is added to and the output differ in shape".to_owned());
        }
        for o in n.ins.iter().chain(&n.acc).filter(|o| g.get(o.value).source == Source::Node) {
            let whole = written.get(&o.value).is_some_and(|rows| covers(rows, o.row0, o.row0 + o.rows));
            if !whole {
                broken(
                    Rule::ReadBeforeWrite,
                    format!("{} is read before it is written", g.get(o.value).name),
                );
            }
        }
        for o in n.outs.iter().filter(|o| g.get(o.value).source == Source::Node) {
            let rows = written.entry(o.value).or_default();
            let (from, to) = (o.row0, o.row0 + o.rows);
            // Gradients of a micro-batch are added to by several ops; a wait completes what a gather began.
            let adds = added.contains(&o.value) || matches!(n.kind, OpKind::WaitParams { .. });
            if !adds && rows.iter().any(|r| r.0 < to && from < r.1) {
                broken(Rule::OneWriter, format!("{} is written again", g.get(o.value).name));
            }
            rows.push((from, to));
        }
    }
    found
}

fn shape(g: &Graph, o: &Operand) -> Shape {
    let v = g.get(o.value);
    Shape { rows: o.rows, cols: v.cols, dtype: v.dtype }
}

fn of_group(group: &ParamGroup) -> Shape {
    Shape { rows: group.rows, cols: group.cols, dtype: spec::DType::F32 }
}

/// Whether runs of rows together cover one.
fn covers(rows: &[(usize, usize)], from: usize, to: usize) -> bool {
    let mut rows = rows.to_vec();
    rows.sort_unstable();
    let end = rows.iter().fold(from, |at, r| if r.0 <= at { at.max(r.1) } else { at });
    end >= to
}

#[cfg(test)]
mod tests {
    use spec::{DType, Layout, ModelSpec};

    use super::*;
    use crate::{Mode, Request, emit};

    /// Spoils the forward ops of a model and expects a rule to say so.
    fn broken(rule: Rule, spoil: impl FnOnce(&mut Graph)) {
        let (model, layout) = (ModelSpec::preset("tiny").expect("a preset"), Layout::default());
        let (precision, mode) = (DType::F32, Mode::Train);
        let request = Request {
            model: &model,
            layout: &layout,
            sequence: 16,
            sequences: 1,
            precision,
            rank: 0,
            mode,
            loss: Default::default(),
            recipe: Default::default(),
        };
        let rank = Rank::of(&request).expect("a rank");
        let mut g = emit::forward(&rank, &rank.chunks[0], true).graph;
        let check = |g: &Graph| check(g, &[&g.nodes], &HashSet::new(), &rank.groups);
        assert_eq!(check(&g), []);
        spoil(&mut g);
        let found = check(&g);
        assert!(found.iter().any(|v| v.rule == rule), "{rule:?} is not among {found:?}");
    }

    #[test]
    fn each_rule_catches_a_graph_that_breaks_it() {
        broken(Rule::OneWriter, |g| {
            let again = g.nodes[1].clone();
            g.nodes.push(again);
        });
        broken(Rule::ReadBeforeWrite, |g| g.nodes.swap(0, 1));
        broken(Rule::Operands, |g| g.nodes[1].ins[0].rows += 1);
        broken(Rule::Operands, |g| g.nodes[1].ins[0].value = ValueId(u32::MAX));
        broken(Rule::Shapes, |g| g.nodes[1].outs[0].rows -= 1);
        broken(Rule::Shapes, |g| {
            let out = g.nodes[1].outs[0];
            let wrong = g.value("wrong", out.rows, 1, DType::F32, Source::Node);
            let wrong = g.all(wrong);
            let add = g.nodes.iter_mut().find(|n| n.acc.is_some()).expect("a residual");
            add.acc = Some(wrong);
        });
    }
}
