//! What bytes cross: links inside a domain, ports between nodes, and the switch tiers that are narrower going up.

use std::collections::BTreeMap;

use plan::estimate::parts::StepParts;
use plan::network::{Extent, Group, dims_spanned};
use spec::Cluster;
use spec::cluster::{FabricTopology, ScaleUpKind};
use spec::random::GOLDEN;

use super::{Disturbed, Mark};
use crate::clock::USUAL;
use crate::mesh::{AXES, Axis, RankGrid};

/// Links that bytes cross, and how many flows of their kind cross each.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Path {
    pub(crate) uses: Vec<(usize, u64)>,
    /// Rate beyond which links that no one else uses carry no more.
    pub(crate) limit: u64,
    /// Share of the bytes that goes this way.
    pub(crate) share: f64,
}

/// A switch tier that can bind: what it joins has more below than above. Others never fill before the ports do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tier {
    /// Which of the fabric's.
    pub(crate) index: usize,
    pub(crate) accelerators: usize,
    oversubscription: f64,
}

/// The tiers that a job of so many ranks leaves and that can bind, or are disturbed.
pub(crate) fn tiers(cluster: &Cluster, ranks: usize, disturbed: &Disturbed) -> Vec<Tier> {
    let tiers = cluster.scale_out.tiers.iter().enumerate();
    let binding = tiers.filter(|(i, t)| {
        let hurt = disturbed.tiers.keys().any(|key| key.0 == *i);
        (t.oversubscription > 1.0 || hurt) && t.accelerators > 0 && ranks > t.accelerators
    });
    let tier = |(index, t): (usize, &spec::cluster::Tier)| Tier {
        index,
        accelerators: t.accelerators,
        oversubscription: t.oversubscription,
    };
    binding.map(tier).collect()
}

/// Ports that a message takes which changes its rail where nothing joins rails: a neighbour's as well as its own.
const PORTS_TO_CHANGE_RAIL: u64 = 2;

/// Which tiers the neighbours of each rank lie beyond.
pub(crate) struct Crossings {
    tiers: Vec<Tier>,
    /// Members in one domain, by axis.
    inside: Vec<usize>,
}

impl Crossings {
    pub(crate) fn new(tiers: &[Tier], spans: &[Extent]) -> Self {
        Crossings { tiers: tiers.to_vec(), inside: spans.iter().map(|s| s.inside as usize).collect() }
    }

    /// Shares of the bytes that a rank sends out of its domain by how many tiers they leave: none, one, ...
    fn shares(&self, mesh: &RankGrid, axis: usize, rank: usize) -> Vec<f64> {
        let mut counts = vec![0usize; self.tiers.len() + 1];
        let (first, size, stride) = mesh.group(AXES[axis], rank);
        let me = (rank - first) / stride;
        let inside = self.inside[axis].max(1);
        let here = mesh.place(rank);
        let mut count = |i: usize| {
            let there = mesh.place(first + i * stride);
            let left = self.tiers.iter().filter(|t| here / t.accelerators != there / t.accelerators).count();
            counts[left] += 1;
        };
        if AXES[axis] == Axis::Expert {
            // All to all: everyone outside of the domain.
            (0..size).filter(|i| i / inside != me / inside).for_each(&mut count);
        } else {
            count((me + inside) % size);
        }
        let all = counts.iter().sum::<usize>().max(1);
        counts.iter().map(|c| *c as f64 / all as f64).collect()
    }

    /// What tells ranks apart by where their neighbours are.
    pub(crate) fn signature(&self, mesh: &RankGrid, rank: usize) -> u64 {
        let mut s = 0u64;
        for axis in 0..AXES.len() {
            if AXES[axis].size(&mesh.placement) > 1 {
                for share in self.shares(mesh, axis, rank) {
                    s = s.rotate_left(9) ^ share.to_bits().wrapping_mul(GOLDEN);
                }
            }
        }
        s
    }
}

