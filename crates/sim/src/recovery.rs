//! How long a job stands still when something of it is lost: the state machines of `elastic`, which agents of real runs
//! obey, played on a virtual clock at their real timeouts.
//!
//! How long they take does not depend on how many nodes there are: everybody reads one value. So a job of a few nodes
//! stands for all sizes; what grows with the job (starting processes, connecting them) is not theirs and not here.

mod agent;

use core::time::Duration;
use std::collections::BTreeMap;

use elastic::crew::Limits;
use elastic::rendezvous::{Agreed, Member, NodeId, Rules, Times};
use serde::Serialize;
use spec::{Error, Result};

use agent::{Agent, Health};

/// Between two looks of an agent at its workers and the store, as `launch` has it.
pub const LOOK: Duration = Duration::from_millis(50);
/// Nodes of the job that stands for all.
const NODES: usize = 4;
/// Its workers on each.
const PLACES: usize = 2;
/// The node that is hit: not the host of the store, whose sudden silence ends a job.
const HIT: usize = 2;
/// All is well until then.
const BEGINS: Duration = Duration::from_secs(60);
/// Moments between two signs of life at which things are lost, evenly.
const PHASES: u32 = 8;
/// Whoever is not back by then never will be: a hang, a full wait for nodes and the longest pause, twice.
const GIVES_UP: Duration = Duration::from_secs(2000);

/// What is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// A process dies: its kernel, its device or its program fails.
    Process,
    /// A process stands still inside an op.
    Hang,
    /// A process is stopped and gives no sign of life.
    Stop,
    /// An agent dies with all of its workers; the node answers that it has gone.
    Agent,
    /// A node falls silent: no power, no network.
    Node,
}

impl Loss {
    /// All of them.
    pub const ALL: [Loss; 5] = [Loss::Process, Loss::Hang, Loss::Stop, Loss::Agent, Loss::Node];

    /// Whether the node is lost with it.
    pub fn takes_node(self) -> bool {
        matches!(self, Loss::Agent | Loss::Node)
    }
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recovered {
    /// From the loss until an agent ends the round.
    pub detect_s: f64,
    /// From then until all that go on have their places.
    pub meet_s: f64,
    /// Nodes that go on, of all that the job began with.
    pub nodes: usize,
    /// Workers that kept their process and memory.
    pub kept: usize,
}

/// The job that is played.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlayedJob {
    /// Nodes that stand by.
    pub spares: usize,
    /// Fewest nodes that it goes on with, of four.
    pub min_nodes: usize,
    /// How long nodes wait for each other.
    pub times: Times,
    /// How long workers are waited for.
    pub limits: Limits,
}

impl PlayedJob {
    /// Of how many nodes the job that stands for all is.
    pub const NODES: usize = NODES;

    /// With the timeouts that `phalanx launch` has unless told otherwise, and restarts enough.
    pub fn usual(spares: usize, min_nodes: usize) -> Self {
        let limits = Limits { max_restarts: 100, min_places: PLACES, ..Limits::default() };
        PlayedJob { spares, min_nodes, times: Times::default(), limits }
    }

    /// Loses something and waits until the job steps again.
    ///
    /// A process that dies is known at once, a silent node when the last of its signs of life is 15 s old; and with a
    /// spare the round is full again without waiting for a last call:
    ///
    /// ```
    /// use sim::recovery::{PlayedJob, Loss};
    /// let died = PlayedJob::usual(0, 3).lose(Loss::Process)?;
    /// assert!(died.detect_s < 1.0 && died.nodes == 4 && died.kept == 7);
    /// let silent = PlayedJob::usual(1, 3).lose(Loss::Node)?;
    /// assert!(10.0 < silent.detect_s && silent.detect_s < 15.0 && silent.nodes == 4);
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// If the job ends, or does not come back.
    pub fn lose(self, loss: Loss) -> Result<Recovered> {
        // Signs of life come at intervals: what is lost is lost somewhere between two.
        let played: Result<Vec<Recovered>> = (0..PHASES)
            .map(|i| self.lose_at(loss, BEGINS + self.times.keep_alive_interval * i / PHASES))
            .collect();
        let played = played?;
        let mean = |of: fn(&Recovered) -> f64| played.iter().map(of).sum::<f64>() / f64::from(PHASES);
        let (detect_s, meet_s) = (mean(|r| r.detect_s), mean(|r| r.meet_s));
        Ok(Recovered { detect_s, meet_s, ..played[0] })
    }

