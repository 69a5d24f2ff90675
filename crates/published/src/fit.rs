//! Fitting the constants on published runs, and judging them on sources left out.
//!
//! A constant is the prior times a factor each for the accelerator family, the numeric recipe and the software
//! generation. Factors are found by damped Gauss-Newton on the logarithm of predicted over published step time, drawn
//! to one by a ridge, with outliers counting less (Huber). No factor belongs to a row or a source.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use plan::calibration::{COUNT, Calibration, Constants, FACTOR_MAX, Factors, PRIOR, Spread, Spreads};
use plan::estimate::{Estimate, Estimator, Pace, Problem};
use plan::template::{Key, Template};
use rayon::prelude::*;
use spec::Result;

use crate::runs::Run;
use crate::validate::quantile;

/// Steps of Gauss-Newton; it settles in about ten.
const STEPS: usize = 16;
/// How often a step that makes things worse is halved: where one term takes over from another, slopes change.
const HALVINGS: usize = 4;
/// Steps when some runs are left out: the start is close, but where experts are few slopes change.
const LEAVE_OUT_STEPS: usize = 4;
/// How far a logarithm is moved to find a slope.
const NUDGE: f64 = 0.02;
/// How far a logarithm is moved in one step at most.
const MOVE_MAX: f64 = 0.25;
/// The power of the number of rows of one source that weighs each of them.
const SAME_SOURCE: f64 = -0.25;
/// Pivots below this are of constants that nothing in the rows depends on.
const SINGULAR: f64 = 1e-12;
/// Errors beyond this (in log) count linearly.
const HUBER: f64 = 0.12;

/// What a factor belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Effect {
    kind: EffectKind,
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum EffectKind {
    /// An accelerator family.
    Family,
    /// A numeric recipe.
    Recipe,
    /// A software generation.
    Software,
    /// One accelerator of a family.
    Chip,
    /// All generations of a stack.
    Lineage,
}

impl Effect {
    fn of(kind: EffectKind, run: &Run) -> Effect {
        let name = match kind {
            EffectKind::Family => &run.cluster.accelerator.family.name,
            EffectKind::Recipe => run.recipe,
            EffectKind::Software => run.software.name,
            EffectKind::Chip => &run.cluster.accelerator.name,
            EffectKind::Lineage => run.software.lineage,
        };
        Effect { kind, name: name.to_owned() }
    }

    /// Its factors in a calibration.
    fn factors<'a>(&self, c: &'a mut Calibration) -> &'a mut Factors {
        let table = match self.kind {
            EffectKind::Family => &mut c.family,
            EffectKind::Recipe => &mut c.recipe,
            EffectKind::Software => &mut c.software,
            EffectKind::Chip => &mut c.chip,
            EffectKind::Lineage => &mut c.lineage,
        };
        table.entry(self.name.clone()).or_default()
    }
}

/// What sets one accelerator apart from its family: its clock under its power limit, its links, and how well it does
/// grouped products. Indices into [`Constants::get`].
const OF_CHIP: [usize; 3] = [0, 3, 6];
/// The host's time is the software's alone: neither accelerators nor formats of products change it. The same index.
const HOST: usize = 4;
/// The ridge of constants that an effect does not have.
const FIXED: f64 = 1e9;

/// How strongly a factor is drawn to one, by kind of effect, and by constant relative to that.
const RIDGE: [(EffectKind, f64); 5] = [
    (EffectKind::Family, 0.02),
    (EffectKind::Recipe, 0.02),
    (EffectKind::Lineage, 0.03),
    (EffectKind::Software, 0.1),
    (EffectKind::Chip, 0.2),
];

/// A run ready to be estimated many times.
pub struct Prepared {
    problem: Problem,
    run: Run,
    /// Which of the run's layouts is taken.
    chosen: usize,
    templates: HashMap<Key, Arc<Template>>,
    /// What the way that is fitted says of the run, over the closed form.
    over: f64,
}

/// A published run that had a bigger memory than the model believes still ran: up to this factor counts as fitting.
const MEMORY_TOLERANCE: f64 = 1.3;
/// Superchips keep activations in the host's memory, over a link of its own: what counts as room grows by this.
const HOST_MEMORY: f64 = 3.0;

impl Prepared {
    /// Folds the programs of a run's layouts.
    ///
    /// # Errors
    /// If the model allows none of them.
    pub fn new(run: &Run) -> Result<Self> {
        let mut prepared = Prepared {
            problem: run.problem(),
            run: run.clone(),
            chosen: 0,
            templates: HashMap::new(),
            over: 1.0,
        };
        prepared.choose(PRIOR)?;
        Ok(prepared)
    }

