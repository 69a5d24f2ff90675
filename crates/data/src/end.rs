//! Which token ends a document: what the files beside a tokenizer say, or else what its special tokens are called.

use std::path::Path;

use serde_json::Value;
use spec::{Error, Result};

use crate::file::read_small;
use crate::manifest::Manifest;

/// Names by which a token that is marked special is known as the end, the most specific first: without brackets, bars
/// and underscores.
const SPECIAL: [&str; 7] = ["endoftext", "endofdocument", "endofsentence", "eod", "eos", "endofseq", "/s"];
/// Exact names that are taken without being marked special.
const PLAIN: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]"];
/// Configurations have a few KB, with a chat template perhaps 100; those that list all added tokens, more.
const CONFIG_BYTES_MAX: u64 = 64 << 20;

/// What a file beside the tokenizer names.
pub(crate) enum Named {
    Token(String),
    Id(u32),
}

/// What ends documents according to the files beside `tokenizer`, the most telling first.
///
/// Only a `tokenizer.json` has such files; `PREFIX.tokenizer.json` of a dataset has the dataset's manifest.
pub(crate) fn beside(tokenizer: &Path) -> Result<Vec<Named>> {
    let name = tokenizer.file_name().unwrap_or_default().to_string_lossy();
    if let Some(prefix) = name.strip_suffix(".tokenizer.json") {
        let end = Manifest::load(&tokenizer.with_file_name(prefix)).ok().and_then(|m| m.end_of_document);
        return Ok(end.map(Named::Id).into_iter().collect());
    }
    if name != "tokenizer.json" {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        if let Some(config) = load(&tokenizer.with_file_name(name))? {
            let token = &config["eos_token"];
            let text = token.as_str().or_else(|| token["content"].as_str());
            found.extend(text.map(|t| Named::Token(t.to_owned())));
        }
    }
    if let Some(config) = load(&tokenizer.with_file_name("generation_config.json"))? {
        let id = &config["eos_token_id"];
        let id = id.as_u64().or_else(|| id[0].as_u64()).and_then(|id| u32::try_from(id).ok());
        found.extend(id.map(Named::Id));
    }
    Ok(found)
}

fn load(path: &Path) -> Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = read_small(path, CONFIG_BYTES_MAX)?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(text).map(Some).map_err(|e| {
        Error::user(format!("{}: not JSON: {e}", path.display()))
            .hint("repair or remove it: it is read for the token that ends a document")
    })
}

/// The best end among names in a vocabulary; `names` gives them with whether each is marked special.
pub(crate) fn by_name<'a>(
    special: impl Iterator<Item = &'a str>,
    is_known: impl Fn(&str) -> bool,
) -> Option<String> {
    let rank = |name: &str| {
        let bare: String = name.chars().filter(|c| c.is_alphanumeric() || *c == '/').collect();
        SPECIAL.iter().position(|known| bare.eq_ignore_ascii_case(known))
    };
    let best = special.filter_map(|name| Some((rank(name)?, name))).min();
    let plain = || PLAIN.iter().copied().find(|name| is_known(name));
    best.map(|(_, name)| name).or_else(plain).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_come_first() {
        let check = |special: &[&str], plain: &[&str], expected: Option<&str>| {
            let found =
                by_name(special.iter().copied(), |name| plain.contains(&name) || special.contains(&name));
            assert_eq!(found.as_deref(), expected, "{special:?} {plain:?}");
        };
        // Gemma has </s> as a tag of HTML.
        check(&["<eos>", "<bos>"], &["</s>"], Some("<eos>"));
        check(&["<bos>"], &["</s>"], Some("</s>"));
        check(&["<s>", "</s>"], &["<eos>"], Some("</s>"));
        check(&["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"], &[], Some("<|end_of_text|>"));
        check(&["<|im_end|>", "<|endoftext|>"], &[], Some("<|endoftext|>"));
        check(&["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], &[], Some("<｜end▁of▁sentence｜>"));
        check(&["[CLS]", "[SEP]"], &["text"], None);
    }
}
