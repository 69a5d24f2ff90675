//! What ways a program's messages need, and how a sum is cut into pieces: plans alone, the same on every rank.

use std::collections::BTreeMap;
use std::ops::Range;

use program::{Collective, Members, Program};
use spec::{DType, shares};

/// Messages of a lane that may wait for their receiver. With one already no schedule ends with stages that wait for each
/// other; the second lets a stage go on.
pub(crate) const SLOTS: usize = 2;

/// From one rank to another: the other's place in the group, whether this one sends, and the channel.
pub(crate) type Lane = (usize, bool, u32);

/// What a way carries: all messages of a group, or those of one lane in it, which no other lane may hold up.
pub(crate) type Key = (Members, Option<Lane>);

/// A way that some message needs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) key: Key,
    /// Ranks of the world that it joins, in its order.
    pub(crate) ranks: Vec<usize>,
    /// Bytes beside the arena: parts of sums that others have sent, or messages that wait for their receiver.
    pub(crate) scratch_bytes: usize,
}

impl Wanted {
    /// For people.
    pub(crate) fn name(&self) -> String {
        match self.key {
            (Members::World, _) => "all ranks".to_owned(),
            (_, Some((_, _, channel))) => {
                format!("the pipeline (rank {} to {}, message {channel})", self.ranks[0], self.ranks[1])
            }
            (members, None) => {
                let ranks: Vec<String> = self.ranks.iter().map(usize::to_string).collect();
                format!("{} (ranks {})", kind(members), ranks.join(", "))
            }
        }
    }

    /// What all its ranks call it, and no others theirs.
    pub(crate) fn id(&self) -> String {
        let channel = self.key.1.map(|(_, _, channel)| channel);
        format!("{:?} {channel:?} {:?}", self.key.0, self.ranks)
    }
}

fn kind(members: Members) -> &'static str {
    use program::{Axis, Replication};
    match members {
        Members::Axis(Axis::Tp) => "tensor-parallel ranks",
        Members::Axis(Axis::Cp) => "context-parallel ranks",
        Members::Axis(Axis::Ep) => "expert-parallel ranks",
        Members::Axis(Axis::Pp) => "stages",
        Members::Axis(Axis::Dp) => "data-parallel ranks",
        Members::Replicas(Replication::Data) => "data-parallel ranks",
        Members::Shards(Replication::Data) => "ranks that shard",
        Members::Owners(Replication::Data) => "ranks that own alike",
        Members::Replicas(Replication::Expert) => "experts' data-parallel ranks",
        Members::Shards(Replication::Expert) => "ranks that shard experts",
        Members::Owners(Replication::Expert) => "ranks that own experts alike",
        Members::Ends => "first and last stage",
        Members::World => "all ranks",
    }
}

/// The ways that a program's messages need, in an order of the whole world: ranks that make theirs by it never wait for
/// each other in a circle. `group` gives the group that carries messages among some ranks, and its ranks.
pub(crate) fn wanted(
    p: &Program,
    group: impl Fn(Members) -> Option<(Members, Vec<usize>)>,
    staging_bytes: usize,
) -> Vec<Wanted> {
    let mut all: BTreeMap<String, Wanted> = BTreeMap::new();
    let comms = p.blocks.iter().flat_map(|b| &b.ops).filter_map(|op| op.comm.as_ref());
    for comm in comms {
        let Some((members, ranks)) = group(comm.members) else { continue };
        let place = |rank: usize| ranks.iter().position(|r| *r == rank).unwrap_or(0);
        let (lane, ranks, n) = match comm.what {
            Collective::Send { to, channel } => (Some((place(to), true, channel)), vec![p.rank, to], 2),
            Collective::Recv { from, channel } => {
                (Some((place(from), false, channel)), vec![from, p.rank], 2)
            }
            _ => (None, ranks.clone(), ranks.len()),
        };
        let bytes = |m: &program::Message| match comm.what {
            Collective::Send { .. } => SLOTS * (m.bytes() as usize).next_multiple_of(ALIGN),
            Collective::AllReduce => Pieces::of_all(m.elements, n, m.dtype, staging_bytes).bytes(m.dtype),
            Collective::ReduceScatter => {
                let parts: Vec<_> = (0..n).map(|i| m.part(i, n)).collect();
                Pieces::new(&parts, m.dtype, staging_bytes).bytes(m.dtype)
            }
            _ => 0,
        };
        // Every way has room for the first message that makes its connections.
        let scratch_bytes = comm.messages.iter().map(bytes).max().unwrap_or(0).max(n * ALIGN);
        let wanted = Wanted { key: (members, lane), ranks, scratch_bytes };
        all.entry(wanted.id())
            .and_modify(|w| w.scratch_bytes = w.scratch_bytes.max(scratch_bytes))
            .or_insert(wanted);
    }
    all.into_values().collect()
}

/// What card and library like operands to be aligned to.
pub(crate) const ALIGN: usize = 256;

/// How the members of a group deal a sum: each adds up a share, so many elements of it at a time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pieces {
    shares: Vec<Range<usize>>,
    /// Elements of a share at a time.
    pub(crate) len: usize,
}

impl Pieces {
    /// Of shares that are given, where what others have sent may take so many bytes.
    pub(crate) fn new(shares: &[Range<usize>], dtype: DType, staging_bytes: usize) -> Pieces {
        let longest = shares.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let others = shares.len().saturating_sub(1).max(1);
        let most = (staging_bytes / (others * dtype.bytes())).max(1);
        Pieces { shares: shares.to_vec(), len: longest.min(most) }
    }

