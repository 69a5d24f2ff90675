//! One class of ranks on the clock: where it is in its step, its kernel, its streams.

use std::collections::VecDeque;

use super::links::Kept;
use super::record::Slice;
use super::{Event, Player, Queued, Why};
use crate::clock::{Speed, Ticks, USUAL};
use crate::steps::{Op, STREAMS, StagePass, Stream};
use std::cmp::Reverse;

/// A stream: messages one after another.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    pub(super) queue: VecDeque<Queued>,
    pub(super) busy: bool,
    pub(super) started: usize,
    pub(super) done: usize,
}

/// A rank's state.
#[derive(Clone, Debug)]
pub(super) struct Rank {
    /// Which pass, and where in it.
    pass: usize,
    at: Phase,
    pass_start: Ticks,
    /// What it waits for.
    pub(super) waiting: Option<Why>,
    /// Since when it waits or computes; once it is done, when that was.
    pub(super) since: Ticks,
    pub(super) done: bool,
    pub(super) streams: [Queue; STREAMS],
    /// Messages of other stages that have arrived.
    pub(super) inbox: Vec<bool>,
    /// The next step's tokens are on their way.
    pub(super) reads: bool,
    /// The message that ended its wait.
    pub(super) woken_by: Kept,
    /// What it did, if that is kept.
    pub(super) slices: Option<Vec<Slice>>,
    /// Work left in its kernel at `worked`, in ticks at a millionth of the usual speed.
    left: u128,
    worked: Ticks,
    speed: Speed,
    /// Streams whose messages are under way beside its kernels.
    pub(super) taxed: [bool; STREAMS],
    /// Kernels begun.
    kernels: u64,
    /// How often its next event was set anew.
    version: u32,
    pub(super) computed: Ticks,
    pub(super) waited: [Ticks; STREAMS],
    pub(super) waited_stage: Ticks,
    pub(super) waited_host: Ticks,
    pub(super) waited_storage: Ticks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before its first op.
    Needs,
    /// The next op.
    Op(usize),
    /// Handing its outcome on.
    Hands,
}

impl Rank {
    pub(super) fn new(slots: usize) -> Self {
        Rank {
            pass: 0,
            at: Phase::Needs,
            pass_start: 0,
            waiting: None,
            since: 0,
            done: false,
            streams: Default::default(),
            inbox: vec![false; slots],
            reads: false,
            woken_by: None,
            slices: None,
            left: 0,
            worked: 0,
            speed: USUAL,
            taxed: [false; STREAMS],
            kernels: 0,
            version: 0,
            computed: 0,
            waited: [0; STREAMS],
            waited_stage: 0,
            waited_host: 0,
            waited_storage: 0,
        }
    }

    /// Whether an event that was set is still the one to come.
    pub(super) fn due(&mut self, version: u32) -> bool {
        self.version == version && !self.done
    }

    /// The kernel goes on at another speed: when it ends, if there is one and it ends.
    pub(super) fn change_speed(&mut self, now: Ticks, speed: Speed) -> Option<(Ticks, u32)> {
        if speed == self.speed {
            return None;
        }
        let computes = self.waiting == Some(Why::Compute);
        if computes {
            let worked = u128::from(self.speed) * u128::from(now - self.worked);
            self.left = self.left.saturating_sub(worked);
            self.worked = now;
            self.version += 1;
        }
        self.speed = speed;
        if computes { self.kernel_ends(now) } else { None }
    }

    fn kernel_ends(&self, now: Ticks) -> Option<(Ticks, u32)> {
        (self.speed > 0).then(|| (now + self.left.div_ceil(self.speed.into()) as Ticks, self.version))
    }

    fn wait(&mut self, why: Why, now: Ticks) {
        if self.waiting != Some(why) {
            self.waiting = Some(why);
            self.since = now;
        }
    }

    /// Is told to stop, wherever it is.
    pub(super) fn stop(&mut self, now: Ticks) {
        if !self.done {
            self.resume(now);
        }
    }

    /// Books the wait that ends.
    fn resume(&mut self, now: Ticks) {
        let took = now - self.since;
        if let (Some(slices), Some(why), true) = (&mut self.slices, self.waiting, took > 0) {
            let op = match self.at {
                Phase::Op(next) => next.saturating_sub(1),
                Phase::Needs | Phase::Hands => 0,
            };
            let by = self.woken_by.filter(|_| !matches!(why, Why::Compute | Why::Host));
            slices.push(Slice { from: self.since, to: now, why, pass: self.pass, op, by });
        }
        match self.waiting.take() {
            Some(Why::Compute) => self.computed += took,
            Some(Why::Stream(s)) => self.waited[s as usize] += took,
            Some(Why::Stage) => self.waited_stage += took,
            Some(Why::Host) => self.waited_host += took,
            Some(Why::Storage) => self.waited_storage += took,
            None => {}
        }
        self.since = now;
    }
}

