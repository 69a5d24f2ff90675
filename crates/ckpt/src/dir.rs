//! The directory that holds a run's checkpoints: `step-00000123/` committed, `.step-00000123.tmp/` being written or
//! removed, `.step-00000123.old/` put aside while its successor of the same step takes its place.
//!
//! Under a prefix of an object store the same names are prefixes, and what has a manifest is committed.
//!
//! A checkpoint may be a link to one that lies elsewhere: it is read through, and only ever unlinked.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::disk::Folder;
use crate::manifest::MANIFEST;
use crate::place::Place;
use crate::save_bucket;

/// Committed checkpoints in `dir`, oldest step first. A missing directory holds none.
///
/// # Errors
/// When `dir` cannot be read.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    if let Place::Bucket(bucket) = Place::of(dir)? {
        return save_bucket::list(&bucket);
    }
    let mut found = Vec::new();
    for (name, path) in entries(dir)? {
        let Some((step, state)) = parse(&name) else { continue };
        // A put-aside checkpoint counts only when a crash kept its successor from taking the name.
        let stands = match state {
            State::Committed => true,
            State::Old => !dir.join(committed_name(step)).join(MANIFEST).exists(),
            State::Temporary => false,
        };
        if stands && path.join(MANIFEST).is_file() {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The newest committed checkpoint in `dir`.
///
/// # Errors
/// When `dir` cannot be read.
pub fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(dir)?.pop().map(|(_, path)| path))
}

/// Whether `path` is a committed checkpoint itself, and no directory of several.
///
/// # Errors
/// When an object store cannot be asked.
pub fn is_checkpoint(path: &Path) -> Result<bool> {
    match Place::of(path)? {
        Place::Folder(path) => Ok(path.join(MANIFEST).exists()),
        Place::Bucket(bucket) => Ok(bucket.have(&[MANIFEST.to_owned()])? == [true]),
    }
}

/// The steps in `dir` that retention removes: all but the newest `count` (0 removes none), and of those before not the
/// ones that `every` divides.
///
/// # Errors
/// When `dir` cannot be read.
pub fn superfluous(dir: &Path, count: usize, every: Option<u64>) -> Result<Vec<u64>> {
    let all = list(dir)?;
    let old = if count == 0 { 0 } else { all.len().saturating_sub(count) };
    let kept = |step: u64| every.is_some_and(|every| step.is_multiple_of(every));
    Ok(all[..old].iter().map(|(step, _)| *step).filter(|step| !kept(*step)).collect())
}

/// Removes the [`superfluous`] checkpoints in `dir` and returns their steps. One that is a link to a checkpoint elsewhere
/// is unlinked; what it points to stays.
///
/// # Errors
/// When a directory cannot be read or removed. A checkpoint is renamed before it is removed, so none is ever seen in
/// half.
pub fn keep(dir: &Path, count: usize, every: Option<u64>) -> Result<Vec<u64>> {
    let old = superfluous(dir, count, every)?;
    remove(dir, &old)?;
    Ok(old)
}

/// Removes the checkpoints of these steps in `dir`; as [`keep`] does.
///
/// # Errors
/// As [`keep`].
pub fn remove(dir: &Path, steps: &[u64]) -> Result<()> {
    if steps.is_empty() {
        return Ok(());
    }
    if let Place::Bucket(bucket) = Place::of(dir)? {
        return save_bucket::remove(&bucket, steps);
    }
    let folder = Folder::open(dir).map_err(|e| Error::io("open checkpoint directory", dir, &e))?;
    for (step, path) in list(dir)?.iter().filter(|(step, _)| steps.contains(step)) {
        let (name, trash) = (path.file_name().unwrap_or_default(), temporary_name(*step));
        let remove = || -> io::Result<()> {
            folder.remove(&trash)?;
            folder.rename(name, &trash)?;
            folder.remove(&trash)
        };
        remove().map_err(|e| Error::io("remove old checkpoint", path, &e))?;
    }
    Ok(())
}

