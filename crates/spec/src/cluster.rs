//! A machine to plan for, resolved from the catalogue.

mod measured;
mod torus;

use torus::{even_extents, even_slice, parse_shape};

use crate::catalog::{Catalog, Entry, EntryKind, Meaning, Measure};
use crate::{Error, Family, NumberFormat, Result};
pub use measured::MeasuredBus;

/// A machine to plan for: accelerators, the links between them, storage.
///
/// Rates are bytes per second in one direction and per accelerator unless a name says otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// Platform or node name as asked.
    pub name: String,
    /// How many accelerators the job has.
    pub accelerators: usize,
    /// What they are.
    pub accelerator: Accelerator,
    /// Accelerators of one node: those that share hosts or a rack-scale link domain.
    pub per_node: usize,
    /// Links inside a node (or a TPU slice).
    pub scale_up: ScaleUp,
    /// Links between nodes (or slices).
    pub scale_out: ScaleOut,
    /// Shared storage, if the catalogue knows it.
    pub storage: Option<Storage>,
    /// The price entry, if the platform has one.
    pub price: Option<String>,
    /// The failure entry, if the platform has one.
    pub failure: Option<String>,
    /// Power of one node in watts, if known.
    pub node_power_w: Option<Measure>,
    /// The most accelerators that one job can have on such a machine.
    pub accelerators_max: usize,
    /// What one node costs to buy, in US dollars, if known.
    pub node_price_usd: Option<Measure>,
    /// What had to be assumed to make this cluster.
    pub assumptions: Vec<String>,
}

/// One accelerator.
#[derive(Clone, Debug, PartialEq)]
pub struct Accelerator {
    /// Catalogue name.
    pub name: String,
    /// Who makes it.
    pub vendor: String,
    /// Its architecture: what libraries reach on it, and what constants are fitted by.
    pub family: Family,
    /// Dense peaks in FLOP/s.
    peaks: Vec<(NumberFormat, Measure)>,
    /// Best measured large matrix products in FLOP/s.
    matmul: Vec<(NumberFormat, Measure)>,
    /// Memory in bytes.
    pub memory_bytes: Measure,
    /// Memory throughput, reads and writes together.
    pub memory_bytes_per_s: Measure,
    /// Units (SMs, cores) that run tiles side by side.
    pub compute_units: usize,
    /// The link to the memory of its host, one way, if known.
    pub host_bytes_per_s: Option<Measure>,
    /// Rated power in watts, if known.
    pub power_w: Option<Measure>,
    /// Whether it reads and writes its host's memory as its own (superchips).
    pub shares_host_memory: bool,
}

/// Links inside a node or slice.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleUp {
    /// How accelerators are joined.
    pub kind: ScaleUpKind,
    /// All links of one accelerator together, one way.
    pub bytes_per_s: Measure,
    /// What reaches one single neighbour, one way.
    pub peer_bytes_per_s: Measure,
    /// How many accelerators are joined.
    pub domain: usize,
}

/// How accelerators of a node or slice are joined.
#[derive(Clone, Debug, PartialEq)]
pub enum ScaleUpKind {
    /// Every pair at full rate (NVSwitch).
    Switch,
    /// Every pair by a link of its own.
    Mesh,
    /// Neighbours on a grid of these extents, with wrap-around where an extent is whole.
    Torus {
        /// Accelerators along each dim.
        extents: Vec<usize>,
    },
}

/// Links between nodes or slices.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaleOut {
    /// Catalogue name of the fabric.
    pub fabric: String,
    /// How switches are wired.
    pub topology: FabricTopology,
    /// Ports of one accelerator, one way: the node's ports shared out.
    pub bytes_per_s: Measure,
    /// Latency of one switch.
    pub hop_latency_s: Measure,
    /// Share of the port rate that long transfers get.
    pub efficiency: Measure,
    /// Whether switches can add (SHARP).
    pub in_switch: bool,
    /// Switch tiers from the nodes up: accelerators reached, and downlinks over uplinks when leaving.
    pub tiers: Vec<Tier>,
    /// What collectives over whole nodes were measured to reach, if they were.
    pub measured: Option<MeasuredBus>,
}