impl Player<'_> {
    /// Runs a rank's ops until one has to be waited for.
    pub(super) fn advance(&mut self, class: usize, now: Ticks) {
        if self.ranks[class].waiting == Some(Why::Compute) {
            self.ranks[class].resume(now);
        }
        let stage = &self.stages[self.world.classes[class].stage];
        loop {
            let rank = &mut self.ranks[class];
            let Some(pass) = stage.passes.get(rank.pass) else {
                if rank.reads {
                    rank.wait(Why::Storage, now);
                    return;
                }
                rank.resume(now);
                rank.done = true;
                self.busy -= 1;
                return;
            };
            let step = match rank.at {
                Phase::Needs => self.needs(class, pass, now),
                Phase::Op(i) => match stage.lists[pass.list].get(i) {
                    Some(op) => self.op(class, *op, i, now),
                    None => self.hands(class, pass, now),
                },
                Phase::Hands => self.handed(class, stage.sends_beside, now),
            };
            if let Some(why) = step {
                self.ranks[class].wait(why, now);
                return;
            }
        }
    }

    fn needs(&mut self, class: usize, pass: &StagePass, now: Ticks) -> Option<Why> {
        if let Some(slot) = pass.needs
            && !self.ranks[class].inbox[self.slot(slot)]
        {
            return Some(Why::Stage);
        }
        let rank = &mut self.ranks[class];
        rank.resume(now);
        rank.pass_start = now;
        rank.at = Phase::Op(0);
        None
    }

    fn op(&mut self, class: usize, op: Op, i: usize, now: Ticks) -> Option<Why> {
        let rank = &mut self.ranks[class];
        match op {
            Op::Compute(_, ticks) => {
                rank.at = Phase::Op(i + 1);
                rank.resume(now);
                let jitter = &self.world.classes[class].mark.jitter;
                let takes = jitter.iter().fold(ticks, |ticks, jitter| jitter.of(rank.kernels, ticks));
                rank.kernels += 1;
                rank.left = u128::from(takes) * u128::from(USUAL);
                rank.worked = now;
                rank.version += 1;
                if let Some((at, version)) = rank.kernel_ends(now) {
                    self.heap.push(Reverse((at, Event::Due { class, version })));
                }
                return Some(Why::Compute);
            }
            Op::Start(stream, message) => {
                rank.at = Phase::Op(i + 1);
                let stage = self.world.classes[class].stage;
                let axis = self.stages[stage].messages[message].axis;
                self.start(class, stream, Queued::Group { axis, message }, now);
            }
            Op::Wait(stream, under_way) => {
                let s = &rank.streams[stream as usize];
                if s.started - s.done > under_way {
                    return Some(Why::Stream(stream));
                }
                rank.resume(now);
                rank.at = Phase::Op(i + 1);
            }
            Op::Launched(host) => {
                if rank.waiting != Some(Why::Host) {
                    let due = rank.pass_start + host.pass(now - rank.pass_start);
                    if now < due {
                        rank.version += 1;
                        self.heap.push(Reverse((due, Event::Due { class, version: rank.version })));
                        return Some(Why::Host);
                    }
                }
                rank.resume(now);
                rank.at = Phase::Op(i + 1);
            }
        }
        None
    }

    fn hands(&mut self, class: usize, pass: &StagePass, now: Ticks) -> Option<Why> {
        self.ranks[class].at = Phase::Hands;
        if let Some(slot) = pass.makes {
            let (stream, side) = if slot.backward { (Stream::Before, 1) } else { (Stream::Next, 0) };
            self.start(class, stream, Queued::Send { side, slot }, now);
        }
        None
    }

    fn handed(&mut self, class: usize, beside: bool, now: Ticks) -> Option<Why> {
        let rank = &mut self.ranks[class];
        if !beside {
            for stream in [Stream::Next, Stream::Before] {
                let s = &rank.streams[stream as usize];
                if s.started > s.done {
                    return Some(Why::Stream(stream));
                }
            }
        }
        rank.resume(now);
        rank.pass += 1;
        rank.at = Phase::Needs;
        None
    }
}
