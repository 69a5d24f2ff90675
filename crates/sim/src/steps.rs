//! What one rank of a stage does in a step: passes as lists of ops, from the pieces that `plan` has timed.

mod replicas;

use plan::estimate::parts::{Piece, SectionParts, StepParts};
use plan::network::{Collective, Extent, Traffic, traffic};
use plan::placement::Placement;
use plan::software::Software;
use plan::template::{Reads, TalkAxis};
use program::{Pass, Work, orders};
use spec::{ModelSpec, Zero};

use crate::clock::{Ticks, ticks};
use crate::mesh::Axis;

/// One thing that a rank's main stream does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Op {
    /// A kernel.
    Compute(Kernel, Ticks),
    /// Hands a message to its stream and goes on.
    Start(Stream, usize),
    /// Goes on when at most so many messages of the stream are under way.
    Wait(Stream, usize),
    /// Goes on when the host has launched all kernels of this pass.
    Launched(Host),
}

/// What a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    Product,
    Attention,
    Memory,
    Optimizer,
}

impl Kernel {
    fn of(piece: &Piece) -> Self {
        match piece {
            Piece::Gemm { .. } => Kernel::Product,
            Piece::Attention { .. } => Kernel::Attention,
            Piece::Stream { .. } | Piece::Talk { .. } => Kernel::Memory,
        }
    }
}

/// What the host does for a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Host {
    /// Launches kernels for so long.
    pub(crate) launches: Ticks,
    /// And for members of groups, which nothing hides.
    pub(crate) members: Ticks,
    /// The pass waits for messages between nodes for so long, which lets the host catch up.
    pub(crate) far: Ticks,
}

impl Host {
    /// How long a pass takes whose kernels and messages take `busy`: host and accelerator hide each other but where
    /// they are about as fast, as the estimator has it.
    pub(crate) fn pass(self, busy: Ticks) -> Ticks {
        let uneven = (self.launches as f64).hypot(busy.saturating_sub(self.far) as f64).round() as Ticks;
        uneven.max(busy).max(self.launches + self.members)
    }
}

/// Messages of one stream follow each other; streams run beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Tensor parallel.
    Tensor,
    /// Context parallel.
    Context,
    /// Experts.
    Expert,
    /// Replicas.
    Data,
    /// To the next stage.
    Next,
    /// To the stage before.
    Before,
}

/// How many there are.
pub(crate) const STREAMS: usize = 6;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Message {
    pub(crate) axis: Axis,
    pub(crate) what: Collective,
    pub(crate) traffic: Traffic,
}

/// One piece of a stage's work, with the messages from other stages that it needs and that it makes.
#[derive(Clone, Debug)]
pub(crate) struct StagePass {
    /// What it works on; none before and after all of them.
    pub(crate) work: Option<Work>,
    /// Ops, shared by all passes alike: an index into [`StageSteps::lists`].
    pub(crate) list: usize,
    /// The message that it waits for: (backward, chunk of this stage, micro-batch).
    pub(crate) needs: Option<Slot>,
    /// Where its outcome goes.
    pub(crate) makes: Option<Slot>,
}

/// Which message between stages, as the stage that gets it knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) backward: bool,
    pub(crate) chunk: usize,
    pub(crate) micro_batch: usize,
}

/// The step of every rank of one stage.
#[derive(Clone, Debug)]
pub(crate) struct StageSteps {
    pub(crate) passes: Vec<StagePass>,
    pub(crate) lists: Vec<Vec<Op>>,
    pub(crate) messages: Vec<Message>,
    /// The message that hands an activation or a gradient on.
    pub(crate) boundary: Traffic,
    /// Whether a stage goes on while what it made travels.
    pub(crate) sends_beside: bool,
}

/// What the streams of a layout may do beside each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beside {
    gathers: bool,
    scatters: bool,
    experts: bool,
    grads: bool,
    params: bool,
    stages: bool,
}

impl Beside {
    pub(crate) fn of(software: &Software, placement: &Placement, tp_domains: f64, ep_domains: f64) -> Self {
        use plan::software::Overlap;
        let l = &placement.layout;
        // Between nodes nothing hides: the kernels that do it move data by loads and stores.
        let tensor = software.overlap_tp && l.tp > 1 && tp_domains <= 1.0;
        Beside {
            gathers: tensor && software.overlap_tp_gathers,
            scatters: tensor,
            experts: match software.overlap_experts {
                Overlap::Never => false,
                Overlap::BetweenNodes => ep_domains > 1.0,
                Overlap::Always => true,
            },
            grads: software.overlap_grads,
            params: software.overlap_params,
            stages: software.overlap_p2p && l.chunks > 1,
        }
    }
}

