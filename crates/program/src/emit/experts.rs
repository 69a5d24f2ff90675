use spec::{DType, ExpertRows, Experts};

use super::Emitter;
use crate::graph::{Operand, Source, ValueId};
use crate::op::{Axis, OpKind};
use crate::role::Role;

impl Emitter<'_> {
    /// `residual + experts(h)`: route, send copies of tokens to their experts, multiply by group, bring them back.
    ///
    /// Each tensor-parallel rank routes its own share of the tokens, experts are whole: under sequence parallelism that
    /// share is what the rank holds anyway, else it is sliced out and the outcome gathered. Shapes are static: a rank that
    /// alone holds all experts gets exactly `n k` rows for the `n` tokens that it routes. Where experts are spread it has
    /// room for all rows that can come (each of `ep` ranks may send each token to `min(k, experts held)` of them), or for
    /// an even share.
    pub(super) fn experts(&mut self, name: &str, e: &Experts, h: ValueId, residual: ValueId) -> ValueId {
        let p = |s: &str| format!("{name}.{s}");
        let residual = match e.shared_ffn {
            0 => residual,
            ffn => self.mlp((Role::SharedUp, Role::SharedDown), &p("shared"), ffn, h, residual),
        };
        let cx = self.cx;
        let sliced = cx.layout.tp > 1 && !cx.sequence_parallel();
        let x = if sliced { self.slice(&p("slice"), h) } else { h };
        let (rows, hidden) = (self.g.get(x).rows, cx.model.hidden);
        let (copies, local) = (rows * e.top_k, e.count / cx.layout.ep);
        let spread = cx.layout.ep > 1 && cx.layout.expert_rows == ExpertRows::All;
        let room = if spread { cx.layout.ep * rows * e.top_k.min(local) } else { copies };

        let [gates, index, counts] = self.route(name, e, x);
        let mut y = self.act(&p("permute"), copies, hidden);
        let (ins, outs) = (vec![self.g.all(x), index], vec![self.g.all(y)]);
        self.push(OpKind::Permute { top_k: e.top_k }, &p("permute"), ins, outs);
        let mut held = counts;
        if cx.layout.ep > 1 {
            let leaves = self.g.get(counts.value).cols;
            let arrived = self.g.value(&p("dispatch.counts"), e.count, leaves, DType::U32, Source::Node);
            held = self.g.all(arrived);
            let sent = self.act(&p("dispatch"), room, hidden);
            let (ins, outs) = (vec![self.g.all(y), counts], vec![self.g.all(sent), held]);
            self.push(OpKind::AllToAll { axis: Axis::Ep }, &p("dispatch"), ins, outs);
            y = sent;
        }

        let gated = cx.model.activation.gated();
        let (up, cols) = if gated { ("experts.gate_up", 2 * e.ffn) } else { ("experts.up", e.ffn) };
        for (role, part, cols) in [(Role::ExpertUp, up, cols), (Role::ExpertDown, "experts.down", hidden)] {
            if role == Role::ExpertDown {
                y = self.activation(&p("experts.act"), y, e.ffn);
                self.last().ins.push(held);
            }
            let out = self.act(&p(part), room, cols);
            let mut ins = vec![self.g.all(y), self.weight(role), held];
            ins.extend(self.param(role, true));
            let outs = vec![self.g.all(out)];
            self.push(OpKind::GroupedLinear { experts: local, rows: copies }, &p(part), ins, outs);
            y = out;
        }

        if cx.layout.ep > 1 {
            let back = self.act(&p("combine"), copies, hidden);
            let (ins, outs) = (vec![self.g.all(y), held, counts], vec![self.g.all(back)]);
            self.push(OpKind::AllToAll { axis: Axis::Ep }, &p("combine"), ins, outs);
            y = back;
        }
        let out = self.act(&p("unpermute"), rows, hidden);
        let (ins, outs) = (vec![self.g.all(y), gates, index], vec![self.g.all(out)]);
        self.push(OpKind::Unpermute { top_k: e.top_k }, &p("unpermute"), ins, outs);
        let mut whole = out;
        if sliced {
            whole = self.act(&p("unslice"), cx.tokens(), hidden);
            let (ins, outs) = (vec![self.g.all(out)], vec![self.g.all(whole)]);
            self.push(OpKind::Unslice { axis: Axis::Tp }, &p("unslice"), ins, outs);
        }
        if self.dropout > 0.0 {
            return self.dropped(&p("drop"), whole, None, Some(residual));
        } else if !sliced {
            self.last().acc = Some(self.g.all(residual));
            return out;
        }
        let sum = self.g.like(residual, &p("add"));
        let (ins, outs) = (vec![self.g.all(residual), self.g.all(whole)], vec![self.g.all(sum)]);
        self.push(OpKind::Add, &p("add"), ins, outs);
        sum
    }

    /// Which experts the rows of `x` go to: gates, where copies go, and how many come to each expert.
    fn route(&mut self, name: &str, e: &Experts, x: ValueId) -> [Operand; 3] {
        let p = |s: &str| format!("{name}.{s}");
        let (cx, rows) = (self.cx, self.g.get(x).rows);
        let logits = self.linear(Role::Router, &p("router"), x, e.count);
        let gates = self.stat(&p("route"), rows, e.top_k);
        // Whole sequences are counted one by one: leaves of the sum over them are experts' gradients of one.
        let whole = rows == cx.tokens() && !cx.generates();
        let leaves = if whole { cx.layout.micro_batch } else { 1 };
        let index = self.g.value(&p("route.index"), rows, 2 * e.top_k, DType::U32, Source::Node);
        let counts = self.g.value(&p("route.counts"), e.count, leaves, DType::U32, Source::Node);
        let routed = [gates, index, counts].map(|v| self.g.all(v));
        let mut ins = vec![self.g.all(logits)];
        if let (true, Some(layer)) = (e.router.expert_bias, cx.layer_of(self.g.place)) {
            let rows = cx.model.all_layers();
            let biases = self.g.value("expert_bias", rows, e.count, DType::F32, Source::ExpertBias);
            ins.push(Operand { value: biases, row0: layer, rows: 1 });
        }
        self.push(OpKind::Route { top_k: e.top_k, router: e.router }, &p("route"), ins, routed.to_vec());
        routed
    }

    /// This rank's share of rows that every tensor-parallel rank holds.
    fn slice(&mut self, name: &str, x: ValueId) -> ValueId {
        let (rows, cols) = (self.g.get(x).rows, self.g.get(x).cols);
        self.moved(OpKind::Slice { axis: Axis::Tp }, name, x, (rows / self.cx.layout.tp, cols))
    }
}
