//! Writes a checkpoint as `torch.distributed.checkpoint` reads it.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use spec::{Error, Result};

use super::AboutWire;
use super::dcp::METADATA;
use super::globals::Element;
use super::place::{META, Place};
use crate::disk::NewFile;
use crate::hf::Target;
use crate::manifest::{Kind, Manifest, Meta, TensorEntry};
use crate::read::Checkpoint;
use crate::region::Region;

/// The file of data: what rank 0's only writer is called.
const DATA: &str = "__0_0.distcp";

/// Elements read at a time: a few chunks.
const ELEMENTS: usize = 1 << 20;

/// Beyond this, sizes of a zip archive need fields that are not written.
const MAX_ARCHIVE_BYTES: u64 = (1 << 32) - (1 << 16);

/// What [`export_dcp`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportedDcp {
    /// Tensors of the checkpoint.
    pub tensors: usize,
    /// Bytes of the data file.
    pub bytes: u64,
}

/// Writes `checkpoint` as a directory that `torch.distributed.checkpoint` loads: parameters as `model.NAME`, moments as
/// `optim.state.NAME.exp_avg` and `.exp_avg_sq`, steps as `optim.state.NAME.step`, averages as `ema.NAME`, all float32, each in one chunk; and
/// what else a manifest says as JSON in `phalanx.meta`, a tensor of bytes. Streams; the directory appears whole or not
/// at all.
///
/// # Errors
/// When `out_dir` exists and holds something, the checkpoint is damaged, a tensor takes 4 GiB or more, or writing fails.
pub fn export_dcp(checkpoint: &Checkpoint, out_dir: &Path) -> Result<ExportedDcp> {
    let target = Target::prepare(out_dir)?;
    target.end(out_dir, write_all(checkpoint, &target, out_dir))
}

fn write_all(checkpoint: &Checkpoint, target: &Target, out_dir: &Path) -> Result<ExportedDcp> {
    let io = |e: io::Error| Error::io("export to", out_dir, &e);
    let manifest = checkpoint.manifest();
    let mut out = Archives {
        file: target.temp.new_file(DATA.as_ref()).map_err(io)?,
        bytes: 0,
        items: Vec::new(),
        failed: &io,
    };
    for tensor in &manifest.tensors {
        out.float(checkpoint, tensor)?;
    }
    for tensor in manifest.tensors.iter().filter(|t| t.kind == Kind::ExpAvg) {
        let step = (manifest.step as f32).to_le_bytes();
        out.small(Place::Step.name(&tensor.name), Element::F32, &[], &step)?;
    }
    out.small(META.to_owned(), Element::U8, &[], about(manifest).as_bytes())?;
    let (items, bytes) = (out.items, out.bytes);
    out.file.sync().map_err(io)?;
    let mut file = target.temp.new_file(METADATA.as_ref()).map_err(io)?;
    file.write_all(&metadata(&items)).map_err(io)?;
    file.sync().map_err(io)?;
    Ok(ExportedDcp { tensors: items.len(), bytes })
}

fn about(manifest: &Manifest) -> String {
    let Meta { tokens, fingerprint, world, state } = manifest.meta.clone();
    let wire = AboutWire { step: manifest.step, tokens, fingerprint, world, state };
    serde_json::to_string(&wire).expect("plain data is JSON")
}

/// A tensor that was written.
struct Item {
    name: String,
    element: Element,
    shape: Vec<usize>,
    at: u64,
    len: u64,
}

struct Archives<'a> {
    file: NewFile,
    bytes: u64,
    items: Vec<Item>,
    failed: &'a dyn Fn(io::Error) -> Error,
}

