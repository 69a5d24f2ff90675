use super::quantity::Dimension;

/// Kinds of catalogue entries, in the order in which they refer to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EntryKind {
    /// Accelerators of one architecture: what libraries reach on them.
    Family,
    /// One chip (or one die where software sees dies).
    Accelerator,
    /// What joins nodes.
    Fabric,
    /// Accelerators that share a host or a rack-scale link domain.
    Node,
    /// Shared storage.
    Storage,
    /// Rent or purchase.
    Price,
    /// How often things break.
    Failure,
    /// An electricity grid: its price, carbon and water.
    Grid,
    /// What owning machines takes beside the machines.
    Ownership,
    /// A machine by name.
    Platform,
    /// A name that people use which is no entry of its own: it may mean several, a part of some, or nobody publishes any.
    Name,
    /// A training run that others published: on what, how long, for how much.
    Trained,
}

impl EntryKind {
    /// All kinds.
    pub const ALL: [EntryKind; 12] = [
        EntryKind::Family,
        EntryKind::Accelerator,
        EntryKind::Fabric,
        EntryKind::Node,
        EntryKind::Storage,
        EntryKind::Price,
        EntryKind::Failure,
        EntryKind::Grid,
        EntryKind::Ownership,
        EntryKind::Platform,
        EntryKind::Name,
        EntryKind::Trained,
    ];

    /// The table name in a catalogue file.
    pub fn name(self) -> &'static str {
        match self {
            EntryKind::Family => "family",
            EntryKind::Accelerator => "accelerator",
            EntryKind::Fabric => "fabric",
            EntryKind::Node => "node",
            EntryKind::Storage => "storage",
            EntryKind::Price => "price",
            EntryKind::Failure => "failure",
            EntryKind::Grid => "grid",
            EntryKind::Ownership => "ownership",
            EntryKind::Platform => "platform",
            EntryKind::Name => "name",
            EntryKind::Trained => "trained",
        }
    }

    /// The kind of that name.
    pub fn parse(name: &str) -> Option<Self> {
        EntryKind::ALL.into_iter().find(|k| k.name() == name)
    }
}

impl std::fmt::Display for EntryKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a key of an entry holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Want {
    /// Free text.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// Texts.
    List,
    /// True or false.
    Flag,
    /// The name of an entry of this kind.
    Ref(EntryKind),
    /// A number with unit, source and date.
    Number(Dimension),
    /// A table of such numbers under free names, or under these names.
    Numbers(Dimension, &'static [&'static str]),
}

