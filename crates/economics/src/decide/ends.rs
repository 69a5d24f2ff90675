//! Ranges of what follows from assumptions: each errs by itself, so what they move adds up in squares.
//!
//! All assumptions at their cheaper ends at once would be a world that nobody expects: low prices of servers come with
//! low rents, and a dozen pieces of luck seldom meet. So the ends of a result are where independent errors leave it
//! nineteen times in twenty if the ends of the assumptions are such, and the world shown for an end is one in which all
//! assumptions lean towards it by the same share of their way.

use super::KEYS;
use super::assumptions::{Assumptions, Key};
use super::cash::Fixed;
use crate::Spread;

/// A result at the values, and with one assumption after the other at its ends.
pub(super) struct Swings {
    value: f64,
    by_key: Vec<Swing>,
}

struct Swing {
    key: Key,
    ends: [f64; 2],
    /// The result at them.
    results: [f64; 2],
}

/// Which end of a result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Toward {
    Less,
    More,
}

/// Halvings of the way to an end: finer than a cent of any sum here.
const HALVINGS: usize = 50;

impl Swings {
    pub(super) fn of(all: &Assumptions, result: impl Fn(&Fixed) -> f64) -> Self {
        let at = Fixed::of(all);
        let ranged = KEYS.iter().map(|k| (k.0, all.number(k.0))).filter(|(_, s)| s.low < s.high);
        let swing = |(key, s): (Key, Spread)| {
            let ends = [s.low, s.high];
            Swing { key, ends, results: ends.map(|end| result(&at.with(key, end))) }
        };
        Swings { value: result(&at), by_key: ranged.map(swing).collect() }
    }

    /// The result with its range: by factors where it stays above zero, which then its low end does too.
    pub(super) fn range(&self) -> Spread {
        let all = || self.by_key.iter().flat_map(|s| s.results);
        if !self.value.is_finite() {
            return Spread::new(all().fold(self.value, f64::min), self.value, self.value);
        }
        let far = |toward: Toward, far: &dyn Fn(f64) -> f64| -> f64 {
            let each = self.by_key.iter().map(|s| far(s.end(toward, self.value).1));
            each.map(|d| d * d).sum::<f64>().sqrt()
        };
        if self.value > 0.0 && all().all(|x| x > 0.0) {
            let log = |x: f64| (x / self.value).ln();
            let (down, up) = (far(Toward::Less, &log), far(Toward::More, &log));
            return Spread::new(self.value * (-down).exp(), self.value, self.value * up.exp());
        }
        let off = |x: f64| x - self.value;
        let (down, up) = (far(Toward::Less, &off), far(Toward::More, &off));
        Spread::new(self.value - down, self.value, self.value + up)
    }

    /// The world in which `result` is `target`: all assumptions lean by the same share of their way to the end that moves
    /// it there, and no further than to it.
    pub(super) fn world(
        &self,
        all: &Assumptions,
        toward: Toward,
        target: f64,
        result: impl Fn(&Fixed) -> f64,
    ) -> Fixed {
        let at = Fixed::of(all);
        let leaning = |share: f64| {
            self.by_key.iter().fold(at.clone(), |world, s| {
                let value = all.number(s.key).value;
                let (end, _) = s.end(toward, self.value);
                world.with(s.key, value + share * (end.unwrap_or(value) - value))
            })
        };
        let short = |share: f64| match toward {
            Toward::Less => result(&leaning(share)) > target,
            Toward::More => result(&leaning(share)) < target,
        };
        if short(1.0) {
            return leaning(1.0);
        }
        let (mut from, mut to) = (0.0, 1.0);
        for _ in 0..HALVINGS {
            let middle = (from + to) / 2.0;
            if short(middle) { from = middle } else { to = middle }
        }
        leaning(to)
    }
}

impl Swing {
    /// The end that moves the result there, and the result at it; neither end where none does.
    fn end(&self, toward: Toward, value: f64) -> (Option<f64>, f64) {
        let [a, b] = self.results;
        let (i, moved) = match toward {
            Toward::Less => (usize::from(b < a), a.min(b) < value),
            Toward::More => (usize::from(b > a), a.max(b) > value),
        };
        if moved { (Some(self.ends[i]), self.results[i]) } else { (None, value) }
    }
}
