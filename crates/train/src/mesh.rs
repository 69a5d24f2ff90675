use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use comm::{ElementType, Group, Handle, OpTag, Order, Span, World};
use program::{Axis, BufferId, Coords, GroupId, Op, OpId, OpKind, Sync, View};
use spec::{DType, Error, Layout, Reduce, Result, Zero};

use crate::exec::{Executor, Turn};

/// Messages that a stage may have on their way to another before it waits: more than any schedule sends ahead.
const CHANNEL_DEPTH: usize = 64;

/// The ranks that this one talks to, axis by axis.
#[derive(Default)]
pub struct Mesh {
    world: Option<World>,
    groups: HashMap<Axis, Group>,
    embedding: Option<Group>,
    order: Order,
    /// Reductions under way, by bucket.
    reductions: RefCell<HashMap<usize, UnderWay>>,
    /// Gathers of parameters under way, by unit.
    gathers: RefCell<HashMap<usize, UnderWay>>,
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
        for (id, axis) in [(1, Axis::Dp), (2, Axis::Tp), (3, Axis::Pp)] {
            let ranks = coords.peers(axis, layout);
            if ranks.len() > 1 {
                groups.insert(axis, world.group(&ranks, id)?);
            }
        }
        if let Some(pipeline) = groups.get(&Axis::Pp) {
            pipeline.set_depth(CHANNEL_DEPTH)?;
        }
        let ends = coords.peers(Axis::Pp, layout);
        let at_an_end = coords.pp == 0 || coords.pp + 1 == layout.pp;
        let embedding = if layout.pp > 1 && at_an_end {
            Some(world.group(&[ends[0], ends[ends.len() - 1]], 4)?)
        } else {
            None
        };
        let order = if layout.reduce == Reduce::Tree { Order::Tree } else { Order::Ring };
        Ok(Mesh { world: Some(world), groups, embedding, order, ..Mesh::default() })
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

    /// Whether an op's reduction goes on after the op has returned.
    pub(crate) fn is_under_way(&self, kind: &OpKind) -> bool {
        matches!(kind, OpKind::ReduceGrads { bucket, .. } if self.reductions.borrow().contains_key(bucket))
    }

    fn wait(&self, under_way: Option<UnderWay>) -> Result<()> {
        let Some(UnderWay { at, handles }) = under_way else { return Ok(()) };
        for handle in handles {
            let times = handle.wait()?;
            self.finished.borrow_mut().push(Finished { at, began: times.began, ended: times.ended });
        }
        Ok(())
    }

    fn axis(&self, axis: Axis) -> Result<&Group> {
        self.groups.get(&axis).ok_or_else(|| Error::failure(format!("this rank has no peers along {axis:?}")))
    }
}

