//! A step taken apart: the timed pieces that a player of the program puts onto a clock, where an estimate adds them up.

use spec::Result;

pub use super::replicas::Holders;
use super::section::Links;
use super::step::{Stages, virtual_layers};
use super::{Breakdown, Estimator};
use crate::network::{Collective, Extent, Group, NetworkModel, Traffic};
use crate::placement::Placement;
use crate::template::{LAUNCHES_PER_TASK, Reads, Section, TalkAxis, Task};

/// One kernel with its time, or one collective with what it puts on links.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Piece {
    /// A matrix product.
    Gemm {
        /// The product.
        product_s: f64,
        /// Casting its inputs to a narrow format first.
        cast_s: f64,
    },
    /// Attention.
    Attention {
        /// Its time.
        seconds: f64,
    },
    /// A kernel that streams through memory.
    Stream {
        /// Its time.
        seconds: f64,
    },
    /// Ranks of an axis talk.
    Talk {
        /// What they do.
        what: Collective,
        /// Over which axis.
        axis: TalkAxis,
        /// What each puts on its links.
        traffic: Traffic,
    },
}

/// The pieces of one section of the model for one micro-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SectionParts {
    /// Forward.
    pub forward: Vec<Piece>,
    /// Gradients of activations, and what is recomputed for them.
    pub input: Vec<Piece>,
    /// Gradients of weights.
    pub weight: Vec<Piece>,
    /// Kernels that the host launches: forward, for gradients of activations, for those of weights.
    pub kernels: [f64; 3],
    /// What the host does for the members of groups that talk, likewise.
    pub members: [f64; 3],
    /// Seconds of tensor-parallel messages between nodes, likewise.
    pub far_s: [f64; 3],
    /// Weights of this rank that every data-parallel rank has.
    pub params: f64,
    /// Expert weights of this rank.
    pub expert_params: f64,
    /// Of the former, those that ZeRO 3 gathers for each pass.
    pub reads: Reads,
    /// Of the latter, likewise.
    pub expert_reads: Reads,
}

/// What ranks with the same parameters say to each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReplicaParts {
    /// Ranks with the same dense parameters.
    pub dense: Holders,
    /// Ranks with the same experts.
    pub experts: Holders,
    /// Bytes of a gradient's element on the wire.
    pub grad_bytes: f64,
    /// Bytes of a gathered parameter.
    pub gathered_bytes: f64,
    /// Pieces that gradients and parameters of a pass travel in, unless they go layer by layer.
    pub buckets: f64,
    /// Time that kernels lose for each second of a collective beside them.
    pub tax: f64,
}

/// A step of one layout, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct StepParts {
    /// Token embedding.
    pub embed: SectionParts,
    /// A layer without experts.
    pub layer: SectionParts,
    /// A layer with experts.
    pub expert_layer: SectionParts,
    /// Final norm, output projection and loss.
    pub head: SectionParts,
    /// Weights of a tied table, which a last stage of its own has a second copy of.
    pub tied_params: f64,
    /// Layers of each virtual stage: chunk by chunk, stages within.
    pub virtual_layers: Vec<usize>,
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// What each rank puts on its links to hand an activation to the next stage.
    pub boundary: Traffic,
    /// What replicas say.
    pub replicas: ReplicaParts,
    /// The optimiser, on the rank with most parameters.
    pub optimizer_s: f64,
    /// Once a step.
    pub once_s: f64,
    /// Host time for each kernel; 0 where kernels are not launched one by one.
    pub launch_s: f64,
    /// How much longer everything takes because some node is the slowest, as a share.
    pub slowest_node: f64,
    /// Share of link rates that collectives reach in this stack.
    pub network_share: f64,
    /// Whether collectives use one port of a node at a time.
    pub flat_collectives: bool,
    /// The behaviour of the communication library.
    pub net: NetworkModel,
}

