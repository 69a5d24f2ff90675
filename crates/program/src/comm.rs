//! What ranks say to each other, as data: which op, among whom, how many bytes, and whether it blocks.
//!
//! [`state`] is the one place that knows which kinds of op talk. The executor, both planners and the timelines read
//! what it says in [`Op::comm`](crate::Op::comm) and match no kinds of their own.

use std::collections::HashMap;
use std::ops::Range;

use serde::Serialize;
use spec::{DType, Zero};

use crate::buffer::{BufferId, Home, Slice, View};
use crate::coords::Members;
use crate::op::{Axis, GradSum, Op, OpKind};
use crate::params::{GroupId, Replication};
use crate::zero::owned;
use crate::{Bucket, Program};

/// What an op says to other ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comm {
    /// How.
    pub what: Collective,
    /// Among whom.
    pub members: Members,
    /// One after another, each a collective of its own; none of an op that only waits.
    pub messages: Vec<Message>,
    /// Whether the op returns only when everything was said.
    pub when: When,
}

/// A way in which ranks talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Every member gets the sum.
    AllReduce,
    /// Every member gets every part.
    AllGather,
    /// Every member gets its part of the sum.
    ReduceScatter,
    /// Every member sends each other one a part.
    AllToAll,
    /// Every member passes on to the next what it got from the one before.
    Ring,
    /// One rank to another.
    Send {
        /// The rank that receives.
        to: usize,
        /// Which message of the micro-batch.
        channel: u32,
    },
    /// The other end of [`Collective::Send`].
    Recv {
        /// The rank that sends.
        from: usize,
        /// Which message of the micro-batch.
        channel: u32,
    },
}

/// When an op's messages are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// With the op.
    Now,
    /// They go on beside other ops until the one that ends them.
    Begins(Ticket),
    /// The op waits for what an earlier one began.
    Ends(Ticket),
}

/// What joins the op that begins messages with the one that waits for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ticket {
    /// Parameters of a unit.
    Params(usize),
    /// Gradients of a bucket.
    Grads(usize),
    /// Keys and values on a ring.
    Keys,
    /// Their gradients.
    KeyGrads,
}

/// One message or collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// What this rank gives; of an all-gather its own part of `to` if `None`.
    pub from: Option<Slice>,
    /// What this rank gets; over its own part of `from` if `None`.
    pub to: Option<Slice>,
    /// Elements of the whole vector that is summed, gathered, scattered, exchanged or sent.
    pub elements: usize,
    /// Of which type.
    pub dtype: DType,
    /// Who has which part of it.
    pub deal: Deal,
}

/// How the elements of a vector are dealt to the members of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Deal {
    /// As evenly as possible.
    Even,
    /// In whole chunks of the gradient norm, as ZeRO shards parameters.
    NormChunks,
    /// Rows of experts, as many to and from each member as these counts add up to, which are known when it is said; an
    /// even share is what it is expected to be.
    Counted {
        /// By (member, expert), of what leaves.
        leave: View,
        /// By (member, expert), of what arrives.
        arrive: View,
    },
}

impl Message {
    /// Bytes of the whole vector.
    pub fn bytes(&self) -> u64 {
        (self.elements * self.dtype.bytes()) as u64
    }

    /// The elements of member `index` of `members`.
    pub fn part(&self, index: usize, members: usize) -> Range<usize> {
        match self.deal {
            Deal::Even | Deal::Counted { .. } => spec::shares::even(self.elements, members, index),
            Deal::NormChunks => owned(self.elements, members, index).range(),
        }
    }
}

