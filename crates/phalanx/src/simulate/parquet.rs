//! Tables in Parquet files, as rows of text.

use std::fs::File;
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use sim::trace::Row;
use spec::{Error, Result};

/// What every Parquet file begins with.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// The ops of a trace.
pub(super) fn rows(place: &str, path: &Path) -> Result<Vec<Row>> {
    let bad = |e: ParquetError| {
        Error::user(format!("{place}: {e}")).hint(
            "a whole Parquet file, written uncompressed or with snappy, as pandas does unless told otherwise",
        )
    };
    let file = File::open(path).map_err(|e| Error::io("read", path, &e).hint("name a readable file"))?;
    let reader = SerializedFileReader::new(file).map_err(bad)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let columns: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
    let table = reader.get_row_iter(None).map_err(bad)?.enumerate().map(|(i, row)| {
        let cells = row.map_err(bad)?.into_columns().into_iter().map(|(_, field)| text(field));
        Ok((i + 1, cells.collect()))
    });
    sim::trace::table(place, &columns, table)
}

fn text(field: Field) -> String {
    match field {
        Field::Str(text) => text,
        Field::Null => String::new(),
        other => other.to_string(),
    }
}