/// One key: its name, what it holds, and whether an entry must have it.
pub(crate) type Key = (&'static str, Want, bool);

const PRECISIONS: &[&str] = &["fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8"];

const TECHNOLOGIES: &[&str] = &["infiniband", "ethernet", "efa", "slingshot", "omni-path"];

const COMMON: &[Key] =
    &[("title", Want::Text, false), ("note", Want::Text, false), ("aliases", Want::List, false)];

use Dimension as D;

const FAMILY: &[Key] = &[
    ("software", Want::Text, true),
    ("matrix_units", Want::Word(&["tiles", "systolic"]), true),
    ("matmul_share", Want::Number(D::Ratio), false),
    ("tail_filled", Want::Number(D::Ratio), true),
    ("attention", Want::Number(D::Ratio), true),
    ("attention_generic", Want::Number(D::Ratio), true),
    ("attention_half", Want::Number(D::Count), true),
    ("ring", Want::Number(D::Ratio), true),
    ("in_switch", Want::Number(D::Ratio), false),
    ("collective_base", Want::Number(D::Time), true),
    ("collective_step", Want::Number(D::Time), true),
    ("collective_step_out", Want::Number(D::Time), true),
    ("collective_ramp", Want::Number(D::Time), false),
];

const ACCELERATOR: &[Key] = &[
    ("vendor", Want::Text, true),
    ("family", Want::Text, true),
    ("released", Want::Text, false),
    ("link", Want::Word(&["switch", "mesh", "torus"]), true),
    ("peak", Want::Numbers(D::FlopRate, PRECISIONS), true),
    ("matmul", Want::Numbers(D::FlopRate, PRECISIONS), false),
    ("memory", Want::Number(D::Bytes), true),
    // Where the memory's chips are: stacks beside the die on an interposer, chips on the board, or in the die itself.
    ("memory_at", Want::Word(&["interposer", "board", "die"]), false),
    ("memory_bandwidth", Want::Number(D::ByteRate), true),
    ("scale_up", Want::Number(D::LinkRate), true),
    ("peer", Want::Number(D::LinkRate), true),
    ("domain", Want::Number(D::Count), true),
    ("torus_dims", Want::Number(D::Count), false),
    ("host_link", Want::Number(D::LinkRate), false),
    ("power", Want::Number(D::Power), false),
    ("compute_units", Want::Number(D::Count), false),
    ("shares_host_memory", Want::Flag, false),
    ("usual", Want::Text, false),
];

const FABRIC: &[Key] = &[
    ("technology", Want::Word(TECHNOLOGIES), false),
    ("topology", Want::Word(&["fat-tree", "rail-fat-tree", "rail-only", "dragonfly"]), true),
    ("in_switch", Want::Word(&["none", "sharp"]), true),
    ("port", Want::Number(D::LinkRate), true),
    ("radix", Want::Number(D::Count), false),
    ("hop_latency", Want::Number(D::Time), true),
    ("efficiency", Want::Number(D::Ratio), true),
    ("tier1", Want::Number(D::Count), false),
    ("oversubscription1", Want::Number(D::Ratio), false),
    ("tier2", Want::Number(D::Count), false),
    ("oversubscription2", Want::Number(D::Ratio), false),
    ("message", Want::Number(D::Bytes), false),
    ("message_full", Want::Number(D::Bytes), false),
    ("all_reduce", Want::Numbers(D::ByteRate, &[]), false),
    ("all_gather", Want::Numbers(D::ByteRate, &[]), false),
];

const NODE: &[Key] = &[
    ("accelerator", Want::Ref(EntryKind::Accelerator), true),
    ("fabric", Want::Ref(EntryKind::Fabric), false),
    ("storage", Want::Ref(EntryKind::Storage), false),
    ("accelerators", Want::Number(D::Count), true),
    ("scale_out", Want::Number(D::LinkRate), false),
    ("disk", Want::Number(D::Bytes), false),
    ("disk_write", Want::Number(D::ByteRate), false),
    ("power", Want::Number(D::Power), false),
    ("price", Want::Number(D::Money), false),
];

const STORAGE: &[Key] = &[
    ("capacity", Want::Number(D::Bytes), false),
    ("read", Want::Number(D::ByteRate), false),
    ("write", Want::Number(D::ByteRate), false),
    ("read_per_node", Want::Number(D::ByteRate), false),
    ("write_per_node", Want::Number(D::ByteRate), false),
    ("read_per_unit", Want::Number(D::ByteRate), false),
    ("write_per_unit", Want::Number(D::ByteRate), false),
    ("server_read", Want::Number(D::ByteRate), false),
    ("server_write", Want::Number(D::ByteRate), false),
    ("server_drives", Want::Number(D::Count), false),
    ("drive", Want::Number(D::Bytes), false),
    ("server_price", Want::Number(D::Money), false),
    ("drive_price", Want::Number(D::Money), false),
    ("node_write", Want::Number(D::ByteRate), false),
];

const PRICE: &[Key] = &[
    ("accelerator", Want::Ref(EntryKind::Accelerator), true),
    ("provider", Want::Text, false),
    ("region", Want::Text, false),
    // Accelerators of the node that a price in USD/node-h is for.
    ("node_accelerators", Want::Number(D::Count), false),
    ("on_demand", Want::Number(D::Rent), false),
    ("reserved_1y", Want::Number(D::Rent), false),
    ("reserved_3y", Want::Number(D::Rent), false),
    ("spot", Want::Number(D::Rent), false),
    ("spot_interruption", Want::Number(D::Hazard), false),
    ("capacity_block", Want::Number(D::Rent), false),
    ("purchase", Want::Number(D::Money), false),
];

const FAILURE: &[Key] = &[
    ("rate", Want::Number(D::FailureRate), true),
    ("cause", Want::Numbers(D::FailureRate, &[]), false),
    ("planned", Want::Number(D::FailureRate), false),
    ("events", Want::Number(D::Count), false),
    ("detect", Want::Number(D::Time), false),
    ("restart", Want::Number(D::Time), false),
    ("repair", Want::Number(D::Time), false),
    ("effective_time", Want::Number(D::Ratio), false),
];

const GRID: &[Key] = &[
    ("price", Want::Number(D::EnergyPrice), true),
    ("carbon", Want::Number(D::Carbon), true),
    ("water", Want::Number(D::Water), false),
];

const OWNERSHIP: &[Key] = &[
    ("server_factor", Want::Number(D::Ratio), true),
    ("network_share", Want::Number(D::Ratio), true),
    ("storage_share", Want::Number(D::Ratio), true),
    ("lifetime", Want::Number(D::Time), true),
    ("resale", Want::Number(D::Ratio), true),
    ("capital_cost", Want::Number(D::Ratio), true),
    ("pue", Want::Number(D::Ratio), true),
    ("power_factor", Want::Number(D::Ratio), true),
    ("load", Want::Number(D::Ratio), true),
    ("idle_load", Want::Number(D::Ratio), true),
    ("site_water", Want::Number(D::Water), false),
    ("staff", Want::Number(D::Ratio), true),
    ("space", Want::Number(D::Money), true),
    ("maintenance", Want::Number(D::Ratio), true),
    ("spares", Want::Number(D::Ratio), true),
    ("lead_time", Want::Number(D::Time), true),
];

const PLATFORM: &[Key] = &[
    ("node", Want::Ref(EntryKind::Node), true),
    ("fabric", Want::Ref(EntryKind::Fabric), false),
    ("storage", Want::Ref(EntryKind::Storage), false),
    ("price", Want::Ref(EntryKind::Price), false),
    ("failure", Want::Ref(EntryKind::Failure), false),
    ("nodes", Want::Number(D::Count), false),
    ("accelerators", Want::Number(D::Count), false),
    ("unit_nodes", Want::Number(D::Count), false),
    ("units_max", Want::Number(D::Count), false),
    ("spare_nodes", Want::Number(D::Count), false),
    ("spare_units_max", Want::Number(D::Count), false),
    ("job_max", Want::Number(D::Count), false),
    ("shape", Want::Text, false),
    ("online", Want::Text, false),
    ("cpu_cores", Want::Number(D::Count), false),
    ("fleet", Want::Number(D::Count), false),
    ("fleet_before", Want::Number(D::Count), false),
    ("multislice", Want::Flag, false),
];

/// `means` are machines, the one that is taken first; `see` entries of any kind that hold its figures. A name without
/// either is a provider's who publishes none.
const NAME: &[Key] = &[("means", Want::List, false), ("see", Want::List, false)];

const TRAINED: &[Key] = &[
    ("accelerator", Want::Ref(EntryKind::Accelerator), false),
    ("platform", Want::Ref(EntryKind::Platform), false),
    ("accelerators", Want::Number(D::Count), false),
    ("tokens", Want::Number(D::Count), false),
    ("took", Want::Number(D::Time), false),
    // Accelerators times the time they ran.
    ("accelerator_time", Want::Number(D::Time), false),
    ("work", Want::Number(D::Work), false),
    ("cost_amortised", Want::Number(D::Money), false),
    ("cost_rented", Want::Number(D::Money), false),
    ("cost_bought", Want::Number(D::Money), false),
    ("disclosed", Want::Flag, true),
];

/// All keys that an entry of this kind may have, except `base`.
pub(crate) fn keys(kind: EntryKind) -> impl Iterator<Item = &'static Key> + Clone {
    let own = match kind {
        EntryKind::Family => FAMILY,
        EntryKind::Accelerator => ACCELERATOR,
        EntryKind::Fabric => FABRIC,
        EntryKind::Node => NODE,
        EntryKind::Storage => STORAGE,
        EntryKind::Price => PRICE,
        EntryKind::Failure => FAILURE,
        EntryKind::Grid => GRID,
        EntryKind::Ownership => OWNERSHIP,
        EntryKind::Platform => PLATFORM,
        EntryKind::Name => NAME,
        EntryKind::Trained => TRAINED,
    };
    COMMON.iter().chain(own)
}