impl Comm {
    /// Bytes that member `index` of `members` gives to others. A sum is scattered and gathered: what is not one's own
    /// share is sent to its owner, one's own share of the sum to everybody else.
    pub fn sent_bytes(&self, index: usize, members: usize) -> u64 {
        let of = |m: &Message| {
            let others = members - 1;
            let share = |part: Range<usize>| (m.elements - part.len(), part.len() * others);
            let (scattered, gathered) = match self.what {
                Collective::AllReduce => share(spec::shares::aligned(m.elements, members, index)),
                _ => share(m.part(index, members)),
            };
            let elements = match self.what {
                Collective::AllReduce => scattered + gathered,
                Collective::AllGather => gathered,
                Collective::ReduceScatter | Collective::AllToAll => scattered,
                Collective::Ring | Collective::Send { .. } => m.elements,
                Collective::Recv { .. } => 0,
            };
            (elements * m.dtype.bytes()) as u64
        };
        self.messages.iter().map(of).sum()
    }

    /// Bytes of all whole vectors.
    pub fn bytes(&self) -> u64 {
        self.messages.iter().map(Message::bytes).sum()
    }
}

/// What an op of `p` says; `None` if it keeps silent, or nobody else belongs to its group.
fn state(op: &Op, p: &Program, units: &HashMap<usize, Replication>) -> Option<Comm> {
    use OpKind::*;
    let now = |what, members, messages| Some(Comm { what, members, messages, when: When::Now });
    let both = |what, axis: &Axis| {
        let (from, to) = (p.slice(op.ins[0]), p.slice(op.outs[0]));
        now(what, Members::Axis(*axis), vec![p.message(Some(from), Some(to), Deal::Even)])
    };
    let comm = match &op.kind {
        AllReduce { axis } => both(Collective::AllReduce, axis),
        AllGather { axis } | Unslice { axis } => both(Collective::AllGather, axis),
        ReduceScatter { axis } => both(Collective::ReduceScatter, axis),
        AllToAll { axis } => now(Collective::AllToAll, Members::Axis(*axis), p.exchange(op)),
        RingAttention { axis, .. } => p.ring(*axis, op.outs.get(2), None),
        RingAttentionGrad { axis, .. } => p.ring(*axis, op.outs.get(1), op.outs.get(3)),
        Send { peer, tag } => {
            let message = p.message(Some(p.slice(op.ins[0])), None, Deal::Even);
            let what = Collective::Send { to: *peer, channel: *tag };
            now(what, Members::Axis(Axis::Pp), vec![message])
        }
        Recv { peer, tag } => {
            let message = p.message(None, Some(p.slice(op.outs[0])), Deal::Even);
            let what = Collective::Recv { from: *peer, channel: *tag };
            now(what, Members::Axis(Axis::Pp), vec![message])
        }
        GatherParams { unit, groups } => {
            let gather = |(group, out): (&GroupId, &View)| {
                let shard = p.all_of(p.group_buffers[group.0 as usize].param);
                p.message(Some(shard), Some(p.slice(*out)), Deal::NormChunks)
            };
            let members = Members::Shards(p.group(groups[0]).replication);
            let messages = groups.iter().zip(&op.outs).map(gather).collect();
            let when = When::Begins(Ticket::Params(*unit));
            Some(Comm { what: Collective::AllGather, members, messages, when })
        }
        WaitParams { unit } => {
            let (members, when) = (Members::Shards(units[unit]), When::Ends(Ticket::Params(*unit)));
            Some(Comm { what: Collective::AllGather, members, messages: Vec::new(), when })
        }
        ReduceGrads { bucket, sum } => Some(p.reduction(op, *bucket, *sum)),
        WaitGrads { bucket } => {
            let replication = p.buckets[*bucket].replication;
            let (what, members) = match p.layout.zero {
                Zero::Off => (Collective::AllReduce, Members::Replicas(replication)),
                _ => (Collective::ReduceScatter, Members::Shards(replication)),
            };
            Some(Comm { what, members, messages: Vec::new(), when: When::Ends(Ticket::Grads(*bucket)) })
        }
        SyncGrads { over, group } => {
            let slice = p.owned_in(*group, p.group_buffers[group.0 as usize].grad);
            now(Collective::AllReduce, *over, vec![p.message(Some(slice), Some(slice), Deal::Even)])
        }
        AllGatherParams { group } => {
            let whole = p.all_of(p.group_buffers[group.0 as usize].param);
            let members = Members::Shards(p.group(*group).replication);
            now(Collective::AllGather, members, vec![p.message(None, Some(whole), Deal::NormChunks)])
        }
        GatherUpdate { over, .. } => now(Collective::AllGather, *over, vec![p.gathered_update(op)]),
        ScatterUpdate { group } => {
            let message = p.message(Some(p.slice(op.ins[0])), None, Deal::NormChunks);
            now(Collective::ReduceScatter, Members::Shards(p.group(*group).replication), vec![message])
        }
        GradNorm => {
            let sums = p.all_of(p.io.norm_chunks);
            now(Collective::AllReduce, Members::World, vec![p.message(Some(sums), Some(sums), Deal::Even)])
        }
        _ => None,
    };
    comm.filter(|c| c.members.ranks(p.coords, &p.layout).len() > 1)
}

