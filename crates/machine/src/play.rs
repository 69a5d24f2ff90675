//! Plays the scripts of all ranks on a machine whose cores they share.
//!
//! Compute goes at the rate that was measured with as many ranks at work; where more threads want to run than there
//! are cores, all get an equal share. A group carries one operation at a time, in the order in which its members call
//! it, and an operation begins when the last member has come; what goes on beside compute takes a core's share too.

use std::collections::{HashMap, HashSet};

use program::Ticket;
use spec::{Error, Result};

/// One thing that a rank does.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Runs a segment of ops.
    Compute {
        /// Which of the script's segments.
        segment: usize,
    },
    /// Joins the next operation of a group, and waits until it is over unless it only begins it.
    Join {
        /// The op in the rank's program: block and index.
        at: (usize, usize),
        group: usize,
        /// Seconds once all have come.
        s: f64,
        /// What a later [`Act::Wait`] asks for, if the operation goes on beside what follows.
        begins: Option<Ticket>,
    },
    /// Waits for what was begun.
    Wait { at: (usize, usize), ticket: Ticket },
    /// Copies a message out; the receiver may take it from then on.
    Send { at: (usize, usize), message: Mail, s: f64 },
    /// Waits for a message and copies it in.
    Recv { at: (usize, usize), message: Mail, s: f64 },
}

/// A message of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mail {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) channel: u32,
    pub(crate) micro_batch: usize,
}

/// Ops that run without a word to other ranks.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    /// Block, first op and the one after the last.
    pub(crate) ops: (usize, usize, usize),
    /// Seconds by [`Cores::levels`].
    pub(crate) s: Vec<f64>,
}

/// What one rank does in a step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Script {
    pub(crate) acts: Vec<Act>,
    pub(crate) segments: Vec<Segment>,
}

/// What the ranks share.
#[derive(Clone, Debug)]
pub(crate) struct Cores {
    pub(crate) cores: usize,
    /// Threads of a rank.
    pub(crate) threads: usize,
    /// Numbers of ranks at work for which segments have times, ascending.
    pub(crate) levels: Vec<usize>,
    /// Factor on time when more threads want to run than there are cores.
    pub(crate) crowding: f64,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Played {
    /// When the last rank was done, seconds.
    pub(crate) makespan: f64,
    /// By rank.
    pub(crate) ranks: Vec<PlayedRank>,
}

/// What one rank did when.
#[derive(Clone, Debug, Default)]
pub(crate) struct PlayedRank {
    /// Seconds of each segment, all its runs together.
    pub(crate) segments: Vec<f64>,
    /// Seconds of each op in which ranks talk, waiting included, as the executor records them.
    pub(crate) talk: HashMap<(usize, usize), f64>,
}

enum State {
    /// About to take its next act.
    Ready,
    /// Share of the segment that is left.
    Computes {
        segment: usize,
        left: f64,
    },
    /// Seconds of copying that are left.
    Copies {
        left: f64,
    },
    /// Waits for an operation of a group, or for a message.
    Waits {
        on: On,
        since: f64,
    },
    Done,
}

#[derive(Clone, Copy, PartialEq)]
enum On {
    Exchange(usize, usize),
    Mail(Mail),
}

/// What is left after rounding counts as nothing.
const NOTHING: f64 = 1e-9;
/// Nothing that takes time takes less, seconds.
const INSTANT_S: f64 = 1e-12;

/// How fast everything goes for a while.
struct Pace {
    /// Of its full speed, for every thread that wants to run.
    share: f64,
    /// Which of [`Cores::levels`] segments run at.
    level: usize,
}

/// One operation of a group.
struct Exchange {
    come: usize,
    s: f64,
    left: f64,
    began: f64,
    done: bool,
    /// Rank and op of those that do not wait for it: its time is theirs.
    beside: Vec<(usize, (usize, usize))>,
}

struct Table<'a> {
    scripts: &'a [&'a Script],
    groups: &'a [Vec<usize>],
    cores: &'a Cores,
    now: f64,
    states: Vec<State>,
    next: Vec<usize>,
    /// By group: its operations, and the one whose turn it is.
    exchanges: Vec<Vec<Exchange>>,
    turn: Vec<usize>,
    /// By group and member: operations joined so far.
    joined: HashMap<(usize, usize), usize>,
    begun: HashMap<(usize, Ticket), (usize, usize)>,
    posted: HashSet<Mail>,
    out: Played,
}

