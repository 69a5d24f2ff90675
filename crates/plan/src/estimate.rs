//! The estimate of a step: time, where it goes, and memory, for one layout on one machine.
//!
//! Time is added up from the tasks of a [`Template`]: kernels by roofline, collectives by the links that their group
//! spans, overlap where the stack's schedule allows it, and the pipeline from its own order.

mod memory;
pub mod parts;
mod replicas;
mod section;
mod step;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use spec::{Cluster, NumberFormat, Optimizer, Result};

use crate::calibration::Constants;
use crate::compute::Chip;
use crate::network::NetworkModel;
use crate::placement::Placement;
use crate::shape::Shape;
use crate::software::{AttentionKernel, Software};
use crate::template::{Key, Template};
pub use replicas::{Among, Said};
use section::{Links, Passes, Timed};
use step::Stages;
pub use step::virtual_layers;

/// What is trained, where, and with what.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The model.
    pub shape: Shape,
    /// The machine.
    pub cluster: Cluster,
    /// The training stack.
    pub software: Software,
    /// What the stack makes of the hardware.
    pub constants: Constants,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// How gradients become updates, and what is kept of them.
    pub optimizer: Updates,
}

/// How gradients become updates, and what is kept beside the optimiser's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Updates {
    /// By which rule.
    pub rule: Optimizer,
    /// An average of the weights over steps is kept.
    pub average: bool,
}

/// Where the time of a step goes on the slowest stage, in seconds; adds up to the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Breakdown {
    /// Matrix products.
    pub gemm_s: f64,
    /// Attention.
    pub attention_s: f64,
    /// Kernels that stream through memory.
    pub stream_s: f64,
    /// Waiting for the host to launch kernels.
    pub host_s: f64,
    /// Tensor-parallel collectives not hidden behind compute.
    pub tensor_s: f64,
    /// Context-parallel exchange not hidden.
    pub context_s: f64,
    /// Expert dispatch not hidden.
    pub expert_s: f64,
    /// Messages between stages not hidden.
    pub pipeline_s: f64,
    /// Stages that wait for others.
    pub bubble_s: f64,
    /// Gradients and parameters between replicas not hidden.
    pub data_s: f64,
    /// The optimiser.
    pub optimizer_s: f64,
    /// Once a step.
    pub step_s: f64,
    /// Waiting for the slowest of many nodes.
    pub straggler_s: f64,
}

/// What sets the pace of a step, where predictions err for reasons of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    /// Kernels, mostly.
    Compute,
    /// The host's launches of short kernels, to more than a tenth.
    Host,
    /// Messages that nothing hides, to more than a quarter.
    Network,
}

impl Pace {
    /// All of them.
    pub const ALL: [Pace; 3] = [Pace::Compute, Pace::Host, Pace::Network];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Pace::Compute => "compute",
            Pace::Host => "host",
            Pace::Network => "network",
        }
    }
}

/// Shares of a step from which the host or messages set its pace.
const HOST_SHARE: f64 = 0.1;
const TALK_SHARE: f64 = 0.25;

impl Breakdown {
    /// Names and values, largest parts of a step.
    pub fn parts(&self) -> [(&'static str, f64); 13] {
        [
            ("gemm", self.gemm_s),
            ("attention", self.attention_s),
            ("memory", self.stream_s),
            ("host", self.host_s),
            ("tensor parallel", self.tensor_s),
            ("context parallel", self.context_s),
            ("expert parallel", self.expert_s),
            ("stage messages", self.pipeline_s),
            ("bubble", self.bubble_s),
            ("data parallel", self.data_s),
            ("optimizer", self.optimizer_s),
            ("step", self.step_s),
            ("stragglers", self.straggler_s),
        ]
    }

    /// What sets the pace of the step.
    pub fn pace(&self) -> Pace {
        let step = self.parts().iter().map(|p| p.1).sum::<f64>();
        let talk = self.tensor_s + self.context_s + self.expert_s + self.pipeline_s + self.data_s;
        if self.host_s > HOST_SHARE * step {
            Pace::Host
        } else if talk > TALK_SHARE * step {
            Pace::Network
        } else {
            Pace::Compute
        }
    }

    /// The part that takes most.
    pub fn bound(&self) -> &'static str {
        self.parts().into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("nothing", |p| p.0)
    }
}

/// Bytes of the accelerator that holds most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MemoryUse {
    /// Parameters in the precision of the products, or in 16 bit if that is less.
    pub params: f64,
    /// Gradients.
    pub grads: f64,
    /// Master weights and moments.
    pub optimizer: f64,
    /// Activations of micro-batches in flight.
    pub activations: f64,
    /// Working set beside them.
    pub working: f64,
    /// What a framework adds: context, communication buffers, fragmentation.
    pub framework: f64,
}

