//! Numbers that people give, held to sense once.

use spec::{Error, Result};

use crate::Spread;

/// More than there is of anything that is counted here: dollars, tokens, hours.
const NUMBER_MAX: f64 = 1e18;

/// What a number may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bounds {
    /// More than zero.
    Positive,
    /// Zero or more.
    FromZero,
    /// From 0 to 1.
    Share,
    /// From 1 on.
    FromOne,
    /// A change as a share: more than -1, which is all, up to a tenfold rise.
    Change,
}

/// `x`, if it is within its bounds.
///
/// # Errors
/// Names `what` and what was expected of it.
pub(crate) fn number(what: &str, x: f64, bounds: Bounds) -> Result<f64> {
    const USUAL: &str = "leave it out for what is usual";
    let (fine, expected, hint) = match bounds {
        Bounds::Positive => (x > 0.0, "more than 0", USUAL),
        Bounds::FromZero => (x >= 0.0, "0 or more", USUAL),
        Bounds::Share => ((0.0..=1.0).contains(&x), "from 0 to 1", "70 % is written 0.7"),
        Bounds::FromOne => (x >= 1.0, "1 or more", "1 is the least it can be"),
        Bounds::Change => {
            (x > -1.0 && x <= 10.0, "more than -1 and up to 10", "a fall by 10 % is written -0.1")
        }
    };
    if x.is_finite() && x.abs() > NUMBER_MAX {
        return Err(
            Error::user(format!("{what} = {x:e}, expected {expected}, up to {NUMBER_MAX:e}")).hint(hint)
        );
    }
    if !x.is_finite() || !fine {
        return Err(Error::user(format!("{what} = {x}, expected {expected}")).hint(hint));
    }
    Ok(x)
}

/// [`number`] of all three, in order.
///
/// # Errors
/// As [`number`], and if they are not in order.
pub(crate) fn spread(what: &str, s: Spread, bounds: Bounds) -> Result<Spread> {
    for (end, x) in ["low", "value", "high"].into_iter().zip(s.ends()) {
        number(&format!("{what}.{end}"), x, bounds)?;
    }
    if s.low > s.value || s.value > s.high {
        let what = format!("{what}: low {}, value {}, high {} are not in order", s.low, s.value, s.high);
        return Err(
            Error::user(what).hint("low is the least, high the most; leave both out if there is no range")
        );
    }
    Ok(s)
}
