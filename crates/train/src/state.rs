//! Parameters and optimiser state of a rank as boxes of logical tensors: how they are set, saved and read.

use std::ops::Range;

use ckpt::{Kind, Piece, Region};
use half::bf16;
use program::{GroupId, ParamGroup, ParamPart};
use spec::{DType, ModelSpec, Position, Result, Zero};

use crate::exec::Executor;
use crate::{init, rope};

/// A run of elements of a group that lies inside one logical parameter.
pub(crate) struct Run<'a> {
    pub(crate) part: &'a ParamPart,
    /// In the group's elements.
    pub(crate) local: Range<usize>,
    /// In the part's own elements.
    pub(crate) within: Range<usize>,
}

impl Run<'_> {
    /// Where the run lies in the whole parameter.
    pub(crate) fn regions(&self) -> Vec<Region> {
        let p = self.part;
        let b = (p.row0, p.rows, p.col0, p.cols);
        Region::of_local_range(p.global.1, b, self.within.start, self.within.len())
    }
}

/// The logical parameters that elements `range` of a group belong to.
pub(crate) fn runs(group: &ParamGroup, range: Range<usize>) -> impl Iterator<Item = Run<'_>> {
    group.parts.iter().filter_map(move |part| {
        // Parts of a bias lie side by side, those of a matrix one under another.
        let start = if group.rows == 1 { part.local_row0 } else { part.local_row0 * group.cols };
        let local = range.start.max(start)..range.end.min(start + part.rows * part.cols);
        let within = local.start.wrapping_sub(start)..local.end.wrapping_sub(start);
        (local.start < local.end).then_some(Run { part, local, within })
    })
}

impl Executor {
    /// Sets tables, and weights from `seed`.
    ///
    /// # Errors
    /// None: the weights come from the seed alone.
    pub fn initialise(&mut self, model: &ModelSpec, seed: u64) -> Result<()> {
        self.set_tables(model);
        self.set_params(&mut |part, out| {
            init::fill(model, seed, part, out, part.cols);
            Ok(())
        })
    }

    /// Sets the rotary tables.
    pub fn set_tables(&mut self, model: &ModelSpec) {
        if let Position::Rope(rope) = &model.position {
            let (cos, sin) = (self.program.io.cos, self.program.io.sin);
            rope::tables(rope, model.head_dim, self.tables, self.whole(cos), self.whole(sin));
        }
    }

    /// Sets every parameter: `fill` is asked for this rank's box of each logical one.
    ///
    /// # Errors
    /// Those of `fill`.
    pub fn set_params(&mut self, fill: &mut dyn FnMut(&ParamPart, &mut [f32]) -> Result<()>) -> Result<()> {
        let mut values = Vec::new();
        for g in 0..self.program.groups.len() {
            let len = self.program.groups[g].len();
            values.clear();
            values.resize(len, 0.0f32);
            let group = &self.program.groups[g];
            for run in runs(group, 0..len) {
                fill(run.part, &mut values[run.local])?;
            }
            self.store_param(g, &values);
        }
        Ok(())
    }

    /// Sets every parameter from a checkpoint that any layout wrote.
    pub(crate) fn set_params_from(&mut self, checkpoint: &ckpt::Checkpoint) -> Result<()> {
        self.set_params(&mut |part, out| {
            checkpoint.read_box(&part.name, Kind::Param, part.row0, part.rows, part.col0, part.cols, out)
        })
    }

    /// Writes a whole group's values into parameters and masters.
    fn store_param(&self, g: usize, values: &[f32]) {
        let b = &self.program.group_buffers[g];
        let owned = &values[b.owned.range()];
        let sharded = self.program.layout.zero >= Zero::Parameters;
        let mine = if sharded { owned } else { values };
        match self.program.precision {
            DType::Bf16 => {
                let param = self.whole::<bf16>(b.param);
                for (p, v) in param.iter_mut().zip(mine) {
                    *p = bf16::from_f32(*v);
                }
                if let Some(master) = b.master {
                    self.whole::<f32>(master).copy_from_slice(owned);
                }
            }
            _ => self.whole::<f32>(b.param).copy_from_slice(mine),
        }
    }

    /// What this rank saves: its share of masters and moments, each element on exactly one rank.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let p = &self.program;
        let groups = (0..).map(GroupId).zip(p.groups.iter().zip(&p.group_buffers));
        groups.filter(|(_, (_, b))| b.counts).flat_map(move |(id, (group, b))| {
            let program::Owned { first, count } = p.share(id);
            let kinds = [
                (Kind::Param, b.master.unwrap_or(b.param)),
                (Kind::ExpAvg, b.exp_avg),
                (Kind::ExpAvgSq, b.exp_avg_sq),
            ];
            kinds.into_iter().flat_map(move |(kind, buffer)| {
                let whole = p.buffer(buffer).len() == group.len();
                let data: &[f32] = self.whole(buffer);
                runs(group, first..first + count).map(move |run| {
                    let at = if whole {
                        run.local.clone()
                    } else {
                        run.local.start - first..run.local.end - first
                    };
                    let part = run.part;
                    Piece {
                        name: &part.name,
                        kind,
                        global_shape: shape(part),
                        boxes: run.regions(),
                        data: &data[at],
                    }
                })
            })
        })
    }

    /// Reads parameters and moments from a checkpoint that any layout wrote.
    ///
    /// # Errors
    /// If the checkpoint lacks a parameter or a moment, holds it in another shape, or cannot be read.
    pub fn restore(&mut self, checkpoint: &ckpt::Checkpoint) -> Result<()> {
        self.set_params_from(checkpoint)?;
        for (group, b) in self.program.groups.iter().zip(&self.program.group_buffers) {
            let program::Owned { first, count } = b.owned;
            for (kind, buffer) in [(Kind::ExpAvg, b.exp_avg), (Kind::ExpAvgSq, b.exp_avg_sq)] {
                let out = self.whole::<f32>(buffer);
                for run in runs(group, first..first + count) {
                    let at = run.local.start - first..run.local.end - first;
                    checkpoint.read_regions(&run.part.name, kind, &run.regions(), &mut out[at])?;
                }
            }
        }
        Ok(())
    }

    /// The elements of each logical parameter that this rank holds: masters if there are any.
    pub fn each_param(&self, each: &mut dyn FnMut(&ParamPart, &[f32])) {
        let p = &self.program;
        for (group, b) in p.groups.iter().zip(&p.group_buffers) {
            let data = self.whole::<f32>(b.master.unwrap_or(b.param));
            if data.len() == group.len() {
                runs(group, 0..group.len()).for_each(|run| each(run.part, &data[run.local]));
            }
        }
    }

    /// The sum of this rank's gradients of each logical parameter after a step (before clipping).
    pub fn each_grad(&self, each: &mut dyn FnMut(&ParamPart, &[f32])) {
        let p = &self.program;
        for (group, b) in p.groups.iter().zip(&p.group_buffers) {
            let data = self.whole::<f32>(b.grad);
            if data.len() == group.len() {
                runs(group, 0..group.len()).for_each(|run| each(run.part, &data[run.local]));
            }
        }
    }
}

/// Matrices have two dims, vectors one.
fn shape(part: &ParamPart) -> &[usize] {
    // A (rows, cols) pair has no slice view, so the table keeps the dims of the logical tensor.
    if part.global.0 == 1 { &part.dims[1..] } else { &part.dims }
}
