//! Rules that every program obeys, checked apart from the passes that are to keep them.
//!
//! The graph of a chunk is checked after each pass (in debug builds, in tests and by `phalanx program check`), a rank's
//! program once it is placed, and the programs of all ranks together for what they say to each other.

mod shapes;
pub(crate) mod graph;
mod placed;
mod world;

use std::fmt;

use serde::Serialize;
use spec::{Error, Result};

pub use placed::program;
pub use world::{Checked, world};

/// A rule of programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Operands lie inside their buffers, buffers inside their regions.
    Operands,
    /// Operands have the shapes and element types that their op's kind asks for.
    Shapes,
    /// A value is written once, or in parts that do not overlap.
    OneWriter,
    /// Nothing is read before it is written.
    ReadBeforeWrite,
    /// No two values that are alive together share a byte.
    SharedBytes,
    /// No value is used after its bytes were given up, or before they were given to it.
    GivenUp,
    /// Ops with different names have different ids.
    UniqueIds,
    /// The members of a group say the same to each other, in the same order.
    Messages,
    /// No rank waits for ever.
    Deadlock,
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// The op, buffer or rank.
    pub at: String,
    /// How.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({:?})", self.at, self.what, self.rule)
    }
}

/// The first violation as an error: a program that breaks a rule is a defect of the compiler, not of what was asked.
///
/// # Errors
/// If there is one.
pub fn accept(pass: &str, found: &[Violation]) -> Result<()> {
    let Some(first) = found.first() else { return Ok(()) };
    let more = if found.len() > 1 { format!(", and {} more", found.len() - 1) } else { String::new() };
    Err(Error::failure(format!("the program is wrong after {pass}: {first}{more}"))
        .hint("this is a defect of Phalanx: please report it with the run file"))
}
