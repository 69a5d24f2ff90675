//! `phalanx train`.

use std::path::Path;
use std::time::Duration;

use comm::TransportChoice;
use elastic::Orders;
use launch::{Launcher, RankEnv};
use spec::run::{DeviceChoice, Resolved};
use spec::{Error, Layout, Origin, Result, RunSpec};
use train::{
    Agent, Asked, Beginning, Cpu, Device, DirLock, Drill, Event, Mesh, Outcome, RunDir, Sampling, Trainer,
    check_run,
};

use crate::args::{RunArgs, Train};
use crate::busy::busy;
use crate::device;
use crate::live::{Bytes, Live};
use crate::output;
use crate::places::{self, Places};
use crate::ranks::{self, INTERRUPTED, Losses, Rank};
use crate::stop::{self, Early};
use crate::this_machine;

pub(crate) fn train(args: &Train) -> Result<u8> {
    let early = Early::watch(!ranks::started_by_us())?;
    drills(args)?;
    let args = &with_flags(args)?;
    ranks::check_mpi(transport(args))?;
    if let Some(env) = Rank::env(args.nproc)? {
        let me = env.rank;
        let done = match places::agent(&env)? {
            Some((agent, orders)) => join(args, agent, orders, early),
            None => rank_of_several(args, env, early),
        };
        return done.map_err(|e| e.context(format!("rank {me}")));
    }
    let nproc = args.nproc.unwrap_or(1);
    if nproc == 0 {
        return Err(Error::user("--nproc 0, expected at least one rank").hint("leave it out for one rank"));
    }
    if let Some(least) = args.min_nproc.filter(|least| *least == 0 || *least > nproc) {
        return Err(Error::user(format!("--min-nproc {least}, expected 1 to the {nproc} of --nproc"))
            .hint("it is the fewest ranks to go on with when others are lost"));
    }
    if args.stop_after == Some(0) {
        return Err(
            Error::user("--stop-after 0, expected a step from 1").hint("leave it out to train to the end")
        );
    }
    let mut run = load(args, nproc)?;
    device::expect(&run.run)?;
    let fresh = fresh(args);
    let _lock = own(&run, fresh)?;
    let mut env = Vec::new();
    if run.auto_layout {
        this_machine::choose(&mut run, nproc, &args.transport, this_machine::Missing::Measure, fresh)?;
        env.push(this_machine::hand_over(&run.layout));
    }
    let mut begin = begin(args, &run, asked(args))?;
    prepare(&run, &mut begin)?;
    if nproc > 1 {
        drop(early);
        let losses = Losses { max_restarts: args.max_restarts, min_nproc: args.min_nproc };
        return ranks::start(nproc, losses, &env);
    }
    let threads = output::threads(run.run.threads.unwrap_or(0));
    let device = device::open(&run.run, 0, threads)?;
    go(args, &run, begin, Mesh::alone(), device, threads, early)
}

fn rank_of_several(args: &Train, env: RankEnv, early: Early) -> Result<u8> {
    // A run file that is wrong is wrong for every rank: none has to meet the others to end by it.
    let run = match load(args, env.world) {
        // Nobody gathers what tasks of srun say, and ranks of a node see the same files.
        Err(e) if env.launcher == Launcher::Slurm && env.local_rank > 0 => return Ok(e.exit_code()),
        loaded => loaded?,
    };
    let rank = Rank::meet(env, transport(args))?;
    let code = as_rank(args, run, &rank, early)?;
    rank.leave()?;
    Ok(code)
}

/// One rank of several. Rank 0 owns the run's directory, prepares and speaks; whoever started the ranks may have done so
/// already.
fn as_rank(args: &Train, mut run: RunSpec, rank: &Rank, early: Early) -> Result<u8> {
    let transport = transport(args);
    let first = rank.env.rank == 0;
    let started_by_us = ranks::started_by_us();
    let fresh = fresh(args);
    if run.auto_layout && !this_machine::take_over(&mut run)? {
        let missing = this_machine::Missing::Refuse;
        this_machine::choose(&mut run, rank.env.world, &args.transport, missing, fresh)?;
    }
    let world = rank.world(&run.to_toml(), transport, Duration::from_secs(run.run.timeout_s))?;
    rank.say_how_they_talk(&world, transport);
    let mut mine = None;
    if first {
        device::expect(&run.run)?;
        let lock = if started_by_us { None } else { Some(own(&run, fresh)?) };
        let mut begin = begin(args, &run, asked(args))?;
        begin.prepare(&run, &|_| {})?;
        mine = Some((lock, begin));
    }
    world.barrier()?;
    let (_lock, begin) = match mine {
        Some(mine) => mine,
        None => {
            let mut begin = Beginning::decide(&run, asked(args))?;
            begin.prepare(&run, &|_| {})?;
            (None, begin)
        }
    };
    let threads = run.run.threads.unwrap_or_else(|| rank.threads());
    let mesh = Mesh::new(world, &run.layout)?;
    let device = device::open(&run.run, rank.env.local_rank, threads)?;
    device::agree(&mesh, &*device)?;
    go(args, &run, begin, mesh, device, threads, early)
}

