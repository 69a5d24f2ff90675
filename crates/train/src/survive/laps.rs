//! Where the time between a loss and the next step goes.

use std::time::Instant;

/// Seconds by phase, in the order in which the phases first came. A phase that comes again adds to its own.
#[derive(Debug)]
pub(crate) struct Laps {
    since: Instant,
    phases: Vec<(&'static str, f64)>,
    /// Seconds until the loss was known, before all phases; of the first loss, if another follows on the way.
    pub(crate) detection_s: Option<f64>,
}

impl Laps {
    pub(crate) fn begin(detection_s: Option<f64>) -> Laps {
        Laps { since: Instant::now(), phases: Vec::new(), detection_s }
    }

    /// What was done since the last call was `phase`.
    pub(crate) fn lap(&mut self, phase: &'static str) {
        let now = Instant::now();
        let took_s = (now - std::mem::replace(&mut self.since, now)).as_secs_f64();
        match self.phases.iter_mut().find(|(name, _)| *name == phase) {
            Some((_, seconds)) => *seconds += took_s,
            None => self.phases.push((phase, took_s)),
        }
    }

    /// All phases so far, for the journal.
    pub(crate) fn phases(&self) -> Vec<(String, f64)> {
        self.phases.iter().map(|(name, seconds)| ((*name).to_owned(), *seconds)).collect()
    }

    /// Seconds of all phases together.
    pub(crate) fn total_s(&self) -> f64 {
        self.phases.iter().map(|(_, seconds)| seconds).sum()
    }
}
