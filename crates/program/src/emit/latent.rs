use spec::{LATENT_NORM_EPS, Latent};

use super::Emitter;
use crate::graph::ValueId;
use crate::op::OpKind;
use crate::role::{Place, Role};

impl Emitter<'_> {
    /// Multi-head latent attention on the normed residual stream, up to the output projection.
    ///
    /// The projections into the latents are whole on every tensor-parallel rank and run on its own rows under sequence
    /// parallelism; what is gathered is the latents, a fraction of the residual stream's width (DeepSeek-V3: 2112 of
    /// 7168). From there on heads are cut over tp.
    pub(super) fn latent(&mut self, name: &str, l: Latent, h: ValueId) -> ValueId {
        let p = |s: &str| format!("{name}.{s}");
        let heads = self.cx.heads();
        let down =
            self.linear(Role::LatentDown, &p("down"), h, l.query_rank.unwrap_or(0) + l.kv_rank + l.rope_dim);
        let c = self.enter_tp(&p("in"), down);
        let rows = self.g.get(c).rows;

        let latent = self.act(&p("kv_latent"), rows, l.kv_rank);
        let shared = self.act(&p("shared_key"), rows, l.rope_dim);
        let norms = 1 + usize::from(l.query_rank.is_some());
        let rstd = self.stat(&p("latent_norm.rstd"), rows, norms);
        let mut ins = vec![self.g.all(c), self.weight(Role::KeyValueLatentNorm)];
        ins.extend(self.param(Role::QueryLatentNorm, false));
        let mut outs = vec![self.g.all(latent), self.g.all(shared), self.g.all(rstd)];
        let queries = l.query_rank.map(|q| self.act(&p("q_latent"), rows, q));
        outs.extend(queries.map(|q| self.g.all(q)));
        self.push(OpKind::LatentNorm { eps: LATENT_NORM_EPS }, &p("latent_norm"), ins, outs);

        let q = match queries {
            Some(queries) => self.linear(Role::QueryUp, &p("q_up"), queries, heads.q * heads.dim),
            None => {
                let h = self.enter_tp(&p("q.in"), h);
                self.linear(Role::QueryUp, &p("q"), h, heads.q * heads.dim)
            }
        };
        if let (true, Place::Layer(layer)) = (self.cx.generates(), self.g.place) {
            let (o, sees) = (self.act(&p("core"), rows, heads.out_cols()), self.sees());
            let mut ins = vec![self.g.all(q), self.g.all(latent), self.g.all(shared)];
            ins.push(self.weight(Role::KeyValueUp));
            if sees.sinks {
                ins.push(self.weight(Role::Sinks));
            }
            let outs = vec![self.g.all(o)];
            let kind = OpKind::LatentCached { heads, sees, rope_dim: l.rope_dim, layer };
            self.push(kind, &p("core"), ins, outs);
            return o;
        }
        let kv = self.linear(Role::KeyValueUp, &p("kv_up"), latent, heads.kv * (l.nope_dim + l.value_dim));
        let qkv = self.act(&p("rope"), rows, heads.packed());
        let (ins, outs) = (vec![self.g.all(q), self.g.all(kv), self.g.all(shared)], vec![self.g.all(qkv)]);
        self.push(OpKind::LatentRope { heads, rope_dim: l.rope_dim }, &p("rope"), ins, outs);
        self.attention(&p("core"), qkv)
    }
}
