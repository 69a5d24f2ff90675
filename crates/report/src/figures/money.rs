//! What the run costs, and from which utilisation on owning pays.

use economics::Spread;
use economics::own::Ownership;
use economics::price::Quote;
use economics::run::Run;

use super::frontier::{BOTTOM, HEIGHT, LEFT, RIGHT, TOP, axes, ends};
use super::{Figure, bars};
use crate::svg::{Anchor, Scale, Svg};
use crate::table::{Cell, Table};
use crate::text::{dollars, percent};

/// The utilisation that the guide takes for the break-even of everybody.
const GUIDE_BREAK_EVEN: f64 = 0.7;

/// The bill, part by part.
pub(crate) fn cost(run: &Run) -> Option<Figure> {
    let bill = run.cost.as_ref()?;
    let total = bill.total.value.to_dollars();
    let mut table = Table::new(&["for", "dollars", "low", "high", "share"]);
    let mut rows = Vec::new();
    let share = |usd: f64| if total > 0.0 { usd / total } else { 0.0 };
    for part in &bill.parts {
        let usd = part.cost.value.to_dollars();
        rows.push((part.name.clone(), usd, format!("{} ({})", dollars(usd), percent(share(usd)))));
    }
    rows.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (name, usd, _) in &rows {
        let Some(cost) = bill.part(name) else { continue };
        table.row(vec![
            Cell::words(name.as_str()),
            Cell::number(*usd, |_| cost.value.to_string()),
            Cell::number(cost.low.to_dollars(), |_| cost.low.to_string()),
            Cell::number(cost.high.to_dollars(), |_| cost.high.to_string()),
            Cell::number(share(*usd), percent),
        ]);
    }
    let all = bill.total;
    table.row(vec![
        Cell::words("in all"),
        Cell::number(total, |_| all.value.to_string()),
        Cell::number(all.low.to_dollars(), |_| all.low.to_string()),
        Cell::number(all.high.to_dollars(), |_| all.high.to_string()),
        Cell::number(1.0, percent),
    ]);
    let says = format!(
        "{} in all, {} to {} over the ranges of its sources.",
        dollars(total),
        dollars(all.low.to_dollars()),
        dollars(all.high.to_dollars())
    );
    let drawing = bars::bars(&rows, 4).finish("cost", "Cost of the run by part", &says);
    Some(Figure { id: "cost", title: "What the run costs".to_owned(), says, drawing, table })
}

/// Owning at one share of the time that the machine works, dollars for an hour in use.
struct Owned {
    used: f64,
    usd: Spread,
}

/// An hour of an accelerator in use, owned and rented, over the share of time that it is used.
pub(crate) fn utilisation(own: &Ownership, quote: &Quote) -> Figure {
    let rent = quote.usd_per_accelerator_h;
    let break_even = own.break_even(rent);
    // From a tenth of the time on: below, an hour in use costs more than any rent.
    let owned: Vec<Owned> = (2..=20)
        .map(|i| f64::from(i) / 20.0)
        .map(|used| Owned { used, usd: own.usd_per_accelerator_h(used) })
        .collect();
    let (low, high) =
        ends(owned.iter().flat_map(|o| [o.usd.low, o.usd.high]).chain([rent.low, rent.high]), 1.1);
    let x = Scale::linear(0.0, 1.0, LEFT, RIGHT);
    let y = Scale::log(low, high, BOTTOM, TOP);
    let mut svg = Svg::new(HEIGHT);
    axes(
        &mut svg,
        (&x, "share of the time that the machine works", &percent),
        (&y, "dollars for an hour in use", &dollars),
    );
    curves(&mut svg, (&x, &y), &owned, rent);
    let mut table = Table::new(&["used", "owned, an hour", "low", "high", "rented, an hour"]);
    table.row(vec![
        Cell::number(break_even.value, percent),
        Cell::words("break-even"),
        Cell::number(break_even.low, percent),
        Cell::number(break_even.high, percent),
        Cell::number(rent.value, dollars),
    ]);
    if break_even.value <= 1.0 {
        svg.circle(x.at(break_even.value), y.at(rent.value), 6.0, "dot chosen", Some(0), "break-even");
        let label = format!("break-even {}", percent(break_even.value));
        svg.text(x.at(break_even.value), y.at(rent.value) + 20.0, Anchor::Middle, "value", &label);
    }
    for o in owned.iter().step_by(2) {
        let says = format!("{}: {}", percent(o.used), dollars(o.usd.value));
        svg.circle(x.at(o.used), y.at(o.usd.value), 3.5, "dot", Some(table.rows.len()), &says);
        table.row(vec![
            Cell::number(o.used, percent),
            Cell::number(o.usd.value, dollars),
            Cell::number(o.usd.low, dollars),
            Cell::number(o.usd.high, dollars),
            Cell::number(rent.value, dollars),
        ]);
    }
    let says = match break_even.value {
        b if b <= 1.0 => format!(
            "Owning pays from {} of the time on ({} to {} over the ranges), against {} an hour ({}, {}).",
            percent(b),
            percent(break_even.low),
            if break_even.high <= 1.0 { percent(break_even.high) } else { "never".to_owned() },
            dollars(rent.value),
            quote.name,
            quote.date
        ),
        _ => format!("At {} an hour ({}) owning never pays.", dollars(rent.value), quote.name),
    };
    let drawing = svg.finish("utilisation", "Cost of an hour in use against utilisation", &says);
    Figure { id: "utilisation", title: "Build or rent".to_owned(), says, drawing, table }
}

/// Owning as a falling curve in its band, renting as a level one in its own, and the guide's rule.
fn curves(svg: &mut Svg, (x, y): (&Scale, &Scale), owned: &[Owned], rent: Spread) {
    let along = |end: fn(&Spread) -> f64| owned.iter().map(move |o| (x.at(o.used), y.at(end(&o.usd))));
    let mut around: Vec<(f64, f64)> = along(|s| s.low).collect();
    around.extend(along(|s| s.high).collect::<Vec<_>>().into_iter().rev());
    svg.curve(&around, "band");
    let height = (y.at(rent.low) - y.at(rent.high)).max(1.0);
    svg.rect([LEFT, y.at(rent.high), RIGHT - LEFT, height], "band2", None, "rent");
    svg.curve(&along(|s| s.value).collect::<Vec<_>>(), "front");
    svg.curve(&[(LEFT, y.at(rent.value)), (RIGHT, y.at(rent.value))], "front2");
    let label = format!("rent {}", dollars(rent.value));
    svg.text(RIGHT - 4.0, y.at(rent.value) - 6.0, Anchor::End, "value", &label);
    let at = x.at(GUIDE_BREAK_EVEN);
    svg.line((at, TOP), (at, BOTTOM), "rule");
    svg.text(at + 4.0, TOP + 12.0, Anchor::Start, "label", "70 %, as the guide has it");
}
