use serde::Serialize;
use spec::{Experts, Latent, Layout, ModelSpec, NormKind, Position};

use crate::coords::Coords;
use crate::role::{ParamKey, Place, Role};

/// Index of a parameter group in a rank's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct GroupId(pub u32);

/// Logical parameters that lie next to each other so that one kernel sees them as one matrix
/// (query, key and value; gate and up).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ParamGroup {
    /// For example `layers.3.attn.qkv.weight`.
    pub name: String,
    /// What it is.
    pub key: ParamKey,
    /// Local rows.
    pub rows: usize,
    /// Local columns.
    pub cols: usize,
    /// Weight decay applies: a matrix, not a norm or a bias.
    pub decay: bool,
    /// The logical parameters, top to bottom.
    pub parts: Vec<ParamPart>,
    /// Rows of the matrices that make the queries, keys or values of one head, top to bottom: parts have them head by head. Empty
    /// where rows are no heads'.
    #[serde(skip)]
    pub head_rows: Vec<usize>,
    /// The unit that is gathered together under ZeRO 3: 0 the embedding, `1 + i` layer `i`, `1 + layers` the head,
    /// `2 + layers + i` the experts of layer `i`, which come from other ranks; behind those the module that predicts one
    /// token more, and its experts.
    pub unit: usize,
    /// The same rows live on every tensor-parallel rank. Never of experts, which are spread over ranks their own way.
    pub replicated_tp: bool,
    /// Which ranks hold the same elements: gradients are summed over them, ZeRO shards over them.
    pub replication: Replication,
    /// Which chunk of this rank uses it first.
    pub chunk: usize,
}

/// A box of a logical parameter: what this rank holds of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParamPart {
    /// Logical name, for example `layers.3.attn.q.weight`: what checkpoints and the generator of weights know it by.
    pub name: String,
    /// What the group is that it belongs to.
    pub key: ParamKey,
    /// Shape of the whole parameter; a vector has one row.
    pub global: (usize, usize),
    /// The same as a slice.
    pub dims: [usize; 2],
    /// First row held.
    pub row0: usize,
    /// Rows held.
    pub rows: usize,
    /// First column held.
    pub col0: usize,
    /// Columns held.
    pub cols: usize,
    /// First row inside the group.
    pub local_row0: usize,
}

/// Which ranks hold the same elements of a parameter, so that their gradients are one sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Replication {
    /// The ranks along dp and cp.
    Data,
    /// The ranks of a stage that hold the same experts: `dp * cp * tp / ep` of them, `ep` apart.
    Expert,
}

impl ParamGroup {
    /// Rows of the matrices that this rank's rows of a part are, top to bottom: those of heads are matrices of their own, which
    /// no other rank has a part of.
    pub fn matrix_rows(&self, part: &ParamPart) -> Vec<usize> {
        match self.head_rows.iter().sum::<usize>() {
            0 => vec![part.rows],
            head => self.head_rows.repeat(part.rows / head),
        }
    }

    /// Local elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the shard holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How a parameter is cut over tp.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cut {
    Whole,
    Rows,
    Cols,
}

/// `total` cut into `parts` as evenly as possible: (first, count) of `index`.
pub(crate) fn share(total: usize, parts: usize, index: usize) -> (usize, usize) {
    let at = |i: usize| total * i / parts;
    (at(index), at(index + 1) - at(index))
}

/// Where the layers of virtual stages lie, and what else each one holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Position in the pipeline of virtual stages.
    pub(crate) virtual_stage: usize,
    pub(crate) first_layer: usize,
    pub(crate) layers: usize,
    pub(crate) embed: bool,
    pub(crate) head: bool,
    /// It learns to predict one token more.
    pub(crate) mtp: bool,
}

