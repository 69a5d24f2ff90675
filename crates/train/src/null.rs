//! A device that computes nothing: the executor's whole loop without its work.

use std::collections::HashMap;
use std::time::Instant;

use program::{Members, Op, OpId, Program, Ticket};
use spec::{DType, Result};

use crate::device::{Device, Lack};
use crate::launch::{Launch, Message, Operand};
use crate::mesh::Mesh;

/// Runs anything, allocates nothing and reads zeros; counts what it was asked to do. Messages reach nobody, so one
/// process can drive any rank of any layout.
#[derive(Debug, Default)]
pub struct Null {
    arena_bytes: usize,
    /// Launches of each op.
    pub launches: HashMap<OpId, u64>,
    /// Bytes given to others, group by group.
    pub sent_bytes: HashMap<Members, u64>,
    /// Tickets of what goes on, with the number of its messages.
    pub under_way: HashMap<Ticket, u64>,
}

impl Device for Null {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn name(&self) -> String {
        "null".into()
    }

    fn peak_gflops(&mut self) -> f64 {
        f64::INFINITY
    }

    fn can_run(&self, _: &Op, _: DType) -> Result<(), Lack> {
        Ok(())
    }

    fn workspace_len(&self, _: &Op, _: &Program) -> usize {
        0
    }

    fn allocate(&mut self, bytes: usize, _: &Mesh) -> Result<()> {
        self.arena_bytes = bytes;
        Ok(())
    }

    fn takes_programs(&self) -> bool {
        true
    }

    fn allocated_bytes(&self) -> usize {
        0
    }

    fn copy_in(&mut self, to: Operand, bytes: &[u8]) -> Result<()> {
        assert_eq!((to.bytes(), self.inside(to)), (bytes.len(), true));
        Ok(())
    }

    fn copy_out(&self, from: Operand, bytes: &mut [u8]) -> Result<()> {
        assert_eq!((from.bytes(), self.inside(from)), (bytes.len(), true));
        bytes.fill(0);
        Ok(())
    }

    fn clear(&mut self, what: Operand) -> Result<()> {
        assert!(self.inside(what));
        Ok(())
    }

    fn copy(&mut self, from: Operand, to: Operand) -> Result<()> {
        assert_eq!((from.bytes(), self.inside(from) && self.inside(to)), (to.bytes(), true));
        Ok(())
    }

    fn sum(&mut self, what: Operand) -> Result<f64> {
        assert!(self.inside(what));
        Ok(0.0)
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        let inside = (0..launch.inputs()).map(|i| launch.input(i));
        let inside = inside.chain((0..launch.outputs()).map(|i| launch.output(i))).all(|o| self.inside(o));
        assert!(inside, "an operand of {} lies outside the arena", launch.kind().name());
        *self.launches.entry(launch.op()).or_default() += 1;
        Ok(())
    }

    fn say(&mut self, _: &mut Mesh, message: &Message<'_>, ticket: Option<Ticket>) -> Result<()> {
        assert!(message.from.into_iter().chain(message.to).all(|o| self.inside(o)));
        *self.sent_bytes.entry(message.members).or_default() += message.sent_bytes;
        if let Some(ticket) = ticket {
            *self.under_way.entry(ticket).or_default() += 1;
        }
        Ok(())
    }

    fn end(
        &mut self,
        _: &mut Mesh,
        (_, ticket): (OpId, Ticket),
        _: &mut dyn FnMut(Instant, Instant),
    ) -> Result<()> {
        self.under_way.remove(&ticket);
        Ok(())
    }

    fn synchronise(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Null {
    fn inside(&self, of: Operand) -> bool {
        of.offset + of.bytes() <= self.arena_bytes
    }
}
