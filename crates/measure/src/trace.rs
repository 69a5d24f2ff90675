//! What slowed a run of our own: its journals as a trace of passes, whose ops the program names.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use journal::{Record, Span};
use program::{BlockWork, Coords, OpKind, Pass, Program, Replication, Request};
use sim::trace::{Blame, Kind, Row, blame};
use spec::{Error, Result, RunSpec};

/// Says what slowed the run in `dir`, whose ops were recorded: by replica, by stage, by kind of work.
///
/// # Errors
/// If not all of its ranks were traced, or it runs several chunks a stage.
pub fn of_run(dir: &Path, run: &RunSpec) -> Result<Blame> {
    blame(&dir.display().to_string(), &rows(dir, run)?)
}

/// The passes of a run's ranks. Of tensor-parallel ranks, which wait for each other within every pass, the first stands
/// for all; context-parallel ones are replicas.
///
/// # Errors
/// As [`of_run`].
pub fn rows(dir: &Path, run: &RunSpec) -> Result<Vec<Row>> {
    if run.layout.chunks > 1 {
        return Err(Error::user(format!("{}: stages of several chunks are not replayed", dir.display()))
            .hint("phalanx compare takes them op by op"));
    }
    let steps = read(dir, run)?;
    let origins = origins(&steps);
    let mut out = Vec::new();
    for (rank, steps) in steps.iter().enumerate() {
        let coords = Coords::of(rank, &run.layout);
        if coords.tp > 0 {
            continue;
        }
        let (replicas, dp_rank) = coords.replicas(Replication::Data, &run.layout);
        let worker = Worker { ops: known_ops(run, rank)?, dp_rank, stage: coords.pp, replicas };
        for (step, spans) in steps {
            if let Some(origin_us) = origins.get(step) {
                worker.step(*step, *origin_us, spans, &mut out);
            }
        }
    }
    if out.is_empty() {
        return Err(Error::user(format!("{}: no step is traced on every rank", dir.display()))
            .hint("train with --trace, all ranks of it"));
    }
    Ok(out)
}

/// Spans of each rank by step.
fn read(dir: &Path, run: &RunSpec) -> Result<Vec<BTreeMap<u64, Vec<Span>>>> {
    let mut all = Vec::new();
    for (_, path) in journal::files(dir).map_err(|e| e.hint("give the directory of a run"))? {
        let mut steps: BTreeMap<u64, Vec<Span>> = BTreeMap::new();
        for record in journal::read(&path)? {
            match record {
                // A run that went on under another layout is replayed from there.
                Record::RunStarted { .. } => steps.clear(),
                Record::Spans { step, spans, .. } => _ = steps.insert(step, spans),
                _ => {}
            }
        }
        all.push(steps);
    }
    let world = run.layout.world();
    if all.len() != world {
        let what = format!("{} journals in {}, but its layout has {world} ranks", all.len(), dir.display());
        return Err(Error::user(what).hint("give the directory of a run whose ranks all wrote there"));
    }
    Ok(all)
}

/// When each step began that all ranks have traced; without the first, in which memory is touched for the first time.
fn origins(ranks: &[BTreeMap<u64, Vec<Span>>]) -> BTreeMap<u64, u64> {
    let mut out = BTreeMap::new();
    for step in ranks.first().into_iter().flat_map(BTreeMap::keys) {
        let first = |r: &BTreeMap<u64, Vec<Span>>| r.get(step)?.iter().map(|s| s.start_us).min();
        let all: Option<Vec<u64>> = ranks.iter().map(first).collect();
        if let Some(origin) = all.and_then(|all| all.into_iter().min()) {
            out.insert(*step, origin);
        }
    }
    if out.len() > 1 {
        out.pop_first();
    }
    out
}

/// What an op of the program is to a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Work of a pass.
    Pass(Pass),
    /// One end of a message between stages: its kind, and which of the micro-batch's.
    Message(Kind, u32),
    /// Something that is done once a step.
    Once(Kind),
}

fn known_ops(run: &RunSpec, rank: usize) -> Result<HashMap<u64, Part>> {
    let request = Request::of(run, rank);
    let program = Program::build(&request, &|_, _| 0)?;
    let mut out = HashMap::new();
    for block in &program.blocks {
        for op in &block.ops {
            if let Some(part) = part(&op.kind, block.work) {
                out.insert(op.id.0, part);
            }
        }
    }
    Ok(out)
}

