//! What a compute op is to the tables: kind, shape and work; and its time from measured rates.

use std::collections::HashMap;

use program::{GroupId, NORM_CHUNK, Op, OpKind, Program, View};
use spec::{DType, Error, NormKind, Result};

use crate::experts;
use crate::table::{Conditions, KernelKey, Machine, Sample};

/// An op as the tables know it.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Which kernel runs: the op's kind, with the variant where variants differ much.
    pub kind: &'static str,
    /// Rows, then two sizes: inner and outer width of a product, sequence and width of attention.
    pub shape: [f64; 3],
    /// FLOPs of products and attention, bytes read and written of all others.
    pub work: f64,
}

/// What a compute op's kernel is; `None` for ops in which ranks only talk.
pub fn kernel(op: &Op, p: &Program) -> Option<Kernel> {
    use OpKind::*;
    let rows = |i: usize| op.ins[i].rows as f64;
    let width = |v: View| p.buffer(v.buffer).cols as f64;
    let cols = |i: usize| width(op.ins[i]);
    let storage = p.precision.bytes() as f64;
    let owned = |group: GroupId| p.group_buffers[group.0 as usize].owned.count as f64;
    let (flops, bytes) = (op.cost.flops as f64, op.cost.bytes as f64 * experts::filled(op, p));
    let each = |rows: usize, experts: usize| rows as f64 / experts as f64;
    let (shape, work) = match &op.kind {
        Linear => ([rows(0), cols(0), rows(1)], flops),
        LinearGradInput => ([rows(0), cols(1), cols(0)], flops),
        LinearGradWeight => ([rows(0), cols(1), cols(0)], flops),
        // Rows of an even share, and what is streamed of them.
        GroupedLinear { experts, rows } => ([each(*rows, *experts), cols(0), width(op.outs[0])], flops),
        GroupedLinearGradInput { experts, rows } | GroupedLinearGradWeight { experts, rows, .. } => {
            ([each(*rows, *experts), cols(1), cols(0)], flops)
        }
        Attention { heads, sees }
        | AttentionGrad { heads, sees }
        | RingAttention { heads, sees, .. }
        | RingAttentionGrad { heads, sees, .. } => {
            // Over a window it has the tiles of sequences as long.
            let sequence = sees.window.unwrap_or(p.sequence).min(p.sequence);
            ([rows(0), sequence as f64, (heads.q * heads.dim) as f64], flops)
        }
        // Only the rows that occur are read, not the whole table.
        Embed { .. } => {
            let (n, dim) = (op.outs[0].rows as f64, width(op.outs[0]));
            ([n, dim, rows(1)], 2.0 * n * dim * storage)
        }
        EmbedGrad { .. } => {
            let table = p.group(op.grads[0].group);
            ([rows(1), cols(1), table.rows as f64], bytes)
        }
        // Short sums of a few numbers a row.
        XentCombine { .. } | LossSum { .. } => {
            ([rows(0), cols(0), 1.0], (op.ins[0].rows as f64) * cols(0) * 4.0)
        }
        AdamW { .. } => {
            let each = if p.precision == DType::F32 { ADAMW_BYTES } else { ADAMW_BYTES + 2.0 };
            // Parameters that all fit in a cache are updated faster than those that stream from memory.
            let all: usize = p.group_buffers.iter().map(|b| b.owned.count).sum();
            ([bytes / each, all as f64, 1.0], bytes)
        }
        Orthogonalise { .. } | MuonMomentum { .. } | Muon { .. } => muon(op, p),
        Average { .. } | SwapAverage { .. } | QkClip { .. } => muon(op, p),
        GradNorm => {
            let counted = (0..).map(GroupId).zip(&p.group_buffers).filter(|(_, b)| b.counts);
            let elements = counted.map(|(g, _)| p.share(g).count).sum::<usize>() as f64;
            let sums = p.buffer(p.io.norm_chunks).len() as f64;
            ([elements, NORM_CHUNK as f64, sums], F32 * elements + 2.0 * F64 * sums)
        }
        TieGrads { group } => ([owned(*group), 1.0, 1.0], SUM_BYTES * owned(*group)),
        ShardGrads { bucket } => {
            let elements: f64 = p.buckets[*bucket].grads.iter().map(|(g, _)| owned(*g)).sum();
            ([elements, 1.0, 1.0], SUM_BYTES * elements)
        }
        _ if op.only_talks() => return None,
        Fork { .. } | AttentionCached { .. } | LatentCached { .. } => return None,
        _ => {
            let of = op.ins.first().copied().unwrap_or_else(|| op.outs[0]);
            ([of.rows as f64 * experts::filled(op, p), width(of), 1.0], bytes)
        }
    };
    Some(Kernel { kind: kind(op), shape, work })
}

