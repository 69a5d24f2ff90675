//! Buffers that live as long as the run: parameters, gradients, moments, inputs.

use std::collections::HashMap;

use spec::{DType, Position, SumTree, Zero};

use super::{Placer, aligned};
use crate::buffer::{BufferId, Home, Owned};
use crate::muon;
use crate::params::{GroupId, ParamGroup, chunks, table};
use crate::role::{Place, Role};
use crate::zero::owned;
use crate::{Bucket, GroupBuffers, Io, Mode, NORM_CHUNK};

/// Gradients are reduced in runs of about this many bytes: large enough for full bandwidth, small enough to begin
/// while most of the backward pass is still ahead.
const BUCKET_BYTES: usize = 8 << 20;

/// What the optimiser keeps of each group.
struct State {
    exp_avg: Vec<BufferId>,
    exp_avg_sq: Vec<Option<BufferId>>,
    average: Option<Vec<BufferId>>,
}

impl Placer<'_> {
    fn fixed(&mut self, name: String, rows: usize, cols: usize, dtype: DType, place: Place) -> BufferId {
        let home = Home::Static { offset: self.at };
        self.at += aligned(rows * cols * dtype.bytes());
        self.buffer(name, rows, cols, dtype, home, place)
    }

    /// The first chunk of each parameter of the model in the vector of squared gradient sums.
    fn first_chunks(&mut self) -> HashMap<String, usize> {
        let (cx, layout) = (self.cx, &self.cx.layout);
        let mut first = HashMap::new();
        for g in table(cx.model, layout, cx.coords, &chunks(cx.model, &Default::default(), 0)) {
            let chunks = g.len().div_ceil(NORM_CHUNK);
            // Ranks that hold other experts have sums of their own, in the order of the experts.
            let (parts, part) =
                if g.key.role.is_expert() { (layout.ep, cx.coords.ep(layout)) } else { (1, 0) };
            first.insert(g.name, self.norm_chunks + part * chunks);
            self.norm_chunks += parts * chunks;
        }
        first
    }

    /// Parameters, masters, gradients and moments, each region in forward order.
    pub(super) fn statics(&mut self) {
        let cx = self.cx;
        let (groups, layout) = (&cx.groups, &cx.layout);
        let owned: Vec<Owned> = groups
            .iter()
            .map(|g| {
                let (count, index) = cx.shards(g.replication);
                let whole = Owned { first: 0, count: g.len() };
                if layout.zero >= Zero::Optimizer { owned(g.len(), count, index) } else { whole }
            })
            .collect();
        let chunk0 = self.first_chunks();
        let holds_embedding = cx.chunks.iter().any(|c| c.embed);
        let sharded = (layout.zero >= Zero::Parameters).then_some(owned.as_slice());
        let params = self.region("", cx.dtype, sharded);
        self.memory.params = self.at;
        let masters = (self.cx.dtype != DType::F32 && !cx.generates())
            .then(|| self.region("master.", DType::F32, Some(&owned)));
        self.memory.master = self.at - self.memory.params;
        // Where the batch grows, what steps hand on lies where no size of it moves it.
        let early = cx.request.recipe.ramp.is_some().then(|| self.state(&owned));
        let before = self.at;
        let grads: Vec<(BufferId, BufferId)> =
            (0..groups.len()).map(|i| self.grad_levels(i, owned[i].count, holds_embedding, false)).collect();
        let head_grads: Vec<Option<(BufferId, BufferId)>> = (0..groups.len())
            .map(|i| {
                let tied_here = self.cx.shares_embedding() && groups[i].key.role == Role::Embedding;
                (tied_here && holds_embedding && cx.chunks.iter().any(|c| c.head))
                    .then(|| self.grad_levels(i, owned[i].count, holds_embedding, true))
            })
            .collect();
        self.memory.grads = self.at - before;
        let state = early.unwrap_or_else(|| self.state(&owned));
        for (i, g) in groups.iter().enumerate() {
            let copy_of_tied = g.key.role == Role::Embedding && !holds_embedding;
            self.groups.push(GroupBuffers {
                param: params[i],
                master: masters.as_ref().map(|m| m[i]),
                grad_levels: grads[i].0,
                grad: grads[i].1,
                head_grad_levels: head_grads[i].map(|h| h.0),
                head_grad: head_grads[i].map(|h| h.1),
                exp_avg: state.exp_avg[i],
                exp_avg_sq: state.exp_avg_sq[i],
                average: state.average.as_ref().map(|a| a[i]),
                owned: owned[i],
                norm_chunk0: chunk0[g.name.as_str()],
                counts: !copy_of_tied && (!g.replicated_tp || cx.coords.tp == 0),
            });
        }
    }

    /// A buffer for each group: all of it or, of groups that are sharded, the owned part.
    fn region(&mut self, prefix: &str, dtype: DType, owned: Option<&[Owned]>) -> Vec<BufferId> {
        let cx = self.cx;
        let buffer = |(i, group): (usize, &ParamGroup)| {
            let part = owned.map(|all| all[i].count).filter(|count| *count != group.len());
            let (rows, cols) = match part {
                _ if cx.generates() && !prefix.is_empty() => (0, group.cols),
                Some(count) => (1, count),
                None => (group.rows, group.cols),
            };
            self.fixed(format!("{prefix}{}", group.name), rows, cols, dtype, group.key.place)
        };
        cx.groups.iter().enumerate().map(buffer).collect()
    }

    /// What steps hand on: the optimiser's, biases of experts, and the average of the weights.
    fn state(&mut self, owned: &[Owned]) -> State {
        let before = self.at;
        let exp_avg = self.region("exp_avg.", DType::F32, Some(owned));
        let exp_avg_sq = self.second_moments(owned);
        self.memory.moments = self.at - before;
        let before = self.at;
        let biased = self.cx.model.experts.filter(|e| e.router.expert_bias);
        self.io.expert_bias = biased.map(|e| {
            let layers = self.cx.model.all_layers();
            self.fixed("expert_bias".to_owned(), layers, e.count, DType::F32, Place::Step)
        });
        self.memory.other += self.at - before;
        let before = self.at;
        let keeps = self.cx.request.recipe.ema && !self.cx.generates();
        let average = keeps.then(|| self.region("average.", DType::F32, Some(owned)));
        self.memory.average = self.at - before;
        State { exp_avg, exp_avg_sq, average }
    }

    /// The second moments of what AdamW updates: Muon keeps none.
    fn second_moments(&mut self, owned: &[Owned]) -> Vec<Option<BufferId>> {
        let (cx, mut all) = (self.cx, Vec::new());
        for (group, owned) in cx.groups.iter().zip(owned) {
            let (rows, cols) = match cx.generates() {
                true => (0, group.cols),
                false if owned.count != group.len() => (1, owned.count),
                false => (group.rows, group.cols),
            };
            all.push((!muon::updates(cx, group)).then(|| {
                let name = format!("exp_avg_sq.{}", group.name);
                self.fixed(name, rows, cols, DType::F32, group.key.place)
            }));
        }
        all
    }

    /// The gradient sums of a group: all levels, and the last one, which holds the sum in the end.
    fn grad_levels(
        &mut self,
        i: usize,
        owned: usize,
        holds_embedding: bool,
        head: bool,
    ) -> (BufferId, BufferId) {
        let g = &self.cx.groups[i];
        // A tied table's are the output projection's, of as many sequences as have logits at a time.
        let tied =
            self.cx.model.tied_embeddings && (head || g.key.role == Role::Embedding && !holds_embedding);
        let from_head = g.key.role == Role::Head || tied;
        let (levels, rows, cols) = if self.cx.generates() {
            (1, 0, g.cols)
        } else if self.cx.layout.zero >= Zero::Gradients {
            (self.shard_radices().len().max(1), 1, owned)
        } else {
            (
                self.streams(g.replication)
                    * self.levels_of(
                        g,
                        if from_head { self.cx.loss_sequences() } else { self.cx.layout.micro_batch },
                    ),
                g.rows,
                g.cols,
            )
        };
        let prefix = if head { "grad.head." } else { "grad." };
        let all =
            self.fixed(format!("{prefix}{}.levels", g.name), levels * rows, cols, DType::F32, g.key.place);
        let Home::Static { offset } = self.buffers[all.0 as usize].home else { unreachable!("just made") };
        let home = Home::Static { offset: offset + 4 * (levels - 1) * rows * cols };
        (all, self.buffer(format!("{prefix}{}", g.name), rows, cols, DType::F32, home, g.key.place))
    }

    /// Partial sums kept for a group's gradient whose ops cover `leaves` sequences each.
    pub(crate) fn levels_of(&self, group: &ParamGroup, leaves: usize) -> usize {
        let turns = usize::from(group.key.role == Role::Head && self.cx.mtp());
        (self.split_radices(leaves).1.len() + turns).max(1)
    }

    /// Radices of the counter over this rank's micro-batches, bottom-up.
    pub(crate) fn shard_radices(&self) -> Vec<u32> {
        let (m, shard) = (self.cx.layout.micro_batch, self.cx.layout.shard_dp());
        if self.cx.layout.zero < Zero::Gradients {
            return self.split_radices(m).1;
        }
        // From one micro-batch of all ranks that shard together up to all that they hold.
        let tree = SumTree::new(self.cx.request.sequences);
        let (below, above) = (tree.inner(m * shard), tree.inner(self.cx.local_sequences * shard));
        match (below, above) {
            (Some(below), Some(above)) => above[below.len()..].to_vec(),
            _ => SumTree::new(self.cx.micro_batches()).radices().to_vec(),
        }
    }

    pub(super) fn tables(&mut self) -> Io {
        let local_sequences = self.cx.local_sequences;
        let before = self.at;
        let (model, sequence) = (self.cx.model, self.cx.sequence);
        let n = if self.cx.generates() { 1 } else { local_sequences * sequence };
        // Where heads are dealt, attention has whole sequences.
        let seen = if self.cx.layout.deals_heads() { n * self.cx.layout.cp } else { n };
        let experts = model.experts.filter(|_| !self.cx.generates()).map_or(0, |e| e.count);
        let (norm_chunks, sequences) = (self.norm_chunks, self.cx.request.sequences);
        let layers = model.all_layers();
        let clips = self.cx.request.recipe.qk_clip > 0.0 && !self.cx.generates();
        let maxima = if clips { self.cx.layout.replicas() * layers * model.heads } else { 0 };
        let losses = 1 + usize::from(model.mtp.is_some() && self.cx.request.mode == Mode::Train);
        let shared = norm_chunks + maxima + layers * experts + losses * sequences + 1;
        let positions = sequence.max(self.cx.request.mode.positions());
        let rotated = model.latent.map_or(model.head_dim, |l| l.rope_dim);
        let half = if matches!(model.position, Position::Rope(_)) { rotated / 2 } else { 0 };
        let heads = self.cx.heads();
        let documents = self.cx.request.recipe.documents && !self.cx.generates();
        let mtp = self.cx.mtp();
        let cache = self.cx.request.mode.positions() * model.layers;
        let dtype = self.cx.dtype;
        let expert_bias = self.io.expert_bias;
        let mut table =
            |name: &str, rows, cols, dtype| self.fixed(name.to_owned(), rows, cols, dtype, Place::Step);
        let mut io = Io {
            tokens: table("tokens", n, 1, DType::U32),
            targets: table("targets", n, 1, DType::U32),
            next_tokens: mtp.then(|| table("next_tokens", n, 1, DType::U32)),
            next_targets: mtp.then(|| table("next_targets", n, 1, DType::U32)),
            starts: documents.then(|| table("starts", seen, 1, DType::U32)),
            loss_leaves: table("loss_leaves", (1 + usize::from(mtp)) * local_sequences, 1, DType::F64),
            losses,
            norm_chunks: table("norm_chunks", shared, 1, DType::F64),
            logit_maxima: clips.then(|| table("logit_maxima", layers, heads.q, DType::F64)),
            expert_counts: (experts > 0).then(|| table("expert_counts", layers, experts, DType::F64)),
            expert_bias,
            cos: table("rope.cos", positions, half, DType::F32),
            sin: table("rope.sin", positions, half, DType::F32),
            k_cache: None,
            v_cache: None,
        };
        if cache > 0 {
            // Of latent attention what keys and values are made of.
            let (keys, values) = match model.latent {
                Some(l) => (l.kv_rank, l.rope_dim),
                None => (heads.kv * heads.dim, heads.kv * heads.value_dim),
            };
            io.k_cache = Some(table("cache.k", cache, keys, dtype));
            io.v_cache = Some(table("cache.v", cache, values, dtype));
        }
        self.memory.other += self.at - before;
        io
    }

    /// Gradient buffers in the order in which backward completes them, cut into runs.
    pub(super) fn reduced_together(&self) -> Vec<Bucket> {
        let mut list: Vec<(usize, GroupId, BufferId)> = Vec::new();
        for (i, b) in self.groups.iter().enumerate().rev() {
            let id = GroupId(u32::try_from(i).expect("few groups"));
            if let Some(head) = b.head_grad {
                list.insert(0, (self.cx.chunks.len() - 1, id, head));
            }
            list.push((self.cx.groups[i].chunk, id, b.grad));
        }
        // Backward runs through the last chunk first.
        list.sort_by_key(|(chunk, _, _)| std::cmp::Reverse(*chunk));
        let mut buckets: Vec<(usize, Bucket)> = Vec::new();
        for (chunk, group, buffer) in list {
            let of = &self.cx.groups[group.0 as usize];
            let bytes = 4 * of.len();
            // Experts meet other ranks than the rest: their buckets fill beside those of the rest.
            let open = buckets.iter_mut().rev().find(|(_, b)| b.replication == of.replication);
            match open {
                Some((c, b)) if *c == chunk && b.bytes < BUCKET_BYTES => {
                    b.grads.push((group, buffer));
                    b.bytes += bytes;
                }
                _ => {
                    let bucket = Bucket { grads: vec![(group, buffer)], replication: of.replication, bytes };
                    buckets.push((chunk, bucket));
                }
            }
        }
        buckets.into_iter().map(|(_, b)| b).collect()
    }
}
