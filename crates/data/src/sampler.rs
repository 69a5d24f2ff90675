use spec::{Error, Result};

use crate::random::torch_randperm;

/// The order of PyTorch's `DistributedSampler`: which items of a map-style dataset a replica sees in an epoch.
///
/// The whole order is padded with its own beginning (or cut, with `drop_last`) to a multiple of the replicas;
/// replica `r` takes every `replicas`-th item from `r` on.
///
/// ```
/// let sampler = data::DistributedSampler::new(10, 4, 1)?;
/// assert_eq!(sampler.indices(0), [1, 9, 2]);
/// # Ok::<(), spec::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DistributedSampler {
    items: u64,
    /// Items of the order that are shared out at a time.
    replicas: u64,
    /// Which of them are this replica's.
    own: Vec<u64>,
    shuffle: bool,
    seed: u64,
    drop_last: bool,
}

impl DistributedSampler {
    /// The sampler of `replica` among `replicas` over `items`, with PyTorch's defaults: shuffled, seed 0, padded.
    ///
    /// # Errors
    /// No items, no replicas, or `replica` not below `replicas`.
    pub fn new(items: u64, replicas: u64, replica: u64) -> Result<Self> {
        if items == 0 || replica >= replicas {
            return Err(Error::user(format!(
                "sampler over {items} items for replica {replica} of {replicas}: needs items >= 1 and replica < replicas"
            )));
        }
        Ok(DistributedSampler::of(items, replicas, vec![replica]))
    }

    fn of(items: u64, replicas: u64, own: Vec<u64>) -> Self {
        DistributedSampler { items, replicas, own, shuffle: true, seed: 0, drop_last: false }
    }

    /// The sampler of a replica that takes, of each `batch` of the order, the items at `positions`: what a step holds
    /// and where does then not depend on the number of replicas, and no bit of a run does.
    ///
    /// ```
    /// let (one, two) = (vec![0, 1, 2, 3], vec![2, 3]);
    /// let alone = data::DistributedSampler::of_batches(10, 4, one)?.indices(0);
    /// let second = data::DistributedSampler::of_batches(10, 4, two)?.indices(0);
    /// assert_eq!(second[..2], alone[2..4]);
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// No items, or a position that is not below `batch`.
    pub fn of_batches(items: u64, batch: u64, positions: Vec<u64>) -> Result<Self> {
        match positions.iter().find(|p| **p >= batch) {
            Some(p) => Err(Error::user(format!("position {p} of batches of {batch} items"))),
            None if items == 0 => Err(Error::user("a sampler over no items")),
            None => Ok(DistributedSampler::of(items, batch, positions)),
        }
    }

    /// Whether the order is a random permutation (seeded with seed + epoch) or the items' own.
    #[must_use]
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// The seed, the same on all replicas.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Cuts the tail that does not divide instead of padding.
    #[must_use]
    pub fn drop_last(mut self, drop_last: bool) -> Self {
        self.drop_last = drop_last;
        self
    }

    /// Items per replica and epoch.
    pub fn samples(&self) -> u64 {
        let rounds =
            if self.drop_last { self.items / self.replicas } else { self.items.div_ceil(self.replicas) };
        rounds * self.own.len() as u64
    }

    /// This replica's items of `epoch`, in order.
    pub fn indices(&self, epoch: u64) -> Vec<u64> {
        let order = self.shuffle.then(|| torch_randperm(self.items, self.seed.wrapping_add(epoch)));
        let own = self.own.len() as u64;
        (0..self.samples())
            .map(|k| {
                let round = k / own;
                let position = (self.own[(k % own) as usize] + round * self.replicas) % self.items;
                order.as_ref().map_or(position, |order| order[position as usize])
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(drop_last: bool, expected: &[&[u64]]) {
        for (replica, expected) in expected.iter().enumerate() {
            let sampler = DistributedSampler::new(10, 4, replica as u64).unwrap().drop_last(drop_last);
            assert_eq!(sampler.indices(0), *expected);
        }
    }

    #[test]
    fn golden_orders() {
        check(false, &[&[4, 3, 6], &[1, 9, 2], &[7, 0, 4], &[5, 8, 1]]);
        check(true, &[&[4, 3], &[1, 9], &[7, 0], &[5, 8]]);
    }

    #[test]
    fn padding_repeats_a_short_order() {
        // 2 items over 5 replicas: the order is tiled until everybody has one.
        let first: Vec<u64> =
            (0..5).map(|r| DistributedSampler::new(2, 5, r).unwrap().shuffle(false).indices(0)[0]).collect();
        assert_eq!(first, [0, 1, 0, 1, 0]);
    }

    proptest! {
        #[test]
        fn replicas_cover_the_order(items in 1u64..200, replicas in 1u64..9, epoch in 0u64..3, drop: bool) {
            let per_replica: Vec<Vec<u64>> = (0..replicas)
                .map(|r| DistributedSampler::new(items, replicas, r).unwrap().drop_last(drop).indices(epoch))
                .collect();
            let order = torch_randperm(items, epoch);
            for k in 0..per_replica[0].len() {
                for r in 0..replicas as usize {
                    prop_assert_eq!(per_replica[r][k], order[(k * replicas as usize + r) % items as usize]);
                }
            }
            prop_assert!(drop || per_replica[0].len() as u64 * replicas >= items);
        }
    }
}
