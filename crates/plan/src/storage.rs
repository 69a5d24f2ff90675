//! Loading tokens from shared storage and writing checkpoints to it.
//!
//! Symbols: `P` parameters, `b` bytes that a checkpoint holds for each, `R` and `W` the bytes per second that the whole
//! job reads and writes, `h` the rate between one accelerator and its host, `n` accelerators.

use serde::Serialize;
use spec::cluster::{Cluster, StorageLimit};

/// Bytes of checkpoint for each parameter: weights in 16 bit, and master weights and two moments in 32.
///
/// MLPerf Storage 2.0 sizes its checkpoints by the same rule: 105, 912 and 5,290 GiB for Llama 3 8B, 70B and 405B.
pub(crate) const CHECKPOINT_BYTES_PER_PARAM: f64 = 14.0;
/// The same in this program's own format: 32-bit weights and two moments, no second copy of the weights.
pub(crate) const OWN_BYTES_PER_PARAM: f64 = 12.0;
/// Share of a host link's rating that copies reach: 55.4 of 63 GB/s measured on PCIe 5 (ml-engineering at 744d01e).
const HOST_SHARE: f64 = 0.88;
/// What a snapshot to the host takes beside its bytes, in seconds: 0.34 (7B, 1,488 GPUs) and 0.59 (405B, 8,960 GPUs)
/// published for ByteCheckpoint (arXiv 2407.20143 Table 8), where the bytes themselves take hundredths of a second.
const SNAPSHOT_S: f64 = 0.5;
/// The same where the copy is not tuned: 6.3 s for 7B (PyTorch asynchronous checkpoints, 2024-06).
const SNAPSHOT_HIGH_S: f64 = 6.3;

/// Seconds with the range that the storage's figures span.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Seconds {
    /// With the rates to compute with.
    pub value: f64,
    /// With the highest rates that a source states.
    pub low: f64,
    /// With the lowest.
    pub high: f64,
}

/// What a job's storage takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StorageEstimate {
    /// The catalogue's storage entry.
    pub storage: String,
    /// Bytes of tokens that a step reads: each token once, whatever the layout.
    pub load_bytes: f64,
    /// Time to read them. They are read ahead, so only what is longer than a step is seen; see [`Self::exposed_s`].
    pub load: Seconds,
    /// What sets the rate of reading.
    pub load_limit: StorageLimit,
    /// Bytes of a checkpoint, the whole model's.
    pub checkpoint_bytes: f64,
    /// Time to write it while the job waits: state is sharded over all accelerators, and all write.
    pub write: Seconds,
    /// What sets the rate of writing.
    pub write_limit: StorageLimit,
    /// Time that training stands still if the state is copied to the hosts and written from there; absent where the
    /// catalogue does not know the link to the host.
    pub stall: Option<Seconds>,
    /// Time to read a checkpoint back.
    pub read: Seconds,
}

/// Estimates data loading and checkpoints of a job of `params` parameters that reads `tokens_per_step` tokens of
/// `bytes_per_token` a step. `None` if nothing is known of the cluster's storage.
///
/// Reading takes `tokens * bytes / R`, writing `P b / W`, a snapshot `P b / (n h)` and half a second.
///
/// The 2.3 TiB of BLOOM took 40 s on Jean Zay, and 405B stood still for 0.59 s on 8,960 H800 or H100:
///
/// ```
/// use plan::storage::estimate;
/// let catalog = spec::Catalog::builtin()?;
/// let gib = |bytes: f64| bytes / 1073741824.0;
///
/// let bloom = estimate(&catalog.cluster("jean-zay", Some(384))?, 176.25e9, 4194304.0, 4.0).unwrap();
/// assert!((gib(bloom.checkpoint_bytes) / 1024.0 / 2.3 - 1.0).abs() < 0.03);
/// assert!((bloom.write.value / 40.0 - 1.0).abs() < 0.10);
///
/// let meta = catalog.cluster("meta-24k-roce", Some(8960))?;
/// let stall = estimate(&meta, 405.85e9, 16.8e6, 4.0).unwrap().stall.unwrap();
/// assert!(stall.low < 0.59 && 0.59 < stall.high && (stall.value / 0.59 - 1.0).abs() < 0.2);
///
/// // MLPerf Storage 2.0: checkpoints of 8B, 70B and 405B.
/// for (params, published) in [(8.03e9, 105.0), (70.55e9, 912.0), (405.85e9, 5290.0)] {
///     let bytes = estimate(&meta, params, 1.0, 4.0).unwrap().checkpoint_bytes;
///     assert!((gib(bytes) / published - 1.0).abs() < 0.01);
/// }
/// # Ok::<(), spec::Error>(())
/// ```
pub fn estimate(
    cluster: &Cluster,
    params: f64,
    tokens_per_step: f64,
    bytes_per_token: f64,
) -> Option<StorageEstimate> {
    estimate_state(cluster, params * CHECKPOINT_BYTES_PER_PARAM, tokens_per_step * bytes_per_token)
}

