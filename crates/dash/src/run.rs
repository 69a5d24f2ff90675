//! One run as its journals tell it: what views draw, kept up record by record. Pure: whoever watches brings the lines.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use journal::line::Line;
use journal::prometheus::Metrics;
use journal::tail::{Found, lines_between};
use journal::{Record, Step};
use serde::Serialize;

use crate::curve::{At, Bucket, Columns, Curve, columns};
use crate::ranks::{Rank, SpansAt};

/// What steps are drawn of.
pub const SERIES: [&str; 9] = [
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "mfu",
    "memory_bytes",
    "step_s",
    "exposed_comm_s",
    "mtp_loss",
];

/// Points kept one by one for those who look live; who is further behind gets the curves anew.
pub(crate) const RECENT_MAX: usize = 1024;

/// Events kept for the list on the page.
const NOTES_MAX: usize = 200;

/// Steps of a part of the file that is read to look closely.
const CHUNK_STEPS: u64 = 4096;

/// Steps that are read from the file for a close look; beyond that the buckets have to do.
const ZOOM_STEPS_MAX: u64 = 400_000;

/// A step's point on the curves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Where.
    pub at: At,
    /// By [`SERIES`]; NaN where it is not known.
    pub values: [f64; SERIES.len()],
}

impl Point {
    /// The point of a step's record; none of another record.
    pub fn of(record: &Record) -> Option<Point> {
        let Record::Step(Step {
            time_us,
            step,
            loss,
            grad_norm,
            lr,
            tokens,
            tokens_per_s,
            mfu,
            memory_bytes,
            step_s,
            exposed_comm_s,
            mtp_loss,
            ..
        }) = record
        else {
            return None;
        };
        let values = [
            *loss,
            *grad_norm,
            *lr,
            *tokens_per_s,
            mfu.unwrap_or(f64::NAN),
            *memory_bytes as f64,
            *step_s,
            exposed_comm_s.unwrap_or(f64::NAN),
            mtp_loss.unwrap_or(f64::NAN),
        ];
        Some(Point { at: At { step: *step, tokens: *tokens, time_us: *time_us }, values })
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Note {
    /// When, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Steps done.
    pub step: u64,
    /// What kind: `start`, `resume`, `checkpoint`, `accepted`, `trouble`, `straggler`, `warning`, `sample`, `finished`,
    /// `failed`, `damage`.
    pub kind: &'static str,
    /// In words.
    pub text: String,
}

/// How a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// No record yet.
    #[default]
    Empty,
    /// It goes on, as far as the journal says.
    Running,
    /// It ended as planned or asked.
    Finished,
    /// It failed.
    Failed,
}

/// Steps that lie one after another in the file.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    offset: u64,
    end: u64,
    first: u64,
    last: u64,
    steps: u64,
}

/// A run.
#[derive(Debug, Default)]
pub struct Run {
    /// What it is called on the page.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// How it stands.
    pub state: State,
    /// Its first record of the latest start.
    pub started: Option<Record>,
    /// Steps that it was asked to do, if its run file says.
    pub steps_wanted: Option<u64>,
    /// Its latest step.
    pub latest: Option<Point>,
    /// Its latest evaluation: step and loss.
    pub evaluated: Option<(u64, f64)>,
    /// By rank.
    pub ranks: BTreeMap<usize, Rank>,
    /// Whether all journals were read to their ends once.
    pub is_read: bool,
    /// Ranks whose journals are not read because there are too many.
    pub ranks_unread: usize,
    /// Newest last.
    pub notes: VecDeque<Note>,
    /// What Prometheus is told.
    pub metrics: Metrics,
    /// Whole lines that are no records: how many, and what is wrong with the first.
    pub damage: (u64, Option<String>),
    /// Kinds of records that this version does not know, and how often they came.
    pub unknown: BTreeMap<String, u64>,
    /// Bytes of the journal of rank 0 that were read, and that there are.
    pub progress: (u64, u64),
    /// Grows when curves changed other than at their end.
    pub epoch: u64,
    /// Points so far in this epoch; the latest of them are `recent`.
    pub points: u64,
    /// Grows with everything else that a page shows.
    pub facts: u64,
    steps: Curve<{ SERIES.len() }>,
    evals: Curve<1>,
    sampled: bool,
    recent: VecDeque<Point>,
    chunks: Vec<Chunk>,
    going_back: bool,
}

impl Run {
    /// A run of which nothing is known yet.
    pub fn new(name: String, dir: PathBuf) -> Run {
        Run { name, dir, ..Run::default() }
    }

    /// Shows samples of the curves until the journal was read; then [`Run::replace`].
    pub(crate) fn preview(&mut self, records: &[Record]) {
        for point in records.iter().filter_map(Point::of) {
            if self.latest.is_none_or(|l| l.at.step < point.at.step) {
                self.steps.add(point.at, point.values);
                self.latest = Some(point);
            }
        }
        self.sampled = true;
        self.epoch += 1;
    }

