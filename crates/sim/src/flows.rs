//! Bytes on their way: flows that begin and end, and the rates they share links at meanwhile.

use crate::clock::Ticks;
use crate::flow::{Demand, max_min};

/// Parts of a byte that progress is counted in: a byte per second moves one in a tick.
const PARTS: u128 = 1_000_000_000_000;

/// Whose a flow is: which message it belongs to, and which class sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) transfer: usize,
    pub(crate) class: usize,
}

struct Flow<'w> {
    uses: &'w [(usize, u64)],
    limit: u64,
    /// Parts of bytes left at `since`.
    left: u128,
    since: Ticks,
    rate: u64,
    owner: Owner,
}

/// All flows of a world.
pub(crate) struct Flows<'w> {
    capacity: Vec<u64>,
    flows: Vec<Option<Flow<'w>>>,
    /// How often a flow's end was set anew: ends set before do not count.
    versions: Vec<u32>,
    free: Vec<usize>,
    /// Flows on each link.
    on: Vec<Vec<usize>>,
    /// Links whose flows changed since rates were set.
    changed: Vec<usize>,
    is_changed: Vec<bool>,
    touched: Touched,
}

/// The links and flows of one part of the network that shares something: scratch space.
#[derive(Default)]
struct Touched {
    links: Vec<usize>,
    flows: Vec<usize>,
    /// Place of each link and flow in the lists, or none.
    link_at: Vec<usize>,
    flow_seen: Vec<bool>,
}

const NONE: usize = usize::MAX;

/// When a flow ends, unless it is set anew before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) at: Ticks,
    pub(crate) flow: usize,
    pub(crate) version: u32,
}

impl<'w> Flows<'w> {
    pub(crate) fn new(capacity: &[u64]) -> Self {
        let touched = Touched { link_at: vec![NONE; capacity.len()], ..Touched::default() };
        Flows {
            capacity: capacity.to_vec(),
            flows: Vec::new(),
            versions: Vec::new(),
            free: Vec::new(),
            on: vec![Vec::new(); capacity.len()],
            changed: Vec::new(),
            is_changed: vec![false; capacity.len()],
            touched,
        }
    }

    /// Begins a flow of `bytes` for `owner`; it moves once rates are [`settled`](Flows::settle).
    pub(crate) fn start(
        &mut self,
        now: Ticks,
        uses: &'w [(usize, u64)],
        limit: u64,
        bytes: u64,
        owner: Owner,
    ) {
        let flow = Flow { uses, limit, left: u128::from(bytes) * PARTS, since: now, rate: 0, owner };
        let id = self.free.pop().unwrap_or_else(|| {
            self.flows.push(None);
            self.versions.push(0);
            self.touched.flow_seen.push(false);
            self.flows.len() - 1
        });
        for &(link, _) in uses {
            self.on[link].push(id);
            self.mark(link);
        }
        self.flows[id] = Some(flow);
    }

    /// A link carries another rate from now on, once rates are [`settled`](Flows::settle).
    pub(crate) fn set_capacity(&mut self, link: usize, rate: u64) {
        if self.capacity[link] != rate {
            self.capacity[link] = rate;
            self.mark(link);
        }
    }

    /// Ends a flow whose time has come, and says whose it was.
    pub(crate) fn end(&mut self, end: End) -> Option<Owner> {
        if self.versions[end.flow] != end.version {
            return None;
        }
        let flow = self.flows[end.flow].take()?;
        self.versions[end.flow] += 1;
        for &(link, _) in flow.uses {
            let on = &mut self.on[link];
            if let Some(at) = on.iter().position(|f| *f == end.flow) {
                on.swap_remove(at);
            }
            self.mark(link);
        }
        self.free.push(end.flow);
        Some(flow.owner)
    }

    fn mark(&mut self, link: usize) {
        if !std::mem::replace(&mut self.is_changed[link], true) {
            self.changed.push(link);
        }
    }

