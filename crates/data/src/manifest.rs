use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spec::{Error, Result};

use crate::file::read_small;
use crate::fingerprint::Fingerprint;
use crate::indexed::with_suffix;
use crate::input::TextOptions;

/// What is known about a dataset that was built here, kept beside it as `PREFIX.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file's fields.
    pub version: u32,
    /// Documents written.
    pub documents: u64,
    /// Tokens written, end-of-document tokens included.
    pub tokens: u64,
    /// Bytes of text that they came from.
    pub text_bytes: u64,
    /// Storage of a token, such as `u16`.
    pub token_type: String,
    /// Entries in the tokenizer's vocabulary.
    pub vocab: usize,
    /// The largest id in the data.
    pub max_token: u32,
    /// Entropy of the tokens' frequencies in nats: the loss of the best model that ignores context.
    pub unigram_entropy_nats: f64,
    /// The token that ends each document, if one is appended.
    pub end_of_document: Option<u32>,
    /// XXH3-128 of the tokenizer file, in hexadecimal.
    pub tokenizer_xxh3: String,
    /// What the tokenizer's ids depend on; absent in datasets built before it was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer_fingerprint: Option<Fingerprint>,
    /// XXH3-128 of the stored tokens, in hexadecimal.
    pub tokens_xxh3: String,
    /// Inputs left out because they are not UTF-8.
    pub not_utf8: u64,
    /// Inputs left out because they could not be read.
    pub unreadable: u64,
    /// Inputs left out because they hold no text.
    pub empty: u64,
    /// JSON documents left out because they could not be read.
    #[serde(default)]
    pub bad_documents: u64,
    /// What was said when the data was built: what was left out, and by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Of a prepared dataset: names, sizes and times of the text files, hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_key: Option<Fingerprint>,
    /// Of a prepared dataset: how its documents were described, where not as usual.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options_key: Option<String>,
}

/// A manifest has some 600 bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The version written.
pub(crate) const MANIFEST_VERSION: u32 = 1;

const HINT: &str = "build the data again with `phalanx data build`";

impl Manifest {
    /// `PREFIX.json`.
    pub fn path(prefix: &Path) -> PathBuf {
        with_suffix(prefix, ".json")
    }

    /// Reads `PREFIX.json`.
    ///
    /// # Errors
    /// Missing, or not a manifest of this version.
    pub fn load(prefix: &Path) -> Result<Manifest> {
        let path = Manifest::path(prefix);
        let text = read_small(&path, MAX_BYTES)?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| {
            Error::user(format!("{}: not a dataset manifest: {e}", path.display())).hint(HINT)
        })?;
        if manifest.version != MANIFEST_VERSION {
            return Err(Error::user(format!(
                "{}: manifest version {}, expected {MANIFEST_VERSION}",
                path.display(),
                manifest.version
            ))
            .hint(HINT));
        }
        Ok(manifest)
    }

    /// Whether this was prepared from the text with this key, its documents described by `options`.
    pub fn is_of(&self, text_key: Fingerprint, options: &TextOptions) -> bool {
        self.text_key == Some(text_key) && self.options_key == options.key()
    }

    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::failure(format!("write manifest: {e}")))?;
        text.push(b'\n');
        Ok(text)
    }
}
