use spec::{DType, Position};

use super::Emitter;
use crate::graph::{Source, ValueId};
use crate::heads::Heads;
use crate::op::{AttentionDropout, Axis, OpId, OpKind, Sees};
use crate::role::{Place, Role};

impl Emitter<'_> {
    /// Grouped-query attention on the normed residual stream, up to the output projection.
    pub fn grouped_queries(&mut self, name: &str, h: ValueId) -> ValueId {
        let p = |s: &str| format!("{name}.{s}");
        let heads = self.cx.heads();
        let h = self.enter_tp(&p("in"), h);
        let mut qkv = self.linear(Role::QueryKeyValue, &p("qkv"), h, heads.packed());
        if self.cx.model.qk_norm {
            qkv = self.head_norm(&p("qk_norm"), qkv);
        }
        if matches!(self.cx.model.position, Position::Rope(_)) {
            qkv = self.map(OpKind::Rope { heads, inverse: false }, &p("rope"), qkv);
        }
        self.attention(&p("core"), qkv)
    }

    fn head_norm(&mut self, name: &str, qkv: ValueId) -> ValueId {
        let heads = self.cx.heads();
        let rows = self.g.get(qkv).rows;
        let y = self.g.like(qkv, name);
        let rstd = self.stat(&format!("{name}.rstd"), rows, heads.q + heads.kv);
        let ins = vec![self.g.all(qkv), self.weight(Role::QueryNorm), self.weight(Role::KeyNorm)];
        let outs = vec![self.g.all(y), self.g.all(rstd)];
        self.push(OpKind::HeadNorm { heads, eps: self.cx.model.norm_eps }, name, ins, outs);
        y
    }

    /// Attention over packed queries, keys and values. Where context-parallel ranks deal heads, each rank's rows are
    /// exchanged for all rows of its heads before it, and back behind it.
    pub(super) fn attention(&mut self, name: &str, qkv: ValueId) -> ValueId {
        let (heads, ranks) = (self.cx.heads(), self.cx.layout.cp);
        let head0 = self.cx.coords.tp * heads.q;
        if !self.cx.layout.deals_heads() {
            return self.attend(name, (heads, head0), qkv);
        }
        let p = |s: &str| format!("{name}.{s}");
        let own = heads.dealt(ranks);
        let (rows, all) = (self.g.get(qkv).rows, ranks * self.g.get(qkv).rows);
        let parts = self.moved(OpKind::SplitHeads { heads, ranks }, &p("split"), qkv, (all, own.packed()));
        let exchange = OpKind::AllToAll { axis: Axis::Cp };
        let seen = self.map(exchange.clone(), &p("in"), parts);
        let o = self.attend(name, (own, head0 + self.cx.coords.cp * own.q), seen);
        let parts = self.map(exchange, &p("out"), o);
        let kind = OpKind::JoinHeads { heads: heads.of_output(), ranks };
        self.moved(kind, &p("join"), parts, (rows, heads.out_cols()))
    }

    /// Attention with these heads, the first of them `head0` of the model's, over the rows at hand.
    fn attend(&mut self, name: &str, (heads, head0): (Heads, usize), qkv: ValueId) -> ValueId {
        let drops = AttentionDropout { site: OpId::of(name).0, rate: self.attention_dropout, head0 };
        let sees = Sees { dropout: (drops.rate > 0.0).then_some(drops), ..self.sees() };
        let rows = self.g.get(qkv).rows;
        let o = self.act(name, rows, heads.out_cols());
        let mut ins = vec![self.g.all(qkv)];
        if sees.documents {
            let starts = self.g.value("starts", rows, 1, DType::U32, Source::Starts);
            ins.push(self.g.all(starts));
        }
        if sees.sinks {
            ins.push(self.weight(Role::Sinks));
        }
        if let (true, Place::Layer(layer)) = (self.cx.generates(), self.g.place) {
            let outs = vec![self.g.all(o)];
            self.push(OpKind::AttentionCached { heads, sees, layer }, name, ins, outs);
            return o;
        }
        let lse = self.stat(&format!("{name}.lse"), rows, heads.q);
        let mut outs = vec![self.g.all(o), self.g.all(lse)];
        let kind = match self.cx.layout.has_ring() {
            false => OpKind::Attention { heads, sees },
            true => {
                let keys = self.act(&format!("{name}.keys"), 2 * rows, heads.kv_cols());
                let sums = self.stat(&format!("{name}.sums"), rows, heads.out_cols());
                let totals = self.stat(&format!("{name}.totals"), rows, heads.q);
                outs.extend([keys, sums, totals].map(|v| self.g.all(v)));
                OpKind::RingAttention { heads, sees, axis: Axis::Cp }
            }
        };
        let Some(layer) = self.layer_that_clips() else {
            self.push(kind, name, ins, outs);
            return o;
        };
        let maxima = self.stat(&format!("{name}.maxima"), rows, heads.q);
        let maxima = self.g.all(maxima);
        outs.push(maxima);
        self.push(kind, name, ins, outs);
        self.push(OpKind::LogitMax { heads, layer }, &format!("{name}.max"), vec![maxima], vec![]);
        o
    }

    /// The layer that is being emitted, if its greatest scores are looked at.
    fn layer_that_clips(&self) -> Option<usize> {
        self.cx.layer_of(self.g.place).filter(|_| self.clips)
    }

    /// What the layer that is being emitted sees: a window as long as the sequence bounds nothing.
    pub(super) fn sees(&self) -> Sees {
        let Some(layer) = self.cx.layer_of(self.g.place) else { return Sees::ALL };
        let tokens = self.cx.context().max(self.cx.request.mode.positions());
        let window = self.cx.model.window_of(layer).filter(|w| *w < tokens);
        Sees {
            window,
            documents: self.cx.request.recipe.documents && !self.cx.generates(),
            sinks: self.cx.model.sinks,
            dropout: None,
        }
    }
}
