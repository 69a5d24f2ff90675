//! What a run was started on, by content: a run owns its tokenizer and its data, wherever they lie.

use std::path::{Path, PathBuf};

use data::{Fingerprint, Manifest, Streams, Tokenizer};
use serde_json::{Value, json};
use spec::run::DataSource;
use spec::{Error, Result, RunSpec};

/// A tokenizer and its name by content.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) path: PathBuf,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) entries: usize,
    /// Whether `path` is the tokenizer itself, not only a manifest that names it.
    pub(crate) is_file: bool,
}

impl Named {
    pub(crate) fn load(path: &Path) -> Result<Named> {
        let tokenizer = Tokenizer::load(path)?;
        Ok(Named {
            path: path.to_owned(),
            fingerprint: tokenizer.fingerprint()?,
            entries: tokenizer.vocab_size(),
            is_file: true,
        })
    }

    /// Path, entries and the beginning of its name, for a refusal that tells two tokenizers apart.
    fn shown(&self) -> String {
        format!(
            "{} ({} entries, {})",
            self.path.display(),
            self.entries,
            short(&self.fingerprint.to_string())
        )
    }
}

/// The tokenizers that a run file names or brings with its datasets.
///
/// # Errors
/// If one cannot be read, or is not the one that made the dataset beside it.
pub(crate) fn brought(run: &RunSpec) -> Result<Vec<Named>> {
    let prefixes: Vec<&Path> = match &run.data.source {
        DataSource::Prefix(prefix) => vec![prefix],
        DataSource::Blend(parts) => parts.iter().map(|p| p.prefix.as_path()).collect(),
        DataSource::CargoSources | DataSource::Text(_) => Vec::new(),
    };
    let mut found: Vec<Named> = run.data.tokenizer.iter().map(|p| Named::load(p)).collect::<Result<_>>()?;
    for prefix in prefixes {
        found.extend(of_dataset(prefix)?);
    }
    Ok(found)
}

/// The tokenizer of a dataset, as far as it says.
fn of_dataset(prefix: &Path) -> Result<Option<Named>> {
    let Some(fingerprint) = data::dataset_tokenizer(prefix)? else { return Ok(None) };
    let beside = data::tokenizer_path(prefix);
    if beside.exists() {
        return Named::load(&beside).map(Some);
    }
    let entries = Manifest::load(prefix)?.vocab;
    Ok(Some(Named { path: Manifest::path(prefix), fingerprint, entries, is_file: false }))
}

/// Refuses tokenizers other than `own`, which the weights of `whose` were learnt with.
pub(crate) fn check_own(own: &Named, brought: &[Named], whose: &Path) -> Result<()> {
    match brought.iter().find(|t| t.fingerprint != own.fingerprint) {
        None => Ok(()),
        Some(other) => Err(Error::user(format!(
            "{} is not the tokenizer of {}, which is {}",
            other.shown(),
            whose.display(),
            own.shown()
        ))
        .hint(format!(
            "the weights know only their own tokenizer: give text, or tokenise it with phalanx data build TEXT --tokenizer {}",
            own.path.display()
        ))),
    }
}

/// The one tokenizer of a run that begins from nothing, if any is brought.
///
/// # Errors
/// If datasets and run file bring different ones.
pub(crate) fn only(brought: Vec<Named>) -> Result<Option<Named>> {
    let Some(first) = brought.iter().find(|t| t.is_file).or(brought.first()) else { return Ok(None) };
    match brought.iter().find(|t| t.fingerprint != first.fingerprint) {
        None => Ok(Some(first.clone())),
        Some(other) => {
            Err(Error::user(format!("two tokenizers in one run: {} and {}", first.shown(), other.shown()))
                .hint("build all parts of the data with one tokenizer"))
        }
    }
}

/// What a checkpoint says of the data and the tokenizer that it was trained with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trained {
    pub(crate) step: u64,
    data: Option<String>,
    tokens: Option<u64>,
    pub(crate) tokenizer: Option<Fingerprint>,
}

impl Trained {
    pub(crate) fn of(checkpoint: &ckpt::Checkpoint) -> Trained {
        let state = &checkpoint.manifest().meta.state;
        let text = |key: &str| state.get(key).and_then(Value::as_str).map(str::to_owned);
        Trained {
            step: checkpoint.step(),
            data: text("data"),
            tokens: state.get("data_tokens").and_then(Value::as_u64),
            tokenizer: text("tokenizer").and_then(|t| t.parse().ok()),
        }
    }

    /// How data differs from what was trained on; `None` if it does not, or if nothing is known.
    pub(crate) fn difference(&self, streams: &Streams) -> Option<String> {
        let was = self.data.as_ref().filter(|was| **was != streams.fingerprint)?;
        let tokens = |n: u64| format!("{n} tokens, ");
        Some(format!(
            "{}fingerprint {}; until step {} {}fingerprint {}",
            tokens(tokens_of(streams)),
            short(&streams.fingerprint),
            self.step,
            self.tokens.map(tokens).unwrap_or_default(),
            short(was),
        ))
    }
}

/// What a checkpoint is to say of data and tokenizer.
pub(crate) fn state(next_sample: u64, streams: &Streams, tokenizer: Option<&Named>) -> Value {
    json!({
        "next_sample": next_sample,
        "data": streams.fingerprint,
        "data_tokens": tokens_of(streams),
        "tokenizer": tokenizer.map(|t| t.fingerprint),
    })
}

fn tokens_of(streams: &Streams) -> u64 {
    streams.train_tokens + streams.valid_tokens
}

/// The beginning of a fingerprint: enough for people to tell two apart.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..8).unwrap_or(fingerprint)
}

/// Where a copy of the run's tokenizer may be.
fn put_back(dir: &crate::RunDir) -> String {
    let beside =
        dir.remembered().map(|r| data::tokenizer_path(&r.directory.join("corpus"))).filter(|p| p.exists());
    match beside {
        Some(copy) => {
            format!("put the run's own tokenizer back; the data that it made has a copy, {}", copy.display())
        }
        None => "put the run's own tokenizer back; data that it made has a copy beside it".to_owned(),
    }
}

/// The tokenizer in a run's directory, which must be the one that `trained` was trained with.
///
/// # Errors
/// If it is gone, cannot be read or is another.
pub(crate) fn of_run(dir: &crate::RunDir, trained: &Trained) -> Result<Option<Named>> {
    let Some(path) = dir.tokenizer() else {
        return match &trained.tokenizer {
            None => Ok(None),
            Some(known) => Err(Error::user(format!(
                "{}/tokenizer.json is gone; the weights were trained with it ({})",
                dir.path().display(),
                short(&known.to_string())
            ))
            .hint(put_back(dir))),
        };
    };
    let found = Named::load(&path).map_err(|e| {
        // Its own hint does not know that there is a copy.
        let what = e.to_string();
        let e = if e.kind() == spec::Kind::User { Error::user(what) } else { Error::failure(what) };
        e.context("read the run's own tokenizer").hint(put_back(dir))
    })?;
    match &trained.tokenizer {
        Some(known) if *known != found.fingerprint => Err(Error::user(format!(
            "{} is not the tokenizer that the checkpoint of step {} was trained with ({})",
            found.shown(),
            trained.step,
            short(&known.to_string())
        ))
        .hint(put_back(dir))),
        _ => Ok(Some(found)),
    }
}
