//! The default recipe's data: made once, found again.

use std::fs;
use std::path::{Path, PathBuf};

use data::{Source, TextSource, TokenizerChoice, prepare, prepare_default};

fn text_of(seed: u32, bytes: usize) -> String {
    let mut state = seed;
    let mut text = String::with_capacity(bytes + 20);
    while text.len() < bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.push_str(
            ["let ", "mut ", "value ", "= ", "10;\n", "fn ", "call(", ")\n"][(state >> 20) as usize % 8],
        );
    }
    text
}

/// A registry with a few small crates.
fn cargo_home(dir: &Path) -> PathBuf {
    for package in 0..4 {
        for file in 0..8 {
            let path = dir.join(format!("home/registry/src/index/c{package}-1.0.{package}/src/f{file}.rs"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text_of(package * 10 + file, 40_000)).unwrap();
        }
    }
    dir.join("home")
}

/// A directory of small files.
fn directory(dir: &Path) -> TextSource {
    for file in 0..32 {
        let path = dir.join(format!("text/f{file:02}.txt"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text_of(file, 4000)).unwrap();
    }
    TextSource::Paths(vec![dir.join("text")])
}

fn names(cache: &Path) -> usize {
    fs::read_dir(cache).unwrap().count()
}

#[test]
fn prepared_once_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (text, cache) = (directory(dir.path()), dir.path().join("cache"));
    let first = prepare_default(&cache, &text, 300, &|_| {}).unwrap();
    assert!(!first.cached);
    assert_eq!(first.documents, 32);
    let source = Source::open(&first.prefix).unwrap();
    assert_eq!(source.tokens(), first.tokens);
    source.check_vocab(300).unwrap();
    assert!(data::Tokenizer::load(&first.tokenizer_path).unwrap().vocab_size() <= 300);

    let again =
        prepare_default(&cache, &text, 300, &|_| panic!("a cached corpus has nothing to do")).unwrap();
    assert!(again.cached);
    assert_eq!((again.prefix.clone(), again.manifest), (first.prefix.clone(), first.manifest.clone()));
    assert_eq!(names(&cache), 1);

    // Another vocabulary is another dataset; both stay.
    let other = prepare_default(&cache, &text, 280, &|_| {}).unwrap();
    assert!(!other.cached && other.prefix != first.prefix);
    assert_eq!(names(&cache), 2);

    // A damaged dataset is made again.
    fs::write(data::bin_path(&first.prefix), b"short").unwrap();
    let repaired = prepare_default(&cache, &text, 300, &|_| {}).unwrap();
    assert!(!repaired.cached);
    assert_eq!(repaired.manifest, first.manifest);
    assert_eq!(names(&cache), 2);
}

#[test]
fn the_same_registry_elsewhere_gives_the_same_tokens() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let prepared = dirs.each_ref().map(|dir| {
        let home = TextSource::CargoHome(cargo_home(dir.path()));
        prepare_default(&dir.path().join("cache"), &home, 300, &|_| {}).unwrap()
    });
    assert_eq!(prepared[0].documents, 32);
    assert_eq!(prepared[0].manifest, prepared[1].manifest);
    assert_eq!(
        prepared[0].prefix.parent().unwrap().file_name(),
        prepared[1].prefix.parent().unwrap().file_name()
    );
}

#[test]
fn text_of_ones_own() {
    let dir = tempfile::tempdir().unwrap();
    let (path, cache) = (dir.path().join("book.txt"), dir.path().join("cache"));
    fs::write(&path, text_of(1, 200_000)).unwrap();
    let text = TextSource::Paths(vec![path.clone()]);
    let first = prepare_default(&cache, &text, 300, &|_| {}).unwrap();
    // One file, yet enough documents to hold some out.
    assert!(first.documents > 40, "{} documents", first.documents);
    assert!(prepare_default(&cache, &text, 300, &|_| {}).unwrap().cached);
    fs::write(&path, text_of(2, 200_001)).unwrap();
    assert!(!prepare_default(&cache, &text, 300, &|_| {}).unwrap().cached);

    // With a tokenizer given, none is trained.
    let choice = TokenizerChoice::Load(first.tokenizer_path.clone());
    let loaded = prepare(&cache, &text, &choice, &|_| {}).unwrap();
    assert_eq!(fs::read(&loaded.tokenizer_path).unwrap(), fs::read(&first.tokenizer_path).unwrap());
    assert!(prepare(&cache, &text, &choice, &|_| {}).unwrap().cached);
}

#[test]
fn several_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (text, cache) = (directory(dir.path()), dir.path().join("cache"));
    let manifests: Vec<_> = std::thread::scope(|scope| {
        let start = || scope.spawn(|| prepare_default(&cache, &text, 280, &|_| {}).unwrap().manifest);
        let threads = [start(), start(), start()];
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(manifests.iter().all(|m| *m == manifests[0]));
    assert_eq!(names(&cache), 1, "somebody's workshop stayed");
}

#[test]
fn failures_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let empty = TextSource::CargoHome(dir.path().join("nowhere"));
    let error = prepare_default(&cache, &empty, 300, &|_| {}).unwrap_err();
    assert!(error.hint_text().unwrap().contains("--text PATH"));
    assert_eq!(error.exit_code(), 2);
    fs::write(dir.path().join("bad.jsonl"), "{}").unwrap();
    let bad = TextSource::Paths(vec![dir.path().join("bad.jsonl")]);
    assert!(prepare_default(&cache, &bad, 300, &|_| {}).is_err());
    assert_eq!(names(&cache), 0);
    // A file in place of the cache directory.
    let home = TextSource::CargoHome(cargo_home(dir.path()));
    let error = prepare_default(&dir.path().join("bad.jsonl"), &home, 300, &|_| {}).unwrap_err();
    assert!(error.to_string().contains("bad.jsonl"), "{error}");
}
