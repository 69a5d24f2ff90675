//! Nodes meeting: who takes part in which round of the job, and who is told when one fails or vanishes.
//!
//! All nodes agree on one value, [`Agreed`], in the key-value store, changed by compare-and-set. [`Node::step`] is the
//! whole protocol: a pure function from (what this node wants, what is in the store, the time) to actions.
//! The agent's driver reads, writes and keeps time for it.
//!
//! - A *round* is one set of nodes with ranks. Nodes join it while it forms; it starts at once with the most nodes, or
//!   when all that are expected back have come, or with the fewest once nobody has come for the last-call time.
//! - Group ranks are the order of the nodes' ids: node rank, then address, process id and serial number.
//! - A failed node with restarts left calls for a new round; the others see it and restart without spending theirs.
//! - A node shows that it lives by a counter in the store. Each node watches its next two neighbours' counters on its own
//!   clock; one that stands still for the keep-alive time is removed and the round ends for all survivors at once.
//! - Success closes the job when every node is done; a failure for good closes it at once.

mod agreed;
mod step;

pub(crate) use agreed::regroup;
pub use agreed::{Agreed, Closed, Member, NodeId, Phase, Rules, Seat, Strike};
pub use step::{Action, News, Node, Offer, Wish};

use core::time::Duration;

/// More workers than this on one node is a typing error; it also bounds what is kept per worker.
pub const MAX_NPROC: usize = 4096;

/// How long the nodes wait for each other; torchrun's names and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// For enough nodes to come.
    pub join: Duration,
    /// For more nodes, once there are enough.
    pub last_call: Duration,
    /// For the others to see that the job is closed.
    pub close: Duration,
    /// For one exchange with the store.
    pub heartbeat: Duration,
    /// Between two signs of life.
    pub keep_alive_interval: Duration,
    /// Signs of life that may be missed.
    pub keep_alive_max_attempt: u32,
    /// For the other nodes to be done too, after success.
    pub exit_barrier: Duration,
}

impl Times {
    /// The keys of `--rdzv-conf`.
    pub const KEYS: &'static [&'static str] = &[
        "join_timeout",
        "last_call_timeout",
        "close_timeout",
        "heartbeat_timeout",
        "keep_alive_interval",
        "keep_alive_max_attempt",
        "exit_barrier_timeout",
        "is_host",
    ];

    /// After this long without a sign of life a node counts as dead.
    pub fn dead_after(&self) -> Duration {
        self.keep_alive_interval * self.keep_alive_max_attempt
    }
}

impl Default for Times {
    fn default() -> Self {
        let s = Duration::from_secs;
        Times {
            join: s(600),
            last_call: s(30),
            close: s(30),
            heartbeat: s(5),
            keep_alive_interval: s(5),
            keep_alive_max_attempt: 3,
            exit_barrier: s(300),
        }
    }
}
