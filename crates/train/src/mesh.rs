use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use comm::{ElementType, Group, Handle, OpTag, Order, Span, World};
use program::{
    Axis, Collective, Comm, Coords, Members, Message, Op, OpId, Replication, Slice, Ticket, View, When,
};
use spec::{DType, Error, Layout, Reduce, Result};

use crate::exec::{Executor, Turn};

/// Messages that a stage may have on their way to another before it waits: more than any schedule sends ahead.
const CHANNEL_DEPTH: usize = 64;

/// The groups that ops name, in the order of their numbers on the wire; the world is there without founding.
const GROUPS: [Members; 4] =
    [Members::Replicas(Replication::Data), Members::Axis(Axis::Tp), Members::Axis(Axis::Pp), Members::Ends];

/// The ranks that this one talks to, group by group.
#[derive(Default)]
pub struct Mesh {
    world: Option<World>,
    groups: HashMap<Members, Group>,
    order: Order,
    /// What was begun and not yet waited for.
    under_way: RefCell<HashMap<Ticket, UnderWay>>,
    /// Operations that went on beside others and were waited for since this was last looked at.
    pub(crate) finished: RefCell<Vec<Finished>>,
}

/// When an op (block and index) that went on beside others really ran.
pub(crate) struct Finished {
    pub(crate) at: (usize, usize),
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
}