/// Plays `scripts`, one for each rank; acts name members of `groups` by index.
pub(crate) fn play(scripts: &[&Script], groups: &[Vec<usize>], cores: &Cores) -> Result<Played> {
    let ranks = scripts
        .iter()
        .map(|s| PlayedRank { segments: vec![0.0; s.segments.len()], ..PlayedRank::default() })
        .collect();
    let mut table = Table {
        scripts,
        groups,
        cores,
        now: 0.0,
        states: scripts.iter().map(|_| State::Ready).collect(),
        next: vec![0; scripts.len()],
        exchanges: groups.iter().map(|_| Vec::new()).collect(),
        turn: vec![0; groups.len()],
        joined: HashMap::new(),
        begun: HashMap::new(),
        posted: HashSet::new(),
        out: Played { makespan: 0.0, ranks },
    };
    table.run()?;
    table.out.makespan = table.now;
    Ok(table.out)
}

impl Table<'_> {
    fn run(&mut self) -> Result<()> {
        loop {
            while (0..self.states.len()).any(|r| self.take(r)) {}
            if self.states.iter().all(|s| matches!(s, State::Done)) {
                return Ok(());
            }
            if !self.advance() {
                let stuck = self.states.iter().position(|s| matches!(s, State::Waits { .. })).unwrap_or(0);
                return Err(Error::failure(format!("rank {stuck} waits for ever in the priced step")));
            }
        }
    }

    /// Takes the rank's next acts as far as they take no time; whether anything changed.
    fn take(&mut self, r: usize) -> bool {
        match self.states[r] {
            State::Ready => {}
            State::Waits { on, since } if self.has_happened(on) => {
                self.wake(r, on, since);
                return true;
            }
            _ => return false,
        }
        let Some(act) = self.scripts[r].acts.get(self.next[r]) else {
            self.states[r] = State::Done;
            return true;
        };
        match act.clone() {
            Act::Compute { segment } => self.states[r] = State::Computes { segment, left: 1.0 },
            Act::Join { at, group, s, begins } => {
                let on = self.join(r, at, group, s, begins);
                match begins {
                    None => self.states[r] = State::Waits { on, since: self.now },
                    Some(_) => self.next[r] += 1,
                }
            }
            Act::Wait { ticket, .. } => match self.begun.get(&(r, ticket)) {
                Some(&(group, exchange)) => {
                    self.states[r] = State::Waits { on: On::Exchange(group, exchange), since: self.now };
                }
                None => self.next[r] += 1,
            },
            Act::Send { s, .. } => self.states[r] = State::Copies { left: s },
            Act::Recv { message, .. } => {
                self.states[r] = State::Waits { on: On::Mail(message), since: self.now };
            }
        }
        true
    }

    fn join(&mut self, r: usize, at: (usize, usize), group: usize, s: f64, begins: Option<Ticket>) -> On {
        let n = self.joined.entry((group, r)).or_default();
        let exchange = *n;
        *n += 1;
        let exchanges = &mut self.exchanges[group];
        if exchanges.len() <= exchange {
            exchanges.push(Exchange { come: 0, s, left: 1.0, began: 0.0, done: false, beside: Vec::new() });
        }
        exchanges[exchange].come += 1;
        exchanges[exchange].s = exchanges[exchange].s.max(s);
        if let Some(ticket) = begins {
            exchanges[exchange].beside.push((r, at));
            self.begun.insert((r, ticket), (group, exchange));
        }
        self.begin(group);
        On::Exchange(group, exchange)
    }

    /// Begins the operation whose turn it is, if all have come.
    fn begin(&mut self, group: usize) {
        let turn = self.turn[group];
        if let Some(exchange) = self.exchanges[group].get_mut(turn)
            && exchange.come == self.groups[group].len()
        {
            exchange.began = self.now;
        }
    }

    fn runs(&self, group: usize) -> Option<&Exchange> {
        self.exchanges[group].get(self.turn[group]).filter(|j| j.come == self.groups[group].len() && !j.done)
    }

    fn has_happened(&self, on: On) -> bool {
        match on {
            On::Exchange(group, exchange) => self.exchanges[group][exchange].done,
            On::Mail(message) => self.posted.contains(&message),
        }
    }

    fn wake(&mut self, r: usize, on: On, since: f64) {
        let waited = self.now - since;
        let (at, copy) = match &self.scripts[r].acts[self.next[r]] {
            Act::Recv { at, s, .. } => (*at, Some(*s)),
            Act::Join { at, .. } | Act::Wait { at, .. } | Act::Send { at, .. } => (*at, None),
            Act::Compute { .. } => return,
        };
        *self.out.ranks[r].talk.entry(at).or_default() += waited;
        match (on, copy) {
            (On::Mail(_), Some(s)) => self.states[r] = State::Copies { left: s },
            _ => self.done_with_act(r),
        }
    }

    fn done_with_act(&mut self, r: usize) {
        self.next[r] += 1;
        self.states[r] = State::Ready;
    }

    /// Lets time pass until something is done; false if nothing is under way.
    fn advance(&mut self) -> bool {
        let running: Vec<usize> = (0..self.groups.len()).filter(|&g| self.runs(g).is_some()).collect();
        let pace = self.pace(&running);
        let rates: Vec<f64> = (0..self.states.len()).map(|r| self.rate(r, &pace)).collect();
        let exchange_rates: Vec<f64> = running.iter().map(|&g| self.exchange_rate(g, &pace)).collect();
        let mut dt = f64::INFINITY;
        for (state, rate) in self.states.iter().zip(&rates) {
            if let State::Computes { left, .. } | State::Copies { left } = state {
                dt = dt.min(left / rate);
            }
        }
        for (&g, rate) in running.iter().zip(&exchange_rates) {
            dt = dt.min(self.runs(g).map_or(f64::INFINITY, |e| e.left / rate));
        }
        if !dt.is_finite() {
            return false;
        }
        self.now += dt;
        for (r, rate) in rates.iter().enumerate() {
            self.go_on(r, dt, dt * rate);
        }
        for (&g, rate) in running.iter().zip(&exchange_rates) {
            self.exchange_goes_on(g, dt * rate);
        }
        true
    }

    /// How fast everything goes while the exchanges of `running` are under way.
    fn pace(&self, running: &[usize]) -> Pace {
        let Cores { cores, threads, levels, crowding } = self.cores;
        let computing = self.states.iter().filter(|s| matches!(s, State::Computes { .. })).count();
        let copying = self.states.iter().filter(|s| matches!(s, State::Copies { .. })).count();
        let talking: usize = running.iter().map(|&g| self.groups[g].len()).sum();
        let wanted = computing * threads + copying + talking;
        let share = match wanted > *cores {
            true => *cores as f64 / wanted as f64 / crowding,
            false => 1.0,
        };
        let active = (computing + copying + talking).min(self.states.len());
        let far = |level: usize| (level as f64 / active.max(1) as f64).log2().abs();
        let level = (0..levels.len()).min_by(|&a, &b| far(levels[a]).total_cmp(&far(levels[b]))).unwrap_or(0);
        Pace { share, level }
    }

    /// What a rank gets done in a second, in the unit of what is left of its state.
    fn rate(&self, r: usize, pace: &Pace) -> f64 {
        match self.states[r] {
            State::Computes { segment, .. } => {
                let s = self.scripts[r].segments[segment].s.get(pace.level).copied().unwrap_or(0.0);
                pace.share / s.max(INSTANT_S)
            }
            State::Copies { .. } => pace.share,
            _ => 0.0,
        }
    }

    /// A collective among more ranks than cores was measured as they shared them.
    fn exchange_rate(&self, g: usize, pace: &Pace) -> f64 {
        let measured = (self.cores.cores as f64 / self.groups[g].len() as f64).min(1.0);
        (pace.share / measured).min(1.0) / self.runs(g).map_or(1.0, |e| e.s.max(INSTANT_S))
    }

    /// A rank gets `done` of what was left of its state done in `dt` seconds.
    fn go_on(&mut self, r: usize, dt: f64, done: f64) {
        match &mut self.states[r] {
            State::Computes { segment, left } => {
                *left -= done;
                let (segment, over) = (*segment, *left <= NOTHING);
                self.out.ranks[r].segments[segment] += dt;
                if over {
                    self.done_with_act(r);
                }
            }
            State::Copies { left } => {
                *left -= done;
                let over = *left <= NOTHING * 1e-3;
                let (at, message) = match &self.scripts[r].acts[self.next[r]] {
                    Act::Send { at, message, .. } => (*at, Some(*message)),
                    Act::Recv { at, .. } => (*at, None),
                    _ => unreachable!("only messages are copied"),
                };
                *self.out.ranks[r].talk.entry(at).or_default() += dt;
                if over {
                    self.posted.extend(message);
                    self.done_with_act(r);
                }
            }
            _ => {}
        }
    }

    /// A group's exchange gets `done` of what was left of it done.
    fn exchange_goes_on(&mut self, g: usize, done: f64) {
        let exchange = &mut self.exchanges[g][self.turn[g]];
        exchange.left -= done;
        if exchange.left > NOTHING {
            return;
        }
        exchange.done = true;
        for (r, at) in std::mem::take(&mut exchange.beside) {
            *self.out.ranks[r].talk.entry(at).or_default() += self.now - exchange.began;
        }
        self.turn[g] += 1;
        self.begin(g);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores(cores: usize, levels: Vec<usize>) -> Cores {
        Cores { cores, threads: 1, levels, crowding: 1.0 }
    }

    fn computes(s: &[f64]) -> Script {
        let segments = vec![Segment { ops: (0, 0, 1), s: s.to_vec() }];
        Script { acts: vec![Act::Compute { segment: 0 }], segments }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9 * b.abs().max(1.0), "{a} against {b}");
    }

    #[test]
    fn ranks_share_cores_and_slow_each_other_down() {
        let script = computes(&[2.0, 3.0]);
        let run = |n: usize, c: usize| play(&vec![&script; n], &[], &cores(c, vec![1, 2])).unwrap().makespan;
        close(run(1, 2), 2.0);
        close(run(2, 2), 3.0);
        // Four ranks on two cores: each at half the pace of two side by side.
        close(run(4, 2), 6.0);
        close(run(2, 1), 6.0);
    }

    #[test]
    fn a_collective_waits_for_the_last() {
        let join = |blocks: bool| Act::Join {
            at: (0, 1),
            group: 0,
            s: 0.5,
            begins: (!blocks).then_some(Ticket::Grads(0)),
        };
        let mut early = computes(&[1.0]);
        early.acts.push(join(true));
        let mut late = computes(&[4.0]);
        late.acts.push(join(true));
        let played = play(&[&early, &late], &[vec![0, 1]], &cores(2, vec![1])).unwrap();
        close(played.makespan, 4.5);
        close(played.ranks[0].talk[&(0, 1)], 3.5);
        close(played.ranks[1].talk[&(0, 1)], 0.5);
    }

    #[test]
    fn what_goes_on_beside_compute_is_hidden_but_takes_its_share_of_the_cores() {
        let mut script = computes(&[1.0]);
        script.acts.insert(0, Act::Join { at: (0, 1), group: 0, s: 0.5, begins: Some(Ticket::Grads(0)) });
        script.acts.push(Act::Wait { at: (0, 2), ticket: Ticket::Grads(0) });
        let scripts = [&script, &script];
        let free = play(&scripts, &[vec![0, 1]], &cores(4, vec![1])).unwrap();
        close(free.makespan, 1.0);
        close(free.ranks[0].talk[&(0, 2)], 0.0);
        // With a core for each rank, half a second of adding up is half a second of work more.
        let shared = play(&scripts, &[vec![0, 1]], &cores(2, vec![1])).unwrap();
        close(shared.makespan, 1.5);
        close(shared.ranks[0].talk[&(0, 1)], 1.0);
    }

    #[test]
    fn a_message_is_taken_once_it_is_there() {
        let message = Mail { from: 0, to: 1, channel: 0, micro_batch: 0 };
        let mut first = computes(&[2.0]);
        first.acts.push(Act::Send { at: (0, 1), message, s: 0.25 });
        let second = Script { acts: vec![Act::Recv { at: (0, 0), message, s: 0.25 }], ..Script::default() };
        let played = play(&[&first, &second], &[], &cores(2, vec![1])).unwrap();
        close(played.makespan, 2.5);
        close(played.ranks[1].talk[&(0, 0)], 2.5);
        close(played.ranks[0].talk[&(0, 1)], 0.25);
        assert!(play(&[&second], &[], &cores(2, vec![1])).is_err(), "a message that nobody sends");
    }
}
