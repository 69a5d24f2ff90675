//! TensorBoard event files: scalars and text.
//!
//! A file is a sequence of records, each framed as length (u64), masked CRC-32C of the length, data, masked CRC-32C of
//! the data, all little-endian; the data are `Event` protobufs. The messages (tensorflow/core/util/event.proto and
//! framework/summary.proto) are few enough to be written by hand, which keeps protoc out of the build.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::crc32c::masked;
use crate::record::{Record, Step};

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter<W = File> {
    out: W,
    path: PathBuf,
    frame: Vec<u8>,
}

impl EventWriter {
    /// Starts a new event file in `dir`, which is made if need be. TensorBoard reads all event files of a directory as one
    /// run, in the order of the time in their names; a resumed run starts another file.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(dir: &Path, time_us: u64, host: &str, rank: usize) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| {
            Error::io("create directory", dir, &e)
                .hint("move away what has its name, or set run.dir to a writable place")
        })?;
        let host: String =
            host.chars().map(|c| if c.is_alphanumeric() || c == '-' { c } else { '_' }).collect();
        let seconds = time_us / 1_000_000;
        // The counter keeps two starts within a second apart.
        for attempt in 0..1000 {
            let path = dir.join(format!("events.out.tfevents.{seconds:010}.{host}.{rank}.{attempt}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return EventWriter::new(file, path, time_us),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io("create event file", &path, &e)),
            }
        }
        Err(Error::failure(format!(
            "create event file in {}: a thousand of this second exist",
            dir.display()
        )))
    }
}

impl<W: Write> EventWriter<W> {
    fn new(out: W, path: PathBuf, time_us: u64) -> Result<Self> {
        let mut writer = EventWriter { out, path, frame: Vec::new() };
        writer.event(time_us, None, |e| e.bytes(event::FILE_VERSION, b"brain.Event:2"))?;
        Ok(writer)
    }

    /// One point of the curve `tag`.
    ///
    /// # Errors
    /// When writing fails.
    pub fn scalar(&mut self, time_us: u64, step: u64, tag: &str, value: f64) -> Result<()> {
        self.scalars(time_us, step, &[(tag, value)])
    }

    /// Points of several curves at once.
    ///
    /// # Errors
    /// When writing fails.
    pub fn scalars(&mut self, time_us: u64, step: u64, values: &[(&str, f64)]) -> Result<()> {
        self.event(time_us, Some(step), |e| {
            e.message(event::SUMMARY, |summary| {
                for (tag, value) in values {
                    summary.message(summary::VALUE, |v| {
                        v.bytes(value::TAG, tag.as_bytes());
                        v.float(value::SIMPLE_VALUE, *value as f32);
                    });
                }
            });
        })
    }

    /// A text (Markdown) under `tag`.
    ///
    /// # Errors
    /// When writing fails.
    pub fn text(&mut self, time_us: u64, step: u64, tag: &str, text: &str) -> Result<()> {
        self.event(time_us, Some(step), |e| {
            e.message(event::SUMMARY, |summary| {
                summary.message(summary::VALUE, |v| {
                    v.bytes(value::TAG, tag.as_bytes());
                    v.message(value::TENSOR, |t| {
                        t.varint(tensor::DTYPE, tensor::DT_STRING);
                        t.message(tensor::SHAPE, |s| {
                            s.message(tensor::DIM, |d| d.varint(tensor::DIM_SIZE, 1))
                        });
                        t.bytes(tensor::STRING_VAL, text.as_bytes());
                    });
                    v.message(value::METADATA, |m| {
                        m.message(metadata::PLUGIN, |p| p.bytes(metadata::PLUGIN_NAME, b"text"));
                        m.varint(metadata::DATA_CLASS, metadata::DATA_CLASS_TENSOR);
                    });
                });
            });
        })
    }

    /// Says that training goes on after `step`: points of later steps in earlier files are void.
    ///
    /// # Errors
    /// When writing fails.
    pub fn resumed(&mut self, time_us: u64, step: u64) -> Result<()> {
        self.event(time_us, Some(step + 1), |e| {
            e.message(event::SESSION_LOG, |s| s.varint(session_log::STATUS, session_log::START));
        })
    }

