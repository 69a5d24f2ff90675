//! Messages through NCCL: a communicator and a stream for each group, and for each lane of a pipeline.
//!
//! A sum is added in the order of `docs/decisions/011`: every rank
//! sends each other one its part, adds up the parts of its own share on the card, and gathers the shares. Streams are
//! ordered against the compute stream by events, so that all of it can be recorded.

use std::collections::HashMap;
use std::ops::Range;

use comm::Order;
use program::{Collective, Deal, Members, OpId, Program, Ticket};
use spec::{DType, Error, Result};
use train::{Mesh, Message, Operand};

use crate::driver::{Memory, Stream};
use crate::events::{Event, Words};
use crate::lookout::{Looked, Lookout, Seen, WORDS};
use crate::module::{Geometry, Kernels, Params};
use crate::nccl::{Calls, Communicator, UniqueId};
use crate::share_out::{ALIGN, Key, Pieces, SLOTS, Wanted, even, wanted};
use crate::table::Tree;

/// Threads of a block that adds up.
const THREADS: usize = 256;

/// Most blocks that add up: enough to fill the memory's pipes, few enough to leave room for products.
const MOST_BLOCKS: usize = 256;

/// A group or a lane of it.
struct Way {
    stream: Stream,
    /// Of compute, before the message.
    ready: Event,
    /// Of the message.
    done: Event,
    scratch: Memory,
    me: usize,
    ranks: usize,
    order: Order,
    is_lane: bool,
    /// Of a lane that sends: messages that wait for their receiver, and whether their events are of this stretch.
    slots: [(Event, bool); SLOTS],
    next: usize,
}

/// All ways of a rank, to be left before they go: see [`Ways::leave`]. Streams go before what their kernels write.
pub(crate) struct Ways {
    ways: Vec<Way>,
    by_key: HashMap<Key, usize>,
    /// The group that carries the messages among some ranks, where it is another's.
    groups: HashMap<Members, Members>,
    numbers: HashMap<OpId, u32>,
    tickets: HashMap<(Ticket, usize), (Event, bool)>,
    staging_bytes: usize,
    /// Elements of rows that go to and come from each member, of the message that is said.
    ranges: [Vec<Range<usize>>; 2],
    /// The op that sent last.
    sent: Option<OpId>,
    lookout: Lookout,
}

/// What a rank needs to talk: the streams that wait for each other, the memory of operands, and kernels.
pub(crate) struct Speaker<'a> {
    pub(crate) kernels: &'a mut Kernels,
    pub(crate) compute: &'a Stream,
    pub(crate) arena: &'a Memory,
}

impl Speaker<'_> {
    /// What an operand holds once all before it is done: the host waits.
    fn read(&self, of: Operand) -> Result<Vec<u32>> {
        let mut held = vec![0; of.len()];
        self.compute.download(self.at(of), bytemuck::cast_slice_mut(&mut held))?;
        Ok(held)
    }

    fn at(&self, of: Operand) -> u64 {
        let end = of.offset + of.bytes();
        assert!(end <= self.arena.bytes, "bytes {}..{end} of an arena of {}", of.offset, self.arena.bytes);
        self.arena.base + of.offset as u64
    }
}

/// What a program says, and through which of its ways.
pub(crate) struct Plan<'a> {
    pub(crate) program: &'a Program,
    pub(crate) mesh: &'a Mesh,
    pub(crate) wanted: Vec<Wanted>,
    pub(crate) staging_bytes: usize,
}

impl Plan<'_> {
    /// The ways that a program needs.
    pub(crate) fn of<'a>(program: &'a Program, mesh: &'a Mesh, staging_bytes: usize) -> Plan<'a> {
        let wanted = wanted(program, |members| mesh.members(members), staging_bytes);
        Plan { program, mesh, wanted, staging_bytes }
    }

    /// Whether these ways carry all that the program says, and the host need not know how much.
    pub(crate) fn can_be_recorded(&self, carried: &[Wanted]) -> bool {
        let all = self.program.blocks.iter().flat_map(|b| &b.ops).filter_map(|op| op.comm.as_ref());
        let is_counted = |m: &program::Message| matches!(m.deal, Deal::Counted { .. });
        carried.len() == self.wanted.len() && !all.flat_map(|c| &c.messages).any(is_counted)
    }
}

