use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::quantity::{Dimension, Direction, Measure, Quantity, Sparsity};
use super::schema::{EntryKind, Want, keys};
use super::{Entry, Field, Source, nearest};
use crate::{Error, Result, guard_toml};

/// What one file holds.
pub(crate) struct Parsed {
    pub(crate) sources: Vec<(String, Source)>,
    pub(crate) entries: Vec<Entry>,
}

/// Reads a catalogue file. `path` only names it in errors.
pub(crate) fn file(path: &str, text: &str) -> Result<Parsed> {
    let at = At::new(path, text);
    let refuse = |byte, why: &str| {
        at.error(byte, format!("not TOML: {}", why.split_whitespace().collect::<Vec<_>>().join(" ")))
            .hint("a catalogue file has tables such as [node.NAME] of lines KEY = VALUE")
    };
    guard_toml(text).map_err(|e| refuse(e.byte, &e.why))?;
    let root = DeTable::parse(text).map_err(|e| refuse(e.span().map_or(0, |s| s.start), e.message()))?;
    let mut parsed = Parsed { sources: Vec::new(), entries: Vec::new() };
    for (key, table) in root.get_ref() {
        let name = key.get_ref().as_ref();
        let named = at.table(name, table)?;
        if name == "source" {
            for (key, value) in named {
                parsed.sources.push((key.get_ref().to_string(), source(&at, key.get_ref(), value)?));
            }
            continue;
        }
        let Some(kind) = EntryKind::parse(name) else {
            let known: Vec<&str> = EntryKind::ALL.iter().map(|k| k.name()).chain(["source"]).collect();
            return Err(at
                .error(key.span().start, format!("unknown table [{name}]"))
                .hint(format!("tables are {}", known.join(", "))));
        };
        for (key, value) in named {
            parsed.entries.push(entry(&at, kind, key, value)?);
        }
    }
    Ok(parsed)
}

/// The text that errors point into.
struct At<'a> {
    path: &'a str,
    /// Where lines end.
    ends: Vec<usize>,
}

impl<'a> At<'a> {
    fn new(path: &'a str, text: &str) -> Self {
        At { path, ends: text.match_indices('\n').map(|(at, _)| at).collect() }
    }

    fn line(&self, byte: usize) -> usize {
        self.ends.partition_point(|end| *end < byte) + 1
    }

    fn error(&self, byte: usize, what: impl std::fmt::Display) -> Error {
        Error::user(format!("{}:{}: {what}", self.path, self.line(byte)))
    }

    fn table<'t, 'i>(&self, key: &str, value: &'t Spanned<DeValue<'i>>) -> Result<&'t DeTable<'i>> {
        value.get_ref().as_table().ok_or_else(|| self.wrong(key, value, "a table"))
    }

    fn string(&self, key: &str, value: &Spanned<DeValue<'_>>) -> Result<String> {
        let text = match value.get_ref() {
            DeValue::Datetime(date) => date.to_string(),
            v => v.as_str().ok_or_else(|| self.wrong(key, value, "a string"))?.to_owned(),
        };
        if text.trim().is_empty() {
            let hint = format!("give {key} a text, or leave it out");
            return Err(self.error(value.span().start, format!("{key} is empty")).hint(hint));
        }
        Ok(text)
    }

    fn wrong(&self, key: &str, value: &Spanned<DeValue<'_>>, expected: &str) -> Error {
        let found = value.get_ref().type_str();
        self.error(value.span().start, format!("{key} is of type {found}, expected {expected}"))
            .hint(format!("write {key} as {expected}"))
    }
}

fn source(at: &At<'_>, name: &str, value: &Spanned<DeValue<'_>>) -> Result<Source> {
    let table = at.table(name, value)?;
    let (mut what, mut date, mut grade) = (None, None, None);
    for (key, v) in table {
        let slot = match key.get_ref().as_ref() {
            "what" => &mut what,
            "date" => &mut date,
            "grade" => &mut grade,
            other => {
                let place = key.span().start;
                return Err(at
                    .error(place, format!("unknown key source.{name}.{other}"))
                    .hint("a source has what, date and grade"));
            }
        };
        *slot = Some(at.string(key.get_ref(), v)?);
    }
    let missing = |key: &str| {
        at.error(value.span().start, format!("source.{name} has no {key}"))
            .hint("a source has what, date and grade")
    };
    let date = date.ok_or_else(|| missing("date"))?;
    check_date(&date).map_err(|e| at.error(value.span().start, format!("source.{name}: {e}")).hint(DATES))?;
    Ok(Source {
        what: what.ok_or_else(|| missing("what"))?,
        date,
        grade: grade.ok_or_else(|| missing("grade"))?,
    })
}

