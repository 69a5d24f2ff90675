//! What a collective takes on a machine: latency and bandwidth terms over the links that its group spans.
//!
//! Symbols: `n` members, `S` bytes (of the whole vector: gathered output, scattered input, reduced buffer, or one
//! rank's send buffer of an all-to-all), `B` bytes per second of one accelerator in one direction, `j` members in one
//! scale-up domain, `k = n / j` domains.

use serde::Serialize;
use spec::Cluster;
use spec::cluster::{FabricTopology, ScaleUpKind};
use spec::stats::median;

/// What ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Everyone gets the sum.
    AllReduce,
    /// Everyone gets everyone's part.
    AllGather,
    /// Everyone gets one part of the sum.
    ReduceScatter,
    /// Everyone sends a different part to everyone.
    AllToAll,
    /// One rank sends to one other.
    Send,
}

/// Which ranks take part: `size` of them, `stride` places apart in the order in which ranks fill the machine.
///
/// The innermost axis has stride 1; the next has the size of the innermost, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Group {
    /// Members.
    pub size: usize,
    /// Places from one member to the next.
    pub stride: usize,
}

/// Measured behaviour of a communication library on a cluster's links.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct NetworkModel {
    /// Share of the scale-up rate that a ring reaches.
    pub scale_up_ring: f64,
    /// Share that in-switch reduction reaches in all-reduce (NVLS counts over 1: it halves the bytes), if there is one.
    pub scale_up_in_switch: Option<f64>,
    /// Share of the port rate that long transfers reach.
    pub scale_out: f64,
    /// Before the first byte of any collective, in seconds.
    pub base_s: f64,
    /// Each step of a ring or tree inside a domain.
    pub scale_up_step_s: f64,
    /// Each step between domains, switches not included.
    pub scale_out_step_s: f64,
    /// Added for each doubling of the bytes beyond 1 MiB: channels and protocols ramp up.
    pub ramp_s: f64,
    /// Each step of a ring over nodes where the fabric was measured: of all-reduces, of gathers and scatters. 0 if it
    /// was not.
    pub ring_step_s: (f64, f64),
    /// Bytes of a message between nodes from which on its rate falls as it grows; without bound where none was measured.
    pub message_full: f64,
    /// Collectives walk one ring over all ranks ([`crate::software::Software::one_ring`]), else nodes add first.
    pub one_ring: bool,
}

/// Bytes at which the ramp begins.
const RAMP_FROM_BYTES: f64 = 1_048_576.0;
/// Steps that a call pays for at most in one domain: twice around eight members. In larger domains (NVL72) libraries
/// change from rings to trees, which are no deeper.
const RING_STEPS_MAX: f64 = 14.0;
/// Steps of a ring that an all-reduce through the switches takes as long as, whatever its members: NCCL charges 25 us
/// (`src/graph/tuning.cc` at 5067397), and its ring 3.4 us a step.
const IN_SWITCH_STEPS: f64 = 8.0;
/// Members from which libraries let switches add: a pair gains nothing by it.
const IN_SWITCH_MEMBERS: f64 = 4.0;
/// Peers in a domain that an all-to-all waits for one after another; further ones are served meanwhile. A choice: one
/// node of eight exchanges step by step.
const EXCHANGE_STEPS_MAX: f64 = 8.0;
/// The same between domains. A choice: what published runs of experts over many nodes take.
const EXCHANGE_HOPS_MAX: f64 = 16.0;
/// Share of a ring's traffic that crosses a switch tier which the ring spans: its steps between neighbours mostly stay
/// below. Charged in full, a taper of 7 would contradict the measured runs on Meta's 24k cluster.
const RING_CROSSING: f64 = 0.25;
/// Ports that a message takes which changes its rail where nothing joins rails: a neighbour's as well as its own.
const PORTS_TO_CHANGE_RAIL: f64 = 2.0;
/// Places along a torus from which a ring closes over the wrap-around link; shorter ones are lines of one direction.
const WRAP_PLACES: usize = 4;

