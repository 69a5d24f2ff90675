use kernels::{Acc, Gelu, Merge, Pool, Storage};
use program::{BufferId, GradOut, GroupId, Home, Op, OpKind, Program, Request, Slice, View};
use spec::{DType, Error, NormKind, Result};

use crate::arena::Arena;
use crate::mesh::Mesh;
use crate::spans::Spans;
use crate::workspace::workspace_len;

/// Runs a rank's program on real buffers.
pub struct Executor {
    /// What to run.
    pub program: Program,
    pub(crate) arena: Arena,
    pub(crate) pool: Pool,
    pub(crate) mesh: Mesh,
    /// Start and end of every op of a step, when recorded.
    pub spans: Spans,
    /// Time in which this step waited for other ranks.
    pub(crate) comm_ns: u64,
    /// `sequence`, or the cache's length: the stretch of the rotary tables.
    pub(crate) tables: usize,
}

/// What changes from step to step, besides the batch.
#[derive(Clone, Copy, Debug)]
pub struct StepInputs {
    /// Number of valid targets in the global batch.
    pub valid_tokens: u64,
    /// Learning rate.
    pub lr: f64,
    /// 1 for the first step.
    pub step: u64,
    /// AdamW.
    pub beta1: f64,
    /// AdamW.
    pub beta2: f64,
    /// AdamW.
    pub eps: f64,
    /// Decoupled decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient, if bounded.
    pub clip: Option<f64>,
    /// This rank was asked to stop after the step.
    pub stop: bool,
}

/// What a step yields.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutputs {
    /// Mean loss over valid tokens of the global batch.
    pub loss: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Some rank was asked to stop: all do after this step.
    pub stop: bool,
}

impl Executor {
    /// Seconds of the last step in which this rank did nothing but wait for others.
    pub fn exposed_comm_s(&self) -> f64 {
        self.comm_ns as f64 / 1e9
    }
}

/// The micro-batch that a block runs on.
#[derive(Clone, Copy, Default)]
pub(crate) struct Turn {
    pub(crate) micro_batch: usize,
    /// Position in the cache, for the generation block.
    pub(crate) position: usize,
    /// Scale of the loss gradient.
    pub(crate) scale: f32,
    /// Block and op that run.
    pub(crate) at: (usize, usize),
}

impl Executor {
    /// Compiles a rank's program and maps its memory. Weights are zero until they are set.
    ///
    /// # Errors
    /// If the model or the layout does not train yet or they do not fit each other and the batch, or there is no memory
    /// for it.
    pub fn new(request: &Request<'_>, threads: usize, mesh: Mesh, record: bool) -> Result<Executor> {
        request.model.check_trains()?;
        request.layout.check_trains()?;
        let program = Program::build(request, &|op, p| workspace_len(op, p, threads))?;
        let arena = match mesh.shared(program.memory.total)? {
            Some(shared) => Arena::shared(shared),
            None => Arena::new(program.memory.total)?,
        };
        // What goes on beside others leaves a span for each of its messages.
        let spans_of = |op: &Op| op.comm.as_ref().map_or(1, |c| c.messages.len().max(1));
        let spans = |b: usize| program.blocks[b].ops.iter().map(spans_of).sum::<usize>();
        let room = program.schedule.iter().map(|i| spans(i.block)).sum::<usize>() + spans(program.tail);
        let tables = program.sequence.max(program.mode.positions());
        let spans = Spans::new(room, record);
        Ok(Executor { program, arena, pool: Pool::new(threads), mesh, spans, tables, comm_ns: 0 })
    }

