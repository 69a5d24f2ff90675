//! How ranks meet: at the start under an agent, when one was lost, and when one came.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use data::Streams;
use elastic::{Orders, Report};
use program::Request;
use serde::{Deserialize, Serialize};
use spec::{Context, Error, Kind, Layout, Result, RunSpec};

use super::agent::Agent;
use super::choose::newest_whole;
use super::copies::Copies;
use super::fetch::fetch;
use super::laps::Laps;
use super::share::{Label, Share};
use crate::begin::{Beginning, Weights};
use crate::device::Device;
use crate::exec::Executor;
use crate::host::now_us;
use crate::mesh::Mesh;
use crate::run_dir::RunDir;
use crate::trainer::{open_data, remembered, weights};
use crate::trouble::Watch;

/// How long a rank that has lost its world waits for orders: an agent has to find out who is left, over all hosts.
const ORDERS_TIMEOUT: Duration = Duration::from_secs(300);

/// How often a rank that waits for orders looks whether it is asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How a rank comes to the others, to its data and to what it computes on.
pub trait Way {
    /// The run with its layout for so many ranks as orders say, the same on all of them, and why it is that layout.
    ///
    /// # Errors
    /// If no layout does.
    fn run(&self, orders: &Orders) -> Result<(RunSpec, String)>;

    /// Joins the world that orders name.
    ///
    /// # Errors
    /// If others do not come in time or are started differently.
    fn connect(&self, orders: &Orders, run: &RunSpec) -> Result<comm::World>;

    /// Decides how the run begins and prepares its data, as `orders.rank`: rank 0 before all others.
    ///
    /// # Errors
    /// If run directory, checkpoints and data do not fit together.
    fn begin(&self, orders: &Orders, run: &RunSpec) -> Result<Beginning>;

    /// This rank is the first from now on: the run's directory is its own.
    ///
    /// # Errors
    /// If another process holds it.
    fn lead(&mut self, orders: &Orders, run: &RunSpec) -> Result<()>;

    /// Another rank is the first from now on: the run's directory is no longer this one's, if it was. Called before ranks
    /// meet, so that whoever leads finds it free.
    fn follow(&mut self) {}

    /// What to compute on; collective over the ranks of the mesh.
    ///
    /// # Errors
    /// If there is none, or ranks have different kinds.
    fn device(&self, orders: &Orders, run: &RunSpec, mesh: &Mesh) -> Result<Box<dyn Device>>;
}

/// A rank's means to go on when others are lost.
pub(crate) struct Lifeline {
    pub(crate) agent: Agent,
    way: Box<dyn Way>,
    /// Where it is, or is going.
    pub(crate) orders: Orders,
    /// What it holds of worlds that it has left.
    pub(crate) held: Vec<Share>,
    /// What it holds of the world that it is in.
    pub(crate) copies: Option<Copies>,
    /// The era that it has left, and its layout.
    pub(crate) dealt: Option<(u64, Layout)>,
    /// What it ran on there, with all that lies in it.
    pub(crate) kept: Option<Kept>,
    /// What its way to the next step is taking.
    pub(crate) laps: Laps,
    /// Record every op.
    trace: bool,
}

/// A device and its memory as a rank left them; the same program can go on in it.
pub(crate) struct Kept {
    pub(crate) device: Box<dyn Device>,
    pub(crate) layout: Layout,
    pub(crate) rank: usize,
    /// Step and session of weights and moments, if they are whole.
    pub(crate) state: Option<(u64, u64)>,
}

/// An executor in its place, and which state lies in it: nothing, or what was kept of the world before.
struct Seated {
    exec: Executor,
    is_new: bool,
    state: Option<(u64, u64)>,
}

/// What a rank opens once, and keeps through all meetings.
#[derive(Default)]
pub(crate) struct Opened {
    pub(crate) begin: Option<Beginning>,
    pub(crate) streams: Option<Streams>,
    /// Its data are open elsewhere.
    pub(crate) is_elsewhere: bool,
    /// What its next step is judged by: of the state that it has, and in the end of that which it goes on from.
    pub(crate) watch: Watch,
}

/// A place to train at.
pub(crate) struct Placed {
    pub(crate) run: RunSpec,
    /// Why it has that layout.
    pub(crate) fitted: String,
    pub(crate) exec: Executor,
    pub(crate) step: u64,
    pub(crate) session: u64,
    /// Tells by which dealing, in which world, a rank has its share of the state: kept while the layout is.
    pub(crate) era: u64,
    /// What is due after that step is not done yet.
    pub(crate) owes: bool,
    /// The checkpoint that weights and moments came from, or memory.
    pub(crate) source: From,
}

