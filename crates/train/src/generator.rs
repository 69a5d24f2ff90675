use std::path::Path;

use data::{StreamDecoder, Tokenizer};
use program::{Mode, Request};
use spec::{Error, Layout, Result, RunSpec};

use crate::device::Device;
use crate::exec::Executor;
use crate::generate::{Ended, Sampling};
use crate::mesh::Mesh;
use crate::run_dir::RunDir;
use crate::state::{Averages, Source};

/// Refuses a run that keeps no average of its weights.
///
/// # Errors
/// If it keeps none.
pub fn check_averaged(run: &RunSpec) -> Result<()> {
    if run.train.ema > 0.0 {
        return Ok(());
    }
    Err(Error::user("--ema: the run keeps no average of its weights")
        .hint("leave --ema out, or train with --set train.ema=0.999"))
}

/// A trained model on one rank, ready to continue text.
pub struct Generator {
    exec: Executor,
    tokenizer: Option<Tokenizer>,
    run: RunSpec,
}

impl Generator {
    /// Loads the newest checkpoint of a run, whatever layout wrote it, onto a device that is opened once the run is found.
    ///
    /// # Errors
    /// If the run has no checkpoint, or it cannot be read.
    pub fn open(dir: &Path, device: impl FnOnce() -> Box<dyn Device>) -> Result<Generator> {
        Generator::open_with(dir, false, device)
    }

    /// The same, with the average of the weights over steps in their place if `averaged`.
    ///
    /// # Errors
    /// As [`Generator::open`], or if the run keeps no average.
    pub fn open_with(
        dir: &Path,
        averaged: bool,
        device: impl FnOnce() -> Box<dyn Device>,
    ) -> Result<Generator> {
        let dir = RunDir::open(dir)?;
        let run = dir.load()?;
        if averaged {
            check_averaged(&run)?;
        }
        let checkpoint = dir.open_newest()?;
        let layout = Layout::default();
        let mode = Mode::Generate { positions: run.batch.sequence.max(2) };
        let request = Request { layout: &layout, sequences: 1, mode, ..Request::of(&run, 0) };
        let mut exec = Executor::on(device(), &request, Mesh::alone(), false)?;
        exec.set_tables(&run.model)?;
        let source: &dyn Source = if averaged { &Averages(&checkpoint) } else { &checkpoint };
        exec.set_params_from(source)
            .map_err(|e| e.hint("run.toml and the checkpoint must be of the same run"))?;
        let tokenizer = dir.tokenizer_of(&checkpoint)?.map(|p| Tokenizer::load(&p)).transpose()?;
        Ok(Generator { exec, tokenizer, run })
    }

    /// The run's own file.
    pub fn run(&self) -> &RunSpec {
        &self.run
    }

    /// Tokens of prompt and continuation that the model sees at once.
    pub fn positions(&self) -> usize {
        self.exec.positions()
    }

    /// Continues `prompt`, handing text to `each` as it becomes whole characters; how many tokens were made, and why no more.
    ///
    /// # Errors
    /// If the run has no tokenizer, or the prompt does not fit.
    pub fn text(
        &mut self,
        prompt: &str,
        tokens: usize,
        sampling: Sampling,
        each: &mut dyn FnMut(&str),
    ) -> Result<(usize, Ended)> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| {
            Error::user("the run has no tokenizer")
                .hint("give token ids: phalanx generate --tokens \"1 2 3\"")
        })?;
        let mut ids = tokenizer.encode_prompt(prompt)?;
        if ids.is_empty() {
            ids.push(tokenizer.eod().unwrap_or(0));
        }
        let mut decoder = StreamDecoder::new(tokenizer);
        let eod = tokenizer.eod();
        let mut made = 0;
        let ended = self.exec.generate(&ids, tokens, sampling, eod, &mut |id| {
            made += 1;
            each(&decoder.push(id));
            true
        })?;
        each(&decoder.finish());
        Ok((made, ended))
    }

    /// Continues token ids; those that were made, and why no more.
    ///
    /// # Errors
    /// If the prompt is empty or does not fit.
    pub fn ids(&mut self, prompt: &[u32], tokens: usize, sampling: Sampling) -> Result<(Vec<u32>, Ended)> {
        let mut out = Vec::new();
        let ended = self.exec.generate(prompt, tokens, sampling, None, &mut |id| {
            out.push(id);
            true
        })?;
        Ok((out, ended))
    }

    /// The logits after each of these tokens.
    ///
    /// # Errors
    /// If there are none, too many, or ids outside the vocabulary.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.exec.all_logits(tokens)
    }
}
