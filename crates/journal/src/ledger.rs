//! Which samples made up which step of a run, from the journals of all its ranks: whether each was drawn exactly once.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use spec::run::BatchSpec;

use crate::record::{Action, Record, Trouble};

/// The batches that a run's weights are made of, and what is wrong with them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Ledger {
    /// Steps done.
    pub steps: u64,
    /// Starts of the run in which a step was done.
    pub sessions: usize,
    /// Steps that were done, lost, and done again.
    pub steps_redone: u64,
    /// Samples in the steps that count and were not left out.
    pub samples: u64,
    /// Samples that were left out, by decisions on record.
    pub samples_skipped: u64,
    /// Those decisions, by step.
    pub skipped: Vec<Skipped>,
    /// Samples of those steps that no rank drew.
    pub samples_lost: u64,
    /// Samples that were drawn more often than others of their step, or belong to another.
    pub samples_repeated: u64,
    /// Steps whose records are missing, in all journals or in some: nothing can be said of their samples.
    pub steps_missing: u64,
    /// The first ranges of such steps.
    pub missing: Vec<Missing>,
    /// The first steps that are not made of their own samples, each once.
    pub wrong: Vec<Wrong>,
    /// Journals in which lines of drawn samples are there twice, which is damage of a file and no training.
    pub doubled: Vec<Doubled>,
    /// What was drawn in the steps that count, by step.
    #[serde(skip)]
    pub batches: Vec<Batch>,
}

/// Steps whose samples are no part of the weights, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The step that it was decided after.
    pub step: u64,
    /// The first of them.
    pub first_step: u64,
    /// The last.
    pub last_step: u64,
    /// What was wrong.
    pub what: Trouble,
    /// What was done.
    pub action: Action,
    /// Why, in words.
    pub why: String,
}

/// A step that is not made of its own samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Wrong {
    /// Which step.
    pub step: u64,
    /// Its samples that no rank drew.
    pub lost: u64,
    /// Samples drawn too often, or of another step.
    pub repeated: u64,
}

/// Lines of a journal that are there twice, and count once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Doubled {
    /// Whose journal.
    pub rank: usize,
    /// How many.
    pub lines: u64,
    /// The step that the first is of.
    pub first_step: u64,
}

/// Steps without records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// The first of them.
    pub first: u64,
    /// The last of them.
    pub last: u64,
}

/// What all ranks together drew for one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Steps done with it.
    pub step: u64,
    /// Ranks that drew each sample: those that share a model between them.
    pub copies: u64,
    /// Sum of the hashes of all that was drawn, copies included.
    pub tokens_xxh3: u64,
}

/// More wrong steps or ranges of missing ones than these are counted, not named.
const WRONG_MAX: usize = 100;

impl Ledger {
    /// Whether it is on record that every step is made of its own samples, each once.
    pub fn is_exact(&self) -> bool {
        self.samples_lost == 0
            && self.samples_repeated == 0
            && self.wrong.is_empty()
            && self.steps_missing == 0
    }
}

/// Collects what ranks drew: records of rank 0 first, in the order of its journal.
#[derive(Clone, Debug, Default)]
pub struct Drawings {
    /// Sessions in the order in which they began.
    order: Vec<u64>,
    sessions: BTreeMap<u64, Session>,
    /// Step that the run has reached, by records of other kinds.
    reached: u64,
    /// The session that the journal read last told of, and whose journal it is.
    told: Option<(usize, u64)>,
    /// The step that it told of last, and when that was done.
    done: Option<(usize, u64, u64)>,
    doubled: BTreeMap<usize, Doubled>,
}

/// What the ranks did, or began, in one start of the run.
#[derive(Clone, Debug, Default)]
struct Session {
    steps: BTreeMap<u64, Step>,
    /// By first and last step: all ranks tell of the same.
    skipped: BTreeMap<(u64, u64), Skipped>,
}

impl Session {
    /// Takes out what comes from `step` on; how many steps were done there.
    fn cut(&mut self, step: u64) -> u64 {
        let last = step.saturating_sub(1);
        let before = std::mem::take(&mut self.skipped).into_values().filter(|s| s.first_step <= last);
        let cut = before.map(|s| Skipped { last_step: s.last_step.min(last), ..s });
        self.skipped = cut.map(|s| ((s.first_step, s.last_step), s)).collect();
        self.steps.split_off(&step).values().filter(|s| s.is_done).count() as u64
    }

    /// Takes out the steps after `step` that no rank has done: they were begun, and are no part of any weights.
    fn cut_begun(&mut self, step: u64) {
        let done = self.steps.iter().rev().find(|(_, s)| s.is_done).map_or(0, |(step, _)| *step);
        self.steps.retain(|of, _| *of <= done.max(step));
    }

    /// The first step that it says something of.
    fn first(&self) -> Option<u64> {
        let skipped = self.skipped.keys().next().map(|(first, _)| *first);
        self.steps.keys().next().copied().into_iter().chain(skipped).min()
    }
}

