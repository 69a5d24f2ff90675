use std::collections::{HashMap, HashSet};

use spec::{DType, Position, SumTree, Zero};

use crate::cost::cost;
use crate::derive::{backward, loss};
use crate::emit::{Context, Forward, forward};
use crate::graph::{Graph, Node, Operand, Phase, Source, ValueId};
use crate::op::{Axis, OpKind};
use crate::params::{Chunk, GroupId, chunks, table};
use crate::pipeline::{Pass, in_flight, orders};
use crate::place::{Span, aligned, alive_peak, place};
use crate::{
    Block, Bucket, Buffer, BufferId, Coords, GradOut, GroupBuffers, Home, Io, Item, Memory, NORM_CHUNK, Op,
    OpId, Program, Request, View, WorkspaceLen, step,
};

/// Gradients are reduced in runs of about this many bytes: large enough for full bandwidth, small enough to begin
/// while most of the backward pass is still ahead.
const BUCKET_BYTES: usize = 8 << 20;

/// Turns chunks into blocks over placed buffers.
pub(crate) fn lower(request: &Request<'_>, workspace: WorkspaceLen<'_>) -> Program {
    let model = request.model;
    // One data-parallel rank has nobody to shard with.
    let zero = if request.layout.dp > 1 { request.layout.zero } else { Zero::Off };
    let layout = &spec::Layout { zero, ..request.layout.clone() };
    let request = &Request { layout, ..*request };
    let coords = Coords::of(request.rank, layout);
    let stage = chunks(model, layout, coords.pp);
    let groups = table(model, layout.tp, coords.tp, &stage);
    let pipeline = coords.peers(Axis::Pp, layout);
    let cx = Context {
        model,
        layout,
        sequence: request.sequence,
        dtype: request.precision,
        tp_rank: coords.tp,
        groups: &groups,
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
    let inference = request.cache > 0;
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
    let step = blocks.len();
    blocks.push(Block {
        name: "step".into(),
        chunk: 0,
        ops: step::ops(&cx, &l.buffers, &l.group_buffers, &buckets),
    });

    let across = l.across();
    let Lower { buffers, group_buffers, at, memory, slot_sizes, scratch, .. } = l;
    let mut offset = at;
    let mut slot_bytes = Vec::new();
    for (c, size) in slot_sizes.iter().enumerate() {
        slot_bytes.push((*size, offset));
        offset += size * slots[c];
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
        cache: request.cache,
        groups: groups.clone(),
        group_buffers,
        buckets,
        buffers,
        blocks,
        schedule,
        step,
        eval,
        decode,
        io,
        slots,
        across,
        slot_bytes,
        scratch_offset: offset,
        workspace_offset: offset + scratch,
        memory,
    };
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

struct Lower<'a> {
    cx: &'a Context<'a>,
    request: &'a Request<'a>,
    coords: Coords,
    radices: Vec<u32>,
    buffers: Vec<Buffer>,
    group_buffers: Vec<GroupBuffers>,
    bucket_list: Vec<Bucket>,
    /// Bytes of static buffers so far.
    at: usize,
    memory: Memory,
    /// One micro-batch in flight: activations share the scratch region.
    unified: bool,
    slot_sizes: Vec<usize>,
    scratch: usize,
}

impl Lower<'_> {
    fn buffer(&mut self, name: String, rows: usize, cols: usize, dtype: DType, home: Home) -> BufferId {
        self.buffers.push(Buffer { name, rows, cols, dtype, home });
        BufferId(u32::try_from(self.buffers.len() - 1).expect("fewer than 2^32 buffers"))
    }

    fn fixed(&mut self, name: String, rows: usize, cols: usize, dtype: DType) -> BufferId {
        let home = Home::Static { offset: self.at };
        self.at += aligned(rows * cols * dtype.bytes());
        self.buffer(name, rows, cols, dtype, home)
    }

    /// Parameters, masters, gradients and moments, each region in forward order.
    fn statics(&mut self, stage: &[Chunk]) {
        let groups = self.cx.groups;
        let layout = self.cx.layout;
        let owned: Vec<(usize, usize)> = groups
            .iter()
            .map(|g| {
                if layout.zero >= Zero::Optimizer {
                    owned(g.len(), layout.dp, self.coords.dp)
                } else {
                    (0, g.len())
                }
            })
            .collect();
        let whole =
            table(self.cx.model, layout.tp, self.coords.tp, &chunks(self.cx.model, &Default::default(), 0));
        let mut chunk0 = HashMap::new();
        let mut at = 0;
        for g in &whole {
            chunk0.insert(g.name.as_str(), at);
            at += g.len().div_ceil(NORM_CHUNK);
        }
        let holds_embedding = stage.iter().any(|c| c.embed);
        let region = |l: &mut Self, prefix: &str, dtype: DType, owned_only: bool| -> Vec<BufferId> {
            let training = l.request.cache == 0;
            (0..groups.len())
                .map(|i| {
                    let (rows, cols) = if !training && !prefix.is_empty() {
                        (0, groups[i].cols)
                    } else if owned_only && owned[i].1 != groups[i].len() {
                        (1, owned[i].1)
                    } else {
                        (groups[i].rows, groups[i].cols)
                    };
                    l.fixed(format!("{prefix}{}", groups[i].name), rows, cols, dtype)
                })
                .collect()
        };
        let params = region(self, "", self.cx.dtype, layout.zero >= Zero::Parameters);
        self.memory.params = self.at;
        let masters = (self.cx.dtype != DType::F32 && self.request.cache == 0)
            .then(|| region(self, "master.", DType::F32, true));
        self.memory.master = self.at - self.memory.params;
        let before = self.at;
        let grads: Vec<(BufferId, BufferId)> =
            (0..groups.len()).map(|i| self.grad_levels(i, owned[i].1, holds_embedding, false)).collect();
        let head_grads: Vec<Option<(BufferId, BufferId)>> = (0..groups.len())
            .map(|i| {
                let tied_here = self.cx.model.tied_embeddings && groups[i].name == "embed.weight";
                (tied_here && holds_embedding && stage.iter().any(|c| c.head))
                    .then(|| self.grad_levels(i, owned[i].1, holds_embedding, true))
            })
            .collect();
        self.memory.grads = self.at - before;
        let before = self.at;
        let exp_avg = region(self, "exp_avg.", DType::F32, true);
        let exp_avg_sq = region(self, "exp_avg_sq.", DType::F32, true);
        self.memory.moments = self.at - before;
        for (i, g) in groups.iter().enumerate() {
            let copy_of_tied = g.name == "embed.weight" && !holds_embedding;
            self.group_buffers.push(GroupBuffers {
                param: params[i],
                master: masters.as_ref().map(|m| m[i]),
                grad_levels: grads[i].0,
                grad: grads[i].1,
                head_grad_levels: head_grads[i].map(|h| h.0),
                head_grad: head_grads[i].map(|h| h.1),
                exp_avg: exp_avg[i],
                exp_avg_sq: exp_avg_sq[i],
                owned: owned[i],
                norm_chunk0: chunk0[g.name.as_str()],
                counts: !copy_of_tied && (!g.replicated_tp || self.coords.tp == 0),
            });
        }
    }

    /// The gradient sums of a group: all levels, and the last one, which holds the sum in the end.
    fn grad_levels(
        &mut self,
        i: usize,
        owned: usize,
        holds_embedding: bool,
        head: bool,
    ) -> (BufferId, BufferId) {
        let g = &self.cx.groups[i];
        let from_head = head || g.name == "head.weight" || g.name == "embed.weight" && !holds_embedding;
        let (levels, rows, cols) = if self.request.cache > 0 {
            (1, 0, g.cols)
        } else if self.cx.layout.zero >= Zero::Gradients {
            (self.across().len().max(1), 1, owned)
        } else {
            (self.levels_of(if from_head { 1 } else { self.cx.layout.micro_batch }), g.rows, g.cols)
        };
        let prefix = if head { "grad.head." } else { "grad." };
        let all = self.fixed(format!("{prefix}{}.levels", g.name), levels * rows, cols, DType::F32);
        let Home::Static { offset } = self.buffers[all.0 as usize].home else { unreachable!("just made") };
        let home = Home::Static { offset: offset + 4 * (levels - 1) * rows * cols };
        (all, self.buffer(format!("{prefix}{}", g.name), rows, cols, DType::F32, home))
    }

    /// Partial sums kept for a gradient whose ops cover `leaves` sequences each.
    fn levels_of(&self, leaves: usize) -> usize {
        self.split_radices(leaves).1.len().max(1)
    }

    /// Radices of the counter over this rank's micro-batches, bottom-up.
    fn across(&self) -> Vec<u32> {
        let (m, dp) = (self.cx.layout.micro_batch, self.cx.layout.dp);
        if self.cx.layout.zero < Zero::Gradients {
            return self.split_radices(m).1;
        }
        let all = SumTree::new(self.request.sequences);
        let below = all.inner(m * dp).map_or(usize::MAX, |r| r.len());
        all.radices()
            .get(below..)
            .map_or_else(|| SumTree::new(self.request.sequences / dp / m).radices().to_vec(), <[u32]>::to_vec)
    }

    fn io(&mut self, local_sequences: usize) -> Io {
        let before = self.at;
        let (model, sequence) = (self.cx.model, self.cx.sequence);
        let n = if self.request.cache > 0 { 1 } else { local_sequences * sequence };
        let whole = table(model, self.cx.layout.tp, self.coords.tp, &chunks(model, &Default::default(), 0));
        let norm_chunks: usize = whole.iter().map(|g| g.len().div_ceil(NORM_CHUNK)).sum();
        let positions = sequence.max(self.request.cache);
        let half = if matches!(model.position, Position::Rope(_)) { model.head_dim / 2 } else { 0 };
        let kv = self.cx.heads().kv * model.head_dim;
        let cache = self.request.cache * model.layers;
        let dtype = self.cx.dtype;
        let mut io = Io {
            tokens: self.fixed("tokens".into(), n, 1, DType::U32),
            targets: self.fixed("targets".into(), n, 1, DType::U32),
            loss_leaves: self.fixed("loss_leaves".into(), local_sequences, 1, DType::F64),
            norm_chunks: self.fixed(
                "norm_chunks".into(),
                norm_chunks + self.request.sequences,
                1,
                DType::F64,
            ),
            cos: self.fixed("rope.cos".into(), positions, half, DType::F32),
            sin: self.fixed("rope.sin".into(), positions, half, DType::F32),
            k_cache: None,
            v_cache: None,
        };
        if cache > 0 {
            io.k_cache = Some(self.fixed("cache.k".into(), cache, kv, dtype));
            io.v_cache = Some(self.fixed("cache.v".into(), cache, kv, dtype));
        }
        self.memory.other = self.at - before;
        io
    }

    /// Gradient buffers in the order in which backward completes them, cut into runs.
    fn buckets(&self, stage: &[Chunk]) -> Vec<Bucket> {
        let mut list: Vec<(usize, GroupId, BufferId)> = Vec::new();
        for (i, b) in self.group_buffers.iter().enumerate().rev() {
            let id = GroupId(u32::try_from(i).expect("few groups"));
            if let Some(head) = b.head_grad {
                list.insert(0, (stage.len() - 1, id, head));
            }
            list.push((self.cx.groups[i].chunk, id, b.grad));
        }
        // Backward runs through the last chunk first.
        list.sort_by_key(|(chunk, _, _)| std::cmp::Reverse(*chunk));
        let mut buckets: Vec<(usize, Bucket)> = Vec::new();
        for (chunk, group, buffer) in list {
            let bytes = 4 * self.cx.groups[group.0 as usize].len();
            match buckets.last_mut() {
                Some((c, b)) if *c == chunk && b.bytes < BUCKET_BYTES => {
                    b.grads.push((group, buffer));
                    b.bytes += bytes;
                }
                _ => buckets.push((chunk, Bucket { grads: vec![(group, buffer)], bytes })),
            }
        }
        buckets.into_iter().map(|(_, b)| b).collect()
    }

    fn train_blocks(
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
            if pass != Pass::Forward && self.cx.layout.dp > 1 && self.cx.layout.zero < Zero::Gradients {
                let later = |b: BufferId| done.iter().any(|&(pass, buffer)| buffer == b && pass > i);
                let last = step::with_reductions(&ops, self.cx, buckets, &later);
                out.push((pass, true, Block { name: format!("{name}.last"), chunk: c, ops: last }));
            }
            out.push((pass, false, Block { name, chunk: c, ops }));
        }
        out
    }

    fn eval_block(&mut self, c: usize, chunk: &Chunk, io: &Io) -> Block {
        let mut f = forward(self.cx, chunk);
        let mut nodes = std::mem::take(&mut f.graph.nodes);
        if chunk.head {
            nodes.extend(loss(self.cx, &mut f.graph, f.output, false).0);
        }
        let mut lowered = self.place_chunk(c, &mut f.graph, vec![nodes], io, false);
        Block { name: format!("e{c}"), chunk: c, ops: lowered.remove(0) }
    }

    fn decode_block(&mut self, chunk: &Chunk, io: &Io) -> Block {
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
    fn place_chunk(
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

    /// Gradients of one micro-batch become values, reduced and scattered as soon as their bucket is complete.
    fn scatter_grads(&self, g: &mut Graph, passes: &mut [Vec<Node>], sums: &mut Sums) {
        for n in passes.iter_mut().flatten() {
            for &group in &n.grads {
                let of = &self.cx.groups[group.0 as usize];
                let buffer = self.grad_buffer(group, is_head(n));
                let levels = self.levels_of(n.leaves.1);
                let v = *sums.whole.entry(buffer).or_insert_with(|| {
                    let name = format!("{}.micro_batch", of.name);
                    g.value(&name, levels * of.rows, of.cols, DType::F32, Source::Node)
                });
                sums.hidden.insert(v);
                n.outs.push(g.all(v));
            }
        }
        for (bucket, b) in self.bucket_list.iter().enumerate() {
            let values: Vec<ValueId> =
                b.grads.iter().filter_map(|(_, id)| sums.whole.get(id).copied()).collect();
            let uses = |n: &Node| n.outs.iter().any(|o| values.contains(&o.value));
            let Some(pass) = passes.iter().rposition(|p| p.iter().any(uses)) else { continue };
            let at = passes[pass].iter().rposition(uses).map_or(0, |i| i + 1);
            let unit = passes[pass][at - 1].unit;
            let ins: Vec<Operand> = values.iter().map(|v| g.all(*v)).collect();
            let node = |kind: OpKind, name: &str| Node {
                kind,
                name: format!("grads.bucket{bucket}.{name}"),
                ins: ins.clone(),
                acc: None,
                outs: Vec::new(),
                grads: Vec::new(),
                leaves: (0, 0),
                phase: Phase::Weight,
                unit,
            };
            let nodes = [
                node(OpKind::ReduceGrads { bucket, scatter: true }, "reduce"),
                node(OpKind::ShardGrads { bucket }, "shard"),
            ];
            passes[pass].splice(at..at, nodes);
        }
    }

    fn grad_buffer(&self, group: GroupId, head: bool) -> BufferId {
        let b = &self.group_buffers[group.0 as usize];
        if head { b.head_grad.unwrap_or(b.grad) } else { b.grad }
    }

    /// The local tree cut at `leaves` sequences: (inside, outside), bottom-up.
    fn split_radices(&self, leaves: usize) -> (Vec<u32>, Vec<u32>) {
        let mut product = 1;
        let at = self.radices.iter().position(|&r| {
            let whole = product == leaves;
            product *= r as usize;
            whole
        });
        let at = at.unwrap_or(self.radices.len());
        (self.radices[..at].to_vec(), self.radices[at..].to_vec())
    }

    fn place_values(
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
            ids[i] = Some(self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home));
        }
        let (offsets, size) = place(&scratch_spans.1);
        self.scratch = self.scratch.max(size);
        self.memory.scratch_bound = self.memory.scratch_bound.max(alive_peak(&scratch_spans.1));
        for (k, &i) in scratch_spans.0.iter().enumerate() {
            let alive = (scratch_spans.1[k].birth, scratch_spans.1[k].death);
            let v = &g.values[i];
            let home = Home::Scratch { offset: offsets[k], alive };
            ids[i] = Some(self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home));
        }
        for i in 0..ids.len() {
            // An alias has its root's bytes under its own name and shape.
            if ids[i].is_none() && life.root[i] != i {
                let home = ids[life.root[i]].map(|r| self.buffers[r.0 as usize].home);
                let v = &g.values[i];
                ids[i] = home.map(|home| self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, home));
            }
        }
        ids
    }

    /// The micro-batch's rows of a whole step's input.
    fn rows_of(&mut self, whole: BufferId, v: &crate::graph::Value) -> BufferId {
        let Home::Static { offset } = self.buffers[whole.0 as usize].home else {
            unreachable!("inputs are static")
        };
        self.buffer(v.name.clone(), v.rows, v.cols, v.dtype, Home::MicroBatch { offset })
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
            leaf: n.leaves.0,
            phase: n.phase,
            cost: cost(g, n, self.cx.sequence, grad_elements),
        })
    }

    fn grad_out(&self, n: &Node, group: GroupId, buffers: &[Option<BufferId>], sums: &Sums) -> GradOut {
        let of = &self.cx.groups[group.0 as usize];
        let b = &self.group_buffers[group.0 as usize];
        let (inner, outer) = self.split_radices(n.leaves.1);
        let m = self.cx.layout.micro_batch;
        // Rows that are not whole sequences (sequence parallelism) have no tree inside.
        let rows = n.ins.iter().map(|o| o.rows).min().unwrap_or(0);
        let whole = rows == n.leaves.1 * self.cx.sequence || !self.cx.layout.sequence_parallel;
        let sum = self.grad_buffer(group, is_head(n));
        let levels = match sums.whole.get(&sum) {
            Some(v) => buffers[v.0 as usize].expect("gradients of a micro-batch are placed"),
            None if is_head(n) => b.head_grad_levels.unwrap_or(b.grad_levels),
            None => b.grad_levels,
        };
        let levels = View { buffer: levels, row0: 0, rows: self.levels_of(n.leaves.1) * of.rows };
        let inner = if whole { inner } else { Vec::new() };
        GradOut { group, sum, levels, inner, outer, turn: (m / n.leaves.1, n.leaves.0 / n.leaves.1) }
    }
}

