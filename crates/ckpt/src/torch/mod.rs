//! Checkpoints of other trainers: PyTorch's `torch.distributed.checkpoint` both ways, Megatron's `torch_dist` and llm.c's
//! weights to be read.

mod arena;
mod blob;
mod dcp;
mod globals;
mod llmc;
mod pickle;
mod place;
mod write;

#[cfg(test)]
mod fuzz_test;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spec::{Error, Result};

use crate::input::{self, shown};
use crate::manifest::{Kind, Meta};
use crate::region::Region;
use crate::save::{Outline, Saver};
use dcp::{Dcp, METADATA};
use globals::Element;
use llmc::LlmC;
use place::{META, Place};

pub use write::{ExportedDcp, export_dcp};

/// What another trainer wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `torch.distributed.checkpoint`.
    Dcp,
    /// Megatron's `torch_dist`.
    Megatron,
    /// Weights of llm.c.
    LlmC,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Dcp => "dcp",
            Format::Megatron => "megatron",
            Format::LlmC => "llmc",
        })
    }
}

/// What [`import`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// What it was.
    pub format: Format,
    /// The checkpoint's directory.
    pub path: PathBuf,
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the data file.
    pub bytes: u64,
    /// Whether it holds all that a run of Phalanx saved: its own export.
    pub whole: bool,
    /// What was left out, one sentence each.
    pub notes: Vec<String>,
}

/// Writes another trainer's checkpoint as `out_dir/step-...`, elements as float32. `format` is told by content if it is
/// not given. Nothing that a file says is executed.
///
/// Tensors keep their names; PyTorch's `model.` goes, and moments are recognised by the names that optimisers give. llm.c's
/// parameters get the names that Phalanx has for them. What [`export_dcp`] wrote comes back as it was, step and state too.
///
/// # Errors
/// A user error when `from` is of no such format, damaged, hostile, or holds no tensor, or that step is there already;
/// a failure when writing fails, which leaves nothing behind.
pub fn import(from: &Path, out_dir: &Path, format: Option<Format>) -> Result<Imported> {
    let (found, place) = detect(from)?;
    if let Some(asked) = format
        && asked != found
        && (asked, found) != (Format::Dcp, Format::Megatron)
    {
        return Err(Error::user(format!("import: {} is of format {found}, not {asked}", from.display()))
            .hint(format!("leave --format out, or give --format {found}")));
    }
    let source = match found {
        Format::LlmC => Source::LlmC(LlmC::open(&place)?),
        Format::Dcp | Format::Megatron => Source::Dcp(Dcp::open(&place)?),
    };
    let mut notes = Vec::new();
    let about = source.about()?;
    let wanted = source.wanted(&mut notes)?;
    if wanted.is_empty() {
        return Err(Error::user(format!("import: {} holds no tensor of floats", place.display()))
            .hint("give the directory of a checkpoint of a model"));
    }
    let whole = about.is_some();
    let About { step, meta } =
        about.unwrap_or_else(|| About { step: step_of(&place), meta: Meta::default() });
    let meta = Meta { world: 1, ..meta };
    let boxes: Vec<[Region; 1]> = wanted.iter().map(|w| [Region::whole(w.shape)]).collect();
    let outlines: Vec<Outline<'_>> = wanted
        .iter()
        .zip(&boxes)
        .map(|(w, boxes)| Outline { name: w.name, kind: w.kind, shape: w.shape, boxes })
        .collect();
    Saver::only(out_dir, step, |saver| {
        let record = saver.write_streamed(0, &outlines, |out| {
            wanted
                .iter()
                .try_for_each(|w| source.stream(w.index, &mut |part| out(bytemuck::cast_slice(part))))
        })?;
        let bytes = record.bytes();
        let path = saver.commit_only(out_dir, vec![record], meta)?;
        Ok(Imported { format: found, path, tensors: wanted.len(), bytes, whole, notes })
    })
}

/// What `phalanx.meta` says.
#[derive(Debug, PartialEq)]
struct About {
    step: u64,
    meta: Meta,
}

#[derive(Serialize, Deserialize)]
struct AboutWire {
    step: u64,
    tokens: u64,
    fingerprint: String,
    world: usize,
    #[serde(deserialize_with = "spec::small_json")]
    state: serde_json::Value,
}

enum Source {
    Dcp(Dcp),
    LlmC(LlmC),
}

/// A tensor to be taken.
struct Wanted<'a> {
    name: &'a str,
    kind: Kind,
    shape: &'a [usize],
    index: usize,
}

