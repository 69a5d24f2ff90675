use std::collections::BTreeMap;
use std::path::Path;

use journal::Record;
use journal::ledger::{Doubled, Drawings, Ledger};
use serde::Serialize;
use spec::{Error, Result, RunSpec};

use crate::run_dir::RunDir;
use crate::trainer::open_data;

/// What a run was trained on, step by step, held against its data.
#[derive(Clone, Debug, Serialize)]
pub struct Audit {
    /// From the journals of its ranks.
    #[serde(flatten)]
    pub ledger: Ledger,
    /// Whether the tokens are those that the data has at those samples.
    pub tokens: Tokens,
    /// Damaged lines of journals that were passed over, and lines that are there twice, in words.
    pub damage: Vec<String>,
    /// Of each loss that ranks got over without a restart, the seconds until the last of them knew of it.
    #[serde(skip)]
    pub detections_s: Vec<f64>,
}

/// Whether the tokens that ranks drew are those of the data as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Tokens {
    /// In every step.
    Equal,
    /// Not in this step, the first such.
    Differ {
        /// Which.
        step: u64,
    },
    /// The data cannot be read.
    Unknown {
        /// Why.
        reason: String,
    },
}

impl Audit {
    /// Reads the journals of the run in `dir`, and the samples that they name from its data; `progress` is told of each
    /// step that was compared and of how many there are.
    ///
    /// # Errors
    /// If there is no run or no record of what was drawn, or a journal cannot be read; lines of it that are damaged are
    /// passed over.
    pub fn of(dir: &Path, progress: &dyn Fn(u64, u64)) -> Result<Audit> {
        let run_dir = RunDir::new(dir);
        let run = run_dir.load()?;
        let (mut drawings, mut damage) = (Drawings::default(), Vec::new());
        // Before the journals are read, which a run that goes on writes first.
        let saved = run_dir.newest_checkpoint().ok().and_then(|path| ckpt::Checkpoint::open(&path).ok());
        let mut detections_s: BTreeMap<u64, f64> = BTreeMap::new();
        for (rank, path) in journal::files(dir)? {
            let mut reader = journal::Reader::open(&path)?;
            while let Some(record) = reader.next_sound()? {
                if let Record::Recovered { session: Some(session), detection_s: Some(s), .. } = &record {
                    let last_s = detections_s.entry(*session).or_default();
                    *last_s = s.max(*last_s);
                }
                drawings.add(rank, record);
            }
            damage.extend(reader.damage.map(|d| d.to_string()));
        }
        let detections_s = detections_s.into_values().collect();
        if let Some(saved) = saved {
            drawings.has_reached(saved.step());
        }
        let ledger = drawings.ledger(run.batch);
        damage.extend(ledger.doubled.iter().map(|d| twice(dir, d)));
        if ledger.batches.is_empty() && ledger.sessions == 0 {
            return Err(Error::user(format!("no journal in {} says what a step drew", dir.display()))
                .hint("give the directory of a run that has done a step"));
        }
        let tokens = match compare(&run, &run_dir, &ledger, progress) {
            Ok(tokens) => tokens,
            Err(e) => Tokens::Unknown { reason: e.to_string() },
        };
        Ok(Audit { ledger, tokens, damage, detections_s })
    }

    /// Whether no sample was lost, repeated or changed.
    pub fn is_exact(&self) -> bool {
        self.ledger.is_exact() && self.tokens == Tokens::Equal
    }
}

/// Says that lines are there twice, and that this is no training.
fn twice(dir: &Path, d: &Doubled) -> String {
    let lines = if d.lines == 1 { "1 line is" } else { &format!("{} lines are", d.lines) };
    format!(
        "{}: {lines} there twice, the first of step {}: the file is damaged, and each counts once",
        journal::path(dir, d.rank).display(),
        d.first_step
    )
}

fn compare(run: &RunSpec, dir: &RunDir, ledger: &Ledger, progress: &dyn Fn(u64, u64)) -> Result<Tokens> {
    let prepared = crate::text::tokens_of(run, dir);
    let streams = open_data(run, prepared.as_ref())?;
    let mut sample = vec![0; run.batch.sequence + 1];
    for batch in &ledger.batches {
        let (step, mut once) = (batch.step, 0_u64);
        for index in run.batch.samples_before(step - 1)..run.batch.samples_before(step) {
            streams.train.sample(index, &mut sample)?;
            once = once.wrapping_add(data::sample_xxh3(index, &sample));
        }
        if batch.tokens_xxh3 != batch.copies.wrapping_mul(once) {
            return Ok(Tokens::Differ { step });
        }
        progress(step, ledger.steps);
    }
    Ok(Tokens::Equal)
}
