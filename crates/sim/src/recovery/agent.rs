//! One agent: does for [`Crew`] and [`Node`] what `launch` does, with workers that are only in one state or another.

use core::time::Duration;
use std::collections::BTreeMap;

use elastic::Report;
use elastic::crew::{Action, Crew, Event, Next};
use elastic::rendezvous::{self, Agreed, Member, News, Node, NodeId, Offer, Rules, Seat, Wish};

use super::PlayedJob;

/// Writes that may follow from one look before the next one.
const WRITES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Well,
    /// It gives signs of life, and its ops stand still.
    Hung,
    /// It gives none.
    Stopped,
    Dead,
}

#[derive(Clone, Debug)]
struct Worker {
    health: Health,
    round: u64,
    is_new: bool,
    is_stranded: bool,
    ops: u64,
}

pub(super) struct Agent {
    node: Node,
    crew: Crew,
    workers: Vec<Option<Worker>>,
    /// The round that its workers are in.
    round: Option<u64>,
    beat_every: Duration,
    next_beat: Duration,
    /// It has called for a new round and waits for the answer.
    calls: bool,
    is_silent: bool,
    held: Vec<Action>,
}

impl Agent {
    pub(super) fn new(me: Member, rules: Rules, job: &PlayedJob, is_host: bool, places: usize) -> Self {
        Agent {
            node: Node::new(me, rules, job.times, true, is_host),
            crew: Crew::new(places, job.limits),
            workers: vec![None; places],
            round: None,
            beat_every: job.times.keep_alive_interval,
            next_beat: Duration::ZERO,
            calls: false,
            is_silent: false,
            held: Vec::new(),
        }
    }

    pub(super) fn id(&self) -> &NodeId {
        self.node.id()
    }

    pub(super) fn set(&mut self, place: usize, health: Health) {
        if let Some(worker) = &mut self.workers[place] {
            worker.health = health;
        }
    }

    pub(super) fn fall_silent(&mut self) {
        self.is_silent = true;
    }

    /// The round that its workers are in, if all live.
    pub(super) fn runs(&self) -> Option<u64> {
        self.round.filter(|_| !self.is_silent && !self.calls && self.workers.iter().all(Option::is_some))
    }

    /// Workers that did not have to be started anew after the first round.
    pub(super) fn kept(&self) -> usize {
        let here = self.workers.iter().flatten().filter(|_| !self.is_silent);
        here.filter(|w| !w.is_new).count()
    }

    /// The round in which a process of this agent has visibly gone: connections to it are broken. A machine without power
    /// breaks none.
    pub(super) fn broken_round(&self) -> Option<u64> {
        let gone = |w: &&Worker| w.health == Health::Dead;
        self.workers.iter().flatten().find(gone).filter(|_| !self.is_silent).map(|w| w.round)
    }

    /// One look at workers and store. `failed` is the last round that was seen to break.
    pub(super) fn turn(
        &mut self,
        now: Duration,
        shared: &mut Agreed,
        beats: &mut BTreeMap<NodeId, i64>,
        shut: &[NodeId],
        failed: Option<u64>,
    ) {
        if self.is_silent {
            return;
        }
        if now >= self.next_beat {
            *beats.entry(self.node.id().clone()).or_insert(0) += 1;
            self.next_beat = now + self.beat_every;
        }
        let mut events = self.reports(shared, failed);
        for news in self.look(shared, beats, shut, now) {
            self.hear(news, &mut events, now);
        }
        events.push(Event::Tick);
        let mut actions = std::mem::take(&mut self.held);
        for event in events {
            actions.extend(self.crew.step(event, now));
        }
        for action in actions {
            self.obey(action, now);
        }
        if self.crew.recovers() {
            self.node.note(self.crew.stepped().then_some(self.round).flatten());
        }
    }

