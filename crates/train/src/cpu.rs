//! The host's own cores and memory as a device.

mod args;
mod attention;
mod experts;
mod latent;
pub(crate) mod muon;
mod table;

use std::ops::Range;
use std::time::Instant;

use comm::{ElementType, RawSlice};
use half::bf16;
use kernels::Pool;
use program::{Op, OpId, Program, Ticket};
use spec::{DType, Error, Result};

use crate::arena::Arena;
use crate::device::{Device, Lack};
use crate::launch::{Launch, Message, Operand};
use crate::mesh::Mesh;
use crate::workspace::workspace_len;
use args::Args;

pub use experts::router;

/// A pool of threads on one arena; messages go over the host's own transport.
pub struct Cpu {
    pool: Pool,
    arena: Arena,
    /// Elements of rows that go to and come from each member, of the message that is said.
    ranges: [Vec<Range<usize>>; 2],
}

impl Cpu {
    /// A device of so many threads, without memory yet.
    pub fn new(threads: usize) -> Cpu {
        Cpu { pool: Pool::new(threads), arena: Arena::none(), ranges: Default::default() }
    }

    fn run<T: table::Number>(&self, launch: &Launch<'_>) -> Result<()> {
        let kernel = table::kernel::<T>(launch.kind()).map_err(|lack| {
            Error::failure(format!("{} is not executed yet ({lack:?})", launch.kind().name()))
        })?;
        kernel(&self.pool, &Args::new(&self.arena, *launch));
        Ok(())
    }

    /// An operand as the transport takes it.
    fn span(&self, of: Operand) -> RawSlice {
        assert!(of.offset + of.bytes() <= self.arena.len());
        RawSlice::new(self.arena.base().wrapping_add(of.offset), of.len(), ElementType::from(of.dtype))
    }
}

impl Device for Cpu {
    fn kind(&self) -> &'static str {
        "cpu"
    }

    fn name(&self) -> String {
        format!("cpu, {} threads", self.pool.threads())
    }

    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn peak_gflops(&mut self) -> f64 {
        kernels::gemm_peak_gflops(&self.pool)
    }

    fn can_run(&self, op: &Op, _: DType) -> Result<(), Lack> {
        match op.comm.as_ref().map(|c| c.what) {
            Some(_) if op.only_talks() => Ok(()),
            _ => table::kernel::<f32>(&op.kind).map(|_| ()),
        }
    }

    fn workspace_len(&self, op: &Op, p: &Program) -> usize {
        workspace_len(op, p, self.pool.threads())
    }

    fn allocate(&mut self, bytes: usize, mesh: &Mesh) -> Result<()> {
        // What it had before goes first: there may be no room for both.
        self.arena = Arena::none();
        check_memory(bytes)?;
        self.arena = match mesh.shared(bytes)? {
            Some(shared) => Arena::shared(shared),
            None => Arena::new(bytes)?,
        };
        Ok(())
    }

    fn move_to(&mut self, bytes: usize, mesh: &Mesh) -> Result<bool> {
        let moved = match self.arena.in_world() {
            Some(shared) if shared.bytes() == bytes => mesh.adopt(shared)?,
            _ => None,
        };
        let is_moved = moved.is_some();
        if let Some(shared) = moved {
            self.arena = Arena::shared(shared);
        }
        Ok(is_moved)
    }

    fn takes_programs(&self) -> bool {
        true
    }

    fn allocated_bytes(&self) -> usize {
        self.arena.len()
    }

    fn copy_in(&mut self, to: Operand, bytes: &[u8]) -> Result<()> {
        self.arena.bytes_mut(to).copy_from_slice(bytes);
        Ok(())
    }

    fn copy_out(&self, from: Operand, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(self.arena.bytes(from));
        Ok(())
    }

    fn host(&self) -> Option<&Arena> {
        Some(&self.arena)
    }

    fn host_mut(&mut self) -> Option<&mut Arena> {
        Some(&mut self.arena)
    }

    fn clear(&mut self, what: Operand) -> Result<()> {
        self.arena.bytes_mut(what).fill(0);
        Ok(())
    }

    fn copy(&mut self, from: Operand, to: Operand) -> Result<()> {
        self.arena.copy(from, to);
        Ok(())
    }

    fn sum(&mut self, what: Operand) -> Result<f64> {
        Ok(self.arena.read::<f64>(what).iter().sum())
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        match launch.precision() {
            DType::Bf16 => self.run::<bf16>(launch),
            _ => self.run::<f32>(launch),
        }
    }

    fn say(&mut self, mesh: &mut Mesh, message: &Message<'_>, ticket: Option<Ticket>) -> Result<()> {
        let (from, to) = (message.from.map(|o| self.span(o)), message.to.map(|o| self.span(o)));
        let mut ranges = std::mem::take(&mut self.ranges);
        if let Some((counts, _)) = message.counted {
            message.count(counts.map(|c| self.arena.read::<u32>(c)), &mut ranges)?;
        }
        let with_ranges = Message { parts: &ranges[0], arrive: &ranges[1], ..*message };
        let message = if message.counted.is_some() { &with_ranges } else { message };
        // SAFETY: the spans lie in the arena, in buffers that placement gives to this op alone until it, or the op that
        // waits for it, is over; the executor ends what is under way before the device and its arena go.
        let said = unsafe { mesh.say(message, from, to, ticket) };
        self.ranges = ranges;
        said
    }

    fn end(
        &mut self,
        mesh: &mut Mesh,
        (_, ticket): (OpId, Ticket),
        over: &mut dyn FnMut(Instant, Instant),
    ) -> Result<()> {
        mesh.end(ticket, over)
    }

    fn synchronise(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Refuses a step that this machine can never hold: the system would hand the memory out and then kill the process.
fn check_memory(bytes: usize) -> Result<()> {
    match crate::memory_bytes() {
        Some(memory) if bytes > memory => Err(Error::user(format!(
            "the step takes {:.1} GiB, but this machine has {:.1} GiB of memory",
            bytes as f64 / (1u64 << 30) as f64,
            memory as f64 / (1u64 << 30) as f64
        ))
        .hint("a smaller model, batch or layout.micro_batch, layout.recompute = \"full\" or more ranks take less")),
        _ => Ok(()),
    }
}
