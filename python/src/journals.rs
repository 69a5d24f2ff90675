use std::path::PathBuf;

use journal::Record;
use journal::line::Line;
use journal::tail::Tail;
use pyo3::exceptions::PyUserWarning;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::Value;
use spec::Error;

use crate::raise;

/// What rank `rank` of the run in `run_dir` has recorded so far, as a list of dicts: each has a `kind`, for example
/// `"step"`, and the fields of that kind. With `kind` only those.
///
/// A journal may be read while it grows. Lines that are damaged are left out with a warning; those of a newer version
/// and the long lists of spans and drawn samples are left out too. What came before a restart that went further back
/// stays in: the last record of a step is the one that counts.
///
/// Raises `ValueError` if there is no such journal.
#[pyfunction]
#[pyo3(signature = (run_dir, *, rank = 0, kind = None))]
pub(crate) fn read_journal<'py>(
    py: Python<'py>,
    run_dir: PathBuf,
    rank: usize,
    kind: Option<&str>,
) -> PyResult<Bound<'py, PyList>> {
    let path = journal::path(&run_dir, rank);
    let failed = |e| raise(Error::io("read journal", &path, &e).hint("give the directory of a run"));
    std::fs::metadata(&path).map_err(failed)?;
    let (mut records, mut damaged) = (Vec::new(), 0);
    let mut look = |line| match line {
        Line::Record(record) => records.push(record),
        Line::Damaged(_) => damaged += 1,
        Line::Spans { .. } | Line::Drawn | Line::Unknown(_) => {}
    };
    Tail::whole(path.clone()).look(u64::MAX, &mut |found| look(found.line)).map_err(failed)?;
    if damaged > 0 {
        let text = format!("{}: {damaged} damaged lines are left out", path.display());
        let category = py.get_type::<PyUserWarning>();
        PyErr::warn(py, &category, &std::ffi::CString::new(text).unwrap_or_default(), 1)?;
    }
    let list = PyList::empty(py);
    for record in &records {
        let value = as_json(record)?;
        if kind.is_none_or(|kind| value["kind"] == kind) {
            list.append(to_python(py, &value)?)?;
        }
    }
    Ok(list)
}

fn as_json(record: &Record) -> PyResult<Value> {
    serde_json::to_value(record).map_err(|e| raise(Error::failure(e.to_string())))
}

fn to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Bool(b) => b.into_pyobject(py)?.to_owned().into_any(),
        Value::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(n), _) => n.into_pyobject(py)?.into_any(),
            (None, Some(n)) => n.into_pyobject(py)?.into_any(),
            (None, None) => n.as_f64().into_pyobject(py)?,
        },
        // JSON has no such numbers, so journals hold them as text.
        Value::String(s) if ["NaN", "inf", "-inf"].contains(&s.as_str()) => {
            s.parse::<f64>().into_iter().next().into_pyobject(py)?
        }
        Value::String(s) => s.into_pyobject(py)?.into_any(),
        Value::Array(values) => {
            let list = PyList::empty(py);
            values.iter().try_for_each(|v| list.append(to_python(py, v)?))?;
            list.into_any()
        }
        Value::Object(fields) => {
            let dict = PyDict::new(py);
            fields.iter().try_for_each(|(name, v)| dict.set_item(name, to_python(py, v)?))?;
            dict.into_any()
        }
    })
}
