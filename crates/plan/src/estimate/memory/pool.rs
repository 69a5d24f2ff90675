//! Bytes of the pool that an eager stack's allocator grows to.

use spec::{PipelineSchedule, Recompute, Zero};

use crate::placement::Placement;
use crate::shape::Shape;
use crate::software::Pool;

use super::super::section::Timed;
use super::super::step::Stages;
use super::super::{Estimator, MemoryUse};
use super::SUM_BYTES;

/// What one stage of a pipeline holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    layers: usize,
    embed: bool,
    head: bool,
}

impl Estimator<'_> {
    /// The pool of the fullest stage.
    ///
    /// Capacities in the catalogue are what is sold: of an H100's 80 GB the driver offers 81,559 MiB, and the context,
    /// NCCL's buffers and code live in those 5 GB more. What counts against the capacity is the pool.
    pub(super) fn pooled(&self, placement: &Placement, t: &Timed, stages: &Stages, pool: &Pool) -> MemoryUse {
        let shape = &self.problem.shape;
        let of = |(stage, held): (usize, Held)| self.pool_of(placement, t, stages, pool, stage, held);
        let all = deal(shape, placement).into_iter().enumerate().map(of);
        all.max_by(|a, b| a.total().total_cmp(&b.total())).unwrap_or_default()
    }

    fn pool_of(
        &self,
        placement: &Placement,
        t: &Timed,
        stages: &Stages,
        pool: &Pool,
        stage: usize,
        held: Held,
    ) -> MemoryUse {
        let (l, model) = (&placement.layout, &self.problem.shape.model);
        let weight = placement.precision().bytes() as f64;
        let tokens = (l.micro_batch * self.problem.sequence / l.cp) as f64;
        let share = held.layers as f64 / stages.most.max(1.0);
        let own = |embed: f64, head: f64| {
            f64::from(u8::from(held.embed)) * embed + f64::from(u8::from(held.head)) * head
        };
        // A tied table is one where embedding and head meet.
        let tied = if held.embed { 0.0 } else { t.tied };
        let dense = share * stages.per_layer(t.layer.params, t.expert_layer.params)
            + own(t.embed.params, t.head.params + tied);
        let experts = share * stages.per_layer(0.0, t.expert_layer.expert_params);
        let params = dense + experts;
        let (shard, expert_shard) = (l.shards() as f64, l.expert_shards() as f64);
        let over = |from: Zero| if l.zero >= from { dense / shard + experts / expert_shard } else { params };

        let gate = if pool.gate_kept && model.activation.gated() && l.recompute != Recompute::Full {
            weight * tokens * (model.ffn / l.tp) as f64 * held.layers as f64
        } else {
            0.0
        };
        let kept = share * stages.per_layer(t.layer.kept, t.expert_layer.kept) + gate;
        let (behind, micro_batches) = ((l.pp - stage) as f64, stages.micro_batches);
        let in_flight = match l.schedule {
            PipelineSchedule::Gpipe => micro_batches,
            _ if l.chunks > 1 => super::interleaved(l.pp as f64, l.chunks as f64).min(micro_batches),
            _ => behind.min(micro_batches),
        };
        let activations = in_flight * kept;
        // When backward begins all that is kept is there, and the loss; when it ends one micro-batch is gone and all
        // gradients in 16 bit are there, to be added to their sums.
        let logits = own(0.0, pool.logit_bytes * tokens * (model.vocab / l.tp) as f64);
        let layer = t.layer.working.max(t.expert_layer.working);
        let peak = (activations + logits.max(layer)).max(activations - kept + weight * params);
        let gathers =
            if l.tp > 1 { pool.gather_buffers * weight * tokens * model.hidden as f64 } else { 0.0 };
        let replicas = l.replicas() > 1;
        let buckets = if l.zero == Zero::Off && replicas { pool.bucket_bytes * params } else { 0.0 };
        let anew = if l.zero > Zero::Off && replicas { pool.gathered_anew * weight * params } else { 0.0 };
        MemoryUse {
            params: weight * over(Zero::Parameters),
            grads: SUM_BYTES * over(Zero::Gradients) + buckets,
            optimizer: SUM_BYTES * self.optimizer_states(placement.precision()) * over(Zero::Optimizer)
                - share * self.second_moments_spared(placement, t, stages),
            activations,
            working: peak - activations + gathers + anew,
            framework: pool.fixed_bytes + pool.fragmentation * peak,
        }
    }
}

/// Which layers and ends each stage holds where blocks are dealt by their products: a stage takes blocks up to the first
/// that passes its share of the sum. Given layers are taken as given.
fn deal(shape: &Shape, placement: &Placement) -> Vec<Held> {
    let (l, model) = (&placement.layout, &shape.model);
    let mut stages = vec![Held::default(); l.pp];
    stages[0].embed = true;
    if l.stage_layers.len() == l.pp * l.chunks {
        for (chunk, layers) in l.stage_layers.iter().enumerate() {
            stages[chunk % l.pp].layers += layers;
        }
        stages[l.pp - 1].head = true;
        return stages;
    }
    let layer = model.hidden * (4 * model.heads * model.head_dim + 3 * model.ffn);
    let head = model.vocab * model.hidden;
    let whole = model.layers * layer + head;
    let (mut stage, mut sum) = (0, 0);
    for block in 0..=model.layers {
        let is_head = block == model.layers;
        if is_head {
            stages[stage].head = true;
        } else {
            stages[stage].layers += 1;
        }
        sum += if is_head { head } else { layer };
        if sum * l.pp > whole * (stage + 1) {
            stage += 1;
        }
    }
    stages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::{Sizes, dense};
    use spec::{Layout, NumberFormat};

    /// By the rule of `build_model` in nanotron's source, worked out by hand for the first.
    #[test]
    fn stages_take_blocks_up_to_the_first_that_passes_their_share() {
        let check = |pp: usize, layers: &[usize]| {
            let sizes = Sizes {
                layers: 16,
                hidden: 2048,
                ffn: 8192,
                heads: 32,
                kv_heads: 32,
                head_dim: 64,
                vocab: 131_072,
                gated: true,
                tied: true,
            };
            let layout = Layout { pp, ..Layout::default() };
            let shape = Shape::from_model(dense("", sizes));
            let stages = deal(&shape, &Placement::of(layout, NumberFormat::Bf16));
            assert_eq!(stages.iter().map(|s| s.layers).collect::<Vec<_>>(), layers);
            assert!(stages[0].embed && stages.iter().filter(|s| s.head).count() == 1);
        };
        // A layer has 67 million products a token, the head 268: as many as four layers, so that shares are ten each.
        check(2, &[11, 5]);
        check(4, &[6, 5, 5, 0]);
        check(1, &[16]);
    }
}
