mod hosts;

use crate::control::MAX_GROUPS;
use crate::element::{Element, ElementType, OpTag, Order, RawSlice};
use crate::header::{GroupKey, Header, OpKind, Space};
use crate::inner::{Address, Core};
use crate::mesh::{Exchange, Members};
use crate::near::{Meeting, Neighbours};
use crate::op::{Op, Summary};
use crate::p2p::{self, Lane, Payload};
use crate::progress::{Handle, drive, until};
use crate::sum::{Into, MAX_RANKS, round};
use spec::{Error, Result, shares};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use hosts::Hosts;

/// Messages on their way per (channel, receiver) unless [`Group::set_depth`] says otherwise: enough for the
/// micro-batches in flight of a deep pipeline.
pub(crate) const DEFAULT_DEPTH: usize = 64;

/// Ranks that communicate with each other; cheap to clone, usable from several threads.
///
/// Members number themselves by their place in the group. Collectives of a group happen in the order in which they
/// are called, which must be the same on all members; different groups do not wait for each other.
#[derive(Clone)]
pub struct Group {
    inner: Arc<Inner>,
}

struct Inner {
    core: Arc<Core>,
    id: u32,
    ranks: Vec<usize>,
    me: usize,
    depth: AtomicUsize,
    /// Number of the next operation, and of the one whose turn it is.
    next: AtomicU64,
    turn: AtomicU64,
    /// See [`Group::sent_bytes`].
    sent: Arc<AtomicU64>,
    path: Path,
}

/// How a group's collectives travel.
enum Path {
    /// All members share memory.
    Near(Neighbours),
    /// They do not.
    Members(Members),
    /// Equal numbers of members on each host, side by side: first within the host, then across.
    Hosts(Box<TwoLevels>),
}

struct TwoLevels {
    near: Neighbours,
    across: Members,
    all: Members,
}

impl Group {
    /// All ranks. Its places in the control segments are fixed, so that it needs no meeting.
    pub(crate) fn whole(core: &Arc<Core>) -> Result<Group> {
        let ranks: Vec<usize> = (0..core.size()).collect();
        core.groups.fetch_max(1, Ordering::Relaxed);
        Group::with_slots(core, ranks, u32::MAX, |_| 0)
    }

    pub(crate) fn found(core: &Arc<Core>, ranks: &[usize], id: u32) -> Result<Group> {
        check_members(core, ranks, id)?;
        let slot = core.groups.fetch_add(1, Ordering::Relaxed);
        if slot >= MAX_GROUPS {
            return Err(Error::failure(format!(
                "group {id} would be one more than the {MAX_GROUPS} that a rank may join"
            )));
        }
        let slots = drive(core, join(core, ranks, id, slot))?;
        Group::with_slots(core, ranks.to_vec(), id, |member| slots[member])
    }

    fn with_slots(
        core: &Arc<Core>,
        ranks: Vec<usize>,
        id: u32,
        slot: impl Fn(usize) -> usize,
    ) -> Result<Group> {
        let me = ranks.iter().position(|&r| r == core.rank).unwrap_or(0);
        let near: Vec<usize> = (0..ranks.len()).filter(|&m| core.peers[ranks[m]].near.is_some()).collect();
        let neighbours = || {
            let slots = near.iter().map(|&m| slot(m)).collect();
            Neighbours::new(core, near.iter().map(|&m| ranks[m]).collect(), slots)
        };
        let mesh = |space| Members::new(ranks.clone(), me, GroupKey { id, space });
        let path = if near.len() == ranks.len() {
            Path::Near(neighbours()?)
        } else if let Some(local) = even_hosts(core, &ranks) {
            let across: Vec<usize> = ranks.iter().skip(me % local).step_by(local).copied().collect();
            let across = Members::new(across, me / local, GroupKey { id, space: Space::Across });
            Path::Hosts(Box::new(TwoLevels { near: neighbours()?, across, all: mesh(Space::Collective) }))
        } else {
            Path::Members(mesh(Space::Collective))
        };
        let (next, turn) = Default::default();
        let depth = AtomicUsize::new(DEFAULT_DEPTH);
        let sent = core.sent.counter(id);
        Ok(Group {
            inner: Arc::new(Inner { core: core.clone(), id, ranks, me, depth, next, turn, sent, path }),
        })
    }

    /// This rank's place in the group.
    pub fn rank(&self) -> usize {
        self.inner.me
    }

    /// Number of members.
    pub fn size(&self) -> usize {
        self.inner.ranks.len()
    }

