//! `phalanx generate`, `logits`, `import`, `export` and `keys`.

use std::fmt::Write as _;

use ckpt::Kind;
use journal::Record;
use journal::perfetto::TraceWriter;
use serde_json::json;
use spec::run::Key;
use spec::{DType, Error, Result, RunSpec};
use train::{Cpu, DirLock, Ended, Generator, RunDir, Sampling};

use crate::args::{Export, Generate, Import, Keys, Logits, Trace};
use crate::busy::busy;
use crate::output;

pub(crate) fn generate(args: &Generate) -> Result<u8> {
    let mut busy = Some(busy("reading the checkpoint and the prompt"));
    let threads = output::threads_asked(args.threads)?;
    let mut g = Generator::open_with(&args.run_dir, args.ema, || Box::new(Cpu::new(threads)))?;
    let s = g.run().sample.clone();
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(s.temperature),
        top_k: args.top_k.unwrap_or(s.top_k.unwrap_or(0)),
        top_p: args.top_p.unwrap_or(s.top_p),
        seed: args.seed,
    };
    check(sampling)?;
    let count = args.count.unwrap_or(s.tokens);
    let (made, ended, mut shown);
    if let Some(tokens) = &args.tokens {
        let prompt = parse(tokens)?;
        let (ids, why) = g.ids(&prompt, count, sampling)?;
        (made, ended, shown) = (ids.len(), why, json!({ "prompt": prompt, "tokens": ids }));
        if !args.json {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            output::print(&ids.join(" "));
        }
    } else {
        let prompt = args.prompt.clone().unwrap_or(s.prompt);
        let (mut first, mut text) = (Some(prompt.as_str()), String::new());
        (made, ended) = g.text(&prompt, count, sampling, &mut |t| {
            busy = None;
            text.push_str(t);
            if !args.json {
                // The prompt waits for the first token: a refused one is not echoed.
                output::print_part(&format!("{}{t}", first.take().unwrap_or_default()));
            }
        })?;
        if !args.json {
            output::print(first.unwrap_or_default());
        }
        shown = json!({ "prompt": prompt, "text": text });
    }
    drop(busy);
    if ended == Ended::Full {
        output::say(&format!(
            "stopped after {made} of {count} tokens: the {} that the run was trained to see are full (batch.sequence)",
            g.positions()
        ));
    }
    if args.json {
        shown["count"] = made.into();
        shown["ended"] = ended.name().into();
        output::print(&shown.to_string());
    }
    Ok(0)
}

fn check(s: Sampling) -> Result<()> {
    if !(0.0..=100.0).contains(&s.temperature) {
        return Err(Error::user(format!("temperature {}, expected 0 to 100", s.temperature))
            .hint("0 takes the likeliest token, 1 draws as the model predicts"));
    }
    if !(s.top_p > 0.0 && s.top_p <= 1.0) {
        return Err(Error::user(format!("top-p {}, expected above 0 and at most 1", s.top_p))
            .hint("1 draws among all tokens"));
    }
    Ok(())
}

pub(crate) fn logits(args: &Logits) -> Result<u8> {
    let mut g = Generator::open(&args.run_dir, || Box::new(Cpu::new(output::threads(0))))?;
    let all = g.logits(&parse(&args.tokens)?)?;
    if args.json {
        output::print(&serde_json::to_string(&all).expect("numbers are JSON"));
        return Ok(0);
    }
    for row in all {
        let row: Vec<String> = row.iter().map(f32::to_string).collect();
        output::print(&row.join(" "));
    }
    Ok(0)
}

fn parse(ids: &str) -> Result<Vec<u32>> {
    ids.split([' ', ',', '[', ']'])
        .filter(|t| !t.is_empty())
        .map(|t| {
            t.parse().map_err(|_| {
                Error::user(format!("token id '{t}', expected a whole number from 0"))
                    .hint("write ids like --tokens \"1 2 3\"")
            })
        })
        .collect()
}

/// A run at step 0 that holds the weights of a Hugging Face model.
pub(crate) fn import(args: &Import) -> Result<u8> {
    let (model, weights) =
        ckpt::hf::import(&args.hf_dir).map_err(|e| e.hint("copy the model's files again"))?;
    let _lock = DirLock::take(&args.run_dir)?;
    let toml = model.to_toml();
    let section = format!("[model]\n{toml}");
    let mut set = vec![format!(
        "run.dir={}",
        serde_json::to_string(&args.run_dir.display().to_string()).expect("text")
    )];
    let limit = model.max_positions();
    if limit < 256 {
        set.push(format!("batch.sequence={limit}"));
    }
    set.extend(args.set.iter().cloned());
    let run = RunSpec::load(Some(("the imported model", &section)), &set, &train::read)?;
    let dir = RunDir::of(&run);
    for checkpoints in [RunDir::new(&args.run_dir).checkpoints(), dir.checkpoints()] {
        if ckpt::latest(&checkpoints)?.is_some() {
            return Err(Error::user(format!("{} already holds a run", args.run_dir.display()))
                .hint("import into a new directory"));
        }
    }
    let tokenizer = args.hf_dir.join("tokenizer.json");
    dir.create(&run, tokenizer.exists().then_some(tokenizer.as_path()))?;
    let kept = ckpt::hf::keep_companions(&args.hf_dir, &args.run_dir)
        .map_err(|e| e.hint("copy the model's files again, or leave out the one that is named"))?;
    for note in weights.notes().iter().chain(&kept) {
        output::say(&format!("note: {note}"));
    }
    let path = train::import_weights(&run, &dir, &weights)?;
    output::say(&format!("{}: {} parameters", model.name, output::count(model.param_count() as f64)));
    output::print(&path.display().to_string());
    Ok(0)
}