/// How the switches of a fabric are wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FabricTopology {
    /// Leaves and spines; a node's ports go to one leaf.
    FatTree,
    /// Leaves and spines; port `i` of every node goes to leaf `i`.
    RailFatTree,
    /// One switch plane a rail, nothing between rails.
    RailOnly,
    /// Groups joined all to all.
    Dragonfly,
}

/// One switch tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tier {
    /// Accelerators below one switch group of this tier.
    pub accelerators: usize,
    /// Downlinks over uplinks when leaving it; 1 is non-blocking.
    pub oversubscription: f64,
}

/// Shared storage as the whole job sees it, in bytes per second.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    /// Catalogue name.
    pub name: String,
    /// Read throughput.
    pub read_bytes_per_s: Measure,
    /// What sets it.
    pub read_limit: StorageLimit,
    /// Write throughput.
    pub write_bytes_per_s: Measure,
    /// What sets it.
    pub write_limit: StorageLimit,
}

/// What sets the rate at which a job reaches its storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StorageLimit {
    /// The filesystem as a whole.
    Filesystem,
    /// The servers that come with each scalable unit.
    Unit,
    /// What each node of the job gets.
    Node,
}

/// Storage of platforms that the catalogue knows none of, and of bare nodes.
const STORAGE_USUAL: &str = "cloud-object";

/// More accelerators than any machine has: a bound that keeps products of counts far from overflow.
const ACCELERATORS_MAX: usize = 16_777_216;

impl Accelerator {
    /// Dense peak in FLOP/s, if the accelerator has the format.
    pub fn peak(&self, precision: NumberFormat) -> Option<Measure> {
        self.peaks.iter().find(|p| p.0 == precision).map(|p| p.1)
    }

    /// The format of 16 bit that its matrix units have: bf16, or fp16 where they know no bf16.
    pub fn sixteen_bit(&self) -> NumberFormat {
        if self.peak(NumberFormat::Bf16).is_none() && self.peak(NumberFormat::Fp16).is_some() {
            NumberFormat::Fp16
        } else {
            NumberFormat::Bf16
        }
    }

    /// The formats that it has, as the catalogue names them.
    pub fn formats(&self) -> String {
        let has: Vec<&str> =
            NumberFormat::all().filter(|f| self.peak(*f).is_some()).map(NumberFormat::name).collect();
        has.join(", ")
    }

    /// Best large matrix product measured in practice, in FLOP/s, if known.
    pub fn matmul(&self, precision: NumberFormat) -> Option<Measure> {
        self.matmul.iter().find(|p| p.0 == precision).map(|p| p.1)
    }
}

/// A property of a machine that a what-if question changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Knob {
    /// Arithmetic peaks and measured matrix products.
    Flops,
    /// Memory throughput.
    MemoryBandwidth,
    /// Memory capacity.
    MemoryCapacity,
    /// Links inside a node or slice.
    ScaleUp,
    /// Ports between nodes.
    ScaleOut,
}

impl Knob {
    /// All of them.
    pub const ALL: [Knob; 5] =
        [Knob::Flops, Knob::MemoryBandwidth, Knob::MemoryCapacity, Knob::ScaleUp, Knob::ScaleOut];
}

