//! What every message and every meeting of a group says about itself, to be compared on arrival.

use crate::control::HEADER_WORDS;
use crate::element::{ElementType, OpTag, Order};
use std::fmt;
use std::ops::Range;

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OpKind {
    /// Every rank gets the sum.
    AllReduce = 0,
    /// Every rank gets its range of the sum.
    ReduceScatter = 1,
    /// Every rank gets all ranges.
    AllGather = 2,
    /// Every rank gets its part of each rank's buffer.
    AllToAll = 3,
    /// Every rank gets the root's buffer.
    Broadcast = 4,
    /// One rank to another.
    Send = 5,
    /// The other end of a send.
    Recv = 6,
    /// Nobody leaves before all have come.
    Barrier = 7,
    /// The members of a new group find each other.
    Join = 8,
}

impl OpKind {
    const ALL: [OpKind; 9] = [
        OpKind::AllReduce,
        OpKind::ReduceScatter,
        OpKind::AllGather,
        OpKind::AllToAll,
        OpKind::Broadcast,
        OpKind::Send,
        OpKind::Recv,
        OpKind::Barrier,
        OpKind::Join,
    ];

    /// The name in snake case, as in reports.
    pub const fn name(self) -> &'static str {
        match self {
            OpKind::AllReduce => "all_reduce",
            OpKind::ReduceScatter => "reduce_scatter",
            OpKind::AllGather => "all_gather",
            OpKind::AllToAll => "all_to_all",
            OpKind::Broadcast => "broadcast",
            OpKind::Send => "send",
            OpKind::Recv => "recv",
            OpKind::Barrier => "barrier",
            OpKind::Join => "group",
        }
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Identifies an operation or a message; equal on all ranks that take part in it, or there is a mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: OpKind,
    pub(crate) element: ElementType,
    pub(crate) order: Order,
    pub(crate) root: u32,
    pub(crate) group: GroupKey,
    pub(crate) channel: u32,
    /// Number of the operation in its group, or of the message on its channel.
    pub(crate) seq: u64,
    pub(crate) tag: OpTag,
    /// Elements of the whole operation.
    pub(crate) count: u64,
    /// Hash of the ranges.
    pub(crate) detail: u64,
    /// Number of the message among those between two ranks, and the elements in it.
    pub(crate) message: u64,
    pub(crate) part: u64,
}

/// A group id, and which of its inner conversations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GroupKey {
    pub(crate) id: u32,
    pub(crate) space: Space,
}

impl fmt::Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id {
            u32::MAX => f.write_str("the group of all"),
            id => write!(f, "group {id}"),
        }
    }
}

/// The conversations of a group, which do not mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Space {
    /// Sends and receives of the caller.
    User = 0,
    /// Messages that make up the group's collectives.
    Collective = 1,
    /// Founding the group.
    Join = 2,
    /// The members on one host.
    Host = 3,
    /// The members of the same place on each host.
    Across = 4,
}

impl Space {
    const ALL: [Space; 5] = [Space::User, Space::Collective, Space::Join, Space::Host, Space::Across];
}

impl Header {
    pub(crate) fn encode(&self) -> [u64; HEADER_WORDS] {
        let kinds = self.kind as u64
            | (self.element as u64) << 8
            | u64::from(self.order == Order::Ring) << 16
            | (self.group.space as u64) << 24
            | u64::from(self.root) << 32;
        let place = u64::from(self.group.id) | u64::from(self.channel) << 32;
        [kinds, place, self.seq, self.tag.0, self.count, self.detail, self.message, self.part]
    }

    pub(crate) fn decode(words: &[u64]) -> Option<Header> {
        let &[kinds, place, seq, tag, count, detail, message, part, ..] = words else { return None };
        Some(Header {
            kind: *OpKind::ALL.get((kinds & 0xff) as usize)?,
            element: *ElementType::ALL.get((kinds >> 8 & 0xff) as usize)?,
            order: if kinds >> 16 & 1 == 1 { Order::Ring } else { Order::Tree },
            root: (kinds >> 32) as u32,
            group: GroupKey { id: place as u32, space: *Space::ALL.get((kinds >> 24 & 0xff) as usize)? },
            channel: (place >> 32) as u32,
            seq,
            tag: OpTag(tag),
            count,
            detail,
            message,
            part,
        })
    }

    /// Bytes of the message.
    pub(crate) fn bytes(&self) -> usize {
        (self.part as usize).saturating_mul(self.element.bytes())
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} {} ({}", self.kind, self.count, self.element, self.tag)?;
        match self.group.space {
            Space::User => write!(f, ", channel {}, message {}", self.channel, self.seq)?,
            _ => write!(f, ", number {}", self.seq)?,
        }
        if self.kind == OpKind::Broadcast {
            write!(f, ", root {}", self.root)?;
        }
        if self.order == Order::Ring {
            f.write_str(", ring order")?;
        }
        f.write_str(")")
    }
}

/// What to say when two ranks are not doing the same thing.
pub(crate) fn mismatch(here: usize, ours: &Header, there: usize, theirs: &Header) -> String {
    let hidden = Header { detail: theirs.detail, part: theirs.part, ..*ours } == *theirs;
    let note = if hidden { ", with other ranges" } else { "" };
    format!("{}: rank {here} is in {ours}, but rank {there} is in {theirs}{note}", ours.group)
}

pub(crate) fn hash_ranges(ranges: &[Range<usize>]) -> u64 {
    ranges.iter().fold(0x9e37_79b9_7f4a_7c15, |h: u64, r| {
        let h = (h ^ r.start as u64).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29);
        (h ^ r.end as u64).wrapping_mul(0xc4ce_b9fe_1a85_ec53).rotate_left(31)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_encoding() {
        for (kind, space) in OpKind::ALL.into_iter().zip(Space::ALL.into_iter().cycle()) {
            let header = Header {
                kind,
                element: ElementType::U8,
                order: Order::Ring,
                root: u32::MAX,
                group: GroupKey { id: 7, space },
                channel: 9,
                seq: 1 << 40,
                tag: OpTag(u64::MAX),
                count: 12,
                detail: 3,
                message: 8,
                part: 5,
            };
            assert_eq!(Header::decode(&header.encode()), Some(header));
        }
        assert_eq!(Header::decode(&[0xff; HEADER_WORDS]), None);
    }
}
