//! Two answers side by side.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use spec::{Error, Result};

use crate::Figure;
use crate::page::{Page, data_of};
use crate::svg::{Anchor, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{bytes, count, digits, dollars, percent, seconds};

/// What is compared of an answer: a part of what `plan --json` prints.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Side {
    /// The model.
    pub model: String,
    /// The platform.
    pub cluster: String,
    /// What its accelerators are.
    pub accelerator: String,
    /// How many the job has.
    pub accelerators: usize,
    /// The training stack.
    pub software: String,
    /// Format of the products.
    pub format: String,
    /// By what gradients become updates; absent in answers of old, which is AdamW.
    #[serde(default = "adamw")]
    pub optimizer: String,
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of a step.
    pub sequences: usize,
    /// Tokens trained on.
    pub tokens: Option<f64>,
    best: Vec<Best>,
    run: Option<Run>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Best {
    layout: Value,
    step_s: f64,
    step_low_s: f64,
    step_high_s: f64,
    mfu: f64,
    tokens_per_s: f64,
    memory_bytes: f64,
    train_days: Option<f64>,
    bound: String,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Run {
    wall_days: f64,
    goodput: f64,
    interruptions: f64,
    accelerator_hours: Option<f64>,
    cost_usd: Option<Range>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
struct Range {
    low: f64,
    value: f64,
    high: f64,
}

impl Side {
    /// Reads what `plan --json` printed, or the page that `plan --html` wrote; `name` is for messages.
    ///
    /// # Errors
    /// If it is neither.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let text = data_of(text).unwrap_or(text);
        let side: Side = serde_json::from_str(text).map_err(|e| {
            Error::user(format!("{name}: no answer of the planner: {e}"))
                .hint("save one with `phalanx plan ... --json > FILE`, or name a page of --html")
        })?;
        let best = side.best.first().ok_or_else(|| {
            Error::user(format!("{name}: the answer has no layout")).hint("save a plan that found one")
        })?;
        let numbers = [best.step_s, best.step_low_s, best.step_high_s, best.tokens_per_s, best.memory_bytes];
        if numbers.iter().any(|x| !(x.is_finite() && *x > 0.0)) {
            return Err(Error::user(format!("{name}: a time, rate or size that is not above zero"))
                .hint("save the answer again"));
        }
        Ok(side)
    }

    fn best(&self) -> &Best {
        &self.best[0]
    }

    /// Its name beside the other's: what differs comes first.
    fn named(&self) -> String {
        format!(
            "{} on {} x {} ({})",
            self.model,
            count(self.accelerators as f64),
            self.accelerator,
            self.cluster
        )
    }
}

fn adamw() -> String {
    "adamw".to_owned()
}

/// One line of a comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What is compared.
    pub name: &'static str,
    /// Of A.
    pub a: Option<f64>,
    /// Of B.
    pub b: Option<f64>,
    /// B over A.
    pub ratio: Option<f64>,
    #[serde(skip)]
    shown: fn(f64) -> String,
}

/// Two answers and what follows.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The first.
    pub a: Side,
    /// The second.
    pub b: Side,
    /// Line by line.
    pub lines: Vec<Line>,
    /// What differs in the question.
    pub differs: Vec<&'static str>,
    /// The outcome in a sentence, with its reason.
    pub says: String,
}

