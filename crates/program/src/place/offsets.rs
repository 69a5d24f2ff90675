/// Offsets are multiples of this many bytes: a cache line, and one AVX-512 vector.
pub const ALIGN: usize = 64;

/// A buffer that needs bytes from one op to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    pub(crate) bytes: usize,
    /// First op that writes it.
    pub(crate) birth: usize,
    /// Last op that uses it.
    pub(crate) death: usize,
}

pub(crate) fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGN)
}

/// Gives every buffer an offset so that those alive at the same time never overlap; returns offsets and total bytes.
///
/// Largest first, each into the lowest gap among those that it meets: for a stack-like forward and backward pass
/// this is close to the lower bound, the largest sum of bytes alive at once ([`alive_peak`]).
pub(crate) fn place(needs: &[Need]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..needs.len()).filter(|&i| needs[i].bytes > 0).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(needs[i].bytes), needs[i].birth, i));
    let offsets = if needs.len() > FEW { place_many(needs, &order) } else { place_few(needs, &order) };
    let total = order.iter().map(|&i| offsets[i] + aligned(needs[i].bytes)).max();
    (offsets, total.unwrap_or(0))
}

/// Up to so many buffers a search of all is faster than a tree.
const FEW: usize = 512;

/// Finds what a buffer meets by looking at all that were placed before it.
fn place_few(needs: &[Need], order: &[usize]) -> Vec<usize> {
    let mut offsets = vec![0; needs.len()];
    let mut met: Vec<(usize, usize)> = Vec::new();
    for (n, &i) in order.iter().enumerate() {
        let of = &needs[i];
        let meets = |j: &&usize| needs[**j].birth <= of.death && of.birth <= needs[**j].death;
        let run = |&j: &usize| (offsets[j], offsets[j] + aligned(needs[j].bytes));
        met.clear();
        met.extend(order[..n].iter().filter(meets).map(run));
        met.sort_unstable();
        let need = aligned(of.bytes);
        let mut at = 0;
        for &(start, end) in &met {
            if start >= at + need {
                break;
            }
            at = at.max(end);
        }
        offsets[i] = at;
    }
    offsets
}

/// Finds what a buffer meets in a tree over time.
fn place_many(needs: &[Need], order: &[usize]) -> Vec<usize> {
    let mut taken = TakenOverTime::new(needs);
    let mut offsets = vec![0; needs.len()];
    order.iter().for_each(|&i| offsets[i] = taken.fit(&needs[i]));
    offsets
}

/// Bytes that are taken, as runs in order that do not touch.
#[derive(Clone, Default)]
struct Taken(Vec<(usize, usize)>);

impl Taken {
    fn add(&mut self, mut start: usize, mut end: usize) {
        let runs = &mut self.0;
        let first = runs.partition_point(|r| r.1 < start);
        let behind = runs.partition_point(|r| r.0 <= end);
        if first < behind {
            start = start.min(runs[first].0);
            end = end.max(runs[behind - 1].1);
        }
        runs.splice(first..behind, [(start, end)]);
    }

    /// Where the run ends that takes one of `need` bytes from `at` on.
    fn in_the_way(&self, at: usize, need: usize) -> Option<usize> {
        let next = self.0.partition_point(|r| r.1 <= at);
        self.0.get(next).filter(|r| r.0 < at + need).map(|r| r.1)
    }
}

/// Which bytes are taken when: a segment tree over the times at which buffers are born, so that asking what one meets
/// and adding it take logarithmic time however many there are.
struct TakenOverTime {
    /// Births in order: two buffers meet at a birth, if at all.
    times: Vec<usize>,
    leaves: usize,
    nodes: Vec<TimeNode>,
}

/// A stretch of time.
#[derive(Clone, Default)]
struct TimeNode {
    /// By buffers that last for all of it, and not for all of the node above.
    throughout: Taken,
    /// By buffers that last for some of it.
    some_time: Taken,
}

impl TakenOverTime {
    fn new(needs: &[Need]) -> TakenOverTime {
        let mut times: Vec<usize> = needs.iter().map(|s| s.birth).collect();
        times.sort_unstable();
        times.dedup();
        let leaves = times.len().next_power_of_two();
        TakenOverTime { times, leaves, nodes: vec![TimeNode::default(); 2 * leaves] }
    }