impl Source {
    fn about(&self) -> Result<Option<About>> {
        let Source::Dcp(dcp) = self else { return Ok(None) };
        let Some(tensor) = dcp.tensors.iter().find(|t| t.name == META && t.element == Element::U8) else {
            return Ok(None);
        };
        let AboutWire { step, tokens, fingerprint, world, state } =
            serde_json::from_slice(&dcp.read_raw(tensor)?).map_err(|e| {
                Error::user(format!("import: {META} is damaged: {e}")).hint("export the checkpoint again")
            })?;
        Ok(Some(About { step, meta: Meta { tokens, fingerprint, world, state } }))
    }

    /// The tensors to take; a note says what is not.
    fn wanted(&self, notes: &mut Vec<String>) -> Result<Vec<Wanted<'_>>> {
        let dcp = match self {
            Source::LlmC(from) => {
                let all = from.tensors.iter().enumerate();
                return Ok(all
                    .map(|(index, t)| Wanted { name: &t.name, kind: Kind::Param, shape: &t.shape, index })
                    .collect());
            }
            Source::Dcp(dcp) => dcp,
        };
        let (mut wanted, mut names) = (Vec::new(), HashSet::new());
        let mut left: Vec<&str> = dcp.others.iter().map(String::as_str).collect();
        for (index, tensor) in dcp.tensors.iter().enumerate() {
            let (place, name) = Place::parse(&tensor.name);
            let kind = place
                .kind()
                .filter(|_| matches!(tensor.element, Element::F32 | Element::Bf16 | Element::F16));
            let Some(kind) = kind else {
                let known = place == Place::Step || tensor.name == META;
                left.extend((!known).then_some(tensor.name.as_str()));
                continue;
            };
            if !names.insert((kind, name)) {
                return Err(Error::user(format!("import: two tensors are {kind} {}", shown(name)))
                    .hint("save the model alone, or under names of its own"));
            }
            wanted.push(Wanted { name, kind, shape: &tensor.shape, index });
        }
        if !left.is_empty() {
            const SHOWN: usize = 5;
            let first: Vec<String> = left.iter().take(SHOWN).map(|name| shown(name)).collect();
            let more = if left.len() > SHOWN { ", ..." } else { "" };
            let count = left.len();
            notes.push(format!(
                "{count} entries are no floats of 16 or 32 bits and left out: {}{more}",
                first.join(", ")
            ));
        }
        Ok(wanted)
    }

    fn stream(&self, index: usize, out: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        match self {
            Source::Dcp(dcp) => out(&dcp.read(&dcp.tensors[index])?),
            Source::LlmC(from) => from.stream(&from.tensors[index], out),
        }
    }
}

/// Megatron's note of its newest checkpoint.
const LATEST: &str = "latest_checkpointed_iteration.txt";
const MAX_NOTE_BYTES: usize = 1 << 16;

/// The format of what lies at `from`, and the very place of it.
fn detect(from: &Path) -> Result<(Format, PathBuf)> {
    if !from.is_dir() {
        let file = input::open("import: open", from)?;
        if llmc::is_llmc(&file) {
            return Ok((Format::LlmC, from.to_owned()));
        }
        return Err(Error::user(format!("import: {} is of no format that is read", from.display()))
            .hint("give a directory with .metadata (PyTorch, Megatron) or a model_*.bin of llm.c"));
    }
    let latest = from.join(LATEST);
    if !from.join(METADATA).exists() && latest.exists() {
        let text = input::read_text("import: read", &latest, MAX_NOTE_BYTES)?;
        let name = match (text.trim(), text.trim().parse::<u64>()) {
            ("release", _) => "release".to_owned(),
            (_, Ok(iteration)) => format!("iter_{iteration:07}"),
            (other, _) => {
                let other = shown(other);
                return Err(Error::user(format!(
                    "import: {}: '{other}', expected an iteration",
                    latest.display()
                ))
                .hint("give the directory of an iteration, iter_0000500"));
            }
        };
        return detect(&from.join(name));
    }
    if !from.join(METADATA).exists() {
        return Err(Error::user(format!("import: {} holds no {METADATA}", from.display())).hint(
            "give the directory that torch.distributed.checkpoint or Megatron (torch_dist) wrote; one file for each rank \
             (__0.metadata) and mp_rank_00 directories are not read",
        ));
    }
    let config = from.join("metadata.json");
    let megatron =
        config.exists() && input::read_text("import: read", &config, MAX_NOTE_BYTES)?.contains("torch_dist");
    Ok((if megatron { Format::Megatron } else { Format::Dcp }, from.to_owned()))
}

/// The step in the name of Megatron's `iter_0000500`, or 0.
fn step_of(place: &Path) -> u64 {
    let name = place.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    name.strip_prefix("iter_").and_then(|digits| digits.parse().ok()).unwrap_or(0)
}