/// Share of an expert dispatch that nothing runs beside: its first pieces (as the estimator has it).
const DISPATCH_SHOWN: f64 = 0.1;

/// The steps of all stages.
pub(crate) fn stages(
    model: &ModelSpec,
    placement: &Placement,
    parts: &StepParts,
    spans: &[Extent],
    beside: Beside,
) -> Vec<StageSteps> {
    let l = &placement.layout;
    let orders = orders(l.schedule, l.pp, l.chunks, parts.micro_batches);
    orders
        .iter()
        .enumerate()
        .map(|(s, order)| Writer::new(model, placement, parts, spans, beside, s).stage(order))
        .collect()
}

/// A unit of parameters: a layer, or a table.
struct Unit<'a> {
    section: &'a SectionParts,
    experts: bool,
    /// A copy of a table that the first stage has too.
    tied: f64,
}

impl Unit<'_> {
    fn held(&self) -> f64 {
        self.section.params + self.tied
    }

    /// Elements that ZeRO 3 gathers for a pass: dense ones, those of experts.
    fn gathered(&self, pass: Pass, split: bool) -> (f64, f64) {
        let of = |reads: &Reads| match pass {
            Pass::Forward => reads.forward,
            Pass::Backward if split => reads.input,
            Pass::Backward => reads.backward,
            Pass::Weight => reads.weight,
        };
        let experts = if self.experts { of(&self.section.expert_reads) } else { 0.0 };
        (of(&self.section.reads), experts)
    }

    fn experts_held(&self) -> f64 {
        if self.experts { self.section.expert_params } else { 0.0 }
    }
}

/// Writes the ops of one stage.
struct Writer<'a> {
    placement: &'a Placement,
    parts: &'a StepParts,
    beside: Beside,
    stage: usize,
    /// Units of each chunk.
    chunks: Vec<Vec<Unit<'a>>>,
    out: StageSteps,
    /// By axis.
    spans: &'a [Extent],
    /// How much longer everything takes.
    pace: f64,
    /// Messages of replicas started after the parameters that the next unit waits for.
    later: usize,
    /// What replicas say after the last pass.
    late: Vec<Op>,
    /// Messages of each bucket of updated parameters, by chunk.
    gathers: Vec<usize>,
}

/// What a pass does for replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Role {
    pass: Pass,
    chunk: usize,
    first: bool,
    /// Gradients are said in this pass, or settled for good.
    last: bool,
    settles: bool,
}

impl<'a> Writer<'a> {
    fn new(
        model: &ModelSpec,
        placement: &'a Placement,
        parts: &'a StepParts,
        spans: &'a [Extent],
        beside: Beside,
        stage: usize,
    ) -> Self {
        let l = &placement.layout;
        let virtuals = l.pp * l.chunks;
        let chunk = |c: usize| {
            let v = c * l.pp + stage;
            let before: usize = parts.virtual_layers[..v].iter().sum();
            let layer = |i: usize| {
                let experts = model.has_experts(i);
                Unit { section: if experts { &parts.expert_layer } else { &parts.layer }, experts, tied: 0.0 }
            };
            let mut units: Vec<Unit<'a>> = (before..before + parts.virtual_layers[v]).map(layer).collect();
            if v == 0 {
                units.insert(0, Unit { section: &parts.embed, experts: false, tied: 0.0 });
            }
            if v + 1 == virtuals {
                let tied = if l.pp > 1 { parts.tied_params } else { 0.0 };
                units.push(Unit { section: &parts.head, experts: false, tied });
            }
            units
        };
        let out = StageSteps {
            passes: Vec::new(),
            lists: Vec::new(),
            messages: Vec::new(),
            boundary: parts.boundary,
            sends_beside: beside.stages,
        };
        let chunks = (0..l.chunks).map(chunk).collect();
        let pace = 1.0 + parts.slowest_node;
        Writer {
            placement,
            parts,
            beside,
            stage,
            chunks,
            out,
            spans,
            pace,
            later: 0,
            late: Vec::new(),
            gathers: Vec::new(),
        }
    }

