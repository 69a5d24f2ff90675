//! What would change the answer: tornado figures, longest bar first.

use economics::run::{Basis, Run};
use plan::answer::{Answer, Choice};
use plan::estimate::{Estimator, Problem};
use spec::Result;
use spec::cluster::Knob;

use super::Figure;
use crate::svg::{Anchor, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{dollars, seconds};

/// One bar: a name, the result with less of it, with more of it.
pub(super) struct Swing {
    pub(super) name: String,
    pub(super) less: f64,
    pub(super) more: f64,
}

pub(super) fn tornado(
    mut swings: Vec<Swing>,
    value: f64,
    heads: [&'static str; 3],
    shown: fn(f64) -> String,
) -> (Svg, Table) {
    swings.sort_by(|a, b| (b.more - b.less).abs().total_cmp(&(a.more - a.less).abs()));
    const ROW: f64 = 30.0;
    const LABEL: f64 = 180.0;
    const AROUND: f64 = 70.0;
    let mut svg = Svg::new(ROW * swings.len() as f64 + 24.0);
    let far = swings
        .iter()
        .flat_map(|s| [s.less, s.more])
        .map(|x| (x - value).abs())
        .fold(1e-12 * value.abs(), f64::max);
    let middle = (LABEL + WIDTH) / 2.0;
    let at = |x: f64| middle + (x - value) / far * (WIDTH - LABEL - 2.0 * AROUND) / 2.0;
    let mut table = Table::new(&heads);
    for (i, s) in swings.iter().enumerate() {
        let y = ROW * i as f64;
        svg.text(LABEL - 8.0, y + 18.0, Anchor::End, "label", &s.name);
        for (x, class) in [(s.less, "c1"), (s.more, "c0")] {
            let (from, to) = (at(value).min(at(x)), at(value).max(at(x)));
            svg.rect(
                [from, y + 4.0, to - from, ROW - 10.0],
                class,
                Some(i),
                &format!("{}: {}", s.name, shown(x)),
            );
            let (place, anchor) =
                if x < value { (from - 5.0, Anchor::End) } else { (to + 5.0, Anchor::Start) };
            if (x - value).abs() > 0.004 * far {
                svg.text(place, y + 18.0, anchor, "value", &shown(x));
            }
        }
        table.row(vec![
            Cell::words(s.name.as_str()),
            Cell::number(s.less, shown),
            Cell::number(s.more, shown),
        ]);
    }
    let bottom = ROW * swings.len() as f64;
    svg.line((middle, 0.0), (middle, bottom), "axis");
    svg.text(middle, bottom + 16.0, Anchor::Middle, "value", &shown(value));
    (svg, table)
}

/// The share by which properties of the machine are changed.
const SWING: f64 = 0.25;

/// Step time of the best layout on machines with a quarter less and more of one thing.
pub(crate) fn time_swings(answer: &Answer, best: &Choice) -> Result<Figure> {
    let mut swings = Vec::new();
    for knob in Knob::ALL {
        let step = |by: f64| -> Result<f64> {
            let cluster = answer.problem.cluster.clone().scaled(knob, by);
            let problem = Problem { cluster, ..answer.problem.clone() };
            let estimate = Estimator::new(&problem, answer.question.format)?.estimate(best.placement())?;
            // A faster machine waits for the same storage.
            Ok(estimate.step_s + best.loading_s)
        };
        let name = match knob {
            Knob::Flops => "arithmetic",
            Knob::MemoryBandwidth => "memory bandwidth",
            Knob::MemoryCapacity => "memory capacity",
            Knob::ScaleUp => "links in a node",
            Knob::ScaleOut => "links between nodes",
        };
        swings.push(Swing { name: name.to_owned(), less: step(1.0 - SWING)?, more: step(1.0 + SWING)? });
    }
    let (svg, table) = tornado(
        swings,
        best.step_s,
        ["property of the machine", "a quarter less", "a quarter more"],
        seconds,
    );
    let says = match table.rows.first().map(|r| r[0].text.clone()) {
        Some(first) => format!("With the layout kept, {first} matters most."),
        None => String::new(),
    };
    let drawing = svg.finish("sensitivity", "Step time against the machine", &says);
    let title = "What would make a step faster or slower".to_owned();
    Ok(Figure { id: "sensitivity", title, says, drawing, table })
}

/// The run's cost with one cause of its range at either end and the others at their values.
pub(crate) fn cost_swings(run: &Run, best: &Choice) -> Option<Figure> {
    let value = run.cost_usd?.value.to_dollars();
    let rate = match run.basis.as_ref()? {
        Basis::Rent(quote) => ("price", quote.usd_per_accelerator_h),
        Basis::Own(owned) => ("cost of owning", owned.usd_per_accelerator_h),
    };
    let g = run.goodput_range;
    let swing = |name: &str, less: f64, more: f64| Swing {
        name: name.to_owned(),
        less: value * less,
        more: value * more,
    };
    let swings = vec![
        swing(rate.0, rate.1.low / rate.1.value, rate.1.high / rate.1.value),
        swing("time of a step", best.step_low_s / best.step_s, best.step_high_s / best.step_s),
        swing("goodput", g.value / g.high, g.value / g.low),
    ];
    let (svg, table) = tornado(swings, value, ["cause", "at its cheaper end", "at its dearer end"], dollars);
    let first = table.rows.first().map(|r| r[0].text.clone()).unwrap_or_default();
    let says = format!("What is known least for the cost is the {first}.");
    let drawing = svg.finish("cost-sensitivity", "Cost against what is uncertain", &says);
    let title = "What the cost's range comes from".to_owned();
    Some(Figure { id: "cost-sensitivity", title, says, drawing, table })
}
