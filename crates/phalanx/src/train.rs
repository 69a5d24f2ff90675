//! `phalanx train`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use spec::{Error, Result, RunSpec};
use train::{Mesh, Outcome, RunDir, Sampling, Start, Trainer};

use crate::args::{RunArgs, Train};
use crate::live::{Bytes, Live};
use crate::output;

/// The exit code of a run that was interrupted and has saved its state.
const INTERRUPTED: u8 = 130;

pub(crate) fn train(args: &Train) -> Result<u8> {
    let run = load(&args.run)?;
    let dir = RunDir::new(&run.run.dir);
    if args.fresh {
        move_aside(dir.path())?;
    }
    let saved = ckpt::latest(&dir.checkpoints())?;
    if args.resume && saved.is_none() {
        return Err(Error::user(format!("nothing to resume: no checkpoint in {}", dir.checkpoints().display()))
            .hint("leave out --resume to begin anew"));
    }
    run.layout.validate_world(1)?;
    let prepared = prepare(&run)?;
    let start = args.init.clone().map_or(Start::Seed, Start::Run);
    let threads = output::threads(run.run.threads.unwrap_or(0));
    let mut trainer = Trainer::open(run.clone(), prepared.as_ref(), 0, Mesh::alone(), threads, &start, args.trace)?;
    announce(&run, &mut trainer, threads, saved.as_deref());
    let steps = run.train.steps as u64;
    if trainer.step() >= steps {
        output::say(&format!("all {steps} steps were done before; --fresh begins anew, train.steps goes on"));
        return Ok(0);
    }
    let mut live = Live::new(steps, trainer.step(), run.train.log_every as u64, args.json);
    let stop = stop_flag()?;
    let outcome = trainer.train(&stop, args.stop_after, &mut |e| live.event(e));
    live.done();
    if args.trace && outcome.is_ok() {
        trainer.record_spans()?;
    }
    match outcome? {
        Outcome::Finished => sample(&run, &mut trainer, threads, args.json).map(|()| 0),
        Outcome::Stopped => {
            output::say("stopped; the same command goes on from the checkpoint");
            Ok(if args.stop_after.is_some_and(|n| trainer.step() >= n) { 0 } else { INTERRUPTED })
        }
    }
}

/// Reads the run file and its overrides.
pub(crate) fn load(args: &RunArgs) -> Result<RunSpec> {
    let mut overrides = args.set.clone();
    if let Some(text) = &args.text {
        overrides.push(format!("data.text={}", toml_string(text)));
    }
    let text = args.file.as_deref().map(train::read).transpose()?;
    let name = args.file.as_deref().map(|p| p.display().to_string());
    RunSpec::load(name.as_deref().zip(text.as_deref()), &overrides, &train::read)
}

/// A string in TOML's quotes.
fn toml_string(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON, and a JSON string is a TOML basic string")
}

fn prepare(run: &RunSpec) -> Result<Option<data::Prepared>> {
    let bytes = Bytes::new();
    let prepared = train::prepare(run, &|p| bytes.update(p));
    bytes.done();
    let prepared = prepared?;
    if let Some(p) = &prepared {
        let how = if p.cached { "from cache" } else { "built" };
        output::say(&format!("data {} {how}: {} documents, {} tokens", p.prefix.display(), p.documents, p.tokens));
    }
    Ok(prepared)
}

fn announce(run: &RunSpec, trainer: &mut Trainer, threads: usize, saved: Option<&Path>) {
    let m = &run.model;
    let steps = run.train.steps;
    let tokens = run.batch.sequence * run.batch.sequences;
    let bytes = trainer.executor().program.memory.total;
    output::say(&format!(
        "model {}: {:.1}M parameters, {} layers, width {}, vocabulary {}; {} on {threads} threads, {}",
        m.name,
        m.param_count() as f64 / 1e6,
        m.layers,
        m.hidden,
        m.vocab,
        run.train.precision,
        crate::show::binary(bytes),
    ));
    output::say(&format!("run {}: {steps} steps of {tokens} tokens, seed {}", run.run.dir.display(), run.train.seed));
    if let Some(path) = saved {
        output::say(&format!("resumed from {} at step {}", path.display(), trainer.step()));
    }
}

/// Set by SIGINT and SIGTERM: the run ends after its step, with a checkpoint. A second signal ends it at once.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let armed = signal_hook::flag::register_conditional_shutdown(signal, i32::from(INTERRUPTED), stop.clone());
        armed
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(|e| Error::failure(format!("catch signal {signal}: {e}")))?;
    }
    Ok(stop)
}

/// Shows what the model has learnt.
fn sample(run: &RunSpec, trainer: &mut Trainer, threads: usize, json: bool) -> Result<()> {
    let has_tokenizer = RunDir::new(&run.run.dir).tokenizer().is_some();
    if run.train.sample_tokens == 0 || !has_tokenizer {
        return Ok(());
    }
    let mut generator = train::Generator::open(&run.run.dir, threads)?;
    let s = &run.sample;
    let sampling =
        Sampling { temperature: s.temperature, top_k: s.top_k.unwrap_or(0), top_p: s.top_p, seed: run.train.seed };
    let mut text = s.prompt.clone();
    generator.text(&s.prompt, run.train.sample_tokens, sampling, &mut |t| text.push_str(t))?;
    if !json {
        output::print(&format!("sample\n{text}"));
    }
    trainer.note_sample(text)
}

/// Renames a run's directory to the first free `NAME.old-N`.
fn move_aside(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let free = (1..).map(|n| dir.with_extension(format!("old-{n}"))).find(|p| !p.exists());
    let to = free.expect("some number is free");
    std::fs::rename(dir, &to).map_err(|e| Error::io("move earlier run", dir, &e))?;
    output::say(&format!("moved the earlier run to {}", to.display()));
    Ok(())
}
