//! What replicas of a stage say: gradients and parameters, in buckets or layer by layer.

use super::*;

impl<'a> Writer<'a> {
    /// A message among replicas, if there is one.
    fn replica_message(&mut self, axis: Axis, what: Collective, bytes: f64) -> Option<usize> {
        let r = &self.parts.replicas;
        let group = match axis {
            Axis::All => r.dense.replicas,
            Axis::Near => r.dense.shards,
            Axis::Far => r.dense.owners,
            Axis::ExpertNear => r.experts.shards,
            Axis::ExpertFar => r.experts.owners,
            _ => r.experts.replicas,
        };
        let span = self.spans[axis as usize];
        let mut t = traffic(&self.parts.net, what, &span, group.size, bytes);
        if self.parts.flat_collectives {
            // One port of the node carries what all of its members say.
            t.outside_bytes *= span.inside;
        }
        (t != Traffic::default()).then(|| self.message(axis, what, t))
    }

    /// Gathers parameters from their shards.
    fn gather(&mut self, dense: f64, experts: f64) -> Vec<usize> {
        let bytes = self.parts.replicas.gathered_bytes;
        let near = self.replica_message(Axis::Near, Collective::AllGather, bytes * dense);
        let expert = self.replica_message(Axis::ExpertNear, Collective::AllGather, bytes * experts);
        near.into_iter().chain(expert).collect()
    }

    /// Sums gradients to where they are owned.
    fn reduce(&mut self, dense: f64, experts: f64, settles: bool) -> Vec<usize> {
        let bytes = self.parts.replicas.grad_bytes;
        let mut out = Vec::new();
        if self.placement.layout.zero == Zero::Off {
            out.extend(self.replica_message(Axis::All, Collective::AllReduce, bytes * dense));
            out.extend(self.replica_message(Axis::ExpertAll, Collective::AllReduce, bytes * experts));
        } else {
            out.extend(self.replica_message(Axis::Near, Collective::ReduceScatter, bytes * dense));
            out.extend(self.replica_message(Axis::ExpertNear, Collective::ReduceScatter, bytes * experts));
            if settles {
                out.extend(self.settle(bytes * dense, bytes * experts));
            }
        }
        out
    }

    /// Owners of the same shard add theirs up.
    fn settle(&mut self, dense_bytes: f64, expert_bytes: f64) -> Vec<usize> {
        let r = &self.parts.replicas;
        let (dense, experts) = (r.dense.shards.size as f64, r.experts.shards.size as f64);
        let dense = self.replica_message(Axis::Far, Collective::AllReduce, dense_bytes / dense);
        let experts = self.replica_message(Axis::ExpertFar, Collective::AllReduce, expert_bytes / experts);
        dense.into_iter().chain(experts).collect()
    }