/// Gradient buffers that are values of a block.
#[derive(Default)]
struct Sums {
    /// Gradients of one micro-batch, by the static buffer that they end in (ZeRO 2 and 3).
    whole: HashMap<BufferId, ValueId>,
    /// The same: written by weight-gradient ops besides their outputs.
    hidden: HashSet<ValueId>,
}

/// Whether a weight gradient is the output projection's.
fn is_head(n: &Node) -> bool {
    n.name.starts_with("head.")
}

/// Gathers the parameters of a unit (a layer, the embedding, the head) one unit before their first use in a pass.
fn gather_params(g: &mut Graph, nodes: Vec<Node>, cx: &Context<'_>) -> Vec<Node> {
    let mut fresh: HashMap<GroupId, ValueId> = HashMap::new();
    let mut units: Vec<(usize, Vec<GroupId>)> = Vec::new();
    let mut first_use: Vec<usize> = Vec::new();
    let mut nodes = nodes;
    for (at, n) in nodes.iter_mut().enumerate() {
        for o in &mut n.ins {
            let Source::Param(id) = g.get(o.value).source else { continue };
            let group = &cx.groups[id.0 as usize];
            let v = *fresh.entry(id).or_insert_with(|| {
                match units.iter_mut().find(|(u, _)| *u == group.unit) {
                    Some((_, ids)) => ids.push(id),
                    None => {
                        units.push((group.unit, vec![id]));
                        first_use.push(at);
                    }
                }
                g.value(&format!("{}.gathered", group.name), group.rows, group.cols, cx.dtype, Source::Node)
            });
            o.value = v;
        }
    }
    let comm = |g: &Graph, kind: OpKind, name: &str, ids: &[GroupId], at: &Node| Node {
        kind,
        name: format!("{name}.{}", phase_letter(at)),
        ins: Vec::new(),
        acc: None,
        outs: ids.iter().map(|id| g.all(fresh[id])).collect(),
        grads: Vec::new(),
        leaves: (0, 0),
        phase: at.phase,
        unit: at.unit,
    };
    let mut out = Vec::new();
    for (at, n) in nodes.into_iter().enumerate() {
        for (i, (unit, ids)) in units.iter().enumerate() {
            if at == first_use[i.saturating_sub(1)] {
                let gather = OpKind::GatherParams { unit: *unit, groups: ids.clone() };
                out.push(comm(g, gather, &format!("gather.{unit}"), ids, &n));
            }
        }
        for (i, (unit, ids)) in units.iter().enumerate() {
            if at == first_use[i] {
                out.push(comm(
                    g,
                    OpKind::WaitParams { unit: *unit },
                    &format!("gather.{unit}.wait"),
                    ids,
                    &n,
                ));
            }
        }
        out.push(n);
    }
    out
}

