//! How right the player is: published runs played message by message, beside the closed form.

use std::collections::BTreeMap;

use plan::calibration::Calibration;
use plan::network::{Extent, Group, NetworkModel};
use rayon::prelude::*;
use serde::Serialize;
use sim::Rehearsal;
use sim::world::{Disturbed, Folding};
use spec::{Catalog, Error, Result, Zero};

use crate::fit::{self, Prepared};
use crate::runs::{Run, Skipped};
use crate::validate::{nothing, prepare, quantile};

/// Which groups of a run share links, so that a closed form has to guess what a player knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Contention {
    /// None: groups inside of nodes, replicas between them.
    Nothing,
    /// Parameters sharded over nodes are gathered for each pass (ZeRO 3).
    ShardsOverNodes,
    /// Tokens travel to experts and back.
    Experts,
    /// Tensor parallelism across nodes.
    TensorOverNodes,
}

impl Contention {
    /// Its name in text.
    pub fn name(self) -> &'static str {
        match self {
            Contention::Nothing => "nothing contends",
            Contention::ShardsOverNodes => "ZeRO 3 over nodes",
            Contention::Experts => "expert all-to-all",
            Contention::TensorOverNodes => "tensor parallel over nodes",
        }
    }

    /// That of a run under the layout taken; of several the one that says more, more often.
    fn of(p: &Prepared) -> Self {
        let (cluster, l) = (&p.run().cluster, &p.placement().layout);
        let net = NetworkModel::of(cluster);
        let over_nodes = |size, stride| Extent::of(cluster, &net, Group { size, stride }).domains > 1.0;
        if over_nodes(l.tp, 1) {
            Contention::TensorOverNodes
        } else if l.ep > 1 {
            Contention::Experts
        } else if l.zero == Zero::Parameters && over_nodes(l.shards(), l.tp) {
            Contention::ShardsOverNodes
        } else {
            Contention::Nothing
        }
    }
}

/// One run, estimated and played.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub id: String,
    /// Its source.
    pub source: String,
    /// What contends.
    pub contention: Contention,
    /// Published step time in seconds.
    pub published: f64,
    /// As the closed form has it.
    pub estimated: f64,
    /// As played.
    pub played: f64,
    /// Played over the closed form of the same constants, less 1.
    pub differs: f64,
    /// The layout played.
    pub layout: String,
}

/// Absolute errors of one way to predict.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Errors {
    /// Their median.
    pub median_abs_error: f64,
    /// Their 90th percentile.
    pub p90_abs_error: f64,
}

/// Both ways on the same rows.
#[derive(Clone, Debug, Serialize)]
pub struct Share {
    /// Which rows.
    pub of: String,
    /// How many.
    pub rows: usize,
    /// The closed form.
    pub estimated: Errors,
    /// The player.
    pub played: Errors,
    /// Median of the absolute difference between both, as a share.
    pub median_apart: f64,
    /// Its 90th percentile.
    pub p90_apart: f64,
}

/// Published runs, estimated and played.
#[derive(Clone, Debug, Serialize)]
pub struct Rehearsed {
    /// Whether each row was predicted with constants that had not seen its source.
    pub held_out: bool,
    /// By what contends; all that contend, and all rows, last.
    pub shares: Vec<Share>,
    /// Rows that were not predicted, and why.
    pub not_priced: Vec<Skipped>,
    /// The rows.
    pub rows: Vec<Row>,
}

/// Estimates and plays the rows of a table with the same constants.
///
/// # Errors
/// If the text is no table of runs, or gives none to play.
pub fn rehearse(path: &str, text: &str, catalog: &Catalog, calibration: &Calibration) -> Result<Rehearsed> {
    let (mut prepared, not_priced, _) = prepare(path, text, catalog)?;
    let rows = prepared.par_iter_mut().map(|p| row(p, calibration, calibration));
    let rows = rows.collect();
    summary(path, rows, &prepared, not_priced, false)
}

/// Rounds in which constants are fitted to the player: it is played, and what it takes over the closed form is fitted as
/// if that stayed as it is.
const ROUNDS: usize = 2;

