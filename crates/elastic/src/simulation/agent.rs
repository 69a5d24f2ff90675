//! One agent of the simulation: does for [`Crew`] and [`Node`] what the real one does, with processes made of nothing.

use super::worlds::{Health, WorkerId};
use super::{Sim, times};
use crate::crew::{Action, Crew, End, Event, Next};
use crate::rendezvous::{self, Agreed, Closed, Member, News, Node, NodeId, Offer, Seat, Wish};
use crate::{Report, crew, succession};
use core::time::Duration;
use std::collections::VecDeque;

/// What finding a stopped worker may take beyond its time of silence.
const FINDS: Duration = Duration::from_secs(1);

/// What an agent is at.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum State {
    /// Watches its workers.
    Up,
    /// Has called for a new round and waits for the answer.
    Calls,
    /// Its workers are done, it waits for the others'.
    Finishes,
    /// Waits to be let go, with the reason.
    Leaves(String, Duration),
    Gone(String),
}

#[derive(Debug)]
struct Process {
    id: WorkerId,
    round: u64,
    rank: usize,
    size: usize,
    /// When it is ready to meet the others; `None` when it is.
    prepares_until: Option<Duration>,
    told_stranded: bool,
    stopped_since: Option<Duration>,
    ops: u64,
    /// Steps of its world that it has told of.
    steps: u64,
}

/// One agent and its processes.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) state: State,
    node: Node,
    crew: Crew,
    processes: Vec<Option<Process>>,
    held: Vec<Action>,
    /// Whose store it talks to, and what it read there.
    store: usize,
    seen: (u64, Agreed),
    beats: Vec<(NodeId, i64)>,
    looked: Option<Duration>,
    next_beat: Duration,
    trouble: Option<Duration>,
    contact: Duration,
    news: VecDeque<News>,
    round: u64,
    pub(super) cut_until: Duration,
    pub(super) paused_until: Duration,
    pub(super) asked_to_leave: bool,
    is_host: bool,
    /// Its memory is with a candidate, or was.
    voted: bool,
    serial: u64,
}

impl Agent {
    pub(super) fn new(me: Member, is_host: bool, sim: &Sim, places: usize) -> Agent {
        let patient = sim.limits.max_restarts > 0;
        let limits = crew::Limits { min_places: sim.limits.min_places.min(places), ..sim.limits };
        Agent::begin(me, sim.rules, patient, is_host, limits, places)
    }

    fn begin(
        me: Member,
        rules: rendezvous::Rules,
        patient: bool,
        is_host: bool,
        limits: crew::Limits,
        places: usize,
    ) -> Agent {
        let serial = u64::from(me.id.pid);
        let node = Node::new(me, rules, times(), patient, is_host);
        Agent {
            state: State::Up,
            node,
            crew: Crew::new(places, limits),
            processes: (0..places).map(|_| None).collect(),
            held: Vec::new(),
            store: 0,
            seen: (0, Agreed::default()),
            beats: Vec::new(),
            looked: None,
            next_beat: Duration::ZERO,
            trouble: None,
            contact: Duration::ZERO,
            news: VecDeque::new(),
            round: 0,
            cut_until: Duration::ZERO,
            paused_until: Duration::ZERO,
            asked_to_leave: false,
            is_host,
            voted: false,
            serial: serial * 1_000_000,
        }
    }

    /// Stands in while the real one acts.
    pub(super) fn absent() -> Agent {
        let id = NodeId { node_rank: 0, addr: String::new(), pid: u32::MAX, serial: 0 };
        let me = Member {
            id,
            host: String::new(),
            nproc: 1,
            role: String::new(),
            master_port: 0,
            door: 0,
            standby: 0,
        };
        let mut absent =
            Agent::begin(me, rendezvous::Rules::default(), false, false, crew::Limits::default(), 0);
        absent.state = State::Gone("absent".into());
        absent
    }