    /// Writes what a record has to show; many have nothing.
    ///
    /// # Errors
    /// When writing fails.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        match record {
            Record::Step(s) => {
                let Step { time_us, step, loss, grad_norm, lr, tokens_per_s, mfu, step_s, mtp_loss, .. } = s;
                let mut values = vec![
                    ("train/loss", *loss),
                    ("train/grad_norm", *grad_norm),
                    ("train/lr", *lr),
                    ("speed/tokens_per_s", *tokens_per_s),
                    ("speed/step_s", *step_s),
                ];
                values.extend(mfu.map(|mfu| ("speed/mfu", mfu)));
                values.extend(mtp_loss.map(|loss| ("train/mtp_loss", loss)));
                self.scalars(*time_us, *step, &values)
            }
            Record::Eval { time_us, step, loss, average_loss, .. } => {
                let average = average_loss.map(|loss| ("eval/average_loss", loss));
                let values: Vec<_> = [("eval/loss", *loss)].into_iter().chain(average).collect();
                self.scalars(*time_us, *step, &values)
            }
            Record::Sample { time_us, step, text } => {
                // Indented, Markdown shows it as it is.
                let text: String = text.lines().map(|line| format!("    {line}\n")).collect();
                self.text(*time_us, *step, "sample", &text)
            }
            Record::Resumed { time_us, step, .. }
            | Record::Recovered { time_us, step, .. }
            | Record::Trouble { time_us, back_to: Some(step), .. } => self.resumed(*time_us, *step),
            _ => Ok(()),
        }
    }

    fn event(&mut self, time_us: u64, step: Option<u64>, fill: impl FnOnce(&mut Message)) -> Result<()> {
        let mut message = Message::default();
        message.double(event::WALL_TIME, time_us as f64 / 1e6);
        if let Some(step) = step {
            message.varint(event::STEP, step);
        }
        fill(&mut message);
        let length = (message.0.len() as u64).to_le_bytes();
        self.frame.clear();
        self.frame.extend(length);
        self.frame.extend(masked(&length).to_le_bytes());
        self.frame.extend(&message.0);
        self.frame.extend(masked(&message.0).to_le_bytes());
        let written = self.out.write_all(&self.frame).and_then(|()| self.out.flush());
        written.map_err(|e| Error::io("write event file", &self.path, &e))
    }
}

/// A protobuf message being encoded.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn varint(&mut self, field: u64, v: u64) {
        self.key(field, 0);
        self.raw_varint(v);
    }

    fn double(&mut self, field: u64, v: f64) {
        self.key(field, 1);
        self.0.extend(v.to_le_bytes());
    }

    fn float(&mut self, field: u64, v: f32) {
        self.key(field, 5);
        self.0.extend(v.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, v: &[u8]) {
        self.key(field, 2);
        self.raw_varint(v.len() as u64);
        self.0.extend(v);
    }

    fn message(&mut self, field: u64, fill: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        fill(&mut inner);
        self.bytes(field, &inner.0);
    }
}

// Field numbers, named as in the .proto files.
mod event {
    pub(super) const WALL_TIME: u64 = 1;
    pub(super) const STEP: u64 = 2;
    pub(super) const FILE_VERSION: u64 = 3;
    pub(super) const SUMMARY: u64 = 5;
    pub(super) const SESSION_LOG: u64 = 7;
}
mod session_log {
    pub(super) const STATUS: u64 = 1;
    pub(super) const START: u64 = 1;
}
mod summary {
    pub(super) const VALUE: u64 = 1;
}
mod value {
    pub(super) const TAG: u64 = 1;
    pub(super) const SIMPLE_VALUE: u64 = 2;
    pub(super) const TENSOR: u64 = 8;
    pub(super) const METADATA: u64 = 9;
}
mod tensor {
    pub(super) const DTYPE: u64 = 1;
    pub(super) const DT_STRING: u64 = 7;
    pub(super) const SHAPE: u64 = 2;
    pub(super) const DIM: u64 = 2;
    pub(super) const DIM_SIZE: u64 = 1;
    pub(super) const STRING_VAL: u64 = 8;
}
mod metadata {
    pub(super) const PLUGIN: u64 = 1;
    pub(super) const PLUGIN_NAME: u64 = 1;
    pub(super) const DATA_CLASS: u64 = 4;
    pub(super) const DATA_CLASS_TENSOR: u64 = 2;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crc32c::crc32c;
    use crate::record::tests::step;

