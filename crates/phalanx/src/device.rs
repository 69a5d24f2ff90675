//! What ranks compute on, and `phalanx devices`.

use std::fmt::Write as _;

use cuda::{Census, Counted, Cuda, STAGING_BYTES, census};
use serde_json::json;
use spec::run::{DeviceChoice, MessageChoice, RunDirSpec};
use spec::{Error, Result};
use train::{Cpu, Device, Mesh};

use crate::args::Devices;
use crate::output;
use crate::version;

/// The device of a rank: what the run asks for, or a GPU if one can be used.
pub(crate) fn open(run: &RunDirSpec, local_rank: usize, threads: usize) -> Result<Box<dyn Device>> {
    let cpu = || -> Result<Box<dyn Device>> {
        if run.messages == MessageChoice::Nccl {
            return Err(Error::user("run.messages = \"nccl\", but ranks compute on the CPU").hint(
                "set run.device=cuda, or run.messages=auto; phalanx devices says what this machine has",
            ));
        }
        Ok(Box::new(Cpu::new(threads)))
    };
    let cuda = || Cuda::new(local_rank).map(|d| Box::new(d.with_messages(run.messages, STAGING_BYTES)));
    match run.device {
        DeviceChoice::Cpu => cpu(),
        DeviceChoice::Cuda => {
            let device = version::loads(version::IS_STATIC).and_then(|()| cuda());
            Ok(device.map_err(|e| e.context("run.device = \"cuda\""))?)
        }
        DeviceChoice::Auto => match cuda() {
            Ok(device) => Ok(device),
            Err(why) => {
                // A machine without a driver has no GPU to speak of; one with a driver has a reason worth hearing.
                if cuda::has_driver() && local_rank == 0 {
                    output::say(&format!("on the CPU, since no GPU can be used: {why}"));
                }
                cpu()
            }
        },
    }
}

/// Refuses a GPU where there is no driver, and NCCL where there is no GPU: before data is prepared, which can take long.
pub(crate) fn expect(run: &RunDirSpec) -> Result<()> {
    let none = run.device == DeviceChoice::Cpu || !cuda::has_driver();
    let asked = run.device == DeviceChoice::Cuda || run.messages == MessageChoice::Nccl;
    if asked && none { open(run, 0, 1).map(drop) } else { Ok(()) }
}

/// Refuses ranks on devices of different kinds: their sums would differ, and with them the bits of a run.
pub(crate) fn agree(mesh: &Mesh, device: &dyn Device) -> Result<()> {
    let names = mesh.exchange(device.kind().as_bytes())?;
    match names.iter().position(|n| *n != names[0]) {
        None => Ok(()),
        Some(other) => Err(Error::user(format!(
            "rank 0 computes on {}, rank {other} on {}",
            String::from_utf8_lossy(&names[0]),
            String::from_utf8_lossy(&names[other])
        ))
        .hint("set run.device to cpu or cuda for all ranks; phalanx devices says what each machine has")),
    }
}

/// Lists what there is, and why what is missing is missing.
pub(crate) fn list(args: &Devices) -> Result<u8> {
    let census = census();
    output::print(&if args.json { as_json(&census) } else { as_text(&census) });
    Ok(0)
}

fn as_text(census: &Census) -> String {
    let mut text = format!("cpu       {} threads\n", output::threads(0));
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    match &census.cards {
        Ok(cards) => {
            for Counted { card: c, free_bytes } in cards {
                let usable = c.check().map_or_else(|e| format!("  ({e})"), |()| String::new());
                let free = free_bytes.map_or_else(String::new, |b| format!(" ({:.1} free)", gib(b)));
                let (major, minor) = c.capability;
                let _ = writeln!(
                    text,
                    "cuda {:<4} {}, sm_{major}{minor}, {} multiprocessors, {:.1} GiB{free}{usable}",
                    c.ordinal,
                    c.name,
                    c.processors,
                    gib(c.total_bytes)
                );
            }
        }
        Err(e) => explain(&mut text, "cuda", version::loads(version::IS_STATIC).as_ref().err().unwrap_or(e)),
    }
    if version::IS_STATIC {
        return text;
    }
    for found in &census.libraries {
        match &found.result {
            Ok((path, version)) => {
                let version = version.as_ref().map_or_else(String::new, |v| format!(", {v}"));
                let _ = writeln!(text, "{:<9} {}{version}", found.which.name(), path.display());
            }
            Err(e) => explain(&mut text, found.which.name(), e),
        }
    }
    text
}

fn explain(text: &mut String, name: &str, e: &Error) {
    let _ = writeln!(text, "{name:<9} none: {e}");
    if let Some(hint) = e.hint_text() {
        let _ = writeln!(text, "          hint: {hint}");
    }
}

fn as_json(census: &Census) -> String {
    let missing = |e: &Error| json!({ "error": e.to_string(), "hint": e.hint_text() });
    let cards = match &census.cards {
        Err(e) => missing(e),
        Ok(cards) => cards
            .iter()
            .map(|Counted { card: c, free_bytes }| {
                json!({
                    "ordinal": c.ordinal,
                    "name": c.name,
                    "compute_capability": format!("{}.{}", c.capability.0, c.capability.1),
                    "multiprocessors": c.processors,
                    "total_bytes": c.total_bytes,
                    "free_bytes": free_bytes,
                    "usable": c.check().is_ok(),
                })
            })
            .collect(),
    };
    let libraries: serde_json::Map<String, serde_json::Value> = census
        .libraries
        .iter()
        .map(|f| {
            let value = match &f.result {
                Ok((path, version)) => json!({ "file": path, "version": version }),
                Err(e) => missing(e),
            };
            (f.which.name().to_owned(), value)
        })
        .collect();
    let cpu = json!({ "threads": output::threads(0) });
    json!({ "cpu": cpu, "cuda": cards, "libraries": libraries }).to_string()
}
