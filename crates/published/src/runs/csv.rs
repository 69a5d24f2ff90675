use std::collections::HashMap;

use spec::{Error, Result};

/// A table read from comma-separated text (RFC 4180), cells found by the names in its first line.
pub(crate) struct Table {
    columns: HashMap<String, usize>,
    pub(crate) rows: Vec<Row>,
}

/// One record and the line on which it begins.
pub(crate) struct Row {
    pub(crate) line: usize,
    cells: Vec<String>,
}

/// Several times all runs that were ever published: each row is kept with up to some hundred layouts.
const ROWS_MAX: usize = 1 << 12;
/// More cells than any table of runs has: a file beyond it is not one.
const CELLS_MAX: usize = 1 << 10;

impl Table {
    /// Reads a table. `path` only names it in errors.
    pub(crate) fn parse(path: &str, text: &str, required: &[&str]) -> Result<Self> {
        let mut records = records(path, text)?;
        if records.is_empty() {
            return Err(
                Error::user(format!("{path}:1: no header line")).hint("the first line names the columns")
            );
        }
        let header = records.remove(0);
        let mut columns = HashMap::new();
        for (at, name) in header.cells.iter().enumerate() {
            let name = name.trim().trim_start_matches('\u{feff}').to_owned();
            if columns.insert(name.clone(), at).is_some() {
                return Err(Error::user(format!("{path}:1: column \"{name}\" is there twice"))
                    .hint("rename one of them, or leave it out"));
            }
        }
        for name in required {
            if !columns.contains_key(*name) {
                let error = Error::user(format!("{path}:1: no column \"{name}\""));
                return Err(error.hint(
                    "columns are those of published_runs.csv: id, source, model name, layers, hidden, ...",
                ));
            }
        }
        for row in &records {
            if row.cells.len() != header.cells.len() {
                return Err(Error::user(format!(
                    "{path}:{}: {} cells, the header has {}",
                    row.line,
                    row.cells.len(),
                    header.cells.len()
                ))
                .hint("a cell with a comma or a quote in it has to be in double quotes"));
            }
        }
        if let Some(at) = columns.get("id") {
            let mut lines: HashMap<&str, usize> = HashMap::new();
            for row in &records {
                let id = row.cells[*at].trim();
                if let Some(first) = lines.insert(id, row.line).filter(|_| !id.is_empty()) {
                    return Err(Error::user(format!(
                        "{path}:{}: id \"{id}\" is that of line {first} too",
                        row.line
                    ))
                    .hint("rows are told apart by their ids: leave the copy out, or rename it"));
                }
            }
        }
        Ok(Table { columns, rows: records })
    }

    /// Names of the columns, in order.
    pub(crate) fn columns(&self) -> Vec<&str> {
        let mut all: Vec<(&usize, &str)> =
            self.columns.iter().map(|(name, at)| (at, name.as_str())).collect();
        all.sort_unstable();
        all.into_iter().map(|c| c.1).collect()
    }

    /// The text of a cell; empty if there is no such column.
    pub(crate) fn text<'a>(&self, row: &'a Row, column: &str) -> &'a str {
        self.columns.get(column).map_or("", |at| row.cells[*at].trim())
    }

    /// A number above zero, or `None` if the cell is empty.
    pub(crate) fn number(&self, path: &str, row: &Row, column: &str) -> Result<Option<f64>> {
        let text = self.text(row, column);
        if text.is_empty() {
            return Ok(None);
        }
        match text.parse::<f64>() {
            Ok(x) if x > 0.0 && x <= NUMBER_MAX => Ok(Some(x)),
            _ => Err(Error::user(format!(
                "{path}:{}: {column} = \"{}\", expected a number above zero and at most {NUMBER_MAX:e}",
                row.line,
                text.chars().take(SHOWN_MAX).collect::<String>()
            ))
            .hint("leave the cell empty if the figure was not published")),
        }
    }

    /// A whole number above zero, or `None` if the cell is empty.
    pub(crate) fn count(&self, path: &str, row: &Row, column: &str) -> Result<Option<usize>> {
        match self.number(path, row, column)? {
            None => Ok(None),
            Some(x) if x.fract() == 0.0 && x < 1e9 => Ok(Some(x as usize)),
            Some(x) => Err(Error::user(format!(
                "{path}:{}: {column} = {x:e}, expected a whole number below 1e9",
                row.line
            ))
            .hint("leave the cell empty if the figure was not published")),
        }
    }
}

