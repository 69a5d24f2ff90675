//! `phalanx simulate`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use economics::failures::Rates;
use plan::answer::Answer;
use serde_json::{Value, json};
use sim::Rehearsal;
use sim::life::{Lived, Run};
use sim::scenario::Scenario;
use sim::world::Folding;
use spec::{Error, Result};

use crate::args::{Plan, Simulate};
use crate::{files, output, planner};

/// More steps than anyone plays one by one.
const STEPS_MAX: u64 = 1_000_000;
/// More lives than an interval needs.
const SEEDS_MAX: u64 = 100_000;
/// Longer than any run.
const DAYS_MAX: f64 = 36_500.0;
const DAY_S: f64 = 86_400.0;

pub(crate) fn run(args: &Simulate) -> Result<u8> {
    match &args.trace {
        Some(path) => trace(path, args.json),
        None => rehearse(args),
    }
}

/// What became of the steps of one life.
struct Steps {
    /// Mean over the steps played.
    step_s: f64,
    slowest_s: f64,
    last: sim::Step,
    events: u64,
}

fn rehearse(args: &Simulate) -> Result<u8> {
    bounds(args)?;
    let answer = planner::best(&question(args))?;
    let choice = answer.best.first().ok_or_else(|| Error::failure("the search found nothing"))?;
    let cluster = &answer.problem.cluster;
    let scenario = match &args.scenario {
        Some(path) => Scenario::parse(&path.display().to_string(), &files::read(path)?, cluster)?,
        None => Scenario::default(),
    };
    let stop = crate::stop::flag()?;
    let start = Instant::now();
    let rehearsal = Rehearsal::new(&answer.problem, choice.placement())?;
    let steps = steps(args, &rehearsal, &scenario, &stop)?;
    let costs = costs(args, &rehearsal, &scenario, &steps, &stop)?;
    let run = life(args, &answer, &scenario, steps.step_s)?;
    let mut lives = Vec::new();
    if let Some(run) = &run {
        for k in 0..args.seeds {
            // At least one, so that there is something to say.
            if k > 0 && stop.load(Ordering::Relaxed) {
                break;
            }
            lives.push(run.live(args.seed.wrapping_add(k))?);
        }
    }
    let wall_s = start.elapsed().as_secs_f64();
    let mut json = json!({
        "model": answer.question.shape.model.name,
        "cluster": cluster.name,
        "layout": choice.placement().to_string(),
        "ranks": rehearsal.ranks(),
        "step_s": steps.step_s,
        "slowest_step_s": steps.slowest_s,
        "predicted_step_s": rehearsal.predicted_s(),
        "goodput": mean(&lives, |l| l.goodput).unwrap_or(1.0),
        "interruptions": mean(&lives, |l| l.interruptions as f64).unwrap_or(0.0),
        "wall_s": wall_s,
        "events": steps.events,
        "classes": steps.last.classes,
        "last_rank": steps.last.last_rank,
        "spent": steps.last.spent,
        "costs": costs,
    });
    if let Some(run) = &run {
        if run.wall_s.is_finite() {
            json["days"] = json!(run.wall_s / DAY_S);
        }
        json["lives"] = spread(&lives, run);
    }
    if args.json {
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
    } else {
        output::print(&text(&json));
    }
    if stop.load(Ordering::Relaxed) {
        output::say("interrupted: this is what was known by then");
        return Ok(crate::ranks::INTERRUPTED);
    }
    Ok(0)
}

fn bounds(args: &Simulate) -> Result<()> {
    let counted = |flag: &str, n: u64, max: u64| match (1..=max).contains(&n) {
        true => Ok(()),
        false => Err(Error::user(format!("--{flag} {n}, expected 1 to {max}"))
            .hint(format!("--{flag} says how many are played"))),
    };
    counted("steps", args.steps, STEPS_MAX)?;
    counted("seeds", args.seeds, SEEDS_MAX)?;
    match args.days {
        Some(days) if !(days > 0.0 && days <= DAYS_MAX) => {
            Err(Error::user(format!("--days {days}, expected more than 0, up to {DAYS_MAX}"))
                .hint("how long the run is, as 54"))
        }
        _ => Ok(()),
    }
}

