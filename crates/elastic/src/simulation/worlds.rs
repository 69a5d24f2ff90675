//! Ranks that meet and step, as far as agents see it.

use core::time::Duration;
use std::collections::BTreeMap;

/// Ranks wait for each other so long, in a world and before it.
const PATIENCE: Duration = Duration::from_secs(8);

/// One process of a worker.
pub(super) type WorkerId = u64;

/// What became of a process, as the world sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Health {
    Well,
    /// Neither works nor beats.
    Stopped,
    /// Beats without working.
    Hung,
}

#[derive(Debug)]
struct World {
    size: usize,
    ranks: BTreeMap<usize, WorkerId>,
    /// Why no step is done in it any more.
    failed: Option<String>,
    steps: u64,
    /// Since when its ranks wait for one.
    waits_since: Option<Duration>,
    last_step: Option<Duration>,
}

/// All worlds, by round: two with one number would be one here, and be noticed.
pub(super) struct Worlds {
    worlds: BTreeMap<u64, World>,
    health: BTreeMap<WorkerId, Health>,
    /// The job is done after so many steps in all.
    target: u64,
    done: u64,
    rules: Vec<(bool, String)>,
}

impl Worlds {
    pub(super) fn new(target: u64) -> Worlds {
        let (worlds, health, rules) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Worlds { worlds, health, target, done: 0, rules }
    }

    /// A process was started.
    pub(super) fn start(&mut self, id: WorkerId) {
        self.health.insert(id, Health::Well);
    }

    /// A process joins the world of a round.
    pub(super) fn join(&mut self, round: u64, size: usize, rank: usize, id: WorkerId, now: Duration) {
        let world = self.worlds.entry(round).or_insert_with(|| World {
            size,
            ranks: BTreeMap::new(),
            failed: None,
            steps: 0,
            waits_since: Some(now),
            last_step: None,
        });
        let (there, other) = (world.size, world.ranks.get(&rank).copied());
        if there != size {
            self.rules.push((false, format!("round {round} has worlds of {there} and of {size} ranks")));
        }
        if let Some(other) = other.filter(|o| *o != id && self.health.contains_key(o)) {
            self.rules.push((false, format!("rank {rank} of round {round} is held by {other} and by {id}")));
        }
        world.ranks.insert(rank, id);
    }

    /// A process leaves its world for another, or dies.
    pub(super) fn leave(&mut self, round: u64, id: WorkerId, why: &str) {
        let Some(world) = self.worlds.get_mut(&round) else { return };
        if world.ranks.values().any(|i| *i == id) {
            world.failed.get_or_insert_with(|| why.to_owned());
        }
    }

    pub(super) fn die(&mut self, id: WorkerId) {
        self.health.remove(&id);
        for world in self.worlds.values_mut().filter(|w| w.ranks.values().any(|i| *i == id)) {
            world.failed.get_or_insert_with(|| format!("worker {id} was lost"));
        }
    }

    pub(super) fn set(&mut self, id: WorkerId, health: Health) {
        if let Some(h) = self.health.get_mut(&id).filter(|h| **h == Health::Well) {
            *h = health;
        }
    }

    /// `None` for a process that is gone.
    pub(super) fn health(&self, id: WorkerId) -> Option<Health> {
        self.health.get(&id).copied()
    }

    /// A link breaks while everybody lives.
    pub(super) fn cut(&mut self, round: u64) {
        if let Some(world) = self.worlds.get_mut(&round) {
            world.failed.get_or_insert_with(|| "a link was cut".to_owned());
        }
    }

    /// Why the world of a round has failed, if it has.
    pub(super) fn failed(&self, round: u64) -> Option<String> {
        self.worlds.get(&round).and_then(|w| w.failed.clone())
    }

    pub(super) fn steps(&self, round: u64) -> u64 {
        self.worlds.get(&round).map_or(0, |w| w.steps)
    }

    pub(super) fn last_step(&self, round: u64) -> Option<Duration> {
        self.worlds.get(&round).filter(|w| w.failed.is_none()).and_then(|w| w.last_step)
    }

    /// Whether the ranks of a round wait for one of them.
    pub(super) fn waits(&self, round: u64) -> bool {
        self.worlds.get(&round).is_some_and(|w| w.waits_since.is_some())
    }

    pub(super) fn is_done(&self) -> bool {
        self.done >= self.target
    }

    /// A step of every world that can; the rounds of those.
    pub(super) fn tick(&mut self, now: Duration) -> Vec<u64> {
        let mut stepping = Vec::new();
        for (round, world) in self.worlds.iter_mut().filter(|(_, w)| w.failed.is_none()) {
            let complete = world.ranks.len() == world.size;
            if complete && world.ranks.values().all(|id| self.health.get(id) == Some(&Health::Well)) {
                (world.waits_since, world.last_step) = (None, Some(now));
                world.steps += 1;
                self.done += 1;
                stepping.push(*round);
            } else if now.saturating_sub(*world.waits_since.get_or_insert(now)) >= PATIENCE {
                world.failed = Some("a rank was waited for in vain".to_owned());
            }
        }
        stepping
    }

    /// Rules that were looked at since the last call.
    pub(super) fn stories(&mut self) -> Vec<(bool, String)> {
        std::mem::take(&mut self.rules)
    }
}