    /// World ranks of the members, in the order of the group.
    pub fn ranks(&self) -> &[usize] {
        &self.inner.ranks
    }

    /// The group's id.
    pub fn id(&self) -> u32 {
        self.inner.id
    }

    /// Payload bytes that this rank has sent in operations of this group that have ended.
    ///
    /// What an operation sends is a matter of its definition, not of its way: with `n` members, and `S` bytes in all,
    ///
    /// | operation | bytes |
    /// | --- | --- |
    /// | send | `S` |
    /// | receive, barrier, founding the group | 0 |
    /// | all-gather | own range, times `n - 1` |
    /// | reduce-scatter | the ranges of the others |
    /// | all-reduce | a reduce-scatter and an all-gather over [`spec::shares::aligned`] shares |
    /// | all-to-all | the ranges for the others |
    /// | broadcast | `S (n - 1)` at the root, else 0 |
    ///
    /// Where no two members share memory, sockets carry exactly this, but for two ways of passing on: a broadcast goes
    /// along a tree, and [`Order::Ring`] deals without alignment. There the sum over all members is the same.
    pub fn sent_bytes(&self) -> u64 {
        self.inner.sent.load(Ordering::Relaxed)
    }

    /// How many messages per (channel, receiver) may be on their way before a send waits.
    ///
    /// # Errors
    /// 0, or more than a rank can have on their way in all.
    pub fn set_depth(&self, depth: usize) -> Result<()> {
        self.inner.depth.store(p2p::checked_depth(depth)?, Ordering::Relaxed);
        Ok(())
    }

    /// Every member's `buffer` becomes the sum of all, added in `order`.
    ///
    /// # Errors
    /// Members disagree about the operation, or one is lost or late; so for every operation.
    pub fn all_reduce<T: Element>(&self, tag: OpTag, buffer: &mut [T], order: Order) -> Result<()> {
        // SAFETY: the buffer is borrowed for the call.
        unsafe { self.run(tag, Op::AllReduce { buffer: RawSlice::of(buffer), order }) }
    }

    /// `buffer[ranges[i]]` of member i becomes that range of the sum; the rest of the buffer stays as it is.
    ///
    /// # Errors
    /// See [`Group::all_reduce`]; or the ranges do not fit.
    pub fn reduce_scatter<T: Element>(
        &self,
        tag: OpTag,
        buffer: &mut [T],
        ranges: &[Range<usize>],
        order: Order,
    ) -> Result<()> {
        let op =
            Op::ReduceScatter { input: RawSlice::of(buffer), output: None, ranges: ranges.into(), order };
        // SAFETY: the buffer is borrowed for the call.
        unsafe { self.run(tag, op) }
    }

    /// `buffer[ranges[i]]` of every member becomes that of member i.
    ///
    /// # Errors
    /// See [`Group::all_reduce`]; or the ranges do not fit.
    pub fn all_gather<T: Element>(
        &self,
        tag: OpTag,
        buffer: &mut [T],
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let op = Op::AllGather { input: None, output: RawSlice::of(buffer), ranges: ranges.into() };
        // SAFETY: the buffer is borrowed for the call.
        unsafe { self.run(tag, op) }
    }

    /// `output[output_ranges[i]]` becomes what member i has in `input` at its input range for this member.
    ///
    /// # Errors
    /// See [`Group::all_reduce`]; or the ranges do not fit.
    pub fn all_to_all<T: Element>(
        &self,
        tag: OpTag,
        input: &[T],
        input_ranges: &[Range<usize>],
        output: &mut [T],
        output_ranges: &[Range<usize>],
    ) -> Result<()> {
        let op = Op::AllToAll {
            input: RawSlice::of_const(input),
            input_ranges: input_ranges.into(),
            output: RawSlice::of(output),
            output_ranges: output_ranges.into(),
        };
        // SAFETY: the buffers are borrowed for the call, and an all-to-all does not write its input.
        unsafe { self.run(tag, op) }
    }

    /// Every member's `buffer` becomes that of member `root`.
    ///
    /// # Errors
    /// See [`Group::all_reduce`].
    pub fn broadcast<T: Element>(&self, tag: OpTag, buffer: &mut [T], root: usize) -> Result<()> {
        // SAFETY: the buffer is borrowed for the call.
        unsafe { self.run(tag, Op::Broadcast { buffer: RawSlice::of(buffer), root }) }
    }