/// The question to the planner.
fn question(args: &Simulate) -> Plan {
    Plan {
        model: args.model.clone().unwrap_or_default(),
        cluster: args.cluster.clone().unwrap_or_default(),
        accelerators: args.accelerators,
        sequence: args.sequence,
        sequences: args.sequences,
        format: args.format.clone(),
        software: args.software.clone(),
        layout: args.layout.clone(),
        keep: 1,
        catalog: args.catalog.clone(),
        ..Plan::default()
    }
}

/// Plays the steps asked for; steps that are alike, once.
fn steps(
    args: &Simulate,
    rehearsal: &Rehearsal<'_>,
    scenario: &Scenario,
    stop: &AtomicBool,
) -> Result<Steps> {
    let count = if args.days.is_some() || scenario.is_steady() { 1 } else { args.steps };
    let mut last: Option<(sim::world::Disturbed, sim::Step)> = None;
    let (mut sum, mut slowest_s, mut events, mut played_steps) = (0.0, 0.0f64, 0, 0u64);
    for step in 1..=count {
        if played_steps > 0 && stop.load(Ordering::Relaxed) {
            break;
        }
        played_steps += 1;
        let disturbed = scenario.disturbed(step, args.seed);
        let played = match last.take() {
            Some((before, played)) if before == disturbed => played,
            _ => {
                let played = rehearsal.play(&disturbed, Folding::Folded)?;
                events += played.events;
                played
            }
        };
        sum += played.step_s;
        slowest_s = slowest_s.max(played.step_s);
        last = Some((disturbed, played));
    }
    let last = last.ok_or_else(|| Error::failure("no step was played"))?.1;
    Ok(Steps { step_s: sum / played_steps as f64, slowest_s, last, events })
}

/// More things that go wrong than anyone wants the cost of, each.
const COSTS_MAX: usize = 16;

/// What each thing that goes wrong costs a step, in seconds: the step less what it would take without it.
fn costs(
    args: &Simulate,
    rehearsal: &Rehearsal<'_>,
    scenario: &Scenario,
    with: &Steps,
    stop: &AtomicBool,
) -> Result<Vec<Value>> {
    let mut out = Vec::new();
    for name in scenario.names().into_iter().take(COSTS_MAX) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let without = steps(args, rehearsal, &scenario.without(name), stop)?;
        out.push(json!({ "of": name, "seconds": with.step_s - without.step_s }));
    }
    Ok(out)
}

/// The run around the steps, where days or failures were asked for.
fn life(args: &Simulate, answer: &Answer, scenario: &Scenario, step_s: f64) -> Result<Option<Run>> {
    let failing_steps: Vec<u64> = scenario.failing_steps().collect();
    if args.days.is_none() && failing_steps.is_empty() {
        return Ok(None);
    }
    let cluster = &answer.problem.cluster;
    if args.days.is_some() && cluster.failure.is_none() {
        output::say(&format!(
            "note: the catalogue has no failure rates for {}: those of failure.{} are taken; give others as failure = \"NAME\" in a platform of a --catalog file",
            cluster.name,
            economics::failures::USUAL
        ));
    }
    let rates = Rates::of(&files::catalog(&args.catalog)?, cluster)?;
    let failures = rates.of_job(cluster.accelerators);
    let storage = answer.storage.as_ref();
    let write_s = storage.map_or(0.0, |s| s.write.value);
    let mut run = Run {
        step_s,
        wall_s: args.days.map_or(f64::INFINITY, |days| days * DAY_S),
        steps: args.days.is_none().then_some(args.steps),
        failures_per_s: if args.days.is_some() { failures.per_day.value / DAY_S } else { 0.0 },
        restart_s: failures.detect_s.value + failures.restart_s.value,
        read_s: storage.map_or(0.0, |s| s.read.value),
        stall_s: storage.and_then(|s| s.stall).map_or(write_s, |s| s.value),
        safe_s: write_s,
        interval_steps: 1,
        failing_steps,
    };
    run.safe_s = run.safe_s.max(run.stall_s);
    run.interval_steps = run.usual_interval();
    Ok(Some(run))
}

fn mean(lives: &[Lived], of: impl Fn(&Lived) -> f64) -> Option<f64> {
    (!lives.is_empty()).then(|| lives.iter().map(of).sum::<f64>() / lives.len() as f64)
}