    /// Payloads of the records, framing checked.
    fn frames(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let unmask =
            |m: &[u8]| u32::from_le_bytes(m.try_into().unwrap()).wrapping_sub(0xa282_ead8).rotate_left(15);
        while !bytes.is_empty() {
            let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(unmask(&bytes[8..12]), crc32c(&bytes[..8]));
            assert_eq!(unmask(&bytes[12 + n..16 + n]), crc32c(&bytes[12..12 + n]));
            found.push(bytes[12..12 + n].to_vec());
            bytes = &bytes[16 + n..];
        }
        found
    }

    /// (field, payload) of a protobuf message; varints as eight little-endian bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut v = 0;
            for shift in (0..).step_by(7) {
                let b = bytes[0];
                *bytes = &bytes[1..];
                v |= u64::from(b & 0x7f) << shift;
                if b < 0x80 {
                    break;
                }
            }
            v
        }
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let n = match key & 7 {
                0 => {
                    found.push((key >> 3, varint(&mut bytes).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                2 => varint(&mut bytes) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            found.push((key >> 3, bytes[..n].to_vec()));
            bytes = &bytes[n..];
        }
        found
    }

    fn field(message: &[u8], number: u64) -> Vec<u8> {
        fields(message).into_iter().find(|(f, _)| *f == number).unwrap_or_else(|| panic!("field {number}")).1
    }

    fn write(fill: impl FnOnce(&mut EventWriter<Vec<u8>>)) -> Vec<u8> {
        let mut writer = EventWriter::new(Vec::new(), "e".into(), 1_500_000).unwrap();
        fill(&mut writer);
        writer.out
    }

    #[test]
    fn a_step_is_a_point_of_every_curve() {
        let frames = frames(&write(|w| w.record(&step(300, f64::NAN)).unwrap()));
        assert_eq!(field(&frames[0], event::FILE_VERSION), b"brain.Event:2");
        assert_eq!(field(&frames[0], event::WALL_TIME), 1.5f64.to_le_bytes());
        assert_eq!(field(&frames[1], event::STEP), 300u64.to_le_bytes());
        let values = fields(&field(&frames[1], event::SUMMARY));
        let tags: Vec<String> =
            values.iter().map(|(_, v)| String::from_utf8(field(v, value::TAG)).unwrap()).collect();
        assert_eq!(
            tags,
            ["train/loss", "train/grad_norm", "train/lr", "speed/tokens_per_s", "speed/step_s", "speed/mfu"]
        );
        let lr = field(&values[2].1, value::SIMPLE_VALUE);
        assert_eq!(lr, 3e-4f32.to_le_bytes());
        let loss = field(&values[0].1, value::SIMPLE_VALUE);
        assert!(f32::from_le_bytes(loss.try_into().unwrap()).is_nan());
    }

    /// The same four events as written by tensorboard 2.21.0 (its `RecordWriter` over its own `Event` messages).
    const GOLDEN: &str = concat!(
        "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c",
        "2100000000000000017becf609000000000000024010ac022a130a110a0a747261696e2f6c6f7373",
        "1500002040d3a123993200000000000000241956ec09000000000000084010ad022a240a220a0673",
        "616d706c65420c0807120412020801420268694a0a0a060a04746578742002cd2525831000000000",
        "00000095fbfe1809000000000000104010ad023a020801257e5d51",
    );

    #[test]
    fn bytes_are_those_of_tensorboard() {
        let bytes = write(|w| {
            w.scalar(2_250_000, 300, "train/loss", 2.5).unwrap();
            w.text(3_000_000, 301, "sample", "hi").unwrap();
            w.resumed(4_000_000, 300).unwrap();
        });
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, GOLDEN);
    }

    #[test]
    fn files_of_one_second_are_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            EventWriter::create(&dir.path().join("tb"), 5_000_000, "a/b", 1).unwrap();
        }
        let mut names: Vec<_> =
            fs::read_dir(dir.path().join("tb")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(
            names,
            ["events.out.tfevents.0000000005.a_b.1.0", "events.out.tfevents.0000000005.a_b.1.1"]
        );
    }
}
