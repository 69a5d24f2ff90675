//! Runs and bills as text.

use std::fmt::Write as _;

use economics::Spread;
use economics::money::Bill;
use economics::objective::{Chosen, Objective};
use economics::run::{Basis, Run};

use crate::planner::text::{bars, bytes, seconds};

/// Longer than runs are let go on.
const LONG_DAYS: f64 = 180.0;
/// Sizes shown of those tried.
const SIZE_ROWS: usize = 8;

/// Days and dollars, which come before everything else.
pub(crate) fn first(chosen: &Chosen) -> String {
    let run = &chosen.run;
    let q = &chosen.answer.question;
    let mut out = format!(
        "{:.1} days ({}) for {:.4}T tokens on {} x {}",
        run.wall_days,
        range(run.wall_days_range, 1),
        run.tokens / 1e12,
        run.accelerators,
        q.cluster.accelerator.name
    );
    match (&run.cost_usd, &run.basis) {
        (Some(cost), Some(Basis::Rent(q))) => {
            let who = q.provider.as_deref().unwrap_or("your price");
            out += &format!(", {cost}: rented {}, {who} {}", q.commitment.name(), q.date);
        }
        (Some(cost), Some(Basis::Own(_))) => {
            out += &format!(", {cost}: the run's share of machines of one's own");
        }
        _ => out += "; what it costs nobody quotes",
    }
    out + "\n\n"
}

pub(crate) fn run(chosen: &Chosen) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = head(&mut out, &chosen.run);
    let _ = time(&mut out, &chosen.run);
    let _ = money(&mut out, &chosen.run);
    let _ = storage(&mut out, &chosen.run);
    if chosen.objective != Objective::Time {
        let _ = sizes(&mut out, chosen);
    }
    let _ = writeln!(out, "\nassumed of the run");
    for assumption in &chosen.run.assumptions {
        let _ = writeln!(out, "  {assumption}");
    }
    out
}

fn range(s: Spread, digits: usize) -> String {
    // Where failures come about as fast as recoveries end, a little more of them is no end at all.
    if s.high > ENDLESS * s.value {
        return format!("{:.digits$} to no end", s.low);
    }
    format!("{:.digits$} to {:.digits$}", s.low, s.high)
}

/// This many times the value says no more than "very long".
const ENDLESS: f64 = 100.0;

fn head(out: &mut String, run: &Run) -> std::fmt::Result {
    writeln!(
        out,
        "\nthe run: {:.4}T tokens in {:.1} days ({}), of which {:.1} % train ({})",
        run.tokens / 1e12,
        run.wall_days,
        range(run.wall_days_range, 1),
        100.0 * run.goodput,
        range(run.goodput_range.scaled(100.0), 1)
    )?;
    if let (Some(cost), Some(basis)) = (&run.cost_usd, &run.basis) {
        let per = match basis {
            Basis::Rent(q) => format!("rent of ${:.2} an accelerator-hour", q.usd_per_accelerator_h.value),
            Basis::Own(o) => format!("owned, ${:.2} an accelerator-hour", o.usd_per_accelerator_h.value),
        };
        writeln!(out, "it costs {cost}: {:.0} accelerator-hours, {per}", run.accelerator_hours)?;
        let held = run.held;
        if held.rest_of_nodes + held.spare > 0 {
            writeln!(
                out,
                "  billed beside the job's: {} accelerators of whole nodes, {} that stand by",
                held.rest_of_nodes, held.spare
            )?;
        }
    }
    for (i, why) in run.range_of.iter().enumerate() {
        writeln!(out, "  {}{why}", if i == 0 { "the range: " } else { "           " })?;
    }
    Ok(())
}

