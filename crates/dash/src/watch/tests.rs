use std::fs;

use super::*;

#[test]
fn names_tell_runs_apart() {
    let check = |dirs: &[&str], expected: &[&str]| {
        let dirs: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
        assert_eq!(names(&dirs), expected);
    };
    check(&["/a/b/x"], &["x"]);
    check(&["/a/b/x", "/a/c/y/"], &["x", "y"]);
    check(&["/a/b/x", "/a/c/x"], &["b/x", "c/x"]);
    check(&["/a/x", "/a/x"], &["x #1", "x #2"]);
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("write");
    for (path, says) in [
        (dir.path().join("nowhere"), "nowhere"),
        (file, "is no directory"),
        (dir.path().to_owned(), "holds no journal and no run.toml"),
    ] {
        let e = check(&path).expect_err("no run");
        assert!(e.to_string().contains(says), "{e}");
        assert_eq!((e.exit_code(), e.hint_text().is_some()), (2, true), "{e}");
    }
    fs::write(dir.path().join("run.toml"), "").expect("write");
    assert!(check(dir.path()).is_ok(), "a run that is about to begin is waited for");
}
