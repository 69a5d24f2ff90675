use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use comm::{ElementType, Group, Handle, OpTag, Order, RawSlice, World};
use program::{Axis, Collective, Coords, Members, OpId, Replication, Ticket};
use spec::{Error, Layout, Reduce, Result, Zero};

use crate::launch::Message;

/// Messages that a stage may have on their way to another before it waits: more than any schedule sends ahead.
const CHANNEL_DEPTH: usize = 64;

/// Elements of a message when much is passed on: a message is copied on its way, and this much stays in a core's cache.
const PASSED_AT_ONCE: usize = 1 << 18;

/// The channel of what is passed on; channels of the world's group carry nothing else.
const PASSING: u32 = 0;

/// The groups that ops name, in the order of their numbers on the wire; the world is there without founding.
const GROUPS: [Members; 11] = [
    Members::Replicas(Replication::Data),
    Members::Shards(Replication::Data),
    Members::Owners(Replication::Data),
    Members::Axis(Axis::Tp),
    Members::Axis(Axis::Pp),
    Members::Ends,
    Members::Axis(Axis::Ep),
    Members::Replicas(Replication::Expert),
    Members::Shards(Replication::Expert),
    Members::Owners(Replication::Expert),
    Members::Axis(Axis::Cp),
];

/// The group of the other parameters that experts' gradients meet in where both have the same members.
fn of_data(members: Members) -> Members {
    match members {
        Members::Replicas(Replication::Expert) => Members::Replicas(Replication::Data),
        Members::Shards(Replication::Expert) => Members::Shards(Replication::Data),
        Members::Owners(Replication::Expert) => Members::Owners(Replication::Data),
        other => other,
    }
}

/// The ranks that this one talks to, group by group, over the host's own transport.
#[derive(Default)]
pub struct Mesh {
    world: Option<World>,
    groups: HashMap<Members, Group>,
    order: Order,
    /// What was begun and not yet waited for; few tickets, each used again.
    under_way: Vec<(Ticket, Vec<Handle>)>,
}

impl Mesh {
    /// One rank alone.
    pub fn alone() -> Mesh {
        Mesh::default()
    }

    /// Founds the groups of a layout; collective over all ranks.
    ///
    /// # Errors
    /// If the layout does not multiply to the world, or a rank is lost.
    pub fn new(world: World, layout: &Layout) -> Result<Mesh> {
        Mesh::hall(world).found(layout)
    }

    /// All ranks of a world, whatever their layout will be.
    pub(crate) fn hall(world: World) -> Mesh {
        match world.size() {
            1 => Mesh::alone(),
            _ => Mesh { world: Some(world), ..Mesh::default() },
        }
    }

    /// Founds the groups of a layout, as [`Mesh::new`].
    pub(crate) fn found(self, layout: &Layout) -> Result<Mesh> {
        layout.validate_world(self.size())?;
        let Some(world) = self.world else { return Ok(self) };
        let coords = Coords::of(world.rank(), layout);
        let mut groups = HashMap::new();
        for (id, members) in (1..).zip(GROUPS) {
            // Replicas talk as one where nothing is sharded, and else by shards.
            let silent = match members {
                Members::Replicas(_) => layout.zero != Zero::Off,
                Members::Shards(_) | Members::Owners(_) => layout.zero == Zero::Off,
                _ => false,
            };
            let ranks = members.ranks(coords, layout);
            let data = of_data(members);
            if data != members && data.ranks(coords, layout) == ranks {
                continue;
            }
            if !silent && ranks.len() > 1 && ranks.contains(&world.rank()) {
                groups.insert(members, world.group(&ranks, id)?);
            }
        }
        if let Some(pipeline) = groups.get(&Members::Axis(Axis::Pp)) {
            pipeline.set_depth(CHANNEL_DEPTH)?;
        }
        let order = if layout.reduce == Reduce::Tree { Order::Tree } else { Order::Ring };
        Ok(Mesh { world: Some(world), groups, order, ..Mesh::default() })
    }

    /// This rank; 0 alone.
    pub fn rank(&self) -> usize {
        self.world.as_ref().map_or(0, World::rank)
    }

    /// Ranks; 1 alone.
    pub fn size(&self) -> usize {
        self.world.as_ref().map_or(1, World::size)
    }

    /// The host of each rank, by number.
    pub(crate) fn hosts(&self) -> Vec<usize> {
        self.world.as_ref().map_or(vec![0], |w| (0..w.size()).map(|rank| w.host(rank)).collect())
    }

