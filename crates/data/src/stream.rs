use std::sync::LazyLock;

use crate::tokenizer::Tokenizer;

/// Turns a growing list of tokens into text as it grows, holding back what may still become a character.
///
/// Tokens of byte-level tokenizers may end inside a UTF-8 character; its bytes are kept until the rest
/// comes. Bytes that can no longer become a character come out as U+FFFD at once.
///
/// ```
/// # let tokenizer = data::Tokenizer::train(["tokens and bytes"], 257, &|_| {})?;
/// let ids = tokenizer.encode("é!")?; // three byte tokens
/// let mut stream = data::StreamDecoder::new(&tokenizer);
/// let parts: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
/// assert_eq!(parts, ["", "é", "!"]);
/// assert_eq!(stream.finish(), "");
/// # Ok::<(), spec::Error>(())
/// ```
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    state: State,
}

enum State {
    /// Bytes that are not yet a whole character.
    Bytes(Vec<u8>),
    /// Other tokenizers: the text of `ids[printed..]` is told apart by decoding with and without it.
    Window { ids: Vec<u32>, printed: usize },
}

/// A character has at most four bytes, so more tokens than that cannot complete it.
const MAX_PENDING_TOKENS: usize = 4;

impl<'a> StreamDecoder<'a> {
    /// A decoder that has seen nothing.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        let state = if tokenizer.is_byte_level() {
            State::Bytes(Vec::with_capacity(16))
        } else {
            State::Window { ids: Vec::new(), printed: 0 }
        };
        StreamDecoder { tokenizer, state }
    }

    /// Takes one token and gives the text that is now certain, perhaps none.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.token(id).filter(|t| !self.tokenizer.is_special(t)) else {
            return String::new();
        };
        match &mut self.state {
            State::Bytes(pending) => {
                append_bytes(&token, pending);
                take_text(pending)
            }
            State::Window { ids, printed } => {
                ids.push(id);
                let text = window_text(self.tokenizer, ids, *printed);
                let pending = ids.len() - *printed;
                if text.ends_with(char::REPLACEMENT_CHARACTER) && pending <= MAX_PENDING_TOKENS {
                    return String::new();
                }
                // What was just printed stays as context: some decoders treat a first token differently.
                ids.drain(..*printed);
                *printed = ids.len();
                text
            }
        }
    }

    /// What was held back; an unfinished character becomes U+FFFD.
    pub fn finish(self) -> String {
        match self.state {
            State::Bytes(pending) => String::from_utf8_lossy(&pending).into_owned(),
            State::Window { ids, printed } => window_text(self.tokenizer, &ids, printed),
        }
    }
}

fn window_text(tokenizer: &Tokenizer, ids: &[u32], printed: usize) -> String {
    let before = tokenizer.decode(&ids[..printed]);
    let all = tokenizer.decode(ids);
    all.strip_prefix(before.as_str()).unwrap_or(&all).to_owned()
}

/// Takes the longest decided prefix, replacing what cannot become a character.
fn take_text(pending: &mut Vec<u8>) -> String {
    let mut decided = 0;
    for chunk in pending.utf8_chunks() {
        decided += chunk.valid().len();
        let incomplete = decided + chunk.invalid().len() == pending.len()
            && std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
        if !incomplete {
            decided += chunk.invalid().len();
        }
    }
    let text = String::from_utf8_lossy(&pending[..decided]).into_owned();
    pending.drain(..decided);
    text
}

/// The bytes that a byte-level token spells; a token with other characters stands for itself.
fn append_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match BYTE_OF.get(c as usize).copied().flatten() {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on in order.
static BYTE_OF: LazyLock<[Option<u8>; 512]> = LazyLock::new(|| {
    let mut table = [None; 512];
    let mut next = 256;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        table[code] = Some(byte);
    }
    table
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_bytes_do_not_hold_up_the_stream() {
        let check = |bytes: &[u8], expected: &str, left: &[u8]| {
            let mut pending = bytes.to_vec();
            assert_eq!(take_text(&mut pending), expected);
            assert_eq!(pending, left);
        };
        check(b"abc", "abc", b"");
        check(b"a\xc3", "a", b"\xc3");
        check(b"\xff", "\u{fffd}", b"");
        check(b"\xe2\x82", "", b"\xe2\x82");
        check(b"\xe2\x82a", "\u{fffd}a", b"");
        check(b"\xf0\x9f\x98\x80\xf0", "\u{1f600}", b"\xf0");
        check(b"", "", b"");
    }

    #[test]
    fn byte_spelling_is_gpt2s() {
        let mut out = Vec::new();
        append_bytes("Ġhi", &mut out);
        append_bytes("Ċ", &mut out);
        assert_eq!(out, b" hi\n");
    }
}
