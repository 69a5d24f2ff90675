use crate::Error;
use std::fmt;

/// Where a value was written; later ones win.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: it is the default.
    Default,
    /// In a file.
    File {
        /// The file's name.
        path: String,
        /// Counted from 1.
        line: usize,
    },
    /// In an override, `key=value`.
    Set(String),
}

impl Origin {
    /// Later places win over earlier ones.
    pub(crate) fn level(&self) -> u8 {
        match self {
            Origin::Default => 0,
            Origin::File { .. } => 1,
            Origin::Set(_) => 2,
        }
    }

    /// Puts the place of the key that a message starts with in front of it.
    pub(crate) fn locate<'a>(error: Error, of: impl Fn(&str) -> Option<&'a Origin>) -> Error {
        let message = error.to_string();
        let first = message.split([' ', '[']).next().unwrap_or_default();
        match of(first) {
            Some(origin) if *origin != Origin::Default => error.context(origin),
            _ => error,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("the defaults"),
            Origin::File { path, line } => write!(f, "{path}:{line}"),
            Origin::Set(text) => write!(f, "--set {text}"),
        }
    }
}
