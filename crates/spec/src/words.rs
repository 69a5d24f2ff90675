//! Choices that files write as words.

/// Gives an enum the words that stand for its values, in the order in which they are listed.
macro_rules! words {
    ($what:ident: $($word:literal => $value:ident),*) => {
        impl $what {
            /// The words of a run file.
            pub const WORDS: &'static [&'static str] = &[$($word),*];

            /// As a run file has it.
            pub const fn name(self) -> &'static str {
                match self {
                    $($what::$value => $word),*
                }
            }

            /// What a word stands for.
            pub fn parse(word: &str) -> Option<$what> {
                [$($what::$value),*].into_iter().find(|value| value.name() == word)
            }

            /// The choice of a key of `doc` that is written or has a default.
            pub(crate) fn of(doc: &$crate::doc::Doc, key: &str) -> $crate::Result<$what> {
                let word = doc.choice(key)?;
                $what::parse(word).ok_or_else(|| $crate::Error::failure(format!("{key} = {word} has no meaning")))
            }
        }
    };
}

pub(crate) use words;
