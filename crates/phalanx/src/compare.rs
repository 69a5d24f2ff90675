//! `phalanx compare`: what a traced run took against what the planner predicts, joined by op id.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use journal::Record;
use machine::{OpPrice, StepPrice, price};
use serde::Serialize;
use spec::{Error, Result, RunSpec};
use train::RunDir;

use crate::args::Compare;
use crate::{output, this_machine};

/// What one rank's journal says about its steps.
#[derive(Default)]
struct Measured {
    threads: Option<usize>,
    memory_bytes: u64,
    step_s: BTreeMap<u64, f64>,
    exposed_s: BTreeMap<u64, f64>,
    /// By op id: its name and its seconds in each step.
    ops: BTreeMap<u64, (String, BTreeMap<u64, f64>)>,
}

/// An op, or all ops of a kind, of one rank or of the rank that takes longest.
#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    name: String,
    kind: String,
    /// The rank whose numbers these are.
    rank: usize,
    predicted_s: f64,
    measured_s: f64,
    /// Measured over predicted.
    ratio: Option<f64>,
    /// Measured less predicted.
    lost_s: f64,
}

/// The whole comparison.
#[derive(Debug, Serialize)]
struct Report {
    run: String,
    steps: usize,
    ranks: usize,
    predicted_step_s: f64,
    predicted_low_s: f64,
    predicted_high_s: f64,
    measured_step_s: f64,
    error: f64,
    /// Communication that no computation hid, of the rank that waited longest.
    predicted_exposed_comm_s: f64,
    measured_exposed_comm_s: f64,
    /// Communication, hidden or not, of the same rank.
    predicted_comm_s: f64,
    measured_comm_s: f64,
    predicted_bytes: Vec<u64>,
    measured_bytes: Vec<u64>,
    memory_equal: bool,
    /// Ops of one side only: none, if the run and the prediction are of one program.
    unmatched: Vec<String>,
    kinds: Vec<Row>,
    ops: Vec<Row>,
}

pub(crate) fn run(args: &Compare) -> Result<u8> {
    let run = RunDir::new(&args.run_dir).load()?;
    let measured = read(&args.run_dir)?;
    let table = this_machine::load(&args.machine)?;
    let report = report(&args.run_dir, &run, &measured, &predict(&table, &run, &measured)?)?;
    if args.json {
        output::print(&serde_json::to_string_pretty(&report).expect("numbers are JSON"));
    } else {
        output::print(&text(&report));
    }
    Ok(0)
}

/// The journals of all ranks, by rank.
fn read(dir: &Path) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    for (_, path) in journal::files(dir).map_err(|e| e.hint("give the directory of a run"))? {
        let mut m = Measured::default();
        for record in journal::read(&path)? {
            m.take(record);
        }
        all.push(m);
    }
    if all.is_empty() || all.iter().any(|m| m.ops.is_empty()) {
        return Err(
            Error::user(format!("no ops are recorded in {}", dir.display())).hint("train with --trace")
        );
    }
    all.iter_mut().for_each(Measured::forget_warm_up);
    Ok(all)
}

