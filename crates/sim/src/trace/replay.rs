//! The steps of a trace as chains of ops, and what they take when some of them are put right.

use std::collections::BTreeMap;

use spec::{Error, Result};

use super::read::{Kind, Row};

/// Clocks of workers agree and times are rounded this well, in seconds.
const SLACK_S: f64 = 2e-3;

/// Everyone that has to be there for a message.
type Key = (Kind, i64, usize, usize, i64);

/// A message: its ops, and how long it took once all were there.
#[derive(Clone, Debug, Default)]
struct Meeting {
    ops: Vec<usize>,
    took_s: f64,
}

/// Ops of one worker that run at once: a kernel, or messages that were handed over together.
type Batch = Vec<usize>;

/// A trace in the order in which it runs.
pub(super) struct Replay<'a> {
    place: &'a str,
    rows: &'a [Row],
    stages: usize,
    replicas: usize,
    /// By step and worker.
    chains: Vec<Vec<Vec<Batch>>>,
    /// The message of each op that talks.
    meeting_of: Vec<Option<usize>>,
    meetings: Vec<Meeting>,
}

/// What each kind and class of op usually takes, in seconds.
pub(super) struct Ideal {
    by_kind: BTreeMap<(Kind, usize), f64>,
}

impl Ideal {
    /// Means of what computes, medians of what talks.
    pub(super) fn of(replay: &Replay<'_>) -> Self {
        let mut times: BTreeMap<(Kind, usize), Vec<f64>> = BTreeMap::new();
        for (row, meeting) in replay.rows.iter().zip(&replay.meeting_of) {
            if meeting.is_none() {
                times.entry((row.kind, row.class)).or_default().push(row.duration_s);
            }
        }
        for meeting in &replay.meetings {
            let row = &replay.rows[meeting.ops[0]];
            times.entry((row.kind.message(), row.class)).or_default().push(meeting.took_s);
        }
        let usual = |((kind, class), mut all): ((Kind, usize), Vec<f64>)| {
            let computes = matches!(
                kind,
                Kind::Forward | Kind::Backward | Kind::Optimizer | Kind::Norms | Kind::Garbage
            );
            all.sort_by(f64::total_cmp);
            let half = all.len() / 2;
            let median =
                if all.len().is_multiple_of(2) { (all[half - 1] + all[half]) / 2.0 } else { all[half] };
            ((kind, class), if computes { all.iter().sum::<f64>() / all.len() as f64 } else { median })
        };
        Ideal { by_kind: times.into_iter().map(usual).collect() }
    }
}

impl<'a> Replay<'a> {
    pub(super) fn new(place: &'a str, rows: &'a [Row]) -> Result<Self> {
        let stages = rows.iter().map(|r| r.stage + 1).max().unwrap_or(0);
        let replicas = rows.iter().map(|r| r.dp_rank + 1).max().unwrap_or(0);
        let mut steps: BTreeMap<i64, BTreeMap<(usize, usize), Vec<usize>>> = BTreeMap::new();
        for (i, row) in rows.iter().enumerate() {
            steps.entry(row.step).or_default().entry((row.dp_rank, row.stage)).or_default().push(i);
        }
        let mut replay = Replay {
            place,
            rows,
            stages,
            replicas,
            chains: Vec::new(),
            meeting_of: vec![None; rows.len()],
            meetings: Vec::new(),
        };
        for (step, workers) in steps {
            if workers.len() != stages * replicas {
                let what = format!(
                    "{place}: step {step} has ops of {} of {stages} x {replicas} workers",
                    workers.len()
                );
                return Err(Error::user(what).hint("every step needs all stages of all data-parallel ranks"));
            }
            let chains: Result<Vec<Vec<Batch>>> =
                workers.into_values().map(|ops| replay.chain(ops)).collect();
            replay.chains.push(chains?);
        }
        replay.meet()?;
        Ok(replay)
    }

    pub(super) fn steps(&self) -> usize {
        self.chains.len()
    }

    pub(super) fn stages(&self) -> usize {
        self.stages
    }

    pub(super) fn replicas(&self) -> usize {
        self.replicas
    }

    /// A worker's ops in order; messages that begin together are one batch.
    fn chain(&self, mut ops: Vec<usize>) -> Result<Vec<Batch>> {
        let rows = self.rows;
        ops.sort_by(|a, b| {
            rows[*a].start_s.total_cmp(&rows[*b].start_s).then(rows[*a].kind.cmp(&rows[*b].kind))
        });
        let mut out: Vec<Batch> = Vec::new();
        let mut ends: f64 = 0.0;
        for op in ops {
            let row = &rows[op];
            let talks = |i: usize| self.key(&rows[i]).is_some();
            match out.last_mut() {
                Some(last) if rows[last[0]].start_s == row.start_s && talks(last[0]) && talks(op) => {
                    last.push(op)
                }
                _ if row.start_s + SLACK_S < ends => {
                    let what = format!(
                        "{}, line {}: an op of dp_rank {}, stage {} begins at {} s of step {}, before the one in front ends at {ends} s",
                        self.place, row.line, row.dp_rank, row.stage, row.start_s, row.step
                    );
                    return Err(Error::user(what)
                        .hint("ops of a worker follow each other; only messages may begin together"));
                }
                _ => out.push(vec![op]),
            }
            // What was sent is on its way while the worker goes on.
            if !matches!(row.kind, Kind::ForwardSend | Kind::BackwardSend) {
                ends = ends.max(row.start_s + row.duration_s);
            }
        }
        Ok(out)
    }