impl NetworkModel {
    /// The model for a cluster's links.
    ///
    /// What libraries reach inside a domain and all latencies are facts of the accelerator's family, the share of long
    /// transfers between domains and the latency of a switch are the fabric's.
    pub fn of(cluster: &Cluster) -> Self {
        let (family, fabric) = (&cluster.accelerator.family, &cluster.scale_out);
        NetworkModel {
            scale_up_ring: family.ring.value,
            scale_up_in_switch: family.in_switch.map(|share| share.value),
            scale_out: fabric.efficiency.value,
            base_s: family.collective_base_s.value,
            scale_up_step_s: family.collective_step_s.value,
            scale_out_step_s: family.collective_step_out_s.value + fabric.hop_latency_s.value,
            ramp_s: family.collective_ramp_s.map_or(0.0, |ramp| ramp.value),
            ring_step_s: ring_step_s(cluster),
            one_ring: false,
            message_full: fabric.measured.as_ref().and_then(|m| m.full_bytes).unwrap_or(f64::INFINITY),
        }
    }
}

/// What one step of a ring takes that spans nodes, by measured bus bandwidths `b` of `n` ranks: the time `S / b` of a
/// message that `n` steps divide is what its bytes take at the ports' rate and the steps beside. Measured this way an
/// all-reduce waits for as many steps as a gather. The median over the nodes measured.
fn ring_step_s(cluster: &Cluster) -> (f64, f64) {
    let Some(measured) = &cluster.scale_out.measured else { return (0.0, 0.0) };
    let node = cluster.per_node as f64;
    let port = cluster.scale_out.bytes_per_s.value * cluster.scale_out.efficiency.value * node;
    let step = |table: &[(usize, f64)], passes: f64| {
        let waits = |(nodes, bus): &(usize, f64)| {
            (passes * measured.message_bytes * (1.0 / bus - 1.0 / port) / (*nodes as f64 * node)).max(0.0)
        };
        (!table.is_empty()).then(|| median(table.iter().map(waits)))
    };
    let (reduce, gather) = (step(&measured.all_reduce, 2.0), step(&measured.all_gather, 1.0));
    let other = |a: Option<f64>, b: Option<f64>| a.or(b).unwrap_or(0.0);
    (other(reduce, gather), other(gather, reduce))
}

/// Which links set the time of a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Steps and software, not bytes.
    Latency,
    /// Links inside the node or slice.
    ScaleUp,
    /// Ports between nodes.
    ScaleOut,
    /// An oversubscribed switch tier.
    Tier,
}

/// The time of one collective.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CommTime {
    /// Start to end.
    pub seconds: f64,
    /// The part that does not depend on bytes.
    pub latency_s: f64,
    /// What bounds it.
    pub bound: Bound,
    /// Bytes that each member sends.
    pub wire_bytes: f64,
}

const NOTHING: CommTime = CommTime { seconds: 0.0, latency_s: 0.0, bound: Bound::Latency, wire_bytes: 0.0 };

/// How a group lies on the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extent {
    /// Members in one scale-up domain.
    pub inside: f64,
    /// Domains.
    pub domains: f64,
    /// Rate of each member inside its domain, in bytes per second one way.
    pub inside_rate: f64,
    /// Rate of each member's own port, after oversubscription and sharing.
    pub outside_rate: f64,
    /// Whether an oversubscribed tier, not the port, sets `outside_rate`.
    pub tapered: bool,
    /// Steps around the ring inside.
    pub(crate) inside_steps: f64,
}

