//! The pages of rehearsals and of traces.

use serde_json::Value;
use sim::trace::Blame;

use crate::figures::{self, Timed};
use crate::page::Page;
use crate::text::{count, digits, percent, seconds};

/// A rehearsal, as its page shows it.
pub struct Rehearsed<'a> {
    /// Model, cluster and layout.
    pub title: String,
    /// The answer as data, which the page carries.
    pub data: &'a Value,
    /// What chosen ranks did.
    pub timelines: Vec<(usize, Vec<sim::Bar>)>,
}

/// The page of a rehearsal.
pub fn rehearsal_page(r: &Rehearsed<'_>) -> String {
    let n = |pointer: &str| r.data.pointer(pointer).and_then(Value::as_f64);
    let step_s = n("/step_s").unwrap_or(0.0);
    let sentence = format!(
        "A step takes {} as it is played message by message, {} in closed form.",
        seconds(step_s),
        seconds(n("/predicted_step_s").unwrap_or(0.0))
    );
    let mut page = Page::new(&r.title, &sentence);
    let mut facts = vec![(count(n("/ranks").unwrap_or(0.0)), "ranks".to_owned())];
    if let Some(days) = n("/days") {
        facts.push((percent(n("/goodput").unwrap_or(0.0)), format!("goodput over {} days", digits(days, 3))));
        facts.push((count(n("/interruptions").unwrap_or(0.0)), "interruptions".to_owned()));
    }
    facts.push((count(n("/events").unwrap_or(0.0)), "events on the clock".to_owned()));
    page.facts(&facts);

    page.section("waits", "What the step waited for");
    if let Some(path) = r.data.get("critical_path").filter(|p| p.is_object()) {
        let whats = timed(&path["by_what"], "what", "seconds");
        page.figure(&figures::seconds_by(
            "path",
            "The critical path, by what went on",
            "what",
            &whats,
            step_s,
        ));
        let ranks = timed(&path["by_rank"], "rank", "seconds");
        let ranks: Vec<Timed> =
            ranks.into_iter().map(|t| Timed { name: format!("rank {}", t.name), ..t }).collect();
        page.figure(&figures::seconds_by("path-ranks", "The critical path, by rank", "rank", &ranks, step_s));
    }
    let spent: Vec<Timed> =
        r.data["spent"].as_object().into_iter().flatten().map(|(k, v)| spent(k, v)).collect();
    let title = format!("What rank {} did, which was done last", count(n("/last_rank").unwrap_or(0.0)));
    page.figure(&figures::seconds_by("spent", &title, "what", &spent, step_s));
    if let Some(figure) = figures::rank_timelines(&r.timelines, step_s) {
        page.figure(&figure);
    }

    let (costs, as_if) =
        (timed(&r.data["costs"], "of", "seconds"), timed(&r.data["as_if"], "as_if", "step_s"));
    if !costs.is_empty() || !as_if.is_empty() {
        page.section("otherwise", "What things cost, and what if");
    }
    if !costs.is_empty() {
        page.figure(&figures::seconds_by("costs", "What each thing costs a step", "of", &costs, step_s));
    }
    if !as_if.is_empty() {
        page.figure(&figures::seconds_by("as-if", "The step, if", "if", &as_if, step_s));
    }
    if let Some(lives) = r.data.get("lives").filter(|l| l.is_object()) {
        page.section("days", "Over days");
        page.figure(&figures::lives(lives));
    }
    page.finish(r.data)
}

fn spent(key: &str, value: &Value) -> Timed {
    Timed { name: key.trim_end_matches("_s").replace('_', " "), seconds: value.as_f64().unwrap_or(0.0) }
}

/// Entries of a list, whose names are text or numbers.
fn timed(list: &Value, name: &str, seconds: &str) -> Vec<Timed> {
    let of = |v: &Value| {
        let name = v[name].as_str().map_or_else(|| v[name].to_string(), str::to_owned);
        Timed { name, seconds: v[seconds].as_f64().unwrap_or(0.0) }
    };
    list.as_array().into_iter().flatten().map(of).collect()
}

/// The page of what slowed a traced run.
pub fn trace_page(place: &str, blame: &Blame, data: &Value) -> String {
    let slower = blame.slowdown - 1.0;
    let sentence = format!(
        "Steps took {}, {} longer than if every op had taken what is usual for its kind.",
        seconds(blame.step_s),
        percent(slower)
    );
    let mut page = Page::new(&format!("What slowed {place}"), &sentence);
    let cause = data["cause"].as_str().unwrap_or_default().to_owned();
    page.facts(&[
        (cause, "explains most".to_owned()),
        (count(blame.workers as f64), "workers".to_owned()),
        (count(blame.steps as f64), "steps".to_owned()),
        (
            digits(blame.forward_backward_correlation, 3),
            "correlation of forward and backward times".to_owned(),
        ),
    ]);
    page.section("blame", "If only this were as it was");
    let slowed = |name: String, slowdown: f64| (name, slowdown);
    let stages: Vec<_> =
        blame.by_stage.iter().map(|s| slowed(format!("stage {}", s.stage), s.slowdown)).collect();
    page.figure(&figures::slowdowns("stages", "Stages", &stages));
    let workers: Vec<_> = blame
        .by_worker
        .iter()
        .map(|w| slowed(format!("data-parallel rank {}", w.dp_rank), w.slowdown))
        .collect();
    page.figure(&figures::slowdowns("workers", "Data-parallel ranks", &workers));
    let ops: Vec<_> = blame.by_op.iter().map(|o| slowed(o.op.to_owned(), o.slowdown)).collect();
    page.figure(&figures::slowdowns("ops", "Kinds of ops", &ops));
    page.finish(data)
}
