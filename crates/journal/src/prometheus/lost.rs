//! Where a run's seconds went: those that count, and the others by cause.

use std::collections::BTreeMap;

use crate::record::{Record, Step};

/// Checkpoints remembered to go back to: more than anybody keeps between two failures.
const MARKS_MAX: usize = 256;

#[derive(Clone, Debug, Default)]
pub(super) struct Lost {
    pub(super) seconds: BTreeMap<&'static str, f64>,
    pub(super) restarts: BTreeMap<&'static str, u64>,
    pub(super) steps_redone: u64,
    /// Seconds of steps that count.
    useful_s: f64,
    /// The same when a checkpoint of a step was committed.
    useful_at: BTreeMap<u64, f64>,
    first_us: Option<u64>,
    last_us: u64,
    step: u64,
    /// How the latest start ended; none while it goes on, or if nobody had the time to say.
    ended: Option<&'static str>,
    /// When the latest start was, until its first step.
    started_us: Option<u64>,
}

impl Lost {
    pub(super) fn observe(&mut self, record: &Record) {
        match record {
            Record::RunStarted { time_us, .. } => {
                if self.first_us.is_some() {
                    *self.restarts.entry(self.ended.unwrap_or("killed")).or_default() += 1;
                    self.lose("down", seconds(self.last_us, *time_us));
                }
                self.ended = None;
                self.started_us = Some(*time_us);
            }
            Record::Resumed { step, .. }
            | Record::Recovered { step, .. }
            | Record::Trouble { back_to: Some(step), .. } => {
                if let Record::Recovered { recovery_s, .. } = record {
                    self.lose("recovery", *recovery_s);
                }
                let before = self.useful_at.range(..=step).next_back().map_or(0.0, |(_, s)| *s);
                // Where the checkpoint is not among those remembered, nothing is said rather than too much.
                if self.step > *step && (*step == 0 || self.useful_at.contains_key(step)) {
                    self.lose("redone", (self.useful_s - before).max(0.0));
                    self.useful_s = before;
                }
                self.steps_redone += self.step.saturating_sub(*step);
                self.step = *step;
                self.useful_at.split_off(&step.saturating_add(1));
            }
            Record::Step(Step { time_us, step, step_s, .. }) => {
                let step_s = if step_s.is_finite() { *step_s } else { 0.0 };
                if let Some(started_us) = self.started_us.take() {
                    self.lose("start", (seconds(started_us, *time_us) - step_s).max(0.0));
                }
                self.useful_s += step_s;
                self.step = *step;
            }
            Record::Checkpoint { step, save_s, stall_s, .. } => {
                self.lose("checkpoint", stall_s.unwrap_or(*save_s).max(0.0));
                self.useful_at.insert(*step, self.useful_s);
                if self.useful_at.len() > MARKS_MAX {
                    self.useful_at.pop_first();
                }
            }
            Record::Finished { reason, .. } => {
                self.ended = Some(if reason.starts_with("stopped") { "stopped" } else { "finished" });
            }
            Record::Failed { .. } => self.ended = Some("failed"),
            _ => {}
        }
        if let Some(time_us) = record.time_us() {
            self.first_us.get_or_insert(time_us);
            self.last_us = self.last_us.max(time_us);
        }
    }

    pub(super) fn goodput(&self) -> Option<f64> {
        let all = seconds(self.first_us?, self.last_us);
        (all > 0.0).then(|| (self.useful_s / all).min(1.0))
    }

    fn lose(&mut self, cause: &'static str, seconds: f64) {
        *self.seconds.entry(cause).or_default() += seconds;
    }
}

fn seconds(from_us: u64, to_us: u64) -> f64 {
    to_us.saturating_sub(from_us) as f64 / 1e6
}
