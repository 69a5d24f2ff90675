//! Curves of any length in bounded memory: points are gathered into buckets of so many steps, and twice as many once
//! there are too many buckets. A bucket keeps least, most and mean, so that no spike is lost.

use serde::Serialize;

/// Buckets at most. A screen shows fewer; what is narrower is read from the file ([`crate::run::Run::zoom`]).
pub(crate) const BUCKETS_MAX: usize = 2048;

/// Least, most and mean of one quantity over a bucket; values that are not finite are left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stat {
    /// Least.
    pub min: f32,
    /// Most.
    pub max: f32,
    sum: f64,
    count: u32,
}

impl Stat {
    const NONE: Stat = Stat { min: f32::INFINITY, max: f32::NEG_INFINITY, sum: 0.0, count: 0 };

    fn add(&mut self, value: f64) {
        if value.is_finite() {
            self.min = self.min.min(value as f32);
            self.max = self.max.max(value as f32);
            self.sum += value;
            self.count += 1;
        }
    }

    fn join(&mut self, other: &Stat) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
        self.count += other.count;
    }

    /// Mean; none of nothing finite.
    pub fn mean(&self) -> Option<f32> {
        (self.count > 0).then(|| (self.sum / f64::from(self.count)) as f32)
    }
}

/// Where a point stands: what curves are drawn over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Microseconds since the Unix epoch.
    pub time_us: u64,
}

/// Neighbouring points of `N` quantities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket<const N: usize> {
    /// Step of its first point.
    pub first: u64,
    /// Its last point.
    pub last: At,
    points: u64,
    /// By quantity.
    pub stats: [Stat; N],
}

impl<const N: usize> Bucket<N> {
    fn join(&mut self, other: &Bucket<N>) {
        self.last = other.last;
        self.points += other.points;
        self.stats.iter_mut().zip(&other.stats).for_each(|(a, b)| a.join(b));
    }
}

/// `N` quantities over the steps of a run.
///
/// ```
/// use dash::curve::{At, Curve};
/// let mut curve = Curve::<1>::new();
/// for step in 0..100_000 {
///     let loss = if step == 77_777 { 9.0 } else { 1.0 };
///     curve.add(At { step, tokens: step, time_us: step }, [loss]);
/// }
/// let buckets = curve.merged(200);
/// assert!(buckets.len() <= 200);
/// assert_eq!(buckets.iter().filter(|b| b.stats[0].max == 9.0).count(), 1, "no spike is lost");
/// ```
#[derive(Clone, Debug)]
pub struct Curve<const N: usize> {
    buckets: Vec<Bucket<N>>,
    /// Points of a full bucket.
    width: u64,
}

impl<const N: usize> Default for Curve<N> {
    fn default() -> Self {
        Curve::new()
    }
}

impl<const N: usize> Curve<N> {
    /// Nothing yet.
    pub fn new() -> Self {
        Curve::of_width(1)
    }

    /// Nothing yet, with buckets of `width` points for a start.
    pub(crate) fn of_width(width: u64) -> Self {
        Curve { buckets: Vec::new(), width: width.max(1) }
    }

    /// Adds a point after all others.
    pub fn add(&mut self, at: At, values: [f64; N]) {
        let full = self.buckets.last().is_none_or(|b| b.points >= self.width);
        if full {
            if self.buckets.len() == BUCKETS_MAX {
                self.halve();
            }
            self.buckets.push(Bucket { first: at.step, last: at, points: 0, stats: [Stat::NONE; N] });
        }
        if let Some(bucket) = self.buckets.last_mut() {
            bucket.last = at;
            bucket.points += 1;
            bucket.stats.iter_mut().zip(values).for_each(|(stat, value)| stat.add(value));
        }
    }

    fn halve(&mut self) {
        self.width *= 2;
        self.buckets = gather(&self.buckets, 2);
    }

    /// Forgets what comes after `step`: a run went back to there. A bucket that began before stays whole, lost steps
    /// among it.
    pub fn truncate(&mut self, step: u64) {
        while self.buckets.last().is_some_and(|b| b.first > step) {
            self.buckets.pop();
        }
        if let Some(bucket) = self.buckets.last_mut() {
            bucket.last.step = bucket.last.step.min(step);
        }
    }

    /// All buckets.
    pub fn buckets(&self) -> &[Bucket<N>] {
        &self.buckets
    }

    /// At most `count` buckets, each of as many neighbours.
    pub fn merged(&self, count: usize) -> Vec<Bucket<N>> {
        gather(&self.buckets, self.buckets.len().div_ceil(count.max(1)).max(1))
    }

    /// At most `count` buckets of those that touch the steps `from` to `to`.
    pub fn between(&self, from: u64, to: u64, count: usize) -> Vec<Bucket<N>> {
        let inside: Vec<_> =
            self.buckets.iter().filter(|b| b.last.step >= from && b.first <= to).copied().collect();
        gather(&inside, inside.len().div_ceil(count.max(1)).max(1))
    }
}

