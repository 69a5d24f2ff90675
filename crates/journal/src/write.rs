use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::record::Record;

/// Steps whose samples are kept until they can be written: some ten megabytes.
const HELD_MAX: usize = 1 << 16;

/// The journal file of a rank inside a run's directory.
pub fn path(dir: &Path, rank: usize) -> PathBuf {
    dir.join(format!("journal-{rank:05}.jsonl"))
}

/// A rank's journal, open for appending. Each record is one line in one write.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// Length of the file up to the last whole line.
    bytes: u64,
    earlier: bool,
    line: Vec<u8>,
    /// The last write failed.
    is_failing: bool,
    /// Records that were lost since then, and in all.
    lost_now: u64,
    lost: u64,
    /// What was drawn in steps, as far as it could not be written: nobody else can say it, and a disk may have room again.
    held: VecDeque<Record>,
    /// Tests let the disk have room for this many bytes of the file.
    #[cfg(test)]
    room: Option<u64>,
}

impl Journal {
    /// Opens the journal of `rank` in `dir`, which is made if need be, for one more segment: what earlier processes wrote
    /// stays, but for a last line that a crash tore.
    ///
    /// # Errors
    /// When the file cannot be opened or written.
    pub fn open(dir: &Path, rank: usize) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io("create run directory", dir, &e))?;
        let path = path(dir, rank);
        let io = |e: io::Error| Error::io("open journal", &path, &e);
        if let Ok(meta) = fs::metadata(&path) {
            crate::read::is_file(&meta).map_err(|e| io(e).hint("move it away: a journal goes there"))?;
        }
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(io)?;
        let bytes = whole_lines(&mut file).map_err(io)?;
        file.set_len(bytes).map_err(io)?;
        Ok(Journal {
            file,
            path,
            earlier: bytes > 0,
            bytes,
            line: Vec::new(),
            is_failing: false,
            lost_now: 0,
            lost: 0,
            held: VecDeque::new(),
            #[cfg(test)]
            room: None,
        })
    }

    /// Appends a record.
    ///
    /// # Errors
    /// On the first write that fails after one that did not, so that a full disk is reported once and training decides
    /// what to do. Later records are tried too; once one gets through, a warning record says how many were lost, and what steps
    /// drew meanwhile is written behind it.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        if self.is_failing && self.catch_up(record.time_us().unwrap_or(0)).is_err() {
            self.missed(record);
            return Ok(());
        }
        self.append(record).map_err(|e| {
            self.is_failing = true;
            self.missed(record);
            Error::io("write journal", &self.path, &e).hint("free space for run.dir")
        })
    }

    /// Whether earlier processes left records.
    pub fn has_earlier(&self) -> bool {
        self.earlier
    }

    /// Records that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Where it is written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn missed(&mut self, record: &Record) {
        if matches!(record, Record::Drawn { .. }) && self.held.len() < HELD_MAX {
            self.held.push_back(record.clone());
        } else {
            self.lost_now += 1;
            self.lost += 1;
        }
    }

    /// Writes what could not be written before.
    fn catch_up(&mut self, time_us: u64) -> io::Result<()> {
        if self.lost_now > 0 {
            let text = format!("{} journal records were lost: writing failed", self.lost_now);
            self.append(&Record::Warning { time_us, text })?;
            self.lost_now = 0;
        }
        while let Some(record) = self.held.pop_front() {
            if let Err(e) = self.append(&record) {
                self.held.push_front(record);
                return Err(e);
            }
        }
        self.is_failing = false;
        Ok(())
    }

    fn append(&mut self, record: &Record) -> io::Result<()> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, record)?;
        self.line.push(b'\n');
        match self.put() {
            Ok(()) => {
                self.bytes += self.line.len() as u64;
                Ok(())
            }
            Err(e) => {
                // A part may be there; cut it off so that what follows is not glued to it.
                self.file.set_len(self.bytes)?;
                Err(e)
            }
        }
    }

    #[cfg(not(test))]
    fn put(&mut self) -> io::Result<()> {
        self.file.write_all(&self.line)
    }

    #[cfg(test)]
    fn put(&mut self) -> io::Result<()> {
        let fits = self
            .room
            .map_or(self.line.len(), |room| room.saturating_sub(self.bytes) as usize)
            .min(self.line.len());
        self.file.write_all(&self.line[..fits])?;
        if fits < self.line.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.is_failing {
            // The last try: whoever reads the journal says what it lacks.
            let _ = self.catch_up(0);
        }
    }
}

