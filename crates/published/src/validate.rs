//! How right the planner is: published runs estimated with their published layouts.

use std::collections::{BTreeMap, BTreeSet};

use plan::calibration::{Calibration, Evidence};
use rayon::prelude::*;
use serde::Serialize;
use spec::stats::kendall_tau;
use spec::{Catalog, Error, Result};

use crate::fit::{self, Miss, Prepared};
use crate::memory::{self, Memory};
use crate::runs::{Measured, Run, Runs, Skipped};

/// Errors of predicted step times on a table of published runs.
#[derive(Clone, Debug, Serialize)]
pub struct Validation {
    /// Rows estimated.
    pub priced: usize,
    /// Median of |predicted / published - 1|.
    pub median_abs_error: f64,
    /// 90th percentile of the same.
    pub p90_abs_error: f64,
    /// Share of published times inside the predicted interval.
    pub inside_interval: f64,
    /// Whether each row was estimated with constants that had not seen its source.
    pub held_out: bool,
    /// What the constants had not seen.
    pub unseen: Unseen,
    /// Calls of what fits, if the table has outcomes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// By source.
    pub sources: Vec<SourceErrors>,
    /// Layout sweeps: how well the order of layouts is predicted.
    pub sweeps: Vec<Sweep>,
    /// Rows that were not estimated, and why.
    pub not_priced: Vec<Skipped>,
    /// Rows estimated.
    pub rows: Vec<RowError>,
}

/// Which rows the constants that estimate them had not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unseen {
    /// None: the constants may have been fitted on them.
    Nothing,
    /// Those of a source (or another group) when it is estimated.
    Groups,
    /// The half of each source that is kept back; only it is estimated.
    Half,
}

/// Errors on one source.
#[derive(Clone, Debug, Serialize)]
pub struct SourceErrors {
    /// As the table names it.
    pub source: String,
    /// Rows estimated.
    pub rows: usize,
    /// Mean of predicted / published - 1.
    pub mean_error: f64,
    /// Median of its absolute value.
    pub median_abs_error: f64,
    /// 90th percentile of the same.
    pub p90_abs_error: f64,
    /// Share of published times inside the predicted interval.
    pub inside_interval: f64,
}

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct RowError {
    /// Its name.
    pub id: String,
    /// Its source.
    pub source: String,
    /// Predicted step time in seconds.
    pub predicted: f64,
    /// Low end of the interval.
    pub low: f64,
    /// High end of the interval.
    pub high: f64,
    /// Published step time in seconds, converted if another figure was published.
    pub published: f64,
    /// predicted / published - 1.
    pub error: f64,
    /// Which published figure was used.
    pub measured: Measured,
    /// What bounds the step.
    pub bound: &'static str,
    /// What the interval rests on.
    pub evidence: Evidence,
    /// What had to be assumed.
    pub assumptions: Vec<String>,
}

/// Runs of one model on one number of accelerators under several layouts.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// Model, accelerators and source.
    pub name: String,
    /// Layouts.
    pub layouts: usize,
    /// Kendall's tau between predicted and published order: 1 the same, -1 reversed.
    pub kendall_tau: f64,
    /// How much slower the layout predicted best is than the best, as a fraction.
    pub regret: f64,
}

/// Sources that are secondary statements or sums over whole trainings: no step times to judge by.
const NOT_STEPS: [&str; 3] = ["frontier", "ledger", "gpuhours"];

/// Estimates the rows of a table with fitted constants.
///
/// # Errors
/// If the text is no table of runs.
pub fn validate(path: &str, text: &str, catalog: &Catalog, calibration: &Calibration) -> Result<Validation> {
    let (mut prepared, not_priced, memory) = prepare(path, text, catalog)?;
    let rows = prepared.par_iter_mut().map(|p| row(p, calibration)).collect();
    Ok(Validation { memory, ..summary(rows, &prepared, not_priced, Unseen::Nothing) })
}

/// Estimates each row with constants fitted on the rows of all other sources.
///
/// # Errors
/// If the text is no table of runs.
pub fn cross_validate(path: &str, text: &str, catalog: &Catalog) -> Result<Validation> {
    cross_validate_by(path, text, catalog, |run| run.source.clone())
}

/// [`cross_validate`] with what is left out together said by `group`.
///
/// # Errors
/// If the text is no table of runs.
pub fn cross_validate_by(
    path: &str,
    text: &str,
    catalog: &Catalog,
    group: impl Fn(&Run) -> String + Sync,
) -> Result<Validation> {
    let (mut prepared, not_priced, memory) = prepare(path, text, catalog)?;
    let fitted = fit::fit(&mut prepared);
    let unseen = fit::leave_out(&mut prepared, &fitted, &group);
    let rows = prepared.par_iter_mut().map(|p| {
        let calibration = unseen.get(&group(p.run())).unwrap_or(&fitted);
        row(p, calibration)
    });
    let rows = rows.collect();
    Ok(Validation { memory, ..summary(rows, &prepared, not_priced, Unseen::Groups) })
}

