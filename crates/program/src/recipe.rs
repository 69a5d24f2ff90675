//! How a run's steps learn, as far as it decides what they are made of.

use spec::run::{Attend, BatchSpec};
use spec::{Optimizer, RunSpec};

/// What of a run's recipe decides which ops its step has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recipe {
    /// How gradients become updates.
    pub optimizer: Optimizer,
    /// Factor of the mean square of the log-sum-exp of the logits, beside the loss; 0 without.
    pub z_loss: f32,
    /// Attention keeps inside the documents of a sequence.
    pub documents: bool,
    /// Share of embeddings and of what layers add that training leaves out; 0 without.
    pub dropout: f32,
    /// Share of the probabilities of attention that training leaves out; 0 without.
    pub attention_dropout: f32,
    /// Greatest score of attention that updates leave a head; 0 without.
    pub qk_clip: f32,
    /// An average of the weights over steps is kept.
    pub ema: bool,
    /// The batch grows to that of the run: room is for the step that takes most, whatever the size at hand.
    pub ramp: Option<BatchSpec>,
}

impl Recipe {
    /// That of a run.
    pub fn of(run: &RunSpec) -> Recipe {
        let documents = run.data.attend == Attend::Documents;
        let ramp = run.batch.ramp.map(|_| run.batch);
        let RunSpec { optim, train, .. } = run;
        Recipe {
            optimizer: optim.kind,
            z_loss: train.z_loss,
            documents,
            dropout: train.dropout,
            attention_dropout: train.attention_dropout,
            qk_clip: optim.qk_clip,
            ema: train.ema > 0.0,
            ramp,
        }
    }
}