impl Ways {
    /// Makes the ways of `carried`, by ids that all their ranks know.
    ///
    /// # Errors
    /// If a rank is lost or does not come, or the card has no memory for what is on its way.
    pub(crate) fn found(
        plan: &Plan<'_>,
        carried: &[Wanted],
        ids: &HashMap<String, UniqueId>,
        speaker: &mut Speaker<'_>,
    ) -> Result<Ways> {
        let (mesh, rank) = (plan.mesh, plan.mesh.rank());
        let watch = mesh.watch().ok_or_else(|| Error::failure("a rank alone founds a communicator"))?;
        let words = Words::new(carried.len() * WORDS)?;
        let ops = || plan.program.blocks.iter().flat_map(|b| &b.ops).filter(|op| op.comm.is_some());
        let mut names = vec!["meeting".to_owned(), "a sum outside of the step".to_owned()];
        let mut numbers = HashMap::new();
        for op in ops() {
            numbers.entry(op.id).or_insert_with(|| {
                names.push(op.name.clone());
                names.len() as u32 - 1
            });
        }
        let mut looked = Looked::new(watch, rank, names, words);
        let mut ways = Vec::new();
        // One after another, in the order of the world.
        for w in carried {
            let me = w.ranks.iter().position(|r| *r == rank).unwrap_or(0);
            let id =
                ids.get(&w.id()).ok_or_else(|| Error::failure(format!("no id came for {}", w.name())))?;
            let communicator = Communicator::begin(id, me, w.ranks.len())?;
            let others = w.ranks.iter().copied().filter(|r| *r != rank).collect();
            looked.ways.push(Seen { communicator, name: w.name(), others });
            looked.taken(ways.len())?;
            ways.push(Way::new(w, me, mesh.order(w.key.0))?);
        }
        let members = ops().filter_map(|op| Some(op.comm.as_ref()?.members));
        let groups = members.filter_map(|m| Some((m, mesh.members(m)?.0))).collect();
        let by_key = carried.iter().enumerate().map(|(i, w)| (w.key, i)).collect();
        let lookout = Lookout::begin(looked)?;
        let (tickets, ranges, sent) = Default::default();
        let staging_bytes = plan.staging_bytes;
        let mut all = Ways { lookout, ways, by_key, groups, numbers, tickets, staging_bytes, ranges, sent };
        all.connect(speaker)?;
        Ok(all)
    }

    /// Lets every way carry something, so that none waits for connections in the middle of a step.
    fn connect(&mut self, speaker: &mut Speaker<'_>) -> Result<()> {
        for i in 0..self.ways.len() {
            let Way { me, ranks, is_lane, order, .. } = self.ways[i];
            let at = self.ways[i].scratch.base;
            let of = |rank: usize| at + (rank * ALIGN) as u64;
            self.call(i, |calls| {
                for other in (0..ranks).filter(|other| *other != me) {
                    calls.send(of(me), 1, DType::F32, other)?;
                    calls.receive(of(other), 1, DType::F32, other)?;
                }
                Ok(())
            })?;
            if !is_lane {
                self.call(i, |calls| calls.gather(of(me), at, 1, DType::F32))?;
            }
            if !is_lane && order == Order::Ring {
                self.call(i, |calls| calls.sum(at, 1, DType::F32))?;
            }
            let (looked, stream) = (&self.lookout.looked, &self.ways[i].stream);
            let missing = || format!("the first message among {} over NCCL", looked.ways[i].name);
            looked.until(&missing, &|| stream.is_idle())?;
        }
        self.join(speaker.compute)
    }

    /// Whether a message goes this way.
    pub(crate) fn carries(&self, message: &Message<'_>) -> bool {
        self.way(message).is_some()
    }

    fn way(&self, m: &Message<'_>) -> Option<usize> {
        let lane = match m.what {
            Collective::Send { channel, .. } => Some((m.peer, true, channel)),
            Collective::Recv { channel, .. } => Some((m.peer, false, channel)),
            _ => None,
        };
        let group = self.groups.get(&m.members).copied().unwrap_or(m.members);
        self.by_key.get(&(group, lane)).copied()
    }

