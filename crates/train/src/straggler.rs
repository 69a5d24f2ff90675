//! Who keeps the others waiting, from what every rank measures of itself: seconds of its own work, and seconds that it
//! waited, by axis of the mesh. A rank that is slow works longer than those with the same work, who wait for it; behind a
//! slow link all wait, whoever comes last.
//!
//! One slow step says nothing on a machine that others use too. Each number is the median of a window of steps; a rank is
//! slow whose best of the last three windows is worse than what is usual was in the worst of them.

use std::collections::{BTreeMap, VecDeque};

use journal::Cause;
use serde::{Deserialize, Serialize};

use crate::trouble::median;

/// A rank that works so much longer than those with the same work is slow.
const SLOW: f64 = 1.25;

/// A group that waits so much longer for the same messages, even where nobody is late, has a slow link.
const SLOW_LINK: f64 = 2.0;

/// What costs less of a step is not worth a word.
const LEAST_SHARE: f64 = 0.1;

/// Windows that are judged together.
const WINDOWS: usize = 3;

/// Windows of the past that a rank alone with its work is compared with.
const PAST: usize = 16;

/// What a rank says of its last window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Window {
    /// Ranks with the same number have the same work.
    pub(crate) work: usize,
    /// Median seconds of a step.
    pub(crate) step_s: f64,
    /// Of those, in which it did not wait.
    pub(crate) busy_s: f64,
    /// By axis on which it waited.
    pub(crate) axes: BTreeMap<String, Waited>,
}

/// How a rank waited on an axis.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Waited {
    /// Median seconds of a step.
    pub(crate) wait_s: f64,
    /// The op that it waited in most.
    pub(crate) op: String,
    /// Whom it talks to there, itself included.
    pub(crate) ranks: Vec<usize>,
}

/// Steps of a window so far.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    steps_s: Vec<f64>,
    busy_s: Vec<f64>,
    axes: BTreeMap<&'static str, Vec<f64>>,
}

impl Collected {
    pub(crate) fn add(&mut self, step_s: f64, waits_s: impl Iterator<Item = (&'static str, f64)>) {
        let mut waited = 0.0;
        for (axis, s) in waits_s {
            waited += s;
            self.axes.entry(axis).or_default().push(s);
        }
        self.steps_s.push(step_s);
        self.busy_s.push((step_s - waited).max(0.0));
    }

    pub(crate) fn len(&self) -> usize {
        self.steps_s.len()
    }

    /// The window, once it is full; `op` and `ranks` say where it waited most on an axis, and for whom.
    pub(crate) fn window(
        mut self,
        work: usize,
        op: impl Fn(&str) -> String,
        ranks: impl Fn(&str) -> Vec<usize>,
    ) -> Window {
        let axes = std::mem::take(&mut self.axes).into_iter();
        let axes = axes.map(|(axis, mut waits)| {
            let waited = Waited { wait_s: median(&mut waits), op: op(axis), ranks: ranks(axis) };
            (axis.to_owned(), waited)
        });
        let axes = axes.collect();
        Window { work, step_s: median(&mut self.steps_s), busy_s: median(&mut self.busy_s), axes }
    }
}

/// Whom the others wait for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Found {
    pub(crate) ranks: Vec<usize>,
    pub(crate) cause: Cause,
    pub(crate) axis: String,
    pub(crate) op: String,
    /// Seconds of a step that are lost by it.
    pub(crate) lost_s: f64,
    /// Share of a step.
    pub(crate) share: f64,
    pub(crate) why: String,
}

/// The windows of all ranks, newest last: the same on every rank.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    all: VecDeque<Vec<Window>>,
}

impl Windows {
    /// Takes the last window of every rank, in rank order, and says whom they wait for.
    pub(crate) fn add(&mut self, ranks: Vec<Window>) -> Vec<Found> {
        if self.all.back().is_some_and(|last| last.len() != ranks.len()) {
            self.all.clear();
        }
        self.all.push_back(ranks);
        if self.all.len() > WINDOWS + PAST {
            self.all.pop_front();
        }
        if self.all.len() < WINDOWS {
            return Vec::new();
        }
        let mut found = self.slow_ranks();
        if found.is_empty() {
            found = self.slow_links();
        }
        found.sort_by(|a, b| b.lost_s.total_cmp(&a.lost_s));
        found
    }

