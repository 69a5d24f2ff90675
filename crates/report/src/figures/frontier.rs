//! Choices against each other: how many accelerators, and which layout on them.

use plan::answer::{Answer, Choice};

use super::Figure;
use crate::plan_page::Scale as Size;
use crate::svg::{Anchor, Scale, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{bytes, count, digits, dollars, percent, seconds};

pub(super) const LEFT: f64 = 76.0;
pub(super) const RIGHT: f64 = WIDTH - 24.0;
pub(super) const TOP: f64 = 16.0;
pub(super) const BOTTOM: f64 = 264.0;
pub(super) const HEIGHT: f64 = 312.0;

/// Axes with labelled ticks and grid lines.
pub(super) fn axes(
    svg: &mut Svg,
    (x, x_name, x_shown): (&Scale, &str, &dyn Fn(f64) -> String),
    (y, y_name, y_shown): (&Scale, &str, &dyn Fn(f64) -> String),
) {
    for tick in y.ticks() {
        let at = y.at(tick);
        svg.line((LEFT, at), (RIGHT, at), "grid");
        svg.text(LEFT - 8.0, at + 4.0, Anchor::End, "tick", &y_shown(tick));
    }
    svg.ticks(x, BOTTOM, x_shown);
    svg.line((LEFT, BOTTOM), (RIGHT, BOTTOM), "axis");
    svg.text((LEFT + RIGHT) / 2.0, BOTTOM + 40.0, Anchor::Middle, "label", x_name);
    svg.text(LEFT, TOP - 4.0, Anchor::Start, "label", y_name);
}

/// Ends of values, with room around them.
pub(super) fn ends(values: impl Iterator<Item = f64>, room: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(a, b), x| (a.min(x), b.max(x)));
    (low / room, high * room)
}

/// Time against dollars, or against accelerators where nothing is paid, over sizes of the job.
pub(crate) fn scaling(sizes: &[Size], asked: usize) -> Option<Figure> {
    if sizes.len() < 2 {
        return None;
    }
    let paid = sizes.iter().all(|s| s.usd.is_some());
    let whole = sizes.iter().all(|s| s.wall_days.is_some());
    let x_of = |s: &Size| s.usd.filter(|_| paid).unwrap_or(s.accelerators as f64);
    let y_of = |s: &Size| s.wall_days.filter(|_| whole).unwrap_or(s.step_s);
    // Nothing else is both faster and cheaper (or smaller).
    let on_front = |a: &Size| {
        !sizes
            .iter()
            .any(|b| x_of(b) <= x_of(a) && y_of(b) <= y_of(a) && (x_of(b) < x_of(a) || y_of(b) < y_of(a)))
    };
    let (x_low, x_high) = ends(sizes.iter().map(x_of), 1.15);
    let (y_low, y_high) = ends(sizes.iter().map(y_of), 1.25);
    let x = Scale::log(x_low, x_high, LEFT, RIGHT);
    let y = Scale::log(y_low, y_high, BOTTOM, TOP);
    let mut svg = Svg::new(HEIGHT);
    let y_name = if whole { "time of the whole run" } else { "time of a step" };
    let x_name = if paid { "cost of the run" } else { "accelerators" };
    let days = |d: f64| format!("{} days", digits(d, 3));
    let y_shown: &dyn Fn(f64) -> String = if whole { &days } else { &seconds };
    let x_shown: &dyn Fn(f64) -> String = if paid { &dollars } else { &count };
    axes(&mut svg, (&x, x_name, x_shown), (&y, y_name, y_shown));
    let mut front: Vec<&Size> = sizes.iter().filter(|s| on_front(s)).collect();
    front.sort_by(|a, b| x_of(a).total_cmp(&x_of(b)));
    svg.curve(&front.iter().map(|s| (x.at(x_of(s)), y.at(y_of(s)))).collect::<Vec<_>>(), "front");
    let mut table = Table::new(&["accelerators", "step", "MFU", "whole run", "cost", "on the front"]);
    for (i, s) in sizes.iter().enumerate() {
        let class = if s.accelerators == asked { "dot chosen" } else { "dot" };
        let at = (x.at(x_of(s)), y.at(y_of(s)));
        let says = format!("{} accelerators: {}", count(s.accelerators as f64), y_shown(y_of(s)));
        svg.circle(at.0, at.1, 6.0, class, Some(i), &says);
        svg.text(at.0 + 10.0, at.1 - 6.0, Anchor::Start, "value", &count(s.accelerators as f64));
        table.row(vec![
            Cell::number(s.accelerators as f64, count),
            Cell::number(s.step_s, seconds),
            Cell::number(s.mfu, percent),
            s.wall_days.map_or(Cell::words("-"), |d| Cell::number(d, |d| seconds(d * 86_400.0))),
            s.usd.map_or(Cell::words("-"), |usd| Cell::number(usd, dollars)),
            Cell::words(if on_front(s) { "yes" } else { "no" }),
        ]);
    }
    let (few, many) = (&sizes[0], &sizes[sizes.len() - 1]);
    let says = format!(
        "From {} to {} accelerators the same batch takes {} times less time on {} times as many{}.",
        count(few.accelerators as f64),
        count(many.accelerators as f64),
        digits(y_of(few) / y_of(many), 3),
        digits(many.accelerators as f64 / few.accelerators as f64, 3),
        match (few.usd, many.usd) {
            (Some(a), Some(b)) => format!(", and costs {} times as much", digits(b / a, 3)),
            _ => String::new(),
        }
    );
    let title = format!(
        "{} against {}",
        if whole { "Time" } else { "Step" },
        if paid { "dollars" } else { "accelerators" }
    );
    let drawing = svg.finish("scaling", &title, &says);
    Some(Figure { id: "scaling", title, says, drawing, table })
}