    /// Takes the lowest bytes that are free while a buffer lives.
    fn fit(&mut self, of: &Need) -> usize {
        let first = self.times.partition_point(|t| *t < of.birth);
        let last = self.times.partition_point(|t| *t <= of.death) - 1;
        let need = aligned(of.bytes);
        let mut met = Vec::new();
        self.met(1, (0, self.leaves - 1), (first, last), &mut met);
        let mut at = 0;
        while let Some(end) = met.iter().filter_map(|t| t.in_the_way(at, need)).max() {
            at = end;
        }
        self.add(1, (0, self.leaves - 1), (first, last), (at, at + need));
        at
    }

    fn met<'a>(&'a self, node: usize, of: (usize, usize), asked: (usize, usize), out: &mut Vec<&'a Taken>) {
        if asked.1 < of.0 || of.1 < asked.0 {
            return;
        }
        if asked.0 <= of.0 && of.1 <= asked.1 {
            out.push(&self.nodes[node].some_time);
            return;
        }
        out.push(&self.nodes[node].throughout);
        let middle = of.0.midpoint(of.1);
        self.met(2 * node, (of.0, middle), asked, out);
        self.met(2 * node + 1, (middle + 1, of.1), asked, out);
    }

    fn add(&mut self, node: usize, of: (usize, usize), alive: (usize, usize), bytes: (usize, usize)) {
        if alive.1 < of.0 || of.1 < alive.0 {
            return;
        }
        self.nodes[node].some_time.add(bytes.0, bytes.1);
        if alive.0 <= of.0 && of.1 <= alive.1 {
            self.nodes[node].throughout.add(bytes.0, bytes.1);
            return;
        }
        let middle = of.0.midpoint(of.1);
        self.add(2 * node, (of.0, middle), alive, bytes);
        self.add(2 * node + 1, (middle + 1, of.1), alive, bytes);
    }
}

/// The largest sum of bytes alive at one op: no placement can do with less.
pub(crate) fn alive_peak(needs: &[Need]) -> usize {
    let last = needs.iter().map(|s| s.death).max().unwrap_or(0);
    let mut delta = vec![0i64; last + 2];
    for s in needs {
        let bytes = i64::try_from(aligned(s.bytes)).expect("buffers are smaller than 2^63 bytes");
        delta[s.birth] += bytes;
        delta[s.death + 1] -= bytes;
    }
    let mut alive = 0;
    let peak = delta.into_iter().map(|d| {
        alive += d;
        alive
    });
    usize::try_from(peak.max().unwrap_or(0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reuses_the_bytes_of_the_dead() {
        let needs = [
            Need { bytes: 128, birth: 0, death: 1 },
            Need { bytes: 64, birth: 1, death: 3 },
            Need { bytes: 128, birth: 2, death: 3 },
        ];
        let (offsets, total) = place(&needs);
        assert_eq!((offsets, total), (vec![0, 128, 0], 192));
        assert_eq!(alive_peak(&needs), 192);
    }

    proptest! {
        #[test]
        fn the_tree_finds_what_a_search_of_all_finds(raw in prop::collection::vec((0usize..900, 0usize..60, 0usize..60), 1..120)) {
            let needs: Vec<Need> =
                raw.iter().map(|&(bytes, a, b)| Need { bytes, birth: a.min(b), death: a.max(b) }).collect();
            let mut order: Vec<usize> = (0..needs.len()).filter(|&i| needs[i].bytes > 0).collect();
            order.sort_by_key(|&i| (std::cmp::Reverse(needs[i].bytes), i));
            prop_assert_eq!(place_many(&needs, &order), place_few(&needs, &order));
        }

        #[test]
        fn never_overlaps_and_never_beats_the_bound(raw in prop::collection::vec((1usize..5000, 0usize..40, 0usize..40), 1..60)) {
            let needs: Vec<Need> = raw
                .iter()
                .map(|&(bytes, a, b)| Need { bytes, birth: a.min(b), death: a.max(b) })
                .collect();
            let (offsets, total) = place(&needs);
            prop_assert!(total >= alive_peak(&needs));
            for i in 0..needs.len() {
                prop_assert!(offsets[i] % ALIGN == 0 && offsets[i] + needs[i].bytes <= total);
                for j in 0..i {
                    let together = needs[i].birth <= needs[j].death && needs[j].birth <= needs[i].death;
                    let apart = offsets[i] + needs[i].bytes <= offsets[j] || offsets[j] + needs[j].bytes <= offsets[i];
                    prop_assert!(!together || apart, "{:?} and {:?} share bytes", needs[i], needs[j]);
                }
            }
        }
    }
}
