//! `phalanx plan`.

mod compare;
mod margin;
mod report;
pub(crate) mod text;

use std::path::Path;
use std::time::Instant;

use economics::Date;
use economics::objective::Chosen;
use economics::run::Ask;
use indicatif::{ProgressBar, ProgressStyle};
use plan::answer::{Answer, Choice, Question, default_batch, sequences_for};
use plan::estimate::Updates;
use plan::models;
use plan::shape::Shape;
use plan::software::{self, Software};
use plan::strategy::Strategy;
use serde_json::Value;
use spec::run::Resolved;
use spec::{
    Catalog, Cluster, DType, Error, HfModel, NumberFormat, Optimizer, Origin, Result, RunSpec, suggest,
};
use stacks::Emitted;

use crate::args::{Plan, PlanCommand, PlanOr};
use crate::{economy, files, output};

/// More layouts than anyone reads; each is held while the search runs.
const KEEP_MAX: usize = 10_000;
/// Layouts kept to find one that another stack can run.
const KEEP_TO_EMIT: usize = 256;

/// Plans, or puts two plans side by side.
pub(crate) fn run(args: &PlanOr) -> Result<u8> {
    match args {
        PlanOr::Plan(args) => plan(args),
        PlanOr::Two(PlanCommand::Compare { a, b, json, html }) => {
            compare::compare(a, b, *json, html.as_deref())
        }
    }
}

/// An answer with what surrounds it.
struct Answered {
    catalog: Catalog,
    answer: Answer,
    ask: Option<Ask>,
    run: Option<Chosen>,
    today: Date,
    seconds: f64,
    threads: usize,
    pool: rayon::ThreadPool,
}

impl Answered {
    /// As `--json` prints it.
    fn json(&self) -> Value {
        let mut json = self.answer.to_json(self.seconds, self.threads);
        if let Some(chosen) = &self.run {
            economy::add_json(&mut json, chosen);
        }
        json
    }
}

fn answered(args: &Plan) -> Result<Answered> {
    let catalog = economy::catalog(&args.catalog, args.economy.price.as_deref())?;
    let question = question(args, &catalog)?;
    let today = economy::today(args.economy.today.as_deref())?;
    let ask = economy::ask(&args.economy, question.tokens, args.layout.is_some())?;
    let threads = output::threads_asked(args.threads)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| {
        Error::failure(format!("start {threads} threads: {e}")).hint("give fewer with --threads")
    })?;
    let (mut answer, mut seconds) = pool.install(|| answer(question, args))?;
    let mut run = None;
    if let Some(ask) = &ask {
        let start = Instant::now();
        let chosen = pool.install(|| economy::choose(&catalog, answer, args, ask))?;
        seconds += start.elapsed().as_secs_f64();
        answer = chosen.answer.clone();
        run = Some(chosen);
    }
    answer.assumptions.extend(margin::said(&answer));
    Ok(Answered { catalog, answer, ask, run, today, seconds, threads, pool })
}

fn plan(args: &Plan) -> Result<u8> {
    if args.cluster == "this" {
        if args.html.is_some() {
            return Err(Error::user("--html with --cluster this: its plan has no page")
                .hint("leave --html out, or name a cluster of the catalogue"));
        }
        return crate::this_machine::plan(args);
    }
    if let Some(path) = &args.machine {
        return Err(Error::user(format!(
            "--machine {} counts only with --cluster this: {} is of the catalogue",
            path.display(),
            args.cluster
        ))
        .hint("leave one of them out"));
    }
    if args.experts_of.is_some() {
        return Err(Error::user(format!(
            "--experts-of with --cluster {}: its plan has even experts",
            args.cluster
        ))
        .hint("leave --experts-of out, or plan for --cluster this"));
    }
    let map = args.rank_map.as_deref().map(|path| {
        rank_format(path)?;
        files::Pending::create("--rank-map", path)
    });
    let map = map.transpose()?;
    let page = args.html.as_deref().map(|path| files::Pending::create("--html", path)).transpose()?;
    let all = answered(args)?;
    let Answered { answer, pool, .. } = &all;
    let mut chosen = answer.best.first().ok_or_else(|| Error::failure("the search found nothing"))?;
    if !chosen.fits {
        // Nothing is written, and no other stack's arguments are printed, for a layout that cannot run.
        if args.emit.is_none() {
            print(&all, args)?;
        }
        return fits(answer, chosen, "no file was written").map(|()| 0);
    }
    if let Some(page) = page {
        let calibration = files::calibration(args.calibration.as_deref())?;
        let html = pool.install(|| {
            let run = (all.ask.as_ref(), all.run.as_ref().map(|c| &c.run));
            report::page(&all.catalog, &calibration, answer, all.json(), run, all.today)
        })?;
        page.commit(&html)?;
    }
    let mut emitted = None;
    if let Some(stack) = &args.emit {
        let (choice, e) = first_emitted(stack, answer)?;
        chosen = choice;
        emitted = Some(e);
    }
    if let Some((map, path)) = map.zip(args.rank_map.as_deref()) {
        map.commit(&ranks(path, answer, chosen)?)?;
    }
    if let Some(e) = emitted {
        output::print(&e.text);
        e.notes.iter().for_each(|note| output::say(&format!("note: {note}")));
        output::say(&format!("layout: {}", chosen.placement()));
    } else {
        print(&all, args)?;
    }
    Ok(0)
}

