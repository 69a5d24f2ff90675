//! Checkpoints of `torch.distributed.checkpoint`, and Megatron's `torch_dist`, which are such: `.metadata`, a pickle that
//! says which part of which tensor lies where, and `.distcp` files of archives that `torch.save` wrote.
//! Source: `torch/distributed/checkpoint/{metadata,filesystem}.py`.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use spec::{Error, Result};

use super::blob::{Blob, FilePart, dims};
use super::globals::{Element, Global};
use super::pickle::{Kind, Pickle, Value};
use crate::header::dims as shown_dims;
use crate::input::{self, shown};

/// The file that makes a directory a checkpoint.
pub(crate) const METADATA: &str = ".metadata";

const MAX_METADATA_BYTES: u64 = 4 << 30;

/// Bytes of `.metadata` that each tensor and each chunk take at least: what says less is no such file.
const BYTES_PER_ENTRY: usize = 96;
const FREE_ENTRIES: usize = 64;

/// A checkpoint of PyTorch, open for reading.
#[derive(Debug)]
pub(crate) struct Dcp {
    dir: PathBuf,
    files: Vec<String>,
    /// In the order of the file.
    pub(crate) tensors: Vec<Tensor>,
    chunks: Vec<Chunk>,
    /// What is there and is no tensor.
    pub(crate) others: Vec<String>,
}

/// A tensor and its chunks.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) element: Element,
    pub(crate) shape: Vec<usize>,
    chunks: Range<usize>,
}

impl Tensor {
    pub(crate) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A box of a tensor, and where its archive lies.
#[derive(Debug)]
struct Chunk {
    offsets: Vec<u64>,
    sizes: Vec<u64>,
    file: usize,
    span: FilePart,
}

impl Dcp {
    /// Opens a checkpoint: reads `.metadata` and checks that every chunk lies in a file of the directory, that none
    /// shares bytes with another, and that each tensor's chunks have as many elements as it.
    ///
    /// # Errors
    /// A user error that names what is wrong.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(METADATA);
        let file = input::open("import: open", &path)?;
        let io = |e| Error::io("import: read", &path, &e);
        let len = file.metadata().map_err(io)?.len();
        let refused = |why: String| {
            Error::user(format!("import: {}: {why}", path.display()))
                .hint("nothing in such a file is ever executed; what is not a plain checkpoint is refused")
        };
        if len > MAX_METADATA_BYTES {
            return Err(refused(format!("{len} bytes are too many")));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.take(len).read_to_end(&mut bytes).map_err(io)?;
        let parsed = parse(&bytes, dir).map_err(refused)?;
        parsed.check_files().map_err(refused)?;
        Ok(parsed)
    }

    /// The files, their chunks inside them, and none twice.
    fn check_files(&self) -> Result<(), String> {
        let mut spans: Vec<(usize, u64, u64)> = Vec::with_capacity(self.chunks.len());
        let mut lengths = Vec::with_capacity(self.files.len());
        for name in &self.files {
            let meta = std::fs::metadata(self.dir.join(name)).map_err(|e| format!("{}: {e}", shown(name)))?;
            if !meta.is_file() {
                return Err(format!("{} is not a regular file", shown(name)));
            }
            lengths.push(meta.len());
        }
        for tensor in &self.tensors {
            for chunk in &self.chunks[tensor.chunks.clone()] {
                let (file, FilePart { at, len }) = (chunk.file, chunk.span);
                let end = at.checked_add(len).filter(|end| *end <= lengths[file]);
                let (file_name, name) = (&self.files[file], shown(&tensor.name));
                let end = end.ok_or_else(|| {
                    format!(
                        "{} of {} bytes is cut short: {name} lies at {at}",
                        shown(file_name),
                        lengths[file]
                    )
                })?;
                let elements: u64 = chunk.sizes.iter().product();
                if elements.saturating_mul(tensor.element.bytes() as u64) > len {
                    return Err(format!("{name}: {elements} elements in {len} bytes"));
                }
                spans.push((file, at, end));
            }
        }
        spans.sort_unstable();
        match spans.windows(2).find(|w| w[0].0 == w[1].0 && w[0].2 > w[1].1) {
            Some(w) => {
                Err(format!("two chunks share bytes from {} of {}", w[1].1, shown(&self.files[w[0].0])))
            }
            None => Ok(()),
        }
    }

