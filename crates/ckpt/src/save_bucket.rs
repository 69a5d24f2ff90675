//! Checkpoints under a prefix of an object store: `step-00000123/rank-00000-4f1d09c2aa31be57.safetensors` for every rank
//! that held something, and `step-00000123/manifest.json`, whose create-only put is the commit.
//!
//! A rank's file has a name of its own in every attempt. So nothing that a committed manifest names is ever written again,
//! and what no manifest names is garbage, whoever left it.

use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::bucket::Bucket;
use crate::dir::{committed_name, committed_step};
use crate::manifest::{MANIFEST, Manifest};
use crate::read::MAX_MANIFEST_BYTES;

/// What becomes of a checkpoint of the same step that is there already.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum There {
    /// The same run's is replaced.
    Replace,
    /// Any is an error.
    Refuse,
}

/// The prefix of a step's checkpoint.
pub(crate) fn folder(bucket: &Bucket, step: u64) -> Bucket {
    bucket.inside(&name_of(step))
}

fn name_of(step: u64) -> String {
    committed_name(step).to_string_lossy().into_owned()
}

/// A name for a rank's file that nobody has used.
pub(crate) fn file_name(rank: usize) -> Result<String> {
    let mut drawn = [0; 8];
    rustix::rand::getrandom(&mut drawn, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::failure(format!("save checkpoint: draw a name: {e}")))?;
    Ok(format!("rank-{rank:05}-{:016x}.safetensors", u64::from_le_bytes(drawn)))
}

/// Committed checkpoints, oldest step first.
pub(crate) fn list(bucket: &Bucket) -> Result<Vec<(u64, PathBuf)>> {
    let all = steps(bucket)?;
    let committed = all.into_iter().filter(|(_, committed)| *committed);
    Ok(committed.map(|(step, _)| (step, bucket.url().join(name_of(step)))).collect())
}

/// Steps of which anything is there, and whether a manifest is.
fn steps(bucket: &Bucket) -> Result<Vec<(u64, bool)>> {
    let mut steps: Vec<u64> = bucket.folders()?.iter().filter_map(|name| committed_step(name)).collect();
    steps.sort_unstable();
    let manifests: Vec<String> = steps.iter().map(|step| format!("{}/{MANIFEST}", name_of(*step))).collect();
    Ok(steps.into_iter().zip(bucket.have(&manifests)?).collect())
}

/// Removes what interrupted saves of other steps left behind. What cannot be removed is left to the next save.
pub(crate) fn clear_leftovers(bucket: &Bucket, step: u64) {
    let Ok(found) = steps(bucket) else { return };
    for (other, _) in found.into_iter().filter(|(s, committed)| *s != step && !committed) {
        let _ = sweep(&folder(bucket, other), None);
    }
}

/// Commits a checkpoint whose files are there.
pub(crate) fn commit(bucket: &Bucket, manifest: &Manifest, there: There) -> Result<PathBuf> {
    let folder = folder(bucket, manifest.step);
    let unfit = |e: Error| {
        // The first error is the one to tell. Nothing names these files yet.
        let _ = abort(bucket, manifest.step);
        e
    };
    check_files(&folder, manifest).map_err(unfit)?;
    let text = manifest.to_text().map_err(unfit)?;
    // After an error nobody knows whether the manifest is there: the files stay, and the next save clears them if not.
    if !folder.create(MANIFEST, text.as_bytes())?
        && let Some(why) = supersede(&folder, manifest, &text, there)?
    {
        let lost = Error::user(format!("commit checkpoint {}: {why}", folder.url().display()))
            .hint("give every run a checkpoint.dir of its own, or remove that checkpoint first");
        return Err(unfit(lost));
    }
    // Garbage does no harm; what cannot be removed now goes with the checkpoint.
    let _ = sweep(&folder, Some(manifest));
    Ok(folder.url().to_owned())
}

