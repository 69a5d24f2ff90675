//! Models as Hugging Face keeps them: `config.json` and `model.safetensors`, whole or in shards with an index.
//!
//! Logical parameters (`layers.0.attn.q.weight`, linear weights `[out, in]`) are mapped to the tensors of the Llama,
//! Mistral, Qwen 2, Qwen 3, DeepSeek and GPT-2 families; GPT-2's fused and transposed ones are split and turned on the way.

mod companions;
mod export;
mod left_out;
mod names;
mod problems;
mod scaled;

#[cfg(test)]
mod scaled_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde::Deserialize;
use spec::{Context, Error, HfModel, ModelSpec, Result};

use crate::header::{Header, Info, dims};
use crate::input::{self, shown};
use crate::region::matrix;
use names::HfTensor;
use problems::Problems;

pub use companions::{COMPANIONS, Tokenizer, keep_companions, keep_settings};
pub(crate) use export::Target;
pub use export::{Exported, export};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Bytes read at a time where elements must be converted.
const STAGING_BYTES: usize = 1 << 20;

/// Rows of a transposed tensor turned at a time: a cache line of each target row.
const TURNED_ROWS: usize = 16;

/// Configurations take some kilobytes.
const MAX_CONFIG_BYTES: usize = 16 << 20;

/// An index has a line for each tensor.
const MAX_INDEX_BYTES: usize = 1 << 30;

/// Reads the model in `dir`: what it is, and its weights, open for reading.
///
/// # Errors
/// A user error when `config.json` or the weights are missing, damaged or of an unsupported kind, or do not fit each
/// other; every missing, unexpected or wrongly shaped tensor is named.
pub fn import(dir: &Path) -> Result<(ModelSpec, HfWeights)> {
    let path = dir.join("config.json");
    if !path.exists() && dir.join(ADAPTER_CONFIG).exists() {
        return Err(adapter(dir));
    }
    let text = input::read_text("import: read", &path, MAX_CONFIG_BYTES)
        .map_err(|e| e.hint("give the directory that holds config.json and model.safetensors"))?;
    // A model that trains has none: it was refused otherwise.
    let HfModel { mut model, mut inexact, windows: _ } =
        HfModel::to_train(&text).context(format!("import {}", path.display()))?;
    if model.mtp.is_some() && !HfWeights::predicts(dir, &model)? {
        // As conversions leave it.
        model.mtp = None;
        inexact.push("num_nextn_predict_layers is 1, but the weights of that layer are not there".to_owned());
    }
    let mut weights = HfWeights::open(dir, &model)?;
    weights.notes.splice(0..0, inexact);
    Ok((model, weights))
}

/// The weights of a Hugging Face model under their logical names, as float32.
#[derive(Debug)]
pub struct HfWeights {
    files: Vec<(PathBuf, File)>,
    parameters: HashMap<String, Source>,
    /// Names in the order of the forward pass.
    order: Vec<String>,
    notes: Vec<String>,
}

/// Where a logical parameter lies.
#[derive(Clone, Debug)]
struct Source {
    file: usize,
    /// Offset in bytes of the tensor that holds it.
    offset: u64,
    kind: Float,
    shape: Vec<usize>,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// Row-major, from this element of the tensor on, each row `stored_cols` behind the one before.
    Rows { first: usize, stored_cols: usize },
    /// Transposed: logical rows are stored columns from `first` on, every `step`-th, of `stored_cols`.
    Columns { first: usize, stored_cols: usize, step: usize },
    /// In few bits, with scales in another tensor.
    Scaled(scaled::Rows),
}

