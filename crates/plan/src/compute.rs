//! What a kernel takes on an accelerator: a roofline with the efficiency that its shape allows.

use serde::Serialize;
use spec::{Accelerator, Error, MatrixUnits, NumberFormat, Result};

/// Rates of an accelerator for one number format, in FLOP/s and bytes/s.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Chip {
    /// Dense peak of the format.
    pub peak: f64,
    /// The best that large matrix products reach.
    pub matmul: f64,
    /// Memory throughput that long streams reach.
    pub memory: f64,
    /// Units that run output tiles side by side.
    pub units: f64,
    /// Share of a last wave's idle units that libraries put to work.
    pub split: f64,
    /// Fused attention forward at unbounded length: share of the peak by kernels of this generation and by those of
    /// Ampere's.
    pub flash: (f64, f64),
    /// Tokens at which attention reaches half of that.
    pub flash_half: f64,
    /// Whether matrix units take large square tiles (systolic arrays), where waves do not apply.
    pub systolic: bool,
}

/// Share of the rated memory throughput that a long copy reaches (A100, H100 stream tests: 0.88 to 0.93).
const STREAM_SHARE: f64 = 0.9;
/// Share of peak that large matrix products reach where no measurement is in the catalogue: the median of those that are.
const MATMUL_SHARE: f64 = 0.76;
/// Output tiles that libraries choose from: rows, columns, and the rate relative to the largest.
const TILES: [(f64, f64, f64); 4] =
    [(256.0, 128.0, 1.0), (128.0, 128.0, 0.95), (128.0, 64.0, 0.82), (64.0, 64.0, 0.62)];
/// Filling and draining the pipeline of one tile costs as much as this many steps of the inner dim.
const TILE_OVERHEAD_K: f64 = 160.0;
/// Inner dim of the products that measured rates are of (MAMF, ml-engineering): they have the overhead of it in them.
const MEASURED_K: f64 = 16384.0;
/// Lanes of a systolic array: dims are padded to a multiple.
const LANES: f64 = 128.0;
/// Width of a head from which fused attention runs at its full rate (FlashAttention-2 and 3 report 64 and 128 apart).
const WIDE_HEAD: f64 = 96.0;
/// Share of it that narrower heads reach.
const NARROW_HEAD_SHARE: f64 = 0.8;
/// Share of the forward rate that the backward pass reaches: five products for two, and sums over blocks of queries.
const ATTENTION_BACKWARD_SHARE: f64 = 0.85;

/// Share of the rate lost for each factor of two that a dim falls short of [`ALIGNMENT`].
const UNALIGNED: f64 = 0.06;
/// Tensor units are fed best by rows of 128 bytes (NVIDIA's matrix multiplication guide, section 2.1).
const ALIGNMENT: u64 = 64;

/// How many more factors of two `dim` would need.
fn doublings_short(dim: f64) -> f64 {
    let twos = (dim as u64).trailing_zeros().min(ALIGNMENT.trailing_zeros());
    f64::from(ALIGNMENT.trailing_zeros() - twos)
}

impl Chip {
    /// The chip for matrix products in `format`. Formats of less than 16 bit that it lacks run at the rate of its 16 bit:
    /// their values are widened.
    ///
    /// # Errors
    /// If the catalogue states no peak for a format of 16 bit or more.
    pub fn of(accelerator: &Accelerator, format: NumberFormat) -> Result<Self> {
        let family = &accelerator.family;
        let has = |f: &NumberFormat| accelerator.peak(*f).is_some();
        let sixteen = accelerator.sixteen_bit();
        let stated = if has(&format) || format.bytes() >= 2.0 { format } else { sixteen };
        let peak = accelerator.peak(stated).ok_or_else(|| lacks(accelerator, stated))?.value;
        let matmul = accelerator.matmul(stated).or(match stated {
            NumberFormat::Fp16 => accelerator.matmul(NumberFormat::Bf16),
            _ => None,
        });
        // What the chip reaches in 16 bit says what it would reach in another format.
        let known = accelerator.matmul(sixteen).zip(accelerator.peak(sixteen));
        let share = match (family.matmul_share, known) {
            (Some(share), _) => share.value,
            (None, Some((matmul, peak))) => (matmul.value / peak.value).min(MATMUL_SHARE),
            (None, None) => MATMUL_SHARE,
        };
        Ok(Chip {
            peak,
            matmul: matmul.map_or(peak * share, |m| m.value.min(peak)),
            memory: accelerator.memory_bytes_per_s.value * STREAM_SHARE,
            units: accelerator.compute_units.max(1) as f64,
            split: family.tail_filled.value,
            flash: (family.attention.value, family.attention_generic.value),
            flash_half: family.attention_half_tokens.value,
            systolic: family.matrix_units == MatrixUnits::Systolic,
        })
    }

