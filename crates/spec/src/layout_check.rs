use crate::legality::{Checked, Rule, Tolerance, broken, divisors};
use crate::sum_tree::SumTree;
use crate::{Error, Layout, ModelSpec, PipelineSchedule, Reduce, Result, Zero};

/// Most ranks of a layout: far above any machine built, and low enough that products of axes cannot overflow.
pub(crate) const MAX_WORLD: usize = 1 << 24;

impl Layout {
    /// Checks the layout as a whole against the model and the batch.
    ///
    /// `sequences` is the global batch in sequences of `sequence` tokens. Every refusal says why and which values work.
    ///
    /// # Errors
    /// Names the key that does not suit the model or the batch.
    ///
    /// ```
    /// use spec::{Layout, ModelSpec};
    /// let model = ModelSpec::preset("tiny")?;
    /// let layout = Layout { dp: 3, ..Layout::default() };
    /// let refused = layout.validate(&model, 8, 16).unwrap_err();
    /// assert_eq!(refused.to_string(), "layout.dp = 3 does not divide the global batch of 8 sequences");
    /// assert_eq!(refused.hint_text(), Some("values of layout.dp that work: 1, 2, 4, 8"));
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn validate(&self, model: &ModelSpec, sequences: usize, sequence: usize) -> Result<()> {
        Ok(self.check(model, sequences, sequence, Tolerance::NONE)?)
    }

