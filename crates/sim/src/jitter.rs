//! Kernels that do not take equally long every time, drawn from a seed.

use crate::clock::{Ticks, USUAL};
use crate::draw::Draw;

/// How a rank's kernels vary. Two ranks with draws of their own cannot be told to be alike: none of them is folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Jitter {
    /// From what is drawn.
    pub distribution: Distribution,
    /// Whose draws: of a seed, a step, an entry and a rank.
    pub seed: u64,
}

/// What each kernel's time is multiplied by, in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distribution {
    /// Lognormal of mean 1, with this standard deviation of the logarithm: clocks and memory that vary.
    Lognormal {
        /// Standard deviation of the logarithm.
        spread: u64,
    },
    /// One and more, by an exponential of this mean: something else takes the processor now and then.
    Exponential {
        /// Mean of what is added.
        spread: u64,
    },
    /// One, and rarely this much.
    Spike {
        /// How often.
        chance: u64,
        /// How many times as long.
        factor: u64,
    },
}

impl Jitter {
    /// How long the rank's `nth` kernel takes that usually takes `usual`.
    pub fn of(&self, nth: u64, usual: Ticks) -> Ticks {
        let part = |millionths: u64| millionths as f64 / USUAL as f64;
        let mut draw = Draw::new(self.seed, nth);
        let factor = match self.distribution {
            Distribution::Lognormal { spread } => {
                let s = part(spread);
                (s * draw.normal() - s * s / 2.0).exp()
            }
            Distribution::Exponential { spread } => 1.0 + part(spread) * draw.exponential(),
            Distribution::Spike { chance, factor } => {
                if draw.uniform() <= part(chance) {
                    part(factor)
                } else {
                    1.0
                }
            }
        };
        (usual as f64 * factor).round() as Ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and standard deviation of what kernels take are those of the distribution.
    #[test]
    fn draws_have_their_distributions_moments() {
        let check = |distribution, mean: f64, deviation: f64| {
            let n = 40_000;
            let jitter = Jitter { distribution, seed: 7 };
            let took: Vec<f64> = (0..n).map(|i| jitter.of(i, 1_000_000_000) as f64 / 1e9).collect();
            let m = took.iter().sum::<f64>() / n as f64;
            let d = (took.iter().map(|t| (t - m).powi(2)).sum::<f64>() / n as f64).sqrt();
            assert!((m - mean).abs() < 4.0 * deviation / (n as f64).sqrt(), "{distribution:?}: mean {m}");
            assert!((d / deviation - 1.0).abs() < 0.05, "{distribution:?}: deviation {d}");
        };
        check(Distribution::Lognormal { spread: 100_000 }, 1.0, (0.01f64.exp() - 1.0).sqrt());
        check(Distribution::Exponential { spread: 50_000 }, 1.05, 0.05);
        // One in a hundred takes eleven times as long.
        let spike = Distribution::Spike { chance: 10_000, factor: 11_000_000 };
        check(spike, 1.1, 10.0 * (0.01f64 * 0.99).sqrt());
    }
}
