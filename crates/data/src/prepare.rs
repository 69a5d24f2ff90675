use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use spec::{Context, Error, Result};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::atomic::{machine, sync_directory, temporary_name};
use crate::builder::{BuildOptions, build_inputs, train_on_inputs};
use crate::corpus::{candidates, distinct};
use crate::file::read_small;
use crate::fingerprint::{Fingerprint, tokenizer_fingerprint};
use crate::indexed::{IndexedDataset, with_suffix};
use crate::input::{Input, TextOptions, check_field, resolve};
use crate::manifest::Manifest;
use crate::progress::{OnProgress, Progress, Stage};
use crate::tokenizer::{TOKENIZER_BYTES_MAX, Tokenizer};

/// Where the text of a run comes from.
#[derive(Clone, Debug)]
pub enum TextSource {
    /// The crate sources under this `CARGO_HOME` (see [`crate::cargo_sources`]).
    CargoHome(PathBuf),
    /// Files, directories and patterns, as [`BuildOptions::inputs`].
    Paths(Vec<PathBuf>),
}

/// Which tokenizer to use.
#[derive(Clone, Debug)]
pub enum TokenizerChoice {
    /// Train one of at most this many entries on the text.
    Train {
        /// Entries, 257 at least.
        vocab_size: usize,
    },
    /// Load this `tokenizer.json`.
    Load(PathBuf),
}

/// A dataset that is ready to train on.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Prefix of the `.bin/.idx` pair.
    pub prefix: PathBuf,
    /// The tokenizer that made it.
    pub tokenizer_path: PathBuf,
    /// Documents in it.
    pub documents: u64,
    /// Tokens in it.
    pub tokens: u64,
    /// All that is known about it.
    pub manifest: Manifest,
    /// Whether it was there already.
    pub cached: bool,
}

/// Text that the tokenizer is trained on; more changes its merges little and takes longer.
const TRAIN_BYTES: u64 = 6 << 20;
/// Text of one's own is cut into about this many documents at least, so that a held-out share of 1 % has some.
const MIN_DOCUMENTS: u64 = 256;
/// The bounds of such a document.
const DOCUMENT_BYTES: std::ops::RangeInclusive<u64> = (4 << 10)..=(256 << 10);
/// Part of the cache key: raise it when the same text would give other tokens.
const RECIPE_VERSION: u64 = 2;
/// An unfinished preparation this old belongs to a process that was killed.
const STALE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Makes a dataset from text in `cache_dir`, or finds the one that was made from the same text before.
///
/// Whether the text is the same is told from names, sizes and modification times, without reading it. A dataset that was
/// made with a tokenizer trained on the same text is found by that tokenizer too ([`TokenizerChoice::Load`]). Several processes
/// may prepare the same at once: each works aside and the first to finish wins.
///
/// # Errors
/// As [`crate::cargo_sources`], [`crate::build`], [`Tokenizer::load`] and [`Tokenizer::train`]; a cache directory that
/// cannot be written.
pub fn prepare(
    cache_dir: &Path,
    text: &TextSource,
    tokenizer: &TokenizerChoice,
    progress: OnProgress<'_>,
) -> Result<Prepared> {
    prepare_with(cache_dir, text, tokenizer, &TextOptions::default(), progress)
}

