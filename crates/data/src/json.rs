//! Documents in JSON: the text of one value, and a file cut into its values.

use std::io::BufRead;
use std::path::Path;

use serde_json::Value;
use spec::{Error, Result};

use crate::field::{Found, parse};

/// How a file of text is divided into documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The whole file is text.
    Text,
    /// One JSON object a line.
    Lines,
    /// JSON objects one after another, over any number of lines.
    Values,
    /// One JSON array, of objects or strings.
    Array,
}

/// A document must fit in memory; a longer one is a file of another kind.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 256 << 20;

impl Shape {
    /// Tells the shape from the first bytes of a file; `is_named` is a file that the user named himself, rather than
    /// one found in a folder.
    pub(crate) fn of(head: &[u8], extension: &str, is_named: bool, field: &str) -> Shape {
        let head = head.trim_ascii_start();
        let by_lines = matches!(extension, "jsonl" | "ndjson");
        let is_json = extension == "json";
        let fallback = if by_lines { Shape::Lines } else { Shape::Text };
        match head.first() {
            Some(b'{') => {
                let first = First::of(head, field);
                match (first.has_field, first.one_line) {
                    (true, true) => Shape::Lines,
                    (true, false) if by_lines => Shape::Lines,
                    (true, false) => Shape::Values,
                    // Named by the user as .json: without the field, or broken, which the first object will tell.
                    (false, true) if is_json && is_named => Shape::Lines,
                    (false, false) if is_json && is_named => Shape::Values,
                    (false, _) => fallback,
                }
            }
            Some(b'[') => {
                let inside = head[1..].trim_ascii_start();
                let is_array = match inside.first() {
                    _ if is_json && is_named => true,
                    Some(b'{') => First::of(inside, field).has_field,
                    Some(b'"') | Some(b']') => is_json,
                    _ => false,
                };
                if is_array { Shape::Array } else { fallback }
            }
            _ => fallback,
        }
    }
}

/// What is known of the object that a file begins with.
struct First {
    /// It has the text field.
    has_field: bool,
    /// It ends on the line where it begins.
    one_line: bool,
}

impl First {
    fn of(head: &[u8], field: &str) -> First {
        let mut values = serde_json::Deserializer::from_slice(head).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) => {
                let (first, _) = head.split_at(values.byte_offset().min(head.len()));
                First {
                    has_field: value.get(field).is_some_and(Value::is_string),
                    one_line: !first.contains(&b'\n'),
                }
            }
            // Too long for the head, or no JSON: the name of the field tells.
            _ => {
                let key = Value::String(field.to_owned()).to_string().into_bytes();
                let at = head.windows(key.len()).position(|w| w == key);
                let has_field =
                    at.is_some_and(|at| head[at + key.len()..].trim_ascii_start().starts_with(b":"));
                First { has_field, one_line: !head.contains(&b'\n') }
            }
        }
    }
}

/// The document in one JSON value: its text field, or with `strings` the value itself where it is one.
pub(crate) fn json_text(bytes: &[u8], field: &str, strings: bool) -> Result<String> {
    const HINT: &str = "each document is an object with the text in one field: --field NAME (data.field) names another, --skip-bad (data.skip_bad) leaves such documents out";
    let refuse = |what: String| Err(Error::user(what).hint(HINT));
    match parse(bytes, field) {
        Ok(Found::Text(text)) if strings => Ok(text),
        Ok(Found::Field(text)) => Ok(text),
        Ok(Found::OtherField(kind)) => refuse(format!("field {field:?} is {kind}, expected a string")),
        Ok(Found::NoField(known)) => refuse(format!("no field {field:?}, found {}", known.join(", "))),
        Ok(Found::Text(_)) => refuse("a string, expected an object".to_owned()),
        Ok(Found::Other(kind)) => refuse(format!("{kind}, expected an object")),
        Err(e) => {
            // serde counts lines from the start of this value, which would mislead beside the file's own number.
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            refuse(format!("not JSON at column {}: {what}", e.column()))
        }
    }
}

/// Cuts a stream into JSON values by their brackets and quotes, without parsing them.
pub(crate) struct Values<R> {
    source: R,
    shape: Shape,
    line: u64,
    is_open: bool,
}

/// Why there is no further value.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The stream cannot be read.
    Io(std::io::Error),
    /// A value or a line longer than [`DOCUMENT_BYTES_MAX`], at this line.
    Long(u64),
    /// The file ends inside an array or a value, at this line.
    Unfinished(u64),
}

