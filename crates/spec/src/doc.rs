//! A tree of keys read from text, each with the place where it was written, so that every refusal can name it.

use crate::origin::Origin;
use crate::run::keys::{Key, KeyKind};
use crate::units::whole_tokens;
use crate::{Error, Result, guard_toml, suggest};
use std::collections::BTreeMap;
use std::fmt;
use toml::de::{DeTable, DeValue};

/// A value as written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Val {
    Text(String),
    Int(i128),
    /// A whole number too long for any use, by its digits.
    Huge(usize),
    Float(f64),
    Flag(bool),
    Date(String),
    List(Vec<Val>),
    Table(Vec<(String, Val)>),
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) value: Val,
    /// The text after `=` of an override, for keys that are text whatever it looks like.
    raw: Option<String>,
    pub(crate) origin: Origin,
}

/// Known keys and what was written for them.
pub(crate) struct Doc {
    keys: Vec<&'static Key>,
    entries: BTreeMap<&'static str, Entry>,
    /// Cut off the front of key names in messages, for files that hold a single section.
    section: &'static str,
}

impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Val::Text(text) => write!(f, "{text:?}"),
            Val::Int(x) => write!(f, "{x}"),
            Val::Huge(digits) => write!(f, "a number of {digits} digits"),
            Val::Float(x) if x.is_nan() => f.write_str("nan"),
            Val::Float(x) => write!(f, "{x:?}"),
            Val::Flag(x) => write!(f, "{x}"),
            Val::Date(text) => f.write_str(text),
            Val::List(_) => f.write_str("a list"),
            Val::Table(_) => f.write_str("a table"),
        }
    }
}

impl Doc {
    /// Nothing written yet: the defaults.
    pub(crate) fn new(keys: Vec<&'static Key>, section: &'static str) -> Self {
        let entries = keys.iter().filter_map(|k| Some((k.path, default_of(k)?))).collect();
        Doc { entries, section, keys }
    }

