//! The protocol, pure: no clock, no store, no randomness.

use super::Times;
use super::agreed::{Agreed, Closed, Member, NodeId, Phase, Rules, Seat, regroup, seat, strike};
use crate::crew::KEEPS_FAILING;
use crate::mutant::{Mutant, is_planted};
use core::time::Duration;
use std::collections::BTreeMap;

/// Neighbours that each node watches: two, so that a node and its watcher may die together.
const WATCHED: usize = 2;

/// What the agent wants; the last wish holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing: keep alive.
    Wait,
    /// A place in the next round.
    Join,
    /// The workers of this round run.
    Run(u64),
    /// The workers of this round failed: a new round.
    Regroup(u64, String),
    /// The workers of this round have succeeded.
    Finish(u64),
    /// The job cannot go on.
    Close(String),
    /// This node goes, the others may go on.
    Leave(String),
}

/// What a node brings into the next round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// A port that is free on it.
    pub master_port: u16,
    /// Its workers.
    pub nproc: usize,
}

/// What the driver does for a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write this, if the store still holds what the step was given.
    Put(Box<Agreed>),
    /// Tell the agent.
    Tell(News),
}

/// What the agent is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// It has a place: start the workers.
    Seated(Seat),
    /// The round is over: stop the workers and wish to join again.
    Regroup(String),
    /// The round runs without this node, which waits for a place; workers that it has kept have no part in the job.
    Spare,
    /// The job is over.
    Closed(Closed),
    /// This node has left.
    Left,
    /// This node cannot take part; what failed and what to do.
    Refused(String, String),
}

/// One node's side of the protocol.
#[derive(Clone, Debug)]
pub struct Node {
    me: Member,
    rules: Rules,
    times: Times,
    /// Whether the job may wait for another node in place of a lost one.
    patient: bool,
    /// The store lives in this agent, so it goes last.
    is_host: bool,
    wish: Wish,
    wished_at: Duration,
    /// The set of nodes that were joining, and since when it has not changed.
    joining: (u64, Vec<NodeId>, Duration),
    /// What this node's workers have shown: that they can recover, and the last round in which they did a step.
    progress: (bool, Option<u64>),
    /// The last round that the agent knows to run without this node.
    spare: Option<u64>,
    /// Watched nodes whose agents have ended for sure.
    gone: Vec<NodeId>,
    beats: BTreeMap<NodeId, (i64, Duration)>,
}

impl Node {
    /// A node that wants nothing yet. Times are since any fixed moment.
    pub fn new(me: Member, rules: Rules, times: Times, patient: bool, is_host: bool) -> Node {
        let joining = (0, Vec::new(), Duration::ZERO);
        let (wish, wished_at, beats) = (Wish::Wait, Duration::ZERO, BTreeMap::new());
        let (progress, spare, gone) = ((false, None), None, Vec::new());
        Node { me, rules, times, patient, is_host, wish, wished_at, joining, progress, spare, gone, beats }
    }

    /// The agent changed its mind; it may offer another port and other workers.
    pub fn wish(&mut self, wish: Wish, offer: Option<Offer>, now: Duration) {
        self.wish = wish;
        self.wished_at = now;
        if let Some(offer) = offer {
            (self.me.master_port, self.me.nproc) = (offer.master_port, offer.nproc);
        }
    }

    /// The workers can recover; those of `stepped` have done a step.
    pub fn note(&mut self, stepped: Option<u64>) {
        self.progress = (true, stepped.max(self.progress.1));
    }

    /// The store has moved: perhaps to this agent.
    pub fn moved(&mut self, host: &NodeId) {
        self.is_host = *host == self.me.id;
        self.beats.clear();
        self.gone.clear();
    }

    /// Whether its workers can recover.
    pub fn recovers(&self) -> bool {
        self.progress.0
    }

    /// Who this node is.
    pub fn id(&self) -> &NodeId {
        &self.me.id
    }

    /// What it wants now.
    pub fn wanted(&self) -> &Wish {
        &self.wish
    }