/// Which kernel of the tables runs an op, or has the rate of what it is made of.
fn kind(op: &Op) -> &'static str {
    use OpKind::*;
    match &op.kind {
        Norm { norm: NormKind::Layer, .. } => "layer_norm",
        NormGradInput { norm: NormKind::Layer } => "layer_norm_grad_input",
        NormGradWeight { norm: NormKind::Layer } => "layer_norm_grad_weight",
        RingAttention { .. } => "attention",
        RingAttentionGrad { .. } => "attention_grad",
        // Alike in what they do to memory.
        SinkGrad { .. } | GroupedBiasGrad { .. } => "bias_grad",
        SwiGlu { .. } => "swiglu",
        SwiGluGrad { .. } => "swiglu_grad",
        Gelu { tanh: false } => "gelu_erf",
        GeluGrad { tanh: false } => "gelu_erf_grad",
        Add if op.ins.len() > 2 => "add_bias",
        Orthogonalise { .. } => "linear_grad_input",
        MuonMomentum { .. } | Muon { .. } | Average { .. } | SwapAverage { .. } => "add",
        QkClip { .. } | LogitMax { .. } => "add",
        SoftCap { .. } => "gelu",
        Dropout { .. } => "add",
        kind => kind.name(),
    }
}

const F32: f64 = 4.0;
const F64: f64 = 8.0;

/// Bytes of an element that AdamW updates: it reads weight, gradient and both moments, and writes all but the gradient; in
/// bf16 the parameter beside its master too.
const ADAMW_BYTES: f64 = 7.0 * F32;

/// Bytes of an element that two in 32 bit become.
const SUM_BYTES: f64 = 3.0 * F32;

/// Shape and work of Muon's ops and of averages: products of about the shape of the largest matrix, and streams.
fn muon(op: &Op, p: &Program) -> ([f64; 3], f64) {
    let OpKind::Orthogonalise { matrices, shares } = &op.kind else {
        let bytes = op.cost.bytes as f64;
        return ([bytes / SUM_BYTES, 1.0, 1.0], bytes);
    };
    let whole = |m: &program::Matrix| m.whole(shares[m.of], p.buffer(op.outs[m.of].buffer).cols);
    // The largest comes first.
    let (rows, cols) = matrices.first().map(whole).unwrap_or_default();
    let (m, n) = (rows.min(cols) as f64, rows.max(cols) as f64);
    ([m, m, n], op.cost.flops as f64)
}

/// Rates of one machine for one storage type and condition, with what was looked up before.
pub struct Rates<'a> {
    machine: &'a Machine,
    storage: String,
    conditions: Conditions,
    seen: HashMap<(&'static str, [u64; 3]), (f64, f64)>,
}

