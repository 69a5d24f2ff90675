//! The executor's whole loop over thousands of ranks, on a device that computes nothing: every op is launched as often
//! as the program says, and every byte is sent that it says. And what a device refuses.

mod common;

use std::any::Any;
use std::collections::HashMap;
use std::time::Instant;

use common::inputs;
use program::{Members, Mode, Op, OpId, OpKind, Program, Request, Ticket};
use spec::{ContextMode, DType, Experts, Latent, Layout, ModelSpec, PipelineSchedule, Result, RunSpec, Zero};
use train::{Device, Executor, Lack, Launch, Mesh, Message, Null, Operand};

/// The ops of a step, each as often as it runs.
fn ops(p: &Program) -> impl Iterator<Item = &Op> {
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

/// A device that lacks what it has no kernels for, as GPUs do, and keeps to one program.
struct Card(Null);

impl Device for Card {
    fn kind(&self) -> &'static str {
        "card"
    }

    fn name(&self) -> String {
        "card 0".into()
    }

    fn peak_gflops(&mut self) -> f64 {
        self.0.peak_gflops()
    }

    fn can_run(&self, op: &Op, _: DType) -> Result<(), Lack> {
        match Lack::of(&op.kind) {
            Lack::Dropout | Lack::Average | Lack::QkClip => Err(Lack::of(&op.kind)),
            _ => Ok(()),
        }
    }

    fn workspace_len(&self, op: &Op, p: &Program) -> usize {
        self.0.workspace_len(op, p)
    }

    fn allocate(&mut self, bytes: usize, mesh: &Mesh) -> Result<()> {
        self.0.allocate(bytes, mesh)
    }

    fn allocated_bytes(&self) -> usize {
        self.0.allocated_bytes()
    }

    fn copy_in(&mut self, to: Operand, bytes: &[u8]) -> Result<()> {
        self.0.copy_in(to, bytes)
    }

    fn copy_out(&self, from: Operand, bytes: &mut [u8]) -> Result<()> {
        self.0.copy_out(from, bytes)
    }

    fn clear(&mut self, what: Operand) -> Result<()> {
        self.0.clear(what)
    }

    fn copy(&mut self, from: Operand, to: Operand) -> Result<()> {
        self.0.copy(from, to)
    }

    fn sum(&mut self, what: Operand) -> Result<f64> {
        self.0.sum(what)
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        self.0.launch(launch)
    }

    fn say(&mut self, mesh: &mut Mesh, message: &Message<'_>, ticket: Option<Ticket>) -> Result<()> {
        self.0.say(mesh, message, ticket)
    }

    fn end(
        &mut self,
        mesh: &mut Mesh,
        of: (OpId, Ticket),
        over: &mut dyn FnMut(Instant, Instant),
    ) -> Result<()> {
        self.0.end(mesh, of, over)
    }

    fn synchronise(&mut self) -> Result<()> {
        self.0.synchronise()
    }
}

#[test]
fn what_a_device_lacks_of_a_recipe_is_said_before_anything_is_prepared() {
    for (key, without) in [
        ("train.dropout=0.1", "train.dropout=0"),
        ("train.ema=0.9", "train.ema=0"),
        ("optim.qk_clip=50", "optim.qk_clip=0"),
        ("batch.ramp=[4,4,20]", "batch.ramp=[]"),
    ] {
        let run = RunSpec::load(None, &[key.into()], &RunSpec::no_files).expect("a run");
        let e = train::check_run(&Card(Null::default()), &run).expect_err(key);
        let name = key.split('=').next().expect("a key");
        assert!(e.to_string().starts_with(&format!("{name}: card 0 ")), "{e}");
        assert_eq!(e.hint_text(), Some(format!("set {without}, or run.device=cpu").as_str()));
        assert_eq!(e.exit_code(), 2);
        train::check_run(&Null::default(), &run).expect("whoever runs everything runs it");
    }
    let plain = RunSpec::load(None, &[], &RunSpec::no_files).expect("a run");
    train::check_run(&Card(Null::default()), &plain).expect("nothing is lacking");
}
