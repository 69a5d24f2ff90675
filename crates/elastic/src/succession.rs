//! Who hosts the store when its host has died: what the surviving agents agree on, and with what it begins.
//!
//! The store is one process, and what it holds goes with it. But every agent has read the agreed value a moment ago, and
//! each keeps an empty store of its own ready. When the host's agent *has died* (its door is shut, not only its
//! connection cut), everybody brings what it remembers to the first agent in the order of ids that lives. That one waits
//! for more than half of those who took part, takes the newest memory, and goes on from there in its own store: the round
//! is over, the next one forms without the dead.
//!
//! - *The old host does not go on*: it is known to be dead, not only out of reach.
//! - *No two heirs*: each needs more than half of the same electorate, and an agent gives its memory to another candidate
//!   only when the one before has died too.
//! - *Nothing that mattered is lost*: whoever took part in a round has read it, and has a vote. One that has not reached
//!   the store for as long as a heartbeat may have been given up by the others, and has none.

use crate::mutant::{Mutant, is_planted};
use crate::rendezvous::{Agreed, NodeId, Phase, regroup};
use core::time::Duration;

/// Those that the next host is chosen by and from, in order: all that take part or are expected back, but for the host.
pub fn electorate(memory: &Agreed) -> Vec<NodeId> {
    let mut all: Vec<NodeId> = memory.members.iter().map(|m| m.id.clone()).collect();
    if memory.phase == Phase::Joining {
        all.extend(memory.expected.iter().cloned());
    }
    all.sort();
    all.dedup();
    all.retain(|id| memory.host.as_ref() != Some(id));
    all
}

/// Whether an agent has a part in choosing the next host: its workers can go on, the host has died, and it has read the
/// agreed value within `heartbeat`, or has brought its memory already.
pub fn has_vote(memory: &Agreed, dead: &[NodeId], unread: Duration, heartbeat: Duration) -> bool {
    let died = |host: &NodeId| dead.contains(host) || is_planted(Mutant::Usurper);
    memory.recovers && memory.host.as_ref().is_some_and(died) && unread < heartbeat
}

/// Whom to bring one's memory: the first of the electorate that has not died.
pub fn candidate(memory: &Agreed, dead: &[NodeId]) -> Option<NodeId> {
    electorate(memory).into_iter().find(|id| !dead.contains(id))
}

/// What the candidate `me` puts into its store, once enough have brought their memories (its own among them); else what is
/// missing.
///
/// # Errors
/// Too few votes, in words. Those known to be `dead` are not waited for.
pub fn succeed(me: &NodeId, votes: &[(NodeId, Agreed)], dead: &[NodeId]) -> Result<Agreed, String> {
    let newest = votes.iter().map(|(_, memory)| memory).max_by_key(|m| (m.reign, m.version));
    let newest = newest.ok_or("nobody has brought what it remembers")?;
    let mut electorate = electorate(newest);
    electorate.retain(|id| !dead.contains(id));
    let here = electorate.iter().filter(|id| votes.iter().any(|(voter, _)| voter == *id)).count();
    if here * 2 <= electorate.len() {
        return Err(format!("{here} of {} agents are here, more than half are needed", electorate.len()));
    }
    let host = newest.host.as_ref();
    let name = newest.members.iter().find(|m| Some(&m.id) == host).map(|m| m.host.clone());
    let name = name.or_else(|| host.map(|id| id.addr.clone())).unwrap_or_default();
    let why = format!("node {name} is lost, which hosted the job's store: its agent has died");
    // A round that formed under the old host gets a new number too: seats in it may have been told.
    let mut next = regroup(newest, why);
    if is_planted(Mutant::SameRoundAgain) {
        next.round = newest.round;
    }
    next.expected.extend(electorate);
    next.expected.sort();
    next.expected.dedup();
    next.expected.retain(|id| host != Some(id) && !dead.contains(id));
    next.waiting.retain(|m| host != Some(&m.id) && !dead.contains(&m.id));
    (next.reign, next.host) = (newest.reign + 1, Some(me.clone()));
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::Member;

    fn id(name: &str) -> NodeId {
        NodeId { node_rank: 0, addr: name.into(), pid: 1, serial: 0 }
    }

    /// Nodes a to d run round 3, a hosts the store.
    fn memory() -> Agreed {
        let member = |name: &&str| Member {
            id: id(name),
            host: (*name).into(),
            nproc: 1,
            role: String::new(),
            master_port: 1,
            door: 1,
            standby: 1,
        };
        Agreed {
            round: 3,
            phase: Phase::Running,
            members: ["a", "b", "c", "d"].iter().map(member).collect(),
            host: Some(id("a")),
            recovers: true,
            version: 7,
            ..Agreed::default()
        }
    }

    fn check(voters: &[&str], dead: &[&str], expected: Result<(&str, u64, &[&str]), &str>) {
        let votes: Vec<(NodeId, Agreed)> = voters.iter().map(|v| (id(v), memory())).collect();
        let dead: Vec<NodeId> = dead.iter().map(|d| id(d)).collect();
        let me = candidate(&memory(), &dead).unwrap();
        match (succeed(&me, &votes, &dead), expected) {
            (Ok(next), Ok((host, round, back))) => {
                assert_eq!((next.host, next.round, next.reign), (Some(id(host)), round, 1));
                assert_eq!(next.expected, back.iter().map(|b| id(b)).collect::<Vec<_>>());
                assert!(next.members.is_empty() && next.phase == Phase::Joining);
                assert!(next.why.contains("node a is lost"), "{}", next.why);
            }
            (Err(missing), Err(expected)) => assert!(missing.contains(expected), "{missing}"),
            (found, _) => panic!("{voters:?} {dead:?}: {found:?}"),
        }
    }

    #[test]
    fn the_first_that_lives_takes_over_with_more_than_half() {
        check(&["b", "c"], &["a"], Ok(("b", 4, &["b", "c", "d"])));
        check(&["b"], &["a"], Err("1 of 3 agents are here, more than half are needed"));
        check(&["c"], &["a", "b"], Err("1 of 2 agents"));
        check(&["c", "d"], &["a", "b"], Ok(("c", 4, &["c", "d"])));
        check(&["d"], &["a", "b", "c"], Ok(("d", 4, &["d"])));
        check(&["b", "x", "y"], &["a"], Err("1 of 3 agents"));
        check(&[], &["a"], Err("nobody has brought"));
    }

    #[test]
    fn the_newest_memory_counts() {
        let newer = Agreed {
            version: 8,
            round: 4,
            phase: Phase::Joining,
            members: Vec::new(),
            expected: ["a", "b", "c", "d", "e"].map(id).to_vec(),
            ..memory()
        };
        let votes = [(id("b"), memory()), (id("c"), newer.clone())];
        assert!(succeed(&id("b"), &votes, &[id("a")]).unwrap_err().contains("2 of 4"));
        let votes = [votes.to_vec(), vec![(id("e"), newer)]].concat();
        let next = succeed(&id("b"), &votes, &[id("a")]).unwrap();
        assert_eq!((next.round, next.expected), (5, ["b", "c", "d", "e"].map(id).to_vec()));
    }

    #[test]
    fn a_host_that_is_only_out_of_reach_has_no_heir() {
        let s = Duration::from_secs;
        assert!(has_vote(&memory(), &[id("a")], s(1), s(5)));
        assert!(!has_vote(&memory(), &[id("b")], s(1), s(5)));
        assert!(!has_vote(&memory(), &[id("a")], s(6), s(5)), "it may have been given up");
        assert!(!has_vote(&Agreed { recovers: false, ..memory() }, &[id("a")], s(1), s(5)));
    }
}
