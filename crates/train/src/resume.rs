//! Whether a run may go on from a checkpoint: nothing that decided its past may have changed.

use spec::run::Difference;
use spec::{Error, Result, RunSpec, ScheduleKind};

use crate::begin::Beginning;
use crate::run_dir::RunDir;

/// Compares the run file with the one that the run was started with.
///
/// # Errors
/// If numbers of past steps would change, or the checkpoint lies beyond the last step.
pub(crate) fn check(
    run: &RunSpec,
    dir: &RunDir,
    checkpoint: &ckpt::Checkpoint,
    begin: &mut Beginning,
) -> Result<()> {
    let step = checkpoint.step();
    if step > run.train.steps as u64 {
        return Err(Error::user(format!(
            "the newest checkpoint is of step {step}, beyond train.steps = {}",
            run.train.steps
        ))
        .hint("raise train.steps, or start another run with run.dir=PATH"));
    }
    let earlier = match dir.load() {
        Ok(earlier) => earlier,
        Err(e) if checkpoint.manifest().meta.fingerprint == run.fingerprint() => {
            begin.notes.push(format!("{e}; by its checkpoint's fingerprint it is this run"));
            return Ok(());
        }
        Err(e) => {
            return Err(e
                .context(format!("tell which run {} holds", dir.path().display()))
                .hint("put its run.toml back, or give the very keys that it was started with"));
        }
    };
    // An imported model has learnt nothing here yet: only its shape is given.
    let own_tokenizer = dir.tokenizer().is_some() && !crate::begin::is_text(run);
    let decides = |d: &Difference| {
        d.key.starts_with("model.") || (step > 0 && !(own_tokenizer && d.key == "data.vocab_size"))
    };
    let differences: Vec<Difference> = run.differences(&earlier).into_iter().filter(decides).collect();
    begin.source_was = Some(earlier.data.source.clone());
    begin.tokenizer_was.clone_from(&earlier.data.tokenizer);
    if differences.is_empty() {
        return Ok(());
    }
    if !differences.iter().all(is_schedule) {
        return Err(run.not_the_run(&differences));
    }
    let Some(change) = past_rate(run, &earlier, step) else { return Ok(()) };
    let what = format!("{}: {change}", Difference::list(&differences));
    if begin.asked.accept_changed_schedule {
        begin.accepted.push(format!("--accept-changed-schedule: {what}"));
        return Ok(());
    }
    Err(Error::user(what).hint(format!("{}; {}", extendable(&earlier), other_ways(run))))
}

/// Keys that change nothing but learning rates and the length of a run.
fn is_schedule(d: &Difference) -> bool {
    d.key == "train.steps" || d.key == "optim.lr" || d.key.starts_with("schedule.")
}

/// The first learning rate up to `done` that would not be what it was.
fn past_rate(run: &RunSpec, earlier: &RunSpec, done: u64) -> Option<String> {
    let changed = |s: &usize| run.lr_at(*s).to_bits() != earlier.lr_at(*s).to_bits();
    let step = (1..=done as usize).find(changed)?;
    let (is, was) = (run.lr_at(step), earlier.lr_at(step));
    Some(format!("the learning rate of step {step}, which is done, was {was:.4e} and would be {is:.4e}"))
}

/// Which schedules let a run go on for longer.
fn extendable(run: &RunSpec) -> String {
    let s = &run.schedule;
    let kind = s.kind.name();
    match s.kind {
        ScheduleKind::Constant => format!("schedule.kind = {kind} can be extended at any time"),
        ScheduleKind::Wsd => format!(
            "schedule.kind = {kind} can be extended until its decay begins, here after step {}",
            run.train.steps - s.decay_steps
        ),
        ScheduleKind::Cosine | ScheduleKind::Linear => format!(
            "schedule.kind = {kind} cannot be extended; constant can at any time, wsd until its decay begins"
        ),
    }
}

/// How to go on all the same.
fn other_ways(run: &RunSpec) -> String {
    format!(
        "--init {} --set run.dir=NEW trains on from the weights as another run; --accept-changed-schedule goes on here on purpose, and the journal says so",
        run.run.dir.display()
    )
}

/// What a run of which all steps are done says about going on.
pub(crate) fn after_the_end(run: &RunSpec) -> String {
    let steps = run.train.steps;
    let how = match run.schedule.kind {
        ScheduleKind::Constant => "a larger train.steps goes on; ".to_owned(),
        _ => format!(
            "a larger train.steps would change past learning rates: {}; {}; ",
            extendable(run),
            other_ways(run)
        ),
    };
    format!("all {steps} steps were done before; {how}--fresh begins anew")
}