    /// The agents of these nodes have ended: nobody need wait for signs of life.
    pub fn gone(&mut self, nodes: Vec<NodeId>) {
        self.gone = nodes;
    }

    /// The nodes whose counters this node should read.
    pub fn watched(&self, shared: &Agreed) -> Vec<NodeId> {
        let here = shared.members.iter().chain(&shared.waiting).map(|m| &m.id);
        let mut others: Vec<&NodeId> = here.chain(&shared.expected).collect();
        others.sort();
        others.dedup();
        let next = others.partition_point(|id| **id <= self.me.id);
        let ring = others.iter().cycle().skip(next).take(others.len());
        ring.filter(|id| ***id != self.me.id).take(WATCHED).map(|id| (*id).clone()).collect()
    }

    /// Looks at what is in the store and at the counters of the watched nodes, and says what to do.
    /// A `Put` comes alone: what follows from it is decided when it is in the store.
    pub fn step(&mut self, shared: &Agreed, beats: &[(NodeId, i64)], now: Duration) -> Vec<Action> {
        if let Some(action) = self.closing(shared, now) {
            return action;
        }
        if let Some((dead, cause)) = self.first_dead(shared, beats, now) {
            return put(self.without(shared, &dead, &cause));
        }
        match self.wish.clone() {
            Wish::Wait => Vec::new(),
            Wish::Join => self.join(shared, now),
            Wish::Run(round) => self.run(shared, round),
            Wish::Finish(round) => self.finish(shared, round, now),
            Wish::Regroup(round, why) => {
                if shared.round == round {
                    put(regroup(shared, why))
                } else {
                    self.tell(News::Regroup(shared.why.clone()))
                }
            }
            // Whoever was never part of it does not end it.
            Wish::Close(_) if shared.phase == Phase::Running && !self.takes_part(shared) => {
                self.tell(News::Left)
            }
            Wish::Close(why) => {
                let closed = Some(Closed::Failed(why));
                put(Agreed { closed, ..shared.clone() })
            }
            // The store goes with its host, and nobody can go on without it.
            Wish::Leave(why) if self.is_host => {
                let closed =
                    Some(Closed::Failed(format!("{} hosted the job's store and left: {why}", self.me.host)));
                put(Agreed { closed, ..shared.clone() })
            }
            Wish::Leave(why) => {
                if self.takes_part(shared) {
                    put(self.without(shared, &self.me.id, &why))
                } else {
                    self.tell(News::Left)
                }
            }
        }
    }

    fn takes_part(&self, shared: &Agreed) -> bool {
        shared.members.iter().chain(&shared.waiting).any(|m| m.id == self.me.id)
    }

    /// Tells the agent once.
    fn tell(&mut self, news: News) -> Vec<Action> {
        self.wish = Wish::Wait;
        vec![Action::Tell(news)]
    }

    /// After the job was closed: note that this node has seen it; the store's host waits for the others to.
    fn closing(&mut self, shared: &Agreed, now: Duration) -> Option<Vec<Action>> {
        let closed = shared.closed.as_ref()?;
        let of_the_job = |id: &NodeId| shared.members.iter().chain(&shared.waiting).any(|m| m.id == *id);
        if of_the_job(&self.me.id) && !shared.seen.contains(&self.me.id) {
            self.wished_at = now;
            let mut next = shared.clone();
            next.seen.push(self.me.id.clone());
            return Some(put(next));
        }
        // A member that died unseen would be waited for in vain, so the wait has a bound.
        let all = shared.members.iter().chain(&shared.waiting).all(|m| shared.seen.contains(&m.id));
        let patience = self.times.close.min(self.times.dead_after());
        if self.is_host && !all && now.saturating_sub(self.wished_at) < patience {
            return Some(Vec::new());
        }
        Some(match self.wish {
            Wish::Wait => Vec::new(),
            _ => self.tell(News::Closed(closed.clone())),
        })
    }

