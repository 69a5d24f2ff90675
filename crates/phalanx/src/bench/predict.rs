//! `phalanx bench predict`: predicted against measured steps of the reference model under many layouts.

use std::fmt::Write as _;
use std::process::{Command, Stdio};

use measure::load_average;
use measure::predict::{CASES, Case, Prediction, Steps, order, predict};
use spec::stats::quantile;
use spec::{Error, Result, RunSpec};

use super::machine::could_not;
use super::step::reference;
use crate::args::BenchPredict;
use crate::{output, this_machine};

pub(super) fn run(args: &BenchPredict) -> Result<u8> {
    let table = this_machine::load(&args.machine)?;
    // The model itself has to be right; a layout that it does not allow is left out.
    reference(&args.set, false)?;
    let cases: Vec<(Case, RunSpec)> = CASES
        .into_iter()
        .filter(|case| case.ranks <= args.nproc_max)
        .filter_map(|case| Some((case, reference(&sets(args, case.keys), false).ok()?)))
        .collect();
    let rows = predict(
        &table,
        &cases,
        args.rounds.max(1),
        &|case| measure(args, case),
        &|round, case, predicted_s, measured_s| {
            output::say(&format!(
                "round {}: {} ranks, {}: {:.1} ms predicted, {:.1} ms measured so far",
                round + 1,
                case.ranks,
                case.keys,
                1e3 * predicted_s,
                1e3 * measured_s
            ));
        },
    )?;
    print(&rows, args.json);
    Ok(0)
}

fn sets(args: &BenchPredict, keys: &str) -> Vec<String> {
    let layout = keys.split_whitespace().map(|k| format!("layout.{k}"));
    args.set.iter().cloned().chain(layout).collect()
}

/// Runs the layout's ranks and gives what the first of them prints.
fn measure(args: &BenchPredict, case: &Case) -> Result<Steps> {
    let Case { ranks, threads, keys } = *case;
    let program = std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
    let mut command = Command::new(program);
    command.args(["bench", "step", "--json", "--nproc", &ranks.to_string()]);
    command.args(["--threads", &threads.to_string(), "--steps", &args.steps.to_string()]);
    for set in sets(args, keys) {
        command.args(["--set", &set]);
    }
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::failure(format!("start {ranks} ranks: {e}")))?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| could_not(&format!("{ranks} ranks under {keys}"), &output.stderr))
}

fn print(rows: &[Prediction], as_json: bool) {
    let mut errors: Vec<f64> = rows.iter().map(|r| r.error.abs()).collect();
    let (median, worst) = (quantile(&mut errors, 0.5), quantile(&mut errors, 1.0));
    let order = order(rows);
    let memory_equal = rows.iter().all(|r| r.memory_equal);
    if as_json {
        let out = serde_json::json!({
            "rows": rows, "median_abs_error": median, "worst_abs_error": worst, "memory_equal": memory_equal,
            "kendall_tau": order.map(|o| o.kendall_tau),
            "order": order,
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
        writeln!(out, "error: median {:.1} %, worst {:.1} %", 100.0 * median, 100.0 * worst)?;
        let Some(o) = order else { return Ok(()) };
        write!(out, "order: Kendall tau {:.2}", o.kendall_tau)?;
        if let Some(tau) = o.kendall_tau_told_apart {
            write!(out, "; {tau:.2} of the {} pairs of {} that the steps tell apart", o.told_apart, o.pairs)?;
        }
        writeln!(out)
    };
    write().expect("writing to a string");
    output::print(&out);
}
