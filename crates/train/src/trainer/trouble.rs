//! What the step loop does about bad steps and about state that has changed by itself.

use std::path::PathBuf;
use std::time::Instant;

use journal::{Action, Record, Trouble};
use spec::run::OnCorruption;
use spec::{Error, Result};

use super::{Event, Trainer, now_us};
use crate::checkpoint::restore;
use crate::drill::{Drill, SPIKE_SQUARED};
use crate::exec::StepOutputs;
use crate::tail::not_updated;
use crate::trouble::{Bad, Decision};
use crate::verify::{Compared, Held};

/// What is known of weights and moments from looking at them.
#[derive(Default)]
pub(super) struct Looks {
    /// They were hashed after this step.
    at: u64,
    after: Option<Held>,
    /// The last step after which they were as they should be.
    pub(super) right: u64,
}

impl Looks {
    /// Of a state that was read with its checksums, or that is the first.
    pub(super) fn since(step: u64) -> Looks {
        Looks { right: step, ..Looks::default() }
    }
}

/// What a look at the state led to.
pub(super) enum Mended {
    /// Nothing was wrong.
    Right,
    /// It was, and is not any more: the step is to be begun again.
    Again,
    /// All ranks have gone back to a checkpoint.
    Back,
}

impl Trainer {
    /// Things that are to go wrong on purpose.
    pub fn set_drills(&mut self, drills: Vec<Drill>) {
        self.drills = drills;
    }