/// The answer, as data or as text.
fn print(all: &Answered, args: &Plan) -> Result<()> {
    let Answered { answer, pool, seconds, threads, .. } = all;
    let explained = if args.explain { Some(pool.install(|| answer.explain())?) } else { None };
    if args.json {
        let mut json = all.json();
        if let Some(explained) = explained {
            json["explain"] = serde_json::to_value(explained).expect("numbers are JSON");
        }
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
        return Ok(());
    }
    let mut out = all.run.as_ref().map(economy::text::first).unwrap_or_default();
    out += &text::answer(answer, *seconds, *threads, explained.as_deref());
    if let Some(chosen) = &all.run {
        out += &economy::text::run(chosen);
    }
    output::print(&out);
    Ok(())
}

/// A layout that was given and cannot run is wrong input, though its answer is printed; `so` says what follows.
pub(crate) fn fits(answer: &Answer, chosen: &Choice, so: &str) -> Result<()> {
    if chosen.fits {
        return Ok(());
    }
    let room = answer.question.cluster.accelerator.memory_bytes.value;
    let gb = |x: f64| x / 1e9;
    let what = format!(
        "layout {} does not fit: its fullest rank takes {:.1} GB of {:.1} GB; {so}",
        chosen.placement(),
        gb(chosen.memory_bytes),
        gb(room)
    );
    Err(Error::user(what).hint(
        "more tp or pp, zero=3 or recompute=full take less; without --layout the best that fits is found",
    ))
}

fn question(args: &Plan, catalog: &Catalog) -> Result<Question> {
    let cluster = catalog.cluster(&args.cluster, args.accelerators)?;
    let doubt = catalog.meaning(&args.cluster).ok().and_then(|m| m.doubt(&args.cluster));
    doubt.iter().for_each(|doubt| output::say(&format!("note: {doubt}")));
    let (shape, said) = model_and_recipe(args)?;
    let usual = said.batch.unwrap_or_else(|| default_batch(&shape));
    let format = format(args.format.as_deref().or(said.format), &cluster)?;
    if !(1..=KEEP_MAX).contains(&args.keep) {
        return Err(Error::user(format!("--keep {}, expected 1 to {KEEP_MAX}", args.keep))
            .hint("the best layouts are printed, this many"));
    }
    let positive = |flag: &str, n: Option<usize>| match n {
        Some(0) => Err(Error::user(format!("--{flag} 0, expected at least 1"))
            .hint(format!("leave --{flag} out for what is usual for the model"))),
        n => Ok(n),
    };
    let sequence = positive("sequence", args.sequence)?.unwrap_or(usual.1);
    let sequences = match &args.batch {
        Some(batch) => {
            let tokens = tokens("--batch", batch)?;
            let nearest = (tokens / sequence as f64).round().max(1.0) as usize;
            // Whole sequences are meant as they are; a round number of tokens is meant about.
            let exact = (nearest * sequence) as f64 == tokens;
            let sequences = if exact { nearest } else { sequences_for(nearest, cluster.accelerators) };
            output::say(&format!(
                "--batch {batch}: {sequences} sequences of {sequence} tokens, {:.3}M tokens{}",
                (sequences * sequence) as f64 / 1e6,
                if sequences == nearest { "" } else { ", which the accelerators split well" }
            ));
            sequences
        }
        None => match positive("sequences", args.sequences)? {
            Some(n) => n,
            None if said.batch.is_some() && sequence == usual.1 => usual.0,
            // The usual tokens of a step, in sequences of the length asked for.
            None => sequences_for((usual.0.saturating_mul(usual.1) / sequence).max(1), cluster.accelerators),
        },
    };
    let keep = if args.emit.is_some() { args.keep.max(KEEP_TO_EMIT) } else { args.keep };
    let wanted = match (&args.software, &args.emit) {
        (Some(name), _) => Some(stack(name)?),
        (None, Some(target)) => Some(stack(stacks::software(target)?)?),
        (None, None) => None,
    };
    Ok(Question {
        shape,
        cluster,
        software: wanted,
        format,
        sequence,
        sequences,
        tokens: args.tokens.as_deref().map(|t| tokens("--tokens", t)).transpose()?,
        keep,
        trainable_only: args.trainable_only,
        strategy: match &args.layout {
            Some(layout) if !layout.contains('=') => Some(Strategy::parse(layout)?),
            _ => None,
        },
        optimizer: Updates {
            rule: args
                .optimizer
                .as_deref()
                .map(optimizer)
                .transpose()?
                .or(said.optimizer)
                .unwrap_or_default(),
            average: args.ema || said.average,
        },
    })
}

