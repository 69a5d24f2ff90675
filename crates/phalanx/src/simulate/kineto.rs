//! Traces of the PyTorch profiler (Kineto), a file a rank: kernels between the collectives at which all ranks meet.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sim::trace::{Kind, Row};
use spec::{Error, Result};

use crate::files;

/// A collective that no kernel hides for less than this shows nothing of waiting.
const SHOWN_US: f64 = 20.0;
/// More ranks than anyone profiles at once.
const RANKS_MAX: usize = 100_000;

#[derive(Deserialize)]
struct File {
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
    #[serde(rename = "distributedInfo")]
    job: Option<Job>,
}

#[derive(Deserialize)]
struct Job {
    rank: Option<usize>,
    world_size: Option<usize>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    ph: String,
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: serde_json::Value,
    #[serde(default)]
    ts: serde_json::Value,
    #[serde(default)]
    dur: serde_json::Value,
    args: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A stretch of time in microseconds.
type Span = (f64, f64);

/// A collective kernel.
#[derive(Clone, Debug)]
struct Collective {
    name: String,
    at: Span,
    members: Option<usize>,
}

/// What one rank did in one step.
#[derive(Clone, Debug, Default)]
struct Step {
    from_us: f64,
    to_us: f64,
    kernels: Vec<Span>,
    collectives: Vec<Collective>,
}

/// A rank's profile.
struct Profile {
    place: String,
    rank: usize,
    world: Option<usize>,
    steps: BTreeMap<i64, Step>,
}

/// The rows of a job whose ranks wrote these files.
pub(super) fn rows(place: &str, paths: &[PathBuf]) -> Result<Vec<Row>> {
    let mut profiles: Vec<Profile> =
        paths.iter().enumerate().map(|(i, p)| read(p, i)).collect::<Result<_>>()?;
    profiles.sort_by_key(|p| p.rank);
    let world = profiles.iter().filter_map(|p| p.world).max().unwrap_or(profiles.len());
    if let Some((i, p)) = profiles.iter().enumerate().find(|(i, p)| *i != p.rank) {
        let what = format!("{}: rank {}, expected rank {i}", p.place, p.rank);
        return Err(Error::user(what).hint("give a folder with one trace of every rank"));
    }
    if profiles.len() != world {
        let what = format!("{place}: traces of {} of {world} ranks", profiles.len());
        return Err(Error::user(what).hint("give a folder with one trace of every rank"));
    }
    let steps: Vec<i64> = profiles[0].steps.keys().copied().collect();
    let shared = steps.into_iter().filter(|s| profiles.iter().all(|p| p.steps.contains_key(s)));
    let mut out = Vec::new();
    for step in shared {
        step_rows(place, &profiles, step, world, &mut out)?;
    }
    if out.is_empty() {
        return Err(Error::user(format!("{place}: no step with kernels that all ranks have profiled"))
            .hint("call prof.step() in the loop, and profile CUDA activities"));
    }
    Ok(out)
}

fn read(path: &Path, at: usize) -> Result<Profile> {
    let place = path.display().to_string();
    let file: File = serde_json::from_str(&files::read(path)?).map_err(|e| {
        Error::user(format!("{place}: {e}")).hint("a trace as torch.profiler's export_chrome_trace writes it")
    })?;
    let (rank, world) = file.job.map_or((None, None), |j| (j.rank, j.world_size));
    let rank = rank.unwrap_or(at);
    if rank > RANKS_MAX {
        return Err(Error::user(format!("{place}: rank {rank}")).hint("distributedInfo says which"));
    }
    let span = |e: &Event| -> Option<Span> {
        let (ts, dur) = (number(&e.ts)?, number(&e.dur)?);
        (ts >= 0.0 && dur >= 0.0).then_some((ts, ts + dur))
    };
    let mut steps = BTreeMap::new();
    for e in file.events.iter().filter(|e| e.ph == "X") {
        let step = e.name.as_str().and_then(|n| n.strip_prefix("ProfilerStep#")?.parse::<i64>().ok());
        // The CPU's annotation, not its shadow on the device.
        if let (Some(step), true) = (step, e.cat == "user_annotation")
            && let Some((from_us, to_us)) = span(e)
        {
            steps.insert(step, Step { from_us, to_us, ..Step::default() });
        }
    }
    for e in file.events.iter().filter(|e| e.ph == "X" && e.cat == "kernel") {
        let at = span(e).ok_or_else(|| {
            Error::user(format!("{place}: kernel {} without ts and dur", e.name))
                .hint("times are in microseconds")
        })?;
        // Kernels belong to the step in which they begin.
        let Some(step) = steps.values_mut().find(|s| s.from_us <= at.0 && at.0 < s.to_us) else { continue };
        let name = e.name.as_str().unwrap_or_default();
        if name.starts_with("nccl") || name.contains("ncclKernel") || name.contains("ncclDevKernel") {
            let args = e.args.as_ref();
            let members = args.and_then(|a| number(a.get("Group size")?)).map(|n| n as usize);
            step.collectives.push(Collective { name: name.to_owned(), at, members });
        } else {
            step.kernels.push(at);
        }
    }
    Ok(Profile { place, rank, world, steps })
}

/// A number, or a number as text.
fn number(v: &serde_json::Value) -> Option<f64> {
    v.as_f64().or_else(|| v.as_str()?.parse().ok()).filter(|n| n.is_finite())
}

/// Overlapping spans as one, in order.
fn joined(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut out: Vec<Span> = Vec::new();
    for span in spans {
        match out.last_mut() {
            Some(last) if span.0 <= last.1 => last.1 = last.1.max(span.1),
            _ => out.push(span),
        }
    }
    out
}

/// When a rank has nothing to do but wait for a collective: from its last kernel in front of the collective's end until
/// that end. Empty where kernels hide the end.
fn shown(kernels: &[Span], collective: Span) -> Span {
    let (from, to) = collective;
    let before = kernels.partition_point(|k| k.0 < to);
    let last = before.checked_sub(1).map_or(f64::NEG_INFINITY, |i| kernels[i].1);
    (last.max(from).min(to), to)
}

/// Rows of all ranks: at each collective of all that some rank visibly waits for, they meet; between, they compute.
fn step_rows(place: &str, profiles: &[Profile], step: i64, world: usize, out: &mut Vec<Row>) -> Result<()> {
    let mut meetings: Vec<Vec<Span>> = Vec::new();
    let mut kernels = Vec::new();
    for p in profiles {
        let it = &p.steps[&step];
        if let Some(c) = it.collectives.iter().find(|c| c.name.contains("SendRecv")) {
            let what = format!("{}: {} in step {step}: stages hand on to each other", p.place, c.name);
            return Err(
                Error::user(what).hint("of pipelines give a table of passes, as StragglerAnalysis has them")
            );
        }
        let of_all = |c: &&Collective| c.members.is_none_or(|n| n == world);
        let mut all: Vec<&Collective> = it.collectives.iter().filter(of_all).collect();
        all.sort_by(|a, b| a.at.0.total_cmp(&b.at.0));
        // Collectives among some ranks are part of these ranks' work.
        let some = it.collectives.iter().filter(|c| !of_all(c)).map(|c| c.at);
        let own = joined(it.kernels.iter().copied().chain(some).collect());
        meetings.push(all.iter().map(|c| shown(&own, c.at)).collect());
        kernels.push(own);
    }
    let counts: Vec<usize> = meetings.iter().map(Vec::len).collect();
    if let Some(other) = counts.iter().position(|c| *c != counts[0]) {
        let what = format!(
            "{place}: step {step}: {} collectives of all ranks on rank 0, {} on rank {other}",
            counts[0], counts[other]
        );
        return Err(Error::user(what).hint("the trace has a hole: profile the same steps on all ranks"));
    }
    let is_seen = |i: &usize| meetings.iter().any(|m| m[*i].1 - m[*i].0 >= SHOWN_US);
    let seen: Vec<usize> = (0..counts[0]).filter(is_seen).collect();
    let origin = profiles.iter().map(|p| p.steps[&step].from_us).fold(f64::INFINITY, f64::min);
    for (p, (meetings, kernels)) in profiles.iter().zip(meetings.iter().zip(&kernels)) {
        let mut at = p.steps[&step].from_us;
        let mut row = |kind, seq: usize, (from, to): Span| {
            let duration_s = (to - from).max(0.0) / 1e6;
            let start_s = (from - origin) / 1e6;
            let (line, dp_rank, class, seq) = (out.len() + 1, p.rank, seq, seq as i64);
            // Meetings are told apart by their number where chunks are told apart; what lies between two is alike on all
            // ranks and in all steps.
            out.push(Row {
                line,
                dp_rank,
                stage: 0,
                step,
                kind,
                start_s,
                duration_s,
                seq,
                chunk: seq,
                class,
                waits: true,
            });
        };
        for (seq, i) in seen.iter().enumerate() {
            let (from, to) = meetings[*i];
            let from = from.max(at);
            row(Kind::Forward, seq, (at, from));
            row(Kind::Scatter, seq, (from, to.max(from)));
            at = to.max(from);
        }
        let last = kernels.last().map_or(at, |k| k.1).max(at);
        row(Kind::Forward, seen.len(), (at, last));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_what_no_kernel_hides() {
        let kernels = joined(vec![(10.0, 20.0), (0.0, 5.0), (15.0, 30.0)]);
        assert_eq!(kernels, [(0.0, 5.0), (10.0, 30.0)]);
        assert_eq!(shown(&kernels, (4.0, 9.0)), (5.0, 9.0));
        assert_eq!(shown(&kernels, (4.0, 25.0)), (25.0, 25.0));
        assert_eq!(shown(&kernels, (25.0, 50.0)), (30.0, 50.0));
        assert_eq!(shown(&kernels, (40.0, 50.0)), (40.0, 50.0));
    }
}