    pub(super) fn id(&self) -> &NodeId {
        self.node.id()
    }

    pub(super) fn addr(&self) -> &str {
        &self.node.id().addr
    }

    /// The round that its workers are in.
    pub(super) fn runs(&self) -> Option<u64> {
        self.processes.iter().flatten().map(|p| p.round).max().filter(|_| self.state == State::Up)
    }

    /// The rounds that its processes are in.
    pub(super) fn rounds(&self) -> impl Iterator<Item = u64> {
        self.processes.iter().flatten().map(|p| p.round)
    }

    pub(super) fn processes(&self) -> Vec<WorkerId> {
        self.processes.iter().flatten().map(|p| p.id).collect()
    }

    /// Those that have met the others.
    pub(super) fn ready(&self) -> Vec<WorkerId> {
        self.processes.iter().flatten().filter(|p| p.prepares_until.is_none()).map(|p| p.id).collect()
    }

    /// One look at everything.
    pub(super) fn turn(&mut self, sim: &mut Sim) {
        if matches!(self.state, State::Gone(_)) {
            return;
        }
        let reports: Vec<Event> = (0..self.processes.len()).flat_map(|place| self.work(place, sim)).collect();
        if sim.now < self.paused_until {
            // What is reported meanwhile waits in the socket; beats are all alike.
            self.held_reports(reports, sim);
            return;
        }
        let mut events = reports;
        events.extend(self.ends(sim));
        // A thread of its own looks at the store, now and then late.
        if !sim.draw.chance(8) {
            self.look(sim);
        }
        if self.asked_to_leave {
            self.asked_to_leave = false;
            self.leave("it was stopped by a signal", Wish::Leave("it was stopped by a signal".into()), sim);
        }
        events.push(Event::Tick);
        let mut actions = std::mem::take(&mut self.held);
        if let Some(news) = self.news.pop_front() {
            self.hear(news, sim, &mut events);
        }
        if matches!(self.state, State::Gone(_) | State::Leaves(..)) {
            self.give_up_waiting(sim);
            return;
        }
        for event in events {
            actions.extend(self.crew.step(event, sim.now));
        }
        self.obey(actions, sim);
        let (spent, most) = (self.crew.restarts(), sim.limits.max_restarts);
        sim.must(spent <= most, || format!("{spent} restarts of {most} were spent"));
        self.stopped_are_found(sim);
        if self.state == State::Up && self.crew.is_done() {
            self.state = State::Finishes;
            self.node.wish(Wish::Finish(self.round), None, sim.now);
        }
        if self.crew.recovers() {
            self.node.note(self.crew.stepped().then_some(self.round));
        }
    }

    /// Nobody waits for a stopped worker much longer than it takes to be sure.
    fn stopped_are_found(&self, sim: &mut Sim) {
        for p in self.processes.iter().flatten() {
            let since = p.stopped_since.map(|at| sim.now.saturating_sub(at.max(self.paused_until)));
            let found = since.is_none_or(|since| since < sim.limits.silent + FINDS);
            sim.must(found, || format!("worker {} is stopped, and nobody has noticed", p.id));
        }
    }

    fn held_reports(&mut self, reports: Vec<Event>, sim: &Sim) {
        for event in reports.into_iter().filter(|e| !matches!(e, Event::Said(_, Report::Beat { .. }))) {
            let actions = self.crew.step(event, sim.now);
            self.held.extend(actions);
        }
    }