/// As [`prepare`], with documents described by `options`.
///
/// # Errors
/// As [`prepare`]; a field that no input has, an end token that the tokenizer does not have.
pub fn prepare_with(
    cache_dir: &Path,
    text: &TextSource,
    tokenizer: &TokenizerChoice,
    options: &TextOptions,
    progress: OnProgress<'_>,
) -> Result<Prepared> {
    let mut text_key = Xxh3::new();
    let found = Found::look(text, &mut text_key)?;
    let mut key = Xxh3::new();
    key.update(&RECIPE_VERSION.to_le_bytes());
    key_tokenizer(&mut key, tokenizer)?;
    key.update(&text_key.digest128().to_le_bytes());
    let options_key = options.key();
    key.update(options_key.as_deref().unwrap_or_default().as_bytes());
    let text_key = Fingerprint::of(&text_key);
    let directory = cache_dir.join(format!("corpus-{:016x}", key.digest()));
    if let Some(prepared) = prepared_in(&directory) {
        return Ok(prepared);
    }
    if let TokenizerChoice::Load(path) = tokenizer
        && let Some(prepared) = find(cache_dir, text_key, options, tokenizer_fingerprint(path)?)
    {
        return Ok(prepared);
    }
    fs::create_dir_all(cache_dir).map_err(|e| {
        Error::io("create cache directory", cache_dir, &e).hint("choose another with data.cache_dir")
    })?;
    remove_stale(cache_dir);
    progress(Progress { stage: Stage::Collect, done_bytes: 0, total_bytes: 0 });
    let (inputs, document_bytes) = found.inputs()?;
    let workshop = Workshop::create(&directory)?;
    check_field(&inputs, options)?;
    let mut tokenizer = match tokenizer {
        TokenizerChoice::Load(path) => Tokenizer::load(path)?,
        TokenizerChoice::Train { vocab_size } => {
            train_on_inputs(&inputs, options, *vocab_size, TRAIN_BYTES, progress)?
        }
    };
    if let Some(end) = &options.end {
        tokenizer.set_eod(end)?;
    }
    let mut build = BuildOptions::new(Vec::new(), workshop.path.join(NAME));
    build.document_bytes = document_bytes;
    build.text_key = Some(text_key);
    build.options_key = options_key;
    build.text = options.clone();
    build_inputs(&build, &inputs, &tokenizer, progress)
        .context(format_args!("prepare data in {}", cache_dir.display()))?;
    workshop.publish(&directory)?;
    reuse(&directory, false).ok_or_else(|| {
        Error::failure(format!("{}: changed while it was being prepared", directory.display()))
    })
}

/// The dataset that [`prepare`] once made in `directory`, if it is whole and its tokenizer is the one it was made with.
pub fn prepared_in(directory: &Path) -> Option<Prepared> {
    reuse(directory, true)
}

/// Names a text by its files' names, sizes and modification times, without reading it: [`Manifest::text_key`] of what is
/// prepared from it now.
///
/// # Errors
/// If the text is not there.
pub fn text_key(text: &TextSource) -> Result<Fingerprint> {
    let mut key = Xxh3::new();
    Found::look(text, &mut key)?;
    Ok(Fingerprint::of(&key))
}

/// The default recipe's data: [`prepare`] with the crate sources and a tokenizer trained on them.
///
/// # Errors
/// As [`prepare`].
pub fn prepare_default(
    cache_dir: &Path,
    text: &TextSource,
    vocab_size: usize,
    progress: OnProgress<'_>,
) -> Result<Prepared> {
    prepare(cache_dir, text, &TokenizerChoice::Train { vocab_size }, progress)
}

/// File names inside a cache directory start with this.
const NAME: &str = "corpus";

/// The text, as far as it is known without reading it.
enum Found {
    Crates(Vec<crate::corpus::Candidate>),
    Files(Vec<Input>),
}

impl Found {
    fn look(text: &TextSource, key: &mut Xxh3) -> Result<Found> {
        match text {
            TextSource::CargoHome(home) => {
                let files = candidates(home)?;
                // Unpacked crates never change, and their names hold the version.
                for file in &files {
                    key.update(file.name.as_bytes());
                    key.update(&file.bytes.to_le_bytes());
                }
                Ok(Found::Crates(files))
            }
            TextSource::Paths(paths) => {
                let files = resolve(paths)?;
                for file in &files {
                    // However the path is spelt.
                    let path = fs::canonicalize(&file.path);
                    let path = path.as_ref().map_or(&*file.path, |p| p.as_path());
                    key.update(path.as_os_str().as_encoded_bytes());
                    key.update(&file.bytes.to_le_bytes());
                    key.update(&modified_ns(&file.path).to_le_bytes());
                }
                Ok(Found::Files(files))
            }
        }
    }

    /// What to read, and near which size to cut documents.
    fn inputs(self) -> Result<(Vec<Input>, Option<u64>)> {
        match self {
            Found::Crates(candidates) => {
                let mut files = distinct(candidates)?;
                // Sorted by content hash, so that the held-out end of the data is a fair sample of all crates.
                files.sort_by_key(|file| file.hash);
                let inputs = files
                    .into_iter()
                    .map(|f| Input { path: f.path.into(), bytes: f.bytes, is_named: false })
                    .collect();
                Ok((inputs, None))
            }
            Found::Files(files) => {
                let total: u64 = files.iter().map(|f| f.bytes).sum();
                let share = total / MIN_DOCUMENTS;
                Ok((files, Some(share.clamp(*DOCUMENT_BYTES.start(), *DOCUMENT_BYTES.end()))))
            }
        }
    }
}

