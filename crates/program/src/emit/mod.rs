//! Layers as ops: what each half of a layer emits lies in a file of its own. [`Emitter`] is open to layers of one's own.

mod attention;
mod experts;
mod latent;
mod mtp;
mod own;

use spec::{Activation, DType};

use crate::graph::{Graph, Node, Operand, Phase, Source, ValueId};
use crate::op::{Axis, OpId, OpKind};
use crate::params::Chunk;
use crate::rank::Rank;
use crate::role::{Place, Role};

pub use own::Layer;

/// What a chunk's forward pass leaves behind for the passes after it.
pub(crate) struct Forward {
    pub(crate) graph: Graph,
    /// The activation received from the stage before, or the embedding's output.
    pub(crate) input: ValueId,
    /// The activation sent on, or the final norm's output.
    pub(crate) output: ValueId,
    /// What the module that predicts one token more hands to the output projection, if it was asked for.
    pub(crate) mtp: Option<ValueId>,
    /// Values at layer boundaries, which full recompute keeps.
    pub(crate) boundaries: Vec<ValueId>,
}

/// Emits the forward ops of one chunk on local shards, with explicit collectives.
///
/// With `trains` elements are left out and scores are looked at, as the recipe says, and the module is there that predicts one token
/// more; else it is the model itself.
pub(crate) fn forward(cx: &Rank<'_>, chunk: &Chunk, trains: bool) -> Forward {
    let mtp = trains && chunk.mtp;
    let recipe = &cx.request.recipe;
    let mut e = Emitter {
        cx,
        g: Graph::default(),
        params: vec![None; cx.groups.len()],
        dropout: if trains { recipe.dropout } else { 0.0 },
        attention_dropout: if trains { recipe.attention_dropout } else { 0.0 },
        clips: trains && recipe.qk_clip > 0.0,
    };
    let input = if chunk.embed { e.embedding() } else { e.receive(chunk) };
    let mut x = input;
    let mut boundaries = vec![input];
    for layer in chunk.first_layer..chunk.first_layer + chunk.layers {
        e.g.place = Place::Layer(layer);
        x = match cx.layer {
            Some(own) => own(&mut e, layer, x),
            None => e.layer(layer, x),
        };
        boundaries.push(x);
    }
    let mut ahead = None;
    if chunk.head {
        e.g.place = Place::Head;
        let normed = e.norm(Role::FinalNorm, "final_norm", x);
        x = e.enter_tp("head.in", normed);
        if mtp {
            let y = e.mtp(normed);
            let entered = e.enter_tp("mtp.head.in", y);
            boundaries.extend([y, entered]);
            ahead = Some(entered);
        }
    } else {
        e.g.place = Place::Stage;
        let kind = OpKind::Send {
            peer: cx.peer(chunk.virtual_stage + 1),
            tag: cx.tag(chunk.virtual_stage + 1, false),
        };
        let x = e.g.all(x);
        e.push(kind, &format!("stage{}.send", chunk.virtual_stage), vec![x], vec![]);
    }
    Forward { graph: e.g, input, output: x, mtp: ahead, boundaries }
}

/// Writes the forward ops of a rank's part of a layer: operands are local shards, and what tensor parallelism says is
/// an op among them. Derivatives follow from the ops.
///
/// Values of the residual stream are `[tokens, hidden]`. Methods that take a [`Role`] use the model's parameter of that
/// role in the layer that is being emitted.
///
/// # Panics
/// Its methods, if the model has no parameter of the role in this layer.
pub struct Emitter<'a> {
    cx: &'a Rank<'a>,
    g: Graph,
    params: Vec<Option<ValueId>>,
    /// Share that is left out of embeddings and of what layers add to the residual stream.
    dropout: f32,
    attention_dropout: f32,
    /// The greatest scores of attention are looked at.
    clips: bool,
}

