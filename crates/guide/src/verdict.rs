//! From two figures to a verdict.

use serde::Serialize;
use spec::Measure;

/// What a claim states, in the unit of the figure that it is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stated {
    /// A value as printed on a data sheet: agrees within [`EXACT`].
    Exactly(f64),
    /// A value with "about": agrees within [`ABOUT`].
    About(f64),
    /// A range: each end agrees within [`END`].
    Range(f64, f64),
    /// Something within a range: agrees if ours lies in it, its ends widened by [`END`].
    Within(f64, f64),
    /// So much or more.
    AtLeast(f64),
    /// The size alone: agrees within half an order of magnitude.
    Order(f64),
    /// A word; the comparison is made where the reading is.
    Word(&'static str),
}

/// Rounding on a data sheet.
pub const EXACT: f64 = 0.02;
/// What "about" leaves open.
pub const ABOUT: f64 = 0.1;
/// What the ends of a rough range leave open.
pub const END: f64 = 0.05;

/// Whether a figure agrees with what was stated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Agreement {
    /// It does not.
    No,
    /// The value does not, but the range of its sources reaches what was stated.
    InRange,
    /// It does.
    Yes,
}

impl Stated {
    /// Compares with a figure of ours.
    ///
    /// ```
    /// use guide::{Agreement, Stated};
    /// use spec::Measure;
    /// let ours = Measure { value: 12_500.0, low: 10_000.0, high: 15_000.0 };
    /// assert_eq!(Stated::About(13_000.0).against(ours), Agreement::Yes);
    /// assert_eq!(Stated::About(10_000.0).against(ours), Agreement::InRange);
    /// assert_eq!(Stated::About(30_000.0).against(ours), Agreement::No);
    /// ```
    pub fn against(self, ours: Measure) -> Agreement {
        let near = |stated: f64, ours: f64, by: f64| (ours - stated).abs() <= by * stated.abs();
        let point = |stated: f64, by: f64| {
            if near(stated, ours.value, by) {
                Agreement::Yes
            } else if ours.low <= stated && stated <= ours.high {
                Agreement::InRange
            } else {
                Agreement::No
            }
        };
        let says = |yes: bool| if yes { Agreement::Yes } else { Agreement::No };
        match self {
            Stated::Exactly(x) => point(x, EXACT),
            Stated::About(x) => point(x, ABOUT),
            Stated::Range(low, high) => says(near(low, ours.low, END) && near(high, ours.high, END)),
            Stated::Within(low, high) => {
                let inside = |x: f64| x >= low * (1.0 - END) && x <= high * (1.0 + END);
                match inside(ours.value) {
                    true => Agreement::Yes,
                    false if ours.low <= high && ours.high >= low => Agreement::InRange,
                    false => Agreement::No,
                }
            }
            Stated::AtLeast(x) if ours.value >= x * (1.0 - EXACT) => Agreement::Yes,
            Stated::AtLeast(x) => {
                says(false).max(if ours.high >= x { Agreement::InRange } else { Agreement::No })
            }
            Stated::Order(x) => {
                let half = 10f64.sqrt();
                says(x > 0.0 && (x / half..=x * half).contains(&ours.value))
            }
            Stated::Word(_) => Agreement::No,
        }
    }
}

/// How a claim compares with what we find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The guide gives no figure; ours is given.
    NoFigure,
    /// It agrees.
    Confirmed,
    /// Nobody who knows has said.
    Unconfirmed,
    /// True of one reading and not of another.
    Ambiguous,
    /// It was true once.
    Stale,
    /// It is contradicted.
    Wrong,
}

impl Verdict {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::NoFigure => "no figure",
            Verdict::Confirmed => "confirmed",
            Verdict::Unconfirmed => "unconfirmed",
            Verdict::Ambiguous => "ambiguous",
            Verdict::Stale => "stale",
            Verdict::Wrong => "wrong",
        }
    }
}

/// How the readings of one part of a claim decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// One reading that agrees makes the claim true in that reading.
    Readings,
    /// The claim is meant to hold of all of them.
    Everywhere,
    /// Who knows has not said; the readings show what follows if it is so.
    Undisclosed,
    /// There is nothing to compare with.
    NothingStated,
}

