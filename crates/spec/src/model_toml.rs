use crate::doc::Doc;
use crate::run::keys::{KEYS, ORIGIN_KEYS};
use crate::{
    Activation, Error, Experts, Latent, ModelSpec, Mtp, NormKind, Position, Result, Rope, RopeScaling,
    Router, Score, Window, Yarn, suggest,
};

macro_rules! catalogue {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../catalog/models/", $name, ".toml")))),*]
    };
}

/// The models that ship with the program: `catalog/models/NAME.toml`.
const PRESETS: &[(&str, &str)] = catalogue![
    "tiny",
    "tiny-gpt2",
    "llama-tiny-ref",
    "moe-tiny",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "tinyllama-1.1b",
    "llama2-7b",
    "llama2-13b",
    "llama2-70b",
    "llama3-8b",
    "llama3-70b",
    "llama3-405b",
    "llama3.2-1b",
    "mistral-7b-v0.3",
    "qwen2-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
];

impl ModelSpec {
    /// The model of that name in the catalogue; an unknown name is refused with the nearest known one.
    ///
    /// # Errors
    /// An unknown name.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// assert_eq!(ModelSpec::preset("llama3-8b")?.kv_heads, 8);
    /// let refused = ModelSpec::preset("lama3-8b").unwrap_err();
    /// assert_eq!(refused.to_string(), "no model is called `lama3-8b`");
    /// assert_eq!(refused.hint_text(), Some("did you mean `llama3-8b`?"));
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn preset(name: &str) -> Result<ModelSpec> {
        let Some((name, text)) = PRESETS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) else {
            return Err(Error::user(format!("no model is called `{name}`"))
                .hint(suggest::hint(name, Self::preset_names())));
        };
        let path = format!("catalog/models/{name}.toml");
        let doc = model_doc(&path, text)?;
        for key in ["model.source", "model.date"] {
            // A catalogue number without a source is hearsay.
            if doc.text(key)?.is_empty() {
                return Err(doc.wrong(key, "text that is not empty"));
            }
        }
        from_doc(&doc)
    }

    /// Names that [`ModelSpec::preset`] knows, small models first.
    pub fn preset_names() -> impl Iterator<Item = &'static str> + Clone {
        Self::preset_files().map(|(name, _)| name)
    }

    /// Names and files behind them: title, source and date stand there beside the model.
    pub fn preset_files() -> impl Iterator<Item = (&'static str, &'static str)> + Clone {
        PRESETS.iter().copied()
    }

    /// Reads a model file: the keys of a run file's `[model]` section. `path` is for messages only.
    ///
    /// `name`, `vocab`, `layers`, `hidden`, `ffn`, `heads` and `max_positions` are required, the rest defaults to the
    /// first Llama: as many `kv_heads` as heads, RMSNorm, RoPE, SwiGLU, no biases, untied.
    ///
    /// # Errors
    /// Names the key that is missing, unknown or wrong, with its line.
    pub fn from_toml(path: &str, text: &str) -> Result<ModelSpec> {
        from_doc(&model_doc(path, text)?)
    }
}

fn model_doc(path: &str, text: &str) -> Result<Doc> {
    let starts = ["model.preset", "model.config"];
    let keys = KEYS.iter().filter(|k| k.section() == "model" && !starts.contains(&k.path)).chain(ORIGIN_KEYS);
    let mut doc = Doc::new(keys.collect(), "model.");
    doc.add_file(path, text)?;
    Ok(doc)
}

fn from_doc(doc: &Doc) -> Result<ModelSpec> {
    let model = read_model(doc, None)?;
    model.validate()?;
    Ok(model)
}

