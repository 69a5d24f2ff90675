//! The executor's whole loop over thousands of ranks, on a device that computes nothing: every op is launched as often
//! as the program says, and every byte is sent that it says. And what a device refuses.

mod common;

use std::any::Any;
use std::collections::HashMap;

use common::inputs;
use program::{Members, Mode, OpId, OpKind, Program, Request};
use spec::{ContextMode, DType, Experts, Latent, Layout, ModelSpec, PipelineSchedule, Zero};
use train::{Executor, Mesh, Null};

/// The ops of a step, each as often as it runs.
fn ops(p: &Program) -> impl Iterator<Item = &program::Op> {
    let items = p.schedule.iter().map(|item| item.block).chain([p.tail]);
    items.flat_map(|block| &p.blocks[block].ops)
}

fn launches(p: &Program) -> HashMap<OpId, u64> {
    let mut all = HashMap::new();
    for op in ops(p).filter(|op| !op.only_talks()) {
        // On a ring with what is at hand between all hops, and before and after; backward gradients join those that come.
        let ring = |parts| if p.layout.cp > 1 { parts } else { 1 };
        let cp = p.layout.cp as u64;
        *all.entry(op.id).or_default() += match op.kind {
            OpKind::RingAttention { .. } => ring(cp + 2),
            OpKind::RingAttentionGrad { .. } => ring(2 * cp + 1),
            _ => 1,
        };
    }
    all
}

fn sent_bytes(p: &Program) -> HashMap<Members, u64> {
    let mut all = HashMap::new();
    for comm in ops(p).filter_map(|op| op.comm.as_ref()).filter(|c| !c.messages.is_empty()) {
        let ranks = comm.members.ranks(p.coords, &p.layout);
        let me = ranks.iter().position(|r| *r == p.rank).expect("a member");
        *all.entry(comm.members).or_default() += comm.sent_bytes(me, ranks.len());
    }
    all
}

/// Drives one step of every rank.
fn check(model: &ModelSpec, layout: &Layout, sequence: usize, sequences: usize) {
    for rank in 0..layout.world() {
        let precision = DType::Bf16;
        let request = Request {
            model,
            layout,
            sequence,
            sequences,
            precision,
            rank,
            mode: Mode::Train,
            loss: Default::default(),
            recipe: Default::default(),
        };
        let null = Box::new(Null::default());
        let mut exec = Executor::on(null, &request, Mesh::alone(), false).expect("a program");
        let outputs = exec.step(&inputs(1, 1)).expect("a step");
        assert_eq!((outputs.loss, outputs.grad_norm), (0.0, 0.0));
        let device: &dyn Any = exec.device();
        let null: &Null = device.downcast_ref().expect("a null device");
        assert_eq!(null.launches, launches(&exec.program), "rank {rank} of {layout:?}");
        assert_eq!(null.sent_bytes, sent_bytes(&exec.program), "rank {rank} of {layout:?}");
        assert!(null.under_way.is_empty(), "rank {rank} waits for everything: {:?}", null.under_way);
    }
}

#[test]
fn a_large_model_on_thousands_of_ranks() {
    let model = ModelSpec::preset("llama3-405b").expect("a preset");
    let stages = [vec![7], vec![8; 14], vec![7]].concat();
    let layout = Layout {
        dp: 16,
        tp: 8,
        pp: 16,
        sequence_parallel: true,
        zero: Zero::Optimizer,
        schedule: PipelineSchedule::OneFOneB,
        stage_layers: stages,
        ..Layout::default()
    };
    assert_eq!(layout.world(), 2048);
    check(&model, &layout, 8192, 256);
}

#[test]
fn every_kind_of_layout() {
    let model = common::model(4, true, false);
    for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
        for (schedule, chunks) in [
            (PipelineSchedule::Gpipe, 1),
            (PipelineSchedule::ZeroBubble, 1),
            (PipelineSchedule::Interleaved, 2),
        ] {
            let layout =
                Layout { dp: 8, tp: 2, pp: 2, zero, schedule, chunks, micro_batch: 2, ..Layout::default() };
            check(&model, &layout, common::SEQUENCE, 64);
            check(&model, &Layout { dp: 4, cp: 4, ..layout.clone() }, common::SEQUENCE, 64);
            let context = ContextMode::Heads;
            check(&model, &Layout { dp: 4, cp: 2, context, ..layout }, common::SEQUENCE, 64);
        }
    }
}

/// A small model with four routed experts, with latent attention, or with both.
fn planned(experts: bool, latent: bool) -> ModelSpec {
    let dense = common::model(2, false, false);
    let routed = Experts {
        count: 4,
        top_k: 2,
        ffn: 16,
        shared_ffn: 0,
        dense_layers: 0,
        every: 1,
        router: Default::default(),
    };
    let latents = Latent { query_rank: None, kv_rank: 8, nope_dim: 8, rope_dim: 4, value_dim: 8 };
    let kv_heads = if latent { dense.heads } else { dense.kv_heads };
    ModelSpec { experts: experts.then_some(routed), latent: latent.then_some(latents), kv_heads, ..dense }
}

/// A device that runs everything runs them; so does this machine, as far as kernels go.
#[test]
fn mixtures_and_latents_have_kernels() {
    let (one, ranks) = (Layout::default(), Layout { dp: 2, ep: 2, ..Layout::default() });
    for (experts, latent, layout) in [(false, true, &one), (true, true, &one), (true, true, &ranks)] {
        let model = &planned(experts, latent);
        check(model, layout, common::SEQUENCE, 8);
        let (sequence, sequences, mode, precision) = (common::SEQUENCE, 8, Mode::Train, DType::F32);
        let loss = Default::default();
        let request = Request {
            model,
            layout,
            sequence,
            sequences,
            precision,
            rank: 0,
            mode,
            loss,
            recipe: Default::default(),
        };
        assert!(Executor::new(&request, 1, Mesh::alone(), false).is_ok(), "experts {experts}");
    }
}
