//! Answers as text: the best layouts, where time and memory go, storage, what was assumed.

use std::fmt::Write as _;

use plan::answer::{Answer, Choice, Sensitivity};
use plan::storage::{Seconds, StorageEstimate};
use spec::cluster::StorageLimit;

/// Characters of a full bar.
const BAR: f64 = 40.0;
/// Parts named of what a layout loses to the best.
const LOSSES: usize = 2;
/// Rows of the front between time and memory.
const FRONT_ROWS: usize = 10;

pub(super) fn answer(
    answer: &Answer,
    search_s: f64,
    threads: usize,
    explained: Option<&[Sensitivity]>,
) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = head(&mut out, answer, search_s, threads);
    let _ = best(&mut out, answer);
    let _ = front(&mut out, answer);
    if let Some(storage) = &answer.storage {
        let _ = storage_lines(&mut out, storage);
    }
    if let Some(explained) = explained {
        let _ = helps(&mut out, answer, explained);
    }
    let _ = writeln!(out, "\nassumed");
    for assumption in &answer.assumptions {
        let _ = writeln!(out, "  {assumption}");
    }
    out
}

fn head(out: &mut String, answer: &Answer, search_s: f64, threads: usize) -> std::fmt::Result {
    let q = &answer.question;
    writeln!(
        out,
        "{}: {:.1}B parameters on {} x {} of {}, {}, {} sequences of {} tokens",
        q.shape.model.name,
        q.shape.params() / 1e9,
        q.cluster.accelerators,
        q.cluster.accelerator.name,
        q.cluster.name,
        q.format,
        q.sequences,
        q.sequence
    )?;
    if answer.given {
        return writeln!(out, "the layout given was priced");
    }
    writeln!(
        out,
        "{} layouts priced, {} pruned, in {} on {threads} thread{}",
        answer.searched.layouts_estimated,
        answer.searched.layouts_pruned,
        seconds(search_s),
        if threads == 1 { "" } else { "s" }
    )
}

fn best(out: &mut String, answer: &Answer) -> std::fmt::Result {
    writeln!(out)?;
    for (i, c) in answer.best.iter().enumerate() {
        row(out, i + 1, c)?;
    }
    let Some(best) = answer.best.first() else { return Ok(()) };
    if !best.fits {
        let room = answer.question.cluster.accelerator.memory_bytes.value;
        writeln!(
            out,
            "\ndoes not fit: the fullest rank takes {} of {}; try more pp or tp, zero=3, or recompute=full",
            bytes(best.memory_bytes),
            bytes(room)
        )?;
    }
    writeln!(out, "\nwhere the time goes")?;
    let mut parts: Vec<_> = best.parts().into_iter().filter(|(_, s)| *s > 0.0).collect();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    bars(out, &parts, best.step_s, seconds)?;
    writeln!(out, "\nwhere the memory goes, on the fullest rank")?;
    let mut parts = best.memory.parts().to_vec();
    let free = answer.question.cluster.accelerator.memory_bytes.value - best.memory_bytes;
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    parts.push(("free", free.max(0.0)));
    bars(out, &parts, best.memory_bytes + free.max(0.0), bytes)?;
    match super::margin::said(answer) {
        Some(tight) => writeln!(out, "  note: {tight}"),
        None => Ok(()),
    }
}

fn row(out: &mut String, n: usize, c: &Choice) -> std::fmt::Result {
    let days = c.train_days.map(|d| format!("  {d:.1} days")).unwrap_or_default();
    writeln!(
        out,
        "{n}. {} ({} to {})  mfu {:.1} %  {}  bound by {}{days}\n   {}",
        seconds(c.step_s),
        seconds(c.step_low_s),
        seconds(c.step_high_s),
        100.0 * c.mfu,
        bytes(c.memory_bytes),
        c.bound,
        c.placement()
    )?;
    if !c.loses_s.is_empty() {
        // A part may gain what others lose; the whole never gains.
        let signed = |s: f64| format!("{}{}", if s < 0.0 { "-" } else { "+" }, seconds(s.abs()));
        let whole: f64 = c.loses_s.iter().map(|l| l.1).sum();
        let parts: Vec<String> =
            c.loses_s.iter().take(LOSSES).map(|(part, s)| format!("{part} {}", signed(*s))).collect();
        writeln!(out, "   against the best {}: {}", signed(whole), parts.join(", "))?;
    }
    Ok(())
}

