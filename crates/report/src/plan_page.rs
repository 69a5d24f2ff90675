//! The page of a plan: the answer in a sentence, then the figures behind it.

use economics::Date;
use economics::own::Ownership;
use economics::price::Quote;
use economics::run::{Ask, Basis, Run};
use plan::answer::{Answer, Choice, Question, fastest_each};
use plan::calibration::Calibration;
use serde::Serialize;
use serde_json::Value;
use spec::{Catalog, EntryKind, Error, Result};

use crate::figures::{self, Timeline};
use crate::page::Page;
use crate::sources::{facts_table, list};
use crate::table::{Cell, Table};
use crate::text::{bytes, count, digits, dollars, escape, percent, seconds};

/// What a page is made of.
#[derive(Clone, Copy)]
pub struct Report<'a> {
    /// The plan.
    pub answer: &'a Answer,
    /// The same as data, which the page carries.
    pub json: &'a Value,
    /// The run around it, where tokens were asked for.
    pub run: Option<&'a Run>,
    /// The same job at other sizes.
    pub sizes: &'a [Scale],
    /// What owning the machine takes, and a rent to hold against it.
    pub owned: Option<(&'a Ownership, &'a Quote)>,
    /// Where the facts about the machine come from.
    pub catalog: &'a Catalog,
    /// The day of the page.
    pub today: Date,
}

/// The job on another number of accelerators.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scale {
    /// So many.
    pub accelerators: usize,
    /// Step of the best layout there.
    pub step_s: f64,
    /// Its utilisation.
    pub mfu: f64,
    /// Days of the whole run, with its interruptions.
    pub wall_days: Option<f64>,
    /// What it costs.
    pub usd: Option<f64>,
}

/// The best layouts on fewer and more accelerators than asked, by powers of two, with what the run costs there. Sizes that
/// the machine does not have, or on which nothing fits, are left out.
pub fn scales(
    catalog: &Catalog,
    question: &Question,
    calibration: &Calibration,
    ask: Option<&Ask>,
) -> Vec<Scale> {
    let asked = question.cluster.accelerators;
    let sizes = (1..=4).rev().map(|i| asked >> i).chain((0..=2).map(|i| asked << i)).filter(|n| *n > 0);
    let questions = sizes.filter_map(|n| {
        let cluster = catalog.cluster(&question.cluster.name, Some(n)).ok()?;
        Some(Question { cluster, keep: 1, ..question.clone() })
    });
    let answers = fastest_each(questions.collect(), calibration, &[]).unwrap_or_default();
    let scale = |answer: Answer| {
        let best = answer.best.first()?;
        let run = ask.and_then(|ask| economics::run::run(catalog, &answer, ask).ok());
        Some(Scale {
            accelerators: answer.question.cluster.accelerators,
            step_s: best.step_s,
            mfu: best.mfu,
            wall_days: run.as_ref().map(|r| r.wall_days),
            usd: run.as_ref().and_then(|r| r.cost_usd).map(|c| c.value.to_dollars()),
        })
    };
    answers.into_iter().flatten().filter_map(scale).collect()
}

/// The whole page.
///
/// # Errors
/// If the answer has no layout, or its layout is not allowed, which answers rule out.
pub fn plan_page(r: &Report<'_>) -> Result<String> {
    let best = r.answer.best.first().ok_or_else(|| Error::failure("the answer has no layout"))?;
    let q = &r.answer.question;
    let title =
        format!("{} on {} of {}", q.shape.model.name, count(q.cluster.accelerators as f64), q.cluster.name);
    let mut page = Page::new(&title, &sentence(r, best));
    page.facts(&facts(r, best));

    page.section("choices", "Choices");
    figures::scaling(r.sizes, q.cluster.accelerators).iter().for_each(|f| page.figure(f));
    figures::layouts(r.answer).iter().for_each(|f| page.figure(f));
    page.html(&best_layouts(r.answer));

    page.section("step", "The step");
    page.figure(&figures::parts(best));
    let timeline = Timeline::of(r.answer, best)?;
    page.figure(&figures::timeline(&timeline));
    page.figure(&figures::by_stage(&timeline));
    page.figure(&figures::memory(r.answer, best));
    match figures::by_stage_memory(r.answer, best) {
        Ok(figure) => page.figure(&figure),
        Err(why) => page.html(&format!(
            "<p class=\"says\" id=\"no-ranks\">Memory rank by rank is drawn from the step program, which this layout has none of: {}.</p>",
            escape(&why.to_string())
        )),
    }

    if let Some(run) = r.run {
        page.section("run", "The run");
        let why: String = run.range_of.iter().map(|w| format!("<li>{}</li>", escape(w))).collect();
        page.html(&format!("<h3>Why the ranges are as wide</h3><ul id=\"range-of\">{why}</ul>"));
        figures::interval(run).iter().for_each(|f| page.figure(f));
        page.figure(&figures::losses(run));
        page.section("money", "The money");
        figures::cost(run).iter().for_each(|f| page.figure(f));
        if let Some((own, quote)) = r.owned {
            page.figure(&figures::utilisation(own, quote));
        }
    } else if let Some((own, quote)) = r.owned {
        page.section("money", "The money");
        page.figure(&figures::utilisation(own, quote));
    }

    page.section("sensitivity-of-it", "What would change it");
    page.figure(&figures::time_swings(r.answer, best)?);
    r.run.and_then(|run| figures::cost_swings(run, best)).iter().for_each(|f| page.figure(f));

    page.section("assumed", "What was assumed, and from where");
    page.html(&assumptions(r));
    page.html(&sources(r));
    Ok(page.finish(r.json))
}

