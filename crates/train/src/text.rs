//! Text of a run becomes tokens, and a run keeps the tokens that it was started with.

use std::path::{Path, PathBuf};

use data::{OnProgress, Prepared, TextOptions, TextSource, TokenizerChoice};
use serde::{Deserialize, Serialize};
use spec::run::DataSource;
use spec::{Error, Result, RunSpec};

use crate::begin::Beginning;
use crate::identity::Named;
use crate::run_dir::RunDir;

/// `data.json` of a run's directory: the tokens that its text became.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Remembered {
    /// Directory of the prepared dataset.
    pub(crate) directory: PathBuf,
}

/// The text that a run names; `None` if it names tokenised data.
pub(crate) fn source(run: &RunSpec) -> Option<DataSource> {
    match &run.data.source {
        DataSource::Prefix(_) | DataSource::Blend(_) => None,
        text => Some(text.clone()),
    }
}

/// How the documents in a run's text are described.
fn options(run: &RunSpec) -> TextOptions {
    let data = &run.data;
    TextOptions { field: data.field.clone(), skip_bad: data.skip_bad, end: data.eod.clone() }
}

fn locate(source: &DataSource) -> Result<TextSource> {
    match source {
        DataSource::Text(paths) => Ok(TextSource::Paths(paths.clone())),
        _ => data::default_cargo_home().map(TextSource::CargoHome).ok_or_else(|| {
            Error::user(
                "no CARGO_HOME and no home directory: the default text, sources of crates, is not there",
            )
            .hint("give text to train on: phalanx train --text PATH")
        }),
    }
}

impl Beginning {
    /// Tokenises the run's text, unless that was done before; a run that goes on keeps the tokens that it was started
    /// with as long as they are there.
    ///
    /// # Errors
    /// If the text, the tokenizer or the dataset cannot be used.
    pub fn prepare(&mut self, run: &RunSpec, progress: OnProgress<'_>) -> Result<()> {
        let Some(source) = source(run) else { return Ok(()) };
        let text = locate(&source);
        let prepared = match self.remembered(run, &source, &text) {
            Some(prepared) => prepared,
            None => {
                let tokenizer = match &self.tokenizer {
                    Some(own) => TokenizerChoice::Load(own.path.clone()),
                    None => TokenizerChoice::Train { vocab_size: run.data.vocab_size },
                };
                data::prepare_with(&cache(run), &text?, &tokenizer, &options(run), progress)?
            }
        };
        if self.tokenizer.is_none() {
            self.tokenizer = Some(Named::load(&prepared.tokenizer_path)?);
        }
        self.prepared = Some(prepared);
        Ok(())
    }

    /// The tokens that the run was started with, if they are to be used again.
    fn remembered(
        &mut self,
        run: &RunSpec,
        source: &DataSource,
        text: &Result<TextSource>,
    ) -> Option<Prepared> {
        if self.trained.step == 0 {
            return None;
        }
        let dir = RunDir::of(run);
        let remembered = dir.remembered()?;
        let Some(prepared) = tokens_of(run, &dir) else {
            self.notes.push(format!(
                "the tokens that the run was started with, {}, are gone: its text is tokenised again",
                remembered.directory.display()
            ));
            return None;
        };
        let same_source = self.source_was.as_ref() == Some(source);
        let key = text.as_ref().ok().map(data::text_key);
        let kept = match key {
            Some(Ok(now)) if prepared.manifest.is_of(now, &options(run)) => return Some(prepared),
            _ if self.asked.accept_changed_data => None,
            Some(Ok(_)) if same_source && *source == DataSource::CargoSources => {
                Some("the default text, sources of crates, has changed")
            }
            Some(Err(_)) | None if same_source => Some("the text is no longer there"),
            _ => None,
        };
        match kept {
            Some(why) => {
                self.notes.push(format!(
                    "{why} since the run was started: it goes on with its own tokens, {}",
                    prepared.prefix.display()
                ));
                Some(prepared)
            }
            None => {
                self.before = Some(prepared.prefix);
                None
            }
        }
    }

    /// What the run's directory is to remember of its text.
    pub(crate) fn to_remember(&self) -> Option<Remembered> {
        let directory = self.prepared.as_ref()?.prefix.parent()?.to_owned();
        Some(Remembered { directory })
    }
}

/// The tokens that the text of the run in `dir` became. A run may have been moved together with its cache, and be looked
/// at from another directory.
pub(crate) fn tokens_of(run: &RunSpec, dir: &RunDir) -> Option<Prepared> {
    let remembered = dir.remembered()?.directory;
    let name = remembered.file_name()?;
    let beside = dir.path().parent().unwrap_or(Path::new(".")).join("cache");
    [&remembered, &cache(run).join(name), &beside.join(name)].into_iter().find_map(|p| data::prepared_in(p))
}

/// Beside the run unless it is set, so that runs in one folder share it.
pub(crate) fn cache(run: &RunSpec) -> PathBuf {
    let beside = run.run.dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    run.data.cache_dir.clone().unwrap_or_else(|| beside.join("cache"))
}
