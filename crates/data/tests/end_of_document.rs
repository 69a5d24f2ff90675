//! Which token ends a document.

use std::fs;
use std::path::Path;

use data::{BuildOptions, Manifest, Tokenizer};
use serde_json::{Value, json};

/// A tokenizer with these special tokens from id 400 on; `</s>` is in its vocabulary, and not special.
fn write(dir: &Path, special: &[&str]) {
    let trained = Tokenizer::train(["some text to learn"], 300, &|_| {}).unwrap();
    let mut json: Value = serde_json::from_slice(&trained.to_json().unwrap()).unwrap();
    let token = |(i, content): (usize, &&str)| {
        json!({"id": 400 + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json["added_tokens"] = special.iter().enumerate().map(token).collect();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.remove("<|endoftext|>");
    vocab.insert("</s>".into(), 0.into());
    for (i, content) in special.iter().enumerate() {
        vocab.insert((*content).into(), (400 + i).into());
    }
    fs::write(dir.join("tokenizer.json"), json.to_string()).unwrap();
}

fn check(special: &[&str], beside: &[(&str, Value)], expected: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), special);
    for (name, content) in beside {
        fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    let found = Tokenizer::load(&dir.path().join("tokenizer.json")).unwrap().eod_token();
    assert_eq!(found.as_deref(), expected, "{special:?} {beside:?}");
}

#[test]
fn files_beside_the_tokenizer_say_it() {
    let both = ["<eos>", "<|im_end|>"];
    check(&both, &[], Some("<eos>"));
    check(&["<bos>"], &[], Some("</s>"));
    let config = |token: Value| ("tokenizer_config.json", json!({ "eos_token": token }));
    check(&both, &[config("<|im_end|>".into())], Some("<|im_end|>"));
    check(&both, &[config(json!({"content": "<|im_end|>", "special": true}))], Some("<|im_end|>"));
    // A name that the vocabulary does not have, or none, is as good as no file.
    check(&both, &[config("<other>".into())], Some("<eos>"));
    check(&both, &[config(Value::Null)], Some("<eos>"));
    let map = ("special_tokens_map.json", json!({"eos_token": "<|im_end|>"}));
    check(&both, std::slice::from_ref(&map), Some("<|im_end|>"));
    check(&both, &[config("<eos>".into()), map], Some("<eos>"));
    let generation = |id: Value| ("generation_config.json", json!({ "eos_token_id": id }));
    check(&both, &[generation(401.into())], Some("<|im_end|>"));
    check(&both, &[generation(json!([401, 400]))], Some("<|im_end|>"));
    check(&both, &[generation(u64::MAX.into())], Some("<eos>"));
}

#[test]
fn a_damaged_file_beside_the_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &["<eos>"]);
    fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    let error = Tokenizer::load(&dir.path().join("tokenizer.json")).err().unwrap();
    assert!(error.to_string().contains("tokenizer_config.json: not JSON"), "{error}");
    assert!(error.hint_text().is_some() && error.exit_code() == 2);
}

#[test]
fn the_end_is_chosen_appended_and_remembered() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &["<eos>", "<|im_end|>"]);
    let mut tokenizer = Tokenizer::load(&dir.path().join("tokenizer.json")).unwrap();
    let error = tokenizer.set_eod("<none>").unwrap_err();
    assert!(error.hint_text().unwrap().contains("<eos>, <|im_end|>"), "{:?}", error.hint_text());
    tokenizer.set_eod("<|im_end|>").unwrap();
    let text = dir.path().join("a.txt");
    fs::write(&text, "some text").unwrap();
    let options = BuildOptions::new(vec![text], dir.path().join("data"));
    let report = data::build(&options, &tokenizer, &|_| {}).unwrap();
    assert_eq!(report.manifest.end_of_document, Some(401));
    assert_eq!(report.manifest.warnings, Vec::<String>::new());
    let again = Tokenizer::load(&data::tokenizer_path(&options.prefix)).unwrap();
    assert_eq!(again.eod(), Some(401));
}

#[test]
fn where_there_is_none_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let trained = Tokenizer::train(["some text to learn"], 300, &|_| {}).unwrap();
    let mut json: Value = serde_json::from_slice(&trained.to_json().unwrap()).unwrap();
    json["added_tokens"] = json!([]);
    json["model"]["vocab"].as_object_mut().unwrap().remove("<|endoftext|>");
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.eod(), None);
    let text = dir.path().join("a.txt");
    fs::write(&text, "some text").unwrap();
    let options = BuildOptions::new(vec![text], dir.path().join("data"));
    data::build(&options, &tokenizer, &|_| {}).unwrap();
    let warnings = Manifest::load(&options.prefix).unwrap().warnings;
    assert_eq!(warnings.len(), 1);
    assert!(
        warnings[0].contains("no token that is known to end a document") && warnings[0].contains("--eod")
    );
}