fn tag(id: OpId) -> OpTag {
    OpTag(u64::from(id.0))
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
    fn span(&self, view: View, turn: Turn) -> Span {
        let b = self.program.buffer(view.buffer);
        let at = self.offset(view, turn);
        assert!(at + view.rows * b.cols * b.dtype.bytes() <= self.arena.len());
        Span::new(self.arena.base().wrapping_add(at), view.rows * b.cols, element(b.dtype))
    }

    fn part(&self, buffer: BufferId, range: Range<usize>) -> Span {
        let b = self.program.buffer(buffer);
        let whole = self.span(View { buffer, row0: 0, rows: b.rows }, Turn::default());
        assert!(range.end <= whole.count());
        Span::new(whole.as_ptr().wrapping_add(range.start * b.dtype.bytes()), range.len(), whole.element())
    }

    /// Who owns which elements of a group along dp.
    fn owners(&self, group: GroupId) -> Vec<Range<usize>> {
        let (len, dp) = (self.program.group(group).len(), self.program.layout.dp);
        (0..dp)
            .map(|r| {
                let (first, count) = program::owned_range(len, dp, r);
                first..first + count
            })
            .collect()
    }

    /// Runs an op in which ranks talk.
    pub(crate) fn communicate(&self, op: &Op, turn: Turn) -> Result<()> {
        use OpKind::*;
        let mesh = &self.mesh;
        let id = tag(op.id);
        let even = |n: usize, parts: usize| comm::even_ranges(n, parts);
        match &op.kind {
            AllReduce { axis } => {
                let buffer = self.span(op.ins[0], turn);
                self.collective(mesh.axis(*axis)?, id, comm::Op::AllReduce { buffer, order: mesh.order })
            }
            AllGather { axis } => {
                let group = mesh.axis(*axis)?;
                let (input, output) = (self.span(op.ins[0], turn), self.span(op.outs[0], turn));
                let ranges = even(output.count(), group.size()).into();
                self.collective(group, id, comm::Op::AllGather { input: Some(input), output, ranges })
            }
            ReduceScatter { axis } => {
                let group = mesh.axis(*axis)?;
                let (input, output) = (self.span(op.ins[0], turn), self.span(op.outs[0], turn));
                let ranges = even(input.count(), group.size()).into();
                let op = comm::Op::ReduceScatter { input, output: Some(output), ranges, order: mesh.order };
                self.collective(group, id, op)
            }
            Send { peer, tag: channel } => {
                let group = mesh.axis(Axis::Pp)?;
                let to = place(group, *peer)?;
                let buffer = self.span(op.ins[0], turn);
                let message = OpTag(u64::from(*channel) << 32 | turn.micro_batch as u64);
                self.collective(group, message, comm::Op::Send { buffer, to, channel: *channel })
            }
            Recv { peer, tag: channel } => {
                let group = mesh.axis(Axis::Pp)?;
                let from = place(group, *peer)?;
                let buffer = self.span(op.outs[0], turn);
                let message = OpTag(u64::from(*channel) << 32 | turn.micro_batch as u64);
                self.collective(group, message, comm::Op::Recv { buffer, from, channel: *channel })
            }
            GatherParams { unit, groups } => {
                let dp = mesh.axis(Axis::Dp)?;
                let mut handles = Vec::with_capacity(groups.len());
                for (group, out) in groups.iter().zip(&op.outs) {
                    let param = self.program.group_buffers[group.0 as usize].param;
                    let input = self.part(param, 0..self.program.buffer(param).len());
                    let output = self.span(*out, turn);
                    let ranges = self.owners(*group).into();
                    let gather = comm::Op::AllGather { input: Some(input), output, ranges };
                    // SAFETY: placement keeps the gathered values' bytes for themselves until their last use, and the
                    // shard is written by the optimiser only, after every gather of the step was waited for.
                    handles.push(unsafe { dp.start(id, gather)? });
                }
                mesh.gathers.borrow_mut().insert(*unit, UnderWay { at: turn.at, handles });
                Ok(())
            }
            WaitParams { unit } => {
                let under_way = mesh.gathers.borrow_mut().remove(unit);
                mesh.wait(under_way)
            }
            ReduceGrads { bucket, .. } if self.program.layout.zero >= Zero::Gradients => {
                self.scatter_micro_batch(op, *bucket, turn)
            }
            ReduceGrads { bucket, scatter } => self.start_reduction(*bucket, *scatter, id, turn),
            WaitGrads { bucket } => {
                let under_way = mesh.reductions.borrow_mut().remove(bucket);
                mesh.wait(under_way)
            }
            ShardGrads { bucket } => {
                self.add_to_shards(op, *bucket, turn);
                Ok(())
            }
            SyncGrads { over, group } => {
                let peers = match over {
                    Sync::TensorParallel => mesh.axis(Axis::Tp)?,
                    Sync::Embedding => {
                        mesh.embedding.as_ref().ok_or_else(|| Error::failure("no embedding group here"))?
                    }
                };
                let g = group.0 as usize;
                let grad = self.program.group_buffers[g].grad;
                let (first, count) = self.owned_in(g, grad);
                let buffer = self.part(grad, first..first + count);
                self.collective(peers, id, comm::Op::AllReduce { buffer, order: mesh.order })
            }
            AllGatherParams { group } => {
                let param = self.program.group_buffers[group.0 as usize].param;
                let output = self.part(param, 0..self.program.buffer(param).len());
                let ranges = self.owners(*group).into();
                self.collective(mesh.axis(Axis::Dp)?, id, comm::Op::AllGather { input: None, output, ranges })
            }
            other => Err(Error::failure(format!("op {} ({}) is no communication", op.name, other.name()))),
        }
    }

    fn collective(&self, group: &Group, id: OpTag, op: comm::Op<'_>) -> Result<()> {
        // SAFETY: the spans lie in the arena, in buffers that placement gives to this op alone.
        unsafe { group.run(id, op) }
    }

    /// Begins the sum of a bucket's gradients over dp, to go on while backward computes.
    fn start_reduction(&self, bucket: usize, scatter: bool, id: OpTag, turn: Turn) -> Result<()> {
        let dp = self.mesh.axis(Axis::Dp)?;
        let order = self.mesh.order;
        let mut handles = Vec::new();
        if scatter {
            for (group, buffer) in &self.program.buckets[bucket].grads {
                let input = self.part(*buffer, 0..self.program.buffer(*buffer).len());
                let ranges = self.owners(*group).into();
                let op = comm::Op::ReduceScatter { input, output: None, ranges, order };
                // SAFETY: nobody touches a complete gradient before WaitGrads.
                handles.push(unsafe { dp.start(id, op)? });
            }
        } else {
            for &(at, count) in &self.bucket_runs[bucket] {
                let buffer = Span::new(self.arena.base().wrapping_add(at), count, ElementType::F32);
                // SAFETY: as above.
                handles.push(unsafe { dp.start(id, comm::Op::AllReduce { buffer, order })? });
            }
        }
        self.mesh.reductions.borrow_mut().insert(bucket, UnderWay { at: turn.at, handles });
        Ok(())
    }

    /// Sums one micro-batch's gradients over dp, each shard on its owner.
    fn scatter_micro_batch(&self, op: &Op, bucket: usize, turn: Turn) -> Result<()> {
        let dp = self.mesh.axis(Axis::Dp)?;
        for (view, (group, _)) in op.ins.iter().zip(&self.program.buckets[bucket].grads) {
            let input = self.span(self.last_level(*view, *group), turn);
            let ranges = self.owners(*group).into();
            let scatter = comm::Op::ReduceScatter { input, output: None, ranges, order: self.mesh.order };
            self.collective(dp, tag(op.id), scatter)?;
        }
        Ok(())
    }

    /// The level of a micro-batch's gradient that holds its sum.
    fn last_level(&self, view: View, group: GroupId) -> View {
        let rows = self.program.group(group).rows;
        View { row0: view.row0 + view.rows - rows, rows, ..view }
    }

    /// Adds one micro-batch's scattered gradients to the partial sums of the owned shards, in tree order.
    fn add_to_shards(&self, op: &Op, bucket: usize, turn: Turn) {
        let (merge, store) = spec::merge_at(&self.program.across, turn.micro_batch);
        for (view, (group, sum)) in op.ins.iter().zip(&self.program.buckets[bucket].grads) {
            let b = &self.program.group_buffers[group.0 as usize];
            let (first, count) = b.owned;
            let fresh = &self.at::<f32>(self.last_level(*view, *group), turn)[first..first + count];
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
