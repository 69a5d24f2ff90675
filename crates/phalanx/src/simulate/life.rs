//! The days around the steps: failures, recoveries, repairs, checkpoints.

use std::sync::atomic::Ordering;

use economics::failures::{JobFailures, Rates};
use serde_json::{Value, json};
use sim::Rehearsal;
use sim::life::{Lived, Pool, Recovery, Run};
use sim::recovery::{Loss, PlayedJob, Recovered};
use spec::stats::quantile;
use spec::{Error, Result};

use super::{DAY_S, Given, Steps, steps};
use crate::args::Recover;
use crate::{files, output};

/// Share of failures that cost a node where nobody counted causes: 78 % of Llama 3's unexpected interruptions were of
/// hardware (arXiv 2407.21783, section 3.3.4).
const NODE_SHARE: f64 = 0.78;
/// Causes after which the node goes on; all others are of its hardware.
const SPARES_NODE: [&str; 5] = ["software", "network", "maintenance", "unknown", "other"];
/// Causes after which it falls silent, without its agent having said that it goes.
const SILENT: [&str; 4] = ["power_supply", "thermal", "ssd", "fan"];

/// Lives the days that were asked for, and says in `json` what became of them.
pub(super) fn live(
    given: &Given<'_>,
    rehearsal: &Rehearsal<'_>,
    played: &Steps,
    json: &mut Value,
) -> Result<()> {
    let args = given.args;
    let Some((run, stops)) = life(given, rehearsal, played)? else { return Ok(()) };
    let mut lives = Vec::new();
    for k in 0..args.seeds {
        // At least one, so that there is something to say.
        if k > 0 && given.stop.load(Ordering::Relaxed) {
            break;
        }
        lives.push(run.live(args.seed.wrapping_add(k))?);
    }
    json["goodput"] = json!(mean(&lives, |l| l.goodput).unwrap_or(1.0));
    json["interruptions"] = json!(mean(&lives, |l| l.interruptions as f64).unwrap_or(0.0));
    if run.wall_s.is_finite() {
        json["days"] = json!(run.wall_s / DAY_S);
    }
    json["lives"] = spread(&lives, &run);
    json["recovery"] = stops;
    Ok(())
}

/// The run around the steps, where days or failures were asked for; and what follows each kind of loss.
fn life(given: &Given<'_>, rehearsal: &Rehearsal<'_>, played: &Steps) -> Result<Option<(Run, Value)>> {
    let Given { args, answer, scenario, .. } = *given;
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
    // What is left of storage in every step is left of it when checkpoints are written and read.
    let storage_left = scenario.storage_left();
    let storage = answer.storage.as_ref();
    let write_s = storage.map_or(0.0, |s| s.write.value / storage_left);
    let pool = pool(given, &failures)?;
    let (recovery, stops) = recovery(given, &rates, &failures, pool.as_ref())?;
    let mut run = Run {
        step_s: played.step_s,
        wall_s: args.days.map_or(f64::INFINITY, |days| days * DAY_S),
        steps: args.days.is_none().then_some(args.steps),
        failures_per_s: if args.days.is_some() { failures.per_day.value / DAY_S } else { 0.0 },
        recovery,
        pool,
        read_s: storage.map_or(0.0, |s| s.read.value / storage_left),
        stall_s: storage.and_then(|s| s.stall).map_or(write_s, |s| s.value),
        safe_s: write_s,
        interval_steps: 1,
        failing_steps,
    };
    run.safe_s = run.safe_s.max(run.stall_s);
    run.stall_s += slowed_by_burst(given, rehearsal, played, run.safe_s)?;
    run.interval_steps = run.usual_interval();
    Ok(Some((run, stops)))
}

/// Seconds that steps take longer while a checkpoint is written beside them.
fn slowed_by_burst(given: &Given<'_>, rehearsal: &Rehearsal<'_>, played: &Steps, safe_s: f64) -> Result<f64> {
    let bytes = given.answer.storage.as_ref().map_or(0.0, |s| s.checkpoint_bytes);
    if bytes == 0.0 || given.stop.load(Ordering::Relaxed) {
        return Ok(0.0);
    }
    let burst = given.rehearsal(&given.answer.problem, bytes)?;
    let burst = steps(given.args, &burst, given.scenario, given.stop, None)?;
    debug_assert_eq!(rehearsal.ranks(), burst.last.ends.all().count());
    let more_s = (burst.step_s - played.step_s).max(0.0);
    Ok(if burst.last.is_whole { more_s * (safe_s / played.step_s).ceil() } else { 0.0 })
}

/// The nodes of the job, if they were counted.
fn pool(given: &Given<'_>, failures: &JobFailures) -> Result<Option<Pool>> {
    let args = given.args;
    let cluster = &given.answer.problem.cluster;
    if args.spares.is_none() && args.min_nodes.is_none() {
        return Ok(None);
    }
    let nodes = cluster.accelerators.div_ceil(cluster.per_node) as u64;
    let min_nodes = args.min_nodes.unwrap_or(nodes);
    if min_nodes > nodes {
        return Err(Error::user(format!("--min-nodes {min_nodes}, and the job has {nodes} nodes"))
            .hint("with how few it may go on"));
    }
    let repair_s = failures.repair_days.value * DAY_S;
    Ok(Some(Pool { nodes, spares: args.spares.unwrap_or(0), min_nodes, repair_s }))
}

