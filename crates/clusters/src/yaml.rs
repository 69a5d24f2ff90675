//! A tree of values in the order in which people expect keys, and the YAML that it becomes.

use std::fmt::Write as _;

/// A value of a manifest.
#[derive(Clone, Debug, PartialEq)]
pub enum Yaml {
    /// Keys and values, in order.
    Map(Vec<(String, Yaml)>),
    /// Values in order.
    List(Vec<Yaml>),
    /// A text, never read as anything else.
    Text(String),
    /// A whole number.
    Int(i64),
    /// A truth value.
    Bool(bool),
}

/// A map from pairs of key and value.
macro_rules! map {
    ($($key:expr => $value:expr),* $(,)?) => {
        $crate::yaml::Yaml::Map(vec![$(($key.to_string(), $crate::yaml::Yaml::from($value))),*])
    };
}
pub(crate) use map;

impl From<&str> for Yaml {
    fn from(text: &str) -> Yaml {
        Yaml::Text(text.to_owned())
    }
}

impl From<String> for Yaml {
    fn from(text: String) -> Yaml {
        Yaml::Text(text)
    }
}

impl From<bool> for Yaml {
    fn from(value: bool) -> Yaml {
        Yaml::Bool(value)
    }
}

impl From<u64> for Yaml {
    fn from(value: u64) -> Yaml {
        Yaml::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<usize> for Yaml {
    fn from(value: usize) -> Yaml {
        Yaml::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl<T: Into<Yaml>> From<Vec<T>> for Yaml {
    fn from(values: Vec<T>) -> Yaml {
        Yaml::List(values.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Yaml>, const N: usize> From<[T; N]> for Yaml {
    fn from(values: [T; N]) -> Yaml {
        Yaml::List(values.into_iter().map(Into::into).collect())
    }
}

impl Yaml {
    /// The same map with one more key, if there is a value for it.
    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: Option<impl Into<Yaml>>) -> Yaml {
        if let (Yaml::Map(entries), Some(value)) = (&mut self, value) {
            entries.push((key.to_owned(), value.into()));
        }
        self
    }

    /// The value at a path of keys and positions, `spec.containers.0.image`.
    pub fn at(&self, path: &str) -> Option<&Yaml> {
        path.split('.').try_fold(self, |here, key| match here {
            Yaml::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            Yaml::List(values) => key.parse::<usize>().ok().and_then(|i| values.get(i)),
            _ => None,
        })
    }

    /// The tree as one document of YAML, in block style.
    pub fn document(&self) -> String {
        let mut out = String::new();
        self.block(0, &mut out);
        out
    }

    /// This value on lines of its own, each indented by `indent` blanks.
    fn block(&self, indent: usize, out: &mut String) {
        match self {
            Yaml::Map(entries) => {
                for (key, value) in entries {
                    let _ = write!(out, "{:indent$}{}:", "", scalar(key));
                    value.after_key(indent, out);
                }
            }
            Yaml::List(values) => {
                for value in values {
                    let mut inner = String::new();
                    value.block(indent + 2, &mut inner);
                    let _ = write!(out, "{:indent$}- {}", "", inner.trim_start_matches(' '));
                }
            }
            _ => {
                let _ = writeln!(out, "{:indent$}{}", "", self.inline());
            }
        }
    }

    fn after_key(&self, indent: usize, out: &mut String) {
        match self {
            Yaml::Map(entries) if !entries.is_empty() => {
                out.push('\n');
                self.block(indent + 2, out);
            }
            Yaml::List(values) if !values.is_empty() => {
                out.push('\n');
                self.block(indent, out);
            }
            Yaml::Text(text) if is_literal(text) => {
                out.push_str(" |\n");
                for line in text.lines() {
                    let inside = if line.is_empty() { 0 } else { indent + 2 };
                    let _ = writeln!(out, "{:inside$}{line}", "");
                }
            }
            _ => {
                let _ = writeln!(out, " {}", self.inline());
            }
        }
    }

    fn inline(&self) -> String {
        match self {
            Yaml::Map(_) => "{}".to_owned(),
            Yaml::List(_) => "[]".to_owned(),
            Yaml::Text(text) => scalar(text),
            Yaml::Int(n) => n.to_string(),
            Yaml::Bool(b) => b.to_string(),
        }
    }
}

/// Whether a text may stand as a literal block, which keeps exactly one line end and takes its indent from the first line.
fn is_literal(text: &str) -> bool {
    let is_plain = |c: char| {
        c == '\n'
            || (!c.is_control() && c != '\u{feff}' && c != '\u{2028}' && c != '\u{2029}' && c != '\u{85}')
    };
    text.contains('\n')
        && text.ends_with('\n')
        && !text.ends_with("\n\n")
        && !text.starts_with([' ', '\n'])
        && text.chars().all(is_plain)
}

/// A text on one line: as it is where nothing else could be read into it, else in JSON's quotes, which are YAML's too.
fn scalar(text: &str) -> String {
    let is_inside = |c: char| c.is_ascii_alphanumeric() || "-_./=@$()+".contains(c);
    // A leading letter or slash rules out numbers; these words are truth values and nothing in YAML 1.1.
    let words = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(is_inside)
        && !words.contains(&text.to_ascii_lowercase().as_str());
    if is_plain {
        return text.to_owned();
    }
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_as_people_write_them() {
        let tree = map! {
            "apiVersion" => "v1",
            "spec" => map! {
                "clusterIP" => "None",
                "ports" => [map! { "port" => 29500_usize, "name" => "store" }, map! { "port" => 1_usize }],
                "selector" => map! { "batch.kubernetes.io/job-name" => "x" },
                "empty" => map! {},
                "args" => ["-c", "on", "a b", "8", "/x"],
                "ok" => true,
            },
            "data" => map! { "run.toml" => "a = 1\n\n[b]\n  c = 2\n", "odd" => " a\nb" },
        };
        let expected = "apiVersion: v1\nspec:\n  clusterIP: None\n  ports:\n  - port: 29500\n    name: store\n  - port: 1\n  \
                        selector:\n    batch.kubernetes.io/job-name: x\n  empty: {}\n  args:\n  - \"-c\"\n  - \"on\"\n  - \"a b\"\n  \
                        - \"8\"\n  - /x\n  ok: true\ndata:\n  run.toml: |\n    a = 1\n\n    [b]\n      c = 2\n  odd: \" a\\nb\"\n";
        assert_eq!(tree.document(), expected);
        assert_eq!(tree.at("spec.ports.0.port"), Some(&Yaml::Int(29500)));
        assert_eq!(tree.at("spec.ports.2.port"), None);
    }
}