pub(crate) fn transport(args: &Train) -> TransportChoice {
    choice(&args.transport)
}

/// What `--transport` says, which takes no other words.
pub(crate) fn choice(word: &str) -> TransportChoice {
    match word {
        "shm" => TransportChoice::Shm,
        "tcp" => TransportChoice::Tcp,
        "mpi" => TransportChoice::Mpi,
        _ => TransportChoice::Auto,
    }
}

/// Whether an earlier run is to be moved aside; a restart of the same job is no earlier run.
pub(crate) fn fresh(args: &Train) -> bool {
    args.fresh && !ranks::restarted()
}

/// Takes the run's directory for this process, after moving an earlier run aside if `fresh`.
pub(crate) fn own(run: &RunSpec, fresh: bool) -> Result<DirLock> {
    let dir = &run.run.dir;
    let mut lock = DirLock::take(dir)?;
    if fresh {
        let elsewhere = run.checkpoint.dir.as_deref();
        if let Some(holds) = elsewhere.filter(|dir| !matches!(ckpt::latest(dir), Ok(None))) {
            return Err(Error::user(format!(
                "--fresh begins anew, but {} may hold checkpoints of an earlier run",
                holds.display()
            ))
            .hint("set checkpoint.dir to another place, or remove those first"));
        }
        // What cannot begin moves nothing.
        program::Program::build(&program::Request::of(run, 0), &|_, _| 0)?;
        if run.run.device == DeviceChoice::Cuda {
            device::open(&run.run, 0, 1)?;
        }
        if move_aside(dir)? {
            lock = DirLock::take(dir)?;
        }
    }
    if let Some(note) = lock.note() {
        output::say(note);
    }
    Ok(lock)
}

pub(crate) fn asked(args: &Train) -> Asked {
    Asked {
        init: args.init.clone(),
        accept_changed_data: args.accept_changed_data,
        accept_changed_schedule: args.accept_changed_schedule,
        restarted: ranks::restarted(),
    }
}

/// What is checked before any rank opens the run.
pub(crate) fn begin(args: &Train, run: &RunSpec, asked: Asked) -> Result<Beginning> {
    let begin = Beginning::decide(run, asked)?;
    run.validate_layout(&run.layout)?;
    if begin.resumes() {
        return Ok(begin);
    }
    let dir = RunDir::of(run);
    if dir.run_file().exists() && ranks::started_by_us() {
        // Whoever started this rank has said so.
        return Ok(begin);
    }
    if dir.run_file().exists() {
        output::say(&format!(
            "{} was started before and has no checkpoint: it begins at step 0",
            dir.path().display()
        ));
    } else if args.resume && ranks::has_restarts() {
        output::say(&format!("nothing to resume yet in {}: it begins at step 0", dir.path().display()));
    } else if args.resume {
        return Err(Error::user(format!(
            "nothing to resume: no checkpoint in {}",
            dir.checkpoints().display()
        ))
        .hint("leave out --resume to begin anew"));
    }
    Ok(begin)
}

fn go(
    args: &Train,
    run: &RunSpec,
    begin: Beginning,
    mesh: Mesh,
    device: Box<dyn Device>,
    threads: usize,
    early: Early,
) -> Result<u8> {
    let rank = mesh.rank();
    let speaks = rank == 0;
    let busy = speaks.then(|| busy("opening data, building the step program and filling in the weights"));
    let trainer = Trainer::open(run.clone(), begin, rank, mesh, device, args.trace)?;
    drop(busy);
    go_on(args, trainer, threads, early)
}

