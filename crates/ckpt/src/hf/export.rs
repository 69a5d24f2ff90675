use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use half::bf16;
use spec::{DType, Error, ModelSpec, Result};

use super::companions::{Companions, Tokenizer, pretty};
use super::names::{self, HfTensor, Part};
use super::{INDEX, SINGLE, STAGING_BYTES, TURNED_ROWS};
use crate::disk::{Folder, NewFile};
use crate::header;

/// What [`export`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Safetensors files.
    pub files: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of tensor data.
    pub bytes: u64,
}

/// Writes a model that `transformers` loads: `config.json` and `model.safetensors`, or shards with an index when the
/// tensors take more than `max_shard_bytes`.
///
/// `source` gives one logical parameter at a time, whole and row-major; not more than one tensor of the result is in
/// memory at once. With a tokenizer go the settings that `transformers` needs to read it as it is and to stop where a
/// text ends. The directory appears whole or not at all. Where a family has no factor of experts' weights, what experts give
/// is multiplied by it instead, which changes no bit of what the model computes if it is a power of two.
///
/// # Errors
/// When the model belongs to no family, `dtype` is neither float32 nor bfloat16, `out_dir` exists and holds something,
/// the tokenizer cannot be read, `source` fails, or writing does.
pub fn export(
    spec: &ModelSpec,
    source: impl Fn(&str) -> Result<Vec<f32>>,
    out_dir: &Path,
    dtype: DType,
    max_shard_bytes: u64,
    tokenizer: Option<Tokenizer<'_>>,
) -> Result<Exported> {
    if !matches!(dtype, DType::F32 | DType::Bf16) {
        return Err(Error::user(format!("export as {dtype}: expected f32 or bf16")));
    }
    let (spec, factor) = &spec.exported();
    let source = |name: &str| {
        let mut values = source(name)?;
        if *factor != 1.0 && names::is_given_by_an_expert(name) {
            values.iter_mut().for_each(|x| *x *= *factor);
        }
        Ok(values)
    };
    let table = names::table(spec)?;
    let companions = tokenizer.map_or_else(|| Ok(Companions::default()), |t| Companions::gather(t, spec))?;
    let target = Target::prepare(out_dir)?;
    let writer = Writer { spec, source: &source, dir: &target.temp, dtype };
    let written = writer.texts(&companions).and_then(|()| writer.shards(&table, max_shard_bytes));
    target.end(out_dir, written)
}

/// Where an export goes, and the directory beside it that becomes it.
pub(crate) struct Target {
    parent: Folder,
    name: OsString,
    temp_name: OsString,
    pub(crate) temp: Folder,
}

impl Target {
    /// Checks that `out_dir` is free and makes the temporary directory beside it.
    pub(crate) fn prepare(out_dir: &Path) -> Result<Self> {
        let io = |e: io::Error| Error::io("export to", out_dir, &e);
        let mut place = out_dir.to_owned();
        match fs::read_dir(out_dir) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(Error::user(format!(
                        "export to {}: the directory is not empty",
                        out_dir.display()
                    ))
                    .hint("name a new directory"));
                }
                // A link to an empty directory: the model goes where it points.
                place = out_dir.canonicalize().map_err(io)?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(e)),
        }
        let name = place.file_name().map(OsStr::to_owned).ok_or_else(|| {
            Error::user(format!("export to {}: expected the name of a new directory", out_dir.display()))
        })?;
        let parent: PathBuf = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => ".".into(),
        };
        let parent = Folder::create(&parent).map_err(|e| Error::io("export: create", &parent, &e))?;
        let mut temp_name = OsString::from(".");
        temp_name.push(&name);
        temp_name.push(".tmp");
        let temp = parent.remove(&temp_name).and_then(|()| parent.make(&temp_name));
        let temp = temp.map_err(|e| Error::io("export: create", &parent.path().join(&temp_name), &e))?;
        Ok(Target { parent, name, temp_name, temp })
    }

    /// Gives the directory its name if all of it was written, else removes it: the first error is the one to report, and
    /// the next export clears what cannot be removed now.
    pub(crate) fn end<T>(&self, out_dir: &Path, written: Result<T>) -> Result<T> {
        let publish = || {
            self.temp.sync()?;
            self.parent.rename(&self.temp_name, &self.name)?;
            self.parent.sync()
        };
        let finished = written.and_then(|done| {
            publish().map_err(|e| Error::io("export: move into place", out_dir, &e))?;
            Ok(done)
        });
        finished.inspect_err(|_| _ = self.parent.remove(&self.temp_name))
    }
}

