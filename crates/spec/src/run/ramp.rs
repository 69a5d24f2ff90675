//! A global batch that grows: which steps are of how many sequences, and which samples they take.

use super::BatchSpec;
use crate::doc::Doc;
use crate::{Error, Result};

/// Most sizes that a batch takes on its way: every one is a program of its own.
const SIZES_MAX: usize = 256;
/// Most samples of a ramp, so that samples times sizes stay far inside 64 bits.
const SAMPLES_MAX: usize = 1 << 40;
const KEY: &str = "batch.ramp";

/// How a batch grows to that of the run, as Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRamp {
    /// Sequences of the first step.
    pub from: usize,
    /// Sequences by which it grows.
    pub by: usize,
    /// Samples after which it has grown to the full batch, by equal parts for each size before.
    pub samples: usize,
}

/// Steps that follow each other, of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchStage {
    /// Steps before the first of them.
    pub steps: u64,
    /// Samples in those steps.
    pub samples: u64,
    /// Sequences of each step.
    pub sequences: usize,
}

impl BatchStage {
    /// Samples in the first `steps` steps, the last of which is of this stage.
    fn samples_before(self, steps: u64) -> u64 {
        self.samples.saturating_add((steps - self.steps).saturating_mul(self.sequences as u64))
    }
}

impl BatchSpec {
    /// The sizes that steps have, in order; the last one is [`BatchSpec::sequences`], for all steps that are left.
    ///
    /// ```
    /// use spec::RunSpec;
    /// let run = RunSpec::load(None, &["batch.ramp=[2,2,12]".into()], &RunSpec::no_files)?;
    /// let stages: Vec<(u64, usize)> = run.batch.stages().map(|s| (s.steps, s.sequences)).collect();
    /// assert_eq!(stages, [(0, 2), (2, 4), (3, 6), (4, 8)]);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn stages(&self) -> impl Iterator<Item = BatchStage> + use<> {
        let full = self.sequences;
        let BatchRamp { from, by, samples } =
            self.ramp.unwrap_or(BatchRamp { from: full, by: 1, samples: 0 });
        let sizes = full.saturating_sub(from) / by.max(1);
        let (mut steps, mut seen) = (0, 0);
        (0..=sizes).filter_map(move |i| {
            let stage = BatchStage { steps, samples: seen, sequences: from + i * by };
            // A size lasts until its share of the ramp's samples is over; large steps may leave sizes out.
            let until = ((i as u64 + 1) * samples as u64).div_ceil(sizes.max(1) as u64);
            let lasts = until.saturating_sub(seen).div_ceil(stage.sequences.max(1) as u64);
            if i < sizes {
                (steps, seen) = (steps + lasts, stage.samples_before(steps + lasts));
            }
            (i == sizes || lasts > 0).then_some(stage)
        })
    }

    /// The stage of the step that follows `done` steps.
    fn stage(&self, done: u64) -> BatchStage {
        let own = BatchStage { steps: 0, samples: 0, sequences: self.sequences };
        self.stages().take_while(|s| s.steps <= done).last().unwrap_or(own)
    }

    /// Sequences of the step that follows `done` steps.
    pub fn sequences_after(&self, done: u64) -> usize {
        self.stage(done).sequences
    }

    /// Samples in the first `done` steps, which are those that the next step does not take.
    pub fn samples_before(&self, done: u64) -> u64 {
        self.stage(done).samples_before(done)
    }

    /// Tokens of the step that follows `done` steps.
    pub fn tokens_after(&self, done: u64) -> u64 {
        self.sequence as u64 * self.sequences_after(done) as u64
    }

    /// The batch of a step of so many sequences, as if all were of them.
    pub fn of(&self, sequences: usize) -> BatchSpec {
        BatchSpec { sequences, ramp: None, ..*self }
    }

    /// The ramp as a list: where it begins, by how much it grows, over how many samples.
    pub(super) fn ramp_list(&self) -> Vec<usize> {
        self.ramp.map_or_else(Vec::new, |r| vec![r.from, r.by, r.samples])
    }
}