    /// A worker lives on for a tick, and says what there is to say.
    fn work(&mut self, place: usize, sim: &mut Sim) -> Vec<Event> {
        let Some(p) = &mut self.processes[place] else { return Vec::new() };
        let Some(health) = sim.worlds.health(p.id) else { return Vec::new() };
        if health == Health::Stopped {
            p.stopped_since.get_or_insert(sim.now);
            return Vec::new();
        }
        let mut said = Vec::new();
        if let Some(until) = p.prepares_until {
            if sim.now < until || health == Health::Hung {
                return Vec::new();
            }
            p.prepares_until = None;
            sim.worlds.join(p.round, p.size, p.rank, p.id, sim.now);
            if sim.recovers {
                said.push(Report::CanRecover);
            }
        }
        let failed = sim.worlds.failed(p.round);
        let steps = sim.worlds.steps(p.round);
        let waits = sim.worlds.waits(p.round) || failed.is_some();
        p.ops += u64::from(health == Health::Well && !waits);
        if sim.recovers {
            said.push(Report::Beat { ops: p.ops, waits: waits && health == Health::Well });
            if steps > p.steps && health == Health::Well {
                p.steps = steps;
                said.push(Report::Step { step: steps });
            }
        }
        if let Some(why) = failed.filter(|_| health == Health::Well && !p.told_stranded) {
            p.told_stranded = true;
            if sim.recovers {
                said.push(Report::Stranded { lost: None, why });
            } else {
                // A program that knows nothing of recovery fails of it.
                sim.worlds.die(p.id);
            }
        }
        said.into_iter().map(|r| Event::Said(place, r)).collect()
    }

    /// Processes that have ended since the last look.
    fn ends(&mut self, sim: &mut Sim) -> Vec<Event> {
        let mut events = Vec::new();
        for (place, slot) in self.processes.iter_mut().enumerate() {
            let Some(p) = slot else { continue };
            let (id, rank) = (p.id, p.rank);
            let done = sim.worlds.is_done() && sim.worlds.steps(p.round) > 0 && !p.told_stranded;
            if sim.worlds.health(id).is_none() {
                *slot = None;
                events.push(Event::Lost(place, format!("rank {rank} (worker {id}) was killed")));
            } else if done && sim.worlds.health(id) == Some(Health::Well) {
                *slot = None;
                events.push(Event::Done(place));
            }
        }
        events
    }

    /// The rendezvous thread: a look at the store and what follows from it.
    fn look(&mut self, sim: &mut Sim) {
        if !self.reaches(self.store, sim) {
            if self.seen.1.closed.is_some() {
                let closed = self.seen.1.closed.take();
                self.news.extend(closed.map(News::Closed));
                return;
            }
            let since = *self.trouble.get_or_insert(sim.now);
            if sim.now.saturating_sub(since) >= times().heartbeat * 2 {
                self.end(sim, "the job's store is lost");
            } else if !self.follow(sim) && sim.now >= since + times().heartbeat {
                self.end(sim, "the job's store is lost, and there is no other");
            }
            return;
        }
        (self.trouble, self.contact) = (None, sim.now);
        if sim.now >= self.next_beat {
            *sim.beats.entry(self.node.id().clone()).or_insert(0) += 1;
            self.next_beat = sim.now + times().keep_alive_interval;
        }
        // Another node may have written between the look and the write that follows from it.
        if !sim.draw.chance(4) {
            self.refresh(sim);
        }
        if self.looked.is_none_or(|at| sim.now.saturating_sub(at) >= times().keep_alive_interval / 2) {
            let watched = self.node.watched(&self.seen.1);
            let number = |id: NodeId| sim.beats.get(&id).map(|b| (id, *b));
            self.beats = watched.into_iter().filter_map(number).collect();
            self.looked = Some(sim.now);
            let watched = self.node.watched(&self.seen.1);
            self.node.gone(watched.into_iter().filter(|id| sim.shut.contains(id)).collect());
        }
        for _ in 0..16 {
            let mut wrote = false;
            for action in self.node.step(&self.seen.1, &self.beats, sim.now) {
                match action {
                    rendezvous::Action::Put(next) => {
                        wrote = true;
                        if self.seen.0 == sim.stores[self.store].writes {
                            sim.put(self.store, *next);
                        }
                        self.refresh(sim);
                    }
                    rendezvous::Action::Tell(news) => self.news.push_back(news),
                }
            }
            if !wrote {
                return;
            }
        }
    }

