//! The fixed order in which the gradients of the sequences of a global batch are summed.
//!
//! Floating-point sums depend on their order, so the order is part of what a run is: a tree over the index of the
//! sequence, the same for every layout. A rank or a micro-batch that holds a whole subtree can sum it alone, and
//! partial sums then meet further up, which gives the same bits as one rank that sums everything.

/// A sum tree over `n` leaves: the children of a node are added from left to right.
///
/// From the root down, the number of children is 2 for each factor 2 of `n`, then the odd prime factors of `n` in
/// ascending order. Factors of 2 come first so that power-of-two degrees of data parallelism split at the root.
///
/// ```
/// use spec::SumTree;
/// let tree = SumTree::new(24);
/// assert_eq!(tree.radices(), [3, 2, 2, 2]); // bottom-up: ((0+1+2) + (3+4+5)) + ...
/// assert!(tree.splits(4)); // four ranks hold six leaves each, a whole subtree
/// assert!(!tree.splits(3));
/// assert_eq!(tree.inner(6), Some(vec![3, 2]));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumTree {
    leaves: usize,
    bottom_up: Vec<u32>,
}

impl SumTree {
    /// The tree over `n` leaves; 0 is read as 1.
    pub fn new(n: usize) -> Self {
        let leaves = n.max(1);
        // A sum over 2^32 siblings is out of reach.
        let radix = |factor| u32::try_from(factor).unwrap_or(u32::MAX);
        SumTree { leaves, bottom_up: prime_factors(leaves).into_iter().rev().map(radix).collect() }
    }

    /// Number of leaves.
    pub fn leaves(&self) -> usize {
        self.leaves
    }

    /// Children per node from the leaves up to the root.
    pub fn radices(&self) -> &[u32] {
        &self.bottom_up
    }

    /// Whether `parts` equal runs of leaves are each a whole subtree: `parts` is a product of the topmost radices.
    pub fn splits(&self, parts: usize) -> bool {
        self.cut(parts).is_some()
    }

    /// Every number of parts that splits the tree, ascending: 1, ..., n.
    pub fn all_splits(&self) -> Vec<usize> {
        let mut parts = vec![1];
        let mut product = 1;
        for &radix in self.bottom_up.iter().rev() {
            product *= radix as usize;
            parts.push(product);
        }
        parts
    }

    /// Radices, bottom-up, of a subtree of `m` leaves; `None` if no subtree has `m`.
    pub fn inner(&self, m: usize) -> Option<Vec<u32>> {
        let cut = self.cut(self.parts_of(m)?)?;
        Some(self.bottom_up[..cut].to_vec())
    }

    /// Radices, bottom-up, of the tree whose leaves are subtrees of `m` leaves; `None` if no subtree has `m`.
    pub fn outer(&self, m: usize) -> Option<Vec<u32>> {
        let cut = self.cut(self.parts_of(m)?)?;
        Some(self.bottom_up[cut..].to_vec())
    }

    fn parts_of(&self, m: usize) -> Option<usize> {
        (m > 0 && self.leaves.is_multiple_of(m)).then(|| self.leaves / m)
    }

    /// The height at which the tree has `parts` nodes.
    fn cut(&self, parts: usize) -> Option<usize> {
        let mut product = 1;
        for height in (0..=self.bottom_up.len()).rev() {
            if product == parts {
                return Some(height);
            }
            product *= height.checked_sub(1).map_or(1, |h| self.bottom_up[h] as usize);
        }
        None
    }
}

/// The prime factors of `n`, ascending, each as often as it divides; none of 0 and 1.
///
/// ```
/// assert_eq!(spec::sum_tree::prime_factors(360), [2, 2, 2, 3, 3, 5]);
/// assert_eq!(spec::sum_tree::prime_factors(97 * 97), [97, 97]);
/// ```
pub fn prime_factors(n: usize) -> Vec<usize> {
    let (mut rest, mut factor, mut factors) = (n, 2, Vec::new());
    while factor * factor <= rest {
        if rest.is_multiple_of(factor) {
            factors.push(factor);
            rest /= factor;
        } else {
            factor += 1;
        }
    }
    factors.extend((rest > 1).then_some(rest));
    factors
}

/// What to do with the `index`-th partial sum of a tree with these radices (bottom-up), arriving in order:
/// `(merge, store)`.
///
/// The lowest `merge` levels are added to it, lowest first and each on the left, and the sum goes to level `store`.
/// The levels are a counter in mixed radix: level `i` holds the sum of the finished children of the open node at
/// height `i`. After the last index the total is stored at level `levels(outer) - 1`.
///
/// ```
/// use spec::sum_tree::{SumTree, merge_at};
/// let tree = SumTree::new(4); // (0 + 1) + (2 + 3)
/// let steps: Vec<_> = (0..4).map(|i| merge_at(tree.radices(), i)).collect();
/// assert_eq!(steps, [(0, 0), (1, 1), (0, 0), (2, 1)]);
/// ```
pub fn merge_at(outer: &[u32], index: usize) -> (usize, usize) {
    let mut rest = index;
    for (height, &radix) in outer.iter().enumerate() {
        let radix = radix.max(1) as usize;
        let digit = rest % radix;
        if digit + 1 < radix {
            return (height + usize::from(digit > 0), height);
        }
        rest /= radix;
    }
    (outer.len(), outer.len().saturating_sub(1))
}