/// One rank of several whose agent can bring them together again.
fn join(args: &Train, agent: Agent, orders: Orders, early: Early) -> Result<u8> {
    let places = Box::new(Places::new(args));
    match Trainer::join(places, agent, orders, args.trace)? {
        Some(trainer) => {
            let threads = trainer.threads();
            go_on(args, trainer, threads, early)
        }
        None => Ok(0),
    }
}

/// The same with flags that stand for keys as keys.
fn with_flags(args: &Train) -> Result<Train> {
    let mut args = args.clone();
    if let Some(n) = args.verify_every {
        once("--verify-every", "run.verify_every", &args.run.set)?;
        args.run.set.push(format!("run.verify_every={n}"));
    }
    Ok(args)
}

/// Refuses a flag beside a `--set` of the key that it stands for: which of them is meant is not ours to guess.
fn once(flag: &str, key: &str, set: &[String]) -> Result<()> {
    let sets_key = |text: &&String| text.split('=').next().is_some_and(|set| set.trim() == key);
    match set.iter().find(sets_key) {
        Some(text) => Err(Error::user(format!("{flag} beside --set {text}: both say what {key} is"))
            .hint(format!("leave one of them out; both go over {key} of a run file"))),
        None => Ok(()),
    }
}

fn drills(args: &Train) -> Result<Vec<Drill>> {
    args.drill.iter().map(|text| text.parse()).collect()
}

/// Refuses drills that can never strike a run of so many ranks.
fn can_strike(args: &Train, run: &RunSpec, ranks: usize) -> Result<()> {
    let last = (run.train.steps as u64).min(args.stop_after.unwrap_or(u64::MAX));
    drills(args)?.iter().zip(&args.drill).try_for_each(|(drill, text)| {
        drill.check(run, ranks, last).map_err(|e| e.context(format!("--drill {text}")))
    })
}

/// Trains to the end, and tells of it where this is the first rank.
fn go_on(args: &Train, mut trainer: Trainer, threads: usize, early: Early) -> Result<u8> {
    let run = trainer.run().clone();
    let speaks = trainer.rank() == 0;
    trainer.set_drills(drills(args)?);
    if speaks {
        announce(&run, &mut trainer, threads);
    }
    if let Some(text) = trainer.after_the_end() {
        if speaks {
            output::say(&text);
        }
        return Ok(0);
    }
    let stop = stop::flag()?;
    drop(early);
    let mut live = speaks.then(|| Live::new(&run, trainer.step(), args.json));
    let mut each = |e| {
        if let Event::Placed { rank, step } = e {
            // The first rank speaks, whoever it is now.
            live = (rank == 0).then(|| live.take().unwrap_or_else(|| Live::new(&run, step, args.json)));
        }
        if let Some(live) = &mut live {
            live.event(e);
        }
    };
    let outcome = trainer.train(&stop, args.stop_after, &mut each);
    let outcome = outcome.and_then(|outcome| match &mut live {
        Some(live) if outcome == Outcome::Finished => {
            sample(&run, &mut trainer, threads, live).map(|()| outcome)
        }
        _ => Ok(outcome),
    });
    let shown = live.map_or(Ok(()), Live::done);
    let code = match outcome? {
        Outcome::Finished | Outcome::Spare => 0,
        Outcome::Stopped => {
            if trainer.rank() == 0 {
                output::say("stopped; the same command goes on from the checkpoint");
            }
            if args.stop_after.is_some_and(|n| trainer.step() >= n) { 0 } else { INTERRUPTED }
        }
    };
    shown.map(|()| code)
}

/// Reads the run file and its overrides, and fills what they leave open of the layout for so many ranks.
pub(crate) fn load(args: &Train, world: usize) -> Result<RunSpec> {
    let mut read = resolve_open(&args.run)?;
    // What a layout is on so many ranks it may not be on fewer: those come first, then what it is held to.
    if read.run.auto_layout {
        read.check_layout()?;
    } else {
        fill_ranks(&mut read, world)?;
    }
    check_run(&Cpu::new(1), &read.run)?;
    if let Some(stop) = args.stop_after.filter(|stop| *stop > read.run.train.steps as u64) {
        return Err(Error::user(format!(
            "--stop-after {stop} is beyond train.steps = {}",
            read.run.train.steps
        ))
        .hint("leave it out to train to the end, or raise train.steps"));
    }
    if !args.fresh && *read.set_by("schedule.warmup_steps") == Origin::Default {
        keep_warmup(&mut read.run);
    }
    if read.run.auto_layout {
        can_strike(args, &read.run, world)?;
        return Ok(read.run);
    }
    read.run.layout.validate_world(world)?;
    let mut run = read.run.clone();
    if *read.set_by("layout.micro_batch") == Origin::Default {
        widen_micro_batch(&mut run);
    }
    can_strike(args, &run, world)?;
    Ok(run)
}

