use kernels::AdamW;
use program::{OpKind, Replication};
use spec::{Error, Result};

use crate::exec::{Executor, StepInputs, StepOutputs};
use crate::launch::{Operand, Turn};
use crate::resolve;

impl Executor {
    /// Index in the tail of the op that yields the gradient norm.
    fn norm_op(&self) -> usize {
        let ops = &self.program.blocks[self.program.tail].ops;
        ops.iter().position(|op| op.kind == OpKind::GradNorm).unwrap_or(ops.len())
    }

    /// What of the tail comes before the host looks at the norm: settles gradients, and sums their squares.
    pub(crate) fn settle(&mut self, turn: Turn) -> Result<()> {
        let (tail, norm) = (self.program.tail, self.norm_op());
        self.ops(tail, 0..norm, turn)?;
        self.norm_start_ns = self.spans.now();
        self.compute(tail, norm, turn)
    }

    /// Joins the norms and the losses of all ranks.
    pub(crate) fn judge(&mut self, inputs: &StepInputs) -> Result<StepOutputs> {
        let (tail, norm) = (self.program.tail, self.norm_op());
        let outputs = self.grad_norm(tail, norm, inputs)?;
        self.ran(tail, norm, 0, self.norm_start_ns);
        Ok(outputs)
    }

    /// The rest of the tail: updates, and hands out parameters.
    pub(crate) fn update(&mut self, turn: Turn) -> Result<()> {
        let tail = self.program.tail;
        self.ops(tail, self.norm_op() + 1..self.program.blocks[tail].ops.len(), turn)
    }

    /// Joins the sums of squares, the losses and the votes of all ranks, and adds each up in index order, so that
    /// none depends on who held what.
    fn grad_norm(&mut self, block: usize, i: usize, inputs: &StepInputs) -> Result<StepOutputs> {
        let (norms, losses, vote) = self.shared_sums();
        let ahead = resolve::losses_ahead(&self.program);
        let ahead = self.whole(ahead.buffer).part(ahead.first, ahead.count);
        self.spread_losses(losses, 0)?;
        if !ahead.is_empty() {
            self.spread_losses(ahead, 1)?;
        }
        self.spread_expert_counts()?;
        self.spread_logit_maxima()?;
        let own = f64::from(u8::from(inputs.stop)) + RANKS_MAX * f64::from(u8::from(inputs.saved));
        self.device.copy_in(vote, &own.to_ne_bytes())?;
        if let Some(more) = self.disturbance.take() {
            let first = norms.part(0, 1);
            let sum = self.device.sum(first)? + more;
            self.device.copy_in(first, &sum.to_ne_bytes())?;
        }
        self.communicate(block, i, Turn::default())?;
        let (votes, tokens) = (self.device.sum(vote)?, inputs.valid_tokens.max(1) as f64);
        let mtp = (!ahead.is_empty()).then(|| self.device.sum(ahead)).transpose()?;
        Ok(StepOutputs {
            stop: votes % RANKS_MAX > 0.0,
            saved: (votes / RANKS_MAX).floor() == self.program.layout.world() as f64,
            grad_norm: self.device.sum(norms)?.sqrt(),
            loss: self.device.sum(losses)? / tokens,
            mtp_loss: mtp.map(|sum| sum / tokens),
        })
    }

    /// What ranks share at the end of a step: squares of gradients by chunk, losses by sequence, votes.
    fn shared_sums(&self) -> (Operand, Operand, Operand) {
        let all = self.whole(self.program.io.norm_chunks);
        let losses = resolve::losses(&self.program);
        let end = losses.first + losses.count;
        let maxima = resolve::logit_maxima(&self.program);
        (all.part(0, maxima.first), all.part(losses.first, losses.count), all.part(end, 1))
    }

    /// Puts this rank's counts of experts beside what ranks share.
    fn spread_expert_counts(&mut self) -> Result<()> {
        let Some(own) = self.program.io.expert_counts else { return Ok(()) };
        let slice = resolve::expert_counts(&self.program);
        let all = self.whole(slice.buffer).part(slice.first, slice.count);
        let own = self.whole(own);
        self.device.copy(own.part(0, own.len()), all)
    }

