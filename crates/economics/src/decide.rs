//! Build or rent: compute, privacy, utilisation over months, cost of ownership, and when to move, as one decision.
//!
//! Money is of today: what is paid later is discounted by the cost of capital. Ranges are of assumptions that err
//! independently of one another.

mod assumptions;
mod break_even;
mod cash;
mod ends;
mod reasons;
mod rents;
mod ways;

use serde::Serialize;
use spec::{Error, Result};

use assumptions::KEYS;
pub use assumptions::{Assumptions, Key, Number, Phase, check_demand, profile};
pub use break_even::{AtUse, BreakEven, WayUsd};
use cash::{Fixed, total};
use ways::{cash, possible, priced};

use crate::{Bill, HOURS_PER_MONTH, Usd};

/// The utilisation below which the guide calls the cloud "almost always cheaper".
pub const GUIDE_BREAK_EVEN: f64 = 0.7;
/// By how much the demand may be misjudged: a choice, for the tornado.
const DEMAND_RANGE: [f64; 2] = [0.5, 1.5];

/// A way to get the compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Rent by the hour.
    OnDemand,
    /// Reserve for a year at a time, and rent peaks by the hour.
    #[serde(rename = "reserved-1y")]
    Reserved1y,
    /// Reserve for three years at a time, and rent peaks by the hour.
    #[serde(rename = "reserved-3y")]
    Reserved3y,
    /// Rent what others leave, and lose it at times.
    Spot,
    /// Buy now.
    Build,
    /// Rent first, and buy later.
    CloudFirst,
}

impl Way {
    /// As in answers.
    pub fn name(self) -> &'static str {
        match self {
            Way::OnDemand => "on-demand",
            Way::Reserved1y => "reserved-1y",
            Way::Reserved3y => "reserved-3y",
            Way::Spot => "spot",
            Way::Build => "build",
            Way::CloudFirst => "cloud-first",
        }
    }

    fn owns(self) -> bool {
        matches!(self, Way::Build | Way::CloudFirst)
    }
}

/// One way with its money.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Priced {
    /// Which way.
    pub way: Way,
    /// Dollars of today over the whole profile, by part. Each end is a world in which all assumptions lean that way by the
    /// same share of their ranges, as far as independent errors carry the total.
    pub cost: Bill,
    /// Accelerators bought, for the ways that buy.
    pub accelerators: Option<usize>,
    /// Month of the order, from 0.
    pub order_month: Option<usize>,
    /// Month from which the machines work.
    pub move_month: Option<usize>,
    /// Share of the time that the machines work from then on.
    pub utilisation: Option<f64>,
    /// Dollars of today for machines, replacements included; in the cost.
    pub bought_usd: Option<Usd>,
    /// What they are worth after the last month, in dollars of today; taken off the cost.
    pub left_usd: Option<Usd>,
}

/// A way that was not chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rejected {
    /// Which way.
    pub way: Way,
    /// Why.
    pub why: String,
}

/// What one assumption moves.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// Which assumption.
    pub assumption: String,
    /// Its low end.
    pub low: f64,
    /// Its high end.
    pub high: f64,
    /// Dollars by which owning is dearer than renting at the low end; negative where it is cheaper.
    pub own_less_rent_at_low: f64,
    /// The same at the high end.
    pub own_less_rent_at_high: f64,
    /// What would be chosen at the low end.
    pub choice_at_low: Way,
    /// What would be chosen at the high end.
    pub choice_at_high: Way,
}

impl Bar {
    /// Dollars between its ends.
    pub fn swing(&self) -> f64 {
        (self.own_less_rent_at_high - self.own_less_rent_at_low).abs()
    }
}

