use std::collections::{BTreeMap, BTreeSet};

use program::{
    ALIGN, BlockWork, BufferId, Collective, Home, Loss, Mode, Pass, Phase, Place, Program, Replication,
    Request,
};
use spec::{ExpertRows, Layout, Recompute, Reduce, Result, Tolerance, lcm};

use super::tasks::tasks;
use super::{Hidden, Key, Reads, Section};
use crate::shape::Shape;

/// The layer that stands for all.
const FIRST_LAYER: Place = Place::Layer(0);
/// Layers of each of the two stages.
const LAYERS: usize = 2;

/// Programs of a small model whose layers are all of one kind and have the local shapes of the model asked for.
pub(super) struct StandIn {
    /// First of two stages, two layers.
    first: Program,
    /// Last of two stages, with the head.
    last: Option<Program>,
}

impl StandIn {
    /// Layers all with experts, or all without; with the stage that holds the head only if asked for.
    pub(super) fn build(shape: &Shape, key: &Key, experts: bool, head: bool) -> Result<Self> {
        let mut model = shape.model.clone();
        model.experts = model.experts.filter(|_| experts);
        // What windows leave out is taken off afterwards, as a mean over layers.
        model.window = None;
        if let Some(e) = &mut model.experts {
            (e.dense_layers, e.every) = (0, 1);
        }
        let ep = if experts { key.ep } else { 1 };
        let inner = key.tp * key.cp;
        // Frameworks rerun whole layers: their backward is the plain one with the forward pass in front.
        // Norms and activations run again alike in both.
        let whole = key.whole_layers && (key.recompute == Recompute::Full || key.unfused_attention);
        let layout = Layout {
            // As many as the experts' ranks take.
            dp: lcm(ep, inner) / inner,
            tp: key.tp,
            pp: 2,
            cp: key.cp,
            context: key.context,
            ep,
            sequence_parallel: key.sequence_parallel,
            micro_batch: key.micro_batch,
            recompute: if whole { Recompute::None } else { key.recompute },
            reduce: Reduce::Ring,
            expert_rows: ExpertRows::Even,
            ..Layout::default()
        };
        let (mut model, sequence) = Tolerance::ALL.held(&layout, &model, key.sequence);
        model.layers = 2 * LAYERS;
        let program = |rank| {
            let request = Request {
                model: &model,
                layout: &layout,
                sequence,
                sequences: 2 * key.micro_batch * layout.dp,
                precision: key.precision,
                rank,
                mode: Mode::Train,
                // Leaves of equal rows, whatever the model's size.
                loss: Loss::OneSequence,
                recipe: Default::default(),
            };
            Program::build(&request, &|_, _| 0)
        };
        Ok(StandIn {
            first: program(0)?,
            last: if head { Some(program(layout.stage_ranks())?) } else { None },
        })
    }

    pub(super) fn embed(&self) -> Section {
        section(&self.first, Place::Embedding)
    }

    pub(super) fn layer(&self) -> Section {
        let mut s = section(&self.first, FIRST_LAYER);
        s.kept_bytes = self.layer_kept();
        s.working_bytes = self.first.memory.scratch as f64;
        s
    }

    pub(super) fn head(&self) -> Section {
        let Some(last) = &self.last else { return Section::default() };
        let mut s = section(last, Place::Head);
        s.add(section(last, Place::Mtp));
        // With one micro-batch in flight what the layers keep lies in scratch too.
        let kept = LAYERS as f64 * self.layer_kept();
        s.working_bytes = (last.memory.scratch as f64 - kept).max(0.0);
        s
    }

    /// A tied table is the embedding's, on the last stage too.
    pub(super) fn tied_params(&self) -> f64 {
        self.last.as_ref().map_or(0.0, |last| parameters(last, Replication::Data, Place::Embedding))
    }

    /// Bytes of the activation between stages.
    pub(super) fn boundary_bytes(&self) -> f64 {
        let ops = self.first.blocks.iter().flat_map(|b| &b.ops);
        let sent =
            ops.filter_map(|op| op.comm.as_ref()).filter(|c| matches!(c.what, Collective::Send { .. }));
        sent.map(|c| c.bytes() as f64).fold(0.0, f64::max)
    }

    /// Bytes of a slot that hold what the first layer leaves for backward, its output for the next layer among it. All
    /// of a slot is alive when forward ends, so that every place in it is one value's.
    fn layer_kept(&self) -> f64 {
        let mut places = BTreeMap::new();
        for b in self.first.buffers.iter().filter(|b| b.place == FIRST_LAYER) {
            if let Home::Slot { offset, .. } = b.home {
                let bytes = places.entry(offset).or_insert(0);
                *bytes = b.bytes().next_multiple_of(ALIGN).max(*bytes);
            }
        }
        places.into_values().sum::<usize>() as f64
    }
}

fn parameters(p: &Program, replication: Replication, place: Place) -> f64 {
    let groups = p.groups.iter().filter(|g| g.replication == replication && g.key.place == place);
    groups.map(program::ParamGroup::len).sum::<usize>() as f64
}

