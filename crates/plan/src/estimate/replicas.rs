//! What replicas of a stage say to each other: gradients, sharded parameters, and the optimiser between.

use spec::{DType, NumberFormat, Zero};

use crate::compute::stream_s;
use crate::network::{Collective, Group, Span, on_span};
use crate::placement::Placement;

use super::memory::SUM_BYTES;
use super::section::{Timed, Times};
use super::step::Stages;
use super::{Breakdown, Estimator};

/// Gradients and parameters travel in so many pieces: the first forward and the last backward cannot hide.
const BUCKETS: f64 = 12.0;
/// Share of the last pass that buckets can travel beside where a stage has one chunk.
const LAST_PASS: f64 = 0.9;
/// Kernels slow down while collectives inside a node run beside them: they share units and memory.
const OVERLAP_TAX: f64 = 0.2;
/// The same between nodes, where ports move most of the data.
const OVERLAP_TAX_FAR: f64 = 0.06;

/// Which ranks hold the same parameters, and how many.
struct Replicas {
    /// Parameters of a rank outside of experts.
    dense: f64,
    /// Parameters of a rank's experts.
    experts: f64,
    /// Ranks with the same dense parameters.
    all: Group,
    /// Those that a parameter is sharded over.
    near: Group,
    /// Those with the same shard.
    far: Group,
    /// Ranks with the same experts.
    expert: Group,
    /// Ranks that a parameter's optimiser state is sharded over: dense, experts.
    owners: (f64, f64),
    /// Bytes of a gradient's element on the wire.
    grad_bytes: f64,
    /// Calls of each collective in one pass.
    calls: f64,
    /// Whether ranks with the same dense parameters lie on several nodes.
    between_nodes: bool,
    /// Time that kernels lose for each second of a collective beside them.
    tax: f64,
}