/// Where state came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Memory,
    Checkpoint(PathBuf),
    Beginning,
}

impl std::fmt::Display for From {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            From::Memory => f.write_str("memory"),
            From::Checkpoint(path) => write!(f, "{}", path.display()),
            From::Beginning => f.write_str("the beginning"),
        }
    }
}

/// What a rank says of itself when all have come.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    holds: Vec<Label>,
    /// The step after which something is due that this rank has not done.
    owes: Option<u64>,
    /// The newest checkpoint that it sees.
    saved: Option<u64>,
    /// The layout by which the shares of an era were dealt.
    dealt: Option<(u64, Layout)>,
    /// What it judges steps by.
    watch: Watch,
    time_us: u64,
}

/// Why a meeting came to nothing.
enum Broken {
    /// Another rank was lost, or later orders came: there will be another meeting.
    Off(Error),
    /// This rank cannot go on.
    Own(Error),
}

impl Broken {
    fn of(e: Error, mesh: Option<&Mesh>) -> Broken {
        let failed = mesh.is_some_and(|m| m.failure().is_some()) || comm::blames_peer(&e.to_string());
        if failed { Broken::Off(e) } else { Broken::Own(e) }
    }

    /// Those who wait in `meshes` hear that this rank cannot go on, if it is that.
    fn told<'a>(self, meshes: impl IntoIterator<Item = &'a Mesh>) -> Broken {
        if let Broken::Own(e) = &self {
            meshes.into_iter().for_each(|m| m.abort(&e.to_string()));
        }
        self
    }
}

impl Lifeline {
    pub(crate) fn new(agent: Agent, way: Box<dyn Way>, orders: Orders, trace: bool) -> Lifeline {
        Lifeline {
            agent,
            way,
            orders,
            held: Vec::new(),
            copies: None,
            dealt: None,
            kept: None,
            laps: Laps::begin(None),
            trace,
        }
    }

    /// Tells the agent that the world has failed, and waits for its orders.
    ///
    /// # Errors
    /// The failure itself, if nobody says where to go.
    pub(crate) fn strand(&mut self, e: Error, stop: &AtomicBool) -> Result<()> {
        // Orders that came before this rank noticed are about this very loss.
        if !self.agent.has_orders(self.orders.round) {
            let why = e.to_string();
            self.agent.say(&Report::Stranded { lost: comm::blamed(&why), why });
        }
        self.orders = self.await_orders(ORDERS_TIMEOUT, stop).ok_or(e)?;
        Ok(())
    }

    /// Waits for orders that are known to be on their way.
    pub(crate) fn follow(&mut self, stop: &AtomicBool) -> Result<()> {
        let none = || Error::failure("ranks meet again, and the agent does not say where");
        self.orders = self.await_orders(ORDERS_TIMEOUT, stop).ok_or_else(none)?;
        Ok(())
    }

    /// `None` if none come in time, the agent is gone, or this rank is asked to stop.
    fn await_orders(&mut self, timeout: Duration, stop: &AtomicBool) -> Option<Orders> {
        let mut awake = comm::Awake::begin();
        loop {
            let found = self.agent.orders(self.orders.round, LOOK_EVERY);
            let waited = awake.paused(LOOK_EVERY);
            let is_over = self.agent.is_gone() || stop.load(Ordering::Relaxed) || waited >= timeout;
            if found.is_some() || is_over {
                return found;
            }
        }
    }

    /// Meets the others until this rank has a place to train at. A rank that no layout has a place for waits as a spare;
    /// `None` if its agent hangs up, since the others are done, or it is asked to stop meanwhile.
    ///
    /// # Errors
    /// If this rank cannot go on, or nobody says where to go.
    pub(crate) fn settle(
        &mut self,
        opened: &mut Opened,
        owes: Option<u64>,
        stop: &AtomicBool,
    ) -> Result<Option<Placed>> {
        loop {
            match self.meet(opened, owes) {
                Ok(Some(placed)) => return Ok(Some(placed)),
                // Spares wait for as long as the others train.
                Ok(None) => match self.await_orders(Duration::MAX, stop) {
                    Some(orders) => self.orders = orders,
                    None => return Ok(None),
                },
                Err(Broken::Off(e)) => self.strand(e, stop)?,
                Err(Broken::Own(e)) => return Err(e),
            }
        }
    }

