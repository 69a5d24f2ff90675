//! The last recorded step: what each rank did when, and its ops against what was planned of them.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use journal::{Lane, Record, Span};
use serde::Serialize;

use crate::ranks::SpansAt;
use crate::run::Run;
use crate::watch::Expected;

/// Ranks drawn; those with the lowest numbers.
const RANKS_MAX: usize = 64;

/// Longest record of spans that is read.
const RECORD_BYTES_MAX: u64 = 16 << 20;

/// A lane is drawn in so many places: slices that share one are drawn as one.
const PLACES: u64 = 1500;

/// Rows of the table of ops.
const OPS_MAX: usize = 200;

/// Which records make up the timeline, taken along so that nobody waits while they are read.
#[derive(Debug)]
pub struct Plan {
    step: u64,
    parts: Vec<(usize, PathBuf, SpansAt)>,
    ranks: usize,
}

/// The last recorded step.
#[derive(Debug, Default, Serialize)]
pub struct Timeline {
    /// Which.
    pub step: u64,
    /// Microseconds from its first slice to its last.
    pub length_us: u64,
    /// Names that slices refer to.
    pub names: Vec<String>,
    /// By rank.
    pub ranks: Vec<RankLine>,
    /// Ranks that are not drawn, because they are many, were not recorded or could not be read.
    pub left_out: usize,
    /// Ops that took longest, of the rank in which they did.
    pub ops: Vec<OpRow>,
    /// Why nothing was planned of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unplanned: Option<String>,
}

/// A rank's slices: begin and end in microseconds, and the index of a name.
#[derive(Debug, Serialize)]
pub struct RankLine {
    /// Which.
    pub rank: usize,
    /// Arithmetic.
    pub compute: Vec<(u64, u64, usize)>,
    /// Talk with other ranks.
    pub comm: Vec<(u64, u64, usize)>,
    /// Microseconds in which neither went on.
    pub idle_us: u64,
}

/// An op of the table.
#[derive(Debug, Serialize)]
pub struct OpRow {
    /// Its name.
    pub name: String,
    /// The rank in which it took longest.
    pub rank: usize,
    /// How often it ran.
    pub runs: usize,
    /// Seconds in the step.
    pub measured_s: f64,
    /// Seconds as planned.
    pub planned_s: Option<f64>,
}

/// What to read of a run; none if no step of it was recorded.
pub fn plan(run: &Run) -> Option<Plan> {
    let steps = |step: u64| run.ranks.values().filter(|r| r.spans.iter().any(|s| s.step == step)).count();
    let all: Vec<u64> = run.ranks.values().flat_map(|r| r.spans.iter().map(|s| s.step)).collect();
    // The newest of the steps that most ranks have.
    let step = all.into_iter().max_by_key(|step| (steps(*step), *step))?;
    let of = |(rank, r): (&usize, &crate::ranks::Rank)| {
        let at = r.spans.iter().rev().find(|s| s.step == step)?;
        Some((*rank, journal::path(&run.dir, *rank), *at))
    };
    let parts = run.ranks.iter().filter_map(of).take(RANKS_MAX).collect();
    Some(Plan { step, parts, ranks: run.ranks.len() + run.ranks_unread })
}

impl Plan {
    /// Reads the records and draws them, beside what was planned, or why nothing was.
    pub fn draw(self, planned: Result<&[Expected], &str>) -> Timeline {
        let read: Vec<(usize, Vec<Span>)> =
            self.parts.iter().filter_map(|(rank, path, at)| Some((*rank, spans(path, *at)?))).collect();
        let edge = |of: fn(&Span) -> u64| read.iter().flat_map(move |(_, spans)| spans.iter().map(of));
        let start_us = edge(|s| s.start_us).min().unwrap_or(0);
        let end_us = edge(|s| s.end_us).max().unwrap_or(0);
        let mut timeline = Timeline {
            step: self.step,
            length_us: end_us.saturating_sub(start_us),
            left_out: self.ranks.saturating_sub(read.len()),
            ..Timeline::default()
        };
        let mut names = BTreeMap::new();
        for (rank, spans) in &read {
            let mut lane = |lane| {
                let of = spans.iter().filter(|s| s.lane == lane);
                slices(of, start_us, timeline.length_us, &mut timeline.names, &mut names)
            };
            let (compute, comm) = (lane(Lane::Compute), lane(Lane::Comm));
            let idle_us = idle(spans, timeline.length_us);
            timeline.ranks.push(RankLine { rank: *rank, compute, comm, idle_us });
        }
        timeline.ops = ops(&read, planned.unwrap_or_default());
        timeline.unplanned = planned.err().map(str::to_owned);
        timeline
    }
}

fn spans(path: &Path, at: SpansAt) -> Option<Vec<Span>> {
    if at.len > RECORD_BYTES_MAX {
        return None;
    }
    let mut line = vec![0; at.len as usize];
    journal::open_file(path).ok()?.read_exact_at(&mut line, at.offset).ok()?;
    match serde_json::from_slice(&line).ok()? {
        Record::Spans { spans, .. } => Some(spans),
        _ => None,
    }
}