    fn refresh(&mut self, sim: &Sim) {
        let store = &sim.stores[self.store];
        if self.seen.0 != store.writes {
            self.seen = (store.writes, store.shared.clone().unwrap_or_default());
        }
    }

    /// Whether an agent's store can be reached; one's own can.
    fn reaches(&self, agent: usize, sim: &Sim) -> bool {
        agent == self.index() || sim.lives(agent) && sim.now >= self.cut_until
    }

    fn index(&self) -> usize {
        usize::try_from(self.node.id().pid).expect("small")
    }

    /// The host may have died: brings what it remembers to the candidate, or is the one. Whether there is hope.
    fn follow(&mut self, sim: &mut Sim) -> bool {
        let memory = self.seen.1.clone();
        let unread = sim.now.saturating_sub(self.contact);
        let unread = if self.voted { Duration::ZERO } else { unread };
        if !succession::has_vote(&memory, &sim.shut, unread, times().heartbeat) {
            return false;
        }
        let Some(candidate) = succession::candidate(&memory, &sim.shut) else { return false };
        let at = usize::try_from(candidate.pid).expect("small");
        if !self.reaches(at, sim) {
            return false;
        }
        self.voted = true;
        let me = self.node.id().clone();
        if let Some(there) = sim.stores[at].shared.as_ref().filter(|s| s.reign > memory.reign) {
            let host = there.host.clone().unwrap_or(candidate);
            self.node.moved(&host);
            (self.store, self.trouble, self.voted, self.is_host) = (at, None, false, host == me);
            self.seen = (0, Agreed::default());
            self.refresh(sim);
            return true;
        }
        let votes = &mut sim.stores[at].votes;
        votes.retain(|(id, _)| *id != me);
        votes.push((me.clone(), memory));
        if candidate == me
            && let Ok(next) = succession::succeed(&me, &sim.stores[at].votes, &sim.shut)
        {
            let addr = me.addr.clone();
            sim.tell(|| format!("{addr} hosts the store: {}", next.why));
            sim.put(at, next);
        }
        true
    }

    fn hear(&mut self, news: News, sim: &mut Sim, events: &mut Vec<Event>) {
        match (news, &self.state) {
            (News::Closed(Closed::Succeeded), _) => self.end(sim, "done"),
            (News::Closed(Closed::Failed(why)), _) => self.end(sim, &why),
            (News::Left, State::Leaves(why, _)) => {
                let why = why.clone();
                self.end(sim, &why);
            }
            (News::Refused(what, _), _) => self.leave(&what, Wish::Close(what.clone()), sim),
            (News::Regroup(_), State::Calls) => self.state = State::Up,
            (News::Regroup(why), State::Finishes | State::Up) => {
                self.state = State::Up;
                events.push(Event::Called(why));
            }
            (News::Spare, _) => events.push(Event::Spare),
            (News::Seated(seat), State::Up) => {
                for event in events.drain(..) {
                    let actions = self.crew.step(event, sim.now);
                    self.held.extend(actions);
                }
                self.fill(&seat, sim);
            }
            (News::Seated(_) | News::Left | News::Regroup(_), _) => {}
        }
    }

    fn fill(&mut self, seat: &Seat, sim: &mut Sim) {
        self.round = seat.round;
        let actions = self.crew.step(Event::Seated, sim.now);
        self.held.extend(actions);
        for (local, place) in self.crew.in_use().into_iter().enumerate() {
            let (rank, size) = (seat.base_rank + local, seat.world);
            if self.crew.lives(place) {
                self.order(place, seat.round, rank, size, sim);
                continue;
            }
            self.serial += 1;
            let prepares = Duration::from_millis(250 * (1 + sim.draw.below(4)));
            self.processes[place] = Some(Process {
                id: self.serial,
                round: seat.round,
                rank,
                size,
                prepares_until: Some(sim.now + prepares),
                told_stranded: false,
                stopped_since: None,
                ops: 0,
                steps: 0,
            });
            sim.worlds.start(self.serial);
            let actions = self.crew.step(Event::Started(place), sim.now);
            self.held.extend(actions);
        }
    }

