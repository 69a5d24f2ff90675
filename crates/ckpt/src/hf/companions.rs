//! What goes with the weights so that `transformers` reads, generates and stops: the tokenizer and its settings.
//!
//! An imported model's own files are kept and given back as they came. A tokenizer that never had any gets the generic
//! class: the classes of the families rebuild a tokenizer by rules of their own and give other ids.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use spec::{Context, Error, ModelSpec, Result, parse_json};

use crate::disk::Folder;
use crate::input;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const GENERATION: &str = "generation_config.json";
const CONFIG: &str = "config.json";

/// A class that is the generic one, for [`as_saved`].
const CLASS: &str = "tokenization_as_saved.py";
const CLASS_TEXT: &str = r#""""The tokenizer as tokenizer.json has it."""

from transformers import PreTrainedTokenizerFast


class AsSavedTokenizer(PreTrainedTokenizerFast):
    pass
"#;

/// Files beside a `tokenizer.json` that say how to use it.
pub const COMPANIONS: [&str; 7] = [
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    GENERATION,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    CLASS,
];

/// Tokenizers in forms that are not read.
const OTHER_TOKENIZERS: [&str; 4] = ["tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"];

/// A vocabulary of a million entries takes some 50 MB.
const MAX_BYTES: usize = 1 << 30;

/// Token ids in `config.json` and `generation_config.json`, each one id or a list.
const IDS: [&str; 3] = ["bos_token_id", "eos_token_id", "pad_token_id"];

/// The tokenizer that a model was trained with.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizer<'a> {
    /// Its `tokenizer.json`; what lies beside it and says how to use it goes along.
    pub path: &'a Path,
    /// The token that ended each document in training.
    pub eod: Option<u32>,
}

/// Files to write beside the weights.
#[derive(Debug, Default)]
pub(super) struct Companions {
    pub(super) files: BTreeMap<&'static str, Vec<u8>>,
    /// What `config.json` must say of special tokens.
    pub(super) ids: Map<String, Value>,
}

impl Companions {
    /// Gathers what an export of `spec` needs.
    pub(super) fn gather(tokenizer: Tokenizer<'_>, spec: &ModelSpec) -> Result<Self> {
        let text = input::read_text("export: read tokenizer", tokenizer.path, MAX_BYTES)?;
        let facts = Facts::read(&text, tokenizer.eod)
            .context(format!("export: read tokenizer {}", tokenizer.path.display()))?;
        let mut files = BTreeMap::from([(TOKENIZER, text.into_bytes())]);
        for name in COMPANIONS {
            if let Some(text) = optional(&tokenizer.path.with_file_name(name))? {
                files.insert(name, text.into_bytes());
            }
        }
        if !files.contains_key(TOKENIZER_CONFIG) {
            files.extend(facts.settings(spec));
            files.entry(SPECIAL_TOKENS).or_insert_with(|| pretty(&Value::Object(facts.names())));
        }
        let ids = match files.get(GENERATION) {
            Some(bytes) => {
                ids(&String::from_utf8_lossy(bytes)).context(format!("export: {GENERATION} of the run"))?
            }
            None => facts.ids(),
        };
        if !ids.is_empty() {
            files.entry(GENERATION).or_insert_with(|| pretty(&Value::Object(ids.clone())));
        }
        Ok(Companions { files, ids })
    }
}

/// Puts the files that go with the tokenizer of a new run into its directory: those that lie beside the
/// `tokenizer.json` that it was taken from, or settings that name the token with which it ends documents.
///
/// # Errors
/// When a file cannot be read or written.
pub fn keep_settings(tokenizer: Tokenizer<'_>, run_dir: &Path, spec: &ModelSpec) -> Result<()> {
    let beside = tokenizer.path.file_name().is_some_and(|name| name == TOKENIZER);
    let from = tokenizer.path.parent().filter(|_| beside);
    if let Some(from) = from {
        keep_companions(from, run_dir)?;
    }
    if from.is_some_and(|from| from.join(TOKENIZER_CONFIG).exists()) {
        return Ok(());
    }
    let text = input::read_text("read tokenizer", tokenizer.path, MAX_BYTES)?;
    let facts = Facts::read(&text, tokenizer.eod)?;
    let folder = Folder::open(run_dir).map_err(|e| Error::io("open", run_dir, &e))?;
    for (name, bytes) in facts.settings(spec) {
        write(&folder, name, &bytes)?;
    }
    Ok(())
}

