//! `phalanx alive`: whether a run writes to its journals, for probes.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ::clusters::Time;
use journal::Record;
use serde_json::json;
use spec::{Error, Result};

use crate::args::Alive;
use crate::output;

/// The end is looked for in so many bytes: what may follow it is shorter, but for a long sample of text.
const TAIL_BYTES: i64 = 1 << 20;

/// Exit code 0 if any rank has written a record within the time that was given, or the run is done; else 1.
pub(crate) fn run(args: &Alive) -> Result<u8> {
    let within = Duration::from_secs(Time::parse("--within", &args.within)?.seconds);
    let modified = |(_, path): (usize, PathBuf)| Some((path.metadata().ok()?.modified().ok()?, path));
    let newest = journal::files(&args.run_dir)?.into_iter().filter_map(modified).max();
    let (written, path) = newest.ok_or_else(|| {
        Error::user(format!("{} has no journal", args.run_dir.display()))
            .hint("a run writes it when it begins")
    })?;
    // A file system's clock may be ahead of ours.
    let age = SystemTime::now().duration_since(written).unwrap_or_default();
    // Who is done is silent, and is kept where pods are not to end.
    let done = is_finished(&path).map_err(|e| Error::io("read", &path, &e))?;
    let is_alive = done || age <= within;
    if args.json {
        output::print(&json!({"alive": is_alive, "done": done, "age_s": age.as_secs_f64()}).to_string());
    } else {
        let end = if done { ", which ended the run" } else { "" };
        output::print(&format!("last record {} s ago{end}", age.as_secs()));
    }
    Ok(u8::from(!is_alive))
}

/// Whether a journal ends with the end of the run.
fn is_finished(path: &Path) -> std::io::Result<bool> {
    let mut file = journal::open_file(path)?;
    let bytes = i64::try_from(file.metadata()?.len()).unwrap_or(i64::MAX);
    file.seek(SeekFrom::End(-bytes.min(TAIL_BYTES)))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES as u64).read_to_end(&mut tail)?;
    // A sample of text may follow the end; a step or a start may not.
    let records = tail.rsplit(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    let mut telling = records.filter_map(|record| match record {
        Record::Finished { .. } => Some(true),
        Record::Step(_) | Record::RunStarted { .. } => Some(false),
        _ => None,
    });
    Ok(telling.next().unwrap_or(false))
}