/// [`estimate`] of a checkpoint of `checkpoint_bytes` and a step that reads `load_bytes`.
pub(crate) fn estimate_state(
    cluster: &Cluster,
    checkpoint_bytes: f64,
    load_bytes: f64,
) -> Option<StorageEstimate> {
    let storage = cluster.storage.as_ref()?;
    let at = |bytes: f64, rate: spec::Measure| Seconds {
        value: bytes / rate.value,
        low: bytes / rate.high,
        high: bytes / rate.low,
    };
    let stall = cluster.accelerator.host_bytes_per_s.map(|host| {
        let copy = at(checkpoint_bytes / cluster.accelerators.max(1) as f64, host);
        Seconds {
            value: copy.value / HOST_SHARE + SNAPSHOT_S,
            low: copy.low,
            high: copy.high / HOST_SHARE + SNAPSHOT_HIGH_S,
        }
    });
    Some(StorageEstimate {
        storage: storage.name.clone(),
        load_bytes,
        load: at(load_bytes, storage.read_bytes_per_s),
        load_limit: storage.read_limit,
        checkpoint_bytes,
        write: at(checkpoint_bytes, storage.write_bytes_per_s),
        write_limit: storage.write_limit,
        stall,
        read: at(checkpoint_bytes, storage.read_bytes_per_s),
    })
}

/// Bytes of a token in a dataset: `.bin` files hold 16-bit ids where the vocabulary allows it, else 32-bit ones.
pub(crate) fn bytes_per_token(vocab: usize) -> f64 {
    if vocab <= 1 << 16 { 2.0 } else { 4.0 }
}

impl StorageEstimate {
    /// Seconds by which reading outlasts a step that takes `step_s` without it; 0 where it hides.
    pub fn exposed_s(&self, step_s: f64) -> f64 {
        (self.load.value - step_s).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::{Catalog, Measure};

    #[test]
    fn what_limits_the_rate_is_named_and_more_nodes_help_only_where_nodes_do() {
        let catalog = Catalog::builtin().unwrap();
        let of = |name: &str, n| estimate(&catalog.cluster(name, Some(n)).unwrap(), 175e9, 4e6, 2.0).unwrap();
        let check = |name: &str, limit: StorageLimit, scales: f64| {
            let (few, many) = (of(name, 512), of(name, 1024));
            assert_eq!(few.write_limit, limit, "{name}");
            let ratio = few.write.value / many.write.value;
            assert!((ratio - scales).abs() < 1e-9, "{name}: {ratio}");
        };
        check("meta-24k-roce", StorageLimit::Filesystem, 1.0);
        check("dgx-superpod-h100", StorageLimit::Unit, 2.0);
        check("aws-p5", StorageLimit::Node, 2.0);
    }

    #[test]
    fn loading_shows_only_where_storage_is_slower_than_the_step() {
        let mut cluster = Catalog::builtin().unwrap().cluster("dgx-superpod-h100-4su", None).unwrap();
        let quick = estimate(&cluster, 175e9, 4e6, 2.0).unwrap();
        assert!(quick.load.value < 1e-3 && quick.exposed_s(5.0) == 0.0);
        if let Some(storage) = &mut cluster.storage {
            storage.read_bytes_per_s = Measure::exact(1e6);
        }
        let slow = estimate(&cluster, 175e9, 4e6, 2.0).unwrap();
        assert!((slow.exposed_s(5.0) - 3.0).abs() < 1e-9);
        assert!(slow.load.low <= slow.load.value && slow.load.value <= slow.load.high);
    }

    #[test]
    fn nothing_is_said_of_unknown_storage() {
        let mut cluster = Catalog::builtin().unwrap().cluster("dgx-h100", None).unwrap();
        cluster.storage = None;
        assert_eq!(estimate(&cluster, 1e9, 1e6, 2.0), None);
    }
}