    /// A worker leaves its world for another, unless it cannot.
    fn order(&mut self, place: usize, round: u64, rank: usize, size: usize, sim: &mut Sim) {
        let Some(p) = &mut self.processes[place] else { return };
        let (id, before) = (p.id, p.round);
        sim.must(round > before, || format!("worker {id} goes from round {before} to round {round}"));
        if sim.worlds.health(id) != Some(Health::Well) {
            return;
        }
        sim.worlds.leave(before, id, "a rank was ordered to another world");
        (p.round, p.rank, p.size, p.told_stranded, p.steps) = (round, rank, size, false, 0);
        sim.worlds.join(round, size, rank, id, sim.now);
    }

    fn obey(&mut self, actions: Vec<Action>, sim: &mut Sim) {
        let mut ended = false;
        for action in actions {
            match action {
                Action::Kill(place, why) => {
                    if let Some(p) = &self.processes[place] {
                        let id = p.id;
                        sim.tell(|| format!("worker {id} is killed: {why}"));
                        sim.worlds.die(id);
                    }
                }
                Action::Join if ended || self.state != State::Up => self.held.push(Action::Join),
                Action::Join => {
                    let nproc = self.crew.in_use().len();
                    self.node.wish(Wish::Join, Some(Offer { master_port: 1, nproc }), sim.now);
                }
                Action::End(_) if ended => {}
                Action::End(end) => {
                    ended = true;
                    self.end_round(end, sim);
                }
            }
        }
    }

    fn end_round(&mut self, end: End, sim: &mut Sim) {
        let addr = self.addr().to_owned();
        sim.tell(|| format!("{addr}: {:?}, own {}: {}", end.next, end.own, end.why));
        if end.next == Next::StartOver {
            let kept = (0..self.processes.len()).filter(|p| self.crew.keeps(*p)).count();
            sim.must(kept == 0, || format!("{addr} starts over {kept} workers that could go on"));
        }
        if end.next != Next::Meet {
            self.kill_all(sim);
        }
        match end.next {
            Next::GiveUp if self.crew.recovers() => self.leave(&end.why, Wish::Leave(end.why.clone()), sim),
            Next::GiveUp => self.leave(&end.why, Wish::Close(end.why.clone()), sim),
            Next::Meet | Next::StartOver if end.own => {
                self.state = State::Calls;
                self.node.wish(Wish::Regroup(self.round, end.why), None, sim.now);
            }
            Next::Meet | Next::StartOver => {}
        }
    }

    fn kill_all(&mut self, sim: &mut Sim) {
        self.processes().into_iter().for_each(|id| sim.worlds.die(id));
    }

    fn leave(&mut self, why: &str, wish: Wish, sim: &mut Sim) {
        self.kill_all(sim);
        self.state = State::Leaves(why.to_owned(), sim.now);
        self.node.wish(wish, None, sim.now);
    }

    /// Nobody waits for ever to be let go.
    fn give_up_waiting(&mut self, sim: &mut Sim) {
        if let State::Leaves(why, since) = self.state.clone()
            && sim.now.saturating_sub(since) >= times().close * 2
        {
            self.end(sim, &why);
        }
    }

    fn end(&mut self, sim: &mut Sim, why: &str) {
        self.kill_all(sim);
        let addr = self.addr().to_owned();
        sim.tell(|| format!("{addr} has ended: {why}"));
        sim.must(!why.is_empty(), || format!("{addr} ended without a reason"));
        // In good order or not, its door is shut.
        let id = self.node.id().clone();
        sim.shut.push(id);
        self.state = State::Gone(why.to_owned());
    }
}
