//! The repository says what it is: every crate on the map, no edge that the map does not show, no file that nothing
//! reaches, no function that outgrows its place, no name that means three things, no link into the void.

mod docs;
mod functions;
mod modules;
mod names;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file.
const FILE_LINES_MAX: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Files below `dir` whose names end in `.ext`, as (path from the root, text), in order. Build products and hidden
/// folders are left out.
fn files(dir: &str, ext: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, ext: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|n| n.to_str()).expect("UTF-8");
            if path.is_dir() && !name.starts_with('.') && !["target", "runs"].contains(&name) {
                walk(&path, ext, found);
            } else if path.extension().is_some_and(|e| e == ext) && !path.is_dir() {
                found.push(path);
            }
        }
    }
    let (root, mut found) = (root(), Vec::new());
    walk(&root.join(dir), ext, &mut found);
    found.sort();
    found
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            (path.strip_prefix(&root).expect("below the root").to_str().expect("UTF-8").to_owned(), text)
        })
        .collect()
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

/// Crates of which ARCHITECTURE.md says that they read no clock, no environment and no randomness, and do no I/O.
fn pure() -> Vec<String> {
    let text = read("ARCHITECTURE.md");
    let absences = text.split("- ").find(|item| item.contains("read no clock")).expect("an absence");
    let before = absences.split("read no clock").next().unwrap_or_default();
    before.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Clippy knows single functions and types (`clippy.toml`); this knows whole modules.
#[test]
fn pure_crates_are_pure() {
    let pure = pure();
    assert!(pure.len() >= 3, "{pure:?}");
    let rules = read("crates/spec/clippy.toml");
    for name in pure {
        assert_eq!(read(&format!("crates/{name}/clippy.toml")), rules, "the rules of {name}");
        for (path, text) in files(&format!("crates/{name}/src"), "rs") {
            for banned in ["std::time", "std::fs", "std::env", "std::net", "std::process", "rand::"] {
                assert!(!text.contains(banned), "{path} uses {banned}");
            }
        }
    }
}

#[test]
fn no_file_outgrows_its_place() {
    for (path, text) in files("crates", "rs") {
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{path} has {lines} lines, expected at most {FILE_LINES_MAX}");
    }
}

#[test]
fn nothing_is_left_for_later() {
    let marks = ["todo", "fixme", "xxx", "hack"].map(str::to_uppercase);
    for (path, text) in ["rs", "md", "toml"].into_iter().flat_map(|ext| files(".", ext)) {
        for (i, line) in text.lines().enumerate() {
            let left = line.split(|c: char| !c.is_alphanumeric()).find(|w| marks.iter().any(|m| m == w));
            assert!(left.is_none(), "{path}:{} says {left:?}", i + 1);
        }
    }
}

#[test]
fn the_readme_shows_the_commands_that_ci_runs() {
    let (readme, ci, workflow) = (read("README.md"), read(".ci/run"), read(".github/workflows/ci.yml"));
    assert!(readme.contains("cargo run --release -- train"));
    let tests = "cargo test --workspace --release";
    assert!(readme.contains(tests) && ci.lines().any(|l| l == tests), "{tests}");
    assert!(workflow.contains("run: .ci/run"), "the hosted workflow calls .ci/run");
}
