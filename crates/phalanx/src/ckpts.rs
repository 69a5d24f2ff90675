//! `phalanx ckpt`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use ckpt::torch::{self, Format};
use ckpt::{Checkpoint, Kind, TensorDifference};
use serde_json::json;
use spec::{Error, Result};
use train::RunDir;

use crate::args::{Ckpt, CkptCommand, ExportFormat, ImportFormat};
use crate::output;
use crate::show::binary;

pub(crate) fn run(args: &Ckpt) -> Result<u8> {
    match &args.what {
        CkptCommand::Ls { path, json } => ls(path, *json),
        CkptCommand::Show { path, json } => show(&one(path)?, *json),
        CkptCommand::Verify { path, json } => verify(path, *json),
        CkptCommand::Diff { a, b, json } => diff(&one(a)?, &one(b)?, *json),
        CkptCommand::Reshard { from, out_dir, ranks, json } => reshard(&one(from)?, out_dir, *ranks, *json),
        CkptCommand::Export { from, out, format: ExportFormat::Dcp, json } => export(&one(from)?, out, *json),
        CkptCommand::Import { from, out_dir, format, json } => import(from, out_dir, *format, *json),
        CkptCommand::Prune { path, keep, every, dry_run, json } => prune(
            &folder(path),
            *keep,
            every.map_or_else(|| keep_every(path), |n| Ok(Some(n)))?,
            *dry_run,
            *json,
        ),
    }
}

/// Where checkpoints lie: in a run's directory, or in this one itself.
fn folder(path: &Path) -> PathBuf {
    if ckpt::is_url(path) {
        return path.to_owned();
    }
    let of_run = RunDir::new(path).checkpoints();
    if ckpt::is_url(&of_run) || of_run.is_dir() { of_run } else { path.to_owned() }
}

/// Where a new checkpoint goes: to the run in `path`, to the checkpoints that lie there themselves, or to a run that is yet
/// to be; never into a checkpoint, which ends where its manifest says.
fn destination(path: &Path, is_of_a_run: bool) -> Result<PathBuf> {
    if ckpt::is_url(path) {
        return Ok(path.to_owned());
    }
    let inside = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let is_one = |p: &&Path| ckpt::is_checkpoint(p).unwrap_or(false);
    if let Some(whole) = inside.ancestors().find(is_one) {
        return Err(Error::user(format!("{} is a checkpoint itself", whole.display()))
            .hint("give the directory of a run, of checkpoints, or a new one"));
    }
    let holds_checkpoints = path.is_dir() && !ckpt::list(path)?.is_empty();
    Ok(if is_of_a_run && !holds_checkpoints { RunDir::new(path).checkpoints() } else { folder(path) })
}

/// The checkpoints that a path names, by step.
fn all(path: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = folder(path);
    let is_url = ckpt::is_url(&folder);
    if !is_url && !folder.exists() {
        return Err(Error::user(format!("{}: no such directory", folder.display()))
            .hint("give the directory of a run that has saved a checkpoint, or of the checkpoint itself"));
    }
    let found = if is_url || folder.is_dir() { ckpt::list(&folder)? } else { Vec::new() };
    if found.is_empty() {
        return Err(Error::user(format!("no checkpoint in {}", folder.display())).hint(
            "give the directory of a run that has saved one, its checkpoint.dir, or the checkpoint itself",
        ));
    }
    Ok(found)
}

/// A checkpoint: the one named, or the newest of a run.
fn one(path: &Path) -> Result<PathBuf> {
    if ckpt::is_checkpoint(path)? {
        return Ok(path.to_owned());
    }
    all(path).map(|mut found| found.pop().expect("none is an error").1)
}

fn ls(path: &Path, as_json: bool) -> Result<u8> {
    let mut rows = Vec::new();
    let mut out = format!("{:>10} {:>12} {:>6} {:>16}  path\n", "step", "size", "ranks", "tokens");
    for (step, path) in all(path)? {
        let shown = path.display().to_string();
        let line = match ckpt::ls(&path) {
            Ok(l) => {
                rows.push(json!({"step": step, "path": shown, "bytes": l.bytes, "world": l.world,
                    "tokens": l.tokens, "parameters": l.parameters, "fingerprint": l.fingerprint}));
                format!("{:>12} {:>6} {:>16}  {shown}", binary(l.bytes as usize), l.world, l.tokens)
            }
            Err(e) => {
                rows.push(json!({"step": step, "path": shown, "error": e.to_string()}));
                format!("{:>12} {:>6} {:>16}  {e}", "damaged", "", "")
            }
        };
        writeln!(out, "{step:>10} {line}").expect("writing to a string");
    }
    print(as_json, || json!({"checkpoints": rows}), &out);
    Ok(0)
}

