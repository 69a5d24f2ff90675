//! Bytes of the fullest accelerator.

mod pool;

use spec::sum_tree::prime_factors;
use spec::{DType, Optimizer, PipelineSchedule, Zero};

use crate::placement::Placement;

use super::section::Timed;
use super::step::Stages;
use super::{Estimator, MemoryUse};

/// Context, libraries and communication buffers of one process on a GPU, and what else lives there for good.
const FRAMEWORK_BYTES: f64 = 3e9;
/// The same where a compiler plans all memory ahead.
const COMPILED_BYTES: f64 = 0.5e9;
/// Share of activations lost to fragmentation in caching allocators.
const FRAGMENTATION: f64 = 0.04;
/// Share of what is kept that is left where the inputs of products, about half of it, are kept in 8 bit or less.
const KEPT_LOW: f64 = 0.75;
/// Bytes of a gradient, and of a master weight or a moment.
pub(super) const SUM_BYTES: f64 = 4.0;
/// The unit at work and the next one are gathered whole.
const UNITS_GATHERED: f64 = 2.0;

impl Estimator<'_> {
    pub(super) fn memory(&self, placement: &Placement, t: &Timed, stages: &Stages) -> MemoryUse {
        if let Some(pool) = &self.problem.software.pool {
            return self.pooled(placement, t, stages, pool);
        }
        let l = &placement.layout;
        let micro_batches = stages.micro_batches;
        let both = l.pp == 1;
        let tables =
            if both { t.embed.params + t.head.params } else { t.embed.params.max(t.head.params + t.tied) };
        let dense = stages.per_layer(t.layer.params, t.expert_layer.params) + tables;
        let experts = stages.per_layer(0.0, t.expert_layer.expert_params) + t.head.expert_params;
        let (shard, expert_shard) = (l.shards() as f64, l.expert_shards() as f64);
        let over = |stage: Zero| {
            if l.zero >= stage { dense / shard + experts / expert_shard } else { dense + experts }
        };
        let kept = stages.per_layer(t.layer.kept, t.expert_layer.kept);
        let kept = if placement.format.bytes() < 2.0 { kept * KEPT_LOW } else { kept };
        let (pp, chunks) = (l.pp as f64, l.chunks as f64);
        // A counter over the micro-batches holds one partial sum for each of its digits.
        let sums = if self.problem.software.tree_sums {
            prime_factors(micro_batches as usize).len().max(1) as f64
        } else {
            1.0
        };
        let in_flight = match l.schedule {
            PipelineSchedule::Gpipe => micro_batches,
            _ if l.chunks > 1 => interleaved(pp, chunks).min(micro_batches),
            _ => pp.min(micro_batches),
        };
        let activations = in_flight * kept;
        let weight = placement.precision().bytes() as f64;
        let unit = (dense + experts) / stages.most.max(1.0);
        let gathered = if l.zero == Zero::Parameters { UNITS_GATHERED * weight * unit } else { 0.0 };
        let working = t.layer.working.max(t.expert_layer.working).max(t.head.working) + gathered;
        let framework = if self.chip.systolic {
            COMPILED_BYTES
        } else {
            FRAMEWORK_BYTES + FRAGMENTATION * (activations + working)
        };
        MemoryUse {
            params: weight * over(Zero::Parameters),
            grads: SUM_BYTES * over(Zero::Gradients) * sums,
            optimizer: SUM_BYTES * self.optimizer_states(placement.precision()) * over(Zero::Optimizer)
                - self.second_moments_spared(placement, t, stages),
            activations,
            working,
            framework,
        }
    }

    /// Numbers in 32 bit that are kept for each parameter: two moments, a master of weights in 16 bit, and an average of the
    /// weights if there is one.
    fn optimizer_states(&self, precision: DType) -> f64 {
        let average = if self.problem.optimizer.average { 1.0 } else { 0.0 };
        average + if precision == DType::F32 { 2.0 } else { 3.0 }
    }

    /// Bytes of the second moments that Muon does not keep.
    fn second_moments_spared(&self, placement: &Placement, t: &Timed, stages: &Stages) -> f64 {
        if self.problem.optimizer.rule != Optimizer::Muon {
            return 0.0;
        }
        let l = &placement.layout;
        let (dense, experts) = stages.hidden(t);
        let shares = match l.zero {
            Zero::Off => (1.0, 1.0),
            _ => (l.shards() as f64, l.expert_shards() as f64),
        };
        SUM_BYTES * (dense.elements / shares.0 + experts.elements / shares.1)
    }
}

/// Micro-batches in flight on the first of `pp` stages with `chunks` each.
fn interleaved(pp: f64, chunks: f64) -> f64 {
    (2.0 * (pp - 1.0) + (chunks - 1.0) * pp + 1.0) / chunks
}
