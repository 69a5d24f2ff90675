use super::keys::KEYS;
use super::*;
use crate::{Error, Experts, Mtp, Position, Window};
use std::fmt;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

/// The default of `optim.momentum`.
const MOMENTUM: f64 = 0.95;

/// A key whose value differs between two runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Section and name.
    pub key: &'static str,
    /// The value in the run at hand, as written in a run file.
    pub here: String,
    /// The value in the other run.
    pub there: String,
}

impl Difference {
    /// Several in one line.
    pub fn list<'a>(of: impl IntoIterator<Item = &'a Difference>) -> String {
        of.into_iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}, was {}", self.key, self.here, self.there)
    }
}

impl RunSpec {
    /// The whole run as a run file: every choice spelled out, nothing left to a default. Loading it gives this value.
    ///
    /// ```
    /// use spec::RunSpec;
    /// let run = RunSpec::load(None, &["model.preset=gpt2".into()], &RunSpec::no_files)?;
    /// let text = run.to_toml();
    /// assert!(text.contains("[batch]\nsequence = 256\nsequences = 8\n"));
    /// assert_eq!(RunSpec::load(Some(("run.toml", &text)), &[], &RunSpec::no_files)?, run);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for (key, value) in self.values() {
            let (of, name) = key.split_once('.').unwrap_or((key, ""));
            if of != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                text += &format!("{gap}[{of}]\n");
                section = of;
            }
            text += &format!("{name} = {value}\n");
        }
        text
    }

    /// A hash of all keys that decide the trained weights: model, split, batch, optimiser, schedule, steps, seed and
    /// precision. The layout is not part of it, because it does not change them; nor are paths of data, which has a
    /// fingerprint of its own.
    ///
    /// ```
    /// use spec::RunSpec;
    /// let load = |set: &str| RunSpec::load(None, &[set.to_owned()], &RunSpec::no_files);
    /// assert_eq!(load("layout.micro_batch=2")?.fingerprint(), load("run.dir=elsewhere")?.fingerprint());
    /// assert_ne!(load("optim.lr=2e-3")?.fingerprint(), load("train.seed=1")?.fingerprint());
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn fingerprint(&self) -> String {
        let text: String = self.numerics().iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        format!("{:016x}", xxh3_64(text.as_bytes()))
    }

    /// The keys that decide the trained weights and differ between two runs; empty when the fingerprints are equal. Where
    /// data lies is not compared: it is known by its content.
    pub fn differences(&self, other: &RunSpec) -> Vec<Difference> {
        let (here, there) = (self.numerics(), other.numerics());
        // What is not spelled out is at its default.
        let value = |of: &[(&'static str, String)], key: &Key| {
            let absent = || if key.default.is_empty() { "none" } else { key.default }.to_owned();
            of.iter().find(|(k, _)| *k == key.path).map_or_else(absent, |(_, v)| v.clone())
        };
        KEYS.iter()
            .map(|k| Difference { key: k.path, here: value(&here, k), there: value(&there, k) })
            .filter(|d| d.here != d.there)
            .collect()
    }

    /// The refusal to continue a run from which this one differs.
    pub fn not_the_run(&self, differences: &[Difference]) -> Error {
        Error::user(format!(
            "this is not the run that was started in {}: {}",
            self.run.dir.display(),
            Difference::list(differences)
        ))
        .hint("set these keys back, or start another run with run.dir=PATH")
    }

    fn numerics(&self) -> Vec<(&'static str, String)> {
        let decides = |key: &str| match key.split_once('.') {
            Some(("model", name)) => name != "name",
            Some(("data", name)) => ["vocab_size", "split", "attend"].contains(&name),
            Some(("train", name)) => {
                ["steps", "precision", "z_loss", "dropout", "attention_dropout", "ema", "seed"]
                    .contains(&name)
            }
            Some((section, _)) => ["batch", "optim", "schedule"].contains(&section),
            None => false,
        };
        self.values().into_iter().filter(|(key, _)| decides(key)).collect()
    }

    /// Keys and values as written in a run file, in its order.
    fn values(&self) -> Vec<(&'static str, String)> {
        let mut values = model_values(&self.model);
        self.data_values(&mut values);
        let (schedule, train) = (&self.schedule, &self.train);
        values.extend([
            ("batch.sequence", self.batch.sequence.to_string()),
            ("batch.sequences", self.batch.sequences.to_string()),
        ]);
        values.extend(self.batch.ramp.map(|_| ("batch.ramp", format!("{:?}", self.batch.ramp_list()))));
        self.optim_values(&mut values);
        values.extend([
            ("schedule.kind", quoted(schedule.kind.name())),
            ("schedule.warmup_steps", schedule.warmup_steps.to_string()),
        ]);
        if schedule.kind == ScheduleKind::Wsd {
            values.push(("schedule.decay_steps", schedule.decay_steps.to_string()));
        }
        values.extend([
            match schedule.min_lr {
                MinLr::Rate(rate) => ("schedule.min_lr", float(rate)),
                MinLr::Ratio(ratio) => ("schedule.min_lr_ratio", float(ratio)),
            },
            ("train.steps", train.steps.to_string()),
            ("train.precision", quoted(&train.precision.to_string())),
        ]);
        values.extend((train.z_loss != 0.0).then(|| ("train.z_loss", single(train.z_loss))));
        values.extend((train.dropout != 0.0).then(|| ("train.dropout", single(train.dropout))));
        let attention = train.attention_dropout;
        values.extend((attention != 0.0).then(|| ("train.attention_dropout", single(attention))));
        values.extend((train.ema != 0.0).then(|| ("train.ema", float(train.ema))));
        values.extend([
            ("train.seed", train.seed.to_string()),
            ("train.eval_every", off(train.eval_every)),
            ("train.eval_batches", train.eval_batches.to_string()),
            ("train.log_every", train.log_every.to_string()),
            ("train.sample_tokens", train.sample_tokens.to_string()),
        ]);
        if self.auto_layout {
            values.push(("layout.auto", "true".to_owned()));
        } else {
            layout_values(&self.layout, &mut values);
        }
        let sample = &self.sample;
        values.extend(self.checkpoint.dir.as_deref().map(|p| ("checkpoint.dir", path(p))));
        values.extend([
            ("checkpoint.every", off(self.checkpoint.every)),
            ("checkpoint.keep", off(self.checkpoint.keep)),
            ("checkpoint.keep_every", off(self.checkpoint.keep_every)),
            ("checkpoint.background", self.checkpoint.background.to_string()),
            ("checkpoint.memory_every", off(self.checkpoint.memory_every)),
            ("run.dir", path(&self.run.dir)),
            ("run.threads", off(self.run.threads)),
            ("run.device", quoted(self.run.device.name())),
            ("run.messages", quoted(self.run.messages.name())),
            ("run.timeout_s", self.run.timeout_s.to_string()),
            ("run.verify_every", off(self.run.verify_every)),
            ("run.straggler_window", off(self.run.straggler_window)),
        ]);
        self.trouble_values(&mut values);
        values.extend([
            ("sample.prompt", quoted(&sample.prompt)),
            ("sample.tokens", sample.tokens.to_string()),
            ("sample.temperature", float(sample.temperature)),
            ("sample.top_k", off(sample.top_k)),
            ("sample.top_p", float(sample.top_p)),
        ]);
        values
    }

    fn optim_values(&self, values: &mut Vec<(&'static str, String)>) {
        let optim = &self.optim;
        // Named where it is not AdamW, so that fingerprints of older runs stay as they are.
        let muon = optim.kind == Optimizer::Muon;
        values.extend(muon.then(|| ("optim.kind", quoted(optim.kind.name()))));
        values.extend([
            ("optim.lr", float(optim.lr)),
            ("optim.beta1", float(optim.beta1)),
            ("optim.beta2", float(optim.beta2)),
            ("optim.eps", float(optim.eps)),
            ("optim.weight_decay", float(optim.weight_decay)),
            ("optim.grad_clip", float(optim.grad_clip.unwrap_or(0.0))),
        ]);
        let momentum = muon || optim.momentum != MOMENTUM;
        values.extend(momentum.then(|| ("optim.momentum", float(optim.momentum))));
        values.extend((optim.qk_clip != 0.0).then(|| ("optim.qk_clip", single(optim.qk_clip))));
    }

    fn trouble_values(&self, values: &mut Vec<(&'static str, String)>) {
        let t = &self.trouble;
        values.extend([
            ("trouble.on_nan", quoted(t.on_nan.name())),
            ("trouble.on_spike", quoted(t.on_spike.name())),
            ("trouble.spike_factor", float(t.spike_factor)),
            ("trouble.window", t.window.to_string()),
            ("trouble.back_steps", t.back_steps.to_string()),
            ("trouble.skip_steps", t.skip_steps.to_string()),
            ("trouble.most", t.most.to_string()),
            ("trouble.on_corruption", quoted(t.on_corruption.name())),
        ]);
    }

    fn data_values(&self, values: &mut Vec<(&'static str, String)>) {
        let data = &self.data;
        let list = |items: Vec<String>| format!("[{}]", items.join(", "));
        match &data.source {
            DataSource::CargoSources => {}
            DataSource::Text(paths) => {
                values.push(("data.text", list(paths.iter().map(|p| path(p)).collect())))
            }
            DataSource::Prefix(prefix) => values.push(("data.prefix", path(prefix))),
            DataSource::Blend(parts) => {
                let item = |p: &BlendPart| {
                    format!("{{ prefix = {}, weight = {} }}", path(&p.prefix), float(p.weight))
                };
                values.push(("data.blend", list(parts.iter().map(item).collect())));
            }
        }
        values.extend(data.tokenizer.as_deref().map(|p| ("data.tokenizer", path(p))));
        let [train, valid, test] = data.split;
        values.push(("data.vocab_size", data.vocab_size.to_string()));
        values.extend(data.field.as_deref().map(|field| ("data.field", quoted(field))));
        values.extend(data.skip_bad.then(|| ("data.skip_bad", "true".to_owned())));
        values.extend(data.eod.as_deref().map(|eod| ("data.eod", quoted(eod))));
        // Runs from before there was a choice have no such key in their fingerprints.
        let attend = data.attend.name();
        values.extend((data.attend != Attend::All).then(|| ("data.attend", quoted(attend))));
        values.push(("data.split", quoted(&format!("{train},{valid},{test}"))));
        values.extend(data.cache_dir.as_deref().map(|p| ("data.cache_dir", path(p))));
    }
}

impl ModelSpec {
    /// The model as a model file; [`ModelSpec::from_toml`] reads it back.
    pub fn to_toml(&self) -> String {
        model_values(self)
            .into_iter()
            .map(|(key, value)| format!("{} = {value}\n", &key["model.".len()..]))
            .collect()
    }
}

fn model_values(model: &ModelSpec) -> Vec<(&'static str, String)> {
    let mut values = vec![
        ("model.name", quoted(&model.name)),
        ("model.vocab", model.vocab.to_string()),
        ("model.layers", model.layers.to_string()),
        ("model.hidden", model.hidden.to_string()),
        ("model.ffn", model.ffn.to_string()),
        ("model.heads", model.heads.to_string()),
        ("model.kv_heads", model.kv_heads.to_string()),
        ("model.head_dim", model.head_dim.to_string()),
        ("model.norm", quoted(model.norm.name())),
        ("model.norm_eps", single(model.norm_eps)),
    ];
    match &model.position {
        Position::Learned { max_positions } => values.extend([
            ("model.position", quoted("learned")),
            ("model.max_positions", max_positions.to_string()),
        ]),
        Position::Rope(rope) => {
            values.extend([
                ("model.position", quoted("rope")),
                ("model.max_positions", rope.max_positions.to_string()),
                ("model.rope_theta", float(rope.theta)),
                ("model.rope_scaling.type", quoted(rope.scaling.name())),
            ]);
            for (name, x) in rope.scaling.fields() {
                let full = format!("model.rope_scaling.{name}");
                let key = KEYS.iter().find(|k| k.path == full).map_or("", |k| k.path);
                values.push((key, if name == "original_max_positions" { format!("{x}") } else { float(x) }));
            }
        }
    }
    values.extend([
        ("model.activation", quoted(model.activation.name())),
        ("model.qkv_bias", model.qkv_bias.to_string()),
        ("model.attn_out_bias", model.attn_out_bias.to_string()),
        ("model.mlp_bias", model.mlp_bias.to_string()),
        ("model.qk_norm", model.qk_norm.to_string()),
        ("model.tied_embeddings", model.tied_embeddings.to_string()),
        ("model.init_std", single(model.init_std)),
    ]);
    let cap = model.logit_softcap;
    values.extend((cap != 0.0).then(|| ("model.logit_softcap", single(cap))));
    values.extend(model.experts.as_ref().into_iter().flat_map(experts_values));
    if let Some(l) = &model.latent {
        values.extend([
            ("model.latent.kv_rank", l.kv_rank.to_string()),
            ("model.latent.query_rank", off(l.query_rank)),
            ("model.latent.nope_dim", l.nope_dim.to_string()),
            ("model.latent.rope_dim", l.rope_dim.to_string()),
            ("model.latent.value_dim", l.value_dim.to_string()),
        ]);
    }
    values.extend(sees_values(model));
    values
}

/// What attention sees beside all before a token, and what is learnt beside the next one.
fn sees_values(model: &ModelSpec) -> Vec<(&'static str, String)> {
    let window = |w: &Window| {
        [
            ("model.window.tokens", w.tokens.to_string()),
            ("model.window.full_layers", w.full_layers.to_string()),
            ("model.window.full_every", w.full_every.to_string()),
        ]
    };
    let sinks = model.sinks.then(|| ("model.sinks", "true".to_owned()));
    let mtp = |m: &Mtp| [("model.mtp.depth", "1".to_owned()), ("model.mtp.weight", single(m.weight))];
    model.window.iter().flat_map(window).chain(sinks).chain(model.mtp.iter().flat_map(mtp)).collect()
}

fn experts_values(e: &Experts) -> Vec<(&'static str, String)> {
    let mut values = vec![
        ("model.experts.count", e.count.to_string()),
        ("model.experts.top_k", e.top_k.to_string()),
        ("model.experts.ffn", e.ffn.to_string()),
        ("model.experts.shared_ffn", e.shared_ffn.to_string()),
        ("model.experts.dense_layers", e.dense_layers.to_string()),
        ("model.experts.every", e.every.to_string()),
        ("model.experts.score", quoted(e.router.score.name())),
        ("model.experts.renormalise", e.router.renormalise.to_string()),
        ("model.experts.scale", single(e.router.scale)),
        ("model.experts.groups", e.router.groups.to_string()),
        ("model.experts.top_groups", e.router.top_groups.to_string()),
        ("model.experts.balance_loss", single(e.router.balance_loss)),
        ("model.experts.z_loss", single(e.router.z_loss)),
    ];
    values.extend(e.router.bias.then(|| ("model.experts.router_bias", "true".to_owned())));
    if e.router.expert_bias {
        values.push(("model.experts.expert_bias", "true".to_owned()));
        values.push(("model.experts.bias_rate", single(e.router.bias_rate)));
    }
    values
}

fn layout_values(layout: &Layout, values: &mut Vec<(&'static str, String)>) {
    values.extend([
        ("layout.dp", layout.dp.to_string()),
        ("layout.tp", layout.tp.to_string()),
        ("layout.pp", layout.pp.to_string()),
        ("layout.cp", layout.cp.to_string()),
        ("layout.context", quoted(layout.context.name())),
        ("layout.ep", layout.ep.to_string()),
        ("layout.sequence_parallel", layout.sequence_parallel.to_string()),
        ("layout.zero", u8::from(layout.zero).to_string()),
        ("layout.shard", off(layout.shard)),
        ("layout.schedule", quoted(layout.schedule.name())),
        ("layout.chunks", layout.chunks.to_string()),
        ("layout.stage_layers", format!("{:?}", layout.stage_layers)),
        ("layout.micro_batch", layout.micro_batch.to_string()),
        ("layout.recompute", quoted(layout.recompute.name())),
        ("layout.reduce", quoted(layout.reduce.name())),
        ("layout.expert_rows", quoted(layout.expert_rows.name())),
    ]);
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

fn path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

/// The shortest decimal that reads back as the same number.
fn float(x: f64) -> String {
    format!("{x:?}")
}

fn single(x: f32) -> String {
    let short = format!("{x:?}");
    let same = short.parse::<f64>().is_ok_and(|wide| wide as f32 == x);
    if same { short } else { float(f64::from(x)) }
}

fn off(count: Option<usize>) -> String {
    count.unwrap_or(0).to_string()
}