/// The model that `doc` describes on top of `base`, not yet validated.
pub(crate) fn read_model(doc: &Doc, base: Option<&ModelSpec>) -> Result<ModelSpec> {
    let count = |key: &str, base: Option<usize>| match base {
        Some(base) if !doc.written(key) => Ok(base),
        _ => doc.count(key),
    };
    let flag = |key: &str, base: Option<bool>| {
        if doc.written(key) { doc.flag(key) } else { Ok(base.unwrap_or(false)) }
    };
    let single = |key: &str, base: Option<f32>, default: f32| {
        Ok::<f32, Error>(doc.number_if_set(key)?.map_or(base.unwrap_or(default), |x| x as f32))
    };
    let hidden = count("model.hidden", base.map(|b| b.hidden))?;
    let heads = count("model.heads", base.map(|b| b.heads))?;
    // What followed from the heads in the base model follows from the new heads too.
    let grouped = base.filter(|b| b.kv_heads != b.heads);
    let kv_heads = count("model.kv_heads", Some(grouped.map_or(heads, |b| b.kv_heads)))?;
    let own_dim = base.filter(|b| b.q_width() != b.hidden).map(|b| b.head_dim);
    let head_dim = match own_dim {
        _ if doc.written("model.head_dim") => doc.count("model.head_dim")?,
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(Error::user(format!(
                "model.heads = {heads} does not divide model.hidden = {hidden}"
            ))
            .hint("change one of them, or set model.head_dim"));
        }
    };
    let name = match (doc.text_or_none("model.name")?, base) {
        (Some(name), _) => name,
        (None, Some(base)) => base.name.clone(),
        (None, None) => return Err(doc.wrong("model.name", "a name in quotes")),
    };
    Ok(ModelSpec {
        name,
        vocab: count("model.vocab", base.map(|b| b.vocab))?,
        layers: count("model.layers", base.map(|b| b.layers))?,
        hidden,
        ffn: count("model.ffn", base.map(|b| b.ffn))?,
        heads,
        kv_heads,
        head_dim,
        norm: or_base(doc, "model.norm", NormKind::of, base.map_or(NormKind::Rms, |b| b.norm))?,
        norm_eps: single("model.norm_eps", base.map(|b| b.norm_eps), 1e-5)?,
        position: read_position(doc, base)?,
        activation: or_base(
            doc,
            "model.activation",
            Activation::of,
            base.map_or(Activation::SwiGlu, |b| b.activation),
        )?,
        qkv_bias: flag("model.qkv_bias", base.map(|b| b.qkv_bias))?,
        attn_out_bias: flag("model.attn_out_bias", base.map(|b| b.attn_out_bias))?,
        mlp_bias: flag("model.mlp_bias", base.map(|b| b.mlp_bias))?,
        qk_norm: flag("model.qk_norm", base.map(|b| b.qk_norm))?,
        tied_embeddings: flag("model.tied_embeddings", base.map(|b| b.tied_embeddings))?,
        init_std: single("model.init_std", base.map(|b| b.init_std), 0.02)?,
        logit_softcap: single("model.logit_softcap", base.map(|b| b.logit_softcap), 0.0)?,
        experts: read_experts(doc, base.and_then(|b| b.experts))?,
        latent: read_latent(doc, base.and_then(|b| b.latent))?,
        window: read_window(doc, base.and_then(|b| b.window))?,
        sinks: flag("model.sinks", base.map(|b| b.sinks))?,
        mtp: read_mtp(doc, base.and_then(|b| b.mtp))?,
    })
}

fn read_experts(doc: &Doc, base: Option<Experts>) -> Result<Option<Experts>> {
    const COUNT: &str = "model.experts.count";
    let count = match base {
        _ if doc.written(COUNT) => doc.count_or_off(COUNT)?,
        Some(base) => Some(base.count),
        None => None,
    };
    let Some(count) = count else { return alone(doc, "model.experts.", COUNT).map(|()| None) };
    let field = |key: &str, base: Option<usize>, default: Option<usize>| match base.or(default) {
        Some(known) if !doc.written(key) => Ok(known),
        _ => Ok::<usize, Error>(doc.count_or_off(key)?.unwrap_or(0)),
    };
    // A width has no default: a mixture without it is no shape.
    let width = |key: &str, base: Option<usize>| match base {
        Some(known) if !doc.written(key) => Ok(known),
        _ => doc.count(key),
    };
    Ok(Some(Experts {
        count,
        top_k: width("model.experts.top_k", base.map(|b| b.top_k))?,
        ffn: width("model.experts.ffn", base.map(|b| b.ffn))?,
        shared_ffn: field("model.experts.shared_ffn", base.map(|b| b.shared_ffn), Some(0))?,
        dense_layers: field("model.experts.dense_layers", base.map(|b| b.dense_layers), Some(0))?,
        every: field("model.experts.every", base.map(|b| b.every), Some(1))?,
        router: read_router(doc, base.map(|b| b.router).unwrap_or_default())?,
    }))
}

fn read_mtp(doc: &Doc, base: Option<Mtp>) -> Result<Option<Mtp>> {
    const DEPTH: &str = "model.mtp.depth";
    let there = if doc.written(DEPTH) { doc.count_or_off(DEPTH)?.is_some() } else { base.is_some() };
    if !there {
        return alone(doc, "model.mtp.", DEPTH).map(|()| None);
    }
    let weight = doc.number_if_set("model.mtp.weight")?;
    Ok(Some(Mtp { weight: weight.map_or(base.map_or(Mtp::WEIGHT, |b| b.weight), |x| x as f32) }))
}

