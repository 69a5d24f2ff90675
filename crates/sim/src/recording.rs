//! A step that was played and kept: the chain of ops and messages that made it as long as it was, and what ranks did.

use std::collections::BTreeMap;

use program::Pass;
use serde::Serialize;

use crate::Step;
use crate::clock::{Ticks, seconds};
use crate::play::record::{Log, Message, Slice};
use crate::play::{Kind, Played, Why, stream};
use crate::steps::{Kernel, Op, StageSteps, Stream};
use crate::world::{Class, World};

/// A step with everything that happened in it.
pub struct Recording<'a> {
    world: World,
    stages: &'a [StageSteps],
    log: Option<Log>,
    step: Step,
    last: usize,
}

/// A stretch of the critical path: while it lasts, nothing else could have made the step end earlier.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PathLink {
    /// Where; of a message, the rank whose bytes were there last, or the one that it waited for.
    pub rank: usize,
    /// The rank's stage.
    pub stage: usize,
    /// What went on.
    pub what: &'static str,
    /// In which pass; none before, after and between them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass: Option<Pass>,
    /// Of which micro-batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// From when, in seconds of the step.
    pub from_s: f64,
    /// Until when.
    pub to_s: f64,
}

/// Something that a rank did, or waited for, or a message that it took part in.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// Whether it is a message, which has a stream of its own.
    pub is_message: bool,
    /// What it is.
    pub what: &'static str,
    /// The pass and micro-batch, if it is work of one.
    pub of: Option<(Pass, usize)>,
    /// From when, in seconds of the step.
    pub from_s: f64,
    /// Until when.
    pub to_s: f64,
}

impl<'a> Recording<'a> {
    pub(crate) fn new(world: World, stages: &'a [StageSteps], mut played: Played) -> Self {
        let last = played.last();
        let log = played.log.take();
        let step = Step::new(world.class_of.clone(), &world.classes, played);
        Recording { world, stages, log, step, last }
    }

    /// The step.
    pub fn step(&self) -> &Step {
        &self.step
    }

    /// Whether all that happened was kept; else there is no path and no timeline.
    pub fn is_kept(&self) -> bool {
        self.log.is_some() && self.step.is_whole
    }

    /// The critical path, from the start of the step to its end without a gap: from the last rank's end backwards, a
    /// kernel leads to what its rank did before, a wait to the message that ended it, and a message to the last of those
    /// it waited for. Of ranks that cannot be told apart it names the first.
    pub fn critical_path(&self) -> Vec<PathLink> {
        let mut out = Vec::new();
        let Some(log) = self.log.as_ref().filter(|_| self.is_kept()) else { return out };
        let (mut class, mut now) = (self.last, log.slices[self.last].last().map_or(0, |s| s.to));
        while let Some(slice) = log.ending_at(class, now) {
            let message = slice.by.map(|m| &log.messages[m as usize]);
            (class, now) = match message.filter(|m| m.from < now) {
                Some(message) => self.along(log, message, now, &mut out),
                None => {
                    out.push(self.link(
                        class,
                        self.name(class, slice),
                        self.work(class, slice),
                        slice.from,
                        now,
                    ));
                    (class, slice.from)
                }
            };
        }
        out.reverse();
        out
    }

    /// Follows a message that ended at `now` back to what it waited for: where that leaves the path.
    fn along(&self, log: &Log, message: &Message, now: Ticks, out: &mut Vec<PathLink>) -> (usize, Ticks) {
        let (mut message, mut now) = (message, now);
        loop {
            let rank = message.slowest.unwrap_or(message.last);
            out.push(self.link(rank, message_name(&self.world, message.kind), None, message.from, now));
            now = message.from;
            match message.after.map(|m| &log.messages[m as usize]) {
                // Its stream was busy with another until then.
                Some(before) if before.from < now => message = before,
                _ => return (message.last, now),
            }
        }
    }

    fn link(
        &self,
        class: usize,
        what: &'static str,
        of: Option<(Pass, usize)>,
        from: Ticks,
        to: Ticks,
    ) -> PathLink {
        let Class { rank, stage, .. } = self.world.classes[class];
        PathLink {
            rank,
            stage,
            what,
            pass: of.map(|o| o.0),
            micro_batch: of.map(|o| o.1),
            from_s: seconds(from),
            to_s: seconds(to),
        }
    }

