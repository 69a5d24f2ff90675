use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use spec::{DType, Error, Result};
use xxhash_rust::xxh3::xxh3_64;

use crate::header::dims;
use crate::input::shown;
use crate::region::{Gap, Region, check_cover, matrix};

/// File name of the manifest; a directory without it is no checkpoint.
pub(crate) const MANIFEST: &str = "manifest.json";

const FORMAT: &str = "phalanx-checkpoint";
const VERSION: u32 = 1;

/// Bytes under one checksum: small enough to read a slice cheaply, large enough that checksums cost no space.
pub(crate) const CHUNK_BYTES: usize = 4 << 20;

/// A chunk is held in memory whole to be checked, so a file does not get to say how much that is.
const MAX_CHUNK_BYTES: usize = 16 * CHUNK_BYTES;

/// Which of a parameter's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The float32 master weight.
    Param,
    /// AdamW's first moment.
    ExpAvg,
    /// AdamW's second moment.
    ExpAvgSq,
    /// The average of the weights over steps.
    Ema,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 4] = [Kind::Param, Kind::ExpAvg, Kind::ExpAvgSq, Kind::Ema];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Param => "param",
            Kind::ExpAvg => "exp_avg",
            Kind::ExpAvgSq => "exp_avg_sq",
            Kind::Ema => "ema",
        })
    }
}

/// What a checkpoint says beside its tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Fingerprint of everything that defines the numbers of the run; a resume compares it.
    pub fingerprint: String,
    /// Ranks that wrote it. Any other number may read it.
    pub world: usize,
    /// Sampler, schedule, generator and whatever else a resume needs. JSON has no NaN or infinity: encode them as text.
    pub state: serde_json::Value,
}

/// The contents of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Wire")]
pub struct Manifest {
    format: String,
    version: u32,
    /// xxh3-64 of this file's text with these sixteen digits zero.
    checksum: String,
    /// Optimiser steps done.
    pub step: u64,
    /// What the run says beside its tensors.
    #[serde(flatten)]
    pub meta: Meta,
    /// The data files.
    pub files: Vec<FileEntry>,
    /// Every logical tensor, in the order in which the ranks wrote them.
    pub tensors: Vec<TensorEntry>,
}

/// The keys of a manifest as they are read: flattened ones would first gather whatever else a file holds.
#[derive(Deserialize)]
struct Wire {
    format: String,
    version: u32,
    checksum: String,
    step: u64,
    tokens: u64,
    fingerprint: String,
    world: usize,
    #[serde(deserialize_with = "spec::small_json")]
    state: serde_json::Value,
    files: Vec<FileEntry>,
    tensors: Vec<TensorEntry>,
}

impl From<Wire> for Manifest {
    fn from(w: Wire) -> Self {
        let Wire { format, version, checksum, step, tokens, fingerprint, world, state, files, tensors } = w;
        let meta = Meta { tokens, fingerprint, world, state };
        Manifest { format, version, checksum, step, meta, files, tensors }
    }
}

/// One data file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    /// File name inside the checkpoint directory.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Bytes under one checksum; the last chunk may be shorter.
    pub chunk_bytes: usize,
    /// xxh3-64 of each chunk, as sixteen hexadecimal digits.
    #[serde(with = "hex")]
    pub checksums: Vec<u64>,
}

/// One logical tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Logical name, for example `layers.3.attn.q.weight`.
    pub name: String,
    /// Which of the parameter's tensors.
    pub kind: Kind,
    /// Element type on disk.
    pub dtype: DType,
    /// Global shape.
    pub shape: Vec<usize>,
    /// Where the parts lie; together they hold every element exactly once.
    pub pieces: Vec<PieceEntry>,
}

/// One stored part of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PieceWire")]
pub struct PieceEntry {
    /// Index into the manifest's files.
    pub file: usize,
    /// Name inside the safetensors file.
    pub key: String,
    /// Offset in bytes from the start of the file.
    pub offset: u64,
    /// Which part of the tensor, row-major.
    #[serde(flatten)]
    pub region: Region,
}

