//! What computes: the seam between the executor, which knows the program, and hardware, which knows kernels.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Instant;

use bytemuck::Pod;
use program::{Loss, Mode, Op, OpId, OpKind, Program, Recipe, Request, Ticket};
use spec::{DType, Error, Layout, Result, RunSpec};

use crate::arena::Arena;
use crate::launch::{Launch, Message, Operand, Turn};
use crate::mesh::Mesh;

/// Memory and arithmetic of one rank.
///
/// A device has one arena of exactly the bytes that the program placed; operands are offsets in it, so no pointer leaves
/// a device. Calls come from one thread in program order. A device may return before the work is done and keep that
/// order by itself: what comes out of [`Device::copy_out`] and [`Device::sum`], and what lies in the arena after
/// [`Device::synchronise`], is as if every call had ended before the next began.
///
/// A GPU is one `impl`: `launch` puts a kernel or a library call on its compute stream, by [`Launch::kind`]. Messages
/// are the device's too, because a library that carries them (NCCL) works on the memory and the streams of the device
/// and for a whole group at once: `say` maps [`Message::members`] to a communicator, founded with the bytes that
/// [`Mesh::exchange`] carries, and a message that goes on beside others to a stream of its own behind an event;
/// [`Device::end`] makes the compute stream wait for it. Where the library cannot (two ranks on one GPU), the same
/// method copies to the host and lets [`Mesh`] carry it. Calls of a stretch are the same from step to step but for the
/// numbers of [`Turn`], so a device may record it once and run it again: [`Device::replay`].
pub trait Device: Any + Send {
    /// What kind of device it is: ranks of a run are of one kind.
    fn kind(&self) -> &'static str;

    /// For people and journals, for example `cpu, 4 threads`.
    fn name(&self) -> String;

    /// Threads of the host that compute.
    fn threads(&self) -> usize {
        1
    }

    /// The best rate of its matrix products, in GFLOP/s; takes a moment.
    fn peak_gflops(&mut self) -> f64;

    /// Whether it has a kernel for an op, and a way for what the op says.
    ///
    /// # Errors
    /// What it lacks.
    fn can_run(&self, op: &Op, precision: DType) -> Result<(), Lack>;

    /// How much of a micro-batch it wants to have logits at a time.
    fn loss(&self) -> Loss {
        Loss::default()
    }

    /// Elements of f32 work space that an op wants.
    fn workspace_len(&self, op: &Op, p: &Program) -> usize;

    /// Makes the arena, zeroed; called once, before anything else that touches memory.
    ///
    /// # Errors
    /// If there is no such memory.
    fn allocate(&mut self, bytes: usize, mesh: &Mesh) -> Result<()>;

    /// Takes the arena that it has along to the ranks of `mesh`, with all that is in it, if it has so many bytes and can.
    ///
    /// # Errors
    /// If a rank is lost.
    fn move_to(&mut self, bytes: usize, mesh: &Mesh) -> Result<bool> {
        let _ = (bytes, mesh);
        Ok(false)
    }

    /// Hears what a program says to the ranks of `mesh` before any of it is said, so that ways can be made for it;
    /// collective over all ranks.
    ///
    /// # Errors
    /// If ranks are lost, or what was asked for cannot carry it.
    fn meet(&mut self, program: &Program, mesh: &Mesh) -> Result<()> {
        let _ = (program, mesh);
        Ok(())
    }

    /// What carries messages between ranks, for people, where that is the device's choice.
    fn ways(&self) -> Option<String> {
        None
    }

    /// Whether another program of the same rank may take over its arena between two steps, behind [`Device::forget`].
    fn takes_programs(&self) -> bool {
        false
    }

    /// Drops what it has recorded: calls of another program follow.
    ///
    /// # Errors
    /// If the device is lost.
    fn forget(&mut self) -> Result<()> {
        Ok(())
    }

    /// Bytes of the arena.
    fn allocated_bytes(&self) -> usize;

    /// Writes `bytes` to a part of the arena.
    ///
    /// # Errors
    /// If the device is lost.
    fn copy_in(&mut self, to: Operand, bytes: &[u8]) -> Result<()>;

