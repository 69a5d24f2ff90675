//! JSON as a tree, of bounded size: one number of a text takes many times its bytes in memory.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// What a value takes in a list that grows by doubling, and a key of an object at least.
const VALUE_BYTES: usize = 64;
/// What an object takes from its first key on.
const OBJECT_BYTES: usize = 640;
/// Trees that are always allowed.
const FREE_BYTES: usize = 256 << 10;
/// Bytes of tree for each byte of text: configurations take about five.
const BYTES_PER_BYTE: usize = 12;

/// Parses a JSON text, with or without a byte order mark.
///
/// # Errors
/// What is no JSON, and what would take many times the text's size in memory.
pub fn parse_json(text: &str) -> Result<Value> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let budget = Cell::new(FREE_BYTES + BYTES_PER_BYTE * text.len());
    let mut json = serde_json::Deserializer::from_str(text);
    let value = Node(&budget).deserialize(&mut json).and_then(|v| json.end().map(|()| v));
    value.map_err(|e| Error::user(format!("not valid JSON: {e}")))
}

/// A small JSON value inside of a larger file, for `deserialize_with`.
///
/// # Errors
/// What would take more than a quarter of a megabyte.
pub fn small_json<'de, D: Deserializer<'de>>(from: D) -> Result<Value, D::Error> {
    Node(&Cell::new(FREE_BYTES)).deserialize(from)
}

/// Builds a value and takes its size off the budget.
#[derive(Clone, Copy)]
struct Node<'a>(&'a Cell<usize>);

impl Node<'_> {
    fn pay<E: serde::de::Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.0.get().checked_sub(bytes);
        self.0.set(left.ok_or_else(|| E::custom("too many values for a text of this size"))?);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        self.pay(VALUE_BYTES)?;
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, x: bool) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_i64<E>(self, x: i64) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_u64<E>(self, x: u64) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_f64<E>(self, x: f64) -> Result<Value, E> {
        Ok(x.into())
    }

    fn visit_str<E: serde::de::Error>(self, x: &str) -> Result<Value, E> {
        self.pay(x.len())?;
        Ok(x.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        self.pay(OBJECT_BYTES)?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            self.pay(VALUE_BYTES + key.len())?;
            map.insert(key, entries.next_value_seed(self)?);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        let text =
            r#"{"a": [1, -2, 3.5, 1e-5, true, null, "x\n"], "b": {"c": {}}, "d": 18446744073709551615}"#;
        let expected: Value = serde_json::from_str(text).expect("JSON");
        assert_eq!(parse_json(text).expect("JSON"), expected);
        assert_eq!(parse_json(&format!("\u{feff}{text}")).expect("JSON"), expected);
        assert_eq!(small_json(&mut serde_json::Deserializer::from_str(text)).expect("JSON"), expected);
        for bad in ["", "{", "[1]]", "nul", "1 2"] {
            assert!(parse_json(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_text_of_nothing_but_values_is_refused() {
        let many = |of: &str, n: usize| format!("[{}{of}]", format!("{of},").repeat(n));
        assert!(parse_json(&many("1", 4000)).is_ok());
        for of in ["1", "[]", "{\"\":1}"] {
            let refused = parse_json(&many(of, 200_000)).expect_err("too many");
            assert!(refused.to_string().contains("too many values"), "{refused}");
        }
        // A table of labels, as image models carry one.
        let labels: Vec<String> =
            (0..20_000).map(|i| format!("\"{i}\": \"label {i}, or another\"")).collect();
        assert!(parse_json(&format!("{{{}}}", labels.join(", "))).is_ok());
    }

    #[test]
    fn a_key_costs_its_own_bytes_and_a_place() {
        let paid = |key: &str| {
            let budget = Cell::new(FREE_BYTES);
            let text = format!("{{\"{key}\": null}}");
            Node(&budget).deserialize(&mut serde_json::Deserializer::from_str(&text)).expect("fits");
            FREE_BYTES - budget.get()
        };
        // The object's place and its own, the key's, its value's.
        assert_eq!(paid(""), OBJECT_BYTES + 3 * VALUE_BYTES);
        assert_eq!(paid(&"k".repeat(1000)), paid("") + 1000);
    }
}