fn show(path: &Path, as_json: bool) -> Result<u8> {
    let l = ckpt::ls(path)?;
    let mut out = format!(
        "{}\nstep {}, {} tokens, written by {} ranks in {} files of {}, {} parameters\n",
        path.display(),
        l.step,
        l.tokens,
        l.world,
        l.files,
        binary(l.bytes as usize),
        l.parameters
    );
    for t in &l.tensors {
        writeln!(out, "  {:<48} {:<12} {:<5} {:?} in {}", t.name, named(t.kind), t.dtype, t.shape, t.pieces)
            .expect("writing to a string");
    }
    print(as_json, || serde_json::to_value(&l).expect("a listing is plain data"), &out);
    Ok(0)
}

/// Checks one checkpoint or all of a run; the first that is damaged is the error, after all were read.
fn verify(path: &Path, as_json: bool) -> Result<u8> {
    let is_one = ckpt::is_checkpoint(path)?;
    let paths =
        if is_one { vec![path.to_owned()] } else { all(path)?.into_iter().map(|(_, path)| path).collect() };
    if !is_one {
        // What a killed save left is no checkpoint, and nothing is said of it else.
        for left in unfinished(&folder(path)) {
            output::say(&format!(
                "{}: no manifest.json, so no checkpoint: the run passes over it",
                left.display()
            ));
        }
    }
    let (mut rows, mut out, mut damaged) = (Vec::new(), String::new(), None);
    for path in paths {
        let shown = path.display();
        match ckpt::verify(&path) {
            Ok(v) => {
                rows.push(json!({"path": shown.to_string(), "files": v.files, "chunks": v.chunks, "bytes": v.bytes}));
                writeln!(out, "{shown}: whole, {} in {} chunks", binary(v.bytes as usize), v.chunks)
            }
            Err(e) => {
                rows.push(json!({"path": shown.to_string(), "error": e.to_string()}));
                damaged = damaged.or(Some(e));
                writeln!(out, "{shown}: damaged")
            }
        }
        .expect("writing to a string");
    }
    print(as_json, || json!({"checkpoints": rows}), &out);
    damaged.map_or(Ok(0), Err)
}

/// Directories with a checkpoint's name that hold none.
fn unfinished(folder: &Path) -> Vec<PathBuf> {
    let all = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = all
        .filter(|e| e.file_name().as_encoded_bytes().starts_with(b"step-"))
        .map(|e| e.path())
        .filter(|path| path.is_dir() && !ckpt::is_checkpoint(path).unwrap_or(false))
        .collect();
    found.sort();
    found
}

fn diff(a: &Path, b: &Path, as_json: bool) -> Result<u8> {
    let difference = ckpt::diff(a, b)?;
    let equal = difference.bit_equal();
    let mut out = String::new();
    for t in &difference.tensors {
        match t {
            TensorDifference::Compared { bit_equal: true, .. } => continue,
            TensorDifference::Compared { name, kind, differing, max_abs, .. } => {
                writeln!(
                    out,
                    "{name} ({}): {differing} elements differ, by at most {max_abs:e}",
                    named(*kind)
                )
            }
            TensorDifference::Shape { name, kind, a, b } => {
                writeln!(out, "{name} ({}): shape {a:?} against {b:?}", named(*kind))
            }
            TensorDifference::OnlyInA { name, kind } => {
                writeln!(out, "{name} ({}): only in the first", named(*kind))
            }
            TensorDifference::OnlyInB { name, kind } => {
                writeln!(out, "{name} ({}): only in the second", named(*kind))
            }
        }
        .expect("writing to a string");
    }
    let tensors = difference.tensors.len();
    let verdict = if equal { "equal to the last bit" } else { "different" };
    writeln!(out, "{tensors} tensors: {verdict}").expect("writing to a string");
    print(as_json, || json!({"bit_equal": equal, "tensors": difference.tensors}), &out);
    Ok(u8::from(!equal))
}

fn reshard(from: &Path, out_dir: &Path, ranks: usize, as_json: bool) -> Result<u8> {
    let done = ckpt::reshard(from, &destination(out_dir, false)?, ranks)?;
    let shown = done.path.display().to_string();
    let out = format!("{shown}: {} in {} files", binary(done.bytes as usize), done.files);
    print(as_json, || json!({"path": shown, "files": done.files, "bytes": done.bytes}), &out);
    Ok(0)
}