    /// Sets rates where flows began or ended, and tells when flows whose rates changed will end.
    pub(crate) fn settle(&mut self, now: Ticks, mut tell: impl FnMut(End)) {
        while let Some(link) = self.changed.pop() {
            // A link that changed flows lead to is settled with them.
            if !std::mem::replace(&mut self.is_changed[link], false) || self.on[link].is_empty() {
                continue;
            }
            let mut touched = std::mem::take(&mut self.touched);
            self.connected(link, &mut touched);
            let rates = self.rates(&touched);
            for (&id, rate) in touched.flows.iter().zip(rates) {
                self.change(now, id, rate, &mut tell);
            }
            for &link in &touched.links {
                touched.link_at[link] = NONE;
                self.is_changed[link] = false;
            }
            for &flow in &touched.flows {
                touched.flow_seen[flow] = false;
            }
            self.touched = touched;
        }
    }

    /// Everything that shares links with something on `link`.
    fn connected(&self, link: usize, t: &mut Touched) {
        t.links.clear();
        t.flows.clear();
        t.links.push(link);
        t.link_at[link] = 0;
        let mut next = 0;
        while next < t.links.len() {
            for &id in &self.on[t.links[next]] {
                if std::mem::replace(&mut t.flow_seen[id], true) {
                    continue;
                }
                t.flows.push(id);
                for &(link, _) in self.flows[id].as_ref().map_or(&[][..], |f| f.uses) {
                    if t.link_at[link] == NONE {
                        t.link_at[link] = t.links.len();
                        t.links.push(link);
                    }
                }
            }
            next += 1;
        }
    }