impl Broken {
    /// Names the place.
    pub(crate) fn error(self, path: &Path) -> Error {
        let path = path.display();
        let (line, what) = match self {
            Broken::Io(e) => {
                return Error::failure(format!("read {path}: {e}")).hint(
                    "copy the file again; --skip-bad (data.skip_bad) keeps what came before the damage",
                );
            }
            Broken::Long(line) => (line, format!("a document of more than {} MiB", DOCUMENT_BYTES_MAX >> 20)),
            Broken::Unfinished(line) => (line, "the file ends inside a document".to_owned()),
        };
        Error::user(format!("{path}:{line}: {what}"))
            .hint("each document is an object with the text in one field; --skip-bad (data.skip_bad) leaves this one out")
    }
}

impl<R: BufRead> Values<R> {
    pub(crate) fn new(source: R, shape: Shape) -> Self {
        Values { source, shape, line: 1, is_open: false }
    }

    /// The next value and the line it begins on; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<(Vec<u8>, u64)>, Broken> {
        match self.shape {
            Shape::Lines | Shape::Text => self.next_line(),
            Shape::Values | Shape::Array => self.next_value(),
        }
    }

    fn next_line(&mut self) -> Result<Option<(Vec<u8>, u64)>, Broken> {
        let mut bytes = Vec::new();
        let mut limited = std::io::Read::take(&mut self.source, DOCUMENT_BYTES_MAX);
        let read = limited.read_until(b'\n', &mut bytes).map_err(Broken::Io)?;
        let line = self.line;
        self.line += 1;
        if read as u64 == DOCUMENT_BYTES_MAX {
            if bytes.last() != Some(&b'\n') {
                self.skip_line().map_err(Broken::Io)?;
            }
            return Err(Broken::Long(line));
        }
        Ok((read > 0).then_some((bytes, line)))
    }

    fn skip_line(&mut self) -> std::io::Result<()> {
        loop {
            let buffer = self.source.fill_buf()?;
            let end = buffer.iter().position(|&b| b == b'\n').map(|at| at + 1);
            let used = end.unwrap_or(buffer.len());
            self.source.consume(used);
            if end.is_some() || used == 0 {
                return Ok(());
            }
        }
    }

    fn next_value(&mut self) -> Result<Option<(Vec<u8>, u64)>, Broken> {
        let mut value = Partial { bytes: Vec::new(), line: 0, depth: 0, in_string: false, escaped: false };
        loop {
            let buffer = self.source.fill_buf().map_err(Broken::Io)?;
            if buffer.is_empty() {
                let is_unfinished = self.is_open || value.depth > 0 || value.in_string;
                self.is_open = false;
                return match value.bytes.is_empty() {
                    _ if is_unfinished => Err(Broken::Unfinished(self.line)),
                    true => Ok(None),
                    false => Ok(Some((value.bytes, value.line))),
                };
            }
            let mut used = 0;
            let mut is_whole = false;
            for &byte in buffer {
                used += 1;
                self.line += u64::from(byte == b'\n');
                if value.bytes.is_empty() {
                    match byte {
                        b',' if self.is_open => continue,
                        b'[' if self.shape == Shape::Array && !self.is_open => {
                            self.is_open = true;
                            continue;
                        }
                        b']' if self.is_open => {
                            self.is_open = false;
                            // What follows an array is another value, which the reader refuses.
                            self.shape = Shape::Values;
                            continue;
                        }
                        _ if byte.is_ascii_whitespace() => continue,
                        _ => value.line = self.line,
                    }
                }
                if value.ends_before(byte, self.is_open) {
                    used -= 1;
                    self.line -= u64::from(byte == b'\n');
                    is_whole = true;
                    break;
                }
                if value.push(byte) {
                    is_whole = true;
                    break;
                }
            }
            self.source.consume(used);
            if value.bytes.len() as u64 > DOCUMENT_BYTES_MAX {
                return Err(Broken::Long(value.line));
            }
            if is_whole {
                return Ok(Some((value.bytes, value.line)));
            }
        }
    }
}

/// A value whose end is being looked for.
struct Partial {
    bytes: Vec<u8>,
    line: u64,
    depth: u64,
    in_string: bool,
    escaped: bool,
}

