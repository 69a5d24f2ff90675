//! The fastest layout alone, of a machine in several sizes at once: what a search for dollars asks.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use spec::Result;

use super::{Found, Part, SharedAxes, Space, jobs, run};
use crate::estimate::{Estimator, Problem, Templates};
use crate::placement::Placement;

/// The fastest layout of each problem, which differ in the size of their machine alone; `None` where nothing fits.
/// `space.accelerators` and `space.keep` do not count. Templates are folded once for all sizes, and no front is kept. What
/// shares a template with the `good` layouts, those of another size perhaps, is estimated first and bounds the rest; they
/// change nothing in what is found.
///
/// # Errors
/// If the catalogue states no peak of the format for the accelerator.
pub fn fastest(problems: &[Problem], space: &Space, good: &[Placement]) -> Result<Vec<Option<Found>>> {
    let yet: Vec<Fastest> = problems.iter().map(|_| Fastest::new()).collect();
    let spaces: Vec<Space> = problems
        .iter()
        .map(|p| Space { accelerators: p.cluster.accelerators, keep: 1, ..space.clone() })
        .collect();
    let mut by_template: BTreeMap<SharedAxes, Vec<usize>> = BTreeMap::new();
    for (i, (problem, space)) in problems.iter().zip(&spaces).enumerate() {
        for job in jobs(problem, space) {
            by_template.entry(job).or_default().push(i);
        }
    }
    let all: Vec<(SharedAxes, Vec<usize>)> = by_template.into_iter().collect();
    let parts = |(job, sizes): &(SharedAxes, Vec<usize>)| {
        let (mut templates, layer_s) = (Templates::new(), Cell::new(0.0));
        let mut parts = Vec::new();
        for &i in sizes {
            let mut estimator = Estimator::new(&problems[i], space.format)?.with_templates(templates);
            let goal = Goal::Fastest { yet: &yet[i], layer_s: &layer_s };
            parts.push((i, run(&mut estimator, (&spaces[i], goal), *job)?));
            templates = estimator.templates();
        }
        Ok(parts)
    };
    let is_good = |job: &SharedAxes| good.iter().any(|g| *job == SharedAxes::of(g));
    let first: Vec<Result<Vec<(usize, Part)>>> =
        all.par_iter().filter(|of| is_good(&of.0)).map(parts).collect();
    let rest: Vec<Result<Vec<(usize, Part)>>> =
        all.par_iter().filter(|of| !is_good(&of.0)).map(parts).collect();
    let mut best: Vec<Part> = problems.iter().map(|_| Part::default()).collect();
    for parts in first.into_iter().chain(rest) {
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
    Front {
        /// What is found already and bounds the rest.
        known: &'a Part,
    },
    /// The fastest alone.
    Fastest {
        /// Of all jobs.
        yet: &'a Fastest,
        /// Compute of the mean layer of this job's template for one micro-batch in seconds, which no machine's size changes:
        /// 0 until it is known. The fullest stage has at least its share of all layers.
        layer_s: &'a Cell<f64>,
    },
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
