//! The step loop under an agent: joining, and meeting again when a rank was lost or came.

use std::sync::atomic::AtomicBool;

use elastic::{Orders, Report};
use journal::{Journal, Record, tensorboard::EventWriter};
use spec::{Error, Result, RunSpec};

use super::trouble::Looks;
use super::waits::Waits;
use super::{Event, Pace, Trainer, host, load_step, now_us};
use crate::begin::Beginning;
use crate::documents::attend;
use crate::peak::Peak;
use crate::run_dir::RunDir;
use crate::survive::Agent;
use crate::survive::copies::Copies;
use crate::survive::laps::Laps;
use crate::survive::meet::{Kept, Lifeline, Opened, Placed, Way};
use crate::survive::share::Share;

/// Before a rank trains, whoever started it catches its signals.
static NEVER: AtomicBool = AtomicBool::new(false);

/// What ranks asked for in the votes of a step.
#[derive(Clone, Copy, Default)]
pub(super) struct Votes {
    pub(super) stop: bool,
    /// Some rank has orders to meet again.
    pub(super) meet: bool,
}

impl Trainer {
    /// Joins the ranks of a job whose agent can bring them together again: at its start, or in the place of a rank that was
    /// lost. Returns once this rank has work; a spare waits for it here, and gets `None` if there is none to the end.
    ///
    /// # Errors
    /// If run file, data, layout and checkpoint do not fit together, files cannot be written, or the agent is gone.
    pub fn join(way: Box<dyn Way>, agent: Agent, orders: Orders, trace: bool) -> Result<Option<Trainer>> {
        let mut lifeline = Lifeline::new(agent, way, orders, trace);
        let mut opened = Opened::default();
        let Some(placed) = lifeline.settle(&mut opened, None, &NEVER)? else { return Ok(None) };
        let (Some(begin), Some(streams)) = (opened.begin, opened.streams) else {
            return Err(Error::failure("a rank that has a place has opened its run"));
        };
        let (rank, round) = (placed.exec.program.rank, lifeline.orders.round);
        let why = lifeline.orders.why.clone();
        let dir = RunDir::of(&placed.run);
        let resumed = match &placed.source {
            crate::survive::meet::From::Checkpoint(path) => Some(path.clone()),
            _ => None,
        };
        // What memory held may be other than what was saved.
        let read = if resumed.is_some() { placed.step } else { 0 };
        let source = placed.source.to_string();
        let mut t = Trainer {
            journal: Journal::open(dir.path(), rank)?,
            sample: vec![0; placed.run.batch.sequence + 1],
            run: placed.run,
            dir,
            exec: placed.exec,
            streams,
            events: None,
            step: placed.step,
            peak: None,
            begin,
            resumed,
            session: placed.session,
            era: placed.era,
            lifeline: Some(lifeline),
            untold: Vec::new(),
            owes: placed.owes,
            is_whole: true,
            saving: None,
            copy: Vec::new(),
            watch: opened.watch,
            looks: Looks::since(read),
            drills: Vec::new(),
            waits: Waits::default(),
        };
        attend(&mut t.exec, &t.run, t.begin.prepared())?;
        if t.step < t.run.train.steps as u64 {
            load_step(&mut t.exec, &t.run, t.streams.train.as_ref(), t.step, &mut t.sample)?;
        }
        if round == 0 {
            t.peak = Some(Peak::measure(&mut *t.exec.device, &crate::text::cache(&t.run)));
        }
        lead(rank, &t.begin, &t.run, &t.dir, &mut t.events)?;
        t.announce(rank)?;
        match t.keep_copies() {
            Ok(()) if round == 0 => Ok(Some(t)),
            Ok(()) => {
                let mut untold = Vec::new();
                t.recovered(why, source, &mut |event| match event {
                    Event::Record(record) => untold.push(record),
                    Event::Placed { .. } | Event::Eta { .. } => {}
                });
                t.untold = untold;
                Ok(Some(t))
            }
            Err(e) if t.is_stranded() => {
                Ok(t.meet_again(Some(e), &NEVER, &mut Pace::new(0), &mut |_| {})?.then_some(t))
            }
            Err(e) => Err(e),
        }
    }

