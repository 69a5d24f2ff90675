//! `phalanx compare`: what a traced run took against what the planner predicts, op by op.

use std::fmt::Write as _;

use measure::compare::{Report, compare};
use sim::trace::Blame;
use spec::Result;
use train::RunDir;

use crate::args::Compare;
use crate::{output, this_machine};

pub(crate) fn run(args: &Compare) -> Result<u8> {
    let run = RunDir::new(&args.run_dir).load()?;
    let report = compare(&args.run_dir, &run, &this_machine::load(&args.machine)?)?;
    // One rank waits for nobody; and a run that cannot be replayed as a whole is compared op by op all the same.
    let blame = match report.ranks {
        1 => None,
        _ => measure::trace::of_run(&args.run_dir, &run).ok(),
    };
    if args.json {
        let mut json = serde_json::to_value(&report).expect("numbers are JSON");
        json["stragglers"] = serde_json::to_value(&blame).expect("numbers are JSON");
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
    } else {
        let stragglers = blame.as_ref().map(stragglers).unwrap_or_default();
        output::print(&(text(&report) + &stragglers));
    }
    Ok(0)
}

/// By whom ranks were kept waiting.
fn stragglers(blame: &Blame) -> String {
    let percent = |slowdown: f64| 100.0 * (slowdown - 1.0);
    let worst = |name: &str, first: Option<(usize, f64)>| {
        first.map(|(i, s)| format!(", {name} {i} alone {:+.1} %", percent(s))).unwrap_or_default()
    };
    format!(
        "\nstragglers     steps {:+.1} % against all ops as usual{}{}\n",
        percent(blame.slowdown),
        worst("replica", blame.by_worker.first().map(|w| (w.dp_rank, w.slowdown))),
        worst("stage", blame.by_stage.first().map(|s| (s.stage, s.slowdown)))
    )
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
