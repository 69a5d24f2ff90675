//! From which utilisation owning pays: for machines that run for good, and over the months of the profile.

use serde::Serialize;

use super::Way;
use super::assumptions::Assumptions;
use super::cash::{Fixed, total};
use super::ends::Swings;
use super::ways::{Plan, RENTS, cash, utilisation};
use crate::own::break_even;
use crate::{HOURS_PER_YEAR, Spread};

/// From which utilisation owning pays against a rent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BreakEven {
    /// The rent.
    pub against: Way,
    /// Dollars for an hour of an accelerator.
    pub usd_per_h: Spread,
    /// Share of the time for machines that stand there and run for good, at prices of today; above 1 owning never pays.
    /// `null` in JSON where the rent is below the power alone.
    pub utilisation: Spread,
    /// Share of the time that machines ordered now must work once they are there, so that the months of the profile cost
    /// what renting does: with the time until they run, prices that fall, and what they are worth at the end. `None` where
    /// they would come too late.
    pub over_profile: Option<Spread>,
}

/// Against each rent that is known.
pub(super) fn all(all: &Assumptions, plans: &[Plan]) -> Vec<BreakEven> {
    let build = plans.iter().find(|p| p.way == Way::Build);
    let known = RENTS.into_iter().filter(|(_, key, _)| all.numbers.contains_key(key));
    known
        .map(|(against, key, _)| {
            let rent = Plan { way: against, order: 0, accelerators: 0.0 };
            let over = |build: &Plan| Swings::of(all, |at| over_profile(at, build, &rent)).range();
            BreakEven {
                against,
                usd_per_h: all.number(key),
                utilisation: Swings::of(all, |at| for_good(at, at.get(key))).range(),
                over_profile: build.map(over),
            }
        })
        .collect()
}

/// The ways at one share of the time that machines bought now would work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AtUse {
    /// That share.
    pub utilisation: f64,
    /// What each way costs.
    pub usd: Vec<WayUsd>,
}

/// A way and its dollars of today over all months.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WayUsd {
    /// Which way.
    pub way: Way,
    /// Its cost, not rounded.
    pub usd: f64,
}

/// Points of the curves of cost over use.
const USE_POINTS: usize = 10;

/// What buying now and each rent cost where every month's use is scaled; empty where nothing can be bought.
pub(super) fn by_use(at: &Fixed, plans: &[Plan]) -> Vec<AtUse> {
    let Some(build) = plans.iter().find(|p| p.way == Way::Build) else { return Vec::new() };
    let now = utilisation(at, build);
    let point = |i: usize| {
        let share = i as f64 / USE_POINTS as f64;
        let scaled = at.with_use(share / now);
        let of = plans.iter().filter(|p| p.way != Way::CloudFirst);
        AtUse {
            utilisation: share,
            usd: of.map(|p| WayUsd { way: p.way, usd: total(&cash(&scaled, p)) }).collect(),
        }
    };
    if now > 0.0 { (1..=USE_POINTS).map(point).collect() } else { Vec::new() }
}

fn for_good(at: &Fixed, rent_usd_per_h: f64) -> f64 {
    let (idle, busy) = (at.yearly_usd(0.0), at.yearly_usd(1.0));
    break_even(idle, (busy - idle) / HOURS_PER_YEAR, 1, rent_usd_per_h)
}

/// Shares of the time beyond this are no answer but never.
const SHARE_MAX: f64 = 10.0;
/// Shares of the time that are tried first.
const USES: usize = 20;
/// Halvings of the way between two of them.
const HALVINGS: usize = 40;

/// Every month's use is scaled until buying costs what renting does; that scale of the machines' utilisation is the answer.
fn over_profile(at: &Fixed, build: &Plan, rent: &Plan) -> f64 {
    let gap = |by: f64| {
        let scaled = at.with_use(by);
        total(&cash(&scaled, build)) - total(&cash(&scaled, rent))
    };
    let used = utilisation(at, build);
    if used <= 0.0 {
        return f64::INFINITY;
    }
    // What is reserved costs the same however it is used, so owning may pay for a while only: the first use from which on it
    // does is looked for, the profile's own among those tried.
    let mut tried: Vec<f64> = (1..=USES).map(|i| i as f64 / USES as f64 / used).collect();
    tried.extend([1.0, SHARE_MAX / used]);
    tried.sort_by(f64::total_cmp);
    let Some(first) = tried.iter().position(|by| gap(*by) <= 0.0) else { return f64::INFINITY };
    let mut dear = if first > 0 { tried[first - 1] } else { 0.0 };
    let mut cheap = tried[first];
    for _ in 0..HALVINGS {
        let middle = (dear + cheap) / 2.0;
        if gap(middle) > 0.0 { dear = middle } else { cheap = middle }
    }
    cheap * used
}
