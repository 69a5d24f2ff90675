//! Collectives made of messages, for members that do not all share memory.
//!
//! A reduction sends each share of the buffer to the member that owns it, which adds all of them in tree order and
//! sends the sum back: per rank the same bytes as a ring, in two hops, and with bits that depend on nothing.

use crate::element::{ElementType, Order, RawSlice};
use crate::header::{GroupKey, Header};
use crate::inner::{Address, Core};
use crate::p2p::{self, Lane, Payload};
use crate::sum::{Into, Sum, Tree};
use spec::{Result, shares};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;

/// Bytes of one member's share that are reduced at once: bounds the memory for what peers send.
const CHUNK_BYTES: usize = 512 << 10;
/// Chunks on their way at the same time, so that links and arithmetic are busy together.
const CHAINS: usize = 2;

/// Members that exchange messages.
pub(crate) struct Members {
    pub(crate) ranks: Vec<usize>,
    pub(crate) me: usize,
    pub(crate) key: GroupKey,
    tree: Tree,
    scratch: Mutex<Vec<Vec<u64>>>,
}

impl Members {
    pub(crate) fn new(ranks: Vec<usize>, me: usize, key: GroupKey) -> Members {
        let tree = Tree::new(ranks.len());
        Members { ranks, me, key, tree, scratch: Mutex::default() }
    }
}

/// One collective operation of a mesh.
pub(crate) struct Exchange<'a> {
    pub(crate) core: &'a Core,
    pub(crate) mesh: &'a Members,
    pub(crate) header: Header,
}

/// Memory for received parts, back to the mesh on drop: after the first step nothing is allocated.
pub(crate) struct Scratch<'a> {
    mesh: &'a Members,
    words: Vec<u64>,
}

impl Members {
    pub(crate) fn scratch(&self, bytes: usize) -> Scratch<'_> {
        let mut free = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut words = free.pop().unwrap_or_default();
        drop(free);
        words.resize(words.len().max(bytes.div_ceil(8)), 0);
        Scratch { mesh: self, words }
    }
}

impl Scratch<'_> {
    pub(crate) fn at(&mut self, byte: usize) -> Address {
        Address(self.words.as_mut_ptr().cast::<u8>().wrapping_add(byte))
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        let words = std::mem::take(&mut self.words);
        self.mesh.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(words);
    }
}

type Part<'f> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'f>>;