pub(crate) fn export(args: &Export) -> Result<u8> {
    if args.max_shard_bytes == 0 {
        return Err(Error::user("--max-shard-bytes 0, expected at least one byte")
            .hint("leave it out for files of 5 GB; a tensor is never split"));
    }
    let dtype = match args.dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::Bf16,
        other => {
            return Err(Error::user(format!("dtype {other}, expected f32 or bf16"))
                .hint("give --dtype f32 or --dtype bf16"));
        }
    };
    let dir = RunDir::open(&args.run_dir)?;
    let run = dir.load()?;
    let checkpoint = dir.open_newest()?;
    let path = dir.tokenizer_of(&checkpoint)?;
    if args.ema {
        train::check_averaged(&run)?;
    }
    // Before the first step an average is what it is of.
    let kind = if args.ema && checkpoint.step() > 0 { Kind::Ema } else { Kind::Param };
    let source = |name: &str| {
        let shape = &checkpoint.tensor(name, kind)?.shape;
        let (rows, cols) = if shape.len() == 2 { (shape[0], shape[1]) } else { (1, shape[0]) };
        let mut out = vec![0.0; rows * cols];
        checkpoint.read_box(name, kind, 0, rows, 0, cols, &mut out)?;
        Ok(out)
    };
    let tokenizer = match &path {
        Some(path) => Some(ckpt::hf::Tokenizer { path, eod: data::Tokenizer::load(path)?.eod() }),
        None => {
            output::say("note: the run has no tokenizer, so none is written");
            None
        }
    };
    let done = ckpt::hf::export(&run.model, source, &args.out_dir, dtype, args.max_shard_bytes, tokenizer)
        .map_err(|e| e.hint("give an output directory in a writable place with free space"))?;
    output::say(&format!(
        "step {}{}: {} tensors in {} files, {}",
        checkpoint.step(),
        if args.ema { ", averaged" } else { "" },
        done.tensors,
        done.files,
        crate::show::binary(done.bytes as usize)
    ));
    output::print(&args.out_dir.display().to_string());
    Ok(0)
}

/// Writes what ranks did when, from their journals.
pub(crate) fn trace(args: &Trace) -> Result<u8> {
    let write = |e: std::io::Error| {
        Error::io("write trace", &args.output, &e).hint("name a writable file with --output")
    };
    let mut all = Vec::new();
    for (_, path) in journal::files(&args.run_dir).map_err(|e| e.hint("give the directory of a run"))? {
        let (records, damage) = journal::read_sound(&path)?;
        all.extend(records);
        if let Some(damage) = damage {
            output::say(&damage.to_string());
        }
    }
    let spans = all.iter().filter_map(|r| match r {
        Record::Spans { spans, .. } => spans.iter().map(|s| s.start_us).min(),
        _ => None,
    });
    let Some(origin) = spans.min() else {
        return Err(Error::user(format!("no ops are recorded in {}", args.run_dir.display()))
            .hint("train with --trace"));
    };
    let file = std::fs::File::create(&args.output).map_err(write)?;
    let mut writer = TraceWriter::new(file).map_err(write)?;
    for record in &all {
        writer.record(record, origin).map_err(write)?;
    }
    writer.finish().map_err(write)?;
    output::print(&args.output.display().to_string());
    Ok(0)
}

/// Every key of a run file.
pub(crate) fn keys(args: &Keys) -> Result<u8> {
    if args.json {
        let one = |key: &Key| json!({ "key": key.path, "type": key.type_text(), "default": key.default_text(), "doc": key.doc });
        let all: Vec<_> = RunSpec::keys().iter().map(one).collect();
        output::print(&serde_json::to_string_pretty(&all).expect("text is JSON"));
    } else {
        output::print(&table());
    }
    Ok(0)
}

fn table() -> String {
    let mut out = String::new();
    for key in RunSpec::keys() {
        writeln!(out, "{:<46} {:<22} {:<16} {}", key.path, key.type_text(), key.default_text(), key.doc)
            .expect("writing to a string");
    }
    out
}