impl Extent {
    /// Where `group` lies on `cluster`.
    pub fn of(cluster: &Cluster, net: &NetworkModel, group: Group) -> Self {
        let domain = cluster.scale_up.domain.max(1);
        let inside = (domain / group.stride).clamp(1, group.size);
        let domains = group.size.div_ceil(inside);
        let up = &cluster.scale_up;
        let (inside_rate, inside_steps) = match &up.kind {
            ScaleUpKind::Switch => (up.bytes_per_s.value * net.scale_up_ring, inside as f64 - 1.0),
            ScaleUpKind::Mesh => {
                let links = up.peer_bytes_per_s.value * (inside as f64 - 1.0).max(1.0);
                (links.min(up.bytes_per_s.value) * net.scale_up_ring, inside as f64 - 1.0)
            }
            ScaleUpKind::Torus { extents } => {
                let dims = dims_spanned(extents, group.stride, inside).count().max(1);
                // Members that lie apart share each link of a dim with the groups between them.
                let own: f64 =
                    dims_spanned(extents, group.stride, inside).map(|(_, hops)| 1.0 / hops as f64).sum();
                let own = if own > 0.0 { own } else { 1.0 };
                let link = up.peer_bytes_per_s.value;
                // A ring uses both directions of each dim that the group spans; a line without wrap-around only one.
                let wrap = if group.stride * inside >= WRAP_PLACES { 2.0 } else { 1.0 };
                (
                    link * wrap * own * net.scale_up_ring,
                    (inside as f64).powf(1.0 / dims as f64) * dims as f64 / 2.0,
                )
            }
        };
        let port = cluster.scale_out.bytes_per_s.value;
        let reach = group.size * group.stride;
        let mut taper: f64 = 1.0;
        for tier in &cluster.scale_out.tiers {
            if reach > tier.accelerators {
                let crossing = if group.stride >= tier.accelerators { 1.0 } else { RING_CROSSING };
                taper = taper.max(1.0 + (tier.oversubscription - 1.0) * crossing);
            }
        }
        if cluster.scale_out.topology == FabricTopology::RailOnly && !group.stride.is_multiple_of(domain) {
            taper *= PORTS_TO_CHANGE_RAIL;
        }
        Extent {
            inside: inside as f64,
            domains: domains as f64,
            inside_rate,
            outside_rate: port * net.scale_out / taper,
            tapered: taper > 1.0,
            inside_steps,
        }
    }
}

/// Dims of a torus that a group spans when ranks fill it dim by dim, and how many places apart its members are in each.
pub fn dims_spanned(
    extents: &[usize],
    stride: usize,
    members: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let mut below = 1;
    extents.iter().enumerate().filter_map(move |(dim, extent)| {
        let places = below;
        below *= extent;
        let spans = *extent > 1 && stride < below && stride * members > places;
        spans.then_some((dim, (stride / places).max(1)))
    })
}

/// Estimates a collective of `bytes` over `group`.
///
/// An all-reduce in one domain takes `2 (n-1)/n S/B` in a ring (Thakur et al. 2005) and is faster where switches add.
/// Over domains it is hierarchical: inside and outside run as a pipeline, so the slower of the two counts.
///
/// 16 GiB over 8 H200 reach 482 GB/s of bus bandwidth, 32 MiB 276 (measured, ml-engineering):
///
/// ```
/// use plan::network::{Collective, Group, NetworkModel, collective};
/// let cluster = spec::Catalog::builtin()?.cluster("dgx-h200", None)?;
/// let net = NetworkModel::of(&cluster);
/// let group = Group { size: 8, stride: 1 };
/// let bus = |bytes: f64| {
///     let t = collective(&cluster, &net, Collective::AllReduce, group, bytes).seconds;
///     bytes / t * 2.0 * 7.0 / 8.0 / 1e9
/// };
/// assert!((bus(16.0 * 1073741824.0) / 482.3 - 1.0).abs() < 0.02);
/// assert!((bus(1073741824.0) / 463.6 - 1.0).abs() < 0.03);
/// assert!((bus(32.0 * 1048576.0) / 275.8 - 1.0).abs() < 0.08);
/// assert!((bus(1048576.0) / 39.9 - 1.0).abs() < 0.10);
/// # Ok::<(), spec::Error>(())
/// ```
pub fn collective(
    cluster: &Cluster,
    net: &NetworkModel,
    what: Collective,
    group: Group,
    bytes: f64,
) -> CommTime {
    on_span(net, what, &Extent::of(cluster, net, group), group.size, bytes)
}