    /// Sends a copy of `data` to member `to`: returns at once unless the channel is full.
    ///
    /// # Errors
    /// See [`Group::all_reduce`]; a mismatch is found by the receiver and reported to both.
    pub fn send<T: Element>(&self, tag: OpTag, to: usize, channel: u32, data: &[T]) -> Result<()> {
        // SAFETY: the buffer is borrowed for the call, and a send does not write it.
        unsafe { self.run(tag, Op::Send { buffer: RawSlice::of_const(data), to, channel }) }
    }

    /// Receives the next message of member `from` on `channel`, of exactly the length of `buffer`.
    ///
    /// # Errors
    /// See [`Group::all_reduce`].
    pub fn recv<T: Element>(&self, tag: OpTag, from: usize, channel: u32, buffer: &mut [T]) -> Result<()> {
        // SAFETY: the buffer is borrowed for the call.
        unsafe { self.run(tag, Op::Recv { buffer: RawSlice::of(buffer), from, channel }) }
    }

    /// Returns once every member has called it.
    ///
    /// # Errors
    /// See [`Group::all_reduce`].
    pub fn barrier(&self, tag: OpTag) -> Result<()> {
        // SAFETY: there is no buffer.
        unsafe { self.run(tag, Op::Barrier) }
    }

    /// Runs an operation to its end in the calling thread. A send returns once its buffer is copied.
    ///
    /// # Errors
    /// See [`Group::all_reduce`].
    ///
    /// # Safety
    /// The operation's spans are valid memory of their element type. During the call nobody else writes what it reads
    /// or touches what it writes, as [`Op`] says. Peers access the memory only within the call.
    pub unsafe fn run(&self, tag: OpTag, op: Op<'_>) -> Result<()> {
        let work = Work::new(&self.inner, tag, &op)?;
        // SAFETY: passed on from the caller.
        let done = drive(&self.inner.core, unsafe { work.perform(&self.inner, &op, Payload::Copied) });
        done.map(|_| ()).inspect_err(|_| self.inner.core.quiesce())
    }

    /// Starts an operation, which goes on while the caller computes, and returns its handle. A send from shared
    /// memory is read in place.
    ///
    /// # Errors
    /// The operation cannot be right (ranges outside the buffer, say), or the world has failed.
    ///
    /// # Safety
    /// As [`Group::run`], from the call until the handle has been waited for or dropped; a leaked handle leaves the
    /// buffers in use.
    pub unsafe fn start(&self, tag: OpTag, op: Op<'_>) -> Result<Handle> {
        let work = Work::new(&self.inner, tag, &op)?;
        let (inner, op) = (self.inner.clone(), op.into_owned());
        let eager = matches!(op, Op::Send { .. } | Op::Recv { .. });
        Handle::start(&self.inner.core, tag, eager, async move {
            // SAFETY: passed on from the caller.
            unsafe { work.perform(&inner, &op, Payload::InPlace).await }.inspect_err(|_| inner.core.quiesce())
        })
    }
}

fn check_members(core: &Core, ranks: &[usize], id: u32) -> Result<()> {
    let wrong = |what: String| Err(Error::failure(format!("group {id} of ranks {ranks:?}: {what}")));
    let mut sorted = ranks.to_vec();
    sorted.sort_unstable();
    if let Some(r) = sorted.last().filter(|r| **r >= core.size()) {
        return wrong(format!("there is no rank {r} among {}", core.size()));
    }
    if let Some(pair) = sorted.windows(2).find(|w| w[0] == w[1]) {
        return wrong(format!("rank {} is named twice", pair[0]));
    }
    if !ranks.contains(&core.rank) {
        return wrong(format!("rank {} is not a member", core.rank));
    }
    if ranks.len() > MAX_RANKS {
        return wrong(format!("expected at most {MAX_RANKS} members"));
    }
    if id == u32::MAX {
        return wrong("this id is that of all ranks".into());
    }
    Ok(())
}