/// [`load`] for the ranks that are left, or that came, if `lenient`: then the layout is the nearest that they can run. Says
/// why it is that one.
pub(crate) fn load_again(args: &Train, world: usize, lenient: bool) -> Result<(RunSpec, String)> {
    let mut read = resolve_open(&args.run)?;
    if !args.fresh && *read.set_by("schedule.warmup_steps") == Origin::Default {
        keep_warmup(&mut read.run);
    }
    let chosen = read.run.auto_layout && this_machine::take_over(&mut read.run)?;
    if read.run.auto_layout {
        let missing = this_machine::Missing::Refuse;
        this_machine::choose(&mut read.run, world, &args.transport, missing, args.fresh)?;
    }
    let filled = if chosen { Ok(()) } else { fill_ranks(&mut read, world) };
    let filled = filled.and_then(|()| read.run.layout.validate_world(world));
    if !lenient {
        filled?;
    }
    let mut run = read.run.clone();
    let mut why = "the layout that the run began with".to_owned();
    if lenient {
        let legal = |layout: &Layout| run.validate_layout(layout).is_ok();
        let Some(fitted) = run.layout.fitted_where(world, &legal) else {
            return Err(Error::user(format!("no layout like that of the run takes {world} ranks"))
                .hint("start more ranks; the same command goes on from the last checkpoint"));
        };
        (run.layout, why) = (fitted.layout, fitted.why);
    } else {
        can_strike(args, &run, world)?;
    }
    check_run(&Cpu::new(1), &run)?;
    if !chosen && *read.set_by("layout.micro_batch") == Origin::Default {
        widen_micro_batch(&mut run);
    }
    Ok((run, why))
}

/// A longer run has a longer warmup by default, but not one that goes on: its warmup is past.
fn keep_warmup(run: &mut RunSpec) {
    let dir = RunDir::of(run);
    let goes_on = ckpt::latest(&dir.checkpoints()).is_ok_and(|found| found.is_some());
    if let Some(earlier) = dir.load().ok().filter(|_| goes_on)
        && earlier.schedule.warmup_steps < run.train.steps
    {
        run.schedule.warmup_steps = earlier.schedule.warmup_steps;
    }
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
    let fits = |m: usize| {
        let layout = Layout { micro_batch: m, ..run.layout.clone() };
        m * run.batch.sequence <= TOKENS_AT_ONCE && run.validate_layout(&layout).is_ok()
    };
    if let Some(m) = [8, 4, 2].into_iter().find(|m| fits(*m)) {
        run.layout.micro_batch = m;
    }
}

/// Beyond this many rows products gain nothing more on a CPU, and activations outgrow its caches.
const TOKENS_AT_ONCE: usize = 2048;

/// Data parallelism fills the ranks that a layout leaves over, unless a flag says how many there are.
///
/// # Errors
/// If the layout does not suit the model or the batch. Whether it has as many ranks is asked elsewhere.
fn fill_ranks(read: &mut Resolved, world: usize) -> Result<()> {
    let Layout { dp, tp, cp, pp, .. } = read.run.layout;
    let model_ranks = tp.saturating_mul(cp).saturating_mul(pp);
    let asked = matches!(read.set_by("layout.dp"), Origin::Set(_));
    if dp != 1 || asked || !world.is_multiple_of(model_ranks) {
        return read.check_layout();
    }
    let layout = Layout { dp: world / model_ranks, ..read.run.layout.clone() };
    read.run.validate_layout(&layout).map_err(|e| {
        let e = if e.to_string().starts_with("layout.dp ") {
            e.context(format!("{world} ranks"))
        } else {
            read.locate(e)
        };
        e.hint("set layout.dp, layout.tp, layout.cp and layout.pp to fit the ranks")
    })?;
    read.run.layout = layout;
    Ok(())
}

/// Reads the run file and its overrides.
pub(crate) fn resolve(args: &RunArgs) -> Result<Resolved> {
    let read = resolve_open(args)?;
    read.check_layout()?;
    Ok(read)
}