/// Links and their rates.
pub(super) struct Fabric<'a> {
    cluster: &'a Cluster,
    mesh: &'a RankGrid,
    parts: &'a StepParts,
    tiers: &'a [Tier],
    /// Dims of a torus, 1 elsewhere.
    dims: usize,
    /// By tier: the class of each group, how many are of each class, and the first class's link up.
    tier_class: Vec<Vec<usize>>,
    tier_count: Vec<Vec<usize>>,
    tier_link: Vec<usize>,
    /// What rates are scaled by: the share that the stack reaches, over the pace of the slowest node.
    scale: f64,
    pub(super) capacity: Vec<u64>,
}

impl<'a> Fabric<'a> {
    pub(super) fn new(
        cluster: &'a Cluster,
        mesh: &'a RankGrid,
        parts: &'a StepParts,
        disturbed: &Disturbed,
        tiers: &'a [Tier],
        class_of: &[u32],
        classes: usize,
    ) -> Self {
        let dims = match &cluster.scale_up.kind {
            ScaleUpKind::Torus { extents } => extents.len(),
            _ => 1,
        };
        let mut f = Fabric {
            cluster,
            mesh,
            parts,
            tiers,
            dims,
            tier_class: Vec::new(),
            tier_count: Vec::new(),
            tier_link: Vec::new(),
            scale: parts.network_share / (1.0 + parts.slowest_node),
            capacity: vec![1; classes * (2 * dims + 2)],
        };
        for tier in tiers {
            f.tier(tier, disturbed, class_of);
        }
        f
    }

    /// Links up and down of one tier's groups, alike groups once.
    fn tier(&mut self, tier: &Tier, disturbed: &Disturbed, class_of: &[u32]) {
        let groups = self.mesh.ranks().div_ceil(tier.accelerators);
        let mut below: Vec<BTreeMap<u32, usize>> = vec![BTreeMap::new(); groups];
        for (rank, c) in class_of.iter().enumerate() {
            *below[self.mesh.place(rank) / tier.accelerators].entry(*c).or_default() += 1;
        }
        let mut known = BTreeMap::new();
        let first = self.capacity.len();
        let (mut classes, mut counts) = (Vec::new(), Vec::new());
        for (g, members) in below.into_iter().enumerate() {
            let rate = disturbed.tiers.get(&(tier.index, g)).copied().unwrap_or(USUAL);
            let present: usize = members.values().sum();
            let next = known.len();
            let class = *known.entry((members, rate)).or_insert(next);
            if class == counts.len() {
                let up = self.port_rate() * present as f64 / tier.oversubscription * of_usual(rate);
                self.capacity.extend([whole(up); 2]);
                counts.push(0);
            }
            counts[class] += 1;
            classes.push(class);
        }
        self.tier_link.push(first);
        self.tier_class.push(classes);
        self.tier_count.push(counts);
    }

    fn port_rate(&self) -> f64 {
        self.cluster.scale_out.bytes_per_s.value * self.parts.net.scale_out * self.scale
    }

    /// A class's links out of its domain and into it.
    pub(super) fn ports_of(&self, class: usize) -> [usize; 2] {
        let out = self.first_link(class) + 2 * self.dims;
        [out, out + 1]
    }

    fn first_link(&self, class: usize) -> usize {
        class * (2 * self.dims + 2)
    }

    /// Sets the rates of a class's own links.
    pub(super) fn rank(&mut self, class: usize, mark: &Mark) {
        let up = &self.cluster.scale_up;
        let inside = match &up.kind {
            // Both directions of one dim.
            ScaleUpKind::Torus { .. } => 2.0 * up.peer_bytes_per_s.value,
            _ => up.bytes_per_s.value,
        };
        let inside = inside * self.parts.net.scale_up_ring * self.scale * of_usual(mark.domain);
        let port = self.port_rate() * of_usual(mark.port);
        let (first, ports) = (self.first_link(class), self.ports_of(class));
        self.capacity[first..ports[0]].fill(whole(inside));
        self.capacity[ports[0]..=ports[1]].fill(whole(port));
    }

    /// Dims of a torus that a group spans, and how many places apart its members are in each.
    fn dims_spanned(&self, size: usize, stride: usize) -> Vec<(usize, u64)> {
        let ScaleUpKind::Torus { extents } = &self.cluster.scale_up.kind else { return vec![(0, 1)] };
        let out: Vec<_> = dims_spanned(extents, stride, size).map(|(dim, hops)| (dim, hops as u64)).collect();
        if out.is_empty() { vec![(0, 1)] } else { out }
    }

