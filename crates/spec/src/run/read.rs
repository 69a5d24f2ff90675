use super::keys::{KEYS, Key, MAX_BATCH_TOKENS, VOCAB_MIN};
use super::*;
use crate::doc::{Doc, Val};
use crate::model_toml::read_model;
use crate::{ContextMode, Error, ExpertRows, PipelineSchedule, Recompute, Reduce, Result, Zero};
use std::path::Path;

impl RunSpec {
    /// Reads a run: defaults, then the file as `(path, text)`, then overrides `key=value`, later ones winning.
    ///
    /// Override values are TOML; what is not TOML is text, so `run.dir=runs/a` needs no quotes. `none` unsets a key
    /// that may be absent. Of keys that exclude each other (`batch.sequences` and `batch.tokens`) the later wins;
    /// `model.preset` or `model.config` drops the model keys written before it.
    ///
    /// The function itself reads nothing: `load_file` gives the text of the `config.json` that `model.config` names.
    ///
    /// # Errors
    /// Unknown keys, wrong types, values out of range and contradictions, each with its place and a hint.
    ///
    /// ```
    /// use spec::RunSpec;
    /// let file = "[train]\nsteps = 100\n\n[batch]\ntokens = 4096\n";
    /// let run = RunSpec::load(Some(("run.toml", file)), &["train.steps=200".into()], &RunSpec::no_files)?;
    /// assert_eq!((run.train.steps, run.batch.sequences), (200, 16));
    ///
    /// let file = "[train]\nstep = 100\n";
    /// let refused = RunSpec::load(Some(("run.toml", file)), &[], &RunSpec::no_files).unwrap_err();
    /// assert_eq!(refused.to_string(), "unknown key train.step in run.toml:2");
    /// assert_eq!(refused.hint_text(), Some("did you mean `train.steps`?"));
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn load(
        file: Option<(&str, &str)>,
        overrides: &[String],
        load_file: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<RunSpec> {
        Ok(Self::resolve(file, overrides, load_file)?.run)
    }

    /// As [`RunSpec::load`], and who set which key.
    ///
    /// # Errors
    /// Those of [`RunSpec::load`].
    pub fn resolve(
        file: Option<(&str, &str)>,
        overrides: &[String],
        load_file: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<Resolved> {
        let read = Self::resolve_open(file, overrides, load_file)?;
        read.check_layout()?;
        Ok(read)
    }

    /// The same, of a layout that is not yet held to the model and the batch, because how many ranks there are is still
    /// open: [`Resolved::check_layout`] does it.
    ///
    /// # Errors
    /// Those of [`RunSpec::load`], but for what the layout does not suit.
    pub fn resolve_open(
        file: Option<(&str, &str)>,
        overrides: &[String],
        load_file: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<Resolved> {
        Self::read(file, overrides, load_file).map_err(hint_from_key)
    }

    fn read(
        file: Option<(&str, &str)>,
        overrides: &[String],
        load_file: &dyn Fn(&Path) -> Result<String>,
    ) -> Result<Resolved> {
        let mut doc = Doc::new(KEYS.iter().collect(), "");
        if let Some((path, text)) = file {
            doc.add_file(path, text)?;
        }
        for text in overrides {
            doc.add_override(text)?;
        }
        doc.starts_anew("model.preset", "model.");
        doc.starts_anew("model.config", "model.");
        doc.starts_anew("model.rope_scaling.type", "model.rope_scaling.");
        doc.exclusive(&["model.preset", "model.config"])?;
        doc.exclusive(&["data.text", "data.prefix", "data.blend"])?;
        doc.exclusive(&["batch.sequences", "batch.tokens"])?;
        doc.exclusive(&["schedule.min_lr", "schedule.min_lr_ratio"])?;
        let auto_layout = doc.flag("layout.auto")?;
        if auto_layout {
            doc.excludes_others("layout.auto", "layout.")?;
        }

        let model = read_whole_model(&doc, load_file)?;
        let train = read_train(&doc)?;
        let optim = read_optim(&doc)?;
        let mut data = read_data(&doc)?;
        if !doc.written("data.vocab_size") {
            // A smaller model gets a tokenizer that fits.
            data.vocab_size = data.vocab_size.min(model.vocab).max(VOCAB_MIN);
        }
        let run = RunSpec {
            data,
            batch: read_batch(&doc, model.max_positions())?,
            schedule: read_schedule(&doc, train.steps, optim.lr)?,
            layout: read_layout(&doc)?,
            auto_layout,
            checkpoint: CheckpointSpec {
                dir: doc.text_or_none("checkpoint.dir")?.map(PathBuf::from),
                every: doc.count_or_off("checkpoint.every")?,
                keep: doc.count_or_off("checkpoint.keep")?,
                keep_every: doc.count_or_off("checkpoint.keep_every")?,
                background: doc.flag("checkpoint.background")?,
                memory_every: doc.count_or_off("checkpoint.memory_every")?,
            },
            run: read_place(&doc)?,
            trouble: TroubleSpec::read(&doc)?,
            sample: SampleSpec {
                prompt: doc.text("sample.prompt")?,
                tokens: doc.count("sample.tokens")?,
                temperature: doc.number("sample.temperature")?,
                top_k: doc.count_or_off("sample.top_k")?,
                top_p: doc.number("sample.top_p")?,
            },
            model,
            train,
            optim,
        };
        run.check_together(&doc)?;
        Ok(Resolved { run, origins: doc.into_origins() })
    }

    /// For [`RunSpec::load`] where no other file may be read.
    ///
    /// # Errors
    /// Always.
    pub fn no_files(path: &Path) -> Result<String> {
        Err(Error::user(format!("{} cannot be read here", path.display())))
    }

    /// Every key with its type, default and meaning, in the order of a run file.
    pub fn keys() -> &'static [Key] {
        KEYS
    }

    fn check_together(&self, doc: &Doc) -> Result<()> {
        let sequence = self.batch.sequence;
        let longest = self.model.max_positions();
        if sequence > longest {
            return Err(doc
                .wrong("batch.sequence", format!("at most the {longest} positions of {}", self.model.name))
                .hint(format!("set batch.sequence={longest}, or model.max_positions={sequence}")));
        }
        let trains_tokenizer = self.data.tokenizer.is_none()
            && matches!(self.data.source, DataSource::CargoSources | DataSource::Text(_));
        if trains_tokenizer && self.data.vocab_size > self.model.vocab {
            return Err(doc
                .wrong(
                    "data.vocab_size",
                    format!("at most the vocabulary of {} of {}", self.model.vocab, self.model.name),
                )
                .hint(match self.model.vocab {
                    too_small @ ..VOCAB_MIN => format!(
                        "set model.vocab={}: {too_small} entries hold no text, the bytes alone take {VOCAB_MIN}",
                        self.data.vocab_size
                    ),
                    vocab => format!("set data.vocab_size={vocab}, or model.vocab={}", self.data.vocab_size),
                }));
        }
        trouble::check(self, doc)
    }
}

impl Resolved {
    /// Who set `key`, which is written like `layout.dp`.
    pub fn set_by(&self, key: &str) -> &Origin {
        self.origins.get(key).unwrap_or(&Origin::Default)
    }

    /// Holds the layout to the model and the batch.
    ///
    /// # Errors
    /// As [`Layout::validate`](crate::Layout::validate), with the place where the key was written.
    pub fn check_layout(&self) -> Result<()> {
        let checked = self.run.validate_layout(&self.run.layout);
        checked.map_err(|e| hint_from_key(self.locate(e)))
    }

    /// Puts the place where the key was written that a message starts with in front of it.
    pub fn locate(&self, error: Error) -> Error {
        Origin::locate(error, |key| self.origins.get(key))
    }
}

/// An error without a hint gets the meaning and default of the first key that it speaks of.
fn hint_from_key(error: Error) -> Error {
    let message = error.to_string();
    let mut words = message.split([' ', ':', ',']);
    let key = words.find_map(|word| KEYS.iter().find(|k| k.path == word));
    match key {
        Some(key) if key.default.is_empty() => error.hint(format!("{}: {}", key.path, key.doc)),
        Some(key) => error.hint(format!("{}: {} (default {})", key.path, key.doc, key.default_text())),
        None => error.hint("`phalanx keys` lists every key with its range and default"),
    }
}

fn read_place(doc: &Doc) -> Result<RunDirSpec> {
    Ok(RunDirSpec {
        dir: directory(doc, "run.dir")?,
        threads: doc.count_or_off("run.threads")?,
        device: DeviceChoice::of(doc, "run.device")?,
        messages: MessageChoice::of(doc, "run.messages")?,
        timeout_s: doc.count("run.timeout_s")? as u64,
        verify_every: doc.count_or_off("run.verify_every")?,
        straggler_window: doc.count_or_off("run.straggler_window")?,
    })
}

fn read_whole_model(doc: &Doc, load_file: &dyn Fn(&Path) -> Result<String>) -> Result<ModelSpec> {
    let base = match (doc.text_or_none("model.config")?, doc.text_or_none("model.preset")?) {
        (Some(config), _) => {
            let text = load_file(Path::new(&config)).map_err(|e| e.context("read model.config"))?;
            Some(ModelSpec::from_hf_config(&text).map_err(|e| e.context(&config))?)
        }
        (None, Some(preset)) => {
            Some(ModelSpec::preset(&preset).map_err(|e| e.context(doc.at("model.preset")))?)
        }
        (None, None) => None,
    };
    let model = read_model(doc, base.as_ref())?;
    model.validate().map_err(|e| doc.locate(e))?;
    Ok(model)
}

fn path(doc: &Doc, key: &str) -> Result<PathBuf> {
    match doc.text_or_none(key)? {
        Some(text) => Ok(text.into()),
        None => Err(doc.wrong(key, "a path")),
    }
}

/// A path that is no URL: journals and locks need a file system.
fn directory(doc: &Doc, key: &str) -> Result<PathBuf> {
    let path = path(doc, key)?;
    match path.to_str().is_some_and(|text| text.contains("://")) {
        true => Err(doc.wrong(key, "a directory; checkpoint.dir may be a URL")),
        false => Ok(path),
    }
}

fn read_data(doc: &Doc) -> Result<DataSpec> {
    let text = doc.texts("data.text")?;
    let source = if let Some(prefix) = doc.text_or_none("data.prefix")? {
        DataSource::Prefix(prefix.into())
    } else if doc.has("data.blend") {
        DataSource::Blend(read_blend(doc)?)
    } else if text.is_empty() {
        DataSource::CargoSources
    } else {
        DataSource::Text(text.into_iter().map(PathBuf::from).collect())
    };
    Ok(DataSpec {
        source,
        tokenizer: doc.text_or_none("data.tokenizer")?.map(PathBuf::from),
        vocab_size: doc.count("data.vocab_size")?,
        field: doc.text_or_none("data.field")?,
        skip_bad: doc.flag("data.skip_bad")?,
        eod: doc.text_or_none("data.eod")?,
        attend: Attend::of(doc, "data.attend")?,
        split: read_split(doc)?,
        cache_dir: doc.text_or_none("data.cache_dir")?.map(PathBuf::from),
    })
}

fn read_blend(doc: &Doc) -> Result<Vec<BlendPart>> {
    const KEY: &str = "data.blend";
    let wrong = || doc.wrong(KEY, "a list of { prefix = \"path\", weight = 0.5 } with weights above 0");
    let Some(Val::List(items)) = doc.entry(KEY).map(|e| &e.value) else { return Err(wrong()) };
    let mut parts = Vec::new();
    for item in items {
        let Val::Table(fields) = item else { return Err(wrong()) };
        let (mut prefix, mut weight) = (None, None);
        for (name, value) in fields {
            match (name.as_str(), value) {
                ("prefix", Val::Text(text)) if !text.is_empty() => prefix = Some(PathBuf::from(text)),
                ("weight", value) => weight = value.number().filter(|w| *w > 0.0 && w.is_finite()),
                _ => return Err(wrong()),
            }
        }
        let (Some(prefix), Some(weight)) = (prefix, weight) else { return Err(wrong()) };
        parts.push(BlendPart { prefix, weight });
    }
    if parts.is_empty() { Err(wrong()) } else { Ok(parts) }
}

fn read_split(doc: &Doc) -> Result<[f64; 3]> {
    let wrong = || doc.wrong("data.split", "three weights like \"99,1,0\", none negative, the first above 0");
    let text = doc.text("data.split")?;
    let mut split = [0.0; 3];
    let parts: Vec<&str> = text.split(',').collect();
    if parts.len() > split.len() {
        return Err(wrong());
    }
    for (weight, part) in split.iter_mut().zip(parts) {
        *weight = part.trim().parse().map_err(|_| wrong())?;
    }
    let fine = split[0] > 0.0 && split.iter().all(|w| (0.0..=1e9).contains(w));
    if fine { Ok(split) } else { Err(wrong()) }
}

/// What a batch is; sequences are as long as a model that sees less than the default can see, unless they say.
fn read_batch(doc: &Doc, longest: usize) -> Result<BatchSpec> {
    let sequence = doc.count("batch.sequence")?;
    let sequence = if doc.written("batch.sequence") { sequence } else { sequence.min(longest) };
    let sequences = if doc.has("batch.tokens") {
        let tokens = doc.count("batch.tokens")?;
        if !tokens.is_multiple_of(sequence) {
            let below = tokens / sequence * sequence;
            let near = if below == 0 { String::new() } else { format!("{below} or ") };
            return Err(Error::user(format!(
                "{} is not a multiple of batch.sequence = {sequence}",
                doc.at("batch.tokens")
            ))
            .hint(format!("set batch.tokens={near}{}", below + sequence)));
        }
        tokens / sequence
    } else {
        doc.count("batch.sequences")?
    };
    if sequence.saturating_mul(sequences) > MAX_BATCH_TOKENS {
        return Err(Error::user(format!(
            "batch.sequence x sequences = {sequence} x {sequences} tokens, expected at most {MAX_BATCH_TOKENS}"
        )));
    }
    Ok(BatchSpec { sequence, sequences, ramp: ramp::read(doc, sequences)? })
}

fn read_optim(doc: &Doc) -> Result<OptimSpec> {
    let clip = doc.number_if_set("optim.grad_clip")?.unwrap_or(0.0);
    Ok(OptimSpec {
        kind: Optimizer::of(doc, "optim.kind")?,
        lr: doc.number("optim.lr")?,
        beta1: doc.number("optim.beta1")?,
        beta2: doc.number("optim.beta2")?,
        eps: doc.number("optim.eps")?,
        weight_decay: doc.number("optim.weight_decay")?,
        grad_clip: (clip > 0.0).then_some(clip),
        momentum: doc.number("optim.momentum")?,
        qk_clip: doc.number("optim.qk_clip")? as f32,
    })
}

fn read_schedule(doc: &Doc, steps: usize, lr: f64) -> Result<ScheduleSpec> {
    /// Longer warmups are asked for, not assumed.
    const MOST_DEFAULT_WARMUP: usize = 100;
    let kind = ScheduleKind::of(doc, "schedule.kind")?;
    let warmup_steps = match doc.has("schedule.warmup_steps") {
        true => doc.count("schedule.warmup_steps")?,
        false => (steps / 10).min(MOST_DEFAULT_WARMUP),
    };
    if warmup_steps >= steps {
        return Err(doc.wrong("schedule.warmup_steps", format!("less than train.steps = {steps}")).hint(
            format!(
                "set schedule.warmup_steps={}, or train.steps={}",
                steps / 10,
                warmup_steps.saturating_mul(10)
            ),
        ));
    }
    let set_decay = doc.has("schedule.decay_steps");
    if set_decay && kind != ScheduleKind::Wsd {
        return Err(Error::user(format!(
            "{} has no meaning with schedule.kind = \"{}\"",
            doc.at("schedule.decay_steps"),
            kind.name()
        ))
        .hint("set schedule.decay_steps=none, or schedule.kind=wsd"));
    }
    let decay_steps = match (kind, set_decay) {
        (ScheduleKind::Wsd, true) => doc.count("schedule.decay_steps")?,
        (ScheduleKind::Wsd, false) => (steps / 5).max(1).min(steps - warmup_steps),
        _ => 0,
    };
    if warmup_steps.saturating_add(decay_steps) > steps {
        let most = steps - warmup_steps;
        return Err(doc
            .wrong("schedule.decay_steps", format!("at most the {most} steps after warmup"))
            .hint(format!("set schedule.decay_steps={most}, or a larger train.steps")));
    }
    let min_lr = match doc.number_if_set("schedule.min_lr")? {
        Some(rate) => MinLr::Rate(rate),
        None => MinLr::Ratio(doc.number_if_set("schedule.min_lr_ratio")?.unwrap_or(0.0)),
    };
    if min_lr.rate(lr) > lr {
        return Err(doc
            .wrong("schedule.min_lr", format!("at most optim.lr = {lr:?}"))
            .hint("set schedule.min_lr_ratio=0.1 instead"));
    }
    Ok(ScheduleSpec { kind, warmup_steps, decay_steps, min_lr })
}

fn read_train(doc: &Doc) -> Result<TrainSpec> {
    Ok(TrainSpec {
        steps: doc.count("train.steps")?,
        precision: if doc.choice("train.precision")? == "bf16" { DType::Bf16 } else { DType::F32 },
        z_loss: doc.number("train.z_loss")? as f32,
        dropout: doc.number("train.dropout")? as f32,
        attention_dropout: doc.number("train.attention_dropout")? as f32,
        ema: doc.number("train.ema")?,
        eval_every: doc.count_or_off("train.eval_every")?,
        eval_batches: doc.count("train.eval_batches")?,
        log_every: doc.count("train.log_every")?,
        seed: doc.count("train.seed")? as u64,
        sample_tokens: doc.count("train.sample_tokens")?,
    })
}

fn read_layout(doc: &Doc) -> Result<Layout> {
    Ok(Layout {
        dp: doc.count("layout.dp")?,
        tp: doc.count("layout.tp")?,
        pp: doc.count("layout.pp")?,
        cp: doc.count("layout.cp")?,
        context: ContextMode::of(doc, "layout.context")?,
        ep: doc.count("layout.ep")?,
        sequence_parallel: doc.flag("layout.sequence_parallel")?,
        zero: Zero::try_from(doc.count("layout.zero")? as u8).map_err(Error::failure)?,
        shard: doc.count_or_off("layout.shard")?,
        schedule: PipelineSchedule::of(doc, "layout.schedule")?,
        chunks: doc.count("layout.chunks")?,
        stage_layers: doc.counts("layout.stage_layers")?,
        micro_batch: doc.count("layout.micro_batch")?,
        recompute: Recompute::of(doc, "layout.recompute")?,
        reduce: Reduce::of(doc, "layout.reduce")?,
        expert_rows: ExpertRows::of(doc, "layout.expert_rows")?,
    })
}