/// What the ranks of a session drew for a step.
#[derive(Clone, Debug, Default)]
struct Step {
    /// Some rank says so.
    is_done: bool,
    samples: Vec<(u64, u64)>,
    tokens_xxh3: u64,
    /// What each journal says of it: once, unless something is wrong.
    told: BTreeMap<usize, Vec<Told>>,
    /// Samples that a rank drew for it once more.
    again: u64,
}

/// What a rank drew for a step, and when that began, or was done, if its journal says so.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    samples: Vec<(u64, u64)>,
    tokens_xxh3: u64,
    time_us: Option<u64>,
}

impl Step {
    /// Adds what `journal` says; false if it has said the very same before: then a line is there twice.
    fn add(&mut self, journal: usize, told: Told) -> bool {
        let before = self.told.entry(journal).or_default();
        if before.contains(&told) {
            return false;
        }
        if before.is_empty() {
            self.samples.extend(told.samples.iter().copied());
            self.tokens_xxh3 = self.tokens_xxh3.wrapping_add(told.tokens_xxh3);
        } else {
            // No rank does a step of its session twice.
            self.again = told.samples.iter().fold(self.again, |sum, (_, n)| sum.saturating_add(*n));
        }
        before.push(told);
        true
    }
}

impl Drawings {
    /// Takes a record of rank `journal`'s journal.
    pub fn add(&mut self, journal: usize, record: Record) {
        match record {
            Record::Step(done) => {
                let session = self.told.filter(|(whose, _)| *whose == journal);
                let session = session.and_then(|(_, session)| self.sessions.get_mut(&session));
                if let Some(begun) = session.and_then(|session| session.steps.get_mut(&done.step)) {
                    begun.is_done |= begun.told.contains_key(&journal);
                }
                self.done = Some((journal, done.step, done.time_us));
            }
            Record::Drawn { begun_us, session, step, samples, tokens_xxh3 } => {
                let done = self.done.filter(|(whose, of, _)| (*whose, *of) == (journal, step));
                let time_us = begun_us.or(done.map(|(.., time_us)| time_us));
                let told = Told { samples, tokens_xxh3, time_us };
                let drawn = self.session(journal, session).steps.entry(step).or_default();
                drawn.is_done |= begun_us.is_none();
                if !drawn.add(journal, told) {
                    let first = Doubled { rank: journal, lines: 0, first_step: step };
                    self.doubled.entry(journal).or_insert(first).lines += 1;
                }
            }
            Record::Resumed { step, .. } | Record::Recovered { step, .. } if journal == 0 => {
                self.reached = step;
            }
            Record::Checkpoint { step, .. } | Record::Finished { step, .. } if journal == 0 => {
                self.has_reached(step);
            }
            Record::Trouble {
                session,
                step,
                what,
                action,
                why,
                skipped: Some((first_step, last_step)),
                ..
            } if first_step <= last_step => {
                let skipped = Skipped { step, first_step, last_step, what, action, why };
                self.session(journal, session).skipped.insert((first_step, last_step), skipped);
            }
            _ => {}
        }
    }

    /// A session of which `journal` tells. One that rank 0 has nothing of comes where the other journal has it: rank 0 was lost
    /// in its first step.
    fn session(&mut self, journal: usize, session: u64) -> &mut Session {
        let before = self.told.filter(|(whose, _)| *whose == journal).map(|(_, before)| before);
        if !self.sessions.contains_key(&session) {
            let at = before.and_then(|before| self.order.iter().position(|s| *s == before));
            let at = if journal == 0 { self.order.len() } else { at.map_or(0, |at| at + 1) };
            self.order.insert(at, session);
        }
        self.told = Some((journal, session));
        self.sessions.entry(session).or_default()
    }

    /// The run has done so many steps, whatever journals say of them.
    pub fn has_reached(&mut self, step: u64) {
        self.reached = self.reached.max(step);
    }

