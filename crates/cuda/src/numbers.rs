use kernels::AdamWScalars;
use spec::Result;
use train::Turn;

use crate::driver::{Memory, Stream};

/// What kernels read of a turn, as `kernels/device.h` declares it. It lies on the card, so that a recorded stretch runs
/// again with other numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Layout {
    loss_scale: f32,
    grad_scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_correction2: f32,
    eps: f32,
    minus_step_size: f32,
    average_keep: f32,
    average_share: f32,
    momentum: f32,
    momentum_rest: f32,
    minus_lr: f32,
    draws: u64,
}

/// A turn's numbers on the card.
pub(crate) struct Numbers {
    memory: Memory,
    now: Layout,
}

impl Numbers {
    pub(crate) fn new() -> Result<Numbers> {
        Ok(Numbers { memory: Memory::new(size_of::<Layout>())?, now: Layout::default() })
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.base
    }

    /// Whether [`Numbers::set`] would change what lies on the card.
    pub(crate) fn are_other(&self, turn: &Turn) -> bool {
        self.next(turn) != self.now
    }

    /// The numbers of a turn; those of the optimiser stay where it has none.
    fn next(&self, turn: &Turn) -> Layout {
        let mut next = Layout { loss_scale: turn.loss_scale, draws: turn.draws, ..self.now };
        if let Some(update) = turn.update {
            let AdamWScalars {
                keep,
                one_minus_beta1,
                beta2,
                one_minus_beta2,
                root_correction2,
                eps,
                minus_step_size,
                grad_scale,
            } = update.scalars();
            let share = kernels::average_share(turn.ema, update.step);
            next = Layout {
                average_keep: (1.0 - share) as f32,
                average_share: share as f32,
                momentum: turn.momentum as f32,
                momentum_rest: (1.0 - turn.momentum) as f32,
                minus_lr: -update.lr as f32,
                grad_scale,
                keep,
                one_minus_beta1,
                beta2,
                one_minus_beta2,
                root_correction2,
                eps,
                minus_step_size,
                ..next
            };
        }
        next
    }

    /// What is put on the stream from now on sees this turn's numbers.
    pub(crate) fn set(&mut self, stream: &Stream, turn: &Turn) -> Result<()> {
        let next = self.next(turn);
        if next == self.now {
            return Ok(());
        }
        self.now = next;
        // SAFETY: a plain struct without padding: fourteen f32 and a u64.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const self.now).cast::<u8>(), size_of::<Layout>()) };
        stream.upload(self.memory.base, bytes)
    }
}
