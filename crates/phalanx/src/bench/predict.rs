//! `phalanx bench predict`: predicted against measured steps of the reference model under many layouts.

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use machine::{StepPrice, price};
use serde::Serialize;
use serde_json::Value;
use spec::{Error, Result};

use super::calibrate::{load_average, quantile};
use super::step::reference;
use crate::args::BenchPredict;
use crate::{output, this_machine};

/// Ranks, threads of a rank (0 for its share of the cores), and layout keys without their section.
const LAYOUTS: [(usize, usize, &str); 16] = [
    (1, 1, "micro_batch=8"),
    (1, 0, "micro_batch=8"),
    (1, 0, "micro_batch=1"),
    (1, 0, "micro_batch=4 recompute=full"),
    (2, 0, "dp=2 micro_batch=4"),
    (2, 0, "dp=2 micro_batch=1"),
    (2, 0, "dp=2 micro_batch=4 zero=1"),
    (2, 0, "dp=2 micro_batch=2 zero=3"),
    (2, 0, "tp=2 micro_batch=8"),
    (2, 0, "pp=2 micro_batch=1"),
    (2, 0, "pp=2 micro_batch=1 schedule=zero-bubble"),
    (4, 0, "dp=4 micro_batch=2"),
    (4, 0, "dp=4 micro_batch=1 zero=3"),
    (4, 0, "dp=2 pp=2 micro_batch=1"),
    (4, 0, "dp=2 tp=2 micro_batch=4"),
    (4, 0, "pp=4 micro_batch=1"),
];

/// One layout, predicted and measured.
#[derive(Serialize)]
struct Row {
    ranks: usize,
    threads: usize,
    layout: String,
    /// Seconds of a step as predicted, and between what.
    predicted_s: f64,
    predicted_low_s: f64,
    predicted_high_s: f64,
    /// Median and fastest of all timed steps.
    measured_s: f64,
    best_s: f64,
    /// Predicted over measured, less one.
    error: f64,
    error_of_best: f64,
    inside_interval: bool,
    predicted_bytes: Vec<usize>,
    measured_bytes: Vec<u64>,
    memory_equal: bool,
}

pub(super) fn run(args: &BenchPredict) -> Result<u8> {
    let table = this_machine::load(&args.machine)?;
    // The model itself has to be right; a layout that it does not allow is left out.
    reference(&args.set, false)?;
    let layouts: Vec<_> = LAYOUTS
        .into_iter()
        .filter(|(ranks, _, keys)| *ranks <= args.nproc_max && reference(&sets(args, keys), false).is_ok())
        .collect();
    let prices: Vec<(usize, StepPrice)> = layouts
        .iter()
        .map(|&(ranks, threads, keys)| {
            let threads = if threads > 0 { threads } else { (table.cores / ranks).max(1) };
            let run = reference(&sets(args, keys), false)?;
            let price = this_machine::with_job(&run, threads, "shm", |job| price(&table, job, &run.layout))?;
            Ok((threads, price))
        })
        .collect::<Result<_>>()?;
    let mut steps: Vec<Vec<f64>> = vec![Vec::new(); layouts.len()];
    let mut bytes: Vec<Vec<u64>> = vec![Vec::new(); layouts.len()];
    for round in 0..args.rounds.max(1) {
        for (i, (ranks, threads, keys)) in layouts.iter().enumerate() {
            let found = measure(args, *ranks, *threads, keys)?;
            let list = |key: &str| found[key].as_array().cloned().unwrap_or_default();
            steps[i].extend(list("steps_s").iter().filter_map(Value::as_f64));
            bytes[i] = list("rank_bytes").iter().filter_map(Value::as_u64).collect();
            output::say(&format!(
                "round {}: {ranks} ranks, {keys}: {:.1} ms predicted, {:.1} ms measured so far",
                round + 1,
                1e3 * prices[i].1.step_s,
                1e3 * quantile(&mut steps[i].clone(), 0.5)
            ));
        }
    }
    let rows: Vec<Row> = layouts
        .iter()
        .zip(prices)
        .zip(steps.into_iter().zip(bytes))
        .map(|((&(ranks, _, keys), (threads, price)), (steps, bytes))| {
            row(ranks, threads, keys, &price, steps, bytes)
        })
        .collect();
    print(&rows, args.json);
    Ok(0)
}