    /// Becomes what was read of it meanwhile.
    pub fn replace(&mut self, read: Run) {
        let (epoch, facts) = (self.epoch + 1 + read.epoch, self.facts + 1 + read.facts);
        *self = Run { steps_wanted: self.steps_wanted, epoch, facts, ..read };
    }

    /// Takes a line of rank 0's journal.
    pub fn observe(&mut self, found: &Found) {
        match &found.line {
            Line::Record(record) => {
                self.metrics.observe(record);
                self.observe_rank(0, found);
                self.record(record, found);
            }
            Line::Spans { .. } => self.observe_rank(0, found),
            Line::Drawn => {}
            Line::Unknown(kind) => {
                // A file that is no journal does not fill the memory with kinds.
                if self.unknown.len() < 16 || self.unknown.contains_key(kind) {
                    *self.unknown.entry(kind.clone()).or_default() += 1;
                }
                self.facts += 1;
            }
            Line::Damaged(why) => {
                self.damage.0 += 1;
                let offset = found.offset;
                self.damage.1.get_or_insert_with(|| format!("at byte {offset}: {why}"));
                self.facts += 1;
            }
        }
    }

    /// Takes a line of some rank's journal, for what is of that rank alone.
    pub fn observe_rank(&mut self, rank: usize, found: &Found) {
        let entry = self.ranks.entry(rank).or_insert_with(|| Rank::new(rank));
        match &found.line {
            Line::Record(record) => {
                entry.observe(record);
                self.metrics.observe_rank(rank, record);
            }
            Line::Spans { step } => {
                entry.observe_spans(SpansAt { step: *step, offset: found.offset, len: found.len });
            }
            _ => return,
        }
        self.facts += 1;
    }

    fn record(&mut self, record: &Record, found: &Found) {
        if let Some(point) = Point::of(record) {
            self.point(point, found);
            return;
        }
        let step = self.latest.map_or(0, |l| l.at.step);
        let (kind, step, text) = match record {
            Record::RunStarted { world, host, device, .. } => {
                self.state = State::Running;
                self.started = Some(record.clone());
                let ranks = if *world == 1 { "1 rank".to_owned() } else { format!("{world} ranks") };
                ("start", step, format!("{ranks}, rank 0 on {host}, {device}"))
            }
            Record::Resumed { step, path, .. } => {
                self.back_to(*step);
                let from =
                    if path.is_empty() { "from the beginning".to_owned() } else { format!("from {path}") };
                ("resume", *step, from)
            }
            Record::Recovered { step, why, source, world, recovery_s, .. } => {
                self.back_to(*step);
                (
                    "recovered",
                    *step,
                    format!("{why}: {world} ranks go on from {source} after {recovery_s:.2} s"),
                )
            }
            Record::Eval { time_us, step, loss, tokens, .. } => {
                self.evaluated = Some((*step, *loss));
                let at = At {
                    step: *step,
                    tokens: self.latest.map_or(*tokens, |l| l.at.tokens),
                    time_us: *time_us,
                };
                self.evals.add(at, [*loss]);
                self.facts += 1;
                return;
            }
            Record::Checkpoint { step, path, bytes, save_s, .. } => {
                let mib = *bytes as f64 / f64::from(1 << 20);
                ("checkpoint", *step, format!("{path}, {mib:.1} MiB in {save_s:.2} s"))
            }
            Record::Sample { step, text, .. } => ("sample", *step, text.clone()),
            Record::Accepted { step, what, .. } => ("accepted", *step, what.clone()),
            Record::Trouble { step, back_to, .. } => {
                if let Some(back_to) = back_to {
                    self.back_to(*back_to);
                }
                ("trouble", *step, record.trouble_text().unwrap_or_default())
            }
            Record::Straggler { step, why, .. } => ("straggler", *step, why.clone()),
            Record::Warning { text, .. } => ("warning", step, text.clone()),
            Record::Finished { step, reason, .. } => {
                self.state = State::Finished;
                ("finished", *step, reason.clone())
            }
            Record::Failed { step, error, hint, .. } => {
                self.state = State::Failed;
                let hint = hint.as_ref().map(|h| format!("; {h}")).unwrap_or_default();
                ("failed", *step, format!("{error}{hint}"))
            }
            Record::Step(_) | Record::Drawn { .. } | Record::Spans { .. } | Record::Verified { .. } => return,
        };
        self.note(Note { time_ms: record.time_us().unwrap_or(0) / 1000, step, kind, text });
    }

    fn note(&mut self, note: Note) {
        if self.notes.len() == NOTES_MAX {
            // Checkpoints are many and alike; what explains a run is kept longer.
            let oldest = self.notes.iter().position(|n| n.kind == "checkpoint" || n.kind == "sample");
            self.notes.remove(oldest.unwrap_or(0));
        }
        self.notes.push_back(note);
        self.facts += 1;
    }

