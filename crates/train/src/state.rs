//! Parameters and optimiser state of a rank as boxes of logical tensors: how they are set, saved and read.

use std::borrow::Cow;
use std::ops::Range;

use ckpt::{Kind, Piece, Region};
use half::bf16;
use program::{BufferId, GroupBuffers, GroupId, Owned, ParamGroup, ParamPart, Program};
use serde::{Deserialize, Serialize};
use spec::{DType, ModelSpec, Position, Result, Zero};

use crate::exec::Executor;
use crate::{init, resolve, rope};

/// Where parameters and moments come from: a checkpoint, or what ranks hold in memory. Whoever restores asks by name and
/// kind for regions, and not for files or ranks.
pub trait Source {
    /// Reads parts of a tensor, one after the other, into `out`.
    ///
    /// # Errors
    /// If the source lacks the tensor or a part of it, or it cannot be read.
    fn read_regions(&self, name: &str, kind: Kind, regions: &[Region], out: &mut [f32]) -> Result<()>;
}

impl Source for ckpt::Checkpoint {
    fn read_regions(&self, name: &str, kind: Kind, regions: &[Region], out: &mut [f32]) -> Result<()> {
        // Before the first step an average is what it is of, also in models that were imported without one.
        let kind = if kind == Kind::Ema && self.step() == 0 { Kind::Param } else { kind };
        ckpt::Checkpoint::read_regions(self, name, kind, regions, out)
    }
}

/// Regions of a tensor that a rank needs to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Want {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) regions: Vec<Region>,
}

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

/// The averages of a source where its parameters are asked for.
pub(crate) struct Averages<'a>(pub(crate) &'a ckpt::Checkpoint);

impl Source for Averages<'_> {
    fn read_regions(&self, name: &str, kind: Kind, regions: &[Region], out: &mut [f32]) -> Result<()> {
        let kind = if kind == Kind::Param { Kind::Ema } else { kind };
        Source::read_regions(self.0, name, kind, regions, out)
    }
}

/// A rank's share of a checkpoint: masters, moments, averages and biases of experts, each element on exactly one rank.
pub struct State<'a> {
    held: Vec<Held<'a>>,
}

/// The share of one group's parameters or moments.
struct Held<'a> {
    group: &'a ParamGroup,
    kind: Kind,
    /// The first element of the group that is held.
    first: usize,
    data: Cow<'a, [f32]>,
}

impl Held<'_> {
    fn runs(&self) -> impl Iterator<Item = (Run<'_>, &[f32])> {
        let first = self.first;
        runs(self.group, first..first + self.data.len()).map(move |run| {
            let data = &self.data[run.local.start - first..run.local.end - first];
            (run, data)
        })
    }
}

impl State<'_> {
    /// By logical parameter.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        self.held.iter().flat_map(|held| {
            held.runs().map(|(run, data)| Piece {
                name: &run.part.name,
                kind: held.kind,
                global_shape: shape(run.part),
                boxes: run.regions(),
                data,
            })
        })
    }

    /// The data of all pieces, in their order.
    pub(crate) fn data(&self) -> impl Iterator<Item = &[f32]> {
        self.held.iter().flat_map(|held| held.runs().map(|(_, data)| data))
    }
}

impl Executor {
    /// Sets tables, and weights from `seed`.
    ///
    /// # Errors
    /// If the device is lost, or the system starts no more threads.
    pub fn initialise(&mut self, model: &ModelSpec, seed: u64) -> Result<()> {
        self.set_tables(model)?;
        self.set_params(&mut |part, out| init::fill(model, seed, part, out, part.cols))
    }

