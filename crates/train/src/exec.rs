//! The executor: a rank's program, op by op, on a device.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use program::{BufferId, Layer, Program, Request, Ticket, When};
use spec::random::mix;
use spec::{Error, ModelSpec, Result};

use crate::ahead;
use crate::cpu::Cpu;
use crate::device::{Device, Stretch, check_ops, check_ramp};
use crate::documents::document_starts;
use crate::launch::{Launch, Operand, Talk, Turn};
use crate::mesh::Mesh;
use crate::null::Null;
use crate::resize::Compiled;
use crate::resolve::{self, Action};
use crate::spans::Spans;
use crate::survive::Pulse;
use crate::tail::{self, not_updated};
use crate::trouble::{Bad, Limits};
use crate::waited::AXES;

/// Runs a rank's program on a device.
pub struct Executor {
    /// What to run.
    pub program: Program,
    /// What each op comes to, by block.
    pub(crate) actions: Vec<Vec<Action>>,
    /// The sum of the losses over all ranks, which is no op of a step.
    pub(crate) eval_sum: Option<Talk>,
    pub(crate) device: Box<dyn Device>,
    pub(crate) mesh: Mesh,
    /// Start and end of every op of a step, when recorded.
    pub spans: Spans,
    /// Time in which this step waited for other ranks, by axis.
    pub(crate) comm_ns: [u64; AXES],
    /// The same by op of each block, since [`Executor::take_waits`].
    pub(crate) op_waits_ns: Vec<Vec<u64>>,
    /// What was run before this program: evaluations take turns with steps of another size.
    pub(crate) other: Option<Compiled>,
    /// Whether the device tells where this rank waited.
    pub(crate) tells_waits: bool,
    /// When the op that yields the gradient norm began.
    pub(crate) norm_start_ns: u64,
    /// The last step failed of something that every rank sees alike.
    pub(crate) failed_alike: bool,
    /// The batch of this rank on its way to the device: tokens, targets, where documents begin, the tokens and targets
    /// behind those; and, which does not go there, [`Executor::behind`].
    pub(crate) batch: [Vec<u32>; 6],
    /// The token that ends a document, where attention keeps inside documents.
    document_end: Option<u32>,
    /// Tickets that were begun, with block and index of the op that began them.
    begun: Vec<(Ticket, (usize, usize))>,
    /// What went on beside others and is over: block, index, start and end.
    over: Vec<((usize, usize), Instant, Instant)>,
    /// Shows that it lives.
    pulse: Arc<Pulse>,
    /// Added to a sum of squared gradients of the next step: a drill.
    pub(crate) disturbance: Option<f64>,
}

/// What changes from step to step, besides the batch.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs {
    /// Number of valid targets in the global batch.
    pub valid_tokens: u64,
    /// Learning rate.
    pub lr: f64,
    /// 1 for the first step.
    pub step: u64,
    /// AdamW.
    pub beta1: f64,
    /// AdamW.
    pub beta2: f64,
    /// AdamW.
    pub eps: f64,
    /// Decoupled decay of matrices, by either rule.
    pub weight_decay: f64,
    /// Decay of the momentum of what Muon updates.
    pub momentum: f64,
    /// Decay of the average of the weights, if one is kept.
    pub ema: f64,
    /// Seed of what is left out at random.
    pub seed: u64,
    /// Largest norm of the gradient, if bounded.
    pub clip: Option<f64>,
    /// This rank was asked to stop after the step.
    pub stop: bool,
    /// This rank has written its share of the checkpoint under way.
    pub saved: bool,
}

impl StepInputs {
    /// A step, from 1, of AdamW with the usual constants, clipping at a norm of 1 (Touvron et al. 2023, arXiv 2307.09288,
    /// section 2.1), where all of `tokens` targets count.
    pub fn adamw(step: u64, lr: f64, tokens: usize) -> StepInputs {
        StepInputs {
            valid_tokens: tokens as u64,
            lr,
            step,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-5,
            weight_decay: 0.1,
            momentum: 0.95,
            ema: 0.999,
            seed: 42,
            clip: Some(1.0),
            stop: false,
            saved: false,
        }
    }
}