    /// Says something: compute goes on behind it, or with a ticket beside it until [`Ways::end`].
    ///
    /// # Errors
    /// If a peer or the card is lost.
    pub(crate) fn say(
        &mut self,
        speaker: &mut Speaker<'_>,
        m: &Message<'_>,
        ticket: Option<Ticket>,
    ) -> Result<()> {
        self.check()?;
        if let Some((counts, _)) = m.counted {
            return self.say_counted(speaker, m, counts, ticket);
        }
        let i = self
            .way(m)
            .ok_or_else(|| Error::failure(format!("NCCL carries nothing among {:?}", m.members)))?;
        if matches!(m.what, Collective::Send { .. }) {
            return self.send(speaker, i, m);
        }
        let way = &self.ways[i];
        way.stream.follow(speaker.compute, &way.ready)?;
        self.mark(speaker, i, m, false)?;
        self.carry(speaker, i, m)?;
        self.mark(speaker, i, m, true)?;
        let way = &self.ways[i];
        let Some(ticket) = ticket else { return speaker.compute.follow(&way.stream, &way.done) };
        let of = match self.tickets.entry((ticket, i)) {
            std::collections::hash_map::Entry::Occupied(of) => of.into_mut(),
            std::collections::hash_map::Entry::Vacant(of) => of.insert((Event::new()?, false)),
        };
        of.1 = true;
        way.stream.record(&of.0)
    }

    /// The same of rows whose number the card alone knows: the host asks it, so that no more is sent than there is.
    fn say_counted(
        &mut self,
        speaker: &mut Speaker<'_>,
        m: &Message<'_>,
        counts: [Operand; 2],
        ticket: Option<Ticket>,
    ) -> Result<()> {
        let [leave, arrive] = counts.map(|of| speaker.read(of));
        let counts = [leave?, arrive?];
        // What came of messages before is only good if nobody was lost.
        self.check()?;
        let mut ranges = std::mem::take(&mut self.ranges);
        m.count([&counts[0], &counts[1]], &mut ranges)?;
        let known = Message { parts: &ranges[0], arrive: &ranges[1], counted: None, ..*m };
        self.say(speaker, &known, ticket)?;
        self.ranges = ranges;
        Ok(())
    }

    /// Whether compute would wait in [`Ways::end`].
    pub(crate) fn is_open(&self, ticket: Ticket) -> bool {
        self.tickets.iter().any(|((t, _), (_, is_open))| *t == ticket && *is_open)
    }

    /// The op whose message a stage would wait for in [`Ways::join`]: what it sent last.
    pub(crate) fn sending(&self) -> Option<OpId> {
        let mut slots = self.ways.iter().flat_map(|way| &way.slots);
        self.sent.filter(|_| slots.any(|(_, is_open)| *is_open))
    }

    /// Lets compute wait for what was begun with a ticket.
    ///
    /// # Errors
    /// If a peer or the card is lost.
    pub(crate) fn end(&mut self, compute: &Stream, ticket: Ticket) -> Result<()> {
        for (_, (event, is_open)) in self.tickets.iter_mut().filter(|((t, _), _)| *t == ticket) {
            if std::mem::take(is_open) {
                compute.wait_for(event)?;
            }
        }
        self.check()
    }

    /// Lets compute wait for everything that is under way: a stretch ends or begins.
    ///
    /// # Errors
    /// If a peer or the card is lost.
    pub(crate) fn join(&mut self, compute: &Stream) -> Result<()> {
        let tickets = self.tickets.values_mut();
        let slots = self.ways.iter_mut().flat_map(|way| &mut way.slots);
        for (event, is_open) in tickets.chain(slots) {
            if std::mem::take(is_open) {
                compute.wait_for(event)?;
            }
        }
        self.check()
    }

    /// Looks for a loss: what came of messages is only good if there was none.
    ///
    /// # Errors
    /// Which rank was lost, and in which message, as far as that is known.
    pub(crate) fn check(&self) -> Result<()> {
        self.lookout.looked.check()
    }

    /// Leaves the other ranks: in good order if nothing is under way, else by ending it.
    pub(crate) fn leave(&self) {
        self.lookout.looked.leave(&|| self.ways.iter().all(|way| way.stream.is_idle()));
    }

