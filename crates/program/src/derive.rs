use std::collections::HashMap;

use spec::{DType, Mtp, NormKind};

use crate::emit::Forward;
use crate::graph::{Graph, Node, Operand, Phase, Sequences, Source, ValueId};
use crate::heads::Heads;
use crate::op::{Axis, LossTerms, OpKind, Sees};
use crate::params::{Chunk, GroupId};
use crate::rank::Rank;
use crate::role::{Place, Role};

/// A chunk's forward and backward ops over the values of one graph.
pub(crate) struct Both {
    /// Its nodes are the forward ops.
    pub(crate) graph: Graph,
    pub(crate) backward: Vec<Node>,
    /// Values at layer boundaries, which full recompute keeps.
    pub(crate) boundaries: Vec<ValueId>,
}

/// Differentiates a chunk's forward ops: input gradients, each followed by the weight gradients that it frees.
///
/// Backward begins with the loss (for the last chunk), then comes the derivative of every forward op in reverse.
pub(crate) fn backward(cx: &Rank<'_>, chunk: &Chunk, forward: Forward) -> Both {
    let Forward { mut graph, input, output, mtp, boundaries } = forward;
    let forward = std::mem::take(&mut graph.nodes);
    let mut d = Derive { cx, g: &mut graph, out: Vec::new(), grads: HashMap::new() };
    if chunk.head {
        d.loss(output, mtp);
    } else {
        d.receive(chunk, output);
    }
    for node in forward.iter().rev() {
        d.g.place = node.place;
        d.node(node);
    }
    if !chunk.embed {
        d.send(chunk, input);
    }
    let backward = d.out;
    graph.nodes = forward;
    Both { graph, backward, boundaries }
}

/// A chunk's forward ops with the loss behind them, a few sequences at a time, without gradients.
pub(crate) fn evaluation(cx: &Rank<'_>, chunk: &Chunk, forward: Forward) -> Graph {
    let Forward { mut graph, output, .. } = forward;
    if chunk.head {
        graph.place = Place::Head;
        let mut d = Derive { cx, g: &mut graph, out: Vec::new(), grads: HashMap::new() };
        d.loss_ops(output, None, false);
        let loss = d.out;
        graph.nodes.extend(loss);
    }
    graph
}

/// A chunk's forward ops for one token, with its logits behind them.
pub(crate) fn generation(cx: &Rank<'_>, forward: Forward) -> Graph {
    let Forward { mut graph, output, .. } = forward;
    graph.place = Place::Head;
    let mut d = Derive { cx, g: &mut graph, out: Vec::new(), grads: HashMap::new() };
    let w = d.table();
    let logits = d.g.value("logits", 1, cx.vocab().1, cx.dtype, Source::Node);
    let (ins, outs) = (vec![d.g.all(output), w], vec![d.g.all(logits)]);
    let l = outs[0];
    d.push(OpKind::Linear, "head.decode".into(), ins, outs, Phase::Forward);
    d.soft_capped(l, "head.decode.cap".into(), Phase::Forward);
    let decode = d.out;
    graph.nodes.extend(decode);
    graph
}

/// What the output projection turns into logits, and what those are held to.
struct Head {
    name: &'static str,
    x: ValueId,
    targets: ValueId,
    terms: LossTerms,
    /// The gradient of `x`, if it is wanted.
    dx: Option<ValueId>,
}

struct Derive<'a> {
    cx: &'a Rank<'a>,
    g: &'a mut Graph,
    out: Vec<Node>,
    /// The gradient of a value, once its first contribution is known.
    grads: HashMap<ValueId, ValueId>,
}

