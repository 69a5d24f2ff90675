//! Messages between two ranks: first in, first out per (group, channel, sender).
//!
//! Between neighbours only a descriptor travels: the payload stays in memory of the sender that both see, and the
//! receiver copies it out and marks the descriptor taken. Between hosts the payload goes through a socket, straight
//! into the receiver's buffer if a receive is waiting there.

use crate::control::{MAX_SENDS, publish};
use crate::element::RawSlice;
use crate::header::{GroupKey, Header, mismatch};
use crate::inner::{Core, Location};
use crate::memory::Mapping;
use crate::progress::until;
use spec::{Error, Result};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const FREE: u32 = 0;
const POSTED: u32 = 1;
const TAKEN: u32 = 2;

/// One direction of one conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Lane {
    /// The other rank.
    pub(crate) peer: usize,
    pub(crate) group: GroupKey,
    pub(crate) channel: u32,
}

/// What this rank has sent and its peers have not taken.
#[derive(Default)]
pub(crate) struct Outbox {
    free: Vec<usize>,
    used: usize,
    sent: Vec<Sent>,
    pool: Vec<Block>,
    lanes: HashMap<Lane, SendLane>,
}

#[derive(Default)]
struct SendLane {
    /// Number of the next message.
    next: u64,
    /// How many the receiver has taken.
    taken: u64,
}

struct Sent {
    slot: usize,
    lane: Lane,
    /// The pool block that holds the payload.
    block: usize,
}

/// Memory for payloads that must outlive their buffers.
struct Block {
    mapping: Arc<Mapping>,
    busy: bool,
}

impl Outbox {
    /// Reserves the next number on a lane. Messages are matched by number, so they may be posted in any order.
    pub(crate) fn number(&mut self, lane: Lane) -> u64 {
        let lane = self.lanes.entry(lane).or_default();
        lane.next += 1;
        lane.next - 1
    }

    /// Whether a message may be posted when `depth` are allowed on their way.
    fn has_room(&self, lane: &Lane, message: u64, depth: usize) -> bool {
        let taken = self.lanes.get(lane).map_or(0, |l| l.taken);
        message < taken.saturating_add(depth as u64)
    }

    pub(crate) fn taken(&mut self, lane: &Lane) {
        if let Some(lane) = self.lanes.get_mut(lane) {
            lane.taken = lane.next.min(lane.taken + 1);
        }
    }

    /// Takes back what neighbours have taken.
    fn reclaim(&mut self, core: &Core) {
        let mut i = 0;
        while i < self.sent.len() {
            if core.control.send_state(self.sent[i].slot).load(Ordering::Acquire) != TAKEN {
                i += 1;
                continue;
            }
            let sent = self.sent.swap_remove(i);
            self.release(core, sent.slot, &sent.lane);
            self.pool[sent.block].busy = false;
        }
    }

    fn release(&mut self, core: &Core, slot: usize, lane: &Lane) {
        core.control.send_state(slot).store(FREE, Ordering::Relaxed);
        self.free.push(slot);
        self.taken(lane);
    }

    fn slot(&mut self) -> Option<usize> {
        self.free.pop().or_else(|| {
            self.used += 1;
            (self.used <= MAX_SENDS).then_some(self.used - 1)
        })
    }

    /// A free block of at least `bytes`, and not absurdly more.
    fn block(&mut self, core: &Core, bytes: usize) -> Result<usize> {
        let fits =
            |b: &Block| !b.busy && b.mapping.bytes() >= bytes && b.mapping.bytes() / 4 <= bytes.max(4096);
        let found = (0..self.pool.len())
            .filter(|&i| fits(&self.pool[i]))
            .min_by_key(|&i| self.pool[i].mapping.bytes());
        if let Some(i) = found {
            return Ok(i);
        }
        let (_, mapping, _) = core.share(bytes.max(4096).next_power_of_two())?;
        if core.control.is_private() {
            core.failure.keep(mapping.clone());
        }
        self.pool.push(Block { mapping, busy: false });
        Ok(self.pool.len() - 1)
    }
}

