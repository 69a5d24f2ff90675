//! The run under faults.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use spec::stats::median;
use spec::{Context, Error, Result};
use train::{Audit, RunDir};

use crate::faults::{ALONE, Fault, Kind, Layout, Outcome, by_kind, pick};
use crate::links::State;
use crate::session::{Ended, Session, signal};
use crate::{Place, Report};

/// What a job says once ranks have met again.
const RECOVERED: &str = ": goes on after step ";
/// What it says once a checkpoint is written.
const SAVED: &str = "saved ";
/// What agents say when the store has another host, before its address.
const MOVED: &str = "the job's store is now at ";
/// Steps without storage: two checkpoints fail.
const STEPS_WITHOUT_STORAGE: u64 = 10;
/// Steps with a slow link, or after the clock has jumped.
const STEPS_BESIDE: u64 = 5;
/// The clock jumps by less than so many seconds, forward or back.
const JUMP_S: u64 = 86_400;
/// A full disk has less room than this left: the share of a rank in a checkpoint is larger.
const ROOM_BYTES: u64 = 40_000;
/// What the folder of a checkpoint that is not whole yet ends with.
const UNDER_WAY: &str = ".tmp";
/// Several times the steps from one checkpoint to the next.
const SAVE_WITHIN: Duration = Duration::from_secs(10);
/// A save takes some milliseconds.
const BETWEEN_LOOKS: Duration = Duration::from_micros(200);
/// What agents end with that were asked to: ranks have saved, or the launcher passes the signal on (128 + SIGTERM).
const ASKED: [i32; 2] = [130, 143];

const RUN: &str = "run";

/// The run under faults.
pub(crate) struct Disturbed<'a> {
    place: &'a Place<'a>,
    /// Gone between the end of one and the start of the next.
    session: Option<Session>,
    sessions: usize,
    met: Vec<Fault>,
    restarts_s: Vec<f64>,
    recoveries_s: Vec<f64>,
    pub(crate) report: Report,
}

impl<'a> Disturbed<'a> {
    pub(crate) fn new(place: &'a Place<'a>) -> Result<Self> {
        let report = Report { steps: place.steps, ..Report::default() };
        let (met, restarts_s, recoveries_s) = Default::default();
        let mut run = Disturbed { place, session: None, sessions: 0, met, restarts_s, recoveries_s, report };
        let layout = pick(place.chaos.seed, place.chaos.ranks, |_| true).unwrap_or(ALONE);
        run.start(layout)?;
        Ok(run)
    }

    /// Lets a fault happen and the run go on; false if the run was over before.
    pub(crate) fn meet(&mut self, fault: Fault) -> Result<bool> {
        let suits = |layout| fault.kind.suits(layout);
        if !suits(self.session()?.layout) {
            self.change(fault.layout, suits)?;
        }
        if self.session()?.steps(fault.after_steps)?.is_none() {
            return Ok(false);
        }
        self.met.push(fault);
        self.report.faults += 1;
        let began = Instant::now();
        let outcome = fault.kind.outcome(self.session()?.layout);
        let goes_on = match outcome {
            Outcome::GoesOn => self.beside(fault)?,
            Outcome::MeetsAgain => self.survive(fault, began)?,
            Outcome::Ends => self.restart(fault, began)?,
        };
        self.report.recoveries += 1;
        Ok(goes_on)
    }

    /// Moves the run to a job whose layout suits what is to come; it is no fault.
    fn change(&mut self, choice: u64, suits: impl Fn(Layout) -> bool) -> Result<()> {
        self.leave()?;
        let layout = pick(choice, self.place.chaos.ranks, suits);
        self.start(layout.ok_or_else(|| Error::failure("no layout suits"))?)
    }

    /// What a job does not lose anybody by.
    fn beside(&mut self, fault: Fault) -> Result<bool> {
        let place = self.place;
        let steps = match fault.kind {
            Kind::SlowLink | Kind::ClockJump => STEPS_BESIDE,
            _ => STEPS_WITHOUT_STORAGE,
        };
        let disk = || place.disk.as_ref().ok_or_else(|| Error::failure("there is no disk"));
        match fault.kind {
            Kind::SlowLink => drop(place.links.set(fault.victim, State::Slow)),
            Kind::ClockJump => {
                let seconds = (fault.victim % (2 * JUMP_S)) as i64 - JUMP_S as i64;
                let clock = place.clock();
                fs::write(&clock, seconds.to_string()).map_err(|e| Error::io("set", &clock, &e))?;
            }
            Kind::FullDisk => disk()?.fill(fault.victim % ROOM_BYTES)?,
            Kind::ReadOnlyDisk => disk()?.set_read_only(true)?,
            _ => self.move_checkpoints(true)?,
        }
        let went_on = self.session()?.steps(steps)?;
        match fault.kind {
            Kind::SlowLink => place.links.mend(),
            Kind::ClockJump => {}
            Kind::FullDisk => disk()?.empty()?,
            Kind::ReadOnlyDisk => disk()?.set_read_only(false)?,
            _ => self.move_checkpoints(false)?,
        }
        // By now a later checkpoint may have failed for good if the run ended meanwhile.
        went_on.ok_or_else(|| self.failed(&format!("training on through {:?}", fault.kind)))?;
        if fault.kind.needs_disk() || fault.kind == Kind::NoStorage {
            let saved = self.session()?.until(|line| line.starts_with(SAVED))?;
            if !saved && !self.is_done() {
                return Err(self.failed(&format!("saving again after {:?}", fault.kind)));
            }
        }
        Ok(true)
    }

