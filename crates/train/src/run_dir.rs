use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use spec::{Context, Error, Result, RunSpec};

use crate::begin::{how_to_fall_back, whole};
use crate::beside::Fetched;
use crate::identity::{self, Trained};
use crate::text::Remembered;

pub(crate) const RUN_FILE: &str = "run.toml";

pub(crate) const TOKENIZER: &str = "tokenizer.json";

const CHECKPOINTS: &str = "checkpoints";

const DATA: &str = "data.json";

/// Larger than any run file, table or configuration; keeps an endless file from filling memory.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// The files of a run: `run.toml`, `tokenizer.json`, `data.json` (which tokens its text became), `checkpoints/`
/// unless `checkpoint.dir` names another place,
/// `journal-*.jsonl`, `tensorboard/`, and `lock` while a trainer owns it.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Where its checkpoints lie, if whoever opened it knows; else its run file is asked.
    checkpoints: Option<PathBuf>,
    /// Holds `path` if the run was fetched.
    _fetched: Option<Arc<Fetched>>,
}

impl RunDir {
    /// The run at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> RunDir {
        RunDir { path: path.into(), checkpoints: None, _fetched: None }
    }

    /// The run at `path`. A URL is that of its checkpoints: what lies beside them is fetched.
    ///
    /// # Errors
    /// If there is no run at that URL, or it cannot be fetched.
    pub fn open(path: &Path) -> Result<RunDir> {
        if !ckpt::is_url(path) {
            return Ok(RunDir::new(path));
        }
        let fetched = Arc::new(Fetched::from(path)?);
        let checkpoints = Some(path.to_owned());
        Ok(RunDir { path: fetched.path().to_owned(), checkpoints, _fetched: Some(fetched) })
    }

    /// The directory of this run, which need not exist.
    pub fn of(run: &RunSpec) -> RunDir {
        let own = || run.run.dir.join(CHECKPOINTS);
        RunDir {
            path: run.run.dir.clone(),
            checkpoints: Some(run.checkpoint.dir.clone().unwrap_or_else(own)),
            _fetched: None,
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The resolved run file.
    pub fn run_file(&self) -> PathBuf {
        self.path.join(RUN_FILE)
    }

    /// The tokenizer, if the run has one.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        let path = self.path.join(TOKENIZER);
        path.exists().then_some(path)
    }

    /// The tokenizer, if the run has one: the very one that a checkpoint of it was trained with.
    ///
    /// # Errors
    /// If it is gone, cannot be read, or is another.
    pub fn tokenizer_of(&self, checkpoint: &ckpt::Checkpoint) -> Result<Option<PathBuf>> {
        Ok(identity::of_run(self, &Trained::of(checkpoint))?.map(|t| t.path))
    }

    /// Where checkpoints go: a directory, or a URL.
    pub fn checkpoints(&self) -> PathBuf {
        let elsewhere = || if self.run_file().is_file() { self.load().ok()?.checkpoint.dir } else { None };
        self.checkpoints.clone().or_else(elsewhere).unwrap_or_else(|| self.path.join(CHECKPOINTS))
    }

    /// Where TensorBoard event files go.
    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    /// The run file of a run that was started.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn load(&self) -> Result<RunSpec> {
        let path = self.run_file();
        let text = read(&path).map_err(|e| e.hint("give the directory of a run, as its run.dir says"))?;
        if text.trim().is_empty() {
            // What a crash leaves of a file; as a run file it would mean all defaults.
            return Err(Error::user(format!("{} is empty", path.display()))
                .hint("put it back; each checkpoint names the run that it is of"));
        }
        let name = path.display().to_string();
        RunSpec::load(Some((&name, &text)), &[], &read).context("read the run's own file")
    }

    /// The tokens that the run's text became, if it says; a file that cannot be read says nothing.
    pub(crate) fn remembered(&self) -> Option<Remembered> {
        serde_json::from_str(&read(&self.path.join(DATA)).ok()?).ok()
    }

    /// Writes which tokens the run's text became.
    pub(crate) fn remember(&self, remembered: &Remembered) -> Result<()> {
        let text = serde_json::to_string_pretty(remembered)
            .map_err(|e| Error::failure(format!("write {DATA}: {e}")))?;
        replace(&self.path.join(DATA), text.as_bytes())
    }

    /// Creates the directory and writes the resolved run file and the tokenizer.
    ///
    /// # Errors
    /// If the directory cannot be written.
    pub fn create(&self, run: &RunSpec, tokenizer: Option<&Path>) -> Result<()> {
        std::fs::create_dir_all(&self.path).map_err(|e| {
            Error::io("create run directory", &self.path, &e).hint("set run.dir to a writable place")
        })?;
        replace(&self.run_file(), run.to_toml().as_bytes())?;
        if let Some(from) = tokenizer {
            let bytes = std::fs::read(from).map_err(|e| Error::io("read tokenizer", from, &e))?;
            replace(&self.path.join(TOKENIZER), &bytes)?;
        }
        Ok(())
    }

    /// Writes this run's file and its tokenizer into another directory, as a run that lies there.
    ///
    /// # Errors
    /// If they cannot be read or written.
    pub fn copy_into(&self, to: &Path, tokenizer: Option<&Path>) -> Result<()> {
        let mut run = self.load()?;
        to.clone_into(&mut run.run.dir);
        RunDir::new(to).create(&run, tokenizer)
    }

    /// The newest checkpoint, opened.
    ///
    /// # Errors
    /// If there is none, or it is damaged; then an older one that is whole is named.
    pub fn open_newest(&self) -> Result<ckpt::Checkpoint> {
        let newest = self.newest_checkpoint()?;
        ckpt::Checkpoint::open(&newest).map_err(|e| {
            let older = ckpt::list(&self.checkpoints()).unwrap_or_default();
            let older: Vec<PathBuf> =
                older.into_iter().map(|(_, path)| path).filter(|p| *p != newest).collect();
            how_to_fall_back(e, whole(older.iter().rev().map(PathBuf::as_path)))
        })
    }

    /// The newest checkpoint.
    ///
    /// # Errors
    /// If there is none.
    pub fn newest_checkpoint(&self) -> Result<PathBuf> {
        ckpt::latest(&self.checkpoints())?.ok_or_else(|| {
            Error::user(format!("no checkpoint in {}", self.checkpoints().display()))
                .hint("give the directory of a run that has saved one (checkpoint.every)")
        })
    }
}

