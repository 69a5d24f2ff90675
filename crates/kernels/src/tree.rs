//! The fixed order in which gradients of leaves are added.

/// The most levels a tree of leaves can have: radices of at least 2 whose product fits in a `usize`.
pub(crate) const MAX_DEPTH: usize = 64;

/// How a result `r` goes into a gradient that is kept at several levels, each a partial sum of a tree:
/// for `l` in `0..merge` `r = level[l] + r`, and then `level[store] = r`.
///
/// `store` may be `merge - 1` (fold into the same level) or any other level. The buffer that holds the levels is
/// `[levels, len]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// The number of levels added before the store.
    pub merge: usize,
    /// The level written.
    pub store: usize,
}

impl Merge {
    /// The number of levels that are read or written.
    pub(crate) fn levels(self) -> usize {
        self.merge.max(self.store + 1)
    }
}

/// What to do with the sum of one leaf: a step of a mixed-radix counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The tree is not complete: merge and store in the tree's own levels.
    Keep(Merge),
    /// The last leaf: after `merge` levels the result is the root.
    Root {
        /// Levels of the tree to add first.
        merge: usize,
    },
}

/// The levels a tree needs: its radices above 1.
pub(crate) fn depth(tree: &[u32]) -> usize {
    tree.iter().filter(|&&radix| radix > 1).count()
}

/// The number of leaves: the product of the radices.
pub(crate) fn leaves(tree: &[u32]) -> usize {
    tree.iter().map(|&radix| radix as usize).product()
}

/// Asserts that `n` rows fall into the leaves of `tree`, and gives (leaves, rows of a leaf).
pub(crate) fn split(n: usize, tree: &[u32]) -> (usize, usize) {
    let leaves = leaves(tree);
    assert!(leaves > 0 && n.is_multiple_of(leaves), "{n} rows do not fall into {leaves} leaves");
    assert!(depth(tree) <= MAX_DEPTH);
    (leaves, n / leaves)
}

/// The step of leaf `leaf`. Radices count bottom-up; the children of a node are folded left to right.
pub fn step(tree: &[u32], leaf: usize) -> Step {
    let mut rest = leaf;
    let mut level = 0;
    for radix in tree.iter().map(|&radix| radix as usize).filter(|&radix| radix > 1) {
        let digit = rest % radix;
        rest /= radix;
        if digit == 0 {
            return Step::Keep(Merge { merge: level, store: level });
        }
        if digit + 1 < radix {
            return Step::Keep(Merge { merge: level + 1, store: level });
        }
        level += 1;
    }
    Step::Root { merge: level }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree's formula, written out by running the counter on names.
    fn check(tree: &[u32], expected: &str) {
        let mut levels = vec![String::new(); depth(tree)];
        let fold = |levels: &[String], merge: usize, leaf: usize| {
            let name = char::from(b'a' + leaf as u8).to_string();
            levels[..merge].iter().fold(name, |r, level| format!("({level}+{r})"))
        };
        for leaf in 0..leaves(tree) {
            match step(tree, leaf) {
                Step::Keep(m) => levels[m.store] = fold(&levels, m.merge, leaf),
                Step::Root { merge } => {
                    assert_eq!(leaf + 1, leaves(tree));
                    assert_eq!(fold(&levels, merge, leaf), expected);
                }
            }
        }
    }

    fn check_steps(tree: &[u32], expected: &[(usize, Option<usize>)]) {
        let arrival = |leaf| match step(tree, leaf) {
            Step::Keep(m) => (m.merge, Some(m.store)),
            Step::Root { merge } => (merge, None),
        };
        assert_eq!((0..leaves(tree)).map(arrival).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn leaves_arrive_at_the_levels_that_wait_for_them() {
        check_steps(&[], &[(0, None)]);
        check_steps(&[2], &[(0, Some(0)), (1, None)]);
        check_steps(&[3], &[(0, Some(0)), (1, Some(0)), (1, None)]);
        check_steps(&[2, 2], &[(0, Some(0)), (1, Some(1)), (0, Some(0)), (2, None)]);
    }

    #[test]
    fn trees() {
        check(&[], "a");
        check(&[1, 1], "a");
        check(&[2], "(a+b)");
        check(&[2, 2], "((a+b)+(c+d))");
        check(&[3], "((a+b)+c)");
        check(&[2, 1, 3], "(((a+b)+(c+d))+(e+f))");
        check(&[3, 2], "(((a+b)+c)+((d+e)+f))");
        check(&[2, 2, 2], "(((a+b)+(c+d))+((e+f)+(g+h)))");
    }
}