    /// Waits until the ranks that are left, and those in the place of the lost, have done a step; false if the run was over
    /// before anybody missed them.
    fn survive(&mut self, fault: Fault, began: Instant) -> Result<bool> {
        let killed = self.strike(fault)?;
        let goes_on = self.recovered(fault, "going on without a restart")?;
        if goes_on {
            self.report.survived += 1;
            self.recoveries_s.push(began.elapsed().as_secs_f64());
        }
        self.place.links.mend();
        let Some(node) = killed.filter(|_| goes_on) else { return Ok(goes_on) };
        self.bring_back(node)?;
        self.recovered(fault, "taking in an agent that came back")
    }

    fn recovered(&mut self, fault: Fault, doing: &str) -> Result<bool> {
        let met = self.session()?.until(|line| line.contains(RECOVERED))?;
        let stepped = met && self.session()?.steps(1)?.is_some();
        if !stepped && !self.is_done() {
            return Err(self.failed(&format!("{doing} after {:?}", fault.kind)));
        }
        Ok(stepped)
    }

    /// Starts an agent that was killed once more; it is told where the store is now.
    fn bring_back(&mut self, node: usize) -> Result<()> {
        let (place, number) = (self.place, self.sessions - 1);
        let session = self.session()?;
        let endpoint = match session.said().rsplit_once(MOVED) {
            Some((_, after)) => {
                let found: String = after.chars().take_while(|c| !c.is_whitespace()).collect();
                found.trim_end_matches([',', ';']).to_owned()
            }
            None => session.endpoint.clone(),
        };
        session.endpoint = endpoint;
        let command = place.agent(RUN, session.layout, number, node, &session.endpoint, false);
        session.start(node, command)
    }

    /// Ends the job by a fault and starts it once more.
    fn restart(&mut self, fault: Fault, began: Instant) -> Result<bool> {
        self.strike(fault)?;
        // The next job may only be started when this one is gone, as a batch system does it.
        let ended = self.end_session()?;
        if fault.kind == Kind::Preempt && !ended.is(&ASKED) {
            return Err(self.failed("a job that was asked to save and leave"));
        }
        self.damage(fault)?;
        let layout = pick(fault.layout, self.place.chaos.ranks, |_| true);
        self.start(layout.unwrap_or(ALONE))?;
        // The first line of a step after the fault.
        let said = self.session()?.steps(1)?;
        if said.is_none() && !self.is_done() {
            return Err(self.failed(&format!("going on after {:?}", fault.kind)));
        }
        self.restarts_s.push(began.elapsed().as_secs_f64());
        Ok(true)
    }

    /// Does it; gives the agent that was killed while others live.
    fn strike(&mut self, fault: Fault) -> Result<Option<usize>> {
        let place = self.place;
        let session = self.session()?;
        let rank = session.rank(fault.victim);
        let nodes = session.layout.nodes;
        match fault.kind {
            Kind::KillRank => rank.into_iter().for_each(|pid| signal(pid, Signal::KILL)),
            // A stopped rank is noticed by those who wait for it; alone it has nobody.
            Kind::StopRank if session.layout.ranks == 1 => session.kill_all(),
            Kind::StopRank => rank.into_iter().for_each(|pid| signal(pid, Signal::STOP)),
            Kind::KillAgent if nodes > 1 => {
                let node = (session.host + 1) % nodes;
                session.kill_agent(node)?;
                return Ok(Some(node));
            }
            Kind::KillHost => {
                let node = session.host;
                session.kill_agent(node)?;
                session.host = (node + 1) % nodes;
                return Ok(Some(node));
            }
            Kind::KillAgent => session.signal_agents(Signal::KILL),
            Kind::Preempt => session.signal_agents(Signal::TERM),
            Kind::TornCheckpoint | Kind::BitFlip => session.kill_all(),
            Kind::CutLink => drop(place.links.set(fault.victim, State::Cut)),
            Kind::SilentLink => drop(place.links.set(fault.victim, State::Silent)),
            Kind::KillInSave => {
                await_save(&place.checkpoints(RUN));
                rank.into_iter().for_each(|pid| signal(pid, Signal::KILL));
            }
            Kind::SlowLink | Kind::ClockJump | Kind::NoStorage | Kind::FullDisk | Kind::ReadOnlyDisk => {}
        }
        Ok(None)
    }

    /// The job under way.
    fn session(&mut self) -> Result<&mut Session> {
        self.session.as_mut().ok_or_else(|| Error::failure("no job is under way"))
    }

    /// Starts the job once more.
    fn start(&mut self, layout: Layout) -> Result<()> {
        self.session = Some(self.place.start(RUN, layout, self.sessions)?);
        self.sessions += 1;
        Ok(())
    }

