//! `phalanx journal`: what a run recorded, listed, shown, exported.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

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
        JournalCommand::Export { run_dir, csv: _, kind, rank, all, output } => {
            export(run_dir, kind, *rank, *all, output.as_deref())
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

/// Where a run went back to, and where in the file that stands.
struct Counts {
    /// (offset, step) of each going back, in order.
    back: Vec<(u64, u64)>,
    axes: BTreeSet<String>,
}

impl Counts {
    fn read(run_dir: &Path, rank: usize) -> Result<Counts> {
        let mut counts = Counts { back: Vec::new(), axes: BTreeSet::new() };
        let mut last = 0;
        // Told of where rows are written.
        each_sound(run_dir, rank, &mut |found| {
            match found.line {
                Line::Record(Record::Resumed { step, .. } | Record::Recovered { step, .. })
                    if step < last =>
                {
                    counts.back.push((found.offset, step));
                    last = step;
                }
                Line::Record(Record::Step(Step { step, waits_s, .. })) => {
                    if step <= last {
                        counts.back.push((found.offset, step.saturating_sub(1)));
                    }
                    last = step;
                    for axis in waits_s.into_keys().filter(|a| !counts.axes.contains(a)).collect::<Vec<_>>() {
                        counts.axes.insert(axis);
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        // From a place on, the least step that the run goes back to later.
        let mut least = u64::MAX;
        for (_, step) in counts.back.iter_mut().rev() {
            least = least.min(*step);
            *step = least;
        }
        Ok(counts)
    }

    /// Whether what was done at `offset` for `step` is part of the run as it went on.
    fn keep(&self, offset: u64, step: u64) -> bool {
        let later = self.back.partition_point(|(at, _)| *at <= offset);
        self.back.get(later).is_none_or(|(_, least)| step <= *least)
    }
}

fn export(run_dir: &Path, kind: &str, rank: usize, all: bool, to: Option<&Path>) -> Result<()> {
    let counts = Counts::read(run_dir, rank)?;
    let name = to.map_or_else(|| "stdout".to_owned(), |p| p.display().to_string());
    let io = |e: io::Error| {
        Error::failure(format!("write {name}: {e}")).hint("free space there, or choose another --output")
    };
    let out: Box<dyn Write> = match to {
        Some(path) => Box::new(
            File::create(path)
                .map_err(|e| Error::io("create", path, &e).hint("name a writable file with --output"))?,
        ),
        None => Box::new(io::stdout().lock()),
    };
    let mut out = BufWriter::new(out);
    let written =
        rows(&mut out, run_dir, kind, rank, all, &counts, &io).and_then(|()| out.flush().map_err(io));
    match written {
        // A reader that has seen enough.
        Err(e) if to.is_none() && e.to_string().contains("Broken pipe") => Ok(()),
        done => done,
    }
}

fn rows(
    out: &mut dyn Write,
    run_dir: &Path,
    kind: &str,
    rank: usize,
    all: bool,
    counts: &Counts,
    io: &dyn Fn(io::Error) -> Error,
) -> Result<()> {
    let waits: String = counts.axes.iter().map(|a| format!(",wait_{}_s", field(a))).collect();
    let head = match kind {
        "eval" => "time_us,step,loss,tokens".to_owned(),
        "checkpoint" => "time_us,step,path,bytes,save_s,stall_s".to_owned(),
        _ => format!(
            "time_us,step,loss,grad_norm,lr,tokens,valid_tokens,tokens_per_s,mfu,step_s,memory_bytes,exposed_comm_s{waits}"
        ),
    };
    writeln!(out, "{head}").map_err(io)?;
    each(run_dir, rank, &mut |found| {
        let Line::Record(record) = &found.line else { return Ok(()) };
        match row(kind, record, &counts.axes) {
            Some((step, row)) if all || counts.keep(found.offset, step) => writeln!(out, "{row}").map_err(io),
            _ => Ok(()),
        }
    })
}

/// A record's step and its row, if it is of the kind.
fn row(kind: &str, record: &Record, axes: &BTreeSet<String>) -> Option<(u64, String)> {
    let known = |value: &Option<f64>| value.map(|v| v.to_string()).unwrap_or_default();
    Some(match (kind, record) {
        (
            "step",
            Record::Step(Step {
                time_us,
                step,
                loss,
                grad_norm,
                lr,
                tokens,
                valid_tokens,
                tokens_per_s,
                mfu,
                step_s,
                memory_bytes,
                exposed_comm_s,
                waits_s,
                // A table of its own for each step: read it from the journal.
                expert_counts: _,
            }),
        ) => {
            let (mfu, exposed) = (known(mfu), known(exposed_comm_s));
            let mut row = format!(
                "{time_us},{step},{loss},{grad_norm},{lr},{tokens},{valid_tokens},{tokens_per_s},{mfu},{step_s},{memory_bytes},{exposed}"
            );
            for axis in axes {
                let _ = write!(row, ",{}", known(&waits_s.get(axis).copied()));
            }
            (*step, row)
        }
        ("eval", Record::Eval { time_us, step, loss, tokens }) => {
            (*step, format!("{time_us},{step},{loss},{tokens}"))
        }
        ("checkpoint", Record::Checkpoint { time_us, step, path, bytes, save_s, stall_s }) => {
            (*step, format!("{time_us},{step},{},{bytes},{save_s},{}", field(path), known(stall_s)))
        }
        _ => return None,
    })
}

/// Text as a field of a table (RFC 4180).
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

fn metrics(dirs: &[PathBuf]) -> Result<()> {
    let watch = dash::watch::Watch::new(dirs, &watching::lookup(Path::new("")))?;
    watch.wait_until_read();
    let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64);
    let shared = watch.shared();
    let page = render(&dash::view::metrics(&shared.runs(), now_us), &[], Format::Text);
    output::print(&page);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_what_no_later_start_goes_back_behind() {
        // As read: back to 3 at byte 60, back to 5 at byte 90.
        let counts = Counts { back: vec![(60, 3), (90, 5)], axes: BTreeSet::new() };
        let check =
            |offset, step, expected| assert_eq!(counts.keep(offset, step), expected, "{offset} {step}");
        check(10, 3, true);
        check(10, 4, false);
        check(70, 5, true);
        check(70, 6, false);
        check(95, 6, true);
    }

    #[test]
    fn text_with_commas_is_quoted() {
        assert_eq!(field("a"), "a");
        assert_eq!(field("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