    /// Reads a part of the arena.
    ///
    /// # Errors
    /// If the device is lost.
    fn copy_out(&self, from: Operand, bytes: &mut [u8]) -> Result<()>;

    /// The arena itself, where the host can read it: nothing need be copied then.
    fn host(&self) -> Option<&Arena> {
        None
    }

    /// The same to write to.
    fn host_mut(&mut self) -> Option<&mut Arena> {
        None
    }

    /// Sets a part of the arena to zero.
    ///
    /// # Errors
    /// If the device is lost.
    fn clear(&mut self, what: Operand) -> Result<()>;

    /// Copies elements inside the arena.
    ///
    /// # Errors
    /// If the device is lost.
    fn copy(&mut self, from: Operand, to: Operand) -> Result<()>;

    /// Adds up f64 elements in an order that depends on their number alone.
    ///
    /// # Errors
    /// If the device is lost.
    fn sum(&mut self, what: Operand) -> Result<f64>;

    /// Runs a kernel.
    ///
    /// # Errors
    /// If the device is lost.
    fn launch(&mut self, launch: &Launch<'_>) -> Result<()>;

    /// Says something to other ranks. With a ticket it goes on beside what follows until [`Device::end`].
    ///
    /// # Errors
    /// If a peer or the device is lost.
    fn say(&mut self, mesh: &mut Mesh, message: &Message<'_>, ticket: Option<Ticket>) -> Result<()>;

    /// Lets nothing go on before everything that was begun with a ticket is over, as an op says; `over` hears of each
    /// message when it began and ended, as far as that is known.
    ///
    /// # Errors
    /// If a peer or the device is lost.
    fn end(
        &mut self,
        mesh: &mut Mesh,
        of: (OpId, Ticket),
        over: &mut dyn FnMut(Instant, Instant),
    ) -> Result<()>;

    /// For how many nanoseconds it did nothing but wait for what each op says, since what is known was taken out last; asked
    /// when everything is done. `None` of a device whose `say` and `end` return when it goes on.
    ///
    /// # Errors
    /// If the device is lost.
    fn waits_ns(&mut self) -> Result<Option<&mut HashMap<OpId, u64>>> {
        Ok(None)
    }

    /// Returns when everything is done.
    ///
    /// # Errors
    /// If the device is lost.
    fn synchronise(&mut self) -> Result<()>;

    /// Runs a stretch as it was recorded, with the numbers of this turn. `false` if it was not: then the executor goes
    /// through its calls one by one and ends with [`Device::recorded`], and the device may keep them for the next time.
    ///
    /// # Errors
    /// If the device is lost.
    fn replay(&mut self, _: Stretch, _: &Turn) -> Result<bool> {
        Ok(false)
    }

    /// The calls of the stretch that [`Device::replay`] was asked for last are over.
    ///
    /// # Errors
    /// If the device is lost.
    fn recorded(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A run of calls that is the same in every step, between points where the host looks at results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stretch {
    /// All micro-batches, up to the sums of squared gradients.
    Gradients,
    /// The rest of the step.
    Update,
    /// Loss without gradients.
    Evaluate,
}

impl dyn Device {
    /// Elements of the arena: where they lie if the host can read them there, else a copy.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn read<T: Pod>(&self, from: Operand) -> Result<Cow<'_, [T]>> {
        if let Some(arena) = self.host() {
            return Ok(Cow::Borrowed(arena.read(from)));
        }
        let mut copy = vec![T::zeroed(); from.len()];
        self.copy_out(from, bytemuck::cast_slice_mut(&mut copy))?;
        Ok(Cow::Owned(copy))
    }

    /// Lets `fill` set all elements of an operand: where they lie if the host can write them there, else through a copy.
    ///
    /// # Errors
    /// Those of `fill`, or if the device is lost.
    pub(crate) fn write<T: Pod>(
        &mut self,
        to: Operand,
        fill: impl FnOnce(&mut [T]) -> Result<()>,
    ) -> Result<()> {
        if let Some(arena) = self.host_mut() {
            return fill(arena.write(to));
        }
        let mut copy = vec![T::zeroed(); to.len()];
        fill(&mut copy)?;
        self.copy_in(to, bytemuck::cast_slice(&copy))
    }
}

/// What a device lacks for an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    /// Kernels for an average of the weights.
    Average,
    /// Kernels that leave elements out at random.
    Dropout,
    /// Kernels that bound scores of attention.
    QkClip,
    /// Attention for heads of this width.
    HeadWidth,
    /// A kernel for this kind of op.
    Kernel,
}

impl Lack {
    /// Which part of a model or layout an op belongs to that a device has no kernel for.
    pub fn of(kind: &OpKind) -> Lack {
        use OpKind::*;
        match kind {
            Average { .. } | SwapAverage { .. } => Lack::Average,
            Dropout { .. } => Lack::Dropout,
            LogitMax { .. } | QkClip { .. } => Lack::QkClip,
            _ => Lack::Kernel,
        }
    }
}

/// Refuses a run whose model or layout a device has no kernels for, before anything is prepared.
///
/// # Errors
/// What the device cannot run, in terms of the model or the layout, and what works.
pub fn check_run(device: &dyn Device, run: &RunSpec) -> Result<()> {
    program::check_mixture(&run.model, &run.layout)?;
    let recipe = Recipe::of(run);
    check_ramp(device, &recipe)?;
    // Which kinds of op a step has depends on these axes; how the others divide it may still be open.
    let RunSpec { layout: Layout { cp, context, ep, .. }, model, batch, train, .. } = run;
    let layout = Layout { cp: *cp, context: *context, ep: *ep, dp: *ep, ..Layout::default() };
    let request = Request {
        model,
        layout: &layout,
        sequence: batch.sequence,
        sequences: *ep,
        precision: train.precision,
        rank: 0,
        mode: Mode::Train,
        loss: Loss::default(),
        // Sizes of a ramp differ in no kind of op.
        recipe: Recipe { ramp: None, ..recipe },
    };
    // A program that cannot be built is refused for its own reasons, by whoever builds the whole of it.
    Program::build(&request, &|_, _| 0).map_or(Ok(()), |p| check_ops(device, &p, &model.name))
}

/// Refuses a batch that grows where one program cannot follow another.
pub(crate) fn check_ramp(device: &dyn Device, recipe: &Recipe) -> Result<()> {
    if recipe.ramp.is_none() || device.takes_programs() {
        return Ok(());
    }
    let what = format!("batch.ramp: {} keeps to the program of one batch", device.name());
    Err(Error::user(what).hint("set batch.ramp=[], or run.device=cpu"))
}

/// Asks a device about every op of a program.
///
/// # Errors
/// As [`check_run`].
pub(crate) fn check_ops(device: &dyn Device, p: &Program, model: &str) -> Result<()> {
    let ops = p.blocks.iter().flat_map(|b| &b.ops);
    let mut lacks: Vec<(Lack, &Op)> =
        ops.filter_map(|op| Some((device.can_run(op, p.precision).err()?, op))).collect();
    lacks.sort_by_key(|(lack, _)| *lack);
    lacks.dedup_by_key(|(lack, _)| *lack);
    let Some((first, op)) = lacks.first() else { return Ok(()) };
    Err(match first {
        Lack::Average => Error::user(format!("train.ema: {} has no kernels for it", device.name()))
            .hint("set train.ema=0, or run.device=cpu"),
        Lack::Dropout => Error::user(format!("train.dropout: {} has no kernels for it", device.name()))
            .hint("set train.dropout=0, or run.device=cpu"),
        Lack::QkClip => Error::user(format!("optim.qk_clip: {} has no kernels for it", device.name()))
            .hint("set optim.qk_clip=0, or run.device=cpu"),
        Lack::HeadWidth => Error::user(format!(
            "{} has no attention in {} for the width of {model}'s heads",
            device.name(),
            p.precision
        ))
        .hint("set run.device=cpu; docs/gpus.md says which widths GPUs take, float32 more than bf16"),
        Lack::Kernel => Error::user(format!(
            "{} has no kernel for {} ({} in {})",
            device.name(),
            op.name,
            op.kind.name(),
            p.precision
        ))
        .hint("phalanx program show lists the ops of a step"),
    })
}