/// Points of the front between time and memory in the table and the drawing.
const FRONT_ROWS: usize = 12;

/// Time against memory: no layout is both faster and smaller than one of these.
pub(crate) fn layouts(answer: &Answer) -> Option<Figure> {
    let all = &answer.pareto;
    if all.len() < 2 {
        return None;
    }
    let rows = all.len().min(FRONT_ROWS);
    let shown: Vec<&Choice> = (0..rows).map(|i| &all[i * (all.len() - 1) / (rows - 1)]).collect();
    let (x_low, x_high) = ends(shown.iter().map(|c| c.memory_bytes), 1.1);
    let (y_low, y_high) = ends(shown.iter().map(|c| c.step_s), 1.2);
    let x = Scale::linear(x_low, x_high, LEFT, RIGHT);
    let y = Scale::log(y_low, y_high, BOTTOM, TOP);
    let mut svg = Svg::new(HEIGHT);
    axes(&mut svg, (&x, "bytes of the fullest rank", &bytes), (&y, "time of a step", &seconds));
    svg.curve(&shown.iter().map(|c| (x.at(c.memory_bytes), y.at(c.step_s))).collect::<Vec<_>>(), "front");
    let mut table = Table::new(&["layout", "step", "fullest rank", "MFU"]);
    for (i, c) in shown.iter().enumerate() {
        let class = if i == 0 { "dot chosen" } else { "dot" };
        let says = format!("{}: {} in {}", c.placement(), seconds(c.step_s), bytes(c.memory_bytes));
        svg.circle(x.at(c.memory_bytes), y.at(c.step_s), 6.0, class, Some(i), &says);
        table.row(vec![
            Cell::words(c.placement().to_string()),
            Cell::number(c.step_s, seconds),
            Cell::number(c.memory_bytes, bytes),
            Cell::number(c.mfu, percent),
        ]);
    }
    let last = shown[rows - 1];
    let says = format!(
        "The fastest takes {} in {}; the smallest {} in {}.",
        seconds(shown[0].step_s),
        bytes(shown[0].memory_bytes),
        seconds(last.step_s),
        bytes(last.memory_bytes)
    );
    let drawing = svg.finish("layouts", "Step time against memory", &says);
    Some(Figure { id: "layouts", title: "Layouts: time against memory".to_owned(), says, drawing, table })
}