/// What follows each kind of loss.
fn recovery(
    given: &Given<'_>,
    rates: &Rates,
    failures: &JobFailures,
    pool: Option<&Pool>,
) -> Result<(Recovery, Value)> {
    let restart_s = failures.detect_s.value + failures.restart_s.value;
    let losses = losses(failures);
    if given.args.recovery != Some(Recover::Elastic) {
        let of = |(share, loss): &(f64, Loss)| {
            let it = sim::life::Loss { full_s: restart_s, fewer_s: restart_s, takes_node: loss.takes_node() };
            (*share, it)
        };
        let recovery =
            Recovery { losses: losses.iter().map(of).collect(), from_checkpoint: true, join_s: restart_s };
        let stops = json!({ "how": "restart", "stop_s": restart_s, "from": "checkpoint" });
        return Ok((recovery, stops));
    }
    // A few nodes stand for all of them; whether one less is allowed is asked as of all.
    let shrinks = pool.is_some_and(|p| p.min_nodes < p.nodes);
    let full = PlayedJob::usual(1, PlayedJob::NODES);
    let fewer = PlayedJob::usual(0, if shrinks { PlayedJob::NODES - 1 } else { PlayedJob::NODES });
    let (mut out, mut said) = (Vec::new(), Vec::new());
    // A process that takes the lost one's place starts while the others keep theirs.
    let start_s = rates.restart_s.value;
    for (share, loss) in losses {
        let stop_s = |r: &Recovered| r.detect_s + r.meet_s;
        let with_spare = full.lose(loss)?;
        let without = if shrinks { stop_s(&fewer.lose(loss)?) } else { restart_s };
        // Of fewer nodes nobody is started.
        let full_s = stop_s(&with_spare) + start_s;
        let fewer_s = match (loss.takes_node(), shrinks) {
            (false, _) => full_s,
            (true, true) => without,
            (true, false) => without + start_s,
        };
        said.push(json!({
            "loss": loss, "share": share, "detect_s": with_spare.detect_s, "meet_s": with_spare.meet_s,
            "stop_s": full_s, "stop_without_spares_s": fewer_s,
        }));
        out.push((share, sim::life::Loss { full_s, fewer_s, takes_node: loss.takes_node() }));
    }
    let join_s = start_s;
    let recovery = Recovery { losses: out, from_checkpoint: false, join_s };
    Ok((recovery, json!({ "how": "elastic", "losses": said, "from": "memory" })))
}

/// Which share of failures loses what, by their causes.
fn losses(failures: &JobFailures) -> Vec<(f64, Loss)> {
    let counted: f64 = failures.causes.iter().map(|c| c.rate.value).sum();
    if counted <= 0.0 {
        return vec![(1.0 - NODE_SHARE, Loss::Process), (NODE_SHARE, Loss::Agent)];
    }
    let of = |loss: Loss| {
        let is = |name: &str| match (SPARES_NODE.contains(&name), SILENT.contains(&name)) {
            (true, _) => Loss::Process,
            (_, true) => Loss::Node,
            _ => Loss::Agent,
        };
        let rate: f64 = failures.causes.iter().filter(|c| is(&c.name) == loss).map(|c| c.rate.value).sum();
        (rate / counted, loss)
    };
    [Loss::Process, Loss::Agent, Loss::Node].map(of).into_iter().filter(|l| l.0 > 0.0).collect()
}

fn mean(lives: &[Lived], of: impl Fn(&Lived) -> f64) -> Option<f64> {
    (!lives.is_empty()).then(|| lives.iter().map(of).sum::<f64>() / lives.len() as f64)
}

/// Means over lives, and where nine in ten of them lie.
fn spread(lives: &[Lived], run: &Run) -> Value {
    let range = |of: &dyn Fn(&Lived) -> f64| {
        let mut all: Vec<f64> = lives.iter().map(of).collect();
        json!({ "mean": mean(lives, of), "low": quantile(&mut all, 0.05), "high": quantile(&mut all, 0.95) })
    };
    json!({
        "seeds": lives.len(),
        "goodput": range(&|l| l.goodput),
        "interruptions": range(&|l| l.interruptions as f64),
        "steps": range(&|l| l.steps as f64),
        "lost": range(&|l| l.lost),
        "restarts": range(&|l| l.restarts),
        "checkpoints": range(&|l| l.checkpoints),
        "fewer": range(&|l| l.fewer),
        "repairs": range(&|l| l.repairs),
        "checkpoint_every_s": run.interval_steps as f64 * run.step_s,
        "failures_per_day": run.failures_per_s * DAY_S,
        "read_s": run.read_s,
    })
}