fn entry(
    at: &At<'_>,
    kind: EntryKind,
    key: &Spanned<std::borrow::Cow<'_, str>>,
    value: &Spanned<DeValue<'_>>,
) -> Result<Entry> {
    let name = key.get_ref().to_string();
    let path = format!("{kind}.{name}");
    let mut entry = Entry {
        kind,
        name,
        place: format!("{}:{}", at.path, at.line(key.span().start)),
        base: None,
        fields: BTreeMap::new(),
    };
    for (key, value) in at.table(&path, value)? {
        let name = key.get_ref().as_ref();
        let path = format!("{path}.{name}");
        if name == "base" {
            entry.base = Some(at.string(&path, value)?);
            continue;
        }
        let Some((_, want, _)) = keys(kind).find(|k| k.0 == name) else {
            let known = keys(kind).map(|k| k.0);
            let error = at.error(key.span().start, format!("unknown key {path}"));
            return Err(match nearest(name, known.clone()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("keys are {}", known.collect::<Vec<_>>().join(", "))),
            });
        };
        if let Want::Numbers(dimension, names) = *want {
            for (key, value) in at.table(&path, value)? {
                let name = key.get_ref().as_ref();
                if !names.is_empty() && !names.contains(&name) {
                    return Err(at
                        .error(key.span().start, format!("unknown key {path}.{name}"))
                        .hint(format!("names are {}", names.join(", "))));
                }
                let number = number(at, &format!("{path}.{name}"), value, dimension)?;
                let leaf = path.rsplit('.').next().unwrap_or(&path);
                entry.fields.insert(format!("{leaf}.{name}"), Field::Number(number));
            }
            continue;
        }
        entry.fields.insert(name.to_owned(), field(at, &path, value, *want)?);
    }
    Ok(entry)
}

fn field(at: &At<'_>, path: &str, value: &Spanned<DeValue<'_>>, want: Want) -> Result<Field> {
    Ok(match want {
        Want::Text => Field::Text(at.string(path, value)?),
        Want::Ref(_) => Field::Ref(at.string(path, value)?),
        Want::Word(words) => {
            let text = at.string(path, value)?;
            if !words.contains(&text.as_str()) {
                let error = at.error(value.span().start, format!("{path} = \"{text}\""));
                return Err(error.hint(format!("one of {}", words.join(", "))));
            }
            Field::Text(text)
        }
        Want::Flag => {
            Field::Flag(value.get_ref().as_bool().ok_or_else(|| at.wrong(path, value, "true or false"))?)
        }
        Want::List => {
            let array = value.get_ref().as_array().ok_or_else(|| at.wrong(path, value, "an array"))?;
            Field::List(array.iter().map(|v| at.string(path, v)).collect::<Result<_>>()?)
        }
        Want::Number(dimension) | Want::Numbers(dimension, _) => {
            Field::Number(number(at, path, value, dimension)?)
        }
    })
}

fn number(at: &At<'_>, path: &str, value: &Spanned<DeValue<'_>>, dimension: Dimension) -> Result<Quantity> {
    let place = value.span().start;
    let fail = |what: String| at.error(place, what);
    let (numbers, mut words) = written(at, path, value)?;
    let need =
        |key: &str| words.get(key).cloned().ok_or_else(|| fail(format!("{path} has no {key}")).hint(EXAMPLE));
    let (unit, source, date) = (need("unit")?, need("source")?, need("date")?);
    check_date(&date).map_err(|e| fail(format!("{path}: {e}")).hint(DATES))?;
    let factor = dimension.factor(&unit).ok_or_else(|| {
        fail(format!("{path} is {dimension}, and `{unit}` is no unit of it"))
            .hint(format!("units are {}", dimension.units().join(", ")))
    })?;
    let direction = DIRECTION.read(fail, path, dimension, words.get(DIRECTION.key))?;
    let sparsity = SPARSITY.read(fail, path, dimension, words.get(SPARSITY.key))?;
    let written = *numbers.get("value").ok_or_else(|| fail(format!("{path} has no value")).hint(EXAMPLE))?;
    let low = numbers.get("low").copied().unwrap_or(written);
    let high = numbers.get("high").copied().unwrap_or(written);
    for x in [written, low, high] {
        if !x.is_finite() || x <= 0.0 {
            return Err(fail(format!("{path} = {x} {unit}, expected a finite number above zero"))
                .hint("leave a number out that is not known; zero and infinity are never measured"));
        }
    }
    if low > written || written > high {
        return Err(fail(format!("{path} = {written} {unit} lies outside its range {low} to {high}"))
            .hint("low <= value <= high"));
    }
    if dimension == Dimension::Count && written.fract() != 0.0 {
        return Err(fail(format!("{path} = {written} {unit}, expected a whole number"))
            .hint("counts are whole; use a unit that makes it so"));
    }
    let half = direction == Some(Direction::BothWays) || sparsity == Some(Sparsity::Sparse2To4);
    let factor = if half { factor / 2.0 } else { factor };
    Ok(Quantity {
        measure: Measure { value: written, low, high }.scaled(factor),
        dimension,
        written,
        unit,
        direction,
        sparsity,
        source,
        date,
        note: words.remove("note"),
    })
}

