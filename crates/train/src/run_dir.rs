use std::path::{Path, PathBuf};

use spec::{Context, Error, Result, RunSpec};

/// The files of a run: `run.toml`, `tokenizer.json`, `checkpoints/`, `journal-*.jsonl`, `tensorboard/`.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The run at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> RunDir {
        RunDir { path: path.into() }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The resolved run file.
    pub fn run_file(&self) -> PathBuf {
        self.path.join("run.toml")
    }

    /// The tokenizer, if the run has one.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        let path = self.path.join("tokenizer.json");
        path.exists().then_some(path)
    }

    /// Where checkpoints go.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
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
        let name = path.display().to_string();
        RunSpec::load(Some((&name, &text)), &[], &read).context("read the run's own file")
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
            replace(&self.path.join("tokenizer.json"), &bytes)?;
        }
        Ok(())
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

/// Reads a text file that the user named.
///
/// # Errors
/// If it cannot be read, with its path.
pub fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))
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
