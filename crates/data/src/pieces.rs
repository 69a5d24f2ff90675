//! Cutting a long text where no tokenizer joins what is left and right of the cut.

/// Cuts `text` into pieces of `target` to 2 `target` bytes, each ending where byte-level pre-tokenizers (GPT-2's,
/// Llama 3's, Qwen's and the one trained here) never join, so that the pieces encode to the tokens of the whole.
///
/// That is after a line end between a visible character and a letter or digit, or else before a single space
/// between such. A text without either for `target` bytes is cut between two characters. Cutting a piece again
/// leaves it whole.
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

/// Where the first piece of `text` ends; all of it up to 2 `target` bytes.
pub(crate) fn cut(text: &str, target: usize) -> usize {
    let target = target.max(2);
    if text.len() <= 2 * target {
        return text.len();
    }
    let bytes = text.as_bytes();
    // ASCII neighbours only: none of them occurs inside a multi-byte character.
    let after_line = |&at: &usize| {
        bytes[at - 1] == b'\n' && bytes[at - 2].is_ascii_graphic() && bytes[at].is_ascii_alphanumeric()
    };
    let before_space = |&at: &usize| {
        bytes[at] == b' '
            && bytes[at - 1].is_ascii_graphic()
            && bytes.get(at + 1).is_some_and(u8::is_ascii_alphanumeric)
    };
    (target..=2 * target)
        .find(after_line)
        .or_else(|| (target..=2 * target).find(before_space))
        .or_else(|| (2 * target..text.len()).find(|&at| text.is_char_boundary(at)))
        .unwrap_or(text.len())
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
        check("ab;\ncd;\nef", 3, &["ab;\n", "cd;\nef"]);
        check("ab cd ef gh", 3, &["ab cd", " ef gh"]);
        check("ab;\n\ncd;\nef", 3, &["ab;\n\nc", "d;\nef"]);
        check("short", 100, &["short"]);
        check("", 3, &[]);
        check("aaaaaaaaaa", 2, &["aaaa", "aaaa", "aa"]);
        check("éééé", 2, &["éé", "éé"]);
    }

    proptest! {
        #[test]
        fn pieces_join_to_the_text(text in "[a-c;é \n]{0,200}", target in 1usize..40) {
            prop_assert_eq!(pieces(&text, target).collect::<String>(), text.as_str());
            // A piece is not cut again, so it does not matter who cuts.
            for piece in pieces(&text, target) {
                prop_assert_eq!(cut(piece, target), piece.len());
            }
        }
    }
}
