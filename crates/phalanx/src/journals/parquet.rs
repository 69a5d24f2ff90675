//! Tables as Parquet: snappy, row groups of bounded size, so that a journal of any length takes little memory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::errors::{ParquetError, Result as Done};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::Type as Schema;
use spec::{Error, Result};

use super::export::{Cell, Type};

/// Rows of a row group: a few MiB in memory.
const GROUP_ROWS: usize = 1 << 16;

/// A Parquet file that is being written. Whole numbers are INT64, others DOUBLE and null where missing, text UTF-8.
pub(super) struct Writer {
    file: SerializedFileWriter<File>,
    types: Vec<Type>,
    /// Of the row group that is being filled.
    rows: Vec<Vec<Cell>>,
    path: PathBuf,
}

impl Writer {
    pub(super) fn new(file: File, path: &Path, columns: &[(String, Type)]) -> Result<Writer> {
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let begin = || {
            let fields = columns.iter().map(|(name, of)| column(name, *of).map(Arc::new));
            let schema = Schema::group_type_builder("steps").with_fields(fields.collect::<Done<Vec<_>>>()?);
            SerializedFileWriter::new(file, Arc::new(schema.build()?), Arc::new(properties))
        };
        let file = begin().map_err(|e| failed(path, &e))?;
        let types = columns.iter().map(|(_, of)| *of).collect();
        Ok(Writer { file, types, rows: Vec::new(), path: path.to_owned() })
    }

    pub(super) fn push(&mut self, row: Vec<Cell>) -> Result<()> {
        self.rows.push(row);
        if self.rows.len() < GROUP_ROWS { Ok(()) } else { self.group() }
    }

    pub(super) fn finish(mut self) -> Result<()> {
        if !self.rows.is_empty() {
            self.group()?;
        }
        let closed = self.file.close();
        closed.map(|_| ()).map_err(|e| failed(&self.path, &e))
    }

    fn group(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.rows);
        let mut write = || -> Done<()> {
            let mut group = self.file.next_row_group()?;
            for (i, of) in self.types.iter().enumerate() {
                values(&mut group, *of, rows.iter().map(|row| &row[i]))?;
            }
            group.close().map(|_| ())
        };
        write().map_err(|e| failed(&self.path, &e))
    }
}

fn failed(path: &Path, e: &ParquetError) -> Error {
    Error::failure(format!("write {}: {e}", path.display()))
        .hint("free space there, or name another --parquet")
}

fn column(name: &str, of: Type) -> Done<Schema> {
    let (physical, logical, repetition) = match of {
        Type::Int => (Physical::INT64, None, Repetition::REQUIRED),
        Type::Float => (Physical::DOUBLE, None, Repetition::OPTIONAL),
        Type::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String), Repetition::REQUIRED),
    };
    let column = Schema::primitive_type_builder(name, physical);
    column.with_logical_type(logical).with_repetition(repetition).build()
}

/// Writes the next column of a row group.
fn values<'a>(
    group: &mut SerializedRowGroupWriter<'_, File>,
    of: Type,
    cells: impl Iterator<Item = &'a Cell>,
) -> Done<()> {
    let Some(mut column) = group.next_column()? else {
        return Err(ParquetError::General("more columns than the schema has".to_owned()));
    };
    let (mut ints, mut floats, mut texts, mut defined) = (vec![], vec![], vec![], vec![]);
    for cell in cells {
        match cell {
            // Times and counts stay far below 2^63.
            Cell::Int(n) => ints.push(*n as i64),
            Cell::Float(x) => {
                defined.push(i16::from(x.is_some()));
                floats.extend(*x);
            }
            Cell::Text(text) => texts.push(ByteArray::from(text.as_str())),
        }
    }
    match of {
        Type::Int => column.typed::<Int64Type>().write_batch(&ints, None, None),
        Type::Float => column.typed::<DoubleType>().write_batch(&floats, Some(&defined), None),
        Type::Text => column.typed::<ByteArrayType>().write_batch(&texts, None, None),
    }?;
    column.close()
}

#[cfg(test)]
mod tests {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::RowAccessor;

    use super::*;

    #[test]
    fn rows_of_several_groups_read_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("table.parquet");
        let columns = [("n", Type::Int), ("x", Type::Float), ("t", Type::Text)];
        let columns = columns.map(|(name, of)| (name.to_owned(), of));
        let rows = GROUP_ROWS + 3;
        let file = File::create(&path).expect("a file");
        let mut writer = Writer::new(file, &path, &columns).expect("a writer");
        for i in 0..rows {
            let x = (!i.is_multiple_of(5)).then_some(i as f64 / 3.0);
            writer
                .push(vec![Cell::Int(i as u64), Cell::Float(x), Cell::Text(format!("row {i}"))])
                .expect("a row");
        }
        writer.finish().expect("written");
        let reader = SerializedFileReader::new(File::open(&path).expect("the file")).expect("Parquet");
        assert_eq!(reader.num_row_groups(), 2);
        let read: Vec<_> = reader.get_row_iter(None).expect("rows").map(|row| row.expect("a row")).collect();
        assert_eq!(read.len(), rows);
        for i in [0, 1, GROUP_ROWS - 1, rows - 1] {
            assert_eq!(read[i].get_long(0).expect("a number"), i as i64);
            assert_eq!(read[i].get_double(1).ok(), (!i.is_multiple_of(5)).then_some(i as f64 / 3.0));
            assert_eq!(read[i].get_string(2).expect("text"), &format!("row {i}"));
        }
    }
}
