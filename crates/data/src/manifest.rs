use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spec::{Error, Result};

use crate::fingerprint::Fingerprint;
use crate::indexed::with_suffix;

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
    /// Of a prepared dataset: names, sizes and times of the text files, hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_key: Option<Fingerprint>,
}

/// The version written.
pub(crate) const MANIFEST_VERSION: u32 = 1;

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
        let text = std::fs::read(&path).map_err(|e| Error::io("read", &path, &e))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| Error::user(format!("{}: not a dataset manifest: {e}", path.display())))?;
        if manifest.version != MANIFEST_VERSION {
            return Err(Error::user(format!(
                "{}: manifest version {}, expected {MANIFEST_VERSION}",
                path.display(),
                manifest.version
            )));
        }
        Ok(manifest)
    }

    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::failure(format!("write manifest: {e}")))?;
        text.push(b'\n');
        Ok(text)
    }
}