/// The number format asked for, or what the accelerator has in 16 bit.
fn format(asked: Option<&str>, cluster: &Cluster) -> Result<NumberFormat> {
    let Some(asked) = asked else {
        let format = cluster.accelerator.sixteen_bit();
        if format != NumberFormat::Bf16 {
            output::say(&format!("note: --format {format}: {} has no bf16", cluster.accelerator.name));
        }
        return Ok(format);
    };
    NumberFormat::parse(&asked.to_lowercase()).ok_or_else(|| {
        let known = || NumberFormat::all().map(NumberFormat::name);
        Error::user(format!("unknown number format \"{asked}\""))
            .hint(suggest::hint(asked, known().collect::<Vec<_>>()))
    })
}

fn optimizer(name: &str) -> Result<Optimizer> {
    Optimizer::parse(name).ok_or_else(|| {
        Error::user(format!("unknown optimizer \"{name}\"")).hint(suggest::hint(name, ["adamw", "muon"]))
    })
}

fn stack(name: &str) -> Result<Software> {
    let wanted = name.to_lowercase();
    Software::named(&wanted).ok_or_else(|| {
        Error::user(format!("unknown training stack \"{name}\""))
            .hint(suggest::hint(&wanted, software::ALL.iter().map(|s| s.name)))
    })
}

/// The best layout, or the one given, as `plan` answers.
pub(crate) fn best(args: &Plan) -> Result<Answer> {
    let question = question(args, &files::catalog(&args.catalog)?)?;
    Ok(answer(question, args)?.0)
}

/// The answer, and the seconds that it took.
fn answer(question: Question, args: &Plan) -> Result<(Answer, f64)> {
    let calibration = files::calibration(args.calibration.as_deref())?;
    let start = Instant::now();
    if let Some(layout) = args.layout.as_ref().filter(|_| question.strategy.is_none()) {
        let answer = plan::answer::estimate_given(question, layout, &calibration)?;
        return Ok((answer, start.elapsed().as_secs_f64()));
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} searches") {
        bar.set_style(style);
    }
    let answer = plan::answer::plan(question, &calibration, &|done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Ok((answer?, seconds))
}

/// The best layout that the stack can run, written for it.
fn first_emitted<'a>(stack: &str, answer: &'a Answer) -> Result<(&'a Choice, Emitted)> {
    let mut refused: Option<Error> = None;
    for choice in answer.best.iter().chain(&answer.pareto) {
        match stacks::emit(stack, &answer.problem, choice.placement()) {
            Ok(emitted) => {
                if let Some(why) = refused {
                    let best = &answer.best[0];
                    output::say(&format!(
                        "note: not the fastest layout ({}, {}), since {why}; this one takes {}",
                        best.placement(),
                        text::seconds(best.step_s),
                        text::seconds(choice.step_s)
                    ));
                }
                return Ok((choice, emitted));
            }
            Err(e) => refused = Some(refused.unwrap_or(e)),
        }
    }
    Err(refused.unwrap_or_else(|| Error::failure("the search found nothing")))
}

enum RankFormat {
    Csv,
    Json,
}

fn rank_format(path: &Path) -> Result<RankFormat> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("csv") => Ok(RankFormat::Csv),
        Some("json") => Ok(RankFormat::Json),
        _ => Err(Error::user(format!("--rank-map {}: neither .csv nor .json", path.display()))
            .hint("name it ranks.csv or ranks.json")),
    }
}

