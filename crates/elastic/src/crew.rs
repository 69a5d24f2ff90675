//! One agent's workers: which live, which can meet again in another world, and what becomes of the job when one is lost.
//!
//! [`Crew::step`] takes what happened and the time, and says what to do, with the reason. A *place* is where a worker of
//! this node runs, counted from 0; whoever dies in it is replaced there, so that ranks keep their numbers.
//!
//! - Workers that have said [`Report::CanRecover`] keep their process and memory when another is lost: the lost one's place
//!   is filled again and all meet in a new round. Each loss costs a restart. Without such workers everything is as under
//!   torchrun: all are stopped and started over.
//! - A worker that can recover gives signs of life. One without is stopped, one whose ops stand still while it waits for
//!   nobody hangs: both are killed, and are lost like any other.
//! - A place whose workers die again and again without a step between is filled after a pause that doubles, and then left
//!   out, if fewer workers are allowed.
//! - A world that failed while everybody lives (a cut link) meets again, at the price of a restart.

use crate::Report;
use crate::mutant::{Mutant, is_planted};
use core::time::Duration;

/// Losses of one place in a row, no step between them, after which it is not worth another try.
pub(crate) const KEEPS_FAILING: u32 = 3;
/// Workers that die together are seen to within this, and cost one restart.
const SETTLE: Duration = Duration::from_millis(20);
/// Before the second try in a row; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// What waiting longer would mend has a person waiting for it.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A killed process that is still there after this waits for a device and cannot be killed.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// How much trouble is borne.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Restarts that this agent may spend.
    pub max_restarts: u32,
    /// Fewest places that may be left in use.
    pub min_places: usize,
    /// A worker without a sign of life for so long is stopped.
    pub silent: Duration,
    /// A worker whose ops stand still for so long, while it waits for nobody, hangs.
    pub hung: Duration,
    /// A failed world is left to others to explain for so long: they may have lost somebody.
    pub stranded: Duration,
}

impl Limits {
    /// Twenty-five missed signs of life, at five a second: what a machine that is only busy does not reach.
    pub const SILENT: Duration = Duration::from_secs(5);
    /// Longer than any single op or write of a checkpoint, shorter than a person's patience.
    pub const HUNG: Duration = Duration::from_secs(180);
    /// The kernel tells neighbours of a death before it tells the parent, but not long before.
    pub const STRANDED: Duration = Duration::from_secs(1);
}

impl Default for Limits {
    fn default() -> Self {
        let (silent, hung, stranded) = (Limits::SILENT, Limits::HUNG, Limits::STRANDED);
        Limits { max_restarts: 0, min_places: usize::MAX, silent, hung, stranded }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The node has a place in a round: the living are ordered there, and the vacant places are filled next.
    Seated,
    /// A process was started in this place.
    Started(usize),
    /// The worker in this place reports.
    Said(usize, Report),
    /// The worker in this place has ended with success.
    Done(usize),
    /// The worker in this place has failed, or was killed; in which words.
    Lost(usize, String),
    /// Other nodes call for a new round, and why.
    Called(String),
    /// The round runs without this node.
    Spare,
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Kill the worker in this place: it is stopped, hangs, or knows too little to meet again.
    Kill(usize, String),
    /// The round is over for this node.
    End(End),
    /// Ask for a place in the next round.
    Join,
}

/// How a round ends for this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// What follows.
    pub next: Next,
    /// Why.
    pub why: String,
    /// Whether it was this node's own trouble, paid with a restart if there is a next round: then the others are called.
    pub own: bool,
}

/// What follows a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Those that can recover meet again; the others' places are vacant.
    Meet,
    /// All workers of this node are stopped and started over.
    StartOver,
    /// This node is out.
    GiveUp,
}

#[derive(Clone, Debug, PartialEq)]
struct Vitals {
    recovers: bool,
    heard: Duration,
    ops: u64,
    moved: Duration,
    stranded: Option<(Duration, String)>,
    doomed: Option<(Duration, String)>,
}