impl Place {
    /// Rows of so many elements, one under another.
    fn whole(stored_cols: usize) -> Place {
        Place::Rows { first: 0, stored_cols }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Float {
    F32,
    Bf16,
    F16,
}

impl Float {
    fn parse(dtype: &str) -> Option<Self> {
        Some(match dtype {
            "F32" => Float::F32,
            "BF16" => Float::Bf16,
            "F16" => Float::F16,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        if self == Float::F32 { 4 } else { 2 }
    }
}

impl HfWeights {
    /// Opens the weights of `spec` in `dir`.
    ///
    /// # Errors
    /// As [`import`].
    pub fn open(dir: &Path, spec: &ModelSpec) -> Result<Self> {
        let table = names::table(spec)?;
        let mut weights = HfWeights::nothing();
        let mut problems = Problems::default();
        let mut found = weights.open_files(dir, &mut problems)?;
        for tensor in table.iter().filter(|tensor| !tensor.zeros && !tensor.copy) {
            let mut take = |suffix: &str| found.remove(&format!("{}{suffix}", tensor.name));
            let added = match take("") {
                Some(at) if at.info.dtype == "F8_E4M3" => match take("_scale_inv") {
                    Some(scales) => weights.add_squares(tensor, &at, &scales),
                    None => Err(format!("tensor {} has no scales, {0}_scale_inv", tensor.name)),
                },
                Some(at) => weights.add(tensor, at.file, at.offset, &at.info),
                None => match (take("_blocks"), take("_scales")) {
                    (Some(blocks), Some(scales)) if tensor.slabs.is_some() && tensor.transposed => {
                        weights.add_blocks(tensor, &blocks, &scales)
                    }
                    _ => {
                        problems.missing.push(format!("{} {:?}", tensor.name, tensor.shape()));
                        Ok(())
                    }
                },
            };
            added.unwrap_or_else(|problem| problems.other.push(problem));
        }
        weights.leave_out(spec, found, &mut problems)?;
        problems.refuse(dir, spec)?;
        Ok(weights)
    }

    /// Whether the files in `dir` hold a layer that predicts one token more.
    fn predicts(dir: &Path, spec: &ModelSpec) -> Result<bool> {
        let mut weights = HfWeights::nothing();
        let found = weights.open_files(dir, &mut Problems::default())?;
        Ok(found.keys().any(|name| left_out::prediction_layer(spec, name).is_some()))
    }

    fn nothing() -> HfWeights {
        HfWeights { files: Vec::new(), parameters: HashMap::new(), order: Vec::new(), notes: Vec::new() }
    }

    /// Opens all files and finds their tensors, by name without what wraps it.
    fn open_files(&mut self, dir: &Path, problems: &mut Problems) -> Result<BTreeMap<String, Found>> {
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        let index = weight_files(dir)?;
        for name in &index.files {
            let path = dir.join(name);
            let file = input::open("import: open", &path)?;
            let header = Header::read(&file, &path)?;
            for (tensor, info) in &header.tensors {
                let plain = names::unwrapped(tensor);
                let (file, offset, info) = (self.files.len(), header.offset(info), info.clone());
                let at = Found { stored: tensor.clone(), file, offset, info };
                if let Some(other) = found.insert(plain.clone(), at) {
                    let both = if other.stored == *tensor {
                        String::new()
                    } else {
                        format!(" (as {})", shown(&other.stored))
                    };
                    problems.other.push(format!("tensor {} is there twice{both}", shown(tensor)));
                }
            }
            for tensor in index.promised.get(name).into_iter().flatten() {
                if !header.tensors.contains_key(tensor) {
                    let (tensor, name) = (shown(tensor), shown(name));
                    problems
                        .other
                        .push(format!("tensor {tensor} is not in {name}, where the index says it is"));
                }
            }
            self.files.push((path, file));
        }
        Ok(found)
    }

    fn add(&mut self, tensor: &HfTensor, file: usize, offset: u64, info: &Info) -> Result<(), String> {
        let (name, stored) = (&tensor.name, tensor.shape());
        if info.shape != stored {
            return Err(format!("tensor {name} has shape {}, expected {stored:?}", dims(&info.shape)));
        }
        let kind = Float::parse(&info.dtype).ok_or_else(|| {
            format!("tensor {name} is of type {}, expected F32, BF16 or F16", shown(&info.dtype))
        })?;
        let slab = tensor.slab_shape();
        let (elements, step) = (slab.iter().product::<usize>(), tensor.parts_of_slab());
        for (s, parts) in tensor.parts.chunks(step).enumerate() {
            let (mut rows, begins) = (0, s * elements);
            for (turn, part) in parts.iter().enumerate() {
                let row_elements: usize = part.shape[1..].iter().product();
                let (_, cols) = matrix(&part.shape).unwrap_or_default();
                let place = match (tensor.transposed, tensor.interleaved) {
                    (true, false) => Place::Columns { first: begins + rows, stored_cols: slab[1], step: 1 },
                    (true, true) => Place::Columns { first: begins + turn, stored_cols: slab[1], step },
                    (false, false) if tensor.beside => {
                        Place::Rows { first: begins + turn * cols, stored_cols: slab[1] }
                    }
                    (false, false) => Place::Rows { first: begins + rows * row_elements, stored_cols: cols },
                    // A vector: one row, whose elements are stored `step` apart.
                    (false, true) => Place::Columns { first: begins + turn, stored_cols: step, step },
                };
                let source = Source { file, offset, kind, shape: part.shape.clone(), place };
                self.parameters.insert(part.name.clone(), source);
                self.order.push(part.name.clone());
                rows += part.shape[0];
            }
        }
        Ok(())
    }

    /// What the model's files hold that the import does not take, one sentence each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The logical names, in the order of the forward pass.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
    }

    /// The logical shape of a parameter.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.parameters.get(name).map(|s| s.shape.as_slice())
    }

    /// Reads whole rows of a parameter, row-major, as float32. A vector has one row.
    ///
    /// # Errors
    /// As [`HfWeights::read_box`].
    pub fn read(&self, name: &str, row0: usize, rows: usize, out: &mut [f32]) -> Result<()> {
        let cols = self.parameters.get(name).and_then(|s| matrix(&s.shape)).map_or(0, |(_, cols)| cols);
        self.read_box(name, row0, rows, 0, cols, out)
    }

    /// Reads a rectangle of a parameter seen as a matrix, row-major, as float32.
    ///
    /// # Errors
    /// When there is no such parameter or rectangle, or the file cannot be read.
    pub fn read_box(
        &self,
        name: &str,
        row0: usize,
        rows: usize,
        col0: usize,
        cols: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let no_such = || Error::user(format!("the imported model has no parameter {name}"));
        let source = self.parameters.get(name).ok_or_else(no_such)?;
        let (all_rows, all_cols) = matrix(&source.shape).ok_or_else(no_such)?;
        let inside = row0.checked_add(rows).is_some_and(|end| end <= all_rows)
            && col0.checked_add(cols).is_some_and(|end| end <= all_cols);
        if !inside || rows * cols != out.len() {
            return Err(Error::failure(format!(
                "read {name} of shape {:?}: {rows} rows from {row0}, {cols} columns from {col0} into {} elements",
                source.shape,
                out.len()
            )));
        }
        if out.is_empty() {
            return Ok(());
        }
        let (path, file) = &self.files[source.file];
        let mut reader = Elements { file, source, staging: Vec::new() };
        match source.place {
            Place::Rows { first, stored_cols } if cols == stored_cols => {
                reader.read(first + row0 * stored_cols, out)
            }
            Place::Rows { first, stored_cols } => out
                .chunks_exact_mut(cols)
                .zip(row0..)
                .try_for_each(|(row, r)| reader.read(first + r * stored_cols + col0, row)),
            Place::Columns { first, stored_cols, step } => {
                reader.read_turned((first + row0 * step, step), rows, stored_cols, col0, cols, out)
            }
            Place::Scaled(rows) => out.chunks_exact_mut(cols).zip(row0..).try_for_each(|(out, row)| {
                self.read_scaled((source.file, source.offset), &rows, row, col0, out)
            }),
        }
        .map_err(|e| Error::io("read", path, &e))
    }
}

/// Reads elements of one tensor as float32.
struct Elements<'a> {
    file: &'a File,
    source: &'a Source,
    staging: Vec<u8>,
}

impl Elements<'_> {
    /// Elements from `first` of the stored tensor on.
    fn read(&mut self, first: usize, out: &mut [f32]) -> std::io::Result<()> {
        let size = self.source.kind.bytes();
        let mut offset = self.source.offset + (first * size) as u64;
        if self.source.kind == Float::F32 {
            return self.file.read_exact_at(bytemuck::cast_slice_mut(out), offset);
        }
        for part in out.chunks_mut(STAGING_BYTES / size) {
            self.staging.resize(part.len() * size, 0);
            self.file.read_exact_at(&mut self.staging, offset)?;
            for (x, b) in part.iter_mut().zip(self.staging.chunks_exact(2)) {
                let bits = u16::from_le_bytes([b[0], b[1]]);
                *x = match self.source.kind {
                    Float::F16 => f16::from_bits(bits).to_f32(),
                    _ => bf16::from_bits(bits).to_f32(),
                };
            }
            offset += self.staging.len() as u64;
        }
        Ok(())
    }

