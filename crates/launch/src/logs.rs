//! Where the workers' output goes: `<log_dir>/<run_id>_<random>/attempt_<n>/<local_rank>/{stdout.log,stderr.log,error.json}`.

use crate::options::Options;
use crate::tail::{Console, Source};
use spec::{Context as _, Error, Result};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{BuildHasher as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;

/// Which of stdout and stderr, for each local rank: the value of `--redirects` and `--tee`.
///
/// ```
/// let streams: launch::Streams = "0:1,1:3".parse().unwrap();
/// assert_eq!(streams.of(0), (true, false));
/// assert_eq!(streams.of(1), (true, true));
/// assert_eq!(streams.of(2), (false, false));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Streams {
    others: u8,
    of: BTreeMap<usize, u8>,
}

impl Streams {
    /// No stream of any rank.
    pub fn none() -> Streams {
        Streams { others: 0, of: BTreeMap::new() }
    }

    /// Both streams of all ranks.
    pub fn all() -> Streams {
        Streams { others: 3, of: BTreeMap::new() }
    }

    /// Whether stdout and stderr of `local_rank` are chosen.
    pub fn of(&self, local_rank: usize) -> (bool, bool) {
        let bits = self.of.get(&local_rank).copied().unwrap_or(self.others);
        (bits & 1 != 0, bits & 2 != 0)
    }

    fn is_none(&self) -> bool {
        self.others == 0 && self.of.values().all(|b| *b == 0)
    }
}

impl FromStr for Streams {
    type Err = ();

    fn from_str(text: &str) -> Result<Streams, ()> {
        let bits = |t: &str| t.trim().parse::<u8>().ok().filter(|b| *b <= 3).ok_or(());
        if !text.contains(':') {
            return Ok(Streams { others: bits(text)?, of: BTreeMap::new() });
        }
        let pair = |p: &str| {
            let (rank, value) = p.split_once(':').ok_or(())?;
            Ok((rank.trim().parse::<usize>().map_err(|_| ())?, bits(value)?))
        };
        Ok(Streams { others: 0, of: text.split(',').map(pair).collect::<Result<_, ()>>()? })
    }
}

/// Sixteen hex digits that no other run has.
pub(crate) fn random_hex() -> String {
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.write_u128(std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos()));
    format!("{:016x}", hasher.finish())
}

/// The folder of one launch.
pub(crate) struct Logs {
    folder: PathBuf,
    /// Our own temporary folder goes away when it holds nothing that somebody asked for.
    temporary: bool,
    /// Locked as long as this agent, or the warden that outlives it, is there: see [`sweep`].
    _owner: Option<File>,
}

/// In a temporary folder that nobody asked for, until its agent has ended as it should.
const OWNER: &str = "owner";

/// Marks `folder` as one that may go when its owner is gone.
fn own(folder: &Path) -> std::io::Result<File> {
    // Locked before it has the name by which others find it.
    let fresh = folder.join("owner.new");
    let file = File::create(&fresh)?;
    file.lock()?;
    fs::rename(&fresh, folder.join(OWNER))?;
    Ok(file)
}

/// Removes the temporary folders of agents that were killed before they could do so themselves.
fn sweep(temporary: &Path) {
    let entries = fs::read_dir(temporary).into_iter().flatten().flatten();
    for folder in entries.filter(|e| e.file_name().as_encoded_bytes().starts_with(b"phalanx_")) {
        // What is another user's cannot be opened, and what a living agent owns is locked.
        if let Ok(owner) = File::options().write(true).open(folder.path().join(OWNER))
            && owner.try_lock().is_ok()
        {
            let _ = fs::remove_dir_all(folder.path());
        }
    }
}

impl Logs {
    /// Creates `<log_dir>/<run_id>_<random>/`.
    pub(crate) fn create(options: &Options, run_id: &str) -> Result<Logs> {
        let temporary = options.log_dir.is_none();
        let base = options.log_dir.clone().unwrap_or_else(|| std::env::temp_dir().join("phalanx_logs"));
        let random = random_hex();
        let name: String = run_id.chars().map(|c| if c == '/' || c == '\0' { '_' } else { c }).collect();
        let folder = if temporary {
            std::env::temp_dir().join(format!("phalanx_{name}_{}", &random[..8]))
        } else {
            base.join(format!("{name}_{}", &random[..8]))
        };
        create_dir(&folder)
            .map_err(|e| e.hint("--log-dir takes a folder that this user can write"))
            .context("log folder")?;
        let folder = folder.canonicalize().unwrap_or(folder);
        let is_for_us_alone = temporary && options.redirects.is_none() && options.tee.is_none();
        let mut owner = None;
        if is_for_us_alone {
            sweep(&std::env::temp_dir());
            // Where locks do not work the folder is kept, as if somebody had asked for it.
            owner = own(&folder).ok();
        }
        Ok(Logs { folder, temporary, _owner: owner })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Creates the folders of one attempt and says where the output of the worker in each of `places` goes.
    pub(crate) fn attempt(&self, options: &Options, attempt: u32, places: &[usize]) -> Result<AttemptLogs> {
        let folder = self.folder.join(format!("attempt_{attempt}"));
        let workers =
            places.iter().map(|rank| WorkerLogs::create(options, &folder, *rank)).collect::<Result<_>>()?;
        Ok(AttemptLogs { folder, workers })
    }

    /// Removes a temporary folder in which no stream was kept; after a failure its error files stay.
    pub(crate) fn finish(&self, options: &Options, failed: bool) {
        if self.temporary
            && options.redirects.is_none()
            && options.tee.is_none()
            && !(failed && self.has_error_file())
        {
            // Best effort: a leftover folder of empty folders does no harm.
            let _ = fs::remove_dir_all(&self.folder);
        } else if self.temporary {
            // What is in it is for people.
            let _ = fs::remove_file(self.folder.join(OWNER));
        }
    }

    fn has_error_file(&self) -> bool {
        let folders = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|e| e.path());
        folders(&self.folder).any(|attempt| folders(&attempt).any(|rank| rank.join("error.json").exists()))
    }
}