fn export(from: &Path, out: &Path, as_json: bool) -> Result<u8> {
    if ckpt::is_url(out) {
        return Err(Error::user(format!("{}: an export goes to a directory", out.display()))
            .hint("export to a directory, and copy that into the store"));
    }
    let checkpoint = Checkpoint::open(from)?;
    let done = torch::export_dcp(&checkpoint, out)
        .map_err(|e| e.hint("give an output directory in a writable place with free space"))?;
    if let Some(run) = run_of(from) {
        // Beside the tensors, where PyTorch does not look: with them a run goes on from an import.
        run.copy_into(out, run.tokenizer_of(&checkpoint)?.as_deref())?;
    }
    let shown = out.display().to_string();
    let text = format!("{shown}: {} in {} tensors", binary(done.bytes as usize), done.tensors);
    print(as_json, || json!({"path": shown, "tensors": done.tensors, "bytes": done.bytes}), &text);
    Ok(0)
}

fn import(from: &Path, out_dir: &Path, format: Option<ImportFormat>, as_json: bool) -> Result<u8> {
    let format = format.map(|format| match format {
        ImportFormat::Dcp => Format::Dcp,
        ImportFormat::Megatron => Format::Megatron,
        ImportFormat::Llmc => Format::LlmC,
    });
    let done = torch::import(from, &destination(out_dir, true)?, format)
        .map_err(|e| if e.hint_text().is_some() { e } else { e.hint("copy the checkpoint again") })?;
    for note in &done.notes {
        output::say(&format!("note: {note}"));
    }
    bring_run(from, out_dir, done.whole)?;
    let (shown, format) = (done.path.display().to_string(), done.format.to_string());
    let text =
        format!("{shown}: {} in {} tensors, read as {format}", binary(done.bytes as usize), done.tensors);
    let json = || {
        json!({"path": shown, "format": format, "tensors": done.tensors, "bytes": done.bytes, "whole": done.whole,
            "notes": done.notes})
    };
    print(as_json, json, &text);
    Ok(0)
}

/// The run that a checkpoint lies in, if it lies in one.
fn run_of(checkpoint: &Path) -> Option<RunDir> {
    let path = std::fs::canonicalize(checkpoint).ok()?;
    let run = RunDir::new(path.parent()?.parent()?);
    run.run_file().exists().then_some(run)
}

/// Makes a run of a directory that a checkpoint was imported into, with the run file and the tokenizer that came with it;
/// says what is missing where none did.
fn bring_run(from: &Path, out_dir: &Path, whole: bool) -> Result<()> {
    let (theirs, ours) = (RunDir::new(from), RunDir::new(out_dir));
    if ckpt::is_url(out_dir) || ours.run_file().exists() {
        return Ok(());
    }
    if theirs.run_file().exists() && whole {
        return theirs.copy_into(out_dir, theirs.tokenizer().as_deref());
    }
    output::say(&if whole {
        format!(
            "note: no run.toml came with it: a run goes on from it with the keys that it was trained with, and \
             its tokenizer.json in {}",
            out_dir.display()
        )
    } else {
        "note: another trainer's: it can be shown, checked, compared and exported; no run goes on from it"
            .to_owned()
    });
    Ok(())
}

/// What the run in `path` keeps for good, if a run is there.
fn keep_every(path: &Path) -> Result<Option<u64>> {
    let run = RunDir::new(path);
    let every = if run.run_file().exists() { run.load()?.checkpoint.keep_every } else { None };
    Ok(every.map(|every| every as u64))
}

fn prune(folder: &Path, keep: usize, every: Option<u64>, dry_run: bool, as_json: bool) -> Result<u8> {
    if keep == 0 {
        return Err(Error::user("--keep 0 would leave no checkpoint")
            .hint("give 1 or more; remove the run's directory to remove all of it"));
    }
    if every == Some(0) {
        return Err(
            Error::user("--every 0, expected a number of steps").hint("leave it out to keep the newest only")
        );
    }
    let found = all(folder)?;
    let steps = ckpt::superfluous(folder, keep, every)?;
    if !dry_run {
        ckpt::remove(folder, &steps)?;
    }
    let done = if dry_run { "would remove" } else { "removed" };
    let list: Vec<String> = steps.iter().map(u64::to_string).collect();
    let out = match steps.len() {
        0 => "nothing to remove".to_owned(),
        n => format!("{done} {n} of {} checkpoints: steps {}", found.len(), list.join(", ")),
    };
    print(as_json, || json!({"removed": steps, "kept": found.len() - steps.len(), "dry_run": dry_run}), &out);
    Ok(0)
}

fn print(as_json: bool, json: impl FnOnce() -> serde_json::Value, text: &str) {
    if as_json {
        output::print(&serde_json::to_string_pretty(&json()).expect("plain data is JSON"));
    } else {
        output::print(text);
    }
}

fn named(kind: Kind) -> String {
    serde_json::to_value(kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}
