use std::collections::BTreeMap;

use serde::Serialize;
use spec::random::{GOLDEN, scatter};

/// What is done to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A rank is killed (SIGKILL).
    KillRank,
    /// The process that started the ranks is killed.
    KillAgent,
    /// A rank is stopped (SIGSTOP): it lives and says nothing.
    StopRank,
    /// The job is asked to end (SIGTERM), as by a batch system that takes the machine back.
    Preempt,
    /// The directory of checkpoints is gone for some steps, as a file system that is not there.
    NoStorage,
    /// All ranks are killed, and the newest checkpoint is cut short.
    TornCheckpoint,
    /// All ranks are killed, and a byte of the newest checkpoint is another.
    BitFlip,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::KillRank,
        Kind::KillAgent,
        Kind::StopRank,
        Kind::Preempt,
        Kind::NoStorage,
        Kind::TornCheckpoint,
        Kind::BitFlip,
    ];

    /// Whether a job of so many ranks goes on by itself.
    pub(crate) fn is_survived(self, ranks: usize) -> bool {
        match self {
            Kind::NoStorage => true,
            Kind::KillRank | Kind::StopRank => ranks > 1,
            Kind::KillAgent | Kind::Preempt | Kind::TornCheckpoint | Kind::BitFlip => false,
        }
    }
}

/// One disturbance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is done.
    pub kind: Kind,
    /// After how many steps of the session that it meets.
    pub after_steps: u64,
    /// Chooses the rank, of however many there are then, and the byte.
    pub victim: u64,
    /// Chooses the layout of the session that follows.
    pub layout: u64,
}

/// Ranks and layout of a session. All lead to the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) ranks: usize,
    pub(crate) keys: &'static [&'static str],
    pub(crate) transport: &'static str,
}

/// Layouts of the small model with eight sequences a batch, from one rank to eight.
const LAYOUTS: [Layout; 9] = [
    layout(4, &["layout.dp=4"], "shm"),
    layout(4, &["layout.dp=2", "layout.pp=2"], "shm"),
    layout(4, &["layout.dp=4", "layout.zero=3"], "tcp"),
    layout(2, &["layout.dp=2", "layout.zero=1"], "shm"),
    layout(2, &["layout.pp=2", "layout.micro_batch=2"], "tcp"),
    layout(1, &["layout.micro_batch=4"], "shm"),
    layout(4, &["layout.dp=4", "layout.zero=2"], "shm"),
    layout(8, &["layout.dp=8", "layout.zero=1"], "shm"),
    layout(8, &["layout.dp=4", "layout.pp=2"], "tcp"),
];

const fn layout(ranks: usize, keys: &'static [&'static str], transport: &'static str) -> Layout {
    Layout { ranks, keys, transport }
}

/// The layout that `choice` picks among those of at most `ranks` ranks.
pub(crate) fn pick(choice: u64, ranks: usize) -> Layout {
    let allowed: Vec<Layout> = LAYOUTS.into_iter().filter(|l| l.ranks <= ranks.max(1)).collect();
    allowed[(choice % allowed.len() as u64) as usize]
}

/// The first `count` faults of a seed: the same whenever they are asked for, and each kind as often as any other.
pub fn faults(seed: u64, count: usize) -> Vec<Fault> {
    let mut random = SplitMix(seed);
    let mut kinds: Vec<Kind> = Vec::new();
    (0..count)
        .map(|_| {
            if kinds.is_empty() {
                kinds = Kind::ALL.to_vec();
            }
            let kind = kinds.swap_remove((random.next() % kinds.len() as u64) as usize);
            Fault { kind, after_steps: 1 + random.next() % 8, victim: random.next(), layout: random.next() }
        })
        .collect()
}

/// How often each kind occurs.
pub(crate) fn by_kind(faults: &[Fault]) -> BTreeMap<Kind, usize> {
    let mut count = BTreeMap::new();
    for fault in faults {
        *count.entry(fault.kind).or_default() += 1;
    }
    count
}

/// SplitMix64.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        scatter(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_faults_and_all_kinds() {
        assert_eq!(faults(7, 20)[..12], faults(7, 12));
        assert_ne!(faults(7, 12), faults(8, 12));
        let count = by_kind(&faults(3, 7 * 9));
        assert_eq!(count.len(), Kind::ALL.len());
        assert!(count.values().all(|n| *n == 9), "{count:?}");
    }

    #[test]
    fn layouts_keep_to_the_ranks_there_are() {
        for ranks in 0..10 {
            let widest = (0..100).map(|choice| pick(choice, ranks).ranks).max();
            assert!(widest <= Some(ranks.max(1)), "{ranks}");
        }
    }
}
