use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::record::Record;

/// Longest line read: a step's spans of thousands of ops and micro-batches fit many times over, and a file that is no
/// journal does not fill the memory.
const MAX_LINE_BYTES: usize = 256 << 20;

/// All records of a journal file.
///
/// # Errors
/// As [`Reader::next_record`].
pub fn read(path: &Path) -> Result<Vec<Record>> {
    Reader::open(path)?.collect()
}

/// Opens a journal, or what else views read of a run, which is a file: a pipe of that name would keep them waiting for a
/// writer.
///
/// # Errors
/// When it is no file ([`io::ErrorKind::InvalidInput`]) or cannot be opened.
pub fn open_file(path: &Path) -> io::Result<File> {
    is_file(&fs::metadata(path)?)?;
    File::open(path)
}

/// What `meta` is of must be a file.
pub(crate) fn is_file(meta: &fs::Metadata) -> io::Result<()> {
    let refused = || io::Error::new(io::ErrorKind::InvalidInput, "no regular file");
    if meta.is_file() { Ok(()) } else { Err(refused()) }
}

/// All records of a journal file that has perhaps been damaged, and what was passed over.
///
/// # Errors
/// When it cannot be read.
pub fn read_sound(path: &Path) -> Result<(Vec<Record>, Option<Damage>)> {
    let mut reader = Reader::open(path)?;
    let mut records = Vec::new();
    while let Some(record) = reader.next_sound()? {
        records.push(record);
    }
    Ok((records, reader.damage))
}

/// Whole lines of a journal that are no records: passed over, and named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    path: PathBuf,
    /// How many.
    pub lines: u64,
    /// Number of the first, from 1.
    pub first: usize,
    why: String,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Damage { path, lines, first, why } = self;
        let what = if *lines == 1 { "1 damaged line is" } else { &format!("{lines} damaged lines are") };
        write!(f, "{}: {what} left out, the first is line {first}: {why}", path.display())
    }
}

/// The journal files of a run, by rank.
///
/// # Errors
/// When `dir` cannot be read, or a pipe or directory has a journal's name.
pub fn files(dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let io =
        |e| Error::io("read run directory", dir, &e).hint("give the directory of a run, as its run.dir says");
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().into_string().unwrap_or_default();
        let rank = name.strip_prefix("journal-").and_then(|n| n.strip_suffix(".jsonl"));
        if let Some(rank) = rank.and_then(|r| r.parse().ok()) {
            let path = entry.path();
            if let Ok(meta) = fs::metadata(&path) {
                is_file(&meta).map_err(|e| {
                    Error::io("read journal", &path, &e).hint("move it away: it is no journal")
                })?;
            }
            found.push((rank, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a journal record by record, also while it is being written.
#[derive(Debug)]
pub struct Reader {
    file: BufReader<File>,
    path: PathBuf,
    /// Offset of the next line.
    offset: u64,
    line: usize,
    buffer: Vec<u8>,
    /// What [`Reader::next_sound`] passed over.
    pub damage: Option<Damage>,
}

impl Reader {
    /// Opens a journal file.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open_file(path).map_err(|e| {
            Error::io("open journal", path, &e).hint("give the directory of a run, as its run.dir says")
        })?;
        Ok(Reader {
            file: BufReader::new(file),
            path: path.to_owned(),
            offset: 0,
            line: 0,
            buffer: Vec::new(),
            damage: None,
        })
    }

    /// The next record, or `None` at the end for now: a later call sees what was appended meanwhile. A last line without
    /// its newline is being written or was torn by a crash; it is not read.
    ///
    /// # Errors
    /// A whole line that is no record, with file and line; the next call reads the line after it.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        self.next_line()?.transpose().map_err(|why| {
            let (path, line) = (self.path.display(), self.line);
            Error::user(format!("journal {path}:{line}: not a record: {why}")).hint(format!(
                "that line alone is damaged; to read all others, remove it: sed -i {line}d {path}"
            ))
        })
    }

    /// As [`Reader::next_record`], but lines that are no records are passed over and noted in `damage`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn next_sound(&mut self) -> Result<Option<Record>> {
        loop {
            match self.next_line()? {
                None => return Ok(None),
                Some(Ok(record)) => return Ok(Some(record)),
                Some(Err(why)) => {
                    let (path, first) = (self.path.clone(), self.line);
                    self.damage.get_or_insert(Damage { path, lines: 0, first, why }).lines += 1;
                }
            }
        }
    }

    /// The next whole line: a record, or why it is none.
    fn next_line(&mut self) -> Result<Option<Result<Record, String>>> {
        use std::io::Read;
        let io = |e| Error::io("read journal", &self.path, &e);
        self.buffer.clear();
        let read = self.file.by_ref().take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut self.buffer);
        let read = read.map_err(io)?;
        if self.buffer.last() != Some(&b'\n') {
            if read == MAX_LINE_BYTES {
                let (path, line) = (self.path.display(), self.line + 1);
                return Err(Error::user(format!("journal {path}:{line}: longer than any record"))
                    .hint("the file is no journal from there on: put another in its place"));
            }
            self.file.seek(SeekFrom::Start(self.offset)).map_err(io)?;
            return Ok(None);
        }
        self.offset += read as u64;
        self.line += 1;
        let record = serde_json::from_slice(&self.buffer).map(Record::current);
        Ok(Some(record.map_err(|e| e.to_string())))
    }
}