struct Writer<'a, S> {
    spec: &'a ModelSpec,
    source: &'a S,
    dir: &'a Folder,
    dtype: DType,
}

impl<S: Fn(&str) -> Result<Vec<f32>>> Writer<'_, S> {
    fn texts(&self, companions: &Companions) -> Result<()> {
        let mut config = self.spec.to_hf_config()?;
        for role in ["bos_token_id", "eos_token_id"] {
            // Absent, they would be the family's defaults: ids that mean something else in another vocabulary.
            config[role] = serde_json::Value::Null;
        }
        companions.ids.iter().for_each(|(role, id)| config[role] = id.clone());
        config["torch_dtype"] = if self.dtype == DType::F32 { "float32" } else { "bfloat16" }.into();
        self.text("config.json", &pretty(&config))?;
        companions.files.iter().try_for_each(|(name, bytes)| self.text(name, bytes))
    }

    fn text(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let write = || -> io::Result<()> {
            let mut file = self.dir.new_file(name.as_ref())?;
            file.write_all(bytes)?;
            file.sync()
        };
        write().map_err(|e| Error::io("export: write", &self.dir.path().join(name), &e))
    }

    fn shards(&self, table: &[HfTensor], max_shard_bytes: u64) -> Result<Exported> {
        let sizes: Vec<u64> = table.iter().map(|t| self.bytes(t) as u64).collect();
        let shards = cut(&sizes, max_shard_bytes);
        let mut weight_map = serde_json::Map::new();
        for (i, range) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE.to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            let tensors = &table[range.clone()];
            self.shard(&name, tensors)?;
            weight_map.extend(tensors.iter().map(|t| (self.full_name(t), name.clone().into())));
        }
        let bytes = sizes.iter().sum();
        if shards.len() > 1 {
            let index = serde_json::json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
            self.text(INDEX, &pretty(&index))?;
        }
        Ok(Exported { files: shards.len(), tensors: table.len(), bytes })
    }

    fn dtype_of(&self, tensor: &HfTensor) -> DType {
        if tensor.single { DType::F32 } else { self.dtype }
    }

    fn bytes(&self, tensor: &HfTensor) -> usize {
        tensor.elements() * self.dtype_of(tensor).bytes()
    }

    fn full_name(&self, tensor: &HfTensor) -> String {
        let prefix = if tensor.in_body { names::prefix(self.spec) } else { "" };
        format!("{prefix}{}", tensor.name)
    }

    fn shard(&self, name: &str, tensors: &[HfTensor]) -> Result<()> {
        let io = |e: io::Error| Error::io("export: write", &self.dir.path().join(name), &e);
        // Wide elements first, so that all lie at multiples of their size.
        let mut tensors: Vec<&HfTensor> = tensors.iter().collect();
        tensors.sort_by_key(|t| std::cmp::Reverse(self.dtype_of(t).bytes()));
        let entries: Vec<header::Entry> = tensors
            .iter()
            .map(|t| header::Entry {
                name: self.full_name(t),
                dtype: if self.dtype_of(t) == DType::F32 { "F32" } else { "BF16" },
                shape: t.shape(),
                bytes: self.bytes(t),
            })
            .collect();
        let mut file = self.dir.new_file(name.as_ref()).map_err(io)?;
        file.write_all(&header::encode(&entries)).map_err(io)?;
        let mut out = Converted { file: &mut file, dtype: self.dtype, staging: Vec::new() };
        for tensor in tensors {
            out.dtype = self.dtype_of(tensor);
            for slab in tensor.parts.chunks(tensor.parts_of_slab()) {
                let mut parts = slab.iter().map(|p| self.load(p, tensor.zeros));
                match (tensor.transposed, tensor.interleaved) {
                    (true, _) => {
                        let parts = parts.collect::<Result<Vec<_>>>()?;
                        out.write_turned(tensor, &parts).map_err(io)?;
                    }
                    (false, true) => {
                        let parts = parts.collect::<Result<Vec<_>>>()?;
                        let turns = (0..parts[0].len()).flat_map(|i| parts.iter().map(move |p| p[i]));
                        out.write(&turns.collect::<Vec<_>>()).map_err(io)?;
                    }
                    (false, false) if tensor.beside => {
                        let parts = parts.collect::<Result<Vec<_>>>()?;
                        let rows = tensor.parts[0].shape[0];
                        let row = |r: usize, p: &Vec<f32>| {
                            let cols = p.len() / rows;
                            p[r * cols..(r + 1) * cols].to_vec()
                        };
                        let all = (0..rows).flat_map(|r| parts.iter().flat_map(move |p| row(r, p)));
                        out.write(&all.collect::<Vec<_>>()).map_err(io)?;
                    }
                    (false, false) => parts.try_for_each(|part| out.write(&part?).map_err(io))?,
                }
            }
        }
        file.sync().map_err(io)
    }

    fn load(&self, part: &Part, zeros: bool) -> Result<Vec<f32>> {
        let expected: usize = part.shape.iter().product();
        let data = if zeros { vec![0.0; expected] } else { (self.source)(&part.name)? };
        if data.len() != expected {
            return Err(Error::failure(format!(
                "export: parameter {} has {} elements, expected {expected} for shape {:?}",
                part.name,
                data.len(),
                part.shape
            )));
        }
        Ok(data)
    }
}

