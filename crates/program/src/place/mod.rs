//! Bytes for everything: static buffers once, values of each chunk by lifetime, and ops over them.

mod lifetimes;
mod offsets;
mod statics;

use spec::{DType, Reduce, SumTree};

use crate::buffer::{Buffer, BufferId, GradOut, Home, View};
use crate::cost::cost;
use crate::graph::{Graph, Node, Operand, Source};
use crate::op::{Op, OpId, OpKind};
use crate::params::{GroupId, Replication, expert_bias};
use crate::rank::{Rank, cut_at};
use crate::role::{Place, Role};
use crate::schedule::{Blocks, Passes, Schedule};
use crate::zero::{Sums, is_head};
use crate::{Bucket, GroupBuffers, Io, Memory, Program, SlotRegion};
use lifetimes::Lifetimes;
use offsets::{Need, alive_peak, place};

pub use offsets::ALIGN;
pub(crate) use offsets::aligned;

/// The arena of a rank as it fills.
pub(crate) struct Placer<'a> {
    pub(crate) cx: &'a Rank<'a>,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) groups: Vec<GroupBuffers>,
    pub(crate) buckets: Vec<Bucket>,
    pub(crate) io: Io,
    pub(crate) memory: Memory,
    /// Radices, bottom-up, of the tree over the sequences that a weight gradient is summed over before ranks talk.
    radices: Vec<u32>,
    /// Bytes of static buffers so far.
    at: usize,
    /// Chunks of the gradient norm over the whole model.
    norm_chunks: usize,
    /// One micro-batch in flight: activations share the scratch region.
    unified: bool,
    slot_bytes: Vec<usize>,
    scratch: usize,
}

/// Where the regions behind the static buffers begin.
struct Regions {
    slots: Vec<SlotRegion>,
    scratch: usize,
    workspace: usize,
}

