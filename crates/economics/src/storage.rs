//! What a parallel filesystem must deliver to a run, whether the platform's does, and how large one would be.

use plan::storage::StorageEstimate;
use serde::Serialize;
use spec::{Catalog, EntryKind, Error, Result};

use crate::goodput::{Save, SaveTimes};
use crate::{Bill, Spread};

/// The catalogue's entry that filesystems are sized from.
const SERVER: &str = "flash-server";
/// A job that restarts should have its checkpoint within this time: less than its processes take to start.
const RESTORE_S: f64 = 60.0;
/// Of the time between checkpoints, the share until one must be safe: the other half is for what else writes.
const WRITTEN_WITHIN: f64 = 0.5;
/// Checkpoints on the filesystem at a time.
const CHECKPOINTS_KEPT: f64 = 5.0;
/// A filesystem fuller than this gets slow.
const FILLED: f64 = 0.8;
/// Data and parity over data: eight and two.
const PROTECTION: f64 = 1.25;

/// Storage under a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StoragePlan {
    /// What the run asks of it, in bytes and bytes a second.
    pub needs: Needs,
    /// Bytes a second that the platform's storage reads for the job.
    pub reads: Spread,
    /// Bytes a second that it writes.
    pub writes: Spread,
    /// Whether the platform's storage does.
    pub enough: bool,
    /// What it lacks, or by how much it does.
    pub reasons: Vec<String>,
    /// Seconds of a checkpoint by way of saving.
    pub checkpoint: Vec<SaveTimes>,
    /// A filesystem that would do.
    pub sizing: Sizing,
}

/// What a run asks of its filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Needs {
    /// Tokens, bytes a second.
    pub tokens_read: f64,
    /// A checkpoint read back in a minute, bytes a second.
    pub restore_read: f64,
    /// A checkpoint that is safe half way to the next, bytes a second.
    pub checkpoint_write: f64,
    /// Tokens and the last checkpoints, bytes.
    pub capacity: f64,
}

/// Servers and drives of a filesystem.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sizing {
    /// Servers.
    pub servers: usize,
    /// Drives in all.
    pub drives: usize,
    /// What sets the number of servers.
    pub bound: &'static str,
    /// Dollars to buy it.
    pub cost: Bill,
}

/// How a job of `nodes` saves state of `estimate` in each way. What the catalogue does not know of is left out.
///
/// # Errors
/// If the catalogue lacks the server that filesystems are sized from.
pub(crate) fn save_times(
    catalog: &Catalog,
    estimate: &StorageEstimate,
    nodes: usize,
) -> Result<Vec<SaveTimes>> {
    let written = Spread::from(estimate.write);
    let mut all = vec![SaveTimes { save: Save::Blocking, stall_s: written, behind_s: Spread::exact(0.0) }];
    if let Some(stall) = estimate.stall {
        all.push(SaveTimes { save: Save::Async, stall_s: stall.into(), behind_s: written });
    }
    let rate = server(catalog, "node_write")?;
    let share = estimate.checkpoint_bytes / nodes.max(1) as f64;
    // The drives are fast where the rate is high.
    let stall_s = Spread::new(share / rate.high, share / rate.value, share / rate.low);
    all.push(SaveTimes { save: Save::NodeLocal, stall_s, behind_s: written });
    Ok(all)
}

/// What storage takes under a run of `tokens_per_s` that checkpoints every `interval_s`.
///
/// # Errors
/// If the catalogue lacks the server that filesystems are sized from.
pub(crate) fn plan_storage(
    catalog: &Catalog,
    estimate: &StorageEstimate,
    nodes: usize,
    tokens: f64,
    steps_per_s: f64,
    tokens_per_step: f64,
    interval_s: f64,
) -> Result<StoragePlan> {
    let bytes = estimate.checkpoint_bytes;
    let needs = Needs {
        tokens_read: estimate.load_bytes * steps_per_s,
        restore_read: bytes / RESTORE_S,
        checkpoint_write: bytes / (interval_s * WRITTEN_WITHIN),
        capacity: CHECKPOINTS_KEPT * bytes + tokens * estimate.load_bytes / tokens_per_step,
    };
    let rate =
        |bytes: f64, s: plan::storage::Seconds| Spread::new(bytes / s.high, bytes / s.value, bytes / s.low);
    let (reads, writes) = (rate(bytes, estimate.read), rate(bytes, estimate.write));
    let mut reasons = Vec::new();
    let mut enough = true;
    for (what, need, has) in [
        ("reading tokens", needs.tokens_read, reads.value),
        ("reading a checkpoint back in a minute", needs.restore_read, reads.value),
        ("writing checkpoints", needs.checkpoint_write, writes.value),
    ] {
        let fine = has >= need;
        enough &= fine;
        let verb = if fine { "enough" } else { "too little" };
        reasons.push(format!("{what}: {:.1} GB/s asked, {:.1} GB/s there, {verb}", need / 1e9, has / 1e9));
    }
    Ok(StoragePlan {
        needs,
        reads,
        writes,
        enough,
        reasons,
        checkpoint: save_times(catalog, estimate, nodes)?,
        sizing: size(catalog, &needs)?,
    })
}

fn server(catalog: &Catalog, key: &str) -> Result<Spread> {
    let entry = catalog.get(EntryKind::Storage, SERVER)?;
    entry.measure(key).map(Spread::from).ok_or_else(|| {
        Error::user(format!("{}: storage.{SERVER}.{key} is missing", entry.place)).hint("add it")
    })
}

/// The smallest filesystem that delivers `needs`: servers for its rates and its capacity, each full of drives.
///
/// # Errors
/// If the catalogue lacks the server.
pub fn size(catalog: &Catalog, needs: &Needs) -> Result<Sizing> {
    let of = |key| server(catalog, key);
    let (drive_bytes, per_server) = (of("drive")?.value, of("server_drives")?.value);
    let raw = needs.capacity * PROTECTION / FILLED;
    let wanted = [
        ("reading", needs.tokens_read.max(needs.restore_read) / of("server_read")?.value),
        ("writing", needs.checkpoint_write / of("server_write")?.value),
        ("capacity", raw / (drive_bytes * per_server)),
    ];
    let (bound, most) = wanted.into_iter().fold(("capacity", 0.0), |a, b| if b.1 > a.1 { b } else { a });
    let servers = (most.ceil() as usize).max(1);
    let drives = servers * per_server as usize;
    let cost = Bill::of([
        ("servers", of("server_price")?.scaled(servers as f64)),
        ("drives", of("drive_price")?.scaled(drives as f64)),
    ]);
    Ok(Sizing { servers, drives, bound, cost })
}
