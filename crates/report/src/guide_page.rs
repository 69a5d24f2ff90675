//! The page of the guide's claims.

use guide::{Claim, Verdict};
use serde_json::json;

use crate::page::Page;
use crate::text::escape;

/// All claims with our figures.
pub fn guide_page(claims: &[Claim]) -> String {
    let of = |v: Verdict| claims.iter().filter(|c| c.verdict == v).count();
    let answer = format!(
        "Of {} figures of the guide, {} are confirmed, {} are wrong, {} are true in one reading only, {} were true once, and {} nobody who knows has confirmed.",
        claims.len(),
        of(Verdict::Confirmed),
        of(Verdict::Wrong),
        of(Verdict::Ambiguous),
        of(Verdict::Stale),
        of(Verdict::Unconfirmed),
    );
    let mut page = Page::new("The guide, checked", &answer);
    let all = [
        Verdict::Confirmed,
        Verdict::Wrong,
        Verdict::Ambiguous,
        Verdict::Stale,
        Verdict::Unconfirmed,
        Verdict::NoFigure,
    ];
    page.facts(&all.map(|v| (of(v).to_string(), v.name().to_owned())));
    page.section("claims", "Claim by claim");
    let mut rows = String::new();
    for c in claims {
        let class = json!(c.verdict);
        rows += &format!(
            "<tr id=\"claim-{n}\"><td class=\"n\" data-value=\"{n}\">{n}</td><th scope=\"row\">{}</th><td>{}{}</td><td><span class=\"tag {}\">{}</span></td><td>{}</td></tr>",
            escape(&c.claim),
            escape(&c.ours),
            c.note.as_ref().map(|n| format!("<br><em>{}</em>", escape(n))).unwrap_or_default(),
            class.as_str().unwrap_or_default(),
            c.verdict.name(),
            escape(&c.source),
            n = c.number,
        );
    }
    page.html(&format!(
        "<p class=\"says\">Our figures are computed anew for each page, from the catalogue and the planner.</p><table><caption>Claims</caption><thead><tr><th scope=\"col\">no.</th><th scope=\"col\">the guide says</th><th scope=\"col\">we find</th><th scope=\"col\">verdict</th><th scope=\"col\">source</th></tr></thead><tbody>{rows}</tbody></table>"
    ));
    page.finish(&json!({ "claims": claims }))
}
