//! One tensor as `torch.save` writes it: a zip archive of stored entries, `data.pkl` for the shape and `data/0` for the
//! elements. Zip: PKWARE's APPNOTE 4.3; the entries: `torch/serialization.py`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::globals::{Element, Global};
use super::pickle::{Kind, Pickle, Value};
use crate::input::shown;

const END_BYTES: u64 = 22;
const LOCATOR_BYTES: u64 = 20;
const END64_BYTES: usize = 56;
const ENTRY_BYTES: usize = 46;
const LOCAL_BYTES: u64 = 30;

/// An archive of one tensor has seven entries.
const MAX_DIRECTORY_BYTES: u64 = 16 << 10;
/// A tensor's pickle has 200.
const MAX_PICKLE_BYTES: u64 = 16 << 10;

/// What a field of 32 bits holds whose value stands in the extra field.
const ELSEWHERE: u64 = 0xffff_ffff;

/// Part of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FilePart {
    pub(crate) at: u64,
    pub(crate) len: u64,
}

impl FilePart {
    /// A part of it, if it lies inside.
    fn part(self, at: u64, len: u64) -> Result<FilePart, String> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        if inside { Ok(FilePart { at: self.at + at, len }) } else { Err("its archive is cut short".into()) }
    }

    fn read(self, file: &File, limit: u64) -> Result<Vec<u8>, String> {
        if self.len > limit {
            return Err(format!("{} bytes where at most {limit} are expected", self.len));
        }
        let mut bytes = vec![0; self.len as usize];
        file.read_exact_at(&mut bytes, self.at).map_err(|e: io::Error| e.to_string())?;
        Ok(bytes)
    }
}

/// A stored tensor, its elements still in the file.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) element: Element,
    pub(crate) shape: Vec<u64>,
    /// Elements from one index to the next, for each dim.
    pub(crate) strides: Vec<u64>,
    /// Bytes of the storage before the first element.
    pub(crate) first: usize,
    storage: Entry,
}

impl Blob {
    /// Reads what the archive at `span` says of its tensor; that all elements lie inside is checked.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn read(file: &File, span: FilePart) -> Result<Self, String> {
        let entries = directory(file, span)?;
        let find = |name: &str| entries.iter().find(|e| e.name == name.as_bytes());
        let (pickle, root) = entries
            .iter()
            .find_map(|e| Some((e, e.name.strip_suffix(b"/data.pkl")?)))
            .ok_or("its archive has no data.pkl")?;
        let root = std::str::from_utf8(root).map_err(|_| "a name that is not UTF-8")?;
        if let Some(order) = find(&format!("{root}/byteorder"))
            && order.open(file, span)?.read(file, MAX_PICKLE_BYTES)? != b"little"
        {
            return Err("its elements are not little-endian".into());
        }
        let bytes = pickle.open(file, span)?.read(file, MAX_PICKLE_BYTES)?;
        pickle.check(&bytes)?;
        let view = View::parse(&bytes).map_err(|e| format!("data.pkl: {e}"))?;
        let stored = find(&format!("{root}/data/{}", view.storage)).ok_or("its archive has no data")?;
        let storage = stored.open(file, span)?;
        let size = view.element.bytes() as u64;
        let too_far = || "its elements reach beyond its data".to_owned();
        let last = view.last().ok_or_else(too_far)?;
        let end = last.checked_mul(size).filter(|end| *end <= storage.len).ok_or_else(too_far)?;
        let first = if end == 0 { 0 } else { (view.offset * size) as usize };
        let storage = stored.clone();
        Ok(Blob { element: view.element, shape: view.shape, strides: view.strides, first, storage })
    }

    /// The bytes of the storage, against their checksum; `span` is the archive's.
    ///
    /// # Errors
    /// When they cannot be read or are not what was written.
    pub(crate) fn bytes(&self, file: &File, span: FilePart) -> Result<Vec<u8>, String> {
        let bytes = self.storage.open(file, span)?.read(file, u64::MAX)?;
        self.storage.check(&bytes)?;
        Ok(bytes)
    }
}

/// What data.pkl says.
pub(super) struct View<'a> {
    element: Element,
    storage: &'a str,
    offset: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
}

impl<'a> View<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let p = Pickle::read(bytes)?;
        if p.kind(p.root) != Some(Kind::Object(Global::RebuildTensor)) {
            return Err("it is no tensor".into());
        }
        let args = p.items(p.root).next().unwrap_or(Value::None);
        let mut args = p.items(args);
        let mut next = || args.next().unwrap_or(Value::None);
        let (id, offset, shape, strides) = (next(), next(), next(), next());
        if p.kind(id) != Some(Kind::Object(Global::Persistent)) {
            return Err("a tensor without a storage".into());
        }
        let id = p.items(id).next().unwrap_or(Value::None);
        let id: Vec<Value> = p.items(id).take(3).collect();
        let [_, Value::Global(Global::Storage(element)), storage] = id[..] else {
            return Err("a storage of an unknown type".into());
        };
        let (shape, strides) = (dims(&p, shape)?, dims(&p, strides)?);
        if shape.len() != strides.len() {
            return Err(format!("{} strides for {} dims", strides.len(), shape.len()));
        }
        Ok(View { element, storage: p.text(storage)?, offset: p.count(offset)?, shape, strides })
    }

    /// One beyond the last element; 0 if there is none.
    fn last(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut reach = self.shape.iter().zip(&self.strides);
        let last =
            reach.try_fold(self.offset, |at, (n, stride)| at.checked_add((n - 1).checked_mul(*stride)?))?;
        last.checked_add(1)
    }
}