impl Emitter<'_> {
    fn push(&mut self, kind: OpKind, name: &str, ins: Vec<Operand>, outs: Vec<Operand>) {
        let place = self.g.place;
        self.g.nodes.push(Node::new(kind, name.to_owned(), ins, outs, Phase::Forward, place));
    }

    fn act(&mut self, name: &str, rows: usize, cols: usize) -> ValueId {
        self.g.value(name, rows, cols, self.cx.dtype, Source::Node)
    }

    fn stat(&mut self, name: &str, rows: usize, cols: usize) -> ValueId {
        self.g.value(name, rows, cols, DType::F32, Source::Node)
    }

    /// One op with one output like its first input.
    fn map(&mut self, kind: OpKind, name: &str, x: ValueId) -> ValueId {
        let y = self.g.like(x, name);
        let (x, y2) = (self.g.all(x), self.g.all(y));
        self.push(kind, name, vec![x], vec![y2]);
        y
    }

    /// One op with one output of another shape.
    fn moved(&mut self, kind: OpKind, name: &str, x: ValueId, (rows, cols): (usize, usize)) -> ValueId {
        let y = self.act(name, rows, cols);
        let (ins, outs) = (vec![self.g.all(x)], vec![self.g.all(y)]);
        self.push(kind, name, ins, outs);
        y
    }

    /// A parameter of the part of the model that is being emitted, if it has one.
    fn param(&mut self, role: Role, bias: bool) -> Option<Operand> {
        let id = self.cx.group(self.g.place, role, bias)?;
        let value = match self.params[id.0 as usize] {
            Some(v) => v,
            None => {
                let group = &self.cx.groups[id.0 as usize];
                let v = self.g.value(&group.name, group.rows, group.cols, self.cx.dtype, Source::Param(id));
                self.params[id.0 as usize] = Some(v);
                v
            }
        };
        Some(self.g.all(value))
    }

    fn weight(&mut self, role: Role) -> Operand {
        let place = self.g.place;
        self.param(role, false).unwrap_or_else(|| panic!("the parameter table lacks {role:?} of {place:?}"))
    }

    fn embedding(&mut self) -> ValueId {
        let tokens = self.g.value("tokens", self.cx.tokens(), 1, DType::U32, Source::Tokens);
        let table = self.weight(Role::Embedding);
        let mut ins = vec![self.g.all(tokens), table];
        ins.extend(self.param(Role::Positions, false));
        self.embed("embed", ins, self.cx.coords.tp == 0)
    }

    fn embed(&mut self, name: &str, ins: Vec<Operand>, positions: bool) -> ValueId {
        let cx = self.cx;
        let x = self.act(name, cx.tokens(), cx.model.hidden);
        let out = self.g.all(x);
        self.push(OpKind::Embed { vocab0: cx.vocab().0, positions }, name, ins, vec![out]);
        let x = self.leave_tp(&format!("{name}.reduce"), x);
        if self.dropout > 0.0 { self.dropped(&format!("{name}.drop"), x, None, None) } else { x }
    }

    fn receive(&mut self, chunk: &Chunk) -> ValueId {
        let cx = self.cx;
        self.g.place = Place::Stage;
        let x = self.act("recv", cx.residual_rows(), cx.model.hidden);
        let out = self.g.all(x);
        let (peer, tag) =
            (cx.peer(chunk.virtual_stage + cx.layout.pp - 1), cx.tag(chunk.virtual_stage, false));
        self.push(
            OpKind::Recv { peer, tag },
            &format!("stage{}.recv", chunk.virtual_stage),
            vec![],
            vec![out],
        );
        x
    }

    /// Layer `i` as the model says: attention, then the feed-forward half, each on the normed residual stream.
    pub fn layer(&mut self, i: usize, x: ValueId) -> ValueId {
        self.layer_named(&format!("layers.{i}"), i, x)
    }

    fn layer_named(&mut self, name: &str, i: usize, x: ValueId) -> ValueId {
        let cx = self.cx;
        let p = |s: &str| format!("{name}.{s}");
        let h = self.norm(Role::AttentionNorm, &p("attn_norm"), x);
        let o = match cx.model.latent {
            Some(latent) => self.latent(&p("attn"), latent, h),
            None => self.grouped_queries(&p("attn"), h),
        };
        let x = self.row_parallel(Role::AttentionOut, &p("attn.o"), o, x);
        let h = self.norm(Role::MlpNorm, &p("mlp_norm"), x);
        match cx.model.experts.filter(|_| cx.model.has_experts(i)) {
            Some(experts) => self.experts(&p("mlp"), &experts, h, x),
            None => self.mlp((Role::Up, Role::Down), &p("mlp"), cx.model.ffn, h, x),
        }
    }

    /// `residual + mlp(h)`, cut over tp along its width `ffn`; `role`s of the matrices into it and back.
    pub fn mlp(
        &mut self,
        (into, back): (Role, Role),
        name: &str,
        ffn: usize,
        h: ValueId,
        residual: ValueId,
    ) -> ValueId {
        let p = |s: &str| format!("{name}.{s}");
        let h = self.enter_tp(&p("in"), h);
        let ffn = ffn / self.cx.layout.tp;
        let up = if self.cx.model.activation.gated() { "gate_up" } else { "up" };
        let cols = if self.cx.model.activation.gated() { 2 * ffn } else { ffn };
        let a = self.linear(into, &p(up), h, cols);
        let h = self.activation(&p("act"), a, ffn);
        self.row_parallel(back, &p("down"), h, residual)
    }

    /// The model's norm of each row, with the weight (and bias) of `role`.
    pub fn norm(&mut self, role: Role, name: &str, x: ValueId) -> ValueId {
        let cx = self.cx;
        let rows = self.g.get(x).rows;
        let y = self.g.like(x, name);
        let per_row = if cx.model.norm == spec::NormKind::Layer { 2 } else { 1 };
        let stats = self.stat(&format!("{name}.stats"), per_row * rows, 1);
        let w = self.weight(role);
        let mut ins = vec![self.g.all(x), w];
        ins.extend(self.param(role, true));
        let outs = vec![self.g.all(y), self.g.all(stats)];
        self.push(OpKind::Norm { norm: cx.model.norm, eps: cx.model.norm_eps }, name, ins, outs);
        y
    }

    /// The model's activation, to `cols` columns: as many as `a` has, or half of them where it is gated.
    pub fn activation(&mut self, name: &str, a: ValueId, cols: usize) -> ValueId {
        let kind = match self.cx.model.activation {
            Activation::SwiGlu => OpKind::SwiGlu { clamped: false },
            Activation::SwiGluClamped => OpKind::SwiGlu { clamped: true },
            Activation::GeluTanh => OpKind::Gelu { tanh: true },
            Activation::Gelu => OpKind::Gelu { tanh: false },
        };
        let rows = self.g.get(a).rows;
        let h = self.act(name, rows, cols);
        let (ins, outs) = (vec![self.g.all(a)], vec![self.g.all(h)]);
        self.push(kind, name, ins, outs);
        h
    }

    /// `x w^T + b`, to `cols` columns of this rank.
    pub fn linear(&mut self, role: Role, name: &str, x: ValueId, cols: usize) -> ValueId {
        let y = self.product(role, name, x, cols);
        let bias = self.param(role, true);
        self.last().ins.extend(bias);
        y
    }

    /// `x w^T`.
    fn product(&mut self, role: Role, name: &str, x: ValueId, cols: usize) -> ValueId {
        let rows = self.g.get(x).rows;
        let y = self.act(name, rows, cols);
        let (ins, outs) = (vec![self.g.all(x), self.weight(role)], vec![self.g.all(y)]);
        self.push(OpKind::Linear, name, ins, outs);
        y
    }

    fn last(&mut self) -> &mut Node {
        self.g.nodes.last_mut().expect("an op was pushed")
    }

    /// `residual + x w^T + b`, where each rank holds some columns of `w`.
    pub fn row_parallel(&mut self, role: Role, name: &str, x: ValueId, residual: ValueId) -> ValueId {
        let drop = format!("{name}.drop");
        if self.cx.layout.tp == 1 {
            let y = self.linear(role, name, x, self.cx.model.hidden);
            if self.dropout > 0.0 {
                return self.dropped(&drop, y, None, Some(residual));
            }
            self.last().acc = Some(self.g.all(residual));
            return y;
        }
        let partial = self.product(role, name, x, self.cx.model.hidden);
        let y = self.leave_tp(&format!("{name}.reduce"), partial);
        if self.dropout > 0.0 {
            let bias = self.param(role, true);
            return self.dropped(&drop, y, bias, Some(residual));
        }
        let out = self.g.like(residual, &format!("{name}.add"));
        // The bias is added once, after the sum over ranks.
        let mut ins = vec![self.g.all(residual), self.g.all(y)];
        ins.extend(self.param(role, true));
        let o = self.g.all(out);
        self.push(OpKind::Add, &format!("{name}.add"), ins, vec![o]);
        out
    }

    /// `residual + kept(x + b)`: what is left out is drawn by the op's name, the step, and the places of row and column.
    fn dropped(
        &mut self,
        name: &str,
        x: ValueId,
        bias: Option<Operand>,
        residual: Option<ValueId>,
    ) -> ValueId {
        let y = self.g.like(x, name);
        let ins = [self.g.all(x)].into_iter().chain(bias).collect();
        let outs = vec![self.g.all(y)];
        self.push(OpKind::Dropout { site: OpId::of(name).0, rate: self.dropout }, name, ins, outs);
        self.last().acc = residual.map(|r| self.g.all(r));
        y
    }

    /// From the residual stream into a tensor-parallel region (Megatron's f, or the gather of sequence parallelism).
    pub fn enter_tp(&mut self, name: &str, x: ValueId) -> ValueId {
        if self.cx.layout.tp == 1 {
            return x;
        }
        if !self.cx.sequence_parallel() {
            return self.map(OpKind::Fork { axis: Axis::Tp }, name, x);
        }
        let shape = (self.cx.tokens(), self.g.get(x).cols);
        self.moved(OpKind::AllGather { axis: Axis::Tp }, name, x, shape)
    }

    /// Out of a tensor-parallel region: partial sums become the residual stream (Megatron's g).
    pub fn leave_tp(&mut self, name: &str, x: ValueId) -> ValueId {
        if self.cx.layout.tp == 1 {
            return x;
        }
        if !self.cx.sequence_parallel() {
            return self.map(OpKind::AllReduce { axis: Axis::Tp }, name, x);
        }
        let shape = (self.cx.residual_rows(), self.cx.model.hidden);
        self.moved(OpKind::ReduceScatter { axis: Axis::Tp }, name, x, shape)
    }
}