impl Comparison {
    /// Puts them side by side.
    pub fn of(a: Side, b: Side) -> Self {
        let run = |s: &Side, get: fn(&Run) -> Option<f64>| s.run.as_ref().and_then(get);
        let line = |name, a: Option<f64>, b: Option<f64>, shown| Line {
            name,
            a,
            b,
            ratio: a.zip(b).filter(|(a, _)| *a != 0.0).map(|(a, b)| b / a),
            shown,
        };
        let both = |name, get: fn(&Side) -> Option<f64>, shown| line(name, get(&a), get(&b), shown);
        let lines = vec![
            both("accelerators", |s| Some(s.accelerators as f64), count),
            both("step", |s| Some(s.best().step_s), seconds),
            both("MFU", |s| Some(s.best().mfu), percent),
            both("tokens a second", |s| Some(s.best().tokens_per_s), count),
            both(
                "tokens a second and accelerator",
                |s| Some(s.best().tokens_per_s / s.accelerators as f64),
                |x| digits(x, 3),
            ),
            both("fullest rank", |s| Some(s.best().memory_bytes), bytes),
            both("days of training", |s| s.best().train_days, |x| digits(x, 3)),
            line("days in all", run(&a, |r| Some(r.wall_days)), run(&b, |r| Some(r.wall_days)), |x| {
                digits(x, 3)
            }),
            line("goodput", run(&a, |r| Some(r.goodput)), run(&b, |r| Some(r.goodput)), percent),
            line(
                "interruptions",
                run(&a, |r| Some(r.interruptions)),
                run(&b, |r| Some(r.interruptions)),
                |x| digits(x, 3),
            ),
            line(
                "accelerator-hours",
                run(&a, |r| r.accelerator_hours),
                run(&b, |r| r.accelerator_hours),
                count,
            ),
            line(
                "cost",
                run(&a, |r| r.cost_usd.map(|c| c.value)),
                run(&b, |r| r.cost_usd.map(|c| c.value)),
                dollars,
            ),
        ];
        let lines = lines.into_iter().filter(|l| l.a.is_some() || l.b.is_some()).collect();
        let questions = [
            ("model", a.model != b.model),
            ("platform", a.cluster != b.cluster),
            ("accelerators", a.accelerators != b.accelerators),
            ("stack", a.software != b.software),
            ("format", a.format != b.format),
            ("batch", (a.sequence, a.sequences) != (b.sequence, b.sequences)),
            ("tokens", a.tokens != b.tokens),
            ("optimizer", a.optimizer != b.optimizer),
        ];
        let differs = questions.into_iter().filter(|q| q.1).map(|q| q.0).collect();
        let says = outcome(&a, &b);
        Comparison { a, b, lines, differs, says }
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut out = format!("A  {}\nB  {}\n", self.a.named(), self.b.named());
        if self.differs.is_empty() {
            out += "the same question\n";
        } else {
            out += &format!("they differ in {}\n", self.differs.join(", "));
        }
        out += &format!("\n{:<32} {:>14} {:>14} {:>8}\n", "", "A", "B", "B/A");
        for l in &self.lines {
            let shown = |x: Option<f64>| x.map_or("-".to_owned(), l.shown);
            let ratio = l.ratio.map_or("-".to_owned(), |r| digits(r, 3));
            out += &format!("{:<32} {:>14} {:>14} {:>8}\n", l.name, shown(l.a), shown(l.b), ratio);
        }
        for (name, side) in [("A", &self.a), ("B", &self.b)] {
            let bound = format!("{name} bound by");
            out += &format!("{bound:<32} {}\n", side.best().bound);
        }
        out + &format!("\n{}\n", self.says)
    }

    /// As a page.
    pub fn page(&self) -> String {
        let mut page = Page::new("Two plans side by side", &self.says);
        page.facts(&[
            (self.a.named(), "A".to_owned()),
            (self.b.named(), "B".to_owned()),
            (
                if self.differs.is_empty() { "nothing".to_owned() } else { self.differs.join(", ") },
                "what was asked differently".to_owned(),
            ),
        ]);
        page.section("compare", "Side by side");
        page.figure(&self.figure());
        page.finish(&json!(self))
    }

    /// Ratios as bars: right of the middle where B is larger.
    fn figure(&self) -> Figure {
        const ROW: f64 = 28.0;
        const LABEL: f64 = 210.0;
        /// A bar ends at a factor of four.
        const FAR: f64 = 4.0;
        let mut table = Table::new(&["", "A", "B", "B over A"]);
        let mut svg = Svg::new(ROW * self.lines.len() as f64 + 24.0);
        let middle = (LABEL + WIDTH) / 2.0;
        for (i, l) in self.lines.iter().enumerate() {
            let y = ROW * i as f64;
            svg.text(LABEL - 8.0, y + 17.0, Anchor::End, "label", l.name);
            if let Some(ratio) = l.ratio.filter(|r| *r > 0.0) {
                let share = (ratio.ln() / FAR.ln()).clamp(-1.0, 1.0);
                let at = middle + share * (WIDTH - LABEL - 120.0) / 2.0;
                let class = if ratio >= 1.0 { "c0" } else { "c1" };
                let says = format!("{}: B is {} of A", l.name, digits(ratio, 3));
                svg.rect(
                    [at.min(middle), y + 4.0, (at - middle).abs().max(1.0), ROW - 10.0],
                    class,
                    Some(i),
                    &says,
                );
                let (place, anchor) =
                    if ratio >= 1.0 { (at + 5.0, Anchor::Start) } else { (at - 5.0, Anchor::End) };
                svg.text(place, y + 17.0, anchor, "value", &format!("{} x", digits(ratio, 3)));
            }
            let cell = |x: Option<f64>| x.map_or(Cell::words("-"), |x| Cell::number(x, l.shown));
            table.row(vec![
                Cell::words(l.name),
                cell(l.a),
                cell(l.b),
                l.ratio.map_or(Cell::words("-"), |r| Cell::number(r, |r| digits(r, 3))),
            ]);
        }
        let bottom = ROW * self.lines.len() as f64;
        svg.line((middle, 0.0), (middle, bottom), "axis");
        svg.text(middle, bottom + 16.0, Anchor::Middle, "tick", "the same");
        let says = "Bars to the right: B has more; each is a factor, up to four.".to_owned();
        let drawing = svg.finish("ratios", "B over A", &says);
        Figure { id: "ratios", title: "B over A".to_owned(), says, drawing, table }
    }
}

