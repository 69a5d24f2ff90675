//! What an agent and its ranks tell each other over the socket between them: a value a line, as JSON.
//!
//! The agent makes a pair of connected sockets for each rank that it starts and hands over one end; the variable
//! [`AGENT_FD`] holds its number. Whoever sees the end of the stream knows that the other is gone.

use serde::{Deserialize, Serialize};
use spec::{Error, Result};

/// The variable that tells a rank the number of its end of the socket.
pub const AGENT_FD: &str = "PHALANX_AGENT_FD";

/// From the agent: the ranks meet again, in another world. Whoever gets this leaves the world that it is in, keeps its
/// memory, and joins the new one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// Number of the round, counting from 0: the first is told by the environment.
    pub round: u64,
    /// Rank in the new world.
    pub rank: usize,
    /// Ranks of the new world.
    pub world: usize,
    /// Rank among those of this host.
    pub local_rank: usize,
    /// Ranks of this host.
    pub local_world: usize,
    /// `host:port` of the store where they meet.
    pub store: String,
    /// Prefix of the keys there, as `PHALANX_SESSION`.
    pub session: String,
    /// Why they meet again, for people: who was lost or came.
    pub why: String,
}

/// From a rank to its agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// Orders to meet again will be obeyed from now on: the rank need not be killed when another is lost.
    CanRecover,
    /// The rank lives: ops that it has run so far, messages that it waited for included. Said several times a second from
    /// a thread of its own.
    Beat {
        /// Stands still if the rank hangs inside an op.
        ops: u64,
        /// Whether it waits for another rank: then standing still is not its fault.
        waits: bool,
    },
    /// A step is done, and what memory holds of it can be lost no more.
    Step {
        /// Steps done so far.
        step: u64,
    },
    /// The world that the rank was in has failed; it waits for orders.
    Stranded {
        /// The rank that its message blames, if any.
        lost: Option<usize>,
        /// In its own words.
        why: String,
    },
}

impl Orders {
    /// As a line, its end included.
    pub fn line(&self) -> String {
        line(self)
    }

    /// From a line.
    ///
    /// # Errors
    /// It says something else.
    pub fn read(text: &str) -> Result<Orders> {
        read(text, "orders of the agent")
    }
}

impl Report {
    /// As a line, its end included.
    pub fn line(&self) -> String {
        line(self)
    }

    /// From a line.
    ///
    /// # Errors
    /// It says something else.
    pub fn read(text: &str) -> Result<Report> {
        read(text, "a rank's report")
    }
}

fn line(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain values are JSON") + "\n"
}

fn read<T: for<'de> Deserialize<'de>>(text: &str, what: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::failure(format!("{what}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_a_value() {
        let orders = Orders {
            round: 2,
            rank: 1,
            world: 3,
            local_rank: 1,
            local_world: 3,
            store: "127.0.0.1:1".into(),
            session: "job/2".into(),
            why: "rank 2 was\nkilled".into(),
        };
        let line = orders.line();
        assert_eq!(line.find('\n'), Some(line.len() - 1));
        assert_eq!(Orders::read(&line).unwrap(), orders);
        for report in [
            Report::CanRecover,
            Report::Beat { ops: 7, waits: true },
            Report::Step { step: 3 },
            Report::Stranded { lost: None, why: "?".into() },
        ] {
            assert_eq!(Report::read(&report.line()).unwrap(), report);
        }
        assert!(Report::read("{}").is_err());
    }
}
