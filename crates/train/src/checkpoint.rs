//! Checkpoints of a run: every rank writes its share, rank 0 commits; weights taken from another run or model.

use std::path::{Path, PathBuf};

use program::Request;
use spec::run::Difference;
use spec::{Context, Error, Result, Router, RunSpec};

use crate::begin::{fell_back, how_to_fall_back, whole};
use crate::beside;
use crate::exec::Executor;
use crate::mesh::Mesh;
use crate::run_dir::RunDir;

impl Executor {
    /// Writes this rank's share of a checkpoint; the last word is rank 0's, which commits it and returns its path and
    /// size.
    ///
    /// # Errors
    /// If any rank cannot write; the checkpoints before stay as they are.
    pub fn save(&mut self, dir: &Path, step: u64, meta: ckpt::Meta) -> Result<Option<(PathBuf, u64)>> {
        let written = ckpt::Saver::begin(dir, step)
            .and_then(|saver| saver.write_rank(self.program.rank, self.state()?.pieces()))
            .map(|r| r.to_bytes());
        self.commit(dir, step, meta, written)
    }

    /// Commits what the ranks have written; this one the share in record `written`.
    ///
    /// # Errors
    /// As [`Executor::save`].
    pub(crate) fn commit(
        &self,
        dir: &Path,
        step: u64,
        meta: ckpt::Meta,
        written: Result<Vec<u8>>,
    ) -> Result<Option<(PathBuf, u64)>> {
        let rank = self.program.rank;
        // Nobody's share becomes a checkpoint if one rank could not write.
        let shares = agree(&self.mesh, rank, written);
        let (mut committed, mut done) = (None, Ok(Vec::new()));
        if rank == 0 {
            match &shares {
                Ok(all) => match commit(dir, step, all, meta) {
                    Ok(saved) => committed = Some(saved),
                    Err(e) => done = Err(e),
                },
                // The shares' own failure is what the caller must hear.
                Err(_) => _ = ckpt::Saver::abort(dir, step),
            }
        }
        let verdict = agree(&self.mesh, rank, done);
        shares?;
        verdict?;
        Ok(committed)
    }

    /// The spans of the last step as the journal keeps them.
    pub(crate) fn journal_spans(&self) -> Vec<journal::Span> {
        let of = |s: &crate::spans::OpSpan| {
            let op = &self.program.blocks[s.block as usize].ops[s.op as usize];
            let lane = if op.only_talks() { journal::Lane::Comm } else { journal::Lane::Compute };
            journal::Span {
                op: op.id.0,
                name: op.name.clone(),
                lane,
                micro_batch: Some(s.micro_batch),
                start_us: self.spans.origin_us() + s.start_ns / 1000,
                end_us: self.spans.origin_us() + s.end_ns / 1000,
                bytes: op.comm.as_ref().map_or(op.cost.bytes, program::Comm::bytes),
            }
        };
        self.spans.all().iter().map(of).collect()
    }
}

/// What every rank has to say, or the first rank's failure in its own words.
fn agree(mesh: &Mesh, rank: usize, mine: Result<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
    const FINE: u8 = 0;
    let mut said = match &mine {
        Ok(bytes) => bytes.clone(),
        Err(e) => format!("{e}\n{}", e.hint_text().unwrap_or_default()).into_bytes(),
    };
    said.push(mine.as_ref().map_or_else(Error::exit_code, |_| FINE));
    let mut all = mesh.exchange(&said)?;
    let codes: Vec<u8> = all.iter_mut().map(|said| said.pop().unwrap_or(FINE)).collect();
    match codes.iter().position(|code| *code != FINE) {
        None => Ok(all),
        Some(who) if who == rank => mine.map(|_| all),
        Some(who) => {
            let words = String::from_utf8_lossy(&all[who]);
            let (what, hint) = words.split_once('\n').unwrap_or((&words, ""));
            let what = format!("rank {who}: {what}");
            let user = Error::user("").exit_code();
            let e = if codes[who] == user { Error::user(what) } else { Error::failure(what) };
            Err(if hint.is_empty() { e } else { e.hint(hint) })
        }
    }
}

/// What is said of a checkpoint on the way that could not be written: hours of training are worth more than a stop, and
/// a disk may have room again by the next one.
pub(crate) fn unsaved_for_now(run: &RunSpec, step: u64, e: &Error) -> String {
    let last = run.train.steps as u64;
    let next = run.checkpoint.every.map_or(last, |every| last.min(step + every as u64));
    let hint = e.hint_text().map(|h| format!("; {h}")).unwrap_or_default();
    format!("step {step} is not saved: {e}: training goes on and saves again at step {next}{hint}")
}

