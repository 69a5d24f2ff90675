//! Evaluation of the held-out split.

use journal::Record;
use spec::Result;

use super::{Event, Trainer, load, now_us};

impl Trainer {
    /// Why the run is not evaluated although it should be.
    pub(super) fn why_no_evaluation(&self) -> Option<String> {
        self.run.train.eval_every?;
        let why = match &self.streams.valid {
            None => self.streams.valid_missing.clone()?,
            Some(valid) if valid.len() < self.run.batch.sequences as u64 => {
                format!(
                    "the validation split holds {} samples, a batch {}",
                    valid.len(),
                    self.run.batch.sequences
                )
            }
            Some(_) => return None,
        };
        Some(format!("no evaluation: {why}"))
    }

    /// The mean loss of the validation split, of the weights and of their average.
    pub(super) fn evaluate(&mut self, each: &mut dyn FnMut(Event)) -> Result<()> {
        let Some(valid) = &self.streams.valid else { return Ok(()) };
        let sequences = self.run.batch.sequences as u64;
        let batches = (valid.len() / sequences).min(self.run.train.eval_batches as u64);
        if batches == 0 {
            return Ok(());
        }
        let tokens = batches * sequences * self.run.batch.sequence as u64;
        let loss = self.loss_sum(batches)? / tokens as f64;
        let mut average_loss = None;
        if self.exec.program.average.is_some() {
            // Who loses another rank meanwhile has other weights in their place.
            self.is_whole = false;
            self.exec.swap_average()?;
            average_loss = Some(self.loss_sum(batches)? / tokens as f64);
            self.exec.swap_average()?;
            self.is_whole = true;
        }
        let record = Record::Eval { time_us: now_us(), step: self.step, loss, average_loss, tokens };
        self.note(record, each);
        Ok(())
    }

    /// The sum of the losses of all tokens of so many full batches of the validation split.
    fn loss_sum(&mut self, batches: u64) -> Result<f64> {
        let Some(valid) = &self.streams.valid else { return Ok(0.0) };
        let full = self.run.batch.sequences;
        self.exec.resize(&self.run, full)?;
        let mut sum = 0.0;
        for b in 0..batches {
            load(&mut self.exec, valid.as_ref(), b * full as u64, &mut self.sample)?;
            sum += self.exec.evaluate()?;
        }
        Ok(sum)
    }
}
