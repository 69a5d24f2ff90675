//! The player: every class of ranks runs its ops in order, messages start when all who take part are there, kernels and
//! flows take as long as they get.
//!
//! One thread, one heap of events; what happens at one moment is done before rates are set, and no outcome depends on
//! the order within it.

mod links;
mod rank;
pub(crate) mod record;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, Ordering};

use plan::network::Traffic;
use serde::Serialize;
use spec::{Error, Result};

use crate::clock::{Speed, Ticks, USUAL, seconds};
use crate::flows::{End, Flows, Owner};
use crate::mesh::Axis;
use crate::steps::{STREAMS, Slot, StageSteps, Stream};
use crate::world::{Path, World};
use links::Kept;
use rank::Rank;
use record::{Log, Message};

/// A step as it was played.
#[derive(Clone, Debug)]
pub(crate) struct Played {
    /// When the last rank was done.
    pub(crate) end: Ticks,
    /// By class: when it was done.
    pub(crate) ends: Vec<Ticks>,
    /// By class: how long it computed, and waited for what.
    pub(crate) spent: Vec<Spent>,
    /// Events on the clock.
    pub(crate) events: u64,
    /// What happened, if it was to be kept.
    pub(crate) log: Option<Log>,
    /// Whether it was played to its end.
    pub(crate) is_whole: bool,
}

impl Played {
    /// The class that was done last; the first of several.
    pub(crate) fn last(&self) -> usize {
        (0..self.ends.len()).rev().max_by_key(|c| self.ends[*c]).unwrap_or(0)
    }
}

/// Where a rank's main stream spent its time, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Spent {
    /// Kernels.
    pub compute_s: f64,
    /// Tensor-parallel messages.
    pub tensor_s: f64,
    /// Context-parallel messages.
    pub context_s: f64,
    /// Expert dispatch.
    pub expert_s: f64,
    /// Gradients and parameters of replicas.
    pub data_s: f64,
    /// Sending to stages beside.
    pub send_s: f64,
    /// Waiting for stages beside.
    pub stage_s: f64,
    /// Waiting for the host.
    pub host_s: f64,
    /// Waiting for the next step's tokens.
    pub storage_s: f64,
}

/// What a rank waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Compute,
    Stream(Stream),
    Stage,
    Host,
    Storage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A rank's kernel ends, or what it waited for on the clock is due.
    Due { class: usize, version: u32 },
    /// The first bytes of a message move.
    Moves { transfer: usize },
    /// A flow ends.
    Ends { flow: usize, version: u32 },
    /// A rank's kernels change speed.
    Speed { class: usize },
    /// A rank's port changes its rate.
    Port { class: usize },
}

/// A message under way.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    kind: Kind,
    traffic: Traffic,
    /// Flows that have not ended.
    left: usize,
    /// As it is kept.
    kept: Kept,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Group(usize),
    /// To the next stage (0) or the one before (1).
    Send {
        from: usize,
        side: usize,
        slot: Slot,
    },
    /// A class reads its next tokens.
    Read(usize),
    /// It writes its part of a checkpoint.
    Write(usize),
}

/// A message in a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Queued {
    Group { axis: Axis, message: usize },
    Send { side: usize, slot: Slot },
}

#[derive(Clone, Debug, Default)]
struct Meeting {
    arrived: usize,
    message: usize,
}

/// More events than any rehearsal asked of one machine in earnest.
pub(crate) const EVENTS_MAX: u64 = 2_000_000_000;

struct Player<'w> {
    world: &'w World,
    stages: &'w [StageSteps],
    chunks: usize,
    micro_batches: usize,
    /// Speed of kernels beside messages of each stream.
    taxed: [Speed; STREAMS],
    ranks: Vec<Rank>,
    meetings: Vec<Meeting>,
    transfers: Vec<Transfer>,
    free: Vec<usize>,
    flows: Flows<'w>,
    heap: BinaryHeap<Reverse<(Ticks, Event)>>,
    events: u64,
    /// Events at which to look whether to stop.
    looks_at: u64,
    /// Ranks that are not done.
    busy: usize,
    log: Option<Log>,
}

/// Between two looks at whether to stop: a few milliseconds.
const STOP_EVERY: u64 = 1 << 16;