impl Estimator<'_> {
    fn replicas(&self, placement: &Placement, t: &Timed, stages: &Stages) -> Replicas {
        let p = self.problem;
        let l = &placement.layout;
        let size = l.replicas();
        let shard = placement.shard.clamp(1, size);
        let stride = (placement.dp_stride() / l.cp).max(1);
        let all = Group { size, stride };
        let expert = Group { size: l.expert_replicas().max(1), stride: l.ep };
        let tables = t.embed.params + if l.pp == 1 { t.head.params } else { 0.0 };
        let sharded = l.zero != Zero::Off;
        let between_nodes = self.span(all).domains > 1.0;
        // What is computed in 32 bit is summed in 32 bit.
        let wire =
            p.software.grad_wire_bytes.max(if placement.precision() == DType::F32 { SUM_BYTES } else { 0.0 });
        let dense = stages.per_layer(t.layer.params, t.expert_layer.params) + tables;
        // Megatron sums 16-bit floating point gradients as they are, bfloat16 ones in 32 bit.
        let grad_bytes = if placement.format == NumberFormat::Fp16 { wire.min(2.0) } else { wire };
        let buckets = match (l.zero, p.software.bucket_bytes) {
            (Zero::Off, Some(bytes)) => (dense * grad_bytes / bytes).max(BUCKETS),
            _ => BUCKETS,
        };
        Replicas {
            dense,
            experts: stages.per_layer(0.0, t.expert_layer.expert_params),
            all,
            near: Group { size: shard, stride },
            far: Group { size: size / shard, stride: stride * shard },
            expert,
            owners: if sharded { (shard as f64, expert.size as f64) } else { (1.0, 1.0) },
            grad_bytes,
            calls: if l.zero == Zero::Parameters { units(stages) } else { buckets },
            between_nodes,
            tax: if between_nodes { OVERLAP_TAX_FAR } else { OVERLAP_TAX },
        }
    }

    fn span(&self, group: Group) -> Span {
        Span::of(&self.problem.cluster, &self.net, group)
    }

    fn talk(&self, r: &Replicas, what: Collective, group: Group, bytes: f64) -> f64 {
        let span = self.span(group);
        let span = if self.problem.software.flat_collectives {
            Span { outside_rate: span.outside_rate / span.inside, ..span }
        } else {
            span
        };
        let comm = on_span(&self.net, what, &span, group.size, bytes);
        comm.latency_s * r.calls + (comm.seconds - comm.latency_s) / self.problem.constants.network
    }

    /// Parameters of all units from their shards.
    fn gather_s(&self, placement: &Placement, r: &Replicas) -> f64 {
        self.talk(r, Collective::AllGather, r.near, self.gathered_bytes(placement) * r.dense)
            + self.talk(r, Collective::AllGather, r.expert, self.gathered_bytes(placement) * r.experts)
    }

    /// Gradients, sharded parameters and the optimiser, into `d`. `busy_port_s` of each micro-batch the ports between
    /// nodes carry messages of stages that compute hides: what replicas say has to wait for those.
    pub(super) fn data_parallel(
        &self,
        placement: &Placement,
        t: &Timed,
        stages: &Stages,
        slowest: &(Times, Times, f64),
        busy_port_s: f64,
        d: &mut Breakdown,
    ) {
        let r = self.replicas(placement, t, stages);
        let port_s = if r.between_nodes { busy_port_s } else { 0.0 };
        let free = |t: &Times| ((t.compute() - t.spent).max(0.0) + self.host_wait(t) - port_s).max(0.0);
        let windows = (free(&slowest.0), free(&slowest.1));
        d.data_s = if placement.layout.zero == Zero::Parameters {
            self.sharded_s(placement, &r, stages, windows)
        } else {
            self.replicated_s(placement, &r, stages, windows)
        };
        // Gradient, weight and two moments are read and written in 32 bit, 16-bit weights written beside; the norm reads
        // gradients again.
        let elements = r.dense / r.owners.0 + r.experts / r.owners.1;
        let update = 2.0 * SUM_BYTES * 4.0 + if placement.precision() == DType::F32 { 0.0 } else { 2.0 };
        d.optimizer_s = stream_s(&self.wide_chip, elements * update + SUM_BYTES * (r.dense + r.experts))
            / self.problem.constants.stream.min(1.0);
    }

    /// ZeRO 3: parameters are gathered forward and backward for every micro-batch, gradients scattered; the next
    /// unit's gather runs beside this unit's compute.
    fn sharded_s(&self, placement: &Placement, r: &Replicas, stages: &Stages, windows: (f64, f64)) -> f64 {
        let gather = self.gather_s(placement, r);
        let far = r.grad_bytes * r.dense / r.near.size as f64;
        let scatter = self.talk(r, Collective::ReduceScatter, r.near, r.grad_bytes * r.dense)
            + self.talk(r, Collective::ReduceScatter, r.expert, r.grad_bytes * r.experts)
            + self.talk(r, Collective::AllReduce, r.far, far) / stages.micro_batches;
        let units = units(stages);
        let exposed = |talk: f64, compute: f64| {
            if !self.problem.software.overlap_params {
                return talk;
            }
            talk / units + (talk * (1.0 - 1.0 / units) - compute).max(0.0) + r.tax * talk.min(compute)
        };
        (exposed(gather, windows.0) + exposed(gather + scatter, windows.1)) * stages.micro_batches
    }

    /// ZeRO 0 to 2: gradients are summed in the backward pass of the last micro-batch (ZeRO 2: of each), updated
    /// parameters gathered in the forward pass of the first.
    fn replicated_s(&self, placement: &Placement, r: &Replicas, stages: &Stages, windows: (f64, f64)) -> f64 {
        let l = &placement.layout;
        let software = &self.problem.software;
        let bytes = r.grad_bytes * r.dense;
        let (reduce, gather) = if l.zero == Zero::Off {
            (self.talk(r, Collective::AllReduce, r.all, bytes), 0.0)
        } else {
            let scatter = self.talk(r, Collective::ReduceScatter, r.near, bytes);
            let far = self.talk(r, Collective::AllReduce, r.far, bytes / r.near.size as f64);
            (scatter + far, self.gather_s(placement, r))
        };
        let reduce = reduce + self.talk(r, Collective::AllReduce, r.expert, r.grad_bytes * r.experts);
        let exposed = |talk: f64, window: f64, overlap: bool| {
            if !overlap {
                return talk;
            }
            (talk / BUCKETS).max(talk - window) + r.tax * talk.min(window)
        };
        // With chunks the gradients of early ones are ready while later ones still run.
        let chunks = l.chunks as f64;
        let share = if l.chunks > 1 {
            stages.micro_batches.min(l.pp as f64) * (chunks - 1.0) / chunks
        } else {
            LAST_PASS
        };
        let times = if l.zero == Zero::Gradients { stages.micro_batches } else { 1.0 };
        exposed(reduce, windows.1 * share, software.overlap_grads) * times
            + exposed(gather, windows.0 * share, software.overlap_params)
    }
}

/// Units that parameters are gathered by: the layers and the tables.
fn units(stages: &Stages) -> f64 {
    (stages.most + 1.0).max(2.0)
}
