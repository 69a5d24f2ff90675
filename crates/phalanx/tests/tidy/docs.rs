//! What documents point to is there.

use std::collections::BTreeMap;
use std::path::Path;

use super::{files, read, root};

/// Targets of links and paths in backquotes that `text` names.
fn targets(text: &str) -> Vec<(&str, bool)> {
    let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ', '#']).next());
    let links = links.filter(|l| !l.is_empty() && !l.contains("://")).map(|l| (l, true));
    let tops = ["crates/", "docs/", "catalog/", "tests/", "bench/", ".ci/", ".github/"];
    let quoted = text.split('`').skip(1).step_by(2);
    let is_path = move |q: &&str| {
        let plain = q.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
        plain
            && tops.iter().any(|t| q.starts_with(t))
            && !q.split(['/', '.']).any(|word| word == word.to_uppercase() && word.len() > 2)
    };
    links.chain(quoted.filter(is_path).map(|q| (q, false))).collect()
}

#[test]
fn links_and_paths_resolve() {
    for (path, text) in files(".", "md") {
        let prose: String = text.split("```").step_by(2).collect();
        for (target, is_link) in targets(&prose) {
            let here = Path::new(&path).parent().expect("a folder");
            let from_here = root().join(here).join(target).exists();
            let from_root =
                root().join(target).exists() || crate_of(&path).is_some_and(|c| c.join(target).exists());
            assert!(from_here || (!is_link && from_root), "{path} names {target}, which is not there");
        }
    }
}

/// The crate that a document belongs to; its paths may be from there.
fn crate_of(path: &str) -> Option<std::path::PathBuf> {
    let name = path.strip_prefix("crates/")?.split('/').next()?;
    Some(root().join("crates").join(name))
}

/// Decisions are numbered once, titled by their number, and listed.
#[test]
fn decisions_are_numbered_and_listed() {
    let list = read("docs/decisions/README.md");
    let mut numbers: BTreeMap<String, String> = BTreeMap::new();
    for (path, text) in files("docs/decisions", "md") {
        let file = path.rsplit('/').next().unwrap_or_default();
        if file == "README.md" {
            continue;
        }
        let number = file.get(..3).filter(|n| n.chars().all(|c| c.is_ascii_digit()));
        let number = number.unwrap_or_else(|| panic!("{path} does not begin with three digits")).to_owned();
        let title = text.lines().next().and_then(|l| l.strip_prefix(&format!("# {number}: ")));
        let title = title.unwrap_or_else(|| panic!("{path} is not titled `# {number}: ...`"));
        let row = format!("- [{number}]({file}) {title}\n");
        assert!(list.contains(&row), "docs/decisions/README.md lacks\n{row}");
        let twice = numbers.insert(number.clone(), path.clone());
        assert!(twice.is_none(), "{number} is {path} and {twice:?}");
    }
    for (path, text) in files("crates", "rs").into_iter().chain(files(".", "md")) {
        for rest in text.split("ecision ").skip(1) {
            let number = rest.get(..3).filter(|n| n.chars().all(|c| c.is_ascii_digit()));
            assert!(number.is_none_or(|n| numbers.contains_key(n)), "{path} speaks of decision {number:?}");
        }
    }
}