impl Archives<'_> {
    fn float(&mut self, checkpoint: &Checkpoint, tensor: &TensorEntry) -> Result<()> {
        let total: usize = tensor.shape.iter().product();
        let name = Place::of(tensor.kind).name(&tensor.name);
        let mut buffer = vec![0f32; total.min(ELEMENTS)];
        self.archive(name, Element::F32, &tensor.shape, |out| {
            for start in (0..total).step_by(ELEMENTS) {
                let part = &mut buffer[..ELEMENTS.min(total - start)];
                let region = [Region::range(start, part.len())];
                checkpoint.read_regions(&tensor.name, tensor.kind, &region, part)?;
                out(bytemuck::cast_slice(part))?;
            }
            Ok(())
        })
    }

    /// A tensor in memory; bytes are a vector.
    fn small(&mut self, name: String, element: Element, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let vector = [bytes.len()];
        let shape = if element == Element::U8 { &vector } else { shape };
        self.archive(name, element, shape, |out| out(bytes))
    }

    fn archive(
        &mut self,
        name: String,
        element: Element,
        shape: &[usize],
        data: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let at = self.bytes;
        let total: usize = shape.iter().product();
        let bytes = (total * element.bytes()) as u64;
        if bytes > MAX_ARCHIVE_BYTES {
            return Err(Error::user(format!("export: {name} takes {bytes} bytes, expected less than 4 GiB"))
                .hint("a tensor of that size is not written to this format"));
        }
        let mut entries = Vec::new();
        self.entry(&mut entries, at, "data.pkl", |out| out(&tensor_pickle(element, shape)))?;
        self.entry(&mut entries, at, "byteorder", |out| out(b"little"))?;
        self.entry(&mut entries, at, "data/0", data)?;
        self.entry(&mut entries, at, "version", |out| out(b"3\n"))?;
        let directory_at = self.bytes - at;
        let directory: Vec<u8> = entries.iter().flat_map(Entry::in_directory).collect();
        self.put(&directory)?;
        let count = entries.len() as u16;
        let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
        end.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
        end.extend((directory.len() as u32).to_le_bytes());
        end.extend((directory_at as u32).to_le_bytes());
        end.extend([0, 0]);
        self.put(&end)?;
        let len = self.bytes - at;
        self.items.push(Item { name, element, shape: shape.to_vec(), at, len });
        Ok(())
    }

    /// An entry whose length and checksum follow it.
    fn entry(
        &mut self,
        entries: &mut Vec<Entry>,
        archive_at: u64,
        name: &str,
        data: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let mut entry =
            Entry { name: format!("archive/{name}"), at: self.bytes - archive_at, len: 0, crc: 0 };
        let mut local = b"PK\x03\x04".to_vec();
        local.extend(ENTRY_HEAD);
        local.extend([0; 12]);
        local.extend((entry.name.len() as u16).to_le_bytes());
        local.extend([0, 0]);
        local.extend(entry.name.as_bytes());
        self.put(&local)?;
        let mut hash = crc32fast::Hasher::new();
        let start = self.bytes;
        data(&mut |bytes| {
            hash.update(bytes);
            self.put(bytes)
        })?;
        (entry.len, entry.crc) = (self.bytes - start, hash.finalize());
        let mut follows = b"PK\x07\x08".to_vec();
        follows.extend(entry.sizes());
        self.put(&follows)?;
        entries.push(entry);
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(self.failed)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Version needed (2.0); sizes follow the data, names are UTF-8; stored; no time, the first day.
const ENTRY_HEAD: [u8; 10] = [20, 0, 0x08, 0x08, 0, 0, 0, 0, 0x21, 0];

struct Entry {
    name: String,
    at: u64,
    len: u64,
    crc: u32,
}

impl Entry {
    fn sizes(&self) -> Vec<u8> {
        let len = (self.len as u32).to_le_bytes();
        [self.crc.to_le_bytes(), len, len].concat()
    }

    fn in_directory(&self) -> Vec<u8> {
        let mut out = b"PK\x01\x02\x14\0".to_vec();
        out.extend(ENTRY_HEAD);
        out.extend(self.sizes());
        out.extend((self.name.len() as u16).to_le_bytes());
        out.extend([0; 12]);
        out.extend((self.at as u32).to_le_bytes());
        out.extend(self.name.as_bytes());
        out
    }
}

/// A pickle being written, protocol 2. Names are remembered.
struct Pickled {
    out: Vec<u8>,
    names: HashMap<String, u32>,
}

impl Pickled {
    fn new() -> Self {
        Pickled { out: vec![0x80, 2], names: HashMap::new() }
    }

    fn op(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend(bytes);
        self
    }

    fn global(&mut self, module: &str, name: &str) -> &mut Self {
        let line = format!("c{module}\n{name}\n");
        self.once(&line.clone(), line.as_bytes())
    }

    fn text(&mut self, text: &str) -> &mut Self {
        let bytes = [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
        self.once(&format!("X{text}"), &bytes)
    }

    /// Writes what stands for `key` the first time, afterwards a reference to it.
    fn once(&mut self, key: &str, bytes: &[u8]) -> &mut Self {
        let next = self.names.len() as u32;
        if let Some(index) = self.names.get(key) {
            let index = index.to_le_bytes();
            return self.op(b"j").op(&index);
        }
        self.names.insert(key.to_owned(), next);
        self.op(bytes).op(b"r").op(&next.to_le_bytes())
    }

    fn number(&mut self, n: u64) -> &mut Self {
        self.op(&[0x8a, 8]).op(&n.to_le_bytes())
    }

    fn tuple(&mut self, numbers: impl IntoIterator<Item = usize>) -> &mut Self {
        self.op(b"(");
        for n in numbers {
            self.number(n as u64);
        }
        self.op(b"t")
    }

    fn size(&mut self, shape: impl IntoIterator<Item = usize>) -> &mut Self {
        self.global("torch", "Size").tuple(shape).op(&[0x85, b'R'])
    }

    /// An object without a state.
    fn object(&mut self, module: &str, name: &str) -> &mut Self {
        self.global(module, name).op(&[b')', 0x81])
    }
}

fn tensor_pickle(element: Element, shape: &[usize]) -> Vec<u8> {
    let (storage, _) = names(element);
    let total: usize = shape.iter().product();
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d].max(1);
    }
    let mut p = Pickled::new();
    p.global("torch._utils", "_rebuild_tensor_v2").op(b"((").text("storage").global("torch", storage);
    p.text("0").text("cpu").number(total as u64).op(b"tQ").number(0);
    p.tuple(shape.iter().copied()).tuple(strides).op(&[0x89]);
    p.global("collections", "OrderedDict").op(b")RtR.");
    p.out
}