/// Dims of tensors that are read.
pub(crate) const MAX_DIMS: usize = 8;

/// A tuple of numbers.
pub(crate) fn dims(p: &Pickle<'_>, value: Value) -> Result<Vec<u64>, String> {
    if p.kind(value) != Some(Kind::Tuple) {
        return Err("expected a shape".into());
    }
    let dims = p.items(value).take(MAX_DIMS + 1).map(|d| p.count(d)).collect::<Result<Vec<u64>, _>>()?;
    if dims.len() > MAX_DIMS { Err(format!("more than {MAX_DIMS} dims")) } else { Ok(dims) }
}

#[derive(Clone, Debug)]
struct Entry {
    name: Vec<u8>,
    bytes: u64,
    at: u64,
    crc: u32,
}

impl Entry {
    /// Where its bytes lie.
    fn open(&self, file: &File, archive: FilePart) -> Result<FilePart, String> {
        let local = archive.part(self.at, LOCAL_BYTES)?.read(file, LOCAL_BYTES)?;
        if !local.starts_with(b"PK\x03\x04") {
            return Err("an entry of its archive is not where the directory says".into());
        }
        let skip = LOCAL_BYTES + number(&local, 26, 2) + number(&local, 28, 2);
        archive.part(self.at.saturating_add(skip), self.bytes)
    }

    /// Compares the checksum. PyTorch can be told to write none.
    fn check(&self, bytes: &[u8]) -> Result<(), String> {
        let found = crc32fast::hash(bytes);
        if self.crc == found || self.crc == 0 {
            return Ok(());
        }
        let name = String::from_utf8_lossy(&self.name);
        Err(format!("{} is damaged: checksum {found:08x}, expected {:08x}", shown(&name), self.crc))
    }
}

/// The entries of an archive.
fn directory(file: &File, archive: FilePart) -> Result<Vec<Entry>, String> {
    let tail = |bytes| archive.len.checked_sub(bytes).ok_or("it is too short for an archive");
    let end = archive.part(tail(END_BYTES)?, END_BYTES)?.read(file, END_BYTES)?;
    if !end.starts_with(b"PK\x05\x06") {
        return Err("it does not end as an archive of torch.save does".into());
    }
    let (mut len, mut at) = (number(&end, 12, 4), number(&end, 16, 4));
    if at == ELSEWHERE || len == ELSEWHERE {
        let locator =
            archive.part(tail(END_BYTES + LOCATOR_BYTES)?, LOCATOR_BYTES)?.read(file, LOCATOR_BYTES)?;
        let wide =
            archive.part(number(&locator, 8, 8), END64_BYTES as u64)?.read(file, END64_BYTES as u64)?;
        if !locator.starts_with(b"PK\x06\x07") || !wide.starts_with(b"PK\x06\x06") {
            return Err("its archive has no directory".into());
        }
        (len, at) = (number(&wide, 40, 8), number(&wide, 48, 8));
    }
    let bytes = archive.part(at, len)?.read(file, MAX_DIRECTORY_BYTES)?;
    let (mut entries, mut rest) = (Vec::new(), bytes.as_slice());
    while !rest.is_empty() {
        let (entry, used) = entry(rest)?;
        entries.push(entry);
        rest = &rest[used..];
    }
    Ok(entries)
}

/// An entry of the directory, and how long it is.
fn entry(bytes: &[u8]) -> Result<(Entry, usize), String> {
    let damaged = || "the directory of its archive is damaged".to_owned();
    if bytes.len() < ENTRY_BYTES || !bytes.starts_with(b"PK\x01\x02") {
        return Err(damaged());
    }
    if number(bytes, 10, 2) != 0 {
        return Err("its archive is compressed".into());
    }
    let lengths = [28, 30, 32].map(|at| number(bytes, at, 2) as usize);
    let used = ENTRY_BYTES + lengths.iter().sum::<usize>();
    let fields = bytes.get(ENTRY_BYTES..used).ok_or_else(damaged)?;
    let (name, extra) = fields[..lengths[0] + lengths[1]].split_at(lengths[0]);
    let (stored, mut len, mut at) = (number(bytes, 20, 4), number(bytes, 24, 4), number(bytes, 42, 4));
    let mut wide = extra64(extra).chunks_exact(8).map(|b| number(b, 0, 8));
    // In this order, and only those that did not fit.
    if len == ELSEWHERE {
        len = wide.next().ok_or_else(damaged)?;
    }
    if stored == ELSEWHERE {
        wide.next();
    }
    if at == ELSEWHERE {
        at = wide.next().ok_or_else(damaged)?;
    }
    Ok((Entry { name: name.to_vec(), bytes: len, at, crc: number(bytes, 16, 4) as u32 }, used))
}

/// The extra field of sizes beyond 32 bits.
fn extra64(mut extra: &[u8]) -> &[u8] {
    while extra.len() >= 4 {
        let (id, len) = (number(extra, 0, 2), number(extra, 2, 2) as usize);
        let Some(field) = extra.get(4..4 + len) else { break };
        if id == 1 {
            return field;
        }
        extra = &extra[4 + len..];
    }
    &[]
}

/// A little-endian number of `n` bytes; `at + n` lies inside.
fn number(bytes: &[u8], at: usize, n: usize) -> u64 {
    bytes[at..at + n].iter().rev().fold(0, |x, b| x << 8 | u64::from(*b))
}