/// Keeps the files that go with a model's weights, but for its `tokenizer.json`, in the directory of a run, where
/// [`super::export`] finds them; says what a person should know.
///
/// # Errors
/// When a file cannot be read or written.
pub fn keep_companions(hf_dir: &Path, run_dir: &Path) -> Result<Vec<String>> {
    if !hf_dir.join(TOKENIZER).exists() {
        let other = OTHER_TOKENIZERS.iter().find(|name| hf_dir.join(name).exists());
        let has = other.map(|name| format!(", its {name} is not read")).unwrap_or_default();
        return Ok(vec![format!(
            "{} has no {TOKENIZER}{has}: the run has no tokenizer, and special tokens and templates are left out; \
             save it with transformers' AutoTokenizer first to keep them",
            hf_dir.display()
        )]);
    }
    let folder = Folder::open(run_dir).map_err(|e| Error::io("import: open", run_dir, &e))?;
    let mut kept = Vec::new();
    let mut write = |name: &'static str, bytes: &[u8]| {
        kept.push(name);
        write(&folder, name, bytes)
    };
    let mut generation = false;
    for name in COMPANIONS {
        if let Some(text) = optional(&hf_dir.join(name))? {
            write(name, text.as_bytes())?;
            generation |= name == GENERATION;
        }
    }
    // Old models say in their config.json alone how a text ends.
    if !generation && let Some(text) = optional(&hf_dir.join(CONFIG))? {
        let ids = ids(&text).context(format!("import: {CONFIG}"))?;
        if !ids.is_empty() {
            write(GENERATION, &pretty(&Value::Object(ids)))?;
        }
    }
    Ok(if kept.is_empty() { Vec::new() } else { vec![format!("kept for an export: {}", kept.join(", "))] })
}

fn write(folder: &Folder, name: &str, bytes: &[u8]) -> Result<()> {
    let written = folder.new_file(name.as_ref()).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync()
    });
    written.map_err(|e| Error::io("write", &folder.path().join(name), &e))
}

/// The text of a file that may be missing.
fn optional(path: &Path) -> Result<Option<String>> {
    // A link to nothing is missing too: caches of downloads are full of links.
    if path.exists() { input::read_text("read", path, MAX_BYTES).map(Some) } else { Ok(None) }
}

fn ids(text: &str) -> Result<Map<String, Value>> {
    let Value::Object(map) = parse_json(text)? else {
        return Err(Error::user("expected an object of keys"));
    };
    Ok(map.into_iter().filter(|(key, value)| IDS.contains(&key.as_str()) && !value.is_null()).collect())
}

/// What a `tokenizer.json` says of its special tokens.
struct Facts {
    /// Role (`eos`) to the token's id and spelling.
    roles: BTreeMap<&'static str, (u64, String)>,
    add_prefix_space: Option<bool>,
}

impl Facts {
    fn read(text: &str, eod: Option<u32>) -> Result<Self> {
        let json: Value = serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(text))
            .map_err(|e| Error::user(format!("not a tokenizer.json: {e}")))?;
        let vocabulary = Vocabulary(&json);
        let mut roles = BTreeMap::new();
        let mut play = |role, token: Option<(u64, String)>| token.map(|t| roles.insert(role, t));
        play("bos", vocabulary.named(json.pointer("/post_processor").and_then(first_special)));
        play("eos", eod.and_then(|id| vocabulary.of_id(u64::from(id))));
        play("unk", vocabulary.named(json["model"]["unk_token"].as_str()));
        play("pad", vocabulary.named(json["padding"]["pad_token"].as_str()));
        let add_prefix_space = json["pre_tokenizer"]["add_prefix_space"].as_bool();
        Ok(Facts { roles, add_prefix_space })
    }

    fn names(&self) -> Map<String, Value> {
        self.roles.iter().map(|(role, (_, name))| (format!("{role}_token"), json!(name))).collect()
    }

    fn ids(&self) -> Map<String, Value> {
        let written = self.roles.iter().filter(|(role, _)| **role != "unk");
        written.map(|(role, (id, _))| (format!("{role}_token_id"), json!(id))).collect()
    }

    /// What a tokenizer without settings gets: the generic class, and what it needs to be taken.
    fn settings(&self, spec: &ModelSpec) -> Vec<(&'static str, Vec<u8>)> {
        let mut config = self.config(spec);
        let is_rebuilt = spec.hf_architecture().is_ok_and(|class| class == "Qwen2ForCausalLM");
        if is_rebuilt {
            as_saved(&mut config);
        }
        let class = is_rebuilt.then(|| (CLASS, CLASS_TEXT.into()));
        class.into_iter().chain([(TOKENIZER_CONFIG, pretty(&config))]).collect()
    }

    fn config(&self, spec: &ModelSpec) -> Value {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": spec.max_positions(),
            "clean_up_tokenization_spaces": false,
            // The class would add token types, which `generate` refuses.
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": null,
            "eos_token": null,
            "unk_token": null,
            "pad_token": null,
        });
        if let Some(config) = config.as_object_mut() {
            config.extend(self.names());
            // The class would set it to false.
            config.extend(self.add_prefix_space.map(|x| ("add_prefix_space".to_owned(), x.into())));
        }
        config
    }
}