    /// Judges the steps that count, by the samples that each takes of `batch`. A session's steps count up to where a later one began,
    /// but for those that were left out. Where a journal of the session is silent on a step, or all are, its records are
    /// missing: a full disk or a damaged line takes records, not samples. Rank 0 takes part in every session.
    pub fn ledger(mut self, batch: BatchSpec) -> Ledger {
        let mut kept: BTreeMap<u64, Step> = BTreeMap::new();
        let (mut began_at, mut last): (Option<u64>, u64) = (None, 0);
        let doubled = self.doubled.into_values().collect();
        let mut ledger = Ledger { sessions: self.order.len(), doubled, ..Ledger::default() };
        for session in self.order.iter().rev() {
            let mut session = self.sessions.remove(session).unwrap_or_default();
            // What a later start went on from was done, whether or not a journal came to say so.
            session.cut_begun(began_at.map_or(self.reached, |later| later.saturating_sub(1)));
            let all = session.steps.values().flat_map(|s| s.told.keys().copied());
            let journals: BTreeSet<usize> = all.chain([0]).collect();
            // They are told by being absent.
            let is_heard = |step: &Step| step.told.len() == journals.len();
            if let Some(later) = began_at {
                ledger.steps_redone += session.cut(later);
            }
            began_at = session.first().or(began_at);
            last = last.max(session.steps.keys().next_back().copied().unwrap_or(0));
            kept.extend(session.steps.into_iter().filter(|(_, step)| is_heard(step)));
            ledger.skipped.extend(session.skipped.into_values());
        }
        ledger.skipped.sort_by_key(|s| (s.first_step, s.last_step));
        let gaps = union(&ledger.skipped);
        let last_skipped = gaps.last().map_or(0, |(_, last)| *last);
        ledger.steps = last.max(last_skipped).max(self.reached);
        let samples =
            |(a, b): &(u64, u64)| batch.samples_before(*b).saturating_sub(batch.samples_before(a - 1));
        ledger.samples_skipped = gaps.iter().fold(0_u64, |sum, gap| sum.saturating_add(samples(gap)));
        ledger.samples = batch.samples_before(ledger.steps).saturating_sub(ledger.samples_skipped);
        let mut next = 1;
        for (step, drawn) in kept.into_iter().filter(|(step, _)| *step > 0) {
            if gaps.iter().any(|(first, last)| (*first..=*last).contains(&step)) {
                continue;
            }
            ledger.missing(next, step, &gaps);
            next = step.saturating_add(1);
            let judged = judge(&drawn, step, batch, &mut ledger);
            ledger.batches.push(judged);
        }
        let end = ledger.steps.saturating_add(1);
        ledger.missing(next, end, &gaps);
        ledger
    }
}

/// Ranges of steps that are left out, in order and apart from each other.
fn union(skipped: &[Skipped]) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for s in skipped {
        match all.last_mut() {
            Some((_, last)) if s.first_step <= last.saturating_add(1) => *last = (*last).max(s.last_step),
            _ => all.push((s.first_step.max(1), s.last_step)),
        }
    }
    all
}

impl Ledger {
    /// Steps from `next` to before `step` that nobody drew and nobody left out have no records.
    fn missing(&mut self, next: u64, step: u64, gaps: &[(u64, u64)]) {
        let mut at = next;
        let here = gaps.iter().filter(|(first, last)| *last >= next && *first < step);
        for (first, last) in here.copied().chain([(step, step)]) {
            if at < first {
                self.steps_missing = self.steps_missing.saturating_add(first - at);
                if self.missing.len() < WRONG_MAX {
                    self.missing.push(Missing { first: at, last: first - 1 });
                }
            }
            at = at.max(last.saturating_add(1));
        }
    }

    fn wrong(&mut self, wrong: Wrong) {
        self.samples_lost = self.samples_lost.saturating_add(wrong.lost);
        self.samples_repeated = self.samples_repeated.saturating_add(wrong.repeated);
        if self.wrong.len() < WRONG_MAX {
            self.wrong.push(wrong);
        }
    }
}

/// Counts how often each sample of a step was drawn; each should be as often as all others.
fn judge(drawn: &Step, step: u64, batch: BatchSpec, ledger: &mut Ledger) -> Batch {
    let (first, end) = (batch.samples_before(step - 1), batch.samples_before(step));
    let sequences = end - first;
    let inside = |&(from, n): &(u64, u64)| (from.max(first), from.saturating_add(n).min(end));
    let total = drawn.samples.iter().fold(0, |sum: u64, (_, n)| sum.saturating_add(*n));
    let copies = (total.saturating_add(sequences / 2) / sequences.max(1)).max(1);
    let mut edges: BTreeMap<u64, i64> = BTreeMap::from([(first, 0), (end, 0)]);
    let mut own = 0_u64;
    for (from, to) in drawn.samples.iter().map(inside).filter(|(from, to)| from < to) {
        *edges.entry(from).or_default() += 1;
        *edges.entry(to).or_default() -= 1;
        own = own.saturating_add(to - from);
    }
    let (mut lost, mut times) = (0_u64, 0_i64);
    let mut repeated = total.saturating_sub(own).saturating_add(drawn.again);
    for ((at, change), next) in edges.iter().zip(edges.keys().skip(1)) {
        times += change;
        let off = times.saturating_sub_unsigned(copies);
        let samples = off.unsigned_abs().saturating_mul(next - at);
        let sum = if off < 0 { &mut lost } else { &mut repeated };
        *sum = sum.saturating_add(samples);
    }
    if lost > 0 || repeated > 0 {
        ledger.wrong(Wrong { step, lost, repeated });
    }
    Batch { step, copies, tokens_xxh3: drawn.tokens_xxh3 }
}