/// What has arrived for this rank and what it waits for.
#[derive(Default)]
pub(crate) struct Inbox {
    rings: HashMap<usize, Ring>,
    lanes: HashMap<Lane, RecvLane>,
}

/// How far the ring of a neighbour was read.
#[derive(Default)]
struct Ring {
    /// Sends read off it.
    head: u64,
    /// Those of them that no receive has taken.
    kept: u64,
}

#[derive(Default)]
struct RecvLane {
    /// Number of the next receive.
    next: u64,
    arrived: VecDeque<Arrived>,
    waiting: VecDeque<Arc<Waiting>>,
}

struct Arrived {
    header: Header,
    body: Body,
}

enum Body {
    Near { slot: usize, location: Location },
    Far(Arc<Incoming>),
}

/// A message from another host, being read or complete.
#[derive(Default)]
pub(crate) struct Incoming {
    pub(crate) complete: AtomicBool,
    pub(crate) payload: Mutex<Vec<u8>>,
}

/// A receive that a message from another host can be read into.
pub(crate) struct Waiting {
    header: Header,
    pub(crate) buffer: RawSlice,
    pub(crate) complete: AtomicBool,
    /// Held while the buffer is written; true once the receive was given up.
    pub(crate) cancelled: Mutex<bool>,
}

impl Inbox {
    /// Reserves the number of the next receive on a lane.
    pub(crate) fn number(&mut self, lane: Lane) -> u64 {
        let lane = self.lanes.entry(lane).or_default();
        lane.next += 1;
        lane.next - 1
    }

    /// Reads descriptors off the ring of neighbour `from`.
    fn drain(&mut self, core: &Core, from: usize) -> Result<()> {
        let near = core.near(from)?;
        let ring = self.rings.entry(from).or_default();
        let tail = near.control.ring_tail(core.neighbour).load(Ordering::Acquire);
        if tail.wrapping_sub(ring.head) > MAX_SENDS as u64 - ring.kept {
            return Err(core.broken(from, "has more messages on their way than it may"));
        }
        while ring.head < tail {
            // Read once, each word: what is checked is what is used, whatever the neighbour does to its memory.
            let slot = near.control.ring_entry(core.neighbour, ring.head).load(Ordering::Relaxed) as usize;
            let words = (slot < MAX_SENDS).then(|| near.control.send_header(slot).read());
            let Some((words, header)) = words.and_then(|w| Some((w, Header::decode(&w)?))) else {
                return Err(core.broken(from, "sent a message that cannot be read"));
            };
            (ring.head, ring.kept) = (ring.head + 1, ring.kept + 1);
            let location = Location { segment: words[8], offset: words[9] };
            let lane = Lane { peer: from, group: header.group, channel: header.channel };
            let body = Body::Near { slot, location };
            self.lanes.entry(lane).or_default().arrived.push_back(Arrived { header, body });
        }
        Ok(())
    }

    /// The message of a number, if it is here.
    fn take(&mut self, lane: &Lane, message: u64) -> Option<Arrived> {
        let arrived = &mut self.lanes.get_mut(lane)?.arrived;
        let at = arrived.iter().position(|a| a.header.message == message)?;
        let message = arrived.remove(at)?;
        if let (Body::Near { .. }, Some(ring)) = (&message.body, self.rings.get_mut(&lane.peer)) {
            ring.kept -= 1;
        }
        Some(message)
    }

    /// A message from another host begins: the receive that waits for it (with what that expects), or a new place.
    pub(crate) fn begin(&mut self, from: usize, header: Header) -> Result<Target, Header> {
        let lane = Lane { peer: from, group: header.group, channel: header.channel };
        let lane = self.lanes.entry(lane).or_default();
        if let Some(at) = lane.waiting.iter().position(|w| w.header.message == header.message)
            && let Some(waiting) = lane.waiting.remove(at)
        {
            return if waiting.header == header { Ok(Target::Waiting(waiting)) } else { Err(waiting.header) };
        }
        let incoming = Arc::new(Incoming::default());
        lane.arrived.push_back(Arrived { header, body: Body::Far(incoming.clone()) });
        Ok(Target::Incoming(incoming))
    }
}