/// What a step yields.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutputs {
    /// Mean loss over valid tokens of the global batch.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Mean loss of the module that predicts one token more, over as many tokens, before its weight.
    pub mtp_loss: Option<f64>,
    /// Some rank was asked to stop: all do after this step.
    pub stop: bool,
    /// Every rank has written its share of the checkpoint under way.
    pub saved: bool,
}

impl Executor {
    /// Compiles a rank's program for so many threads of this machine and maps its memory. Weights are zero until they
    /// are set.
    ///
    /// # Errors
    /// As [`Executor::on`].
    pub fn new(request: &Request<'_>, threads: usize, mesh: Mesh, record: bool) -> Result<Executor> {
        Executor::on(Box::new(Cpu::new(threads)), request, mesh, record)
    }

    /// The same on any device.
    ///
    /// # Errors
    /// If the device cannot run an op of the program, or model, layout and batch do not fit each other, or there is no
    /// memory for it.
    pub fn on(device: Box<dyn Device>, request: &Request<'_>, mesh: Mesh, record: bool) -> Result<Executor> {
        check_ramp(&*device, &request.recipe)?;
        let request = Request { loss: device.loss(), ..*request };
        let program = Program::build(&request, &|op, p| device.workspace_len(op, p))?;
        Executor::of(program, device, &request, mesh, record)
    }

    /// What ran the program of this rank in a world that all have left, weights and all, for its program in the one of `mesh`:
    /// the same program. Whether the memory is that which it had; else it is new, and empty.
    ///
    /// # Errors
    /// As [`Executor::on`].
    pub(crate) fn again(
        device: Box<dyn Device>,
        request: &Request<'_>,
        mesh: Mesh,
        record: bool,
    ) -> Result<(Executor, bool)> {
        let request = Request { loss: device.loss(), ..*request };
        let program = Program::build(&request, &|op, p| device.workspace_len(op, p))?;
        let mut device = device;
        let is_kept = device.move_to(program.memory.total, &mesh)?;
        if !is_kept {
            device.allocate(program.memory.total, &mesh)?;
        }
        device.meet(&program, &mesh)?;
        Ok((Executor::with_memory(program, device, mesh, record), is_kept))
    }

    /// The same of a model whose layers are `layer`'s.
    ///
    /// # Errors
    /// As [`Executor::on`] and [`Program::of_layers`].
    pub fn of_layers(
        device: Box<dyn Device>,
        request: &Request<'_>,
        layer: Layer<'_>,
        mesh: Mesh,
    ) -> Result<Executor> {
        let request = Request { loss: device.loss(), ..*request };
        let program = Program::of_layers(&request, layer, &|op, p| device.workspace_len(op, p))?;
        Executor::of(program, device, &request, mesh, false)
    }

    fn of(
        program: Program,
        mut device: Box<dyn Device>,
        request: &Request<'_>,
        mesh: Mesh,
        record: bool,
    ) -> Result<Executor> {
        check_ops(&*device, &program, &request.model.name)?;
        device.allocate(program.memory.total, &mesh)?;
        device.meet(&program, &mesh)?;
        Ok(Executor::with_memory(program, device, mesh, record))
    }

    fn with_memory(program: Program, mut device: Box<dyn Device>, mesh: Mesh, record: bool) -> Executor {
        let Compiled { program, actions, eval_sum, spans, op_waits_ns } = Compiled::of(program, record);
        Executor {
            actions,
            eval_sum,
            spans,
            comm_ns: [0; AXES],
            op_waits_ns,
            tells_waits: matches!(device.waits_ns(), Ok(Some(_))),
            other: None,
            norm_start_ns: 0,
            failed_alike: false,
            batch: Default::default(),
            document_end: None,
            begun: Vec::new(),
            over: Vec::new(),
            pulse: Arc::default(),
            disturbance: None,
            program,
            device,
            mesh,
        }
    }

