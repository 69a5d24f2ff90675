use inference::format::{Cache, Weights};
use inference::models;
use inference::serve::Traffic;
use inference::stack::Stack;
use plan::shape::Shape;
use serde::Serialize;
use spec::catalog::EntryKind;
use spec::{Catalog, Cluster, Error, Result};

use crate::runs::Skipped;
use crate::runs::csv::{Row as Record, Table};

/// A published serving figure that gives enough to be estimated.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name in the table.
    pub id: String,
    /// Line of the file.
    pub line: usize,
    /// The model.
    pub shape: Shape,
    /// The machine, one replica of it.
    pub cluster: Cluster,
    /// Tensor-parallel accelerators.
    pub tp: usize,
    /// Format of weights.
    pub weights: Weights,
    /// Format of the cache, where the row says.
    pub cache: Option<Cache>,
    /// The serving stack.
    pub stack: Stack,
    /// Tokens of a request.
    pub traffic: Traffic,
    /// Clients.
    pub concurrency: usize,
    /// What was measured.
    pub figures: Vec<(Figure, f64)>,
    /// What the row is for in our own tables.
    pub used: Use,
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// Start to end of a request, in seconds.
    LatencyS,
    /// Time to the first token, in milliseconds.
    TtftMs,
    /// Time between tokens, in milliseconds.
    ItlMs,
    /// Tokens generated per second, all requests together.
    TokensPerS,
}

impl Figure {
    /// All of them.
    pub const ALL: [Figure; 4] = [Figure::LatencyS, Figure::TtftMs, Figure::ItlMs, Figure::TokensPerS];

    /// The column's name.
    pub fn column(self) -> &'static str {
        match self {
            Figure::LatencyS => "latency_s",
            Figure::TtftMs => "ttft_ms",
            Figure::ItlMs => "itl_ms",
            Figure::TokensPerS => "tokens_per_s",
        }
    }
}

/// Whether constants may be fitted on a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// They were.
    Fit,
    /// They were not.
    Check,
}

/// A table of serving figures.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Rows to estimate.
    pub rows: Vec<Row>,
    /// Rows that do not give enough, or name what is not known.
    pub not_priced: Vec<Skipped>,
}

/// Columns without which a table is none of serving figures.
const REQUIRED: &[&str] =
    &["id", "model", "accelerator", "tp", "concurrency", "input_tokens", "output_tokens"];

/// Whether the first line names the columns of serving figures.
pub fn is_table(text: &str) -> bool {
    let header = text.lines().next().unwrap_or_default();
    let has = |column: &str| header.split(',').any(|c| c.trim().trim_matches(['"', '\u{feff}']) == column);
    has("input_tokens") && has("output_tokens")
}

impl Rows {
    /// Reads a table with the columns of `published_inference.csv`, and `stack`, `cache` and `use` where it has them.
    /// `path` only names it in errors.
    ///
    /// # Errors
    /// If the text is no such table, or a cell holds no sensible number.
    pub fn parse(path: &str, text: &str, catalog: &Catalog) -> Result<Self> {
        let table = Table::parse(path, text, REQUIRED)?;
        let mut out = Rows { rows: Vec::new(), not_priced: Vec::new() };
        for record in &table.rows {
            let id = table.text(record, "id").to_owned();
            if id.is_empty() {
                return Err(Error::user(format!("{path}:{}: the row has no id", record.line))
                    .hint("give each row a name of its own in the column id"));
            }
            match row(path, &table, record, catalog)? {
                Ok(row) => out.rows.push(row),
                Err(reason) => out.not_priced.push(Skipped { id, line: record.line, reason }),
            }
        }
        Ok(out)
    }
}

/// `Err(reason)` inside `Ok`: the row is sound but cannot be estimated.
type Usable<T> = std::result::Result<T, String>;

fn row(path: &str, table: &Table, record: &Record, catalog: &Catalog) -> Result<Usable<Row>> {
    let text = |column: &str| table.text(record, column);
    let mut counts = [0; 4];
    for (slot, column) in counts.iter_mut().zip(["tp", "concurrency", "input_tokens", "output_tokens"]) {
        match table.count(path, record, column)? {
            Some(n) => *slot = n,
            None => return Ok(Err(format!("{column} not published"))),
        }
    }
    let [tp, concurrency, input, output] = counts;
    let mut figures = Vec::new();
    for figure in Figure::ALL {
        if let Some(x) = table.number(path, record, figure.column())? {
            figures.push((figure, x));
        }
    }
    if figures.is_empty() {
        return Ok(Err("no latency and no rate published".to_owned()));
    }
    Ok((|| {
        let said = |e: Error| e.to_string();
        let precision = text("precision");
        let weights =
            if precision.is_empty() { Weights::Bf16 } else { Weights::parse(precision).map_err(said)? };
        let cache = text("cache");
        let stack = match text("stack") {
            "" => Stack::of_source(&format!("{} {}", text("source"), text("id"))),
            name => Stack::named(name),
        };
        Ok(Row {
            id: text("id").to_owned(),
            line: record.line,
            shape: models::find(text("model")).map_err(said)?,
            cluster: cluster(catalog, text("accelerator"), tp)?,
            tp,
            weights,
            cache: if cache.is_empty() { None } else { Some(Cache::parse(cache).map_err(said)?) },
            stack: stack.map_err(said)?,
            traffic: Traffic { input, output },
            concurrency,
            figures,
            used: if text("use") == "fit" { Use::Fit } else { Use::Check },
        })
    })())
}

/// `n` accelerators of that name, or of the cluster of that name: in the first node that has them.
fn cluster(catalog: &Catalog, name: &str, n: usize) -> Usable<Cluster> {
    let Ok(chip) = catalog.get(EntryKind::Accelerator, name) else {
        return catalog.cluster(name, Some(n)).map_err(|_| format!("\"{name}\" is not in the catalogue"));
    };
    // A maker's own nodes before clouds'.
    let rank = |node: &str| (!node.starts_with("dgx-"), node.to_owned());
    let mut nodes: Vec<String> = catalog.list(Some(EntryKind::Node)).into_iter().map(|l| l.name).collect();
    nodes.sort_by_key(|node| rank(node));
    let of_chip = |node: &&String| {
        catalog.get(EntryKind::Node, node).is_ok_and(|e| e.text("accelerator") == Some(chip.name.as_str()))
    };
    match nodes.iter().find(of_chip) {
        Some(node) => catalog.cluster(node, Some(n)).map_err(|e| e.to_string()),
        None => Err(format!("no node of the catalogue has {}", chip.name)),
    }
}
