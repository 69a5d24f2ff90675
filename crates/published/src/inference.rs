//! Published serving figures: latency, time to first token, time between tokens and tokens per second, estimated and
//! compared.

pub mod fit;
mod rows;

use inference::answer::usual_cache;
use inference::memory::Memory;
use inference::pass::Engine;
use inference::serve::point;
use inference::stack::Stack;
use serde::Serialize;
use spec::{Catalog, Result};

pub use rows::{Figure, Row, Rows, Use, is_table};

use crate::runs::Skipped;
use crate::validate::quantile;

/// Errors on a table of serving figures, as fractions. A row's error is the largest of its figures'.
#[derive(Clone, Debug, Serialize)]
pub struct Validation {
    /// Rows estimated.
    pub rows: usize,
    /// Median of the rows' errors.
    pub median_abs_error: f64,
    /// 90th percentile of the same.
    pub p90_abs_error: f64,
    /// Mean of the same.
    pub mean_abs_error: f64,
    /// The largest.
    pub max_abs_error: f64,
    /// By figure.
    pub figures: Vec<FigureErrors>,
    /// Each row.
    pub details: Vec<RowError>,
    /// Rows that were not estimated, and why.
    pub not_priced: Vec<Skipped>,
}

/// Errors on one kind of figure.
#[derive(Clone, Debug, Serialize)]
pub struct FigureErrors {
    /// Which.
    pub figure: Figure,
    /// Rows that give it.
    pub rows: usize,
    /// Mean of predicted / published - 1.
    pub mean_error: f64,
    /// Median of its absolute value.
    pub median_abs_error: f64,
}

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct RowError {
    /// Its name.
    pub id: String,
    /// The stack that it was estimated for.
    pub stack: String,
    /// The largest error of its figures, absolute.
    pub error: f64,
    /// Its figures.
    pub figures: Vec<Compared>,
}

/// One figure of a row.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Compared {
    /// Which.
    pub figure: Figure,
    /// As predicted, in the unit of the column.
    pub predicted: f64,
    /// As published.
    pub published: f64,
    /// predicted / published - 1.
    pub error: f64,
}

/// Estimates the rows of a table.
///
/// # Errors
/// If the text is no table of serving figures.
pub fn validate(path: &str, text: &str, catalog: &Catalog) -> Result<Validation> {
    let Rows { rows, mut not_priced } = Rows::parse(path, text, catalog)?;
    let mut details = Vec::new();
    for row in rows {
        let (id, line, stack) = (row.id.clone(), row.line, row.stack.clone());
        match Prepared::new(row).and_then(|p| p.compare(&stack)) {
            Ok(detail) => details.push(detail),
            Err(e) => not_priced.push(Skipped { id, line, reason: e.to_string() }),
        }
    }
    not_priced.sort_by_key(|n| n.line);
    Ok(summary(details, not_priced))
}

/// A row ready to be estimated under one stack after another.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The row.
    pub row: Row,
    engine: Engine,
}

impl Prepared {
    /// Takes the model's program apart.
    ///
    /// # Errors
    /// If the model cannot be cut so.
    pub fn new(row: Row) -> Result<Self> {
        let cache = row.cache.unwrap_or(usual_cache(row.weights, &row.stack));
        let engine = Engine::new(&row.shape, &row.cluster, row.tp, row.weights, cache, &row.stack)?;
        Ok(Prepared { row, engine })
    }

    /// The row's figures under `stack`: requests that do not fit wait.
    ///
    /// # Errors
    /// If the model does not fit.
    pub fn compare(&self, stack: &Stack) -> Result<RowError> {
        let row = &self.row;
        let engine = self.engine.under(stack);
        let (input, output) = (row.traffic.input as f64, row.traffic.output as f64);
        let memory = Memory::of(&engine, &row.cluster.accelerator, row.shape.tied_embeddings, input, output)?;
        let p = point(&engine, &memory, row.traffic, row.concurrency);
        let compared = |(figure, published): &(Figure, f64)| {
            let predicted = match figure {
                Figure::LatencyS => p.latency_s,
                Figure::TtftMs => p.ttft_s * 1e3,
                Figure::ItlMs => p.itl_s * 1e3,
                Figure::TokensPerS => p.tokens_per_s,
            };
            let error = predicted / published - 1.0;
            Compared { figure: *figure, predicted, published: *published, error }
        };
        let figures: Vec<Compared> = row.figures.iter().map(compared).collect();
        let error = figures.iter().map(|f| f.error.abs()).fold(0.0, f64::max);
        Ok(RowError { id: row.id.clone(), stack: stack.name.clone(), error, figures })
    }
}

fn summary(details: Vec<RowError>, not_priced: Vec<Skipped>) -> Validation {
    let errors: Vec<f64> = details.iter().map(|d| d.error).collect();
    let figures = Figure::ALL.into_iter().filter_map(|figure| {
        let of = details.iter().flat_map(|d| &d.figures).filter(|c| c.figure == figure);
        let errors: Vec<f64> = of.map(|c| c.error).collect();
        (!errors.is_empty()).then(|| FigureErrors {
            figure,
            rows: errors.len(),
            mean_error: errors.iter().sum::<f64>() / errors.len() as f64,
            median_abs_error: quantile(&errors, 0.5),
        })
    });
    Validation {
        rows: details.len(),
        median_abs_error: quantile(&errors, 0.5),
        p90_abs_error: quantile(&errors, 0.9),
        mean_abs_error: errors.iter().sum::<f64>() / errors.len().max(1) as f64,
        max_abs_error: errors.iter().fold(0.0, |a, e| a.max(*e)),
        figures: figures.collect(),
        details,
        not_priced,
    }
}
