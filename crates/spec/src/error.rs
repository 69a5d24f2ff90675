use std::borrow::Cow;
use std::fmt;

/// A result whose error a person can act on.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is, which decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The input was wrong: exit code 2.
    User,
    /// The world failed (disk full, peer lost, loss not finite): exit code 1.
    Failure,
}

/// What went wrong, where, and what to do about it.
///
/// `what` names the place and the values found and expected; `hint` names the command or key to change.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    what: String,
    hint: Option<String>,
}

impl Error {
    /// The input was wrong.
    pub fn user(what: impl Into<String>) -> Self {
        Error { kind: Kind::User, what: plain(what.into()), hint: None }
    }

    /// The world failed.
    pub fn failure(what: impl Into<String>) -> Self {
        Error { kind: Kind::Failure, what: plain(what.into()), hint: None }
    }

    /// An I/O operation on `path` failed; a missing or unreadable file is the user's, the rest is the world's.
    pub fn io(doing: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        use std::io::ErrorKind as K;
        let what = format!("{doing} {}: {error}", path.display());
        match error.kind() {
            _ if error
                .raw_os_error()
                .is_some_and(|e| [TOO_MANY_FILES, TOO_MANY_FILES_IN_ALL].contains(&e)) =>
            {
                Error::failure(what).hint("raise the limit on open files: ulimit -n")
            }
            K::NotFound
            | K::PermissionDenied
            | K::NotADirectory
            | K::IsADirectory
            | K::ReadOnlyFilesystem
            | K::InvalidInput
            | K::AlreadyExists => Error::user(what),
            _ if error.raw_os_error() == Some(TOO_MANY_LINKS) => Error::user(what),
            _ => Error::failure(what),
        }
    }

    /// Says what to do; the first hint given stays.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint.get_or_insert_with(|| plain(hint.into()));
        self
    }

    /// Puts the outer operation in front: `load checkpoint: read run/x: ...`.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Self {
        self.what = plain(format!("{doing}: {}", self.what));
        self
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The process exit code: 2 for the user's input, 1 for a failure.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::User => 2,
            Kind::Failure => 1,
        }
    }

    /// What to do about it, if known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// `EMFILE` and `ENFILE`, for which [`std::io::ErrorKind`] has no name.
const TOO_MANY_FILES: i32 = 24;
const TOO_MANY_FILES_IN_ALL: i32 = 23;

/// `ELOOP`: links that lead in a circle, which [`std::io::ErrorKind`] has no stable name for.
const TOO_MANY_LINKS: i32 = 40;

/// Nobody reads more of a message, and a file may hold a name of a megabyte.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

/// Messages quote names and values out of files, whose control characters a terminal would obey.
fn plain(text: String) -> String {
    let text = match printable(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(plain) => plain,
    };
    if text.len() <= MESSAGE_BYTES_MAX {
        return text;
    }
    // Both ends speak: what and where comes first, what was expected last.
    let quarter = MESSAGE_BYTES_MAX / 4;
    let head = text.floor_char_boundary(2 * quarter);
    let tail = text.ceil_char_boundary(text.len() - quarter);
    format!("{} [... {} bytes ...] {}", &text[..head], tail - head, &text[tail..])
}

