//! The page of a decision to build or to rent.

use economics::decide::Decision;
use serde_json::json;

use crate::figures;
use crate::page::Page;
use crate::text::{count, digits, dollars, escape, percent};

/// The whole page.
pub fn decide_page(d: &Decision) -> String {
    let a = &d.assumptions;
    let title = format!("Build or rent: {} of {}", a.accelerator, a.platform);
    let sentence = d.options.first().map(|o| {
        let t = o.cost.total;
        format!(
            "{}: {} ({} to {}) over {} months in money of today, for {} accelerator-hours.",
            d.choice.name(),
            dollars(t.value.to_dollars()),
            dollars(t.low.to_dollars()),
            dollars(t.high.to_dollars()),
            a.months(),
            count(d.accelerator_hours)
        )
    });
    let mut page = Page::new(&title, &sentence.unwrap_or_default());
    let mut facts = vec![(d.choice.name().to_owned(), "is the cheapest that is possible".to_owned())];
    if let Some(month) = d.move_month {
        facts.push((format!("month {month}"), "one's own machines work from then".to_owned()));
    }
    for b in &d.break_even {
        let shown =
            if b.utilisation.value <= 1.0 { percent(b.utilisation.value) } else { "never".to_owned() };
        facts.push((shown, format!("owning for good pays against {}", b.against.name())));
    }
    page.facts(&facts);

    page.section("why", "Why");
    let reasons: String = d.reasons.iter().map(|r| format!("<li>{}</li>", escape(r))).collect();
    let rejected: String =
        d.rejected.iter().map(|r| format!("<li>{}: {}</li>", r.way.name(), escape(&r.why))).collect();
    page.html(&format!("<ul>{reasons}</ul><h3>Rejected</h3><ul>{rejected}</ul>"));
    page.section("money", "The money");
    page.figure(&figures::ways(d));
    figures::use_of_ways(d).iter().for_each(|f| page.figure(f));
    page.section("sensitivity-of-it", "What would change it");
    figures::decision_swings(d).iter().for_each(|f| page.figure(f));
    page.section("assumed", "What was assumed, and from where");
    page.html(&assumptions(d));
    page.finish(&json!(d))
}

/// Every number with its range and its source.
fn assumptions(d: &Decision) -> String {
    let demand = d.assumptions.demand.iter().map(|p| {
        format!(
            "<li>{} months of {} accelerators at {}</li>",
            p.months,
            count(p.accelerators as f64),
            percent(p.utilisation)
        )
    });
    let rows = d.assumptions.numbers.iter().map(|(key, n)| {
        let s = n.spread;
        format!(
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            key.name(),
            digits(s.value, 4),
            digits(s.low, 4),
            digits(s.high, 4),
            escape(&n.source)
        )
    });
    format!(
        "<ul>{}</ul><figure id=\"sources\"><h3>Assumptions</h3><div class=\"rows\" tabindex=\"0\" role=\"region\" aria-label=\"Assumptions\"><table><caption>Assumptions</caption><thead><tr><th scope=\"col\">what</th><th scope=\"col\">value</th><th scope=\"col\">low</th><th scope=\"col\">high</th><th scope=\"col\">source</th></tr></thead><tbody>{}</tbody></table></div></figure>",
        demand.collect::<String>(),
        rows.collect::<String>()
    )
}
