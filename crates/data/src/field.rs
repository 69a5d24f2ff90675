//! One field out of a JSON value; the rest is read over, so that it takes no memory.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// What a value is.
pub(crate) enum Found {
    /// An object whose field is this text.
    Field(String),
    /// An object whose field is something else.
    OtherField(&'static str),
    /// An object without the field, and the names of its first fields.
    NoField(Vec<String>),
    /// A string.
    Text(String),
    /// Something else.
    Other(&'static str),
}

/// Names of fields kept for the message, and characters of each.
const NAMES_MAX: usize = 8;
const NAME_CHARS_MAX: usize = 64;

/// Reads a value; of several fields of one name the last counts.
pub(crate) fn parse(json: &[u8], field: &str) -> Result<Found, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let found = Seed(Some(field)).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(found)
}

/// Looks for a field in objects; without one, an object is just something else.
#[derive(Clone, Copy)]
struct Seed<'a>(Option<&'a str>);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Found, E> {
        Ok(Found::Other("null"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Found, E> {
        Ok(Found::Other("a boolean"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Found, E> {
        Ok(Found::Other("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Found, E> {
        Ok(Found::Other("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Found, E> {
        Ok(Found::Other("a number"))
    }

    fn visit_str<E>(self, text: &str) -> Result<Found, E> {
        Ok(Found::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Found, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Found::Other("an array"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Found, A::Error> {
        let (mut found, mut names) = (None, Vec::new());
        while let Some(name) = fields.next_key::<String>()? {
            if Some(name.as_str()) == self.0 {
                found = Some(match fields.next_value_seed(Seed(None))? {
                    Found::Text(text) => Found::Field(text),
                    Found::Other(kind) => Found::OtherField(kind),
                    other => other,
                });
                continue;
            }
            fields.next_value::<IgnoredAny>()?;
            if names.len() < NAMES_MAX {
                names.push(name.chars().take(NAME_CHARS_MAX).collect());
            }
        }
        Ok(match self.0 {
            None => Found::Other("an object"),
            Some(_) => found.unwrap_or(Found::NoField(names)),
        })
    }
}
