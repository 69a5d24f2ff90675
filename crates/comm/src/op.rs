use crate::element::{ElementType, Order, RawSlice};
use crate::header::{OpKind, hash_ranges};
use spec::{Error, Result, shares};
use std::borrow::Cow;
use std::ops::Range;

/// Ranges of elements, one per member of the group, in its order.
pub type Ranges<'a> = Cow<'a, [Range<usize>]>;

/// An operation of a group, as data. The buffers of all members have the same element type and, where nothing else
/// is said, the same length.
#[derive(Clone, Debug)]
pub enum Op<'a> {
    /// Every member's `buffer` becomes the sum of all.
    AllReduce {
        /// Read and written.
        buffer: RawSlice,
        /// The order of additions.
        order: Order,
    },
    /// Member i gets range i of the sum of all inputs.
    ReduceScatter {
        /// The whole length on every member.
        input: RawSlice,
        /// The own range; `None`: it is written in place, into the own range of `input`.
        output: Option<RawSlice>,
        /// Equal on all members; they may be uneven or empty and do not overlap.
        ranges: Ranges<'a>,
        /// The order of additions.
        order: Order,
    },
    /// Range i of every output becomes member i's input.
    AllGather {
        /// The own range; `None`: it is already in place in `output`.
        input: Option<RawSlice>,
        /// The whole length on every member.
        output: RawSlice,
        /// Equal on all members; they may be uneven or empty and do not overlap.
        ranges: Ranges<'a>,
    },
    /// Output range i becomes what member i has in its input range for this one.
    AllToAll {
        /// What is sent.
        input: RawSlice,
        /// For each member the part of `input` that goes there.
        input_ranges: Ranges<'a>,
        /// What is received; it does not overlap `input`.
        output: RawSlice,
        /// For each member the part of `output` that comes from there.
        output_ranges: Ranges<'a>,
    },
    /// Every member's buffer becomes the root's.
    Broadcast {
        /// Read on the root, written elsewhere.
        buffer: RawSlice,
        /// Group index of the root.
        root: usize,
    },
    /// To one member, first in, first out per (group, channel).
    Send {
        /// Read only.
        buffer: RawSlice,
        /// Group index of the receiver.
        to: usize,
        /// Any number that sender and receiver agree on.
        channel: u32,
    },
    /// From one member.
    Recv {
        /// Written; it has exactly the length that was sent.
        buffer: RawSlice,
        /// Group index of the sender.
        from: usize,
        /// As the sender's.
        channel: u32,
    },
    /// Ends once all members have begun it.
    Barrier,
}