    /// Bytes that the executor holds for the step: what the program placed.
    pub fn allocated_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Everybody's bytes, on every rank, in rank order.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn exchange(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.mesh.exchange(mine)
    }

    /// The best rate of this machine's matrix products with this rank's threads, in GFLOP/s; takes a moment.
    pub fn peak_gflops(&self) -> f64 {
        kernels::gemm_peak_gflops(&self.pool)
    }

    /// Token ids of this rank's sequences in one step, `[local_sequences, sequence]`, to be filled in.
    pub fn tokens(&mut self) -> &mut [u32] {
        self.whole(self.program.io.tokens)
    }

    /// Targets, likewise; `u32::MAX` where none is wanted.
    pub fn targets(&mut self) -> &mut [u32] {
        self.whole(self.program.io.targets)
    }

    /// The sum of the losses of all valid tokens of the global batch, without gradients.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn evaluate(&mut self) -> Result<f64> {
        for micro_batch in 0..self.program.micro_batches() {
            for chunk in 0..self.program.eval.len() {
                self.block(self.program.eval[chunk], Turn { micro_batch, ..Turn::default() })?;
            }
        }
        self.loss_sum()
    }

    /// Runs all micro-batches and the tail of a step, or stops before the update if loss or norm is not finite.
    ///
    /// # Errors
    /// If a peer is lost, or the loss or the gradient norm is NaN or infinite (parameters are then as before the step).
    pub fn step(&mut self, inputs: &StepInputs) -> Result<StepOutputs> {
        self.spans.begin();
        self.comm_ns = 0;
        let scale = (1.0 / inputs.valid_tokens.max(1) as f64) as f32;
        for i in 0..self.program.schedule.len() {
            let item = self.program.schedule[i];
            self.block(
                item.block,
                Turn { micro_batch: item.micro_batch, position: 0, scale, ..Turn::default() },
            )?;
        }
        self.finish(inputs)
    }

    /// Runs one block.
    pub(crate) fn block(&mut self, block: usize, turn: Turn) -> Result<()> {
        for i in 0..self.program.blocks[block].ops.len() {
            let start = self.spans.now();
            let op = &self.program.blocks[block].ops[i];
            let turn = Turn { at: (block, i), ..turn };
            match self.program.precision {
                DType::Bf16 => self.run::<half::bf16>(op, turn)?,
                _ => self.run::<f32>(op, turn)?,
            }
            self.ran(block, i, turn.micro_batch, start);
        }
        Ok(())
    }

    /// Notes that an op ended now, and what went on beside it and is over.
    pub(crate) fn ran(&mut self, block: usize, i: usize, micro_batch: usize, start_ns: u64) {
        let op = &self.program.blocks[block].ops[i];
        let end =
            if op.goes_on() { self.spans.now() } else { self.spans.push(block, i, micro_batch, start_ns) };
        if op.only_talks() {
            self.comm_ns += end - start_ns;
        }
        for f in self.mesh.finished.borrow_mut().drain(..) {
            self.spans.push_between(f.at.0, f.at.1, micro_batch, f.began, f.ended);
        }
    }

    /// First byte of a slice for a turn.
    pub(crate) fn offset(&self, slice: Slice, turn: Turn) -> usize {
        let p = &self.program;
        let b = p.buffer(slice.buffer);
        let base = match b.home {
            Home::Static { offset } => offset,
            Home::Slot { chunk, offset, .. } => {
                let region = p.slot_regions[chunk];
                region.offset + turn.micro_batch % p.slots[chunk] * region.bytes + offset
            }
            Home::Scratch { offset, .. } => p.scratch_offset + offset,
            Home::MicroBatch { offset } => offset + turn.micro_batch * b.bytes(),
        };
        base + slice.first * b.dtype.bytes()
    }

    /// The elements of a view.
    ///
    /// Sound as long as an op's operands do not overlap unless the op is in place, which placement guarantees: values
    /// alive at the same op never share bytes.
    #[expect(clippy::mut_from_ref, reason = "disjointness comes from the program's placement")]
    pub(crate) fn at<T: bytemuck::Pod>(&self, view: View, turn: Turn) -> &mut [T] {
        let b = self.program.buffer(view.buffer);
        debug_assert_eq!(b.dtype.bytes(), size_of::<T>(), "{}", b.name);
        // SAFETY: see above; the executor runs one op at a time.
        unsafe { self.arena.slice(self.offset(self.program.slice(view), turn), view.rows * b.cols) }
    }

    pub(crate) fn whole<T: bytemuck::Pod>(&self, id: BufferId) -> &mut [T] {
        let rows = self.program.buffer(id).rows;
        self.at(View { buffer: id, row0: 0, rows }, Turn::default())
    }

    fn first(&self, view: View, turn: Turn) -> usize {
        self.offset(self.program.slice(view), turn)
    }

    fn cols(&self, view: View) -> usize {
        self.program.buffer(view.buffer).cols
    }

    /// What an accumulating op adds to, and whether that lies in the output's own bytes.
    fn acc<T: bytemuck::Pod>(&self, op: &Op, turn: Turn) -> Acc<'_, T> {
        match op.acc {
            None => Acc::None,
            Some(acc) if self.first(acc, turn) == self.first(op.outs[0], turn) => Acc::InPlace,
            Some(acc) => Acc::From(self.at(acc, turn)),
        }
    }

    #[expect(clippy::mut_from_ref, reason = "one op runs at a time")]
    pub(crate) fn workspace(&self) -> &mut [f32] {
        // SAFETY: the work space belongs to the one op that runs.
        unsafe { self.arena.slice(self.program.workspace_offset, self.program.memory.workspace / 4) }
    }

    /// The levels of a gradient, and where the op's result goes among them.
    fn levels(&self, g: &GradOut, turn: Turn) -> (&mut [f32], Merge) {
        let count: usize = g.outer.iter().map(|&r| r as usize).product();
        let index = (turn.micro_batch * g.results + g.result) % count.max(1);
        let (merge, store) = spec::merge_at(&g.outer, index);
        (self.at(g.levels, turn), Merge { merge, store })
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each op kind: a table")]
    pub(crate) fn run<T: Storage + bytemuck::Pod>(&self, op: &Op, turn: Turn) -> Result<()> {
        use OpKind::*;
        let pool = &self.pool;
        let p = &self.program;
        let seq = p.sequence;
        let ins = |i: usize| self.at::<T>(op.ins[i], turn);
        let floats = |i: usize| self.at::<f32>(op.ins[i], turn);
        let opt = |i: usize| op.ins.get(i).map(|v| &*self.at::<T>(*v, turn));
        let out = |i: usize| self.at::<T>(op.outs[i], turn);
        let out_floats = |i: usize| self.at::<f32>(op.outs[i], turn);
        let rows = |i: usize| op.ins[i].rows;
        let cols = |i: usize| self.cols(op.ins[i]);
        let ws = self.workspace();
        match &op.kind {
            Embed { vocab0, positions } => {
                let dim = self.cols(op.outs[0]);
                let pos = opt(2)
                    .filter(|_| *positions)
                    .map(|p| if turn.position > 0 { &p[turn.position * dim..] } else { p });
                kernels::embed(pool, self.at::<u32>(op.ins[0], turn), ins(1), *vocab0, pos, seq, out(0), dim);
            }
            EmbedGrad { vocab0 } => {
                let (levels, merge) = self.levels(&op.grads[0], turn);
                let of = p.group(op.grads[0].group);
                let tokens = self.at::<u32>(op.ins[0], turn);
                kernels::embed_grad(
                    pool,
                    tokens,
                    *vocab0,
                    of.rows,
                    ins(1),
                    levels,
                    of.cols,
                    &op.grads[0].inner,
                    merge,
                    ws,
                );
            }
            PosGrad => {
                let (levels, merge) = self.levels(&op.grads[0], turn);
                let of = p.group(op.grads[0].group);
                kernels::pos_grad(pool, ins(0), levels, of.rows, seq, of.cols, &op.grads[0].inner, merge, ws);
            }
            Norm { norm, eps } => {
                let (n, dim) = (rows(0), cols(0));
                match norm {
                    NormKind::Rms => {
                        kernels::rms_norm(pool, ins(0), ins(1), out(0), out_floats(1), n, dim, *eps)
                    }
                    NormKind::Layer => {
                        kernels::layer_norm(
                            pool,
                            ins(0),
                            ins(1),
                            ins(2),
                            out(0),
                            out_floats(1),
                            n,
                            dim,
                            *eps,
                        );
                    }
                }
            }
            NormGradInput { norm } => {
                let (n, dim) = (rows(0), cols(0));
                let acc = self.acc(op, turn);
                match norm {
                    NormKind::Rms => {
                        kernels::rms_norm_dx(pool, ins(0), ins(1), ins(2), floats(3), acc, out(0), n, dim)
                    }
                    NormKind::Layer => {
                        kernels::layer_norm_dx(pool, ins(0), ins(1), ins(2), floats(3), acc, out(0), n, dim);
                    }
                }
            }
            NormGradWeight { norm } => {
                let (n, dim) = (rows(0), cols(0));
                let g = &op.grads[0];
                let (levels, merge) = self.levels(g, turn);
                match norm {
                    NormKind::Rms => {
                        kernels::rms_norm_dw(
                            pool,
                            ins(0),
                            ins(1),
                            floats(2),
                            levels,
                            n,
                            dim,
                            &g.inner,
                            merge,
                            ws,
                        );
                    }
                    NormKind::Layer => {
                        let (bias, _) = self.levels(&op.grads[1], turn);
                        kernels::layer_norm_dw(
                            pool,
                            ins(0),
                            ins(1),
                            floats(2),
                            levels,
                            bias,
                            n,
                            dim,
                            &g.inner,
                            merge,
                            ws,
                        );
                    }
                }
            }
            HeadNorm { heads: h, eps } => {
                kernels::qk_norm(
                    pool,
                    ins(0),
                    ins(1),
                    ins(2),
                    out(0),
                    out_floats(1),
                    rows(0),
                    h.q,
                    h.kv,
                    h.dim,
                    *eps,
                );
            }
            HeadNormGradInput { heads: h } => {
                let (dy, x, wq, wk) = (ins(0), ins(1), ins(2), ins(3));
                kernels::qk_norm_dx(pool, dy, x, wq, wk, floats(4), out(0), rows(0), h.q, h.kv, h.dim);
            }
            HeadNormGradWeight { heads: h } => {
                let g = &op.grads[0];
                let (dq, merge) = self.levels(g, turn);
                let (dk, _) = self.levels(&op.grads[1], turn);
                kernels::qk_norm_dw(
                    pool,
                    ins(0),
                    ins(1),
                    floats(2),
                    dq,
                    dk,
                    rows(0),
                    h.q,
                    h.kv,
                    h.dim,
                    &g.inner,
                    merge,
                    ws,
                );
            }
            Linear => {
                let acc = self.acc(op, turn);
                kernels::linear(pool, ins(0), ins(1), opt(2), acc, out(0), rows(0), cols(0), rows(1), ws);
            }
            LinearGradInput => {
                let acc = self.acc(op, turn);
                kernels::linear_dx(pool, ins(0), ins(1), acc, out(0), rows(0), cols(1), cols(0), ws);
            }
            LinearGradWeight => {
                let g = &op.grads[0];
                let (levels, merge) = self.levels(g, turn);
                kernels::linear_dw(
                    pool,
                    ins(0),
                    ins(1),
                    levels,
                    rows(0),
                    cols(1),
                    cols(0),
                    &g.inner,
                    merge,
                    ws,
                );
            }
            BiasGrad => {
                let g = &op.grads[0];
                let (levels, merge) = self.levels(g, turn);
                kernels::bias_grad(pool, ins(0), levels, rows(0), cols(0), &g.inner, merge, ws);
            }
            Rope { heads: h, inverse } => {
                let (cos, sin) = (self.whole::<f32>(p.io.cos), self.whole::<f32>(p.io.sin));
                let n = rows(0);
                // One token of a generation, or whole sequences.
                let seq = if n == 1 { self.tables } else { seq };
                kernels::rope(pool, out(0), cos, sin, n, seq, h.q, h.kv, h.dim, turn.position, *inverse);
            }
            Attention { heads: h } => {
                let scale = 1.0 / (h.dim as f32).sqrt();
                let (o, lse) = (out(0), out_floats(1));
                kernels::attention(pool, ins(0), o, lse, rows(0) / seq, seq, h.q, h.kv, h.dim, scale, ws);
            }
            AttentionGrad { heads: h } => {
                let scale = 1.0 / (h.dim as f32).sqrt();
                let (qkv, o, lse, dy) = (ins(0), ins(1), floats(2), ins(3));
                let n = rows(0) / seq;
                kernels::attention_dx(pool, qkv, o, lse, dy, out(0), n, seq, h.q, h.kv, h.dim, scale, ws);
            }
            SwiGlu => kernels::swiglu(pool, ins(0), out(0), rows(0), cols(0) / 2),
            SwiGluGrad => kernels::swiglu_dx(pool, ins(0), ins(1), out(0), rows(0), cols(0)),
            Gelu { tanh } => kernels::gelu(pool, gelu(*tanh), ins(0), out(0)),
            GeluGrad { tanh } => kernels::gelu_dx(pool, gelu(*tanh), ins(0), ins(1), out(0)),
            Add => {
                if op.ins.len() > 2 {
                    add_bias(ins(0), ins(1), ins(2), out(0));
                } else {
                    kernels::add(pool, ins(0), ins(1), out(0));
                }
            }
            Xent => {
                let targets = self.at::<u32>(op.ins[1], turn);
                kernels::xent_fused(pool, out(0), targets, turn.scale, out_floats(1), rows(0), cols(0));
            }
            XentStats { vocab0 } => {
                let targets = self.at::<u32>(op.ins[1], turn);
                kernels::xent_stats(pool, ins(0), targets, *vocab0, out_floats(0), rows(0), cols(0));
            }
            XentCombine { shards } => {
                kernels::xent_combine(floats(0), *shards, out_floats(0), rows(0) / shards)
            }
            XentGrad { vocab0 } => {
                let targets = self.at::<u32>(op.ins[1], turn);
                let stats = floats(2);
                let loss = out_floats(1);
                kernels::xent_dlogits(
                    pool,
                    out(0),
                    targets,
                    *vocab0,
                    stats,
                    turn.scale,
                    loss,
                    rows(0),
                    cols(0),
                );
            }
            LossSum { sequence } => {
                let sum = floats(0).iter().map(|&l| f64::from(l)).sum::<f64>();
                let leaf = turn.micro_batch * p.micro_batch() + sequence;
                self.whole::<f64>(p.io.loss_leaves)[leaf] = sum;
            }
            AttentionCached { heads, layer } => self.attend_cache::<T>(op, *heads, *layer, turn),
            ShardGrads { bucket } => self.add_to_shards(op, *bucket, turn),
            TieGrads { group } => {
                let b = &p.group_buffers[group.0 as usize];
                let owned = self.owned_range(*group, b.grad);
                let head = &self.whole::<f32>(b.head_grad.expect("tied here"))[owned.clone()];
                let grad = &mut self.whole::<f32>(b.grad)[owned];
                for (g, h) in grad.iter_mut().zip(head) {
                    *g += h;
                }
            }
            GradNorm | AdamW { .. } => unreachable!("the tail of the step runs these"),
            Fork { .. } => unreachable!("forks are dropped when blocks are made"),
            other => match &op.comm {
                Some(comm) => self.communicate(op, comm, turn)?,
                None => {
                    return Err(Error::failure(format!(
                        "{} ({}) is not executed yet",
                        op.name,
                        other.name()
                    )));
                }
            },
        }
        Ok(())
    }

    /// The elements of a group's buffer that this rank settles, clips and updates.
    pub(crate) fn owned_range(&self, group: GroupId, buffer: BufferId) -> std::ops::Range<usize> {
        let owned = self.program.owned_in(group, buffer);
        owned.first..owned.first + owned.count
    }
}

/// `y = x + r + b` by rows, rounded once.
fn add_bias<T: Storage>(x: &[T], r: &[T], b: &[T], y: &mut [T]) {
    for ((x, r), y) in x.chunks(b.len()).zip(r.chunks(b.len())).zip(y.chunks_mut(b.len())) {
        for i in 0..b.len() {
            y[i] = T::of(x[i].one() + r[i].one() + b[i].one());
        }
    }
}

fn gelu(tanh: bool) -> Gelu {
    if tanh { Gelu::Tanh } else { Gelu::Erf }
}
