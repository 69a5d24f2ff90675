//! A public type's name means one thing. Names that three crates or more give to something of theirs are listed, and
//! the list may only shrink.

use std::collections::{BTreeMap, BTreeSet};

use super::{files, read};

/// Two crates may look at one thing from two sides; more, and a reader asks each time which one is meant.
const CRATES_MAX: usize = 2;
const LIST: &str = "crates/phalanx/tests/tidy/shared_names.txt";

/// The public types that a formatted source file declares outside of its blocks.
fn types(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line.strip_prefix("pub ")?;
        let rest =
            ["struct ", "enum ", "trait ", "union "].iter().find_map(|kind| rest.strip_prefix(kind))?;
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
    })
}

#[test]
fn a_public_name_means_one_thing() {
    let mut crates: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in files("crates", "rs") {
        let Some((name, _)) = path.strip_prefix("crates/").and_then(|p| p.split_once("/src/")) else {
            continue;
        };
        types(&text).for_each(|t| {
            crates.entry(t.to_owned()).or_default().insert(name.to_owned());
        });
    }
    let shared = crates.iter().filter(|(_, of)| of.len() > CRATES_MAX);
    let found: BTreeMap<&str, String> =
        shared.map(|(name, of)| (name.as_str(), of.iter().cloned().collect::<Vec<_>>().join(" "))).collect();
    let list = read(LIST);
    let rows = list.lines().filter(|l| !l.starts_with('#'));
    let listed: BTreeMap<&str, String> =
        rows.filter_map(|l| l.split_once(": ")).map(|(name, of)| (name, of.to_owned())).collect();
    let new = found.iter().filter(|(name, of)| {
        let known = |c: &str| listed.get(*name).is_some_and(|l| l.split(' ').any(|x| x == c));
        !of.split(' ').all(known)
    });
    let mut wrong: Vec<String> =
        new.map(|(name, of)| format!("find another name than {name}: {of} use it")).collect();
    let old = listed.iter().filter(|(name, of)| found.get(*name).is_none_or(|now| now.len() < of.len()));
    wrong.extend(old.map(|(name, _)| match found.get(name) {
        Some(now) => format!("say {name}: {now}"),
        None => format!("take {name} out of the list"),
    }));
    assert!(wrong.is_empty(), "{LIST}:\n{}", wrong.join("\n"));
}

#[test]
fn types_are_found_where_they_are_declared() {
    let text = "pub struct A;\npub enum B<T> {\n    pub struct Inner,\n}\npub(crate) struct C;\npub trait D: E {}\npub fn f() {}\n";
    assert_eq!(types(text).collect::<Vec<_>>(), ["A", "B", "D"]);
}