/// Fits constants on half of the rows of each source and estimates the other half ([`crate::runs::Run::kept_back`]).
///
/// # Errors
/// If the text is no table of runs.
pub fn halves(path: &str, text: &str, catalog: &Catalog) -> Result<Validation> {
    let (prepared, not_priced, memory) = prepare(path, text, catalog)?;
    let (mut back, mut fitted): (Vec<_>, Vec<_>) = prepared.into_iter().partition(|p| p.run().kept_back());
    if back.is_empty() != fitted.is_empty() {
        let (kept, n) = if back.is_empty() { ("none", fitted.len()) } else { ("all", back.len()) };
        return Err(Error::user(format!("{path}: {kept} of its {n} rows are in the half that is kept back"))
            .hint(
                "which half a row is in is a property of its id: more rows fill both; or leave --half out",
            ));
    }
    let calibration = with_spreads(&mut fitted);
    let rows = back.par_iter_mut().map(|p| row(p, &calibration)).collect();
    Ok(Validation { memory, ..summary(rows, &back, not_priced, Unseen::Half) })
}

/// Fits the constants on all rows of a table.
///
/// # Errors
/// If the text is no table of runs, or none of them has a time to fit on.
pub fn calibrate(path: &str, text: &str, catalog: &Catalog) -> Result<Calibration> {
    let (mut prepared, not_priced, _) = prepare(path, text, catalog)?;
    if prepared.is_empty() {
        return Err(nothing(path, "fitted on", &not_priced));
    }
    Ok(with_spreads(&mut prepared))
}

/// No row of a table could be used.
pub fn nothing(path: &str, used: &str, not_priced: &[Skipped]) -> Error {
    let Some(first) = not_priced.first() else {
        return Error::user(format!("{path}: a header without rows"))
            .hint("each line after the header is one published run");
    };
    let rows = not_priced.len();
    Error::user(format!("{path}: none of {rows} rows can be {used}; the first: {}", first.reason))
        .hint("phalanx validate --help lists the columns, phalanx catalog list the names")
}

/// Constants fitted on these rows, and how wide their intervals are, from what they miss by on sources left out.
fn with_spreads(prepared: &mut [Prepared]) -> Calibration {
    let mut calibration = fit::fit(prepared);
    let unseen = fit::leave_out(prepared, &calibration, |run| run.source.clone());
    let unseen_fifth = fit::leave_out(prepared, &calibration, fifth);
    let mut sources: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for p in prepared.iter() {
        sources.entry(p.run().software.name).or_default().insert(p.run().source.clone());
    }
    let misses: Vec<Miss> = prepared
        .par_iter_mut()
        .filter_map(|p| {
            // Without a source that is alone with its stack nothing would be known of the stack.
            let alone = sources[p.run().software.name].len() == 1;
            let c = if alone { unseen_fifth.get(&fifth(p.run())) } else { unseen.get(&p.run().source) };
            let estimate = p.choose(p.constants(c?)).ok()?;
            let run = p.run();
            Some(Miss {
                family: run.cluster.accelerator.family.name.clone(),
                software: run.software.name.to_owned(),
                accelerators: run.cluster.accelerators,
                pace: estimate.breakdown.pace(),
                log_error: (estimate.step_s / run.step_s).ln(),
            })
        })
        .collect();
    calibration.spread = fit::spreads(&misses);
    calibration
}

/// One of five parts of the rows, by their ids.
fn fifth(run: &Run) -> String {
    let hash = run.id.bytes().fold(7u32, |a, b| a.wrapping_mul(31).wrapping_add(b.into())) >> 7;
    (hash % 5).to_string()
}

pub(crate) fn prepare(
    path: &str,
    text: &str,
    catalog: &Catalog,
) -> Result<(Vec<Prepared>, Vec<Skipped>, Option<Memory>)> {
    let Runs { runs, outcomes, mut not_priced } = Runs::parse(path, text, catalog)?;
    let mut prepared = Vec::new();
    let made: Vec<_> = runs.par_iter().map(|run| (run, Prepared::new(run))).collect();
    for (run, made) in made {
        if NOT_STEPS.contains(&run.family.as_str()) {
            let reason = "the source states no step times of its own".to_owned();
            not_priced.push(Skipped { id: run.id.clone(), line: run.line, reason });
            continue;
        }
        match made {
            Ok(p) => prepared.push(p),
            Err(e) => not_priced.push(Skipped { id: run.id.clone(), line: run.line, reason: e.to_string() }),
        }
    }
    not_priced.sort_by_key(|n| n.line);
    Ok((prepared, not_priced, memory::calls(&outcomes)))
}

fn row(p: &mut Prepared, calibration: &Calibration) -> Option<RowError> {
    let estimate = p.choose(p.constants(calibration)).ok()?;
    let run = p.run();
    let family = &run.cluster.accelerator.family.name;
    let grade =
        calibration.spread(family, run.software.name, estimate.breakdown.pace(), run.cluster.accelerators);
    let spread = grade.factor;
    Some(RowError {
        id: run.id.clone(),
        source: run.source.clone(),
        predicted: estimate.step_s,
        low: estimate.step_s / spread,
        high: estimate.step_s * spread,
        published: run.step_s,
        error: estimate.step_s / run.step_s - 1.0,
        measured: run.measured,
        bound: estimate.breakdown.bound(),
        evidence: grade.evidence,
        assumptions: run.assumptions.clone(),
    })
}

