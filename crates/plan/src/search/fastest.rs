//! The fastest layout alone, of a machine in several sizes at once: what a search for dollars asks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use spec::Result;

use super::{Found, Job, Part, Space, jobs, run};
use crate::estimate::{Estimator, Problem, Templates};

/// The fastest layout of each problem, which differ in the size of their machine alone; `None` where nothing fits.
/// `space.accelerators` and `space.keep` do not count. Templates are folded once for all sizes, and no front is kept.
///
/// # Errors
/// If the catalogue states no peak of the format for the accelerator.
pub fn fastest(problems: &[Problem], space: &Space) -> Result<Vec<Option<Found>>> {
    let yet: Vec<Fastest> = problems.iter().map(|_| Fastest::new()).collect();
    let spaces: Vec<Space> = problems
        .iter()
        .map(|p| Space { accelerators: p.cluster.accelerators, keep: 1, ..space.clone() })
        .collect();
    let mut by_template: BTreeMap<Job, Vec<usize>> = BTreeMap::new();
    for (i, (problem, space)) in problems.iter().zip(&spaces).enumerate() {
        for job in jobs(problem, space) {
            by_template.entry(job).or_default().push(i);
        }
    }
    let all: Vec<(Job, Vec<usize>)> = by_template.into_iter().collect();
    let found: Vec<Result<Vec<(usize, Part)>>> = all
        .par_iter()
        .map(|(job, sizes)| {
            let mut templates = Templates::new();
            let mut parts = Vec::new();
            for &i in sizes {
                let mut estimator = Estimator::new(&problems[i], space.format)?.with_templates(templates);
                parts.push((i, run(&mut estimator, (&spaces[i], Goal::Fastest(&yet[i])), *job)?));
                templates = estimator.templates();
            }
            Ok(parts)
        })
        .collect();
    let mut best: Vec<Part> = problems.iter().map(|_| Part::default()).collect();
    for parts in found {
        for (i, part) in parts? {
            best[i].merge(part, 1);
        }
    }
    Ok(best.into_iter().map(|part| part.best.into_iter().next()).collect())
}

/// What is asked of the space.
#[derive(Clone, Copy)]
pub(super) enum Goal<'a> {
    /// The best few, the front of time and memory, and the smallest where none fits.
    Front,
    /// The fastest alone; all jobs share the time of the fastest yet.
    Fastest(&'a Fastest),
}

/// Seconds of the fastest layout yet, as bits: of numbers from 0 they are in the numbers' own order.
pub(super) struct Fastest(AtomicU64);

impl Fastest {
    fn new() -> Self {
        Fastest(AtomicU64::new(f64::INFINITY.to_bits()))
    }

    pub(super) fn seconds(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }

    pub(super) fn offer(&self, step_s: f64) {
        self.0.fetch_min(step_s.to_bits(), Ordering::Relaxed);
    }
}
