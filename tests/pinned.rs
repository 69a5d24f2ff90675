//! What many inputs become, as text that is kept beside the tests: whoever changes a rule sees what else it moves, and means
//! it.

use std::path::Path;

/// Compares with `tests/pinned/NAME.txt` of the crate whose test this is.
#[track_caller]
#[expect(clippy::disallowed_methods, reason = "what is pinned is read, and what it should become is written")]
pub(crate) fn check(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/pinned/{name}.txt"));
    let pinned = std::fs::read_to_string(&path).unwrap_or_default();
    if found == pinned {
        return;
    }
    let known: std::collections::BTreeSet<&str> = pinned.lines().collect();
    let moved: Vec<&str> = found.lines().filter(|line| !known.contains(line)).take(40).collect();
    let new = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.txt"));
    std::fs::write(&new, found).expect("a folder for what tests write");
    panic!("{} should become {}; what moved:\n{}", path.display(), new.display(), moved.join("\n"));
}
