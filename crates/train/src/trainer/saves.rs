//! Checkpoints around the step loop: begun, finished, told of.

use std::path::PathBuf;
use std::time::Instant;

use journal::Record;
use spec::{Error, Result};

use super::{Event, Trainer, now_us, warning};
use crate::saving::Saving;
use crate::{checkpoint, identity};

impl Trainer {
    /// What the checkpoint of this step says of the run.
    pub(super) fn meta(&self) -> ckpt::Meta {
        let batch = &self.run.batch;
        let samples = batch.samples_before(self.step);
        let mut state = identity::state(samples, &self.streams, self.begin.tokenizer.as_ref());
        self.watch.write(&self.run.trouble, &mut state);
        ckpt::Meta {
            tokens: samples * batch.sequence as u64,
            fingerprint: self.run.fingerprint(),
            world: self.run.layout.world(),
            state,
        }
    }

    /// Saves a checkpoint while training waits.
    pub(super) fn save(&mut self, each: &mut dyn FnMut(Event)) -> Result<()> {
        let start = Instant::now();
        let (dir, meta) = (self.dir.checkpoints(), self.meta());
        if let Some(saved) = self.exec.save(&dir, self.step, meta)? {
            let save_s = start.elapsed().as_secs_f64();
            self.saved(saved, self.step, save_s, save_s, each);
        }
        Ok(())
    }

    /// Saves a checkpoint while training goes on, if it may; what keeps it from being written ends no run.
    pub(super) fn save_beside(&mut self, each: &mut dyn FnMut(Event)) {
        let begun = if self.run.checkpoint.background {
            let (dir, meta) = (self.dir.checkpoints(), self.meta());
            Saving::begin(&self.exec, std::mem::take(&mut self.copy), dir, self.step, meta)
        } else {
            Ok(None)
        };
        // Ranks that have no room for a copy write at once, and all of them together.
        let all = begun.and_then(|begun| {
            let mine = [u8::from(begun.is_some())];
            Ok((self.exec.mesh.exchange(&mine)?.iter().all(|m| m == &[1]), begun))
        });
        let failed = match all {
            Ok((true, begun)) => {
                self.saving = begun;
                Ok(())
            }
            Ok((false, begun)) => {
                if let Some(begun) = begun {
                    self.copy = begun.join().0;
                }
                self.save(each)
            }
            Err(e) => Err(e),
        };
        if let Err(e) = failed {
            self.unsaved_for_now(self.step, &e, each);
        }
    }

    /// Waits for the checkpoint under way, if there is one, and commits it.
    pub(super) fn finish_saving(&mut self, each: &mut dyn FnMut(Event)) {
        let Some(saving) = self.saving.take() else { return };
        let start = Instant::now();
        let (dir, step, meta) = (saving.dir.clone(), saving.step, saving.meta.clone());
        let (began, copied_s) = (saving.began, saving.stall_s);
        let (copy, written) = saving.join();
        self.copy = copy;
        match self.exec.commit(&dir, step, meta, written) {
            Ok(None) => {}
            Ok(Some(saved)) => {
                let stall_s = copied_s + start.elapsed().as_secs_f64();
                self.saved(saved, step, began.elapsed().as_secs_f64(), stall_s, each);
            }
            Err(e) => self.unsaved_for_now(step, &e, each),
        }
    }

    pub(super) fn unsaved_for_now(&mut self, step: u64, e: &Error, each: &mut dyn FnMut(Event)) {
        let text = checkpoint::unsaved_for_now(&self.run, step, e);
        self.note(Record::Warning { time_us: now_us(), text }, each);
    }

    /// Tells of a checkpoint, and removes what `checkpoint.keep` and `keep_every` do not keep.
    pub(super) fn saved(
        &mut self,
        (path, bytes): (PathBuf, u64),
        step: u64,
        save_s: f64,
        stall_s: f64,
        each: &mut dyn FnMut(Event),
    ) {
        let every = self.run.checkpoint.keep_every.map(|every| every as u64);
        if let Some(keep) = self.run.checkpoint.keep
            && let Err(e) = ckpt::keep(&self.dir.checkpoints(), keep, every)
        {
            self.note(warning(&e), each);
        }
        let (time_us, path, stall_s) = (now_us(), path.display().to_string(), Some(stall_s));
        self.note(Record::Checkpoint { time_us, step, path, bytes, save_s, stall_s }, each);
    }

    /// The failure of a run whose last weights could not be saved.
    pub(super) fn unsaved(&mut self, e: Error) -> Error {
        if self.is_stranded() {
            return e;
        }
        let e = checkpoint::unsaved_at_the_end(&self.dir, self.step, &e);
        self.write_failed(self.step, &e);
        e
    }
}