/// A decision with its reasons.
#[derive(Clone, Debug, Serialize)]
pub struct Decision {
    /// What to do.
    pub choice: Way,
    /// Why.
    pub reasons: Vec<String>,
    /// What was not chosen, and why.
    pub rejected: Vec<Rejected>,
    /// All ways that are possible, the cheapest first.
    pub options: Vec<Priced>,
    /// The month from which one's own machines work, if they are bought at all.
    pub move_month: Option<usize>,
    /// Accelerator-hours of the profile.
    pub accelerator_hours: f64,
    /// Break-even utilisation against each rent.
    pub break_even: Vec<BreakEven>,
    /// What buying now and each rent cost at other uses of the machines.
    pub by_use: Vec<AtUse>,
    /// The guide's figure, beside it.
    pub guide_break_even: f64,
    /// What would change the decision, the most important first.
    pub tornado: Vec<Bar>,
    /// What it rests on.
    pub assumptions: Assumptions,
}

/// Decides.
///
/// # Errors
/// If nothing is possible: data may not leave, and the machines would come after the last month of the profile.
pub fn decide(assumptions: Assumptions) -> Result<Decision> {
    let value = Fixed::of(&assumptions);
    let (plans, not_possible) = possible(&value);
    let mut options: Vec<Priced> = plans.iter().map(|plan| priced(&assumptions, plan)).collect();
    options.sort_by_key(|p| p.cost.total.value);
    let Some(best) = options.first().cloned() else {
        let lead = assumptions.number(Key::LeadMonths).value;
        let what = format!(
            "nothing is possible: data may not leave, and machines come after {lead} months, the profile has {}",
            assumptions.months()
        );
        return Err(
            Error::user(what).hint("look further ahead, or allow machines of others: data_may_leave = true")
        );
    };
    let break_even = break_even::all(&assumptions, &plans);
    let reasons = reasons::reasons(&assumptions, &options, &break_even);
    let rejected = reasons::rejected(&options, not_possible);
    let hours: f64 = assumptions.wanted().iter().map(|(n, share)| n * share * HOURS_PER_MONTH).sum();
    Ok(Decision {
        choice: best.way,
        reasons,
        rejected,
        move_month: best.move_month,
        options,
        accelerator_hours: hours,
        break_even,
        by_use: break_even::by_use(&value, &plans),
        guide_break_even: GUIDE_BREAK_EVEN,
        tornado: tornado(&assumptions, &value),
        assumptions,
    })
}

/// The cheapest way, and by how much the best that owns is dearer than the best that rents.
fn outcome(at: &Fixed) -> Option<(Way, f64)> {
    let all: Vec<(Way, f64)> = possible(at).0.iter().map(|p| (p.way, total(&cash(at, p)))).collect();
    let least =
        |owns: bool| all.iter().filter(|a| a.0.owns() == owns).map(|a| a.1).fold(f64::INFINITY, f64::min);
    let best = all.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some((best.0, least(true) - least(false)))
}

fn tornado(all: &Assumptions, value: &Fixed) -> Vec<Bar> {
    let bar = |assumption: &str, low: f64, high: f64, at_low: Fixed, at_high: Fixed| {
        let ((choice_at_low, a), (choice_at_high, b)) = (outcome(&at_low)?, outcome(&at_high)?);
        let sane = |x: f64| if x.is_finite() { x.round() } else { 0.0 };
        Some(Bar {
            assumption: assumption.to_owned(),
            low,
            high,
            own_less_rent_at_low: sane(a),
            own_less_rent_at_high: sane(b),
            choice_at_low,
            choice_at_high,
        })
    };
    let ranged = KEYS.iter().filter(|k| all.number(k.0).low < all.number(k.0).high);
    let mut bars: Vec<Bar> = ranged
        .filter_map(|(key, name, ..)| {
            let s = all.number(*key);
            bar(name, s.low, s.high, value.with(*key, s.low), value.with(*key, s.high))
        })
        .collect();
    let [low, high] = DEMAND_RANGE;
    bars.extend(bar("demand", low, high, value.with_demand(low), value.with_demand(high)));
    bars.sort_by(|a, b| b.swing().total_cmp(&a.swing()));
    bars
}