/// Slices from `start_us` on; neighbours of one name that would be drawn in one place become one.
fn slices<'a>(
    spans: impl Iterator<Item = &'a Span>,
    start_us: u64,
    length_us: u64,
    names: &mut Vec<String>,
    index: &mut BTreeMap<String, usize>,
) -> Vec<(u64, u64, usize)> {
    let place = length_us.div_ceil(PLACES).max(1);
    let mut found: Vec<(u64, u64, usize)> = Vec::new();
    let mut spans: Vec<&Span> = spans.collect();
    spans.sort_by_key(|s| s.start_us);
    for span in spans {
        let name = *index.entry(span.name.clone()).or_insert_with(|| {
            names.push(span.name.clone());
            names.len() - 1
        });
        let (from, to) = (span.start_us - start_us, span.end_us.saturating_sub(start_us));
        match found.last_mut() {
            // Too narrow to be seen apart from what is before it: the longer one gives the name.
            Some(last) if to <= last.0 + place => {
                if to.saturating_sub(from) > last.1 - last.0 {
                    last.2 = name;
                }
                last.1 = last.1.max(to);
            }
            _ => found.push((from, to.max(from), name)),
        }
    }
    found
}

/// Microseconds of `length_us` in which no span of these goes on.
fn idle(spans: &[Span], length_us: u64) -> u64 {
    let mut all: Vec<(u64, u64)> = spans.iter().map(|s| (s.start_us, s.end_us)).collect();
    all.sort_unstable();
    let (mut covered, mut until) = (0, 0);
    for (from, to) in all {
        covered += to.saturating_sub(from.max(until));
        until = until.max(to);
    }
    length_us.saturating_sub(covered)
}

/// The ops that took longest, each of the rank in which it did.
fn ops(read: &[(usize, Vec<Span>)], planned: &[Expected]) -> Vec<OpRow> {
    let planned: BTreeMap<(u64, usize), f64> = planned.iter().map(|e| ((e.op, e.rank), e.s)).collect();
    let mut rows: BTreeMap<u64, OpRow> = BTreeMap::new();
    for (rank, spans) in read {
        let mut mine: BTreeMap<u64, (usize, f64, &str)> = BTreeMap::new();
        for s in spans {
            let entry = mine.entry(s.op).or_insert((0, 0.0, &s.name));
            entry.0 += 1;
            entry.1 += s.end_us.saturating_sub(s.start_us) as f64 / 1e6;
        }
        for (op, (runs, measured_s, name)) in mine {
            if rows.get(&op).is_none_or(|r| r.measured_s < measured_s) {
                let planned_s = planned.get(&(op, *rank)).copied();
                rows.insert(op, OpRow { name: name.to_owned(), rank: *rank, runs, measured_s, planned_s });
            }
        }
    }
    let mut rows: Vec<OpRow> = rows.into_values().collect();
    rows.sort_by(|a, b| b.measured_s.total_cmp(&a.measured_s));
    rows.truncate(OPS_MAX);
    rows
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use journal::tail::Tail;

    use super::*;
    use std::fs::File;

    fn span(op: u64, lane: Lane, start_us: u64, end_us: u64) -> Span {
        Span { op, name: format!("op{op}"), lane, micro_batch: None, start_us, end_us, bytes: 0 }
    }

    fn run(by_rank: &[(usize, u64, Vec<Span>)]) -> (tempfile::TempDir, Run) {
        let dir = tempfile::tempdir().expect("a folder");
        let mut run = Run::new("r".into(), dir.path().to_owned());
        for (rank, step, spans) in by_rank {
            let path = journal::path(dir.path(), *rank);
            let record = Record::Spans { rank: *rank, step: *step, spans: spans.clone() };
            let mut file = File::options().append(true).create(true).open(&path).expect("a journal");
            writeln!(file, "{}", serde_json::to_string(&record).expect("plain data")).expect("write");
        }
        for rank in 0..=by_rank.iter().map(|(r, ..)| *r).max().unwrap_or(0) {
            let mut tail = Tail::whole(journal::path(dir.path(), rank));
            tail.look(u64::MAX, &mut |f| run.observe_rank(rank, &f)).expect("a readable file");
        }
        (dir, run)
    }

    #[test]
    fn a_step_that_all_ranks_have_is_drawn() {
        use Lane::{Comm, Compute};
        let (_dir, run) = run(&[
            (0, 1, vec![span(1, Compute, 100, 200), span(2, Comm, 250, 300)]),
            (0, 2, vec![span(1, Compute, 900, 950)]),
            (1, 1, vec![span(1, Compute, 120, 280)]),
        ]);
        let planned = [Expected { op: 1, rank: 1, s: 1e-4 }];
        let t = plan(&run).expect("recorded").draw(Ok(&planned));
        assert_eq!((t.step, t.length_us, t.left_out), (1, 200, 0), "step 2 is not there of rank 1");
        assert_eq!(t.ranks[0].compute, [(0, 100, 0)]);
        assert_eq!(t.ranks[0].comm, [(150, 200, 1)]);
        assert_eq!((t.ranks[0].idle_us, t.ranks[1].idle_us), (50, 40));
        assert_eq!((t.ops[0].name.as_str(), t.ops[0].rank, t.ops[0].planned_s), ("op1", 1, Some(1e-4)));
        assert!((t.ops[0].measured_s - 160e-6).abs() < 1e-12);
    }

    #[test]
    fn thousands_of_slices_are_drawn_as_few() {
        let many = (0..50_000).map(|i| span(i % 7, Lane::Compute, 10 * i, 10 * i + 9)).collect();
        let (_dir, run) = run(&[(0, 1, many)]);
        let t = plan(&run).expect("recorded").draw(Err("no calibration"));
        // A slice and the one after it do not fit into one place together.
        assert!(t.ranks[0].compute.len() <= 2 * PLACES as usize, "{}", t.ranks[0].compute.len());
        assert_eq!(t.unplanned.as_deref(), Some("no calibration"));
        assert_eq!(t.ops.iter().map(|o| o.runs).sum::<usize>(), 50_000);
    }

    #[test]
    fn a_run_without_recorded_ops_has_none() {
        assert!(plan(&Run::default()).is_none());
    }
}
