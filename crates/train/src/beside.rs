//! What lies beside a run's checkpoints in an object store, so that their URL alone is enough to take up the weights:
//! the run file, the tokenizer and its settings.

use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::run_dir::{RUN_FILE, RunDir, TOKENIZER};

/// Directories tried for what is fetched: others of the same process may be there.
const TRIES: u32 = 1000;

fn names() -> impl Iterator<Item = &'static str> {
    [RUN_FILE, TOKENIZER].into_iter().chain(ckpt::hf::COMPANIONS)
}

/// Puts them beside the checkpoints of `dir`, if those lie in an object store.
///
/// # Errors
/// If a file cannot be read, or the store does not take it.
pub(crate) fn publish(dir: &RunDir) -> Result<()> {
    let url = dir.checkpoints();
    if !ckpt::is_url(&url) {
        return Ok(());
    }
    for name in names() {
        let path = dir.path().join(name);
        if path.is_file() {
            let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, &e))?;
            ckpt::put_beside(&url, name, &bytes)?;
        }
    }
    Ok(())
}

/// A copy of them on this machine, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Fetched(PathBuf);

impl Fetched {
    /// Fetches what lies beside the checkpoints at `url`.
    ///
    /// # Errors
    /// If there is no run file, or it cannot be fetched or written.
    pub(crate) fn from(url: &Path) -> Result<Fetched> {
        let run_file = ckpt::get_beside(url, RUN_FILE)?.ok_or_else(|| {
            Error::user(format!("no run in {}: it has no {RUN_FILE}", url.display()))
                .hint("give the URL that was the run's checkpoint.dir")
        })?;
        let fetched = Fetched(new_directory()?);
        let write = |name: &str, bytes: &[u8]| {
            let path = fetched.0.join(name);
            std::fs::write(&path, bytes).map_err(|e| Error::io("write", &path, &e))
        };
        write(RUN_FILE, &run_file)?;
        for name in names().filter(|name| *name != RUN_FILE) {
            if let Some(bytes) = ckpt::get_beside(url, name)? {
                write(name, &bytes)?;
            }
        }
        Ok(fetched)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Fetched {
    fn drop(&mut self) {
        // What is left is small, and lies where such things are cleared away.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A directory that nobody else has, or could have put there.
fn new_directory() -> Result<PathBuf> {
    let all = std::env::temp_dir();
    for n in 0..TRIES {
        let path = all.join(format!("phalanx-run-{}-{n}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::io("create", &path, &e).hint("set TMPDIR to a writable place")),
        }
    }
    Err(Error::failure(format!("{} is full of directories of runs", all.display())).hint("clear them away"))
}
