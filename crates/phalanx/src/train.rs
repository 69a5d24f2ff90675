//! `phalanx train`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use comm::TransportChoice;
use spec::run::Resolved;
use spec::{Error, Layout, Origin, Result, RunSpec};
use train::{Mesh, Outcome, RunDir, Sampling, Start, Trainer};

use crate::args::{RunArgs, Train};
use crate::live::{Bytes, Live};
use crate::output;
use crate::ranks::{self, INTERRUPTED, Rank};
use crate::this_machine;

pub(crate) fn train(args: &Train) -> Result<u8> {
    if let Some(rank) = Rank::from_env(args.nproc)? {
        let me = rank.env.rank;
        let code = as_rank(args, &rank).map_err(|e| e.context(format!("rank {me}")))?;
        rank.leave()?;
        return Ok(code);
    }
    let nproc = args.nproc.unwrap_or(1);
    if nproc == 0 {
        return Err(Error::user("--nproc 0, expected at least one rank").hint("leave it out for one rank"));
    }
    if args.stop_after == Some(0) {
        return Err(
            Error::user("--stop-after 0, expected a step from 1").hint("leave it out to train to the end")
        );
    }
    let mut run = load(&args.run, nproc)?;
    let mut env = Vec::new();
    if run.auto_layout {
        this_machine::choose(&mut run, nproc, &args.transport, this_machine::Missing::Measure, args.fresh)?;
        env.push(this_machine::hand_over(&run.layout));
    }
    begin(args, &run)?;
    let prepared = prepare(&run)?;
    if nproc > 1 {
        return ranks::start(nproc, &env);
    }
    let threads = output::threads(run.run.threads.unwrap_or(0));
    go(args, &run, prepared.as_ref(), 0, Mesh::alone(), threads)
}

/// One rank of several. Rank 0 prepares and speaks; whoever started the ranks may have prepared already.
fn as_rank(args: &Train, rank: &Rank) -> Result<u8> {
    let mut run = load(&args.run, rank.env.world)?;
    if run.auto_layout && !this_machine::take_over(&mut run)? {
        this_machine::choose(
            &mut run,
            rank.env.world,
            &args.transport,
            this_machine::Missing::Refuse,
            args.fresh,
        )?;
    }
    let transport = match args.transport.as_str() {
        "shm" => TransportChoice::Shm,
        "tcp" => TransportChoice::Tcp,
        _ => TransportChoice::Auto,
    };
    let world = rank.world(&run.to_toml(), transport)?;
    let first = rank.env.rank == 0;
    let started_by_us = args.nproc.is_some();
    let prepared = if first {
        if !started_by_us {
            begin(args, &run)?;
        }
        train::prepare(&run, &|_| {})?
    } else {
        None
    };
    world.barrier()?;
    let prepared = if first { prepared } else { train::prepare(&run, &|_| {})? };
    let threads = run.run.threads.unwrap_or_else(|| rank.threads());
    let mesh = Mesh::new(world, &run.layout)?;
    go(args, &run, prepared.as_ref(), rank.env.rank, mesh, threads)
}

/// What is checked and moved before any rank opens the run.
fn begin(args: &Train, run: &RunSpec) -> Result<()> {
    let dir = RunDir::new(&run.run.dir);
    if args.fresh {
        move_aside(dir.path())?;
    }
    if args.resume && ckpt::latest(&dir.checkpoints())?.is_none() {
        return Err(Error::user(format!(
            "nothing to resume: no checkpoint in {}",
            dir.checkpoints().display()
        ))
        .hint("leave out --resume to begin anew"));
    }
    Trainer::check(run)?;
    run.layout.validate(&run.model, run.batch.sequences, run.batch.sequence)
}

fn go(
    args: &Train,
    run: &RunSpec,
    prepared: Option<&data::Prepared>,
    rank: usize,
    mesh: Mesh,
    threads: usize,
) -> Result<u8> {
    let saved = ckpt::latest(&RunDir::new(&run.run.dir).checkpoints())?;
    let start = args.init.clone().map_or(Start::Seed, Start::Run);
    let mut trainer = Trainer::open(run.clone(), prepared, rank, mesh, threads, &start, args.trace)?;
    if rank == 0 {
        announce(run, &mut trainer, threads, saved.as_deref());
    }
    let steps = run.train.steps as u64;
    if trainer.step() >= steps {
        if rank == 0 {
            output::say(&format!(
                "all {steps} steps were done before; --fresh begins anew, train.steps goes on"
            ));
        }
        return Ok(0);
    }
    let stop = stop_flag()?;
    let mut live =
        (rank == 0).then(|| Live::new(steps, trainer.step(), run.train.log_every as u64, args.json));
    let outcome = trainer.train(&stop, args.stop_after, &mut |e| {
        if let Some(live) = &mut live {
            live.event(e);
        }
    });
    if let Some(live) = live {
        live.done();
    }
    match outcome? {
        Outcome::Finished if rank == 0 => sample(run, &mut trainer, threads, args.json).map(|()| 0),
        Outcome::Finished => Ok(0),
        Outcome::Stopped => {
            if rank == 0 {
                output::say("stopped; the same command goes on from the checkpoint");
            }
            Ok(if args.stop_after.is_some_and(|n| trainer.step() >= n) { 0 } else { INTERRUPTED })
        }
    }
}