    /// [`Layout::validate`] for stacks that make do with some layouts that this program refuses.
    ///
    /// # Errors
    /// The first rule that the layout breaks; what to say of it is worked out when asked for.
    pub fn check<'a>(
        &'a self,
        model: &'a ModelSpec,
        sequences: usize,
        sequence: usize,
        tolerance: Tolerance,
    ) -> Checked<'a> {
        self.check_sizes(sequences)?;
        self.check_context(sequence, tolerance)?;
        self.check_tensor(model, sequence, tolerance)?;
        self.check_heads(model, sequence, tolerance)?;
        self.check_shard()?;
        self.check_experts(model, sequence, tolerance)?;
        self.check_pipeline(model, tolerance)?;
        self.check_data(sequences)?;
        self.check_interleaving(sequences)
    }

    /// Checks that the axes multiply to the number of ranks started.
    ///
    /// # Errors
    /// Says how many ranks the axes make.
    ///
    /// ```
    /// use spec::Layout;
    /// let layout = Layout { tp: 2, pp: 3, ..Layout::default() };
    /// assert!(layout.validate_world(6).is_ok());
    /// let refused = layout.validate_world(12).unwrap_err();
    /// assert_eq!(refused.hint_text(), Some("set layout.dp=2, or start 6 ranks"));
    /// ```
    pub fn validate_world(&self, world: usize) -> Result<()> {
        let model_ranks = self.tp.saturating_mul(self.pp).saturating_mul(self.cp);
        let product = self.dp.saturating_mul(model_ranks);
        if product == world {
            return Ok(());
        }
        let what = format!(
            "{} = {product}, but {world} {} started",
            self.axes(),
            if world == 1 { "rank was" } else { "ranks were" },
        );
        let start = format!("start {product} {}", if product == 1 { "rank" } else { "ranks" });
        let hint = match model_ranks {
            1.. if world > 0 && world.is_multiple_of(model_ranks) => {
                format!("set layout.dp={}, or {start}", world / model_ranks)
            }
            _ => start,
        };
        Err(Error::user(what).hint(hint))
    }

    /// `layout.dp x tp x pp = 1 x 2 x 3`, with cp where it is used.
    fn axes(&self) -> String {
        let Layout { dp, tp, pp, cp, .. } = *self;
        match cp {
            1 => format!("layout.dp x tp x pp = {dp} x {tp} x {pp}"),
            _ => format!("layout.dp x cp x tp x pp = {dp} x {cp} x {tp} x {pp}"),
        }
    }

    fn check_sizes(&self, sequences: usize) -> Checked<'_> {
        let sizes = [
            ("layout.dp", self.dp),
            ("layout.tp", self.tp),
            ("layout.pp", self.pp),
            ("layout.cp", self.cp),
            ("layout.ep", self.ep),
            ("layout.chunks", self.chunks),
            ("layout.micro_batch", self.micro_batch),
            ("global batch in sequences", sequences),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| *size == 0 || *size > MAX_WORLD) {
            return broken(Rule::Sizes, move || {
                Error::user(format!("{name} = {size}, expected 1 to {MAX_WORLD}"))
            });
        }
        let world =
            [self.tp, self.pp, self.cp].into_iter().try_fold(self.dp, |world, size| world.checked_mul(size));
        match world {
            Some(world) if world <= MAX_WORLD => Ok(()),
            _ => broken(Rule::Sizes, || {
                Error::user(format!("{} ranks, expected at most {MAX_WORLD}", self.axes()))
            }),
        }
    }

    /// On a ring causal work grows along the sequence: each rank takes one piece from the front and its mirror from the
    /// back. Where heads are dealt all ranks do the same work, and take one piece each.
    fn check_context(&self, sequence: usize, tolerance: Tolerance) -> Checked<'_> {
        let (cp, pieces) = (self.cp, self.context.pieces());
        let works = move |cp: usize| cp == 1 || sequence.is_multiple_of(pieces * cp);
        if works(cp) || tolerance.padded_sequence {
            return Ok(());
        }
        broken(Rule::Context, move || {
            let what = format!(
                "layout.cp = {cp} cuts a sequence into {} pieces, which do not divide its {sequence} tokens",
                pieces * cp
            );
            Error::user(what).hint(values("layout.cp", divisors(sequence).filter(|&c| works(c))))
        })
    }

    /// Where context-parallel ranks deal the heads of a tensor-parallel rank among themselves, each takes as many query
    /// heads, all with the same number of key and value heads: a share of them, or a copy of one.
    fn check_heads<'a>(&'a self, model: &'a ModelSpec, sequence: usize, tolerance: Tolerance) -> Checked<'a> {
        if !self.deals_heads() {
            return Ok(());
        }
        let held = tolerance.held(self, model, sequence).0;
        let tp = self.tp;
        // Keys and values of latent attention are as many as queries.
        let kv = if model.latent.is_some() { held.heads } else { held.kv_heads };
        let (queries, kv) = (held.heads / tp, kv / tp);
        let shares = move |cp: usize| kv.is_multiple_of(cp) || cp.is_multiple_of(kv);
        let works = move |cp: usize| queries.is_multiple_of(cp) && shares(cp);
        let cp = self.cp;
        if works(cp) {
            return Ok(());
        }
        broken(Rule::Context, move || {
            let (count, what) =
                if queries.is_multiple_of(cp) { (kv, "key and value") } else { (queries, "query") };
            let of =
                if tp > 1 { format!("a tensor-parallel rank of {}", model.name) } else { model.name.clone() };
            let fits = move |cp: usize| cp == 1 || sequence.is_multiple_of(cp) || tolerance.padded_sequence;
            let hint = values("layout.cp", divisors(queries).filter(|&c| works(c) && fits(c)));
            Error::user(format!("layout.context = \"heads\" with layout.cp = {cp} does not divide the {count} {what} heads of {of}"))
                .hint(format!("{hint}; or layout.context=ring"))
        })
    }

    /// Groups that shard are equal runs of the data-parallel ranks, and hold whole sets of experts or a part of one.
    ///
    /// # Errors
    /// If the groups are not equal, or cut what holds all experts.
    pub fn check_shard(&self) -> Checked<'_> {
        let Some(shard) = self.shard else { return Ok(()) };
        let Layout { dp, ep, .. } = *self;
        if self.zero == Zero::Off && shard != dp {
            return broken(Rule::Shards, move || {
                Error::user(format!("layout.shard = {shard}, but layout.zero = 0 shards nothing"))
                    .hint("set layout.zero=1, 2 or 3, or leave layout.shard out")
            });
        }
        let inner = self.cp.saturating_mul(self.tp);
        let experts = move |shard: usize| {
            let ranks = inner.saturating_mul(shard);
            ranks.is_multiple_of(ep) || ep.is_multiple_of(ranks)
        };
        let cp = self.cp;
        // A group of one rank shards nothing.
        let shards =
            move |shard: usize| dp.is_multiple_of(shard) && (shard.saturating_mul(cp) > 1 || dp == 1);
        let works = move |shard: usize| shard > 0 && shards(shard) && experts(shard);
        if works(shard) {
            return Ok(());
        }
        broken(Rule::Shards, move || {
            let what = if shard == 0 || !dp.is_multiple_of(shard) {
                format!("layout.shard = {shard} does not divide layout.dp = {dp}")
            } else if shards(shard) {
                format!("layout.shard = {shard} cuts the {ep} ranks that hold all experts")
            } else {
                format!("layout.shard = {shard} shards nothing")
            };
            Error::user(what).hint(values("layout.shard", divisors(dp).filter(|&s| works(s))))
        })
    }

    fn check_experts<'a>(
        &'a self,
        model: &'a ModelSpec,
        sequence: usize,
        tolerance: Tolerance,
    ) -> Checked<'a> {
        let Layout { tp, ep, .. } = *self;
        let Some(experts) = &model.experts else {
            if ep == 1 {
                return Ok(());
            }
            return broken(Rule::Experts, move || {
                Error::user(format!("layout.ep = {ep}, but {} has no experts", model.name))
                    .hint("set layout.ep=1")
            });
        };
        let ranks = self.stage_ranks();
        let count = experts.count;
        let whole = move |ep: usize| count.is_multiple_of(ep) || tolerance.padded;
        let works = move |ep: usize| ranks.is_multiple_of(ep) && whole(ep);
        if !works(ep) {
            return broken(Rule::Experts, move || {
                let (size, what) = if whole(ep) {
                    (ranks, "ranks of a stage (dp x cp x tp)".to_owned())
                } else {
                    (count, format!("experts of {}", model.name))
                };
                Error::user(format!("layout.ep = {ep} does not divide the {size} {what}"))
                    .hint(values("layout.ep", divisors(count).filter(|&e| works(e))))
            });
        }
        let shared = experts.shared_ffn;
        if !shared.is_multiple_of(tp) && !tolerance.padded {
            return broken(Rule::Tensor, move || {
                Error::user(format!(
                    "layout.tp = {tp} does not divide the {shared} columns of the shared experts of {}",
                    model.name
                ))
                .hint(values("layout.tp", divisors(shared)))
            });
        }
        // Each tensor-parallel rank routes its own share of the tokens.
        let tokens = self.micro_batch.saturating_mul(sequence / self.cp);
        if !tokens.is_multiple_of(tp) && !tolerance.padded_sequence {
            return broken(Rule::Tensor, move || {
                Error::user(format!(
                    "layout.tp = {tp} does not divide the {tokens} tokens of a micro-batch, which experts need"
                ))
                .hint(values("layout.tp", divisors(tokens)))
            });
        }
        Ok(())
    }

    fn check_tensor<'a>(
        &'a self,
        model: &'a ModelSpec,
        sequence: usize,
        tolerance: Tolerance,
    ) -> Checked<'a> {
        let tp = self.tp;
        let copied = tolerance.copied_kv_heads && model.kv_heads < tp;
        let cut = [
            (!tolerance.padded).then_some(("query heads", model.heads)),
            // Keys and values of latent attention are as many as queries.
            (model.latent.is_none() && !tolerance.padded && !copied)
                .then_some(("key and value heads", model.kv_heads)),
            // A model of nothing but experts has no other feed-forward layer.
            (model.expert_layers() < model.layers && !tolerance.padded).then_some(("ffn columns", model.ffn)),
        ];
        let cut = move || cut.into_iter().flatten();
        if let Some((what, size)) = cut().find(|(_, size)| !size.is_multiple_of(tp)) {
            return broken(Rule::Tensor, move || {
                let most = cut().map(|(_, n)| n).min().unwrap_or(1);
                let works = (1..=most).filter(|t| cut().all(|(_, n)| n.is_multiple_of(*t)));
                Error::user(format!("layout.tp = {tp} does not divide the {size} {what} of {}", model.name))
                    .hint(values("layout.tp", works))
            });
        }
        if self.sequence_parallel && tp == 1 {
            return broken(Rule::Tensor, || {
                Error::user("layout.sequence_parallel = true needs layout.tp > 1, found layout.tp = 1")
                    .hint("set layout.sequence_parallel=false, or layout.tp=2")
            });
        }
        let local = sequence / self.cp;
        if !self.sequence_parallel || local.is_multiple_of(tp) || tolerance.padded_sequence {
            return Ok(());
        }
        broken(Rule::Tensor, move || {
            let part =
                if self.cp == 1 { "the sequence" } else { "a context-parallel rank's part of the sequence," };
            Error::user(format!(
                "layout.sequence_parallel = true needs layout.tp = {tp} to divide {part} of {local} tokens"
            ))
            .hint(format!(
                "set batch.sequence={}, or layout.sequence_parallel=false",
                local.next_multiple_of(tp) * self.cp
            ))
        })
    }

    fn check_pipeline<'a>(&'a self, model: &'a ModelSpec, tolerance: Tolerance) -> Checked<'a> {
        let Layout { pp, chunks, .. } = *self;
        let stages = pp.saturating_mul(chunks);
        let interleaved = self.schedule == PipelineSchedule::Interleaved;
        if interleaved && chunks == 1 {
            return broken(Rule::Stages, || {
                Error::user(
                    "layout.schedule = \"interleaved\" needs layout.chunks > 1, found layout.chunks = 1",
                )
                .hint("set layout.chunks=2, or layout.schedule=1f1b")
            });
        }
        if interleaved && pp == 1 {
            return broken(Rule::Stages, || {
                Error::user("layout.schedule = \"interleaved\" needs layout.pp > 1, found layout.pp = 1")
                    .hint("set layout.pp=2, or layout.schedule=1f1b and layout.chunks=1")
            });
        }
        if !interleaved && chunks > 1 {
            return broken(Rule::Stages, move || {
                Error::user(format!(
                    "layout.chunks = {chunks} needs layout.schedule = \"interleaved\", found {}",
                    self.schedule.name()
                ))
                .hint("set layout.schedule=interleaved, or layout.chunks=1")
            });
        }
        // Ends of their own need chunks: a stage of a plain pipeline holds a layer at least.
        let own_ends = tolerance.empty_ends || !self.stage_layers.is_empty();
        let room = model.layers + if own_ends && interleaved { 2 } else { 0 };
        if stages > room || pp > model.layers {
            return broken(Rule::Stages, move || {
                let most = (room / chunks).min(model.layers);
                let hint = match most {
                    0 => format!("set layout.chunks to at most {}", (room / pp).max(1)),
                    _ => format!("set layout.pp to at most {most}"),
                };
                Error::user(format!(
                    "layout.pp x chunks = {pp} x {chunks} stages, but {} has {} layers",
                    model.name, model.layers
                ))
                .hint(hint)
            });
        }
        self.check_split(model, stages)
    }

    /// Layers of each stage, if they are given.
    fn check_split<'a>(&'a self, model: &'a ModelSpec, stages: usize) -> Checked<'a> {
        let split = &self.stage_layers;
        if split.is_empty() {
            return Ok(());
        }
        let sum = split.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
        // A chunk may hold the embedding alone, or the head, where its stage has others.
        let end = |v: usize| self.chunks > 1 && (v == 0 || v + 1 == stages);
        let empty = split.iter().enumerate().position(|(v, &n)| n == 0 && !end(v));
        if split.len() == stages && empty.is_none() && sum == model.layers {
            return Ok(());
        }
        broken(Rule::Stages, move || {
            let layers = model.layers;
            let even: Vec<usize> =
                (0..stages).map(|s| layers / stages + usize::from(s < layers % stages)).collect();
            let what = match empty {
                _ if split.len() != stages => format!(
                    "layout.stage_layers has {} entries, expected layout.pp x chunks = {stages}",
                    split.len()
                ),
                Some(empty) => {
                    format!("layout.stage_layers[{empty}] = 0, expected at least one layer a stage")
                }
                None => {
                    format!("layout.stage_layers adds up to {sum} layers, but {} has {layers}", model.name)
                }
            };
            Error::user(what).hint(format!("for example layout.stage_layers={even:?}"))
        })
    }

    fn check_data(&self, n: usize) -> Checked<'_> {
        let Layout { dp, micro_batch: m, .. } = *self;
        let tree = (self.reduce == Reduce::Tree).then(|| SumTree::new(n));
        // Under a fixed tree, ranks add in pairs: their number is a power of two that splits the tree at the root.
        let dp_works = move |d: usize| {
            n.is_multiple_of(d) && tree.as_ref().is_none_or(|tree| d.is_power_of_two() && tree.splits(d))
        };
        if !dp_works(dp) {
            return broken(Rule::Batch, move || {
                let hint = values("layout.dp", divisors(n).filter(|&d| dp_works(d)));
                if !n.is_multiple_of(dp) {
                    let what = format!("layout.dp = {dp} does not divide the global batch of {n} sequences");
                    return Error::user(what).hint(hint);
                }
                Error::user(format!(
                    "layout.dp = {dp} does not split the sum tree over {n} sequences (a power of two that divides {n})"
                ))
                .hint(format!("{hint}; any divisor with layout.reduce=ring"))
            });
        }
        let (share, shard) = (n / dp, self.shard_dp());
        let tree = (self.reduce == Reduce::Tree).then(|| SumTree::new(n));
        let m_works = move |m: usize| {
            share.is_multiple_of(m)
                && tree.as_ref().is_none_or(|tree| {
                    // From ZeRO 2 on, the same micro-batch of all ranks that shard together is reduced at once:
                    // together they have to be a whole subtree too.
                    tree.inner(m).is_some()
                        && (self.zero < Zero::Gradients || tree.inner(m * shard).is_some())
                })
        };
        if m_works(m) {
            return Ok(());
        }
        broken(Rule::Batch, move || {
            let what = if share.is_multiple_of(m) {
                format!(
                    "layout.micro_batch = {m} is not a whole subtree of the sum over {n} sequences in {dp} shares"
                )
            } else {
                format!(
                    "layout.micro_batch = {m} does not divide a rank's share of {share} sequences ({n} over layout.dp = {dp})"
                )
            };
            Error::user(what).hint(values("layout.micro_batch", divisors(share).filter(|&m| m_works(m))))
        })
    }

    fn check_interleaving(&self, n: usize) -> Checked<'_> {
        let micro_batches = n / self.dp / self.micro_batch;
        let pp = self.pp;
        if self.schedule != PipelineSchedule::Interleaved || micro_batches.is_multiple_of(pp) {
            return Ok(());
        }
        broken(Rule::Batch, move || {
            Error::user(format!(
                "layout.schedule = \"interleaved\" needs layout.pp = {pp} to divide the {micro_batches} micro-batches of a rank"
            ))
            .hint(values("layout.pp", divisors(micro_batches)))
        })
    }
}

/// `values of layout.tp that work: 1, 2, 4`, at most a dozen of them.
fn values(key: &str, works: impl Iterator<Item = usize>) -> String {
    const SHOWN: usize = 12;
    let mut all: Vec<String> = works.take(SHOWN + 1).map(|v| v.to_string()).collect();
    if all.len() > SHOWN {
        all[SHOWN] = "...".to_owned();
    }
    match all.is_empty() {
        true => format!("no value of {key} suits the rest of the layout"),
        false => format!("values of {key} that work: {}", all.join(", ")),
    }
}

#[cfg(test)]
#[path = "layout_check_tests.rs"]
mod tests;