    /// Reads a whole tensor as float32, row-major.
    ///
    /// # Errors
    /// When it is not of floats of up to 32 bits, or a chunk is damaged.
    pub(crate) fn read(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let bytes = self.read_raw(tensor)?;
        let wrong = |what| Error::user(format!("import: {} is of {what}", shown(&tensor.name)));
        let pairs = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        Ok(match tensor.element {
            Element::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Element::Bf16 => pairs.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            Element::F16 => pairs.map(|bits| f16::from_bits(bits).to_f32()).collect(),
            other => return Err(wrong(format!("{other:?}, expected F32, Bf16 or F16"))),
        })
    }

    /// The elements of a tensor as they are stored.
    pub(crate) fn read_raw(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        let refused = |file: &str, why: String| {
            let path = self.dir.join(file);
            Error::user(format!("import: {}: {}: {why}", path.display(), shown(&tensor.name)))
                .hint("copy the checkpoint again, or take an older one")
        };
        let (size, total) = (tensor.element.bytes(), tensor.elements());
        let mut out = vec![0; size * total];
        let mut seen = vec![0u64; total.div_ceil(64)];
        for chunk in &self.chunks[tensor.chunks.clone()] {
            let name = &self.files[chunk.file];
            let file = input::open("import: open", &self.dir.join(name))?;
            chunk.copy(&file, tensor, &mut out, &mut seen).map_err(|why| refused(name, why))?;
        }
        Ok(out)
    }
}

impl Chunk {
    /// Copies its elements to their places in the tensor.
    fn copy(&self, file: &File, tensor: &Tensor, out: &mut [u8], seen: &mut [u64]) -> Result<(), String> {
        let blob = Blob::read(file, self.span)?;
        if blob.element != tensor.element {
            return Err(format!("elements of {:?}, expected {:?}", blob.element, tensor.element));
        }
        if blob.shape != self.sizes {
            return Err(format!("a part of shape {:?}, expected {:?}", blob.shape, self.sizes));
        }
        let bytes = blob.bytes(file, self.span)?;
        let size = tensor.element.bytes();
        if self.sizes.contains(&0) {
            return Ok(());
        }
        let rank = self.sizes.len();
        let mut strides = vec![1; rank];
        for d in (1..rank).rev() {
            strides[d - 1] = strides[d] * tensor.shape[d] as u64;
        }
        // Along the last dim elements follow each other in the tensor, mostly in the part too.
        let last = rank.saturating_sub(1);
        let run = self.sizes.last().map_or(1, |n| *n as usize);
        let stride = blob.strides.last().map_or(1, |s| *s as usize);
        let mut index = vec![0u64; rank];
        let rows: u64 = self.sizes[..last].iter().product();
        for _ in 0..rows {
            let from: u64 = index.iter().zip(&blob.strides).map(|(i, s)| i * s).sum();
            let to: u64 = (0..rank).map(|d| (index[d] + self.offsets[d]) * strides[d]).sum();
            let (from, to) = (blob.first + from as usize * size, to as usize);
            mark(seen, to..to + run)?;
            let target = &mut out[to * size..(to + run) * size];
            if stride == 1 {
                target.copy_from_slice(&bytes[from..from + run * size]);
            } else {
                for (i, element) in target.chunks_exact_mut(size).enumerate() {
                    element.copy_from_slice(&bytes[from + i * stride * size..][..size]);
                }
            }
            for d in (0..last).rev() {
                index[d] += 1;
                if index[d] < self.sizes[d] {
                    break;
                }
                index[d] = 0;
            }
        }
        Ok(())
    }
}

/// Notes elements as there.
fn mark(seen: &mut [u64], elements: Range<usize>) -> Result<(), String> {
    for i in elements {
        let bit = 1 << (i % 64);
        if seen[i / 64] & bit != 0 {
            return Err("two parts hold the same element".into());
        }
        seen[i / 64] |= bit;
    }
    Ok(())
}

/// Where a chunk lies, by tensor and offsets.
type Places<'a> = HashMap<(&'a str, Vec<u64>), (usize, FilePart)>;

