//! Attention on a ring of ranks: keys and values are under way while a rank computes with those that it has.

use program::Ticket;
use spec::Result;

use crate::exec::Executor;
use crate::launch::{Part, Turn};

impl Executor {
    /// Runs an op that computes between its messages, as [`program::OpKind::RingAttention`] states them: of keys and values
    /// and, backward, of their gradients by turns.
    pub(crate) fn ring(&mut self, block: usize, i: usize, turn: Turn) -> Result<()> {
        let ranks = self.program.layout.cp;
        let said = self.actions[block][i].talk.as_ref().map_or(0, |talk| talk.messages.len());
        let backward = said > ranks - 1;
        let mut next = 0..said;
        let mut say = |exec: &mut Executor, ticket: Ticket| {
            let message = next.next().expect("as many messages as hops");
            exec.hop(block, i, message, turn, ticket)
        };
        self.compute(block, i, Turn { part: Part::Begin, ..turn })?;
        for hop in 0..ranks {
            let more = hop + 1 < ranks;
            if more {
                say(self, Ticket::Keys)?;
            }
            self.compute(block, i, Turn { part: Part::Hop(hop), ..turn })?;
            if backward {
                // Those that come were under way meanwhile.
                if hop > 0 {
                    self.arrived(block, i, Ticket::KeyGrads)?;
                    self.compute(block, i, Turn { part: Part::Join(hop), ..turn })?;
                }
                say(self, Ticket::KeyGrads)?;
            }
            if more {
                self.arrived(block, i, Ticket::Keys)?;
            }
        }
        if backward {
            self.arrived(block, i, Ticket::KeyGrads)?;
        }
        self.compute(block, i, Turn { part: Part::End, ..turn })
    }

    /// Lets one hop begin.
    fn hop(&mut self, block: usize, i: usize, message: usize, turn: Turn, ticket: Ticket) -> Result<()> {
        let Executor { actions, device, mesh, .. } = self;
        let Some(talk) = &actions[block][i].talk else { return Ok(()) };
        device.say(mesh, &talk.message(message, turn.micro_batch), Some(ticket))
    }

    /// Waits for it.
    fn arrived(&mut self, block: usize, i: usize, ticket: Ticket) -> Result<()> {
        let start_ns = self.spans.now();
        let op = &self.program.blocks[block].ops[i];
        self.device.end(&mut self.mesh, (op.id, ticket), &mut |_, _| {})?;
        self.waited(block, i, self.spans.now() - start_ns);
        Ok(())
    }
}