    fn name(&self, class: usize, slice: &Slice) -> &'static str {
        match slice.why {
            Why::Compute => {
                let stage = &self.stages[self.world.classes[class].stage];
                let list = stage.passes.get(slice.pass).map(|p| &stage.lists[p.list]);
                match list.and_then(|l| l.get(slice.op)) {
                    Some(Op::Compute(Kernel::Attention, _)) => "attention",
                    Some(Op::Compute(Kernel::Memory, _)) => "memory-bound kernels",
                    Some(Op::Compute(Kernel::Optimizer, _)) => "optimizer",
                    _ => "matrix products",
                }
            }
            Why::Stream(s) => waited_for(s),
            Why::Stage => "waits for a stage",
            Why::Host => "waits for the host",
            Why::Storage => "waits for storage",
        }
    }

    fn work(&self, class: usize, slice: &Slice) -> Option<(Pass, usize)> {
        let stage = &self.stages[self.world.classes[class].stage];
        stage.passes.get(slice.pass)?.work.map(|w| (w.pass, w.micro_batch))
    }

    /// What a rank did, in order of its start.
    pub fn timeline(&self, rank: usize) -> Vec<Bar> {
        let Some(log) = &self.log else { return Vec::new() };
        let class = self.step.ends.class_of[rank] as usize;
        let bar = |is_message, what, of, from: Ticks, to: Ticks| Bar {
            is_message,
            what,
            of,
            from_s: seconds(from),
            to_s: seconds(to),
        };
        let own = log.slices[class]
            .iter()
            .map(|s| bar(false, self.name(class, s), self.work(class, s), s.from, s.to));
        let takes_part = |m: &&Message| match m.kind {
            Kind::Group(g) => self.world.groups[g].members.contains(&class),
            Kind::Send { from, .. } | Kind::Read(from) | Kind::Write(from) => from == class,
        };
        let said = log.messages.iter().filter(takes_part);
        let said = said.map(|m| bar(true, message_name(&self.world, m.kind), None, m.from, m.to));
        let mut out: Vec<Bar> = own.chain(said).collect();
        out.sort_by(|a, b| a.from_s.total_cmp(&b.from_s));
        out
    }
}

/// Seconds of a critical path, the largest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shares {
    /// By what went on.
    pub by_what: Vec<(&'static str, f64)>,
    /// By rank.
    pub by_rank: Vec<(usize, f64)>,
}

impl Shares {
    /// Of a path.
    pub fn of(path: &[PathLink]) -> Self {
        let (mut whats, mut ranks) = (BTreeMap::new(), BTreeMap::new());
        for link in path {
            *whats.entry(link.what).or_insert(0.0) += link.to_s - link.from_s;
            *ranks.entry(link.rank).or_insert(0.0) += link.to_s - link.from_s;
        }
        Shares { by_what: sorted(whats), by_rank: sorted(ranks) }
    }
}

fn sorted<K: Ord>(seconds: BTreeMap<K, f64>) -> Vec<(K, f64)> {
    let mut out: Vec<(K, f64)> = seconds.into_iter().collect();
    out.sort_by(|a, b| f64::total_cmp(&b.1, &a.1));
    out
}

fn waited_for(s: Stream) -> &'static str {
    match s {
        Stream::Tensor => "waits for tensor messages",
        Stream::Context => "waits for context messages",
        Stream::Expert => "waits for experts",
        Stream::Data => "waits for replicas",
        Stream::Next | Stream::Before => "waits to hand on",
    }
}

fn message_name(world: &World, kind: Kind) -> &'static str {
    match kind {
        Kind::Group(g) => match stream(world.groups[g].axis) {
            Stream::Tensor => "tensor messages",
            Stream::Context => "context messages",
            Stream::Expert => "expert messages",
            _ => "replicas' messages",
        },
        Kind::Send { .. } => "messages between stages",
        Kind::Read(_) => "token reads",
        Kind::Write(_) => "checkpoint writes",
    }
}
