//! Weights in 8 and 4 bits with scales beside them, as DeepSeek-V3 and GPT-OSS are published.

use std::io;
use std::os::unix::fs::FileExt;

use super::names::HfTensor;
use super::{Float, Found, HfWeights, Place, Source};
use crate::header::dims;
use crate::input::shown;

/// Rows and columns that share a scale (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
const SQUARE: usize = 128;
/// Elements of a row that share a scale (OCP Microscaling Formats, version 1.0, section 5.2), and their bytes.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = BLOCK / 2;

/// Where the scales of a tensor lie, and what they are of.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scales {
    /// One f32 for each square of e4m3 elements, `cols` of them side by side.
    Squares { file: usize, offset: u64, cols: usize },
    /// One power of two for each block of e2m1 elements in a row (MXFP4).
    Blocks { file: usize, offset: u64 },
}

/// A parameter among such rows: row `r` is the stored row `row0 + r step`, from column `col0` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    row0: usize,
    step: usize,
    stored_cols: usize,
    col0: usize,
    scales: Scales,
}

impl HfWeights {
    /// Adds a tensor of e4m3 elements, whose scales are in `scales`.
    pub(super) fn add_squares(
        &mut self,
        tensor: &HfTensor,
        at: &Found,
        scales: &Found,
    ) -> Result<(), String> {
        let (name, stored) = (&tensor.name, tensor.shape());
        if at.info.shape != stored || stored.len() != 2 || tensor.transposed {
            return Err(format!("tensor {name} has shape {}, expected {stored:?}", dims(&at.info.shape)));
        }
        let wanted = [stored[0].div_ceil(SQUARE), stored[1].div_ceil(SQUARE)];
        if scales.info.shape != wanted || scales.info.dtype != "F32" {
            return Err(format!(
                "tensor {} is {} {}, expected F32 {wanted:?}: a scale for each {SQUARE} rows and columns",
                shown(&scales.stored),
                shown(&scales.info.dtype),
                dims(&scales.info.shape)
            ));
        }
        let scales = Scales::Squares { file: scales.file, offset: scales.offset, cols: wanted[1] };
        let (mut row0, mut col0) = (0, 0);
        for part in &tensor.parts {
            let rows = Rows { row0, step: 1, stored_cols: stored[1], col0, scales };
            self.add_scaled(&part.name, &part.shape, at, rows);
            match tensor.beside {
                true => col0 += part.shape[1],
                false => row0 += part.shape[0],
            }
        }
        Ok(())
    }

    /// Adds the matrices of experts in blocks of e2m1 elements: rows are outputs, unlike those of the same tensor in more
    /// bits, and the parts of an expert alternate.
    pub(super) fn add_blocks(&mut self, tensor: &HfTensor, at: &Found, scales: &Found) -> Result<(), String> {
        let (slab, parts) = (tensor.slab_shape(), tensor.parts_of_slab());
        let (cols, rows) = (slab[0], slab[1]);
        let slabs = tensor.slabs.unwrap_or(1);
        if !cols.is_multiple_of(BLOCK) {
            return Err(format!("tensor {} has rows of {cols} elements, no blocks of {BLOCK}", tensor.name));
        }
        let blocks = [slabs, rows, cols / BLOCK, BLOCK_BYTES];
        for (found, wanted) in [(at, &blocks[..]), (scales, &blocks[..3])] {
            if found.info.shape != wanted || found.info.dtype != "U8" {
                return Err(format!(
                    "tensor {} is {} {}, expected U8 {wanted:?}",
                    shown(&found.stored),
                    shown(&found.info.dtype),
                    dims(&found.info.shape)
                ));
            }
        }
        let scales = Scales::Blocks { file: scales.file, offset: scales.offset };
        for (i, part) in tensor.parts.iter().enumerate() {
            let row0 = i / parts * rows + i % parts;
            let rows = Rows { row0, step: parts, stored_cols: cols, col0: 0, scales };
            self.add_scaled(&part.name, &part.shape, at, rows);
        }
        Ok(())
    }

