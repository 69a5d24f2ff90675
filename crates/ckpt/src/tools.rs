//! Looking at checkpoints offline.

use std::path::Path;

use serde::Serialize;
use spec::{DType, Result};

use crate::manifest::{Kind, TensorEntry};
use crate::read::{Checkpoint, Verified};
use crate::region::Region;

/// Elements compared at a time: a few chunks.
const DIFF_ELEMENTS: usize = 1 << 20;

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Listing {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Fingerprint of the run.
    pub fingerprint: String,
    /// Ranks that wrote it.
    pub world: usize,
    /// Data files.
    pub files: usize,
    /// Bytes of data files.
    pub bytes: u64,
    /// Elements of all parameters, moments not counted.
    pub parameters: u64,
    /// Every tensor.
    pub tensors: Vec<TensorListing>,
}

/// One tensor of a [`Listing`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorListing {
    /// Logical name.
    pub name: String,
    /// Which of the parameter's tensors.
    pub kind: Kind,
    /// Element type on disk.
    pub dtype: DType,
    /// Global shape.
    pub shape: Vec<usize>,
    /// In how many parts it is stored.
    pub pieces: usize,
}

/// Lists a checkpoint without reading its data.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn ls(path: &Path) -> Result<Listing> {
    let ckpt = Checkpoint::open(path)?;
    let m = ckpt.manifest();
    let tensors = m.tensors.iter().map(|t| TensorListing {
        name: t.name.clone(),
        kind: t.kind,
        dtype: t.dtype,
        shape: t.shape.clone(),
        pieces: t.pieces.len(),
    });
    Ok(Listing {
        step: m.step,
        tokens: m.meta.tokens,
        fingerprint: m.meta.fingerprint.clone(),
        world: m.meta.world,
        files: m.files.len(),
        bytes: m.files.iter().map(|f| f.bytes).sum(),
        parameters: m.tensors.iter().filter(|t| t.kind == Kind::Param).map(|t| elements(t) as u64).sum(),
        tensors: tensors.collect(),
    })
}

/// Reads a checkpoint from end to end and compares all checksums.
///
/// # Errors
/// As [`Checkpoint::open`] and [`Checkpoint::verify`].
pub fn verify(path: &Path) -> Result<Verified> {
    Checkpoint::open(path)?.verify()
}

/// How two checkpoints differ.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Every tensor of either, those of `a` first.
    pub tensors: Vec<TensorDifference>,
}

impl Difference {
    /// Whether all tensors are there in both and equal to the bit.
    pub fn bit_equal(&self) -> bool {
        self.tensors.iter().all(|t| matches!(t, TensorDifference::Compared { bit_equal: true, .. }))
    }
}

/// How one tensor differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum TensorDifference {
    /// Only in `a`.
    OnlyInA {
        /// Logical name.
        name: String,
        /// Which of the parameter's tensors.
        kind: Kind,
    },
    /// Only in `b`.
    OnlyInB {
        /// Logical name.
        name: String,
        /// Which of the parameter's tensors.
        kind: Kind,
    },
    /// In both, with different shapes.
    Shape {
        /// Logical name.
        name: String,
        /// Which of the parameter's tensors.
        kind: Kind,
        /// Shape in `a`.
        a: Vec<usize>,
        /// Shape in `b`.
        b: Vec<usize>,
    },
    /// In both, of the same shape.
    Compared {
        /// Logical name.
        name: String,
        /// Which of the parameter's tensors.
        kind: Kind,
        /// Elements whose bits differ.
        differing: u64,
        /// Largest absolute difference; NaN when one side is NaN where the other is not.
        max_abs: f64,
        /// Whether no bit differs.
        bit_equal: bool,
    },
}

/// Compares two checkpoints, whatever layouts wrote them, in bounded memory.
///
/// # Errors
/// When one cannot be read or is damaged.
pub fn diff(a: &Path, b: &Path) -> Result<Difference> {
    let (a, b) = (Checkpoint::open(a)?, Checkpoint::open(b)?);
    let mut tensors = Vec::new();
    for left in &a.manifest().tensors {
        let (name, kind) = (left.name.clone(), left.kind);
        tensors.push(match b.tensor(&name, kind) {
            Err(_) => TensorDifference::OnlyInA { name, kind },
            Ok(right) if left.shape != right.shape => {
                TensorDifference::Shape { name, kind, a: left.shape.clone(), b: right.shape.clone() }
            }
            Ok(_) => compare(&a, &b, left)?,
        });
    }
    for right in &b.manifest().tensors {
        if a.tensor(&right.name, right.kind).is_err() {
            tensors.push(TensorDifference::OnlyInB { name: right.name.clone(), kind: right.kind });
        }
    }
    Ok(Difference { tensors })
}

