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

pub use host::{cpu, load_average};
pub use stepper::Stepper;

use machine::Workload;
use spec::RunSpec;

/// What a run asks of a machine: its model and batch, and the work space that the executor's kernels take.
pub fn workload<'a>(run: &'a RunSpec, threads: usize, transport: &'a str) -> Workload<'a> {
    Workload {
        model: &run.model,
        sequence: run.batch.sequence,
        sequences: run.batch.sequences,
        precision: run.train.precision,
        threads,
        transport,
        documents: run.data.attend == spec::run::Attend::Documents,
        workspace: train::workspace_len,
    }
}

/// The value that the share `q` of `values` is not above; 0 of none. Sorts them.
pub fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (q * values.len().saturating_sub(1) as f64).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn quantiles_of_few_values() {
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.3), 2.0);
        assert_eq!(quantile(&mut [5.0, 1.0, 2.0, 3.0, 4.0], 0.3), 2.0);
        assert_eq!(quantile(&mut [7.0], 0.9), 7.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
    }
}
