//! A batch that grows: a program for each of its sizes, all in the same memory.

use std::ops::Range;

use spec::Result;
use spec::run::BatchSpec;

use crate::buffer::Home;
use crate::rank::Rank;
use crate::{Mode, Program, Request, WorkspaceLen};

impl Program {
    /// With the memory that the size of the batch takes which takes most.
    pub(crate) fn with_room(mut self, request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Result<Program> {
        let sizes = request.recipe.ramp.filter(|_| request.mode == Mode::Train);
        let mut most = self.memory.total;
        for stage in sizes.iter().flat_map(BatchSpec::stages) {
            let other = Request { sequences: stage.sequences, ..*request };
            most = most.max(Program::of_rank(&Rank::of(&other)?, workspace, false)?.memory.total);
        }
        self.make_room(most);
        Ok(self)
    }

    /// The program of the same rank for a step of another size, in the same memory.
    ///
    /// # Errors
    /// As [`Program::build`].
    pub fn resized(&self, request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Result<Program> {
        let mut program = Program::of_rank(&Rank::of(request)?, workspace, cfg!(debug_assertions))?;
        program.make_room(self.memory.total);
        Ok(program)
    }

    fn make_room(&mut self, total: usize) {
        self.memory.ramp = total.saturating_sub(self.memory.total);
        self.memory.total += self.memory.ramp;
    }

    /// The bytes of static buffers that a step fills anew: all behind what steps hand on, where the batch grows.
    pub fn step_statics(&self) -> Range<usize> {
        let end = self.slot_regions.first().map_or(self.scratch_offset, |s| s.offset);
        let grads = self.group_buffers.first().map(|b| self.buffer(b.grad_levels).home);
        match grads {
            Some(Home::Static { offset }) => offset..end,
            _ => end..end,
        }
    }
}
