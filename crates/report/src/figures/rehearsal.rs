//! Figures of rehearsals and traces.

use serde_json::Value;

use super::{Figure, bars, fill};
use crate::svg::{Anchor, Scale, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{digits, percent, seconds};

/// Something that takes time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Timed {
    pub(crate) name: String,
    pub(crate) seconds: f64,
}

/// Room for names: the longest says what if.
const NAMES: f64 = 240.0;
/// Rows that a figure draws; the table has all.
const ROWS: usize = 24;

/// Seconds by name, the largest first, as shares of a step.
pub(crate) fn seconds_by(
    id: &'static str,
    title: &str,
    head: &'static str,
    all: &[Timed],
    step_s: f64,
) -> Figure {
    let mut all: Vec<&Timed> = all.iter().filter(|t| t.seconds != 0.0).collect();
    all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let mut table = Table::new(&[head, "time", "share of the step"]);
    let mut rows = Vec::new();
    for t in &all {
        let share = t.seconds / step_s.max(f64::MIN_POSITIVE);
        rows.push((
            t.name.clone(),
            t.seconds.max(0.0),
            format!("{} ({})", seconds(t.seconds), percent(share)),
        ));
        table.row(vec![
            Cell::words(t.name.clone()),
            Cell::number(t.seconds, seconds),
            Cell::number(share, percent),
        ]);
    }
    let says = all.first().map_or_else(
        || "There is nothing of it.".to_owned(),
        |t| format!("Most: {}, {}.", t.name, seconds(t.seconds)),
    );
    rows.truncate(ROWS);
    let drawing = bars::bars_beside(&rows, 0, NAMES).finish(id, title, &says);
    Figure { id, title: title.to_owned(), says, drawing, table }
}

/// Slowdowns by name, the largest first.
pub(crate) fn slowdowns(id: &'static str, title: &str, all: &[(String, f64)]) -> Figure {
    let mut table = Table::new(&["as it was", "slowdown"]);
    let mut rows = Vec::new();
    for (name, slowdown) in all {
        let slower = slowdown - 1.0;
        rows.push((name.clone(), slower.max(0.0), percent(slower)));
        table.row(vec![Cell::words(name.clone()), Cell::number(*slowdown, |s| digits(s, 4))]);
    }
    let says = all
        .first()
        .map_or_else(String::new, |(name, s)| format!("{name} alone: {} slower.", percent(s - 1.0)));
    rows.truncate(ROWS);
    let drawing = bars::bars_beside(&rows, 4, NAMES).finish(id, title, &says);
    Figure { id, title: title.to_owned(), says, drawing, table }
}

/// Where the days went.
pub(crate) fn lives(lives: &Value) -> Figure {
    const SHARES: [(&str, &str); 6] = [
        ("kept steps", "goodput"),
        ("lost work", "lost"),
        ("recoveries", "restarts"),
        ("checkpoints", "checkpoints"),
        ("missing nodes", "fewer"),
        ("waiting for repairs", "repairs"),
    ];
    let mut table = Table::new(&["share of wall time", "mean", "of nine in ten: from", "to"]);
    let mut rows = Vec::new();
    for (name, key) in SHARES {
        let of = |end: &str| lives[key][end].as_f64().unwrap_or(0.0);
        rows.push((name.to_owned(), of("mean"), percent(of("mean"))));
        table.row(vec![
            Cell::words(name),
            Cell::number(of("mean"), percent),
            Cell::number(of("low"), percent),
            Cell::number(of("high"), percent),
        ]);
    }
    let interruptions = |end: &str| lives["interruptions"][end].as_f64().unwrap_or(0.0);
    let says = format!(
        "{} interruptions on average, {} to {} in nine of ten lives.",
        digits(interruptions("mean"), 3),
        interruptions("low"),
        interruptions("high")
    );
    let drawing = bars::bars(&rows, 2).finish("lives", "Where the days went", &says);
    Figure { id: "lives", title: "Where the days went".to_owned(), says, drawing, table }
}

