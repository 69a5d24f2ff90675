//! Cutting a long text where no tokenizer joins what is left and right of the cut.

/// How the text of a file is cut into parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Into documents of about `document_bytes`, each of whole pieces of about `piece_bytes`.
    Documents { document_bytes: u64, piece_bytes: usize },
    /// Into parts of about this many bytes, for counting words.
    Sample(usize),
    /// Into parts of about this many bytes that encode to the tokens of the whole.
    Exact(usize),
    /// Not at all.
    Whole,
}

impl Cut {
    /// Where the first part of `text` ends, if that can be told; its first `searched` bytes were looked at before.
    pub(crate) fn find(self, text: &str, is_last: bool, searched: usize) -> Option<usize> {
        match self {
            Cut::Documents { piece_bytes: target, .. } | Cut::Sample(target) => {
                // A cut may look two targets ahead; with less in hand it would depend on the block's size.
                (is_last || text.len() > 2 * target.max(2) + 8).then(|| cut(text, target))
            }
            Cut::Exact(target) => {
                // A cut looks at its neighbours, which may not all have been there.
                let from = target.max(searched.saturating_sub(16));
                let found = if text.len() <= 2 * target { None } else { exact(text, from) };
                found.or(is_last.then_some(text.len()))
            }
            Cut::Whole => is_last.then_some(text.len()),
        }
    }

    /// Text gathered before it is handed on.
    pub(crate) fn send_bytes(self) -> u64 {
        match self {
            Cut::Documents { document_bytes, .. } => document_bytes,
            _ => 0,
        }
    }

    /// Whether what is handed on is a document.
    pub(crate) fn ends_documents(self) -> bool {
        matches!(self, Cut::Documents { .. })
    }
}

/// Cuts `text` into pieces of about `target` bytes that encode to the tokens of the whole, with the tokenizers that
/// `rules` knows: each ends after a line, between a visible character and a letter or digit, or else before a single
/// space between such. Without such a place there is no cut.
pub(crate) fn exact_pieces(text: &str, target: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = Cut::Exact(target).find(rest, true, 0)?;
        let (piece, after) = rest.split_at(end);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The first exact cut from `from` on: within as many bytes again after a line, or else the first of either kind.
fn exact(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let from = from.max(2);
    // ASCII on the right; on the left of a line end, any visible character.
    let after_line = |at: usize| {
        bytes[at - 1] == b'\n'
            && bytes[at].is_ascii_alphanumeric()
            && text[..at - 1].chars().next_back().is_some_and(|c| !c.is_whitespace() && !c.is_control())
    };
    let before_space = |at: usize| {
        bytes[at] == b' '
            && bytes[at - 1].is_ascii_graphic()
            && bytes.get(at + 1).is_some_and(u8::is_ascii_alphanumeric)
    };
    let near = from.min(bytes.len())..(2 * from + 1).min(bytes.len());
    let found = near.clone().find(|&at| after_line(at)).or_else(|| near.clone().find(|&at| before_space(at)));
    found.or_else(|| (near.end..bytes.len()).find(|&at| after_line(at) || before_space(at)))
}

/// Cuts `text` into pieces of `target` to 2 `target` bytes, each ending after a line, or else before a word, or else
/// anywhere between two characters: for documents of their own, and for counting words. Cutting a piece again leaves it
/// whole.
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
    fn exact_cuts_or_none() {
        let check = |text: &str, target: usize, expected: &[&str]| {
            assert_eq!(exact_pieces(text, target).collect::<Vec<_>>(), expected);
        };
        check("ab;\ncd;\nef", 3, &["ab;\n", "cd;\nef"]);
        check("ab cd ef gh", 3, &["ab cd", " ef gh"]);
        check("中\nab。\nc", 2, &["中\n", "ab。\n", "c"]);
        check("aaaaaaaaaa aaaa", 2, &["aaaaaaaaaa", " aaaa"]);
        for whole in ["aaaaaaaaaaaaaaaa", "a  a  a  a  a", "a\n\na\n\na", "中中中中", " \n \n \n"] {
            check(whole, 2, &[whole]);
        }
        check("", 3, &[]);
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
            prop_assert_eq!(exact_pieces(&text, target).collect::<String>(), text.as_str());
            prop_assert_eq!(pieces(&text, target).collect::<String>(), text.as_str());
            // A piece is not cut again, so it does not matter who cuts.
            for piece in pieces(&text, target) {
                prop_assert_eq!(cut(piece, target), piece.len());
            }
        }
    }
}
