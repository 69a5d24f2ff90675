//! Inside a node and between nodes.

use spec::{EntryKind, Measure, Result};

use super::{Ask, BITS, DGX_H100, GIGA, H100, LLAMA_405B, TERA, chip, exact};
use crate::facts::{Facts, Found};
use crate::verdict::Stated;

pub(crate) const CLAIMS: &[Ask] = &[
    ("an H100 SXM5 has 80 GB at 3.35 TB/s and 989 TFLOP/s in BF16", h100),
    ("SXM has 900 GB/s of NVLink against 128 GB/s of a PCIe H100", nvlink_pcie),
    ("NVLink 4 has 900 GB/s in all between 8 GPUs", nvlink_total),
    ("8 NDR ports give a node 3.2 Tb/s", ports),
    ("HBM is stacked on the GPU's die", stacked),
    ("HBM3 has 3.35 TB/s, GDDR6 about 1 TB/s", gddr),
    ("weights are read from memory for every token, in training too", weights_read),
    ("Lustre delivers 1 to 10 TB/s", lustre),
    ("NVMe of a node writes 10 GB/s and more", nvme),
    ("GPUs cannot train while a checkpoint is written", checkpoint),
];

fn h100(f: &mut Facts<'_>) -> Result<Found> {
    Ok(Found::new()
        .reads("of HBM3", chip(f, H100, "memory", GIGA)?, "GB", Stated::Exactly(80.0))
        .and()
        .reads("to it", chip(f, H100, "memory_bandwidth", TERA)?, "TB/s", Stated::Exactly(3.35))
        .and()
        .reads("dense", chip(f, H100, "peak.bf16", TERA)?, "TFLOP/s", Stated::Exactly(989.0)))
}

fn nvlink_pcie(f: &mut Facts<'_>) -> Result<Found> {
    let nvlink = chip(f, H100, "scale_up", GIGA)?;
    let pcie = chip(f, H100, "host_link", GIGA)?;
    let bridge = chip(f, "h100-pcie", "scale_up", GIGA)?;
    let (sxm, card) = (Stated::Exactly(900.0), Stated::Exactly(128.0));
    Ok(Found::new()
        .reads("of NVLink, both ways together", nvlink.scaled(2.0), "GB/s", sxm)
        .reads("of it one way", nvlink, "GB/s", sxm)
        .and()
        .reads("of PCIe 5, both ways together", pcie.scaled(2.0), "GB/s", card)
        .reads("of it one way", pcie, "GB/s", card)
        .reads("of a bridge between two PCIe cards, both ways", bridge.scaled(2.0), "GB/s", card))
}

fn nvlink_total(f: &mut Facts<'_>) -> Result<Found> {
    let gpu = chip(f, H100, "scale_up", GIGA)?.scaled(2.0);
    let domain = chip(f, H100, "domain", 1.0)?.value;
    f.arithmetic();
    let stated = Stated::Exactly(900.0);
    Ok(Found::new()
        .reads("summed over 8 GPUs, both ways", gpu.scaled(domain), "GB/s", stated)
        // Half of the GPUs send at once through the cut, and half receive.
        .reads("through the middle of them", gpu.scaled(domain / 2.0), "GB/s", stated)
        .shows("of each GPU", gpu, "GB/s"))
}

fn ports(f: &mut Facts<'_>) -> Result<Found> {
    let node = f.number(EntryKind::Node, DGX_H100, "scale_out")?;
    let fabric = f.text(EntryKind::Node, DGX_H100, "fabric")?;
    let port = f.number(EntryKind::Fabric, fabric, "port")?;
    Ok(Found::new()
        .reads("a node, one way", node.scaled(BITS / TERA), "Tb/s", Stated::Exactly(3.2))
        .and()
        .reads("of them", exact(node.value / port.value), "ports", Stated::Exactly(8.0)))
}

fn stacked(f: &mut Facts<'_>) -> Result<Found> {
    let at = f.text(EntryKind::Accelerator, H100, "memory_at")?;
    Ok(Found::new().says(format!("stacks beside the die, joined by an {at}"), "on the die", at == "die"))
}

fn gddr(f: &mut Facts<'_>) -> Result<Found> {
    Ok(Found::new()
        .reads("of HBM3 on an H100", chip(f, H100, "memory_bandwidth", TERA)?, "TB/s", Stated::Exactly(3.35))
        .and()
        .reads(
            "of GDDR6 on an RTX 6000 Ada",
            chip(f, "rtx-6000-ada", "memory_bandwidth", TERA)?,
            "TB/s",
            Stated::About(1.0),
        ))
}

fn weights_read(f: &mut Facts<'_>) -> Result<Found> {
    let answer = f.planned(LLAMA_405B)?;
    let tokens = answer.best[0].layout.micro_batch * answer.question.sequence;
    f.arithmetic();
    let stated = Stated::Exactly(1.0);
    Ok(Found::new()
        .reads("share one read in decoding a single sequence", exact(1.0), "token", stated)
        .and()
        .reads("share one read in training 405B, a micro-batch", exact(tokens as f64), "tokens", stated))
}

fn lustre(f: &mut Facts<'_>) -> Result<Found> {
    let stated = Stated::Within(1.0, 10.0);
    let mut rate =
        |name: &str, key: &str| f.number(EntryKind::Storage, name, key).map(|m| m.scaled(1.0 / TERA));
    let (read, write) = (rate("orion", "read")?, rate("orion", "write")?);
    let found = Found::new()
        .reads("read by Frontier's Orion, of the largest class", read, "TB/s", stated)
        .reads("written", write, "TB/s", stated);
    let pod = f.cluster("dgx-superpod-h100-4su", None)?;
    let wanted = pod.storage.map_or(Measure::exact(0.0), |s| s.read_bytes_per_s.scaled(1.0 / TERA));
    Ok(found
        .shows(format!("asked for {} H100 of a SuperPOD", pod.accelerators), wanted, "TB/s")
        .note("of the largest only"))
}

fn nvme(f: &mut Facts<'_>) -> Result<Found> {
    let write = f.number(EntryKind::Node, DGX_H100, "disk_write")?.scaled(1.0 / GIGA);
    Ok(Found::new().reads("with the 8 drives of a DGX H100", write, "GB/s", Stated::AtLeast(10.0)))
}

fn checkpoint(f: &mut Facts<'_>) -> Result<Found> {
    let answer = f.planned(crate::facts::Case { cluster: "dgx-superpod-h100-64su", ..LLAMA_405B })?;
    let Some(storage) = answer.storage else { return Ok(Found::new()) };
    let Some(stall) = storage.stall else { return Ok(Found::new()) };
    f.arithmetic();
    let share = 100.0 * stall.value / storage.write.value;
    Ok(Found::new()
        .reads(
            format!("of the {:.1} s that writing takes stops 405B on 16,384 GPUs", storage.write.value),
            exact(share),
            "%",
            Stated::Exactly(100.0),
        )
        .shows("of standstill", exact(stall.value), "s")
        .note("the state is copied to the hosts and written from there while training goes on"))
}
