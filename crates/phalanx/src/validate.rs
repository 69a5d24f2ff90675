//! `phalanx validate`.

mod rehearsed;
mod serving;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use published::memory::{Calls, Memory};
use published::validate::{Unseen, Validation, calibrate, cross_validate, halves, nothing, validate};
use spec::{Catalog, Result};

use crate::args::{By, Validate};
use crate::{files, output};

/// Reasons printed for rows that were not estimated; `--json` has each row's.
const REASONS_SHOWN: usize = 8;

pub(crate) fn run(args: &Validate) -> Result<u8> {
    let catalog = Catalog::builtin()?;
    let name = args.file.display().to_string();
    let table = files::read(&args.file)?;
    let unread = published::columns::unread(&name, &table)?;
    unread.iter().for_each(|column| output::say(&format!("note: {name}: {column}")));
    if published::inference::is_table(&table) {
        return serving::run(args, &name, &table, &catalog, &unread);
    }
    if args.by == By::Simulate {
        return rehearsed::run(args, &name, &table, &catalog);
    }
    if let Some(path) = &args.fit {
        let fitted = calibrate(&name, &table, &catalog)?;
        files::write("--fit", path, &fitted.to_toml())?;
        output::say(&format!("wrote {}; --calibration takes it", path.display()));
        return Ok(0);
    }
    let v = if args.held_out {
        cross_validate(&name, &table, &catalog)?
    } else if args.half {
        halves(&name, &table, &catalog)?
    } else {
        validate(&name, &table, &catalog, &files::calibration(args.calibration.as_deref())?)?
    };
    if v.priced == 0 && v.memory.is_none() {
        return Err(nothing(&name, "priced", &v.not_priced));
    }
    output::print(&if args.json {
        let mut json = serde_json::to_value(&v).expect("numbers are JSON");
        json["columns_not_read"] = serde_json::json!(unread);
        serde_json::to_string_pretty(&json).expect("numbers are JSON")
    } else {
        let mut out = String::new();
        text(&mut out, &v).expect("writing to a string");
        out
    });
    Ok(0)
}

fn percent(x: f64) -> String {
    format!("{:.1} %", 100.0 * x)
}

fn text(out: &mut String, v: &Validation) -> std::fmt::Result {
    if let Some(m) = &v.memory {
        memory(out, m)?;
        if v.priced + v.not_priced.len() == 0 {
            return Ok(());
        }
    }
    writeln!(
        out,
        "{} rows priced{}: median error {}, 90th percentile {}, {} inside the interval",
        v.priced,
        match v.unseen {
            Unseen::Nothing => "",
            Unseen::Groups => ", each source left out of its own fit",
            Unseen::Half => ", half of the rows of each source, constants fitted on the other half",
        },
        percent(v.median_abs_error),
        percent(v.p90_abs_error),
        percent(v.inside_interval)
    )?;
    for s in &v.sources {
        let source: String = s.source.chars().take(60).collect();
        writeln!(
            out,
            "  {source:<60} {:>4} rows  signed {:>8}  median {:>7}  p90 {:>7}  inside {:>4.0} %",
            s.rows,
            percent(s.mean_error),
            percent(s.median_abs_error),
            percent(s.p90_abs_error),
            100.0 * s.inside_interval
        )?;
    }
    if !v.sweeps.is_empty() {
        writeln!(out, "layouts of one job, in the order predicted")?;
    }
    for s in &v.sweeps {
        let name: String = s.name.chars().take(60).collect();
        writeln!(
            out,
            "  {name:<60} {:>4} layouts  tau {:>5.2}  best predicted is {} slower than the best",
            s.layouts,
            s.kendall_tau,
            percent(s.regret)
        )?;
    }
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for row in &v.not_priced {
        *reasons.entry(&row.reason).or_default() += 1;
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|r| std::cmp::Reverse(r.1));
    writeln!(out, "{} rows not priced", v.not_priced.len())?;
    for (reason, rows) in reasons.iter().take(REASONS_SHOWN) {
        writeln!(out, "  {rows:>4}  {reason}")?;
    }
    let more = reasons.len().saturating_sub(REASONS_SHOWN);
    if more > 0 { writeln!(out, "        and {more} more reasons in --json") } else { Ok(()) }
}

fn memory(out: &mut String, m: &Memory) -> std::fmt::Result {
    let mut line = |of: &str, c: &Calls| {
        writeln!(
            out,
            "{:>5} {of}: {} of calls right, {} of runs out of memory missed, {} false alarms, median predicted / reserved {:.3}",
            c.rows,
            percent(c.right),
            percent(c.missed),
            percent(c.false_alarms),
            c.median_ratio
        )
    };
    line("rows of memory", &m.all)?;
    line("fitted", &m.fitted)?;
    line("kept back", &m.kept_back)?;
    match m.not_called.first() {
        None => Ok(()),
        Some(first) => writeln!(out, "{} rows without a call: {}", m.not_called.len(), first.reason),
    }
}