fn compare(a: &Checkpoint, b: &Checkpoint, tensor: &TensorEntry) -> Result<TensorDifference> {
    let (name, kind) = (tensor.name.as_str(), tensor.kind);
    let total = elements(tensor);
    let mut buffers = [vec![0f32; total.min(DIFF_ELEMENTS)], vec![0f32; total.min(DIFF_ELEMENTS)]];
    let (mut differing, mut max_abs) = (0, 0f64);
    for start in (0..total).step_by(DIFF_ELEMENTS) {
        let n = DIFF_ELEMENTS.min(total - start);
        let region = [Region::range(start, n)];
        for (ckpt, buffer) in [a, b].into_iter().zip(&mut buffers) {
            ckpt.read_regions(name, kind, &region, &mut buffer[..n])?;
        }
        for (x, y) in buffers[0][..n].iter().zip(&buffers[1][..n]) {
            if x.to_bits() == y.to_bits() {
                continue;
            }
            differing += 1;
            let difference = (f64::from(*x) - f64::from(*y)).abs();
            // `max` would drop NaN; once seen it stays. Infinities of the same sign and NaNs of different bits count 0.
            if (x.is_nan() && y.is_nan()) || x == y || max_abs.is_nan() {
                continue;
            }
            max_abs = if difference.is_nan() { difference } else { max_abs.max(difference) };
        }
    }
    Ok(TensorDifference::Compared {
        name: name.to_owned(),
        kind,
        differing,
        max_abs,
        bit_equal: differing == 0,
    })
}

fn elements(tensor: &TensorEntry) -> usize {
    tensor.shape.iter().product()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Meta, Piece, Saver};

    fn save(dir: &Path, step: u64, tensors: &[(&str, &[f32])]) -> std::path::PathBuf {
        let shapes: Vec<[usize; 1]> = tensors.iter().map(|(_, d)| [d.len()]).collect();
        let pieces = tensors.iter().zip(&shapes).map(|((name, data), shape)| Piece {
            name,
            kind: Kind::Param,
            global_shape: shape,
            boxes: vec![Region::whole(shape)],
            data,
        });
        Saver::save(dir, step, pieces, Meta { tokens: 9, world: 1, ..Meta::default() }).unwrap()
    }

    #[test]
    fn differences_are_named_and_measured() {
        let dir = tempfile::tempdir().unwrap();
        let a =
            save(dir.path(), 1, &[("x", &[1.0, 0.0, 2.0]), ("y", &[1.0]), ("z", &[1.0]), ("n", &[f32::NAN])]);
        let b = save(
            dir.path(),
            2,
            &[("x", &[1.0, -0.0, 2.5]), ("z", &[1.0, 2.0]), ("w", &[1.0]), ("n", &[1.0])],
        );
        let found = diff(&a, &b).unwrap().tensors;
        let (kind, one) = (Kind::Param, |s: &str| s.to_owned());
        let compared = |name, differing, max_abs: f64| TensorDifference::Compared {
            name,
            kind,
            differing,
            max_abs,
            bit_equal: differing == 0,
        };
        assert_eq!(found[0], compared(one("x"), 2, 0.5));
        assert_eq!(found[1], TensorDifference::OnlyInA { name: one("y"), kind });
        assert_eq!(found[2], TensorDifference::Shape { name: one("z"), kind, a: vec![1], b: vec![2] });
        assert!(matches!(found[3], TensorDifference::Compared { max_abs, .. } if max_abs.is_nan()));
        assert_eq!(found[4], TensorDifference::OnlyInB { name: one("w"), kind });
        assert!(!diff(&a, &b).unwrap().bit_equal());
        assert!(diff(&a, &a).unwrap().bit_equal());
    }

    #[test]
    fn listing() {
        let dir = tempfile::tempdir().unwrap();
        let path = save(dir.path(), 1, &[("x", &[1.0, 0.0, 2.0]), ("y", &[])]);
        let found = ls(&path).unwrap();
        assert_eq!((found.step, found.tokens, found.parameters, found.files), (1, 9, 3, 1));
        assert_eq!(found.tensors[0].shape, [3]);
        assert_eq!(verify(&path).unwrap().bytes, found.bytes);
    }
}