    /// Takes the fastest layout that fits under these constants.
    ///
    /// # Errors
    /// If the model allows none.
    pub fn choose(&mut self, constants: Constants) -> Result<Estimate> {
        let (estimate, layout) = self.near(constants, 1.0)?[0];
        self.chosen = layout;
        Ok(estimate)
    }

    /// The fastest layout that fits under these constants, first, and those that take up to `within` times as long.
    ///
    /// # Errors
    /// If the model allows none.
    pub(crate) fn near(&mut self, constants: Constants, within: f64) -> Result<Vec<(Estimate, usize)>> {
        self.problem.constants = constants;
        let mut estimator = Estimator::new(&self.problem, self.run.placements[0].format)?
            .with_templates(std::mem::take(&mut self.templates));
        let accelerator = &self.problem.cluster.accelerator;
        let host = if accelerator.shares_host_memory { HOST_MEMORY } else { 1.0 };
        let room = accelerator.memory_bytes.value * MEMORY_TOLERANCE * host;
        let estimates: Vec<Result<Estimate>> =
            self.run.placements.iter().map(|placement| estimator.estimate(placement)).collect();
        self.templates = estimator.templates();
        let (mut found, mut refused) = (Vec::new(), None);
        for (i, estimate) in estimates.into_iter().enumerate() {
            match estimate {
                // What does not fit is ranked by how far it is from fitting.
                Ok(estimate) => found.push(((estimate.memory.total() / room).max(1.0), estimate, i)),
                Err(error) => refused = Some(error),
            }
        }
        found.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.step_s.total_cmp(&b.1.step_s)));
        let Some(&(over, best, _)) = found.first() else {
            let none = || spec::Error::user(format!("{}: no layout", self.run.id));
            return Err(refused.unwrap_or_else(none));
        };
        found.retain(|(o, estimate, _)| *o == over && estimate.step_s <= within * best.step_s);
        Ok(found.into_iter().map(|(_, estimate, i)| (estimate, i)).collect())
    }

    /// The run.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// The run as a problem, with the constants that it was last estimated with.
    pub(crate) fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Takes a layout by its place among the run's.
    pub(crate) fn take(&mut self, layout: usize) {
        self.chosen = layout;
    }

    /// Fits what takes so many times as long as the closed form says.
    pub(crate) fn set_over(&mut self, over: f64) {
        self.over = over;
    }

    /// The layout taken.
    pub fn placement(&self) -> &plan::placement::Placement {
        &self.run.placements[self.chosen]
    }

    /// Estimates the chosen layout.
    ///
    /// # Errors
    /// If the layout cannot be lowered to a program.
    pub fn estimate(&mut self, constants: Constants) -> Result<Estimate> {
        self.problem.constants = constants;
        let mut estimator = Estimator::new(&self.problem, self.run.placements[0].format)?
            .with_templates(std::mem::take(&mut self.templates));
        let estimate = estimator.estimate(&self.run.placements[self.chosen]);
        self.templates = estimator.templates();
        estimate
    }

    /// The constants for this run.
    pub fn constants(&self, calibration: &Calibration) -> Constants {
        calibration.constants(
            &self.run.cluster.accelerator.family.name,
            &self.run.cluster.accelerator.name,
            self.run.recipe,
            &self.run.software,
        )
    }

    /// Logarithm of predicted over published.
    fn residual(&mut self, calibration: &Calibration) -> f64 {
        self.estimate(self.constants(calibration))
            .map_or(0.0, |p| (self.over * p.step_s / self.run.step_s).ln())
    }
}

/// Fits factors on the runs.
pub fn fit(runs: &mut [Prepared]) -> Calibration {
    let mut calibration = Calibration::default();
    for step in 0..STEPS {
        if step % 4 == 0 {
            choose_all(runs, &calibration);
        }
        let linear = Linear::of(runs, &calibration);
        let all = vec![true; runs.len()];
        linear.damped(runs, &mut calibration, &all);
    }
    choose_all(runs, &calibration);
    calibration
}

fn choose_all(runs: &mut [Prepared], calibration: &Calibration) {
    // A layout that could be estimated before can be again: errors cannot come up here.
    runs.par_iter_mut().for_each(|p| drop(p.choose(p.constants(calibration))));
}