/// The chunks of pipeline stage `stage`, in order of the virtual stages that they serve.
pub(crate) fn chunks(model: &ModelSpec, layout: &Layout, stage: usize) -> Vec<Chunk> {
    let virtuals = layout.pp * layout.chunks;
    let counts = layout.deal(model.layers);
    (0..layout.chunks)
        .map(|c| c * layout.pp + stage)
        .map(|v| Chunk {
            virtual_stage: v,
            first_layer: counts[..v].iter().sum(),
            layers: counts[v],
            embed: v == 0,
            head: v + 1 == virtuals,
            mtp: v + 1 == virtuals && model.mtp.is_some(),
        })
        .collect()
}

/// Builds the parameter table of one rank.
pub(crate) struct Table<'a> {
    model: &'a ModelSpec,
    tp: usize,
    tp_rank: usize,
    /// First expert held and how many.
    experts: (usize, usize),
    groups: Vec<ParamGroup>,
    chunk: usize,
    place: Place,
}

/// All parameter groups of the rank at `coords` with these chunks, in forward order.
pub(crate) fn table(model: &ModelSpec, layout: &Layout, coords: Coords, chunks: &[Chunk]) -> Vec<ParamGroup> {
    let experts = share(model.experts.map_or(0, |e| e.count), layout.ep, coords.ep(layout));
    let (tp, tp_rank) = (layout.tp, coords.tp);
    let mut t = Table { model, tp, tp_rank, experts, groups: Vec::new(), chunk: 0, place: Place::default() };
    for (c, chunk) in chunks.iter().enumerate() {
        t.chunk = c;
        if chunk.embed {
            t.place = Place::Embedding;
            t.embedding();
        }
        for layer in chunk.first_layer..chunk.first_layer + chunk.layers {
            t.place = Place::Layer(layer);
            t.layer(&format!("layers.{layer}"), layer);
        }
        let embed_here = chunks.iter().any(|c| c.embed);
        if chunk.head {
            t.place = Place::Head;
            t.head(embed_here);
        }
        if chunk.mtp {
            t.mtp(embed_here);
        }
    }
    t.groups
}

/// The biases that the experts of all layers are chosen by, where a model has them.
pub(crate) fn expert_bias(model: &ModelSpec) -> Option<ParamGroup> {
    let e = model.experts.filter(|e| e.router.expert_bias)?;
    let key = |place| ParamKey { place, role: Role::ExpertBias, bias: true };
    let part = |layer: usize| ParamPart {
        name: match layer < model.layers {
            true => format!("layers.{layer}.mlp.expert_bias"),
            false => "mtp.mlp.expert_bias".to_owned(),
        },
        key: key(if layer < model.layers { Place::Layer(layer) } else { Place::Mtp }),
        global: (1, e.count),
        dims: [1, e.count],
        row0: 0,
        rows: 1,
        col0: 0,
        cols: e.count,
        local_row0: layer,
    };
    Some(ParamGroup {
        name: "expert_bias".to_owned(),
        key: key(Place::Step),
        rows: model.all_layers(),
        cols: e.count,
        decay: false,
        head_rows: Vec::new(),
        parts: (0..model.all_layers()).filter(|i| model.has_experts(*i)).map(part).collect(),
        unit: 0,
        replicated_tp: true,
        replication: Replication::Data,
        chunk: 0,
    })
}