fn time(out: &mut String, run: &Run) -> std::fmt::Result {
    let f = &run.failures;
    writeln!(
        out,
        "  {:.0} interruptions ({}), one every {:.1} h, and {:.0} planned; {} spare nodes of eight stand by",
        run.interruptions,
        range(run.interruptions_range, 0),
        f.between_h.value,
        run.planned_interruptions,
        f.spares.nodes
    )?;
    let i = &run.recovery.intervals;
    writeln!(
        out,
        "  a checkpoint every {} ({}): Young {}, Daly {}, least time {}",
        seconds(run.recovery.interval_s),
        run.recovery.save.name(),
        seconds(i.young_s),
        seconds(i.daly_s),
        seconds(i.best_s)
    )?;
    writeln!(out, "\nwhere the days go, with {}", run.recovery.recovery.name())?;
    let terms: Vec<(&str, f64)> =
        run.recovery.terms.iter().map(|t| (t.name, t.share * run.wall_days)).collect();
    bars(out, &terms, run.wall_days, |days| format!("{days:.2} d"))?;
    writeln!(out, "\nrecovery after a failure")?;
    for g in &run.recoveries {
        writeln!(
            out,
            "  {:<12} {:>5.1} % useful ({})",
            g.recovery.name(),
            100.0 * g.goodput.value,
            range(g.goodput.scaled(100.0), 1)
        )?;
    }
    Ok(())
}

pub(crate) fn bill(out: &mut String, bill: &Bill) -> std::fmt::Result {
    for part in &bill.parts {
        writeln!(out, "  {:<18} {:>16}", part.name, part.cost.value.to_string())?;
    }
    writeln!(out, "  {:<18} {:>16}", "in all", bill.total.value.to_string())
}

fn money(out: &mut String, run: &Run) -> std::fmt::Result {
    if let Some(cost) = &run.cost {
        writeln!(out, "\nwhere the dollars go")?;
        bill(out, cost)?;
    }
    if let Some(e) = &run.energy {
        writeln!(
            out,
            "\nenergy: {:.0} MWh ({}) at PUE {}, grid {}: {:.0} t CO2e ({})",
            e.mwh.value,
            range(e.mwh, 0),
            e.pue.value,
            e.grid,
            e.co2_t.value,
            range(e.co2_t, 0)
        )?;
        if let Some(w) = e.water_m3 {
            writeln!(out, "  {:.0} m3 of water ({}), {}", w.value, range(w, 0), e.water_of)?;
        }
    }
    Ok(())
}

fn storage(out: &mut String, run: &Run) -> std::fmt::Result {
    let Some(s) = &run.storage else { return Ok(()) };
    let verdict = if s.enough { "enough" } else { "not enough" };
    writeln!(out, "\nstorage of the platform: {verdict}")?;
    for reason in &s.reasons {
        writeln!(out, "  {reason}")?;
    }
    for t in &s.checkpoint {
        writeln!(
            out,
            "  checkpoint {:<10} stops training for {}, safe {} later",
            t.save.name(),
            seconds(t.stall_s.value),
            seconds(t.behind_s.value)
        )?;
    }
    let z = &s.sizing;
    writeln!(
        out,
        "  of one's own: {} servers with {} drives, bound by {}; {} held; {}",
        z.servers,
        z.drives,
        z.bound,
        bytes(s.needs.capacity),
        z.cost.total
    )
}

fn sizes(out: &mut String, chosen: &Chosen) -> std::fmt::Result {
    writeln!(out, "\nfor {}: how many accelerators", chosen.objective.name())?;
    if chosen.run.wall_days > LONG_DAYS && !chosen.within {
        writeln!(out, "  the best takes {:.0} days: --within DAYS keeps a deadline", chosen.run.wall_days)?;
    }
    for s in chosen.sizes.iter().take(SIZE_ROWS) {
        let cost = s.cost_usd.map(|c| c.value.to_string()).unwrap_or_default();
        writeln!(
            out,
            "  {:>7}  {:>8.1} days  {:>5.1} % useful  {cost:>15}  {:>9.0} tokens/$",
            s.accelerators,
            s.wall_days,
            100.0 * s.goodput.value,
            s.tokens_per_usd.unwrap_or(0.0)
        )?;
    }
    Ok(())
}