    /// Adds the keys of a TOML file.
    pub(crate) fn add_file(&mut self, path: &str, text: &str) -> Result<()> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let line_of = |offset: usize| {
            text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1
        };
        let refuse = |byte, why: &str| {
            Error::user(format!("{path}:{}: {}", line_of(byte), one_line(why)))
                .hint("the file has to be TOML: key = value")
        };
        guard_toml(text).map_err(|e| refuse(e.byte, &e.why))?;
        let table =
            DeTable::parse(text).map_err(|e| refuse(e.span().map_or(0, |span| span.start), e.message()))?;
        self.add_table("", table.get_ref(), &|offset| Origin::File {
            path: path.to_owned(),
            line: line_of(offset),
        })
    }

    /// Adds one `key=value`; the value is TOML, and what is not TOML is text.
    pub(crate) fn add_override(&mut self, text: &str) -> Result<()> {
        let origin = Origin::Set(text.to_owned());
        let Some((path, raw)) = text.split_once('=').map(|(k, v)| (k.trim(), v.trim())) else {
            return Err(
                Error::user(format!("`{text}` is not KEY=VALUE")).hint("write it like --set train.steps=200")
            );
        };
        let parsed = guard_toml(raw)
            .map_err(|e| e.why)
            .and_then(|()| DeValue::parse(raw).map_err(|e| e.message().to_owned()));
        let value = match parsed {
            Ok(value) => convert(value.get_ref()),
            Err(e) if raw.starts_with(['[', '{', '"', '\'']) => {
                return Err(Error::user(format!("{origin}: {}", one_line(&e)))
                    .hint("quote the whole argument for the shell: --set 'key=[1, 2]'"));
            }
            Err(_) => Val::Text(raw.to_owned()),
        };
        self.add(path, value, Some(raw), &origin)
    }

    fn add_table(
        &mut self,
        prefix: &str,
        table: &DeTable<'_>,
        origin: &dyn Fn(usize) -> Origin,
    ) -> Result<()> {
        for (key, value) in table {
            let path = join(prefix, key.get_ref());
            match value.get_ref() {
                DeValue::Table(inner) if self.is_section(&path) => self.add_table(&path, inner, origin)?,
                other => self.add(&path, convert(other), None, &origin(key.span().start))?,
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &str, value: Val, raw: Option<&str>, origin: &Origin) -> Result<()> {
        let full = format!("{}{path}", self.section);
        if let Some(key) = self.keys.iter().find(|k| k.path == full) {
            self.entries
                .insert(key.path, Entry { value, raw: raw.map(str::to_owned), origin: origin.clone() });
            return Ok(());
        }
        if value == Val::Text("auto".to_owned())
            && let Some(key) = self.keys.iter().find(|k| k.path.strip_suffix(".auto") == Some(&full))
        {
            // `layout = "auto"` says the same as `layout.auto = true`.
            let entry = Entry { value: Val::Flag(true), raw: None, origin: origin.clone() };
            self.entries.insert(key.path, entry);
            return Ok(());
        }
        match value {
            Val::Table(inner) if self.is_section(path) => inner
                .into_iter()
                .try_for_each(|(key, value)| self.add(&join(path, &key), value, None, origin)),
            value if self.is_section(path) => {
                let auto = self.names(path).contains(&"auto");
                let or = if auto { "\"auto\" or " } else { "" };
                Err(Error::user(format!("{path} = {value} in {origin}, expected {or}a section [{path}]"))
                    .hint(format!("keys of [{path}]: {}", self.names(path).join(", "))))
            }
            value => Err(self.unknown(path, &value, origin)),
        }
    }

    fn is_section(&self, path: &str) -> bool {
        let start = format!("{}{path}.", self.section);
        self.keys.iter().any(|k| k.path.starts_with(&start))
    }

    /// What may stand in section `path`, without the path itself.
    fn names(&self, path: &str) -> Vec<&'static str> {
        let start =
            if path.is_empty() { self.section.to_owned() } else { format!("{}{path}.", self.section) };
        self.keys.iter().filter_map(|k| k.path.strip_prefix(start.as_str())).collect()
    }

    fn unknown(&self, path: &str, value: &Val, origin: &Origin) -> Error {
        let mut sections: Vec<&str> =
            self.names("").iter().filter_map(|k| Some(k.split_once('.')?.0)).collect();
        sections.dedup();
        if matches!(value, Val::Table(_)) && !path.contains('.') {
            return Error::user(format!("unknown section [{path}] in {origin}"))
                .hint(suggest::hint(path, sections));
        }
        let what = Error::user(format!("unknown key {path} in {origin}"));
        if let Some(near) = suggest::nearest(path, self.names("")) {
            return what.hint(format!("did you mean `{near}`?"));
        }
        match path.split_once('.') {
            Some((section, _)) if self.is_section(section) => {
                what.hint(format!("keys of [{section}]: {}", self.names(section).join(", ")))
            }
            _ => what.hint(format!("sections: {}", sections.join(", "))),
        }
    }

    fn key(&self, path: &str) -> Option<&'static Key> {
        self.keys.iter().find(|k| k.path == path).copied()
    }

    pub(crate) fn entry(&self, path: &str) -> Option<&Entry> {
        self.entries.get(path)
    }

    /// Whether something other than `none` stands at `path`, the default included.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.entry(path).is_some_and(|e| !e.is_none())
    }

    /// Whether a person wrote something at `path`.
    pub(crate) fn written(&self, path: &str) -> bool {
        self.entry(path).is_some_and(|e| e.origin != Origin::Default)
    }

    fn level(&self, path: &str) -> u8 {
        self.entry(path).map_or(0, |e| e.origin.level())
    }

    /// `name` in messages: `batch.tokens`.
    fn shown<'a>(&self, path: &'a str) -> &'a str {
        path.strip_prefix(self.section).unwrap_or(path)
    }

    /// `batch.tokens = 1000 in run.toml:5`, or without the place for a default.
    pub(crate) fn at(&self, path: &str) -> String {
        let name = self.shown(path);
        match self.entry(path) {
            None => format!("{name} is missing"),
            Some(Entry { value, origin: Origin::Default, .. }) => format!("{name} = {value}"),
            Some(Entry { value, origin, .. }) => format!("{name} = {value} in {origin}"),
        }
    }

    /// Puts the place of the key that a message starts with in front of it.
    pub(crate) fn locate(&self, error: Error) -> Error {
        Origin::locate(error, |key| self.entry(key).map(|e| &e.origin))
    }

    /// Who wrote each key that has a value.
    pub(crate) fn into_origins(self) -> BTreeMap<&'static str, Origin> {
        self.entries.into_iter().map(|(key, entry)| (key, entry.origin)).collect()
    }

    /// Of keys that exclude each other, the one written last stays; two written in one place contradict each other.
    pub(crate) fn exclusive(&mut self, paths: &[&'static str]) -> Result<()> {
        let set: Vec<&str> = paths.iter().copied().filter(|p| self.has(p)).collect();
        let top = set.iter().map(|p| self.level(p)).max().unwrap_or(0);
        let winners: Vec<&str> = set.iter().copied().filter(|p| self.level(p) == top).collect();
        if let [first, second, ..] = winners[..] {
            return Err(Error::user(format!("{} contradicts {}", self.at(second), self.at(first))).hint(
                format!("keep one of {}", paths.iter().map(|p| self.shown(p)).collect::<Vec<_>>().join(", ")),
            ));
        }
        for path in set {
            if self.level(path) < top {
                self.entries.remove(path);
            }
        }
        Ok(())
    }

    /// What was written for `path` starts its section anew: keys under `prefix` from earlier places are dropped.
    pub(crate) fn starts_anew(&mut self, path: &str, prefix: &str) {
        let level = self.level(path);
        if self.has(path) {
            self.entries.retain(|key, entry| !key.starts_with(prefix) || entry.origin.level() >= level);
        }
    }

    /// `path` stands for all keys under `prefix`: those written in the same place or a later one contradict it, those
    /// from earlier places go back to their defaults.
    pub(crate) fn excludes_others(&mut self, path: &str, prefix: &str) -> Result<()> {
        let others: Vec<&'static str> = self.written_under(prefix).filter(|k| *k != path).collect();
        for key in others {
            if self.level(key) >= self.level(path) {
                return Err(Error::user(format!("{} contradicts {}", self.at(key), self.at(path)))
                    .hint(format!("leave out {}, or {}", self.shown(key), self.shown(path))));
            }
            match self.key(key).and_then(default_of) {
                Some(entry) => self.entries.insert(key, entry),
                None => self.entries.remove(key),
            };
        }
        Ok(())
    }

    /// The keys under `prefix` that a person wrote.
    pub(crate) fn written_under(&self, prefix: &str) -> impl Iterator<Item = &'static str> {
        self.entries
            .iter()
            .filter(move |(k, e)| k.starts_with(prefix) && e.origin != Origin::Default)
            .map(|(k, _)| *k)
    }

    /// What was found at `path` and what is expected there.
    pub(crate) fn wrong(&self, path: &str, expected: impl fmt::Display) -> Error {
        Error::user(format!("{}, expected {expected}", self.at(path)))
    }

    fn required(&self, path: &str) -> Result<&Entry> {
        self.entry(path).ok_or_else(|| Error::user(format!("{} is missing", self.shown(path))))
    }

    /// A whole number in the key's range; 0 or `none` is `None` where the key can be off.
    pub(crate) fn count_or_off(&self, path: &str) -> Result<Option<usize>> {
        let Some(entry) = self.entry(path) else { return Ok(None) };
        let (min, max) = match self.key(path).map(|k| &k.kind) {
            Some(KeyKind::Count { min, max }) => (*min, *max),
            Some(KeyKind::CountOrOff { .. }) if entry.is_none() || entry.value == Val::Flag(false) => {
                return Ok(None);
            }
            Some(KeyKind::CountOrOff { max, .. }) => (0, *max),
            _ => (0, usize::MAX >> 1),
        };
        let range = || self.wrong(path, format!("a whole number from {min} to {max}"));
        let count = entry.value.count().ok_or_else(range)?;
        if !(min..=max).contains(&count) {
            return Err(range());
        }
        let off = count == 0 && matches!(self.key(path).map(|k| &k.kind), Some(KeyKind::CountOrOff { .. }));
        Ok((!off).then_some(count))
    }

    pub(crate) fn count(&self, path: &str) -> Result<usize> {
        self.required(path)?;
        Ok(self.count_or_off(path)?.unwrap_or(0))
    }

    /// A finite number that the key accepts; `None` when nothing is written.
    pub(crate) fn number_if_set(&self, path: &str) -> Result<Option<f64>> {
        let Some(entry) = self.entry(path).filter(|e| !e.is_none()) else { return Ok(None) };
        let (expected, ok): (&str, fn(f64) -> bool) = match self.key(path).map(|k| &k.kind) {
            Some(KeyKind::Number { expected, ok }) => (expected, *ok),
            _ => ("", |_| true),
        };
        match entry.value.number() {
            Some(x) if x.is_finite() && ok(x) => Ok(Some(x)),
            _ => Err(self.wrong(path, format!("a number {expected}"))),
        }
    }

    pub(crate) fn number(&self, path: &str) -> Result<f64> {
        self.required(path)?;
        self.number_if_set(path)?.ok_or_else(|| self.wrong(path, "a number"))
    }

    pub(crate) fn flag(&self, path: &str) -> Result<bool> {
        match self.required(path)?.value {
            Val::Flag(flag) => Ok(flag),
            _ => Err(self.wrong(path, "true or false")),
        }
    }

    pub(crate) fn text(&self, path: &str) -> Result<String> {
        self.required(path)?.text().ok_or_else(|| self.wrong(path, "text in quotes"))
    }

    /// Text that must not be empty; `none` and nothing are `None`.
    pub(crate) fn text_or_none(&self, path: &str) -> Result<Option<String>> {
        let Some(entry) = self.entry(path).filter(|e| !e.is_none()) else { return Ok(None) };
        match entry.text() {
            Some(text) if !text.is_empty() => Ok(Some(text)),
            _ => Err(self.wrong(path, "text in quotes, not empty")),
        }
    }

    /// One of the key's choices.
    pub(crate) fn choice(&self, path: &str) -> Result<&'static str> {
        let Some(KeyKind::Choice(choices)) = self.key(path).map(|k| &k.kind) else {
            return Err(Error::failure(format!("{path} has no choices")));
        };
        let text = self.required(path)?.text().unwrap_or_default();
        choices.iter().find(|c| **c == text).copied().ok_or_else(|| {
            let error =
                self.wrong(path, choices.iter().map(|c| format!("\"{c}\"")).collect::<Vec<_>>().join(" or "));
            match suggest::nearest(&text, choices.iter().copied()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error,
            }
        })
    }

    /// A list of whole numbers.
    pub(crate) fn counts(&self, path: &str) -> Result<Vec<usize>> {
        let wrong = || self.wrong(path, "a list of whole numbers like [2, 4]");
        match &self.required(path)?.value {
            Val::List(items) => items.iter().map(|v| v.count().ok_or_else(wrong)).collect(),
            _ => Err(wrong()),
        }
    }

    /// One text or a list of them.
    pub(crate) fn texts(&self, path: &str) -> Result<Vec<String>> {
        let wrong = || self.wrong(path, "a path, or a list of paths, not empty");
        let Some(entry) = self.entry(path).filter(|e| !e.is_none()) else { return Ok(Vec::new()) };
        let texts: Vec<String> = match &entry.value {
            Val::List(items) => items
                .iter()
                .map(|v| if let Val::Text(t) = v { Ok(t.clone()) } else { Err(wrong()) })
                .collect::<Result<_>>()?,
            _ => vec![entry.text().ok_or_else(wrong)?],
        };
        if texts.is_empty() || texts.iter().any(String::is_empty) { Err(wrong()) } else { Ok(texts) }
    }
}