/// Width of the names beside the rows.
const LABEL: f64 = 90.0;
/// Height of one rank's two rows.
const ROW: f64 = 26.0;
/// Bars closer than this are drawn as one, in the drawing's units.
const APART: f64 = 0.2;
/// Ranks that a drawing tells apart.
const RANKS_MAX: usize = 64;
/// What bars are drawn as: their names begin with the first.
const KINDS: [(&str, usize); 4] =
    [("matrix products", 0), ("attention", 1), ("memory-bound", 2), ("optimizer", 5)];

/// What ranks did over a step: kernels above, messages below. `None` where there is nothing or too much to draw.
pub(crate) fn rank_timelines(ranks: &[(usize, Vec<sim::Bar>)], step_s: f64) -> Option<Figure> {
    let ranks = &ranks[..ranks.len().min(RANKS_MAX)];
    if ranks.is_empty() {
        return None;
    }
    let bottom = ROW * ranks.len() as f64;
    let mut svg = Svg::new(bottom + 58.0);
    let x = Scale::linear(0.0, step_s, LABEL, WIDTH - 8.0);
    let mut table = Table::new(&["rank", "computes", "waits", "in messages"]);
    for (i, (rank, bars)) in ranks.iter().enumerate() {
        let y = ROW * i as f64;
        svg.text(LABEL - 8.0, y + 15.0, Anchor::End, "label", &format!("rank {rank}"));
        svg.rect([LABEL, y + 2.0, WIDTH - 8.0 - LABEL, ROW - 4.0], "free", Some(i), "");
        let mut drawn: Vec<Vec<(f64, f64)>> = vec![Vec::new(); KINDS.len() + 1];
        let [mut computes, mut waits, mut messages] = [0.0; 3];
        for bar in bars {
            let kind = KINDS.iter().position(|k| bar.what.starts_with(k.0));
            let row = match (bar.is_message, kind) {
                (true, _) => KINDS.len(),
                (false, Some(kind)) => kind,
                (false, None) => {
                    waits += bar.to_s - bar.from_s;
                    continue;
                }
            };
            *if bar.is_message { &mut messages } else { &mut computes } += bar.to_s - bar.from_s;
            let (from, to) = (x.at(bar.from_s), x.at(bar.to_s));
            match drawn[row].last_mut() {
                Some(last) if from - last.1 < APART => last.1 = last.1.max(to),
                _ => drawn[row].push((from, to)),
            }
        }
        let classes = KINDS.iter().map(|k| (k.1, y + 3.0)).chain([(3, y + 15.0)]);
        for (spans, (class, top)) in drawn.iter().zip(classes).filter(|p| !p.0.is_empty()) {
            let d: String = spans
                .iter()
                .map(|(from, to)| {
                    let width = (to - from).max(APART);
                    format!("M{from:.2} {top:.0}h{width:.2}v8h-{width:.2}z")
                })
                .collect();
            svg.path(&d, &fill(class));
        }
        table.row(vec![
            Cell::words(format!("{rank}")),
            Cell::number(computes, seconds),
            Cell::number(waits, seconds),
            Cell::number(messages, seconds),
        ]);
    }
    svg.ticks(&x, bottom, &seconds);
    let mut at = LABEL;
    for (name, class) in KINDS.iter().copied().chain([("messages", 3)]) {
        svg.rect([at, bottom + 36.0, 12.0, 12.0], &fill(class), None, "");
        svg.text(at + 17.0, bottom + 46.0, Anchor::Start, "label", name);
        at += 40.0 + 7.0 * name.len() as f64;
    }
    let says = "Kernels above, messages below; what is empty waits.".to_owned();
    let drawing = svg.finish("ranks", "What ranks did over the step", &says);
    Some(Figure { id: "ranks", title: "The step, rank by rank".to_owned(), says, drawing, table })
}
