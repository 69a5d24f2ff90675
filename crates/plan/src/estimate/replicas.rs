//! What replicas of a stage say to each other: gradients, sharded parameters, and the optimiser between.

use program::Replication;
use spec::{DType, NumberFormat, Optimizer, Zero};

use crate::compute::{gemm_s, stream_s};
use crate::network::{Collective, Extent, Group, on_span};
use crate::placement::Placement;
use crate::template::TalkAxis;

use super::memory::SUM_BYTES;
use super::section::{Links, Timed, Times};
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

/// Which of the ranks with the same parameters talk to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// All of them.
    Replicas,
    /// Those that shard together.
    Shards,
    /// The owners of the same shard.
    Owners,
}

/// What ranks with the same parameters say to each other in a step, over and over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Said {
    /// Whose parameters.
    pub replication: Replication,
    /// Among whom.
    pub among: Among,
    /// How.
    pub what: Collective,
    /// Bytes of the whole vectors; of owners, of the shards of all of them that shard together.
    pub bytes: f64,
    /// How often in a step.
    pub times: f64,
    /// Beside the forward pass, or else the backward one.
    forward: bool,
}

/// Elements of the parameters of one kind that a stage holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Elements {
    /// All shards together.
    held: f64,
    /// Of gradients: a tied table's are two where the order of sums is fixed.
    grads: f64,
    /// What the forward pass of a micro-batch gathers under ZeRO 3.
    forward: f64,
    /// The same of everything behind it.
    backward: f64,
}

/// The layers of a stage and what else it has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    /// Layers without experts.
    pub(super) dense: f64,
    /// Layers with experts.
    pub(super) experts: f64,
    pub(super) embed: bool,
    pub(super) head: bool,
}

/// The ranks with the same parameters of one kind, and where they lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Holders {
    /// All of them.
    pub replicas: Group,
    /// Those that a parameter is sharded over.
    pub shards: Group,
    /// Those with the same shard.
    pub owners: Group,
}

impl Holders {
    /// `size` ranks `stride` apart, so many of which shard together.
    fn of(size: usize, shards: usize, stride: usize) -> Holders {
        Holders {
            replicas: Group { size, stride },
            shards: Group { size: shards, stride },
            owners: Group { size: (size / shards).max(1), stride: stride * shards },
        }
    }
}

/// Everything that a stage's replicas say, and how it travels.
pub(super) struct Replicas {
    /// Of dense parameters, then of experts.
    pub(super) holders: [Holders; 2],
    elements: [Elements; 2],
    said: [[Said; 4]; 2],
    /// Calls of each collective in one pass.
    pub(super) calls: f64,
    /// Whether ranks with the same dense parameters lie on several nodes.
    between_nodes: bool,
    /// Time that kernels lose for each second of a collective beside them.
    pub(super) tax: f64,
}

