//! One step of the loop, from its samples to its record.

use std::time::Instant;

use journal::Record;
use spec::{Result, RunSpec};

use super::trouble::Mended;
use super::{Drawn, Event, Pace, Trainer, load_step};
use crate::exec::{StepInputs, StepOutputs};
use crate::host::now_us;
use crate::saving::Saving;
use crate::trouble::Decision;

/// A step that was done.
pub(super) struct Done {
    pub(super) record: Record,
    pub(super) step_s: f64,
    pub(super) outputs: StepOutputs,
    /// What follows from it, if it was bad.
    pub(super) decision: Option<Decision>,
}

impl Trainer {
    /// What a step leads to beside what is due after it; `false` if the next turn begins from there.
    pub(super) fn follow_up(
        &mut self,
        decision: Option<Decision>,
        out: StepOutputs,
        pace: &mut Pace,
        each: &mut dyn FnMut(Event),
    ) -> Result<bool> {
        let step = self.step;
        if let Some(decision) = decision {
            self.leave_out(decision, out, each)?;
        }
        let goes_on = match self.verify_after(out, each)? {
            // What was mended after the step is right from now on.
            Mended::Right | Mended::Again => true,
            Mended::Back => false,
        };
        if self.step != step {
            *pace = Pace::new(self.step);
        }
        Ok(goes_on)
    }

    /// Does the next step; `None` if all ranks have gone back instead.
    pub(super) fn one_step(&mut self, stop: bool, each: &mut dyn FnMut(Event)) -> Result<Option<Done>> {
        let mut is_told = false;
        loop {
            let start = Instant::now();
            let step = self.step + 1;
            let drawn = self.begin_step()?;
            // Once the others have this rank's gradients they can go on from the step without it.
            if !std::mem::replace(&mut is_told, true) {
                self.write_only(&drawn.record(self.session, step), each);
            }
            let inputs = self.inputs(step, stop);
            let limits = self.watch.limits(&self.run.trouble);
            let (out, bad) = self.exec.attempt(&inputs, &limits)?;
            match self.verify_before(out, each)? {
                Mended::Right => {}
                Mended::Again => continue,
                Mended::Back => return Ok(None),
            }
            let decision = match &bad {
                Some(bad) => Some(self.decide(step, bad, out, each)?),
                None => {
                    self.is_whole = false;
                    self.exec.update_weights(&inputs, &out)?;
                    self.watch.good(&self.run.trouble, step, out.loss, out.grad_norm);
                    None
                }
            };
            (self.step, self.is_whole) = (step, true);
            let step_s = start.elapsed().as_secs_f64();
            let record = self.step_record(out, step_s)?;
            return Ok(Some(Done { record, step_s, outputs: out, decision }));
        }
    }

    /// Loads the batch of the next step, and lets go wrong what is to go wrong in it.
    fn begin_step(&mut self) -> Result<Drawn> {
        let stream = self.streams.train.as_ref();
        let drawn = load_step(&mut self.exec, &self.run, stream, self.step, &mut self.sample)?;
        self.drill().map(|()| drawn)
    }

    fn inputs(&self, step: u64, stop: bool) -> StepInputs {
        step_inputs(&self.run, step, stop, self.saving.as_ref().is_some_and(Saving::is_written))
    }

    /// What the step that was done last was.
    fn step_record(&mut self, out: StepOutputs, step_s: f64) -> Result<Record> {
        let (step, batch) = (self.step, &self.run.batch);
        let (tokens, sequence) = (batch.tokens_after(step - 1), batch.sequence as u64);
        let lr = self.run.lr_at(step as usize);
        let tokens_per_s = tokens as f64 / step_s;
        let flops_per_s = self.run.model.flops_per_token(batch.sequence) * tokens_per_s;
        let each_flops_per_s = flops_per_s / self.run.layout.world() as f64;
        let mfu = self.peak.as_mut().map(|peak| peak.share(each_flops_per_s));
        Ok(Record::Step(journal::Step {
            time_us: now_us(),
            step,
            loss: out.loss,
            grad_norm: out.grad_norm,
            mtp_loss: out.mtp_loss,
            lr,
            tokens: batch.samples_before(step) * sequence,
            valid_tokens: tokens,
            tokens_per_s,
            mfu,
            step_s,
            memory_bytes: self.exec.program.memory.total as u64,
            exposed_comm_s: (self.run.layout.world() > 1).then(|| self.exec.exposed_comm_s()),
            waits_s: self.exec.waits_s().map(|(axis, s)| (axis.to_owned(), s)).collect(),
            expert_counts: self.exec.expert_counts()?.map(|all| by_layer(&all, self.run.model.all_layers())),
        }))
    }
}

/// What a run gives to its step `step`.
pub(crate) fn step_inputs(run: &RunSpec, step: u64, stop: bool, saved: bool) -> StepInputs {
    let optim = &run.optim;
    StepInputs {
        valid_tokens: run.batch.tokens_after(step - 1),
        lr: run.lr_at(step as usize),
        step,
        beta1: optim.beta1,
        beta2: optim.beta2,
        eps: optim.eps,
        weight_decay: optim.weight_decay,
        momentum: optim.momentum,
        ema: run.train.ema,
        seed: run.train.seed,
        clip: optim.grad_clip,
        stop,
        saved,
    }
}

/// Counts of experts, layer by layer: none of a layer that has no experts.
fn by_layer(all: &[f64], layers: usize) -> Vec<Vec<u64>> {
    let of_layer = |counts: &[f64]| match counts.iter().all(|c| *c == 0.0) {
        true => Vec::new(),
        false => counts.iter().map(|c| *c as u64).collect(),
    };
    all.chunks((all.len() / layers.max(1)).max(1)).map(of_layer).collect()
}
