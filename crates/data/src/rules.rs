//! Which tokenizers may be given a text in pieces: those whose rules split the text at [`crate::pieces`]' cuts anyway.

use serde_json::Value;
use tokenizers::AddedToken;

/// What the patterns of published byte-level tokenizers (GPT-2, GPT-4, GPT-4o, Llama 3, Qwen, DeepSeek, and ours) are
/// made of. None of these alternatives matches across a cut, and none matches differently when the text ends there.
const ALTERNATIVES: [&str; 37] = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "'(?i:[sdmt]|ll|ve|re)",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"\p{N}",
    r"\p{N}+",
    r"\p{N}{1,2}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]++[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
    ANY_SPACE,
    "[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r"\d",
];
/// With it, what is left and right of a cut never stays together unmatched.
const ANY_SPACE: &str = r"\s+";

/// Whether a text in exact pieces gets the ids of the whole.
pub(crate) fn can_cut<'a>(
    normalizer: &Value,
    pre_tokenizer: &Value,
    mut added: impl Iterator<Item = &'a AddedToken>,
) -> bool {
    let mut splits = false;
    is_local(normalizer) && keeps_cuts(pre_tokenizer, &mut splits) && splits && added.all(is_inside)
}

/// A normalizer that changes characters by themselves and what follows them, never what begins after a cut.
fn is_local(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        None => normalizer.is_null(),
        Some("NFC" | "NFD" | "NFKC" | "NFKD") => true,
        Some("Sequence") => normalizer["normalizers"].as_array().is_some_and(|all| all.iter().all(is_local)),
        Some(_) => false,
    }
}

/// A pre-tokenizer that never joins over a cut; `splits` becomes true where it always splits there.
fn keeps_cuts(rule: &Value, splits: &mut bool) -> bool {
    match rule["type"].as_str() {
        Some("Sequence") => {
            rule["pretokenizers"].as_array().is_some_and(|all| all.iter().all(|r| keeps_cuts(r, splits)))
        }
        Some("ByteLevel") => {
            *splits |= rule["use_regex"] == true;
            rule["add_prefix_space"] == false
        }
        Some("Digits") => true,
        Some("Split") => {
            let Some(pattern) = rule["pattern"]["Regex"].as_str() else { return false };
            let parts = alternatives(pattern);
            let any_space = parts.contains(&ANY_SPACE);
            *splits |= any_space;
            // What no alternative matches is a piece too, or is thrown away, which must not depend on the cut.
            let keeps = match (rule["behavior"].as_str(), rule["invert"] == true) {
                (Some("Isolated"), false) => true,
                (Some("Removed"), true) => any_space,
                _ => false,
            };
            keeps && parts.iter().all(|part| ALTERNATIVES.contains(part))
        }
        _ => false,
    }
}

/// An added token that cannot lie across a cut: with no visible character beside a blank, and no look at neighbours.
fn is_inside(token: &AddedToken) -> bool {
    let looks = !token.special && (token.single_word || token.lstrip || token.rstrip);
    let is_mixed =
        token.content.contains(char::is_whitespace) && token.content.contains(|c: char| !c.is_whitespace());
    !looks && !is_mixed
}

/// The alternatives of a pattern, outside of brackets.
fn alternatives(pattern: &str) -> Vec<&str> {
    let (mut parts, mut from) = (Vec::new(), 0);
    let (mut depth, mut in_class, mut escaped) = (0usize, false, false);
    for (at, c) in pattern.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ']' if in_class => in_class = false,
            _ if in_class => {}
            '[' => in_class = true,
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '|' if depth == 0 => {
                parts.push(&pattern[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&pattern[from..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_come_apart() {
        assert_eq!(alternatives(r"a|(b|c)|[|]|\||d"), ["a", "(b|c)", "[|]", r"\|", "d"]);
        assert_eq!(alternatives(crate::tokenizer::PATTERN).len(), 5);
    }
}
