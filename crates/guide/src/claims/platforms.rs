//! The six platforms.

use spec::cluster::ScaleUpKind;
use spec::{EntryKind, Measure, Result};

use super::{Ask, BITS, DGX_H100, GIGA, H100, TERA, chip, exact, size};
use crate::facts::{Facts, Found};
use crate::verdict::{Rule, Stated};

pub(crate) const CLAIMS: &[Ask] = &[
    ("a DGX SuperPOD is 32 to 512 DGX H100 nodes", superpod_nodes),
    ("its nodes have 8 H100 of 80 GB and NDR InfiniBand of 400 Gb/s", superpod_parts),
    ("a SuperPOD starts at about $10M", superpod_price),
    ("Azure's largest AI cluster has 285,000 cores", azure_cores),
    ("Azure has tens of thousands of A100 and H100, for $10B and more", azure_fleet),
    ("a TPU v5p pod has 8,960 chips", v5p_chips),
    ("they form a 2D torus", v5p_torus),
    ("a v5p chip has links of 4,800 Gb/s", v5p_links),
    ("v5p trained Gemini Ultra and Pro", gemini),
    ("Meta's RSC has 21,400 A100", rsc_size),
    ("RSC has InfiniBand of 200 Gb/s", rsc_fabric),
    ("RSC trained Llama 2 and Llama 3", rsc_trained),
    ("RSC has 2 EB of raw storage at 16 TB/s", rsc_storage),
    ("Colossus had 100,000 H100, then 200,000 H100 and H200", colossus),
    ("Colossus was the largest single cluster in late 2024", colossus_largest),
    ("CoreWeave has 45,000 H100 and more", coreweave),
    ("Corelink is a GPU cloud", corelink),
];

fn superpod_nodes(f: &mut Facts<'_>) -> Result<Found> {
    let mut of = |key| f.number(EntryKind::Platform, "dgx-superpod-h100", key).map(|m| m.value);
    let (unit, spare, units) = (of("unit_nodes")?, of("spare_nodes")?, of("units_max")?);
    let one = f.cluster("dgx-superpod-h100-1su", None)?;
    let usable = (one.accelerators / one.per_node) as f64;
    f.arithmetic();
    let range = Measure { value: unit, low: usable, high: unit * units };
    Ok(Found::new()
        .reads(
            format!("a unit, {spare} of them spent on the fabric manager"),
            range,
            "nodes",
            Stated::Range(32.0, 512.0),
        )
        .note("the reference design's tables go on to 64 units of 32 nodes"))
}

fn superpod_parts(f: &mut Facts<'_>) -> Result<Found> {
    let cluster = f.cluster("dgx-superpod-h100", None)?;
    let port = f.number(EntryKind::Fabric, &cluster.scale_out.fabric, "port")?.scaled(BITS / GIGA);
    Ok(Found::new()
        .reads("a port", port, "Gb/s", Stated::Exactly(400.0))
        .and()
        .reads("a node", f.number(EntryKind::Node, DGX_H100, "accelerators")?, "H100", Stated::Exactly(8.0))
        .and()
        .reads("each", chip(f, H100, "memory", GIGA)?, "GB", Stated::Exactly(80.0)))
}

fn superpod_price(f: &mut Facts<'_>) -> Result<Found> {
    let node = f.number(EntryKind::Node, DGX_H100, "price")?.value;
    let nodes = f.number(EntryKind::Platform, "dgx-superpod-h100", "unit_nodes")?.value;
    let share = f.number(EntryKind::Ownership, "typical", "network_share")?.value;
    f.arithmetic();
    let servers = node * nodes;
    let stated = Stated::About(10e6);
    Ok(Found::new().reads("for the servers of one unit", exact(servers), "$", stated).reads(
        "with their network, storage extra",
        exact(servers / (1.0 - share)),
        "$",
        stated,
    ))
}

