//! Causal attention with grouped queries, in tiles: scores of a few dozen queries against a block of keys are all that
//! is ever kept.
//!
//! A row of qkv holds `heads` query heads, `kv_heads` key heads and `kv_heads` value heads of `head_dim` elements; a
//! row of the output holds `heads` heads. Query head h uses key and value head h / (heads / kv_heads).
//!
//! Blocks are cut by position, by constants that depend on nothing else, and keys are taken in ascending order, so
//! bits depend neither on threads nor on the number of sequences.

mod backward;
mod decode;
mod forward;

pub use backward::{attention_dx, attention_dx_workspace_len};
pub use decode::{attention_decode, attention_decode_workspace_len};
pub use forward::{attention, attention_workspace_len};

use crate::gemm::NR;
use crate::simd::{LANES, kernel, prefetch_far};
use crate::storage::Element;

/// Keys of a block.
const KEYS: usize = 256;
/// Row stride of scores: a block and one more vector, which also keeps rows off the same cache sets.
const SCORES: usize = KEYS + LANES;

/// The shape of packed qkv.
#[derive(Clone, Copy)]
struct Shape {
    seqs: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Row length of qkv.
    fn ld(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Row length of the output.
    fn o_ld(&self) -> usize {
        self.heads * self.head_dim
    }

    /// `head_dim` in whole vectors: the row length of unpacked copies.
    fn wide(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Floats of a block of keys packed by columns.
    fn panels_len(&self) -> usize {
        KEYS.div_ceil(NR) * NR * self.head_dim
    }

    fn check(&self, qkv: usize) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "heads do not divide into groups"
        );
        assert_eq!(qkv, self.seqs * self.seq * self.ld(), "qkv");
    }
}

/// Rows that are asked for ahead of their use: heads are strided, which processors do not foresee.
const AHEAD: usize = 16;

kernel! {
    /// Copies `rows` rows of `cols` elements (row stride `ld`), times `scale`, into rows of `wide` floats filled up
    /// with zeros.
    fn copy_scaled[T: Element](
        src: &[T], ld: usize, rows: usize, cols: usize, scale: f32, dst: &mut [f32], wide: usize
    ) = |s: S| {
        let scale = s.splat(scale);
        for i in 0..rows {
            let from = &src[i * ld..i * ld + cols];
            let ahead = from.as_ptr().wrapping_add(AHEAD * ld);
            let to = &mut dst[i * wide..(i + 1) * wide];
            for j in (0..cols).step_by(LANES) {
                s.prefetch(ahead.wrapping_add(j).cast());
                s.store(&mut to[j..j + LANES], s.mul(T::get(s, &from[j..]), scale));
            }
        }
    }
}

/// Packs `keys` rows of a head (row stride `ld`) by columns: panels of [`NR`] keys.
fn pack_keys<T: Element>(src: &[T], ld: usize, keys: usize, head_dim: usize, panels: &mut [f32]) {
    for (panel, first) in (0..keys).step_by(NR).enumerate() {
        let to = &mut panels[panel * NR * head_dim..(panel + 1) * NR * head_dim];
        for row in first + NR..keys.min(first + 2 * NR) {
            for j in (0..head_dim).step_by(LANES) {
                prefetch_far(src.as_ptr().wrapping_add(row * ld + j));
            }
        }
        crate::gemm::pack_columns(&src[first * ld..], ld, head_dim, NR.min(keys - first), to);
    }
}