fn read_router(doc: &Doc, base: Router) -> Result<Router> {
    let number = |key: &str, base: f32| Ok::<f32, Error>(doc.number_if_set(key)?.map_or(base, |x| x as f32));
    let count = |key: &str, base: usize| if doc.written(key) { doc.count(key) } else { Ok(base) };
    let flag = |key: &str, base: bool| if doc.written(key) { doc.flag(key) } else { Ok(base) };
    Ok(Router {
        score: or_base(doc, "model.experts.score", Score::of, base.score)?,
        renormalise: flag("model.experts.renormalise", base.renormalise)?,
        scale: number("model.experts.scale", base.scale)?,
        groups: count("model.experts.groups", base.groups)?,
        top_groups: count("model.experts.top_groups", base.top_groups)?,
        balance_loss: number("model.experts.balance_loss", base.balance_loss)?,
        z_loss: number("model.experts.z_loss", base.z_loss)?,
        bias: flag("model.experts.router_bias", base.bias)?,
        expert_bias: flag("model.experts.expert_bias", base.expert_bias)?,
        bias_rate: number("model.experts.bias_rate", base.bias_rate)?,
    })
}

fn read_latent(doc: &Doc, base: Option<Latent>) -> Result<Option<Latent>> {
    const RANK: &str = "model.latent.kv_rank";
    let kv_rank = match base {
        _ if doc.written(RANK) => doc.count_or_off(RANK)?,
        Some(base) => Some(base.kv_rank),
        None => None,
    };
    let Some(kv_rank) = kv_rank else { return alone(doc, "model.latent.", RANK).map(|()| None) };
    let width = |key: &str, base: Option<usize>| match base {
        Some(known) if !doc.written(key) => Ok(known),
        _ => doc.count(key),
    };
    const QUERY: &str = "model.latent.query_rank";
    let query_rank =
        if doc.written(QUERY) { doc.count_or_off(QUERY)? } else { base.and_then(|b| b.query_rank) };
    Ok(Some(Latent {
        query_rank,
        kv_rank,
        nope_dim: width("model.latent.nope_dim", base.map(|b| b.nope_dim))?,
        rope_dim: width("model.latent.rope_dim", base.map(|b| b.rope_dim))?,
        value_dim: width("model.latent.value_dim", base.map(|b| b.value_dim))?,
    }))
}

fn read_window(doc: &Doc, base: Option<Window>) -> Result<Option<Window>> {
    const TOKENS: &str = "model.window.tokens";
    let tokens = match base {
        _ if doc.written(TOKENS) => doc.count_or_off(TOKENS)?,
        Some(base) => Some(base.tokens),
        None => None,
    };
    let Some(tokens) = tokens else { return alone(doc, "model.window.", TOKENS).map(|()| None) };
    let layers = |key: &str, base: Option<usize>| match base {
        _ if doc.written(key) => Ok::<usize, Error>(doc.count_or_off(key)?.unwrap_or(0)),
        base => Ok(base.unwrap_or(0)),
    };
    Ok(Some(Window {
        tokens,
        full_layers: layers("model.window.full_layers", base.map(|b| b.full_layers))?,
        full_every: layers("model.window.full_every", base.map(|b| b.full_every))?,
    }))
}

/// Refuses keys under `prefix` that mean nothing without `key`.
fn alone(doc: &Doc, prefix: &str, key: &str) -> Result<()> {
    let unset = |k: &&str| *k != key && doc.has(k);
    match doc.written_under(prefix).find(unset) {
        Some(found) => Err(Error::user(format!("{} has no meaning without {key}", doc.at(found)))
            .hint(format!("set {key} too"))),
        None => Ok(()),
    }
}

fn or_base<T>(doc: &Doc, key: &str, read: fn(&Doc, &str) -> Result<T>, base: T) -> Result<T> {
    if doc.written(key) { read(doc, key) } else { Ok(base) }
}

fn word(doc: &Doc, key: &str) -> Result<Option<&'static str>> {
    if doc.written(key) { doc.choice(key).map(Some) } else { Ok(None) }
}

fn read_position(doc: &Doc, base: Option<&ModelSpec>) -> Result<Position> {
    let base_rope = base.and_then(|b| if let Position::Rope(rope) = &b.position { Some(rope) } else { None });
    let learned = match word(doc, "model.position")? {
        Some(word) => word == "learned",
        None => base.is_some() && base_rope.is_none(),
    };
    let max_positions = match base {
        Some(base) if !doc.written("model.max_positions") => base.max_positions(),
        _ => doc.count("model.max_positions")?,
    };
    if learned {
        return match doc.written_under("model.rope_").next() {
            Some(key) => Err(Error::user(format!("{} has no meaning with learned positions", doc.at(key)))
                .hint("remove it, or set model.position=rope")),
            None => Ok(Position::Learned { max_positions }),
        };
    }
    let theta = doc.number_if_set("model.rope_theta")?.unwrap_or(base_rope.map_or(10_000.0, |r| r.theta));
    let scaling = read_scaling(doc, base_rope.map_or(&RopeScaling::Default, |r| &r.scaling), max_positions)?;
    Ok(Position::Rope(Rope { theta, scaling, max_positions }))
}

