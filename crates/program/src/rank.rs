//! Whose program it is: what shapes every op of a rank, worked out once.

use std::collections::HashMap;

use spec::{DType, Error, Layout, ModelSpec, Position, Result, SumTree, Zero};

use crate::coords::Coords;
use crate::emit::Layer;
use crate::heads::Heads;
use crate::op::Axis;
use crate::params::{Chunk, GroupId, ParamGroup, Replication, chunks, share, table};
use crate::role::{ParamKey, Place, Role};
use crate::{Loss, Mode, Request, qk_clip};

/// Rows beyond which products with a packed weight gain nothing from more.
const LOSS_ROWS: usize = 1024;

/// A rank with its layers and parameters.
pub(crate) struct Rank<'a> {
    pub(crate) request: &'a Request<'a>,
    pub(crate) model: &'a ModelSpec,
    /// As asked for; without ZeRO where nobody is there to shard with.
    pub(crate) layout: Layout,
    pub(crate) coords: Coords,
    /// The pieces of the model that it holds, by virtual stage.
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) groups: Vec<ParamGroup>,
    /// Which group is which parameter's.
    pub(crate) index: HashMap<ParamKey, GroupId>,
    /// Ranks of the pipeline group, by stage.
    pub(crate) pipeline: Vec<usize>,
    /// Tokens of a sequence on this rank: its part where cp cuts sequences.
    pub(crate) sequence: usize,
    /// Sequences of this rank in one step.
    pub(crate) local_sequences: usize,
    pub(crate) dtype: DType,
    /// How layers are emitted, if not as the model says.
    pub(crate) layer: Option<Layer<'a>>,
}

