//! Traces of real runs: played again as they were and as if this or that had not been slow.
//!
//! The method is that of Lin et al. 2025 (OSDI, "Understanding Stragglers in Large Model Training Using What-if
//! Analysis"): an op that is put right takes the mean of its kind if it computes, the median if it talks; waiting for
//! others is no part of an op. The slowdown is the time of the steps as they were over that of steps put right.

mod read;
mod replay;

use serde::Serialize;
use spec::{Error, Result};

pub use read::{Kind, Row, parse, table};
use replay::{Ideal, Replay};

/// What a trace says about what slowed its run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Blame {
    /// Steps in the trace.
    pub steps: usize,
    /// Data-parallel ranks times stages.
    pub workers: usize,
    /// Time of a step as it was, without pauses between ops; the mean.
    pub step_s: f64,
    /// Time of a step in which every op takes what is usual for its kind.
    pub ideal_step_s: f64,
    /// The one over the other.
    pub slowdown: f64,
    /// Slowdown if one data-parallel rank alone were as it was; the slowest first.
    pub by_worker: Vec<WorkerBlame>,
    /// The same of pipeline stages.
    pub by_stage: Vec<StageBlame>,
    /// The same of kinds of ops.
    pub by_op: Vec<OpBlame>,
    /// Correlation of forward with backward times of the same micro-batch on the same stage: near 1 where sequences
    /// differ in length.
    pub forward_backward_correlation: f64,
    /// Which explains most.
    pub cause: Cause,
}

/// Slowdown by one data-parallel rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WorkerBlame {
    /// Which.
    pub dp_rank: usize,
    /// Slowdown if the others were right.
    pub slowdown: f64,
}

/// Slowdown by one stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StageBlame {
    /// Which.
    pub stage: usize,
    /// Slowdown if the others were right.
    pub slowdown: f64,
}

/// Slowdown by one kind of op.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OpBlame {
    /// Which.
    pub op: &'static str,
    /// Slowdown if the others were right.
    pub slowdown: f64,
}

/// What slowed a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Hardly anything.
    Nothing,
    /// Sequences of different lengths.
    Data,
    /// A stage with more work than others.
    Stage,
    /// A worker slower than others.
    Worker,
    /// None of these alone.
    Mixed,
}

/// Slowdowns below this are noise.
const SLOWED_FROM: f64 = 1.05;
/// Share of the slowdown that one cause has to explain.
const MOST: f64 = 0.5;
/// Correlation from which sequence lengths explain the spread of compute (Lin et al. 2025, section 5.3).
const CORRELATED_FROM: f64 = 0.9;

/// Plays the steps of a trace as they were, as they should have been, and as if only one worker, stage or kind of op had
/// been as it was.
///
/// # Errors
/// A trace with holes, or with ops that overlap or wait for each other for ever.
pub fn blame(place: &str, rows: &[Row]) -> Result<Blame> {
    let replay = Replay::new(place, rows)?;
    let ideal = Ideal::of(&replay);
    let mean = |keeps: &dyn Fn(&Row) -> bool| -> Result<f64> {
        let mut sum = 0.0;
        for step in 0..replay.steps() {
            sum += replay.play(step, &ideal, keeps)?;
        }
        Ok(sum / replay.steps() as f64)
    };
    let step_s = mean(&|_| true)?;
    let ideal_step_s = mean(&|_| false)?;
    if ideal_step_s <= 0.0 {
        return Err(Error::user(format!("{place}: no op takes any time")).hint("durations are in seconds"));
    }
    let mut by_worker = Vec::new();
    for dp_rank in 0..replay.replicas() {
        by_worker.push(WorkerBlame { dp_rank, slowdown: mean(&|r| r.dp_rank == dp_rank)? / ideal_step_s });
    }
    let mut by_stage = Vec::new();
    for stage in 0..replay.stages() {
        by_stage.push(StageBlame { stage, slowdown: mean(&|r| r.stage == stage)? / ideal_step_s });
    }
    let mut by_op = Vec::new();
    for (op, kinds) in Kind::NAMED {
        if rows.iter().any(|r| kinds.contains(&r.kind)) {
            by_op.push(OpBlame { op, slowdown: mean(&|r| kinds.contains(&r.kind))? / ideal_step_s });
        }
    }
    let correlation = correlation(rows);
    let slowdown = step_s / ideal_step_s;
    by_worker.sort_by(|a, b| b.slowdown.total_cmp(&a.slowdown));
    by_stage.sort_by(|a, b| b.slowdown.total_cmp(&a.slowdown));
    by_op.sort_by(|a, b| b.slowdown.total_cmp(&a.slowdown));
    let explains = |one: f64| one - 1.0 >= MOST * (slowdown - 1.0);
    // Stages and workers explain little where all of them do alike.
    let stands_out = |first: f64, second: Option<f64>| {
        explains(first) && second.is_none_or(|s| first - s >= MOST * (first - 1.0))
    };
    let cause = if slowdown < SLOWED_FROM {
        Cause::Nothing
    } else if correlation >= CORRELATED_FROM {
        Cause::Data
    } else if stands_out(by_stage[0].slowdown, by_stage.get(1).map(|s| s.slowdown)) {
        Cause::Stage
    } else if stands_out(by_worker[0].slowdown, by_worker.get(1).map(|w| w.slowdown)) {
        Cause::Worker
    } else {
        Cause::Mixed
    };
    Ok(Blame {
        steps: replay.steps(),
        workers: replay.replicas() * replay.stages(),
        step_s,
        ideal_step_s,
        slowdown,
        by_worker,
        by_stage,
        by_op,
        forward_backward_correlation: correlation,
        cause,
    })
}

/// Of forward with backward times, each less the mean of its stage.
fn correlation(rows: &[Row]) -> f64 {
    let mut of = std::collections::BTreeMap::new();
    for row in rows.iter().filter(|r| matches!(r.kind, Kind::Forward | Kind::Backward)) {
        let pair = of.entry((row.stage, row.step, row.dp_rank, row.chunk, row.seq)).or_insert([f64::NAN; 2]);
        pair[usize::from(row.kind == Kind::Backward)] = row.duration_s;
    }
    let mut stages: std::collections::BTreeMap<usize, Vec<[f64; 2]>> = Default::default();
    for ((stage, ..), pair) in of {
        if pair.iter().all(|x| x.is_finite()) {
            stages.entry(stage).or_default().push(pair);
        }
    }
    let [mut xy, mut xx, mut yy] = [0.0; 3];
    for pairs in stages.values() {
        let n = pairs.len() as f64;
        let mean = |i: usize| pairs.iter().map(|p| p[i]).sum::<f64>() / n;
        let (x, y) = (mean(0), mean(1));
        for p in pairs {
            xy += (p[0] - x) * (p[1] - y);
            xx += (p[0] - x).powi(2);
            yy += (p[1] - y).powi(2);
        }
    }
    if xx * yy > 0.0 { xy / (xx * yy).sqrt() } else { 0.0 }
}
