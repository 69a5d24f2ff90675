//! Where the time and the memory of the best layout go.

use plan::answer::{Answer, Choice};

use super::{Figure, fill};
use crate::svg::{Anchor, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{bytes, percent, seconds};

const LABEL: f64 = 150.0;
const VALUE: f64 = 130.0;
const ROW: f64 = 26.0;

/// Horizontal bars with names to the left and values to the right.
pub(super) fn bars(rows: &[(String, f64, String)], colour: usize) -> Svg {
    let mut svg = Svg::new(ROW * rows.len() as f64 + 8.0);
    let most = rows.iter().map(|r| r.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let room = WIDTH - LABEL - VALUE;
    for (i, (name, value, shown)) in rows.iter().enumerate() {
        let y = 4.0 + ROW * i as f64;
        let width = room * value / most;
        svg.text(LABEL - 8.0, y + 15.0, Anchor::End, "label", name);
        svg.rect(
            [LABEL, y + 2.0, width.max(1.0), ROW - 8.0],
            &fill(colour),
            Some(i),
            &format!("{name}: {shown}"),
        );
        svg.text(LABEL + width + 8.0, y + 15.0, Anchor::Start, "value", shown);
    }
    svg
}

/// Time of a step by what it goes to.
pub(crate) fn parts(best: &Choice) -> Figure {
    let mut parts: Vec<(&str, f64)> = best.parts().into_iter().filter(|p| p.1 > 0.0).collect();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut table = Table::new(&["part of the step", "time", "share"]);
    let mut rows = Vec::new();
    for (name, s) in &parts {
        let share = s / best.step_s;
        rows.push(((*name).to_owned(), *s, format!("{} ({})", seconds(*s), percent(share))));
        table.row(vec![Cell::words(*name), Cell::number(*s, seconds), Cell::number(share, percent)]);
    }
    table.row(vec![Cell::words("in all"), Cell::number(best.step_s, seconds), Cell::number(1.0, percent)]);
    let says = match parts.first() {
        Some((name, s)) => {
            let useful: f64 =
                parts.iter().filter(|p| ["gemm", "attention"].contains(&p.0)).map(|p| p.1).sum();
            format!(
                "{} takes {} of the step; matrix products and attention together {}.",
                name,
                percent(s / best.step_s),
                percent(useful / best.step_s)
            )
        }
        None => String::new(),
    };
    let drawing = bars(&rows, 0).finish("parts", "Time of a step by part", &says);
    Figure { id: "parts", title: "Where the time of a step goes".to_owned(), says, drawing, table }
}

/// Memory of the fullest rank.
pub(crate) fn memory(answer: &Answer, best: &Choice) -> Figure {
    let room = answer.question.cluster.accelerator.memory_bytes.value;
    let mut parts = best.memory.parts().to_vec();
    parts.push((FREE, (room - best.memory_bytes).max(0.0)));
    let (svg, table) = held(&parts, room);
    let says = format!(
        "The fullest rank holds {} of {}{}.",
        bytes(best.memory_bytes),
        bytes(room),
        if best.fits { "" } else { ": it does not fit" }
    );
    let drawing = svg.finish("memory", "Memory of the fullest rank", &says);
    Figure { id: "memory", title: "What the fullest rank holds".to_owned(), says, drawing, table }
}

/// The part of memory that nothing holds.
pub(super) const FREE: &str = "free";

/// Bytes of one accelerator beside each other, with a line at what there is.
pub(super) fn held(parts: &[(&'static str, f64)], room: f64) -> (Svg, Table) {
    let whole = parts.iter().map(|p| p.1).sum::<f64>().max(room);
    let mut svg = Svg::new(118.0);
    let mut table = Table::new(&["held", "bytes", "share of the accelerator"]);
    let (mut x, mut legend) = (0.0, 0.0);
    for (i, &(name, value)) in parts.iter().enumerate() {
        let width = WIDTH * value / whole;
        let class = if name == FREE { "free".to_owned() } else { fill(i) };
        svg.rect([x, 4.0, width, 44.0], &class, Some(i), &format!("{name}: {}", bytes(value)));
        x += width;
        svg.rect([legend, 76.0, 12.0, 12.0], &class, Some(i), "");
        svg.text(legend + 17.0, 86.0, Anchor::Start, "label", name);
        svg.text(legend + 17.0, 102.0, Anchor::Start, "value", &bytes(value));
        legend += WIDTH / parts.len() as f64;
        table.row(vec![Cell::words(name), Cell::number(value, bytes), Cell::number(value / room, percent)]);
    }
    let end = WIDTH * room / whole;
    svg.line((end - 1.0, 0.0), (end - 1.0, 54.0), "rule");
    svg.text(end - 4.0, 66.0, Anchor::End, "label", &format!("{} there are", bytes(room)));
    (svg, table)
}
