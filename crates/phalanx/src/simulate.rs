//! `phalanx simulate`.

mod answers;
mod kineto;
mod life;
mod pages;
mod parquet;
mod trace;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use plan::answer::Answer;
use plan::estimate::Problem;
use serde_json::{Value, json};
use sim::scenario::Scenario;
use sim::world::{Folding, StorageUse};
use sim::{Rehearsal, Step};
use spec::{Error, Result};

use crate::args::{Plan, Simulate};
use crate::{files, output, planner};
use answers::AsIf;

/// More steps than anyone plays one by one.
const STEPS_MAX: u64 = 1_000_000;
/// More lives than an interval needs.
const SEEDS_MAX: u64 = 100_000;
/// Longer than any run.
const DAYS_MAX: f64 = 36_500.0;
const DAY_S: f64 = 86_400.0;

pub(crate) fn run(args: &Simulate) -> Result<u8> {
    match &args.trace {
        Some(path) => trace::run(path, args),
        None => rehearse(args),
    }
}

/// What became of the steps of one life.
struct Steps {
    /// Mean over the steps played.
    step_s: f64,
    slowest_s: f64,
    last: Step,
    events: u64,
}

/// Everything that a rehearsal is made from.
struct Given<'a> {
    args: &'a Simulate,
    answer: &'a Answer,
    scenario: &'a Scenario,
    stop: &'a AtomicBool,
}

fn rehearse(args: &Simulate) -> Result<u8> {
    bounds(args)?;
    let as_if: Vec<AsIf> = args.as_if.iter().map(|text| AsIf::parse(text)).collect::<Result<_>>()?;
    let html = args.html.as_deref().map(|path| files::Pending::create("--html", path)).transpose()?;
    let perfetto =
        args.perfetto.as_deref().map(|path| files::Pending::create("--perfetto", path)).transpose()?;
    let answer = planner::best(&question(args))?;
    chosen(&answer)?;
    let cluster = &answer.problem.cluster;
    let scenario = match &args.scenario {
        Some(path) => Scenario::parse(&path.display().to_string(), &files::read(path)?, cluster)?,
        None => Scenario::default(),
    };
    let ranks = args.ranks.as_deref().map(|text| answers::ranks(text, cluster.accelerators)).transpose()?;
    counts(args, &scenario)?;
    let stop = crate::stop::flag()?;
    let start = Instant::now();
    let given = Given { args, answer: &answer, scenario: &scenario, stop: &stop };
    let rehearsal = given.rehearsal(&answer.problem, 0.0)?;
    let first = scenario.disturbed(1, args.seed);
    let recording = rehearsal.record(&first, Folding::Folded, answers::KEPT_MAX)?;
    let steps = steps(args, &rehearsal, &scenario, &stop, Some(recording.step().clone()))?;
    let mut json = given.played(&rehearsal, &steps);
    if steps.last.is_whole {
        json["costs"] = json!(given.costs(&rehearsal, &steps)?);
        json["as_if"] = json!(given.as_if(&as_if)?);
        let kept = Some(&recording).filter(|r| r.is_kept());
        if let Some(recording) = kept {
            json["critical_path"] = answers::path(recording);
        }
        life::live(&given, &rehearsal, &steps, &mut json)?;
        json["wall_s"] = json!(start.elapsed().as_secs_f64());
        let ranks = ranks.unwrap_or_else(|| vec![steps.last.last_rank]);
        if let Some(file) = perfetto {
            file.commit(&answers::perfetto(answers::needed(kept)?, &ranks)?)?;
        }
        if let Some(file) = html {
            file.commit(&pages::rehearsal(&json, kept, &ranks))?;
        }
    } else {
        // No step was played to its end: how far it came is all that is known.
        json["step_s"] = Value::Null;
        json["slowest_step_s"] = Value::Null;
        json["reached_s"] = json!(steps.last.step_s);
        json["wall_s"] = json!(start.elapsed().as_secs_f64());
    }
    if args.json {
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
    } else {
        output::print(&pages::text(&json));
    }
    if stop.load(Ordering::Relaxed) {
        output::say("interrupted: this is what was known by then");
        return Ok(crate::ranks::INTERRUPTED);
    }
    Ok(0)
}

/// There is a layout to play. One that does not fit is played all the same, and not without a word: a published run may have had
/// a stack that takes less than the one that is priced.
fn chosen(answer: &Answer) -> Result<()> {
    let choice = answer.best.first().ok_or_else(|| Error::failure("the search found nothing"))?;
    if let Err(e) = planner::fits(answer, choice, "it is played all the same") {
        output::say(&format!("note: {e}"));
    }
    Ok(())
}