    /// The least of the last windows.
    fn best(&self, of: impl Fn(&[Window]) -> f64) -> f64 {
        self.all.iter().rev().take(WINDOWS).map(|w| of(w)).fold(f64::INFINITY, f64::min)
    }

    /// The most of the last windows.
    fn worst(&self, of: impl Fn(&[Window]) -> f64) -> f64 {
        self.all.iter().rev().take(WINDOWS).map(|w| of(w)).fold(0.0, f64::max)
    }

    /// The most of those before, if they are as many.
    fn before(&self, of: impl Fn(&[Window]) -> f64) -> Option<f64> {
        let past = self.all.iter().rev().skip(WINDOWS).map(|w| of(w));
        (past.len() >= WINDOWS).then(|| past.fold(0.0, f64::max))
    }

    fn slow_ranks(&self) -> Vec<Found> {
        let Some(last) = self.all.back() else { return Vec::new() };
        let step_s = self.worst(|w| w.iter().map(|r| r.step_s).fold(0.0, f64::max));
        let mut found = Vec::new();
        for (rank, window) in last.iter().enumerate() {
            let peers: Vec<usize> = (0..last.len()).filter(|r| last[*r].work == window.work).collect();
            let usual = |w: &[Window]| median(&mut peers.iter().map(|r| w[*r].busy_s).collect::<Vec<_>>());
            let (usual_s, whose) = match peers.len() {
                1 => match self.before(|w| w[rank].busy_s) {
                    Some(before) => (before, "it used to take"),
                    None => continue,
                },
                _ => (self.worst(usual), "ranks with the same work take"),
            };
            let own_s = self.best(|w| w[rank].busy_s);
            let (lost_s, share) = (own_s - usual_s, (own_s - usual_s) / step_s);
            if own_s <= SLOW * usual_s || share < LEAST_SHARE {
                continue;
            }
            let (axis, op) = self.where_waited(rank);
            let why = format!(
                "rank {rank} works {:.1} ms of a step, {whose} {:.1} ms: the others wait for it {} of the step, most in {op} ({axis})",
                1e3 * own_s,
                1e3 * usual_s,
                percent(share)
            );
            found.push(Found { ranks: vec![rank], cause: Cause::Compute, axis, op, lost_s, share, why });
        }
        found
    }

    /// On which axis and in which op the others wait more than `rank`.
    fn where_waited(&self, rank: usize) -> (String, String) {
        let Some(last) = self.all.back() else { return Default::default() };
        let own = |axis: &str| last[rank].axes.get(axis).map_or(0.0, |w| w.wait_s);
        let others = last.iter().enumerate().filter(|(r, _)| *r != rank).flat_map(|(_, w)| &w.axes);
        let most = others.max_by(|(a, x), (b, y)| (x.wait_s - own(a)).total_cmp(&(y.wait_s - own(b))));
        most.map(|(axis, w)| (axis.clone(), w.op.clone())).unwrap_or_default()
    }