    /// `rows` stored columns from `first` on, every `step`-th, of stored rows `col0..col0 + cols`, turned into `rows` rows
    /// of `cols`.
    fn read_turned(
        &mut self,
        (first, step): (usize, usize),
        rows: usize,
        stored_cols: usize,
        col0: usize,
        cols: usize,
        out: &mut [f32],
    ) -> std::io::Result<()> {
        let wide = (rows - 1) * step + 1;
        let mut block = vec![0.0; TURNED_ROWS * wide];
        for c0 in (0..cols).step_by(TURNED_ROWS) {
            let n = TURNED_ROWS.min(cols - c0);
            for (i, line) in block.chunks_exact_mut(wide).take(n).enumerate() {
                self.read((col0 + c0 + i) * stored_cols + first, line)?;
            }
            for (r, row) in out.chunks_exact_mut(cols).enumerate() {
                for i in 0..n {
                    row[c0 + i] = block[i * wide + r * step];
                }
            }
        }
        Ok(())
    }
}

/// A tensor in one of the files.
struct Found {
    /// Its name there.
    stored: String,
    file: usize,
    offset: u64,
    info: Info,
}

/// The files of a model.
struct WeightFiles {
    files: BTreeSet<String>,
    /// Tensors that the index places in each file.
    promised: BTreeMap<String, Vec<String>>,
}