fn gather<const N: usize>(buckets: &[Bucket<N>], by: usize) -> Vec<Bucket<N>> {
    let join = |near: &[Bucket<N>]| {
        let mut first = near[0];
        near[1..].iter().for_each(|b| first.join(b));
        first
    };
    buckets.chunks(by).map(join).collect()
}

/// Buckets as a page takes them: one array for each column.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Columns {
    /// Step of the last point.
    pub step: Vec<u64>,
    /// Tokens there.
    pub tokens: Vec<u64>,
    /// Milliseconds since the Unix epoch there.
    pub time_ms: Vec<u64>,
    /// Mean, least and most by quantity; the latter two only where buckets hold several points.
    pub series: Vec<Series>,
}

/// One quantity's columns; `null` where nothing was finite.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Series {
    /// What it is.
    pub name: &'static str,
    /// Means.
    pub mean: Vec<Option<f32>>,
    /// Least values, if they are others than the means.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub min: Vec<Option<f32>>,
    /// Most values, likewise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub max: Vec<Option<f32>>,
}

/// Columns of `buckets`, quantities named. A quantity that is nowhere known is left out.
pub fn columns<const N: usize>(buckets: &[Bucket<N>], names: [&'static str; N]) -> Columns {
    let several = buckets.iter().any(|b| b.points > 1);
    let series = names.into_iter().enumerate().filter_map(|(i, name)| {
        let stats = || buckets.iter().map(move |b| b.stats[i]);
        let known = |value: fn(&Stat) -> f32| -> Vec<Option<f32>> {
            let of = |s: Stat| (s.count > 0).then(|| value(&s));
            if several { stats().map(of).collect() } else { Vec::new() }
        };
        let mean: Vec<_> = stats().map(|s| s.mean()).collect();
        mean.iter().any(Option::is_some).then(|| Series {
            name,
            mean,
            min: known(|s| s.min),
            max: known(|s| s.max),
        })
    });
    Columns {
        step: buckets.iter().map(|b| b.last.step).collect(),
        tokens: buckets.iter().map(|b| b.last.tokens).collect(),
        time_ms: buckets.iter().map(|b| b.last.time_us / 1000).collect(),
        series: series.collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(step: u64) -> At {
        At { step, tokens: 2 * step, time_us: 3000 * step }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_added(values in prop::collection::vec(-1e3f64..1e3, 1..9000), count in 1usize..500) {
            let mut curve = Curve::<1>::new();
            for (i, v) in values.iter().enumerate() {
                curve.add(at(i as u64), [*v]);
            }
            prop_assert!(curve.buckets().len() <= BUCKETS_MAX);
            let merged = curve.merged(count);
            prop_assert!(merged.len() <= count);
            prop_assert_eq!(merged.iter().map(|b| b.points).sum::<u64>(), values.len() as u64);
            let most = values.iter().map(|v| *v as f32).fold(f32::MIN, f32::max);
            prop_assert_eq!(merged.iter().map(|b| b.stats[0].max).fold(f32::MIN, f32::max), most);
            let sum: f64 = merged.iter().map(|b| b.stats[0].sum).sum();
            prop_assert!((sum - values.iter().sum::<f64>()).abs() < 1e-6);
            prop_assert!(merged.windows(2).all(|w| w[0].last.step < w[1].first));
        }
    }

    #[test]
    fn what_is_not_finite_leaves_a_gap() {
        let mut curve = Curve::<2>::new();
        for (step, loss) in [(1, 2.0), (2, f64::NAN), (3, f64::INFINITY), (4, 1.0)] {
            curve.add(at(step), [loss, f64::NAN]);
        }
        let columns = columns(&curve.merged(9), ["loss", "mfu"]);
        assert_eq!(columns.series.len(), 1, "what is nowhere known is left out");
        assert_eq!(columns.series[0].mean, [Some(2.0), None, None, Some(1.0)]);
        assert_eq!((columns.step[3], columns.tokens[3], columns.time_ms[3]), (4, 8, 12));
    }

    #[test]
    fn a_run_that_goes_back_draws_over_what_was_lost() {
        let mut curve = Curve::<1>::of_width(2);
        (1..=9).for_each(|s| curve.add(at(s), [s as f64]));
        curve.truncate(4);
        assert_eq!(curve.buckets().last().map(|b| b.last.step), Some(4));
        (5..=6).for_each(|s| curve.add(at(s), [0.0]));
        let steps: Vec<u64> = curve.buckets().iter().map(|b| b.last.step).collect();
        assert_eq!(steps, [2, 4, 6]);
        curve.truncate(3);
        assert_eq!(curve.buckets().last().map(|b| (b.first, b.last.step)), Some((3, 3)));
        curve.truncate(0);
        assert!(curve.buckets().is_empty());
    }

    #[test]
    fn a_part_is_what_touches_it() {
        let mut curve = Curve::<1>::of_width(10);
        (0..100).for_each(|s| curve.add(at(s), [s as f64]));
        let part = curve.between(15, 32, 10);
        assert_eq!(
            part.iter().map(|b| (b.first, b.last.step)).collect::<Vec<_>>(),
            [(10, 19), (20, 29), (30, 39)]
        );
        assert_eq!(curve.between(15, 32, 2).len(), 2);
    }
}
