//! Random numbers that a seed and a place decide: the same whoever asks first.

use spec::random::{GOLDEN, SplitMix, scatter};

/// Draws for one thing: a node, a run.
#[derive(Clone, Debug)]
pub(crate) struct Draw(SplitMix);

impl Draw {
    pub(crate) fn new(seed: u64, of: u64) -> Self {
        let of = scatter(of.wrapping_mul(GOLDEN).wrapping_add(1));
        Draw(SplitMix(scatter(seed.wrapping_add(GOLDEN)) ^ of))
    }

    /// Uniform in (0, 1].
    pub(crate) fn uniform(&mut self) -> f64 {
        ((self.0.draw() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Exponential of mean 1.
    pub(crate) fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }

    /// Normal of mean 0 and deviation 1 (Box and Muller 1958).
    pub(crate) fn normal(&mut self) -> f64 {
        let (a, b) = (self.uniform(), self.uniform());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
}
