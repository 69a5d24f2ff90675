//! Messages of ranks that no library of the cards connects: over the host's memory and its own transport.

use std::collections::HashMap;
use std::ops::Range;

use comm::{ElementType, RawSlice};
use program::Ticket;
use spec::Result;
use train::{Mesh, Message, Operand};

use crate::driver::{Memory, Stream};

/// Copies of operands on the host, kept from step to step.
#[derive(Default)]
pub(crate) struct HostMessages {
    /// By where the operand lies.
    copies: HashMap<(usize, usize), Vec<u64>>,
    /// What comes back to the card when a ticket ends.
    under_way: Vec<(Ticket, (usize, usize), u64)>,
    /// Elements of rows that go to and come from each member, of the message that is said.
    ranges: [Vec<Range<usize>>; 2],
}

impl HostMessages {
    /// Says something; with a ticket it goes on until [`HostMessages::ended`].
    ///
    /// # Errors
    /// If a peer or the card is lost.
    pub(crate) fn say(
        &mut self,
        stream: &Stream,
        arena: &Memory,
        mesh: &mut Mesh,
        message: &Message<'_>,
        ticket: Option<Ticket>,
    ) -> Result<()> {
        if let Some((counts, _)) = message.counted {
            let mut ranges = std::mem::take(&mut self.ranges);
            let [leave, arrive] = [read(stream, arena, counts[0])?, read(stream, arena, counts[1])?];
            message.count([&leave, &arrive], &mut ranges)?;
            let known = Message { parts: &ranges[0], arrive: &ranges[1], counted: None, ..*message };
            self.say(stream, arena, mesh, &known, ticket)?;
            self.ranges = ranges;
            return Ok(());
        }
        // Where only one end is named, what others give lands beside what this rank has there.
        let takes_in_place = message.to.is_none() || message.from.is_none();
        let from = message.from.map(|o| self.fetch(stream, arena, o, true)).transpose()?;
        let to = match message.to {
            Some(to) if message.from == Some(to) => from,
            Some(to) => Some(self.fetch(stream, arena, to, takes_in_place)?),
            None => None,
        };
        // SAFETY: the copies stay where they are until the message is over, and nobody else uses them; `copies` is keyed
        // by the operand, and an operand is in one message at a time.
        unsafe { mesh.say(message, from, to, ticket)? };
        let Some(result) = message.to.or(message.from) else { return Ok(()) };
        let (key, address) = ((result.offset, result.bytes()), arena.base + result.offset as u64);
        if sends_only(message) {
            return Ok(());
        }
        match ticket {
            Some(ticket) => {
                self.under_way.push((ticket, key, address));
                Ok(())
            }
            None => self.give_back(stream, key, address),
        }
    }

    /// Whether [`HostMessages::ended`] would bring anything.
    pub(crate) fn are_under_way(&self, ticket: Ticket) -> bool {
        self.under_way.iter().any(|(t, ..)| *t == ticket)
    }

    /// Brings to the card what arrived with a ticket that is over.
    ///
    /// # Errors
    /// If the card is lost.
    pub(crate) fn ended(&mut self, stream: &Stream, ticket: Ticket) -> Result<()> {
        let (over, rest): (Vec<_>, Vec<_>) = self.under_way.drain(..).partition(|(t, ..)| *t == ticket);
        self.under_way = rest;
        over.into_iter().try_for_each(|(_, key, address)| self.give_back(stream, key, address))
    }

    /// The host's copy of an operand, with what it holds if `filled`.
    fn fetch(&mut self, stream: &Stream, arena: &Memory, of: Operand, filled: bool) -> Result<RawSlice> {
        let (key, bytes) = ((of.offset, of.bytes()), of.bytes());
        let copy = self.copies.entry(key).or_insert_with(|| vec![0; bytes.div_ceil(8)]);
        let all: &mut [u8] = bytemuck::cast_slice_mut(copy);
        if filled {
            stream.download(arena.base + of.offset as u64, &mut all[..bytes])?;
        }
        Ok(RawSlice::new(all.as_mut_ptr(), of.len(), ElementType::from(of.dtype)))
    }

    fn give_back(&self, stream: &Stream, key: (usize, usize), address: u64) -> Result<()> {
        let copy: &[u8] = bytemuck::cast_slice(&self.copies[&key]);
        stream.upload(address, &copy[..key.1])
    }
}

/// How many rows go to whom is known on the card alone.
fn read(stream: &Stream, arena: &Memory, of: Operand) -> Result<Vec<u32>> {
    let mut counts = vec![0; of.len()];
    stream.download(arena.base + of.offset as u64, bytemuck::cast_slice_mut(&mut counts))?;
    Ok(counts)
}

fn sends_only(message: &Message<'_>) -> bool {
    matches!(message.what, program::Collective::Send { .. })
}
