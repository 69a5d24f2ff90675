//! The repository says what it is: every crate on the map, no edge that the map does not show.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Rows of ARCHITECTURE.md's code map: crate and the crates of ours that it may depend on.
fn map() -> Vec<(String, BTreeSet<String>)> {
    let text = read("ARCHITECTURE.md");
    let rows = text.lines().filter(|l| l.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let allowed = cells[3].split(", ").filter(|s| !s.is_empty()).map(str::to_owned).collect();
        (cells[1].trim_matches('`').to_owned(), allowed)
    })
    .collect()
}

fn dependencies(name: &str) -> BTreeSet<String> {
    let manifest = read(&format!("crates/{name}/Cargo.toml"));
    let normal = manifest.split("[dev-dependencies]").next().unwrap_or_default();
    let ours = normal.lines().filter_map(|l| l.strip_prefix("phalanx-"));
    ours.map(|l| l.split(['.', ' ', '=']).next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn every_crate_is_on_the_map_with_its_edges() {
    let map = map();
    let listed: BTreeSet<String> = map.iter().map(|(name, _)| name.clone()).collect();
    let found: BTreeSet<String> = fs::read_dir(root().join("crates"))
        .expect("crates")
        .map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8"))
        .filter(|name| root().join("crates").join(name).join("Cargo.toml").exists())
        .collect();
    assert_eq!(listed, found, "ARCHITECTURE.md's code map against crates/");
    for (name, allowed) in map {
        assert_eq!(dependencies(&name), allowed, "what {name} depends on, against ARCHITECTURE.md");
    }
}

/// The step program reads no clock, no files, no environment and no randomness.
#[test]
fn the_program_is_pure() {
    for file in sources(&root().join("crates/program/src")) {
        let text = fs::read_to_string(&file).expect("source");
        for banned in ["std::time", "std::fs", "std::env", "std::net", "rand::"] {
            assert!(!text.contains(banned), "{} uses {banned}", file.display());
        }
    }
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            all.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            all.push(path);
        }
    }
    all
}

#[test]
fn the_readme_shows_the_commands_that_ci_runs() {
    let (readme, ci) = (read("README.md"), read(".ci/run"));
    assert!(readme.contains("cargo run --release -- train"));
    assert!(
        readme.contains("cargo test --workspace --release")
            && ci.contains("cargo test --workspace --release")
    );
}
