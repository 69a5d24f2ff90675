//! How long compute stands still for messages: measured on the card, between two events around each wait of the compute
//! stream, and read once a stretch is over, so that the host waits for nothing more.
//!
//! In a recording events are nodes of the graph (`CU_EVENT_RECORD_EXTERNAL`, CUDA 11.1): each run of it sets them anew.

use std::collections::HashMap;
use std::time::Instant;

use program::OpId;
use spec::Result;
use train::Stretch;

use crate::driver::Stream;
use crate::events::Event;

/// A wait of the compute stream.
struct Wait {
    op: OpId,
    from: Event,
    to: Event,
}

/// Waits since they were read last, and those of what was recorded.
#[derive(Default)]
pub(crate) struct Waits {
    /// Of calls that run as they come: the events are used again, `count` of them are set.
    called: Vec<Wait>,
    count: usize,
    recorded: HashMap<Stretch, Vec<Wait>>,
    /// Recordings that ran.
    ran: Vec<Stretch>,
    by_op_ns: HashMap<OpId, u64>,
}

impl Waits {
    /// What the compute stream is given from now on until [`Waits::end`] is no work of its own.
    pub(crate) fn begin(&mut self, stream: &Stream, recording: Option<Stretch>, op: OpId) -> Result<()> {
        if let Some(stretch) = recording {
            let wait = Wait { op, from: Event::timed()?, to: Event::timed()? };
            stream.record_node(&wait.from)?;
            self.recorded.entry(stretch).or_default().push(wait);
            return Ok(());
        }
        if self.count == self.called.len() {
            self.called.push(Wait { op, from: Event::timed()?, to: Event::timed()? });
        }
        let wait = &mut self.called[self.count];
        wait.op = op;
        self.count += 1;
        stream.record(&wait.from)
    }

    /// The wait that was begun last is over.
    pub(crate) fn end(&mut self, stream: &Stream, recording: Option<Stretch>) -> Result<()> {
        match recording {
            Some(stretch) => {
                let wait = self.recorded.get(&stretch).and_then(|waits| waits.last());
                wait.map_or(Ok(()), |wait| stream.record_node(&wait.to))
            }
            None => stream.record(&self.called[self.count - 1].to),
        }
    }

    /// The host has waited since then, while nothing was under way on the card.
    pub(crate) fn add(&mut self, op: OpId, since: Instant) {
        *self.by_op_ns.entry(op).or_default() += since.elapsed().as_nanos() as u64;
    }

    /// What was recorded of a stretch runs.
    pub(crate) fn run(&mut self, stretch: Stretch) {
        self.ran.push(stretch);
    }

    /// What was recorded is gone.
    pub(crate) fn forget(&mut self) {
        self.recorded.clear();
        self.ran.clear();
    }

    /// Nanoseconds by op since this was asked last, of streams that have come to their end; to be taken out.
    ///
    /// # Errors
    /// If the card is lost.
    pub(crate) fn read(&mut self) -> Result<&mut HashMap<OpId, u64>> {
        let called = self.called[..std::mem::take(&mut self.count)].iter();
        let recorded = self.ran.drain(..).filter_map(|stretch| self.recorded.get(&stretch)).flatten();
        for wait in called.chain(recorded) {
            *self.by_op_ns.entry(wait.op).or_default() += wait.from.ns_until(&wait.to)?;
        }
        Ok(&mut self.by_op_ns)
    }
}