/// Estimates and plays each row with constants fitted on all other sources: the closed form with its own, the player with
/// those that are right for it.
///
/// # Errors
/// If the text is no table of runs, or gives none to play.
pub fn cross_rehearse(path: &str, text: &str, catalog: &Catalog) -> Result<Rehearsed> {
    let (mut prepared, not_priced, _) = prepare(path, text, catalog)?;
    let source = |run: &Run| run.source.clone();
    let fitted = fit::fit(&mut prepared);
    let estimates = fit::leave_out(&mut prepared, &fitted, source);
    let mut for_player = fitted.clone();
    for _ in 0..ROUNDS {
        prepared.par_iter_mut().for_each(|p| {
            let over = play(p, &for_player).map_or(1.0, |(played, estimated)| played / estimated);
            p.set_over(over);
        });
        for_player = fit::fit(&mut prepared);
    }
    let plays = fit::leave_out(&mut prepared, &for_player, source);
    let of = |by: &BTreeMap<String, Calibration>, p: &Prepared, all: &Calibration| {
        by.get(&p.run().source).unwrap_or(all).clone()
    };
    let rows = prepared
        .par_iter_mut()
        .map(|p| {
            let (estimates, plays) = (of(&estimates, p, &fitted), of(&plays, p, &for_player));
            row(p, &estimates, &plays)
        })
        .collect();
    summary(path, rows, &prepared, not_priced, true)
}

fn row(p: &mut Prepared, estimates: &Calibration, plays: &Calibration) -> Result<Row> {
    let estimated = p.choose(p.constants(estimates))?.step_s;
    let contention = Contention::of(p);
    let (played, beside) = play(p, plays)?;
    let run = p.run();
    Ok(Row {
        id: run.id.clone(),
        source: run.source.clone(),
        contention,
        published: run.step_s,
        estimated,
        played,
        differs: played / beside - 1.0,
        layout: p.placement().to_string(),
    })
}

/// Of the layouts that a source leaves open those are played that the closed form has within so many times its fastest.
const PLAYED_WITHIN: f64 = 1.3;

/// A run's step as it is played, undisturbed, under the layout that is fastest so, and what the closed form says of its
/// own fastest.
fn play(p: &mut Prepared, calibration: &Calibration) -> Result<(f64, f64)> {
    let near = p.near(p.constants(calibration), PLAYED_WITHIN)?;
    let mut fastest: Option<(f64, usize)> = None;
    let mut refused = None;
    for (_, layout) in &near {
        p.take(*layout);
        let played = Rehearsal::new(p.problem(), p.placement())
            .and_then(|r| r.play(&Disturbed::default(), Folding::Folded));
        match played {
            Ok(step) if fastest.is_none_or(|(s, _)| step.step_s < s) => {
                fastest = Some((step.step_s, *layout))
            }
            Ok(_) => {}
            Err(error) => refused = Some(error),
        }
    }
    match (fastest, refused) {
        (Some((step_s, layout)), _) => {
            p.take(layout);
            Ok((step_s, near[0].0.step_s))
        }
        (None, Some(error)) => Err(error),
        (None, None) => Err(Error::failure(format!("{}: no layout", p.run().id))),
    }
}

fn summary(
    path: &str,
    rows: Vec<Result<Row>>,
    prepared: &[Prepared],
    mut not_priced: Vec<Skipped>,
    held_out: bool,
) -> Result<Rehearsed> {
    let mut kept = Vec::new();
    for (row, p) in rows.into_iter().zip(prepared) {
        match row {
            Ok(row) => kept.push(row),
            Err(e) => {
                let run = p.run();
                not_priced.push(Skipped { id: run.id.clone(), line: run.line, reason: e.to_string() });
            }
        }
    }
    if kept.is_empty() {
        return Err(nothing(path, "played", &not_priced));
    }
    Ok(Rehearsed { held_out, shares: shares(&kept), not_priced, rows: kept })
}

fn shares(rows: &[Row]) -> Vec<Share> {
    let mut by: BTreeMap<Contention, Vec<&Row>> = BTreeMap::new();
    rows.iter().for_each(|r| by.entry(r.contention).or_default().push(r));
    let contended = rows.iter().filter(|r| r.contention != Contention::Nothing).collect::<Vec<_>>();
    let mut out: Vec<Share> = by.iter().map(|(c, rows)| share(c.name(), rows)).collect();
    if !contended.is_empty() {
        out.push(share("all that contend", &contended));
    }
    out.push(share("all", &rows.iter().collect::<Vec<_>>()));
    out
}

fn share(of: &str, rows: &[&Row]) -> Share {
    let errors = |predicted: &dyn Fn(&Row) -> f64| {
        let all: Vec<f64> = rows.iter().map(|r| predicted(r) / r.published - 1.0).collect();
        Errors { median_abs_error: quantile(&all, 0.5), p90_abs_error: quantile(&all, 0.9) }
    };
    let apart: Vec<f64> = rows.iter().map(|r| r.differs).collect();
    Share {
        of: of.to_owned(),
        rows: rows.len(),
        estimated: errors(&|r| r.estimated),
        played: errors(&|r| r.played),
        median_apart: quantile(&apart, 0.5),
        p90_apart: quantile(&apart, 0.9),
    }
}
