//! Rates against an exact solution, and against what makes a solution max-min fair at all.

use proptest::prelude::*;
use sim::flow::{Demand, max_min};

#[derive(Clone, Debug)]
struct Network {
    capacity: Vec<u64>,
    flows: Vec<(Vec<(usize, u64)>, u64)>,
}

fn networks() -> impl Strategy<Value = Network> {
    (1usize..7).prop_flat_map(|links| {
        let capacity = prop::collection::vec(1_000_000u64..1_000_000_000_000, links);
        let uses = prop::collection::btree_map(0..links, 1u64..5, 1..=links.min(4));
        let limit = prop_oneof![Just(u64::MAX), 1_000u64..200_000_000_000];
        let flow = (uses.prop_map(|u| u.into_iter().collect()), limit);
        (capacity, prop::collection::vec(flow, 1..9))
            .prop_map(|(capacity, flows)| Network { capacity, flows })
    })
}

fn rates(n: &Network) -> Vec<u64> {
    let demands: Vec<Demand<'_>> =
        n.flows.iter().map(|(uses, limit)| Demand { uses, limit: *limit }).collect();
    max_min(&n.capacity, &demands)
}

/// A fraction of whole numbers, kept in lowest terms.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ratio(i128, i128);

impl Ratio {
    fn new(a: i128, b: i128) -> Self {
        let (mut x, mut y) = (a.abs(), b.abs());
        while y > 0 {
            (x, y) = (y, x % y);
        }
        Ratio(a / x.max(1), b / x.max(1))
    }

    fn less(self, o: Ratio) -> bool {
        self.0 * o.1 < o.0 * self.1
    }

    fn value(self) -> f64 {
        self.0 as f64 / self.1 as f64
    }
}

/// The same problem in fractions: find the level at which the next link is full or flow content by trying all of them,
/// by the definition of what each level would take.
fn exact(n: &Network) -> Vec<Ratio> {
    let mut fixed: Vec<Option<Ratio>> = vec![None; n.flows.len()];
    while fixed.iter().any(Option::is_none) {
        let mut level: Option<Ratio> = None;
        let mut at = |candidate: Ratio| {
            if level.is_none_or(|l| candidate.less(l)) {
                level = Some(candidate);
            }
        };
        let full_at = |link: usize| {
            let (mut taken, mut rising) = (Ratio(0, 1), 0);
            for (f, (uses, _)) in n.flows.iter().enumerate() {
                let count: i128 = uses.iter().filter(|u| u.0 == link).map(|u| i128::from(u.1)).sum();
                match fixed[f] {
                    Some(r) => taken = Ratio::new(taken.0 * r.1 + count * r.0 * taken.1, taken.1 * r.1),
                    None => rising += count,
                }
            }
            let capacity = i128::from(n.capacity[link]);
            (rising > 0).then(|| Ratio::new(capacity * taken.1 - taken.0, taken.1 * rising))
        };
        let links: Vec<Option<Ratio>> = (0..n.capacity.len()).map(full_at).collect();
        links.iter().flatten().for_each(|r| at(*r));
        for (f, (_, limit)) in n.flows.iter().enumerate() {
            if fixed[f].is_none() {
                at(Ratio(i128::from(*limit), 1));
            }
        }
        let level = level.expect("something rises");
        for (f, (uses, limit)) in n.flows.iter().enumerate() {
            let full = uses.iter().any(|u| links[u.0] == Some(level));
            if fixed[f].is_none() && (full || Ratio(i128::from(*limit), 1) == level) {
                fixed[f] = Some(level);
            }
        }
    }
    fixed.into_iter().flatten().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn rates_are_the_exact_ones_but_for_whole_bytes(n in networks()) {
        let all: u64 = n.flows.iter().flat_map(|f| &f.0).map(|u| u.1).sum();
        for (rate, exact) in rates(&n).into_iter().zip(exact(&n)) {
            prop_assert!((rate as f64 - exact.value()).abs() <= (all * all) as f64, "{rate} for {exact:?}");
        }
    }

    /// No link over its capacity; and every flow that could take more has a full link on which no one has more.
    #[test]
    fn links_hold_and_no_work_is_left(n in networks()) {
        let rates = rates(&n);
        let on = |link: usize| {
            let uses = |f: &usize| n.flows[*f].0.iter().any(|u| u.0 == link);
            (0..n.flows.len()).filter(uses).collect::<Vec<_>>()
        };
        let count = |f: usize, link: usize| n.flows[f].0.iter().find(|u| u.0 == link).map_or(0, |u| u.1);
        let left: Vec<i128> = (0..n.capacity.len())
            .map(|l| i128::from(n.capacity[l]) - on(l).iter().map(|f| i128::from(count(*f, l) * rates[*f])).sum::<i128>())
            .collect();
        prop_assert!(left.iter().all(|l| *l >= 0));
        for (f, (uses, limit)) in n.flows.iter().enumerate() {
            prop_assert!(rates[f] <= *limit);
            let bottleneck = uses.iter().any(|&(l, _)| {
                let flows: u64 = on(l).iter().map(|f| count(*f, l)).sum();
                left[l] < i128::from(flows) && on(l).iter().all(|o| rates[*o] <= rates[f])
            });
            prop_assert!(rates[f] == *limit || bottleneck, "flow {f} of {rates:?} could have more");
        }
    }

    /// Alike flows counted once have the rate that each has alone.
    #[test]
    fn counting_alike_flows_changes_no_rate(n in networks(), times in 2u64..6) {
        let counted = Network {
            capacity: n.capacity.clone(),
            flows: n.flows.iter().map(|(u, l)| (u.iter().map(|(k, c)| (*k, c * times)).collect(), *l)).collect(),
        };
        let apart = Network {
            capacity: n.capacity.clone(),
            flows: n.flows.iter().flat_map(|f| std::iter::repeat_n(f.clone(), times as usize)).collect(),
        };
        let each: Vec<u64> = rates(&apart).into_iter().step_by(times as usize).collect();
        prop_assert_eq!(rates(&counted), each);
    }

    /// Which of several links that are full at once is named first changes no rate, however bytes are left over.
    #[test]
    fn the_order_of_links_and_flows_changes_no_rate(n in networks(), few in prop::collection::vec(1u64..40, 7)) {
        let capacity: Vec<u64> = n.capacity.iter().zip(&few).map(|(_, few)| *few).collect();
        let links = capacity.len();
        let turn = |uses: &Vec<(usize, u64)>| uses.iter().map(|(l, c)| (links - 1 - l, *c)).collect();
        let turned = Network {
            capacity: capacity.iter().rev().copied().collect(),
            flows: n.flows.iter().rev().map(|(uses, limit)| (turn(uses), *limit)).collect(),
        };
        let mut again = rates(&turned);
        again.reverse();
        prop_assert_eq!(rates(&Network { capacity, ..n }), again);
    }
}
