//! Weights of llm.c: `model_00000500.bin`, 256 integers of 32 bits and the tensors of a GPT-2, end to end.
//! Source: `write_model` of llm.c's `train_gpt2.py`; versions 3 (float32) and 5 (bfloat16).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::bf16;
use spec::{Error, Result};

use crate::input;

const MAGIC: i32 = 20_240_326;
const HEADER_BYTES: usize = 1024;

/// Elements read at a time.
const ELEMENTS: usize = 1 << 20;

/// Narrower is no model, and would have more names than weights.
const MIN_CHANNELS: usize = 16;

/// Weights of llm.c, open for reading.
#[derive(Debug)]
pub(crate) struct LlmC {
    path: PathBuf,
    file: File,
    /// Bytes of an element.
    size: usize,
    pub(crate) tensors: Vec<Stored>,
}

/// A parameter and where it starts.
#[derive(Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    at: u64,
}

/// The shape of the model.
struct Shape {
    positions: usize,
    vocab: usize,
    padded_vocab: usize,
    layers: usize,
    channels: usize,
}

/// Whether a file begins as llm.c's weights do.
pub(crate) fn is_llmc(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC.to_le_bytes()
}

impl LlmC {
    /// # Errors
    /// A user error when it is no such file, or not as long as its header says.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = input::open("import: open", path)?;
        let io = |e| Error::io("import: read", path, &e);
        let refused = |why: String| Error::user(format!("import: {}: {why}", path.display()));
        if !is_llmc(&file) {
            return Err(refused("it does not begin as weights of llm.c do".into()));
        }
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let (size, tensors) = layout(&header, len).map_err(refused)?;
        Ok(LlmC { path: path.to_owned(), file, size, tensors })
    }

    /// Hands out a tensor's elements in order.
    ///
    /// # Errors
    /// When reading fails, or `out` does.
    pub(crate) fn stream(&self, tensor: &Stored, out: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let total: usize = tensor.shape.iter().product();
        let mut bytes = vec![0; self.size * total.min(ELEMENTS)];
        for start in (0..total).step_by(ELEMENTS) {
            let part = &mut bytes[..self.size * ELEMENTS.min(total - start)];
            let at = tensor.at + (self.size * start) as u64;
            self.file.read_exact_at(part, at).map_err(|e| Error::io("import: read", &self.path, &e))?;
            let floats: Vec<f32> = match self.size {
                2 => part.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
                _ => part.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            };
            out(&floats)?;
        }
        Ok(())
    }
}

/// Bytes of an element, and where the parameters of a model lie in a file of `file_bytes`.
fn layout(header: &[u8], file_bytes: u64) -> Result<(usize, Vec<Stored>), String> {
    let field = |i: usize| {
        i32::from_le_bytes([header[4 * i], header[4 * i + 1], header[4 * i + 2], header[4 * i + 3]])
    };
    let size = match field(1) {
        3 => 4,
        5 => 2,
        other => return Err(format!("version {other}, expected 3 (float32) or 5 (bfloat16)")),
    };
    let count = |i: usize, what: &str| {
        usize::try_from(field(i))
            .ok()
            .filter(|n| *n > 0)
            .ok_or(format!("{what} {}, expected 1 or more", field(i)))
    };
    let shape = Shape {
        positions: count(2, "longest sequence")?,
        vocab: count(3, "vocabulary")?,
        layers: count(4, "layers")?,
        channels: count(6, "channels")?,
        padded_vocab: count(7, "padded vocabulary")?,
    };
    let heads = count(5, "heads")?;
    if shape.channels < MIN_CHANNELS
        || !shape.channels.is_multiple_of(heads)
        || shape.padded_vocab < shape.vocab
    {
        return Err(format!(
            "{} channels of {heads} heads, a vocabulary of {} padded to {}: no model is like that",
            shape.channels, shape.vocab, shape.padded_vocab
        ));
    }
    let expected =
        shape.elements().and_then(|n| n.checked_mul(size)).and_then(|n| n.checked_add(HEADER_BYTES));
    if expected.map(|n| n as u64) != Some(file_bytes) {
        let expected = expected.map_or("more than there can be".to_owned(), |n| n.to_string());
        return Err(format!("{file_bytes} bytes, its header says {expected}"));
    }
    Ok((size, shape.tensors(size)))
}

impl Shape {
    /// All elements of the file.
    fn elements(&self) -> Option<usize> {
        let (l, c) = (self.layers, self.channels);
        let embeddings = self.padded_vocab.checked_add(self.positions)?.checked_mul(c)?;
        // Four norms' vectors, the biases of 3, 1, 4 and 1 times the width, and the four matrices.
        let layer = c.checked_mul(c)?.checked_mul(12)?.checked_add(c.checked_mul(13)?)?;
        embeddings.checked_add(layer.checked_mul(l)?)?.checked_add(2 * c)
    }

    /// The tensors in the order of the file: each kind with all layers.
    fn tensors(&self, size: usize) -> Vec<Stored> {
        let (c, mut at) = (self.channels, HEADER_BYTES);
        let mut found = Vec::new();
        let mut put = |name: String, shape: &[usize], stored: usize| {
            found.push(Stored { name, shape: shape.to_vec(), at: at as u64 });
            at += size * stored;
        };
        put("embed.weight".into(), &[self.vocab, c], self.padded_vocab * c);
        put("pos_embed.weight".into(), &[self.positions, c], self.positions * c);
        let layers: [(&[&str], &[usize]); 12] = [
            (&["attn_norm.weight"], &[c]),
            (&["attn_norm.bias"], &[c]),
            (&["attn.q.weight", "attn.k.weight", "attn.v.weight"], &[c, c]),
            (&["attn.q.bias", "attn.k.bias", "attn.v.bias"], &[c]),
            (&["attn.o.weight"], &[c, c]),
            (&["attn.o.bias"], &[c]),
            (&["mlp_norm.weight"], &[c]),
            (&["mlp_norm.bias"], &[c]),
            (&["mlp.up.weight"], &[4 * c, c]),
            (&["mlp.up.bias"], &[4 * c]),
            (&["mlp.down.weight"], &[c, 4 * c]),
            (&["mlp.down.bias"], &[c]),
        ];
        for (names, shape) in layers {
            for layer in 0..self.layers {
                for name in names {
                    put(format!("layers.{layer}.{name}"), shape, shape.iter().product());
                }
            }
        }
        put("final_norm.weight".into(), &[c], c);
        put("final_norm.bias".into(), &[c], c);
        found
    }
}