    /// What workers say, and who has died.
    fn reports(&mut self, shared: &Agreed, failed: Option<u64>) -> Vec<Event> {
        let mut events = Vec::new();
        for (place, slot) in self.workers.iter_mut().enumerate() {
            let Some(w) = slot else { continue };
            let mut say = |report| events.push(Event::Said(place, report));
            match w.health {
                Health::Stopped => {}
                Health::Hung => say(Report::Beat { ops: w.ops, waits: false }),
                Health::Dead => {
                    *slot = None;
                    events.push(Event::Lost(place, "a rank was lost".to_owned()));
                }
                Health::Well => {
                    if w.ops == 0 {
                        say(Report::CanRecover);
                    }
                    w.ops += 1;
                    say(Report::Beat { ops: w.ops, waits: true });
                    if failed == Some(w.round) && !w.is_stranded {
                        w.is_stranded = true;
                        say(Report::Stranded { lost: None, why: "a rank was lost".to_owned() });
                    } else if failed != Some(w.round) && shared.round == w.round {
                        say(Report::Step { step: w.ops });
                    }
                }
            }
        }
        events
    }

    fn look(
        &mut self,
        shared: &mut Agreed,
        beats: &BTreeMap<NodeId, i64>,
        shut: &[NodeId],
        now: Duration,
    ) -> Vec<News> {
        let watched = self.node.watched(shared);
        let seen: Vec<(NodeId, i64)> =
            watched.iter().filter_map(|id| Some((id.clone(), *beats.get(id)?))).collect();
        self.node.gone(watched.into_iter().filter(|id| shut.contains(id)).collect());
        let mut news = Vec::new();
        for _ in 0..WRITES {
            let mut wrote = false;
            for action in self.node.step(shared, &seen, now) {
                match action {
                    rendezvous::Action::Put(next) => {
                        *shared = *next;
                        wrote = true;
                    }
                    rendezvous::Action::Tell(told) => news.push(told),
                }
            }
            if !wrote {
                break;
            }
        }
        news
    }

    fn hear(&mut self, news: News, events: &mut Vec<Event>, now: Duration) {
        match news {
            News::Seated(seat) => {
                for event in events.drain(..) {
                    let actions = self.crew.step(event, now);
                    self.held.extend(actions);
                }
                self.fill(&seat, now);
            }
            News::Regroup(_) if self.calls => self.calls = false,
            News::Regroup(why) => events.push(Event::Called(why)),
            News::Spare => events.push(Event::Spare),
            News::Closed(_) | News::Left | News::Refused(..) => self.is_silent = true,
        }
    }

    /// Orders those that live into the round, and starts the others.
    fn fill(&mut self, seat: &Seat, now: Duration) {
        let is_new = self.round.is_some() || seat.round > 0;
        self.round = Some(seat.round);
        let actions = self.crew.step(Event::Seated, now);
        self.held.extend(actions);
        for place in self.crew.in_use() {
            if self.crew.lives(place) {
                if let Some(w) = &mut self.workers[place] {
                    (w.round, w.is_stranded) = (seat.round, false);
                }
                continue;
            }
            self.workers[place] =
                Some(Worker { health: Health::Well, round: seat.round, is_new, is_stranded: false, ops: 0 });
            let actions = self.crew.step(Event::Started(place), now);
            self.held.extend(actions);
        }
    }

    fn obey(&mut self, action: Action, now: Duration) {
        match action {
            Action::Kill(place, _) => self.set(place, Health::Dead),
            Action::Join if self.calls => self.held.push(Action::Join),
            Action::Join => {
                let nproc = self.crew.in_use().len();
                self.node.wish(Wish::Join, Some(Offer { master_port: 1, nproc }), now);
            }
            Action::End(end) => {
                if end.next != Next::Meet {
                    (0..self.workers.len()).for_each(|place| self.set(place, Health::Dead));
                }
                match end.next {
                    Next::GiveUp => self.node.wish(Wish::Leave(end.why), None, now),
                    Next::Meet | Next::StartOver if end.own => {
                        self.calls = true;
                        self.node.wish(Wish::Regroup(self.round.unwrap_or(0), end.why), None, now);
                    }
                    Next::Meet | Next::StartOver => {}
                }
            }
        }
    }
}