/// Members tell each other where they keep the group, and that they mean the same one.
async fn join(core: &Core, ranks: &[usize], id: u32, slot: usize) -> Result<Vec<usize>> {
    let key = GroupKey { id, space: Space::Join };
    let members = ranks
        .iter()
        .fold(ranks.len() as u64, |h, r| (h.rotate_left(7) ^ *r as u64).wrapping_mul(0x0100_0193));
    let header = |lane: &dyn Fn() -> u64, count: usize| Header {
        kind: OpKind::Join,
        element: ElementType::U8,
        order: Order::Tree,
        root: 0,
        group: key,
        channel: 0,
        seq: 0,
        tag: OpTag::default(),
        count: count as u64,
        detail: members,
        message: lane(),
        part: count as u64,
    };
    let lane = |peer| Lane { peer, group: key, channel: 0 };
    let card = (slot as u64).to_le_bytes();
    for &peer in ranks.iter().filter(|&&r| r != core.rank) {
        let header = header(&|| core.outbox().number(lane(peer)), card.len());
        // SAFETY: the card lives until the end of the function.
        unsafe {
            p2p::send(core, header, peer, RawSlice::of_const(&card), Payload::Copied, usize::MAX).await?
        };
    }
    let mut slots = Vec::with_capacity(ranks.len());
    for &peer in ranks {
        let mut theirs = card;
        if peer != core.rank {
            let header = header(&|| core.inbox().number(lane(peer)), card.len());
            // SAFETY: the buffer lives beyond the await.
            unsafe { p2p::recv(core, header, peer, RawSlice::of(&mut theirs)).await? };
        }
        let slot = u64::from_le_bytes(theirs);
        if slot >= MAX_GROUPS as u64 {
            return Err(core.broken(peer, &format!("keeps {key} in slot {slot} of {MAX_GROUPS}")));
        }
        slots.push(slot as usize);
    }
    Ok(slots)
}

/// Members per host, if they are equally many everywhere, more than one, and side by side in the group.
fn even_hosts(core: &Core, ranks: &[usize]) -> Option<usize> {
    let host = |m: usize| core.peers[ranks[m]].host;
    let local = (0..ranks.len()).take_while(|&m| host(m) == host(0)).count();
    let hosts = ranks.len() / local;
    let even = local > 1 && ranks.len().is_multiple_of(local);
    let mut seen: Vec<usize> = (0..hosts).map(|h| host(h * local)).collect();
    seen.sort_unstable();
    seen.dedup();
    (even && seen.len() == hosts && (0..ranks.len()).all(|m| host(m) == host(m / local * local)))
        .then_some(local)
}

/// An operation with its place in the order of its group or channel.
struct Work {
    header: Header,
}

impl Work {
    fn new(group: &Inner, tag: OpTag, op: &Op<'_>) -> Result<Work> {
        if let Some(error) = group.core.failure.get() {
            return Err(error);
        }
        op.check(group.ranks.len(), group.me).map_err(|e| e.context(format!("group {}, {tag}", group.id)))?;
        let Summary { element, count, order, root, detail } = op.summary();
        let user = GroupKey { id: group.id, space: Space::User };
        let lane = |member: usize, channel| Lane { peer: group.ranks[member], group: user, channel };
        let (kind, channel, seq, space) = match *op {
            Op::Send { to, channel, .. } => {
                (OpKind::Send, channel, group.core.outbox().number(lane(to, channel)), Space::User)
            }
            // On the wire there are only sends.
            Op::Recv { from, channel, .. } => {
                (OpKind::Send, channel, group.core.inbox().number(lane(from, channel)), Space::User)
            }
            _ => (op.kind(), 0, group.next.fetch_add(1, Ordering::SeqCst), Space::Collective),
        };
        let group = GroupKey { id: group.id, space };
        let (message, part) = if space == Space::User { (seq, count) } else { (0, 0) };
        let header =
            Header { kind, element, order, root, group, channel, seq, tag, count, detail, message, part };
        Ok(Work { header })
    }

    /// Does the operation and counts what it sent; the time at which its turn came.
    ///
    /// # Safety
    /// As [`Group::run`], until the future has ended.
    async unsafe fn perform(&self, group: &Inner, op: &Op<'_>, payload: Payload) -> Result<Instant> {
        // SAFETY: passed on from the caller.
        let began = unsafe { self.in_turn(group, op, payload).await? };
        group.sent.fetch_add(op.sent_bytes(group.ranks.len(), group.me), Ordering::Relaxed);
        Ok(began)
    }