/// The answer for those who read no further.
fn sentence(r: &Report<'_>, best: &Choice) -> String {
    let q = &r.answer.question;
    let on = format!("{} {}", count(q.cluster.accelerators as f64), q.cluster.accelerator.name);
    let fits = if best.fits { "" } else { " This layout does not fit into memory." };
    match (r.run, best.train_days) {
        (Some(run), _) => {
            let paid = match (run.cost_usd, &run.basis) {
                (Some(cost), Some(basis)) => format!(
                    " It costs {} ({} to {}), {}.",
                    dollars(cost.value.to_dollars()),
                    dollars(cost.low.to_dollars()),
                    dollars(cost.high.to_dollars()),
                    match basis {
                        Basis::Rent(quote) =>
                            format!("rented at {} an hour each", dollars(quote.usd_per_accelerator_h.value)),
                        Basis::Own(_) => "as a share of machines of one's own".to_owned(),
                    }
                ),
                _ => " Nobody quotes a price for this machine.".to_owned(),
            };
            format!(
                "{} trains on {} tokens in {:.0} days ({:.0} to {:.0}), {} of them useful, on {on}.{paid}{fits}",
                q.shape.model.name,
                tokens(run.tokens),
                run.wall_days,
                run.wall_days_range.low,
                run.wall_days_range.high,
                percent(run.goodput),
            )
        }
        (None, _) => format!(
            "A step of {} on {on} takes {} ({} to {}): {} tokens a second, {} of the peak.{fits}",
            q.shape.model.name,
            seconds(best.step_s),
            seconds(best.step_low_s),
            seconds(best.step_high_s),
            count(best.tokens_per_s),
            percent(best.mfu),
        ),
    }
}

/// Tokens with the suffix that people write.
fn tokens(n: f64) -> String {
    match n {
        n if n >= 1e12 => format!("{}T", digits(n / 1e12, 3)),
        n if n >= 1e9 => format!("{}B", digits(n / 1e9, 3)),
        n => format!("{}M", digits(n / 1e6, 3)),
    }
}

fn facts(r: &Report<'_>, best: &Choice) -> Vec<(String, String)> {
    let mut out = vec![
        (
            seconds(best.step_s),
            format!("a step, {} to {}", seconds(best.step_low_s), seconds(best.step_high_s)),
        ),
        (percent(best.mfu), "of the peak (MFU)".to_owned()),
        (count(best.tokens_per_s), "tokens a second".to_owned()),
        (bytes(best.memory_bytes), "on the fullest rank".to_owned()),
    ];
    if let Some(run) = r.run {
        out.push((format!("{:.1}", run.wall_days), "days in all".to_owned()));
        out.push((percent(run.goodput), "goodput".to_owned()));
        out.push((digits(run.interruptions, 3), "interruptions expected".to_owned()));
        out.push((format!("{}M", digits(run.accelerator_hours / 1e6, 3)), "accelerator-hours".to_owned()));
        if let Some(cost) = run.cost_usd {
            out.push((dollars(cost.value.to_dollars()), "cost of the run".to_owned()));
        }
        if let Some(energy) = &run.energy {
            out.push((format!("{} GWh", digits(energy.mwh.value / 1e3, 3)), "of electricity".to_owned()));
        }
    }
    out
}

/// The best layouts, as they would be given again.
fn best_layouts(answer: &Answer) -> String {
    let mut table = Table::new(&["layout", "step", "low", "high", "MFU", "fullest rank", "bound by"]);
    for c in &answer.best {
        table.row(vec![
            Cell::words(c.placement().to_string()),
            Cell::number(c.step_s, seconds),
            Cell::number(c.step_low_s, seconds),
            Cell::number(c.step_high_s, seconds),
            Cell::number(c.mfu, percent),
            Cell::number(c.memory_bytes, bytes),
            Cell::words(c.bound),
        ]);
    }
    let what = if answer.given { "The layout given" } else { "The best layouts" };
    let searched = match answer.given {
        true => String::new(),
        false => format!(
            "<p class=\"says\">{} layouts were estimated; --layout takes one of these.</p>",
            count(answer.searched.layouts_estimated as f64)
        ),
    };
    format!(
        "<figure id=\"best\"><h3>{what}</h3>{searched}<div class=\"rows\">{}</div></figure>",
        table.html(what)
    )
}

fn assumptions(r: &Report<'_>) -> String {
    let mut all = r.answer.assumptions.clone();
    if let Some(run) = r.run {
        all.extend(run.assumptions.iter().cloned());
        if let Some(Basis::Rent(quote)) = &run.basis {
            all.push(format!("price: {} of {}, {}", quote.name, quote.date, quote.source));
            all.extend(quote.notes.iter().map(|n| format!("price {}: {n}", quote.name)));
        }
    }
    if let Some((own, quote)) = r.owned {
        all.push(format!("owning: servers at {}", own.server_source));
        all.push(format!("rent held against it: {} of {}, {}", quote.name, quote.date, quote.source));
        if let Ok(Some(note)) = quote.age_note(r.today) {
            all.push(note);
        }
    }
    list(&all)
}

/// Numbers of the catalogue that the answer stands on, with their sources.
fn sources(r: &Report<'_>) -> String {
    let cluster = &r.answer.question.cluster;
    let mut entries: Vec<(EntryKind, &str)> = vec![
        (EntryKind::Accelerator, &cluster.accelerator.name),
        (EntryKind::Fabric, &cluster.scale_out.fabric),
    ];
    if let Some(storage) = &cluster.storage {
        entries.push((EntryKind::Storage, &storage.name));
    }
    if let Some(failure) = &cluster.failure {
        entries.push((EntryKind::Failure, failure));
    }
    if let Some((_, quote)) = r.owned {
        entries.push((EntryKind::Price, &quote.name));
        entries.push((EntryKind::Ownership, economics::own::TYPICAL));
    }
    facts_table(r.catalog, &entries)
}
