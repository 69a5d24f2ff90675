//! Records as tables: comma-separated values, or Parquet.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use journal::line::Line;
use journal::{Record, Step};
use spec::{Error, Result};

use super::parquet::Writer;
use super::{each, each_sound};

/// Where a run went back to, and where in the file that stands.
struct Counts {
    /// (offset, step) of each going back, in order.
    back: Vec<(u64, u64)>,
    axes: BTreeSet<String>,
}

impl Counts {
    fn read(run_dir: &Path, rank: usize) -> Result<Counts> {
        let mut counts = Counts { back: Vec::new(), axes: BTreeSet::new() };
        let mut last = 0;
        // Told of where rows are written.
        each_sound(run_dir, rank, &mut |found| {
            match found.line {
                Line::Record(
                    Record::Resumed { step, .. }
                    | Record::Recovered { step, .. }
                    | Record::Trouble { back_to: Some(step), .. },
                ) if step < last => {
                    counts.back.push((found.offset, step));
                    last = step;
                }
                Line::Record(Record::Step(Step { step, waits_s, .. })) => {
                    if step <= last {
                        counts.back.push((found.offset, step.saturating_sub(1)));
                    }
                    last = step;
                    for axis in waits_s.into_keys().filter(|a| !counts.axes.contains(a)).collect::<Vec<_>>() {
                        counts.axes.insert(axis);
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        // From a place on, the least step that the run goes back to later.
        let mut least = u64::MAX;
        for (_, step) in counts.back.iter_mut().rev() {
            least = least.min(*step);
            *step = least;
        }
        Ok(counts)
    }

    /// Whether what was done at `offset` for `step` is part of the run as it went on.
    fn keep(&self, offset: u64, step: u64) -> bool {
        let later = self.back.partition_point(|(at, _)| *at <= offset);
        self.back.get(later).is_none_or(|(_, least)| step <= *least)
    }
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Int,
    /// May be missing.
    Float,
    Text,
}

/// A value of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    Int(u64),
    Float(Option<f64>),
    Text(String),
}

impl Cell {
    /// As a field of comma-separated values.
    fn csv(&self) -> String {
        match self {
            Cell::Int(n) => n.to_string(),
            Cell::Float(x) => x.map(|x| x.to_string()).unwrap_or_default(),
            Cell::Text(text) => field(text),
        }
    }
}

/// Records of one kind in a rank's journal, as rows.
pub(super) struct Table<'a> {
    run_dir: &'a Path,
    kind: &'a str,
    rank: usize,
    all: bool,
    counts: Counts,
}

impl<'a> Table<'a> {
    /// Looks the journal through for what its rows will be; `all` keeps steps that were lost and done again.
    pub(super) fn read(run_dir: &'a Path, kind: &'a str, rank: usize, all: bool) -> Result<Table<'a>> {
        Ok(Table { run_dir, kind, rank, all, counts: Counts::read(run_dir, rank)? })
    }

    /// What becomes a row.
    pub(super) fn kind(&self) -> &str {
        self.kind
    }

    /// Names and types; the first is the time in microseconds.
    pub(super) fn columns(&self) -> Vec<(String, Type)> {
        use Type::*;
        let fixed: &[(&str, Type)] = match self.kind {
            "eval" => {
                &[("time_us", Int), ("step", Int), ("loss", Float), ("tokens", Int), ("average_loss", Float)]
            }
            "checkpoint" => &[
                ("time_us", Int),
                ("step", Int),
                ("path", Text),
                ("bytes", Int),
                ("save_s", Float),
                ("stall_s", Float),
            ],
            _ => &[
                ("time_us", Int),
                ("step", Int),
                ("loss", Float),
                ("grad_norm", Float),
                ("lr", Float),
                ("tokens", Int),
                ("valid_tokens", Int),
                ("tokens_per_s", Float),
                ("mfu", Float),
                ("step_s", Float),
                ("memory_bytes", Int),
                ("exposed_comm_s", Float),
                ("mtp_loss", Float),
            ],
        };
        let waits = match self.kind {
            "eval" | "checkpoint" => Default::default(),
            _ => self.counts.axes.iter(),
        };
        let fixed = fixed.iter().map(|(name, of)| ((*name).to_owned(), *of));
        fixed.chain(waits.map(|axis| (format!("wait_{axis}_s"), Float))).collect()
    }

    /// Gives every row, in the order of the journal.
    pub(super) fn rows(&self, with: &mut dyn FnMut(Vec<Cell>) -> Result<()>) -> Result<()> {
        each(self.run_dir, self.rank, &mut |found| {
            let Line::Record(record) = &found.line else { return Ok(()) };
            match row(self.kind, record, &self.counts.axes) {
                Some((step, row)) if self.all || self.counts.keep(found.offset, step) => with(row),
                _ => Ok(()),
            }
        })
    }

    /// Writes comma-separated values (RFC 4180) to a file, or to stdout.
    pub(super) fn csv(&self, to: Option<&Path>) -> Result<()> {
        let name = to.map_or_else(|| "stdout".to_owned(), |p| p.display().to_string());
        let io = |e: io::Error| {
            Error::failure(format!("write {name}: {e}")).hint("free space there, or choose another --output")
        };
        let out: Box<dyn Write> = match to {
            Some(path) => Box::new(create(path, "--output")?),
            None => Box::new(io::stdout().lock()),
        };
        let mut out = BufWriter::new(out);
        let head: Vec<String> = self.columns().iter().map(|(name, _)| field(name)).collect();
        let written = writeln!(out, "{}", head.join(",")).map_err(io).and_then(|()| {
            self.rows(&mut |row| {
                let fields: Vec<String> = row.iter().map(Cell::csv).collect();
                writeln!(out, "{}", fields.join(",")).map_err(io)
            })
        });
        match written.and_then(|()| out.flush().map_err(io)) {
            // A reader that has seen enough.
            Err(e) if to.is_none() && e.to_string().contains("Broken pipe") => Ok(()),
            done => done,
        }
    }

    /// Writes a Parquet file.
    pub(super) fn parquet(&self, path: &Path) -> Result<()> {
        let mut writer = Writer::new(create(path, "--parquet")?, path, &self.columns())?;
        self.rows(&mut |row| writer.push(row))?;
        writer.finish()
    }
}

fn create(path: &Path, flag: &str) -> Result<File> {
    let named =
        |e: io::Error| Error::io("create", path, &e).hint(format!("name a writable file with {flag}"));
    File::create(path).map_err(named)
}

/// A record's step and its row, if it is of the kind.
fn row(kind: &str, record: &Record, axes: &BTreeSet<String>) -> Option<(u64, Vec<Cell>)> {
    use Cell::{Float, Int, Text};
    Some(match (kind, record) {
        ("step", Record::Step(s)) => {
            let mut row = vec![
                Int(s.time_us),
                Int(s.step),
                Float(Some(s.loss)),
                Float(Some(s.grad_norm)),
                Float(Some(s.lr)),
                Int(s.tokens),
                Int(s.valid_tokens),
                Float(Some(s.tokens_per_s)),
                Float(s.mfu),
                Float(Some(s.step_s)),
                Int(s.memory_bytes),
                Float(s.exposed_comm_s),
                Float(s.mtp_loss),
            ];
            row.extend(axes.iter().map(|axis| Float(s.waits_s.get(axis).copied())));
            (s.step, row)
        }
        ("eval", Record::Eval { time_us, step, loss, average_loss, tokens }) => {
            let values = [Int(*time_us), Int(*step), Float(Some(*loss)), Int(*tokens), Float(*average_loss)];
            (*step, values.into())
        }
        ("checkpoint", Record::Checkpoint { time_us, step, path, bytes, save_s, stall_s }) => {
            let path = Text(path.clone());
            (*step, vec![Int(*time_us), Int(*step), path, Int(*bytes), Float(Some(*save_s)), Float(*stall_s)])
        }
        _ => return None,
    })
}

/// Text as a field of a table (RFC 4180).
fn field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_what_no_later_start_goes_back_behind() {
        // As read: back to 3 at byte 60, back to 5 at byte 90.
        let counts = Counts { back: vec![(60, 3), (90, 5)], axes: BTreeSet::new() };
        let check =
            |offset, step, expected| assert_eq!(counts.keep(offset, step), expected, "{offset} {step}");
        check(10, 3, true);
        check(10, 4, false);
        check(70, 5, true);
        check(70, 6, false);
        check(95, 6, true);
    }

    #[test]
    fn text_with_commas_is_quoted() {
        assert_eq!(field("a"), "a");
        assert_eq!(field("a,\"b\""), "\"a,\"\"b\"\"\"");
    }
}
