//! What the system says of this machine and of the time.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// Memory of this machine, if the system says.
pub fn memory_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))?;
    Some(kib.parse::<usize>().ok()? << 10)
}

/// Microseconds since 1970, as this machine's clock says. Nothing may depend on its being right, or on its not jumping.
pub fn now_us() -> u64 {
    let us = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX));
    us.saturating_add_signed(wrong_by_us())
}

/// Names a file that holds by how many seconds the clock is wrong: a drill, of which `phalanx chaos` makes use.
const CLOCK_DRILL: &str = "PHALANX_CLOCK_DRILL";

fn wrong_by_us() -> i64 {
    static FILE: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| std::env::var_os(CLOCK_DRILL).map(PathBuf::from));
    let text = FILE.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
    let seconds = text.and_then(|text| text.trim().parse::<i64>().ok()).unwrap_or(0);
    seconds.saturating_mul(1_000_000)
}

/// This machine's name.
pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".into(), |h| h.trim().to_owned())
}

/// Model of this machine's processor, or its architecture.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