fn weight_files(dir: &Path) -> Result<WeightFiles> {
    if dir.join(SINGLE).exists() {
        return Ok(WeightFiles { files: [SINGLE.to_owned()].into(), promised: BTreeMap::new() });
    }
    let path = dir.join(INDEX);
    if !path.exists() {
        if dir.join(ADAPTER_CONFIG).exists() {
            return Err(adapter(dir));
        }
        return Err(Error::user(format!("import: {} holds neither {SINGLE} nor {INDEX}", dir.display()))
            .hint("weights in other formats must be saved as safetensors first"));
    }
    let text = input::read_text("import: read", &path, MAX_INDEX_BYTES)?;
    parse_index(&text, &path)
}

const ADAPTER_CONFIG: &str = "adapter_config.json";

fn adapter(dir: &Path) -> Error {
    Error::user(format!("import: {} holds an adapter (LoRA), not a model", dir.display()))
        .hint("merge it into its base model first: merge_and_unload of peft, then save_pretrained")
}

/// Which tensors lie in which files.
fn parse_index(text: &str, path: &Path) -> Result<WeightFiles> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(text))
        .map_err(|e| Error::user(format!("import: {} is damaged: {e}", path.display())))?;
    let mut promised: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        // An index from elsewhere must not reach outside of its directory.
        if file.contains(['/', '\\']) || file.starts_with('.') {
            return Err(Error::user(format!(
                "import: {} places tensor {} in \"{}\", expected a plain file name",
                path.display(),
                shown(&tensor),
                shown(&file)
            )));
        }
        promised.entry(file).or_default().push(tensor);
    }
    Ok(WeightFiles { files: promised.keys().cloned().collect(), promised })
}

#[cfg(test)]
pub(crate) fn parses_as_index(text: &str) -> bool {
    parse_index(text, Path::new("i")).is_ok()
}