    fn stage(mut self, order: &[Work]) -> StageSteps {
        let (pp, chunks) = (self.placement.layout.pp, self.placement.layout.chunks);
        let virtuals = pp * chunks;
        let split = order.iter().any(|w| w.pass == Pass::Weight);
        let mut known: Vec<(Role, usize)> = Vec::new();
        let begin = self.begin();
        self.push(begin);
        for work in order {
            let v = work.chunk * pp + self.stage;
            let role = self.role(work);
            let list = match known.iter().find(|k| k.0 == role) {
                Some(k) => k.1,
                None => {
                    let ops = self.pass(role, split);
                    self.out.lists.push(ops);
                    known.push((role, self.out.lists.len() - 1));
                    self.out.lists.len() - 1
                }
            };
            let slot =
                |backward: bool, v: usize| Slot { backward, chunk: v / pp, micro_batch: work.micro_batch };
            let (needs, makes) = match work.pass {
                Pass::Forward => {
                    ((v > 0).then(|| slot(false, v)), (v + 1 < virtuals).then(|| slot(false, v + 1)))
                }
                Pass::Backward => {
                    ((v + 1 < virtuals).then(|| slot(true, v)), (v > 0).then(|| slot(true, v - 1)))
                }
                Pass::Weight => (None, None),
            };
            self.out.passes.push(StagePass { work: Some(*work), list, needs, makes });
        }
        let end = self.end();
        self.push(end);
        self.out
    }

    fn push(&mut self, ops: Vec<Op>) {
        self.out.lists.push(ops);
        let list = self.out.lists.len() - 1;
        self.out.passes.push(StagePass { work: None, list, needs: None, makes: None });
    }

    /// Passes that differ in what they say to replicas are lists of their own.
    fn role(&self, work: &Work) -> Role {
        let last = work.micro_batch + 1 == self.parts.micro_batches;
        let zero = self.placement.layout.zero;
        Role {
            pass: work.pass,
            chunk: work.chunk,
            first: work.pass == Pass::Forward && work.micro_batch == 0,
            last: work.pass != Pass::Forward && (last || zero == Zero::Gradients),
            settles: work.pass != Pass::Forward && last,
        }
    }

    fn time(&self, s: f64) -> Ticks {
        ticks(s * self.pace)
    }

    fn message(&mut self, axis: Axis, what: Collective, traffic: Traffic) -> usize {
        let traffic = Traffic { latency_s: traffic.latency_s * self.pace, ..traffic };
        let message = Message { axis, what, traffic };
        // Layers repeat: few messages differ.
        match self.out.messages.iter().position(|m| *m == message) {
            Some(known) => known,
            None => {
                self.out.messages.push(message);
                self.out.messages.len() - 1
            }
        }
    }

    fn pass(&mut self, role: Role, split: bool) -> Vec<Op> {
        let sharded = self.placement.layout.zero == Zero::Parameters;
        let units = std::mem::take(&mut self.chunks[role.chunk]);
        let mut ops = Vec::new();
        let backwards = role.pass != Pass::Forward;
        let order: Vec<usize> =
            if backwards { (0..units.len()).rev().collect() } else { (0..units.len()).collect() };
        let (mut kernels, mut members, mut far_s) = (0.0, 0.0, 0.0);
        let sharded_params = sharded;
        for (at, &u) in order.iter().enumerate() {
            let unit = &units[u];
            if sharded_params {
                self.gather_ahead(&mut ops, &units, &order, at, role.pass, split);
            }
            let s = unit.section;
            // Rows that weight gradients need again are gathered beside the first of their products.
            let (input, again) = s.input.split_at(s.input.len() - gathers_again(&s.input));
            let lists: &[&[Piece]] = match role.pass {
                Pass::Forward => &[&s.forward],
                Pass::Backward if split => &[input],
                Pass::Backward => &[&s.input, &s.weight],
                Pass::Weight => &[again, &s.weight],
            };
            let of = |by: &[f64; 3]| match role.pass {
                Pass::Forward => by[0],
                Pass::Backward if split => by[1],
                Pass::Backward => by[1] + by[2],
                Pass::Weight => by[2],
            };
            kernels += of(&s.kernels);
            members += of(&s.members);
            far_s += of(&s.far_s);
            let pieces: Vec<Piece> = lists.concat();
            self.pieces(&mut ops, &pieces);
            if sharded && backwards && (role.pass == Pass::Weight || !split) {
                self.scatter(&mut ops, unit, role.settles);
            }
        }
        if self.beside.experts && self.placement.layout.ep > 1 {
            ops.push(Op::Wait(Stream::Expert, 0));
        }
        if self.parts.launch_s > 0.0 {
            ops.push(Op::Launched(Host {
                launches: self.time(kernels * self.parts.launch_s),
                members: self.time(members * self.parts.launch_s),
                far: self.time(far_s),
            }));
        }
        let grads_ready = role.last && if split { role.pass == Pass::Weight } else { backwards };
        if !sharded && role.first && self.gathers_updated() && self.beside.params {
            ops = self.await_buckets(ops, role.chunk);
        }
        if !sharded && grads_ready {
            ops = self.reduce_buckets(ops, &units, role.settles);
        }
        self.chunks[role.chunk] = units;
        ops
    }

