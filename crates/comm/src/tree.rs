/// Radices of the sum tree over `n` leaves, bottom-up: the odd prime factors of `n` descending, then all its twos.
///
/// Read from the top, a sum over `n` ranks is first halved as often as possible, then split by odd primes ascending;
/// within a node the children are added from left to right. For a power of two this is the pairwise sum.
///
/// ```
/// assert_eq!(comm::tree_radices(8), [2, 2, 2]); // ((0+1)+(2+3)) + ((4+5)+(6+7))
/// assert_eq!(comm::tree_radices(6), [3, 2]);    // ((0+1)+2) + ((3+4)+5)
/// assert_eq!(comm::tree_radices(60), [5, 3, 2, 2]);
/// assert!(comm::tree_radices(1).is_empty());
/// ```
pub fn tree_radices(n: usize) -> Vec<usize> {
    let mut radices = spec::sum_tree::prime_factors(n);
    radices.reverse();
    radices
}

/// Whether `leaves` adjacent, aligned leaves of the tree over `n` form whole subtrees.
pub(crate) fn is_subtree(n: usize, leaves: usize) -> bool {
    let mut size = 1;
    for radix in tree_radices(n) {
        if size >= leaves {
            break;
        }
        size *= radix;
    }
    size == leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn radices_multiply_to_n() {
        for n in 1..=1024 {
            let radices = tree_radices(n);
            assert_eq!(radices.iter().product::<usize>(), n);
            assert!(radices.iter().all(|r| (2..*r).all(|d| r % d != 0)), "{radices:?}");
            assert!(radices.windows(2).all(|w| w[0] >= w[1]), "{radices:?}");
        }
    }

    #[test]
    fn subtrees() {
        assert!(is_subtree(8, 1) && is_subtree(8, 2) && is_subtree(8, 4) && is_subtree(8, 8));
        assert!(is_subtree(6, 3) && !is_subtree(6, 2) && is_subtree(12, 6) && !is_subtree(12, 4));
    }
}
