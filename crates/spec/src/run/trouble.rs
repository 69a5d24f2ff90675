//! `[trouble]`: what is done about steps that are not like others.

use super::{CheckpointSpec, RunSpec};
use crate::doc::Doc;
use crate::words::words;
use crate::{Error, Result};

/// `[trouble]`: steps whose loss or gradient norm is not finite or far above those before, and state that has changed by
/// itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TroubleSpec {
    /// A loss or gradient norm that is not finite.
    pub on_nan: OnNan,
    /// A loss or gradient norm far above those of the last steps.
    pub on_spike: OnSpike,
    /// How far: this many robust standard deviations above the median.
    pub spike_factor: f64,
    /// Of so many good steps.
    pub window: usize,
    /// A rollback goes back to a checkpoint at least so many steps before the bad one.
    pub back_steps: usize,
    /// A rollback leaves out so many batches beyond the bad one.
    pub skip_steps: usize,
    /// Most decisions within [`TroubleSpec::window`] steps; one more ends the run.
    pub most: usize,
    /// What several ranks hold alike and is not alike, or what changed between two steps.
    pub on_corruption: OnCorruption,
}

/// What is done about a loss or gradient norm that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnNan {
    /// The run ends, with the weights as they were before the step.
    Stop,
    /// The update is left out, and with it the step's samples.
    Skip,
    /// Weights and moments of a checkpoint before are taken, and the samples from there to the bad step are left out.
    Rollback,
}

/// What is done about a spike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnSpike {
    /// Nothing: no step is a spike.
    Ignore,
    /// As for what is not finite.
    Stop,
    /// Likewise.
    Skip,
    /// Likewise.
    Rollback,
}

/// What is done about state that has changed by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnCorruption {
    /// The run ends.
    Stop,
    /// The rank gets what other ranks hold, if they agree; else as [`OnCorruption::Rollback`].
    Restore,
    /// All go back to a checkpoint of a step after which everything was right, and do the steps since then again.
    Rollback,
}

words!(OnNan: "stop" => Stop, "skip" => Skip, "rollback" => Rollback);
words!(OnSpike: "ignore" => Ignore, "stop" => Stop, "skip" => Skip, "rollback" => Rollback);
words!(OnCorruption: "stop" => Stop, "restore" => Restore, "rollback" => Rollback);

impl TroubleSpec {
    pub(super) fn read(doc: &Doc) -> Result<TroubleSpec> {
        Ok(TroubleSpec {
            on_nan: OnNan::of(doc, "trouble.on_nan")?,
            on_spike: OnSpike::of(doc, "trouble.on_spike")?,
            spike_factor: doc.number("trouble.spike_factor")?,
            window: doc.count("trouble.window")?,
            back_steps: doc.count_or_off("trouble.back_steps")?.unwrap_or(0),
            skip_steps: doc.count_or_off("trouble.skip_steps")?.unwrap_or(0),
            most: doc.count("trouble.most")?,
            on_corruption: OnCorruption::of(doc, "trouble.on_corruption")?,
        })
    }

    /// Whether some step may send the run back to a checkpoint.
    pub(crate) fn rolls_back(&self) -> bool {
        self.on_nan == OnNan::Rollback || self.on_spike == OnSpike::Rollback
    }
}

/// Refuses rollbacks that no checkpoint could be there for.
pub(super) fn check(run: &RunSpec, doc: &Doc) -> Result<()> {
    if !run.trouble.rolls_back() {
        return Ok(());
    }
    let CheckpointSpec { every, keep, keep_every, .. } = run.checkpoint;
    let Some(every) = every else {
        return Err(doc.locate(
            Error::user("a rollback needs checkpoints, and checkpoint.every = 0 saves none before the end")
                .hint("set checkpoint.every, or trouble.on_nan and trouble.on_spike to skip"),
        ));
    };
    // The newest checkpoint may be of the step just before the bad one.
    let reach = (keep.unwrap_or(usize::MAX) - 1).saturating_mul(every);
    if run.trouble.back_steps > reach && keep_every.is_none() {
        return Err(doc.locate(
            Error::user(format!(
                "trouble.back_steps = {} goes back further than the checkpoints that are kept: {} steps",
                run.trouble.back_steps, reach
            ))
            .hint(format!(
                "set checkpoint.keep={} or more, or lower trouble.back_steps",
                run.trouble.back_steps.div_ceil(every) + 1
            )),
        ));
    }
    Ok(())
}