/// What is played, and how.
#[derive(Clone, Copy)]
pub(crate) struct Play<'a> {
    pub(crate) world: &'a World,
    pub(crate) stages: &'a [StageSteps],
    pub(crate) chunks: usize,
    pub(crate) micro_batches: usize,
    /// Time that kernels lose for each second of a message beside them, by its stream.
    pub(crate) tax: [f64; STREAMS],
    /// How much of what happens is kept; of a step in which more happens, nothing.
    pub(crate) keeps: usize,
    /// Set when no more is to be played.
    pub(crate) stop: Option<&'a AtomicBool>,
}

/// Plays a step.
///
/// # Errors
/// If it takes more events than there may be, or some rank waits for ever.
pub(crate) fn play(play: Play<'_>) -> Result<Played> {
    let Play { world, stages, chunks, micro_batches, tax, keeps, stop } = play;
    let mut player = Player {
        world,
        stages,
        chunks,
        micro_batches,
        taxed: tax.map(|tax| ((1.0 - tax) * USUAL as f64).round() as Speed),
        ranks: world.classes.iter().map(|_| Rank::new(2 * chunks * micro_batches)).collect(),
        meetings: vec![Meeting::default(); world.groups.len()],
        transfers: Vec::new(),
        free: Vec::new(),
        flows: Flows::new(&world.capacity),
        heap: BinaryHeap::new(),
        events: 0,
        looks_at: STOP_EVERY,
        busy: world.classes.len(),
        log: (keeps > 0).then(Log::default),
    };
    if keeps > 0 {
        player.ranks.iter_mut().for_each(|r| r.slices = Some(Vec::new()));
    }
    let is_whole = player.run(stop, keeps)?;
    player.outcome(is_whole)
}

impl<'w> Player<'w> {
    /// Plays on until all are done, or it is told to stop: whether they are.
    fn run(&mut self, stop: Option<&AtomicBool>, keeps: usize) -> Result<bool> {
        for class in 0..self.ranks.len() {
            for window in &self.world.classes[class].mark.windows {
                for at in [window.from, window.to] {
                    self.heap.push(Reverse((at, Event::Speed { class })));
                }
            }
            self.set_speed(class, 0);
            self.set_port(class, 0);
            self.store(class, 0);
            self.advance(class, 0);
        }
        self.settle(0);
        while self.busy > 0
            && let Some(&Reverse((now, _))) = self.heap.peek()
        {
            while let Some(&Reverse((at, event))) = self.heap.peek()
                && at == now
            {
                self.heap.pop();
                self.events += 1;
                self.happen(now, event);
            }
            self.settle(now);
            if self.events >= self.looks_at {
                self.looks_at += STOP_EVERY;
                self.forget(keeps);
                if stop.is_some_and(|s| s.load(Ordering::Relaxed)) {
                    self.ranks.iter_mut().for_each(|r| r.stop(now));
                    return Ok(false);
                }
            }
            if self.events > EVENTS_MAX {
                return Err(Error::user(format!("more than {EVENTS_MAX} events in one step"))
                    .hint("disturb fewer ranks, or rehearse fewer of them"));
            }
        }
        Ok(true)
    }

    fn settle(&mut self, now: Ticks) {
        let heap = &mut self.heap;
        self.flows.settle(now, |end| {
            heap.push(Reverse((end.at, Event::Ends { flow: end.flow, version: end.version })));
        });
    }

    fn happen(&mut self, now: Ticks, event: Event) {
        match event {
            Event::Due { class, version } => {
                if self.ranks[class].due(version) {
                    self.advance(class, now);
                }
            }
            Event::Moves { transfer } => self.moves(transfer, now),
            Event::Ends { flow, version } => {
                if let Some(owner) = self.flows.end(End { at: now, flow, version }) {
                    self.part_arrives(owner, now);
                }
            }
            Event::Speed { class } => self.set_speed(class, now),
            Event::Port { class } => self.set_port(class, now),
        }
    }

    /// Keeps nothing any more if that became too much.
    fn forget(&mut self, most: usize) {
        let Some(log) = &self.log else { return };
        let slices: usize = self.ranks.iter().map(|r| r.slices.as_ref().map_or(0, Vec::len)).sum();
        if log.messages.len() + slices > most {
            self.log = None;
            self.ranks.iter_mut().for_each(|r| r.slices = None);
        }
    }

    /// Queues a message on a rank's stream.
    fn start(&mut self, class: usize, stream: Stream, queued: Queued, now: Ticks) {
        let s = &mut self.ranks[class].streams[stream as usize];
        s.started += 1;
        s.queue.push_back(queued);
        if !s.busy {
            self.pump(class, stream, None, now);
        }
    }