    fn point(&mut self, point: Point, found: &Found) {
        if self.latest.is_some_and(|l| point.at.step <= l.at.step) {
            // Steps done again without a word: an older version, or two writers.
            self.back_to(point.at.step.saturating_sub(1));
        }
        let values = &point.values;
        if !(values[0].is_finite() && values[1].is_finite()) {
            let text = format!("loss {}, gradient norm {}", values[0], values[1]);
            self.note(Note { time_ms: point.at.time_us / 1000, step: point.at.step, kind: "warning", text });
        }
        self.steps.add(point.at, point.values);
        self.latest = Some(point);
        self.points += 1;
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(point);
        self.chunk(point.at.step, found);
    }

    fn chunk(&mut self, step: u64, found: &Found) {
        let end = found.offset + found.len;
        match self.chunks.last_mut() {
            Some(chunk) if chunk.steps < CHUNK_STEPS && !self.going_back => {
                chunk.end = end;
                chunk.last = step;
                chunk.steps += 1;
            }
            _ => self.chunks.push(Chunk { offset: found.offset, end, first: step, last: step, steps: 1 }),
        }
        self.going_back = false;
    }

    /// Steps after `step` no longer count.
    fn back_to(&mut self, step: u64) {
        if self.latest.is_none_or(|l| l.at.step <= step) {
            return;
        }
        self.steps.truncate(step);
        self.evals.truncate(step);
        self.chunks.retain(|c| c.first <= step);
        if let Some(chunk) = self.chunks.last_mut() {
            chunk.last = chunk.last.min(step);
        }
        if let Some(latest) = &mut self.latest {
            latest.at.step = step;
        }
        self.going_back = true;
        self.recent.clear();
        (self.points, self.epoch) = (0, self.epoch + 1);
    }

    /// Points that came after the first `seen` of this epoch; none if some of them are gone.
    pub fn since(&self, seen: u64) -> Option<impl Iterator<Item = &Point>> {
        let new = usize::try_from(self.points.checked_sub(seen)?).ok()?;
        let skip = self.recent.len().checked_sub(new)?;
        Some(self.recent.iter().skip(skip))
    }

    /// Curves of at most `buckets` buckets.
    pub fn curves(&self, buckets: usize) -> Columns {
        columns(&self.steps.merged(buckets), SERIES)
    }

    /// Losses of evaluations.
    pub fn evaluations(&self, buckets: usize) -> Columns {
        columns(&self.evals.merged(buckets), ["eval_loss"])
    }

    /// Whether curves are made of samples so far.
    pub(crate) fn is_preview(&self) -> bool {
        self.sampled
    }

    /// What a close look at the steps `from` to `to` needs, taken along so that nobody waits while a file is read.
    pub fn zoom(&self, from: u64, to: u64, buckets: usize) -> Zoom {
        let parts: Vec<Chunk> =
            self.chunks.iter().filter(|c| c.last >= from && c.first <= to).copied().collect();
        let steps: u64 = parts.iter().map(|c| c.steps).sum();
        let known = self.steps.between(from, to, buckets);
        let path = journal::path(&self.dir, 0);
        let parts = if self.sampled || steps > ZOOM_STEPS_MAX { Vec::new() } else { parts };
        Zoom { path, from, to, buckets: buckets.max(1), parts, known }
    }
}

/// A close look about to be taken.
#[derive(Debug)]
pub struct Zoom {
    path: PathBuf,
    from: u64,
    to: u64,
    buckets: usize,
    parts: Vec<Chunk>,
    known: Vec<Bucket<{ SERIES.len() }>>,
}

impl Zoom {
    /// The curves there, from the file where it is short enough, else from what is known.
    pub fn look(self) -> Columns {
        let read = if self.parts.is_empty() { None } else { self.read(&self.path) };
        let buckets = read.unwrap_or(self.known);
        columns(&buckets, SERIES)
    }

    fn read(&self, path: &Path) -> Option<Vec<Bucket<{ SERIES.len() }>>> {
        let steps = self.to.saturating_sub(self.from).saturating_add(1);
        let held: u64 = self.parts.iter().map(|c| c.steps).sum();
        let mut curve = Curve::of_width(steps.min(held).div_ceil(self.buckets as u64));
        for part in &self.parts {
            let (from, to) = (self.from.max(part.first), self.to.min(part.last));
            lines_between(path, part.offset, part.end, &mut |found| {
                if let Line::Record(record) = &found.line
                    && let Some(point) = Point::of(record)
                    && (from..=to).contains(&point.at.step)
                {
                    curve.add(point.at, point.values);
                }
            })
            .ok()?;
        }
        Some(curve.merged(self.buckets))
    }
}

#[cfg(test)]
mod tests;