impl Vitals {
    /// Whether the worker can meet again, and is not about to be killed.
    fn keeps(&self) -> bool {
        self.recovers && self.doomed.is_none()
    }

    /// The worker is to be killed, and why.
    fn doom(&mut self, place: usize, why: String, now: Duration) -> Action {
        self.doomed = Some((now, why.clone()));
        Action::Kill(place, why)
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Life {
    Vacant,
    Lives(Vitals),
    Done,
    /// Not used any more.
    Out,
}

#[derive(Clone, Debug, PartialEq)]
struct Place {
    life: Life,
    /// Losses since a step was last done.
    in_a_row: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The next round is joined when the replaced are gone and the pause is over.
    Gathers {
        until: Duration,
    },
    Joins,
    Runs,
}

/// The workers of one agent.
#[derive(Clone, Debug)]
pub struct Crew {
    places: Vec<Place>,
    limits: Limits,
    phase: Phase,
    restarts: u32,
    recovers: bool,
    stepped: bool,
}

impl Crew {
    /// A crew of `places` workers that have not been started; the first [`Event::Tick`] asks for a place.
    pub fn new(places: usize, limits: Limits) -> Crew {
        let place = Place { life: Life::Vacant, in_a_row: 0 };
        let phase = Phase::Gathers { until: Duration::ZERO };
        Crew { places: vec![place; places], limits, phase, restarts: 0, recovers: false, stepped: false }
    }

    /// Restarts spent so far.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Whether a worker has ever said that it can recover.
    pub fn recovers(&self) -> bool {
        self.recovers
    }

    /// Whether a step was done in this round.
    pub fn stepped(&self) -> bool {
        self.stepped
    }

    /// The places in use, in order: the position of a place here is its worker's local rank.
    pub fn in_use(&self) -> Vec<usize> {
        (0..self.places.len()).filter(|p| self.places[*p].life != Life::Out).collect()
    }

    /// Whether a worker lives in this place.
    pub fn lives(&self, place: usize) -> bool {
        matches!(self.places[place].life, Life::Lives(_))
    }

    /// Whether a worker that can recover lives in this place, and is not about to be killed.
    pub fn keeps(&self, place: usize) -> bool {
        matches!(&self.places[place].life, Life::Lives(v) if v.keeps())
    }

    /// Whether every worker of the round has ended with success. Those that end while a new one is called for take part in
    /// it again: the others' may not be done.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Runs && self.places.iter().all(|p| matches!(p.life, Life::Done | Life::Out))
    }

    /// When to come with a [`Event::Tick`] at the latest, if nothing happens before.
    pub fn wakes_at(&self) -> Option<Duration> {
        let gathers = match self.phase {
            Phase::Gathers { until } => Some(until),
            _ => None,
        };
        let of = |v: &Vitals| match &v.doomed {
            Some((since, _)) => Some(*since + KILL_TIMEOUT),
            None if !v.recovers => None,
            None => {
                let stranded = v.stranded.as_ref().filter(|_| self.phase == Phase::Runs);
                let failed = stranded.map(|(since, _)| *since + self.limits.stranded);
                let hung = v.stranded.is_none().then_some(v.moved + self.limits.hung);
                [Some(v.heard + self.limits.silent), failed, hung].into_iter().flatten().min()
            }
        };
        self.vitals().filter_map(|(_, v)| of(v)).chain(gathers).min()
    }

    /// Takes in what happened and says what follows from it.
    pub fn step(&mut self, event: Event, now: Duration) -> Vec<Action> {
        let mut actions = match event {
            Event::Seated => {
                self.phase = Phase::Runs;
                self.stepped = false;
                for p in &mut self.places {
                    // Whoever was not stranded has heard nothing of it and may hang: its time runs on.
                    if let Life::Lives(v) = &mut p.life
                        && v.stranded.take().is_some()
                    {
                        v.moved = now;
                    }
                }
                Vec::new()
            }
            Event::Started(place) => {
                let vitals =
                    Vitals { recovers: false, heard: now, ops: 0, moved: now, stranded: None, doomed: None };
                self.places[place].life = Life::Lives(vitals);
                Vec::new()
            }
            Event::Said(place, report) => {
                self.said(place, report, now);
                Vec::new()
            }
            Event::Done(place) => {
                self.places[place].life = Life::Done;
                Vec::new()
            }
            Event::Lost(place, why) => self.lost(place, why, now),
            Event::Called(why) if self.phase == Phase::Runs => self.end(why, false, now),
            Event::Spare if self.phase == Phase::Joins => self.bench(now),
            Event::Called(_) | Event::Spare | Event::Tick => Vec::new(),
        };
        actions.extend(self.look(now));
        actions
    }

    fn said(&mut self, place: usize, report: Report, now: Duration) {
        let Life::Lives(v) = &mut self.places[place].life else { return };
        v.heard = now;
        match report {
            Report::CanRecover => {
                (v.recovers, v.moved) = (true, now);
                self.recovers = true;
            }
            Report::Beat { ops, waits } => {
                if waits || ops != v.ops {
                    (v.ops, v.moved) = (ops, now);
                }
            }
            Report::Step { .. } => {
                v.moved = now;
                // A late word of the round before is no step of this one.
                if self.phase == Phase::Runs {
                    self.stepped = true;
                    self.places.iter_mut().for_each(|p| p.in_a_row = 0);
                }
            }
            Report::Stranded { why, .. } => {
                v.stranded.get_or_insert((now, why));
            }
        }
    }

    fn vitals(&self) -> impl Iterator<Item = (usize, &Vitals)> {
        self.places.iter().enumerate().filter_map(|(i, p)| match &p.life {
            Life::Lives(v) => Some((i, v)),
            _ => None,
        })
    }

    /// Workers that go on in the next world.
    fn keepers(&self) -> usize {
        self.vitals().filter(|(_, v)| v.keeps() && !is_planted(Mutant::KeepsNobody)).count()
    }

    fn lost(&mut self, place: usize, why: String, now: Duration) -> Vec<Action> {
        let life = std::mem::replace(&mut self.places[place].life, Life::Vacant);
        let why = match life {
            Life::Lives(Vitals { doomed: Some((_, reason)), .. }) => reason,
            _ => why,
        };
        if self.phase != Phase::Runs {
            // The next round is already on its way, and the place is filled in it.
            return Vec::new();
        }
        self.places[place].in_a_row += 1;
        let in_a_row = self.places[place].in_a_row;
        let spent = self.restarts >= self.limits.max_restarts && !is_planted(Mutant::NoBudget);
        let can_shrink = self.keepers() > 0 && self.in_use().len() > self.limits.min_places;
        if can_shrink && (spent || in_a_row >= KEEPS_FAILING) {
            self.places[place].life = Life::Out;
            let reason = if spent { "no restart is left" } else { "it keeps failing before a step is done" };
            let why = format!("{why}; {reason}: its place stays empty");
            return self.meet(End { next: Next::Meet, why, own: true }, now);
        }
        self.end(why, true, now)
    }

    /// The round is over: those that can, meet again.
    fn end(&mut self, why: String, own: bool, now: Duration) -> Vec<Action> {
        if own && self.restarts >= self.limits.max_restarts && !is_planted(Mutant::NoBudget) {
            self.phase = Phase::Joins;
            return vec![Action::End(End { next: Next::GiveUp, why, own })];
        }
        self.restarts += u32::from(own);
        if self.keepers() > 0 {
            return self.meet(End { next: Next::Meet, why, own }, now);
        }
        self.phase = Phase::Gathers { until: now };
        self.places.iter_mut().filter(|p| p.life == Life::Done).for_each(|p| p.life = Life::Vacant);
        vec![Action::End(End { next: Next::StartOver, why, own })]
    }

    fn meet(&mut self, end: End, now: Duration) -> Vec<Action> {
        let in_a_row = self.places.iter().map(|p| p.in_a_row).max().unwrap_or(0);
        self.phase = Phase::Gathers { until: now + pause(in_a_row) };
        let mut actions = vec![Action::End(end)];
        for (place, p) in self.places.iter_mut().enumerate() {
            match &mut p.life {
                Life::Done => p.life = Life::Vacant,
                // It is on its way into a world that is gone, and has nothing to lose yet.
                Life::Lives(v) if !v.recovers && v.doomed.is_none() => {
                    actions.push(v.doom(place, "it was not ready to meet in another world".to_owned(), now));
                }
                _ => {}
            }
        }
        actions
    }

    /// The job goes on without this node: a world of its own must not.
    fn bench(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        for (place, p) in self.places.iter_mut().enumerate() {
            if let Life::Lives(v) = &mut p.life
                && v.doomed.is_none()
            {
                let why = "the job runs without this node, which waits for a place";
                actions.push(v.doom(place, why.to_owned(), now));
            }
        }
        actions
    }

    /// What time alone calls for.
    fn look(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        let limits = self.limits;
        let since = |at: Duration| now.saturating_sub(at);
        let mut immortal = None;
        for (place, p) in self.places.iter_mut().enumerate() {
            let Life::Lives(v) = &mut p.life else { continue };
            if let Some((at, why)) = &v.doomed {
                if since(*at) >= KILL_TIMEOUT {
                    immortal = Some(format!("{why}; SIGKILL does not end it: it waits for a device"));
                }
                continue;
            }
            let silent = since(v.heard) >= limits.silent && !is_planted(Mutant::DeafToSilence);
            let hung = v.stranded.is_none() && since(v.moved) >= limits.hung;
            let why = match (v.recovers, silent, hung) {
                (true, true, _) => {
                    format!("it gave no sign of life for {:.1} s: stopped", limits.silent.as_secs_f64())
                }
                (true, _, true) => {
                    format!("its ops stood still for {:.1} s: it hangs", limits.hung.as_secs_f64())
                }
                _ => continue,
            };
            actions.push(v.doom(place, why, now));
        }
        if let Some(why) = immortal {
            self.phase = Phase::Joins;
            actions.push(Action::End(End { next: Next::GiveUp, why, own: true }));
            return actions;
        }
        if self.phase == Phase::Runs
            && !self.vitals().any(|(_, v)| v.doomed.is_some())
            && let Some((place, why)) = self.stranded_for(limits.stranded, now)
        {
            let blocked = self.block(now);
            if !blocked.is_empty() {
                actions.extend(blocked);
                return actions;
            }
            actions.extend(self.end(format!("the worker in place {place} is stranded: {why}"), true, now));
        }
        if let Phase::Gathers { until } = self.phase
            && now >= until
            && !self.vitals().any(|(_, v)| !v.recovers || v.doomed.is_some())
        {
            self.phase = Phase::Joins;
            actions.push(Action::Join);
        }
        actions
    }

    /// Others are stranded: whoever does not know it and stands still has kept them waiting.
    fn block(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        for (place, p) in self.places.iter_mut().enumerate() {
            let Life::Lives(v) = &mut p.life else { continue };
            let still = now.saturating_sub(v.moved);
            if v.recovers && v.stranded.is_none() && still >= self.limits.silent {
                let why = format!(
                    "its ops stood still for {:.1} s while others waited for it: it hangs",
                    still.as_secs_f64()
                );
                actions.push(v.doom(place, why, now));
            }
        }
        actions
    }

    /// A worker whose world failed so long ago that nobody else can be expected to explain it.
    fn stranded_for(&self, grace: Duration, now: Duration) -> Option<(usize, String)> {
        let long = |(at, _): &&(Duration, String)| now.saturating_sub(*at) >= grace;
        let found = |(place, v): (usize, &Vitals)| {
            v.stranded.as_ref().filter(long).map(|(_, why)| (place, why.clone()))
        };
        self.vitals().find_map(found).filter(|_| !is_planted(Mutant::DeafToStranded))
    }
}

/// Before the place is tried again, after so many losses in a row.
fn pause(in_a_row: u32) -> Duration {
    match in_a_row {
        0 | 1 => SETTLE,
        n => FIRST_PAUSE.saturating_mul(1 << (n - 2).min(16)).min(LONGEST_PAUSE),
    }
}

#[cfg(test)]
mod tests;
