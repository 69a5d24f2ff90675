//! Random numbers that a seed and a place decide: the same whoever asks first.

use spec::random::{GOLDEN, scatter};

/// Draws for one thing: a node, a run.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    state: u64,
}

impl Draw {
    pub(crate) fn new(seed: u64, of: u64) -> Self {
        Draw { state: scatter(seed.wrapping_add(GOLDEN)) ^ scatter(of.wrapping_mul(GOLDEN).wrapping_add(1)) }
    }

    /// Uniform in (0, 1].
    pub(crate) fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(GOLDEN);
        ((scatter(self.state) >> 11) + 1) as f64 / (1u64 << 53) as f64
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