    /// Pieces of one unit, in order; what may run beside each other is taken together.
    fn pieces(&mut self, ops: &mut Vec<Op>, pieces: &[Piece]) {
        let mut at = 0;
        while at < pieces.len() {
            let again = gathers(&pieces[at..]);
            let taken = match &pieces[at..] {
                rest if self.beside.gathers && again > 1 => self.gathered_again(ops, rest, again),
                [
                    Piece::Talk { what: Collective::AllGather, axis: TalkAxis::Tp, traffic },
                    product @ Piece::Gemm { .. },
                    ..,
                ] if self.beside.gathers => {
                    self.gathered_product(ops, *traffic, self.compute(product));
                    2
                }
                [
                    product @ Piece::Gemm { .. },
                    Piece::Talk { what: Collective::ReduceScatter, axis: TalkAxis::Tp, traffic },
                    ..,
                ] if self.beside.scatters => {
                    self.scattered_product(ops, *traffic, self.compute(product));
                    2
                }
                [attention @ Piece::Attention { .. }, rest @ ..] => {
                    let ring = rest
                        .iter()
                        .take_while(|p| matches!(p, Piece::Talk { axis: TalkAxis::Cp, .. }))
                        .count();
                    let ring = if self.placement.layout.has_ring() { ring } else { 0 };
                    self.ring(ops, self.compute(attention), &rest[..ring]);
                    1 + ring
                }
                [Piece::Talk { what, axis, traffic }, ..] => {
                    self.talk(ops, *what, *axis, *traffic);
                    1
                }
                [kernel, ..] => {
                    ops.push(Op::Compute(Kernel::of(kernel), self.time(self.compute(kernel))));
                    1
                }
                [] => 0,
            };
            at += taken;
        }
    }

    fn compute(&self, piece: &Piece) -> f64 {
        match *piece {
            Piece::Gemm { product_s, cast_s } => product_s + cast_s,
            Piece::Attention { seconds } | Piece::Stream { seconds } => seconds,
            Piece::Talk { .. } => 0.0,
        }
    }

    fn talk(&mut self, ops: &mut Vec<Op>, what: Collective, axis: TalkAxis, traffic: Traffic) {
        let (stream, group) = match axis {
            TalkAxis::Tp => (Stream::Tensor, Axis::Tensor),
            TalkAxis::Cp => (Stream::Context, Axis::Context),
            TalkAxis::Ep => (Stream::Expert, Axis::Expert),
        };
        if group.size(self.placement) <= 1 {
            return;
        }
        if axis == TalkAxis::Ep && self.beside.experts {
            // Two halves of a micro-batch take turns: one half's tokens travel while the other's are computed.
            let shown = self.message(group, what, part(traffic, DISPATCH_SHOWN));
            let rest = self.message(group, what, part(traffic, 1.0 - DISPATCH_SHOWN));
            ops.extend([Op::Start(stream, shown), Op::Wait(stream, 0), Op::Start(stream, rest)]);
            return;
        }
        let message = self.message(group, what, traffic);
        ops.extend([Op::Start(stream, message), Op::Wait(stream, 0)]);
    }

