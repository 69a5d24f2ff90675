//! Identity is content: moved and rewritten files keep it, changed ones do not.

use std::fs;
use std::path::Path;

use data::{
    BuildOptions, Fingerprint, Manifest, TextSource, Tokenizer, TokenizerChoice, dataset_fingerprint,
    dataset_tokenizer, prepare,
};
use serde_json::{Value, json};

fn trained(text: &str) -> Tokenizer {
    Tokenizer::train([text], 300, &|_| {}).unwrap()
}

fn text(words: [&str; 4]) -> String {
    words.iter().cycle().take(4000).map(|w| format!("{w} ")).collect()
}

fn build(dir: &Path, text: &str, tokenizer: &Tokenizer) -> BuildOptions {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("a.txt"), text).unwrap();
    let options = BuildOptions::new(vec![dir.join("a.txt")], dir.join("data"));
    data::build(&options, tokenizer, &|_| {}).unwrap();
    options
}

/// The fingerprint of a tokenizer after `change` to its JSON, beside that of the unchanged one.
fn check(change: impl FnOnce(&mut Value), is_same: bool) {
    let tokenizer = trained(&text(["one", "two", "three", "four"]));
    let mut json: Value = serde_json::from_slice(&tokenizer.to_json().unwrap()).unwrap();
    change(&mut json);
    let changed = Tokenizer::from_bytes(&serde_json::to_vec(&json).unwrap()).unwrap();
    let same = changed.fingerprint().unwrap() == tokenizer.fingerprint().unwrap();
    assert_eq!(same, is_same, "{json}");
}

#[test]
fn a_tokenizer_is_what_its_ids_depend_on() {
    check(|_| {}, true);
    // The older spelling of merges; what text becomes of ids; templates; lengths of batches.
    check(
        |j| {
            for merge in j["model"]["merges"].as_array_mut().unwrap() {
                *merge = format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()).into();
            }
        },
        true,
    );
    check(|j| _ = j["model"].as_object_mut().unwrap().remove("ignore_merges"), true);
    check(|j| j["decoder"] = Value::Null, true);
    check(
        |j| {
            j["truncation"] =
                json!({"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"})
        },
        true,
    );
    check(
        |j| {
            j["post_processor"] = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
        },
        true,
    );

    check(|j| j["model"]["merges"].as_array_mut().unwrap().swap(0, 1), false);
    check(|j| _ = j["model"]["merges"].as_array_mut().unwrap().pop(), false);
    check(
        |j| {
            let (a, b) = (j["model"]["vocab"]["a"].take(), j["model"]["vocab"]["b"].take());
            (j["model"]["vocab"]["a"], j["model"]["vocab"]["b"]) = (b, a);
        },
        false,
    );
    check(|j| j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(), false);
    check(|j| j["normalizer"] = json!({"type": "Lowercase"}), false);
    check(|j| j["added_tokens"][0]["special"] = false.into(), false);
    check(|j| j["model"]["byte_fallback"] = true.into(), false);
}

#[test]
fn fingerprints_are_text() {
    let fingerprint = trained("some text").fingerprint().unwrap();
    assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
    let json = serde_json::to_string(&fingerprint).unwrap();
    assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
    for bad in ["", "12", "+2345678901234567890123456789012", "g2345678901234567890123456789012"] {
        assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
    }
}

#[test]
fn a_dataset_is_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let words = text(["one", "two", "three", "four"]);
    let (one, other) = (trained(&words), trained(&text(["five", "six", "seven", "eight"])));
    let first = build(&at("first"), &words, &one).prefix;
    let fingerprint = dataset_fingerprint(&first).unwrap();
    assert_eq!(dataset_tokenizer(&first).unwrap(), Some(one.fingerprint().unwrap()));

    // Moved, and named by its file.
    fs::rename(at("first"), at("moved")).unwrap();
    let moved = at("moved/data.bin");
    assert_eq!(dataset_fingerprint(&moved).unwrap(), fingerprint);
    assert_eq!(dataset_tokenizer(&moved).unwrap(), Some(one.fingerprint().unwrap()));
    // One token changed, under the same size and beside the same manifest.
    let mut bin = fs::read(&moved).unwrap();
    bin[8] ^= 1;
    fs::write(&moved, bin).unwrap();
    assert_ne!(dataset_fingerprint(&moved).unwrap(), fingerprint);
    // Another tokenizer, and other text.
    assert_ne!(dataset_fingerprint(&build(&at("b"), &words, &other).prefix).unwrap(), fingerprint);
    let words = words.replace("four", "ruof");
    assert_ne!(dataset_fingerprint(&build(&at("c"), &words, &one).prefix).unwrap(), fingerprint);
}

#[test]
fn the_tokenizer_beside_the_data_is_the_one_that_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let words = text(["one", "two", "three", "four"]);
    let (one, other) = (trained(&words), trained(&text(["five", "six", "seven", "eight"])));
    let prefix = build(dir.path(), &words, &one).prefix;
    let beside = data::tokenizer_path(&prefix);
    other.save(&beside).unwrap();
    let error = dataset_tokenizer(&prefix).unwrap_err();
    assert!(error.to_string().contains("is not the tokenizer that made"), "{error}");
    assert!(error.hint_text().is_some() && error.exit_code() == 2);
    fs::remove_file(&beside).unwrap();
    assert_eq!(dataset_tokenizer(&prefix).unwrap(), Some(one.fingerprint().unwrap()));
    // Made elsewhere: what lies beside it is all that is known.
    fs::remove_file(Manifest::path(&prefix)).unwrap();
    assert_eq!(dataset_tokenizer(&prefix).unwrap(), None);
    other.save(&dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(dataset_tokenizer(&prefix).unwrap(), Some(other.fingerprint().unwrap()));
}

#[test]
fn prepared_data_is_found_by_the_tokenizer_that_was_trained_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    fs::write(&path, text(["one", "two", "three", "four"])).unwrap();
    let cache = dir.path().join("cache");
    let source = TextSource::Paths(vec![path.clone()]);
    let first = prepare(&cache, &source, &TokenizerChoice::Train { vocab_size: 280 }, &|_| {}).unwrap();
    let own = dir.path().join("tokenizer.json");
    fs::copy(&first.tokenizer_path, &own).unwrap();
    let again = prepare(&cache, &source, &TokenizerChoice::Load(own.clone()), &|_| {}).unwrap();
    assert!(again.cached && again.prefix == first.prefix);

    // Other text with the same tokenizer is another dataset, with that tokenizer.
    fs::write(&path, text(["five", "six", "seven", "eight"])).unwrap();
    let other = prepare(&cache, &source, &TokenizerChoice::Load(own), &|_| {}).unwrap();
    assert!(!other.cached && other.prefix != first.prefix);
    assert_eq!(other.manifest.tokenizer_fingerprint, first.manifest.tokenizer_fingerprint);
    assert_ne!(dataset_fingerprint(&other.prefix).unwrap(), dataset_fingerprint(&first.prefix).unwrap());
}