impl Table<'_> {
    fn embedding(&mut self) {
        let m = self.model;
        self.matrix(Role::Embedding, "embed.weight", &[("embed.weight", m.vocab)], m.hidden, Cut::Rows);
        if let Position::Learned { max_positions } = m.position {
            let rows = [("pos_embed.weight", max_positions)];
            self.matrix(Role::Positions, "pos_embed.weight", &rows, m.hidden, Cut::Whole);
        }
    }

    /// What the module has of its own, and the embedding where the stage lacks it: a copy, like a tied table's.
    fn mtp(&mut self, embed_here: bool) {
        let m = self.model;
        if !embed_here {
            self.matrix(Role::Embedding, "embed.weight", &[("embed.weight", m.vocab)], m.hidden, Cut::Rows);
        }
        self.place = Place::Mtp;
        for (norm, of, name) in [
            (Role::MtpEmbeddingNorm, Role::MtpEmbedding, "mtp.embed"),
            (Role::MtpHiddenNorm, Role::MtpHidden, "mtp.hidden"),
        ] {
            self.norm(norm, &format!("{name}_norm"));
            let name = format!("{name}_proj");
            self.linear(of, &name, &[(name.clone(), m.hidden)], m.hidden, Cut::Whole, false);
        }
        self.layer("mtp", m.layers);
        self.norm(Role::MtpNorm, "mtp.norm");
    }

    /// Layer `i`, whose parameters' names begin with `name`.
    fn layer(&mut self, name: &str, i: usize) {
        let m = self.model;
        let p = |s: &str| format!("{name}.{s}");
        self.norm(Role::AttentionNorm, &p("attn_norm"));
        match m.latent {
            Some(latent) => self.latent(name, latent),
            None => self.attention(name),
        }
        if m.sinks {
            self.per_head(Role::Sinks, &p("attn.sinks"), m.heads);
        }
        self.norm(Role::MlpNorm, &p("mlp_norm"));
        match m.experts.filter(|_| m.has_experts(i)) {
            Some(experts) => self.experts(name, experts),
            None => self.mlp((Role::Up, Role::Down), &p("mlp"), m.ffn),
        }
    }

    fn attention(&mut self, name: &str) {
        let m = self.model;
        let (q, kv) = (m.heads * m.head_dim, m.kv_heads * m.head_dim);
        let p = |s: &str| format!("{name}.{s}");
        let qkv = [(p("attn.q"), q), (p("attn.k"), kv), (p("attn.v"), kv)];
        self.linear(Role::QueryKeyValue, &p("attn.qkv"), &qkv, m.hidden, Cut::Rows, m.qkv_bias);
        if m.qk_norm {
            self.vector(Role::QueryNorm, &p("attn.q_norm.weight"), m.head_dim);
            self.vector(Role::KeyNorm, &p("attn.k_norm.weight"), m.head_dim);
        }
        self.linear(
            Role::AttentionOut,
            &p("attn.o"),
            &[(p("attn.o"), m.hidden)],
            q,
            Cut::Cols,
            m.attn_out_bias,
        );
    }

    /// The projections into the latents are whole on every rank, those out of them are cut by head.
    fn latent(&mut self, name: &str, l: Latent) {
        let m = self.model;
        let p = |s: &str| format!("{name}.attn.{s}");
        let mut down = Vec::new();
        down.extend(l.query_rank.map(|q| (p("q_down"), q)));
        down.push((p("kv_down"), l.kv_rank + l.rope_dim));
        self.linear(Role::LatentDown, &p("down"), &down, m.hidden, Cut::Whole, false);
        let queries = m.heads * l.key_dim();
        if let Some(q) = l.query_rank {
            self.vector(Role::QueryLatentNorm, &p("q_latent_norm.weight"), q);
            self.vector(Role::KeyValueLatentNorm, &p("kv_latent_norm.weight"), l.kv_rank);
            self.linear(Role::QueryUp, &p("q_up"), &[(p("q_up"), queries)], q, Cut::Rows, false);
        } else {
            self.vector(Role::KeyValueLatentNorm, &p("kv_latent_norm.weight"), l.kv_rank);
            self.linear(Role::QueryUp, &p("q"), &[(p("q"), queries)], m.hidden, Cut::Rows, false);
        }
        let up = m.heads * (l.nope_dim + l.value_dim);
        self.linear(Role::KeyValueUp, &p("kv_up"), &[(p("kv_up"), up)], l.kv_rank, Cut::Rows, false);
        self.linear(
            Role::AttentionOut,
            &p("o"),
            &[(p("o"), m.hidden)],
            m.heads * l.value_dim,
            Cut::Cols,
            false,
        );
    }

    fn mlp(&mut self, (into, back): (Role, Role), name: &str, ffn: usize) {
        let m = self.model;
        let p = |s: &str| format!("{name}.{s}");
        if m.activation.gated() {
            let gate_up = [(p("gate"), ffn), (p("up"), ffn)];
            self.linear(into, &p("gate_up"), &gate_up, m.hidden, Cut::Rows, m.mlp_bias);
        } else {
            self.linear(into, &p("up"), &[(p("up"), ffn)], m.hidden, Cut::Rows, m.mlp_bias);
        }
        self.linear(back, &p("down"), &[(p("down"), m.hidden)], ffn, Cut::Cols, m.mlp_bias);
    }

    /// The router is whole on every rank, shared experts are cut by tp, routed ones are whole experts.
    fn experts(&mut self, name: &str, e: Experts) {
        let m = self.model;
        let p = |s: &str| format!("{name}.mlp.{s}");
        self.linear(
            Role::Router,
            &p("router"),
            &[(p("router"), e.count)],
            m.hidden,
            Cut::Whole,
            e.router.bias,
        );
        let up: (&str, &[&str]) =
            if m.activation.gated() { ("gate_up", &["gate", "up"]) } else { ("up", &["up"]) };
        self.stack(Role::ExpertUp, &p("experts"), up, (e.ffn, m.hidden));
        self.stack(Role::ExpertDown, &p("experts"), ("down", &["down"]), (m.hidden, e.ffn));
        if e.shared_ffn > 0 {
            self.mlp((Role::SharedUp, Role::SharedDown), &p("shared"), e.shared_ffn);
        }
    }

    fn head(&mut self, embed_here: bool) {
        let m = self.model;
        self.norm(Role::FinalNorm, "final_norm");
        if !m.tied_embeddings {
            self.matrix(Role::Head, "head.weight", &[("head.weight", m.vocab)], m.hidden, Cut::Rows);
        } else if !embed_here {
            // The last stage keeps its own copy of the tied table; both receive the same summed gradient.
            self.matrix(Role::Embedding, "embed.weight", &[("embed.weight", m.vocab)], m.hidden, Cut::Rows);
        }
    }

    fn linear(
        &mut self,
        role: Role,
        name: &str,
        outs: &[(String, usize)],
        in_dim: usize,
        cut: Cut,
        bias: bool,
    ) {
        let weights: Vec<(String, usize)> =
            outs.iter().map(|(n, rows)| (format!("{n}.weight"), *rows)).collect();
        let weights: Vec<(&str, usize)> = weights.iter().map(|(n, r)| (n.as_str(), *r)).collect();
        self.matrix(role, &format!("{name}.weight"), &weights, in_dim, cut);
        if bias {
            let key = ParamKey { bias: true, ..self.key(role) };
            let mut parts = Vec::new();
            let mut at = 0;
            for (n, len) in outs {
                let (first, count) =
                    if cut == Cut::Rows { share(*len, self.tp, self.tp_rank) } else { (0, *len) };
                parts.push(ParamPart {
                    name: format!("{n}.bias"),
                    key,
                    global: (1, *len),
                    dims: [1, *len],
                    row0: 0,
                    rows: 1,
                    col0: first,
                    cols: count,
                    local_row0: at,
                });
                at += count;
            }
            // The parts of a bias lie one after another: `local_row0` counts elements there.
            self.push(key, format!("{name}.bias"), 1, at, false, parts, cut != Cut::Rows);
        }
    }

    fn matrix(&mut self, role: Role, name: &str, outs: &[(&str, usize)], in_dim: usize, cut: Cut) {
        let key = self.key(role);
        let mut parts = Vec::new();
        let mut at = 0;
        let (col0, cols) = if cut == Cut::Cols { share(in_dim, self.tp, self.tp_rank) } else { (0, in_dim) };
        for (n, total) in outs {
            let (row0, rows) =
                if cut == Cut::Rows { share(*total, self.tp, self.tp_rank) } else { (0, *total) };
            let global = (*total, in_dim);
            let dims = [*total, in_dim];
            parts.push(ParamPart {
                name: (*n).to_owned(),
                key,
                global,
                dims,
                row0,
                rows,
                col0,
                cols,
                local_row0: at,
            });
            at += rows;
        }
        self.push(key, name.to_owned(), at, cols, true, parts, cut == Cut::Whole);
    }

    /// The matrices of the held experts, one under another: of each those of `parts`, `[rows, in_dim]`.
    fn stack(&mut self, role: Role, name: &str, (group, parts): (&str, &[&str]), dims: (usize, usize)) {
        self.stack_of(self.key(role), &format!("{name}."), "weight", (group, parts), dims);
        if self.model.mlp_bias {
            let key = ParamKey { bias: true, ..self.key(role) };
            self.stack_of(key, &format!("{name}."), "bias", (group, parts), (1, dims.0));
        }
    }

    fn stack_of(
        &mut self,
        key: ParamKey,
        name: &str,
        what: &str,
        (group, parts): (&str, &[&str]),
        dims: (usize, usize),
    ) {
        let (rows, in_dim) = dims;
        let (first, held) = self.experts;
        let mut boxes = Vec::with_capacity(held * parts.len());
        for (expert, part) in (first..first + held).flat_map(|e| parts.iter().map(move |part| (e, part))) {
            boxes.push(ParamPart {
                name: format!("{name}{expert}.{part}.{what}"),
                key,
                global: dims,
                dims: [rows, in_dim],
                row0: 0,
                rows,
                col0: 0,
                cols: in_dim,
                local_row0: boxes.len() * rows,
            });
        }
        let all = boxes.len() * rows;
        self.push(key, format!("{name}{group}.{what}"), all, in_dim, !key.bias, boxes, false);
    }

    fn norm(&mut self, role: Role, name: &str) {
        let d = self.model.hidden;
        self.vector(role, &format!("{name}.weight"), d);
        if self.model.norm == NormKind::Layer {
            self.row(ParamKey { bias: true, ..self.key(role) }, &format!("{name}.bias"), d);
        }
    }

    fn vector(&mut self, role: Role, name: &str, len: usize) {
        self.row(self.key(role), name, len);
    }

    fn row(&mut self, key: ParamKey, name: &str, len: usize) {
        let part = ParamPart {
            name: name.to_owned(),
            key,
            global: (1, len),
            dims: [1, len],
            row0: 0,
            rows: 1,
            col0: 0,
            cols: len,
            local_row0: 0,
        };
        self.push(key, name.to_owned(), 1, len, false, vec![part], true);
    }

    /// A number for each query head, cut with the heads.
    fn per_head(&mut self, role: Role, name: &str, heads: usize) {
        let (col0, cols) = share(heads, self.tp, self.tp_rank);
        let key = self.key(role);
        let (global, dims) = ((1, heads), [1, heads]);
        let name = name.to_owned();
        let part =
            ParamPart { name: name.clone(), key, global, dims, row0: 0, rows: 1, col0, cols, local_row0: 0 };
        self.push(key, name, 1, cols, false, vec![part], false);
    }

    /// A tied table is the embedding, whichever stage holds it.
    fn key(&self, role: Role) -> ParamKey {
        let place = if role == Role::Embedding { Place::Embedding } else { self.place };
        ParamKey { place, role, bias: false }
    }

    fn push(
        &mut self,
        key: ParamKey,
        name: String,
        rows: usize,
        cols: usize,
        decay: bool,
        parts: Vec<ParamPart>,
        whole: bool,
    ) {
        let expert = key.role.is_expert();
        let unit = match self.place {
            Place::Layer(i) if expert => 2 + self.model.layers + i,
            Place::Layer(i) => 1 + i,
            Place::Head => 1 + self.model.layers,
            Place::Mtp => 2 + 2 * self.model.layers + usize::from(expert),
            _ => 0,
        };
        let head_rows = match (key.role, self.model.latent) {
            _ if key.bias => Vec::new(),
            (Role::QueryKeyValue, _) => vec![self.model.head_dim],
            (Role::QueryUp, Some(latent)) => vec![latent.key_dim()],
            (Role::KeyValueUp, Some(latent)) => vec![latent.nope_dim, latent.value_dim],
            _ => Vec::new(),
        };
        self.groups.push(ParamGroup {
            name,
            key,
            rows,
            cols,
            decay,
            parts,
            head_rows,
            unit,
            replicated_tp: whole,
            replication: if expert { Replication::Expert } else { Replication::Data },
            chunk: self.chunk,
        });
    }
}
