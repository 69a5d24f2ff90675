use std::collections::BTreeMap;

use serde::Serialize;
use spec::random::SplitMix;

/// What is done to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A rank is killed (SIGKILL).
    KillRank,
    /// An agent, the process that started ranks, is killed: of several one that does not host the job's store.
    KillAgent,
    /// Of several agents the one that hosts the job's store is killed.
    KillHost,
    /// A rank is stopped (SIGSTOP): it lives and says nothing.
    StopRank,
    /// The job is asked to end (SIGTERM), as by a batch system that takes the machine back.
    Preempt,
    /// A connection between two ranks is broken, and both are told.
    CutLink,
    /// What two ranks say to each other goes nowhere, and nobody is told.
    SilentLink,
    /// What two ranks say to each other is late, for some steps.
    SlowLink,
    /// The clock of all ranks jumps, by up to a day, forward or back.
    ClockJump,
    /// The directory of checkpoints is gone for some steps, as a file system that is not there.
    NoStorage,
    /// The checkpoints' disk is full for some steps, in the middle of a save.
    FullDisk,
    /// The checkpoints' disk can only be read for some steps.
    ReadOnlyDisk,
    /// A rank is killed while a checkpoint is written.
    KillInSave,
    /// All ranks are killed, and the newest checkpoint is cut short.
    TornCheckpoint,
    /// All ranks are killed, and a byte of the newest checkpoint is another.
    BitFlip,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 15] = [
        Kind::KillRank,
        Kind::KillAgent,
        Kind::KillHost,
        Kind::StopRank,
        Kind::Preempt,
        Kind::CutLink,
        Kind::SilentLink,
        Kind::SlowLink,
        Kind::ClockJump,
        Kind::NoStorage,
        Kind::FullDisk,
        Kind::ReadOnlyDisk,
        Kind::KillInSave,
        Kind::TornCheckpoint,
        Kind::BitFlip,
    ];

    /// Whether it can happen to a job of such a layout.
    pub(crate) fn suits(self, layout: Layout) -> bool {
        match self {
            Kind::KillHost => layout.nodes > 1,
            Kind::CutLink | Kind::SilentLink | Kind::SlowLink => {
                layout.ranks > 1 && layout.transport == "tcp"
            }
            _ => true,
        }
    }

    /// Whether it needs a disk of its own.
    pub(crate) fn needs_disk(self) -> bool {
        matches!(self, Kind::FullDisk | Kind::ReadOnlyDisk)
    }

    /// What a job of such a layout does about it.
    pub(crate) fn outcome(self, layout: Layout) -> Outcome {
        match self {
            Kind::NoStorage | Kind::FullDisk | Kind::ReadOnlyDisk | Kind::SlowLink | Kind::ClockJump => {
                Outcome::GoesOn
            }
            Kind::CutLink | Kind::SilentLink => Outcome::MeetsAgain,
            Kind::KillRank | Kind::StopRank | Kind::KillInSave if layout.ranks > 1 => Outcome::MeetsAgain,
            Kind::KillHost => Outcome::MeetsAgain,
            Kind::KillAgent if layout.nodes > 1 => Outcome::MeetsAgain,
            _ => Outcome::Ends,
        }
    }
}

/// What becomes of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nobody is lost.
    GoesOn,
    /// Ranks meet again in the same job.
    MeetsAgain,
    /// It is started once more.
    Ends,
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
    /// Agents, each with as many ranks.
    pub(crate) nodes: usize,
    pub(crate) keys: &'static [&'static str],
    pub(crate) transport: &'static str,
}

/// Layouts of the small model with eight sequences a batch, from one rank to eight.
const LAYOUTS: [Layout; 13] = [
    layout(4, 1, &["layout.dp=4"], "shm"),
    layout(4, 1, &["layout.dp=2", "layout.pp=2"], "shm"),
    layout(4, 1, &["layout.dp=4", "layout.zero=3"], "tcp"),
    layout(2, 1, &["layout.dp=2", "layout.zero=1"], "shm"),
    layout(2, 1, &["layout.pp=2", "layout.micro_batch=2"], "tcp"),
    layout(1, 1, &["layout.micro_batch=4"], "shm"),
    layout(4, 1, &["layout.dp=4", "layout.zero=2"], "shm"),
    layout(8, 1, &["layout.dp=8", "layout.zero=1"], "shm"),
    layout(8, 1, &["layout.dp=4", "layout.pp=2"], "tcp"),
    layout(2, 2, &["layout.dp=2"], "tcp"),
    layout(4, 2, &["layout.dp=4", "layout.zero=1"], "tcp"),
    layout(4, 2, &["layout.dp=2", "layout.pp=2"], "shm"),
    layout(8, 2, &["layout.dp=4", "layout.pp=2", "layout.zero=2"], "tcp"),
];

const fn layout(
    ranks: usize,
    nodes: usize,
    keys: &'static [&'static str],
    transport: &'static str,
) -> Layout {
    Layout { ranks, nodes, keys, transport }
}

/// The layout that `choice` picks among those of at most `ranks` ranks that `suits` takes.
pub(crate) fn pick(choice: u64, ranks: usize, suits: impl Fn(Layout) -> bool) -> Option<Layout> {
    let allowed: Vec<Layout> = LAYOUTS.into_iter().filter(|l| l.ranks <= ranks.max(1) && suits(*l)).collect();
    let at = choice.checked_rem(allowed.len() as u64)?;
    allowed.get(at as usize).copied()
}

/// The layout that needs nobody else.
pub(crate) const ALONE: Layout = layout(1, 1, &["layout.micro_batch=4"], "shm");

/// The first `count` faults of a seed among `kinds`: the same whenever they are asked for, and each kind as often as any
/// other.
pub fn faults(seed: u64, count: usize, kinds: &[Kind]) -> Vec<Fault> {
    let mut random = SplitMix(seed);
    let mut left: Vec<Kind> = Vec::new();
    (0..count)
        .map(|_| {
            if left.is_empty() {
                left = kinds.to_vec();
            }
            let kind = left.swap_remove((random.draw() % left.len() as u64) as usize);
            Fault { kind, after_steps: 1 + random.draw() % 8, victim: random.draw(), layout: random.draw() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_faults_and_all_kinds() {
        let of = |seed, count| faults(seed, count, &Kind::ALL);
        assert_eq!(of(7, 20)[..12], of(7, 12));
        assert_ne!(of(7, 12), of(8, 12));
        let count = by_kind(&of(3, Kind::ALL.len() * 9));
        assert_eq!(count.len(), Kind::ALL.len());
        assert!(count.values().all(|n| *n == 9), "{count:?}");
    }

    #[test]
    fn layouts_keep_to_the_ranks_there_are_and_suit() {
        for ranks in 0..10 {
            let picked = (0..100).filter_map(|choice| pick(choice, ranks, |_| true));
            assert!(picked.map(|l| l.ranks).max() <= Some(ranks.max(1)), "{ranks}");
        }
        for kind in Kind::ALL {
            let suits = |l| kind.suits(l);
            assert!(pick(5, 2, suits).is_some_and(suits), "{kind:?}: two ranks are enough for each");
            let alone = pick(5, 1, suits).is_some();
            let wants_others =
                [Kind::KillHost, Kind::CutLink, Kind::SilentLink, Kind::SlowLink].contains(&kind);
            assert_eq!(alone, !wants_others, "{kind:?}");
        }
    }
}