fn key_tokenizer(key: &mut Xxh3, tokenizer: &TokenizerChoice) -> Result<()> {
    match tokenizer {
        TokenizerChoice::Train { vocab_size } => {
            key.update(b"train");
            key.update(&(*vocab_size as u64).to_le_bytes());
            key.update(&TRAIN_BYTES.to_le_bytes());
        }
        TokenizerChoice::Load(path) => {
            key.update(b"load");
            key.update(&read_small(path, TOKENIZER_BYTES_MAX)?);
        }
    }
    Ok(())
}

fn modified_ns(path: &Path) -> u64 {
    let modified = path.metadata().and_then(|m| m.modified()).ok();
    modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos() as u64)
}

/// As [`prepared_in`]; says whether it was there already.
fn reuse(directory: &Path, cached: bool) -> Option<Prepared> {
    let prefix = directory.join(NAME);
    let manifest = Manifest::load(&prefix).ok()?;
    let dataset = IndexedDataset::open(&prefix).ok()?;
    let tokenizer_path = with_suffix(&prefix, ".tokenizer.json");
    let tokenizer = read_small(&tokenizer_path, TOKENIZER_BYTES_MAX).ok()?;
    let is_whole = dataset.tokens() == manifest.tokens
        && dataset.documents() as u64 == manifest.documents
        && format!("{:032x}", xxh3_128(&tokenizer)) == manifest.tokenizer_xxh3;
    is_whole.then_some(Prepared {
        prefix,
        tokenizer_path,
        documents: manifest.documents,
        tokens: manifest.tokens,
        manifest,
        cached,
    })
}

/// The dataset that was made of the same text with an equal tokenizer, such as the one that an earlier run trained.
fn find(
    cache_dir: &Path,
    text_key: Fingerprint,
    options: &TextOptions,
    tokenizer: Fingerprint,
) -> Option<Prepared> {
    let mut entries: Vec<_> = fs::read_dir(cache_dir).ok()?.flatten().collect();
    entries.sort_by_key(|entry| entry.file_name());
    entries.iter().filter(|e| e.file_name().to_string_lossy().starts_with("corpus-")).find_map(|entry| {
        let manifest = Manifest::load(&entry.path().join(NAME)).ok()?;
        let is_same = manifest.is_of(text_key, options) && manifest.tokenizer_fingerprint == Some(tokenizer);
        if is_same { reuse(&entry.path(), true) } else { None }
    })
}

/// A directory under a temporary name; dropped unpublished, it is removed.
struct Workshop {
    path: PathBuf,
}

impl Workshop {
    fn create(destination: &Path) -> Result<Workshop> {
        let path = temporary_name(destination);
        fs::create_dir(&path).map_err(|e| {
            Error::io("create cache directory", &path, &e).hint("choose another place with data.cache_dir")
        })?;
        Ok(Workshop { path })
    }

    /// Renames into place; what lies there was found broken, or has just been made by another process.
    fn publish(self, destination: &Path) -> Result<()> {
        if fs::rename(&self.path, destination).is_err() {
            if prepared_in(destination).is_some() {
                return Ok(());
            }
            fs::remove_dir_all(destination).map_err(|e| Error::io("replace", destination, &e))?;
            fs::rename(&self.path, destination)
                .map_err(|e| Error::io("rename into place", destination, &e))?;
        }
        sync_directory(destination);
        Ok(())
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // After publishing the name is gone and this finds nothing.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Whether a temporary name is of a process of this machine that is gone. Another machine's process may share the
/// directory: names say which machine they are of.
fn is_of_the_dead(name: &str) -> bool {
    let maker = name.strip_suffix(".tmp").and_then(|n| n.rsplit_once('.')).map(|(_, maker)| maker);
    let pid = maker.and_then(|m| m.strip_prefix(&machine())?.split('-').next()?.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
}

/// Removes what killed processes left; failing to is no reason not to go on.
fn remove_stale(cache_dir: &Path) {
    for entry in fs::read_dir(cache_dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_ours = name.starts_with(".corpus-") && name.ends_with(".tmp");
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if is_ours && (is_of_the_dead(&name) || age.is_some_and(|age| age > STALE_AFTER)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