    /// Where it shows that it lives.
    pub(crate) fn set_pulse(&mut self, pulse: Arc<Pulse>) {
        self.pulse = pulse;
    }

    /// Leaves the other ranks, and gives what it ran on with its memory; nothing can be run from now on.
    pub(crate) fn leave(&mut self) -> Box<dyn Device> {
        self.mesh.quiet();
        self.mesh = Mesh::alone();
        std::mem::replace(&mut self.device, Box::new(Null::default()))
    }

    /// All memory as it was when it was new.
    pub(crate) fn wipe(&mut self, model: &ModelSpec) -> Result<()> {
        if let Some(arena) = self.device.host_mut() {
            arena.wipe();
        }
        self.set_tables(model)
    }

    /// What it runs on.
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The ranks that it talks to.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Bytes that the device holds for the step: what the program placed.
    pub fn allocated_bytes(&self) -> usize {
        self.device.allocated_bytes()
    }

    /// Everybody's bytes, on every rank, in rank order.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.mesh.exchange(mine)
    }

    /// The best rate of the device's matrix products, in GFLOP/s; takes a moment.
    pub fn peak_gflops(&mut self) -> f64 {
        self.device.peak_gflops()
    }

    /// Token ids of this rank's sequences in one step, `[local_sequences, sequence]`, to be filled in.
    pub fn tokens(&mut self) -> &mut [u32] {
        self.input(0, self.program.io.tokens)
    }

    /// Targets, likewise; `u32::MAX` where none is wanted.
    pub fn targets(&mut self) -> &mut [u32] {
        self.input(1, self.program.io.targets)
    }

    /// Position in its sequence at which each token's document begins, likewise, or of all tokens where heads are dealt
    /// ([`Program::seen`]); none where attention sees all.
    pub fn starts(&mut self) -> &mut [u32] {
        match self.program.io.starts {
            Some(starts) => self.input(2, starts),
            None => &mut [],
        }
    }

    /// The token that ends documents, for programs whose attention keeps inside them.
    pub fn set_document_end(&mut self, token: u32) {
        self.document_end = Some(token);
    }

    /// Takes the inputs and targets of a step from `stream`: `samples` are this rank's of the step, in the order of
    /// [`Program::places`].
    ///
    /// # Errors
    /// If they are not as many as the rank has sequences, or as [`data::TokenStream::sample`].
    pub fn load_samples(&mut self, stream: &dyn data::TokenStream, samples: &[u64]) -> Result<()> {
        if self.program.io.starts.is_some() && self.document_end.is_none() {
            return Err(Error::user("attention keeps inside documents, but no token is known that ends one")
                .hint("name it with Executor::set_document_end"));
        }
        let (own, t) = (self.program.local_sequences, self.program.sequence);
        if samples.len() != own {
            return Err(Error::user(format!("{} samples for a rank of {own} sequences", samples.len()))
                .hint("take the places in the batch that the program names"));
        }
        let mut sample = vec![0; t + 1];
        for (i, index) in samples.iter().enumerate() {
            stream.sample(*index, &mut sample)?;
            self.take(i, &sample);
        }
        Ok(())
    }

    /// Puts one sequence and the token behind it in place `i` of this rank's: its part of them where cp cuts sequences.
    pub(crate) fn take(&mut self, i: usize, sample: &[u32]) {
        let mut at = i * self.program.local_sequence();
        for piece in self.program.positions() {
            let to = at..at + piece.len();
            self.tokens()[to.clone()].copy_from_slice(&sample[piece.clone()]);
            self.targets()[to.clone()].copy_from_slice(&sample[piece.start + 1..piece.end + 1]);
            at = to.end;
        }
        self.take_behind(i, sample);
        let (Some(end), true) = (self.document_end, self.program.io.starts.is_some()) else { return };
        let seen = self.program.seen();
        let mut at = i * seen.iter().map(Range::len).sum::<usize>();
        for piece in seen {
            let to = at..at + piece.len();
            document_starts(sample, end, piece, &mut self.starts()[to.clone()]);
            at = to.end;
        }
    }

    /// Room for an input of a step, made when it is first asked for.
    fn input(&mut self, which: usize, buffer: BufferId) -> &mut [u32] {
        let len = self.program.buffer(buffer).len();
        self.batch[which].resize(len, 0);
        &mut self.batch[which]
    }

    /// Gives the device the batch, if there is one.
    fn load(&mut self) -> Result<()> {
        let io = &self.program.io;
        if io.next_tokens.is_some() {
            ahead::look(&self.program, &mut self.batch)?;
        }
        let inputs = [Some(io.tokens), Some(io.targets), io.starts, io.next_tokens, io.next_targets];
        for (ids, to) in self.batch.iter().zip(inputs) {
            if let (Some(to), false) = (to, ids.is_empty()) {
                self.device.copy_in(resolve::whole(&self.program, to), bytemuck::cast_slice(ids))?;
            }
        }
        Ok(())
    }

    /// The sum of the losses of all valid tokens of the global batch, without gradients.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn evaluate(&mut self) -> Result<f64> {
        self.load()?;
        self.stretch(Stretch::Evaluate, Turn::default(), |exec, turn| {
            for micro_batch in 0..exec.program.micro_batches() {
                for chunk in 0..exec.program.eval.len() {
                    exec.block(exec.program.eval[chunk], Turn { micro_batch, ..turn })?;
                }
            }
            Ok(())
        })?;
        let sum = self.loss_sum()?;
        self.hear_waits()?;
        Ok(sum)
    }

    /// Puts the average of the weights over steps in their place, and the weights in its; or back again. Nothing happens
    /// where none is kept.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn swap_average(&mut self) -> Result<()> {
        let Some(block) = self.program.average else { return Ok(()) };
        self.block(block, Turn::default())?;
        self.device.synchronise()
    }

    /// Runs all micro-batches and the tail of a step, or stops before the update if loss or norm is not finite.
    ///
    /// # Errors
    /// If a peer is lost, or the loss or the gradient norm is NaN or infinite (parameters are then as before the step).
    pub fn step(&mut self, inputs: &StepInputs) -> Result<StepOutputs> {
        let (outputs, bad) = self.attempt(inputs, &Limits::NONE)?;
        if let Some(bad) = bad {
            self.failed_alike = true;
            return Err(not_updated(inputs.step, &bad.to_string()));
        }
        self.update_weights(inputs, &outputs)?;
        Ok(outputs)
    }

    /// The first part of a step: gradients, their norm, the loss, and what is bad about them by `limits`. What is summed
    /// over all ranks is found by all of them. Parameters and moments are as before.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn attempt(&mut self, inputs: &StepInputs, limits: &Limits) -> Result<(StepOutputs, Option<Bad>)> {
        self.spans.begin();
        self.comm_ns = [0; AXES];
        self.load()?;
        for table in [self.program.io.expert_counts, self.program.io.logit_maxima].into_iter().flatten() {
            self.device.clear(self.whole(table))?;
        }
        let loss_scale = (1.0 / inputs.valid_tokens.max(1) as f64) as f32;
        let draws = mix(mix(inputs.seed) ^ inputs.step);
        self.stretch(Stretch::Gradients, Turn { loss_scale, draws, ..Turn::default() }, |exec, turn| {
            for i in 0..exec.program.schedule.len() {
                let item = exec.program.schedule[i];
                exec.block(item.block, Turn { micro_batch: item.micro_batch, ..turn })?;
            }
            exec.settle(turn)
        })?;
        let outputs = self.judge(inputs)?;
        self.hear_waits()?;
        Ok((outputs, limits.judge(outputs.loss, outputs.grad_norm)))
    }

    /// The rest of a step that was attempted: the update, by what it yielded.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn update_weights(&mut self, inputs: &StepInputs, outputs: &StepOutputs) -> Result<()> {
        self.stretch(Stretch::Update, tail::turn(inputs, outputs), Executor::update)?;
        self.device.synchronise()?;
        self.hear_waits()
    }

    /// Runs a stretch as the device recorded it, or call by call. When every op is timed, none is replayed.
    fn stretch(
        &mut self,
        stretch: Stretch,
        turn: Turn,
        calls: impl FnOnce(&mut Executor, Turn) -> Result<()>,
    ) -> Result<()> {
        if self.spans.on() {
            return calls(self, turn);
        }
        if self.device.replay(stretch, &turn)? {
            return Ok(());
        }
        calls(self, turn)?;
        self.device.recorded()
    }

    /// Runs one block.
    pub(crate) fn block(&mut self, block: usize, turn: Turn) -> Result<()> {
        self.ops(block, 0..self.actions[block].len(), turn)
    }

    /// Runs some ops of a block.
    pub(crate) fn ops(&mut self, block: usize, ops: Range<usize>, turn: Turn) -> Result<()> {
        for i in ops {
            let start = self.spans.now();
            if self.actions[block][i].walks {
                self.ring(block, i, turn)?;
            } else {
                self.compute(block, i, turn)?;
                self.communicate(block, i, turn)?;
            }
            self.computed(block, i, turn.micro_batch, start)?;
        }
        Ok(())
    }

    /// [`Executor::ran`], once the device is through where every op is timed.
    pub(crate) fn computed(
        &mut self,
        block: usize,
        i: usize,
        micro_batch: usize,
        start_ns: u64,
    ) -> Result<()> {
        if self.spans.on() {
            self.device.synchronise()?;
        }
        self.ran(block, i, micro_batch, start_ns);
        Ok(())
    }

    /// Runs an op's kernel, if it has one.
    pub(crate) fn compute(&mut self, block: usize, i: usize, turn: Turn) -> Result<()> {
        let Some(call) = &self.actions[block][i].call else { return Ok(()) };
        self.pulse.begin();
        let ran = self.device.launch(&Launch::new(call, turn));
        self.pulse.end();
        ran.map_err(|e| e.context(&self.program.blocks[block].ops[i].name))
    }

    /// Does what an op says to other ranks.
    pub(crate) fn communicate(&mut self, block: usize, i: usize, turn: Turn) -> Result<()> {
        let Executor { actions, device, mesh, begun, over, .. } = self;
        let Some(talk) = &actions[block][i].talk else { return Ok(()) };
        let ticket = match talk.when {
            When::Now => None,
            When::Begins(ticket) => {
                begun.retain(|(t, _)| *t != ticket);
                begun.push((ticket, (block, i)));
                Some(ticket)
            }
            When::Ends(ticket) => {
                let Some((_, at)) = begun.iter().find(|(t, _)| *t == ticket) else { return Ok(()) };
                let op = self.program.blocks[block].ops[i].id;
                return device.end(mesh, (op, ticket), &mut |began, ended| over.push((*at, began, ended)));
            }
        };
        talk.messages(turn.micro_batch).try_for_each(|m| device.say(mesh, &m, ticket))
    }

    /// Notes that an op ended now, and what went on beside it and is over.
    pub(crate) fn ran(&mut self, block: usize, i: usize, micro_batch: usize, start_ns: u64) {
        let op = &self.program.blocks[block].ops[i];
        let end =
            if op.goes_on() { self.spans.now() } else { self.spans.push(block, i, micro_batch, start_ns) };
        if op.only_talks() {
            self.waited(block, i, end - start_ns);
        }
        for (at, began, ended) in self.over.drain(..) {
            self.spans.push_between(at.0, at.1, micro_batch, began, ended);
        }
    }

    /// What the last op of a block writes first.
    pub(crate) fn output(&self, block: usize) -> Option<Operand> {
        let call = self.actions[block].last()?.call.as_ref()?;
        call.outs.first().map(|a| a.at(0))
    }

    /// A whole static buffer.
    pub(crate) fn whole(&self, buffer: BufferId) -> Operand {
        resolve::whole(&self.program, buffer)
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // The arena may not go while messages use it.
        self.mesh.quiet();
    }
}