    /// A watched node whose agent has ended or whose counter has stood still for too long, and how it is known.
    fn first_dead(
        &mut self,
        shared: &Agreed,
        beats: &[(NodeId, i64)],
        now: Duration,
    ) -> Option<(NodeId, String)> {
        let watched = self.watched(shared);
        self.beats.retain(|id, _| watched.contains(id));
        for id in watched {
            // No counter at all is a node that died before its first sign of life.
            let beat = beats.iter().find(|(i, _)| *i == id).map_or(-1, |(_, b)| *b);
            let last = self.beats.entry(id.clone()).or_insert((beat, now));
            if last.0 != beat {
                *last = (beat, now);
            }
            let finished = shared.phase == Phase::Running && shared.done.contains(&id);
            if !finished && self.gone.contains(&id) {
                return Some((id, "its agent has died".into()));
            }
            let silent = now.saturating_sub(last.1) >= self.times.dead_after();
            if !finished && silent && !is_planted(Mutant::DeadStay) {
                let after = self.times.dead_after().as_secs_f64();
                return Some((id, format!("no sign of life for {after:.1} s")));
            }
        }
        None
    }

    /// The shared value after `lost` went.
    fn without(&self, shared: &Agreed, lost: &NodeId, cause: &str) -> Agreed {
        let mut next = shared.clone();
        let host = shared.members.iter().chain(&shared.waiting).find(|m| m.id == *lost);
        let host = host.map_or_else(|| lost.addr.clone(), |m| m.host.clone());
        let was_member = shared.members.iter().any(|m| m.id == *lost);
        next.members.retain(|m| m.id != *lost);
        next.waiting.retain(|m| m.id != *lost);
        let was_expected = shared.expected.contains(lost);
        next.expected.retain(|id| id != lost);
        let of_a_round = if shared.phase == Phase::Joining { was_expected } else { was_member };
        if !of_a_round || shared.done.contains(lost) {
            return next;
        }
        let why = format!("node {host} (agent pid {}) is lost: {cause}", lost.pid);
        // In a round that forms there is nothing yet that a step could be done in.
        if shared.recovers && (shared.phase == Phase::Joining || !shared.stepped) {
            strike(&mut next.strikes, lost, cause);
        }
        let mut left: Vec<&NodeId> = next.members.iter().chain(&next.waiting).map(|m| &m.id).collect();
        left.extend(&next.expected);
        left.sort();
        left.dedup();
        let left = left.len();
        if left < self.rules.min && !self.patient {
            next.closed = Some(Closed::Failed(format!(
                "{why}; {left} of at least {} nodes are left and no restart is allowed",
                self.rules.min
            )));
            next.why.clone_from(&why);
            return next;
        }
        if shared.phase == Phase::Joining {
            return Agreed { why, ..next };
        }
        regroup(&next, why)
    }

    fn join(&mut self, shared: &Agreed, now: Duration) -> Vec<Action> {
        let is_fresh = shared.members.is_empty() && shared.waiting.is_empty() && shared.round == 0;
        if !is_fresh && shared.rules != self.rules {
            let (theirs, mine) = (shared.rules, self.rules);
            let first = shared.members.first().or(shared.waiting.first()).map_or("another node", |m| &m.host);
            return self.tell(News::Refused(
                format!(
                    "{} wants --nnodes={}:{} (static: {}), but {first} started the job with --nnodes={}:{} (static: {})",
                    self.me.host, mine.min, mine.max, mine.is_static, theirs.min, theirs.max, theirs.is_static
                ),
                "give all nodes the same --nnodes and --rdzv-backend, and other jobs another --rdzv-id".into(),
            ));
        }
        if let Some(bad) = shared
            .strikes
            .iter()
            .find(|s| s.is(&self.me.id) && s.count >= KEEPS_FAILING)
            .filter(|_| !is_planted(Mutant::NoStrikes))
        {
            return self.tell(News::Refused(
                format!(
                    "node {} is kept out: it was lost {} times in a row before a step was done, the last time: {}",
                    self.me.host, bad.count, bad.why
                ),
                "see what is wrong with it; the job goes on with the other nodes".into(),
            ));
        }
        let is_member = shared.members.iter().any(|m| m.id == self.me.id);
        match (shared.phase, is_member) {
            (Phase::Running, true) => match seat(shared, &self.me.id) {
                Some(seat) => {
                    self.wish = Wish::Run(seat.round);
                    vec![Action::Tell(News::Seated(seat))]
                }
                None => Vec::new(),
            },
            (Phase::Running, false) => {
                if shared.waiting.iter().any(|m| m.id == self.me.id) {
                    let told = self.spare.replace(shared.round) == Some(shared.round);
                    return if told { Vec::new() } else { vec![Action::Tell(News::Spare)] };
                }
                let mut next = shared.clone();
                next.waiting.push(self.me.clone());
                put(next)
            }
            (Phase::Joining, false) => self.enter(shared),
            (Phase::Joining, true) => self.start_or_wait(shared, now),
        }
    }

