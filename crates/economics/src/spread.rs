//! A value with the range that it may take.

use serde::{Deserialize, Serialize};
use spec::Measure;

/// A value and the range that its sources or its sample span: `low <= value <= high`.
///
/// Low and high are of the number, not of what is good.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// The lowest.
    pub low: f64,
    /// The value to compute with.
    pub value: f64,
    /// The highest.
    pub high: f64,
}

impl Spread {
    /// A value without a range.
    pub const fn exact(value: f64) -> Self {
        Spread { low: value, value, high: value }
    }

    /// A value with its range, in order whatever the order given.
    pub fn new(low: f64, value: f64, high: f64) -> Self {
        Spread { low: low.min(value), value, high: high.max(value) }
    }

    /// The same scaled by a factor from 0.
    #[must_use]
    pub fn scaled(self, by: f64) -> Self {
        Spread { low: self.low * by, value: self.value * by, high: self.high * by }
    }

    /// `f` of the value and of both ends, sorted: for functions that rise or fall all the way.
    #[must_use]
    pub fn map(self, f: impl Fn(f64) -> f64) -> Self {
        let (a, b) = (f(self.low), f(self.high));
        Spread::new(a.min(b), f(self.value), a.max(b))
    }

    /// `f` of the values and of ends that go together: low with low, high with high.
    #[must_use]
    pub fn with(self, other: Spread, f: impl Fn(f64, f64) -> f64) -> Self {
        let (a, b) = (f(self.low, other.low), f(self.high, other.high));
        Spread::new(a.min(b), f(self.value, other.value), a.max(b))
    }

    /// The product: ends go together.
    #[must_use]
    pub fn times(self, other: Spread) -> Self {
        self.with(other, |a, b| a * b)
    }

    /// The sum: ends go together.
    #[must_use]
    pub fn plus(self, other: Spread) -> Self {
        self.with(other, |a, b| a + b)
    }

    /// Whether `x` is in the range.
    pub fn holds(&self, x: f64) -> bool {
        (self.low..=self.high).contains(&x)
    }

    /// Low, value and high in turn.
    pub(crate) fn ends(self) -> [f64; 3] {
        [self.low, self.value, self.high]
    }
}

impl From<Measure> for Spread {
    fn from(m: Measure) -> Self {
        Spread { low: m.low, value: m.value, high: m.high }
    }
}

impl From<plan::storage::Seconds> for Spread {
    fn from(s: plan::storage::Seconds) -> Self {
        Spread { low: s.low, value: s.value, high: s.high }
    }
}