/// The fit with each group of runs left out in turn, by what `group` says: the calibration that has not seen it.
///
/// Each starts from the fit on all runs, whose slopes serve for the first step. Against fits from the prior the rows of
/// TPU v5e's and Ironwood's tables, the farthest from what is left, then miss by the same to 0.02 at most.
pub fn leave_out(
    runs: &mut [Prepared],
    fitted: &Calibration,
    group: impl Fn(&Run) -> String,
) -> BTreeMap<String, Calibration> {
    let linear = Linear::of(runs, fitted);
    let groups: std::collections::BTreeSet<String> = runs.iter().map(|p| group(&p.run)).collect();
    let mut out = BTreeMap::new();
    for name in groups {
        let kept: Vec<bool> = runs.iter().map(|p| group(&p.run) != name).collect();
        // The first step is taken whole: half of it would leave half of what the fit on all runs knew of these.
        let mut calibration = fitted.clone();
        linear.step(&mut calibration, &linear.base, &kept);
        for _ in 1..LEAVE_OUT_STEPS {
            Linear::of(runs, &calibration).damped(runs, &mut calibration, &kept);
        }
        out.insert(name, calibration);
    }
    out
}

fn residuals(runs: &mut [Prepared], calibration: &Calibration) -> Vec<f64> {
    runs.par_iter_mut().map(|p| p.residual(calibration)).collect()
}

/// Residuals and their slopes at one calibration.
struct Linear {
    /// Each effect, its ridge, and the runs that it touches.
    effects: Vec<(Effect, f64)>,
    /// Slopes by column (effect, constant): of which run, how steep.
    jacobian: Vec<Vec<(usize, f64)>>,
    base: Vec<f64>,
    weights: Vec<f64>,
}

impl Linear {
    fn of(runs: &mut [Prepared], calibration: &Calibration) -> Self {
        let mut effects: BTreeMap<Effect, (f64, Vec<bool>)> = BTreeMap::new();
        let mut size: BTreeMap<&str, f64> = BTreeMap::new();
        for (i, p) in runs.iter().enumerate() {
            *size.entry(p.run.family.as_str()).or_default() += 1.0;
            for (kind, ridge) in RIDGE {
                let slot = effects
                    .entry(Effect::of(kind, &p.run))
                    .or_insert_with(|| (ridge, vec![false; runs.len()]));
                slot.1[i] = true;
            }
        }
        // Rows of one source share what the model lacks: many of them say less than as many sources would.
        let weights = runs.iter().map(|p| size[p.run.family.as_str()].powf(SAME_SOURCE)).collect();
        let base = residuals(runs, calibration);
        let effects: Vec<(Effect, f64, Vec<bool>)> =
            effects.into_iter().map(|(e, (r, rows))| (e, r, rows)).collect();
        let jacobian = (0..effects.len() * COUNT)
            .map(|column| {
                let (effect, _, touched) = &effects[column / COUNT];
                let mut nudged = calibration.clone();
                effect.factors(&mut nudged)[column % COUNT] += NUDGE;
                runs.par_iter_mut()
                    .enumerate()
                    .filter(|(i, _)| touched[*i])
                    .map(|(i, p)| (i, (p.residual(&nudged) - base[i]) / NUDGE))
                    .collect()
            })
            .collect();
        Linear { effects: effects.into_iter().map(|(e, r, _)| (e, r)).collect(), jacobian, base, weights }
    }

    /// What a fit makes least: squares of errors of the runs kept, linear for outliers, and of what the ridges hold.
    fn loss(&self, base: &[f64], calibration: &mut Calibration, kept: &[bool]) -> f64 {
        let huber = |r: f64| if r <= HUBER { r * r } else { HUBER * (2.0 * r - HUBER) };
        let of_kept = base.iter().zip(&self.weights).zip(kept).filter(|(_, kept)| **kept);
        let errors = of_kept.map(|((r, w), _)| w * w * huber(r.abs())).sum::<f64>();
        let ridges = self.effects.iter().map(|(effect, ridge)| {
            let squares = effect.factors(calibration).iter().map(|f| f * f).sum::<f64>();
            ridge * squares
        });
        errors + ridges.sum::<f64>()
    }

    /// One step on the runs kept, halved while it makes them worse.
    fn damped(&self, runs: &mut [Prepared], calibration: &mut Calibration, kept: &[bool]) {
        let (from, before) = (calibration.clone(), self.loss(&self.base, calibration, kept));
        self.step(calibration, &self.base, kept);
        for _ in 0..HALVINGS {
            if self.loss(&residuals(runs, calibration), calibration, kept) <= before {
                break;
            }
            self.halfway(calibration, &from);
        }
    }

    /// Takes half of a step back.
    fn halfway(&self, calibration: &mut Calibration, from: &Calibration) {
        let mut from = from.clone();
        for (effect, _) in &self.effects {
            let back = *effect.factors(&mut from);
            for (f, b) in effect.factors(calibration).iter_mut().zip(back) {
                *f = 0.5 * (*f + b);
            }
        }
    }

