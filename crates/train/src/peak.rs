//! What a rank's device can do at most, which utilisation is a share of.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::device::Device;

/// The best rate of matrix products that was ever seen on this machine.
///
/// One measurement says what other work left of it at that moment: utilisation would differ from start to start, and
/// pass 100 %. So the best is kept beside the data of runs, by processor, threads and instructions, and never lowered.
pub(crate) struct Peak {
    flops_per_s: f64,
    key: String,
    /// Where the best is kept.
    folder: PathBuf,
    /// What is known to be kept there.
    kept: f64,
}

const FILE: &str = "peaks.json";

impl Peak {
    /// Measures `device`, and takes what `folder` has if that is more.
    pub(crate) fn measure(device: &mut dyn Device, folder: &Path) -> Peak {
        let key = match device.kind() {
            "cpu" => {
                let (threads, backend) = (device.threads(), kernels::backend());
                format!("{}, {threads} threads, {backend:?}", crate::host::processor())
            }
            _ => device.name(),
        };
        Peak::of(1e9 * device.peak_gflops(), key, folder)
    }

    fn of(measured: f64, key: String, folder: &Path) -> Peak {
        let kept = read(folder).get(&key).copied().unwrap_or(0.0);
        let mut peak = Peak { flops_per_s: measured.max(kept), key, folder: folder.to_owned(), kept };
        peak.keep();
        peak
    }

    /// FLOP/s.
    pub(crate) fn flops_per_s(&self) -> f64 {
        self.flops_per_s
    }

    /// The share of the peak that a rate is; one that is more raises it.
    pub(crate) fn share(&mut self, flops_per_s: f64) -> f64 {
        if flops_per_s > self.flops_per_s {
            self.flops_per_s = flops_per_s;
        }
        flops_per_s / self.flops_per_s
    }

    /// Keeps the peak for later runs, if it is higher than what they would find. Where that cannot be written they measure.
    pub(crate) fn keep(&mut self) {
        if self.flops_per_s.is_finite() && self.flops_per_s > self.kept && self.write().is_ok() {
            self.kept = self.flops_per_s;
        }
    }

    fn write(&self) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let lock = File::create(self.folder.join("peaks.lock"))?;
        // Another rank writes: what it does not know of this one, the next start measures.
        lock.try_lock().map_err(std::io::Error::other)?;
        let mut all = read(&self.folder);
        let best = all.entry(self.key.clone()).or_insert(0.0);
        *best = best.max(self.flops_per_s);
        let temp = self.folder.join(format!("{FILE}.{}.tmp", std::process::id()));
        let text = serde_json::to_string_pretty(&all)?;
        let written =
            std::fs::write(&temp, text).and_then(|()| std::fs::rename(&temp, self.folder.join(FILE)));
        written.inspect_err(|_| {
            let _ = std::fs::remove_file(&temp);
        })
    }
}

/// What is kept, by processor; a file that cannot be read holds nothing.
fn read(folder: &Path) -> BTreeMap<String, f64> {
    let text = crate::run_dir::read(&folder.join(FILE)).unwrap_or_default();
    let all: BTreeMap<String, f64> = serde_json::from_str(&text).unwrap_or_default();
    all.into_iter().filter(|(_, flops)| flops.is_finite() && *flops > 0.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_kept_and_never_lowered() {
        let folder = tempfile::tempdir().expect("a folder");
        let of = |measured: f64, key: &str| Peak::of(measured, key.to_owned(), folder.path());
        assert_eq!(of(5e9, "a").flops_per_s(), 5e9);
        assert_eq!(of(3e9, "a").flops_per_s(), 5e9, "a start under load");
        assert_eq!(of(3e9, "b").flops_per_s(), 3e9, "another machine");
        let mut peak = of(4e9, "a");
        assert_eq!((peak.share(2.5e9), peak.share(8e9), peak.share(4e9)), (0.5, 1.0, 0.5), "a step beats it");
        assert_eq!(of(1e9, "a").flops_per_s(), 5e9);
        peak.keep();
        assert_eq!(of(1e9, "a").flops_per_s(), 8e9);
        std::fs::write(folder.path().join(FILE), "{\"a\": -1, \"b\"").expect("a damaged file");
        assert_eq!(of(2e9, "a").flops_per_s(), 2e9);
        assert_eq!(of(f64::NAN, "c").flops_per_s(), 0.0, "the first step raises it");
        assert!(!read(folder.path()).contains_key("c"));
    }
}