    /// Whether this rank has orders to meet the others elsewhere.
    pub(super) fn is_summoned(&mut self) -> bool {
        self.lifeline.as_mut().is_some_and(|l| l.agent.has_orders(l.orders.round))
    }

    /// Whether what failed is the world, and an agent can make another.
    pub(super) fn is_stranded(&self) -> bool {
        self.lifeline.is_some() && self.exec.mesh.failure().is_some()
    }

    /// What the votes of a step were about.
    pub(super) fn votes(&self, said: bool, stop: bool, summoned: bool) -> Result<Votes> {
        if self.lifeline.is_none() || !said {
            return Ok(Votes { stop: said, meet: false });
        }
        let all = self.exec.exchange(&[u8::from(stop), u8::from(summoned)])?;
        let any = |i: usize| all.iter().any(|votes| votes.get(i) == Some(&1));
        Ok(Votes { stop: any(0), meet: any(1) })
    }

    /// Brings the copies in memory up to the last step, if they are due, and tells the agent of the step.
    pub(super) fn refresh_copies(&mut self) -> Result<()> {
        let is_due = self.due(self.run.checkpoint.memory_every);
        let Some(l) = self.lifeline.as_mut() else { return Ok(()) };
        if let Some(copies) = l.copies.as_mut().filter(|c| is_due && c.step() < self.step) {
            copies.refresh(&self.exec, self.step)?;
        }
        l.agent.say(&Report::Step { step: self.step });
        Ok(())
    }

    /// Makes the first copies of a world, and lets go of those of the worlds before.
    pub(super) fn keep_copies(&mut self) -> Result<()> {
        let Some(l) = self.lifeline.as_mut() else { return Ok(()) };
        if self.run.checkpoint.memory_every.is_some() && !self.exec.mesh.is_alone() {
            l.copies = Some(Copies::new(&self.exec, self.step, self.era, &mut l.held)?);
        } else if !self.exec.mesh.is_alone() {
            // Nobody lets go while another may still be lost without having the state.
            self.exec.mesh.barrier()?;
        }
        l.held.clear();
        Ok(())
    }

    /// The run, with the layout that it has now.
    pub fn run(&self) -> &RunSpec {
        &self.run
    }

    /// This rank's number among those that train now.
    pub fn rank(&self) -> usize {
        self.exec.program.rank
    }

    /// Threads that this rank computes on.
    pub fn threads(&self) -> usize {
        self.exec.device.threads()
    }

    /// Bytes of copies in memory of this rank's and another's share of the state.
    pub fn copies_bytes(&self) -> usize {
        let copies = self.lifeline.as_ref().and_then(|l| l.copies.as_ref());
        copies.map_or(0, Copies::bytes)
    }

    /// Leaves this world, which has failed if `lost` says so, and goes on in another: whether there is one that needs this
    /// rank.
    pub(super) fn meet_again(
        &mut self,
        lost: Option<Error>,
        stop: &AtomicBool,
        pace: &mut Pace,
        each: &mut dyn FnMut(Event),
    ) -> Result<bool> {
        let detection_s = self.exec.mesh.silence_s();
        if let Some(l) = &mut self.lifeline {
            l.laps = Laps::begin(detection_s);
        }
        if lost.is_none() {
            // All ranks are here for what is nearly on the disk.
            self.finish_saving(each);
        }
        let mut lost = lost;
        loop {
            let gone = self.leave(lost.take(), stop).and_then(|()| self.place(stop, each));
            match gone {
                Ok(true) => break,
                Ok(false) => return Ok(false),
                Err(e) if self.is_stranded() => lost = Some(e),
                Err(e) => {
                    self.write_failed(self.step + 1, &e);
                    return Err(e);
                }
            }
        }
        *pace = Pace::new(self.step);
        Ok(true)
    }