impl Op<'_> {
    /// The kind of the operation.
    pub fn kind(&self) -> OpKind {
        match self {
            Op::AllReduce { .. } => OpKind::AllReduce,
            Op::ReduceScatter { .. } => OpKind::ReduceScatter,
            Op::AllGather { .. } => OpKind::AllGather,
            Op::AllToAll { .. } => OpKind::AllToAll,
            Op::Broadcast { .. } => OpKind::Broadcast,
            Op::Send { .. } => OpKind::Send,
            Op::Recv { .. } => OpKind::Recv,
            Op::Barrier => OpKind::Barrier,
        }
    }

    /// The same operation with ranges of its own.
    pub fn into_owned(self) -> Op<'static> {
        let own = |ranges: Ranges<'_>| Ranges::Owned(ranges.into_owned());
        match self {
            Op::AllReduce { buffer, order } => Op::AllReduce { buffer, order },
            Op::ReduceScatter { input, output, ranges, order } => {
                Op::ReduceScatter { input, output, ranges: own(ranges), order }
            }
            Op::AllGather { input, output, ranges } => Op::AllGather { input, output, ranges: own(ranges) },
            Op::AllToAll { input, input_ranges, output, output_ranges } => Op::AllToAll {
                input,
                input_ranges: own(input_ranges),
                output,
                output_ranges: own(output_ranges),
            },
            Op::Broadcast { buffer, root } => Op::Broadcast { buffer, root },
            Op::Send { buffer, to, channel } => Op::Send { buffer, to, channel },
            Op::Recv { buffer, from, channel } => Op::Recv { buffer, from, channel },
            Op::Barrier => Op::Barrier,
        }
    }

    /// Payload bytes that member `me` of `size` sends, as [`Group::sent_bytes`](crate::Group::sent_bytes) defines them.
    pub(crate) fn sent_bytes(&self, size: usize, me: usize) -> u64 {
        let of_others = |ranges: &[Range<usize>]| -> usize {
            ranges.iter().enumerate().filter(|(member, _)| *member != me).map(|(_, r)| r.len()).sum()
        };
        let (elements, element) = match self {
            Op::AllReduce { buffer, .. } => {
                let own = shares::aligned(buffer.count, size, me).len();
                (buffer.count - own + own * (size - 1), buffer.element)
            }
            Op::ReduceScatter { input, ranges, .. } => (of_others(ranges), input.element),
            Op::AllGather { output, ranges, .. } => (ranges[me].len() * (size - 1), output.element),
            Op::AllToAll { input, input_ranges, .. } => (of_others(input_ranges), input.element),
            Op::Broadcast { buffer, root } if *root == me => (buffer.count * (size - 1), buffer.element),
            Op::Send { buffer, .. } => (buffer.count, buffer.element),
            Op::Broadcast { .. } | Op::Recv { .. } | Op::Barrier => return 0,
        };
        elements as u64 * element.bytes() as u64
    }

    /// The part of the header that must be equal on all members.
    pub(crate) fn summary(&self) -> Summary {
        let nothing = Summary { element: ElementType::U8, count: 0, order: Order::Tree, root: 0, detail: 0 };
        let of = |b: &RawSlice| Summary { element: b.element, count: b.count as u64, ..nothing };
        match self {
            Op::AllReduce { buffer, order } => Summary { order: *order, ..of(buffer) },
            Op::ReduceScatter { input, ranges, order, .. } => {
                Summary { order: *order, detail: hash_ranges(ranges), ..of(input) }
            }
            Op::AllGather { output, ranges, .. } => Summary { detail: hash_ranges(ranges), ..of(output) },
            // Members may send different amounts; each pair compares its own.
            Op::AllToAll { input, .. } => Summary { count: 0, ..of(input) },
            Op::Broadcast { buffer, root } => Summary { root: *root as u32, ..of(buffer) },
            Op::Send { buffer, .. } | Op::Recv { buffer, .. } => of(buffer),
            Op::Barrier => nothing,
        }
    }

    /// Checks what one member can know alone.
    pub(crate) fn check(&self, size: usize, me: usize) -> Result<()> {
        let kind = self.kind();
        let wrong = |what: String| Err(Error::failure(format!("{kind}: {what}")));
        match self {
            Op::ReduceScatter { input, output, ranges, .. } => {
                check_ranges(kind, ranges, input.count, size)?;
                check_own(kind, "output", output.as_ref(), input.element, ranges[me].len())
            }
            Op::AllGather { input, output, ranges } => {
                check_ranges(kind, ranges, output.count, size)?;
                check_own(kind, "input", input.as_ref(), output.element, ranges[me].len())
            }
            Op::AllToAll { input, input_ranges, output, output_ranges } => {
                check_ranges(kind, input_ranges, input.count, size)?;
                check_ranges(kind, output_ranges, output.count, size)?;
                let (kept, got) = (input_ranges[me].len(), output_ranges[me].len());
                if input.element != output.element || kept != got {
                    return wrong(format!(
                        "sends itself {kept} {} and expects {got} {}",
                        input.element, output.element
                    ));
                }
                Ok(())
            }
            Op::Broadcast { root, .. } if *root >= size => wrong(format!("root {root} in a group of {size}")),
            Op::Send { to: other, .. } | Op::Recv { from: other, .. } if *other >= size || *other == me => {
                wrong(format!("member {me} of {size} names member {other}"))
            }
            _ => Ok(()),
        }
    }
}

/// What members compare.
#[derive(Clone, Copy)]
pub(crate) struct Summary {
    pub(crate) element: ElementType,
    pub(crate) count: u64,
    pub(crate) order: Order,
    pub(crate) root: u32,
    pub(crate) detail: u64,
}

fn check_ranges(kind: OpKind, ranges: &[Range<usize>], count: usize, size: usize) -> Result<()> {
    if ranges.len() != size {
        return Err(Error::failure(format!("{kind}: {} ranges in a group of {size}", ranges.len())));
    }
    if let Some(r) = ranges.iter().find(|r| r.start > r.end || r.end > count) {
        return Err(Error::failure(format!("{kind}: range {}..{} of {count} elements", r.start, r.end)));
    }
    Ok(())
}

fn check_own(
    kind: OpKind,
    name: &str,
    span: Option<&RawSlice>,
    element: ElementType,
    count: usize,
) -> Result<()> {
    match span {
        Some(s) if s.element != element || s.count != count => Err(Error::failure(format!(
            "{kind}: {name} of {} {}, expected {count} {element}",
            s.count, s.element
        ))),
        _ => Ok(()),
    }
}