impl<'a> Placer<'a> {
    /// Places what lives as long as the run.
    pub(crate) fn new(cx: &'a Rank<'a>, schedule: &Schedule) -> Placer<'a> {
        let mut placer = Placer {
            cx,
            radices: cx.local_radices(),
            buffers: Vec::new(),
            groups: Vec::new(),
            buckets: Vec::new(),
            io: Io::default(),
            at: 0,
            memory: Memory::default(),
            norm_chunks: 0,
            unified: schedule.slots.iter().sum::<usize>() <= 1,
            slot_bytes: vec![0; cx.layout.chunks],
            scratch: 0,
        };
        placer.statics();
        placer.io = placer.tables();
        placer.buckets = placer.reduced_together();
        placer
    }

    /// Bytes of the scratch region so far.
    pub(crate) fn scratch(&self) -> usize {
        self.scratch
    }

    /// A value of the tail of a step, f32, at the start of the scratch region or behind another one.
    pub(crate) fn tail_value(
        &mut self,
        name: String,
        (rows, cols): (usize, usize),
        end: &mut usize,
        alive: (usize, usize),
    ) -> BufferId {
        let home = Home::Scratch { offset: *end, alive };
        *end += aligned(rows * cols * DType::F32.bytes());
        self.scratch = self.scratch.max(*end);
        self.memory.scratch_bound = self.memory.scratch_bound.max(*end);
        self.buffer(name, rows, cols, DType::F32, home, Place::Step)
    }

    /// The whole program, once all blocks are there.
    pub(crate) fn program(
        mut self,
        schedule: &Schedule,
        blocks: Blocks,
        tail: usize,
        eval: Vec<usize>,
        decode: Option<usize>,
    ) -> Program {
        let cx = self.cx;
        let regions = self.regions(schedule);
        Program {
            rank: cx.request.rank,
            coords: cx.coords,
            layout: cx.layout.clone(),
            sequence: cx.request.sequence,
            sequences: cx.request.sequences,
            local_sequences: cx.local_sequences,
            precision: cx.dtype,
            mode: cx.request.mode,
            groups: cx.groups.clone(),
            expert_bias: expert_bias(cx.model),
            shard_radices: self.shard_radices(),
            group_buffers: self.groups,
            buckets: self.buckets,
            buffers: self.buffers,
            schedule: blocks.items(cx, schedule),
            blocks: blocks.list,
            tail,
            eval,
            average: None,
            decode,
            io: self.io,
            slots: schedule.slots.clone(),
            slot_regions: regions.slots,
            scratch_offset: regions.scratch,
            workspace_offset: regions.workspace,
            memory: self.memory,
        }
    }

    /// Where everything lies once all chunks are placed.
    fn regions(&mut self, schedule: &Schedule) -> Regions {
        let mut at = self.at;
        let mut slots = Vec::new();
        for (&bytes, &count) in self.slot_bytes.iter().zip(&schedule.slots) {
            slots.push(SlotRegion { bytes, offset: at });
            at += bytes * count;
        }
        self.memory.slots = at - self.at;
        self.memory.scratch = self.scratch;
        Regions { slots, scratch: at, workspace: at + self.scratch }
    }

    fn buffer(
        &mut self,
        name: String,
        rows: usize,
        cols: usize,
        dtype: DType,
        home: Home,
        place: Place,
    ) -> BufferId {
        self.buffers.push(Buffer { name, rows, cols, dtype, home, place });
        BufferId(u32::try_from(self.buffers.len() - 1).expect("fewer than 2^32 buffers"))
    }

    /// Gives every value of a chunk a buffer, and turns nodes into ops, pass by pass. With `slots`, what is kept from one
    /// pass to another lies in a slot of its micro-batch.
    pub(crate) fn chunk(&mut self, c: usize, passes: &Passes, slots: bool) -> Vec<Vec<Op>> {
        let life = Lifetimes::of(&passes.graph, &passes.lists);
        let buffers = self.place_values(c, &passes.graph, &life, slots);
        let op = |n: &Node| self.op(&passes.graph, n, &buffers, &passes.sums);
        passes.lists.iter().map(|nodes| nodes.iter().filter_map(op).collect()).collect()
    }

    pub(crate) fn grad_buffer(&self, group: GroupId, head: bool) -> BufferId {
        let b = &self.groups[group.0 as usize];
        if head { b.head_grad.unwrap_or(b.grad) } else { b.grad }
    }

    /// How many counters an expert's gradients of a rank keep side by side: one for each rank whose rows come.
    pub(crate) fn streams(&self, replication: Replication) -> usize {
        let layout = &self.cx.layout;
        let ordered = replication == Replication::Expert && layout.reduce == Reduce::Tree;
        if ordered && !self.cx.generates() { layout.ep } else { 1 }
    }

    /// Radices, bottom-up, of the tree over the ranks that send rows to these experts.
    fn upper_radices(&self) -> Vec<u32> {
        let (ep, tree) = (self.cx.layout.ep, SumTree::new(self.cx.request.sequences));
        let below: usize = self.radices.iter().map(|r| *r as usize).product();
        match (tree.inner(below), tree.inner(below * ep)) {
            // Ranks of a tensor group share their sequences.
            (Some(below), Some(all)) if self.cx.layout.tp * self.cx.layout.cp == 1 => {
                all[below.len()..].to_vec()
            }
            _ => SumTree::new(ep).radices().to_vec(),
        }
    }

    /// The local tree cut at `leaves` sequences: (inside, outside), bottom-up.
    fn split_radices(&self, leaves: usize) -> (Vec<u32>, Vec<u32>) {
        let at = cut_at(&self.radices, leaves).unwrap_or(self.radices.len());
        (self.radices[..at].to_vec(), self.radices[at..].to_vec())
    }

    fn place_values(&mut self, c: usize, g: &Graph, life: &Lifetimes, slots: bool) -> Vec<Option<BufferId>> {
        let mut ids: Vec<Option<BufferId>> = vec![None; g.values.len()];
        let mut slot_spans = (Vec::new(), Vec::new());
        let mut scratch_spans = (Vec::new(), Vec::new());
        for (i, v) in g.values.iter().enumerate() {
            match v.source {
                Source::Param(group) => ids[i] = Some(self.groups[group.0 as usize].param),
                Source::Tokens => ids[i] = Some(self.rows_of(self.io.tokens, v)),
                Source::Targets => ids[i] = Some(self.rows_of(self.io.targets, v)),
                Source::NextTokens => ids[i] = self.io.next_tokens.map(|ids| self.rows_of(ids, v)),
                Source::NextTargets => ids[i] = self.io.next_targets.map(|ids| self.rows_of(ids, v)),
                Source::Starts => ids[i] = self.io.starts.map(|starts| self.rows_of(starts, v)),
                Source::LossLeaves => ids[i] = Some(self.io.loss_leaves),
                Source::ExpertBias => ids[i] = self.io.expert_bias,
                Source::Node => {
                    let (Some((birth, death)), true) = (life.span[i], life.root[i] == i) else { continue };
                    let span = Need { bytes: v.rows * v.cols * v.dtype.bytes(), birth, death };
                    let saved = life.block(birth) != life.block(death);
                    let list =
                        if saved && slots && !self.unified { &mut slot_spans } else { &mut scratch_spans };
                    list.0.push(i);
                    list.1.push(span);
                }
            }
        }
        let (offsets, size) = place(&slot_spans.1);
        self.slot_bytes[c] = self.slot_bytes[c].max(size);
        for (k, &i) in slot_spans.0.iter().enumerate() {
            let alive = life.ops((slot_spans.1[k].birth, slot_spans.1[k].death));
            let v = &g.values[i];
            let home = Home::Slot { chunk: c, offset: offsets[k], alive };
            ids[i] = Some(self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home, v.place));
        }
        let (offsets, size) = place(&scratch_spans.1);
        self.scratch = self.scratch.max(size);
        self.memory.scratch_bound = self.memory.scratch_bound.max(alive_peak(&scratch_spans.1));
        for (k, &i) in scratch_spans.0.iter().enumerate() {
            let alive = life.ops((scratch_spans.1[k].birth, scratch_spans.1[k].death));
            let v = &g.values[i];
            let home = Home::Scratch { offset: offsets[k], alive };
            ids[i] = Some(self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home, v.place));
        }
        for i in 0..ids.len() {
            // An alias has its root's bytes under its own name and shape.
            if ids[i].is_none() && life.root[i] != i {
                let home = ids[life.root[i]].map(|r| self.buffers[r.0 as usize].home);
                let v = &g.values[i];
                ids[i] = home.map(|home| self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home, v.place));
            }
        }
        ids
    }

    /// The micro-batch's rows of a whole step's input.
    fn rows_of(&mut self, whole: BufferId, v: &crate::graph::Value) -> BufferId {
        let Home::Static { offset } = self.buffers[whole.0 as usize].home else {
            unreachable!("inputs are static")
        };
        self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, Home::MicroBatch { offset }, v.place)
    }

    fn op(&self, g: &Graph, n: &Node, buffers: &[Option<BufferId>], sums: &Sums) -> Option<Op> {
        if matches!(n.kind, OpKind::Fork { .. }) {
            return None;
        }
        let view = |o: &Operand| View {
            buffer: buffers[o.value.0 as usize]
                .unwrap_or_else(|| panic!("{} of {} has no bytes", g.get(o.value).name, n.name)),
            row0: o.row0,
            rows: o.rows,
        };
        let grads = n.grads.iter().map(|&group| self.grad_out(g, n, group, buffers, sums)).collect();
        let grad_elements = n.grads.iter().map(|id| self.cx.groups[id.0 as usize].len()).sum();
        Some(Op {
            id: OpId::of(&n.name),
            name: n.name.clone(),
            kind: n.kind.clone(),
            ins: n.ins.iter().map(view).collect(),
            acc: n.acc.as_ref().map(view),
            outs: n.outs.iter().filter(|o| !sums.hidden.contains(&o.value)).map(view).collect(),
            grads,
            phase: n.phase,
            place: n.place,
            comm: None,
            cost: cost(g, n, self.cx.context(), grad_elements),
        })
    }

    fn grad_out(
        &self,
        g: &Graph,
        n: &Node,
        group: GroupId,
        buffers: &[Option<BufferId>],
        sums: &Sums,
    ) -> GradOut {
        let of = &self.cx.groups[group.0 as usize];
        let b = &self.groups[group.0 as usize];
        let (inner, mut outer) = self.split_radices(n.sequences.count);
        let (m, turns) = (self.cx.layout.micro_batch, n.sequences.turns.max(1));
        if turns > 1 {
            // What a sequence gives in turns is added first.
            outer.insert(0, u32::try_from(turns).expect("few turns"));
        }
        // Rows that are not whole sequences (sequence parallelism, tokens in the order of their experts) have no tree
        // inside.
        let data = n.ins.iter().filter(|o| !matches!(g.get(o.value).source, Source::Param(_)));
        let rows = data.map(|o| o.rows).min().unwrap_or(0);
        let parts = self.cx.layout.sequence_parallel || of.key.role == Role::Router;
        let whole = match of.replication {
            Replication::Data => {
                let of_whole = [self.cx.sequence, self.cx.context()].map(|t| n.sequences.count * t);
                of_whole.contains(&rows) || self.cx.layout.tp == 1 || !parts
            }
            // Rows are counted by sequence where a rank routes whole ones.
            Replication::Expert => n.ins.last().is_some_and(|o| g.get(o.value).cols == n.sequences.count),
        };
        let sum = self.grad_buffer(group, is_head(n));
        let levels = match sums.whole.get(&sum) {
            Some(v) => buffers[v.0 as usize].expect("gradients of a micro-batch are placed"),
            None if is_head(n) => b.head_grad_levels.unwrap_or(b.grad_levels),
            None => b.grad_levels,
        };
        let streams = self.streams(of.replication);
        let levels =
            View { buffer: levels, row0: 0, rows: streams * self.levels_of(of, n.sequences.count) * of.rows };
        let upper = if streams > 1 { self.upper_radices() } else { Vec::new() };
        let inner = if whole { inner } else { Vec::new() };
        let results = m / n.sequences.count * turns;
        let result = n.sequences.first / n.sequences.count * turns + n.sequences.turn;
        GradOut { group, sum, levels, inner, outer, results, result, streams, upper }
    }
}