impl Estimator<'_> {
    /// What the ranks of `stage` that hold the same parameters say to each other in one step.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn replicas_say(&mut self, placement: &Placement, stage: usize) -> spec::Result<Vec<Said>> {
        let t = self.timed(placement)?;
        let stages = Stages::of(self.problem, placement, self.expert_layers);
        let elements = self.elements(placement, &t, stages.share_of(self.problem, placement, stage));
        let said = elements.map(|kind| self.said(placement, kind.0, &kind.1, stages.micro_batches));
        Ok(said.into_iter().flatten().filter(|s| s.bytes > 0.0).collect())
    }

    /// Elements of dense parameters and of experts that a stage with so many layers has.
    fn elements(&self, placement: &Placement, t: &Timed, s: Share) -> [(Replication, Elements); 2] {
        let software = &self.problem.software;
        let (embed, head) = (f64::from(u8::from(s.embed)), f64::from(u8::from(s.head)));
        // A stage that has both ends holds a tied table once.
        let (both, copy) = (embed * head, head * (1.0 - embed));
        let layers = |dense: f64, experts: f64| s.dense * dense + s.experts * experts;
        let held = layers(t.layer.params, t.expert_layer.params)
            + embed * t.embed.params
            + head * t.head.params
            + copy * t.tied;
        let experts = layers(0.0, t.expert_layer.expert_params) + head * t.head.expert_params;
        let split =
            placement.layout.schedule == spec::PipelineSchedule::ZeroBubble && placement.layout.pp > 1;
        let dense = if software.gathers_whole_units {
            Elements { held, grads: held, forward: held, backward: held }
        } else {
            let behind = |reads: &crate::template::Reads| reads.behind(split);
            // The head's products are all in the backward pass, so that no pass reads a tied table at both ends.
            let forward = layers(t.layer.reads.forward, t.expert_layer.reads.forward)
                + embed * t.embed.reads.forward
                + head * t.head.reads.forward
                // A module behind the last layer looks up in the embedding too.
                - if self.problem.shape.model.mtp.is_some() { both * t.tied } else { 0.0 };
            let backward = layers(behind(&t.layer.reads), behind(&t.expert_layer.reads))
                + embed * behind(&t.embed.reads)
                + head * behind(&t.head.reads);
            Elements { held, grads: held, forward, backward }
        };
        let dense = Elements { grads: held + if software.tree_sums { both * t.tied } else { 0.0 }, ..dense };
        let (reads, last) = (&t.expert_layer.expert_reads, &t.head.expert_reads);
        let experts = if software.gathers_whole_units {
            Elements { held: experts, grads: experts, forward: experts, backward: experts }
        } else {
            let forward = s.experts * reads.forward + head * last.forward;
            let backward = s.experts * reads.behind(split) + head * last.behind(split);
            Elements { held: experts, grads: experts, forward, backward }
        };
        [(Replication::Data, dense), (Replication::Expert, experts)]
    }

    /// Bytes of a gradient's element on the wire.
    pub(super) fn wire_bytes(&self, placement: &Placement) -> f64 {
        // What is computed in 32 bit is summed in 32 bit.
        let wire = self.problem.software.grad_wire_bytes;
        let wire = wire.max(if placement.precision() == DType::F32 { SUM_BYTES } else { 0.0 });
        // Megatron sums 16-bit floating point gradients as they are, bfloat16 ones in 32 bit.
        if placement.format == NumberFormat::Fp16 { wire.min(2.0) } else { wire }
    }

    /// What the ranks with the same parameters of one kind say.
    fn said(
        &self,
        placement: &Placement,
        replication: Replication,
        e: &Elements,
        micro_batches: f64,
    ) -> [Said; 4] {
        let wire = self.wire_bytes(placement);
        let weight = self.gathered_bytes(placement);
        let say =
            |among, what, bytes, times, forward| Said { replication, among, what, bytes, times, forward };
        let silent = say(Among::Replicas, Collective::AllReduce, 0.0, 0.0, false);
        let grads = wire * e.grads;
        let scatter = |times| say(Among::Shards, Collective::ReduceScatter, grads, times, false);
        let owners = say(Among::Owners, Collective::AllReduce, grads, 1.0, false);
        let gather = |elements, times, forward| {
            say(Among::Shards, Collective::AllGather, weight * elements, times, forward)
        };
        match placement.layout.zero {
            Zero::Off => {
                [say(Among::Replicas, Collective::AllReduce, grads, 1.0, false), silent, silent, silent]
            }
            // Updated parameters are gathered once.
            Zero::Optimizer => [scatter(1.0), owners, gather(e.held, 1.0, true), silent],
            Zero::Gradients => [scatter(micro_batches), owners, gather(e.held, 1.0, true), silent],
            Zero::Parameters => [
                scatter(micro_batches),
                owners,
                gather(e.forward, micro_batches, true),
                gather(e.backward, micro_batches, false),
            ],
        }
    }

    pub(super) fn replicas(&self, placement: &Placement, t: &Timed, stages: &Stages) -> Replicas {
        let l = &placement.layout;
        let stride = (placement.dp_stride() / l.cp).max(1);
        let kinds = self.elements(placement, t, stages.fullest(l.pp == 1));
        let holders = [
            Holders::of(l.replicas(), l.shards(), stride),
            Holders::of(l.expert_replicas().max(1), l.expert_shards(), l.ep),
        ];
        let between_nodes = self.span(holders[0].replicas).domains > 1.0;
        let said = kinds.map(|(kind, e)| self.said(placement, kind, &e, stages.micro_batches));
        let buckets = match (l.zero, self.problem.software.bucket_bytes) {
            (Zero::Off, Some(bytes)) => (said[0][0].bytes / bytes).max(BUCKETS),
            _ => BUCKETS,
        };
        Replicas {
            said,
            elements: kinds.map(|kind| kind.1),
            holders,
            calls: if l.zero == Zero::Parameters { units(stages) } else { buckets },
            between_nodes,
            tax: if between_nodes { OVERLAP_TAX_FAR } else { OVERLAP_TAX },
        }
    }

    fn span(&self, group: Group) -> Extent {
        Extent::of(&self.problem.cluster, &self.net, group)
    }

    /// Seconds that all takes of what `of` says yes to.
    fn said_s(&self, r: &Replicas, of: impl Fn(&Said) -> bool) -> f64 {
        let of = |(said, holders): (&[Said; 4], &Holders)| -> f64 {
            let spoken = said.iter().filter(|s| of(s));
            spoken.map(|s| self.talk(r, holders, s) * s.times).sum()
        };
        r.said.iter().zip(&r.holders).map(of).sum()
    }

    fn talk(&self, r: &Replicas, holders: &Holders, s: &Said) -> f64 {
        let (group, bytes) = match s.among {
            Among::Replicas => (holders.replicas, s.bytes),
            Among::Shards => (holders.shards, s.bytes),
            Among::Owners => (holders.owners, s.bytes / holders.shards.size as f64),
        };
        let span = self.span(group);
        let span = if self.problem.software.flat_collectives {
            Extent { outside_rate: span.outside_rate / span.inside, ..span }
        } else {
            span
        };
        let comm = on_span(&self.net, s.what, &span, group.size, bytes);
        let latency_s = if self.problem.software.owners_broadcast && s.what == Collective::AllGather {
            // Each owner's part passes all ranks.
            let (n, k) = (group.size as f64, span.domains);
            n * ((n - k) * self.net.scale_up_step_s + (k - 1.0) * self.net.scale_out_step_s)
        } else {
            comm.latency_s * r.calls
        };
        latency_s + (comm.seconds - comm.latency_s) / self.problem.constants.network
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
        let quiet = |t: &Times| if r.between_nodes { self.quiet_s(placement, t) } else { 0.0 };
        let free =
            |t: &Times| ((t.compute() - t.spent).max(0.0) + quiet(t) + self.host_wait(t) - port_s).max(0.0);
        let windows = (free(&slowest.0), free(&slowest.1));
        let zero = placement.layout.zero;
        d.data_s = if zero == Zero::Parameters {
            self.sharded_s(&r, stages, windows)
        } else {
            self.replicated_s(placement, &r, stages, windows)
        };
        // Gradient, weight and two moments are read and written in 32 bit, 16-bit weights written beside; the norm reads
        // gradients again.
        let owned = |(e, h): (&Elements, &Holders)| {
            e.held / if zero == Zero::Off { 1.0 } else { h.shards.size as f64 }
        };
        let elements: f64 = r.elements.iter().zip(&r.holders).map(owned).sum();
        let held: f64 = r.elements.iter().map(|e| e.held).sum();
        // An average reads weights and itself, and is written.
        let average = if self.problem.optimizer.average { 3.0 * SUM_BYTES } else { 0.0 };
        let update =
            2.0 * SUM_BYTES * 4.0 + average + if placement.precision() == DType::F32 { 0.0 } else { 2.0 };
        d.optimizer_s = stream_s(&self.wide_chip, elements * update + SUM_BYTES * held)
            / self.problem.constants.stream.min(1.0);
        if self.problem.optimizer.rule == Optimizer::Muon {
            d.optimizer_s += self.orthogonalised_s(placement, &r, t, stages);
        }
    }

    /// Seconds in which Muon gathers matrices whole, orthogonalises them in 16 bit and hands updates back. Ranks that
    /// shard take turns with matrices; those of a tensor group each do all of theirs.
    fn orthogonalised_s(&self, placement: &Placement, r: &Replicas, t: &Timed, stages: &Stages) -> f64 {
        let (dense, experts) = stages.hidden(t);
        let width = self.problem.shape.model.hidden as f64;
        let wide = 2.0 * 3.0 * width * width;
        let flop_s = gemm_s(&self.wide_chip, width, width, width, wide) / (2.0 * width.powi(3));
        let tp = Group { size: placement.layout.tp, stride: 1 };
        let mut seconds = 0.0;
        for (kind, holders, tensor) in
            [(dense, &r.holders[0], tp), (experts, &r.holders[1], Group { size: 1, ..tp })]
        {
            let shards = if placement.layout.zero == Zero::Off { 1 } else { holders.shards.size };
            seconds += kind.flops / shards as f64 * flop_s / self.problem.constants.gemm;
            let whole = SUM_BYTES * kind.elements;
            let gathered = SUM_BYTES * kind.spread * tensor.size as f64;
            let said = [
                (Collective::AllGather, Group { size: shards, ..holders.shards }, whole),
                (Collective::ReduceScatter, Group { size: shards, ..holders.shards }, whole),
                (Collective::AllGather, tensor, gathered),
            ];
            for (what, group, bytes) in said {
                let comm = on_span(&self.net, what, &self.span(group), group.size, bytes);
                seconds += comm.latency_s + (comm.seconds - comm.latency_s) / self.problem.constants.network;
            }
        }
        seconds
    }

    /// How long a micro-batch waits for messages inside of nodes: the ports between them are free for replicas meanwhile.
    fn quiet_s(&self, placement: &Placement, t: &Times) -> f64 {
        let links = Links::of(&self.problem.cluster, &self.net, placement);
        let inside = |axis, s: f64| if links.get(axis).0.domains <= 1.0 { s } else { 0.0 };
        inside(TalkAxis::Tp, t.tensor) + inside(TalkAxis::Cp, t.context) + inside(TalkAxis::Ep, t.expert)
    }

    /// ZeRO 3: parameters are gathered forward and backward for every micro-batch, gradients scattered; the next
    /// unit's gather runs beside this unit's compute.
    fn sharded_s(&self, r: &Replicas, stages: &Stages, windows: (f64, f64)) -> f64 {
        let units = units(stages);
        let exposed = |talk: f64, compute: f64| {
            if !self.problem.software.overlap_params {
                return talk;
            }
            talk / units + (talk * (1.0 - 1.0 / units) - compute).max(0.0) + r.tax * talk.min(compute)
        };
        let n = stages.micro_batches;
        let last = |s: &Said| self.problem.software.groups_sum_last && s.among == Among::Owners;
        let forward = exposed(self.said_s(r, |s| s.forward) / n, windows.0);
        let backward = exposed(self.said_s(r, |s| !s.forward && !last(s)) / n, windows.1);
        (forward + backward) * n + self.said_s(r, last)
    }

    /// ZeRO 0 to 2: gradients are summed in the backward pass of the last micro-batch (ZeRO 2: of each), updated
    /// parameters gathered in the forward pass of the first.
    fn replicated_s(&self, placement: &Placement, r: &Replicas, stages: &Stages, windows: (f64, f64)) -> f64 {
        let l = &placement.layout;
        let software = &self.problem.software;
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
        exposed(self.said_s(r, |s| !s.forward) / times, windows.1 * share, software.overlap_grads) * times
            + exposed(self.said_s(r, |s| s.forward), windows.0 * share, software.overlap_params)
    }
}

/// Units that parameters are gathered by: the layers and the tables.
fn units(stages: &Stages) -> f64 {
    (stages.most + 1.0).max(2.0)
}
