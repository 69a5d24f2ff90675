//! What a traced run took against what is predicted of it, joined by op id.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use journal::{Record, Step};
use machine::{Machine, OpEstimate, StepEstimate, Workload, estimate};
use program::OpId;
use serde::Serialize;
use spec::stats::median;
use spec::{Error, Result, RunSpec};

use crate::{Counts, workload};

/// What one rank's journal says about its steps.
#[derive(Default)]
struct Measured {
    threads: Option<usize>,
    memory_bytes: u64,
    experts: Counts,
    step_s: BTreeMap<u64, f64>,
    exposed_s: BTreeMap<u64, f64>,
    /// By op id: its name and its seconds in each step.
    ops: BTreeMap<OpId, (String, BTreeMap<u64, f64>)>,
}

/// An op, or all ops of a kind, of one rank or of the rank that takes longest.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The op's id; none of kinds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<OpId>,
    /// The op's name, or the kind's.
    pub name: String,
    /// The op's kind.
    pub kind: String,
    /// The rank whose numbers these are.
    pub rank: usize,
    /// Seconds in a step as predicted.
    pub predicted_s: f64,
    /// Median seconds in a step as measured.
    pub measured_s: f64,
    /// Measured over predicted.
    pub ratio: Option<f64>,
    /// Measured less predicted.
    pub lost_s: f64,
}

/// The whole comparison. Communication is of the rank that waited longest.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Directory of the run.
    pub run: String,
    /// Traced steps behind the medians.
    pub steps: usize,
    /// Ranks.
    pub ranks: usize,
    /// Seconds of a step as predicted.
    pub predicted_step_s: f64,
    /// Low end of the interval.
    pub predicted_low_s: f64,
    /// High end.
    pub predicted_high_s: f64,
    /// Median seconds of a step.
    pub measured_step_s: f64,
    /// Predicted over measured, less one.
    pub error: f64,
    /// Seconds of communication that no computation hides, predicted.
    pub predicted_exposed_comm_s: f64,
    /// The same as measured.
    pub measured_exposed_comm_s: f64,
    /// Seconds of communication, hidden or not, predicted.
    pub predicted_comm_s: f64,
    /// The same as measured.
    pub measured_comm_s: f64,
    /// Bytes of each rank, predicted.
    pub predicted_bytes: Vec<u64>,
    /// Bytes of each rank, mapped.
    pub measured_bytes: Vec<u64>,
    /// Whether they are equal.
    pub memory_equal: bool,
    /// Ops of one side only: none, if the run and the prediction are of one program.
    pub unmatched: Vec<String>,
    /// By kind.
    pub kinds: Vec<Row>,
    /// By op.
    pub ops: Vec<Row>,
}

/// Compares the run in `dir` with what `table` predicts of it.
///
/// # Errors
/// If the run was not traced on every rank, or the table lacks a kind of op.
pub fn compare(dir: &Path, run: &RunSpec, table: &Machine) -> Result<Report> {
    let measured =
        read(dir, &|step| run.batch.sequences_after(step.saturating_sub(1)) == run.batch.sequences)?;
    let estimate = predict(table, run, &measured)?;
    Ok(report(dir, run, &measured, &estimate))
}

/// The journals of all ranks, by rank, of the steps that are `full`: what is predicted is a step of the full batch.
fn read(dir: &Path, full: &dyn Fn(u64) -> bool) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    for (_, path) in journal::files(dir).map_err(|e| e.hint("give the directory of a run"))? {
        let mut m = Measured::default();
        for record in journal::read(&path)? {
            m.take(record, full);
        }
        all.push(m);
    }
    if all.is_empty() || all.iter().any(|m| m.ops.is_empty()) {
        return Err(Error::user(format!(
            "no ops are recorded in {}, of a step of the full batch",
            dir.display()
        ))
        .hint("train with --trace, past the steps of batch.ramp"));
    }
    all.iter_mut().for_each(Measured::forget_warm_up);
    Ok(all)
}

impl Measured {
    fn take(&mut self, record: Record, full: &dyn Fn(u64) -> bool) {
        self.experts.take(&record);
        match record {
            // A run that went on under another layout is compared from there.
            Record::RunStarted { threads, .. } => *self = Measured { threads, ..Measured::default() },
            Record::Step(Step { step, .. }) | Record::Spans { step, .. } if !full(step) => {}
            Record::Step(Step { step, step_s, memory_bytes, exposed_comm_s, .. }) => {
                self.step_s.insert(step, step_s);
                self.exposed_s.insert(step, exposed_comm_s.unwrap_or(0.0));
                self.memory_bytes = memory_bytes;
            }
            Record::Spans { step, spans, .. } => {
                for s in spans {
                    let (_, steps) =
                        self.ops.entry(OpId(s.op)).or_insert_with(|| (s.name.clone(), BTreeMap::new()));
                    *steps.entry(step).or_default() += s.end_us.saturating_sub(s.start_us) as f64 / 1e6;
                }
            }
            _ => {}
        }
    }

    /// The first step touches memory for the first time; it counts only where there is no other.
    fn forget_warm_up(&mut self) {
        let Some(&first) = self.step_s.keys().next().filter(|_| self.step_s.len() > 1) else { return };
        self.step_s.remove(&first);
        self.exposed_s.remove(&first);
        self.ops.values_mut().for_each(|(_, steps)| _ = steps.remove(&first));
    }

