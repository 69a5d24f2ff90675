//! The ids that a `tokenizer.json` declares, looked at before anything of their size is made.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use spec::{Error, Result};

/// Published vocabularies stay below this; larger ids must be matched by the size of the file.
const IDS_USUAL: u64 = 1 << 20;

/// The automaton that looks for added tokens takes some hundred bytes for each of theirs.
const ADDED_BYTES_MAX: usize = 4 << 10;

/// Refuses added tokens that are whole texts, and ids that are out of proportion to the file: what is indexed by id would take memory that the file does not
/// stand for. A file that cannot be read at all is left to the tokenizer's own reader.
pub(crate) fn check(json: &[u8]) -> Result<()> {
    let Ok(found) = serde_json::from_slice::<Scan>(json) else { return Ok(()) };
    let largest = found.model.vocab.0.max(found.added_tokens.iter().map(|t| t.id).max().unwrap_or(0));
    let longest = found.added_tokens.iter().map(|t| t.content.len()).max().unwrap_or(0);
    if longest > ADDED_BYTES_MAX {
        return Err(Error::user(format!(
            "an added token of {longest} bytes, expected at most {ADDED_BYTES_MAX}"
        ))
        .hint("leave it out: text of that length is no token"));
    }
    let limit = IDS_USUAL.max(json.len() as u64);
    if largest < limit {
        return Ok(());
    }
    Err(Error::user(format!(
        "token id {largest} in a file of {} bytes, expected ids below {limit}",
        json.len()
    ))
    .hint("number the tokens from 0 on without large gaps"))
}

#[derive(serde::Deserialize)]
struct Scan {
    #[serde(default)]
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Default, serde::Deserialize)]
struct Model {
    #[serde(default)]
    vocab: LargestId,
}

#[derive(serde::Deserialize)]
struct Added {
    #[serde(default)]
    id: u64,
    #[serde(default)]
    content: String,
}

/// The largest id in a vocabulary; a list counts its entries by itself.
#[derive(Default)]
struct LargestId(u64);

impl<'de> Deserialize<'de> for LargestId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ids;
        impl<'de> Visitor<'de> for Ids {
            type Value = LargestId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LargestId, A::Error> {
                let mut largest = 0;
                while let Some((_, id)) = map.next_entry::<IgnoredAny, Value>()? {
                    largest = largest.max(id.as_u64().unwrap_or(0));
                }
                Ok(LargestId(largest))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LargestId, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(LargestId(0))
            }
        }
        deserializer.deserialize_any(Ids)
    }
}