/// Runs all parts to their ends, or to the first failure.
async fn all(mut parts: Vec<Part<'_>>) -> Result<()> {
    poll_fn(move |context| {
        let mut failed = None;
        parts.retain_mut(|part| match part.as_mut().poll(context) {
            Poll::Ready(Ok(())) => false,
            Poll::Ready(Err(error)) => {
                failed.get_or_insert(error);
                false
            }
            Poll::Pending => true,
        });
        match failed {
            Some(error) => Poll::Ready(Err(error)),
            None if parts.is_empty() => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    })
    .await
}

impl Exchange<'_> {
    fn size(&self) -> usize {
        self.mesh.ranks.len()
    }

    fn others(&self) -> impl Iterator<Item = usize> {
        let (me, n) = (self.mesh.me, self.size());
        (1..n).map(move |i| (me + i) % n)
    }

    fn header(&self, channel: u32, buffer: RawSlice, message: u64) -> Header {
        let (part, element, group) = (buffer.count as u64, buffer.element, self.mesh.key);
        Header { channel, part, element, message, group, ..self.header }
    }

    /// # Safety
    /// As [`p2p::send`].
    unsafe fn send<'f>(&'f self, channel: u32, to: usize, buffer: RawSlice) -> Part<'f> {
        let peer = self.mesh.ranks[to];
        let lane = Lane { peer, group: self.mesh.key, channel };
        let header = self.header(channel, buffer, self.core.outbox().number(lane));
        // SAFETY: passed on from the caller.
        Box::pin(unsafe { p2p::send(self.core, header, peer, buffer, Payload::InPlace, usize::MAX) })
    }

    /// # Safety
    /// As [`p2p::recv`].
    unsafe fn recv<'f>(&'f self, channel: u32, from: usize, buffer: RawSlice) -> Part<'f> {
        let peer = self.mesh.ranks[from];
        let lane = Lane { peer, group: self.mesh.key, channel };
        let header = self.header(channel, buffer, self.core.inbox().number(lane));
        // SAFETY: passed on from the caller.
        Box::pin(unsafe { p2p::recv(self.core, header, peer, buffer) })
    }

    /// Nobody leaves before all have come: in round k each tells the member 2^k further on.
    pub(crate) async fn barrier(&self) -> Result<()> {
        let nothing = RawSlice::new(std::ptr::NonNull::<u8>::dangling().as_ptr(), 0, ElementType::U8);
        let (me, n) = (self.mesh.me, self.size());
        let mut distance = 1;
        while distance < n {
            // SAFETY: the messages are empty.
            let both = unsafe {
                vec![
                    self.send(0, (me + distance) % n, nothing),
                    self.recv(0, (me + n - distance) % n, nothing),
                ]
            };
            all(both).await?;
            distance *= 2;
        }
        Ok(())
    }

    /// # Safety
    /// `buffer` is this rank's alone, readable and writable, until the future has ended.
    pub(crate) async unsafe fn all_reduce(&self, buffer: RawSlice) -> Result<()> {
        if self.header.order == Order::Ring && self.size() > 2 {
            // SAFETY: passed on from the caller.
            return unsafe { self.ring(buffer).await };
        }
        let n = self.size();
        let chunk = (CHUNK_BYTES / buffer.element.bytes()).max(1);
        let longest = shares::aligned(buffer.count, n, 0).len();
        let rounds = longest.div_ceil(chunk).max(1);
        let chains = (0..CHAINS.min(rounds)).map(|chain| -> Part<'_> {
            Box::pin(async move {
                let part_of = |member: usize, round: usize| {
                    let share = shares::aligned(buffer.count, n, member);
                    let start = (share.start + round * chunk).min(share.end);
                    buffer.part(&(start..(start + chunk).min(share.end)))
                };
                for round in (chain..rounds).step_by(CHAINS) {
                    let own = part_of(self.mesh.me, round);
                    // SAFETY: rounds touch parts of their own; the caller vouches for the buffer.
                    unsafe {
                        let output = Address(own.as_ptr());
                        self.collect(chain as u32, |m| part_of(m, round), own, output, Into::Same).await?;
                        let parts = self.others().flat_map(|m| {
                            [self.send(chain as u32, m, own), self.recv(chain as u32, m, part_of(m, round))]
                        });
                        all(parts.collect()).await?;
                    }
                }
                Ok(())
            })
        });
        all(chains.collect()).await
    }

    /// Sends each member its part and adds up everyone's version of `own` in tree order.
    ///
    /// # Safety
    /// All parts are readable and unchanged, and `output` has room for the sum, until the future has ended; it may be
    /// exactly `own`.
    async unsafe fn collect(
        &self,
        channel: u32,
        part_of: impl Fn(usize) -> RawSlice,
        own: RawSlice,
        output: Address,
        into: Into,
    ) -> Result<()> {
        let stride = own.bytes().next_multiple_of(64);
        let mut scratch = self.mesh.scratch(stride * self.size());
        let base = scratch.at(0);
        let place = |m: usize| if m == self.mesh.me { Address(own.as_ptr()) } else { base.plus(m * stride) };
        // SAFETY: the scratch has a place for each member; the caller vouches for the parts.
        let parts = self.others().flat_map(|m| unsafe {
            [self.send(channel, m, part_of(m)), self.recv(channel, m, own.moved(place(m)))]
        });
        all(parts.collect()).await?;
        let sources: Vec<Address> = (0..self.size()).map(place).collect();
        let destinations = [output];
        let (tree, element) = (&self.mesh.tree, own.element);
        let sum = Sum { tree, element, into, sources: &sources, destinations: &destinations };
        // SAFETY: all places hold `own.count` elements; the caller vouches for the output.
        unsafe { sum.run(0, 0, own.count) };
        Ok(())
    }

    /// Sums along a ring and passes the sums on: one neighbour to talk to in each direction, bits in ring order.
    async unsafe fn ring(&self, buffer: RawSlice) -> Result<()> {
        let (me, n) = (self.mesh.me, self.size());
        let part = |i: usize| buffer.part(&shares::even(buffer.count, n, i % n));
        let (right, left) = ((me + 1) % n, (me + n - 1) % n);
        let pair = Tree::new(2);
        let mut scratch = self.mesh.scratch(part(0).bytes().max(8));
        let received = scratch.at(0);
        for step in 0..2 * (n - 1) {
            let out = part(me + 2 * n - step);
            let into = part(me + 2 * n - step - 1);
            let adding = step < n - 1;
            let place = if adding { into.moved(received) } else { into };
            // SAFETY: the part sent and the part received differ; the caller vouches for the buffer.
            all(unsafe { vec![self.send(0, right, out), self.recv(0, left, place)] }).await?;
            if adding {
                let (sources, destinations) = ([received, Address(into.as_ptr())], [Address(into.as_ptr())]);
                let (tree, element, into_type) = (&pair, into.element, Into::Same);
                let sum =
                    Sum { tree, element, into: into_type, sources: &sources, destinations: &destinations };
                // SAFETY: both hold `into.count` elements.
                unsafe { sum.run(0, 0, into.count) };
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`crate::near::Meeting::reduce_scatter`].
    pub(crate) async unsafe fn reduce_scatter(
        &self,
        input: RawSlice,
        output: Address,
        into: Into,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let own = &ranges[self.mesh.me];
        let chunk = (CHUNK_BYTES / input.element.bytes()).max(1);
        let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
        let size =
            if into == Into::F32 && input.element == ElementType::Bf16 { 4 } else { input.element.bytes() };
        for start in (0..longest.max(1)).step_by(chunk) {
            let part_of = |m: usize| {
                let from = (ranges[m].start + start).min(ranges[m].end);
                input.part(&(from..(from + chunk).min(ranges[m].end)))
            };
            let to = output.plus(start.min(own.len()) * size);
            // SAFETY: passed on from the caller.
            unsafe { self.collect(0, part_of, part_of(self.mesh.me), to, into).await? };
        }
        Ok(())
    }

    /// # Safety
    /// As [`crate::near::Meeting::all_gather`].
    pub(crate) async unsafe fn all_gather(
        &self,
        input: RawSlice,
        output: RawSlice,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let own = output.part(&ranges[self.mesh.me]);
        if own.as_ptr() != input.as_ptr() {
            // SAFETY: both have the size of the own range.
            unsafe { std::ptr::copy_nonoverlapping(input.as_ptr(), own.as_ptr(), own.bytes()) };
        }
        // SAFETY: ranges do not overlap; the caller vouches for the buffers.
        let parts = self
            .others()
            .flat_map(|m| unsafe { [self.send(0, m, input), self.recv(0, m, output.part(&ranges[m]))] });
        all(parts.collect()).await
    }

    /// # Safety
    /// As [`crate::near::Meeting::all_to_all`].
    pub(crate) async unsafe fn all_to_all(
        &self,
        input: RawSlice,
        input_ranges: &[Range<usize>],
        output: RawSlice,
        output_ranges: &[Range<usize>],
    ) -> Result<()> {
        let (from, to) = (input.part(&input_ranges[self.mesh.me]), output.part(&output_ranges[self.mesh.me]));
        // SAFETY: of equal length, as checked; the caller vouches for the buffers.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.bytes().min(to.bytes())) };
        // SAFETY: as above.
        let parts = self.others().flat_map(|m| unsafe {
            [self.send(0, m, input.part(&input_ranges[m])), self.recv(0, m, output.part(&output_ranges[m]))]
        });
        all(parts.collect()).await
    }

    /// Copies the root's buffer to all, along a binomial tree.
    ///
    /// # Safety
    /// As [`crate::near::Meeting::broadcast`].
    pub(crate) async unsafe fn broadcast(&self, buffer: RawSlice, root: usize) -> Result<()> {
        let n = self.size();
        let place = (self.mesh.me + n - root) % n;
        let member = |place: usize| (place + root) % n;
        let mut distance = 1;
        while distance < n && place & distance == 0 {
            distance *= 2;
        }
        if place != 0 {
            // SAFETY: passed on from the caller.
            all(unsafe { vec![self.recv(0, member(place - distance), buffer)] }).await?;
        }
        let mut parts = Vec::new();
        while distance > 1 {
            distance /= 2;
            if place + distance < n {
                // SAFETY: passed on from the caller.
                parts.push(unsafe { self.send(0, member(place + distance), buffer) });
            }
        }
        all(parts).await
    }
}