fn azure_cores(f: &mut Facts<'_>) -> Result<Found> {
    let stated = Stated::Exactly(285_000.0);
    let cores = f.number(EntryKind::Platform, "azure-openai-2020", "cpu_cores")?;
    let eagle = size(f, "azure-eagle")?;
    let gb300 = size(f, "azure-gb300")?;
    let old = size(f, "azure-openai-2020")?;
    Ok(Found::new()
        .reads("H100 in Eagle", exact(eagle), "GPUs", stated)
        .reads("GB300 in its cluster of 2025", exact(gb300), "GPUs", stated)
        .shows("had the machine of 2020", cores, "CPU cores")
        .shows("V100 beside them", exact(old), "GPUs")
        .note("the number counts CPU cores of 2020, not GPUs of today"))
}

fn azure_fleet(f: &mut Facts<'_>) -> Result<Found> {
    Ok(Found::by(Rule::Undisclosed)
        .shows("H100 in the largest cluster disclosed", exact(size(f, "azure-eagle")?), "GPUs")
        .note("plausible, not disclosed; $10B is the size of an investment in OpenAI, not of a cluster"))
}

fn v5p_chips(f: &mut Facts<'_>) -> Result<Found> {
    let chips = f.number(EntryKind::Platform, "tpu-v5p-pod", "accelerators")?;
    let job = f.number(EntryKind::Platform, "tpu-v5p-pod", "job_max")?;
    Ok(Found::new().reads("a pod", chips, "chips", Stated::Exactly(8960.0)).shows(
        "the largest job",
        job,
        "chips",
    ))
}

fn v5p_torus(f: &mut Facts<'_>) -> Result<Found> {
    let pod = f.text(EntryKind::Platform, "tpu-v5p-pod", "shape")?;
    let cluster = f.cluster("tpu-v5p-pod", None)?;
    let dims = match &cluster.scale_up.kind {
        ScaleUpKind::Torus { extents } => extents.len(),
        _ => 0,
    };
    let flat = f.cluster("tpu-v5e-pod", None)?;
    let of_flat = match &flat.scale_up.kind {
        ScaleUpKind::Torus { extents } => extents.len(),
        _ => 0,
    };
    Ok(Found::new()
        .reads(format!("(a {dims}D torus of {pod})"), exact(dims as f64), "dims", Stated::Exactly(2.0))
        .note(format!("v5e and v6e pods have {of_flat} dims")))
}

fn v5p_links(f: &mut Facts<'_>) -> Result<Found> {
    let link = chip(f, "tpu-v5p", "scale_up", GIGA / BITS)?;
    Ok(Found::new()
        .reads("one way, as rated", exact(link.high), "Gb/s", Stated::Exactly(4800.0))
        .shows("both ways", exact(2.0 * link.high), "Gb/s")
        .shows("one way, as usable", exact(link.low), "Gb/s")
        .note("the direction is missing"))
}

fn gemini(f: &mut Facts<'_>) -> Result<Found> {
    let mut found = Found::new();
    for (run, title) in [("gemini-1-ultra", "Ultra"), ("gemini-1-pro", "Pro")] {
        let on = f.text(EntryKind::Trained, run, "accelerator")?;
        found = found.says(format!("Gemini 1.0 {title}: {on}"), "tpu-v5p", on == "tpu-v5p");
    }
    Ok(found.note("v5p was announced on the day of Gemini 1.0"))
}

fn rsc_size(f: &mut Facts<'_>) -> Result<Found> {
    Ok(Found::new()
        .reads("in RSC-1", exact(size(f, "meta-rsc")?), "A100", Stated::About(21_400.0))
        .shows("in RSC-2", exact(size(f, "meta-rsc-2")?), "A100")
        .note("21,400 is a count over the whole company"))
}

fn rsc_fabric(f: &mut Facts<'_>) -> Result<Found> {
    let cluster = f.cluster("meta-rsc", None)?;
    let port = f.number(EntryKind::Fabric, &cluster.scale_out.fabric, "port")?.scaled(BITS / GIGA);
    Ok(Found::new().reads("a port", port, "Gb/s", Stated::Exactly(200.0)))
}