fn bounds(args: &Simulate) -> Result<()> {
    let counted = |flag: &str, n: u64, max: u64| match (1..=max).contains(&n) {
        true => Ok(()),
        false => Err(Error::user(format!("--{flag} {n}, expected 1 to {max}"))
            .hint(format!("--{flag} says how many are played"))),
    };
    counted("steps", args.steps, STEPS_MAX)?;
    counted("seeds", args.seeds, SEEDS_MAX)?;
    if args.min_nodes == Some(0) {
        return Err(Error::user("--min-nodes 0, expected at least 1")
            .hint("it is the fewest nodes that the job goes on with"));
    }
    if args.days.is_none() && (args.spares.is_some() || args.min_nodes.is_some()) {
        return Err(Error::user("--spares and --min-nodes without --days")
            .hint("nodes are lost over days, as --days 54"));
    }
    match args.days {
        Some(days) if !(days > 0.0 && days <= DAYS_MAX) => {
            Err(Error::user(format!("--days {days:?}, expected more than 0, up to {DAYS_MAX}"))
                .hint("how long the run is, as 54"))
        }
        _ => Ok(()),
    }
}

/// Refuses flags that change nothing here: ranks that nothing shows, what follows failures where nothing fails.
fn counts(args: &Simulate, scenario: &Scenario) -> Result<()> {
    if args.ranks.is_some() && args.perfetto.is_none() && args.html.is_none() {
        return Err(Error::user("--ranks without --perfetto or --html: nothing shows them")
            .hint("name a file to show them in, as --perfetto step.json"));
    }
    if args.days.is_some() || scenario.failing_steps().next().is_some() {
        return Ok(());
    }
    let given = [("--recovery", args.recovery.is_some()), ("--seeds", args.seeds > 1)];
    given.into_iter().filter(|(_, is_given)| *is_given).try_for_each(|(flag, _)| {
        Err(Error::user(format!("{flag}, and nothing fails"))
            .hint("failures come over days, as --days 54, or with [[fail]] in a --scenario"))
    })
}

/// Steps that are played one by one: of days one stands for all.
fn counted(args: &Simulate) -> u64 {
    if args.days.is_some() { 1 } else { args.steps }
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

/// Plays the steps asked for, but for the `first` if it was played already; steps that are alike, once.
fn steps(
    args: &Simulate,
    rehearsal: &Rehearsal<'_>,
    scenario: &Scenario,
    stop: &AtomicBool,
    first: Option<Step>,
) -> Result<Steps> {
    let count = if scenario.is_steady() { 1 } else { counted(args) };
    let (mut sum, mut slowest_s, mut played_steps) = (0.0, 0.0f64, 0u64);
    let mut events = first.as_ref().map_or(0, |step| step.events);
    let mut last = first.map(|step| (scenario.disturbed(1, args.seed), step));
    for step in 1..=count {
        if played_steps > 0 && stop.load(Ordering::Relaxed) {
            break;
        }
        let disturbed = scenario.disturbed(step, args.seed);
        if last.as_ref().is_none_or(|(before, _)| *before != disturbed) {
            let played = rehearsal.play(&disturbed, Folding::Folded)?;
            events += played.events;
            // A step that was stopped counts only where there is no other.
            if !played.is_whole && played_steps > 0 {
                break;
            }
            last = Some((disturbed, played));
        }
        let step_s = last.as_ref().map_or(0.0, |(_, played)| played.step_s);
        sum += step_s;
        slowest_s = slowest_s.max(step_s);
        played_steps += 1;
    }
    let last = last.ok_or_else(|| Error::failure("no step was played"))?.1;
    Ok(Steps { step_s: sum / played_steps as f64, slowest_s, last, events })
}

impl<'a> Given<'a> {
    /// The step ready to be played, on a machine that may differ from the one asked about, with what storage is known.
    fn rehearsal(&self, problem: &'a Problem, checkpoint_bytes: f64) -> Result<Rehearsal<'a>> {
        let choice = self.answer.best.first().ok_or_else(|| Error::failure("the search found nothing"))?;
        let rehearsal = Rehearsal::new(problem, choice.placement())?.until(self.stop);
        let known = self.answer.storage.as_ref().zip(problem.cluster.storage.as_ref());
        let Some((estimate, storage)) = known else { return Ok(rehearsal) };
        let ranks = rehearsal.ranks() as f64;
        Ok(rehearsal.with_storage(StorageUse {
            read_rate: storage.read_bytes_per_s.value,
            write_rate: storage.write_bytes_per_s.value,
            read_bytes: estimate.load_bytes / ranks,
            write_bytes: checkpoint_bytes / ranks,
            shares_ports: self.scenario.storage_on_fabric,
        }))
    }

    /// What was played, as data.
    fn played(&self, rehearsal: &Rehearsal<'_>, steps: &Steps) -> Value {
        let best = self.answer.best.first();
        json!({
            "model": self.answer.question.shape.model.name,
            "cluster": self.answer.problem.cluster.name,
            "layout": best.map(|choice| choice.placement().to_string()),
            "fits": best.is_some_and(|choice| choice.fits),
            "ranks": rehearsal.ranks(),
            "step_s": steps.step_s,
            "slowest_step_s": steps.slowest_s,
            "predicted_step_s": rehearsal.predicted_s(),
            "goodput": 1.0,
            "interruptions": 0.0,
            "events": steps.events,
            "classes": steps.last.classes,
            "last_rank": steps.last.last_rank,
            "spent": steps.last.spent,
            "not_played": self.not_played(),
        })
    }
}