impl Partial {
    /// Whether a number or word, which nothing closes, ends before this byte.
    fn ends_before(&self, byte: u8, in_array: bool) -> bool {
        let is_bare = !self.bytes.is_empty() && self.depth == 0 && !self.in_string;
        is_bare
            && (byte.is_ascii_whitespace()
                || matches!(byte, b',' | b'{' | b'[' | b'"')
                || (in_array && byte == b']'))
    }

    /// Takes a byte; true where it closes the value.
    fn push(&mut self, byte: u8) -> bool {
        self.bytes.push(byte);
        if self.in_string {
            let closes = byte == b'"' && !self.escaped;
            self.escaped = byte == b'\\' && !self.escaped;
            self.in_string = !closes;
            return closes && self.depth == 0;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, shape: Shape, expected: &[(&str, u64)]) {
        // Every size of buffer, so that every place is a border once.
        for capacity in 1..text.len() + 2 {
            let mut values = Values::new(std::io::BufReader::with_capacity(capacity, text.as_bytes()), shape);
            let mut found = Vec::new();
            while let Some((bytes, line)) = values.next().unwrap() {
                found.push((String::from_utf8(bytes).unwrap(), line));
            }
            let expected: Vec<_> = expected.iter().map(|&(s, line)| (s.to_owned(), line)).collect();
            assert_eq!(found, expected, "{text:?} by {capacity}");
        }
    }

    #[test]
    fn files_are_cut_into_values() {
        check("{\"a\":1}\n{}", Shape::Lines, &[("{\"a\":1}\n", 1), ("{}", 2)]);
        check("{\n}\n\n{\"a\":{}} {}", Shape::Values, &[("{\n}", 1), ("{\"a\":{}}", 4), ("{}", 4)]);
        check(
            " [ {\"a\": [1, 2]},\n\"b]\\\"\", 12,true ]\n",
            Shape::Array,
            &[("{\"a\": [1, 2]}", 1), ("\"b]\\\"\"", 2), ("12", 2), ("true", 2)],
        );
        check("[]", Shape::Array, &[]);
        check("[{}] x", Shape::Array, &[("{}", 1), ("x", 1)]);
    }

    #[test]
    fn files_cut_off() {
        for text in ["[", "[{}", "[{}, {", "[\"a"] {
            let mut values = Values::new(text.as_bytes(), Shape::Array);
            let end = loop {
                match values.next() {
                    Ok(Some(_)) => {}
                    end => break end,
                }
            };
            assert!(matches!(end, Err(Broken::Unfinished(1))), "{text}");
            assert!(matches!(values.next(), Ok(None)));
        }
    }

    #[test]
    fn shapes_are_told_by_content() {
        let check = |head: &str, extension: &str, is_named: bool, expected: Shape| {
            let found = Shape::of(head.as_bytes(), extension, is_named, "text");
            assert_eq!(found, expected, "{head} in .{extension}, named: {is_named}");
        };
        use Shape::*;
        for named in [true, false] {
            for extension in ["json", "jsonl", "ndjson", "txt", ""] {
                check("{\"text\": \"a\"}\n{\"text\"", extension, named, Lines);
                check("[\n{\"text\": \"a\"}, ", extension, named, Array);
            }
            check("{\"text\": \"a long one, cut", "json", named, Lines);
            check("{\n \"text\": \"a\"\n}", "json", named, Values);
            check("[\"a\", \"b\"]", "json", named, Array);
            check("[\"a\", \"b\"]", "txt", named, Text);
            check("[section]\na = 1", "ini", named, Text);
            check("plain", "json", named, Text);
            check("plain", "jsonl", named, Lines);
            check("[1]", "jsonl", named, Lines);
            check("{\"body\": \"a\"}", "jsonl", named, Lines);
            // Of a file that somebody names as JSON, nothing is trained on as the text that it also is.
            let or_text = |shape| if named { shape } else { Text };
            check("{\n \"name\": \"a package\"\n}", "json", named, or_text(Values));
            check("{\"body\": \"a\"}\n{\"body\": \"b\"}", "json", named, or_text(Lines));
            check("{\"body\": \"a\"}", "json", named, or_text(Lines));
            check("{broken", "json", named, or_text(Lines));
            check("[{\"body\": \"a\"}]", "json", named, or_text(Array));
            check("[null, {\"text\": \"a\"}]", "json", named, or_text(Array));
            check("[[\"x\"], {\"text\": \"a\"}]", "json", named, or_text(Array));
            check("[[null, 1]]", "txt", named, Text);
        }
    }
}