fn phase_letter(n: &Node) -> char {
    match n.phase {
        Phase::Forward => 'f',
        Phase::Input => 'b',
        Phase::Weight => 'w',
    }
}

/// The run of elements of a group that data-parallel rank `index` updates: whole norm chunks, as even as possible.
pub fn owned(len: usize, dp: usize, index: usize) -> (usize, usize) {
    let chunks = len.div_ceil(NORM_CHUNK);
    let at = |i: usize| (chunks * i / dp * NORM_CHUNK).min(len);
    (at(index), at(index + 1) - at(index))
}

/// From which op to which each value is needed, and which values share bytes.
struct Lifetimes {
    root: Vec<usize>,
    span: Vec<Option<(usize, usize)>>,
    /// First op of each pass, and one past the last.
    starts: Vec<usize>,
}

impl Lifetimes {
    fn of(g: &Graph, passes: &[Vec<Node>]) -> Lifetimes {
        let mut starts = vec![0];
        for p in passes {
            starts.push(starts[starts.len() - 1] + p.len());
        }
        let nodes: Vec<&Node> = passes.iter().flatten().collect();
        let mut last = vec![0; g.values.len()];
        for (at, n) in nodes.iter().enumerate() {
            for o in n.ins.iter().chain(&n.acc) {
                last[o.value.0 as usize] = at;
            }
        }
        let mut root: Vec<usize> = (0..g.values.len()).collect();
        let mut span: Vec<Option<(usize, usize)>> = vec![None; g.values.len()];
        for (at, n) in nodes.iter().enumerate() {
            if let Some(out) = n.outs.first() {
                let from = if n.kind.in_place() || matches!(n.kind, OpKind::Fork { .. }) {
                    n.ins.first()
                } else {
                    n.acc.as_ref().filter(|a| last[a.value.0 as usize] == at)
                };
                if let Some(from) = from
                    && g.get(from.value).source == Source::Node
                {
                    root[out.value.0 as usize] = root[from.value.0 as usize];
                }
            }
            for o in n.ins.iter().chain(&n.acc).chain(&n.outs) {
                let r = root[o.value.0 as usize];
                span[r] = Some(span[r].map_or((at, at), |(birth, _)| (birth, at)));
            }
        }
        Lifetimes { root, span, starts }
    }

    fn block(&self, at: usize) -> usize {
        self.starts.iter().rposition(|&s| s <= at).unwrap_or(0)
    }
}
