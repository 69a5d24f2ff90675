//! What each rank does lately, and who keeps the others waiting.

use std::collections::BTreeMap;

use journal::{Record, Step};
use serde::Serialize;

/// Weight of the newest step in the means of a rank: some sixteen steps are remembered.
const NEWEST: f64 = 1.0 / 16.0;

/// A rank that computes so much longer than the middle one is named.
const SLOW: f64 = 1.1;

/// One rank, by the newest records of its journal.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Rank {
    /// Which.
    pub rank: usize,
    /// Where.
    pub host: String,
    /// On what.
    pub device: String,
    /// Steps done.
    pub step: u64,
    /// When its last record was written, in microseconds since the Unix epoch.
    pub time_us: u64,
    /// Seconds of a step, a mean over the last ones.
    pub step_s: f64,
    /// Of those, what it waited for others without computing.
    pub wait_s: f64,
    /// The same by axis of the mesh, where the journal says so.
    pub waits_s: BTreeMap<String, f64>,
    /// Bytes that its program placed.
    pub memory_bytes: u64,
    /// The last of its steps whose ops were recorded, newest last: ranks are a step apart now and then.
    #[serde(skip)]
    pub spans: Vec<SpansAt>,
    #[serde(skip)]
    steps: u64,
}

/// Where a rank's ops of a step lie in its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpansAt {
    /// The step.
    pub step: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl Rank {
    /// Nothing known yet.
    pub fn new(rank: usize) -> Rank {
        Rank { rank, ..Rank::default() }
    }

    /// Takes over what its journal says.
    pub fn observe(&mut self, record: &Record) {
        if let Some(time_us) = record.time_us() {
            self.time_us = time_us;
        }
        match record {
            Record::RunStarted { host, device, .. } => {
                self.host.clone_from(host);
                self.device.clone_from(device);
                // Means begin anew: the layout may be another.
                self.steps = 0;
                self.waits_s.clear();
            }
            Record::Step(Step { step, step_s, exposed_comm_s, waits_s, memory_bytes, .. }) => {
                self.step = *step;
                self.memory_bytes = *memory_bytes;
                self.steps += 1;
                // The first steps weigh alike, so that the very first does not stay.
                let weight = NEWEST.max(1.0 / self.steps as f64);
                mix(&mut self.step_s, *step_s, weight);
                mix(&mut self.wait_s, exposed_comm_s.unwrap_or(0.0), weight);
                for (axis, s) in waits_s {
                    mix(self.waits_s.entry(axis.clone()).or_insert(*s), *s, weight);
                }
            }
            _ => {}
        }
    }

    /// Remembers where ops of a step lie.
    pub(crate) fn observe_spans(&mut self, at: SpansAt) {
        const STEPS_MAX: usize = 3;
        if self.spans.len() == STEPS_MAX {
            self.spans.remove(0);
        }
        self.spans.push(at);
    }

    /// Seconds of a step in which it did not wait.
    pub fn busy_s(&self) -> f64 {
        (self.step_s - self.wait_s).max(0.0)
    }
}

fn mix(mean: &mut f64, value: f64, weight: f64) {
    if value.is_finite() {
        *mean += weight * (value - *mean);
    }
}

/// A rank that others wait for, and why it is taken for one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Straggler {
    /// Which.
    pub rank: usize,
    /// Its seconds of a step without waiting, over those of the middle rank.
    pub factor: f64,
    /// In a sentence.
    pub why: String,
}

/// Ranks that take longer than others for what they do themselves, slowest first.
///
/// ```
/// use dash::ranks::{Rank, stragglers};
/// let mut ranks: Vec<Rank> = (0..4).map(Rank::new).collect();
/// ranks.iter_mut().for_each(|r| r.step_s = if r.rank == 2 { 1.5 } else { 1.0 });
/// let found = stragglers(ranks.iter());
/// assert_eq!((found.len(), found[0].rank, found[0].factor), (1, 2, 1.5));
/// ```
pub fn stragglers<'a>(ranks: impl Iterator<Item = &'a Rank>) -> Vec<Straggler> {
    let mut busy: Vec<(usize, f64)> = ranks.map(|r| (r.rank, r.busy_s())).filter(|(_, s)| *s > 0.0).collect();
    busy.sort_by(|a, b| a.1.total_cmp(&b.1));
    // Of two, the faster is what the slower could be.
    let Some(&(_, middle)) = busy.get(busy.len().saturating_sub(1) / 2) else { return Vec::new() };
    let slow = busy.iter().rev().take_while(|(_, s)| *s > SLOW * middle);
    slow.map(|&(rank, s)| Straggler {
        rank,
        factor: s / middle,
        why: format!(
            "computes {:.1} ms of a step, the middle rank {:.1} ms: the others wait for it",
            1e3 * s,
            1e3 * middle
        ),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(n: u64, took_s: f64, waited_s: f64) -> Record {
        Record::Step(Step {
            time_us: n,
            step: n,
            loss: 1.0,
            grad_norm: 1.0,
            lr: 1.0,
            tokens: 1,
            valid_tokens: 1,
            tokens_per_s: 1.0,
            step_s: took_s,
            memory_bytes: 7,
            exposed_comm_s: Some(waited_s),
            waits_s: BTreeMap::from([("dp".to_owned(), waited_s)]),
            ..Step::default()
        })
    }

    #[test]
    fn who_waits_least_is_waited_for() {
        let ranks: Vec<Rank> = (0..4)
            .map(|rank| {
                let mut r = Rank::new(rank);
                (1..=20).for_each(|n| r.observe(&step(n, 1.0, if rank == 2 { 0.0 } else { 0.4 })));
                r
            })
            .collect();
        let found = stragglers(ranks.iter());
        assert_eq!(found.iter().map(|s| s.rank).collect::<Vec<_>>(), [2]);
        assert!((found[0].factor - 1.0 / 0.6).abs() < 1e-9, "{found:?}");
        assert!((ranks[0].waits_s["dp"] - 0.4).abs() < 1e-12);
    }

    #[test]
    fn equal_ranks_and_none_are_no_stragglers() {
        assert_eq!(stragglers([].iter()), []);
        let alone = Rank { step_s: 1.0, ..Rank::new(0) };
        assert_eq!(stragglers([alone.clone()].iter()), []);
        let other = Rank { step_s: 1.05, ..Rank::new(1) };
        assert_eq!(stragglers([alone, other].iter()), []);
    }
}
