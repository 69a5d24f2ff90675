//! Rules for the programs of all ranks together.

use std::collections::HashMap;

use serde::Serialize;

use super::{Rule, Violation};
use crate::Program;
use crate::comm::{Collective, When};

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Programs.
    pub ranks: usize,
    /// Ops in all blocks.
    pub ops: usize,
    /// Messages and collectives of one step, counted once for each rank that takes part.
    pub messages: usize,
}

/// One message of a step as a rank sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Send {
        to: usize,
        channel: u32,
        micro_batch: usize,
        bytes: u64,
    },
    Recv {
        from: usize,
        channel: u32,
        micro_batch: usize,
        bytes: u64,
    },
    /// These ranks meet, at this op, for vectors of so many bytes.
    Meet {
        ranks: Vec<usize>,
        id: u64,
        what: Collective,
        bytes: Vec<u64>,
    },
}

/// The name of the op behind an event, for messages.
struct Said<'a> {
    op: &'a str,
    event: Event,
}

fn events(p: &Program) -> Vec<Said<'_>> {
    let items = p.schedule.iter().map(|i| (i.block, i.micro_batch)).chain([(p.tail, 0)]);
    let mut out = Vec::new();
    for (block, micro_batch) in items {
        for op in &p.blocks[block].ops {
            let Some(comm) = op.comm.as_ref().filter(|c| !matches!(c.when, When::Ends(_))) else { continue };
            let bytes = comm.bytes();
            let event = match comm.what {
                Collective::Send { to, channel } => Event::Send { to, channel, micro_batch, bytes },
                Collective::Recv { from, channel } => Event::Recv { from, channel, micro_batch, bytes },
                what => Event::Meet {
                    ranks: comm.members.ranks(p.coords, &p.layout),
                    id: op.id.0,
                    what,
                    bytes: comm.messages.iter().map(crate::Message::bytes).collect(),
                },
            };
            out.push(Said { op: &op.name, event });
        }
    }
    out
}

/// Plays the messages of one step of all ranks, in rank order: every message is received as it was sent, those who meet
/// say the same, none waits for ever.
pub fn world(all: &[Program]) -> (Checked, Vec<Violation>) {
    let said: Vec<Vec<Said<'_>>> = all.iter().map(events).collect();
    let checked = Checked {
        ranks: all.len(),
        ops: all.iter().flat_map(|p| &p.blocks).map(|b| b.ops.len()).sum(),
        messages: said.iter().map(Vec::len).sum(),
    };
    let mut next = vec![0; all.len()];
    let mut sent: HashMap<(usize, usize, u32, usize), u64> = HashMap::new();
    let mut found = Vec::new();
    // Ranks that may be able to go on: those whose turn it is, and those whom another's move may have freed.
    let mut ready: Vec<usize> = (0..all.len()).rev().collect();
    while let Some(rank) = ready.pop() {
        while let Some(s) = said.get(rank).and_then(|l| l.get(next[rank])) {
            match &s.event {
                Event::Send { to, channel, micro_batch, bytes } => {
                    sent.insert((rank, *to, *channel, *micro_batch), *bytes);
                    ready.push(*to);
                }
                Event::Recv { from, channel, micro_batch, bytes } => {
                    let Some(b) = sent.remove(&(*from, rank, *channel, *micro_batch)) else { break };
                    if b != *bytes {
                        let what = format!("receives {bytes} bytes where rank {from} sends {b}");
                        let at = format!("rank {rank}, {}", s.op);
                        found.push(Violation { rule: Rule::Messages, at, what });
                    }
                }
                Event::Meet { ranks, .. } => {
                    let here = |r: &usize| said.get(*r).and_then(|l| l.get(next[*r]));
                    let come = |r: &usize| here(r).is_some_and(|o| o.event == s.event);
                    if !ranks.iter().all(come) {
                        break;
                    }
                    for r in ranks.iter().filter(|r| **r != rank) {
                        next[*r] += 1;
                        ready.push(*r);
                    }
                }
            }
            next[rank] += 1;
        }
    }
    found.extend(stuck(&said, &next));
    for (from, to, channel, micro_batch) in sent.into_keys() {
        let what = format!("micro-batch {micro_batch} on channel {channel} is never received by rank {to}");
        found.push(Violation { rule: Rule::Messages, at: format!("rank {from}"), what });
    }
    (checked, found)
}

/// Ranks that did not come to the end: at a meeting for which the others have come with something else, or waiting.
fn stuck(said: &[Vec<Said<'_>>], next: &[usize]) -> Vec<Violation> {
    let mut found = Vec::new();
    for (rank, list) in said.iter().enumerate() {
        let Some(s) = list.get(next[rank]) else { continue };
        let at = format!("rank {rank}, {}", s.op);
        let differs = match &s.event {
            Event::Meet { ranks, id, .. } => ranks.iter().find_map(|r| {
                let other = said.get(*r)?.get(next[*r])?;
                let same_op = matches!(&other.event, Event::Meet { id: i, .. } if i == id);
                (same_op && other.event != s.event).then(|| format!("rank {r} says something else there"))
            }),
            _ => None,
        };
        found.push(match differs {
            Some(what) => Violation { rule: Rule::Messages, at, what },
            None => Violation { rule: Rule::Deadlock, at, what: format!("waits for ever: {:?}", s.event) },
        });
    }
    found
}
