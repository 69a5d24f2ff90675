//! Money that adds up: whole cents, and sums of the parts that are shown.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Neg, Sub};

use serde::{Serialize, Serializer};

use crate::Spread;

/// US dollars in whole cents.
///
/// Serialises as a number of dollars with at most two decimals.
///
/// ```
/// use economics::Usd;
/// let parts = [Usd::dollars(0.1), Usd::dollars(0.2)];
/// assert_eq!(parts.into_iter().sum::<Usd>(), Usd::dollars(0.3));
/// assert_eq!(Usd::dollars(1_234_567.0).to_string(), "$1,234,567");
/// assert_eq!(Usd::dollars(-2.5).to_string(), "-$2.50");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Usd(i64);

const CENTS: f64 = 100.0;
/// From here on a bill is in whole dollars: nobody knows the cents of a cluster.
const WHOLE_FROM_DOLLARS: f64 = 10_000.0;

impl Usd {
    /// No money.
    pub const ZERO: Usd = Usd(0);

    /// The nearest cent. Beyond 9e16 dollars it stays there, and what is no number is none: inputs are held to sense
    /// before they get here.
    pub fn dollars(dollars: f64) -> Self {
        // A cast of a float saturates.
        Usd((dollars * CENTS).round() as i64)
    }

    /// The nearest dollar.
    pub(crate) fn whole(dollars: f64) -> Self {
        Usd((dollars.round() as i64).saturating_mul(CENTS as i64))
    }

    /// In dollars.
    pub fn to_dollars(self) -> f64 {
        self.0 as f64 / CENTS
    }

    /// In cents.
    pub fn to_cents(self) -> i64 {
        self.0
    }
}

impl Add for Usd {
    type Output = Usd;

    fn add(self, other: Usd) -> Usd {
        Usd(self.0.saturating_add(other.0))
    }
}

impl Sub for Usd {
    type Output = Usd;

    fn sub(self, other: Usd) -> Usd {
        Usd(self.0.saturating_sub(other.0))
    }
}

impl Neg for Usd {
    type Output = Usd;

    fn neg(self) -> Usd {
        Usd(self.0.saturating_neg())
    }
}

impl Sum for Usd {
    fn sum<I: Iterator<Item = Usd>>(all: I) -> Usd {
        all.fold(Usd::ZERO, Add::add)
    }
}

impl Serialize for Usd {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_f64(self.to_dollars())
    }
}

impl fmt::Display for Usd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dollars, cents) = (self.0.unsigned_abs() / 100, self.0.unsigned_abs() % 100);
        let digits = dollars.to_string();
        let mut text = String::from(if self.0 < 0 { "-$" } else { "$" });
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        if cents > 0 {
            text += &format!(".{cents:02}");
        }
        f.pad(&text)
    }
}

/// An amount with its range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// The cheaper end of its range.
    pub low: Usd,
    /// With the values to compute with.
    pub value: Usd,
    /// The dearer end of its range.
    pub high: Usd,
}

impl Add for Cost {
    type Output = Cost;

    fn add(self, other: Cost) -> Cost {
        Cost { low: self.low + other.low, value: self.value + other.value, high: self.high + other.high }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(all: I) -> Cost {
        all.fold(Cost::default(), Add::add)
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            return write!(f, "{}", self.value);
        }
        write!(f, "{} ({} to {})", self.value, self.low, self.high)
    }
}

/// One line of a bill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// What it is for.
    pub name: String,
    /// What it costs.
    #[serde(flatten)]
    pub cost: Cost,
}

/// Parts and their sum, exactly: each part is rounded, and the total is of the rounded parts.
///
/// ```
/// use economics::{Bill, Spread};
/// let third = Spread::exact(100_000.0 / 3.0);
/// let bill = Bill::of([("a", third), ("b", third), ("c", third)]);
/// assert_eq!(bill.total.value.to_string(), "$99,999");
/// assert_eq!(bill.total, bill.parts.iter().map(|p| p.cost).sum());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bill {
    /// The parts, in the order given.
    pub parts: Vec<Part>,
    /// Their sum.
    pub total: Cost,
}

impl Bill {
    /// A bill of amounts in dollars: in whole dollars from $10,000 in all, in cents below.
    pub fn of<S: Into<String>>(parts: impl IntoIterator<Item = (S, Spread)>) -> Self {
        let parts: Vec<(String, Spread)> = parts.into_iter().map(|(n, s)| (n.into(), s)).collect();
        let all: f64 = parts.iter().map(|(_, s)| s.value.abs()).sum();
        let round = if all >= WHOLE_FROM_DOLLARS { Usd::whole } else { Usd::dollars };
        let parts: Vec<Part> = parts
            .into_iter()
            .map(|(name, s)| Part {
                name,
                cost: Cost { low: round(s.low), value: round(s.value), high: round(s.high) },
            })
            .collect();
        let total = parts.iter().map(|p| p.cost).sum();
        Bill { parts, total }
    }

    /// The part of that name.
    pub fn part(&self, name: &str) -> Option<Cost> {
        self.parts.iter().find(|p| p.name == name).map(|p| p.cost)
    }
}