fn ranks(path: &Path, answer: &Answer, choice: &Choice) -> Result<String> {
    let per_node = answer.problem.cluster.per_node;
    Ok(match rank_format(path)? {
        RankFormat::Csv => stacks::rank_csv(choice.placement(), per_node),
        RankFormat::Json => {
            let all: Vec<stacks::Place> = stacks::ranks(choice.placement(), per_node).collect();
            serde_json::to_string(&all).expect("numbers are JSON") + "\n"
        }
    })
}

/// What a run file says beside its model; nothing of what it leaves open.
#[derive(Default)]
struct Recipe {
    /// Sequences and their tokens.
    batch: Option<(usize, usize)>,
    format: Option<&'static str>,
    optimizer: Option<Optimizer>,
    /// An average of the weights is kept.
    average: bool,
}

/// The model, and what its run file says that no flag does.
fn model_and_recipe(args: &Plan) -> Result<(Shape, Recipe)> {
    if Path::new(&args.model).extension().is_none_or(|e| e != "toml") {
        return Ok((model(&args.model)?, Recipe::default()));
    }
    let read = run_file(&args.model)?;
    let says = |keys: &[&str]| keys.iter().any(|key| *read.set_by(key) != Origin::Default);
    let run = &read.run;
    let has_batch = says(&["batch.sequence", "batch.sequences", "batch.tokens"]);
    let recipe = Recipe {
        batch: has_batch.then_some((run.batch.sequences, run.batch.sequence)),
        format: says(&["train.precision"]).then(|| precision(run.train.precision).name()),
        optimizer: says(&["optim.kind"]).then_some(run.optim.kind),
        average: run.train.ema > 0.0,
    };
    let flagged = args.sequence.is_some() || args.sequences.is_some() || args.batch.is_some();
    let taken = [
        recipe.batch.filter(|_| !flagged).map(|(n, of)| format!("{n} sequences of {of} tokens")),
        recipe.format.filter(|_| args.format.is_none()).map(|format| format!("--format {format}")),
        recipe.optimizer.filter(|_| args.optimizer.is_none()).map(|o| format!("--optimizer {}", o.name())),
        (recipe.average && !args.ema).then(|| "--ema".to_owned()),
    ];
    let taken: Vec<String> = taken.into_iter().flatten().collect();
    if !taken.is_empty() {
        output::say(&format!("note: as {} says: {}", args.model, taken.join(", ")));
    }
    let mut unpriced = ["train.dropout", "train.attention_dropout", "optim.qk_clip"].to_vec();
    unpriced.retain(|key| says(&[key]));
    if args.economy.ramp.is_none() && says(&["batch.ramp"]) {
        unpriced.push("batch.ramp (give --ramp)");
    }
    if !unpriced.is_empty() {
        let what = unpriced.join(", ");
        output::say(&format!("note: not in this price: {what}; with --cluster this their ops are"));
    }
    Ok((Shape::from_model(read.run.model), recipe))
}

/// What products run in where a run stores its parameters so.
fn precision(storage: DType) -> NumberFormat {
    if storage == DType::F32 { NumberFormat::Fp32 } else { NumberFormat::Bf16 }
}

fn run_file(name: &str) -> Result<Resolved> {
    RunSpec::resolve(Some((name, &files::read(Path::new(name))?)), &[], &files::read)
}

/// A name of the catalogue, a Hugging Face config.json or its directory, or a run file.
pub(crate) fn model(name: &str) -> Result<Shape> {
    let path = Path::new(name);
    match path.extension().and_then(|e| e.to_str()) {
        Some("json") => config(path),
        Some("toml") => Ok(Shape::from_model(run_file(name)?.run.model)),
        _ => models::find(name).or_else(|unknown| {
            let inside = path.join("config.json");
            if inside.is_file() { config(&inside) } else { Err(unknown) }
        }),
    }
}

fn config(path: &Path) -> Result<Shape> {
    let name = path.display();
    let found = HfModel::read(&files::read(path)?).map_err(|e| e.context(&name))?;
    for note in found.inexact {
        output::say(&format!("{name}: {note}"));
    }
    Ok(Shape { windows: found.windows, ..Shape::from_model(found.model) })
}

/// A count of tokens with a decimal suffix: `15.6T`.
pub(crate) fn tokens(flag: &str, text: &str) -> Result<f64> {
    let value = spec::units::tokens(text).filter(|v| (1.0..=TOKENS_MAX).contains(v));
    value.ok_or_else(|| {
        Error::user(format!("{flag} {text}, expected a number of tokens from 1 to {TOKENS_MAX:e}"))
            .hint("write it like 300B or 15.6T")
    })
}

/// More text than there is.
const TOKENS_MAX: f64 = 1e18;
