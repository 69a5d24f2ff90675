//! The figures of the pages. Each is drawn from values that its table shows too.

mod bars;
mod frontier;
mod goodput;
mod money;
mod ranks;
mod sensitivity;
mod serving;
mod stages;
mod ways;

use crate::table::Table;

pub(crate) use bars::{memory, parts};
pub(crate) use frontier::{layouts, scaling};
pub(crate) use goodput::{interval, losses};
pub(crate) use money::{cost, utilisation};
pub(crate) use ranks::by_stage_memory;
pub(crate) use sensitivity::{cost_swings, time_swings};
pub(crate) use serving::{load_curve, loads, passes, serving_memory, token_cost};
pub(crate) use stages::{Timeline, by_stage, timeline};
pub(crate) use ways::{decision_swings, use_of_ways, ways};

/// A drawing with its numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its name in the page.
    pub id: &'static str,
    /// What it shows.
    pub title: String,
    /// What to see in it, in a sentence or two.
    pub says: String,
    /// SVG.
    pub drawing: String,
    /// The numbers.
    pub table: Table,
}

/// Colours of the page's palette, `c0` to `c7`.
pub(crate) const COLOURS: usize = 8;

/// The class that fills with colour `i`.
pub(crate) fn fill(i: usize) -> String {
    format!("c{}", i % COLOURS)
}
