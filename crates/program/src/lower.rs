use std::collections::HashMap;

use spec::{DType, SumTree, Zero};

use crate::buffer::{Buffer, BufferId, GradOut, Home, View};
use crate::comm;
use crate::coords::Coords;
use crate::cost::cost;
use crate::derive::{backward, loss};
use crate::emit::{Context, Forward, forward};
use crate::graph::{Graph, Node, Operand, Phase, Source};
use crate::lifetimes::Lifetimes;
use crate::op::{Axis, Op, OpId, OpKind};
use crate::params::{Chunk, GroupId, Replication, chunks, table};
use crate::pipeline::{Pass, in_flight, orders};
use crate::place::{Span, aligned, alive_peak, place};
use crate::role::{Place, Role};
use crate::zero::{Sums, gather_params, is_head};
use crate::{
    Block, Bucket, GroupBuffers, Io, Item, Memory, Mode, Program, Request, SlotRegion, WorkspaceLen, step,
};

/// Turns chunks into blocks over placed buffers.
pub(crate) fn lower(request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Program {
    let model = request.model;
    // A rank that shares no parameter has nobody to shard with.
    let shares =
        request.layout.replicas() > 1 || model.experts.is_some() && request.layout.expert_replicas() > 1;
    let zero = if shares { request.layout.zero } else { Zero::Off };
    let layout = &spec::Layout { zero, ..request.layout.clone() };
    let request = &Request { layout, ..*request };
    let coords = Coords::of(request.rank, layout);
    let stage = chunks(model, layout, coords.pp);
    let groups = table(model, layout, coords, &stage);
    let index = (0..).map(GroupId).zip(&groups).map(|(id, g)| (g.key, id)).collect();
    let pipeline = coords.peers(Axis::Pp, layout);
    let cx = Context {
        model,
        layout,
        sequence: request.sequence / layout.cp,
        dtype: request.precision,
        coords,
        groups: &groups,
        index: &index,
        pipeline: &pipeline,
        decode: false,
    };
    let local_sequences = request.sequences / layout.dp;
    let order =
        &orders(layout.schedule, layout.pp, layout.chunks, local_sequences / layout.micro_batch)[coords.pp];
    let slots = in_flight(order, layout.chunks);

    let mut l = Lower {
        cx: &cx,
        request,
        coords,
        radices: local_radices(request, local_sequences),
        buffers: Vec::new(),
        group_buffers: Vec::new(),
        bucket_list: Vec::new(),
        at: 0,
        memory: Memory::default(),
        norm_chunks: 0,
        unified: slots.iter().sum::<usize>() <= 1,
        slot_sizes: vec![0; layout.chunks],
        scratch: 0,
    };
    l.statics(&stage);
    let io = l.io(local_sequences);
    l.bucket_list = l.buckets(&stage);
    let buckets = l.bucket_list.clone();

    let mut blocks = Vec::new();
    let mut passes: HashMap<(usize, Pass, bool), usize> = HashMap::new();
    let split = order.iter().any(|w| w.pass == Pass::Weight);
    let inference = request.mode != Mode::Train;
    let order: &[_] = if inference { &[] } else { order };
    for (c, chunk) in stage.iter().enumerate().filter(|_| !inference) {
        for (pass, last, block) in l.train_blocks(c, chunk, &io, split, &buckets) {
            passes.insert((c, pass, last), blocks.len());
            blocks.push(block);
        }
    }
    let schedule = order
        .iter()
        .map(|w| {
            let last = w.micro_batch + 1 == local_sequences / layout.micro_batch;
            let block =
                passes.get(&(w.chunk, w.pass, last)).unwrap_or_else(|| &passes[&(w.chunk, w.pass, false)]);
            Item { block: *block, micro_batch: w.micro_batch }
        })
        .collect();
    let eval: Vec<usize> = stage
        .iter()
        .enumerate()
        .filter(|_| !inference)
        .map(|(c, chunk)| {
            blocks.push(l.eval_block(c, chunk, &io));
            blocks.len() - 1
        })
        .collect();
    let decode = inference.then(|| {
        blocks.push(l.decode_block(&stage[0], &io));
        blocks.len() - 1
    });
    let tail = blocks.len();
    blocks.push(Block {
        name: "step".into(),
        chunk: 0,
        ops: step::ops(&cx, &l.buffers, &l.group_buffers, &buckets),
    });

    let shard_radices = l.shard_radices();
    let Lower { buffers, group_buffers, at, memory, slot_sizes, scratch, .. } = l;
    let mut offset = at;
    let mut slot_regions = Vec::new();
    for (c, &bytes) in slot_sizes.iter().enumerate() {
        slot_regions.push(SlotRegion { bytes, offset });
        offset += bytes * slots[c];
    }
    let memory = Memory { slots: offset - at, scratch, ..memory };
    let mut program = Program {
        rank: request.rank,
        coords,
        layout: layout.clone(),
        sequence: request.sequence,
        sequences: request.sequences,
        local_sequences,
        precision: request.precision,
        mode: request.mode,
        groups: groups.clone(),
        group_buffers,
        buckets,
        buffers,
        blocks,
        schedule,
        tail,
        eval,
        decode,
        io,
        slots,
        shard_radices,
        slot_regions,
        scratch_offset: offset,
        workspace_offset: offset + scratch,
        memory,
    };
    // Messages are stated once all buffers are there.
    let mut blocks = std::mem::take(&mut program.blocks);
    for op in blocks.iter_mut().flat_map(|b| &mut b.ops) {
        op.comm = comm::state(op, &program);
    }
    program.blocks = blocks;
    let floats = program
        .blocks
        .iter()
        .flat_map(|b| &b.ops)
        .map(|op| workspace(op, &program))
        .max()
        .unwrap_or_default();
    program.memory.workspace = aligned(4 * floats);
    program.memory.total = program.workspace_offset + program.memory.workspace;
    program
}

/// Bottom-up radices of the tree over the sequences that a weight gradient is summed over before ranks talk.
fn local_radices(request: &Request<'_>, local_sequences: usize) -> Vec<u32> {
    let tree = SumTree::new(request.sequences);
    let layout = request.layout;
    let covered = if layout.zero >= Zero::Gradients { layout.micro_batch } else { local_sequences };
    // Without a fixed order over ranks only the local order matters.
    tree.inner(covered).unwrap_or_else(|| SumTree::new(covered).radices().to_vec())
}

pub(crate) struct Lower<'a> {
    pub(crate) cx: &'a Context<'a>,
    pub(crate) request: &'a Request<'a>,
    pub(crate) coords: Coords,
    pub(crate) radices: Vec<u32>,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) group_buffers: Vec<GroupBuffers>,
    pub(crate) bucket_list: Vec<Bucket>,
    /// Bytes of static buffers so far.
    pub(crate) at: usize,
    pub(crate) memory: Memory,
    /// Chunks of the gradient norm over the whole model, known with the statics.
    pub(crate) norm_chunks: usize,
    /// One micro-batch in flight: activations share the scratch region.
    pub(crate) unified: bool,
    pub(crate) slot_sizes: Vec<usize>,
    pub(crate) scratch: usize,
}