/// The fields of YaRN.
const YARN: [&str; 7] = [
    "factor",
    "beta_fast",
    "beta_slow",
    "original_max_positions",
    "attention_factor",
    "truncate",
    "mscale_all_dim",
];

fn read_scaling(doc: &Doc, base: &RopeScaling, max_positions: usize) -> Result<RopeScaling> {
    let kind = word(doc, "model.rope_scaling.type")?;
    // Another type starts from nothing.
    let kept: Vec<(&str, f64)> =
        if kind.is_none_or(|k| k == base.name()) { base.fields() } else { Vec::new() };
    let kind = kind.unwrap_or(base.name());
    let wanted: &[&str] = match kind {
        "linear" | "dynamic" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_positions"],
        "yarn" => &YARN,
        _ => &[],
    };
    let prefix = "model.rope_scaling.";
    for key in doc.written_under(prefix) {
        let field = &key[prefix.len()..];
        if field != "type" && !wanted.contains(&field) {
            return Err(Error::user(format!(
                "{} has no meaning with rope_scaling.type = \"{kind}\"",
                doc.at(key)
            ))
            .hint(if wanted.is_empty() {
                "set model.rope_scaling.type too".to_owned()
            } else {
                format!("fields of {kind}: {}", wanted.join(", "))
            }));
        }
    }
    let optional = |field: &str| -> Result<Option<f64>> {
        let key = format!("{prefix}{field}");
        let written = doc.written(&key);
        let base = kept.iter().find(|(name, _)| *name == field).map(|(_, x)| *x);
        if written { doc.number_if_set(&key) } else { Ok(base) }
    };
    let number = |field: &str| {
        optional(field)?.ok_or_else(|| {
            Error::user(format!(
                "model.rope_scaling.{field} is missing, rope_scaling.type = \"{kind}\" needs it"
            ))
        })
    };
    let original = || -> Result<usize> {
        let key = "model.rope_scaling.original_max_positions";
        if doc.written(key) {
            return doc.count(key);
        }
        Ok(optional("original_max_positions")?.map_or(max_positions, |x| x as usize))
    };
    Ok(match kind {
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "dynamic" => RopeScaling::Dynamic { factor: number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_positions: original()?,
        },
        "yarn" => RopeScaling::Yarn(Yarn {
            factor: number("factor")?,
            beta_fast: optional("beta_fast")?.unwrap_or(32.0),
            beta_slow: optional("beta_slow")?.unwrap_or(1.0),
            original_max_positions: original()?,
            attention_factor: optional("attention_factor")?,
            truncate: optional("truncate")?.is_none_or(|x| x != 0.0),
            mscale_all_dim: optional("mscale_all_dim")?.unwrap_or(0.0),
        }),
        _ => RopeScaling::Default,
    })
}

impl RopeScaling {
    /// As written in a model file, and as `rope_type` in a `config.json`.
    pub const fn name(&self) -> &'static str {
        match self {
            RopeScaling::Default => "default",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Dynamic { .. } => "dynamic",
            RopeScaling::Llama3 { .. } => "llama3",
            RopeScaling::Yarn(_) => "yarn",
        }
    }

    /// The numbers by name, as in a model file.
    pub(crate) fn fields(&self) -> Vec<(&'static str, f64)> {
        match *self {
            RopeScaling::Default => Vec::new(),
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => vec![("factor", factor)],
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                vec![
                    ("factor", factor),
                    ("low_freq_factor", low_freq_factor),
                    ("high_freq_factor", high_freq_factor),
                    ("original_max_positions", original_max_positions as f64),
                ]
            }
            RopeScaling::Yarn(y) => {
                let mut fields = vec![
                    ("factor", y.factor),
                    ("beta_fast", y.beta_fast),
                    ("beta_slow", y.beta_slow),
                    ("original_max_positions", y.original_max_positions as f64),
                ];
                fields.extend(y.attention_factor.map(|x| ("attention_factor", x)));
                fields.extend((!y.truncate).then_some(("truncate", 0.0)));
                fields.extend((y.mscale_all_dim != 0.0).then_some(("mscale_all_dim", y.mscale_all_dim)));
                fields
            }
        }
    }
}