impl<'a> Rank<'a> {
    pub(crate) fn of(request: &'a Request<'a>) -> Result<Rank<'a>> {
        let (model, layout) = (request.model, request.layout);
        layout.validate(model, request.sequences, request.sequence)?;
        if request.mode != Mode::Train {
            check_generates(layout)?;
        }
        if let (true, Position::Learned { .. }) = (request.recipe.documents, &model.position) {
            return Err(Error::user(
                "data.attend = \"documents\" with learned positions, which begin anew in no document",
            )
            .hint("set data.attend=all, or model.position=rope"));
        }
        qk_clip::check(request)?;
        let shares = layout.replicas() > 1 || model.experts.is_some() && layout.expert_replicas() > 1;
        let zero = if shares { layout.zero } else { Zero::Off };
        let shard = layout.shard.filter(|shard| zero != Zero::Off && *shard < layout.dp);
        let layout = Layout { zero, shard, ..layout.clone() };
        let coords = Coords::of(request.rank, &layout);
        let mut chunks = chunks(model, &layout, coords.pp);
        // What is generated is the next token.
        chunks.iter_mut().for_each(|c| c.mtp &= request.mode == Mode::Train);
        let groups = table(model, &layout, coords, &chunks);
        Ok(Rank {
            request,
            model,
            coords,
            index: (0..).map(GroupId).zip(&groups).map(|(id, g)| (g.key, id)).collect(),
            pipeline: coords.peers(Axis::Pp, &layout),
            sequence: request.sequence / layout.cp,
            local_sequences: request.sequences / layout.dp,
            dtype: request.precision,
            chunks,
            groups,
            layout,
            layer: None,
        })
    }

    /// Micro-batches of a step.
    pub(crate) fn micro_batches(&self) -> usize {
        self.local_sequences / self.layout.micro_batch
    }

    /// Bottom-up radices of the tree over the sequences that a weight gradient is summed over before ranks talk.
    pub(crate) fn local_radices(&self) -> Vec<u32> {
        let tree = SumTree::new(self.request.sequences);
        let m = self.layout.micro_batch;
        let covered = if self.layout.zero >= Zero::Gradients { m } else { self.local_sequences };
        // Without a fixed order over ranks only the local order matters; a micro-batch is a part of it either way.
        let whole = |n: usize| SumTree::new(n).radices().to_vec();
        let trees = [tree.inner(covered), Some(whole(covered))];
        let cut = |radices: &Vec<u32>| cut_at(radices, m).is_some();
        trees.into_iter().flatten().find(cut).unwrap_or_else(|| [whole(m), whole(covered / m)].concat())
    }

    /// Sequences that have logits at a time.
    pub(crate) fn loss_sequences(&self) -> usize {
        match self.request.loss {
            _ if self.mtp() => 1,
            Loss::OneSequence => 1,
            Loss::Few => self.few(),
            Loss::MicroBatch => self.layout.micro_batch,
        }
    }

    /// [`Loss::Few`]: the largest subtree of a micro-batch's sequences.
    fn few(&self) -> usize {
        let radices = self.local_radices();
        let levels = |left: usize| left.max(1);
        let mut few = 1;
        for (below, radix) in radices.iter().enumerate() {
            let count = few * *radix as usize;
            // Of each column of the vocabulary.
            let logits = (count - 1) * self.sequence * self.dtype.bytes();
            let spared = levels(radices.len()) - levels(radices.len() - below - 1);
            let sums = spared * self.model.hidden * DType::F32.bytes();
            if count > self.layout.micro_batch || count * self.sequence > LOSS_ROWS || logits > sums {
                break;
            }
            few = count;
        }
        few
    }

    /// Whether the rank learns to predict one token more.
    pub(crate) fn mtp(&self) -> bool {
        self.chunks.iter().any(|c| c.mtp)
    }

    /// Whether the embedding is used at both ends of the pipeline.
    pub(crate) fn shares_embedding(&self) -> bool {
        self.model.tied_embeddings || self.model.mtp.is_some()
    }

    /// How many layers come before that of `place`, where it is in one.
    pub(crate) fn layer_of(&self, place: Place) -> Option<usize> {
        match place {
            Place::Layer(i) => Some(i),
            Place::Mtp => Some(self.model.layers),
            _ => None,
        }
    }

    /// One token against a cache instead of whole sequences.
    pub(crate) fn generates(&self) -> bool {
        self.request.mode != Mode::Train
    }

    pub(crate) fn group(&self, place: Place, role: Role, bias: bool) -> Option<GroupId> {
        self.index.get(&ParamKey { place, role, bias }).copied()
    }

    pub(crate) fn heads(&self) -> Heads {
        let (m, tp) = (self.model, self.layout.tp);
        let q = m.heads / tp;
        let score_factor = match (&m.position, m.latent) {
            (Position::Rope(rope), Some(_)) => rope.scaling.score_factor() as f32,
            _ => 1.0,
        };
        match m.latent {
            Some(l) => Heads { q, kv: q, dim: l.key_dim(), value_dim: l.value_dim, score_factor },
            None => Heads { q, kv: m.kv_heads / tp, dim: m.head_dim, value_dim: m.head_dim, score_factor },
        }
    }

    /// Tokens of a sequence on all ranks together.
    pub(crate) fn context(&self) -> usize {
        self.sequence * self.layout.cp
    }

    /// How many ranks hold the same elements of a group, and which of them this one is: (count, index).
    pub(crate) fn replicas(&self, replication: Replication) -> (usize, usize) {
        self.coords.replicas(replication, &self.layout)
    }

    /// How many of them shard together, and which of those this one is: (count, index).
    pub(crate) fn shards(&self, replication: Replication) -> (usize, usize) {
        self.coords.shards(replication, &self.layout)
    }

    /// Whether owners of the same shard in other groups have gradients of their own.
    pub(crate) fn sums_over_owners(&self, replication: Replication) -> bool {
        self.layout.zero != Zero::Off && self.coords.owners(replication, &self.layout).0 > 1
    }

    /// Whether some parameter is held by several ranks, so that gradients meet.
    pub(crate) fn reduces(&self) -> bool {
        self.groups.iter().any(|g| self.replicas(g.replication).0 > 1)
    }

    /// First row and rows of this rank's vocabulary shard.
    pub(crate) fn vocab(&self) -> (usize, usize) {
        share(self.model.vocab, self.layout.tp, self.coords.tp)
    }

    /// Tokens of one micro-batch.
    pub(crate) fn tokens(&self) -> usize {
        if self.generates() { 1 } else { self.layout.micro_batch * self.sequence }
    }

    /// Rows of the residual stream that this rank holds.
    pub(crate) fn residual_rows(&self) -> usize {
        if self.sequence_parallel() { self.tokens() / self.layout.tp } else { self.tokens() }
    }

    pub(crate) fn sequence_parallel(&self) -> bool {
        self.layout.sequence_parallel && !self.generates()
    }

    /// The message into virtual stage `stage` (forward) or out of it (backward).
    pub(crate) fn tag(&self, virtual_stage: usize, backward: bool) -> u32 {
        u32::try_from(2 * virtual_stage + usize::from(backward)).expect("few stages")
    }

    pub(crate) fn peer(&self, virtual_stage: usize) -> usize {
        self.pipeline[virtual_stage % self.layout.pp]
    }
}

/// Generation is of one rank: a token has no part of a sequence.
fn check_generates(layout: &Layout) -> Result<()> {
    if layout.world() > 1 {
        return Err(Error::user(format!(
            "a layout of {} ranks, but one rank generates alone",
            layout.world()
        ))
        .hint("leave the layout at its defaults"));
    }
    Ok(())
}

/// After how many radices, bottom-up, a tree has so many leaves below a node.
pub(crate) fn cut_at(radices: &[u32], leaves: usize) -> Option<usize> {
    let mut product = 1;
    (0..=radices.len()).find(|&at| {
        product *= at.checked_sub(1).map_or(1, |below| radices[below] as usize);
        product == leaves
    })
}
