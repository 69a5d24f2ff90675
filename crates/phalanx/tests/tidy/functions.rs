//! Functions fit on a screen.

use super::files;

/// Longest function, from its signature to its closing brace.
const LINES_MAX: usize = 70;

/// Names and lengths of all functions of a formatted source file.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(name) = name(line) else { continue };
        let closing = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
        let signature = lines[start..].iter().position(|l| l.ends_with(['{', ';', '}'])).unwrap_or(0);
        let has_body = lines[start + signature].ends_with('{');
        let end = lines[start..].iter().position(|l| *l == closing).filter(|_| has_body);
        found.push((name, end.unwrap_or(signature) + 1));
    }
    found
}

/// The name of the function that a line begins.
fn name(line: &str) -> Option<&str> {
    let (before, after) = line.split_once("fn ")?;
    let words = ["pub", "const", "async", "unsafe", "extern", "\"C\"", "default"];
    let leads = |w: &str| words.contains(&w) || w.starts_with("pub(");
    let name = after.split(['(', '<']).next()?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    (before.split_whitespace().all(leads) && is_name && after.len() > name.len()).then_some(name)
}

#[test]
fn no_function_grows_beyond_a_screen() {
    let mut long = Vec::new();
    for (path, text) in files("crates", "rs") {
        let found = functions(&text).into_iter().filter(|(_, lines)| *lines > LINES_MAX);
        long.extend(found.map(|(name, lines)| format!("{path} {name}: {lines} lines, at most {LINES_MAX}")));
    }
    assert!(long.is_empty(), "split {}", long.join("\n"));
}

#[test]
fn lengths_are_those_of_whole_functions() {
    let text = "impl A {\n    pub(crate) fn one(&self) -> bool { true }\n    fn two(\n        &self,\n    ) {\n        {\n        }\n    }\n\n    fn three(&self);\n}\n// fn four() {}\n";
    assert_eq!(functions(text), [("one", 1), ("two", 6), ("three", 1)]);
}
