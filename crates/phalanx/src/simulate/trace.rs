//! `phalanx simulate --trace`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use sim::trace::{Blame, Row};
use spec::{Error, Result};

use super::{kineto, pages, parquet};
use crate::args::Simulate;
use crate::{files, output};

pub(super) fn run(path: &Path, args: &Simulate) -> Result<u8> {
    let html = args.html.as_deref().map(|path| files::Pending::create("--html", path)).transpose()?;
    let place = path.display().to_string();
    let blame = sim::trace::blame(&place, &rows(&place, path)?)?;
    if let Some(file) = html {
        file.commit(&pages::trace(&place, &blame))?;
    }
    if args.json {
        output::print(&serde_json::to_string_pretty(&blame).expect("numbers are JSON"));
    } else {
        output::print(&text(&blame));
    }
    Ok(0)
}

/// The ops of a trace, whatever it is written as: a run of our own, profiles of PyTorch, a table.
fn rows(place: &str, path: &Path) -> Result<Vec<Row>> {
    if path.is_dir() {
        let profiles = profiles(path)?;
        if profiles.is_empty() || path.join(RUN_FILE).is_file() {
            return measure::trace::rows(path, &train::RunDir::new(path).load()?);
        }
        return kineto::rows(place, &profiles);
    }
    if is_parquet(path) {
        return parquet::rows(place, path);
    }
    if path.extension().is_some_and(|e| e == "json") {
        return kineto::rows(place, &[path.to_owned()]);
    }
    sim::trace::parse(place, &files::read(path)?)
}

/// What tells the directory of a run from others.
const RUN_FILE: &str = "run.toml";

/// Profiles in a directory, in order of their names.
fn profiles(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e: std::io::Error| Error::io("read", dir, &e).hint("name a readable directory");
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|e| e == "json") {
            out.push(path);
        }
    }
    out.sort();
    Ok(out)
}

/// Whether a file begins as Parquet files do; one that cannot be read is for others to complain of.
fn is_parquet(path: &Path) -> bool {
    let mut start = [0; parquet::MAGIC.len()];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut start)).is_ok() && start == parquet::MAGIC
}

fn text(blame: &Blame) -> String {
    let percent = |slowdown: f64| 100.0 * (slowdown - 1.0);
    let mut out = format!(
        "{} steps of {} workers: {:.3} s a step, {:.3} s if every op took what is usual: {:.1} % slower\n",
        blame.steps,
        blame.workers,
        blame.step_s,
        blame.ideal_step_s,
        percent(blame.slowdown)
    );
    let cause = serde_json::to_value(blame.cause).expect("a word");
    out += &format!(
        "cause: {} (forward and backward times correlate by {:.2})\n",
        cause.as_str().unwrap_or_default(),
        blame.forward_backward_correlation
    );
    out += "if only this were as it was:\n";
    for s in &blame.by_stage {
        out += &format!("  stage {:<24} {:+6.1} %\n", s.stage, percent(s.slowdown));
    }
    for w in blame.by_worker.iter().take(8) {
        out += &format!("  data-parallel rank {:<11} {:+6.1} %\n", w.dp_rank, percent(w.slowdown));
    }
    for o in blame.by_op.iter().take(6) {
        out += &format!("  {:<30} {:+6.1} %\n", o.op, percent(o.slowdown));
    }
    out.trim_end().to_owned()
}