    /// Before a step.
    pub(super) fn drill(&mut self) -> Result<()> {
        let (now, me) = (self.step + 1, self.exec.program.rank);
        for i in 0..self.drills.len() {
            match self.drills[i].clone() {
                Drill::Nan { step } if step == now && me == 0 => self.exec.disturbance = Some(f64::NAN),
                Drill::Spike { step } if step == now && me == 0 => {
                    self.exec.disturbance = Some(SPIKE_SQUARED)
                }
                Drill::Flip { step, rank, param, bit } if step == now && rank == me => {
                    // What went wrong once does not do so when the step is done again.
                    self.drills.remove(i);
                    return self.exec.flip(&param, bit);
                }
                Drill::Slow { step, last, rank, delay } if (step..=last).contains(&now) && rank == me => {
                    std::thread::sleep(delay);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The failure of a bad step that ends the run, on record.
    pub(super) fn ends(
        &mut self,
        step: u64,
        d: &Decision,
        out: StepOutputs,
        each: &mut dyn FnMut(Event),
    ) -> Error {
        // What is summed over all ranks is found by all of them.
        (self.exec.failed_alike, self.is_whole) = (true, true);
        self.note(self.trouble(step, d, out, None, None), each);
        not_updated(step, &d.why)
    }

    fn trouble(
        &self,
        step: u64,
        d: &Decision,
        out: StepOutputs,
        skipped: Option<(u64, u64)>,
        back_to: Option<u64>,
    ) -> Record {
        let (time_us, session, why) = (now_us(), self.session, d.why.clone());
        let StepOutputs { loss, grad_norm, .. } = out;
        let (what, action) = (d.what, d.action);
        Record::Trouble { time_us, session, step, what, action, why, loss, grad_norm, skipped, back_to }
    }

    /// Judges a step that was not updated, and says what follows; an error if the run ends by it.
    pub(super) fn decide(
        &mut self,
        step: u64,
        bad: &Bad,
        out: StepOutputs,
        each: &mut dyn FnMut(Event),
    ) -> Result<Decision> {
        let d = self.watch.decide(&self.run.trouble, step, bad);
        if d.action == Action::Stop { Err(self.ends(step, &d, out, each)) } else { Ok(d) }
    }

    /// Leaves a bad step out, alone or with those since a checkpoint; collective.
    ///
    /// # Errors
    /// If there is no checkpoint to go back to, or a rank is lost.
    pub(super) fn leave_out(
        &mut self,
        d: Decision,
        out: StepOutputs,
        each: &mut dyn FnMut(Event),
    ) -> Result<()> {
        let step = self.step;
        if d.action != Action::Rollback {
            self.note(self.trouble(step, &d, out, Some((step, step)), None), each);
            return Ok(());
        }
        let spec = self.run.trouble;
        let newest = (step - 1).saturating_sub(spec.back_steps as u64);
        let Some(at) = self.go_back(newest, each)? else {
            self.step = step - 1;
            let why = format!("{}, and there is no checkpoint up to step {newest} to go back to", d.why);
            return Err(self.ends(step, &Decision { action: Action::Stop, why, ..d }, out, each));
        };
        self.watch.rolled_back(at);
        let last = (step + spec.skip_steps as u64).min(self.run.train.steps as u64);
        self.step = last;
        self.note(self.trouble(step, &d, out, Some((at + 1, last)), Some(at)), each);
        Ok(())
    }

    /// Takes weights and moments of the newest checkpoint up to step `newest`, of those that every undisturbed run of
    /// these settings has if there is one; `None` if there is none at all. Collective.
    fn go_back(&mut self, newest: u64, each: &mut dyn FnMut(Event)) -> Result<Option<u64>> {
        self.finish_saving(each);
        let mut saved = ckpt::list(&self.dir.checkpoints())?;
        saved.retain(|(step, _)| *step <= newest);
        let is_regular = |step: u64| self.run.checkpoint.every.is_some_and(|n| step.is_multiple_of(n as u64));
        // Others are of a run that was stopped there.
        saved.sort_by_key(|(step, _)| (is_regular(*step), *step));
        // All take what the first rank sees.
        let mine: Vec<u8> = saved.iter().rev().flat_map(|(step, _)| step.to_le_bytes()).collect();
        let all = self.exec.exchange(&mine)?;
        let chosen = all[0].chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap_or_default()));
        let path = |step: u64| {
            let found = saved.iter().find(|(s, _)| *s == step).map(|(_, path)| path.clone());
            // One that this rank does not see fails when it is read, on all ranks alike.
            found.unwrap_or_else(|| self.dir.checkpoints().join(format!("step-{step:08}")))
        };
        let paths: Vec<PathBuf> = chosen.map(path).collect();
        if paths.is_empty() {
            return Ok(None);
        }
        self.is_whole = false;
        let (at, _, passed) = restore(&mut self.exec, &paths, true)?;
        self.is_whole = true;
        self.looks = Looks::since(at);
        for text in passed {
            self.note(Record::Warning { time_us: now_us(), text }, each);
        }
        Ok(Some(at))
    }

    fn verifies(&self, step: u64) -> bool {
        self.run.run.verify_every.is_some_and(|n| step.is_multiple_of(n as u64))
    }

    /// Hashes weights and moments after a step and compares what ranks hold alike, if it is due.
    ///
    /// # Errors
    /// If something is other and the run is to end by it, or a rank is lost.
    pub(super) fn verify_after(&mut self, out: StepOutputs, each: &mut dyn FnMut(Event)) -> Result<Mended> {
        if !self.verifies(self.step) {
            return Ok(Mended::Right);
        }
        let began = Instant::now();
        let held = self.exec.held()?;
        let compared = self.exec.compare(&held, None)?;
        if !compared.findings.is_empty() {
            return self.mend(&held, &compared, out, each);
        }
        let own = held.own.iter().map(|(name, sum)| (name.clone(), format!("{sum:016x}"))).collect();
        self.looks = Looks { at: self.step, after: Some(held), right: self.step };
        let record = Record::Verified {
            time_us: now_us(),
            session: self.session,
            step: self.step,
            world: self.run.layout.world(),
            hash: format!("{:016x}", compared.hash),
            own,
            compared: compared.copies,
            verify_s: began.elapsed().as_secs_f64(),
        };
        self.note(record, each);
        Ok(Mended::Right)
    }

    /// Before the update of the step after a look: nobody had reason to change anything.
    ///
    /// # Errors
    /// As [`Trainer::verify_after`].
    pub(super) fn verify_before(&mut self, out: StepOutputs, each: &mut dyn FnMut(Event)) -> Result<Mended> {
        if self.looks.at != self.step || self.looks.after.is_none() {
            return Ok(Mended::Right);
        }
        let held = self.exec.held()?;
        let compared = self.exec.compare(&held, self.looks.after.take().as_ref())?;
        match compared.findings.is_empty() {
            true => Ok(Mended::Right),
            false => self.mend(&held, &compared, out, each),
        }
    }

    fn mend(
        &mut self,
        held: &Held,
        compared: &Compared,
        out: StepOutputs,
        each: &mut dyn FnMut(Event),
    ) -> Result<Mended> {
        let (step, right, policy) = (self.step, self.looks.right, self.run.trouble.on_corruption);
        let why = format!("{}; trouble.on_corruption = {}", compared.words(), policy.name());
        let d = |action, why| Decision { what: Trouble::Corruption, action, why };
        let has_peers = compared.findings.iter().all(|f| !f.peers.is_empty());
        if policy == OnCorruption::Restore && has_peers {
            self.is_whole = false;
            self.exec.mend(held, &compared.findings)?;
            self.is_whole = true;
            self.looks = Looks::since(right);
            self.note(self.trouble(step, &d(Action::Restore, why), out, None, None), each);
            return Ok(Mended::Again);
        }
        if policy != OnCorruption::Stop
            && let Some(at) = self.go_back(right, each)?
        {
            self.watch.back_to(at);
            self.note(self.trouble(step, &d(Action::Rollback, why), out, None, Some(at)), each);
            // The steps since are done again: what they drew before does not count.
            let began = self.exec.exchange(&now_us().to_le_bytes())?;
            self.session = began[0].as_slice().try_into().map_or(0, u64::from_le_bytes);
            // What follows is another history: copies of the two do not mix.
            self.era = self.session;
            (self.step, self.owes) = (at, false);
            self.keep_copies()?;
            return Ok(Mended::Back);
        }
        (self.exec.failed_alike, self.is_whole) = (true, true);
        self.note(self.trouble(step, &d(Action::Stop, why), out, None, None), each);
        Err(Error::failure(format!("step {step}: {}", compared.words())).hint(format!(
            "take the machine of that rank out of service, or test its memory; checkpoints up to step {right} were \
             compared before, later ones may hold it: move them away and start again; trouble.on_corruption=restore \
             goes on by itself"
        )))
    }
}
