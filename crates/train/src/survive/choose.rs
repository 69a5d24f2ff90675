//! Which state ranks go on from, of what they hold.

use std::collections::BTreeMap;

use super::share::Label;

/// A state that is whole: every share of it is with somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) step: u64,
    pub(crate) era: u64,
    /// Who gives each share.
    pub(crate) givers: Vec<usize>,
}

/// The newest state of which the ranks hold every share, given what each holds. Of several that hold a share, the one that
/// gives least so far gives it.
pub(crate) fn newest_whole(held: &[Vec<Label>]) -> Option<Choice> {
    let mut states: BTreeMap<(u64, u64, usize), BTreeMap<usize, Vec<usize>>> = BTreeMap::new();
    for (rank, labels) in held.iter().enumerate() {
        for l in labels.iter().filter(|l| l.owner < l.shares) {
            states.entry((l.step, l.era, l.shares)).or_default().entry(l.owner).or_default().push(rank);
        }
    }
    let ((step, era, _), holders) =
        states.into_iter().rev().find(|((_, _, shares), holders)| holders.len() == *shares)?;
    let mut gives = vec![0_usize; held.len()];
    let givers = holders.values().filter_map(|ranks| {
        let giver = *ranks.iter().min_by_key(|rank| gives[**rank])?;
        gives[giver] += 1;
        Some(giver)
    });
    Some(Choice { step, era, givers: givers.collect() })
}

/// For each rank the one that keeps a copy of its share: on another host wherever that can be, and each for one other.
///
/// Ranks in the order of their hosts are moved on by as many as the largest host has: two ranks so far apart share a host
/// only if it has more than half of all.
pub(crate) fn keepers(hosts: &[usize]) -> Vec<usize> {
    let n = hosts.len();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_key(|rank| (hosts[*rank], *rank));
    let on = |host: usize| hosts.iter().filter(|h| **h == host).count();
    let largest = hosts.iter().map(|host| on(*host)).max().unwrap_or(0);
    let by = if largest == n { 1 } else { largest };
    let mut keepers = vec![0; n];
    for (at, rank) in order.iter().enumerate() {
        keepers[*rank] = order[(at + by) % n];
    }
    keepers
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Of what ranks hold as (step, era, owner), two shares a state: the step and who gives.
    #[track_caller]
    fn check(held: &[&[(u64, u64, usize)]], expected: Option<(u64, &[usize])>) {
        let labels = |held: &&[(u64, u64, usize)]| {
            held.iter().map(|&(step, era, owner)| Label { step, era, shares: 2, owner }).collect()
        };
        let held: Vec<Vec<Label>> = held.iter().map(labels).collect();
        let found = newest_whole(&held);
        assert_eq!(found.as_ref().map(|c| (c.step, c.givers.as_slice())), expected);
    }

    #[test]
    fn the_newest_state_that_is_whole() {
        check(&[], None);
        check(&[&[(5, 1, 0)], &[]], None);
        // The other is lost; its copy is with us.
        check(&[&[(5, 1, 0), (5, 1, 1)]], Some((5, &[0, 0])));
        // Step 6 had not reached everybody.
        check(&[&[(5, 1, 0), (6, 1, 0)], &[(5, 1, 1)]], Some((5, &[0, 1])));
        // Both hold both: each gives one.
        check(&[&[(5, 1, 0), (5, 1, 1)], &[(5, 1, 0), (5, 1, 1)]], Some((5, &[0, 1])));
        // Shares of two layouts make no state.
        check(&[&[(5, 1, 0)], &[(5, 2, 1)]], None);
        check(&[&[(5, 1, 0), (5, 1, 1), (5, 2, 0), (5, 2, 1)]], Some((5, &[0, 0])));
        check(&[&[(5, 1, 7)], &[(5, 1, 0), (5, 1, 1)]], Some((5, &[1, 1])));
    }

    proptest! {
        #[test]
        fn each_keeps_for_one_other(hosts in proptest::collection::vec(0usize..4, 2..12)) {
            let keepers = keepers(&hosts);
            let mut once = keepers.clone();
            once.sort_unstable();
            prop_assert_eq!(once, (0..hosts.len()).collect::<Vec<_>>());
            let shared = (0..hosts.len()).filter(|rank| hosts[keepers[*rank]] == hosts[*rank]).count();
            let largest = hosts.iter().map(|h| hosts.iter().filter(|x| *x == h).count()).max().unwrap_or(0);
            // What is more than half on one host cannot all go elsewhere.
            prop_assert_eq!(shared, (2 * largest).saturating_sub(hosts.len()));
            prop_assert!(keepers.iter().enumerate().all(|(rank, keeper)| rank != *keeper));
        }
    }
}