/// Consecutive tensors of at most `max_bytes` together; a larger one stands alone.
fn cut(sizes: &[u64], max_bytes: u64) -> Vec<std::ops::Range<usize>> {
    let mut shards = Vec::new();
    let (mut first, mut bytes) = (0, 0u64);
    for (i, size) in sizes.iter().enumerate() {
        if i > first && bytes.saturating_add(*size) > max_bytes {
            shards.push(first..i);
            (first, bytes) = (i, 0);
        }
        bytes = bytes.saturating_add(*size);
    }
    shards.push(first..sizes.len());
    shards
}

/// Writes float32 as the wanted type.
struct Converted<'a> {
    file: &'a mut NewFile,
    dtype: DType,
    staging: Vec<u8>,
}

impl Converted<'_> {
    fn write(&mut self, data: &[f32]) -> io::Result<()> {
        if self.dtype == DType::F32 {
            return self.file.write_all(bytemuck::cast_slice(data));
        }
        for part in data.chunks(STAGING_BYTES / 2) {
            self.staging.clear();
            self.staging.extend(part.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()));
            self.file.write_all(&self.staging)?;
        }
        Ok(())
    }

    /// The parts, each `[out, in]`, as `[in, all outs]`.
    fn write_turned(&mut self, tensor: &HfTensor, parts: &[Vec<f32>]) -> io::Result<()> {
        let stored = tensor.slab_shape();
        let (rows, cols) = (stored[0], stored[1]);
        let mut block = vec![0.0; TURNED_ROWS.min(rows) * cols];
        for r0 in (0..rows).step_by(TURNED_ROWS) {
            let n = TURNED_ROWS.min(rows - r0);
            let mut before = 0;
            for (turn, data) in parts.iter().enumerate() {
                for (c, from) in data.chunks_exact(rows).enumerate() {
                    let col = if tensor.interleaved { c * parts.len() + turn } else { before + c };
                    for i in 0..n {
                        block[i * cols + col] = from[r0 + i];
                    }
                }
                before += data.len() / rows;
            }
            self.write(&block[..n * cols])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_cut_in_order() {
        for (sizes, max, ends) in [
            (&[4, 4, 4][..], 100, &[3][..]),
            (&[4, 4, 4], 8, &[2, 3]),
            (&[9, 1, 1, 9], 8, &[1, 3, 4]),
            (&[1, 1], 0, &[1, 2]),
            (&[u64::MAX, u64::MAX], u64::MAX, &[2]),
        ] {
            let shards = cut(sizes, max);
            assert_eq!(shards.iter().map(|r| r.end).collect::<Vec<_>>(), ends, "{sizes:?} by {max}");
            assert_eq!(shards.iter().map(|r| r.len()).sum::<usize>(), sizes.len());
        }
    }
}