#[derive(Deserialize)]
struct PieceWire {
    file: usize,
    key: String,
    offset: u64,
    range: Option<RangeWire>,
    r#box: Option<BoxWire>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeWire {
    start: usize,
    len: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BoxWire {
    row0: usize,
    rows: usize,
    col0: usize,
    cols: usize,
}

impl TryFrom<PieceWire> for PieceEntry {
    type Error = &'static str;

    fn try_from(w: PieceWire) -> Result<Self, &'static str> {
        let region = match (w.range, w.r#box) {
            (Some(RangeWire { start, len }), None) => Region::range(start, len),
            (None, Some(BoxWire { row0, rows, col0, cols })) => Region::rect(row0, rows, col0, cols),
            _ => return Err("a piece is either a range or a box"),
        };
        Ok(PieceEntry { file: w.file, key: w.key, offset: w.offset, region })
    }
}

impl Manifest {
    pub(crate) fn new(step: u64, meta: Meta, files: Vec<FileEntry>, tensors: Vec<TensorEntry>) -> Self {
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            checksum: hex::ZERO.into(),
            step,
            meta,
            files,
            tensors,
        }
    }

    /// The tensor of this name and kind. Linear; [`crate::Checkpoint`] keeps an index.
    pub fn tensor(&self, name: &str, kind: Kind) -> Option<&TensorEntry> {
        self.tensors.iter().find(|t| t.name == name && t.kind == kind)
    }

    /// The text of the file, checksum included.
    pub(crate) fn to_text(&self) -> Result<String> {
        debug_assert_eq!(self.checksum, hex::ZERO);
        let text = serde_json::to_string(self)
            .map_err(|e| Error::failure(format!("write manifest of step {}: {e}", self.step)))?;
        let at =
            checksum_at(&text).ok_or_else(|| Error::failure("write manifest: checksum field not found"))?;
        Ok(format!("{}{}{}", &text[..at], hex::digits(xxh3_64(text.as_bytes())), &text[at + hex::DIGITS..]))
    }

    /// Parses and checks everything that the manifest alone can show.
    pub(crate) fn from_text(text: &str, path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
            checksum: String,
        }
        let damaged =
            |why: String| Error::user(format!("checkpoint manifest {} is damaged: {why}", path.display()));
        let head: Head = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
        if head.format != FORMAT || head.version != VERSION {
            return Err(Error::user(format!(
                "checkpoint manifest {} has format \"{}\" version {}, expected \"{FORMAT}\" version {VERSION}",
                path.display(),
                shown(&head.format),
                head.version
            ))
            .hint("read it with the Phalanx version that wrote it"));
        }
        let at = checksum_at(text).ok_or_else(|| damaged("it has no checksum".into()))?;
        let zeroed = format!("{}{}{}", &text[..at], hex::ZERO, &text[at + hex::DIGITS..]);
        let found = hex::digits(xxh3_64(zeroed.as_bytes()));
        if found != head.checksum {
            return Err(damaged(format!("checksum {found}, expected {}", shown(&head.checksum))));
        }
        let manifest: Manifest = serde_json::from_str(text).map_err(|e| damaged(e.to_string()))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// Every element of every tensor is stored exactly once, inside its file.
    pub(crate) fn check(&self) -> Result<(), String> {
        for file in &self.files {
            let plain =
                !file.name.is_empty() && !file.name.starts_with('.') && !file.name.contains(['/', '\\']);
            if !plain {
                return Err(format!("file name \"{}\" is not a plain name", shown(&file.name)));
            }
            if file.chunk_bytes > MAX_CHUNK_BYTES {
                return Err(format!(
                    "file {} has a checksum for each {} bytes, expected at most {MAX_CHUNK_BYTES}",
                    shown(&file.name),
                    file.chunk_bytes
                ));
            }
            let chunks = file.bytes.div_ceil(file.chunk_bytes.max(1) as u64);
            if file.chunk_bytes == 0 || file.checksums.len() as u64 != chunks {
                return Err(format!(
                    "file {} of {} bytes has {} checksums of {} bytes",
                    shown(&file.name),
                    file.bytes,
                    file.checksums.len(),
                    file.chunk_bytes
                ));
            }
        }
        let mut seen = HashMap::new();
        for tensor in &self.tensors {
            if seen.insert((tensor.kind, tensor.name.as_str()), ()).is_some() {
                return Err(format!("tensor {} {} is listed twice", tensor.kind, shown(&tensor.name)));
            }
            self.check_tensor(tensor)
                .map_err(|why| format!("tensor {} {}: {why}", tensor.kind, shown(&tensor.name)))?;
        }
        Ok(())
    }

    fn check_tensor(&self, tensor: &TensorEntry) -> Result<(), String> {
        if tensor.dtype != DType::F32 {
            return Err(format!("element type {}, expected f32", tensor.dtype));
        }
        let (rows, cols) =
            matrix(&tensor.shape).ok_or_else(|| format!("shape {} is too large", dims(&tensor.shape)))?;
        let regions: Vec<Region> = tensor.pieces.iter().map(|p| p.region).collect();
        let at = |i: usize| {
            let piece: &PieceEntry = &tensor.pieces[i];
            let file = self.files.get(piece.file).map_or("an unknown file".to_owned(), |f| shown(&f.name));
            format!("{} in {file}", piece.region)
        };
        check_cover(rows, cols, &regions).map_err(|gap| match gap {
            Gap::Outside(i) => format!("{} reach outside of shape {}", at(i), dims(&tensor.shape)),
            Gap::Twice(i, j) => format!("written twice: {} and {}", at(i), at(j)),
            Gap::Missing(n) => format!("{n} of {} elements are written nowhere", rows * cols),
        })?;
        for (i, piece) in tensor.pieces.iter().enumerate() {
            let bytes = (piece.region.len() * size_of::<f32>()) as u64;
            let end = piece.offset.checked_add(bytes);
            let room = self.files.get(piece.file).map_or(0, |f| f.bytes);
            if end.is_none_or(|end| end > room) {
                return Err(format!("{} reach beyond the end of the file", at(i)));
            }
        }
        Ok(())
    }
}