/// [`collective`] on a span worked out before: the inner loop of a search.
pub fn on_span(net: &NetworkModel, what: Collective, span: &Extent, size: usize, bytes: f64) -> CommTime {
    let t = traffic(net, what, span, size, bytes);
    if t == Traffic::default() {
        return NOTHING;
    }
    let n = size as f64;
    let inside_s = t.inside_bytes / span.inside_rate;
    let outside_s = t.outside_bytes / span.outside_rate;
    let moving = inside_s.max(outside_s);
    let bound = if t.latency_s > moving {
        Bound::Latency
    } else if inside_s >= outside_s {
        Bound::ScaleUp
    } else if span.tapered {
        Bound::Tier
    } else {
        Bound::ScaleOut
    };
    let ring_share = (n - 1.0) / n;
    let wire_bytes = match what {
        Collective::Send => bytes,
        Collective::AllReduce => 2.0 * bytes * ring_share,
        _ => bytes * ring_share,
    };
    CommTime { seconds: t.latency_s + moving, latency_s: t.latency_s, bound, wire_bytes }
}

/// What a collective puts on the links of each member.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Before the first byte arrives, and between steps.
    pub latency_s: f64,
    /// Bytes that each member sends, and receives, inside its domain; those that switches add are left out.
    pub inside_bytes: f64,
    /// Bytes that pass through each member's own port, each way.
    pub outside_bytes: f64,
}

