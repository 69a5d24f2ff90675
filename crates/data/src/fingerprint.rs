//! Identity by content: what a tokenizer does, and which tokens a dataset holds, wherever the files lie.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use spec::{Error, Result};
use xxhash_rust::xxh3::Xxh3;

use crate::builder::tokenizer_path;
use crate::indexed::strip_extension;
use crate::manifest::Manifest;
use crate::source::Source;
use crate::tokenizer::Tokenizer;

/// XXH3-128 of content: equal for equal content, under any path. Text and JSON have it as 32 hexadecimal digits.
///
/// It guards against mistakes, not against forgery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(u128);

/// What a tokenizer's ids depend on: see [`Tokenizer::fingerprint`].
///
/// # Errors
/// As [`Tokenizer::load`].
pub fn tokenizer_fingerprint(path: &Path) -> Result<Fingerprint> {
    Tokenizer::load(path)?.fingerprint()
}

/// The tokens of a dataset and how they are cut into sequences: see [`Source::fingerprint`].
///
/// # Errors
/// As [`Source::open`] and [`Source::fingerprint`].
pub fn dataset_fingerprint(path: &Path) -> Result<Fingerprint> {
    Source::open(path)?.fingerprint()
}

/// The fingerprint of the tokenizer that made a dataset, from its manifest or from the tokenizer file beside it; `None`
/// where neither is there.
///
/// # Errors
/// The tokenizer beside the data cannot be read, or is not the one that made the data.
pub fn dataset_tokenizer(path: &Path) -> Result<Option<Fingerprint>> {
    let prefix = strip_extension(path);
    let recorded = Manifest::load(&prefix).ok().and_then(|m| m.tokenizer_fingerprint);
    let beside = tokenizer_path(&prefix);
    if !beside.exists() {
        return Ok(recorded);
    }
    let found = tokenizer_fingerprint(&beside)?;
    match recorded {
        Some(recorded) if recorded != found => Err(Error::user(format!(
            "{} is not the tokenizer that made {}: its fingerprint is {found}, the data was made with {recorded}",
            beside.display(),
            prefix.display()
        ))
        .hint("put the tokenizer back that made the data, or build the data again with `phalanx data build`")),
        _ => Ok(Some(found)),
    }
}

/// The token that ends each document of a dataset, from its manifest or from the tokenizer file beside it; `None` where
/// neither says.
///
/// # Errors
/// The tokenizer beside the data cannot be read.
pub fn dataset_end(path: &Path) -> Result<Option<u32>> {
    let prefix = strip_extension(path);
    if let Ok(manifest) = Manifest::load(&prefix) {
        return Ok(manifest.end_of_document);
    }
    let beside = tokenizer_path(&prefix);
    if beside.exists() { Tokenizer::load(&beside).map(|t| t.eod()) } else { Ok(None) }
}

impl Fingerprint {
    pub(crate) fn of(hash: &Xxh3) -> Self {
        Fingerprint(hash.digest128())
    }

    /// Of a tokenizer's JSON as the library writes it, so that older spellings of the same thing count as equal.
    pub(crate) fn of_tokenizer(json: &[u8]) -> Result<Self> {
        let mut all: Value = serde_json::from_slice(json)
            .map_err(|e| Error::failure(format!("read back a tokenizer: {e}")))?;
        let mut hash = Xxh3::new();
        for part in ["added_tokens", "normalizer", "pre_tokenizer", "model"] {
            feed(&mut hash, &all[part].take());
        }
        Ok(Fingerprint::of(&hash))
    }
}

/// Feeds a value so that different values feed different bytes. Fields that are null or false count as absent: that is
/// what they mean in a `tokenizer.json`, and a later version of the library may add some.
fn feed(hash: &mut Xxh3, value: &Value) {
    let mut text = |tag: u8, text: &str| {
        hash.update(&[tag]);
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    match value {
        Value::String(s) => text(b's', s),
        Value::Number(n) => text(b'n', &n.to_string()),
        Value::Null | Value::Bool(false) => text(b'-', ""),
        Value::Bool(true) => text(b'+', ""),
        Value::Array(items) => {
            text(b'[', &items.len().to_string());
            items.iter().for_each(|item| feed(hash, item));
        }
        Value::Object(fields) => {
            let mut fields: Vec<_> =
                fields.iter().filter(|(_, v)| !matches!(v, Value::Null | Value::Bool(false))).collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            text(b'{', &fields.len().to_string());
            for (name, value) in fields {
                hash.update(&(name.len() as u64).to_le_bytes());
                hash.update(name.as_bytes());
                feed(hash, value);
            }
        }
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        u128::from_str_radix(text, 16)
            .ok()
            .filter(|_| is_hex)
            .map(Fingerprint)
            .ok_or_else(|| Error::user(format!("fingerprint {text:?}: expected 32 hexadecimal digits")))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