/// Where the checksum's digits start: the third field of the file.
fn checksum_at(text: &str) -> Option<usize> {
    const FIELD: &str = "\"checksum\":\"";
    let at = text.find(FIELD)? + FIELD.len();
    text.get(at..at + hex::DIGITS)?.is_ascii().then_some(at)
}

/// The key of a piece inside its safetensors file: the plain name where the piece is the whole parameter, so that other
/// readers of safetensors find what they expect.
pub(crate) fn key(name: &str, kind: Kind, shape: &[usize], region: &Region) -> String {
    let name = match kind {
        Kind::Param => name.to_owned(),
        _ => format!("{kind}.{name}"),
    };
    match *region {
        r if r == Region::whole(shape) => name,
        Region::Range { start, len } => format!("{name}@{start}+{len}"),
        Region::Box { row0, rows, col0, cols } => format!("{name}@{row0}+{rows},{col0}+{cols}"),
    }
}

/// Checksums as text: JSON numbers above 2^53 do not survive every reader.
pub(crate) mod hex {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) const DIGITS: usize = 16;
    pub(crate) const ZERO: &str = "0000000000000000";

    pub(crate) fn digits(value: u64) -> String {
        format!("{value:016x}")
    }

    pub(super) fn serialize<S: Serializer>(values: &[u64], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(values.iter().map(|v| digits(*v)))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u64>, D::Error> {
        struct Checksum(u64);

        impl<'de> Deserialize<'de> for Checksum {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <&str>::deserialize(d)?;
                let right = text.len() == DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit());
                let value = right.then(|| u64::from_str_radix(text, 16).ok()).flatten();
                value.map(Checksum).ok_or_else(|| D::Error::custom("a checksum is not sixteen digits"))
            }
        }

        Ok(Vec::<Checksum>::deserialize(d)?.into_iter().map(|c| c.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let meta =
            Meta { tokens: 5, fingerprint: "f".into(), world: 1, state: serde_json::json!({"lr": 0.1}) };
        let file = FileEntry {
            name: "a.safetensors".into(),
            bytes: 32,
            chunk_bytes: 16,
            checksums: vec![1, u64::MAX],
        };
        let piece = |start, len, offset| PieceEntry {
            file: 0,
            key: "w".into(),
            offset,
            region: Region::range(start, len),
        };
        let tensor = TensorEntry {
            name: "w".into(),
            kind: Kind::Param,
            dtype: DType::F32,
            shape: vec![2, 2],
            pieces: vec![piece(0, 3, 8), piece(3, 1, 20)],
        };
        Manifest::new(7, meta, vec![file], vec![tensor])
    }

    #[track_caller]
    fn check(change: impl FnOnce(&mut Manifest), expected: &str) {
        let mut m = manifest();
        change(&mut m);
        let error = m.check().expect_err("the change is wrong");
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn round_trip() {
        let text = manifest().to_text().unwrap();
        let back = Manifest::from_text(&text, Path::new("m")).unwrap();
        assert_eq!(Manifest { checksum: hex::ZERO.into(), ..back }, manifest());
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let text = manifest().to_text().unwrap().into_bytes();
        for i in 0..text.len() {
            for bit in 0..8 {
                let mut bad = text.clone();
                bad[i] ^= 1 << bit;
                // What is not UTF-8 is refused before.
                let Ok(bad) = std::str::from_utf8(&bad) else { continue };
                let error = Manifest::from_text(bad, Path::new("m")).expect_err("damaged");
                assert_eq!(error.exit_code(), 2);
            }
        }
        for end in 0..text.len() {
            let cut = std::str::from_utf8(&text[..end]).unwrap();
            Manifest::from_text(cut, Path::new("m")).expect_err("cut short");
        }
    }

    #[test]
    fn another_version_is_named() {
        let text = manifest().to_text().unwrap().replace("\"version\":1", "\"version\":2");
        let error = Manifest::from_text(&text, Path::new("m")).unwrap_err();
        assert!(error.to_string().contains("version 2, expected"), "{error}");
    }

    #[test]
    fn contradictions_are_named() {
        check(|m| m.tensors[0].pieces[1].region = Region::range(2, 2), "written twice");
        check(|m| m.tensors[0].pieces.truncate(1), "1 of 4 elements are written nowhere");
        check(|m| m.tensors[0].pieces[1].region = Region::range(3, 2), "reach outside of shape [2, 2]");
        check(|m| m.tensors[0].pieces[1].offset = 29, "beyond the end");
        check(|m| m.tensors[0].pieces[1].file = 1, "beyond the end");
        check(|m| m.tensors[0].pieces[1].offset = u64::MAX, "beyond the end");
        check(|m| m.tensors[0].shape = vec![usize::MAX, 3], "too large");
        check(|m| m.tensors.push(m.tensors[0].clone()), "listed twice");
        check(|m| m.files[0].name = "../x".into(), "not a plain name");
        check(|m| m.files[0].checksums.truncate(1), "has 1 checksums");
        check(
            |m| {
                m.files[0] = FileEntry {
                    bytes: 1 << 40,
                    chunk_bytes: 1 << 40,
                    checksums: vec![0],
                    ..m.files[0].clone()
                }
            },
            "a checksum for each 1099511627776 bytes, expected at most 67108864",
        );
    }
}