/// Who is faster and who is cheaper, and whether the estimates are sure enough to say so.
fn outcome(a: &Side, b: &Side) -> String {
    // Time for the same work: tokens a second, whatever the batch.
    let (x, y) = (a.best(), b.best());
    let range =
        |s: &Best| (s.tokens_per_s * s.step_s / s.step_high_s, s.tokens_per_s * s.step_s / s.step_low_s);
    let faster =
        pick("trains tokens", "faster", "as fast", x.tokens_per_s, y.tokens_per_s, range(x), range(y));
    let cost = |s: &Side| s.run.as_ref().and_then(|r| r.cost_usd);
    let Some((p, q)) = cost(a).zip(cost(b)) else { return faster };
    // The lower cost wins: compare what a dollar buys.
    let (v, w) = (1.0 / p.value.max(f64::MIN_POSITIVE), 1.0 / q.value.max(f64::MIN_POSITIVE));
    let inverse = |r: Range| (1.0 / r.high.max(f64::MIN_POSITIVE), 1.0 / r.low.max(f64::MIN_POSITIVE));
    format!("{faster} {}", pick("is", "cheaper", "as dear", v, w, inverse(p), inverse(q)))
}

fn pick(verb: &str, more: &str, same: &str, a: f64, b: f64, of_a: (f64, f64), of_b: (f64, f64)) -> String {
    /// Closer than this is the same.
    const SAME: f64 = 0.005;
    if (a / b - 1.0).abs() < SAME {
        return format!("A {verb} {same} as B.");
    }
    let (winner, factor) = if a > b { ("A", a / b) } else { ("B", b / a) };
    let sure = if a > b { of_a.0 > of_b.1 } else { of_b.0 > of_a.1 };
    let reason =
        if sure { "their intervals do not touch" } else { "but their intervals overlap: it is not certain" };
    format!("{winner} {verb} {} times {more}; {reason}.", digits(factor, 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(step_s: f64, wide: f64, cost: Option<f64>) -> Side {
        let json = json!({
            "model": "m", "cluster": "c", "accelerator": "x", "accelerators": 8, "software": "s", "format": "bf16",
            "sequence": 1024, "sequences": 8, "tokens": 1e9,
            "best": [{
                "layout": {}, "step_s": step_s, "step_low_s": step_s / wide, "step_high_s": step_s * wide, "mfu": 0.4,
                "tokens_per_s": 8192.0 / step_s, "memory_bytes": 1e9, "train_days": 1.0, "bound": "gemm",
            }],
            "run": cost.map(|c| json!({
                "wall_days": 1.0, "goodput": 0.9, "interruptions": 1.0,
                "cost_usd": {"low": 0.9 * c, "value": c, "high": 1.1 * c},
            })),
        });
        Side::parse("test", &json.to_string()).expect("a side")
    }

    #[test]
    fn the_outcome_says_who_and_how_sure() {
        let check = |a: Side, b: Side, expected: &str| assert_eq!(Comparison::of(a, b).says, expected);
        check(
            side(1.0, 1.1, None),
            side(2.0, 1.1, None),
            "A trains tokens 2.00 times faster; their intervals do not touch.",
        );
        check(
            side(1.1, 1.1, None),
            side(1.0, 1.1, None),
            "B trains tokens 1.10 times faster; but their intervals overlap: it is not certain.",
        );
        check(
            side(1.0, 1.1, Some(3e6)),
            side(1.0, 1.1, Some(1e6)),
            "A trains tokens as fast as B. B is 3.00 times cheaper; their intervals do not touch.",
        );
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for text in ["", "{}", "[1]", "<p>no page</p>", "{\"best\": []}"] {
            let refused = Side::parse("a.json", text).expect_err(text);
            assert!(refused.to_string().starts_with("a.json: no answer of the planner"), "{refused}");
            assert_eq!(refused.exit_code(), 2);
        }
    }

    #[test]
    fn a_page_is_an_answer_too() {
        let both = Comparison::of(side(1.0, 1.1, Some(1e6)), side(2.0, 1.2, None));
        assert!(both.page().contains("<title>Two plans side by side</title>"));
        assert!(both.text().contains("\nstep "), "{}", both.text());
        let page = format!(
            "<p>x</p><script type=\"application/json\" id=\"data\">{}</script>",
            json!(side(1.0, 1.1, None))
        );
        assert_eq!(Side::parse("a.html", &page).expect("a side"), side(1.0, 1.1, None));
    }
}
