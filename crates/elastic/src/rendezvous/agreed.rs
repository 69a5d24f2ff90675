//! What the nodes agree on: who takes part in which round.

use super::MAX_NPROC;
use crate::mutant::{Mutant, is_planted};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who a node is; the order of ids is the order of group ranks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId {
    /// The node rank that was asked for, 0 if none was.
    pub node_rank: usize,
    /// Its address, as the other nodes see it.
    pub addr: String,
    /// Process id of its agent.
    pub pid: u32,
    /// Tells agents of one process apart.
    pub serial: u32,
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.node_rank, self.addr, self.pid, self.serial)
    }
}

/// A node that takes part, or wants to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Who it is.
    pub id: NodeId,
    /// Its name, for people.
    pub host: String,
    /// Its workers.
    pub nproc: usize,
    /// The role of its workers.
    pub role: String,
    /// A port that is free on it, for the workers' own store if it becomes group rank 0.
    pub master_port: u16,
    /// A port that its agent holds open as long as it lives; 0 if none.
    pub door: u16,
    /// The port of the store that it keeps ready, should the job's store be lost; 0 if none.
    pub standby: u16,
}

/// Whether a round still forms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nodes join.
    #[default]
    Joining,
    /// The members have their ranks.
    Running,
}

/// How the job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Closed {
    /// Every node is done.
    Succeeded,
    /// It cannot go on; the text names the node and the cause.
    Failed(String),
}

/// What all nodes must agree on before they agree on anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Fewest nodes.
    pub min: usize,
    /// Most nodes.
    pub max: usize,
    /// Node ranks are given and must be 0 to `max` - 1, each once.
    pub is_static: bool,
}

/// The agreed value in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// Rules of the first node; others must have the same.
    pub rules: Rules,
    /// Number of the round, counting from 0.
    pub round: u64,
    /// Whether it runs.
    pub phase: Phase,
    /// Its nodes, sorted by id.
    pub members: Vec<Member>,
    /// Members whose workers have succeeded.
    pub done: Vec<NodeId>,
    /// Nodes that came while the round ran: new ones if there is room, else spares.
    pub waiting: Vec<Member>,
    /// Nodes expected back in the round that forms.
    pub expected: Vec<NodeId>,
    /// Why the round before ended.
    pub why: String,
    /// How the job ended.
    pub closed: Option<Closed>,
    /// Nodes that have seen it.
    pub seen: Vec<NodeId>,
    /// Whether the job's workers can meet again without being started over.
    pub recovers: bool,
    /// Whether a step was done in this round.
    pub stepped: bool,
    /// Nodes that were lost before a step was done, the last time they took part.
    pub strikes: Vec<Strike>,
    /// The node whose agent runs the store.
    pub host: Option<NodeId>,
    /// How often the store has moved to another host.
    pub reign: u64,
    /// How often this value was written.
    pub version: u64,
}

/// A node that was lost again and again; another process on it counts as the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strike {
    /// The node rank that was asked for.
    pub node_rank: usize,
    /// Its address.
    pub addr: String,
    /// Times in a row.
    pub count: u32,
    /// The last time, in words.
    pub why: String,
}

impl Agreed {
    /// Reads what is in the store, which any process may have written: numbers are such that no sum overflows.
    ///
    /// # Errors
    /// It is no such value, or no job has so many workers or rounds.
    pub fn read(bytes: &[u8]) -> Result<Agreed, String> {
        let shared: Agreed = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let wrong =
            shared.members.iter().chain(&shared.waiting).find(|m| !(1..=MAX_NPROC).contains(&m.nproc));
        match wrong {
            Some(m) => Err(format!("{} workers on {}, expected 1 to {MAX_NPROC}", m.nproc, m.host)),
            None if shared.round > u64::from(u32::MAX) => Err(format!("round {}", shared.round)),
            None => Ok(shared),
        }
    }
}

/// A node's place in a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    /// The round.
    pub round: u64,
    /// Place among the nodes.
    pub group_rank: usize,
    /// Number of nodes.
    pub group_world: usize,
    /// Rank of the node's first worker.
    pub base_rank: usize,
    /// Number of workers on all nodes.
    pub world: usize,
    /// Place of the node's first worker among those with its role.
    pub role_base_rank: usize,
    /// Number of workers with its role.
    pub role_world: usize,
    /// Address of group rank 0.
    pub master_addr: String,
    /// Free port on it.
    pub master_port: u16,
    /// Host names by group rank.
    pub nodes: Vec<String>,
}

impl Strike {
    pub(super) fn is(&self, id: &NodeId) -> bool {
        (self.node_rank, &self.addr) == (id.node_rank, &id.addr)
    }
}

/// Notes one more loss.
pub(super) fn strike(strikes: &mut Vec<Strike>, lost: &NodeId, why: &str) {
    let why = why.to_owned();
    match strikes.iter_mut().find(|s| s.is(lost)) {
        Some(known) => (known.count, known.why) = (known.count.saturating_add(1), why),
        None => {
            strikes.push(Strike { node_rank: lost.node_rank, addr: lost.addr.clone(), count: 1, why });
        }
    }
}

/// Ends the round: its members, and the nodes that waited, are expected in the next.
pub(crate) fn regroup(shared: &Agreed, why: String) -> Agreed {
    let room = shared.rules.max.saturating_sub(shared.members.len());
    let expected =
        shared.members.iter().chain(shared.waiting.iter().take(room)).map(|m| m.id.clone()).collect();
    Agreed {
        round: shared.round + u64::from(!is_planted(Mutant::SameRound)),
        phase: Phase::Joining,
        members: Vec::new(),
        done: Vec::new(),
        expected,
        why,
        ..shared.clone()
    }
}

/// The place of `id` in the round: ranks are prefix sums of the workers in the order of ids.
pub(super) fn seat(shared: &Agreed, id: &NodeId) -> Option<Seat> {
    let group_rank = shared.members.iter().position(|m| m.id == *id)?;
    let (before, me) = (&shared.members[..group_rank], &shared.members[group_rank]);
    let count = |members: &[Member]| members.iter().map(|m| m.nproc).sum::<usize>();
    let of_role = |members: &[Member]| members.iter().filter(|m| m.role == me.role).map(|m| m.nproc).sum();
    let master = shared.members.first()?;
    Some(Seat {
        round: shared.round,
        group_rank,
        group_world: shared.members.len(),
        base_rank: if is_planted(Mutant::RanksOverlap) { 0 } else { count(before) },
        world: count(&shared.members),
        role_base_rank: of_role(before),
        role_world: of_role(&shared.members),
        master_addr: master.id.addr.clone(),
        master_port: master.master_port,
        nodes: shared.members.iter().map(|m| m.host.clone()).collect(),
    })
}