/// The verdict of one part from its readings: whether each agrees, and whether it is of today.
pub(crate) fn of_readings(rule: Rule, readings: &[(Agreement, bool)]) -> Verdict {
    match rule {
        Rule::Undisclosed => return Verdict::Unconfirmed,
        Rule::NothingStated => return Verdict::NoFigure,
        _ if readings.is_empty() => return Verdict::Unconfirmed,
        _ => {}
    }
    let now = || readings.iter().filter(|r| r.1).map(|r| r.0);
    let was = readings.iter().any(|r| !r.1 && r.0 == Agreement::Yes);
    let yes = now().any(|a| a == Agreement::Yes);
    let no = now().any(|a| a == Agreement::No);
    let in_range = now().any(|a| a == Agreement::InRange);
    match (yes, no) {
        (true, false) if !in_range => Verdict::Confirmed,
        (true, true) if rule == Rule::Everywhere => Verdict::Wrong,
        (false, _) if was => Verdict::Stale,
        (false, true) if !in_range => Verdict::Wrong,
        _ => Verdict::Ambiguous,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Agreement::{InRange, No, Yes};
    use proptest::prelude::*;

    fn check(rule: Rule, readings: &[(Agreement, bool)], expected: Verdict) {
        assert_eq!(of_readings(rule, readings), expected, "{rule:?} {readings:?}");
    }

    #[test]
    fn verdicts_follow_from_readings() {
        let (now, then) = (true, false);
        check(Rule::Readings, &[(Yes, now)], Verdict::Confirmed);
        check(Rule::Readings, &[(Yes, now), (Yes, then)], Verdict::Confirmed);
        check(Rule::Readings, &[(No, now)], Verdict::Wrong);
        check(Rule::Readings, &[(InRange, now)], Verdict::Ambiguous);
        check(Rule::Readings, &[(Yes, now), (No, now)], Verdict::Ambiguous);
        check(Rule::Readings, &[(No, now), (Yes, then)], Verdict::Stale);
        check(Rule::Readings, &[(No, now), (No, then)], Verdict::Wrong);
        check(Rule::Readings, &[], Verdict::Unconfirmed);
        check(Rule::Everywhere, &[(Yes, now), (No, now)], Verdict::Wrong);
        check(Rule::Everywhere, &[(Yes, now), (Yes, now)], Verdict::Confirmed);
        check(Rule::Undisclosed, &[(Yes, now)], Verdict::Unconfirmed);
        check(Rule::NothingStated, &[], Verdict::NoFigure);
    }

    #[test]
    fn figures_agree_within_the_tolerance_of_how_they_were_stated() {
        let check = |stated: Stated, ours: f64, expected: Agreement| {
            assert_eq!(stated.against(Measure::exact(ours)), expected, "{stated:?} against {ours}");
        };
        check(Stated::Exactly(989.0), 989.4, Yes);
        check(Stated::Exactly(989.0), 1979.0, No);
        check(Stated::About(130.0), 1620.4, No);
        check(Stated::About(98.0), 98.32, Yes);
        check(Stated::Within(1.0, 10.0), 5.5, Yes);
        check(Stated::Within(1.0, 10.0), 0.5, No);
        check(Stated::AtLeast(100e3), 150e3, Yes);
        check(Stated::AtLeast(1e9), 170e6, No);
        check(Stated::Order(1e18), 7.8e18, No);
        check(Stated::Order(1e18), 2e18, Yes);
        check(Stated::Word("on the die"), 1.0, No);
        let range =
            |low: f64, high: f64| Stated::Range(32.0, 512.0).against(Measure { value: low, low, high });
        assert_eq!((range(31.0, 512.0), range(31.0, 2048.0)), (Yes, No));
    }

    proptest! {
        /// Whatever is stated is true of itself, and being twice as far off is never better.
        #[test]
        fn nearer_is_never_worse(x in 1e-3f64..1e12, off in 0f64..4.0) {
            for stated in [Stated::Exactly(x), Stated::About(x), Stated::Within(x, x), Stated::Order(x)] {
                prop_assert_eq!(stated.against(Measure::exact(x)), Yes);
                let near = stated.against(Measure::exact(x * (1.0 + off)));
                let far = stated.against(Measure::exact(x * (1.0 + 2.0 * off)));
                prop_assert!(far <= near);
            }
        }
    }
}