    /// One meeting; `None` if there are more ranks than any layout takes and this is one too many.
    fn meet(&mut self, opened: &mut Opened, owes: Option<u64>) -> Result<Option<Placed>, Broken> {
        let orders = self.orders.clone();
        self.laps.lap("orders");
        let (run, fitted) = self.way.run(&orders).map_err(Broken::Own)?;
        self.laps.lap("run");
        if orders.rank > 0 {
            self.way.follow();
        }
        self.agent.meets(Some(&orders));
        let world = self.way.connect(&orders, &run);
        self.agent.meets(None);
        let hall = Mesh::hall(world.map_err(|e| match e.kind() {
            Kind::User => Broken::Own(e),
            _ => Broken::Off(e),
        })?);
        self.laps.lap("meet");
        self.open(&hall, &orders, &run, opened).map_err(|e| Broken::of(e, Some(&hall)).told([&hall]))?;
        self.laps.lap("open");
        let active = run.layout.world();
        let (hall, mesh) = if active == orders.world {
            (None, Some(hall.found(&run.layout).map_err(Broken::Off)?))
        } else {
            let few =
                Orders { world: active, session: format!("{}/active", orders.session), ..orders.clone() };
            let world = (orders.rank < active).then(|| self.way.connect(&few, &run)).transpose();
            let mesh = world.and_then(|w| w.map(|w| Mesh::new(w, &run.layout)).transpose());
            let mesh = mesh.map_err(|e| {
                hall.abort(&e.to_string());
                Broken::Off(e)
            })?;
            (Some(hall), mesh)
        };
        let seated = mesh.map(|mesh| self.executor(&orders, &run, mesh)).transpose()?;
        // Whoever has no place gives its memory back while it waits for one.
        self.kept = None;
        self.laps.lap("build");
        let placed = self.restore(run, fitted, hall, seated, opened, owes);
        self.laps.lap("restore");
        placed
    }

    /// Opens the run's data on ranks that have not; rank 0 prepares what the others open.
    fn open(&mut self, hall: &Mesh, orders: &Orders, run: &RunSpec, opened: &mut Opened) -> Result<()> {
        if orders.rank == 0 {
            self.way.lead(orders, run)?;
            if opened.begin.is_none() {
                opened.begin = Some(self.way.begin(orders, run)?);
            }
        }
        hall.barrier()?;
        if opened.begin.is_none() {
            opened.begin = Some(self.way.begin(orders, run)?);
        }
        if let (None, false, Some(begin)) = (&opened.streams, opened.is_elsewhere, &mut opened.begin) {
            let streams = open_data(run, begin.prepared())?;
            begin.check_data(run, &streams)?;
            opened.streams = Some(streams);
        }
        Ok(())
    }

    fn executor(&mut self, orders: &Orders, run: &RunSpec, mesh: Mesh) -> Result<Seated, Broken> {
        let device = self.way.device(orders, run, &mesh);
        let device = device.map_err(|e| Broken::of(e, Some(&mesh)).told([&mesh]))?;
        let request = Request::of(run, orders.rank);
        let kept = self.kept.take().filter(|kept| {
            (&kept.layout, kept.rank) == (&run.layout, orders.rank)
                && (kept.device.kind(), kept.device.threads()) == (device.kind(), device.threads())
        });
        let made = match kept {
            Some(kept) => Executor::again(kept.device, &request, mesh, self.trace)
                .map(|(exec, is_kept)| (exec, !is_kept, kept.state.filter(|_| is_kept))),
            None => Executor::on(device, &request, mesh, self.trace).map(|exec| (exec, true, None)),
        };
        let (mut exec, is_new, state) = made.map_err(|e| Broken::of(e, None))?;
        exec.set_pulse(self.agent.pulse());
        exec.set_tables(&run.model).map_err(|e| Broken::of(e, Some(&exec.mesh)))?;
        Ok(Seated { exec, is_new, state })
    }

