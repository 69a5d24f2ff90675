//! What goes wrong, and when.

use super::agent::State;
use super::worlds::Health;
use super::{Sim, TROUBLE};
use core::time::Duration;

/// Something that goes wrong; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    Kill {
        agent: usize,
        place: usize,
    },
    Stop {
        agent: usize,
        place: usize,
    },
    Hang {
        agent: usize,
        place: usize,
    },
    CutRanks,
    /// The agent cannot reach the store.
    CutStore {
        agent: usize,
        lasts: Duration,
    },
    PauseAgent {
        agent: usize,
        lasts: Duration,
    },
    KillAgent {
        agent: usize,
    },
    /// Somebody stops the agent with a signal.
    Leave {
        agent: usize,
    },
    /// An agent begins on a node.
    Return {
        node: usize,
    },
    /// A node comes and dies at once, again and again.
    Flap {
        node: usize,
    },
    KillHost,
}

/// A handful of faults; every fourth schedule has none that costs a node.
pub(super) fn schedule(sim: &mut Sim) -> Vec<(Duration, Fault)> {
    let d = &mut sim.draw;
    let gentle = d.chance(4);
    let mut faults = Vec::new();
    let count = d.index(8);
    let ms = |d: &mut super::Draw, n: u64| Duration::from_millis(d.below(n));
    for _ in 0..count {
        let at = ms(d, 20_000) + Duration::from_secs(3);
        let (agent, place) = (d.index(6), d.index(3));
        let lasts = ms(d, 7_000);
        let fault = match d.below(if gentle { 6 } else { 15 }) {
            0 | 1 => Fault::Kill { agent, place },
            2 => Fault::Stop { agent, place },
            3 => Fault::Hang { agent, place },
            4 => Fault::CutRanks,
            5 => Fault::PauseAgent { agent, lasts: lasts / 4 },
            6 => Fault::PauseAgent { agent, lasts },
            7 => Fault::CutStore { agent, lasts },
            8 | 9 => Fault::KillAgent { agent },
            10 => Fault::Leave { agent },
            11 | 12 => Fault::Return { node: agent },
            13 => Fault::KillHost,
            _ => Fault::Flap { node: 1 + agent % 3 },
        };
        match fault {
            Fault::Flap { node } => {
                // A node that dies soon after it begins, every time.
                for i in 0..6 {
                    let begins = Duration::from_millis(2_000 + 3_500 * i);
                    faults.push((begins, Fault::Return { node }));
                    faults.push((begins + Duration::from_millis(750), Fault::Flap { node }));
                }
            }
            fault => faults.push((at.min(TROUBLE), fault)),
        }
    }
    faults
}

pub(super) fn inflict(sim: &mut Sim, fault: &Fault) {
    match fault {
        Fault::Kill { agent, place } => sicken(sim, *agent, *place, None),
        Fault::Stop { agent, place } => sicken(sim, *agent, *place, Some(Health::Stopped)),
        Fault::Hang { agent, place } => sicken(sim, *agent, *place, Some(Health::Hung)),
        Fault::CutRanks => sim.worlds.cut(sim.shared().round),
        Fault::CutStore { agent, lasts } => {
            let until = sim.now + *lasts;
            if let Some(agent) = pick(sim, *agent) {
                sim.agents[agent].cut_until = until;
            }
        }
        Fault::PauseAgent { agent, lasts } => {
            let until = sim.now + *lasts;
            if let Some(agent) = pick(sim, *agent) {
                sim.agents[agent].paused_until = until;
            }
        }
        Fault::KillAgent { agent } => {
            // The host of the store has a fault of its own.
            if let Some(agent) = pick(sim, *agent).filter(|a| *a != sim.host()) {
                kill_agent(sim, agent);
            }
        }
        Fault::Leave { agent } => {
            if let Some(agent) = pick(sim, *agent) {
                sim.agents[agent].asked_to_leave = true;
            }
        }
        Fault::Return { node } => {
            let lives = |a: &super::Agent| !matches!(a.state, State::Gone(_));
            let taken = sim.agents.iter().any(|a| lives(a) && a.addr() == format!("n{node}"));
            if !taken && sim.lives(0) && sim.agents.len() < 20 {
                sim.add(*node, 1);
            }
        }
        Fault::Flap { node } => {
            let addr = format!("n{node}");
            let found = sim.agents.iter().position(|a| matches!(a.state, State::Up) && a.addr() == addr);
            if let Some(agent) = found.filter(|a| *a != sim.host()) {
                kill_agent(sim, agent);
            }
        }
        Fault::KillHost => {
            let host = sim.host();
            if sim.lives(host) {
                kill_agent(sim, host);
            }
        }
    }
}

/// One of the agents that live.
fn pick(sim: &Sim, n: usize) -> Option<usize> {
    let living: Vec<usize> =
        (0..sim.agents.len()).filter(|a| !matches!(sim.agents[*a].state, State::Gone(_))).collect();
    living.get(n % living.len().max(1)).copied()
}

fn kill_agent(sim: &mut Sim, agent: usize) {
    for id in sim.agents[agent].processes() {
        sim.worlds.die(id);
    }
    if sim.draw.chance(2) {
        let id = sim.agents[agent].id().clone();
        sim.shut.push(id);
    }
    sim.agents[agent].state = State::Gone("killed".into());
}

/// A worker dies (`None`), or something else becomes of it.
fn sicken(sim: &mut Sim, agent: usize, place: usize, health: Option<Health>) {
    let Some(agent) = pick(sim, agent) else { return };
    // What a program does before it says that it can recover is as under torchrun: nobody looks whether it hangs.
    let workers = match health {
        None => sim.agents[agent].processes(),
        Some(_) if sim.recovers => sim.agents[agent].ready(),
        Some(_) => Vec::new(),
    };
    let Some(id) = workers.get(place % workers.len().max(1)) else { return };
    match health {
        None => sim.worlds.die(*id),
        Some(health) => sim.worlds.set(*id, health),
    }
}
