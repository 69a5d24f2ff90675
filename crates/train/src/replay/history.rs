//! What journals say of a step and of those before it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use journal::ledger::{Drawings, Skipped};
use journal::{Action, Record, Trouble};
use spec::run::BatchSpec;
use spec::{Error, Result};

use super::{Recorded, Try};
use crate::run_dir::RunDir;

/// Hashes of weights and moments after a step.
#[derive(Clone, Debug, Default)]
pub(super) struct Looked {
    session: u64,
    pub(super) hash: String,
    /// By rank and parameter, of what each saved.
    pub(super) own: BTreeMap<usize, BTreeMap<String, u64>>,
}

impl Looked {
    /// By parameter, of all ranks.
    pub(super) fn by_name(&self) -> BTreeMap<&str, u64> {
        let mut sums = BTreeMap::new();
        for (name, sum) in self.own.values().flatten() {
            let all: &mut u64 = sums.entry(name.as_str()).or_default();
            *all = all.wrapping_add(*sum);
        }
        sums
    }
}

/// A run up to a step.
pub(super) struct History {
    pub(super) step: u64,
    /// Loss and gradient norm of each step, as it was done last.
    pub(super) outputs: BTreeMap<u64, (f64, f64)>,
    looked: Option<Looked>,
    /// Steps that were left out by decisions before the step.
    skipped: Vec<Skipped>,
    /// What was done about the step itself.
    action: Option<Action>,
    world: usize,
    device: String,
}

impl History {
    pub(super) fn read(dir: &Path, step: u64, batch: BatchSpec) -> Result<History> {
        let mut h = History {
            step,
            outputs: BTreeMap::new(),
            looked: None,
            skipped: Vec::new(),
            action: None,
            world: 1,
            device: "cpu".to_owned(),
        };
        let mut drawings = Drawings::default();
        for (rank, path) in journal::files(dir)? {
            let mut now = (1, String::new());
            let mut reader = journal::Reader::open(&path)?;
            while let Some(record) = reader.next_record()? {
                match &record {
                    Record::RunStarted { world, device, .. } => now = (*world, device.clone()),
                    Record::Recovered { world, .. } => now.0 = *world,
                    Record::Step(s) if rank == 0 && s.step <= step => {
                        h.outputs.insert(s.step, (s.loss, s.grad_norm));
                        if s.step == step {
                            (h.world, h.device) = now.clone();
                            (h.looked, h.action) = (None, None);
                        }
                    }
                    // State that changed by itself makes no step bad.
                    Record::Trouble { what: Trouble::Corruption, .. } => {}
                    Record::Trouble { step: at, loss, grad_norm, action, .. } if rank == 0 && *at == step => {
                        h.outputs.insert(*at, (*loss, *grad_norm));
                        (h.world, h.device) = now.clone();
                        h.action = Some(*action);
                    }
                    Record::Verified { session: s, step: at, hash, own, .. } if *at == step => {
                        if rank == 0 {
                            h.looked = Some(Looked { session: *s, hash: hash.clone(), own: BTreeMap::new() });
                        }
                        if let Some(looked) = h.looked.as_mut().filter(|l| l.session == *s) {
                            let sums = own.iter().filter_map(|(name, sum)| {
                                Some((name.clone(), u64::from_str_radix(sum, 16).ok()?))
                            });
                            looked.own.insert(rank, sums.collect());
                        }
                    }
                    _ => {}
                }
                drawings.add(rank, record);
            }
        }
        h.skipped = drawings.ledger(batch).skipped;
        h.skipped.retain(|s| s.step < step);
        Ok(h)
    }

    /// What it says of the step itself.
    pub(super) fn recorded(&self, dir: &Path) -> Result<Recorded> {
        let Some((loss, grad_norm)) = self.outputs.get(&self.step).copied() else {
            let last = self.outputs.keys().next_back().copied().unwrap_or(0);
            return Err(Error::user(format!(
                "the journal in {} says nothing of step {}",
                dir.display(),
                self.step
            ))
            .hint(format!("steps that it knows go up to {last}")));
        };
        let hash = self.looked.as_ref().map(|l| l.hash.clone());
        Ok(Recorded { loss, grad_norm, hash, action: self.action, world: self.world })
    }

    pub(super) fn looked(&self) -> Option<&Looked> {
        self.looked.as_ref()
    }

    pub(super) fn world(&self) -> usize {
        self.world
    }

    /// Whether the step's samples are no part of the weights that the step in question was done with.
    pub(super) fn is_left_out(&self, step: u64) -> bool {
        self.skipped.iter().any(|s| (s.first_step..=s.last_step).contains(&step))
    }

    /// The newest checkpoint before the step that lies on the way to it.
    pub(super) fn checkpoint(&self, dir: &RunDir) -> Result<Option<PathBuf>> {
        let saved = ckpt::list(&dir.checkpoints())?;
        let on_the_way = |step: u64| {
            step < self.step
                && !self
                    .skipped
                    .iter()
                    .any(|s| (s.first_step..s.last_step).contains(&step) && s.first_step < s.step)
        };
        let mut newest = saved.into_iter().rev().filter(|(step, _)| on_the_way(*step));
        Ok(newest.find(|(_, path)| ckpt::Checkpoint::open(path).is_ok()).map(|(_, path)| path))
    }

    pub(super) fn notes(&self, has_checkpoint: bool, recorded: &Recorded, tries: &[Try]) -> Vec<String> {
        let mut notes = Vec::new();
        if recorded.hash.is_none() && recorded.action.is_none() {
            notes.push("no hash of weights was recorded after it (run.verify_every): only loss and norm were compared".into());
        }
        if !self.device.starts_with("cpu") {
            notes.push(format!(
                "it was done on {}, and is done again on this machine's processor, whose bits are others",
                self.device
            ));
        }
        if !has_checkpoint && tries.iter().any(|t| t.differs_at == self.outputs.keys().next().copied()) {
            notes.push(
                "it differs from the first step on, without a checkpoint: a run that began with --init is not begun again by its seed"
                    .into(),
            );
        }
        notes
    }
}