/// The files of one attempt.
pub(crate) struct AttemptLogs {
    pub(crate) folder: PathBuf,
    pub(crate) workers: Vec<WorkerLogs>,
}

/// The files of one worker in one attempt.
pub(crate) struct WorkerLogs {
    /// Where the worker may write its error.
    pub(crate) error_file: PathBuf,
    stdout: Target,
    stderr: Target,
}

/// Where one stream goes.
enum Target {
    Console,
    Nowhere,
    File { path: PathBuf, tee: bool },
}

impl WorkerLogs {
    fn create(options: &Options, attempt: &Path, rank: usize) -> Result<WorkerLogs> {
        let folder = attempt.join(rank.to_string());
        create_dir(&folder)?;
        let shown = options.local_ranks_filter.as_ref().is_none_or(|f| f.contains(&rank));
        let target = |file: &str, redirect: bool, tee: bool| match (redirect || tee, shown) {
            (true, _) => Target::File { path: folder.join(file), tee: tee && shown },
            (false, true) => Target::Console,
            (false, false) => Target::Nowhere,
        };
        let (redirect, tee) = (options.redirects.of(rank), options.tee.of(rank));
        Ok(WorkerLogs {
            error_file: folder.join("error.json"),
            stdout: target("stdout.log", redirect.0, tee.0),
            stderr: target("stderr.log", redirect.1, tee.1),
        })
    }

    /// Opens the worker's stdout and stderr.
    pub(crate) fn open(&self) -> Result<(Stdio, Stdio)> {
        Ok((self.stdout.open()?, self.stderr.open()?))
    }

    /// The files that are to be followed on the console, with `prefix` before each line.
    pub(crate) fn tee(&self, prefix: &str) -> Vec<Source> {
        let source = |target: &Target, console| match target {
            Target::File { path, tee: true } => Some(Source::new(path.clone(), console, prefix)),
            _ => None,
        };
        let both = [source(&self.stdout, Console::Stdout), source(&self.stderr, Console::Stderr)];
        both.into_iter().flatten().collect()
    }
}

impl Target {
    fn open(&self) -> Result<Stdio> {
        match self {
            Target::Console => Ok(Stdio::inherit()),
            Target::Nowhere => Ok(Stdio::null()),
            Target::File { path, .. } => {
                File::create(path).map(Stdio::from).map_err(|e| Error::io("create log file", path, &e))
            }
        }
    }
}

fn create_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::user(format!("create folder {}: a file is in the way", path.display()))
        }
        _ => Error::io("create folder", path, &e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_follow_torchrun() {
        let base = tempfile::tempdir().unwrap();
        let options = Options {
            log_dir: Some(base.path().join("a/b")),
            redirects: Streams::all(),
            tee: "1:1".parse().unwrap(),
            ..Options::default()
        };
        let logs = Logs::create(&options, "job/7").unwrap();
        let name = logs.folder().file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("job_7_") && name.len() == "job_7_".len() + 8, "{name}");
        let attempt = logs.attempt(&options, 2, &[0, 1]).unwrap();
        assert!(attempt.folder.ends_with("attempt_2"));
        assert!(attempt.workers[1].error_file.ends_with("attempt_2/1/error.json"));
        assert_eq!((attempt.workers[0].tee("").len(), attempt.workers[1].tee("").len()), (0, 1));
        attempt.workers[1].open().unwrap();
        assert!(attempt.folder.join("1/stderr.log").exists());
        logs.finish(&options, false);
        assert!(logs.folder().exists(), "a folder that was asked for stays");
    }

    #[test]
    fn a_temporary_folder_goes_unless_it_holds_an_error() {
        let options = Options::default();
        let logs = Logs::create(&options, "none").unwrap();
        let attempt = logs.attempt(&options, 0, &[0]).unwrap();
        fs::write(&attempt.workers[0].error_file, "{}").unwrap();
        logs.finish(&options, true);
        assert!(logs.folder().exists());
        logs.finish(&options, false);
        assert!(!logs.folder().exists());
    }

    #[test]
    fn what_a_killed_agent_left_is_swept_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let made = ["phalanx_dead_1", "phalanx_alive_2", "phalanx_kept_3", "other_4"].map(|name| {
            let folder = base.path().join(name);
            fs::create_dir_all(folder.join("attempt_0")).unwrap();
            folder
        });
        drop(own(&made[0]).unwrap());
        let alive = own(&made[1]).unwrap();
        drop(own(&made[3]).unwrap());
        sweep(base.path());
        assert_eq!(made.clone().map(|f| f.exists()), [false, true, true, true]);
        drop(alive);
        sweep(base.path());
        assert_eq!(made.map(|f| f.exists()), [false, false, true, true]);
    }

    #[test]
    fn an_unwritable_folder_is_the_users_error() {
        let base = tempfile::tempdir().unwrap();
        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        let options = Options { log_dir: Some(file.clone()), ..Options::default() };
        let error = Logs::create(&options, "none").err().unwrap();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
        assert!(error.hint_text().unwrap().contains("--log-dir"));
    }
}
