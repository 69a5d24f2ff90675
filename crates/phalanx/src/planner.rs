//! `phalanx plan`, `validate` and `catalog`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use plan::answer::{Answer, Choice, Question, default_batch};
use plan::calibration::Calibration;
use plan::shape::Shape;
use spec::{Catalog, EntryKind, Error, ModelSpec, NumberFormat, Result, RunSpec};

use crate::args::{Catalog as CatalogArgs, CatalogCommand, Plan, Validate};
use crate::output;

pub(crate) fn plan(args: &Plan) -> Result<u8> {
    if args.cluster == "this" {
        return crate::machine::plan(args);
    }
    let catalog = catalog(&args.catalog)?;
    let cluster = catalog.cluster(&args.cluster, args.accelerators)?;
    let shape = model(&args.model)?;
    let (sequences, sequence) = default_batch(&shape);
    let format = NumberFormat::parse(&args.format)
        .ok_or_else(|| Error::user(format!("format {}, expected bf16, fp16, fp8 or fp4", args.format)))?;
    let threads = output::threads(args.threads);
    let question = Question {
        shape,
        cluster,
        software: None,
        format,
        sequence: args.sequence.unwrap_or(sequence),
        sequences: args.sequences.unwrap_or(sequences),
        tokens: args.tokens.as_deref().map(tokens).transpose()?,
        keep: args.keep.max(1),
        trainable_only: args.trainable_only,
    };
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} searches") {
        bar.set_style(style);
    }
    let start = Instant::now();
    let answer = plan::answer::plan(question, &Calibration::builtin()?, &|done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    });
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let answer = answer?;
    if let Some(stack) = &args.emit {
        let best = answer.best.first().ok_or_else(|| Error::failure("the search found nothing"))?;
        output::print(&plan::emit::emit(stack, &answer.problem, best.mesh())?);
        output::say(&plan::emit::rank_map(&answer.problem, best.mesh()));
        return Ok(0);
    }
    if args.json {
        let mut json = answer.to_json(seconds, threads);
        if args.explain {
            json["explain"] = serde_json::to_value(answer.explain()?).expect("numbers are JSON");
        }
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
    } else {
        output::print(&text(&answer, seconds, args.explain)?);
    }
    Ok(0)
}

/// The built-in catalogue with the user's files over it.
fn catalog(files: &[std::path::PathBuf]) -> Result<Catalog> {
    let read: Vec<(String, String)> =
        files.iter().map(|p| Ok((p.display().to_string(), train::read(p)?))).collect::<Result<_>>()?;
    let pairs: Vec<(&str, &str)> = read.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
    if pairs.is_empty() { Catalog::builtin() } else { Catalog::with_files(&pairs) }
}

/// A name of the catalogue, a Hugging Face config.json, or a run file.
fn model(name: &str) -> Result<Shape> {
    let path = Path::new(name);
    match path.extension().and_then(|e| e.to_str()) {
        Some("json") => Ok(Shape::from_model(ModelSpec::from_hf_config(&train::read(path)?)?)),
        Some("toml") => {
            let run = RunSpec::load(Some((name, &train::read(path)?)), &[], &train::read)?;
            Ok(Shape::from_model(run.model))
        }
        _ => match Shape::find(name)? {
            Some(shape) => Ok(shape),
            None => ModelSpec::preset(name).map(Shape::from_model),
        },
    }
}

/// A count with a decimal suffix: `15.6T`.
fn tokens(text: &str) -> Result<f64> {
    let (digits, scale) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1e3),
        Some((at, 'M')) => (&text[..at], 1e6),
        Some((at, 'B')) => (&text[..at], 1e9),
        Some((at, 'T')) => (&text[..at], 1e12),
        _ => (text, 1.0),
    };
    let value = digits.parse::<f64>().ok().map(|v| v * scale).filter(|v| v.is_finite() && *v >= 1.0);
    value.ok_or_else(|| Error::user(format!("tokens '{text}', expected a number such as 300B or 15.6T")))
}