    fn call(&self, i: usize, calls: impl FnOnce(&mut Calls<'_>) -> Result<()>) -> Result<()> {
        let looked = &self.lookout.looked;
        let called = looked.ways[i].communicator.together(&self.ways[i].stream, calls);
        // Of two reasons the one that names a rank.
        called.or_else(|e| looked.check().and(Err(e)))?;
        looked.taken(i)
    }

    /// Notes on the way's stream that a message begins there, or is over.
    fn mark(&self, speaker: &mut Speaker<'_>, i: usize, m: &Message<'_>, over: bool) -> Result<()> {
        let at = self.lookout.looked.words.address(i * WORDS);
        let which = self.numbers.get(&m.op).copied().unwrap_or(1);
        let mut params = Params::new().with(at).with(which).with(i32::from(over));
        speaker.kernels.launch(&self.ways[i].stream, "mark", Geometry::line(1, 1), &mut params)
    }

    /// A copy of what is sent waits for its receiver; compute goes on.
    fn send(&mut self, speaker: &mut Speaker<'_>, i: usize, m: &Message<'_>) -> Result<()> {
        let from = m.from.ok_or_else(|| lacks(m))?;
        self.sent = Some(m.op);
        let way = &mut self.ways[i];
        let slot = way.next;
        way.next = (slot + 1) % SLOTS;
        let at = way.scratch.base + (slot * (way.scratch.bytes / SLOTS)) as u64;
        if way.slots[slot].1 {
            speaker.compute.wait_for(&way.slots[slot].0)?;
        }
        speaker.compute.copy(at, speaker.at(from), from.bytes())?;
        way.stream.follow(speaker.compute, &way.ready)?;
        let other = 1 - way.me;
        self.mark(speaker, i, m, false)?;
        self.call(i, |calls| calls.send(at, from.len(), from.dtype, other))?;
        self.mark(speaker, i, m, true)?;
        let way = &mut self.ways[i];
        way.slots[slot].1 = true;
        way.stream.record(&way.slots[slot].0)
    }

    /// Puts a message on its way's stream.
    fn carry(&self, speaker: &mut Speaker<'_>, i: usize, m: &Message<'_>) -> Result<()> {
        let way = &self.ways[i];
        match m.what {
            Collective::Recv { .. } => {
                let to = m.to.ok_or_else(|| lacks(m))?;
                self.call(i, |calls| calls.receive(speaker.at(to), to.len(), to.dtype, 1 - way.me))
            }
            Collective::AllGather => {
                let to = m.to.ok_or_else(|| lacks(m))?;
                let own = to.part(m.parts[way.me].start, m.parts[way.me].len());
                let own = m.from.map_or(speaker.at(own), |from| speaker.at(from));
                self.gather(i, own, speaker.at(to), m.parts, to.dtype)
            }
            Collective::AllReduce => {
                let from = m.from.ok_or_else(|| lacks(m))?;
                let (at, count, dtype) = (speaker.at(m.to.unwrap_or(from)), from.len(), from.dtype);
                if at != speaker.at(from) {
                    way.stream.copy(at, speaker.at(from), from.bytes())?;
                }
                if way.order == Order::Ring {
                    // The order is the transport's own: so may the sum be.
                    return self.call(i, |calls| calls.sum(at, count, dtype));
                }
                let pieces = Pieces::of_all(count, way.ranks, dtype, self.staging_bytes);
                let share = &pieces.shares()[way.me];
                let own = at + (share.start * dtype.bytes()) as u64;
                self.sum(speaker, i, &pieces, at, own, dtype)?;
                self.gather(i, own, at, pieces.shares(), dtype)
            }
            Collective::ReduceScatter => {
                let from = m.from.ok_or_else(|| lacks(m))?;
                let pieces = Pieces::new(m.parts, from.dtype, self.staging_bytes);
                let at = speaker.at(from);
                let own = at + (m.parts[way.me].start * from.dtype.bytes()) as u64;
                let to = m.to.map_or(own, |to| speaker.at(to));
                self.sum(speaker, i, &pieces, at, to, from.dtype)
            }
            Collective::AllToAll | Collective::Ring => {
                let (from, to) = (m.from.ok_or_else(|| lacks(m))?, m.to.ok_or_else(|| lacks(m))?);
                self.exchange(i, (speaker.at(from), m.parts), (speaker.at(to), m.arrive), from.dtype)
            }
            what => Err(Error::failure(format!("NCCL carries no {what:?} beside compute"))),
        }
    }

    /// Every member's part of what lies at `from` goes there; what comes from each lies at `to`.
    fn exchange(
        &self,
        i: usize,
        (from, leave): (u64, &[Range<usize>]),
        (to, arrive): (u64, &[Range<usize>]),
        dtype: DType,
    ) -> Result<()> {
        let (way, size) = (&self.ways[i], dtype.bytes());
        let at = |base: u64, part: &Range<usize>| base + (part.start * size) as u64;
        let own = &leave[way.me];
        if !own.is_empty() {
            way.stream.copy(at(to, &arrive[way.me]), at(from, own), own.len() * size)?;
        }
        self.call(i, |calls| {
            for other in (0..way.ranks).filter(|other| *other != way.me) {
                let (theirs, ours) = (&leave[other], &arrive[other]);
                if !theirs.is_empty() {
                    calls.send(at(from, theirs), theirs.len(), dtype, other)?;
                }
                if !ours.is_empty() {
                    calls.receive(at(to, ours), ours.len(), dtype, other)?;
                }
            }
            Ok(())
        })
    }

    /// Adds this rank's share of what lies at `at` on all ranks, to `to`.
    fn sum(
        &self,
        speaker: &mut Speaker<'_>,
        i: usize,
        pieces: &Pieces,
        at: u64,
        to: u64,
        dtype: DType,
    ) -> Result<()> {
        let kernel = match dtype {
            DType::Bf16 => "sum_ranks_bf16",
            DType::F32 => "sum_ranks_f32",
            DType::F64 => "sum_ranks_f64",
            DType::U32 => return Err(Error::failure("ranks that add up whole numbers over NCCL")),
        };
        let way = &self.ways[i];
        let (me, size) = (way.me, dtype.bytes());
        let others = || (0..way.ranks).filter(|other| *other != me);
        let scratch = |other: usize| {
            let place = other - usize::from(other > me);
            way.scratch.base + (place * pieces.len * size) as u64
        };
        let radices: Vec<u32> = comm::tree_radices(way.ranks).iter().map(|r| *r as u32).collect();
        for k in 0..pieces.count() {
            let own = pieces.of(me, k);
            let address = |first: usize| at + (first * size) as u64;
            self.call(i, |calls| {
                for other in others() {
                    let theirs = pieces.of(other, k);
                    if !theirs.is_empty() {
                        calls.send(address(theirs.start), theirs.len(), dtype, other)?;
                    }
                    if !own.is_empty() {
                        calls.receive(scratch(other), own.len(), dtype, other)?;
                    }
                }
                Ok(())
            })?;
            let to = to + ((own.start - pieces.of(me, 0).start) * size) as u64;
            let mut params = Params::new()
                .with(address(own.start))
                .with(me as i32)
                .with(way.scratch.base)
                .with(pieces.len as i64)
                .with(to)
                .with(own.len() as i64)
                .with(Tree::of(&radices));
            let blocks = own.len().div_ceil(THREADS).min(MOST_BLOCKS);
            speaker.kernels.launch(&way.stream, kernel, Geometry::line(blocks, THREADS), &mut params)?;
        }
        Ok(())
    }

    /// Every rank's part, at `own` there, becomes that part of what lies at `to`.
    fn gather(&self, i: usize, own: u64, to: u64, parts: &[Range<usize>], dtype: DType) -> Result<()> {
        let way = &self.ways[i];
        if let Some(len) = even(parts) {
            return self.call(i, |calls| calls.gather(own, to, len, dtype));
        }
        let at = |part: &Range<usize>| to + (part.start * dtype.bytes()) as u64;
        let mine = &parts[way.me];
        if own != at(mine) {
            way.stream.copy(at(mine), own, mine.len() * dtype.bytes())?;
        }
        self.call(i, |calls| {
            for (other, theirs) in parts.iter().enumerate().filter(|(other, _)| *other != way.me) {
                if !mine.is_empty() {
                    calls.send(own, mine.len(), dtype, other)?;
                }
                if !theirs.is_empty() {
                    calls.receive(at(theirs), theirs.len(), dtype, other)?;
                }
            }
            Ok(())
        })
    }
}

impl Way {
    fn new(wanted: &Wanted, me: usize, order: Order) -> Result<Way> {
        let scratch = Memory::new(wanted.scratch_bytes);
        let scratch = scratch.map_err(|e| e.context(format!("messages among {}", wanted.name())))?;
        let slots: Vec<_> = (0..SLOTS).map(|_| Ok((Event::new()?, false))).collect::<Result<_>>()?;
        let slots = slots.try_into().map_err(|_| Error::failure("slots of another number"))?;
        let (ready, done, ranks) = (Event::new()?, Event::new()?, wanted.ranks.len());
        let is_lane = wanted.key.1.is_some();
        Ok(Way { stream: Stream::new()?, ready, done, scratch, me, ranks, order, is_lane, slots, next: 0 })
    }
}

fn lacks(m: &Message<'_>) -> Error {
    Error::failure(format!("{:?} has no end", m.what))
}
