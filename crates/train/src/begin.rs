//! How a run begins: decided from its directory before data is prepared and ranks are started.

use std::path::{Path, PathBuf};

use data::Prepared;
use spec::run::{DataSource, DataSpec};
use spec::{Error, Result, RunSpec};

use crate::beside;
use crate::identity::{self, Named, Trained};
use crate::run_dir::RunDir;

/// What a person asked for beyond the run file.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Begin with the weights of this run, unless the run has a checkpoint of its own.
    pub init: Option<PathBuf>,
    /// Go on with data that has changed.
    pub accept_changed_data: bool,
    /// Go on although learning rates of past steps have changed.
    pub accept_changed_schedule: bool,
    /// A launcher or a batch system started the run once more, with nobody watching.
    pub restarted: bool,
}

/// Where weights come from.
#[derive(Clone, Debug)]
pub(crate) enum Weights {
    /// Random from the run's seed.
    Seed,
    /// The newest checkpoint of another run, or an imported model.
    Run(PathBuf),
    /// Checkpoints of the run itself, newest first; the first that is whole.
    Checkpoints(Vec<PathBuf>),
}

/// How a run begins.
#[derive(Clone, Debug)]
pub struct Beginning {
    pub(crate) weights: Weights,
    pub(crate) asked: Asked,
    /// The tokenizer that text is tokenised with; `None` trains one, or nothing is known of the data's.
    pub(crate) tokenizer: Option<Named>,
    pub(crate) prepared: Option<Prepared>,
    pub(crate) trained: Trained,
    /// The run's data as its directory remembers it, if text has changed since.
    pub(crate) before: Option<PathBuf>,
    /// Where the data lay when the run was started.
    pub(crate) source_was: Option<DataSource>,
    pub(crate) tokenizer_was: Option<PathBuf>,
    /// The run that weights come from, held for as long as its files are needed.
    pub(crate) other: Option<RunDir>,
    pub(crate) notes: Vec<String>,
    pub(crate) accepted: Vec<String>,
}

impl Beginning {
    /// Decides how `run` begins, and refuses what can be refused before data is prepared and ranks are started.
    ///
    /// # Errors
    /// If run directory, checkpoints, tokenizers and run file do not fit together.
    pub fn decide(run: &RunSpec, asked: Asked) -> Result<Beginning> {
        check_positions(run)?;
        let dir = RunDir::of(run);
        let saved = ckpt::list(&dir.checkpoints())
            .map_err(|e| e.hint("set run.dir to a directory, or to a new name"))?;
        let begin = Beginning {
            weights: Weights::Seed,
            asked,
            tokenizer: None,
            prepared: None,
            trained: Trained::default(),
            before: None,
            source_was: None,
            tokenizer_was: None,
            other: None,
            notes: Vec::new(),
            accepted: Vec::new(),
        };
        let mut begin = match (saved.is_empty(), begin.asked.init.clone()) {
            (false, _) => begin.with_checkpoints(run, &dir, saved)?,
            (true, Some(other)) => begin.with_run(run, &other)?,
            (true, None) => Beginning { tokenizer: identity::only(identity::brought(run)?)?, ..begin },
        };
        begin.check_vocabulary(run)?;
        let (window, sequence) = (run.model.window.map_or(0, |w| w.tokens), run.batch.sequence);
        if window >= sequence {
            begin.notes.push(format!(
                "model.window.tokens = {window} bounds nothing: a sequence has {sequence} tokens; 1 to {} do",
                sequence - 1
            ));
        }
        Ok(begin)
    }

    /// Whether the run goes on from a checkpoint of its own.
    pub fn resumes(&self) -> bool {
        matches!(self.weights, Weights::Checkpoints(_))
    }

    /// The data that was prepared from text.
    pub fn prepared(&self) -> Option<&Prepared> {
        self.prepared.as_ref()
    }

    fn with_checkpoints(
        mut self,
        run: &RunSpec,
        dir: &RunDir,
        mut saved: Vec<(u64, PathBuf)>,
    ) -> Result<Self> {
        let whole = loop {
            let Some((_, path)) = saved.last() else { unreachable!("the last one is not given up") };
            match ckpt::Checkpoint::open(path) {
                Ok(checkpoint) => break checkpoint,
                Err(e) if self.asked.restarted && saved.len() > 1 => {
                    saved.pop();
                    self.notes.push(fell_back(&e));
                }
                Err(e) => {
                    let before = whole(saved.iter().rev().skip(1).map(|(_, path)| path.as_path()));
                    return Err(how_to_fall_back(e, before));
                }
            }
        };
        self.trained = Trained::of(&whole);
        crate::resume::check(run, dir, &whole, &mut self)?;
        if let Some(init) = &self.asked.init {
            self.notes.push(format!(
                "--init {} is not used: {} goes on from its own step {}",
                init.display(),
                dir.path().display(),
                whole.step()
            ));
        }
        let own = identity::of_run(dir, &self.trained)?;
        match &run.data.tokenizer {
            // The run has its own copy of a file that was there when it was started.
            Some(gone) if own.is_some() && self.tokenizer_was.as_ref() == Some(gone) && !gone.exists() => {
                self.notes.push(format!("{} is gone; the run has a copy", gone.display()));
                let without = DataSpec { tokenizer: None, ..run.data.clone() };
                self.bind(&RunSpec { data: without, ..run.clone() }, own, dir.path())?;
            }
            _ => self.bind(run, own, dir.path())?,
        }
        self.weights = Weights::Checkpoints(saved.into_iter().rev().map(|(_, path)| path).collect());
        Ok(self)
    }