impl Program {
    /// Fills in what every op says, once all buffers are there.
    pub(crate) fn state_messages(&mut self) {
        let units = self.groups.iter().map(|g| (g.unit, g.replication)).collect();
        let mut blocks = std::mem::take(&mut self.blocks);
        for op in blocks.iter_mut().flat_map(|b| &mut b.ops) {
            op.comm = state(op, self, &units);
        }
        self.blocks = blocks;
    }

    /// The elements of a view.
    pub fn slice(&self, view: View) -> Slice {
        let cols = self.buffer(view.buffer).cols;
        Slice { buffer: view.buffer, first: view.row0 * cols, count: view.rows * cols }
    }

    fn all_of(&self, buffer: BufferId) -> Slice {
        Slice { buffer, first: 0, count: self.buffer(buffer).len() }
    }

    fn message(&self, from: Option<Slice>, to: Option<Slice>, deal: Deal) -> Message {
        let larger = from.into_iter().chain(to).max_by_key(|s| s.count).expect("a message has an end");
        Message { from, to, elements: larger.count, dtype: self.buffer(larger.buffer).dtype, deal }
    }

    /// The update of a group: owners have their range of it already, tensor-parallel ranks put theirs one under another.
    fn gathered_update(&self, op: &Op) -> Message {
        let to = Some(self.slice(op.outs[0]));
        match op.ins.first() {
            Some(own) => self.message(Some(self.slice(*own)), to, Deal::Even),
            None => self.message(None, to, Deal::NormChunks),
        }
    }

    /// The counts of rows, unless they are known, and the rows; or those of each sequence where none are counted.
    fn exchange(&self, op: &Op) -> Vec<Message> {
        if let &[rows] = op.ins.as_slice() {
            let of = |view: View, i: usize| {
                let count = view.rows / self.micro_batch();
                Some(self.slice(View { row0: view.row0 + i * count, rows: count, ..view }))
            };
            let one = |i: usize| self.message(of(rows, i), of(op.outs[0], i), Deal::Even);
            return (0..self.micro_batch()).map(one).collect();
        }
        let (leave, known) = (op.ins[1], op.outs.get(1));
        let counts =
            known.map(|arrive| self.message(Some(self.slice(leave)), Some(self.slice(*arrive)), Deal::Even));
        let arrive = *known.unwrap_or_else(|| &op.ins[2]);
        let (from, to) = (self.slice(op.ins[0]), self.slice(op.outs[0]));
        let rows = self.message(Some(from), Some(to), Deal::Counted { leave, arrive });
        // There may be room for more than an even share where rows arrive.
        let rows = Message { elements: from.count.min(to.count), ..rows };
        counts.into_iter().chain([rows]).collect()
    }