/// Reads a text file that the user named, without its byte-order mark.
///
/// # Errors
/// If it cannot be read, is not text, or is larger than a run file or configuration can be.
pub fn read(path: &Path) -> Result<String> {
    let io = |e| Error::io("read", path, &e);
    let of_shell = path.starts_with("/dev/fd") || path.starts_with("/proc/self/fd");
    if std::fs::metadata(path).map_err(io)?.file_type().is_fifo() && !of_shell {
        // Opening one waits for a writer, perhaps for ever; the shell's `<(...)` has one.
        return Err(Error::user(format!("read {}: a pipe, expected a file", path.display()))
            .hint("write what comes through it into a file first"));
    }
    let file = std::fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    let path = path.display();
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        return Err(Error::user(format!("read {path}: larger than {} MiB", TEXT_BYTES_MAX >> 20))
            .hint("name a configuration or table, not a file of weights or data"));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::user(format!("read {path}: not text: byte {at} is no UTF-8"))
            .hint("name a text file; save it as UTF-8")
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Writes a file under a temporary name and renames it, so that nobody ever sees half of it.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temp = path.with_extension(format!("{}.tmp", std::process::id()));
    let io = |e: std::io::Error| {
        let _ = std::fs::remove_file(&temp);
        Error::io("write", path, &e).hint("set run.dir to a writable place with free space")
    };
    let written = std::fs::File::create(&temp).and_then(|mut f| {
        std::io::Write::write_all(&mut f, bytes)?;
        f.sync_all()
    });
    written.and_then(|()| std::fs::rename(&temp, path)).map_err(io)
}