    /// Pieces of a gather arrive while others are multiplied: nothing runs beside the first.
    fn gathered_product(&mut self, ops: &mut Vec<Op>, traffic: Traffic, product_s: f64) {
        let share = 1.0 / self.placement.layout.tp as f64;
        let first = self.message(Axis::Tensor, Collective::AllGather, part(traffic, share));
        let rest = self.message(Axis::Tensor, Collective::AllGather, part(traffic, 1.0 - share));
        ops.extend([
            Op::Start(Stream::Tensor, first),
            Op::Wait(Stream::Tensor, 0),
            Op::Start(Stream::Tensor, rest),
            Op::Compute(Kernel::Product, self.time(product_s * (1.0 - share))),
            Op::Wait(Stream::Tensor, 0),
            Op::Compute(Kernel::Product, self.time(product_s * share)),
        ]);
    }

    /// Several gathers at once are rows that weight gradients need again: all but the first product wait for one each.
    fn gathered_again(&mut self, ops: &mut Vec<Op>, pieces: &[Piece], count: usize) -> usize {
        for piece in &pieces[..count] {
            if let Piece::Talk { what, traffic, .. } = *piece {
                let message = self.message(Axis::Tensor, what, traffic);
                ops.push(Op::Start(Stream::Tensor, message));
            }
        }
        let (mut taken, mut under_way, mut products) = (count, count, 0);
        for piece in &pieces[count..] {
            match piece {
                Piece::Talk { .. } => break,
                Piece::Gemm { .. } if products > 0 && under_way > 0 => {
                    under_way -= 1;
                    ops.push(Op::Wait(Stream::Tensor, under_way));
                }
                _ => {}
            }
            products += usize::from(matches!(piece, Piece::Gemm { .. }));
            ops.push(Op::Compute(Kernel::of(piece), self.time(self.compute(piece))));
            taken += 1;
        }
        ops.push(Op::Wait(Stream::Tensor, 0));
        taken
    }

    /// Pieces of a product leave while others are multiplied: nothing runs beside the last.
    fn scattered_product(&mut self, ops: &mut Vec<Op>, traffic: Traffic, product_s: f64) {
        let share = 1.0 / self.placement.layout.tp as f64;
        let early = self.message(Axis::Tensor, Collective::ReduceScatter, part(traffic, 1.0 - share));
        let last = self.message(Axis::Tensor, Collective::ReduceScatter, part(traffic, share));
        ops.extend([
            Op::Compute(Kernel::Product, self.time(product_s * share)),
            Op::Start(Stream::Tensor, early),
            Op::Compute(Kernel::Product, self.time(product_s * (1.0 - share))),
            Op::Start(Stream::Tensor, last),
            Op::Wait(Stream::Tensor, 0),
        ]);
    }

    /// A ring of keys and values beside the attention of the piece before.
    fn ring(&mut self, ops: &mut Vec<Op>, attention_s: f64, rounds: &[Piece]) {
        let cp = self.placement.layout.cp as f64;
        let mut beside = Vec::new();
        for round in rounds {
            if let Piece::Talk { what, traffic, .. } = *round
                && cp > 1.0
            {
                let first = self.message(Axis::Context, what, part(traffic, 1.0 / cp));
                ops.extend([Op::Start(Stream::Context, first), Op::Wait(Stream::Context, 0)]);
                beside.push(self.message(Axis::Context, what, part(traffic, 1.0 - 1.0 / cp)));
            }
        }
        ops.extend(beside.iter().map(|m| Op::Start(Stream::Context, *m)));
        ops.push(Op::Compute(Kernel::Attention, self.time(attention_s)));
        if !beside.is_empty() {
            ops.push(Op::Wait(Stream::Context, 0));
        }
    }
}

fn is_gather(piece: &Piece) -> bool {
    matches!(piece, Piece::Talk { what: Collective::AllGather, axis: TalkAxis::Tp, .. })
}

/// How many tensor-parallel gathers these pieces begin with.
fn gathers(pieces: &[Piece]) -> usize {
    pieces.iter().take_while(|p| is_gather(p)).count()
}

/// How many they end with.
fn gathers_again(pieces: &[Piece]) -> usize {
    pieces.iter().rev().take_while(|p| is_gather(p)).count()
}

/// A share of a message.
fn part(t: Traffic, share: f64) -> Traffic {
    Traffic {
        latency_s: t.latency_s * share,
        inside_bytes: t.inside_bytes * share,
        outside_bytes: t.outside_bytes * share,
    }
}
