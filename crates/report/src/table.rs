//! Tables whose cells carry their number beside its text.

use crate::text::escape;

/// One cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// As it is read.
    pub text: String,
    /// The number behind it, in base units.
    pub value: Option<f64>,
}

impl Cell {
    /// Words.
    pub(crate) fn words(text: impl Into<String>) -> Self {
        Cell { text: text.into(), value: None }
    }

    /// A number and how it reads.
    pub(crate) fn number(value: f64, shown: impl Fn(f64) -> String) -> Self {
        if value.is_finite() { Cell { text: shown(value), value: Some(value) } } else { Cell::words("never") }
    }
}

/// Heads and rows; the first column names the row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Names of the columns.
    pub heads: Vec<&'static str>,
    /// Rows of as many cells.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    pub(crate) fn new(heads: &[&'static str]) -> Self {
        Table { heads: heads.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// As HTML. Rows bear the mark that their figure's shapes bear, so that both light up together.
    pub(crate) fn html(&self, caption: &str) -> String {
        let mut out = format!("<table><caption>{}</caption><thead><tr>", escape(caption));
        for (i, head) in self.heads.iter().enumerate() {
            // A head stands over its column's numbers.
            let of_numbers = self.rows.first().and_then(|r| r.get(i)).is_some_and(|c| c.value.is_some());
            let class = if of_numbers { " class=\"n\"" } else { "" };
            out += &format!("<th scope=\"col\"{class}>{}</th>", escape(head));
        }
        out += "</tr></thead><tbody>";
        for (i, row) in self.rows.iter().enumerate() {
            out += &format!("<tr data-mark=\"{i}\">");
            for (j, cell) in row.iter().enumerate() {
                let (open, close) = if j == 0 { ("<th scope=\"row\"", "</th>") } else { ("<td", "</td>") };
                let value =
                    cell.value.map(|v| format!(" class=\"n\" data-value=\"{v}\"")).unwrap_or_default();
                out += &format!("{open}{value}>{}{close}", escape(&cell.text));
            }
            out += "</tr>";
        }
        out + "</tbody></table>"
    }
}