    /// FLOP/s of causal attention, FLOPs at the causal half, over sequences of this length and heads of this width.
    pub fn attention(&self, tuned: bool, sequence: f64, dim: f64, backward: bool) -> f64 {
        let share = if tuned { self.flash.0 } else { self.flash.1 };
        let narrow = if dim < WIDE_HEAD { NARROW_HEAD_SHARE } else { 1.0 };
        let pass = if backward { ATTENTION_BACKWARD_SHARE } else { 1.0 };
        self.peak * share * narrow * sequence / (sequence + self.flash_half) * pass
    }
}

/// The refusal of a format that the catalogue states no peak of.
pub(crate) fn lacks(accelerator: &Accelerator, format: NumberFormat) -> Error {
    let Accelerator { name, .. } = accelerator;
    let sixteen = accelerator.sixteen_bit();
    Error::user(format!("accelerator {name} has no {format} matrix products in the catalogue")).hint(format!(
        "it has {}: try --format {sixteen}; peak.{format} in a --catalog file adds one",
        accelerator.formats()
    ))
}

/// Seconds of a matrix product `[m, k] x [k, n]` whose operands take `bytes` in all.
///
/// Tiles of the output run in waves over the chip's units; the last wave may be part empty, and short inner dims pay
/// for filling each tile's pipeline. The library picks the best tile; memory bounds the rest.
///
/// Large square products reach the measured rates (A100 271, H100 794.5 TFLOP/s; MAMF, ml-engineering):
///
/// ```
/// use plan::compute::{Chip, gemm_s};
/// let catalog = spec::Catalog::builtin()?;
/// for (name, tflops) in [("dgx-a100", 271.0), ("dgx-h100", 794.5)] {
///     let chip = catalog.cluster(name, None)?.accelerator;
///     let chip = Chip::of(&chip, spec::NumberFormat::Bf16).unwrap();
///     let (m, n, k) = (13824.0, 13824.0, 16384.0);
///     let t = gemm_s(&chip, m, n, k, 2.0 * (m * k + k * n + m * n));
///     assert!((2.0 * m * n * k / t / 1e12 / tflops - 1.0).abs() < 0.04);
/// }
/// # Ok::<(), spec::Error>(())
/// ```
pub fn gemm_s(chip: &Chip, m: f64, n: f64, k: f64, bytes: f64) -> f64 {
    if m <= 0.0 || n <= 0.0 || k <= 0.0 {
        return 0.0;
    }
    let streamed = bytes / chip.memory;
    if chip.systolic {
        let pad = |x: f64| (x / LANES).ceil() * LANES;
        return (2.0 * pad(m.min(n)) * m.max(n) * pad(k) / chip.matmul).max(streamed);
    }
    let aligned = 1.0 - UNALIGNED * (doublings_short(n) + doublings_short(k));
    let mut best = f64::INFINITY;
    for (rows, cols, rate) in TILES {
        let tiles = ((m / rows).ceil() * (n / cols).ceil()).min((m / cols).ceil() * (n / rows).ceil());
        let waves = tiles / chip.units;
        // Newer libraries split tiles of a last wave that is part empty over the inner dim: part of the gap remains.
        let waves = waves.ceil() - chip.split * (waves.ceil() - waves);
        let per_wave = 2.0 * rows * cols * (k + TILE_OVERHEAD_K) * chip.units / (chip.matmul * rate);
        best = best.min(waves * per_wave);
    }
    let norm = MEASURED_K / (MEASURED_K + TILE_OVERHEAD_K);
    (best * norm / aligned).max(streamed)
}