    /// ZeRO 3: gathers the next unit's parameters beside this unit's work, or this unit's in front of it.
    pub(super) fn gather_ahead(
        &mut self,
        ops: &mut Vec<Op>,
        units: &[Unit<'_>],
        order: &[usize],
        at: usize,
        pass: Pass,
        split: bool,
    ) {
        let of = |u: usize| units[u].gathered(pass, split);
        if at == 0 || !self.beside.params {
            let (dense, experts) = of(order[at]);
            let messages = self.gather(dense, experts);
            ops.extend(messages.iter().map(|m| Op::Start(Stream::Data, *m)));
            self.later = 0;
        }
        ops.push(Op::Wait(Stream::Data, self.later));
        if self.beside.params
            && let Some(&next) = order.get(at + 1)
        {
            let (dense, experts) = of(next);
            let messages = self.gather(dense, experts);
            ops.extend(messages.iter().map(|m| Op::Start(Stream::Data, *m)));
            self.later = 0;
        }
    }

    /// ZeRO 3: scatters a unit's gradients; replicas of a shard settle once a step.
    pub(super) fn scatter(&mut self, ops: &mut Vec<Op>, unit: &Unit<'_>, settles: bool) {
        let messages = self.reduce(unit.held(), unit.experts_held(), settles);
        self.later += messages.len();
        ops.extend(messages.iter().map(|m| Op::Start(Stream::Data, *m)));
        if !self.beside.params {
            ops.push(Op::Wait(Stream::Data, 0));
        }
    }

    /// Whether parameters are owned in shards and gathered once they are updated.
    pub(super) fn gathers_updated(&self) -> bool {
        matches!(self.placement.layout.zero, Zero::Optimizer | Zero::Gradients)
    }

    fn held(units: &[Unit<'_>]) -> (f64, f64) {
        let dense = units.iter().map(Unit::held).sum();
        (dense, units.iter().map(|u| u.experts_held()).sum())
    }

    /// Buckets of one chunk.
    fn buckets(&self) -> usize {
        let chunks = self.placement.layout.chunks;
        ((self.parts.replicas.buckets / chunks as f64).round() as usize).max(1)
    }

    /// The first forward pass of a chunk waits for its parameters bucket by bucket.
    pub(super) fn await_buckets(&self, ops: Vec<Op>, chunk: usize) -> Vec<Op> {
        let count = self.buckets();
        let each = self.gathers[chunk];
        let later: usize = self.gathers[chunk + 1..].iter().map(|each| each * count).sum();
        if each == 0 {
            return ops;
        }
        let wait = |b: usize| Some(vec![Op::Wait(Stream::Data, later + (count - 1 - b) * each)]);
        at_shares(ops, count, wait, |_| None)
    }

    /// The last backward pass of a chunk sends gradients bucket by bucket.
    pub(super) fn reduce_buckets(&mut self, ops: Vec<Op>, units: &[Unit<'_>], settles: bool) -> Vec<Op> {
        let count = self.buckets();
        let (dense, experts) = Self::held(units);
        let each = self.reduce(dense / count as f64, experts / count as f64, settles);
        let start: Vec<Op> = each.iter().map(|m| Op::Start(Stream::Data, *m)).collect();
        if self.beside.grads {
            return at_shares(ops, count, |_| None, |_| Some(start.clone()));
        }
        let mut out = ops;
        if self.placement.layout.zero == Zero::Gradients {
            out.extend((0..count).flat_map(|_| start.clone()));
            out.push(Op::Wait(Stream::Data, 0));
        } else {
            // One after another at the end of the step.
            self.late.extend((0..count).flat_map(|_| start.clone()));
        }
        out
    }

    /// Before the first pass: updated parameters are gathered, in the order in which chunks need them.
    pub(super) fn begin(&mut self) -> Vec<Op> {
        if !self.gathers_updated() {
            return Vec::new();
        }
        let mut ops = Vec::new();
        let count = self.buckets();
        for c in 0..self.chunks.len() {
            let (dense, experts) = Self::held(&self.chunks[c]);
            let each = self.gather(dense / count as f64, experts / count as f64);
            self.gathers.push(each.len());
            ops.extend((0..count).flat_map(|_| each.iter().map(|m| Op::Start(Stream::Data, *m))));
        }
        if !self.beside.params {
            ops.push(Op::Wait(Stream::Data, 0));
        }
        ops
    }

    /// After the last pass: gradients that are left, the optimiser, and what happens once.
    pub(super) fn end(&mut self) -> Vec<Op> {
        let mut ops = std::mem::take(&mut self.late);
        ops.push(Op::Wait(Stream::Data, 0));
        ops.push(Op::Compute(Kernel::Optimizer, self.time(self.parts.optimizer_s + self.parts.once_s)));
        ops
    }
}

/// `ops` with something before and after each of `count` parts that compute equally long.
fn at_shares(
    ops: Vec<Op>,
    count: usize,
    before: impl Fn(usize) -> Option<Vec<Op>>,
    after: impl Fn(usize) -> Option<Vec<Op>>,
) -> Vec<Op> {
    let length = |op: &Op| if let Op::Compute(_, ticks) = op { *ticks } else { 0 };
    let whole: u128 = ops.iter().map(|op| u128::from(length(op))).sum();
    let mut out = Vec::with_capacity(ops.len() + 2 * count);
    let (mut part, mut done) = (0, 0);
    out.extend(before(0).into_iter().flatten());
    for op in ops {
        done += u128::from(length(&op));
        out.push(op);
        while part + 1 < count && done * count as u128 >= whole * (part + 1) as u128 {
            out.extend(after(part).into_iter().flatten());
            part += 1;
            out.extend(before(part).into_iter().flatten());
        }
    }
    out.extend(after(part).into_iter().flatten());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_compute_equally_long() {
        let ops = vec![
            Op::Compute(Kernel::Product, 10),
            Op::Compute(Kernel::Product, 10),
            Op::Compute(Kernel::Product, 20),
        ];
        let mark = |b: usize| Some(vec![Op::Start(Stream::Data, b)]);
        let out = at_shares(ops, 2, |_| None, mark);
        assert_eq!(
            out,
            [
                Op::Compute(Kernel::Product, 10),
                Op::Compute(Kernel::Product, 10),
                Op::Start(Stream::Data, 0),
                Op::Compute(Kernel::Product, 20),
                Op::Start(Stream::Data, 1)
            ]
        );
    }
}