    /// The greatest score of attention of each head in the last step, over all sequences: `[layers, heads]`; 0 where none is
    /// above that, `None` where they are not looked at.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn logit_maxima(&self) -> Result<Option<Vec<f64>>> {
        let slice = resolve::logit_maxima(&self.program);
        if slice.count == 0 {
            return Ok(None);
        }
        let all = self.whole(slice.buffer).part(slice.first, slice.count);
        let all = self.device.read::<f64>(all)?;
        let replica = slice.count / self.program.layout.replicas();
        let most = |i: usize| all.iter().skip(i).step_by(replica).copied().fold(0.0, f64::max);
        Ok(Some((0..replica).map(most).collect()))
    }

    /// Puts the greatest scores of this rank's heads in their places: those of a data- and context-parallel rank, a layer
    /// and a head.
    fn spread_logit_maxima(&mut self) -> Result<()> {
        let Some(own) = self.program.io.logit_maxima else { return Ok(()) };
        let slice = resolve::logit_maxima(&self.program);
        let all = self.whole(slice.buffer).part(slice.first, slice.count);
        let own = self.whole(own);
        let Executor { program: p, device, .. } = self;
        let (layers, heads) = (own.rows, own.cols);
        (0..layers).try_for_each(|layer| {
            let (_, replica) = p.coords.replicas(Replication::Data, &p.layout);
            let row = (replica * layers + layer) * p.layout.tp + p.coords.tp;
            device.copy(own.part(layer * heads, heads), all.part(row * heads, heads))
        })
    }

    /// How many copies of tokens went to each expert in the last step, over all ranks: `[layers, experts]`, zeros for
    /// layers without; `None` for a dense model.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn expert_counts(&self) -> Result<Option<Vec<f64>>> {
        let slice = resolve::expert_counts(&self.program);
        if slice.count == 0 {
            return Ok(None);
        }
        let all = self.whole(slice.buffer).part(slice.first, slice.count);
        Ok(Some(self.device.read::<f64>(all)?.into_owned()))
    }

    /// Puts the losses of this rank's sequences at their places in the global batch: on one rank for each of them or, where
    /// cp cuts sequences, on those that hold a part, whose sums are added. `which` of a sequence's losses it is.
    fn spread_losses(&mut self, all: Operand, which: usize) -> Result<()> {
        let own = self.whole(self.program.io.loss_leaves);
        let Executor { program: p, device, .. } = self;
        if p.coords.pp + 1 != p.layout.pp || p.coords.tp != 0 {
            return Ok(());
        }
        let (count, first) = (p.micro_batch(), which * p.local_sequences);
        (0..p.micro_batches()).try_for_each(|m| {
            device.copy(own.part(first + m * count, count), all.part(p.first_sequence(m), count))
        })
    }

    /// The sum of the losses of all tokens of the global batch.
    pub(crate) fn loss_sum(&mut self) -> Result<f64> {
        let (_, losses, _) = self.shared_sums();
        self.device.clear(losses)?;
        self.spread_losses(losses, 0)?;
        let Executor { eval_sum, device, mesh, .. } = self;
        for message in eval_sum.iter().flat_map(|talk| talk.messages(0)) {
            device.say(mesh, &message, None)?;
        }
        device.sum(losses)
    }
}

/// Two counts share one number: votes to stop below this, shares saved above. Both are exact up to as many ranks.
const RANKS_MAX: f64 = (1_u64 << 26) as f64;

/// How the rest of a step is run.
pub(crate) fn turn(inputs: &StepInputs, outputs: &StepOutputs) -> Turn {
    let factor = clip_factor(outputs.grad_norm, inputs.clip);
    let (momentum, ema) = (inputs.momentum, inputs.ema);
    Turn { update: Some(update(inputs, factor)), momentum, ema, ..Turn::default() }
}

fn update(inputs: &StepInputs, factor: f32) -> AdamW {
    AdamW {
        lr: inputs.lr,
        beta1: inputs.beta1,
        beta2: inputs.beta2,
        eps: inputs.eps,
        weight_decay: inputs.weight_decay,
        step: inputs.step,
        grad_scale: factor,
    }
}

/// `min(1, bound / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` has it.
fn clip_factor(norm: f64, bound: Option<f64>) -> f32 {
    bound.map_or(1.0, |b| (b / (norm + 1e-6)).min(1.0)) as f32
}

/// The failure of a step that was bad: `what` says of what.
pub(crate) fn not_updated(step: u64, what: &str) -> Error {
    Error::failure(format!("step {step}: {what}; the weights were not updated")).hint(
        "resume from the last checkpoint with a lower optim.lr, a longer schedule.warmup_steps or optim.grad_clip; \
         trouble.on_nan and trouble.on_spike go on without such steps; phalanx replay tells a broken machine from a \
         broken model",
    )
}
