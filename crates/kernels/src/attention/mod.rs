//! Causal attention with grouped queries, in tiles: scores of a few dozen queries against a block of keys are all that
//! is ever kept. Tiles that no query of theirs sees, for windows or documents, are left out; the others are computed as
//! if all were.
//!
//! A row of qkv holds `heads` query heads and `kv_heads` key heads of `head_dim` elements and `kv_heads` value heads of
//! `value_dim`; a row of the output holds `heads` heads of `value_dim`. Query head h uses key and value head
//! h / (heads / kv_heads).
//!
//! Blocks are cut by position, by constants that depend on nothing else, and keys are taken in ascending order, so
//! bits depend neither on threads nor on the number of sequences.

mod backward;
mod decode;
mod forward;
mod heads;
mod ring;
mod sees;
mod sinks;

pub use backward::{attention_dx, attention_dx_workspace_len};
pub(crate) use decode::softmax_of;
pub use decode::{attention_decode, attention_decode_workspace_len};
pub use forward::{attention, attention_maxima, attention_workspace_len};
pub use heads::{join_heads, split_heads};
pub use ring::{
    Sight, Softmax, attention_part, attention_part_dx, attention_parts, attention_parts_dx, pack_kv,
};
pub use sees::{AttentionDropout, Sees};
pub use sinks::{attention_sinks_dw, attention_sinks_dw_workspace_len};

use crate::gemm::{NR, panel};
use crate::simd::{LANES, kernel, prefetch_far};
use crate::storage::Element;

/// Keys of a block.
pub(crate) const KEYS: usize = 256;
/// Row stride of scores: a block and one more vector, which also keeps rows off the same cache sets.
const SCORES: usize = KEYS + LANES;

/// The shape of packed qkv, and what scores are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Sequences.
    pub seqs: usize,
    /// Rows of each.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head's queries and keys.
    pub head_dim: usize,
    /// Width of a head's values.
    pub value_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
}

impl Attention {
    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Row length of keys and values alone.
    fn kv_ld(&self) -> usize {
        self.kv_heads * (self.head_dim + self.value_dim)
    }

    /// Row length of qkv.
    fn ld(&self) -> usize {
        self.heads * self.head_dim + self.kv_ld()
    }

    /// Row length of the output.
    fn o_ld(&self) -> usize {
        self.heads * self.value_dim
    }

    /// `head_dim` in whole vectors: the row length of unpacked copies.
    fn wide(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// The same of values.
    fn wide_values(&self) -> usize {
        self.value_dim.next_multiple_of(LANES)
    }

    /// Floats of a block of keys, or of values, packed by columns.
    fn panels_len(&self, dim: usize) -> usize {
        KEYS.div_ceil(NR) * NR * dim
    }

    fn check(&self, qkv: usize) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "heads do not divide into groups"
        );
        assert_eq!(qkv, self.seqs * self.seq * self.ld(), "qkv");
    }

    /// Keys and values where they lie in packed qkv.
    fn own<'a, T>(&self, qkv: &'a [T]) -> Keys<'a, T> {
        Keys { data: qkv, ld: self.ld(), at: self.heads * self.head_dim }
    }
}

/// Rows of keys and values, of all heads: keys from `at` on, values behind them.
#[derive(Clone, Copy)]
struct Keys<'a, T> {
    data: &'a [T],
    ld: usize,
    at: usize,
}

impl<'a, T> Keys<'a, T> {
    /// Keys and values of one sequence and head, from row `first` on.
    fn head(&self, shape: &Attention, sequence: usize, head: usize, first: usize) -> (&'a [T], &'a [T]) {
        let row = (sequence * shape.seq + first) * self.ld + self.at;
        let values = row + shape.kv_heads * shape.head_dim + head * shape.value_dim;
        (&self.data[row + head * shape.head_dim..], &self.data[values..])
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

/// Packs `keys` rows of a head (row stride `ld`) by columns: panels of [`panel`] keys.
fn pack_keys<T: Element>(src: &[T], ld: usize, keys: usize, head_dim: usize, panels: &mut [f32]) {
    let nr = panel();
    for (first, to) in (0..keys).step_by(nr).zip(panels.chunks_exact_mut(nr * head_dim)) {
        for row in first + NR..keys.min(first + NR + nr) {
            for j in (0..head_dim).step_by(LANES) {
                prefetch_far(src.as_ptr().wrapping_add(row * ld + j));
            }
        }
        crate::gemm::pack_columns(&src[first * ld..], ld, head_dim, nr.min(keys - first), nr, to);
    }
}

/// Packs `rows` rows of `cols` elements (row stride `ld`) into panels of [`panel`] columns, the last as wide as whole
/// vectors make it.
fn pack_values<T: Element>(src: &[T], ld: usize, rows: usize, cols: usize, panels: &mut [f32]) {
    for j in (0..cols).step_by(panel()) {
        let nr = panel_width(j, cols);
        let to = &mut panels[j * rows..(j + nr) * rows];
        crate::gemm::pack_rows(&src[j..], ld, rows, nr.min(cols - j), nr, to);
    }
}

/// Row length of the panel at column `j` of [`pack_values`].
fn panel_width(j: usize, cols: usize) -> usize {
    panel().min((cols - j).next_multiple_of(LANES))
}