    fn inside(
        &self,
        from: usize,
        to: usize,
        size: usize,
        stride: usize,
        span: &Extent,
        mark: &Mark,
    ) -> Vec<Path> {
        let dims = self.dims_spanned(size, stride);
        let own: f64 = dims.iter().map(|(_, hops)| 1.0 / *hops as f64).sum();
        let (from, to) = (self.first_link(from), self.first_link(to));
        let path = |&(dim, hops): &(usize, u64)| {
            // A dim takes as much of the bytes as it has of the rate.
            let share = 1.0 / hops as f64 / own;
            let limit = whole(span.inside_rate * self.scale * of_usual(mark.domain) * share);
            Path { uses: vec![(from + 2 * dim, hops), (to + 2 * dim + 1, hops)], limit, share }
        };
        dims.iter().map(path).collect()
    }

    /// What a member's bytes of a collective cross, inside and outside of its domain. In a ring as much arrives at each
    /// member as leaves it, so both ways are counted on the member's own links.
    pub(super) fn collective(
        &self,
        class: usize,
        rank: usize,
        at: usize,
        span: &Extent,
        crossings: &Crossings,
        count: usize,
        mark: &Mark,
    ) -> [Vec<Path>; 2] {
        let (size, stride) = AXES[at].cut(&self.mesh.placement);
        let inside = self.inside(class, class, size, stride, span, mark);
        let ports = self.ports(stride);
        let port = self.first_link(class) + 2 * self.dims;
        let shares = crossings.shares(self.mesh, at, rank);
        let outside = shares.iter().enumerate().filter(|(_, share)| **share > 0.0).map(|(left, share)| {
            let mut uses = vec![(port, ports), (port + 1, ports)];
            for t in 0..left {
                let (link, groups) = self.tier_of(t, rank);
                let each = (count / groups) as u64;
                uses.extend([(link, each), (link + 1, each)]);
            }
            Path { uses, limit: u64::MAX, share: *share }
        });
        [inside, outside.collect()]
    }

    /// What an activation crosses on its way to a stage beside.
    pub(super) fn send(
        &self,
        [from, to]: [usize; 2],
        [rank, there]: [usize; 2],
        counts: [usize; 2],
        mark: &Mark,
    ) -> [Vec<Path>; 2] {
        let stride = self.mesh.placement.pp_stride();
        let span = Extent::of(self.cluster, &self.parts.net, Group { size: 2, stride });
        let inside = self.inside(from, to, 2, stride, &span, mark);
        let ports = self.ports(stride);
        let port = |class: usize| self.first_link(class) + 2 * self.dims;
        let mut uses = vec![(port(from), ports), (port(to) + 1, ports)];
        for (t, tier) in self.tiers.iter().enumerate() {
            if self.mesh.place(rank) / tier.accelerators != self.mesh.place(there) / tier.accelerators {
                let (up, ups) = self.tier_of(t, rank);
                let (down, downs) = self.tier_of(t, there);
                uses.extend([(up, (counts[0] / ups) as u64), (down + 1, (counts[1] / downs) as u64)]);
            }
        }
        [inside, vec![Path { uses, limit: u64::MAX, share: 1.0 }]]
    }

    /// The link up of a rank's group of a tier, and how many groups are alike.
    fn tier_of(&self, t: usize, rank: usize) -> (usize, usize) {
        let class = self.tier_class[t][self.mesh.place(rank) / self.tiers[t].accelerators];
        (self.tier_link[t] + 2 * class, self.tier_count[t][class])
    }

    /// How many ports a message between members so far apart takes.
    fn ports(&self, stride: usize) -> u64 {
        let changes = !stride.is_multiple_of(self.cluster.scale_up.domain.max(1));
        let rails_apart = self.cluster.scale_out.topology == FabricTopology::RailOnly;
        if rails_apart && changes { PORTS_TO_CHANGE_RAIL } else { 1 }
    }
}

pub(super) fn of_usual(millionths: u64) -> f64 {
    millionths as f64 / USUAL as f64
}

/// A rate in whole bytes per second; no link is slower than one.
pub(super) fn whole(rate: f64) -> u64 {
    (rate.round() as u64).max(1)
}