impl<'a> Rates<'a> {
    /// Rates for `storage` under `conditions`.
    pub fn new(machine: &'a Machine, storage: DType, conditions: Conditions) -> Rates<'a> {
        Rates { machine, storage: storage.to_string(), conditions, seen: HashMap::new() }
    }

    /// Seconds of a kernel, and how far its shape is from the nearest that was measured, in factors of two.
    ///
    /// # Errors
    /// If the tables know nothing of its kind.
    pub fn seconds(&mut self, k: &Kernel) -> Result<(f64, f64)> {
        if k.work == 0.0 {
            return Ok((0.0, 0.0));
        }
        let at = (k.kind, k.shape.map(f64::to_bits));
        let (rate, distance) = match self.seen.get(&at) {
            Some(known) => *known,
            None => {
                let (samples, scale) = self.samples(k.kind)?;
                let (rate, distance) = interpolate(samples, k.shape);
                *self.seen.entry(at).or_insert((rate * scale, distance))
            }
        };
        Ok((k.work / rate, distance))
    }

    /// The samples measured under the conditions nearest to these, and what their rates are multiplied by.
    fn samples(&self, kind: &str) -> Result<(&'a [Sample], f64)> {
        let Conditions { threads, beside } = self.conditions;
        let apart = |a: usize, b: usize| (a as f64 / b as f64).log2().abs();
        // A number of threads that was not measured misleads more than a number of ranks, and other storage most.
        let far = |k: &KernelKey| {
            let storage = if k.storage == self.storage { 0.0 } else { 100.0 };
            storage + 4.0 * apart(k.at.threads, threads) + apart(k.at.beside, beside)
        };
        let of_kind = self.machine.kernels.iter().filter(|(k, _)| k.kind == kind);
        let nearest = of_kind.min_by(|(a, _), (b, _)| far(a).total_cmp(&far(b)));
        let (key, samples) = nearest.ok_or_else(|| {
            Error::user(format!("the calibration of {} knows nothing of {kind}", self.machine.host))
                .hint("measure this machine again: phalanx bench machine")
        })?;
        Ok((samples, threads.min(self.machine.cores) as f64 / key.at.threads.min(self.machine.cores) as f64))
    }
}

/// The mean of the logarithms of measured rates, weighted by the inverse fourth power of the distance between shapes
/// in factors of two (Shepard 1968): a measured shape has its measured rate, and every rate counts with the same sign,
/// so that faster samples never make a slower estimate. Also gives the distance to the nearest.
fn interpolate(samples: &[Sample], shape: [f64; 3]) -> (f64, f64) {
    const MEASURED: f64 = 1e-9;
    let (mut sum, mut weights, mut nearest) = (0.0, 0.0, f64::INFINITY);
    for s in samples {
        let apart = |i: usize| (s.shape[i].max(1.0) / shape[i].max(1.0)).log2();
        let d2: f64 = (0..3).map(|i| apart(i) * apart(i)).sum();
        if d2 < MEASURED {
            return (s.per_s, 0.0);
        }
        nearest = d2.min(nearest);
        let weight = 1.0 / (d2 * d2);
        sum += weight * s.per_s.ln();
        weights += weight;
    }
    ((sum / weights).exp(), nearest.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rows: f64, per_s: f64) -> Sample {
        Sample { shape: [rows, 64.0, 64.0], per_s }
    }

    #[test]
    fn a_measured_shape_has_its_rate_and_others_lie_between() {
        let samples = [sample(64.0, 1e9), sample(256.0, 4e9), sample(1024.0, 5e9)];
        assert_eq!(interpolate(&samples, [256.0, 64.0, 64.0]), (4e9, 0.0));
        let (rate, distance) = interpolate(&samples, [128.0, 64.0, 64.0]);
        assert!(1e9 < rate && rate < 4e9, "{rate}");
        assert_eq!(distance, 1.0);
        let (far, _) = interpolate(&samples, [1e6, 64.0, 64.0]);
        assert!(far < 5e9, "never beyond what was measured: {far}");
    }

    #[test]
    fn a_faster_sample_never_makes_a_slower_rate() {
        let mut samples = vec![sample(64.0, 1e9), sample(256.0, 4e9), sample(1024.0, 5e9)];
        for rows in [10.0, 70.0, 128.0, 300.0, 5000.0] {
            let before = interpolate(&samples, [rows, 64.0, 64.0]).0;
            for i in 0..3 {
                samples[i].per_s *= 2.0;
                assert!(interpolate(&samples, [rows, 64.0, 64.0]).0 > before, "{rows} {i}");
                samples[i].per_s /= 2.0;
            }
        }
    }
}