fn part(kind: &OpKind, work: BlockWork) -> Option<Part> {
    use OpKind::*;
    let pass = match work {
        BlockWork::Train(pass) | BlockWork::TrainLast(pass) => Some(pass),
        BlockWork::Tail => None,
        BlockWork::Evaluate | BlockWork::Generate | BlockWork::Average => return None,
    };
    let forward = pass == Some(Pass::Forward);
    Some(match kind {
        Send { tag, .. } if forward => Part::Message(Kind::ForwardSend, *tag),
        Send { tag, .. } => Part::Message(Kind::BackwardSend, *tag),
        Recv { tag, .. } if forward => Part::Message(Kind::ForwardRecv, *tag),
        Recv { tag, .. } => Part::Message(Kind::BackwardRecv, *tag),
        GatherParams { .. } | WaitParams { .. } | ReduceGrads { .. } | WaitGrads { .. } => {
            Part::Once(Kind::Scatter)
        }
        ShardGrads { .. } | SyncGrads { .. } | TieGrads { .. } => Part::Once(Kind::Scatter),
        GradNorm => Part::Once(Kind::Clip),
        AdamW { .. } | MuonMomentum { .. } | Orthogonalise { .. } | Muon { .. } => {
            Part::Once(Kind::Optimizer)
        }
        GatherUpdate { .. } | ScatterUpdate { .. } | Average { .. } | QkClip { .. } => {
            Part::Once(Kind::Optimizer)
        }
        AllGatherParams { .. } => Part::Once(Kind::Gather),
        _ => Part::Pass(pass?),
    })
}

/// One rank that stands for a worker of the trace.
struct Worker {
    ops: HashMap<u64, Part>,
    dp_rank: usize,
    stage: usize,
    replicas: usize,
}

impl Worker {
    /// The rows of one step.
    fn step(&self, step: u64, origin_us: u64, spans: &[Span], out: &mut Vec<Row>) {
        let mut spans: Vec<(&Span, Part)> =
            spans.iter().filter_map(|s| Some((s, *self.ops.get(&s.op)?))).collect();
        spans.sort_by_key(|(s, _)| (s.start_us, s.end_us));
        let mut writer = Writer {
            worker: self,
            step,
            origin_us,
            pass: None,
            tail: BTreeMap::new(),
            rows: out,
            done_us: 0,
        };
        for (span, part) in spans {
            writer.take(span, part);
        }
        writer.finish();
        // Groups of parameters take turns in what comes after the passes: each kind is taken together.
        for (_, stretch) in std::mem::take(&mut writer.tail) {
            writer.row(stretch);
        }
    }
}

/// A pass under way, or what there is of a kind after the last one.
#[derive(Clone, Copy)]
struct Stretch {
    kind: Kind,
    seq: i64,
    start_us: u64,
    busy_us: u64,
}

struct Writer<'a> {
    worker: &'a Worker,
    step: u64,
    origin_us: u64,
    pass: Option<Stretch>,
    /// What comes once a step, in its order.
    tail: BTreeMap<usize, Stretch>,
    rows: &'a mut Vec<Row>,
    /// Until when this worker's rows go.
    done_us: u64,
}

/// What comes after the passes, in order.
const TAIL: [Kind; 4] = [Kind::Scatter, Kind::Clip, Kind::Optimizer, Kind::Gather];

impl Writer<'_> {
    fn take(&mut self, span: &Span, part: Part) {
        let busy_us = span.end_us.saturating_sub(span.start_us);
        let (start_us, seq) = (span.start_us, i64::from(span.micro_batch.unwrap_or(0)));
        match part {
            Part::Pass(pass) => {
                let kind = if pass == Pass::Forward { Kind::Forward } else { Kind::Backward };
                match &mut self.pass {
                    Some(s) if s.kind == kind && s.seq == seq => s.busy_us += busy_us,
                    _ => {
                        self.finish();
                        self.pass = Some(Stretch { kind, seq, start_us, busy_us });
                    }
                }
            }
            Part::Message(kind, tag) => {
                self.finish();
                // One tag for each pair of stages and direction; micro-batches tell its messages apart.
                self.row(Stretch { kind, seq: seq + (i64::from(tag) << TAG_SHIFT), start_us, busy_us });
            }
            // Beside or within a pass they wait for others, which is no part of its work.
            Part::Once(kind) if kind == Kind::Scatter && self.pass.is_some() => {}
            Part::Once(Kind::Scatter | Kind::Gather) if self.worker.replicas == 1 => {}
            Part::Once(kind) => {
                self.finish();
                let at = TAIL.iter().position(|k| *k == kind).unwrap_or(TAIL.len());
                self.tail.entry(at).or_insert(Stretch { kind, seq: 0, start_us, busy_us: 0 }).busy_us +=
                    busy_us;
            }
        }
    }

    /// Writes down the pass under way.
    fn finish(&mut self) {
        if let Some(pass) = self.pass.take() {
            self.row(pass);
        }
    }

    fn row(&mut self, stretch: Stretch) {
        let start_us = stretch.start_us.max(self.done_us);
        self.done_us = start_us + stretch.busy_us;
        let seconds = |us: u64| us as f64 / 1e6;
        self.rows.push(Row {
            line: self.rows.len() + 1,
            dp_rank: self.worker.dp_rank,
            stage: self.worker.stage,
            step: self.step as i64,
            kind: stretch.kind,
            start_s: seconds(start_us.saturating_sub(self.origin_us)),
            duration_s: seconds(stretch.busy_us),
            seq: stretch.seq,
            chunk: 0,
            class: 0,
            // What is sent lies in a buffer from then on.
            waits: !matches!(stretch.kind, Kind::ForwardSend | Kind::BackwardSend),
        });
    }
}

/// Micro-batches of a step are fewer than this power of two.
const TAG_SHIFT: u32 = 32;