    fn op_s(&self, id: OpId) -> f64 {
        self.ops.get(&id).map_or(0.0, |(_, steps)| median(steps.values().copied()))
    }
}

/// What is predicted of the program that the run ran.
fn predict(table: &Machine, run: &RunSpec, measured: &[Measured]) -> Result<StepEstimate> {
    let world = run.layout.world();
    if measured.len() != world {
        return Err(Error::user(format!(
            "{} journals in {}, but its layout has {world} ranks",
            measured.len(),
            run.run.dir.display()
        ))
        .hint("compare a run whose ranks were all traced, with --fresh if their number changed"));
    }
    let threads = measured[0].threads.unwrap_or_else(|| (table.cores / world).max(1));
    let experts = measured[0].experts.shares();
    let load = Workload { experts: experts.as_deref(), ..workload(run, threads, "shm") };
    estimate(table, &load, &run.layout)
}

fn report(dir: &Path, run: &RunSpec, measured: &[Measured], predicted: &StepEstimate) -> Report {
    let (kinds, ops, unmatched) = join(measured, predicted);
    let exposed: Vec<f64> = measured.iter().map(|m| median(m.exposed_s.values().copied())).collect();
    let most = (0..exposed.len()).max_by(|&a, &b| exposed[a].total_cmp(&exposed[b])).unwrap_or(0);
    let comm = |of: &dyn Fn(&OpEstimate) -> f64| -> f64 {
        predicted.ranks[most].ops.iter().filter(|o| o.talks).map(of).sum()
    };
    let measured_step_s = measured.iter().map(|m| median(m.step_s.values().copied())).fold(0.0, f64::max);
    let predicted_bytes: Vec<u64> = predicted.ranks.iter().map(|r| r.memory_bytes as u64).collect();
    let measured_bytes: Vec<u64> = measured.iter().map(|m| m.memory_bytes).collect();
    Report {
        run: dir.display().to_string(),
        steps: measured[0].step_s.len(),
        ranks: run.layout.world(),
        predicted_step_s: predicted.step_s,
        predicted_low_s: predicted.low_s,
        predicted_high_s: predicted.high_s,
        measured_step_s,
        error: predicted.step_s / measured_step_s - 1.0,
        predicted_exposed_comm_s: predicted.ranks[most].exposed_comm_s,
        measured_exposed_comm_s: exposed[most],
        predicted_comm_s: comm(&|o| o.s),
        measured_comm_s: comm(&|o| measured[most].op_s(o.id)),
        memory_equal: predicted_bytes == measured_bytes,
        predicted_bytes,
        measured_bytes,
        unmatched,
        kinds,
        ops,
    }
}

/// Rows by kind and by op, each of the rank where it took longest, largest differences first; and ops of one side only.
fn join(measured: &[Measured], predicted: &StepEstimate) -> (Vec<Row>, Vec<Row>, Vec<String>) {
    let mut unmatched = Vec::new();
    let mut ops: BTreeMap<OpId, Row> = BTreeMap::new();
    let mut kinds: BTreeMap<(usize, &str), (f64, f64)> = BTreeMap::new();
    for (rank, (m, p)) in measured.iter().zip(&predicted.ranks).enumerate() {
        let known: BTreeSet<OpId> = p.ops.iter().map(|o| o.id).collect();
        let strange = m.ops.iter().filter(|(id, _)| !known.contains(id));
        unmatched.extend(strange.map(|(_, (name, _))| format!("rank {rank}: {name}, not predicted")));
        let missing = p.ops.iter().filter(|o| !m.ops.contains_key(&o.id));
        unmatched.extend(missing.map(|o| format!("rank {rank}: {}, not measured", o.name)));
        for o in &p.ops {
            let row = row(Some(o.id), &o.name, o.kind, rank, o.s, m.op_s(o.id));
            let sum = kinds.entry((rank, o.kind)).or_default();
            *sum = (sum.0 + row.predicted_s, sum.1 + row.measured_s);
            keep_longest(&mut ops, o.id, row);
        }
    }
    let mut by_kind: BTreeMap<&str, Row> = BTreeMap::new();
    for ((rank, kind), (p, m)) in kinds {
        keep_longest(&mut by_kind, kind, row(None, kind, kind, rank, p, m));
    }
    (by_loss(by_kind), by_loss(ops), unmatched)
}

fn keep_longest<K: Ord>(rows: &mut BTreeMap<K, Row>, key: K, row: Row) {
    if rows.get(&key).is_none_or(|kept| row.measured_s > kept.measured_s) {
        rows.insert(key, row);
    }
}

fn by_loss<K>(rows: BTreeMap<K, Row>) -> Vec<Row> {
    let mut rows: Vec<Row> = rows.into_values().collect();
    rows.sort_by(|a, b| b.lost_s.abs().total_cmp(&a.lost_s.abs()));
    rows
}

fn row(id: Option<OpId>, name: &str, kind: &str, rank: usize, predicted_s: f64, measured_s: f64) -> Row {
    Row {
        id,
        name: name.to_owned(),
        kind: kind.to_owned(),
        rank,
        predicted_s,
        measured_s,
        ratio: (predicted_s > 0.0).then(|| measured_s / predicted_s),
        lost_s: measured_s - predicted_s,
    }
}