impl Entry {
    /// Written as absent.
    pub(crate) fn is_none(&self) -> bool {
        matches!(&self.value, Val::Text(text) if text == "none")
    }

    fn text(&self) -> Option<String> {
        match (&self.value, &self.raw) {
            (Val::Text(text), _) => Some(text.clone()),
            (Val::Int(_) | Val::Float(_) | Val::Flag(_) | Val::Date(_), Some(raw)) => Some(raw.clone()),
            _ => None,
        }
    }
}

impl Val {
    /// A whole number, also written as `1e6` or `"2M"`.
    fn count(&self) -> Option<usize> {
        match self {
            Val::Int(x) => usize::try_from(*x).ok(),
            // Above 2^53 a float no longer says which whole number is meant.
            Val::Float(x) if x.fract() == 0.0 && (0.0..=9e15).contains(x) => Some(*x as usize),
            Val::Text(text) => whole_tokens(text).and_then(|n| usize::try_from(n).ok()),
            _ => None,
        }
    }

    pub(crate) fn number(&self) -> Option<f64> {
        match self {
            Val::Int(x) => Some(*x as f64),
            Val::Float(x) => Some(*x),
            Val::Text(text) => text.parse().ok(),
            _ => None,
        }
    }
}

/// A key's default as an entry, if it has one.
fn default_of(key: &Key) -> Option<Entry> {
    let value = DeValue::parse(key.default).ok().filter(|_| !key.default.is_empty())?;
    Some(Entry { value: convert(value.get_ref()), raw: None, origin: Origin::Default })
}

fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// The parser's messages may run over several lines.
fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn convert(value: &DeValue<'_>) -> Val {
    match value {
        DeValue::String(text) => Val::Text(text.to_string()),
        DeValue::Integer(x) => match i128::from_str_radix(x.as_str(), x.radix()) {
            Ok(x) => Val::Int(x),
            Err(_) => Val::Huge(x.as_str().len()),
        },
        DeValue::Float(x) => Val::Float(x.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(x) => Val::Flag(*x),
        DeValue::Datetime(x) => Val::Date(x.to_string()),
        DeValue::Array(items) => Val::List(items.iter().map(|v| convert(v.get_ref())).collect()),
        DeValue::Table(table) => {
            Val::Table(table.iter().map(|(k, v)| (k.get_ref().to_string(), convert(v.get_ref()))).collect())
        }
    }
}
