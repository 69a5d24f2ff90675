//! Bounds on TOML before its parser builds a tree: it recurses into tables that are never closed until the stack is
//! full, and takes up to two hundred bytes for each of a value as short as `{"":1}`.

use toml_parser::Source;
use toml_parser::lexer::TokenKind;

/// Bytes of a file; a blend of ten thousand datasets has less.
const BYTES_MAX: usize = 4 << 20;
/// Words, numbers, strings and punctuation of a file.
const TOKENS_MAX: usize = 1 << 17;
/// Tables and lists within each other.
const DEPTH_MAX: usize = 32;

/// Why a text is not given to the parser, and the byte at which that shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Counted from 0.
    pub byte: usize,
    /// What is wrong with it.
    pub why: String,
}

/// Refuses text that no file of ours is, and on which a TOML parser would spend the stack or the memory.
///
/// # Errors
/// If it is too long, has too many values, or nests too deeply.
///
/// ```
/// assert!(spec::guard_toml("a = [{ b = 1 }]").is_ok());
/// assert!(spec::guard_toml(&"[".repeat(40)).is_err());
/// ```
pub fn guard_toml(text: &str) -> Result<(), Unreadable> {
    if text.len() > BYTES_MAX {
        return Err(Unreadable { byte: 0, why: format!("longer than {} MiB", BYTES_MAX >> 20) });
    }
    let (mut open, mut tokens) = (Vec::new(), 0);
    for token in Source::new(text).lex() {
        let close = match token.kind() {
            TokenKind::Whitespace | TokenKind::Comment | TokenKind::Newline => continue,
            TokenKind::LeftCurlyBracket => Some(TokenKind::RightCurlyBracket),
            TokenKind::LeftSquareBracket => Some(TokenKind::RightSquareBracket),
            _ => None,
        };
        tokens += 1;
        if open.last() == Some(&token.kind()) {
            // A bracket of the wrong kind closes nothing.
            open.pop();
        }
        open.extend(close);
        let byte = token.span().start();
        if open.len() > DEPTH_MAX {
            let why = format!("more than {DEPTH_MAX} tables and lists within each other");
            return Err(Unreadable { byte, why });
        }
        if tokens > TOKENS_MAX {
            return Err(Unreadable { byte, why: format!("more than {TOKENS_MAX} words and values") });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fills_stack_or_memory_is_refused() {
        let check = |text: &str, expected: Option<(usize, &str)>| {
            let found = guard_toml(text).err();
            let found = found.as_ref().map(|u| (u.byte, u.why.as_str()));
            assert_eq!(found, expected, "{}", &text[..text.len().min(40)]);
        };
        check("", None);
        check(&" ".repeat(BYTES_MAX), None);
        check(&" ".repeat(BYTES_MAX + 1), Some((0, "longer than 4 MiB")));
        check("a = \"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\" # [[[[", None);
        check(&"[a]\n".repeat(1000), None);
        check(&"[[a.b]]\nc = { d = [1] }\n".repeat(1000), None);
        let deep = Some((32, "more than 32 tables and lists within each other"));
        check(&"[".repeat(32), None);
        check(&"[".repeat(33), deep);
        check(&"[] ".repeat(33), None);
        // The end of the text is one of them.
        check(&"a\n".repeat(TOKENS_MAX - 1), None);
        check(&"a\n".repeat(TOKENS_MAX), Some((2 * TOKENS_MAX, "more than 131072 words and values")));
        check(&"[".repeat(1 << 20), deep);
        let unclosed = "a = { b = 1\nc = 2\n[d]\ne".repeat(99);
        assert!(guard_toml(&unclosed).is_err());
        assert!(guard_toml(&"{ a = [ } ".repeat(99)).is_err());
        check(&format!("a = [{}]", "1,".repeat(60_000)), None);
        let many = format!("a = [{}]", "1,".repeat(70_000));
        check(&many, Some((131_074, "more than 131072 words and values")));
        check(&" ".repeat((4 << 20) + 1), Some((0, "longer than 4 MiB")));
    }
}