    /// Joins the round that forms, or the spares if it is full.
    fn enter(&mut self, shared: &Agreed) -> Vec<Action> {
        let same_rank = shared.members.iter().find(|m| m.id.node_rank == self.me.id.node_rank);
        if let (true, Some(other)) = (self.rules.is_static, same_rank) {
            return self.tell(News::Refused(
                format!(
                    "node rank {} is claimed by both {} (agent pid {}) and {} (agent pid {})",
                    self.me.id.node_rank, other.host, other.id.pid, self.me.host, self.me.id.pid
                ),
                "give each node its own --node-rank".into(),
            ));
        }
        let mut next = Agreed { rules: self.rules, ..shared.clone() };
        if self.is_host {
            next.host = Some(self.me.id.clone());
        }
        next.waiting.retain(|m| m.id != self.me.id);
        // Places are kept for those that are expected back: their workers have the job's memory.
        let kept = |id: &&NodeId| **id != self.me.id && !shared.members.iter().any(|m| m.id == **id);
        let kept = shared.expected.iter().filter(kept).count();
        let kept = if shared.expected.contains(&self.me.id) { 0 } else { kept };
        if next.members.len() + kept < self.rules.max {
            next.members.push(self.me.clone());
            next.members.sort_by(|a, b| a.id.cmp(&b.id));
        } else {
            if shared.waiting.iter().any(|m| m.id == self.me.id) {
                return Vec::new();
            }
            next.waiting.push(self.me.clone());
        }
        put(next)
    }

    /// Starts the round if it is complete.
    fn start_or_wait(&mut self, shared: &Agreed, now: Duration) -> Vec<Action> {
        let ids: Vec<NodeId> = shared.members.iter().map(|m| m.id.clone()).collect();
        if (self.joining.0, &self.joining.1) != (shared.round, &ids) {
            self.joining = (shared.round, ids.clone(), now);
        }
        let quiet = now.saturating_sub(self.joining.2);
        let returned = !shared.expected.is_empty() && shared.expected.iter().all(|id| ids.contains(id));
        let enough = ids.len() >= self.rules.min || is_planted(Mutant::TooFew);
        if ids.len() >= self.rules.max || (enough && (returned || quiet >= self.times.last_call)) {
            return put(Agreed {
                phase: Phase::Running,
                done: Vec::new(),
                expected: Vec::new(),
                stepped: false,
                ..shared.clone()
            });
        }
        if !enough && now.saturating_sub(self.wished_at) >= self.times.join {
            let (what, hint) = self.missing(shared);
            if self.is_host {
                return put(Agreed { closed: Some(Closed::Failed(what)), ..shared.clone() });
            }
            return self.tell(News::Refused(what, hint));
        }
        Vec::new()
    }

    /// Whom or what the node waits for, for people; `None` if it does not.
    pub fn waits_for(&self, shared: &Agreed) -> Option<String> {
        match (&self.wish, shared.phase) {
            _ if shared.closed.is_some() => None,
            (Wish::Join, Phase::Joining) => Some(format!(
                "{} ({} of {} nodes are here)",
                self.absent(shared),
                shared.members.len(),
                self.rules.max
            )),
            (Wish::Join, Phase::Running) => Some("a place: the job runs with the nodes that it has".into()),
            (Wish::Finish(_), _) => {
                let busy =
                    shared.members.iter().filter(|m| !shared.done.contains(&m.id)).map(|m| m.host.as_str());
                Some(format!("the workers of {} to end", busy.collect::<Vec<_>>().join(", ")))
            }
            _ => None,
        }
    }

