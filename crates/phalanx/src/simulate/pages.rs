//! Answers of `phalanx simulate` as text and as pages.

use report::{Rehearsed, rehearsal_page, trace_page};
use serde_json::Value;
use sim::Recording;
use sim::trace::Blame;

/// The page of a rehearsal, with what `ranks` did where that was kept.
pub(super) fn rehearsal(json: &Value, recording: Option<&Recording<'_>>, ranks: &[usize]) -> String {
    let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
    let timelines = recording.into_iter().flat_map(|r| ranks.iter().map(|rank| (*rank, r.timeline(*rank))));
    rehearsal_page(&Rehearsed {
        title: format!("{} on {}, {}", text("model"), text("cluster"), text("layout")),
        data: json,
        timelines: timelines.collect(),
    })
}

/// The page of a trace.
pub(super) fn trace(place: &str, blame: &Blame) -> String {
    trace_page(place, blame, &serde_json::to_value(blame).expect("numbers are JSON"))
}

/// A rehearsal's answer for people.
pub(super) fn text(json: &Value) -> String {
    let n = |v: &Value| v.as_f64().unwrap_or(0.0);
    let played = match json["reached_s"].as_f64() {
        Some(reached) => format!("not played to its end: {reached:.4} s of it"),
        None => format!("{:.4} s played", n(&json["step_s"])),
    };
    let mut out = format!(
        "{} on {}, {} ranks, {}\nstep       {played}, {:.4} s in closed form\n",
        json["model"].as_str().unwrap_or_default(),
        json["cluster"].as_str().unwrap_or_default(),
        json["ranks"],
        json["layout"].as_str().unwrap_or_default(),
        n(&json["predicted_step_s"])
    );
    if let Some(spent) = json["spent"].as_object() {
        let shown = spent.iter().filter(|(_, v)| n(v) > 0.0);
        let parts: Vec<String> = shown
            .map(|(k, v)| format!("{} {:.4} s", k.trim_end_matches("_s").replace('_', " "), n(v)))
            .collect();
        // A JSON value pads nothing.
        out += &format!("{:<11}{}\n", format!("rank {} ", json["last_rank"]), parts.join(", "));
    }
    out += &waited(json);
    for cost in json["costs"].as_array().into_iter().flatten() {
        out +=
            &format!("{:<11}costs {:.4} s\n", cost["of"].as_str().unwrap_or_default(), n(&cost["seconds"]));
    }
    for of in json["not_played"].as_array().into_iter().flatten() {
        let name = of["of"].as_str().unwrap_or_default();
        let (step, steps, by) = (&of["step"], &of["steps"], of["played_by"].as_str().unwrap_or_default());
        out +=
            &format!("{name:<11}not played: it is in step {step}, after the {steps} played; {by} plays it\n");
    }
    for other in json["as_if"].as_array().into_iter().flatten() {
        let (what, step_s) = (other["as_if"].as_str().unwrap_or_default(), n(&other["step_s"]));
        out +=
            &format!("as if {what}: {step_s:.4} s, {:+.1} %\n", 100.0 * (step_s / n(&json["step_s"]) - 1.0));
    }
    out += &lived(json);
    out += &format!(
        "played     {} events of {} classes of ranks in {:.3} s",
        json["events"],
        json["classes"],
        n(&json["wall_s"])
    );
    out
}

/// Parts of the critical path that are shown.
const PARTS: usize = 4;

/// What the critical path leads through.
fn waited(json: &Value) -> String {
    let n = |v: &Value| v.as_f64().unwrap_or(0.0);
    let Some(path) = json.get("critical_path").filter(|p| p.is_object()) else { return String::new() };
    let list = |key: &str, name: &dyn Fn(&Value) -> String| {
        let all = path[key].as_array().into_iter().flatten().take(PARTS);
        let parts: Vec<String> = all.map(|v| format!("{} {:.4} s", name(v), n(&v["seconds"]))).collect();
        parts.join(", ")
    };
    format!(
        "critical   {}\n           {}\n",
        list("by_what", &|v| v["what"].as_str().unwrap_or_default().to_owned()),
        list("by_rank", &|v| format!("rank {}", v["rank"]))
    )
}

/// What became of the days.
fn lived(json: &Value) -> String {
    let n = |v: &Value| v.as_f64().unwrap_or(0.0);
    let mut out = String::new();
    let Some(lives) = json.get("lives") else { return out };
    let range = |key: &str, by: f64| {
        let r = &lives[key];
        format!("{:.1} ({:.1} to {:.1})", by * n(&r["mean"]), by * n(&r["low"]), by * n(&r["high"]))
    };
    out += &format!(
        "lived      {} interruptions, goodput {} %: lost work {} %, recoveries {} %, checkpoints {} % of {} lives\n",
        range("interruptions", 1.0),
        range("goodput", 100.0),
        range("lost", 100.0),
        range("restarts", 100.0),
        range("checkpoints", 100.0),
        lives["seeds"]
    );
    if n(&lives["fewer"]["mean"]) + n(&lives["repairs"]["mean"]) > 0.0 {
        out += &format!(
            "nodes      missing ones cost {} %, waiting for repairs {} %\n",
            range("fewer", 100.0),
            range("repairs", 100.0)
        );
    }
    for loss in json["recovery"]["losses"].as_array().into_iter().flatten() {
        out += &format!(
            "  {:<8} {:>5.1} % of failures: known after {:.1} s, {:.1} s until it goes on, {:.1} s without a spare\n",
            loss["loss"].as_str().unwrap_or_default(),
            100.0 * n(&loss["share"]),
            n(&loss["detect_s"]),
            n(&loss["stop_s"]),
            n(&loss["stop_without_spares_s"])
        );
    }
    out
}
