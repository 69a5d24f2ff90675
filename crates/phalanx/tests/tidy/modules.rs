//! Every source file belongs to a crate.

use std::collections::BTreeSet;

use super::files;

/// Files of `all` that are named as modules by `path`, which holds `text`.
fn named(path: &str, text: &str) -> Vec<String> {
    let (dir, file) = path.rsplit_once('/').expect("a folder");
    let stem = file.trim_end_matches(".rs");
    let is_root = ["lib", "main", "mod"].contains(&stem) || is_target(path);
    let below = if is_root { dir.to_owned() } else { format!("{dir}/{stem}") };
    let mut found = Vec::new();
    let mut at = None;
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("#[path = \"") {
            at = rest.split('"').next();
        } else if let Some(name) = module(line) {
            match at.take() {
                Some(file) => found.push(format!("{dir}/{file}")),
                None => found.extend([format!("{below}/{name}.rs"), format!("{below}/{name}/mod.rs")]),
            }
        } else if !line.starts_with("#[") {
            at = None;
        }
    }
    found
}

/// The name in `pub(crate) mod name;`.
fn module(line: &str) -> Option<&str> {
    let name = line.strip_suffix(';')?.rsplit_once("mod ")?;
    let visibility = name.0.trim();
    (visibility.is_empty() || visibility.starts_with("pub")).then_some(name.1)
}

/// Whether cargo finds `path` by itself: a test, an example, a crate's root.
fn is_target(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    matches!(
        parts[2..],
        ["src", "lib.rs" | "main.rs"]
            | ["build.rs"]
            | ["tests" | "examples" | "benches", _]
            | ["tests" | "examples" | "benches", _, "main.rs"]
    )
}

#[test]
fn no_file_is_dead() {
    let all = files("crates", "rs");
    let mut reached: BTreeSet<String> =
        all.iter().map(|(path, _)| path.clone()).filter(|path| is_target(path)).collect();
    loop {
        let before = reached.len();
        for (path, text) in all.iter().filter(|(path, _)| reached.contains(path)).collect::<Vec<_>>() {
            reached.extend(named(path, text));
        }
        if reached.len() == before {
            break;
        }
    }
    let dead: Vec<&String> =
        all.iter().map(|(path, _)| path).filter(|path| !reached.contains(*path)).collect();
    assert!(dead.is_empty(), "no `mod` names {dead:?}");
}

#[test]
fn modules_are_found_where_rust_finds_them() {
    let check = |path: &str, text: &str, expected: &[&str]| assert_eq!(named(path, text), expected, "{text}");
    check("crates/a/src/lib.rs", "mod b;", &["crates/a/src/b.rs", "crates/a/src/b/mod.rs"]);
    check("crates/a/src/b.rs", "pub mod c;", &["crates/a/src/b/c.rs", "crates/a/src/b/c/mod.rs"]);
    check("crates/a/src/b.rs", "#[cfg(test)]\n#[path = \"b_t.rs\"]\nmod t;", &["crates/a/src/b_t.rs"]);
    check(
        "crates/a/tests/t.rs",
        "mod common;",
        &["crates/a/tests/common.rs", "crates/a/tests/common/mod.rs"],
    );
    check("crates/a/src/lib.rs", "// a mod b;\nmod c {", &[]);
}
