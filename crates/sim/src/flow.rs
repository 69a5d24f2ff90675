//! Rates of flows that share links max-min fairly, by progressive filling (Bertsekas and Gallager 1992, section 6.5.2).
//!
//! Rates and capacities are whole bytes per second: sums of them do not depend on their order, so a network whose alike
//! flows are counted has the same rates as one where each stands alone.

/// What a flow needs.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    /// Links that it crosses, and how many flows of its kind cross each.
    pub uses: &'a [(usize, u64)],
    /// More than this it does not take, in bytes per second.
    pub limit: u64,
}

/// Rates of flows in bytes per second, max-min fair: a flow's rate rises until one of its links is full, and on that link
/// no flow has more.
///
/// The flows on each link together take at most its `capacity`, and less than one byte per second and flow is left on
/// every flow's fullest link.
///
/// Three flows on two links; the long one and one short share the narrow link, the other short takes what is left:
///
/// ```
/// use sim::flow::{Demand, max_min};
/// let paths: [&[(usize, u64)]; 3] = [&[(0, 1), (1, 1)], &[(0, 1)], &[(1, 1)]];
/// let demands = paths.map(|uses| Demand { uses, limit: u64::MAX });
/// assert_eq!(max_min(&[10, 30], &demands), [5, 5, 25]);
/// ```
pub fn max_min(capacity: &[u64], demands: &[Demand<'_>]) -> Vec<u64> {
    Filling::new(capacity, demands).fill()
}

struct Filling<'a> {
    demands: &'a [Demand<'a>],
    /// What is left of each link.
    left: Vec<u64>,
    /// Flows on each link that still rise.
    rising: Vec<u64>,
    on: Vec<Vec<usize>>,
    rate: Vec<Option<u64>>,
}

impl<'a> Filling<'a> {
    fn new(capacity: &[u64], demands: &'a [Demand<'a>]) -> Self {
        let mut rising = vec![0; capacity.len()];
        let mut on = vec![Vec::new(); capacity.len()];
        for (f, demand) in demands.iter().enumerate() {
            for &(link, count) in demand.uses {
                rising[link] += count;
                on[link].push(f);
            }
        }
        Filling { demands, left: capacity.to_vec(), rising, on, rate: vec![None; demands.len()] }
    }

    fn fill(mut self) -> Vec<u64> {
        let mut by_limit: Vec<usize> = (0..self.demands.len()).collect();
        by_limit.sort_by_key(|f| self.demands[*f].limit);
        let mut by_limit = by_limit.into_iter().peekable();
        loop {
            while by_limit.peek().is_some_and(|f| self.rate[*f].is_some()) {
                by_limit.next();
            }
            let Some(&lowest) = by_limit.peek() else { break };
            let limit = self.demands[lowest].limit;
            let share = |l: usize| self.left[l].checked_div(self.rising[l]);
            let level = (0..self.left.len()).filter_map(share).min().filter(|level| *level < limit);
            let Some(level) = level else {
                self.settle(lowest, limit);
                continue;
            };
            // All links that are full now, at once: which one came first must not matter.
            let full: Vec<usize> = (0..self.left.len()).filter(|l| share(*l) == Some(level)).collect();
            for link in full {
                for f in std::mem::take(&mut self.on[link]) {
                    self.settle(f, level);
                }
            }
        }
        self.rate.into_iter().map(|r| r.unwrap_or(0)).collect()
    }

    fn settle(&mut self, flow: usize, rate: u64) {
        if self.rate[flow].is_some() {
            return;
        }
        self.rate[flow] = Some(rate);
        for &(link, count) in self.demands[flow].uses {
            self.left[link] -= count.saturating_mul(rate).min(self.left[link]);
            self.rising[link] -= count;
        }
    }
}
