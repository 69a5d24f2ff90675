//! The safetensors container: an eight-byte little-endian length, a JSON header, the tensors end to end.
//! <https://huggingface.co/docs/safetensors/index>
//!
//! Written and read here so that files stream: the `safetensors` crate wants all bytes in memory.

use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use spec::{Error, Result};

use crate::input::{self, shown};

/// The limit that the reference implementation sets, so that a damaged length does not ask for terabytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor to be written.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
}

/// Length and header for tensors that follow in this order, padded so that data start at a multiple of eight.
pub(crate) fn encode(entries: &[Entry]) -> Vec<u8> {
    // Readers of PyTorch models insist on the format.
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut start = 0;
    for e in entries {
        let end = start + e.bytes;
        let name = serde_json::to_string(&e.name).expect("text is JSON");
        let (dtype, shape) = (e.dtype, &e.shape);
        json += &format!(r#",{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#);
        start = end;
    }
    json.push('}');
    json.extend(std::iter::repeat_n(' ', json.len().next_multiple_of(8) - json.len()));
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json.into_bytes());
    bytes
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Info {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// First and end byte, from the end of the header.
    data_offsets: (u64, u64),
}

/// The parsed and checked header of a file.
#[derive(Debug)]
pub(crate) struct Header {
    /// Where tensor data start in the file.
    data_start: u64,
    pub(crate) tensors: BTreeMap<String, Info>,
}

impl Header {
    /// Offset of a tensor's data from the start of the file.
    pub(crate) fn offset(&self, info: &Info) -> u64 {
        self.data_start + info.data_offsets.0
    }

    /// Reads and checks the header: every tensor's shape fits its bytes, and tensors tile the file to its end.
    ///
    /// # Errors
    /// When the file cannot be read, is cut short or contradicts itself.
    pub(crate) fn read(file: &File, path: &Path) -> Result<Self> {
        let io = |e: std::io::Error| Error::io("read", path, &e);
        let file_bytes = file.metadata().map_err(io)?.len();
        Self::read_with(file_bytes, path, |range| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, range.start).map_err(io)?;
            if range.start == 0 && input::is_lfs_pointer(file) {
                return Err(input::lfs_pointer(path));
            }
            Ok(bytes)
        })
    }

    /// The same of a file of `file_bytes` bytes, whose bytes `read` gives.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub(crate) fn read_with(
        file_bytes: u64,
        path: &Path,
        mut read: impl FnMut(Range<u64>) -> Result<Vec<u8>>,
    ) -> Result<Self> {
        const LENGTH: u64 = size_of::<u64>() as u64;
        let damaged =
            |why: String| Error::user(format!("safetensors file {} is damaged: {why}", path.display()));
        if file_bytes < LENGTH {
            return Err(damaged(format!("{file_bytes} bytes are too short for a header")));
        }
        let length = read(0..LENGTH)?.try_into().map_or(0, u64::from_le_bytes);
        if length > MAX_HEADER_BYTES || length > file_bytes - LENGTH {
            return Err(damaged(format!("a header of {length} bytes in a file of {file_bytes}")));
        }
        let data_start = LENGTH + length;
        let json = read(LENGTH..data_start)?;
        let tensors = parse(&json, file_bytes - data_start).map_err(damaged)?;
        Ok(Header { data_start, tensors })
    }
}

/// The tensors that a header lists, whose data take `data_bytes`.
pub(crate) fn parse(json: &[u8], data_bytes: u64) -> Result<BTreeMap<String, Info>, String> {
    let Tensors(tensors) = serde_json::from_slice(json).map_err(|e| format!("header: {e}"))?;
    check(&tensors, data_bytes)?;
    Ok(tensors)
}

/// Tensors by name; what else the header says of the file is skipped.
#[derive(Default)]
struct Tensors(BTreeMap<String, Info>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Tensors::default())
    }
}

impl<'de> Visitor<'de> for Tensors {
    type Value = Tensors;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Tensors, A::Error> {
        while let Some(name) = entries.next_key::<String>()? {
            if name == "__metadata__" {
                entries.next_value::<IgnoredAny>()?;
                continue;
            }
            match self.0.entry(name) {
                btree_map::Entry::Vacant(free) => free.insert(entries.next_value()?),
                btree_map::Entry::Occupied(there) => {
                    let name = shown(there.key());
                    return Err(A::Error::custom(format_args!("tensor {name} is there twice")));
                }
            };
        }
        Ok(self)
    }
}

