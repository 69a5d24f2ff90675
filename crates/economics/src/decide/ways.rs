//! The ways to get the compute, each at its best, and what it costs.

use super::assumptions::{Assumptions, Key};
use super::cash::{Fixed, Parts, total};
use super::ends::{Swings, Toward};
use super::{Priced, Rejected, Way};
use crate::{Bill, Spread, Usd};

/// A way as it would be gone: when to order, and for how many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) way: Way,
    pub(super) order: usize,
    pub(super) accelerators: f64,
}

/// Rents by commitment: the way, its price, and the months of a term.
pub(super) const RENTS: [(Way, Key, usize); 4] = [
    (Way::OnDemand, Key::OnDemandUsdPerH, 0),
    (Way::Reserved1y, Key::Reserved1yUsdPerH, 12),
    (Way::Reserved3y, Key::Reserved3yUsdPerH, 36),
    (Way::Spot, Key::SpotUsdPerH, 0),
];

/// The ways that are possible, each at its best, and why the others are not.
pub(super) fn possible(at: &Fixed) -> (Vec<Plan>, Vec<Rejected>) {
    let (mut plans, mut rejected) = (Vec::new(), Vec::new());
    for (way, key, months) in RENTS {
        match rent(at, way, key, months) {
            Ok(plan) => plans.push(plan),
            Err(why) => rejected.push(Rejected { way, why }),
        }
    }
    for (way, found) in [(Way::Build, build(at)), (Way::CloudFirst, cloud_first(at))] {
        match found {
            Ok(plan) => plans.push(plan),
            Err(why) => rejected.push(Rejected { way, why }),
        }
    }
    (plans, rejected)
}

const PRIVATE: &str = "data may not leave one's own machines";

fn rent(at: &Fixed, way: Way, key: Key, months: usize) -> Result<Plan, String> {
    if !at.data_may_leave {
        return Err(PRIVATE.to_owned());
    }
    if !at.has(key) {
        return Err(format!("no {} price is known", way.name()));
    }
    if months > 0 && at.reserved(key, months)[0].1 == 0.0 {
        return Err(format!(
            "no part of the demand is cheaper reserved: ${:.2} an hour for all hours of a term, ${:.2} for those used",
            at.get(key),
            at.get(Key::OnDemandUsdPerH)
        ));
    }
    Ok(Plan { way, order: 0, accelerators: 0.0 })
}

fn build(at: &Fixed) -> Result<Plan, String> {
    if at.lead_months() >= at.months() {
        return Err(late(at));
    }
    let (order, accelerators, _) = at.best_own(0..1).ok_or_else(|| late(at))?;
    Ok(Plan { way: Way::Build, order, accelerators })
}

fn late(at: &Fixed) -> String {
    format!("machines ordered now work from month {}, after the last of the profile", at.lead_months())
}

/// Rent by the hour first. Only an order that makes all months cheaper than renting on is a plan.
fn cloud_first(at: &Fixed) -> Result<Plan, String> {
    if !at.data_may_leave {
        return Err(PRIVATE.to_owned());
    }
    let last = at.months().saturating_sub(at.lead_months());
    let (order, accelerators, usd) = at.best_own(1..last).ok_or_else(|| late(at))?;
    let on = total(&at.hourly(Key::OnDemandUsdPerH, 1.0));
    if usd >= on {
        return Err(format!(
            "no month to order in makes it cheaper than renting on by the hour: the least loss, {}, is of month {order}",
            Usd::whole(usd - on)
        ));
    }
    Ok(Plan { way: Way::CloudFirst, order, accelerators })
}

/// Dollars of today of a way.
pub(super) fn cash(at: &Fixed, plan: &Plan) -> Parts {
    match plan.way {
        Way::OnDemand => at.hourly(Key::OnDemandUsdPerH, 1.0),
        Way::Reserved1y => at.reserved(Key::Reserved1yUsdPerH, 12),
        Way::Reserved3y => at.reserved(Key::Reserved3yUsdPerH, 36),
        Way::Spot => at.spot(),
        Way::Build | Way::CloudFirst => at.own(plan.order, plan.accelerators).parts,
    }
}

/// Share of the time that bought machines work once they are there.
pub(super) fn utilisation(at: &Fixed, plan: &Plan) -> f64 {
    let from = (plan.order + at.lead_months()).min(at.months());
    let months = from..at.months();
    let there = plan.accelerators * months.len().max(1) as f64;
    months.map(|m| at.at_work(m, plan.accelerators)).sum::<f64>() / there
}

/// A way with its money and its range.
pub(super) fn priced(all: &Assumptions, plan: &Plan) -> Priced {
    let at = Fixed::of(all);
    let usd = |at: &Fixed| total(&cash(at, plan));
    let swings = Swings::of(all, usd);
    let range = swings.range();
    let cheap = cash(&swings.world(all, Toward::Less, range.low, usd), plan);
    let dear = cash(&swings.world(all, Toward::More, range.high, usd), plan);
    let value = cash(&at, plan);
    let parts = (0..value.len()).filter(|i| value[*i].1 != 0.0 || dear[*i].1 != 0.0);
    let part = |i: usize| {
        let (name, usd) = value[i];
        (name, Spread { low: cheap[i].1.min(usd), value: usd, high: dear[i].1.max(usd) })
    };
    let owned = plan.way.owns().then(|| at.own(plan.order, plan.accelerators));
    Priced {
        way: plan.way,
        cost: Bill::of(parts.map(part)),
        accelerators: owned.as_ref().map(|_| plan.accelerators as usize),
        order_month: owned.as_ref().map(|_| plan.order),
        move_month: owned.as_ref().map(|_| plan.order + at.lead_months()),
        utilisation: owned.as_ref().map(|_| utilisation(&at, plan)),
        bought_usd: owned.as_ref().map(|o| Usd::whole(o.bought)),
        left_usd: owned.as_ref().map(|o| Usd::whole(o.left)),
    }
}