    /// Lets go of the world, keeping what memory holds of the state, and hears where to go.
    fn leave(&mut self, lost: Option<Error>, stop: &AtomicBool) -> Result<()> {
        if let Some(saving) = self.saving.take() {
            // Without the others it is never committed; the next save clears it away.
            self.copy = saving.join().0;
        }
        let Some(l) = self.lifeline.as_mut() else { return Ok(()) };
        let copies = l.copies.take();
        let has_it = copies.as_ref().is_some_and(|c| c.step() == self.step);
        if self.is_whole && !has_it {
            // Without memory for it the copies have to do.
            l.held.extend(Share::take(&self.exec, self.step, self.era));
        }
        l.held.extend(copies.into_iter().flat_map(Copies::into_shares));
        // Others may write to memory that they reach until they have left too: that is known of those whom this agent seats.
        let is_ours = self.exec.mesh.near() <= l.orders.local_world;
        let device = self.exec.leave();
        l.kept = is_ours.then(|| Kept {
            device,
            layout: self.run.layout.clone(),
            rank: self.exec.program.rank,
            state: self.is_whole.then_some((self.step, self.era)),
        });
        l.dealt = Some((self.era, self.run.layout.clone()));
        self.is_whole = false;
        match lost {
            Some(e) => l.strand(e, stop),
            None => l.follow(stop),
        }
    }

    /// Meets the others and takes the place that this rank has among them, if it has one.
    fn place(&mut self, stop: &AtomicBool, each: &mut dyn FnMut(Event)) -> Result<bool> {
        let owes = self.owes.then_some(self.step);
        let Some(l) = self.lifeline.as_mut() else { return Ok(false) };
        // What was opened stays open.
        let (begin, watch) = (Some(self.begin.clone()), self.watch.clone());
        let mut opened = Opened { begin, streams: None, is_elsewhere: true, watch };
        let placed = l.settle(&mut opened, owes, stop)?;
        (self.watch, self.waits) = (opened.watch, Waits::default());
        if let Some(begin) = opened.begin {
            self.begin = begin;
        }
        let Some(Placed { run, fitted, exec, step, session, era, owes, source }) = placed else {
            return Ok(false);
        };
        let was = self.exec.program.rank;
        (self.run, self.exec, self.step, self.owes) = (run, exec, step, owes);
        (self.session, self.era) = (session, era);
        self.is_whole = true;
        // What memory held was looked at no more than the steps were.
        self.looks = Looks::since(self.looks.right.min(step));
        let rank = self.exec.program.rank;
        if rank != was {
            self.journal = Journal::open(self.dir.path(), rank)?;
            self.events = None;
        }
        lead(rank, &self.begin, &self.run, &self.dir, &mut self.events)?;
        let why = self.lifeline.as_ref().map(|l| l.orders.why.clone()).unwrap_or_default();
        each(Event::Placed { rank, step });
        self.keep_copies()?;
        self.recovered(format!("{why}; {fitted}"), source.to_string(), each);
        Ok(true)
    }

    fn recovered(&mut self, why: String, source: String, each: &mut dyn FnMut(Event)) {
        let (time_us, step, world) = (now_us(), self.step, self.run.layout.world());
        let Some(l) = &mut self.lifeline else { return };
        l.laps.lap("copies");
        let (detection_s, recovery_s, phases) = (l.laps.detection_s, l.laps.total_s(), l.laps.phases());
        let session = Some(self.session);
        let record =
            Record::Recovered { time_us, step, why, source, world, session, detection_s, recovery_s, phases };
        self.note(record, each);
    }
}

/// Writes what rank 0 alone writes.
pub(super) fn lead(
    rank: usize,
    begin: &Beginning,
    run: &RunSpec,
    dir: &RunDir,
    events: &mut Option<EventWriter>,
) -> Result<()> {
    if rank == 0 {
        begin.write(run, dir)?;
        if events.is_none() {
            *events = Some(EventWriter::create(&dir.tensorboard(), now_us(), &host(), rank)?);
        }
    }
    Ok(())
}