fn check(tensors: &BTreeMap<String, Info>, data_bytes: u64) -> Result<(), String> {
    let mut by_start: Vec<(&String, &Info)> = tensors.iter().collect();
    by_start.sort_by_key(|(_, t)| t.data_offsets);
    let mut end = 0;
    for (name, info) in by_start {
        let (start, stop) = info.data_offsets;
        if start != end || stop < start {
            let name = shown(name);
            return Err(format!("tensor {name} lies at bytes {start}..{stop}, expected to start at {end}"));
        }
        let elements = info.shape.iter().try_fold(1u64, |a, d| a.checked_mul(*d as u64));
        let expected = elements.zip(element_bytes(&info.dtype)).map(|(n, size)| n.checked_mul(size));
        if elements.is_none() || expected.is_some_and(|bytes| bytes != Some(stop - start)) {
            let (name, dtype, shape) = (shown(name), shown(&info.dtype), dims(&info.shape));
            return Err(format!("tensor {name} of {dtype} {shape} has {} bytes", stop - start));
        }
        end = stop;
    }
    if end != data_bytes {
        let how = if data_bytes < end { "cut short" } else { "too long" };
        return Err(format!("{how}: {data_bytes} bytes of tensors, the header says {end}"));
    }
    Ok(())
}

/// A shape as a message shows it: a damaged one may be long.
pub(crate) fn dims(shape: &[usize]) -> String {
    const SHOWN: usize = 8;
    let more = if shape.len() > SHOWN { ", ..." } else { "" };
    let dims: Vec<String> = shape.iter().take(SHOWN).map(usize::to_string).collect();
    format!("[{}{more}]", dims.join(", "))
}

/// Bytes of one element; `None` for a type that this code has not heard of, whose size is then not checked.
fn element_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "F64" | "I64" | "U64" => Some(8),
        "F32" | "I32" | "U32" => Some(4),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "I8" | "U8" | "BOOL" | "F8_E4M3" => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, dtype: &'static str, shape: &[usize], bytes: usize) -> Entry {
        Entry { name: name.into(), dtype, shape: shape.into(), bytes }
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        Header::read(&File::open(&path).unwrap(), &path)
    }

    fn sample() -> Vec<u8> {
        let mut bytes = encode(&[entry("b \"q\" ü", "F32", &[2, 1], 8), entry("a", "BF16", &[3], 6)]);
        assert_eq!(bytes.len() % 8, 0);
        bytes.extend(0..14u8);
        bytes
    }

    #[test]
    fn the_reference_reader_agrees() {
        let bytes = sample();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("b \"q\" ü").unwrap().shape(), [2, 1]);
        assert_eq!(theirs.tensor("a").unwrap().data(), [8, 9, 10, 11, 12, 13]);
        let ours = read(&bytes).unwrap();
        let a = &ours.tensors["a"];
        assert_eq!((ours.offset(a) as usize, a.dtype.as_str()), (bytes.len() - 6, "BF16"));
    }

    #[test]
    fn the_reference_writer_is_read() {
        let data = [0u8; 24];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &data).unwrap();
        let bytes = safetensors::serialize([("w", view)], None).unwrap();
        assert_eq!(read(&bytes).unwrap().tensors["w"].shape, [2, 3]);
    }

    #[track_caller]
    fn check_damage(bytes: &[u8], expected: &str) {
        let error = read(bytes).expect_err("damaged");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{error}");
    }

    #[test]
    fn damage_is_named() {
        let good = sample();
        check_damage(&good[..5], "5 bytes are too short");
        check_damage(&good[..30], "in a file of 30");
        check_damage(&good[..good.len() - 1], "cut short: 13 bytes of tensors, the header says 14");
        check_damage(&[good.clone(), vec![0]].concat(), "too long");
        let mut huge = good.clone();
        huge[7] = 0x7f;
        check_damage(&huge, "a header of");
        let mut text = good.clone();
        text[8] = b'[';
        check_damage(&text, "header:");
        let lying = [encode(&[entry("w", "F32", &[2, 2], 12)]), vec![0; 12]].concat();
        check_damage(&lying, "tensor w of F32 [2, 2] has 12 bytes");
        let wide = [encode(&[entry("w", "F32", &[usize::MAX, 3], 12)]), vec![0; 12]].concat();
        check_damage(&wide, "tensor w");
    }
}