    /// One Gauss-Newton step on the runs kept, from residuals `base`.
    fn step(&self, calibration: &mut Calibration, base: &[f64], kept: &[bool]) {
        let columns = self.jacobian.len();
        let robust: Vec<f64> = (0..base.len())
            .map(|i| {
                let w = self.weights[i] * (HUBER / base[i].abs().max(HUBER)).sqrt();
                if kept[i] { w * w } else { 0.0 }
            })
            .collect();
        let mut by_run: Vec<Vec<(usize, f64)>> = vec![Vec::new(); base.len()];
        for (column, slopes) in self.jacobian.iter().enumerate() {
            for (i, x) in slopes {
                by_run[*i].push((column, *x));
            }
        }
        let mut normal = vec![vec![0.0; columns]; columns];
        let mut right = vec![0.0; columns];
        for (i, slopes) in by_run.iter().enumerate() {
            for (a, x) in slopes {
                right[*a] -= x * base[i] * robust[i];
                for (b, y) in slopes {
                    normal[*a][*b] += x * y * robust[i];
                }
            }
        }
        for a in 0..columns {
            let (effect, ridge) = &self.effects[a / COUNT];
            let fixed = match effect.kind {
                EffectKind::Chip => !OF_CHIP.contains(&(a % COUNT)),
                EffectKind::Family | EffectKind::Recipe => a % COUNT == HOST,
                EffectKind::Lineage | EffectKind::Software => false,
            };
            let ridge = if fixed { FIXED } else { *ridge };
            normal[a][a] += ridge;
            right[a] -= ridge * effect.factors(calibration)[a % COUNT];
        }
        for (a, d) in solve(normal, right).iter().enumerate() {
            let f = &mut self.effects[a / COUNT].0.factors(calibration)[a % COUNT];
            *f = (*f + d.clamp(-MOVE_MAX, MOVE_MAX)).clamp(-FACTOR_MAX, FACTOR_MAX);
        }
    }
}

/// One prediction on a source that the fit had not seen.
#[derive(Clone, Debug)]
pub struct Miss {
    /// Accelerator family.
    pub family: String,
    /// Software generation.
    pub software: String,
    /// Accelerators.
    pub accelerators: usize,
    /// What the prediction says sets the pace.
    pub pace: Pace,
    /// Logarithm of predicted over published.
    pub log_error: f64,
}

/// No interval is narrower: runs of the same job differ by more than this.
const SPREAD_MIN: f64 = 1.05;

/// Share of the errors on rows left out that an interval holds: nine in ten of rows to come lie inside of a little more.
const INSIDE: f64 = 0.92;

/// How wide intervals have to be, from errors on unseen sources.
pub fn spreads(misses: &[Miss]) -> Spreads {
    let learn = |name: &dyn Fn(&Miss) -> String| {
        let mut groups: BTreeMap<(String, Option<Pace>), (Vec<f64>, usize)> = BTreeMap::new();
        for m in misses {
            for pace in [None, Some(m.pace)] {
                let group = groups.entry((name(m), pace)).or_default();
                group.0.push(m.log_error.abs());
                group.1 = group.1.max(m.accelerators);
            }
        }
        let spread =
            |((name, pace), (abs, accelerators)): ((String, Option<Pace>), (Vec<f64>, usize))| Spread {
                name,
                pace,
                rows: abs.len(),
                factor: quantile(&abs, INSIDE).exp().max(SPREAD_MIN),
                accelerators,
            };
        groups.into_iter().map(spread).collect()
    };
    Spreads {
        both: learn(&|m| format!("{}/{}", m.family, m.software)),
        family: learn(&|m| m.family.clone()),
        software: learn(&|m| m.software.clone()),
    }
}

/// Solves a symmetric positive definite system by Gaussian elimination with pivots.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|x, y| a[*x][i].abs().total_cmp(&a[*y][i].abs())).unwrap_or(i);
        a.swap(i, pivot);
        b.swap(i, pivot);
        let row = a[i].clone();
        if row[i].abs() < SINGULAR {
            continue;
        }
        for j in i + 1..n {
            let by = a[j][i] / row[i];
            if by != 0.0 {
                for k in i..n {
                    a[j][k] -= by * row[k];
                }
                b[j] -= by * b[i];
            }
        }
    }
    let mut x = vec![0.0; n];
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| a[i][k] * x[k]).sum();
        x[i] = if a[i][i].abs() < SINGULAR { 0.0 } else { (b[i] - sum) / a[i][i] };
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_solved() {
        let x = solve(vec![vec![4.0, 1.0], vec![1.0, 3.0]], vec![1.0, 2.0]);
        assert!((x[0] - 1.0 / 11.0).abs() < 1e-12 && (x[1] - 7.0 / 11.0).abs() < 1e-12);
    }
}