    fn with_run(mut self, run: &RunSpec, other: &Path) -> Result<Self> {
        let dir = RunDir::open(other)?;
        dir.load()?;
        let checkpoint = dir.open_newest()?;
        let own = identity::of_run(&dir, &Trained::of(&checkpoint))?;
        if let Some(own) = own.as_ref().filter(|_| run.data.tokenizer.is_none() && is_text(run)) {
            self.notes.push(format!(
                "text is tokenised by the tokenizer of {}, of {} entries",
                other.display(),
                own.entries
            ));
        }
        self.bind(run, own, other)?;
        self.other = Some(dir);
        self.weights = Weights::Run(other.to_owned());
        Ok(self)
    }

    /// Weights that were learnt with a tokenizer keep it: `own` is that of `whose`.
    fn bind(&mut self, run: &RunSpec, own: Option<Named>, whose: &Path) -> Result<()> {
        let brought = identity::brought(run)?;
        if let Some(own) = own {
            identity::check_own(&own, &brought, whose)?;
            self.tokenizer = Some(own);
            return Ok(());
        }
        self.tokenizer = identity::only(brought)?;
        match &self.tokenizer {
            None if is_text(run) => Err(Error::user(format!(
                "{} has no tokenizer, and its weights would not know the tokens of a new one",
                whose.display()
            ))
            .hint("set data.tokenizer to the model's tokenizer.json, or data.prefix to data that it made")),
            Some(found) => {
                self.notes.push(format!(
                    "{} has no tokenizer of its own: {} is taken for it",
                    whose.display(),
                    found.path.display()
                ));
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Refuses a tokenizer that gives ids which the model has no embedding for.
    fn check_vocabulary(&self, run: &RunSpec) -> Result<()> {
        let vocab = run.model.vocab;
        match &self.tokenizer {
            Some(t) if t.entries > vocab => Err(Error::user(format!(
                "{} has {} entries, but the model's vocabulary has {vocab}",
                t.path.display(),
                t.entries
            ))
            .hint(format!(
                "set model.vocab to at least {}, or train a tokenizer of at most {vocab} entries (data.vocab_size)",
                t.entries
            ))),
            _ => Ok(()),
        }
    }

    /// Writes what the run now is into its directory. The tokenizer of weights that have been trained stays.
    pub(crate) fn write(&self, run: &RunSpec, dir: &RunDir) -> Result<()> {
        let kept = self.resumes() && dir.tokenizer().is_some();
        let tokenizer = self.tokenizer.as_ref().filter(|t| t.is_file && !kept);
        dir.create(run, tokenizer.map(|t| t.path.as_path()))?;
        if let Some(path) = tokenizer.map(|t| t.path.as_path()) {
            // What ends documents is known where the tokenizer comes from; the run is to know it by itself.
            let mut from = data::Tokenizer::load(path)?;
            if let Some(end) = run.data.eod.as_ref().filter(|_| is_text(run)) {
                from.set_eod(end)?;
            }
            let tokenizer = ckpt::hf::Tokenizer { path, eod: from.eod() };
            ckpt::hf::keep_settings(tokenizer, dir.path(), &run.model)?;
        }
        if let Some(remembered) = self.to_remember() {
            dir.remember(&remembered)?;
        }
        beside::publish(dir)
    }

    /// Compares the data with what the checkpoint was trained on.
    ///
    /// # Errors
    /// If it has changed, and that was not accepted.
    pub(crate) fn check_data(&mut self, run: &RunSpec, streams: &data::Streams) -> Result<()> {
        let Some(difference) = self.trained.difference(streams) else {
            if self.source_was.as_ref().is_some_and(|was| *was != run.data.source && self.trained.step > 0) {
                self.notes.push("the data has moved; its content is what it was".to_owned());
            }
            return Ok(());
        };
        let what = format!("the data of {} has changed: {difference}", run.run.dir.display());
        if self.asked.accept_changed_data {
            self.accepted.push(format!("--accept-changed-data: {what}"));
            return Ok(());
        }
        let back = match &self.before {
            Some(prefix) => {
                format!("the data as it was is still there: set data.prefix={}", prefix.display())
            }
            None => "put the data back as it was, or name where it lies now".to_owned(),
        };
        Err(Error::user(what).hint(format!(
            "{back}; --accept-changed-data goes on with the new data on purpose, and the journal says so"
        )))
    }
}

/// Whether text is tokenised for the run.
pub(crate) fn is_text(run: &RunSpec) -> bool {
    crate::text::source(run).is_some()
}

/// What is said when an automatic restart passes over a damaged checkpoint.
pub(crate) fn fell_back(e: &Error) -> String {
    format!("falling back to the checkpoint before the newest: {e}")
}

/// The first of these checkpoints that can be opened.
pub(crate) fn whole<'a>(mut newest_first: impl Iterator<Item = &'a Path>) -> Option<&'a Path> {
    newest_first.find(|path| ckpt::Checkpoint::open(path).is_ok())
}

/// A person decides whether the steps since the checkpoint before are lost.
pub(crate) fn how_to_fall_back(e: Error, before: Option<&Path>) -> Error {
    let Some(before) = before else {
        return e.hint("copy it from a backup; no older checkpoint of the run is whole");
    };
    let what = e.to_string();
    let named = if e.kind() == spec::Kind::User { Error::user(what) } else { Error::failure(what) };
    named.hint(format!(
        "copy it from a backup, or move it away to go on from {}; an automatic restart does so by itself",
        before.display()
    ))
}

fn check_positions(run: &RunSpec) -> Result<()> {
    if run.model.max_positions() < run.batch.sequence {
        return Err(Error::user(format!(
            "batch.sequence = {} tokens, but the model takes at most {}",
            run.batch.sequence,
            run.model.max_positions()
        ))
        .hint("lower batch.sequence, or raise model.max_positions"));
    }
    Ok(())
}