/// Text for a terminal: control characters and those that turn the direction of writing are spelt out, except line ends
/// and tabs. The spelling is JSON's, so that JSON stays what it was.
///
/// ```
/// assert_eq!(spec::printable("a\tb\n\u{1b}[31m\u{202e}"), "a\tb\n\\u001b[31m\\u202e");
/// ```
pub fn printable(text: &str) -> Cow<'_, str> {
    let is_obeyed = |c: char| {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        turns || (c.is_control() && c != '\n' && c != '\t')
    };
    if !text.contains(is_obeyed) {
        return Cow::Borrowed(text);
    }
    let spelt = |c: char| if is_obeyed(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    Cow::Owned(text.chars().map(spelt).collect())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {}

/// Adds the outer operation to a failed result.
pub trait Context<T> {
    /// Puts `doing` in front of the error's message.
    ///
    /// # Errors
    /// The error that was there.
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.context(doing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hold_no_control_characters() {
        let e = Error::user("tensor a\u{1b}[2Jb\u{7}").hint("say\r\u{9b}").context("x\u{0}");
        assert_eq!(e.to_string(), "x\\u0000: tensor a\\u001b[2Jb\\u0007");
        assert_eq!(e.hint_text(), Some("say\\u000d\\u009b"));
        assert_eq!(Error::failure("two\nlines, ü").to_string(), "two\nlines, ü");
    }

    #[test]
    fn failures_of_the_system_are_the_users_or_the_worlds() {
        let check = |errno: i32, kind: Kind, hint: Option<&str>| {
            let e = Error::io("read", "a/b".as_ref(), &std::io::Error::from_raw_os_error(errno));
            assert_eq!((e.kind(), e.hint_text()), (kind, hint), "{errno}: {e}");
            assert!(e.to_string().starts_with("read a/b: "), "{e}");
            assert_eq!(e.exit_code(), if kind == Kind::User { 2 } else { 1 });
        };
        // Linux: no entry, no permission, exists, no directory, a directory, read only, invalid, links in a circle.
        for errno in [2, 13, 17, 20, 21, 30, 22, 40] {
            check(errno, Kind::User, None);
        }
        // I/O, no memory, too large, no space, broken pipe, connection reset.
        for errno in [5, 12, 27, 28, 32, 104] {
            check(errno, Kind::Failure, None);
        }
        let hint = Some("raise the limit on open files: ulimit -n");
        check(23, Kind::Failure, hint);
        check(24, Kind::Failure, hint);
        let other = Error::io("write", "x".as_ref(), &std::io::Error::other("full"));
        assert_eq!((other.kind(), other.to_string().as_str()), (Kind::Failure, "write x: full"));
    }

    #[test]
    fn what_turns_or_hides_text_is_spelt_out() {
        let check = |text: &str, expected: &str| assert_eq!(printable(text), expected);
        check(
            "a\t\n\u{200d}\u{2029}\u{202f}\u{2065}\u{206a}",
            "a\t\n\u{200d}\u{2029}\u{202f}\u{2065}\u{206a}",
        );
        check(
            "\u{200e}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}",
            "\\u200e\\u200f\\u202a\\u202e\\u2066\\u2069",
        );
        check("\r\u{7f}\u{85}", "\\u000d\\u007f\\u0085");
    }

    /// As long as it may be is left alone; the ends of what is cut are whole characters.
    #[test]
    fn only_what_is_too_long_is_cut() {
        let fits = "x".repeat(MESSAGE_BYTES_MAX);
        assert_eq!(Error::user(fits.clone()).to_string(), fits);
        for n in 1..9 {
            let text = format!("{}{}", "y".repeat(n), "ü".repeat(MESSAGE_BYTES_MAX));
            let cut = Error::user(text.clone()).to_string();
            let (head, rest) = cut.split_once(" [... ").expect("it is cut");
            let (bytes, tail) = rest.split_once(" bytes ...] ").expect("it says how much");
            let gone: usize = bytes.parse().expect("a count");
            assert_eq!(head.len() + gone + tail.len(), text.len(), "{n}");
            assert!(text.starts_with(head) && text.ends_with(tail) && head.len() > tail.len(), "{n}");
            let kept = head.len() + tail.len();
            assert!((3068..=3072).contains(&kept), "{n}: {kept}");
        }
    }

    #[test]
    fn a_long_message_keeps_both_ends() {
        let long = format!("unknown key {} in run.toml:7", "ü".repeat(1 << 20));
        let e = Error::user(long.clone()).hint(long).context("read");
        for text in [e.to_string(), e.hint_text().unwrap().to_owned()] {
            assert!(text.len() < MESSAGE_BYTES_MAX && text.contains("unknown key ü"), "{}", text.len());
            assert!(text.contains("bytes ...]") && text.ends_with("ü in run.toml:7"), "{text}");
        }
    }
}
