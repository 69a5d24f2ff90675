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
        self.check_sizes(sequences)?;
        self.check_context(sequence)?;
        self.check_tensor(model, sequence)?;
        self.check_experts(model, sequence)?;
        self.check_pipeline(model)?;
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

    /// Checks that the trainer knows how to run the layout: planning knows more.
    ///
    /// # Errors
    /// Names the axis that does not train yet.
    pub fn check_trains(&self) -> Result<()> {
        for (key, size, what) in
            [("cp", self.cp, "context parallelism"), ("ep", self.ep, "expert parallelism")]
        {
            if size > 1 {
                return Err(Error::user(format!(
                    "layout.{key} = {size}: {what} can be planned, it does not train yet"
                ))
                .hint(format!("set layout.{key}=1")));
            }
        }
        Ok(())
    }

    /// `layout.dp x tp x pp = 1 x 2 x 3`, with cp where it is used.
    fn axes(&self) -> String {
        let Layout { dp, tp, pp, cp, .. } = *self;
        match cp {
            1 => format!("layout.dp x tp x pp = {dp} x {tp} x {pp}"),
            _ => format!("layout.dp x cp x tp x pp = {dp} x {cp} x {tp} x {pp}"),
        }
    }

    fn check_sizes(&self, sequences: usize) -> Result<()> {
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
        for (name, size) in sizes {
            if size == 0 || size > MAX_WORLD {
                return Err(Error::user(format!("{name} = {size}, expected 1 to {MAX_WORLD}")));
            }
        }
        let world =
            [self.tp, self.pp, self.cp].into_iter().try_fold(self.dp, |world, size| world.checked_mul(size));
        match world {
            Some(world) if world <= MAX_WORLD => Ok(()),
            _ => Err(Error::user(format!("{} ranks, expected at most {MAX_WORLD}", self.axes()))),
        }
    }

    /// Causal work grows along the sequence: each rank takes one piece from the front and its mirror from the back.
    fn check_context(&self, sequence: usize) -> Result<()> {
        let cp = self.cp;
        let works = |cp: usize| cp == 1 || sequence.is_multiple_of(2 * cp);
        if works(cp) {
            return Ok(());
        }
        let what = format!(
            "layout.cp = {cp} cuts a sequence into {} pieces, which do not divide its {sequence} tokens",
            2 * cp
        );
        Err(Error::user(what).hint(values("layout.cp", divisors(sequence).filter(|&c| works(c)))))
    }

    fn check_experts(&self, model: &ModelSpec, sequence: usize) -> Result<()> {
        let Layout { tp, ep, .. } = *self;
        let Some(experts) = &model.experts else {
            if ep == 1 {
                return Ok(());
            }
            return Err(Error::user(format!("layout.ep = {ep}, but {} has no experts", model.name))
                .hint("set layout.ep=1"));
        };
        let ranks = self.stage_ranks();
        let works = |ep: usize| ranks.is_multiple_of(ep) && experts.count.is_multiple_of(ep);
        if !works(ep) {
            let (size, what) = if experts.count.is_multiple_of(ep) {
                (ranks, "ranks of a stage (dp x cp x tp)".to_owned())
            } else {
                (experts.count, format!("experts of {}", model.name))
            };
            return Err(Error::user(format!("layout.ep = {ep} does not divide the {size} {what}"))
                .hint(values("layout.ep", divisors(experts.count).filter(|&e| works(e)))));
        }
        if !experts.shared_ffn.is_multiple_of(tp) {
            return Err(Error::user(format!(
                "layout.tp = {tp} does not divide the {} columns of the shared experts of {}",
                experts.shared_ffn, model.name
            ))
            .hint(values("layout.tp", divisors(experts.shared_ffn))));
        }
        // Each tensor-parallel rank routes its own share of the tokens.
        let tokens = self.micro_batch.saturating_mul(sequence / self.cp);
        if !tokens.is_multiple_of(tp) {
            return Err(Error::user(format!(
                "layout.tp = {tp} does not divide the {tokens} tokens of a micro-batch, which experts need"
            ))
            .hint(values("layout.tp", divisors(tokens))));
        }
        Ok(())
    }

    fn check_tensor(&self, model: &ModelSpec, sequence: usize) -> Result<()> {
        let tp = self.tp;
        let divides = |n: usize| n.is_multiple_of(tp);
        let mut cut = vec![("query heads", model.heads)];
        // Keys and values of latent attention are as many as queries.
        cut.extend(model.latent.is_none().then_some(("key and value heads", model.kv_heads)));
        // A model of nothing but experts has no other feed-forward layer.
        cut.extend((model.expert_layers() < model.layers).then_some(("ffn columns", model.ffn)));
        for &(what, size) in &cut {
            if !divides(size) {
                let most = cut.iter().map(|(_, n)| *n).min().unwrap_or(1);
                let works = (1..=most).filter(|t| cut.iter().all(|(_, n)| n.is_multiple_of(*t)));
                return Err(Error::user(format!(
                    "layout.tp = {tp} does not divide the {size} {what} of {}",
                    model.name
                ))
                .hint(values("layout.tp", works)));
            }
        }
        if self.sequence_parallel && tp == 1 {
            return Err(Error::user(
                "layout.sequence_parallel = true needs layout.tp > 1, found layout.tp = 1",
            )
            .hint("set layout.sequence_parallel=false, or layout.tp=2"));
        }
        let local = sequence / self.cp;
        if self.sequence_parallel && !divides(local) {
            let part =
                if self.cp == 1 { "the sequence" } else { "a context-parallel rank's part of the sequence," };
            return Err(Error::user(format!(
                "layout.sequence_parallel = true needs layout.tp = {tp} to divide {part} of {local} tokens"
            ))
            .hint(format!(
                "set batch.sequence={}, or layout.sequence_parallel=false",
                local.next_multiple_of(tp) * self.cp
            )));
        }
        Ok(())
    }

    fn check_pipeline(&self, model: &ModelSpec) -> Result<()> {
        let Layout { pp, chunks, .. } = *self;
        let stages = pp.saturating_mul(chunks);
        let interleaved = self.schedule == PipelineSchedule::Interleaved;
        if interleaved && chunks == 1 {
            return Err(Error::user(
                "layout.schedule = \"interleaved\" needs layout.chunks > 1, found layout.chunks = 1",
            )
            .hint("set layout.chunks=2, or layout.schedule=1f1b"));
        }
        if !interleaved && chunks > 1 {
            return Err(Error::user(format!(
                "layout.chunks = {chunks} needs layout.schedule = \"interleaved\", found {}",
                self.schedule.name()
            ))
            .hint("set layout.schedule=interleaved, or layout.chunks=1"));
        }
        if stages > model.layers {
            let most = model.layers / chunks;
            let hint = match most {
                0 => format!("set layout.chunks to at most {}", (model.layers / pp).max(1)),
                _ => format!("set layout.pp to at most {most}"),
            };
            return Err(Error::user(format!(
                "layout.pp x chunks = {pp} x {chunks} stages, but {} has {} layers",
                model.name, model.layers
            ))
            .hint(hint));
        }
        let split = &self.stage_layers;
        if split.is_empty() {
            return Ok(());
        }
        let even: Vec<usize> =
            (0..stages).map(|s| model.layers / stages + usize::from(s < model.layers % stages)).collect();
        let example = format!("for example layout.stage_layers={even:?}");
        if split.len() != stages {
            return Err(Error::user(format!(
                "layout.stage_layers has {} entries, expected layout.pp x chunks = {stages}",
                split.len()
            ))
            .hint(example));
        }
        if let Some(empty) = split.iter().position(|&n| n == 0) {
            return Err(Error::user(format!(
                "layout.stage_layers[{empty}] = 0, expected at least one layer a stage"
            ))
            .hint(example));
        }
        let sum = split.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
        if sum != model.layers {
            return Err(Error::user(format!(
                "layout.stage_layers adds up to {sum} layers, but {} has {}",
                model.name, model.layers
            ))
            .hint(example));
        }
        Ok(())
    }

    fn check_data(&self, n: usize) -> Result<()> {
        let Layout { dp, micro_batch: m, .. } = *self;
        let tree = (self.reduce == Reduce::Tree).then(|| SumTree::new(n));
        // Under a fixed tree, ranks add in pairs: their number is a power of two that splits the tree at the root.
        let dp_works = |d: usize| {
            n.is_multiple_of(d) && tree.as_ref().is_none_or(|tree| d.is_power_of_two() && tree.splits(d))
        };
        let all_dp = || divisors(n).filter(|&d| dp_works(d));
        if !n.is_multiple_of(dp) {
            return Err(Error::user(format!(
                "layout.dp = {dp} does not divide the global batch of {n} sequences"
            ))
            .hint(values("layout.dp", all_dp())));
        }
        if !dp_works(dp) {
            return Err(Error::user(format!(
                "layout.dp = {dp} does not split the sum tree over {n} sequences (a power of two that divides {n})"
            ))
            .hint(format!("{}; any divisor with layout.reduce=ring", values("layout.dp", all_dp()))));
        }
        let share = n / dp;
        let m_works = |m: usize| {
            share.is_multiple_of(m)
                && tree.as_ref().is_none_or(|tree| {
                    // From ZeRO 2 on, the same micro-batch of all ranks is reduced at once: together they have to be
                    // a whole subtree too.
                    tree.inner(m).is_some() && (self.zero < Zero::Gradients || tree.inner(m * dp).is_some())
                })
        };
        if m_works(m) {
            return Ok(());
        }
        let what = if share.is_multiple_of(m) {
            format!(
                "layout.micro_batch = {m} is not a whole subtree of the sum over {n} sequences in {dp} shares"
            )
        } else {
            format!(
                "layout.micro_batch = {m} does not divide a rank's share of {share} sequences ({n} over layout.dp = {dp})"
            )
        };
        Err(Error::user(what).hint(values("layout.micro_batch", divisors(share).filter(|&m| m_works(m)))))
    }

    fn check_interleaving(&self, n: usize) -> Result<()> {
        let micro_batches = n / self.dp / self.micro_batch;
        let pp = self.pp;
        if self.schedule != PipelineSchedule::Interleaved || micro_batches.is_multiple_of(pp) {
            return Ok(());
        }
        Err(Error::user(format!(
            "layout.schedule = \"interleaved\" needs layout.pp = {pp} to divide the {micro_batches} micro-batches of a rank"
        ))
        .hint(values("layout.pp", divisors(micro_batches))))
    }
}

impl PipelineSchedule {
    /// As written in a run file.
    pub const fn name(self) -> &'static str {
        match self {
            PipelineSchedule::Gpipe => "gpipe",
            PipelineSchedule::OneFOneB => "1f1b",
            PipelineSchedule::Interleaved => "interleaved",
            PipelineSchedule::ZeroBubble => "zero-bubble",
        }
    }
}

fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n.is_multiple_of(*d))
}

/// `values of layout.tp that work: 1, 2, 4`, at most a dozen of them.
fn values(key: &str, works: impl Iterator<Item = usize>) -> String {
    const SHOWN: usize = 12;
    let mut all: Vec<String> = works.take(SHOWN + 1).map(|v| v.to_string()).collect();
    if all.len() > SHOWN {
        all[SHOWN] = "...".to_owned();
    }
    format!("values of {key} that work: {}", all.join(", "))
}

#[cfg(test)]
#[path = "layout_check_tests.rs"]
mod tests;