/// Where the payload of a message from another host goes.
pub(crate) enum Target {
    Waiting(Arc<Waiting>),
    Incoming(Arc<Incoming>),
}

/// How a send treats its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Copied before the send returns.
    Copied,
    /// Read in place where possible; the send ends when the receiver has taken it.
    InPlace,
}

/// Sends `buffer` to rank `to`, waiting while `depth` earlier messages of the lane have not been taken. The header
/// holds the number reserved for the message.
///
/// # Safety
/// `buffer` is readable, and stays so and unchanged until the future has ended or been dropped.
pub(crate) async unsafe fn send(
    core: &Core,
    header: Header,
    to: usize,
    buffer: RawSlice,
    payload: Payload,
    depth: usize,
) -> Result<()> {
    if let Some(error) = core.failure.get() {
        return Err(error);
    }
    let lane = Lane { peer: to, group: header.group, channel: header.channel };
    let what = || format!("rank {to} ({}) to take {header}", core.peers[to].place);
    if core.peers[to].near.is_none() {
        here_or_left(core, to, what, || {
            core.outbox().has_room(&lane, header.message, depth).then_some(Ok(()))
        })
        .await?;
        // SAFETY: passed on from the caller.
        return unsafe { crate::link::send(core, header, to, buffer, payload).await };
    }
    let here = core.locate(buffer.as_ptr(), buffer.bytes());
    let in_place = payload == Payload::InPlace && here.is_shared();
    let slot = here_or_left(core, to, what, || {
        let mut outbox = core.outbox();
        outbox.reclaim(core);
        if !outbox.has_room(&lane, header.message, depth) {
            return None;
        }
        outbox.slot().map(Ok)
    })
    .await?;
    {
        let mut outbox = core.outbox();
        let location = if in_place {
            here
        } else {
            // SAFETY: passed on from the caller.
            unsafe { copy_out(core, &mut outbox, slot, lane, buffer)? }
        };
        post(core, to, slot, &header, location)?;
    }
    if in_place {
        let taken = || (core.control.send_state(slot).load(Ordering::Acquire) == TAKEN).then_some(Ok(()));
        here_or_left(core, to, what, taken).await?;
        core.outbox().release(core, slot, &lane);
    }
    Ok(())
}

/// Waits for `check`, which depends on rank `peer`, and fails if that has left before.
pub(crate) async fn here_or_left<T>(
    core: &Core,
    peer: usize,
    what: impl Fn() -> String,
    mut check: impl FnMut() -> Option<Result<T>>,
) -> Result<T> {
    until(core, &what, || {
        // In this order: what a rank did before it left counts.
        let left = core.has_left(peer);
        check().or_else(|| {
            left.then(|| {
                let doing = what();
                Err(core.fail(&format!("rank {peer} left while rank {} waited for {doing}", core.rank)))
            })
        })
    })
    .await
}

unsafe fn copy_out(
    core: &Core,
    outbox: &mut Outbox,
    slot: usize,
    lane: Lane,
    buffer: RawSlice,
) -> Result<Location> {
    let block = outbox.block(core, buffer.bytes())?;
    let mapping = outbox.pool[block].mapping.clone();
    outbox.pool[block].busy = true;
    // SAFETY: the block is at least as large and not in use; the caller vouches for the buffer.
    unsafe { std::ptr::copy_nonoverlapping(buffer.as_ptr(), mapping.ptr(), buffer.bytes()) };
    outbox.sent.push(Sent { slot, lane, block });
    Ok(core.locate(mapping.ptr(), buffer.bytes()))
}

/// Shows a message to a neighbour. The outbox is locked, so that ring entries are written one at a time.
fn post(core: &Core, to: usize, slot: usize, header: &Header, location: Location) -> Result<()> {
    let near = core.near(to)?;
    let mut words = [0; crate::control::WORDS];
    words[..8].copy_from_slice(&header.encode());
    words[8..].copy_from_slice(&[location.segment, location.offset]);
    core.control.send_header(slot).write(&words);
    core.control.send_state(slot).store(POSTED, Ordering::Relaxed);
    let tail = core.control.ring_tail(near.index);
    let at = tail.load(Ordering::Relaxed);
    core.control.ring_entry(near.index, at).store(slot as u32, Ordering::Relaxed);
    tail.store(at + 1, Ordering::Release);
    publish();
    near.control.bell().ring();
    Ok(())
}

