//! What happened in a step, kept: what each rank did when, and which messages ended its waits.

use super::{Kind, Why};
use crate::clock::Ticks;

/// A stretch of a rank's main stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Slice {
    pub(crate) from: Ticks,
    pub(crate) to: Ticks,
    pub(crate) why: Why,
    /// Which of its stage's passes.
    pub(crate) pass: usize,
    /// Which op of the pass, for kernels.
    pub(crate) op: usize,
    /// The message that ended the wait.
    pub(crate) by: Option<u32>,
}

/// A message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    /// The class that it waited for.
    pub(crate) last: usize,
    /// The message that this one's stream was busy with until then.
    pub(crate) after: Option<u32>,
    pub(crate) from: Ticks,
    pub(crate) to: Ticks,
    /// When the first member's bytes were there.
    first: Option<Ticks>,
    /// The class whose bytes were there last, if others' were there before.
    pub(crate) slowest: Option<usize>,
}

impl Message {
    pub(super) fn new(kind: Kind, (last, after): (usize, Option<u32>), now: Ticks) -> Self {
        Message { kind, last, after, from: now, to: now, first: None, slowest: None }
    }
}

/// Everything that happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    /// By class, in order; without gaps from the start to its end.
    pub(crate) slices: Vec<Vec<Slice>>,
    pub(crate) messages: Vec<Message>,
}

impl Log {
    pub(super) fn begin(&mut self, message: Message) -> u32 {
        self.messages.push(message);
        (self.messages.len() - 1) as u32
    }

    /// What a class was at just before `now`.
    pub(crate) fn ending_at(&self, class: usize, now: Ticks) -> Option<&Slice> {
        let slices = &self.slices[class];
        let at = slices.partition_point(|s| s.to < now);
        slices.get(at).filter(|s| s.from < now)
    }

    /// A class's bytes of a message are there.
    pub(super) fn part(&mut self, message: u32, class: usize, now: Ticks) {
        let message = &mut self.messages[message as usize];
        let first = *message.first.get_or_insert(now);
        message.slowest = (now > first).then_some(class);
    }

    pub(super) fn end(&mut self, message: u32, now: Ticks) {
        self.messages[message as usize].to = now;
    }
}