/// Seconds of a kernel that only streams `bytes` through memory.
pub fn stream_s(chip: &Chip, bytes: f64) -> f64 {
    bytes / chip.memory
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::Catalog;

    fn chip(name: &str) -> Chip {
        let cluster = Catalog::builtin().unwrap().cluster(name, None).unwrap();
        Chip::of(&cluster.accelerator, cluster.accelerator.sixteen_bit()).unwrap()
    }

    #[test]
    fn small_products_waste_units_and_thin_ones_are_bound_by_memory() {
        let chip = chip("dgx-h100");
        let rate = |m: f64, n: f64, k: f64| {
            2.0 * m * n * k / gemm_s(&chip, m, n, k, 2.0 * (m * k + k * n + m * n)) / chip.peak
        };
        assert!(rate(8192.0, 8192.0, 8192.0) > 0.75);
        assert!(rate(2048.0, 2048.0, 256.0) < 0.5);
        assert!(rate(16.0, 8192.0, 8192.0) < 0.05, "reading the weights takes the time");
        assert!(rate(256.0, 256.0, 8192.0) < 0.2, "a handful of tiles leaves units idle");
    }

    #[test]
    fn never_faster_than_peak_or_memory_and_monotonic_in_both() {
        for name in ["dgx-v100", "dgx-a100", "dgx-b200", "tpu-v5e-pod", "mi300x-node", "gaudi2-node"] {
            let chip = chip(name);
            for m in [1.0, 100.0, 2048.0, 65536.0] {
                for k in [64.0, 4096.0, 53248.0] {
                    let n = 12288.0;
                    let bytes = 2.0 * (m * k + k * n + m * n);
                    let t = gemm_s(&chip, m, n, k, bytes);
                    assert!(t >= 2.0 * m * n * k / chip.peak && t >= bytes / chip.memory, "{name} {m} {k}");
                    let faster = Chip { matmul: chip.matmul * 1.5, memory: chip.memory * 1.5, ..chip };
                    assert!(gemm_s(&faster, m, n, k, bytes) < t);
                }
            }
        }
    }

    #[test]
    fn formats_run_at_their_own_rate_or_are_refused() {
        let catalog = Catalog::builtin().unwrap();
        let peak = |name: &str, format| {
            let chip = catalog.cluster(name, None).unwrap().accelerator;
            Chip::of(&chip, format)
                .map(|c| (c.peak / 1e12).round())
                .map_err(|e| e.hint_text().unwrap().to_owned())
        };
        let h100 = [NumberFormat::Fp32, NumberFormat::Tf32, NumberFormat::Bf16, NumberFormat::Fp8];
        assert_eq!(h100.map(|f| peak("dgx-h100", f).unwrap()), [67.0, 495.0, 989.0, 1979.0]);
        assert_eq!(peak("dgx-v100", NumberFormat::Fp16), Ok(125.0));
        assert_eq!(peak("dgx-v100", NumberFormat::Fp32), Ok(16.0));
        // Nobody measures both 16-bit formats: one stands for the other.
        let a100 = catalog.cluster("dgx-a100", None).unwrap().accelerator;
        assert_eq!(a100.matmul(NumberFormat::Fp16), None);
        let [fp16, bf16] = [NumberFormat::Fp16, NumberFormat::Bf16].map(|f| Chip::of(&a100, f).unwrap());
        assert_eq!(fp16.matmul, bf16.matmul);
        for (name, format) in [
            ("dgx-v100", NumberFormat::Bf16),
            ("dgx-v100", NumberFormat::Tf32),
            ("t4", NumberFormat::Bf16),
            ("tpu-v5e-pod", NumberFormat::Fp32),
        ] {
            let hint = peak(name, format).unwrap_err();
            assert!(hint.starts_with("it has ") && hint.contains("--format "), "{name} {format}: {hint}");
        }
        // Values of fewer bits are widened to what there is in 16.
        assert_eq!(peak("dgx-v100", NumberFormat::Fp8), Ok(125.0));
    }
}
