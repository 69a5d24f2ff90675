//! What a page, a terminal and a program are told of a run, as JSON. Curves are apart: they are long.

use journal::Record;
use journal::prometheus::Metrics;
use serde_json::{Value, json};

use crate::ranks::{Rank, stragglers};
use crate::run::{Point, Run, SERIES, State};

/// Ranks told of, those that wait least first; events told of, newest last.
const RANKS_MAX: usize = 64;
const NOTES_MAX: usize = 80;

/// A rank, or a run, that wrote nothing for so long counts as silent: this, or so many of its steps.
const SILENT_US: u64 = 60_000_000;
const SILENT_STEPS: f64 = 10.0;

/// Whether a rank's journal grew lately.
pub fn is_alive(rank: &Rank, now_us: u64) -> bool {
    let steps_us = (1e6 * SILENT_STEPS * rank.step_s) as u64;
    now_us.saturating_sub(rank.time_us) <= SILENT_US.max(steps_us)
}

/// Ranks of a run that are alive; none of a run that is over.
pub fn ranks_alive(run: &Run, now_us: u64) -> usize {
    match run.state {
        State::Running => run.ranks.values().filter(|r| is_alive(r, now_us)).count(),
        State::Empty | State::Finished | State::Failed => 0,
    }
}

/// Seconds to the last step that the run file asks for, at the pace of the last ones.
pub fn eta_s(run: &Run) -> Option<f64> {
    let left = run.steps_wanted?.checked_sub(run.latest?.at.step)?;
    (run.state == State::Running).then_some(left as f64 * run.ranks.get(&0)?.step_s)
}

/// A step as JSON: what is not known or not finite is `null`.
pub fn latest(point: &Point) -> Value {
    let mut all = json!({
        "step": point.at.step,
        "tokens": point.at.tokens,
        "time_ms": point.at.time_us / 1000,
    });
    for (name, value) in SERIES.iter().zip(point.values) {
        all[*name] = json!(value);
    }
    all
}

/// A point as the page appends it: step, tokens, milliseconds, then values by [`SERIES`].
pub fn row(point: &Point) -> Value {
    let at = [point.at.step, point.at.tokens, point.at.time_us / 1000].map(|v| json!(v));
    at.into_iter().chain(point.values.map(|v| json!(v))).collect()
}

/// Everything about a run but its curves.
pub fn facts(run: &Run, now_us: u64) -> Value {
    let mut ranks: Vec<&Rank> = run.ranks.values().collect();
    let total = ranks.len() + run.ranks_unread;
    if ranks.len() > RANKS_MAX {
        ranks.sort_by(|a, b| b.busy_s().total_cmp(&a.busy_s()));
        ranks.truncate(RANKS_MAX);
        ranks.sort_by_key(|r| r.rank);
    }
    let notes: Vec<_> = run.notes.iter().skip(run.notes.len().saturating_sub(NOTES_MAX)).collect();
    let (read, of) = run.progress;
    let silent_us = run.ranks.get(&0).filter(|r| run.state == State::Running && !is_alive(r, now_us));
    json!({
        "name": run.name,
        "dir": run.dir.display().to_string(),
        "state": run.state,
        "silent_s": silent_us.map(|r| now_us.saturating_sub(r.time_us) / 1_000_000),
        "started": run.started.as_ref().and_then(started),
        "steps_wanted": run.steps_wanted,
        "latest": run.latest.as_ref().map(latest),
        "eval": run.evaluated.map(|(step, loss)| json!({ "step": step, "loss": loss })),
        "eta_s": eta_s(run),
        "goodput": run.metrics.goodput(),
        "lost_s": run.metrics.lost_s(),
        "restarts": run.metrics.restarts(),
        "notes": notes,
        "ranks": ranks,
        "ranks_total": total,
        "ranks_alive": ranks_alive(run, now_us),
        "stragglers": stragglers(run.ranks.values()).into_iter().take(RANKS_MAX).collect::<Vec<_>>(),
        "recorded": run.ranks.values().any(|r| !r.spans.is_empty()),
        "damage": { "lines": run.damage.0, "first": run.damage.1 },
        "unknown": run.unknown,
        "preview": run.is_preview(),
        "read_bytes": read,
        "of_bytes": of,
    })
}

fn started(record: &Record) -> Option<Value> {
    let Record::RunStarted {
        time_us, version, fingerprint, world, host, device, threads, parameters, ..
    } = record
    else {
        return None;
    };
    Some(json!({
        "time_ms": time_us / 1000,
        "version": version,
        "fingerprint": fingerprint,
        "world": world,
        "host": host,
        "device": device,
        "threads": threads,
        "parameters": parameters,
    }))
}

/// A run with its curves.
pub fn whole(run: &Run, now_us: u64, buckets: usize) -> Value {
    json!({
        "facts": facts(run, now_us),
        "curves": run.curves(buckets),
        "evals": run.evaluations(buckets),
    })
}

/// What Prometheus is told of runs, by name. A run that is shown by samples is left out: it would seem to count down once
/// it is read.
pub fn metrics(runs: &[Run], now_us: u64) -> Vec<(String, Metrics)> {
    let of = |run: &Run| {
        let mut metrics = run.metrics.clone();
        if run.state != State::Empty {
            metrics.set("phalanx_ranks_alive", ranks_alive(run, now_us) as f64);
        }
        metrics.set("phalanx_journal_damaged_lines", run.damage.0 as f64);
        metrics.set("phalanx_journal_unknown_lines", run.unknown.values().sum::<u64>() as f64);
        let (read, all) = run.progress;
        metrics.set("phalanx_journal_read_ratio", if all > 0 { read as f64 / all as f64 } else { 1.0 });
        (run.name.clone(), metrics)
    };
    runs.iter().filter(|r| !r.is_preview()).map(of).collect()
}