    /// Whom an op waits for: the step's message that it is one end of.
    fn key(&self, row: &Row) -> Option<Key> {
        let (dp, stage) = (row.dp_rank, row.stage);
        let at = |kind, dp, stage| Some((kind, row.step, dp, stage, row.seq));
        match row.kind {
            Kind::ForwardSend => at(Kind::ForwardSend, dp, stage),
            Kind::ForwardRecv => at(Kind::ForwardSend, dp, (stage + self.stages - 1) % self.stages),
            Kind::BackwardSend => at(Kind::BackwardSend, dp, stage),
            Kind::BackwardRecv => at(Kind::BackwardSend, dp, (stage + 1) % self.stages),
            Kind::Gather | Kind::Scatter => at(row.kind, 0, stage),
            Kind::Embedding | Kind::Clip => at(row.kind, dp, 0),
            Kind::Forward | Kind::Backward | Kind::Norms | Kind::Optimizer | Kind::Garbage => None,
        }
    }

    fn meet(&mut self) -> Result<()> {
        let mut known: BTreeMap<Key, usize> = BTreeMap::new();
        for (i, row) in self.rows.iter().enumerate() {
            let Some(mut key) = self.key(row) else { continue };
            if matches!(row.kind, Kind::Gather | Kind::Scatter) {
                // Chunks gather one after another.
                key.2 = usize::try_from(row.chunk + 1).unwrap_or(0);
            }
            let id = *known.entry(key).or_insert_with(|| {
                self.meetings.push(Meeting::default());
                self.meetings.len() - 1
            });
            self.meetings[id].ops.push(i);
            self.meeting_of[i] = Some(id);
        }
        let (rows, stages, replicas) = (self.rows, self.stages, self.replicas);
        for meeting in &mut self.meetings {
            let ends = |i: &usize| rows[*i].start_s + rows[*i].duration_s;
            let last = meeting.ops.iter().map(|i| rows[*i].start_s).fold(0.0, f64::max);
            meeting.took_s = (meeting.ops.iter().map(ends).fold(f64::INFINITY, f64::min) - last).max(0.0);
            let first = &rows[meeting.ops[0]];
            let expected = match first.kind {
                Kind::Gather | Kind::Scatter => replicas,
                Kind::Clip => stages,
                Kind::Embedding => stages.min(2),
                _ => 2,
            };
            if meeting.ops.len() != expected {
                let what = format!(
                    "{}, line {}: {} of {expected} ends of a message of step {} are there",
                    self.place,
                    first.line,
                    meeting.ops.len(),
                    first.step
                );
                return Err(Error::user(what).hint(
                    "the trace has a hole: every send needs its receive, every collective all of its ranks",
                ));
            }
        }
        Ok(())
    }

    /// Seconds of a step in which ops that `keeps` names take what they took, others what is usual.
    pub(super) fn play(&self, step: usize, ideal: &Ideal, keeps: &dyn Fn(&Row) -> bool) -> Result<f64> {
        let chains = &self.chains[step];
        let mut next = vec![0; chains.len()];
        let mut clock = vec![0.0f64; chains.len()];
        let mut there: BTreeMap<usize, (usize, f64)> = BTreeMap::new();
        let mut entered = vec![false; chains.len()];
        let usual = |row: &Row| ideal.by_kind.get(&(row.kind.message(), row.class)).copied().unwrap_or(0.0);
        loop {
            let mut moved = false;
            for (w, chain) in chains.iter().enumerate() {
                while let Some(batch) = chain.get(next[w]) {
                    let row = &self.rows[batch[0]];
                    if self.meeting_of[batch[0]].is_none() {
                        clock[w] += if keeps(row) { row.duration_s } else { usual(row) };
                    } else {
                        let meetings = batch.iter().filter_map(|op| self.meeting_of[*op].map(|m| (*op, m)));
                        if !std::mem::replace(&mut entered[w], true) {
                            for (_, m) in meetings.clone() {
                                let (count, at) = there.entry(m).or_insert((0, 0.0));
                                *count += 1;
                                *at = at.max(clock[w]);
                            }
                            moved = true;
                        }
                        if !row.waits {
                            (entered[w], next[w]) = (false, next[w] + 1);
                            continue;
                        }
                        let all = |m: usize| there.get(&m).filter(|t| t.0 == self.meetings[m].ops.len());
                        if meetings.clone().any(|(_, m)| all(m).is_none()) {
                            break;
                        }
                        for (op, m) in meetings {
                            let row = &self.rows[op];
                            let took = if keeps(row) { self.meetings[m].took_s } else { usual(row) };
                            clock[w] = clock[w].max(all(m).map_or(0.0, |t| t.1) + took);
                        }
                        entered[w] = false;
                    }
                    next[w] += 1;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        if let Some((w, chain)) = chains.iter().enumerate().find(|(w, c)| next[*w] < c.len()) {
            let row = &self.rows[chain[next[w]][0]];
            let what = format!(
                "{}, line {}: an op of dp_rank {}, stage {}, step {} waits for ever",
                self.place, row.line, row.dp_rank, row.stage, row.step
            );
            return Err(Error::user(what).hint("workers meet in different orders: is seq_id right?"));
        }
        Ok(clock.into_iter().fold(0.0, f64::max))
    }
}
