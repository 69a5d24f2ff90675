use kernels::AdamW;
use program::{GroupId, NORM_CHUNK, Op, OpKind};
use spec::{DType, Error, Result};

use crate::exec::{Executor, StepInputs, StepOutputs, Turn};

impl Executor {
    /// The tail of a step: settle gradients, clip, update, hand out parameters.
    pub(crate) fn finish(&mut self, inputs: &StepInputs) -> Result<StepOutputs> {
        let mut outputs = StepOutputs::default();
        let mut factor = 1.0f32;
        let block = self.program.tail;
        for i in 0..self.program.blocks[block].ops.len() {
            let start = self.spans.now();
            let op = &self.program.blocks[block].ops[i];
            match op.kind {
                OpKind::GradNorm => {
                    outputs = self.grad_norm(op.id, inputs)?;
                    factor = clip_factor(outputs.grad_norm, inputs.clip);
                    check_finite(&outputs, inputs.step)?;
                }
                OpKind::AdamW { group, decay } => self.update(group, decay, inputs, factor),
                _ => match self.program.precision {
                    DType::Bf16 => self.tail_op::<half::bf16>(op)?,
                    _ => self.tail_op::<f32>(op)?,
                },
            }
            self.ran(block, i, 0, start);
        }
        Ok(outputs)
    }

    fn tail_op<T: kernels::Storage + bytemuck::Pod>(&self, op: &Op) -> Result<()> {
        self.run::<T>(op, Turn::default())
    }

    /// Sums squares of this rank's owned gradients by chunk, joins them and the losses over all ranks, and adds both up
    /// in index order, so that neither depends on who held what.
    fn grad_norm(&self, id: program::OpId, inputs: &StepInputs) -> Result<StepOutputs> {
        let p = &self.program;
        let sums = self.whole::<f64>(p.io.norm_chunks);
        sums.fill(0.0);
        for (g, b) in p.group_buffers.iter().enumerate().filter(|(_, b)| b.counts) {
            // What this rank owns under ZeRO, else its share of what all data-parallel ranks hold.
            let program::Owned { first, count } = p.share(GroupId(g as u32));
            let chunks = count.div_ceil(NORM_CHUNK);
            let offset = if p.buffer(b.grad).len() == p.groups[g].len() { first } else { 0 };
            let grad = &self.whole::<f32>(b.grad)[offset..offset + count];
            let at = b.norm_chunk0 + first / NORM_CHUNK;
            kernels::sum_squares(&self.pool, grad, &mut sums[at..at + chunks], NORM_CHUNK);
        }
        let votes = sums.len() - 1;
        let losses = votes - p.sequences;
        self.spread_losses(&mut sums[losses..votes]);
        sums[votes] = f64::from(u8::from(inputs.stop));
        self.mesh.sum_all(id, sums)?;
        let (norms, losses) = sums[..votes].split_at(losses);
        Ok(StepOutputs {
            stop: sums[votes] > 0.0,
            grad_norm: norms.iter().sum::<f64>().sqrt(),
            loss: losses.iter().sum::<f64>() / inputs.valid_tokens.max(1) as f64,
        })
    }

    /// Puts the losses of this rank's sequences at their places in the global batch, on one rank for each of them.
    fn spread_losses(&self, all: &mut [f64]) {
        let p = &self.program;
        if p.coords.pp + 1 != p.layout.pp || p.coords.tp != 0 {
            return;
        }
        for (i, loss) in self.whole::<f64>(p.io.loss_leaves).iter().enumerate() {
            let (micro_batch, within) = (i / p.micro_batch(), i % p.micro_batch());
            all[p.first_sequence(micro_batch) + within] = *loss;
        }
    }

    /// The sum of the losses of all tokens of the global batch.
    pub(crate) fn loss_sum(&self) -> Result<f64> {
        let p = &self.program;
        let sums = self.whole::<f64>(p.io.norm_chunks);
        let votes = sums.len() - 1;
        let losses = &mut sums[votes - p.sequences..votes];
        losses.fill(0.0);
        self.spread_losses(losses);
        self.mesh.sum_all(program::OpId::of("eval.loss"), losses)?;
        Ok(losses.iter().sum())
    }

    fn update(&self, group: GroupId, decay: bool, inputs: &StepInputs, factor: f32) {
        let p = &self.program;
        let b = &p.group_buffers[group.0 as usize];
        let cut = |id| self.owned_range(group, id);
        let config = AdamW {
            lr: inputs.lr,
            beta1: inputs.beta1,
            beta2: inputs.beta2,
            eps: inputs.eps,
            weight_decay: if decay { inputs.weight_decay } else { 0.0 },
            step: inputs.step,
            grad_scale: factor,
        };
        let grad = &self.whole::<f32>(b.grad)[cut(b.grad)];
        let m = &mut self.whole::<f32>(b.exp_avg)[cut(b.exp_avg)];
        let v = &mut self.whole::<f32>(b.exp_avg_sq)[cut(b.exp_avg_sq)];
        match b.master {
            None => {
                kernels::adamw(&self.pool, &config, &mut self.whole::<f32>(b.param)[cut(b.param)], m, v, grad)
            }
            Some(master) => {
                let w = &mut self.whole::<f32>(master)[cut(master)];
                let out = &mut self.whole::<half::bf16>(b.param)[cut(b.param)];
                kernels::adamw_bf16(&self.pool, &config, w, m, v, grad, out);
            }
        }
    }
}

/// `min(1, bound / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_` has it.
fn clip_factor(norm: f64, bound: Option<f64>) -> f32 {
    bound.map_or(1.0, |b| (b / (norm + 1e-6)).min(1.0)) as f32
}

fn check_finite(outputs: &StepOutputs, step: u64) -> Result<()> {
    let bad = if !outputs.loss.is_finite() {
        ("loss", outputs.loss)
    } else if !outputs.grad_norm.is_finite() {
        ("gradient norm", outputs.grad_norm)
    } else {
        return Ok(());
    };
    Err(Error::failure(format!("step {step}: {} is {}; the weights were not updated", bad.0, bad.1))
        .hint("resume from the last checkpoint with a lower optim.lr, a longer schedule.warmup_steps or optim.grad_clip"))
}
