use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Trained on the kinds of things that the texts below are made of, so that merges cross every border that exists.
static TRAINED: LazyLock<Value> = LazyLock::new(|| {
    let parts = [
        "it's", " don't", "we'll", " 1234", "12", " word", "\n", ";\n", "\n\n", "  ", " \n", "é", "中文",
        "/", "/a", "\r\n", "\t",
    ];
    let text: String = (0..6000usize).map(|i| parts[(i * i + i / 7) % parts.len()]).collect();
    let tokenizer = Tokenizer::train([text], 420, &|_| {}).unwrap();
    serde_json::from_slice(&tokenizer.to_json().unwrap()).unwrap()
});

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn bytes(use_regex: bool, add_prefix_space: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex})
}

fn sequence(rules: &[Value]) -> Value {
    json!({"type": "Sequence", "pretokenizers": rules})
}

/// The trained merges under other rules.
fn with(change: impl FnOnce(&mut Value)) -> Tokenizer {
    let mut json = TRAINED.clone();
    change(&mut json);
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

fn added(content: &str) -> Value {
    json!({"id": 500, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false})
}

/// Rules of published tokenizers, all of which may be cut.
static FAMILIES: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let rule = |rule: Value| with(|j| j["pre_tokenizer"] = rule);
    vec![
        with(|_| {}),
        rule(bytes(true, false)),
        rule(sequence(&[split(LLAMA3), bytes(false, false)])),
        rule(sequence(&[split(&LLAMA3.replace("{1,3}", "")), bytes(false, false)])),
        rule(sequence(&[split(GPT4O), bytes(false, false)])),
        rule(sequence(&[
            split(r"\p{N}{1,3}"),
            split("[一-龥぀-ゟ゠-ヿ]+"),
            split(DEEPSEEK),
            bytes(false, false),
        ])),
        rule(sequence(&[json!({"type": "Digits", "individual_digits": true}), bytes(true, false)])),
        with(|j| j["normalizer"] = json!({"type": "NFC"})),
        with(|j| j["added_tokens"].as_array_mut().unwrap().push(added("\n\n"))),
        with(|j| j["added_tokens"].as_array_mut().unwrap().push(added("word"))),
    ]
});

#[test]
fn only_known_rules_are_cut() {
    assert!(FAMILIES.iter().all(|tokenizer| tokenizer.can_cut));
    let refused = |change: &dyn Fn(&mut Value)| {
        let tokenizer = with(change);
        assert!(!tokenizer.can_cut && tokenizer.cut(None) == Cut::Whole);
    };
    refused(&|j| j["pre_tokenizer"] = bytes(true, true));
    refused(&|j| j["pre_tokenizer"] = bytes(false, false));
    refused(&|j| j["pre_tokenizer"] = Value::Null);
    refused(&|j| j["pre_tokenizer"] = sequence(&[split(r"\p{N}{1,3}"), bytes(false, false)]));
    refused(&|j| j["pre_tokenizer"] = sequence(&[split(r"(?<=\n)\w+|\s+"), bytes(false, false)]));
    refused(&|j| j["normalizer"] = json!({"type": "Prepend", "prepend": "_"}));
    refused(&|j| j["normalizer"] = json!({"type": "Replace", "pattern": {"String": "\na"}, "content": "b"}));
    refused(&|j| j["added_tokens"].as_array_mut().unwrap().push(added(";\nit")));
    refused(&|j| {
        let mut token = added("word");
        token["rstrip"] = true.into();
        j["added_tokens"].as_array_mut().unwrap().push(token);
    });
}

#[test]
fn what_is_not_cut_encodes_as_the_whole() {
    let tokenizer = with(|j| j["pre_tokenizer"] = bytes(true, true));
    let text = "word 12;\nword".repeat(2000);
    assert!(text.len() > 2 * PIECE_BYTES);
    assert_eq!(tokenizer.encode(&text).unwrap(), encode(&tokenizer.plain, &text, false).unwrap().get_ids());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Wherever the size of pieces makes the cuts fall.
    #[test]
    fn pieces_have_the_ids_of_the_whole(
        text in "(it's|don't|'ll|we|A|z|1|234| |  |\n|\n\n|\r\n|\t|;|;\n|/|//\n|é|e\u{301}|\u{301}|中|文。|。|\u{a0}|\u{2028}|word|<x>|\u{1f980}|a\nb| b|\nc){0,60}",
        target in 1usize..24,
        family in 0usize..10,
    ) {
        let tokenizer = &FAMILIES[family];
        let whole = encode(&tokenizer.plain, &text, false).unwrap().get_ids().to_vec();
        let mut pieces = Vec::new();
        tokenizer.encode_in_pieces(&text, target, &mut pieces).unwrap();
        prop_assert_eq!(pieces, whole, "family {}", family);
    }
}