    /// The nodes that have not come.
    fn absent(&self, shared: &Agreed) -> String {
        let absent: Vec<String> = if self.rules.is_static {
            let is_here = |rank: &usize| shared.members.iter().any(|m| m.id.node_rank == *rank);
            let ranks = (0..self.rules.max).filter(|r| !is_here(r)).map(|r| r.to_string());
            vec![format!("node ranks {}", ranks.collect::<Vec<_>>().join(", "))]
        } else if shared.expected.is_empty() {
            vec![format!("{} more", self.rules.min - shared.members.len().min(self.rules.min))]
        } else {
            let is_here = |id: &&NodeId| shared.members.iter().any(|m| m.id == **id);
            let gone = shared.expected.iter().filter(|id| !is_here(id));
            gone.map(|id| format!("{} (agent pid {})", id.addr, id.pid)).collect()
        };
        absent.join(", ")
    }

    /// Who did not come in time.
    fn missing(&self, shared: &Agreed) -> (String, String) {
        let came: Vec<String> =
            shared.members.iter().map(|m| format!("node rank {} on {}", m.id.node_rank, m.host)).collect();
        let after = if shared.why.is_empty() { String::new() } else { format!(" after {}", shared.why) };
        (
            format!(
                "{} of {} nodes came within {:.0} s{after}; here: {}; missing: {}",
                shared.members.len(),
                self.rules.min,
                self.times.join.as_secs_f64(),
                came.join(", "),
                self.absent(shared)
            ),
            "see what became of the missing nodes, or raise join_timeout in --rdzv-conf".into(),
        )
    }

    fn run(&mut self, shared: &Agreed, round: u64) -> Vec<Action> {
        if shared.round != round {
            let why = shared.why.clone();
            return self.tell(News::Regroup(why));
        }
        let recovers = shared.recovers || self.progress.0;
        let stepped = shared.stepped || self.progress.1 == Some(round);
        if (recovers, stepped) != (shared.recovers, shared.stepped) {
            let mut next = Agreed { recovers, stepped, ..shared.clone() };
            if stepped {
                next.strikes.retain(|s| !shared.members.iter().any(|m| s.is(&m.id)));
            }
            return put(next);
        }
        // Ranks that keep their memory are not troubled before they have used what they brought.
        if shared.phase == Phase::Running
            && (shared.members.len() < self.rules.max || is_planted(Mutant::Restless))
            && (!recovers || stepped || is_planted(Mutant::NewcomersAtOnce))
            && let Some(new) = shared.waiting.first()
        {
            return put(regroup(
                shared,
                format!("node {} (agent pid {}) wants to join", new.host, new.id.pid),
            ));
        }
        Vec::new()
    }

    fn finish(&mut self, shared: &Agreed, round: u64, now: Duration) -> Vec<Action> {
        if shared.round != round {
            let why = shared.why.clone();
            return self.tell(News::Regroup(why));
        }
        if shared.done.contains(&self.me.id) {
            // The store must outlive the others' use of it.
            if !self.is_host && now.saturating_sub(self.wished_at) >= self.times.exit_barrier {
                return self.tell(News::Closed(Closed::Succeeded));
            }
            return Vec::new();
        }
        let mut next = shared.clone();
        next.done.push(self.me.id.clone());
        if next.members.iter().all(|m| next.done.contains(&m.id)) {
            next.closed = Some(Closed::Succeeded);
        }
        put(next)
    }
}

fn put(mut next: Agreed) -> Vec<Action> {
    next.version = next.version.wrapping_add(1);
    vec![Action::Put(Box::new(next))]
}

#[cfg(test)]
mod tests;