impl Cluster {
    /// The same machine with one property scaled.
    #[must_use]
    pub fn scaled(mut self, knob: Knob, by: f64) -> Self {
        match knob {
            Knob::Flops => {
                let rates = self.accelerator.peaks.iter_mut().chain(&mut self.accelerator.matmul);
                rates.for_each(|rate| rate.1 = rate.1.scaled(by));
            }
            Knob::MemoryBandwidth => {
                self.accelerator.memory_bytes_per_s = self.accelerator.memory_bytes_per_s.scaled(by);
            }
            Knob::MemoryCapacity => self.accelerator.memory_bytes = self.accelerator.memory_bytes.scaled(by),
            Knob::ScaleUp => {
                self.scale_up.bytes_per_s = self.scale_up.bytes_per_s.scaled(by);
                self.scale_up.peer_bytes_per_s = self.scale_up.peer_bytes_per_s.scaled(by);
            }
            Knob::ScaleOut => self.scale_out.bytes_per_s = self.scale_out.bytes_per_s.scaled(by),
        }
        self
    }

    /// The same machine cut into slices of so many accelerators: a torus shrinks to one slice, switches stay.
    #[must_use]
    pub fn in_slices(mut self, slice: usize) -> Self {
        if let ScaleUpKind::Torus { extents } = &mut self.scale_up.kind {
            let slice = slice.clamp(1, self.scale_up.domain.max(1));
            *extents = even_extents(slice, extents.len());
            self.scale_up.domain = slice;
        }
        self
    }
}

impl Catalog {
    /// The cluster of that name: a platform (`meta-rsc`), a platform of N scalable units
    /// (`dgx-superpod-h100-64su`), a node (`dgx-h100`), or what else [`Catalog::meaning`] makes out, with `accelerators`
    /// of it or all.
    ///
    /// # Errors
    /// An unknown name, a number in it that the platform cannot have, or more accelerators than there are.
    pub fn cluster(&self, name: &str, accelerators: Option<usize>) -> Result<Cluster> {
        let Meaning { machine, units, accelerators: told, .. } = self.meaning(name)?;
        let accelerators = accelerators.or(told);
        match machine.kind {
            EntryKind::Platform => self.platform(machine, units, accelerators),
            _ => self.node(machine, accelerators),
        }
    }

    /// Nodes of one kind: as many as the accelerators take, or one alone where no fabric joins them.
    fn node(&self, node: &Entry, accelerators: Option<usize>) -> Result<Cluster> {
        let per_node = count(node, "accelerators")?;
        if let Some(n) = accelerators
            && n > per_node
            && node.text("fabric").is_none()
        {
            let what = format!(
                "{n} accelerators asked, {} has up to {per_node} and no fabric joins several",
                node.name
            );
            return Err(Error::user(what).hint(format!(
                "ask for at most {per_node}, or give the node a fabric and scale_out in a --catalog file"
            )));
        }
        self.assemble(&node.name, node, None, accelerators.unwrap_or(per_node))
    }

    fn platform(&self, platform: &Entry, units: Option<usize>, asked: Option<usize>) -> Result<Cluster> {
        let node = self.get(EntryKind::Node, platform.text("node").unwrap_or_default())?;
        let per_node = count(node, "accelerators")?;
        let name = units.map_or_else(|| platform.name.clone(), |n| format!("{}-{n}su", platform.name));
        let has = match (opt_count(platform, "unit_nodes"), units) {
            (Some(unit_nodes), units) => {
                let units_max = opt_count(platform, "units_max").unwrap_or(1);
                let units = units.unwrap_or(units_max);
                if units == 0 || units > units_max {
                    let what =
                        format!("{name}: {units} scalable units, {} has 1 to {units_max}", platform.name);
                    return Err(
                        Error::user(what).hint(format!("{}-{units_max}su is the largest", platform.name))
                    );
                }
                let spare = match opt_count(platform, "spare_units_max") {
                    Some(max) if units <= max => opt_count(platform, "spare_nodes").unwrap_or(0),
                    _ => 0,
                };
                (unit_nodes * units).saturating_sub(spare) * per_node
            }
            (None, Some(_)) => {
                let what = format!("{} has no scalable units", platform.name);
                return Err(Error::user(what).hint(format!("use `{}` with --accelerators", platform.name)));
            }
            (None, None) => match (opt_count(platform, "accelerators"), opt_count(platform, "nodes")) {
                (Some(n), _) => n,
                (None, Some(nodes)) => nodes * per_node,
                (None, None) => {
                    let what = format!("{}: platform.{} says no size", platform.place, platform.name);
                    return Err(
                        Error::user(what).hint("give nodes, accelerators, or unit_nodes and units_max")
                    );
                }
            },
        };
        let limit = opt_count(platform, "job_max").unwrap_or(has).min(has);
        let multislice = platform.flag("multislice");
        if let Some(n) = asked
            && n > limit
            && !multislice
        {
            let what = format!("{n} accelerators asked, {name} has {has} and runs jobs of up to {limit}");
            return Err(Error::user(what).hint(format!("ask for at most {limit}")));
        }
        self.assemble(&name, node, Some((platform, limit)), asked.unwrap_or(limit))
    }