/// Reads the run file and its overrides, and fills what they leave open of the layout for so many ranks.
pub(crate) fn load(args: &RunArgs, world: usize) -> Result<RunSpec> {
    let read = resolve(args)?;
    read.run.model.check_trains()?;
    read.run.layout.check_trains()?;
    if read.run.auto_layout {
        return Ok(read.run);
    }
    let mut run = fill_ranks(&read, world)?;
    if *read.set_by("layout.micro_batch") == Origin::Default {
        widen_micro_batch(&mut run);
    }
    Ok(run)
}

/// A run whose layout is written down.
pub(crate) fn fixed(run: RunSpec) -> Result<RunSpec> {
    if run.auto_layout {
        return Err(Error::user("layout = \"auto\" is chosen when training starts")
            .hint("set layout keys instead, or see phalanx plan --cluster this --model RUN.toml"));
    }
    Ok(run)
}

/// As many sequences at once as make [`TOKENS_AT_ONCE`]. Larger products are faster, and no number changes; a pipeline
/// wants many small micro-batches instead.
fn widen_micro_batch(run: &mut RunSpec) {
    if run.layout.pp > 1 {
        return;
    }
    let batch = &run.batch;
    let fits = |m: usize| {
        let layout = Layout { micro_batch: m, ..run.layout.clone() };
        m * batch.sequence <= TOKENS_AT_ONCE
            && layout.validate(&run.model, batch.sequences, batch.sequence).is_ok()
    };
    if let Some(m) = [8, 4, 2].into_iter().find(|m| fits(*m)) {
        run.layout.micro_batch = m;
    }
}

/// Beyond this many rows products gain nothing more on a CPU, and activations outgrow its caches.
const TOKENS_AT_ONCE: usize = 2048;

/// Data parallelism fills the ranks that a layout leaves over, unless a flag says how many there are.
fn fill_ranks(read: &Resolved, world: usize) -> Result<RunSpec> {
    let run = &read.run;
    let model_ranks = run.layout.tp * run.layout.pp;
    let asked = matches!(read.set_by("layout.dp"), Origin::Set(_));
    if run.layout.dp != 1 || asked || !world.is_multiple_of(model_ranks) {
        return run.layout.validate_world(world).map(|()| run.clone());
    }
    let layout = Layout { dp: world / model_ranks, ..run.layout.clone() };
    layout.validate(&run.model, run.batch.sequences, run.batch.sequence).map_err(|e| {
        let e = if e.to_string().starts_with("layout.dp ") {
            e.context(format!("{world} ranks"))
        } else {
            read.locate(e)
        };
        e.hint("set layout.dp, layout.tp and layout.pp to fit the ranks")
    })?;
    Ok(RunSpec { layout, ..run.clone() })
}

/// Reads the run file and its overrides, for any number of ranks.
pub(crate) fn resolve(args: &RunArgs) -> Result<Resolved> {
    let mut overrides = args.set.clone();
    if let Some(text) = &args.text {
        overrides.push(format!("data.text={}", toml_string(text)));
    }
    let text = args.file.as_deref().map(train::read).transpose();
    let text = text.map_err(|e| e.hint("give the path of a run file, or none for the defaults"))?;
    let name = args.file.as_deref().map(|p| p.display().to_string());
    RunSpec::resolve(name.as_deref().zip(text.as_deref()), &overrides, &train::read)
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
        output::say(&format!(
            "data {} {how}: {} documents, {} tokens",
            p.prefix.display(),
            p.documents,
            p.tokens
        ));
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
    output::say(&format!(
        "run {}: {steps} steps of {tokens} tokens, seed {}",
        run.run.dir.display(),
        run.train.seed
    ));
    if let Some(path) = saved {
        output::say(&format!("resumed from {} at step {}", path.display(), trainer.step()));
    }
}

/// Set by SIGINT and SIGTERM: the run ends after its step, with a checkpoint. A second SIGINT ends it at once; a second
/// SIGTERM does not, because schedulers send one to every process of a job and the launcher passes it on once more.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    use signal_hook::flag::{register, register_conditional_shutdown};
    let stop = Arc::new(AtomicBool::new(false));
    let twice = register_conditional_shutdown(SIGINT, i32::from(INTERRUPTED), stop.clone());
    twice
        .and_then(|_| register(SIGINT, stop.clone()))
        .and_then(|_| register(SIGTERM, stop.clone()))
        .map_err(|e| Error::failure(format!("catch signals: {e}")))?;
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
    let sampling = Sampling {
        temperature: s.temperature,
        top_k: s.top_k.unwrap_or(0),
        top_p: s.top_p,
        seed: run.train.seed,
    };
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
    // Not `with_extension`: names like `lr-0.1` have no extension to replace.
    let old = |n: u32| {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!(".old-{n}"));
        std::path::PathBuf::from(name)
    };
    let free = (1..).map(old).find(|p| !p.exists());
    let to = free.expect("some number is free");
    std::fs::rename(dir, &to).map_err(|e| Error::io("move earlier run", dir, &e))?;
    output::say(&format!("moved the earlier run to {}", to.display()));
    Ok(())
}