const EXAMPLE: &str =
    "a number is written { value = 80, unit = \"GB\", source = \"...\", date = \"2026-11\" }";

/// The numbers and the words of a number's table, by key.
type Written<'a> = (BTreeMap<&'a str, f64>, BTreeMap<&'a str, String>);

fn written<'a>(at: &At<'_>, path: &str, value: &'a Spanned<DeValue<'_>>) -> Result<Written<'a>> {
    let fail = |what: String| at.error(value.span().start, what).hint(EXAMPLE);
    let Some(table) = value.get_ref().as_table() else {
        return Err(fail(format!("{path} has no unit, source and date")));
    };
    let (mut numbers, mut words) = (BTreeMap::new(), BTreeMap::new());
    for (key, v) in table {
        let key = key.get_ref().as_ref();
        let name = format!("{path}.{key}");
        match key {
            "value" | "low" | "high" => {
                numbers.insert(key, float(v).ok_or_else(|| at.wrong(&name, v, "a number"))?);
            }
            "unit" | "source" | "date" | "direction" | "sparsity" | "note" => {
                words.insert(key, at.string(&name, v)?);
            }
            _ => return Err(fail(format!("unknown key {name}"))),
        }
    }
    Ok((numbers, words))
}

/// One of two words that a number says if it is of one dimension, and only then.
struct Either<T> {
    key: &'static str,
    of: Dimension,
    /// What numbers of that dimension are called.
    rates: &'static str,
    words: [(&'static str, T); 2],
}

const DIRECTION: Either<Direction> = Either {
    key: "direction",
    of: Dimension::LinkRate,
    rates: "link rates",
    words: [("one-way", Direction::OneWay), ("both-ways", Direction::BothWays)],
};

const SPARSITY: Either<Sparsity> = Either {
    key: "sparsity",
    of: Dimension::FlopRate,
    rates: "arithmetic rates",
    words: [("dense", Sparsity::Dense), ("sparse", Sparsity::Sparse2To4)],
};

impl<T: Copy> Either<T> {
    fn read(
        &self,
        fail: impl Fn(String) -> Error,
        path: &str,
        dimension: Dimension,
        found: Option<&String>,
    ) -> Result<Option<T>> {
        let (key, say) = (self.key, format!("say {}", self.words.map(|(word, _)| word).join(" or ")));
        match found {
            None if dimension != self.of => Ok(None),
            Some(_) if dimension != self.of => Err(fail(format!("{path} has a {key} but is {dimension}"))
                .hint(format!("remove {key}: only {} have one", self.rates))),
            None => Err(fail(format!("{path} has no {key}")).hint(format!("{say}: vendors print both"))),
            Some(found) => match self.words.iter().find(|(word, _)| word == found) {
                Some((_, said)) => Ok(Some(*said)),
                None => Err(fail(format!("{path}.{key} = \"{found}\"")).hint(say)),
            },
        }
    }
}

fn float(value: &Spanned<DeValue<'_>>) -> Option<f64> {
    let plain = |s: &str| s.replace('_', "").parse().ok();
    match value.get_ref() {
        DeValue::Integer(i) if i.radix() == 10 => plain(i.as_str()),
        DeValue::Float(x) => plain(x.as_str()),
        _ => None,
    }
}

const DATES: &str = "the date of publication, or of reading where none is printed";

/// `YYYY`, `YYYY-MM` or `YYYY-MM-DD`.
fn check_date(date: &str) -> std::result::Result<(), String> {
    let bad = || format!("date \"{date}\", expected YYYY, YYYY-MM or YYYY-MM-DD");
    let parts: Vec<&str> = date.split('-').collect();
    let widths = [4, 2, 2];
    let bounds = [1950..=2100, 1..=12, 1..=31];
    if parts.len() > 3 {
        return Err(bad());
    }
    for ((part, width), bound) in parts.iter().zip(widths).zip(bounds) {
        let digits = part.len() == width && part.bytes().all(|b| b.is_ascii_digit());
        if !digits || !part.parse::<u32>().is_ok_and(|n| bound.contains(&n)) {
            return Err(bad());
        }
    }
    Ok(())
}