    /// Brings the first message of a rank's stream to where the others are; `after` is the message that it waited for.
    fn pump(&mut self, class: usize, stream: Stream, after: Kept, now: Ticks) {
        let s = &mut self.ranks[class].streams[stream as usize];
        let Some(queued) = s.queue.pop_front() else { return };
        s.busy = true;
        match queued {
            Queued::Group { axis, message } => {
                let g = self.world.classes[class].group[axis as usize];
                let meeting = &mut self.meetings[g];
                meeting.arrived += 1;
                meeting.message = message;
                if meeting.arrived == self.world.groups[g].members.len() {
                    meeting.arrived = 0;
                    let traffic = self.stages[self.world.groups[g].stage].messages[message].traffic;
                    self.begin(Kind::Group(g), traffic, (class, after), now);
                }
            }
            Queued::Send { side, slot } => {
                let traffic = self.stages[self.world.classes[class].stage].boundary;
                self.begin(Kind::Send { from: class, side, slot }, traffic, (class, after), now);
            }
        }
    }

    /// A message begins: the last that it waited for was `last`, and that one's message before.
    fn begin(&mut self, kind: Kind, traffic: Traffic, last: (usize, Kept), now: Ticks) {
        let kept = self.log.as_mut().map(|log| log.begin(Message::new(kind, last, now)));
        let transfer = Transfer { kind, traffic, left: 0, kept };
        let id = match self.free.pop() {
            Some(id) => {
                self.transfers[id] = transfer;
                id
            }
            None => {
                self.transfers.push(transfer);
                self.transfers.len() - 1
            }
        };
        self.tax(kind, now, true);
        let latency = crate::clock::ticks(traffic.latency_s);
        self.heap.push(Reverse((now + latency, Event::Moves { transfer: id })));
    }

    fn moves(&mut self, id: usize, now: Ticks) {
        let Transfer { kind, traffic, .. } = self.transfers[id];
        let (world, mut left) = (self.world, 0);
        match kind {
            Kind::Group(g) => {
                for &class in &world.groups[g].members {
                    let at = world.groups[g].axis as usize;
                    let owner = Owner { transfer: id, class };
                    left += send(&mut self.flows, &world.classes[class].paths[at], traffic, owner, now);
                }
            }
            Kind::Send { from, side, .. } => {
                let owner = Owner { transfer: id, class: from };
                left += send(&mut self.flows, &world.classes[from].sends[side], traffic, owner, now);
            }
            Kind::Read(class) | Kind::Write(class) => {
                let owner = Owner { transfer: id, class };
                left += send(&mut self.flows, world.storage_paths(class, kind), traffic, owner, now);
            }
        }
        self.transfers[id].left = left;
        if left == 0 {
            self.arrives(id, now);
        }
    }

    /// One member's bytes are there, or some of them.
    fn part_arrives(&mut self, owner: Owner, now: Ticks) {
        let transfer = &mut self.transfers[owner.transfer];
        transfer.left -= 1;
        let (left, kept) = (transfer.left, transfer.kept);
        if let (Some(log), Some(kept)) = (&mut self.log, kept) {
            log.part(kept, owner.class, now);
        }
        if left == 0 {
            self.arrives(owner.transfer, now);
        }
    }

    /// A message is there: its streams go on, and ranks that waited.
    fn arrives(&mut self, id: usize, now: Ticks) {
        let Transfer { kind, kept, .. } = self.transfers[id];
        self.free.push(id);
        if let (Some(log), Some(kept)) = (&mut self.log, kept) {
            log.end(kept, now);
        }
        self.tax(kind, now, false);
        match kind {
            Kind::Group(g) => {
                let group = &self.world.groups[g];
                let stream = stream(group.axis);
                for &class in &group.members {
                    self.sent(class, stream, kept, now);
                }
            }
            Kind::Send { from, side, slot } => {
                let to = self.world.classes[from].beside[side];
                let at = self.slot(slot);
                self.ranks[to].inbox[at] = true;
                self.sent(from, [Stream::Next, Stream::Before][side], kept, now);
                self.wake(to, kept, now, |why| why == Why::Stage);
            }
            Kind::Read(class) => {
                self.ranks[class].reads = false;
                self.wake(class, kept, now, |why| why == Why::Storage);
            }
            Kind::Write(_) => {}
        }
    }

    fn sent(&mut self, class: usize, stream: Stream, kept: Kept, now: Ticks) {
        let s = &mut self.ranks[class].streams[stream as usize];
        s.busy = false;
        s.done += 1;
        self.pump(class, stream, kept, now);
        self.wake(class, kept, now, |why| why == Why::Stream(stream));
    }

