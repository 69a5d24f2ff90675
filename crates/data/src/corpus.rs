//! The text of the default recipe: source code that cargo has already unpacked.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use spec::{Error, Result};
use xxhash_rust::xxh3::xxh3_128;

use crate::glob::entries;

/// Text taken in all: some 15 million tokens, several epochs of the default recipe, tokenised in seconds.
const MAX_TOTAL_BYTES: u64 = 48 << 20;
/// Larger files are mostly tables.
const MAX_FILE_BYTES: u64 = 256 << 10;
/// No crate may dominate.
const MAX_CRATE_BYTES: u64 = 2 << 20;
/// Less text than this trains nothing worth looking at.
const MIN_TOTAL_BYTES: u64 = 1 << 20;
/// Deeper directories are not followed.
const MAX_DEPTH: usize = 24;
/// Crates that are generated bindings: the same line ten thousand times.
const GENERATED: [&str; 6] =
    ["windows-sys", "windows-targets", "windows_", "winapi", "linux-raw-sys", "web-sys"];
const HINT: &str = "give text of your own with `--text PATH` (a file, a directory or a pattern)";

/// A file that may become part of the corpus.
pub(crate) struct Candidate {
    pub(crate) path: PathBuf,
    /// Path below the registry: the same wherever cargo keeps it.
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// A file of the corpus and the hash of its content.
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) hash: u128,
}

/// Where cargo keeps what it fetched: `CARGO_HOME`, or `.cargo` in the home directory.
pub fn default_cargo_home() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("CARGO_HOME").or_else(|| set("HOME").map(|home| home.join(".cargo")))
}

/// The `.rs`, `.md` and `.toml` files of the crates unpacked under `CARGO_HOME/registry/src`, sorted by crate and path.
///
/// Of each crate only the newest version counts, of equal files only the first; generated bindings and large files are left
/// out, and crates and total are capped (2 MiB and 48 MiB). The same registry gives the same list.
///
/// # Errors
/// No such directory, or less than 1 MiB of text in it.
pub fn cargo_sources(cargo_home: &Path) -> Result<Vec<PathBuf>> {
    Ok(distinct(candidates(cargo_home)?)?.into_iter().map(|file| file.path).collect())
}

/// Everything that may be part of the corpus, found without reading a file.
pub(crate) fn candidates(cargo_home: &Path) -> Result<Vec<Candidate>> {
    let registry = cargo_home.join("registry").join("src");
    if !registry.is_dir() {
        return Err(
            Error::user(format!("no crate sources: {} is not a directory", registry.display())).hint(HINT)
        );
    }
    let mut found = Vec::new();
    for (directory, package) in newest_crates(&registry)? {
        let start = found.len();
        collect(&directory, &package, 0, &mut found)?;
        let mut total = 0;
        let keep = found[start..]
            .iter()
            .take_while(|file| {
                total += file.bytes;
                total <= MAX_CRATE_BYTES
            })
            .count();
        found.truncate(start + keep);
    }
    Ok(found)
}

/// Reads the candidates, drops repetitions and what exceeds the total.
pub(crate) fn distinct(candidates: Vec<Candidate>) -> Result<Vec<SourceFile>> {
    let hashed: Vec<Option<SourceFile>> = candidates
        .into_par_iter()
        .map(|Candidate { path, .. }| {
            // A file that vanished or is not text is simply not part of the corpus.
            let content = std::fs::read(&path).ok().filter(|c| std::str::from_utf8(c).is_ok())?;
            Some(SourceFile { path, bytes: content.len() as u64, hash: xxh3_128(&content) })
        })
        .collect();
    let mut seen = HashSet::new();
    let mut total = 0;
    let mut files = Vec::new();
    for file in hashed.into_iter().flatten() {
        if total + file.bytes <= MAX_TOTAL_BYTES && seen.insert(file.hash) {
            total += file.bytes;
            files.push(file);
        }
    }
    if total < MIN_TOTAL_BYTES {
        return Err(Error::user(format!(
            "the crate sources hold {} KiB of text, too little to train on (at least {} KiB)",
            total >> 10,
            MIN_TOTAL_BYTES >> 10
        ))
        .hint(HINT));
    }
    Ok(files)
}