/// What stands in the way of a create-only put: our own manifest, whose answer was lost, or another. `None` if ours is
/// there in the end, else why not.
fn supersede(folder: &Bucket, manifest: &Manifest, text: &str, there: There) -> Result<Option<&'static str>> {
    const RACED: &str = "somebody else commits the same step now";
    let Some((found, version)) = folder.read(MANIFEST, MAX_MANIFEST_BYTES)? else {
        return Ok((!folder.create(MANIFEST, text.as_bytes())?).then_some(RACED));
    };
    if found == text.as_bytes() {
        return Ok(None);
    }
    if there == There::Refuse {
        return Ok(Some("it is there already"));
    }
    // A damaged one may be replaced by whoever saves that step; a sound one by the same run alone.
    let path = folder.url().join(MANIFEST);
    let other = String::from_utf8(found).ok().and_then(|text| Manifest::from_text(&text, &path).ok());
    if other.is_some_and(|other| other.meta.fingerprint != manifest.meta.fingerprint) {
        return Ok(Some("it is there already, and of another run"));
    }
    Ok((!folder.replace(MANIFEST, text.as_bytes(), version)?).then_some(RACED))
}

/// Every file is there at the length that its rank wrote.
fn check_files(folder: &Bucket, manifest: &Manifest) -> Result<()> {
    let found = folder.files()?;
    for file in &manifest.files {
        let bytes = found.iter().find(|(name, _)| *name == file.name).map(|(_, bytes)| *bytes);
        if bytes != Some(file.bytes) {
            let what = bytes.map_or("is not here".to_owned(), |n| format!("has {n} bytes"));
            return Err(Error::failure(format!(
                "commit checkpoint: {} {what}, its rank wrote {}",
                folder.url().join(&file.name).display(),
                file.bytes
            ))
            .hint("every rank must see the same checkpoint.dir, through the same endpoint"));
        }
    }
    Ok(())
}

/// Removes what was written for `step` and belongs to no committed checkpoint.
pub(crate) fn abort(bucket: &Bucket, step: u64) -> Result<()> {
    let folder = folder(bucket, step);
    let committed = match folder.read(MANIFEST, MAX_MANIFEST_BYTES)? {
        None => None,
        Some((text, _)) => {
            let path = folder.url().join(MANIFEST);
            let text = String::from_utf8(text).ok();
            // A manifest that cannot be read may name any of the files.
            let Some(Ok(manifest)) = text.map(|t| Manifest::from_text(&t, &path)) else { return Ok(()) };
            Some(manifest)
        }
    };
    sweep(&folder, committed.as_ref())
}

/// Removes the checkpoints of these steps: first the manifest, so that none is ever seen in half.
pub(crate) fn remove(bucket: &Bucket, steps: &[u64]) -> Result<()> {
    for step in steps {
        let folder = folder(bucket, *step);
        folder.remove(&[MANIFEST.to_owned()])?;
        sweep(&folder, None)?;
    }
    Ok(())
}

/// Removes everything in a step's prefix but what its manifest names.
fn sweep(folder: &Bucket, committed: Option<&Manifest>) -> Result<()> {
    let kept =
        |name: &str| committed.is_some_and(|m| name == MANIFEST || m.files.iter().any(|f| f.name == name));
    let rest: Vec<String> = folder.files()?.into_iter().map(|(name, _)| name).filter(|n| !kept(n)).collect();
    if rest.is_empty() { Ok(()) } else { folder.remove(&rest) }
}

/// Largest file that lies beside checkpoints: a tokenizer.
const MAX_BESIDE_BYTES: usize = 256 << 20;

/// Puts a small file beside the checkpoints at a URL, in place of the one that is there.
///
/// # Errors
/// When `url` names no object store, or the store cannot take it.
pub fn put_beside(url: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let mut upload = Bucket::at(url)?.upload(name, bytes.len() as u64);
    upload.write_all(bytes)?;
    upload.finish()
}

/// Reads a small file beside the checkpoints at a URL; `None` if it is not there.
///
/// # Errors
/// When `url` names no object store, or the store cannot be read.
pub fn get_beside(url: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    Ok(Bucket::at(url)?.read(name, MAX_BESIDE_BYTES)?.map(|(bytes, _)| bytes))
}
