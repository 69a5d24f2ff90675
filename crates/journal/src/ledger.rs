//! Which samples made up which step of a run, from the journals of all its ranks: whether each was drawn exactly once.

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

/// What the ranks did in one start of the run.
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
        self.steps.split_off(&step).len() as u64
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
    samples: Vec<(u64, u64)>,
    tokens_xxh3: u64,
    /// What each journal says of it: once, unless something is wrong.
    told: BTreeMap<usize, Vec<Told>>,
    /// Samples that a rank drew for it once more.
    again: u64,
}

/// What a rank drew for a step, and when that was done if its journal says so.
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
            Record::Step(done) => self.done = Some((journal, done.step, done.time_us)),
            Record::Drawn { session, step, samples, tokens_xxh3 } => {
                let done = self.done.filter(|(whose, of, _)| (*whose, *of) == (journal, step));
                let told = Told { samples, tokens_xxh3, time_us: done.map(|(.., time_us)| time_us) };
                if !self.session(journal, session).steps.entry(step).or_default().add(journal, told) {
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

#[cfg(test)]
mod tests {
    use super::*;

    type Drawn<'a> = (u64, u64, &'a [(u64, u64)]);

    const FOUR: BatchSpec = BatchSpec { sequence: 1, sequences: 4, ramp: None };

    fn drawn(session: u64, step: u64, samples: &[(u64, u64)]) -> Record {
        Record::Drawn { session, step, samples: samples.to_vec(), tokens_xxh3: 1 }
    }

    /// Of drawings (session, step, samples): steps, redone, lost and repeated samples with batches of 4.
    #[track_caller]
    fn check(all_drawn: &[Drawn<'_>], expected: (u64, u64, u64, u64)) {
        let mut all = Drawings::default();
        let mut told: BTreeMap<(u64, u64), usize> = BTreeMap::new();
        for &(session, step, samples) in all_drawn {
            // Each drawing of a step is by another rank.
            let rank = told.entry((session, step)).or_default();
            all.add(*rank, drawn(session, step, samples));
            *rank += 1;
        }
        let l = all.ledger(FOUR);
        assert_eq!((l.steps, l.steps_redone, l.samples_lost, l.samples_repeated), expected, "{l:?}");
        assert_eq!(l.is_exact(), expected.2 + expected.3 == 0);
    }

    #[test]
    fn each_sample_once() {
        check(&[], (0, 0, 0, 0));
        check(&[(9, 1, &[(0, 4)]), (9, 2, &[(4, 4)])], (2, 0, 0, 0));
        // Two data-parallel ranks of two that share a model, dealt in turn.
        let even: &[_] = &[(0, 1), (2, 1)];
        let odd: &[_] = &[(1, 1), (3, 1)];
        check(&[(9, 1, even), (9, 1, even), (9, 1, odd), (9, 1, odd)], (1, 0, 0, 0));
    }

    #[test]
    fn what_is_missing_or_too_much_is_counted() {
        check(&[(9, 1, &[(0, 3)])], (1, 0, 1, 0));
        check(&[(9, 1, &[(0, 3), (2, 1)])], (1, 0, 1, 1));
        check(&[(9, 1, &[(0, 4)]), (9, 2, &[(3, 4)])], (2, 0, 1, 1));
        check(&[(9, 1, &[(0, 4), (0, 4), (0, 4)]), (9, 1, &[(0, 2)])], (1, 0, 2, 0));
        // Numbers of a journal are not believed.
        let huge: Drawn<'_> = (9, u64::MAX, &[(u64::MAX, u64::MAX), (0, u64::MAX)]);
        let mut all = Drawings::default();
        all.add(0, drawn(0, huge.1, huge.2));
        all.add(0, drawn(0, 0, &[]));
        assert!(!all.ledger(FOUR).is_exact());
    }

    /// The same with steps left out in session 9: also samples left out, and steps without records.
    #[track_caller]
    fn check_skipped(drawn: &[Drawn<'_>], skipped: &[(u64, u64)], expected: (u64, u64, u64, u64, u64)) {
        let mut all = Drawings::default();
        for &(session, step, samples) in drawn {
            all.add(0, Record::Drawn { session, step, samples: samples.to_vec(), tokens_xxh3: 1 });
        }
        // Every rank tells of it.
        for &(first, last) in skipped.iter().chain(skipped) {
            all.add(
                0,
                Record::Trouble {
                    time_us: 0,
                    session: 9,
                    step: last,
                    what: Trouble::Nan,
                    action: Action::Skip,
                    why: "a test".into(),
                    loss: f64::NAN,
                    grad_norm: 1.0,
                    skipped: Some((first, last)),
                    back_to: None,
                },
            );
        }
        let l = all.ledger(FOUR);
        let found = (l.steps, l.samples, l.samples_skipped, l.steps_missing, l.samples_lost);
        assert_eq!(found, expected, "{l:?}");
    }

    #[test]
    fn what_is_left_out_on_record_is_not_lost() {
        let of = |session: u64, step: u64| -> (u64, u64, Vec<(u64, u64)>) {
            (session, step, vec![(4 * (step - 1), 4)])
        };
        let drawn = |all: &[(u64, u64)], skipped: &[(u64, u64)], expected| {
            let all: Vec<_> = all.iter().map(|(session, step)| of(*session, *step)).collect();
            let all: Vec<Drawn<'_>> = all.iter().map(|(a, b, c)| (*a, *b, c.as_slice())).collect();
            check_skipped(&all, skipped, expected);
        };
        // A skip: drawn, and no part of the weights.
        drawn(&[(9, 1), (9, 2), (9, 3)], &[(2, 2)], (3, 8, 4, 0, 0));
        // A rollback from 3 to 1 that leaves out 4 as well, which nobody drew.
        drawn(&[(9, 1), (9, 2), (9, 3), (9, 5)], &[(2, 4)], (5, 8, 12, 0, 0));
        // The last ones; and more decisions over each other.
        drawn(&[(9, 1), (9, 2), (9, 3)], &[(3, 3), (2, 4)], (4, 4, 12, 0, 0));
        // 4 is missing, and nobody said so.
        drawn(&[(9, 1), (9, 2), (9, 3), (9, 5)], &[(2, 3)], (5, 12, 8, 1, 0));
        drawn(&[(9, 3)], &[(2, 2)], (3, 8, 4, 1, 0));
        // A later start did what an earlier one had left out.
        drawn(&[(9, 1), (9, 2), (7, 2), (7, 3)], &[(2, 4)], (3, 12, 0, 0, 0));
        drawn(&[(9, 1), (9, 2), (7, 3), (7, 4)], &[(2, 4)], (4, 12, 4, 0, 0));
        // Numbers of a journal are not believed.
        drawn(&[(9, 1)], &[(2, u64::MAX)], (u64::MAX, 4, u64::MAX - 4, 0, 0));
    }

    /// Of a journal's lines, as (when the step was done, step) or a drawing of its four samples: doubled lines, repeated
    /// samples, lost ones.
    #[track_caller]
    fn check_twice(lines: &[(Option<u64>, u64)], expected: (u64, u64, u64)) {
        let mut all = Drawings::default();
        for &(time_us, step) in lines {
            all.add(
                0,
                match time_us {
                    Some(time_us) => {
                        Record::Step(crate::record::Step { time_us, step, ..Default::default() })
                    }
                    None => drawn(9, step, &[(4 * (step - 1), 4)]),
                },
            );
        }
        let l = all.ledger(FOUR);
        let lines = l.doubled.iter().map(|d| d.lines).sum::<u64>();
        assert_eq!((lines, l.samples_repeated, l.samples_lost), expected, "{l:?}");
        assert_eq!(l.is_exact(), expected.1 + expected.2 == 0);
    }

    #[test]
    fn a_line_that_is_there_twice_is_no_step_that_was_done_twice() {
        check_twice(&[(Some(5), 1), (None, 1), (Some(6), 2), (None, 2)], (0, 0, 0));
        check_twice(&[(Some(5), 1), (None, 1), (None, 1), (Some(6), 2), (None, 2)], (1, 0, 0));
        // A piece of the file.
        let piece = [(Some(5), 1), (None, 1), (Some(6), 2), (None, 2)];
        check_twice(&[piece, piece].concat(), (2, 0, 0));
        check_twice(&[(None, 1), (None, 2), (None, 1)], (1, 0, 0));
        // The step was done once more, and later.
        check_twice(&[(Some(5), 1), (None, 1), (Some(7), 1), (None, 1)], (0, 4, 0));
        let mut all = Drawings::default();
        for first in [0, 4] {
            all.add(0, drawn(9, 1, &[(first, 4)]));
        }
        assert_eq!(all.ledger(FOUR).samples_repeated, 4, "another drawing of the same step");
    }

    #[test]
    fn a_session_that_rank_0_says_nothing_of_is_where_others_have_it() {
        let mut all = Drawings::default();
        let of = |rank: usize, session: u64, step: u64| {
            (rank, drawn(session, step, &[(4 * (step - 1) + 2 * rank as u64, 2)]))
        };
        let rank_0 = [of(0, 5, 1), of(0, 5, 2), of(0, 7, 3), of(0, 7, 4)];
        // Rank 0 was lost in the first step of the second session.
        let rank_1 = [of(1, 5, 1), of(1, 5, 2), of(1, 6, 3), of(1, 7, 3), of(1, 7, 4)];
        for (rank, record) in rank_0.into_iter().chain(rank_1) {
            all.add(rank, record);
        }
        let l = all.ledger(FOUR);
        assert_eq!((l.steps, l.steps_redone, l.sessions, l.is_exact()), (4, 1, 3, true), "{l:?}");
    }

    /// Of two ranks' drawings of steps, of half a batch each: what is missing of a run that has reached a step.
    #[track_caller]
    fn check_missing(ranks: [&[u64]; 2], reached: u64, expected: &[(u64, u64)]) {
        let mut all = Drawings::default();
        for (rank, steps) in ranks.into_iter().enumerate() {
            for &step in steps {
                all.add(rank, drawn(9, step, &[(4 * (step - 1) + 2 * rank as u64, 2)]));
            }
        }
        all.has_reached(reached);
        let l = all.ledger(FOUR);
        let found: Vec<_> = l.missing.iter().map(|m| (m.first, m.last)).collect();
        assert_eq!(found, expected, "{l:?}");
        assert_eq!((l.samples_lost, l.samples_repeated, l.steps), (0, 0, 5), "nobody is accused: {l:?}");
        assert_eq!(l.is_exact(), expected.is_empty());
        assert_eq!(l.steps_missing, expected.iter().map(|(a, b)| b - a + 1).sum::<u64>());
    }

    #[test]
    fn records_that_are_missing_are_no_samples_that_are_lost() {
        let all: &[u64] = &[1, 2, 3, 4, 5];
        check_missing([all, all], 5, &[]);
        check_missing([&[1, 2, 4, 5], &[1, 2, 4, 5]], 0, &[(3, 3)]);
        check_missing([&[1, 2, 5], all], 5, &[(3, 4)]);
        check_missing([all, &[1, 2, 3]], 5, &[(4, 5)]);
        check_missing([&[2, 3], &[2, 3]], 5, &[(1, 1), (4, 5)]);
    }

    #[test]
    fn steps_after_the_point_of_return_do_not_count() {
        let lost: Drawn<'_> = (5, 3, &[(8, 1)]);
        check(&[(5, 1, &[(0, 4)]), (5, 2, &[(4, 4)]), lost, (7, 3, &[(8, 4)])], (3, 1, 0, 0));
        // Back beyond the session before, and under other ranks.
        let all = [
            (5, 1, &[(0, 4)][..]),
            (5, 2, &[(4, 4)]),
            (6, 3, &[(8, 4)]),
            (4, 2, &[(4, 2)]),
            (4, 2, &[(6, 2)]),
        ];
        check(&all, (2, 2, 0, 0));
    }
}