    fn wake(&mut self, class: usize, kept: Kept, now: Ticks, by: impl Fn(Why) -> bool) {
        if self.ranks[class].waiting.is_some_and(by) {
            self.ranks[class].woken_by = kept;
            self.advance(class, now);
        }
    }

    /// Kernels of ranks whose groups talk are slower meanwhile.
    fn tax(&mut self, kind: Kind, now: Ticks, begins: bool) {
        let Kind::Group(g) = kind else { return };
        let group = &self.world.groups[g];
        let stream = stream(group.axis) as usize;
        if self.taxed[stream] == USUAL {
            return;
        }
        for &class in &group.members {
            self.ranks[class].taxed[stream] = begins;
            self.set_speed(class, now);
        }
    }

    /// Sets the speed of a rank's kernels to what marks, windows and messages beside them make of it.
    fn set_speed(&mut self, class: usize, now: Ticks) {
        let mark = &self.world.classes[class].mark;
        let mut speed = u128::from(mark.speed);
        for window in mark.windows.iter().filter(|w| w.from <= now && now < w.to) {
            speed = speed * u128::from(window.speed) / u128::from(USUAL);
        }
        for (taxed, by) in self.ranks[class].taxed.into_iter().zip(self.taxed) {
            if taxed {
                speed = speed * u128::from(by) / u128::from(USUAL);
            }
        }
        if let Some((at, version)) = self.ranks[class].change_speed(now, speed as Speed) {
            self.heap.push(Reverse((at, Event::Due { class, version })));
        }
    }

    fn slot(&self, slot: Slot) -> usize {
        (usize::from(slot.backward) * self.chunks + slot.chunk) * self.micro_batches + slot.micro_batch
    }

    fn outcome(mut self, is_whole: bool) -> Result<Played> {
        if is_whole && let Some(class) = self.ranks.iter().position(|r| !r.done) {
            let rank = self.world.classes[class].rank;
            let what = format!("rank {rank} waits for ever for {:?}", self.ranks[class].waiting);
            return Err(
                Error::failure(what).hint("a link that carries nothing, or a program that cannot run")
            );
        }
        let ends: Vec<Ticks> = self.ranks.iter().map(|r| r.since).collect();
        let mut log = self.log.take();
        if let Some(log) = &mut log {
            log.slices = self.ranks.iter_mut().map(|r| r.slices.take().unwrap_or_default()).collect();
        }
        Ok(Played {
            end: ends.iter().copied().max().unwrap_or(0),
            ends,
            spent: self.ranks.iter().map(Rank::spent).collect(),
            events: self.events,
            log,
            is_whole,
        })
    }
}

/// Puts a message's bytes on the links of one member; how many flows that takes.
fn send<'w>(
    flows: &mut Flows<'w>,
    paths: &'w [Vec<Path>; 2],
    traffic: Traffic,
    owner: Owner,
    now: Ticks,
) -> usize {
    let mut count = 0;
    for (paths, bytes) in paths.iter().zip([traffic.inside_bytes, traffic.outside_bytes]) {
        for path in paths {
            let bytes = (bytes * path.share).round() as u64;
            if bytes > 0 {
                flows.start(now, &path.uses, path.limit, bytes, owner);
                count += 1;
            }
        }
    }
    count
}

pub(crate) fn stream(axis: Axis) -> Stream {
    match axis {
        Axis::Tensor => Stream::Tensor,
        Axis::Context => Stream::Context,
        Axis::Expert => Stream::Expert,
        Axis::All | Axis::Near | Axis::Far => Stream::Data,
        Axis::ExpertAll | Axis::ExpertNear | Axis::ExpertFar => Stream::Data,
    }
}

const _: () = assert!(Stream::Before as usize + 1 == STREAMS);

impl Rank {
    /// Where its time went, in seconds.
    fn spent(&self) -> Spent {
        let of = |s: Stream| seconds(self.waited[s as usize]);
        Spent {
            compute_s: seconds(self.computed),
            tensor_s: of(Stream::Tensor),
            context_s: of(Stream::Context),
            expert_s: of(Stream::Expert),
            data_s: of(Stream::Data),
            send_s: of(Stream::Next) + of(Stream::Before),
            stage_s: seconds(self.waited_stage),
            host_s: seconds(self.waited_host),
            storage_s: seconds(self.waited_storage),
        }
    }
}
