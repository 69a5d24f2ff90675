//! Patterns over paths: `*` and `?` within one name, `**` for any number of directories.

use std::fs;
use std::path::{Component, Path, PathBuf};

use spec::{Error, Result};

/// Whether a path is a pattern. An existing file whose name merely looks like one is not.
pub(crate) fn has_wildcards(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?']) && !path.exists()
}

/// The regular files that match, sorted; unreadable directories are errors.
pub(crate) fn expand(pattern: &Path) -> Result<Vec<PathBuf>> {
    let parts: Vec<Component<'_>> = pattern.components().collect();
    let mut found = Vec::new();
    descend(PathBuf::new(), &parts, &mut found)?;
    found.sort();
    found.dedup();
    Ok(found)
}

fn descend(base: PathBuf, parts: &[Component<'_>], found: &mut Vec<PathBuf>) -> Result<()> {
    let Some((part, rest)) = parts.split_first() else {
        if base.exists() && !base.is_dir() {
            found.push(base);
        }
        return Ok(());
    };
    let name = part.as_os_str().to_string_lossy();
    if name == "**" {
        descend(base.clone(), rest, found)?;
        for (path, is_dir) in entries(&base)? {
            if is_dir {
                descend(path, parts, found)?;
            }
        }
        return Ok(());
    }
    if !name.contains(['*', '?']) {
        let next = base.join(part);
        return if next.exists() { descend(next, rest, found) } else { Ok(()) };
    }
    for (path, is_dir) in entries(&base)? {
        let matches = path.file_name().is_some_and(|n| matches(&name, &n.to_string_lossy()));
        if matches && (is_dir || rest.is_empty()) {
            descend(path, rest, found)?;
        }
    }
    Ok(())
}

/// Entries of a directory that are not hidden, sorted, and whether each is a directory (symbolic links to
/// directories are not followed, so that a loop of links ends).
pub(crate) fn entries(directory: &Path) -> Result<Vec<(PathBuf, bool)>> {
    let shown = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let fail = |e: std::io::Error| Error::io("read directory", shown, &e);
    let mut out = Vec::new();
    for entry in fs::read_dir(shown).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let is_dir = entry.file_type().map_err(fail)?.is_dir();
        out.push((directory.join(entry.file_name()), is_dir));
    }
    out.sort();
    Ok(out)
}

/// Matches one name; linear backtracking to the last star.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((star_p, star_n)) = star {
            star = Some((star_p, star_n + 1));
            p = star_p + 1;
            n = star_n + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let check = |pattern: &str, name: &str, expected: bool| {
            assert_eq!(matches(pattern, name), expected, "{pattern} against {name}");
        };
        check("*.txt", "a.txt", true);
        check("*.txt", "a.txt.gz", false);
        check("a?c", "abc", true);
        check("a?c", "ac", false);
        check("*a*b*", "xxaxxbxx", true);
        check("*a*b", "xxaxxbxx", false);
        check("**", "", true);
    }

    #[test]
    fn trees() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", ".hidden/e.txt"] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let check = |pattern: &str, expected: &[&str]| {
            let expected: Vec<PathBuf> = expected.iter().map(|n| dir.path().join(n)).collect();
            assert_eq!(expand(&dir.path().join(pattern)).unwrap(), expected, "{pattern}");
        };
        check("*.txt", &["a.txt"]);
        check("**/*.txt", &["a.txt", "sub/c.txt", "sub/deep/d.txt"]);
        check("sub/**/*.txt", &["sub/c.txt", "sub/deep/d.txt"]);
        check("*/c.txt", &["sub/c.txt"]);
        check("nothing/*", &[]);
    }
}