/// Reads the ramp to a batch of `full` sequences.
pub(super) fn read(doc: &Doc, full: usize) -> Result<Option<BatchRamp>> {
    let [from, by, samples] = match doc.counts(KEY)?[..] {
        [] => return Ok(None),
        [from, by, samples] => [from, by, samples],
        _ => return Err(wrong(doc, "[START, INCREMENT, SAMPLES] or []".to_owned(), full)),
    };
    if from == 0 || by == 0 || samples == 0 || samples > SAMPLES_MAX {
        return Err(wrong(doc, format!("numbers above 0, and at most {SAMPLES_MAX} samples"), full));
    }
    if from >= full {
        return Err(wrong(doc, format!("to begin below the full batch of {full} sequences"), full));
    }
    if !(full - from).is_multiple_of(by) {
        let what = format!("an increment that divides the {} sequences from {from} to {full}", full - from);
        let fits: Vec<String> = (1..=full - from)
            .filter(|by| (full - from).is_multiple_of(*by))
            .map(|by| by.to_string())
            .collect();
        let few = &fits[fits.len().saturating_sub(12)..];
        return Err(doc.wrong(KEY, what).hint(format!("increments that work: {}", few.join(", "))));
    }
    if (full - from) / by >= SIZES_MAX {
        return Err(wrong(doc, format!("at most {SIZES_MAX} sizes on the way to {full}"), full)
            .hint(format!("a larger increment than {by}")));
    }
    Ok(Some(BatchRamp { from, by, samples }))
}

fn wrong(doc: &Doc, expected: String, full: usize) -> Error {
    let (half, samples) = ((full / 2).max(1), 100 * full);
    doc.wrong(KEY, expected).hint(format!(
        "[{half}, {half}, {samples}] begins with {half} sequences and has 2 x {half} after {samples} samples"
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::run::tests::load;

    #[track_caller]
    fn refused(set: &[&str], expected: &str) {
        let e = load("", set).expect_err("a ramp that is none");
        let text = format!("{e} | {}", e.hint_text().unwrap_or("no hint"));
        assert_eq!(e.exit_code(), 2);
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn a_ramp_is_read_written_and_decides_numbers() {
        let run = load("", &["batch.ramp=[2,2,600]"]).expect("a ramp");
        assert_eq!(run.batch.ramp, Some(BatchRamp { from: 2, by: 2, samples: 600 }));
        assert_eq!(load(&run.to_toml(), &[]).expect("what was written"), run);
        let plain = load("", &[]).expect("the defaults");
        assert_ne!(run.fingerprint(), plain.fingerprint());
        assert!(!plain.to_toml().contains("ramp"));
        assert_eq!(load("", &["batch.ramp=[]"]).expect("no ramp"), plain);
    }

    #[test]
    fn what_is_no_ramp_is_refused() {
        refused(
            &["batch.ramp=[2,2]"],
            "batch.ramp = a list in --set batch.ramp=[2,2], expected [START, INCREMENT",
        );
        refused(&["batch.ramp=[0,2,10]"], "expected numbers above 0");
        refused(&["batch.ramp=[2,2,0]"], "expected numbers above 0");
        refused(&["batch.ramp=[8,2,10]"], "to begin below the full batch of 8 sequences");
        refused(&["batch.ramp=[2,4,10]"], "increments that work: 1, 2, 3, 6");
        refused(&["batch.ramp=2"], "a list of whole numbers");
        refused(&["batch.sequences=4096", "batch.ramp=[1,1,10]"], "at most 256 sizes");
        refused(&["batch.ramp=[2,2,99999999999999]"], "samples");
        refused(&["layout.dp=4", "batch.ramp=[2,2,10]"], "batch.ramp: a step of 2 sequences: layout.dp = 4");
    }

    proptest! {
        /// Step by step as `RampupBatchsizeNumMicroBatchesCalculator` of Megatron-LM goes: the size of a step follows from
        /// the samples before it.
        #[test]
        fn sizes_follow_from_the_samples_before(
            from in 1usize..9, by in 1usize..5, sizes in 1usize..7, samples in 1usize..300,
        ) {
            let ramp = BatchRamp { from, by, samples };
            let full = from + by * sizes;
            let batch = BatchSpec { sequence: 16, sequences: full, ramp: Some(ramp) };
            let mut seen = 0;
            for done in 0..200 {
                let grown = (seen * sizes as u64 / samples as u64).min(sizes as u64) as usize;
                let size = from + by * grown;
                prop_assert_eq!(batch.sequences_after(done), size);
                prop_assert_eq!(batch.samples_before(done), seen);
                seen += size as u64;
            }
            prop_assert_eq!(batch.stages().last().map(|s| s.sequences), Some(full));
        }
    }
}
