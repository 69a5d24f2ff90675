//! Compressed text, told by its first bytes.

use std::io::{self, BufRead, BufReader, Error, Read};

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// How a file's bytes become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
    /// A format that is known and not read: its name, and what to do.
    Foreign(&'static str, &'static str),
}

const PARQUET: &str = "convert it to JSON lines first, in Python: import pandas as pd; pd.read_parquet(\"FILE.parquet\")[[\"text\"]].to_json(\"FILE.jsonl\", orient=\"records\", lines=True)";
const UNPACK: &str = "unpack it first; gzip and zstd are read as they are";
const FOREIGN: [(&[u8], &str, &str); 8] = [
    (b"PAR1", "a Parquet file", PARQUET),
    (b"ARROW1", "an Arrow file", "convert it to JSON lines first"),
    (b"\xfd7zXZ\0", "compressed with xz", UNPACK),
    (b"BZh", "compressed with bzip2", UNPACK),
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"\x04\x22\x4d\x18", "compressed with lz4", UNPACK),
    (b"MMIDIDX\0", "an index of tokens", "train on its data with --set data.prefix=PREFIX"),
    (b"%PDF-", "a PDF", "extract its text first"),
];
/// A small file that declares a large window is not believed.
const WINDOW_BYTES: (u64, u64) = (8 << 20, 128 << 20);
/// No text is packed tighter than this over a window.
const RATIO_MAX: u64 = 1024;

impl Packing {
    /// Tells the packing from the first bytes of a file.
    pub(crate) fn of(start: &[u8]) -> Packing {
        let skippable = start.len() >= 4 && (start[0] & 0xf0) == 0x50 && start[1..4] == *b"\x2a\x4d\x18";
        if start.starts_with(b"\x1f\x8b") {
            Packing::Gzip
        } else if start.starts_with(b"\x28\xb5\x2f\xfd") || skippable {
            Packing::Zstd
        } else {
            let found = FOREIGN.iter().find(|(magic, ..)| start.starts_with(magic));
            found.map_or(Packing::Plain, |&(_, what, hint)| Packing::Foreign(what, hint))
        }
    }

    /// The text of a file of `bytes` bytes.
    pub(crate) fn unpack<'a>(self, file: impl Read + Send + 'a, bytes: u64) -> Box<dyn Read + Send + 'a> {
        match self {
            Packing::Gzip => Box::new(MultiGzDecoder::new(file)),
            Packing::Zstd => Box::new(Zstd::new(BufReader::with_capacity(64 << 10, file), bytes)),
            Packing::Plain | Packing::Foreign(..) => Box::new(file),
        }
    }
}

/// Reads zstd frames one after another.
struct Zstd<R> {
    source: R,
    window_bytes_max: u64,
    frame: Option<Box<FrameDecoder>>,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R, bytes: u64) -> Self {
        let (least, most) = WINDOW_BYTES;
        Zstd { source, window_bytes_max: bytes.saturating_mul(RATIO_MAX).clamp(least, most), frame: None }
    }

    /// Begins the next frame, if there is one. A new decoder takes memory as blocks come; one that is used again would
    /// reserve the window that the frame declares.
    fn begin(&mut self) -> io::Result<Option<Box<FrameDecoder>>> {
        while !self.source.fill_buf()?.is_empty() {
            let mut decoder = Box::new(FrameDecoder::new());
            decoder.set_max_window_size(self.window_bytes_max);
            match decoder.reset(&mut self.source) {
                Ok(()) => return Ok(Some(decoder)),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    io::copy(&mut (&mut self.source).take(u64::from(length)), &mut io::sink())?;
                }
                Err(e) => return Err(Error::other(e)),
            }
        }
        Ok(None)
    }
}

fn check_sum(decoder: &FrameDecoder) -> io::Result<()> {
    match (decoder.get_checksum_from_data(), decoder.get_calculated_checksum()) {
        (Some(stored), Some(found)) if stored != found => Err(Error::other("checksum does not match")),
        _ => Ok(()),
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None => match self.begin()? {
                    Some(frame) => frame,
                    None => return Ok(0),
                },
            };
            while frame.can_collect() == 0 && !frame.is_finished() {
                frame
                    .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                    .map_err(Error::other)?;
            }
            let read = frame.read(out)?;
            if read > 0 || out.is_empty() {
                self.frame = Some(frame);
                return Ok(read);
            }
            check_sum(&frame)?;
        }
    }
}