/// Length up to and including the last newline.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    const BLOCK: u64 = 64 << 10;
    let mut end = file.metadata()?.len();
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start))?;
        block.resize((end - start) as usize, 0);
        file.read_exact(&mut block)?;
        if let Some(at) = block.iter().rposition(|b| *b == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read;
    use crate::record::tests::step;

    #[test]
    fn a_full_disk_is_reported_once_and_lines_stay_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path(), 0).unwrap();
        journal.room = Some(600);
        let errors: Vec<Error> = (0..10).filter_map(|i| journal.write(&step(i, 1.0)).err()).collect();
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].exit_code(), 1);
        let lost = journal.lost();
        assert!((1..10).contains(&lost));
        assert_eq!(read(journal.path()).unwrap().len() as u64, 10 - lost);
        journal.room = None;
        journal.write(&step(10, 1.0)).unwrap();
        let records = read(journal.path()).unwrap();
        assert_eq!(records.len() as u64, 10 - lost + 2);
        let note = format!("{lost} journal records were lost: writing failed");
        assert!(matches!(&records[10 - lost as usize], Record::Warning { text, .. } if *text == note));
    }

    #[test]
    fn what_steps_drew_is_written_once_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let drawn = |step| Record::Drawn {
            begun_us: Some(5),
            session: 1,
            step,
            samples: vec![(step, 1)],
            tokens_xxh3: 7,
        };
        let of = |all: Vec<Record>| -> Vec<u64> {
            let steps = all
                .into_iter()
                .filter_map(|r| if let Record::Drawn { step, .. } = r { Some(step) } else { None });
            steps.collect()
        };
        let mut journal = Journal::open(dir.path(), 0).unwrap();
        journal.room = Some(200);
        let errors = (1..=9).filter(|i| journal.write(&drawn(*i)).is_err()).count();
        assert_eq!((errors, journal.lost()), (1, 0));
        assert!(of(read(journal.path()).unwrap()).len() < 9);
        journal.write(&step(9, 1.0)).unwrap();
        assert_eq!(journal.lost(), 1, "of other records one is not worth the memory");
        journal.room = Some(500);
        journal.write(&drawn(10)).unwrap();
        journal.room = None;
        journal.write(&drawn(11)).unwrap();
        assert_eq!(of(read(journal.path()).unwrap()), (1..=11).collect::<Vec<_>>());
        // A rank that goes writes what it has left.
        journal.room = Some(0);
        let _ = journal.write(&drawn(12));
        journal.room = None;
        drop(journal);
        assert_eq!(of(read(&path(dir.path(), 0)).unwrap()), (1..=12).collect::<Vec<_>>());
    }

    #[test]
    fn a_torn_line_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(dir.path(), 3);
        Journal::open(dir.path(), 3).unwrap().write(&step(1, 1.0)).unwrap();
        for torn in [b"{\"kind\":\"st".to_vec(), vec![0; 200_000], Vec::new()] {
            let before = fs::metadata(&path).unwrap().len();
            OpenOptions::new().append(true).open(&path).unwrap().write_all(&torn).unwrap();
            let mut journal = Journal::open(dir.path(), 3).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().len(), before);
            journal.write(&step(2, 2.0)).unwrap();
        }
        assert_eq!(read(&path).unwrap().len(), 4);
    }

    #[test]
    fn a_new_segment_keeps_the_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Journal::open(dir.path(), 0).unwrap();
        assert!(!open().has_earlier());
        assert!(!open().has_earlier(), "nothing was written: still new");
        open().write(&step(1, 1.0)).unwrap();
        let mut second = open();
        assert!(second.has_earlier());
        second.write(&step(1, 2.0)).unwrap();
        assert_eq!(read(second.path()).unwrap(), [step(1, 1.0), step(1, 2.0)]);
    }
}