/// `AutoTokenizer` of transformers 5 (5.24 for one) sets aside the class that a Qwen 2 model names and rebuilds its
/// tokenizer by Qwen's own rules, unless the settings name a class outside of the library. That one is asked for with
/// `trust_remote_code` alone; without it the generic class is taken.
fn as_saved(config: &mut Value) {
    let module = CLASS.trim_end_matches(".py");
    config["auto_map"] = json!({ "AutoTokenizer": [null, format!("{module}.AsSavedTokenizer")] });
}

/// The token that a template puts in front of a text.
fn first_special(processor: &Value) -> Option<&str> {
    let inside = processor["processors"].as_array().map(|list| list.iter().find_map(first_special));
    inside.flatten().or_else(|| match processor["type"].as_str() {
        Some("TemplateProcessing") => processor["single"][0]["SpecialToken"]["id"].as_str(),
        Some("BertProcessing" | "RobertaProcessing") => processor["cls"][0].as_str(),
        _ => None,
    })
}

/// Tokens of a `tokenizer.json`, added ones first.
struct Vocabulary<'a>(&'a Value);

impl Vocabulary<'_> {
    fn added(&self) -> impl Iterator<Item = (u64, &str)> {
        let list = self.0["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
        list.iter().filter_map(|t| Some((t["id"].as_u64()?, t["content"].as_str()?)))
    }

    /// Words of a vocabulary that is a table, or a list of words and scores.
    fn words(&self) -> Box<dyn Iterator<Item = (u64, &str)> + '_> {
        match &self.0["model"]["vocab"] {
            Value::Object(map) => {
                Box::new(map.iter().filter_map(|(word, id)| Some((id.as_u64()?, word.as_str()))))
            }
            Value::Array(list) => Box::new((0..).zip(list).filter_map(|(id, w)| Some((id, w[0].as_str()?)))),
            _ => Box::new(std::iter::empty()),
        }
    }

    fn of_id(&self, id: u64) -> Option<(u64, String)> {
        self.added().chain(self.words()).find(|(i, _)| *i == id).map(|(i, name)| (i, name.to_owned()))
    }

    fn named(&self, name: Option<&str>) -> Option<(u64, String)> {
        let name = name?;
        self.added().chain(self.words()).find(|(_, n)| *n == name).map(|(i, name)| (i, name.to_owned()))
    }
}

pub(super) fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(tokenizer: Value, eod: Option<u32>, names: Value, ids: Value) {
        let facts = Facts::read(&tokenizer.to_string(), eod).unwrap();
        assert_eq!(Value::Object(facts.names()), names);
        assert_eq!(Value::Object(facts.ids()), ids);
    }

    #[test]
    fn special_tokens_of_a_tokenizer() {
        let ours = json!({
            "added_tokens": [{ "id": 0, "content": "<|endoftext|>", "special": true }],
            "model": { "type": "BPE", "unk_token": null, "vocab": { "<|endoftext|>": 0, "a": 1 } },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": [] },
        });
        check(ours.clone(), Some(0), json!({ "eos_token": "<|endoftext|>" }), json!({ "eos_token_id": 0 }));
        check(ours.clone(), Some(1), json!({ "eos_token": "a" }), json!({ "eos_token_id": 1 }));
        check(ours.clone(), Some(7), json!({}), json!({}));
        check(ours, None, json!({}), json!({}));
        let template = json!({ "type": "TemplateProcessing", "single": [
            { "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }] });
        let llama = json!({
            "added_tokens": [{ "id": 0, "content": "<unk>" }, { "id": 1, "content": "<s>" }, { "id": 2, "content": "</s>" }],
            "model": { "type": "Unigram", "unk_token": "<unk>", "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0]] },
            "padding": { "pad_token": "</s>" },
            "post_processor": { "type": "Sequence", "processors": [{ "type": "ByteLevel" }, template] },
        });
        check(
            llama,
            Some(2),
            json!({ "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>" }),
            json!({ "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2 }),
        );
        let spaced =
            json!({ "model": {}, "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": true } });
        let facts = Facts::read(&spaced.to_string(), None).unwrap();
        let config = facts.config(&ModelSpec::preset("tiny").unwrap());
        assert_eq!(config["add_prefix_space"], json!(true));
        assert_eq!(config["tokenizer_class"], json!("PreTrainedTokenizerFast"));
        assert!(Facts::read("[", None).is_err());
    }
}
