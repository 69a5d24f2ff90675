//! What failures and checkpoints leave of the time.

use economics::run::Run;

use super::frontier::{BOTTOM, HEIGHT, LEFT, RIGHT, TOP, axes};
use super::{Figure, bars};
use crate::svg::{Anchor, Scale, Svg};
use crate::table::{Cell, Table};
use crate::text::{digits, percent, seconds};

/// Points of the curve.
const POINTS: usize = 60;
/// Every so many of them is in the table.
const IN_TABLE: usize = 6;

/// Goodput over the interval between checkpoints.
pub(crate) fn interval(run: &Run) -> Option<Figure> {
    let recovery = &run.recovery;
    let curve = run.job()?.curve(recovery.recovery, POINTS);
    let (first, last) = (curve.first()?, curve.last()?);
    let x = Scale::log(first.interval_s, last.interval_s, LEFT, RIGHT);
    let best = curve.iter().map(|p| p.goodput).fold(0.0, f64::max);
    let worst = curve.iter().map(|p| p.goodput).fold(1.0, f64::min);
    let y = Scale::linear((worst - 0.02).max(0.0), (best + 0.02).min(1.0), BOTTOM, TOP);
    let mut svg = Svg::new(HEIGHT);
    axes(&mut svg, (&x, "useful time between checkpoints", &seconds), (&y, "goodput", &percent));
    svg.curve(&curve.iter().map(|p| (x.at(p.interval_s), y.at(p.goodput))).collect::<Vec<_>>(), "front");
    let mut table = Table::new(&["checkpoint every", "goodput", "which"]);
    let i = &recovery.intervals;
    for (name, at, step) in [("Young", i.young_s, 0.0), ("Daly", i.daly_s, 14.0), ("best", i.best_s, 28.0)] {
        if !(first.interval_s..=last.interval_s).contains(&at) {
            continue;
        }
        svg.line((x.at(at), TOP), (x.at(at), BOTTOM), "rule");
        svg.text(
            x.at(at) + 4.0,
            BOTTOM - 8.0 - step,
            Anchor::Start,
            "label",
            &format!("{name}, {}", seconds(at)),
        );
    }
    let taken = (recovery.interval_s, recovery.goodput.value);
    table.row(vec![Cell::number(taken.0, seconds), Cell::number(taken.1, percent), Cell::words("taken")]);
    svg.circle(x.at(taken.0), y.at(taken.1), 6.0, "dot chosen", Some(0), "taken");
    for (n, p) in curve.iter().step_by(IN_TABLE).enumerate() {
        svg.circle(x.at(p.interval_s), y.at(p.goodput), 3.5, "dot", Some(n + 1), &percent(p.goodput));
        table.row(vec![
            Cell::number(p.interval_s, seconds),
            Cell::number(p.goodput, percent),
            Cell::words(""),
        ]);
    }
    let says = format!(
        "A {} checkpoint every {} leaves {} of the time ({} to {}); nodes fail every {} h.",
        recovery.save.name(),
        seconds(recovery.interval_s),
        percent(recovery.goodput.value),
        percent(recovery.goodput.low),
        percent(recovery.goodput.high),
        digits(run.failures.between_h.value, 3)
    );
    let drawing = svg.finish("goodput", "Goodput against the interval between checkpoints", &says);
    Some(Figure { id: "goodput", title: "How often to checkpoint".to_owned(), says, drawing, table })
}

/// Where wall time goes that is not useful.
pub(crate) fn losses(run: &Run) -> Figure {
    let mut table = Table::new(&["wall time goes to", "share", "time"]);
    let mut rows = Vec::new();
    let wall_s = run.wall_days * 86_400.0;
    for term in &run.recovery.terms {
        table.row(vec![
            Cell::words(term.name),
            Cell::number(term.share, percent),
            Cell::number(term.share * wall_s, seconds),
        ]);
    }
    // The useful part would dwarf the rest.
    for term in run.recovery.terms.iter().skip(1) {
        rows.push((
            term.name.to_owned(),
            term.share,
            format!("{} ({})", percent(term.share), seconds(term.share * wall_s)),
        ));
    }
    let says = format!(
        "{} interruptions are to be expected ({} to {}); recovery by {}.",
        digits(run.interruptions, 3),
        digits(run.interruptions_range.low, 3),
        digits(run.interruptions_range.high, 3),
        run.recovery.recovery.name()
    );
    let drawing = bars::bars(&rows, 3).finish("losses", "What is lost of wall time", &says);
    Figure { id: "losses", title: "What failures and checkpoints take".to_owned(), says, drawing, table }
}