/// The same, for any number of ranks: whether the layout suits the model depends on it.
fn resolve_open(args: &RunArgs) -> Result<Resolved> {
    let flags = [("--preset", "model.preset", &args.preset), ("--text", "data.text", &args.text)];
    for (flag, key, _) in flags.into_iter().filter(|(.., given)| given.is_some()) {
        once(flag, key, &args.set)?;
    }
    let mut overrides = args.set.clone();
    // In front, as if written first: keys of the model that are set go over it.
    overrides.splice(..0, args.preset.as_deref().map(|name| format!("model.preset={}", toml_string(name))));
    if let Some(text) = &args.text {
        overrides.push(format!("data.text={}", toml_string(text)));
    }
    let text = args.file.as_deref().map(train::read).transpose();
    let text = text.map_err(|e| e.hint("give the path of a run file, or none for the defaults"))?;
    let name = args.file.as_deref().map(|p| p.display().to_string());
    RunSpec::resolve_open(name.as_deref().zip(text.as_deref()), &overrides, &train::read)
}

/// A string in TOML's quotes.
fn toml_string(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON, and a JSON string is a TOML basic string")
}

fn prepare(run: &RunSpec, begin: &mut Beginning) -> Result<()> {
    let bytes = Bytes::new();
    let done = begin.prepare(run, &|p| bytes.update(p));
    drop(bytes);
    done?;
    if let Some(p) = begin.prepared() {
        let how = if p.cached { "from cache" } else { "built" };
        output::say(&format!(
            "data {} {how}: {} documents, {} tokens",
            p.prefix.display(),
            p.documents,
            p.tokens
        ));
        p.manifest.warnings.iter().for_each(|w| output::say(&format!("warning: {}", w)));
    }
    Ok(())
}

fn announce(run: &RunSpec, trainer: &mut Trainer, threads: usize) {
    let m = &run.model;
    let steps = run.train.steps;
    let full = run.batch.tokens();
    let tokens = match run.batch.tokens_after(0) {
        first if first < full => format!("{first} to {full}"),
        _ => full.to_string(),
    };
    let bytes = trainer.executor().program.memory.total;
    let device = trainer.executor().device();
    let on = if device.kind() == "cpu" { format!("{threads} threads") } else { device.name() };
    output::say(&format!(
        "model {}: {} parameters, {} layers, width {}, vocabulary {}; {} on {on}, {}",
        m.name,
        output::count(m.param_count() as f64),
        m.layers,
        m.hidden,
        m.vocab,
        run.train.precision,
        crate::show::binary(bytes),
    ));
    device.ways().iter().for_each(|ways| output::say(ways));
    output::say(&format!(
        "run {}: {steps} steps of {tokens} tokens, seed {}",
        run.run.dir.display(),
        run.train.seed
    ));
    let copies = trainer.copies_bytes();
    if copies > 0 {
        output::say(&format!(
            "a lost rank costs no step: copies of weights and moments in memory take {} a rank",
            crate::show::binary(copies)
        ));
    }
    trainer.notes().for_each(output::say);
    if let Some(path) = trainer.resumed() {
        output::say(&format!("resumed from {} at step {}", path.display(), trainer.step()));
    }
}

/// Shows what the model has learnt.
fn sample(run: &RunSpec, trainer: &mut Trainer, threads: usize, live: &mut Live) -> Result<()> {
    let has_tokenizer = RunDir::of(run).tokenizer().is_some();
    if run.train.sample_tokens == 0 || !has_tokenizer {
        return Ok(());
    }
    let _busy = busy("sampling text");
    let mut generator = train::Generator::open(&run.run.dir, || Box::new(Cpu::new(threads)))?;
    let s = &run.sample;
    let sampling = Sampling {
        temperature: s.temperature,
        top_k: s.top_k.unwrap_or(0),
        top_p: s.top_p,
        seed: run.train.seed,
    };
    let mut text = s.prompt.clone();
    generator.text(&s.prompt, run.train.sample_tokens, sampling, &mut |t| text.push_str(t))?;
    trainer.note_sample(text, &mut |e| live.event(e));
    Ok(())
}

/// Renames a run's directory to the first free `NAME.old-N`; one that holds no run stays.
fn move_aside(dir: &Path) -> Result<bool> {
    let run = RunDir::new(dir);
    if !run.run_file().exists() && ckpt::latest(&run.checkpoints())?.is_none() {
        return Ok(false);
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
    Ok(true)
}
