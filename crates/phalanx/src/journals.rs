//! `phalanx journal`: what a run recorded, listed, shown, exported.

mod export;
mod otlp;
mod parquet;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use dash::run::Run;
use journal::line::Line;
use journal::prometheus::{Format, render};
use journal::tail::{Found, Tail};
use journal::{Record, Step};
use serde_json::json;
use spec::{Error, Result};

use crate::args::{Journal, JournalCommand};
use crate::{output, watching};

const NO_RUN: &str = "give the directory of a run, as its run.dir says";

pub(crate) fn run(args: &Journal) -> Result<u8> {
    match &args.what {
        JournalCommand::Ls { run_dir, json } => list(run_dir, *json),
        JournalCommand::Show { run_dir, rank, json } => show(run_dir, *rank, *json),
        JournalCommand::Export { run_dir, csv: _, parquet, otlp, kind, rank, all, output } => {
            let collector = otlp.as_deref().map(otlp::Endpoint::parse).transpose()?;
            let table = export::Table::read(run_dir, kind, *rank, *all)?;
            match (parquet, collector) {
                (Some(path), _) => table.parquet(path),
                (None, Some(to)) => otlp::send(&table, &run_dir.display().to_string(), &to)
                    .map(|rows| output::say(&format!("{rows} records sent"))),
                (None, None) => table.csv(output.as_deref()),
            }
        }
        JournalCommand::Metrics { dirs } => metrics(dirs),
    }
    .map(|()| 0)
}

/// Looks at every whole line of a rank's journal; damaged ones are told of in the end.
fn each(run_dir: &Path, rank: usize, with: &mut dyn FnMut(Found) -> Result<()>) -> Result<()> {
    let damage = each_sound(run_dir, rank, with)?;
    damage.iter().for_each(|what| output::say(what));
    Ok(())
}

/// As [`each`]; what is damaged is for the caller to tell.
fn each_sound(
    run_dir: &Path,
    rank: usize,
    with: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<Option<String>> {
    let path = journal::path(run_dir, rank);
    let io = |e: io::Error| Error::io("read journal", &path, &e).hint(NO_RUN);
    std::fs::metadata(&path).map_err(io)?;
    let (mut damaged, mut first, mut failed) = (0, None, None);
    let mut look = |found: Found| match &found.line {
        Line::Damaged(why) => {
            damaged += 1;
            first.get_or_insert_with(|| format!("at byte {}: {why}", found.offset));
        }
        _ if failed.is_none() => failed = with(found).err(),
        _ => {}
    };
    Tail::whole(path.clone()).look(u64::MAX, &mut look).map_err(io)?;
    let damage = first
        .map(|first| format!("{}: {damaged} damaged lines are left out, the first {first}", path.display()));
    failed.map_or(Ok(damage), Err)
}

/// The kind of a line.
fn kind(line: &Line) -> &str {
    match line {
        Line::Spans { .. } => "spans",
        Line::Drawn => "drawn",
        Line::Unknown(kind) => kind,
        Line::Damaged(_) => "damaged",
        Line::Record(record) => match record {
            Record::RunStarted { .. } => "run_started",
            Record::Step(_) => "step",
            Record::Drawn { .. } => "drawn",
            Record::Eval { .. } => "eval",
            Record::Sample { .. } => "sample",
            Record::Checkpoint { .. } => "checkpoint",
            Record::Resumed { .. } => "resumed",
            Record::Recovered { .. } => "recovered",
            Record::Accepted { .. } => "accepted",
            Record::Spans { .. } => "spans",
            Record::Trouble { .. } => "trouble",
            Record::Verified { .. } => "verified",
            Record::Straggler { .. } => "straggler",
            Record::Warning { .. } => "warning",
            Record::Finished { .. } => "finished",
            Record::Failed { .. } => "failed",
        },
    }
}

fn list(run_dir: &Path, as_json: bool) -> Result<()> {
    let files = journal::files(run_dir).map_err(|e| e.hint(NO_RUN))?;
    if files.is_empty() {
        return Err(Error::user(format!("{} holds no journal", run_dir.display())).hint(NO_RUN));
    }
    let (mut text, mut all) = (String::new(), Vec::new());
    for (rank, path) in files {
        let bytes = std::fs::metadata(&path).map_or(0, |m| m.len());
        let (mut kinds, mut last) = (BTreeMap::<String, u64>::new(), None);
        let mut tail = Tail::whole(path.clone());
        let look = tail.look(u64::MAX, &mut |found| {
            *kinds.entry(kind(&found.line).to_owned()).or_default() += 1;
            if let Line::Record(Record::Step(Step { step, .. })) = found.line {
                last = Some(step);
            }
        });
        look.map_err(|e| Error::io("read journal", &path, &e).hint("see its owner and its rights"))?;
        let counts: Vec<String> = kinds.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
        let step = last.map_or_else(|| "-".to_owned(), |s| s.to_string());
        // Writing to a string cannot fail.
        let size = crate::show::binary(bytes as usize);
        let _ = writeln!(text, "rank {rank:<5} step {step:<9} {size:>11}  {}", counts.join(", "));
        all.push(json!({ "rank": rank, "file": path, "bytes": bytes, "step": last, "records": kinds }));
    }
    output::print(&if as_json { json!(all).to_string() } else { text });
    Ok(())
}

fn show(run_dir: &Path, rank: usize, as_json: bool) -> Result<()> {
    let mut run = Run::new(String::new(), run_dir.to_owned());
    let (mut lines, mut is_empty) = (String::new(), true);
    each(run_dir, rank, &mut |found| {
        is_empty = false;
        if let Line::Record(record) = &found.line
            && !matches!(record, Record::Step(_))
            && as_json
        {
            lines.push_str(&serde_json::to_string(record).expect("a record is plain data"));
            lines.push('\n');
        }
        run.observe(&found);
        Ok(())
    })?;
    if !as_json {
        for note in &run.notes {
            let text = note.text.replace('\n', "\n            ");
            let _ = writeln!(lines, "step {:<8} {:<10} {text}", note.step, note.kind);
        }
        if is_empty {
            output::say("the journal is empty: the run has recorded nothing yet");
        } else if lines.is_empty() {
            output::say("nothing but steps: phalanx journal export --csv writes them");
        }
    }
    if !lines.is_empty() {
        output::print(&lines);
    }
    Ok(())
}

fn metrics(dirs: &[PathBuf]) -> Result<()> {
    let watch = dash::watch::Watch::new(dirs, &watching::lookup(Path::new("")))?;
    watch.wait_until_read();
    let shared = watch.shared();
    let page = render(&dash::view::metrics(&shared.runs(), train::now_us()), &[], Format::Text);
    output::print(&page);
    Ok(())
}