    fn assemble(
        &self,
        name: &str,
        node: &Entry,
        platform: Option<(&Entry, usize)>,
        accelerators: usize,
    ) -> Result<Cluster> {
        let mut assumptions = Vec::new();
        let per_node = count(node, "accelerators")?;
        if accelerators == 0 || accelerators > ACCELERATORS_MAX {
            let what =
                format!("{accelerators} accelerators asked of {name}, expected 1 to {ACCELERATORS_MAX}");
            return Err(Error::user(what).hint("give --accelerators a number in that range"));
        }
        let chip = self.get(EntryKind::Accelerator, node.text("accelerator").unwrap_or_default())?;
        let fabric_name = platform.and_then(|p| p.0.text("fabric")).or(node.text("fabric"));
        let fabric = fabric_name.map(|name| self.get(EntryKind::Fabric, name)).transpose()?;
        let in_slice = platform.map_or(usize::MAX, |p| p.1);
        let scale_up = scale_up(chip, platform.map(|p| p.0), accelerators, in_slice, per_node)?;
        assumptions.extend(slices(accelerators, &scale_up, platform, per_node, fabric_name)?);
        let storage_name =
            platform.and_then(|p| p.0.text("storage")).or(node.text("storage")).unwrap_or_else(|| {
                assumptions.push(format!("storage: no figures for {name}, {STORAGE_USUAL} stands in"));
                STORAGE_USUAL
            });
        let storage =
            Some(self.storage(storage_name, accelerators.div_ceil(per_node), platform.map(|p| p.0))?);
        let family = self.family(chip.text("family").unwrap_or_default(), &mut assumptions)?;
        let reaches = self.get(EntryKind::Family, &family.name).ok().map(|f| (f, "family"));
        let parts = [Some((chip, "accelerator")), Some((node, "node")), fabric.map(|f| (f, "fabric"))];
        for (entry, what) in reaches.into_iter().chain(parts.into_iter().flatten()) {
            for (key, field) in &entry.fields {
                if let crate::catalog::Field::Number(q) = field
                    && ["choice", "recalled"].contains(&q.source.as_str())
                {
                    assumptions.push(format!(
                        "{what} {}: {key} = {} {} ({})",
                        entry.name, q.written, q.unit, q.source
                    ));
                }
            }
        }
        Ok(Cluster {
            name: name.to_owned(),
            accelerators,
            accelerator: accelerator(chip, family)?,
            per_node,
            scale_out: match fabric {
                Some(fabric) => scale_out(fabric, node, per_node)?,
                None => no_fabric(&scale_up),
            },
            scale_up,
            accelerators_max: match platform {
                Some((p, limit)) if !p.flag("multislice") => limit,
                None if fabric.is_none() => per_node,
                _ => ACCELERATORS_MAX,
            },
            storage,
            price: platform.and_then(|p| p.0.text("price")).map(str::to_owned),
            failure: platform.and_then(|p| p.0.text("failure")).map(str::to_owned),
            node_power_w: node.measure("power"),
            node_price_usd: node.measure("price"),
            assumptions,
        })
    }