    /// Keys and values on their way around the ring, one hop to each other member, out of one part of `keys` into the
    /// other; backward their gradients after them, one hop further, home, likewise in `gradients`. Of both kinds by turns.
    fn ring(&self, axis: Axis, keys: Option<&View>, gradients: Option<&View>) -> Option<Comm> {
        let members = Members::Axis(axis);
        let times = members.ranks(self.coords, &self.layout).len();
        let hop = |held: &View, parts: usize, hop: usize| {
            let all = self.slice(*held);
            let count = all.count / parts;
            let part = |i: usize| Slice { first: all.first + i % 2 * count, count, ..all };
            self.message(Some(part(hop - 1)), Some(part(hop)), Deal::Even)
        };
        let messages = (1..=times).flat_map(|i| {
            let keys = keys.filter(|_| i < times).map(|held| hop(held, 2, i));
            keys.into_iter().chain(gradients.map(|held| hop(held, 3, i)))
        });
        let messages = messages.collect();
        Some(Comm { what: Collective::Ring, members, messages, when: When::Now })
    }

    fn reduction(&self, op: &Op, index: usize, how: GradSum) -> Comm {
        let bucket = &self.buckets[index];
        let begins = When::Begins(Ticket::Grads(index));
        let summed = |run| self.message(Some(run), Some(run), Deal::Even);
        let scattered = |slice| self.message(Some(slice), None, Deal::NormChunks);
        // Of a micro-batch's gradients the last level is their sum.
        let last = |(view, (group, _)): (&View, &(GroupId, BufferId))| {
            let rows = self.group(*group).rows;
            self.slice(View { row0: view.row0 + view.rows - rows, rows, ..*view })
        };
        let owned = |(group, grad): &(GroupId, BufferId)| self.owned_in(*group, *grad);
        let (what, members, messages, when) = match how {
            GradSum::Everywhere => {
                let messages = self.bucket_runs(bucket).into_iter().map(summed).collect();
                (Collective::AllReduce, Members::Replicas(bucket.replication), messages, begins)
            }
            GradSum::Scattered => {
                let members = Members::Shards(bucket.replication);
                let each_micro_batch = self.layout.zero >= Zero::Gradients;
                let messages = if each_micro_batch {
                    op.ins.iter().zip(&bucket.grads).map(last).map(scattered).collect()
                } else {
                    bucket.grads.iter().map(|(_, b)| scattered(self.all_of(*b))).collect()
                };
                let when = if each_micro_batch { When::Now } else { begins };
                (Collective::ReduceScatter, members, messages, when)
            }
            GradSum::Owners => {
                // Of small groups most ranks own nothing.
                let shards = bucket.grads.iter().map(owned).filter(|shard| shard.count > 0);
                let messages = shards.map(summed).collect();
                (Collective::AllReduce, Members::Owners(bucket.replication), messages, When::Now)
            }
        };
        Comm { what, members, messages, when }
    }

    /// Runs of a bucket's gradients that lie next to each other: each is reduced with one message.
    fn bucket_runs(&self, bucket: &Bucket) -> Vec<Slice> {
        let offset = |id: BufferId| match self.buffer(id).home {
            Home::Static { offset } => offset,
            _ => unreachable!("gradient sums are static"),
        };
        let mut grads: Vec<BufferId> = bucket.grads.iter().map(|(_, b)| *b).collect();
        grads.sort_unstable_by_key(|b| (offset(*b), self.buffer(*b).len()));
        let mut runs: Vec<Slice> = Vec::new();
        for buffer in grads {
            let (at, count) = (offset(buffer), self.buffer(buffer).len());
            if let Some(run) = runs.last_mut()
                && at == offset(run.buffer) + DType::F32.bytes() * run.count
            {
                run.count += count;
                continue;
            }
            runs.push(Slice { buffer, first: 0, count });
        }
        runs
    }

    /// The elements of a group's buffer, whole or sharded, that this rank settles, clips and updates.
    pub fn owned_in(&self, group: GroupId, buffer: BufferId) -> Slice {
        let owned = self.group_buffers[group.0 as usize].owned;
        let shard = self.buffer(buffer).len() != self.group(group).len();
        Slice { buffer, first: if shard { 0 } else { owned.first }, count: owned.count }
    }
}
