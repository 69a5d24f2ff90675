//! What a ledger says of journals.

use super::*;

type Drawn<'a> = (u64, u64, &'a [(u64, u64)]);

const FOUR: BatchSpec = BatchSpec { sequence: 1, sequences: 4, ramp: None };

fn drawn(session: u64, step: u64, samples: &[(u64, u64)]) -> Record {
    Record::Drawn { begun_us: None, session, step, samples: samples.to_vec(), tokens_xxh3: 1 }
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
    let (mut all, of) = (Drawings::default(), self::drawn);
    for &(session, step, samples) in drawn {
        all.add(0, of(session, step, samples));
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
                Some(time_us) => Record::Step(crate::record::Step { time_us, step, ..Default::default() }),
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

/// A line of a rank's journal in these tests.
#[derive(Clone, Copy)]
enum Line {
    /// Began a step of a session, with its half of the batch.
    Begun(u64, u64),
    /// Did it.
    Done(u64),
}

/// Of two ranks' journals: steps, those redone, those missing.
#[track_caller]
fn check_begun(ranks: [&[Line]; 2], reached: u64, expected: (u64, u64, u64)) {
    let mut all = Drawings::default();
    for (rank, lines) in ranks.into_iter().enumerate() {
        for (line, time_us) in lines.iter().zip(1..) {
            all.add(
                rank,
                match *line {
                    Line::Begun(session, step) => Record::Drawn {
                        begun_us: Some(time_us),
                        session,
                        step,
                        samples: vec![(4 * (step - 1) + 2 * rank as u64, 2)],
                        tokens_xxh3: 1,
                    },
                    Line::Done(step) => {
                        Record::Step(crate::record::Step { time_us, step, ..Default::default() })
                    }
                },
            );
        }
    }
    all.has_reached(reached);
    let l = all.ledger(FOUR);
    assert_eq!((l.steps, l.steps_redone, l.steps_missing), expected, "{l:?}");
    assert_eq!((l.samples_lost, l.samples_repeated), (0, 0), "{l:?}");
    assert_eq!(l.batches.len() as u64, l.steps - l.steps_missing, "{l:?}");
}

#[test]
fn a_step_that_was_begun_counts_once_others_went_on_from_it() {
    use Line::{Begun as B, Done as D};
    let first = [B(5, 1), D(1), B(5, 2)];
    let then = |more: &[Line]| [&first, more].concat();
    // Rank 1 was lost when the other had its gradients of step 2.
    check_begun([&then(&[D(2), B(7, 3), D(3)]), &then(&[B(7, 3), D(3)])], 0, (3, 0, 0));
    // So were both, but for one that a later session went on from.
    check_begun([&then(&[B(7, 3), D(3)]), &then(&[B(7, 3), D(3)])], 0, (3, 0, 0));
    // Nobody had step 2, and it was begun again; or rank 1 had, and was lost with it.
    check_begun([&then(&[B(7, 2), D(2)]), &then(&[B(7, 2), D(2)])], 0, (2, 0, 0));
    check_begun([&then(&[B(7, 2), D(2)]), &then(&[D(2), B(7, 2), D(2)])], 0, (2, 1, 0));
    check_begun([&then(&[B(7, 2), D(2)]), &[B(5, 1), D(1), B(7, 2), D(2)]], 0, (2, 0, 0));
    // The run ends in step 2; or has reached it, as its checkpoint says.
    check_begun([&first, &first], 0, (1, 0, 0));
    check_begun([&first, &first], 1, (1, 0, 0));
    check_begun([&first, &[B(5, 1), D(1)]], 0, (1, 0, 0));
    check_begun([&first, &first], 2, (2, 0, 0));
    check_begun([&first, &[B(5, 1), D(1)]], 2, (2, 0, 1));
    // One that was begun from an older state, and did nothing, takes nothing back.
    check_begun([&then(&[D(2), B(7, 2)]), &then(&[D(2), B(7, 2)])], 0, (2, 0, 0));
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
    let all =
        [(5, 1, &[(0, 4)][..]), (5, 2, &[(4, 4)]), (6, 3, &[(8, 4)]), (4, 2, &[(4, 2)]), (4, 2, &[(6, 2)])];
    check(&all, (2, 2, 0, 0));
}