impl MemoryUse {
    /// Names and values.
    pub fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("parameters", self.params),
            ("gradients", self.grads),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("working set", self.working),
            ("framework", self.framework),
        ]
    }

    /// Everything.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|part| part.1).sum()
    }
}

/// An estimated layout.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Time of a step.
    pub step_s: f64,
    /// Model FLOPs utilisation: causal attention at half, no recompute, against the dense peak of the format.
    pub mfu: f64,
    /// Where the time goes.
    pub breakdown: Breakdown,
    /// Where the bytes go.
    pub memory: MemoryUse,
    /// Whether the bytes fit.
    pub fits: bool,
}

impl Estimate {
    /// The step if nothing showed of what replicas say: no other way of sharding is faster.
    pub(crate) fn unspoken_s(&self) -> f64 {
        let busy_s = self.step_s - self.breakdown.straggler_s;
        self.step_s * (1.0 - self.breakdown.data_s / busy_s)
    }
}

/// What layouts under one template share: opaque, from [`Estimator::shared`].
#[derive(Clone, Copy, Debug)]
pub struct Shared(Timed);

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct TimedKey {
    key: Key,
    format: NumberFormat,
}

/// Templates by what they depend on.
pub type Templates = HashMap<Key, Arc<Template>>;

/// Estimates layouts of one problem, remembering what they share.
pub struct Estimator<'a> {
    problem: &'a Problem,
    net: NetworkModel,
    /// For products in the format asked.
    chip: Chip,
    /// For all else: recipes of less than 16 bit keep to bf16 there.
    wide_chip: Chip,
    templates: Templates,
    timed: HashMap<TimedKey, Timed>,
    /// Pipelines played before: layouts that differ in what replicas do alone share theirs.
    played: RefCell<HashMap<PlayedKey, f64>>,
    expert_layers: f64,
    flops: f64,
}

/// Stages, micro-batches, and the bits of the times of virtual stages.
type PlayedKey = (usize, usize, Vec<[u64; 2]>);

impl<'a> Estimator<'a> {
    /// An estimator for layouts whose matrix products are in `format`.
    ///
    /// # Errors
    /// If the catalogue states no peak of the format for the accelerator.
    pub fn new(problem: &'a Problem, format: NumberFormat) -> Result<Self> {
        let accelerator = &problem.cluster.accelerator;
        let chip = Chip::of(accelerator, format)?;
        let wide_chip =
            if format.bytes() < 2.0 { Chip::of(accelerator, accelerator.sixteen_bit())? } else { chip };
        let tokens = problem.sequences as f64 * problem.sequence as f64;
        Ok(Estimator {
            net: NetworkModel { one_ring: problem.software.one_ring, ..NetworkModel::of(&problem.cluster) },
            chip,
            wide_chip,
            templates: HashMap::new(),
            timed: HashMap::new(),
            played: RefCell::default(),
            expert_layers: problem.shape.expert_layers() as f64,
            flops: problem.shape.flops_per_token(problem.sequence as f64, true) * tokens,
            problem,
        })
    }