/// Means over lives, and where nine in ten of them lie.
fn spread(lives: &[Lived], run: &Run) -> Value {
    let range = |of: &dyn Fn(&Lived) -> f64| {
        let mut all: Vec<f64> = lives.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        let at = |q: f64| all[((all.len() - 1) as f64 * q).round() as usize];
        json!({ "mean": mean(lives, of), "low": at(0.05), "high": at(0.95) })
    };
    json!({
        "seeds": lives.len(),
        "goodput": range(&|l| l.goodput),
        "interruptions": range(&|l| l.interruptions as f64),
        "steps": range(&|l| l.steps as f64),
        "lost": range(&|l| l.lost),
        "restarts": range(&|l| l.restarts),
        "checkpoints": range(&|l| l.checkpoints),
        "checkpoint_every_s": run.interval_steps as f64 * run.step_s,
        "failures_per_day": run.failures_per_s * DAY_S,
        "restart_s": run.restart_s + run.read_s,
    })
}

fn text(json: &Value) -> String {
    let n = |v: &Value| v.as_f64().unwrap_or(0.0);
    let mut out = format!(
        "{} on {}, {} ranks, {}\nstep       {:.4} s played, {:.4} s in closed form\n",
        json["model"].as_str().unwrap_or_default(),
        json["cluster"].as_str().unwrap_or_default(),
        json["ranks"],
        json["layout"].as_str().unwrap_or_default(),
        n(&json["step_s"]),
        n(&json["predicted_step_s"])
    );
    if let Some(spent) = json["spent"].as_object() {
        let shown = spent.iter().filter(|(_, v)| n(v) > 0.0);
        let parts: Vec<String> = shown
            .map(|(k, v)| format!("{} {:.4} s", k.trim_end_matches("_s").replace('_', " "), n(v)))
            .collect();
        out += &format!("rank {:<6}{}\n", json["last_rank"], parts.join(", "));
    }
    for cost in json["costs"].as_array().into_iter().flatten() {
        out +=
            &format!("{:<11}costs {:.4} s\n", cost["of"].as_str().unwrap_or_default(), n(&cost["seconds"]));
    }
    if let Some(lives) = json.get("lives") {
        let range = |key: &str, by: f64| {
            let r = &lives[key];
            format!("{:.1} ({:.1} to {:.1})", by * n(&r["mean"]), by * n(&r["low"]), by * n(&r["high"]))
        };
        out += &format!(
            "lived      {} interruptions, goodput {} %: lost work {} %, restarts {} %, checkpoints {} % of {} lives\n",
            range("interruptions", 1.0),
            range("goodput", 100.0),
            range("lost", 100.0),
            range("restarts", 100.0),
            range("checkpoints", 100.0),
            lives["seeds"]
        );
    }
    out += &format!(
        "played     {} events of {} classes of ranks in {:.3} s",
        json["events"],
        json["classes"],
        n(&json["wall_s"])
    );
    out
}

fn trace(path: &Path, as_json: bool) -> Result<u8> {
    let place = path.display().to_string();
    if path.extension().is_some_and(|e| e == "parquet") {
        return Err(Error::user(format!("{place}: a trace is read as comma-separated text")).hint(
            "python -c \"import pandas; pandas.read_parquet('ops.parquet').to_csv('ops.csv', index=False)\"",
        ));
    }
    let blame = sim::trace::blame(&place, &sim::trace::parse(&place, &files::read(path)?)?)?;
    if as_json {
        output::print(&serde_json::to_string_pretty(&blame).expect("numbers are JSON"));
        return Ok(0);
    }
    let percent = |slowdown: f64| 100.0 * (slowdown - 1.0);
    let mut out = format!(
        "{} steps of {} workers: {:.3} s a step, {:.3} s if every op took what is usual: {:.1} % slower\n",
        blame.steps,
        blame.workers,
        blame.step_s,
        blame.ideal_step_s,
        percent(blame.slowdown)
    );
    let cause = serde_json::to_value(blame.cause).expect("a word");
    out += &format!(
        "cause: {} (forward and backward times correlate by {:.2})\n",
        cause.as_str().unwrap_or_default(),
        blame.forward_backward_correlation
    );
    out += "if only this were as it was:\n";
    for s in &blame.by_stage {
        out += &format!("  stage {:<24} {:+6.1} %\n", s.stage, percent(s.slowdown));
    }
    for w in blame.by_worker.iter().take(8) {
        out += &format!("  data-parallel rank {:<11} {:+6.1} %\n", w.dp_rank, percent(w.slowdown));
    }
    for o in blame.by_op.iter().take(6) {
        out += &format!("  {:<30} {:+6.1} %\n", o.op, percent(o.slowdown));
    }
    output::print(out.trim_end());
    Ok(0)
}