/// The failure of a run whose last weights could not be written, whatever kept them from it.
pub(crate) fn unsaved_at_the_end(dir: &RunDir, step: u64, e: &Error) -> Error {
    let first = e.hint_text().map_or_else(
        || format!("make {} a place that can be written to", dir.checkpoints().display()),
        str::to_owned,
    );
    let from = dir.newest_checkpoint().map_or_else(
        |_| "begins at step 0: no checkpoint was saved".to_owned(),
        |path| format!("goes on from {}", path.display()),
    );
    Error::failure(format!("step {step} is not saved, and with it the run: {e}"))
        .hint(format!("{first}; the same command {from}"))
}

fn commit(dir: &Path, step: u64, records: &[Vec<u8>], meta: ckpt::Meta) -> Result<(PathBuf, u64)> {
    let records = records.iter().map(|r| ckpt::FileRecord::from_bytes(r)).collect::<Result<Vec<_>>>()?;
    let bytes = records.iter().map(ckpt::FileRecord::bytes).sum();
    Ok((ckpt::Saver::commit(dir, step, records, meta)?, bytes))
}

/// Writes an imported model as the checkpoint of step 0 of a run.
///
/// # Errors
/// If a tensor is missing or the checkpoint cannot be written.
pub fn import_weights(run: &RunSpec, dir: &RunDir, weights: &ckpt::hf::HfWeights) -> Result<PathBuf> {
    let layout = spec::Layout::default();
    let precision = spec::DType::F32;
    let request = Request { layout: &layout, sequences: 1, precision, ..Request::of(run, 0) };
    let mut exec = Executor::new(&request, 1, Mesh::alone(), false)?;
    exec.set_params(&mut |part, out| {
        weights.read_box(&part.name, part.row0, part.rows, part.col0, part.cols, out)?;
        match out.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let (row, col) = (part.row0 + at / part.cols.max(1), part.col0 + at % part.cols.max(1));
                Err(Error::user(format!("{}: {} in row {row}, column {col}", part.name, out[at]))
                    .hint("such a model computes nothing: copy it again, or convert it from its source"))
            }
        }
    })?;
    let meta = ckpt::Meta { fingerprint: run.fingerprint(), world: 1, ..ckpt::Meta::default() };
    let saved = exec.save(&dir.checkpoints(), 0, meta)?;
    beside::publish(dir)?;
    saved.map(|(path, _)| path).ok_or_else(|| Error::failure("one rank alone commits its checkpoint"))
}

/// Reads the newest of a run's checkpoints that is whole on every rank; returns its step and path, and what was passed
/// over.
///
/// # Errors
/// If none can be read, or the newest cannot and a person is there to decide.
pub(crate) fn restore(
    exec: &mut Executor,
    newest_first: &[PathBuf],
    restarted: bool,
) -> Result<(u64, PathBuf, Vec<String>)> {
    let mut passed = Vec::new();
    for (i, path) in newest_first.iter().enumerate() {
        let mine = ckpt::Checkpoint::open(path).and_then(|checkpoint| {
            exec.restore(&checkpoint).context(format!("resume from {}", path.display()))?;
            Ok(checkpoint.step().to_le_bytes().to_vec())
        });
        match agree(&exec.mesh, exec.program.rank, mine) {
            Ok(steps) => {
                let step = steps[0].as_slice().try_into().map_or(0, u64::from_le_bytes);
                return Ok((step, path.clone(), passed));
            }
            Err(e) if restarted && i + 1 < newest_first.len() => passed.push(fell_back(&e)),
            Err(e) => {
                let older = newest_first[i + 1..].iter().map(PathBuf::as_path);
                return Err(how_to_fall_back(e, whole(older)));
            }
        }
    }
    Err(Error::failure("a run that goes on has a checkpoint"))
}

/// Weights of another run's newest checkpoint, with fresh optimiser state.
pub(crate) fn adopt(exec: &mut Executor, run: &RunSpec, from: &Path) -> Result<()> {
    let other = RunDir::open(from)?;
    let theirs = other.load()?;
    let mut shape = theirs.model.clone();
    shape.name.clone_from(&run.model.name);
    shape.init_std = run.model.init_std;
    if let (Some(theirs), Some(ours)) = (&mut shape.experts, run.model.experts) {
        // How experts are kept even changes no weight's meaning.
        let Router { balance_loss, z_loss, bias_rate, .. } = ours.router;
        theirs.router = Router { balance_loss, z_loss, bias_rate, ..theirs.router };
    }
    if shape != run.model {
        let theirs = RunSpec { model: shape, ..theirs };
        let differences = run.differences(&theirs);
        let list = Difference::list(differences.iter().filter(|d| d.key.starts_with("model.")));
        let what = format!("the model of {} is not the model of this run: {list}", from.display());
        return Err(
            Error::user(what).hint(format!("take its [model] section from {}", other.run_file().display()))
        );
    }
    let checkpoint = other.open_newest()?;
    exec.set_params_from(&checkpoint)
}
