//! Figures of a decision to build or to rent.

use economics::decide::Decision;

use super::frontier::{BOTTOM, HEIGHT, LEFT, RIGHT, TOP, axes, ends};
use super::sensitivity::{Swing, tornado};
use super::{Figure, bars};
use crate::svg::{Anchor, Scale, Svg};
use crate::table::{Cell, Table};
use crate::text::{digits, dollars, percent};

/// Bars shown of the tornado.
const BARS: usize = 14;

/// What each way costs.
pub(crate) fn ways(d: &Decision) -> Figure {
    let mut table = Table::new(&["way", "dollars of today", "low", "high", "from month", "in use"]);
    let mut rows = Vec::new();
    for o in &d.options {
        let all = o.cost.total;
        let usd = all.value.to_dollars();
        let range = format!("{} to {}", dollars(all.low.to_dollars()), dollars(all.high.to_dollars()));
        rows.push((o.way.name().to_owned(), usd.max(0.0), format!("{} ({range})", dollars(usd))));
        let from = o.move_month.map_or(Cell::words("0"), |m| Cell::number(m as f64, |m| format!("{m:.0}")));
        table.row(vec![
            Cell::words(o.way.name()),
            Cell::number(usd, |_| all.value.to_string()),
            Cell::number(all.low.to_dollars(), |_| all.low.to_string()),
            Cell::number(all.high.to_dollars(), |_| all.high.to_string()),
            from,
            o.utilisation.map_or(Cell::words("as asked"), |u| Cell::number(u, percent)),
        ]);
    }
    let says = d.reasons.first().cloned().unwrap_or_default() + ".";
    let drawing = bars::bars(&rows, 4).finish("ways", "Cost of each way", &says);
    Figure { id: "ways", title: "What each way costs".to_owned(), says, drawing, table }
}

/// The cost of each way over the use that is made of the machines. `None` where nothing can be bought or rented.
pub(crate) fn use_of_ways(d: &Decision) -> Option<Figure> {
    let (first, last) = (d.by_use.first()?, d.by_use.last()?);
    let all = d.by_use.iter().flat_map(|p| p.usd.iter().map(|w| w.usd)).filter(|usd| *usd > 0.0);
    let (low, high) = ends(all, 1.15);
    let x = Scale::linear(0.0, last.utilisation.max(1.0), LEFT, RIGHT);
    let y = Scale::log(low, high, BOTTOM, TOP);
    let mut svg = Svg::new(HEIGHT);
    axes(
        &mut svg,
        (&x, "share of the time that machines work once they are there", &percent),
        (&y, "dollars of today over all months", &dollars),
    );
    let at = x.at(d.guide_break_even);
    svg.line((at, TOP), (at, BOTTOM), "rule");
    svg.text(at + 4.0, TOP + 12.0, Anchor::Start, "label", "70 %, as the guide has it");
    let mut heads = vec!["used"];
    heads.extend(first.usd.iter().map(|w| w.way.name()));
    let mut table = Table::new(&heads);
    for (i, of) in first.usd.iter().enumerate() {
        let line: Vec<(f64, f64)> =
            d.by_use.iter().map(|p| (x.at(p.utilisation), y.at(p.usd[i].usd))).collect();
        svg.curve(&line, if of.way == economics::decide::Way::Build { "front" } else { "front2" });
        if let Some((px, py)) = line.last() {
            svg.text(*px - 4.0, py - 6.0, Anchor::End, "value", of.way.name());
        }
    }
    for (row, p) in d.by_use.iter().enumerate() {
        let mut cells = vec![Cell::number(p.utilisation, percent)];
        for w in &p.usd {
            let says = format!("{} at {}: {}", w.way.name(), percent(p.utilisation), dollars(w.usd));
            svg.circle(x.at(p.utilisation), y.at(w.usd), 3.0, "dot", Some(row), &says);
            cells.push(Cell::number(w.usd, dollars));
        }
        table.row(cells);
    }
    let crossings = d.break_even.iter().filter_map(|b| {
        let pays = b.over_profile?.value;
        (pays <= 1.0).then(|| format!("from {} against {}", percent(pays), b.against.name()))
    });
    let crossings: Vec<String> = crossings.collect();
    let says = match crossings.is_empty() {
        true => "Buying pays at no use that these months can make of the machines.".to_owned(),
        false => format!("Buying now pays {}.", crossings.join(", ")),
    };
    let drawing = svg.finish("use", "Cost of each way against use", &says);
    Some(Figure { id: "use", title: "Cost against use".to_owned(), says, drawing, table })
}

/// What would change the decision. `None` where there is nothing to weigh.
pub(crate) fn decision_swings(d: &Decision) -> Option<Figure> {
    let least = |owns: bool| {
        let of = d.options.iter().filter(|o| o.accelerators.is_some() == owns);
        of.map(|o| o.cost.total.value.to_dollars()).min_by(f64::total_cmp)
    };
    let value = least(true)? - least(false)?;
    let swing = |b: &economics::decide::Bar| Swing {
        name: format!("{} {} to {}", b.assumption, digits(b.low, 3), digits(b.high, 3)),
        less: b.own_less_rent_at_low,
        more: b.own_less_rent_at_high,
    };
    let swings: Vec<Swing> = d.tornado.iter().take(BARS).map(swing).collect();
    if swings.is_empty() {
        return None;
    }
    let heads = ["assumption", "owning less renting at its low end", "at its high end"];
    let (svg, table) = tornado(swings, value, heads, dollars);
    let turns = d.tornado.iter().filter(|b| b.choice_at_low != d.choice || b.choice_at_high != d.choice);
    let turns: Vec<&str> = turns.map(|b| b.assumption.as_str()).collect();
    let says = match turns.is_empty() {
        true => format!("Owning less renting is {}; no assumption alone turns the choice.", dollars(value)),
        false => format!(
            "Owning less renting is {}; these alone turn the choice: {}.",
            dollars(value),
            turns.join(", ")
        ),
    };
    let drawing = svg.finish("tornado", "Owning less renting against each assumption", &says);
    Some(Figure { id: "tornado", title: "What would change it".to_owned(), says, drawing, table })
}
