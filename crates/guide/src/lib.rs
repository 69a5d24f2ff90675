//! The figures of a guide to AI supercomputing platforms, each recomputed and compared.
//!
//! A claim states a value, a range or a word. Our side is computed when asked, from the catalogue's facts and the
//! planner's functions, with the sources that were used on the way; the verdict follows from comparing the two.

mod claims;
mod facts;
pub mod verdict;

use plan::calibration::Calibration;
use serde::Serialize;
use spec::{Catalog, Result};

pub use verdict::{Agreement, Stated, Verdict};

/// One figure of the guide with ours beside it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Claim {
    /// Its number, in the order of the guide.
    pub number: usize,
    /// What the guide says, in short.
    pub claim: String,
    /// What we find, with units.
    pub ours: String,
    /// Where our figure comes from: publications with dates, the planner, arithmetic.
    pub source: String,
    /// How the two compare.
    pub verdict: Verdict,
    /// What else to know.
    pub note: Option<String>,
    /// The figures behind `ours`.
    pub readings: Vec<Read>,
}

/// One figure of ours beside the part of the claim that it answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Read {
    /// What it is a figure of.
    pub of: String,
    /// Our value, in `unit`; absent where there is a word or nothing to compare.
    pub value: Option<f64>,
    /// The lowest that our sources state.
    pub low: Option<f64>,
    /// The highest.
    pub high: Option<f64>,
    /// Unit of value and claim.
    pub unit: &'static str,
    /// What the guide states, in the same unit.
    pub stated: String,
    /// Whether the two agree; absent where nobody who knows has said.
    pub agrees: Option<Agreement>,
    /// The date of a figure that has been replaced since.
    pub until: Option<String>,
}

/// Recomputes every claim.
///
/// ```
/// let claims = guide::check(&spec::Catalog::builtin()?, &plan::calibration::Calibration::builtin()?)?;
/// let days = &claims[49];
/// assert_eq!((days.number, days.verdict), (50, guide::Verdict::Wrong));
/// assert!(days.ours.contains("1,620 GPU-days"), "{}", days.ours);
/// # Ok::<(), spec::Error>(())
/// ```
///
/// # Errors
/// If a fact that a claim needs is not in the catalogue, by its name.
pub fn check(catalog: &Catalog, calibration: &Calibration) -> Result<Vec<Claim>> {
    let mut facts = facts::Facts::new(catalog, calibration);
    claims::all()
        .enumerate()
        .map(|(i, (claim, ask))| {
            let number = i + 1;
            let found = ask(&mut facts).map_err(|e| e.context(format!("claim {number}")))?;
            Ok(found.close(number, claim, facts.sources()))
        })
        .collect()
}
