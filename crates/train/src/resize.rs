//! A batch that grows: the same rank's program for steps of another size, in the memory that it has.

use program::{Op, Program, Request};
use spec::{DType, Error, Result, RunSpec};

use crate::exec::Executor;
use crate::launch::{Operand, Talk};
use crate::resolve::{self, Action};
use crate::spans::Spans;

/// A program with what it is run by.
pub(crate) struct Compiled {
    pub(crate) program: Program,
    pub(crate) actions: Vec<Vec<Action>>,
    pub(crate) eval_sum: Option<Talk>,
    pub(crate) spans: Spans,
    pub(crate) op_waits_ns: Vec<Vec<u64>>,
}

impl Compiled {
    pub(crate) fn of(program: Program, record: bool) -> Compiled {
        // What goes on beside others leaves a span for each of its messages.
        let spans_of = |op: &Op| op.comm.as_ref().map_or(1, |c| c.messages.len().max(1));
        let spans = |b: usize| program.blocks[b].ops.iter().map(spans_of).sum::<usize>();
        let room = program.schedule.iter().map(|i| spans(i.block)).sum::<usize>() + spans(program.tail);
        Compiled {
            actions: resolve::actions(&program),
            eval_sum: resolve::eval_sum(&program),
            spans: Spans::new(room, record),
            op_waits_ns: program.blocks.iter().map(|b| vec![0; b.ops.len()]).collect(),
            program,
        }
    }
}

impl Executor {
    /// Goes over to steps of so many sequences, one of the sizes of the run's batch. Parameters and all that is kept from
    /// step to step stay where they are, for no size moves them; what a step fills is as new.
    ///
    /// # Errors
    /// If the layout does not suit the size, or the device is lost.
    pub fn resize(&mut self, run: &RunSpec, sequences: usize) -> Result<()> {
        if sequences == self.program.sequences {
            return Ok(());
        }
        let known = self.other.take().filter(|c| c.program.sequences == sequences);
        let mut next = known.map_or_else(|| self.compile(run, sequences), Ok)?;
        let (has, wants) = (self.program.memory.total, next.program.memory.total);
        if has != wants || !self.device.takes_programs() {
            return Err(Error::failure(format!(
                "a step of {sequences} sequences in {wants} bytes cannot follow one of {} in {has}",
                self.program.sequences
            )));
        }
        self.device.forget()?;
        std::mem::swap(&mut self.program, &mut next.program);
        std::mem::swap(&mut self.actions, &mut next.actions);
        std::mem::swap(&mut self.eval_sum, &mut next.eval_sum);
        std::mem::swap(&mut self.spans, &mut next.spans);
        std::mem::swap(&mut self.op_waits_ns, &mut next.op_waits_ns);
        self.device.meet(&self.program, &self.mesh)?;
        self.other = Some(next);
        self.batch = Default::default();
        let anew = self.program.step_statics();
        let cols = anew.len() / DType::F32.bytes();
        self.device.clear(Operand { offset: anew.start, rows: 1, cols, dtype: DType::F32 })?;
        self.set_tables(&run.model)
    }

    fn compile(&self, run: &RunSpec, sequences: usize) -> Result<Compiled> {
        let device = &*self.device;
        let request = Request { loss: device.loss(), sequences, ..Request::of(run, self.program.rank) };
        let program = self.program.resized(&request, &|op, p| device.workspace_len(op, p))?;
        Ok(Compiled::of(program, self.spans.is_on()))
    }
}
