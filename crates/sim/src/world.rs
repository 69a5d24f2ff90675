//! The ranks of a step and the links between them, folded: ranks that cannot be told apart are one class.

mod colour;
mod paths;
mod storage;

use std::collections::BTreeMap;

use plan::estimate::parts::StepParts;
use plan::network::Extent;
use spec::Cluster;

use crate::clock::{Speed, Ticks, USUAL};
use crate::jitter::Jitter;
use crate::mesh::{AXES, Axis, RankGrid};
use paths::Fabric;
pub(crate) use paths::Path;
use storage::Storage;
pub use storage::StorageUse;

/// What sets a rank apart from others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// Its kernels' speed in millionths of the usual.
    pub speed: Speed,
    /// Its port's rate between nodes, likewise.
    pub port: u64,
    /// Its links' rate inside the node, likewise.
    pub domain: u64,
    /// Times at which its kernels run at another speed.
    pub windows: Vec<Window>,
    /// Its port comes and goes.
    pub flap: Option<Flap>,
    /// Its kernels vary, each for itself.
    pub jitter: Vec<Jitter>,
}

/// From a moment to another kernels run at so many millionths of their speed; 0 is a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Window {
    /// From here on.
    pub from: Ticks,
    /// Until here.
    pub to: Ticks,
    /// The speed meanwhile.
    pub speed: Speed,
}

/// Again and again a port carries only so many millionths of its rate for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flap {
    /// The first time.
    pub from: Ticks,
    /// From one time to the next; more than `length`.
    pub every: Ticks,
    /// How long each lasts; more than 0.
    pub length: Ticks,
    /// What is carried meanwhile.
    pub share: u64,
}

impl Flap {
    /// What is carried from `now` on, until the [next change](Flap::next_change).
    pub(crate) fn share_at(&self, now: Ticks) -> u64 {
        let is_down = now >= self.from && (now - self.from) % self.every < self.length;
        if is_down { self.share } else { USUAL }
    }

    /// When that changes.
    pub(crate) fn next_change(&self, now: Ticks) -> Ticks {
        if now < self.from {
            return self.from;
        }
        let into = (now - self.from) % self.every;
        now + if into < self.length { self.length - into } else { self.every - into }
    }
}

impl Default for Mark {
    fn default() -> Self {
        Mark { speed: USUAL, port: USUAL, domain: USUAL, windows: Vec::new(), flap: None, jitter: Vec::new() }
    }
}

/// What differs from rank to rank and from switch to switch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Disturbed {
    /// By rank.
    pub ranks: BTreeMap<usize, Mark>,
    /// Rate of the links that leave a switch tier's group in millionths of the usual, by tier and group.
    pub tiers: BTreeMap<(usize, usize), u64>,
    /// What storage carries in millionths of the usual, if servers of it fail.
    pub storage: Option<u64>,
}

/// Ranks that behave alike.
#[derive(Clone, Debug)]
pub(crate) struct Class {
    pub(crate) stage: usize,
    /// One of them.
    pub(crate) rank: usize,
    pub(crate) mark: Mark,
    /// Its group on each axis.
    pub(crate) group: [usize; AXES.len()],
    /// The classes of the next and the previous stage that it hands activations and gradients to.
    pub(crate) beside: [usize; 2],
    /// What its bytes inside and outside of its domain cross, by axis, and to the stages beside.
    pub(crate) paths: Vec<[Vec<Path>; 2]>,
    pub(crate) sends: [[Vec<Path>; 2]; 2],
    /// Its links out of its domain and into it.
    pub(crate) ports: [usize; 2],
}

/// Classes that talk: one of the alike groups of an axis.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub(crate) axis: Axis,
    pub(crate) stage: usize,
    pub(crate) members: Vec<usize>,
}

/// All of it.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) classes: Vec<Class>,
    pub(crate) groups: Vec<Group>,
    /// Bytes per second of each link.
    pub(crate) capacity: Vec<u64>,
    /// The class of every rank.
    pub(crate) class_of: Vec<u32>,
    pub(crate) storage: Option<Storage>,
}

/// Whether ranks that cannot be told apart are played once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folding {
    /// They are.
    Folded,
    /// Every rank is played: for tests, and for traces of each.
    Unfolded,
}