    /// Groups in which even who comes last waits long: longer than other groups of the axis, or than before.
    fn slow_links(&self) -> Vec<Found> {
        let Some(last) = self.all.back() else { return Vec::new() };
        let mut groups: BTreeMap<(&str, &[usize]), &str> = BTreeMap::new();
        for (axis, waited) in last.iter().flat_map(|w| &w.axes) {
            groups.entry((axis, &waited.ranks)).or_insert(&waited.op);
        }
        let least = |axis: &str, ranks: &[usize]| {
            let (axis, ranks) = (axis.to_owned(), ranks.to_vec());
            move |w: &[Window]| {
                let waits = ranks.iter().filter_map(|r| Some(w.get(*r)?.axes.get(&axis)?.wait_s));
                waits.fold(f64::INFINITY, f64::min)
            }
        };
        let step_s = self.worst(|w| w.iter().map(|r| r.step_s).fold(0.0, f64::max));
        let mut found = Vec::new();
        for (&(axis, ranks), op) in &groups {
            let others = groups.keys().filter(|(a, r)| *a == axis && *r != ranks);
            let mut others: Vec<f64> = others.map(|(a, r)| self.worst(least(a, r))).collect();
            let (usual_s, whose) = match others.len() {
                0 | 1 => match self.before(least(axis, ranks)) {
                    Some(before) => (before, "before it was"),
                    None => continue,
                },
                _ => (median(&mut others), "other groups wait"),
            };
            let own_s = self.best(least(axis, ranks));
            let (lost_s, share) = (own_s - usual_s, (own_s - usual_s) / step_s);
            if !own_s.is_finite() || own_s <= SLOW_LINK * usual_s || share < LEAST_SHARE {
                continue;
            }
            let names: Vec<String> = ranks.iter().map(usize::to_string).collect();
            let why = format!(
                "ranks {} all wait {:.1} ms of a step for each other in {op} ({axis}), {whose} {:.1} ms: their link is slow, {} of the step",
                names.join(", "),
                1e3 * own_s,
                1e3 * usual_s,
                percent(share)
            );
            let (axis, op) = (axis.to_owned(), (*op).to_owned());
            found.push(Found { ranks: ranks.to_vec(), cause: Cause::Link, axis, op, lost_s, share, why });
        }
        found
    }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two replicas of two stages: ranks 0 and 1 have the first stage. Work and waits of each, by milliseconds.
    fn windows(ranks: [(f64, f64); 4]) -> Vec<Window> {
        let of = |(rank, (busy, wait)): (usize, (f64, f64))| {
            let ranks = if rank < 2 { vec![0, 1] } else { vec![2, 3] };
            let waited = Waited { wait_s: wait / 1e3, op: "grads.bucket0.wait".into(), ranks };
            let axes = BTreeMap::from([("dp".to_owned(), waited)]);
            Window { work: rank / 2, step_s: (busy + wait) / 1e3, busy_s: busy / 1e3, axes }
        };
        ranks.into_iter().enumerate().map(of).collect()
    }

    #[track_caller]
    fn check(all: &[[(f64, f64); 4]], expected: &[(&[usize], Cause)]) -> Vec<Found> {
        let mut windows_ = Windows::default();
        let found = all.iter().map(|w| windows_.add(windows(*w))).last().unwrap_or_default();
        let named: Vec<_> = found.iter().map(|f| (f.ranks.as_slice(), f.cause)).collect();
        assert_eq!(named, expected);
        found
    }

    const EVEN: [(f64, f64); 4] = [(60.0, 40.0), (60.0, 40.0), (90.0, 10.0), (90.0, 10.0)];

    #[test]
    fn nobody_is_named_who_has_more_to_do() {
        check(&[EVEN; 9], &[]);
        check(&[EVEN; 2], &[]);
    }

    #[test]
    fn who_works_longer_than_its_peers_is_named() {
        let slow = [(60.0, 70.0), (100.0, 30.0), (90.0, 40.0), (90.0, 40.0)];
        let found = check(&[EVEN, slow, slow, slow], &[(&[1], Cause::Compute)]);
        assert_eq!(
            found[0].why,
            "rank 1 works 100.0 ms of a step, ranks with the same work take 60.0 ms: the others wait for it 31 % of the step, most in grads.bucket0.wait (dp)"
        );
        // One window in three is an accident, and so are two: somebody else may have been slow in the third.
        check(&[EVEN, slow, EVEN], &[]);
        check(&[slow, EVEN, slow], &[]);
        let other = [slow[1], slow[0], slow[2], slow[3]];
        check(&[slow, other, slow, other], &[]);
        check(&[slow, slow], &[]);
    }

    #[test]
    fn a_link_keeps_all_of_its_ranks_waiting() {
        let slow = [(60.0, 90.0), (60.0, 90.0), (90.0, 60.0), (90.0, 60.0)];
        let all: Vec<_> = [EVEN; 3].into_iter().chain([slow; 3]).collect();
        let found = check(&all, &[(&[0, 1], Cause::Link), (&[2, 3], Cause::Link)]);
        assert!(found[0].why.contains("their link is slow"), "{}", found[0].why);
        // Without a past and with no groups to compare with, nothing is said.
        check(&[slow; 5], &[]);
    }

    proptest! {
        #[test]
        fn noise_within_bounds_names_nobody(noise in proptest::collection::vec(0.9f64..1.1, 4 * 12)) {
            let mut all = Windows::default();
            for chunk in noise.chunks(4) {
                let n = |i: usize| (EVEN[i].0 * chunk[i], EVEN[i].1);
                prop_assert_eq!(all.add(windows([n(0), n(1), n(2), n(3)])), vec![]);
            }
        }
    }
}