impl Iterator for Reader {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_record().transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::record::tests::step;

    #[test]
    fn torn_anywhere_the_whole_lines_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal-00000.jsonl");
        let lines: Vec<String> =
            (0..3).map(|i| serde_json::to_string(&step(i, 0.5)).unwrap() + "\n").collect();
        let text = lines.concat();
        for end in 0..=text.len() {
            fs::write(&path, &text[..end]).unwrap();
            let whole = text[..end].matches('\n').count();
            assert_eq!(read(&path).unwrap().len(), whole);
        }
    }

    #[test]
    fn a_damaged_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let good = serde_json::to_string(&step(1, 0.5)).unwrap();
        for bad in ["", "{", "{\"kind\":\"dance\"}", "\u{0}\u{0}"] {
            fs::write(&path, format!("{good}\n{bad}\n{good}\n")).unwrap();
            let error = read(&path).unwrap_err();
            assert!(error.to_string().contains("j:2: not a record"), "{error}");
            let (records, damage) = read_sound(&path).unwrap();
            assert_eq!(records, [step(1, 0.5), step(1, 0.5)], "what lies around it is read");
            let damage = damage.unwrap();
            assert_eq!((damage.lines, damage.first), (1, 2), "{damage}");
        }
    }

    #[test]
    fn threads_in_the_name_of_a_device_are_read_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let check = |said: &str, expected: (&str, Option<usize>)| {
            let line = format!(
                "{{\"kind\":\"run_started\",\"time_us\":1,\"version\":\"0.1.0\",\"fingerprint\":\"f\",\"world\":1,\
                 \"rank\":0,\"host\":\"h\",{said},\"parameters\":9}}\n"
            );
            fs::write(&path, line).unwrap();
            match &read(&path).unwrap()[..] {
                [Record::RunStarted { device, threads, .. }] => {
                    assert_eq!((device.as_str(), *threads), expected)
                }
                other => panic!("{other:?}"),
            }
        };
        check("\"device\":\"cpu, 4 threads\"", ("cpu", Some(4)));
        check("\"device\":\"cpu\",\"threads\":2", ("cpu", Some(2)));
        check("\"device\":\"cpu, unknown\"", ("cpu, unknown", None));
    }

    #[test]
    fn a_reader_follows_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let mut file = File::create(&path).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        let line = serde_json::to_string(&step(1, 0.5)).unwrap() + "\n";
        for _ in 0..3 {
            assert_eq!(reader.next_record().unwrap(), None);
            file.write_all(&line.as_bytes()[..20]).unwrap();
            assert_eq!(reader.next_record().unwrap(), None);
            file.write_all(&line.as_bytes()[20..]).unwrap();
            assert_eq!(reader.next_record().unwrap(), Some(step(1, 0.5)));
        }
    }

    #[test]
    fn files_by_rank() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["journal-00010.jsonl", "journal-00002.jsonl", "journal-x.jsonl", "other"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let ranks: Vec<usize> = files(dir.path()).unwrap().into_iter().map(|(r, _)| r).collect();
        assert_eq!(ranks, [2, 10]);
    }
}