/// The messages of an op (block and index) that goes on beside others.
struct UnderWay {
    at: (usize, usize),
    handles: Vec<Handle>,
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
        layout.validate_world(world.size())?;
        if world.size() == 1 {
            return Ok(Mesh::alone());
        }
        let coords = Coords::of(world.rank(), layout);
        let mut groups = HashMap::new();
        for (id, members) in (1..).zip(GROUPS) {
            let ranks = members.ranks(coords, layout);
            if ranks.len() > 1 && ranks.contains(&world.rank()) {
                groups.insert(members, world.group(&ranks, id)?);
            }
        }
        if let Some(pipeline) = groups.get(&Members::Axis(Axis::Pp)) {
            pipeline.set_depth(CHANNEL_DEPTH)?;
        }
        let order = if layout.reduce == Reduce::Tree { Order::Tree } else { Order::Ring };
        Ok(Mesh { world: Some(world), groups, order, ..Mesh::default() })
    }

    /// Memory that neighbours reach, so that collectives on it copy nothing; `None` for a rank alone.
    pub(crate) fn shared(&self, bytes: usize) -> Result<Option<comm::SharedArena>> {
        self.world.as_ref().map(|w| w.alloc_shared(bytes)).transpose()
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

    /// Sums `values` over all ranks; each element is held by one rank and zero on the others.
    pub(crate) fn sum_all(&self, id: OpId, values: &mut [f64]) -> Result<()> {
        let Some(world) = &self.world else { return Ok(()) };
        world.all().all_reduce(tag(id), values, Order::Tree)
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

    /// Waits for what an earlier op began.
    fn wait(&self, ticket: Ticket) -> Result<()> {
        let Some(UnderWay { at, handles }) = self.under_way.borrow_mut().remove(&ticket) else {
            return Ok(());
        };
        for handle in handles {
            let times = handle.wait()?;
            self.finished.borrow_mut().push(Finished { at, began: times.began, ended: times.ended });
        }
        Ok(())
    }

    fn group(&self, members: Members) -> Result<&Group> {
        self.groups
            .get(&members)
            .ok_or_else(|| Error::failure(format!("this rank has no peers along {members:?}")))
    }
}

fn tag(id: OpId) -> OpTag {
    OpTag(id.0)
}

fn element(dtype: DType) -> ElementType {
    match dtype {
        DType::F32 => ElementType::F32,
        DType::Bf16 => ElementType::Bf16,
        DType::U32 => ElementType::U32,
        DType::F64 => ElementType::F64,
    }
}

impl Executor {
    fn span(&self, slice: Slice, turn: Turn) -> Span {
        let b = self.program.buffer(slice.buffer);
        let at = self.offset(slice, turn);
        assert!(at + slice.count * b.dtype.bytes() <= self.arena.len());
        Span::new(self.arena.base().wrapping_add(at), slice.count, element(b.dtype))
    }

    /// Does what an op says to other ranks.
    pub(crate) fn communicate(&self, op: &Op, comm: &Comm, turn: Turn) -> Result<()> {
        if let When::Ends(ticket) = comm.when {
            return self.mesh.wait(ticket);
        }
        let group = self.mesh.group(comm.members)?;
        let mut handles = Vec::new();
        for message in &comm.messages {
            let (id, message) = self.message(op, comm.what, message, group, turn)?;
            // SAFETY: the spans lie in the arena, in buffers that placement gives to this op alone until it, or the op
            // that waits for it, is over.
            unsafe {
                match comm.when {
                    When::Begins(_) => handles.push(group.start(id, message)?),
                    _ => group.run(id, message)?,
                }
            }
        }
        if let When::Begins(ticket) = comm.when {
            self.mesh.under_way.borrow_mut().insert(ticket, UnderWay { at: turn.at, handles });
        }
        Ok(())
    }

    /// One message of an op as the transport takes it.
    fn message(
        &self,
        op: &Op,
        what: Collective,
        m: &Message,
        group: &Group,
        turn: Turn,
    ) -> Result<(OpTag, comm::Op<'static>)> {
        let order = self.mesh.order;
        let (from, to) = (m.from.map(|s| self.span(s, turn)), m.to.map(|s| self.span(s, turn)));
        let lacks = || Error::failure(format!("{} states {what:?} without an end", op.name));
        let (input, output) = (from.ok_or_else(lacks), to.ok_or_else(lacks));
        let ranges = || (0..group.size()).map(|i| m.part(i, group.size())).collect();
        let channel = |channel: u32| OpTag(u64::from(channel) << 32 | turn.micro_batch as u64);
        Ok(match what {
            Collective::AllReduce => (tag(op.id), comm::Op::AllReduce { buffer: input?, order }),
            Collective::AllGather => {
                (tag(op.id), comm::Op::AllGather { input: from, output: output?, ranges: ranges() })
            }
            Collective::ReduceScatter => {
                let scatter = comm::Op::ReduceScatter { input: input?, output: to, ranges: ranges(), order };
                (tag(op.id), scatter)
            }
            Collective::Send { to, channel: c } => {
                let to = place(group, to)?;
                (channel(c), comm::Op::Send { buffer: input?, to, channel: c })
            }
            Collective::Recv { from, channel: c } => {
                let from = place(group, from)?;
                (channel(c), comm::Op::Recv { buffer: output?, from, channel: c })
            }
            Collective::AllToAll | Collective::Ring => {
                return Err(Error::failure(format!("{} ({what:?}) is not executed yet", op.name)));
            }
        })
    }

    /// Adds one micro-batch's scattered gradients to the partial sums of the owned shards, in tree order.
    pub(crate) fn add_to_shards(&self, op: &Op, bucket: usize, turn: Turn) {
        let (merge, store) = spec::merge_at(&self.program.shard_radices, turn.micro_batch);
        for (view, (group, sum)) in op.ins.iter().zip(&self.program.buckets[bucket].grads) {
            let b = &self.program.group_buffers[group.0 as usize];
            let count = b.owned.count;
            // The level of a micro-batch's gradient that holds its sum.
            let rows = self.program.group(*group).rows;
            let last = View { row0: view.row0 + view.rows - rows, rows, ..*view };
            let fresh = &self.at::<f32>(last, turn)[b.owned.range()];
            let levels = if b.head_grad == Some(*sum) { b.head_grad_levels } else { Some(b.grad_levels) };
            let levels = self.whole::<f32>(levels.expect("a head's gradient has levels"));
            for (i, x) in fresh.iter().enumerate() {
                let mut r = *x;
                for l in 0..merge {
                    r += levels[l * count + i];
                }
                levels[store * count + i] = r;
            }
        }
    }
}

fn place(group: &Group, rank: usize) -> Result<usize> {
    let at = group.ranks().iter().position(|&r| r == rank);
    at.ok_or_else(|| Error::failure(format!("rank {rank} is not in the pipeline {:?}", group.ranks())))
}