    /// Gives the executors the newest state that is whole: from memory, from a checkpoint, or the first.
    fn restore(
        &mut self,
        run: RunSpec,
        fitted: String,
        hall: Option<Mesh>,
        seated: Option<Seated>,
        opened: &mut Opened,
        owes: Option<u64>,
    ) -> Result<Option<Placed>, Broken> {
        let dir = RunDir::of(&run);
        let (is_new, state) = seated.as_ref().map_or((true, None), |s| (s.is_new, s.state));
        let mut exec = seated.map(|s| s.exec);
        let done = (|| {
            let all = match (&hall, &exec) {
                (Some(hall), _) => hall,
                (None, Some(exec)) => &exec.mesh,
                (None, None) => return Err(Error::failure("a rank without a place has a hall")),
            };
            let hellos = greet(all, self, &dir, owes, &opened.watch)?;
            let holds: Vec<Vec<Label>> = hellos.iter().map(|h| h.holds.clone()).collect();
            let saved = hellos[0].saved;
            let choice = newest_whole(&holds).filter(|c| saved.is_none_or(|saved| saved <= c.step));
            let session = hellos[0].time_us;
            let owes = |step: u64| hellos.iter().any(|h| h.owes == Some(step));
            let Some(choice) = choice else {
                self.held.clear();
                let Some(exec) = &mut exec else { return Ok(None) };
                let begin = opened.begin.as_mut().ok_or_else(|| Error::failure("the run was not opened"))?;
                if !is_new {
                    exec.wipe(&run.model)?;
                }
                let (step, path) = self.load_saved(exec, &run, &dir, begin)?;
                opened.watch = path.as_deref().map(remembered).transpose()?.unwrap_or_default();
                let source = path.map_or(From::Beginning, From::Checkpoint);
                return Ok(Some((step, (session, session), false, source)));
            };
            // Who was there knows more than who has come; what they know is the same as far as it goes.
            let knows = hellos.iter().map(|h| &h.watch).max_by_key(|w| w.last());
            opened.watch = knows.cloned().unwrap_or_default();
            opened.watch.back_to(choice.step);
            self.held.retain(|s| (s.label.step, s.label.era) == (choice.step, choice.era));
            // Who was not in the middle of an update has it where it belongs.
            let has_it = state == Some((choice.step, choice.era));
            let wants = exec.as_ref().filter(|_| !has_it).map(Executor::wants).unwrap_or_default();
            let fetched = fetch(all, &choice, &self.held, wants).context("take over the state")?;
            // Nobody leaves while another still takes.
            all.barrier()?;
            let Some(exec) = &mut exec else { return Ok(None) };
            if !has_it {
                exec.restore(&fetched)?;
            }
            let same = (choice.era, run.layout.clone());
            let is_same = hellos.iter().any(|h| h.dealt.as_ref() == Some(&same));
            let era = if is_same { choice.era } else { session };
            Ok(Some((choice.step, (session, era), owes(choice.step), From::Memory)))
        })();
        let mesh = hall.as_ref().filter(|h| h.failure().is_some()).or(exec.as_ref().map(|e| &e.mesh));
        let all = || hall.iter().chain(exec.as_ref().map(|e| &e.mesh));
        let found = done.map_err(|e| Broken::of(e, mesh).told(all()))?;
        let (Some((step, (session, era), owes, source)), Some(exec)) = (found, exec) else { return Ok(None) };
        Ok(Some(Placed { run, fitted, exec, step, session, era, owes, source }))
    }

    fn load_saved(
        &self,
        exec: &mut Executor,
        run: &RunSpec,
        dir: &RunDir,
        begin: &mut Beginning,
    ) -> Result<(u64, Option<PathBuf>)> {
        // What was decided when the process began may be long past.
        let saved = ckpt::list(&dir.checkpoints())?;
        if !saved.is_empty() {
            begin.weights = Weights::Checkpoints(saved.into_iter().rev().map(|(_, path)| path).collect());
        }
        begin.asked.restarted |= self.orders.round > 0;
        weights(exec, run, begin)
    }
}

/// All ranks say what they hold.
fn greet(all: &Mesh, me: &Lifeline, dir: &RunDir, owes: Option<u64>, watch: &Watch) -> Result<Vec<Hello>> {
    let hello = Hello {
        holds: me.held.iter().map(|s| s.label).collect(),
        owes,
        dealt: me.dealt.clone(),
        saved: ckpt::list(&dir.checkpoints()).ok().and_then(|saved| saved.last().map(|(step, _)| *step)),
        watch: watch.clone(),
        time_us: now_us(),
    };
    let failed = |e: serde_json::Error| Error::failure(format!("say what this rank holds: {e}"));
    let mine = serde_json::to_vec(&hello).map_err(failed)?;
    all.exchange(&mine)?.iter().map(|h| serde_json::from_slice(h).map_err(failed)).collect()
}