impl Measured {
    fn take(&mut self, record: Record) {
        match record {
            // A run that went on under another layout is compared from there.
            Record::RunStarted { device, .. } => {
                let threads = device.rsplit_once(", ").and_then(|(_, t)| t.strip_suffix(" threads"));
                *self = Measured { threads: threads.and_then(|t| t.parse().ok()), ..Measured::default() };
            }
            Record::Step { step, step_s, memory_bytes, exposed_comm_s, .. } => {
                self.step_s.insert(step, step_s);
                self.exposed_s.insert(step, exposed_comm_s.unwrap_or(0.0));
                self.memory_bytes = memory_bytes;
            }
            Record::Spans { step, spans, .. } => {
                for s in spans {
                    let (_, steps) =
                        self.ops.entry(s.op).or_insert_with(|| (s.name.clone(), BTreeMap::new()));
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

    fn op_s(&self, id: u64) -> f64 {
        self.ops.get(&id).map_or(0.0, |(_, steps)| median(steps.values()))
    }
}

fn median<'a>(values: impl Iterator<Item = &'a f64>) -> f64 {
    let mut sorted: Vec<f64> = values.copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The price of the program that the run ran.
fn predict(table: &machine::Machine, run: &RunSpec, measured: &[Measured]) -> Result<StepPrice> {
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
    this_machine::with_job(run, threads, "shm", |job| price(table, job, &run.layout))
}

fn report(dir: &Path, run: &RunSpec, measured: &[Measured], price: &StepPrice) -> Result<Report> {
    let mut unmatched = Vec::new();
    let mut ops: BTreeMap<u64, Row> = BTreeMap::new();
    let mut kinds: BTreeMap<(usize, &str), (f64, f64)> = BTreeMap::new();
    for (rank, (m, p)) in measured.iter().zip(&price.ranks).enumerate() {
        let predicted: BTreeSet<u64> = p.ops.iter().map(|o| o.id.0).collect();
        let strange = m.ops.iter().filter(|(id, _)| !predicted.contains(id));
        unmatched.extend(strange.map(|(_, (name, _))| format!("rank {rank}: {name}, not predicted")));
        let missing = p.ops.iter().filter(|o| !m.ops.contains_key(&o.id.0));
        unmatched.extend(missing.map(|o| format!("rank {rank}: {}, not measured", o.name)));
        for o in &p.ops {
            let row = row(Some(o.id.0), &o.name, o.kind, rank, o.s, m.op_s(o.id.0));
            let sum = kinds.entry((rank, o.kind)).or_default();
            *sum = (sum.0 + row.predicted_s, sum.1 + row.measured_s);
            // An op that several ranks run is shown where it took longest.
            let kept = ops.entry(o.id.0).or_insert_with(|| row.clone());
            if row.measured_s > kept.measured_s {
                *kept = row;
            }
        }
    }
    let mut by_kind: BTreeMap<&str, Row> = BTreeMap::new();
    for ((rank, kind), (p, m)) in kinds {
        let row = row(None, kind, kind, rank, p, m);
        let kept = by_kind.entry(kind).or_insert_with(|| row.clone());
        if row.measured_s > kept.measured_s {
            *kept = row;
        }
    }
    let by_loss = |rows: Vec<Row>| {
        let mut rows = rows;
        rows.sort_by(|a, b| b.lost_s.abs().total_cmp(&a.lost_s.abs()));
        rows
    };
    let exposed: Vec<f64> = measured.iter().map(|m| median(m.exposed_s.values())).collect();
    let most = (0..exposed.len()).max_by(|&a, &b| exposed[a].total_cmp(&exposed[b])).unwrap_or(0);
    let comm = |of: &dyn Fn(&OpPrice) -> f64| -> f64 {
        price.ranks[most].ops.iter().filter(|o| talks(o.kind)).map(of).sum()
    };
    let measured_step_s = measured.iter().map(|m| median(m.step_s.values())).fold(0.0, f64::max);
    let predicted_bytes: Vec<u64> = price.ranks.iter().map(|r| r.memory_bytes as u64).collect();
    let measured_bytes: Vec<u64> = measured.iter().map(|m| m.memory_bytes).collect();
    Ok(Report {
        run: dir.display().to_string(),
        steps: measured[0].step_s.len(),
        ranks: run.layout.world(),
        predicted_step_s: price.step_s,
        predicted_low_s: price.low_s,
        predicted_high_s: price.high_s,
        measured_step_s,
        error: price.step_s / measured_step_s - 1.0,
        predicted_exposed_comm_s: price.ranks[most].exposed_comm_s,
        measured_exposed_comm_s: exposed[most],
        predicted_comm_s: comm(&|o| o.s),
        measured_comm_s: comm(&|o| measured[most].op_s(o.id.0)),
        memory_equal: predicted_bytes == measured_bytes,
        predicted_bytes,
        measured_bytes,
        unmatched,
        kinds: by_loss(by_kind.into_values().collect()),
        ops: by_loss(ops.into_values().collect()),
    })
}

/// Kinds in which ranks talk and do not wait for what was begun earlier.
fn talks(kind: &str) -> bool {
    const KINDS: [&str; 9] = [
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "send",
        "recv",
        "gather_params",
        "reduce_grads",
        "sync_grads",
        "all_gather_params",
    ];
    KINDS.contains(&kind)
}

fn row(id: Option<u64>, name: &str, kind: &str, rank: usize, predicted_s: f64, measured_s: f64) -> Row {
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

fn text(r: &Report) -> String {
    const OPS_SHOWN: usize = 20;
    let mut out = String::new();
    let ms = |s: f64| format!("{:.2}", 1e3 * s);
    let mut write = || -> std::fmt::Result {
        writeln!(out, "{}: {} ranks, median of {} traced steps", r.run, r.ranks, r.steps)?;
        writeln!(
            out,
            "step           predicted {} ms ({} to {})  measured {} ms  error {:+.1} %",
            ms(r.predicted_step_s),
            ms(r.predicted_low_s),
            ms(r.predicted_high_s),
            ms(r.measured_step_s),
            100.0 * r.error
        )?;
        if r.ranks > 1 {
            writeln!(
                out,
                "communication  predicted {} ms, {} not hidden  measured {} ms, {} not hidden",
                ms(r.predicted_comm_s),
                ms(r.predicted_exposed_comm_s),
                ms(r.measured_comm_s),
                ms(r.measured_exposed_comm_s)
            )?;
        }
        let most = |bytes: &[u64]| crate::show::binary(bytes.iter().copied().max().unwrap_or(0) as usize);
        writeln!(
            out,
            "memory         predicted {}  measured {}  {}",
            most(&r.predicted_bytes),
            most(&r.measured_bytes),
            if r.memory_equal { "equal on every rank" } else { "DIFFERENT" }
        )?;
        for line in &r.unmatched {
            writeln!(out, "unmatched      {line}")?;
        }
        for (title, rows) in [("kind", &r.kinds[..]), ("op", &r.ops[..r.ops.len().min(OPS_SHOWN)])] {
            writeln!(
                out,
                "\n{title:<34} {:>4} {:>12} {:>12} {:>7} {:>10}",
                "rank", "predicted ms", "measured ms", "ratio", "lost ms"
            )?;
            for row in rows {
                let ratio = row.ratio.map_or_else(|| "-".to_owned(), |x| format!("{x:.2}"));
                writeln!(
                    out,
                    "{:<34} {:>4} {:>12} {:>12} {ratio:>7} {:>10}",
                    row.name,
                    row.rank,
                    ms(row.predicted_s),
                    ms(row.measured_s),
                    format!("{:+.2}", 1e3 * row.lost_s)
                )?;
            }
        }
        if r.ops.len() > OPS_SHOWN {
            writeln!(out, "{} more ops with --json", r.ops.len() - OPS_SHOWN)?;
        }
        Ok(())
    };
    write().expect("writing to a string");
    out
}