impl World {
    pub(crate) fn new(
        cluster: &Cluster,
        mesh: &RankGrid,
        parts: &StepParts,
        disturbed: &Disturbed,
        storage: Option<&StorageUse>,
        folding: Folding,
    ) -> World {
        let spans = spans(cluster, mesh, parts);
        let tiers = paths::tiers(cluster, mesh.ranks(), disturbed);
        let crossings = paths::Crossings::new(&tiers, &spans);
        let class_of = match folding {
            Folding::Folded => colour::classes(mesh, disturbed, &tiers, &crossings),
            Folding::Unfolded => (0..mesh.ranks() as u32).collect(),
        };
        let count = class_of.iter().max().map_or(0, |c| *c as usize + 1);
        let (mut first, mut counts) = (vec![usize::MAX; count], vec![0; count]);
        for (rank, &c) in class_of.iter().enumerate() {
            first[c as usize] = first[c as usize].min(rank);
            counts[c as usize] += 1;
        }
        let mut fabric = Fabric::new(cluster, mesh, parts, disturbed, &tiers, &class_of, count);
        let mut groups = Groups::default();
        let classes = (0..count)
            .map(|c| {
                let rank = first[c];
                let (stage, q) = (rank / mesh.width, rank % mesh.width);
                let at = |s: usize| class_of[s % mesh.stages * mesh.width + q] as usize;
                let beside = [at(stage + 1), at(stage + mesh.stages - 1)];
                let mark = disturbed.ranks.get(&rank).cloned().unwrap_or_default();
                fabric.rank(c, &mark);
                let paths = (0..AXES.len())
                    .map(|at| fabric.collective(c, rank, at, &spans[at], &crossings, counts[c], &mark))
                    .collect();
                let sends = [stage + 1, stage + mesh.stages - 1].map(|s| {
                    let there = s % mesh.stages * mesh.width + q;
                    fabric.send([c, at(s)], [rank, there], [counts[c], counts[at(s)]], &mark)
                });
                let group = AXES.map(|axis| groups.of(mesh, axis, rank, &class_of));
                let ports = fabric.ports_of(c);
                Class { stage, rank, mark, group, beside, paths, sends, ports }
            })
            .collect::<Vec<_>>();
        let ports: Vec<[usize; 2]> = classes.iter().map(|c| c.ports).collect();
        let mut capacity = fabric.capacity;
        let storage = storage.map(|s| Storage::new(s, disturbed.storage, &ports, &counts, &mut capacity));
        World { classes, groups: groups.all, capacity, class_of, storage }
    }
}

/// How groups lie on the machine, by axis.
pub(crate) fn spans(cluster: &Cluster, mesh: &RankGrid, parts: &StepParts) -> Vec<Extent> {
    let r = &parts.replicas;
    let span = |axis: &Axis| {
        let group = match axis {
            Axis::All => r.dense.replicas,
            Axis::Near => r.dense.shards,
            Axis::Far => r.dense.owners,
            Axis::ExpertAll => r.experts.replicas,
            Axis::ExpertNear => r.experts.shards,
            Axis::ExpertFar => r.experts.owners,
            Axis::Tensor | Axis::Context | Axis::Expert => {
                let (size, stride) = axis.cut(&mesh.placement);
                plan::network::Group { size, stride }
            }
        };
        Extent::of(cluster, &parts.net, group)
    };
    AXES.iter().map(span).collect()
}

/// Groups by their members' classes.
#[derive(Default)]
struct Groups {
    all: Vec<Group>,
    known: BTreeMap<(Axis, Vec<(u32, usize)>), usize>,
}

impl Groups {
    fn of(&mut self, mesh: &RankGrid, axis: Axis, rank: usize, class_of: &[u32]) -> usize {
        let mut members: BTreeMap<u32, usize> = BTreeMap::new();
        for member in mesh.members(axis, rank) {
            *members.entry(class_of[member]).or_default() += 1;
        }
        let members: Vec<(u32, usize)> = members.into_iter().collect();
        if let Some(&known) = self.known.get(&(axis, members.clone())) {
            return known;
        }
        self.all.push(Group {
            axis,
            stage: rank / mesh.width,
            members: members.iter().map(|m| m.0 as usize).collect(),
        });
        self.known.insert((axis, members), self.all.len() - 1);
        self.all.len() - 1
    }
}
