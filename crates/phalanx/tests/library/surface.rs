//! What the library offers, by name, as listed in `surface.txt`: whoever changes it changes the list, and says so in the
//! changelog.

use std::collections::BTreeSet;

const LIST: &str = include_str!("surface.txt");
const LIB: &str = include_str!("../../src/lib.rs");
const JOB: &str = include_str!("../../src/job.rs");

/// Names that `lib.rs` exports, with their module.
fn exported(text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut module = String::new();
    let code: String =
        text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut rest = code.as_str();
    while let Some(at) = rest.find("pub ") {
        rest = &rest[at + 4..];
        if let Some(name) = rest.strip_prefix("mod ") {
            module = format!("{}::", name.split([' ', '{']).next().unwrap_or_default());
            continue;
        }
        let Some(list) = rest.strip_prefix("use ").and_then(|r| r.split(';').next()) else { continue };
        let list = list.split_once('{').map_or(list, |(_, inner)| inner.trim_end_matches('}'));
        for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let name = name.rsplit(" as ").next().unwrap_or(name);
            names.insert(format!("{module}{}", name.rsplit("::").next().unwrap_or(name)));
        }
    }
    names
}

/// Signatures of functions that are public, without their bodies.
fn functions(text: &str) -> BTreeSet<String> {
    let public = text.split("pub fn ").skip(1).filter_map(|rest| rest.split(" {").next());
    public
        .map(|signature| format!("fn {}", signature.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect()
}

#[test]
fn the_surface_is_the_listed_one() {
    let found: BTreeSet<String> = exported(LIB).into_iter().chain(functions(JOB)).collect();
    let listed: BTreeSet<String> = LIST.lines().filter(|l| !l.starts_with('#')).map(str::to_owned).collect();
    let new: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(
        new.is_empty() && gone.is_empty(),
        "surface.txt lacks {new:#?} and lists {gone:#?}, which is gone: change the list, and say so in CHANGELOG.md"
    );
}

#[test]
fn names_are_read_from_exports() {
    let text = "//! pub use no;\npub use a::b::{C, d as E};\npub use f::G;\npub mod h {\n    pub use i::{\n        J, K,\n    };\n}\n";
    assert_eq!(exported(text).into_iter().collect::<Vec<_>>(), ["C", "E", "G", "h::J", "h::K"]);
    assert_eq!(
        functions("pub fn a(\n b: C) -> D {\n}").into_iter().collect::<Vec<_>>(),
        ["fn a( b: C) -> D"]
    );
}

#[test]
fn the_loop_of_the_guide_is_short() {
    let lines = include_str!("../../../../examples/ddp.rs").lines().count();
    assert!(lines < 60, "examples/ddp.rs has {lines} lines");
}
