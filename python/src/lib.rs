//! What Python calls of Phalanx without starting a process: journals and prepared data.
//!
//! `phalanx/__init__.py` is the surface; planning is the business of the binary that the same wheel brings.

mod dataset;
mod journals;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

/// The extension module.
#[pymodule]
mod _phalanx {
    #[pymodule_export]
    use crate::dataset::{Dataset, Tokens};
    #[pymodule_export]
    use crate::journals::read_journal;
}

/// An error as Python knows it: `ValueError` for wrong input, `OSError` for what failed.
fn raise(e: spec::Error) -> PyErr {
    let hint = e.hint_text().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    let text = format!("{e}{hint}");
    match e.kind() {
        spec::Kind::User => PyValueError::new_err(text),
        spec::Kind::Failure => PyOSError::new_err(text),
    }
}
