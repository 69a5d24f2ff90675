//! What a page rests on: assumptions, and numbers of the catalogue with their sources.

use spec::{Catalog, EntryKind};

use crate::text::escape;

/// Sentences, one below the other.
pub(crate) fn list(sentences: &[String]) -> String {
    let items: String = sentences.iter().map(|a| format!("<li>{}</li>", escape(a))).collect();
    format!("<ul>{items}</ul>")
}

/// The numbers of some entries, each with its source and date; names that the catalogue does not have are left out.
pub(crate) fn facts_table(catalog: &Catalog, entries: &[(EntryKind, &str)]) -> String {
    let mut out = String::from(
        "<figure id=\"sources\"><h3>Facts and their sources</h3><div class=\"rows\" tabindex=\"0\" role=\"region\" aria-label=\"Facts and their sources\"><table><caption>Facts and their sources</caption><thead><tr><th scope=\"col\">fact</th><th scope=\"col\">value</th><th scope=\"col\">source</th><th scope=\"col\">date</th></tr></thead><tbody>",
    );
    for (kind, name) in entries {
        let Ok(entry) = catalog.get(*kind, name) else { continue };
        for (key, field) in &entry.fields {
            let spec::catalog::Field::Number(n) = field else { continue };
            let what = catalog.source(&n.source).map_or(n.source.as_str(), |s| s.what.as_str());
            let value = n.to_string();
            let value = value.split(" [").next().unwrap_or(&value);
            out += &format!(
                "<tr><th scope=\"row\">{} {}</th><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&entry.name),
                escape(key),
                escape(value),
                escape(what),
                escape(&n.date)
            );
        }
    }
    out + "</tbody></table></div></figure>"
}