    fn lose_at(self, loss: Loss, at: Duration) -> Result<Recovered> {
        let mut world = World::new(self);
        let came = world.until(BEGINS, |w| w.all_run(NODES).then_some(w.round()));
        let round = came.map_err(|why| Error::failure(format!("the job does not begin: {why}")))?;
        world.run_until(at);
        world.lose(loss);
        let lost_at = world.now;
        let detected = world.until(lost_at + GIVES_UP, |w| (w.shared.round > round).then_some(w.now));
        let detected = detected.map_err(|why| Error::failure(format!("a loss is not noticed: {why}")))?;
        let back = world.until(detected + GIVES_UP, |w| w.all_seated().then_some(w.now));
        let back = back.map_err(|why| {
            Error::failure(format!("the job does not go on: {why}"))
                .hint("give it spare nodes, or let it go on with fewer")
        })?;
        Ok(Recovered {
            detect_s: (detected - lost_at).as_secs_f64(),
            meet_s: (back - detected).as_secs_f64(),
            nodes: world.shared.members.len(),
            kept: world.agents.iter().map(Agent::kept).sum(),
        })
    }
}

/// All agents and what they agree on.
struct World {
    now: Duration,
    shared: Agreed,
    beats: BTreeMap<NodeId, i64>,
    /// Agents whose doors are seen to be shut.
    shut: Vec<NodeId>,
    agents: Vec<Agent>,
}

impl World {
    fn new(job: PlayedJob) -> Self {
        let rules = Rules { min: job.min_nodes.min(NODES), max: NODES, is_static: false };
        let agent = |node: usize| {
            let id = NodeId { node_rank: 0, addr: format!("n{node:02}"), pid: 1, serial: 0 };
            let host = id.addr.clone();
            let me =
                Member { id, host, nproc: PLACES, role: String::new(), master_port: 1, door: 1, standby: 1 };
            Agent::new(me, rules, &job, node == 0, PLACES)
        };
        let agents: Vec<Agent> = (0..NODES + job.spares).map(agent).collect();
        let host = agents.first().map(|a| a.id().clone());
        let shared = Agreed { host, ..Agreed::default() };
        World { now: Duration::ZERO, shared, beats: BTreeMap::new(), shut: Vec::new(), agents }
    }

    fn tick(&mut self) {
        self.now += LOOK;
        let World { now, shared, beats, shut, agents } = self;
        // Spares come once the job runs, as they would beside one that is full.
        let full = shared.members.len() == NODES || shared.round > 0;
        let present = if full { agents.len() } else { NODES };
        let failed = agents.iter().filter_map(Agent::broken_round).max();
        for agent in &mut agents[..present] {
            agent.turn(*now, shared, beats, shut, failed);
        }
    }

    fn run_until(&mut self, at: Duration) {
        while self.now < at {
            self.tick();
        }
    }

    /// Plays on until `found`.
    fn until<T>(
        &mut self,
        bound: Duration,
        found: impl Fn(&World) -> Option<T>,
    ) -> std::result::Result<T, String> {
        loop {
            if let Some(found) = found(self) {
                return Ok(found);
            }
            if let Some(closed) = &self.shared.closed {
                return Err(format!("{closed:?}"));
            }
            if self.now >= bound {
                return Err(format!("nothing came of it in {} s: {}", bound.as_secs(), self.shared.why));
            }
            self.tick();
        }
    }

    fn round(&self) -> u64 {
        self.shared.round
    }

    fn all_run(&self, nodes: usize) -> bool {
        self.shared.members.len() == nodes && self.all_seated()
    }

    /// Every member's workers are in the round that runs.
    fn all_seated(&self) -> bool {
        let members = &self.shared.members;
        let runs = |a: &&Agent| a.runs() == Some(self.shared.round);
        !members.is_empty()
            && members.iter().all(|m| self.agents.iter().filter(runs).any(|a| *a.id() == m.id))
    }

    fn lose(&mut self, loss: Loss) {
        let agent = &mut self.agents[HIT];
        match loss {
            Loss::Process => agent.set(0, Health::Dead),
            Loss::Hang => agent.set(0, Health::Hung),
            Loss::Stop => agent.set(0, Health::Stopped),
            Loss::Agent => {
                agent.fall_silent();
                self.shut.push(agent.id().clone());
            }
            Loss::Node => agent.fall_silent(),
        }
    }
}