fn sets(args: &BenchPredict, keys: &str) -> Vec<String> {
    let layout = keys.split_whitespace().map(|k| format!("layout.{k}"));
    args.set.iter().cloned().chain(layout).collect()
}

/// Runs the layout's ranks and gives what the first of them prints.
fn measure(args: &BenchPredict, ranks: usize, threads: usize, keys: &str) -> Result<Value> {
    let program = std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
    let mut command = Command::new(program);
    command.args(["bench", "step", "--json", "--nproc", &ranks.to_string()]);
    command.args(["--threads", &threads.to_string(), "--steps", &args.steps.to_string()]);
    for set in sets(args, keys) {
        command.args(["--set", &set]);
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| Error::failure(format!("start {ranks} ranks: {e}")))?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| Error::failure(format!("{ranks} ranks under {keys} could not be measured")))
}

fn row(
    ranks: usize,
    threads: usize,
    keys: &str,
    price: &StepPrice,
    mut steps: Vec<f64>,
    bytes: Vec<u64>,
) -> Row {
    let (best_s, measured_s) = (quantile(&mut steps, 0.0), quantile(&mut steps, 0.5));
    let predicted: Vec<usize> = price.ranks.iter().map(|r| r.memory_bytes).collect();
    Row {
        ranks,
        threads,
        layout: keys.to_owned(),
        predicted_s: price.step_s,
        predicted_low_s: price.low_s,
        predicted_high_s: price.high_s,
        measured_s,
        best_s,
        error: price.step_s / measured_s - 1.0,
        error_of_best: price.step_s / best_s - 1.0,
        inside_interval: (price.low_s..=price.high_s).contains(&measured_s),
        memory_equal: predicted.iter().map(|b| *b as u64).eq(bytes.iter().copied()),
        predicted_bytes: predicted,
        measured_bytes: bytes,
    }
}

fn print(rows: &[Row], as_json: bool) {
    let mut errors: Vec<f64> = rows.iter().map(|r| r.error.abs()).collect();
    let (median, worst) = (quantile(&mut errors, 0.5), quantile(&mut errors, 1.0));
    let memory_equal = rows.iter().all(|r| r.memory_equal);
    if as_json {
        let out = serde_json::json!({
            "rows": rows, "median_abs_error": median, "worst_abs_error": worst, "memory_equal": memory_equal,
            "load_average": load_average(),
        });
        output::print(&serde_json::to_string_pretty(&out).expect("numbers are JSON"));
        return;
    }
    let mut out = String::new();
    let mut write = || -> std::fmt::Result {
        writeln!(
            out,
            "{:>5} {:>7}  {:<42} {:>9} {:>19} {:>9} {:>9} {:>7} {:>7}  memory",
            "ranks", "threads", "layout", "predicted", "interval", "median", "best", "error", "of best"
        )?;
        for r in rows {
            writeln!(
                out,
                "{:>5} {:>7}  {:<42} {:>7.1}ms {:>8.1} to {:>5.1}ms {:>7.1}ms {:>7.1}ms {:>+6.1}% {:>+6.1}%  {}",
                r.ranks,
                r.threads,
                r.layout,
                1e3 * r.predicted_s,
                1e3 * r.predicted_low_s,
                1e3 * r.predicted_high_s,
                1e3 * r.measured_s,
                1e3 * r.best_s,
                100.0 * r.error,
                100.0 * r.error_of_best,
                if r.memory_equal { "equal" } else { "DIFFERS" },
            )?;
        }
        writeln!(out, "error: median {:.1} %, worst {:.1} %", 100.0 * median, 100.0 * worst)
    };
    write().expect("writing to a string");
    output::print(&out);
}
