//! Matrix products as chains of fused multiply-adds.
//!
//! The product is cut into register tiles of [`MR`] x [`NR`]. The right operand is packed into panels of [`NR`]
//! columns, the left one is read in place (or packed where it would be read across its rows). Inner blocks of
//! [`KC`] keep a panel in the first-level cache; between two blocks a tile's partial sums rest in scratch memory in
//! `f32`, so the block size does not show in the result.

mod micro;
mod pack;
mod product;
mod weight;

use crate::simd::prefetch_far;

pub(crate) use micro::{Tile, panel, tile};
pub(crate) use pack::{pack_columns, pack_rows};
pub(crate) use product::{
    Groups, Left, Out, Right, product, product_below_diagonal, product_of_groups,
    product_of_groups_workspace_len, product_workspace_len,
};
pub(crate) use weight::{
    Groups as GradientGroups, weight_gradient, weight_gradient_workspace_len, weight_gradients,
    weight_gradients_workspace_len,
};

/// Rows of a register tile.
pub(crate) const MR: usize = 6;
/// The most columns of a register tile.
pub(crate) const NR: usize = 64;
/// The longest inner block: with a few rows of the left operand a panel of it stays in the second-level cache while it
/// streams through the first.
pub(crate) const KC: usize = 384;
/// The most floats of a right operand that are packed at a time (16 MiB), whatever the size of the model.
const PACKED: usize = 4 << 20;
/// The most rows and columns of a task: its partial sums, its rows of the left operand and a panel of the right one
/// stay in the second-level cache.
pub(crate) const TASK: (usize, usize) = (16 * MR, 6 * NR);

/// Floats in a cache line; packed panels start on one.
const LINE: usize = 16;

/// Asks for part `part` of `parts` of a panel of `len` floats, which need not be readable: the processor foresees no more than a
/// page of it.
#[inline(always)]
fn ask_panel(panel: *const f32, len: usize, part: usize, parts: usize) {
    let share = len.div_ceil(parts).next_multiple_of(LINE);
    for at in (part * share..len.min((part + 1) * share)).step_by(LINE) {
        prefetch_far(panel.wrapping_add(at));
    }
}

/// Hands out aligned pieces of a workspace.
pub(crate) struct Workspace<'a> {
    rest: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    pub(crate) fn new(ws: &'a mut [f32]) -> Self {
        Workspace { rest: ws }
    }

    /// The next `len` floats, starting on a cache line.
    pub(crate) fn take(&mut self, len: usize) -> &'a mut [f32] {
        let rest = std::mem::take(&mut self.rest);
        let skip = rest.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
        assert!(
            rest.len() >= skip + len,
            "workspace too small: {} left of {} needed",
            rest.len(),
            skip + len
        );
        let (piece, rest) = rest[skip..].split_at_mut(len);
        self.rest = rest;
        piece
    }

    /// What is left.
    pub(crate) fn rest(self) -> &'a mut [f32] {
        self.rest
    }

    /// What `take` may use up for `len` floats.
    pub(crate) const fn room(len: usize) -> usize {
        len + LINE - 1
    }
}

/// Cuts `len` into equal blocks of at most `most`, each a multiple of `unit`.
fn block(len: usize, unit: usize, most: usize) -> usize {
    let blocks = len.div_ceil(most).max(1);
    len.div_ceil(blocks).next_multiple_of(unit)
}

/// Rows and columns of a task's part of an output: at most [`TASK`], smaller where threads would stay idle.
fn task_shape(rows: usize, cols: usize, threads: usize) -> (usize, usize) {
    /// Tasks per thread that even out unequal speed.
    const TASKS: usize = 4;
    let (mut mc, mut nc) = (block(rows, MR, TASK.0), block(cols, NR, TASK.1));
    if threads == 1 {
        return (mc, nc);
    }
    while rows.div_ceil(mc) * cols.div_ceil(nc) < TASKS * threads {
        // A task reads mc + nc rows of operands for mc * nc outputs: keep it near a square.
        if mc >= nc && mc > 4 * MR {
            mc = block(mc, MR, mc.div_ceil(2));
        } else if nc > NR {
            nc = block(nc, NR, nc.div_ceil(2));
        } else if mc > MR {
            mc = block(mc, MR, mc.div_ceil(2));
        } else {
            break;
        }
    }
    (mc, nc)
}