/// What a collective of `bytes` over a group of `size` on `span` takes from its links, by its algorithm: rings inside
/// a domain, or its switches where they add, and between domains a tree (all-reduce) or ring of each member's own;
/// both run at once, piece by piece.
pub fn traffic(net: &NetworkModel, what: Collective, span: &Extent, size: usize, bytes: f64) -> Traffic {
    if size <= 1 || bytes <= 0.0 {
        return Traffic::default();
    }
    let n = size as f64;
    let (j, k) = (span.inside, span.domains);
    let passes = if what == Collective::AllReduce { 2.0 } else { 1.0 };
    let (inside_bytes, outside_bytes) = match what {
        Collective::Send if k > 1.0 => (0.0, bytes),
        Collective::Send => (bytes, 0.0),
        Collective::AllToAll => (bytes * (j - 1.0) / n, bytes * (n - j) / n),
        _ => {
            let crossing = if net.one_ring && k > 1.0 { (n - 1.0) / n } else { (k - 1.0) / k };
            (passes * bytes * (j - 1.0) / j, passes * bytes / j * crossing)
        }
    };
    let in_switch = match (what, net.scale_up_in_switch) {
        // Gathers gain nothing (361 against 368 GB/s measured).
        (Collective::AllReduce, Some(share)) if j >= IN_SWITCH_MEMBERS => share / net.scale_up_ring,
        _ => 1.0,
    };
    let steps = match what {
        Collective::Send => 1.0,
        _ if in_switch > 1.0 => IN_SWITCH_STEPS,
        Collective::AllReduce => (2.0 * span.inside_steps).min(RING_STEPS_MAX),
        Collective::AllToAll => span.inside_steps.min(EXCHANGE_STEPS_MAX),
        _ => span.inside_steps.min(RING_STEPS_MAX),
    };
    let hops = match what {
        _ if k <= 1.0 => 0.0,
        Collective::Send => 1.0,
        Collective::AllToAll => (k - 1.0).min(EXCHANGE_HOPS_MAX),
        // Trees between domains, up and down; gathers and scatters walk a ring.
        Collective::AllReduce => 2.0 * k.log2().ceil(),
        _ => k - 1.0,
    };
    let ramp = net.ramp_s * (1.0 + bytes / RAMP_FROM_BYTES).log2();
    let waits = match what {
        Collective::AllReduce => net.ring_step_s.0,
        Collective::AllGather | Collective::ReduceScatter => net.ring_step_s.1,
        Collective::AllToAll | Collective::Send => 0.0,
    };
    let between_s = if waits > 0.0 && k > 1.0 { (n - 1.0) * waits } else { hops * net.scale_out_step_s };
    let latency_s =
        net.base_s + steps * net.scale_up_step_s * f64::from(u8::from(j > 1.0)) + between_s + ramp;
    Traffic { latency_s, inside_bytes: inside_bytes / in_switch, outside_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::Catalog;

    fn bus_gb_per_s(name: &str, ranks: usize, what: Collective, bytes: f64) -> f64 {
        let cluster = Catalog::builtin().unwrap().cluster(name, None).unwrap();
        let net = NetworkModel::of(&cluster);
        let p = collective(&cluster, &net, what, Group { size: ranks, stride: 1 }, bytes);
        p.wire_bytes / p.seconds / 1e9
    }

    /// Published `nccl-tests` results: predicted within the tolerance.
    #[test]
    fn measured_bus_bandwidths_are_reproduced() {
        let gib = 1073741824.0;
        let check = |name: &str, ranks, what, bytes: f64, measured: f64, tolerance: f64| {
            let bus = bus_gb_per_s(name, ranks, what, bytes);
            assert!(
                (bus / measured - 1.0).abs() < tolerance,
                "{name} {what:?} {bytes}: {bus} against {measured}"
            );
        };
        check("dgx-a100", 8, Collective::AllReduce, 16.0 * gib, 234.9, 0.02);
        check("dgx-h200", 8, Collective::AllReduce, 16.0 * gib, 482.3, 0.02);
        check("dgx-h200", 8, Collective::AllGather, 16.0 * gib, 361.0, 0.03);
        check("dgx-h200", 8, Collective::ReduceScatter, 16.0 * gib, 363.0, 0.03);
        check("dgx-b200", 8, Collective::AllReduce, 8.0 * gib, 838.0, 0.02);
        check("mi300x-node", 8, Collective::AllReduce, 4.0 * gib, 312.9, 0.03);
        check("mi300x-node", 2, Collective::AllReduce, 4.0 * gib, 47.7, 0.08);
        // Four nodes over EFA v4: what leaves the node sets the time.
        check("aws-p6-b200", 32, Collective::AllReduce, 16.0 * gib, 382.0, 0.08);
        check("aws-p4de", 16, Collective::AllReduce, 2.0 * gib, 78.3, 0.15);
    }

    #[test]
    fn time_never_falls_with_bytes_members_or_slower_links() {
        let catalog = Catalog::builtin().unwrap();
        for name in [
            "dgx-a100",
            "dgx-superpod-h100-64su",
            "gb200-nvl72",
            "tpu-v5p-pod",
            "mi300x-node",
            "meta-24k-roce",
        ] {
            let cluster = catalog.cluster(name, None).unwrap();
            let mut slow = cluster.clone();
            slow.scale_out.bytes_per_s = slow.scale_out.bytes_per_s.scaled(0.5);
            slow.scale_up.bytes_per_s = slow.scale_up.bytes_per_s.scaled(0.5);
            slow.scale_up.peer_bytes_per_s = slow.scale_up.peer_bytes_per_s.scaled(0.5);
            let net = NetworkModel::of(&cluster);
            for what in [
                Collective::AllReduce,
                Collective::AllGather,
                Collective::ReduceScatter,
                Collective::AllToAll,
                Collective::Send,
            ] {
                for size in [2, 4, 8, 64, 512] {
                    let group = Group { size, stride: 1 };
                    let mut last = 0.0;
                    for power in 10..34 {
                        let bytes = f64::from(2u32.pow(power.min(31))) * if power > 31 { 4.0 } else { 1.0 };
                        let t = collective(&cluster, &net, what, group, bytes).seconds;
                        assert!(t >= last, "{name} {what:?} {size} {bytes}");
                        assert!(collective(&slow, &net, what, group, bytes).seconds >= t);
                        last = t;
                    }
                }
            }
        }
    }

    /// The table that a fabric was measured by comes out again, but for what its noise is.
    #[test]
    fn a_measured_fabric_is_as_slow_as_measured() {
        let cluster = Catalog::builtin().unwrap().cluster("hf-h100", None).unwrap();
        let measured = cluster.scale_out.measured.clone().unwrap();
        let net = NetworkModel::of(&cluster);
        let check = |what, table: &[(usize, f64)]| {
            for (nodes, bus) in table {
                let size = nodes * cluster.per_node;
                let p = collective(&cluster, &net, what, Group { size, stride: 1 }, measured.message_bytes);
                let found = p.wire_bytes / p.seconds;
                // Two nodes are near enough for NCCL to reduce in a tree through their switches.
                let tolerance = if *nodes == 2 { 0.4 } else { 0.2 };
                assert!((found / bus).ln().abs() < tolerance, "{what:?} over {nodes}: {found:e} for {bus:e}");
            }
        };
        check(Collective::AllReduce, &measured.all_reduce);
        check(Collective::AllGather, &measured.all_gather);
        // The same fabric by its name plate.
        let plate = Catalog::builtin().unwrap().cluster("aws-p5", Some(512)).unwrap();
        let group = Group { size: 512, stride: 1 };
        let took = |c: &Cluster| {
            collective(c, &NetworkModel::of(c), Collective::AllGather, group, measured.message_bytes).seconds
        };
        assert!(took(&cluster) > 5.0 * took(&plate));
    }

    /// A machine of round figures: every term of a latency has digits of its own.
    fn made_up(domain: usize, in_switch: bool) -> (Cluster, NetworkModel) {
        let mut cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(512)).unwrap();
        cluster.scale_up.domain = domain;
        let net = NetworkModel {
            scale_up_ring: 0.8,
            scale_up_in_switch: in_switch.then_some(1.0),
            scale_out: 0.9,
            base_s: 1.0,
            scale_up_step_s: 1e2,
            scale_out_step_s: 1e5,
            ramp_s: 0.0,
            ring_step_s: (0.0, 0.0),
            one_ring: false,
            message_full: f64::INFINITY,
        };
        (cluster, net)
    }

    /// Base, steps in a domain and steps between domains of a message of no length, counted by hand.
    #[test]
    fn latency_is_the_base_and_each_step_of_the_slowest_path() {
        use Collective::{AllGather, AllReduce, AllToAll, ReduceScatter, Send};
        let check = |what, domain, in_switch, (size, stride), (steps, hops): (f64, f64)| {
            let (cluster, net) = made_up(domain, in_switch);
            let t = collective(&cluster, &net, what, Group { size, stride }, 1e-6);
            let expected = 1.0 + 1e2 * steps + 1e5 * hops;
            let case = format!("{what:?} over {size} at {stride} in domains of {domain}: {}", t.latency_s);
            assert!((t.latency_s / expected - 1.0).abs() < 1e-12, "{case} for {expected}");
            assert!(t.seconds >= t.latency_s && t.bound == Bound::Latency, "{case}");
        };
        // Around a ring and back; further members of a large domain cost nothing.
        check(AllReduce, 8, false, (2, 1), (2.0, 0.0));
        check(AllReduce, 8, false, (8, 1), (14.0, 0.0));
        check(AllReduce, 72, false, (64, 1), (14.0, 0.0));
        // The switch takes as long for few as for many, and leaves pairs and triples alone.
        check(AllReduce, 8, true, (3, 1), (4.0, 0.0));
        check(AllReduce, 8, true, (4, 1), (8.0, 0.0));
        check(AllReduce, 72, true, (72, 1), (8.0, 0.0));
        check(AllGather, 8, true, (4, 1), (3.0, 0.0));
        check(ReduceScatter, 8, false, (8, 1), (7.0, 0.0));
        check(AllGather, 72, false, (64, 1), (14.0, 0.0));
        check(AllToAll, 8, false, (4, 1), (3.0, 0.0));
        check(AllToAll, 72, false, (64, 1), (8.0, 0.0));
        check(Send, 8, false, (2, 1), (1.0, 0.0));
        // One member in each domain: nothing inside. Trees go up and down, rings around, exchanges to each.
        check(AllReduce, 8, false, (2, 8), (0.0, 2.0));
        check(AllReduce, 8, true, (16, 8), (0.0, 8.0));
        check(AllReduce, 8, false, (20, 8), (0.0, 10.0));
        check(AllGather, 8, false, (16, 8), (0.0, 15.0));
        check(ReduceScatter, 8, false, (64, 8), (0.0, 63.0));
        check(AllToAll, 8, false, (16, 8), (0.0, 15.0));
        check(AllToAll, 8, false, (64, 8), (0.0, 16.0));
        check(Send, 8, false, (2, 8), (0.0, 1.0));
        // Both.
        check(AllReduce, 8, true, (32, 1), (8.0, 4.0));
        check(AllReduce, 8, false, (32, 2), (6.0, 6.0));
        check(AllGather, 8, false, (32, 1), (7.0, 3.0));
        check(AllToAll, 8, false, (32, 4), (1.0, 15.0));
    }

    /// A torus is crossed along each dim that the group spans, at most half around.
    #[test]
    fn latency_on_a_torus_is_half_around_each_dim() {
        let check = |size, stride, steps: f64| {
            let (mut cluster, net) = made_up(64, false);
            cluster.scale_up.kind = ScaleUpKind::Torus { extents: vec![4, 4, 4] };
            let t = collective(&cluster, &net, Collective::AllGather, Group { size, stride }, 1e-6);
            assert!(
                (t.latency_s / (1.0 + 1e2 * steps) - 1.0).abs() < 1e-12,
                "{size} {stride}: {}",
                t.latency_s
            );
        };
        check(4, 1, 2.0);
        check(4, 4, 2.0);
        check(16, 1, 4.0);
        check(64, 1, 6.0);
        check(16, 4, 4.0);
    }

    #[test]
    fn long_messages_ramp_up_by_doublings() {
        let (cluster, net) = made_up(8, false);
        let net = NetworkModel { ramp_s: 1e7, ..net };
        let latency = |mib: f64| {
            let group = Group { size: 2, stride: 1 };
            collective(&cluster, &net, Collective::Send, group, mib * 1048576.0).latency_s - 101.0
        };
        assert_eq!((latency(1.0), latency(3.0), latency(7.0)), (1e7, 2e7, 3e7));
    }

    /// Messages of eight bytes, as `nccl-tests` prints them. The constants are those of long messages' protocols: a node
    /// alone is faster at such messages, and the first generation of EFA slower, each by a factor of 2 to 3.
    #[test]
    fn small_messages_take_about_as_long_as_measured() {
        let check = |name: &str, ranks, measured_us: f64, factor: f64| {
            let cluster = Catalog::builtin().unwrap().cluster(name, Some(ranks)).unwrap();
            let net = NetworkModel::of(&cluster);
            let group = Group { size: ranks, stride: 1 };
            let us = collective(&cluster, &net, Collective::AllReduce, group, 8.0).seconds * 1e6;
            assert!(us / measured_us < factor && measured_us / us < factor, "{name}: {us} us");
        };
        check("aws-p5", 16, 70.0, 1.2);
        check("aws-p5", 8, 12.9, 2.7);
        check("aws-p4de", 16, 161.0, 2.7);
    }

    #[test]
    fn strides_decide_what_crosses_nodes() {
        let cluster = Catalog::builtin().unwrap().cluster("dgx-superpod-h100-64su", None).unwrap();
        let net = NetworkModel::of(&cluster);
        let inner = Extent::of(&cluster, &net, Group { size: 8, stride: 1 });
        let outer = Extent::of(&cluster, &net, Group { size: 8, stride: 8 });
        assert_eq!((inner.inside, inner.domains), (8.0, 1.0));
        assert_eq!((outer.inside, outer.domains), (1.0, 8.0));
    }
}