/// What `.metadata` says, and nothing of whether it is so.
pub(crate) fn parse(bytes: &[u8], dir: &Path) -> Result<Dcp, String> {
    let p = Pickle::read(bytes)?;
    if p.kind(p.root) != Some(Kind::Object(Global::Metadata)) {
        return Err("it is no metadata of a checkpoint".into());
    }
    let most = bytes.len() / BYTES_PER_ENTRY + FREE_ENTRIES;
    let mut dcp = Dcp {
        dir: dir.to_owned(),
        files: Vec::new(),
        tensors: Vec::new(),
        chunks: Vec::new(),
        others: Vec::new(),
    };
    let mut names = HashSet::new();
    let mut places = places(&p, &mut dcp.files, most)?;
    for (i, (name, meta)) in p.entries(p.attribute(p.root, "state_dict_metadata")?)?.enumerate() {
        let name = p.text(name)?;
        if i >= most {
            return Err("more tensors than such a file has".into());
        }
        if !names.insert(name) {
            return Err(format!("{} is there twice", shown(name)));
        }
        match p.kind(meta) {
            Some(Kind::Object(Global::TensorStorage)) => {
                let of = |why| format!("{}: {why}", shown(name));
                tensor(&p, name, meta, &mut places, &mut dcp, most).map_err(of)?;
            }
            Some(Kind::Object(Global::BytesStorage)) => dcp.others.push(name.to_owned()),
            _ => return Err(format!("{} is neither tensor nor bytes", shown(name))),
        }
    }
    Ok(dcp)
}

fn places<'a>(p: &Pickle<'a>, files: &mut Vec<String>, most: usize) -> Result<Places<'a>, String> {
    let (mut places, mut known) = (Places::new(), HashMap::new());
    for (i, (key, info)) in p.entries(p.attribute(p.root, "storage_data")?)?.enumerate() {
        if i >= most {
            return Err("more chunks than such a file has".into());
        }
        let expected = (Some(Kind::Object(Global::Index)), Some(Kind::Object(Global::StorageInfo)));
        if (p.kind(key), p.kind(info)) != expected {
            return Err("storage_data: expected a place for each index".into());
        }
        if p.attribute(info, "transform_descriptors")? != Value::None {
            return Err("its data are transformed (compressed or encrypted), which is not read".into());
        }
        let offset = p.attribute(key, "offset")?;
        if offset == Value::None {
            continue;
        }
        let name = p.text(p.attribute(info, "relative_path")?)?;
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return Err(format!("a file \"{}\", expected a plain name", shown(name)));
        }
        let file = *known.entry(name).or_insert_with(|| {
            files.push(name.to_owned());
            files.len() - 1
        });
        let number = |key| p.count(p.attribute(info, key)?);
        let span = FilePart { at: number("offset")?, len: number("length")? };
        let fqn = p.text(p.attribute(key, "fqn")?)?;
        places.insert((fqn, dims(p, offset)?), (file, span));
    }
    Ok(places)
}

fn tensor<'a>(
    p: &Pickle<'a>,
    name: &'a str,
    meta: Value,
    places: &mut Places<'a>,
    dcp: &mut Dcp,
    most: usize,
) -> Result<(), String> {
    let properties = p.attribute(meta, "properties")?;
    if p.kind(properties) != Some(Kind::Object(Global::TensorProperties)) {
        return Err("a tensor without properties".into());
    }
    let state = p.items(properties).nth(1).unwrap_or(Value::None);
    let Some(Value::Global(Global::Type(element))) = p.items(state).next() else {
        return Err("a tensor without a type".into());
    };
    let shape = dims(p, p.attribute(meta, "size")?)?;
    let first = dcp.chunks.len();
    let mut elements = 0u64;
    for chunk in p.items(p.attribute(meta, "chunks")?) {
        if dcp.chunks.len() >= most {
            return Err("more chunks than such a file has".into());
        }
        if p.kind(chunk) != Some(Kind::Object(Global::Chunk)) {
            return Err("a chunk that is none".into());
        }
        let (offsets, sizes) =
            (dims(p, p.attribute(chunk, "offsets")?)?, dims(p, p.attribute(chunk, "sizes")?)?);
        let inside = |d: usize| offsets[d].checked_add(sizes[d]).is_some_and(|end| end <= shape[d]);
        if offsets.len() != shape.len() || sizes.len() != shape.len() || !(0..shape.len()).all(inside) {
            return Err(format!("a chunk outside of shape {shape:?}"));
        }
        let count = sizes.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        elements = count.and_then(|n| n.checked_add(elements)).ok_or("too many elements")?;
        let place = places.remove(&(name, offsets.clone()));
        let (file, span) = place.ok_or_else(|| format!("no file has the chunk at {offsets:?}"))?;
        dcp.chunks.push(Chunk { offsets, sizes, file, span });
    }
    let total = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
    let shape: Vec<usize> =
        shape.iter().map(|d| usize::try_from(*d)).collect::<Result<_, _>>().map_err(|_| "too large")?;
    if total != Some(elements) || crate::region::matrix(&shape).is_none() {
        return Err(format!("its chunks hold {elements} elements of shape {}", shown_dims(&shape)));
    }
    dcp.tensors.push(Tensor { name: name.to_owned(), element, shape, chunks: first..dcp.chunks.len() });
    Ok(())
}