fn summary(
    rows: Vec<Option<RowError>>,
    prepared: &[Prepared],
    not_priced: Vec<Skipped>,
    unseen: Unseen,
) -> Validation {
    let sweeps = sweeps(prepared, &rows);
    let rows: Vec<RowError> = rows.into_iter().flatten().collect();
    let mut by_source: BTreeMap<&str, Vec<&RowError>> = BTreeMap::new();
    for r in &rows {
        by_source.entry(&r.source).or_default().push(r);
    }
    let sources = by_source.into_iter().map(|(source, rows)| source_errors(source, &rows)).collect();
    let errors: Vec<f64> = rows.iter().map(|r| r.error).collect();
    Validation {
        priced: rows.len(),
        median_abs_error: quantile(&errors, 0.5),
        p90_abs_error: quantile(&errors, 0.9),
        inside_interval: inside(rows.iter()),
        held_out: unseen != Unseen::Nothing,
        unseen,
        memory: None,
        sources,
        sweeps,
        not_priced,
        rows,
    }
}

fn source_errors(source: &str, rows: &[&RowError]) -> SourceErrors {
    let errors: Vec<f64> = rows.iter().map(|r| r.error).collect();
    SourceErrors {
        source: source.to_owned(),
        rows: errors.len(),
        mean_error: errors.iter().sum::<f64>() / errors.len() as f64,
        median_abs_error: quantile(&errors, 0.5),
        p90_abs_error: quantile(&errors, 0.9),
        inside_interval: inside(rows.iter().copied()),
    }
}

/// Share of the rows whose published time lies in its interval.
fn inside<'a>(rows: impl ExactSizeIterator<Item = &'a RowError>) -> f64 {
    let all = rows.len().max(1) as f64;
    rows.filter(|r| (r.low..=r.high).contains(&r.published)).count() as f64 / all
}

/// The `q` quantile of absolute values (nearest rank); 0 of none.
pub(crate) fn quantile(errors: &[f64], q: f64) -> f64 {
    let mut abs: Vec<f64> = errors.iter().map(|e| e.abs()).collect();
    abs.sort_by(f64::total_cmp);
    let at = ((abs.len() as f64 * q).ceil() as usize).clamp(1, abs.len().max(1)) - 1;
    abs.get(at).copied().unwrap_or(0.0)
}

/// Fewer layouts than this make no sweep.
const SWEEP_MIN: usize = 5;

/// A problem under several layouts: (source, model, accelerators, sequences).
type SweepKey = (String, String, usize, usize);

fn sweeps(prepared: &[Prepared], rows: &[Option<RowError>]) -> Vec<Sweep> {
    let mut groups: BTreeMap<SweepKey, Vec<(f64, f64)>> = BTreeMap::new();
    for (p, r) in prepared.iter().zip(rows) {
        let Some(r) = r else { continue };
        let run = p.run();
        let layers = run.shape.model.layers;
        let name = format!("{} ({layers} layers)", run.shape.model.name);
        let key = (run.source.clone(), name, run.cluster.accelerators, run.sequences);
        groups.entry(key).or_default().push((r.predicted, r.published));
    }
    let sweep = |((source, model, n, sequences), times): (SweepKey, Vec<(f64, f64)>)| {
        let best = times.iter().map(|t| t.1).fold(f64::INFINITY, f64::min);
        let taken = times.iter().min_by(|a, b| a.0.total_cmp(&b.0)).map_or(best, |t| t.1);
        Sweep {
            name: format!("{model}, {n} accelerators, {sequences} sequences: {source}"),
            layouts: times.len(),
            kendall_tau: kendall_tau(&times).unwrap_or(1.0),
            regret: taken / best - 1.0,
        }
    };
    groups.into_iter().filter(|(_, times)| times.len() >= SWEEP_MIN).map(sweep).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_fitted_on_no_rows() {
        let catalog = Catalog::builtin().unwrap();
        let header = "id,source,accelerator,n_accel,layers,hidden,seq_len,global_batch\n";
        let check = |rows: &str, expected: &str| {
            let e = calibrate("t.csv", &format!("{header}{rows}"), &catalog).unwrap_err();
            assert!(e.to_string().starts_with(expected) && e.hint_text().is_some(), "{e}");
        };
        check("", "t.csv: a header without rows");
        check("a,b,h100,,32,4096,4096,8\n", "t.csv: none of 1 rows can be fitted on; the first: ");
    }

    #[test]
    fn quantiles_are_the_textbooks() {
        assert_eq!(quantile(&[0.1, -0.2, 0.3], 0.5), 0.2);
        assert_eq!(quantile(&[0.1, -0.2, 0.3], 0.9), 0.3);
        assert_eq!(quantile(&[], 0.9), 0.0);
    }
}