/// The directory of the newest version of each crate, by name; registries are merged.
fn newest_crates(registry: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut newest: BTreeMap<String, (Version, PathBuf, String)> = BTreeMap::new();
    for (index, is_dir) in entries(registry)? {
        if !is_dir {
            continue;
        }
        for (path, is_dir) in entries(&index)? {
            let package = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some((name, version)) = split_package(&package).filter(|_| is_dir) else {
                continue;
            };
            if GENERATED.iter().any(|prefix| name.starts_with(prefix)) {
                continue;
            }
            let is_newer = newest.get(name).is_none_or(|(other, ..)| version > *other);
            if is_newer {
                newest.insert(name.to_owned(), (version, path, package.clone()));
            }
        }
    }
    Ok(newest.into_values().map(|(_, path, package)| (path, package)).collect())
}

fn collect(directory: &Path, name: &str, depth: usize, found: &mut Vec<Candidate>) -> Result<()> {
    for (path, is_dir) in entries(directory)? {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{name}/{file}");
        if is_dir {
            if depth < MAX_DEPTH && file != "target" {
                collect(&path, &name, depth + 1, found)?;
            }
            continue;
        }
        let is_text = matches!(path.extension().and_then(|e| e.to_str()), Some("rs" | "md" | "toml"));
        let bytes = path.metadata().map_or(0, |m| m.len());
        if is_text && (1..=MAX_FILE_BYTES).contains(&bytes) {
            found.push(Candidate { path, name, bytes });
        }
    }
    Ok(())
}

/// Major, minor, patch, release rather than pre-release, and the rest as text.
type Version = (u64, u64, u64, bool, String);

/// `serde-1.0.219` into its name and a version that compares.
fn split_package(package: &str) -> Option<(&str, Version)> {
    package.match_indices('-').find_map(|(at, _)| {
        let (name, version) = (&package[..at], &package[at + 1..]);
        let end = version.find(['-', '+']).unwrap_or(version.len());
        let mut numbers = version[..end].split('.').map(|n| n.parse::<u64>().ok());
        let (major, minor, patch) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let rest = &version[end..];
        numbers
            .next()
            .is_none()
            .then(|| (name, (major, minor, patch, !rest.starts_with('-'), rest.to_owned())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_split_into_name_and_version() {
        let check = |package, expected: Option<&str>| {
            assert_eq!(split_package(package).map(|(name, _)| name), expected, "{package}");
        };
        check("serde-1.0.219", Some("serde"));
        check("wasip2-1.0.4+wasi-0.2.12", Some("wasip2"));
        check("utf-8-0.7.6", Some("utf-8"));
        check("not a package", None);
        let version = |package| split_package(package).unwrap().1;
        assert!(version("a-1.10.0") > version("a-1.9.9"));
        assert!(version("a-1.0.0") > version("a-1.0.0-rc.1"));
    }

    #[test]
    fn newest_versions_without_repetitions() {
        let home = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = home.path().join("registry/src/index").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let long = |seed: u32| format!("// {seed}\n").repeat(20_000);
        for i in 10..24 {
            write(&format!("b-2.0.0/src/f{i}.rs"), &long(i));
        }
        write("b-1.0.0/src/old.rs", &long(100));
        write("a-0.1.0/copy.rs", &long(13));
        write("a-0.1.0/binary.rs", "\u{0}");
        std::fs::write(home.path().join("registry/src/index/a-0.1.0/latin.rs"), b"\xff\xfe").unwrap();
        write("a-0.1.0/picture.png", "no");
        write("windows-sys-0.1.0/lib.rs", &long(200));
        let names: Vec<String> = cargo_sources(home.path())
            .unwrap()
            .iter()
            .map(|p| p.strip_prefix(home.path().join("registry/src/index")).unwrap().display().to_string())
            .collect();
        let b = (10..24).filter(|i| *i != 13).map(|i| format!("b-2.0.0/src/f{i}.rs"));
        let expected: Vec<String> =
            ["a-0.1.0/binary.rs".into(), "a-0.1.0/copy.rs".into()].into_iter().chain(b).collect();
        assert_eq!(names, expected);
    }

    #[test]
    fn too_little_is_refused_with_a_way_out() {
        let home = tempfile::tempdir().unwrap();
        let error = cargo_sources(home.path()).unwrap_err();
        assert!(error.hint_text().unwrap().contains("--text PATH"));
        std::fs::create_dir_all(home.path().join("registry/src/index/a-0.1.0")).unwrap();
        let error = cargo_sources(home.path()).unwrap_err();
        assert!(error.to_string().contains("too little"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