    /// Why nothing can be said here any more, if so.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.world.as_ref().and_then(World::failure)
    }

    /// How long the quietest rank had been silent when this one knew that the world had failed, in seconds.
    pub(crate) fn silence_s(&self) -> Option<f64> {
        self.world.as_ref().and_then(World::silence).map(|silence| silence.as_secs_f64())
    }

    /// A look at the world for what carries messages beside it; `None` alone.
    pub fn watch(&self) -> Option<comm::Watch> {
        self.world.as_ref().map(World::watch)
    }

    /// The group that messages among `members` go through, which may be another's with the same ranks, and its ranks in
    /// their order; `None` where this rank has no peers there.
    pub fn members(&self, members: Members) -> Option<(Members, Vec<usize>)> {
        self.find(members).map(|(name, group)| (name, group.ranks().to_vec()))
    }

    /// The order in which sums among `members` are added.
    pub fn order(&self, members: Members) -> Order {
        // Of what all ranks sum, each element is held by one of them.
        if members == Members::World { Order::Tree } else { self.order }
    }

    /// Whether there is nobody to talk to.
    pub fn is_alone(&self) -> bool {
        self.world.is_none()
    }

    /// Memory that neighbours reach, so that collectives on it copy nothing; `None` for a rank alone.
    pub(crate) fn shared(&self, bytes: usize) -> Result<Option<comm::SharedArena>> {
        self.world.as_ref().map(|w| w.alloc_shared(bytes)).transpose()
    }

    /// The same memory in this world, after all its ranks have left the one that it was made in.
    pub(crate) fn adopt(&self, arena: &comm::SharedArena) -> Result<Option<comm::SharedArena>> {
        self.world.as_ref().map(|w| w.adopt(arena)).transpose()
    }

    /// Ranks that reach this one's memory, itself included.
    pub(crate) fn near(&self) -> usize {
        let hosts = self.hosts();
        hosts.iter().filter(|host| **host == hosts[self.rank()]).count()
    }

    /// Ends what all ranks are doing, so that none waits for this one.
    pub fn abort(&self, reason: &str) {
        if let Some(world) = &self.world {
            world.abort(reason);
        }
    }

    /// Returns once every rank has come here.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn barrier(&self) -> Result<()> {
        self.world.as_ref().map_or(Ok(()), World::barrier)
    }

    /// Everybody's bytes, on every rank, in rank order.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let Some(world) = &self.world else { return Ok(vec![mine.to_vec()]) };
        let (n, me) = (world.size(), world.rank());
        let mut lens = vec![0u32; n];
        lens[me] = u32::try_from(mine.len()).map_err(|_| Error::failure("more than 4 GiB to exchange"))?;
        let ones: Vec<Range<usize>> = (0..n).map(|i| i..i + 1).collect();
        world.all().all_gather(tag(OpId::of("exchange.lens")), &mut lens, &ones)?;
        let mut at = 0;
        let ranges: Vec<Range<usize>> = lens
            .iter()
            .map(|&l| {
                at += l as usize;
                at - l as usize..at
            })
            .collect();
        let mut all = vec![0u8; at];
        all[ranges[me].clone()].copy_from_slice(mine);
        world.all().all_gather(tag(OpId::of("exchange.bytes")), &mut all, &ranges)?;
        Ok(ranges.into_iter().map(|r| all[r].to_vec()).collect())
    }

    /// Part i of `send` goes to rank i; part i of `receive` becomes what rank i has for this one.
    ///
    /// # Errors
    /// If a rank is lost, or parts do not fit each other.
    pub(crate) fn deal(
        &self,
        send: &[f32],
        send_parts: &[Range<usize>],
        receive: &mut [f32],
        receive_parts: &[Range<usize>],
    ) -> Result<()> {
        match &self.world {
            Some(world) => {
                let tag = tag(OpId::of("deal"));
                // From memory that neighbours reach, one meeting serves all of it; a staging area of a few KiB takes hundreds,
                // and each of them costs a turn of the scheduler where ranks are more than cores.
                let mut arena = world.alloc_shared(size_of_val(send).max(1))?;
                let span = arena.span(0, send.len(), ElementType::F32)?;
                // SAFETY: nobody else knows of the arena yet, and the span is all of it.
                let shared = unsafe { arena.slice_mut::<f32>(span) };
                shared.copy_from_slice(send);
                world.all().all_to_all(tag, shared, send_parts, receive, receive_parts)
            }
            None => {
                receive.copy_from_slice(send);
                Ok(())
            }
        }
    }

    /// Sends `parts`, one after the other, to rank `to`, while `receive` is filled with what rank `from` sends likewise.
    ///
    /// # Errors
    /// If a rank is lost.
    pub(crate) fn pass_on<'a>(
        &self,
        to: usize,
        parts: impl Iterator<Item = &'a [f32]>,
        from: usize,
        receive: &mut [f32],
    ) -> Result<()> {
        let Some(world) = &self.world else { return Ok(()) };
        let (all, tag) = (world.all(), tag(OpId::of("pass-on")));
        let mut incoming = receive.chunks_mut(PASSED_AT_ONCE);
        let mut pass = |message: &[f32]| {
            all.send(tag, to, PASSING, message)?;
            incoming.next().map_or(Ok(()), |room| all.recv(tag, from, PASSING, room))
        };
        let mut message = Vec::with_capacity(PASSED_AT_ONCE);
        for mut part in parts {
            while !part.is_empty() {
                let (now, later) = part.split_at(part.len().min(PASSED_AT_ONCE - message.len()));
                message.extend_from_slice(now);
                part = later;
                if message.len() == PASSED_AT_ONCE {
                    pass(&message)?;
                    message.clear();
                }
            }
        }
        if !message.is_empty() {
            pass(&message)?;
        }
        incoming.try_for_each(|room| all.recv(tag, from, PASSING, room))
    }

    /// Says something; with a ticket it goes on until [`Mesh::end`].
    ///
    /// # Errors
    /// If the group does not exist, or a rank is lost.
    ///
    /// # Safety
    /// As [`Group::run`] and [`Group::start`]: the spans are valid memory that this message alone uses until it is over.
    pub unsafe fn say(
        &mut self,
        m: &Message<'_>,
        from: Option<RawSlice>,
        to: Option<RawSlice>,
        ticket: Option<Ticket>,
    ) -> Result<()> {
        let (tag, op) = operation(m, from, to, self.order(m.members))?;
        let group = self.group(m.members)?;
        let Some(ticket) = ticket else {
            // SAFETY: passed on from the caller.
            return unsafe { group.run(tag, op) };
        };
        // SAFETY: passed on from the caller.
        let handle = unsafe { group.start(tag, op)? };
        match self.under_way.iter_mut().find(|(t, _)| *t == ticket) {
            Some((_, handles)) => handles.push(handle),
            None => self.under_way.push((ticket, vec![handle])),
        }
        Ok(())
    }

    /// Waits for what was begun with a ticket, if anything was; `over` hears when each message began and ended.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn end(&mut self, ticket: Ticket, over: &mut dyn FnMut(Instant, Instant)) -> Result<()> {
        let handles = self.under_way.iter_mut().filter(|(t, _)| *t == ticket).flat_map(|(_, h)| h.drain(..));
        for handle in handles {
            let times = handle.wait()?;
            over(times.began, times.ended);
        }
        Ok(())
    }

    /// Waits for everything that was begun, whatever comes of it: memory that messages use may go then.
    pub(crate) fn quiet(&mut self) {
        self.under_way.clear();
    }

    /// Payload bytes that this rank has sent so far, group by group.
    pub fn sent_bytes(&self) -> Vec<(Members, u64)> {
        let all = self.world.iter().map(|w| (Members::World, w.all().sent_bytes()));
        all.chain(self.groups.iter().map(|(m, g)| (*m, g.sent_bytes()))).collect()
    }

    fn group(&self, members: Members) -> Result<&Group> {
        let found = self.find(members).map(|(_, group)| group);
        found.ok_or_else(|| Error::failure(format!("this rank has no peers along {members:?}")))
    }

    /// The group that messages among `members` go through, and its own name.
    fn find(&self, members: Members) -> Option<(Members, &Group)> {
        if members == Members::World {
            return self.world.as_ref().map(|world| (members, world.all()));
        }
        [members, of_data(members)].into_iter().find_map(|name| Some((name, self.groups.get(&name)?)))
    }
}