    /// Sets the rotary tables.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn set_tables(&mut self, model: &ModelSpec) -> Result<()> {
        let Position::Rope(rope) = &model.position else { return Ok(()) };
        let [cos, sin] = [self.program.io.cos, self.program.io.sin].map(|id| self.whole(id));
        let mut sines = vec![0.0; sin.len()];
        let program = &self.program;
        // A cache has positions beyond the sequences that were trained on.
        let ([front, back], all) = match program.mode.positions() {
            0 => (program.positions(), program.sequence),
            _ => ([0..0, 0..cos.rows], cos.rows),
        };
        let width = model.latent.map_or(model.head_dim, |l| l.rope_dim);
        self.device.write(cos, |cosines| {
            rope::tables(rope, width, all, front.chain(back), cosines, &mut sines);
            Ok(())
        })?;
        self.device.copy_in(sin, bytemuck::cast_slice(&sines))
    }

    /// Sets every parameter: `fill` is asked for this rank's box of each logical one.
    ///
    /// # Errors
    /// Those of `fill`, or if the device is lost.
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
            self.store_param(g, &values)?;
        }
        self.set_expert_bias(&mut |run, out| fill(run.part, out))
    }

    /// Sets the biases that experts are chosen by, where the model has them.
    fn set_expert_bias(&mut self, fill: &mut dyn FnMut(&Run<'_>, &mut [f32]) -> Result<()>) -> Result<()> {
        let Executor { program: p, device, .. } = self;
        let Some((group, id)) = p.expert_bias.as_ref().zip(p.io.expert_bias) else { return Ok(()) };
        device.write(resolve::whole(p, id), |out: &mut [f32]| {
            runs(group, 0..group.len()).try_for_each(|run| fill(&run, &mut out[run.local.clone()]))
        })
    }

    /// Sets every parameter from what any layout left.
    pub(crate) fn set_params_from(&mut self, source: &dyn Source) -> Result<()> {
        let mut values = Vec::new();
        for g in 0..self.program.groups.len() {
            let group = &self.program.groups[g];
            values.clear();
            values.resize(group.len(), 0.0f32);
            for run in runs(group, kept_params(&self.program, g)) {
                source.read_regions(&run.part.name, Kind::Param, &run.regions(), &mut values[run.local])?;
            }
            self.store_param(g, &values)?;
        }
        self.set_expert_bias(&mut |run, out| {
            source.read_regions(&run.part.name, Kind::Param, &run.regions(), out)
        })
    }

    /// What [`Executor::restore`] asks for, in any order.
    pub(crate) fn wants(&self) -> Vec<Want> {
        let p = &self.program;
        let mut wants = Vec::new();
        let mut want = |group, kind, range| {
            wants.extend(runs(group, range).map(|run| Want {
                name: run.part.name.clone(),
                kind,
                regions: run.regions(),
            }));
        };
        for (g, (group, b)) in p.groups.iter().zip(&p.group_buffers).enumerate() {
            want(group, Kind::Param, kept_params(p, g));
            moments(b).for_each(|(kind, _)| want(group, kind, b.owned.range()));
        }
        if let Some(group) = &p.expert_bias {
            want(group, Kind::Param, 0..group.len());
        }
        wants
    }

    /// Writes a whole group's values into parameters and masters.
    fn store_param(&mut self, g: usize, values: &[f32]) -> Result<()> {
        let b = &self.program.group_buffers[g];
        let owned = &values[b.owned.range()];
        let sharded = self.program.layout.zero >= Zero::Parameters;
        let mine = if sharded { owned } else { values };
        let (param, master) = (self.whole(b.param), b.master.map(|id| self.whole(id)));
        let average = b.average.map(|id| self.whole(id));
        // The average begins where the weights do.
        for kept in [master, average].into_iter().flatten() {
            self.device.copy_in(kept, bytemuck::cast_slice(owned))?;
        }
        if self.program.precision != DType::Bf16 {
            return self.device.copy_in(param, bytemuck::cast_slice(mine));
        }
        self.device.write(param, |param: &mut [bf16]| {
            param.iter_mut().zip(mine).for_each(|(p, v)| *p = bf16::from_f32(*v));
            Ok(())
        })
    }

    /// What this rank saves, where it lies if the host can read it there.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn state(&self) -> Result<State<'_>> {
        let p = &self.program;
        let mut held = Vec::new();
        for (group, b) in (0..).map(GroupId).zip(&p.group_buffers).filter(|(_, b)| b.counts) {
            let param = b.master.unwrap_or(b.param);
            for (kind, id) in [(Kind::Param, param)].into_iter().chain(moments(b)) {
                let program::Slice { first, count, .. } = p.share_in(group, id);
                let data = self.device.read(self.whole(id).part(first, count))?;
                held.push(Held { group: p.group(group), kind, first: p.share(group).first, data });
            }
        }
        // All ranks hold all of them.
        if let (Some(group), Some(id), 0) = (&p.expert_bias, p.io.expert_bias, p.rank) {
            held.push(Held { group, kind: Kind::Param, first: 0, data: self.device.read(self.whole(id))? });
        }
        Ok(State { held })
    }

    /// Reads parameters and moments that any layout left.
    ///
    /// # Errors
    /// If the source lacks a parameter or a moment, holds it in another shape, or cannot be read.
    pub fn restore(&mut self, source: &dyn Source) -> Result<()> {
        self.set_params_from(source)?;
        let Executor { program: p, device, .. } = self;
        for (group, b) in p.groups.iter().zip(&p.group_buffers) {
            let Owned { first, count } = b.owned;
            for (kind, id) in moments(b) {
                device.write(resolve::whole(p, id), |out: &mut [f32]| {
                    runs(group, first..first + count).try_for_each(|run| {
                        let at = run.local.start - first..run.local.end - first;
                        source.read_regions(&run.part.name, kind, &run.regions(), &mut out[at])
                    })
                })?;
            }
        }
        Ok(())
    }

    /// The elements of each logical parameter that this rank holds: masters if there are any; and what its experts are
    /// chosen by.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn each_param(&self, each: &mut dyn FnMut(&ParamPart, &[f32])) -> Result<()> {
        self.each_of(&|b| b.master.unwrap_or(b.param), each)?;
        let p = &self.program;
        if let Some((group, id)) = p.expert_bias.as_ref().zip(p.io.expert_bias) {
            let data = self.device.read::<f32>(self.whole(id))?;
            runs(group, 0..group.len()).for_each(|run| each(run.part, &data[run.local]));
        }
        Ok(())
    }

    /// The sum of this rank's gradients of each logical parameter after a step (before clipping).
    ///
    /// # Errors
    /// If the device is lost.
    pub fn each_grad(&self, each: &mut dyn FnMut(&ParamPart, &[f32])) -> Result<()> {
        self.each_of(&|b| b.grad, each)
    }

    fn each_of(
        &self,
        of: &dyn Fn(&GroupBuffers) -> BufferId,
        each: &mut dyn FnMut(&ParamPart, &[f32]),
    ) -> Result<()> {
        let p = &self.program;
        for (group, b) in p.groups.iter().zip(&p.group_buffers) {
            let whole = self.whole(of(b));
            if whole.len() == group.len() {
                let data = self.device.read::<f32>(whole)?;
                runs(group, 0..group.len()).for_each(|run| each(run.part, &data[run.local]));
            }
        }
        Ok(())
    }
}

/// The elements of a group's parameters that this rank keeps between steps, or has to know to fill them in.
fn kept_params(p: &Program, g: usize) -> Range<usize> {
    match p.layout.zero >= Zero::Parameters {
        true => p.group_buffers[g].owned.range(),
        false => 0..p.groups[g].len(),
    }
}

/// What is kept of a group beside its parameters: AdamW's two moments, or Muon's momentum in place of the first; and the
/// average of the weights, if there is one.
fn moments(b: &GroupBuffers) -> impl Iterator<Item = (Kind, BufferId)> + use<> {
    let second = b.exp_avg_sq.map(|id| (Kind::ExpAvgSq, id));
    let average = b.average.map(|id| (Kind::Ema, id));
    [(Kind::ExpAvg, b.exp_avg)].into_iter().chain(second).chain(average)
}

/// Matrices have two dims, vectors one.
fn shape(part: &ParamPart) -> &[usize] {
    // A (rows, cols) pair has no slice view, so the table keeps the dims of the logical tensor.
    if part.global.0 == 1 { &part.dims[1..] } else { &part.dims }
}
