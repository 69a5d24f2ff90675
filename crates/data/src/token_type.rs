use spec::{Error, Result};

/// How a token id is stored in a `.bin` file, always little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenType {
    /// One unsigned byte.
    U8,
    /// One signed byte.
    I8,
    /// Two signed bytes.
    I16,
    /// Two unsigned bytes: Megatron's choice for vocabularies below 65,500.
    U16,
    /// Four signed bytes: Megatron's choice for larger vocabularies.
    I32,
    /// Four unsigned bytes: llm.c's Llama 3 shards (no Megatron index has it).
    U32,
    /// Eight signed bytes.
    I64,
}

/// Vocabularies from this size on are stored in four bytes (Megatron's `DType.optimal_dtype`).
const WIDE_VOCAB_FROM: usize = 65_500;

impl TokenType {
    /// The type that Megatron stores a vocabulary of this size in.
    pub fn for_vocab(vocab: usize) -> TokenType {
        if vocab < WIDE_VOCAB_FROM { TokenType::U16 } else { TokenType::I32 }
    }

    /// Bytes per token.
    pub fn size(self) -> usize {
        match self {
            TokenType::U8 | TokenType::I8 => 1,
            TokenType::I16 | TokenType::U16 => 2,
            TokenType::I32 | TokenType::U32 => 4,
            TokenType::I64 => 8,
        }
    }

    /// The name in manifests and messages: `u16`, `i32` and so on.
    pub fn name(self) -> &'static str {
        match self {
            TokenType::U8 => "u8",
            TokenType::I8 => "i8",
            TokenType::I16 => "i16",
            TokenType::U16 => "u16",
            TokenType::I32 => "i32",
            TokenType::U32 => "u32",
            TokenType::I64 => "i64",
        }
    }

    /// The largest id that can be stored and read back.
    pub fn max_id(self) -> u32 {
        match self {
            TokenType::U8 => u32::from(u8::MAX),
            TokenType::I8 => i8::MAX as u32,
            TokenType::I16 => i16::MAX as u32,
            TokenType::U16 => u32::from(u16::MAX),
            TokenType::I32 => i32::MAX as u32,
            TokenType::U32 | TokenType::I64 => u32::MAX,
        }
    }

    /// Megatron's code in the index header, if it has one.
    pub(crate) fn code(self) -> Option<u8> {
        Some(match self {
            TokenType::U8 => 1,
            TokenType::I8 => 2,
            TokenType::I16 => 3,
            TokenType::I32 => 4,
            TokenType::I64 => 5,
            TokenType::U16 => 8,
            TokenType::U32 => return None,
        })
    }

    /// Reads Megatron's code; floating-point codes are named in the refusal.
    pub(crate) fn from_code(code: u8) -> Result<TokenType> {
        Ok(match code {
            1 => TokenType::U8,
            2 => TokenType::I8,
            3 => TokenType::I16,
            4 => TokenType::I32,
            5 => TokenType::I64,
            8 => TokenType::U16,
            6 | 7 => {
                return Err(Error::user(format!(
                    "token type code {code} is floating point, expected integers"
                )));
            }
            _ => return Err(Error::user(format!("unknown token type code {code}, expected 1 to 8"))),
        })
    }

    /// Decodes `bytes` into `out`; negative ids and those beyond 32 bits come out above `i32::MAX`, so that no
    /// vocabulary holds them. Both must hold the same number of tokens.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [u32]) {
        debug_assert_eq!(bytes.len(), out.len() * self.size());
        match self {
            TokenType::U8 => each::<1>(bytes, out, |b| u32::from(b[0])),
            TokenType::I8 => each::<1>(bytes, out, |b| b[0] as i8 as u32),
            TokenType::I16 => each::<2>(bytes, out, |b| i16::from_le_bytes(b) as u32),
            TokenType::U16 => each::<2>(bytes, out, |b| u32::from(u16::from_le_bytes(b))),
            TokenType::I32 | TokenType::U32 => each::<4>(bytes, out, u32::from_le_bytes),
            TokenType::I64 => {
                each::<8>(bytes, out, |b| u32::try_from(i64::from_le_bytes(b)).unwrap_or(u32::MAX))
            }
        }
    }

    /// Appends `tokens` to `out`; every token must be at most [`TokenType::max_id`].
    pub(crate) fn encode(self, tokens: &[u32], out: &mut Vec<u8>) {
        out.reserve(tokens.len() * self.size());
        for &token in tokens {
            debug_assert!(token <= self.max_id());
            out.extend_from_slice(&u64::from(token).to_le_bytes()[..self.size()]);
        }
    }
}

#[inline]
fn each<const N: usize>(bytes: &[u8], out: &mut [u32], decode: impl Fn([u8; N]) -> u32) {
    let (items, _) = bytes.as_chunks::<N>();
    for (slot, item) in out.iter_mut().zip(items) {
        *slot = decode(*item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_reads_back_what_it_wrote() {
        use TokenType::*;
        for kind in [U8, I8, I16, U16, I32, U32, I64] {
            let tokens = [0, 1, 77, kind.max_id()];
            let mut bytes = Vec::new();
            kind.encode(&tokens, &mut bytes);
            let mut back = [0; 4];
            kind.decode(&bytes, &mut back);
            assert_eq!(back, tokens, "{}", kind.name());
        }
    }

    #[test]
    fn negative_ids_fit_no_vocabulary() {
        let mut out = [0];
        TokenType::I32.decode(&(-1i32).to_le_bytes(), &mut out);
        assert!(out[0] > i32::MAX as u32);
        TokenType::I64.decode(&(-1i64).to_le_bytes(), &mut out);
        assert!(out[0] > i32::MAX as u32);
    }

    #[test]
    fn width_follows_the_vocabulary() {
        assert_eq!(TokenType::for_vocab(65_499), TokenType::U16);
        assert_eq!(TokenType::for_vocab(65_500), TokenType::I32);
    }
}
