use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use data::{IndexedDataset, TokenType, bin_path};
use memmap2::Mmap;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use spec::Error;

use crate::raise;

/// Tokens prepared by `phalanx data build` (Megatron's `.bin/.idx`), as read-only numpy arrays that lie in the file:
/// nothing is copied, and what is not looked at is not read.
///
/// `len(dataset)` is the number of documents, `dataset[i]` the tokens of one, `dataset.tokens` all of them. Arrays have the
/// type of the file, `uint16` or `int32` mostly. The file must not be changed or cut while it is open.
///
/// Raises `ValueError` if index and tokens are not there or contradict each other.
#[pyclass(frozen)]
pub(crate) struct Dataset {
    index: IndexedDataset,
    bin: Arc<Mmap>,
}

/// Tokens where they lie, for `numpy.asarray`.
#[pyclass(frozen)]
pub(crate) struct Tokens {
    bin: Arc<Mmap>,
    kind: TokenType,
    /// In tokens.
    range: Range<usize>,
}

#[pymethods]
impl Dataset {
    #[new]
    fn open(prefix: PathBuf) -> PyResult<Dataset> {
        let index = IndexedDataset::open(&prefix).map_err(raise)?;
        let path = bin_path(index.prefix());
        let failed = |e| raise(Error::io("map", &path, &e));
        let file = File::open(&path).map_err(failed)?;
        // SAFETY: the map is read-only; whoever cuts the file while it is open ends this process, as the docs say.
        let bin = unsafe { Mmap::map(&file) }.map_err(failed)?;
        if bin.len() as u64 != index.tokens() * index.token_type().size() as u64 {
            return Err(raise(Error::user(format!("{} has changed while it was opened", path.display()))));
        }
        Ok(Dataset { index, bin: Arc::new(bin) })
    }

    fn __len__(&self) -> usize {
        self.index.sequences()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: isize) -> PyResult<Bound<'py, PyAny>> {
        let len = self.index.sequences();
        let at = if index < 0 { index.checked_add_unsigned(len) } else { Some(index) };
        let Some(at) = at.and_then(|at| usize::try_from(at).ok()).filter(|at| *at < len) else {
            return Err(PyIndexError::new_err(format!("document {index} of {len}")));
        };
        let start = self.index.start(at) as usize;
        self.array(py, start..start + self.index.length(at))
    }

    /// All tokens, one document after another.
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, 0..self.index.tokens() as usize)
    }

    /// Tokens of each document.
    #[getter]
    fn lengths(&self) -> Vec<usize> {
        (0..self.index.sequences()).map(|i| self.index.length(i)).collect()
    }

    /// The files' path without extension.
    #[getter]
    fn prefix(&self) -> PathBuf {
        self.index.prefix().to_owned()
    }

    fn __repr__(&self) -> String {
        let (prefix, tokens) = (self.index.prefix().display(), self.index.tokens());
        format!("Dataset({prefix}: {} documents, {tokens} tokens)", self.index.sequences())
    }
}

impl Dataset {
    fn array<'py>(&self, py: Python<'py>, range: Range<usize>) -> PyResult<Bound<'py, PyAny>> {
        let tokens = Tokens { bin: Arc::clone(&self.bin), kind: self.index.token_type(), range };
        py.import("numpy")?.call_method1("asarray", (Bound::new(py, tokens)?,))
    }
}

#[pymethods]
impl Tokens {
    /// Where the tokens lie, as numpy asks for it; the array keeps this object, and with it the map.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let first = self.bin[self.range.start * self.kind.size()..].as_ptr() as usize;
        let dict = PyDict::new(py);
        dict.set_item("version", 3)?;
        dict.set_item("shape", (self.range.len(),))?;
        dict.set_item("typestr", typestr(self.kind))?;
        dict.set_item("data", (first, true))?;
        Ok(dict)
    }
}

/// Byte order, kind and size of an element.
fn typestr(kind: TokenType) -> &'static str {
    match kind {
        TokenType::U8 => "|u1",
        TokenType::I8 => "|i1",
        TokenType::I16 => "<i2",
        TokenType::I32 => "<i4",
        TokenType::I64 => "<i8",
        TokenType::U16 => "<u2",
        TokenType::U32 => "<u4",
    }
}