/// Names, values, shares of the whole and bars of their length.
pub(crate) fn bars(
    out: &mut String,
    parts: &[(&str, f64)],
    whole: f64,
    shown: impl Fn(f64) -> String,
) -> std::fmt::Result {
    for (name, value) in parts {
        let share = value / whole;
        let bar = "#".repeat((BAR * share).round() as usize);
        let line = format!("  {name:<17} {:>10}  {:>5.1} %  {bar}", shown(*value), 100.0 * share);
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// The front, thinned to a few rows that are spread over its memory.
fn front(out: &mut String, answer: &Answer) -> std::fmt::Result {
    let all = &answer.pareto;
    if all.len() < 2 {
        return Ok(());
    }
    writeln!(out, "\ntime against memory: nothing is both faster and smaller than one of these")?;
    let rows = all.len().min(FRONT_ROWS);
    let most = all[0].memory_bytes;
    for i in 0..rows {
        let c = &all[i * (all.len() - 1) / (rows - 1)];
        let bar = "#".repeat((BAR / 2.0 * c.memory_bytes / most).round() as usize);
        writeln!(
            out,
            "  {:>10}  {:>8}  {bar:<20}  {}",
            seconds(c.step_s),
            bytes(c.memory_bytes),
            c.placement()
        )?;
    }
    Ok(())
}

fn storage_lines(out: &mut String, s: &StorageEstimate) -> std::fmt::Result {
    let limit = |limit: StorageLimit| match limit {
        StorageLimit::Filesystem => "the filesystem",
        StorageLimit::Unit => "its scalable units' servers",
        StorageLimit::Node => "what each node gets",
    };
    let range = |t: &Seconds| {
        if t.low < t.high {
            format!("{} ({} to {})", seconds(t.value), seconds(t.low), seconds(t.high))
        } else {
            seconds(t.value)
        }
    };
    writeln!(out, "\nstorage {}", s.storage)?;
    writeln!(
        out,
        "  data loading  {} of tokens a step in {}, read ahead; limited by {}",
        bytes(s.load_bytes),
        range(&s.load),
        limit(s.load_limit)
    )?;
    writeln!(
        out,
        "  checkpoint    {}: {} to write while training waits; limited by {}",
        bytes(s.checkpoint_bytes),
        range(&s.write),
        limit(s.write_limit)
    )?;
    if let Some(stall) = &s.stall {
        writeln!(out, "                {} of standstill when written in the background", range(stall))?;
    }
    writeln!(out, "                {} to read back", range(&s.read))
}

fn helps(out: &mut String, answer: &Answer, explained: &[Sensitivity]) -> std::fmt::Result {
    let Some(best) = answer.best.first() else { return Ok(()) };
    writeln!(out, "\nwhat would help              one percent more    a quarter more")?;
    for s in explained {
        let name = serde_json::to_value(s.of).ok();
        let name = name.as_ref().and_then(|v| v.as_str()).unwrap_or_default().replace('_', " ");
        let quarter = 100.0 * (s.step_s_with_quarter_more / best.step_s - 1.0);
        writeln!(
            out,
            "  {name:<24} {:>15.2} %  {:>10} {:>+6.1} %",
            s.elasticity,
            seconds(s.step_s_with_quarter_more),
            quarter
        )?;
    }
    Ok(())
}

/// A time in the unit that reads best.
pub(crate) fn seconds(s: f64) -> String {
    match s {
        s if s >= 1e5 => format!("{:.1} days", s / 86_400.0),
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s if s > 0.0 => format!("{:.1} us", s * 1e6),
        _ => "0 s".to_owned(),
    }
}

/// Bytes in decimal units, as accelerators are sold.
pub(crate) fn bytes(b: f64) -> String {
    match b {
        b if b >= 1e12 => format!("{:.2} TB", b / 1e12),
        b if b >= 1e9 => format!("{:.1} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_take_the_unit_that_reads_best() {
        for (s, shown) in
            [(5.5791, "5.579 s"), (0.0123, "12.3 ms"), (8e-6, "8.0 us"), (1234.0, "1234 s"), (0.0, "0 s")]
        {
            assert_eq!(seconds(s), shown);
        }
        for (b, shown) in [(80e9, "80.0 GB"), (2.3e12, "2.30 TB"), (4096.0, "4.1 kB")] {
            assert_eq!(bytes(b), shown);
        }
    }
}