/// What Muon would orthogonalise of the parameters of `place`.
fn hidden(p: &Program, replication: Replication, place: Place) -> Hidden {
    let of = |g: &&program::ParamGroup| {
        g.replication == replication && g.key.place == place && g.key.role.is_hidden_matrix() && !g.key.bias
    };
    let mut hidden = Hidden::default();
    for group in p.groups.iter().filter(of) {
        for part in &group.parts {
            let elements = (part.rows * part.cols) as f64;
            hidden.elements += elements;
            let flops = |rows| program::newton_schulz_flops(rows, part.global.1) as f64;
            if group.head_rows.is_empty() {
                hidden.spread += elements;
                hidden.flops += flops(part.global.0);
            } else {
                hidden.flops += group.matrix_rows(part).into_iter().map(flops).sum::<f64>();
            }
        }
    }
    hidden
}

/// Elements of parameters that the ops of `place` read, each once a pass.
fn reads(p: &Program, replication: Replication, place: Place) -> Reads {
    let groups: Vec<(BufferId, usize)> = (p.groups.iter().zip(&p.group_buffers))
        .filter(|(g, _)| g.replication == replication)
        .map(|(g, b)| (b.param, g.len()))
        .collect();
    let read = |pass: Pass, phase: &dyn Fn(Phase) -> bool| {
        let blocks = p.schedule.iter().filter(|item| item.micro_batch == 0).map(|item| &p.blocks[item.block]);
        let of_pass =
            blocks.filter(|b| matches!(b.work, BlockWork::Train(w) | BlockWork::TrainLast(w) if w == pass));
        let ops = of_pass.flat_map(|b| &b.ops).filter(|op| op.place == place && phase(op.phase));
        let buffers: BTreeSet<BufferId> = ops.flat_map(|op| &op.ins).map(|v| v.buffer).collect();
        groups.iter().filter(|(id, _)| buffers.contains(id)).map(|(_, len)| len).sum::<usize>() as f64
    };
    Reads {
        forward: read(Pass::Forward, &|_| true),
        backward: read(Pass::Backward, &|_| true),
        input: read(Pass::Backward, &|phase| phase != Phase::Weight),
        weight: read(Pass::Backward, &|phase| phase == Phase::Weight),
    }
}

impl Section {
    /// Takes what another has too, of one stage.
    fn add(&mut self, other: Section) {
        self.forward.extend(other.forward);
        self.input.extend(other.input);
        self.weight.extend(other.weight);
        self.params += other.params;
        self.expert_params += other.expert_params;
        let hidden = |a: &mut Hidden, b: Hidden| {
            a.elements += b.elements;
            a.spread += b.spread;
            a.flops += b.flops;
        };
        hidden(&mut self.hidden, other.hidden);
        hidden(&mut self.expert_hidden, other.expert_hidden);
        let reads = |a: &mut Reads, b: Reads| {
            a.forward += b.forward;
            a.backward += b.backward;
            a.input += b.input;
            a.weight += b.weight;
        };
        reads(&mut self.reads, other.reads);
        reads(&mut self.expert_reads, other.expert_reads);
    }
}

/// The ops of one micro-batch that belong to `place`, by phase, and their parameters.
fn section(p: &Program, place: Place) -> Section {
    let mut s = Section {
        params: parameters(p, Replication::Data, place),
        expert_params: parameters(p, Replication::Expert, place),
        hidden: hidden(p, Replication::Data, place),
        expert_hidden: hidden(p, Replication::Expert, place),
        reads: reads(p, Replication::Data, place),
        expert_reads: reads(p, Replication::Expert, place),
        ..Section::default()
    };
    let first = p.schedule.iter().filter(|item| item.micro_batch == 0);
    for op in first.flat_map(|item| &p.blocks[item.block].ops).filter(|op| op.place == place) {
        let of = match op.phase {
            Phase::Forward => &mut s.forward,
            Phase::Input => &mut s.input,
            Phase::Weight => &mut s.weight,
        };
        of.extend(tasks(p, op));
    }
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the first layer reads is kept in place of what the last one says, and nothing else is, whatever is run again.
    #[test]
    fn a_stage_keeps_nothing_beside_its_layers() {
        for name in ["gpt3-175b", "llama1-65b", "deepseek-v3", "qwen3-30b-a3b"] {
            let shape = Shape::find(name).unwrap().unwrap();
            for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                for (tp, sequence_parallel, cp, micro_batch) in
                    [(1, false, 1, 3), (8, true, 1, 1), (2, false, 2, 2)]
                {
                    let key = Key { tp, sequence_parallel, cp, micro_batch, recompute, ..Key::alone(2048) };
                    for experts in [false, true] {
                        let s = StandIn::build(&shape, &key, experts, false).unwrap();
                        let slot = s.first.slot_regions[0].bytes as f64;
                        assert_eq!(slot, LAYERS as f64 * s.layer_kept(), "{name} {key:?}");
                    }
                }
            }
        }
    }
}