    fn add_scaled(&mut self, name: &str, shape: &[usize], at: &Found, rows: Rows) {
        let (file, offset, shape) = (at.file, at.offset, shape.to_vec());
        let source = Source { file, offset, kind: Float::F32, shape, place: Place::Scaled(rows) };
        self.parameters.insert(name.to_owned(), source);
        self.order.push(name.to_owned());
    }

    /// Reads some columns of row `row` of a parameter.
    pub(super) fn read_scaled(
        &self,
        (file, offset): (usize, u64),
        rows: &Rows,
        row: usize,
        col0: usize,
        out: &mut [f32],
    ) -> io::Result<()> {
        let (row, first) = (rows.row0 + row * rows.step, rows.col0 + col0);
        let end = first + out.len();
        let read = |file: usize, offset: u64, at: usize, bytes: usize| {
            let mut all = vec![0; bytes];
            self.files[file].1.read_exact_at(&mut all, offset + at as u64).map(|()| all)
        };
        match rows.scales {
            Scales::Squares { file: other, offset: from, cols } => {
                let elements = read(file, offset, row * rows.stored_cols + first, out.len())?;
                let (left, right) = (first / SQUARE, end.div_ceil(SQUARE));
                let scales = read(other, from, 4 * (row / SQUARE * cols + left), 4 * (right - left))?;
                let scale = |col: usize| {
                    let at = 4 * (col / SQUARE - left);
                    f32::from_le_bytes([scales[at], scales[at + 1], scales[at + 2], scales[at + 3]])
                };
                for ((x, byte), col) in out.iter_mut().zip(elements).zip(first..) {
                    *x = e4m3(byte) * scale(col);
                }
            }
            Scales::Blocks { file: other, offset: from } => {
                let (left, right) = (first / BLOCK, end.div_ceil(BLOCK));
                let before = row * (rows.stored_cols / BLOCK) + left;
                let elements = read(file, offset, before * BLOCK_BYTES, (right - left) * BLOCK_BYTES)?;
                let scales = read(other, from, before, right - left)?;
                for (x, col) in out.iter_mut().zip(first - left * BLOCK..) {
                    // The first of two elements is in the lower half of their byte.
                    let bits = elements[col / 2] >> (col % 2 * 4);
                    *x = e2m1(bits & 0xf) * e8m0(scales[col / BLOCK]);
                }
            }
        }
        Ok(())
    }
}

/// A sign, two bits of exponent and one of mantissa (OCP Microscaling Formats, section 5.3.3).
fn e2m1(bits: u8) -> f32 {
    const SIZES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let size = SIZES[usize::from(bits & 7)];
    if bits & 8 == 0 { size } else { -size }
}

/// A power of two from 2^-127 to 2^127; 255 is no number (section 5.4.1).
fn e8m0(bits: u8) -> f32 {
    match bits {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(bits) << 23),
    }
}

/// A sign, four bits of exponent and three of mantissa, without infinities (Micikevicius et al. 2022, arXiv 2209.05433,
/// table 1).
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if bits >> 7 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_those_of_the_formats() {
        let four: Vec<f32> = (0..16).map(e2m1).collect();
        assert_eq!(four[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert!((0..8).all(|i| four[8 + i] == -four[i]));
        assert_eq!([0, 1, 126, 127, 128, 254].map(e8m0), [-127, -126, -1, 0, 1, 127].map(|e| 2f32.powi(e)));
        assert!(e8m0(255).is_nan());
        // The least, the greatest below normal, the least normal, one, and the greatest.
        let eight = [0x01, 0x07, 0x08, 0x38, 0x7e].map(e4m3);
        assert_eq!(eight, [2f32.powi(-9), 0.875 * 2f32.powi(-6), 2f32.powi(-6), 1.0, 448.0]);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && e4m3(0xb8) == -1.0);
    }
}