fn tag(id: OpId) -> OpTag {
    OpTag(id.0)
}

/// A message as the transport takes it.
fn operation<'a>(
    m: &Message<'a>,
    from: Option<RawSlice>,
    to: Option<RawSlice>,
    order: Order,
) -> Result<(OpTag, comm::Op<'a>)> {
    let lacks = || Error::failure(format!("{:?} has no end", m.what));
    let (input, output) = (|| from.ok_or_else(lacks), || to.ok_or_else(lacks));
    let ranges = comm::Ranges::Borrowed(m.parts);
    let channel = |channel: u32| OpTag(u64::from(channel) << 32 | m.micro_batch as u64);
    Ok(match m.what {
        Collective::AllReduce => (tag(m.op), comm::Op::AllReduce { buffer: input()?, order }),
        Collective::AllGather => (tag(m.op), comm::Op::AllGather { input: from, output: output()?, ranges }),
        Collective::ReduceScatter => {
            (tag(m.op), comm::Op::ReduceScatter { input: input()?, output: to, ranges, order })
        }
        Collective::Send { channel: c, .. } => {
            (channel(c), comm::Op::Send { buffer: input()?, to: m.peer, channel: c })
        }
        Collective::Recv { channel: c, .. } => {
            (channel(c), comm::Op::Recv { buffer: output()?, from: m.peer, channel: c })
        }
        Collective::AllToAll | Collective::Ring => {
            let (input_ranges, output_ranges) = (ranges, comm::Ranges::Borrowed(m.arrive));
            let (input, output) = (input()?, output()?);
            (tag(m.op), comm::Op::AllToAll { input, input_ranges, output, output_ranges })
        }
    })
}