fn rsc_trained(f: &mut Facts<'_>) -> Result<Found> {
    let llama2 = f.text(EntryKind::Trained, "llama2-70b", "platform")?;
    let chip_of_3 = f.text(EntryKind::Trained, "llama3-8b", "accelerator")?;
    let rsc = f.cluster("meta-rsc", None)?.accelerator.name;
    let large = f.text(EntryKind::Trained, "llama3-405b", "platform")?;
    Ok(Found::new()
        .says("Llama 2: RSC", "meta-rsc", llama2 == "meta-rsc")
        .says(format!("Llama 3: hours of {chip_of_3}; RSC has {rsc}"), "meta-rsc", chip_of_3 == rsc)
        .says(format!("Llama 3.1 405B: {large}"), "meta-rsc", large == "meta-rsc"))
}

fn rsc_storage(f: &mut Facts<'_>) -> Result<Found> {
    const EXABYTE: f64 = 1e18;
    let capacity = f.number(EntryKind::Storage, "rsc", "capacity")?.scaled(1.0 / EXABYTE);
    let read = f.number(EntryKind::Storage, "rsc", "read")?.scaled(1.0 / TERA);
    Ok(Found::new()
        .reads("at launch, the target being the upper end", capacity, "EB", Stated::About(2.0))
        .and()
        .reads("as designed", read, "TB/s", Stated::Exactly(16.0)))
}

fn colossus(f: &mut Facts<'_>) -> Result<Found> {
    let h100 = size(f, "xai-colossus-200k")?;
    let both = h100 + size(f, "xai-colossus-h200")?;
    Ok(Found::new()
        .reads("H100 in 2024", exact(size(f, "xai-colossus")?), "GPUs", Stated::Exactly(1e5))
        .and()
        .reads("H100 and H200 in 2025", exact(both), "GPUs", Stated::Exactly(2e5)))
}

fn colossus_largest(f: &mut Facts<'_>) -> Result<Found> {
    let mut known: Vec<(usize, String, String)> = Vec::new();
    for listed in f.catalog.list(Some(EntryKind::Platform)) {
        let online = f.catalog.get(EntryKind::Platform, &listed.name)?.text("online");
        // Dates compare as text: year first.
        if let (Some(online), Some(n)) = (online, listed.accelerators)
            && online <= "2024-12"
        {
            known.push((n, listed.name, listed.title));
        }
    }
    known.sort();
    let largest = known.pop().unwrap_or_default();
    let next = known.pop().unwrap_or_default();
    size(f, "xai-colossus")?;
    Ok(Found::new()
        .says(format!("{} with {} GPUs", largest.2, largest.0), "xai-colossus", largest.1 == "xai-colossus")
        .shows(format!("in the next that was disclosed ({})", next.2), exact(next.0 as f64), "GPUs")
        .note("among clusters that were disclosed"))
}

fn coreweave(f: &mut Facts<'_>) -> Result<Found> {
    let stated = Stated::About(45_000.0);
    let now = f.number(EntryKind::Platform, "coreweave-h100", "fleet")?;
    let then = f.number(EntryKind::Platform, "coreweave-h100", "fleet_before")?;
    Ok(Found::new().reads("of all kinds at the end of 2024", now, "GPUs", stated).read(
        "2023-12",
        "in H100 equivalents",
        then,
        "GPUs",
        stated,
    ))
}

fn corelink(f: &mut Facts<'_>) -> Result<Found> {
    let found = Found::by(Rule::Undisclosed);
    Ok(match f.catalog.cluster("corelink", None) {
        Ok(cluster) => found.shows("planned for on request", exact(cluster.accelerators as f64), "GPUs"),
        Err(_) => found,
    }
    .note("no public figures; ask for a quote"))
}