    /// Asks the job to save and end.
    fn leave(&mut self) -> Result<()> {
        self.session()?.signal_agents(Signal::TERM);
        self.end_session().map(drop)
    }

    fn end_session(&mut self) -> Result<Ended> {
        let session = self.session.take().ok_or_else(|| Error::failure("no job is under way"))?;
        let ended = session.end()?;
        self.report.hangs += usize::from(ended.hung);
        self.report.orphans += ended.orphans;
        Ok(ended)
    }

    /// Moves the checkpoints away, with a file in their place that nobody can write into, or back.
    fn move_checkpoints(&self, is_away: bool) -> Result<()> {
        let dir = self.checkpoints();
        let away = dir.with_extension("away");
        let io = |e| Error::io("take away", &dir, &e);
        if is_away {
            if dir.exists() {
                fs::rename(&dir, &away).map_err(io)?;
            }
            return fs::write(&dir, "").map_err(io);
        }
        fs::remove_file(&dir).map_err(io)?;
        if away.exists() { fs::rename(&away, &dir).map_err(io) } else { Ok(()) }
    }

    /// Damages the newest checkpoint, if there is one before it.
    fn damage(&self, fault: Fault) -> Result<()> {
        if !matches!(fault.kind, Kind::TornCheckpoint | Kind::BitFlip) {
            return Ok(());
        }
        let saved = ckpt::list(&self.checkpoints())?;
        let [.., _, (_, newest)] = saved.as_slice() else { return Ok(()) };
        let mut files: Vec<PathBuf> = fs::read_dir(newest)
            .map_err(|e| Error::io("read", newest, &e))?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        let path = &files[(fault.victim % files.len().max(1) as u64) as usize];
        let mut bytes = fs::read(path).map_err(|e| Error::io("read", path, &e))?;
        let at = (fault.layout % bytes.len().max(1) as u64) as usize;
        match fault.kind {
            Kind::TornCheckpoint => bytes.truncate(at),
            _ => bytes[at] ^= 1 << (fault.victim % 8),
        }
        fs::write(path, bytes).map_err(|e| Error::io("damage", path, &e))
    }

    fn checkpoints(&self) -> PathBuf {
        self.place.checkpoints(RUN)
    }

    /// Whether the newest checkpoint is of the last step.
    fn is_done(&self) -> bool {
        newest(&self.checkpoints()).is_ok_and(|(step, _)| step == self.place.steps)
    }

    /// Lets the run end undisturbed, and compares.
    pub(crate) fn finish(mut self) -> Result<Report> {
        let (chaos, place) = (self.place.chaos, self.place);
        (chaos.progress)("letting it end", self.report.faults, chaos.faults);
        if self.session()?.layout.ranks > 1 {
            // What is left says nothing new, and one rank is done with it soonest.
            self.leave()?;
            self.start(ALONE)?;
        }
        if !self.end_session()?.is(&[0]) {
            return Err(self.failed("the run under faults, left alone at last,"));
        }
        let difference = ckpt::diff(&newest(&place.checkpoints("alone"))?.1, &newest(&self.checkpoints())?.1)
            .context("compare the two runs")?;
        let audit = Audit::of(RunDir::new(chaos.dir.join(RUN)).path(), &|_, _| {})?;
        let mut report = self.report;
        report.bit_identical = difference.bit_equal();
        report.samples_lost = audit.ledger.samples_lost;
        report.steps_unrecorded = audit.ledger.steps_missing;
        report.samples_repeated = audit.ledger.samples_repeated;
        report.steps_redone = audit.ledger.steps_redone;
        report.tokens_equal = audit.tokens == train::Tokens::Equal;
        report.kinds = by_kind(&self.met);
        report.median_restart_s = median(self.restarts_s);
        report.median_recovery_s = median(self.recoveries_s);
        report.median_detection_s = median(audit.detections_s);
        report.damage = audit.damage;
        report.unrecorded = audit.ledger.missing.iter().map(|m| (m.first, m.last)).collect();
        Ok(report)
    }

    fn failed(&self, what: &str) -> Error {
        self.place.failed(what, RUN, self.sessions.saturating_sub(1))
    }
}

/// The newest checkpoint in a folder, and its step.
fn newest(folder: &Path) -> Result<(u64, PathBuf)> {
    let saved = ckpt::list(folder)?;
    saved
        .into_iter()
        .next_back()
        .ok_or_else(|| Error::failure(format!("no checkpoint in {}", folder.display())))
}

/// Waits until a checkpoint is being written, for as long as one may take to come.
fn await_save(checkpoints: &Path) {
    let deadline = Instant::now() + SAVE_WITHIN;
    let is_written = || {
        let entries = fs::read_dir(checkpoints).into_iter().flatten().flatten();
        entries.into_iter().any(|e| e.file_name().to_str().is_some_and(|name| name.ends_with(UNDER_WAY)))
    };
    while !is_written() && Instant::now() < deadline {
        std::thread::sleep(BETWEEN_LOOKS);
    }
}
