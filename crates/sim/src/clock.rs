//! Virtual time: whole picoseconds, so that no outcome depends on the order of a sum.

/// A moment or a duration in picoseconds. A `u64` of them is 213 days.
pub type Ticks = u64;

/// Ticks of a second.
pub(crate) const TICKS_PER_S: f64 = 1e12;

/// Nearest ticks of `seconds`; nothing is shorter than none or longer than can be counted.
pub fn ticks(seconds: f64) -> Ticks {
    (seconds * TICKS_PER_S).round() as Ticks
}

/// Seconds of so many ticks.
pub fn seconds(ticks: Ticks) -> f64 {
    ticks as f64 / TICKS_PER_S
}

/// Speed of a rank's kernels in millionths of the usual.
pub type Speed = u64;

/// The usual speed.
pub const USUAL: Speed = 1_000_000;
