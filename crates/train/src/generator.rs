use std::path::Path;

use data::{StreamDecoder, Tokenizer};
use program::{Mode, Request};
use spec::{Error, Layout, Result, RunSpec};

use crate::device::Device;
use crate::exec::Executor;
use crate::generate::Sampling;
use crate::mesh::Mesh;
use crate::run_dir::RunDir;

/// A trained model on one rank, ready to continue text.
pub struct Generator {
    exec: Executor,
    tokenizer: Option<Tokenizer>,
    run: RunSpec,
}

impl Generator {
    /// Loads the newest checkpoint of a run, whatever layout wrote it.
    ///
    /// # Errors
    /// If the run has no checkpoint, or it cannot be read.
    pub fn open(dir: &Path, device: Box<dyn Device>) -> Result<Generator> {
        let dir = RunDir::open(dir)?;
        let run = dir.load()?;
        let checkpoint = dir.open_newest()?;
        let layout = Layout::default();
        let mode = Mode::Generate { positions: run.batch.sequence.max(2) };
        let request = Request { layout: &layout, sequences: 1, mode, ..Request::of(&run, 0) };
        let mut exec = Executor::on(device, &request, Mesh::alone(), false)?;
        exec.set_tables(&run.model)?;
        exec.set_params_from(&checkpoint)
            .map_err(|e| e.hint("run.toml and the checkpoint must be of the same run"))?;
        let tokenizer = dir.tokenizer_of(&checkpoint)?.map(|p| Tokenizer::load(&p)).transpose()?;
        Ok(Generator { exec, tokenizer, run })
    }

    /// The run's own file.
    pub fn run(&self) -> &RunSpec {
        &self.run
    }

    /// Continues `prompt`, handing text to `each` as it becomes whole characters.
    ///
    /// # Errors
    /// If the run has no tokenizer, or the prompt does not fit.
    pub fn text(
        &mut self,
        prompt: &str,
        tokens: usize,
        sampling: Sampling,
        each: &mut dyn FnMut(&str),
    ) -> Result<()> {
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
        self.exec.generate(&ids, tokens, sampling, eod, &mut |id| {
            each(&decoder.push(id));
            true
        })?;
        each(&decoder.finish());
        Ok(())
    }

    /// Continues token ids.
    ///
    /// # Errors
    /// If the prompt is empty or does not fit.
    pub fn ids(&mut self, prompt: &[u32], tokens: usize, sampling: Sampling) -> Result<Vec<u32>> {
        let mut out = Vec::with_capacity(tokens);
        self.exec.generate(prompt, tokens, sampling, None, &mut |id| {
            out.push(id);
            true
        })?;
        Ok(out)
    }

    /// The logits after each of these tokens.
    ///
    /// # Errors
    /// If there are none, too many, or ids outside the vocabulary.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.exec.all_logits(tokens)
    }
}