/// Clears what interrupted saves left behind, except the temporary directory of `step`.
///
/// What cannot be removed is left to the next save: it must not cost this one.
pub(crate) fn clear_leftovers(folder: &Folder, step: u64) -> io::Result<()> {
    for name in folder.names()? {
        let whole = |name: &OsStr| folder.inside(name).and_then(|f| f.file_bytes(MANIFEST.as_ref())).is_ok();
        let _ = match name.to_str().and_then(parse) {
            Some((s, State::Temporary)) if s != step => folder.remove(&name),
            Some((s, State::Old)) => {
                let committed = committed_name(s);
                // Its successor never took the name: it is the checkpoint of that step again.
                let stands = !folder.path().join(&committed).join(MANIFEST).exists();
                if stands && whole(&name) {
                    folder.remove(&committed).and_then(|()| folder.rename(&name, &committed))
                } else {
                    folder.remove(&name)
                }
            }
            _ => Ok(()),
        };
    }
    Ok(())
}

#[cfg(test)]
pub(crate) fn committed_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(committed_name(step))
}

pub(crate) fn committed_name(step: u64) -> OsString {
    format!("step-{step:08}").into()
}

pub(crate) fn temporary_name(step: u64) -> OsString {
    format!(".step-{step:08}.tmp").into()
}

pub(crate) fn old_name(step: u64) -> OsString {
    format!(".step-{step:08}.old").into()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Committed,
    Temporary,
    Old,
}

/// The step in a directory's name; only names that Phalanx itself writes.
fn parse(name: &str) -> Option<(u64, State)> {
    let (core, state) = if let Some(core) = name.strip_prefix('.') {
        core.strip_suffix(".tmp")
            .map(|c| (c, State::Temporary))
            .or_else(|| core.strip_suffix(".old").map(|c| (c, State::Old)))?
    } else {
        (name, State::Committed)
    };
    let step: u64 = core.strip_prefix("step-")?.parse().ok()?;
    (committed_name(step) == *core).then_some((step, state))
}

/// The step of a committed checkpoint's name.
pub(crate) fn committed_step(name: &str) -> Option<u64> {
    parse(name).filter(|(_, state)| *state == State::Committed).map(|(step, _)| step)
}

fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let error = |e| Error::io("read checkpoint directory", dir, &e);
    let read = match fs::read_dir(dir) {
        Ok(read) => read,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(error(e)),
    };
    let mut found = Vec::new();
    for entry in read {
        let entry = entry.map_err(error)?;
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(parse("step-00000123"), Some((123, State::Committed)));
        assert_eq!(parse(".step-00000123.tmp"), Some((123, State::Temporary)));
        assert_eq!(parse(".step-123456789012.old"), Some((123_456_789_012, State::Old)));
        for other in ["step-123", "step-+0000123", "step-00000123.tmp", ".step-00000123", "x", "step-"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        for step in [4, 5, 10, 15] {
            let path = committed_path(dir.path(), step);
            fs::create_dir(&path).unwrap();
            fs::write(path.join(MANIFEST), "").unwrap();
        }
        fs::create_dir(committed_path(dir.path(), 20)).unwrap();
        assert_eq!(keep(dir.path(), 0, None).unwrap(), [0u64; 0]);
        assert_eq!(superfluous(dir.path(), 1, Some(5)).unwrap(), [4]);
        assert_eq!(superfluous(dir.path(), 1, Some(2)).unwrap(), [5]);
        assert_eq!(keep(dir.path(), 2, Some(4)).unwrap(), [5]);
        assert_eq!(keep(dir.path(), 2, None).unwrap(), [4]);
        let steps: Vec<u64> = list(dir.path()).unwrap().into_iter().map(|(s, _)| s).collect();
        assert_eq!(steps, [10, 15], "a directory without a manifest is none");
        assert_eq!(latest(dir.path()).unwrap(), Some(committed_path(dir.path(), 15)));
        assert_eq!(latest(&dir.path().join("missing")).unwrap(), None);
    }
}