    /// Of all of `count` elements.
    pub(crate) fn of_all(count: usize, members: usize, dtype: DType, staging_bytes: usize) -> Pieces {
        let shares: Vec<_> = (0..members).map(|i| shares::aligned(count, members, i)).collect();
        Pieces::new(&shares, dtype, staging_bytes)
    }

    /// Bytes that what others have sent takes.
    fn bytes(&self, dtype: DType) -> usize {
        self.shares.len().saturating_sub(1) * self.len * dtype.bytes()
    }

    pub(crate) fn shares(&self) -> &[Range<usize>] {
        &self.shares
    }

    pub(crate) fn count(&self) -> usize {
        let longest = self.shares.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        if self.len == 0 { 0 } else { longest.div_ceil(self.len) }
    }

    /// Elements of member `i` in piece `k`.
    pub(crate) fn of(&self, i: usize, k: usize) -> Range<usize> {
        let share = &self.shares[i];
        let at = |k: usize| (share.start + k * self.len).min(share.end);
        at(k)..at(k + 1)
    }
}

/// How long each part is, if all are and they lie one after another from 0.
pub(crate) fn even(parts: &[Range<usize>]) -> Option<usize> {
    let len = parts.first()?.len();
    let ok = parts.iter().enumerate().all(|(i, p)| *p == (i * len..(i + 1) * len));
    (ok && len > 0).then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::{Pass, Work, orders};
    use spec::PipelineSchedule;

    #[test]
    fn pieces_tile_every_share_in_the_room_that_there_is() {
        for members in 2..6 {
            for count in [1, 63, 64, 200, 5000] {
                for room in [1, 64, 1000, 1 << 20] {
                    let pieces = Pieces::of_all(count, members, DType::F32, room);
                    assert!(pieces.bytes(DType::F32) <= room.max(4 * (members - 1)));
                    let mut all: Vec<usize> = (0..pieces.count())
                        .flat_map(|k| (0..members).flat_map(move |i| [(i, k)]))
                        .flat_map(|(i, k)| pieces.of(i, k))
                        .collect();
                    all.sort_unstable();
                    assert_eq!(all, (0..count).collect::<Vec<_>>(), "{members} {count} {room}");
                }
            }
        }
    }

    #[test]
    fn parts_that_are_even_are_gathered_in_one_go() {
        assert_eq!(even(&[0..2, 2..4]), Some(2));
        assert_eq!(even(&[0..2, 2..3]), None);
        assert_eq!(even(&[1..2, 2..3]), None);
        assert_eq!(even(&[0..0, 0..0]), None);
    }

    /// One thing that a stage does with a message: which lane, and whether it sends.
    type Step = ((usize, usize, usize, bool), bool);

    /// Sends and receives of a stage in its order; chunks of all stages count from the first layers on.
    fn steps(order: &[Work], stage: usize, stages: usize, chunks: usize) -> Vec<Step> {
        let last = stages * chunks - 1;
        let mut steps = Vec::new();
        for work in order {
            let at = work.chunk * stages + stage;
            let (from, to) = match work.pass {
                Pass::Forward => (at.checked_sub(1), Some(at + 1).filter(|_| at < last)),
                Pass::Backward => (Some(at + 1).filter(|_| at < last), at.checked_sub(1)),
                Pass::Weight => continue,
            };
            let lane = |a: usize, b: usize| (a % stages, b % stages, a.min(b), work.pass == Pass::Forward);
            steps.extend(from.map(|from| (lane(from, at), false)));
            steps.extend(to.map(|to| (lane(at, to), true)));
        }
        steps
    }

    /// Plays all stages, where so many messages of a lane may wait for their receiver.
    fn ends(orders: &[Vec<Work>], stages: usize, chunks: usize, slots: usize) -> bool {
        let steps: Vec<_> = (0..stages).map(|s| steps(&orders[s], s, stages, chunks)).collect();
        let mut at = vec![0; stages];
        let mut waiting: BTreeMap<_, usize> = BTreeMap::new();
        loop {
            let before = at.clone();
            for (at, steps) in at.iter_mut().zip(&steps) {
                while let Some((lane, sends)) = steps.get(*at) {
                    let waits = waiting.entry(*lane).or_default();
                    match (sends, *waits) {
                        (true, full) if full == slots => break,
                        (true, _) => *waits += 1,
                        (false, 0) => break,
                        (false, _) => *waits -= 1,
                    }
                    *at += 1;
                }
            }
            if at == before {
                return at.iter().zip(&steps).all(|(at, steps)| *at == steps.len());
            }
        }
    }

    #[test]
    fn no_schedule_needs_more_slots() {
        use PipelineSchedule::*;
        for stages in 2..9 {
            for micro_batches in (1usize..5).map(|k| k * stages).chain([1, 2, 3, 7]) {
                for (schedule, most) in [(Gpipe, 1), (OneFOneB, 1), (Interleaved, 4), (ZeroBubble, 1)] {
                    if schedule == Interleaved && !micro_batches.is_multiple_of(stages) {
                        continue;
                    }
                    for (chunks, slots) in (1..=most).flat_map(|chunks| [(chunks, 1), (chunks, SLOTS)]) {
                        let orders = orders(schedule, stages, chunks, micro_batches);
                        let what = format!("{schedule:?} {stages} {chunks} {micro_batches} {slots}");
                        assert!(ends(&orders, stages, chunks, slots), "{what}");
                        assert!(!ends(&orders, stages, chunks, 0), "{what}: nothing can be sent");
                    }
                }
            }
        }
    }
}