/// Larger than any published figure: tokens of a training, FLOP/s, parameters.
const NUMBER_MAX: f64 = 1e18;
/// Characters of a cell that errors show.
const SHOWN_MAX: usize = 40;

fn records(path: &str, text: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut row = Row { line: 1, cells: Vec::new() };
    let (mut cell, mut quoted, mut was_quoted, mut line) = (String::new(), false, false, 1);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        line += usize::from(c == '\n');
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                cell.push('"');
            }
            '"' if quoted => quoted = false,
            '"' if cell.is_empty() && !was_quoted => (quoted, was_quoted) = (true, true),
            _ if quoted => cell.push(c),
            ',' | '\n' => {
                row.cells.push(std::mem::take(&mut cell));
                was_quoted = false;
                if row.cells.len() > CELLS_MAX {
                    return Err(Error::user(format!("{path}:{}: more than {CELLS_MAX} cells", row.line))
                        .hint(
                            "name a table of runs: a line for each, with the columns of published_runs.csv",
                        ));
                }
                if c == '\n' {
                    let done = std::mem::replace(&mut row, Row { line, cells: Vec::new() });
                    push(&mut rows, done);
                    if rows.len() > ROWS_MAX {
                        return Err(Error::user(format!("{path}:{line}: more than {ROWS_MAX} rows"))
                            .hint("split the table"));
                    }
                }
            }
            '\r' => {}
            _ => cell.push(c),
        }
    }
    if quoted {
        return Err(Error::user(format!("{path}:{}: a quote is opened and never closed", row.line))
            .hint("close it; a quote inside a quoted cell is written twice"));
    }
    if !cell.is_empty() || !row.cells.is_empty() {
        row.cells.push(cell);
        push(&mut rows, row);
    }
    Ok(rows)
}

/// Blank lines are no rows.
fn push(rows: &mut Vec<Row>, row: Row) {
    if row.cells.iter().any(|c| !c.trim().is_empty()) {
        rows.push(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_commas_and_line_breaks_stay_in_their_cell() {
        let table = Table::parse("t.csv", "a,b\r\n1,\"x, \"\"y\"\"\nz\"\n\n2,\n", &["a"]).unwrap();
        assert_eq!(table.rows.len(), 2);
        assert_eq!(table.text(&table.rows[0], "b"), "x, \"y\"\nz");
        assert_eq!(table.rows[1].line, 5);
        assert_eq!(table.count("t.csv", &table.rows[1], "a").unwrap(), Some(2));
        assert_eq!(table.count("t.csv", &table.rows[1], "b").unwrap(), None);
        assert_eq!(table.text(&table.rows[1], "nothing"), "");
    }

    #[test]
    fn nonsense_says_file_and_line() {
        let check = |text: &str, part: &str| {
            let read = Table::parse("t.csv", text, &["a"])
                .and_then(|t| t.rows.iter().map(|r| t.count("t.csv", r, "a")).collect::<Result<Vec<_>>>());
            let error = read.expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        };
        check("", "no header");
        check("b\n1\n", "t.csv:1: no column \"a\"");
        check("a,a\n1,2\n", "twice");
        check("a,id\n1,x\n2,y\n3,x\n", "t.csv:4: id \"x\" is that of line 2 too");
        check("a,b\n1\n", "t.csv:2: 1 cells, the header has 2");
        check("a\nx\n", "t.csv:2: a = \"x\"");
        check("a\n1\n-1\n", "t.csv:3");
        check("a\nnan\n", "above zero");
        check("a\n1.5\n", "whole number");
        check("a\n1e300\n", "at most 1e18");
        check("a\n\"1\n", "never closed");
        check(&"a\n".repeat(5000), "t.csv:4098: more than 4096 rows");
    }
}