impl Lower<'_> {
    pub(crate) fn buffer(
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

    pub(crate) fn train_blocks(
        &mut self,
        c: usize,
        chunk: &Chunk,
        io: &Io,
        split: bool,
        buckets: &[Bucket],
    ) -> Vec<(Pass, bool, Block)> {
        let mut f = forward(self.cx, chunk);
        let back = backward(self.cx, chunk, &mut f);
        let Forward { mut graph, .. } = f;
        let forward_nodes = std::mem::take(&mut graph.nodes);
        let (mut input, mut weight) = (back, Vec::new());
        if split {
            (weight, input) = input.into_iter().partition(|n| n.phase == Phase::Weight);
        }
        let passes = [(Pass::Forward, "f"), (Pass::Backward, "b"), (Pass::Weight, "w")];
        let lowered = self.place_chunk(c, &mut graph, vec![forward_nodes, input, weight], io, true);
        let mut out = Vec::new();
        let mut done: Vec<(usize, BufferId)> = Vec::new();
        for (i, ops) in lowered.iter().enumerate() {
            for op in ops {
                done.extend(op.grads.iter().map(|g| (i, g.sum)));
            }
        }
        for (i, ops) in lowered.into_iter().enumerate() {
            let (pass, letter) = passes[i];
            if pass == Pass::Weight && !split {
                continue;
            }
            let name = format!("{letter}{c}");
            if pass != Pass::Forward && self.cx.reduces() && self.cx.layout.zero < Zero::Gradients {
                let later = |b: BufferId| done.iter().any(|&(pass, buffer)| buffer == b && pass > i);
                let last = step::with_reductions(&ops, self.cx, buckets, &later);
                out.push((pass, true, Block { name: format!("{name}.last"), chunk: c, ops: last }));
            }
            out.push((pass, false, Block { name, chunk: c, ops }));
        }
        out
    }

    pub(crate) fn eval_block(&mut self, c: usize, chunk: &Chunk, io: &Io) -> Block {
        let mut f = forward(self.cx, chunk);
        let mut nodes = std::mem::take(&mut f.graph.nodes);
        if chunk.head {
            nodes.extend(loss(self.cx, &mut f.graph, f.output, false).0);
        }
        let mut lowered = self.place_chunk(c, &mut f.graph, vec![nodes], io, false);
        Block { name: format!("e{c}"), chunk: c, ops: lowered.remove(0) }
    }

    pub(crate) fn decode_block(&mut self, chunk: &Chunk, io: &Io) -> Block {
        let mut layout = self.cx.layout.clone();
        layout.sequence_parallel = false;
        let cx = Context { decode: true, layout: &layout, ..*self.cx };
        let mut f = forward(&cx, chunk);
        let mut nodes = std::mem::take(&mut f.graph.nodes);
        nodes.push(crate::derive::decode_logits(&cx, &mut f.graph, f.output));
        let mut lowered = self.place_chunk(0, &mut f.graph, vec![nodes], io, false);
        Block { name: "decode".into(), chunk: 0, ops: lowered.remove(0) }
    }

    /// Gives every value of a chunk a buffer, and turns nodes into ops.
    pub(crate) fn place_chunk(
        &mut self,
        c: usize,
        g: &mut Graph,
        passes: Vec<Vec<Node>>,
        io: &Io,
        slots: bool,
    ) -> Vec<Vec<Op>> {
        let mut passes = passes;
        let zero = self.cx.layout.zero;
        if zero >= Zero::Parameters {
            passes = passes.into_iter().map(|p| gather_params(g, p, self.cx)).collect();
        }
        let mut sums = Sums::default();
        if zero >= Zero::Gradients {
            self.scatter_grads(g, &mut passes, &mut sums);
        }
        let life = Lifetimes::of(g, &passes);
        let buffers = self.place_values(c, g, &life, io, slots);
        passes
            .iter()
            .map(|nodes| nodes.iter().filter_map(|n| self.op(g, n, &buffers, &sums)).collect())
            .collect()
    }

    pub(crate) fn grad_buffer(&self, group: GroupId, head: bool) -> BufferId {
        let b = &self.group_buffers[group.0 as usize];
        if head { b.head_grad.unwrap_or(b.grad) } else { b.grad }
    }

    /// The local tree cut at `leaves` sequences: (inside, outside), bottom-up.
    pub(crate) fn split_radices(&self, leaves: usize) -> (Vec<u32>, Vec<u32>) {
        let mut product = 1;
        let at = self.radices.iter().position(|&r| {
            let whole = product == leaves;
            product *= r as usize;
            whole
        });
        let at = at.unwrap_or(self.radices.len());
        (self.radices[..at].to_vec(), self.radices[at..].to_vec())
    }

    pub(crate) fn place_values(
        &mut self,
        c: usize,
        g: &Graph,
        life: &Lifetimes,
        io: &Io,
        slots: bool,
    ) -> Vec<Option<BufferId>> {
        let mut ids: Vec<Option<BufferId>> = vec![None; g.values.len()];
        let mut slot_spans = (Vec::new(), Vec::new());
        let mut scratch_spans = (Vec::new(), Vec::new());
        for (i, v) in g.values.iter().enumerate() {
            match v.source {
                Source::Param(group) => ids[i] = Some(self.group_buffers[group.0 as usize].param),
                Source::Tokens => ids[i] = Some(self.rows_of(io.tokens, v)),
                Source::Targets => ids[i] = Some(self.rows_of(io.targets, v)),
                Source::LossLeaves => ids[i] = Some(io.loss_leaves),
                Source::Node => {
                    let (Some((birth, death)), true) = (life.span[i], life.root[i] == i) else { continue };
                    let span = Span { bytes: v.rows * v.cols * v.dtype.bytes(), birth, death };
                    let saved = life.block(birth) != life.block(death);
                    let list =
                        if saved && slots && !self.unified { &mut slot_spans } else { &mut scratch_spans };
                    list.0.push(i);
                    list.1.push(span);
                }
            }
        }
        let (offsets, size) = place(&slot_spans.1);
        self.slot_sizes[c] = self.slot_sizes[c].max(size);
        for (k, &i) in slot_spans.0.iter().enumerate() {
            let alive = (slot_spans.1[k].birth, slot_spans.1[k].death);
            let v = &g.values[i];
            let home = Home::Slot { chunk: c, offset: offsets[k], alive };
            ids[i] = Some(self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home, v.place));
        }
        let (offsets, size) = place(&scratch_spans.1);
        self.scratch = self.scratch.max(size);
        self.memory.scratch_bound = self.memory.scratch_bound.max(alive_peak(&scratch_spans.1));
        for (k, &i) in scratch_spans.0.iter().enumerate() {
            let alive = (scratch_spans.1[k].birth, scratch_spans.1[k].death);
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
    pub(crate) fn rows_of(&mut self, whole: BufferId, v: &crate::graph::Value) -> BufferId {
        let Home::Static { offset } = self.buffers[whole.0 as usize].home else {
            unreachable!("inputs are static")
        };
        self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, Home::MicroBatch { offset }, v.place)
    }

    pub(crate) fn op(&self, g: &Graph, n: &Node, buffers: &[Option<BufferId>], sums: &Sums) -> Option<Op> {
        if matches!(n.kind, OpKind::Fork { .. }) {
            return None;
        }
        let view = |o: &Operand| View {
            buffer: buffers[o.value.0 as usize]
                .unwrap_or_else(|| panic!("{} of {} has no bytes", g.get(o.value).name, n.name)),
            row0: o.row0,
            rows: o.rows,
        };
        let grads = n.grads.iter().map(|&group| self.grad_out(n, group, buffers, sums)).collect();
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

    pub(crate) fn grad_out(
        &self,
        n: &Node,
        group: GroupId,
        buffers: &[Option<BufferId>],
        sums: &Sums,
    ) -> GradOut {
        let of = &self.cx.groups[group.0 as usize];
        let b = &self.group_buffers[group.0 as usize];
        let (inner, outer) = self.split_radices(n.sequences.count);
        let m = self.cx.layout.micro_batch;
        // Rows that are not whole sequences (sequence parallelism, tokens in the order of their experts) have no tree
        // inside.
        let rows = n.ins.iter().map(|o| o.rows).min().unwrap_or(0);
        let parts = self.cx.layout.sequence_parallel || of.key.role == Role::Router;
        let whole = of.replication == Replication::Data
            && (rows == n.sequences.count * self.cx.sequence || self.cx.layout.tp == 1 || !parts);
        let sum = self.grad_buffer(group, is_head(n));
        let levels = match sums.whole.get(&sum) {
            Some(v) => buffers[v.0 as usize].expect("gradients of a micro-batch are placed"),
            None if is_head(n) => b.head_grad_levels.unwrap_or(b.grad_levels),
            None => b.grad_levels,
        };
        let levels = View { buffer: levels, row0: 0, rows: self.levels_of(n.sequences.count) * of.rows };
        let inner = if whole { inner } else { Vec::new() };
        let (results, result) = (m / n.sequences.count, n.sequences.first / n.sequences.count);
        GradOut { group, sum, levels, inner, outer, results, result }
    }
}
