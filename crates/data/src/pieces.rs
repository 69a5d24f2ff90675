//! Cutting a long text where no tokenizer joins what is left and right of the cut.

/// Cuts `text` into pieces of about `target` bytes, each ending in a line end between a visible character and a
/// letter or digit.
///
/// Byte-level pre-tokenizers (GPT-2's, Llama 3's, Qwen's and the one trained here) never join across such a
/// place, so the pieces encode to the tokens of the whole. Where there is none within another `target` bytes, the
/// cut falls between two characters.
pub(crate) fn pieces(text: &str, target: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, after) = rest.split_at(cut(rest, target));
        rest = after;
        Some(piece)
    })
}

/// Where the first piece of `text` ends; all of it when it is short.
pub(crate) fn cut(text: &str, target: usize) -> usize {
    let target = target.max(1);
    if text.len() <= target {
        return text.len();
    }
    let bytes = text.as_bytes();
    let limit = (2 * target).min(text.len() - 1);
    for at in target..=limit {
        // ASCII neighbours only: inside a multi-byte character none of the three matches.
        if bytes[at - 1] == b'\n'
            && bytes[at].is_ascii_alphanumeric()
            && at >= 2
            && bytes[at - 2].is_ascii_graphic()
        {
            return at;
        }
    }
    (limit..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, target: usize, expected: &[&str]) {
        assert_eq!(pieces(text, target).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn cuts_after_line_ends() {
        check("ab;\ncd;\nef", 3, &["ab;\n", "cd;\n", "ef"]);
        check("ab;\n\ncd;\nef", 3, &["ab;\n\nc", "d;\n", "ef"]);
        check("short", 100, &["short"]);
        check("", 3, &[]);
        check("aaaaaaaaaa", 2, &["aaaa", "aaaa", "aa"]);
        check("ééé", 1, &["é", "é", "é"]);
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_text(text in "[a-c;é \n]{0,200}", target in 1usize..40) {
            prop_assert_eq!(pieces(&text, target).collect::<String>(), text);
        }
    }
}