    fn rates(&self, t: &Touched) -> Vec<u64> {
        let flow = |id: usize| self.flows[id].as_ref();
        if let [only] = t.flows[..] {
            let free = |f: &Flow<'_>| {
                let narrow = f.uses.iter().map(|(link, count)| self.capacity[*link] / count).min();
                narrow.unwrap_or(u64::MAX).min(f.limit)
            };
            return vec![flow(only).map_or(0, free)];
        }
        let capacity: Vec<u64> = t.links.iter().map(|l| self.capacity[*l]).collect();
        let here = |f: &Flow<'_>| f.uses.iter().map(|(link, count)| (t.link_at[*link], *count)).collect();
        let uses: Vec<Vec<(usize, u64)>> =
            t.flows.iter().map(|id| flow(*id).map_or(Vec::new(), here)).collect();
        let limits = t.flows.iter().map(|id| flow(*id).map_or(0, |f| f.limit));
        let demands: Vec<Demand<'_>> =
            uses.iter().zip(limits).map(|(uses, limit)| Demand { uses, limit }).collect();
        max_min(&capacity, &demands)
    }

    fn change(&mut self, now: Ticks, id: usize, rate: u64, tell: &mut impl FnMut(End)) {
        let Some(flow) = &mut self.flows[id] else { return };
        if flow.rate == rate {
            return;
        }
        let moved = u128::from(flow.rate) * u128::from(now - flow.since);
        flow.left = flow.left.saturating_sub(moved);
        (flow.since, flow.rate) = (now, rate);
        self.versions[id] += 1;
        if rate > 0 {
            let takes = flow.left.div_ceil(rate.into());
            tell(End { at: now.saturating_add(takes as Ticks), flow: id, version: self.versions[id] });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use proptest::prelude::*;

    use super::*;

    /// Links' capacities; flows by start, links, limit, bytes; a link that changes its rate, when, and to what.
    type Case = (Vec<u64>, Vec<(Ticks, Vec<(usize, u64)>, u64, u64)>, (Ticks, usize, u64));

    fn cases() -> impl Strategy<Value = Case> {
        (1usize..6).prop_flat_map(|links| {
            let capacity = prop::collection::vec(1_000_000u64..1_000_000_000_000, links);
            let uses = prop::collection::btree_map(0..links, 1u64..4, 1..=links.min(3));
            let uses = uses.prop_map(|u| u.into_iter().collect::<Vec<_>>());
            let limit = prop_oneof![Just(u64::MAX), 100_000u64..1_000_000, 1_000u64..200_000_000_000];
            let flow = (0u64..1_000_000_000_000, uses, limit, 1u64..10_000_000_000);
            let change = (0u64..1_000_000_000_000, 0..links, 1_000_000u64..1_000_000_000_000);
            (capacity, prop::collection::vec(flow, 1..10), change)
        })
    }

    /// Plays the flows to their end: what each moved, and when it ended.
    fn played((capacity, given, change): &Case) -> Vec<(u128, Ticks)> {
        let mut flows = Flows::new(capacity);
        let mut now_capacity = capacity.clone();
        let mut starts: Vec<usize> = (0..given.len()).collect();
        starts.sort_by_key(|f| Reverse(given[*f].0));
        let mut ends = BinaryHeap::new();
        let mut changes = vec![*change];
        let (mut moved, mut done) = (vec![(0u128, 0); given.len()], 0);
        let mut before = 0;
        while done < given.len() {
            let start = starts.last().map_or(Ticks::MAX, |f| given[*f].0);
            let end = ends.peek().map_or(Ticks::MAX, |Reverse(e): &Reverse<(Ticks, usize, u32)>| e.0);
            let now = start.min(end).min(changes.last().map_or(Ticks::MAX, |c| c.0));
            // What moves between events moves at rates that hold on every link.
            let mut on = vec![0u128; capacity.len()];
            for flow in flows.flows.iter().flatten() {
                moved[flow.owner.transfer].0 += u128::from(flow.rate) * u128::from(now - before);
                flow.uses.iter().for_each(|(l, n)| on[*l] += u128::from(*n) * u128::from(flow.rate));
                assert!(flow.rate <= flow.limit);
            }
            assert!(on.iter().zip(&now_capacity).all(|(used, c)| *used <= u128::from(*c)), "{on:?}");
            before = now;
            while let Some(Reverse((at, flow, version))) = ends.peek().copied().filter(|e| e.0.0 == now) {
                ends.pop();
                if let Some(owner) = flows.end(End { at, flow, version }) {
                    moved[owner.transfer].1 = now;
                    done += 1;
                }
            }
            while let Some(f) = starts.pop_if(|f| given[*f].0 == now) {
                let (_, uses, limit, bytes) = &given[f];
                flows.start(now, uses, *limit, *bytes, Owner { transfer: f, class: 0 });
            }
            while let Some((_, link, rate)) = changes.pop_if(|c| c.0 == now) {
                flows.set_capacity(link, rate);
                now_capacity[link] = rate;
            }
            flows.settle(now, |e| ends.push(Reverse((e.at, e.flow, e.version))));
            assert_fair(&flows, &now_capacity);
        }
        moved
    }

    /// Flows have the rates that all of them together would be given anew.
    fn assert_fair(flows: &Flows<'_>, capacity: &[u64]) {
        let alive: Vec<&Flow<'_>> = flows.flows.iter().flatten().collect();
        let demands: Vec<Demand<'_>> =
            alive.iter().map(|f| Demand { uses: f.uses, limit: f.limit }).collect();
        let rates: Vec<u64> = alive.iter().map(|f| f.rate).collect();
        assert_eq!(rates, max_min(capacity, &demands));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

        /// Every byte that is sent arrives, and none more but for the last tick; at no moment does a link carry more than
        /// it can, nor less than fair shares fill, whatever begins, ends or changes; and the order in which flows are named
        /// changes nothing.
        #[test]
        fn bytes_are_conserved(case in cases()) {
            let moved = played(&case);
            for ((moved, end), (start, _, _, bytes)) in moved.iter().zip(&case.1) {
                prop_assert!(end > start);
                prop_assert!(*moved >= u128::from(*bytes) * PARTS);
                // A tick at the rate of the fastest link.
                prop_assert!(*moved - u128::from(*bytes) * PARTS <= 1_000_000_000_000);
            }
            let mut turned = case.clone();
            turned.1.reverse();
            let mut again = played(&turned);
            again.reverse();
            prop_assert_eq!(moved, again);
        }
    }
}
