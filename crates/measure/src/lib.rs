//! This machine, measured: steps on the executor, the rates of its kernels and messages, and what was predicted of
//! runs against what they took.
//!
//! Whoever calls starts the processes that ranks need, and hands their times back through a function.

pub mod calibrate;
pub mod compare;
pub mod predict;
pub mod stepper;
pub mod trace;

mod host;
mod programs;
mod record;
mod tables;

pub use host::load_average;
pub use stepper::Stepper;

use std::path::Path;

use journal::{Record, Step};
use machine::Workload;
use spec::{Error, Result, RunSpec};

/// What a run asks of a machine: its model and batch, and the work space that the executor's kernels take.
pub fn workload<'a>(run: &'a RunSpec, threads: usize, transport: &'a str) -> Workload<'a> {
    Workload {
        model: &run.model,
        sequence: run.batch.sequence,
        sequences: run.batch.sequences,
        precision: run.train.precision,
        recipe: program::Recipe::of(run),
        experts: None,
        threads,
        transport,
        workspace: train::workspace_len,
    }
}

/// Which share of a layer's tokens each expert got, layer by layer, over all steps of the run in `dir`.
///
/// # Errors
/// If its journal has no counts: it has not trained, or it is no mixture of experts.
pub fn expert_shares(dir: &Path) -> Result<Vec<Vec<f64>>> {
    let lacks = || {
        Error::user(format!("no counts of experts are recorded in {}", dir.display()))
            .hint("give the directory of a run that trained a mixture of experts")
    };
    let files = journal::files(dir).map_err(|e| e.hint("give the directory of a run"))?;
    let (_, first) = files.into_iter().next().ok_or_else(lacks)?;
    let mut sums = Counts::default();
    journal::read(&first)?.into_iter().for_each(|record| sums.take(&record));
    sums.shares().ok_or_else(lacks)
}

/// Tokens that went to each expert, by layer, over steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(Vec<Vec<u64>>);

impl Counts {
    /// Adds a step's. A run that went on with another model is counted from there.
    pub(crate) fn take(&mut self, record: &Record) {
        let Record::Step(Step { expert_counts: Some(counts), .. }) = record else { return };
        let same = self.0.iter().map(Vec::len).eq(counts.iter().map(Vec::len));
        if !same {
            self.0 = vec![Vec::new(); counts.len()];
        }
        for (sum, of_layer) in self.0.iter_mut().zip(counts) {
            sum.resize(of_layer.len(), 0);
            sum.iter_mut().zip(of_layer).for_each(|(sum, n)| *sum += n);
        }
    }

    /// Shares of each layer's; none of a layer without.
    pub(crate) fn shares(&self) -> Option<Vec<Vec<f64>>> {
        let of_layer = |counts: &Vec<u64>| {
            let all = counts.iter().sum::<u64>();
            counts.iter().filter(|_| all > 0).map(|n| *n as f64 / all as f64).collect()
        };
        let shares: Vec<Vec<f64>> = self.0.iter().map(of_layer).collect();
        shares.iter().any(|s| !s.is_empty()).then_some(shares)
    }
}

#[cfg(test)]
mod tests {
    use super::{Counts, Record, Step};

    #[test]
    fn counts_of_steps_become_shares_of_layers() {
        let step =
            |counts: Option<Vec<Vec<u64>>>| Record::Step(Step { expert_counts: counts, ..Step::default() });
        let of = |all: &[Option<Vec<Vec<u64>>>]| {
            let mut sums = Counts::default();
            all.iter().for_each(|counts| sums.take(&step(counts.clone())));
            sums.shares()
        };
        assert_eq!(of(&[None]), None);
        assert_eq!(of(&[Some(vec![vec![], vec![0, 0]])]), None);
        let steps = [Some(vec![vec![], vec![3, 1]]), None, Some(vec![vec![], vec![1, 3]])];
        assert_eq!(of(&steps), Some(vec![vec![], vec![0.5, 0.5]]));
        let other = [Some(vec![vec![8, 0]]), Some(vec![vec![], vec![3, 1]])];
        assert_eq!(of(&other), Some(vec![vec![], vec![0.75, 0.25]]));
    }
}