    fn storage(&self, name: &str, nodes: usize, platform: Option<&Entry>) -> Result<Storage> {
        let entry = self.get(EntryKind::Storage, name)?;
        let unit_nodes = platform.and_then(|p| opt_count(p, "unit_nodes")).unwrap_or(32);
        let rate = |verb: &str| {
            let whole = entry.measure(verb);
            let unit = entry
                .measure(&format!("{verb}_per_unit"))
                .map(|m| m.scaled(nodes.div_ceil(unit_nodes) as f64));
            let node = entry.measure(&format!("{verb}_per_node")).map(|m| m.scaled(nodes as f64));
            let limits = [
                whole.map(|m| (m, StorageLimit::Filesystem)),
                unit.map(|m| (m, StorageLimit::Unit)),
                node.map(|m| (m, StorageLimit::Node)),
            ];
            let slowest = limits.into_iter().flatten().min_by(|a, b| a.0.value.total_cmp(&b.0.value));
            slowest.ok_or_else(|| {
                Error::user(format!("{}: storage.{name} says no {verb} rate", entry.place))
                    .hint(format!("give {verb}, {verb}_per_unit or {verb}_per_node"))
            })
        };
        let (read_bytes_per_s, read_limit) = rate("read")?;
        let (write_bytes_per_s, write_limit) = rate("write")?;
        Ok(Storage { name: name.to_owned(), read_bytes_per_s, read_limit, write_bytes_per_s, write_limit })
    }
}

fn accelerator(chip: &Entry, family: Family) -> Result<Accelerator> {
    let rates = |table: &str| -> Vec<(NumberFormat, Measure)> {
        NumberFormat::ALL
            .iter()
            .filter_map(|(p, name)| Some((*p, chip.measure(&format!("{table}.{name}"))?)))
            .collect()
    };
    Ok(Accelerator {
        name: chip.name.clone(),
        vendor: chip.text("vendor").unwrap_or_default().to_owned(),
        family,
        peaks: rates("peak"),
        matmul: rates("matmul"),
        memory_bytes: need(chip, "memory")?,
        memory_bytes_per_s: need(chip, "memory_bandwidth")?,
        compute_units: opt_count(chip, "compute_units").unwrap_or(1),
        host_bytes_per_s: chip.measure("host_link"),
        power_w: chip.measure("power"),
        shares_host_memory: chip.flag("shares_host_memory"),
    })
}

fn scale_up(
    chip: &Entry,
    platform: Option<&Entry>,
    accelerators: usize,
    slice_max: usize,
    per_node: usize,
) -> Result<ScaleUp> {
    let domain = count(chip, "domain")?;
    let kind = match chip.text("link") {
        Some("torus") => {
            let dims = opt_count(chip, "torus_dims").unwrap_or(2);
            let slice = even_slice(accelerators, domain.min(slice_max));
            let whole =
                platform.and_then(|p| p.text("shape")).map(|s| parse_shape(s, platform)).transpose()?;
            let extents = match whole {
                Some(shape) if shape.iter().product::<usize>() == slice => shape,
                _ => even_extents(slice, dims),
            };
            ScaleUpKind::Torus { extents }
        }
        Some("mesh") => ScaleUpKind::Mesh,
        _ => ScaleUpKind::Switch,
    };
    let domain = match &kind {
        ScaleUpKind::Torus { extents } => extents.iter().product(),
        _ => domain.min(per_node),
    };
    Ok(ScaleUp { kind, bytes_per_s: need(chip, "scale_up")?, peer_bytes_per_s: need(chip, "peer")?, domain })
}