    async unsafe fn in_turn(&self, group: &Inner, op: &Op<'_>, payload: Payload) -> Result<Instant> {
        let core = &*group.core;
        let header = self.header;
        match *op {
            Op::Send { buffer, to, .. } => {
                let (began, depth) = (Instant::now(), group.depth.load(Ordering::Relaxed));
                // SAFETY: passed on from the caller.
                unsafe { p2p::send(core, header, group.ranks[to], buffer, payload, depth).await? };
                return Ok(began);
            }
            Op::Recv { buffer, from, .. } => {
                let began = Instant::now();
                // SAFETY: passed on from the caller.
                unsafe { p2p::recv(core, header, group.ranks[from], buffer).await? };
                return Ok(began);
            }
            _ => {}
        }
        let turn = || (group.turn.load(Ordering::Acquire) == header.seq).then_some(Ok(()));
        until(core, || format!("earlier operations of {}", header.group), turn).await?;
        let began = Instant::now();
        // SAFETY: passed on from the caller.
        unsafe { self.collective(group, op).await? };
        group.turn.store(header.seq + 1, Ordering::SeqCst);
        if group.next.load(Ordering::SeqCst) > header.seq + 1 {
            crate::control::publish();
            core.control.bell().ring();
        }
        Ok(began)
    }

    async unsafe fn collective(&self, group: &Inner, op: &Op<'_>) -> Result<()> {
        let core = &*group.core;
        let header = self.header;
        // SAFETY: passed on from the caller.
        unsafe {
            match &group.path {
                Path::Near(near) => near_collective(&Meeting { core, near, header }, op).await,
                Path::Members(mesh) => mesh_collective(&Exchange { core, mesh, header }, op).await,
                Path::Hosts(levels) => {
                    let TwoLevels { near, across, all } = &**levels;
                    let hosts = Hosts {
                        near: Meeting { core, near, header },
                        across: Exchange { core, mesh: across, header },
                    };
                    match op {
                        Op::AllReduce { buffer, order } if hosts.keeps(*order) => {
                            hosts.all_reduce(*buffer).await
                        }
                        Op::ReduceScatter { input, output, ranges, order } if hosts.keeps(*order) => {
                            let output = output.unwrap_or_else(|| input.part(&ranges[group.me]));
                            hosts.reduce_scatter(*input, output, ranges).await
                        }
                        Op::AllGather { input, output, ranges } => {
                            let input = input.unwrap_or_else(|| output.part(&ranges[group.me]));
                            hosts.all_gather(input, *output, ranges).await
                        }
                        _ => mesh_collective(&Exchange { core, mesh: all, header }, op).await,
                    }
                }
            }
        }
    }
}

async unsafe fn near_collective(meeting: &Meeting<'_>, op: &Op<'_>) -> Result<()> {
    let me = meeting.near.me;
    // SAFETY: passed on from the caller.
    unsafe {
        match op {
            Op::AllReduce { .. } if meeting.near.ranks.len() == 1 => Ok(()),
            Op::AllReduce { buffer, .. } => meeting.all_reduce(*buffer).await,
            Op::ReduceScatter { input, output, ranges, .. } => {
                let output = output.unwrap_or_else(|| input.part(&ranges[me]));
                meeting.reduce_scatter(*input, Address(output.as_ptr()), Into::Same, ranges).await
            }
            Op::AllGather { input, output, ranges } => {
                let input = input.unwrap_or_else(|| output.part(&ranges[me]));
                meeting.all_gather(input, *output, ranges).await
            }
            Op::AllToAll { input, input_ranges, output, output_ranges } => {
                meeting.all_to_all(*input, input_ranges, *output, output_ranges).await
            }
            Op::Broadcast { buffer, root } => meeting.broadcast(*buffer, *root).await,
            Op::Barrier => meeting.barrier().await,
            Op::Send { .. } | Op::Recv { .. } => Ok(()),
        }
    }
}

async unsafe fn mesh_collective(exchange: &Exchange<'_>, op: &Op<'_>) -> Result<()> {
    let me = exchange.mesh.me;
    // SAFETY: passed on from the caller.
    unsafe {
        match op {
            Op::AllReduce { buffer, .. } => exchange.all_reduce(*buffer).await,
            Op::ReduceScatter { input, output, ranges, .. } => {
                let output = output.unwrap_or_else(|| input.part(&ranges[me]));
                exchange.reduce_scatter(*input, Address(output.as_ptr()), Into::Same, ranges).await
            }
            Op::AllGather { input, output, ranges } => {
                let input = input.unwrap_or_else(|| output.part(&ranges[me]));
                exchange.all_gather(input, *output, ranges).await
            }
            Op::AllToAll { input, input_ranges, output, output_ranges } => {
                exchange.all_to_all(*input, input_ranges, *output, output_ranges).await
            }
            Op::Broadcast { buffer, root } => exchange.broadcast(*buffer, *root).await,
            Op::Barrier => exchange.barrier().await,
            Op::Send { .. } | Op::Recv { .. } => Ok(()),
        }
    }
}