impl Derive<'_> {
    fn push(
        &mut self,
        kind: OpKind,
        name: String,
        ins: Vec<Operand>,
        outs: Vec<Operand>,
        phase: Phase,
    ) -> &mut Node {
        self.out.push(Node::new(kind, name, ins, outs, phase, self.g.place));
        self.out.last_mut().expect("just pushed")
    }

    /// A weight-gradient op over all sequences of the micro-batch.
    fn weight(&mut self, kind: OpKind, name: String, ins: Vec<Operand>, params: &[Operand]) {
        let grads = params.iter().map(|p| self.group_of(*p)).collect();
        let count = self.cx.layout.micro_batch;
        let sequences = Sequences { first: 0, count, ..Sequences::default() };
        let node = self.push(kind, name, ins, vec![], Phase::Weight);
        node.grads = grads;
        node.sequences = sequences;
    }

    fn group_of(&self, param: Operand) -> GroupId {
        match self.g.get(param.value).source {
            Source::Param(id) => id,
            other => panic!("the gradient of {other:?} was asked for as a parameter's"),
        }
    }

    /// An op whose output 0 adds to the gradient of `x`.
    fn contribute(&mut self, kind: OpKind, name: String, ins: Vec<Operand>, x: ValueId) {
        let dx = self.g.like(x, &name);
        let acc = self.grads.insert(x, dx).map(|before| self.g.all(before));
        let out = self.g.all(dx);
        self.push(kind, name, ins, vec![out], Phase::Input).acc = acc;
    }

    /// An op that cannot accumulate, with one output for each of `xs`: a gradient of each. Those that have one already
    /// get the sum.
    fn contribute_each(&mut self, kind: OpKind, name: String, ins: Vec<Operand>, xs: &[ValueId]) {
        let fresh: Vec<ValueId> = xs.iter().map(|x| self.g.like(*x, &name)).collect();
        let outs = fresh.iter().map(|v| self.g.all(*v)).collect();
        self.push(kind, name.clone(), ins, outs, Phase::Input);
        for (i, (&x, &dx)) in xs.iter().zip(&fresh).enumerate() {
            let Some(before) = self.grads.insert(x, dx) else { continue };
            let sum = self.g.like(x, &format!("{name}.{i}.dsum"));
            let (ins, outs) = (vec![self.g.all(before), self.g.all(dx)], vec![self.g.all(sum)]);
            self.push(OpKind::Add, format!("{name}.{i}.dsum"), ins, outs, Phase::Input);
            self.grads.insert(x, sum);
        }
    }

    /// The gradient of `y` is also one of `x`: nothing to compute unless `x` already has one.
    fn pass(&mut self, y: ValueId, x: ValueId, name: &str) {
        let dy = self.grads[&y];
        if self.grads.contains_key(&x) {
            let before = self.grads[&x];
            let sum = self.g.like(x, &format!("{name}.dsum"));
            let (ins, outs) = (vec![self.g.all(before), self.g.all(dy)], vec![self.g.all(sum)]);
            self.push(OpKind::Add, format!("{name}.dsum"), ins, outs, Phase::Input);
            self.grads.insert(x, sum);
        } else {
            self.grads.insert(x, dy);
        }
    }

    /// Each op kind's own derivative; here of those with weights.
    fn node(&mut self, n: &Node) {
        use OpKind::*;
        let name = |suffix: &str| format!("{}.{suffix}", n.name);
        if let (Send { .. } | Recv { .. }, _) | (_, None) = (&n.kind, n.outs.first()) {
            return;
        }
        let y = n.outs[0].value;
        let dy = {
            let dy = *self.grads.get(&y).unwrap_or_else(|| panic!("{} has no gradient", n.name));
            self.g.all(dy)
        };
        match &n.kind {
            Linear => {
                let (x, w) = (n.ins[0], n.ins[1]);
                if let Some(acc) = n.acc {
                    self.pass(y, acc.value, &n.name);
                }
                self.contribute(LinearGradInput, name("dx"), vec![dy, w], x.value);
                self.weight(LinearGradWeight, name("dw"), vec![dy, x], &[w]);
                if let Some(b) = n.ins.get(2) {
                    self.weight(BiasGrad, name("db"), vec![dy], &[*b]);
                }
            }
            Add => {
                self.pass(y, n.ins[0].value, &n.name);
                self.pass(y, n.ins[1].value, &n.name);
                if let Some(b) = n.ins.get(2) {
                    self.weight(BiasGrad, name("db"), vec![dy], &[*b]);
                }
            }
            Norm { norm, .. } => {
                let (x, w, stats) = (n.ins[0], n.ins[1], n.outs[1]);
                let grad = NormGradInput { norm: *norm };
                self.contribute(grad, name("dx"), vec![dy, x, w, stats], x.value);
                let params: Vec<Operand> = match norm {
                    NormKind::Rms => vec![w],
                    NormKind::Layer => vec![w, n.ins[2]],
                };
                self.weight(NormGradWeight { norm: *norm }, name("dw"), vec![dy, x, stats], &params);
            }
            HeadNorm { heads, .. } => {
                let (x, wq, wk, rstd) = (n.ins[0], n.ins[1], n.ins[2], n.outs[1]);
                let grad = HeadNormGradInput { heads: *heads };
                self.contribute(grad, name("dx"), vec![dy, x, wq, wk, rstd], x.value);
                self.weight(HeadNormGradWeight { heads: *heads }, name("dw"), vec![dy, x, rstd], &[wq, wk]);
            }
            LatentNorm { .. } => self.latent_norm(n),
            GroupedLinear { experts, rows } => {
                let (x, w, counts, experts, rows) = (n.ins[0], n.ins[1], n.ins[2], *experts, *rows);
                let grad = GroupedLinearGradInput { experts, rows };
                self.contribute_each(grad, name("dx"), vec![dy, w, counts], &[x.value]);
                let by_sequence = self.g.get(counts.value).cols == self.cx.layout.micro_batch;
                let leaf_rows = if by_sequence { self.cx.sequence } else { x.rows };
                let grad = GroupedLinearGradWeight { experts, rows, leaf_rows };
                self.weight(grad, name("dw"), vec![dy, x, counts], &[w]);
                if let Some(b) = n.ins.get(3) {
                    self.weight(GroupedBiasGrad { experts }, name("db"), vec![dy, counts], &[*b]);
                }
            }
            Embed { vocab0, .. } => {
                self.weight(EmbedGrad { vocab0: *vocab0 }, name("dw"), vec![n.ins[0], dy], &[n.ins[1]]);
                if let Some(pos) = n.ins.get(2) {
                    self.weight(PosGrad, name("dpos"), vec![dy], &[*pos]);
                }
            }
            _ => self.node_without_weights(n, dy),
        }
    }

    /// The same of kinds that have none.
    fn node_without_weights(&mut self, n: &Node, dy: Operand) {
        use OpKind::*;
        let name = |suffix: &str| format!("{}.{suffix}", n.name);
        match &n.kind {
            Rope { heads, .. } => {
                self.contribute(Rope { heads: *heads, inverse: true }, name("dx"), vec![dy], n.ins[0].value);
            }
            Attention { heads, sees } => {
                let grad = AttentionGrad { heads: *heads, sees: *sees };
                self.attention(n, dy, (*heads, *sees), grad);
            }
            RingAttention { heads, sees, axis } => {
                let grad = RingAttentionGrad { heads: *heads, sees: *sees, axis: *axis };
                self.attention(n, dy, (*heads, *sees), grad);
            }
            SplitHeads { heads, ranks } => {
                let grad = JoinHeads { heads: *heads, ranks: *ranks };
                self.contribute_each(grad, name("dx"), vec![dy], &[n.ins[0].value]);
            }
            JoinHeads { heads, ranks } => {
                let grad = SplitHeads { heads: *heads, ranks: *ranks };
                self.contribute_each(grad, name("dx"), vec![dy], &[n.ins[0].value]);
            }
            LatentRope { heads, rope_dim } => {
                let inputs: Vec<ValueId> = n.ins.iter().map(|o| o.value).collect();
                let grad = LatentRopeGrad { heads: *heads, rope_dim: *rope_dim };
                self.contribute_each(grad, name("dx"), vec![dy], &inputs);
            }
            Route { top_k, router } => {
                let ins = vec![dy, n.ins[0], n.outs[1], n.outs[2]];
                let sequences = self.cx.request.sequences;
                let grad = RouteGrad { top_k: *top_k, router: *router, sequences };
                self.contribute_each(grad, name("dx"), ins, &[n.ins[0].value]);
            }
            Dropout { .. } => self.dropout(n, dy),
            Permute { .. } => {
                self.contribute(PermuteGrad, name("dx"), vec![dy, n.ins[1]], n.ins[0].value);
            }
            Unpermute { .. } => {
                if let Some(acc) = n.acc {
                    self.pass(n.outs[0].value, acc.value, &n.name);
                }
                let (copies, gates, index) = (n.ins[0], n.ins[1], n.ins[2]);
                let ins = vec![dy, copies, gates, index];
                self.contribute_each(UnpermuteGrad, name("dx"), ins, &[copies.value, gates.value]);
            }
            SwiGlu { .. } | Gelu { .. } => {
                let grad = match n.kind {
                    Gelu { tanh } => GeluGrad { tanh },
                    SwiGlu { clamped } => SwiGluGrad { clamped },
                    _ => unreachable!("the arm has two kinds"),
                };
                let ins = [dy].into_iter().chain(n.ins.iter().copied()).collect();
                self.contribute_each(grad, name("dx"), ins, &[n.ins[0].value]);
            }
            Rows { of } => {
                let x = n.ins[0];
                self.contribute_each(RowsGrad { of: *of }, name("dx"), vec![dy, x], &[x.value]);
            }
            _ => self.message(n, dy),
        }
    }

    /// What was left out is left out of the gradient.
    fn dropout(&mut self, n: &Node, dy: Operand) {
        if let Some(acc) = n.acc {
            self.pass(n.outs[0].value, acc.value, &n.name);
        }
        let x = n.ins[0].value;
        self.contribute(n.kind.clone(), format!("{}.dx", n.name), vec![dy], x);
        if let Some(b) = n.ins.get(1) {
            let dx = self.g.all(self.grads[&x]);
            self.weight(OpKind::BiasGrad, format!("{}.db", n.name), vec![dx], &[*b]);
        }
    }

    fn attention(&mut self, n: &Node, dy: Operand, (heads, sees): (Heads, Sees), grad: OpKind) {
        let name = |suffix: &str| format!("{}.{suffix}", n.name);
        let (qkv, o, lse) = (n.ins[0], n.outs[0], n.outs[1]);
        let mut ins = vec![qkv, o, lse, dy];
        ins.extend(n.ins.get(1).filter(|_| sees.documents));
        let ring = matches!(grad, OpKind::RingAttentionGrad { .. });
        self.contribute(grad, name("dx"), ins, qkv.value);
        if ring {
            self.held_on_the_ring(&name("dx"), qkv, heads);
        }
        if let (true, Some(sinks)) = (sees.sinks, n.ins.last()) {
            let ins = vec![dy, o, lse, *sinks];
            self.weight(OpKind::SinkGrad { heads }, name("dsinks"), ins, &[*sinks]);
        }
    }

    /// What the op pushed last holds while keys and values walk.
    fn held_on_the_ring(&mut self, name: &str, qkv: Operand, heads: Heads) {
        let (rows, cols) = (qkv.rows, heads.kv_cols());
        let dtype = self.g.get(qkv.value).dtype;
        let held = [
            (".keys", 2 * rows, cols, dtype),
            (".queries", rows, heads.q * heads.dim, DType::F32),
            (".gradients", 3 * rows, cols, DType::F32),
        ];
        for (what, rows, cols, dtype) in held {
            let value = self.g.value(&format!("{name}{what}"), rows, cols, dtype, Source::Node);
            let out = self.g.all(value);
            self.out.last_mut().expect("just pushed").outs.push(out);
        }
    }

    /// The same of messages: what was summed is handed on, what was gathered is scattered.
    fn message(&mut self, n: &Node, dy: Operand) {
        use OpKind::*;
        let (x, name) = (n.ins[0].value, format!("{}.dx", n.name));
        match &n.kind {
            // The rows go back the way that they came: what arrived leaves, what left arrives.
            AllToAll { axis } => {
                let arrived = *n.outs.get(1).unwrap_or(&n.ins[n.ins.len() - 1]);
                let mut ins = vec![dy];
                ins.extend(n.ins.get(1).into_iter().flat_map(|left| [arrived, *left]));
                self.contribute_each(AllToAll { axis: *axis }, name, ins, &[x]);
            }
            Slice { axis } => self.contribute_each(AllGather { axis: *axis }, name, vec![dy], &[x]),
            Unslice { axis } => self.contribute_each(Slice { axis: *axis }, name, vec![dy], &[x]),
            AllReduce { .. } => self.pass(n.outs[0].value, x, &n.name),
            Fork { axis } => self.contribute_each(AllReduce { axis: *axis }, name, vec![dy], &[x]),
            AllGather { axis } => {
                self.contribute_each(ReduceScatter { axis: *axis }, name, vec![dy], &[x]);
            }
            ReduceScatter { axis } => {
                self.contribute_each(AllGather { axis: *axis }, name, vec![dy], &[x]);
            }
            other => panic!("{} is no forward op", other.name()),
        }
    }

    fn latent_norm(&mut self, n: &Node) {
        let dy = |d: &Self, out: usize| d.g.all(d.grads[&n.outs[out].value]);
        let name = |suffix: &str| format!("{}.{suffix}", n.name);
        let (c, weights, rstd) = (n.ins[0], &n.ins[1..], n.outs[2]);
        let queries = n.outs.get(3).map(|_| dy(self, 3));
        let mut ins = vec![dy(self, 0), dy(self, 1)];
        ins.extend(queries);
        ins.extend([c, weights[0], rstd]);
        ins.extend(weights.get(1));
        self.contribute(OpKind::LatentNormGradInput, name("dx"), ins, c.value);
        let mut ins = vec![dy(self, 0)];
        ins.extend(queries);
        ins.extend([c, rstd]);
        self.weight(OpKind::LatentNormGradWeight, name("dw"), ins, weights);
    }

    fn receive(&mut self, chunk: &Chunk, y: ValueId) {
        let cx = self.cx;
        self.g.place = Place::Stage;
        let dy = self.g.like(y, "recv.grad");
        let out = self.g.all(dy);
        let (peer, tag) = (cx.peer(chunk.virtual_stage + 1), cx.tag(chunk.virtual_stage + 1, true));
        self.push(
            OpKind::Recv { peer, tag },
            format!("stage{}.recv.grad", chunk.virtual_stage),
            vec![],
            vec![out],
            Phase::Input,
        );
        self.grads.insert(y, dy);
    }

    fn send(&mut self, chunk: &Chunk, x: ValueId) {
        let cx = self.cx;
        self.g.place = Place::Stage;
        let dx = self.grads[&x];
        let dx = self.g.all(dx);
        let (peer, tag) =
            (cx.peer(chunk.virtual_stage + cx.layout.pp - 1), cx.tag(chunk.virtual_stage, true));
        self.push(
            OpKind::Send { peer, tag },
            format!("stage{}.send.grad", chunk.virtual_stage),
            vec![dx],
            vec![],
            Phase::Input,
        );
    }

    fn loss(&mut self, x: ValueId, mtp: Option<ValueId>) {
        self.g.place = Place::Head;
        let grads = self.loss_ops(x, mtp, true);
        self.grads.extend([Some(x), mtp].into_iter().flatten().zip(grads));
    }

    /// The ops that turn the final norm's output into losses, and with `train` into gradients: a few sequences at a time, so
    /// that logits of more never exist, or a whole micro-batch. Likewise, in turn, of the output of the module
    /// that predicts one token more, whose loss is summed beside the other. Gives the gradients of both.
    fn loss_ops(&mut self, x: ValueId, mtp: Option<ValueId>, train: bool) -> Vec<ValueId> {
        let cx = self.cx;
        let w = self.table();
        let terms = LossTerms { z: cx.request.recipe.z_loss, cap: cx.model.logit_softcap, weight: 1.0 };
        let targets = self.g.value("targets", cx.tokens(), 1, DType::U32, Source::Targets);
        let leaves = self.g.value("loss_leaves", 1, 1, DType::F64, Source::LossLeaves);
        let dx = train.then(|| self.g.like(x, "head.dx"));
        let mut heads = vec![Head { name: "head", x, targets, terms, dx }];
        if let (Some(x), Some(Mtp { weight })) = (mtp, cx.model.mtp) {
            let targets = self.g.value("next_targets", cx.tokens(), 1, DType::U32, Source::NextTargets);
            let dx = train.then(|| self.g.like(x, "mtp.head.dx"));
            let terms = LossTerms { z: 0.0, weight, ..terms };
            heads.push(Head { name: "mtp.head", x, targets, terms, dx });
        }
        let sums = self.g.all(leaves);
        let count = cx.loss_sequences();
        for leaf in (0..cx.layout.micro_batch).step_by(count) {
            for (turn, head) in heads.iter().enumerate() {
                let sequences = Sequences { first: leaf, count, turns: heads.len(), turn };
                let loss = self.loss_of(head, w, sequences);
                for i in 0..count {
                    let one = Operand { row0: i * cx.sequence, rows: cx.sequence, ..loss.0 };
                    let sum = OpKind::LossSum { sequence: leaf + i, ahead: turn > 0 };
                    let name = format!("{}.{}.sum", head.name, leaf + i);
                    self.push(sum, name, vec![one], vec![sums], Phase::Input);
                }
                self.loss_grads(head, w, sequences, loss.1);
            }
        }
        heads.iter().filter_map(|head| head.dx).collect()
    }

    /// Logits of some sequences, and their losses and gradients: (losses, gradients).
    fn loss_of(&mut self, head: &Head, w: Operand, s: Sequences) -> (Operand, Operand) {
        let cx = self.cx;
        let ((vocab0, vocab), terms) = (cx.vocab(), head.terms);
        let t = s.count * cx.sequence;
        let rows = |value| Operand { value, row0: s.first * cx.sequence, rows: t };
        let name = |part: &str| format!("{}.{}{part}", head.name, s.first);
        let logits = self.g.value(&name(""), t, vocab, cx.dtype, Source::Node);
        let l = self.g.all(logits);
        self.push(OpKind::Linear, name(""), vec![rows(head.x), w], vec![l], Phase::Input);
        let l = self.soft_capped(l, name(".cap"), Phase::Input);
        let d = self.g.like(logits, &name(".dlogits"));
        let loss = self.g.value(&name(".loss"), t, 1, DType::F32, Source::Node);
        let (d, loss, targets) = (self.g.all(d), self.g.all(loss), rows(head.targets));
        if cx.layout.tp == 1 {
            let kind = OpKind::Xent { terms };
            self.push(kind, name(".xent"), vec![l, targets], vec![d, loss], Phase::Input);
        } else {
            let stats = self.vocab_stats(&name(".stats"), l, targets, vocab0);
            let kind = OpKind::XentGrad { vocab0, terms };
            self.push(kind, name(".xent"), vec![l, targets, stats], vec![d, loss], Phase::Input);
        }
        (loss, d)
    }

    /// From gradients `d` of logits to those of what they were made of, if anybody asks.
    fn loss_grads(&mut self, head: &Head, w: Operand, s: Sequences, d: Operand) {
        let Some(dx) = head.dx else { return };
        let (first, rows) = (s.first * self.cx.sequence, s.count * self.cx.sequence);
        let rows = |value| Operand { value, row0: first, rows };
        let name = |part: &str| format!("{}.{}{part}", head.name, s.first);
        let table = self.group_of(w);
        self.push(OpKind::LinearGradInput, name(".dx"), vec![d, w], vec![rows(dx)], Phase::Input);
        // Logits are gone after their sequences' turn, so the weight gradient cannot wait.
        let ins = vec![d, rows(head.x)];
        let n = self.push(OpKind::LinearGradWeight, name(".dw"), ins, vec![], Phase::Input);
        n.grads = vec![table];
        n.sequences = s;
    }

    /// Logits, squeezed where the model says so.
    fn soft_capped(&mut self, logits: Operand, name: String, phase: Phase) -> Operand {
        let cap = self.cx.model.logit_softcap;
        if cap == 0.0 {
            return logits;
        }
        let squeezed = self.g.like(logits.value, &name);
        let squeezed = self.g.all(squeezed);
        self.push(OpKind::SoftCap { cap }, name, vec![logits], vec![squeezed], phase);
        squeezed
    }

    /// The output projection: its own matrix, or the embedding's.
    fn table(&mut self) -> Operand {
        let own = self.cx.group(Place::Head, Role::Head, false);
        let id = own.or_else(|| self.cx.group(Place::Embedding, Role::Embedding, false)).expect("a head");
        let known = self.g.values.iter().position(|v| v.source == Source::Param(id));
        let value = known.map(|at| ValueId(at as u32)).unwrap_or_else(|| {
            let group = &self.cx.groups[id.0 as usize];
            self.g.value(&group.name, group.rows, group.cols, self.cx.dtype, Source::Param(id))
        });
        self.g.all(value)
    }

    fn vocab_stats(&mut self, name: &str, logits: Operand, targets: Operand, vocab0: usize) -> Operand {
        let shards = self.cx.layout.tp;
        let t = logits.rows;
        let mine = self.g.value(name, t, 3, DType::F32, Source::Node);
        let all = self.g.value(&format!("{name}.all"), shards * t, 3, DType::F32, Source::Node);
        let sum = self.g.value(&format!("{name}.combined"), t, 3, DType::F32, Source::Node);
        let (mine, all, sum) = (self.g.all(mine), self.g.all(all), self.g.all(sum));
        let input = Phase::Input;
        self.push(OpKind::XentStats { vocab0 }, name.to_owned(), vec![logits, targets], vec![mine], input);
        let gather = OpKind::AllGather { axis: Axis::Tp };
        self.push(gather, format!("{name}.gather"), vec![mine], vec![all], input);
        self.push(OpKind::XentCombine { shards }, format!("{name}.combine"), vec![all], vec![sum], input);
        sum
    }
}
