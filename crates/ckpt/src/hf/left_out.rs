//! Tensors that an import does not take: what they say is compared with what the model computes without them.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use spec::{Error, ModelSpec, Position, Result, RopeScaling};

use super::problems::Problems;
use super::{Elements, Float, Found, HfWeights, Place, STAGING_BYTES, Source, names};
use crate::header::dims;
use crate::input::shown;

/// What the names of a layer's tensors begin with, if `name` is the projection by which a layer behind the model's own
/// predicts a later token (DeepSeek-V3, arXiv 2412.19437, section 2.2).
pub(super) fn prediction_layer(spec: &ModelSpec, name: &str) -> Option<String> {
    let layer = name.strip_prefix("layers.")?.strip_suffix(".eh_proj.weight")?;
    let behind = layer.parse::<usize>().is_ok_and(|i| i >= spec.layers);
    behind.then(|| format!("layers.{layer}."))
}

impl HfWeights {
    /// Sorts the tensors that the table of names does not list into those that change nothing, those of other parts
    /// of a wrapper, and problems.
    pub(super) fn leave_out(
        &mut self,
        spec: &ModelSpec,
        left: BTreeMap<String, Found>,
        problems: &mut Problems,
    ) -> Result<()> {
        let (mut other_parts, mut later) = (Vec::new(), Vec::new());
        let predicts: Vec<String> = left.keys().filter_map(|name| prediction_layer(spec, name)).collect();
        let copies = names::copies(spec);
        for (name, found) in left {
            if let Some((_, of)) = copies.iter().find(|(copy, _)| *copy == name) {
                if !self.is_table(spec, of, &found)? {
                    problems.other.push(format!("tensor {} is not {of} once more", shown(&found.stored)));
                }
            } else if name == names::HEAD && spec.tied_embeddings {
                if !self.is_table(spec, names::EMBEDDING, &found)? {
                    problems.other.push(format!(
                        "tensor {} is not the embedding that config.json ties it to (set tie_word_embeddings to false \
                         there to keep it, or remove the tensor)",
                        shown(&found.stored)
                    ));
                }
            } else if names::is_buffer(spec, &name) {
                if let Some(why) = self.unlike_buffer(spec, &name, &found)? {
                    problems.other.push(why);
                }
            } else if names::of_another_part(&found.stored) {
                other_parts.push(found.stored);
            } else if predicts.iter().any(|layer| name.starts_with(layer)) {
                later.push(found.stored);
            } else {
                problems.unexpected.push(found.stored);
            }
        }
        if let Some(first) = other_parts.first() {
            self.notes.push(format!(
                "{} tensors of other parts than the text model are left out, such as {}",
                other_parts.len(),
                shown(first)
            ));
        }
        if let Some(first) = later.first() {
            self.notes.push(format!(
                "{} tensors of layers that predict later tokens are left out, such as {}",
                later.len(),
                shown(first)
            ));
        }
        Ok(())
    }

    /// Whether a table holds the same numbers as the embedding, or the head.
    fn is_table(&self, spec: &ModelSpec, of: &str, head: &Found) -> Result<bool> {
        let (rows, cols) = (spec.vocab, spec.hidden);
        // A missing embedding is a problem of its own.
        if !self.parameters.contains_key(of) {
            return Ok(true);
        }
        let Some(kind) = Float::parse(&head.info.dtype).filter(|_| head.info.shape == [rows, cols]) else {
            return Ok(false);
        };
        let (file, offset) = (head.file, head.offset);
        let source = Source { file, offset, kind, shape: head.info.shape.clone(), place: Place::whole(cols) };
        let (path, file) = &self.files[file];
        let mut elements = Elements { file, source: &source, staging: Vec::new() };
        let at_once = (STAGING_BYTES / cols.max(1)).clamp(1, rows);
        let mut buffers = [vec![0f32; at_once * cols], vec![0f32; at_once * cols]];
        for row0 in (0..rows).step_by(at_once) {
            let n = at_once.min(rows - row0);
            let [ours, theirs] = &mut buffers;
            self.read(of, row0, n, &mut ours[..n * cols])?;
            elements.read(row0 * cols, &mut theirs[..n * cols]).map_err(|e| Error::io("read", path, &e))?;
            if ours[..n * cols] != theirs[..n * cols] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How a buffer of an old version differs from what the model computes in its place, if it does.
    fn unlike_buffer(&self, spec: &ModelSpec, name: &str, found: &Found) -> Result<Option<String>> {
        let right = match &spec.position {
            Position::Learned { max_positions } if name.ends_with(".attn.bias") => {
                let n = *max_positions;
                let causal = |i: usize, x: f32| (x != 0.0) == (i % n <= i / n);
                found.info.shape == [1, 1, n, n] && self.all(found, n * n, causal)?
            }
            Position::Rope(rope) if rope.scaling == RopeScaling::Default => {
                let n = spec.latent.map_or(spec.head_dim, |l| l.rope_dim) / 2;
                // Half precision keeps three digits of the small ones at best.
                let near = |i: usize, x: f32| {
                    let right = rope.theta.powf(-(i as f64) / n as f64);
                    (f64::from(x) - right).abs() <= 0.02 * right + 1e-4
                };
                found.info.shape == [n] && self.all(found, n, near)?
            }
            // A constant, and frequencies that depend on the length.
            _ => true,
        };
        let wrong = || {
            format!(
                "buffer {} {} is not what config.json says: correct config.json, or remove the tensor",
                shown(&found.stored),
                dims(&found.info.shape)
            )
        };
        Ok((!right).then(wrong))
    }

    fn all(&self, found: &Found, n: usize, right: impl Fn(usize, f32) -> bool) -> Result<bool> {
        let size = match found.info.dtype.as_str() {
            "F32" => 4,
            "BF16" | "F16" => 2,
            "BOOL" | "U8" | "I8" => 1,
            _ => return Ok(false),
        };
        let (path, file) = &self.files[found.file];
        let mut bytes = vec![0; STAGING_BYTES];
        for first in (0..n).step_by(STAGING_BYTES / size) {
            let bytes = &mut bytes[..size * (n - first).min(STAGING_BYTES / size)];
            file.read_exact_at(bytes, found.offset + (first * size) as u64)
                .map_err(|e| Error::io("read", path, &e))?;
            let value = |b: &[u8]| match (found.info.dtype.as_str(), b) {
                ("F32", &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                ("F16", &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                ("BF16", &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                _ => f32::from(b[0]),
            };
            if !bytes.chunks_exact(size).zip(first..).all(|(b, i)| right(i, value(b))) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