/// Receives the message of the header's number from rank `from` into `buffer`.
///
/// # Safety
/// `buffer` is writable, and nobody else touches it until the future has ended or been dropped.
pub(crate) async unsafe fn recv(core: &Core, header: Header, from: usize, buffer: RawSlice) -> Result<()> {
    let lane = Lane { peer: from, group: header.group, channel: header.channel };
    let what = || format!("rank {from} ({}) to send {header}", core.peers[from].place);
    if core.peers[from].near.is_none() {
        // SAFETY: passed on from the caller.
        return unsafe { recv_far(core, header, lane, buffer).await };
    }
    let message = here_or_left(core, from, what, || {
        let mut inbox = core.inbox();
        match inbox.drain(core, from) {
            Ok(()) => inbox.take(&lane, header.message).map(Ok),
            Err(error) => Some(Err(error)),
        }
    })
    .await?;
    compare(core, from, &header, &message.header)?;
    let Body::Near { slot, location } = message.body else {
        return Err(core.fail("a neighbour's message came over a socket"));
    };
    let bytes = buffer.bytes();
    let touch = core.touch()?;
    let source = until(core, what, || core.resolve(from, location, bytes)).await?;
    // SAFETY: the sender keeps the payload until the message is marked as taken; the caller vouches for the buffer.
    unsafe { std::ptr::copy_nonoverlapping(source.0, buffer.as_ptr(), bytes) };
    drop(touch);
    let near = core.near(from)?;
    near.control.send_state(slot).store(TAKEN, Ordering::Release);
    publish();
    near.control.bell().ring();
    Ok(())
}

fn compare(core: &Core, from: usize, ours: &Header, theirs: &Header) -> Result<()> {
    if ours == theirs { Ok(()) } else { Err(core.fail(&mismatch(core.rank, ours, from, theirs))) }
}

async unsafe fn recv_far(core: &Core, header: Header, lane: Lane, buffer: RawSlice) -> Result<()> {
    let from = lane.peer;
    let what = || format!("rank {from} ({}) to send {header}", core.peers[from].place);
    let (message, waiting) = {
        let mut inbox = core.inbox();
        match inbox.take(&lane, header.message) {
            Some(message) => (Some(message), None),
            None => {
                let (complete, cancelled) = (AtomicBool::new(false), Mutex::new(false));
                let waiting = Arc::new(Waiting { header, buffer, complete, cancelled });
                inbox.lanes.entry(lane).or_default().waiting.push_back(waiting.clone());
                (None, Some(waiting))
            }
        }
    };
    let finished = |flag: &AtomicBool| flag.load(Ordering::Acquire).then_some(Ok(()));
    if let Some(waiting) = waiting {
        let _cancel = Cancel(&waiting);
        here_or_left(core, from, what, || finished(&waiting.complete)).await?;
    } else if let Some(message) = message {
        compare(core, from, &header, &message.header)?;
        let Body::Far(incoming) = message.body else {
            return Err(core.fail("a message between hosts came through memory"));
        };
        here_or_left(core, from, what, || finished(&incoming.complete)).await?;
        let payload = incoming.payload.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = payload.len().min(buffer.bytes());
        // SAFETY: `bytes` lies in both; the caller vouches for the buffer.
        unsafe { std::ptr::copy_nonoverlapping(payload.as_ptr(), buffer.as_ptr(), bytes) };
    }
    crate::link::credit(core, &header, from);
    Ok(())
}

/// Keeps the socket thread away from a buffer whose receive has ended.
struct Cancel<'a>(&'a Waiting);

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        *self.0.cancelled.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

/// The error of a depth that lets no message through.
pub(crate) fn checked_depth(depth: usize) -> Result<usize> {
    match depth {
        1..=MAX_SENDS => Ok(depth),
        _ => Err(Error::user(format!("channel depth {depth}, expected 1 to {MAX_SENDS}"))),
    }
}