fn names(element: Element) -> (&'static str, &'static str) {
    match element {
        Element::U8 => ("ByteStorage", "uint8"),
        _ => ("FloatStorage", "float32"),
    }
}

/// `.metadata`.
fn metadata(items: &[Item]) -> Vec<u8> {
    const MODULE: &str = "torch.distributed.checkpoint.metadata";
    let mut p = Pickled::new();
    p.object(MODULE, "Metadata").op(b"}(").text("state_dict_metadata").op(b"}(");
    for item in items {
        p.text(&item.name).object(MODULE, "TensorStorageMetadata").op(b"}(").text("properties");
        p.object(MODULE, "TensorProperties").op(b"(").global("torch", names(item.element).1);
        p.global("torch.serialization", "_get_layout").text("torch.strided").op(&[0x85, b'R', 0x89]);
        p.global(MODULE, "_MEM_FORMAT_ENCODING").number(0).op(&[0x85, b'R', 0x89, b't', b'b']);
        p.text("size").size(item.shape.iter().copied()).text("chunks").op(b"]");
        p.object(MODULE, "ChunkStorageMetadata").op(b"}(").text("offsets");
        p.size(item.shape.iter().map(|_| 0)).text("sizes").size(item.shape.iter().copied()).op(b"ubaub");
    }
    // Where the names lie in nested dictionaries.
    p.op(b"u").text("planner_data").op(b"}(");
    for item in items {
        p.text(&item.name).op(b"(");
        for part in Place::path(&item.name) {
            p.text(part);
        }
        p.op(b"t");
    }
    p.op(b"u").text("storage_data").op(b"}(");
    for item in items {
        p.object(MODULE, "MetadataIndex").op(b"}(").text("fqn").text(&item.name).text("offset");
        p.size(item.shape.iter().map(|_| 0)).text("index").number(0).op(b"ub");
        p.object("torch.distributed.checkpoint.filesystem", "_StorageInfo").op(b"}(");
        p.text("relative_path").text(DATA).text("offset").number(item.at).text("length").number(item.len);
        p.op(b"ub");
    }
    p.op(b"u").text("storage_meta").op(b"N").text("version").text("1.0.0").op(b"ub.");
    p.out
}