/// How a job lies over several pods, where it does.
fn slices(
    accelerators: usize,
    scale_up: &ScaleUp,
    platform: Option<(&Entry, usize)>,
    per_node: usize,
    fabric: Option<&str>,
) -> Result<Option<String>> {
    let slices = accelerators.div_ceil(scale_up.domain);
    let (ScaleUpKind::Torus { .. }, Some(fabric), true) = (&scale_up.kind, fabric, slices > 1) else {
        return Ok(None);
    };
    if let (Some((entry, pod)), true) = (platform, scale_up.domain < per_node && accelerators > per_node) {
        let name = &entry.name;
        let what = format!("{accelerators} accelerators make no equal slices of up to {pod} of {name}");
        let near = accelerators.next_multiple_of(pod);
        return Err(Error::user(what).hint(format!("--accelerators {near} is {} whole ones", near / pod)));
    }
    Ok(Some(format!("{slices} slices of {}, joined by {fabric}", scale_up.domain)))
}

/// Of a node that stands alone. Nothing leaves it: the rate is that of its own links, which keeps formulas finite.
fn no_fabric(scale_up: &ScaleUp) -> ScaleOut {
    ScaleOut {
        fabric: "none".to_owned(),
        topology: FabricTopology::FatTree,
        bytes_per_s: scale_up.bytes_per_s,
        hop_latency_s: Measure::exact(0.0),
        efficiency: Measure::exact(1.0),
        in_switch: false,
        tiers: Vec::new(),
        measured: None,
    }
}

fn scale_out(fabric: &Entry, node: &Entry, per_node: usize) -> Result<ScaleOut> {
    let mut tiers = Vec::new();
    for tier in 1..=2 {
        if let Some(accelerators) = opt_count(fabric, &format!("tier{tier}")) {
            let over = fabric.measure(&format!("oversubscription{tier}")).map_or(1.0, |m| m.value);
            tiers.push(Tier { accelerators, oversubscription: over });
        }
    }
    let measured = MeasuredBus::of(fabric)?;
    Ok(ScaleOut {
        fabric: fabric.name.clone(),
        topology: match fabric.text("topology") {
            Some("rail-fat-tree") => FabricTopology::RailFatTree,
            Some("rail-only") => FabricTopology::RailOnly,
            Some("dragonfly") => FabricTopology::Dragonfly,
            _ => FabricTopology::FatTree,
        },
        bytes_per_s: need(node, "scale_out")?.scaled(1.0 / per_node as f64),
        hop_latency_s: need(fabric, "hop_latency")?,
        efficiency: need(fabric, "efficiency")?,
        in_switch: fabric.text("in_switch") == Some("sharp"),
        tiers,
        measured,
    })
}

pub(crate) fn need(entry: &Entry, key: &str) -> Result<Measure> {
    entry.measure(key).ok_or_else(|| {
        Error::user(format!("{}: {}.{}.{key} is missing", entry.place, entry.kind, entry.name))
            .hint("add it, or a `base` that has it")
    })
}

fn count(entry: &Entry, key: &str) -> Result<usize> {
    let value = need(entry, key)?.value;
    if value > ACCELERATORS_MAX as f64 {
        let what = format!(
            "{}: {}.{}.{key} = {value}, expected at most {ACCELERATORS_MAX}",
            entry.place, entry.kind, entry.name
        );
        return Err(Error::user(what).hint("no machine has as many"));
    }
    Ok(value as usize)
}

fn opt_count(entry: &Entry, key: &str) -> Option<usize> {
    entry.measure(key).map(|m| m.value.min(ACCELERATORS_MAX as f64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_has_as_many_accelerators_as_asked_within_bounds() {
        let catalog = Catalog::builtin().expect("the catalogue");
        let check = |accelerators: usize, fine: bool| {
            let found = catalog.cluster("dgx-h100", Some(accelerators));
            assert_eq!(found.is_ok(), fine, "{accelerators}: {:?}", found.map(|c| c.accelerators));
        };
        check(0, false);
        check(16, true);
        check(ACCELERATORS_MAX, true);
        check(ACCELERATORS_MAX + 1, false);
        check(usize::MAX, false);
    }
}