fn text(answer: &Answer, seconds: f64, explain: bool) -> Result<String> {
    let q = &answer.question;
    let mut out = String::new();
    let best = answer.best.first().ok_or_else(|| Error::failure("the search found nothing"))?;
    let write = |out: &mut String| -> std::fmt::Result {
        writeln!(
            out,
            "{} ({:.1}B parameters) on {} x {} of {}, {} sequences of {} tokens",
            q.shape.model.name,
            q.shape.params() / 1e9,
            q.cluster.accelerators,
            q.cluster.accelerator.name,
            q.cluster.name,
            q.sequences,
            q.sequence
        )?;
        writeln!(
            out,
            "{} layouts priced, {} pruned, in {seconds:.2} s\n",
            answer.searched.layouts_priced, answer.searched.layouts_pruned
        )?;
        for (i, c) in answer.best.iter().enumerate() {
            row(out, i + 1, c)?;
        }
        writeln!(out, "\nwhere the best one's time goes")?;
        for (name, s) in best.breakdown.parts().into_iter().filter(|(_, s)| *s > 0.0) {
            writeln!(out, "  {name:<24} {:>10.3} s  {:>5.1} %", s, 100.0 * s / best.step_s)?;
        }
        writeln!(out, "\nassumed")?;
        answer.assumptions.iter().try_for_each(|a| writeln!(out, "  {a}"))
    };
    write(&mut out).expect("writing to a string");
    if explain {
        writeln!(out, "\nwhat would help (one percent more of it changes the step by; a quarter more gives)")
            .expect("text");
        for s in answer.explain()? {
            writeln!(out, "  {:?}: {:+.2} %  {:.3} s", s.of, s.elasticity, s.step_s_with_quarter_more)
                .expect("text");
        }
    }
    Ok(out)
}

fn row(out: &mut String, n: usize, c: &Choice) -> std::fmt::Result {
    let days = c.train_days.map(|d| format!("  {d:.1} days")).unwrap_or_default();
    let layout = serde_json::to_value(&c.layout).expect("a layout is plain data");
    let keys: Vec<String> = layout
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, v)| !v.is_null() && v.as_bool() != Some(false) && v.as_u64() != Some(1))
        .map(|(k, v)| format!("{k}={}", v.to_string().trim_matches('"')))
        .collect();
    writeln!(
        out,
        "{n}. {:.3} s ({:.3} to {:.3})  mfu {:.1} %  {:.1} GB  bound by {}{days}\n   {}",
        c.step_s,
        c.step_low_s,
        c.step_high_s,
        100.0 * c.mfu,
        c.memory_bytes / 1e9,
        c.bound,
        keys.join(" ")
    )?;
    if let Some((part, loss)) = c.loses_s.first() {
        writeln!(out, "   loses to the best mostly in {part}: {loss:+.3} s")?;
    }
    Ok(())
}

pub(crate) fn validate(args: &Validate) -> Result<u8> {
    let catalog = Catalog::builtin()?;
    let name = args.file.display().to_string();
    let table = train::read(&args.file)?;
    let v = if args.held_out {
        plan::validate::cross_validate(&name, &table, &catalog)?
    } else {
        plan::validate::validate(&name, &table, &catalog, &Calibration::builtin()?)?
    };
    if args.json {
        output::print(&serde_json::to_string_pretty(&v).expect("numbers are JSON"));
        return Ok(0);
    }
    let mut out = String::new();
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    let mut write = || -> std::fmt::Result {
        writeln!(
            out,
            "{} rows priced{}: median error {}, 90th percentile {}, {} inside the interval",
            v.priced,
            if v.held_out { ", each source left out of its own fit" } else { "" },
            percent(v.median_abs_error),
            percent(v.p90_abs_error),
            percent(v.inside_interval)
        )?;
        for s in &v.sources {
            let source: String = s.source.chars().take(60).collect();
            writeln!(
                out,
                "  {source:<60} {:>4} rows  signed {:>8}  median {:>7}  p90 {:>7}",
                s.rows,
                percent(s.mean_error),
                percent(s.median_abs_error),
                percent(s.p90_abs_error)
            )?;
        }
        writeln!(out, "{} rows not priced", v.not_priced.len())
    };
    write().expect("writing to a string");
    output::print(&out);
    Ok(0)
}

pub(crate) fn catalog_command(args: &CatalogArgs) -> Result<u8> {
    match &args.what {
        CatalogCommand::List { kind, json } => {
            let kind = kind.as_deref().map(parse_kind).transpose()?;
            let listed = Catalog::builtin()?.list(kind);
            let lines: Vec<String> =
                listed.iter().map(|l| format!("{:<12} {:<36} {}", l.kind.name(), l.name, l.title)).collect();
            output::print(&if *json {
                let rows: Vec<_> = listed
                    .iter()
                    .map(|l| serde_json::json!({ "kind": l.kind.name(), "name": l.name, "title": l.title }))
                    .collect();
                serde_json::to_string_pretty(&rows).expect("text is JSON")
            } else {
                lines.join("\n")
            });
        }
        CatalogCommand::Show { name } => output::print(&Catalog::builtin()?.show(name)?),
        CatalogCommand::Check { files } => {
            let c = catalog(files)?.check()?;
            output::print(&format!(
                "{} entries, {} numbers with unit, source and date, {} of them ranges, {} platforms",
                c.entries, c.numbers, c.ranges, c.platforms
            ));
        }
    }
    Ok(0)
}

fn parse_kind(name: &str) -> Result<EntryKind> {
    EntryKind::parse(name).ok_or_else(|| {
        Error::user(format!("kind {name} of the catalogue"))
            .hint("phalanx catalog list shows the kinds that there are")
    })
}