/// How many partial sums are held at most: one for each height, at least one.
pub fn levels(outer: &[u32]) -> usize {
    outer.len().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The expression by direct recursion from the root, as text: equal text is equal rounding.
    fn recursion(top_down: &[u32], first: usize, leaves: &[String]) -> String {
        let Some((&radix, below)) = top_down.split_first() else { return leaves[first].clone() };
        let width: usize = below.iter().map(|&r| r as usize).product();
        (0..radix as usize)
            .map(|child| recursion(below, first + child * width, leaves))
            .reduce(|sum, next| format!("({sum}+{next})"))
            .unwrap_or_default()
    }

    fn counter(outer: &[u32], leaves: &[String]) -> String {
        let mut level = vec![String::new(); levels(outer)];
        for (index, leaf) in leaves.iter().enumerate() {
            let (merge, store) = merge_at(outer, index);
            let mut sum = leaf.clone();
            for held in &level[..merge] {
                sum = format!("({held}+{sum})");
            }
            level[store] = sum;
        }
        level.pop().unwrap_or_default()
    }

    fn names(n: usize) -> Vec<String> {
        (0..n).map(|i| i.to_string()).collect()
    }

    fn whole(tree: &SumTree) -> String {
        let top_down: Vec<u32> = tree.radices().iter().rev().copied().collect();
        recursion(&top_down, 0, &names(tree.leaves()))
    }

    #[test]
    fn radices() {
        for (n, expected) in [
            (0, &[][..]),
            (1, &[]),
            (2, &[2]),
            (6, &[3, 2]),
            (8, &[2, 2, 2]),
            (30, &[5, 3, 2]),
            (45, &[5, 3, 3]),
            (7, &[7]),
            (2 * 65_521, &[65_521, 2]),
        ] {
            assert_eq!(SumTree::new(n).radices(), expected, "{n}");
        }
    }

    #[test]
    fn splits_are_prefixes_from_the_root() {
        let tree = SumTree::new(60); // top-down 2 2 3 5
        assert_eq!(tree.all_splits(), [1, 2, 4, 12, 60]);
        let split: Vec<usize> = (0..=61).filter(|&p| tree.splits(p)).collect();
        assert_eq!(split, tree.all_splits());
        assert_eq!(
            (tree.inner(5), tree.inner(1), tree.inner(60)),
            (Some(vec![5]), Some(vec![]), Some(vec![5, 3, 2, 2]))
        );
        assert_eq!((tree.inner(0), tree.inner(2), tree.inner(10)), (None, None, None));
        assert_eq!(tree.outer(15), Some(vec![2, 2]));
    }

    #[test]
    fn known_expressions() {
        assert_eq!(whole(&SumTree::new(6)), "(((0+1)+2)+((3+4)+5))");
        assert_eq!(whole(&SumTree::new(4)), "((0+1)+(2+3))");
        assert_eq!(counter(&[], &names(1)), "0");
    }

    proptest! {
        #[test]
        fn counter_is_recursion(n in 1usize..200) {
            let tree = SumTree::new(n);
            prop_assert_eq!(counter(tree.radices(), &names(n)), whole(&tree));
        }

        /// Ranks hold runs of leaves, each split into micro-batches: kernels sum inside a micro-batch, the counter
        /// sums a rank's micro-batches, the ranks' sums meet in the topmost levels.
        #[test]
        fn any_split_is_the_same_expression(twos in 0u32..5, odd in prop::sample::select(vec![1usize, 3, 5, 9, 15, 7]),
                                            rank_pick in 0usize..8, micro_pick in 0usize..8) {
            let n = (1 << twos) * odd;
            let tree = SumTree::new(n);
            let splits = tree.all_splits();
            let ranks = splits[rank_pick % splits.len()];
            let finer: Vec<usize> = splits.iter().copied().filter(|parts| parts % ranks == 0).collect();
            let micro_batch = n / finer[micro_pick % finer.len()];
            let per_rank = n / ranks;
            let inner = tree.inner(micro_batch).expect("a whole subtree");
            let middle = SumTree::new(n).inner(per_rank).expect("a whole subtree")[inner.len()..].to_vec();
            let outer = tree.outer(per_rank).expect("a whole subtree");
            let leaves = names(n);
            let rank_sums: Vec<String> = leaves.chunks(per_rank).map(|share| {
                let parts: Vec<String> = share.chunks(micro_batch).map(|m| counter(&inner, m)).collect();
                counter(&middle, &parts)
            }).collect();
            prop_assert_eq!(counter(&outer, &rank_sums), whole(&tree));
        }

        /// From ZeRO 2 on the ranks reduce each micro-batch at once: together they hold a run of `ranks * micro_batch`
        /// leaves, whose sums the counter then adds.
        #[test]
        fn reducing_each_micro_batch_is_the_same_expression(twos in 0u32..5, odd in prop::sample::select(vec![1usize, 3, 5, 9, 15]),
                                                            rank_twos in 0u32..4, micro_batch in 1usize..30) {
            let n = (1 << twos) * odd;
            let tree = SumTree::new(n);
            let ranks = 1usize << rank_twos;
            let (Some(inner), Some(outer)) = (tree.inner(micro_batch), tree.outer(micro_batch * ranks)) else { return Ok(()) };
            let across = SumTree::new(ranks);
            let sums: Vec<String> = names(n).chunks(ranks * micro_batch).map(|together| {
                let of_ranks: Vec<String> = together.chunks(micro_batch).map(|m| counter(&inner, m)).collect();
                counter(across.radices(), &of_ranks)
            }).collect();
            prop_assert_eq!(counter(&outer, &sums), whole(&tree));
        }
    }
}