impl Estimator<'_> {
    /// The pieces of a step: what [`Estimator::estimate`] adds up, in the order in which they run.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn parts(&mut self, placement: &Placement) -> Result<StepParts> {
        let timed = self.timed(placement)?;
        let template = self.template(placement)?;
        let p = self.problem;
        let links = Links::of(&p.cluster, &self.net, placement);
        let stages = Stages::of(p, placement, self.expert_layers);
        let r = self.replicas(placement, &timed, &stages);
        let mut once = Breakdown::default();
        let nothing = Default::default();
        self.data_parallel(placement, &timed, &stages, &nothing, 0.0, &mut once);
        let section = |s: &Section| self.section_parts(s, placement, &links);
        // Without sequence parallelism each tensor rank sends its share and the receiver gathers.
        let l = &placement.layout;
        let bytes = if l.sequence_parallel { timed.boundary } else { timed.boundary / l.tp as f64 };
        let span = Extent::of(&p.cluster, &self.net, Group { size: 2, stride: placement.pp_stride() });
        Ok(StepParts {
            embed: section(&template.embed),
            layer: section(&template.layer),
            expert_layer: template.expert_layer.as_ref().map(section).unwrap_or_default(),
            head: section(&template.head),
            tied_params: timed.tied,
            virtual_layers: virtual_layers(p, placement),
            micro_batches: stages.micro_batches.round() as usize,
            boundary: crate::network::traffic(&self.net, Collective::Send, &span, 2, bytes),
            replicas: ReplicaParts {
                dense: r.holders[0],
                experts: r.holders[1],
                grad_bytes: self.wire_bytes(placement),
                gathered_bytes: self.gathered_bytes(placement),
                buckets: r.calls,
                tax: r.tax,
            },
            optimizer_s: once.optimizer_s,
            once_s: p.constants.step_s,
            launch_s: if p.software.eager { p.constants.host_s } else { 0.0 },
            slowest_node: self.slowest_node(placement),
            network_share: p.constants.network,
            flat_collectives: p.software.flat_collectives,
            net: self.net,
        })
    }

    fn section_parts(&self, s: &Section, placement: &Placement, links: &Links) -> SectionParts {
        let pieces =
            |tasks: &[Task]| tasks.iter().map(|t| self.piece(t, placement, links)).collect::<Vec<_>>();
        let (forward, mut input, weight) = (pieces(&s.forward), pieces(&s.input), pieces(&s.weight));
        let loss_s = self.loss(s);
        if loss_s > 0.0 {
            input.insert(0, Piece::Stream { seconds: loss_s });
        }
        let launched = |tasks: &[Task]| tasks.len() as f64 * LAUNCHES_PER_TASK;
        let talks = |pieces: &[Piece], of: &dyn Fn(TalkAxis, &Traffic) -> f64| -> f64 {
            let talk = |p: &Piece| match p {
                Piece::Talk { axis, traffic, .. } => of(*axis, traffic),
                _ => 0.0,
            };
            pieces.iter().map(talk).sum()
        };
        let members = |axis: TalkAxis, _: &Traffic| self.members(links.get(axis).1);
        let far = |axis: TalkAxis, t: &Traffic| {
            let (span, _) = links.get(axis);
            let moving = (t.inside_bytes / span.inside_rate).max(t.outside_bytes / span.outside_rate);
            let between = axis == TalkAxis::Tp && span.domains > 1.0;
            if between { t.latency_s + moving / self.problem.constants.network } else { 0.0 }
        };
        // Frameworks gather whole units, once for each pass.
        let whole = |params| Reads { forward: params, backward: params, input: params, weight: 0.0 };
        let units = self.problem.software.gathers_whole_units;
        SectionParts {
            kernels: [
                launched(&s.forward) + s.launches,
                launched(&s.input) + s.launches,
                launched(&s.weight),
            ],
            members: [&forward, &input, &weight].map(|p| talks(p, &members)),
            far_s: [&forward, &input, &weight].map(|p| talks(p, &far)),
            forward,
            input,
            weight,
            params: s.params,
            expert_params: s.expert_params,
            reads: if units { whole(s.params) } else { s.reads },
            expert_reads: if units { whole(s.expert_params) } else { s.expert_reads },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::software::Software;
    use spec::NumberFormat;

    /// Stages hold as many layers as an estimate says, and all layers are held.
    #[test]
    fn layers_are_dealt_as_they_are_estimated() {
        let check = |software: &str, layers: usize, pp: usize, chunks: usize, expected: &[usize]| {
            let mut shape = crate::models::find("llama3-8b").unwrap();
            shape.model.layers = layers;
            let problem = crate::estimate::Problem {
                shape,
                cluster: spec::Catalog::builtin().unwrap().cluster("dgx-h100", None).unwrap(),
                software: Software::named(software).unwrap(),
                constants: crate::calibration::PRIOR,
                sequence: 8192,
                sequences: 64,
                optimizer: Default::default(),
            };
            let layout = spec::Layout { pp, chunks, ..Default::default() };
            let dealt = virtual_layers(&problem, &Placement::of(layout, NumberFormat::Bf16));
            assert_eq!(dealt, expected, "{software} {layers} {pp} {chunks}");
            assert_eq!(dealt.iter().sum::<usize>(), layers);
        };
        check("megatron-core-2024", 8, 4, 1, &[2, 2, 2, 2]);
        check("megatron-core-2024", 126, 16, 1, &[7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 7]);
        check("megatron-core-2024", 6, 2, 2, &[1, 2, 2, 1]);
        check("megatron-core-2024", 5, 4, 1, &[1, 2, 1, 1]);
        check("megatron-core-2024", 40, 16, 1, &[2, 3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2]);
        // Two ends of four chunks cannot spare eight layers.
        let twos = [&[1][..], &[2; 8], &[1; 7], &[2; 16]].concat();
        check("megatron-core-2024", 56, 16, 2, &twos);
        check("phalanx", 7, 2, 1, &[4, 3]);
        check("phalanx", 7, 2, 2, &[2, 1, 2, 2]);
        check("phalanx", 10, 4, 1, &[2, 3, 3, 2]);
        check("phalanx", 7, 1, 1, &[7]);
    }
}