    pub(crate) fn problem(&self) -> &'a Problem {
        self.problem
    }

    /// Uses templates folded before: they do not depend on machines or constants.
    #[must_use]
    pub fn with_templates(mut self, templates: Templates) -> Self {
        self.templates = templates;
        self
    }

    /// The templates folded so far.
    pub fn templates(self) -> Templates {
        self.templates
    }

    fn key(&self, placement: &Placement) -> Key {
        Key {
            whole_layers: self.problem.software.recompute_whole_layers,
            stops_early: self.problem.software.recompute_stops_early,
            unfused_attention: self.problem.software.attention == AttentionKernel::Unfused,
            precision: placement.precision(),
            ..Key::of(&placement.layout, self.problem.sequence)
        }
    }

    /// Estimates one layout.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn estimate(&mut self, placement: &Placement) -> Result<Estimate> {
        let timed = self.timed(placement)?;
        Ok(self.combine(placement, &timed))
    }

    /// What all layouts share that differ from `placement` only in dp, pp, schedule, chunks, ZeRO stage and placement.
    ///
    /// # Errors
    /// If the model does not allow the layout.
    pub fn shared(&mut self, placement: &Placement) -> Result<Shared> {
        Ok(Shared(self.timed(placement)?))
    }

    /// Estimates one layout from what it shares with others.
    pub fn estimate_shared(&self, placement: &Placement, shared: &Shared) -> Estimate {
        self.combine(placement, &shared.0)
    }

    /// A time that no estimate of this layout is below, and its bytes: compute of the fullest stage, once for each
    /// micro-batch, without communication, bubble, host or optimiser.
    pub fn bound(&self, placement: &Placement, shared: &Shared) -> (f64, f64) {
        let t = &shared.0;
        let stages = Stages::of(self.problem, placement, self.expert_layers);
        let compute = |s: &Passes| s.forward.compute() + s.backward.compute();
        let stage_s = stages.per_layer(compute(&t.layer), compute(&t.expert_layer));
        (stage_s * stages.micro_batches, self.memory(placement, t, &stages).total())
    }

    /// Compute of one micro-batch on the mean layer, in seconds: the same whatever the size of the machine.
    pub(crate) fn layer_s(&self, shared: &Shared) -> f64 {
        let compute = |s: &Passes| s.forward.compute() + s.backward.compute();
        let with_experts = self.expert_layers / self.problem.shape.model.layers as f64;
        (1.0 - with_experts) * compute(&shared.0.layer) + with_experts * compute(&shared.0.expert_layer)
    }

    fn template(&mut self, placement: &Placement) -> Result<Arc<Template>> {
        let key = self.key(placement);
        if let Some(known) = self.templates.get(&key) {
            return Ok(Arc::clone(known));
        }
        let built = Arc::new(Template::build(&self.problem.shape, &key)?);
        self.templates.insert(key, Arc::clone(&built));
        Ok(built)
    }

    fn timed(&mut self, placement: &Placement) -> Result<Timed> {
        let key = self.key(placement);
        let timed_key = TimedKey { key, format: placement.format };
        if let Some(timed) = self.timed.get(&timed_key) {
            return Ok(*timed);
        }
        let template = self.template(placement)?;
        let links = Links::of(&self.problem.cluster, &self.net, placement);
        let timed = Timed {
            embed: self.passes(&template.embed, placement, &links),
            layer: self.passes(&template.layer, placement, &links),
            expert_layer: template
                .expert_layer
                .as_ref()
                .map(|s| self.passes(s, placement, &links))
                .unwrap_or_default(),
            head: self.passes(&template.head, placement, &links),
            tied: template.tied_params,
            boundary: template.boundary_bytes,
        };
        self.timed.insert(timed_key, timed);
        Ok(timed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_set_by_what_takes_more_than_its_share() {
        let check = |host_s, data_s, expected| {
            let rest = Breakdown { gemm_s: 1.0 - host_s - data_s, host_s, data_s, ..Breakdown::default() };
            assert_eq!(rest.pace(), expected, "host {host_s}, messages {data_s}");
        };
        check(0.05, 0.2, Pace::Compute);
        check(0.15, 0.2, Pace::Host);
        check(0.05, 0.3, Pace::Network);
        check(0.15, 0.3, Pace::Host);
        check(HOST_SHARE, 0.0, Pace::Compute);
        check(0.0, TALK_SHARE, Pace::Compute);
        assert_eq!(Breakdown::default().pace(), Pace::Compute);
    }

    /// A layer is of the kind that all are, or the mean of both kinds.
    #[test]
    fn the_mean_layer_is_of_both_kinds() {
        let check = |model: &str, with_experts: f64| {
            let problem = Problem {
                shape: crate::models::find(model).unwrap(),
                cluster: spec::Catalog::builtin().unwrap().cluster("dgx-h100", Some(8)).unwrap(),
                software: Software::named("megatron-core-2024").unwrap(),
                constants: crate::calibration::PRIOR,
                sequence: 2048,
                sequences: 64,
                optimizer: Updates::default(),
            };
            let mut estimator = Estimator::new(&problem, NumberFormat::Bf16).unwrap();
            let placement = Placement::of(spec::Layout { dp: 8, ..Default::default() }, NumberFormat::Bf16);
            let shared = estimator.shared(&placement).unwrap();
            let sum = |t: &section::Times| t.gemm + t.attention + t.stream;
            let of = |p: &Passes| sum(&p.forward) + sum(&p.backward);
            let (dense, experts) = (of(&shared.0.layer), of(&shared.0.expert_layer));
            let expected = dense + with_experts * (experts - dense);
            assert!(expected > 0.0 && (estimator.layer_s(&shared) / expected - 1.0).abs() < 1e-12, "{model}");
        };
        check("llama3-8b", 0.0);
        check("mixtral-8x7b", 1.0);
        check("deepseek-v3", 58.0 / 61.0);
    }

    /// Messages stretch with the stragglers that the rest waits for.
    #[test]
    fn a_step_without_what_replicas_say() {
        let breakdown = Breakdown { gemm_s: 4.0, data_s: 4.0, straggler_s: 2.0, ..Breakdown::default() };
        let memory = MemoryUse::default();
        let estimate = Estimate { step_s: 10.0, mfu: 0.4, breakdown, memory, fits: true };
        assert_eq!(estimate.unspoken_s(), 5.0);
    }
}
