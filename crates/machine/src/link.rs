//! What messages take: from measured sizes and numbers of ranks.

use program::Collective;
use spec::{Error, Result};

use crate::table::{LinkKey, Machine, Message};

/// The operations of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkOp {
    /// Every member gets the sum.
    AllReduce,
    /// Every member gets all parts.
    AllGather,
    /// Every member gets its part of the sum.
    ReduceScatter,
    /// Every member sends each other one a part.
    AllToAll,
    /// One rank to another.
    Send,
}

impl LinkOp {
    /// All of them.
    pub const ALL: [LinkOp; 5] =
        [LinkOp::AllReduce, LinkOp::AllGather, LinkOp::ReduceScatter, LinkOp::AllToAll, LinkOp::Send];

    pub(crate) fn of(what: Collective) -> LinkOp {
        match what {
            Collective::AllReduce => LinkOp::AllReduce,
            Collective::AllGather => LinkOp::AllGather,
            Collective::ReduceScatter => LinkOp::ReduceScatter,
            // A hop is a message to the next while one comes from the one before.
            Collective::Send { .. } | Collective::Recv { .. } | Collective::Ring => LinkOp::Send,
            Collective::AllToAll => LinkOp::AllToAll,
        }
    }

    /// As written in the file.
    pub const fn name(self) -> &'static str {
        match self {
            LinkOp::AllReduce => "all_reduce",
            LinkOp::AllGather => "all_gather",
            LinkOp::ReduceScatter => "reduce_scatter",
            LinkOp::AllToAll => "all_to_all",
            LinkOp::Send => "send",
        }
    }
}

/// Seconds of one message or collective of `bytes` between `ranks` over `transport`.
///
/// Between measured sizes the time is interpolated in logarithms; a smaller buffer takes as long as the smallest, a
/// larger one has the bandwidth of the largest. Between measured numbers of ranks it is linear in their logarithm.
///
/// # Errors
/// If nothing was measured.
pub(crate) fn seconds(m: &Machine, transport: &str, op: LinkOp, ranks: usize, bytes: f64) -> Result<f64> {
    let of = m.links.iter().filter(|(k, _)| k.transport == transport && k.op == op.name());
    let at: Vec<(&LinkKey, f64)> = of.map(|(k, messages)| (k, by_size(messages, bytes))).collect();
    let exact = |(k, s): &(&LinkKey, f64)| (k.ranks == ranks || op == LinkOp::Send).then_some(*s);
    if let Some(s) = at.iter().find_map(exact) {
        return Ok(s);
    }
    let missing = || {
        Error::user(format!("the calibration of {} knows nothing of {} over {transport}", m.host, op.name()))
            .hint("measure this machine again: phalanx bench machine")
    };
    // Keys are in the order of their ranks.
    let above = at.iter().position(|(k, _)| k.ranks > ranks).unwrap_or(at.len());
    let (low, high) = (
        above.saturating_sub(1).min(at.len().saturating_sub(2)),
        above.max(1).min(at.len().saturating_sub(1)),
    );
    let (low, high) = (at.get(low).ok_or_else(missing)?, at.get(high.max(low)).ok_or_else(missing)?);
    let log = |n: usize| (n.max(1) as f64).log2();
    if low.0.ranks == high.0.ranks {
        return Ok(low.1 * (log(ranks) / log(low.0.ranks).max(1.0)).max(1.0));
    }
    let share = (log(ranks) - log(low.0.ranks)) / (log(high.0.ranks) - log(low.0.ranks));
    Ok((low.1 + share * (high.1 - low.1)).max(low.1.min(high.1)))
}

/// The time at a size; `messages` are in the order of their sizes.
fn by_size(messages: &[Message], bytes: f64) -> f64 {
    let (first, last) = (messages[0], messages[messages.len() - 1]);
    if bytes <= first.bytes {
        return first.s;
    }
    if bytes >= last.bytes {
        return last.s * bytes / last.bytes;
    }
    let above = messages.iter().position(|m| m.bytes >= bytes).unwrap_or(messages.len() - 1).max(1);
    let (a, b) = (messages[above - 1], messages[above]);
    let share = (bytes / a.bytes).ln() / (b.bytes / a.bytes).ln();
    (a.s.ln() + share * (b.s / a.s).ln()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_between_and_beyond_the_measured() {
        let m = |bytes, s| Message { bytes, s };
        let messages = [m(1e3, 1e-6), m(1e5, 1e-5), m(1e7, 1e-3)];
        assert_eq!(by_size(&messages, 10.0), 1e-6);
        assert!((by_size(&messages, 1e5) - 1e-5).abs() < 1e-18);
        assert!((by_size(&messages, 1e6) - 1e-4).abs() < 1e-12);
        assert!((by_size(&messages, 4e7) - 4e-3).abs() < 1e-12);
    }
}
